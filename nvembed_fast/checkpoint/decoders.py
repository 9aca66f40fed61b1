"""Decoders that a new model can start from: Hugging Face directories and GGUF files.

A decoder is a Hugging Face directory (model_type mistral or llama) or a GGUF
file of the llama architecture. Both become the same three things:

1. A `BackboneConfig`. Features that the backbone does not compute are refused: biases, scaled or partial
   rotary embeddings, experts. A sliding window and the language-model head are ignored.
2. Our packed weights, read tensor by tensor in the dtype they will be stored in.
3. The tokenizer and its files.
"""

import json
import os
import re
from pathlib import Path
from typing import Protocol

import torch

from nvembed_fast.checkpoint.gguf import GGUFFile
from nvembed_fast.checkpoint.hub import resolve
from nvembed_fast.checkpoint.load import load_weights, stored_tensors
from nvembed_fast.checkpoint.names import CONFIG_FILE, HARMLESS, backbone_tensors
from nvembed_fast.config import BackboneConfig
from nvembed_fast.placement import check_dtype
from nvembed_fast.tokenization import TextTokenizer

__all__ = ["Decoder", "open_decoder"]

_IGNORED = re.compile(HARMLESS.pattern + r"|lm_head\.weight")


class Decoder(Protocol):
    """A decoder that was opened. Its weights are read by `load`.

    Attributes:
        config: the backbone's config.
        dtype: the smallest dtype that stores the weights without harm.
        tokenizer: texts to ids.
    """

    config: BackboneConfig
    dtype: torch.dtype
    tokenizer: TextTokenizer

    def load(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Our backbone's parameters, named as in `NVEmbedModel`, on the CPU."""
        ...

    def write_tokenizer(self, directory: Path) -> list[Path]:
        """Write the tokenizer's files to the directory. Returns their paths."""
        ...


def open_decoder(source: str | os.PathLike) -> Decoder:
    """Open a Hugging Face directory, a hub id or a GGUF file, and check all but the weights' values."""
    path = Path(os.path.expanduser(source))
    if path.suffix == ".gguf" and not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    decoder = GGUFFile(path) if path.is_file() else _HuggingFaceDirectory(resolve(source))
    max_id = max(decoder.tokenizer.backend.get_vocab(with_added_tokens=True).values())
    if max_id >= decoder.config.vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has an id {max_id}, the embedding {decoder.config.vocab_size} rows"
        )
    return decoder


class _HuggingFaceDirectory:
    """A `Decoder` as transformers saves it."""

    def __init__(self, directory: Path):
        file = directory / CONFIG_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{directory} has no {CONFIG_FILE}: it is no Hugging Face model")
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            if raw.get("model_type") not in ("mistral", "llama"):
                raise ValueError(f"model_type must be 'mistral' or 'llama', got {raw.get('model_type')!r}")
            # an encoder sees both ways, even if the decoder did not
            self.config = BackboneConfig.from_dict(raw | {"is_causal": False})
            self.dtype = check_dtype(raw.get("dtype") or raw.get("torch_dtype") or "float32")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: {error}") from error
        self.tokenizer = TextTokenizer.from_directory(directory)
        self._directory = directory
        # a model without its language-model head is saved without this first segment
        headers = stored_tensors(directory).values()
        prefix = "model." if any(name.startswith("model.") for header in headers for name in header) else ""
        self._slots = {prefix + name: slot for name, slot in backbone_tensors(self.config).items()}

    def load(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return load_weights(
            self._directory, self._slots, device=torch.device("cpu"), dtype=dtype, ignored=_IGNORED
        )

    def write_tokenizer(self, directory: Path) -> list[Path]:
        return self.tokenizer.write(directory)
