import inspect

import numpy as np
import pytest
import torch

from nvembed_fast.kernels import latent_attention as module
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.latent_attention import absorbed_latent_attention, latent_attention, latent_weights
from nvembed_fast.kernels.testing import LATENT_CASES, LatentCase, assert_parity, small

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


def test_doubling_the_batch_changes_no_row(path, device):
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    once = latent_attention(q, k, v)
    assert torch.equal(latent_attention(torch.cat([q, q]), k, v), torch.cat([once, once]))
    x, a, *_ = RAGGED.absorbed_inputs(device, torch.float16)
    once = latent_weights(x, a, 2)
    assert torch.equal(latent_weights(torch.cat([x, x]), a, 2), torch.cat([once, once]))


def test_a_token_alone_has_the_same_bits(path, device):
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    x, a, *_ = RAGGED.absorbed_inputs(device, torch.float16)
    for t in (0, 77, 149):
        assert torch.equal(latent_attention(q[t : t + 1], k, v)[0], latent_attention(q, k, v)[t])
        assert torch.equal(latent_weights(x[t : t + 1], a, 2)[0], latent_weights(x, a, 2)[t])


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


@pytest.mark.parametrize("name", ["latent_attention", "latent_weights", "absorbed_latent_attention"])
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
            lambda x, a, b, r, n: (x, torch.cat([a, a]), b, r, 1),
            "a must have at most 1024 latents for this kernel, got 1200",
        ),
        (lambda x, a, b, r, n: (x, a, b[:-1], r, n), r"^b must be \(600, 72\) torch.float16 on"),
        (lambda x, a, b, r, n: (x, a, b, r[:1], n), r"^residual must be \(150, 72\) torch.float16 on"),
    ],
)
def test_absorbed_rejects(change, message, device):
    with pytest.raises(ValueError, match=message):
        absorbed_latent_attention(*change(*RAGGED.absorbed_inputs(device, torch.float16)))
