"""What all launchers share: compile options, the target, scratch memory for descriptors."""

import functools

import torch
import triton
import triton.language as tl

# passed to every launch: the default of enable_fp_fusion differs between Triton versions
COMPILE_OPTIONS = {"enable_fp_fusion": True}
LOG2E = tl.constexpr(1.4426950408889634)
# the interpreter plays the older part: no descriptors
INTERPRETED_CAPABILITY = 80
# the parts that load by descriptors: those with rows in tools/resource_snapshots
WITH_DESCRIPTORS = (90, 100)


def capability(device: torch.device) -> int:
    """80 for compute capability 8.0, 90 for 9.0."""
    return INTERPRETED_CAPABILITY if device.type == "cpu" else cuda_capability(device.index)


@functools.cache
def cuda_capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def input_precision(dtype: torch.dtype) -> str:
    """fp32 products in full precision: `tl.dot` would otherwise take TF32 on a GPU."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def allow_descriptors() -> None:
    """Give Triton the allocator that tensor descriptors made inside a kernel need.

    At every launch: Triton keeps it in a context variable, so a new thread starts without one.
    """
    triton.set_allocator(_scratch)


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
