"""Batches that make every kernel compile that a model can need, for `NVEmbed.warm_up`.

A kernel is compiled for its constants, not for the number of texts. What differs between batches is the class
of the longest text, whether it is cut into several tiles by the mean, whether a token is dropped, and whether
gradients are recorded.
"""

from collections.abc import Iterator

import numpy as np
import torch

from nvembed_fast.packing import PackedBatch

__all__ = ["batches"]

# one text of each class of attention's tiles, and one beyond a tile of the mean beside a short one
LENGTHS = ((1,), (16,), (32,), (64,), (128,), (600, 5))


def batches(device: torch.device, max_positions: int) -> Iterator[PackedBatch]:
    """Small batches, with dropped tokens and without.

    Args:
        device: of the model.
        max_positions: no text is longer.
    """
    for lengths in LENGTHS:
        for first_pooled in (0, 1):
            ids = [np.zeros(min(n, max_positions), dtype=np.int64) for n in lengths]
            yield PackedBatch.from_ids(ids, [min(first_pooled, len(i) - 1) for i in ids], device)
