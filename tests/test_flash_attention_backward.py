"""The gradients of flash attention. Its forward is in test_flash_attention.py."""

import dataclasses

import pytest
import torch
from gradients import assert_compiles, assert_gradcheck, assert_same_constants, spy_on_launches

from nvembed_fast.kernels import flash_attention as module
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.flash_attention import flash_attention
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.kernels.testing import (
    ATTENTION_CASES,
    AttentionCase,
    assert_gradient_parity,
    attention_gradients,
    gradients,
    small,
    upstream_of,
)

HAS_GPU = torch.cuda.is_available()

CASES = small(ATTENTION_CASES)
# several tiles of keys on either path, an empty sequence, a group padded from three heads to four
PACK = AttentionCase("pack", (150, 7, 0, 1, 33), 6, 2, 32)
# for what does not depend on the number of tiles
SHORT = AttentionCase("short", (20, 7, 0, 1), 6, 2, 32)


# one token alone has no gradient but rounding, so there are many of them: one would be judged by luck
GRADIENT_CASES = [dataclasses.replace(CASES[0], lengths=(1,) * 40), *CASES[1:]]


def _bound(function, layout, causal=False):
    """function of (q, k, v) alone, with both outputs."""
    return lambda q, k, v: function(q, k, v, layout, causal=causal, return_lse=True)


def _check_gradients(case, dtype, device, **kwargs):
    *inputs, layout = case.inputs(device, dtype)
    kernel, wanted = (_bound(f, layout, case.causal) for f in (flash_attention, reference.flash_attention))
    low = None
    # of a token that sees only itself, dP - delta is the rounding of two equal sums, in eager of one
    if dtype != torch.float32 or max(case.lengths) == 1:

        def low(tensors, upstream):
            return attention_gradients(tensors, upstream, layout, case.causal)

    assert_gradient_parity(case.name, kernel, wanted, inputs, low, **kwargs)


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda c: c.name)
def test_gradients_match_the_reference(case, dtype, path, device):
    _check_gradients(case, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in ATTENTION_CASES if c.bench], ids=lambda c: c.name)
def test_gradients_match_the_reference_at_full_length(case, dtype, device):
    _check_gradients(
        dataclasses.replace(case, num_heads=8, num_kv_heads=2, lengths=case.lengths[:2]), dtype, device
    )


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_match_the_reference_over_several_tiles(causal, path, device):
    _check_gradients(dataclasses.replace(PACK, causal=causal), torch.float16, device)


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129])
def test_gradients_match_the_reference_around_the_tile_size(length, path, device):
    for causal in (False, True):
        _check_gradients(AttentionCase("edge", (length,), 2, 2, 16, causal=causal), torch.float16, device)


@pytest.mark.parametrize("group", [1, 5, 64])
def test_gradients_of_any_group_size(group, path, device):
    _check_gradients(AttentionCase("group", (9, 4), 2 * group, 2, 16), torch.float16, device)


def test_gradients_of_a_strided_upstream(path, device):
    _check_gradients(PACK, torch.float16, device, contiguous=False)


def test_gradients_of_one_token_alone(path, device):
    """q and k have none but the rounding of dP - delta: see `test_gradient_of_one_latent` for its bound."""
    *inputs, layout = AttentionCase("one", (1,), 2, 2, 16).inputs(device, torch.float16)
    q, k, v = (t.double() for t in inputs)
    _, (dq, dk, dv) = gradients(
        lambda *t: flash_attention(*t, layout), inputs, upstream := upstream_of([inputs[0]])
    )
    (dout,) = upstream
    assert torch.equal(dv, dout)
    half, single = torch.finfo(torch.float16), torch.finfo(torch.float32)
    relative, absolute = 1 + 2 * half.eps, half.smallest_normal * half.eps
    ds = relative * 16 * single.eps * (dout.double() * v).abs().sum(-1, keepdim=True) + absolute
    for grad, other in ((dq, k), (dk, q)):
        assert (grad.abs() <= relative * 16**-0.5 * ds * other.abs() + absolute).all()


@pytest.mark.parametrize("scale", [0.1, 0.3])
def test_scale_is_used_in_the_gradients(scale, path, device):
    *inputs, layout = SHORT.inputs(device, torch.float32)
    kernel, wanted = (
        lambda q, k, v, f=f: f(q, k, v, layout, scale=scale)
        for f in (flash_attention, reference.flash_attention)
    )
    assert_gradient_parity("scale", kernel, wanted, inputs)


@pytest.mark.parametrize("used", ["out", "lse"])
def test_one_of_two_outputs_is_used(used, path, device):
    *inputs, layout = SHORT.inputs(device, torch.float32)
    pick, frozen = (0, ()) if used == "out" else (1, (2,))  # the lse does not depend on v
    kernel, wanted = (
        lambda *t, f=f: _bound(f, layout)(*t)[pick] for f in (flash_attention, reference.flash_attention)
    )
    assert_gradient_parity(used, kernel, wanted, inputs, frozen=frozen)


BACKWARD_KERNELS = [f"_flash_attention_bwd_{name}_kernel" for name in ("delta", "dq", "dkv")]


def test_gradients_by_descriptors_only_where_they_can_be_made(path, device, monkeypatch):
    *inputs, layout = PACK.inputs(device, torch.float16)
    launches = spy_on_launches(monkeypatch, module, *BACKWARD_KERNELS[1:])

    def kernel(*tensors):
        return flash_attention(*tensors, layout)

    (dout,) = upstream_of([kernel(*inputs)])
    odd = dout.new_zeros(*dout.shape[:2], dout.shape[2] + 1)[..., :-1].copy_(dout)
    shifted = dout.new_zeros(dout.numel() + 1)[1:].view(dout.shape).copy_(dout)
    base, *others = (gradients(kernel, inputs, [upstream])[1] for upstream in (dout, odd, shifted))
    for other in others:
        for one, two in zip(base, other, strict=True):
            torch.testing.assert_close(two, one, rtol=2e-3, atol=2e-3)
    if not HAS_GPU:
        used = [arguments["USE_TMA"] for _, arguments in launches]
        assert used == [path == 90] * 2 + [False] * 4


def test_expanded_inputs_and_upstream(path, device, monkeypatch):
    # a step of zero, which no descriptor has
    *inputs, layout = AttentionCase("expanded", (40, 9), 2, 2, 32).inputs(device, torch.float16)

    def kernel(q, k, v, change=lambda t: t):
        out = flash_attention(q, change(k[:1].expand_as(q)), v, layout)
        return change(out.sum(0, keepdim=True).expand_as(out))

    upstream = upstream_of([inputs[0]])
    launches = spy_on_launches(monkeypatch, module, "_flash_attention_fwd_kernel", *BACKWARD_KERNELS[1:])
    one = gradients(kernel, inputs, upstream)
    assert not any(arguments["USE_TMA"] for _, arguments in launches)
    two = gradients(lambda *ts: kernel(*ts, change=lambda t: t.contiguous()), inputs, upstream)
    for a, b in zip((*one[0], *one[1]), (*two[0], *two[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 1), (0, 2)])
def test_a_frozen_input_costs_nothing_and_changes_no_other_gradient(frozen, path, device, monkeypatch):
    *inputs, layout = SHORT.inputs(device, torch.float16)
    whole = gradients(_bound(flash_attention, layout), inputs)[1]
    launches = spy_on_launches(monkeypatch, module, *BACKWARD_KERNELS)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        part = gradients(_bound(flash_attention, layout), inputs, frozen=frozen)[1]
    for i, (one, other) in enumerate(zip(whole, part, strict=True)):
        assert other is None if i in frozen else torch.equal(one, other)
    launched = dict(launches)
    assert ("_flash_attention_bwd_dq_kernel" in launched) == (0 not in frozen)
    assert ("_flash_attention_bwd_dkv_kernel" in launched) == (frozen != (1, 2))
    if frozen != (1, 2):
        needs = launched["_flash_attention_bwd_dkv_kernel"]
        assert (needs["NEEDS_DK"], needs["NEEDS_DV"]) == (1 not in frozen, 2 not in frozen)
    # dv alone takes no row sums, and so no output
    assert ("_flash_attention_bwd_delta_kernel" in launched) == (frozen != (0, 1))
    assert saved.count(inputs[0].shape) == (1 if frozen == (0, 1) else 2)


def test_nan_in_a_neighbour_reaches_no_gradient(path, device):
    *inputs, layout = PACK.inputs(device, torch.float16)
    upstream = upstream_of(flash_attention(*inputs, layout, return_lse=True))
    clean = gradients(_bound(flash_attention, layout), inputs, upstream)[1]
    first, last = 150, 157
    for t in (*inputs, upstream[0]):
        t[first:last] = float("nan")
    others = torch.ones(len(inputs[0]), dtype=torch.bool)
    others[first:last] = False
    for one, other in zip(
        clean, gradients(_bound(flash_attention, layout), inputs, upstream)[1], strict=True
    ):
        assert torch.equal(one[others], other[others])
        assert other[first:last].isnan().any(), "the poison did not arrive, so this test would prove nothing"


@pytest.mark.parametrize("width", [24, 32])
def test_nan_around_the_pack_reaches_no_gradient(width, path, device):
    *inputs, layout = dataclasses.replace(PACK, head_width=width).inputs(device, torch.float16)
    upstream = upstream_of(flash_attention(*inputs, layout, return_lse=True))
    clean = gradients(_bound(flash_attention, layout), inputs, upstream)[1]
    views = []
    for t in (*inputs, upstream[0]):
        tokens, heads, width = t.shape
        wide = t.new_full((tokens + 200, heads + 8, width + 8), float("nan"))
        views.append(wide[100 : 100 + tokens, 4 : 4 + heads, :width].copy_(t))
    *views, dout = views
    leaves = [v.detach().requires_grad_() for v in views]
    torch.autograd.backward(_bound(flash_attention, layout)(*leaves), [dout, upstream[1]])
    for leaf, one in zip(leaves, clean, strict=True):
        assert torch.equal(leaf.grad, one)


def test_very_low_scores_do_not_overflow_beyond_the_end(path, device):
    # keys read beyond the end are zeros: against such a small lse their p would be infinite
    q, k, v, layout = AttentionCase("low", (33,), 2, 1, 32).inputs(device, torch.float32)
    inputs = [q.abs(), k - 60, v]
    kernel, wanted = (_bound(f, layout) for f in (flash_attention, reference.flash_attention))
    assert wanted(*inputs)[1].max() < -100, "not low enough, so this test would prove nothing"
    for grad in gradients(kernel, inputs)[1]:
        assert grad.isfinite().all()
    assert_gradient_parity("low", kernel, wanted, inputs)


def test_doubling_the_batch_changes_no_gradient(path, device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, *BACKWARD_KERNELS)
    *inputs, layout = PACK.inputs(device, torch.float16)
    twice = SeqLayout(layout.lengths * 2, device)
    out, lse = flash_attention(*inputs, layout, return_lse=True)
    dout, dlse = upstream_of((out, lse))
    once = gradients(_bound(flash_attention, layout), inputs, [dout, dlse])[1]
    doubled = [torch.cat([t, t]) for t in inputs]
    upstream = [torch.cat([dout, dout]), torch.cat([dlse, dlse], dim=1)]
    both = gradients(_bound(flash_attention, twice), doubled, upstream)[1]
    for one, other in zip(once, both, strict=True):
        assert torch.equal(other, torch.cat([one, one]))
    assert_same_constants(launches)


def test_gradcheck(path, device):
    *inputs, layout = AttentionCase("smallest", (2,), 2, 1, 16).inputs(device, torch.float32)
    assert_gradcheck(_bound(flash_attention, layout), [0.3 * t for t in inputs])


def test_one_tensor_as_queries_keys_and_values(path, device):
    """Double use in one graph: the three gradients are added."""
    _, _, v, layout = AttentionCase("same", (19, 40), 2, 2, 32).inputs(device, torch.float32)
    kernel, wanted = (lambda t, f=f: f(t, t, t, layout) for f in (flash_attention, reference.flash_attention))
    assert_gradient_parity("same", kernel, wanted, [v])


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_as_one_graph(causal, device):
    *inputs, layout = PACK.inputs(device, torch.float32)
    assert_compiles(_bound(flash_attention, layout, causal), inputs)


def test_opcheck(device):
    q, k, v, layout = AttentionCase("opcheck", (3, 2), 4, 2, 32).inputs(device, torch.float32)
    op, args = torch.ops.nvembed_fast, (layout.host_lengths, 0.2, False)
    torch.library.opcheck(op.flash_attention, (*(t.clone().requires_grad_() for t in (q, k, v)), *args))
    out, lse = op.flash_attention(q, k, v, *args)
    for dlse, needs in (
        (lse, (True, True, True)),
        (None, (True, False, False)),
        (None, (False, False, True)),
    ):
        dlse = None if dlse is None else dlse.clone()
        torch.library.opcheck(op.flash_attention_bwd, (q, k, v, out, lse, out.clone(), dlse, *args, *needs))


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_gradients_of_no_tokens(lengths, path, device):
    *inputs, layout = AttentionCase("empty", lengths, 4, 2, 16).inputs(device, torch.float16)
    for grad, t in zip(gradients(_bound(flash_attention, layout), inputs)[1], inputs, strict=True):
        assert grad.shape == t.shape


def test_backward_launch_config_covers_every_width_and_group():
    for kernel in ("dq", "dkv"):
        for capability in (80, 86, 90, 100, 120):
            for dtype in (torch.float16, torch.float32):
                for width in (16, 80, 128, 256):
                    for group in (1, 3, 4, 64):
                        for max_length in (1, 16, 64, 4096):
                            shape, target = (
                                (width, group, max_length),
                                {"capability": capability, "dtype": dtype},
                            )
                            c = module._bwd_launch_config(kernel, *shape, **target)
                            assert c["BLOCK_GROUP"] >= group and c["BLOCK_H"] >= width
                            assert c["BLOCK_T"] * c["BLOCK_GROUP"] >= 16 and c["BLOCK_N"] >= 16
                            assert not c["USE_TMA"] or 90 <= capability < 120
