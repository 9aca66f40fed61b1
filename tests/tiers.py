"""Two tiers of tests, and a limit on what a file of the first may cost. Its hooks are conftest's.

Tests marked `long` run with --long alone, all others without it. That composes with -m, where a default of
-m "not long" would be replaced.

A limit counts CPU seconds of the process and its children, from the start of each test. A busy machine makes
a test slow, but hardly dearer, so it turns nothing red.
"""

import resource
from collections import Counter

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("tiers")
    group.addoption("--long", action="store_true", help="the tests marked long, and no others")
    group.addoption("--file-seconds", type=float, help="fail if a test file takes more CPU time")
    group.addoption("--all-seconds", type=float, help="fail if all test files together take more CPU time")


def pytest_configure(config):
    config.pluginmanager.register(_Clock(config))


def deselect(config, items) -> None:
    """Keep the tests of the tier that was asked for."""
    long = config.getoption("--long")
    dropped = [item for item in items if (item.get_closest_marker("long") is not None) != long]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class _Clock:
    """Measures where tests run, and judges where reports arrive: with pytest-xdist, in the controller."""

    def __init__(self, config):
        self.limits = config.getoption("--file-seconds"), config.getoption("--all-seconds")
        self.judges = not hasattr(config, "workerinput")
        self.files = Counter()
        self.last = 0.0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self):
        self.last = _cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        before, self.last = self.last, _cpu_seconds()
        report.cpu_seconds = self.last - before
        return report

    def pytest_runtest_logreport(self, report):
        self.files[report.nodeid.split("::")[0]] += getattr(report, "cpu_seconds", 0.0)

    def _complaints(self) -> list[str]:
        each, together = self.limits if self.judges else (None, None)
        found = [
            f"{file} took {seconds:.0f} s of CPU time, and a file may take {each:g}"
            for file, seconds in self.files.items()
            if each is not None and seconds > each
        ]
        if together is not None and self.files.total() > together:
            found.append(f"all files took {self.files.total():.0f} s of CPU time, and may take {together:g}")
        return found

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if self._complaints():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if any(self.limits):
            terminalreporter.section("CPU time")
            for file, seconds in self.files.most_common(10):
                terminalreporter.write_line(f"{seconds:7.1f} s  {file}")
            terminalreporter.write_line(f"{self.files.total():7.1f} s  all {len(self.files)} files")
        for complaint in self._complaints():
            terminalreporter.write_line(f"TOO LONG: {complaint}", red=True)
