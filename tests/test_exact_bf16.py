"""bf16 as tests/exact_bf16.py computes it, beside PyTorch's own. On a GPU the kernels here ask the GPU."""

import pytest
import torch

tl = pytest.importorskip("triton.language", reason="needs triton")

import exact_bf16  # noqa: E402 - both need triton
import numpy as np  # noqa: E402
import triton  # noqa: E402

from nvembed_fast.kernels._common import launch  # noqa: E402

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not GPU and not exact_bf16.IS_EXACT, reason=exact_bf16.WHY_NOT)
EVERY = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
SIZE = 4096


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Bit for bit, but for the payload of a NaN."""
    got, wanted = got.cpu(), wanted.cpu()
    assert got.dtype == wanted.dtype and torch.equal(got.isnan(), wanted.isnan())
    numbers, kind = ~wanted.isnan(), {2: torch.int16, 4: torch.int32}[got.itemsize]
    assert torch.equal(got[numbers].view(kind), wanted[numbers].view(kind))


def draw(seed: int) -> torch.Tensor:
    """Numbers of every size, infinities, NaN, zeros and denormals among them."""
    chosen = torch.randint(2**16, (SIZE,), generator=torch.Generator().manual_seed(seed))
    # halves of them near one another, so that sums do not end in the larger operand
    near = torch.randn(SIZE // 2, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return torch.cat([EVERY[chosen[: SIZE // 2]], near])


@pytest.mark.skipif(GPU, reason="of the interpreter")
def test_every_number_and_its_neighbours_are_rounded_as_pytorch_does():
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int64)
    bits = torch.arange(2**16, dtype=torch.int64)[:, None] * 2**16 + low
    wide = bits.to(torch.int32).view(torch.float32)
    handle = exact_bf16.rounded(wide.numpy())
    same(torch.from_numpy(handle.data.view(np.int16)).view(torch.bfloat16), wide.bfloat16())
    every = exact_bf16.rounded(EVERY.float().numpy())
    same(torch.from_numpy(exact_bf16.widened(every)), EVERY.float())


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, c_ptr, out_ptr, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    b_a, b_b, b_c = tl.load(a_ptr + o), tl.load(b_ptr + o), tl.load(c_ptr + o)
    tl.store(out_ptr + o, b_a + b_b)
    tl.store(out_ptr + SIZE + o, b_a - b_b)
    tl.store(out_ptr + 2 * SIZE + o, b_a * b_b)
    tl.store(out_ptr + 3 * SIZE + o, b_a / b_b)
    tl.store(out_ptr + 4 * SIZE + o, b_a * 1.7 + 1)
    tl.store(out_ptr + 5 * SIZE + o, tl.where(b_a < b_b, b_a, tl.full([SIZE], 0.1, tl.bfloat16)))
    tl.store(out_ptr + 6 * SIZE + o, tl.abs(b_a))
    tl.store(out_ptr + 7 * SIZE + o, b_c)


def test_arithmetic_and_casts_in_a_kernel_are_pytorchs(device):
    a, b = draw(1), draw(2)
    c = torch.cat([draw(3).float()[: SIZE // 2], torch.randn(SIZE // 2)])
    out = torch.empty(8, SIZE, dtype=torch.bfloat16, device=device)
    # fused, a GPU would round `b_a * 1.7 + 1` once
    _arithmetic_kernel[(1,)](a.to(device), b.to(device), c.to(device), out, SIZE, enable_fp_fusion=False)
    scalar, one = (torch.tensor(x).bfloat16() for x in (1.7, 1.0))
    wanted = (a + b, a - b, a * b, a / b, a * scalar + one, torch.where(a < b, a, 0.1), a.abs(), c.bfloat16())
    for got, want in zip(out, wanted, strict=True):
        same(got, want)


@triton.jit
def _product_kernel(a_ptr, b_ptr, wide_ptr, out_ptr, N: tl.constexpr, USE_TMA: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    if USE_TMA:
        a = tl.make_tensor_descriptor(a_ptr, [N - 1, N], [N, 1], [N, N])
        out = tl.make_tensor_descriptor(out_ptr, [N - 1, N], [N, 1], [N, N])
        b_a = a.load([0, 0])
    else:
        b_a = tl.load(a_ptr + o, mask=tl.arange(0, N)[:, None] < N - 1, other=0.0)
    b_wide = tl.dot(b_a, tl.load(b_ptr + o).T)
    tl.store(wide_ptr + o, b_wide)
    if USE_TMA:
        out.store([0, 0], b_wide.to(tl.bfloat16))
    else:
        tl.store(out_ptr + o, b_wide, mask=tl.arange(0, N)[:, None] < N - 1)


def test_a_product_is_exact_but_for_one_rounding(device, path):
    n, use_tma = 64, path >= 90
    a, b = (torch.randn(n, n, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (1, 2))
    wide = torch.empty(n, n, device=device)
    out = torch.zeros(n, n, device=device, dtype=torch.bfloat16)
    tensors = {"a_ptr": a.to(device), "b_ptr": b.to(device), "wide_ptr": wide, "out_ptr": out}
    launch(_product_kernel, 1, **tensors, N=n, USE_TMA=use_tma)
    wanted = a.double() @ b.double().mT
    wanted[-1] = 0
    if GPU:
        torch.testing.assert_close(wide.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
    else:
        same(wide, wanted.float())
    same(out, wide.bfloat16())


@triton.jit
def _sum_kernel(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N))))


@triton.jit
def _atomic_kernel(x_ptr, out_ptr, N: tl.constexpr):
    tl.atomic_add(out_ptr + tl.arange(0, N), tl.load(x_ptr + tl.arange(0, N)))


@triton.jit
def _fma_kernel(x_ptr, out_ptr, N: tl.constexpr):
    b_x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr + tl.arange(0, N), tl.fma(b_x, b_x, b_x))


@pytest.mark.skipif(GPU, reason="of the interpreter")
@pytest.mark.parametrize(
    ("kernel", "name"),
    [(_sum_kernel, "sum"), (_atomic_kernel, "create_atomic_rmw"), (_fma_kernel, "create_fma")],
)
def test_what_is_not_emulated_is_refused(kernel, name):
    x, out = EVERY[:16].clone(), torch.zeros(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match=f"{name} of bf16 is not emulated: cast to fp32 before it"):
        kernel[(1,)](x, out, 16)
