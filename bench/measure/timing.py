"""How long functions take on the device, side by side.

1. Functions take turns, sample by sample, so that a clock that drifts drifts for all of them.
2. On a GPU a sample lies between two device events. In front of it a buffer larger than the L2 cache is
   written, often enough to keep the device busy until the host has launched the whole call. So neither a warm
   cache nor the host is timed.
3. A call of less than 50 microseconds is too short for events. It and all functions beside it are captured in
   CUDA graphs, many calls in each, and a sample is a replay divided by their number. Such functions should
   take their inputs in turn from copies that do not fit the L2 cache together.
4. On a CPU a sample is wall time.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nvembed_fast.graphs import captured

GRAPH_BELOW_MS = 0.05
GRAPH_MS = 2.0  # a graph holds about as many calls
FLUSH_BYTES = 256 * 2**20
L2_BYTES = 100 * 2**20  # as large as the largest
# a call that takes the host longer than this waits for the device itself
MAX_HOST_MS = 20.0


@dataclass(frozen=True)
class Times:
    """Milliseconds of every sample."""

    ms: tuple[float, ...]

    def percentile(self, percent: int) -> float:
        if len(self.ms) == 1:
            return self.ms[0]
        return statistics.quantiles(self.ms, n=100, method="inclusive")[percent - 1]

    @property
    def median(self) -> float:
        return self.percentile(50)


def interleaved(
    functions: dict[str, Callable], seconds: float, min_rounds: int = 5, max_rounds: int = 1000
) -> dict[str, Times]:
    """The times of functions that take turns.

    Every function must have run before, because compilation is not to be timed.

    Args:
        functions: name -> call without arguments.
        seconds: of device time for each. The samples of a faster one lie evenly among those of a slower.
        min_rounds, max_rounds: bounds of the number of samples of each.
    """
    samplers = {name: make_sampler(fn) for name, fn in functions.items()}
    if min(sampler.estimate_ms for sampler in samplers.values()) < GRAPH_BELOW_MS:
        # all of them, or some would be timed with a cold cache and others with a warm one
        for sampler in samplers.values():
            sampler.capture()
    counts = {
        name: min(max(math.ceil(1e3 * seconds / max(sampler.sample_ms, 1e-3)), min_rounds), max_rounds)
        for name, sampler in samplers.items()
    }
    rounds = max(counts.values())
    taken: dict[str, list] = {name: [] for name in functions}
    names = list(functions)
    for i in range(rounds):
        # each comes after each of the others
        first = i % len(names)
        for name in names[first:] + names[:first]:
            if (i + 1) * counts[name] // rounds > i * counts[name] // rounds:
                taken[name].append(samplers[name].sample())
    return {name: Times(tuple(map(samplers[name].read, taken[name]))) for name in names}


def sustained(fn: Callable, seconds: float) -> float:
    """Milliseconds per call of `fn`, called without a pause: the first half of `seconds` warms up."""
    sampler = make_sampler(fn, flush=False)
    if sampler.estimate_ms < GRAPH_BELOW_MS:
        sampler.capture()
    count = max(math.ceil(500 * seconds / max(sampler.sample_ms, 1e-3)), 1)
    for _ in range(count):
        sampler.sample()
    first, *_, last = [sampler.sample() for _ in range(count + 1)]
    return sampler.between(first, last) / (count * sampler.calls)


def wall_clock() -> float:
    """Seconds, once the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(fn: Callable) -> float | None:
    """MiB that a call of `fn` takes on the GPU beyond the memory allocated before, or None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


class _CPUSampler:
    calls = 1  # in a sample

    def __init__(self, fn: Callable):
        self._fn = fn
        self.estimate_ms = self.sample_ms = self.read(self.sample())

    def capture(self) -> None:
        pass

    def sample(self) -> tuple[float, float]:
        start = time.perf_counter()
        self._fn()
        return start, time.perf_counter()

    def read(self, taken: tuple[float, float]) -> float:
        return 1e3 * (taken[1] - taken[0])

    def between(self, first: tuple[float, float], last: tuple[float, float]) -> float:
        """Milliseconds from the end of one sample to the end of another."""
        return 1e3 * (last[1] - first[1])


class _GPUSampler:
    calls = 1

    def __init__(self, fn: Callable, flush: bool):
        self._fn = self._run = fn
        self._flushes = int(flush)
        fn()
        torch.cuda.synchronize()
        started = time.perf_counter()
        taken = self.sample()
        host_ms = 1e3 * (time.perf_counter() - started)
        self.estimate_ms = self.read(taken)
        if flush:
            self._flushes = 1 + math.ceil(min(host_ms, MAX_HOST_MS) / _flush_ms())
            self.estimate_ms = self.read(self.sample())

    @property
    def sample_ms(self) -> float:
        return self.calls * self.estimate_ms

    def capture(self) -> None:
        """Take samples by replays of a CUDA graph, if the function can be captured."""
        calls = math.ceil(GRAPH_MS / max(self.estimate_ms, 1e-3))
        try:
            self._run, self.calls = _captured(self._fn, calls), calls
        except RuntimeError:
            # a call that waits for the device cannot be captured: its samples are single calls
            torch.cuda.synchronize()

    def sample(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self._flushes):
            _flush_buffer().zero_()
        start.record()
        self._run()
        end.record()
        return start, end

    def read(self, taken: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        taken[1].synchronize()
        return taken[0].elapsed_time(taken[1]) / self.calls

    def between(self, first: tuple, last: tuple) -> float:
        """Milliseconds from the end of one sample to the end of another."""
        last[1].synchronize()
        return first[1].elapsed_time(last[1])


def make_sampler(fn: Callable, flush: bool = True) -> Any:
    """A `_GPUSampler` or a `_CPUSampler`."""
    return _GPUSampler(fn, flush) if torch.cuda.is_available() else _CPUSampler(fn)


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


@functools.cache
def _flush_ms() -> float:
    return sustained(_flush_buffer().zero_, 0.05)


def _captured(fn: Callable, calls: int) -> Callable:
    """The replay of a CUDA graph of so many calls."""
    # a call that waits for the device is found before a capture, which it would leave broken
    torch.cuda.set_sync_debug_mode("error")
    try:
        fn()
    finally:
        torch.cuda.set_sync_debug_mode("default")

    def run() -> None:
        # results that were kept would each take another place in memory
        for _ in range(calls):
            fn()

    return captured(run)
