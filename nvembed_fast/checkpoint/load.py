"""Read a published checkpoint directory into our modules, tensor by tensor.

1. Files, names, shapes and dtypes are checked from the headers before any weight is read.
2. Each tensor is copied straight into its rows on its device, in its dtype, in chunks of at most 64 MiB. Each
   chunk maps the file anew, because touched pages of a mapping count as memory in use.
3. The copied tensors are checked for NaN and Inf on their device.
4. The model is built on the meta device and takes them.

Only safetensors files are read: a pickle can run code.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from nvembed_fast import files
from nvembed_fast.checkpoint.names import (
    CONFIG_FILE,
    HARMLESS,
    INDEX_FILE,
    SINGLE_FILE,
    Slot,
    published_tensors,
)
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.files import brief, current
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.placement import DTYPES, dtype_name, place

__all__ = ["check_tensors", "empty_parameters", "load_model", "load_weights", "stored_tensors"]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHARD = re.compile(r"[ -.0-~]{1,200}\.safetensors")  # no "/": a file beside the index
_CHUNK_BYTES = 64 * 2**20
_BAR_AFTER_S = 2.0


def load_model(
    directory: str | os.PathLike,
    config: NVEmbedConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    progress: bool | None = None,
) -> NVEmbedModel:
    """Read a published checkpoint directory.

    Host memory beyond the weights stays within two chunks of 64 MiB, on any device.

    Args:
        directory: config.json, and model.safetensors or shards with their index.
        config: its config.json, if the caller has parsed it already.
        device: where the weights go.
        dtype: the weights' dtype. None takes float32 on a CPU, else the checkpoint's own (torch_dtype).
        progress: whether to show a bar. None shows one in a terminal if loading takes more than two seconds.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file or a tensor does not match the config, or holds NaN or Inf.
    """
    directory = current(Path(directory))
    config = config or NVEmbedConfig.from_file(directory / CONFIG_FILE)
    target, kind = place(config, device, dtype)
    table = published_tensors(config)
    values = load_weights(directory, table, device=target, dtype=kind, progress=progress)
    with torch.device("meta"):  # behind the weights: sizes that they have not may be too large even there
        model = NVEmbedModel(config)
    # strict: a parameter that the table does not name is an error here, never a tensor left on meta
    model.load_state_dict(values, assign=True)
    return model


def empty_parameters(
    table: dict[str, Slot], *, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The parameters that the slots of `table` fill, uninitialised. Memory is taken as they are filled."""
    shapes: dict[str, tuple[int, ...]] = {}
    for slot in table.values():
        height = max(slot.rows.stop, shapes.get(slot.parameter, (0,))[0])
        shapes[slot.parameter] = (height, *slot.shape[1:])
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}


def load_weights(
    directory: Path,
    table: dict[str, Slot],
    *,
    device: torch.device,
    dtype: torch.dtype,
    ignored: re.Pattern = HARMLESS,
    progress: bool | None = None,
) -> dict[str, torch.Tensor]:
    """Read the tensors that `table` names from a directory of safetensors. Returns our parameters by name.

    `ignored` matches the names of tensors that may lie beside them. Errors are those of `load_model`.
    """
    found = stored_tensors(directory)
    check_tensors(directory, found, table, ignored)
    values = empty_parameters(table, device=device, dtype=dtype)
    total = sum(torch.Size(slot.shape).numel() for slot in table.values()) * dtype.itemsize
    with _bar(total, progress) as bar:
        for file, header in found.items():
            extremes: dict[str, torch.Tensor] = {}
            for name in filter(table.__contains__, header):
                slot = table[name]
                target = values[slot.parameter][slot.rows]
                for rows, chunk in _chunks(file, name, slot.shape):
                    target[rows].copy_(chunk.to(device))
                    bar.update(target[rows].nbytes)
                extremes[name] = torch.stack(target.aminmax())
            # one wait for the device per file
            _check_finite(file, extremes, dtype)
    return values


def stored_tensors(directory: Path) -> dict[Path, dict[str, tuple[str, tuple[int, ...]]]]:
    """Read the headers of a directory's safetensors files: file -> tensor -> (dtype, shape).

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or the index and the files disagree.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    has_single, has_index = files.is_file(single), files.is_file(index)
    if has_single and has_index:
        raise ValueError(
            f"{directory} holds {SINGLE_FILE} and {INDEX_FILE}: remove the one that is out of date"
        )
    if has_single:
        return {single: _header(single)}
    if not has_index:
        pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
        if pickles:
            raise ValueError(
                f"{directory} holds {', '.join(pickles)} and no safetensors: a pickle can run code, so only "
                "safetensors are read. Where you trust the file: "
                "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
            )
        raise FileNotFoundError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")

    promised: dict[str, set[str]] = defaultdict(set)
    for tensor, file in _read_index(index).items():
        promised[file].add(tensor)
    headers: dict[Path, dict] = {}
    owner: dict[str, str] = {}
    for file, tensors in sorted(promised.items()):
        if not files.is_file(directory / file):
            raise FileNotFoundError(
                f"{directory / file} is missing: {INDEX_FILE} places {len(tensors)} tensors in it, "
                f"{brief(min(tensors))} among them. Download it again"
            )
        header = _header(directory / file)
        if absent := sorted(tensors - header.keys()):
            raise ValueError(f"{index}: it places {_some(absent)} in {file}, which does not hold it")
        for tensor in header:
            if tensor in owner:
                raise ValueError(
                    f"{directory}: tensor {brief(tensor)} is in {owner[tensor]} and in {file}: remove one"
                )
            owner[tensor] = file
        headers[directory / file] = header
    return headers


def _read_index(index: Path) -> dict[str, str]:
    raw = files.read_json(index)
    if not isinstance(weight_map := raw.get("weight_map"), dict):
        reason = "weight_map is not an object" if "weight_map" in raw else "no 'weight_map'"
        raise ValueError(f"{index}: {reason}")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise ValueError(
                f"{index}: {brief(tensor)} is placed in {brief(file)}, which is no safetensors file beside it"
            )
    return weight_map


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with open(file, "rb") as stored:
        length = int.from_bytes(stored.read(8), "little")
    if length > files.MAX_JSON_BYTES:
        raise ValueError(f"{file} is no safetensors file: its header would have {length} bytes")
    try:
        with safe_open(file, framework="pt") as stored:
            # only the header is read until a slice is indexed
            views = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
            return {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{file} is cut short or no safetensors file ({error}; {file.stat().st_size} bytes are there): "
            "download it again"
        ) from error


def check_tensors(
    directory: Path, headers: dict[Path, dict], table: dict[str, Slot], ignored: re.Pattern = HARMLESS
) -> None:
    """Compare the headers of a directory's files with the tensors wanted.

    Args:
        directory: named in errors.
        headers: see `stored_tensors`.
        table: the tensors wanted.
        ignored: matches the names of tensors that may lie beside them.

    Raises:
        ValueError: a tensor is missing, not wanted, of another shape, or of a dtype that cannot be read.
    """
    found = {name: (file, *facts) for file, header in headers.items() for name, facts in header.items()}
    missing = [name for name in table if name not in found]
    extra = [name for name in found if name not in table and not ignored.fullmatch(name)]
    if missing:
        renamed = next((e for e in extra if e.endswith("." + missing[0])), None)
        hint = f". It holds {brief(renamed)}: rename its tensors" if renamed else ""
        raise ValueError(f"{directory}: the weights lack {_some(missing)}{hint}")
    if extra:
        raise ValueError(
            f"{directory}: the weights hold {_some(extra)}, which no model of this {CONFIG_FILE} has. "
            "The config and the weights are of different models"
        )
    for name, slot in table.items():
        file, dtype, shape = found[name]
        if shape != slot.shape:
            raise ValueError(
                f"{file}: tensor {name!r} must be {list(slot.shape)} by {CONFIG_FILE}, found {list(shape)}"
            )
        if dtype not in DTYPES:
            raise ValueError(
                f"{file}: tensor {name!r} has dtype {dtype}, only {', '.join(DTYPES)} can be read: "
                "quantised weights must be expanded first"
            )


def _chunks(file: Path, name: str, shape: tuple[int, ...]) -> Iterator[tuple[slice, torch.Tensor]]:
    row_bytes = 4 * max(1, torch.Size(shape[1:]).numel())
    step = max(1, _CHUNK_BYTES // row_bytes)
    for first in range(0, shape[0], step):
        rows = slice(first, min(first + step, shape[0]))
        yield rows, _read(file, name, rows)


def _read(file: Path, name: str, rows: slice) -> torch.Tensor:
    # safetensors would put it on the caller's default device
    with torch.device("cpu"), safe_open(file, framework="pt") as stored:
        return stored.get_slice(name)[rows]


def _check_finite(file: Path, extremes: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """`extremes` holds the min and max of each tensor as copied. A NaN in the tensor makes both NaN."""
    if not extremes:
        return
    bad = ~torch.stack(list(extremes.values())).isfinite().all(1).cpu()
    for name, is_bad in zip(extremes, bad.tolist(), strict=True):
        if not is_bad:
            continue
        low, high = (v.item() for v in _read(file, name, slice(None)).double().aminmax())
        max_abs = max(abs(low), abs(high))
        if max_abs < float("inf"):
            raise ValueError(
                f"{file}: tensor {name!r} reaches {max_abs:.4g}, more than {dtype_name(dtype)} holds: "
                "load with dtype='bfloat16' or 'float32'"
            )
        raise ValueError(
            f"{file}: tensor {name!r} holds NaN or Inf: the file is damaged, or training diverged"
        )


def _bar(total: int, progress: bool | None) -> tqdm:
    return tqdm(
        total=total,
        desc="loading",
        unit="B",
        unit_scale=True,
        delay=0 if progress else _BAR_AFTER_S,
        disable=None if progress is None else not progress,  # None: in a terminal only
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {brief(names[0])}{more}"
