import inspect

import pytest
import torch
from gradients import assert_compiles, assert_gradcheck

from nvembed_fast.kernels import reference
from nvembed_fast.kernels import rotary as module
from nvembed_fast.kernels.rotary import rotary
from nvembed_fast.kernels.testing import (
    ROTARY_CASES,
    RotaryCase,
    assert_gradient_parity,
    assert_parity,
    gradients,
    small,
)

CASE = RotaryCase("property", (5, 3), 3, 2, 24)


def _high(qkv, cos, sin, positions, num_rotated):
    return reference.rotary(qkv.double(), cos.double(), sin.double(), positions, num_rotated)


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("case", small(ROTARY_CASES), ids=lambda c: c.name)
def test_matches_reference(case, inplace, dtype, device):
    args = case.inputs(device, dtype)
    low, high = reference.rotary(*args), _high(*args)
    assert_parity("rotary", rotary(*args, inplace=inplace), low, high)


@pytest.mark.gpu
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("case", [c for c in ROTARY_CASES if c.bench], ids=lambda c: c.name)
def test_matches_reference_at_full_size(case, inplace, dtype, device):
    args = case.inputs(device, dtype)
    low, high = reference.rotary(*args), _high(*args)
    assert_parity("rotary", rotary(*args, inplace=inplace), low, high)


def test_copy_leaves_the_input_and_inplace_returns_it(dtype, device):
    qkv, *rest = CASE.inputs(device, dtype)
    before = qkv.clone()
    copied = rotary(qkv, *rest)
    assert torch.equal(qkv, before) and copied.data_ptr() != qkv.data_ptr()
    inplace = rotary(qkv, *rest, inplace=True)
    assert inplace is qkv and torch.equal(inplace, copied)


def test_what_inplace_overwrites_gives_no_wrong_gradient(device):
    qkv, *rest = CASE.inputs(device, torch.float32)
    scale = torch.ones((), requires_grad=True)
    out = (qkv * scale).sum()
    rotary(qkv, *rest, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    with torch.inference_mode():
        rotary(qkv.clone(), *rest, inplace=True)  # has no version


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_the_other_heads_pass_through_whatever_they_hold(inplace, dtype, device):
    qkv, cos, sin, positions, num_rotated = CASE.inputs(device, dtype)
    want = rotary(qkv, cos, sin, positions, num_rotated)[:, :num_rotated]
    qkv[:, num_rotated:] = torch.inf
    got = rotary(qkv, cos, sin, positions, num_rotated, inplace=inplace)
    assert torch.equal(got[:, :num_rotated], want) and (got[:, num_rotated:] == torch.inf).all()


def test_inplace_writes_a_view_and_nothing_beside_it(dtype, device):
    """A [T, heads, H] view of a wider product: what lies beside the view keeps its value."""
    qkv, *rest = CASE.inputs(device, dtype)
    num_tokens, num_heads, head_width = qkv.shape
    product = torch.full((num_tokens, num_heads * head_width + 8), 7.0, device=device, dtype=dtype)
    view = product[:, : num_heads * head_width].unflatten(1, (num_heads, head_width))
    view.copy_(qkv)
    want = rotary(qkv, *rest)
    assert torch.equal(rotary(view, *rest, inplace=True), want)
    assert torch.equal(product[:, :-8], want.flatten(1)) and (product[:, -8:] == 7.0).all()


def test_a_token_depends_on_its_position_alone(dtype, device):
    """Alone, in another place of the pack and beside NaN: bitwise the same."""
    qkv, cos, sin, positions, num_rotated = CASE.inputs(device, dtype)
    together = rotary(qkv, cos, sin, positions, num_rotated)
    for i in range(len(qkv)):
        alone = rotary(qkv[i : i + 1], cos, sin, positions[i : i + 1].clone(), num_rotated)
        assert torch.equal(alone, together[i : i + 1])
    order = torch.arange(len(qkv) - 1, -1, -1, device=device)
    assert torch.equal(rotary(qkv[order], cos, sin, positions[order], num_rotated), together[order])
    qkv[3] = torch.nan
    beside_nan = rotary(qkv, cos, sin, positions, num_rotated)
    assert torch.equal(beside_nan[:3], together[:3]) and torch.equal(beside_nan[4:], together[4:])


def test_position_zero_does_not_turn_and_later_ones_do(device):
    qkv, cos, sin, positions, num_rotated = CASE.inputs(device, torch.float32)
    got = rotary(qkv, cos, sin, positions, num_rotated)
    assert torch.equal(got[0], qkv[0]) and torch.equal(got[5], qkv[5])
    assert (got[1, :num_rotated] != qkv[1, :num_rotated]).all()


def test_scores_depend_on_the_distance_alone(device):
    _, cos, sin, *_ = RotaryCase("long", (64,), 1, 1, 32).inputs(device, torch.float32)
    pair = (
        torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(1))
        .to(device)
        .expand(64, 2, 32)
        .contiguous()
    )
    positions = torch.arange(64, device=device, dtype=torch.int32)
    q, k = rotary(pair, cos, sin, positions, 2).double().unbind(1)
    scores = q @ k.mT
    for distance in (0, 7, 40):
        diagonal = scores.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-4
    assert (scores[0, 0] - scores[0, 40]).abs() > 0.1, (
        "the distance does not matter: this test proves nothing"
    )


def test_nothing_to_turn(dtype, device):
    qkv, cos, sin, positions, num_rotated = CASE.inputs(device, dtype)
    assert torch.equal(rotary(qkv, cos, sin, positions, 0), qkv)
    assert rotary(qkv, cos, sin, positions, 0, inplace=True) is qkv
    for inplace in (False, True):
        empty = rotary(qkv[:0], cos, sin, positions[:0], num_rotated, inplace=inplace)
        assert empty.shape == (0, 7, 24)


def test_signature_is_the_reference_signature():
    assert inspect.signature(rotary) == inspect.signature(reference.rotary)


def test_rejects_inplace_where_a_gradient_is_needed(device):
    qkv, *rest = CASE.inputs(device, torch.float32)
    with pytest.raises(ValueError, match="would overwrite a tensor that needs a gradient"):
        rotary(qkv.requires_grad_(), *rest, inplace=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, c, s, p, n: (q[:, 0], c, s, p, n), r"qkv must be \[T, heads, H\] with contiguous heads"),
        (lambda q, c, s, p, n: (q.mT, c, s, p, n), r"qkv must be .* contiguous heads, got \(8, 24, 7\)"),
        (lambda q, c, s, p, n: (q[..., :23], c, s, p, n), r"qkv must be .* an even H, got \(8, 7, 23\)"),
        (
            lambda q, c, s, p, n: (q, c[:, :-1], s, p, n),
            r"cos must be \[P, 12\] torch.float32 on .*\(5, 11\)",
        ),
        (lambda q, c, s, p, n: (q, c.half(), s, p, n), r"cos must be .* torch.float32 on .* torch.float16"),
        (lambda q, c, s, p, n: (q, c, s[:-1], p, n), r"sin must be \[P, 12\] .*, got \(4, 12\)"),
        (lambda q, c, s, p, n: (q, c, s.mT.contiguous().mT, p, n), r"sin must be .* contiguous rows"),
        (
            lambda q, c, s, p, n: (q, c, s, p[:-1], n),
            r"positions must be \[8\] torch.int32 on .*, got \(7,\)",
        ),
        (lambda q, c, s, p, n: (q, c, s, p.long(), n), r"positions must be \[8\] torch.int32 .* torch.int64"),
        (
            lambda q, c, s, p, n: (q, c, s, p, 8),
            r"num_rotated must be between 0 and the 7 heads of qkv, got 8",
        ),
        (lambda q, c, s, p, n: (q, c, s, p, -1), r"num_rotated must be between 0 and the 7 heads .* got -1"),
    ],
)
def test_rejects(change, message, device):
    with pytest.raises(ValueError, match=message):
        rotary(*change(*CASE.inputs(device, torch.float32)))


def test_every_shape_has_a_launch_config():
    for num_heads in range(1, 129):
        for head_width in range(2, 258, 6):
            config = module._launch_config(num_heads, head_width)
            assert config["BLOCK_N"] >= num_heads and config["BLOCK_H"] >= head_width // 2
            assert config["num_warps"] in (1, 2, 4, 8, 16)


def _bound(function, case, device, dtype):
    """(function of qkv alone, [qkv]). The tables are in float64 when qkv is."""
    qkv, cos, sin, positions, num_rotated = case.inputs(device, dtype)

    def run(x):
        tables = (cos.double(), sin.double()) if x.dtype == torch.float64 else (cos, sin)
        return function(x, *tables, positions, num_rotated)

    return run, [qkv]


def _check_gradient(case, device, dtype, **kwargs):
    kernel, inputs = _bound(rotary, case, device, dtype)
    assert_gradient_parity(
        "rotary", kernel, _bound(reference.rotary, case, device, dtype)[0], inputs, **kwargs
    )


@pytest.mark.parametrize("case", small(ROTARY_CASES), ids=lambda c: c.name)
def test_gradient_matches_reference(case, dtype, device):
    _check_gradient(case, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in ROTARY_CASES if c.bench], ids=lambda c: c.name)
def test_gradient_matches_reference_at_full_size(case, dtype, device):
    _check_gradient(case, device, dtype)


def test_gradient_of_a_strided_upstream(device):
    _check_gradient(CASE, device, torch.float16, contiguous=False)


def test_gradcheck(device):
    assert_gradcheck(*_bound(rotary, RotaryCase("smallest", (2, 1), 1, 1, 4), device, torch.float32))


def test_turning_the_gradient_back_undoes_the_turn(device):
    kernel, (qkv,) = _bound(rotary, CASE, device, torch.float32)
    (turned,), (grad,) = gradients(kernel, [qkv], [kernel(qkv)])
    torch.testing.assert_close(grad, qkv)


def test_compiles_as_one_graph(device):
    assert_compiles(*_bound(rotary, CASE, device, torch.float32))


def test_inplace_compiles_as_one_graph(device):
    torch._dynamo.reset()
    qkv, *rest = CASE.inputs(device, torch.float32)
    want = rotary(qkv, *rest)
    compiled = torch.compile(
        lambda x: rotary(x, *rest, inplace=True) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(qkv), want + 1) and torch.equal(qkv, want)


def test_opcheck(device):
    qkv, cos, sin, positions, num_rotated = CASE.inputs(device, torch.float32)
    op = torch.ops.nvembed_fast.rotary
    torch.library.opcheck(op, (qkv.clone().requires_grad_(), cos, sin, positions, num_rotated, False))
    torch.library.opcheck(torch.ops.nvembed_fast.rotary_, (qkv, cos, sin, positions, num_rotated))
