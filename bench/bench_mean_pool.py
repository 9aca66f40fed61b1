import pytest
import torch
from conftest import synced_clock

from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import POOL_CASES, assert_parity

CASES = [c for c in POOL_CASES if c.bench] if torch.cuda.is_available() else [POOL_CASES[1]]


@pytest.mark.benchmark(timer=synced_clock, warmup=True)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", ["mean_pool", "mean_pool_geglu"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def bench_mean_pool(benchmark, case, name, impl, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter is wrong in bf16
    geglu = name == "mean_pool_geglu"
    args = case.inputs(device, dtype, geglu=geglu)
    op, wanted = getattr(ops, name), getattr(reference, name)
    benchmark.group = f"{name} {case.name}"
    with ops.use_impl(impl):
        # no time without parity
        assert_parity(case.name, op(*args), wanted(*args), wanted(args[0].double(), *args[1:]))
        benchmark(op, *args)
    benchmark.extra_info["GB/s"] = case.bytes_moved(dtype, geglu) / benchmark.stats.stats.median / 1e9
