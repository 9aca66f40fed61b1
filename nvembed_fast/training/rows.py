"""Rows of training data by their number: files of JSON lines, Arrow or Parquet.

A row is `{"query": "..", "pos": [".."], "neg": [".."]}`, the form of FlagEmbedding, with optional
`pos_scores`, `neg_scores` and `prompt`. Or it is `{"text": "..", "label": ".."}`. A plain string may stand
where a list is expected.

A file of JSON lines is read by offsets, without a library and without an index beside it:

1. Opening reads it once in chunks. Each chunk leaves one entry: the first line that starts in it, and
   where.
2. If there are more than MAX_ENTRIES entries, every second one goes and the chunks become twice as long. So
   the index has at most 4 MB, whatever the size of the file.
3. A row is found between the last entry in front of it and the next one, with one read.

The invariant: row i is line i + 1. So a blank line is an error, but for those at the end. A file that
another process changes is no longer the same data, which `fingerprint` tells.
"""

import codecs
import hashlib
import math
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from nvembed_fast import files
from nvembed_fast.texts import kind_of, parse_json, text_of, way_out

__all__ = [
    "ARROW_SUFFIXES",
    "ArrowRows",
    "JsonRows",
    "Labelled",
    "Row",
    "Rows",
    "open_rows",
    "to_labelled",
    "to_row",
]

MAX_ENTRIES = 2**18
_CHUNK_BYTES = 2**14
_ARROW_ROWS = 128  # of a Parquet file at once
_PARQUET = ".parquet"
ARROW_SUFFIXES = (".arrow", ".feather", ".ipc", _PARQUET)


@dataclass(frozen=True)
class Row:
    """A query, its positives and its own negatives.

    The scores are a teacher's, one for each text, or None. The prompt is the task of this row alone, in the
    place of the data set's instruction. None: it has no other.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    positive_scores: tuple[float, ...] | None = None
    negative_scores: tuple[float, ...] | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Labelled:
    """A text and its class."""

    text: str
    label: str


def open_rows(file: str | PathLike) -> "Rows":
    """Open a file of rows by its suffix: .arrow, .feather, .ipc, .parquet, or else JSON lines.

    Raises:
        ValueError: there is no such file, it holds no row, or it is of another kind.
        ImportError: pyarrow is missing.
    """
    path = files.expanded(file)
    if not path.is_file():
        raise ValueError(f"{path} is no file: a data set is one file of JSON lines, Arrow or Parquet")
    rows: Rows = ArrowRows(path) if path.suffix.lower() in ARROW_SUFFIXES else JsonRows(path)
    if not len(rows):
        raise ValueError(f"{path} holds no row")
    return rows


class Rows:
    """The rows of one file.

    Attributes:
        file: its path.
        fingerprint: 32 hexadecimal digits of its content.
    """

    file: Path
    fingerprint: str

    def __len__(self) -> int:
        raise NotImplementedError

    def record(self, index: int) -> Any:
        """Row `index` as it was parsed, not yet looked at."""
        raise NotImplementedError

    def records(self) -> Iterator[Any]:
        """All of them in the file's order."""
        raise NotImplementedError

    def place(self, index: int) -> str:
        """Where row `index` stands, for messages."""
        raise NotImplementedError

    def row(self, index: int) -> Row:
        """Row `index` as a query with its documents.

        Raises:
            ValueError: it is none. The message names file and line.
        """
        return to_row(self.record(index), self.place(index))

    def labelled(self, index: int) -> Labelled:
        """Row `index` as a text with its label. Raises ValueError like `row`."""
        return to_labelled(self.record(index), self.place(index))


class JsonRows(Rows):
    """A file of JSON lines. Its rows may be read from several threads."""

    def __init__(self, file: str | PathLike):
        self.file = Path(file)
        self._source = open(self.file, "rb", buffering=0)  # noqa: SIM115 - open as long as the rows
        if hint := way_out(os.pread(self._source.fileno(), 8, 0)):
            self._source.close()
            raise ValueError(f"{self.file} holds no JSON lines. {hint}")
        digest = hashlib.blake2b(digest_size=16)
        chunk_bytes, offset, num_lines = _CHUNK_BYTES, 0, 0
        self._lines, self._offsets = array("q", [0]), array("q", [0])
        ends_with_line = True
        while chunk := os.pread(self._source.fileno(), chunk_bytes, offset):
            digest.update(chunk)
            ends_with_line = chunk.endswith(b"\n")
            first = chunk.find(b"\n") + 1
            if first and first + offset > self._offsets[-1]:
                self._lines.append(num_lines + 1)
                self._offsets.append(offset + first)
            num_lines += chunk.count(b"\n")
            offset += len(chunk)
            if len(self._lines) > MAX_ENTRIES:
                del self._lines[1::2], self._offsets[1::2]
                chunk_bytes *= 2
        self._num_bytes = offset
        self._num_rows = num_lines + (not ends_with_line)
        while self._num_rows and not self._line(self._num_rows - 1).strip():
            self._num_rows -= 1
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self._num_rows

    def place(self, index: int) -> str:
        return f"{self.file}, line {index + 1}"

    def record(self, index: int) -> Any:
        if not 0 <= index < self._num_rows:
            raise IndexError(f"{self.file} has {self._num_rows} rows, and no row {index}")
        return self._parse(self._line(index), index)

    def records(self) -> Iterator[Any]:
        index = 0
        for entry in range(len(self._lines)):
            for line in self._block(entry):
                if index == self._num_rows:
                    return
                yield self._parse(line, index)
                index += 1

    def _line(self, index: int) -> bytes:
        entry = bisect_right(self._lines, index) - 1
        return self._block(entry)[index - self._lines[entry]]

    def _block(self, entry: int) -> list[bytes]:
        """The lines from an entry to the next one."""
        start = self._offsets[entry]
        end = self._offsets[entry + 1] if entry + 1 < len(self._offsets) else self._num_bytes
        content = os.pread(self._source.fileno(), end - start, start)
        if len(content) < end - start:
            raise ValueError(f"{self.file} became shorter while it was in use: start again")
        lines = content.split(b"\n")
        return lines[:-1] if not lines[-1] else lines

    def _parse(self, line: bytes, index: int) -> Any:
        place = self.place(index)
        if index == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{place} is not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}. Convert the file"
            ) from error
        if not text.strip():
            raise ValueError(f"{place} is blank: remove it")
        hint = f": {text[:200].strip()!r:.80}. `nvembed-fast convert` makes rows of CSV and other forms"
        return parse_json(text, place, hint)


class ArrowRows(Rows):
    """A table in an Arrow file, mapped into memory.

    A Parquet file, or a compressed Arrow file, is first written as a plain one, into a temporary file. Single
    rows of Parquet cannot be read fast, and compressed ones would be unpacked into memory.
    """

    def __init__(self, file: str | PathLike):
        try:
            import pyarrow
        except ImportError as error:
            raise ImportError(
                f"{file} needs pyarrow: pip install 'nvembed-fast[train]', or make it JSON lines"
            ) from error
        self.file = Path(file)
        try:
            with open(self.file, "rb") as source:
                digest = hashlib.file_digest(source, lambda: hashlib.blake2b(digest_size=16))
                self.fingerprint = digest.hexdigest()
            is_parquet = self.file.suffix.lower() == _PARQUET
            self._table = _of_parquet(self.file) if is_parquet else _of_arrow(self.file)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowKeyError, pyarrow.ArrowNotImplementedError) as error:
            raise ValueError(f"{self.file} is no readable table: {error}") from error

    def __len__(self) -> int:
        return self._table.num_rows

    def place(self, index: int) -> str:
        return f"{self.file}, row {index + 1}"

    def record(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.file} has {len(self)} rows, and no row {index}")
        return self._table.slice(index, 1).to_pylist()[0]

    def records(self) -> Iterator[Any]:
        for batch in self._table.to_batches(max_chunksize=_ARROW_ROWS):
            yield from batch.to_pylist()


def _of_parquet(file: Path) -> Any:
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(file)
    return _copied(parquet.schema_arrow, parquet.iter_batches(batch_size=_ARROW_ROWS))


def _of_arrow(file: Path) -> Any:
    import pyarrow

    mapped = pyarrow.memory_map(str(file)).read_buffer()
    is_file = mapped[:6].to_pybytes() == b"ARROW1"  # else a stream, as `datasets` writes it
    open_table = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream

    def batches() -> Iterator[Any]:
        reader = open_table(mapped)
        if not is_file:
            return iter(reader)
        return map(reader.get_batch, range(reader.num_record_batches))

    def is_mapped(batch: Any) -> bool:
        buffers = [buffer for column in batch.columns for buffer in column.buffers() if buffer]
        return all(0 <= buffer.address - mapped.address < mapped.size for buffer in buffers)

    if all(map(is_mapped, batches())):
        return open_table(mapped).read_all()
    return _copied(open_table(mapped).schema, batches())


def _copied(schema: Any, batches: Iterator[Any]) -> Any:
    """The table of batches, mapped from an Arrow stream in a file without a name."""
    import pyarrow

    with tempfile.NamedTemporaryFile(suffix=".arrow") as copy:
        with pyarrow.ipc.new_stream(copy, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        copy.flush()
        # the mapping stays when the name goes
        return pyarrow.ipc.open_stream(pyarrow.memory_map(copy.name)).read_all()


def to_row(record: Any, place: str) -> Row:
    """A parsed record as a query with its documents. Raises ValueError naming the place.

    A positive that equals the query is left out, because it teaches nothing.
    """
    if isinstance(record, dict) and "query" not in record and "label" in record:
        raise ValueError(
            f"{place}: no 'query', the row has a label: say how it is used, by labels = \"examples\" or "
            '"texts" of its data set'
        )
    query = _text(_value(record, "query", place), "'query'", place)
    positives = _texts(_value(record, "pos", place), "pos", place)
    negatives = _texts(record.get("neg"), "neg", place)
    if not positives:
        raise ValueError(f"{place}: 'pos' is empty, so there is nothing to learn: remove the row")
    if set(positives) == {query}:
        raise ValueError(f"{place}: the only positive equals the query: remove the row")
    positive_scores = _scores(record.get("pos_scores"), "pos_scores", positives, place)
    kept = [i for i, text in enumerate(positives) if text != query]
    positives = tuple(positives[i] for i in kept)
    positive_scores = positive_scores and tuple(positive_scores[i] for i in kept)
    negative_scores = _scores(record.get("neg_scores"), "neg_scores", negatives, place)
    prompt = record.get("prompt")
    if prompt not in (None, ""):
        _text(prompt, "'prompt'", place)
    return Row(query, positives, negatives, positive_scores, negative_scores, prompt)


def to_labelled(record: Any, place: str) -> Labelled:
    """A parsed record as a text with its label. Raises ValueError naming the place."""
    text = _text(_value(record, "text", place), "'text'", place)
    label = _value(record, "label", place)
    label = str(label) if type(label) is int else label
    return Labelled(text, _text(label, "'label'", place))


def _value(record: Any, key: str, place: str) -> Any:
    if not isinstance(record, dict):
        raise ValueError(f"{place}: must be an object with {key!r}, got {kind_of(record)}")
    if key not in record:
        raise ValueError(
            f"{place}: no {key!r}, the row has {', '.join(map(repr, record)) or 'nothing'!s:.200}. "
            "`nvembed-fast convert` makes rows of other forms"
        )
    return record[key]


def _texts(value: Any, key: str, place: str) -> tuple[str, ...]:
    """A list of texts, one text, or nothing."""
    if isinstance(value, str):
        return (_text(value, f"'{key}'", place),)
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{place}: '{key}' must be a list of strings, got {kind_of(value)}")
    return tuple(_text(text, f"'{key}'[{i}]", place) for i, text in enumerate(value or ()))


def _text(value: Any, what: str, place: str) -> str:
    text = text_of(value, what, place)
    if not text.strip():
        raise ValueError(f"{place}: {what} is empty")
    return text


def _scores(value: Any, key: str, texts: Sequence[str], place: str) -> tuple[float, ...] | None:
    if value is None or (value == [] and not texts):
        return None
    if not isinstance(value, list) or len(value) != len(texts):
        got = f"{len(value)} of them" if isinstance(value, list) else kind_of(value)
        raise ValueError(f"{place}: '{key}' must be {len(texts)} numbers, one for each text, got {got}")
    for score in value:
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"{place}: '{key}' must be finite numbers, got {score!r:.40}")
    return tuple(map(float, value))
