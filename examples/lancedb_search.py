"""Search passages with LanceDB.

    python examples/lancedb_search.py --model DIRECTORY

DIRECTORY is a model that `NVEmbed.save_pretrained` or `SentenceTransformer.save_pretrained` has written.
"""

import argparse
import tempfile

import lancedb
from lancedb.embeddings import get_registry
from lancedb.pydantic import LanceModel, Vector

PASSAGES = ["Judo throws are allowed in freestyle wrestling.", "A radiologist studies medicine."]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a saved model")
    embeddings = get_registry().get("sentence-transformers").create(name=parser.parse_args(argv).model)

    class Passage(LanceModel):
        text: str = embeddings.SourceField()
        vector: Vector(embeddings.ndims()) = embeddings.VectorField()

    with tempfile.TemporaryDirectory() as directory:
        table = lancedb.connect(directory).create_table("passages", schema=Passage)
        table.add([{"text": passage} for passage in PASSAGES])
        # by its vector: search("a text") would embed the question without an instruction
        question = embeddings.embedding_model.encode_query("are judo throws allowed?")
        for found in table.search(question).distance_type("cosine").limit(2).to_list():
            print(f"{1 - found['_distance']:.4f}  {found['text']}")


if __name__ == "__main__":
    main()
