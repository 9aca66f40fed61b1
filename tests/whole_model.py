"""A small whole model, a batch of it and its gradients. Imported by the tests of the backward."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from nvembed_fast import ops
from nvembed_fast.config import BackboneConfig, LatentConfig, NVEmbedConfig
from nvembed_fast.kernels.testing import assert_parity, generator, of_products
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.packing import PackedBatch, Padded

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


def from_padded(*arrays: torch.Tensor) -> tuple[PackedBatch, torch.Tensor]:
    """The batch of `Padded(*arrays)`, and the places of its tokens."""
    padded = Padded(*arrays)
    return padded.pack(padded.facts.tolist())


def head_name(head) -> str:
    return "-".join(part for part in head if part)


EVERY_HEAD = pytest.mark.parametrize("head", HEADS, ids=head_name)


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


def slope_of(model, batch, weight, direction, step=1e-5) -> torch.Tensor:
    """The slope of the loss along a direction of one weight, by finite differences."""
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
            losses.append(loss_of(model, batch))
            weight -= sign * step * direction
    return (losses[0] - losses[1]) / (2 * step)


def assert_every_gradient_matches(head, dtype, device, impl="triton") -> None:
    """Parity of an implementation's gradients with the reference's, for every parameter of a model."""
    # wide, and three batches side by side: the RMS error over the few elements of a norm would be luck
    model = make_model(head, device, dtype, width=464)
    batches = [make_batch(device, seed=seed) for seed in range(3)]

    def gradients(model, impl):
        each = [gradients_of(model, batch, impl) for batch in batches]
        return {name: torch.stack([g[name] for g in each]) for name in each[0]}

    got, low = gradients(model, impl), gradients(model, "torch")
    high = gradients(oracle_of(model), "torch")
    assert got.keys() == dict(model.named_parameters()).keys()
    for name, gradient in got.items():
        assert_parity(name, gradient, of_products([low[name]])[0], high[name])
