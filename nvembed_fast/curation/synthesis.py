"""Rows for training that an engine writes: tasks, examples of them, filters, a file and its manifest entry.

1. The engine brainstorms tasks of each shape (`prompts`). A task that comes twice counts once.
2. It writes examples: the first of every task, then the second of every task, and so on.
3. The journal gets a line for each outcome when it arrives, under a hash of all that decides the answer. A
   request that has an answer there is never made again, whatever ended the run.
4. Answers that cannot be read, or that break off, are asked again up to `attempts` times, over all runs. What
   has not arrived is asked again after a while, and in the next run.
5. `_Filters` drops examples, each with its reason. What is left becomes a row {query, pos, neg, prompt,
   source}.

The invariant: the rows are a function of the journal and of the arguments, whatever the order of the answers.
"""

import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nvembed_fast import files
from nvembed_fast.curation import manifest
from nvembed_fast.curation.cleaning import NearDuplicates, is_prose, normalised
from nvembed_fast.curation.decontamination import EvaluationTexts
from nvembed_fast.curation.engines import BAD, LOST, Engine, Outcome
from nvembed_fast.curation.prompts import (
    NUM_TASKS,
    SHAPES,
    Example,
    Request,
    Shape,
    brainstorm,
    example,
    example_of,
    tasks_of,
)

if TYPE_CHECKING:
    from nvembed_fast.curation.teachers import Teacher

__all__ = ["INSTRUCTION", "Journal", "request_key", "synthesize"]

INSTRUCTION = "Given a text, retrieve texts that fit it"  # of the set, each of whose rows has its own
EXAMPLES_PER_TASK = 2  # as the paper's 120,000 rows of 60,000 tasks
TRIES = 6  # of a request in one run, until it is given up
MAX_GIVEN_UP = 20  # requests one after the other, until the run is
FIRST_WAIT_S, MAX_WAIT_S = 1.0, 60.0
TELL_EVERY_S, SYNC_EVERY_S = 10.0, 1.0
# characters of a short text and of a long one, wide enough for any script
SHORT, LONG = (1, 600), (120, 8000)
MIN_COPIED, MIN_LANGUAGE = 20, 80  # characters
_MODULES = [
    f"{__package__}.{stem}" for stem in ("cleaning", "decontamination", "manifest", "prompts", "synthesis")
]


class Journal:
    """Outcomes of requests in a file, a line of JSON each. Its methods may be called in several threads.

    A line that a kill has cut off is removed. Answers stay in the file, not in memory.

    Raises:
        ValueError: the file holds something else. Names the line.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}
        self._failures: dict[str, Counter[str]] = {}
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - open as long as the journal
        self._end = 0
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                match _parsed(line):
                    case {"request": str(key), "outcome": str(outcome), "answer": str()}:
                        self._count(key, outcome, self._end, len(line))
                    case _:
                        raise ValueError(
                            f"{path}, line {number} is no answer of an engine: remove the line, or move the "
                            "file away"
                        )
                self._end += len(line)
        self._file.truncate(self._end)
        self._synced = time.monotonic()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            os.fsync(self._file.fileno())
            self._file.close()

    def __contains__(self, key: str) -> bool:
        """Whether the request is answered."""
        return key in self._places

    def num_bad(self, key: str) -> int:
        """How often its answer was of no use."""
        return sum(self._failures.get(key, Counter())[outcome] for outcome in BAD)

    def failures(self, key: str) -> Counter[str]:
        return self._failures.get(key, Counter())

    def answer(self, key: str) -> str:
        start, length = self._places[key]
        return json.loads(os.pread(self._file.fileno(), length, start))["answer"]

    def add(self, key: str, outcome: Outcome, answer: str) -> None:
        """
        Raises:
            OSError: the disk is full, or another reason. The file is as it was.
        """
        line = json.dumps({"request": key, "outcome": outcome, "answer": answer}).encode() + b"\n"
        with self._lock:
            try:
                files.write_all(self._file.fileno(), line, self._end)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"cannot write {self.path} ({error.strerror}): answers that came before stay, and the "
                    "same command goes on",
                ) from error
            self._count(key, outcome, self._end, len(line))
            self._end += len(line)
            if time.monotonic() - self._synced >= SYNC_EVERY_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def _count(self, key: str, outcome: str, start: int, length: int) -> None:
        if outcome == "answered":
            self._places[key] = start, length
        else:
            self._failures.setdefault(key, Counter())[outcome] += 1


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def request_key(engine: Engine, request: Request) -> str:
    """32 hexadecimal digits of all that decides an answer."""
    content = json.dumps(engine.identity(request), sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def synthesize(
    directory: Path,
    engine: Engine,
    *,
    rows: int,
    evaluation: EvaluationTexts,
    name: str = "synthetic",
    shapes: Sequence[Shape] = SHAPES,
    languages: Sequence[str] = ("en",),
    seed: int = 0,
    attempts: int = 3,
    licence: str = "not stated",
    language_of: Callable[[str], str] | None = None,
    teacher: "Callable[[list[str], list[str], list[str]], Teacher] | None" = None,
    top: int = 10,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write DIRECTORY/NAME.jsonl and its entry in the manifest, which is returned.

    Args:
        directory: created. Other sets in it stay. The journal is answers/NAME.jsonl in it.
        engine: writes the texts.
        rows: examples that are asked for, spread over the shapes. Filters leave fewer.
        evaluation: what no text may stand in.
        name: of the set.
        shapes: of the tasks.
        languages: of the texts, keys of `prompts.LANGUAGES`.
        seed: of what is drawn for the prompts.
        attempts: until a request whose answers are of no use is given up.
        licence: of what the engine writes. The manifest has it.
        language_of: the code of a text's language. None: it is not checked.
        teacher: makes a teacher of queries, their tasks and documents, of which document i is the positive of
            query i. A positive must be among its `top` best documents. None: not checked.
        top: see `teacher`.
        say: gets a line for each step, and every ten seconds.

    Raises:
        ValueError: the engine has no task, or no row is left.
        RuntimeError: the engine gives no answers any more. Those that came stay.
        KeyboardInterrupt: says how many answers stay.
        BlockingIOError: another process is at work in this folder.
    """
    (directory / "answers").mkdir(parents=True, exist_ok=True)
    with (
        files.alone(directory, ".lock"),
        Journal(directory / "answers" / f"{name}.jsonl") as journal,
    ):
        share = [rows // len(shapes) + (number < rows % len(shapes)) for number in range(len(shapes))]
        plan: dict[str, Request] = {}
        for shape, wanted in zip(shapes, share, strict=True):
            for number in range(-(-wanted // (EXAMPLES_PER_TASK * NUM_TASKS))):
                request = brainstorm(shape, number, seed)
                plan[request_key(engine, request)] = request
        _ask_all("tasks", engine, plan, journal, attempts, say)
        outcomes = _outcomes(plan, journal)
        tasks = {shape: _tasks(plan, shape, journal) for shape in shapes}
        if missing := [
            shape for shape, wanted in zip(shapes, share, strict=True) if wanted and not tasks[shape]
        ]:
            raise ValueError(f"{engine.name} has given no task of the shape {missing[0]}: {_told(outcomes)}")
        plan = {}
        for shape, wanted in zip(shapes, share, strict=True):
            for request in islice(_requests(engine, shape, tasks[shape], seed, languages), wanted):
                plan[request_key(engine, request)] = request
        say(f"{sum(map(len, tasks.values()))} tasks, {len(plan)} examples of them are asked for")
        _ask_all("examples", engine, plan, journal, attempts, say)
        outcomes += _outcomes(plan, journal)
        dropped: Counter[str] = Counter()
        found = [*_filtered(plan, journal, dropped, evaluation, language_of)]
        if teacher is not None and found:
            found = _round_trip(found, teacher, top, dropped)
        if not found:
            raise ValueError(f"no row is left: {_told(outcomes)}. Dropped: {_told(dropped)}")
        digest = hashlib.sha256()
        with files.replacing(directory / f"{name}.jsonl") as part, open(part, "w", encoding="utf-8") as file:
            for row in found:
                line = json.dumps(row.to_json(), ensure_ascii=False)
                digest.update(line.encode())
                file.write(f"{line}\n")
        sets = manifest.read(directory)
        sets[name] = manifest.entry(
            directory,
            name,
            evaluation,
            task="retrieval",
            instruction=INSTRUCTION,
            in_batch=False,
            rows=len(found),
            sources=engine.sources(licence),
            dropped=dropped,
            made_of=manifest.made_of(digest.hexdigest(), _MODULES, evaluation),
        ) | {
            "engine": type(engine).__name__,
            "requests": dict(sorted(outcomes.items())),
            "tasks": sum(map(len, tasks.values())),
            "shapes": dict(sorted(Counter(row.request.shape for row in found).items())),
        }
        return manifest.write(directory, sets)["sets"][name]


def _tasks(plan: dict[str, Request], shape: Shape, journal: Journal) -> list[str]:
    """The tasks of a shape in the order of their requests, each once."""
    found: dict[str, str] = {}
    for key, request in plan.items():
        if request.shape == shape and key in journal:
            for task in tasks_of(journal.answer(key)):
                found.setdefault(normalised(task), task)
    return [*found.values()]


def _requests(
    engine: Engine, shape: Shape, tasks: Sequence[str], seed: int, languages: Sequence[str]
) -> Iterator[Request]:
    """The first example of every task, then the second of every task, as long as there are any."""
    limits = [engine.num_examples(shape, task) for task in tasks]
    for number in count():
        left = [task for task, limit in zip(tasks, limits, strict=True) if limit is None or number < limit]
        if not left:
            return
        for task in left:
            yield example(task, shape, number, seed, languages)


def _outcomes(plan: dict[str, Request], journal: Journal) -> Counter[str]:
    """How often each outcome came, over all runs, and how many requests have no answer."""
    found: Counter[str] = Counter()
    for key in plan:
        found["answered"] += key in journal
        found["without an answer"] += key not in journal
        found += journal.failures(key)
    return +found


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))


def _ask_all(
    what: str,
    engine: Engine,
    plan: dict[str, Request],
    journal: Journal,
    attempts: int,
    say: Callable[[str], None],
) -> None:
    """Ask for what the journal lacks, until all is answered or given up."""
    todo = [(key, request) for key, request in plan.items() if key not in journal]
    todo = [(key, request) for key, request in todo if journal.num_bad(key) < attempts]
    if not todo:
        return
    say(f"{what}: {len(plan) - len(todo)} of {len(plan)} are there, {len(todo)} are asked for")
    asking = _Asking(engine, journal, attempts, iter(todo))
    threads = [_Thread(asking.work) for _ in range(min(engine.parallel, len(todo)))]
    told = time.monotonic()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while not thread.is_done.wait(max(0.0, told + TELL_EVERY_S - time.monotonic())):
                if time.monotonic() - told >= TELL_EVERY_S:
                    told = time.monotonic()
                    say(f"{what}: {sum(key in journal for key in plan)} of {len(plan)} are answered")
    except KeyboardInterrupt as stop:
        asking.stop.set()
        say("waiting for the requests under way: Ctrl-C again drops them")
        with suppress(KeyboardInterrupt):
            for thread in threads:
                if thread.ident is not None:  # it was started
                    thread.is_done.wait()
        there = sum(key in journal for key in plan)
        raise KeyboardInterrupt(
            f"{there} of {len(plan)} {what} are in {journal.path}, and the same command goes on"
        ) from stop
    for thread in threads:
        if thread.error is not None:
            raise thread.error
    if asking.given_up:
        say(f"{what}: {asking.given_up} requests were given up ({_told(asking.outcomes)})")


class _Thread(threading.Thread):
    """A thread whose error is kept. At the end of the process nobody waits for it.

    `is_done` takes the place of `join`, which takes a living thread for an ended one once Ctrl-C has come in
    it (Python 3.11).
    """

    def __init__(self, work: Callable[[], None]):
        super().__init__(daemon=True)
        self._work = work
        self.error: BaseException | None = None
        self.is_done = threading.Event()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised by the one who waits
            self.error = error
        finally:
            self.is_done.set()


class _Asking:
    """What the threads of one `_ask_all` share.

    Attributes:
        stop: no further request is made.
        given_up: number of requests.
        outcomes: of this run.
    """

    def __init__(self, engine: Engine, journal: Journal, attempts: int, todo: Iterator[tuple[str, Request]]):
        self._engine, self._journal, self._attempts, self._todo = engine, journal, attempts, todo
        self._lock = threading.Lock()
        self._not_before = 0.0  # the server's limit is that of all threads
        self._in_a_row = 0
        self.stop = threading.Event()
        self.given_up = 0
        self.outcomes: Counter[str] = Counter()

    def work(self) -> None:
        """Ask for one after the other. An error stops all threads."""
        try:
            while not self.stop.is_set():
                with self._lock:
                    key, request = next(self._todo, ("", None))
                if request is None:
                    return
                self._ask(key, request)
        except BaseException:
            self.stop.set()
            raise

    def _ask(self, key: str, request: Request) -> None:
        for attempt in range(TRIES):
            self.stop.wait(max(0.0, self._not_before - time.monotonic()))
            if self.stop.is_set():
                return
            reply = self._engine.ask(request, self._journal.num_bad(key))
            outcome = reply.outcome
            if outcome == "answered" and not _is_readable(request, reply.text):
                outcome = "malformed"
            self._journal.add(key, outcome, reply.text)
            with self._lock:
                self.outcomes[outcome] += 1
            if outcome == "answered":
                self._in_a_row = 0
                return
            if self._journal.num_bad(key) >= self._attempts:
                break
            if outcome in LOST and attempt + 1 < TRIES:
                wait = max(reply.wait, min(FIRST_WAIT_S * 2**attempt, MAX_WAIT_S))
                if outcome == "rate limited":
                    self._not_before = max(self._not_before, time.monotonic() + wait)
                else:
                    self.stop.wait(wait)
        with self._lock:
            self.given_up += 1
            self._in_a_row += 1
            if self._in_a_row >= MAX_GIVEN_UP:
                raise RuntimeError(
                    f"{self._engine.name}: {MAX_GIVEN_UP} requests one after the other were given up "
                    f"({_told(self.outcomes)}). Answers that came are in {self._journal.path}"
                )


def _is_readable(request: Request, answer: str) -> bool:
    try:
        tasks_of(answer) if request.step == "tasks" else example_of(answer)
    except ValueError:
        return False
    return True


class _Row(NamedTuple):
    key: str
    request: Request
    example: Example

    def to_json(self) -> dict[str, Any]:
        return {
            "query": self.example.query,
            "pos": [self.example.positive],
            "neg": [self.example.negative],
            "prompt": self.request.task,
            "source": f"{self.request.shape} {self.key}",
        }


def _filtered(
    plan: dict[str, Request],
    journal: Journal,
    dropped: Counter[str],
    evaluation: EvaluationTexts,
    language_of: Callable[[str], str] | None,
) -> Iterator[_Row]:
    """The rows of the answers that pass, in the order of their requests."""
    queries: set[str] = set()
    near = NearDuplicates()
    for key, request in plan.items():
        if key not in journal:
            continue
        one = example_of(journal.answer(key))
        query = normalised(one.query)
        if reason := _reason(request, one, language_of):
            dropped[reason] += 1
        elif found := evaluation.found(*one):
            dropped.update(f"in {task}" for task in sorted(found))
        elif query in queries:
            dropped["duplicate query"] += 1
        elif near.add(f"{one.query} {one.positive}"):
            dropped["near duplicate"] += 1
        else:
            queries.add(query)
            yield _Row(key, request, one)


def _reason(request: Request, one: Example, language_of: Callable[[str], str] | None) -> str | None:
    """Why an example is dropped by itself."""
    query_bounds, document_bounds = (LONG if side == "long" else SHORT for side in request.shape.split("-"))
    for text, (low, high), what in zip(
        one, (query_bounds, document_bounds, document_bounds), Example._fields, strict=True
    ):
        if not low <= len(text) <= high:
            return f"length of the {what}"
        if high == LONG[1] and not is_prose(text):
            return "no prose"
    texts = [normalised(text) for text in one]
    if not all(texts):
        return "no words"
    query, positive, negative = texts
    if negative in (query, positive):
        return "negative is another text"
    shorter, longer = sorted((query, positive), key=len)
    if shorter == longer or (len(shorter) >= MIN_COPIED and shorter in longer):
        return "copied query"
    whole = " ".join(one)
    if language_of is not None and len(whole) >= MIN_LANGUAGE and language_of(whole) != request.language:
        return "another language"
    return None


def _round_trip(
    rows: list[_Row],
    teacher: "Callable[[list[str], list[str], list[str]], Teacher]",
    top: int,
    dropped: Counter[str],
) -> list[_Row]:
    """The rows whose positive the teacher finds among the positives and negatives of all."""
    queries = [row.example.query for row in rows]
    documents = [row.example.positive for row in rows] + [row.example.negative for row in rows]
    judge = teacher(queries, [row.request.task for row in rows], documents)
    kept = []
    for start in range(0, len(rows), 1024):
        numbers = range(start, min(start + 1024, len(rows)))
        _, found = judge.best(numbers, top)
        kept += [row for row, best in zip(numbers, found.tolist(), strict=True) if row in best]
    dropped["not found by the teacher"] += len(rows) - len(kept)
    return [rows[row] for row in kept]
