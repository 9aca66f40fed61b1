"""Which rows a step takes: a pure function of (seed, step, rows taken per data set).

1. Philox, keyed by the seed and the step, draws the data set of each slot of the batch by weight.
2. A data set delivers its rows in the order of a permutation, keyed by the seed, its name and the epoch. So
   its state is one integer: the number of rows that it has delivered.
3. The permutation is a Feistel network over the smallest power of four that holds all rows. A number beyond
   the last row is permuted again, until it is a row. Each row of a step costs microseconds and no memory,
   however large the data set.

The invariant: an epoch of a data set delivers every row exactly once, also across resumes and on any number
of ranks. Only raw bits of the generators are used, because NumPy may change what it makes of them.
"""

import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Mapping

import numpy as np

__all__ = ["Draws", "Mix", "permuted", "seed_of"]

_ROUNDS = 6


def seed_of(*parts: object) -> int:
    """An integer of 63 bits that names these numbers and strings, the same on every machine."""
    return int.from_bytes(_digest(parts, 8), "little") >> 1


class Draws:
    """Random numbers that a seed and names determine. Philox, counted from 0."""

    def __init__(self, *parts: object):
        self._bits = np.random.Philox(key=int.from_bytes(_digest(parts, 16), "little"))

    def uniform(self, count: int) -> list[float]:
        """Numbers in [0, 1)."""
        return ((self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53).tolist()

    def below(self, bound: int) -> int:
        """An integer from 0 to bound - 1."""
        return int(self._bits.random_raw()) * bound >> 64

    def sample(self, size: int, count: int) -> list[int]:
        """`count` different integers from 0 to size - 1 in random order, or all if there are fewer."""
        moved: dict[int, int] = {}
        drawn = []
        for place in range(min(size, count)):
            other = place + self.below(size - place)
            drawn.append(moved.get(other, other))
            moved[other] = moved.get(place, place)
        return drawn


def permuted(index: int, size: int, key: bytes) -> int:
    """Where a permutation of `size` numbers takes `index`. Constant memory, and no two indices meet."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            word = hashlib.blake2b(b"%d %d" % (turn, right), key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(word, "little") & mask)
        index = left << half | right
        if index < size:
            return index


class Mix:
    """Draws the rows of each step from several data sets.

    Args:
        sizes: rows of each data set, by its name.
        weights: the expected share of each in a batch, relative to the others.
        batch: rows of a step, over all ranks.
        seed: of the whole run.
        is_one_set: all rows of a step come from one data set.

    Raises:
        ValueError: a data set is smaller than a batch, or a weight is not positive.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float],
        *,
        batch: int,
        seed: int,
        is_one_set: bool = False,
    ):
        if not sizes or batch < 1:
            raise ValueError(f"there must be a data set and a row a step, got {len(sizes)} and {batch}")
        for name, size in sizes.items():
            if size < batch:
                raise ValueError(
                    f"{name} has {size} rows, fewer than a batch of {batch}: lower the batch or add rows"
                )
            if not 0 < weights[name] < float("inf"):
                raise ValueError(f"the weight of {name} must be a positive number, got {weights[name]}")
        self.sizes, self.batch, self.seed, self.is_one_set = dict(sizes), batch, seed, is_one_set
        self._names = list(sizes)
        *inner, total = itertools.accumulate(weights[name] for name in self._names)
        self._bounds = [bound / total for bound in inner]

    def start(self) -> dict[str, int]:
        """The counters before the first step."""
        return dict.fromkeys(self._names, 0)

    def draw(self, step: int, counters: Mapping[str, int]) -> tuple[list[tuple[str, int]], dict[str, int]]:
        """The rows of a step.

        Args:
            step: its number.
            counters: how many rows each data set has delivered in the steps before.

        Returns:
            [batch] pairs of a data set and a row's index, and the counters behind this step.

        Raises:
            ValueError: the counters are of other data sets.
        """
        if set(counters) != set(self._names):
            raise ValueError(
                f"the rows taken so far are those of {', '.join(sorted(counters)) or 'nothing'}, and the "
                f"data sets are {', '.join(sorted(self._names))}: a run goes on with those it began with"
            )
        after, rows = dict(counters), []
        for value in Draws(self.seed, "mix", step).uniform(1 if self.is_one_set else self.batch):
            name = self._names[bisect_right(self._bounds, value)]
            for _ in range(self.batch if self.is_one_set else 1):
                epoch, place = divmod(after[name], self.sizes[name])
                after[name] += 1
                rows.append((name, permuted(place, self.sizes[name], _digest((self.seed, name, epoch), 16))))
        return rows, after


def _digest(parts: tuple[object, ...], size: int) -> bytes:
    assert all(isinstance(part, int | str) for part in parts), parts
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=size).digest()
