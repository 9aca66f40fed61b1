import dataclasses
import inspect

import numpy as np
import pytest
import torch
from gradients import (
    NoGradient,
    amid,
    assert_compiles,
    assert_gradcheck,
    assert_only_rounding,
    assert_same_constants,
    far_rows,
    saved_shapes,
    spy_on_launches,
)

from nvembed_fast.kernels import latent_attention as module
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.latent_attention import latent_attention
from nvembed_fast.kernels.testing import (
    LATENT_CASES,
    LatentCase,
    assert_gradient_parity,
    assert_parity,
    gradients,
    honest,
    latent_attention_gradients,
    small,
    upstream_of,
)

HAS_GPU = torch.cuda.is_available()
CASES = small(LATENT_CASES)
# more tokens than a tile; latents, head width and D that no tile divides; more than one piece of latents
RAGGED = LatentCase("ragged", 150, 300, 2, 24, 72)


def _double(args):
    return [t.double() if torch.is_tensor(t) else t for t in args]


def _assert_direct_matches(case, device, dtype, **kwargs):
    args = case.direct_inputs(device, dtype)
    (low,) = honest(lambda *qkv: reference.latent_attention(*qkv, **kwargs), args)
    high = reference.latent_attention(*_double(args), **kwargs)
    assert_parity(case.name, latent_attention(*args, **kwargs), low, high)


@pytest.mark.parametrize("case", [*CASES, RAGGED], ids=lambda c: c.name)
def test_matches_reference(case, dtype, path, device):
    _assert_direct_matches(case, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in LATENT_CASES if c.bench], ids=lambda c: c.name)
def test_matches_reference_at_full_size(case, dtype, device):
    _assert_direct_matches(case, device, dtype)


@pytest.mark.parametrize("num_latents", [1, 15, 17, 255, 256, 257, 513])
def test_any_number_of_latents(num_latents, path, device):
    case = LatentCase("latents", 5, num_latents, 2, 16, 16)
    _assert_direct_matches(case, device, torch.float16)


@pytest.mark.parametrize("num_tokens", [127, 128, 129])
def test_around_the_tile_size(num_tokens, path, device):
    case = LatentCase("tokens", num_tokens, 16, 1, 16, 16)
    _assert_direct_matches(case, device, torch.float16)


# a width whose rows no descriptor can step over falls back to pointers
@pytest.mark.parametrize("width", [1, 8, 77, 128, 129])
def test_any_width(width, path, device):
    case = LatentCase("width", 9, 40, 2, width, width)
    _assert_direct_matches(case, device, torch.float16)


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


def test_huge_scores_stay_finite(path, device):
    q, k, v = RAGGED.direct_inputs(device, torch.float32)
    assert latent_attention(1000 * q, 1000 * k, v).isfinite().all()


def test_nan_in_a_token_stays_there(path, device):
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    clean = latent_attention(q, k, v)
    q[3] = float("nan")
    poisoned = latent_attention(q, k, v)
    others = torch.arange(len(q), device=device) != 3
    assert torch.equal(poisoned[others], clean[others]) and poisoned[3].isnan().all()


def test_nan_around_the_tensors_cannot_matter(path, device):
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    assert torch.equal(latent_attention(amid(q), amid(k), amid(v)), latent_attention(q, k, v))


def test_permuting_latents_changes_nothing(path, device):
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).to(device)
    q, k, v = RAGGED.direct_inputs(device, torch.float32)
    torch.testing.assert_close(
        latent_attention(q, k[order], v[order]), latent_attention(q, k, v), rtol=1e-5, atol=1e-6
    )


def test_doubling_the_batch_changes_no_row(path, device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, "_latent_attention_fwd_kernel")
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    once = latent_attention(q, k, v)
    assert torch.equal(latent_attention(torch.cat([q, q]), k, v), torch.cat([once, once]))
    assert_same_constants(launches)


def test_a_token_alone_has_the_same_bits(path, device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, "_latent_attention_fwd_kernel")
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    for t in (0, 77, 149):
        assert torch.equal(latent_attention(q[t : t + 1], k, v)[0], latent_attention(q, k, v)[t])
    assert_same_constants(launches)


def test_no_tokens(path, device):
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    assert latent_attention(q[:0], k, v).shape == (0, 2, 24)


def test_scores_far_below_zero(path, device):
    # exp2 of each alone is zero: only the running maximum keeps them apart
    q, k, v = RAGGED.direct_inputs(device, torch.float32)
    args = (q.abs(), k - 60, v)
    (low,) = honest(reference.latent_attention, args)
    assert_parity("direct", latent_attention(*args), low, reference.latent_attention(*_double(args)))


def test_no_row_beyond_the_last_is_read(path, device):
    q, k = far_rows(3, 2**24, device)[:, None], far_rows(5, 2**27, device)[:, None]
    assert torch.equal(
        latent_attention(q, k, k), latent_attention(q.contiguous(), k.contiguous(), k.contiguous())
    )


def test_descriptors_reach_rows_of_whole_16_bytes():
    t = torch.zeros(4, 3, 24, dtype=torch.float16)
    assert module.use_descriptors(90, t, t[1:], t[:, 1:], t[..., 8:])
    assert not module.use_descriptors(90, t, t[..., 4:])  # starts in between
    assert not module.use_descriptors(90, t, torch.zeros(4, 3, 20, dtype=torch.float16))  # steps in between
    by_descriptors = [sm for sm in (80, 86, 89, 90, 100, 103, 110, 120, 121) if module.use_descriptors(sm)]
    assert by_descriptors == [90, 100]


def test_signature_is_the_reference_signature():
    assert inspect.signature(latent_attention) == inspect.signature(reference.latent_attention)


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
def test_rejects(change, message, device):
    with pytest.raises(ValueError, match=message):
        latent_attention(*change(*RAGGED.direct_inputs(device, torch.float16)))


def _assert_gradients_match(case, device, dtype, **kwargs):
    inputs = case.direct_inputs(device, dtype)
    assert_gradient_parity(case.name, latent_attention, reference.latent_attention, inputs, **kwargs)


BACKWARD_KERNELS = [
    "_latent_attention_bwd_dq_kernel",
    "_latent_attention_bwd_dkv_kernel",
]
SMALLEST = LatentCase("smallest", 3, 5, 2, 8, 8)
WIDE = LatentCase("wide", 20, 40, 3, module.MAX_HEAD_WIDTH + 8, 16)


# one token of four heads has four softmax denominators, whose rounding would be luck
GRADIENT_CASES = [dataclasses.replace(CASES[0], num_heads=32), *CASES[1:], RAGGED]


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda c: c.name)
def test_gradient_matches_reference(case, dtype, path, device):
    _assert_gradients_match(case, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in LATENT_CASES if c.bench], ids=lambda c: c.name)
def test_gradient_matches_reference_at_full_size(case, dtype, device):
    # enough tokens for two chunks and a bit
    part = LatentCase(
        case.name, 2 * module.CHUNK + 5, case.num_latents, case.num_heads, case.head_width, case.width
    )
    _assert_gradients_match(part, device, dtype)


@pytest.mark.parametrize("num_latents", [15, 17, 255, 256, 257, 513])
def test_gradient_of_any_number_of_latents(num_latents, path, device):
    _assert_gradients_match(LatentCase("latents", 9, num_latents, 2, 16, 16), device, torch.float16)


def test_gradient_of_one_latent(path, device):
    inputs = LatentCase("latents", 9, 1, 2, 16, 16).direct_inputs(device, torch.float16)
    dv = assert_only_rounding(latent_attention, inputs)
    upstream = upstream_of([inputs[0]])
    low, high = (
        gradients(reference.latent_attention, tensors, upstream)[1] for tensors in (inputs, _double(inputs))
    )
    assert_parity("dv", dv, low[2], high[2])


@pytest.mark.parametrize("num_tokens", [127, 128, 129])
def test_gradient_around_the_tile_size(num_tokens, path, device):
    _assert_gradients_match(LatentCase("tokens", num_tokens, 16, 1, 16, 16), device, torch.float16)


@pytest.mark.parametrize("width", [1, 8, 77, 128, 129])
def test_gradient_of_any_width(width, path, device):
    _assert_gradients_match(LatentCase("width", 60, 100, 2, width, width), device, torch.float16)


def test_gradient_scales(path, device):
    def scaled(function):
        return lambda q, k, v: function(q, k, v, scale=0.5)

    inputs = RAGGED.direct_inputs(device, torch.float16)
    assert_gradient_parity("scale", scaled(latent_attention), scaled(reference.latent_attention), inputs)


@pytest.mark.parametrize("num_tokens", [128, 150])
def test_chunks_of_tokens_are_added(num_tokens, dtype, path, device, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 64)
    _assert_gradients_match(LatentCase("chunks", num_tokens, 40, 2, 24, 16), device, dtype)


def test_every_tile_of_tokens_divides_a_chunk():
    for sm in (80, 86, 90, 120):
        for dtype in (torch.float16, torch.float32):
            for width in (1, 64, 65, 128, 129, module.MAX_HEAD_WIDTH):
                config = module._bwd_launch_config("dkv", 512, width, capability=sm, dtype=dtype)
                assert module.CHUNK % config["BLOCK_T"] == 0 == 64 % config["BLOCK_T"]


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_gradient_of_wide_heads(chunk, dtype, device, monkeypatch):
    monkeypatch.setattr(module, "_latent_attention_bwd_dq_kernel", None)
    monkeypatch.setattr(module, "_latent_attention_bwd_dkv_kernel", None)
    monkeypatch.setattr(module, "MAX_SCORES", chunk * WIDE.num_heads * WIDE.num_latents)
    _assert_gradients_match(WIDE, device, dtype)
    q, k, v = WIDE.direct_inputs(device, dtype)
    _, grads = gradients(latent_attention, (q, k, v))
    assert all(g.is_contiguous() for g in grads)
    _, (dq, dk, dv) = gradients(latent_attention, (q[:0], k, v))
    assert dq.shape == (0, 3, 264) and not dk.any() and not dv.any()


def test_gradient_of_a_strided_upstream(path, device):
    _assert_gradients_match(RAGGED, device, torch.float16, contiguous=False)


def test_gradient_of_an_expanded_upstream(path, device):
    inputs = RAGGED.direct_inputs(device, torch.float16)
    leaves = [t.clone().requires_grad_() for t in inputs]
    latent_attention(*leaves).sum().backward()
    ones = torch.ones_like(inputs[0])
    for leaf, grad in zip(leaves, gradients(latent_attention, inputs, [ones])[1], strict=True):
        assert torch.equal(leaf.grad, grad)


def test_gradient_by_descriptors_only_where_they_can_be_made(path, device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, *BACKWARD_KERNELS)
    inputs = RAGGED.direct_inputs(device, torch.float16)
    (dout,) = upstream_of([inputs[0]])
    odd = dout.new_zeros(*dout.shape[:-1], dout.shape[-1] + 1)[..., :-1].copy_(dout)
    shifted = dout.new_zeros(dout.numel() + 1)[1:].view(dout.shape).copy_(dout)
    base, *others = (gradients(latent_attention, inputs, [upstream])[1] for upstream in (dout, odd, shifted))
    for other in others:
        for one, two in zip(base, other, strict=True):
            torch.testing.assert_close(two, one, rtol=5e-3, atol=5e-3)
    if not HAS_GPU:
        used = [arguments["USE_TMA"] for _, arguments in launches]
        assert used == [path == 90] * 2 + [False] * 4


def test_gradient_of_strided_inputs(path, device):
    # rows that no descriptor can step over
    q, k, v = (torch.cat([t, t[..., :1]], dim=-1) for t in RAGGED.direct_inputs(device, torch.float16))
    views = lambda *ts: latent_attention(*(t[..., :-1] for t in ts))  # noqa: E731
    wanted = lambda *ts: reference.latent_attention(*(t[..., :-1] for t in ts))  # noqa: E731
    assert_gradient_parity("direct", views, wanted, [q, k, v])


FROZEN = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
@pytest.mark.parametrize("case", [RAGGED, WIDE], ids=lambda c: c.name)
def test_frozen_inputs(case, frozen, device):
    inputs = case.direct_inputs(device, torch.float16)
    _, grads = gradients(latent_attention, inputs, frozen=frozen)
    _, every = gradients(latent_attention, inputs)
    for i, (got, wanted) in enumerate(zip(grads, every, strict=True)):
        assert got is None if i in frozen else torch.equal(got, wanted)


def test_nothing_is_computed_or_saved_for_frozen_inputs(device, monkeypatch):
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    q_shape, k_shape, lse = (150, 2, 24), (300, 2, 24), (2, 150)
    assert saved_shapes(latent_attention, [q, k, v], frozen=(0, 1)) == [q_shape, k_shape, k_shape, lse]
    assert saved_shapes(latent_attention, [q, k, v], frozen=(1, 2)) == [
        q_shape,
        k_shape,
        k_shape,
        q_shape,
        lse,
    ]
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


@pytest.mark.parametrize("case", [SMALLEST, LatentCase("wide", 2, 3, 1, 264, 8)], ids=lambda c: c.name)
def test_gradcheck(case, device):
    assert_gradcheck(latent_attention, case.direct_inputs(device, torch.float32))


def test_the_same_bits_twice(path, device, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 64)
    inputs = RAGGED.direct_inputs(device, torch.float16)
    both = (gradients(latent_attention, inputs)[1] for _ in range(2))
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", [RAGGED, WIDE], ids=lambda c: c.name)
def test_compiles_as_one_graph(case, device):
    assert_compiles(latent_attention, case.direct_inputs(device, torch.float32))


@pytest.mark.parametrize("case", [SMALLEST, LatentCase("wide", 2, 3, 1, 264, 8)], ids=lambda c: c.name)
def test_opcheck(case, device):
    ops = torch.ops.nvembed_fast
    q, k, v = (t.requires_grad_() for t in case.direct_inputs(device, torch.float32))
    torch.library.opcheck(ops.latent_attention, (q, k, v, 0.5, True))
    out, lse = (t.detach() for t in ops.latent_attention(q, k, v, 0.5, True))
    saved = [t.detach() for t in (q, k, v)]
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        kept = out if any(needs[:2]) else None
        torch.library.opcheck(ops.latent_attention_bwd, (*saved, kept, lse, out, 0.5, *needs))
    torch.library.opcheck(ops.latent_attention, (*saved, 0.5, False))


def test_gradient_of_no_tokens(path, device):
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    _, (dq, dk, dv) = gradients(latent_attention, [q[:0], k, v])
    assert dq.shape == (0, 2, 24) and dk.shape == dv.shape == k.shape and not dk.any() and not dv.any()


def test_one_tensor_in_two_places(path, device):
    q, k, _ = RAGGED.direct_inputs(device, torch.float32)

    def twice(function):
        return lambda q, k: function(q, k, k) + function(q, k, q[:1].expand_as(k))

    def low(inputs, upstream):
        q, k = inputs
        dq, *dk = latent_attention_gradients([q, k, k], upstream)
        # here all values are one: dP - delta is the rounding of two equal sums, in eager of one
        dq_2, dk_2, dv_2 = latent_attention_gradients([q, k, q[:1].expand_as(k)], upstream)
        dq_2[0] += dv_2.sum(0)
        return [dq + dq_2, sum(dk) + dk_2]

    assert_gradient_parity("direct", twice(latent_attention), twice(reference.latent_attention), [q, k], low)


def test_no_upstream_gives_no_gradient(device):
    leaves = [t.requires_grad_() for t in SMALLEST.direct_inputs(device, torch.float32)]
    NoGradient.apply(latent_attention(*leaves)).sum().backward()
    assert all(leaf.grad is None for leaf in leaves)


def test_nan_in_a_token_reaches_no_other_gradient(path, device):
    others = torch.arange(RAGGED.num_tokens, device=device) != 3
    inputs = RAGGED.direct_inputs(device, torch.float16)
    _, clean = gradients(latent_attention, inputs)
    inputs[0][3] = float("nan")
    _, poisoned = gradients(latent_attention, inputs)
    assert torch.equal(poisoned[0][others], clean[0][others])
    assert poisoned[0][3].isnan().all() and poisoned[1].isnan().any()


def test_nan_around_the_tensors_reaches_no_gradient(path, device):
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    out, lse = module._launch_fwd(q, k, v, 0.2, with_lse=True)
    (dout,) = upstream_of([out])
    wanted = module._launch_bwd(q, k, v, out, lse, dout, 0.2, True, True, True)
    got = module._launch_bwd(amid(q), amid(k), amid(v), amid(out), lse, amid(dout), 0.2, True, True, True)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


def test_doubling_the_batch_changes_no_gradient_of_a_token(path, device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, *BACKWARD_KERNELS)
    q, k, v = RAGGED.direct_inputs(device, torch.float16)
    (dout,) = upstream_of([q])
    dq = gradients(latent_attention, [q, k, v], [dout])[1][0]
    both = gradients(latent_attention, [torch.cat([q, q]), k, v], [torch.cat([dout, dout])])[1][0]
    assert torch.equal(both, torch.cat([dq, dq]))
    assert_same_constants(launches)


def test_gradient_of_scores_far_below_zero(path, device):
    # a latent beyond the last would have a score of zero, far above all others: its weight overflows
    q, k, v = RAGGED.direct_inputs(device, torch.float32)
    inputs = [q.abs(), k - 60, v]
    scores = 24**-0.5 * torch.einsum("tnh,lnh->ntl", *inputs[:2])
    assert (-scores.amax(-1)).exp().isinf().any(), "nothing overflows, so this would prove nothing"
    assert_gradient_parity("direct", latent_attention, reference.latent_attention, inputs)


def test_gradient_of_huge_scores_is_finite(path, device):
    q, k, v = RAGGED.direct_inputs(device, torch.float32)
    _, grads = gradients(latent_attention, [1000 * q, 1000 * k, v])
    assert all(g.isfinite().all() for g in grads)


def test_no_row_beyond_the_last_is_read_for_a_gradient(path, device):
    q, k = far_rows(3, 2**24, device)[:, None], far_rows(5, 2**27, device)[:, None]
    out, lse = module._launch_fwd(q, k, k, 0.25, with_lse=True)
    got = module._launch_bwd(q, k, k, out, lse, q, 0.25, True, True, True)
    near_q, near_k = q.contiguous(), k.contiguous()
    wanted = module._launch_bwd(near_q, near_k, near_k, out, lse, near_q, 0.25, True, True, True)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
