"""Search passages by an index of usearch, which is kept in a file.

    python examples/usearch_search.py passages.txt "how do I parse a date?" --model DIRECTORY

The index file is named after the passages and the model's fingerprint, so vectors of two models never mix.
"""

import argparse
from pathlib import Path

import numpy as np
from usearch.index import Index

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
    kept = arguments.file.with_suffix(f".{name}.usearch")
    # vectors have unit norm, so the inner product is the cosine. The default dtype has 16 bits
    index = Index(ndim=model.config.hidden_size, metric="ip", dtype="f32")
    if kept.exists():
        index.load(str(kept))
    else:
        index.add(np.arange(len(passages)), model.encode_document(passages, output="numpy"))
        with files.replacing(kept) as aside:  # whole or not at all
            index.save(str(aside))
    query = model.encode_query(arguments.question, TASK, output="numpy")
    found = index.search(query, min(arguments.top, len(passages)))
    for place, distance in zip(found.keys, found.distances, strict=True):
        print(f"{1 - distance:.4f}  {passages[place]}")


if __name__ == "__main__":
    main()
