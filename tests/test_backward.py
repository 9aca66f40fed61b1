"""The gradients of a whole model, under everything that training puts around it.

Each kernel's own gradients are in its own test file.
"""

import copy
import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nvembed_fast import ops
from nvembed_fast.config import BackboneConfig, LatentConfig, NVEmbedConfig
from nvembed_fast.kernels.testing import assert_parity, generator
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.packing import PackedBatch

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 50
# grouped heads, an odd number of latents, texts around a tile's size
TEXT = BackboneConfig(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
LATENT = LatentConfig(
    num_latents_value=24, num_cross_heads=2, cross_dim_head=16, hidden_dim=48, latent_dim=48
)
LENGTHS = (9, 1, 30, 17)
# head of the model, form of its latents
HEADS = (
    ("latent", "direct"),
    ("latent", "absorbed"),
    ("mean", None),
    ("eos", None),
    ("self_attention", None),
)
EVERY_HEAD = pytest.mark.parametrize("head", HEADS, ids=lambda h: h[0] + (f"-{h[1]}" if h[1] else ""))


def make_model(head=HEADS[1], device="cpu", dtype=torch.float32, layers=2, width=48) -> NVEmbedModel:
    torch.manual_seed(0)
    name, form = head
    text = dataclasses.replace(TEXT, num_hidden_layers=layers, hidden_size=width)
    latent = dataclasses.replace(LATENT, hidden_dim=width, latent_dim=width)
    model = NVEmbedModel(NVEmbedConfig(text, latent, pooling_head=name))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    if form:
        model.head.mode = form
    return model.to(device, dtype)


def oracle_of(model: NVEmbedModel) -> NVEmbedModel:
    """The same model in float64, rotary tables and all."""
    model = copy.deepcopy(model).double()
    tables = model.embedding_model.rotary_tables(max(LENGTHS))
    tables.cos, tables.sin = tables.cos.double(), tables.sin.double()
    return model


def make_batch(device="cpu", lengths=LENGTHS, seed=0) -> PackedBatch:
    draw = np.random.default_rng(seed)
    ids = [draw.integers(0, VOCAB, n) for n in lengths]
    return PackedBatch.from_ids(ids, [min(2, n - 1) for n in lengths], device)


def loss_of(model, batch) -> torch.Tensor:
    """Every text away from every other one: all vectors matter."""
    e = model(batch)
    weight = torch.randn(len(e), len(e), generator=generator(1)).to(e.device, e.dtype)
    return (e @ e.mT * weight).sum()


def gradients_of(model, batch, impl: str, loss=loss_of) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with ops.use_impl(impl):
        loss(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@EVERY_HEAD
def test_every_gradient_matches_the_reference(head, dtype, device):
    # wide, and three batches side by side: the RMS error over the few elements of a norm would be luck
    model = make_model(head, device, dtype, width=464)
    batches = [make_batch(device, seed=seed) for seed in range(3)]

    def gradients(model, impl):
        each = [gradients_of(model, batch, impl) for batch in batches]
        return {name: torch.stack([g[name] for g in each]) for name in each[0]}

    got, low = gradients(model, "triton"), gradients(model, "torch")
    high = gradients(oracle_of(model), "torch")
    assert got.keys() == dict(model.named_parameters()).keys()
    for name, gradient in got.items():
        assert_parity(name, gradient, low[name], high[name])


@EVERY_HEAD
def test_every_gradient_is_the_slope_of_the_loss(head):
    """Finite differences along a random direction per weight, in float64.

    Elsewhere the oracle runs the model's own code, so that a path cut off in that code would go unseen.
    """
    model, batch, step = oracle_of(make_model(head)), make_batch(), 1e-5
    for name, gradient in gradients_of(model, batch, "torch").items():
        weight = model.get_parameter(name)
        direction = torch.randn(weight.shape, generator=generator(2), dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * step * direction
                losses.append(loss_of(model, batch))
                weight -= sign * step * direction
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope.abs() > 1e-4, f"{name} does not matter, so this test would prove nothing"
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-8, msg=name)


def contrastive_loss(model, batch) -> torch.Tensor:
    """InfoNCE of neighbouring texts, at temperature 0.1."""
    e = model(batch)
    return F.cross_entropy(e[::2] @ e[1::2].mT / 0.1, torch.arange(len(e) // 2, device=e.device))


def losses_of_a_run(impl: str, head, device: str, steps: int = 50) -> list[float]:
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
@pytest.mark.parametrize("head", HEADS[:2], ids=lambda h: h[1])
def test_fifty_steps_give_the_same_losses(head, device):
    got, wanted = (losses_of_a_run(impl, head, device) for impl in ("triton", "torch"))
    assert wanted[-1] < 0.5 * wanted[0], "nothing was learned, so this test would prove nothing"
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_a_frozen_backbone_gets_no_gradient_and_changes_no_other(device):
    model, batch = make_model(device=device), make_batch(device)
    whole = gradients_of(model, batch, "triton")
    model.embedding_model.requires_grad_(False)
    part = gradients_of(model, batch, "triton")
    assert part.keys() == {name for name in whole if name.startswith("head.")}
    for name, gradient in part.items():
        assert torch.equal(gradient, whole[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("head", (HEADS[0], HEADS[1], HEADS[4]), ids=lambda h: h[1] or h[0])
def test_compiles_as_one_graph_for_all_lengths(head, device):
    torch._dynamo.reset()
    graphs = []

    def count(graph, examples):
        graphs.append(graph)
        return aot_eager(graph, examples)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    model = make_model(head, device, layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for seed, lengths in enumerate(((9, 1, 17), (3, 4), (8, 8, 2), (5, 2))):
        batch = make_batch(device, lengths, seed)
        wanted = gradients_of(model, batch, "triton")
        with ops.use_impl("triton"):
            model.zero_grad()
            loss_of(compiled, batch).backward()
        for name, parameter in model.named_parameters():
            # the compiler may reorder what stands between the kernels
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)
        if seed == 1:
            settled = len(graphs)
    assert len(graphs) == settled, f"{len(graphs) - settled} recompilations for other lengths"


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
@pytest.mark.parametrize("how", ["ddp", "ddp_built_once", "fsdp2", "fsdp2_mixed_precision"])
def test_two_processes_get_the_mean_gradient(how, device):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tests" / "data_parallel.py"), how, device]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.count("equal on rank") == 2
