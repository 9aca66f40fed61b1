"""The profile: what a trace says of each part, the limit of each, and the whole on a tiny model."""

import csv
import dataclasses
import gzip
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import profiling
from bench.profiling import ATTENTION, ELEMENTWISE, GAPS, HEAD, HOST, OTHER, PRODUCTS, STEP
from nvembed_fast import ops
from nvembed_fast.config import BackboneConfig, LatentConfig, NVEmbedConfig
from nvembed_fast.network.mistral import DecoderLayer

ROOT = Path(__file__).resolve().parents[1]
TINY = BackboneConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SLOW_SECONDS = 0.02


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    head = LatentConfig(
        num_latents_value=8, num_cross_heads=2, cross_dim_head=16, hidden_dim=64, latent_dim=64
    )
    for device, scale in profiling.SCALES.items():
        config = NVEmbedConfig(TINY, head)
        monkeypatch.setitem(profiling.SCALES, device, dataclasses.replace(scale, config=config))
        monkeypatch.setitem(profiling.LAYERS, device, 2)
    monkeypatch.setattr(profiling, "LIMIT_SECONDS", 0.01)
    monkeypatch.setattr(profiling, "STEPS", 3)


def _event(kind: str, name: str, start: float, duration: float, **args) -> dict:
    return {
        "ph": "X",
        "cat": kind,
        "name": name,
        "pid": 1,
        "tid": 1,
        "ts": start,
        "dur": duration,
        "args": args,
    }


def _mark(name: str, start: float, duration: float) -> dict:
    return _event("user_annotation", name, start, duration)


def _run(correlation: int, launch: float, start: float, duration: float, api="cuda_runtime", kind="kernel"):
    """What a trace has of one kernel: the call on the host, and the run on the device."""
    return [
        _event(api, "launch", launch, 5, correlation=correlation),
        _event(kind, "some_kernel", start, duration, correlation=correlation),
    ]


def _microseconds(parts: dict[str, float]) -> dict[str, float]:
    return {name: round(1e3 * ms, 6) for name, ms in parts.items() if ms}


def test_a_kernel_counts_where_it_was_launched():
    events = [
        _mark(STEP, 0, 1000),
        _mark("packing", 0, 100),
        _mark("embed_tokens", 110, 20),
        _mark("layers.0", 140, 300),
        _mark("linear", 150, 50),
        _mark("flash_attention", 210, 40),
        _mark("rotary", 260, 20),
        _mark("head", 450, 100),
        _mark("linear", 460, 20),
        # the device's own copy of a mark, and an operator of the host, say nothing of where time went
        _event("gpu_user_annotation", "rotary", 0, 1000),
        _event("cpu_op", "aten::linear", 150, 50),
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 160, "pid": 1, "tid": 1, "id": 3},
        *_run(1, 50, 60, 10, kind="gpu_memcpy"),
        *_run(2, 115, 130, 10),
        # runs while the host is in the attention already
        *_run(3, 160, 200, 200),
        *_run(4, 220, 400, 100, api="cuda_driver"),
        # overlaps the one before
        *_run(5, 270, 495, 25, api="cuda_driver"),
        # the list of tiles goes to the device
        *_run(6, 225, 520, 5, kind="gpu_memcpy"),
        *_run(7, 465, 530, 100),
        # behind the inner mark, still inside the outer one
        *_run(8, 500, 630, 70),
        # its launch was not recorded
        _event("kernel", "some_kernel", 700, 10, correlation=77),
    ]
    (parts,) = profiling.attribute(events, "cuda")
    assert _microseconds(parts) == {
        PRODUCTS: 200,
        ATTENTION: 100 + 5,
        ELEMENTWISE: 10 + 20,
        HEAD: 100 + 70,
        GAPS: 60 + 5,
        HOST: 60 + 10 + 60 + 290,
        OTHER: 10,
    }


def test_what_waits_for_packing_is_host_work_and_other_waiting_a_gap():
    events = [
        _mark(STEP, 0, 1000),
        _mark("packing", 0, 10),
        _mark("linear", 20, 10),
        _mark("packing", 600, 100),
        _mark("linear", 705, 10),
        *_run(1, 25, 50, 570),
        *_run(2, 710, 720, 280),
    ]
    (parts,) = profiling.attribute(events, "cuda")
    assert _microseconds(parts) == {PRODUCTS: 570 + 280, HOST: 50 + 80, GAPS: 20}


def test_steps_are_told_apart_and_what_lies_outside_counts_nowhere():
    events = [
        *_run(9, 5, 10, 50),
        *(event for start in (1000, 2000) for event in (_mark(STEP, start, 100), _mark("head", start, 50))),
        *_run(1, 1010, 1040, 60),
        *_run(2, 2010, 2020, 70),
    ]
    first, second = profiling.attribute(events, "cuda")
    assert _microseconds(first) == {HOST: 40, HEAD: 60}
    assert _microseconds(second) == {HOST: 20 + 10, HEAD: 70}


def test_on_a_cpu_operators_of_the_steps_thread_are_the_work():
    events = [
        _mark(STEP, 0, 100),
        _mark("linear", 10, 50),
        _event("cpu_op", "aten::linear", 15, 40),
        _event("cpu_op", "aten::mm", 20, 30),
        _event("cpu_op", "aten::add", 70, 10),
        _event("cpu_op", "elsewhere", 80, 20) | {"tid": 2},
    ]
    (parts,) = profiling.attribute(events, "cpu")
    assert _microseconds(parts) == {HOST: 15 + 20, PRODUCTS: 40, GAPS: 15, OTHER: 10}


def test_a_trace_without_a_step_or_without_kernels_is_refused():
    with pytest.raises(ValueError, match="no mark 'step'"):
        profiling.attribute([_mark("linear", 0, 1)], "cpu")
    # the operators are there, but to take them for the work would pass a CPU's table off as a GPU's
    with pytest.raises(ValueError, match="recorded no kernel"):
        profiling.attribute([_mark(STEP, 0, 1), _event("cpu_op", "aten::mm", 0, 1)], "cuda")


def _recorded(tmp_path) -> tuple[list[dict], list[dict[str, float]]]:
    model = profiling.build_model("cpu", 2)
    step = profiling.make_step(model, [[7, 5], [3]], instruction=2)
    step()
    profiling.record(model, step, tmp_path / "trace.json.gz")
    with gzip.open(tmp_path / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    return events, profiling.attribute(events, "cpu")


def _slowed(operation, work):
    def slow(*args, **kwargs):
        spent = 0.0
        while spent < SLOW_SECONDS:  # inside `work` alone: a busy machine may stop this process between two
            start = time.perf_counter()
            work()
            spent += time.perf_counter() - start
        return operation(*args, **kwargs)

    return slow


def _compute():
    torch.randn(200, 200).sort()


# calls in a step of two batches and two layers
@pytest.mark.parametrize(
    "name, calls, category",
    [
        ("flash_attention", 4, ATTENTION),
        ("rotary", 4, ELEMENTWISE),
        ("swiglu", 4, ELEMENTWISE),
        ("rms_norm", 6, ELEMENTWISE),
        ("add_rms_norm", 4, ELEMENTWISE),
        ("absorbed_latent_attention", 2, HEAD),
        ("mean_pool", 2, HEAD),
        ("linear", 12, PRODUCTS),
        ("add_linear_", 4, PRODUCTS),
    ],
)
def test_a_slow_operation_shows_in_its_category(name, calls, category, tmp_path, monkeypatch):
    monkeypatch.setattr(ops, name, _slowed(getattr(ops, name), _compute))
    for parts in _recorded(tmp_path)[1]:
        assert parts[category] >= 0.9 * 1e3 * SLOW_SECONDS * calls


def test_a_slow_host_shows_as_host_work_or_as_gaps(tmp_path, monkeypatch):
    pack = profiling.PackedBatch.from_ids
    monkeypatch.setattr(profiling.PackedBatch, "from_ids", _slowed(pack, lambda: time.sleep(0.001)))
    forward = profiling.NVEmbedModel.forward
    monkeypatch.setattr(profiling.NVEmbedModel, "forward", lambda *a: (forward(*a), time.sleep(SLOW_SECONDS)))
    for parts in _recorded(tmp_path)[1]:
        # packing twice, and the sleep behind the last batch; the one behind the first is a gap
        assert parts[HOST] >= 0.9 * 1e3 * SLOW_SECONDS * 3
        assert parts[GAPS] >= 0.9 * 1e3 * SLOW_SECONDS


def test_the_parts_are_the_whole_of_every_step(tmp_path):
    events, steps = _recorded(tmp_path)
    marks = sorted((e["ts"], e["dur"]) for e in events if e.get("name") == STEP)
    assert len(marks) == len(steps) == profiling.STEPS
    for (_, duration), parts in zip(marks, steps, strict=True):
        assert sum(parts.values()) == pytest.approx(1e-3 * duration, rel=1e-6)
        assert min(parts.values()) >= 0
        assert all(parts[name] for name in (PRODUCTS, ATTENTION, ELEMENTWISE, HEAD, HOST))


def test_marks_are_taken_off_again_also_after_an_error():
    model = profiling.build_model("cpu", 2)
    before = {name: getattr(ops, name) for name in (*ops.OPERATIONS, "linear")}
    run_layer = DecoderLayer.forward
    with pytest.raises(KeyboardInterrupt), profiling.marked(model):
        assert ops.swiglu is not before["swiglu"]
        assert model.head._forward_hooks
        assert DecoderLayer.forward is not run_layer
        raise KeyboardInterrupt
    assert before == {name: getattr(ops, name) for name in before}
    assert DecoderLayer.forward is run_layer
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class _Rates:
    """1 TFLOP/s, 1 GB/s, and a product that takes a millisecond per token."""

    def __init__(self):
        self.products = []

    def matrix_rate(self, dtype):
        return 1.0

    def copy_rate(self):
        return 1.0

    def product_ms(self, tokens, weight, dtype):
        self.products.append((tokens, weight))
        return float(tokens)


def test_limits_by_hand():
    rates, model = _Rates(), profiling.build_model("cpu", 2)
    limits = profiling.limits_ms(model, [[7, 5], [3]], rates)
    # D 64, 4 and 2 heads of 16, F 96, 2 layers
    one_layer = {(128, 64), (64, 64), (192, 64), (64, 96)}
    assert sorted(rates.products) == sorted(
        (t, weight) for t in (12, 3) for weight in one_layer for _ in "LL"
    )
    assert limits[PRODUCTS] == 2 * 4 * (12 + 3)
    assert limits[ATTENTION] == pytest.approx(1e-9 * 2 * 4 * 4 * 16 * (7**2 + 5**2 + 3**2))
    per_token_and_layer = 2 * 2 * 64 + 2 * (4 + 2) * 16 + 3 * 96
    # the last norm, two that add, and the embedding
    elements = 15 * (2 * per_token_and_layer + 2 * 64 + 2 * 2 * 64 + 2 * 64)
    assert limits[ELEMENTWISE] == pytest.approx(1e-6 * 4 * elements)
    assert (limits[GAPS], limits[HOST], limits[OTHER]) == (0, 0, None)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_limit_counts_the_norms_that_a_step_runs(layers, monkeypatch):
    model, lengths, moved = profiling.build_model("cpu", layers), [[7, 5, 3]], []

    def counted(norm, rows, x, *args):
        moved.append(rows * x.nbytes)
        return norm(x, *args)

    for name, rows in (("rms_norm", 2), ("add_rms_norm", 4)):
        monkeypatch.setattr(ops, name, partial(counted, getattr(ops, name), rows))
    profiling.make_step(model, lengths, 0)()
    # rotary, SwiGLU and the embedding
    others = 4 * 15 * (layers * (2 * (4 + 2) * 16 + 3 * 96) + 2 * 64)
    limit = profiling.limits_ms(model, lengths, _Rates())[ELEMENTWISE]
    assert 1e6 * limit == pytest.approx(sum(moved) + others)


@pytest.mark.parametrize(
    "form, operations, weights",
    [
        ("absorbed", 4 * 2 * 8 * 64, 2 * 2 * 8 * 64),
        ("direct", 4 * 2 * 8 * 16 + 2 * 2 * 32 * 64, 2 * 32 * 64 + 2 * 2 * 8 * 16),
    ],
)
def test_the_heads_limit_is_the_longer_of_its_operations_and_its_bytes(form, operations, weights):
    rates, model = _Rates(), profiling.build_model("cpu", 1)
    model.head.mode = form
    up, down = 8 * 64 * 64, 4 * 64 * 64
    moved = 1e-6 * (4 * (weights + up + down + 15 * 64) + 4 * 3 * 64)
    assert profiling.limits_ms(model, [[7, 5, 3]], rates)[HEAD] == pytest.approx(moved)
    rates.copy_rate = lambda: 1e9
    operations = 1e-9 * (15 * (operations + 2 * up) + 3 * 2 * down)
    assert profiling.limits_ms(model, [[7, 5, 3]], rates)[HEAD] == pytest.approx(operations)


def test_a_step_holds_one_batch_unless_told_otherwise():
    lengths = np.array(profiling.WORKLOADS["all 512"].lengths)
    assert profiling._batches(lengths, None, 2048) == [[512] * 4]
    assert profiling._batches(lengths, 5, 2048) == [[512] * 4, [512]]
    # a text longer than the budget is a batch of its own
    assert profiling._batches(np.array(profiling.WORKLOADS["all 4096"].lengths), None, 2048) == [[4096]]


def _rows(path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {row["metric"]: row for row in csv.DictReader(file)}


def test_the_command_end_to_end(tmp_path, capsys):
    results, folder = tmp_path / "results.csv", tmp_path / "folder" / "deeper"
    command = ["--workload", "queries", "--texts", "2", "--layers", "1", "-o", str(folder)]
    command += ["--results", str(results), "--commit", "abc"]
    profiling.main(command)
    printed = capsys.readouterr().out

    with gzip.open(folder / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert {STEP, "packing", "embed_tokens", "layers.0", "head"} <= names and "layers.1" not in names
    assert {"linear", "flash_attention", "rotary", "rms_norm", "add_rms_norm", "swiglu"} <= names
    assert (folder / "waterfall.png").read_bytes().startswith(b"\x89PNG")

    rows = _rows(results)
    assert set(rows) == {"time_p50", *(f"time:{name}" for name in profiling.CATEGORIES)}
    for row in rows.values():
        case = "queries, 2 texts, 1 of 2 layers"
        assert (row["suite"], row["case"], row["impl"]) == ("profile", case, "nvembed_fast")
        assert (row["unit"], row["commit"]) == ("ms", "abc")
    total = sum(float(rows[f"time:{name}"]["value"]) for name in profiling.CATEGORIES)
    steps = [1e-3 * e["dur"] for e in events if e.get("name") == STEP]
    assert total == pytest.approx(sorted(steps)[len(steps) // 2], rel=1e-4)
    assert float(rows["time:products"]["share_of_limit"]) > 0
    assert rows["time:other"]["share_of_limit"] == ""
    for name in (*profiling.CATEGORIES, STEP):
        assert any(line.startswith(name) for line in printed.splitlines()), name

    # the same again: the newer rows count
    profiling.main(command)
    assert len(results.read_text().splitlines()) == 1 + 2 * len(rows)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--layers", "3"], "--layers must be from 1 to 2, got 3"),
        (["--texts", "0"], "--texts must be from 1 to 128, got 0"),
        (["--workload", "all 7"], "invalid choice: 'all 7'"),
    ],
)
def test_wrong_arguments_are_told_by_name(arguments, message, capsys):
    with pytest.raises(SystemExit):
        profiling.main(arguments)
    assert message in capsys.readouterr().err


def test_help_has_examples():
    command = [sys.executable, "-m", "bench.profiling", "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "python -m bench.profiling --workload skewed" in run.stdout
