"""Tokens attend to L latents, direct form. Contract: `reference.latent_attention`.

The direct form is flash attention over keys that every token shares. One program
owns BLOCK_T tokens of one head and walks the latents with an online softmax.
Heads wider than MAX_HEAD_WIDTH do not fit registers. They go through library
products, a chunk of tokens at a time.

No tile depends on T, so a token's bits do not depend on its batch.

Backward. Saved per token: q, the output and one fp32 per head, the logarithm
(base 2) of the softmax denominator. k and v are saved once. P is computed again.

1. One program per token tile and head: delta = rowsum(dO * O), kept for step 2,
   then dQ = scale * dS K with dS = P * (dO V^T - delta), walking the latents.
2. dK and dV are sums over all tokens. One program owns a tile of latents of one
   head and CHUNK tokens, and writes its sum in fp32.
3. The sums of the chunks are added in a fixed order, without atomics.

CHUNK = 2048 makes 8 chunks of 16384 tokens. With 8 heads and 512 latents in tiles
of 128 there are 256 programs of head width 64. Their sums are 8 * 512 * 8 * 64 * 2
fp32, 17 MB, as much as q alone takes in 16 bits. Half the tokens would double that.

Wide heads do the same by library products, chunk by chunk of MAX_SCORES. Only q, k
and v are saved, because whole rows of P and dP are there at once.

Prefixes inside kernels: i_ index, o_ offsets, m_ mask, b_ block in registers.
"""

import functools
from typing import Literal

import torch
import triton
import triton.language as tl

from nvembed_fast.kernels import tuned
from nvembed_fast.kernels._common import (
    LOG2E,
    capability,
    input_precision,
    is_dispatched,
    launch,
    operands,
    replayed,
    use_descriptors,
    with_contiguous_rows,
)
from nvembed_fast.kernels.errors import check_latent_attention, check_latent_attention_bwd

__all__ = ["latent_attention"]

MAX_HEAD_WIDTH = 256  # of the kernel
MAX_SCORES = 1 << 24  # fp32 scores in memory at a time for wide heads: 64 MiB
CHUNK = 2048  # tokens that one program of dK and dV adds up: see above


@triton.jit(do_not_specialize=["num_tokens"])
def _latent_attention_fwd_kernel(
    q_ptr, stride_qt, stride_qn,
    k_ptr, stride_kl, stride_kn,
    v_ptr, stride_vl, stride_vn,
    out_ptr, stride_ot, stride_on,
    lse_ptr, num_tokens, scale_log2,
    N: tl.constexpr, L: tl.constexpr, H: tl.constexpr, WITH_LSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    # the tile: which tokens of which head
    # the heads of the same tokens are neighbours: they write whole rows together
    i_n = (tl.program_id(0) % N).to(tl.int64)
    i_t = tl.program_id(0) // N * BLOCK_T
    q_ptr += i_n * stride_qn
    k_ptr += i_n * stride_kn
    v_ptr += i_n * stride_vn
    o_t = i_t + tl.arange(0, BLOCK_T)
    o_l = tl.arange(0, BLOCK_L)
    o_h = tl.arange(0, BLOCK_H)
    m_h = (o_h < H)[None, :]
    m_th = (o_t < num_tokens)[:, None] & m_h
    # [BLOCK_T, BLOCK_H]
    if USE_TMA:
        q = tl.make_tensor_descriptor(q_ptr, [num_tokens, H], [stride_qt, 1], [BLOCK_T, BLOCK_H])
        k = tl.make_tensor_descriptor(k_ptr, [L, H], [stride_kl, 1], [BLOCK_L, BLOCK_H])
        v = tl.make_tensor_descriptor(v_ptr, [L, H], [stride_vl, 1], [BLOCK_L, BLOCK_H])
        b_q = q.load([i_t, 0])
    else:
        b_q = tl.load(q_ptr + o_t.to(tl.int64)[:, None] * stride_qt + o_h[None, :], mask=m_th, other=0.0)

    # walk the latents
    b_max = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_T], dtype=tl.float32)
    b_acc = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    for i_l in tl.range(0, L, BLOCK_L):
        # [BLOCK_L, BLOCK_H]
        if USE_TMA:
            b_k = k.load([i_l, 0])
        else:
            o_row = (i_l + o_l)[:, None]
            m_lh = (o_row < L) & m_h
            b_k = tl.load(k_ptr + o_row * stride_kl + o_h[None, :], mask=m_lh, other=0.0)
        # [BLOCK_T, BLOCK_L]
        b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
        if L % BLOCK_L != 0:
            b_s = tl.where((i_l + o_l < L)[None, :], b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
        b_p = tl.exp2(b_s * scale_log2 - b_new_max[:, None])
        b_decay = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_acc = b_acc * b_decay[:, None]
        if USE_TMA:
            b_v = v.load([i_l, 0])
        else:
            b_v = tl.load(v_ptr + o_row * stride_vl + o_h[None, :], mask=m_lh, other=0.0)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        b_max = b_new_max

    # write the results
    out_ptrs = out_ptr + o_t.to(tl.int64)[:, None] * stride_ot + i_n * stride_on + o_h[None, :]
    tl.store(out_ptrs, (b_acc / b_sum[:, None]).to(out_ptr.dtype.element_ty), mask=m_th)
    if WITH_LSE:
        tl.store(lse_ptr + i_n * num_tokens + o_t, b_max + tl.log2(b_sum), mask=o_t < num_tokens)


@triton.jit(do_not_specialize=["num_tokens"])
def _latent_attention_bwd_dq_kernel(
    q_ptr, stride_qt, stride_qn,
    k_ptr, stride_kl, stride_kn,
    v_ptr, stride_vl, stride_vn,
    out_ptr, stride_ot, stride_on,
    dout_ptr, stride_dot, stride_don,
    lse_ptr, delta_ptr, dq_ptr, num_tokens, scale, scale_log2,
    N: tl.constexpr, L: tl.constexpr, H: tl.constexpr, NEEDS_DQ: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    # the tile: which tokens of which head
    i_n = (tl.program_id(0) % N).to(tl.int64)
    i_t = tl.program_id(0) // N * BLOCK_T
    o_t = i_t + tl.arange(0, BLOCK_T)
    o_l = tl.arange(0, BLOCK_L)
    o_h = tl.arange(0, BLOCK_H)
    m_t = o_t < num_tokens
    m_h = (o_h < H)[None, :]
    m_th = m_t[:, None] & m_h
    o_row = o_t.to(tl.int64)[:, None]
    dout_ptr += i_n * stride_don
    # delta
    # [BLOCK_T, BLOCK_H]
    b_out = tl.load(out_ptr + o_row * stride_ot + i_n * stride_on + o_h[None, :], mask=m_th, other=0.0)
    if USE_TMA:
        dout = tl.make_tensor_descriptor(dout_ptr, [num_tokens, H], [stride_dot, 1], [BLOCK_T, BLOCK_H])
        b_dout = dout.load([i_t, 0])
    else:
        b_dout = tl.load(dout_ptr + o_row * stride_dot + o_h[None, :], mask=m_th, other=0.0)
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    tl.store(delta_ptr + i_n * num_tokens + o_t, b_delta, mask=m_t)

    # walk the latents for dq
    if NEEDS_DQ:
        q_ptr += i_n * stride_qn
        k_ptr += i_n * stride_kn
        v_ptr += i_n * stride_vn
        if USE_TMA:
            q = tl.make_tensor_descriptor(q_ptr, [num_tokens, H], [stride_qt, 1], [BLOCK_T, BLOCK_H])
            k = tl.make_tensor_descriptor(k_ptr, [L, H], [stride_kl, 1], [BLOCK_L, BLOCK_H])
            v = tl.make_tensor_descriptor(v_ptr, [L, H], [stride_vl, 1], [BLOCK_L, BLOCK_H])
            b_q = q.load([i_t, 0])
        else:
            b_q = tl.load(q_ptr + o_row * stride_qt + o_h[None, :], mask=m_th, other=0.0)
        # infinite beyond the last token, so that p is zero there
        b_lse = tl.load(lse_ptr + i_n * num_tokens + o_t, mask=m_t, other=float("inf"))
        b_dq = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
        for i_l in tl.range(0, L, BLOCK_L):
            # [BLOCK_L, BLOCK_H]
            if USE_TMA:
                b_k = k.load([i_l, 0])
                b_v = v.load([i_l, 0])
            else:
                o_latent = (i_l + o_l)[:, None]
                m_lh = (o_latent < L) & m_h
                b_k = tl.load(k_ptr + o_latent * stride_kl + o_h[None, :], mask=m_lh, other=0.0)
                b_v = tl.load(v_ptr + o_latent * stride_vl + o_h[None, :], mask=m_lh, other=0.0)
            # [BLOCK_T, BLOCK_L]
            b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
            b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
            if L % BLOCK_L != 0:
                # a score of zero may lie far above all others: infinity times the zeros of k is NaN
                b_p = tl.where((i_l + o_l < L)[None, :], b_p, 0.0)
            b_dp = tl.dot(b_dout, b_v.T, input_precision=PRECISION)
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
        # [T, N, H]
        dq_ptrs = dq_ptr + (o_row * N + i_n) * H + o_h[None, :]
        tl.store(dq_ptrs, (b_dq * scale).to(dq_ptr.dtype.element_ty), mask=m_th)


@triton.jit(do_not_specialize=["num_tokens"])
def _latent_attention_bwd_dkv_kernel(
    q_ptr, stride_qt, stride_qn,
    k_ptr, stride_kl, stride_kn,
    v_ptr, stride_vl, stride_vn,
    dout_ptr, stride_dot, stride_don,
    lse_ptr, delta_ptr, dk_ptr, dv_ptr, num_tokens, scale, scale_log2,
    N: tl.constexpr, L: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr,
    NEEDS_DK: tl.constexpr, NEEDS_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    NUM_TILES: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    # the tile: which latents of which head, for which chunk of tokens
    # the tiles of the same head and tokens are neighbours: q and dO come from memory once
    i_l = tl.program_id(0) % NUM_TILES * BLOCK_L
    i_n = (tl.program_id(0) // NUM_TILES % N).to(tl.int64)
    i_chunk = tl.program_id(0) // (NUM_TILES * N)
    q_ptr += i_n * stride_qn
    k_ptr += i_n * stride_kn
    v_ptr += i_n * stride_vn
    dout_ptr += i_n * stride_don
    lse_ptr += i_n * num_tokens
    delta_ptr += i_n * num_tokens
    o_l = i_l + tl.arange(0, BLOCK_L)
    o_h = tl.arange(0, BLOCK_H)
    m_h = (o_h < H)[None, :]
    m_lh = (o_l < L)[:, None] & m_h
    # [BLOCK_L, BLOCK_H]
    if USE_TMA:
        q = tl.make_tensor_descriptor(q_ptr, [num_tokens, H], [stride_qt, 1], [BLOCK_T, BLOCK_H])
        dout = tl.make_tensor_descriptor(dout_ptr, [num_tokens, H], [stride_dot, 1], [BLOCK_T, BLOCK_H])
        k = tl.make_tensor_descriptor(k_ptr, [L, H], [stride_kl, 1], [BLOCK_L, BLOCK_H])
        b_k = k.load([i_l, 0])
        if NEEDS_DK:
            v = tl.make_tensor_descriptor(v_ptr, [L, H], [stride_vl, 1], [BLOCK_L, BLOCK_H])
            b_v = v.load([i_l, 0])
    else:
        b_k = tl.load(k_ptr + o_l[:, None] * stride_kl + o_h[None, :], mask=m_lh, other=0.0)
        if NEEDS_DK:
            b_v = tl.load(v_ptr + o_l[:, None] * stride_vl + o_h[None, :], mask=m_lh, other=0.0)

    # walk the tokens of the chunk
    b_dk = tl.zeros([BLOCK_L, BLOCK_H], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_L, BLOCK_H], dtype=tl.float32)
    for i_t in tl.range(i_chunk * CHUNK, tl.minimum((i_chunk + 1) * CHUNK, num_tokens), BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        m_t = o_t < num_tokens
        # [BLOCK_T, BLOCK_H]
        if USE_TMA:
            b_q = q.load([i_t, 0])
            b_dout = dout.load([i_t, 0])
        else:
            m_th = m_t[:, None] & m_h
            o_row = o_t.to(tl.int64)[:, None]
            b_q = tl.load(q_ptr + o_row * stride_qt + o_h[None, :], mask=m_th, other=0.0)
            b_dout = tl.load(dout_ptr + o_row * stride_dot + o_h[None, :], mask=m_th, other=0.0)
        b_lse = tl.load(lse_ptr + o_t, mask=m_t, other=float("inf"))
        # [BLOCK_L, BLOCK_T]. Rows beyond the last latent are never stored
        b_s = tl.dot(b_k, b_q.T, input_precision=PRECISION)
        b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
        if NEEDS_DV:
            b_dv = tl.dot(b_p.to(b_q.dtype), b_dout, b_dv, input_precision=PRECISION)
        if NEEDS_DK:
            b_delta = tl.load(delta_ptr + o_t, mask=m_t, other=0.0)
            b_dp = tl.dot(b_v, b_dout.T, input_precision=PRECISION)
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)

    # write this chunk's sums
    # [num_chunks, L, N, H]
    o_sum = ((i_chunk.to(tl.int64) * L + o_l)[:, None] * N + i_n) * H + o_h[None, :]
    if NEEDS_DK:
        tl.store(dk_ptr + o_sum, b_dk * scale, mask=m_lh)
    if NEEDS_DV:
        tl.store(dv_ptr + o_sum, b_dv, mask=m_lh)


@tuned.cache
def _launch_config(
    num_latents: int, head_width: int, *, capability: int, dtype: torch.dtype, aligned: bool = True
) -> dict[str, int | bool]:
    """Tiles. 16-bit data is loaded by descriptors (TMA) where the GPU has them.

    Args:
        aligned: bases and strides let descriptors be made.
    """
    block_h = max(16, triton.next_power_of_2(head_width))
    padded = max(16, triton.next_power_of_2(num_latents))
    use_tma = dtype.itemsize == 2 and use_descriptors(capability)
    if dtype.itemsize == 4:
        block_t = block_l = 32 if block_h <= 128 else 16
        # at 128 columns 4 warps spill on sm_90 where they also write the lse
        num_warps, num_stages = 8 if block_h == 128 else 4, 2
    elif use_tma:
        block_t, block_l = 128, 128 if block_h <= 128 else 64
        num_warps, num_stages = 8, 3 if block_h <= 64 else 2
    else:
        block_t, block_l = (128, 64) if block_h <= 128 else (64, 32)
        # 8.6, 8.9 and 12.0 have 99 KB of shared memory for a program, 8.0 has 163
        num_warps, num_stages = 8, 3 if capability == 80 or block_h <= 128 else 2
    rule = {
        "BLOCK_T": block_t,
        "BLOCK_L": min(block_l, padded),
        "BLOCK_H": block_h,
        "USE_TMA": use_tma and aligned,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    shape_class = {"width": block_h, "latents": padded, "bits": 8 * dtype.itemsize}
    return tuned.override("latent_attention.fwd", capability, rule, **shape_class)


@functools.cache
def _bwd_launch_config(
    kernel: Literal["dq", "dkv"],
    num_latents: int,
    head_width: int,
    *,
    capability: int,
    dtype: torch.dtype,
    aligned: bool = True,
) -> dict[str, int | bool]:
    """As `_launch_config`, for one of the two backward kernels."""
    block_h = max(16, triton.next_power_of_2(head_width))
    use_tma = dtype.itemsize == 2 and use_descriptors(capability)
    # (BLOCK_T, BLOCK_L, num_warps, num_stages)
    if dtype.itemsize == 4:
        dq, dkv = ((32, 32, 4, 2), (16, 32, 4, 2)) if block_h <= 64 else ((16, 16, 4, 2), (16, 16, 4, 2))
    elif use_tma:
        dq, dkv = ((128, 64, 8, 2), (64, 128, 8, 2)) if block_h <= 128 else ((64, 32, 8, 2), (32, 64, 8, 2))
    elif block_h <= 64:
        dq, dkv = (128, 64, 8, 2), (32, 128, 8, 2)
    elif block_h <= 128:
        dq = dkv = (64, 64, 8, 2)
    else:
        # 99 KB of shared memory on 8.6, 8.9 and 12.0
        dq, dkv = (64, 32, 8, 1), (16, 64, 8, 1)
    block_t, block_l, num_warps, num_stages = dq if kernel == "dq" else dkv
    return {
        "BLOCK_T": block_t,
        "BLOCK_L": min(block_l, max(16, triton.next_power_of_2(num_latents))),
        "BLOCK_H": block_h,
        "USE_TMA": use_tma and aligned,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


@replayed
def _launch_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, with_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse): [N, T] fp32, base 2, or empty without `with_lse`."""
    num_tokens, num_heads, head_width = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((num_heads, num_tokens) if with_lse else 0, dtype=torch.float32)
    if num_tokens == 0:
        return out, lse
    sm = capability(q.device)
    aligned = use_descriptors(sm, q, k, v)
    config = _launch_config(len(k), head_width, capability=sm, dtype=q.dtype, aligned=aligned)
    launch(
        _latent_attention_fwd_kernel,
        triton.cdiv(num_tokens, config["BLOCK_T"]) * num_heads,
        **operands(("q", q, "tn"), ("k", k, "ln"), ("v", v, "ln"), ("out", out, "tn")),
        lse_ptr=lse,
        num_tokens=num_tokens,
        scale_log2=scale * LOG2E.value,
        N=num_heads,
        L=len(k),
        H=head_width,
        WITH_LSE=with_lse,
        PRECISION=input_precision(q.dtype),
        **config,
    )
    return out, lse


def _launch_bwd_dq(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    scale: float,
    needs_dq: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dq, delta): dq is empty where not needed, delta is [N, T] fp32."""
    num_tokens, num_heads, head_width = q.shape
    dq = q.new_empty(q.shape if needs_dq else 0)
    delta = torch.empty_like(lse)
    sm = capability(q.device)
    aligned = use_descriptors(sm, q, k, v, dout)
    config = _bwd_launch_config("dq", len(k), head_width, capability=sm, dtype=q.dtype, aligned=aligned)
    launch(
        _latent_attention_bwd_dq_kernel,
        triton.cdiv(num_tokens, config["BLOCK_T"]) * num_heads,
        **operands(("q", q, "tn"), ("k", k, "ln"), ("v", v, "ln"), ("out", out, "tn"), ("dout", dout, "tn")),
        dq_ptr=dq,
        lse_ptr=lse,
        delta_ptr=delta,
        num_tokens=num_tokens,
        scale=scale,
        scale_log2=scale * LOG2E.value,
        N=num_heads,
        L=len(k),
        H=head_width,
        NEEDS_DQ=needs_dq,
        PRECISION=input_precision(q.dtype),
        **config,
    )
    return dq, delta


def _launch_bwd_dkv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dout: torch.Tensor,
    scale: float,
    needs_dk: bool,
    needs_dv: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dk, dv), empty where not needed. delta is not read for dv alone."""
    num_tokens, num_heads, head_width = q.shape
    num_chunks = triton.cdiv(num_tokens, CHUNK)
    dk, dv = (
        k.new_empty((num_chunks, *k.shape) if needed else 0, dtype=torch.float32)
        for needed in (needs_dk, needs_dv)
    )
    sm = capability(q.device)
    aligned = use_descriptors(sm, q, k, v, dout)
    config = _bwd_launch_config("dkv", len(k), head_width, capability=sm, dtype=q.dtype, aligned=aligned)
    num_tiles = triton.cdiv(len(k), config["BLOCK_L"])
    launch(
        _latent_attention_bwd_dkv_kernel,
        num_tiles * num_heads * num_chunks,
        **operands(("q", q, "tn"), ("k", k, "ln"), ("v", v, "ln"), ("dout", dout, "tn")),
        lse_ptr=lse,
        delta_ptr=delta,
        dk_ptr=dk,
        dv_ptr=dv,
        num_tokens=num_tokens,
        scale=scale,
        scale_log2=scale * LOG2E.value,
        N=num_heads,
        L=len(k),
        H=head_width,
        CHUNK=CHUNK,
        NEEDS_DK=needs_dk,
        NEEDS_DV=needs_dv,
        PRECISION=input_precision(q.dtype),
        **config,
    )
    return (
        dk.sum(0).to(k.dtype) if needs_dk else k.new_empty(0),
        dv.sum(0).to(v.dtype) if needs_dv else v.new_empty(0),
    )


def _launch_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    dout: torch.Tensor,
    scale: float,
    needs_dq: bool,
    needs_dk: bool,
    needs_dv: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), empty where not needed. `out` may be None if dv alone is needed."""
    if len(q) == 0:
        needs = ((q, needs_dq), (k, needs_dk), (v, needs_dv))
        dq, dk, dv = (t.new_zeros(t.shape if needed else 0) for t, needed in needs)
        return dq, dk, dv
    dq, dk, dv = (t.new_empty(0) for t in (q, k, v))
    dout, delta = with_contiguous_rows(dout), lse
    if needs_dq or needs_dk:
        assert out is not None
        dq, delta = _launch_bwd_dq(q, k, v, out, lse, dout, scale, needs_dq)
    if needs_dk or needs_dv:
        dk, dv = _launch_bwd_dkv(q, k, v, lse, delta, dout, scale, needs_dk, needs_dv)
    return dq, dk, dv


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[N, ., .] batched product in fp32 of factors in the dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _wide_weights(q_TNH: torch.Tensor, k_LNH: torch.Tensor, scale: float) -> torch.Tensor:
    """[N, T, L] softmax of the scores, in fp32."""
    return (_product(q_TNH.transpose(0, 1), k_LNH.permute(1, 2, 0)) * scale).softmax(-1)


def _wide_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The result by library products, with the scores and their softmax in fp32."""
    outs = []
    for q_TNH in q.split(_tokens_per_chunk(k)):
        p_NTL = _wide_weights(q_TNH, k, scale)
        outs.append(torch.bmm(p_NTL.to(v.dtype), v.transpose(0, 1)).transpose(0, 1))
    return torch.cat(outs)


def _tokens_per_chunk(k: torch.Tensor) -> int:
    return max(1, MAX_SCORES // (k.shape[0] * k.shape[1]))


def _wide_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    scale: float,
    needs_dq: bool,
    needs_dk: bool,
    needs_dv: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), empty where not needed. P and dS are rounded for their products, sums are fp32."""
    k_NLH, v_NLH = k.transpose(0, 1), v.transpose(0, 1)
    dqs = []
    dk_LNH, dv_LNH = (
        k.new_zeros(k.shape if needed else 0, dtype=torch.float32) for needed in (needs_dk, needs_dv)
    )
    for q_TNH, dout_TNH in zip(*(t.split(_tokens_per_chunk(k)) for t in (q, dout)), strict=True):
        dout_NTH = dout_TNH.transpose(0, 1)
        p_NTL = _wide_weights(q_TNH, k, scale)
        if needs_dv:
            dv_LNH += _product(p_NTL.to(v.dtype).mT, dout_NTH).transpose(0, 1)
        if not (needs_dq or needs_dk):
            continue
        dp_NTL = _product(dout_NTH, v_NLH.mT)
        delta_NT1 = (p_NTL * dp_NTL).sum(-1, keepdim=True)
        ds_NTL = (p_NTL * (dp_NTL - delta_NT1)).to(q.dtype)
        if needs_dq:
            # beta=0 ignores the first argument, and scale acts before the one rounding
            dq_NTH = torch.baddbmm(q.new_zeros(1, 1, 1), ds_NTL, k_NLH, beta=0, alpha=scale)
            dqs.append(dq_NTH.transpose(0, 1))
        if needs_dk:
            dk_LNH += _product(ds_NTL.mT, q_TNH.transpose(0, 1)).transpose(0, 1)
    return (
        torch.cat(dqs) if needs_dq else q.new_empty(0),
        (dk_LNH * scale).to(k.dtype) if needs_dk else k.new_empty(0),
        dv_LNH.to(v.dtype) if needs_dv else v.new_empty(0),
    )


@torch.library.custom_op("nvembed_fast::latent_attention", mutates_args=())
def _latent_attention_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    check_latent_attention(q, k, v, scale)
    if q.shape[-1] > MAX_HEAD_WIDTH:
        return _wide_fwd(q, k, v, scale), q.new_empty(0, dtype=torch.float32)
    return _launch_fwd(q, k, v, scale, with_lse)


@_latent_attention_op.register_fake
def _latent_attention_fake(q, k, v, scale, with_lse):
    has_lse = with_lse and q.shape[-1] <= MAX_HEAD_WIDTH
    lse = q.new_empty((q.shape[1], q.shape[0]) if has_lse else 0, dtype=torch.float32)
    return q.new_empty(q.shape), lse


@torch.library.custom_op("nvembed_fast::latent_attention_bwd", mutates_args=())
def _latent_attention_bwd_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    dout: torch.Tensor,
    scale: float,
    needs_dq: bool,
    needs_dk: bool,
    needs_dv: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    is_wide = q.ndim == 3 and q.shape[2] > MAX_HEAD_WIDTH
    needs_out = not is_wide and (needs_dq or needs_dk)
    check_latent_attention_bwd(q, k, v, out, None if is_wide else lse, dout, scale, needs_out)
    if is_wide:
        return _wide_bwd(q, k, v, dout, scale, needs_dq, needs_dk, needs_dv)
    return _launch_bwd(q, k, v, out, lse, dout, scale, needs_dq, needs_dk, needs_dv)


@_latent_attention_bwd_op.register_fake
def _latent_attention_bwd_fake(q, k, v, out, lse, dout, scale, needs_dq, needs_dk, needs_dv):
    needs = ((q, needs_dq), (k, needs_dk), (v, needs_dv))
    return tuple(t.new_empty(t.shape if needed else 0) for t, needed in needs)


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.scale, _ = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    needs_delta = any(ctx.needs_input_grad[:2]) and q.shape[-1] <= MAX_HEAD_WIDTH
    ctx.save_for_backward(q, k, v, out if needs_delta else None, lse)


def _differentiate(ctx, dout, _):
    if dout is None:
        return (None,) * 5
    needs = ctx.needs_input_grad[:3]
    grads = _latent_attention_bwd_op(*ctx.saved_tensors, dout, ctx.scale, *needs)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None


_latent_attention_op.register_autograd(_differentiate, setup_context=_save)


def latent_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Triton version of `reference.latent_attention`: same arguments, same result."""
    check_latent_attention(q, k, v, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if is_dispatched(q, k, v):
        with_lse = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        return _latent_attention_op(q, k, v, scale, with_lse)[0]
    if q.shape[-1] > MAX_HEAD_WIDTH:
        return _wide_fwd(q, k, v, scale)
    return _launch_fwd(q, k, v, scale)[0]
