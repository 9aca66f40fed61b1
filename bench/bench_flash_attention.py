import dataclasses

import pytest
import torch

from bench.conftest import DIRECTIONS
from bench.measure.comparison import Problem, Work
from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import ATTENTION_CASES, ATTENTION_CPU, ATTENTION_SWEEP, attention_gradients

GPU = [c for c in ATTENTION_CASES if c.bench] + list(ATTENTION_SWEEP)
# float64 scores of more would not fit in memory
PARITY_LENGTH = 8192


@pytest.mark.cases(gpu=GPU, cpu=ATTENTION_CPU, smallest=[ATTENTION_CASES[1]])
@DIRECTIONS
def bench_flash_attention(comparison, rivals, case, backward, device, dtype):
    def problem(case):
        *tensors, layout = case.inputs(device, dtype)

        def low(inputs, upstream):
            no_dlse = torch.zeros(case.num_heads, layout.num_tokens, device=device)
            return attention_gradients(inputs, (*upstream, no_dlse), layout)

        def wanted(*tensors):
            return reference.flash_attention(*tensors, layout)

        return Problem(
            tensors,
            ours=lambda *tensors: ops.flash_attention(*tensors, layout),
            reference=wanted,
            rivals=rivals.attention(wanted, layout, case.num_heads, case.num_kv_heads),
            low=low if dtype != torch.float32 else None,
        )

    work = Work(case.flops(backward), "TFLOP/s")
    comparison(
        "flash_attention", case.name, lambda: problem(case), work, backward, lambda: problem(_part(case))
    )


def _part(case):
    """The two longest sequences and one key/value head."""
    lengths = tuple(min(n, PARITY_LENGTH) for n in sorted(case.lengths)[-2:])
    group = case.num_heads // case.num_kv_heads
    return dataclasses.replace(case, lengths=lengths, num_heads=group, num_kv_heads=1)
