"""Write our modules as a published checkpoint directory: the whole old one or the whole new one stays.

Only an earlier save is replaced. Files of another model are refused, or moved aside where the caller asks.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nvembed_fast import files
from nvembed_fast.checkpoint import names, pipeline
from nvembed_fast.checkpoint.load import empty_parameters
from nvembed_fast.checkpoint.names import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, Slot, published_tensors
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.placement import check_dtype, dtype_name

__all__ = ["check_no_other_model", "model_files", "save_model", "save_tensors"]

_OWN_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_ANY_MODEL = re.compile(
    r"config\.json|modules\.json|(config_)?sentence_(transformers|bert_config)\.json|.*\.(safetensors|bin|pt|pth|ckpt)(\.index\.json)?"
    r"|tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
)


def save_model(
    model: NVEmbedModel,
    directory: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    other_files: Iterable[str | os.PathLike] = (),
    kept: Iterable[str] = (),
    move_aside: bool = False,
) -> Path | None:
    """Write a model as a published checkpoint directory. `load_model` gives it back bit for bit.

    It takes the place of an earlier save. At every moment `load_model` reads the whole old model (nothing,
    where there was none) or the whole new one. That holds after an error, a kill and a loss of power, see
    `files.replacing_together`. A killed process may leave a hidden folder, which the next save removes.

    Args:
        model: the model, on any device.
        directory: created if it is not there.
        dtype: the stored dtype. None keeps the model's.
        max_shard_bytes: the max size of one file's tensors. A single tensor may exceed it.
        other_files: files to copy beside the weights, such as the tokenizer's (`names.tokenizer_files`). The
            tokenizer's files that lie in the directory stay where none replaces them.
        kept: names of files of `pipeline` that stay, if the directory is a pipeline of this package.
        move_aside: move the files of any model in the directory to a new folder in it, `replaced-*`.

    Returns:
        The folder of the files moved aside, if there were any.

    Raises:
        FileExistsError: another model lies in the directory, see `check_no_other_model`. Nothing was written.
        ValueError: the model holds an adapter or other weights than its config says. Nothing was written.
        ValueError: a weight does not fit the dtype, or is NaN or Inf.
        OSError: the files cannot be written, or the new ones cannot take their places. The message then names
            the folder that holds them.
    """
    parameters, table = dict(model.named_parameters()), published_tensors(model.config)
    _check_parameters(parameters, table)
    return save_tensors(
        lambda name: parameters[table[name].parameter].detach()[table[name].rows],
        model.config,
        directory,
        dtype=dtype if dtype is not None else model.embedding_model.embed_tokens.weight.dtype,
        max_shard_bytes=max_shard_bytes,
        other_files=other_files,
        kept=kept,
        move_aside=move_aside,
    )


def save_tensors(
    value_of: Callable[[str], torch.Tensor],
    config: NVEmbedConfig,
    directory: str | os.PathLike,
    *,
    dtype: str | torch.dtype,
    max_shard_bytes: int = 5_000_000_000,
    other_files: Iterable[str | os.PathLike] = (),
    kept: Iterable[str] = (),
    move_aside: bool = False,
) -> Path | None:
    """`save_model` of weights that are made one after another. Those of one file are in memory at a time.

    Args:
        value_of: a published name -> its tensor, on any device.
        config: of the model.
        dtype: the stored dtype.
    """
    directory = files.expanded(directory)
    copies = [Path(p) for p in other_files]
    if not move_aside:
        check_no_other_model(directory, except_for=copies)
    table, dtype = published_tensors(config), check_dtype(dtype)
    config = replace(config, torch_dtype=dtype_name(dtype))
    leaving = {*model_files(directory), *model_files(files.current(directory))} if move_aside else set()
    outdated = re.compile("|".join([_OWN_WEIGHTS.pattern, *map(re.escape, [pipeline.LENGTH_FILE, *leaving])]))
    moved = None

    try:
        with files.replacing_together(directory, key=CONFIG_FILE, outdated=outdated) as aside:
            shards = _shards(table, dtype, max_shard_bytes)
            for file, stored in shards.items():
                tensors = {name: _published_value(name, value_of(name), dtype) for name in stored}
                save_file(tensors, aside / file, metadata={"format": "pt"})
            if len(shards) > 1:
                weight_map = {name: file for file, stored in shards.items() for name in stored}
                total = sum(torch.Size(slot.shape).numel() for slot in table.values()) * dtype.itemsize
                _write_json(aside / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
            staying = []
            if not move_aside:
                staying = names.tokenizer_files(directory) + pipeline.pipeline_files(directory, kept)
            for name, content in pipeline.DEFAULTS.items():
                _write_json(aside / name, content)
            for path in (*staying, *copies):  # what stays is a part of the whole too
                shutil.copyfile(path, aside / path.name)
            _write_json(aside / CONFIG_FILE, config.to_dict())
            if leaving:
                moved = files.link_aside(directory, leaving)
    except SafetensorError as error:
        raise OSError(f"cannot write the weights to {directory}: {error}") from error
    return moved


def check_no_other_model(directory: Path, *, except_for: Iterable[Path] = ()) -> None:
    """Refuse to save to a directory that holds a model which is not an earlier save.

    Args:
        directory: may be absent.
        except_for: files that do not count.

    Raises:
        FileExistsError: its config.json has another model_type, or there are weights, an index or a
            tokenizer without a config.json.
    """
    place = files.current(directory)
    found = model_files(place)
    if CONFIG_FILE in found:
        try:
            model_type = files.read_json(place / CONFIG_FILE).get("model_type")
        except (OSError, ValueError):
            model_type = None
        if model_type != "nvembed":
            raise FileExistsError(
                f"{place / CONFIG_FILE} has model_type {files.brief(model_type)}, so {directory} holds "
                "another model: choose another directory, or move it away"
            )
    elif others := [name for name in found if place / name not in except_for]:
        raise FileExistsError(
            f"{directory} holds {', '.join(others)} of another model, and no {CONFIG_FILE}: choose another "
            "directory, or move them away"
        )


def model_files(directory: Path) -> list[str]:
    """The names of the files in a directory that look like a model's: config, weights, index, tokenizer."""
    present = os.listdir(directory) if directory.is_dir() else []
    return sorted(name for name in present if _ANY_MODEL.fullmatch(name) and not (directory / name).is_dir())


def _check_parameters(parameters: Mapping[str, torch.Tensor], table: dict[str, Slot]) -> None:
    """ValueError unless the parameters are those that the table fills, with values in them."""
    wanted = empty_parameters(table, device=torch.device("meta"), dtype=torch.float32)
    for name in (*parameters, *wanted):
        if name not in wanted or name not in parameters:
            where = (
                "the published layout has no place for it"
                if name in parameters
                else "it is missing, or shared"
            )
            raise ValueError(
                f"parameter {name!r} of the model: {where}. Merge an adapter before saving "
                "(merge_adapter(model), PEFT: merge_and_unload()), or save it alone (save_adapter). Remove "
                "parametrizations and wrappers. Nothing was saved"
            )
        found, shape = parameters[name], wanted[name].shape
        if found.shape != shape or found.is_meta or not found.is_floating_point():
            raise ValueError(
                f"parameter {name!r} of the model is {found.dtype} {list(found.shape)} on {found.device}, "
                f"and its config asks for floats {list(shape)} in memory. Nothing was saved"
            )


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


def _published_value(name: str, given: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    value = given.to(dtype)
    if not torch.stack(value.aminmax()).isfinite().all():
        why = f"does not fit {dtype_name(dtype)}" if given.isfinite().all() else "holds NaN or Inf"
        raise ValueError(f"tensor {name!r} {why}: nothing was saved")
    return value.cpu().contiguous()


def _write_json(file: Path, content: dict | list) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
