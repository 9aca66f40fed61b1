"""The only place that chooses between Triton and PyTorch.

There are three implementations of every operation, with one contract:

- `triton`: the kernel. It needs a GPU of compute capability 8.0 or later.
- `library`: PyTorch's own operations, in the form that is fast on a GPU.
- `torch`: the plain reference. It is the CPU path.

`auto` takes the kernel for tensors on a GPU, in a dtype that it is written for, once
it is proven there. Where a kernel is not proven or cannot run on a GPU, also for a
shape beyond its limits, `auto` takes the library path. On a CPU it takes the
reference. Each name forces one, and `triton` raises an error if it cannot run.
Nothing falls back to another meaning.

A kernel is proven by the self-check of `self_check.py`. It runs when a model is
loaded, or at an operation's first call, and its verdict is kept (`verdicts.py`).
Where gradients are recorded the backward must be proven, too. torch.compile cannot
run it while it traces. So what was not proven before is not taken there: load the
model by `NVEmbed.from_pretrained`, or call `prove`, before compiling.

Under autocast an operation takes its tensors in one dtype, as PyTorch's own do.
An operation built on matrix products takes autocast's dtype. A norm and the scores
of the loss take the widest dtype among their tensors.
"""

import contextlib
import functools
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import nn

from nvembed_fast import verdicts
from nvembed_fast.kernels import library, reference
from nvembed_fast.kernels.errors import Unsupported
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.kernels.modes import is_transformed

Implementation = Literal["triton", "library", "torch"]
Impl = Literal["auto", "triton", "library", "torch"]
Result = TypeVar("Result")
HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# the interpreter is silently wrong in bf16. The tests mend it (tests/exact_bf16.py)
INTERPRETED_DTYPES = (torch.float16, torch.float32)


class UnprovenKernel(UserWarning):
    """A kernel did not pass its self-check on this GPU, so that the library path takes its place."""


class _State(threading.local):
    # torch.compile cannot read a ContextVar. torch 2.11 reads an attribute of the class before the thread's
    def __init__(self) -> None:
        self.impl: Impl = "auto"


_state = _State()


def check_impl(impl: str) -> Impl:
    """`impl` itself, or a ValueError that names the choices."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(map(repr, get_args(Impl)))}, got {impl!r}")
    return cast(Impl, impl)


@contextlib.contextmanager
def use_impl(impl: Impl) -> Iterator[None]:
    """Force an implementation inside a `with` block (models, tests, benchmarks, debugging).

    It holds for one thread. On a GPU autograd runs checkpointed layers again in a thread of its own, which
    starts with `auto`: see `checkpoint_contexts`.
    """
    before, _state.impl = _state.impl, check_impl(impl)
    try:
        yield
    finally:
        _state.impl = before


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The `context_fn` of torch.utils.checkpoint: layers run again in the same implementation."""
    return contextlib.nullcontext(), _Again(_state.impl)


class _Again(threading.local):
    """`use_impl` that can be entered again: each backward through a layer enters it, in any thread."""

    def __init__(self, impl: Impl) -> None:
        self.impl = self.before = impl

    def __enter__(self) -> None:
        self.before, _state.impl = _state.impl, self.impl

    def __exit__(self, *_: object) -> None:
        _state.impl = self.before


def choose(
    device: torch.device, dtype: torch.dtype, operation: str | None = None, is_recorded: bool = False
) -> tuple[Implementation, str]:
    """The implementation that tensors of this device and dtype take under the current `use_impl`, and why.

    Args:
        device: of the first tensor, as is dtype.
        dtype: see above.
        operation: one of OPERATIONS, which must be proven. None: what `auto` takes where all are proven.
        is_recorded: autograd records it, so its backward must be proven, too.

    Raises:
        ValueError: `triton` is asked for and cannot run here.
    """
    impl = _state.impl
    if impl in ("library", "torch"):
        return cast(Implementation, impl), "it was asked for"
    obstacle = _triton_obstacle(device, dtype)
    if obstacle is None and impl == "auto" and device.type == "cuda" and operation is not None:
        obstacle = _unproven(device, dtype, operation, is_recorded)
    if obstacle is None and (impl == "triton" or device.type == "cuda"):
        return "triton", "it was asked for" if impl == "triton" else "the kernels are written for this GPU"
    if impl == "triton":
        raise ValueError(f"impl='triton' cannot run here: {obstacle}. Use impl='auto', 'library' or 'torch'.")
    return "library" if device.type == "cuda" else "torch", obstacle or "tensors are on the CPU"


def prove(
    device: torch.device, dtype: torch.dtype, *, training: bool = False, is_loss: bool = False
) -> dict[str, str]:
    """Let the self-check decide which kernels `auto` takes on a GPU, if that is not known yet.

    It takes a while once for each GPU, driver, torch and Triton, and runs in processes of its own. With
    NVEMBED_FAST_SELF_CHECK=0 in the environment all kernels count as proven. One warning (`UnprovenKernel`)
    tells of those that are not.

    Args:
        device: of the tensors. On a CPU there is nothing to prove.
        dtype: of the tensors.
        training: prove the backward, too.
        is_loss: prove the kernel of the loss, in place of those of a model.

    Returns:
        Operation -> why its kernel is not taken. Empty: all are.
    """
    if device.type != "cuda" or _triton_obstacle(device, dtype) is not None:
        return {}
    index = torch.cuda.current_device() if device.index is None else device.index
    operations = _LOSS if is_loss else tuple(name for name in OPERATIONS if name not in _LOSS)
    if (index, operations[0], dtype, training) not in _obstacles:
        _look(torch.device("cuda", index), dtype, training, operations)
    found = {name: _obstacles[index, name, dtype, training] for name in operations}
    return {name: obstacle for name, obstacle in found.items() if obstacle is not None}


def _look(device: torch.device, dtype: torch.dtype, training: bool, operations: tuple[str, ...]) -> None:
    """Fill `_obstacles` for these operations, and warn of what was not known to be wrong."""
    directions = verdicts.DIRECTIONS if training else verdicts.DIRECTIONS[:1]
    name = str(dtype).removeprefix("torch.")
    found: dict[verdicts.Item, verdicts.Finding] = {}
    if os.environ.get("NVEMBED_FAST_SELF_CHECK", "1").lower() not in ("0", "false", "off", "n", "no"):
        items = [(operation, name, direction) for operation in operations for direction in directions]
        found, why_here = verdicts.prove(device, items)
        if why_here:
            warnings.warn(
                f"the self-check of the kernels ran in this process, without a time limit: {why_here}",
                UnprovenKernel,
                stacklevel=4,
            )
    new: list[str] = []
    obstacles: dict[tuple[int | None, str, torch.dtype, bool], str | None] = {}
    for operation in operations:
        red = [f for d in directions if (f := found.get((operation, name, d))) is not None and not f.ok]
        result = "failed" if red and red[0].is_decided else "found out nothing"
        obstacle = f"its self-check {result} ({red[0].direction}): {red[0].reason}" if red else None
        if obstacle is not None and _obstacles.get((device.index, operation, dtype, False)) is None:
            new.append(f"{operation} ({red[0].direction}: {red[0].reason})")
        obstacles[device.index, operation, dtype, training] = obstacle
    # at once: other threads take the first for all
    _obstacles.update(obstacles)
    if new:
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        warnings.warn(
            f"PyTorch's library path takes the place of kernels that did not pass their self-check "
            f"on {device} in {name}: {new[0]}{more}. `nvembed-fast check` shows all",
            UnprovenKernel,
            stacklevel=4,
        )


def _unproven(device: torch.device, dtype: torch.dtype, operation: str, is_recorded: bool) -> str | None:
    """Why a kernel is not taken. In the steady state it is one look into a dictionary."""
    key = device.index, operation, dtype, is_recorded
    if key not in _obstacles:
        if torch.compiler.is_compiling():
            return "no self-check has run before torch.compile"
        found = prove(device, dtype, training=is_recorded, is_loss=operation in _LOSS)
        return found.get(operation)
    return _obstacles[key]


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if not HAS_TRITON:
        return "the package triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"the kernels are not written for {dtype}"
    if is_transformed():
        return "the kernels have no rules for forward mode or torch.func, and one of them is at work"
    if device.type == "cuda":
        capability = _capability(device.index)
        if capability < (8, 0):
            return "the kernels need a GPU of compute capability 8.0 or later, got {}.{}".format(*capability)
        return None
    if device.type == "cpu" and _interpreting():
        if not torch.compiler.is_compiling() and _is_compiler_imported():
            return "TRITON_INTERPRET was set after triton was imported: set it before Python starts"
        if dtype not in INTERPRETED_DTYPES:
            return "bf16 is computed wrongly by the Triton interpreter"
        return None
    return f"tensors are on {device.type}, not on a GPU; TRITON_INTERPRET=1 runs the kernels on a CPU, slowly"


# plain dictionaries, because torch.compile warns of functools.cache
_kernels: dict[str, Callable] = {}
_capabilities: dict[int | None, tuple[int, int]] = {}
# (GPU, operation, dtype, whether its backward counts) -> why its kernel is not taken, None if it is
_obstacles: dict[tuple[int | None, str, torch.dtype, bool], str | None] = {}


def _kernel(name: str) -> Callable:
    """The kernel of an operation."""
    if not _kernels:
        # imported here, because they import triton. torch.compile follows import statements, not importlib
        from nvembed_fast.kernels import (
            absorbed_latent_attention,
            flash_attention,
            gated,
            latent_attention,
            masked_lse,
            mean_pool,
            rms_norm,
            rotary,
        )

        # at once: another thread may look meanwhile
        _kernels.update(
            flash_attention=flash_attention.flash_attention,
            latent_attention=latent_attention.latent_attention,
            absorbed_latent_attention=absorbed_latent_attention.absorbed_latent_attention,
            mean_pool=mean_pool.mean_pool,
            mean_pool_geglu=mean_pool.mean_pool_geglu,
            rms_norm=rms_norm.rms_norm,
            add_rms_norm=rms_norm.add_rms_norm,
            rotary=rotary.rotary,
            swiglu=gated.swiglu,
            geglu=gated.geglu,
            masked_lse=masked_lse.masked_lse,
        )
    return _kernels[name]


def _capability(index: int | None) -> tuple[int, int]:
    if index not in _capabilities:
        properties = torch.cuda.get_device_properties(index)
        _capabilities[index] = properties.major, properties.minor
    return _capabilities[index]


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def _is_compiler_imported() -> bool:
    """Whether triton was imported without TRITON_INTERPRET, which it reads at its import."""
    language = sys.modules.get("triton.language")
    return language is not None and type(language.sum).__name__ != "InterpretedFunction"


def _run(reference_fn: Callable[..., Result], x: torch.Tensor, *args) -> Result:
    """`reference_fn`, or the kernel or the library's function of that name, for a first tensor like x."""
    name = reference_fn.__name__
    chosen, _ = choose(x.device, x.dtype, name, _is_recorded(x, *args))
    if chosen == "torch":
        return reference_fn(x, *args)
    if chosen == "triton":
        kernel = _kernel(name)
        try:
            return kernel(x, *args)
        except Unsupported:
            if _state.impl == "triton":
                raise
    return getattr(library, name)(x, *args)


def _is_recorded(*args: object) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in args)


def _in_lower_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast all tensors in its dtype."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return _cast(tensors, torch.get_autocast_dtype(device))


def _in_widest_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast all tensors in the widest dtype among them."""
    if not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    return _cast(tensors, functools.reduce(torch.promote_types, [t.dtype for t in tensors]))


def _cast(tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    # beside float64 all stay as they are, as in PyTorch
    if any(t.dtype == torch.float64 or not t.is_floating_point() for t in tensors):
        return tensors
    return tuple(t.to(dtype) for t in tensors)


# in the order of the reference
OPERATIONS = (
    "flash_attention",
    "latent_attention",
    "absorbed_latent_attention",
    "mean_pool",
    "mean_pool_geglu",
    "rms_norm",
    "add_rms_norm",
    "rotary",
    "swiglu",
    "geglu",
    "masked_lse",
)
# proven by itself: a model that only encodes needs none, and a model in 16 bits has its loss in fp32
_LOSS = ("masked_lse",)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SeqLayout,
    scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention inside each packed sequence. Contract: `reference.flash_attention`."""
    q, k, v = _in_lower_dtype(q, k, v)
    if not return_lse and _is_slow_on_a_cpu(q, k, v):
        with torch.autocast("cpu", enabled=False):
            out = reference.flash_attention(q.float(), k.float(), v.float(), layout, scale, causal)
            return cast(torch.Tensor, out).to(q.dtype)
    return _run(reference.flash_attention, q, k, v, layout, scale, causal, return_lse)


def _is_slow_on_a_cpu(q: torch.Tensor, *others: torch.Tensor) -> bool:
    """PyTorch's attention on a CPU: forward and backward take 2 to 4 times as long in 16 bits as in fp32.

    Measured 2026-11 with torch 2.13 on 2 cores with AMX: [64, 9, 64, 64] 71 ms in bf16, 26 ms in fp32.
    """
    # different dtypes are left to the reference, which refuses them
    is_narrow = q.dtype.itemsize == 2 and all(t.dtype == q.dtype for t in others)
    if q.device.type != "cpu" or not is_narrow or not _is_recorded(q, *others):
        return False
    return choose(q.device, q.dtype, "flash_attention", True)[0] == "torch"


def latent_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Every token attends to all latents of its head. Contract: `reference.latent_attention`."""
    q, k, v = _in_lower_dtype(q, k, v)
    return _run(reference.latent_attention, q, k, v, scale)


def absorbed_latent_attention(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, residual: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """Latent attention with its weights multiplied out. Contract: `reference.absorbed_latent_attention`."""
    x, a, b, residual = _in_lower_dtype(x, a, b, residual)
    return _run(reference.absorbed_latent_attention, x, a, b, residual, num_heads)


def mean_pool(x: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Masked mean of each packed sequence. Contract: `reference.mean_pool`."""
    return _run(reference.mean_pool, x, layout, pool_mask)


def mean_pool_geglu(
    value_gate: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`mean_pool(geglu(value_gate))` in one pass. Contract: `reference.mean_pool_geglu`."""
    return _run(reference.mean_pool_geglu, value_gate, layout, pool_mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm. Contract: `reference.rms_norm`."""
    x, weight = _in_widest_dtype(x, weight)
    return _run(reference.rms_norm, x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the norm of h, h) of h = x + residual. Contract: `reference.add_rms_norm`."""
    x, residual, weight = _in_widest_dtype(x, residual, weight)
    return _run(reference.add_rms_norm, x, residual, weight, eps)


def rotary(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    num_rotated: int,
    inplace: bool = False,
) -> torch.Tensor:
    """Rotary embedding of the leading heads of a packed QKV product. Contract: `reference.rotary`."""
    return _run(reference.rotary, qkv, cos, sin, positions, num_rotated, inplace)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. Contract: `reference.swiglu`."""
    return _run(reference.swiglu, gate_up)


def geglu(value_gate: torch.Tensor) -> torch.Tensor:
    """value * gelu(gate). Contract: `reference.geglu`."""
    return _run(reference.geglu, value_gate)


def masked_lse(
    q: torch.Tensor,
    d: torch.Tensor,
    row_scopes: torch.Tensor,
    column_scopes: torch.Tensor,
    row_keys: torch.Tensor,
    column_keys: torch.Tensor,
    limits: torch.Tensor | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log of the sum of exp(score) over the columns that a row keeps. Contract: `reference.masked_lse`."""
    q, d = _in_widest_dtype(q, d)
    masks = row_scopes, column_scopes, row_keys, column_keys
    return _run(reference.masked_lse, q, d, *masks, limits, scale)


# a matrix product is a library's on every device
linear, add_linear, add_linear_ = reference.linear, reference.add_linear, reference.add_linear_


class Linear(nn.Linear):
    """`torch.nn.Linear` through `linear`."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The product. With a residual that nobody else holds: the residual itself, summed in place."""
        if residual is not None:
            return add_linear_(residual, x, self.weight)
        return linear(x, self.weight, self.bias)
