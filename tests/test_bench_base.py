"""`python -m bench --base`: two commits take turns, and a case slower by more than its spread is flagged."""

import argparse
import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.measure import base
from bench.measure.base import Verdict
from bench.measure.timing import Times

ROOT = Path(__file__).resolve().parents[1]
ARGS = argparse.Namespace(suites=["rms_norm"], cases=(), seconds=0.0, smallest=False, compile=False)


def verdict(old: tuple[float, ...], new: tuple[float, ...]) -> Verdict:
    return Verdict("a case", Times(old), Times(new), tuple(n / o for n, o in zip(new, old, strict=True)))


def test_a_case_is_slower_only_by_more_than_its_spread():
    spread = (0.9, 1.0, 1.1)
    assert verdict(spread, (1.2, 1.3, 1.4)).is_slower
    assert not verdict(spread, (1.0, 1.15, 1.3)).is_slower, "within the spread"
    assert not verdict(spread, (0.4, 0.5, 0.6)).is_slower
    assert not verdict(spread, spread).is_slower
    # a clock that drifts: slower and slower, and the same in both
    assert not verdict((1.0, 2.0, 3.0), (1.0, 2.0, 3.0)).is_slower
    assert str(verdict(spread, (1.8, 2.0, 2.2))) == (
        "   2.000  2.000 to  2.000         1         2  a case  SLOWER by more than its spread"
    )


class Worker:
    """Cases by name: milliseconds of a sample, or why there is none."""

    asked: list = []

    def __init__(self, name, tree, suite, args):
        self.name, self.cases = name, tree

    def ask(self, do: str, case: str = "", count: int = 0) -> dict:
        self.asked.append((self.name, do))
        if do == "list":
            return {"cases": list(self.cases)}
        if do == "open":
            self.ms = self.cases[case]
            found = self.ms if isinstance(self.ms, str) else None
            return {"obstacle": found} if found else {"estimate_ms": self.ms, "sample_ms": self.ms}
        if do == "capture":
            return {"estimate_ms": self.ms, "sample_ms": 40 * self.ms}
        return {"ms": [self.ms] * count}

    def close(self):
        self.asked.append((self.name, "close"))


@pytest.fixture
def workers(monkeypatch) -> list:
    monkeypatch.setattr(Worker, "asked", [])
    monkeypatch.setattr(base, "Worker", Worker)
    return Worker.asked


def test_trees_take_turns_and_the_order_changes(workers):
    [found], failed = base.compare_suite("s", {"a": 40.0}, {"a": 60.0}, ARGS)
    assert (
        not failed and found.ratios == (1.5,) * base.MIN_ROUNDS and found.is_slower and found.case == "s: a"
    )
    turns = [name for name, do in workers if do == "sample"]
    assert turns == [base.OLD, base.NEW, base.NEW, base.OLD] * 2 + [base.OLD, base.NEW]
    assert [name for name, do in workers if do == "close"] == [base.NEW, base.OLD]


def test_short_cases_are_captured_in_both_trees(workers):
    base.compare_suite("s", {"a": 0.04}, {"a": 0.06}, ARGS)
    assert [name for name, do in workers if do == "capture"] == [base.OLD, base.NEW]
    workers.clear()
    base.compare_suite("s", {"a": 0.06}, {"a": 0.06}, ARGS)
    assert "capture" not in {do for _, do in workers}


def test_a_case_of_one_tree_alone_or_red_in_one_is_named_and_not_timed(workers, capsys):
    old = {"both": 10.0, "gone": 10.0, "red": "AssertionError: parity"}
    new = {"both": 10.0, "new": 10.0, "red": 10.0}
    [found], failed = base.compare_suite("s", old, new, ARGS)
    assert found.case == "s: both" and not found.is_slower and not failed
    out = capsys.readouterr().out
    assert "s: only base has gone\n" in out and "s: only this tree has new\n" in out
    assert "s: red: not timed, base: AssertionError: parity\n" in out


@pytest.mark.parametrize("old", [10.0, "AssertionError: parity"])
def test_a_case_that_is_wrong_in_this_tree_is_a_failure(old, workers, capsys, monkeypatch):
    cases = {"right": 10.0, "red": old}
    monkeypatch.setattr(base, "checked_out", lambda commit, root: contextlib.nullcontext(cases))
    args = argparse.Namespace(**{**vars(ARGS), "suites": ["s"]})
    assert base.compare("HEAD", args, {"right": 10.0, "red": "AssertionError: parity"}) == 1
    out = capsys.readouterr().out
    assert "s: red: not timed, this tree: AssertionError: parity\n" in out
    assert "0 of 1 cases are slower" in out and "failed: s: red\n" in out
    assert base.compare("HEAD", args, {"right": 10.0, "red": 10.0}) == 0


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """This tree as a repository of one commit."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    folder = tmp_path_factory.mktemp("repository") / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in ("bench", "kernels", "nvembed_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, symlinks=True)
    subprocess.run(["git", "init", "-q", folder], check=True)
    commit(folder)
    return folder


def commit(repository: Path) -> None:
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["add", "."], ["commit", "-q", "-m", "a change"]):
        subprocess.run([*git, *command], check=True)


def run(repository: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench", "--smallest", *options]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True)


@pytest.mark.slow
def test_the_same_commit_is_as_fast_and_a_planted_delay_is_flagged(repository):
    options = ["--base", "HEAD", "--suites", "rms_norm", "--cases", "rms_norm one-token forward"]
    same = run(repository, *options)
    assert "of 4 cases are slower" in same.stdout, same.stdout + same.stderr[-3000:]
    ratios = [float(line.split()[0]) for line in same.stdout.splitlines() if "one-token" in line]
    # of one round on any machine: this is no measure of speed
    assert len(ratios) == 4 and all(0.1 < ratio < 10 for ratio in ratios), same.stdout

    reference = repository / "kernels" / "reference.py"
    before = reference.read_text()
    head = "def rms_norm("
    assert before.count(head) == 1
    delay = "\n\n_undelayed = rms_norm\n\n\ndef rms_norm(*args):\n    __import__('time').sleep(0.02)\n"
    reference.write_text(f"{before}{delay}    return _undelayed(*args)\n")
    try:
        slow = run(repository, *options)
    finally:
        reference.write_text(before)
    flagged = [line for line in slow.stdout.splitlines() if "SLOWER" in line]
    assert slow.returncode == 1, slow.stdout + slow.stderr[-3000:]
    assert any(": rms_norm one-token forward " in line for line in flagged), slow.stdout
    worktrees = subprocess.run(
        ["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True
    )
    assert len(worktrees.stdout.splitlines()) == 1, "a worktree was left behind"


@pytest.mark.slow
def test_a_package_that_the_benches_cannot_run_is_no_verdict(repository):
    reference = repository / "kernels" / "reference.py"
    before = reference.read_text()
    for text in ("raise ImportError('planted')\n", before):
        reference.write_text(text)
        commit(repository)
    failed = run(repository, "--base", "HEAD~1", "--suites", "rms_norm")
    assert failed.returncode == 1 and "failed: rms_norm" in failed.stdout
    assert "rms_norm: the benches do not run in base: see the error above" in failed.stdout
    assert "ImportError: planted" in failed.stderr


def test_a_commit_that_is_not_there_is_an_error(repository):
    missing = run(repository, "--base", "no-such-commit")
    assert missing.returncode == 2 and "no-such-commit" in missing.stderr.splitlines()[-1]
