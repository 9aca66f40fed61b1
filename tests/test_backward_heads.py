"""The gradients of a whole model with a head beside the latent one, as in test_backward.py."""

import pytest
from whole_model import HEADS, assert_every_gradient_matches, head_name


@pytest.mark.parametrize("head", HEADS[2:], ids=head_name)
def test_every_gradient_matches_the_reference(head, dtype, device):
    assert_every_gradient_matches(head, dtype, device)
