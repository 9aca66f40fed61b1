"""What stands in a GGUF file: its fields and its tensors, by name.

Every length is compared with the file's before it is used. The reader of the package gguf believes them: an
array of 2**40 elements in a file of a kilobyte fills the memory.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nvembed_fast.files import brief

__all__ = ["GGUFTensor", "read_gguf"]

_VERSIONS = (2, 3)
# struct's letters of the scalar types by their numbers. A bool is a byte
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_DIMENSIONS = 4


class GGUFTensor(NamedTuple):
    """A tensor as it is stored.

    Attributes:
        shape: in PyTorch's order.
        kind: how it is stored, a `gguf.GGMLQuantizationType`.
        data: its bytes, uint8 of shape [*shape[:-1], bytes of a row], mapped from the file.
    """

    shape: tuple[int, ...]
    kind: Any
    data: np.ndarray


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """The fields (numbers, bools, strings, lists of these) and the tensors of a GGUF file.

    Raises:
        ValueError: the file is damaged. The message names the field or the tensor.
    """
    data = np.memmap(file, mode="r")
    cursor = _Cursor(data)
    if bytes(data[:4]) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    cursor.skip(4)
    if (version := cursor.number("I")) not in _VERSIONS:
        raise ValueError(f"version {version} is not one of {_VERSIONS}")
    num_tensors, num_fields = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        name = cursor.string()
        try:
            if name in fields:
                raise ValueError("it is there twice")
            fields[name] = cursor.value(cursor.number("I"))
        except ValueError as error:
            raise ValueError(f"field {name:.80}: {error}") from error
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two, got {brief(alignment)}")

    places: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        name = cursor.string()
        try:
            if name in places:
                raise ValueError("it is there twice")
            if (count := cursor.number("I")) > _MAX_DIMENSIONS:
                raise ValueError(f"it has {count} dimensions, more than {_MAX_DIMENSIONS}")
            shape = tuple(cursor.number("Q") for _ in range(count))[::-1]
            if 0 in shape:
                raise ValueError("it has no elements")
            places[name] = (shape, cursor.number("I"), cursor.number("Q"))
        except ValueError as error:
            raise ValueError(f"tensor {brief(name)}: {error}") from error
    start = -(-cursor.at // alignment) * alignment
    return fields, {name: _tensor(data, start, name, *place) for name, place in places.items()}


def _tensor(
    data: np.ndarray, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> GGUFTensor:
    import gguf

    try:
        stored_as = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored_as]
        width = shape[-1] if shape else 1
        if width % block:
            raise ValueError(f"its rows of {width} are no multiple of {stored_as.name}'s {block}")
        row_bytes = width // block * block_bytes
        size = math.prod(shape[:-1]) * row_bytes
        if start + offset + size > len(data):
            raise ValueError("it ends behind the file")
    except ValueError as error:
        raise ValueError(f"tensor {brief(name)}: {error}") from error
    return GGUFTensor(
        shape, stored_as, data[start + offset : start + offset + size].reshape(*shape[:-1], row_bytes)
    )


class _Cursor:
    """Reads numbers and strings one behind the other."""

    def __init__(self, data: np.ndarray):
        self._data, self.at = data.data, 0

    def skip(self, size: int) -> int:
        """The place before `size` bytes, which are passed over. ValueError if the file has not as many."""
        before = self.at
        if size > len(self._data) - before:
            raise ValueError(f"{size} bytes at {before} are behind the file's end")
        self.at += size
        return before

    def number(self, letter: str) -> Any:
        return struct.unpack_from(f"<{letter}", self._data, self.skip(struct.calcsize(f"<{letter}")))[0]

    def string(self) -> str:
        at = self.skip(self.number("Q"))
        return str(self._data[at : self.at], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == _STRING:
                return [self.string() for _ in range(count)]
            letter = _letter(kind)
            at = self.skip(count * struct.calcsize(f"<{letter}"))
            values = np.frombuffer(self._data, f"<{letter}", count, at).tolist()
            return [_bool(v) for v in values] if kind == _BOOL else values
        found = self.number(_letter(kind))
        return _bool(found) if kind == _BOOL else found


def _letter(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"type {kind} is unknown")
    return _SCALARS[kind]


def _bool(value: int) -> bool:
    if value > 1:
        raise ValueError(f"a bool must be 0 or 1, got {value}")
    return bool(value)
