import inspect

import pytest
import torch
from gradients import assert_compiles, assert_gradcheck

from nvembed_fast.kernels import reference
from nvembed_fast.kernels import rms_norm as module
from nvembed_fast.kernels.rms_norm import add_rms_norm, rms_norm
from nvembed_fast.kernels.testing import (
    NORM_CASES,
    RowCase,
    assert_gradient_parity,
    assert_parity,
    generator,
    gradients,
    small,
)

EPS = 1e-5
CASE = RowCase("property", 7, 80)


def _check_parity(case, device, dtype):
    x, residual, weight = case.norm_inputs(device, dtype)
    wide = tuple(t.double() for t in (x, residual, weight))
    low, high = reference.rms_norm(x, weight, EPS), reference.rms_norm(wide[0], wide[2], EPS)
    assert_parity("rms_norm", rms_norm(x, weight, EPS), low, high)

    y, h = add_rms_norm(x, residual, weight, EPS)
    low_y, low_h = reference.add_rms_norm(x, residual, weight, EPS)
    high_y, high_h = reference.add_rms_norm(*wide, EPS)
    assert torch.equal(h, low_h), "the residual sum is rounded once, so it is the same number everywhere"
    assert_parity("add_rms_norm h", h, low_h, high_h)
    assert_parity("add_rms_norm y", y, low_y, high_y)


@pytest.mark.parametrize("case", small(NORM_CASES), ids=lambda c: c.name)
def test_matches_reference(case, dtype, device):
    _check_parity(case, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in NORM_CASES if c.bench], ids=lambda c: c.name)
def test_matches_reference_at_full_size(case, dtype, device):
    _check_parity(case, device, dtype)


def test_statistics_are_taken_from_the_rounded_sum(device):
    # 2048 + 1 is 2048 in fp16, 2048 + 3 is 2052: unrounded sums would give other ratios to the small element
    x = torch.tensor([[2048.0, 2048.0, 1.0, 1.0]], device=device, dtype=torch.float16)
    residual = torch.tensor([[1.0, 3.0, 0.0, 0.0]], device=device, dtype=torch.float16)
    y, h = add_rms_norm(x, residual, torch.ones(4, device=device, dtype=torch.float16), EPS)
    assert h.tolist() == [[2048.0, 2052.0, 1.0, 1.0]]
    wide = h.double()
    expected = (wide / wide.square().mean().sqrt()).half()
    assert torch.equal(y, expected) and y[0, 0] != y[0, 1]


def test_rounds_before_the_weight_as_the_reference(device):
    x, _, weight = CASE.norm_inputs(device, torch.float16)
    wide = x.double()
    normed = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    once, twice = (normed * weight.double()).half(), normed.half() * weight
    assert not torch.equal(once, twice), "both roundings agree here, so this test would prove nothing"
    got = rms_norm(x, weight, EPS)
    assert (got != twice).float().mean() < 0.02 < (got != once).float().mean()


def test_eps_counts_in_a_tiny_row(device, dtype):
    x = torch.full((2, 64), 1e-3, device=device, dtype=dtype)
    x[1] = 0
    weight = torch.ones(64, device=device, dtype=dtype)
    got, want = rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5)
    assert (want[0] < 0.5).all(), "eps does not matter here, so this test would prove nothing"
    assert_parity("tiny", got, reference.rms_norm(x, weight, 1e-5), want)


@pytest.mark.parametrize("width", [16, 576, 4096])
def test_a_row_depends_on_no_other_row(width, dtype, device):
    x, residual, weight = RowCase("rows", 5, width).norm_inputs(device, dtype)
    together = add_rms_norm(x, residual, weight, EPS)
    doubled = add_rms_norm(torch.cat([x, x]), torch.cat([residual, residual]), weight, EPS)
    alone = [add_rms_norm(x[i : i + 1], residual[i : i + 1], weight, EPS) for i in range(5)]
    poisoned = x.clone()
    poisoned[2] = torch.nan
    beside_nan = add_rms_norm(poisoned, residual, weight, EPS)
    others = [0, 1, 3, 4]
    for i, t in enumerate(together):
        assert torch.equal(t, doubled[i][:5]) and torch.equal(t, doubled[i][5:])
        assert torch.equal(t, torch.cat([pair[i] for pair in alone]))
        assert torch.equal(t[others], beside_nan[i][others]) and beside_nan[i][2].isnan().all()


def test_rows_may_be_strided(dtype, device):
    x, residual, weight = RowCase("strided", 7, 2 * 80).norm_inputs(device, dtype)
    views = x[:, 80:], residual[:, :96].clone()[:, :80]
    assert len({v.stride(0) for v in views} | {80}) == 3, "equal strides hide a mixed-up one"
    got = add_rms_norm(*views, weight[:80], EPS)
    want = add_rms_norm(*(v.contiguous() for v in views), weight[:80], EPS)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_inputs_stay_untouched(dtype, device):
    inputs = CASE.norm_inputs(device, dtype)
    copies = [t.clone() for t in inputs]
    add_rms_norm(*inputs, EPS)
    assert all(torch.equal(t, c) for t, c in zip(inputs, copies, strict=True))


def test_no_tokens(device):
    x, residual, weight = RowCase("none", 0, 80).norm_inputs(device, torch.float32)
    assert rms_norm(x, weight, EPS).shape == (0, 80)
    assert [t.shape for t in add_rms_norm(x, residual, weight, EPS)] == [(0, 80), (0, 80)]


def test_every_width_up_to_the_limit_has_a_launch_config():
    for width in range(1, module.MAX_WIDTH + 1, 37):
        config = module._launch_config(width, capability=80, dtype=torch.float16)
        assert config["BLOCK_D"] >= width and config["num_warps"] in (1, 2, 4, 8, 16)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
def test_signature_is_the_reference_signature(name):
    assert inspect.signature(getattr(module, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda x, r, w: (x.mT.contiguous().mT, r, w),
            r"x must be \[T, D\] with contiguous rows and D > 0, got \(7, 80\)",
        ),
        (lambda x, r, w: (x[0], r, w), r"x must be \[T, D\] with contiguous rows and D > 0, got \(80,\)"),
        (
            lambda x, r, w: (x.new_zeros(2, 16385), x.new_zeros(2, 16385), x.new_zeros(16385)),
            "x must have at most 16384 columns for this kernel, got 16385",
        ),
        (lambda x, r, w: (x, r, w[:-1]), r"weight must be \[80\] torch.float32 on .*, got \(79,\)"),
        (lambda x, r, w: (x, r, w.half()), r"weight must be \[80\] torch.float32 on .* torch.float16"),
        (lambda x, r, w: (x, r, w.repeat(2)[::2]), r"weight must be .* contiguous, got .* strides \(2,\)"),
        (lambda x, r, w: (x, r[:-1], w), r"residual must be \(7, 80\) torch.float32 on .*, got \(6, 80\)"),
        (lambda x, r, w: (x, r.half(), w), r"residual must be \(7, 80\) torch.float32 on .* torch.float16"),
        (lambda x, r, w: (x, r.mT.contiguous().mT, w), r"residual must be .* contiguous rows"),
    ],
)
def test_rejects(change, message, device):
    with pytest.raises(ValueError, match=message):
        add_rms_norm(*change(*CASE.norm_inputs(device, torch.float32)), EPS)


def test_rejects_an_eps_that_is_not_positive(device):
    x, _, weight = CASE.norm_inputs(device, torch.float32)
    with pytest.raises(ValueError, match=r"eps must be positive for this kernel, got 0\.0"):
        rms_norm(x, weight, 0.0)
    for eps in (-1e-5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"eps must be finite and not negative, got {eps}"):
            rms_norm(x, weight, eps)


def _norm(function):
    return lambda *tensors: function(*tensors, EPS)


BOTH = pytest.mark.parametrize("op", [rms_norm, add_rms_norm], ids=lambda f: f.__name__)


def _inputs(op, case, device, dtype):
    x, residual, weight = case.norm_inputs(device, dtype)
    return [x, residual, weight] if op is add_rms_norm else [x, weight]


def _check_gradient(op, case, device, dtype, **kwargs):
    wanted = _norm(getattr(reference, op.__name__))
    assert_gradient_parity(op.__name__, _norm(op), wanted, _inputs(op, case, device, dtype), **kwargs)


# more rows than one program walks, so that shares of the weight's gradient are added
SHARES = RowCase(
    "shares", 2 * module._bwd_launch_config(80, capability=80, dtype=torch.float32)["ROWS"] + 5, 80
)


@BOTH
@pytest.mark.parametrize("case", [*small(NORM_CASES), SHARES], ids=lambda c: c.name)
def test_gradient_matches_reference(op, case, dtype, device):
    _check_gradient(op, case, device, dtype)


@BOTH
@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in NORM_CASES if c.bench], ids=lambda c: c.name)
def test_gradient_matches_reference_at_full_size(op, case, dtype, device):
    _check_gradient(op, case, device, dtype)


def test_more_shares_than_are_added_at_once(device):
    shares = module._bwd_dweight_launch_config(64)["BLOCK_P"] + 1
    rows = module._bwd_launch_config(64, capability=80, dtype=torch.float32)["ROWS"]
    # 16 bits: the interpreter adds a tile's rows one after another, and in fp32 that would show
    _check_gradient(rms_norm, RowCase("many shares", shares * rows, 64), device, torch.float16)


@BOTH
def test_gradient_of_a_strided_upstream(op, device):
    _check_gradient(op, CASE, device, torch.float16, contiguous=False)


@pytest.mark.parametrize(
    ("op", "frozen"),
    [(rms_norm, f) for f in [(0,), (1,)]] + [(add_rms_norm, f) for f in [(0,), (1,), (2,), (0, 1), (0, 2)]],
)
def test_a_frozen_input_gets_no_gradient_and_the_others_keep_theirs(op, frozen, device):
    inputs = _inputs(op, SHARES, device, torch.float16)
    whole, part = (gradients(_norm(op), inputs, frozen=f)[1] for f in ((), frozen))
    for i, (one, other) in enumerate(zip(whole, part, strict=True)):
        assert other is None if i in frozen else torch.equal(one, other)


def test_what_is_not_needed_is_not_computed(device, monkeypatch):
    launches = []
    real = module._launch_bwd
    monkeypatch.setattr(
        module, "_launch_bwd", lambda *a: launches.append((a[-2:], real(*a))) or launches[-1][1]
    )
    inputs = _inputs(rms_norm, CASE, device, torch.float32)
    for frozen, sizes in (((), (560, 80)), ((0,), (0, 80)), ((1,), (560, 0))):
        gradients(_norm(rms_norm), inputs, frozen=frozen)
        assert tuple(t.numel() for t in launches[-1][1]) == sizes


@pytest.mark.parametrize("used", ["y", "h"])
def test_one_of_two_outputs_is_used(used, device):
    inputs = _inputs(add_rms_norm, SHARES, device, torch.float16)
    pick = 0 if used == "y" else 1
    assert_gradient_parity(
        used,
        lambda *t: add_rms_norm(*t, EPS)[pick],
        lambda *t: reference.add_rms_norm(*t, EPS)[pick],
        inputs,
        frozen=() if used == "y" else (2,),
    )


def test_an_unused_norm_gives_its_weight_no_gradient(device):
    """None and not zeros, as in PyTorch: an optimizer skips it."""
    inputs = _inputs(add_rms_norm, CASE, device, torch.float32)
    for function in (add_rms_norm, reference.add_rms_norm):
        leaves = [t.clone().requires_grad_() for t in inputs]
        function(*leaves, EPS)[1].sum().backward()
        assert leaves[2].grad is None and leaves[0].grad.eq(1).all() and leaves[1].grad.eq(1).all()


@BOTH
def test_gradcheck(op, device):
    assert_gradcheck(_norm(op), _inputs(op, RowCase("smallest", 3, 6), device, torch.float32))


@BOTH
def test_compiles_as_one_graph(op, device):
    assert_compiles(_norm(op), _inputs(op, CASE, device, torch.float32))


def test_opcheck(device):
    x, residual, weight = (t.requires_grad_() for t in CASE.norm_inputs(device, torch.float32))
    ops = torch.ops.nvembed_fast
    torch.library.opcheck(ops.rms_norm, (x, weight, EPS))
    torch.library.opcheck(ops.add_rms_norm, (x, residual, weight, EPS))
    x, residual, weight = (t.detach() for t in (x, residual, weight))
    for flags in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.rms_norm_bwd, (x, weight, residual, x.clone(), EPS, *flags))


@BOTH
def test_a_row_of_the_gradient_depends_on_no_other_row(op, dtype, device):
    inputs = _inputs(op, CASE, device, dtype)
    doubled = [torch.cat([t, t]) if t.ndim == 2 else t for t in inputs]
    outputs, once = gradients(_norm(op), inputs)
    upstream = [torch.randn(o.shape, generator=generator()).to(o) for o in outputs]
    once = gradients(_norm(op), inputs, upstream)[1]
    twice = gradients(_norm(op), doubled, [torch.cat([u, u]) for u in upstream])[1]
    assert torch.equal(twice[0], torch.cat([once[0], once[0]]))


@BOTH
def test_gradient_of_no_tokens(op, device):
    inputs = _inputs(op, RowCase("none", 0, 16), device, torch.float16)
    *rows, weight = gradients(_norm(op), inputs)[1]
    assert all(r.shape == (0, 16) for r in rows) and weight.eq(0).all()
