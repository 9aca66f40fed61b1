from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_loss import problem

from nvembed_fast.training.auxiliary_losses import (
    candidate_distillation,
    score_distillation,
    spread_out,
    vector_distillation,
)

PAIRS = torch.tensor([(0, 0), (0, 3), (0, 2), (2, 1), (2, 0), (3, 4)])


def vectors(rows, width=12, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_scores_are_compared_inside_each_row():
    q, d = vectors(4).requires_grad_(), vectors(5, seed=1).requires_grad_()
    teacher = torch.tensor([3.0, -1.0, 0.5, 9.0, 2.0, 4.0])
    got = score_distillation(q, d, PAIRS, teacher, temperature=0.05, teacher_temperature=2.0)
    cosines = F.normalize(q, dim=1) @ F.normalize(d, dim=1).mT
    wanted = 0.0
    for row in (0, 2, 3):
        own = PAIRS[PAIRS[:, 0] == row, 1]
        student = F.log_softmax(cosines[row, own] / 0.05, 0)
        target = F.softmax(teacher[PAIRS[:, 0] == row].double() / 2, 0)
        wanted = wanted + F.kl_div(student, target, reduction="sum") / 3
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(t, (q, d)) for t in (got, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scopes", ["everybody", "mixed", "own"])
def test_a_teachers_vectors_give_scores_inside_each_scope(scopes):
    q, d, candidates = problem(5, 2, 12, scopes)
    q, d = q.double().requires_grad_(), d.double().requires_grad_()
    of_rows, of_columns = vectors(5, 7, seed=2), vectors(len(d), 7, seed=3)
    candidates = replace(candidates, teacher_queries=of_rows.float(), teacher_documents=of_columns.float())
    got = candidate_distillation(q, d, candidates, temperature=0.05, teacher_temperature=0.1)
    student = F.normalize(q, dim=1) @ F.normalize(d, dim=1).mT / 0.05
    teacher = F.normalize(of_rows, dim=1) @ F.normalize(of_columns, dim=1).mT / 0.1
    wanted = 0.0
    for row, scope in enumerate(candidates.row_scopes.tolist()):
        own = [j for j, both in enumerate(candidates.column_scopes.tolist()) if scope in both]
        pair = F.log_softmax(student[row, own], 0), F.softmax(teacher[row, own], 0)
        wanted = wanted + F.kl_div(*pair, reduction="sum") / 5
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-9)
    for ours, theirs in zip(*(torch.autograd.grad(t, (q, d)) for t in (got, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


def test_a_student_that_is_its_teacher_has_no_loss():
    q, d = vectors(4), vectors(5, seed=1)
    own = (F.normalize(q, dim=1)[PAIRS[:, 0]] * F.normalize(d, dim=1)[PAIRS[:, 1]]).sum(1)
    same = score_distillation(q, d, PAIRS, own.float(), temperature=0.02, teacher_temperature=0.02)
    assert abs(same) < 1e-6
    assert score_distillation(q, d, PAIRS[-1:], own[-1:], temperature=0.02) == 0
    assert abs(vector_distillation(q, 7 * q)) < 1e-12


@pytest.mark.parametrize("rows", [5, 30])
def test_spread_is_the_mean_square_cosine(rows):
    v = vectors(rows).requires_grad_()
    cosines = F.normalize(v, dim=1) @ F.normalize(v, dim=1).mT
    wanted = cosines[~torch.eye(rows, dtype=torch.bool)].square().mean()
    torch.testing.assert_close(spread_out(v), wanted, rtol=1e-10, atol=0)
    assert spread_out(v[:1]) == 0


def test_everything_is_in_fp32_under_autocast():
    q, d = vectors(4).float(), vectors(5, seed=1).float()

    def run():
        scores = score_distillation(q, d, PAIRS, torch.arange(6.0), temperature=0.02)
        return scores, vector_distillation(q, d[:4]), spread_out(q)

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, run(), plain))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"teacher_temperature": float("inf")}, "teacher_temperature must be positive and finite, got inf"),
        ({"teacher_scores": torch.ones(5)}, r"must be \[S, 2\] and \[S\] with S > 0, got \[6, 2\] and \[5\]"),
        ({"pairs": PAIRS[:0], "teacher_scores": torch.ones(0)}, r"got \[0, 2\] and \[0\]"),
    ],
)
def test_rejects(change, message):
    options = {"pairs": PAIRS, "teacher_scores": torch.ones(6), "temperature": 0.02} | change
    with pytest.raises(ValueError, match=message):
        score_distillation(vectors(4), vectors(5), **options)


def test_a_teacher_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"teacher_vectors must be \[4, 12\] as the vectors, got \[4, 8\]"):
        vector_distillation(vectors(4), vectors(4, 8))
