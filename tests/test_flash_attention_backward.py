"""How the gradients of flash attention are computed. Their values: test_flash_attention_gradients.py."""

import dataclasses

import pytest
import torch
from gradients import amid, assert_compiles, assert_same_constants, bound, spy_on_launches

from nvembed_fast.kernels import flash_attention as module
from nvembed_fast.kernels.flash_attention import flash_attention
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.kernels.testing import (
    ATTENTION_PACK,
    ATTENTION_SHORT,
    AttentionCase,
    gradients,
    upstream_of,
)

HAS_GPU = torch.cuda.is_available()
BACKWARD_KERNELS = [f"_flash_attention_bwd_{name}_kernel" for name in ("delta", "dq", "dkv")]


def test_gradients_by_descriptors_only_where_they_can_be_made(path, device, monkeypatch):
    *inputs, layout = ATTENTION_PACK.inputs(device, torch.float16)
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
    *inputs, layout = ATTENTION_SHORT.inputs(device, torch.float16)
    whole = gradients(bound(flash_attention, layout), inputs)[1]
    launches = spy_on_launches(monkeypatch, module, *BACKWARD_KERNELS)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        part = gradients(bound(flash_attention, layout), inputs, frozen=frozen)[1]
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
    *inputs, layout = ATTENTION_PACK.inputs(device, torch.float16)
    upstream = upstream_of(flash_attention(*inputs, layout, return_lse=True))
    clean = gradients(bound(flash_attention, layout), inputs, upstream)[1]
    first, last = 150, 157
    for t in (*inputs, upstream[0]):
        t[first:last] = float("nan")
    others = torch.ones(len(inputs[0]), dtype=torch.bool)
    others[first:last] = False
    for one, other in zip(clean, gradients(bound(flash_attention, layout), inputs, upstream)[1], strict=True):
        assert torch.equal(one[others], other[others])
        assert other[first:last].isnan().any(), "the poison did not arrive, so this test would prove nothing"


@pytest.mark.parametrize("width", [24, 32])
def test_nan_around_the_pack_reaches_no_gradient(width, path, device):
    *inputs, layout = dataclasses.replace(ATTENTION_PACK, head_width=width).inputs(device, torch.float16)
    dout, dlse = upstream_of(flash_attention(*inputs, layout, return_lse=True))
    # of the same strides: these pick the layout in registers, and so the order of a sum
    clean, beside_nan = (
        _gradients_amid(around, [*inputs, dout], dlse, layout) for around in (0.0, float("nan"))
    )
    for one, other in zip(clean, beside_nan, strict=True):
        assert one.isfinite().all() and torch.equal(one, other)


def _gradients_amid(around: float, tensors, dlse, layout) -> list[torch.Tensor]:
    *views, dout = (amid(t, around) for t in tensors)
    leaves = [v.detach().requires_grad_() for v in views]
    torch.autograd.backward(bound(flash_attention, layout)(*leaves), [dout, dlse])
    return [leaf.grad for leaf in leaves]


def test_doubling_the_batch_changes_no_gradient(path, device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, *BACKWARD_KERNELS)
    *inputs, layout = ATTENTION_PACK.inputs(device, torch.float16)
    twice = SeqLayout(layout.lengths * 2, device)
    out, lse = flash_attention(*inputs, layout, return_lse=True)
    dout, dlse = upstream_of((out, lse))
    once = gradients(bound(flash_attention, layout), inputs, [dout, dlse])[1]
    doubled = [torch.cat([t, t]) for t in inputs]
    upstream = [torch.cat([dout, dout]), torch.cat([dlse, dlse], dim=1)]
    both = gradients(bound(flash_attention, twice), doubled, upstream)[1]
    for one, other in zip(once, both, strict=True):
        assert torch.equal(other, torch.cat([one, one]))
    assert_same_constants(launches)


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_as_one_graph(causal, device):
    *inputs, layout = ATTENTION_PACK.inputs(device, torch.float32)
    assert_compiles(bound(flash_attention, layout, causal), inputs)


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
