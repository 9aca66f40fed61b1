"""The examples around transformers, HippoRAG, BEIR and the indexes give our ranks and our vectors."""

import ast
from pathlib import Path

import faiss
import numpy as np
import pytest
import usearch.index
from qdrant_client import QdrantClient
from sentence_transformers import SentenceTransformer

import nvembed_fast
from examples import (
    automodel_search,
    beir_search,
    faiss_search,
    hipporag_search,
    qdrant_search,
    usearch_search,
)
from nvembed_fast import NVEmbed


@pytest.fixture(scope="module")
def model(tiny_directory) -> NVEmbed:
    return NVEmbed.from_pretrained(tiny_directory)


def test_the_model_cards_calls(tiny_directory, model, capsys):
    automodel_search.main(["--model", str(tiny_directory)])
    got = ast.literal_eval(capsys.readouterr().out)
    queries = model.encode_query(automodel_search.QUESTIONS, automodel_search.TASK)
    wanted = queries @ model.encode_document(automodel_search.PASSAGES).T * 100
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


def test_hipporag(tiny_directory, model, capsys):
    hipporag_search.main(["--model", str(tiny_directory)])
    printed = [line[8:] for line in capsys.readouterr().out.splitlines()]
    assert sorted(printed) == sorted(hipporag_search.PASSAGES)
    client = hipporag_search.EmbeddingModel(str(tiny_directory))
    texts = hipporag_search.PASSAGES
    np.testing.assert_allclose(
        client.batch_encode(texts, 2, hipporag_search.TASK),
        model.encode_query(texts, hipporag_search.TASK),
        rtol=0,
        atol=1e-6,
    )
    assert client.embedding_dim == 64


def test_beir(tiny_directory, model, capsys):
    beir_search.main(["--model", str(tiny_directory)])
    name, _, found = capsys.readouterr().out.partition(" ")
    assert name == "q1" and set(ast.literal_eval(found)) == {"d1", "d2"}
    encoder = beir_search.Encoder(model, beir_search.TASK)
    rows = list(beir_search.CORPUS.values())
    columns = {"title": [r["title"] for r in rows], "text": [r["text"] for r in rows]}
    wanted = model.encode(["Judo Throws are allowed in freestyle wrestling.", rows[1]["text"]])
    for corpus in (rows, columns):
        np.testing.assert_allclose(encoder.encode_corpus(corpus, 1), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("example", [faiss_search, usearch_search, qdrant_search])
def test_an_index_keeps_the_vectors(example, tiny_directory, model, tmp_path, capsys, monkeypatch):
    passages = ["how to bake bread", "what a date is", "the sum of two numbers"]
    file = tmp_path / "passages.txt"
    file.write_text("\n".join(passages))
    arguments = [str(file), "what a date is", "--model", str(tiny_directory), "--top", "9"]
    example.main(arguments)
    first = capsys.readouterr().out
    scores = (model.encode(passages) @ model.encode_query("what a date is", example.TASK)).numpy()
    lines = [line.split("  ", 1) for line in first.splitlines()]
    assert [text for _, text in lines] == [passages[i] for i in np.argsort(-scores)]
    np.testing.assert_allclose([float(score) for score, _ in lines], np.sort(scores)[::-1], atol=1e-4)
    encode = NVEmbed.encode_document
    monkeypatch.setattr(NVEmbed, "encode_document", None)
    example.main(arguments)
    assert capsys.readouterr().out == first
    # other passages are another index
    monkeypatch.setattr(NVEmbed, "encode_document", encode)
    file.write_text("\n".join([*passages[:2], "another one"]))
    example.main(arguments)
    assert "another one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("example", "owner", "name"),
    [
        (faiss_search, faiss, "write_index"),
        (usearch_search, usearch.index.Index, "save"),
        (qdrant_search, QdrantClient, "upload_collection"),
    ],
)
def test_a_killed_run_leaves_no_part_of_an_index(
    example, owner, name, tiny_directory, tmp_path, capsys, monkeypatch
):
    file = tmp_path / "passages.txt"
    file.write_text("how to bake bread\nwhat a date is\nthe sum of two numbers")
    arguments = [str(file), "what a date is", "--model", str(tiny_directory), "--top", "9"]
    real = getattr(owner, name)

    def killed(*given):
        if example is qdrant_search:
            real(*given[:2], given[2][:1], given[3][:1])
        else:
            Path(given[1]).write_bytes(b"a part")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            example.main(arguments)
    example.main(arguments)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_register_opens_no_way_to_the_plain_mean(tiny_directory):
    """An old directory has no modules.json, and that library would mean-pool what AutoModel gives."""
    assert not (tiny_directory / "modules.json").exists()
    nvembed_fast.register()
    with pytest.raises(ValueError, match=r"has no modules\.json, so sentence-transformers would pool"):
        SentenceTransformer(str(tiny_directory), device="cpu")
