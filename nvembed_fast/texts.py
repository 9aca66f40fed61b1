"""Texts out of a file: one a line, or a field of JSON lines."""

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["read_texts"]


def read_texts(file: str, field: str | None = None) -> list[str]:
    """Read the texts of a file.

    Args:
        file: a path, or - for standard input.
        field: read JSON lines and take the string under this key. None takes "text" if the file's name ends
            in .jsonl, and else one text a line.

    Raises:
        ValueError: no such file, no text in it, or a line that cannot be read. Names the file and the line.
    """
    name = "standard input" if file == "-" else file
    try:
        with _opened(file) as lines:
            texts = [line.rstrip("\r\n") for line in lines]
    except FileNotFoundError:
        raise ValueError(f"no text file {name}; - reads standard input") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}") from error
    if field is None and file.endswith(".jsonl"):
        field = "text"
    if field is not None:
        texts = [
            _field(name, number, line, field) for number, line in enumerate(texts, start=1) if line.strip()
        ]
    if not texts:
        raise ValueError(f"{name} holds no text")
    return texts


@contextmanager
def _opened(file: str) -> Iterator[TextIO]:
    if file == "-":
        assert isinstance(sys.stdin, io.TextIOWrapper)
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
        yield sys.stdin
    else:
        # only line feeds end a text, and a byte order mark is no part of it
        with open(file, encoding="utf-8-sig", newline="\n") as lines:
            yield lines


def _field(name: str, number: int, line: str, field: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{name}, line {number}: not JSON ({error})") from error
    if not isinstance(record, dict) or field not in record:
        found = f"has {', '.join(map(repr, record))}" if isinstance(record, dict) else "is no JSON object"
        raise ValueError(f"{name}, line {number}: no {field!r}, the line {found}; choose with --field")
    if not isinstance(record[field], str):
        kind = type(record[field]).__name__
        raise ValueError(f"{name}, line {number}: {field!r} must be a string, got {kind}")
    return record[field]
