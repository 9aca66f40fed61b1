"""The NV-Embed model on packed tokens: ids in, one vector per text out. No text, no files.

Source: "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models", arXiv 2405.17428.
"""

import torch
from torch import nn

from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.latent_head import LatentHead
from nvembed_fast.mistral import MistralBackbone
from nvembed_fast.packing import PackedBatch

__all__ = ["NVEmbedModel"]


class NVEmbedModel(nn.Module):
    """Backbone and latent head. The two attributes carry the checkpoint's names.

    Attributes:
        embedding_model: the backbone.
        latent_attention_model: the head.
    """

    def __init__(self, config: NVEmbedConfig):
        super().__init__()
        self.config = config
        self.embedding_model = MistralBackbone(config.text_config)
        self.latent_attention_model = LatentHead(config.latent_attention_config)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """[B, D] fp32 embeddings. A text whose pool mask keeps nothing gives the head's constant, not NaN."""
        return self.latent_attention_model(self.embedding_model(batch), batch.layout, batch.pool_mask)

    def token_states(self, batch: PackedBatch) -> torch.Tensor:
        """[T, D] token states behind the head, before pooling."""
        return self.latent_attention_model.token_states(self.embedding_model(batch))
