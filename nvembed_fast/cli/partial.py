"""An array on its way to its file: the rows of an interrupted run stay, and the next run goes on from there.

`OUT.npy.partial` is the array as `vectors.write_vectors` writes it, with its record. Behind that it has a
byte for each row: 1 if the row is there.

1. The whole file is made at the start, so that a full disk is told at the start.
2. Rows are written in any order. They are synced before their bytes are set to 1, so a kill or a loss of
   power leaves no half row that counts.
3. When all rows are there, the bytes are cut off and the file is renamed to OUT.npy. Rows that the output has
   in another precision are written to it anew.

A file with another record is never touched: it holds rows of another model, of other texts or other options.
The dtype alone may be another one, because rows that overflow in float16 cannot be made in it. The record
then names all dtypes in which rows were made. It has room for their names, and is written in its place.
A process keeps a lock on its file as long as it lives.
"""

import dataclasses
import fcntl
import io
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from nvembed_fast import files
from nvembed_fast.cli import options, process
from nvembed_fast.placement import DTYPES, dtype_name
from nvembed_fast.vectors import Record, write_record

__all__ = ["Partial"]

MARK_EVERY_S = 10.0
_DTYPES = tuple(map(dtype_name, DTYPES.values()))


class Partial:
    """The rows of an array that is not whole yet. A context, to be left by way of `finish`.

    Attributes:
        path: of the file, beside the output. A link as output is followed.
        rows: [N, D], the rows in the file.
        record: of these rows, with the dtypes in which they were made.
    """

    def __init__(self, output: Path, shape: tuple[int, int], dtype: str, record: Record):
        """Open the file that an interrupted run has left, or make a new one.

        Raises:
            FileExistsError: the file is of another array, or a living process writes it.
            OSError: the file cannot be made. Names the output.
        """
        self.output = Path(os.path.realpath(output))
        self.path = self.output.with_name(self.output.name + ".partial")
        self._arrived: list[int] = []
        self._marked = time.monotonic()
        self.record, self._dtype = record, record.dtype
        head, tail = _head(shape, dtype), _tail(record)
        tails = {tail: record} | {_tail(found): found for found in _in_any_dtypes(record)}
        self._tail_at = len(head) + shape[0] * shape[1] * np.dtype(dtype).itemsize
        self._whole = self._tail_at + len(tail)
        try:
            if self.path.is_symlink() or self.path.exists() and not self.path.is_file():
                raise FileExistsError(f"{self.path} is no ordinary file: remove it, or choose another output")
            self._file = self._locked_file()
            size, marked = os.fstat(self._file.fileno()).st_size, self._whole + shape[0]
            # new, or its process died while it made it
            if size in (0, marked) and not self._read(0, 8).strip(b"\0"):
                self._make(head, tail, marked)
                size = marked
            found = tails.get(self._read(self._tail_at, len(tail)))
            if self._read(0, len(head)) != head or found is None or size not in (self._whole, marked):
                raise FileExistsError(
                    f"{self.path} holds rows of another model, of other texts or of other options: run the "
                    "command that made it, remove it, or choose another output"
                )
            self.record = found
            if size == self._whole:  # its process died when all rows were there
                files.write_all(self._file.fileno(), b"\1" * shape[0], size)
            self.rows = np.memmap(self._file, dtype, "r+", len(head), shape)
            self._is_there: np.ndarray = np.memmap(self._file, np.uint8, "r+", self._whole, shape[:1])
        except FileExistsError:
            raise
        except OSError as error:
            raise OSError(f"cannot write {output}: {error.strerror or error}") from error

    def __len__(self) -> int:
        """The number of rows that are there."""
        return int(np.count_nonzero(self._is_there))

    def missing(self) -> list[int]:
        """The indices of the others."""
        return np.flatnonzero(self._is_there == 0).tolist()

    def arrived(self, indices: list[int]) -> None:
        """These rows have been written to `rows`."""
        self._arrived += indices
        if time.monotonic() - self._marked >= MARK_EVERY_S:
            self._mark()

    def finish(self, write: Callable[[IO[bytes], np.ndarray, Record], None] | None = None) -> None:
        """Rename the file to the output, or write the output from its rows.

        Args:
            write: writes the rows and their record to the output in another form.

        Raises:
            ValueError: a row is not finite in the dtype of the file.
        """
        self._mark()
        if missing := self.missing():
            name = self.rows.dtype
            raise ValueError(f"row {missing[0]} is NaN or Inf in {name}: choose --precision float32")
        if write is not None:
            with files.replacing(self.output) as aside, open(aside, "wb") as file:
                write(file, self.rows, self.record)
            self.path.unlink()
            return
        # a copy: what is mapped behind the end of a file must not be read
        self._is_there = np.array(self._is_there)
        self._file.truncate(self._whole)
        os.fsync(self._file.fileno())
        os.replace(self.path, self.output)

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            if kind is not None and self.path.exists():  # else it was renamed
                self._keep(kind)
        finally:
            with suppress(OSError):  # by itself: the mappings hold the file open
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()

    def _keep(self, kind: type[BaseException]) -> None:
        self._mark()
        kept = f"{len(self)} of {len(self.rows)} rows are in {self.path}, and the same command goes on there"
        if not len(self):
            self.path.unlink(missing_ok=True)
        elif kind is KeyboardInterrupt:
            raise KeyboardInterrupt(kept)
        else:
            process.say(f"note: {kept}")

    def _locked_file(self) -> IO[bytes]:
        while True:
            file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FileExistsError(f"another process writes {self.path}: wait until it ends") from error
            except OSError:  # not every file system has locks
                return file
            if files.is_at(file, self.path):
                return file
            file.close()  # renamed or removed before it was locked

    def _read(self, place: int, num_bytes: int) -> bytes:
        return os.pread(self._file.fileno(), num_bytes, place)

    def _make(self, head: bytes, tail: bytes, size: int) -> None:
        handle = self._file.fileno()
        try:
            os.truncate(handle, 0)
            free = shutil.disk_usage(self.path.parent).free
            if size > free:
                raise OSError(f"it needs {options.size(size)}, {options.size(free)} are free there")
            os.truncate(handle, size)
            files.reserve(handle, size)
            files.write_all(handle, tail, self._tail_at)
            os.fsync(handle)
            files.write_all(handle, head, 0)  # last: it says that the file is made
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise

    def _mark(self) -> None:
        """Let the rows count that have arrived and are finite, once they are on the disk."""
        indices, self._arrived, self._marked = np.array(self._arrived, dtype=int), [], time.monotonic()
        if len(indices) and self._dtype not in (names := self.record.dtype.split(", ")):
            names = [name for name in _DTYPES if name in (*names, self._dtype)]
            self.record = dataclasses.replace(self.record, dtype=", ".join(names))
            # before a row of that dtype counts
            os.pwrite(self._file.fileno(), _tail(self.record), self._tail_at)
            os.fsync(self._file.fileno())
        self.rows.flush()
        sums = self.rows[indices].sum(axis=1, dtype=np.float32)
        self._is_there[indices[np.isfinite(sums)]] = 1


def _head(shape: tuple[int, int], dtype: str) -> bytes:
    head = io.BytesIO()
    kind = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(head, {"descr": kind, "fortran_order": False, "shape": shape})
    return head.getvalue()


def _in_any_dtypes(record: Record) -> list[Record]:
    """The record with each set of dtypes in which rows may have been made, that of all at the end."""
    sets = (names for n in range(len(_DTYPES)) for names in itertools.combinations(_DTYPES, n + 1))
    return [dataclasses.replace(record, dtype=", ".join(names)) for names in sets]


def _tail(record: Record) -> bytes:
    """The record, as long for one dtype as for all."""
    longest = json.dumps(dataclasses.asdict(_in_any_dtypes(record)[-1]))
    tail = io.BytesIO()
    write_record(tail, record, min_bytes=len(longest))
    return tail.getvalue()
