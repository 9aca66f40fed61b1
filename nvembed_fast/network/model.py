"""The NV-Embed model on packed tokens: ids in, one vector per text out. No text, no files.

Source: "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models", arXiv 2405.17428.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import nn

from nvembed_fast import ops
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.network.latent_head import LatentHead
from nvembed_fast.network.lora import Adapter
from nvembed_fast.network.mistral import DecoderLayer, MistralBackbone
from nvembed_fast.network.pooling_heads import EOSHead, MeanHead, PoolingHead, SelfAttentionHead
from nvembed_fast.packing import PackedBatch

__all__ = ["NVEmbedModel"]


class NVEmbedModel(nn.Module):
    """Backbone and pooling head.

    Attributes:
        embedding_model: the backbone.
        head: makes one vector of the tokens of a text.
        adapter: what `checkpoint.add_lora` or `load_adapter` has put on the products. None: nothing.
    """

    def __init__(self, config: NVEmbedConfig):
        super().__init__()
        self.config = config
        self.embedding_model = MistralBackbone(config.text_config)
        self.head = _make_head(config)
        self.adapter: Adapter | None = None

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """[B, D] fp32 embeddings. A text whose pool mask keeps nothing gives the head's constant, not NaN."""
        return self.head(self.embedding_model(batch), batch.layout, batch.pool_mask)

    def token_states(self, batch: PackedBatch) -> torch.Tensor:
        """[T, D] token states behind the head, before pooling."""
        return self.head.token_states(self.embedding_model(batch), batch.layout)

    def checkpoint_layers(
        self, *, every_n_layers: int = 1, use_reentrant: bool = False, **options: Any
    ) -> None:
        """Keep of a layer its input alone, and compute the layer again in the backward.

        Args:
            every_n_layers: 1 for all layers, 2 for every second.
            use_reentrant: must be False.
            options: others of `torch.utils.checkpoint.checkpoint`.

        Raises:
            ValueError: use_reentrant is True. That form cannot compute in the same implementation again.
        """
        if use_reentrant:
            raise ValueError("use_reentrant=True is not supported: leave it out, or pass False")
        self.keep_layers()
        for layer in self.embedding_model.layers[::every_n_layers]:
            layer.forward = partial(_checkpointed, layer, options)  # type: ignore[method-assign]

    def keep_layers(self) -> None:
        """Undo `checkpoint_layers`."""
        for layer in self.embedding_model.layers:
            layer.__dict__.pop("forward", None)


def _checkpointed(layer: nn.Module, options: dict[str, Any], *arguments: Any, **named: Any) -> Any:
    # of the class: the attribute of the object is this function
    if not torch.is_grad_enabled():
        return DecoderLayer.forward(cast(DecoderLayer, layer), *arguments, **named)
    from torch.utils.checkpoint import checkpoint

    # a graph holds the choice, and torch.compile takes no contexts of this kind
    if not torch.compiler.is_compiling():
        options = {"context_fn": ops.checkpoint_contexts, **options}
    return checkpoint(DecoderLayer.forward, layer, *arguments, use_reentrant=False, **options, **named)


def _make_head(config: NVEmbedConfig) -> PoolingHead:
    normalize = config.latent_attention_config.output_normalize
    match config.pooling_head:
        case "mean":
            return MeanHead(normalize)
        case "eos":
            return EOSHead(normalize)
        case "self_attention":
            return SelfAttentionHead(config.text_config, normalize)
    return LatentHead(config.latent_attention_config)
