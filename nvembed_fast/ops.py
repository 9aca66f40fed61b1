"""The only place that chooses between Triton and PyTorch.

`auto` takes the Triton kernel for tensors on a GPU of compute capability 8.0
or later in a dtype the kernels are written for, and the PyTorch reference
everywhere else, also for a shape beyond a kernel's limits. `triton` and `torch`
force one, and raise where it cannot run: nothing falls back to another meaning.
"""

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import nn

from nvembed_fast.kernels import reference

Impl = Literal["auto", "triton", "torch"]
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_impl: contextvars.ContextVar[Impl] = contextvars.ContextVar("nvembed_fast_impl", default="auto")


def check_impl(impl: str) -> Impl:
    """`impl` itself, or a ValueError that names the choices."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(map(repr, get_args(Impl)))}, got {impl!r}")
    return impl


@contextlib.contextmanager
def use_impl(impl: Impl) -> Iterator[None]:
    """Force an implementation inside a `with` block (models, tests, benchmarks, debugging)."""
    token = _impl.set(check_impl(impl))
    try:
        yield
    finally:
        _impl.reset(token)


def choose(device: torch.device, dtype: torch.dtype) -> tuple[Literal["triton", "torch"], str]:
    """The implementation that tensors of this device and dtype take under the current `use_impl`, and why.

    Raises:
        ValueError: `triton` is asked for where it cannot run.
    """
    impl = _impl.get()
    if impl == "torch":
        return "torch", "it was asked for"
    obstacle = _triton_obstacle(device, dtype)
    if obstacle is None and (impl == "triton" or device.type == "cuda"):
        return "triton", "it was asked for" if impl == "triton" else "the kernels are written for this GPU"
    if impl == "triton":
        raise ValueError(f"impl='triton' cannot run here: {obstacle}. Use impl='auto' or impl='torch'.")
    return "torch", obstacle or "tensors are on the CPU"


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _has_triton():
        return "the package triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"the kernels are not written for {dtype}"
    if device.type == "cuda":
        capability = _capability(device.index)
        if capability < (8, 0):
            return "the kernels need a GPU of compute capability 8.0 or later, got {}.{}".format(*capability)
        return None
    if device.type == "cpu" and _interpreting():
        return "bf16 is computed wrongly by the Triton interpreter" if dtype == torch.bfloat16 else None
    return f"tensors are on {device.type}, not on a GPU; TRITON_INTERPRET=1 runs the kernels on a CPU, slowly"


@functools.cache
def _kernel(module: str, name: str) -> tuple[Callable, type[ValueError]]:
    """A kernel, and the error by which it declines a problem before anything has run."""
    common = importlib.import_module("nvembed_fast.kernels._common")
    return getattr(importlib.import_module(f"nvembed_fast.kernels.{module}"), name), common.Unsupported


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


# operation -> the file in kernels/ that has its kernel
KERNEL_FILES: dict[str, str] = {}


def _op(reference_fn: Callable, module: str) -> Callable:
    """The public operation: `reference_fn`, or the kernel of the same name in `kernels/<module>.py`."""
    name = reference_fn.__name__
    KERNEL_FILES[name] = module

    @functools.wraps(reference_fn)
    def op(x, *args, **kwargs):
        chosen, _ = choose(x.device, x.dtype)
        if chosen == "torch":
            return reference_fn(x, *args, **kwargs)
        if torch.is_grad_enabled() and any(
            isinstance(t, torch.Tensor) and t.requires_grad for t in (x, *args)
        ):
            raise ValueError(
                f"{name} has no backward pass in Triton yet: use impl='torch' where gradients are needed, or "
                "torch.no_grad() where they are not"
            )
        kernel, unsupported = _kernel(module, name)
        try:
            # Triton launches on the current device, whatever device the tensors are on
            with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
                return kernel(x, *args, **kwargs)
        except unsupported:
            if _impl.get() == "triton":
                raise
            return reference_fn(x, *args, **kwargs)

    return op


flash_attention = _op(reference.flash_attention, "flash_attention")
latent_attention = _op(reference.latent_attention, "latent_attention")
absorbed_latent_attention = _op(reference.absorbed_latent_attention, "latent_attention")
mean_pool = _op(reference.mean_pool, "mean_pool")
mean_pool_geglu = _op(reference.mean_pool_geglu, "mean_pool")
rms_norm = _op(reference.rms_norm, "rms_norm")
add_rms_norm = _op(reference.add_rms_norm, "rms_norm")
rotary = _op(reference.rotary, "rotary")
swiglu = _op(reference.swiglu, "gated")
geglu = _op(reference.geglu, "gated")

# a matrix product is a library's on every device
linear = reference.linear


class Linear(nn.Linear):
    """`torch.nn.Linear` through `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)
