"""Pairs out of Nave's Topical Bible: a topic finds verses that its author gave to it.

Topics below the headwords of the evaluation task stay out. The verses are those of the task, because both
have the same Bible.
"""

from collections.abc import Iterator
from pathlib import Path

from nvembed_fast.curation.text import Pair, drawn
from nvembed_fast.evaluation import tasks

__all__ = ["nave_topics"]

VERSES_PER_TOPIC, MAX_VERSES = 2, 50


def nave_topics(_: Path) -> Iterator[Pair]:
    """Two verses of each topic that has no more than MAX_VERSES, drawn by a hash."""
    verses, topics = tasks.naves()
    for topic, (headword, found) in topics.items():
        if not tasks.is_test_headword(headword) and len(found) <= MAX_VERSES:
            for verse in sorted(found, key=lambda verse: drawn(topic, verse))[:VERSES_PER_TOPIC]:
                yield Pair(topic, verses[verse], f"nave {headword}")
