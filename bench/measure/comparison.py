"""One bench: this project and its baselines on the same inputs, parity first, then time.

1. Parity against float64. Ours has to meet `assert_parity`, or the bench fails. A baseline whose error is far
   beyond the rounding of its dtype computes something else. It is skipped, and its error is the reason. A
   baseline that cannot run here is skipped with the reason.
2. Time of all the others, interleaved (`bench.measure.timing`).
3. Figures: times, the rate and its share of the limit measured in the same run, peak memory, parity error.
   "forward+backward" also has "backward": the time beyond a forward that keeps nothing.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from bench.measure.limits import Limits
from bench.measure.results import OURS, SKIPPED, TIMES, Figure
from bench.measure.timing import L2_BYTES, interleaved, peak_memory
from nvembed_fast.kernels.testing import Tensors, as_tuple, assert_parity, gradients, honest, upstream_of

# a baseline's RMS error, in eps of its dtype times the RMS of the exact result
BASELINE_EPS = 8.0
FORWARD = " forward"


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to the result.

    Attributes:
        name: the impl of a figure.
        fn: of the arranged tensors alone, to one output or a tuple.
        arrange: from the experiment's tensors to those that `fn` takes (padded, split, repeated). Not timed.
        restore: from the outputs of `fn` to those of the reference. Not timed.
        obstacle: why it cannot run here, such as "needs a GPU", or empty.
    """

    name: str
    fn: Callable | None
    arrange: Callable[..., tuple[torch.Tensor, ...]] | None = None
    restore: Callable | None = None
    obstacle: str = ""

    def arranged(self, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        return tuple(tensors) if self.arrange is None else self.arrange(*tensors)

    def __call__(self, *tensors: torch.Tensor):
        """From the experiment's tensors to the reference's outputs, arrangement included."""
        outputs = self.fn(*self.arranged(tensors))
        return outputs if self.restore is None else self.restore(outputs)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Inputs, and all implementations that turn them into outputs.

    Attributes:
        tensors: those with a gradient.
        ours, reference: of the tensors alone. The reference also runs in float64.
        baselines: in the order of the table.
        low: gradients with an honest kernel's roundings, as in `assert_gradient_parity`, or None.
    """

    tensors: Tensors
    ours: Callable
    reference: Callable
    baselines: Sequence[Implementation] = ()
    low: Callable | None = None


@dataclasses.dataclass(frozen=True)
class Work:
    """The minimum that a call does: `amount` operations ("TFLOP/s") or bytes ("GB/s")."""

    amount: int
    unit: str

    def rate(self, ms: float) -> float:
        return self.amount / ms * (1e-9 if self.unit == "TFLOP/s" else 1e-6)

    def limit(self, limits: Limits, dtype: torch.dtype) -> float:
        return limits.matrix_rate(dtype) if self.unit == "TFLOP/s" else limits.copy_rate()


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The implementations that passed the parity check and have run once.

    Attributes:
        calls: name -> the call that is timed, ours first.
        skipped: name -> the reason.
    """

    calls: dict[str, Callable[[], object]]
    skipped: dict[str, str]


@dataclasses.dataclass(frozen=True)
class PreparedKernels(Prepared):
    """The same, and the facts that the figures need beside the times.

    Attributes:
        experiment: of the calls.
        forwards: with backward, name -> its forward alone.
        errors: name -> the parity error.
        peaks: name -> the peak memory of a call in MiB, or None on a CPU.
    """

    experiment: Experiment
    forwards: dict[str, Callable[[], object]]
    errors: dict[str, float]
    peaks: dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class KernelBench:
    """One case of a suite.

    Attributes:
        suite, shape: `case`, the case of its figures, is the shape and the direction.
        experiment: makes what is timed. Nothing is made for a bench that does not run.
        work: of one call.
        backward: time the call and the gradients of all its tensors.
        part: makes a smaller experiment with the same baselines, where float64 would not fit in memory.
    """

    suite: str
    shape: str
    experiment: Callable[[], Experiment]
    work: Work
    backward: bool = False
    part: Callable[[], Experiment] | None = None

    @property
    def case(self) -> str:
        return f"{self.shape} {'forward+backward' if self.backward else 'forward'}"

    def prepare(self, only_ours: bool = False) -> PreparedKernels:
        """Parity, then one call of each implementation that is right.

        Args:
            only_ours: skip the baselines.

        Raises:
            AssertionError: ours fails `assert_parity`.
        """
        # a function that was compiled for too many cases would silently run uncompiled
        torch._dynamo.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        experiment = self.experiment()
        part = self.part() if self.part else experiment
        if only_ours:
            experiment, part = (dataclasses.replace(e, baselines=()) for e in (experiment, part))
        errors, skipped = _parity(self.case, part, self.backward)
        calls: dict[str, Callable[[], object]] = {}
        forwards: dict[str, Callable[[], object]] = {}
        peaks: dict[str, float | None] = {}
        for implementation in (Implementation(OURS, experiment.ours), *experiment.baselines):
            name = implementation.name
            if name in skipped:
                continue
            with skipped_if_it_fails(name, skipped):
                call, forward = _calls(implementation, experiment.tensors, self.backward)
                call()
                if forward is not None:
                    forward()
                peaks[name] = peak_memory(call)
                calls[name] = call
                if forward is not None:
                    forwards[name] = forward
        return PreparedKernels(calls, skipped, experiment, forwards, errors, peaks)

    def measure(self, limits: Limits, seconds: float, rounds: int | None = None) -> list[Figure]:
        """The figures of one comparison.

        Args:
            limits: measured in this run.
            seconds: of device time for the slowest.
            rounds: exactly so many samples each. None: as many as `seconds` give.

        Raises:
            AssertionError: ours fails `assert_parity`.
        """
        ready = self.prepare()
        bounds = {"min_rounds": rounds, "max_rounds": rounds} if rounds else {}
        functions = {}
        for name, call in ready.calls.items():
            functions[name] = call
            if self.backward:
                functions[f"{name}{FORWARD}"] = ready.forwards[name]
        times = interleaved(functions, seconds, **bounds)
        # the backward takes the time that it adds
        forward = {name: times.pop(f"{name}{FORWARD}").median for name in ready.forwards}

        experiment, work = ready.experiment, self.work
        limit = work.limit(limits, experiment.tensors[0].dtype)
        figures = []
        for name, taken in times.items():
            figure = functools.partial(Figure, self.suite, self.case, name)
            figures += [figure(metric, taken.percentile(int(metric[-2:])), "ms") for metric in TIMES]
            rate = work.rate(taken.median)
            figures.append(figure("rate", rate, work.unit, rate / limit))
            if self.backward:
                figures.append(figure("backward", taken.median - forward[name], "ms"))
            figures.append(figure("parity_error", ready.errors[name], "relative RMS"))
            if ready.peaks[name] is not None:
                figures.append(figure("peak_memory", ready.peaks[name], "MiB"))
        figure = functools.partial(Figure, self.suite, self.case)
        figures.append(figure(OURS, "limit", limit, work.unit))
        if work.unit == "TFLOP/s":
            intensity = work.amount / _min_bytes(experiment, self.backward)
            figures.append(figure(OURS, "intensity", intensity, "FLOP/byte"))
        return figures + [figure(name, SKIPPED, None, reason) for name, reason in ready.skipped.items()]


def _min_bytes(experiment: Experiment, backward: bool) -> int:
    """Of inputs and outputs, and with backward also of the gradients of both."""
    with torch.no_grad():
        outputs = as_tuple(experiment.ours(*experiment.tensors))
    once = sum(t.nbytes for t in (*experiment.tensors, *outputs))
    return 2 * once if backward else once


def _parity(case: str, experiment: Experiment, backward: bool) -> tuple[dict[str, float], dict[str, str]]:
    """(name -> error of all that are right, name -> reason of all that are skipped)."""
    upstream: Tensors = ()
    if backward:
        with torch.no_grad():
            upstream = upstream_of(as_tuple(experiment.reference(*experiment.tensors)))
    wide = [t.double() for t in experiment.tensors]
    high = _results(experiment.reference, wide, upstream, backward)
    if backward and experiment.low is not None:
        low = experiment.low(experiment.tensors, upstream)
    else:
        low = honest(lambda *ts: _results(experiment.reference, ts, upstream, backward), experiment.tensors)
    ours = _results(experiment.ours, experiment.tensors, upstream, backward)
    for got, lo, hi in zip(ours, low, high, strict=True):
        assert_parity(case, got, lo, hi)
    errors, skipped = {OURS: _error(ours, high)}, {}
    bound = BASELINE_EPS * torch.finfo(experiment.tensors[0].dtype).eps
    for baseline in experiment.baselines:
        if baseline.obstacle:
            skipped[baseline.name] = baseline.obstacle
            continue
        with skipped_if_it_fails(baseline.name, skipped):
            error = _error(_results(baseline, experiment.tensors, upstream, backward), high)
            if error <= bound:
                errors[baseline.name] = error
            else:
                skipped[baseline.name] = f"parity is red: error {error:.1e} > {bound:.1e}"
    return errors, skipped


@contextlib.contextmanager
def skipped_if_it_fails(name: str, skipped: dict[str, str]) -> Iterator[None]:
    """A baseline that raises inside is skipped, with the reason. An error of ours is raised.

    A baseline is the code of others on any machine, so it may raise anything.
    """
    try:
        yield
    except Exception as error:
        if name == OURS:
            raise
        first_line = next(iter(str(error).strip().splitlines()), "")
        has_no_memory = isinstance(error, torch.OutOfMemoryError)
        reason = f"cannot run: {first_line[:120] or type(error).__name__}"
        skipped[name] = "out of memory" if has_no_memory else reason


def _results(fn: Callable, tensors: Tensors, upstream: Tensors, backward: bool) -> tuple[torch.Tensor, ...]:
    """The outputs, or the gradients of all tensors."""
    if backward:
        return tuple(gradients(fn, tensors, upstream)[1])
    with torch.no_grad():
        # a copy with the same strides: some work in place
        return as_tuple(fn(*copy.deepcopy(tensors)))


def _error(got: Tensors, high: Tensors) -> float:
    """The largest relative RMS error among them. It is infinite where a result is not finite."""
    errors = [
        ((g.double() - h).square().mean() / h.square().mean()).sqrt().item()
        for g, h in zip(got, high, strict=True)
    ]
    return max((e if e == e else float("inf") for e in errors), default=0.0)


def _calls(
    implementation: Implementation, tensors: Tensors, backward: bool
) -> tuple[Callable[[], None], Callable[[], None] | None]:
    """(the call that is timed, with backward also its forward alone).

    They take their inputs in turn from copies that do not fit the L2 cache together.
    """
    arranged = [t.detach() for t in implementation.arranged(tensors)]
    size = sum(t.nbytes for t in arranged)
    copies = 1 if arranged[0].device.type == "cpu" else min(1 + 4 * L2_BYTES // max(size, 1), 64)
    inputs = [arranged, *(copy.deepcopy(arranged) for _ in range(copies - 1))]
    turns = itertools.cycle(inputs)

    def forward():
        with torch.no_grad():
            implementation.fn(*next(turns))

    if not backward:
        return forward, None
    for leaf in itertools.chain(*inputs):
        leaf.requires_grad_()
    with torch.no_grad():
        upstream = upstream_of(as_tuple(implementation.fn(*arranged)))

    def forward_and_backward():
        leaves = next(turns)
        torch.autograd.grad(as_tuple(implementation.fn(*leaves)), leaves, upstream)

    return forward_and_backward, forward
