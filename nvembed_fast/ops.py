"""The only place that chooses between Triton and PyTorch.

`auto` takes the Triton kernel for tensors on a GPU of compute capability 8.0
or later in a dtype the kernels are written for, and the PyTorch reference
everywhere else, also for a shape beyond a kernel's limits. `triton` and `torch`
force one, and raise where it cannot run: nothing falls back to another meaning.

Under autocast an operation takes its tensors in one dtype, as PyTorch's own do:
those built on matrix products in autocast's, the others in the widest among
their arguments.
"""

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Literal, get_args

import torch
from torch import nn

from nvembed_fast.kernels import reference
from nvembed_fast.kernels.errors import Unsupported

Impl = Literal["auto", "triton", "torch"]
HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class _State(threading.local):
    # not a ContextVar: torch.compile cannot read one
    impl: Impl = "auto"


_state = _State()


def check_impl(impl: str) -> Impl:
    """`impl` itself, or a ValueError that names the choices."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(map(repr, get_args(Impl)))}, got {impl!r}")
    return impl


@contextlib.contextmanager
def use_impl(impl: Impl) -> Iterator[None]:
    """Force an implementation inside a `with` block (models, tests, benchmarks, debugging).

    It holds for the thread. On a GPU autograd runs checkpointed layers again in a thread of its own, where
    `auto` would hold: see `checkpoint_contexts`.
    """
    before, _state.impl = _state.impl, check_impl(impl)
    try:
        yield
    finally:
        _state.impl = before


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The `context_fn` of torch.utils.checkpoint: it runs again in the same implementation."""
    return contextlib.nullcontext(), use_impl(_state.impl)


def choose(device: torch.device, dtype: torch.dtype) -> tuple[Literal["triton", "torch"], str]:
    """The implementation that tensors of this device and dtype take under the current `use_impl`, and why.

    Raises:
        ValueError: `triton` is asked for where it cannot run.
    """
    impl = _state.impl
    if impl == "torch":
        return "torch", "it was asked for"
    obstacle = _triton_obstacle(device, dtype)
    if obstacle is None and (impl == "triton" or device.type == "cuda"):
        return "triton", "it was asked for" if impl == "triton" else "the kernels are written for this GPU"
    if impl == "triton":
        raise ValueError(f"impl='triton' cannot run here: {obstacle}. Use impl='auto' or impl='torch'.")
    return "torch", obstacle or "tensors are on the CPU"


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if not HAS_TRITON:
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


# plain dictionaries and no functools.cache: torch.compile reads these, and warns of the other
_kernels: dict[str, Callable] = {}
_capabilities: dict[int | None, tuple[int, int]] = {}


def _kernel(name: str) -> Callable:
    """The kernel of an operation."""
    if not _kernels:
        # here, because they import triton; as statements, which torch.compile follows, unlike importlib
        from nvembed_fast.kernels import flash_attention, gated, latent_attention, mean_pool, rms_norm, rotary

        for module in (flash_attention, gated, latent_attention, mean_pool, rms_norm, rotary):
            for kernel in module.__all__:
                _kernels[kernel] = getattr(module, kernel)
    return _kernels[name]


def _capability(index: int | None) -> tuple[int, int]:
    if index not in _capabilities:
        properties = torch.cuda.get_device_properties(index)
        _capabilities[index] = properties.major, properties.minor
    return _capabilities[index]


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


OPERATIONS: list[str] = []


def _op(reference_fn: Callable, autocast: Literal["lower", "widest"] | None = None) -> Callable:
    """The public operation: `reference_fn`, or the kernel of the same name.

    Args:
        autocast: the dtype that all floating tensors take under autocast: autocast's own, or the widest among
            them. None leaves them as they are.
    """
    name = reference_fn.__name__
    OPERATIONS.append(name)

    @functools.wraps(reference_fn)
    def op(x, *args, **kwargs):
        if autocast is not None and torch.is_autocast_enabled(x.device.type):
            x, *args = _autocast((x, *args), autocast)
        chosen, _ = choose(x.device, x.dtype)
        if chosen == "torch":
            return reference_fn(x, *args, **kwargs)
        kernel = _kernel(name)
        try:
            if not x.is_cuda or torch.compiler.is_compiling():
                return kernel(x, *args, **kwargs)
            # Triton launches on the current device, whatever device the tensors are on
            with torch.cuda.device(x.device):
                return kernel(x, *args, **kwargs)
        except Unsupported:
            if _state.impl == "triton":
                raise
            return reference_fn(x, *args, **kwargs)

    return op


def _autocast(args: tuple, policy: Literal["lower", "widest"]) -> list:
    """The arguments with all floating tensors in one dtype. float64 is left alone, as PyTorch does."""
    dtypes = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    if torch.float64 in dtypes:
        return list(args)
    lower = torch.get_autocast_dtype(args[0].device.type)
    dtype = lower if policy == "lower" else functools.reduce(torch.promote_types, dtypes)
    return [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


flash_attention = _op(reference.flash_attention, autocast="lower")
latent_attention = _op(reference.latent_attention, autocast="lower")
absorbed_latent_attention = _op(reference.absorbed_latent_attention, autocast="lower")
mean_pool = _op(reference.mean_pool)
mean_pool_geglu = _op(reference.mean_pool_geglu)
rms_norm = _op(reference.rms_norm, autocast="widest")
add_rms_norm = _op(reference.add_rms_norm, autocast="widest")
rotary = _op(reference.rotary)
swiglu = _op(reference.swiglu)
geglu = _op(reference.geglu)

# a matrix product is a library's on every device
linear = reference.linear


class Linear(nn.Linear):
    """`torch.nn.Linear` through `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)
