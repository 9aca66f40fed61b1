"""nvembed-fast mine.

The folder OUT.jsonl.mining keeps what takes long: the vectors of each teacher, and what was chosen. Its names
follow from what a file was made of. So a killed run goes on, and another rule takes the same vectors. The
output is written last, whole or not at all.
"""

import argparse
import functools
import hashlib
import json
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvembed_fast import files
from nvembed_fast.cli import options, process

if TYPE_CHECKING:
    import numpy as np

    from nvembed_fast.curation.mining import Choice, Entry, Mining, Texts
    from nvembed_fast.curation.teachers import Dense, Encoder, Teacher
    from nvembed_fast.tokenization import TextTokenizer
    from nvembed_fast.training.rows import Rows
    from nvembed_fast.training.teacher_vectors import TeacherVectors

SUMMARY = "Find hard negatives for rows of training data, with their teacher's scores."
EXAMPLES = """\
examples:
  nvembed-fast mine pairs.jsonl -o mined.jsonl --teacher minilm --teacher bm25
  nvembed-fast mine pairs.jsonl -o mined.jsonl --teacher ./model --task "Given a question, retrieve passages"
  nvembed-fast mine pairs.jsonl -o mined.jsonl --teacher minilm --rule margin=0.1 --range 10:100 --random
  nvembed-fast mine pairs.jsonl -o mined.jsonl --teacher minilm --suspects suspects.jsonl"""
_TEXTS = 256  # that are encoded at once
_CHUNK = 1024  # rows that are chosen at once
_CHARACTERS = 64  # of a text for each of its tokens
_REASONS = 5  # that are shown
_READ = {"query", "pos", "neg", "pos_scores", "neg_scores", "prompt"}  # keys of a row, the others stay


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="+", type=options.path, help="rows {query, pos}: JSON lines, Arrow, Parquet"
    )
    parser.add_argument(
        "-o", "--output", required=True, type=options.path, metavar="OUT.jsonl", help="the rows, with neg"
    )
    parser.add_argument(
        "--teacher",
        action="append",
        required=True,
        metavar="NAME",
        help="minilm, wordllama, bm25, demo, or a directory or hub id, also of sentence-transformers. "
        "Several teachers share the negatives of a row",
    )
    parser.add_argument(
        "--rows",
        type=_count,
        metavar="N",
        help="at most N rows of each file, evenly spaced. The others are not read (default: all)",
    )
    parser.add_argument(
        "--corpus",
        action="append",
        default=[],
        type=options.path,
        metavar="FILE",
        help='documents that may be negatives: lines {"text"}, or rows (default: the positives of all rows)',
    )
    parser.add_argument(
        "--negatives", type=_count, default=7, metavar="N", help="of a row, or fewer (default: %(default)s)"
    )
    parser.add_argument(
        "--rule",
        action="append",
        metavar="NAME=NUMBER",
        help="percentage=0.95, margin=0.05 or absolute=0.7: how near to the row's lowest positive a negative "
        "may be. Or none (default: percentage=0.95)",
    )
    parser.add_argument(
        "--range",
        type=_range,
        default=(0, None),
        metavar="FIRST:LAST",
        help="places of candidates that may be taken, such as 10:50; 10: passes over the nearest ten "
        "(default: 0:)",
    )
    parser.add_argument("--random", action="store_true", help="draw from the range, not its nearest ones")
    parser.add_argument("--seed", type=int, default=0, help="of --random (default: 0)")
    parser.add_argument(
        "--vectors",
        type=options.path,
        metavar="DIR",
        help="add the vectors of the first teacher but bm25 to that folder, for train.teacher of a recipe",
    )
    parser.add_argument(
        "--suspects",
        type=options.path,
        metavar="FILE",
        help="write candidates above a row's lowest positive there, for a judge",
    )
    parser.add_argument(
        "--judged",
        type=options.path,
        metavar="FILE",
        help='such a file with "is_positive" in its lines: true makes the candidate a positive of the query',
    )
    parser.add_argument(
        "--task", default="", type=options.with_new_lines, help="of the queries, for models of this package"
    )
    parser.add_argument("--symmetric", action="store_true", help="documents carry the task, too")
    parser.add_argument("--max-length", type=_count, default=256, help="tokens a text (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the teachers")


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _range(text: str) -> tuple[int, int | None]:
    first, colon, last = text.partition(":")
    try:
        found = int(first or 0), int(last) if last else None
    except ValueError:
        colon, found = "", (0, None)
    if not colon or found[0] < 0:
        raise argparse.ArgumentTypeError(f"must be FIRST:LAST, such as 10:50 or 10:, got {text!r}")
    return found


def run(arguments: argparse.Namespace) -> None:
    from nvembed_fast.training.rows import open_rows

    _check_output(arguments)
    complaint = _complaint_of(arguments.teacher, arguments.max_length)
    rows = [_Rows(_Evenly(open_rows(file), arguments.rows), complaint) for file in arguments.file]
    corpus = [_Documents(open_rows(file)) for file in arguments.corpus]
    judged = _judged(arguments.judged)
    # importing torch takes seconds: first what fails at once
    from nvembed_fast.curation.mining import Mining, Rule, Texts

    first, last = arguments.range
    mining = Mining(
        arguments.negatives,
        Rule.parse(arguments.rule or ["percentage"]),
        first,
        last,
        arguments.seed if arguments.random else None,
    )
    if mining.rule.is_in_cosines and "bm25" in arguments.teacher:
        raise ValueError("margin and absolute are differences of cosines, which bm25 has not: use percentage")
    keywords = ("task", "symmetric", "max_length", "device", "dtype")
    of_model = {name: getattr(arguments, name) for name in keywords}
    loaders = [(name, encoder_loader(name, **of_model)) for name in arguments.teacher]
    process.raise_interrupts()
    with process.telling(lambda: "reading the rows"):
        texts = Texts(rows, corpus, judged)
    kept = None
    if arguments.vectors is not None:
        if (row := texts.row_of_two_prompts()) is not None:
            raise ValueError(
                f"the query {texts.row(row)[2].query!r:.80} stands in rows with different prompts, "
                "and --vectors keeps one vector of each text: give these rows one prompt, or run without "
                "--vectors"
            )
        kept = _kept_vectors(arguments.vectors, texts)
    if arguments.task and (reason := complaint(arguments.task)):
        raise ValueError(f"--task {reason}")
    own = [name for name in arguments.teacher if _is_own(name)]
    if own and not arguments.task and (number := int((texts.prompt_ids == 0).sum())):
        process.say(
            f"note: {number} of {len(texts)} queries have no instruction, which {own[0]} expects: "
            'give --task, or "prompt" in a row'
        )
    folder = arguments.output.with_name(arguments.output.name + ".mining")
    folder.mkdir(exist_ok=True)
    with (
        files.alone(folder, ".lock"),
        process.telling_what_was_written(arguments.output, lambda: arguments.output),
    ):
        names: list[str] = []
        teachers: list[Teacher] = []
        for name, loader in loaders:
            others = kept if _dense(teachers) is None else None
            made_by, teacher = _teacher(name, loader, texts, folder, arguments, others)
            names.append(made_by)
            teachers.append(teacher)
        choice = _chosen(texts, teachers, names, mining, folder)
        if arguments.vectors is not None:
            dense = _dense(teachers)
            assert dense is not None  # by _check_output
            with files.alone(arguments.vectors, ".lock", waits=True):
                _add_vectors(arguments.vectors, texts, names[teachers.index(dense)], dense)
        _write(arguments, texts, rows, teachers, choice)


class _Evenly:
    """At most so many rows of a file, evenly spaced."""

    def __init__(self, rows: "Rows", most: int | None):
        self._rows, count = rows, len(rows)
        self._at = range(count) if most is None or most >= count else [i * count // most for i in range(most)]

    def __len__(self) -> int:
        return len(self._at)

    def record(self, index: int) -> Any:
        return self._rows.record(self._at[index])

    def place(self, index: int) -> str:
        return self._rows.place(self._at[index])


class _Rows:
    """Rows of training data as entries. `complaint` says what is wrong with a prompt, or nothing."""

    def __init__(self, rows: "Rows | _Evenly", complaint: Callable[[str], str] = lambda prompt: ""):
        self.rows, self._complaint = rows, complaint

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> str:
        return self.rows.place(index)

    def entry(self, index: int) -> "Entry":
        from nvembed_fast.curation.mining import Entry, Unusable
        from nvembed_fast.training.rows import to_row

        record, place = self.rows.record(index), self.rows.place(index)
        try:
            row = to_row(record, place)
        except ValueError as error:
            raise Unusable(str(error).removeprefix(f"{place}: ")) from error
        if row.prompt and (reason := self._complaint(row.prompt)):
            raise Unusable(f"'prompt' {reason}")
        for key in [key for key in record if key not in _READ]:
            try:
                json.dumps(record[key], allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"{place}: {key!r} cannot be written as JSON lines ({error}): remove it, or make it "
                    "a text"
                ) from error
        return Entry(row.query, row.positives, row.prompt)


class _Documents(_Rows):
    """A corpus as entries."""

    def entry(self, index: int) -> "Entry":
        from nvembed_fast.curation.mining import Entry, Unusable
        from nvembed_fast.texts import text_of

        record, place = self.rows.record(index), self.rows.place(index)
        found = record.get("text", record.get("pos")) if isinstance(record, dict) else record
        documents = [found] if isinstance(found, str) else found
        if not isinstance(documents, list) or not all(isinstance(text, str) for text in documents):
            raise Unusable("no 'text' and no 'pos' with texts")
        if not any(text.strip() for text in documents):
            raise Unusable("the text is empty")
        try:
            return Entry("", tuple(text_of(text, "a text", place) for text in documents if text.strip()))
        except ValueError as error:
            raise Unusable(str(error).removeprefix(f"{place}: ")) from error


def _check_output(arguments: argparse.Namespace) -> None:
    judged = [] if arguments.judged is None else [arguments.judged]
    taken = [path.resolve() for path in (*arguments.file, *arguments.corpus, *judged)]
    for name in ("output", "suspects"):
        path = getattr(arguments, name)
        if path is not None and path.resolve() in taken:
            raise ValueError(f"--{name} would replace {path}, which is read: choose another name")
        if path is not None and path.is_dir():
            raise IsADirectoryError(f"--{name} is a folder, and a file is wanted: {path}")
        if path is not None and not path.resolve().parent.is_dir():
            raise FileNotFoundError(f"the directory of --{name} does not exist: {path.resolve().parent}")
        taken += [] if path is None else [path.resolve()]
    _check_suspects(arguments.suspects)
    if arguments.vectors is not None:
        if set(arguments.teacher) == {"bm25"}:
            raise ValueError("--vectors keeps those of a model, and bm25 has none: name another teacher, too")
        arguments.vectors.mkdir(parents=True, exist_ok=True)


def _check_suspects(file: Path | None) -> None:
    """ValueError if a verdict would be lost, or a file that is not of suspects."""
    if file is None or not file.is_file():
        return
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                found = "" if json.loads(line)["is_positive"] is None else "has a verdict"
            except (ValueError, LookupError, TypeError, RecursionError):
                found = "is no suspect"
            if found:
                raise ValueError(
                    f"--suspects would replace {file}, whose line {number} {found}: choose another name, or "
                    "remove the file"
                )


def _judged(file: Path | None) -> dict[int, list[str]]:
    """The id of a query -> its new positives."""
    from nvembed_fast.texts import text_id, text_of
    from nvembed_fast.training.rows import open_rows

    found: dict[int, list[str]] = {}
    if file is None:
        return found
    rows = open_rows(file)
    for index, record in enumerate(rows.records()):
        match record:
            case {"query": str(query), "candidate": str(text), "is_positive": True | False | None as verdict}:
                text = text_of(text, "'candidate'", rows.place(index))
                known = found.setdefault(text_id(query), []) if verdict else [text]
                if text not in known:
                    known.append(text)
            case _:
                raise ValueError(
                    f'{rows.place(index)}: must have "query" and "candidate", as --suspects writes them, and '
                    '"is_positive", which is true, false or null'
                )
    return found


def encoder_loader(
    name: str,
    *,
    task: str = "",
    symmetric: bool = False,
    max_length: int = 256,
    device: str | None = None,
    dtype: str | None = None,
) -> "Callable[[], Encoder] | None":
    """What loads a teacher's model. None: it is bm25. What is missing is told now, before any work."""
    import importlib.util

    from nvembed_fast import baselines

    if name == "bm25":
        if importlib.util.find_spec("bm25s") is None:
            raise ImportError("the teacher bm25 needs bm25s: pip install 'nvembed-fast[data]'")
        return None
    is_own = _is_own(name)

    def load() -> "Encoder":
        import torch

        from nvembed_fast.curation.teachers import BaselineEncoder, LibraryEncoder, OwnEncoder

        with process.telling(lambda: f"loading {name}"):
            if is_own:
                from nvembed_fast.encoder import NVEmbed

                model = NVEmbed.from_pretrained(name, device=device, dtype=dtype)
                return OwnEncoder(model, task, symmetric=symmetric, max_length=max_length)
            by_autocast = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype or "")
            if name in baselines.NAMES:
                baseline = getattr(baselines, name)()
                return BaselineEncoder(baseline, dtype=by_autocast, max_length=max_length)
            from nvembed_fast.integrations.sentence_transformers import load_foreign

            foreign = load_foreign(name, device=device)
            return LibraryEncoder(foreign, dtype=by_autocast, max_length=max_length)

    return load


def _is_own(name: str) -> bool:
    """Whether a teacher is a model of this package."""
    from nvembed_fast import baselines, checkpoint

    if name == "demo" or name in baselines.NAMES:
        return name == "demo"
    config = checkpoint.resolve(name, config_only=True) / "config.json"
    return files.is_file(config) and files.read_json(config).get("model_type") == "nvembed"


def _complaint_of(teachers: list[str], max_length: int) -> Callable[[str], str]:
    """A function of a prompt: what is wrong with it for one of these teachers, or nothing.

    Only models of this package read prompts. Their tokenizers are loaded for the first one.
    """
    from nvembed_fast.config import NVEmbedConfig, instruction_of

    @functools.cache
    def tokenizers() -> "list[TextTokenizer]":
        from nvembed_fast import checkpoint
        from nvembed_fast.tokenization import TextTokenizer

        places = [checkpoint.resolve(name) for name in teachers if _is_own(name)]
        return [
            TextTokenizer.from_directory(place, NVEmbedConfig.from_file(place / "config.json"))
            for place in places
        ]

    @functools.lru_cache(2**16)
    def complaint(prompt: str) -> str:
        found = [tokenizer(["a text"], instruction_of(prompt), max_length) for tokenizer in tokenizers()]
        if any(one.unpooled() is not None for one in found):
            return f"takes all {max_length} tokens of --max-length, so that nothing of the query is left"
        return ""

    return complaint


def _teacher(
    name: str,
    loader: "Callable[[], Encoder] | None",
    texts: "Texts",
    folder: Path,
    arguments: argparse.Namespace,
    kept: "TeacherVectors | None",
) -> "tuple[str, Teacher]":
    """What the teacher's scores are made of, and the teacher, whose vectors may lie beside `kept`."""
    import torch

    from nvembed_fast.baselines import BM25
    from nvembed_fast.curation.teachers import Bm25, Dense

    longest = _CHARACTERS * arguments.max_length
    if loader is None:
        with process.telling(lambda: "making the index of bm25"):
            index = BM25([texts.document(number)[:longest] for number in range(len(texts.document_ids))])
        teacher = Bm25(index, texts.num_candidates, lambda row: texts.row(row)[2].query[:longest])
        return f"bm25 {longest}", teacher
    encoder = loader()
    if kept is not None:
        _check_teacher(arguments.vectors, kept, encoder.fingerprint)

    def of_documents(numbers: range) -> "np.ndarray":
        return encoder.encode([texts.document(number)[:longest] for number in numbers], None)

    def of_queries(numbers: range) -> "np.ndarray":
        entries = [texts.row(row)[2] for row in numbers]
        return encoder.encode([e.query[:longest] for e in entries], [e.prompt for e in entries])

    documents = _vectors(f"documents by {name}", encoder, [texts.document_ids], folder, of_documents)
    queries = _vectors(f"queries by {name}", encoder, [texts.query_ids, texts.prompt_ids], folder, of_queries)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return encoder.fingerprint, Dense(queries, documents, texts.num_candidates, device)


def _vectors(
    what: str,
    encoder: "Encoder",
    ids: "list[np.ndarray]",
    folder: Path,
    make: "Callable[[range], np.ndarray]",
) -> "np.ndarray":
    """The vectors of texts as a memory map, from the folder or made."""
    path = folder / f"vectors-{_name(what.split()[0], encoder.fingerprint, *(i.tobytes() for i in ids))}.npy"
    return _kept(what, path, (len(ids[0]), encoder.width), "float32", _TEXTS, make)


def _chosen(
    texts: "Texts", teachers: "list[Teacher]", names: list[str], mining: "Mining", folder: Path
) -> "Choice":
    """What is chosen for all rows, as memory maps."""
    import numpy as np

    from nvembed_fast.curation.mining import MAX_SUSPECTS, Choice, choose

    made_of = _name(
        "choice", *names, repr(mining), texts.query_ids.tobytes(), texts.prompt_ids.tobytes(),
        texts.document_ids.tobytes(), texts.starts.tobytes(), texts.positives.tobytes(),
        str(texts.num_candidates),
    )  # fmt: skip
    cuts = [mining.num_negatives, mining.num_negatives + MAX_SUSPECTS]

    def make(numbers: range) -> np.ndarray:
        choice = choose(texts, teachers, mining, numbers)
        return np.concatenate(
            [choice.negatives, choice.suspects, choice.by_rule[:, None], choice.by_text[:, None]], axis=1
        )

    shape = (len(texts), cuts[1] + 2)
    found = _kept("choices", folder / f"choices-{made_of}.npy", shape, "int64", _CHUNK, make)
    return Choice(found[:, : cuts[0]], found[:, cuts[0] : cuts[1]], found[:, -2], found[:, -1])


def _kept(
    what: str,
    path: Path,
    shape: tuple[int, int],
    dtype: str,
    size: int,
    make: "Callable[[range], np.ndarray]",
) -> "np.ndarray":
    """An array of the folder as a memory map. What is missing of it is made, `size` rows at a time.

    A chunk is made whole, also if some of its rows are there, so a resumed run computes the same.
    """
    import numpy as np

    from nvembed_fast.cli.partial import Partial
    from nvembed_fast.stream import TextsCut
    from nvembed_fast.vectors import Record

    if not path.exists():
        record = Record(what, path.stem, "", "", 0, dtype)
        with Partial(path, shape, dtype, record) as partial:
            missing = sorted({row // size for row in partial.missing()})
            done, start = 0, time.monotonic()

            def state() -> str:
                seconds = time.monotonic() - start
                rate = f"{done * size / seconds:.3g} a second" if done else "the first ones"
                left = (len(missing) - done) * size
                return f"{what}: {max(shape[0] - left, 0)} of {shape[0]}, {rate}"

            with process.telling(state), warnings.catch_warnings():
                warnings.simplefilter("ignore", TextsCut)  # --max-length says where
                for chunk in missing:
                    numbers = range(chunk * size, min((chunk + 1) * size, shape[0]))
                    partial.rows[numbers.start : numbers.stop] = make(numbers)
                    partial.arrived([*numbers])
                    done += 1
            partial.finish()
    return np.load(path, mmap_mode="r")


def _name(*parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _dense(teachers: "list[Teacher]") -> "Dense | None":
    from nvembed_fast.curation.teachers import Dense

    return next((teacher for teacher in teachers if isinstance(teacher, Dense)), None)


def _kept_vectors(directory: Path, texts: "Texts") -> "TeacherVectors | None":
    """What the folder of --vectors has of other files.

    Raises:
        ValueError: it has one of these queries with another prompt, or does not know the prompts.
    """
    import numpy as np

    from nvembed_fast.training.teacher_vectors import KEY_FILE, PROMPTS, TeacherVectors

    if not (files.current(directory) / KEY_FILE).is_file():
        return None
    there = TeacherVectors(directory)
    if there.prompts is None:
        raise ValueError(
            f"{directory} has no {PROMPTS}, because an earlier version made it: remove it, or choose another "
            "folder for --vectors"
        )
    _, rows, places = np.intersect1d(texts.query_ids, there.stored("queries")[0], return_indices=True)
    differs = rows[texts.prompt_ids[rows] != there.prompts[places]]
    if len(differs):
        raise ValueError(
            f"{directory} has the query {texts.row(differs[0])[2].query!r:.80} with another prompt, and "
            "keeps one vector of each text: give these rows one prompt, or choose another folder for "
            "--vectors"
        )
    return there


def _check_teacher(directory: Path, kept: "TeacherVectors", made_by: str) -> None:
    if kept.made_by != made_by:
        raise ValueError(
            f"{directory} has vectors of another teacher, or of another --max-length, --dtype, --task or "
            "--symmetric: remove it, or choose another folder for --vectors"
        )


def _add_vectors(directory: Path, texts: "Texts", made_by: str, teacher: "Dense") -> None:
    """Put the vectors beside those that the folder has of other files.

    Raises:
        ValueError: another run has meanwhile put such there that these cannot lie beside.
    """
    import numpy as np

    from nvembed_fast.training.teacher_vectors import KEY_FILE, MADE_BY, PROMPTS, Side, names

    there = _kept_vectors(directory, texts)
    if there is not None:
        _check_teacher(directory, there, made_by)
    added: dict[Side, tuple[np.ndarray, np.ndarray]] = {
        "queries": (texts.query_ids, teacher.queries),
        "documents": (texts.document_ids, teacher.documents),
    }
    together = files.replacing_together(directory, key=KEY_FILE, outdated=re.compile(""))
    with process.telling(lambda: f"writing {directory}"), together as aside:
        (aside / MADE_BY).write_text(made_by, encoding="utf-8")
        queries, prompts = texts.query_ids, texts.prompt_ids
        if there is not None and there.prompts is not None:
            queries = np.concatenate([there.stored("queries")[0], queries])
            prompts = np.concatenate([there.prompts, prompts])
        np.save(aside / PROMPTS, prompts[np.unique(queries, return_index=True)[1]])
        for side, (ids, vectors) in added.items():
            parts = [(ids, vectors)] if there is None else [there.stored(side), (ids, vectors)]
            keys = np.unique(np.concatenate([of_part for of_part, _ in parts]))
            of_keys, of_vectors = (aside / name for name in names(side))
            np.save(of_keys, keys)
            shape = (len(keys), vectors.shape[1])
            written = np.lib.format.open_memmap(of_vectors, mode="w+", dtype=np.float16, shape=shape)
            with open(of_vectors, "r+b") as file:
                files.reserve(file.fileno(), of_vectors.stat().st_size)
            for of_part, values in parts:
                for start in range(0, len(of_part), _CHUNK):
                    places = np.searchsorted(keys, of_part[start : start + _CHUNK])
                    written[places] = values[start : start + _CHUNK]
            written.flush()


def _write(
    arguments: argparse.Namespace,
    texts: "Texts",
    rows: list[_Rows],
    teachers: "list[Teacher]",
    choice: "Choice",
) -> None:
    """Write the rows and the suspects, and tell what happened."""
    import numpy as np

    _check_suspects(arguments.suspects)  # a person may have judged it meanwhile
    dense = _dense(teachers)
    num_negatives = num_fewer = num_without = num_replaced = num_suspects = 0
    with (
        _aside(arguments.suspects) as suspects,
        _aside(arguments.output) as output,
        process.telling(lambda: f"writing {arguments.output}"),
    ):
        for row in range(len(texts)):
            file, index, entry = texts.row(row)
            record = dict(rows[file].rows.record(index))
            num_replaced += bool(record.get("neg"))
            positives, negatives = texts.positives_of(row), choice.negatives[row]
            negatives = negatives[negatives >= 0]
            record["pos"] = list(entry.documents)
            record["neg"] = [texts.document(number) for number in negatives]
            record.pop("pos_scores", None)
            record.pop("neg_scores", None)
            if dense is not None:
                record["pos_scores"] = _shortest(dense.scores(np.full(len(positives), row), positives))
                record["neg_scores"] = _shortest(dense.scores(np.full(len(negatives), row), negatives))
            print(_line(record), file=output)
            num_negatives += len(negatives)
            num_fewer += 0 < len(negatives) < arguments.negatives
            num_without += not len(negatives)
            if suspects is not None:
                num_suspects += _write_suspects(
                    suspects, texts, teachers[0], row, entry, choice.suspects[row]
                )
        _check_suspects(arguments.suspects)
    print(f"{arguments.output}: {len(texts)} rows, {num_negatives} negatives")
    by_rule, by_text = choice.by_rule, choice.by_text
    notes = [
        f"{int(by_rule.sum())} candidates of {int((by_rule > 0).sum())} rows were above the rule's limit",
        f"{int(by_text.sum())} candidates were a positive or the query",
        f"{num_fewer} rows have fewer than {arguments.negatives} negatives, and {num_without} have none",
    ]
    if num_replaced:
        notes.append(f"the negatives that {num_replaced} rows had were replaced")
    if dense is None:
        notes.append("no scores were written, because those of bm25 are no cosines")
    if arguments.suspects is not None:
        notes.append(f"{arguments.suspects}: {num_suspects} candidates above a positive")
    reasons = sorted(texts.skipped.items(), key=lambda item: -item[1][0])
    notes += [f"{count} skipped, first {place}: {reason}" for reason, (count, place) in reasons[:_REASONS]]
    if len(reasons) > _REASONS:
        notes.append(f"{sum(count for _, (count, _) in reasons[_REASONS:])} skipped for other reasons")
    for note in notes:
        process.say(f"note: {note}")


@contextmanager
def _aside(path: Path | None) -> "Iterator[Any]":
    """A file to print to, which takes the place of `path` at the end."""
    if path is None:
        yield None
        return
    with files.replacing(path) as part, open(part, "w", encoding="utf-8") as file:
        yield file


def _line(record: dict[str, Any]) -> str:
    """As JSON. Half a character, which no file in UTF-8 holds, stays an escape."""
    line = json.dumps(record, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(record)
    return line


def _write_suspects(
    file: Any, texts: "Texts", teacher: "Teacher", row: int, entry: "Entry", suspects: "np.ndarray"
) -> int:
    import numpy as np

    suspects, positives = suspects[suspects >= 0], texts.positives_of(row)
    if len(suspects):
        of_positives = teacher.scores(np.full(len(positives), row), positives)
        lowest = int(of_positives.argmin())
        scores = _shortest(teacher.scores(np.full(len(suspects), row), suspects))
        for number, score in zip(suspects, scores, strict=True):
            line = {
                "query": entry.query,
                "positive": entry.documents[lowest],
                "candidate": texts.document(number),
                "positive_score": _shortest(of_positives)[lowest],
                "score": score,
                "is_positive": None,
            }
            print(_line(line), file=file)
    return len(suspects)


def _shortest(scores: "np.ndarray") -> list[float]:
    """fp32 numbers with the fewest digits that give them back."""
    return [float(str(score)) for score in scores]
