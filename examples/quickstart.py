"""Score two passages against two questions.

    python examples/quickstart.py                      # nvidia/NV-Embed-v2
    python examples/quickstart.py --model DIRECTORY    # any model in the published layout

The published checkpoints are gated. README.md says how to get access.
"""

import argparse

from nvembed_fast import NVEmbed

TASK = "Given a question, retrieve passages that answer the question"
QUESTIONS = ["are judo throws allowed in wrestling?", "how do I become a radiologist?"]
PASSAGES = [
    "Judo throws are allowed in freestyle and folkstyle wrestling.",
    "A radiologist studies medicine for four years and trains in a hospital for five more.",
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nvidia/NV-Embed-v2", help="directory or hub id [%(default)s]")
    model = NVEmbed.from_pretrained(parser.parse_args(argv).model)

    queries = model.encode_query(QUESTIONS, TASK)  # [2, D] fp32, unit norm
    passages = model.encode_document(PASSAGES)  # passages carry no instruction
    for question, scores in zip(QUESTIONS, queries @ passages.T, strict=True):
        print(question)
        for passage, score in zip(PASSAGES, scores.tolist(), strict=True):
            print(f"  {score:.4f}  {passage}")


if __name__ == "__main__":
    main()
