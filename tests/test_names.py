"""The published names: the real model's tensors, and the place of each in our modules."""

import math

import torch
from safetensors.torch import load_file
from tiny_checkpoint import TINY

from nvembed_fast.checkpoint import load_model, published_tensors
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.network.model import NVEmbedModel


def real_names_and_shapes() -> dict[str, list[int]]:
    """The published checkpoint's tensors, written out without the code under test."""
    names = {"embed_tokens": [32000, 4096], "norm": [4096]}
    for i in range(32):
        names |= {
            f"layers.{i}.input_layernorm": [4096],
            f"layers.{i}.self_attn.q_proj": [4096, 4096],
            f"layers.{i}.self_attn.k_proj": [1024, 4096],
            f"layers.{i}.self_attn.v_proj": [1024, 4096],
            f"layers.{i}.self_attn.o_proj": [4096, 4096],
            f"layers.{i}.post_attention_layernorm": [4096],
            f"layers.{i}.mlp.gate_proj": [14336, 4096],
            f"layers.{i}.mlp.up_proj": [14336, 4096],
            f"layers.{i}.mlp.down_proj": [4096, 14336],
        }
    tensors = {f"embedding_model.{name}.weight": shape for name, shape in names.items()}
    tensors |= {
        "latents": [512, 4096],
        "cross_attend_blocks.0.norm.weight": [4096],
        "cross_attend_blocks.0.norm.bias": [4096],
        "cross_attend_blocks.0.norm_context.weight": [4096],
        "cross_attend_blocks.0.norm_context.bias": [4096],
        "cross_attend_blocks.0.fn.to_q.weight": [32768, 4096],
        "cross_attend_blocks.0.fn.to_kv.weight": [65536, 4096],
        "cross_attend_blocks.0.fn.to_out.weight": [4096, 32768],
        "cross_attend_blocks.1.norm.weight": [4096],
        "cross_attend_blocks.1.norm.bias": [4096],
        "cross_attend_blocks.1.fn.net.0.weight": [32768, 4096],
        "cross_attend_blocks.1.fn.net.0.bias": [32768],
        "cross_attend_blocks.1.fn.net.2.weight": [4096, 16384],
        "cross_attend_blocks.1.fn.net.2.bias": [4096],
    }
    return {n if n.startswith("embedding") else f"latent_attention_model.{n}": s for n, s in tensors.items()}


def test_the_real_model_has_the_published_names_shapes_and_bytes():
    # the published config.json states of the head only its model_type
    config = NVEmbedConfig.from_dict(
        {"model_type": "nvembed", "latent_attention_config": {"model_type": "latent_attention"}}
    )
    table = published_tensors(config)
    wanted = real_names_and_shapes()
    assert len(wanted) == 304
    assert {name: list(slot.shape) for name, slot in table.items()} == wanted
    assert sum(math.prod(shape) for shape in wanted.values()) * 2 == 15_702_032_384

    with torch.device("meta"):
        model = NVEmbedModel(config).half()
    assert sum(p.nbytes for p in model.parameters()) == 15_702_032_384
    assert_slots_tile_every_parameter(table, model)


def assert_slots_tile_every_parameter(table, model) -> None:
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        rows = [slot.rows for slot in table.values() if slot.parameter == name]
        assert [r.start for r in rows] == [0, *(r.stop for r in rows[:-1])], name
        assert rows[-1].stop == parameter.shape[0], name
        assert all(s.shape[1:] == parameter.shape[1:] for s in table.values() if s.parameter == name)
    assert {slot.parameter for slot in table.values()} == parameters.keys()


def test_every_tensor_lies_in_its_rows():
    model = load_model(TINY, dtype="float16")
    stored = load_file(TINY / "model.safetensors")
    table = published_tensors(model.config)
    assert table.keys() == stored.keys() and len(table) == 43
    assert_slots_tile_every_parameter(table, model)
    parameters = dict(model.named_parameters())
    for name, slot in table.items():
        assert torch.equal(parameters[slot.parameter][slot.rows], stored[name]), name
    # in the order the forward pass splits them
    qkv = parameters["embedding_model.layers.2.self_attn.qkv_proj.weight"]
    parts = [stored[f"embedding_model.layers.2.self_attn.{p}_proj.weight"] for p in "qkv"]
    assert torch.equal(qkv, torch.cat(parts))
    gate_up = parameters["embedding_model.layers.0.mlp.gate_up_proj.weight"]
    parts = [stored[f"embedding_model.layers.0.mlp.{p}_proj.weight"] for p in ("gate", "up")]
    assert torch.equal(gate_up, torch.cat(parts))
