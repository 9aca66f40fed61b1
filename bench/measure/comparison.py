"""One comparison: this project and its rivals on the same inputs, parity first, then time.

1. Parity against float64. Ours has to meet `assert_parity`, or the bench fails. A rival whose error is far
   beyond what its dtype costs computes something else: it is left out, with its error. So is one that cannot
   run here, with the reason.
2. Time of all that are left, interleaved (`bench.measure.timing`).
3. Rows: times, the rate and its share of the limit measured in the same run, peak memory, parity error; of
   "forward+backward" also "backward", what it takes beyond a forward that keeps nothing.
"""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch

from bench.measure.limits import Limits
from bench.measure.results import LEFT_OUT, OURS, TIMES, Row
from bench.measure.timing import L2_BYTES, Times, interleaved, peak_memory
from nvembed_fast.kernels.testing import Tensors, as_tuple, assert_parity, gradients, upstream_of

# a rival's RMS error, in eps of its dtype times the RMS of what is wanted
RIVAL_EPS = 8.0
FORWARD = " forward"


@dataclasses.dataclass(frozen=True)
class Rival:
    """Somebody else's way to the same result.

    Attributes:
        name: what stands in the results.
        fn: of the arranged tensors alone; one output or a tuple.
        arrange: from the problem's tensors to those that `fn` takes (padded, split, repeated); not timed.
        restore: from the outputs of `fn` to those of the reference; not timed.
        obstacle: why it cannot run here, such as "needs a GPU"; empty if it can.
    """

    name: str
    fn: Callable | None
    arrange: Callable[..., tuple[torch.Tensor, ...]] | None = None
    restore: Callable | None = None
    obstacle: str = ""

    def arranged(self, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        return tuple(tensors) if self.arrange is None else self.arrange(*tensors)

    def __call__(self, *tensors: torch.Tensor):
        """From the problem's tensors to the reference's outputs, arrangement included."""
        outputs = self.fn(*self.arranged(tensors))
        return outputs if self.restore is None else self.restore(outputs)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs, and everyone who can turn them into outputs.

    Attributes:
        tensors: those with a gradient.
        ours, reference: of the tensors alone. The reference also runs in float64.
        rivals: in the order of the table.
        low: gradients with an honest kernel's roundings, as in `assert_gradient_parity`; or None.
    """

    tensors: Tensors
    ours: Callable
    reference: Callable
    rivals: Sequence[Rival] = ()
    low: Callable | None = None


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call does at least: `amount` operations ("TFLOP/s") or bytes ("GB/s")."""

    amount: int
    unit: str

    def rate(self, ms: float) -> float:
        return self.amount / ms * (1e-9 if self.unit == "TFLOP/s" else 1e-6)

    def limit(self, limits: Limits, dtype: torch.dtype) -> float:
        return limits.matrix_rate(dtype) if self.unit == "TFLOP/s" else limits.copy_rate()


def compare(
    suite: str,
    case: str,
    problem: Problem,
    work: Work,
    backward: bool,
    limits: Limits,
    seconds: float,
    rounds: int | None = None,
    part: Problem | None = None,
) -> tuple[list[Row], Times]:
    """The rows of one comparison, and the times of ours.

    Args:
        suite, case: as in `results.Row`.
        problem: what is timed.
        work: of one call.
        backward: time the call and the gradients of all its tensors.
        limits: measured in this run.
        seconds: of device time for the slowest.
        rounds: exactly so many samples each; None: as many as `seconds` give.
        part: a smaller problem of the same kind and rivals, where float64 would not fit in memory.

    Raises:
        AssertionError: ours fails `assert_parity`.
    """
    part = part or problem
    errors, left_out = _parity(case, part, backward)
    functions, peaks = {}, {}
    for rival in (Rival(OURS, problem.ours), *problem.rivals):
        if rival.name in left_out:
            continue
        try:
            calls = _calls(rival, problem.tensors, backward)
            for call in calls.values():
                call()
            peaks[rival.name] = peak_memory(calls[rival.name])
        except Exception as error:
            if rival.name == OURS:
                raise
            left_out[rival.name] = _obstacle(error)
        else:
            functions |= calls
    bounds = {"min_rounds": rounds, "max_rounds": rounds} if rounds else {}
    times = interleaved(functions, seconds, **bounds)
    # what the backward takes is what it adds
    forward = {name: times.pop(f"{name}{FORWARD}").median for name in peaks if backward}

    limit = work.limit(limits, problem.tensors[0].dtype)
    rows = []
    for name, taken in times.items():
        rows += [Row(suite, case, name, m, taken.percentile(int(m[-2:])), "ms") for m in TIMES]
        rate = work.rate(taken.median)
        rows.append(Row(suite, case, name, "rate", rate, work.unit, rate / limit))
        if backward:
            rows.append(Row(suite, case, name, "backward", taken.median - forward[name], "ms"))
        rows.append(Row(suite, case, name, "parity_error", errors[name], "relative RMS"))
        if peaks[name] is not None:
            rows.append(Row(suite, case, name, "peak_memory", peaks[name], "MiB"))
    rows.append(Row(suite, case, OURS, "limit", limit, work.unit))
    if work.unit == "TFLOP/s":
        intensity = work.amount / _least_bytes(problem, backward)
        rows.append(Row(suite, case, OURS, "intensity", intensity, "FLOP/byte"))
    rows += [Row(suite, case, name, LEFT_OUT, None, reason) for name, reason in left_out.items()]
    return rows, times[OURS]


def _least_bytes(problem: Problem, backward: bool) -> int:
    """Of inputs and outputs; with backward also of the gradients of both."""
    with torch.no_grad():
        outputs = as_tuple(problem.ours(*problem.tensors))
    once = sum(t.nbytes for t in (*problem.tensors, *outputs))
    return 2 * once if backward else once


def _parity(case: str, problem: Problem, backward: bool) -> tuple[dict[str, float], dict[str, str]]:
    """(error of everyone that is right, reason of everyone that is left out)."""
    with torch.no_grad():
        upstream = upstream_of(as_tuple(problem.reference(*problem.tensors)))
    wide = [t.double() for t in problem.tensors]
    high = _results(problem.reference, wide, upstream, backward)
    if backward and problem.low is not None:
        low = problem.low(problem.tensors, upstream)
    else:
        low = _results(problem.reference, problem.tensors, upstream, backward)
    ours = _results(problem.ours, problem.tensors, upstream, backward)
    for got, lo, hi in zip(ours, low, high, strict=True):
        assert_parity(case, got, lo, hi)
    errors, left_out = {OURS: _error(ours, high)}, {}
    bound = RIVAL_EPS * torch.finfo(problem.tensors[0].dtype).eps
    for rival in problem.rivals:
        if rival.obstacle:
            left_out[rival.name] = rival.obstacle
            continue
        try:
            error = _error(_results(rival, problem.tensors, upstream, backward), high)
        except Exception as theirs:
            left_out[rival.name] = _obstacle(theirs)
            continue
        if error <= bound:
            errors[rival.name] = error
        else:
            left_out[rival.name] = f"parity is red: error {error:.1e} > {bound:.1e}"
    return errors, left_out


def _obstacle(error: Exception) -> str:
    """Why a rival has no time. It may raise anything: others' code, on a machine it may not be made for."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"cannot run: {first_line[:120] or type(error).__name__}"


def _results(fn: Callable, tensors: Tensors, upstream: Tensors, backward: bool) -> tuple[torch.Tensor, ...]:
    """The outputs, or the gradients of all tensors."""
    if backward:
        return tuple(gradients(fn, tensors, upstream)[1])
    with torch.no_grad():
        # a copy with the same strides: some work in place
        return as_tuple(fn(*copy.deepcopy(tensors)))


def _error(got: Tensors, high: Tensors) -> float:
    """The largest relative RMS error among them; infinite for what is not finite."""
    errors = [
        ((g.double() - h).square().mean() / h.square().mean()).sqrt().item()
        for g, h in zip(got, high, strict=True)
    ]
    return max((e if e == e else float("inf") for e in errors), default=0.0)


def _calls(rival: Rival, tensors: Tensors, backward: bool) -> dict[str, Callable]:
    """What is timed, by name: the rival, and with backward also its forward alone.

    They take their inputs in turn from copies that do not fit the L2 cache together.
    """
    arranged = [t.detach() for t in rival.arranged(tensors)]
    size = sum(t.nbytes for t in arranged)
    copies = 1 if arranged[0].device.type == "cpu" else min(1 + 4 * L2_BYTES // max(size, 1), 64)
    inputs = [arranged, *(copy.deepcopy(arranged) for _ in range(copies - 1))]
    turns = itertools.cycle(inputs)

    def forward():
        with torch.no_grad():
            rival.fn(*next(turns))

    if not backward:
        return {rival.name: forward}
    for leaf in itertools.chain(*inputs):
        leaf.requires_grad_()
    with torch.no_grad():
        upstream = upstream_of(as_tuple(rival.fn(*arranged)))

    def forward_and_backward():
        leaves = next(turns)
        torch.autograd.grad(as_tuple(rival.fn(*leaves)), leaves, upstream)

    return {rival.name: forward_and_backward, f"{rival.name}{FORWARD}": forward}
