"""Rows of a file by their number: any chunk length, bounded memory, and one test per error."""

import gzip
import json
import sys
import threading
import tracemalloc

import pytest

from nvembed_fast.training import rows as module
from nvembed_fast.training.rows import JsonRows, Labelled, Row, open_rows

# a bare checkout of a machine with a GPU may lack it
hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

GOOD = {"query": "a", "pos": ["b"], "neg": ["c", "d"]}


def write(path, *lines) -> str:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_both_forms_of_a_list_and_the_scores_of_a_teacher(tmp_path):
    file = write(
        tmp_path / "x.jsonl",
        "\ufeff",
        {"query": "a", "pos": "b"},
        GOOD | {"pos_scores": [0.5], "neg_scores": [1, 0.25], "id": 7},
        {"query": "caf\u00e9\u2028", "pos": ["p", "q"], "neg": None},
        {"query": "a", "pos": ["a", "b", "a", "c"], "pos_scores": [4, 1, 3, 2]},
    )
    rows = open_rows(file)
    assert [rows.row(i) for i in range(len(rows))] == [
        Row("a", ("b",)),
        Row("a", ("b",), ("c", "d"), (0.5,), (1.0, 0.25)),
        Row("caf\u00e9\u2028", ("p", "q")),
        Row("a", ("b", "c"), (), (1.0, 2.0)),  # without those that equal the query
    ]
    assert write(tmp_path / "y.jsonl", {"text": "t", "label": 3}) and open_rows(
        tmp_path / "y.jsonl"
    ).labelled(0) == Labelled("t", "3")


@hypothesis.given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.booleans(), st.integers(1, 64))
@hypothesis.settings(max_examples=50, deadline=None)
def test_every_line_is_found_whatever_the_chunks(tmp_path_factory, lengths, ends, chunk_bytes):
    file = tmp_path_factory.mktemp("rows") / "x.jsonl"
    lines = [json.dumps(str(i) + "x" * length) for i, length in enumerate(lengths)]
    file.write_text("\n".join(lines) + "\n\n" * ends)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
        patch.setattr(module, "MAX_ENTRIES", 4)
        rows = JsonRows(file)
        assert len(rows) == len(lines) and len(rows._lines) <= 4
        assert [rows.record(i) for i in reversed(range(len(rows)))] == list(map(json.loads, lines))[::-1]
        assert list(rows.records()) == list(map(json.loads, lines))


def test_memory_stays_the_same_at_ten_times_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_BYTES", 256)
    monkeypatch.setattr(module, "MAX_ENTRIES", 64)
    sizes, peaks = [], []
    for number in (2000, 20_000):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("".join(f'"{i:020d}"\n' for i in range(number)))
        tracemalloc.start()
        rows = JsonRows(file)
        assert len(rows) == number and rows.record(number - 7) == f"{number - 7:020d}"
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(len(rows._lines))
    assert min(sizes) >= 32 and max(sizes) <= 64, sizes
    # the chunks are longer by the factor that the index does not grow
    assert peaks[1] < peaks[0] + 64_000, peaks


def test_threads_read_the_same_rows(tmp_path):
    file = write(tmp_path / "x.jsonl", *({"query": f"q{i}", "pos": f"p{i}"} for i in range(200)))
    rows, wrong = open_rows(file), []

    def read(start):
        wrong.extend(i for i in range(start, 200, 3) if rows.row(i).query != f"q{i}")

    threads = [threading.Thread(target=read, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    first = open_rows(write(tmp_path / "x.jsonl", GOOD, GOOD)).fingerprint
    assert open_rows(write(tmp_path / "y.jsonl", GOOD, GOOD)).fingerprint == first
    assert open_rows(write(tmp_path / "z.jsonl", GOOD, GOOD | {"id": 1})).fingerprint != first


BAD = {
    '{"query": "a", "pos"': "not JSON",
    "[" * 100_000: "nested too deeply",
    '["a"]': "must be an object with 'query', got an array",
    '{"pos": ["b"]}': "no 'query', the row has 'pos'",
    '{"query": "a", "positive": ["b"]}': "no 'pos', the row has 'query', 'positive'",
    '{"query": "a", "pos": []}': "'pos' is empty",
    '{"query": "a", "pos": null}': "'pos' is empty",
    '{"query": "a", "pos": [" "]}': r"'pos'\[0\] is empty",
    '{"query": "", "pos": ["b"]}': "'query' is empty",
    '{"query": 1, "pos": ["b"]}': "'query' must be a string, got int",
    '{"query": "a", "pos": {"b": 1}}': "'pos' must be a list of strings, got an object",
    '{"query": "a", "pos": ["b", null]}': r"'pos'\[1\] must be a string, got null",
    '{"query": "a", "pos": ["b"], "neg": [3]}': r"'neg'\[0\] must be a string, got int",
    '{"query": "a", "pos": ["a"]}': "the only positive equals the query",
    '{"query": "a", "pos": ["\\ud83d"]}': r"'pos'\[0\] has a lone surrogate, \\ud83d",
    '{"query": "a", "pos": ["b"], "pos_scores": [1, 2]}': "'pos_scores' must be 1 numbers, .* got 2 of them",
    '{"query": "a", "pos": ["b"], "pos_scores": 1}': "'pos_scores' must be 1 numbers, .* got int",
    '{"query": "a", "pos": ["b"], "pos_scores": [NaN]}': "'pos_scores' must be finite numbers, got nan",
    '{"query": "a", "pos": ["b"], "pos_scores": [true]}': "'pos_scores' must be finite numbers, got True",
    '{"query": "a", "pos": ["b"], "prompt": 3}': "'prompt' must be a string, got int",
    '{"text": "a", "label": "x"}': "say how it is used, by labels",
    " ": "is blank",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:40])
def test_a_bad_line_is_named(line, tmp_path):
    file = write(tmp_path / "x.jsonl", GOOD, line + "\n", GOOD)
    rows = open_rows(file)
    assert len(rows) == 3 and rows.row(0) == rows.row(2)
    with pytest.raises(ValueError, match=f"x.jsonl, line 2:? .*{BAD[line]}") as error:
        rows.row(1)
    assert str(error.value).count("\n") == 0 and len(str(error.value)) < 400


def test_a_row_without_its_label_is_named(tmp_path):
    rows = open_rows(write(tmp_path / "x.jsonl", GOOD, {"text": "t", "label": None}))
    with pytest.raises(ValueError, match="line 1: no 'text'"):
        rows.labelled(0)
    with pytest.raises(ValueError, match="line 2: 'label' must be a string, got null"):
        rows.labelled(1)


def test_files_that_are_none(tmp_path):
    (tmp_path / "utf16.jsonl").write_bytes(b'{"query": "\xe9", "pos": "b"}\n')
    with pytest.raises(ValueError, match="utf16.jsonl, line 1 is not UTF-8: byte 12 is 0xe9"):
        open_rows(tmp_path / "utf16.jsonl").row(0)
    with pytest.raises(ValueError, match="is no file"):
        open_rows(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="empty.jsonl holds no row"):
        open_rows(tmp_path / "empty.jsonl")
    rows = open_rows(write(tmp_path / "x.jsonl", GOOD))
    with pytest.raises(IndexError, match="has 1 rows, and no row 1"):
        rows.row(1)
    with pytest.raises(IndexError):
        rows.row(-1)
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(ValueError, match="became shorter"):
        rows.row(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b'{"query": "a", "pos": "b"}\n'), "compressed by gzip. Decompress it: gzip -d"),
        (b"\x28\xb5\x2f\xfd", "compressed by zstd. Decompress it"),
        ('{"query": "a"}\n'.encode("utf-16"), "UTF-16. Convert it"),
    ],
    ids=["gzip", "zstd", "utf-16"],
)
def test_a_file_of_another_kind_is_told_when_it_is_opened(content, message, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.jsonl holds no JSON lines\. It is {message}"):
        open_rows(tmp_path / "x.jsonl")


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ImportError, match=r"x\.parquet needs pyarrow: pip install 'nvembed-fast\[train\]', or"
    ):
        open_rows(tmp_path / "x.parquet")
