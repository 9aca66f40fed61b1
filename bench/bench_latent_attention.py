import pytest
import torch
from conftest import synced_clock

from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import LATENT_CASES, assert_parity

CASES = [c for c in LATENT_CASES if c.bench] if torch.cuda.is_available() else [LATENT_CASES[1]]


@pytest.mark.benchmark(timer=synced_clock, warmup=True)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("form", ["direct", "absorbed"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def bench_latent_attention(benchmark, case, form, impl, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter is wrong in bf16
    args = getattr(case, f"{form}_inputs")(device, dtype)
    name = "latent_attention" if form == "direct" else "absorbed_latent_attention"
    op, wanted = getattr(ops, name), getattr(reference, name)
    benchmark.group = f"{name} {case.name}"
    with ops.use_impl(impl):
        # no time without parity
        high = wanted(*(t.double() if torch.is_tensor(t) else t for t in args))
        assert_parity(case.name, op(*args), wanted(*args), high)
        benchmark(op, *args)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["TFLOP/s"] = getattr(case, f"{form}_flops")() / seconds / 1e12
