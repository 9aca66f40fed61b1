"""What every operation refuses.

`check_<operation>` stands in front of the reference, of the library's function
and of the kernel, so all refuse the same input with the same words. The limits of
one kernel stay in its own file, because `impl="auto"` takes the library path
there. It stands inside the registered operation once more, and
`check_<operation>_bwd` inside that of the backward, because anyone may call those:
a kernel that reads a wild address ends the process.

This file needs no Triton. No check waits for a device.
"""

from math import inf

import torch

from nvembed_fast.kernels.layout import SeqLayout

__all__ = [
    "Unsupported",
    "check_absorbed_latent_attention",
    "check_absorbed_latent_attention_bwd",
    "check_add_rms_norm",
    "check_flash_attention",
    "check_flash_attention_bwd",
    "check_gated",
    "check_gated_bwd",
    "check_latent_attention",
    "check_latent_attention_bwd",
    "check_masked_lse",
    "check_masked_lse_bwd",
    "check_mean_pool",
    "check_mean_pool_bwd",
    "check_mean_pool_geglu",
    "check_rms_norm",
    "check_rms_norm_bwd",
    "check_rotary",
    "mismatch",
]

# float64 is the oracle's. No kernel takes it
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Unsupported(ValueError):
    """A well-posed problem that a kernel is not written for: `impl="auto"` takes the library path."""


def mismatch(name: str, wanted: str, got: torch.Tensor) -> ValueError:
    """The error that names the tensor, what it must be and what it is."""
    return ValueError(
        f"{name} must be {wanted}, got {tuple(got.shape)} {got.dtype} "
        f"with strides {got.stride()} on {got.device}"
    )


def check_flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SeqLayout,
    scale: float | None,
    causal: bool,
) -> None:
    if q.ndim != 3 or q.shape[0] != layout.num_tokens or q.shape[2] == 0:
        raise mismatch("q", f"[{layout.num_tokens}, N, H]", q)
    num_heads, width = q.shape[1:]
    if k.ndim != 3 or k.shape[0] != q.shape[0] or k.shape[2] != width:
        raise mismatch("k", f"[{layout.num_tokens}, G, {width}]", k)
    if v.shape != k.shape:
        raise mismatch("v", f"{list(k.shape)} like k", v)
    num_kv_heads = k.shape[1]
    if not num_kv_heads or not num_heads or num_heads % num_kv_heads:
        raise mismatch("q", f"[T, N, H] with N a multiple of the {num_kv_heads} heads of k", q)
    _check_dtype("q", q)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise mismatch(name, f"{q.dtype} like q", t)
        if t.device != layout.cu_seqlens.device:
            raise mismatch(name, f"on {layout.cu_seqlens.device} like the layout", t)
        if t.stride(2) != 1:
            raise mismatch(name, "strided with contiguous heads (last stride 1)", t)
    _check_scale(scale)
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be True or False, got {causal!r}")


def check_flash_attention_bwd(
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
    needs_out: bool,
) -> None:
    check_flash_attention(q, k, v, layout, scale, causal)
    if needs_out or out is not None:
        _check_like("out", out, q, q.shape)
    _check_like("dout", dout, q, q.shape, any_strides=True)
    statistics = (q.shape[1], q.shape[0])
    _check_like("lse2", lse2, q, statistics, dtype=torch.float32, is_contiguous=True)
    if dlse2 is not None:
        _check_like("dlse2", dlse2, q, statistics, dtype=torch.float32, any_strides=True)


def check_latent_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> None:
    if q.ndim != 3 or 0 in q.shape[1:] or q.stride(2) != 1:
        raise mismatch("q", "[T, N, H] with a last stride of 1", q)
    _check_dtype("q", q)
    num_heads, head_width = q.shape[1:]
    for name, t in (("k", k), ("v", v)):
        fits = t.ndim == 3 and t.shape[0] > 0 and t.shape[1:] == q.shape[1:] and t.shape[0] == k.shape[0]
        if not fits or t.dtype != q.dtype or t.device != q.device or t.stride(2) != 1:
            wanted = f"[L, {num_heads}, {head_width}] {q.dtype} on {q.device} with a last stride of 1"
            raise mismatch(name, wanted, t)
    _check_scale(scale)


def check_latent_attention_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    dout: torch.Tensor,
    scale: float,
    needs_out: bool,
) -> None:
    """`lse` is None where the backward does not read it."""
    check_latent_attention(q, k, v, scale)
    if needs_out or out is not None:
        _check_like("out", out, q, q.shape)
    _check_like("dout", dout, q, q.shape, any_strides=True)
    if lse is not None:
        _check_like("lse", lse, q, (q.shape[1], q.shape[0]), dtype=torch.float32, is_contiguous=True)


def check_absorbed_latent_attention(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, residual: torch.Tensor, num_heads: int
) -> None:
    if x.ndim != 2 or x.shape[1] == 0 or x.stride(1) != 1:
        raise mismatch("x", "[T, D] with contiguous rows", x)
    _check_dtype("x", x)
    fits = a.ndim == 2 and a.shape[1] == x.shape[1] and a.dtype == x.dtype and a.device == x.device
    if not fits or a.stride(1) != 1:
        raise mismatch("a", f"[N * L, {x.shape[1]}] {x.dtype} on {x.device} with contiguous rows", a)
    if num_heads <= 0 or a.shape[0] == 0 or a.shape[0] % num_heads:
        raise mismatch("a", f"[N * L, D] with N = {num_heads} and L >= 1", a)
    for name, t, shape in (("b", b, (a.shape[0], x.shape[1])), ("residual", residual, x.shape)):
        if t.shape != shape or t.dtype != x.dtype or t.device != x.device:
            raise mismatch(name, f"{tuple(shape)} {x.dtype} on {x.device}", t)


def check_absorbed_latent_attention_bwd(
    x: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    p: torch.Tensor,
    dout: torch.Tensor,
    num_heads: int,
) -> None:
    if p.ndim != 2 or not p.is_contiguous() or num_heads <= 0 or not p.shape[1] or p.shape[1] % num_heads:
        raise mismatch("p", f"[T, N * L] with N = {num_heads} and L >= 1, contiguous", p)
    _check_dtype("p", p)
    if dout.ndim != 2 or not dout.shape[1]:
        raise mismatch("dout", "[T, D]", dout)
    num_tokens, width = p.shape[0], dout.shape[1]
    _check_like("dout", dout, p, (num_tokens, width), any_strides=True)
    if x is not None:
        _check_like("x", x, p, (num_tokens, width))
    if a is not None:
        _check_like("a", a, p, (p.shape[1], width))
    if b is not None or x is not None or a is not None:
        _check_like("b", b, p, (p.shape[1], width), any_strides=True)


def check_mean_pool(x: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None) -> None:
    _check_pooled("x", "D", x, layout, pool_mask)


def check_mean_pool_geglu(
    value_gate: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None
) -> None:
    _check_pooled("value_gate", "2F", value_gate, layout, pool_mask)
    if value_gate.shape[1] % 2:
        raise mismatch("value_gate", "[T, 2F] with an even number of columns", value_gate)


def check_mean_pool_bwd(
    x: torch.Tensor | None,
    dout: torch.Tensor,
    layout: SeqLayout,
    pool_mask: torch.Tensor | None,
    num_tokens: int,
    dtype: torch.dtype,
) -> None:
    """`x` is the input of a GEGLU. None stands for the plain mean."""
    if num_tokens != layout.num_tokens:
        raise ValueError(f"num_tokens must be {layout.num_tokens}, the sum of host_lengths, got {num_tokens}")
    if dout.ndim != 2 or dout.shape[0] != len(layout) or not dout.shape[1] or dout.dtype != torch.float32:
        raise mismatch("dout", f"[{len(layout)}, D] torch.float32", dout)
    if dtype not in _DTYPES or (x is not None and x.dtype != dtype):
        raise ValueError(f"dtype must be that of x, fp16, bf16 or fp32, got {dtype}")
    if x is not None:
        _check_like("x", x, dout, (num_tokens, 2 * dout.shape[1]), dtype=dtype)
    _check_pool_mask(pool_mask, num_tokens, dout.device)


def check_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    if x.ndim != 2 or x.stride(1) != 1 or x.shape[1] == 0:
        raise mismatch("x", "[T, D] with contiguous rows and D > 0", x)
    _check_dtype("x", x)
    width = x.shape[1]
    fits = weight.shape == (width,) and weight.dtype == x.dtype and weight.device == x.device
    if not fits or weight.stride(0) != 1:
        raise mismatch("weight", f"[{width}] {x.dtype} on {x.device}, contiguous", weight)
    if not 0 <= eps < inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")


def check_add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    check_rms_norm(x, weight, eps)
    fits = residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device
    if not fits or residual.stride(1) != 1:
        wanted = f"{tuple(x.shape)} {x.dtype} on {x.device} as x, with contiguous rows"
        raise mismatch("residual", wanted, residual)


def check_rms_norm_bwd(
    h: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, dh_out: torch.Tensor | None, eps: float
) -> None:
    check_rms_norm(h, weight, eps)
    _check_like("dy", dy, h, h.shape, any_strides=True)
    if dh_out is not None:
        _check_like("dh_out", dh_out, h, h.shape, any_strides=True)


def check_rotary(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    num_rotated: int,
    inplace: bool,
) -> None:
    if inplace and qkv.requires_grad:
        raise ValueError("rotary(inplace=True) would overwrite a tensor that needs a gradient")
    if qkv.ndim != 3 or qkv.stride(2) != 1:
        raise mismatch("qkv", "[T, heads, H] with contiguous heads", qkv)
    _check_dtype("qkv", qkv)
    num_tokens, num_heads, head_width = qkv.shape
    if head_width < 2 or head_width % 2:
        raise mismatch("qkv", "[T, heads, H] with an even H", qkv)
    # float64 tables are the oracle's
    dtype = cos.dtype if qkv.dtype == cos.dtype == torch.float64 else torch.float32
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.ndim == 2 and table.shape == (cos.shape[0], head_width // 2)
        fits = fits and table.dtype == dtype and table.device == qkv.device
        if not fits or table.stride(1) != 1:
            raise mismatch(
                name, f"[P, {head_width // 2}] {dtype} on {qkv.device} with contiguous rows", table
            )
    fits = positions.shape == (num_tokens,) and positions.dtype == torch.int32
    fits = fits and positions.device == qkv.device and positions.is_contiguous()
    if not fits:
        raise mismatch("positions", f"[{num_tokens}] torch.int32 on {qkv.device}, contiguous", positions)
    # a GPU would have to be waited for
    if num_tokens and positions.is_cpu and not torch.compiler.is_compiling():
        first, last = (int(p) for p in positions.aminmax())
        if first < 0 or last >= cos.shape[0]:
            raise ValueError(
                f"positions must be from 0 to {cos.shape[0] - 1}, the rows of cos, got {first} to {last}"
            )
    if not 0 <= num_rotated <= num_heads:
        raise ValueError(f"num_rotated must be between 0 and the {num_heads} heads of qkv, got {num_rotated}")


def check_masked_lse(
    q: torch.Tensor,
    d: torch.Tensor,
    row_scopes: torch.Tensor,
    column_scopes: torch.Tensor,
    row_keys: torch.Tensor,
    column_keys: torch.Tensor,
    limits: torch.Tensor | None,
    scale: float,
) -> None:
    if q.ndim != 2 or q.shape[1] == 0 or q.stride(1) != 1:
        raise mismatch("q", "[B, D] with contiguous rows and D > 0", q)
    _check_dtype("q", q)
    fits = d.ndim == 2 and d.shape[1] == q.shape[1] and d.dtype == q.dtype and d.device == q.device
    if not fits or d.stride(1) != 1:
        raise mismatch("d", f"[M, {q.shape[1]}] {q.dtype} on {q.device} with contiguous rows", d)
    for name, t, length, count in (
        ("row_scopes", row_scopes, len(q), "S"),
        ("column_scopes", column_scopes, len(d), "S"),
        ("row_keys", row_keys, len(q), "K"),
        ("column_keys", column_keys, len(d), "K"),
    ):
        fits = t.ndim == 2 and t.shape[0] == length and t.dtype == torch.int64 and t.device == q.device
        if not fits or t.shape[1] == 0 or not t.is_contiguous():
            raise mismatch(name, f"[{length}, {count}] torch.int64 on {q.device}, contiguous", t)
    if limits is not None:
        # float64 is the oracle's
        fits = limits.dtype == torch.float32 or limits.dtype == q.dtype == torch.float64
        fits = fits and limits.shape == (len(q),) and limits.device == q.device
        if not fits or limits.requires_grad or not limits.is_contiguous():
            wanted = f"[{len(q)}] torch.float32 on {q.device}, contiguous and detached"
            raise mismatch("limits", wanted, limits)
    _check_scale(scale)


def check_masked_lse_bwd(
    q: torch.Tensor,
    d: torch.Tensor,
    row_scopes: torch.Tensor,
    column_scopes: torch.Tensor,
    row_keys: torch.Tensor,
    column_keys: torch.Tensor,
    limits: torch.Tensor | None,
    lse: torch.Tensor,
    dlse: torch.Tensor,
    scale: float,
) -> None:
    check_masked_lse(q, d, row_scopes, column_scopes, row_keys, column_keys, limits, scale)
    for name, t in (("lse", lse), ("dlse", dlse)):
        _check_like(name, t, q, (len(q),), dtype=torch.float32, any_strides=name == "dlse")


def check_gated(name: str, x: torch.Tensor) -> None:
    if x.ndim != 2 or x.stride(1) != 1:
        raise mismatch(name, "[T, 2F] with contiguous rows", x)
    if x.shape[1] < 2 or x.shape[1] % 2:
        raise mismatch(name, "[T, 2F] with an even, positive number of columns", x)
    _check_dtype(name, x)


def check_gated_bwd(x: torch.Tensor, dout: torch.Tensor) -> None:
    check_gated("x", x)
    _check_like("dout", dout, x, (x.shape[0], x.shape[1] // 2), any_strides=True)


def _check_pooled(
    name: str, columns: str, x: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None
) -> None:
    num_tokens, device = layout.num_tokens, layout.cu_seqlens.device
    fits = x.ndim == 2 and x.shape[0] == num_tokens and x.device == device
    if not fits or x.shape[1] == 0 or x.stride(1) != 1:
        wanted = f"[{num_tokens}, {columns}] on {device} as the layout says, contiguous rows"
        raise mismatch(name, wanted, x)
    _check_dtype(name, x)
    _check_pool_mask(pool_mask, num_tokens, x.device)


def _check_pool_mask(pool_mask: torch.Tensor | None, num_tokens: int, device: torch.device) -> None:
    if pool_mask is not None:
        fits = pool_mask.shape == (num_tokens,) and pool_mask.dtype == torch.bool
        if not fits or pool_mask.device != device or not pool_mask.is_contiguous():
            raise mismatch("pool_mask", f"[{num_tokens}] torch.bool on {device}, contiguous", pool_mask)


def _check_like(
    name: str,
    t: torch.Tensor | None,
    like: torch.Tensor,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype | None = None,
    any_strides: bool = False,
    is_contiguous: bool = False,
) -> None:
    """Of this shape, of the dtype and device of `like`, and with a last stride of 1 unless any is taken.

    Or contiguous, as statistics are: a kernel gets one stride for all of them.
    """
    if t is None:
        raise ValueError(f"{name} must be given, got None")
    dtype = dtype or like.dtype
    fits = t.shape == shape and t.dtype == dtype and t.device == like.device
    is_laid_out = t.is_contiguous() if is_contiguous else not t.numel() or t.stride(-1) == 1 or any_strides
    if not fits or not is_laid_out:
        strides = "contiguous" if is_contiguous else "with a last stride of 1"
        raise mismatch(name, f"{list(shape)} {dtype} on {like.device}, {strides}", t)


def _check_dtype(name: str, t: torch.Tensor) -> None:
    if t.dtype not in _DTYPES:
        raise mismatch(name, "fp16, bf16 or fp32", t)


def _check_scale(scale: float | None) -> None:
    # True is a `causal` that came one place too early
    if scale is not None and (isinstance(scale, bool) or not 0 < scale < inf):
        raise ValueError(f"scale must be positive and finite, got {scale}")
