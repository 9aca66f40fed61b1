"""Start an NV-Embed model from a decoder: its weights, its tokenizer, and a fresh pooling head.

A decoder is a Hugging Face directory (model_type mistral or llama) or a GGUF
file of the llama architecture. Both become the same three things:

1. a `BackboneConfig`: what it asks for and the backbone does not compute (biases, scaled or partial rotary
   embeddings, experts) is refused; a sliding window and the language-model head are left out;
2. our packed weights: tensor by tensor, in the dtype they will be stored in;
3. the tokenizer's files. A GGUF file carries tokens and merges, but only the name of the rule that cuts text
   into words, so only tokenizers whose rule is known here are built.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn

from nvembed_fast.checkpoint.hub import resolve
from nvembed_fast.checkpoint.load import empty_parameters, load_weights, stored_tensors
from nvembed_fast.checkpoint.names import CONFIG_FILE, HARMLESS, Slot, published_tensors, tokenizer_files
from nvembed_fast.checkpoint.save import save_model
from nvembed_fast.config import BackboneConfig, LatentConfig, NVEmbedConfig, PoolingHeadName
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.placement import check_dtype
from nvembed_fast.tokenization import TextTokenizer

__all__ = ["Decoder", "init_model", "open_decoder"]

_SMALL_WIDTH, _SMALL_HEAD_WIDTH, _PUBLISHED_HEAD_WIDTH = 2048, 64, 4096
_BACKBONE = "embedding_model."
_LEFT_OUT = re.compile(HARMLESS.pattern + r"|lm_head\.weight")

# GGUF's kinds of tokens
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
# how a byte-level tokenizer cuts text before merging, by the name in the file: into the words of GPT-2, and
# whether every digit stands alone before that
_PRE_TOKENIZERS = {"gpt-2": False, "smollm": True, "starcoder": True, "refact": True, "command-r": True}
_USE_DIRECTORY = "Start from the decoder's Hugging Face directory instead: it has tokenizer.json"


@dataclass(frozen=True)
class Decoder:
    """A decoder that was opened; weights are read when asked for.

    Attributes:
        config: the backbone's config.
        dtype: the smallest dtype that stores the weights without harm.
        load: dtype -> our backbone's parameters, named as in `NVEmbedModel`, on the CPU.
        tokenizer: what `write_tokenizer` writes.
        write_tokenizer: directory -> the tokenizer's files, written there.
    """

    config: BackboneConfig
    dtype: torch.dtype
    load: Callable[[torch.dtype], dict[str, torch.Tensor]]
    tokenizer: TextTokenizer
    write_tokenizer: Callable[[Path], list[Path]]


def init_model(
    source: str | PathLike,
    output_directory: str | PathLike,
    *,
    num_latents: int = 512,
    num_heads: int = 8,
    head_width: int | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    pooling_head: PoolingHeadName = "latent",
) -> None:
    """Write an untrained NV-Embed model on a decoder, in the published layout.

    Args:
        source: a Hugging Face directory or hub id, or a GGUF file.
        output_directory: created; must not hold a model yet.
        num_latents: latents of the head.
        num_heads: heads of its attention.
        head_width: the width of one; None takes 64 for decoders narrower than 2048, else the published 4096.
        dtype: of the stored weights; None takes the decoder's own, and float16 for quantised ones: its
            rounding (2**-11) lies far below a quantisation step.
        seed: of the fresh head; the same seed gives the same head in every dtype.
        pooling_head: "latent", or for comparison "mean", "eos" or "self_attention"; the three arguments about
            latents then mean nothing.

    Raises:
        FileExistsError: the output directory holds a model.
        FileNotFoundError, ValueError, ImportError: the decoder cannot be used, and why.
    """
    output_directory = Path(output_directory)
    if (output_directory / CONFIG_FILE).exists():
        raise FileExistsError(
            f"{output_directory} already holds a model: remove it or choose another directory"
        )
    for name, value in (("num_latents", num_latents), ("num_heads", num_heads), ("head_width", head_width)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    decoder = open_decoder(source)
    stored = decoder.dtype if dtype is None else check_dtype(dtype)
    width = decoder.config.hidden_size
    if head_width is None:
        head_width = _SMALL_HEAD_WIDTH if width < _SMALL_WIDTH else _PUBLISHED_HEAD_WIDTH
    head = LatentConfig(num_latents, num_heads, head_width, hidden_dim=width, latent_dim=width)
    # another tokenizer may merge across the border between instruction and text, so the published rule
    # (drop as many tokens as the instruction has alone) would drop the text's first word with it
    config = NVEmbedConfig(decoder.config, head, pooling_start="text_offset", pooling_head=pooling_head)
    with torch.device("meta"):
        model = NVEmbedModel(config)
    fresh = _fresh_head(model.head, torch.Generator().manual_seed(seed))
    values = decoder.load(stored)
    values |= {f"head.{name}": value.to(stored) for name, value in fresh}
    model.load_state_dict(values, assign=True)
    with tempfile.TemporaryDirectory() as aside:
        save_model(model, output_directory, tokenizer_files=decoder.write_tokenizer(Path(aside)))


def _fresh_head(head: nn.Module, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """What PyTorch's own modules start with, drawn from one generator in fp32, parameter by parameter."""
    for name, parameter in head.named_parameters(recurse=False):  # the latents
        yield name, torch.randn(parameter.shape, generator=generator)
    for name, module in head.named_children():
        for part, parameter in module.named_parameters():
            if isinstance(module, nn.LayerNorm):
                yield f"{name}.{part}", torch.full(parameter.shape, float(part == "weight"))
            else:
                bound = module.in_features**-0.5
                drawn = torch.rand(parameter.shape, generator=generator)
                yield f"{name}.{part}", drawn.mul_(2 * bound).sub_(bound)


def open_decoder(source: str | PathLike) -> Decoder:
    """Open a Hugging Face directory, a hub id or a GGUF file, and check all but the weights' values."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    decoder = _open_gguf(path) if path.is_file() else _open_hugging_face(resolve(source))
    largest = max(decoder.tokenizer.backend.get_vocab(with_added_tokens=True).values())
    if largest >= decoder.config.vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has an id {largest}, the embedding {decoder.config.vocab_size} rows"
        )
    return decoder


def _backbone_table(config: BackboneConfig) -> dict[str, Slot]:
    """The published names of the backbone, without their first segment."""
    head = LatentConfig(1, 1, 1, hidden_dim=config.hidden_size, latent_dim=1)
    table = published_tensors(NVEmbedConfig(config, head))
    return {n.removeprefix(_BACKBONE): slot for n, slot in table.items() if n.startswith(_BACKBONE)}


def _open_hugging_face(directory: Path) -> Decoder:
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{directory} has no {CONFIG_FILE}: it is no Hugging Face model")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw.get("model_type") not in ("mistral", "llama"):
            raise ValueError(f"model_type must be 'mistral' or 'llama', got {raw.get('model_type')!r}")
        # whatever a decoder was trained as, here it sees both ways
        config = BackboneConfig.from_dict(raw | {"is_causal": False})
        dtype = check_dtype(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from error
    tokenizer = TextTokenizer.from_directory(directory)
    # a model without its language-model head is saved without this first segment
    headers = stored_tensors(directory).values()
    prefix = "model." if any(name.startswith("model.") for header in headers for name in header) else ""
    table = {prefix + name: slot for name, slot in _backbone_table(config).items()}

    def load(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return load_weights(directory, table, device=torch.device("cpu"), dtype=dtype, ignored=_LEFT_OUT)

    return Decoder(config, dtype, load, tokenizer, lambda _: tokenizer_files(directory))


def _open_gguf(file: Path) -> Decoder:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"{file}: reading GGUF files needs the package gguf: pip install 'nvembed-fast[demo]'"
        ) from error
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is cut short or no GGUF file ({error}): download it again") from error
    facts = {name: field.contents() for name, field in reader.fields.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _gguf_config(facts, stored)
        names = _gguf_names(config)
        _check_gguf_tensors(names, stored)
        backend, special = _gguf_tokenizer(facts)
        tokenizer = TextTokenizer(backend, special["eos_token"], "text_offset")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    kinds = {stored[name].tensor_type.name for name, slot in names.items() if len(slot.shape) > 1}
    dtype = torch.float32 if "F32" in kinds else torch.bfloat16 if "BF16" in kinds else torch.float16

    def load(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        values = empty_parameters(names, device=torch.device("cpu"), dtype=dtype)
        stored_as = str(dtype).removeprefix("torch.")
        for name, slot in names.items():
            data = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
            value = torch.from_numpy(np.array(data, dtype=np.float32)).reshape(slot.shape)
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                value = _half_split_rows(value, config.head_dim)
            target = values[slot.parameter][slot.rows].copy_(value)
            if not torch.stack(target.aminmax()).isfinite().all():
                raise ValueError(f"{file}: tensor {name!r} holds NaN, Inf or more than {stored_as} holds")
        return values

    def write_tokenizer(directory: Path) -> list[Path]:
        backend.save(str(directory / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
        for name, content in (
            ("tokenizer_config.json", settings | special),
            ("special_tokens_map.json", special),
        ):
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (directory / name).write_text(text + "\n", encoding="utf-8")
        return tokenizer_files(directory)

    return Decoder(config, dtype, load, tokenizer, write_tokenizer)


def _gguf_config(facts: dict[str, Any], stored: dict[str, Any]) -> BackboneConfig:
    architecture = facts.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"the architecture must be 'llama' (Mistral files have it too), got {architecture!r}"
        )

    def fact(name: str, *default: Any) -> Any:
        if (value := facts.get(f"llama.{name}", *default)) is None and not default:
            raise ValueError(f"llama.{name} is missing")
        return value

    heads, width = fact("attention.head_count"), fact("embedding_length")
    head_dim = fact("attention.key_length", width // heads)
    # what the backbone would silently leave out
    for name, harmless in (
        ("rope.scaling.type", "none"),
        ("rope.scale_linear", 1.0),
        ("rope.dimension_count", head_dim),
        ("attention.value_length", head_dim),
        ("expert_count", 0),
    ):
        if (value := fact(name, harmless)) != harmless:
            raise ValueError(f"llama.{name}={value!r} is not supported by this backbone")
    if "token_embd.weight" not in stored:
        raise ValueError("tensor 'token_embd.weight' is missing")
    return BackboneConfig(
        vocab_size=int(stored["token_embd.weight"].shape[1]),
        hidden_size=width,
        intermediate_size=fact("feed_forward_length"),
        num_hidden_layers=fact("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=fact("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=fact("context_length"),
        rope_theta=fact("rope.freq_base", 10000.0),
        # stored as fp32: back to the decimal number it was
        rms_norm_eps=float(str(np.float32(fact("attention.layer_norm_rms_epsilon")))),
    )


def _gguf_names(config: BackboneConfig) -> dict[str, Slot]:
    """The backbone's tensors under their GGUF names."""
    parts = {
        "embed_tokens": "token_embd",
        "layers": "blk",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    names: dict[str, Slot] = {}
    for name, slot in _backbone_table(config).items():
        for ours, theirs in parts.items():
            name = name.replace(ours + ".", theirs + ".")
        names["output_norm.weight" if name == "norm.weight" else name] = slot
    return names


def _check_gguf_tensors(names: dict[str, Slot], stored: dict[str, Any]) -> None:
    for name, slot in names.items():
        if name not in stored:
            raise ValueError(f"tensor {name!r} is missing")
        found = tuple(reversed(stored[name].shape.tolist()))
        if found != slot.shape:
            raise ValueError(f"tensor {name!r} must be {list(slot.shape)}, found {list(found)}")
    if extra := sorted(stored.keys() - names.keys() - {"output.weight"}):
        raise ValueError(
            f"it holds {extra[0]!r} ({len(extra)} such tensors), which this backbone does not compute: "
            "biases, scaled rotary embeddings and experts are not supported"
        )


def _half_split_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of a query or key projection from llama.cpp's order to ours.

    A pair that is rotated together lies side by side there, and half a head apart here.
    """
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _gguf_tokenizer(facts: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer a GGUF file carries, and its special tokens by role."""

    def fact(name: str, *default: Any) -> Any:
        if (value := facts.get(f"tokenizer.ggml.{name}", *default)) is None and not default:
            raise ValueError(f"tokenizer.ggml.{name} is missing")
        return value

    tokens, kind = fact("tokens"), fact("model")
    types = fact("token_type", [_NORMAL] * len(tokens))
    vocab = {token: index for index, token in enumerate(tokens)}
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: fact(f"{name}_token_id", None) for role, name in roles.items()}
    special = {role: tokens[index] for role, index in ids.items() if index is not None}
    if "eos_token" not in special:
        raise ValueError("tokenizer.ggml.eos_token_id is missing: a text's end cannot be marked")
    special.setdefault("pad_token", special["eos_token"])

    if kind == "gpt2":
        tokenizer = _byte_level_tokenizer(vocab, fact("merges"), fact("pre", "default"))
        adds_bos = False
    elif kind == "llama":
        tokenizer = _sentencepiece_tokenizer(vocab, fact("scores"), types, fact("add_space_prefix", True))
        adds_bos = True
    else:
        raise ValueError(f"tokenizer.ggml.model must be 'gpt2' or 'llama', got {kind!r}. {_USE_DIRECTORY}")
    for index, kind_of_token in enumerate(types):
        if kind_of_token in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            is_special = kind_of_token != _USER_DEFINED
            token = AddedToken(tokens[index], normalized=False, special=is_special)
            (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([token])
    if fact("add_bos_token", adds_bos):
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos_token"])]
        )
    return tokenizer, special


def _byte_level_tokenizer(vocab: dict[str, int], merges: list[str], rule: str) -> Tokenizer:
    if rule not in _PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre must be one of {', '.join(_PRE_TOKENIZERS)}, got {rule!r}. {_USE_DIRECTORY}"
        )
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    before = [pre_tokenizers.Digits(individual_digits=True)] if _PRE_TOKENIZERS[rule] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, words])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_tokenizer(
    vocab: dict[str, int], scores: list[float], types: list[int], add_space_prefix: bool
) -> Tokenizer:
    """SentencePiece stores no merges: any two pieces that make a third merge, the best third first."""
    mergeable = {t: i for t, i in vocab.items() if types[i] in (_NORMAL, _USER_DEFINED)}
    found = [
        (-scores[index], index, vocab[piece[:cut]], vocab[piece[cut:]], (piece[:cut], piece[cut:]))
        for piece, index in mergeable.items()
        for cut in range(1, len(piece))
        if piece[:cut] in mergeable and piece[cut:] in mergeable
    ]
    unknown = next((token for token, index in vocab.items() if types[index] == _UNKNOWN), None)
    merges = [parts for *_, parts in sorted(found)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("\u2581")] if add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * add_space_prefix
    )
    return tokenizer
