"""Other forms of training data to rows {query, pos, neg} and {text, label}, line by line.

| form | a record | rows |
|---|---|---|
| triplets | anchor, positive, negative or negative_1, negative_2 .. (none is fine) | query, pos, neg |
| tevatron | query, positive_passages, negative_passages, each a list of {title, text} | query, pos, neg |
| labels | text, label | text, label |
| scores | sentence1, sentence2, score | query and pos in both directions, from a score on |

A record comes from JSON lines, CSV or TSV with a header, Arrow or Parquet. Every row is checked before it is
written, and the output appears whole or not at all.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from nvembed_fast import files
from nvembed_fast.texts import read_rows
from nvembed_fast.training.rows import ARROW_SUFFIXES, open_rows, to_labelled, to_row

__all__ = ["FIELDS", "Form", "convert"]

Form = Literal["triplets", "tevatron", "labels", "scores"]
# form -> the names that its records use
FIELDS: dict[str, tuple[str, ...]] = {
    "triplets": ("anchor", "positive", "negative"),
    "tevatron": ("query", "positive_passages", "negative_passages"),
    "labels": ("text", "label"),
    "scores": ("sentence1", "sentence2", "score"),
}


def convert(
    source: str | PathLike,
    output: str | PathLike,
    form: Form,
    *,
    fields: Mapping[str, str] | None = None,
    min_score: float | None = None,
) -> tuple[int, int]:
    """Write the records of a file as rows for training, as JSON lines.

    Args:
        source: JSON lines, .csv or .tsv (gzipped or not), .arrow or .parquet. "-" for JSON lines from
            standard input.
        output: replaced if it is there.
        form: of the records.
        fields: names of `FIELDS` to those that the file has instead. A record may lack negatives, but not
            every record those that are named here.
        min_score: of "scores": a pair counts as similar from here on. NV-Embed takes 4 of 5.

    Returns:
        The number of rows written, and of records that gave none.

    Raises:
        ValueError: a record cannot be used. The message names file and line.
    """
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    names = {name: name for name in FIELDS[form]} | dict(fields or {})
    if unknown := set(names) - set(FIELDS[form]):
        raise ValueError(f"{form} have no field {min(unknown)!r}: there are {', '.join(FIELDS[form])}")
    if (form == "scores") != (min_score is not None):
        raise ValueError(
            "scores need min_score, from which on a pair counts as similar, such as 4 of 5"
            if form == "scores"
            else f"{form} have no scores: leave min_score out"
        )
    path, target = files.expanded(source), files.expanded(output)
    unseen = next((name for field, name in (fields or {}).items() if field.startswith("negative")), None)
    num_rows = num_without = 0
    with files.replacing(target) as part, open(part, "w", encoding="utf-8") as file:
        for place, record in _records(path):
            if not isinstance(record, dict):
                raise ValueError(f"{place}: must be an object, got {type(record).__name__}")
            rows = list(_rows(record, place, form, names, min_score))
            for row in rows:
                (to_labelled if form == "labels" else to_row)(row, place)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num_rows, num_without = num_rows + len(rows), num_without + (not rows)
            if unseen is not None and _keys(record, unseen, form):
                unseen = None
        if not num_rows:
            raise ValueError(f"{path} gives no row")
        if unseen is not None:
            raise ValueError(f"{path}: no record has {unseen!r}, the last has {_told(record)}")
    return num_rows, num_without


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of a file."""
    if path.suffix.lower() not in ARROW_SUFFIXES:
        yield from read_rows(str(path))
        return
    rows = open_rows(path)
    for index, record in enumerate(rows.records()):
        yield rows.place(index), record


def _rows(
    record: dict[str, Any], place: str, form: Form, names: Mapping[str, str], min_score: float | None
) -> Iterator[dict[str, Any]]:
    for field, name in names.items():
        if name not in record and not field.startswith("negative"):  # pairs have none
            raise ValueError(f"{place}: no {name!r}, the record has {_told(record)}")
    values = [record.get(name) for name in names.values()]
    match form:
        case "triplets":
            negatives = [record[key] for key in _keys(record, names["negative"], form)]
            yield _row(values[0], _flat([values[1]]), _flat(negatives))
        case "tevatron":
            positives, negatives = ([_passage(p, place) for p in value or ()] for value in values[1:])
            yield _row(values[0], positives, negatives)
        case "labels":
            yield {"text": values[0], "label": values[1]}
        case "scores":
            score = _score(values[2], names["score"], place)
            if min_score is not None and score >= min_score and values[0] != values[1]:
                yield {"query": values[0], "pos": [values[1]]}
                yield {"query": values[1], "pos": [values[0]]}


def _keys(record: dict[str, Any], name: str, form: Form) -> list[str]:
    """Those of a record that hold its negatives. Triplets may number them."""
    numbered = re.compile(rf"{re.escape(name)}_\d+")
    others = [key for key in record if form == "triplets" and numbered.fullmatch(key)]
    return [key for key in (name, *others) if key in record]


def _told(record: dict[str, Any]) -> str:
    return f"{', '.join(map(repr, record)):.200}"


def _flat(values: list[Any]) -> list[Any]:
    """Texts and lists of texts as one list, without what is missing."""
    found: list[Any] = []
    for value in values:
        found += value if isinstance(value, list) else [] if value in (None, "") else [value]
    return found


def _row(query: Any, positives: list[Any], negatives: list[Any]) -> dict[str, Any]:
    return {"query": query, "pos": positives} | ({"neg": negatives} if negatives else {})


def _passage(passage: Any, place: str) -> str:
    """The text of a passage behind its title."""
    if isinstance(passage, str):
        return passage
    if not isinstance(passage, dict) or not isinstance(passage.get("text"), str):
        raise ValueError(f"{place}: a passage must be an object with 'text', got {passage!r:.80}")
    return f"{passage.get('title') or ''} {passage['text']}".strip()


def _score(value: Any, name: str, place: str) -> float:
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{place}: {name!r} must be a finite number, got {value!r:.40}")
    return score
