"""The contrastive loss against float64 autograd over whole matrices, written another way."""

import itertools
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from nvembed_fast import ops
from nvembed_fast.training.loss import Candidates, contrastive_loss, matryoshka_loss

PRIVATE = 2**32
SCOPES = ("everybody", "sets", "own", "mixed")
LIMITS = ({}, {"limit": 0.95}, {"margin": 0.05}, {"limit": 1.3, "margin": -0.2})


@cache
def problem(num_rows, num_hard, width, scopes="everybody", duplicates=True, seed=0):
    """(queries, documents, candidates) in float64: 1 to 3 positives and some hard negatives to each row.

    With duplicates a positive of row 0 stands again among the positives of row 3 and the columns of row 4,
    and row 6 has its query. Half of the rows of "mixed" see their own candidates only, the others
    those of their set.
    """
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(num_rows, width, generator=g, dtype=torch.float64)
    noise = lambda: torch.randn(width, generator=g, dtype=torch.float64)  # noqa: E731
    row_scopes = {
        "everybody": [0] * num_rows,
        "sets": [1 + i % 2 for i in range(num_rows)],
        "own": [PRIVATE + i for i in range(num_rows)],
        "mixed": [PRIVATE + i if i % 2 else 1 + i % 3 for i in range(num_rows)],
    }[scopes]
    documents, owners, pairs = [], [], []
    keys = [[10**6 + (i if i != 6 or not duplicates else 0)] for i in range(num_rows)]
    column_keys = []
    for i in range(num_rows):
        for is_positive in [True] * (1 + i % 3) + [False] * num_hard:
            pull = 1.0 if is_positive else 0.4
            document, key = pull * q[i] + noise(), 1 + len(documents)
            if duplicates and i in (3, 4) and len(documents) and owners[-1] != i:
                document, key = documents[0], 1
            if is_positive:
                pairs.append((i, len(documents)))
                keys[i].append(key)
            documents.append(document)
            owners.append(i)
            column_keys.append((key, keys[i][0] if is_positive else 0))
    shared = [row_scopes[i] if row_scopes[i] < PRIVATE else -1 for i in owners]
    padded = [k + [0] * (4 - len(k)) for k in keys]
    candidates = Candidates(
        torch.tensor(pairs),
        torch.tensor(row_scopes),
        torch.tensor([(s, PRIVATE + i) for s, i in zip(shared, owners, strict=True)]),
        torch.tensor(padded),
        torch.tensor(column_keys),
    )
    return q, torch.stack(documents), candidates


def oracle(q, d, c, temperature, limit=None, margin=None, both_directions=False, cosines=None):
    """The loss by one softmax for each pair, with Python's own loops over the masks."""
    s = F.normalize(q, dim=1) @ F.normalize(d, dim=1).mT if cosines is None else cosines
    positives = c.positives.tolist()

    def is_negative(i, j):
        shares = int(c.row_scopes[i]) in c.column_scopes[j].tolist()
        return shares and not {*c.column_keys[j].tolist()} & {*c.row_keys[i].tolist()} - {0}

    def pair_loss(positive, negatives, lowest):
        bound = lowest.detach()
        if limit is not None:
            negatives = [n for n in negatives if n <= bound - (1 - limit) * bound.abs()]
        if margin is not None:
            negatives = [n for n in negatives if n <= bound - margin]
        return -F.log_softmax(torch.stack([positive, *negatives]) / temperature, dim=0)[0]

    losses = []
    for i in range(len(q)):
        own = [j for row, j in positives if row == i]
        negatives = [s[i, j] for j in range(len(d)) if is_negative(i, j)]
        lowest = torch.stack([s[i, j] for j in own]).min()
        terms = [pair_loss(s[i, j], negatives, lowest) for j in own]
        if both_directions:
            for n, j in enumerate(own):
                negatives = [s[k, j] for k in range(len(q)) if is_negative(k, j)]
                lowest = torch.stack([s[row, j] for row, column in positives if column == j]).min()
                terms[n] = (terms[n] + pair_loss(s[i, j], negatives, lowest)) / 2
        losses.append(torch.stack(terms).mean() * (1 if c.weights is None else c.weights[i]))
    return torch.stack(losses).mean()


def loss_of(q, d, c, **options):
    return contrastive_loss(q, d, c, **options).loss


def value_and_gradients(loss, q, d, dtype):
    q, d = (t.detach().to(dtype).requires_grad_() for t in (q, d))
    value = loss(q, d)
    value.backward()
    return [value.detach().double(), q.grad.double(), d.grad.double()]


def distances(got, wanted):
    return [((g - w).norm() / w.norm().clamp_min(1e-12)).item() for g, w in zip(got, wanted, strict=True)]


@pytest.mark.parametrize(
    "dtype, temperature, bound",
    [(torch.float32, 0.2, 1e-6), (torch.float64, 0.02, 1e-8)],
    ids=["fp32", "fp64"],
)
@pytest.mark.parametrize("both_directions", [False, True], ids=["queries", "both"])
@pytest.mark.parametrize("scopes", SCOPES)
def test_gradients_are_those_of_float64_autograd(scopes, both_directions, dtype, temperature, bound):
    """Over duplicates, 1 to 3 positives, 0 to 7 hard negatives, scopes and limits.

    In fp32 the rounding of a cosine is divided by the temperature: see the test of the precision for 0.02.
    The float64 bound is the oracle's own cancellation in losses near 0.
    """
    grid = list(itertools.product((0, 2, 7), (False, True), LIMITS))
    for num_hard, duplicates, bounds in grid:
        q, d, c = problem(7, num_hard, 24, scopes, duplicates)
        q, d = q.to(dtype).double(), d.to(dtype).double()
        options = {"temperature": temperature, "both_directions": both_directions, **bounds}
        wanted = value_and_gradients(partial(oracle, c=c, **options), q, d, torch.float64)
        got = value_and_gradients(partial(loss_of, c=c, **options), q, d, dtype)
        assert max(distances(got, wanted)) < bound, (num_hard, duplicates, bounds)


def test_the_grid_meets_every_rule():
    """Otherwise the test above would prove nothing of it."""
    q, d, c = problem(7, 7, 24, "mixed")
    metrics = contrastive_loss(q, d, c, temperature=0.05, limit=0.95).metrics
    assert 0 < metrics["masked_by_scope"] < 1 and 0 < metrics["masked_by_limit"] < 1
    shares = [contrastive_loss(*problem(7, 7, 24, "sets", n), temperature=1).metrics for n in (False, True)]
    assert 0 < shares[0]["masked_by_key"] < shares[1]["masked_by_key"] and not shares[0]["masked_by_limit"]
    assert c.positives[:, 0].bincount().max() == 3


def test_with_one_positive_and_no_mask_it_is_cross_entropy():
    q, d, c = problem(9, 3, 24, duplicates=False)
    own = torch.arange(9)
    c = replace(c, positives=torch.stack([own, own], 1), row_keys=1 + own[:, None])
    logits = F.normalize(q, dim=1) @ F.normalize(d, dim=1).mT / 0.02
    assert torch.allclose(contrastive_loss(q, d, c, temperature=0.02).loss, F.cross_entropy(logits, own))
    d, logits = d[:9], logits[:, :9]
    c = replace(c, column_scopes=c.column_scopes[:9], column_keys=c.column_keys[:9])
    both = contrastive_loss(q, d, c, temperature=0.02, both_directions=True).loss
    assert torch.allclose(both, (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2)


@pytest.mark.parametrize("both_directions", [False, True])
def test_a_row_without_negatives_has_no_loss_and_no_gradient(both_directions):
    q, d, c = problem(6, 0, 16, "own")
    loss = partial(loss_of, c=c, temperature=0.02, both_directions=both_directions)
    values = value_and_gradients(loss, q, d, torch.float32)
    assert all(not v.any() for v in values)
    metrics = contrastive_loss(q, d, c, temperature=0.02).metrics
    assert metrics["rows_without_negatives"] == 1 and metrics["accuracy"] == 1
    assert metrics["negative_cosine"] == metrics["hard_negative_wins"] == 0


def test_two_runs_give_the_same_bits():
    q, d, c = problem(7, 7, 24, "mixed")
    loss = partial(loss_of, c=c, temperature=0.02, limit=0.95, both_directions=True)
    run = partial(value_and_gradients, loss, q, d, torch.float32)
    assert all(map(torch.equal, run(), run()))


def test_the_chunks_of_rows_change_nothing(monkeypatch):
    q, d, c = problem(7, 7, 24, "mixed")
    loss = partial(loss_of, c=c, temperature=0.05, limit=0.95)
    run = partial(value_and_gradients, loss, q, d, torch.float64)
    whole = run()
    monkeypatch.setattr("nvembed_fast.kernels.reference._MAX_SCORES", 3 * len(d))
    assert max(distances(run(), whole)) < 1e-13


def test_other_rows_do_not_move_a_row_with_its_own_candidates():
    q, d, c = problem(6, 3, 24, "mixed")
    losses = []
    for noise in (0.0, 1.0):
        own = c.positives[c.positives[:, 0] == 1, 1].tolist() + [
            j for j in range(len(d)) if _owner(c, j) == 1
        ]
        moved = torch.randn(d.shape, generator=torch.Generator().manual_seed(1), dtype=d.dtype) * noise
        moved[own] = 0
        only = replace(c, weights=(torch.arange(6) == 1).float())
        losses.append(contrastive_loss(q.float(), (d + moved).float(), only, temperature=0.02).loss.item())
    assert abs(losses[0] - losses[1]) <= 1e-6 < losses[0]


def _owner(c, column):
    return int(c.column_scopes[column, 1]) - PRIVATE


def test_a_mixed_batch_is_its_parts_computed_apart():
    q, d, c = problem(8, 3, 24, "mixed")
    whole = contrastive_loss(q, d, c, temperature=0.05).loss
    parts = 0.0
    for rows in (
        [i for i in range(8) if i % 2],
        *([i for i in range(8) if i % 2 == 0 and i % 3 == s] for s in range(3)),
    ):
        columns = [j for j in range(len(d)) if _owner(c, j) in rows]
        part = c.part(rows, columns)
        parts += len(rows) * contrastive_loss(q[rows], d[columns], part, temperature=0.05).loss
    assert abs(whole - parts / 8) < 1e-12


def test_weights_scale_rows():
    q, d, c = problem(7, 2, 24)
    weights = torch.linspace(0.0, 2.0, 7)
    got = contrastive_loss(q, d, replace(c, weights=weights), temperature=0.05)
    assert abs(got.loss - oracle(q, d, replace(c, weights=weights), 0.05)) < 1e-12


def test_metrics_of_known_cosines():
    """Three rows at cosines that are written out."""
    q = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    d = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.6, 0.8], [-1.0, 0.0]])
    c = Candidates(
        torch.tensor([(0, 0), (1, 1), (2, 2)]),
        torch.tensor([0, 0, 7]),
        torch.tensor([(0, -1), (0, -1), (0, 7), (0, -1)]),
        torch.tensor([[1, 0], [2, 1], [3, 0]]),
        1 + torch.arange(4)[:, None],
    )
    m = {k: v.item() for k, v in contrastive_loss(q, d, c, temperature=0.1, margin=0.0).metrics.items()}
    wanted = {
        # row 0 keeps 0, .6 and -1 below its 1. Row 1 keeps -1 below its 0. Row 2 sees its positive alone
        "accuracy": 1.0,
        "positive_cosine": (1.0 + 0.0 + 0.8) / 3,
        "negative_cosine": (0.0 + 0.6 - 1.0 - 1.0) / 4,
        "hard_negative_wins": 0.0,
        "masked_by_scope": 3 / 12,
        "masked_by_key": 4 / 9,
        "masked_by_limit": 1 / 9,
        "rows_without_negatives": 1 / 3,
    }
    assert m.pop("loss") > 0
    assert m == pytest.approx(wanted, abs=1e-6)
    m = contrastive_loss(q, d, c, temperature=0.1).metrics
    assert m["hard_negative_wins"] == pytest.approx(1 / 3) and m["accuracy"] == pytest.approx(2 / 3)


def test_vectors_of_any_length_count_as_directions():
    q, d, c = problem(7, 2, 24)
    assert torch.allclose(*(contrastive_loss(f * q, 3 * f * d, c, temperature=0.02).loss for f in (1, 8)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive and finite, got nan"),
        ({"limit": float("inf")}, "limit must be finite, got inf"),
        (
            {"row_scopes": torch.zeros(3, dtype=torch.int64)},
            r"row_scopes must be \[7\] torch.int64, got \[3\]",
        ),
        (
            {"row_keys": torch.zeros(7, 1)},
            r"row_keys must be \[7, 1\] torch.int64, got \[7, 1\] torch.float32",
        ),
        ({"weights": torch.ones(7).double()}, r"weights must be \[7\] torch.float32"),
        ({"positives": torch.zeros(0, 2, dtype=torch.int64)}, "name each of the 7 rows"),
        ({"positives": torch.tensor([(0, 99)])}, "positives must name columns from 0 to 26, got others"),
        ({"row_keys": torch.full((7, 1), 5)}, "row 0 lacks one"),
        ({"row_keys": torch.zeros(7, 1).long(), "column_keys": torch.zeros(27, 1).long()}, "row 0 lacks one"),
    ],
)
def test_rejects(change, message):
    q, d, c = problem(7, 2, 24)
    options = {"temperature": 0.02} | {k: v for k, v in change.items() if k in ("temperature", "limit")}
    c = replace(c, **{k: v for k, v in change.items() if k not in options})
    with pytest.raises(ValueError, match=message):
        contrastive_loss(q, d, c, **options)


def _rounding(masked_lse):
    """The planted fault: scores as a product of bf16 rounds them."""

    def rounded(q, d, *masks):
        *masks, limits, scale = masks
        scores = (scale * (q.bfloat16() @ d.bfloat16().mT)).bfloat16().to(q.dtype)
        # masks of the test drop the diagonal alone
        scores = scores.masked_fill(torch.eye(*scores.shape, dtype=torch.bool), -torch.inf)
        return scores.logsumexp(1), *masked_lse(q, d, *masks, limits, scale)[1:]

    return rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("planted", [False, True], ids=["honest", "scores in bf16"])
def test_under_autocast_the_gradient_stays_within_5e_3_of_float64(planted, dtype, monkeypatch):
    """At temperature 0.02 and NV-Embed's width. Scores in bf16 are off by ten times that."""
    g = torch.Generator().manual_seed(0)
    noise = lambda rows: torch.randn(rows, 4096, generator=g)  # noqa: E731
    # as trained vectors: cosines of 0.5 to 0.7, because all share a direction
    common, topics = noise(1), noise(64)
    q = (common + 0.5 * topics + 0.5 * noise(64)).to(dtype)
    d = (common + 0.5 * topics.repeat(2, 1) + 0.5 * noise(128)).to(dtype)
    own = torch.arange(64)
    c = Candidates(
        torch.stack([own, own], 1),
        torch.zeros(64, dtype=torch.int64),
        torch.zeros(128, 2, dtype=torch.int64),
        1 + own[:, None],
        1 + torch.arange(128)[:, None],
    )
    loss = partial(loss_of, c=c, temperature=0.02)
    wanted = value_and_gradients(loss, q.double(), d.double(), torch.float64)
    if planted:
        monkeypatch.setattr("nvembed_fast.ops.masked_lse", _rounding(ops.masked_lse))
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradients(loss, q, d, dtype)
    error = max(distances(got, wanted)[1:])
    assert (error > 2e-2) if planted else (error < 5e-3)


def test_a_limit_is_below_the_lowest_positive_also_when_it_is_negative():
    """lowest * 0.95 would lie above a negative cosine."""
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    d = torch.tensor([[-0.8, 0.6], [0.0, 1.0], [-0.79, 0.6131]])
    c = Candidates(
        torch.tensor([(0, 0), (1, 1)]),
        torch.tensor([0, 9]),
        torch.tensor([(0, -1), (9, -1), (0, -1)]),
        torch.tensor([[1], [2]]),
        torch.tensor([[1], [2], [3]]),
    )
    kept = [
        contrastive_loss(q, d, c, temperature=0.1, limit=share).metrics["negative_cosine"]
        for share in (0.95, 1.05)
    ]
    assert kept[0] == 0 and kept[1] == pytest.approx(-0.79, abs=1e-4)


def test_metrics_know_the_lowest_positive():
    """A row with cosines 0.9 and 0.1 to its positives and 0.5 to a negative."""
    q = torch.tensor([[1.0, 0.0]])
    angles = torch.tensor([0.9, 0.1, 0.5]).acos()
    d = torch.stack([angles.cos(), angles.sin()], 1)
    zero = torch.zeros(3, 2, dtype=torch.int64)
    c = Candidates(
        torch.tensor([(0, 0), (0, 1)]), zero[0, :1], zero, torch.tensor([[1, 2]]), torch.arange(1, 4)[:, None]
    )
    metrics = contrastive_loss(q, d, c, temperature=0.1).metrics
    assert metrics["accuracy"] == metrics["hard_negative_wins"] == 1


def test_all_options_give_the_same_bits_under_autocast():
    q, d, c = problem(7, 2, 64)
    c = replace(c, weights=torch.linspace(0.5, 1.5, 7))
    loss = partial(loss_of, c=c, temperature=0.02, limit=0.95, both_directions=True)
    wanted = value_and_gradients(loss, q, d, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, value_and_gradients(loss, q, d, torch.float32), wanted))


def test_matryoshka_is_the_mean_over_cut_vectors():
    q, d, c = problem(7, 2, 24)
    got = matryoshka_loss(q, d, c, [24, 8], temperature=0.05)
    cut, whole = (contrastive_loss(q[:, :n], d[:, :n], c, temperature=0.05) for n in (8, 24))
    torch.testing.assert_close(got.loss, (cut.loss + whole.loss) / 2)
    assert got.metrics["accuracy"] == whole.metrics["accuracy"] and got.metrics["loss"] == got.loss
    for widths in ([], [0, 8], [25]):
        with pytest.raises(ValueError, match="widths must be from 1 to 24, got"):
            matryoshka_loss(q, d, c, widths, temperature=0.05)
