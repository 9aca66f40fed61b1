import pytest
import torch
from conftest import synced_clock

from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import ROTARY_CASES, assert_parity

CASES = [c for c in ROTARY_CASES if c.bench] if torch.cuda.is_available() else [ROTARY_CASES[0]]


@pytest.mark.benchmark(timer=synced_clock, warmup=True)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def bench_rotary(benchmark, case, inplace, impl, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter is wrong in bf16
    args = qkv, cos, sin, positions, num_rotated = case.inputs(device, dtype)
    benchmark.group = f"rotary {case.name} {'in place' if inplace else 'copy'}"
    with ops.use_impl(impl):
        # no time without parity
        high = reference.rotary(qkv.double(), cos.double(), sin.double(), positions, num_rotated)
        low = reference.rotary(*args)
        assert_parity(case.name, ops.rotary(qkv.clone(), *args[1:], inplace=inplace), low, high)
        # in place it turns the same heads again and again, which keeps their length
        benchmark(ops.rotary, *args, inplace=inplace)
    benchmark.extra_info["GB/s"] = case.bytes_moved(dtype, inplace) / benchmark.stats.stats.median / 1e9
