"""Texts out of a file: every format and where a text ends, and one test per error."""

import csv
import gzip
import io
import json
import sys

import pytest

from nvembed_fast.texts import read_records, read_texts

TEXTS = ["a judo throw", "", 'two\nlines, and "quotes"', "caf\u00e9\t\u2028"]


def gzipped(content: bytes) -> bytes:
    # without the time, which would change the tests' names
    return gzip.compress(content, mtime=0)


def rows(delimiter: str) -> bytes:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([("id", "body"), *enumerate(TEXTS)])
    return file.getvalue().encode()


RECORDS = [{"id": i, "body": text} for i, text in enumerate(TEXTS)]
FILES = {
    "x.jsonl": "\n\n".join(map(json.dumps, RECORDS)).encode(),
    "x.JSONL": "\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS).encode(),
    "x.ndjson": "\r\n".join(map(json.dumps, RECORDS)).encode(),
    "x.json": json.dumps(RECORDS, indent=2).encode(),
    "x.csv": rows(","),
    "semicolons.csv": rows(";"),
    "tabs.csv": rows("\t"),
    "blank.csv": rows(",").replace(b"\r\n", b"\n\n", 1),
    "x.Tsv": rows("\t"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", FILES)
def test_the_suffix_tells_the_format(tmp_path, name, mark, packed):
    content = mark + FILES[name]
    file = tmp_path / (name + ".gz" * packed)
    file.write_bytes(gzipped(content) if packed else content)
    assert read_texts(str(file), "body") == TEXTS


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "name, format", [("x.jsonl", "jsonl"), ("x.json", "json"), ("x.csv", "csv"), ("x.Tsv", "tsv")]
)
def test_the_caller_tells_the_format(monkeypatch, name, format, packed):
    content = gzipped(FILES[name]) if packed else FILES[name]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert read_texts("-", "body", format) == TEXTS
    assert not sys.stdin.closed


def test_the_field_is_text_by_default_and_strings_need_none(tmp_path):
    for name, content in {
        "a.jsonl": '{"text": "a"}\n"b"\n',
        "a.json": '["a", {"text": "b"}]',
        "a.csv": "text,id\na,1\nb,2\n",
        "a.txt.gz": "a\nb",
    }.items():
        (tmp_path / name).write_text(content)
        assert read_texts(str(tmp_path / name)) == ["a", "b"], name


def test_only_a_line_feed_ends_a_text(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("\ufeffa\u2028b\rc\r\n\n d \n", encoding="utf-8", newline="")
    assert read_texts(str(file)) == ["a\u2028b\rc", "", " d "]


def test_a_field_may_be_larger_than_the_csv_module_likes(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "x.csv").write_text("text\n" + "a" * (before + 1))
    assert [len(text) for text in read_texts(str(tmp_path / "x.csv"))] == [before + 1]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("first", ['{"text": "a"}', '[{"text": "a"}]', "[", "[{", '["a"]'])
def test_lines_of_json_are_not_embedded_as_they_are_unasked(tmp_path, first):
    file = tmp_path / "x.txt"
    file.write_text(f"\n{first}\n")
    kind = "jsonl" if first.startswith("{") else "json"
    with pytest.raises(ValueError, match=f"--format {kind}, or every line as it is by --format text"):
        read_texts(str(file))
    assert read_texts(str(file), format="text") == ["", first]
    file.write_text("[1] a footnote\n{braces}\n[1]\n")
    assert len(read_texts(str(file))) == 3


@pytest.mark.parametrize(
    "name, content, field, message",
    [
        ("x.txt", b"", None, r"x\.txt holds no text"),
        ("x.jsonl", b"\n\n", None, r"x\.jsonl holds no text"),
        ("x.json", b"\n", None, r"x\.json holds no text"),
        ("x.json", b"[]", None, r"x\.json holds no text"),
        ("x.csv", b"text\n", None, r"x\.csv holds no text"),
        ("x.csv", b"", None, r"x\.csv holds no text"),
        ("x.gz", gzipped(b""), None, r"x\.gz holds no text"),
        ("x.txt", b"a\n\xff", None, r"x\.txt is not UTF-8: byte 1 of line 2 is 0xff.*iconv -f WINDOWS-1252"),
        ("x.csv", b"text\ncaf\xe9", None, r"x\.csv is not UTF-8: byte 4 of line 2 is 0xe9"),
        ("x.txt", "a".encode("utf-16"), None, r"has a NUL\. It is UTF-16\. Convert it: iconv -f UTF-16"),
        ("x.txt", "a".encode("utf-16-le"), None, r"no text: line 1 has a NUL\. If it is UTF-16, convert it"),
        ("x.txt", b"PK\x03\x04\x14\x00", None, r"has a NUL\. It is a zip archive, as \.xlsx files are"),
        ("x.zst", b"\x28\xb5\x2f\xfd\x04\x00", None, r"It is compressed by zstd\. Decompress it: zstd -dc"),
        ("x.gz", gzipped(b"a\n" * 9)[:-9], None, r"x\.gz: its gzip stream is cut short or damaged"),
        ("x.gz", gzipped(b"a")[:10] + b"\xff" * 9, None, r"cut short or damaged behind line 0"),
        ("x.gz", gzipped(b"a") + b"more", None, r"gzip stream is cut short or damaged"),
        ("x.jsonl", b'{"text": "a"}\n{', None, r"x\.jsonl, line 2: not JSON"),
        ("x.txt", b"one\ntwo\n", "body", r"line 1: not JSON .*; a field is read from JSON lines: choose "),
        ("x.jsonl", b'{"body": "a"}\n{', "body", r"line 2: not JSON \(.*\)$"),
        ("x.jsonl", b"[" * 100_000, None, r"x\.jsonl, line 1: its JSON is nested too deeply to be read"),
        ("x.json", b'{"text":' * 100_000, None, r"x\.json: its JSON is nested too deeply to be read"),
        ("x.jsonl", b'{"body": "a"}', None, r"line 1: no 'text', the line has 'body'; choose with --field"),
        ("x.jsonl", b"{}", None, r"line 1: no 'text', the line has none; choose with --field"),
        ("x.txt", b"\n[1]", "body", r"line 2: no 'body', the line is no JSON object but an array"),
        ("x.txt", b'"a"', "body", r"line 1: no 'body', the line is no JSON object but a string"),
        ("x.txt", b'{"body": 3}', "body", r"line 1: 'body' must be a string, got int"),
        ("x.jsonl", b'{"text": null}', None, r"line 1: 'text' must be a string, got null"),
        ("x.jsonl", b'{"text": "\\ud800"}', None, r"line 1: 'text' has a lone surrogate, \\ud800, which"),
        ("x.json", b'["a", ["b"]]', None, r"item 2: no 'text', the item is no JSON object but an array"),
        ("x.json", b'[{"text": ["b"]}]', None, r"x\.json, item 1: 'text' must be a string, got an array"),
        ("x.json", b'{"data": []}', None, r"x\.json must be an array of objects or strings, got an object"),
        ("x.json", b'{"text": "a"}\n{"text": "b"}', None, r"JSON \(Extra.*; --format jsonl reads JSON lines"),
        ("x.csv", b"id,body\n1,a", None, r"line 1: no 'text', the header has 'id', 'body'; choose with"),
        ("x.csv", b"id,text\n1,a", "", r"line 1: no '', the header has 'id', 'text'; choose with"),
        ("x.csv", b"first text\n", None, r"has 'first text'; .* --field, or read lines by --format text"),
        ("x.csv", b"text,text\na,b", None, r"x\.csv, line 1: the header has 'text' 2 times"),
        ("x.csv", b'text,id\n"a\nb",1\nc, d,2', None, r"line 4: must have 2 fields like the header, got 3"),
        ("x.tsv", b"text\tid\na", None, r"line 2: must have 2 fields like the header, got 1: quote"),
        ("x.csv", b'text\na\n"b\nc\n', None, r"csv, the row from line 3: not CSV \(unexpected end of data\)"),
        ("x.csv", b"text\na\rb\n", None, r"not CSV \(new-line .* unquoted field\): quote a field"),
        ("x.tsv", b'text\n"a" b\n', None, r"x\.tsv, the row from line 2: not TSV"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, name, content, field, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(str(tmp_path / name), field)


def test_a_large_record_makes_no_large_message(tmp_path):
    (tmp_path / "x.csv").write_text(",".join(["a" * 100_000] * 100))
    with pytest.raises(ValueError, match="no 'text', the header has 'aaa.* and 91 more; choose") as error:
        read_texts(str(tmp_path / "x.csv"))
    assert len(str(error.value)) < 1000


def test_a_file_that_is_not_there_or_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"no text file absent\.txt; - reads standard input"):
        read_texts("absent.txt")
    with pytest.raises(OSError, match=f"^cannot read {tmp_path}: Is a directory$"):
        read_texts(str(tmp_path))


def test_formats_that_do_not_fit():
    with pytest.raises(ValueError, match="format must be one of text, jsonl, json, csv, tsv, got 'xml'"):
        read_texts("x.xml", format="xml")
    with pytest.raises(ValueError, match="lines of text have no field 'body': choose another format, or no"):
        read_texts("x.txt", "body", "text")


def test_standard_input_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(ValueError, match="standard input is not UTF-8"):
        read_texts("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="standard input is closed: pass a file"):
        read_texts("-")


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.jsonl", '{"_id": "d1", "text": "a"}\n\n{"text": "b", "_id": 7}\n'),
        ("x.json", '[{"_id": "d1", "text": "a"}, {"text": "b", "_id": 7}]'),
        ("x.csv", "text,_id\na,d1\n\nb,7\n"),
        ("x.tsv", "other\t_id\ttext\n0\td1\ta\n0\t7\tb\n"),
        ("x", '{"_id": "d1", "text": "a"}\n{"text": "b", "_id": 7}\n'),
    ],
)
def test_ids_come_with_their_texts(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_records(str(tmp_path / name), ids="_id") == (["a", "b"], ["d1", "7"])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", '{"text": "a"}', r"line 1: no '_id', the line has 'text'; choose with --ids"),
        ("x.jsonl", '{"text": "a", "_id": true}', r"line 1: '_id' must be a string or an integer, got bool"),
        (
            "x.jsonl",
            '{"text": "a", "_id": "a\\nb"}',
            r"line 1: '_id' must be printable characters in one line",
        ),
        ("x.json", '[{"text": "a", "_id": ""}]', r"item 1: '_id' must be printable characters"),
        ("x.json", '["a"]', r"item 1: no '_id', the item is no JSON object but a string"),
        ("x.csv", "text,id\na,1\n", r"line 1: no '_id', the header has 'text', 'id'; choose with --ids"),
    ],
)
def test_ids_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_records(str(tmp_path / name), ids="_id")


def test_lines_of_text_have_no_ids(tmp_path):
    (tmp_path / "x").write_text("a")
    with pytest.raises(ValueError, match="lines of text have no field '_id'"):
        read_records(str(tmp_path / "x"), format="text", ids="_id")


def test_a_file_that_does_not_fit_in_memory_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError

    (tmp_path / "x.txt").write_text("a")
    monkeypatch.setattr("nvembed_fast.texts._lines", full)
    with pytest.raises(MemoryError, match=r"x\.txt does not fit in memory"):
        read_texts(str(tmp_path / "x.txt"))
