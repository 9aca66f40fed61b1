"""nvembed-fast synthesize."""

import argparse
import json
import os
import re
from typing import TYPE_CHECKING, Any

from nvembed_fast.cli import options, process

if TYPE_CHECKING:
    from collections.abc import Callable

    from nvembed_fast.curation.engines import Engine
    from nvembed_fast.curation.teachers import Teacher

SUMMARY = "Make a synthetic set of training text: by a language model, or by rules."
EXAMPLES = """\
examples:
  nvembed-fast synthesize -o data --engine templates --rows 30000
  nvembed-fast synthesize -o data --engine endpoint --base-url http://localhost:8000/v1 --model M --rows 9000
  nvembed-fast synthesize -o data --engine local --model ./model --rows 300
  nvembed-fast synthesize -o data --engine endpoint --model M --rows 9000 --teacher minilm --top 10"""
ENGINES = ("endpoint", "local", "templates")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", required=True, type=options.path, metavar="DIR", help="other sets in it stay"
    )
    parser.add_argument(
        "--engine",
        required=True,
        choices=ENGINES,
        help="endpoint: a server with OpenAI's chat completions. local: a decoder by transformers. "
        "templates: rules over WordNet and documentation, without a language model",
    )
    parser.add_argument("--rows", required=True, type=int, metavar="N", help="examples, before the filters")
    parser.add_argument("--name", default="synthetic", help="of the set and its file (default: %(default)s)")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="short-long, long-short, short-short")
    parser.add_argument(
        "--languages", nargs="+", default=["en"], metavar="CODE", help="of the texts (default: en)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what the prompts draw (default: 0)")
    model = parser.add_argument_group("a language model")
    model.add_argument("--model", help="as the server calls it, or a directory or hub id")
    model.add_argument(
        "--base-url",
        default=os.environ.get("OPENAI_BASE_URL"),
        help="of the endpoint (default: $OPENAI_BASE_URL)",
    )
    model.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the endpoint's key (default: %(default)s)",
    )
    model.add_argument("--parallel", type=int, default=8, help="requests at once (default: %(default)s)")
    model.add_argument("--timeout", type=float, default=120.0, help="seconds (default: 120)")
    model.add_argument("--attempts", type=int, default=3, help="at a usable answer (default: %(default)s)")
    model.add_argument("--max-tokens", type=int, default=2048, help="of an answer (default: %(default)s)")
    model.add_argument("--temperature", type=float, default=1.0, help="of sampling (default: 1)")
    model.add_argument(
        "--extra", type=_json_object, default={}, metavar="JSON", help="further keys of each request"
    )
    model.add_argument("--device", help="of a local model or a teacher (default: a GPU if there is one)")
    model.add_argument("--licence", default="not stated", help="of what the model writes, for the manifest")
    filters = parser.add_argument_group("filters")
    filters.add_argument(
        "--teacher", metavar="NAME", help="as of mine: it must find a row's positive among all documents"
    )
    filters.add_argument("--top", type=int, default=10, help="places for that (default: %(default)s)")
    filters.add_argument(
        "--without", nargs="+", default=[], metavar="TASK", help="evaluation tasks that are not compared with"
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r:.40}")
    return found


def run(arguments: argparse.Namespace) -> int:
    from nvembed_fast.curation.decontamination import loaded
    from nvembed_fast.curation.prompts import SHAPES
    from nvembed_fast.curation.synthesis import synthesize

    if complaint := _complaint(arguments):
        process.say(f"nvembed-fast synthesize: {complaint}")
        return 2
    is_model = arguments.engine != "templates"
    language_of = _language_of() if is_model else None
    teacher = _teacher(arguments.teacher, arguments.device) if arguments.teacher else None
    process.raise_interrupts()
    try:
        engine = _engine(arguments)
        entry = synthesize(
            arguments.output,
            engine,
            rows=arguments.rows,
            evaluation=loaded(process.say, without=arguments.without),
            name=arguments.name,
            shapes=arguments.shapes or SHAPES,
            languages=arguments.languages,
            seed=arguments.seed,
            attempts=arguments.attempts,
            licence=arguments.licence,
            language_of=language_of,
            teacher=teacher,
            top=arguments.top,
            say=process.say,
        )
    except RuntimeError as error:
        process.say(f"nvembed-fast synthesize: {error}")
        return 1
    for what in ("requests", "dropped"):
        counts = ", ".join(f"{number} {reason}" for reason, number in entry[what].items())
        process.say(f"note: {what}: {counts or 'none'}")
    print(f"{arguments.output / arguments.name}.jsonl: {entry['rows']} rows of {entry['tasks']} tasks")
    if missing := entry["requests"].get("without an answer"):
        process.say(
            f"note: {missing} requests have no answer. The same command asks again what did not arrive"
        )
    return 0


def _complaint(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the arguments. Here, because argparse would read these lists from the package."""
    from nvembed_fast.curation.prompts import LANGUAGES, SHAPES
    from nvembed_fast.curation.sources import TEXT_SETS
    from nvembed_fast.evaluation import tasks

    for what in ("rows", "parallel", "timeout", "attempts", "max_tokens", "top"):
        if not getattr(arguments, what) > 0:
            return f"--{what.replace('_', '-')} must be above 0, got {getattr(arguments, what)}"
    if arguments.temperature < 0:
        return f"--temperature must be 0 or above, got {arguments.temperature}"
    lists = (("shape", arguments.shapes or [], SHAPES), ("language", arguments.languages, LANGUAGES))
    for what, given, known in (*lists, ("task", arguments.without, tasks.names())):
        if unknown := [word for word in given if word not in known]:
            return f"no {what} {unknown[0]!r}: there are {', '.join(known)}"
        if len(set(given)) < len(given):
            return f"a {what} stands twice"
    if not re.fullmatch(r"\w[\w-]*", arguments.name) or arguments.name in {*TEXT_SETS, "dev", "manifest"}:
        return f"--name must be letters, digits and -, and no set of curate, got {arguments.name!r:.80}"
    if arguments.engine == "templates":
        if arguments.languages != ["en"]:
            return "the engine templates writes English alone"
        return "--model is for the other engines: leave it out" if arguments.model else None
    if not arguments.model:
        return f"--model is missing: which one does the engine {arguments.engine} ask?"
    if arguments.engine == "endpoint" and not arguments.base_url:
        return "--base-url is missing, and $OPENAI_BASE_URL is not set: where is the endpoint?"
    return None


def _engine(arguments: argparse.Namespace) -> "Engine":
    from nvembed_fast.curation import engines, templates

    if arguments.engine == "templates":
        process.say("templates: reading WordNet and documentation")
        return engines.TemplateEngine(*templates.examples())
    if arguments.engine == "local":
        return engines.LocalModel(
            arguments.model,
            device=arguments.device,
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
        )
    return engines.Endpoint(
        arguments.base_url,
        arguments.model,
        key=os.environ.get(arguments.key_variable),
        parallel=arguments.parallel,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        timeout=arguments.timeout,
        extra=arguments.extra,
    )


def _language_of() -> "Callable[[str], str]":
    try:
        import py3langid
    except ModuleNotFoundError as error:
        raise ImportError(
            "the check of languages needs py3langid: pip install 'nvembed-fast[synthesis]'"
        ) from error
    return lambda text: py3langid.classify(text)[0]


def _teacher(name: str, device: str | None) -> "Callable[[list[str], list[str], list[str]], Teacher]":
    """What makes a teacher of queries, their tasks and documents. What is missing is told now."""
    from nvembed_fast.cli.mine import encoder_loader

    loader = encoder_loader(name, device=device)

    def teacher(queries: list[str], tasks: list[str], documents: list[str]) -> "Teacher":
        import torch

        from nvembed_fast.baselines import BM25
        from nvembed_fast.curation.teachers import Bm25, Dense

        if loader is None:
            return Bm25(BM25(documents), len(documents), queries.__getitem__)
        encoder = loader()
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        with process.telling(lambda: f"making the vectors of {name}"):
            vectors = encoder.encode(queries, tasks), encoder.encode(documents, None)
        return Dense(*vectors, len(documents), where)

    return teacher
