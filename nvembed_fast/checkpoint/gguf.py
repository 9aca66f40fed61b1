"""GGUF files of the llama architecture: the config, the weights and the tokenizer in one file.

The weights are expanded tensor by tensor. The tokenizer is built from the tokens and merges in the file. Of
the rule that cuts text into words the file holds only the name, so a tokenizer is refused unless this module
knows its rule.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from nvembed_fast.checkpoint.load import empty_parameters
from nvembed_fast.checkpoint.names import Slot, backbone_tensors, tokenizer_files
from nvembed_fast.config import BackboneConfig
from nvembed_fast.placement import dtype_name
from nvembed_fast.tokenization import TextTokenizer

__all__ = ["GGUFFile"]

# kinds of tokens
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
# rules by which a byte-level tokenizer cuts text before it merges: all cut into the words of GPT-2. The value
# says whether every digit is cut off before that
_PRE_TOKENIZERS = {"gpt-2": False, "smollm": True, "starcoder": True, "refact": True, "command-r": True}
_USE_DIRECTORY = "Start from the decoder's Hugging Face directory instead: it has tokenizer.json"


class GGUFFile:
    """A `decoders.Decoder` in a GGUF file, checked when it is opened but for its weights' values.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: the file is damaged, or holds something that the backbone does not compute.
    """

    def __init__(self, file: Path):
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
        self._file = file
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        try:
            self.config = _config(facts, self._stored)
            self._slots = _slots(self.config)
            _check_tensors(self._slots, self._stored)
            backend, self._special_tokens = _tokenizer(facts)
            self.tokenizer = TextTokenizer(backend, self._special_tokens["eos_token"], "text_offset")
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        matrices = (name for name, slot in self._slots.items() if len(slot.shape) > 1)
        kinds = {self._stored[name].tensor_type.name for name in matrices}
        self.dtype = torch.float32 if "F32" in kinds else torch.bfloat16 if "BF16" in kinds else torch.float16

    def load(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        from gguf import quants

        values = empty_parameters(self._slots, device=torch.device("cpu"), dtype=dtype)
        for name, slot in self._slots.items():
            data = quants.dequantize(self._stored[name].data, self._stored[name].tensor_type)
            value = torch.from_numpy(np.array(data, dtype=np.float32)).reshape(slot.shape)
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                value = _half_split_rows(value, self.config.head_dim)
            target = values[slot.parameter][slot.rows].copy_(value)
            if not torch.stack(target.aminmax()).isfinite().all():
                raise ValueError(
                    f"{self._file}: tensor {name!r} holds NaN, Inf or more than {dtype_name(dtype)} holds"
                )
        return values

    def write_tokenizer(self, directory: Path) -> list[Path]:
        self.tokenizer.backend.save(str(directory / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
        for name, content in (
            ("tokenizer_config.json", settings | self._special_tokens),
            ("special_tokens_map.json", self._special_tokens),
        ):
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (directory / name).write_text(text + "\n", encoding="utf-8")
        return tokenizer_files(directory)


def _config(facts: dict[str, Any], stored: dict[str, Any]) -> BackboneConfig:
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
    # features that the backbone would silently ignore
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
        # stored as fp32: round it back to the decimal number
        rms_norm_eps=float(str(np.float32(fact("attention.layer_norm_rms_epsilon")))),
    )


def _slots(config: BackboneConfig) -> dict[str, Slot]:
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
    for name, slot in backbone_tensors(config).items():
        for ours, theirs in parts.items():
            name = name.replace(ours + ".", theirs + ".")
        names["output_norm.weight" if name == "norm.weight" else name] = slot
    return names


def _check_tensors(names: dict[str, Slot], stored: dict[str, Any]) -> None:
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

    llama.cpp stores the two rows that are rotated together side by side. Ours lie half a head apart.
    """
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tokenizer(facts: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer in a GGUF file, and its special tokens by role."""

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
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    before = [pre_tokenizers.Digits(individual_digits=True)] if _PRE_TOKENIZERS[rule] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, words])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_tokenizer(
    vocab: dict[str, int], scores: list[float], types: list[int], add_space_prefix: bool
) -> Tokenizer:
    """SentencePiece stores no merges. Any two pieces that make a third one merge, the best third first."""
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
