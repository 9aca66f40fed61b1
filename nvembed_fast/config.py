"""The published config.json as frozen dataclasses, read and written without loss of meaning.

Field names are the file's. The published config.json leaves the sizes of the latent head to the original's
defaults, which are the defaults here. Fields that the original states but never applies (`sliding_window`,
`mask_type`, `add_eos`) are dropped.

Values are checked here alone, wherever they come from: config.json, tokenizer_config.json, a GGUF file or a
caller. An error names the field.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

from nvembed_fast import files
from nvembed_fast.files import brief

__all__ = [
    "BackboneConfig",
    "HeadStart",
    "LatentConfig",
    "LatentForm",
    "Latents",
    "DEFAULT_LENGTH",
    "DEFAULT_TASK",
    "NVEmbedConfig",
    "PoolingHeadName",
    "PoolingStart",
    "Precision",
    "check_dtype_name",
    "check_flag",
    "check_integer",
    "check_latents",
    "check_object",
    "query_instruction",
    "stored_dtype",
]

PoolingStart = Literal["token_count", "text_offset"]
PoolingHeadName = Literal["latent", "mean", "eos", "self_attention"]
# of a fresh head: as mean pooling, or with every product drawn
HeadStart = Literal["mean", "random"]
# tokens of a text whose model names none
DEFAULT_LENGTH = 4096
# of queries whose caller names none
DEFAULT_TASK = "Given a question, retrieve passages that answer the question"
# how the latent head computes: see `network.latent_head`
LatentForm = Literal["direct", "absorbed"]
Latents = Literal["auto", "direct", "absorbed"]
# of vectors: see `precision`
Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]

# tie_word_embeddings, use_cache and the like change nothing in an encoder without a language-model head
_MUST_BE_ABSENT = ("attention_bias", "mlp_bias", "rope_scaling", "quantization_config")
_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
MAX_SIZE, MAX_LAYERS = 2**31 - 1, 1024


def query_instruction(task: str) -> str:
    """The published query template: "Instruct: {task}", a new line, "Query: ".

    A whole instruction, which begins with "Instruct: ", is taken as it is.

    Raises:
        TypeError, ValueError: there is no task.
    """
    if not isinstance(task, str):
        raise TypeError(
            f"task must be a string, got {type(task).__name__}: without a task use encode_document"
        )
    if not task.strip():
        raise ValueError("task is empty: describe it, or embed without an instruction (encode_document)")
    return task if task.startswith("Instruct: ") else f"Instruct: {task}\nQuery: "


def instruction_of(task: str) -> str:
    """What stands in front of a query: `query_instruction`, or nothing where there is no task."""
    return query_instruction(task) if task.strip() else task


def check_integer(name: str, value: Any, low: int = 1, high: int = MAX_SIZE) -> int:
    """`value` itself, or a ValueError unless it is an integer from `low` to `high`. A bool is none."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {brief(value)}")
    return value


def _check_real(name: str, value: Any, low: float, high: float) -> float:
    # NaN fails the comparison
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {brief(value)}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """`value` itself, or a ValueError unless it is true or false. The string "false" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {brief(value)}")
    return value


def check_object(name: str, value: Any) -> dict[str, Any]:
    """A JSON object. None, which stands for an absent one, gives an empty one. Else a ValueError."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {brief(value)}")
    return value or {}


def _check_choice(name: str, value: Any, choices: Any) -> str:
    if value not in get_args(choices):
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {brief(value)}"
        )
    return value


def check_latents(latents: str) -> Latents:
    """`latents` itself, or a ValueError that names the choices."""
    return cast(Latents, _check_choice("latents", latents, Latents))


def check_dtype_name(dtype: Any, name: str = "dtype") -> str:
    """The name of a dtype that weights can have, in torch's form, or a ValueError."""
    found = dtype.removeprefix("torch.") if isinstance(dtype, str) else ""
    found = _DTYPES.get(found, found)
    if found not in _DTYPES.values():
        raise ValueError(f"{name} must be one of {', '.join(_DTYPES.values())}, got {brief(dtype)}")
    return found


def stored_dtype(raw: dict[str, Any]) -> str:
    """The name of the dtype that the content of a config.json states for its weights."""
    name = next((n for n in ("torch_dtype", "dtype") if raw.get(n) is not None), None)
    return "float32" if name is None else check_dtype_name(raw[name], name)


def _checked(default: Any, check: Callable[..., Any], *bounds: Any) -> Any:
    """A field whose value `check(name, value)` has to accept."""
    return field(default=default, metadata={"check": lambda name, value: check(name, value, *bounds)})


_size = partial(_checked, check=check_integer)
_flag = partial(_checked, check=check_flag)


def _check_fields(config: Any) -> None:
    for f in fields(config):
        if (check := f.metadata.get("check")) is not None:
            check(f.name, getattr(config, f.name))


@dataclass(frozen=True)
class BackboneConfig:
    """A decoder of Mistral's or Llama's shape, used without a causal mask. Defaults: Mistral-7B-v0.1."""

    vocab_size: int = _size(32000)
    hidden_size: int = _size(4096)
    intermediate_size: int = _size(14336)
    num_hidden_layers: int = _checked(32, check_integer, 0, MAX_LAYERS)
    num_attention_heads: int = _size(32)
    num_key_value_heads: int = _size(8)
    head_dim: int = cast(int, None)  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = _size(32768)
    rope_theta: float = _checked(10000.0, _check_real, 1.0, 1e12)
    rms_norm_eps: float = _checked(1e-5, _check_real, 1e-12, 0.1)
    is_causal: bool = _flag(False)

    def __post_init__(self):
        _check_fields(self)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}: config.json must state head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        check_integer("head_dim", self.head_dim)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even for rotary embeddings, got {self.head_dim} (where it is absent: "
                "hidden_size / num_attention_heads)"
            )

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "BackboneConfig":
        """Read a transformers config of a Mistral or Llama decoder, of transformers 4 or 5.

        Raises:
            ValueError: it asks for something that this backbone does not compute.
        """
        raw = dict(raw)
        rope = check_object("rope_parameters", raw.pop("rope_parameters", None))  # transformers 5's form
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f"rope_type {brief(rope['rope_type'])} is not supported, only plain rotary embeddings"
            )
        rotated = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        if rotated not in (None, 1.0):
            raise ValueError(
                f"partial_rotary_factor {brief(rotated)} is not supported, only whole heads are rotated"
            )
        if "rope_theta" in rope:
            raw["rope_theta"] = rope["rope_theta"]
        for name in _MUST_BE_ABSENT:
            if raw.get(name):
                raise ValueError(f"{name}={brief(raw[name])} is not supported by this backbone")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act must be 'silu', got {brief(raw['hidden_act'])}")
        # not read here, but a model that states nonsense is not believed in the rest. Llama 3 has a list
        eos = raw.get("eos_token_id")
        for id in eos if isinstance(eos, list) else [] if eos is None else [eos]:
            check_integer("eos_token_id", id, 0)
        return _from_known(cls, raw)


@dataclass(frozen=True)
class LatentConfig:
    """The latent attention head. Defaults: NV-Embed v1 and v2."""

    num_latents_value: int = _size(512)
    num_cross_heads: int = _size(8)
    cross_dim_head: int = _size(4096)
    hidden_dim: int = _size(4096)
    latent_dim: int = _size(4096)
    output_normalize: bool = _flag(True)

    def __post_init__(self):
        _check_fields(self)

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
            the baselines of arXiv 2405.17428, table 1. With "eos" `encode` and training keep the end
            mark of a cut text, and a caller of `forward` must.
        is_mask_instruction: whether the instruction's tokens are excluded from the pooling.
        pooling_start: how the first pooled token behind an instruction is found. "token_count" drops as many
            tokens as the instruction has on its own, as the published checkpoints do. "text_offset" pools
            from the first token that starts behind the instruction's last non-space character. It is for
            tokenizers that merge across that border.
        is_untrained: `init_model` made the model, and nothing has trained it since. Training saves it with
            `dataclasses.replace(config, is_untrained=False)`.
        torch_dtype: the dtype of the stored weights.
    """

    text_config: BackboneConfig = field(default_factory=BackboneConfig)
    latent_attention_config: LatentConfig = field(default_factory=LatentConfig)
    is_mask_instruction: bool = _flag(True)
    pooling_start: PoolingStart = _checked("token_count", _check_choice, PoolingStart)
    pooling_head: PoolingHeadName = _checked("latent", _check_choice, PoolingHeadName)
    is_untrained: bool = _flag(False)
    torch_dtype: str = "float16"

    def __post_init__(self):
        _check_fields(self)
        check_dtype_name(self.torch_dtype, "torch_dtype")
        head, width = self.latent_attention_config, self.text_config.hidden_size
        if head.hidden_dim != width:
            raise ValueError(
                f"latent_attention_config.hidden_dim {head.hidden_dim} must equal hidden_size {width} of "
                "text_config"
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
                f"config.json has model_type {brief(raw.get('model_type'))}, expected 'nvembed'. To start a "
                "new model from a Mistral or Llama decoder, use: nvembed-fast init DECODER -o DIRECTORY"
            )
        parts = {
            name: check_object(name, raw.get(name)) for name in ("text_config", "latent_attention_config")
        }
        raw = raw | {
            "text_config": BackboneConfig.from_dict(parts["text_config"]),
            "latent_attention_config": _from_known(LatentConfig, parts["latent_attention_config"]),
            "torch_dtype": stored_dtype(raw),
        }
        return _from_known(cls, raw)

    @classmethod
    def from_file(cls, path: Path) -> "NVEmbedConfig":
        """Read config.json. Errors name the file: see `files.read_json`."""
        if not files.is_file(path):
            if left := files.unfinished(path.parent):
                raise FileNotFoundError(
                    f"{path.parent} has no {path.name}: a save to it did not end and left {', '.join(left)}. "
                    "The next save to it removes what a dead process left"
                )
            raise FileNotFoundError(
                f"{path.parent} has no {path.name}: it is no model directory (nvembed-fast init makes one)"
            )
        raw = files.read_json(path)
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json. `from_dict` gives this object back."""
        raw = asdict(self)
        if not self.is_untrained:  # a mark, which the published config.json has not
            del raw["is_untrained"]
        raw["text_config"] |= {"model_type": "bidir_mistral", "hidden_act": "silu"}
        raw["latent_attention_config"]["model_type"] = "latent_attention"
        return {"model_type": "nvembed", "architectures": ["NVEmbedModel"], "padding_side": "right"} | {
            "hidden_size": self.hidden_size,
            **raw,
        }


def _from_known(cls, raw: dict[str, Any]):
    known = {f.name for f in fields(cls)}
    return cls(**{name: value for name, value in raw.items() if name in known and value is not None})
