"""Tokens attend to L latents, direct or absorbed. Contracts: `reference.latent_attention`, `latent_weights`,
`absorbed_latent_attention`.

The direct form is flash attention over keys that every token shares: one
program owns BLOCK_T tokens of one head and walks the latents with an online
softmax. Heads wider than MAX_HEAD_WIDTH do not fit registers; they go through
library products, a chunk of tokens at a time.

The absorbed form is two products with a softmax between them. The second is
left to the library; the first is fused with the softmax, so that scores never
reach memory:

1. One program owns BLOCK_T tokens of one head. It takes the head's L latents
   in pieces of BLOCK_L, as many as registers hold in fp32: a piece is a matrix
   product over D, with running maximum m and sum l as in an online softmax.
2. All pieces but the last are parked in the output as exp2(s - m), with the m
   of that time. The last one is written finished.
3. The parked ones, still in the L2 cache, get their factor exp2(m_then - m) / l.

A single piece of L = 512 would need no parking, but leaves room for 64 tokens:
1152 bytes of x and A per 65536 operations instead of 768. By the data sheets
the L2 cache then keeps the tensor cores waiting (computed; bench/NOTES.md).

No tile depends on T, so a token's bits do not depend on its batch.

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

__all__ = ["absorbed_latent_attention", "latent_attention", "latent_weights"]

MAX_HEAD_WIDTH = 256  # of the direct kernel
MAX_LATENTS = 1024  # of the fused softmax: its pieces are unrolled
MAX_SCORES = 1 << 24  # fp32 scores in memory at a time for wide heads: 64 MiB


@triton.jit(do_not_specialize=["num_tokens"])
def _latent_attention_fwd_kernel(
    q_ptr, stride_qt, stride_qn,
    k_ptr, stride_kl, stride_kn,
    v_ptr, stride_vl, stride_vn,
    out_ptr, stride_ot, stride_on,
    num_tokens, scale_log2,
    N: tl.constexpr, L: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
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

    out_ptrs = out_ptr + o_t.to(tl.int64)[:, None] * stride_ot + i_n * stride_on + o_h[None, :]
    tl.store(out_ptrs, (b_acc / b_sum[:, None]).to(out_ptr.dtype.element_ty), mask=m_th)


@triton.jit(do_not_specialize=["num_tokens"])
def _latent_weights_fwd_kernel(
    x_ptr, stride_xt,
    a_ptr, stride_al,
    p_ptr, num_tokens,
    D: tl.constexpr, N: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    NUM_PIECES: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    # the heads of the same tokens are neighbours: x comes from memory once, A stays in the L2 cache
    i_n = tl.program_id(0) % N
    i_t = tl.program_id(0) // N * BLOCK_T
    o_t = i_t + tl.arange(0, BLOCK_T)
    o_l = tl.arange(0, BLOCK_L)
    o_k = tl.arange(0, BLOCK_K)
    # the stride of p is a constant, so that its addresses take one register
    p_ptrs = p_ptr + o_t.to(tl.int64)[:, None] * (N * L) + i_n * L + o_l[None, :]
    if USE_TMA:
        x = tl.make_tensor_descriptor(x_ptr, [num_tokens, D], [stride_xt, 1], [BLOCK_T, BLOCK_K])
        a = tl.make_tensor_descriptor(a_ptr, [N * L, D], [stride_al, 1], [BLOCK_L, BLOCK_K])
    else:
        # rows beyond the last are read as the last: they are masked where it matters, below
        x_ptr += i_t.to(tl.int64) * stride_xt
        o_x = tl.minimum(tl.arange(0, BLOCK_T), num_tokens - 1 - i_t)[:, None] * stride_xt + o_k[None, :]

    b_max = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_T], dtype=tl.float32)
    parked_max = ()
    for i_piece in tl.static_range(NUM_PIECES):
        i_l = i_n * L + i_piece * BLOCK_L
        if not USE_TMA:
            a_piece_ptr = a_ptr + i_l.to(tl.int64) * stride_al
            o_row = o_l if L % BLOCK_L == 0 else tl.minimum(o_l, L - 1 - i_piece * BLOCK_L)
            o_a = o_row[:, None] * stride_al + o_k[None, :]
        # [BLOCK_T, BLOCK_L]
        b_s = tl.zeros([BLOCK_T, BLOCK_L], dtype=tl.float32)
        for i_k in tl.range(0, D, BLOCK_K):
            if USE_TMA:
                b_x = x.load([i_t, i_k])
                b_a = a.load([i_l, i_k])
            elif D % BLOCK_K == 0:
                b_x = tl.load(x_ptr + i_k + o_x)
                b_a = tl.load(a_piece_ptr + i_k + o_a)
            else:
                m_k = (i_k + o_k < D)[None, :]
                b_x = tl.load(x_ptr + i_k + o_x, mask=m_k, other=0.0)
                b_a = tl.load(a_piece_ptr + i_k + o_a, mask=m_k, other=0.0)
            b_s = tl.dot(b_x, b_a.T, b_s, input_precision=PRECISION)
        m_l = i_piece * BLOCK_L + o_l < L
        if L % BLOCK_L != 0:
            b_s = tl.where(m_l[None, :], b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * LOG2E)
        b_p = tl.exp2(b_s * LOG2E - b_new_max[:, None])
        b_sum = b_sum * tl.exp2(b_max - b_new_max) + tl.sum(b_p, 1)
        b_max = b_new_max
        if i_piece == NUM_PIECES - 1:
            b_p = b_p / b_sum[:, None]
        else:
            parked_max = parked_max + (b_max,)
        m_tl = (o_t < num_tokens)[:, None] & m_l[None, :]
        tl.store(p_ptrs + i_piece * BLOCK_L, b_p.to(p_ptr.dtype.element_ty), mask=m_tl)

    if NUM_PIECES > 1:
        # another thread may read back what this one parked
        tl.debug_barrier()
        m_t = (o_t < num_tokens)[:, None]
        for i_piece in tl.static_range(NUM_PIECES - 1):
            b_factor = tl.exp2(parked_max[i_piece] - b_max) / b_sum
            b_p = tl.load(p_ptrs + i_piece * BLOCK_L, mask=m_t, other=0.0).to(tl.float32) * b_factor[:, None]
            tl.store(p_ptrs + i_piece * BLOCK_L, b_p.to(p_ptr.dtype.element_ty), mask=m_t)


@functools.cache
def _launch_config(num_latents: int, head_width: int, itemsize: int, sm: int) -> dict[str, int]:
    """Tiles of the direct kernel for capability `sm`; descriptors (TMA) for 16-bit data where it has them."""
    block_h = max(16, triton.next_power_of_2(head_width))
    use_tma = itemsize == 2 and use_descriptors(sm)
    if itemsize == 4:
        block_t = block_l = 32 if block_h <= 128 else 16
        num_warps, num_stages = 4, 2
    elif use_tma:
        block_t, block_l = 128, 128 if block_h <= 128 else 64
        num_warps, num_stages = 8, 3 if block_h <= 64 else 2
    else:
        block_t, block_l = (128, 64) if block_h <= 128 else (64, 32)
        # 8.6, 8.9 and 12.0 have 99 KB of shared memory for a program, 8.0 has 163
        num_warps, num_stages = 8, 3 if sm == 80 or block_h <= 128 else 2
    return {
        "BLOCK_T": block_t,
        "BLOCK_L": min(block_l, max(16, triton.next_power_of_2(num_latents))),
        "BLOCK_H": block_h,
        "USE_TMA": use_tma,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


@functools.cache
def _weights_launch_config(num_latents: int, itemsize: int, sm: int) -> dict[str, int]:
    """Tiles of the fused softmax for capability `sm`; descriptors (TMA) for 16-bit data where it has them."""
    use_tma = itemsize == 2 and use_descriptors(sm)
    if itemsize == 4:
        block_t, block_l, block_k, num_warps, num_stages = 32, 128, 16, 4, 2
    else:
        block_t, block_l, block_k, num_warps, num_stages = 128, 256, 64, 8, 4 if use_tma else 3
    return {
        "BLOCK_T": block_t,
        "BLOCK_L": min(block_l, max(16, triton.next_power_of_2(num_latents))),
        "BLOCK_K": block_k,
        "USE_TMA": use_tma,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
    if q.ndim != 3 or q.stride(2) != 1:
        raise mismatch("q", "[T, N, H] with a last stride of 1", q)
    num_heads, head_width = q.shape[1:]
    for name, t in (("k", k), ("v", v)):
        fits = t.ndim == 3 and t.shape[0] > 0 and t.shape[1:] == q.shape[1:] and t.shape[0] == k.shape[0]
        if not fits or t.dtype != q.dtype or t.device != q.device or t.stride(2) != 1:
            wanted = f"[L, {num_heads}, {head_width}] {q.dtype} on {q.device} with a last stride of 1"
            raise mismatch(name, wanted, t)
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")


def _check_absorbed(x: torch.Tensor, a: torch.Tensor, num_heads: int) -> None:
    if x.ndim != 2 or x.shape[1] == 0 or x.stride(1) != 1:
        raise mismatch("x", "[T, D] with contiguous rows", x)
    fits = a.ndim == 2 and a.shape[1] == x.shape[1] and a.dtype == x.dtype and a.device == x.device
    if not fits or a.stride(1) != 1:
        raise mismatch("a", f"[N * L, {x.shape[1]}] {x.dtype} on {x.device} with contiguous rows", a)
    if num_heads <= 0 or a.shape[0] == 0 or a.shape[0] % num_heads:
        raise mismatch("a", f"[N * L, D] with N = {num_heads} and L >= 1", a)
    if a.shape[0] > num_heads * MAX_LATENTS:
        num_latents = a.shape[0] // num_heads
        raise Unsupported(f"a must have at most {MAX_LATENTS} latents for this kernel, got {num_latents}")


def _latent_attention_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    num_tokens, num_heads, head_width = q.shape
    out = q.new_empty(q.shape)
    if num_tokens == 0:
        return out
    sm = capability(q.device)
    config = dict(_launch_config(len(k), head_width, q.itemsize, sm))
    config["USE_TMA"] = config["USE_TMA"] and use_descriptors(sm, q, k, v)
    if config["USE_TMA"]:
        allow_descriptors()
    _latent_attention_fwd_kernel[(triton.cdiv(num_tokens, config["BLOCK_T"]) * num_heads,)](
        q_ptr=q,
        stride_qt=q.stride(0),
        stride_qn=q.stride(1),
        k_ptr=k,
        stride_kl=k.stride(0),
        stride_kn=k.stride(1),
        v_ptr=v,
        stride_vl=v.stride(0),
        stride_vn=v.stride(1),
        out_ptr=out,
        stride_ot=out.stride(0),
        stride_on=out.stride(1),
        num_tokens=num_tokens,
        scale_log2=scale * LOG2E.value,
        N=num_heads,
        L=len(k),
        H=head_width,
        PRECISION=input_precision(q.dtype),
        **config,
        **COMPILE_OPTIONS,
    )
    return out


def _wide_latent_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The direct form by library products, with the scores and their softmax in fp32."""
    num_latents, num_heads, _ = k.shape
    k_NHL, v_NLH = k.permute(1, 2, 0), v.transpose(0, 1)
    outs = []
    for q_TNH in q.split(max(1, MAX_SCORES // (num_heads * num_latents))):
        q_NTH = q_TNH.transpose(0, 1)
        if q.is_cuda and q.dtype != torch.float32:
            scores = torch.bmm(q_NTH, k_NHL, out_dtype=torch.float32)
        else:
            scores = torch.bmm(q_NTH.float(), k_NHL.float())
        p = (scores * scale).softmax(-1).to(v.dtype)
        outs.append(torch.bmm(p, v_NLH).transpose(0, 1))
    return torch.cat(outs)


def _latent_weights_fwd(x: torch.Tensor, a: torch.Tensor, num_heads: int) -> torch.Tensor:
    num_tokens, width = x.shape
    num_latents = len(a) // num_heads
    p = x.new_empty(num_tokens, len(a))
    if num_tokens == 0:
        return p
    sm = capability(x.device)
    config = dict(_weights_launch_config(num_latents, x.itemsize, sm))
    config["USE_TMA"] = config["USE_TMA"] and use_descriptors(sm, x, a)
    if config["USE_TMA"]:
        allow_descriptors()
    _latent_weights_fwd_kernel[(triton.cdiv(num_tokens, config["BLOCK_T"]) * num_heads,)](
        x_ptr=x,
        stride_xt=x.stride(0),
        a_ptr=a,
        stride_al=a.stride(0),
        p_ptr=p,
        num_tokens=num_tokens,
        D=width,
        N=num_heads,
        L=num_latents,
        PRECISION=input_precision(x.dtype),
        **config,
        **COMPILE_OPTIONS,
    )
    return p


def latent_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Triton version of `reference.latent_attention`: same arguments, same result."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check(q, k, v, scale)
    if q.shape[-1] > MAX_HEAD_WIDTH:
        return _wide_latent_attention(q, k, v, scale)
    return _latent_attention_fwd(q, k, v, scale)


def latent_weights(x: torch.Tensor, a: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Triton version of `reference.latent_weights`: same arguments, same result, scores never rounded."""
    _check_absorbed(x, a, num_heads)
    return _latent_weights_fwd(x, a, num_heads)


def absorbed_latent_attention(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, residual: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """Triton version of `reference.absorbed_latent_attention`: same arguments, same result."""
    _check_absorbed(x, a, num_heads)
    for name, t, shape in (("b", b, (a.shape[0], x.shape[1])), ("residual", residual, x.shape)):
        if t.shape != shape or t.dtype != x.dtype or t.device != x.device:
            raise mismatch(name, f"{tuple(shape)} {x.dtype} on {x.device}", t)
    return torch.addmm(residual, _latent_weights_fwd(x, a, num_heads), b)
