"""Tiny random decoders in both file forms, and their hidden states by transformers and by us."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from nvembed_fast.checkpoint.decoders import Decoder
from nvembed_fast.network.mistral import MistralBackbone
from nvembed_fast.packing import PackedBatch

HEADS, KV_HEADS, HEAD_DIM, WIDTH, LAYERS = 4, 2, 16, 48, 3
LENGTHS = (7, 1, 13)
BYTES = [chr(c) for c in range(33, 127)]


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


def backbone_of(decoder: Decoder, is_causal: bool) -> MistralBackbone:
    backbone = MistralBackbone(dataclasses.replace(decoder.config, is_causal=is_causal))
    weights = decoder.load(torch.float32).items()
    backbone.load_state_dict({n.removeprefix("embedding_model."): v for n, v in weights}, assign=True)
    return backbone.eval().requires_grad_(False)


def states(backbone: MistralBackbone, ids: list[list[int]]) -> tuple[torch.Tensor, ...]:
    batch = PackedBatch.from_ids([np.array(i) for i in ids], [0] * len(ids))
    return backbone(batch).split([len(i) for i in ids])


def random_ids() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 99, (n,), generator=generator).tolist() for n in LENGTHS]


def reference_states(model, ids: list[list[int]]) -> list[torch.Tensor]:
    # a mask is given, or transformers may take the absence of one for a causal one
    masks = [torch.ones(1, len(i), dtype=torch.long) for i in ids]
    pairs = zip(ids, masks, strict=True)
    return [model(torch.tensor([i]), attention_mask=m).last_hidden_state[0] for i, m in pairs]


def transformers_model(kind: str, **changes):
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": 99,
            "hidden_size": WIDTH,
            "intermediate_size": 80,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
            "attn_implementation": "eager",
            **({"sliding_window": None} if kind == "Mistral" else {}),
        }
        | changes
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def write_tokenizer(directory: Path, size: int = 99) -> None:
    words = {f"w{i}": i for i in range(size - 2)} | {"<unk>": size - 2, "</s>": size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))


def write_mistral(directory: Path) -> Path:
    """A tiny Mistral with its tokenizer, as save_pretrained writes it."""
    transformers_model("Mistral").save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def write_gguf(file: Path, model=None, facts=None, tokenizer=None, tensors=None, skip=()) -> Path:
    """A llama file as llama.cpp's converter writes it: q and k rows in its own order."""
    import gguf

    model = model or transformers_model("Llama")
    c = model.config
    facts = {
        "llama.block_count": c.num_hidden_layers,
        "llama.context_length": 2048,
        "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads,
        "llama.attention.key_length": c.head_dim,
        "llama.attention.value_length": c.head_dim,
        "llama.rope.dimension_count": c.head_dim,
        "llama.rope.freq_base": 700.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-3,
    } | (facts or {})
    tokenizer = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": ["<unk>", "<s>", "</s>", "ab", *BYTES[:95]],
        "merges": ["a b"],
        "token_type": [2, 3, 3, *[1] * 95],
        "eos_token_id": 2,
        "bos_token_id": 1,
        "add_bos_token": False,
    } | (tokenizer or {})
    renamed = {
        "input_layernorm": "attn_norm",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj": "",
        "model.layers": "blk",
        "model.norm": "output_norm",
        "model.embed_tokens": "token_embd",
        "lm_head": "output",
    }
    stored = {}
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = array.shape[0] // c.head_dim
            array = array.reshape(heads, 2, c.head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        stored[name] = array
    stored |= tensors or {}

    writer = gguf.GGUFWriter(file, facts.pop("general.architecture", "llama"))
    for name, value in (facts | {f"tokenizer.ggml.{n}": v for n, v in tokenizer.items()}).items():
        if value is None:
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add.get(type(value), writer.add_array)(name, value)
    for name, array in stored.items():
        if name not in skip:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
