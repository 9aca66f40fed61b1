"""The names of the published layout and their places in our modules.

The published layout names every projection on its own. Ours packs query, key and value into one weight, and
gate and up into another. `published_tensors` is the whole translation. Reading and writing both use it.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from nvembed_fast.config import BackboneConfig, LatentConfig, NVEmbedConfig
from nvembed_fast.tokenization import TOKENIZER_FILES

__all__ = [
    "CONFIG_FILE",
    "HARMLESS",
    "INDEX_FILE",
    "SINGLE_FILE",
    "Slot",
    "backbone_tensors",
    "published_tensors",
    "tokenizer_files",
]

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# buffers that older versions of transformers stored along with the weights
HARMLESS = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")

_BACKBONE = "embedding_model."


@dataclass(frozen=True)
class Slot:
    """Where a published tensor lives in our model.

    Attributes:
        parameter: our parameter's name.
        rows: the rows of the parameter that this tensor fills.
        shape: the published tensor's shape.
    """

    parameter: str
    rows: slice
    shape: tuple[int, ...]


def published_tensors(config: NVEmbedConfig) -> dict[str, Slot]:
    """Every tensor name of the published layout, in the model's order, and its place in ours."""
    text, head = config.text_config, config.latent_attention_config
    d, f, c = text.hidden_size, text.intermediate_size, head.latent_dim
    q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    inner = head.num_cross_heads * head.cross_dim_head
    # published name, our name, published shape. Lines of one parameter fill its rows from the top
    layer = (
        ("input_layernorm.weight", "input_layernorm.weight", (d,)),
        ("self_attn.q_proj.weight", "self_attn.qkv_proj.weight", (q, d)),
        ("self_attn.k_proj.weight", "self_attn.qkv_proj.weight", (kv, d)),
        ("self_attn.v_proj.weight", "self_attn.qkv_proj.weight", (kv, d)),
        ("self_attn.o_proj.weight", "self_attn.o_proj.weight", (d, q)),
        ("post_attention_layernorm.weight", "post_attention_layernorm.weight", (d,)),
        ("mlp.gate_proj.weight", "mlp.gate_up_proj.weight", (f, d)),
        ("mlp.up_proj.weight", "mlp.gate_up_proj.weight", (f, d)),
        ("mlp.down_proj.weight", "mlp.down_proj.weight", (d, f)),
    )
    feed_forward = (
        ("cross_attend_blocks.1.norm.weight", "ff_norm.weight", (d,)),
        ("cross_attend_blocks.1.norm.bias", "ff_norm.bias", (d,)),
        ("cross_attend_blocks.1.fn.net.0.weight", "ff_up.weight", (8 * d, d)),
        ("cross_attend_blocks.1.fn.net.0.bias", "ff_up.bias", (8 * d,)),
        ("cross_attend_blocks.1.fn.net.2.weight", "ff_down.weight", (d, 4 * d)),
        ("cross_attend_blocks.1.fn.net.2.bias", "ff_down.bias", (d,)),
    )
    latent = (
        ("latents", "latents", (head.num_latents_value, c)),
        ("cross_attend_blocks.0.norm.weight", "cross_norm.weight", (d,)),
        ("cross_attend_blocks.0.norm.bias", "cross_norm.bias", (d,)),
        ("cross_attend_blocks.0.norm_context.weight", "context_norm.weight", (c,)),
        ("cross_attend_blocks.0.norm_context.bias", "context_norm.bias", (c,)),
        ("cross_attend_blocks.0.fn.to_q.weight", "to_q.weight", (inner, d)),
        ("cross_attend_blocks.0.fn.to_kv.weight", "to_kv.weight", (2 * inner, c)),
        ("cross_attend_blocks.0.fn.to_out.weight", "to_out.weight", (d, inner)),
        *feed_forward,
    )
    # no published model has this head, so its names follow those of the latent one
    self_attention = (
        ("cross_attend_blocks.0.norm.weight", "cross_norm.weight", (d,)),
        ("cross_attend_blocks.0.norm.bias", "cross_norm.bias", (d,)),
        ("cross_attend_blocks.0.fn.to_qkv.weight", "to_qkv.weight", (3 * q, d)),
        ("cross_attend_blocks.0.fn.to_out.weight", "to_out.weight", (d, q)),
        *feed_forward,
    )
    # prefix of the published names, prefix of ours, lines
    embedding = (("embed_tokens.weight", "embed_tokens.weight", (text.vocab_size, d)),)
    groups: list[tuple[str, str, tuple[tuple[str, str, tuple[int, ...]], ...]]]
    groups = [(_BACKBONE, _BACKBONE, embedding)]
    layers = [f"{_BACKBONE}layers.{i}." for i in range(text.num_hidden_layers)]
    groups += [(prefix, prefix, layer) for prefix in layers]
    groups += [(_BACKBONE, _BACKBONE, (("norm.weight", "norm.weight", (d,)),))]
    if config.pooling_head == "latent":
        groups += [("latent_attention_model.", "head.", latent)]
    elif config.pooling_head == "self_attention":
        groups += [("self_attention_model.", "head.", self_attention)]

    table: dict[str, Slot] = {}
    filled: dict[str, int] = defaultdict(int)
    for published_prefix, prefix, lines in groups:
        for published, ours, shape in lines:
            first = filled[prefix + ours]
            filled[prefix + ours] += shape[0]
            table[published_prefix + published] = Slot(prefix + ours, slice(first, first + shape[0]), shape)
    return table


def backbone_tensors(config: BackboneConfig) -> dict[str, Slot]:
    """The backbone's tensors, named as in a decoder: the published names without their first segment."""
    head = LatentConfig(1, 1, 1, hidden_dim=config.hidden_size, latent_dim=1)
    table = published_tensors(NVEmbedConfig(config, head))
    return {n.removeprefix(_BACKBONE): slot for n, slot in table.items() if n.startswith(_BACKBONE)}


def tokenizer_files(directory: str | PathLike) -> list[Path]:
    """The tokenizer files of a model directory that exist."""
    return [p for name in TOKENIZER_FILES if (p := Path(directory) / name).is_file()]
