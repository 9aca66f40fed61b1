"""The command encode: where texts come from and where vectors go, and what is left when that goes wrong."""

import io
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tiny_decoders import write_mistral

from nvembed_fast import NVEmbed, cli
from nvembed_fast.cli import process
from nvembed_fast.vectors import read_vectors

TEXTS = ["a judo throw", "", "parse a date", "tabs\tand caf\u00e9"]


@pytest.fixture
def texts_file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def loaded(tiny_directory):
    return NVEmbed.from_pretrained(tiny_directory)


@pytest.fixture
def model(loaded, monkeypatch):
    """The model of every command, loaded once."""
    monkeypatch.setattr(NVEmbed, "from_pretrained", lambda *_, **__: loaded)
    return loaded


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(a) for a in arguments])
    return status, *capsys.readouterr()


def test_an_output_that_is_no_file_is_told_before_anything_is_read(model, tmp_path, capsys):
    (tmp_path / "folder.npy").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.npy").symlink_to("pipe")
    for name, kind in {"folder.npy": "a directory", "link.npy": "a device or a pipe"}.items():
        status, _, error = run(capsys, "encode", "absent.txt", "-o", tmp_path / name)
        assert status == 1 and f"--output is {kind}: {tmp_path / name}" in error
    assert (tmp_path / "pipe").is_fifo()


def test_a_text_is_an_argument(model, tmp_path, capsys):
    out = tmp_path / "o.npy"
    text, other = "how do I parse a date?", "judo"
    wanted = model.encode([text, other], output="numpy")
    arguments = ("-o", out)
    status, printed, error = run(capsys, "encode", text, *arguments)
    assert status == 0 and f"note: {text!r} is no file, and is embedded as a text" in error
    np.testing.assert_allclose(np.load(out), wanted[:1], atol=1e-6)
    status, _, error = run(capsys, "encode", "--text", text, "--text", other, *arguments)
    assert status == 0 and error == ""
    np.testing.assert_allclose(np.load(out), wanted, atol=1e-6)


def test_an_array_goes_to_standard_output_and_its_line_to_standard_error(
    model, texts_file, capfdbinary, monkeypatch
):
    arguments = ["encode", str(texts_file), "-o", "-"]
    assert cli.main([*arguments, "--precision", "float16"]) == 0
    printed, error = capfdbinary.readouterr()
    vectors = np.load(io.BytesIO(printed))
    assert vectors.dtype == np.float16 and b"standard output: float16 [4, 64]" in error
    wanted = model.encode(TEXTS, output="numpy")
    np.testing.assert_array_equal(vectors, wanted.astype(np.float16))
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True, raising=False)
    assert cli.main(arguments) == 1
    assert b"-o - writes the bytes of an array: send them on" in capfdbinary.readouterr().err


def test_a_pipe_whose_reader_has_gone_is_known_as_such():
    code = """
import sys
import numpy as np
from nvembed_fast.vectors import Record, write_vectors
try:
    write_vectors(sys.stdout.buffer, np.zeros((100_000, 64)), Record("", "", "", "", 8, ""))
except BrokenPipeError:
    sys.exit("gone")
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as writer:
        assert writer.stdout.read(10).startswith(b"\x93NUMPY")
        writer.stdout.close()
        assert writer.stderr.read() == b"gone\n"


def test_a_link_as_output_stays_and_its_file_is_replaced(model, texts_file, tmp_path, capsys):
    (tmp_path / "far").mkdir()
    (tmp_path / "o.npy").symlink_to("far/real.npy")
    status, *_ = run(capsys, "encode", texts_file, "-o", tmp_path / "o.npy")
    assert status == 0 and (tmp_path / "o.npy").is_symlink()
    assert len(np.load(tmp_path / "far" / "real.npy")) == 4
    assert [p.name for p in (tmp_path / "far").iterdir()] == ["real.npy"]


def test_an_interrupted_run_goes_on_where_it_was(model, texts_file, tmp_path, capsys, monkeypatch):
    out, part = tmp_path / "o.npy", tmp_path / "o.npy.partial"
    arguments = ("encode", texts_file, "-o", out, "--max-batch-tokens", 1)  # each text is a batch
    wanted, real = model.encode(TEXTS, output="numpy"), model.embed
    batches = []

    def embed(ids, *rest):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(ids)
        return real(ids, *rest)

    monkeypatch.setattr(NVEmbed, "embed", lambda _, *a: embed(*a))
    status, _, error = run(capsys, *arguments)
    assert status == 130 and error.endswith(
        f"interrupted; 2 of 4 rows are in {part}, and the same command goes on there\n"
    )
    assert "holds rows of another model, of other texts" in run(capsys, *arguments, "--max-length", 9)[2]
    monkeypatch.setattr(NVEmbed, "embed", lambda _, *a: batches.append(a[0]) or real(*a))
    status, _, error = run(capsys, *arguments)
    assert status == 0 and f"note: 2 of 4 rows are in {part} already" in error
    assert len(batches) == 4 and not part.exists()
    np.testing.assert_allclose(np.load(out), wanted, atol=1e-6)


def test_texts_that_overflow_in_float16_are_made_in_another_dtype(
    model, texts_file, tmp_path, capsys, monkeypatch
):
    out, real = tmp_path / "o.npy", model.embed
    arguments = ("encode", texts_file, "-o", out, "--max-batch-tokens", 1)  # each text is a batch

    def overflowing(_, ids, *rest):
        vectors = real(ids, *rest)
        return torch.full_like(vectors, torch.nan) if len(ids[0]) == longest else vectors

    longest = max(model.text_tokenizer(TEXTS, "", 4096).lengths())
    number = model.text_tokenizer(TEXTS, "", 4096).lengths().index(longest)
    with monkeypatch.context() as patch:
        patch.setattr(NVEmbed, "embed", overflowing)
        patch.setattr(NVEmbed, "dtype", torch.float16)
        for _ in range(2):  # the second run has that text alone
            status, _, error = run(capsys, *arguments)
            assert (
                status == 1 and f"the vector of text {number} (counted from 0) is NaN or Inf in flo" in error
            )
            assert "Load the model with --dtype bfloat16" in error and "note: 3 of 4 rows are in" in error
    status, _, error = run(capsys, *arguments)
    assert status == 0 and "note: they were made in float16, and the others are made in float32" in error
    vectors, record = read_vectors(out)
    assert record.dtype == "float16, float32"
    np.testing.assert_allclose(vectors, model.encode(TEXTS, output="numpy"), atol=1e-6)


def test_ids_are_written_beside_the_vectors_and_shown_by_search(model, tmp_path, capsys):
    corpus, out = tmp_path / "c.jsonl", tmp_path / "c.npy"
    corpus.write_text('{"_id": "d1", "text": "judo"}\n{"_id": 7, "text": "parse a date"}\n')
    assert run(capsys, "encode", corpus, "-o", out, "--ids", "_id")[0] == 0
    assert (tmp_path / "c.ids.txt").read_text() == "d1\n7\n"
    arguments = ("search", corpus, "judo", "--embeddings", out, "--ids", "_id", "--top", 2)
    printed = run(capsys, *arguments)[1]
    assert re.search(r"\d  d1  judo$", printed, re.M) and re.search(r"\d  7  parse a date$", printed, re.M)
    results = json.loads(run(capsys, *arguments, "--json")[1])["results"]
    assert {result["id"]: result["text"] for result in results} == {"d1": "judo", "7": "parse a date"}
    assert "--ids goes to OUT.ids.txt" in run(capsys, "encode", corpus, "-o", "-", "--ids", "_id")[2]
    assert "have no ids" in run(capsys, "encode", "--text", "a", "-o", out, "--ids", "_id")[2]


def test_without_a_terminal_a_line_tells_how_far_it_is(model, texts_file, tmp_path, capsys, monkeypatch):
    real = model.embed
    monkeypatch.setattr(process, "TELL_EVERY_S", 0.02)
    monkeypatch.setattr(NVEmbed, "embed", lambda _, *a: time.sleep(0.05) or real(*a))
    arguments = (texts_file, "-o", tmp_path / "o.npy", "--max-batch-tokens", 1)
    error = run(capsys, "encode", *arguments)[2]
    assert re.search(r"^[1-3] of 4 texts in 0 s, [\d.]+ texts/s on cpu$", error, re.M)


def test_an_interrupt_right_after_the_rename_says_that_the_file_was_written(
    model, texts_file, tmp_path, capsys, monkeypatch
):
    replace = os.replace

    def interrupted(*places):
        replace(*places)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    status, _, error = run(capsys, "encode", texts_file, "-o", tmp_path / "o.npy")
    assert (status, error.splitlines()[-1]) == (130, f"interrupted; {tmp_path / 'o.npy'} was written")
    assert len(np.load(tmp_path / "o.npy")) == 4


def test_an_interrupt_of_init_tells_whether_the_model_is_there(tmp_path, capsys, monkeypatch):
    arguments = ("init", write_mistral(tmp_path / "mistral"), "-o", tmp_path / "out", "--num-latents", 2)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nvembed_fast.new_model.init_model", interrupted)
        assert run(capsys, *arguments)[2].endswith("interrupted; nothing was written\n")
    monkeypatch.setattr("builtins.print", lambda *_, **k: None if k else interrupted())
    assert cli.main([str(a) for a in arguments]) == 130
    assert NVEmbed.from_pretrained(tmp_path / "out")
