"""Softmax attention inside each packed sequence. Contract: `reference.flash_attention`.

One program owns one tile of the host's tile list for one key/value head: up to
BLOCK_T tokens of one sequence times the whole group of query heads that read
this head, token-major. Keys and values are thus loaded once per group, and a
text of a few dozen tokens still fills the tile.

With scores s = q k^T and c = scale * log2(e), each key block updates per row

    m' = max(m, c max(s)),  p = exp2(c s - m'),  a = exp2(m - m'),
    l' = a l + sum(p),      acc' = a acc + p v,

from m = -inf, l = 0, acc = 0. In the end out = acc / l, and the logarithm of
the denominator, kept in base 2, is lse2 = m + log2(l). Every row sees key 0,
which lies in the first block, so m is finite from there on and needs no guard.
Blocks that all rows see whole take no mask. Only the end of the sequence and the
diagonal do.

The invariant: row pointers and descriptors start at the sequence and end with
it, so that memory beyond it is read as zero and a NaN there cannot matter (the
mask makes p zero, but zero times NaN would be NaN).

Two ways to load, picked by `_launch_config`: tensor descriptors (TMA) on sm_90,
pointers elsewhere. There are three ways to walk the keys:

- With descriptors and texts above 64 tokens, the scores of the next block are
  issued before the softmax of this one (AHEAD), so that exponentials and tensor
  cores work at the same time. Only the last block is masked, behind the loop.
- Causal with descriptors, one loop serves all blocks and a branch masks the last
  ones: on the diagonal there are several.
- With pointers that branch would cost layout conversions in every block (sm_80),
  so the last ones have a loop of their own.

All three do the same arithmetic in the same order of blocks.

An entry of `tuned.toml` may let one program on each multiprocessor walk several
tiles (PERSISTENT), which changes no bit. No rule does.

Backward, with p = exp2(c s - lse2) computed again from the scores:

1. delta = rowsum(dout out) - dlse2 log2(e), per row, in fp32.
2. dq: a program owns a query tile as forward and walks the keys:
   dp = dout v^T, ds = p (dp - delta), dq += ds k, and in the end dq *= scale.
   dp stands before p in the code, so that the exponentials run beside its
   product.
3. dk, dv: a program owns a tile of keys of one key/value head and walks the
   query tiles of its sequence, all heads of the group in the rows of a tile, so
   that the sum over the group is the product's: dv += p^T dout, dk += ds^T q.

Nothing is atomic, so the bits repeat. Rows beyond the end, or beyond the group,
have lse2 = +inf: their p is zero. Saved per token: q, k, v (views of the QKV
product), out, and an fp32 lse2 per head. Scores are computed again, because a
row of them is as long as its sequence.

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
    add_product,
    capability,
    input_precision,
    is_dispatched,
    launch,
    num_multiprocessors,
    operands,
    replayed,
    use_descriptors,
    with_contiguous_rows,
)
from nvembed_fast.kernels.errors import (
    Unsupported,
    check_flash_attention,
    check_flash_attention_bwd,
    mismatch,
)
from nvembed_fast.kernels.layout import BY_HOST_LISTS, SeqLayout, layout_of

__all__ = ["flash_attention"]

LN2 = 0.6931471805599453
MIN_HEAD_WIDTH, MAX_HEAD_WIDTH = 16, 256
MAX_GROUP = 64  # query heads per key/value head: they share a tile
MAX_GROUP_COLUMNS = 4096  # group x head width, both padded: the smallest query tile has to fit shared memory


@triton.jit
def _load_rows(
    source, stride, first, length,
    H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    MASK_ROWS: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    # [BLOCK_N, BLOCK_H] from row `first` on
    if USE_TMA:
        b_rows = source.load([first, 0])
    else:
        o_n = tl.arange(0, BLOCK_N)[:, None]
        o_h = tl.arange(0, BLOCK_H)[None, :]
        ptrs = source + tl.cast(first, tl.int64) * stride + o_n * stride + o_h
        if MASK_ROWS:
            b_rows = tl.load(ptrs, mask=(o_n < length - first) & (o_h < H), other=0.0)
        elif H < BLOCK_H:
            b_rows = tl.load(ptrs, mask=o_h < H, other=0.0)
        else:
            b_rows = tl.load(ptrs)
    return b_rows


@triton.jit
def _load_queries(
    source, stride_t, stride_n, first, length,
    GROUP: tl.constexpr, H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_H: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    # [BLOCK_T * BLOCK_GROUP, BLOCK_H], token-major, zeros beyond the sequence and beyond the group
    if USE_TMA:
        b_rows = source.load([first, 0, 0]).reshape(BLOCK_T * BLOCK_GROUP, BLOCK_H)
    else:
        o_m = tl.arange(0, BLOCK_T * BLOCK_GROUP)
        o_t = first + o_m // BLOCK_GROUP
        o_head = o_m % BLOCK_GROUP
        o_h = tl.arange(0, BLOCK_H)
        m_rows = ((o_t < length) & (o_head < GROUP))[:, None] & (o_h < H)[None, :]
        o_rows = o_t.to(tl.int64)[:, None] * stride_t + o_head.to(tl.int64)[:, None] * stride_n + o_h[None, :]
        b_rows = tl.load(source + o_rows, mask=m_rows, other=0.0)
    return b_rows


@triton.jit
def _attend(
    b_q, b_m, b_l, b_acc,
    k, stride_kt, v, stride_vt,
    i_n, o_t, length, num_common, scale_log2,
    H: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, MASKED: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    # [BLOCK_M, BLOCK_N]
    b_k = _load_rows(k, stride_kt, i_n, length, H, BLOCK_N, BLOCK_H, MASKED, USE_TMA)
    b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
    if MASKED:  # noqa: SIM102 - decided by the compiler, the inner one at run time
        if not USE_TMA or i_n + BLOCK_N > num_common:
            o_n = i_n + tl.arange(0, BLOCK_N)[None, :]
            m_s = o_n < length
            if CAUSAL:
                m_s = m_s & (o_n <= o_t[:, None])
            b_s = tl.where(m_s, b_s, float("-inf"))
    return _accumulate(
        b_s, b_m, b_l, b_acc, v, stride_vt, i_n, length, scale_log2,
        H, PRECISION, BLOCK_N, BLOCK_H, MASKED, USE_TMA,
    )  # fmt: skip


@triton.jit
def _accumulate(
    b_s, b_m, b_l, b_acc, v, stride_vt, i_n, length, scale_log2,
    H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, MASKED: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    # [BLOCK_M]
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
    b_p = tl.exp2(b_s * scale_log2 - b_m_new[:, None])
    b_alpha = tl.exp2(b_m - b_m_new)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_acc = b_acc * b_alpha[:, None]
    # [BLOCK_M, BLOCK_H]
    b_v = _load_rows(v, stride_vt, i_n, length, H, BLOCK_N, BLOCK_H, MASKED, USE_TMA)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_m_new, b_l, b_acc


@triton.jit
def _flash_attention_fwd_tile(
    i_program,
    q_ptr, stride_qt, stride_qn,
    k_ptr, stride_kt, stride_kg,
    v_ptr, stride_vt, stride_vg,
    out_ptr, stride_ot, stride_on,
    lse2_ptr, stride_ln,
    tiles_ptr, cu_seqlens_ptr, scale_log2, num_kv_heads,
    GROUP: tl.constexpr, H: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    USE_TMA: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = BLOCK_T * BLOCK_GROUP
    # the tile: which tokens of which sequence, for which heads
    i_tile = (i_program // num_kv_heads).to(tl.int64)
    i_g = (i_program % num_kv_heads).to(tl.int64)
    i_seq = tl.load(tiles_ptr + 2 * i_tile)
    first_token = tl.load(tiles_ptr + 2 * i_tile + 1)
    start = tl.load(cu_seqlens_ptr + i_seq).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + i_seq + 1) - start).to(tl.int32)

    # addresses, from the start of the sequence
    q_ptr += start * stride_qt + i_g * GROUP * stride_qn
    k_ptr += start * stride_kt + i_g * stride_kg
    v_ptr += start * stride_vt + i_g * stride_vg
    out_ptr += start * stride_ot + i_g * GROUP * stride_on
    lse2_ptr += start + i_g * GROUP * stride_ln

    # rows are token-major: row = token * BLOCK_GROUP + head inside the group
    o_m = tl.arange(0, BLOCK_M)
    o_t = first_token + o_m // BLOCK_GROUP
    o_head = o_m % BLOCK_GROUP
    if USE_TMA:
        k = tl.make_tensor_descriptor(k_ptr, [length, H], [stride_kt, 1], [BLOCK_N, BLOCK_H])
        v = tl.make_tensor_descriptor(v_ptr, [length, H], [stride_vt, 1], [BLOCK_N, BLOCK_H])
    else:
        k = k_ptr
        v = v_ptr
    # descriptors are built one after the other, and that of the queries serves one load alone
    QUERIES_BY_TMA: tl.constexpr = USE_TMA and not AHEAD
    if QUERIES_BY_TMA:
        q = tl.make_tensor_descriptor(
            q_ptr, [length, GROUP, H], [stride_qt, stride_qn, 1], [BLOCK_T, BLOCK_GROUP, BLOCK_H]
        )
    else:
        q = q_ptr
    # [BLOCK_M, BLOCK_H]
    b_q = _load_queries(
        q, stride_qt, stride_qn, first_token, length,
        GROUP, H, BLOCK_T, BLOCK_GROUP, BLOCK_H, QUERIES_BY_TMA,
    )  # fmt: skip

    # walk the keys
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    if AHEAD:
        tl.static_assert(USE_TMA and not CAUSAL)
        last = (length - 1) // BLOCK_N * BLOCK_N
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, k.load([0, 0]).T, input_precision=PRECISION)
        for i_n in tl.range(0, last, BLOCK_N):
            b_next = tl.dot(b_q, k.load([i_n + BLOCK_N, 0]).T, input_precision=PRECISION)
            b_m, b_l, b_acc = _accumulate(
                b_s, b_m, b_l, b_acc, v, stride_vt, i_n, length, scale_log2,
                H, PRECISION, BLOCK_N, BLOCK_H, False, True,
            )  # fmt: skip
            b_s = b_next
        b_s = tl.where(last + tl.arange(0, BLOCK_N)[None, :] < length, b_s, float("-inf"))
        b_m, b_l, b_acc = _accumulate(
            b_s, b_m, b_l, b_acc, v, stride_vt, last, length, scale_log2,
            H, PRECISION, BLOCK_N, BLOCK_H, True, True,
        )  # fmt: skip
    else:
        # every row sees the first num_common keys, some row the first num_keys
        num_keys = tl.minimum(first_token + BLOCK_T, length) if CAUSAL else length
        num_common = first_token + 1 if CAUSAL else length
        num_full = num_common // BLOCK_N * BLOCK_N
        for i_n in tl.range(0, num_keys if USE_TMA else num_full, BLOCK_N):
            b_m, b_l, b_acc = _attend(
                b_q, b_m, b_l, b_acc, k, stride_kt, v, stride_vt,
                i_n, o_t, length, num_common, scale_log2,
                H, CAUSAL, PRECISION, BLOCK_N, BLOCK_H, USE_TMA, USE_TMA,
            )  # fmt: skip
        if not USE_TMA:
            for i_n in tl.range(num_full, num_keys, BLOCK_N):
                b_m, b_l, b_acc = _attend(
                    b_q, b_m, b_l, b_acc, k, stride_kt, v, stride_vt,
                    i_n, o_t, length, num_common, scale_log2,
                    H, CAUSAL, PRECISION, BLOCK_N, BLOCK_H, True, USE_TMA,
                )  # fmt: skip

    # write the result
    # [BLOCK_M, BLOCK_H]
    b_out = (b_acc * (1.0 / b_l)[:, None]).to(out_ptr.dtype.element_ty)
    m_m = (o_t < length) & (o_head < GROUP)
    tl.store(lse2_ptr + o_head.to(tl.int64) * stride_ln + o_t, b_m + tl.log2(b_l), mask=m_m)
    if QUERIES_BY_TMA:
        out_desc = tl.make_tensor_descriptor(
            out_ptr, [length, GROUP, H], [stride_ot, stride_on, 1], [BLOCK_T, BLOCK_GROUP, BLOCK_H]
        )
        out_desc.store([first_token, 0, 0], b_out.reshape(BLOCK_T, BLOCK_GROUP, BLOCK_H))
    else:
        o_h = tl.arange(0, BLOCK_H)
        o_out = o_t.to(tl.int64)[:, None] * stride_ot + o_head[:, None] * stride_on + o_h[None, :]
        tl.store(out_ptr + o_out, b_out, mask=m_m[:, None] & (o_h < H)[None, :])


# the number of tokens changes with every batch: specialising on it would only compile the same code again
@triton.jit(do_not_specialize=["stride_ln", "num_tiles"])
def _flash_attention_fwd_kernel(
    q_ptr, stride_qt, stride_qn,
    k_ptr, stride_kt, stride_kg,
    v_ptr, stride_vt, stride_vg,
    out_ptr, stride_ot, stride_on,
    lse2_ptr, stride_ln,
    tiles_ptr, cu_seqlens_ptr, scale_log2, num_kv_heads, num_tiles,
    GROUP: tl.constexpr, H: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    USE_TMA: tl.constexpr, AHEAD: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        for i_program in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=1):
            _flash_attention_fwd_tile(
                i_program, q_ptr, stride_qt, stride_qn, k_ptr, stride_kt, stride_kg,
                v_ptr, stride_vt, stride_vg, out_ptr, stride_ot, stride_on, lse2_ptr, stride_ln,
                tiles_ptr, cu_seqlens_ptr, scale_log2, num_kv_heads,
                GROUP, H, CAUSAL, PRECISION, BLOCK_T, BLOCK_GROUP, BLOCK_N, BLOCK_H, USE_TMA, AHEAD,
            )  # fmt: skip
    else:
        _flash_attention_fwd_tile(
            tl.program_id(0), q_ptr, stride_qt, stride_qn, k_ptr, stride_kt, stride_kg,
            v_ptr, stride_vt, stride_vg, out_ptr, stride_ot, stride_on, lse2_ptr, stride_ln,
            tiles_ptr, cu_seqlens_ptr, scale_log2, num_kv_heads,
            GROUP, H, CAUSAL, PRECISION, BLOCK_T, BLOCK_GROUP, BLOCK_N, BLOCK_H, USE_TMA, AHEAD,
        )  # fmt: skip


@triton.jit(do_not_specialize=["stride_en"])
def _flash_attention_bwd_delta_kernel(
    out_ptr, stride_ot, stride_on,
    dout_ptr, stride_dot, stride_don,
    dlse2_ptr, delta_ptr, stride_en,
    NUM_HEADS: tl.constexpr, H: tl.constexpr, HAS_DLSE2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    o_h = tl.arange(0, BLOCK_H)[None, :]
    m_n = o_n < NUM_HEADS
    m_nh = m_n[:, None] & (o_h < H)
    # [BLOCK_N, BLOCK_H]
    b_out = tl.load(out_ptr + i_t * stride_ot + o_n[:, None] * stride_on + o_h, mask=m_nh, other=0.0)
    b_dout = tl.load(dout_ptr + i_t * stride_dot + o_n[:, None] * stride_don + o_h, mask=m_nh, other=0.0)
    # [BLOCK_N]
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), axis=1)
    if HAS_DLSE2:
        b_delta -= LOG2E * tl.load(dlse2_ptr + o_n * stride_en + i_t, mask=m_n, other=0.0)
    tl.store(delta_ptr + o_n * stride_en + i_t, b_delta, mask=m_n)


@triton.jit
def _add_dq(
    b_dq, b_q, b_dout, b_lse2, b_delta,
    k, stride_kt, v, stride_vt,
    i_n, o_t, length, num_common, scale_log2,
    H: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, MASKED: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    # [BLOCK_M, BLOCK_N]
    b_k = _load_rows(k, stride_kt, i_n, length, H, BLOCK_N, BLOCK_H, MASKED, USE_TMA)
    b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
    if MASKED:  # noqa: SIM102 - as in _attend
        if not USE_TMA or i_n + BLOCK_N > num_common:
            o_n = i_n + tl.arange(0, BLOCK_N)[None, :]
            m_s = o_n < length
            if CAUSAL:
                m_s = m_s & (o_n <= o_t[:, None])
            b_s = tl.where(m_s, b_s, float("-inf"))
    # before the exponentials, which run beside the product
    b_v = _load_rows(v, stride_vt, i_n, length, H, BLOCK_N, BLOCK_H, MASKED, USE_TMA)
    b_dp = tl.dot(b_dout, b_v.T, input_precision=PRECISION)
    b_p = tl.exp2(b_s * scale_log2 - b_lse2[:, None])
    b_ds = b_p * (b_dp - b_delta[:, None])
    # [BLOCK_M, BLOCK_H]
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["stride_ln"])
def _flash_attention_bwd_dq_kernel(
    q_ptr, stride_qt, stride_qn,
    k_ptr, stride_kt, stride_kg,
    v_ptr, stride_vt, stride_vg,
    dout_ptr, stride_dot, stride_don,
    dq_ptr, stride_dqt, stride_dqn,
    lse2_ptr, delta_ptr, stride_ln,
    tiles_ptr, cu_seqlens_ptr, scale, scale_log2, num_kv_heads,
    GROUP: tl.constexpr, H: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    USE_TMA: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = BLOCK_T * BLOCK_GROUP
    # the tile: which tokens of which sequence, for which heads
    i_tile = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    i_g = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    i_seq = tl.load(tiles_ptr + 2 * i_tile)
    first_token = tl.load(tiles_ptr + 2 * i_tile + 1)
    start = tl.load(cu_seqlens_ptr + i_seq).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + i_seq + 1) - start).to(tl.int32)

    # addresses, from the start of the sequence
    q_ptr += start * stride_qt + i_g * GROUP * stride_qn
    k_ptr += start * stride_kt + i_g * stride_kg
    v_ptr += start * stride_vt + i_g * stride_vg
    dout_ptr += start * stride_dot + i_g * GROUP * stride_don
    dq_ptr += start * stride_dqt + i_g * GROUP * stride_dqn
    first_row = start + i_g * GROUP * stride_ln
    if USE_TMA:
        q = tl.make_tensor_descriptor(
            q_ptr, [length, GROUP, H], [stride_qt, stride_qn, 1], [BLOCK_T, BLOCK_GROUP, BLOCK_H]
        )
        dout = tl.make_tensor_descriptor(
            dout_ptr, [length, GROUP, H], [stride_dot, stride_don, 1], [BLOCK_T, BLOCK_GROUP, BLOCK_H]
        )
        k = tl.make_tensor_descriptor(k_ptr, [length, H], [stride_kt, 1], [BLOCK_N, BLOCK_H])
        v = tl.make_tensor_descriptor(v_ptr, [length, H], [stride_vt, 1], [BLOCK_N, BLOCK_H])
    else:
        q = q_ptr
        dout = dout_ptr
        k = k_ptr
        v = v_ptr

    # queries, their output gradients and their statistics
    o_m = tl.arange(0, BLOCK_M)
    o_t = first_token + o_m // BLOCK_GROUP
    o_head = o_m % BLOCK_GROUP
    m_m = (o_t < length) & (o_head < GROUP)
    # [BLOCK_M, BLOCK_H]
    b_q = _load_queries(
        q, stride_qt, stride_qn, first_token, length, GROUP, H, BLOCK_T, BLOCK_GROUP, BLOCK_H, USE_TMA
    )
    b_dout = _load_queries(
        dout, stride_dot, stride_don, first_token, length, GROUP, H, BLOCK_T, BLOCK_GROUP, BLOCK_H, USE_TMA
    )
    # [BLOCK_M]
    o_row = first_row + o_head.to(tl.int64) * stride_ln + o_t
    b_lse2 = tl.load(lse2_ptr + o_row, mask=m_m, other=float("inf"))
    b_delta = tl.load(delta_ptr + o_row, mask=m_m, other=0.0)

    # walk the keys
    num_keys = tl.minimum(first_token + BLOCK_T, length) if CAUSAL else length
    num_common = first_token + 1 if CAUSAL else length
    num_full = num_common // BLOCK_N * BLOCK_N
    b_dq = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for i_n in tl.range(0, num_keys if USE_TMA else num_full, BLOCK_N):
        b_dq = _add_dq(
            b_dq, b_q, b_dout, b_lse2, b_delta, k, stride_kt, v, stride_vt,
            i_n, o_t, length, num_common, scale_log2,
            H, CAUSAL, PRECISION, BLOCK_N, BLOCK_H, USE_TMA, USE_TMA,
        )  # fmt: skip
    if not USE_TMA:
        for i_n in tl.range(num_full, num_keys, BLOCK_N):
            b_dq = _add_dq(
                b_dq, b_q, b_dout, b_lse2, b_delta, k, stride_kt, v, stride_vt,
                i_n, o_t, length, num_common, scale_log2,
                H, CAUSAL, PRECISION, BLOCK_N, BLOCK_H, True, USE_TMA,
            )  # fmt: skip

    # write the result
    # [BLOCK_M, BLOCK_H]
    b_dq = (b_dq * scale).to(dq_ptr.dtype.element_ty)
    o_h = tl.arange(0, BLOCK_H)
    o_dq = o_t.to(tl.int64)[:, None] * stride_dqt + o_head[:, None] * stride_dqn + o_h[None, :]
    tl.store(dq_ptr + o_dq, b_dq, mask=m_m[:, None] & (o_h < H)[None, :])


@triton.jit(do_not_specialize=["stride_ln"])
def _flash_attention_bwd_dkv_kernel(
    q_ptr, stride_qt, stride_qn,
    k_ptr, stride_kt, stride_kg,
    v_ptr, stride_vt, stride_vg,
    dout_ptr, stride_dot, stride_don,
    dk_ptr, dv_ptr, stride_dt, stride_dg,
    lse2_ptr, delta_ptr, stride_ln,
    tiles_ptr, cu_seqlens_ptr, scale, scale_log2, num_kv_heads,
    GROUP: tl.constexpr, H: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    NEEDS_DK: tl.constexpr, NEEDS_DV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    USE_TMA: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = BLOCK_T * BLOCK_GROUP
    # the tile: which keys of which sequence, for which head
    i_tile = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    i_g = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    i_seq = tl.load(tiles_ptr + 2 * i_tile)
    i_n = tl.load(tiles_ptr + 2 * i_tile + 1)
    start = tl.load(cu_seqlens_ptr + i_seq).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + i_seq + 1) - start).to(tl.int32)

    # addresses, from the start of the sequence
    q_ptr += start * stride_qt + i_g * GROUP * stride_qn
    k_ptr += start * stride_kt + i_g * stride_kg
    v_ptr += start * stride_vt + i_g * stride_vg
    dout_ptr += start * stride_dot + i_g * GROUP * stride_don
    first_row = start + i_g * GROUP * stride_ln
    if USE_TMA:
        q = tl.make_tensor_descriptor(
            q_ptr, [length, GROUP, H], [stride_qt, stride_qn, 1], [BLOCK_T, BLOCK_GROUP, BLOCK_H]
        )
        dout = tl.make_tensor_descriptor(
            dout_ptr, [length, GROUP, H], [stride_dot, stride_don, 1], [BLOCK_T, BLOCK_GROUP, BLOCK_H]
        )
        k = tl.make_tensor_descriptor(k_ptr, [length, H], [stride_kt, 1], [BLOCK_N, BLOCK_H])
        v = tl.make_tensor_descriptor(v_ptr, [length, H], [stride_vt, 1], [BLOCK_N, BLOCK_H])
    else:
        q = q_ptr
        dout = dout_ptr
        k = k_ptr
        v = v_ptr

    # keys and values
    # [BLOCK_N, BLOCK_H] each. Keys beyond the end are zeros, and their results are never stored
    b_k = _load_rows(k, stride_kt, i_n, length, H, BLOCK_N, BLOCK_H, True, USE_TMA)
    b_v = _load_rows(v, stride_vt, i_n, length, H, BLOCK_N, BLOCK_H, True, USE_TMA)
    o_n = i_n + tl.arange(0, BLOCK_N)
    o_m = tl.arange(0, BLOCK_M)
    o_head = o_m % BLOCK_GROUP
    # walk the queries of the whole group
    b_dk = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for i_t in tl.range(i_n // BLOCK_T * BLOCK_T if CAUSAL else 0, length, BLOCK_T):
        o_t = i_t + o_m // BLOCK_GROUP
        m_m = (o_t < length) & (o_head < GROUP)
        o_row = first_row + o_head.to(tl.int64) * stride_ln + o_t
        # [BLOCK_M, BLOCK_H]
        b_q = _load_queries(
            q, stride_qt, stride_qn, i_t, length, GROUP, H, BLOCK_T, BLOCK_GROUP, BLOCK_H, USE_TMA
        )
        # [BLOCK_N, BLOCK_M]
        b_s = tl.dot(b_k, b_q.T, input_precision=PRECISION)
        b_lse2 = tl.load(lse2_ptr + o_row, mask=m_m, other=float("inf"))
        if USE_TMA:
            # before the exponentials, as in _add_dq. With pointers it would cost registers, in fp32 spills
            b_dout = _load_queries(
                dout, stride_dot, stride_don, i_t, length, GROUP, H, BLOCK_T, BLOCK_GROUP, BLOCK_H, True
            )
            if NEEDS_DK:
                b_dp = tl.dot(b_v, b_dout.T, input_precision=PRECISION)
        b_p = tl.exp2(b_s * scale_log2 - b_lse2[None, :])
        if CAUSAL:
            b_p = tl.where(o_n[:, None] <= o_t[None, :], b_p, 0.0)
        if not USE_TMA:
            b_dout = _load_queries(
                dout, stride_dot, stride_don, i_t, length, GROUP, H, BLOCK_T, BLOCK_GROUP, BLOCK_H, False
            )
        if NEEDS_DV:
            b_dv = add_product(b_dv, b_p.to(b_dout.dtype), b_dout, PRECISION)
        if NEEDS_DK:
            b_delta = tl.load(delta_ptr + o_row, mask=m_m, other=0.0)
            if not USE_TMA:
                b_dp = tl.dot(b_v, b_dout.T, input_precision=PRECISION)
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk = add_product(b_dk, b_ds.to(b_q.dtype), b_q, PRECISION)

    # write the results
    # [BLOCK_N, BLOCK_H]
    o_h = tl.arange(0, BLOCK_H)
    o_kv = (start + o_n)[:, None] * stride_dt + i_g * stride_dg + o_h[None, :]
    m_kv = (o_n < length)[:, None] & (o_h < H)[None, :]
    if NEEDS_DK:
        tl.store(dk_ptr + o_kv, (b_dk * scale).to(dk_ptr.dtype.element_ty), mask=m_kv)
    if NEEDS_DV:
        tl.store(dv_ptr + o_kv, b_dv.to(dv_ptr.dtype.element_ty), mask=m_kv)


def _shape_class(rule: dict[str, int | bool], dtype: torch.dtype, longest: int) -> dict[str, int]:
    # from 128 tokens on no rule cuts its tile for short texts
    longest = min(max(longest, 16), 128)
    return {
        "width": rule["BLOCK_H"],
        "group": rule["BLOCK_GROUP"],
        "bits": 8 * dtype.itemsize,
        "longest": longest,
    }


@tuned.cache
def _launch_config(
    head_width: int,
    group: int,
    max_length: int,
    *,
    capability: int,
    dtype: torch.dtype,
    aligned: bool = True,
    causal: bool = False,
) -> dict[str, int | bool]:
    """Tile sizes, warps and the way to load. Plain Python: a machine without a GPU reads and compiles it.

    Args:
        group: query heads per key/value head.
        aligned: bases and strides let descriptors be made.
    """
    block_h = max(16, triton.next_power_of_2(head_width))
    block_group = triton.next_power_of_2(group)
    longest = triton.next_power_of_2(max(max_length, 1))
    use_tma = aligned and dtype.itemsize == 2 and use_descriptors(capability)
    # up to 64 tokens there are two blocks of keys at most, and with 256 columns no register for more scores
    has_next = use_tma and block_h <= 128 and longest > 64
    ahead = has_next and not causal
    num_stages = 3 if has_next else 2
    if dtype.itemsize == 4:
        # full fp32 runs without tensor cores, operands in registers: the largest tiles that do not spill
        block_m, block_n = 64 if block_h <= 64 else 32, 32 if block_h <= 128 else 16
        num_stages = 1
    elif use_tma:
        # of NV-Embed's width tiles of which three lie on a multiprocessor. 128 keys at 128 columns are wrong
        # (queries in registers) or without overlap (ahead): bench/NOTES.md
        block_m, block_n = (64, 32) if head_width == 128 else (128, 128 if block_h <= 64 else 64)
    else:
        block_m, block_n = (128, 64) if block_h <= 128 else (64, 32)
        # 8.6, 8.9 and 12.0 have 99 KB of shared memory for a program, 8.0 has 163
        num_stages = 3 if capability == 80 else 2
    # short texts: no tile much taller or wider than the longest of them
    block_m = max(block_group, min(block_m, max(64, longest * block_group)))
    is_small = block_m <= 64 and dtype.itemsize == 2 and (use_tma or block_h <= 128)
    rule = {
        "BLOCK_T": block_m // block_group,
        "BLOCK_GROUP": block_group,
        "BLOCK_N": min(block_n, max(32, longest)),
        "BLOCK_H": block_h,
        "USE_TMA": use_tma,
        "AHEAD": ahead,
        "num_warps": 4 if is_small else 8,
        "num_stages": num_stages,
        "PERSISTENT": False,
    }
    return tuned.override("flash_attention.fwd", capability, rule, **_shape_class(rule, dtype, longest))


@tuned.cache
def _bwd_launch_config(
    kernel: Literal["dq", "dkv"],
    head_width: int,
    group: int,
    max_length: int,
    *,
    capability: int,
    dtype: torch.dtype,
    aligned: bool = True,
) -> dict[str, int | bool]:
    """As `_launch_config`, for one of the two backward kernels."""
    block_h = max(16, triton.next_power_of_2(head_width))
    block_group = triton.next_power_of_2(group)
    longest = triton.next_power_of_2(max(max_length, 1))
    use_tma = aligned and dtype.itemsize == 2 and use_descriptors(capability)
    num_warps, num_stages = 8, 2
    if dtype.itemsize == 4:
        # operands in registers, as in `_launch_config`. dq of 256 columns spills all the same
        block_m = block_n = 32 if block_h <= 64 else 16
        num_warps, num_stages = 8 if kernel == "dq" else 4, 1
    elif block_h > 128:
        block_m, block_n = (32 if kernel == "dkv" else 64, 64) if use_tma else (32, 32)
    elif use_tma:
        # dq, whose queries lie in registers, never has as many keys as columns: bench/NOTES.md
        block_m, block_n = (128, 128 if block_h == 64 else 64) if kernel == "dq" else (64, 128)
        num_stages = 3
    else:
        block_m = block_n = 64
    # short texts: no tile much taller or wider than the longest of them
    block_m = max(16, block_group, min(block_m, max(64, longest * block_group)))
    rule = {
        "BLOCK_T": block_m // block_group,
        "BLOCK_GROUP": block_group,
        "BLOCK_N": min(block_n, max(32, longest)),
        "BLOCK_H": block_h,
        "USE_TMA": use_tma,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    return tuned.override(f"flash_attention.{kernel}", capability, rule, **_shape_class(rule, dtype, longest))


@functools.cache
def _bwd_delta_launch_config(num_heads: int, head_width: int) -> dict[str, int]:
    """One token a program: 16 elements of each tensor per thread."""
    block_n, block_h = triton.next_power_of_2(num_heads), max(16, triton.next_power_of_2(head_width))
    return {"BLOCK_N": block_n, "BLOCK_H": block_h, "num_warps": min(max(block_n * block_h // 512, 1), 8)}


def _check_limits(q: torch.Tensor, k: torch.Tensor) -> None:
    if q.dtype == torch.float64:
        raise mismatch("q", "fp16, bf16 or fp32", q)
    num_heads, width = q.shape[1:]
    if not MIN_HEAD_WIDTH <= width <= MAX_HEAD_WIDTH:
        limits = f"from {MIN_HEAD_WIDTH} to {MAX_HEAD_WIDTH}"
        raise Unsupported(f"q must have heads {limits} wide for this kernel, got {width}")
    group = num_heads // k.shape[1]
    max_group = min(MAX_GROUP, MAX_GROUP_COLUMNS // triton.next_power_of_2(width))
    if group > max_group:
        wanted = f"at most {max_group} heads of width {width} per head of k"
        raise Unsupported(f"q must have {wanted} for this kernel, got {group}")


@replayed
def _launch_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SeqLayout, scale: float | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    check_flash_attention(q, k, v, layout, scale, causal)
    _check_limits(q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    num_tokens, num_heads, width = q.shape
    num_kv_heads = k.shape[1]
    out = q.new_empty(num_tokens, num_heads, width)
    lse2 = q.new_empty(num_heads, num_tokens, dtype=torch.float32)
    if num_tokens == 0:
        return out, lse2
    group = num_heads // num_kv_heads
    sm = capability(q.device)
    aligned = use_descriptors(sm, q, k, v, out)
    longest = triton.next_power_of_2(max(layout.max_length, 1))  # few values, so that few are cached
    config = _launch_config(
        width, group, longest, capability=sm, dtype=q.dtype, aligned=aligned, causal=causal
    )
    tiles = layout.tiles(config["BLOCK_T"])
    num_tiles = len(tiles) * num_kv_heads
    launch(
        _flash_attention_fwd_kernel,
        min(num_tiles, num_multiprocessors(q.device)) if config["PERSISTENT"] else num_tiles,
        of_layout=("tiles_ptr", "cu_seqlens_ptr"),
        **operands(("q", q, "tn"), ("k", k, "tg"), ("v", v, "tg"), ("out", out, "tn"), ("lse2", lse2, "n")),
        tiles_ptr=tiles,
        cu_seqlens_ptr=layout.cu_seqlens,
        scale_log2=scale * LOG2E.value,
        num_kv_heads=num_kv_heads,
        num_tiles=num_tiles,
        GROUP=group,
        H=width,
        CAUSAL=causal,
        PRECISION=input_precision(q.dtype),
        **config,
    )
    return out, lse2


def _launch_bwd_delta(
    out: torch.Tensor | None, dout: torch.Tensor, dlse2: torch.Tensor | None
) -> torch.Tensor:
    """[N, T] fp32: rowsum(dout out) - dlse2 log2(e)."""
    assert out is not None
    num_tokens, num_heads, width = out.shape
    delta = out.new_empty(num_heads, num_tokens, dtype=torch.float32)
    launch(
        _flash_attention_bwd_delta_kernel,
        num_tokens,
        **operands(("out", out, "tn"), ("dout", dout, "tn")),
        dlse2_ptr=None if dlse2 is None else dlse2.contiguous(),
        delta_ptr=delta,
        stride_en=delta.stride(0),
        NUM_HEADS=num_heads,
        H=width,
        HAS_DLSE2=dlse2 is not None,
        **_bwd_delta_launch_config(num_heads, width),
    )
    return delta


def _launch_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None,
    lse2: torch.Tensor,
    dout: torch.Tensor,
    dlse2: torch.Tensor | None,
    layout: SeqLayout,
    scale: float,
    causal: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv). One that is not needed is empty. `out` may be None if dv alone is needed."""
    num_tokens, num_heads, width = q.shape
    num_kv_heads = k.shape[1]
    needs_dq, needs_dk, needs_dv = needs
    dq, dk, dv = (
        t.new_empty(num_tokens if needed else 0, *t.shape[1:])
        for t, needed in zip((q, k, v), needs, strict=True)
    )
    if num_tokens == 0:
        return dq, dk, dv
    dout = with_contiguous_rows(dout)
    delta = _launch_bwd_delta(out, dout, dlse2) if needs_dq or needs_dk else None
    group = num_heads // num_kv_heads
    sm = capability(q.device)
    aligned = use_descriptors(sm, q, k, v, dout)
    target = {"capability": sm, "dtype": q.dtype, "aligned": aligned}
    longest = triton.next_power_of_2(max(layout.max_length, 1))
    shared = {
        **operands(("q", q, "tn"), ("k", k, "tg"), ("v", v, "tg"), ("dout", dout, "tn"), ("lse2", lse2, "n")),
        "delta_ptr": delta,
        "cu_seqlens_ptr": layout.cu_seqlens,
        "scale": scale,
        "scale_log2": scale * LOG2E.value,
        "num_kv_heads": num_kv_heads,
        "GROUP": group,
        "H": width,
        "CAUSAL": causal,
        "PRECISION": input_precision(q.dtype),
    }
    if needs_dq:
        config = _bwd_launch_config("dq", width, group, longest, **target)
        tiles = layout.tiles(config["BLOCK_T"])
        launch(
            _flash_attention_bwd_dq_kernel,
            len(tiles) * num_kv_heads,
            **shared,
            **operands(("dq", dq, "tn")),
            tiles_ptr=tiles,
            **config,
        )
    if needs_dk or needs_dv:
        config = _bwd_launch_config("dkv", width, group, longest, **target)
        tiles = layout.tiles(config["BLOCK_N"])
        launch(
            _flash_attention_bwd_dkv_kernel,
            len(tiles) * num_kv_heads,
            **shared,
            dk_ptr=dk if needs_dk else None,
            dv_ptr=dv if needs_dv else None,
            stride_dt=k.shape[1] * width,
            stride_dg=width,
            tiles_ptr=tiles,
            NEEDS_DK=needs_dk,
            NEEDS_DV=needs_dv,
            **config,
        )
    return dq, dk, dv


@torch.library.custom_op("nvembed_fast::flash_attention", mutates_args=(), tags=BY_HOST_LISTS)
def _flash_attention_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, host_lengths: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch_fwd(q, k, v, layout_of(host_lengths, q.device), scale, causal)


@_flash_attention_op.register_fake
def _flash_attention_fake(q, k, v, host_lengths, scale, causal):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("nvembed_fast::flash_attention_bwd", mutates_args=(), tags=BY_HOST_LISTS)
def _flash_attention_bwd_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None,
    lse2: torch.Tensor,
    dout: torch.Tensor,
    dlse2: torch.Tensor | None,
    host_lengths: torch.Tensor,
    scale: float,
    causal: bool,
    needs_dq: bool,
    needs_dk: bool,
    needs_dv: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layout, needs = layout_of(host_lengths, q.device), (needs_dq, needs_dk, needs_dv)
    check_flash_attention_bwd(q, k, v, out, lse2, dout, dlse2, layout, scale, causal, needs_dq or needs_dk)
    _check_limits(q, k)
    return _launch_bwd(q, k, v, out, lse2, dout, dlse2, layout, scale, causal, needs)


@_flash_attention_bwd_op.register_fake
def _flash_attention_bwd_fake(
    q, k, v, out, lse2, dout, dlse2, host_lengths, scale, causal, needs_dq, needs_dk, needs_dv
):
    return tuple(
        t.new_empty(t.shape[0] if needed else 0, t.shape[1], t.shape[2])
        for t, needed in ((q, needs_dq), (k, needs_dk), (v, needs_dv))
    )


def _save(ctx, inputs, output) -> None:
    q, k, v, host_lengths, ctx.scale, ctx.causal = inputs
    out, lse2 = output
    ctx.save_for_backward(q, k, v, host_lengths, out if any(ctx.needs_input_grad[:2]) else None, lse2)
    # the lse2 is seldom used: no zeros for it
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlse2):
    q, k, v, host_lengths, out, lse2 = ctx.saved_tensors
    dout = torch.zeros_like(q) if dout is None else dout
    needs = ctx.needs_input_grad[:3]
    args = (q, k, v, out, lse2, dout, dlse2, host_lengths, ctx.scale, ctx.causal, *needs)
    grads = _flash_attention_bwd_op(*args)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None, None


_flash_attention_op.register_autograd(_differentiate, setup_context=_save)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SeqLayout,
    scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Triton version of `reference.flash_attention`: same arguments, same result.

    Raises:
        ValueError: a shape, dtype, stride or device the kernel cannot take, or a scale that is not positive.
    """
    if is_dispatched(q, k, v):
        check_flash_attention(q, k, v, layout, scale, causal)
        _check_limits(q, k)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, lse2 = _flash_attention_op(q, k, v, layout.host_lengths, scale, causal)
    else:
        out, lse2 = _launch_fwd(q, k, v, layout, scale, causal)
    return (out, lse2 * LN2) if return_lse else out
