"""Every bench file runs once, with its smallest cases, so that none can rot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import SUITES
from bench.measure import results
from bench.measure.results import OURS

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "bench").glob("bench_*.py"))


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench", "--smallest", "--results", str(folder / "r.csv"), *options]
    # pytest-benchmark measures nothing where it finds itself in a worker of pytest-xdist
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


def test_every_bench_file_is_a_suite():
    assert {f"bench_{suite}" for suite in SUITES} == {path.stem for path in FILES}


@pytest.mark.slow
def test_every_suite_runs_and_goes_on_where_it_was(tmp_path):
    first = run(tmp_path)
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-2000:]
    rows = results.read(tmp_path / "r.csv")
    for suite in SUITES:
        timed = {row["case"] for row in rows if row["suite"] == suite and row["metric"] == "time_p50"}
        assert timed, f"no time of {suite}"
        ours = {row["case"] for row in rows if row["suite"] == suite and row["impl"] == OURS}
        assert ours == {row["case"] for row in rows if row["suite"] == suite}
    assert "skipped" not in first.stdout, first.stdout[-2000:]

    again = run(tmp_path, "--suites", "rms_norm", "encode")
    assert again.returncode == 0 and "4 skipped" in again.stdout, again.stdout
    assert results.read(tmp_path / "r.csv") == rows


@pytest.mark.slow
def test_time_that_is_over_leaves_the_rest_to_the_next_run(tmp_path):
    late = run(tmp_path, "--suites", "rms_norm", "--minutes", "0")
    assert late.returncode == 0 and "4 skipped" in late.stdout, late.stdout


def test_a_file_that_holds_something_else_is_told_before_anything_runs(tmp_path):
    (tmp_path / "r.csv").write_text("a,b\n1,2\n")
    refused = run(tmp_path)
    assert refused.returncode == 2 and refused.stdout == ""
    assert "is no results file" in refused.stderr.splitlines()[-1]
