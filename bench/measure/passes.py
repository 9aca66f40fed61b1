"""Whole passes over a workload: warm-up, the best batch size, and turns on the wall clock."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from bench.measure.timing import peak_memory, wall_clock
from bench.workloads import Scale, Workload

# on one workload; after that an encoder sits out
ENOUGH_SECONDS = 15.0


def warm_up(encode: Callable[[list[str], int], object], texts: list[str]) -> None:
    """Run all that is compiled anew: one text, equal lengths and, where there are any, unequal ones."""
    first = texts[0]
    encode([first], 1)
    encode([first, first], 2)
    encode([first, max(texts, key=len), min(texts, key=len)], 3)


def search_runs(workload: Workload, texts: list[str], scale: Scale, by_length: bool) -> list[list[str]]:
    """Texts of a workload on which the best batch size is that of all of it.

    Texts of one length: the first ones. Of unequal lengths a quarter as many, because short batches are as
    full as they get there. For an encoder that sorts they are neighbours from four places of the order: a few
    texts sorted alone would be far more ragged than the whole.
    """
    count = scale.search_texts
    if len(set(workload.lengths)) > 1:
        count //= 4
        if by_length and len(texts) > count:
            ranked = sorted(range(len(texts)), key=workload.lengths.__getitem__)
            firsts = [len(texts) * eighth // 8 - count // 2 for eighth in (1, 3, 5, 7)]
            return [[texts[index] for index in ranked[first : first + count]] for first in firsts]
    seen = itertools.accumulate(workload.lengths[:count])
    return [texts[: max(sum(tokens <= scale.search_tokens for tokens in seen), 1)]]


def fitting_batch_sizes(
    encode: Callable[[list[str], int], object],
    runs: Sequence[list[str]],
    sizes: Sequence[int],
    clock: Callable[[], float] = wall_clock,
) -> list[int]:
    """The batch sizes that fit in memory, the fastest first.

    Args:
        encode: of texts, in batches of a size.
        runs: texts on which it is timed, run by run.
        sizes: to try. Those beyond the number of texts are the same.
        clock: in seconds. It waits for the device.
    """
    seconds = {}
    for size in sorted({min(size, len(runs[-1])) for size in sizes}):
        try:
            encode(runs[-1][:size], size)  # to have the memory
            start = clock()
            for run in runs:
                encode(run, size)
            seconds[size] = clock() - start
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return sorted(seconds, key=seconds.get)


@dataclass
class Entry:
    """An encoder on one workload.

    Attributes:
        encode: of a batch size: the whole workload, end to end.
        sizes: batch sizes that are left, the fastest first. None is left when none fits in memory.
        seconds: of every pass so far.
        peak: MiB that the first pass took beside the weights, or None on a CPU.
    """

    encode: Callable[[int], object]
    sizes: list[int]
    seconds: list[float] = field(default_factory=list)
    peak: float | None = None
    clock: Callable[[], float] = wall_clock

    def take_turn(self) -> None:
        """A pass, unless earlier ones took ENOUGH_SECONDS. Out of memory, the next best size takes over."""
        while self.sizes and sum(self.seconds) < ENOUGH_SECONDS:
            try:
                return self.run()
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                del self.sizes[0]
                self.seconds.clear()

    def run(self) -> None:
        """A pass at the best size."""
        if self.seconds or not torch.cuda.is_available():
            self._pass()
        else:
            self.peak = peak_memory(self._pass)

    def _pass(self) -> None:
        start = self.clock()
        self.encode(self.sizes[0])
        self.seconds.append(self.clock() - start)
