"""Log-sum-exp of scores over the columns that a row keeps. Contract: `reference.masked_lse`.

A score is a product of width D = 4096, so this is no flash attention: neither a tile
of q fits in shared memory, nor its gradient in registers.

1. Forward: one program owns BLOCK_B rows and the columns of one split. It makes tile
   after tile of scores, masks each, and keeps a running maximum and sum, the sum of
   the scores and three counts.
2. A second kernel combines the splits of a row in their order. There are at most
   MAX_SPLITS, and how many follows from M and the tile.
3. Backward: for a chunk of rows a kernel makes the scores again and writes
   dS = scale * dlse * exp(s - lse) into one buffer [R, M] in fp32. Then the
   library computes dq = dS d and adds dS^T q to dd.

The invariants: no tile depends on B, so a row's results do not depend on other rows.
Nothing is atomic, so two runs give the same bits.

Saved are the inputs and lse, a number per row. The buffer has at most MAX_SCORES
numbers unless one row has more: 67 MB, 0.4 % of the whole scores at B = M = 64k. Of
16-bit q and d the backward makes copies in fp32, because its products are in fp32,
too. fp32 scores are full fp32 products. The library's products round to TF32 where
PyTorch may: see the reference for what that costs.

Prefixes inside kernels: i_ index, o_ offsets, m_ mask, b_ block in registers.
"""

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
)
from nvembed_fast.kernels.errors import check_masked_lse, check_masked_lse_bwd

__all__ = ["masked_lse"]

MAX_SPLITS = 32
COMBINED_ROWS = 32  # of a program of the second kernel
MAX_SCORES = 1 << 24  # of the backward's buffer
# no kernel is compiled anew for another batch
_COUNTS = ["first_row", "num_rows", "num_columns", "num_splits", "split_columns"]
_COUNTS += ["num_row_scopes", "num_column_scopes", "num_row_keys", "num_column_keys"]


@triton.jit
def _scores(
    q_ptr, stride_qb,
    d_ptr, stride_dm,
    o_b, m_b, o_m, m_m, scale,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b_s = tl.zeros([BLOCK_B, BLOCK_M], dtype=tl.float32)
    for i_d in tl.range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = (o_d < D)[None, :]
        # [BLOCK_B, BLOCK_D]
        b_q = tl.load(q_ptr + o_b[:, None] * stride_qb + o_d[None, :], mask=m_b[:, None] & m_d, other=0.0)
        # [BLOCK_M, BLOCK_D]
        b_d = tl.load(d_ptr + o_m[:, None] * stride_dm + o_d[None, :], mask=m_m[:, None] & m_d, other=0.0)
        b_s = tl.dot(b_q, b_d.T, b_s, input_precision=PRECISION)
    return b_s * scale


@triton.jit
def _share_one(
    row_ptr, num_row, column_ptr, num_column, o_b, m_b, o_m, m_m,
    ARE_SCOPES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    b_shared = tl.zeros([BLOCK_B, BLOCK_M], dtype=tl.int1)
    for i_row in range(num_row):
        # [BLOCK_B]
        b_row = tl.load(row_ptr + o_b * num_row + i_row, mask=m_b, other=-1 if ARE_SCOPES else 0)
        m_counts = b_row >= 0 if ARE_SCOPES else b_row != 0
        for i_column in range(num_column):
            # [BLOCK_M]. A scope of -2 keeps columns beyond the last away
            b_column = tl.load(column_ptr + o_m * num_column + i_column, mask=m_m, other=-2)
            b_shared = b_shared | ((b_row[:, None] == b_column[None, :]) & m_counts[:, None])
    return b_shared


@triton.jit(do_not_specialize=_COUNTS)
def _masked_lse_fwd_kernel(
    q_ptr, stride_qb,
    d_ptr, stride_dm,
    row_scopes_ptr, num_row_scopes, column_scopes_ptr, num_column_scopes,
    row_keys_ptr, num_row_keys, column_keys_ptr, num_column_keys,
    limits_ptr, partial_ptr, partial_counts_ptr,
    num_rows, num_columns, split_columns, scale,
    D: tl.constexpr, HAS_LIMITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # the row tiles of a split are neighbours: they read the same columns at about the same time
    num_tiles = tl.cdiv(num_rows, BLOCK_B)
    i_split = (tl.program_id(0) // num_tiles).to(tl.int64)
    o_b = (tl.program_id(0) % num_tiles).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = o_b < num_rows
    if HAS_LIMITS:
        b_limit = tl.load(limits_ptr + o_b, mask=m_b, other=0.0)

    b_max = tl.full([BLOCK_B], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_B], dtype=tl.float32)
    b_total = tl.zeros([BLOCK_B], dtype=tl.float32)
    b_candidates = tl.zeros([BLOCK_B], dtype=tl.int32)
    b_same = tl.zeros([BLOCK_B], dtype=tl.int32)
    b_above = tl.zeros([BLOCK_B], dtype=tl.int32)
    for i_m in range(
        i_split * split_columns, tl.minimum((i_split + 1) * split_columns, num_columns), BLOCK_M
    ):
        o_m = i_m + tl.arange(0, BLOCK_M)
        m_m = o_m < num_columns
        # [BLOCK_B, BLOCK_M]
        b_s = _scores(
            q_ptr, stride_qb, d_ptr, stride_dm, o_b, m_b, o_m, m_m, scale,
            D, PRECISION, BLOCK_B, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        m_keep = _share_one(
            row_scopes_ptr, num_row_scopes, column_scopes_ptr, num_column_scopes, o_b, m_b, o_m, m_m,
            True, BLOCK_B, BLOCK_M,
        )  # fmt: skip
        b_candidates += tl.sum(m_keep.to(tl.int32), 1)
        m_same = m_keep & _share_one(
            row_keys_ptr, num_row_keys, column_keys_ptr, num_column_keys, o_b, m_b, o_m, m_m,
            False, BLOCK_B, BLOCK_M,
        )  # fmt: skip
        b_same += tl.sum(m_same.to(tl.int32), 1)
        m_keep = m_keep & (m_same == 0)
        if HAS_LIMITS:
            m_above = m_keep & (b_s > b_limit[:, None])
            b_above += tl.sum(m_above.to(tl.int32), 1)
            m_keep = m_keep & (m_above == 0)
        b_total += tl.sum(tl.where(m_keep, b_s, 0.0), 1)
        b_s = tl.where(m_keep, b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        # of a row that has kept nothing: minus infinity minus itself is NaN
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_sum = b_sum * tl.exp2((b_max - b_shift) * LOG2E)
        b_sum += tl.sum(tl.exp2((b_s - b_shift[:, None]) * LOG2E), 1)
        b_max = b_new_max

    # [3, splits, B]
    num_splits = tl.cdiv(num_columns, split_columns)
    step = num_splits.to(tl.int64) * num_rows
    o_part = i_split * num_rows + o_b
    tl.store(partial_ptr + o_part, b_max, mask=m_b)
    tl.store(partial_ptr + step + o_part, b_sum, mask=m_b)
    tl.store(partial_ptr + 2 * step + o_part, b_total, mask=m_b)
    tl.store(partial_counts_ptr + o_part, b_candidates, mask=m_b)
    tl.store(partial_counts_ptr + step + o_part, b_same, mask=m_b)
    tl.store(partial_counts_ptr + 2 * step + o_part, b_above, mask=m_b)


@triton.jit(do_not_specialize=_COUNTS)
def _masked_lse_fwd_combine_kernel(
    partial_ptr, partial_counts_ptr, lse_ptr, highest_ptr, total_ptr, counts_ptr, num_rows, num_splits,
    BLOCK_S: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    o_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_s = tl.arange(0, BLOCK_S)
    m_b = o_b < num_rows
    m_part = (o_s < num_splits)[:, None] & m_b[None, :]
    # [BLOCK_S, BLOCK_B]
    o_part = o_s[:, None].to(tl.int64) * num_rows + o_b[None, :]
    step = num_splits.to(tl.int64) * num_rows
    b_maxes = tl.load(partial_ptr + o_part, mask=m_part, other=float("-inf"))
    b_sums = tl.load(partial_ptr + step + o_part, mask=m_part, other=0.0)
    b_totals = tl.load(partial_ptr + 2 * step + o_part, mask=m_part, other=0.0)
    # [BLOCK_B]
    b_max = tl.max(b_maxes, 0)
    m_empty = b_max == float("-inf")
    b_shift = tl.where(m_empty, 0.0, b_max)
    b_sum = tl.sum(b_sums * tl.exp2((b_maxes - b_shift[None, :]) * LOG2E), 0)
    b_lse = b_shift + tl.log(tl.where(m_empty, 1.0, b_sum))
    tl.store(lse_ptr + o_b, tl.where(m_empty, float("-inf"), b_lse), mask=m_b)
    tl.store(highest_ptr + o_b, b_max, mask=m_b)
    tl.store(total_ptr + o_b, tl.sum(b_totals, 0), mask=m_b)
    for i_count in tl.static_range(3):
        b_counts = tl.load(partial_counts_ptr + i_count * step + o_part, mask=m_part, other=0)
        tl.store(counts_ptr + 3 * o_b + i_count, tl.sum(b_counts, 0), mask=m_b)


@triton.jit(do_not_specialize=_COUNTS)
def _masked_lse_bwd_kernel(
    q_ptr, stride_qb,
    d_ptr, stride_dm,
    row_scopes_ptr, num_row_scopes, column_scopes_ptr, num_column_scopes,
    row_keys_ptr, num_row_keys, column_keys_ptr, num_column_keys,
    limits_ptr, lse_ptr, dlse_ptr, ds_ptr,
    first_row, num_rows, num_columns, scale,
    D: tl.constexpr, HAS_LIMITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_rows, BLOCK_B)
    o_r = (tl.program_id(0) % num_tiles).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_m = (tl.program_id(0) // num_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_b = first_row + o_r
    m_b = o_r < num_rows
    m_m = o_m < num_columns
    # [BLOCK_B, BLOCK_M]
    b_s = _scores(
        q_ptr, stride_qb, d_ptr, stride_dm, o_b, m_b, o_m, m_m, scale,
        D, PRECISION, BLOCK_B, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    m_keep = _share_one(
        row_scopes_ptr, num_row_scopes, column_scopes_ptr, num_column_scopes, o_b, m_b, o_m, m_m,
        True, BLOCK_B, BLOCK_M,
    )  # fmt: skip
    m_same = _share_one(
        row_keys_ptr, num_row_keys, column_keys_ptr, num_column_keys, o_b, m_b, o_m, m_m,
        False, BLOCK_B, BLOCK_M,
    )  # fmt: skip
    m_keep = m_keep & (m_same == 0)
    if HAS_LIMITS:
        m_keep = m_keep & (b_s <= tl.load(limits_ptr + o_b, mask=m_b, other=0.0)[:, None])
    # [BLOCK_B]
    b_lse = tl.load(lse_ptr + o_b, mask=m_b, other=0.0)
    b_factor = tl.load(dlse_ptr + o_b, mask=m_b, other=0.0) * scale
    b_ds = tl.exp2((b_s - b_lse[:, None]) * LOG2E) * b_factor[:, None]
    ds_ptrs = ds_ptr + o_r[:, None] * num_columns + o_m[None, :]
    tl.store(ds_ptrs, tl.where(m_keep, b_ds, 0.0), mask=m_b[:, None] & m_m[None, :])


def _configured(kernel: str, width: int, *, capability: int, dtype: torch.dtype) -> dict[str, int]:
    padded = max(16, triton.next_power_of_2(width))
    # full fp32 products are on the plain cores, and hold both operands in registers
    depth = min(16 if dtype.itemsize == 4 else 64, padded)
    # beside the scores there are two masks of their size
    rule = {"BLOCK_B": 64, "BLOCK_M": 64, "BLOCK_D": depth, "num_warps": 8, "num_stages": 3}
    return tuned.override(f"masked_lse.{kernel}", capability, rule, width=padded, bits=8 * dtype.itemsize)


@tuned.cache
def _launch_config(width: int, *, capability: int, dtype: torch.dtype) -> dict[str, int]:
    """The tile of scores. No number of it follows from B or M."""
    return _configured("fwd", width, capability=capability, dtype=dtype)


@tuned.cache
def _bwd_launch_config(width: int, *, capability: int, dtype: torch.dtype) -> dict[str, int]:
    """As `_launch_config`. Nothing is kept from tile to tile, so other tiles may be better."""
    return _configured("bwd", width, capability=capability, dtype=dtype)


def _split_columns(num_columns: int, block: int) -> int:
    """The columns of a split: whole tiles, and as few as MAX_SPLITS lets be."""
    return block * triton.cdiv(triton.cdiv(num_columns, block), MAX_SPLITS)


def _masks(row_scopes, column_scopes, row_keys, column_keys, limits) -> dict:
    arguments = {"limits_ptr": limits, "HAS_LIMITS": limits is not None}
    for name, t in (
        ("row_scopes", row_scopes),
        ("column_scopes", column_scopes),
        ("row_keys", row_keys),
        ("column_keys", column_keys),
    ):
        arguments |= {f"{name}_ptr": t, f"num_{name}": t.shape[1]}
    return arguments


def _launch_fwd(
    q: torch.Tensor,
    d: torch.Tensor,
    row_scopes: torch.Tensor,
    column_scopes: torch.Tensor,
    row_keys: torch.Tensor,
    column_keys: torch.Tensor,
    limits: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, num_columns = len(q), len(d)
    lse, highest, total = (q.new_empty(num_rows, dtype=torch.float32) for _ in range(3))
    counts = q.new_empty(num_rows, 3, dtype=torch.int32)
    if not num_rows or not num_columns:
        return lse.fill_(-torch.inf), highest.fill_(-torch.inf), total.zero_(), counts.zero_()
    config = _launch_config(q.shape[1], capability=capability(q.device), dtype=q.dtype)
    split_columns = _split_columns(num_columns, config["BLOCK_M"])
    num_splits = triton.cdiv(num_columns, split_columns)
    partial = q.new_empty(3, num_splits, num_rows, dtype=torch.float32)
    partial_counts = q.new_empty(3, num_splits, num_rows, dtype=torch.int32)
    launch(
        _masked_lse_fwd_kernel,
        triton.cdiv(num_rows, config["BLOCK_B"]) * num_splits,
        **operands(("q", q, "b"), ("d", d, "m")),
        **_masks(row_scopes, column_scopes, row_keys, column_keys, limits),
        partial_ptr=partial,
        partial_counts_ptr=partial_counts,
        num_rows=num_rows,
        num_columns=num_columns,
        split_columns=split_columns,
        scale=scale,
        D=q.shape[1],
        PRECISION=input_precision(q.dtype),
        **config,
    )
    launch(
        _masked_lse_fwd_combine_kernel,
        triton.cdiv(num_rows, COMBINED_ROWS),
        partial_ptr=partial,
        partial_counts_ptr=partial_counts,
        lse_ptr=lse,
        highest_ptr=highest,
        total_ptr=total,
        counts_ptr=counts,
        num_rows=num_rows,
        num_splits=num_splits,
        BLOCK_S=triton.next_power_of_2(num_splits),
        BLOCK_B=COMBINED_ROWS,
        num_warps=4,
    )
    return lse, highest, total, counts


def _launch_bwd(
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
    needs_dq: bool,
    needs_dd: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dq, dd), empty where not needed."""
    num_rows, num_columns = len(q), len(d)
    dq = q.new_empty(q.shape if needs_dq else 0, dtype=torch.float32)
    dd = d.new_zeros(d.shape if needs_dd else 0, dtype=torch.float32)
    if not num_rows or not num_columns:
        return dq.zero_().to(q.dtype), dd.to(d.dtype)
    config = _bwd_launch_config(q.shape[1], capability=capability(q.device), dtype=q.dtype)
    dlse = dlse.contiguous()
    step = min(num_rows, max(1, MAX_SCORES // num_columns))
    ds = q.new_empty(step, num_columns, dtype=torch.float32)
    q_wide, d_wide = q.float(), d.float()
    for first_row in range(0, num_rows, step):
        rows = slice(first_row, min(num_rows, first_row + step))
        ds_here = ds[: rows.stop - first_row]
        launch(
            _masked_lse_bwd_kernel,
            triton.cdiv(len(ds_here), config["BLOCK_B"]) * triton.cdiv(num_columns, config["BLOCK_M"]),
            **operands(("q", q, "b"), ("d", d, "m")),
            **_masks(row_scopes, column_scopes, row_keys, column_keys, limits),
            lse_ptr=lse,
            dlse_ptr=dlse,
            ds_ptr=ds_here,
            first_row=first_row,
            num_rows=len(ds_here),
            num_columns=num_columns,
            scale=scale,
            D=q.shape[1],
            PRECISION=input_precision(q.dtype),
            **config,
        )
        # autocast leaves products alone that write into a tensor
        if needs_dq:
            torch.mm(ds_here, d_wide, out=dq[rows])
        if needs_dd:
            dd.addmm_(ds_here.mT, q_wide[rows])
    return dq.to(q.dtype), dd.to(d.dtype)


@torch.library.custom_op("nvembed_fast::masked_lse", mutates_args=())
def _masked_lse_op(
    q: torch.Tensor,
    d: torch.Tensor,
    row_scopes: torch.Tensor,
    column_scopes: torch.Tensor,
    row_keys: torch.Tensor,
    column_keys: torch.Tensor,
    limits: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_masked_lse(q, d, row_scopes, column_scopes, row_keys, column_keys, limits, scale)
    return _launch_fwd(q, d, row_scopes, column_scopes, row_keys, column_keys, limits, scale)


@_masked_lse_op.register_fake
def _masked_lse_fake(q, d, row_scopes, column_scopes, row_keys, column_keys, limits, scale):
    lse, highest, total = (q.new_empty(q.shape[0], dtype=torch.float32) for _ in range(3))
    return lse, highest, total, q.new_empty((q.shape[0], 3), dtype=torch.int32)


@torch.library.custom_op("nvembed_fast::masked_lse_bwd", mutates_args=())
def _masked_lse_bwd_op(
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
    needs_dq: bool,
    needs_dd: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    masks = row_scopes, column_scopes, row_keys, column_keys, limits
    check_masked_lse_bwd(q, d, *masks, lse, dlse, scale)
    return _launch_bwd(q, d, *masks, lse, dlse, scale, needs_dq, needs_dd)


@_masked_lse_bwd_op.register_fake
def _masked_lse_bwd_fake(
    q, d, row_scopes, column_scopes, row_keys, column_keys, limits, lse, dlse, scale, needs_dq, needs_dd
):
    return tuple(t.new_empty(t.shape if needed else 0) for t, needed in ((q, needs_dq), (d, needs_dd)))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    lse, *statistics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(*tensors, lse)


def _differentiate(ctx, dlse, *_):
    if dlse is None:
        return (None,) * 8
    needs = ctx.needs_input_grad[:2]
    grads = _masked_lse_bwd_op(*ctx.saved_tensors, dlse, ctx.scale, *needs)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *(None,) * 6


_masked_lse_op.register_autograd(_differentiate, setup_context=_save)


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
    """Triton version of `reference.masked_lse`: same arguments, same result."""
    check_masked_lse(q, d, row_scopes, column_scopes, row_keys, column_keys, limits, scale)
    run = _masked_lse_op if is_dispatched(q, d) else _launch_fwd
    return run(q, d, row_scopes, column_scopes, row_keys, column_keys, limits, scale)
