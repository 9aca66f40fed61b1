"""What all launchers share: compile options, the target, scratch memory for descriptors, checks."""

import functools

import torch
import triton
import triton.language as tl

# passed to every launch: the default of enable_fp_fusion differs between Triton versions
COMPILE_OPTIONS = {"enable_fp_fusion": True}
LOG2E = tl.constexpr(1.4426950408889634)


def capability(device: torch.device) -> int:
    """80 for compute capability 8.0, 90 for 9.0. The interpreter plays the older part: no descriptors."""
    return 80 if device.type == "cpu" else _cuda_capability(device.index)


@functools.cache
def _cuda_capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def input_precision(dtype: torch.dtype) -> str:
    """fp32 products in full precision: `tl.dot` would otherwise take TF32 on a GPU."""
    return "ieee" if dtype == torch.float32 else "tf32"


@functools.cache
def allow_descriptors() -> None:
    """Give Triton the allocator that tensor descriptors made inside a kernel need."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


def check(condition: bool, name: str, wanted: str, got: torch.Tensor) -> None:
    """ValueError that names the tensor, what it must be and what it is."""
    if not condition:
        raise ValueError(
            f"{name} must be {wanted}, got {tuple(got.shape)} {got.dtype} "
            f"with strides {got.stride()} on {got.device}"
        )
