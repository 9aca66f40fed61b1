import pytest
import torch
from conftest import synced_clock

from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import GATED_CASES, assert_parity

CASES = [c for c in GATED_CASES if c.bench] if torch.cuda.is_available() else [GATED_CASES[0]]


@pytest.mark.benchmark(timer=synced_clock, warmup=True)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def bench_gated(benchmark, case, name, impl, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter is wrong in bf16
    x = case.gated_input(device, dtype)
    op, wanted = getattr(ops, name), getattr(reference, name)
    benchmark.group = f"{name} {case.name}"
    with ops.use_impl(impl):
        # no time without parity
        assert_parity(case.name, op(x), wanted(x), wanted(x.double()))
        benchmark(op, x)
    benchmark.extra_info["GB/s"] = case.gated_bytes(dtype) / benchmark.stats.stats.median / 1e9
