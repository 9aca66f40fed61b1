"""A few rows of every weight, for `fingerprint.of_weights`: from the files, or from the modules as they are.

A matrix gives eight rows from its first to its last, evenly spaced, and a vector as many elements.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from nvembed_fast import files
from nvembed_fast.checkpoint import adapters
from nvembed_fast.checkpoint.load import stored_tensors
from nvembed_fast.checkpoint.names import published_tensors
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.placement import DTYPES

__all__ = ["adapter_samples", "loses_digits", "model_samples", "stored_samples"]

_ROWS = 8

Sample = tuple[str, tuple[int, ...], np.ndarray]


def loses_digits(directory: Path, config: NVEmbedConfig, dtype: torch.dtype) -> bool:
    """Whether a weight of a checkpoint that loads has values that `dtype` has not."""
    table = published_tensors(config)
    headers = stored_tensors(directory).values()
    stored = {DTYPES[kind] for tensors in headers for name, (kind, _) in tensors.items() if name in table}
    return any(torch.promote_types(one, dtype) != dtype for one in stored)


def stored_samples(directory: Path, config: NVEmbedConfig) -> Iterator[Sample]:
    """(published name, shape, fp32 values) of each weight of a checkpoint that loads.

    The rows are read by themselves. A mapped file would be read ahead around each of them.
    """
    table = published_tensors(config)
    for path, tensors in stored_tensors(directory).items():
        with open(path, "rb", buffering=0) as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            for name in filter(table.__contains__, tensors):
                shape, dtype = table[name].shape, DTYPES[tensors[name][0]]
                width = math.prod(shape[1:]) * dtype.itemsize
                first = 8 + size + header[name]["data_offsets"][0]
                rows = [os.pread(file.fileno(), width, first + row * width) for row in _rows(shape)]
                values = torch.frombuffer(bytearray(b"".join(rows)), dtype=dtype)
                yield name, shape, values.float().numpy()


def adapter_samples(directory: str | os.PathLike) -> Iterator[Sample]:
    """The same of an adapter that loads, under the names in its files, and the factor of B A."""
    directory = files.current(files.expanded(directory))
    rank, alpha, _ = adapters.read_config(directory / adapters.CONFIG_FILE)
    yield "scale", (), np.asarray(alpha / rank, dtype=np.float32)
    for file in (directory / name for name in (adapters.WEIGHTS_FILE, adapters.HEAD_FILE)):
        if files.is_file(file):
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    view = stored.get_slice(name)
                    shape = tuple(view.get_shape())
                    # safetensors would put them on the caller's default device
                    with torch.device("cpu"):
                        rows = torch.cat([view[row : row + 1] for row in _rows(shape)])
                    yield name, shape, rows.float().numpy()


def model_samples(model: NVEmbedModel) -> Iterator[Sample]:
    """The same of a model in memory, on any device. Waits for the device.

    A model with other parameters than it was built with, such as an adapter's, gives all by their own names.
    """
    table = published_tensors(model.config)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = parameters
    if {slot.parameter for slot in table.values()} == parameters.keys():
        tensors = {name: parameters[slot.parameter][slot.rows] for name, slot in table.items()}
    for name, tensor in tensors.items():
        yield name, tuple(tensor.shape), tensor[_rows(tensor.shape)].float().cpu().numpy()


def _rows(shape: tuple[int, ...]) -> list[int]:
    last = shape[0] - 1
    return sorted({round(i * last / (_ROWS - 1)) for i in range(_ROWS)})
