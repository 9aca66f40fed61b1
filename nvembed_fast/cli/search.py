"""nvembed-fast search."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from nvembed_fast.cli import options, process
from nvembed_fast.config import DEFAULT_TASK
from nvembed_fast.texts import read_records

if TYPE_CHECKING:
    import numpy as np

    from nvembed_fast.encoder import NVEmbed
    from nvembed_fast.vectors import Record

SUMMARY = "Rank the texts of a file by their likeness to each question."
EXAMPLES = """\
examples:
  nvembed-fast search passages.txt "how do I parse a date?"
  nvembed-fast search passages.txt "first question" "second question" --top 3
  nvembed-fast search passages.txt "how do I parse a date?" --embeddings passages.npy
  nvembed-fast search passages.txt "how do I parse a date?" --json"""

_NOTHING_OBEYED = dict.fromkeys(process.OBEYED)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help=options.FILE_HELP)
    parser.add_argument("question", nargs="+", help="one or several, each in quotation marks")
    parser.add_argument(
        "--json",
        action="store_true",
        help='a line of JSON for each question: {"question", "results": [{"index", "score", "text"}]}',
    )
    parser.add_argument("--top", type=int, default=5, help="results a question (default: 5)")
    parser.add_argument(
        "--embeddings",
        type=options.path,
        metavar="OUT.npy",
        help="of the same file, made by encode with the same model",
    )
    parser.add_argument(
        "--task",
        default=DEFAULT_TASK,
        type=options.with_new_lines,
        help=r"the questions' task; \n in it is a new line (default: %(default)s)",
    )
    options.add_text_options(parser, ids_help="they are shown with the texts")
    options.add_model_options(parser)


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    if arguments.top < 1:
        raise ValueError(f"--top must be at least 1, got {arguments.top}")
    for number, question in enumerate(arguments.question, start=1):
        if not question.strip():
            raise ValueError(f"question {number} is empty: write one in quotation marks")
    texts, ids = read_records(arguments.file, arguments.field, arguments.format, arguments.ids)
    filled = [index for index, text in enumerate(texts) if text.strip()]
    if not filled:
        raise ValueError(f"{arguments.file} has no text that is not empty")
    documents = record = None
    if arguments.embeddings:
        from nvembed_fast.vectors import normalized, read_vectors

        documents, record = read_vectors(arguments.embeddings)
        _check_texts(arguments, texts, documents, record)
    # importing torch takes seconds: first what fails at once
    import torch

    from nvembed_fast.cli.embedding import embed
    from nvembed_fast.encoder import query_instruction
    from nvembed_fast.topk import mapped, topk

    instruction = query_instruction(arguments.task)
    model = options.load(arguments)
    keywords = options.encode_options(arguments)
    if documents is not None:
        _check_model(arguments, model, documents, record)
        if record is not None and record.width not in (None, model.config.hidden_size):
            # cut vectors have no unit norm
            documents = documents.astype(np.promote_types(documents.dtype, np.float32), copy=False)
            documents = normalized(documents)
            keywords |= {"truncate_dim": record.width, "normalize_embeddings": True}
    # first: what is wrong with a question is told before the work on the texts
    with options.note_cut():
        queries = model.encode(arguments.question, instruction, output="numpy", **keywords)
    if documents is None:
        process.say(
            f"note: {len(filled)} texts to embed, anew at every call. To keep their vectors, run "
            "nvembed-fast encode FILE -o OUT.npy once, and search with --embeddings OUT.npy"
        )
        documents = embed(model, [texts[index] for index in filled], "", arguments, numbers=filled)
        rows = None
    else:
        rows = torch.tensor(filled) if len(filled) < len(texts) else None
    show = _print_json if arguments.json else _print
    best = topk(torch.from_numpy(queries), mapped(documents), min(arguments.top, len(filled)), rows=rows)
    for question, *results in zip(arguments.question, *(part.tolist() for part in best), strict=True):
        found = [
            {"index": filled[i], "score": score, "text": texts[filled[i]]}
            for score, i in zip(*results, strict=True)
        ]
        show(question, [{"id": ids[result["index"]], **result} for result in found] if ids else found)


def _print_json(question: str, results: list[dict[str, Any]]) -> None:
    # in ASCII: a text cannot send escape sequences to the terminal
    print(json.dumps({"question": question, "results": results}))


def _print(question: str, results: list[dict[str, Any]]) -> None:
    print(f"\n{_shown(question)}")
    for rank, result in enumerate(results, start=1):
        name = f"{_shown(result['id'])}  " if "id" in result else ""
        print(f"{rank:3}. {result['score']:.4f}  {name}{_shown(result['text'])[:160]}")


def _shown(text: str) -> str:
    """A text in one line without control characters and marks of direction, which a terminal would obey."""
    return " ".join(text.split()).translate(_NOTHING_OBEYED)


def _check_texts(
    arguments: argparse.Namespace, texts: list[str], vectors: "np.ndarray", record: "Record | None"
) -> None:
    """ValueError unless the vectors are those of these texts, as far as their file tells."""
    from nvembed_fast import fingerprint

    file = arguments.embeddings
    if len(vectors) != len(texts):
        raise ValueError(
            f"{file} has {len(vectors)} vectors, but {arguments.file} has {len(texts)} texts: make it from "
            "this file with nvembed-fast encode"
        )
    if record is None:
        process.say(
            f"note: {file} does not say what it was made from, so its texts and its model cannot be checked. "
            "nvembed-fast encode writes that into its output"
        )
    elif record.texts != fingerprint.of_texts(texts):
        raise ValueError(
            f"{file} was made from other texts than those of {arguments.file}: make it from this file with "
            "nvembed-fast encode"
        )
    elif record.instruction:
        raise ValueError(
            f"{file} was made with the instruction {record.instruction!r}, and the texts of a search carry "
            "none: make it with nvembed-fast encode without --instruction and --task"
        )


def _check_model(
    arguments: argparse.Namespace, model: "NVEmbed", vectors: "np.ndarray", record: "Record | None"
) -> None:
    """ValueError unless the vectors are of this model, as far as their file tells."""
    from nvembed_fast.placement import dtype_name

    file = arguments.embeddings
    width = model.config.hidden_size
    if vectors.shape[1] != (width if record is None else record.width or width) or vectors.shape[1] > width:
        raise ValueError(
            f"{file} has vectors of {vectors.shape[1]}, the model of {model.config.hidden_size}: they are "
            "not of the same model"
        )
    if record is None:
        return
    if record.fingerprint != (own := model.fingerprint):
        raise ValueError(
            f"{file} was made by another model: {record.model} with the fingerprint {record.fingerprint}, "
            f"and {arguments.model} has {own}. Pass that model by --model, or make the file with this one"
        )
    made = f"max_length={record.max_length} in {record.dtype}"
    asked = f"max_length={arguments.max_length} in {dtype_name(model.dtype)}"
    if made != asked:
        process.say(f"note: {file} was made with {made}, and the questions are embedded with {asked}")
