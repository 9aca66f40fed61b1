"""GGUF files of the llama architecture: the config, the weights and the tokenizer in one file.

The weights are expanded tensor by tensor. The tokenizer is built from the tokens and merges in the file. Of
the rule that cuts text into words the file holds only the name, so a tokenizer is refused unless this module
knows its rule.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from nvembed_fast.checkpoint.gguf_reader import GGUFTensor, read_gguf
from nvembed_fast.checkpoint.load import empty_parameters
from nvembed_fast.checkpoint.names import Slot, backbone_tensors, tokenizer_files
from nvembed_fast.config import BackboneConfig, check_flag, check_integer
from nvembed_fast.files import brief
from nvembed_fast.placement import dtype_name
from nvembed_fast.tokenization import TextTokenizer

__all__ = ["GGUFFile"]

# kinds of tokens
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
# rules by which a byte-level tokenizer cuts text before it merges: all cut into the words of GPT-2. The value
# says whether every digit is cut off before that
_PRE_TOKENIZERS = {"gpt-2": False, "smollm": True, "starcoder": True, "refact": True, "command-r": True}
_MAX_CHARACTERS = 1024
# fields of `BackboneConfig` and of the file
_FIELDS = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "max_position_embeddings": "llama.context_length",
    "rope_theta": "llama.rope.freq_base",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
}
_USE_DIRECTORY = "Start from the decoder's Hugging Face directory instead: it has tokenizer.json"


class GGUFFile:
    """A `decoders.Decoder` in a GGUF file, checked when it is opened but for its weights' values.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: the file is damaged, or holds something that the backbone does not compute.
    """

    def __init__(self, file: Path):
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"{file}: reading GGUF files needs the package gguf: pip install 'nvembed-fast[demo]'"
            ) from error
        try:
            facts, self._stored = read_gguf(file)
        except ValueError as error:
            raise ValueError(f"{file} is cut short or no GGUF file ({error}): download it again") from error
        self._file = file
        try:
            self.config = _config(facts, self._stored)
            self._slots = _slots(self.config)
            _check_tensors(self._slots, self._stored)
            backend, self._special_tokens = _tokenizer(facts)
            self.tokenizer = TextTokenizer(backend, self._special_tokens["eos_token"], "text_offset")
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        matrices = (name for name, slot in self._slots.items() if len(slot.shape) > 1)
        kinds = {self._stored[name].kind.name for name in matrices}
        self.dtype = torch.float32 if "F32" in kinds else torch.bfloat16 if "BF16" in kinds else torch.float16

    def load(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        from gguf import quants

        values = empty_parameters(self._slots, device=torch.device("cpu"), dtype=dtype)
        for name, slot in self._slots.items():
            data = quants.dequantize(self._stored[name].data, self._stored[name].kind)
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


def _config(facts: dict[str, Any], stored: dict[str, GGUFTensor]) -> BackboneConfig:
    architecture = facts.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"general.architecture must be 'llama' (Mistral files have it too), got {brief(architecture)}"
        )
    if "token_embd.weight" not in stored:
        raise ValueError("tensor 'token_embd.weight' is missing")
    heads = facts.get(_FIELDS["num_attention_heads"])
    given: dict[str, Any] = {"num_key_value_heads": heads, "rope_theta": 10000.0, "head_dim": None}
    for ours, theirs in _FIELDS.items():
        if theirs in facts:
            given[ours] = facts[theirs]
        elif ours not in given:
            raise ValueError(f"{theirs} is missing")
    epsilon = given["rms_norm_eps"]
    if isinstance(epsilon, float):  # stored as fp32: round it back to the decimal number
        with np.errstate(over="ignore"):
            given["rms_norm_eps"] = float(str(np.float32(epsilon)))
    try:
        config = BackboneConfig(vocab_size=stored["token_embd.weight"].shape[0], **given)
    except ValueError as error:
        message = re.sub("|".join(_FIELDS), lambda found: _FIELDS[found[0]], str(error))
        raise ValueError(message) from error
    # features that the backbone would silently ignore
    key_length = f" ({_FIELDS['head_dim']})"
    for name, harmless, why in (
        ("rope.scaling.type", "none", ""),
        ("rope.scale_linear", 1.0, ""),
        ("rope.dimension_count", config.head_dim, key_length),
        ("attention.value_length", config.head_dim, key_length),
        ("expert_count", 0, ""),
    ):
        if (value := facts.get(f"llama.{name}", harmless)) != harmless:
            raise ValueError(
                f"llama.{name}={brief(value)} is not supported by this backbone, only {harmless}{why}"
            )
    return config


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


def _check_tensors(names: dict[str, Slot], stored: dict[str, GGUFTensor]) -> None:
    from gguf import GGML_QUANT_SIZES, quants

    for name, slot in names.items():
        if name not in stored:
            raise ValueError(f"tensor {name!r} is missing")
        found, kind, _ = stored[name]
        if found != slot.shape:
            raise ValueError(f"tensor {name!r} must be {list(slot.shape)}, found {list(found)}")
        try:  # with one block, because the package does not tell otherwise
            quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise ValueError(
                f"tensor {name!r} is stored as {kind.name}, which cannot be expanded: choose another file"
            ) from error
    if extra := sorted(stored.keys() - names.keys() - {"output.weight"}):
        raise ValueError(
            f"it holds {brief(extra[0])} ({len(extra)} such tensors), which this backbone does not compute: "
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

    fields = _TokenizerFields(facts)
    tokens, kind = fields.array("tokens", str), fields.get("model")
    if not tokens or max(map(len, tokens)) > _MAX_CHARACTERS:
        raise ValueError(
            f"tokenizer.ggml.tokens must hold tokens of at most {_MAX_CHARACTERS} characters, got "
            f"{brief(max(tokens, key=len, default=''))}"
        )
    types = fields.array("token_type", int, len(tokens), default=[_NORMAL] * len(tokens))
    vocab = {token: index for index, token in enumerate(tokens)}
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: fields.token_id(f"{name}_token_id", len(tokens)) for role, name in roles.items()}
    special = {role: tokens[index] for role, index in ids.items() if index is not None}
    if "eos_token" not in special:
        raise ValueError("tokenizer.ggml.eos_token_id is missing: a text's end cannot be marked")
    special.setdefault("pad_token", special["eos_token"])

    if kind == "gpt2":
        rule = fields.get("pre", "default")
        tokenizer = _byte_level_tokenizer(vocab, fields.array("merges", str), rule)
    elif kind == "llama":
        scores = fields.array("scores", float, len(tokens))
        tokenizer = _sentencepiece_tokenizer(vocab, scores, types, fields.flag("add_space_prefix", True))
    else:
        raise ValueError(
            f"tokenizer.ggml.model must be 'gpt2' or 'llama', got {brief(kind)}. {_USE_DIRECTORY}"
        )
    for index, kind_of_token in enumerate(types):
        if kind_of_token in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            is_special = kind_of_token != _USER_DEFINED
            token = AddedToken(tokens[index], normalized=False, special=is_special)
            (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([token])
    if fields.flag("add_bos_token", kind == "llama"):
        if (bos := special.get("bos_token")) is None:
            raise ValueError(
                "tokenizer.ggml.bos_token_id is missing, and tokenizer.ggml.add_bos_token is true"
            )
        try:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, ids["bos_token"])]
            )
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"tokenizer.ggml.bos_token_id: {brief(bos)} is no mark: {error}") from error
    return tokenizer, special


class _TokenizerFields:
    """The fields of the tokenizer. An error names the field."""

    def __init__(self, facts: dict[str, Any]):
        self._facts = facts

    def get(self, name: str, *default: Any) -> Any:
        if (value := self._facts.get(f"tokenizer.ggml.{name}", *default)) is None and not default:
            raise ValueError(f"tokenizer.ggml.{name} is missing")
        return value

    def flag(self, name: str, default: bool) -> bool:
        return check_flag(f"tokenizer.ggml.{name}", self.get(name, default))

    def token_id(self, name: str, num_tokens: int) -> int | None:
        value = self.get(name, None)
        return None if value is None else check_integer(f"tokenizer.ggml.{name}", value, 0, num_tokens - 1)

    def array(self, name: str, kind: type, length: int | None = None, **default: Any) -> list[Any]:
        found = self.get(name, *default.values())
        if not isinstance(found, list) or not all(type(value) is kind for value in found):
            raise ValueError(f"tokenizer.ggml.{name} must be a list of {kind.__name__}, got {brief(found)}")
        if length not in (None, len(found)):
            raise ValueError(
                f"tokenizer.ggml.{name} must have {length} elements, as tokenizer.ggml.tokens has, "
                f"got {len(found)}"
            )
        return found


def _byte_level_tokenizer(vocab: dict[str, int], merges: list[str], rule: str) -> Tokenizer:
    if rule not in [*_PRE_TOKENIZERS]:
        raise ValueError(
            f"tokenizer.ggml.pre must be one of {', '.join(_PRE_TOKENIZERS)}, got {brief(rule)}. "
            f"{_USE_DIRECTORY}"
        )
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise ValueError(
                f"tokenizer.ggml.merges has {brief(merge)}, which joins no two tokens to a third"
            )
        pairs.append((left, right))
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
    if not all(map(math.isfinite, scores)):
        raise ValueError("tokenizer.ggml.scores holds NaN or Inf")
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
