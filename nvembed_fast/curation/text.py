"""What a source gives: pairs and labelled texts. And markup to plain text."""

import hashlib
import html
import re
from dataclasses import dataclass

__all__ = ["Labelled", "Pair", "drawn", "first_sentence", "from_html", "plain"]


@dataclass(frozen=True)
class Pair:
    """A query with its document, and what the document is a part of: a file, an article, a book's chapter."""

    query: str
    document: str
    source: str


@dataclass(frozen=True)
class Labelled:
    """A text with its class, and what it is a part of."""

    document: str
    label: str
    source: str


_DOCTEST = re.compile(r"^[ \t]*(>>>|\.\.\. ).*(?:\n(?![ \t]*\n)(?![ \t]*>>>).*)*", re.M)
_DIRECTIVE = re.compile(r"^([ \t]*)\.\. (?:[\w:-]+::|_[^\n]*:|\[).*(?:\n(?:\1[ \t]+.*|[ \t]*(?=\n)))*", re.M)
_KEPT_DIRECTIVE = re.compile(
    r"^[ \t]*\.\. (?:note|warning|tip|admonition|important|seealso|hint|caution|attention)::[ \t]*", re.M
)
_ROLE = re.compile(r":[\w:+-]+:`(?:[^`<]*?<)?[~!.]?([^`<>]+?)>?`")
_TITLED_ROLE = re.compile(r":[\w:+-]+:`([^`<]+?)\s*<[^`>]*>`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?")
_FIELD = re.compile(r"^[ \t]*:(?:param|type|rtype|raises?|returns?|return)\b[^:\n]*:", re.M)


def drawn(*parts: str) -> int:
    """A number of 64 bits that the texts alone decide, in the place of chance."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big")


def plain(text: str) -> str:
    """reStructuredText as one line of plain text: without doctests, directives, roles and rulers."""
    text = _DOCTEST.sub("", text)
    text = _KEPT_DIRECTIVE.sub("", text)
    text = _DIRECTIVE.sub("", text)
    text = _TITLED_ROLE.sub(r"\1", text)
    text = _ROLE.sub(r"\1", text)
    text = _LINK.sub(r"\1", text)
    text = _FIELD.sub(" ", text)
    text = re.sub(r"^[ \t]*[-=~^*#+\"'`.]{3,}[ \t]*$", "", text, flags=re.M)
    text = re.sub(r"``([^`]*)``|`([^`]*)`_{0,2}", lambda m: m[1] or m[2] or "", text)
    text = re.sub(r"\*\*([^*\n]+)\*\*", r"\1", text)
    text = re.sub(r"\|(\w+)\|", r"\1", text)
    text = re.sub(r"::(?=\s|$)", ":", text)
    return " ".join(text.split())


def from_html(text: str) -> str:
    """HTML as one line of plain text."""
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.S | re.I)
    text = re.sub(r"</?(p|li|ul|ol|div|br|tr|td|h\d|note|dd|dt)\b[^>]*>", " ", text, flags=re.I)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


def first_sentence(text: str) -> tuple[str, str]:
    """(the first sentence, the rest). A sentence ends in front of a capital letter."""
    found = re.match(r"(.{12,}?[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<! vs\.)(?<!etc\.)\s+(?=[A-Z\"'`(\[])", text)
    return (found[1], text[found.end() :]) if found else (text, "")
