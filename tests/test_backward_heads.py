"""The gradients of a whole model with a head beside the latent one, as in test_backward.py.

Its CPU time in bf16 is spent there: these heads have no kernel of their own but the mean pool.
"""

import pytest
import torch
from whole_model import HEADS, assert_every_gradient_matches, head_name

DTYPES = (torch.float32, torch.float16, *[torch.bfloat16] * torch.cuda.is_available())


@pytest.mark.parametrize("head", HEADS[2:], ids=head_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_gradient_matches_the_reference(head, dtype, device):
    assert_every_gradient_matches(head, dtype, device)
