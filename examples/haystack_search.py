"""Search passages with Haystack.

    python examples/haystack_search.py --model DIRECTORY

DIRECTORY is a model that `NVEmbed.save_pretrained` or `SentenceTransformer.save_pretrained` has written.
"""

import argparse

from haystack import Document
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack_integrations.components.embedders.sentence_transformers import (
    SentenceTransformersDocumentEmbedder,
    SentenceTransformersTextEmbedder,
)

PASSAGES = ["Judo throws are allowed in freestyle wrestling.", "A radiologist studies medicine."]


def embedders(model: str) -> tuple[SentenceTransformersDocumentEmbedder, SentenceTransformersTextEmbedder]:
    common = {"model": model, "trust_remote_code": True, "progress_bar": False}
    documents = SentenceTransformersDocumentEmbedder(**common)
    # not prefix, which would be pooled with the question
    questions = SentenceTransformersTextEmbedder(**common, encode_kwargs={"prompt_name": "query"})
    return documents, questions


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a saved model")
    documents, questions = embedders(parser.parse_args(argv).model)
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    store.write_documents(documents.run([Document(content=passage) for passage in PASSAGES])["documents"])
    question = questions.run("are judo throws allowed?")["embedding"]
    for found in store.embedding_retrieval(question, top_k=2):
        print(f"{found.score:.4f}  {found.content}")


if __name__ == "__main__":
    main()
