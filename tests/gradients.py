"""What a kernel's gradient has to pass beside parity. Imported by the kernels' tests."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.kernels.testing import Tensors, gradients, upstream_of


def bound(function: Callable, layout: SeqLayout, causal: bool = False) -> Callable:
    """A function of q, k and v alone, with both outputs of an attention."""
    return lambda q, k, v: function(q, k, v, layout, causal=causal, return_lse=True)


def assert_only_rounding(function: Callable, inputs: Tensors, per_product: float = 0.0) -> torch.Tensor:
    """Gradients where every token has one key. Returns that of v, and the others are bounded here.

    The softmax of one score is 1, so q and k have no gradient but the rounding of dP - delta. Parity has no
    scale there, because eager may take both from one sum. Attention that is fused adds the same H products
    twice in fp32, as dO V and as rowsum(dO * O): each sum is off by at most H / 2 eps of their size.

    Args:
        inputs: q [T, N, H], k and v [1, G, H].
        per_product: how many eps the products themselves are off by, in both sums together.
    """
    (dout,) = upstream = upstream_of([inputs[0]])
    _, (dq, dk, dv) = gradients(function, inputs, upstream)
    (q, k, v), (_, num_heads, width) = (t.double() for t in inputs), inputs[0].shape
    group = num_heads // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    own, single = torch.finfo(dq.dtype), torch.finfo(torch.float32)
    # rounding dS and a gradient to the dtype: relative, and at the smallest numbers absolute
    relative, absolute = 1 + 2 * own.eps, own.smallest_normal * own.eps
    size = (dout.double() * v).abs().sum(-1, keepdim=True)
    ds = relative * (width + per_product) * single.eps * size + absolute
    scale = relative * width**-0.5
    assert (dq.abs() <= scale * ds * k.abs() + absolute).all()
    of_heads = (ds * q.abs()).unflatten(1, (-1, group))
    assert (dk.abs() <= scale * of_heads.sum((0, 2)) + absolute).all()
    return dv


def spy_on_launches(monkeypatch, module, *kernels: str) -> list[tuple[str, dict]]:
    """A list that fills with (kernel, arguments) at every launch of these kernels of a module."""
    launches = []

    class Spy:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid):
            def launch(**arguments):
                launches.append((self.name, arguments))
                self.kernel[grid](**arguments)

            return launch

    for name in kernels:
        monkeypatch.setattr(module, name, Spy(name))
    # as with a hook of Triton: no launch of an earlier test is repeated past the spies
    monkeypatch.setattr("nvembed_fast.kernels._common._has_hooks", lambda kernel: True)
    return launches


def assert_same_constants(launches: list[tuple[str, dict]]) -> None:
    """Every kernel was launched with the same constants each time, so that no tile depends on the batch.

    Equal bits alone do not show it. The order within a product is the library's, on a GPU the tensor core's,
    and there it may depend on the tile.
    """
    constants = {}
    for name, arguments in launches:
        kept = [key for key in arguments if key.isupper() or key in ("num_warps", "num_stages")]
        constants.setdefault(name, []).append({key: arguments[key] for key in kept})
    assert launches and min(len(each) for each in constants.values()) > 1, "nothing to compare"
    for name, (first, *others) in constants.items():
        assert all(other == first for other in others), f"{name}: {first} and then {others}"


def assert_gradcheck(kernel: Callable, inputs: Tensors) -> None:
    """Finite differences, in fp32 and so coarse. A second backward gives the same bits."""
    leaves = [t.detach().float().clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(
        kernel, leaves, eps=1e-2, atol=2e-2, rtol=2e-2, nondet_tol=0.0, check_undefined_grad=False
    )


def assert_compiles(kernel: Callable, inputs: Tensors) -> None:
    """torch.compile takes the function as one graph and gives the same outputs and gradients, to the bit."""
    torch._dynamo.reset()
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager", dynamic=True)
    outputs, grads = gradients(kernel, inputs)
    compiled_outputs, compiled_grads = gradients(compiled, inputs)
    for one, other in zip((*outputs, *grads), (*compiled_outputs, *compiled_grads), strict=True):
        assert torch.equal(one, other)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return None


def saved_shapes(kernel: Callable, inputs: Tensors, frozen: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of the tensors that a call keeps for its backward."""
    kept = []
    leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(inputs)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        kernel(*leaves)
    return kept


def amid(t: torch.Tensor, around: float = float("nan")) -> torch.Tensor:
    """A copy with a value in rows before and behind it, heads beside and columns right of it."""
    rows, *heads, columns = t.shape
    wide = t.new_full((rows + 300, *(n + 8 for n in heads), columns + 16), around)
    return wide[150:-150, *[slice(4, -4)] * len(heads), :columns].copy_(t)


def far_rows(rows: int, step: int, device: str) -> torch.Tensor:
    """Ones in rows so far apart that a row beyond the last is unmapped. Memory between rows costs nothing."""
    t = torch.from_numpy(np.zeros(rows * step, dtype=np.float16)).as_strided((rows, 16), (step, 1))
    return t.fill_(1).to(device)
