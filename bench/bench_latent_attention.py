import pytest
import torch
from conftest import DIRECTIONS, both, check, step, synced_clock

from nvembed_fast import ops
from nvembed_fast.kernels.testing import LATENT_CASES

CASES = [c for c in LATENT_CASES if c.bench] if torch.cuda.is_available() else [LATENT_CASES[1]]


@pytest.mark.benchmark(timer=synced_clock, warmup=True)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@DIRECTIONS
@pytest.mark.parametrize("form", ["direct", "absorbed"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def bench_latent_attention(benchmark, case, form, backward, impl, device, dtype):
    args = getattr(case, f"{form}_inputs")(device, dtype)
    name = "latent_attention" if form == "direct" else "absorbed_latent_attention"
    tensors = [t for t in args if torch.is_tensor(t)]
    rest = args[len(tensors) :]
    op, wanted = both(name, *rest)
    benchmark.group = f"{name} {case.name}"
    with ops.use_impl(impl):
        check(case.name, op, wanted, tensors, backward)
        benchmark(step(op, tensors, backward))
    flops = getattr(case, f"{form}_flops")(backward)
    benchmark.extra_info["TFLOP/s"] = flops / benchmark.stats.stats.median / 1e12
