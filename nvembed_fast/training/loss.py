"""The contrastive loss of NV-Embed's two stages: one masked log-sum-exp, in fp32.

Dimensions: B rows (queries), M columns (documents), D width, P pairs of a row and
one of its positives, K keys of a row.

1. s_ij = cos(q_i, d_j) / temperature. Z_i = log sum exp(s_ij) over the negatives
   that row i keeps, by `ops.masked_lse`. The matrix [B, M] is never whole.
2. The loss of a pair is log(1 + exp(Z_i - s_ip)). With one positive that is the
   cross entropy. Other positives of the row never stand in the denominator.
3. The loss is the mean over the rows of weight times the mean over their pairs.
   A row without negatives has the loss 0 and the gradient 0.

A negative of a row is a column in its scope that shares none of the row's keys, and
with a cosine up to its limit. In-batch negatives, a switch for each data
set and rows with their own candidates only are all one rule: see `Candidates`.

Everything is computed in fp32 (float64 for float64), also under autocast: scores
rounded to bf16 put the gradient off by 5 %. Source of the loss: InfoNCE (arXiv
1807.03748) in the form of arXiv 2405.17428. The limits are those of NV-Retriever
(arXiv 2407.15831).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import inf, isfinite
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from nvembed_fast import ops
from nvembed_fast.kernels.layout import copies_late

__all__ = ["Candidates", "Columns", "LossResult", "contrastive_loss", "matryoshka_loss"]


@dataclass(frozen=True)
class Candidates:
    """Which columns are positives, negatives or nothing to a row.

    Column j is a candidate of row i if row_scopes[i] is one of column_scopes[j]. Scope 0 is everybody's.
    The data sets have numbers from 1 on, the rows themselves from 2**32 on. Keys are 64-bit ids of texts
    and of classes. The keys of a row are its positives and its own query. Those of a column are its text, and
    of a positive also the query of its row. A candidate that shares a key with the row is no negative.

    Attributes:
        positives: [P, 2] int64 (row, column), sorted by row. Every row has one or more.
        row_scopes: [B] int64, not negative.
        column_scopes: [M, 2] int64 (shared, private). A negative number matches nothing.
        row_keys: [B, K] int64. 0 pads.
        column_keys: [M, L] int64. 0 pads.
        weights: [B] fp32. None: all are 1. They should have a mean of 1.
        scored: [S, 2] int64 (row, column), sorted by row: a row's own texts that have a teacher's score. The
            contrastive loss does not read them (`auxiliary_losses.score_distillation`).
        teacher_scores: [S] fp32.
        teacher_queries: [B, E] fp32, a teacher's vectors of the rows, for
            `auxiliary_losses.candidate_distillation`.
        teacher_documents: [M, E] fp32, of the columns.
    """

    positives: torch.Tensor
    row_scopes: torch.Tensor
    column_scopes: torch.Tensor
    row_keys: torch.Tensor
    column_keys: torch.Tensor
    weights: torch.Tensor | None = None
    scored: torch.Tensor | None = None
    teacher_scores: torch.Tensor | None = None
    teacher_queries: torch.Tensor | None = None
    teacher_documents: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "Candidates":
        """The same on a device."""
        given = {f.name: t for f in fields(self) if (t := getattr(self, f.name)) is not None}
        late = copies_late(torch.device(device))
        return replace(self, **{name: t.to(device, non_blocking=late) for name, t in given.items()})

    def part(self, rows: Sequence[int], columns: Sequence[int]) -> "Candidates":
        """Those of some rows and some columns, in the order given. Pairs that fall away are left out."""
        where = self.row_scopes.device
        of_rows, of_columns = (torch.tensor([*n], dtype=torch.int64, device=where) for n in (rows, columns))
        row_at, column_at = (
            torch.full((len(t),), -1, device=where).scatter_(0, of, torch.arange(len(of), device=where))
            for t, of in ((self.row_scopes, of_rows), (self.column_scopes, of_columns))
        )

        def renumbered(pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """The pairs that stay, sorted, and their places among those of before."""
            there = torch.stack([row_at[pairs[:, 0]], column_at[pairs[:, 1]]], 1)
            places = (there >= 0).all(1).nonzero()[:, 0]
            order = (there[places, 0] * (len(of_columns) + 1) + there[places, 1]).argsort()
            return there[places[order]], places[order]

        scored, places = (None, None) if self.scored is None else renumbered(self.scored)
        return Candidates(
            renumbered(self.positives)[0],
            self.row_scopes[of_rows],
            self.column_scopes[of_columns],
            self.row_keys[of_rows],
            self.column_keys[of_columns],
            None if self.weights is None else self.weights[of_rows],
            scored,
            None if self.teacher_scores is None else self.teacher_scores[places],
            None if self.teacher_queries is None else self.teacher_queries[of_rows],
            None if self.teacher_documents is None else self.teacher_documents[of_columns],
        )

    def check(self, num_rows: int, num_columns: int) -> None:
        """Raise ValueError, naming the field, if this does not belong to so many rows and columns.

        On a GPU the values are not looked at, because that would wait for it.
        """
        num_pairs = len(self.positives)
        shapes = {
            "positives": (num_pairs, 2),
            "row_scopes": (num_rows,),
            "column_scopes": (num_columns, 2),
            "row_keys": (num_rows, self.row_keys.shape[-1]),
            "column_keys": (num_columns, self.column_keys.shape[-1]),
            "weights": (num_rows,),
            "scored": (0 if self.scored is None else len(self.scored), 2),
            "teacher_scores": (0 if self.scored is None else len(self.scored),),
        }
        for name, shape in shapes.items():
            t = getattr(self, name)
            wanted = torch.float32 if name in ("weights", "teacher_scores") else torch.int64
            if t is not None and (t.shape != shape or t.dtype != wanted):
                raise ValueError(f"{name} must be {list(shape)} {wanted}, got {list(t.shape)} {t.dtype}")
        if not self.positives.is_cpu:
            return
        rows, columns = self.positives.unbind(1)
        if num_pairs and (int(columns.min()) < 0 or int(columns.max()) >= num_columns):
            raise ValueError(f"positives must name columns from 0 to {num_columns - 1}, got others")
        if not torch.equal(rows.unique_consecutive(), torch.arange(num_rows)):
            raise ValueError(f"positives must be sorted by row and name each of the {num_rows} rows")
        keys = self.column_keys[columns][:, :, None]
        lacking = ~((self.row_keys[rows][:, None] == keys) & (keys != 0)).any((1, 2))
        if lacking.any():
            raise ValueError(
                f"row_keys must hold a key of each positive of the row, row {int(rows[lacking][0])} lacks one"
            )


class Columns(NamedTuple):
    """What rows are compared with: [N, D] unit vectors, [N, S] scopes and [N, K] keys."""

    vectors: torch.Tensor
    scopes: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True)
class LossResult:
    """A loss with a gradient, and what it says of the batch.

    Attributes:
        loss: [] fp32.
        metrics: name -> [] fp32, detached. Shares of rows are of all rows.
            `accuracy`: rows with a positive above all negatives.
            `hard_negative_wins`: rows with a negative above their lowest positive.
            `rows_without_negatives`: a share of the rows.
            `positive_cosine`, `negative_cosine`: means over the pairs and over the kept negatives.
            `masked_by_scope`: share of all rows times columns that are no candidates.
            `masked_by_key`, `masked_by_limit`: shares of the candidates. The row's own positives count as
            masked by key.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def contrastive_loss(
    queries: torch.Tensor,
    documents: torch.Tensor,
    candidates: Candidates,
    *,
    temperature: float,
    limit: float | None = None,
    margin: float | None = None,
    both_directions: bool = False,
) -> LossResult:
    """The mean loss of the rows.

    Args:
        queries: [B, D] in any floating dtype. They are normalized here, in fp32.
        documents: [M, D], likewise.
        candidates: of these rows and columns, on any device.
        temperature: positive. Cosines are divided by it.
        limit: a share such as 0.95. With lowest the row's lowest positive cosine, a negative above
            lowest - (1 - limit) |lowest| is dropped.
        margin: a negative above lowest - margin is dropped.
        both_directions: average with the loss of finding each pair's query among all queries. A row with its
            own candidates only has no other query, so its loss is halved.

    Raises:
        ValueError: candidates that do not fit, or a temperature that is not positive and finite.
    """
    if not len(queries):
        raise ValueError("queries must hold one row or more, got none")
    candidates.check(len(queries), len(documents))
    return loss_of_unit_vectors(
        unit_vectors(queries),
        unit_vectors(documents),
        candidates.to(queries.device),
        temperature=temperature,
        limit=limit,
        margin=margin,
        both_directions=both_directions,
    )


def loss_of_unit_vectors(
    q: torch.Tensor,
    d: torch.Tensor,
    c: Candidates,
    *,
    temperature: float,
    limit: float | None = None,
    margin: float | None = None,
    both_directions: bool = False,
    all_documents: Columns | None = None,
    all_queries: Columns | None = None,
) -> LossResult:
    """`contrastive_loss` of `unit_vectors` and of checked candidates on their device.

    Args:
        q, d, c, temperature, limit, margin, both_directions: as in `contrastive_loss`.
        all_documents: the negatives come from these in place of d (`training/gather.py`).
        all_queries: likewise for the second direction.
    """
    if not 0 < temperature < inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    for name, value in (("limit", limit), ("margin", margin)):
        if value is not None and not isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    with torch.autocast(q.device.type, enabled=False):
        rows, columns = c.positives.unbind(1)
        # by indexing: its gradient is summed in a fixed order on a GPU, too
        cosines = (q[rows] * d[columns]).sum(1)
        num_positives = torch.bincount(rows, minlength=len(q))

        documents_side = document_columns(d, c) if all_documents is None else all_documents
        lowest = _lowest(cosines, rows, len(q))
        of_rows = query_columns(q, c)
        z, *statistics = _negatives(of_rows, documents_side, lowest, temperature, limit, margin)
        terms = _pair_losses(cosines / temperature, z[rows])
        metrics = _metrics(cosines, lowest, rows, len(documents_side.vectors), temperature, *statistics)
        if both_directions:
            queries_side = of_rows if all_queries is None else all_queries
            of_pairs = Columns(d[columns], c.column_scopes[columns], c.column_keys[columns])
            lowest = _lowest(cosines, columns, len(d))[columns]
            z, *_ = _negatives(of_pairs, queries_side, lowest, temperature, limit, margin)
            terms = (terms + _pair_losses(cosines / temperature, z)) / 2

        per_row = torch.segment_reduce(terms, "sum", lengths=num_positives, unsafe=True) / num_positives
        if c.weights is not None:
            per_row = per_row * c.weights
        loss = per_row.mean()
    return LossResult(loss, {"loss": loss.detach(), **metrics})


def matryoshka_loss(
    queries: torch.Tensor,
    documents: torch.Tensor,
    candidates: Candidates,
    widths: Sequence[int],
    **options: Any,
) -> LossResult:
    """The mean of `contrastive_loss` over vectors cut to their first columns (arXiv 2205.13147).

    Args:
        queries, documents, candidates, options: as in `contrastive_loss`.
        widths: numbers of columns, up to D.

    Returns:
        The mean loss. The other metrics are those of the largest width.

    Raises:
        ValueError: a width below 1 or above D, or none.
    """
    width = queries.shape[1]
    if not widths or min(widths) < 1 or max(widths) > width:
        raise ValueError(f"widths must be from 1 to {width}, got {list(widths)}")
    results = [
        contrastive_loss(queries[:, :n], documents[:, :n], candidates, **options) for n in sorted(widths)
    ]
    loss = torch.stack([result.loss for result in results]).mean()
    return LossResult(loss, results[-1].metrics | {"loss": loss.detach()})


def unit_vectors(vectors: torch.Tensor) -> torch.Tensor:
    """[N, D] of length 1 in fp32 (float64 for float64)."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=1)


def document_columns(documents: torch.Tensor, candidates: Candidates) -> Columns:
    """[M, D] unit vectors with their scopes and keys."""
    return Columns(documents, candidates.column_scopes, candidates.column_keys)


def query_columns(queries: torch.Tensor, candidates: Candidates) -> Columns:
    """[B, D] unit vectors with their scopes and keys."""
    return Columns(queries, candidates.row_scopes[:, None], candidates.row_keys)


def _negatives(
    rows: Columns,
    columns: Columns,
    lowest: torch.Tensor,
    temperature: float,
    limit: float | None,
    margin: float | None,
) -> tuple[torch.Tensor, ...]:
    """`ops.masked_lse` of rows against columns. lowest: [B] the lowest positive cosine of a row."""
    limits = None
    if limit is not None or margin is not None:
        bounds = [] if limit is None else [lowest - (1 - limit) * lowest.abs()]
        bounds += [] if margin is None else [lowest - margin]
        limits = torch.stack(bounds).amin(0) / temperature
    return ops.masked_lse(
        rows.vectors,
        columns.vectors,
        rows.scopes.contiguous(),
        columns.scopes.contiguous(),
        rows.keys.contiguous(),
        columns.keys.contiguous(),
        limits,
        1 / temperature,
    )


def _pair_losses(scores: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """[P] log(1 + exp(z - score)). softplus would be linear above 20, and off by 2e-9."""
    return -F.logsigmoid(scores - z)


def _lowest(cosines: torch.Tensor, groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[num_groups] the lowest cosine of each group of pairs, infinite for a group without pairs."""
    start = cosines.new_full((num_groups,), inf)
    return start.scatter_reduce(0, groups, cosines.detach(), "amin")


@torch.no_grad()
def _metrics(
    cosines: torch.Tensor,
    lowest: torch.Tensor,
    rows: torch.Tensor,
    num_columns: int,
    temperature: float,
    highest_score: torch.Tensor,
    total_score: torch.Tensor,
    counts: torch.Tensor,
) -> dict[str, torch.Tensor]:
    best = -_lowest(-cosines, rows, len(lowest))
    hardest = highest_score * temperature
    num_candidates, num_by_key, num_by_limit = counts.double().sum(0)
    num_kept = num_candidates - num_by_key - num_by_limit
    shares = {
        "accuracy": (best > hardest).double().mean(),
        "positive_cosine": cosines.double().mean(),
        "negative_cosine": total_score.double().sum() * temperature / num_kept.clamp_min(1),
        "hard_negative_wins": (hardest > lowest).double().mean(),
        "masked_by_scope": 1 - num_candidates / max(1, len(lowest) * num_columns),
        "masked_by_key": num_by_key / num_candidates.clamp_min(1),
        "masked_by_limit": num_by_limit / num_candidates.clamp_min(1),
        "rows_without_negatives": (highest_score == -inf).double().mean(),
    }
    return {name: value.float() for name, value in shares.items()}
