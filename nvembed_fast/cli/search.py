"""nvembed-fast search."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nvembed_fast.cli import options
from nvembed_fast.texts import read_texts

if TYPE_CHECKING:
    import numpy as np

DEFAULT_TASK = "Given a question, retrieve passages that answer the question"
SUMMARY = "Rank the texts of a file by their likeness to each question."
EXAMPLES = """\
examples:
  nvembed-fast search passages.txt "how do I parse a date?"
  nvembed-fast search passages.txt "first question" "second question" --top 3
  nvembed-fast search passages.txt "how do I parse a date?" --embeddings passages.npy"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help=options.FILE_HELP)
    parser.add_argument("question", nargs="+")
    parser.add_argument("--top", type=int, default=5, help="results a question (default: 5)")
    parser.add_argument("--embeddings", type=Path, metavar="OUT.npy", help="of the same file, made by encode")
    parser.add_argument(
        "--task",
        default=DEFAULT_TASK,
        type=options.with_new_lines,
        help=r"the questions' task; \n in it is a new line (default: %(default)s)",
    )
    options.add_text_options(parser)
    options.add_model_options(parser)


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    if arguments.top < 1:
        raise ValueError(f"--top must be at least 1, got {arguments.top}")
    texts = read_texts(arguments.file, arguments.field, arguments.format)
    documents: np.ndarray | None = None
    if arguments.embeddings:
        documents = _read(arguments.embeddings)
        if documents.ndim != 2 or len(documents) != len(texts):
            raise ValueError(
                f"{arguments.embeddings} has shape {documents.shape}, but {arguments.file} has {len(texts)} "
                "texts: make it from this file with nvembed-fast encode"
            )
    # importing torch takes seconds: first what fails at once
    from nvembed_fast.encoder import query_instruction

    instruction = query_instruction(arguments.task)
    model = options.load(arguments)
    keywords = options.encode_options(arguments)
    if documents is None:
        options.note_empty(texts)
        with options.note_cut():
            documents = np.asarray(model.encode_document(texts, output="numpy", **keywords))
    elif documents.shape[1] != model.config.hidden_size:
        raise ValueError(
            f"{arguments.embeddings} has vectors of {documents.shape[1]}, the model of "
            f"{model.config.hidden_size}: they are not of the same model"
        )
    with options.note_cut():
        queries = model.encode(arguments.question, instruction, output="numpy", **keywords)
    for question, scores in zip(arguments.question, queries @ documents.T, strict=True):
        print(f"\n{question}")
        for rank, index in enumerate(np.argsort(-scores, kind="stable")[: arguments.top], start=1):
            print(f"{rank:3}. {scores[index]:.4f}  {' '.join(texts[index].split())[:160]}")


def _read(path: Path) -> "np.ndarray":
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is no .npy array made by nvembed-fast encode") from error
