"""Search passages with LangChain.

    python examples/langchain_search.py --model DIRECTORY

DIRECTORY is a model that `NVEmbed.save_pretrained` or `SentenceTransformer.save_pretrained` has written.
"""

import argparse

from langchain_core.vectorstores import InMemoryVectorStore
from langchain_huggingface import HuggingFaceEmbeddings

PASSAGES = ["Judo throws are allowed in freestyle wrestling.", "A radiologist studies medicine."]


def embeddings(model: str) -> HuggingFaceEmbeddings:
    return HuggingFaceEmbeddings(
        model_name=model,
        model_kwargs={"trust_remote_code": True},
        # without it questions carry no instruction
        query_encode_kwargs={"prompt_name": "query"},
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a saved model")
    store = InMemoryVectorStore.from_texts(PASSAGES, embeddings(parser.parse_args(argv).model))
    for passage, score in store.similarity_search_with_score("are judo throws allowed?", k=2):
        print(f"{score:.4f}  {passage.page_content}")


if __name__ == "__main__":
    main()
