"""The heads beside the latent one: their equations in float64, and their way to disk."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from nvembed_fast import checkpoint, ops
from nvembed_fast.config import BackboneConfig, LatentConfig, NVEmbedConfig
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.network.pooling_heads import EOSHead, MeanHead, SelfAttentionHead
from nvembed_fast.placement import Placement

TEXT = BackboneConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=10,
)
LATENT = LatentConfig(num_latents_value=6, num_cross_heads=2, cross_dim_head=8, hidden_dim=16, latent_dim=16)
OTHERS = ("mean", "eos", "self_attention")
LAYOUT = SeqLayout((5, 0, 4))
KEEP = torch.tensor([0, 0, 1, 1, 1, 1, 0, 1, 1], dtype=torch.bool)


@pytest.fixture
def h() -> torch.Tensor:
    return torch.randn(9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_mean_is_of_the_kept_tokens(h):
    got = MeanHead(output_normalize=False)(h, LAYOUT, KEEP)
    wanted = torch.stack([h[2:5].mean(0), h.new_zeros(16), (h[5] + h[7] + h[8]) / 3])
    torch.testing.assert_close(got, wanted)


def test_eos_is_the_last_token_whatever_the_mask_says(h):
    head = EOSHead(output_normalize=False)
    wanted = torch.stack([h[4], h.new_zeros(16), h[8]])
    for mask in (None, KEEP, ~KEEP):
        assert torch.equal(head(h, LAYOUT, mask), wanted)
    assert head(h.half(), LAYOUT, None).dtype == torch.float32


def test_eos_of_a_batch_without_tokens_is_zeros():
    got = EOSHead(output_normalize=False)(torch.empty(0, 16).half(), SeqLayout((0, 0)))
    assert got.dtype == torch.float32 and torch.equal(got, torch.zeros(2, 16))


def test_eos_of_an_empty_text_passes_no_nan_on(h):
    h[8] = float("nan")
    h.requires_grad_()
    head = EOSHead(output_normalize=False)
    head(h, LAYOUT, None)[:2].sum().backward()
    assert h.grad[4].eq(1).all() and h.grad.count_nonzero() == 16


def test_self_attention_equals_its_equations(h):
    torch.manual_seed(0)
    head = SelfAttentionHead(TEXT, output_normalize=True).double().requires_grad_(False)
    for norm in (head.cross_norm, head.ff_norm):
        norm.weight.normal_(1, 0.3)
        norm.bias.normal_(0, 0.3)
    rows = []
    for first, last in ((0, 5), (5, 9)):
        x = F.layer_norm(h[first:last], (16,), head.cross_norm.weight, head.cross_norm.bias)
        q, k, v = (x @ w.T for w in head.to_qkv.weight.chunk(3))
        out = []
        for n in range(2):
            part = slice(10 * n, 10 * n + 10)
            out.append((q[:, part] @ k[:, part].T / 10**0.5).softmax(-1) @ v[:, part])
        h1 = torch.cat(out, dim=1) @ head.to_out.weight.T + h[first:last]
        x = F.layer_norm(h1, (16,), head.ff_norm.weight, head.ff_norm.bias)
        u, g = (x @ head.ff_up.weight.T + head.ff_up.bias).chunk(2, dim=-1)
        rows.append((u * F.gelu(g)) @ head.ff_down.weight.T + head.ff_down.bias + h1)
    with ops.use_impl("torch"):
        torch.testing.assert_close(head.token_states(h, LAYOUT), torch.cat(rows))
        got = head(h, LAYOUT, KEEP)
    wanted = torch.stack([rows[0][KEEP[:5]].mean(0), rows[1][KEEP[5:]].mean(0)])
    torch.testing.assert_close(got[[0, 2]], F.normalize(wanted, dim=-1))


@pytest.mark.parametrize("name", ("latent", *OTHERS))
def test_a_saved_model_comes_back(name, tmp_path):
    torch.manual_seed(0)
    config = NVEmbedConfig(TEXT, LATENT, pooling_head=name)
    model = NVEmbedModel(config)
    checkpoint.save_model(model, tmp_path, dtype=torch.float32)
    loaded = checkpoint.load_model(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    assert loaded.config == dataclasses.replace(config, torch_dtype="float32")
    assert set(loaded.state_dict()) == set(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_every_head_has_its_own_tensors():
    names = {
        name: {
            n.split(".")[0]
            for n in checkpoint.published_tensors(NVEmbedConfig(TEXT, LATENT, pooling_head=name))
        }
        for name in ("latent", *OTHERS)
    }
    backbone = {"embedding_model"}
    assert names == {
        "latent": backbone | {"latent_attention_model"},
        "mean": backbone,
        "eos": backbone,
        "self_attention": backbone | {"self_attention_model"},
    }


def test_an_unknown_head_names_the_choices():
    with pytest.raises(ValueError, match="pooling_head must be one of 'latent', .*, got 'max'"):
        NVEmbedConfig(TEXT, LATENT, pooling_head="max")


def test_latents_of_another_head_are_refused():
    config = NVEmbedConfig(TEXT, LATENT, pooling_head="mean")
    with pytest.raises(ValueError, match="latents='direct' is about the latent head, .* pools by 'mean'"):
        Placement.decide(config, latents="direct")
    assert Placement.decide(config).latents is None
