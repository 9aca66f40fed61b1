"""RMSNorm, alone and behind a residual add. Contract: `reference.rms_norm`, `reference.add_rms_norm`.

A program owns one row, or a few short ones, and keeps it in registers: x is
read once and every output written once. The residual sum is rounded to the
dtype before the statistics are taken, because h is what the next block reads.
The tile follows from D alone, so a row's result never depends on the others.

Prefixes inside kernels: i_ index, o_ offsets, m_ mask, b_ block in registers.
"""

import functools

import torch
import triton
import triton.language as tl

from nvembed_fast.kernels._common import COMPILE_OPTIONS
from nvembed_fast.kernels.errors import Unsupported, mismatch

__all__ = ["add_rms_norm", "rms_norm"]

MAX_WIDTH = 16384  # a row has to fit the registers of one program


# T changes with every batch: specialising on its value would only compile the same code again
@triton.jit(do_not_specialize=["num_tokens"])
def _rms_norm_fwd_kernel(
    x_ptr, stride_xt,
    residual_ptr, stride_rt,
    weight_ptr,
    y_ptr, stride_yt,
    h_ptr, stride_ht,
    num_tokens, eps,
    D: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    # one row per program always exists
    m_td = (o_d < D) if BLOCK_T == 1 else (o_d < D) & (o_t < num_tokens)

    # [BLOCK_T, BLOCK_D]
    b_h = tl.load(x_ptr + o_t * stride_xt + o_d, mask=m_td, other=0.0)
    if HAS_RESIDUAL:
        b_residual = tl.load(residual_ptr + o_t * stride_rt + o_d, mask=m_td, other=0.0)
        b_h = (b_h.to(tl.float32) + b_residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(h_ptr + o_t * stride_ht + o_d, b_h, mask=m_td)
    # [1, BLOCK_D]
    b_weight = tl.load(weight_ptr + o_d, mask=o_d < D, other=0.0)

    b_wide = b_h.to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_wide * b_wide, axis=1, keep_dims=True) / D + eps)
    b_y = (b_wide * b_scale).to(x_ptr.dtype.element_ty) * b_weight
    tl.store(y_ptr + o_t * stride_yt + o_d, b_y, mask=m_td)


@functools.cache
def _launch_config(width: int) -> dict[str, int]:
    """Tile and warps: 16 elements of every tensor per thread (two or four 16-byte loads), full warps."""
    block_d = triton.next_power_of_2(width)
    block_t = max(1, 1024 // block_d)
    num_warps = min(max(block_t * block_d // 512, 1), 16)
    return {"BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": num_warps}


def _check(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> None:
    if x.ndim != 2 or x.stride(1) != 1 or x.shape[1] == 0:
        raise mismatch("x", "[T, D] with contiguous rows and D > 0", x)
    width = x.shape[1]
    if width > MAX_WIDTH:
        raise Unsupported(f"x must have at most {MAX_WIDTH} columns for this kernel, got {width}")
    fits = weight.shape == (width,) and weight.dtype == x.dtype and weight.device == x.device
    if not fits or weight.stride(0) != 1:
        raise mismatch("weight", f"[{width}] {x.dtype} on {x.device}, contiguous", weight)
    if residual is not None:
        fits = residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device
        if not fits or residual.stride(1) != 1:
            wanted = f"{tuple(x.shape)} {x.dtype} on {x.device} as x, with contiguous rows"
            raise mismatch("residual", wanted, residual)


def _rms_norm_fwd(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h); h is x itself without a residual."""
    num_tokens, width = x.shape
    y = x.new_empty(num_tokens, width)
    h = x if residual is None else x.new_empty(num_tokens, width)
    if num_tokens == 0:
        return y, h
    config = _launch_config(width)
    _rms_norm_fwd_kernel[(triton.cdiv(num_tokens, config["BLOCK_T"]),)](
        x_ptr=x,
        stride_xt=x.stride(0),
        residual_ptr=residual,
        stride_rt=0 if residual is None else residual.stride(0),
        weight_ptr=weight,
        y_ptr=y,
        stride_yt=y.stride(0),
        h_ptr=None if residual is None else h,
        stride_ht=h.stride(0),
        num_tokens=num_tokens,
        eps=eps,
        D=width,
        HAS_RESIDUAL=residual is not None,
        **config,
        **COMPILE_OPTIONS,
    )
    return y, h


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Triton version of `reference.rms_norm`: same arguments, same result."""
    _check(x, weight, None)
    return _rms_norm_fwd(x, None, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton version of `reference.add_rms_norm`: same arguments, same result."""
    _check(x, weight, residual)
    return _rms_norm_fwd(x, residual, weight, eps)
