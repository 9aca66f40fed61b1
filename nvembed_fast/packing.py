"""Packed batches: the tokens of many texts one after another, no padding between them.

Padding exists only at the edges of the package. `Padded` removes it, and
`pad_rows` puts it back for callers of the padded API.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nvembed_fast.kernels.layout import SeqLayout

__all__ = ["PackedBatch", "Padded", "pad_rows", "token_budget_batches"]

# torch computes little with wider unsigned integers
_ID_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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
        arrays = [np.concatenate(ids).astype(np.int64) if ids else np.empty(0, dtype=np.int64)]
        if any(first_pooled):
            keep = [np.arange(len(i)) >= first for i, first in zip(ids, first_pooled, strict=True)]
            arrays.append(np.concatenate(keep))
        layout = SeqLayout([len(i) for i in ids], device, arrays)
        input_ids, *pool_mask = layout.arrays
        return cls(input_ids, layout, pool_mask[0] if pool_mask else None)


class Padded:
    """A padded batch. What has to be known of it is computed on its device, and not yet waited for.

    Args:
        input_ids: [B, S] int8 to int64 or uint8.
        attention_mask: [B, S] of any dtype, 1 at real tokens and 0 at pads: one unbroken block of ones per
            row, at the left or the right. None means that there is no padding.
        pool_mask: [B, S] of any dtype, 1 at tokens to pool and else 0. None pools all real tokens.

    Attributes:
        facts: [4 B + 4] int64 on the device, to be read once and passed to `pack`.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: it has another shape, dtype or device.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pool_mask: torch.Tensor | None = None,
    ):
        _check_tensor("input_ids", input_ids)
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [B, S], got {tuple(input_ids.shape)}")
        self.masks = {"attention_mask": attention_mask, "pool_mask": pool_mask}
        for name, mask in self.masks.items():
            if mask is not None:
                _check_mask(name, mask, input_ids)
        if input_ids.dtype not in _ID_DTYPES:
            raise ValueError(
                f"input_ids must be signed integers, got {input_ids.dtype}: pass input_ids.long()"
            )
        self.input_ids, self.shape = input_ids, (input_ids.shape[0], input_ids.shape[1])
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask == 1
        keep = real if pool_mask is None else pool_mask == 1
        self.keep_BS = None if pool_mask is None else keep
        rises = real & real.diff(dim=1, prepend=real.new_zeros(len(real), 1))
        # beside the ids of real tokens zeros, also where there is none
        ids = F.pad(torch.where(real, input_ids.long(), 0).flatten(), (0, 1))
        strange = [real.new_zeros(1) if mask is None else _is_strange(mask) for mask in self.masks.values()]
        self.facts = torch.cat(
            [
                # by rows: tokens, the place of the first one, blocks, tokens to pool
                real.sum(1),
                F.pad(real, (0, 1)).int().argmax(1),
                rises.sum(1),
                (real & keep).sum(1),
                torch.stack([*ids.aminmax(), *(values.sum() for values in strange)]),
            ]
        )

    def pack(self, facts: Sequence[int], vocab_size: int | None = None) -> tuple[PackedBatch, torch.Tensor]:
        """Remove the padding, without waiting for the device.

        Args:
            facts: `self.facts`, as it was read.
            vocab_size: of a model that pools. None looks neither at ids nor at what is pooled.

        Returns:
            The batch, and [T] int64: the flat position b * S + s of each of its tokens, for `pad_rows`.

        Raises:
            ValueError: a mask holds other values than 0 and 1 or a hole, an id is not in the vocabulary, or a
                row pools nothing.
        """
        *of_rows, low, high, strange_attention, strange_pool = facts
        lengths, firsts, num_blocks, num_kept = np.array(of_rows, dtype=np.int64).reshape(4, -1)
        for (name, mask), num_strange in zip(
            self.masks.items(), (strange_attention, strange_pool), strict=True
        ):
            if mask is not None and num_strange:
                raise ValueError(
                    f"{name} must hold 0 and 1 alone, got {mask[_is_strange(mask)][0].item()}: pass an "
                    "additive mask as (mask == 0). Tokens have no weights"
                )
        if (num_blocks > 1).any():
            raise ValueError("attention_mask must hold one unbroken block of ones per row")
        # on a GPU an id beyond the embedding would end the process
        if vocab_size is not None and (low < 0 or high >= vocab_size):
            raise ValueError(f"input_ids must lie in 0 to {vocab_size - 1}, got {low if low < 0 else high}")
        if vocab_size is not None and self.keep_BS is not None and not num_kept.all():
            # the original returns NaN there
            row = num_kept.argmin()
            raise ValueError(
                f"row {row} of the batch has no token that attention_mask and pool_mask both keep"
            )
        row_starts = np.arange(len(lengths)) * self.shape[1] + firsts
        shifts = np.repeat(row_starts - (np.cumsum(lengths) - lengths), lengths)
        layout = SeqLayout(lengths, self.input_ids.device, [np.arange(lengths.sum()) + shifts])
        (places,) = layout.arrays
        keep = None if self.keep_BS is None else self.keep_BS.flatten()[places]
        return PackedBatch(self.input_ids.flatten()[places].long(), layout, keep), places


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        hint = "unpack it, model(**batch)" if hasattr(value, "keys") else f"pass torch.tensor({name})"
        raise TypeError(f"{name} must be a torch.Tensor [B, S], got {type(value).__name__}: {hint}")
    if value.layout != torch.strided or value.is_nested:
        raise ValueError(f"{name} must be a dense tensor, got {value.layout}: pad it")


def _check_mask(name: str, mask: torch.Tensor, input_ids: torch.Tensor) -> None:
    _check_tensor(name, mask)
    if mask.shape != input_ids.shape:
        raise ValueError(f"{name} must be {tuple(input_ids.shape)} like input_ids, got {tuple(mask.shape)}")
    if mask.device != input_ids.device:
        raise ValueError(f"{name} must be on {input_ids.device} like input_ids, got {mask.device}")


def _is_strange(mask: torch.Tensor) -> torch.Tensor:
    """[B, S] bool: neither 0 nor 1."""
    return ~((mask == 1) | (mask == 0))


def pad_rows(rows: torch.Tensor, places: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """[T, D] packed rows back to [B, S, D] with zeros at the pads. This is the inverse of `Padded.pack`."""
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
