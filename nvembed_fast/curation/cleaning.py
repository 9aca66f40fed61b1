"""Cleaning: which pairs are kept, each of the others with its reason.

Near duplicates are found by MinHash (Broder 1997):

1. A text is the set of its runs of SHINGLE words, each hashed to 64 bits.
2. Its signature has the minimum of each of 64 random linear functions of those numbers. Two texts agree in a
   place with a probability that is their Jaccard similarity.
3. Texts that agree in 4 places of one of 16 bands are candidates: nearly all pairs with a similarity of
   NEAR and above.
4. A candidate counts only if the similarity of the sets themselves is at least NEAR. The first text stays.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable

import numpy as np

from nvembed_fast.curation.text import Labelled, Pair

__all__ = ["NearDuplicates", "cleaned", "is_prose", "normalised", "runs", "runs_up_to"]

MIN_DOCUMENT_WORDS, MAX_DOCUMENT_WORDS, MAX_QUERY_WORDS = 10, 200, 60
MIN_LETTERS = 0.7  # of the characters that are not spaces
MAX_REPEATED_QUERIES = 2
SHINGLE, BANDS, BAND_ROWS, NEAR = 3, 16, 4, 0.8
_MIXERS = np.random.default_rng(0).integers(2**64, size=(2, BANDS * BAND_ROWS), dtype=np.uint64) | np.uint64(
    1
)
_ROLL = np.uint64(0x9E3779B97F4A7C15)


def normalised(text: str) -> str:
    """Words in lower case with single spaces: what counts as the same text."""
    return " ".join(re.findall(r"\w+", text.lower()))


def is_prose(text: str) -> bool:
    """Whether at least MIN_LETTERS of it are letters, or marks on them such as the vowel signs of Hindi."""
    letters = sum(unicodedata.category(character)[0] in "LM" for character in text)
    return letters >= MIN_LETTERS * len("".join(text.split()))


def runs(text: str, length: int) -> np.ndarray:
    """[N] uint64: a hash of each run of `length` words, sorted, each once. A shorter text is one run."""
    return np.unique([np.zeros(0, np.uint64), *runs_up_to(text, length)][-1])


def runs_up_to(text: str, length: int) -> list[np.ndarray]:
    """For 1 to `length` words, or as many as there are: [N] uint64, a hash of each run in its order."""
    words = normalised(text).encode().split()
    hashes = np.fromiter((zlib.crc32(word) for word in words), np.uint64, len(words))
    found = np.zeros(len(words), np.uint64)
    all_found = []
    for first in range(min(length, len(words))):
        # uint64 wraps around, so this is a polynomial modulo 2**64
        found = found[: len(words) - first]
        found = (found ^ (found >> np.uint64(29))) * _ROLL + hashes[first:]
        all_found.append(found)
    return all_found


class NearDuplicates:
    """Which of a stream of texts nearly repeats an earlier one."""

    def __init__(self) -> None:
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]
        self._kept: list[np.ndarray] = []

    def add(self, text: str) -> bool:
        """Whether an earlier text that was kept is that similar. If none is, this one is kept."""
        shingles = runs(text, SHINGLE)
        if not len(shingles):
            return False
        factor, offset = _MIXERS[:, :, None]
        signature = ((shingles * factor + offset) >> np.uint64(32)).min(1).astype(np.uint32)
        keys = [row.tobytes() for row in signature.reshape(BANDS, BAND_ROWS)]
        found = {number for band, key in zip(self._bands, keys, strict=True) for number in band.get(key, ())}
        for number in found:
            other = self._kept[number]
            common = len(np.intersect1d(shingles, other, assume_unique=True))
            if common >= NEAR * (len(shingles) + len(other) - common):
                return True
        for band, key in zip(self._bands, keys, strict=True):
            band.setdefault(key, []).append(len(self._kept))
        self._kept.append(shingles)
        return False


def cleaned(
    found: Iterable[Pair | Labelled], dropped: Counter[str], *, min_query_words: int, min_document_words: int
) -> list[Pair | Labelled]:
    """The pairs or labelled texts of a set that are worth training on, in their order.

    Args:
        found: in the order of the source. The first of several duplicates stays.
        dropped: gets the number of each reason.
        min_query_words: below it a query is dropped. Terms of a dictionary are one word.
        min_document_words: the same for documents.
    """
    kept: list[Pair | Labelled] = []
    seen: set[str] = set()
    near = NearDuplicates()
    queries: Counter[str] = Counter()
    for one in found:
        one = _cut(one)
        if reason := _reason(one, min_query_words, min_document_words):
            dropped[reason] += 1
        elif (key := normalised(one.document)) in seen:
            dropped["duplicate document"] += 1
        elif near.add(one.document):
            dropped["near duplicate document"] += 1
        else:
            seen.add(key)
            kept.append(one)
            if isinstance(one, Pair):
                queries[normalised(one.query)] += 1
    # a query of many documents says too little to find one
    many = {query for query, number in queries.items() if number > MAX_REPEATED_QUERIES}
    last = [one for one in kept if isinstance(one, Labelled) or normalised(one.query) not in many]
    if len(last) < len(kept):
        dropped["repeated query"] += len(kept) - len(last)
    return last


def _cut(one: Pair | Labelled) -> Pair | Labelled:
    """Spaces single, and huge texts cut."""
    document = " ".join(one.document.split(maxsplit=MAX_DOCUMENT_WORDS)[:MAX_DOCUMENT_WORDS])
    if isinstance(one, Labelled):
        return Labelled(document, one.label, one.source)
    return Pair(" ".join(one.query.split(maxsplit=MAX_QUERY_WORDS)[:MAX_QUERY_WORDS]), document, one.source)


def _reason(one: Pair | Labelled, min_query_words: int, min_document_words: int) -> str | None:
    """Why it is dropped."""
    document = one.document
    try:
        document.encode()
    except UnicodeEncodeError:
        return "no Unicode"
    if not document:
        return "empty document"
    if document.count(" ") + 1 < min_document_words:
        return "short document"
    if not is_prose(document):
        return "no prose"
    if isinstance(one, Pair):
        words = normalised(one.query).split()
        if not words:
            return "empty query"
        if len(words) < min_query_words:
            return "short query"
        if words == normalised(document).split():
            return "query is the document"
    return None
