"""The errors of every kernel; apart from `_common.py` because who catches them may have no Triton."""

import torch


class Unsupported(ValueError):
    """A well-posed problem that a kernel is not written for: impl="auto" takes the reference instead."""


def mismatch(name: str, wanted: str, got: torch.Tensor) -> ValueError:
    """The error that names the tensor, what it must be and what it is."""
    return ValueError(
        f"{name} must be {wanted}, got {tuple(got.shape)} {got.dtype} "
        f"with strides {got.stride()} on {got.device}"
    )
