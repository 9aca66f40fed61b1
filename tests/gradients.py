"""Gradients of a kernel beside those of its reference. Imported by the kernels' tests.

A function here takes a list of tensors and returns a tensor or a tuple of them;
whatever else it needs (a layout, eps) is bound by the caller.
"""

from collections.abc import Callable, Sequence

import torch

from nvembed_fast.kernels.testing import assert_parity, generator

Tensors = Sequence[torch.Tensor]


def upstream_of(outputs: Tensors, seed: int = 1, contiguous: bool = True) -> list[torch.Tensor]:
    """A random gradient for every output, rounded to its dtype; otherwise transposed in memory."""
    g = generator(seed)
    grads = [torch.randn(o.shape, generator=g).to(o.device, o.dtype) for o in outputs]
    if not contiguous:
        grads = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in grads]
        assert not any(t.is_contiguous() for t in grads if min(t.shape) > 1), "this would prove nothing"
    return grads


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def gradients(
    fn: Callable, inputs: Tensors, upstream: Tensors | None = None, frozen: Sequence[int] = ()
) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None]]:
    """(outputs, gradient of every input): None for the inputs whose index is in `frozen`.

    Args:
        upstream: one gradient per output; None draws them.
    """
    leaves = [t.detach().clone().requires_grad_(i not in frozen) for i, t in enumerate(inputs)]
    outputs = as_tuple(fn(*leaves))
    upstream = (
        upstream_of(outputs)
        if upstream is None
        else [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    )
    torch.autograd.backward(outputs, upstream)
    return tuple(o.detach() for o in outputs), [leaf.grad for leaf in leaves]


def assert_gradient_parity(
    name: str,
    kernel: Callable,
    reference: Callable,
    inputs: Tensors,
    low: Callable | None = None,
    frozen: Sequence[int] = (),
    contiguous: bool = True,
    upstream: Tensors | None = None,
) -> None:
    """Every gradient of `kernel` meets `assert_parity` against those of `reference` in float64.

    Args:
        low: what the dtype costs, when the kernel has to round where `reference` in that dtype does not:
            (inputs, upstream) -> gradients, in the order of the inputs. None runs `reference`.
        frozen: inputs that need no gradient, by index; the kernel must not compute one.
    """
    with torch.no_grad():
        outputs = as_tuple(reference(*inputs))
    upstream = upstream_of(outputs, contiguous=contiguous) if upstream is None else upstream
    _, got = gradients(kernel, inputs, upstream, frozen)
    low_grads = low(inputs, upstream) if low else gradients(reference, inputs, upstream)[1]
    _, high = gradients(reference, [t.double() for t in inputs], upstream)
    for i, (g, lo, hi) in enumerate(zip(got, low_grads, high, strict=True)):
        if i in frozen:
            assert g is None, f"{name}: gradient {i} is not needed but was given"
        else:
            assert_parity(f"{name}: gradient {i}", g, lo, hi)


def assert_gradcheck(kernel: Callable, inputs: Tensors) -> None:
    """Finite differences, in fp32 and so coarse; also that a second backward gives the same bits."""
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
