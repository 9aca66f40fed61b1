"""Every kernel by PyTorch's own operations: fast on a GPU where a kernel cannot run.

Contract: `reference.x` for every x. An operation that the reference already
gives by PyTorch's best is the reference's own. The others differ:

- Attention takes a fused form of SDPA wherever there is one. None of them shares
  key and value heads in fp32 or before compute capability 8.0, so the heads are
  repeated there. Texts of one length are one call. A batch with many lengths out
  of order is sorted by length first. Padding would save calls, but a mask rules out
  FlashAttention, and a batch of `encode` is sorted already.
- A ragged batch goes to `varlen_attn` in one call, after it has proven itself in
  this process: see `_varlen_is_proven`.
- Norms, rotary and pooling read 16 bits and compute in fp32 inside one operation,
  where the reference writes an fp32 copy of its input first.

Which form of SDPA runs is PyTorch's choice. cuDNN's is faster on an H100, but it
builds a plan for every shape, and texts have many lengths. Nothing here waits for
the device but the one check of `varlen_attn`.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nvembed_fast.kernels import reference
from nvembed_fast.kernels.errors import (
    check_add_rms_norm,
    check_flash_attention,
    check_mean_pool,
    check_mean_pool_geglu,
    check_rms_norm,
    check_rotary,
)
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.kernels.modes import is_transformed, own_graph
from nvembed_fast.kernels.reference import (
    absorbed_latent_attention,
    geglu,
    latent_attention,
    masked_lse,
    swiglu,
)

__all__ = [
    "absorbed_latent_attention",
    "add_rms_norm",
    "flash_attention",
    "geglu",
    "latent_attention",
    "masked_lse",
    "mean_pool",
    "mean_pool_geglu",
    "rms_norm",
    "rotary",
    "swiglu",
]

# tokens of a GEGLU in fp32 at a time: NV-Embed's 32768 columns take 256 MiB
MAX_ROWS = 2048
# beyond these FlashAttention does not run
MIN_CAPABILITY, MAX_HEAD_WIDTH = (8, 0), 256
# texts for the check of varlen_attn: one token, none, more than one tile
CHECKED_LENGTHS = (5, 1, 0, 150, 33)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SeqLayout,
    scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`reference.flash_attention` by fused SDPA or varlen_attn. With return_lse it is the reference."""
    if return_lse:
        # no public function of PyTorch gives the lse with its gradient
        return reference.flash_attention(q, k, v, layout, scale, causal, return_lse)
    check_flash_attention(q, k, v, layout, scale, causal)
    if len(layout.runs()) > 1 and _varlen_is_proven(q, k):
        return _by_varlen(q, k, v, layout, scale, causal)
    order = None if torch.compiler.is_compiling() else layout.by_length()
    if order is None:
        return _by_sdpa(q, k, v, layout, scale, causal)
    q, k, v = (t.index_select(0, order.rows) for t in (q, k, v))
    return _by_sdpa(q, k, v, order.layout, scale, causal).index_select(0, order.places)


def _by_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SeqLayout, scale: float | None, causal: bool
) -> torch.Tensor:
    """[T, N, H] by one call for each run of equal lengths."""
    group = q.shape[1] // k.shape[1]
    if group > 1 and not _shares_heads(q):
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    outs = []
    for run in layout.runs():
        shape = run.num_seqs, run.length
        q_run, k_run, v_run = (t[run.rows].unflatten(0, shape).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(
            q_run, k_run, v_run, scale=scale, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    if len(outs) == 1:
        return outs[0].contiguous()  # as a rule it is, and torch.cat would copy it
    return torch.cat(outs) if outs else torch.zeros_like(q)


def _shares_heads(q: torch.Tensor) -> bool:
    """Whether a fused form of SDPA reads one key head for several query heads."""
    return q.is_cpu or _has_flash(q)


def _has_flash(q: torch.Tensor) -> bool:
    """Whether FlashAttention runs on these queries."""
    if not q.is_cuda or q.itemsize != 2 or q.shape[2] > MAX_HEAD_WIDTH:
        return False
    # torch.compile reads no capability, but these
    properties = torch.cuda.get_device_properties(q.device)
    return (properties.major, properties.minor) >= MIN_CAPABILITY


def _by_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SeqLayout, scale: float | None, causal: bool
) -> torch.Tensor:
    """[T, N, H] by one call for all texts."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = layout.cu_seqlens, layout.max_length
    out = varlen_attn(
        q,
        k,
        v,
        starts,
        starts,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out


# a plain dictionary, because torch.compile warns of functools.cache
_varlen_verdicts: dict[tuple, bool] = {}


def _varlen_is_proven(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether varlen_attn equals SDPA for such tensors, forward and backward, on this device.

    It has no CPU form, so no test of this project has seen it run. It is compared with SDPA at its first use,
    which waits for the device once. It is not used before that, and not under torch.compile, torch.func and
    forward mode.
    """
    if torch.compiler.is_compiling() or is_transformed() or not _has_flash(q):
        return False
    key = q.device, q.dtype, q.shape[1:], k.shape[1:]
    if key not in _varlen_verdicts:
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        try:
            with own_graph():
                _varlen_verdicts[key] = _check_varlen(q, k)
        except torch.OutOfMemoryError:  # says nothing of varlen_attn
            return False
    return _varlen_verdicts[key]


def _check_varlen(q: torch.Tensor, k: torch.Tensor) -> bool:
    layout = SeqLayout(CHECKED_LENGTHS, q.device)
    g = torch.Generator().manual_seed(0)
    shapes = (q.shape[1:], k.shape[1:], k.shape[1:], q.shape[1:])
    drawn = (
        torch.randn(layout.num_tokens, *s, generator=g, dtype=torch.float32, device="cpu") for s in shapes
    )
    *inputs, dout = (t.to(q.device, q.dtype) for t in drawn)
    try:
        return all(
            _is_close(*(_with_gradients(fn, inputs, dout, layout, causal) for fn in (_by_varlen, _by_sdpa)))
            for causal in (False, True)
        )
    except torch.OutOfMemoryError:
        raise
    except (ImportError, TypeError, RuntimeError):
        # an older torch without it or without an argument, or a build without FlashAttention
        return False


def _with_gradients(
    attend: Callable, inputs: list[torch.Tensor], dout: torch.Tensor, layout: SeqLayout, causal: bool
) -> tuple[torch.Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = attend(*leaves, layout, 0.1, causal)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def _is_close(got: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> bool:
    """Within a few roundings of the largest value. NaN is never close."""
    errors = (((g - w).abs().max(), w.abs().max()) for g, w in zip(got, wanted, strict=True))
    return all(bool(error <= 8 * torch.finfo(got[0].dtype).eps * largest) for error, largest in errors)


def mean_pool(x: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None = None) -> torch.Tensor:
    """`reference.mean_pool` without an fp32 copy of the tokens."""
    check_mean_pool(x, layout, pool_mask)
    return _pool(x, layout, pool_mask, x.shape[1])


def mean_pool_geglu(
    value_gate: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`reference.mean_pool_geglu` with MAX_ROWS tokens in fp32 at a time."""
    check_mean_pool_geglu(value_gate, layout, pool_mask)
    return _pool(value_gate, layout, pool_mask, value_gate.shape[1] // 2, is_gated=True)


def _pool(
    x: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None, width: int, is_gated: bool = False
) -> torch.Tensor:
    """[B, width] means, run by run."""
    wide = torch.promote_types(x.dtype, torch.float32)
    means = torch.zeros(len(layout), width, dtype=wide, device=x.device)
    for run in layout.runs():
        shape = run.num_seqs, run.length
        step = max(1, MAX_ROWS // run.num_seqs) if is_gated else run.length
        tokens = x[run.rows].unflatten(0, shape).split(step, dim=1)
        keep = None if pool_mask is None else pool_mask[run.rows].view(*shape, 1)
        kept = [None] * len(tokens) if keep is None else keep.split(step, dim=1)
        sums = (_sum(t, mask, wide, is_gated) for t, mask in zip(tokens, kept, strict=True))
        count = run.length if keep is None else keep.sum(1).clamp_min(1)
        means[run.seqs] = functools.reduce(torch.add, sums) / count
    return means


def _sum(tokens: torch.Tensor, keep: torch.Tensor | None, wide: torch.dtype, is_gated: bool) -> torch.Tensor:
    """[b, width] sums of [b, s, columns] tokens in the wide dtype."""
    if keep is not None:
        # where, not a product: 0 * NaN is NaN. Before the GEGLU, whose gradient is such a product
        tokens = torch.where(keep, tokens, 0.0)
    if is_gated:
        value, gate = tokens.to(wide).chunk(2, dim=-1)
        tokens = value * F.gelu(gate)
    return tokens.sum(1, dtype=wide)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`reference.rms_norm`: PyTorch's norm computes in fp32 and rounds, then the weight is multiplied."""
    check_rms_norm(x, weight, eps)
    return F.rms_norm(x, x.shape[1:], None, eps) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.add_rms_norm`."""
    check_add_rms_norm(x, residual, weight, eps)
    h = x + residual
    return rms_norm(h, weight, eps), h


def rotary(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    num_rotated: int,
    inplace: bool = False,
) -> torch.Tensor:
    """`reference.rotary`. Where autograd records it is the reference itself, which rounds a gradient once."""
    if is_transformed() or (torch.is_grad_enabled() and qkv.requires_grad):
        return reference.rotary(qkv, cos, sin, positions, num_rotated, inplace)
    check_rotary(qkv, cos, sin, positions, num_rotated, inplace)
    cos_T1h, sin_T1h = (table.index_select(0, positions)[:, None] for table in (cos, sin))
    out = qkv if inplace else qkv.clone()
    halves = out[:, :num_rotated].chunk(2, dim=-1)
    first, second = halves
    # 16 bits times fp32 is fp32, without a copy of the 16 bits
    turned = (
        torch.addcmul(first * cos_T1h, second, sin_T1h, value=-1),
        torch.addcmul(second * cos_T1h, first, sin_T1h),
    )
    for half, new in zip(halves, turned, strict=True):
        half.copy_(new)
    return out
