"""Is a kernel right on this device? The cases that decide it, and how they run in a child process.

A kernel that nobody has run on this GPU, driver and Triton may be wrong there. So each operation is compared
with the float64 reference, by the one tolerance of `kernels/testing.py`, before `auto` takes it.

1. The small cases reach every way through a kernel: loads by descriptors and by pointers, several tiles, one
   tile, both loops of attention, groups of heads, one and several pieces of latents, a mean that needs its
   second kernel. They also run in Triton's interpreter, where the planted faults of `tests/mutations` show
   what they catch (`python -m tools.mutate --self-check`).
2. On a GPU cases of NV-Embed's own widths come on top, so that what was checked is the code that a real model
   launches.
3. Memory around every input, and every input of a dropped token, is NaN. So is memory that a kernel gets for
   its result. A kernel that reads what it must not read, or leaves an element unwritten, gives NaN.
4. Each call comes again, with other values of the same layout, and that result is compared, too. It comes by
   a repeated launch (`replayed` of kernels/_common.py), which is another way than the first call's.

Child processes run them (`main`), because a kernel may hang, kill its process or leave a CUDA context that
fails from then on. `verdicts` starts them, gives them one item after another and keeps the verdicts.
"""

import dataclasses
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nvembed_fast import ops
from nvembed_fast.kernels import reference, testing
from nvembed_fast.kernels.modes import own_graph
from nvembed_fast.kernels.testing import (
    ATTENTION_PACK,
    ATTENTION_SHORT,
    AttentionCase,
    LatentCase,
    PoolCase,
    RotaryCase,
    RowCase,
    ScoreCase,
)
from nvembed_fast.verdicts import DIRECTIONS, Finding, Item, facts

__all__ = ["Problem", "check", "main", "problems", "run", "with_times"]

EPS = 1e-5
MAX_HEAD_WIDTH = 256  # of the direct form's kernel: wider heads are library products
ROWS = 150  # of NaN before and behind an input
ALIGNED, ODD = 16, 17  # columns of NaN behind a row: with 17 no descriptor can be made
# what the machine is to blame for: by type, and in the messages of Triton, cuBLAS and CUDA
ENVIRONMENT = (OSError, subprocess.SubprocessError, ImportError, MemoryError)
NO_MEMORY = re.compile("out of memory|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)")
MACHINE = re.compile(
    "C compiler|Cannot find ptxas|cache dir|libcuda.so cannot|active drivers|failed with error code -(9|15)|"
    "ECC error|NVLink error|busy or unavailable|no CUDA-capable|initialization error|not yet initialized|"
    "shutting down|unknown error|MPS "
)
# shapes of NV-Embed, with fewer tokens, and with fewer heads where their number is no constant of a kernel
LONG_TEXTS, SHORT_TEXTS = (1100, 1, 130), (50, 7)


@dataclass(frozen=True)
class Problem:
    """One comparison of an operation with its reference.

    Attributes:
        name: what is special about it.
        tensors: the differentiable inputs, as the reference gets them.
        call: (function, *tensors) -> its outputs.
        low: as in `assert_gradient_parity`.
        gap: columns of NaN behind each row of an input. See ALIGNED and ODD.
        upstream_gap: the same for the gradients of the outputs.
        place: of the first tensor, to spoil what must not matter. None: nothing.
        directions: in which it is compared.
    """

    name: str
    tensors: Sequence[torch.Tensor]
    call: Callable
    low: Callable | None = None
    gap: int = ALIGNED
    upstream_gap: int = ALIGNED
    place: Callable | None = None
    directions: tuple[str, ...] = DIRECTIONS


def problems(operation: str, device: str | torch.device, dtype: torch.dtype) -> Iterator[Problem]:
    """The comparisons of an operation. Those of NV-Embed's widths are left out off a GPU."""
    return _PROBLEMS[operation](operation, torch.device(device), dtype)


def _attention(
    operation: str, device: torch.device, dtype: torch.dtype, full_size: bool = False
) -> Iterator[Problem]:
    def problem(
        name: str,
        case: AttentionCase,
        shift: float = 0.0,
        scale: float | None = None,
        lse: bool = True,
        **more: Any,
    ) -> Problem:
        q, k, v, layout = case.inputs(str(device), dtype)
        if shift:
            q, k = q.abs(), k + shift

        def call(function: Callable, *tensors: torch.Tensor):
            return function(*tensors, layout, scale=scale, causal=case.causal, return_lse=lse)

        def low(tensors, upstream):
            dlse = q.new_zeros(q.shape[1], q.shape[0])
            return testing.attention_gradients(tensors, [*upstream, dlse][:2], layout, case.causal, scale)

        rounds = dtype != torch.float32
        return Problem(f"{name} {case.lengths}", (q, k, v), call, low if rounds else None, **more)

    if full_size:
        yield problem("32 x 512", _named(testing.ATTENTION_CASES, "nvembed-32x512"), lse=False)
        return
    pack, causal = ATTENTION_PACK, dataclasses.replace(ATTENTION_PACK, causal=True)
    yield problem("several blocks of keys", pack)
    yield problem("by pointers", pack, gap=ODD, upstream_gap=ODD)
    yield problem("upstream by pointers", pack, upstream_gap=ODD, directions=("backward",))
    yield problem("causal", causal)
    yield problem("causal by pointers", causal, gap=ODD, upstream_gap=ODD)
    yield problem("short", ATTENTION_SHORT)
    yield problem("without the lse", pack, lse=False)
    yield problem("scaled", ATTENTION_SHORT, scale=0.3)
    yield problem("peaked", dataclasses.replace(pack, peak=2.0))
    yield problem("many blocks of keys", dataclasses.replace(pack, lengths=(300,)))
    yield problem("whole blocks of keys", dataclasses.replace(pack, lengths=(256, 129)))
    narrow = AttentionCase("narrow", (70, 7), 4, 2, 24)
    yield problem("columns beyond the head", narrow)
    yield problem("columns beyond the head, by pointers", narrow, gap=ODD, upstream_gap=ODD)
    yield problem("wide heads", AttentionCase("wide", (129, 65, 128), 4, 1, 128))
    yield problem("scores far below zero", dataclasses.replace(pack, lengths=(33, 150)), shift=-60.0)
    if device.type == "cuda":
        wide = AttentionCase("long", LONG_TEXTS, 8, 2, 128)
        yield problem("NV-Embed", wide)
        yield problem("NV-Embed, causal", dataclasses.replace(wide, causal=True))
        yield problem("SmolLM2", AttentionCase("smollm2", (130, 70), 9, 3, 64))
        yield problem("NV-Embed, short texts", AttentionCase("short", SHORT_TEXTS, 8, 2, 128))
        yield problem("NV-Embed, one short text", AttentionCase("one", (12,), 8, 2, 128))


def _latents(
    operation: str, device: torch.device, dtype: torch.dtype, full_size: bool = False
) -> Iterator[Problem]:
    absorbed = operation == "absorbed_latent_attention"

    def problem(name: str, case: LatentCase, shift: float = 0.0, **more: Any) -> Problem:
        if absorbed:
            *tensors, heads = case.absorbed_inputs(str(device), dtype)
        else:
            tensors, heads = list(case.direct_inputs(str(device), dtype)), None
        if shift:
            tensors[:2] = tensors[0].abs(), tensors[1] + shift

        def call(function: Callable, *tensors: torch.Tensor):
            return function(*tensors, num_heads=heads) if absorbed else function(*tensors)

        rounds = dtype != torch.float32 and not absorbed and case.head_width <= MAX_HEAD_WIDTH
        low = testing.latent_attention_gradients if rounds else None
        return Problem(name, tensors, call, low, **more)

    if full_size:
        # heads of NV-Embed's width are library products in the direct form
        yield problem("16k", _named(testing.LATENT_CASES, "nvembed-16k" if absorbed else "smollm2-16k"))
        return
    ragged = LatentCase("ragged", 150, 300, 2, 24, 72)
    yield problem("several pieces of latents", ragged)
    yield problem("by pointers", ragged, gap=ODD, upstream_gap=ODD)
    yield problem("upstream by pointers", ragged, upstream_gap=ODD, directions=("backward",))
    yield problem("one piece of latents", LatentCase("one-piece", 77, 24, 3, 48, 80))
    yield problem("whole pieces of latents", LatentCase("whole", 129, 512, 2, 64, 64))
    yield problem("peaked", LatentCase("peaked", 40, 64, 2, 32, 64, peak=2.0))
    # in 16 bits the gradient of q is one rounding error of a token and head, 60 times over. The kernel's is
    # as large as an honest twin's, so the draw alone decides: 0.81 to 1.08 of the bound of the RMS error
    exact = absorbed or dtype == torch.float32
    yield problem(
        "scores far below zero", ragged, shift=-60.0, directions=DIRECTIONS if exact else ("forward",)
    )
    if absorbed and _sums_as_a_gpu(device, dtype):
        yield _outweighed(device, dtype)
    if not absorbed:
        yield problem("more than a chunk of tokens", LatentCase("chunks", 2 * 2048 + 5, 16, 1, 16, 16))
        yield problem("heads for library products", LatentCase("wide", 20, 40, 3, 264, 16))
    if device.type == "cuda":
        yield problem("NV-Embed", LatentCase("nvembed", 150, 512, 8, 4096, 4096))
        yield problem("SmolLM2", LatentCase("smollm2", 150, 512, 8, 64, 576))


def _outweighed(device: torch.device, dtype: torch.dtype) -> Problem:
    """P is nearly one for a few latents, so that dP - delta cancels there."""
    g, latents = testing.generator(), 1024
    plain: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller has made the default
    a = torch.zeros(2 * latents, 16, **plain)
    a[:latents, 0] = torch.linspace(0, 200, latents, **plain).flip(0)
    b = torch.randn(2 * latents, 16, generator=g, **plain) + 4
    x = torch.randn(60, 16, generator=g, **plain)
    x[:, 0] = 1
    tensors = [t.to(device, dtype) for t in (x, a, b, x)]
    return Problem("one piece outweighs the others", tensors, lambda f, *ts: f(*ts, num_heads=2))


def _pools(
    operation: str, device: torch.device, dtype: torch.dtype, full_size: bool = False
) -> Iterator[Problem]:
    geglu = operation == "mean_pool_geglu"

    def problem(name: str, case: PoolCase, dropped: slice = slice(0), **more: Any) -> Problem:
        x, layout, mask = case.inputs(str(device), dtype, geglu=geglu)
        if mask is not None:
            mask[dropped] = False

        def spoil(x: torch.Tensor) -> torch.Tensor:
            return x if mask is None else x.masked_fill(~mask[:, None], float("nan"))

        return Problem(name, [x], lambda f, x: f(x, layout, mask), place=spoil, **more)

    if full_size:
        yield problem("32 x 512", _named(testing.POOL_CASES, "nvembed-32x512" + ("-mlp" if geglu else "")))
        return
    # longer than a tile, just a tile, two tiles, and an empty one; the third sequence keeps nothing
    lengths = (600, 9, 40, 0, 1100, 512, 3)
    yield problem("several tiles", PoolCase("tiles", lengths, 80), dropped=slice(609, 649))
    yield problem("by odd rows", PoolCase("odd", (77, 131, 5), 77), gap=ODD, upstream_gap=ODD)
    yield problem("without a mask", PoolCase("no-mask", (16, 1, 33), 128, masked=False))
    yield problem("many tiles", PoolCase("long", (3000,), 128))
    if device.type == "cuda":
        width = 16384 if geglu else 4096
        yield problem("NV-Embed", PoolCase("nvembed", (600, *LONG_TEXTS), width))


def _norms(
    operation: str, device: torch.device, dtype: torch.dtype, full_size: bool = False
) -> Iterator[Problem]:
    has_residual = operation == "add_rms_norm"

    def problem(
        name: str, case: RowCase, size: float = 1.0, used: slice = slice(None), **more: Any
    ) -> Problem:
        x, residual, weight = case.norm_inputs(str(device), dtype)
        x, residual = size * x, size * residual
        tensors = [x, residual, weight] if has_residual else [x, weight]
        return Problem(name, tensors, lambda f, *ts: testing.as_tuple(f(*ts, EPS))[used], **more)

    if full_size:
        yield problem("16k", _named(testing.NORM_CASES, "nvembed-16k"))
        return
    yield problem("no tile divides", RowCase("odd", 37, 77), gap=ODD, upstream_gap=ODD)
    yield problem("eps counts", RowCase("tiny", 9, 64), size=1e-3)
    yield problem("one row a program", RowCase("wide", 3, 4096))
    if has_residual:
        yield problem("the norm alone", RowCase("last", 9, 64), used=slice(1))
    if _sums_as_a_gpu(device, dtype):
        yield problem("many rows", RowCase("long", 2200, 64))
    if device.type == "cuda":
        yield problem("NV-Embed", RowCase("nvembed", 300, 4096))
        yield problem("SmolLM2", RowCase("smollm2", 300, 576))


def _rotations(
    operation: str, device: torch.device, dtype: torch.dtype, full_size: bool = False
) -> Iterator[Problem]:
    def problem(
        name: str, case: RotaryCase, inplace: bool = False, has_infinite: bool = False, **more: Any
    ) -> Problem:
        qkv, cos, sin, positions, rotated = case.inputs(str(device), dtype)

        def call(function: Callable, qkv: torch.Tensor):
            tables = (t.double() if qkv.dtype == torch.float64 else t for t in (cos, sin))
            out = function(qkv.clone() if inplace else qkv, *tables, positions, rotated, inplace=inplace)
            return out.masked_fill(out.isinf(), 7.0) if has_infinite else out

        if has_infinite:
            qkv[:, rotated:] = float("inf")
        return Problem(name, [qkv], call, **more)

    if full_size:
        yield problem("32 x 512", _named(testing.ROTARY_CASES, "nvembed-32x512"))
        return
    only = ("forward",)
    ragged = RotaryCase("ragged", testing.RAGGED, 4, 2, 32)
    yield problem("ragged", ragged)
    yield problem("in place", ragged, inplace=True, directions=only)
    yield problem("infinite values", ragged, has_infinite=True, directions=only)
    yield problem("no tile divides", RotaryCase("odd", (31, 6), 9, 3, 80), gap=ODD, upstream_gap=ODD)
    if device.type == "cuda":
        for inplace in (False, True):
            case = RotaryCase("nvembed", LONG_TEXTS, 32, 8, 128)
            yield problem("NV-Embed", case, inplace, directions=only if inplace else DIRECTIONS)


def _gates(
    operation: str, device: torch.device, dtype: torch.dtype, full_size: bool = False
) -> Iterator[Problem]:
    def problem(name: str, case: RowCase, size: float = 1.0, **more: Any) -> Problem:
        x = size * case.gated_input(str(device), dtype)
        return Problem(name, [x], lambda f, x: f(x), **more)

    if full_size:
        yield problem("16k", _named(testing.GATED_CASES, "nvembed-16k"))
        return
    yield problem("no tile divides", RowCase("odd", 37, 77), gap=ODD, upstream_gap=ODD)
    yield problem("several blocks of columns", RowCase("wide", 3, 4160))
    yield problem("many rows", RowCase("long", 300, 16))
    yield problem("large gates", RowCase("large", 20, 64), size=30.0)
    if device.type == "cuda":
        yield problem("NV-Embed", RowCase("nvembed", 150, 14336))


def _score_problems(
    operation: str, device: torch.device, dtype: torch.dtype, full_size: bool = False
) -> Iterator[Problem]:
    def problem(name: str, case: ScoreCase, used: slice = slice(1), **more: Any) -> Problem:
        q, d, *masks = case.inputs(str(device), dtype)

        def call(function: Callable, q: torch.Tensor, d: torch.Tensor):
            outputs = function(q, d, *masks)[used]
            # a row that keeps nothing
            return tuple([t.to(outputs[0].dtype).masked_fill(t == -torch.inf, 7.0) for t in outputs])

        return Problem(name, (q, d), call, **more)

    if full_size:
        yield problem("8k x 8k", _named(testing.SCORE_CASES, "nvembed-8k"))
        return
    # several tiles of rows and of columns, in several splits
    limited = ScoreCase("limited", 140, 300, 80, limited=True)
    yield problem("all results", limited, used=slice(None), directions=("forward",))
    yield problem("limited", limited)
    yield problem("by odd rows", ScoreCase("odd", 37, 77, 77), gap=ODD)
    long = ScoreCase("long", 7, 2300, 32)
    yield problem("several tiles in a split", long, used=slice(None), directions=("forward",))
    yield problem("without masks", ScoreCase("unmasked", 33, 140, 32, masked=False))
    yield problem("peaked", ScoreCase("peaked", 40, 130, 64, peak=30.0))
    if device.type == "cuda":
        yield problem("NV-Embed", ScoreCase("nvembed", 300, 600, 4096, limited=True))
        yield problem("several chunks of rows", ScoreCase("chunks", 5000, 4000, 16), directions=("backward",))


def _named(cases: tuple, name: str):
    (case,) = (case for case in cases if case.name == name)
    return case


def _sums_as_a_gpu(device: torch.device, dtype: torch.dtype) -> bool:
    """The interpreter adds the rows of a tile one by one and fuses nothing. In fp32 that would show."""
    return device.type == "cuda" or dtype != torch.float32


_PROBLEMS: dict[str, Callable[..., Iterator[Problem]]] = {
    "flash_attention": _attention,
    "latent_attention": _latents,
    "absorbed_latent_attention": _latents,
    "mean_pool": _pools,
    "mean_pool_geglu": _pools,
    "rms_norm": _norms,
    "add_rms_norm": _norms,
    "rotary": _rotations,
    "swiglu": _gates,
    "geglu": _gates,
    "masked_lse": _score_problems,
}


def check(
    item: Item,
    device: str | torch.device,
    path: ops.Impl = "triton",
    begin: Callable[[], None] = lambda: None,
) -> Finding:
    """Whether an operation in a dtype and a direction is right on a device.

    Args:
        item: operation, dtype by name, direction.
        device: where it runs.
        path: the implementation to check.
        begin: called before each problem.
    """
    operation, dtype_name, direction = item
    device = torch.device(device)
    worst, error, bound, reason = -1.0, 0.0, 0.0, ""
    problem = None
    try:
        with _unwritten_memory_is_nan():
            for number, problem in enumerate(problems(operation, device, getattr(torch, dtype_name))):
                if direction not in problem.directions:
                    continue
                begin()
                # the interpreter repeats no launch, so there one second call is enough
                again = device.type == "cuda" or number == 0
                for name, found, allowed in _errors(problem, operation, direction, path, again):
                    # nothing is allowed to be wrong where nothing rounds
                    share = found / allowed if allowed else float(found > 0) * float("inf")
                    if share > worst:
                        worst, error, bound = share, found, allowed
                        if share > 1:
                            reason = f"{problem.name}: {name} error {found:.2e} > {allowed:.2e}"
    except Exception as failure:  # whatever a compiler or a driver raises
        failure = _cause(failure, device)
        text = (str(failure).strip().splitlines() or [""])[0]
        kind = "" if isinstance(failure, AssertionError) else f"{type(failure).__name__}: "
        if _is_of_the_machine(failure):
            lacks_memory = NO_MEMORY.search(str(failure)) is not None
            reason = "there is no memory for it" if lacks_memory else f"it could not be checked: {kind}{text}"
            return Finding(*item, path, False, reason=reason, is_decided=False, lacks_memory=lacks_memory)
        reason = f"{problem.name if problem else 'inputs'}: {kind}{text}"
    return Finding(*item, path, not reason, error, bound, reason)


def _is_of_the_machine(failure: Exception) -> bool:
    """Whether it says nothing about a kernel. The rest does, whatever a compiler or a driver raises."""
    text = str(failure)
    return isinstance(failure, ENVIRONMENT) or bool(NO_MEMORY.search(text) or MACHINE.search(text))


def _cause(failure: Exception, device: torch.device) -> Exception:
    """The failure, or what a kernel did to the context before: then cuBLAS cannot be initialized, either."""
    if device.type == "cuda" and _is_of_the_machine(failure):
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            return error
    return failure


def _errors(
    problem: Problem, operation: str, direction: str, path: ops.Impl, again: bool
) -> Iterator[tuple[str, float, float]]:
    """(what, error, bound) of every comparison: of one call, and with `again` of a second one."""
    function, wanted = getattr(ops, operation), getattr(reference, operation)

    # a product of the CPU's library may multiply what lies behind a row by zero
    filling = float("nan") if path == "triton" else 0.0

    def kernel(*tensors: torch.Tensor):
        placed = [
            _Placed.apply(t, problem.gap + 16 * i, filling, problem.place if i == 0 else None)
            for i, t in enumerate(tensors)
        ]
        with ops.use_impl(path):
            return problem.call(function, *placed)

    def oracle(*tensors: torch.Tensor):
        return problem.call(wanted, *tensors)

    calls = [problem.tensors, [t.flip(0) for t in problem.tensors]][: 1 + again]
    if direction == "forward":
        with torch.no_grad():
            got = [testing.as_tuple(kernel(*tensors)) for tensors in calls]
            low = [testing.honest(oracle, tensors) for tensors in calls]
            high = [testing.as_tuple(oracle(*(t.double() for t in tensors))) for tensors in calls]
        compared = [list(zip(*each, strict=True)) for each in zip(got, low, high, strict=True)]
    else:
        with torch.no_grad():
            outputs = testing.as_tuple(oracle(*problem.tensors))
        upstream = [_amid(t, problem.upstream_gap, filling) for t in testing.upstream_of(outputs)]
        # PyTorch's own gradients of shared heads are sums of rounded ones
        low_grads = problem.low if path == "triton" else None
        compared = [
            testing.compared_gradients(kernel, oracle, tensors, low_grads, upstream=upstream)
            for tensors in calls
        ]
    kind = "output" if direction == "forward" else "gradient"
    for which, call in zip(("", "second call: "), compared, strict=False):
        for i, (one, low_one, high_one) in enumerate(call):
            what = f"{which}{kind} {i}"
            assert one is not None, f"{what} is missing"
            for norm, error, bound in testing.errors(what, one, low_one, high_one):
                yield f"{what}, {norm.removeprefix('_')}", error, bound


class _Placed(torch.autograd.Function):
    """A tensor amid NaN, and spoiled where it must not matter. The gradient passes as it comes."""

    @staticmethod
    def forward(ctx, t: torch.Tensor, gap: int, filling: float, place: Callable | None) -> torch.Tensor:
        return _amid(t if place is None else place(t), gap, filling)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


def _amid(t: torch.Tensor, gap: int, filling: float) -> torch.Tensor:
    """A copy with a filling in the rows before and behind it, and in columns behind every row."""
    if t.ndim == 1:  # weights are contiguous
        around = t.new_full((len(t) + 2 * ALIGNED,), filling)[ALIGNED:-ALIGNED]
    else:
        shape = (t.shape[0] + 2 * ROWS, *t.shape[1:-1], t.shape[-1] + gap)
        around = t.new_full(shape, filling)[ROWS:-ROWS, ..., : t.shape[-1]]
    return around.copy_(t)


@contextmanager
def _unwritten_memory_is_nan() -> Iterator[None]:
    """Inside, memory that torch.empty and its kind give is NaN."""
    settings: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fills


def run(
    items: Sequence[Item],
    device: torch.device,
    path: ops.Impl,
    begin: Callable[[], None] = lambda: None,
) -> Iterator[Finding]:
    """The findings for items, one by one, in this process. `begin` is called before each problem."""
    for item in items:
        with _default_modes(device):
            finding = check(item, device, path, begin)
        yield finding


@contextmanager
def _default_modes(device: torch.device) -> Iterator[None]:
    with own_graph(), torch.autocast(device.type, enabled=False):
        yield


def with_times(
    finding: Finding, device: torch.device, begin: Callable[[str], None] = lambda path: None
) -> Finding:
    """The finding about a right kernel with its times, and those of the library path. On a CPU without.

    `begin` is called with each path before it is timed.
    """
    if device.type != "cuda":
        return finding
    times = []
    for path in (finding.path, "library"):
        begin(path)
        with _default_modes(device):
            times.append(_milliseconds(finding.item, device, ops.check_impl(path)))
    return dataclasses.replace(finding, time_ms=times[0], library_ms=times[1])


def _milliseconds(item: Item, device: torch.device, path: ops.Impl) -> float | None:
    """The median time of a call at the size of NV-Embed's batches. None: the machine is to blame."""
    operation, dtype_name, direction = item
    try:
        with testing.drawn_on(device):
            (problem,) = _PROBLEMS[operation](operation, device, getattr(torch, dtype_name), True)
        leaves = [t.detach().requires_grad_(direction == "backward") for t in problem.tensors]
        with ops.use_impl(path):
            outputs = testing.as_tuple(problem.call(getattr(ops, operation), *leaves))
            with testing.drawn_on(device):
                upstream = testing.upstream_of(outputs)

            def call() -> None:
                if direction == "forward":
                    problem.call(getattr(ops, operation), *leaves)
                else:
                    torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)

            times = []
            for _ in range(23):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
        return sorted(times[3:])[10]
    except Exception as failure:  # as in `check`: there is a verdict, and a time is no part of it
        cause = _cause(failure, device)
        if not _is_of_the_machine(cause):
            raise cause from None
        return None


def main() -> None:
    """Answer on standard output, a line of JSON at a time.

    The first line of standard input says what all items share, and each other line is an item. `ready` asks
    for the next one. Each item, each of its problems and each path that is timed says that it is begun. So a
    limit of time is for one of them: an item may compile some 50 kernels (35 and the 13 of its forward),
    which takes minutes where the CPU is busy. The path that is at work comes with it, because it is to blame
    if this process ends.
    """
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer
    request = json.loads(sys.stdin.readline())
    signal.alarm(request["seconds"])
    items: queue.SimpleQueue[Item] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(items,), daemon=True).start()

    def tell(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answer, flush=True)

    def begin(item: Item, path: str) -> None:
        tell({"begun": item, "path": path})

    # an environment variable may allow TF32, and the cost of the dtype would be that of TF32
    torch.set_float32_matmul_precision("highest")
    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if facts(device) != request["facts"]:
            sys.exit("this process sees another GPU than the one that started it")
        torch.empty(1, device=device)
    while True:
        tell({"ready": True})
        item = items.get()
        path = request["path"]
        begin(item, path)
        if request["timed"]:
            finding = with_times(Finding(*item, path, True), device, partial(begin, item))
        else:
            (finding,) = run([item], device, path, partial(begin, item, path))
        tell(dataclasses.asdict(finding))
        if device.type == "cuda":
            # an error that stays: the next process goes on
            torch.cuda.synchronize()


def _receive(items: "queue.SimpleQueue[Item]") -> None:
    """Pass on the items, and end this process with the one that sends them."""
    for line in sys.stdin:
        items.put(tuple(json.loads(line)))
    os._exit(1)
