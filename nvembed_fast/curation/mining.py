"""Hard negatives by the rules of NV-Retriever (arXiv 2407.15831), for files that do not fit in memory.

1. `Texts` numbers the texts of files by their hash. Each text counts once, and stays in its file.
2. A teacher scores all documents for a row, and gives the best of them: see `teachers`.
3. A document whose text is the query, or a positive of any row with this query, is no candidate.
4. A document above the rule's ceiling is no candidate. The ceiling follows from the row's lowest positive, as
   in `training.loss`.
5. Of the rest, in the order of their scores, the places from `first` to `last` are the range. The best of the
   range are the negatives, or random ones of it.

The invariant: a row gets fewer negatives rather than one that was passed over. What is chosen for a row does
not depend on where a run was interrupted.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from nvembed_fast.curation.teachers import Teacher
from nvembed_fast.texts import text_id

__all__ = ["MAX_SUSPECTS", "Choice", "Entry", "Mining", "Rule", "Source", "Texts", "Unusable", "choose"]

MAX_SUSPECTS = 10  # of a row
_SLACK = 32  # candidates behind the range, for those that a rule takes away
_MAX_TEXTS = 256  # of a row's own that the search of its chunk makes room for
_MAX_FOUND = 2**20  # scores of a second search, unless a single row has more
_DEFAULTS = {"percentage": 0.95, "margin": 0.05, "absolute": 0.7}
_BOUNDS = {"percentage": (0.0, 1.0), "margin": (0.0, 2.0), "absolute": (-1.0, 1.0)}


class Entry(NamedTuple):
    """A query with its positives, or documents of a corpus, where the query is empty."""

    query: str
    documents: tuple[str, ...]
    prompt: str | None = None


class Unusable(ValueError):
    """An entry that is skipped. The message is the reason."""


class Source(Protocol):
    """A file of entries by number. `entry` raises Unusable for one that is skipped."""

    def __len__(self) -> int: ...

    def entry(self, index: int) -> Entry: ...

    def place(self, index: int) -> str: ...


@dataclass(frozen=True)
class Rule:
    """Which score is too high for a negative.

    Attributes:
        percentage: with `lowest` the row's lowest positive, a score above lowest - (1 - percentage) |lowest|.
        margin: a score above lowest - margin.
        absolute: a score above this one.
    """

    percentage: float | None = None
    margin: float | None = None
    absolute: float | None = None

    @classmethod
    def parse(cls, words: Iterable[str]) -> "Rule":
        """Read NAME or NAME=NUMBER, one or several. "none" alone is the rule that lets all pass.

        Raises:
            ValueError: a name is unknown, stands twice, or its number is out of range.
        """
        found: dict[str, float] = {}
        names = [*words]
        for word in names:
            name, equals, number = word.partition("=")
            if name == "none" and not equals and len(names) == 1:
                continue
            if name not in _DEFAULTS or name in found:
                raise ValueError(
                    f"no rule {word!r}: there are percentage, margin and absolute, each once and also with a "
                    "number (margin=0.1), and none alone"
                )
            low, high = _BOUNDS[name]
            try:
                found[name] = float(number) if equals else _DEFAULTS[name]
            except ValueError:
                found[name] = np.nan
            if not low <= found[name] <= high:
                raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {number!r}")
        return cls(**found)

    @property
    def is_in_cosines(self) -> bool:
        """Whether its numbers mean cosines, which a teacher without vectors has not."""
        return self.margin is not None or self.absolute is not None

    def ceilings(self, lowest: np.ndarray) -> np.ndarray:
        """The highest score that passes, [B] fp32, from the lowest positive of each row [B] fp32."""
        found = np.full_like(lowest, np.inf)
        if self.percentage is not None:
            found = np.minimum(found, lowest - np.float32(1 - self.percentage) * np.abs(lowest))
        if self.margin is not None:
            found = np.minimum(found, lowest - np.float32(self.margin))
        if self.absolute is not None:
            found = np.minimum(found, np.float32(self.absolute))
        return found


@dataclass(frozen=True)
class Mining:
    """How negatives are chosen.

    Attributes:
        num_negatives: of a row, shared by the teachers.
        rule: which candidates are too near.
        first: candidates that are passed over, the nearest ones first.
        last: where the range ends. None: behind the negatives, which are the nearest then.
        seed: of a random choice in the range. None: the nearest ones of it.
    """

    num_negatives: int = 7
    rule: Rule = Rule(percentage=0.95)
    first: int = 0
    last: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.num_negatives < 1 or self.first < 0:
            raise ValueError("a row needs a negative or more, and a range starts at 0 or later")
        if self.last is not None and self.last < self.first + self.num_negatives:
            raise ValueError(
                f"a range from {self.first} to {self.last} has no room for {self.num_negatives} negatives"
            )
        if self.seed is not None and self.last is None:
            raise ValueError("a random choice needs the end of its range")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"a seed must be a number from 0 to 2**63 - 1, got {self.seed}")

    @property
    def end(self) -> int:
        return self.first + self.num_negatives if self.last is None else self.last


class Texts:
    """Queries and documents of files by number. Less than 400 bytes of memory a text, whatever its length.

    Attributes:
        query_ids, prompt_ids: [R] of each row, by `text_id`. A row without a prompt has 0.
        document_ids: [N] of each document, in the order in which they came. The first `num_candidates` may be
            negatives. The others are positives that the corpus has not.
        starts, positives: the documents of row r are positives[starts[r] : starts[r + 1]], of which the first
            is the lowest number of its file.
        skipped: reason -> (how often, where first).
    """

    def __init__(
        self, rows: Sequence[Source], corpus: Sequence[Source] = (), judged: Mapping[int, Sequence[str]] = {}
    ):
        """
        Args:
            rows: whose queries get negatives.
            corpus: whose documents are candidates. Empty: those of the rows.
            judged: further positives, by the id of their query. A row gets those that it has not yet.

        Raises:
            ValueError: no row or no document can be used, or a file cannot be read.
        """
        self._sources = [*rows, *corpus]
        self.skipped: dict[str, tuple[int, str]] = {}
        places, ids, owners = _Numbers(2), _Numbers(1), _Numbers(3)
        queries, counts = _Numbers(2), _Numbers(1)
        # the corpus first, because its documents are the candidates
        for number, source in enumerate(corpus, start=len(rows)):
            self._read(number, source, ids, owners, None)
        begin = len(ids)
        if corpus and not begin:
            raise ValueError("no document of the corpus can be used" + self._first_reason())
        for number, source in enumerate(rows):
            self._read(number, source, ids, owners, (places, queries, counts))
        self._rows, (self.query_ids, self.prompt_ids) = places.array(), queries.array().T.copy()
        if not len(self._rows):
            raise ValueError("no row can be mined" + self._first_reason())
        extra = [text for query in judged for text in judged[query]]
        self._extra = extra
        for index, text in enumerate(extra):
            ids.add(text_id(text))
            owners.add(len(self._sources), index, 0)
        all_ids, owner = ids.array()[:, 0], owners.array()
        _, first, inverse = np.unique(all_ids, return_index=True, return_inverse=True)
        order = np.argsort(first)
        number_of = np.empty(len(order), dtype=np.int64)
        number_of[order] = np.arange(len(order))
        numbers = number_of[inverse.reshape(-1)]
        first = first[order]
        self.document_ids, self._owners = all_ids[first], owner[first]
        self.num_candidates = int((first < begin).sum()) if corpus else len(first)
        self._sorted = np.argsort(self.document_ids)
        count = counts.array()[:, 0]
        of_rows = numbers[begin : begin + count.sum()]
        if judged:
            parts = np.split(of_rows, np.cumsum(count)[:-1])
            for row, query in enumerate(self.query_ids.tolist()):
                new = self.find(map(text_id, judged.get(query, ())))
                parts[row] = np.append(parts[row], new[~np.isin(new, parts[row])])
            of_rows, count = np.concatenate(parts), np.array([*map(len, parts)])
        self.starts = np.concatenate([[0], np.cumsum(count)])
        self.positives = of_rows
        # rows by their query, so that the positives of all rows with one query are found together
        self._by_query = np.argsort(self.query_ids, kind="stable")
        self._sorted_queries = self.query_ids[self._by_query]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._rows)

    def row(self, row: int) -> tuple[int, int, Entry]:
        """The number of its file, its number in it, and what it says, with judged positives."""
        file, index = self._rows[row].tolist()
        entry = self._sources[file].entry(index)
        judged = self.positives_of(row)[len(entry.documents) :].tolist()
        return file, index, entry._replace(documents=(*entry.documents, *map(self.document, judged)))

    def document(self, number: int) -> str:
        file, index, place = self._owners[number].tolist()
        if file == len(self._sources):
            return self._extra[index]
        return self._sources[file].entry(index).documents[place]

    def positives_of(self, row: int) -> np.ndarray:
        """The documents of a row, in the order of its file, then judged ones. A text that its file has twice
        is there twice."""
        return self.positives[self.starts[row] : self.starts[row + 1]]

    def passed_over(self, row: int) -> np.ndarray:
        """Documents that are no candidates of a row: positives of its query, and the query itself."""
        query = self.query_ids[row]
        low = np.searchsorted(self._sorted_queries, query, side="left")
        high = np.searchsorted(self._sorted_queries, query, side="right")
        rows = self._by_query[low:high]
        return np.unique(np.concatenate([*map(self.positives_of, rows), self.find([int(query)])]))

    def row_of_two_prompts(self) -> int | None:
        """A row whose query has another prompt in another row."""
        prompts = self.prompt_ids[self._by_query]
        differs = (np.diff(self._sorted_queries) == 0) & (np.diff(prompts) != 0)
        return int(self._by_query[differs.argmax()]) if differs.any() else None

    def find(self, ids: Iterable[int]) -> np.ndarray:
        """The numbers of the documents with these ids, without those that are not there."""
        wanted = np.fromiter(ids, dtype=np.int64)
        places = np.searchsorted(self.document_ids, wanted, sorter=self._sorted)
        numbers = self._sorted[np.minimum(places, len(self._sorted) - 1)]
        return numbers[self.document_ids[numbers] == wanted]

    def _read(
        self,
        number: int,
        source: Source,
        ids: "_Numbers",
        owners: "_Numbers",
        rows: "tuple[_Numbers, _Numbers, _Numbers] | None",
    ) -> None:
        for index in range(len(source)):
            try:
                entry = source.entry(index)
            except Unusable as reason:
                count, place = self.skipped.get(str(reason), (0, source.place(index)))
                self.skipped[str(reason)] = count + 1, place
                continue
            for position, text in enumerate(entry.documents):
                ids.add(text_id(text))
                owners.add(number, index, position)
            if rows is not None:
                places, queries, counts = rows
                places.add(number, index)
                queries.add(text_id(entry.query), 0 if entry.prompt is None else text_id(entry.prompt))
                counts.add(len(entry.documents))

    def _first_reason(self) -> str:
        return next((f": {place}: {reason}" for reason, (_, place) in self.skipped.items()), "")


class _Numbers:
    """A growing array of int64 rows, without an object for each."""

    def __init__(self, width: int):
        self._rows, self._count = np.empty((1024, width), dtype=np.int64), 0

    def __len__(self) -> int:
        return self._count

    def add(self, *values: int) -> None:
        if self._count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[self._count] = values
        self._count += 1

    def array(self) -> np.ndarray:
        return self._rows[: self._count].copy()


class Choice(NamedTuple):
    """What is chosen for B rows.

    Attributes:
        negatives: [B, num_negatives] documents, teacher by teacher, -1 where there are fewer.
        suspects: [B, MAX_SUSPECTS] documents that the first teacher puts above the lowest positive.
        by_rule, by_text: [B] how many candidates they took away among those that were looked at.
    """

    negatives: np.ndarray
    suspects: np.ndarray
    by_rule: np.ndarray
    by_text: np.ndarray


def choose(texts: Texts, teachers: Sequence[Teacher], mining: Mining, rows: range) -> Choice:
    """Choose the negatives of neighbouring rows."""
    negatives = np.full((len(rows), mining.num_negatives), -1, dtype=np.int64)
    suspects = np.full((len(rows), MAX_SUSPECTS), -1, dtype=np.int64)
    by_rule, by_text = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    queries = texts.query_ids[rows.start : rows.stop].tolist()
    of_query = {query: texts.passed_over(row) for query, row in dict(zip(queries, rows, strict=True)).items()}
    passed_over = [of_query[query] for query in queries]
    num_taken = np.zeros(len(rows), dtype=np.int64)
    for number, teacher in enumerate(teachers):
        share = mining.num_negatives // len(teachers) + (number < mining.num_negatives % len(teachers))
        lowest = _lowest(texts, teacher, rows)
        ceilings = mining.rule.ceilings(lowest)
        for i, scores, found in _candidates(teacher, rows, mining.end, passed_over, ceilings):
            is_text = np.isin(found, passed_over[i])
            is_above = (scores > ceilings[i]) & ~is_text
            by_text[i] += is_text.sum()
            by_rule[i] += is_above.sum()
            if number == 0:
                near = found[(scores > lowest[i]) & ~is_text][:MAX_SUSPECTS]
                suspects[i, : len(near)] = near
            window = found[~is_text & ~is_above][mining.first : mining.end]
            window = window[~np.isin(window, negatives[i])]
            kept = _drawn(texts, rows[i], window, share, mining.seed)
            negatives[i, num_taken[i] : num_taken[i] + len(kept)] = kept
            num_taken[i] += len(kept)
    return Choice(negatives, suspects, by_rule, by_text)


def _lowest(texts: Texts, teacher: Teacher, rows: range) -> np.ndarray:
    """The lowest score of a positive of each row, [B] fp32."""
    counts = np.diff(texts.starts[rows.start : rows.stop + 1])
    documents = texts.positives[texts.starts[rows.start] : texts.starts[rows.stop]]
    scores = teacher.scores(np.repeat(np.arange(rows.start, rows.stop), counts), documents)
    return np.minimum.reduceat(scores, np.concatenate([[0], np.cumsum(counts)[:-1]]))


def _candidates(
    teacher: Teacher, rows: range, wanted: int, passed_over: Sequence[np.ndarray], ceilings: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The place of each row, and the scores and numbers of its best documents, far enough for `wanted`.

    A search without ceilings sees what the rule takes away. Where it ends before there are enough, a second
    one passes over what is above the ceiling, so the result is exact. Both compute the same scores up to
    rounding. What the first has found is not asked again.
    """
    num_texts = np.array([*map(len, passed_over)])
    scores, found = teacher.best(rows, wanted + min(int(num_texts.max()), _MAX_TEXTS) + _SLACK)
    allowed = (scores <= ceilings[:, None]) & (found >= 0)
    short = [
        i
        for i, over in enumerate(passed_over)
        if found[i, -1] >= 0 and (allowed[i] & ~np.isin(found[i], over)).sum() < wanted
    ]
    for i in {*range(len(rows))}.difference(short):
        there = found[i] >= 0
        yield i, scores[i, there], found[i, there]
    for part in _parts(sorted(short, key=lambda i: num_texts[i]), wanted + num_texts + _SLACK):
        k = wanted + int(num_texts[part[-1]]) + _SLACK
        more = teacher.best(np.array([rows[i] for i in part]), k, ceilings[part])
        for i, more_scores, more_found in zip(part, *more, strict=True):
            is_new = (more_found >= 0) & ~np.isin(more_found, found[i])
            yield i, np.append(scores[i], more_scores[is_new]), np.append(found[i], more_found[is_new])


def _parts(order: Sequence[int], sizes: np.ndarray) -> Iterator[list[int]]:
    """Rows, in the order of their sizes, in parts: the largest size of each times its rows is bounded."""
    part: list[int] = []
    for i in order:
        if part and (len(part) + 1) * sizes[i] > _MAX_FOUND:
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def _drawn(texts: Texts, row: int, window: np.ndarray, count: int, seed: int | None) -> np.ndarray:
    """`count` of a range: the first ones, or those whose hash with the row's query comes first."""
    if seed is None or len(window) <= count:
        return window[:count]

    def draw(number: int) -> bytes:
        key = np.array([seed, texts.query_ids[row], texts.document_ids[number]], dtype="<i8").tobytes()
        return hashlib.blake2b(key, digest_size=8).digest()

    drawn = sorted(range(len(window)), key=lambda place: draw(int(window[place])))[:count]
    return window[sorted(drawn)]
