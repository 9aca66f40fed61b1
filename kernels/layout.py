"""Where the sequences of a packed batch lie.

In a packed batch the tokens of all sequences stand one after another in one
[T, ...] tensor, with no padding. The lengths are known on the host, where the
texts were tokenised. So every list that a kernel or a CPU path needs is made
there, once per batch, and all layers read it. No kernel ever asks the device.

A registered operation (torch.library) takes tensors only. There the layout
travels as its `host_lengths`, and `layout_of` finds the lists again.

Dimensions: B sequences, T packed tokens.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

__all__ = ["Order", "Run", "SeqLayout", "layout_of", "to_device"]

# the four tensors that attention moves cost about as many launches as two runs
MIN_RUNS_SAVED = 4


class Run(NamedTuple):
    """Neighbouring sequences of one length: a [num_seqs, length] block without padding."""

    first_seq: int
    num_seqs: int
    length: int
    first_row: int

    @property
    def seqs(self) -> slice:
        return slice(self.first_seq, self.first_seq + self.num_seqs)

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.num_seqs * self.length)


class Order(NamedTuple):
    """The sequences of a layout sorted by length.

    Attributes:
        layout: of the sorted sequences.
        rows: [T] int32. Token i of the sorted pack is token rows[i] of the pack.
        places: [T] int32. Token i of the pack is token places[i] of the sorted pack.
    """

    layout: "SeqLayout"
    rows: torch.Tensor
    places: torch.Tensor


class SeqLayout:
    """Lengths on the host, cu_seqlens on the device, and lists made from them on first use.

    Attributes:
        lengths: tokens per sequence, in packed order. Zero is allowed.
        host_lengths: [B] int32 on the CPU: the same.
        cu_seqlens: [B + 1] int32 on `device`. Sequence b owns rows cu_seqlens[b] to cu_seqlens[b + 1].
        positions: [T] int32 on `device`: the place of each token in its own sequence.
        num_tokens: T.
        max_length: the longest sequence, 0 for none.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"):
        self.lengths = tuple(int(n) for n in lengths)
        if any(n < 0 for n in self.lengths):
            raise ValueError(f"lengths must not be negative, got {min(self.lengths)}")
        self.device = torch.device(device)
        self.num_tokens = sum(self.lengths)
        self.max_length = max(self.lengths, default=0)
        self._starts = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))
        if self.num_tokens > np.iinfo(np.int32).max:
            raise ValueError(f"a packed batch holds at most 2**31 - 1 tokens, got {self.num_tokens}")
        self.host_lengths = torch.from_numpy(np.array(self.lengths, dtype=np.int32))
        self.cu_seqlens = self._to_device(self._starts)
        first_rows = np.repeat(self._starts[:-1], self.lengths)
        self.positions = self._to_device(np.arange(self.num_tokens) - first_rows)
        self._cache: dict = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"SeqLayout({len(self)} sequences, {self.num_tokens} tokens, {self.device})"

    def tiles(self, block: int) -> torch.Tensor:
        """[num_tiles, 2] int32: (sequence, first token inside it) of every chunk of at most `block` tokens.

        The longest sequences stand first, so that no long one starts last. Empty sequences have no tile.
        """
        return self._once(("tiles", block), lambda: self._tiles(block))

    def tile_blocks(self) -> tuple[int, ...]:
        """The values of `block` for which `tiles` has a list so far."""
        return tuple(key[1] for key in self._cache if key[0] == "tiles")

    def split_seqs(self, block: int) -> torch.Tensor:
        """[num_split, 2] int32: (sequence, its first row in `tiles(block)`) of those with more than one tile.

        They are the longest, so their tiles open that list. The tiles of one sequence follow one another.
        """
        return self._once(("split_seqs", block), lambda: self._split_seqs(block))

    def runs(self) -> list[Run]:
        """Neighbouring sequences of equal length, merged. Empty ones are skipped. Sorted lengths make few."""
        if "runs" not in self._cache:
            runs: list[Run] = []
            for seq, (start, length) in enumerate(zip(self._starts.tolist(), self.lengths, strict=False)):
                if runs and runs[-1].length == length and runs[-1].seqs.stop == seq:
                    runs[-1] = runs[-1]._replace(num_seqs=runs[-1].num_seqs + 1)
                elif length:
                    runs.append(Run(seq, 1, length, start))
            self._cache["runs"] = runs
        return self._cache["runs"]

    def by_length(self) -> Order | None:
        """The sequences sorted by length, or None where sorting would save less than MIN_RUNS_SAVED runs."""
        if len(self.runs()) - len(set(self.lengths) - {0}) < MIN_RUNS_SAVED:
            return None
        if "order" not in self._cache:
            self._cache["order"] = self._order()
        return self._cache["order"]

    def _order(self) -> Order:
        seqs = np.argsort(self.lengths, kind="stable")
        lengths = np.asarray(self.lengths, dtype=np.int64)[seqs]
        first_places = np.cumsum(lengths) - lengths
        rows = np.arange(self.num_tokens) + np.repeat(self._starts[seqs] - first_places, lengths)
        return Order(SeqLayout(lengths, self.device), *map(self._to_device, (rows, np.argsort(rows))))

    def _tiles(self, block: int) -> np.ndarray:
        lengths = np.asarray(self.lengths, dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")
        per_seq = -(-lengths[order] // block)
        first_tile = np.repeat(np.cumsum(per_seq) - per_seq, per_seq)
        return np.stack([np.repeat(order, per_seq), (np.arange(per_seq.sum()) - first_tile) * block], axis=1)

    def _split_seqs(self, block: int) -> np.ndarray:
        tiles = self._tiles(block)
        # a second tile starts at `block`, right after the first
        second = np.flatnonzero(tiles[:, 1] == block)
        return np.stack([tiles[second, 0], second - 1], axis=1)

    def _once(self, key, make) -> torch.Tensor:
        if key not in self._cache:
            self._cache[key] = self._to_device(make())
        return self._cache[key]

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)), self.device)


def layout_of(host_lengths: torch.Tensor, device: torch.device) -> SeqLayout:
    """The layout of these lengths. The last few batches get the same object, so that lists are made once.

    Raises:
        ValueError: they are not [B] int32 on the CPU, or one is negative.
    """
    if host_lengths.ndim != 1 or host_lengths.dtype != torch.int32 or not host_lengths.is_cpu:
        raise ValueError(
            f"host_lengths must be [B] torch.int32 on the CPU, got {tuple(host_lengths.shape)} "
            f"{host_lengths.dtype} on {host_lengths.device}"
        )
    return _layout_of(host_lengths.numpy().tobytes(), device)


@functools.lru_cache(maxsize=16)
def _layout_of(lengths: bytes, device: torch.device) -> SeqLayout:
    return SeqLayout(np.frombuffer(lengths, dtype=np.int32), device)


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device, without waiting for the device."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
