import pytest
import torch
from conftest import DIRECTIONS, both, check, step, synced_clock

from nvembed_fast import ops
from nvembed_fast.kernels.testing import GATED_CASES

CASES = [c for c in GATED_CASES if c.bench] if torch.cuda.is_available() else [GATED_CASES[0]]


@pytest.mark.benchmark(timer=synced_clock, warmup=True)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@DIRECTIONS
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def bench_gated(benchmark, case, name, backward, impl, device, dtype):
    x = case.gated_input(device, dtype)
    op, wanted = both(name)
    benchmark.group = f"{name} {case.name}"
    with ops.use_impl(impl):
        check(case.name, op, wanted, [x], backward)
        benchmark(step(op, [x], backward))
    benchmark.extra_info["GB/s"] = case.gated_bytes(dtype, backward) / benchmark.stats.stats.median / 1e9
