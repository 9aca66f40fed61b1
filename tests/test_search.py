"""search --embeddings: vectors of other texts, another model or an instruction are never ranked unseen."""

import dataclasses
import io
import json
import sys

import numpy as np
import pytest
import torch
from tiny_checkpoint import QUERY, copy_tiny, edit_json, edit_weights
from tokenizers import Tokenizer, models, pre_tokenizers

from nvembed_fast import NVEmbed, cli
from nvembed_fast.tokenization import TextTokenizer
from nvembed_fast.vectors import read_vectors, write_vectors

TEXTS = ["a judo throw", "parse a date", "a"]


def small_model(directory):
    words = ("<unk>", "</s>", "a", "judo", "throw", "parse", "date", "Instruct:", "Query:")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    TextTokenizer(backend, "</s>").write(copy_tiny(directory))
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def folder(tmp_path, model, capsys):
    """texts.txt and e.npy, its vectors."""
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    assert run(capsys, "encode", tmp_path / "texts.txt", "-o", tmp_path / "e.npy", "--model", model)[0] == 0
    return tmp_path


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(a) for a in arguments])
    return status, *capsys.readouterr()


def search(capsys, folder, model, *options, file="texts.txt") -> tuple[int, str, str]:
    return run(capsys, "search", folder / file, "judo", "--model", model, *options)


def test_vectors_of_the_same_texts_and_model_are_ranked_without_a_word(folder, model, capsys):
    embeddings = ("--embeddings", folder / "e.npy")
    status, printed, error = search(capsys, folder, model)
    assert status == 0 and "note: 3 texts to embed, anew at every call. To keep" in error
    assert search(capsys, folder, model, *embeddings) == (0, printed, "")
    # the texts count, and not how their file is written
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    assert search(capsys, folder, model, *embeddings, file="texts.json") == (0, printed, "")


def test_an_array_that_was_moved_keeps_its_record(folder, model, capsys):
    (folder / "e.npy").rename(folder / "moved.npy")
    (folder / "texts.txt").write_text("\n".join(reversed(TEXTS)) + "\n")
    status, _, error = search(capsys, folder, model, "--embeddings", folder / "moved.npy")
    assert status == 1 and "moved.npy was made from other texts than those of" in error


def test_vectors_of_other_texts_or_with_an_instruction_are_told_before_the_model_is_loaded(
    folder, model, capsys, monkeypatch
):
    capsys.readouterr()
    run(capsys, "encode", folder / "texts.txt", "-o", folder / "i.npy", "--model", model, "--task", "a")
    monkeypatch.setattr(NVEmbed, "from_pretrained", None)  # never called
    status, _, error = search(capsys, folder, model, "--embeddings", folder / "i.npy")
    assert status == 1 and r"i.npy was made with the instruction 'Instruct: a\nQuery: '" in error
    (folder / "texts.txt").write_text("a judo throw\nparse a data\na\n")
    status, _, error = search(capsys, folder, model, "--embeddings", folder / "e.npy")
    assert status == 1 and "e.npy was made from other texts than those of" in error


def test_vectors_of_another_model_are_told(folder, tmp_path, capsys):
    weights, rule = small_model(tmp_path / "weights"), small_model(tmp_path / "rule")
    edit_weights(weights, **{QUERY: torch.ones(64, 64).half()})
    edit_json(rule / "config.json", lambda raw: raw.update(pooling_start="text_offset"))
    for other in (weights, rule):
        status, _, error = search(capsys, folder, other, "--embeddings", folder / "e.npy")
        assert status == 1 and "e.npy was made by another model: small with the fingerprint" in error
        assert error.count("\n") == 1 and "Pass that model by --model, or make the file with this" in error


def test_an_array_without_a_record_is_ranked_with_a_note(folder, model, capsys):
    np.save(folder / "bare.npy", np.load(folder / "e.npy"))
    status, printed, error = search(capsys, folder, model, "--embeddings", folder / "bare.npy")
    assert status == 0 and printed == search(capsys, folder, model)[1]
    assert error.count("\n") == 1 and "bare.npy does not say what it was made from" in error


def test_a_question_that_cannot_be_read_is_told_before_the_texts_are_embedded(
    folder, model, capsys, monkeypatch
):
    from nvembed_fast.cli import embedding

    monkeypatch.setattr(embedding, "embed", None)  # never called
    status, _, error = run(capsys, "search", folder / "texts.txt", "caf\udce9", "--model", model)
    assert status == 1 and "lone surrogate" in error and error.count("\n") == 1


def test_another_length_and_dtype_are_noted(folder, model, capsys):
    vectors, record = read_vectors(folder / "e.npy")
    with open(folder / "o.npy", "wb") as file:
        write_vectors(file, vectors, dataclasses.replace(record, dtype="float16"))
    options = ("--embeddings", folder / "o.npy", "--max-length", 512)
    status, _, error = search(capsys, folder, model, *options)
    made, asked = "max_length=4096 in float16", "max_length=512 in float32"
    assert status == 0 and f"made with {made}, and the questions are embedded with {asked}" in error


def test_without_a_length_the_models_own_counts(folder, model, tmp_path, capsys):
    own = NVEmbed.from_pretrained(model)
    own.max_seq_length = 16
    own.save_pretrained(tmp_path / "own")
    arguments = ("encode", folder / "texts.txt", "-o", folder / "l.npy", "--model", tmp_path / "own")
    assert run(capsys, *arguments)[0] == 0
    assert read_vectors(folder / "l.npy")[1].max_length == 16
    status, _, error = search(capsys, folder, tmp_path / "own", "--embeddings", folder / "l.npy")
    assert status == 0 and "was made with" not in error
    _, _, error = search(capsys, folder, tmp_path / "own", "--embeddings", folder / "e.npy")
    assert "made with max_length=4096" in error


def test_the_record_says_what_encode_was_given(folder, model, capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO((folder / "texts.txt").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    arguments = ("-", "--instruction", "a", "--max-length", 64, "--dtype", "bfloat16", "--model", model)
    assert run(capsys, "encode", *arguments, "-o", folder / "r.npy")[0] == 0
    plain, record = (read_vectors(folder / name)[1] for name in ("e.npy", "r.npy"))
    changed = {"instruction": "a", "max_length": 64, "dtype": "bfloat16"}
    assert record == dataclasses.replace(plain, **changed) and record.model == "small"
    assert record.fingerprint == NVEmbed.from_pretrained(model).fingerprint


@pytest.mark.parametrize(
    "content, message", [(b"", "is empty"), (b"PK\x03\x04", "is a zip archive, as .npz")]
)
def test_files_that_are_no_array_are_one_line(folder, model, capsys, content, message):
    (folder / "e.npy").write_bytes(content)
    status, _, error = search(capsys, folder, model, "--embeddings", folder / "e.npy")
    assert status == 1 and error.count("\n") == 1 and f"e.npy {message}" in error
