"""A batch of training: rows to tokenised texts, and who is a candidate of whom.

1. `Mix.draw` says which rows a step takes.
2. A row gives its query, some of its positives and some of its own negatives, drawn by (seed, step, slot).
   Of texts with a label the positive is another text of the class and the negatives are texts of other
   classes ("examples"), or the positive is the label itself and the negatives are other labels ("texts").
3. Queries carry the data set's instruction. Documents carry it where both sides are of one kind
   (`symmetric`).
4. Scopes and keys tell the loss which documents may be negatives (`loss.Candidates`). A document's keys are
   the hashes of its text, of its class among texts with a label, and, if it is a positive, of the row's
   query with its instruction. The keys of a row are that, the query's text, its class and its positives,
   also those of {query, pos} that were not drawn.
5. Ranks take neighbouring slots of the same batch. So what a step learns from does not depend on their
   number.

A thread makes the next batch while a step runs.
"""

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
import torch

from nvembed_fast.config import instruction_of
from nvembed_fast.texts import text_id
from nvembed_fast.tokenization import TextTokenizer, TokenizedTexts
from nvembed_fast.training.loss import Candidates
from nvembed_fast.training.mix import Draws, Mix
from nvembed_fast.training.recipe import DataPart
from nvembed_fast.training.rows import Labelled, Row, Rows, open_rows, to_labelled, to_row
from nvembed_fast.training.teacher_vectors import Side, TeacherVectors

__all__ = ["BatchBuilder", "Batches", "DataSet", "TrainingBatch", "open_sets"]

EVERYBODY, NOBODY, PRIVATE = 0, -2, 2**32


@dataclass(frozen=True)
class TrainingBatch:
    """What a rank computes in a step.

    Attributes:
        texts: B queries, then M documents row by row: the row's positives in front of its negatives.
        num_queries: B.
        candidates: on the CPU.
        rows: [B] data set and index of each row, for messages.
        has_own_candidates_only: no row of the step, on any rank, sees documents of another row.
    """

    texts: TokenizedTexts
    num_queries: int
    candidates: Candidates
    rows: list[tuple[str, int]]
    has_own_candidates_only: bool = False

    def part(self, rows: Sequence[int], columns: Sequence[int]) -> "TrainingBatch":
        """Some of its queries and some of its documents, by their numbers among each."""
        texts = [*rows, *(self.num_queries + column for column in columns)]
        ids, first_pooled, _ = self.texts
        return TrainingBatch(
            TokenizedTexts([ids[i] for i in texts], [first_pooled[i] for i in texts]),
            len(rows),
            self.candidates.part(list(rows), list(columns)),
            [self.rows[row] for row in rows],
            self.has_own_candidates_only,
        )


@dataclass(frozen=True)
class DataSet:
    """A file of rows and how it is used.

    Attributes:
        name: unique in a recipe.
        rows: its rows.
        settings: the `[[data]]` of the recipe.
    """

    name: str
    rows: Rows
    settings: DataPart

    def __post_init__(self) -> None:
        if not self.settings.in_batch and not self.settings.hard_negatives:
            raise ValueError(
                f"{self.name}: without negatives of their own (hard_negatives = 0) and of the batch "
                "(in_batch = false) its rows have nothing to learn from"
            )

    def instruction(self, prompt: str | None = None) -> str:
        """What stands in front of a query: the task in the published template, or a whole instruction.

        Args:
            prompt: of the row, in the place of the data set's.
        """
        return instruction_of(self.settings.instruction if prompt is None else prompt)

    def check(
        self, *, is_alone: bool = False, needs_scores: bool = False, teacher: TeacherVectors | None = None
    ) -> dict[str, str]:
        """Read every row. Raises ValueError naming the file and the line of one that cannot be used.

        Args:
            is_alone: a step has one row, so there are no documents of others.
            needs_scores, teacher: see `BatchBuilder`.

        Returns:
            Each instruction of the queries -> the place of its first row, for `Batches.check`.
        """
        sees_others, takes_own = self.settings.in_batch and not is_alone, self.settings.hard_negatives > 0
        has_negatives = sees_others or (takes_own and self.settings.labels != "none")
        instructions: dict[str, str] = {}
        for index, record in enumerate(self.rows.records()):
            parse = to_row if self.settings.labels == "none" else to_labelled
            row = parse(record, self.rows.place(index))
            prompt = None if isinstance(row, Labelled) else row.prompt
            instructions.setdefault(self.instruction(prompt), self.rows.place(index))
            has_negatives = has_negatives or (takes_own and isinstance(row, Row) and bool(row.negatives))
            if needs_scores:
                check_scores(row, self.rows.place(index))
            if teacher is not None:
                if isinstance(row, Row):
                    query, documents = row.query, [*row.positives, *row.negatives]
                else:  # its label is the document, or its text is another one's
                    query = row.text
                    documents = [row.label if self.settings.labels == "texts" else query]
                _vectors(teacher, "queries", [query])
                _vectors(teacher, "documents", documents)
        if not has_negatives:
            why, way = (
                ("train.batch = 1", "raise train.batch")
                if self.settings.in_batch
                else ("in_batch = false", "set in_batch = true")
            )
            own = 'add "neg" to its rows' if takes_own else "raise hard_negatives"
            raise ValueError(
                f"{self.name}: no row has negatives, so with {why} there is nothing to learn: {own}, or {way}"
            )
        return instructions


def open_sets(parts: Sequence[DataPart]) -> list[DataSet]:
    """Open the data sets of a recipe. Each has the name of its file, and a number where two have one name.

    Raises:
        ValueError, ImportError: see `open_rows`.
    """
    names: list[str] = []
    for part in parts:
        name = PurePath(part.file).name
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return [DataSet(name, open_rows(part.file), part) for name, part in zip(names, parts, strict=True)]


def _vectors(teacher: TeacherVectors, side: Side, texts: Sequence[str]) -> torch.Tensor:
    return teacher(side, [text_id(text) for text in texts], texts)


def check_scores(row: Row | Labelled, place: str) -> None:
    """ValueError if a text of a row has no score of a teacher."""
    if (
        isinstance(row, Labelled)
        or row.positive_scores is None
        or (row.negatives and not row.negative_scores)
    ):
        raise ValueError(
            f"{place}: no pos_scores and neg_scores for all its texts, which train.distillation needs: add "
            "them, or set it to 0"
        )


class _Picked(NamedTuple):
    """What a row gives in one step: texts, and the keys that go with them."""

    query: str
    positives: list[str]
    negatives: list[str]
    row_keys: list[int]  # never negatives of this row
    classes: list[int] | None = None  # keys of the positives, then of the negatives
    prompt: str | None = None
    scores: list[float] | None = None  # a teacher's, of the positives, then of the negatives


class _Pairs:
    """Rows {query, pos, neg}."""

    def __init__(self, data: DataSet, needs_scores: bool):
        self._data, self._needs_scores = data, needs_scores

    def check(self) -> None:
        """Each row says all of itself, so `DataSet.check` has it."""

    def pick(self, index: int, draws: Draws) -> _Picked:
        row = self._data.rows.row(index)
        of_positives = draws.sample(len(row.positives), self._data.settings.positives)
        of_negatives = draws.sample(len(row.negatives), self._data.settings.hard_negatives)
        positives = [row.positives[i] for i in of_positives]
        negatives = [row.negatives[i] for i in of_negatives]
        scores = None
        if self._needs_scores:
            check_scores(row, self._data.rows.place(index))
            scores = [(row.positive_scores or ())[i] for i in of_positives]
            scores += [(row.negative_scores or ())[i] for i in of_negatives]
        keys = [text_id(text) for text in dict.fromkeys((row.query, *row.positives))]
        return _Picked(row.query, positives, negatives, keys, prompt=row.prompt, scores=scores)


class _Classes:
    """Rows {text, label}. Their classes are read once, which takes 8 bytes a row.

    Of each class the first row is known, and the first one with another text than that.
    """

    def __init__(self, data: DataSet):
        self._data, rows = data, data.rows
        known: dict[str, int] = {}
        classes = np.empty(len(rows), dtype=np.int32)
        self._two: list[list[int]] = []
        ids: list[int] = []  # of the first rows' texts
        for index, record in enumerate(rows.records()):
            row = to_labelled(record, rows.place(index))
            classes[index] = own = known.setdefault(row.label, len(known))
            if own == len(ids):
                self._two.append([index])
                ids.append(text_id(row.text))
            elif len(self._two[own]) == 1 and text_id(row.text) != ids[own]:
                self._two[own].append(index)
        if len(known) < 2:
            raise ValueError(f"{rows.file}: all rows have one label, so there is nothing to tell apart")
        self._labels = list(known)
        self._keys = [text_id("\0".join(("class", data.name, label))) for label in known]
        self._classes = classes
        # rows of class c stand from starts[c] to starts[c + 1]
        self._members = np.argsort(classes, kind="stable").astype(np.uint32)
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(classes))])

    def check(self) -> None:
        """ValueError if a class has no two texts, so that one has no positive."""
        if self._data.settings.labels == "examples":
            for own, rows in enumerate(self._two):
                if len(rows) < 2:
                    raise self._without_positive(own, rows[0])

    def _without_positive(self, own: int, index: int) -> ValueError:
        return ValueError(
            f"{self._data.rows.place(index)}: no other text has the label {self._labels[own]!r:.80}, so it "
            'has no positive: remove the rows of the label, or use labels = "texts"'
        )

    def pick(self, index: int, draws: Draws) -> _Picked:
        return (self._texts if self._data.settings.labels == "texts" else self._examples)(index, draws)

    def _texts(self, index: int, draws: Draws) -> _Picked:
        own = int(self._classes[index])
        others = draws.sample(len(self._labels) - 1, self._data.settings.hard_negatives)
        negatives = [self._labels[other + (other >= own)] for other in others]
        text, label = self._data.rows.labelled(index).text, self._labels[own]
        return _Picked(text, [label], negatives, [text_id(text), text_id(label)])

    def _examples(self, index: int, draws: Draws) -> _Picked:
        own = int(self._classes[index])
        first, end = self._starts[own], self._starts[own + 1]
        text = self._data.rows.labelled(index).text
        # the members of the class without the row, in random order, but for those with the same text
        place = int(np.searchsorted(self._members[first:end], index))
        positives: list[str] = []
        for other in draws.sample(int(end - first) - 1, self._data.settings.positives + _TRIES):
            found = self._data.rows.labelled(int(self._members[first + other + (other >= place)])).text
            if found != text:
                positives.append(found)
            if len(positives) == self._data.settings.positives:
                break
        if not positives:
            others = [self._data.rows.labelled(row).text for row in self._two[own]]
            positives = [other for other in others if other != text][:1]
        if not positives:
            raise self._without_positive(own, index)
        # those of other classes stand in front of the class and behind it
        num_others, wanted = len(self._members) - int(end - first), self._data.settings.hard_negatives
        negatives: list[str] = []
        classes = [self._keys[own]] * len(positives)
        for other in draws.sample(num_others, wanted + _TRIES if wanted else 0):
            member = int(self._members[other if other < first else other + end - first])
            found = self._data.rows.labelled(member).text
            if found not in (text, *positives):
                negatives.append(found)
                classes.append(self._keys[self._classes[member]])
            if len(negatives) == wanted:
                break
        keys = [self._keys[own], *map(text_id, dict.fromkeys((text, *positives)))]
        return _Picked(text, positives, negatives, keys, classes)


_TRIES = 8  # further texts that are looked at if one may not be taken


class BatchBuilder:
    """Makes the batches of a run.

    Args:
        sets: the data sets. Their order gives the numbers of their scopes.
        tokenizer: of the model.
        max_length: tokens a text, instruction and marks included.
        seed: of the whole run.
        needs_scores: a teacher's scores go into the candidates, and a row without them is an error.
        teacher: whose vectors go into the candidates.

    Raises:
        ValueError: two data sets have one name, or labels that cannot be used or have no scores.
    """

    def __init__(
        self,
        sets: Sequence[DataSet],
        tokenizer: TextTokenizer,
        *,
        max_length: int,
        seed: int,
        needs_scores: bool = False,
        teacher: TeacherVectors | None = None,
    ):
        names = [data.name for data in sets]
        if len(set(names)) < len(names):
            raise ValueError(f"two data sets have one name: {', '.join(names)}")
        self._sets = {data.name: data for data in sets}
        self._numbers = {name: number for number, name in enumerate(names, start=1)}
        if needs_scores and (labelled := [d for d in sets if d.settings.labels != "none"]):
            check_scores(labelled[0].rows.labelled(0), labelled[0].rows.place(0))
        self._sources = {
            d.name: _Pairs(d, needs_scores) if d.settings.labels == "none" else _Classes(d) for d in sets
        }
        self._tokenizer, self._max_length, self._seed = tokenizer, max_length, seed
        self._teacher = teacher

    def check(self, instructions: Mapping[str, str]) -> None:
        """Raise ValueError for what would end a run in the step that draws it.

        Args:
            instructions: of the queries -> a place of each, by `DataSet.check`.
        """
        for source in self._sources.values():
            source.check()
        for instruction, place in instructions.items():
            # the end mark stands where a text would begin
            self._check_pooled(self._tokenizer([""], instruction, self._max_length), [place])

    def _check_pooled(self, found: TokenizedTexts, places: Sequence[str]) -> None:
        if (index := found.unpooled()) is not None:
            raise ValueError(
                f"{places[index]}: the instruction uses up all {self._max_length} tokens of max_length, so "
                "nothing of the text is pooled: raise max_length, or shorten it"
            )

    def build(
        self, step: int, rows: Sequence[tuple[str, int]], rank: int = 0, num_ranks: int = 1
    ) -> TrainingBatch:
        """The part of a rank in the batch of a step.

        Args:
            step: its number, which with the seed decides what is drawn from each row.
            rows: of the whole step, by `Mix.draw`.

        Raises:
            ValueError: a row cannot be used. The message names file and line.
        """
        slots = range(len(rows) * rank // num_ranks, len(rows) * (rank + 1) // num_ranks)
        picked = []
        for slot in slots:
            name, index = rows[slot]
            picked.append(self._sources[name].pick(index, Draws(self._seed, "row", step, slot)))
        sets = [self._sets[rows[slot][0]] for slot in slots]
        places = [self._sets[rows[slot][0]].rows.place(rows[slot][1]) for slot in slots]
        candidates = self._candidates(picked, sets, slots)
        if self._teacher is not None:
            documents = [text for row in picked for text in row.positives + row.negatives]
            candidates = replace(
                candidates,
                teacher_queries=_vectors(self._teacher, "queries", [row.query for row in picked]),
                teacher_documents=_vectors(self._teacher, "documents", documents),
            )
        return TrainingBatch(
            self._tokenized(picked, sets, places),
            len(picked),
            candidates,
            [rows[slot] for slot in slots],
            not any(self._sets[name].settings.in_batch for name, _ in rows),
        )

    def _candidates(self, picked: list[_Picked], sets: list[DataSet], slots: range) -> Candidates:
        positives, row_scopes, column_scopes = [], [], []
        row_keys: list[list[int]] = []
        column_keys: list[list[int]] = []
        for row, (texts, data, slot) in enumerate(zip(picked, sets, slots, strict=True)):
            private = PRIVATE + slot
            shared = (
                (self._numbers[data.name] if data.settings.separate else EVERYBODY)
                if data.settings.in_batch
                else NOBODY
            )
            row_scopes.append(shared if data.settings.in_batch else private)
            positives += [(row, len(column_keys) + i) for i in range(len(texts.positives))]
            documents = texts.positives + texts.negatives
            asked = text_id("\0".join((data.instruction(texts.prompt), texts.query)))
            row_keys.append([*texts.row_keys, asked])
            for place, text in enumerate(documents):
                keys = [text_id(text), asked if place < len(texts.positives) else 0]
                column_keys.append(keys + ([] if texts.classes is None else [texts.classes[place]]))
            column_scopes += [(shared, private)] * len(documents)
        scores = [score for texts in picked for score in texts.scores or ()]
        own = [row for row, texts in enumerate(picked) for _ in texts.scores or ()]
        return Candidates(
            positives=torch.tensor(positives, dtype=torch.int64).view(-1, 2),
            row_scopes=torch.tensor(row_scopes, dtype=torch.int64),
            column_scopes=torch.tensor(column_scopes, dtype=torch.int64).view(-1, 2),
            row_keys=_padded(row_keys),
            column_keys=_padded(column_keys),
            # with scores every document has one
            scored=torch.tensor([*enumerate(own)], dtype=torch.int64).flip(1) if scores else None,
            teacher_scores=torch.tensor(scores, dtype=torch.float32) if scores else None,
        )

    def _tokenized(self, picked: list[_Picked], sets: list[DataSet], places: list[str]) -> TokenizedTexts:
        texts = [row.query for row in picked]
        own = [data.instruction(row.prompt) for row, data in zip(picked, sets, strict=True)]
        prefixes = list(own)
        origins = list(places)
        for row, data, place, prefix in zip(picked, sets, places, own, strict=True):
            documents = row.positives + row.negatives
            texts += documents
            prefixes += [prefix if data.settings.symmetric else ""] * len(documents)
            origins += [place] * len(documents)
        ids: list[np.ndarray] = [np.empty(0, dtype=np.int32)] * len(texts)
        first_pooled, num_cut = [0] * len(texts), 0
        # the tokenizer takes the texts of one instruction at once
        for prefix in dict.fromkeys(prefixes):
            members = [i for i, other in enumerate(prefixes) if other == prefix]
            found = self._tokenizer([texts[i] for i in members], prefix, self._max_length)
            self._check_pooled(found, [origins[i] for i in members])
            num_cut += found.num_cut
            for i, text_ids, first in zip(members, found.ids, found.first_pooled, strict=True):
                ids[i], first_pooled[i] = text_ids, first
        return TokenizedTexts(ids, first_pooled, num_cut)


def _padded(keys: list[list[int]]) -> torch.Tensor:
    width = max(map(len, keys), default=1)
    return torch.tensor([some + [0] * (width - len(some)) for some in keys], dtype=torch.int64).view(
        -1, width
    )


class Batches:
    """The batches of a run: a function of the step and of the rows taken before it.

    Args:
        sets: the data sets, such as by `open_sets`. Their order gives the numbers of their scopes.
        tokenizer: of the model.
        batch: rows of a step, over all ranks.
        seed: of the whole run.
        max_length: tokens a text, instruction and marks included.
        is_one_set: all rows of a step come from one data set.
        rank: whose part of a batch is made.
        num_ranks: how many there are.
        needs_scores, teacher: see `BatchBuilder`.

    Attributes:
        sets: the data sets.
        fingerprints: data set -> 32 hexadecimal digits of its content.

    Raises:
        ValueError: a data set cannot be used, or has fewer rows than a batch.
    """

    def __init__(
        self,
        sets: Sequence[DataSet],
        tokenizer: TextTokenizer,
        *,
        batch: int,
        seed: int,
        max_length: int,
        is_one_set: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
        needs_scores: bool = False,
        teacher: TeacherVectors | None = None,
    ):
        self.sets = list(sets)
        sizes = {data.name: len(data.rows) for data in self.sets}
        weights = {data.name: data.settings.weight for data in self.sets}
        self._mix = Mix(sizes, weights, batch=batch, seed=seed, is_one_set=is_one_set)
        self._builder = BatchBuilder(
            self.sets,
            tokenizer,
            max_length=max_length,
            seed=seed,
            needs_scores=needs_scores,
            teacher=teacher,
        )
        self._rank, self._num_ranks = rank, num_ranks
        self.fingerprints = {data.name: data.rows.fingerprint for data in self.sets}

    def check(self, instructions: Mapping[str, str]) -> None:
        """See `BatchBuilder.check`. For a run that begins: one that goes on may never draw such a row."""
        self._builder.check(instructions)

    def start(self) -> dict[str, int]:
        """The rows taken before the first step, which a checkpoint keeps."""
        return self._mix.start()

    def __call__(self, step: int, counters: Mapping[str, int]) -> tuple[TrainingBatch, dict[str, int]]:
        """The batch of a step and the counters behind it.

        Raises:
            ValueError: a row cannot be used. The message names file and line.
        """
        rows, after = self._mix.draw(step, counters)
        return self._builder.build(step, rows, self._rank, self._num_ranks), after

    def ahead(
        self, start: int, stop: int, counters: Mapping[str, int]
    ) -> Generator[tuple[int, TrainingBatch, dict[str, int]]]:
        """The batches of the steps from `start` up to `stop`, each made while the step before it runs.

        Close the generator to end its thread, such as by `contextlib.closing`.

        Yields:
            The step, its batch, and the counters behind it.

        Raises:
            ValueError: a row cannot be used. It is raised in its step, and not before.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
            ahead = thread.submit(self, start, counters) if start < stop else None
            for step in range(start, stop):
                assert ahead is not None
                batch, after = ahead.result()
                if step + 1 < stop:
                    ahead = thread.submit(self, step + 1, after)
                yield step, batch, after
