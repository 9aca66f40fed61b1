"""The gradients of a whole model.

Each kernel's own gradients are in its own test file, those of the other heads in test_backward_heads.py.
Training around the model is in test_training_hooks.py.
"""

import pytest
import torch
from whole_model import (
    EVERY_HEAD,
    HEADS,
    assert_every_gradient_matches,
    gradients_of,
    head_name,
    make_batch,
    make_model,
    oracle_of,
    slope_of,
)

from nvembed_fast.kernels.testing import generator


@pytest.mark.parametrize("head", HEADS[:2], ids=head_name)
def test_every_gradient_matches_the_reference(head, dtype, device):
    assert_every_gradient_matches(head, dtype, device)


@EVERY_HEAD
def test_every_gradient_is_the_slope_of_the_loss(head):
    """Finite differences along a random direction per weight, in float64.

    Elsewhere the oracle runs the model's own code, so that a path cut off in that code would go unseen.
    """
    model, batch = oracle_of(make_model(head)), make_batch()
    for name, gradient in gradients_of(model, batch, "torch").items():
        weight = model.get_parameter(name)
        direction = torch.randn(weight.shape, generator=generator(2), dtype=torch.float64)
        slope = slope_of(model, batch, weight, direction)
        assert slope.abs() > 1e-4, f"{name} does not matter, so this test would prove nothing"
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-8, msg=name)


def test_a_frozen_backbone_gets_no_gradient_and_changes_no_other(device):
    model, batch = make_model(device=device), make_batch(device)
    whole = gradients_of(model, batch, "triton")
    model.embedding_model.requires_grad_(False)
    part = gradients_of(model, batch, "triton")
    assert part.keys() == {name for name in whole if name.startswith("head.")}
    for name, gradient in part.items():
        assert torch.equal(gradient, whole[name]), name
