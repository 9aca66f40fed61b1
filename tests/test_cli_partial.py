"""Rows of an interrupted run: what counts as there, and what the next run may take."""

import dataclasses
import errno
import os

import numpy as np
import pytest

from nvembed_fast.cli import partial
from nvembed_fast.cli.partial import Partial
from nvembed_fast.vectors import Record, read_vectors, write_vectors

RECORD = Record("m", "f", "t", "", 8, "float32")
ROWS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def opened(folder, record=RECORD, dtype="float32") -> Partial:
    return Partial(folder / "o.npy", ROWS.shape, dtype, record)


def write(rows: Partial, indices: list[int]) -> None:
    rows.rows[indices] = ROWS[indices]
    rows.arrived(indices)


def interrupted(folder, indices: list[int]) -> str:
    with pytest.raises(KeyboardInterrupt) as stop, opened(folder) as rows:
        write(rows, indices)
        raise KeyboardInterrupt
    return str(stop.value)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_in_any_order_become_the_array_with_its_record(tmp_path, dtype):
    with opened(tmp_path, dtype=dtype) as rows:
        for index in (3, 0, 4, 1, 2):
            write(rows, [index])
        rows.finish()
    vectors, record = read_vectors(tmp_path / "o.npy")
    assert vectors.dtype == dtype and record == RECORD
    np.testing.assert_array_equal(vectors, ROWS.astype(dtype))
    assert os.listdir(tmp_path) == ["o.npy"]


def test_the_next_run_makes_the_missing_rows(tmp_path):
    message = interrupted(tmp_path, [4, 1])
    assert message.startswith("2 of 5 rows are in ") and "goes on there" in message
    with opened(tmp_path) as rows:
        assert len(rows) == 2 and rows.missing() == [0, 2, 3]
        write(rows, rows.missing())
        rows.finish()
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), ROWS)


def test_without_a_row_nothing_is_left(tmp_path):
    assert interrupted(tmp_path, []) == "" and os.listdir(tmp_path) == []


def test_another_error_keeps_the_rows_and_says_so(tmp_path, capsys):
    with pytest.raises(OSError, match="cable"), opened(tmp_path) as rows:
        write(rows, [2])
        raise OSError("cable")
    assert "note: 1 of 5 rows are in" in capsys.readouterr().err
    with opened(tmp_path) as rows:
        assert len(rows) == 1


def test_rows_that_are_all_there_stay_where_the_disk_is_full(tmp_path, limited_files):
    interrupted(tmp_path, [0, 1, 2, 3, 4])
    path = tmp_path / "o.npy.partial"
    whole = path.stat().st_size - len(ROWS)
    os.truncate(path, whole)  # as a kill in `finish` leaves it
    with limited_files(whole + 2), pytest.raises(OSError, match=r"cannot write .*o\.npy: File too large"):
        opened(tmp_path)
    assert path.stat().st_size == whole
    with opened(tmp_path) as rows:
        assert len(rows) == len(ROWS)
        rows.finish()


def test_rows_count_only_when_they_are_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "MARK_EVERY_S", 0.0)
    with opened(tmp_path) as rows:
        counted, flush = [], rows.rows.flush
        rows.rows.flush = lambda: counted.append(len(rows)) or flush()
        write(rows, [0])
        write(rows, [1, 2])
        assert counted == [0, 1] and len(rows) == 3


@pytest.mark.parametrize("record", [RECORD, Record("m", "f", "u", "", 8, "float32")])
def test_rows_of_another_array_stay_untouched(tmp_path, record):
    interrupted(tmp_path, [0])
    before = (tmp_path / "o.npy.partial").read_bytes()
    with pytest.raises(FileExistsError, match=r"o\.npy\.partial holds rows of another model, of other texts"):
        opened(tmp_path, record, "float16" if record == RECORD else "float32")
    assert (tmp_path / "o.npy.partial").read_bytes() == before


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_of_two_dtypes_are_one_array_that_names_both(tmp_path, dtype):
    """What overflows in float16 is made in bfloat16."""
    half = dataclasses.replace(RECORD, dtype="float16")
    wide = dataclasses.replace(RECORD, dtype="bfloat16")
    with pytest.raises(ValueError, match="NaN"), opened(tmp_path, half, dtype) as rows:
        write(rows, [0, 1, 3, 4])
        raise ValueError("row 2 is NaN")
    with pytest.raises(KeyboardInterrupt), opened(tmp_path, wide, dtype) as rows:
        assert rows.missing() == [2] and rows.record == half
        raise KeyboardInterrupt
    with opened(tmp_path, wide, dtype) as rows:
        assert rows.record == half, "no row was made in bfloat16"
        write(rows, [2])
        rows.finish()
    vectors, record = read_vectors(tmp_path / "o.npy")
    assert record == dataclasses.replace(RECORD, dtype="float16, bfloat16")
    np.testing.assert_array_equal(vectors, ROWS.astype(dtype))


def test_another_form_is_written_with_the_dtypes_of_its_rows(tmp_path):
    interrupted(tmp_path, [0, 1])
    with opened(tmp_path, dataclasses.replace(RECORD, dtype="float64")) as rows:
        write(rows, rows.missing())
        rows.finish(write_vectors)
    assert read_vectors(tmp_path / "o.npy")[1].dtype == "float32, float64"


@pytest.mark.parametrize("end", ["renamed", "removed"])
def test_a_file_that_another_process_ends_before_it_is_locked_stays_untouched(tmp_path, monkeypatch, end):
    lock, ends = partial.fcntl.flock, []

    def late(file, how):
        if not ends:  # the other process, between open and lock
            ends.append(1)
            if end == "renamed":
                os.replace(tmp_path / "o.npy.partial", tmp_path / "o.npy")
            else:
                os.unlink(tmp_path / "o.npy.partial")
        lock(file, how)

    interrupted(tmp_path, [0])
    before = (tmp_path / "o.npy.partial").read_bytes()
    monkeypatch.setattr(partial.fcntl, "flock", late)
    with opened(tmp_path) as rows:
        assert len(rows) == 0
        assert os.path.samestat(os.fstat(rows._file.fileno()), os.stat(rows.path))
        if end == "renamed":
            assert (tmp_path / "o.npy").read_bytes() == before
        write(rows, rows.missing())
        rows.finish()
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), ROWS)


def test_another_file_of_that_name_stays_untouched(tmp_path):
    (tmp_path / "o.npy.partial").write_text("mine, and longer than eight bytes")
    with pytest.raises(FileExistsError, match="remove it, or choose another output"):
        opened(tmp_path)
    assert (tmp_path / "o.npy.partial").read_text().startswith("mine")


def test_a_row_that_is_not_finite_never_counts(tmp_path):
    with (
        opened(tmp_path, dtype="float16") as rows,
        pytest.raises(ValueError, match=r"row 1 is NaN or Inf in flo"),
    ):
        rows.rows[:] = 1
        rows.rows[1] = np.inf
        rows.arrived([0, 1, 2, 3, 4])
        rows.finish()
    assert not (tmp_path / "o.npy").exists()


def test_one_process_at_a_time(tmp_path):
    with (
        opened(tmp_path),
        pytest.raises(FileExistsError, match="another process writes .*: wait until it ends"),
    ):
        opened(tmp_path)


@pytest.mark.parametrize("moment", ["truncate", "posix_fallocate", "pwrite", "fsync", "replace"])
@pytest.mark.parametrize("side", ["before", "after"])
def test_a_killed_process_leaves_rows_that_count_or_none(tmp_path, moment, side):
    """A child dies at every call that changes the file. The next run ends with the same array."""
    calls = 0
    while True:
        calls += 1
        child = os.fork()
        if child == 0:
            try:
                _die(moment, side, calls)
                with opened(tmp_path) as rows:
                    write(rows, rows.missing())
                    rows.finish()
            finally:
                os._exit(0)
        died = os.waitpid(child, 0)[1] != 0
        assert died or calls > 1, f"{moment} was never called"
        if not (tmp_path / "o.npy").exists():
            with opened(tmp_path) as rows:
                assert moment != "replace" or rows.missing() == []
                write(rows, rows.missing())
                rows.finish()
        np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), ROWS)
        (tmp_path / "o.npy").unlink()
        if not died:
            return


@pytest.mark.parametrize("content, link", [(b"mine", False), (bytes(8) + b"mine", False), (b"", True)])
def test_a_file_that_holds_no_rows_stays_untouched(tmp_path, content, link):
    file = tmp_path / ("mine" if link else "o.npy.partial")
    file.write_bytes(content)
    if link:
        (tmp_path / "o.npy.partial").symlink_to(file)
    with pytest.raises(OSError, match=r"o\.npy\.partial"):
        opened(tmp_path)
    assert file.read_bytes() == content


def test_a_folder_whose_files_cannot_be_mapped_is_named(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(np, "memmap", refused)
    with pytest.raises(OSError, match=r"cannot write .*o\.npy: No such device"):
        opened(tmp_path)


def _die(name: str, side: str, number: int) -> None:
    real, calls = getattr(os, name), []

    def call(*arguments):
        calls.append(name)
        if side == "after":
            real(*arguments)
        if len(calls) == number:
            os._exit(9)
        return None if side == "after" else real(*arguments)

    setattr(os, name, call)
