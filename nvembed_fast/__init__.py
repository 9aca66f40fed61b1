"""NV-Embed, fast: a drop-in encoder for the published checkpoints on packed Triton kernels."""

from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.encoder import NVEmbed, query_instruction
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.ops import use_impl

__all__ = ["NVEmbed", "NVEmbedConfig", "NVEmbedModel", "query_instruction", "use_impl"]
__version__ = "0.2.0"
