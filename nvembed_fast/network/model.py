"""The NV-Embed model on packed tokens: ids in, one vector per text out. No text, no files.

Source: "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models", arXiv 2405.17428.
"""

import torch
from torch import nn

from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.network.latent_head import LatentHead
from nvembed_fast.network.mistral import MistralBackbone
from nvembed_fast.network.pooling_heads import EOSHead, MeanHead, PoolingHead, SelfAttentionHead
from nvembed_fast.packing import PackedBatch

__all__ = ["NVEmbedModel"]


class NVEmbedModel(nn.Module):
    """Backbone and pooling head.

    Attributes:
        embedding_model: the backbone.
        head: makes one vector of the tokens of a text.
    """

    def __init__(self, config: NVEmbedConfig):
        super().__init__()
        self.config = config
        self.embedding_model = MistralBackbone(config.text_config)
        self.head = _make_head(config)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """[B, D] fp32 embeddings. A text whose pool mask keeps nothing gives the head's constant, not NaN."""
        return self.head(self.embedding_model(batch), batch.layout, batch.pool_mask)

    def token_states(self, batch: PackedBatch) -> torch.Tensor:
        """[T, D] token states behind the head, before pooling."""
        return self.head.token_states(self.embedding_model(batch), batch.layout)


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
