import pytest
import torch
from conftest import check, step, synced_clock

from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import ROTARY_CASES, assert_parity

CASES = [c for c in ROTARY_CASES if c.bench] if torch.cuda.is_available() else [ROTARY_CASES[0]]


@pytest.mark.benchmark(timer=synced_clock, warmup=True)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("way", ["inplace", "copy", "copy_with_backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def bench_rotary(benchmark, case, way, impl, device, dtype):
    qkv, cos, sin, *rest = case.inputs(device, dtype)
    inplace, backward = way == "inplace", way == "copy_with_backward"

    def op(x):
        return ops.rotary(x, cos, sin, *rest, inplace=inplace)

    def wanted(x):
        tables = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (cos, sin))
        return reference.rotary(x, *tables, *rest)

    benchmark.group = f"rotary {case.name} {way}"
    with ops.use_impl(impl):
        if inplace:
            assert_parity(case.name, op(qkv.clone()), wanted(qkv), wanted(qkv.double()))
        else:
            check(case.name, op, wanted, [qkv], backward)
        # in place it turns the same heads again and again, which keeps their length
        benchmark(step(op, [qkv], backward))
    moved = case.bytes_moved(dtype, inplace, backward)
    benchmark.extra_info["GB/s"] = moved / benchmark.stats.stats.median / 1e9
