"""The calls of the published model card for transformers, unchanged but for the first two lines of `main`.

python examples/automodel_search.py --model DIRECTORY
"""

import argparse

import torch.nn.functional as F
from transformers import AutoModel

import nvembed_fast

TASK = "Given a question, retrieve passages that answer the question"
QUESTIONS = ["are judo throws allowed in wrestling?", "how to become a radiology technician?"]
PASSAGES = [
    "Judo throws are allowed in freestyle wrestling.",
    "Enrol in a radiology course, then take the exam.",
]


def main(argv: list[str] | None = None) -> None:
    nvembed_fast.register()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nvidia/NV-Embed-v2", help="directory or hub id [%(default)s]")
    name = parser.parse_args(argv).model

    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    instruction = "Instruct: " + TASK + "\nQuery: "
    queries = model.encode(QUESTIONS, instruction=instruction, max_length=32768)
    passages = model.encode(PASSAGES, instruction="", max_length=32768)
    queries = F.normalize(queries, p=2, dim=1)
    passages = F.normalize(passages, p=2, dim=1)
    print(((queries @ passages.T) * 100).tolist())


if __name__ == "__main__":
    main()
