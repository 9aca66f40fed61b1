import pytest
import torch
from conftest import synced_clock

from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import ATTENTION_CASES, assert_parity

CASES = [c for c in ATTENTION_CASES if c.bench] if torch.cuda.is_available() else [ATTENTION_CASES[0]]


def _assert_parity(case, q, k, v, layout):
    # against the last key/value head alone: the float64 scores of all heads would not fit in memory
    group = case.num_heads // case.num_kv_heads
    part = q[:, -group:], k[:, -1:], v[:, -1:]
    got = ops.flash_attention(q, k, v, layout)[:, -group:]
    high = reference.flash_attention(*(t.double() for t in part), layout)
    assert_parity(case.name, got, reference.flash_attention(*part, layout), high)


@pytest.mark.benchmark(timer=synced_clock, warmup=True)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def bench_flash_attention(benchmark, case, impl, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter is wrong in bf16
    args = case.inputs(device, dtype)
    benchmark.group = f"flash_attention {case.name}"
    with ops.use_impl(impl):
        # no time without parity
        _assert_parity(case, *args)
        benchmark(ops.flash_attention, *args)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["TFLOP/s"] = case.flops() / seconds / 1e12
    benchmark.extra_info["GB/s"] = case.bytes_moved(dtype) / seconds / 1e9
