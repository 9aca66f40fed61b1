"""The command nvembed-fast: encode, search, init, info."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from nvembed_fast import __version__, checkpoint, files, ops
from nvembed_fast.config import NVEmbedConfig, PoolingHeadName
from nvembed_fast.encoder import NVEmbed, query_instruction
from nvembed_fast.network.latent_head import cheaper_form

__all__ = ["main"]

DEFAULT_MODEL = "nvidia/NV-Embed-v2"
DEFAULT_TASK = "Given a question, retrieve passages that answer the question"

EXAMPLES = {
    "encode": """\
examples:
  nvembed-fast encode passages.txt -o passages.npy
  nvembed-fast encode questions.txt -o questions.npy --task "Given a question, retrieve passages"
  nvembed-fast encode corpus.jsonl --field text -o corpus.npy --model ./my-model --dtype bfloat16
  cat passages.txt | nvembed-fast encode - -o passages.npy""",
    "search": """\
examples:
  nvembed-fast search passages.txt "how do I parse a date?"
  nvembed-fast search passages.txt "first question" "second question" --top 3
  nvembed-fast search passages.txt "how do I parse a date?" --embeddings passages.npy""",
    "init": """\
examples:
  nvembed-fast init ./Mistral-7B-v0.1 -o ./my-model
  nvembed-fast init SmolLM2-135M-Instruct.Q4_1.gguf -o ./small-model --num-latents 256""",
    "info": """\
examples:
  nvembed-fast info
  nvembed-fast info --model ./my-model""",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors a user can mend are one line on standard error."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader has gone (`| head`): keep Python from complaining again while it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, TypeError, ImportError, torch.OutOfMemoryError) as error:
        print(f"nvembed-fast {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nvembed-fast",
        description="NV-Embed text embeddings, fast.",
        epilog="examples:\n" + "\n".join(text.splitlines()[1] for text in EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nvembed-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    encode = command("encode", _encode, "Embed the texts of a file into a .npy array, one row a text.")
    encode.add_argument("file", help="one text a line, or JSON lines; - reads standard input")
    encode.add_argument(
        "-o", "--output", required=True, type=Path, metavar="OUT.npy", help="fp32 [texts, width]"
    )
    prefix = encode.add_mutually_exclusive_group()
    prefix.add_argument(
        "--instruction", default="", help="put in front of every text and left out of the pooling"
    )
    prefix.add_argument("--task", help='the same as --instruction "Instruct: TASK\\nQuery: "')
    _add_text_options(encode)
    _add_model_options(encode)

    search = command("search", _search, "Rank the texts of a file by their likeness to each question.")
    search.add_argument("file", help="one text a line, or JSON lines; - reads standard input")
    search.add_argument("question", nargs="+")
    search.add_argument("--top", type=int, default=5, help="results a question (default: 5)")
    search.add_argument("--embeddings", type=Path, metavar="OUT.npy", help="of the same file, made by encode")
    search.add_argument("--task", default=DEFAULT_TASK, help="the questions' task (default: %(default)s)")
    _add_text_options(search)
    _add_model_options(search)

    init = command("init", _init, "Start a model from a Mistral or Llama decoder, with a fresh pooling head.")
    init.add_argument("decoder", type=Path, help="a Hugging Face directory, or a .gguf file")
    init.add_argument("-o", "--output", required=True, type=Path, metavar="DIRECTORY")
    init.add_argument("--num-latents", type=int, default=512, help="latents of the head (default: 512)")
    init.add_argument("--num-heads", type=int, default=8, help="heads of the latent attention (default: 8)")
    init.add_argument("--head-width", type=int, help="their width (default: 64 under 2048 hidden, else 4096)")
    init.add_argument(
        "--pooling-head",
        default="latent",
        choices=get_args(PoolingHeadName),
        help="the published models' latent head, or one to compare it with (default: %(default)s)",
    )
    init.add_argument("--seed", type=int, default=0, help="of the fresh head (default: 0)")

    info = command("info", _info, "Versions, devices, and which implementation each operation takes and why.")
    info.add_argument("--model", help="also describe this model directory or hub id")
    return parser


def _add_text_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--field", help="read JSON lines, this key of each (default in .jsonl files: text)")
    sub.add_argument("--max-length", type=int, default=4096, help="tokens a text (default: 4096)")
    sub.add_argument("--max-batch-tokens", type=int, help="tokens a batch (default: by the device)")


def _add_model_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", default=DEFAULT_MODEL, help="directory or hub id (default: %(default)s)")
    sub.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    sub.add_argument(
        "--dtype", help="float16, bfloat16, float32, float64 (default: the checkpoint's; float32 on a CPU)"
    )
    sub.add_argument("--impl", default="auto", help="auto, triton or torch (default: auto)")
    sub.add_argument("--latents", default="auto", help="auto, direct or absorbed (default: auto)")
    hub = sub.add_argument_group("when MODEL is a hub id")
    hub.add_argument("--revision", help="branch, tag or commit")
    hub.add_argument("--token", help="for gated models (default: the one of `hf auth login`)")
    hub.add_argument("--cache-dir", help="where downloads are kept")
    hub.add_argument("--local-files-only", action="store_true", help="download nothing")


def _encode(arguments: argparse.Namespace) -> None:
    _check_output(arguments.output)
    texts = _read_texts(arguments.file, arguments.field)
    instruction = query_instruction(arguments.task) if arguments.task else arguments.instruction
    model = _load(arguments)
    _note_empty(texts)
    _check_space(arguments.output, 4 * len(texts) * model.config.hidden_size)
    vectors = model.encode(texts, instruction, output="numpy", **_encode_options(arguments))
    _save_npy(arguments.output, vectors)
    print(f"{arguments.output}: float32 [{vectors.shape[0]}, {vectors.shape[1]}]")


def _search(arguments: argparse.Namespace) -> None:
    if arguments.top < 1:
        raise ValueError(f"--top must be at least 1, got {arguments.top}")
    texts = _read_texts(arguments.file, arguments.field)
    documents = None
    if arguments.embeddings:
        documents = _load_npy(arguments.embeddings)
        if documents.ndim != 2 or len(documents) != len(texts):
            raise ValueError(
                f"{arguments.embeddings} has shape {documents.shape}, but {arguments.file} has {len(texts)} "
                "texts: make it from this file with nvembed-fast encode"
            )
    model = _load(arguments)
    options = _encode_options(arguments)
    if documents is None:
        _note_empty(texts)
        documents = model.encode_document(texts, output="numpy", **options)
    elif documents.shape[1] != model.config.hidden_size:
        raise ValueError(
            f"{arguments.embeddings} has vectors of {documents.shape[1]}, the model of "
            f"{model.config.hidden_size}: they are not of the same model"
        )
    queries = model.encode_query(arguments.question, arguments.task, output="numpy", **options)
    for question, scores in zip(arguments.question, queries @ documents.T, strict=True):
        print(f"\n{question}")
        for rank, index in enumerate(np.argsort(-scores, kind="stable")[: arguments.top], start=1):
            print(f"{rank:3}. {scores[index]:.4f}  {' '.join(texts[index].split())[:160]}")


def _init(arguments: argparse.Namespace) -> None:
    from nvembed_fast.checkpoint.decoders import init_model

    init_model(
        arguments.decoder,
        arguments.output,
        num_latents=arguments.num_latents,
        num_heads=arguments.num_heads,
        head_width=arguments.head_width,
        seed=arguments.seed,
        pooling_head=arguments.pooling_head,
    )
    head = arguments.pooling_head
    print(f"{arguments.output}: {arguments.decoder} with a fresh {head} head; train the model before use")


def _info(arguments: argparse.Namespace) -> None:
    # first, so that an error stands alone
    config = None
    if arguments.model:
        config = NVEmbedConfig.from_file(checkpoint.resolve(arguments.model) / "config.json")
    print(f"nvembed-fast {__version__}, Python {sys.version.split()[0]}")
    for package in ("torch", "triton", "transformers", "tokenizers", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            print(f"  {package} {importlib.metadata.version(package)}")
    devices = [("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        name = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}"
        devices.append((f"cuda:{index}", name))
    for device, facts in devices:
        print(f"\n{device}: {facts}")
        verdicts: dict[tuple[str, str], list[str]] = {}
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            verdict = ops.choose(torch.device(device), dtype)
            verdicts.setdefault(verdict, []).append(str(dtype).removeprefix("torch."))
        for (impl, reason), dtypes in verdicts.items():
            print(f"  in {', '.join(dtypes)} these take {impl}, because {reason}:")
            print(
                textwrap.fill(", ".join(ops.OPERATIONS), 100, initial_indent="    ", subsequent_indent="    ")
            )
    print("\nMatrix products are the library's. A shape beyond a kernel's limits takes torch.")
    if config:
        shapes = [slot.shape for slot in checkpoint.published_tensors(config).values()]
        parameters = sum(int(np.prod(shape)) for shape in shapes)
        print(f"\n{arguments.model}: {parameters:,} parameters in {len(shapes)} tensors")
        if config.pooling_head == "latent":
            form = cheaper_form(config.latent_attention_config)
            print(f"latents='auto' takes the {form} form: the cheaper one for these shapes")
        print(json.dumps(config.to_dict(), indent=2))


def _load(arguments: argparse.Namespace) -> NVEmbed:
    return NVEmbed.from_pretrained(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        impl=arguments.impl,
        latents=arguments.latents,
        revision=arguments.revision,
        token=arguments.token,
        cache_dir=arguments.cache_dir,
        local_files_only=arguments.local_files_only,
    )


def _encode_options(arguments: argparse.Namespace) -> dict:
    return {"max_length": arguments.max_length, "max_batch_tokens": arguments.max_batch_tokens}


def _read_texts(file: str, field: str | None) -> list[str]:
    """One text a line, or the strings under `field` of JSON lines. Errors name the file and the line."""
    name = "standard input" if file == "-" else file
    try:
        with _opened(file) as lines:
            texts = [line.rstrip("\r\n") for line in lines]
    except FileNotFoundError:
        raise ValueError(f"no text file {name}; - reads standard input") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}") from error
    if field is None and file.endswith(".jsonl"):
        field = "text"
    if field is not None:
        texts = [
            _field(name, number, line, field) for number, line in enumerate(texts, start=1) if line.strip()
        ]
    if not texts:
        raise ValueError(f"{name} holds no text")
    return texts


def _note_empty(texts: list[str]) -> None:
    if empty := sum(not text.strip() for text in texts):
        print(f"note: {empty} of the {len(texts)} texts are empty and are embedded as such", file=sys.stderr)


def _field(name: str, number: int, line: str, field: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{name}, line {number}: not JSON ({error})") from error
    if not isinstance(record, dict) or field not in record:
        found = f"has {', '.join(map(repr, record))}" if isinstance(record, dict) else "is no JSON object"
        raise ValueError(f"{name}, line {number}: no {field!r}, the line {found}; choose with --field")
    if not isinstance(record[field], str):
        kind = type(record[field]).__name__
        raise ValueError(f"{name}, line {number}: {field!r} must be a string, got {kind}")
    return record[field]


@contextlib.contextmanager
def _opened(file: str) -> Iterator:
    if file == "-":
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
        yield sys.stdin
    else:
        # only line feeds end a text, whatever else a line holds; a byte order mark is no part of it
        with open(file, encoding="utf-8-sig", newline="\n") as lines:
            yield lines


def _check_output(output: Path) -> None:
    """Tell what cannot work before the hours of encoding, not after."""
    if output.suffix != ".npy":
        raise ValueError(f"--output must end in .npy, got {output}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"the directory of --output does not exist: {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise PermissionError(f"the directory of --output cannot be written: {output.parent}")


def _check_space(output: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if num_bytes > free:
        raise OSError(f"{output} needs {num_bytes / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free there")


def _save_npy(output: Path, vectors: np.ndarray) -> None:
    """The file is whole or absent."""
    try:
        with files.replacing(output) as aside, open(aside, "wb") as file:
            np.save(file, vectors)
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror or error}") from error


def _load_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is no .npy array made by nvembed-fast encode") from error


if __name__ == "__main__":
    sys.exit(main())
