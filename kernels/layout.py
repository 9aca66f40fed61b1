"""Where the sequences of a packed batch lie.

In a packed batch the tokens of all sequences stand one after another in one
[T, ...] tensor, with no padding. The lengths are known on the host, where the
texts were tokenised. So every list that a kernel or a CPU path needs is made
there, once per batch, and all layers read it. No kernel ever asks the device.
One copy out of pinned memory takes all of a batch to the device. The lists that
launches have asked for in a like batch go with it.

A registered operation (torch.library) takes tensors only. There the layout
travels as its `host_lengths`, and `layout_of` finds the lists again.

Dimensions: B sequences, T packed tokens.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from nvembed_fast.kernels.streams import Kept

__all__ = [
    "BY_HOST_LISTS",
    "Order",
    "Run",
    "SeqLayout",
    "layout_of",
    "pinned",
    "to_device",
    "to_device_together",
]

# tags of an operation that takes host_lengths: a CUDA graph would keep the lists of its first batch
BY_HOST_LISTS = (torch.Tag.cudagraph_unsafe,)

# the lists that launches asked for, by the device and the longest sequence's power of two
_asked: dict[tuple[torch.device, int], tuple[tuple[str, int], ...]] = {}

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
    """Lengths on the host, cu_seqlens on the device, and lists made from them.

    Like a tensor it belongs to the stream that is current when it is made, and another stream waits for that
    one first. Lists that are made later may be read on any stream.

    Attributes:
        lengths: tokens per sequence, in packed order. Zero is allowed.
        host_lengths: [B] int32 on the CPU: the same.
        cu_seqlens: [B + 1] int32 on `device`. Sequence b owns rows cu_seqlens[b] to cu_seqlens[b + 1].
        positions: [T] int32 on `device`: the place of each token in its own sequence.
        arrays: the ones given, on `device`.
        num_tokens: T.
        max_length: the longest sequence, 0 for none.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        device: torch.device | str = "cpu",
        arrays: Sequence[np.ndarray] = (),
    ):
        """
        Args:
            lengths: tokens per sequence, in packed order.
            device: of the lists.
            arrays: what else of the batch goes to the device, by the same copy.
        """
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
        first_rows = np.repeat(self._starts[:-1], self.lengths)
        self._like = self.device, self.max_length.bit_length()
        asked = _asked.get(self._like, ())
        lists = [self._starts, np.arange(self.num_tokens) - first_rows, *map(self._make, asked)]
        tensors = [*map(torch.from_numpy, arrays), *map(_as_int32, lists)]
        sent = to_device_together(tensors, self.device)
        self.arrays, (self.cu_seqlens, self.positions, *made) = sent[: len(arrays)], sent[len(arrays) :]
        self.kept = Kept(self.cu_seqlens)  # all of them share its memory
        self._cache: dict = {key: (self.kept, values) for key, values in zip(asked, made, strict=True)}

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"SeqLayout({len(self)} sequences, {self.num_tokens} tokens, {self.device})"

    def tiles(self, block: int) -> torch.Tensor:
        """[num_tiles, 2] int32: (sequence, first token inside it) of every chunk of at most `block` tokens.

        The longest sequences stand first, so that no long one starts last. Empty sequences have no tile.
        """
        return self._once(("tiles", block))

    def tile_blocks(self) -> tuple[int, ...]:
        """The values of `block` for which `tiles` has a list: this or a like batch was asked for it."""
        return tuple(key[1] for key in self._cache if key[0] == "tiles")

    def split_seqs(self, block: int) -> torch.Tensor:
        """[num_split, 2] int32: (sequence, its first row in `tiles(block)`) of those with more than one tile.

        They are the longest, so their tiles open that list. The tiles of one sequence follow one another.
        """
        return self._once(("split_seqs", block))

    def runs(self) -> list[Run]:
        """Neighbouring sequences of equal length, merged. Empty ones are skipped. Sorted lengths make few."""
        if "runs" not in self._cache:
            runs: list[Run] = []
            for seq, (start, length) in enumerate(zip(self._starts.tolist(), self.lengths, strict=False)):
                if runs and runs[-1].length == length and runs[-1].seqs.stop == seq:
                    first_seq, num_seqs, _, first_row = runs[-1]
                    # no _replace: torch.compile of torch 2.11 cannot follow it
                    runs[-1] = Run(first_seq, num_seqs + 1, length, first_row)
                elif length:
                    runs.append(Run(seq, 1, length, start))
            self._cache["runs"] = runs
        return self._cache["runs"]

    def has_runs(self) -> bool:
        """Whether `runs` was asked for: an operation went by the host's lists."""
        return "runs" in self._cache

    def by_length(self) -> Order | None:
        """The sequences sorted by length, or None where sorting would save less than MIN_RUNS_SAVED runs."""
        if len(self.runs()) - len(set(self.lengths) - {0}) < MIN_RUNS_SAVED:
            return None
        if "order" not in self._cache:
            # autograd saves its tensors, also those that inference has made first
            with torch.inference_mode(False):
                self._cache["order"] = self._order()
        order = self._cache["order"]
        order.layout.kept.here()
        return order

    def _order(self) -> Order:
        seqs = np.argsort(self.lengths, kind="stable")
        lengths = np.asarray(self.lengths, dtype=np.int64)[seqs]
        first_places = np.cumsum(lengths) - lengths
        rows = np.arange(self.num_tokens) + np.repeat(self._starts[seqs] - first_places, lengths)
        layout = SeqLayout(lengths, self.device, [a.astype(np.int32) for a in (rows, np.argsort(rows))])
        return Order(layout, *layout.arrays)

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

    def _make(self, key: tuple[str, int]) -> np.ndarray:
        name, block = key
        return self._tiles(block) if name == "tiles" else self._split_seqs(block)

    def _once(self, key: tuple[str, int]) -> torch.Tensor:
        if key not in self._cache:
            values = to_device(_as_int32(self._make(key)), self.device)
            self._cache[key] = Kept(values), values
            _asked[self._like] = tuple(dict.fromkeys((*_asked.get(self._like, ()), key)))
        kept, values = self._cache[key]
        kept.here()
        return values


def _as_int32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))


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
    layout = _layout_of(host_lengths.numpy().tobytes(), device)
    layout.kept.here()
    return layout


@functools.lru_cache(maxsize=16)
def _layout_of(lengths: bytes, device: torch.device) -> SeqLayout:
    # it is kept, and tensors of inference mode could not be saved for a backward
    with torch.inference_mode(False):
        return SeqLayout(np.frombuffer(lengths, dtype=np.int32), device)


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device, without waiting for a GPU."""
    return pinned(host, device).to(device, non_blocking=copies_late(device))


def copies_late(device: torch.device) -> bool:
    """Whether a copy to the device need not be waited for.

    Apple's devices would read the host later, from memory that is free by then (pytorch issue 189690).
    """
    return device.type != "mps"


def pinned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor as a GPU copies it without a wait.

    It may be let go right after the copy was asked for. PyTorch gives its memory to nobody before an event
    behind that copy.
    """
    return host.pin_memory() if device.type == "cuda" else host


def to_device_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Contiguous host tensors on the device by one copy, without waiting for the device.

    They share memory there. Each begins at a multiple of 16 bytes, for which kernels are compiled anyhow.
    """
    sizes = [-(-t.nbytes // 16) * 16 for t in tensors]
    host = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
    for t, part in zip(tensors, _parts(host, tensors, sizes), strict=True):
        part.copy_(t)
    return _parts(to_device(host, device), tensors, sizes)


def _parts(buffer: torch.Tensor, tensors: Sequence[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
    parts = zip(buffer.split_with_sizes(sizes), tensors, strict=True)
    return [part[: t.nbytes].view(t.dtype).view(t.shape) for part, t in parts]
