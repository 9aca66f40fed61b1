"""What the caller has set around an operation: transforms of torch.func, forward mode, checkpointing.

An operation asks here before it does what such a caller must not see.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["is_transformed", "own_graph"]


def is_transformed() -> bool:
    """Whether forward mode or a transform of torch.func is at work, outside of torch.compile.

    Registered operations have no rules for them, and `requires_grad` tells of the innermost alone.
    """
    return not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    )


@contextmanager
def own_graph() -> Iterator[None]:
    """Inside, autograd records, and neither modes nor hooks of the caller see what it does.

    A checkpointed layer counts or keeps what is computed in it. When it runs again, a check is not repeated.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        _disable_current_modes(),
    ):
        yield
