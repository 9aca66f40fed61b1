"""Exact top-k of inner products, in tiles: the scores of all pairs are never in memory at once.

1. A tile is the product of some queries with some documents, in fp32 whatever the autocast or the precision
   that PyTorch was set to.
2. `Best` keeps the k best columns of each row of the tiles so far.
3. torch.topk leaves open which of equal scores it takes. So a tile's k + 1 best are taken. Where the last two
   are equal, a stable sort of that row decides.

The invariant: of equal scores the lower index comes first, whatever the size of a tile.
"""

import threading
import warnings

import numpy as np
import torch

__all__ = ["Best", "mapped", "topk"]

_QUERIES, _DOCUMENTS = 1024, 8192  # of a tile: 32 MB of scores
_precision = threading.Lock()  # of products in fp32, which is the process's


def topk(
    queries: torch.Tensor,
    documents: torch.Tensor,
    k: int,
    ceilings: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k documents of the highest inner product with each query.

    Args:
        queries: [Q, D] of any float dtype, on the device that computes.
        documents: [N, D] of any float dtype, on any device, or a memory map. Read tile by tile.
        k: how many. Fewer than k documents give columns of -inf and -1.
        ceilings: [Q] fp32. A document with a score above its query's ceiling is passed over. None: none is.
        rows: [M] int64 on the documents' device, the documents to look at. None: all.

    Returns:
        Scores [Q, k] fp32 from the highest to the lowest, and the numbers of the documents [Q, k] int64. With
        `rows` they are numbers among those. Equal scores come in the order of their documents.

    Raises:
        ValueError: the widths differ, k is below 1, or a vector is not finite.
    """
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(
            f"queries and documents must be [Q, D] and [N, D], got {list(queries.shape)} and "
            f"{list(documents.shape)}"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    found = []
    for first in range(0, len(queries), _QUERIES):
        part = slice(first, first + _QUERIES)
        block = _finite(queries[part].float(), "queries", first)
        best = Best(len(block), k, block.device)
        for start in range(0, len(documents if rows is None else rows), _DOCUMENTS):
            place = slice(start, start + _DOCUMENTS)
            tile = documents[place if rows is None else rows[place]].to(block.device).float()
            scores = _product(block, _finite(tile, "documents", start))
            if ceilings is not None:
                above = scores > ceilings[part].to(block.device)[:, None]
                scores.masked_fill_(above, -torch.inf)
            best.add(scores, start)
        found.append((best.scores, best.indices))
    if not found:
        empty = Best(0, k, queries.device)
        return empty.scores, empty.indices
    return torch.cat([scores for scores, _ in found]), torch.cat([indices for _, indices in found])


def mapped(vectors: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor to read. A memory map may be read-only, so that it counts as no memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(vectors)


class Best:
    """The k best columns of each row, of blocks of columns that come in ascending order.

    Attributes:
        scores: [Q, k] fp32, from the highest to the lowest, -inf where there are fewer.
        indices: [Q, k] int64, -1 where there are fewer.
    """

    def __init__(self, num_rows: int, k: int, device: torch.device | str = "cpu"):
        self.scores = torch.full((num_rows, k), -torch.inf, device=device)
        self.indices = torch.full((num_rows, k), -1, dtype=torch.int64, device=device)

    def add(self, scores: torch.Tensor, start: int) -> None:
        """Take the scores [Q, n] fp32 of columns `start` to start + n into account. -inf is no candidate."""
        k, width = self.scores.shape[1], scores.shape[1]
        values, places = scores.topk(min(k + 1, width))
        if width > k:
            tied = (values[:, k - 1] == values[:, k]) & (values[:, k] > -torch.inf)
            for row in tied.nonzero()[:, 0].tolist():
                values[row], places[row] = (
                    part[: k + 1] for part in scores[row].sort(descending=True, stable=True)
                )
        # the stable sort keeps columns in order: a missing one, which has -inf, is in front of masked ones
        places, order = places.sort(dim=1)
        values = torch.cat([self.scores, values.gather(1, order)], dim=1)
        indices = torch.cat([self.indices, places + start], dim=1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        self.scores = values[:, :k]
        self.indices = indices.gather(1, order)[:, :k]


def _product(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    # by backend: the setting of all raises where the caller has set one of them
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _precision:
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            with torch.autocast(queries.device.type, enabled=False):
                return queries @ documents.T
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision


def _finite(vectors: torch.Tensor, name: str, start: int) -> torch.Tensor:
    bad = (~torch.isfinite(vectors.sum(1))).nonzero()
    if len(bad):
        raise ValueError(f"{name}: vector {start + int(bad[0])} is NaN or Inf")
    return vectors
