"""The published config.json as frozen dataclasses, read and written without loss of meaning.

Field names are the file's. The published config.json leaves the sizes of the latent head to the original's
defaults, which are the defaults here. Fields that the original states but never applies (`sliding_window`,
`mask_type`, `add_eos`) are dropped.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from nvembed_fast import files

__all__ = [
    "BackboneConfig",
    "LatentConfig",
    "LatentForm",
    "Latents",
    "NVEmbedConfig",
    "PoolingHeadName",
    "PoolingStart",
    "check_latents",
]

PoolingStart = Literal["token_count", "text_offset"]
PoolingHeadName = Literal["latent", "mean", "eos", "self_attention"]
# how the latent head computes: see `network.latent_head`
LatentForm = Literal["direct", "absorbed"]
Latents = Literal["auto", "direct", "absorbed"]

# tie_word_embeddings, use_cache and the like change nothing in an encoder without a language-model head
_MUST_BE_ABSENT = ("attention_bias", "mlp_bias", "rope_scaling", "quantization_config")


def check_latents(latents: str) -> Latents:
    """`latents` itself, or a ValueError that names the choices."""
    if latents not in get_args(Latents):
        raise ValueError(f"latents must be one of {', '.join(map(repr, get_args(Latents)))}, got {latents!r}")
    return cast(Latents, latents)


@dataclass(frozen=True)
class BackboneConfig:
    """A decoder of Mistral's or Llama's shape, used without a causal mask. Defaults: Mistral-7B-v0.1."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = cast(int, None)  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 32768
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    is_causal: bool = False

    def __post_init__(self):
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}: config.json must state head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "BackboneConfig":
        """Read a transformers config of a Mistral or Llama decoder, of transformers 4 or 5.

        Raises:
            ValueError: it asks for something that this backbone does not compute.
        """
        raw = dict(raw)
        rope = raw.pop("rope_parameters", None) or {}  # the form of transformers 5
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f"rope_type {rope['rope_type']!r} is not supported, only plain rotary embeddings"
            )
        if (partial := rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))) not in (
            None,
            1.0,
        ):
            raise ValueError(
                f"partial_rotary_factor {partial} is not supported, only whole heads are rotated"
            )
        if "rope_theta" in rope:
            raw["rope_theta"] = rope["rope_theta"]
        for name in _MUST_BE_ABSENT:
            if raw.get(name):
                raise ValueError(f"{name}={raw[name]!r} is not supported by this backbone")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act must be 'silu', got {raw['hidden_act']!r}")
        return _from_known(cls, raw)


@dataclass(frozen=True)
class LatentConfig:
    """The latent attention head. Defaults: NV-Embed v1 and v2."""

    num_latents_value: int = 512
    num_cross_heads: int = 8
    cross_dim_head: int = 4096
    hidden_dim: int = 4096
    latent_dim: int = 4096
    output_normalize: bool = True

    @property
    def cheaper_form(self) -> LatentForm:
        """The form with fewer operations per token and head (L D against H (D + L))."""
        latents, width = self.num_latents_value, self.hidden_dim
        return "absorbed" if latents * width < self.cross_dim_head * (width + latents) else "direct"


@dataclass(frozen=True)
class NVEmbedConfig:
    """The whole model.

    Attributes:
        text_config: the backbone.
        latent_attention_config: the latent attention head. Its `output_normalize` holds for every head.
        pooling_head: how token states become one vector. The published models have "latent". The others are
            the baselines of arXiv 2405.17428, table 1.
        is_mask_instruction: whether the instruction's tokens are excluded from the pooling.
        pooling_start: how the first pooled token behind an instruction is found. "token_count" drops as many
            tokens as the instruction has on its own, as the published checkpoints do. "text_offset" pools
            from the first token that starts behind the instruction's last non-space character. It is for
            tokenizers that merge across that border.
        torch_dtype: the dtype of the stored weights.
    """

    text_config: BackboneConfig = field(default_factory=BackboneConfig)
    latent_attention_config: LatentConfig = field(default_factory=LatentConfig)
    is_mask_instruction: bool = True
    pooling_start: PoolingStart = "token_count"
    pooling_head: PoolingHeadName = "latent"
    torch_dtype: str = "float16"

    def __post_init__(self):
        for name, choices in (("pooling_start", PoolingStart), ("pooling_head", PoolingHeadName)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, got {getattr(self, name)!r}")
        head, width = self.latent_attention_config, self.text_config.hidden_size
        if head.hidden_dim != width:
            raise ValueError(
                f"latent_attention_config.hidden_dim {head.hidden_dim} must equal hidden_size {width}"
            )

    @property
    def hidden_size(self) -> int:
        """D: the width of the tokens and of the embeddings."""
        return self.text_config.hidden_size

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "NVEmbedConfig":
        """Read the content of config.json. Raises ValueError if the model is no NV-Embed model."""
        if raw.get("model_type") != "nvembed":
            raise ValueError(
                f"config.json has model_type {raw.get('model_type')!r}, expected 'nvembed'. To start a new "
                "model from a Mistral or Llama decoder, use: nvembed-fast init DECODER -o DIRECTORY"
            )
        raw = dict(raw)
        raw["text_config"] = BackboneConfig.from_dict(raw.get("text_config") or {})
        raw["latent_attention_config"] = _from_known(LatentConfig, raw.get("latent_attention_config") or {})
        raw.setdefault("torch_dtype", raw.get("dtype") or "float32")
        return _from_known(cls, raw)

    @classmethod
    def from_file(cls, path: Path) -> "NVEmbedConfig":
        """Read config.json. Errors name the file."""
        if not path.is_file():
            if left := files.unfinished(path.parent):
                raise FileNotFoundError(
                    f"{path.parent} has no {path.name}: a save to it did not end and left {', '.join(left)}. "
                    "The next save to it removes what a dead process left"
                )
            raise FileNotFoundError(
                f"{path.parent} has no {path.name}: it is no model directory (nvembed-fast init makes one)"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_dict(raw)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json. `from_dict` gives this object back."""
        raw = asdict(self)
        raw["text_config"] |= {"model_type": "bidir_mistral", "hidden_act": "silu"}
        raw["latent_attention_config"]["model_type"] = "latent_attention"
        return {"model_type": "nvembed", "architectures": ["NVEmbedModel"], "padding_side": "right"} | {
            "hidden_size": self.hidden_size,
            **raw,
        }


def _from_known(cls, raw: dict[str, Any]):
    known = {f.name for f in fields(cls)}
    return cls(**{name: value for name, value in raw.items() if name in known and value is not None})
