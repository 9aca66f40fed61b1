"""Pairs out of the docstrings of Python packages.

| function | query | document |
|---|---|---|
| `summaries` | the first sentence | the rest |
| `questions` | the first sentence as a question (`questions.question`) | name: docstring |
| `sources` | the first sentence | the function without its docstring |
"""

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from nvembed_fast import packages
from nvembed_fast.curation.questions import question
from nvembed_fast.curation.text import Pair, drawn, first_sentence, plain

__all__ = ["questions", "sources", "summaries", "summary"]

MAX_SOURCE_BYTES = 800_000
MIN_REST_WORDS = 12
_SKIPPED = re.compile(
    r"(^|/)(tests?|testing|_?vendor[^/]*|_?extern(als?)?|thirdparty|benchmarks?|conftest\.py|.*_test\.py|test_[^/]*)(/|$)"
)
_SECTION = re.compile(r"^[ \t]*(\w[\w ]*)\n[ \t]*[-=~^]{3,}[ \t]*$", re.M)
_NO_PROSE = ("Examples", "Example", "References", "See Also", "Methods", "Attributes")


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def summaries(archive: Path) -> Iterator[Pair]:
    """The first sentence finds the rest."""
    for place, _, sentence, rest in _documented(archive):
        yield Pair(sentence, rest, place)


def questions(archive: Path) -> Iterator[Pair]:
    """A question finds "name: docstring". Half of the long ones stand without the question's sentence."""
    for place, node, sentence, rest in _documented(archive):
        if asked := question(sentence):
            is_short = drawn(sentence, "document") % 2 and len(rest.split()) >= MIN_REST_WORDS
            yield Pair(asked, f"{node.name}: {rest if is_short else f'{sentence} {rest}'}", place)


def sources(archive: Path) -> Iterator[Pair]:
    """The first sentence finds the source of the function."""
    for place, node, sentence, _ in _documented(archive):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
            node.body, node.decorator_list = node.body[1:], []
            yield Pair(sentence, ast.unparse(node)[:1500], place)


def summary(docstring: str) -> str:
    """The first sentence of a docstring, as `summaries` gives it."""
    return first_sentence(_prose(docstring)[0])[0]


def _documented(
    archive: Path,
) -> Iterator[tuple[str, Definition, str, str]]:
    """(file, function or class, first sentence, rest) of all documented ones."""
    for name, content in packages.members(archive, "*.py"):
        inside = name.partition("/")[2]
        if _SKIPPED.search(inside) or len(content) > MAX_SOURCE_BYTES:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # about escapes of old files
                tree = ast.parse(content)
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in _definitions(tree):
            docstring = ast.get_docstring(node)
            if docstring and not node.name.startswith("_"):
                first, rest = _prose(docstring)
                sentence, more = first_sentence(first)
                yield name, node, sentence, f"{more} {rest}".strip()


def _definitions(node: ast.AST) -> Iterator[Definition]:
    """Functions and classes below a node. Expressions have none, and are most of a file."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            if isinstance(child, Definition):
                yield child
            yield from _definitions(child)


def _prose(docstring: str) -> tuple[str, str]:
    """(first paragraph, rest) of a docstring, without examples, references and markup."""
    parts = _SECTION.split(docstring)
    kept = [parts[0]]
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        if heading.strip() not in _NO_PROSE:
            kept.append(f"{heading}: {text}" if heading.strip() != "Notes" else text)
    first, _, rest = kept[0].strip().partition("\n\n")
    return plain(first), plain("\n\n".join([rest, *kept[1:]]))
