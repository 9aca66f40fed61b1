"""Texts out of a file: its lines, or one field of the records of JSON lines, JSON, CSV or TSV.

1. gzip is known by its first bytes, whatever the file is called.
2. The format is the caller's, or the suffix tells it. Without both, a field means JSON lines, and no field
   means that every line is a text. Then lines of JSON are refused, because their braces and keys are no text.
3. A byte order mark is no part of a text. Every line must be UTF-8 without NUL.

The invariant: a record gives exactly one text, or an error that names the file, the line and the key.
"""

import codecs
import csv
import gzip
import hashlib
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import PurePath
from typing import Any, Literal, get_args

__all__ = [
    "Format",
    "kind_of",
    "parse_json",
    "read_records",
    "read_rows",
    "read_texts",
    "text_id",
    "text_of",
    "way_out",
]

Format = Literal["text", "jsonl", "json", "csv", "tsv"]
Records = Generator[tuple[str, Any], None, None]  # (place, parsed record)
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
}
_DEFAULT_FIELD = "text"
# the first bytes of files that people pass and that hold no plain text, and what to do about them
_OTHER_KINDS = {
    codecs.BOM_UTF16_LE: "It is UTF-16. Convert it: iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "It is UTF-16. Convert it: iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "It is compressed by gzip. Decompress it: gzip -dc",
    b"PK\x03\x04": "It is a zip archive, as .xlsx files are. Unpack it, or save it as CSV",
    b"\x28\xb5\x2f\xfd": "It is compressed by zstd. Decompress it: zstd -dc",
    b"\xfd7zXZ": "It is compressed by xz. Decompress it: xz -dc",
    b"BZh": "It is compressed by bzip2. Decompress it: bzip2 -dc",
    b"PAR1": "It is a Parquet file. Save it as JSON lines",
}
_NOT_UTF8 = "Convert it to UTF-8, such as by iconv -f WINDOWS-1252 -t UTF-8"
_NO_LINES = (
    "; a field is read from JSON lines: choose --format csv, tsv or json, or leave --field and --ids out"
)
_NUL = "If it is UTF-16, convert it: iconv -f UTF-16LE -t UTF-8"


def read_texts(file: str, field: str | None = None, format: Format | None = None) -> list[str]:
    """Read the texts of a file, gzipped or not.

    - text: every line is a text, an empty one too. Only a line feed ends it.
    - jsonl: every line is an object with the field, or without `field` a string. Blank lines are skipped.
    - json: an array of such objects or strings.
    - csv, tsv: the first line names the columns, and every row has as many. Blank lines are skipped. Quotes
      are those of RFC 4180. A CSV header without a comma is cut at its semicolons or tabs.

    Args:
        file: a path, or - for standard input.
        field: the key or column whose strings are the texts. None: "text".
        format: None takes it from the suffix .jsonl, .ndjson, .json, .csv or .tsv, in any case and also
            before .gz. Any other file holds JSON lines if there is a field, and else one text a line.

    Raises:
        ValueError: no such file, no text in it, or a record that cannot be read. Names the file, the line (of
            JSON the item) and the key.
        OSError: the file cannot be read. Names it.
        MemoryError: it is too large. Names it.
    """
    return read_records(file, field, format)[0]


def read_records(
    file: str, field: str | None = None, format: Format | None = None, ids: str | None = None
) -> tuple[list[str], list[str]]:
    """Read the texts of a file as `read_texts` does, and their ids.

    Args:
        ids: the key or column of the ids, which are strings or integers. None: there are none.

    Returns:
        The texts, and as many ids, or none.
    """
    name = "standard input" if file == "-" else file
    if format is not None and format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
    if format == "text" and (field is not None or ids is not None):
        key = ids if field is None else field
        raise ValueError(f"lines of text have no field {key!r}: choose another format, or no field")
    suffix = _suffix_of(file)
    kind = format or _SUFFIXES.get(suffix) or ("text" if field is None and ids is None else "jsonl")
    found: list[str] = []
    with _opened(file, name) as stream:
        lines = _lines(stream, name)
        if kind == "text":
            texts = _plain(lines, name, guess=format is None)
        else:
            if kind == "jsonl":
                guessed = format is None and suffix not in _SUFFIXES
                records, unit = _json_lines(lines, name, guessed), "line"
            elif kind == "json":
                records, unit = _json_items(lines, name), "item"
            else:
                keys = [_DEFAULT_FIELD if field is None else field] + ([] if ids is None else [ids])
                records, unit = _rows(lines, name, keys, kind), "row"
            texts = []
            with closing(records):
                for place, record in records:
                    texts.append(_text(record, place, unit, field))
                    if ids is not None:
                        found.append(_id(record, place, unit, ids))
    if not texts:
        raise ValueError(f"{name} holds no text")
    return texts, found


def _suffix_of(file: str) -> str:
    """The suffix of a file in small letters, which of a gzipped one stands before .gz."""
    return PurePath(file.lower().removesuffix(".gz")).suffix


@contextmanager
def _opened(file: str, name: str) -> Iterator[Iterable[bytes]]:
    """The bytes of a file or of standard input, decompressed."""
    if file == "-" and sys.stdin is None:
        raise ValueError("standard input is closed: pass a file")
    try:
        # buffered anew, so that the first bytes can be looked at
        buffer = io.BufferedReader(sys.stdin.buffer if file == "-" else io.FileIO(file))  # type: ignore[type-var]
        try:
            packed = buffer.peek(2)[:2] == b"\x1f\x8b"
            yield gzip.GzipFile(fileobj=buffer) if packed else buffer
        finally:
            source = buffer.detach()
            if file != "-":
                source.close()
    except FileNotFoundError:
        raise ValueError(f"no text file {name}; - reads standard input") from None
    except OSError as error:
        raise OSError(f"cannot read {name}: {error.strerror or error}") from error
    except MemoryError:
        raise MemoryError(f"{name} does not fit in memory: cut it into several files") from None


def _lines(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of a file with their ends. Only a line feed ends one."""
    number, first = 0, b""
    try:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                first, line = line, line.removeprefix(codecs.BOM_UTF8)
            if b"\0" in line:
                raise ValueError(f"{name} is no text: line {number} has a NUL. {way_out(first, _NUL)}")
            yield line.decode()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{name} is not UTF-8: byte {error.start + 1} of line {number} is 0x{byte:02x}. "
            f"{way_out(first, _NOT_UTF8)}"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{name}: its gzip stream is cut short or damaged behind line {number} ({error}): fetch or "
            "compress it again"
        ) from error


def way_out(first_line: bytes, default: str = "") -> str:
    """What to do about a file that begins so, if it is of a kind that holds no plain text."""
    found = (hint for magic, hint in _OTHER_KINDS.items() if first_line.startswith(magic))
    return next(found, default)


def _plain(lines: Iterable[str], name: str, *, guess: bool) -> list[str]:
    texts = [line.rstrip("\r\n") for line in lines]
    first = next((text.strip() for text in texts if text.strip()), "")
    if guess and (kind := _json_kind(first)):
        raise ValueError(
            f"{name} looks like {'an array of JSON' if kind == 'json' else 'JSON lines'}: read its field by "
            f"--format {kind}, or every line as it is by --format text"
        )
    return texts


def _json_kind(first: str) -> Format | None:
    """The format of a file whose first line is this one, if it is JSON."""
    if re.fullmatch(r"\[\s*\{?", first):
        return "json"
    try:
        value = json.loads(first) if first[:1] in ("{", "[") else None
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        return "jsonl"
    return "json" if isinstance(value, list) and value and isinstance(value[0], dict | str) else None


def _json_lines(lines: Iterable[str], name: str, guessed: bool) -> Records:
    """(place, record) of every line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{name}, line {number}"
            yield place, parse_json(line, place, _NO_LINES if guessed else "")


def _json_items(lines: Iterable[str], name: str) -> Records:
    """(place, record) of every item."""
    document = "".join(lines)
    items = parse_json(document, name) if document.strip() else []
    if not isinstance(items, list):
        raise ValueError(f"{name} must be an array of objects or strings, got {kind_of(items)}")
    for number, item in enumerate(items, start=1):
        yield f"{name}, item {number}", item


def parse_json(document: str, place: str, hint: str = "") -> Any:
    """The value of a JSON document. Raises ValueError naming the place, with a hint what to do."""
    try:
        return json.loads(document)
    except RecursionError as error:
        raise ValueError(f"{place}: its JSON is nested too deeply to be read") from error
    except ValueError as error:
        is_lines = str(error).startswith("Extra data") and "\n" in document.strip()
        hint = "; --format jsonl reads JSON lines" if is_lines else hint
        raise ValueError(f"{place}: not JSON ({error}){hint}") from error


def _text(record: Any, place: str, unit: str, field: str | None) -> str:
    """The text of one parsed record."""
    if isinstance(record, str) and field is None:
        text, what = record, "the string"
    else:
        key = _DEFAULT_FIELD if field is None else field
        text, what = _value(record, place, unit, key, "--field"), repr(key)
    return text_of(text, what, place)


def text_of(value: Any, what: str, place: str) -> str:
    """A parsed value as a text. Raises ValueError naming the place if it is none."""
    if not isinstance(value, str):
        raise ValueError(f"{place}: {what} must be a string, got {kind_of(value)}")
    # a JSON escape can give what no file in UTF-8 holds
    if not value.isascii() and (lone := re.search("[\ud800-\udfff]", value)):
        raise ValueError(
            f"{place}: {what} has a lone surrogate, \\u{ord(lone[0]):04x}, which is no character: remove it"
        )
    return value


def text_id(text: str) -> int:
    """The key of a text among others: 64 bits of its hash as a signed integer, and never 0."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


def _id(record: Any, place: str, unit: str, key: str) -> str:
    """The id of one parsed record, as a line."""
    value = _value(record, place, unit, key, "--ids")
    value = str(value) if type(value) is int else value
    if not isinstance(value, str):
        raise ValueError(f"{place}: {key!r} must be a string or an integer, got {kind_of(value)}")
    if not value or not value.isprintable():
        raise ValueError(f"{place}: {key!r} must be printable characters in one line, got {value!r:.40}")
    return value


def _value(record: Any, place: str, unit: str, key: str, option: str) -> Any:
    """What a parsed record holds under a key."""
    if not isinstance(record, dict):
        raise ValueError(f"{place}: no {key!r}, the {unit} is no JSON object but {kind_of(record)}")
    if key not in record:
        raise _absent(place, unit, key, list(record), option)
    return record[key]


def kind_of(value: Any) -> str:
    """What a parsed value is called in JSON, for messages."""
    names = {"NoneType": "null", "dict": "an object", "list": "an array", "str": "a string"}
    return names.get(type(value).__name__, type(value).__name__)


def _absent(place: str, unit: str, key: str, keys: list[str], option: str) -> ValueError:
    shown = ", ".join(f"{k!r:.40}" for k in keys[:9]) + (
        f" and {len(keys) - 9} more" if len(keys) > 9 else ""
    )
    or_lines = ", or read lines by --format text" if unit == "header" else ""
    return ValueError(
        f"{place}: no {key!r}, the {unit} has {shown or 'none'}; choose with {option}{or_lines}"
    )


def read_rows(file: str) -> Records:
    """(place, row) of a file as `read_texts` reads it, gzipped or not: the cells by column of a .csv or .tsv
    file, and the values of any other, which holds JSON lines.

    Raises:
        ValueError: it cannot be read. Names the file and the line.
    """
    name = "standard input" if file == "-" else file
    kind = _SUFFIXES.get(_suffix_of(file))
    with _opened(file, name) as stream:
        lines = _lines(stream, name)
        rows = _rows(lines, name, None, kind) if kind in ("csv", "tsv") else _json_lines(lines, name, False)
        with closing(rows):
            yield from rows


def _rows(lines: Iterator[str], name: str, keys: list[str] | None, kind: Format) -> Records:
    """(place, cells) of every row. The columns are those of the text and of the id, or all."""
    header = next(lines, "")
    delimiter = "\t" if kind == "tsv" else next((d for d in ",;\t" if d in header), ",")
    rows = csv.reader(itertools.chain([header] if header else [], lines), delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    before = csv.field_size_limit(sys.maxsize)  # the limit is the process's
    try:
        first = 1
        for row in rows:
            place = f"{name}, line {first}"
            first = rows.line_num + 1
            if columns is None:
                columns = row
                keys = columns if keys is None else keys
                for key, option in zip(keys, ("--field", "--ids"), strict=False):
                    if key not in columns:
                        raise _absent(place, "header", key, columns, option)
                    if columns.count(key) > 1:
                        raise ValueError(f"{place}: the header has {key!r} {columns.count(key)} times")
                indices = {key: columns.index(key) for key in keys}
            elif len(row) == len(columns):
                yield place, {key: row[index] for key, index in indices.items()}
            elif row:
                raise ValueError(
                    f"{place}: must have {len(columns)} fields like the header, got {len(row)}: quote a "
                    f"field that holds {delimiter!r}, a quote or a line feed"
                )
    except csv.Error as error:
        reason = str(error).split(" - ")[0]  # behind it stands what a programmer should do
        raise ValueError(
            f"{name}, the row from line {first}: not {kind.upper()} ({reason}): quote a field that holds a "
            "quote, a line feed or a carriage return"
        ) from error
    finally:
        csv.field_size_limit(before)
