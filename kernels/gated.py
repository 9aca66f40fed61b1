"""Gated activations of packed rows. Contract: `reference.swiglu`, `reference.geglu`.

Element by element, so the only concern is memory: a program owns a tile of
output, neighbouring programs own neighbouring tiles of a row, and each thread
has several 16-byte loads in flight. Everything between load and store is fp32.

Backward: only the input is saved (2F per token, which the product before it has
written anyway). The activation is computed again, in one pass over memory.

Prefixes inside kernels: i_ index, o_ offsets, m_ mask, b_ block in registers.
"""

import functools

import torch
import triton
import triton.language as tl

from nvembed_fast.kernels._common import (
    double_gelu,
    double_gelu_and_slope,
    is_dispatched,
    launch,
    operands,
    replayed,
    with_contiguous_rows,
)
from nvembed_fast.kernels.errors import check_gated, check_gated_bwd

__all__ = ["geglu", "swiglu"]


@triton.jit
def _silu(b_x):
    return b_x * tl.sigmoid(b_x)


# T changes with every batch: specialising on its value would only compile the same code again
@triton.jit(do_not_specialize=["num_tokens"])
def _gated_fwd_kernel(
    x_ptr, stride_xt,
    out_ptr, stride_ot,
    num_tokens,
    F: tl.constexpr, GATE_FIRST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # one axis, columns fastest: programs that run together read neighbouring memory
    num_column_blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    i_row_block = tl.program_id(0) // num_column_blocks
    i_column_block = tl.program_id(0) % num_column_blocks
    # int64: T * 2F passes 2**31 elements
    o_t = i_row_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    o_f = i_column_block * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    # one row per program always exists
    m_tf = (o_f < F) if BLOCK_T == 1 else (o_f < F) & (o_t < num_tokens)

    # [BLOCK_T, BLOCK_F] each
    b_left = tl.load(x_ptr + o_t * stride_xt + o_f, mask=m_tf, other=0.0)
    b_right = tl.load(x_ptr + o_t * stride_xt + o_f + F, mask=m_tf, other=0.0)
    b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    b_out = _silu(b_left) * b_right if GATE_FIRST else 0.5 * b_left * double_gelu(b_right)
    tl.store(out_ptr + o_t * stride_ot + o_f, b_out, mask=m_tf)


@triton.jit(do_not_specialize=["num_tokens"])
def _gated_bwd_kernel(
    x_ptr, stride_xt,
    dout_ptr, stride_dot,
    dx_ptr, stride_dxt,
    num_tokens,
    F: tl.constexpr, GATE_FIRST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    num_column_blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    i_row_block = tl.program_id(0) // num_column_blocks
    i_column_block = tl.program_id(0) % num_column_blocks
    o_t = i_row_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    o_f = i_column_block * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    m_tf = (o_f < F) if BLOCK_T == 1 else (o_f < F) & (o_t < num_tokens)

    # [BLOCK_T, BLOCK_F] each
    b_left = tl.load(x_ptr + o_t * stride_xt + o_f, mask=m_tf, other=0.0).to(tl.float32)
    b_right = tl.load(x_ptr + o_t * stride_xt + o_f + F, mask=m_tf, other=0.0).to(tl.float32)
    b_dout = tl.load(dout_ptr + o_t * stride_dot + o_f, mask=m_tf, other=0.0).to(tl.float32)
    if GATE_FIRST:
        b_sigmoid = tl.sigmoid(b_left)
        b_silu = b_left * b_sigmoid
        b_dleft = b_dout * b_right * (b_sigmoid + b_silu * (1.0 - b_sigmoid))
        b_dright = b_dout * b_silu
    else:
        b_gelu, b_slope = double_gelu_and_slope(b_right)
        b_half = 0.5 * b_dout
        b_dleft = b_half * b_gelu
        b_dright = b_half * b_left * b_slope
    tl.store(dx_ptr + o_t * stride_dxt + o_f, b_dleft, mask=m_tf)
    tl.store(dx_ptr + o_t * stride_dxt + o_f + F, b_dright, mask=m_tf)


@functools.cache
def _launch_config(width: int) -> dict[str, int]:
    """Tile and warps: 16 elements of each half per thread (two 16-byte loads in 16 bits)."""
    block_f = min(2048, triton.next_power_of_2(width))
    return {"BLOCK_T": max(1, 1024 // block_f), "BLOCK_F": block_f, "num_warps": 4 if block_f == 2048 else 2}


def _check(x: torch.Tensor, gate_first: bool) -> None:
    check_gated("gate_up" if gate_first else "value_gate", x)


@replayed
def _launch_fwd(x: torch.Tensor, gate_first: bool) -> torch.Tensor:
    _check(x, gate_first)
    num_tokens, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(num_tokens, width)
    if num_tokens == 0:
        return out
    config = _launch_config(width)
    num_programs = triton.cdiv(num_tokens, config["BLOCK_T"]) * triton.cdiv(width, config["BLOCK_F"])
    launch(
        _gated_fwd_kernel,
        num_programs,
        **operands(("x", x, "t"), ("out", out, "t")),
        num_tokens=num_tokens,
        F=width,
        GATE_FIRST=gate_first,
        **config,
    )
    return out


def _launch_bwd(x: torch.Tensor, dout: torch.Tensor, gate_first: bool) -> torch.Tensor:
    num_tokens, width = x.shape[0], x.shape[1] // 2
    dx = x.new_empty(x.shape)
    if num_tokens == 0:
        return dx
    dout = with_contiguous_rows(dout)
    config = _launch_config(width)
    num_programs = triton.cdiv(num_tokens, config["BLOCK_T"]) * triton.cdiv(width, config["BLOCK_F"])
    launch(
        _gated_bwd_kernel,
        num_programs,
        **operands(("x", x, "t"), ("dout", dout, "t"), ("dx", dx, "t")),
        num_tokens=num_tokens,
        F=width,
        GATE_FIRST=gate_first,
        **config,
    )
    return dx


@torch.library.custom_op("nvembed_fast::gated", mutates_args=())
def _gated_op(x: torch.Tensor, gate_first: bool) -> torch.Tensor:
    return _launch_fwd(x, gate_first)


@_gated_op.register_fake
def _gated_fake(x, gate_first):
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@torch.library.custom_op("nvembed_fast::gated_bwd", mutates_args=())
def _gated_bwd_op(x: torch.Tensor, dout: torch.Tensor, gate_first: bool) -> torch.Tensor:
    check_gated_bwd(x, dout)
    return _launch_bwd(x, dout, gate_first)


@_gated_bwd_op.register_fake
def _gated_bwd_fake(x, dout, gate_first):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    x, ctx.gate_first = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx, dout):
    (x,) = ctx.saved_tensors
    return _gated_bwd_op(x, dout, ctx.gate_first), None


_gated_op.register_autograd(_differentiate, setup_context=_save)


def _run(x: torch.Tensor, gate_first: bool) -> torch.Tensor:
    if is_dispatched(x):
        _check(x, gate_first)
        return _gated_op(x, gate_first)
    return _launch_fwd(x, gate_first)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Triton version of `reference.swiglu`: same arguments, same result."""
    return _run(gate_up, gate_first=True)


def geglu(value_gate: torch.Tensor) -> torch.Tensor:
    """Triton version of `reference.geglu`: same arguments, same result."""
    return _run(value_gate, gate_first=False)
