"""Write our modules as a published checkpoint directory: the whole old one or the whole new one stays."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nvembed_fast import files
from nvembed_fast.checkpoint.names import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, Slot, published_tensors
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.placement import check_dtype, dtype_name

__all__ = ["save_model"]

_WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_model(
    model: NVEmbedModel,
    directory: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer_files: Iterable[str | os.PathLike] = (),
) -> None:
    """Write a model as a published checkpoint directory. `load_model` gives it back bit for bit.

    The files are written aside and then renamed in place of an earlier save. An error or an interruption
    leaves the directory with the whole old model (nothing, where there was none) or, from the last rename on,
    with the whole new one. A killed process may leave `.saving-*` (new) and `.old-*` (old) in it, never a mix
    that loads.

    Args:
        model: the model, on any device.
        directory: created if it is not there.
        dtype: the stored dtype. None keeps the model's.
        max_shard_bytes: the max size of one file's tensors. A single tensor may exceed it.
        tokenizer_files: files to copy beside the weights, see `names.tokenizer_files`.

    Raises:
        ValueError: a weight does not fit the dtype, or is NaN or Inf.
        OSError: the files cannot be written, or an old model cannot be put back. The message then names the
            two folders that hold the rest of the old and the new one.
    """
    directory = Path(directory)
    table = published_tensors(model.config)
    parameters = dict(model.named_parameters())
    dtype = check_dtype(dtype if dtype is not None else model.embedding_model.embed_tokens.weight.dtype)
    config = replace(model.config, torch_dtype=dtype_name(dtype))
    copies = [Path(p) for p in tokenizer_files]

    try:
        with files.replacing_together(
            directory, key=CONFIG_FILE, is_outdated=_WEIGHT_FILES.fullmatch
        ) as aside:
            shards = _shards(table, dtype, max_shard_bytes)
            for file, names in shards.items():
                tensors = {name: _published_value(name, table[name], parameters, dtype) for name in names}
                save_file(tensors, aside / file, metadata={"format": "pt"})
            if len(shards) > 1:
                weight_map = {name: file for file, names in shards.items() for name in names}
                total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
                _write_json(aside / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
            for path in copies:
                shutil.copyfile(path, aside / path.name)
            _write_json(aside / CONFIG_FILE, config.to_dict())
    except SafetensorError as error:
        raise OSError(f"cannot write the weights to {directory}: {error}") from error


def _shards(table: dict[str, Slot], dtype: torch.dtype, max_bytes: int) -> dict[str, list[str]]:
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, slot in table.items():
        size = torch.Size(slot.shape).numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}


def _published_value(
    name: str, slot: Slot, parameters: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    rows = parameters[slot.parameter].detach()[slot.rows]
    value = rows.to(dtype)
    if not torch.stack(value.aminmax()).isfinite().all():
        why = f"does not fit {dtype_name(dtype)}" if rows.isfinite().all() else "holds NaN or Inf"
        raise ValueError(f"tensor {name!r} {why}: nothing was saved")
    return value.cpu().contiguous()


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
