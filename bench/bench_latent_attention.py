import pytest
import torch
from conftest import synced_clock

from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import LATENT_CASES, assert_parity, generator

CASES = [c for c in LATENT_CASES if c.bench] if torch.cuda.is_available() else [LATENT_CASES[1]]


def _parts(case, form, device):
    """(tensors, what follows them, the operation, its reference)."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter is wrong in bf16
    args = getattr(case, f"{form}_inputs")(device, dtype)
    name = "latent_attention" if form == "direct" else "absorbed_latent_attention"
    tensors = [t for t in args if torch.is_tensor(t)]
    return tensors, args[len(tensors) :], getattr(ops, name), getattr(reference, name)


@pytest.mark.benchmark(timer=synced_clock, warmup=True)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("form", ["direct", "absorbed"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def bench_latent_attention(benchmark, case, form, impl, device):
    tensors, rest, op, wanted = _parts(case, form, device)
    benchmark.group = f"{op.__name__} {case.name}"
    with ops.use_impl(impl):
        # no time without parity
        high = wanted(*(t.double() for t in tensors), *rest)
        assert_parity(case.name, op(*tensors, *rest), wanted(*tensors, *rest), high)
        benchmark(op, *tensors, *rest)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["TFLOP/s"] = getattr(case, f"{form}_flops")() / seconds / 1e12


@pytest.mark.benchmark(timer=synced_clock, warmup=True)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("form", ["direct", "absorbed"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def bench_latent_attention_with_backward(benchmark, case, form, impl, device):
    tensors, rest, op, wanted = _parts(case, form, device)
    shape = tensors[0 if form == "direct" else 3].shape
    upstream = torch.randn(shape, generator=generator(1)).to(device, tensors[0].dtype)

    def gradients(function, dtype=upstream.dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*leaves, *rest), leaves, upstream.to(dtype))

    benchmark.group = f"{op.__name__} with backward {case.name}"
    with ops.use_impl(impl):
        # no time without parity
        for got, low, high in zip(
            gradients(op), gradients(wanted), gradients(wanted, torch.float64), strict=True
        ):
            assert_parity(case.name, got, low, high)
        benchmark(gradients, op)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["TFLOP/s"] = getattr(case, f"{form}_flops")(backward=True) / seconds / 1e12
