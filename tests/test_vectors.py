"""Vectors in a file with their record, and one test per file that is none."""

import io
import pickle
import random
import re
import zipfile

import numpy as np
import pytest

from nvembed_fast.vectors import Record, read_vectors, write_vectors

RECORD = Record("m", "f" * 32, "t" * 32, "Instruct: caf\u00e9\nQuery: ", 512, "float16")
VECTORS = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
WAY_OUT = "make it anew with nvembed-fast encode FILE -o OUT.npy"


def written(vectors=VECTORS, record=RECORD) -> bytes:
    file = io.BytesIO()
    write_vectors(file, vectors, record)
    return file.getvalue()


def saved(array, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def headed(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "a")
    return file.getvalue()


def archived() -> bytes:
    file = io.BytesIO()
    np.savez(file, VECTORS)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["<f4", "<f2", ">f2", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_file_gives_back_its_vectors_and_their_record(tmp_path, dtype, order):
    vectors = VECTORS.astype(dtype, order=order)
    (tmp_path / "x.npy").write_bytes(written(vectors))
    got, record = read_vectors(tmp_path / "x.npy")
    np.testing.assert_array_equal(got, vectors)
    # torch takes no other byte order
    assert got.dtype == vectors.dtype.newbyteorder("=") and got.dtype.isnative and record == RECORD
    # everyone else sees the vectors
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), vectors)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy", mmap_mode="r"), vectors)


def test_vectors_stay_in_their_file(tmp_path):
    """A search looks at so many that a copy would fill the memory."""
    (tmp_path / "x.npy").write_bytes(written())
    got, _ = read_vectors(tmp_path / "x.npy")
    assert isinstance(got, np.memmap)


def test_a_file_of_numpy_has_no_record(tmp_path):
    np.save(tmp_path / "x.npy", VECTORS)
    got, record = read_vectors(tmp_path / "x.npy")
    np.testing.assert_array_equal(got, VECTORS)
    assert record is None


NAN = VECTORS.copy()
NAN[2, 1], NAN[3, 0] = np.nan, np.inf


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"a text", "is no .npy array made by nvembed-fast encode"),
        (zipped(), "is a zip archive, as .npz files are"),
        (archived(), "is a zip archive, as .npz files are"),
        (pickle.dumps([1.0]), "is a pickle, which can run code"),
        (b"\x1f\x8b\x08", "is compressed by gzip"),
        (saved(VECTORS)[:50], "has a broken header"),
        (saved(VECTORS).replace(b"'<f4'", b"'<f4 "), "has a broken header"),
        (b"\x93NUMPY\x09\x00", "has a broken header"),
        (headed("(" * 200), "has a broken header"),
        (headed("-" * 9000 + "1"), "has a broken header"),
        (headed("{'descr': ('<f4',), 'fortran_order': False, 'shape': (4, 64), }"), "has a broken header"),
        (headed("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 64), }"), "has shape (-1, 64)"),
        (headed("{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000, 64), }"), "is cut short"),
        (saved(np.array([{}, "a"]), allow_pickle=True), "holds Python objects, which can run code"),
        (saved(np.array(["a"])), "holds <U1, and vectors are float16, float32, float64, int8 or uint8"),
        (saved(VECTORS.astype(np.int64)), "holds int64, and vectors are"),
        (saved(VECTORS.astype(np.complex64)), "holds complex64, and vectors are"),
        (saved(VECTORS[0]), "has shape (3,), and vectors have [texts, width]"),
        (saved(VECTORS[:0]), "has shape (0, 3), and vectors have [texts, width]"),
        (saved(NAN), "vector 2 and 1 more is NaN or Inf"),
        (written()[:-1], "holds more than vectors, and that is no record of them"),
        (saved(VECTORS) + b"more", "holds more than vectors, and that is no record of them"),
        (saved(VECTORS) + saved(VECTORS), "holds more than vectors, and that is no record of them"),
        (written().replace(b'"dtype"', b'"btype"'), "holds more than vectors, and that is no record of them"),
    ],
)
def test_files_that_hold_no_vectors(tmp_path, content, message):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.npy:? {re.escape(message)}") as error:
        read_vectors(tmp_path / "x.npy")
    assert str(error.value).endswith((WAY_OUT, "are there. Fetch it again"))


def test_a_file_that_is_not_there_or_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*x\.npy: make it with nvembed-fast encode FILE"):
        read_vectors(tmp_path / "x.npy")
    with pytest.raises(OSError, match=f"^cannot read {tmp_path}: Is a directory$"):
        read_vectors(tmp_path)


@pytest.mark.filterwarnings("ignore")  # numpy's, on headers that look like Python 2's
@pytest.mark.parametrize("tries", [100, pytest.param(5_000, marks=pytest.mark.long)])
def test_a_damaged_file_is_read_or_refused_by_name(tmp_path, tries):
    draw, whole = random.Random(tries), written()
    refused = 0
    for _ in range(tries):
        damaged = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.2 else whole)
        for _ in range(min(len(damaged), draw.randint(1, 4))):
            new = draw.choice([draw.randrange(256), *b"'{}[](),:\\#\n \t0-x"])
            damaged[draw.randrange(len(damaged))] = new
        (tmp_path / "x.npy").write_bytes(damaged)
        try:
            read_vectors(tmp_path / "x.npy")
        except ValueError as error:
            assert "x.npy" in str(error)
            refused += 1
    assert refused > tries / 4
