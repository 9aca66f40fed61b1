"""Packed batches: the tokens of many texts one after another, no padding between them.

Padding exists only at the edges of the package. `from_padded` removes it, and
`pad_rows` puts it back for callers of the padded API.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nvembed_fast.kernels.layout import SeqLayout, to_device

__all__ = ["PackedBatch", "from_padded", "pad_rows", "token_budget_batches"]


@dataclass(frozen=True)
class PackedBatch:
    """One forward pass.

    Attributes:
        input_ids: [T] int64 token ids.
        layout: where the sequences lie.
        pool_mask: [T] bool, True at the tokens to pool. None pools all.
    """

    input_ids: torch.Tensor
    layout: SeqLayout
    pool_mask: torch.Tensor | None = None

    @classmethod
    def from_ids(
        cls, ids: Sequence[np.ndarray], first_pooled: Sequence[int], device: torch.device | str = "cpu"
    ) -> "PackedBatch":
        """Pack token ids.

        Args:
            ids: one int array per text.
            first_pooled: per text, the number of leading tokens that are not pooled.
            device: where the batch goes, without waiting for the device.
        """
        layout = SeqLayout([len(i) for i in ids], device)
        packed = np.concatenate(ids) if ids else np.empty(0)
        pool_mask = None
        if any(first_pooled):
            keep = [np.arange(len(i)) >= first for i, first in zip(ids, first_pooled, strict=True)]
            pool_mask = to_device(torch.from_numpy(np.concatenate(keep)), layout.device)
        return cls(to_device(torch.from_numpy(packed.astype(np.int64)), layout.device), layout, pool_mask)


def from_padded(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, pool_mask: torch.Tensor | None = None
) -> tuple[PackedBatch, torch.Tensor]:
    """Remove the padding of a padded batch.

    Args:
        input_ids: [B, S] int.
        attention_mask: [B, S], nonzero at real tokens: one unbroken block per row, at the left or the right.
            None means that there is no padding.
        pool_mask: [B, S], nonzero at tokens to pool. None pools all real tokens.

    Returns:
        The batch, and [T] int64: the flat position b * S + s of each of its tokens, for `pad_rows`.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, S], got {tuple(input_ids.shape)}")
    for name, mask in (("attention_mask", attention_mask), ("pool_mask", pool_mask)):
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(
                f"{name} must be {tuple(input_ids.shape)} like input_ids, got {tuple(mask.shape)}"
            )
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    borders = real.diff(dim=1, prepend=real.new_zeros(len(real), 1))
    # one block of ones has one rising border, and a falling one unless it ends the row
    if bool(((borders & real).sum(1) > 1).any()):
        raise ValueError("attention_mask must hold one unbroken block of ones per row")
    places = real.flatten().nonzero().squeeze(1)
    layout = SeqLayout(real.sum(1).tolist(), input_ids.device)
    keep = None if pool_mask is None else (pool_mask != 0).flatten()[places]
    return PackedBatch(input_ids.flatten()[places].long(), layout, keep), places


def pad_rows(rows: torch.Tensor, places: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """[T, D] packed rows back to [B, S, D] with zeros at the pads. This is the inverse of `from_padded`."""
    padded = rows.new_zeros(shape[0] * shape[1], rows.shape[1])
    return padded.index_copy(0, places, rows).unflatten(0, shape)


def token_budget_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Cut texts into batches of at most `max_batch_tokens` tokens, longest first.

    Neighbours of the sorted texts have similar lengths, and a batch that does not fit in memory comes first.
    A text longer than the budget is a batch of its own.

    Returns:
        Indices into `lengths`, each exactly once.
    """
    if max_batch_tokens < 1:
        raise ValueError(f"max_batch_tokens must be at least 1, got {max_batch_tokens}")
    batches: list[list[int]] = []
    room = 0
    for index in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        if not batches or lengths[index] > room:
            batches.append([])
            room = max_batch_tokens
        batches[-1].append(index)
        room -= lengths[index]
    return batches
