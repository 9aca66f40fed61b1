"""nvembed-fast mine with the libraries of its teachers: sentence-transformers, our own model, and BM25."""

import datetime
import json
import shutil
from decimal import Decimal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny_decoders import write_mistral

from nvembed_fast import NVEmbed, cli
from nvembed_fast.cli import mine
from nvembed_fast.integrations.sentence_transformers import load_foreign

TEXTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(12)]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A tiny model with mean pooling, as sentence-transformers saves it."""
    folder = tmp_path_factory.mktemp("foreign")
    write_mistral(folder / "bare")
    (folder / "bare" / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "</s>"}')
    words = Transformer(str(folder / "bare"))
    model = SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension())], device="cpu")
    model.save(str(folder / "saved"))
    return folder / "saved"


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"query": f"w{i}", "pos": [text]}) + "\n" for i, text in enumerate(TEXTS))
    )
    return file


def mined(rows, tmp_path, *teachers) -> list[dict]:
    out = tmp_path / "out.jsonl"
    names = [word for teacher in teachers for word in ("--teacher", str(teacher))]
    assert cli.main(["mine", str(rows), "-o", str(out), "--device", "cpu", "--rule", "none", *names]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_model_of_sentence_transformers(foreign, rows, tmp_path):
    found = mined(rows, tmp_path, foreign)
    model = load_foreign(foreign, device="cpu")
    for row in found:
        vectors = model.encode([row["query"], *row["pos"], *row["neg"]], normalize_embeddings=True)
        assert np.allclose(vectors[1:] @ vectors[0], row["pos_scores"] + row["neg_scores"], atol=1e-5)
        assert len(row["neg"]) == 7 and row["neg_scores"] == sorted(row["neg_scores"], reverse=True)


@pytest.mark.parametrize(
    ("value", "kind"), [(b"1", "bytes"), (datetime.date(2026, 1, 2), "date"), ([Decimal("1.5")], "Decimal")]
)
def test_a_column_that_json_lines_cannot_hold_is_told_before_any_work(
    tmp_path, capsys, monkeypatch, value, kind
):
    """The first row has none of it, and another column can be written."""
    monkeypatch.setattr(mine, "_teacher", lambda *_: pytest.fail("texts are encoded"))
    rows = [{"query": f"w{i}", "pos": [text], "year": 2026, "more": None} for i, text in enumerate(TEXTS)]
    rows[3]["more"] = value
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    words = ["mine", str(tmp_path / "rows.parquet"), "-o", str(tmp_path / "out.jsonl"), "--teacher", "bm25"]
    assert cli.main(words) == 1
    said = "rows.parquet, row 4: 'more' cannot be written as JSON lines (Object of type"
    error = capsys.readouterr().err
    assert f"{said} {kind} is" in error and error.count("\n") == 1, error


def test_vectors_of_another_max_length_are_not_taken(foreign, rows, tmp_path, capsys):
    """sentence-transformers prints no max_seq_length in the repr of a model."""

    def mined(out, max_length) -> tuple[int, bytes]:
        words = ["mine", str(rows), "-o", str(tmp_path / out), "--device", "cpu", "--teacher", str(foreign)]
        words += ["--vectors", str(tmp_path / "vectors"), "--max-length", str(max_length)]
        return cli.main(words), (tmp_path / out).read_bytes()

    assert mined("out.jsonl", 512)[0] == 0
    wanted = (tmp_path / "out.jsonl").read_bytes()
    assert mined("out.jsonl", 2) == (1, wanted)
    assert "has vectors of another teacher, or of another --max-length" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "vectors")
    status, found = mined("out.jsonl", 2)
    assert status == 0 and found != wanted


def test_a_model_of_this_package_with_a_task(tiny_directory, rows, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = ["mine", str(rows), "-o", str(out), "--device", "cpu", "--task", "find"]
    assert cli.main([*arguments, "--teacher", str(tiny_directory)]) == 0
    row = json.loads(out.read_text().splitlines()[0])
    model = NVEmbed.from_pretrained(tiny_directory, device="cpu")
    query = model.encode([row["query"]], "Instruct: find\nQuery: ", output="numpy")
    assert np.allclose(model.encode(row["pos"], output="numpy") @ query[0], row["pos_scores"], atol=1e-5)


def test_bm25_alone_writes_no_scores(rows, tmp_path, capsys):
    found = mined(rows, tmp_path, "bm25")
    assert "no scores were written" in capsys.readouterr().err
    assert all("neg_scores" not in row for row in found)
    assert {*found[5]["neg"]} == {"w3 w4 w5", "w4 w5 w6"}  # all others with the query's word


def test_bm25_and_vectors_share_the_negatives(foreign, rows, tmp_path):
    alone = mined(rows, tmp_path, "bm25")
    shutil.rmtree(tmp_path / "out.jsonl.mining")
    found = mined(rows, tmp_path, "bm25", foreign)
    for row, one in zip(found, alone, strict=True):
        assert row["neg"][: len(one["neg"])] == one["neg"] and len(row["neg"]) == len(one["neg"]) + 3
        assert len(row["neg_scores"]) == len(row["neg"])


def test_what_is_no_model_is_named(rows, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "unheard of"}')
    arguments = ["mine", str(rows), "-o", str(tmp_path / "out.jsonl"), "--teacher", str(tmp_path / "model")]
    assert cli.main(arguments) == 1
    assert "is no model of sentence-transformers" in capsys.readouterr().err
