"""Tokens attend to L latents, absorbed form. Contract: `reference.absorbed_latent_attention`.

The absorbed form is two products with a softmax between them. The second is
left to the library. The first is fused with the softmax, so that scores never
reach memory:

1. One program owns BLOCK_T tokens of one head. It takes the head's L latents
   in pieces of BLOCK_L, as many as registers hold in fp32. A piece is a matrix
   product over D, with running maximum m and sum l as in an online softmax.
2. All pieces but the last are parked in the output as exp2(s - m), with the m
   of that time. The last one is written finished.
3. The parked ones, still in the L2 cache, get their factor exp2(m_then - m) / l.

A single piece of L = 512 would need no parking, but leaves room for 64 tokens:
1152 bytes of x and A per 65536 operations instead of 768. By the data sheets
the L2 cache then keeps the tensor cores waiting. This is computed, not measured:
see bench/NOTES.md.

No tile depends on T, so a token's bits do not depend on its batch.

Backward. Saved: x, a, b and P in the dtype. For NV-Embed P is 8 KB per token, to
be written (as the forward does anyway) and read. To compute it again would take
34 MFLOP. By the data sheets that is 8 against 108 ns per token on an A100 (2 TB/s,
312 TFLOP/s) and 5 against 34 ns on an H100 (3.35 TB/s, 989 TFLOP/s).

1. The first product of the forward once more, with dO and B for x and A, gives
   pieces of dP = dO B^T, and dS = P * (dP - delta) with delta = rowsum(P * dP). A
   single piece stays in registers. Several are parked, rounded, where dS will stand,
   and come back from the L2 cache a few whole rows at a time. So P and dP are read
   once, and delta is taken of the very numbers it is subtracted from. Where P is
   nearly one they cancel, and a delta of unrounded ones would leave the rounding.
   Finishing the last piece in registers, as the forward does, spills, because P and
   dP together do not fit. Delta is divided by the sum of P, which is one but for the
   rounding of P. A constant in dP thus drops out as it does of an exact softmax.
2. dx = dS A, dA = dS^T x and dB = P^T dO are the library's.

Prefixes inside kernels: i_ index, o_ offsets, m_ mask, b_ block in registers.
"""

import functools

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
from nvembed_fast.kernels.errors import (
    Unsupported,
    check_absorbed_latent_attention,
    check_absorbed_latent_attention_bwd,
)

__all__ = ["absorbed_latent_attention"]

MAX_LATENTS = 1024  # their pieces are unrolled


@triton.jit
def _product_over_width(
    x, o_x, i_t, a, o_a, i_l,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    # x and a are descriptors, read at rows i_t and i_l, or pointers to these rows, read at o_x and o_a
    o_k = tl.arange(0, BLOCK_K)[None, :]
    b_s = tl.zeros([BLOCK_T, BLOCK_L], dtype=tl.float32)
    for i_k in tl.range(0, D, BLOCK_K):
        # [BLOCK_T, BLOCK_K], [BLOCK_L, BLOCK_K]
        if USE_TMA:
            b_x = x.load([i_t, i_k])
            b_a = a.load([i_l, i_k])
        elif D % BLOCK_K == 0:
            b_x = tl.load(x + i_k + o_x)
            b_a = tl.load(a + i_k + o_a)
        else:
            m_k = i_k + o_k < D
            b_x = tl.load(x + i_k + o_x, mask=m_k, other=0.0)
            b_a = tl.load(a + i_k + o_a, mask=m_k, other=0.0)
        b_s = tl.dot(b_x, b_a.T, b_s, input_precision=PRECISION)
    return b_s


@triton.jit(do_not_specialize=["num_tokens"])
def _absorbed_latent_attention_fwd_kernel(
    x_ptr, stride_xt,
    a_ptr, stride_al,
    p_ptr, num_tokens,
    D: tl.constexpr, N: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    NUM_PIECES: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    # the tile: which tokens of which head
    # the heads of the same tokens are neighbours: x comes from memory once, A stays in the L2 cache
    i_n = tl.program_id(0) % N
    i_t = tl.program_id(0) // N * BLOCK_T
    o_t = i_t + tl.arange(0, BLOCK_T)
    o_l = tl.arange(0, BLOCK_L)
    o_k = tl.arange(0, BLOCK_K)[None, :]
    # the stride of p is a constant, so that its addresses take one register
    p_ptrs = p_ptr + o_t.to(tl.int64)[:, None] * (N * L) + i_n * L + o_l[None, :]
    # rows beyond the last are read as the last: they are masked where it matters, below
    o_x = tl.minimum(tl.arange(0, BLOCK_T), num_tokens - 1 - i_t)[:, None] * stride_xt + o_k
    if USE_TMA:
        x = tl.make_tensor_descriptor(x_ptr, [num_tokens, D], [stride_xt, 1], [BLOCK_T, BLOCK_K])
        a = tl.make_tensor_descriptor(a_ptr, [N * L, D], [stride_al, 1], [BLOCK_L, BLOCK_K])
    else:
        x = x_ptr + i_t.to(tl.int64) * stride_xt

    # the pieces, all but the last parked
    b_max = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_T], dtype=tl.float32)
    parked_max = ()  # type: tuple
    for i_piece in tl.static_range(NUM_PIECES):
        i_l = i_n * L + i_piece * BLOCK_L
        o_row = o_l if L % BLOCK_L == 0 else tl.minimum(o_l, L - 1 - i_piece * BLOCK_L)
        o_a = o_row[:, None] * stride_al + o_k
        if not USE_TMA:
            a = a_ptr + i_l.to(tl.int64) * stride_al
        # [BLOCK_T, BLOCK_L]
        b_s = _product_over_width(x, o_x, i_t, a, o_a, i_l, D, PRECISION, BLOCK_T, BLOCK_L, BLOCK_K, USE_TMA)
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

    # rescale the parked pieces
    if NUM_PIECES > 1:
        # another thread may read back what this one parked
        tl.debug_barrier()
        m_t = (o_t < num_tokens)[:, None]
        for i_piece in tl.static_range(NUM_PIECES - 1):
            b_factor = tl.exp2(parked_max[i_piece] - b_max) / b_sum
            b_p = tl.load(p_ptrs + i_piece * BLOCK_L, mask=m_t, other=0.0).to(tl.float32) * b_factor[:, None]
            tl.store(p_ptrs + i_piece * BLOCK_L, b_p.to(p_ptr.dtype.element_ty), mask=m_t)


@triton.jit
def _softmax_slope(b_p, b_dp):
    b_p = b_p.to(tl.float32)
    b_delta = tl.sum(b_p * b_dp, 1) / tl.sum(b_p, 1)
    return b_p * (b_dp - b_delta[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _absorbed_latent_attention_bwd_kernel(
    dout_ptr, stride_dot,
    b_ptr, stride_bl,
    p_ptr, ds_ptr, num_tokens,
    D: tl.constexpr, N: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_HEAD: tl.constexpr,
):  # fmt: skip
    NUM_PIECES: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    # the tile: which tokens of which head
    i_n = tl.program_id(0) % N
    i_t = tl.program_id(0) // N * BLOCK_T
    o_t = i_t + tl.arange(0, BLOCK_T)
    o_l = tl.arange(0, BLOCK_L)
    o_k = tl.arange(0, BLOCK_K)[None, :]
    o_ds = o_t.to(tl.int64)[:, None] * (N * L) + i_n * L + o_l[None, :]
    # rows beyond the last are read as the last, and their results are not stored
    o_dout = tl.minimum(tl.arange(0, BLOCK_T), num_tokens - 1 - i_t)[:, None] * stride_dot + o_k
    if USE_TMA:
        dout = tl.make_tensor_descriptor(dout_ptr, [num_tokens, D], [stride_dot, 1], [BLOCK_T, BLOCK_K])
        b = tl.make_tensor_descriptor(b_ptr, [N * L, D], [stride_bl, 1], [BLOCK_L, BLOCK_K])
    else:
        dout = dout_ptr + i_t.to(tl.int64) * stride_dot

    # the pieces of dP, parked where several
    for i_piece in tl.static_range(NUM_PIECES):
        i_l = i_n * L + i_piece * BLOCK_L
        o_row = o_l if L % BLOCK_L == 0 else tl.minimum(o_l, L - 1 - i_piece * BLOCK_L)
        o_b = o_row[:, None] * stride_bl + o_k
        if not USE_TMA:
            b = b_ptr + i_l.to(tl.int64) * stride_bl
        # [BLOCK_T, BLOCK_L]
        b_piece = _product_over_width(
            dout, o_dout, i_t, b, o_b, i_l, D, PRECISION, BLOCK_T, BLOCK_L, BLOCK_K, USE_TMA
        )
        m_tl = (o_t < num_tokens)[:, None] & (i_piece * BLOCK_L + o_l < L)[None, :]
        if NUM_PIECES == 1:
            b_p = tl.load(p_ptr + o_ds, mask=m_tl, other=0.0)
            b_piece = _softmax_slope(b_p, tl.where(m_tl, b_piece, 0.0))
        tl.store(ds_ptr + o_ds + i_piece * BLOCK_L, b_piece.to(ds_ptr.dtype.element_ty), mask=m_tl)

    # finish the parked pieces, whole rows at a time
    if NUM_PIECES > 1:
        # another thread may read back what this one parked
        tl.debug_barrier()
        o_head = tl.arange(0, BLOCK_HEAD)
        for i_row in tl.range(i_t, tl.minimum(i_t + BLOCK_T, num_tokens), BLOCK_ROW):
            o_part = i_row + tl.arange(0, BLOCK_ROW)
            o_p = o_part.to(tl.int64)[:, None] * (N * L) + i_n * L + o_head[None, :]
            m_p = (o_part < num_tokens)[:, None] & (o_head < L)[None, :]
            # [BLOCK_ROW, BLOCK_HEAD]
            b_p = tl.load(p_ptr + o_p, mask=m_p, other=0.0)
            b_ds = _softmax_slope(b_p, tl.load(ds_ptr + o_p, mask=m_p, other=0.0).to(tl.float32))
            tl.store(ds_ptr + o_p, b_ds.to(ds_ptr.dtype.element_ty), mask=m_p)


def _rule(num_latents: int, *, capability: int, dtype: torch.dtype, aligned: bool) -> dict[str, int | bool]:
    use_tma = dtype.itemsize == 2 and use_descriptors(capability)
    if dtype.itemsize == 4:
        block_t, block_l, block_k, num_warps, num_stages = 32, 128, 16, 4, 2
    else:
        block_t, block_l, block_k, num_warps, num_stages = 128, 256, 64, 8, 4 if use_tma else 3
    return {
        "BLOCK_T": block_t,
        "BLOCK_L": min(block_l, max(16, triton.next_power_of_2(num_latents))),
        "BLOCK_K": block_k,
        "USE_TMA": use_tma and aligned,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


@tuned.cache
def _launch_config(
    num_latents: int, *, capability: int, dtype: torch.dtype, aligned: bool = True
) -> dict[str, int | bool]:
    """Tiles of the fused softmax. 16-bit data is loaded by descriptors (TMA) where the GPU has them.

    Args:
        aligned: bases and strides let descriptors be made.
    """
    rule = _rule(num_latents, capability=capability, dtype=dtype, aligned=aligned)
    shape_class = {"latents": max(16, triton.next_power_of_2(num_latents)), "bits": 8 * dtype.itemsize}
    return tuned.override("absorbed_latent_attention.fwd", capability, rule, **shape_class)


@functools.cache
def _bwd_launch_config(
    num_latents: int, *, capability: int, dtype: torch.dtype, aligned: bool = True
) -> dict[str, int | bool]:
    """The forward's rule, and for parked pieces whole rows of a head's latents: 32 elements per thread."""
    config = _rule(num_latents, capability=capability, dtype=dtype, aligned=aligned)
    block_head = triton.next_power_of_2(num_latents)
    if block_head == config["BLOCK_L"] == 256:
        config["BLOCK_T"] = 64  # P stands beside dP
    rows = max(1, 1024 * config["num_warps"] // block_head)
    return config | {"BLOCK_ROW": min(rows, config["BLOCK_T"]), "BLOCK_HEAD": block_head}


def _check_limits(a: torch.Tensor, num_heads: int) -> None:
    if a.shape[0] > num_heads * MAX_LATENTS:
        num_latents = a.shape[0] // num_heads
        raise Unsupported(f"a must have at most {MAX_LATENTS} latents for this kernel, got {num_latents}")


@replayed
def _launch_fwd(x: torch.Tensor, a: torch.Tensor, num_heads: int) -> torch.Tensor:
    num_tokens, width = x.shape
    num_latents = len(a) // num_heads
    p = x.new_empty(num_tokens, len(a))
    if num_tokens == 0:
        return p
    sm = capability(x.device)
    aligned = use_descriptors(sm, x, a)
    config = _launch_config(num_latents, capability=sm, dtype=x.dtype, aligned=aligned)
    launch(
        _absorbed_latent_attention_fwd_kernel,
        triton.cdiv(num_tokens, config["BLOCK_T"]) * num_heads,
        **operands(("x", x, "t"), ("a", a, "l")),
        p_ptr=p,
        num_tokens=num_tokens,
        D=width,
        N=num_heads,
        L=num_latents,
        PRECISION=input_precision(x.dtype),
        **config,
    )
    return p


def _launch_bwd(p: torch.Tensor, b: torch.Tensor, dout: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[T, N * L] gradient of the scores x a^T."""
    num_tokens, width = dout.shape
    num_latents = len(b) // num_heads
    ds = p.new_empty(p.shape)
    if num_tokens == 0:
        return ds
    sm = capability(p.device)
    aligned = use_descriptors(sm, dout, b)
    config = _bwd_launch_config(num_latents, capability=sm, dtype=p.dtype, aligned=aligned)
    launch(
        _absorbed_latent_attention_bwd_kernel,
        triton.cdiv(num_tokens, config["BLOCK_T"]) * num_heads,
        **operands(("dout", dout, "t"), ("b", b, "l")),
        p_ptr=p,
        ds_ptr=ds,
        num_tokens=num_tokens,
        D=width,
        N=num_heads,
        L=num_latents,
        PRECISION=input_precision(p.dtype),
        **config,
    )
    return ds


def _forward(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, residual: torch.Tensor, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, P)."""
    p = _launch_fwd(x, a, num_heads)
    return torch.addmm(residual, p, b), p


def _backward(
    x: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    p: torch.Tensor,
    dout: torch.Tensor,
    num_heads: int,
    needs_db: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, da, db), empty where not needed: dx without a, da without x."""
    dout = with_contiguous_rows(dout)
    dx, da, db = (dout.new_empty(0) for _ in range(3))
    if x is not None or a is not None:
        assert b is not None
        ds = _launch_bwd(p, with_contiguous_rows(b), dout, num_heads)
        dx = dx if a is None else ds @ a
        da = da if x is None else ds.mT @ x
    if needs_db:
        db = p.mT @ dout
    return dx, da, db


@torch.library.custom_op("nvembed_fast::absorbed_latent_attention", mutates_args=())
def _absorbed_latent_attention_op(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, residual: torch.Tensor, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    check_absorbed_latent_attention(x, a, b, residual, num_heads)
    _check_limits(a, num_heads)
    return _forward(x, a, b, residual, num_heads)


@_absorbed_latent_attention_op.register_fake
def _absorbed_latent_attention_fake(x, a, b, residual, num_heads):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("nvembed_fast::absorbed_latent_attention_bwd", mutates_args=())
def _absorbed_latent_attention_bwd_op(
    x: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    p: torch.Tensor,
    dout: torch.Tensor,
    num_heads: int,
    needs_db: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_absorbed_latent_attention_bwd(x, a, b, p, dout, num_heads)
    _check_limits(p.mT, num_heads)
    return _backward(x, a, b, p, dout, num_heads, needs_db)


@_absorbed_latent_attention_bwd_op.register_fake
def _absorbed_latent_attention_bwd_fake(x, a, b, p, dout, num_heads, needs_db):
    dx = dout.new_empty(dout.shape if a is not None else 0)
    da, db = (
        dout.new_empty((p.shape[1], dout.shape[1]) if needed else 0) for needed in (x is not None, needs_db)
    )
    return dx, da, db


def _save(ctx, inputs, output) -> None:
    x, a, b, _, ctx.num_heads = inputs
    needs_dx, needs_da, needs_db, _, _ = ctx.needs_input_grad[:5]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if needs_da else None,
        a if needs_dx else None,
        b if needs_dx or needs_da else None,
        output[1] if needs_dx or needs_da or needs_db else None,
    )


def _differentiate(ctx, dout, _):
    if dout is None:
        return (None,) * 5
    needs = ctx.needs_input_grad[:3]
    dx = da = db = None
    if any(needs):
        grads = _absorbed_latent_attention_bwd_op(*ctx.saved_tensors, dout, ctx.num_heads, needs[2])
        dx, da, db = (g if needed else None for g, needed in zip(grads, needs, strict=True))
    return dx, da, db, dout if ctx.needs_input_grad[3] else None, None


_absorbed_latent_attention_op.register_autograd(_differentiate, setup_context=_save)


def absorbed_latent_attention(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, residual: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """Triton version of `reference.absorbed_latent_attention`: same arguments, same result."""
    check_absorbed_latent_attention(x, a, b, residual, num_heads)
    _check_limits(a, num_heads)
    run = _absorbed_latent_attention_op if is_dispatched(x, a, b, residual) else _forward
    return run(x, a, b, residual, num_heads)[0]
