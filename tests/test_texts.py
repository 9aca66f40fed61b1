"""Texts out of a file: where one ends, and one test per error. tests/test_cli.py reads whole files."""

import io
import sys

import pytest

from nvembed_fast.texts import read_texts


def test_only_a_line_feed_ends_a_text(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("\ufeffa\u2028b\rc\r\n\n d \n", encoding="utf-8", newline="")
    assert read_texts(str(file)) == ["a\u2028b\rc", "", " d "]


@pytest.mark.parametrize(
    "name, content, field, message",
    [
        ("x.txt", b"", None, r"x\.txt holds no text"),
        ("x.jsonl", b"\n\n", None, r"x\.jsonl holds no text"),
        ("x.txt", b"a\n\xff", None, r"x\.txt is not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{', None, r"x\.jsonl, line 2: not JSON"),
        ("x.jsonl", b'{"body": "a"}', None, r"line 1: no 'text', the line has 'body'; choose with --field"),
        ("x.txt", b"\n[1]", "body", r"line 2: no 'body', the line is no JSON object"),
        ("x.txt", b'{"body": 3}', "body", r"line 1: 'body' must be a string, got int"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, field, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(str(tmp_path / name), field)


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match=r"no text file absent\.txt; - reads standard input"):
        read_texts("absent.txt")


def test_standard_input_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(ValueError, match="standard input is not UTF-8"):
        read_texts("-")
