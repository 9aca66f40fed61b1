"""transformers 5: its Auto classes give our model, and its own encoders may take our attention.

`nvembed_fast.register()` does three things, each as often as it is called:

1. AutoConfig and AutoModel know the model type "nvembed". Registered classes go before the `auto_map` of a
   config.json, also with trust_remote_code=True, so that code from a checkpoint never runs.
2. AutoTokenizer reads such a model's tokenizer.json as it is. The LlamaTokenizer that the published
   tokenizer_config.json names gives other ids for leading and repeated spaces.
3. `attn_implementation="nvembed_fast"` is our attention, for encoders of transformers that see both ways.

The attention is packed. Its rows are those of the caller's `cu_seq_lens_q` or of the attention mask. Their
lengths are read from the device once per batch, and all layers share them.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.utils import ModelOutput

from nvembed_fast import legacy, ops
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.encoder import NVEmbed
from nvembed_fast.kernels.layout import SeqLayout, layout_of

__all__ = ["ATTENTION", "NVEmbedForTransformers", "NVEmbedOutput", "NVEmbedPreTrainedConfig", "register"]

ATTENTION = "nvembed_fast"
_MODEL_TYPE = "nvembed"


def register() -> None:
    """See `nvembed_fast.register`."""
    AutoConfig.register(_MODEL_TYPE, NVEmbedPreTrainedConfig, exist_ok=True)
    AutoModel.register(NVEmbedPreTrainedConfig, NVEmbedForTransformers, exist_ok=True)
    # the class that reads tokenizer.json and nothing else
    TOKENIZER_MAPPING_NAMES[_MODEL_TYPE] = "TokenizersBackend"
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, padding_mask)


class NVEmbedPreTrainedConfig(PreTrainedConfig):
    """config.json for the Auto classes. `text_config` is a MistralConfig. All other fields are the file's."""

    model_type = _MODEL_TYPE
    has_no_defaults_at_init = True  # there is no config without its file
    sub_configs = {"text_config": MistralConfig}

    def __init__(self, text_config: dict[str, Any] | MistralConfig | None = None, **fields: Any):
        if not isinstance(text_config, MistralConfig):
            text_config = MistralConfig(**{k: v for k, v in (text_config or {}).items() if k != "model_type"})
        self.text_config = text_config
        super().__init__(**fields)

    def parsed(self) -> NVEmbedConfig:
        """The config of the model. Raises ValueError if this one is not of an NV-Embed model."""
        return NVEmbedConfig.from_dict(self.to_dict())


@dataclass
class NVEmbedOutput(ModelOutput):
    """What `NVEmbedForTransformers.forward` returns.

    Attributes:
        last_hidden_state: [B, S, D] states of tokens behind the head, zeros at pads. None with a pool_mask.
        sentence_embeddings: with a pool_mask [B, D] fp32. Without one the token states, as in the original.
    """

    last_hidden_state: torch.Tensor | None = None
    sentence_embeddings: torch.Tensor | None = None


class NVEmbedForTransformers(PreTrainedModel):
    """An `NVEmbed` as transformers expects a model to be. AutoModel makes it.

    All that `NVEmbed` has is here too: `encode`, `encode_query`, `tokenizer`, `max_seq_length` and so on.

    Attributes:
        encoder: the `NVEmbed`.
        model: its network.
    """

    config_class = NVEmbedPreTrainedConfig
    main_input_name = "input_ids"
    base_model_prefix = ""
    _supports_attention_backend = True

    def __init__(self, config: NVEmbedPreTrainedConfig, encoder: NVEmbed | None = None):
        if encoder is None:
            raise TypeError(
                "an NV-Embed model cannot be made from its config alone: AutoModel.from_pretrained loads "
                "one, and nvembed-fast init makes a new one"
            )
        # whatever attn_implementation was asked for, the attention is ours, and no package is looked for
        config._attn_implementation = ATTENTION
        super().__init__(config)
        # not registered as a module, because it holds the same network
        object.__setattr__(self, "encoder", encoder)
        self.model = encoder.model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path_or_id: str | PathLike | None = None, *, config: Any = None, **keywords: Any
    ) -> "NVEmbedForTransformers":
        """`NVEmbed.from_pretrained` with its keywords and errors.

        Args:
            path_or_id: a directory or a hub id.
            config: that of this model, if the caller has it already.
            keywords: as there.

        Raises:
            ValueError: config is of another model, or an adapter lies beside the model.
            ValueError: sentence-transformers asks, and would pool by the plain mean.
        """
        keywords.pop("_from_auto", None)
        adapter = (keywords.pop("adapter_kwargs", None) or {}).get("_adapter_model_path")
        if adapter is not None or _has(path_or_id, "adapter_config.json"):
            raise ValueError(
                f"{path_or_id} holds an adapter (adapter_config.json), which AutoModel would not apply: load "
                "the model without it, apply it with PEFT, and save what merge_and_unload() gives"
            )
        if _would_be_mean_pooled(path_or_id):
            raise ValueError(
                f"{path_or_id} has no modules.json, so sentence-transformers would pool by the plain mean: "
                "load it with nvembed_fast.integrations.sentence_transformers.load, or save it again"
            )
        if config is not None:  # AutoModel has put it there
            legacy.check_attention(config._attn_implementation)
        encoder = NVEmbed.from_pretrained(path_or_id, **keywords)
        if config is None:
            config = cls.config_class.from_dict(encoder.config.to_dict())
        differing = _differing(config.parsed(), encoder.config)
        if differing:
            raise ValueError(
                f"config has another {', '.join(differing)} than config.json of {path_or_id}: change the file"
            )
        return cls(config, encoder).eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        safe_serialization: bool = True,
    ) -> None:
        """`NVEmbed.save_pretrained`. Other processes than the main one write nothing.

        Raises:
            ValueError: another way to save is asked for.
        """
        if state_dict is not None or push_to_hub or not safe_serialization:
            raise ValueError(
                "save_pretrained writes the model's own weights to a directory as safetensors: pass no "
                "state_dict, and upload the directory with: hf upload"
            )
        if is_main_process:
            self.encoder.save_pretrained(save_directory)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pool_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> NVEmbedOutput | tuple[torch.Tensor]:
        """`NVEmbed.forward`: arguments and errors stand there. `return_dict=False` returns a tuple of one."""
        (result,) = self.encoder(input_ids, attention_mask, pool_mask, return_dict=False)
        if not return_dict:
            return (result,)
        states = result if pool_mask is None else None
        return NVEmbedOutput(last_hidden_state=states, sentence_embeddings=result)

    def encode(self, *args: Any, **keywords: Any):
        """`NVEmbed.encode`."""
        return self.encoder.encode(*args, **keywords)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding_model.embed_tokens

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: weights come from a checkpoint alone."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "encoder" not in self.__dict__:
                raise
            return getattr(self.encoder, name)

    def __setattr__(self, name: str, value: Any) -> None:
        legacy.check_attribute(name)
        if name in ("max_seq_length", "padding_side"):
            setattr(self.encoder, name, value)
        else:
            super().__setattr__(name, value)


def _would_be_mean_pooled(path_or_id: str | PathLike | None) -> bool:
    """Whether sentence-transformers is loading a directory that does not say how it is pooled."""
    if not _has(path_or_id, "config.json") or _has(path_or_id, "modules.json"):
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("sentence_transformers."):
            return True
        frame = frame.f_back
    return False


def _has(directory: str | PathLike | None, name: str) -> bool:
    """Whether a local directory has this file. False for a hub id."""
    return directory is not None and os.path.isfile(os.path.join(os.path.expanduser(directory), name))


def _differing(config: NVEmbedConfig, stored: NVEmbedConfig) -> list[str]:
    """The names of the fields in which a config differs from that of the file. Its dtype is the caller's."""
    a, b = config.to_dict(), stored.to_dict()
    return [name for name in {**a, **b} if name != "torch_dtype" and a.get(name) != b.get(name)]


class Packing(NamedTuple):
    """The layout of a [B, S] batch, and the flat places b * S + s of its tokens. None: all places."""

    layout: SeqLayout
    places: torch.Tensor | None


# mask or cu_seq_lens -> (the layer that read it, its version then, its packing). All layers of a batch get
# the same tensor. If the layer that read it comes again, that is another batch
_packings: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """`ops.flash_attention` in the form of transformers' AttentionInterface.

    Args:
        module: the attention layer, with its config.
        query: [B, N, S, H].
        key, value: [B, G, S, H].
        attention_mask: [B, S] bool as `padding_mask` returns it. None: no pads.
        scaling: of the scores. None: 1 / sqrt(H).
        cu_seq_lens_q: [sequences + 1] borders of the sequences that lie in the one row of a [1, S] batch.
        cu_seq_lens_k: None or the same.

    Returns:
        ([B, S, N, H] with zeros at pads, None in the place of the weights).

    Raises:
        ValueError: something is asked for that is not computed here.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True) and getattr(module.config, "is_causal", True)
    if is_causal:
        _refuse("is for encoders that see both ways, and this one is causal: set config.is_causal = False")
    if dropout:
        _refuse("has no dropout: set config.attention_dropout = 0.0")
    for name in ("softcap", "position_bias", "s_aux", "head_mask", "output_attentions"):
        # a tensor has no truth
        if others.get(name) is not None and others[name] is not False:
            _refuse(f"does not compute {name}: use attn_implementation='eager'")
    batch, _, length, _ = query.shape
    if key.shape[2] != length:
        _refuse(f"got {length} queries and {key.shape[2]} keys: pass use_cache=False")
    if cu_seq_lens_q is None and attention_mask is None and cu_seq_lens_k is None:
        lengths = torch.full((batch,), length, dtype=torch.int32, device="cpu")
        layout, places = layout_of(lengths, query.device), None
    elif cu_seq_lens_q is None and attention_mask is not None and cu_seq_lens_k is None:
        layout, places = _read_once(module, attention_mask, lambda mask: _padded(mask, batch, length))
    elif cu_seq_lens_q is not None and attention_mask is None:
        layout, places = _read_once(
            module,
            cu_seq_lens_q,
            lambda borders: _packed_row(borders, cu_seq_lens_k, batch, length, query.device),
        )
    else:
        _refuse("packs by cu_seq_lens_q alone: pass it, and no attention_mask beside it")
    if sliding_window is not None and layout.max_length > sliding_window:
        _refuse(
            f"has no window, and a sequence has {layout.max_length} tokens where the config's sliding_window "
            f"is {sliding_window}: set config.sliding_window = None to see all"
        )
    rows = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    q, k, v = rows if places is None else (x[places] for x in rows)
    out = ops.flash_attention(q, k, v, layout, scaling)
    assert isinstance(out, torch.Tensor)
    if places is not None:
        out = out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, places, out)
    return out.unflatten(0, (batch, length)), None


def padding_mask(
    *, attention_mask: torch.Tensor | None = None, use_vmap: bool = False, **others: Any
) -> torch.Tensor | None:
    """The mask that `attention` gets, in the form of AttentionMaskInterface: the caller's [B, S], or None.

    Raises:
        ValueError: the model masks more than its pads.
    """
    if use_vmap:
        _refuse("knows no mask but that of the pads, and this model adds one: use attn_implementation='sdpa'")
    return attention_mask


def _read_once(
    layer: torch.nn.Module, source: torch.Tensor, read: Callable[[torch.Tensor], Packing]
) -> Packing:
    # inference tensors do not tell whether they have changed
    version = None if source.is_inference() else source._version
    reader, seen, packing = _packings.get(source, (None, None, None))
    if packing is None or reader == id(layer) or version is None or seen != version:
        packing = read(source)
        _packings[source] = id(layer), version, packing
    return packing


def _packed_row(
    cu_seq_lens: torch.Tensor, keys: torch.Tensor | None, batch: int, length: int, device: torch.device
) -> Packing:
    borders = cu_seq_lens.tolist()
    lengths = [stop - start for start, stop in zip(borders, borders[1:], strict=False)]
    if batch != 1 or borders[:1] != [0] or borders[-1] != length or min(lengths) < 0:
        some = borders if len(borders) < 9 else [*borders[:8], "..."]
        _refuse(
            f"got cu_seq_lens_q {some} for {batch} rows of {length} tokens: it takes one row, and borders "
            "from 0 to its length"
        )
    if keys is not None and keys.tolist() != borders:
        _refuse("attends within each sequence: cu_seq_lens_k must equal cu_seq_lens_q")
    return Packing(SeqLayout(lengths, device), None)


def _padded(mask: torch.Tensor, batch: int, length: int) -> Packing:
    if mask.shape != (batch, length):
        _refuse(
            f"takes a mask [{batch}, {length}] of ones and zeros, got {list(mask.shape)}: pass that of the "
            "tokenizer as it is"
        )
    places = mask.flatten().nonzero().squeeze(1)
    return Packing(SeqLayout(mask.sum(1).tolist(), mask.device), places)


def _refuse(reason: str) -> NoReturn:
    raise ValueError(f"attn_implementation={ATTENTION!r} {reason}")
