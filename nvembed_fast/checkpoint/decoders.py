"""Decoders that a new model can start from: Hugging Face directories and GGUF files.

A decoder is a Hugging Face directory (model_type mistral or llama) or a GGUF
file of the llama architecture. Both become the same three things:

1. A `BackboneConfig`. Features that the backbone does not compute are refused: biases, scaled or partial
   rotary embeddings, experts. A sliding window and the language-model head are ignored.
2. Our packed weights, read tensor by tensor in the dtype they will be stored in.
3. The tokenizer and its files.
"""

import os
import re
from pathlib import Path
from typing import Protocol

import torch

from nvembed_fast import files
from nvembed_fast.checkpoint import demo
from nvembed_fast.checkpoint.gguf import GGUFFile
from nvembed_fast.checkpoint.hub import resolve
from nvembed_fast.checkpoint.load import check_tensors, load_weights, stored_tensors
from nvembed_fast.checkpoint.names import CONFIG_FILE, HARMLESS, backbone_tensors
from nvembed_fast.config import BackboneConfig, stored_dtype
from nvembed_fast.files import brief
from nvembed_fast.placement import check_dtype
from nvembed_fast.tokenization import TextTokenizer

__all__ = ["Decoder", "named", "open_decoder"]

SMOLLM2 = "smollm2"

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


def named(source: str | os.PathLike) -> str | os.PathLike:
    """The file of SmolLM2-135M for the name "smollm2", fetched once (93 MB). Another source as it is.

    Raises:
        OSError: it cannot be fetched. The message says how to get it.
    """
    if source != SMOLLM2 or Path(SMOLLM2).exists():
        return source
    return demo.decoder()


def open_decoder(source: str | os.PathLike) -> Decoder:
    """Open a directory, a hub id, a GGUF file or a name, and check all but the weights' values."""
    source = named(source)
    path = Path(os.path.expanduser(source))
    is_file = not path.is_dir() and files.is_file(path)
    if path.suffix == ".gguf" and not is_file:
        raise FileNotFoundError(f"no file {path}")
    decoder = GGUFFile(path) if is_file else _HuggingFaceDirectory(resolve(source))
    decoder.tokenizer.check_ids(decoder.config.vocab_size, source)
    return decoder


class _HuggingFaceDirectory:
    """A `Decoder` as transformers saves it."""

    def __init__(self, directory: Path):
        file = directory / CONFIG_FILE
        if not files.is_file(file):
            raise FileNotFoundError(f"{directory} has no {CONFIG_FILE}: it is no Hugging Face model")
        raw = files.read_json(file)
        try:
            if (kind := raw.get("model_type")) not in ("mistral", "llama"):
                raise ValueError(f"model_type must be 'mistral' or 'llama', got {brief(kind)}")
            # an encoder sees both ways, even if the decoder did not
            self.config = BackboneConfig.from_dict(raw | {"is_causal": False})
            self.dtype = check_dtype(stored_dtype(raw))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        self.tokenizer = TextTokenizer.from_directory(directory)
        self._directory = directory
        # a model without its language-model head is saved without this first segment
        headers = stored_tensors(directory)
        names = (name for header in headers.values() for name in header)
        prefix = "model." if any(name.startswith("model.") for name in names) else ""
        self._slots = {prefix + name: slot for name, slot in backbone_tensors(self.config).items()}
        check_tensors(directory, headers, self._slots, _IGNORED)

    def load(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return load_weights(
            self._directory, self._slots, device=torch.device("cpu"), dtype=dtype, ignored=_IGNORED
        )

    def write_tokenizer(self, directory: Path) -> list[Path]:
        return self.tokenizer.write(directory)
