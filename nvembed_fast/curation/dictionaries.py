"""Pairs out of dictionaries of Debian: WordNet, FOLDOC, the Jargon File and The Devil's Dictionary."""

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nvembed_fast.curation.text import Pair, drawn

__all__ = ["Synset", "asked", "devil", "foldoc", "jargon", "synsets", "wordnet_examples", "wordnet_glosses"]

# a question about a term, drawn by the term
TERM_FRAMES = ("What is {}?", "What does {} mean?", "{}", "Explain {}.", "What is meant by {}?")
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


@dataclass(frozen=True)
class Synset:
    """A meaning of WordNet.

    Attributes:
        place: where it stands, such as "wordnet noun 00001740".
        words: that have it.
        meaning: in words.
        examples: sentences that use one of the words.
        relations: (symbol, place) of others, as man wninput lists the symbols: @ is a broader meaning.
        opposites: (word, place, word there) of antonyms, the words by their numbers from 0.
    """

    place: str
    words: tuple[str, ...]
    meaning: str
    examples: tuple[str, ...] = ()
    relations: tuple[tuple[str, str], ...] = ()
    opposites: tuple[tuple[int, str, int], ...] = ()


def asked(term: str) -> str:
    """A question about a term."""
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
        yield Pair(asked(term), body, f"foldoc {term}")


def jargon(directory: Path) -> Iterator[Pair]:
    """A term of hackers finds its explanation."""
    for headword, entry in _entries(directory, "jargon"):
        body = re.sub(r"[{}]", "", entry.strip().partition("\n")[2])
        yield Pair(asked(headword), body, f"jargon {headword}")


def devil(directory: Path) -> Iterator[Pair]:
    """A word finds its mocking definition."""
    for headword, entry in _entries(directory, "devil"):
        yield Pair(asked(headword.capitalize()), entry, f"devil {headword}")


_PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}


def synsets(directory: Path) -> Iterator[Synset]:
    """The meanings of WordNet, in the order of its files."""
    for kind in ("noun", "verb", "adj", "adv"):
        file = directory / "usr/share/wordnet" / f"data.{kind}"
        for line in file.read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, _, gloss = line.partition(" | ")
            offset, _, _, number, *rest = fields.split(" ")
            end = 2 * int(number, 16)
            words = tuple(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in rest[0:end:2])
            relations, opposites = [], []
            for first in range(end + 1, end + 1 + 4 * int(rest[end]), 4):
                symbol, place, part, sides = rest[first : first + 4]
                place = f"wordnet {_PARTS_OF_SPEECH[part]} {place}"
                if symbol == "!":
                    opposites.append((int(sides[:2], 16) - 1, place, int(sides[2:], 16) - 1))
                elif sides == "0000":  # else it is one of words, not of meanings
                    relations.append((symbol, place))
            meaning = re.split(r';?\s*"', gloss.strip())[0].strip(" ;")
            examples = tuple(re.findall(r'"([^"]+)"', gloss))
            place = f"wordnet {kind} {offset}"
            yield Synset(place, words, meaning, examples, tuple(relations), tuple(opposites))


def wordnet_glosses(directory: Path) -> Iterator[Pair]:
    """A meaning finds the words that have it."""
    for synset in synsets(directory):
        if len(synset.words) > 1:
            yield Pair(synset.meaning, ", ".join(synset.words), synset.place)


def wordnet_examples(directory: Path) -> Iterator[Pair]:
    """A word with its meaning finds a sentence that uses it."""
    for synset in synsets(directory):
        for example in synset.examples[:1]:
            yield Pair(f"{synset.words[0]}: {synset.meaning}", example, synset.place)
