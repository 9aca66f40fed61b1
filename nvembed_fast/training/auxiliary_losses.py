"""Terms that may stand beside the contrastive loss: a teacher's scores, a teacher's vectors, and spread.

Each is a mean with a gradient, in fp32 whatever the autocast (float64 for float64). The gradient is so
if the caller's `backward` is outside of autocast, as those of `grad_cache` are. The caller adds a term to the
loss with a weight of its choice. Dimensions: B rows (queries), M columns (documents), D width, S scored
pairs.
"""

from math import inf

import torch

from nvembed_fast.training.loss import Candidates, unit_vectors

__all__ = ["candidate_distillation", "score_distillation", "spread_out", "vector_distillation"]


def score_distillation(
    queries: torch.Tensor,
    documents: torch.Tensor,
    pairs: torch.Tensor,
    teacher_scores: torch.Tensor,
    *,
    temperature: float,
    teacher_temperature: float = 1.0,
) -> torch.Tensor:
    """KL divergence of the student's distribution over a row's own candidates from the teacher's.

    Source: arXiv 1503.02531.

    Args:
        queries: [B, D] in any floating dtype. They are normalized here.
        documents: [M, D], likewise.
        pairs: [S, 2] int64 (row, column), sorted by row: the positives and negatives that have a score.
        teacher_scores: [S] fp32. A reranker's logits, or cosines with a small teacher_temperature.
        temperature: the student's cosines are divided by it.
        teacher_temperature: the teacher's scores are divided by it.

    Returns:
        [] the mean over the rows that have pairs. A row with one pair adds 0.

    Raises:
        ValueError: a temperature that is not positive and finite, pairs of another shape, or none.
    """
    _check_temperatures(temperature, teacher_temperature)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or teacher_scores.shape != pairs.shape[:1] or not len(pairs):
        shapes = f"{list(pairs.shape)} and {list(teacher_scores.shape)}"
        raise ValueError(f"pairs and teacher_scores must be [S, 2] and [S] with S > 0, got {shapes}")
    with torch.autocast(queries.device.type, enabled=False):
        q, d = unit_vectors(queries), unit_vectors(documents)
        rows, columns = pairs.to(q.device).unbind(1)
        _, groups, lengths = rows.unique_consecutive(return_inverse=True, return_counts=True)
        scores = (q[rows] * d[columns]).sum(1) / temperature
        student = _log_softmax(scores, groups, lengths)
        teacher = _log_softmax(teacher_scores.to(q) / teacher_temperature, groups, lengths)
        return (teacher.exp() * (teacher - student)).sum() / len(lengths)


def candidate_distillation(
    queries: torch.Tensor,
    documents: torch.Tensor,
    candidates: Candidates,
    *,
    temperature: float,
    teacher_temperature: float = 1.0,
) -> torch.Tensor:
    """KL divergence of the student's distribution over a row's candidates from that of a teacher's vectors.

    The candidates are the columns in the row's scope. Columns with one text count each. The teacher's vectors
    may have another width.

    Args:
        queries: [B, D] in any floating dtype. They are normalized here.
        documents: [M, D], likewise.
        candidates: with teacher_queries and teacher_documents, which are normalized here, too.
        temperature: the student's cosines are divided by it.
        teacher_temperature: the teacher's cosines are divided by it.

    Returns:
        [] the mean over the rows. A row with one candidate adds 0.

    Raises:
        ValueError: a temperature that is not positive and finite, or candidates without a teacher's vectors.
    """
    _check_temperatures(temperature, teacher_temperature)
    if candidates.teacher_queries is None or candidates.teacher_documents is None:
        raise ValueError("candidates have no teacher_queries and teacher_documents")
    with torch.autocast(queries.device.type, enabled=False):
        q, d = unit_vectors(queries), unit_vectors(documents)
        of_rows, of_columns = (
            unit_vectors(t.to(q)) for t in (candidates.teacher_queries, candidates.teacher_documents)
        )
        scopes = (candidates.row_scopes[:, None, None] == candidates.column_scopes).any(2).to(q.device)
        # finite: the difference of two infinite ones is NaN
        outside = torch.finfo(q.dtype).min
        student, teacher = (
            (scores / t).masked_fill(~scopes, outside).log_softmax(1)
            for scores, t in ((q @ d.mT, temperature), (of_rows @ of_columns.mT, teacher_temperature))
        )
        return (teacher.exp() * (teacher - student)).masked_fill(~scopes, 0).sum() / len(q)


def vector_distillation(vectors: torch.Tensor, teacher_vectors: torch.Tensor) -> torch.Tensor:
    """1 - cosine of each vector to the teacher's of the same text.

    Args:
        vectors: [N, D] in any floating dtype.
        teacher_vectors: [N, D], no gradient. A teacher of another width gives scores: `score_distillation` of
            the cosines of its vectors.

    Returns:
        [] the mean.

    Raises:
        ValueError: other shapes.
    """
    if vectors.shape != teacher_vectors.shape or vectors.ndim != 2:
        wanted, got = list(vectors.shape), list(teacher_vectors.shape)
        raise ValueError(f"teacher_vectors must be {wanted} as the vectors, got {got}")
    with torch.autocast(vectors.device.type, enabled=False):
        ours = unit_vectors(vectors)
        return 1 - (ours * unit_vectors(teacher_vectors.detach()).to(ours)).sum(1).mean()


def spread_out(vectors: torch.Tensor) -> torch.Tensor:
    """Mean square cosine of two different vectors (arXiv 1708.06320). Random directions have 1 / D.

    The sum of squares of V V^T is that of V^T V, so the smaller of [N, N] and [D, D] is made.

    Args:
        vectors: [N, D] in any floating dtype.

    Returns:
        []. 0 for fewer than two vectors.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        v = unit_vectors(vectors)
        count = len(v)
        if count < 2:
            return v.sum() * 0
        products = v @ v.mT if count <= v.shape[1] else v.mT @ v
        own = v.square().sum(1).square().sum()
        return (products.square().sum() - own) / (count * (count - 1))


def _check_temperatures(temperature: float, teacher_temperature: float) -> None:
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if not 0 < value < inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def _log_softmax(scores: torch.Tensor, groups: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[S] inside each group of neighbours."""
    highest = scores.new_full((len(lengths),), -inf).scatter_reduce(0, groups, scores.detach(), "amax")
    shifted = scores - highest[groups]
    sums = torch.segment_reduce(shifted.exp(), "sum", lengths=lengths, unsafe=True)
    return shifted - sums.log()[groups]
