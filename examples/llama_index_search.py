"""Search passages with LlamaIndex.

    python examples/llama_index_search.py --model DIRECTORY

DIRECTORY is a model that `NVEmbed.save_pretrained` or `SentenceTransformer.save_pretrained` has written.
"""

import argparse

from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

from nvembed_fast import query_instruction

TASK = "Given a question, retrieve passages that answer the question"
PASSAGES = ["Judo throws are allowed in freestyle wrestling.", "A radiologist studies medicine."]


def embeddings(model: str) -> HuggingFaceEmbedding:
    # it puts its own prompts in the place of the saved ones, and without query_instruction an empty one
    return HuggingFaceEmbedding(model, trust_remote_code=True, query_instruction=query_instruction(TASK))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a saved model")
    nodes = [TextNode(text=passage) for passage in PASSAGES]
    index = VectorStoreIndex(nodes, embed_model=embeddings(parser.parse_args(argv).model))
    for found in index.as_retriever(similarity_top_k=2).retrieve("are judo throws allowed?"):
        print(f"{found.score:.4f}  {found.text}")


if __name__ == "__main__":
    main()
