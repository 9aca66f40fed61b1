"""Rotary position embedding on a packed QKV product. Contract: `reference.rotary`.

A program owns one token: its row of the tables is read once and serves all
heads, which are loaded as one tile of first halves and one of second halves.
In place the values, and any head that does not turn, are never touched.

Backward: the same kernel turns the gradient back, by the negative angle. The
tables and the positions are saved, nothing of the token.

Prefixes inside kernels: i_ index, o_ offsets, m_ mask, b_ block in registers.
"""

import functools

import torch
import triton
import triton.language as tl

from nvembed_fast.kernels._common import is_dispatched, launch, operands, replayed, with_contiguous_rows
from nvembed_fast.kernels.errors import check_rotary

__all__ = ["rotary"]


@triton.jit
def _rotary_fwd_kernel(
    qkv_ptr, stride_qt, stride_qn,
    out_ptr, stride_ot, stride_on,
    cos_ptr, stride_cp,
    sin_ptr, stride_sp,
    positions_ptr,
    HALF: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_ROTATED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    i_pos = tl.load(positions_ptr + i_t).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)[:, None]
    o_h = tl.arange(0, BLOCK_H)[None, :]
    m_h = o_h < HALF
    m_nh = (o_n < NUM_HEADS) & m_h

    # [BLOCK_N, BLOCK_H] each, issued before the tables, which wait for the position
    o_in = i_t * stride_qt + o_n * stride_qn + o_h
    b_first = tl.load(qkv_ptr + o_in, mask=m_nh, other=0.0)
    b_second = tl.load(qkv_ptr + o_in + HALF, mask=m_nh, other=0.0)
    # [1, BLOCK_H]
    b_cos = tl.load(cos_ptr + i_pos * stride_cp + o_h, mask=m_h, other=0.0)
    b_sin = tl.load(sin_ptr + i_pos * stride_sp + o_h, mask=m_h, other=0.0)

    if INVERSE:
        b_sin = -b_sin
    b_first, b_second = b_first.to(tl.float32), b_second.to(tl.float32)
    b_out_first = b_first * b_cos - b_second * b_sin
    b_out_second = b_second * b_cos + b_first * b_sin
    if NUM_HEADS > NUM_ROTATED:
        # chosen, not multiplied by 1 and 0: an infinite value must pass through
        b_out_first = tl.where(o_n < NUM_ROTATED, b_out_first, b_first)
        b_out_second = tl.where(o_n < NUM_ROTATED, b_out_second, b_second)
    o_out = i_t * stride_ot + o_n * stride_on + o_h
    tl.store(out_ptr + o_out, b_out_first, mask=m_nh)
    tl.store(out_ptr + o_out + HALF, b_out_second, mask=m_nh)


@functools.cache
def _launch_config(num_heads: int, head_width: int) -> dict[str, int]:
    """Tile over the heads to write, and warps: 32 elements per thread, half of them from each half."""
    block_n = triton.next_power_of_2(num_heads)
    block_h = triton.next_power_of_2(head_width // 2)
    # more threads than a table row has elements: else the compiler moves the whole tile into the layout of
    # the tables and back, through shared memory (seen in the code of Triton 3.7.1)
    num_warps = min(max(block_n * block_h // 512, block_h // 16, 1), 16)
    return {"BLOCK_N": block_n, "BLOCK_H": block_h, "num_warps": num_warps}


@replayed
def _launch_fwd(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    num_rotated: int,
    inplace: bool = False,
    inverse: bool = False,
) -> torch.Tensor:
    check_rotary(qkv, cos, sin, positions, num_rotated, inplace)
    num_tokens, num_heads, head_width = qkv.shape
    out = qkv if inplace else qkv.new_empty(qkv.shape)
    num_written = num_rotated if inplace else num_heads
    if num_tokens == 0 or num_written == 0:
        return out
    launch(
        _rotary_fwd_kernel,
        num_tokens,
        **operands(("qkv", qkv, "tn"), ("out", out, "tn"), ("cos", cos, "p"), ("sin", sin, "p")),
        positions_ptr=positions,
        HALF=head_width // 2,
        NUM_HEADS=num_written,
        NUM_ROTATED=num_rotated,
        INVERSE=inverse,
        **_launch_config(num_written, head_width),
    )
    return out


@torch.library.custom_op("nvembed_fast::rotary", mutates_args=())
def _rotary_op(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    num_rotated: int,
    inverse: bool,
) -> torch.Tensor:
    return _launch_fwd(qkv, cos, sin, positions, num_rotated, False, inverse)


@_rotary_op.register_fake
def _rotary_fake(qkv, cos, sin, positions, num_rotated, inverse):
    return qkv.new_empty(qkv.shape)


@torch.library.custom_op("nvembed_fast::rotary_", mutates_args=("qkv",))
def _rotary_inplace_op(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, num_rotated: int
) -> None:
    _launch_fwd(qkv, cos, sin, positions, num_rotated, True)


@_rotary_inplace_op.register_fake
def _rotary_inplace_fake(qkv, cos, sin, positions, num_rotated):
    return None


def _save(ctx, inputs, output) -> None:
    _, cos, sin, positions, ctx.num_rotated, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _differentiate(ctx, dout):
    # the tables are constants: they get no gradient
    dqkv = _rotary_op(with_contiguous_rows(dout), *ctx.saved_tensors, ctx.num_rotated, not ctx.inverse)
    return dqkv, None, None, None, None, None


_rotary_op.register_autograd(_differentiate, setup_context=_save)


def rotary(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    num_rotated: int,
    inplace: bool = False,
) -> torch.Tensor:
    """Triton version of `reference.rotary`: same arguments, same result."""
    if not is_dispatched(qkv):
        if inplace and not qkv.is_inference():
            torch.autograd.graph.increment_version(qkv)
        return _launch_fwd(qkv, cos, sin, positions, num_rotated, inplace)
    check_rotary(qkv, cos, sin, positions, num_rotated, inplace)
    if inplace:
        _rotary_inplace_op(qkv, cos, sin, positions, num_rotated)
        return qkv
    return _rotary_op(qkv, cos, sin, positions, num_rotated, False)
