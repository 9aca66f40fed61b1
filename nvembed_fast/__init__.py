"""NV-Embed, fast: a drop-in encoder for the published checkpoints on packed Triton kernels."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nvembed_fast.config import NVEmbedConfig
    from nvembed_fast.encoder import NVEmbed, query_instruction
    from nvembed_fast.network.model import NVEmbedModel
    from nvembed_fast.ops import use_impl

__all__ = ["NVEmbed", "NVEmbedConfig", "NVEmbedModel", "query_instruction", "register", "use_impl"]
__version__ = "0.2.0"

# modules are imported at the first use of their names: `nvembed-fast --help` does not wait for torch
_MODULES = {
    "NVEmbed": "encoder",
    "NVEmbedConfig": "config",
    "NVEmbedModel": "network.model",
    "query_instruction": "encoder",
    "use_impl": "ops",
}


def register() -> None:
    """Make transformers' own classes use this package. It may be called again.

    AutoConfig, AutoModel and AutoTokenizer then load NV-Embed models without code from a checkpoint, and
    `attn_implementation="nvembed_fast"` is our attention for other encoders: see `integrations.transformers`.
    """
    from nvembed_fast.integrations import transformers

    transformers.register()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
