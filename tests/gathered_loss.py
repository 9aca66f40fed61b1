"""One rank of `test_two_ranks_get_the_loss_of_one`: torchrun gathered_loss.py."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_loss import PRIVATE, problem
from two_ranks import leave, say

from nvembed_fast.training.auxiliary_losses import candidate_distillation
from nvembed_fast.training.gather import gathered_distillation, gathered_loss
from nvembed_fast.training.loss import Candidates, contrastive_loss


def check(rank: int, ranks: int, scopes: str, both_directions: bool) -> None:
    q, d, c = problem(7, 2, 24, scopes)
    options = {"temperature": 0.2, "limit": 0.95, "both_directions": both_directions}
    q, d = (t.float().requires_grad_() for t in (q, d))
    teacher = torch.randn(len(q) + len(d), 9, generator=torch.Generator().manual_seed(1))
    c = replace(c, teacher_queries=teacher[: len(q)], teacher_documents=teacher[len(q) :])
    wanted = contrastive_loss(q, d, c, **options)
    wanted.loss.backward()

    # unequal numbers of rows, columns and keys
    rows = list(range(2)) if rank == 0 else list(range(2, 7))
    columns = [j for j in range(len(d)) if int(c.column_scopes[j, 1]) - PRIVATE in rows]
    q_here, d_here = (t.detach()[here].requires_grad_() for t, here in ((q, rows), (d, columns)))
    own = c.part(rows, columns)
    # a rank knows as many keys as its own rows have
    own = replace(own, row_keys=own.row_keys[:, : int((own.row_keys != 0).sum(1).max())])
    own = replace(own, column_keys=F.pad(own.column_keys, (0, rank)))
    got = gathered_loss(q_here, d_here, own, **options)
    got.loss.backward()
    # as DDP does
    mean = got.loss.detach() / ranks
    dist.all_reduce(mean)
    torch.testing.assert_close(mean, wanted.loss.detach(), rtol=1e-6, atol=0)
    for name, ours, whole in (("q", q_here, q.grad[rows]), ("d", d_here, d.grad[columns])):
        distance = (ours.grad / ranks - whole).norm() / whole.norm()
        assert distance < 1e-6, f"{name} {scopes} {both_directions}: {distance}"

    q.grad = d.grad = q_here.grad = d_here.grad = None
    temperatures = {"temperature": 0.2, "teacher_temperature": 0.3}
    whole = candidate_distillation(q, d, c, **temperatures)
    whole.backward()
    part = gathered_distillation(q_here, d_here, own, **temperatures) * len(rows) / len(q)
    part.backward()
    mean = part.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean, whole.detach(), rtol=1e-6, atol=1e-7)
    for name, ours, theirs in (("q", q_here, q.grad[rows]), ("d", d_here, d.grad[columns])):
        distance = (ours.grad - theirs).norm() / theirs.norm()
        assert distance < 2e-6, f"distillation: {name} {scopes}: {distance}"
    for name in ("loss", "accuracy", "hard_negative_wins", "rows_without_negatives"):
        torch.testing.assert_close(got.metrics[name], wanted.metrics[name], rtol=1e-5, atol=1e-6, msg=name)


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for scopes in ("everybody", "mixed", "own"):
        for both_directions in (False, True):
            check(rank, ranks, scopes, both_directions)
    q, d, c = problem(3, 2, 8)
    rows = [[], [0, 1, 2]][rank]
    none = torch.zeros(0, 2, dtype=torch.int64)
    c = c if rows else Candidates(none, c.row_scopes[:0], c.column_scopes, c.row_keys[:0], c.column_keys)
    with pytest.raises(ValueError, match="every rank must have rows, got none on rank 0"):
        gathered_loss(q[rows], d, c, temperature=0.1)
    say(f"equal on rank {rank}")
    leave()


if __name__ == "__main__":
    main()
