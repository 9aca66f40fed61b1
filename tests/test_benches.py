"""Every bench file runs once, with its smallest cases, so that none can rot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.measure import results
from bench.measure.results import OURS
from bench.report import comparisons
from bench.suites import SUITES

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "bench").glob("bench_*.py"))


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench", "--smallest", "--results", str(folder / "r.csv"), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_bench_file_is_a_suite_with_a_title():
    assert {f"bench_{suite}" for suite in SUITES} == {path.stem for path in FILES}
    assert set(comparisons.SUITES) == set(SUITES)


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_runs(suite, tmp_path, capsys):
    """In this process, because a new one takes seconds to import torch."""
    file = tmp_path / "r.csv"
    status = main(["--smallest", "--no-report", "--results", str(file), "--suites", suite])
    printed = capsys.readouterr()
    assert status == 0, printed.out[-4000:] + printed.err[-2000:]
    rows = [row for row in results.read(file) if row["suite"] == suite]
    assert "skipped" not in printed.out
    assert any(row["metric"] == "time_p50" for row in rows)
    assert {row["case"] for row in rows} == {row["case"] for row in rows if row["impl"] == OURS}
    has_library = any(row["impl"] == "library" and row["metric"] == "time_p50" for row in rows)
    assert has_library == (suite in {"flash_attention", "mean_pool", "rms_norm", "rotary"})


@pytest.mark.slow
def test_a_run_goes_on_where_it_was(tmp_path):
    two = ("--suites", "rms_norm", "encode")
    first = run(tmp_path, *two)
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-2000:]
    rows = results.read(tmp_path / "r.csv")
    assert {row["suite"] for row in rows} == {"limits", *two[1:]} and "skipped" not in first.stdout
    again = run(tmp_path, *two)
    assert again.returncode == 0 and "4 skipped" in again.stdout, again.stdout
    assert results.read(tmp_path / "r.csv") == rows


@pytest.mark.slow
def test_time_that_is_over_leaves_the_rest_to_the_next_run(tmp_path):
    late = run(tmp_path, "--suites", "rms_norm", "--minutes", "0")
    assert late.returncode == 0 and "4 skipped" in late.stdout, late.stdout


WRONG = """
import sys
from bench.__main__ import main
from nvembed_fast import ops
exact = ops.rms_norm
ops.rms_norm = lambda *tensors: 1.001 * exact(*tensors)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_wrong_result_of_ours_fails_the_suite_and_has_no_row(tmp_path):
    options = ["--suites", "rms_norm", "--no-report", "--smallest", "--results", str(tmp_path / "r.csv")]
    wrong = subprocess.run([sys.executable, "-c", WRONG, *options], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1 and "rms_norm: 2 failed: rms_norm one-token forward" in wrong.stdout
    assert "_max error" in wrong.stderr
    timed = {row["case"] for row in results.read(tmp_path / "r.csv") if row["suite"] == "rms_norm"}
    assert timed == {"add_rms_norm one-token forward", "add_rms_norm one-token forward+backward"}


@pytest.mark.slow
def test_pytest_benchmark_times_ours_and_the_baselines_as_a_group(tmp_path):
    command = [sys.executable, "-m", "pytest", "bench/bench_rms_norm.py", "-q", "-p", "no:cacheprovider"]
    command += ["--smallest", "--benchmark-only", "--benchmark-max-time=0.01"]
    command += [f"--benchmark-json={tmp_path / 'b.json'}"]
    # pytest-benchmark measures nothing where it finds itself in a worker of pytest-xdist
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    timed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert timed.returncode == 0, timed.stdout[-4000:] + timed.stderr[-2000:]
    rows = json.loads((tmp_path / "b.json").read_text())["benchmarks"]
    groups = {row["group"]: [] for row in rows}
    for row in rows:
        groups[row["group"]].append(row["name"])
        # a call of PyTorch takes over a microsecond, and no two samples of a clock are equal for long
        assert 1e-6 < row["stats"]["min"] < row["stats"]["max"] and row["stats"]["rounds"] >= 5
    assert set(groups["rms_norm: rms_norm one-token forward"]) == {OURS, "library", "F.rms_norm"}
    assert len(groups) == 4 and len({row["fullname"] for row in rows}) == len(rows)
    assert "skipped in 4 benches: liger-kernel: " in timed.stdout


def test_a_file_of_another_kind_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "r.csv").write_text("a,b\n1,2\n")
    refused = run(tmp_path)
    assert refused.returncode == 2 and refused.stdout == ""
    assert "is no results file" in refused.stderr.splitlines()[-1]
