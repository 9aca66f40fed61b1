import torch
from test_loss import problem
from two_ranks import ROOT, run_on_two_ranks

from nvembed_fast.training.gather import gathered_loss
from nvembed_fast.training.loss import contrastive_loss


def test_without_ranks_it_is_the_loss():
    q, d, c = problem(5, 2, 16)
    options = {"temperature": 0.05, "both_directions": True}
    assert torch.equal(gathered_loss(q, d, c, **options).loss, contrastive_loss(q, d, c, **options).loss)


def test_two_ranks_get_the_loss_of_one():
    said = run_on_two_ranks(ROOT / "tests" / "gathered_loss.py", timeout=120)
    assert said.count("equal on rank") == 2
