"""nvembed-fast encode."""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nvembed_fast import files
from nvembed_fast.cli import options
from nvembed_fast.texts import read_texts

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

SUMMARY = "Embed the texts of a file into a .npy array, one row a text."
EXAMPLES = """\
examples:
  nvembed-fast encode passages.txt -o passages.npy
  nvembed-fast encode questions.txt -o questions.npy --task "Given a question, retrieve passages"
  nvembed-fast encode corpus.jsonl --field body -o corpus.npy --model ./my-model --dtype bfloat16
  nvembed-fast encode corpus.csv.gz --field body -o corpus.npy
  cat corpus.jsonl | nvembed-fast encode - --format jsonl -o corpus.npy"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help=options.FILE_HELP)
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="OUT.npy", help="fp32 [texts, width]"
    )
    prefix = parser.add_mutually_exclusive_group()
    prefix.add_argument(
        "--instruction",
        default="",
        type=options.with_new_lines,
        help=r"put in front of every text and not pooled; \n in it is a new line, \\n a backslash and an n",
    )
    prefix.add_argument(
        "--task", type=options.with_new_lines, help=r'the same as --instruction "Instruct: TASK\nQuery: "'
    )
    options.add_text_options(parser)
    options.add_model_options(parser)


def run(arguments: argparse.Namespace) -> None:
    _check_output(arguments.output, arguments.file)
    texts = read_texts(arguments.file, arguments.field, arguments.format)
    # importing torch takes seconds: first what fails at once
    from nvembed_fast.encoder import query_instruction

    instruction = arguments.instruction if arguments.task is None else query_instruction(arguments.task)
    model = options.load(arguments)
    options.note_empty(texts)
    _check_space(arguments.output, 4 * len(texts) * model.config.hidden_size)
    with options.note_cut():
        vectors = model.encode(texts, instruction, output="numpy", **options.encode_options(arguments))
    _save(arguments.output, vectors)
    print(f"{arguments.output}: float32 [{vectors.shape[0]}, {vectors.shape[1]}]")


def _check_output(output: Path, texts_file: str) -> None:
    """Fail before the hours of encoding, not after."""
    if _is_same_file(output, texts_file):
        raise ValueError(f"--output is the file of the texts, which it would replace: {output}")
    if output.suffix != ".npy":
        raise ValueError(f"--output must end in .npy, got {output}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"the directory of --output does not exist: {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise PermissionError(f"the directory of --output cannot be written: {output.parent}")


def _is_same_file(output: Path, texts_file: str) -> bool:
    try:
        source = os.fstat(sys.stdin.fileno()) if texts_file == "-" else os.stat(texts_file)
        return os.path.samestat(source, output.stat())
    except (OSError, ValueError, AttributeError):  # one is not there, or standard input is no file
        return False


def _check_space(output: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if num_bytes > free:
        raise OSError(f"{output} needs {num_bytes / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free there")


def _save(output: Path, vectors: "ArrayLike") -> None:
    import numpy as np

    try:
        with files.replacing(output) as aside, open(aside, "wb") as file:
            np.save(file, vectors)
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror or error}") from error
