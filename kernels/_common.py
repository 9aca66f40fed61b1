"""What all launchers share: compile options, the target, scratch memory for descriptors."""

import contextlib
import contextvars
import functools
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from nvembed_fast.kernels import tuned

# of every launch: the default of enable_fp_fusion differs between Triton versions
COMPILE_OPTIONS = {"enable_fp_fusion": True}
# whose compiled kernels `replayed` launches: the property test has run there
KNOWN_VERSIONS = ("3.6.0", "3.7.1")
MAX_PLANS = 1024  # of one launcher, a few KB each
LOG2E = tl.constexpr(1.4426950408889634)
# the interpreter plays the older part: no descriptors
INTERPRETED_CAPABILITY = 80
INTERPRETED_MULTIPROCESSORS = 2
# the parts that load by descriptors: those with rows in tools/resource_snapshots
WITH_DESCRIPTORS = (90, 100)


def capability(device: torch.device) -> int:
    """80 for compute capability 8.0, 90 for 9.0."""
    return INTERPRETED_CAPABILITY if device.type == "cpu" else cuda_capability(device.index)


@functools.cache
def cuda_capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def num_multiprocessors(device: torch.device) -> int:
    """How many programs run at once that each need more than half of a multiprocessor."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def input_precision(dtype: torch.dtype) -> str:
    """fp32 products in full precision: `tl.dot` would otherwise take TF32 on a GPU."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def add_product(b_acc, b_left, b_right, PRECISION: tl.constexpr):
    """acc + left right. In fp32 the tile's product is a sum of its own, so a long sum rounds less often."""
    if PRECISION == "ieee":
        # Triton makes one product of tl.dot and `+`, which adds to acc term by term
        return tl.fma(tl.dot(b_left, b_right, input_precision=PRECISION), 1.0, b_acc)
    return tl.dot(b_left, b_right, b_acc, input_precision=PRECISION)


def launch(kernel, num_programs: int, of_layout: Any = (), **arguments) -> None:
    """Launch a kernel on the device of its tensors, whatever device is current.

    Args:
        kernel: a `@triton.jit` function.
        num_programs: the grid, of one axis.
        of_layout: names of the arguments that belong to the layout of the batch, for `replayed`.
        arguments: of the kernel by name, with its launch configuration.
    """
    device = next(t.device for t in arguments.values() if isinstance(t, torch.Tensor))
    arguments |= COMPILE_OPTIONS
    with _current(device):
        binary = _with_scratch(device, kernel[(num_programs,)], **arguments)
    launches = getattr(_recorded, "launches", None)
    if launches is not None:
        launches.append(_Launch(kernel, num_programs, of_layout, arguments, binary))


def _current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _with_scratch(device: torch.device, run: Callable, *args, **arguments):
    """`run` with the allocator that tensor descriptors made inside a kernel need.

    Triton keeps it in a context variable. Ours is set in a copy of the context, so that the user's stays.
    """

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    def run_here():
        triton.set_allocator(allocate)
        return run(*args, **arguments)

    return contextvars.copy_context().run(run_here)


def use_descriptors(capability: int, *tensors: torch.Tensor) -> bool:
    """Whether kernels load these through tensor descriptors (TMA): sm_90 and sm_100.

    sm_120 has them too, but not the shared memory for the tiles that go with them. sm_103 and sm_110 take
    pointers until their code has been compiled and read. Bases, and all strides but the last, must be
    positive multiples of 16 bytes. Without tensors they are taken to be.
    """
    return capability in WITH_DESCRIPTORS and all(
        t.data_ptr() % 16 == 0 and all(step > 0 and step * t.itemsize % 16 == 0 for step in t.stride()[:-1])
        for t in tensors
    )


def operands(*tensors: tuple[str, torch.Tensor | None, str]) -> dict[str, torch.Tensor | int | None]:
    """A kernel's arguments for tensors: ("q", q, "tn") becomes q_ptr, stride_qt and stride_qn.

    `dims` names the first dimensions. The last one is contiguous and has no argument. Strides carry the first
    letter of the name, those of a gradient the first two: stride_dot of dout. The strides of None are zero.
    """
    arguments: dict[str, torch.Tensor | int | None] = {}
    for name, t, dims in tensors:
        pointer, strides = _argument_names(name, dims)
        arguments[pointer] = t
        arguments.update(zip(strides, (0,) * len(strides) if t is None else t.stride(), strict=False))
    return arguments


@functools.cache
def _argument_names(name: str, dims: str) -> tuple[str, tuple[str, ...]]:
    prefix = name[:2] if name.startswith("d") else name[0]
    return f"{name}_ptr", tuple(f"stride_{prefix}{dim}" for dim in dims)


class _Launch(NamedTuple):
    """A launch by Triton's own way, and the compiled kernel that it gave."""

    kernel: Any
    num_programs: int
    of_layout: tuple[str, ...]
    arguments: dict[str, Any]
    binary: Any


class _Plan(NamedTuple):
    """How to repeat a launch on other tensors of the same kind.

    `args` and `new` together are numbered: `places` and `results` are numbers among them.
    """

    kernel: Any
    run: Callable  # the launcher of the compiled kernel
    head: tuple  # what it takes before the arguments
    needs_scratch: bool
    arguments: list  # in the order of the kernel
    places: tuple[tuple[int, int], ...]  # (place among the arguments, number)
    new: tuple[tuple[tuple[int, ...], torch.dtype], ...]  # shapes and dtypes of the results that are no input
    results: tuple[int, ...]
    is_one: bool  # the result is a tensor, no tuple
    layouts: tuple[weakref.ref, ...]  # whose end is that of the plan

    def launch(self, args: tuple):
        like = args[0]
        values = [*args, *[like.new_empty(shape, dtype=dtype) for shape, dtype in self.new]]
        arguments = self.arguments.copy()
        for place, number in self.places:
            arguments[place] = values[number]
        if self.needs_scratch:
            _with_scratch(like.device, self.run, *self.head, *arguments)
        else:
            self.run(*self.head, *arguments)
        return values[self.results[0]] if self.is_one else tuple([values[i] for i in self.results])


_recorded = threading.local()


def replayed(launcher: Callable) -> Callable:
    """Let a launcher run once for tensors of one kind, and repeat its launch for the next ones.

    The layers of a forward launch the same kernels on the same shapes. The launcher checks, chooses the tiles
    and binds the arguments the first time, by Triton's own way, which gives the compiled kernel. Then that
    kernel is launched directly, on tensors of the same dtypes, devices, shapes, strides and alignment, with
    the same other arguments. All that Triton compiles for follows from these, and from globals of a kernel,
    which must not change: Triton looks at them at each launch, and a repeated one does not.

    The launcher's first argument must be a tensor. Its results must be inputs or whole tensors of new_empty.
    What launches another number of kernels, or takes other tensors than inputs, results and lists of the
    layout, is not repeated, nor is a call with keywords. Nothing is under an unknown Triton, in the
    interpreter, or with hooks of Triton.
    """
    if triton.__version__ not in KNOWN_VERSIONS or triton.knobs.runtime.interpret:
        return launcher
    plans: dict[tuple, _Plan] = {}
    tuned.on_change(plans.clear)

    @functools.wraps(launcher)
    def replay(*args, **named):
        if named:
            return launcher(*args, **named)
        if not plans:
            return _record(launcher, args, plans)
        active = triton.runtime.driver.active
        index = args[0].get_device()
        if index >= 0 and index != active.get_current_device():
            with torch.cuda.device(index):
                return replay(*args)
        plan = plans.get(_kind(args, active))
        if plan is None or _has_hooks(plan.kernel):
            return _record(launcher, args, plans)
        return plan.launch(args)

    return replay


def _kind(args: tuple, active: Any) -> tuple:
    """All that a launch depends on but the addresses of its tensors."""
    device = active.get_current_device()
    knobs = triton.knobs
    kind = [active, device, active.get_current_stream(device), knobs.runtime.debug]
    kind.append(knobs.compilation.instrumentation_mode)
    for x in args:
        if isinstance(x, torch.Tensor):
            aligned = x.data_ptr() % 16 == 0
            kind.append((x.dtype, x.device, x.shape, x.stride(), aligned, x.requires_grad))
        else:
            # a layout counts as that very object
            kind.append(x if isinstance(x, _VALUES) else id(x))
    return tuple(kind)


_VALUES = (bool, int, float, str, type(None), torch.dtype)


def _has_hooks(kernel: Any) -> bool:
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    at_launch = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    return bool(at_launch or kernel.pre_run_hooks or runtime.add_stages_inspection_hook)


def _record(launcher: Callable, args: tuple, plans: dict[tuple, _Plan]):
    launches: list[_Launch] = []
    before, _recorded.launches = getattr(_recorded, "launches", None), launches
    try:
        results = launcher(*args)
    finally:
        _recorded.launches = before
    if len(launches) == 1 and isinstance(launches[0].binary, triton.compiler.CompiledKernel):
        with _current(args[0].device):
            active = triton.runtime.driver.active
            kind = _kind(args, active)
            # a plan holds lists of its layout, so it goes with it
            forget = lambda _: plans.pop(kind, None)  # noqa: E731
            if (plan := _plan(args, results, launches[0], active, forget)) is not None:
                if len(plans) == MAX_PLANS:
                    plans.clear()
                plans[kind] = plan
    return results


def _plan(
    args: tuple, results: Any, launched: _Launch, active: Any, forget: Callable[[Any], Any]
) -> _Plan | None:
    kernel, num_programs, of_layout, arguments, binary = launched
    is_one = isinstance(results, torch.Tensor)
    results = [results] if is_one else list(results)
    inputs = [x for x in args if isinstance(x, torch.Tensor)]
    new = [t for t in results if not any(t is x for x in inputs)]
    values = [*args, *new]
    if len({id(t) for t in inputs}) < len(inputs) or not all(t.is_contiguous() for t in new):
        return None
    number = {id(t): i for i, t in enumerate(values) if isinstance(t, torch.Tensor)}
    bound, places = [], []
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, torch.Tensor) and name not in of_layout:
            if id(value) not in number:
                return None
            places.append((place, number[id(value)]))
            value = None
        bound.append(value)
    stream = active.get_current_stream(active.get_current_device())
    # no hooks: a launch that has any is not repeated
    head = (num_programs, 1, 1, stream, binary.function, binary.packed_metadata, None, None, None)
    return _Plan(
        kernel,
        binary.run,
        head,
        binary.metadata.global_scratch_size > 0,
        bound,
        tuple(places),
        tuple((tuple(t.shape), t.dtype) for t in new),
        tuple(number[id(t)] for t in results),
        is_one,
        tuple(weakref.ref(x, forget) for x in args if not isinstance(x, (torch.Tensor, *_VALUES))),
    )


def is_dispatched(*tensors: torch.Tensor | None) -> bool:
    """Whether a call has to go through its registered operation.

    It has to where autograd records it or torch.compile traces it. Everywhere else the launcher is called
    itself, without the dispatcher's host time.
    """
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def with_contiguous_rows(grad: torch.Tensor) -> torch.Tensor:
    """An upstream gradient as kernels read it: with a last stride of 1."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


@triton.jit
def _erfc(b_t):
    # erfc(t / sqrt(2)) for t >= 0: the polynomial of `double_gelu`
    b_r = -2.834912720572902e-06 * b_t + 3.9377689972752705e-05
    b_r = b_r * b_t - 0.000186180230230093
    b_r = b_r * b_t - 0.00013693637447431684
    b_r = b_r * b_t + 0.00706342002376914
    b_r = b_r * b_t - 0.052496179938316345
    b_r = b_r * b_t - 0.4592081904411316
    b_r = b_r * b_t - 1.1511051654815674
    return tl.exp2(b_r * b_t)


@triton.jit
def double_gelu(b_x):
    """2 gelu(x) to fp32 rounding, in 11 instructions on sm_90 by Triton 3.7.1 (libdevice's erf: 32).

    With t = |x|, erfc(t / sqrt(2)) = exp2(R(t)), and R is a polynomial without constant term: one exponential
    for both signs and no branch,

        2 gelu(x) = x + t - t exp2(R(t)).

    R is of degree 8, weighted minimax on [0, 5]: the error in Phi(x) is 8e-9, below the rounding of fp32, and
    beyond 5 R falls on to minus infinity. An infinite x gives NaN.
    """
    b_t = tl.abs(b_x)
    return (b_x + b_t) - b_t * _erfc(b_t)


@triton.jit
def double_gelu_and_slope(b_x):
    """2 gelu(x) and its derivative 2 Phi(x) + 2 x phi(x), from one erfc.

    Phi(x) = 1 - erfc(t / sqrt(2)) / 2 for x >= 0, and erfc(t / sqrt(2)) / 2 below. phi is the normal density.
    """
    b_t = tl.abs(b_x)
    b_tail = _erfc(b_t)
    b_density = 0.7978845608028654 * tl.exp2(-0.7213475204444817 * b_x * b_x)
    b_slope = tl.where(b_x >= 0, 2.0 - b_tail, b_tail) + b_x * b_density
    return (b_x + b_t) - b_t * b_tail, b_slope
