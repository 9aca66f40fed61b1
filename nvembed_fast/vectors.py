"""Vectors in a .npy file that says what they were made from.

The file holds two arrays, one behind the other, as numpy's format allows. `np.load` of its path gives the
first, the vectors. The second is a `Record`, as JSON in bytes. So the record goes where the vectors go, and
one rename replaces both.
"""

import dataclasses
import json
import math
import os
import tokenize
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast

import numpy as np

from nvembed_fast.config import Precision
from nvembed_fast.precision import byte_width, quantized, restored, value_ranges

__all__ = ["Record", "normalized", "read_vectors", "write_quantized", "write_record", "write_vectors"]

_AGAIN = "make it anew with nvembed-fast encode FILE -o OUT.npy"
_OTHER_KINDS = {
    b"PK\x03\x04": "is a zip archive, as .npz files are",
    b"PK\x05\x06": "is an empty zip archive",
    b"\x1f\x8b": "is compressed by gzip",
    b"\x80": "is a pickle, which can run code",
}
# all that numpy's reader has been seen to raise for a damaged header
_HEADER_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    SyntaxError,
    tokenize.TokenError,
    MemoryError,
    RecursionError,
)


@dataclass(frozen=True)
class Record:
    """What vectors were made from.

    Attributes:
        model: the model's name, for messages.
        fingerprint: of the model, by `fingerprint.of_model`.
        texts: of the texts, by `fingerprint.of_texts`.
        instruction: in front of every text.
        max_length: tokens at which texts were cut.
        dtype: in which the model computed. Several, such as "float16, bfloat16", where `encode` went on in
            another one.
        precision: of the vectors in the file, see `precision`.
        width: dimensions of a vector. None for all of the model's.
        ranges: [2, width], of int8 and uint8 vectors.
    """

    model: str
    fingerprint: str
    texts: str
    instruction: str
    max_length: int
    dtype: str
    precision: Precision = "float32"
    width: int | None = None
    ranges: list[list[float]] | None = None


def normalized(vectors: np.ndarray) -> np.ndarray:
    """[N, D] of unit norm. A vector of zeros stays one."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)


def write_vectors(file: IO[bytes], vectors: np.ndarray, record: Record) -> None:
    """Write vectors, [N, D] of any float dtype, and behind them their record. `file` may be a pipe."""
    # by its write alone, which raises the system's errors: numpy's own way into a file does not tell them
    file = cast(IO[bytes], SimpleNamespace(write=file.write))
    np.save(file, vectors)
    write_record(file, record)


def write_record(file: IO[bytes], record: Record, min_bytes: int = 0) -> None:
    """Write what stands behind the vectors. Spaces fill its JSON up to `min_bytes`."""
    content = json.dumps(dataclasses.asdict(record)).encode().ljust(min_bytes)
    np.save(file, np.frombuffer(content, dtype=np.uint8))


def write_quantized(file: IO[bytes], vectors: np.ndarray, record: Record) -> None:
    """Write [N, width] float vectors in the precision of the record, with the ranges that they have."""
    ranges = value_ranges(vectors) if record.precision in ("int8", "uint8") else None
    write_vectors(
        file,
        quantized(vectors, record.precision, ranges),
        dataclasses.replace(record, ranges=None if ranges is None else ranges.tolist()),
    )


def read_vectors(path: Path) -> tuple[np.ndarray, Record | None]:
    """Read vectors and their record.

    Returns:
        [N, D] finite vectors in the file's float dtype and the machine's byte order, and None for a file
        without a record. They stay in the file, as a memory map that is not written to. Vectors of another
        byte order are copied. Those of another precision come back in float32, as exact as they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none, or not of that kind. Names it.
        OSError: it cannot be read. Names it.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            vectors = _mapped(file, path, size)
            record = _record(file, path) if file.tell() < size else None
        if vectors.dtype.kind != "f":
            vectors = _restored(vectors, record, path)
        vectors = vectors.astype(vectors.dtype.newbyteorder("="), copy=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}: {_AGAIN.replace('it anew', 'it')}") from None
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    # a sum is finite if and only if all of its row is, and needs no mask of the whole
    bad = np.flatnonzero(~np.isfinite(vectors.sum(axis=1, dtype=np.promote_types(vectors.dtype, np.float32))))
    if len(bad):
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(f"{path}: vector {bad[0]}{more} is NaN or Inf: {_AGAIN}")
    return vectors, record


def _mapped(file: IO[bytes], path: Path, size: int) -> np.ndarray:
    """The vectors where they lie, once their header is checked. Leaves the file behind them."""
    first = file.read(8)
    if not first:
        raise ValueError(f"{path} is empty: {_AGAIN}")
    if not first.startswith(b"\x93NUMPY"):
        found = (what for magic, what in _OTHER_KINDS.items() if first.startswith(magic))
        raise ValueError(f"{path} {next(found, 'is no .npy array made by nvembed-fast encode')}: {_AGAIN}")
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    file.seek(0)
    try:
        shape, is_fortran, dtype = readers[np.lib.format.read_magic(file)](file)
    except _HEADER_ERRORS as error:
        raise ValueError(f"{path} has a broken header: {_AGAIN}") from error
    if dtype not in (np.int8, np.uint8) and (dtype.kind != "f" or dtype.itemsize > 8):
        kind = "Python objects, which can run code" if dtype.hasobject else f"{dtype}"
        raise ValueError(
            f"{path} holds {kind}, and vectors are float16, float32, float64, int8 or uint8: {_AGAIN}"
        )
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{path} has shape {shape}, and vectors have [texts, width]: {_AGAIN}")
    begin = file.tell()
    wanted = begin + math.prod(shape) * dtype.itemsize
    if size < wanted:
        raise ValueError(
            f"{path} is cut short: {wanted} bytes by its header, {size} are there. Fetch it again"
        )
    vectors = np.memmap(file, dtype, "r", begin, shape, "F" if is_fortran else "C")
    file.seek(wanted)
    return vectors


def _record(file: IO[bytes], path: Path) -> Record:
    try:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("no array")
        file.seek(-6, os.SEEK_CUR)
        content: Any = json.loads(np.load(file, allow_pickle=False).tobytes())
        # what later versions have added may be absent
        added = [f.name for f in dataclasses.fields(Record) if f.default is not dataclasses.MISSING]
        given = {f.name: content[f.name] for f in dataclasses.fields(Record) if f.name not in added}
        return Record(**given, **{name: content[name] for name in added if name in content})
    except (*_HEADER_ERRORS, EOFError) as error:
        raise ValueError(
            f"{path} holds more than vectors, and that is no record of them: fetch it again, or {_AGAIN}"
        ) from error


def _restored(vectors: np.ndarray, record: Record | None, path: Path) -> np.ndarray:
    """[N, width] fp32. ValueError for bytes that their record does not explain."""
    if record is None:
        raise ValueError(f"{path} holds {vectors.dtype} without a record of what they mean: {_AGAIN}")
    try:
        precision, width, ranges = record.precision, record.width, None
        kind = {"int8": np.int8, "binary": np.int8, "uint8": np.uint8, "ubinary": np.uint8}[precision]
        if type(width) is not int or (vectors.dtype, vectors.shape[1]) != (
            kind,
            byte_width(width, precision),
        ):
            raise ValueError("another shape")
        if precision in ("int8", "uint8"):
            ranges = np.array(record.ranges, dtype=np.float32)
            if ranges.shape != (2, width) or not np.isfinite(ranges).all():
                raise ValueError("other ranges")
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds {vectors.dtype} {list(vectors.shape)}, and its record does not fit: {_AGAIN}"
        ) from error
    return restored(vectors, precision, width, ranges)
