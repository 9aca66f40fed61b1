"""Search passages by an index of faiss, which is kept in a file.

    python examples/faiss_search.py passages.txt "how do I parse a date?" --model DIRECTORY

The index file is named after the passages and the model's fingerprint, so vectors of two models never mix.
"""

import argparse
from pathlib import Path

import faiss

from nvembed_fast import NVEmbed, files, fingerprint

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
    kept = arguments.file.with_suffix(f".{name}.faiss")
    if not kept.exists():
        # vectors have unit norm, so the inner product is the cosine
        index = faiss.IndexFlatIP(model.config.hidden_size)
        index.add(model.encode_document(passages, output="numpy"))
        with files.replacing(kept) as aside:  # whole or not at all
            faiss.write_index(index, str(aside))
    query = model.encode_query([arguments.question], TASK, output="numpy")
    scores, places = faiss.read_index(str(kept)).search(query, min(arguments.top, len(passages)))
    for score, place in zip(scores[0], places[0], strict=True):
        print(f"{score:.4f}  {passages[place]}")


if __name__ == "__main__":
    main()
