"""RMSNorm, alone and behind a residual add. Contract: `reference.rms_norm`, `reference.add_rms_norm`.

A program owns one row, or a few short ones, and keeps it in registers: x is
read once and every output written once. The residual sum is rounded to the
dtype before the statistics are taken, because the next block reads this h.
The tile follows from D alone, so a row's result never depends on the others.

Backward, with r = 1 / rms(h), n = h r, g = dy * weight:

    dh = dh_out + r (g - n mean(g n))        the gradient of x and of the residual alike
    dweight = sum over tokens of dy * n

1. A program walks ROWS rows, writes dh, and keeps its share of dweight in fp32
   registers until the end.
2. The shares, one row each, are added in their order: nothing is atomic, and
   no tile depends on T.

Only h is saved, which the residual stream holds anyway. r costs less to compute
again, from the row in registers, than to read.

Prefixes inside kernels: i_ index, o_ offsets, m_ mask, b_ block in registers.
"""

import functools

import torch
import triton
import triton.language as tl

from nvembed_fast.kernels import tuned
from nvembed_fast.kernels._common import (
    capability,
    is_dispatched,
    launch,
    operands,
    replayed,
    with_contiguous_rows,
)
from nvembed_fast.kernels.errors import (
    Unsupported,
    check_add_rms_norm,
    check_rms_norm,
    check_rms_norm_bwd,
)

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


@triton.jit(do_not_specialize=["num_tokens"])
def _rms_norm_bwd_kernel(
    h_ptr, stride_ht,
    weight_ptr,
    dy_ptr, stride_dyt,
    dh_out_ptr, stride_dot,
    dh_ptr, stride_dht,
    partial_ptr,
    num_tokens, eps,
    D: tl.constexpr, HAS_DH_OUT: tl.constexpr, NEEDS_DH: tl.constexpr, NEEDS_DWEIGHT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < D
    # [1, BLOCK_D]
    b_weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for i_t in range(0, ROWS, BLOCK_T):
        o_t = first + i_t + tl.arange(0, BLOCK_T)[:, None]
        m_td = m_d & (o_t < num_tokens)
        # [BLOCK_T, BLOCK_D] each
        b_h = tl.load(h_ptr + o_t * stride_ht + o_d, mask=m_td, other=0.0).to(tl.float32)
        b_dy = tl.load(dy_ptr + o_t * stride_dyt + o_d, mask=m_td, other=0.0).to(tl.float32)
        b_scale = tl.rsqrt(tl.sum(b_h * b_h, axis=1, keep_dims=True) / D + eps)
        b_n = b_h * b_scale
        if NEEDS_DWEIGHT:
            b_dweight += b_dy * b_n
        if NEEDS_DH:
            b_g = b_dy * b_weight
            b_dh = b_scale * (b_g - b_n * (tl.sum(b_g * b_n, axis=1, keep_dims=True) / D))
            if HAS_DH_OUT:
                b_dh += tl.load(dh_out_ptr + o_t * stride_dot + o_d, mask=m_td, other=0.0).to(tl.float32)
            tl.store(dh_ptr + o_t * stride_dht + o_d, b_dh, mask=m_td)
    if NEEDS_DWEIGHT:
        # [1, BLOCK_D]
        b_partial = tl.sum(b_dweight, axis=0, keep_dims=True)
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + o_d, b_partial, mask=m_d)


@triton.jit(do_not_specialize=["num_partials"])
def _rms_norm_bwd_dweight_kernel(
    partial_ptr, dweight_ptr,
    num_partials,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_p = tl.arange(0, BLOCK_P)[:, None]
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    b_acc = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    for i_p in range(0, num_partials, BLOCK_P):
        # [BLOCK_P, BLOCK_D]
        m_pd = (i_p + o_p < num_partials) & (o_d < D)
        b_acc += tl.load(partial_ptr + (i_p + o_p).to(tl.int64) * D + o_d, mask=m_pd, other=0.0)
    tl.store(dweight_ptr + o_d, tl.sum(b_acc, axis=0, keep_dims=True), mask=o_d < D)


@tuned.cache
def _launch_config(width: int, *, capability: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile and warps: 16 elements of every tensor per thread (two or four 16-byte loads), full warps."""
    block_d = triton.next_power_of_2(width)
    block_t = max(1, 1024 // block_d)
    num_warps = min(max(block_t * block_d // 512, 1), 16)
    rule = {"BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": num_warps}
    return tuned.override("rms_norm.fwd", capability, rule, width=block_d, bits=8 * dtype.itemsize)


@tuned.cache
def _bwd_launch_config(width: int, *, capability: int, dtype: torch.dtype) -> dict[str, int]:
    """8 elements of every tensor per thread: three and the share of dweight are held at once.

    A share is 4 bytes a column for ROWS rows of 4 tensors in 16 bits: at 32 rows 3 % more traffic with its
    reading back, and 512 programs for 16384 tokens, four on each SM of an H100.
    """
    block_d = triton.next_power_of_2(width)
    block_t = max(1, min(32, 256 // block_d))
    rule = {
        "ROWS": 32,
        "BLOCK_T": block_t,
        "BLOCK_D": block_d,
        "num_warps": min(max(block_t * block_d // 256, 1), 16),
    }
    return tuned.override("rms_norm.bwd", capability, rule, width=block_d, bits=8 * dtype.itemsize)


@functools.cache
def _bwd_dweight_launch_config(width: int) -> dict[str, int]:
    """Few columns a program, so that 4096 of them fill 128 programs."""
    return {"BLOCK_P": 64, "BLOCK_D": min(32, triton.next_power_of_2(width)), "num_warps": 4}


def _check_limits(x: torch.Tensor, eps: float) -> None:
    if x.shape[1] > MAX_WIDTH:
        raise Unsupported(f"x must have at most {MAX_WIDTH} columns for this kernel, got {x.shape[1]}")
    if not eps > 0:
        # rows of zeros are read beyond the last token
        raise Unsupported(f"eps must be positive for this kernel, got {eps}")


@replayed
def _launch_fwd(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h). Without a residual h is x itself."""
    if residual is None:
        check_rms_norm(x, weight, eps)
    else:
        check_add_rms_norm(x, residual, weight, eps)
    _check_limits(x, eps)
    num_tokens, width = x.shape
    y = x.new_empty(num_tokens, width)
    h = x if residual is None else x.new_empty(num_tokens, width)
    if num_tokens == 0:
        return y, h
    config = _launch_config(width, capability=capability(x.device), dtype=x.dtype)
    launch(
        _rms_norm_fwd_kernel,
        triton.cdiv(num_tokens, config["BLOCK_T"]),
        **operands(("x", x, "t"), ("residual", residual, "t"), ("y", y, "t")),
        **operands(("h", None if residual is None else h, "t")),
        weight_ptr=weight,
        num_tokens=num_tokens,
        eps=eps,
        D=width,
        HAS_RESIDUAL=residual is not None,
        **config,
    )
    return y, h


def _launch_bwd(
    h: torch.Tensor,
    weight: torch.Tensor,
    dy: torch.Tensor,
    dh_out: torch.Tensor | None,
    eps: float,
    needs_dh: bool,
    needs_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dh, dweight). One that is not needed is empty."""
    num_tokens, width = h.shape
    dh = h.new_empty(num_tokens if needs_dh else 0, width)
    if num_tokens == 0:
        return dh, weight.new_zeros(width if needs_dweight else 0)
    dweight = weight.new_empty(width if needs_dweight else 0)
    dy = with_contiguous_rows(dy)
    dh_out = None if dh_out is None else with_contiguous_rows(dh_out)
    config = _bwd_launch_config(width, capability=capability(h.device), dtype=h.dtype)
    num_programs = triton.cdiv(num_tokens, config["ROWS"])
    partial = h.new_empty(num_programs, width, dtype=torch.float32) if needs_dweight else None
    launch(
        _rms_norm_bwd_kernel,
        num_programs,
        **operands(("h", h, "t"), ("dy", dy, "t"), ("dh", dh if needs_dh else None, "t")),
        dh_out_ptr=dh_out,
        stride_dot=0 if dh_out is None else dh_out.stride(0),
        weight_ptr=weight,
        partial_ptr=partial,
        num_tokens=num_tokens,
        eps=eps,
        D=width,
        HAS_DH_OUT=dh_out is not None,
        NEEDS_DH=needs_dh,
        NEEDS_DWEIGHT=needs_dweight,
        **config,
    )
    if needs_dweight:
        config = _bwd_dweight_launch_config(width)
        launch(
            _rms_norm_bwd_dweight_kernel,
            triton.cdiv(width, config["BLOCK_D"]),
            partial_ptr=partial,
            dweight_ptr=dweight,
            num_partials=num_programs,
            D=width,
            **config,
        )
    return dh, dweight


@torch.library.custom_op("nvembed_fast::rms_norm", mutates_args=())
def _rms_norm_op(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _launch_fwd(x, None, weight, eps)[0]


@_rms_norm_op.register_fake
def _rms_norm_fake(x, weight, eps):
    return x.new_empty(x.shape)


@torch.library.custom_op("nvembed_fast::add_rms_norm", mutates_args=())
def _add_rms_norm_op(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch_fwd(x, residual, weight, eps)


@_add_rms_norm_op.register_fake
def _add_rms_norm_fake(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("nvembed_fast::rms_norm_bwd", mutates_args=())
def _rms_norm_bwd_op(
    h: torch.Tensor,
    weight: torch.Tensor,
    dy: torch.Tensor,
    dh_out: torch.Tensor | None,
    eps: float,
    needs_dh: bool,
    needs_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_rms_norm_bwd(h, weight, dy, dh_out, eps)
    _check_limits(h, eps)
    return _launch_bwd(h, weight, dy, dh_out, eps, needs_dh, needs_dweight)


@_rms_norm_bwd_op.register_fake
def _rms_norm_bwd_fake(h, weight, dy, dh_out, eps, needs_dh, needs_dweight):
    width = h.shape[1]
    return h.new_empty(h.shape[0] if needs_dh else 0, width), weight.new_empty(width if needs_dweight else 0)


def _save(ctx, inputs, output) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, dy):
    h, weight = ctx.saved_tensors
    needs_dx, needs_dweight, _ = ctx.needs_input_grad
    dx, dweight = _rms_norm_bwd_op(h, weight, dy, None, ctx.eps, needs_dx, needs_dweight)
    return dx if needs_dx else None, dweight if needs_dweight else None, None


_rms_norm_op.register_autograd(_differentiate, setup_context=_save)


def _save_add(ctx, inputs, output) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)
    # the last norm's h goes nowhere: zeros would be written and read for it
    ctx.set_materialize_grads(False)


def _differentiate_add(ctx, dy, dh_out):
    h, weight = ctx.saved_tensors
    needs_dx, needs_dresidual, needs_dweight, _ = ctx.needs_input_grad
    if dy is None:
        return dh_out if needs_dx else None, dh_out if needs_dresidual else None, None, None
    needs_dh = needs_dx or needs_dresidual
    dh, dweight = _rms_norm_bwd_op(h, weight, dy, dh_out, ctx.eps, needs_dh, needs_dweight)
    dweight = dweight if needs_dweight else None
    return dh if needs_dx else None, dh if needs_dresidual else None, dweight, None


_add_rms_norm_op.register_autograd(_differentiate_add, setup_context=_save_add)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Triton version of `reference.rms_norm`: same arguments, same result."""
    if is_dispatched(x, weight):
        check_rms_norm(x, weight, eps)
        _check_limits(x, eps)
        return _rms_norm_op(x, weight, eps)
    return _launch_fwd(x, None, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton version of `reference.add_rms_norm`: same arguments, same result."""
    if is_dispatched(x, residual, weight):
        check_add_rms_norm(x, residual, weight, eps)
        _check_limits(x, eps)
        return _add_rms_norm_op(x, residual, weight, eps)
    return _launch_fwd(x, residual, weight, eps)
