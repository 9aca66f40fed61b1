import inspect

import numpy as np
import pytest
import torch
from gradients import assert_compiles, assert_gradcheck, assert_same_constants, spy_on_launches

from nvembed_fast.kernels import latent_attention as module
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.latent_attention import _launch_weights_fwd as latent_weights
from nvembed_fast.kernels.latent_attention import absorbed_latent_attention, latent_attention
from nvembed_fast.kernels.testing import (
    LATENT_CASES,
    LatentCase,
    assert_gradient_parity,
    assert_parity,
    gradients,
    small,
    upstream_of,
)

HAS_GPU = torch.cuda.is_available()
CASES = small(LATENT_CASES)
# more tokens than a tile; latents, head width and D that no tile divides; more than one piece of latents
RAGGED = LatentCase("ragged", 150, 300, 2, 24, 72)


@pytest.fixture(params=[80] if HAS_GPU else [80, 90], ids=lambda c: f"sm_{c}")
def path(request, monkeypatch):
    """Off a GPU both ways to load run in the interpreter; on a GPU, the machine's own."""
    if not HAS_GPU:
        monkeypatch.setattr(module, "capability", lambda device: request.param)
    return request.param


def _double(args):
    return [t.double() if torch.is_tensor(t) else t for t in args]


def _eager_absorbed(x, a, b, residual, num_heads):
    # the kernel's second product is the library's own; the reference pads it when there are few rows
    return torch.addmm(residual, reference.latent_weights(x, a, num_heads), b)


def _assert_direct_matches(case, device, dtype, **kwargs):
    args = case.direct_inputs(device, dtype)
    low = reference.latent_attention(*args, **kwargs)
    high = reference.latent_attention(*_double(args), **kwargs)
    assert_parity(case.name, latent_attention(*args, **kwargs), low, high)


def _assert_absorbed_matches(case, device, dtype):
    args = case.absorbed_inputs(device, dtype)
    x, a, _, _, num_heads = args
    low = reference.latent_weights(x, a, num_heads)
    high = reference.latent_weights(x.double(), a.double(), num_heads)
    assert_parity(f"{case.name} weights", latent_weights(x, a, num_heads), low, high)
    high = reference.absorbed_latent_attention(*_double(args))
    assert_parity(case.name, absorbed_latent_attention(*args), _eager_absorbed(*args), high)


@pytest.mark.parametrize("case", [*CASES, RAGGED], ids=lambda c: c.name)
def test_direct_matches_reference(case, dtype, path, device):
    _assert_direct_matches(case, device, dtype)


@pytest.mark.parametrize("case", [*CASES, RAGGED], ids=lambda c: c.name)
def test_absorbed_matches_reference(case, dtype, path, device):
    _assert_absorbed_matches(case, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in LATENT_CASES if c.bench], ids=lambda c: c.name)
def test_matches_reference_at_full_size(case, dtype, device):
    _assert_direct_matches(case, device, dtype)
    _assert_absorbed_matches(case, device, dtype)


@pytest.mark.parametrize("num_latents", [1, 15, 17, 255, 256, 257, 513])
def test_any_number_of_latents(num_latents, path, device):
    case = LatentCase("latents", 5, num_latents, 2, 16, 16)
    _assert_direct_matches(case, device, torch.float16)
    _assert_absorbed_matches(case, device, torch.float16)


@pytest.mark.parametrize("num_tokens", [127, 128, 129])
def test_around_the_tile_size(num_tokens, path, device):
    case = LatentCase("tokens", num_tokens, 16, 1, 16, 16)
    _assert_direct_matches(case, device, torch.float16)
    _assert_absorbed_matches(case, device, torch.float16)


# a width whose rows no descriptor can step over falls back to pointers
@pytest.mark.parametrize("width", [1, 8, 77, 128, 129])
def test_any_width(width, path, device):
    case = LatentCase("width", 9, 40, 2, width, width)
    _assert_direct_matches(case, device, torch.float16)
    _assert_absorbed_matches(case, device, torch.float16)


def test_scale_is_used(path, device):
    _assert_direct_matches(RAGGED, device, torch.float16, scale=0.5)


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_wide_heads_go_through_library_products(chunk, dtype, device, monkeypatch):
    case = LatentCase("wide", 20, 40, 3, module.MAX_HEAD_WIDTH + 8, 16)
    monkeypatch.setattr(module, "_latent_attention_fwd_kernel", None)
    monkeypatch.setattr(module, "MAX_SCORES", chunk * case.num_heads * case.num_latents)
    _assert_direct_matches(case, device, dtype)
    _assert_direct_matches(case, device, dtype, scale=0.25)
    q, k, v = case.direct_inputs(device, dtype)
    assert latent_attention(q, k, v).is_contiguous()
    assert latent_attention(q[:0], k, v).shape == (0, 3, module.MAX_HEAD_WIDTH + 8)


def test_absorbed_is_the_direct_form_multiplied_out(path, device):
    num_tokens, num_latents, num_heads, head_width, width = 30, 40, 3, 16, 24
    g = torch.Generator().manual_seed(0)
    x, w_q, w_out, residual, k, v = (
        torch.randn(shape, generator=g).to(device)
        for shape in [
            (num_tokens, width),
            (num_heads, head_width, width),
            (num_heads, head_width, width),
            (num_tokens, width),
            (num_latents, num_heads, head_width),
            (num_latents, num_heads, head_width),
        ]
    )
    q = torch.einsum("td,nhd->tnh", x, w_q)
    direct = residual + torch.einsum("tnh,nhd->td", latent_attention(q, k, v), w_out)
    a = (torch.einsum("lnh,nhd->nld", k, w_q) / head_width**0.5).flatten(0, 1)
    b = torch.einsum("lnh,nhd->nld", v, w_out).flatten(0, 1)
    absorbed = absorbed_latent_attention(x, a, b, residual, num_heads)
    torch.testing.assert_close(absorbed, direct, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_pieces_are_weighed_against_each_other(order, path, device):
    # each piece's scores lie 8 above those of its neighbour, so a forgotten factor is not small
    num_latents = 1024
    steps = torch.linspace(0, 32, num_latents, device=device)
    a = torch.zeros(2 * num_latents, 16, device=device)
    a[:num_latents, 0] = steps if order == "rising" else steps.flip(0)
    x = torch.ones(3, 16, device=device)
    p = latent_weights(x.half(), a.half(), 2)
    high = reference.latent_weights(x.double(), a.half().double(), 2)
    assert_parity(order, p, reference.latent_weights(x.half(), a.half(), 2), high)
    total = p.float().unflatten(1, (2, -1)).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-4)


def test_huge_scores_stay_finite(path, device):
    q, k, v = RAGGED.direct_inputs(device, torch.float32)
    assert latent_attention(1000 * q, 1000 * k, v).isfinite().all()
    x, a, *_ = RAGGED.absorbed_inputs(device, torch.float32)
    p = latent_weights(1000 * x, 1000 * a, 2)
    assert p.isfinite().all() and p.max() == 1


def test_nan_in_a_token_stays_there(path, device):
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    x, a, b, residual, num_heads = RAGGED.absorbed_inputs(device, torch.float16)
    clean = latent_attention(q, k, v), absorbed_latent_attention(x, a, b, residual, num_heads)
    q[3], x[3] = float("nan"), float("nan")
    poisoned = latent_attention(q, k, v), absorbed_latent_attention(x, a, b, residual, num_heads)
    others = torch.arange(len(x), device=device) != 3
    for got, wanted in zip(poisoned, clean, strict=True):
        assert torch.equal(got[others], wanted[others]) and got[3].isnan().all()


def test_nan_in_a_head_stays_there(path, device):
    # no piece divides 300 latents: the last one of a head reaches into the next
    x, a, *_ = RAGGED.absorbed_inputs(device, torch.float16)
    clean = latent_weights(x, a, 2)
    a[300:] = float("nan")
    poisoned = latent_weights(x, a, 2)
    assert torch.equal(poisoned[:, :300], clean[:, :300]) and poisoned[:, 300:].isnan().all()


def test_nan_around_the_tensors_cannot_matter(path, device):
    def wide(t):
        rows, columns = t.shape[0] + 300, t.shape[-1] + 16
        view = t.new_full((rows, *t.shape[1:-1], columns), float("nan"))[150:-150, ..., : t.shape[-1]]
        return view.copy_(t)

    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    assert torch.equal(latent_attention(wide(q), wide(k), wide(v)), latent_attention(q, k, v))
    x, a, *_ = RAGGED.absorbed_inputs(device, torch.float16)
    assert torch.equal(latent_weights(wide(x), wide(a), 2), latent_weights(x, a, 2))


def test_permuting_latents_changes_nothing(path, device):
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).to(device)
    q, k, v = RAGGED.direct_inputs(device, torch.float32)
    torch.testing.assert_close(
        latent_attention(q, k[order], v[order]), latent_attention(q, k, v), rtol=1e-5, atol=1e-6
    )
    x, a, *_ = RAGGED.absorbed_inputs(device, torch.float32)
    p = latent_weights(x, a, 2).unflatten(1, (2, 300))
    other = latent_weights(x, a.unflatten(0, (2, 300))[:, order].flatten(0, 1), 2).unflatten(1, (2, 300))
    torch.testing.assert_close(other, p[..., order], rtol=1e-5, atol=1e-7)


FORWARD_KERNELS = ["_latent_attention_fwd_kernel", "_absorbed_latent_attention_fwd_kernel"]


def test_doubling_the_batch_changes_no_row(path, device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, *FORWARD_KERNELS)
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    once = latent_attention(q, k, v)
    assert torch.equal(latent_attention(torch.cat([q, q]), k, v), torch.cat([once, once]))
    x, a, *_ = RAGGED.absorbed_inputs(device, torch.float16)
    once = latent_weights(x, a, 2)
    assert torch.equal(latent_weights(torch.cat([x, x]), a, 2), torch.cat([once, once]))
    assert_same_constants(launches)


def test_a_token_alone_has_the_same_bits(path, device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, *FORWARD_KERNELS)
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    x, a, *_ = RAGGED.absorbed_inputs(device, torch.float16)
    for t in (0, 77, 149):
        assert torch.equal(latent_attention(q[t : t + 1], k, v)[0], latent_attention(q, k, v)[t])
        assert torch.equal(latent_weights(x[t : t + 1], a, 2)[0], latent_weights(x, a, 2)[t])
    assert_same_constants(launches)


def test_no_tokens(path, device):
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    assert latent_attention(q[:0], k, v).shape == (0, 2, 24)
    x, a, b, residual, num_heads = RAGGED.absorbed_inputs(device, torch.float16)
    assert latent_weights(x[:0], a, num_heads).shape == (0, 600)
    assert absorbed_latent_attention(x[:0], a, b, residual[:0], num_heads).shape == (0, 72)


def test_scores_far_below_zero(path, device):
    # exp2 of each alone is zero: only the running maximum keeps them apart
    q, k, v = RAGGED.direct_inputs(device, torch.float32)
    args = (q.abs(), k - 60, v)
    assert_parity(
        "direct",
        latent_attention(*args),
        reference.latent_attention(*args),
        reference.latent_attention(*_double(args)),
    )
    x, a, *_ = RAGGED.absorbed_inputs(device, torch.float32)
    args = (x.abs(), a - 60, 2)
    assert_parity(
        "weights",
        latent_weights(*args),
        reference.latent_weights(*args),
        reference.latent_weights(*_double(args)),
    )


def test_no_row_beyond_the_last_is_read(path, device):
    # rows so far apart that those beyond the last lie in nobody's memory; untouched, these cost none
    def far(rows, step):
        t = torch.from_numpy(np.zeros(rows * step, dtype=np.float16)).as_strided((rows, 16), (step, 1))
        return t.fill_(1).to(device)

    x, a = far(3, 2**24), far(5, 2**27)
    assert torch.equal(latent_weights(x, a, 1), latent_weights(x.contiguous(), a.contiguous(), 1))
    q, k = x[:, None], a[:, None]
    assert torch.equal(
        latent_attention(q, k, k), latent_attention(q.contiguous(), k.contiguous(), k.contiguous())
    )


def test_descriptors_reach_rows_of_whole_16_bytes():
    t = torch.zeros(4, 3, 24, dtype=torch.float16)
    assert module.use_descriptors(90, t, t[1:], t[:, 1:], t[..., 8:])
    assert not module.use_descriptors(90, t, t[..., 4:])  # starts in between
    assert not module.use_descriptors(90, t, torch.zeros(4, 3, 20, dtype=torch.float16))  # steps in between
    assert [module.use_descriptors(sm) for sm in (80, 89, 90, 100, 120)] == [False, False, True, True, False]


@pytest.mark.parametrize("name", ["latent_attention", "absorbed_latent_attention"])
def test_signature_is_the_reference_signature(name):
    assert inspect.signature(getattr(module, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[0], k, v), r"^q must be \[T, N, H\]"),
        (lambda q, k, v: (q.mT.contiguous().mT, k, v), r"^q must be \[T, N, H\] with a last stride of 1"),
        (lambda q, k, v: (q, k[:, :1], v), r"^k must be \[L, 2, 24\] torch.float16 on"),
        (lambda q, k, v: (q, k[:0], v[:0]), r"^k must be \[L, 2, 24\]"),
        (lambda q, k, v: (q, k.float(), v), r"^k must be .* got \(300, 2, 24\) torch.float32"),
        (lambda q, k, v: (q, k, v[:-1]), r"^v must be \[L, 2, 24\]"),
        (lambda q, k, v: (q, k, v[..., :16]), r"^v must be \[L, 2, 24\]"),
        (lambda q, k, v: (q, k, v, 0.0), r"^scale must be positive and finite, got 0.0"),
    ],
)
def test_direct_rejects(change, message, device):
    with pytest.raises(ValueError, match=message):
        latent_attention(*change(*RAGGED.direct_inputs(device, torch.float16)))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, a, b, r, n: (x[0], a, b, r, n), r"^x must be \[T, D\] with contiguous rows"),
        (lambda x, a, b, r, n: (x.t().contiguous().t(), a, b, r, n), r"^x must be \[T, D\]"),
        (lambda x, a, b, r, n: (x, a[:, :64], b, r, n), r"^a must be \[N \* L, 72\]"),
        (lambda x, a, b, r, n: (x, a.float(), b, r, n), r"^a must be .* got \(600, 72\) torch.float32"),
        (lambda x, a, b, r, n: (x, a, b, r, 7), r"^a must be \[N \* L, D\] with N = 7 and L >= 1"),
        (lambda x, a, b, r, n: (x, a, b, r, 0), r"^a must be \[N \* L, D\] with N = 0"),
        (
            lambda x, a, b, r, n: (x, torch.cat([a, a]), torch.cat([b, b]), r, 1),
            "a must have at most 1024 latents for this kernel, got 1200",
        ),
        (lambda x, a, b, r, n: (x, a, b[:-1], r, n), r"^b must be \(600, 72\) torch.float16 on"),
        (lambda x, a, b, r, n: (x, a, b, r[:1], n), r"^residual must be \(150, 72\) torch.float16 on"),
    ],
)
def test_absorbed_rejects(change, message, device):
    with pytest.raises(ValueError, match=message):
        absorbed_latent_attention(*change(*RAGGED.absorbed_inputs(device, torch.float16)))


def _absorbed_parts(case, device, dtype):
    """(inputs, kernel, reference), the number of heads bound."""
    *inputs, num_heads = case.absorbed_inputs(device, dtype)

    def kernel(x, a, b, residual):
        return absorbed_latent_attention(x, a, b, residual, num_heads)

    def wanted(x, a, b, residual):
        return reference.absorbed_latent_attention(x, a, b, residual, num_heads)

    return inputs, kernel, wanted


def _parts(form, case, device, dtype):
    if form == "absorbed":
        return _absorbed_parts(case, device, dtype)
    return list(case.direct_inputs(device, dtype)), latent_attention, reference.latent_attention


def _assert_gradients_match(form, case, device, dtype, **kwargs):
    inputs, kernel, wanted = _parts(form, case, device, dtype)
    assert_gradient_parity(f"{case.name} {form}", kernel, wanted, inputs, **kwargs)


FORMS = pytest.mark.parametrize("form", ["direct", "absorbed"])
BACKWARD_KERNELS = [
    "_latent_attention_bwd_dq_kernel",
    "_latent_attention_bwd_dkv_kernel",
    "_absorbed_latent_attention_bwd_kernel",
]
SMALLEST = LatentCase("smallest", 3, 5, 2, 8, 8)
WIDE = LatentCase("wide", 20, 40, 3, module.MAX_HEAD_WIDTH + 8, 16)


@FORMS
@pytest.mark.parametrize("case", [*CASES, RAGGED], ids=lambda c: c.name)
def test_gradient_matches_reference(form, case, dtype, path, device):
    _assert_gradients_match(form, case, device, dtype)


@FORMS
@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in LATENT_CASES if c.bench], ids=lambda c: c.name)
def test_gradient_matches_reference_at_full_size(form, case, dtype, device):
    # enough tokens for two chunks and a bit
    part = LatentCase(
        case.name, 2 * module.CHUNK + 5, case.num_latents, case.num_heads, case.head_width, case.width
    )
    _assert_gradients_match(form, part, device, dtype)


LATENT_COUNTS = [15, 17, 255, 256, 257, 513]


@pytest.mark.parametrize(
    "form, num_latents",
    [("absorbed", 1), *((form, n) for form in ("absorbed", "direct") for n in LATENT_COUNTS)],
)
def test_gradient_of_any_number_of_latents(form, num_latents, path, device):
    _assert_gradients_match(form, LatentCase("latents", 9, num_latents, 2, 16, 16), device, torch.float16)


def test_gradient_of_one_latent(path, device):
    """The softmax of one score is 1, so q and k have no gradient but the rounding of dP - delta.

    Parity has no scale there, because eager takes both from the same sum. Flash attention adds the same H
    products twice in fp32, as dO V and as rowsum(dO * O): each sum is off by at most H / 2 eps of their size.
    """
    inputs = q, k, v = LatentCase("latents", 9, 1, 2, 16, 16).direct_inputs(device, torch.float16)
    upstream = (dout,) = upstream_of([q])
    _, (dq, dk, dv) = gradients(latent_attention, inputs, upstream)
    low, high = (
        gradients(reference.latent_attention, tensors, upstream)[1] for tensors in (inputs, _double(inputs))
    )
    assert_parity("dv", dv, low[2], high[2])
    half, single = torch.finfo(torch.float16), torch.finfo(torch.float32)
    # rounding dS and a gradient to 16 bits: relative, and at the smallest numbers absolute
    relative, absolute = 1 + 2 * half.eps, half.smallest_normal * half.eps
    ds = relative * 16 * single.eps * (dout.double() * v.double()).abs().sum(-1, keepdim=True) + absolute
    scale = relative * 16**-0.5
    assert (dq.abs() <= scale * ds * k.double().abs() + absolute).all()
    assert (dk.abs() <= scale * (ds * q.double().abs()).sum(0) + absolute).all()


@FORMS
@pytest.mark.parametrize("num_tokens", [127, 128, 129])
def test_gradient_around_the_tile_size(form, num_tokens, path, device):
    _assert_gradients_match(form, LatentCase("tokens", num_tokens, 16, 1, 16, 16), device, torch.float16)


@FORMS
@pytest.mark.parametrize("width", [1, 8, 77, 128, 129])
def test_gradient_of_any_width(form, width, path, device):
    _assert_gradients_match(form, LatentCase("width", 60, 100, 2, width, width), device, torch.float16)


def test_gradient_scales(path, device):
    def scaled(function):
        return lambda q, k, v: function(q, k, v, scale=0.5)

    inputs = RAGGED.direct_inputs(device, torch.float16)
    assert_gradient_parity("scale", scaled(latent_attention), scaled(reference.latent_attention), inputs)


@pytest.mark.parametrize("num_tokens", [128, 150])
def test_chunks_of_tokens_are_added(num_tokens, dtype, path, device, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 64)
    _assert_gradients_match("direct", LatentCase("chunks", num_tokens, 40, 2, 24, 16), device, dtype)


def test_every_tile_of_tokens_divides_a_chunk():
    for sm in (80, 86, 90, 120):
        for dtype in (torch.float16, torch.float32):
            for width in (1, 64, 65, 128, 129, module.MAX_HEAD_WIDTH):
                config = module._bwd_launch_config(512, width, capability=sm, dtype=dtype)["dkv"]
                assert module.CHUNK % config["BLOCK_T"] == 0 == 64 % config["BLOCK_T"]


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_gradient_of_wide_heads(chunk, dtype, device, monkeypatch):
    monkeypatch.setattr(module, "_latent_attention_bwd_dq_kernel", None)
    monkeypatch.setattr(module, "_latent_attention_bwd_dkv_kernel", None)
    monkeypatch.setattr(module, "MAX_SCORES", chunk * WIDE.num_heads * WIDE.num_latents)
    _assert_gradients_match("direct", WIDE, device, dtype)
    q, k, v = WIDE.direct_inputs(device, dtype)
    _, grads = gradients(latent_attention, (q, k, v))
    assert all(g.is_contiguous() for g in grads)
    _, (dq, dk, dv) = gradients(latent_attention, (q[:0], k, v))
    assert dq.shape == (0, 3, 264) and not dk.any() and not dv.any()


@FORMS
def test_gradient_of_a_strided_upstream(form, path, device):
    _assert_gradients_match(form, RAGGED, device, torch.float16, contiguous=False)


@FORMS
def test_gradient_of_an_expanded_upstream(form, path, device):
    inputs, kernel, _ = _parts(form, RAGGED, device, torch.float16)
    leaves = [t.clone().requires_grad_() for t in inputs]
    kernel(*leaves).sum().backward()
    ones = torch.ones_like(inputs[0] if form == "direct" else inputs[3])
    for leaf, grad in zip(leaves, gradients(kernel, inputs, [ones])[1], strict=True):
        assert torch.equal(leaf.grad, grad)


def test_gradient_by_descriptors_only_where_they_can_be_made(path, device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, *BACKWARD_KERNELS)
    for form, count in (("direct", 2), ("absorbed", 1)):
        inputs, kernel, _ = _parts(form, RAGGED, device, torch.float16)
        (dout,) = upstream_of([inputs[0] if form == "direct" else inputs[3]])
        odd = dout.new_zeros(*dout.shape[:-1], dout.shape[-1] + 1)[..., :-1].copy_(dout)
        shifted = dout.new_zeros(dout.numel() + 1)[1:].view(dout.shape).copy_(dout)
        launches.clear()
        base, *others = (gradients(kernel, inputs, [upstream])[1] for upstream in (dout, odd, shifted))
        for other in others:
            for one, two in zip(base, other, strict=True):
                torch.testing.assert_close(two, one, rtol=5e-3, atol=5e-3)
        if not HAS_GPU:
            used = [arguments["USE_TMA"] for _, arguments in launches]
            assert used == [path == 90] * count + [False] * 2 * count


def test_gradient_of_strided_inputs(path, device):
    # rows that no descriptor can step over, and a b whose rows do not lie in one piece
    q, k, v = (torch.cat([t, t[..., :1]], dim=-1) for t in RAGGED.direct_inputs(device, torch.float16))
    views = lambda *ts: latent_attention(*(t[..., :-1] for t in ts))  # noqa: E731
    wanted = lambda *ts: reference.latent_attention(*(t[..., :-1] for t in ts))  # noqa: E731
    assert_gradient_parity("direct", views, wanted, [q, k, v])
    (x, a, b, residual), kernel, wanted = _absorbed_parts(RAGGED, device, torch.float16)
    turned = [x, a, b.t().contiguous(), residual]
    assert_gradient_parity(
        "absorbed",
        lambda x, a, b, r: kernel(x, a, b.t(), r),
        lambda x, a, b, r: wanted(x, a, b.t(), r),
        turned,
    )


FROZEN_DIRECT = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
FROZEN_ABSORBED = [(0,), (1,), (2,), (3,), (0, 1), (0, 1, 3), (1, 2, 3), (0, 2, 3), (0, 1, 2)]


@pytest.mark.parametrize("frozen", FROZEN_DIRECT, ids=str)
@pytest.mark.parametrize("case", [RAGGED, WIDE], ids=lambda c: c.name)
def test_frozen_inputs_of_the_direct_form(case, frozen, device):
    inputs = case.direct_inputs(device, torch.float16)
    _, grads = gradients(latent_attention, inputs, frozen=frozen)
    _, every = gradients(latent_attention, inputs)
    for i, (got, wanted) in enumerate(zip(grads, every, strict=True)):
        assert got is None if i in frozen else torch.equal(got, wanted)


@pytest.mark.parametrize("frozen", FROZEN_ABSORBED, ids=str)
def test_frozen_inputs_of_the_absorbed_form(frozen, device):
    inputs, kernel, _ = _absorbed_parts(RAGGED, device, torch.float16)
    _, grads = gradients(kernel, inputs, frozen=frozen)
    _, every = gradients(kernel, inputs)
    for i, (got, wanted) in enumerate(zip(grads, every, strict=True)):
        assert got is None if i in frozen else torch.equal(got, wanted)


def _saved(kernel, inputs, frozen):
    """Shapes of what a call keeps for its backward."""
    kept = []
    leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(inputs)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        kernel(*leaves)
    return kept


def test_nothing_is_computed_or_saved_for_frozen_inputs(device, monkeypatch):
    inputs, kernel, _ = _absorbed_parts(RAGGED, device, torch.float16)
    rows, scores, weights = (150, 72), (150, 600), (600, 72)
    assert _saved(kernel, inputs, frozen=(0, 1, 2)) == []
    assert _saved(kernel, inputs, frozen=(0, 1)) == [scores]
    assert _saved(kernel, inputs, frozen=(0,)) == [rows, weights, scores]
    assert _saved(kernel, inputs, frozen=(1,)) == [weights, weights, scores]
    monkeypatch.setattr(module, "_absorbed_latent_attention_bwd_kernel", None)
    gradients(kernel, inputs, frozen=(0, 1))
    gradients(kernel, inputs, frozen=(0, 1, 2))

    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    q_shape, k_shape, lse = (150, 2, 24), (300, 2, 24), (2, 150)
    assert _saved(latent_attention, [q, k, v], frozen=(0, 1)) == [q_shape, k_shape, k_shape, lse]
    assert _saved(latent_attention, [q, k, v], frozen=(1, 2)) == [q_shape, k_shape, k_shape, q_shape, lse]
    launched = []
    for name in ("_launch_bwd_dq", "_launch_bwd_dkv"):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, real=real, name=name: launched.append(name) or real(*args)
        )
    gradients(latent_attention, [q, k, v], frozen=(0, 1))
    assert launched == ["_launch_bwd_dkv"]
    launched.clear()
    gradients(latent_attention, [q, k, v], frozen=(1, 2))
    assert launched == ["_launch_bwd_dq"]


def test_the_denominator_is_written_for_a_gradient_only(path, device):
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    plain, none = module._launch_fwd(q, k, v, 0.2)
    out, lse = module._launch_fwd(q, k, v, 0.2, with_lse=True)
    assert torch.equal(plain, out) and none.numel() == 0
    scores = 0.2 * torch.einsum("tnh,lnh->ntl", q.double(), k.double())
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1) / np.log(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "form, case",
    [("direct", SMALLEST), ("absorbed", SMALLEST), ("direct", LatentCase("wide", 2, 3, 1, 264, 8))],
)
def test_gradcheck(form, case, device):
    inputs, kernel, _ = _parts(form, case, device, torch.float32)
    assert_gradcheck(kernel, inputs)


@FORMS
def test_the_same_bits_twice(form, path, device, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 64)
    inputs, kernel, _ = _parts(form, RAGGED, device, torch.float16)
    for one, other in zip(gradients(kernel, inputs)[1], gradients(kernel, inputs)[1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form, case", [("direct", RAGGED), ("absorbed", RAGGED), ("direct", WIDE)])
def test_compiles_as_one_graph(form, case, device):
    inputs, kernel, _ = _parts(form, case, device, torch.float32)
    assert_compiles(kernel, inputs)


@pytest.mark.parametrize("case", [SMALLEST, LatentCase("wide", 2, 3, 1, 264, 8)], ids=lambda c: c.name)
def test_opcheck_direct(case, device):
    ops = torch.ops.nvembed_fast
    q, k, v = (t.requires_grad_() for t in case.direct_inputs(device, torch.float32))
    torch.library.opcheck(ops.latent_attention, (q, k, v, 0.5, True))
    out, lse = (t.detach() for t in ops.latent_attention(q, k, v, 0.5, True))
    saved = [t.detach() for t in (q, k, v)]
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        kept = out if any(needs[:2]) else None
        torch.library.opcheck(ops.latent_attention_bwd, (*saved, kept, lse, out, 0.5, *needs))
    torch.library.opcheck(ops.latent_attention, (*saved, 0.5, False))


def test_opcheck_absorbed(device):
    ops = torch.ops.nvembed_fast
    *inputs, num_heads = SMALLEST.absorbed_inputs(device, torch.float32)
    x, a, b, residual = (t.requires_grad_() for t in inputs)
    torch.library.opcheck(ops.absorbed_latent_attention, (x, a, b, residual, num_heads))
    out, p = (t.detach() for t in ops.absorbed_latent_attention(x, a, b, residual, num_heads))
    x, a, b = x.detach(), a.detach(), b.detach()
    for args in ((x, a, b, p, out, num_heads, True), (None, a, b, p, out, num_heads, False)):
        torch.library.opcheck(ops.absorbed_latent_attention_bwd, args)
    torch.library.opcheck(ops.absorbed_latent_attention_bwd, (None, None, None, p, out, num_heads, True))


def test_gradient_of_no_tokens(path, device):
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    _, (dq, dk, dv) = gradients(latent_attention, [q[:0], k, v])
    assert dq.shape == (0, 2, 24) and dk.shape == dv.shape == k.shape and not dk.any() and not dv.any()
    (x, a, b, residual), kernel, _ = _absorbed_parts(RAGGED, device, torch.float16)
    _, (dx, da, db, dresidual) = gradients(kernel, [x[:0], a, b, residual[:0]])
    assert dx.shape == dresidual.shape == (0, 72)
    assert da.shape == db.shape == a.shape and not da.any() and not db.any()


def test_one_tensor_in_two_places(path, device):
    q, k, _ = RAGGED.direct_inputs(device, torch.float32)

    def twice(function):
        return lambda q, k: function(q, k, k) + function(q, k, q[:1].expand_as(k))

    assert_gradient_parity("direct", twice(latent_attention), twice(reference.latent_attention), [q, k])
    (x, a, _, _), kernel, wanted = _absorbed_parts(RAGGED, device, torch.float32)
    assert_gradient_parity(
        "absorbed",
        lambda x, a: kernel(x, a, a, x) + kernel(x, a, a, x),
        lambda x, a: wanted(x, a, a, x) + wanted(x, a, a, x),
        [x, a],
    )


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return None


@FORMS
def test_no_upstream_gives_no_gradient(form, device):
    inputs, kernel, _ = _parts(form, SMALLEST, device, torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    _NoGradient.apply(kernel(*leaves)).sum().backward()
    assert all(leaf.grad is None for leaf in leaves)


def test_nan_in_a_token_reaches_no_other_gradient(path, device):
    others = torch.arange(RAGGED.num_tokens, device=device) != 3
    for form, of_tokens in (("direct", (0,)), ("absorbed", (0, 3))):
        inputs, kernel, _ = _parts(form, RAGGED, device, torch.float16)
        _, clean = gradients(kernel, inputs)
        inputs[0][3] = float("nan")
        _, poisoned = gradients(kernel, inputs)
        for i in of_tokens:
            assert torch.equal(poisoned[i][others], clean[i][others])
        assert poisoned[0][3].isnan().all() and poisoned[1].isnan().any()


def test_nan_around_the_tensors_reaches_no_gradient(path, device):
    def wide(t):
        rows, columns = t.shape[0] + 300, t.shape[-1] + 16
        view = t.new_full((rows, *t.shape[1:-1], columns), float("nan"))[150:-150, ..., : t.shape[-1]]
        return view.copy_(t)

    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    out, lse = module._launch_fwd(q, k, v, 0.2, with_lse=True)
    (dout,) = upstream_of([out])
    wanted = module._launch_bwd(q, k, v, out, lse, dout, 0.2, True, True, True)
    got = module._launch_bwd(wide(q), wide(k), wide(v), wide(out), lse, wide(dout), 0.2, True, True, True)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
    x, a, b, residual, num_heads = RAGGED.absorbed_inputs(device, torch.float16)
    p, (dout,) = latent_weights(x, a, num_heads), upstream_of([residual])
    got = module._launch_weights_bwd(p, wide(b), wide(dout), num_heads)
    assert torch.equal(got, module._launch_weights_bwd(p, b, dout, num_heads))


@pytest.mark.parametrize("num_latents", [40, 300])
def test_nan_in_a_head_reaches_no_other_gradient(num_latents, path, device):
    # no piece divides the latents: the last one of a head reaches into the next
    case = LatentCase("heads", 9, num_latents, 2, 16, 24)
    x, a, b, residual, num_heads = case.absorbed_inputs(device, torch.float16)
    p, (dout,) = latent_weights(x, a, num_heads), upstream_of([residual])
    clean = module._launch_weights_bwd(p, b, dout, num_heads)
    b[num_latents:] = float("nan")
    poisoned = module._launch_weights_bwd(p, b, dout, num_heads)
    assert torch.equal(poisoned[:, :num_latents], clean[:, :num_latents])
    assert poisoned[:, num_latents:].isnan().all()


def test_doubling_the_batch_changes_no_gradient_of_a_token(path, device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, *BACKWARD_KERNELS)
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    (dout,) = upstream_of([q])
    dq = gradients(latent_attention, [q, k, v], [dout])[1][0]
    both = gradients(latent_attention, [torch.cat([q, q]), k, v], [torch.cat([dout, dout])])[1][0]
    assert torch.equal(both, torch.cat([dq, dq]))
    x, a, b, residual, num_heads = RAGGED.absorbed_inputs(device, torch.float16)
    p, (dout,) = latent_weights(x, a, num_heads), upstream_of([residual])
    ds = module._launch_weights_bwd(p, b, dout, num_heads)
    both = module._launch_weights_bwd(torch.cat([p, p]), b, torch.cat([dout, dout]), num_heads)
    assert torch.equal(both, torch.cat([ds, ds]))
    for t in (0, 77, 149):
        alone = module._launch_weights_bwd(p[t : t + 1], b, dout[t : t + 1], num_heads)
        assert torch.equal(alone[0], ds[t])
    assert_same_constants(launches)


def test_gradient_of_scores_far_below_zero(path, device):
    # a latent beyond the last would have a score of zero, far above all others: its weight overflows
    q, k, v = RAGGED.direct_inputs(device, torch.float32)
    inputs = [q.abs(), k - 60, v]
    scores = 24**-0.5 * torch.einsum("tnh,lnh->ntl", *inputs[:2])
    assert (-scores.amax(-1)).exp().isinf().any(), "nothing overflows, so this would prove nothing"
    assert_gradient_parity("direct", latent_attention, reference.latent_attention, inputs)
    (x, a, b, residual), kernel, wanted = _absorbed_parts(RAGGED, device, torch.float32)
    assert_gradient_parity("absorbed", kernel, wanted, [x.abs(), a - 60, b, residual])


def test_gradient_of_huge_scores_is_finite(path, device):
    q, k, v = RAGGED.direct_inputs(device, torch.float32)
    _, grads = gradients(latent_attention, [1000 * q, 1000 * k, v])
    (x, a, b, residual), kernel, _ = _absorbed_parts(RAGGED, device, torch.float32)
    _, absorbed = gradients(kernel, [1000 * x, 1000 * a, b, residual])
    assert all(g.isfinite().all() for g in (*grads, *absorbed))


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_gradient_where_a_piece_outweighs_the_others(order, path, device):
    # P is nearly one for a few latents, so that dP - delta cancels there
    num_latents = 1024
    steps = torch.linspace(0, 200, num_latents, device=device)
    g = torch.Generator().manual_seed(0)
    a = torch.zeros(2 * num_latents, 16)
    a[:num_latents, 0] = steps if order == "rising" else steps.flip(0)
    b = torch.randn(2 * num_latents, 16, generator=g) + 4
    x = torch.randn(60, 16, generator=g)
    x[:, 0] = 1
    inputs = [t.to(device).half() for t in (x, a, b, x)]
    assert_gradient_parity(
        order,
        lambda *ts: absorbed_latent_attention(*ts, 2),
        lambda *ts: reference.absorbed_latent_attention(*ts, 2),
        inputs,
    )


def test_no_row_beyond_the_last_is_read_for_a_gradient(path, device):
    def far(rows, step):
        t = torch.from_numpy(np.zeros(rows * step, dtype=np.float16)).as_strided((rows, 16), (step, 1))
        return t.fill_(1).to(device)

    dout, b = far(3, 2**24), far(5, 2**27)
    p = torch.full((3, 5), 0.2, dtype=torch.float16, device=device)
    wanted = module._launch_weights_bwd(p, b.contiguous(), dout.contiguous(), 1)
    assert torch.equal(module._launch_weights_bwd(p, b, dout, 1), wanted)
    q, k = dout[:, None], b[:, None]
    out, lse = module._launch_fwd(q, k, k, 0.25, with_lse=True)
    got = module._launch_bwd(q, k, k, out, lse, q, 0.25, True, True, True)
    near_q, near_k = q.contiguous(), k.contiguous()
    wanted = module._launch_bwd(near_q, near_k, near_k, out, lse, near_q, 0.25, True, True, True)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
