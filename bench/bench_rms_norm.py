import pytest
import torch
from conftest import DIRECTIONS, both, check, step, synced_clock

from nvembed_fast import ops
from nvembed_fast.kernels.testing import NORM_CASES

CASES = [c for c in NORM_CASES if c.bench] if torch.cuda.is_available() else [NORM_CASES[0]]
EPS = 1e-5


@pytest.mark.benchmark(timer=synced_clock, warmup=True)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@DIRECTIONS
@pytest.mark.parametrize("residual", [False, True], ids=["rms_norm", "add_rms_norm"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def bench_rms_norm(benchmark, case, residual, backward, impl, device, dtype):
    x, other, weight = case.norm_inputs(device, dtype)
    name, tensors = ("add_rms_norm", [x, other, weight]) if residual else ("rms_norm", [x, weight])
    op, wanted = both(name, EPS)
    benchmark.group = f"{name} {case.name}"
    with ops.use_impl(impl):
        check(case.name, op, wanted, tensors, backward)
        benchmark(step(op, tensors, backward))
    moved = case.norm_bytes(dtype, residual, backward)
    benchmark.extra_info["GB/s"] = moved / benchmark.stats.stats.median / 1e9
