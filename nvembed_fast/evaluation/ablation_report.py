"""Tables of ablations beside the paper's numbers: means and spreads over seeds, a sign test, and a picture.

Scores are in points, 100 times those of the rows, as in the paper.

1. The score of a cell is the mean over its tasks, and beside it that of its retrieval tasks.
2. A run has the mean over its seeds, and its lowest and highest seed in brackets, which is the spread.
3. Two runs are compared seed by seed, because they see the same rows under one seed. A difference lies
   within the spread if its mean is not larger than its highest seed minus its lowest.
4. The sign test is two-sided. It asks how often a fair coin splits the tasks as unevenly as the two runs do,
   by the mean over seeds of each task. Ties are left out. Source: Demsar, Statistical Comparisons of
   Classifiers over Multiple Data Sets, JMLR 7 (2006), section 3.1.4.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed_fast.evaluation import report, tasks
from nvembed_fast.evaluation.ablation import Run, Table, row_of

__all__ = ["Difference", "differences", "draw", "page", "put_into", "sign_test"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """A run minus the one that it is against, in points.

    Attributes:
        run: the first one.
        by_seed: of the seeds that both have, at least one.
        better: tasks with a higher mean over these seeds.
        worse: those with a lower one.
        paper: the paper's difference. None: it has none.
    """

    run: Run
    by_seed: tuple[float, ...]
    better: int
    worse: int
    paper: float | None

    @property
    def mean(self) -> float:
        return math.fsum(self.by_seed) / len(self.by_seed)

    @property
    def verdict(self) -> str:
        """What the difference says, and whether the paper's has the same sign."""
        if len(self.by_seed) < 2:
            return "one seed"
        if _exact(abs(self.mean) - (max(self.by_seed) - min(self.by_seed))) <= 0:
            return "within the spread"
        if not self.paper:
            return "beyond the spread"
        return "as in the paper" if self.mean * self.paper > 0 else "not as in the paper"


def sign_test(better: int, worse: int) -> float:
    """The two-sided probability that a fair coin splits so many throws at least as unevenly."""
    throws = better + worse
    tail = sum(math.comb(throws, heads) for heads in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**throws)


def differences(table: Table, rows: Sequence[Row]) -> list[Difference]:
    """Of each run that is against another one, where both have a seed in common. Errors as in `page`."""
    by_run = _by_run(table, rows)
    paper = {run.name: run.paper[0] for run in table.runs if run.paper}
    found = []
    for run in table.runs:
        if run.against is None:
            continue
        one, other = by_run[run.name], by_run[run.against]
        seeds = [seed for seed in table.seeds if seed in one and seed in other]
        if not seeds:
            continue
        of_tasks = [
            _exact(math.fsum(_points(one[s], [t]) - _points(other[s], [t]) for s in seeds))
            for t in table.tasks
        ]
        both = run.name in paper and run.against in paper
        found.append(
            Difference(
                run,
                tuple(_points(one[s], table.tasks) - _points(other[s], table.tasks) for s in seeds),
                sum(value > 0 for value in of_tasks),
                sum(value < 0 for value in of_tasks),
                paper[run.name] - paper[run.against] if both else None,
            )
        )
    return found


def page(tables: Iterable[Table], rows: Sequence[Row]) -> str:
    """The tables in Markdown, one below the other, also of runs that are not done.

    Raises:
        ValueError: rows of a table were made with different texts of a task or a data set.
    """
    return "\n\n".join(_section(table, rows) for table in tables)


def put_into(path: Path, tables: Iterable[Table], rows: Sequence[Row]) -> None:
    """Put `page` between the marks `ablations:start` and `ablations:end`. Errors as in `report.rewrite`."""
    report.rewrite(path, {"ablations": page(tables, rows)})


def draw(tables: Iterable[Table], rows: Sequence[Row], path: Path) -> None:
    """The differences with their spread, beside the paper's. The suffix of `path` says the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing can be compared yet.
    """
    found = [(table, part) for table in tables if (part := differences(table, rows))]
    if not found:
        raise ValueError("there is nothing to draw: no two runs that are compared have a seed in common")
    heights = [1 + 0.4 * len(part) for _, part in found]
    figure = report.new_figure(7, sum(heights))
    entries: dict[str, Any] = {}
    panels = figure.subplots(len(found), squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (table, part) in zip(panels[:, 0], found, strict=True):
        for place, one in enumerate(part):
            spread = [[one.mean - min(one.by_seed)], [max(one.by_seed) - one.mean]]
            axes.errorbar(one.mean, place, xerr=spread, fmt="o", color="C0", label="ours, lowest to highest")
            if one.paper is not None:
                axes.plot(one.paper, place, "D", mfc="none", color="C1", label="paper")
        axes.axvline(0, color="0.7", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(part)), [f"{one.run.name} against {one.run.against}" for one in part])
        axes.set_ylim(len(part) - 0.5, -0.5)
        axes.set_title(table.title, fontsize="medium")
        entries |= zip(*reversed(axes.get_legend_handles_labels()), strict=True)
    # above all panels: in one of them it would look like a difference
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=2, frameon=False)
    panels[-1, 0].set_xlabel("difference in points")
    figure.savefig(path, dpi=150)


def _section(table: Table, rows: Sequence[Row]) -> str:
    by_run = _by_run(table, rows)
    done = sum(map(len, by_run.values()))
    quick = ", samples of the large ones" if table.quick else ""
    cut = f", at most {table.max_length} tokens of a text" if table.max_length else ""
    lines = [
        f"### {table.title}",
        "",
        f"`{table.name}`, {done} of {len(table.cells())} cells are done. "
        f"Tasks: {', '.join(table.tasks)}{quick}{cut}.",
        "",
        "| run | paper | ours | paper, retrieval | ours, retrieval | steps | million tokens | seeds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    retrieval = [task for task in table.tasks if task in tasks.GROUPS["retrieval"]]
    for run in table.runs:
        found = list(by_run[run.name].values())
        papers = [f"{value:.2f}" for value in run.paper[:2]] + [""] * (2 - len(run.paper))
        steps = f"{found[0]['steps']}" if found else ""
        tokens = f"{sum(row['tokens'] for row in found) / len(found) / 1e6:.2f}" if found else ""
        cells = [papers[0], _spread(found, table.tasks), papers[1], _spread(found, retrieval), steps, tokens]
        lines.append(f"| {run.name} | {' | '.join(cells)} | {len(found)} of {len(table.seeds)} |")
    compared = differences(table, rows)
    if compared:
        lines += ["", "| difference | paper | ours | tasks better, worse | sign test | |"]
        lines.append("|---|--:|--:|--:|--:|---|")
    for one in compared:
        ours = f"{one.mean:+.2f} ({min(one.by_seed):+.2f} to {max(one.by_seed):+.2f})"
        paper = "" if one.paper is None else f"{one.paper:+.2f}"
        test = f"{one.better}, {one.worse} | {sign_test(one.better, one.worse):.3f}"
        lines.append(
            f"| {one.run.name} against {one.run.against} | {paper} | {ours} | {test} | {one.verdict} |"
        )
    return "\n".join(lines)


def _spread(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The mean over rows, with the lowest and the highest: 51.20 (50.90-51.60)."""
    if not rows or not names:
        return ""
    found = [_points(row, names) for row in rows]
    return f"{math.fsum(found) / len(found):.2f} ({min(found):.2f}-{max(found):.2f})"


def _points(row: Row, names: Sequence[str]) -> float:
    return 100 * math.fsum(row["scores"][name] for name in names) / len(names)


def _exact(points: float) -> float:
    """A difference of points without the rounding errors that would make a tie a win.

    Rows have five digits of a score, so what is no tie is far larger than what this takes away.
    """
    return round(points, 9)


def _by_run(table: Table, rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """{run: {seed: row}} of the cells that are done."""
    found: dict[str, dict[int, Row]] = {run.name: {} for run in table.runs}
    versions: dict[tuple[str, str], str] = {}
    for cell in table.cells():
        row = row_of(cell, rows)
        if row is None:
            continue
        found[cell.run.name][cell.seed] = row
        for kind in ("revisions", "data"):
            for name, version in row[kind].items():
                if (first := versions.setdefault((kind, name), version)) != version:
                    raise ValueError(
                        f"rows of {table.name} were made with different {name} ({first}, {version}) and do "
                        "not compare: remove those of one, and run them again"
                    )
    return found
