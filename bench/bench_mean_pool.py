import pytest
import torch
from conftest import DIRECTIONS, both, check, step, synced_clock

from nvembed_fast import ops
from nvembed_fast.kernels.testing import POOL_CASES

CASES = [c for c in POOL_CASES if c.bench] if torch.cuda.is_available() else [POOL_CASES[1]]


@pytest.mark.benchmark(timer=synced_clock, warmup=True)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@DIRECTIONS
@pytest.mark.parametrize("name", ["mean_pool", "mean_pool_geglu"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def bench_mean_pool(benchmark, case, name, backward, impl, device, dtype):
    geglu = name == "mean_pool_geglu"
    x, *rest = case.inputs(device, dtype, geglu=geglu)
    op, wanted = both(name, *rest)
    benchmark.group = f"{name} {case.name}"
    with ops.use_impl(impl):
        check(case.name, op, wanted, [x], backward)
        benchmark(step(op, [x], backward))
    moved = case.bytes_moved(dtype, geglu, backward)
    benchmark.extra_info["GB/s"] = moved / benchmark.stats.stats.median / 1e9
