import dataclasses

import pytest
import torch
from conftest import DIRECTIONS, both, check, step, synced_clock

from nvembed_fast import ops
from nvembed_fast.kernels.testing import ATTENTION_CASES, attention_gradients

CASES = [c for c in ATTENTION_CASES if c.bench] if torch.cuda.is_available() else [ATTENTION_CASES[1]]


@pytest.mark.benchmark(timer=synced_clock, warmup=True)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@DIRECTIONS
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def bench_flash_attention(benchmark, case, backward, impl, device, dtype):
    benchmark.group = f"flash_attention {case.name}"
    with ops.use_impl(impl):
        _check(case, backward, device, dtype)
        *tensors, layout = case.inputs(device, dtype)
        benchmark(step(both("flash_attention", layout)[0], tensors, backward))
    benchmark.extra_info["TFLOP/s"] = case.flops(backward) / benchmark.stats.stats.median / 1e12


def _check(case, backward, device, dtype):
    """Parity on two sequences and one key/value head: the float64 scores of all would not fit in memory."""
    group, longest = case.num_heads // case.num_kv_heads, tuple(sorted(case.lengths)[-2:])
    part = dataclasses.replace(case, lengths=longest, num_heads=group, num_kv_heads=1)
    *tensors, layout = part.inputs(device, dtype)

    def low(inputs, upstream):
        no_dlse = torch.zeros(group, layout.num_tokens, device=device)
        return attention_gradients(inputs, (*upstream, no_dlse), layout)

    op, wanted = both("flash_attention", layout)
    check(case.name, op, wanted, tensors, backward, low if dtype != torch.float32 else None)
