import numpy as np
import pytest
import torch
from waits import Waits
from whole_model import from_padded

from nvembed_fast.kernels.layout import SeqLayout, to_device
from nvembed_fast.packing import PackedBatch, pad_rows, token_budget_batches


def test_layout_lists():
    layout = SeqLayout((3, 0, 5, 5))
    assert layout.cu_seqlens.tolist() == [0, 3, 3, 8, 13]
    assert (layout.num_tokens, layout.max_length, len(layout)) == (13, 5, 4)
    assert layout.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert layout.runs() == [(0, 1, 3, 0), (2, 2, 5, 3)]
    assert [(run.seqs, run.rows) for run in layout.runs()] == [
        (slice(0, 1), slice(0, 3)),
        (slice(2, 4), slice(3, 13)),
    ]
    # an empty sequence between equal ones parts them: a run's sequences are neighbours
    assert [run.seqs for run in SeqLayout((4, 0, 4)).runs()] == [slice(0, 1), slice(2, 3)]


def test_layout_tiles_cover_every_token_once_longest_sequence_first():
    layout = SeqLayout((3, 0, 130, 64, 65))
    tiles = layout.tiles(64).tolist()
    assert tiles == [[2, 0], [2, 64], [2, 128], [4, 0], [4, 64], [3, 0], [0, 0]]
    covered = sum(min(64, layout.lengths[seq] - first) for seq, first in tiles)
    assert covered == layout.num_tokens


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_layout_without_tokens(lengths):
    layout = SeqLayout(lengths)
    assert layout.tiles(16).shape == (0, 2) and layout.positions.shape == (0,) and layout.runs() == []


def test_layout_rejects_a_negative_length():
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        SeqLayout((3, -1))


def test_from_ids_packs_and_masks():
    batch = PackedBatch.from_ids([np.array([5, 6, 7]), np.array([8])], [2, 0])
    assert batch.input_ids.tolist() == [5, 6, 7, 8] and batch.input_ids.dtype == torch.int64
    assert batch.pool_mask.tolist() == [False, False, True, True]
    assert PackedBatch.from_ids([np.array([5])], [0]).pool_mask is None


def test_a_batch_goes_to_the_device_by_one_copy(monkeypatch):
    """Ids, mask, ends, positions, and the lists that the batch before was asked for."""
    monkeypatch.setattr("nvembed_fast.kernels.layout._asked", {})

    def run(seed: int) -> int:
        lengths = np.random.default_rng(seed).integers(600, 1000, 5)
        with Waits() as waits:
            batch = PackedBatch.from_ids([np.arange(n) for n in lengths], [2] * 5, "meta")
            for _ in range(3):
                batch.layout.tiles(32)
            batch.layout.tiles(512), batch.layout.split_seqs(512)
        plain = SeqLayout(lengths)
        assert batch.layout.tiles(32).shape == plain.tiles(32).shape
        assert batch.layout.split_seqs(512).shape == plain.split_seqs(512).shape
        assert not waits.waits
        return waits.copies

    assert [run(seed) for seed in range(3)] == [4, 1, 1]


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_copy_is_at_once_where_memory_is_not_pinned(monkeypatch, kind):
    """torch gives pinned memory to nobody while a copy is under way, and other memory at once."""
    copies = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: copies.append("pinned") or t)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *_, non_blocking: copies.append(non_blocking) or t)
    to_device(torch.ones(2), torch.device(kind))
    assert copies == (["pinned", True] if kind == "cuda" else [False])


def test_lists_that_went_along_are_those_of_the_batch():
    for _ in range(2):
        for lengths in ((600, 1000, 3), (1000, 1, 700)):
            layout = SeqLayout(lengths)
            tiles = layout.tiles(256).tolist()
            assert len(tiles) == sum(-(-n // 256) for n in lengths)
            assert all(first < lengths[seq] for seq, first in tiles)
            assert {seq for seq, _ in layout.split_seqs(256).tolist()} == {
                s for s, n in enumerate(lengths) if n > 256
            }
            assert layout.tiles(256).data_ptr() % 16 == layout.positions.data_ptr() % 16 == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_round_trip(side):
    ids = torch.arange(1, 11).view(2, 5)
    mask = torch.ones(2, 5)
    mask[1, -2:] = 0
    if side == "left":
        mask = mask.flip(1)
    batch, places = from_padded(ids, mask)
    assert batch.layout.lengths == (5, 3)
    rows = batch.input_ids[:, None].float()
    assert torch.equal(pad_rows(rows, places, (2, 5))[..., 0], ids * mask)


def test_from_padded_keeps_the_pool_mask_of_real_tokens():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    pool = torch.tensor([[0, 1, 1], [0, 0, 1]])
    batch, _ = from_padded(torch.arange(6).view(2, 3), mask, pool)
    assert batch.pool_mask.tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("row", [[1, 0, 1], [0, 1, 0, 1]], ids=str)
def test_from_padded_rejects_a_mask_with_a_hole(row):
    with pytest.raises(ValueError, match="one unbroken block"):
        from_padded(torch.zeros(1, len(row), dtype=torch.long), torch.tensor([row]))


def test_from_padded_names_the_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"pool_mask must be \(2, 3\) like input_ids, got \(2, 4\)"):
        from_padded(torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 4))


def test_token_budget_batches_keep_every_text_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 100, size=200).tolist()
    batches = token_budget_batches(lengths, 256)
    flat = [i for b in batches for i in b]
    assert sorted(flat) == list(range(200))
    assert all(sum(lengths[i] for i in b) <= 256 for b in batches)
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)


def test_a_text_over_the_budget_is_alone():
    assert token_budget_batches([5, 50, 4], 9) == [[1], [0, 2]]


def test_token_budget_batches_rejects_an_empty_budget():
    with pytest.raises(ValueError, match="max_batch_tokens must be at least 1, got 0"):
        token_budget_batches([1], 0)
