"""The contrastive loss where the rows of a batch lie on several ranks.

1. The queries stay. Documents with their scopes and keys are gathered from all
   ranks, in fp32. Ranks may have unequal numbers of them: all are padded to the
   largest, by columns whose scope matches nothing.
2. Positives are pairs of one rank, so their indices stay.
3. The backward adds up what every rank says of a document, on its own rank.
4. A rank's loss is scaled by its rows over the mean number of rows. The mean over
   ranks, which DDP and FSDP2 take of gradients, is then the mean over all rows.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nvembed_fast.training.auxiliary_losses import candidate_distillation
from nvembed_fast.training.loss import (
    Candidates,
    Columns,
    LossResult,
    contrastive_loss,
    document_columns,
    loss_of_unit_vectors,
    query_columns,
    unit_vectors,
)

__all__ = ["gathered_distillation", "gathered_loss", "rank_share"]

_PAD_SCOPE = -2


def gathered_loss(
    queries: torch.Tensor,
    documents: torch.Tensor,
    candidates: Candidates,
    *,
    group: dist.ProcessGroup | None = None,
    both_directions: bool = False,
    **options: Any,
) -> LossResult:
    """`contrastive_loss` of this rank's rows against the documents of all ranks.

    Args:
        queries: [B, D] of this rank. B and M differ between ranks.
        documents: [M, D] of this rank.
        candidates: of this rank's rows and columns. Private scopes must differ between ranks.
        group: None is the default group. Without one this is `contrastive_loss`.
        both_directions: the queries are gathered, too.
        options: of `contrastive_loss`.

    Returns:
        The loss, scaled so that the mean over ranks is the mean over all rows. Metrics are means over the
        ranks, weighted by their rows. `masked_by_scope` counts the pads.

    Raises:
        ValueError: on every rank, if one has no rows. On the rank alone, if its candidates do not fit.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return contrastive_loss(queries, documents, candidates, both_directions=both_directions, **options)
    candidates.check(len(queries), len(documents))
    num_ranks = dist.get_world_size(group)
    widths = [candidates.row_keys.shape[1], candidates.column_keys.shape[1]]
    sizes = [len(queries), len(documents), *widths]
    all_sizes = _all_gather(torch.tensor([sizes], device=queries.device), group)
    num_rows, *_ = zip(*all_sizes.tolist(), strict=True)
    if 0 in num_rows:
        raise ValueError(f"every rank must have rows, got none on rank {num_rows.index(0)}")
    max_rows, max_columns, max_keys, max_column_keys = all_sizes.amax(0).tolist()
    with torch.autocast(queries.device.type, enabled=False):
        q, d = unit_vectors(queries), unit_vectors(documents)
        here = candidates.to(q.device)
        all_documents = _gather(document_columns(d, here), max_columns, max_column_keys, group)
        all_queries = _gather(query_columns(q, here), max_rows, max_keys, group) if both_directions else None
    result = loss_of_unit_vectors(
        q,
        d,
        here,
        both_directions=both_directions,
        all_documents=all_documents,
        all_queries=all_queries,
        **options,
    )
    share = rank_share(len(queries), sum(num_rows), num_ranks)
    metrics = torch.stack(list(result.metrics.values())) * share
    dist.all_reduce(metrics, group=group)
    means = (metrics / num_ranks).unbind()
    return LossResult(result.loss * share, dict(zip(result.metrics, means, strict=True)))


def rank_share(num_rows: int, all_rows: int, num_ranks: int) -> float:
    """What the mean loss of a rank's rows is multiplied by (4.): its rows over the mean number of rows."""
    return num_rows * num_ranks / all_rows


def gathered_distillation(
    queries: torch.Tensor,
    documents: torch.Tensor,
    candidates: Candidates,
    *,
    group: dist.ProcessGroup | None = None,
    **temperatures: float,
) -> torch.Tensor:
    """`candidate_distillation` of this rank's rows over the documents of all ranks, not scaled.

    Args:
        queries, documents, candidates, group: as in `gathered_loss`.
        temperatures: of `candidate_distillation`.
    """
    teacher = candidates.teacher_documents
    if not dist.is_initialized() or dist.get_world_size(group) == 1 or teacher is None:
        return candidate_distillation(queries, documents, candidates, **temperatures)
    here = candidates.to(queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        d = unit_vectors(documents)
        # side by side, so that they travel together
        both = document_columns(torch.cat([d, teacher.to(d)], 1), here)
        sizes = _all_gather(torch.tensor([both.keys.shape], device=d.device), group)
        max_columns, max_keys = sizes.amax(0).tolist()
        vectors, scopes, _ = _gather(both, max_columns, max_keys, group)
    all_documents, all_teachers = vectors.split([d.shape[1], teacher.shape[1]], 1)
    whole = replace(here, column_scopes=scopes, teacher_documents=all_teachers.detach())
    return candidate_distillation(queries, all_documents, whole, **temperatures)


def _gather(columns: Columns, length: int, num_keys: int, group: dist.ProcessGroup | None) -> Columns:
    """The columns of all ranks, `length` from each."""
    vectors, scopes, keys = columns
    missing = length - len(vectors)
    keys = F.pad(keys, (0, num_keys - keys.shape[1], 0, missing))
    return Columns(
        _AllGather.apply(F.pad(vectors, (0, 0, 0, missing)), group),
        _all_gather(F.pad(scopes, (0, 0, 0, missing), value=_PAD_SCOPE), group),
        _all_gather(keys, group),
    )


def _all_gather(t: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[ranks * N, ..] of [N, ..]."""
    num_ranks = dist.get_world_size(group)
    whole = t.new_empty(num_ranks * len(t), *t.shape[1:])
    dist.all_gather(list(whole.chunk(num_ranks)), t.contiguous(), group)
    return whole


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        return _all_gather(t, group)

    @staticmethod
    def backward(ctx, gradient):
        parts = [part.contiguous() for part in gradient.chunk(dist.get_world_size(ctx.group))]
        here = torch.empty_like(parts[0])
        dist.reduce_scatter(here, parts, group=ctx.group)
        return here, None
