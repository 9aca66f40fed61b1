"""Vectors in fewer bits, with the meaning that sentence-transformers gives to the same names.

- float16: half the room of float32. That library does not have it.
- int8, uint8: of each dimension the range from its min to its max is cut into 255 steps, and a number becomes
  its step. Both hold one byte a number. What lies outside of the range takes the step at its end.
- binary, ubinary: one bit a number, 1 where it is above 0. Eight of them are a byte, int8 or uint8.

Ranges belong to the vectors: bytes of other ranges must not be compared with them.
"""

import warnings
from collections.abc import Iterator
from typing import cast, get_args

import numpy as np

from nvembed_fast.config import Precision

__all__ = [
    "byte_width",
    "check_precision",
    "check_ranges",
    "quantized",
    "restored",
    "value_ranges",
]

_MIN_TEXTS = 100  # fewer make poor ranges
_CHUNK = 8192  # rows at a time
_MAX_HALF = 65504.0


def check_precision(precision: str | None) -> Precision:
    """`precision` itself, float32 for None, or a ValueError that names the choices."""
    if precision is None:
        return "float32"
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    return cast(Precision, precision)


def check_ranges(ranges: np.ndarray | None, precision: Precision, num_vectors: int, width: int) -> None:
    """Validate ranges before the vectors are made.

    Args:
        ranges: of `value_ranges`, or None to take those of the vectors themselves.
        precision: what the vectors shall become.
        num_vectors, width: of the vectors.

    Raises:
        ValueError: ranges are missing for a single vector, or are not [2, width] and finite.
        TypeError: ranges are given for a precision that has none.
    """
    if precision not in ("int8", "uint8"):
        if ranges is not None:
            raise TypeError(
                f"ranges are those of int8 and uint8, got precision={precision!r}: leave them out"
            )
    elif ranges is None:
        if num_vectors == 1:
            raise ValueError(
                f"{precision} needs ranges, and a single text has none: pass ranges=value_ranges(vectors) of "
                "many (nvembed_fast.precision)"
            )
        if 0 < num_vectors < _MIN_TEXTS:
            warnings.warn(
                f"the ranges of {precision} are those of {num_vectors} texts, and {_MIN_TEXTS} or more give "
                "better ones: pass ranges=value_ranges(vectors) of many (nvembed_fast.precision)",
                stacklevel=3,
            )
    elif np.shape(ranges) != (2, width) or not np.isfinite(ranges).all():
        raise ValueError(f"ranges must be [2, {width}] and finite, got {list(np.shape(ranges))}")


def value_ranges(vectors: np.ndarray) -> np.ndarray:
    """[2, D] fp32 min and max of each dimension of [N, D] vectors, for N > 0."""
    lows, highs = zip(*((c.min(axis=0), c.max(axis=0)) for c in _chunks(vectors)), strict=True)
    return np.stack([np.min(lows, axis=0), np.max(highs, axis=0)]).astype(np.float32)


def quantized(vectors: np.ndarray, precision: Precision, ranges: np.ndarray | None = None) -> np.ndarray:
    """Vectors in another precision.

    Args:
        vectors: [N, D] float.
        precision: float32 gives the vectors themselves.
        ranges: see `check_ranges`.

    Returns:
        [N, D] for float16, int8 and uint8, [N, ceil(D / 8)] for binary (int8) and ubinary (uint8).

    Raises:
        ValueError: a vector is beyond the range of float16.
    """
    if precision == "float32":
        return vectors
    if precision in ("int8", "uint8") and ranges is None and len(vectors):
        ranges = value_ranges(vectors)
    found = np.empty((len(vectors), byte_width(vectors.shape[1], precision)), dtype=_kind_of(precision))
    for first, chunk in zip(range(0, len(vectors), _CHUNK), _chunks(vectors), strict=True):
        if precision == "float16" and len(far := np.flatnonzero((np.abs(chunk) > _MAX_HALF).any(axis=1))):
            raise ValueError(
                f"vector {first + far[0]} is beyond the range of float16: choose another precision"
            )
        found[first : first + _CHUNK] = _quantized(chunk, precision, ranges)
    return found


def _quantized(vectors: np.ndarray, precision: Precision, ranges: np.ndarray | None) -> np.ndarray:
    if precision in ("binary", "ubinary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    if precision == "float16":
        return vectors.astype(np.float16)
    assert ranges is not None
    low, step = _low_and_step(ranges)
    steps = np.clip(np.floor((vectors - low) / np.where(step == 0, 1, step)), 0, 255)
    return steps.astype(np.uint8) if precision == "uint8" else (steps - 128).astype(np.int8)


def restored(
    vectors: np.ndarray, precision: Precision, width: int, ranges: np.ndarray | None = None
) -> np.ndarray:
    """[N, width] fp32 of quantised vectors.

    Bytes give the middle of their step. Bits give 1 / sqrt(width), with a minus for 0.
    """
    if precision in ("float32", "float16"):
        return vectors.astype(np.float32, copy=False)
    found = np.empty((len(vectors), width), dtype=np.float32)
    for first, chunk in zip(range(0, len(vectors), _CHUNK), _chunks(vectors), strict=True):
        if precision in ("binary", "ubinary"):
            bits = chunk if precision == "ubinary" else (chunk.astype(np.int16) + 128).astype(np.uint8)
            signs = 2 * np.unpackbits(bits, axis=-1, count=width).astype(np.float32) - 1
            found[first : first + _CHUNK] = signs / np.float32(width) ** 0.5
        else:
            assert ranges is not None
            low, step = _low_and_step(ranges)
            steps = chunk.astype(np.float32) + (128 if precision == "int8" else 0)
            found[first : first + _CHUNK] = (steps + 0.5) * step + low
    return found


def byte_width(width: int, precision: Precision) -> int:
    """Numbers or bytes in a row of `width` numbers."""
    return -(-width // 8) if precision in ("binary", "ubinary") else width


def _kind_of(precision: Precision) -> np.dtype:
    return np.dtype({"binary": "int8", "ubinary": "uint8"}.get(precision, precision))


def _low_and_step(ranges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.asarray(ranges, dtype=np.float32)
    return low, (high - low) / 255


def _chunks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    return (vectors[first : first + _CHUNK] for first in range(0, len(vectors), _CHUNK))
