"""Rows: what a model scores on a task, with all that made it, one JSON file for each.

1. A row lies in FOLDER/MODEL/TASK.json. It appears whole or not at all.
2. A row whose `made_by` is that of the run is finished, so it is not computed again. `made_by` has the
   fingerprint of the model, the revision of the data, the prompt, the length and the versions, and in a row
   of a quick sample "quick": true.
3. `units` has a value for each query or text. The bootstrap draws from them.

| kind | a unit | the score |
|---|---|---|
| retrieval | nDCG@10 of a query | mean |
| classification | 1 for a right label, else 0 | mean (accuracy) |
| clustering | [label, cluster] of a text | V-measure |
| pairs | [label, cosine] of a pair | average precision |
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_fast import files

__all__ = [
    "NDCG_AT",
    "check_name",
    "finished",
    "folder_of",
    "interval",
    "ndcg",
    "read_rows",
    "row_path",
    "statistic",
    "units_of",
    "write",
]

NDCG_AT = 10
_DRAWS = 1000


def ndcg(scores: Mapping[str, float], relevant: set[str], k: int = NDCG_AT) -> float:
    """nDCG@k of one query, every relevant document worth the same.

    Args:
        scores: of documents, the larger the better. Ties go to the larger id, as in trec_eval.
        relevant: ids, at least one.
    """
    best = sorted(scores, key=lambda document: (scores[document], document), reverse=True)[:k]
    gain = sum(1 / math.log2(rank + 2) for rank, document in enumerate(best) if document in relevant)
    return gain / sum(1 / math.log2(rank + 2) for rank in range(min(k, len(relevant))))


def units_of(task: Any, predictions: Any) -> list:
    """One value for each query or text of a `LocalTask`, from what mteb predicted."""
    if task.kind == "retrieval":
        return [round(ndcg(predictions[query], task.relevant[query]), 6) for query in task.queries]
    if task.kind == "classification":
        (labels,) = predictions
        return [int(found == label) for found, label in zip(labels, task.labels, strict=True)]
    found = predictions[0] if task.kind == "clustering" else predictions["cosine_scores"]
    return [[label, round(value, 6)] for label, value in zip(task.labels, found, strict=True)]


def statistic(kind: str, units: np.ndarray) -> float:
    """The score of units: see the table above.

    Raises:
        ImportError: scikit-learn is not installed, and the kind needs it.
    """
    if kind in ("retrieval", "classification"):
        return float(units.mean())
    try:
        from sklearn import metrics
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the score of {kind} needs scikit-learn: pip install 'nvembed-fast[eval]'"
        ) from error
    if kind == "clustering":
        return float(metrics.v_measure_score(units[:, 0], units[:, 1]))
    return float(metrics.average_precision_score(units[:, 0], units[:, 1]))


def interval(rows: Sequence[Mapping[str, Any]], draws: int = _DRAWS) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over tasks of their scores.

    Each draw takes as many units as a task has, with replacement, and does so for each task on its own. The
    draws are made by seed 0. A draw has units twice, which raises a V-measure, so the draws are moved until
    their mean is the score. They do not cover what else is random, such as the starts of a clustering.

    Args:
        rows: of different tasks, each with "kind" and "units". One row gives the interval of its score.
        draws: how many.
    """
    random = np.random.default_rng(0)
    found = np.zeros(draws)
    score = 0.0
    for row in rows:
        units = np.asarray(row["units"], dtype=np.float64)
        score += statistic(row["kind"], units) / len(rows)
        for draw in range(draws):
            drawn = units[random.integers(len(units), size=len(units))]
            found[draw] += statistic(row["kind"], drawn) / len(rows)
    low, high = (np.quantile(found, [0.025, 0.975]) + (score - found.mean())).clip(0, 1)
    return float(low), float(high)


def row_path(folder: Path, model: str, task: str, is_quick: bool) -> Path:
    """Where a row lies. A quick sample's row has a name of its own."""
    return folder_of(folder, model) / f"{_file_name(task)}{'.quick' * is_quick}.json"


def folder_of(folder: Path, model: str) -> Path:
    """Where the rows of a model lie.

    Raises:
        ValueError: a folder cannot have this name.
    """
    if model in ("", ".", ".."):
        raise ValueError(f"{model!r} cannot be the name of a model's rows: give it another one (--name)")
    return folder / _file_name(model)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def check_name(folder: Path, model: str, fingerprint: str) -> None:
    """
    Raises:
        ValueError: a row of another model lies under this name. Or see `folder_of`.
    """
    rows = folder_of(folder, model)
    for path in sorted(rows.glob("*.json")):
        other = files.read_json(path).get("made_by", {}).get("fingerprint")
        if other != fingerprint:
            raise ValueError(
                f"{rows} holds rows of another model ({other}) than this one ({fingerprint}): give this one "
                "a name of its own (--name), or remove that folder"
            )


def finished(path: Path, made_by: Mapping[str, Any]) -> bool:
    """Whether the row there was made by the same model on the same data.

    Raises:
        ValueError: the file is no row.
    """
    return path.exists() and files.read_json(path).get("made_by") == made_by


def write(path: Path, row: Mapping[str, Any]) -> None:
    """Write a row, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as part:
        part.write_text(json.dumps(row, indent=None, separators=(", ", ": ")) + "\n", encoding="utf-8")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a folder, by model and task.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file is no row. The message names it.
    """
    rows = []
    for path in sorted(folder.glob("*/*.json")):
        row = files.read_json(path)
        missing = {"task", "model", "kind", "score", "units", "made_by"} - set(row)
        if not missing and "revision" not in row["made_by"]:
            missing = {"made_by.revision"}
        if missing:
            raise ValueError(f"{path} is no row of scores: it has no {min(missing)!r}")
        rows.append(row)
    if not rows:
        raise FileNotFoundError(f"{folder} has no rows: nvembed-fast eval -o {folder} writes them")
    return rows
