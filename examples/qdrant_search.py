"""Search passages with qdrant in its local mode: a folder in the place of a server.

    python examples/qdrant_search.py passages.txt "how do I parse a date?" --model DIRECTORY

A collection is named after the passages and the model's fingerprint, so vectors of two models never mix.
"""

import argparse
from contextlib import closing
from pathlib import Path

from qdrant_client import QdrantClient, models

from nvembed_fast import NVEmbed, fingerprint

TASK = "Given a question, retrieve passages that answer the question"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a text file, one passage a line")
    parser.add_argument("question", help="what the passages should answer")
    parser.add_argument("--model", default="nvidia/NV-Embed-v2", help="directory or hub id [%(default)s]")
    parser.add_argument("--top", type=int, default=3, help="passages to print [%(default)s]")
    arguments = parser.parse_args(argv)
    passages = arguments.file.read_text(encoding="utf-8").splitlines()
    model = NVEmbed.from_pretrained(arguments.model)

    name = fingerprint.of_texts([model.fingerprint, *passages])
    with closing(QdrantClient(path=str(arguments.file.with_suffix(".qdrant")))) as client:
        # a killed run leaves a part of a collection
        if not client.collection_exists(name) or client.count(name).count != len(passages):
            client.delete_collection(name)
            vectors = model.encode_document(passages, output="numpy")
            size = models.VectorParams(size=model.config.hidden_size, distance=models.Distance.COSINE)
            client.create_collection(name, vectors_config=size)
            client.upload_collection(name, vectors, [{"text": passage} for passage in passages])
        query = model.encode_query(arguments.question, TASK, output="numpy")
        for point in client.query_points(name, query, limit=arguments.top).points:
            print(f"{point.score:.4f}  {point.payload['text']}")


if __name__ == "__main__":
    main()
