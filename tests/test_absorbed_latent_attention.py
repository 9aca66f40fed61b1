import inspect

import pytest
import torch
from gradients import (
    NoGradient,
    amid,
    assert_compiles,
    assert_gradcheck,
    assert_same_constants,
    far_rows,
    saved_shapes,
    spy_on_launches,
)

from nvembed_fast.kernels import absorbed_latent_attention as module
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.absorbed_latent_attention import _launch_fwd as latent_weights
from nvembed_fast.kernels.absorbed_latent_attention import absorbed_latent_attention
from nvembed_fast.kernels.latent_attention import latent_attention
from nvembed_fast.kernels.testing import (
    LATENT_CASES,
    LatentCase,
    assert_gradient_parity,
    assert_parity,
    gradients,
    honest,
    small,
    upstream_of,
)

HAS_GPU = torch.cuda.is_available()
CASES = small(LATENT_CASES)
# more tokens than a tile; latents, head width and D that no tile divides; more than one piece of latents
RAGGED = LatentCase("ragged", 150, 300, 2, 24, 72)


def _double(args):
    return [t.double() if torch.is_tensor(t) else t for t in args]


def _eager_absorbed(x, a, b, residual, num_heads):
    # the kernel's second product is the library's own; the reference pads it when there are few rows
    return torch.addmm(residual, reference.latent_weights(x, a, num_heads), b)


def _assert_matches(case, device, dtype):
    args = case.absorbed_inputs(device, dtype)
    x, a, _, _, num_heads = args
    (low,) = honest(lambda x, a: reference.latent_weights(x, a, num_heads), (x, a))
    high = reference.latent_weights(x.double(), a.double(), num_heads)
    assert_parity(f"{case.name} weights", latent_weights(x, a, num_heads), low, high)
    (low,) = honest(lambda *tensors: _eager_absorbed(*tensors, num_heads), args[:4])
    high = reference.absorbed_latent_attention(*_double(args))
    assert_parity(case.name, absorbed_latent_attention(*args), low, high)


@pytest.mark.parametrize("case", [*CASES, RAGGED], ids=lambda c: c.name)
def test_matches_reference(case, dtype, path, device):
    _assert_matches(case, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in LATENT_CASES if c.bench], ids=lambda c: c.name)
def test_matches_reference_at_full_size(case, dtype, device):
    _assert_matches(case, device, dtype)


@pytest.mark.parametrize("num_latents", [1, 15, 17, 255, 256, 257, 513])
def test_any_number_of_latents(num_latents, path, device):
    case = LatentCase("latents", 5, num_latents, 2, 16, 16)
    _assert_matches(case, device, torch.float16)


@pytest.mark.parametrize("num_tokens", [127, 128, 129])
def test_around_the_tile_size(num_tokens, path, device):
    case = LatentCase("tokens", num_tokens, 16, 1, 16, 16)
    _assert_matches(case, device, torch.float16)


@pytest.mark.parametrize("width", [1, 8, 77, 128, 129])
def test_any_width(width, path, device):
    case = LatentCase("width", 9, 40, 2, width, width)
    _assert_matches(case, device, torch.float16)


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
    x, a, *_ = RAGGED.absorbed_inputs(device, torch.float32)
    p = latent_weights(1000 * x, 1000 * a, 2)
    # a division of a GPU (div.full) errs by up to 2 units in the last place, as exp2 does
    assert p.isfinite().all() and abs(p.max().item() - 1) <= (2**-21 if HAS_GPU else 0)


def test_nan_in_a_token_stays_there(path, device):
    x, a, b, residual, num_heads = RAGGED.absorbed_inputs(device, torch.float16)
    clean = absorbed_latent_attention(x, a, b, residual, num_heads)
    x[3] = float("nan")
    poisoned = absorbed_latent_attention(x, a, b, residual, num_heads)
    others = torch.arange(len(x), device=device) != 3
    assert torch.equal(poisoned[others], clean[others]) and poisoned[3].isnan().all()


def test_nan_in_a_head_stays_there(path, device):
    # no piece divides 300 latents: the last one of a head reaches into the next
    x, a, *_ = RAGGED.absorbed_inputs(device, torch.float16)
    clean = latent_weights(x, a, 2)
    a[300:] = float("nan")
    poisoned = latent_weights(x, a, 2)
    assert torch.equal(poisoned[:, :300], clean[:, :300]) and poisoned[:, 300:].isnan().all()


def test_nan_around_the_tensors_cannot_matter(path, device):
    x, a, *_ = RAGGED.absorbed_inputs(device, torch.float16)
    assert torch.equal(latent_weights(amid(x), amid(a), 2), latent_weights(x, a, 2))


def test_permuting_latents_changes_nothing(path, device):
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).to(device)
    x, a, *_ = RAGGED.absorbed_inputs(device, torch.float32)
    p = latent_weights(x, a, 2).unflatten(1, (2, 300))
    other = latent_weights(x, a.unflatten(0, (2, 300))[:, order].flatten(0, 1), 2).unflatten(1, (2, 300))
    torch.testing.assert_close(other, p[..., order], rtol=1e-5, atol=1e-7)


def test_doubling_the_batch_changes_no_row(path, device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, "_absorbed_latent_attention_fwd_kernel")
    x, a, *_ = RAGGED.absorbed_inputs(device, torch.float16)
    once = latent_weights(x, a, 2)
    assert torch.equal(latent_weights(torch.cat([x, x]), a, 2), torch.cat([once, once]))
    assert_same_constants(launches)


def test_a_token_alone_has_the_same_bits(path, device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, "_absorbed_latent_attention_fwd_kernel")
    x, a, *_ = RAGGED.absorbed_inputs(device, torch.float16)
    for t in (0, 77, 149):
        assert torch.equal(latent_weights(x[t : t + 1], a, 2)[0], latent_weights(x, a, 2)[t])
    assert_same_constants(launches)


def test_no_tokens(path, device):
    x, a, b, residual, num_heads = RAGGED.absorbed_inputs(device, torch.float16)
    assert latent_weights(x[:0], a, num_heads).shape == (0, 600)
    assert absorbed_latent_attention(x[:0], a, b, residual[:0], num_heads).shape == (0, 72)


def test_scores_far_below_zero(path, device):
    # exp2 of each alone is zero: only the running maximum keeps them apart
    x, a, *_ = RAGGED.absorbed_inputs(device, torch.float32)
    args = (x.abs(), a - 60, 2)
    (low,) = honest(lambda x, a: reference.latent_weights(x, a, 2), args[:2])
    assert_parity("weights", latent_weights(*args), low, reference.latent_weights(*_double(args)))


def test_no_row_beyond_the_last_is_read(path, device):
    x, a = far_rows(3, 2**24, device), far_rows(5, 2**27, device)
    assert torch.equal(latent_weights(x, a, 1), latent_weights(x.contiguous(), a.contiguous(), 1))


def test_signature_is_the_reference_signature():
    wanted = inspect.signature(reference.absorbed_latent_attention)
    assert inspect.signature(absorbed_latent_attention) == wanted


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
def test_rejects(change, message, device):
    with pytest.raises(ValueError, match=message):
        absorbed_latent_attention(*change(*RAGGED.absorbed_inputs(device, torch.float16)))


def _parts(case, device, dtype):
    """(inputs, kernel, reference), the number of heads bound."""
    *inputs, num_heads = case.absorbed_inputs(device, dtype)

    def kernel(x, a, b, residual):
        return absorbed_latent_attention(x, a, b, residual, num_heads)

    def wanted(x, a, b, residual):
        return reference.absorbed_latent_attention(x, a, b, residual, num_heads)

    return inputs, kernel, wanted


def _assert_gradients_match(case, device, dtype, **kwargs):
    inputs, kernel, wanted = _parts(case, device, dtype)
    assert_gradient_parity(case.name, kernel, wanted, inputs, **kwargs)


SMALLEST = LatentCase("smallest", 3, 5, 2, 8, 8)
BACKWARD_KERNEL = "_absorbed_latent_attention_bwd_kernel"


@pytest.mark.parametrize("case", [*CASES, RAGGED], ids=lambda c: c.name)
def test_gradient_matches_reference(case, dtype, path, device):
    _assert_gradients_match(case, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in LATENT_CASES if c.bench], ids=lambda c: c.name)
def test_gradient_matches_reference_at_full_size(case, dtype, device):
    part = LatentCase(case.name, 4101, case.num_latents, case.num_heads, case.head_width, case.width)
    _assert_gradients_match(part, device, dtype)


@pytest.mark.parametrize("num_latents", [1, 15, 17, 255, 256, 257, 513])
def test_gradient_of_any_number_of_latents(num_latents, path, device):
    _assert_gradients_match(LatentCase("latents", 9, num_latents, 2, 16, 16), device, torch.float16)


@pytest.mark.parametrize("num_tokens", [127, 128, 129])
def test_gradient_around_the_tile_size(num_tokens, path, device):
    _assert_gradients_match(LatentCase("tokens", num_tokens, 16, 1, 16, 16), device, torch.float16)


@pytest.mark.parametrize("width", [1, 8, 77, 128, 129])
def test_gradient_of_any_width(width, path, device):
    _assert_gradients_match(LatentCase("width", 60, 100, 2, width, width), device, torch.float16)


def test_gradient_of_a_strided_upstream(path, device):
    _assert_gradients_match(RAGGED, device, torch.float16, contiguous=False)


def test_gradient_of_an_expanded_upstream(path, device):
    inputs, kernel, _ = _parts(RAGGED, device, torch.float16)
    leaves = [t.clone().requires_grad_() for t in inputs]
    kernel(*leaves).sum().backward()
    ones = torch.ones_like(inputs[3])
    for leaf, grad in zip(leaves, gradients(kernel, inputs, [ones])[1], strict=True):
        assert torch.equal(leaf.grad, grad)


def test_gradient_by_descriptors_only_where_they_can_be_made(path, device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, BACKWARD_KERNEL)
    inputs, kernel, _ = _parts(RAGGED, device, torch.float16)
    (dout,) = upstream_of([inputs[3]])
    odd = dout.new_zeros(*dout.shape[:-1], dout.shape[-1] + 1)[..., :-1].copy_(dout)
    shifted = dout.new_zeros(dout.numel() + 1)[1:].view(dout.shape).copy_(dout)
    base, *others = (gradients(kernel, inputs, [upstream])[1] for upstream in (dout, odd, shifted))
    for other in others:
        for one, two in zip(base, other, strict=True):
            torch.testing.assert_close(two, one, rtol=5e-3, atol=5e-3)
    if not HAS_GPU:
        used = [arguments["USE_TMA"] for _, arguments in launches]
        assert used == [path == 90, False, False]


def test_gradient_of_strided_inputs(path, device):
    # a b whose rows do not lie in one piece
    (x, a, b, residual), kernel, wanted = _parts(RAGGED, device, torch.float16)
    turned = [x, a, b.t().contiguous(), residual]
    assert_gradient_parity(
        "absorbed",
        lambda x, a, b, r: kernel(x, a, b.t(), r),
        lambda x, a, b, r: wanted(x, a, b.t(), r),
        turned,
    )


FROZEN = [(0,), (1,), (2,), (3,), (0, 1), (0, 1, 3), (1, 2, 3), (0, 2, 3), (0, 1, 2)]


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_frozen_inputs(frozen, device):
    inputs, kernel, _ = _parts(RAGGED, device, torch.float16)
    _, grads = gradients(kernel, inputs, frozen=frozen)
    _, every = gradients(kernel, inputs)
    for i, (got, wanted) in enumerate(zip(grads, every, strict=True)):
        assert got is None if i in frozen else torch.equal(got, wanted)


def test_nothing_is_computed_or_saved_for_frozen_inputs(device, monkeypatch):
    inputs, kernel, _ = _parts(RAGGED, device, torch.float16)
    rows, scores, weights = (150, 72), (150, 600), (600, 72)
    assert saved_shapes(kernel, inputs, frozen=(0, 1, 2)) == []
    assert saved_shapes(kernel, inputs, frozen=(0, 1)) == [scores]
    assert saved_shapes(kernel, inputs, frozen=(0,)) == [rows, weights, scores]
    assert saved_shapes(kernel, inputs, frozen=(1,)) == [weights, weights, scores]
    monkeypatch.setattr(module, BACKWARD_KERNEL, None)
    gradients(kernel, inputs, frozen=(0, 1))
    gradients(kernel, inputs, frozen=(0, 1, 2))


def test_gradcheck(device):
    inputs, kernel, _ = _parts(SMALLEST, device, torch.float32)
    assert_gradcheck(kernel, inputs)


def test_the_same_bits_twice(path, device):
    inputs, kernel, _ = _parts(RAGGED, device, torch.float16)
    for one, other in zip(gradients(kernel, inputs)[1], gradients(kernel, inputs)[1], strict=True):
        assert torch.equal(one, other)


def test_compiles_as_one_graph(device):
    inputs, kernel, _ = _parts(RAGGED, device, torch.float32)
    assert_compiles(kernel, inputs)


def test_opcheck(device):
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
    (x, a, b, residual), kernel, _ = _parts(RAGGED, device, torch.float16)
    _, (dx, da, db, dresidual) = gradients(kernel, [x[:0], a, b, residual[:0]])
    assert dx.shape == dresidual.shape == (0, 72)
    assert da.shape == db.shape == a.shape and not da.any() and not db.any()


def test_one_tensor_in_two_places(path, device):
    (x, a, _, _), kernel, wanted = _parts(RAGGED, device, torch.float32)
    assert_gradient_parity(
        "absorbed",
        lambda x, a: kernel(x, a, a, x) + kernel(x, a, a, x),
        lambda x, a: wanted(x, a, a, x) + wanted(x, a, a, x),
        [x, a],
    )


def test_no_upstream_gives_no_gradient(device):
    inputs, kernel, _ = _parts(SMALLEST, device, torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    NoGradient.apply(kernel(*leaves)).sum().backward()
    assert all(leaf.grad is None for leaf in leaves)


def test_nan_in_a_token_reaches_no_other_gradient(path, device):
    others = torch.arange(RAGGED.num_tokens, device=device) != 3
    inputs, kernel, _ = _parts(RAGGED, device, torch.float16)
    _, clean = gradients(kernel, inputs)
    inputs[0][3] = float("nan")
    _, poisoned = gradients(kernel, inputs)
    for i in (0, 3):
        assert torch.equal(poisoned[i][others], clean[i][others])
    assert poisoned[0][3].isnan().all() and poisoned[1].isnan().any()


def test_nan_around_the_tensors_reaches_no_gradient(path, device):
    x, a, b, residual, num_heads = RAGGED.absorbed_inputs(device, torch.float16)
    p, (dout,) = latent_weights(x, a, num_heads), upstream_of([residual])
    got = module._launch_bwd(p, amid(b), amid(dout), num_heads)
    assert torch.equal(got, module._launch_bwd(p, b, dout, num_heads))


@pytest.mark.parametrize("num_latents", [40, 300])
def test_nan_in_a_head_reaches_no_other_gradient(num_latents, path, device):
    # no piece divides the latents: the last one of a head reaches into the next
    case = LatentCase("heads", 9, num_latents, 2, 16, 24)
    x, a, b, residual, num_heads = case.absorbed_inputs(device, torch.float16)
    p, (dout,) = latent_weights(x, a, num_heads), upstream_of([residual])
    clean = module._launch_bwd(p, b, dout, num_heads)
    b[num_latents:] = float("nan")
    poisoned = module._launch_bwd(p, b, dout, num_heads)
    assert torch.equal(poisoned[:, :num_latents], clean[:, :num_latents])
    assert poisoned[:, num_latents:].isnan().all()


def test_doubling_the_batch_changes_no_gradient_of_a_token(path, device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, BACKWARD_KERNEL)
    x, a, b, residual, num_heads = RAGGED.absorbed_inputs(device, torch.float16)
    p, (dout,) = latent_weights(x, a, num_heads), upstream_of([residual])
    ds = module._launch_bwd(p, b, dout, num_heads)
    both = module._launch_bwd(torch.cat([p, p]), b, torch.cat([dout, dout]), num_heads)
    assert torch.equal(both, torch.cat([ds, ds]))
    for t in (0, 77, 149):
        alone = module._launch_bwd(p[t : t + 1], b, dout[t : t + 1], num_heads)
        assert torch.equal(alone[0], ds[t])
    assert_same_constants(launches)


def test_gradient_of_scores_far_below_zero(path, device):
    (x, a, b, residual), kernel, wanted = _parts(RAGGED, device, torch.float32)
    assert_gradient_parity("absorbed", kernel, wanted, [x.abs(), a - 60, b, residual])


def test_gradient_of_huge_scores_is_finite(path, device):
    (x, a, b, residual), kernel, _ = _parts(RAGGED, device, torch.float32)
    _, grads = gradients(kernel, [1000 * x, 1000 * a, b, residual])
    assert all(g.isfinite().all() for g in grads)


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
    dout, b = far_rows(3, 2**24, device), far_rows(5, 2**27, device)
    p = torch.full((3, 5), 0.2, dtype=torch.float16, device=device)
    wanted = module._launch_bwd(p, b.contiguous(), dout.contiguous(), 1)
    assert torch.equal(module._launch_bwd(p, b, dout, 1), wanted)
