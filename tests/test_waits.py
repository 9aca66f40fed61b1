"""How often the host waits for the device: once in `forward`, and never between the batches of `encode`."""

import contextlib

import numpy as np
import pytest
import torch
from waits import Waits

from nvembed_fast import NVEmbed
from nvembed_fast.packing import Padded

IDS = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 2], [2, 2, 1, 9]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1]])
POOL = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1]])


@pytest.fixture
def model(tiny_directory, monkeypatch) -> NVEmbed:
    """A model on "meta" that has been called once, so that the latents are built."""
    found = NVEmbed.from_pretrained(tiny_directory, device="cpu").to("meta")
    # autocast does not know this device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: contextlib.nullcontext())
    monkeypatch.setattr(NVEmbed, "_refuse_offloaded", lambda self: None)
    with Waits() as waits:
        found.embed([np.arange(3, 9)], [0])
    assert found.model.head.cached(), "nothing was built, so `refresh` would not wait"
    # whether all that was built is finite
    assert waits.waits == ["_local_scalar_dense"]
    return found


@pytest.mark.parametrize("pool", [POOL, None], ids=["pooled", "states"])
def test_forward_waits_once(model, pool):
    facts = Padded(IDS, MASK, pool).facts
    # and that no weight has changed
    answer = torch.cat([facts, facts.new_zeros(1)])
    tensors = [None if t is None else t.to("meta") for t in (IDS, MASK, pool)]
    with Waits(answer) as waits:
        (found,) = model(*tensors).values()
    assert waits.waits == ["to the host"] and waits.copies == 1
    assert found.shape == ((3, 4, 64) if pool is None else (3, 64))
    assert model.model.head.cached()


def test_forward_drops_what_was_built_of_other_content(model):
    facts = Padded(IDS, MASK, POOL).facts
    [before] = model.model.head.cached().values()
    tensors = [t.to("meta") for t in (IDS, MASK, POOL)]
    with Waits(torch.cat([facts, facts.new_ones(1)])) as waits:
        model(*tensors)
    [after] = model.model.head.cached().values()
    assert after is not before
    assert waits.waits == ["to the host", "_local_scalar_dense"]


def test_encode_waits_before_its_first_batch_and_behind_its_last(model, monkeypatch):
    """Each batch is one copy to the device, and its places in the result are another."""
    texts = ["one", "one two three", "a b c d e f g", "one two", "word " * 30]
    seen, embed = [], model.embed

    def embed_and_note(*args):
        seen.append(list(waits.waits))
        return embed(*args)

    monkeypatch.setattr(model, "embed", embed_and_note)
    with Waits(torch.zeros(1)) as waits:
        vectors = model.encode(texts, max_batch_tokens=8)
    assert vectors.shape == (5, 64) and len(seen) > 3
    assert seen == [["to the host"]] * len(seen)
    assert waits.waits == ["to the host"] * 2
    assert waits.copies == 2 * len(seen)


def test_a_wait_is_seen():
    x, mask = torch.ones(3, device="meta"), torch.ones(3, dtype=torch.bool, device="meta")
    for wait in (lambda: x.sum().item(), lambda: bool(mask.any()), lambda: torch.equal(x, x)):
        with Waits() as waits:
            wait()
        assert len(waits.waits) == 1
    for wait in (x.tolist, x.cpu, lambda: x.to("cpu"), lambda: torch.ones(3).copy_(x)):
        with Waits() as waits:
            wait()
        assert waits.waits == ["to the host"]
    with Waits() as waits:
        torch.ones(3).to("meta"), torch.ones(3).to("meta", non_blocking=True), x.copy_(torch.ones(3))
    assert waits.waits == ["to the device"] * 2 and waits.copies == 3
    for sized in (mask.nonzero, lambda: x[mask], lambda: torch.masked_select(x, mask)):
        with pytest.raises(AssertionError, match="asks the device for a size"), Waits():
            sized()
