"""Single texts in buckets. Without a GPU a replay is played by running the captured function again."""

import contextlib
import copy
import dataclasses
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nvembed_fast import NVEmbed, graphs, ops
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.graphs import BucketLayout, SingleTextGraphs
from nvembed_fast.kernels import library, mean_pool
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.packing import PackedBatch
from tools import host_time, tuning

BUCKETS = {1: 16, 16: 16, 17: 32, 65: 128}


@pytest.mark.parametrize("block", [16, 32, 64])
def test_a_bucket_has_the_tiles_of_its_two_texts(block):
    layout = BucketLayout(64, torch.device("cpu"), (16, block))
    tiles = layout.tiles(block)
    for length in range(65):
        layout.put(np.arange(length), 0)
        plain = SeqLayout((length, 64 - length))
        wanted = {tuple(tile) for tile in plain.tiles(block).tolist()}
        assert {tuple(tile) for tile in layout.tiles(block).tolist()} == wanted
        assert torch.equal(layout.cu_seqlens, plain.cu_seqlens)
        assert torch.equal(layout.positions, plain.positions)
        # the addresses and the shape that a graph was captured with
        assert layout.tiles(block).data_ptr() == tiles.data_ptr() and layout.tiles(block).shape == tiles.shape
        assert layout.lengths == (64, 0) and layout.max_length == 64


def test_a_text_is_in_front_and_its_instruction_is_not_pooled():
    layout = BucketLayout(8, torch.device("cpu"))
    layout.put(np.array([9, 8, 7, 6, 5, 4, 3, 2]), 0)
    layout.put(np.array([5, 6, 7]), 1)
    assert layout.input_ids.tolist() == [5, 6, 7, 0, 0, 0, 0, 0]
    assert layout.keep.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("bucket", [16, 64, 256])
def test_every_part_of_a_bucket_lies_at_16_bytes(bucket):
    """Of another address a kernel would be compiled once more."""
    layout = BucketLayout(bucket, torch.device("cpu"), (16, 32, 512))
    parts = [layout.input_ids, layout.keep, layout.cu_seqlens, layout.positions]
    parts += [layout.tiles(block) for block in layout.blocks]
    assert [part.data_ptr() % 16 for part in parts] == [0] * 7


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch) -> None:
    """A graph is played on a CPU."""
    monkeypatch.setattr(graphs, "_DEVICE_TYPES", ("cpu",))


@pytest.fixture
def captures(monkeypatch) -> list[int]:
    """A capture runs the function twice, as on a GPU. A replay runs it again. The list fills with replays."""
    replays = []

    def captured(run, pool):
        run(), run()

        def replay():
            replays.append(1)
            return run()

        return replay

    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return replays


def model_of(directory, head: str) -> NVEmbedModel:
    loaded = NVEmbed.from_pretrained(directory, device="cpu").model
    if head == "latent":
        return loaded
    torch.manual_seed(0)
    model = NVEmbedModel(dataclasses.replace(loaded.config, pooling_head=head))
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("head", ["latent", "mean", "eos", "self_attention"])
def test_vectors_are_those_of_the_model(tiny_directory, captures, head):
    """By the kernels, since the PyTorch path reads the host's lists, which a graph does not."""
    model = model_of(tiny_directory, head)
    run = SingleTextGraphs(model)
    ids = np.random.default_rng(0).integers(3, 100, 100)
    buckets = BUCKETS if head == "latent" else {1: 16, 17: 32}
    with ops.use_impl("triton"), torch.no_grad():
        for length, bucket in buckets.items():
            wanted = model(PackedBatch.from_ids([ids[:length]], [length // 2], "cpu"))
            got = run(ids[:length], length // 2)
            assert got.shape == wanted.shape and got.dtype == torch.float32
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-6)
            assert run.buckets[-1] == bucket == graphs.bucket_of(length)
    assert len(captures) == len(buckets)


def test_a_result_outlives_the_next_text(tiny_directory, captures, monkeypatch):
    model = model_of(tiny_directory, "latent")
    place = torch.zeros(2, model.config.hidden_size)
    monkeypatch.setattr(graphs, "captured", lambda run, pool: lambda: place.copy_(run()))
    run = SingleTextGraphs(model)
    with ops.use_impl("triton"):
        first = run(np.array([5, 6, 7]), 0)
        kept = first.clone()
        second = run(np.array([9, 8, 7]), 0)
    assert torch.equal(first, kept) and not torch.equal(first, second)


class Sum(torch.nn.Module):
    """As much of a model as a capture asks for. The vector is the sum of the pooled ids."""

    embedding_model = SimpleNamespace(rotary_tables=lambda num_positions: None)
    head = SimpleNamespace(cached=dict, output_normalize=True)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        keep = 1 if batch.pool_mask is None else batch.pool_mask
        return (batch.input_ids * keep).sum().view(1, 1)


def test_graphs_of_two_threads_do_not_mix(captures, monkeypatch):
    """The second thread comes while the first one replays: behind its copy and before its result."""
    replaying, second_is_done = threading.Event(), threading.Event()

    def captured(run, pool):
        def replay():
            if not replaying.is_set():
                replaying.set()
                second_is_done.wait(0.2)
            return run()

        return replay

    monkeypatch.setattr(graphs, "captured", captured)
    run = SingleTextGraphs(Sum())

    def second() -> int:
        assert replaying.wait(10)
        got = run(np.array([9, 8, 7]), 0).item()
        second_is_done.set()
        return got

    with ThreadPoolExecutor(2) as pool:
        found = pool.submit(lambda: run(np.array([5, 6, 7]), 1).item()), pool.submit(second)
    assert [f.result() for f in found] == [13, 24]
    before = run._state([])
    monkeypatch.setattr(Sum.head, "output_normalize", False)
    assert run._state([]) != before


def test_graphs_of_two_models_take_turns(captures):
    """cuBLAS's scratch memory belongs to the thread that captured, not to a model."""
    one, other = SingleTextGraphs(Sum()), SingleTextGraphs(Sum())
    one(np.array([5, 6, 7]), 0), other(np.array([5, 6, 7]), 0)
    [one_graph], [other_graph] = one._graphs.values(), other._graphs.values()
    started, busy = threading.Event(), []

    def replay():
        assert not busy, "both replay at once"
        busy.append(1)
        started.set()
        time.sleep(0.1)
        busy.pop()
        return torch.zeros(2, 1)

    for graph in (one_graph, other_graph):
        object.__setattr__(graph, "replay", replay)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(one, np.array([5, 6, 7]), 0)
        assert started.wait(10)
        second = pool.submit(other, np.array([5, 6, 7]), 0)
        assert first.result().item() == second.result().item() == 0


@pytest.mark.parametrize("way", ["forget", "hook"])
def test_graphs_that_were_dropped_take_their_pool_with_them(captures, monkeypatch, way):
    """PyTorch: captures_underway use_count > 0 INTERNAL ASSERT FAILED."""
    pools = itertools.count()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (next(pools),))
    run, ids = SingleTextGraphs(Sum()), np.array([5, 6, 7])
    run(ids, 0), run(np.arange(40), 0)
    assert run._pool == (0,)
    if way == "forget":
        run.forget()
    else:
        handle = run.model.register_forward_hook(lambda *_: None)
        run(ids, 0)
        handle.remove()
    assert run(ids, 0).item() == 18 and run._pool == (1,)


def test_a_capture_that_fails_leaves_no_pool(captures, monkeypatch):
    pools, real = itertools.count(), graphs.captured

    def fails_once(run, pool):
        if pool == (0,):
            raise torch.OutOfMemoryError
        return real(run, pool)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (next(pools),))
    monkeypatch.setattr(graphs, "captured", fails_once)
    run = SingleTextGraphs(Sum())
    with pytest.raises(torch.OutOfMemoryError):
        run(np.array([5, 6, 7]), 0)
    assert run(np.array([5, 6, 7]), 0).item() == 18 and run._pool == (1,)
    run(np.arange(40), 0)
    assert run._pool == (1,), "buckets share their memory"


@pytest.mark.parametrize("first, then", [*itertools.permutations([torch.inference_mode, torch.no_grad])])
def test_the_first_query_may_come_under_inference_mode(captures, first, then):
    run = SingleTextGraphs(Sum())
    with first():
        assert run(np.array([5, 6, 7]), 0).item() == 18
    with then():
        assert run(np.array([5, 6, 8]), 0).item() == 19
    assert len(captures) == 2


def test_graphs_of_another_threads_stream_wait_for_the_last(monkeypatch):
    """All buckets share scratch memory, so the device waits for the last turn of any of them."""
    seen: list[tuple[str, str]] = []

    class Stream:
        def record_event(self) -> str:
            seen.append(("record", f"event {len(seen)}"))
            return seen[-1][1]

        def wait_event(self, event: str) -> None:
            seen.append(("wait", event))

    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(graphs, "_turns", {})
    for _ in range(2):
        with contextlib.suppress(ZeroDivisionError), graphs._turn(torch.device("cuda")):
            seen.append(("replay", ""))
            raise ZeroDivisionError
    wanted = [
        ("replay", ""),
        ("record", "event 1"),
        ("wait", "event 1"),
        ("replay", ""),
        ("record", "event 4"),
    ]
    assert seen == wanted


def test_a_changed_weight_or_form_is_captured_anew(tiny_directory, captures):
    model = model_of(tiny_directory, "latent")
    run, ids = SingleTextGraphs(model), np.arange(3, 12)
    with ops.use_impl("triton"):
        run(ids, 0)
        [graph] = run._graphs.values()
        run(ids, 0)
        assert run._graphs[16] is graph
        model.head.latents.mul_(2)
        changed = run(ids, 0)
        assert run._graphs[16] is not graph
        torch.testing.assert_close(
            changed, model(PackedBatch.from_ids([ids], [0], "cpu")), rtol=2e-5, atol=2e-6
        )
        graph, model.head.mode = run._graphs[16], "direct"
        run(ids, 0)
        assert run._graphs[16] is not graph


def test_the_host_looks_while_the_device_computes(monkeypatch):
    """Addresses alone are looked at before a replay: it reads them, even if its vector is dropped."""
    seen = []

    def captured(run, pool):
        return lambda: seen.append("replay") or run()

    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    for name in ("_state", "_is_as_built"):
        look = getattr(SingleTextGraphs, name)
        monkeypatch.setattr(
            SingleTextGraphs, name, lambda *args, look=look, name=name: seen.append(name) or look(*args)
        )
    addresses = graphs._addresses
    monkeypatch.setattr(graphs, "_addresses", lambda weights: seen.append("addresses") or addresses(weights))
    run = SingleTextGraphs(Sum())
    run(np.array([5, 6, 7]), 0)
    seen.clear()
    assert run(np.array([5, 6, 8]), 0).item() == 19
    assert seen == ["addresses", "replay", "_is_as_built", "_state"]


@pytest.mark.parametrize("change", ["moved", "replaced", "larger"])
def test_nothing_is_replayed_with_a_weight_that_has_moved(captures, change):
    """Its old memory may be gone."""
    model = Sum()
    model.inner = torch.nn.Linear(2, 2).requires_grad_(False)
    run, ids = SingleTextGraphs(model), np.array([5, 6, 7])
    run(ids, 0)
    [graph] = run._graphs.values()
    object.__setattr__(graph, "replay", lambda: pytest.fail("memory of a weight that has moved was read"))
    if change == "moved":
        kept = model.inner.weight.data
        model.inner.weight.data = kept.clone()
    elif change == "replaced":
        kept, model.inner.bias = model.inner.bias, torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    else:
        model.inner.register_parameter("more", torch.nn.Parameter(torch.zeros(1), requires_grad=False))
    assert run(ids, 0).item() == 18
    assert run._graphs[16] is not graph


def test_a_vector_of_weights_that_change_under_the_replay_is_dropped(captures, monkeypatch):
    model = Sum()
    model.inner = torch.nn.Linear(2, 2).requires_grad_(False)
    run, ids = SingleTextGraphs(model), np.array([5, 6, 7])
    run(ids, 0)
    [graph] = run._graphs.values()

    def replay():
        model.inner.weight.add_(1)
        return torch.full((2, 1), -1.0)

    object.__setattr__(graph, "replay", replay)
    assert run(ids, 0).item() == 18 and run._graphs[16] is not graph


def test_added_code_runs_without_graphs(tiny_directory, captures):
    """A replay would not call it, and it may decide anew in every call."""
    model = model_of(tiny_directory, "latent")
    run, ids = SingleTextGraphs(model), np.arange(3, 12)
    with ops.use_impl("triton"):
        before, again = run(ids, 0), len(captures)
        for number, module in enumerate((model.head.to_q, model.embedding_model.layers[1].mlp)):
            handle = module.register_forward_hook(lambda module, args, output: -output)
            assert (run(ids, 0) - before).abs().max() > 1e-3, number
            assert not run._graphs
            handle.remove()
        model.head.to_out = torch.nn.Sequential(model.head.to_out, torch.nn.Tanh())
        assert (run(ids, 0) - before).abs().max() > 1e-6
    # the hook was seen while the device computed, and that vector was dropped
    assert len(captures) == again + 1


def test_written_content_is_captured_anew(tiny_directory, captures):
    encoder = NVEmbed.from_pretrained(tiny_directory, device="cpu", impl="triton")
    encoder.graphs = SingleTextGraphs(encoder.model)
    before = encoder.encode("a query")
    encoder.model.head.latents.data.neg_()
    after = encoder.encode("a query")
    assert len(captures) == 2 and (after - before).abs().max() > 1e-3
    encoder.graphs = None
    torch.testing.assert_close(after, encoder.encode("a query"), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("change", ["device", "library", "shape"])
def test_what_no_graph_holds_runs_without_one(tiny_directory, captures, monkeypatch, change):
    """PyTorch's paths go by the host's lists, which say that one text fills the bucket."""
    encoder = NVEmbed.from_pretrained(tiny_directory, device="cpu", impl="triton")
    encoder.graphs = SingleTextGraphs(encoder.model)
    if change == "device":
        monkeypatch.setattr(graphs, "_DEVICE_TYPES", ("cuda",))
    elif change == "library":
        encoder._placement = dataclasses.replace(encoder.placement, impl="library")
    else:  # as under "auto"
        monkeypatch.setattr(ops, "_kernel", lambda name: getattr(library, name))
    forwards = []
    encoder.model.register_forward_hook(lambda *_: forwards.append(1))
    encoder.graphs._is_as_built = lambda: True  # the hook counts, and changes nothing
    got = [encoder.encode("judo") for _ in range(2)]
    # an ordinary run shows once that no graph holds it
    assert len(forwards) == 3 and not captures and not encoder.graphs._graphs
    encoder.graphs = None
    wanted = encoder.encode("judo")
    assert all(torch.equal(vector, wanted) for vector in got)


def test_the_hosts_lists_of_a_bucket_are_never_read():
    layout = BucketLayout(16, torch.device("cpu"))
    for lists in (layout.runs, layout.by_length):
        with pytest.raises(AssertionError, match="the host's lists"):
            lists()


def test_what_a_graph_reads_is_kept(tiny_directory, captures):
    model = model_of(tiny_directory, "latent")
    run = SingleTextGraphs(model)
    with ops.use_impl("triton"):
        run(np.arange(3, 12), 0)
    constants = [t.data_ptr() for built in model.head._cache.values() for t in built.kept.tensors]
    tables = model.embedding_model.rotary_tables(16)
    model.to("cpu")  # moves nothing, and empties the head's cache
    assert not model.head._cache and constants
    held_tables, *held_built = run._graphs[16].held
    assert held_tables is tables
    assert [t.data_ptr() for built in held_built for t in built.kept.tensors] == constants


def test_what_another_thread_replaces_during_a_capture_is_kept(tiny_directory, monkeypatch):
    model = model_of(tiny_directory, "latent")
    backbone, read = model.embedding_model, []

    def captured(run, pool):
        run()
        read.append(backbone.rotary_tables(16))
        if len(read) == 1:  # a long text
            backbone.rotary_tables(2 * len(read[0].cos))
        return run

    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    run = SingleTextGraphs(model)
    with ops.use_impl("triton"):
        run(np.arange(3, 12), 0)
    assert len(read) == 2 and run._graphs[16].held[0] is read[1] is not read[0]


def test_encode_sends_short_texts_alone_through_the_graphs(tiny_directory, captures, monkeypatch):
    monkeypatch.setattr("nvembed_fast.encoder.MAX_TOKENS", 32)
    encoder = NVEmbed.from_pretrained(tiny_directory, device="cpu", impl="triton")
    texts = ["a query", "word " * 40, "two", "three"]
    wanted = encoder.encode(texts)
    encoder.graphs = SingleTextGraphs(encoder.model)
    torch.testing.assert_close(encoder.encode(texts[0]), wanted[0], rtol=2e-5, atol=2e-6)
    assert len(captures) == 1
    encoder.encode(texts[1])  # too long
    encoder.encode(texts[2:])  # two
    assert len(captures) == 1
    other = copy.deepcopy(encoder)
    assert other.graphs.model is other.model and not other.graphs._graphs


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_graphs_without_a_gpu_are_refused(tiny_directory, impl):
    with pytest.raises(ValueError, match="cuda_graphs=True needs Triton kernels on a GPU: "):
        NVEmbed.from_pretrained(tiny_directory, device="cpu", impl=impl, cuda_graphs=True)


def test_no_bucket_starts_the_second_kernel_of_mean_pool():
    for problem in tuning.problems():
        if problem.kernel in ("mean_pool.fwd", "mean_pool.geglu_fwd"):
            for config in (c for capability in (80, 90) for c in problem.configs(capability)):
                assert config["TOKENS"] >= graphs.MAX_TOKENS
    for geglu, sm in itertools.product((False, True), (80, 90)):
        config = mean_pool._launch_config(
            NVEmbedConfig().hidden_size, geglu, capability=sm, dtype=torch.float16
        )
        assert config["TOKENS"] >= graphs.MAX_TOKENS
    with pytest.raises(AssertionError, match="lower MAX_TOKENS"):
        BucketLayout(64, torch.device("cpu")).split_seqs(32)


def test_host_time_is_that_of_a_model_like_nv_embed(monkeypatch, capsys):
    monkeypatch.setattr(host_time, "ROUNDS", 1)
    assert host_time.main() == 0
    modules, query = capsys.readouterr().out.splitlines()
    assert modules == "302 modules, 208 weights" and "all but the replay" in query
