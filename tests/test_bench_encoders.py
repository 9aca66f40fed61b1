"""The encoder bench: its texts, its baselines, their parity, and the suite from end to end."""

import dataclasses
import math
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

from bench import profiling, workloads
from bench.baselines import encoders
from bench.baselines.encoders import ENCODERS
from bench.baselines.parity import PARITY_BATCH, PARITY_LAYERS, ParityCheck
from bench.bench_encode import benches, participants
from bench.measure.limits import Limits
from bench.measure.passes import ENOUGH_SECONDS, Entry, fitting_batch_sizes, search_runs
from bench.measure.results import OURS, read
from bench.suites import Setting
from bench.workloads import GPU, SMALL, SMALLEST, Workload
from nvembed_fast import ops, stream
from nvembed_fast.tokenization import TextTokenizer

ROOT = Path(__file__).resolve().parents[1]
SCALES = {"gpu": GPU, "small": SMALL, "smallest": SMALLEST}


@pytest.fixture(scope="module")
def fp32() -> ParityCheck:
    return ParityCheck(SMALLEST, "cpu", torch.float32)


@pytest.fixture(scope="module")
def bf16() -> ParityCheck:
    return ParityCheck(SMALLEST, "cpu", torch.bfloat16)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_texts_have_exactly_their_tokens(scale):
    vocab_size = scale.config.text_config.vocab_size
    tokenizer = TextTokenizer(workloads.word_tokenizer(vocab_size), workloads.EOS)
    for workload in scale.workloads:
        texts, instruction = workload.texts(vocab_size)
        assert (texts, instruction) == workload.texts(vocab_size), "another call gives other texts"
        tokenized = tokenizer(texts, instruction, workloads.MAX_LENGTH)
        assert tuple(tokenized.lengths()) == workload.lengths
        assert set(tokenized.first_pooled) == {workload.instruction_length}
        for ids in tokenized.ids:
            assert ids[-1] == workloads.EOS_ID
            assert (ids[:-1] > workloads.EOS_ID).all(), "a word that the tokenizer does not know"


def test_texts_use_the_whole_vocabulary():
    texts, _ = Workload("", (4096,) * 8).texts(1000)
    assert {word for text in texts for word in text.split()} == {f"w{i}" for i in range(3, 1000)}


def test_the_workloads_of_a_gpu_are_the_stated_ones():
    workloads = {workload.name: workload for workload in GPU.workloads}
    for length in (32, 512, 4096):
        assert set(workloads[f"all {length}"].lengths) == {length}
    assert set(workloads["queries"].lengths) == {50} and workloads["queries"].instruction_length == 18
    assert workloads["one query"].lengths == (50,) and workloads["one query"].instruction_length == 18
    lengths = workloads["skewed"].lengths
    assert len(lengths) == 2048 and min(lengths) >= 16 and max(lengths) <= 4096
    assert statistics.median(lengths) == pytest.approx(128, rel=0.05)
    # between the clips: the quartiles of a lognormal lie 0.674 sigma from its median
    low, _, high = statistics.quantiles(map(math.log, lengths), n=4)
    assert (high - low) / 2 == pytest.approx(0.6745, rel=0.05)
    # seed 0: a result can be compared with one of another day only on the same lengths
    assert lengths[:6] == (145, 112, 243, 142, 75, 184) and sum(lengths) == 416_424


@pytest.mark.parametrize("name", sorted(set(ENCODERS) - encoders.GPU_ONLY.keys() | {encoders.BY_LIBRARY}))
def test_every_encoder_agrees_with_fp32(fp32, bf16, name):
    assert fp32.of(ENCODERS[name]).obstacle is None
    found = bf16.of(ENCODERS[name])
    assert found.obstacle is None and found.unit == "1 - cosine"
    assert found.error > 1e-7, "as exact as fp32: this was no run in 16 bits"


@pytest.mark.parametrize("baseline", [encoders.Original, encoders.Sorted])
def test_windows_keep_the_callers_order(fp32, baseline, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", stream.Window(2, 4))
    assert fp32.of(baseline).obstacle is None


def test_the_compiled_encoder_agrees_and_shares_its_graphs_between_layers(fp32, monkeypatch):
    monkeypatch.setattr(encoders.Compiled, "backend", "eager")
    before = counters["stats"]["unique_graphs"]
    assert fp32.of(encoders.Compiled).obstacle is None
    # layers: ragged, equal lengths, one text; norm and head: some texts, one text
    assert counters["stats"]["unique_graphs"] - before == 3 + 2 + 2


def test_the_parity_batches_are_ragged_equal_and_single():
    for scale in SCALES.values():
        lengths = sorted(scale.parity_lengths, reverse=True)
        batches = [set(lengths[i : i + PARITY_BATCH]) for i in range(0, len(lengths), 4)]
        assert [len(batch) > 1 for batch in batches] == [True, False, False]
        assert len(lengths) == 2 * PARITY_BATCH + 1


class Causal(encoders.Sorted):
    def __init__(self, ours):
        super().__init__(ours)
        self.mistral.config.is_causal = True


class SeesPads(encoders.Original):
    def pad(self, ids, multiple=1):
        input_ids, real = super().pad(ids, multiple)
        return input_ids, real | True


class PoolsTheInstruction(encoders.Sorted):
    def embed(self, ids, first_pooled):
        return super().embed(ids, [0] * len(ids))


class ForgetsTheCallersOrder(encoders.Ours):
    def encode(self, texts, instruction, batch_size):
        return super().encode(sorted(texts, key=len), instruction, batch_size)


class WithoutLatents(encoders.Sorted):
    def __init__(self, ours):
        super().__init__(ours)
        self.block.v_NLH.zero_()


class NotANumber(encoders.Ours):
    def encode(self, texts, instruction, batch_size):
        return super().encode(texts, instruction, batch_size) * float("nan")


@pytest.mark.parametrize(
    "broken", [Causal, SeesPads, PoolsTheInstruction, ForgetsTheCallersOrder, WithoutLatents, NotANumber]
)
def test_a_wrong_encoder_is_red(fp32, broken):
    assert fp32.of(broken).obstacle.startswith("parity is red")


class WrongIn16Bits(encoders.Ours):
    def encode(self, texts, instruction, batch_size):
        vectors = super().encode(texts, instruction, batch_size)
        return vectors if self.ours.dtype == torch.float32 else vectors.roll(1, dims=1)


def test_an_encoder_that_is_wrong_in_16_bits_alone_is_red(fp32, bf16):
    assert fp32.of(WrongIn16Bits).obstacle is None
    assert "cosine" in bf16.of(WrongIn16Bits).obstacle


def ours_on_a_gpu() -> list[str]:
    """How the encoder computes, its fp32 copy, and the model of the profile. Nothing is proven."""
    seen = []

    def fails(*args, **kwargs):
        raise AssertionError("a kernel is proven, so a red one would give way to the library")

    class Model(torch.nn.Module):
        embedding_model = SimpleNamespace(
            embed_tokens=SimpleNamespace(weight=torch.empty(1, device="cuda:0"))
        )
        config = SimpleNamespace(text_config=SimpleNamespace(vocab_size=97))

        def forward(self, batch):
            seen.append(ops._state.impl)

    with mock.patch.object(ops, "prove", fails):
        encoder = workloads.random_encoder(SMALLEST.config, "cuda", torch.bfloat16)
        seen += [encoder.placement.impl, encoder.float().placement.impl]
        profiling.make_step(Model(), [[3]], 0)()
    return seen


def test_ours_takes_the_kernels_of_a_gpu_unproven(fake_gpu):
    assert fake_gpu(ours_on_a_gpu) == ["triton"] * 3
    assert workloads.random_encoder(SMALLEST.config, "cpu", torch.float32).placement.impl == "torch"


def test_an_encoder_without_its_graphs_is_no_baseline():
    graphed = encoders.Graphed.__new__(encoders.Graphed)
    graphs = SimpleNamespace(buckets=[])
    graphed.ours = SimpleNamespace(encode=lambda *args, **kwargs: [[1.0, 0.0]], graphs=graphs)
    with pytest.raises(RuntimeError, match="no CUDA graph was captured"):
        graphed.encode(["text"], "", 1)
    graphs.buckets.append(16)
    assert graphed.encode(["text"], "", 1).tolist() == [[1.0, 0.0]]


def test_baselines_hold_no_weights_of_their_own(fp32):
    ours = workloads.random_encoder(SMALLEST.config, "cpu", torch.float32)
    owned = {weight.untyped_storage().data_ptr() for weight in ours.model.parameters()}
    views = list(encoders.mistral_model(ours).parameters())
    assert {view.untyped_storage().data_ptr() for view in views} <= owned
    backbone = sum(weight.numel() for weight in ours.model.embedding_model.parameters())
    assert sum(view.numel() for view in views) == backbone


class Device:
    """A clock, and an encoder that moves it: seconds per batch and per text, and so much memory."""

    def __init__(self, per_batch: float, per_text: float, most_texts: int):
        self.now, self.first_calls = 0.0, set()
        self.per_batch, self.per_text, self.most_texts = per_batch, per_text, most_texts

    def clock(self) -> float:
        return self.now

    def encode(self, texts: list[str], size: int) -> None:
        if min(size, len(texts)) > self.most_texts:
            raise torch.OutOfMemoryError
        # a first call is slow, at the best size
        self.now += 1000.0 if size == 8 and size not in self.first_calls else 0.0
        self.first_calls.add(size)
        for start in range(0, len(texts), size):
            count = len(texts[start : start + size])
            self.now += self.per_batch + self.per_text * count**2


def test_the_search_finds_the_fastest_batch_size():
    texts = ["text"] * 64
    sizes = (1, 8, 32, 128)
    # 64 texts: 704 s one by one, 144 s by 8, 224 s by 32, 419.6 s at once
    device = Device(per_batch=10.0, per_text=0.1, most_texts=64)
    assert fitting_batch_sizes(device.encode, [texts], sizes, device.clock) == [8, 32, 64, 1]
    device = Device(per_batch=10.0, per_text=0.0, most_texts=31)
    assert fitting_batch_sizes(device.encode, [texts], sizes, device.clock) == [8, 1]
    device = Device(per_batch=10.0, per_text=0.0, most_texts=0)
    assert fitting_batch_sizes(device.encode, [texts], sizes, device.clock) == []


def test_a_search_pads_as_much_as_the_whole_workload():
    """Of 128 texts alone, sorted, a batch of 128 would be all of them: 4.6 times the tokens."""
    workload = next(workload for workload in GPU.workloads if workload.name == "skewed")
    texts = [str(index) for index in range(len(workload.lengths))]

    def padding(batches):
        batches = [[workload.lengths[int(text)] for text in batch] for batch in batches]
        return sum(max(b) * len(b) for b in batches) / sum(map(sum, batches))

    runs = search_runs(workload, texts, GPU, by_length=True)
    assert [len(run) for run in runs] == [128] * 4
    ranked = sorted(texts, key=lambda text: workload.lengths[int(text)])
    for size in (8, 32, 128):
        searched = [run[i : i + size] for run in runs for i in range(0, 128, size)]
        whole = [ranked[i : i + size] for i in range(0, len(ranked), size)]
        assert padding(searched) == pytest.approx(padding(whole), rel=0.5), size
    [first] = search_runs(workload, texts, GPU, by_length=False)
    assert first == texts[: len(first)] and len(first) == 128


@pytest.mark.parametrize("workload", GPU.workloads[1:3], ids=lambda workload: workload.name)
@pytest.mark.parametrize("by_length", [True, False])
def test_a_baseline_may_take_as_many_tokens_at_once_as_ours(workload, by_length):
    runs = search_runs(workload, ["text"] * len(workload.lengths), GPU, by_length)
    device = Device(per_batch=10.0, per_text=0.0, most_texts=10000)
    largest = fitting_batch_sizes(device.encode, runs, GPU.batch_sizes, device.clock)[0]
    assert largest * workload.lengths[0] >= stream.BATCH_TOKENS["cuda"]


def test_texts_are_sorted_over_all_windows(fp32, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", stream.Window(3, 3))
    baseline = encoders.Sorted(fp32._wide)
    seen = []
    monkeypatch.setattr(
        baseline, "embed", lambda ids, first: (seen.append(len(ids[0])), torch.zeros(1, 64))[1]
    )
    texts, _ = Workload("", (5, 9, 3, 8, 20, 4, 30)).texts(97)
    baseline.encode(texts, "", 1)
    assert seen == sorted(seen, reverse=True)


def test_a_pass_that_runs_out_of_memory_goes_on_with_the_next_best_size():
    device = Device(per_batch=ENOUGH_SECONDS / 32, per_text=0.0, most_texts=8)
    device.first_calls |= {1, 8, 32}
    entry = Entry(lambda size: device.encode(["text"] * 64, size), [32, 8, 1], clock=device.clock)
    entry.take_turn()
    entry.take_turn()
    assert entry.sizes == [8, 1] and entry.seconds == 2 * [ENOUGH_SECONDS / 4]
    device.most_texts = 0
    entry.take_turn()
    assert entry.sizes == [] and entry.seconds == []
    entry.take_turn()


def test_an_encoder_that_had_its_seconds_sits_out():
    device = Device(per_batch=ENOUGH_SECONDS * 0.75, per_text=0.0, most_texts=1)
    device.first_calls.add(1)
    entry = Entry(lambda size: device.encode(["text"], size), [1], clock=device.clock)
    for _ in range(4):
        entry.take_turn()
    assert len(entry.seconds) == 2


# the suite runs with this baseline broken
BROKEN_BASELINE = """
from bench.baselines import encoders

class Wrong(encoders.Original):
    def embed(self, ids, first_pooled):
        return super().embed(ids, first_pooled).roll(1, dims=1)

encoders.ENCODERS["original"] = Wrong
"""


def run_bench(results: Path, *options: str, before: str = "") -> str:
    code = f"{before}\nimport sys\nfrom bench.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--suites", "encode", "--no-report", "--smallest"]
    command += ["--results", str(results), "--commit", "test", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    return run.stdout


def figures(results: Path, workload: Workload, name: str) -> dict[str, dict[str, str]]:
    """The rows of one encoder on one workload, by metric."""
    wanted = ("encode", workload.name, name)
    return {r["metric"]: r for r in read(results) if (r["suite"], r["case"], r["impl"]) == wanted}


def test_the_bench_writes_a_row_for_each_goes_on_where_it_was_and_times_nothing_red(tmp_path):
    first, *others = SMALLEST.workloads
    results = tmp_path / "results.csv"
    run_bench(results, "--cases", first.name, before=BROKEN_BASELINE)
    assert {row["case"] for row in read(results) if row["suite"] == "encode"} == {first.name}
    found = figures(results, first, "original")
    assert set(found) == {"skipped"} and found["skipped"]["unit"].startswith("parity is red")

    before = results.read_text()
    assert "encode: 1 skipped: already in" in run_bench(results)
    assert results.read_text().startswith(before)
    assert set(figures(results, first, "original")) == {"skipped"}, "measured again"
    timed = {"time_p20", "time_p50", "time_p80", "texts_rate", "tokens_rate", "parity_error"}
    for workload in others:
        for name in ENCODERS:
            found = figures(results, workload, name)
            if name == encoders.GRAPHED and len(workload.lengths) > 1:
                assert not found
                continue
            if name in encoders.GPU_ONLY and not torch.cuda.is_available():
                assert found["skipped"]["unit"] == encoders.GPU_ONLY[name] and len(found) == 1
                continue
            assert timed <= set(found), (workload.name, name)
            ms, rate = (float(found[metric]["value"]) for metric in ("time_p50", "tokens_rate"))
            assert rate == pytest.approx(1e3 * workload.num_tokens / ms, rel=1e-4)
            assert float(found["tokens_rate"]["share_of_limit"]) > 0
            assert ("batch_size" in found) == (name not in encoders.WITHOUT_BATCH_SIZE)


class Breaks(encoders.Original):
    """It raises at a place: where it is made, in its first batches, or with the whole workload."""

    place = ""

    def __init__(self, ours):
        super().__init__(ours)
        layers = len(ours.model.embedding_model.layers)
        self.is_whole = layers > PARITY_LAYERS
        self.fail("made" if self.is_whole else "parity made")

    def encode(self, texts, instruction, batch_size):
        self.fail("warm-up" if self.is_whole else "parity")
        # the batch size is searched on four
        if self.is_whole and len(texts) > 4:
            self.fail("pass")
        return super().encode(texts, instruction, batch_size)

    def fail(self, place):
        if place == self.place:
            raise RuntimeError(f"broken: {place}")


@pytest.fixture
def fresh():
    participants.cache_clear()
    yield
    participants.cache_clear()


@pytest.mark.parametrize("place", ["parity made", "parity", "made", "warm-up", "pass"])
def test_a_baseline_that_raises_is_skipped_and_ends_nothing(place, fresh, monkeypatch):
    monkeypatch.setattr(Breaks, "place", place)
    monkeypatch.setitem(ENCODERS, "original", Breaks)
    bench = next(bench for bench in benches(Setting("cpu", smallest=True)) if len(bench.workload.lengths) > 4)
    rows = [figure for figure in bench.measure(Limits("cpu", 0.01), 0.0) if figure.impl == "original"]
    assert [(row.metric, row.unit) for row in rows] == [("skipped", f"cannot run: broken: {place}")]


def test_ours_is_checked_first_and_its_error_is_one(fresh, monkeypatch):
    made = []
    for name in ENCODERS:
        monkeypatch.setitem(ENCODERS, name, NotANumber if name == OURS else made.append)
    first, *_ = benches(Setting("cpu", smallest=True))
    with pytest.raises(AssertionError, match="parity is red"):
        first.measure(Limits("cpu", 0.01), 0.0)
    assert not made
    monkeypatch.setitem(ENCODERS, OURS, Breaks)
    monkeypatch.setattr(Breaks, "place", "parity")
    with pytest.raises(RuntimeError, match="broken: parity"):
        first.measure(Limits("cpu", 0.01), 0.0)


def test_scales_are_frozen_and_follow_the_device():
    for setting, scale in (
        (Setting("cuda"), GPU),
        (Setting("cpu"), SMALL),
        (Setting("cuda", smallest=True), SMALLEST),
    ):
        assert [bench.workload for bench in benches(setting)] == list(scale.workloads)
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPU.workloads = ()
