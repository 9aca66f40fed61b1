"""The frameworks above sentence-transformers, by the scripts of examples/."""

import numpy as np
import pytest

from examples import haystack_search, lancedb_search, langchain_search, llama_index_search
from nvembed_fast import NVEmbed

TASK = llama_index_search.TASK
QUESTION = "are judo throws allowed?"
PASSAGES = langchain_search.PASSAGES


@pytest.fixture(scope="module")
def encoder(tiny_directory) -> NVEmbed:
    return NVEmbed.from_pretrained(tiny_directory, device="cpu")


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("saved")
    encoder.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def wanted(encoder) -> tuple[np.ndarray, np.ndarray]:
    question = encoder.encode_query(QUESTION, TASK, output="numpy")
    return question, encoder.encode_document(PASSAGES, output="numpy")


def langchain(model: str) -> tuple[list, list]:
    embeddings = langchain_search.embeddings(model)
    return embeddings.embed_query(QUESTION), embeddings.embed_documents(PASSAGES)


def llama_index(model: str) -> tuple[list, list]:
    embeddings = llama_index_search.embeddings(model)
    return embeddings.get_query_embedding(QUESTION), embeddings.get_text_embedding_batch(PASSAGES)


def haystack(model: str) -> tuple[list, list]:
    documents, questions = haystack_search.embedders(model)
    found = documents.run([haystack_search.Document(content=passage) for passage in PASSAGES])
    return questions.run(QUESTION)["embedding"], [document.embedding for document in found["documents"]]


@pytest.mark.parametrize("vectors", [langchain, llama_index, haystack])
def test_a_framework_gives_our_vectors(vectors, saved, wanted):
    for got, ours in zip(vectors(saved), wanted, strict=True):
        np.testing.assert_allclose(got, ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize("example", [langchain_search, llama_index_search, haystack_search, lancedb_search])
def test_an_example_ranks_by_our_cosines(example, saved, wanted, capsys):
    example.main(["--model", saved])
    question, passages = wanted
    ranked = sorted(zip(passages @ question, PASSAGES, strict=True), reverse=True)
    lines = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    assert [passage for _, passage in lines] == [passage for _, passage in ranked]
    np.testing.assert_allclose([float(score) for score, _ in lines], [s for s, _ in ranked], atol=1e-4)
