"""What training puts around a whole model: steps, checkpointing, autocast and several processes."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_parallel import HOWS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from two_ranks import ROOT, run_on_two_ranks
from whole_model import EVERY_HEAD, HEADS, gradients_of, loss_of, make_batch, make_model

from nvembed_fast import ops


def contrastive_loss(model, batch) -> torch.Tensor:
    """InfoNCE of neighbouring texts, at temperature 0.1."""
    e = model(batch)
    return F.cross_entropy(e[::2] @ e[1::2].mT / 0.1, torch.arange(len(e) // 2, device=e.device))


def losses_of_a_run(impl: str, head, device: str, steps: int) -> list[float]:
    model = make_model(head, device, layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.03)
    losses = []
    for step in range(steps):
        batch = make_batch(device, lengths=(2, 3, 1, 2), seed=step % 5)
        with ops.use_impl(impl):
            loss = contrastive_loss(model, batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("steps", [12, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize("head", HEADS[:2], ids=lambda h: h[1])
def test_every_step_gives_the_same_loss(head, steps, device):
    got, wanted = (losses_of_a_run(impl, head, device, steps) for impl in ("triton", "torch"))
    assert wanted[-1] < 0.5 * wanted[0], "nothing was learned, so this test would prove nothing"
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(use_reentrant, device):
    model, batch = make_model(device=device), make_batch(device)
    wanted = {name: g.clone() for name, g in gradients_of(model, batch, "triton").items()}
    calls = []
    for layer in model.embedding_model.layers:
        inner = layer.forward

        def counted(*args, inner=inner):
            calls.append(torch.is_grad_enabled())
            return inner(*args)

        layer.forward = functools.partial(checkpoint, counted, use_reentrant=use_reentrant)
    got = gradients_of(model, batch, "triton")
    assert len(calls) == 2 * len(model.embedding_model.layers), "nothing was run again"
    for name, gradient in got.items():
        assert torch.equal(gradient, wanted[name]), name


def test_checkpointed_layers_run_again_as_they_ran(monkeypatch):
    model, batch = make_model(), make_batch()
    seen, real = [], ops.flash_attention
    monkeypatch.setattr(ops, "flash_attention", lambda *a, **k: seen.append(ops._state.impl) or real(*a, **k))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        seen.clear()
        with ops.use_impl("torch"):
            loss = model(batch)[:, 0].sum()
        loss.backward()  # outside, as autograd's own thread is on a GPU
        return [weight.grad.clone() for weight in model.parameters()]

    wanted, layers = gradients(), len(model.embedding_model.layers)
    for step, runs in ((1, 2 * layers), (2, layers + -(-layers // 2)), (None, layers)):
        model.keep_layers() if step is None else model.checkpoint_layers(every_n_layers=step)
        assert all(map(torch.equal, gradients(), wanted))
        assert seen == ["torch"] * runs
    model.checkpoint_layers()
    seen.clear()
    with torch.no_grad():
        model(batch)
    assert len(seen) == layers
    with pytest.raises(ValueError, match="use_reentrant=True is not supported"):
        model.checkpoint_layers(use_reentrant=True)


@pytest.mark.parametrize("impl", ["torch", "library", "triton"])
def test_checkpointed_layers_take_a_second_backward(impl, device):
    model, batch = make_model(device=device), make_batch(device)
    wanted = {name: g.clone() for name, g in gradients_of(model, batch, impl).items()}
    model.checkpoint_layers()
    model.zero_grad()
    with ops.use_impl(impl):
        loss = loss_of(model, batch)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, weight in model.named_parameters():
        assert torch.equal(weight.grad, 2 * wanted[name]), name


def test_a_checkpointed_layer_takes_the_arguments_of_a_layer():
    model, layout = make_model(), make_batch().layout
    layer, tables = model.embedding_model.layers[0], model.embedding_model.rotary_tables(30)
    x = torch.randn(layout.num_tokens, 48)
    wanted = layer(x, None, layout, tables)
    model.checkpoint_layers()
    for is_recorded in (True, False):
        with torch.set_grad_enabled(is_recorded):
            got = layer(x, residual_TD=None, layout=layout, tables=tables, hands_on_sums=False)
        assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("impl", ["torch", "library"])
@pytest.mark.parametrize("name", ["embedding_model.layers.1.self_attn.qkv_proj.weight", "head.to_q.weight"])
@pytest.mark.parametrize("is_trained", [False, True])
def test_a_model_inside_torch_func_gives_the_gradient_of_autograd(is_trained, name, impl, device):
    """Its other weights may be recorded outside of the transform, which no tensor inside tells."""
    model, batch = make_model(device=device, dtype=torch.float64), make_batch(device)
    wanted = gradients_of(model, batch, "torch")[name]
    model.requires_grad_(is_trained)
    weight = model.get_parameter(name).detach()

    def loss(weight):
        return loss_of(lambda batch: torch.func.functional_call(model, {name: weight}, batch), batch)

    with ops.use_impl(impl), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
        got = torch.func.grad(loss)(weight)
        _, slope = torch.func.jvp(loss, (weight,), (weight,))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(slope, (wanted * weight).sum(), rtol=1e-4, atol=1e-6)


def test_one_model_twice_in_one_graph(device):
    """Query and passages go through the same weights before one backward."""
    model, first, second = make_model(device=device), make_batch(device), make_batch(device, (4, 6), seed=1)
    with ops.use_impl("triton"):
        one, other = (
            {name: g.clone() for name, g in gradients_of(model, b, "triton").items()} for b in (first, second)
        )
        both = gradients_of(model, first, "triton", lambda m, b: loss_of(m, b) + loss_of(m, second))
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, one[name] + other[name], rtol=1e-4, atol=1e-5)


@EVERY_HEAD
def test_autocast_computes_in_16_bits_and_keeps_fp32_gradients(head, device):
    kind, low = ("cuda", torch.bfloat16) if device == "cuda" else ("cpu", torch.float16)
    model, batch = make_model(head, device), make_batch(device)
    wanted = gradients_of(copy.deepcopy(model), batch, "torch")
    results = {}
    for impl in ("torch", "triton"):
        copied = copy.deepcopy(model)
        with ops.use_impl(impl), torch.autocast(kind, low):
            states = copied.embedding_model(batch)
            loss = loss_of(copied, batch)
        loss.backward()
        results[impl] = states.dtype, {name: p.grad for name, p in copied.named_parameters()}
    assert results["torch"][0] == results["triton"][0] == torch.float32
    for name, gradient in results["triton"][1].items():
        assert gradient.dtype == torch.float32
        error, eager = (r[1][name] - wanted[name] for r in (results["triton"], results["torch"]))
        assert eager.abs().max() > 0 or not error.any(), "autocast did nothing"
        assert error.norm() <= 1.5 * eager.norm() + 1e-3 * wanted[name].norm(), name


@pytest.mark.slow
def test_two_processes_get_the_mean_gradient(device):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    said = run_on_two_ranks(ROOT / "tests" / "data_parallel.py", device, timeout=300)
    for how in HOWS:
        assert said.count(f"{how}: equal on rank") == 2
