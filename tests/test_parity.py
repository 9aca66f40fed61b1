"""The tolerance itself: honest kernels of a GPU (tests/emulated_gpu.py) pass, and faults do not."""

import emulated_gpu
import pytest
import torch

from nvembed_fast.kernels import reference, testing
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.kernels.testing import (
    AttentionCase,
    LatentCase,
    ScoreCase,
    as_tuple,
    errors,
    gradients,
    honest,
    of_products,
    upstream_of,
)

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
LIMITED, PEAKED = ScoreCase("limited", 20, 70, 48, limited=True), ScoreCase("peaked", 40, 130, 64, peak=30.0)
NARROW, WIDE = ScoreCase("narrow", 5, 63, 16, masked=False), ScoreCase("wide", 20, 40, 700)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Results of the CPU count as those of a GPU."""
    monkeypatch.setattr(testing, "_is_fp32_of_a_gpu", lambda t: t is not None and t.dtype == FULL)


def _share(results) -> float:
    """The largest error of (got, low, high)s, as a share of its bound."""
    return max(e / bound for one in results for _, e, bound in errors("share", *one))


def _cublas(a, b):
    """A product as exact as eager PyTorch can be, so that eager does not widen the bound."""
    return emulated_gpu.fp32(a.double() @ b.double().mT)


def _scores(case, dtype, seed=0, **faults):
    """(got, low, high) of lse, highest and total, where a row keeps something."""
    q, d, *rest = case.inputs("cpu", dtype, seed)

    def exact(q, d):
        return reference.masked_lse(q, d, *rest)[:3]

    got, eager = (
        emulated_gpu.masked_lse(q, d, *rest, seed=seed, **how) for how in (faults, {"product": _cublas})
    )
    high, low = exact(q.double(), d.double()), honest(exact, (q, d))
    kept = high[0].isfinite()
    return [
        (g[kept], [e[kept], lows[1][kept]], h[kept])
        for g, e, lows, h in zip(got, eager, low, high, strict=True)
    ]


def _score_gradients(case, seed=0, **faults):
    q, d, *rest = case.inputs("cpu", FULL, seed)
    (dlse,) = upstream_of([q[:, 0]], seed)

    def exact(q, d):
        return tuple(gradients(lambda q, d: reference.masked_lse(q, d, *rest)[0], (q, d), [dlse])[1])

    got, eager = (
        emulated_gpu.masked_lse_gradients(q, d, *rest, dlse=dlse, seed=seed, **how)
        for how in (faults, {"product": _cublas})
    )
    low, high = honest(exact, (q, d)), exact(q.double(), d.double())
    return [(g, [e, lows[1]], h) for g, e, lows, h in zip(got, eager, low, high, strict=True)]


def _attention(case, dtype, seed=0, shift=0.0, **faults):
    """(got, low, high) of the output, the lse and the gradients of one head: in 16 bits of the lse alone."""
    q, k, v, layout = case.inputs("cpu", dtype, seed)
    q, k = (q.abs(), k + shift) if shift else (q, k)
    (dout,) = upstream_of([q], seed)

    def exact(*qkv):
        lse = reference.flash_attention(*qkv, layout, return_lse=True)[1]
        (out,), grads = gradients(lambda *qkv: reference.flash_attention(*qkv, layout), qkv, [dout])
        return out, lse.detach(), *grads

    head = [t[:, 0] for t in (q, k, v, dout)]
    got, eager = (emulated_gpu.attention(*head, seed=seed, **how) for how in (faults, {"product": _cublas}))
    low, high = honest(exact, (q, k, v)), exact(*(t.double() for t in (q, k, v)))
    results = [
        (g, [e, *(t.view(g.shape) for t in lows[1:])], h.view(g.shape))
        for g, e, lows, h in zip(got, eager, low, high, strict=True)
    ]
    return results if dtype == FULL else results[1:2]


def _wide_latents(seed=0, product=emulated_gpu.product):
    """(got, low, high) of heads for library products, added term by term as cuBLAS does in fp32."""
    q, k, v = LatentCase("wide", 20, 40, 3, 264, 16).direct_inputs("cpu", FULL, seed)

    def exact(*qkv):
        return reference.latent_attention(*qkv, scale=0.25)

    def attend(product):
        heads = zip(*(t.unbind(1) for t in (q, k, v)), strict=True)
        outs = [product((product(q, k) * 0.25).float().softmax(-1), v.mT).float() for q, k, v in heads]
        return torch.stack(outs, dim=1)

    (low,), high = honest(exact, (q, k, v)), exact(*(t.double() for t in (q, k, v)))
    return [(attend(product), [attend(_cublas), low[1]], high)]


HONEST = {
    "scores": lambda seed: _scores(LIMITED, FULL, seed) + _score_gradients(LIMITED, seed),
    "peaked scores": lambda seed: _scores(PEAKED, FULL, seed) + _score_gradients(PEAKED, seed),
    "wide scores": lambda seed: _scores(WIDE, FULL, seed) + _score_gradients(WIDE, seed),
    "scores, fp16": lambda seed: _scores(WIDE, HALF, seed) + _scores(NARROW, HALF, seed),
    "scores, bf16": lambda seed: _scores(WIDE, BF16, seed) + _scores(NARROW, BF16, seed),
    "attention": lambda seed: _attention(AttentionCase("a", (70,), 1, 1, 32), FULL, seed),
    "peaked attention": lambda seed: _attention(AttentionCase("a", (77,), 1, 1, 32, peak=2.0), FULL, seed),
    "scores far below zero": lambda seed: _attention(AttentionCase("a", (33,), 1, 1, 32), FULL, seed, -60.0),
    "attention, fp16": lambda seed: _attention(AttentionCase("a", (41,), 1, 1, 256), HALF, seed),
    "wide latents": _wide_latents,
}


@pytest.mark.parametrize("kernel", HONEST)
def test_an_honest_kernel_of_a_gpu_passes(kernel):
    assert max(_share(HONEST[kernel](seed)) for seed in range(3)) < 1


@pytest.mark.parametrize(("dtype", "measured"), [(BF16, 3.12e-6), (HALF, 3.93e-6), (FULL, 1.48e-6)], ids=str)
def test_the_emulation_errs_as_an_h200(dtype, measured):
    """RMS errors of the lse of `wide` by bench/results/parity-nvidia-h200-2026-11-27.txt."""
    got, _, high = _scores(WIDE, dtype)[0]
    assert (got.double() - high).square().mean().sqrt().item() == pytest.approx(measured, rel=0.1)


def test_products_of_a_library_err_as_on_an_h200():
    """5.40e-7 by bench/NOTES.md, and eager, which sums otherwise, 3.50e-7."""
    ((got, _, high),) = _wide_latents()
    assert (got.double() - high).square().mean().sqrt().item() == pytest.approx(5.40e-7, rel=0.1)


def _rounded(dtype):
    return lambda a, b: emulated_gpu.product(a, b).to(dtype).double()


def _in_fp16(a, b):
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for k in range(0, a.shape[1], 16):
        total = (total + a[:, k : k + 16].double() @ b[:, k : k + 16].double().mT).half().double()
    return total


def _tf32(a, b):
    """Factors of 11 bits."""
    cut = [emulated_gpu._cut(t.double(), emulated_gpu._power_of_2(t.double()) * 2.0**-10) for t in (a, b)]
    return emulated_gpu.product(*cut)


def _without_the_last(terms):
    return lambda a, b: emulated_gpu.product(a[:, :-terms], b[:, :-terms])


FAULTS = {
    "sums in fp16": _in_fp16,
    "scores rounded to bf16": _rounded(BF16),
    "scores rounded to fp16": _rounded(HALF),
    "without the last block": _without_the_last(16),
    "without the last column": _without_the_last(1),
    "products of TF32": _tf32,
}
CAUGHT = {
    "scores": lambda product: _scores(LIMITED, FULL, product=product),
    "peaked scores": lambda product: _scores(PEAKED, FULL, product=product),
    "gradient": lambda product: _score_gradients(LIMITED, product=product),
    "peaked gradient": lambda product: _score_gradients(PEAKED, product=product),
    "attention": lambda product: _attention(AttentionCase("a", (70,), 1, 1, 32), FULL, product=product),
    "scores, bf16": lambda product: _scores(WIDE, BF16, product=product),
    "wide latents": lambda product: _wide_latents(product=product),
    "attention, fp16": lambda product: _attention(
        AttentionCase("a", (41,), 1, 1, 256), HALF, product=product
    ),
}
# 16 bits fit into TF32
PAIRS = [(r, f) for r in CAUGHT for f in FAULTS if "16" not in r or f != "products of TF32"]


@pytest.mark.parametrize(("results", "fault"), PAIRS)
def test_a_fault_is_far_beyond_the_bound(results, fault):
    assert _share(CAUGHT[results](FAULTS[fault])) > 20


@pytest.mark.parametrize("largest", [False, True])
def test_two_errors_of_an_instruction_pass(largest):
    """Where eager makes none and no sum is behind the result."""
    g, size = testing.generator(), 2.0**-22
    high = 1 + torch.rand(2, 3000, generator=g, dtype=torch.float64)
    weight, denominator = 2 * torch.rand(2, 2, 3000, generator=g, dtype=torch.float64) - 1
    if largest:
        weight, denominator = (torch.zeros(2, 3000) for _ in range(2))
        weight[0, 7], denominator[0, 7], high[0, 7] = 1, -1, 3
    got = high * (1 + size * weight) / (1 + size * denominator)
    assert 0.5 < _share([(got.float(), of_products([high.float()])[0], high)]) < 1


def test_one_wrong_element_is_beyond_the_bound():
    got, low, high = _attention(AttentionCase("a", (70,), 1, 1, 32), FULL)[0]
    got[3, 4] += 1e-5 * high.abs().max()
    assert _share([(got, low, high)]) > 1


def test_off_a_gpu_the_bound_is_that_of_eager(monkeypatch):
    monkeypatch.undo()
    q, d, *rest = WIDE.inputs("cpu", FULL)
    eager = as_tuple(reference.masked_lse(q, d, *rest))
    low = honest(lambda q, d: reference.masked_lse(q, d, *rest), (q, d))
    for one in (low, of_products(eager)):
        assert all(len(lows) == 1 and torch.equal(lows[0], t) for lows, t in zip(one, eager, strict=True))
    size = high = torch.ones(4, dtype=torch.float64)
    eps = torch.finfo(FULL).eps
    assert [bound for *_, bound in errors("exact", size.float(), high.float(), high)] == [2 * eps, eps / 8]


def test_without_a_product_the_bound_is_that_of_eager():
    """What `_moved` models are sums over the last dimension of two factors."""
    x, residual, weight = torch.randn(3, 5), torch.randn(3, 5), torch.ones(5)
    norm = honest(lambda *ts: reference.add_rms_norm(*ts, 1e-5), (x, residual, weight))
    assert [len(lows) for lows in (*norm, *honest(torch.add, (x, residual)))] == [1, 1, 1]
    for product in (
        lambda a, b: a @ b.mT,
        lambda a, b: torch.einsum("td,sd->ts", a, b),
        lambda a, b: reference.latent_attention(a[:, None], b[:, None], b[:, None]),
        lambda a, b: reference.flash_attention(a[:, None], b[:, None], b[:, None], SeqLayout((3,), "cpu")),
    ):
        assert [len(lows) for lows in honest(product, (x, residual))] == [2]
