import pytest
import torch
from conftest import synced_clock

from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import NORM_CASES, assert_parity

CASES = [c for c in NORM_CASES if c.bench] if torch.cuda.is_available() else [NORM_CASES[0]]
EPS = 1e-5


@pytest.mark.benchmark(timer=synced_clock, warmup=True)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("residual", [False, True], ids=["rms_norm", "add_rms_norm"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def bench_rms_norm(benchmark, case, residual, impl, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter is wrong in bf16
    x, other, weight = case.norm_inputs(device, dtype)
    name, args = ("add_rms_norm", (x, other, weight, EPS)) if residual else ("rms_norm", (x, weight, EPS))
    op, wanted = getattr(ops, name), getattr(reference, name)
    benchmark.group = f"{name} {case.name}"
    with ops.use_impl(impl):
        # no time without parity
        high = wanted(*(t.double() for t in args[:-1]), EPS)
        for got, lo, hi in zip(*map(_as_tuple, (op(*args), wanted(*args), high)), strict=True):
            assert_parity(case.name, got, lo, hi)
        benchmark(op, *args)
    benchmark.extra_info["GB/s"] = case.norm_bytes(dtype, residual) / benchmark.stats.stats.median / 1e9


def _as_tuple(result):
    return result if isinstance(result, tuple) else (result,)
