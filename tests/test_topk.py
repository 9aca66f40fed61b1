"""topk: equal to a full stable sort, ties included, whatever the tiles."""

import pytest
import torch

from nvembed_fast import topk as module
from nvembed_fast.topk import Best, topk


def vectors(num: int, seed: int) -> torch.Tensor:
    """Small integers: their products are exact in fp32, and many of them are equal."""
    return torch.randint(-2, 3, (num, 4), generator=torch.Generator().manual_seed(seed)).float()


def sorted_in_full(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    missing = k - min(k, scores.shape[1])
    values = torch.nn.functional.pad(values[:, :k], (0, missing), value=-torch.inf)
    indices = torch.nn.functional.pad(indices[:, :k], (0, missing), value=-1)
    return values, indices.masked_fill(values == -torch.inf, -1)


@pytest.fixture(params=[(1024, 8192), (3, 7), (1, 1), (5, 64)], ids=str)
def tiles(request, monkeypatch) -> None:
    for name, size in zip(("_QUERIES", "_DOCUMENTS"), request.param, strict=True):
        monkeypatch.setattr(module, name, size)


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize(("num_queries", "num_documents"), [(7, 33), (4, 3), (1, 64), (0, 5), (3, 0)])
def test_equals_a_stable_sort_of_all_scores(tiles, k, num_queries, num_documents):
    q, d = vectors(num_queries, 0), vectors(num_documents, 1)
    scores, indices = topk(q, d, k)
    wanted_scores, wanted_indices = sorted_in_full(q @ d.T, k)
    assert scores.dtype == torch.float32 and indices.dtype == torch.int64
    assert torch.equal(scores, wanted_scores) and torch.equal(indices, wanted_indices)


def test_only_the_asked_rows_are_looked_at(tiles):
    q, d = vectors(7, 0), vectors(33, 1)
    rows = torch.arange(1, 33, 3)
    assert all(map(torch.equal, topk(q, d, 5, rows=rows), topk(q, d[rows], 5)))
    ceilings = torch.tensor([-9.0, -2, -1, 0, 1, 2, 9])
    assert all(map(torch.equal, topk(q, d, 5, ceilings, rows), topk(q, d[rows], 5, ceilings)))


def test_there_are_ties_at_the_border():
    scores = vectors(7, 0) @ vectors(33, 1).T
    values, _ = sorted_in_full(scores, 6)
    assert (values[:, 4] == values[:, 5]).any(), "no tie, so the tests above would prove nothing"


def test_a_document_above_the_ceiling_is_passed_over(tiles):
    q, d = vectors(7, 2), vectors(33, 3)
    ceilings = torch.tensor([-9.0, -2, -1, 0, 1, 2, 9])
    scores = q @ d.T
    wanted = sorted_in_full(scores.masked_fill(scores > ceilings[:, None], -torch.inf), 5)
    assert all(map(torch.equal, topk(q, d, 5, ceilings), wanted))


@pytest.mark.parametrize(
    ("backend", "precision"), [(torch.backends.cuda.matmul, "tf32"), (torch.backends.mkldnn.matmul, "bf16")]
)
def test_a_precision_of_one_backend_stays_and_does_not_reach_the_scores(backend, precision):
    """torch then refuses to tell that of all."""
    before, q, d = backend.fp32_precision, torch.randn(4, 64), torch.randn(50, 64)
    wanted = topk(q, d, 3)
    backend.fp32_precision = precision
    try:
        assert all(map(torch.equal, topk(q, d, 3), wanted))
        assert backend.fp32_precision == precision
    finally:
        backend.fp32_precision = before


def test_scores_are_fp32_whatever_the_callers_precision():
    q, d = torch.randn(4, 64), torch.randn(50, 64)
    wanted = topk(q, d, 3)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = topk(q, d, 3)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(map(torch.equal, found, wanted))
    exact = (q.double() @ d.double().T).gather(1, wanted[1])
    assert (wanted[0] - exact).abs().max() < 1e-5


def test_the_scores_of_all_pairs_are_never_there(monkeypatch):
    sizes = []
    add = Best.add
    monkeypatch.setattr(Best, "add", lambda self, s, start: sizes.append(s.numel()) or add(self, s, start))
    topk(torch.randn(2500, 2), torch.randn(20000, 2), 3)
    assert max(sizes) == 1024 * 8192 and len(sizes) == 9


@pytest.mark.parametrize(
    ("q", "d", "k", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), 1, r"must be \[Q, D\] and \[N, D\], got \[2, 3\] and \[2, 4\]"),
        (torch.ones(3), torch.ones(2, 3), 1, r"got \[3\] and"),
        (torch.ones(2, 3), torch.ones(2, 3), 0, "k must be at least 1, got 0"),
        (torch.ones(2, 3), torch.tensor([[1.0] * 3, [torch.nan] * 3]), 1, "documents: vector 1 is NaN"),
        (torch.tensor([[torch.inf] * 3]), torch.ones(2, 3), 1, "queries: vector 0 is NaN or Inf"),
    ],
)
def test_bad_input_is_named(q, d, k, message):
    with pytest.raises(ValueError, match=message):
        topk(q, d, k)
