"""Rows as one table of tasks and models, with bootstrap intervals, and as a picture of bars."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nvembed_fast import files
from nvembed_fast.evaluation import scores, tasks

__all__ = ["draw", "new_figure", "put_into", "rewrite", "summary", "table"]

_MEANS = {"retrieval": "retrieval, mean", "other": "others, mean"}
_MEASURES = {
    "retrieval": "nDCG@10",
    "classification": "accuracy",
    "clustering": "V-measure",
    "pairs": "average precision",
}
Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of our own tasks: a line for each, a column for each model, and two means.

    A cell has the score and its 95 % bootstrap interval. A mean stands only where a model has all the tasks
    that any model has. Rows of quick samples have lines of their own. They and `tasks.OWN` count in no mean.

    Raises:
        ValueError: rows of one task were made on different data, which does not compare.
    """
    by_line = _by_line(rows)
    models = _models(rows)
    lines = [
        "| task | measure | " + " | ".join(models) + " |",
        "|---|---|" + "--:|" * len(models),
    ]
    for group in ("retrieval", "other"):
        names = [name for name in by_line if _group(by_line[name]) == group]
        for name in names:
            found = by_line[name]
            measure = _MEASURES[next(iter(found.values()))["kind"]]
            cells = [_cell([found[model]]) if model in found else "" for model in models]
            lines.append(f"| {name} | {measure} | " + " | ".join(cells) + " |")
        counted = _counted(names)
        if len(counted) > 1:
            cells = [_mean(by_line, counted, model) for model in models]
            lines.append(f"| **{_MEANS[group]}** | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """A Markdown table with a line for each model: the two means with their intervals, and each task's score.

    Means, errors and quick samples are as in `table`. A quick sample has no column.
    """
    by_line = {name: found for name, found in _by_line(rows).items() if name in tasks.names()}
    groups = {group: [n for n in by_line if _group(by_line[n]) == group] for group in _MEANS}
    columns = [name for group in groups.values() for name in group]
    means = [f"**{_MEANS[group]}**" for group in groups]
    lines = [
        "| model | " + " | ".join(means + columns) + " |",
        "|---|" + "--:|" * (len(means) + len(columns)),
    ]
    for model in _models(rows):
        cells = [_mean(by_line, _counted(names), model) for names in groups.values()]
        for name in columns:
            cells.append(_short(by_line[name][model]["score"]) if model in by_line[name] else "")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def put_into(page: Path, rows: Sequence[Row]) -> None:
    """Put `table` between the marks `scores:start` and `scores:end` of a page, and `summary` between those of
    `summary`. The page is written whole or not at all.

    Raises:
        ValueError: the page has neither pair of marks, or a mark without its other.
    """
    text = page.read_text(encoding="utf-8")
    makers: dict[str, Callable[[Sequence[Row]], str]] = {"scores": table, "summary": summary}
    marked = [name for name in makers if f"<!-- {name}:" in text]
    if not marked:
        raise ValueError(
            f"{page} must have <!-- scores:start --> and <!-- scores:end -->, for a table between"
        )
    rewrite(page, {name: makers[name](rows) for name in marked})


def rewrite(page: Path, contents: Mapping[str, str]) -> None:
    """Put each content between the marks NAME:start and NAME:end of a page, by its name. All or nothing.

    Raises:
        ValueError: the page has not each mark once, in this order.
    """
    text = page.read_text(encoding="utf-8")
    for name, content in contents.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if not (text.count(start) == text.count(end) == 1 and text.index(start) < text.index(end)):
            raise ValueError(f"{page} must have {start} once, and {end} once behind it")
        before, rest = text.split(start)
        text = f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"
    with files.replacing(page) as part:
        part.write_text(text, encoding="utf-8")


def draw(rows: Sequence[Row], path: Path) -> None:
    """The scores as bars, a group for each task, with their intervals. The suffix of `path` says the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    by_line, models = _by_line(rows), _models(rows)
    figure = new_figure(1.2 + 1.1 * len(by_line), 4)
    axes = figure.subplots()
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        places, heights, below, above = [], [], [], []
        for place, found in enumerate(by_line.values()):
            if model in found:
                low, high = scores.interval([found[model]])
                score = found[model]["score"]
                places.append(place + (number - (len(models) - 1) / 2) * width)
                heights.append(score)
                below.append(max(0.0, score - low))
                above.append(max(0.0, high - score))
        axes.bar(places, heights, width, yerr=[below, above], label=model, error_kw={"elinewidth": 0.8})
    axes.set_xticks(range(len(by_line)), list(by_line), rotation=30, ha="right")
    axes.set_ylabel("score, 95 % interval")
    axes.set_ylim(0, 1)
    axes.legend(ncols=len(models), fontsize="small")
    figure.savefig(path, dpi=150)


def new_figure(width: float, height: float) -> Any:
    """A figure of matplotlib, in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("a picture needs matplotlib: pip install 'nvembed-fast[eval]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _counted(names: Iterable[str]) -> list[str]:
    """The lines of whole tasks that count in a mean."""
    return [name for name in names if name in tasks.names() and name not in tasks.OWN]


def _mean(by_line: Mapping[str, Mapping[str, Row]], names: Sequence[str], model: str) -> str:
    """The mean of a model over tasks, or nothing where it lacks one."""
    found = [by_line[name][model] for name in names if model in by_line[name]]
    return f"**{_cell(found)}**" if found and len(found) == len(names) else ""


def _cell(rows: Sequence[Row]) -> str:
    """Score or mean, with its interval: .783 (.764-.801)."""
    low, high = scores.interval(rows)
    mean = sum(row["score"] for row in rows) / len(rows)
    return f"{_short(mean)} ({_short(low)}-{_short(high)})"


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def _models(rows: Iterable[Row]) -> list[str]:
    """Baselines first, as `baselines.NAMES` has them, then others by name."""
    from nvembed_fast import baselines

    found = {row["model"] for row in rows}
    return [name for name in baselines.NAMES if name in found] + sorted(found - set(baselines.NAMES))


def _group(found: Mapping[str, Row]) -> str:
    return "retrieval" if next(iter(found.values()))["kind"] == "retrieval" else "other"


def _by_line(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """{line of the table: {model: row}}, our tasks alone, in their order."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["task"] in tasks.names():
            line = f"{row['task']} (quick)" if row["made_by"].get("quick") else row["task"]
            found.setdefault(line, {})[row["model"]] = row
    for line, by_model in found.items():
        revisions = {row["made_by"]["revision"] for row in by_model.values()}
        if len(revisions) > 1:
            raise ValueError(
                f"the rows of {line} were made on different data ({', '.join(sorted(revisions))}) and do not "
                "compare: run nvembed-fast eval again for all models"
            )
    order = tasks.names()
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0].split()[0]), item[0])))
