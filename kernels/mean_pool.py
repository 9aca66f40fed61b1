"""Masked mean of packed sequences, plain or of a GEGLU. Contracts: `reference.mean_pool`, `mean_pool_geglu`.

1. One program owns one tile of the host's list, at most TOKENS tokens of one
   sequence, and BLOCK_D columns. It sums the kept rows in fp32 registers, so x
   is read once. A sequence of one tile is then divided and done.
2. The tiles of longer sequences leave partial sums. A second kernel adds those
   of each sequence in their order and divides. It starts only if there are any.

The invariant: tiles begin at the sequence, and their size follows from the
width, the dtype and the GPU. So a sequence is summed in the same order whatever
else is in the batch, and its bits never change. Nothing is atomic.

Backward: a kept token gets its sequence's gradient over the number of kept
tokens, a dropped one zeros. Saved are the mask (a byte per token) and, for the
GEGLU, its input, which is differentiated in the same pass. The plain mean saves
nothing of size [T, D].

Prefixes inside kernels: i_ index, o_ offsets, m_ mask, b_ block in registers.
"""

import functools

import torch
import triton
import triton.language as tl

from nvembed_fast.kernels import tuned
from nvembed_fast.kernels._common import (
    capability,
    double_gelu,
    double_gelu_and_slope,
    is_dispatched,
    launch,
    operands,
    with_contiguous_rows,
)
from nvembed_fast.kernels.errors import check_mean_pool, check_mean_pool_bwd, check_mean_pool_geglu
from nvembed_fast.kernels.layout import BY_HOST_LISTS, SeqLayout, layout_of

__all__ = ["mean_pool", "mean_pool_geglu"]


@triton.jit
def _mean(b_sum, count):
    # a sequence that keeps no token gives zeros. The plain fp32 division is approximate
    return tl.div_rn(b_sum, tl.maximum(count, 1.0))


@triton.jit
def _mean_pool_fwd_kernel(
    x_ptr, stride_xt,
    out_ptr, stride_ob,
    partial_ptr, stride_pt, partial_count_ptr,
    mask_ptr, tiles_ptr, cu_seqlens_ptr,
    D: tl.constexpr, GEGLU: tl.constexpr, HAS_MASK: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # the column blocks of a tile are neighbours: whole rows are read at about the same time
    NUM_BLOCKS_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i_tile = (tl.program_id(0) // NUM_BLOCKS_D).to(tl.int64)
    i_d = tl.program_id(0) % NUM_BLOCKS_D
    i_seq = tl.load(tiles_ptr + 2 * i_tile).to(tl.int64)
    first = tl.load(tiles_ptr + 2 * i_tile + 1).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + i_seq).to(tl.int64)
    stop = tl.load(cu_seqlens_ptr + i_seq + 1).to(tl.int64)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D

    b_acc = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    b_count = tl.zeros([BLOCK_T], dtype=tl.float32)
    tile_stop = tl.minimum(start + first + TOKENS, stop)
    for i_t in range(start + first, tile_stop, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        m_t = o_t < tile_stop
        if HAS_MASK:
            m_t = m_t & (tl.load(mask_ptr + o_t, mask=m_t, other=0) != 0)
        m_td = m_t[:, None] & m_d[None, :]
        # [BLOCK_T, BLOCK_D], a dropped row is never read
        x_ptrs = x_ptr + o_t[:, None] * stride_xt + o_d[None, :]
        b_x = tl.load(x_ptrs, mask=m_td, other=0.0).to(tl.float32)
        if GEGLU:
            b_x *= double_gelu(tl.load(x_ptrs + D, mask=m_td, other=0.0).to(tl.float32))
        b_acc += b_x
        b_count += m_t.to(tl.float32)

    # [BLOCK_D]
    b_sum = tl.sum(b_acc, axis=0)
    if GEGLU:
        b_sum *= 0.5
    count = tl.sum(b_count, axis=0)
    if stop - start <= TOKENS:
        tl.store(out_ptr + i_seq * stride_ob + o_d, _mean(b_sum, count), mask=m_d)
    else:
        tl.store(partial_ptr + i_tile * stride_pt + o_d, b_sum, mask=m_d)
        tl.store(partial_count_ptr + i_tile, count, mask=i_d == 0)


@triton.jit
def _mean_pool_fwd_combine_kernel(
    partial_ptr, stride_pt, partial_count_ptr,
    out_ptr, stride_ob,
    split_seqs_ptr, cu_seqlens_ptr,
    D: tl.constexpr, TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i_split = (tl.program_id(0) // NUM_BLOCKS_D).to(tl.int64)
    i_seq = tl.load(split_seqs_ptr + 2 * i_split).to(tl.int64)
    first_tile = tl.load(split_seqs_ptr + 2 * i_split + 1).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + i_seq + 1) - tl.load(cu_seqlens_ptr + i_seq)
    stop_tile = first_tile + tl.cdiv(length, TOKENS)
    o_d = (tl.program_id(0) % NUM_BLOCKS_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D

    b_acc = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    b_count = tl.zeros([BLOCK_T], dtype=tl.float32)
    for i_tile in range(first_tile, stop_tile, BLOCK_T):
        o_tile = i_tile + tl.arange(0, BLOCK_T)
        m_tile = o_tile < stop_tile
        # [BLOCK_T, BLOCK_D]
        partial_ptrs = partial_ptr + o_tile[:, None] * stride_pt + o_d[None, :]
        b_acc += tl.load(partial_ptrs, mask=m_tile[:, None] & m_d[None, :], other=0.0)
        b_count += tl.load(partial_count_ptr + o_tile, mask=m_tile, other=0.0)
    b_out = _mean(tl.sum(b_acc, axis=0), tl.sum(b_count, axis=0))
    tl.store(out_ptr + i_seq * stride_ob + o_d, b_out, mask=m_d)


@triton.jit
def _mean_pool_bwd_kernel(
    x_ptr, stride_xt,
    dout_ptr, stride_dob,
    dx_ptr, stride_dxt,
    count_ptr, mask_ptr, tiles_ptr, cu_seqlens_ptr,
    D: tl.constexpr, GEGLU: tl.constexpr, HAS_MASK: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i_tile = (tl.program_id(0) // NUM_BLOCKS_D).to(tl.int64)
    i_seq = tl.load(tiles_ptr + 2 * i_tile).to(tl.int64)
    first = tl.load(tiles_ptr + 2 * i_tile + 1).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + i_seq).to(tl.int64)
    stop = tl.load(cu_seqlens_ptr + i_seq + 1).to(tl.int64)
    o_d = (tl.program_id(0) % NUM_BLOCKS_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D

    if HAS_MASK:
        count = tl.maximum(tl.load(count_ptr + i_seq), 1).to(tl.float32)
    else:
        count = (stop - start).to(tl.float32)
    # [BLOCK_D]
    b_mean = tl.load(dout_ptr + i_seq * stride_dob + o_d, mask=m_d, other=0.0).to(tl.float32) / count
    tile_stop = tl.minimum(start + first + TOKENS, stop)
    for i_t in range(start + first, tile_stop, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        m_t = o_t < tile_stop
        m_td = m_t[:, None] & m_d[None, :]
        m_keep = m_t
        if HAS_MASK:
            m_keep = m_t & (tl.load(mask_ptr + o_t, mask=m_t, other=0) != 0)
        # [BLOCK_T, BLOCK_D], a dropped row is written as zeros and never read
        b_dout = tl.where(m_keep[:, None], b_mean[None, :], 0.0)
        dx_ptrs = dx_ptr + o_t[:, None] * stride_dxt + o_d[None, :]
        if GEGLU:
            x_ptrs = x_ptr + o_t[:, None] * stride_xt + o_d[None, :]
            m_x = m_keep[:, None] & m_d[None, :]
            b_value = tl.load(x_ptrs, mask=m_x, other=0.0).to(tl.float32)
            b_gelu, b_slope = double_gelu_and_slope(tl.load(x_ptrs + D, mask=m_x, other=0.0).to(tl.float32))
            b_half = 0.5 * b_dout
            tl.store(dx_ptrs, b_half * b_gelu, mask=m_td)
            tl.store(dx_ptrs + D, b_half * b_value * b_slope, mask=m_td)
        else:
            tl.store(dx_ptrs, b_dout, mask=m_td)


def _configured(
    kernel: str, width: int, geglu: bool, tokens: int, *, capability: int, dtype: torch.dtype
) -> dict[str, int]:
    # four 16-byte loads of 16-bit data in flight per thread, from one or from two tensors
    padded = triton.next_power_of_2(width)
    rule = {
        "TOKENS": tokens,
        "BLOCK_T": 16 if geglu else 32,
        "BLOCK_D": min(128, padded),
        "num_warps": 4,
    }
    name = f"mean_pool.geglu_{kernel}" if geglu else f"mean_pool.{kernel}"
    return tuned.override(name, capability, rule, width=padded, bits=8 * dtype.itemsize)


@tuned.cache
def _launch_config(width: int, geglu: bool, *, capability: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile and warps.

    TOKENS is a trade: every sequence longer than that takes the second kernel, and a smaller batch than
    that has few programs.
    """
    return _configured("fwd", width, geglu, 512, capability=capability, dtype=dtype)


@functools.cache
def _fwd_combine_launch_config(width: int) -> dict[str, int]:
    """BLOCK_T partial sums at once: 16384 tokens need a single step, and the step is all latency."""
    return {"BLOCK_T": 32, "BLOCK_D": min(64, triton.next_power_of_2(width)), "num_warps": 4}


@tuned.cache
def _bwd_launch_config(width: int, geglu: bool, *, capability: int, dtype: torch.dtype) -> dict[str, int]:
    """Small tiles, since nothing is summed: many programs for one long sequence too."""
    return _configured("bwd", width, geglu, 64, capability=capability, dtype=dtype)


def _launch_fwd(
    x: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None, geglu: bool
) -> torch.Tensor:
    width = x.shape[1] // 2 if geglu else x.shape[1]
    # an empty sequence has no tile, so no program writes its zeros
    new_out = x.new_zeros if 0 in layout.lengths else x.new_empty
    out = new_out(len(layout), width, dtype=torch.float32)
    if layout.num_tokens == 0:
        return out
    config = _launch_config(width, geglu, capability=capability(x.device), dtype=x.dtype)
    tiles = layout.tiles(config["TOKENS"])
    # without a long sequence the kernel is the same and leaves them alone
    split_seqs, partial, partial_count = None, out, out
    if layout.max_length > config["TOKENS"]:
        split_seqs = layout.split_seqs(config["TOKENS"])
        # every split sequence has at most one tile that is not full
        num_partials = len(split_seqs) + layout.num_tokens // config["TOKENS"]
        partial = x.new_empty(num_partials, width, dtype=torch.float32)
        partial_count = x.new_empty(num_partials, dtype=torch.float32)
    launch(
        _mean_pool_fwd_kernel,
        len(tiles) * triton.cdiv(width, config["BLOCK_D"]),
        **operands(("x", x, "t"), ("out", out, "b"), ("partial", partial, "t")),
        partial_count_ptr=partial_count,
        mask_ptr=pool_mask,
        tiles_ptr=tiles,
        cu_seqlens_ptr=layout.cu_seqlens,
        D=width,
        GEGLU=geglu,
        HAS_MASK=pool_mask is not None,
        **config,
    )
    if split_seqs is None:
        return out
    combine = _fwd_combine_launch_config(width)
    launch(
        _mean_pool_fwd_combine_kernel,
        len(split_seqs) * triton.cdiv(width, combine["BLOCK_D"]),
        **operands(("partial", partial, "t"), ("out", out, "b")),
        partial_count_ptr=partial_count,
        split_seqs_ptr=split_seqs,
        cu_seqlens_ptr=layout.cu_seqlens,
        D=width,
        TOKENS=config["TOKENS"],
        **combine,
    )
    return out


def _launch_bwd(
    x: torch.Tensor | None,
    dout: torch.Tensor,
    layout: SeqLayout,
    pool_mask: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The gradient of the plain mean, or with x of its GEGLU, in `dtype`."""
    geglu = x is not None
    width = dout.shape[1]
    dx = dout.new_empty(layout.num_tokens, 2 * width if geglu else width, dtype=dtype)
    if layout.num_tokens == 0:
        return dx
    dout = with_contiguous_rows(dout)
    count = None
    if pool_mask is not None:
        # kept tokens before each place. Integers are exact in any order
        kept = torch.nn.functional.pad(pool_mask.cumsum(0, dtype=torch.int32), (1, 0))
        count = kept[layout.cu_seqlens].diff()
    config = _bwd_launch_config(width, geglu, capability=capability(dx.device), dtype=dtype)
    tiles = layout.tiles(config["TOKENS"])
    launch(
        _mean_pool_bwd_kernel,
        len(tiles) * triton.cdiv(width, config["BLOCK_D"]),
        **operands(("x", x, "t"), ("dout", dout, "b"), ("dx", dx, "t")),
        count_ptr=count,
        mask_ptr=pool_mask,
        tiles_ptr=tiles,
        cu_seqlens_ptr=layout.cu_seqlens,
        D=width,
        GEGLU=geglu,
        HAS_MASK=pool_mask is not None,
        **config,
    )
    return dx


@torch.library.custom_op("nvembed_fast::mean_pool", mutates_args=(), tags=BY_HOST_LISTS)
def _mean_pool_op(
    x: torch.Tensor, host_lengths: torch.Tensor, pool_mask: torch.Tensor | None, geglu: bool
) -> torch.Tensor:
    layout = layout_of(host_lengths, x.device)
    (check_mean_pool_geglu if geglu else check_mean_pool)(x, layout, pool_mask)
    return _launch_fwd(x, layout, pool_mask, geglu)


@_mean_pool_op.register_fake
def _mean_pool_fake(x, host_lengths, pool_mask, geglu):
    width = x.shape[1] // 2 if geglu else x.shape[1]
    return x.new_empty(host_lengths.shape[0], width, dtype=torch.float32)


@torch.library.custom_op("nvembed_fast::mean_pool_bwd", mutates_args=(), tags=BY_HOST_LISTS)
def _mean_pool_bwd_op(
    x: torch.Tensor | None,
    dout: torch.Tensor,
    host_lengths: torch.Tensor,
    pool_mask: torch.Tensor | None,
    num_tokens: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    layout = layout_of(host_lengths, dout.device)
    check_mean_pool_bwd(x, dout, layout, pool_mask, num_tokens, dtype)
    return _launch_bwd(x, dout, layout, pool_mask, dtype)


@_mean_pool_bwd_op.register_fake
def _mean_pool_bwd_fake(x, dout, host_lengths, pool_mask, num_tokens, dtype):
    width = dout.shape[1] if x is None else 2 * dout.shape[1]
    return dout.new_empty(num_tokens, width, dtype=dtype)


def _save(ctx, inputs, output) -> None:
    x, host_lengths, pool_mask, geglu = inputs
    ctx.save_for_backward(x if geglu else None, host_lengths, pool_mask)
    ctx.num_tokens, ctx.dtype = x.shape[0], x.dtype


def _differentiate(ctx, dout):
    x, host_lengths, pool_mask = ctx.saved_tensors
    dx = _mean_pool_bwd_op(x, dout, host_lengths, pool_mask, ctx.num_tokens, ctx.dtype)
    return dx, None, None, None


_mean_pool_op.register_autograd(_differentiate, setup_context=_save)


def _run(x: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None, geglu: bool) -> torch.Tensor:
    if is_dispatched(x):
        return _mean_pool_op(x, layout.host_lengths, pool_mask, geglu)
    return _launch_fwd(x, layout, pool_mask, geglu)


def mean_pool(x: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Triton version of `reference.mean_pool`: same arguments, same result."""
    check_mean_pool(x, layout, pool_mask)
    return _run(x, layout, pool_mask, geglu=False)


def mean_pool_geglu(
    value_gate: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Triton version of `reference.mean_pool_geglu`: same arguments, same result."""
    check_mean_pool_geglu(value_gate, layout, pool_mask)
    return _run(value_gate, layout, pool_mask, geglu=True)
