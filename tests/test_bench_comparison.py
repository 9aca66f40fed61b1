"""Parity before time, limits, and figures that are not lost."""

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from fake_driver import gpu
from torch.utils.flop_counter import FlopCounterMode

from bench import bench_latent_block
from bench.baselines.encoders import BY_LIBRARY
from bench.baselines.kernels import Baselines, PaddedLayout
from bench.bench_latent_block import TINY, LatentBlockCase
from bench.measure import comparison, results
from bench.measure.comparison import Experiment, Implementation, KernelBench, Work
from bench.measure.limits import Limits
from bench.measure.results import COLUMNS, OURS, Figure, Machine, ResultsFile
from bench.measure.timing import Times
from bench.suites import SUITES, Setting, benches
from nvembed_fast.kernels import library, reference
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.kernels.testing import (
    ATTENTION_CASES,
    ROTARY_CASES,
    RowCase,
    assert_parity,
    skewed_lengths,
    upstream_of,
)

ROOT = Path(__file__).parents[1]
FACTS = Machine("GPU", "1", "2", "3", "4", "commit", "command")
WORK = Work(1000, "GB/s")


class FakeLimits:
    def copy_rate(self) -> float:
        return 4.0

    def matrix_rate(self, dtype) -> float:
        return 2.0


def run(experiment: Experiment, backward: bool = False) -> list[Figure]:
    return bench(experiment, WORK, backward).measure(FakeLimits(), seconds=0.0, rounds=1)


def bench(experiment: Experiment, work: Work, backward: bool = False) -> KernelBench:
    return KernelBench("suite", "case", lambda: experiment, work, backward)


def experiment(*baselines: Implementation, ours=torch.sin) -> Experiment:
    return Experiment([torch.randn(64, 32)], ours, torch.sin, baselines)


def of(rows: list[Figure], impl: str) -> dict[str, Figure]:
    return {row.metric: row for row in rows if row.impl == impl}


@pytest.mark.parametrize("backward", [False, True])
def test_all_that_are_right_get_a_time(backward):
    rows = run(experiment(Implementation("other", lambda x: (x.double().sin()).float())), backward)
    for impl in (OURS, "other"):
        row = of(rows, impl)
        metrics = {"time_p20", "time_p50", "time_p80", "rate", "parity_error"}
        assert set(row) - {"backward", "limit"} == metrics
        assert ("backward" in row) == backward
        assert row["rate"].value == pytest.approx(1000 / row["time_p50"].value * 1e-6)
        assert row["rate"].share_of_limit == pytest.approx(row["rate"].value / 4.0)
        assert row["parity_error"].value < 1e-6
    assert of(rows, OURS)["limit"].value == 4.0


@pytest.mark.parametrize("backward", [False, True])
def test_a_baseline_that_is_wrong_gets_no_time(backward):
    wrong = Implementation("wrong", lambda x: 1.001 * x.sin())
    [row] = of(run(experiment(wrong), backward), "wrong").values()
    assert row.metric == "skipped" and row.value is None
    assert row.unit.startswith("parity is red: error 1.0e-03")


def test_the_backward_is_what_it_adds_to_the_forward(monkeypatch):
    def interleaved(functions, *_, **__):
        assert set(functions) == {OURS, f"{OURS} forward"}
        return {OURS: Times((7.0,)), f"{OURS} forward": Times((2.0,))}

    monkeypatch.setattr(comparison, "interleaved", interleaved)
    assert of(run(experiment(), backward=True), OURS)["backward"].value == 5.0


def test_a_baseline_with_a_wrong_gradient_gets_no_time_with_backward():
    baseline = Implementation("wrong slope", lambda x: x.sin() + 0.01 * (x - x.detach()))
    assert "time_p50" in of(run(experiment(baseline)), "wrong slope")
    [row] = of(run(experiment(baseline), backward=True), "wrong slope").values()
    assert row.unit.startswith("parity is red")


def test_the_rate_of_products_is_in_tflops():
    work = Work(3 * 10**12, "TFLOP/s")
    assert work.rate(1000.0) == pytest.approx(3.0) and work.limit(FakeLimits(), torch.float32) == 2.0


@pytest.mark.parametrize("backward", [False, True])
def test_the_intensity_is_of_inputs_outputs_and_their_gradients(backward):
    rows = bench(experiment(), Work(10**6, "TFLOP/s"), backward).measure(FakeLimits(), 0.0, rounds=1)
    moved = 2 * 64 * 32 * 4 * (2 if backward else 1)
    assert of(rows, OURS)["intensity"].value == pytest.approx(10**6 / moved)
    assert "intensity" not in of(run(experiment()), OURS)


def drawn_for_a_bench(backward: bool) -> int:
    """How many tensors PyTorch draws on the GPU, for ours alone."""

    def make() -> Experiment:
        gate_up = RowCase("rows", 8, 64).gated_input("cuda:0", torch.float32)
        return Experiment([gate_up], reference.swiglu, reference.swiglu)

    # the fake GPU has neither
    without = mock.patch.multiple(
        comparison, peak_memory=lambda call: None, copy=SimpleNamespace(deepcopy=lambda tensors: tensors)
    )
    gpu.forget_counts()
    with without, Setting("cuda").implementation():
        KernelBench("suite", "case", make, WORK, backward, part=make).prepare()
    return gpu.operations()["randn"]


@pytest.mark.parametrize("backward", [False, True])
def test_what_a_gpu_times_is_drawn_there(backward, fake_gpu):
    """The inputs of both experiments. With backward also the upstream gradient of each."""
    assert fake_gpu(drawn_for_a_bench, backward) == (4 if backward else 2)


@pytest.mark.parametrize("backward", [False, True])
def test_a_forward_draws_no_upstream_gradient(backward, monkeypatch):
    drawn = []
    monkeypatch.setattr(comparison, "upstream_of", lambda outputs: drawn.append(1) or upstream_of(outputs))
    bench(experiment(Implementation("other", torch.sin)), WORK, backward).prepare()
    # of the parity check, and of the outputs of each implementation
    assert len(drawn) == (3 if backward else 0)


def test_a_baseline_that_gives_nan_is_wrong():
    [row] = of(run(experiment(Implementation("nan", lambda x: x.sin() / 0 * 0))), "nan").values()
    assert row.unit.startswith("parity is red: error inf")


def test_a_wrong_result_of_ours_has_no_row_at_all():
    with pytest.raises(AssertionError, match="case forward: _max error"):
        run(experiment(ours=lambda x: 1.001 * x.sin()))


def test_a_baseline_that_cannot_run_says_why():
    def fails(x):
        raise RuntimeError("no kernel for this\nand more")

    def has_no_memory(x):
        raise torch.OutOfMemoryError("a long story")

    calls = itertools.count()

    def fails_later(x):
        if next(calls):
            raise ValueError
        return x.sin()

    rows = run(
        experiment(
            Implementation("fails", fails),
            Implementation("has no memory", has_no_memory),
            Implementation("fails later", fails_later),
            Implementation("absent", None, obstacle="pip install it"),
        )
    )
    assert of(rows, "fails")["skipped"].unit == "cannot run: no kernel for this"
    assert of(rows, "has no memory")["skipped"].unit == "out of memory"
    assert of(rows, "fails later")["skipped"].unit == "cannot run: ValueError"
    assert of(rows, "absent")["skipped"].unit == "pip install it"


def test_an_error_of_ours_is_no_row():
    calls = itertools.count()

    def fails_later(x):
        if next(calls):
            raise RuntimeError("ours")
        return x.sin()

    with pytest.raises(RuntimeError, match="ours"):
        run(experiment(ours=fails_later))


def test_inputs_keep_their_values_and_their_strides():
    seen = []

    def inplace(x):
        seen.append(x.stride())
        return x.mul_(2)

    x = torch.randn(8, 64)[:, :32]
    before = x.clone()
    rows = run(Experiment([x], inplace, lambda x: 2 * x, [Implementation("other", lambda x: x + x)]))
    assert "time_p50" in of(rows, "other"), "the other saw what the first one wrote"
    assert set(seen) == {(64, 1)}
    assert torch.equal(comparison._results(inplace, [before.clone()], (), False)[0], 2 * before)


def test_limits_are_measured_once_and_are_figures():
    limits = Limits("cpu", seconds=0.0)
    rows = {(row.case, row.metric): row for row in limits.figures((torch.float32,))}
    assert rows["copy", "rate"].value == limits.copy_rate() > 0
    assert rows["product float32", "rate"].value == limits.matrix_rate(torch.float32) > 0
    down = "down 2048 tokens float32"
    assert rows[down, "rate"].value == pytest.approx(2e-9 * 2048 * 576 * 1536 / rows[down, "time_p50"].value)


def test_a_results_file_goes_on_where_it_was_cut_off(tmp_path):
    path = tmp_path / "new" / "r.csv"
    ResultsFile(path, FACTS).add([Figure("s", "one", "i", "time_p50", 1.5, "ms", 0.25)])
    with path.open("a") as file:
        file.write("s,two,i,time_p")
    assert [row["case"] for row in results.read(path)] == ["one"]
    again = ResultsFile(path, FACTS)
    assert again.has("s", "one") and not again.has("s", "two")
    again.add([Figure("s", "two", "i", "skipped", None, "because, it says")])
    assert again.has("s", "two")
    rows = results.read(path)
    assert [tuple(row) for row in rows] == [COLUMNS] * 2
    assert rows[0]["value"] == "1.5" and rows[0]["share_of_limit"] == "0.25" and rows[0]["gpu"] == "GPU"
    assert rows[1]["case"] == "two" and rows[1]["value"] == "" and rows[1]["unit"] == "because, it says"


def test_another_commit_is_another_run(tmp_path):
    path = tmp_path / "r.csv"
    ResultsFile(path, FACTS).add([Figure("s", "one", "i", "time_p50", 1.0, "ms")])
    other = Machine(**{**FACTS.__dict__, "commit": "later"})
    assert not ResultsFile(path, other).has("s", "one")
    assert ResultsFile(path, Machine(**{**FACTS.__dict__, "command": "again"})).has("s", "one")


def test_a_header_that_was_cut_off_is_written_again(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("suite,ca")
    ResultsFile(path, FACTS).add([Figure("s", "one", "i", "time_p50", 1.0, "ms")])
    assert [row["case"] for row in results.read(path)] == ["one"]


def test_again_measures_what_is_there(tmp_path):
    path = tmp_path / "r.csv"
    ResultsFile(path, FACTS).add([Figure("s", "one", "i", "time_p50", 1.0, "ms")])
    assert not ResultsFile(path, FACTS, again=True).has("s", "one")
    assert len(results.read(path)) == 1


def test_a_run_goes_on_in_its_file_on_another_day(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    yesterday = tmp_path / "gpu-2020-01-01.csv"
    ResultsFile(yesterday, FACTS).add([Figure("s", "one", "i", "time_p50", 1.0, "ms")])
    assert results.default_path(FACTS) == yesterday
    later = Machine(**{**FACTS.__dict__, "commit": "later"})
    assert results.default_path(later) != yesterday


def test_two_changes_are_two_commits(monkeypatch):
    commits = []
    for change in ("", "a change", "another"):
        answers = {"rev-parse": "1a2b3c", "diff": change}
        monkeypatch.setattr(results, "_output", lambda *command, answers=answers: answers.get(command[3], ""))
        commits.append(results.commit_of_tree.__wrapped__())
    assert commits[0] == "1a2b3c" and len(set(commits)) == 3
    monkeypatch.setattr(results, "_output", lambda *command: "")
    assert re.fullmatch("sources-[0-9a-f]{8}", results.commit_of_tree.__wrapped__())


@pytest.mark.parametrize("has_git", [True, False])
def test_a_change_of_any_file_that_counts_is_another_commit(has_git, tmp_path, monkeypatch):
    if has_git and shutil.which("git") is None:
        pytest.skip("no git")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for name in ("kernels", "bench/results", "tests"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "kernels" / "a.py").write_text("1")
    if has_git:
        git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
            subprocess.run([*git, *command], check=True)
    found = [results.commit_of_tree.__wrapped__("tests")]
    for name in (
        "kernels/a.py",
        "bench/new \u00e9.py",
        "bench/new \u00e9.py",
        "kernels/tuned.toml",
        "tests/b.py",
    ):
        with (tmp_path / name).open("a") as file:
            file.write("2")
        found.append(results.commit_of_tree.__wrapped__("tests"))
    assert len(set(found)) == 6
    (tmp_path / "bench" / "results" / "r.csv").write_text("3")
    assert results.commit_of_tree.__wrapped__("tests") == found[-1]
    assert results.commit_of_tree.__wrapped__() != found[-1]
    (tmp_path / "tests" / "b.py").unlink()
    assert results.commit_of_tree.__wrapped__("tests") == found[-2]


def test_another_file_is_not_overwritten(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is no results file: its columns are a, b"):
        ResultsFile(path, FACTS)
    for text in ("a,b\n", "a,b"):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no results file: its columns are a, b"):
            ResultsFile(path, FACTS)
        assert path.read_text() == text
    path.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="r.csv is no results file: it is not text"):
        ResultsFile(path, FACTS)


def test_benches_forbid_tf32():
    torch.set_float32_matmul_precision("high")
    try:
        Setting.here(smallest=True, compiles=False)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("lengths", [(3, 5, 1), (4, 4)])
def test_padding_is_put_on_and_taken_off(lengths):
    padded = PaddedLayout(SeqLayout(lengths))
    x = torch.randn(sum(lengths), 2, 3)
    [arranged] = padded.arrange(x)
    longest = 4 if padded.is_full else 16
    assert arranged.shape == (len(lengths), 2, longest, 3)
    assert torch.equal(padded.restore(arranged), x)
    assert padded.is_full == (len(set(lengths)) == 1)
    seen = (padded.bias(torch.float32)[:, 0] == 0).sum(-1)
    assert torch.equal(seen, torch.tensor(lengths)[:, None].expand(-1, longest))


def test_padded_attention_equals_packed():
    """The baselines on a padded batch, by the backend that a CPU has."""
    case = next(c for c in ATTENTION_CASES if c.name == "ragged-gqa")
    q, k, v, layout = case.inputs("cpu", torch.float32)
    padded = PaddedLayout(layout)
    fn = torch.nn.functional.scaled_dot_product_attention
    baseline = Implementation(
        "sdpa",
        lambda q, k, v: fn(q, k, v, attn_mask=padded.bias(q.dtype), enable_gqa=True),
        arrange=padded.arrange,
        restore=padded.restore,
    )
    wanted = reference.flash_attention(q, k, v, layout)
    high = reference.flash_attention(q.double(), k.double(), v.double(), layout)
    assert_parity(case.name, baseline(q, k, v), wanted, high)


def test_a_package_that_cannot_be_imported_is_a_baseline_that_cannot_run(tmp_path, monkeypatch):
    (tmp_path / "liger_kernel.py").write_text("raise OSError('built for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        monkeypatch.delitem(sys.modules, name)
    factory = Baselines("cpu", compiles=False)
    factory._gpu = ""
    gate_up = torch.randn(4, 6)
    swiglu = reference.swiglu
    rows = run(Experiment([gate_up], swiglu, swiglu, factory.swiglu(swiglu)))
    assert of(rows, "liger-kernel")["skipped"].unit == "cannot run: built for another torch"


@pytest.mark.slow
def test_compiled_baselines_run():
    factory = Baselines("cpu", compiles=True)
    case = ROTARY_CASES[1]
    qkv, cos, sin, positions, turned = case.inputs("cpu", torch.float32)

    def wanted(x):
        return reference.rotary(x, cos.to(x.dtype), sin.to(x.dtype), positions, turned)

    baselines = factory.rotary(wanted, cos, sin, positions, case.num_heads, case.num_kv_heads)
    rows = run(Experiment([qkv], wanted, wanted, baselines))
    assert "time_p50" in of(rows, "torch.compile")


def test_the_library_path_is_a_baseline_where_it_is_no_function_of_the_reference():
    found = set()
    for suite in (suite for suite in SUITES if suite not in ("encode", "latent_block", "train")):
        for each in benches(suite, Setting("cpu", smallest=True)):
            if any(baseline.name == "library" for baseline in each.experiment().baselines):
                found.add(suite)
    assert found == {"flash_attention", "mean_pool", "rms_norm", "rotary"}


@pytest.mark.parametrize("backward", [False, True])
def test_every_baseline_of_the_latent_block_is_right_and_one_does_the_minimal_work(backward):
    case = LatentBlockCase("tiny-4x32", 4, 32, TINY)
    made = bench_latent_block._experiment(Setting("cpu", smallest=True), case)
    baselines = {baseline.name: baseline for baseline in made.baselines if not baseline.obstacle}
    strongest = "absorbed and commuted, library"
    assert list(baselines) == ["original", "hoisted", "absorbed, library", strongest, BY_LIBRARY]
    ready = bench(made, WORK, backward).prepare()
    assert set(ready.calls) == {OURS, *baselines}, ready.skipped
    done = {}
    for name, baseline in baselines.items():
        pool = mock.patch.object(library, "mean_pool_geglu", wraps=library.mean_pool_geglu)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), pool as by_library:
            baseline(*made.tensors)
        done[name] = counter.get_total_flops()
        assert by_library.called == (name == BY_LIBRARY)
    assert done[strongest] == case.flops(backward=False) < done["absorbed, library"] < done["hoisted"]


def test_skewed_lengths():
    lengths = skewed_lengths(4096)
    assert lengths[:64] == skewed_lengths(64) and min(lengths) == 16 and max(lengths) <= 4096
    assert max(skewed_lengths(100, maximum=200)) == 200
    ordered = sorted(lengths)
    # lognormal of sigma 1: the median, and e times as much one sigma above
    assert ordered[2048] == pytest.approx(128, rel=0.1)
    assert ordered[int(0.8413 * 4096)] == pytest.approx(128 * 2.718, rel=0.1)


def test_help_has_examples():
    run = subprocess.run([sys.executable, "-m", "bench", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "--suites rms_norm flash_attention" in run.stdout
