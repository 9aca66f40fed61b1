"""The options that encode and search share, and their way into the encoder."""

import argparse
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from nvembed_fast import files
from nvembed_fast.cli import process
from nvembed_fast.config import DEFAULT_LENGTH
from nvembed_fast.texts import Format

if TYPE_CHECKING:
    from nvembed_fast.encoder import NVEmbed

__all__ = [
    "FILE_HELP",
    "add_hub_options",
    "add_model_options",
    "add_text_options",
    "encode_options",
    "hub_options",
    "load",
    "model_name",
    "note_cut",
    "note_download",
    "note_empty",
    "path",
    "size",
    "with_new_lines",
]

DEFAULT_MODEL = "nvidia/NV-Embed-v2"
MODEL_VARIABLE = "NVEMBED_FAST_MODEL"
FILE_HELP = "one text a line, JSON lines, JSON, CSV or TSV, also gzipped; - reads standard input"


def path(text: str) -> Path:
    """A path as the shell would read it, which leaves the ~ of --output=~/x as it is."""
    return files.expanded(text)


def size(num_bytes: float) -> str:
    """A number of bytes to three digits."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB" if num_bytes < 999.5 else f"{num_bytes:.0f} GB"


def add_text_options(parser: argparse.ArgumentParser, *, ids_help: str) -> None:
    """How texts are read and cut."""
    parser.add_argument(
        "--format",
        choices=get_args(Format),
        help="of FILE, gzipped or not (default: by its suffix; else jsonl if there is --field, else text)",
    )
    parser.add_argument("--field", help="key or column of the texts (default: text)")
    parser.add_argument("--ids", metavar="KEY", help=f"key or column of the texts' ids: {ids_help}")
    parser.add_argument("--max-length", type=int, help="tokens a text (default: the model's own, else 4096)")
    parser.add_argument("--max-batch-tokens", type=int, help="tokens a batch (default: by the device)")


def add_model_options(parser: argparse.ArgumentParser, *, is_positional: bool = False) -> None:
    """Which model is loaded, where and how."""
    more: dict[str, Any] = {"nargs": "?", "metavar": "MODEL"} if is_positional else {}
    parser.add_argument(
        "model" if is_positional else "--model",
        **more,
        default=os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL,
        help=f"directory, hub id, or demo, the small model of this package where it is shipped (default: "
        f"${MODEL_VARIABLE}, else {DEFAULT_MODEL}, which is gated and has 15.7 GB)",
    )
    parser.add_argument(
        "--adapter", type=path, metavar="DIRECTORY", help="of a LoRA adapter to merge into it"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", help="float16, bfloat16, float32, float64 (default: the checkpoint's; float32 on a CPU)"
    )
    parser.add_argument("--impl", default="auto", help="auto, triton, library or torch (default: auto)")
    parser.add_argument("--latents", default="auto", help="auto, direct or absorbed (default: auto)")
    add_hub_options(parser)


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    """Which snapshot of a hub id is taken, and how."""
    hub = parser.add_argument_group("when MODEL is a hub id")
    hub.add_argument("--revision", help="branch, tag or commit")
    hub.add_argument("--token", help="for gated models (default: the one of `hf auth login`)")
    hub.add_argument("--cache-dir", type=path, help="where downloads are kept")
    hub.add_argument("--local-files-only", action="store_true", help="download nothing")


def with_new_lines(text: str) -> str:
    """The text with a new line for every backslash and n, and these two for every double backslash and n."""
    return re.sub(r"(\\?)\\n", lambda match: r"\n" if match[1] else "\n", text)


def load(arguments: argparse.Namespace) -> "NVEmbed":
    """The encoder that the model options ask for. --max-length becomes its own, where there is none."""
    from nvembed_fast.encoder import NVEmbed
    from nvembed_fast.stream import check_counts

    has_length = "max_length" in arguments
    if has_length:
        length = DEFAULT_LENGTH if arguments.max_length is None else arguments.max_length
        check_counts(length, arguments.max_batch_tokens)
    process.raise_interrupts()
    note_download(arguments.model, **hub_options(arguments))
    with process.telling(lambda: f"loading {arguments.model}"):
        model = NVEmbed.from_pretrained(
            arguments.model,
            adapter=arguments.adapter,
            device=arguments.device,
            dtype=arguments.dtype,
            impl=arguments.impl,
            latents=arguments.latents,
            **hub_options(arguments),
        )
    if has_length and arguments.max_length is None:
        arguments.max_length = model.max_seq_length
    return model


def model_name(model: str) -> str:
    """The last part of a hub id or of a directory, also of one that is written as . or .. is."""
    return os.path.basename(os.path.abspath(os.path.expanduser(model)))


def hub_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `NVEmbed.from_pretrained` that the hub options ask for."""
    names = ("revision", "token", "cache_dir", "local_files_only")
    return {name: getattr(arguments, name) for name in names}


def note_download(model: str, **hub: Any) -> None:
    """Tell on standard error how much of a model will be fetched."""
    from nvembed_fast.checkpoint import download_size

    if num_bytes := download_size(model, **hub):
        process.say(f"note: {size(num_bytes)} of {model} are fetched into the hub's cache")


def encode_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `NVEmbed.encode` that the text options ask for."""
    return {"max_length": arguments.max_length, "max_batch_tokens": arguments.max_batch_tokens}


def note_empty(texts: list[str]) -> None:
    """Tell on standard error how many texts are empty."""
    if empty := sum(not text.strip() for text in texts):
        process.say(f"note: {empty} of the {len(texts)} texts are empty and are embedded as such")


@contextmanager
def note_cut(advice_on_cut: str = "; --max-length raises it") -> Iterator[None]:
    """Inside, a warning about long texts, or an untrained model, is one line on standard error."""
    from nvembed_fast.encoder import UntrainedModel
    from nvembed_fast.stream import TextsBeyondPositions, TextsCut

    advice = {TextsCut: advice_on_cut, TextsBeyondPositions: "", UntrainedModel: ""}
    with warnings.catch_warnings():
        for category in advice:
            warnings.simplefilter("always", category)
        show = warnings.showwarning

        def note(message, category, *place):
            if category in advice:
                process.say(f"note: {message}{advice[category]}")
            else:
                show(message, category, *place)

        warnings.showwarning = note
        yield
