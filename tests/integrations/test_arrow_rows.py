"""Rows of Arrow and Parquet files are those of the same JSON lines."""

import json
import subprocess
import sys

import datasets
import pyarrow
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
    pyarrow.parquet.write_table(table, folder / "x.parquet", row_group_size=100)
    datasets.Dataset.from_list(RECORDS).save_to_disk(folder / "saved")
    return folder


@pytest.mark.parametrize("name", ["x.arrow", "x.parquet", "saved/data-00000-of-00001.arrow"])
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


def test_a_parquet_file_is_not_read_into_memory(tmp_path):
    """The process grows by less than a tenth of the table."""
    text = "x" * 1000
    with pyarrow.parquet.ParquetWriter(
        tmp_path / "x.parquet",
        pyarrow.schema({"query": pyarrow.string(), "pos": pyarrow.string()}),
        use_dictionary=False,
    ) as writer:
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
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "x.parquet"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 80e6, f"{int(run.stdout) / 1e6} MB of a table of 400 MB"
