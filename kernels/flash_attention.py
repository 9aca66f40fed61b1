"""Softmax attention inside each packed sequence. Contract: `reference.flash_attention`.

One program owns one tile of the host's tile list for one key/value head: up to
BLOCK_T tokens of one sequence times the whole group of query heads that read
this head, token-major. Keys and values are thus loaded once per group, and a
text of a few dozen tokens still fills the tile.

With scores s = q k^T and c = scale * log2(e), each key block updates per row

    m' = max(m, c max(s)),  p = exp2(c s - m'),  a = exp2(m - m'),
    l' = a l + sum(p),      acc' = a acc + p v,

from m = -inf, l = 0, acc = 0. In the end out = acc / l, and the logarithm of
the denominator is (m + log2(l)) ln(2). Every row sees key 0, which lies in the
first block, so m is finite from there on and needs no guard. Blocks that all
rows see whole take no mask; only the end of the sequence and the diagonal do.

The invariant: row pointers and descriptors start at the sequence and end with
it, so that what lies beyond is read as zero and a NaN there cannot matter (the
mask makes p zero, but zero times NaN would be NaN).

Two ways to load, picked by `_launch_config`: tensor descriptors (TMA) on sm_90,
pointers elsewhere. With descriptors one loop serves all blocks and a branch
masks the last ones; with pointers that branch would cost layout conversions in
every block (sm_80), so the last ones have a loop of their own.

Prefixes inside kernels: i_ index, o_ offsets, m_ mask, b_ block in registers.
"""

import functools

import torch
import triton
import triton.language as tl

from nvembed_fast.kernels._common import (
    COMPILE_OPTIONS,
    LOG2E,
    allow_descriptors,
    capability,
    input_precision,
    use_descriptors,
)
from nvembed_fast.kernels.errors import Unsupported, mismatch
from nvembed_fast.kernels.layout import SeqLayout

__all__ = ["flash_attention"]

LN2 = tl.constexpr(0.6931471805599453)
MIN_HEAD_WIDTH, MAX_HEAD_WIDTH = 16, 256
MAX_GROUP = 64  # query heads per key/value head: they share a tile


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


# the number of tokens changes with every batch: specialising on it would only compile the same code again
@triton.jit(do_not_specialize=["stride_ln"])
def _flash_attention_fwd_kernel(
    q_ptr, stride_qt, stride_qn,
    k_ptr, stride_kt, stride_kg,
    v_ptr, stride_vt, stride_vg,
    out_ptr, stride_ot, stride_on,
    lse_ptr, stride_ln,
    tiles_ptr, cu_seqlens_ptr, scale_log2, num_kv_heads,
    GROUP: tl.constexpr, H: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    USE_TMA: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = BLOCK_T * BLOCK_GROUP
    i_tile = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    i_g = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    i_seq = tl.load(tiles_ptr + 2 * i_tile)
    first_token = tl.load(tiles_ptr + 2 * i_tile + 1)
    start = tl.load(cu_seqlens_ptr + i_seq).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + i_seq + 1) - start).to(tl.int32)

    q_ptr += start * stride_qt + i_g * GROUP * stride_qn
    k_ptr += start * stride_kt + i_g * stride_kg
    v_ptr += start * stride_vt + i_g * stride_vg
    out_ptr += start * stride_ot + i_g * GROUP * stride_on
    lse_ptr += start + i_g * GROUP * stride_ln

    # rows are token-major: row = token * BLOCK_GROUP + head inside the group
    o_m = tl.arange(0, BLOCK_M)
    o_t = first_token + o_m // BLOCK_GROUP
    o_head = o_m % BLOCK_GROUP
    # [BLOCK_M, BLOCK_H]
    if USE_TMA:
        q_desc = tl.make_tensor_descriptor(
            q_ptr, [length, GROUP, H], [stride_qt, stride_qn, 1], [BLOCK_T, BLOCK_GROUP, BLOCK_H]
        )
        k = tl.make_tensor_descriptor(k_ptr, [length, H], [stride_kt, 1], [BLOCK_N, BLOCK_H])
        v = tl.make_tensor_descriptor(v_ptr, [length, H], [stride_vt, 1], [BLOCK_N, BLOCK_H])
        b_q = q_desc.load([first_token, 0, 0]).reshape(BLOCK_M, BLOCK_H)
    else:
        k = k_ptr
        v = v_ptr
        o_h = tl.arange(0, BLOCK_H)
        m_q = ((o_t < length) & (o_head < GROUP))[:, None] & (o_h < H)[None, :]
        o_q = o_t.to(tl.int64)[:, None] * stride_qt + o_head[:, None] * stride_qn + o_h[None, :]
        b_q = tl.load(q_ptr + o_q, mask=m_q, other=0.0)

    # every row sees the first num_common keys, some row the first num_keys
    num_keys = tl.minimum(first_token + BLOCK_T, length) if CAUSAL else length
    num_common = first_token + 1 if CAUSAL else length
    num_full = num_common // BLOCK_N * BLOCK_N
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for i_n in tl.range(0, num_keys if USE_TMA else num_full, BLOCK_N):
        b_m, b_l, b_acc = _attend(
            b_q, b_m, b_l, b_acc, k, stride_kt, v, stride_vt, i_n, o_t, length, num_common, scale_log2,
            H, CAUSAL, PRECISION, BLOCK_N, BLOCK_H, USE_TMA, USE_TMA,
        )  # fmt: skip
    if not USE_TMA:
        for i_n in tl.range(num_full, num_keys, BLOCK_N):
            b_m, b_l, b_acc = _attend(
                b_q, b_m, b_l, b_acc, k, stride_kt, v, stride_vt, i_n, o_t, length, num_common, scale_log2,
                H, CAUSAL, PRECISION, BLOCK_N, BLOCK_H, True, USE_TMA,
            )  # fmt: skip

    # [BLOCK_M, BLOCK_H]
    b_out = (b_acc * (1.0 / b_l)[:, None]).to(out_ptr.dtype.element_ty)
    m_m = (o_t < length) & (o_head < GROUP)
    tl.store(lse_ptr + o_head.to(tl.int64) * stride_ln + o_t, (b_m + tl.log2(b_l)) * LN2, mask=m_m)
    if USE_TMA:
        out_desc = tl.make_tensor_descriptor(
            out_ptr, [length, GROUP, H], [stride_ot, stride_on, 1], [BLOCK_T, BLOCK_GROUP, BLOCK_H]
        )
        out_desc.store([first_token, 0, 0], b_out.reshape(BLOCK_T, BLOCK_GROUP, BLOCK_H))
    else:
        o_h = tl.arange(0, BLOCK_H)
        o_out = o_t.to(tl.int64)[:, None] * stride_ot + o_head[:, None] * stride_on + o_h[None, :]
        tl.store(out_ptr + o_out, b_out, mask=m_m[:, None] & (o_h < H)[None, :])


@functools.cache
def _launch_config(
    capability: int, head_width: int, group: int, dtype: torch.dtype, max_length: int, aligned: bool = True
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
    num_stages = 2
    if dtype.itemsize == 4:
        # full fp32 runs without tensor cores, operands in registers: the largest tiles that do not spill
        block_m, block_n = 64 if block_h <= 64 else 32, 32 if block_h <= 128 else 16
        num_stages = 1
    elif use_tma:
        block_m, block_n = 128, 128 if block_h <= 128 else 64
    else:
        block_m, block_n = (128, 64) if block_h <= 128 else (64, 32)
        # 8.6, 8.9 and 12.0 have 99 KB of shared memory for a program, 8.0 has 163
        num_stages = 3 if capability == 80 else 2
    # short texts: no tile much taller or wider than the longest of them
    block_m = max(block_group, min(block_m, max(64, longest * block_group)))
    is_small = block_m <= 64 and dtype.itemsize == 2 and (use_tma or block_h <= 128)
    return {
        "BLOCK_T": block_m // block_group,
        "BLOCK_GROUP": block_group,
        "BLOCK_N": min(block_n, max(32, longest)),
        "BLOCK_H": block_h,
        "USE_TMA": use_tma,
        "num_warps": 4 if is_small else 8,
        "num_stages": num_stages,
    }


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SeqLayout, scale: float) -> None:
    if q.ndim != 3 or q.shape[0] != layout.num_tokens:
        raise mismatch("q", f"[{layout.num_tokens}, N, H]", q)
    num_heads, width = q.shape[1:]
    if k.ndim != 3 or k.shape[0] != q.shape[0] or k.shape[2] != width:
        raise mismatch("k", f"[{layout.num_tokens}, G, {width}]", k)
    if v.shape != k.shape:
        raise mismatch("v", f"{list(k.shape)} like k", v)
    num_kv_heads = k.shape[1]
    if not num_kv_heads or not num_heads or num_heads % num_kv_heads:
        raise mismatch("q", f"[T, N, H] with N a multiple of the {num_kv_heads} heads of k", q)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise mismatch(name, "fp16, bf16 or fp32", t)
        if t.dtype != q.dtype:
            raise mismatch(name, f"{q.dtype} like q", t)
        if t.device != layout.cu_seqlens.device:
            raise mismatch(name, f"on {layout.cu_seqlens.device} like the layout", t)
        if t.stride(2) != 1:
            raise mismatch(name, "strided with contiguous heads (last stride 1)", t)
    if not MIN_HEAD_WIDTH <= width <= MAX_HEAD_WIDTH:
        limits = f"from {MIN_HEAD_WIDTH} to {MAX_HEAD_WIDTH}"
        raise Unsupported(f"q must have heads {limits} wide for this kernel, got {width}")
    if num_heads // num_kv_heads > MAX_GROUP:
        group = num_heads // num_kv_heads
        raise Unsupported(f"q must have at most {MAX_GROUP} heads per head of k for this kernel, got {group}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")


def _forward(q, k, v, layout: SeqLayout, scale: float, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_heads, width = q.shape
    num_kv_heads = k.shape[1]
    out = q.new_empty(num_tokens, num_heads, width)
    lse = q.new_empty(num_heads, num_tokens, dtype=torch.float32)
    if num_tokens == 0:
        return out, lse
    group = num_heads // num_kv_heads
    sm = capability(q.device)
    aligned = use_descriptors(sm, q, k, v, out)
    longest = triton.next_power_of_2(max(layout.max_length, 1))  # few values, so that few are cached
    config = _launch_config(sm, width, group, q.dtype, longest, aligned)
    if config["USE_TMA"]:
        allow_descriptors()
    tiles = layout.tiles(config["BLOCK_T"])
    _flash_attention_fwd_kernel[(len(tiles) * num_kv_heads,)](
        q_ptr=q,
        stride_qt=q.stride(0),
        stride_qn=q.stride(1),
        k_ptr=k,
        stride_kt=k.stride(0),
        stride_kg=k.stride(1),
        v_ptr=v,
        stride_vt=v.stride(0),
        stride_vg=v.stride(1),
        out_ptr=out,
        stride_ot=out.stride(0),
        stride_on=out.stride(1),
        lse_ptr=lse,
        stride_ln=lse.stride(0),
        tiles_ptr=tiles,
        cu_seqlens_ptr=layout.cu_seqlens,
        scale_log2=scale * LOG2E.value,
        num_kv_heads=num_kv_heads,
        GROUP=group,
        H=width,
        CAUSAL=causal,
        PRECISION=input_precision(q.dtype),
        **config,
        **COMPILE_OPTIONS,
    )
    return out, lse


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
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check(q, k, v, layout, scale)
    out, lse = _forward(q, k, v, layout, scale, causal)
    return (out, lse) if return_lse else out
