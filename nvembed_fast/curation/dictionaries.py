"""Pairs out of dictionaries of Debian: WordNet, FOLDOC, the Jargon File and The Devil's Dictionary."""

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

from nvembed_fast.curation.text import Pair, drawn

__all__ = ["devil", "foldoc", "jargon", "wordnet_examples", "wordnet_glosses"]

# a question about a term, drawn by the term
TERM_FRAMES = ("What is {}?", "What does {} mean?", "{}", "Explain {}.", "What is meant by {}?")
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def _asked(term: str) -> str:
    return TERM_FRAMES[drawn(term) % len(TERM_FRAMES)].format(term)


def _entries(directory: Path, name: str) -> Iterator[tuple[str, str]]:
    """(headword, entry) of a dictionary of dictd, in the order of the file."""
    base = directory / "usr/share/dictd" / name
    content = gzip.decompress(base.with_suffix(".dict.dz").read_bytes())
    found: dict[tuple[int, int], str] = {}
    for line in base.with_suffix(".index").read_text(encoding="utf-8", errors="replace").splitlines():
        headword, offset, size = line.split("\t")[:3]
        if not headword.startswith(("00-database", "00database")):
            found.setdefault((_number(offset), _number(size)), headword)
    for (first, length), headword in sorted(found.items()):
        yield headword, content[first : first + length].decode("utf-8", "replace")


def _number(digits: str) -> int:
    number = 0
    for digit in digits:
        number = number * 64 + _DIGITS.index(digit)
    return number


def foldoc(directory: Path) -> Iterator[Pair]:
    """A term of computing finds its explanation."""
    for _, entry in _entries(directory, "foldoc"):
        head, _, body = entry.strip().partition("\n\n")
        term = head.strip().split("\n")[0]
        body = re.sub(r"\n\s*\(\d{4}-\d\d-\d\d\)\s*$", "", body.rstrip())
        body = re.sub(r"\A\s*<[^>]+>|[{}]", "", body)
        yield Pair(_asked(term), body, f"foldoc {term}")


def jargon(directory: Path) -> Iterator[Pair]:
    """A term of hackers finds its explanation."""
    for headword, entry in _entries(directory, "jargon"):
        body = re.sub(r"[{}]", "", entry.strip().partition("\n")[2])
        yield Pair(_asked(headword), body, f"jargon {headword}")


def devil(directory: Path) -> Iterator[Pair]:
    """A word finds its mocking definition."""
    for headword, entry in _entries(directory, "devil"):
        yield Pair(_asked(headword.capitalize()), entry, f"devil {headword}")


def _synsets(directory: Path) -> Iterator[tuple[str, list[str], str, list[str]]]:
    """(place, words, gloss, examples) of each meaning of WordNet."""
    for kind in ("noun", "verb", "adj", "adv"):
        file = directory / "usr/share/wordnet" / f"data.{kind}"
        for line in file.read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, _, gloss = line.partition(" | ")
            offset, _, _, number, *rest = fields.split(" ")
            words = [re.sub(r"\(\w+\)$", "", rest[2 * i]).replace("_", " ") for i in range(int(number, 16))]
            meaning = re.split(r';?\s*"', gloss.strip())[0].strip(" ;")
            yield f"wordnet {kind} {offset}", words, meaning, re.findall(r'"([^"]+)"', gloss)


def wordnet_glosses(directory: Path) -> Iterator[Pair]:
    """A meaning finds the words that have it."""
    for place, words, meaning, _ in _synsets(directory):
        if len(words) > 1:
            yield Pair(meaning, ", ".join(words), place)


def wordnet_examples(directory: Path) -> Iterator[Pair]:
    """A word with its meaning finds a sentence that uses it."""
    for place, words, meaning, examples in _synsets(directory):
        for example in examples[:1]:
            yield Pair(f"{words[0]}: {meaning}", example, place)
