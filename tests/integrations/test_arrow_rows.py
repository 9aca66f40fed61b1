"""Rows of Arrow and Parquet files are those of the same JSON lines."""

import json
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from nvembed_fast.training.rows import open_rows

RECORDS = [
    {"query": f"q{i}", "pos": [f"p{i}"], "neg": [f"n{j}" for j in range(i % 3)] or None} for i in range(300)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    table = pyarrow.Table.from_pylist(RECORDS)
    with pyarrow.ipc.new_file(folder / "x.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=64)
    zstd = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(folder / "stream.arrow", table.schema, options=zstd) as writer:
        writer.write_table(table, max_chunksize=64)
    pyarrow.feather.write_feather(table, folder / "x.feather")
    pyarrow.parquet.write_table(table, folder / "x.parquet", row_group_size=100)
    datasets.Dataset.from_list(RECORDS).save_to_disk(folder / "saved")
    return folder


@pytest.mark.parametrize(
    "name", ["x.arrow", "x.parquet", "x.feather", "stream.arrow", "saved/data-00000-of-00001.arrow"]
)
def test_rows_are_those_of_json_lines(name, folder):
    rows, wanted = open_rows(folder / name), open_rows(folder / "x.jsonl")
    assert len(rows) == 300 and len(list(rows.records())) == 300
    assert [rows.row(i) for i in (299, 0, 64, 101)] == [wanted.row(i) for i in (299, 0, 64, 101)]
    assert open_rows(folder / name).fingerprint == rows.fingerprint != wanted.fingerprint
    with pytest.raises(IndexError, match="has 300 rows"):
        rows.row(300)


def test_a_bad_row_is_named(folder):
    table = pyarrow.Table.from_pylist([RECORDS[0], RECORDS[1] | {"pos": [""]}])
    pyarrow.parquet.write_table(table, folder / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad\.parquet, row 2: 'pos'\[0\] is empty"):
        open_rows(folder / "bad.parquet").row(1)
    for suffix in ("arrow", "parquet"):
        (folder / f"none.{suffix}").write_bytes(b"ARROW1 but not really")
        with pytest.raises(ValueError, match=rf"none\.{suffix} is no readable table"):
            open_rows(folder / f"none.{suffix}")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather"])
def test_a_file_is_not_read_into_memory(tmp_path, kind):
    """The process grows by less than a fifth of the table. Feather is compressed, as pyarrow writes it."""
    text, file = "x" * 1000, tmp_path / f"x.{kind}"
    schema = pyarrow.schema({"query": pyarrow.string(), "pos": pyarrow.string()})
    if kind == "parquet":
        writer = pyarrow.parquet.ParquetWriter(file, schema, use_dictionary=False)
    else:
        compression = "lz4" if kind == "feather" else None
        options = pyarrow.ipc.IpcWriteOptions(compression=compression)
        writer = pyarrow.ipc.new_file(file, schema, options=options)
    with writer:
        for start in range(0, 200_000, 1000):
            columns = {k: [f"{k}{i}{text}" for i in range(start, start + 1000)] for k in ("query", "pos")}
            writer.write_table(pyarrow.table(columns))
    code = """if True:
        import resource, sys, pyarrow.parquet
        from nvembed_fast.training.rows import open_rows
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        before = peak()
        rows = open_rows(sys.argv[1])
        assert rows.row(150_000).query.startswith("query150000x")
        print(peak() - before)
    """
    run = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 80e6, f"{int(run.stdout) / 1e6} MB of a table of 400 MB"
