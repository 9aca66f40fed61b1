"""The gradients of flash attention against the reference. Their kernels: test_flash_attention_backward.py."""

import dataclasses

import pytest
import torch
from gradients import assert_gradcheck, assert_only_rounding, bound

from nvembed_fast.kernels import reference
from nvembed_fast.kernels.flash_attention import flash_attention
from nvembed_fast.kernels.testing import (
    ATTENTION_CASES,
    ATTENTION_PACK,
    ATTENTION_SHORT,
    AttentionCase,
    assert_gradient_parity,
    attention_gradients,
    gradients,
    small,
    upstream_of,
)

CASES = small(ATTENTION_CASES)
# one token alone has no gradient but rounding, so there are many of them: one would be judged by luck
GRADIENT_CASES = [dataclasses.replace(CASES[0], lengths=(1,) * 40), *CASES[1:]]


def _check_gradients(case, dtype, device, **kwargs):
    *inputs, layout = case.inputs(device, dtype)
    kernel, wanted = (bound(f, layout, case.causal) for f in (flash_attention, reference.flash_attention))
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
    _check_gradients(dataclasses.replace(ATTENTION_PACK, causal=causal), torch.float16, device)


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129])
def test_gradients_match_the_reference_around_the_tile_size(length, path, device):
    for causal in (False, True):
        _check_gradients(AttentionCase("edge", (length,), 2, 2, 16, causal=causal), torch.float16, device)


@pytest.mark.parametrize("group", [1, 5, 64])
def test_gradients_of_any_group_size(group, path, device):
    _check_gradients(AttentionCase("group", (9, 4), 2 * group, 2, 16), torch.float16, device)


def test_gradients_of_a_strided_upstream(path, device):
    _check_gradients(ATTENTION_PACK, torch.float16, device, contiguous=False)


def test_gradients_of_one_token_alone(path, device):
    *inputs, layout = AttentionCase("one", (1,), 2, 2, 16).inputs(device, torch.float16)
    dv = assert_only_rounding(lambda *t: flash_attention(*t, layout), inputs)
    assert torch.equal(dv, *upstream_of([inputs[0]]))


@pytest.mark.parametrize("scale", [0.1, 0.3])
def test_scale_is_used_in_the_gradients(scale, path, device):
    *inputs, layout = ATTENTION_SHORT.inputs(device, torch.float32)
    kernel, wanted = (
        lambda q, k, v, f=f: f(q, k, v, layout, scale=scale)
        for f in (flash_attention, reference.flash_attention)
    )
    assert_gradient_parity("scale", kernel, wanted, inputs)


@pytest.mark.parametrize("used", ["out", "lse"])
def test_one_of_two_outputs_is_used(used, path, device):
    *inputs, layout = ATTENTION_SHORT.inputs(device, torch.float32)
    pick, frozen = (0, ()) if used == "out" else (1, (2,))  # the lse does not depend on v
    kernel, wanted = (
        lambda *t, f=f: bound(f, layout)(*t)[pick] for f in (flash_attention, reference.flash_attention)
    )
    assert_gradient_parity(used, kernel, wanted, inputs, frozen=frozen)


def test_very_low_scores_do_not_overflow_beyond_the_end(path, device):
    # keys read beyond the end are zeros: against such a small lse their p would be infinite
    q, k, v, layout = AttentionCase("low", (33,), 2, 1, 32).inputs(device, torch.float32)
    inputs = [q.abs(), k - 60, v]
    kernel, wanted = (bound(f, layout) for f in (flash_attention, reference.flash_attention))
    assert wanted(*inputs)[1].max() < -100, "not low enough, so this test would prove nothing"
    for grad in gradients(kernel, inputs)[1]:
        assert grad.isfinite().all()
    assert_gradient_parity("low", kernel, wanted, inputs)


def test_gradcheck(path, device):
    *inputs, layout = AttentionCase("smallest", (2,), 2, 1, 16).inputs(device, torch.float32)
    assert_gradcheck(bound(flash_attention, layout), [0.3 * t for t in inputs])


def test_one_tensor_as_queries_keys_and_values(path, device):
    """Double use in one graph: the three gradients are added."""
    _, _, v, layout = AttentionCase("same", (19, 40), 2, 2, 32).inputs(device, torch.float32)
    kernel, wanted = (lambda t, f=f: f(t, t, t, layout) for f in (flash_attention, reference.flash_attention))
    assert_gradient_parity("same", kernel, wanted, [v])


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_gradients_of_no_tokens(lengths, path, device):
    *inputs, layout = AttentionCase("empty", lengths, 4, 2, 16).inputs(device, torch.float16)
    for grad, t in zip(gradients(bound(flash_attention, layout), inputs)[1], inputs, strict=True):
        assert grad.shape == t.shape
