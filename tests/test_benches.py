"""Every bench file runs once, with its smallest cases, so that none can rot."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import bench_train
from bench.__main__ import main
from bench.measure import results
from bench.measure import run as measure_run
from bench.measure.results import OURS, Figure, Machine
from bench.report import comparisons
from bench.suites import SUITES, Setting
from nvembed_fast import ops

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
    assert late.returncode == results.UNFINISHED and "4 skipped" in late.stdout, late.stdout
    assert "failed" not in late.stdout


class FakeBench:
    suite = "s"

    def __init__(self, case, figures=()):
        self.case, self.figures = case, figures

    def measure(self, limits, seconds, rounds):
        if not self.figures:
            raise RuntimeError("ours")
        return list(self.figures)


@pytest.mark.parametrize(
    ("has_failed", "minutes", "code"),
    [(False, 1, 0), (True, 1, 1), (False, 0, results.UNFINISHED), (True, 0, results.UNFINISHED)],
)
def test_cases_that_are_left_have_an_exit_code_of_their_own(has_failed, minutes, code, tmp_path, monkeypatch):
    file = results.ResultsFile(tmp_path / "r.csv", Machine(*"1234567"))
    # no limit is measured
    file.add([Figure("limits", "copy", "torch", "rate", 1.0, "GB/s")])
    found = [FakeBench("a", [Figure("s", "a", OURS, "time_p50", 1.0, "ms")])]
    found += [FakeBench("b")] if has_failed else []
    monkeypatch.setattr(measure_run, "benches", lambda suite, setting: found)
    args = argparse.Namespace(cases=(), minutes=minutes, seconds=0.0)
    assert measure_run.run_suite("s", Setting("cpu", smallest=True), file, args) == code


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


@pytest.fixture
def train(monkeypatch):
    """The smallest case, with a baseline that is `cached_step`."""

    def baseline(model, batch, max_tokens, setting):
        options = {"max_tokens": max_tokens, "seed": lambda chunk: chunk}
        return lambda: bench_train.cached_step(
            model.model, batch.texts, bench_train._loss_of(batch), **options
        )

    monkeypatch.setattr(bench_train, "find_spec", lambda name: object())
    monkeypatch.setattr(bench_train, "_hugging_face", baseline)
    [bench] = bench_train.benches(Setting("cpu", smallest=True))
    return bench


def test_a_training_step_of_a_baseline_that_fails_or_has_another_loss_is_skipped(train, monkeypatch):
    right = bench_train._hugging_face
    assert bench_train.HUGGING_FACE in train.prepare().calls

    def fails():
        raise RuntimeError("no memory\nof it")

    def is_far(*args):
        return lambda: dataclasses.replace(found := right(*args)(), loss=1.01 * found.loss)

    def cannot_be_made(*args):
        raise ImportError("no peft")

    for made, reason in (
        (lambda *args: fails, "cannot run: no memory"),
        (is_far, "parity is red: the loss is "),
        (cannot_be_made, "cannot run: no peft"),
    ):
        monkeypatch.setattr(bench_train, "_hugging_face", made)
        ready = train.prepare()
        assert list(ready.calls) == [OURS, "cached"]
        assert ready.skipped[bench_train.HUGGING_FACE].startswith(reason)


@pytest.mark.parametrize("only_ours", [False, True])
def test_a_wrong_training_step_of_ours_gets_no_time(only_ours, train, monkeypatch):
    """Both steps and, as it may be, the baseline agree."""
    exact = ops.rms_norm
    wrong = lambda *tensors: exact(*tensors) * (1.0 if ops._state.impl == "library" else 1.1)  # noqa: E731
    monkeypatch.setattr(ops, "rms_norm", wrong)
    with ops.use_impl("torch"), pytest.raises(AssertionError, match="nvembed_fast: parity is red"):
        train.prepare(only_ours)


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
