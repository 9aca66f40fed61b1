"""Pairs out of descriptions that programs carry with them: botocore's services and Ansible's modules."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

from nvembed_fast import packages
from nvembed_fast.curation.questions import question
from nvembed_fast.curation.text import Pair, first_sentence, from_html, plain

__all__ = ["ansible_modules", "aws_operations", "aws_questions", "aws_types"]


def _services(archive: Path) -> Iterator[tuple[str, dict]]:
    """(file, service) in its newest version."""
    newest: dict[str, tuple[str, bytes]] = {}
    for name, content in packages.members(archive, "*/botocore/data/*/service-2.json*"):
        newest[name.split("/")[-3]] = (name, content)
    for name, content in newest.values():
        yield name, json.loads(gzip.decompress(content) if name.endswith(".gz") else content)


def _operations(archive: Path) -> Iterator[tuple[str, str, str, str]]:
    """(file, the service's name, the operation's name in words, its documentation)."""
    for file, service in _services(archive):
        title = service["metadata"]["serviceFullName"]
        for name, operation in sorted(service["operations"].items()):
            yield file, title, _words(name), from_html(operation.get("documentation", ""))


def aws_operations(archive: Path) -> Iterator[Pair]:
    """The name of an operation in words, with its service, finds its documentation."""
    for file, title, name, text in _operations(archive):
        yield Pair(f"{name} in {title}", text, file)


def aws_questions(archive: Path) -> Iterator[Pair]:
    """A question made from the first sentence finds the rest, or all where there is little more."""
    for file, _, _, text in _operations(archive):
        summary, rest = first_sentence(text)
        if asked := question(summary):
            yield Pair(asked, rest if len(rest.split()) >= 12 else text, file)


def aws_types(archive: Path) -> Iterator[Pair]:
    """The name of a type of a service in words finds its documentation."""
    for file, service in _services(archive):
        title = service["metadata"]["serviceFullName"]
        for name, shape in sorted(service["shapes"].items()):
            yield Pair(f"{_words(name)} in {title}", from_html(shape.get("documentation", "")), file)


def _words(name: str) -> str:
    """A name in CamelCase as words."""
    found = re.findall(r"[A-Z]{2,}(?![a-z])|[A-Z][a-z0-9]*|[a-z0-9]+", name)
    return " ".join(word if word.isupper() and len(word) > 1 else word.lower() for word in found)


def ansible_modules(archive: Path) -> Iterator[Pair]:
    """The short description of a module finds the long one."""
    import yaml  # type: ignore[import-untyped]

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for name, content in packages.members(archive, "*/plugins/*.py"):
        found = re.search(
            r'^DOCUMENTATION = r?(["\']{3})(.*?)\1', content.decode("utf-8", "replace"), re.M | re.S
        )
        if not found:
            continue
        try:
            fields = yaml.load(found[2], loader)
        except yaml.YAMLError:
            continue
        if isinstance(fields, dict) and fields.get("short_description") and fields.get("description"):
            text = fields["description"]
            text = " ".join(map(str, text)) if isinstance(text, list) else str(text)
            text = re.sub(r"\b[A-Z]+\(([^()]*)\)", r"\1", text)
            yield Pair(
                str(fields["short_description"]),
                plain(text),
                "/".join(name.split("/")[:3]),
            )
