"""Search a text file, one passage a line, for the passages nearest to a question.

    python examples/search.py passages.txt "how do I parse a date?" --model DIRECTORY

The vectors are kept beside the file, under a name made from its passages and the model. So the second search
of the same file embeds the question alone, and another model or a changed file never gets these vectors.
"""

import argparse
from pathlib import Path

import numpy as np

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
    kept = arguments.file.with_suffix(f".{name}.npy")
    if not kept.exists():
        vectors = model.encode_document(passages, output="numpy")
        with files.replacing(kept) as aside, aside.open("wb") as file:  # whole or not at all
            np.save(file, vectors)
    vectors = np.load(kept)  # [N, D] fp32, unit norm
    scores = vectors @ model.encode_query(arguments.question, TASK, output="numpy")
    for index in np.argsort(-scores)[: arguments.top]:
        print(f"{scores[index]:.4f}  {passages[index]}")


if __name__ == "__main__":
    main()
