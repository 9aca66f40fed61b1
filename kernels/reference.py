"""The contract of every kernel, in plain PyTorch.

One function per public kernel, with its name and its signature. It is the CPU
path, the oracle of the tests (run in float64) and the baseline of the
benchmarks. There is no other reference in the repository. The last dimension of
every tensor has a stride of 1. `errors.py` lists the inputs that are refused.

Dimensions: B sequences, T packed tokens, D model width, N query heads, G
key/value heads, H head width, L latents, F feed-forward width. In `masked_lse`: B
queries, M documents.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange

from nvembed_fast.kernels.errors import (
    check_absorbed_latent_attention,
    check_add_rms_norm,
    check_flash_attention,
    check_gated,
    check_latent_attention,
    check_masked_lse,
    check_mean_pool,
    check_mean_pool_geglu,
    check_rms_norm,
    check_rotary,
)
from nvembed_fast.kernels.layout import SeqLayout

# CPU libraries sum a product of very few rows per thread in another order than a product of many rows. The
# maximum is for one text on a machine of many cores, where more padding would cost too much
_MIN_ROWS_PER_THREAD, _MAX_PADDED_ROWS = 8, 64
_ATTENTION_ROWS = 32
_MAX_SCORES = 2**24  # of `masked_lse` in memory at once


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias. On a CPU a row's result does not depend on the number of rows.

    Args:
        x: [T, D].
        weight: [E, D].
        bias: [E] or None.

    Returns:
        [T, E] in the dtype of x.

    Raises:
        ValueError: the weight has no content. On a CPU torch itself would read memory that nobody wrote.
    """
    if weight.is_meta and not x.is_meta:
        raise ValueError(
            "a weight is offloaded (device 'meta'), which is not supported: load them all to one device"
        )
    enough = _enough_rows(x)
    result = F.linear(enough, weight, bias)
    return result if enough is x else result[: len(x)]


def add_linear_(h: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """h += x weight^T in place, where autograd does not record. The sum is rounded once, behind the product.

    Args:
        h: [T, E], overwritten.
        x, weight: as in `linear`, in the dtype of h.

    Returns:
        h. On a CPU a row does not depend on the number of rows, as in `linear`.
    """
    return h.addmm_(x, weight.mT) if _enough_rows(x) is x else h.copy_(add_linear(h, x, weight))


def add_linear(h: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """h + x weight^T, with a gradient. Otherwise like `add_linear_`, and h stays as it is."""
    enough = _enough_rows(x)
    if enough is x:
        return torch.addmm(h, x, weight.mT)
    return torch.addmm(_enough_rows(h), enough, weight.mT)[: len(x)]


def _enough_rows(x: torch.Tensor, multiple: int = 1) -> torch.Tensor:
    """x with rows of zeros added on a CPU, until libraries treat every row alike.

    torch.compile chooses its products itself, so it gets x as it is.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return x
    rows = max(len(x), min(_MIN_ROWS_PER_THREAD * torch.get_num_threads(), _MAX_PADDED_ROWS))
    rows = -(-rows // multiple) * multiple
    return x if rows == len(x) else F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows - len(x)))


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SeqLayout,
    scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention inside each packed sequence. Every token sees its whole sequence.

    Args:
        q: [T, N, H] queries. N is a multiple of G.
        k, v: [T, G, H] keys and values. Query head n reads head n // (N // G) (GQA, arXiv 2305.13245).
        layout: where the sequences lie. T is layout.num_tokens.
        scale: positive factor on the scores. None is 1 / sqrt(H).
        causal: a token sees only itself and earlier tokens (for the ablation of arXiv 2405.17428, table 1).
        return_lse: also return the log of each softmax denominator.

    Returns:
        [T, N, H] in the dtype of q. With return_lse also [N, T] fp32 (float64 for float64): the natural
        logarithm of sum exp(scale * q k).
    """
    check_flash_attention(q, k, v, layout, scale, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, lses = [], []
    for run, *rows in zip(layout.runs(), *(_split(t, layout) for t in (q, k, v)), strict=True):
        # [b, n, s, h]. by PyTorch's own methods: einops shows in the time of a short text
        q_run, k_run, v_run = (t.view(run.num_seqs, run.length, *t.shape[1:]).transpose(1, 2) for t in rows)
        out = F.scaled_dot_product_attention(
            q_run, k_run, v_run, scale=scale, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
        if return_lse:
            wide = torch.promote_types(q.dtype, torch.float32)
            k_all = k_run.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            scores = scale * q_run.to(wide) @ k_all.to(wide).mT
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            lses.append(rearrange(scores.logsumexp(-1), "b n s -> n (b s)"))
    out = outs[0] if len(outs) == 1 else torch.cat(outs) if outs else torch.zeros_like(q)
    if not return_lse:
        return out
    return out, torch.cat(lses, dim=1) if lses else q.new_zeros(q.shape[1], 0, dtype=torch.float32)


def _split(x: torch.Tensor, layout: SeqLayout) -> tuple[torch.Tensor, ...]:
    """The rows of each run. The gradient of all is one concatenation, that of a slice as large as x."""
    return x.split([run.num_seqs * run.length for run in layout.runs()])


def latent_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Every token attends to all L latents of its head: the direct form, in the order of the original.

    Args:
        q: [T, N, H] token queries.
        k, v: [L, N, H] keys and values of the latents, the same for every token.
        scale: positive factor on the scores. None is 1 / sqrt(H).

    Returns:
        [T, N, H] in the dtype of q. Source: arXiv 2405.17428, section 3.1 (Perceiver-style cross-attention).
    """
    check_latent_attention(q, k, v, scale)
    padded = _enough_rows(q, multiple=_ATTENTION_ROWS)
    q_1NTH, k_1NLH, v_1NLH = (rearrange(t, "s n h -> 1 n s h") for t in (padded, k, v))
    out = F.scaled_dot_product_attention(q_1NTH, k_1NLH, v_1NLH, scale=scale)
    return rearrange(out, "1 n t h -> t n h")[: len(q)]


def latent_weights(x: torch.Tensor, a: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Softmax over each head's latents of the absorbed scores x a^T.

    Args:
        x: [T, D] normalised tokens.
        a: [N * L, D] absorbed query-key matrix, head-major. It holds the factor 1 / sqrt(H).
        num_heads: N.

    Returns:
        [T, N * L] in the dtype of x. Each group of L sums to one.
    """
    scores = linear(x, a)
    return rearrange(rearrange(scores, "t (n l) -> t n l", n=num_heads).softmax(-1), "t n l -> t (n l)")


def absorbed_latent_attention(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, residual: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """Latent cross-attention. The products that depend on weights alone are multiplied out beforehand.

    With A_h = K_h Wq_h / sqrt(H) and B_h = V_h Wout_h^T, which are constant for a checkpoint,

        residual + sum_h softmax(x A_h^T) B_h

    equals the direct form with its query and output products (an identity, not an approximation).

    Args:
        x: [T, D] normalised tokens.
        a: [N * L, D] the A_h, head-major.
        b: [N * L, D] the B_h, head-major.
        residual: [T, D] added to the result.
        num_heads: N.

    Returns:
        [T, D] in the dtype of x.
    """
    check_absorbed_latent_attention(x, a, b, residual, num_heads)
    weights = _enough_rows(latent_weights(x, a, num_heads))
    return torch.addmm(_enough_rows(residual), weights, b)[: len(x)]


def mean_pool(x: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the tokens of each packed sequence that the mask keeps.

    Args:
        x: [T, D] token states. They are summed in fp32, or in float64 if x is float64 (the oracle).
        layout: where the sequences lie. T is layout.num_tokens.
        pool_mask: [T] bool. False drops a token (an instruction prefix), even one of NaN. None keeps all.

    Returns:
        [B, D] fp32 (float64 for float64). A sequence that keeps no token gives zeros, never NaN.
    """
    check_mean_pool(x, layout, pool_mask)
    return _pool(x, layout, pool_mask, width=x.shape[1])


def mean_pool_geglu(
    value_gate: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`mean_pool(geglu(value_gate))` without the [T, F] between them.

    Pooling is linear. So a feed-forward's second product can act on the pooled vector instead of every token.

    Args:
        value_gate: [T, 2F]. The first half is the value, the second half is the gate.
        layout, pool_mask: as in `mean_pool`.

    Returns:
        [B, F] fp32 (float64 for float64). The product is formed in that dtype and not rounded.
    """
    check_mean_pool_geglu(value_gate, layout, pool_mask)
    return _pool(value_gate, layout, pool_mask, width=value_gate.shape[1] // 2, transform=_geglu)


def _pool(
    x: torch.Tensor,
    layout: SeqLayout,
    pool_mask: torch.Tensor | None,
    width: int,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """[B, width] means of transform(x), run by run: no wide tensor of all T tokens exists at once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    means = torch.zeros(len(layout), width, dtype=wide, device=x.device)
    for run, rows in zip(layout.runs(), _split(x, layout), strict=True):
        values = rearrange(rows.to(wide), "(b s) d -> b s d", b=run.num_seqs)
        count: torch.Tensor | int = run.length
        if pool_mask is not None:
            keep = rearrange(pool_mask[run.rows], "(b s) -> b s 1", b=run.num_seqs)
            # where, not a product: 0 * NaN is NaN. Before the transform, whose gradient is such a product
            values, count = torch.where(keep, values, 0.0), keep.sum(1).clamp_min(1)
        means[run.seqs] = (values if transform is None else transform(values)).sum(1) / count
    return means


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467), with Mistral's rounding.

    Args:
        x: [T, D].
        weight: [D].
        eps: added to the mean square in fp32. Finite and not negative.

    Returns:
        [T, D] in the dtype of x. The row is normalised in fp32, rounded, and then multiplied by weight.
    """
    check_rms_norm(x, weight, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, x.shape[1:], None, eps).to(x.dtype) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual add and the norm that follows it.

    Args:
        x, residual: [T, D].
        weight, eps: as in `rms_norm`.

    Returns:
        (rms_norm(h), h) with h = x + residual rounded to their dtype, both [T, D].
    """
    check_add_rms_norm(x, residual, weight, eps)
    h = x + residual
    return rms_norm(h, weight, eps), h


def rotary(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    num_rotated: int,
    inplace: bool = False,
) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) of the query and key heads of a packed product.

    Pairs are split by halves: element i turns with element i + H/2 by the angle of (position, i).

    Args:
        qkv: [T, N + 2G, H]. The heads are queries, then keys, then values.
        cos, sin: [P, H/2] fp32 tables (float64 for the oracle), one row per position.
        positions: [T] int32, from 0 to P - 1. Checked on a CPU only: on a GPU the check would wait for it.
        num_rotated: the number of leading heads that turn: N + G. The others pass through.
        inplace: overwrite qkv and return it, for inference. A tensor that needs a gradient is refused.

    Returns:
        [T, N + 2G, H] in the dtype of qkv, computed in the dtype of the tables.
    """
    check_rotary(qkv, cos, sin, positions, num_rotated, inplace)
    cos_T1h, sin_T1h = (table.index_select(0, positions)[:, None] for table in (cos, sin))
    heads = qkv[:, :num_rotated]
    first, second = heads.to(cos.dtype).chunk(2, dim=-1)
    turned = first * cos_T1h - second * sin_T1h, second * cos_T1h + first * sin_T1h
    if inplace:
        for half, new in zip(heads.chunk(2, dim=-1), turned, strict=True):
            half.copy_(new)
        return qkv
    return torch.cat([torch.cat(turned, dim=-1).to(qkv.dtype), qkv[:, num_rotated:]], dim=1)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (arXiv 2002.05202).

    Args:
        gate_up: [T, 2F]. The first half is the gate, the second half is up.

    Returns:
        [T, F] in the dtype of gate_up.
    """
    check_gated("gate_up", gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(value_gate: torch.Tensor) -> torch.Tensor:
    """value * gelu(gate) with the exact (erf) GELU (arXiv 2002.05202).

    Args:
        value_gate: [T, 2F]. The first half is the value, the second half is the gate.

    Returns:
        [T, F] in the dtype of value_gate.
    """
    check_gated("value_gate", value_gate)
    return _geglu(value_gate)


def _geglu(value_gate: torch.Tensor) -> torch.Tensor:
    value, gate = value_gate.chunk(2, dim=-1)
    return value * F.gelu(gate)


def masked_lse(
    q: torch.Tensor,
    d: torch.Tensor,
    row_scopes: torch.Tensor,
    column_scopes: torch.Tensor,
    row_keys: torch.Tensor,
    column_keys: torch.Tensor,
    limits: torch.Tensor | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log of the sum of exp(score) over the columns that a row keeps. The scores [B, M] are never whole.

    score[i, j] = scale * q[i] . d[j], in fp32 whatever the dtype and autocast (float64 for float64). A column
    is a candidate of a row if they share a scope that is not negative. It is dropped if they share a key that
    is not 0, or if its score is above the row's limit. The negatives of InfoNCE (arXiv 1807.03748) are one
    use. Rows and columns may change places, with all that belongs to them.

    Args:
        q: [B, D] rows. All values must be finite.
        d: [M, D] columns, in the dtype of q. All values must be finite.
        row_scopes: [B, S] int64.
        column_scopes: [M, S'] int64.
        row_keys: [B, K] int64.
        column_keys: [M, K'] int64.
        limits: [B] fp32 (float64 for float64), no gradient. None drops nothing.
        scale: positive.

    Returns:
        (lse, highest, total, counts). lse [B] fp32 has a gradient, the others have none. highest [B] fp32 is
        the highest kept score, total [B] fp32 the sum of the kept scores. counts [B, 3] int32 are the
        candidates, those that a key drops, and those that the limit drops of the rest. A row that keeps
        nothing has an lse and a highest score of minus infinity, a total of 0 and a gradient of 0.

    The backward goes by chunks of rows in a fixed order, so two runs give the same bits. Where PyTorch may
    round fp32 products to TF32 (`torch.set_float32_matmul_precision`), this form and the products of the
    kernel's backward do so. The gradient at scale 50 is then off by 3e-4 in place of 4e-6 (CPU, width 4096).
    """
    check_masked_lse(q, d, row_scopes, column_scopes, row_keys, column_keys, limits, scale)
    return _MaskedLSE.apply(q, d, row_scopes, column_scopes, row_keys, column_keys, limits, scale)


class _MaskedLSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, d, row_scopes, column_scopes, row_keys, column_keys, limits, scale):
        masks = row_scopes, column_scopes, row_keys, column_keys, limits
        d_wide = d.to(torch.promote_types(d.dtype, torch.float32))
        lse, highest, total = (d_wide.new_zeros(len(q)) for _ in range(3))
        counts = torch.zeros(len(q), 3, dtype=torch.int32, device=q.device)
        for rows in _row_chunks(q, d):
            results = _lse_of_rows(q, d_wide, masks, scale, rows)
            lse[rows], highest[rows], total[rows], counts[rows] = results
        ctx.save_for_backward(q, d, *masks, lse)
        ctx.scale = scale
        ctx.mark_non_differentiable(highest, total, counts)
        return lse, highest, total, counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlse, *_):
        q, d, *masks, lse = ctx.saved_tensors
        needs_dq, needs_dd = ctx.needs_input_grad[:2]
        d_wide = d.to(lse.dtype)
        dq = torch.zeros_like(q, dtype=lse.dtype) if needs_dq else None
        dd = torch.zeros_like(d, dtype=lse.dtype) if needs_dd else None
        for rows in _row_chunks(q, d):
            _add_gradient_of_rows(dq, dd, q, d_wide, masks, ctx.scale, rows, lse, dlse)
        grads = (None if g is None else g.to(q.dtype) for g in (dq, dd))
        return *grads, None, None, None, None, None, None


# functions of their own, so that a chunk's scores are freed before the next one's are made. They take d in
# the dtype of the scores, and q as it is


def _lse_of_rows(q, d, masks, scale, rows) -> tuple[torch.Tensor, ...]:
    scores, dropped, counts = _scores(q, d, masks, scale, rows)
    total = scores.masked_fill_(dropped, 0.0).sum(1)
    scores.masked_fill_(dropped, -torch.inf)
    highest = scores.amax(1) if len(d) else torch.full_like(total, -torch.inf)
    # of a row that keeps nothing: minus infinity minus itself is NaN
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    return scores.sub_(shift[:, None]).exp_().sum(1).log_().add_(shift), highest, total, counts


def _add_gradient_of_rows(dq, dd, q, d, masks, scale, rows, lse, dlse) -> None:
    ds, dropped, _ = _scores(q, d, masks, scale, rows)
    shift = lse[rows].masked_fill(lse[rows] == -torch.inf, 0.0)
    ds.masked_fill_(dropped, -torch.inf).sub_(shift[:, None]).exp_().mul_(scale * dlse[rows, None])
    # autocast leaves products alone that write into a tensor
    if dq is not None:
        torch.mm(ds, d, out=dq[rows])
    if dd is not None:
        dd.addmm_(ds.mT, q[rows].to(d.dtype))


def _row_chunks(q: torch.Tensor, d: torch.Tensor) -> list[slice]:
    step = max(1, _MAX_SCORES // max(1, len(d)))
    return [slice(start, start + step) for start in range(0, len(q), step)]


def _scores(q, d, masks, scale, rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scores [R, M], whether they are dropped, counts [R, 3]) of a chunk of rows."""
    row_scopes, column_scopes, row_keys, column_keys, limits = masks
    with torch.autocast(q.device.type, enabled=False):
        scores = (q[rows].to(d.dtype) @ d.mT).mul_(scale)
    kept = _share_one(row_scopes[rows], column_scopes, row_scopes[rows] >= 0)
    numbers = [_count(kept)]
    drop = _share_one(row_keys[rows], column_keys, row_keys[rows] != 0).logical_and_(kept)
    numbers.append(_count(drop))
    kept.logical_xor_(drop)
    if limits is not None:
        torch.gt(scores, limits[rows, None], out=drop).logical_and_(kept)
        kept.logical_xor_(drop)
    numbers.append(_count(drop) if limits is not None else torch.zeros_like(numbers[0]))
    return scores, kept.logical_not_(), torch.stack(numbers, dim=1).int()


def _share_one(rows: torch.Tensor, columns: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """[R, M]: whether one of the row's numbers that are `counted` is one of the column's."""
    shared = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=rows.device)
    for row, counts in zip(rows.unbind(1), counted.unbind(1), strict=True):
        for column in columns.unbind(1):
            shared.logical_or_((row[:, None] == column).logical_and_(counts[:, None]))
    return shared


def _count(mask: torch.Tensor) -> torch.Tensor:
    """[R] of [R, M]. In parts, because a sum of bool makes a copy in int64."""
    step = max(1, 2**18 // max(1, mask.shape[1]))
    return torch.cat([part.sum(1) for part in mask.split(step)])
