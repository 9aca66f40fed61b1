import inspect

import numpy as np
import pytest
import torch
from gradients import assert_compiles, assert_gradcheck

from nvembed_fast.kernels import gated as module
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.gated import geglu, swiglu
from nvembed_fast.kernels.testing import (
    GATED_CASES,
    RowCase,
    assert_gradient_parity,
    assert_parity,
    gradients,
    small,
)

OPS = pytest.mark.parametrize("op", [swiglu, geglu], ids=lambda f: f.__name__)
CASES = [*small(GATED_CASES), RowCase("two-column-blocks", 3, 2100)]
CASE = RowCase("property", 7, 80)


def _check_parity(op, case, device, dtype):
    x = case.gated_input(device, dtype)
    wanted = getattr(reference, op.__name__)
    assert_parity(op.__name__, op(x), wanted(x), wanted(x.double()))


@OPS
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(op, case, dtype, device):
    _check_parity(op, case, device, dtype)


@OPS
@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in GATED_CASES if c.bench], ids=lambda c: c.name)
def test_matches_reference_at_full_size(op, case, dtype, device):
    _check_parity(op, case, device, dtype)


def test_the_halves_have_their_meaning(device):
    """SwiGLU's gate is the first half, GEGLU's the second. GELU is the exact one."""
    x = torch.tensor([[3.0, 2.0]], device=device)
    assert swiglu(x).item() == pytest.approx(3 / (1 + np.exp(-3)) * 2, rel=1e-6)
    exact, by_tanh = 1.9544997361036416, 1.9545976940877752
    assert geglu(x).item() == pytest.approx(3 * exact, rel=2e-7) != pytest.approx(3 * by_tanh, rel=2e-7)


@OPS
def test_peaked_gates_saturate(op, device, dtype):
    """Large gates pass the other half or shut it: no overflow inside, in fp16 either."""
    x = torch.tensor([[-60000.0, -100.0, 100.0, 60000.0, 1.0, 1.0, 1.0, 1.0]], device=device).to(dtype)
    if op is geglu:
        x = x.roll(4, dims=1)
    got = op(x)[0].float()
    assert torch.equal(got.cpu(), torch.tensor([0.0, 0.0, 100.0, 60000.0]).to(dtype).float())


@OPS
@pytest.mark.parametrize("width", [16, 576, 2100])
def test_a_row_depends_on_no_other_row(op, width, dtype, device):
    x = RowCase("rows", 5, width).gated_input(device, dtype)
    together = op(x)
    doubled = op(torch.cat([x, x]))
    assert torch.equal(doubled[:5], together) and torch.equal(doubled[5:], together)
    assert torch.equal(torch.cat([op(row) for row in x.split(1)]), together)
    x[2] = torch.nan
    beside_nan = op(x)
    others = [0, 1, 3, 4]
    assert torch.equal(beside_nan[others], together[others]) and beside_nan[2].isnan().all()


@OPS
def test_rows_may_be_strided(op, dtype, device):
    x = RowCase("strided", 7, 2 * 80).gated_input(device, dtype)
    assert torch.equal(op(x[:, 160:]), op(x[:, 160:].contiguous()))


@OPS
def test_rows_lie_beyond_2_to_the_31_elements(op):
    """Row addresses are 64 bits wide. The 4 GiB are never touched, so they cost no memory."""
    stride = 2**30
    memory = torch.from_numpy(np.zeros(2 * stride + 32, dtype=np.float16))
    x = memory.as_strided((3, 32), (stride, 1))
    x.copy_(RowCase("far", 3, 16).gated_input("cpu", torch.float16))
    if torch.cuda.is_available():
        memory = memory.cuda()
        x = memory.as_strided((3, 32), (stride, 1))
    assert torch.equal(op(x), op(x.contiguous()))


@OPS
def test_no_tokens(op, device):
    assert op(RowCase("none", 0, 80).gated_input(device, torch.float32)).shape == (0, 80)


@OPS
def test_signature_is_the_reference_signature(op):
    assert inspect.signature(op) == inspect.signature(getattr(reference, op.__name__))


@pytest.mark.parametrize("op, name", [(swiglu, "gate_up"), (geglu, "value_gate")], ids=["swiglu", "geglu"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.mT.contiguous().mT, r"must be \[T, 2F\] with contiguous rows, got \(7, 160\)"),
        (lambda x: x[0], r"must be \[T, 2F\] with contiguous rows, got \(160,\)"),
        (lambda x: x[:, :-1], r"must be \[T, 2F\] with an even, positive number of columns, got \(7, 159\)"),
        (lambda x: x[:, :0], r"must be \[T, 2F\] with an even, positive number of columns, got \(7, 0\)"),
    ],
)
def test_rejects(op, name, change, message, device):
    with pytest.raises(ValueError, match=f"{name} {message}"):
        op(change(CASE.gated_input(device, torch.float32)))


def test_every_width_has_a_launch_config():
    for width in range(1, 20000, 37):
        config = module._launch_config(width)
        assert config["num_warps"] in (1, 2, 4) and config["BLOCK_T"] * config["BLOCK_F"] in (1024, 2048)


@OPS
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gradient_matches_reference(op, case, dtype, device):
    x = case.gated_input(device, dtype)
    assert_gradient_parity(op.__name__, op, getattr(reference, op.__name__), [x])


@OPS
@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in GATED_CASES if c.bench], ids=lambda c: c.name)
def test_gradient_matches_reference_at_full_size(op, case, dtype, device):
    part = RowCase(case.name, 512, case.width)
    assert_gradient_parity(
        op.__name__, op, getattr(reference, op.__name__), [part.gated_input(device, dtype)]
    )


@OPS
def test_gradient_of_a_strided_upstream(op, device):
    x = CASE.gated_input(device, torch.float16)
    assert_gradient_parity(op.__name__, op, getattr(reference, op.__name__), [x], contiguous=False)


@OPS
def test_gradcheck(op, device):
    assert_gradcheck(op, [RowCase("smallest", 3, 8).gated_input(device, torch.float32)])


@OPS
def test_compiles_as_one_graph(op, device):
    assert_compiles(op, [CASE.gated_input(device, torch.float32)])


def test_opcheck(device):
    x = CASE.gated_input(device, torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.nvembed_fast.gated, (x, True))
    torch.library.opcheck(torch.ops.nvembed_fast.gated_bwd, (x.detach(), x.detach()[:, :80], False))


@OPS
def test_gradient_of_no_tokens(op, device):
    (grad,) = gradients(op, [torch.zeros(0, 8, device=device)])[1]
    assert grad.shape == (0, 8)


@OPS
def test_gradient_at_peaked_gates_is_finite(op, dtype, device):
    gate, other = torch.tensor([[-6000.0, -100.0, -9.0, 0.0, 9.0, 100.0, 6000.0]]), torch.ones(1, 7)
    x = torch.cat([gate, other] if op is swiglu else [other, gate], dim=1).to(device, dtype)
    assert_gradient_parity(op.__name__, op, getattr(reference, op.__name__), [x])
