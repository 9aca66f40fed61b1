"""What is kept between calls may be read by any stream. The streams are played: no GPU is needed."""

import contextlib
import copy
import pickle

import pytest
import torch

from nvembed_fast.config import BackboneConfig, LatentConfig
from nvembed_fast.kernels import layout, streams
from nvembed_fast.kernels.layout import SeqLayout, layout_of
from nvembed_fast.kernels.streams import Kept
from nvembed_fast.network import latent_head, mistral


class Stream:
    """A stream of cuda:0. `seen` fills with what all of them are told."""

    def __init__(self, number: int, seen: list):
        self.cuda_stream, self.seen = number, seen

    def record_event(self) -> str:
        self.seen.append(f"{self.cuda_stream} records")
        return f"event of {self.cuda_stream}"

    def wait_event(self, event: str) -> None:
        self.seen.append(f"{self.cuda_stream} waits for {event}")


class GPUTensor:
    device = torch.device("cuda", 0)

    def __init__(self, name: str, seen: list):
        self.name, self.seen = name, seen

    def record_stream(self, stream: Stream) -> None:
        self.seen.append(f"{self.name} is read on {stream.cuda_stream}")


class Machine:
    """Streams by number, and whether the current one is being captured."""

    def __init__(self, monkeypatch):
        self.current, self.is_capturing, self.seen = 1, False, []
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: self.current, raising=False)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(self.current, self.seen))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.is_capturing)

    @contextlib.contextmanager
    def stream(self, number: int):
        before, self.current = self.current, number
        yield
        self.current = before

    def tensor(self, name: str) -> GPUTensor:
        return GPUTensor(name, self.seen)


@pytest.fixture
def machine(monkeypatch) -> Machine:
    return Machine(monkeypatch)


def test_another_stream_waits_once_and_the_allocator_knows(machine):
    kept = Kept(machine.tensor("cos"), machine.tensor("sin"))
    with machine.stream(2):
        kept.here(), kept.here()
    with machine.stream(3):
        kept.here()
    assert machine.seen == [
        "1 records",
        "2 waits for event of 1",
        "cos is read on 2",
        "sin is read on 2",
        "3 waits for event of 1",
        "cos is read on 3",
        "sin is read on 3",
    ]


def test_the_stream_that_made_it_asks_nothing_more(machine, monkeypatch):
    kept = Kept(machine.tensor("cos"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: pytest.fail("host time for nothing"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("the same"))
    kept.here()


def test_a_capture_orders_nothing(machine):
    """CUDA refuses an event from outside, and a capture begins when all work is done."""
    kept = Kept(machine.tensor("cos"))
    machine.is_capturing = True
    with machine.stream(2):
        kept.here()
        made_inside = Kept(machine.tensor("sin"))
    machine.is_capturing = False
    with machine.stream(3):
        made_inside.here()
    assert machine.seen == ["1 records"]
    # the stream of the capture waits like any other later
    with machine.stream(2):
        kept.here()
    assert machine.seen[1:] == ["2 waits for event of 1", "cos is read on 2"]


def test_a_copy_is_made_on_the_stream_that_copies():
    kept = Kept(torch.arange(3))
    for copied in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert torch.equal(*copied.tensors, *kept.tensors) and copied.tensors[0] is not kept.tensors[0]


@pytest.fixture
def reads(monkeypatch) -> list[Kept]:
    """Fills with what is read behind `here`."""
    seen: list[Kept] = []
    monkeypatch.setattr(streams.Kept, "here", lambda kept: seen.append(kept))
    return seen


def test_lists_of_a_layout_are_ordered_at_each_reading(reads):
    lengths = SeqLayout((3, 70)).host_lengths
    one = layout_of(lengths, torch.device("cpu"))
    assert layout_of(lengths, torch.device("cpu")) is one and reads == [one.kept, one.kept]
    reads.clear()
    # made later, maybe by another stream than the layout
    block = 17
    assert one.tiles(block) is one.tiles(block) and one.split_seqs(block) is one.split_seqs(block)
    tiles, again, split, _ = reads
    assert tiles is again is not one.kept and tiles.tensors[0] is one.tiles(block)
    assert split.tensors[0] is one.split_seqs(block)
    reads.clear()
    # sent with the layout
    like = SeqLayout((3, 71))
    like.tiles(block), like.split_seqs(block)
    assert reads == [like.kept] * 2
    reads.clear()
    many = SeqLayout((5, 4) * 6)
    order = many.by_length()
    many.by_length()
    assert reads == [order.layout.kept] * 2


def test_tables_and_the_matrices_of_the_latents_are_ordered_at_each_reading(reads):
    text = BackboneConfig(
        vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    backbone = mistral.MistralBackbone(text)
    tables = backbone.rotary_tables(8)
    assert backbone.rotary_tables(9) is tables and reads == [tables.kept] * 2
    assert tables.kept.tensors[0] is tables.cos and tables.kept.tensors[1] is tables.sin
    reads.clear()
    config = LatentConfig(
        num_latents_value=8, num_cross_heads=2, cross_dim_head=16, hidden_dim=32, latent_dim=32
    )
    head = latent_head.LatentHead(config).requires_grad_(False)
    for _ in range(2):
        one, other = head._constant()
    [built] = head.cached().values()
    assert reads == [built.kept] * 2
    assert built.kept.tensors[0] is one and built.kept.tensors[1] is other


def test_what_goes_to_the_device_together_is_aligned_and_equal():
    tensors = [
        torch.arange(5),
        torch.tensor([True, False, True]),
        torch.empty(0, 2, dtype=torch.int32),
        torch.arange(6, dtype=torch.int32).view(3, 2),
    ]
    sent = layout.to_device_together(tensors, torch.device("cpu"))
    for there, here in zip(sent, tensors, strict=True):
        assert torch.equal(there, here) and there.dtype == here.dtype and there.shape == here.shape
        assert there.data_ptr() % 16 == 0
    assert len({t.untyped_storage().data_ptr() for t in sent}) == 1
    assert layout.to_device_together([], torch.device("cpu")) == []
