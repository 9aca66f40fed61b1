"""nvembed-fast encode."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import get_args

from nvembed_fast import files
from nvembed_fast.cli import options, process
from nvembed_fast.config import Precision
from nvembed_fast.texts import read_records

SUMMARY = "Embed the texts of a file into a .npy array, one row a text."
EXAMPLES = """\
examples:
  nvembed-fast encode passages.txt -o passages.npy
  nvembed-fast encode questions.txt -o questions.npy --task "Given a question, retrieve passages"
  nvembed-fast encode corpus.jsonl --field body -o corpus.npy --model ./my-model --dtype bfloat16
  nvembed-fast encode corpus.csv.gz --field body -o corpus.npy --precision float16
  cat corpus.jsonl | nvembed-fast encode - --format jsonl -o corpus.npy
  nvembed-fast encode --text "one text" --text "another" -o - > two.npy"""

_ASIDE_BYTES = 32  # what the name of a file written aside is longer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", help=options.FILE_HELP)
    parser.add_argument(
        "--text",
        action="append",
        help="a text in the place of FILE, may come several times. Words in the place of FILE that are no "
        "file's name are a text, too",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=options.path,
        metavar="OUT.npy",
        help="[texts, width]; - writes it to standard output. An interrupted run keeps its rows in "
        "OUT.npy.partial, and the same command goes on from there, also with another --dtype",
    )
    parser.add_argument(
        "--precision",
        default="float32",
        choices=get_args(Precision),
        help="float16 takes half the room, int8 and uint8 a quarter, binary and ubinary one bit a number. "
        "OUT.npy keeps the ranges of int8 and uint8 (default: %(default)s)",
    )
    parser.add_argument(
        "--truncate-dim",
        type=int,
        metavar="N",
        help="keep the first N dimensions as they are, without unit norm, as sentence-transformers does "
        "(default: all)",
    )
    prefix = parser.add_mutually_exclusive_group()
    prefix.add_argument(
        "--instruction",
        default="",
        type=options.with_new_lines,
        help=r"put in front of every text and not pooled; \n in it is a new line, \\n a backslash and an n",
    )
    prefix.add_argument(
        "--task",
        type=options.with_new_lines,
        help=r'the same as --instruction "Instruct: TASK\nQuery: ". One that begins with "Instruct: " is '
        "taken as it is",
    )
    options.add_text_options(parser, ids_help="they are written to OUT.ids.txt, one a line")
    options.add_model_options(parser)


def run(arguments: argparse.Namespace) -> None:
    output = arguments.output
    to_stdout = str(output) == "-"
    if to_stdout:
        if sys.stdout.isatty():
            raise ValueError("-o - writes the bytes of an array: send them on, such as by > OUT.npy")
        if arguments.ids:
            raise ValueError("--ids goes to OUT.ids.txt beside the array, which -o - does not have")
    else:
        _check_output(output, arguments.file)
        if arguments.ids and _is_same_file(_ids_file(output), arguments.file):
            raise ValueError(f"--ids would replace the file of the texts: {_ids_file(output)}")
    texts, ids = _records(arguments)
    # importing torch takes seconds: first what fails at once
    from nvembed_fast import fingerprint
    from nvembed_fast.cli.embedding import embed
    from nvembed_fast.cli.partial import Partial
    from nvembed_fast.encoder import query_instruction
    from nvembed_fast.placement import dtype_name
    from nvembed_fast.precision import byte_width
    from nvembed_fast.vectors import Record, write_quantized

    instruction = arguments.instruction if arguments.task is None else query_instruction(arguments.task)
    model = options.load(arguments)
    options.note_empty(texts)
    named = options.path(arguments.model)
    width = model.config.hidden_size
    if (cut := arguments.truncate_dim) is not None and not 1 <= cut <= width:
        raise ValueError(f"--truncate-dim must be from 1 to {width}, got {cut}")
    precision = arguments.precision
    is_float = precision in ("float32", "float16")
    record = Record(
        # of a directory the name alone: the array may be passed on
        model=options.model_name(arguments.model) if named.is_dir() else arguments.model,
        fingerprint=model.fingerprint,
        texts=fingerprint.of_texts(texts),
        instruction=instruction,
        max_length=arguments.max_length,
        dtype=dtype_name(model.dtype),
        precision=precision,
        width=cut if is_float else cut or width,
    )
    shape, dtype = (len(texts), cut or width), precision if is_float else "float32"
    made = f"{precision} [{shape[0]}, {byte_width(shape[1], precision)}]"
    if to_stdout:
        write_quantized(sys.stdout.buffer, embed(model, texts, instruction, arguments, width=cut), record)
        sys.stdout.buffer.flush()
        process.say(f"standard output: {made}")
        return
    with (
        process.telling_what_was_written(output, lambda: output),
        Partial(output, shape, dtype, record) as partial,
    ):
        if there := len(partial):
            process.say(f"note: {there} of {shape[0]} rows are in {partial.path} already")
            if (made_in := partial.record.dtype) != record.dtype:
                process.say(f"note: they were made in {made_in}, and the others are made in {record.dtype}")
        embed(model, texts, instruction, arguments, partial, width=cut)
        if ids:  # first: behind the last rename nothing is left to do
            with files.replacing(_ids_file(output)) as aside:
                aside.write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
        partial.finish(None if is_float else write_quantized)
        print(f"{output}: {made}")


def _ids_file(output: Path) -> Path:
    return output.with_suffix(".ids.txt")


def _records(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The texts and their ids."""
    file, texts = arguments.file, arguments.text
    if (file is None) == (texts is None):
        raise ValueError("pass either a file (- reads standard input), or texts by --text")
    if texts is None and _is_text(file):
        process.say(f"note: {file[:60]!r} is no file, and is embedded as a text")
        texts = [file]
    if texts is not None:
        if arguments.ids:
            raise ValueError("texts on the command line have no ids: pass a file with --ids")
        if arguments.field is not None or arguments.format is not None:
            raise ValueError("texts on the command line are read as they are: leave --field and --format out")
        return texts, []
    if file != "-" and not os.path.exists(file):
        raise FileNotFoundError(
            f"no text file {file}; - reads standard input, --text embeds words themselves"
        )
    return read_records(file, arguments.field, arguments.format, arguments.ids)


def _is_text(argument: str) -> bool:
    """Whether an argument is meant as a text. A mistyped name of a file must never be one.

    It has several words, no separator of folders, and does not end as a file's name does.
    """
    several_words = len(argument.split()) > 1
    like_a_path = os.sep in argument or re.search(r"\.\w{1,8}$", argument)
    return several_words and not like_a_path and not os.path.exists(argument)


def _check_output(output: Path, texts_file: str | None) -> None:
    """Fail before the hours of encoding, not after."""
    if _is_same_file(output, texts_file):
        raise ValueError(f"--output is the file of the texts, which it would replace: {output}")
    if output.suffix != ".npy":
        raise ValueError(f"--output must end in .npy, or be - for standard output, got {output}")
    folder = Path(os.path.realpath(output)).parent  # a link is followed
    if output.exists() and not output.is_file():  # a device would be replaced by a file
        kind = "a directory" if output.is_dir() else "a device or a pipe"
        raise FileExistsError(f"--output is {kind}: {output}")
    if not folder.is_dir():
        raise FileNotFoundError(f"the directory of --output does not exist: {folder}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"the directory of --output cannot be written: {folder}")
    if len(os.fsencode(output.name)) > (longest := os.pathconf(folder, "PC_NAME_MAX") - _ASIDE_BYTES):
        raise ValueError(f"the file name of --output is longer than {longest} bytes: {output.name[:40]}...")


def _is_same_file(output: Path, texts_file: str | None) -> bool:
    if texts_file is None:
        return False
    try:
        source = os.fstat(sys.stdin.fileno()) if texts_file == "-" else os.stat(texts_file)
        return os.path.samestat(source, output.stat())
    except (OSError, ValueError, AttributeError):  # one is not there, or standard input is no file
        return False
