"""nvembed-fast ablate."""

import argparse
import contextlib
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvembed_fast.cli import options, process

if TYPE_CHECKING:
    from nvembed_fast.evaluation.ablation import Cell, Table
    from nvembed_fast.evaluation.tasks import LocalTask

SUMMARY = "Train and score tables of runs that differ in one thing each, and set them beside the paper's."
EXAMPLES = """\
examples:
  nvembed-fast ablate ablations/*.toml
  nvembed-fast ablate ablations/pooling.toml --run mean --seed 0
  nvembed-fast ablate ablations/*.toml --list
  nvembed-fast ablate ablations/*.toml --report --page docs/ablations.md --picture docs/ablations.png
  nvembed-fast ablate ablations/pooling.toml --scale 20 --set model.layers=30 -o larger"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", nargs="+", type=options.path, help="TOML files. docs/ablations.md shows one")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--list", action="store_true", help="show each cell: done, or the command that makes it"
    )
    what.add_argument("--report", action="store_true", help="print the tables of the rows, run nothing")
    parser.add_argument(
        "--run", action="append", metavar="NAME", help="this run alone, may come several times"
    )
    parser.add_argument("--seed", action="append", type=int, help="this seed alone, may come several times")
    parser.add_argument(
        "-o",
        "--output",
        type=options.path,
        metavar="FOLDER",
        help="of rows (default: results beside the table)",
    )
    parser.add_argument(
        "--work",
        type=options.path,
        default=Path("runs/ablations/cells"),
        metavar="FOLDER",
        help="of cells that are at work. A cell with its row leaves it (default: %(default)s)",
    )
    parser.add_argument("--keep", action="store_true", help="cells stay there, with their models and curves")
    parser.add_argument(
        "--scale", type=_scale, default=1.0, metavar="FACTOR", help="on the steps of every run (default: 1)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value in the recipes of every run, may come several times",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--page", type=options.path, help="of a report: rewrite the tables in this file")
    parser.add_argument("--picture", type=options.path, help="of a report: draw the differences into it")


def run(arguments: argparse.Namespace) -> None:
    from nvembed_fast.evaluation import ablation

    if (arguments.page or arguments.picture) and not arguments.report:
        raise ValueError("--page and --picture are for a report: add --report")
    if (arguments.set or arguments.scale != 1) and arguments.output is None:
        raise ValueError("--set and --scale make other cells: name a folder for their rows by -o")
    tables = [ablation.read_table(file, arguments.set, arguments.scale) for file in arguments.table]
    names = [table.name for table in tables]
    if len({*names}) < len(names):
        raise ValueError(f"two tables have one name: {', '.join(names)}")
    ablation.check_places(cell for table in tables for cell in table.cells())
    cells = _chosen(tables, arguments)
    if arguments.report:
        _report(tables, arguments)
    elif arguments.list:
        _list(cells, arguments)
    else:
        _run(cells, arguments)


def _scale(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and below a million, got {text}")
    return value


def _results(table: "Table", arguments: argparse.Namespace) -> Path:
    return arguments.output or table.file.parent / "results"


def _rows(tables: "list[Table]", arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from nvembed_fast.evaluation.ablation import read_rows

    folders = dict.fromkeys(_results(table, arguments) for table in tables)
    return [row for folder in folders for row in read_rows(folder)]


def _chosen(tables: "list[Table]", arguments: argparse.Namespace) -> "list[Cell]":
    """The cells that are asked for: of all tables under the first seed, then under the next one."""
    runs = dict.fromkeys(run.name for table in tables for run in table.runs)
    seeds = sorted({seed for table in tables for seed in table.seeds})
    for word, asked, known in (("run", arguments.run, runs), ("seed", arguments.seed, seeds)):
        for one in asked or ():
            if one not in known:
                raise ValueError(f"no {word} {one!r}: there are {', '.join(map(repr, known))}")
    cells = [cell for table in tables for cell in table.cells()]
    cells = [c for c in cells if not arguments.run or c.run.name in arguments.run]
    cells = [c for c in cells if not arguments.seed or c.seed in arguments.seed]
    return sorted(cells, key=lambda cell: seeds.index(cell.seed))


def _list(cells: "list[Cell]", arguments: argparse.Namespace) -> None:
    from nvembed_fast.evaluation.ablation import row_of

    rows = _rows([cell.table for cell in cells], arguments)
    more = [word for change in arguments.set for word in ("--set", change)]
    more += ["--scale", f"{arguments.scale:g}"] if arguments.scale != 1 else []
    more += ["-o", str(arguments.output)] if arguments.output else []
    done = 0
    for cell in cells:
        if row_of(cell, rows):
            done += 1
            print(f"{cell}: done")
        else:
            words = [str(cell.table.file), "--run", cell.run.name, "--seed", str(cell.seed), *more]
            print(f"{cell}: missing: nvembed-fast ablate {shlex.join(words)}")
    print(f"{done} of {len(cells)} cells are done")


def _report(tables: "list[Table]", arguments: argparse.Namespace) -> None:
    from nvembed_fast.evaluation import ablation_report

    rows = _rows(tables, arguments)
    print(ablation_report.page(tables, rows))
    if arguments.page:
        ablation_report.put_into(arguments.page, tables, rows)
    if arguments.picture:
        ablation_report.draw(tables, rows, arguments.picture)


def _run(cells: "list[Cell]", arguments: argparse.Namespace) -> None:
    from importlib.util import find_spec

    from nvembed_fast.evaluation import ablation

    missing = _missing(cells, arguments)
    process.say(f"{len(cells) - len(missing)} of {len(cells)} cells are done")
    if not missing:
        return
    ablation.check_sets(missing)
    missing = _comparable(missing, arguments)
    if find_spec("mteb") is None:
        raise ImportError("evaluation needs the package mteb: pip install 'nvembed-fast[eval]'")
    process.raise_interrupts()
    loaded = ablation.load_tasks(missing)
    arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        with options.note_cut(""):  # a table has its own max_length
            for number, cell in enumerate(missing, start=1):
                _make(cell, f"{number} of {len(missing)}", cells, loaded, arguments, waits=False)
            if others := _missing(missing, arguments):
                process.say(f"waiting for other processes, which are at {', '.join(map(str, others))}")
                for cell in others:
                    _make(cell, "left by another process", cells, loaded, arguments, waits=True)
    except KeyboardInterrupt as stop:
        done = len(cells) - len(_missing(cells, arguments))
        raise KeyboardInterrupt(
            f"{done} of {len(cells)} cells have their rows, and the same command goes on"
        ) from stop


def _comparable(cells: "list[Cell]", arguments: argparse.Namespace) -> "list[Cell]":
    """The cells of tables whose rows were made with the data files that are here. The others are told."""
    from nvembed_fast.evaluation.ablation import changed_sets

    tables = list({cell.table.name: cell.table for cell in cells}.values())
    rows = _rows(tables, arguments)
    changed = {table.name: names for table in tables if (names := changed_sets(table, rows))}
    told = [
        f"the rows of {table} were made with other versions of {', '.join(names)} than those here, so new "
        "ones would not compare: use those files, or make the whole table with -o FOLDER"
        for table, names in changed.items()
    ]
    if len(changed) == len(tables):
        raise ValueError(told[0])
    for line in told:
        process.say(f"left out: {line}")
    return [cell for cell in cells if cell.table.name not in changed]


def _missing(cells: "list[Cell]", arguments: argparse.Namespace) -> "list[Cell]":
    from nvembed_fast.evaluation.ablation import row_of

    rows = _rows([cell.table for cell in cells], arguments)
    return [cell for cell in cells if not row_of(cell, rows)]


def _make(
    cell: "Cell",
    place: str,
    cells: "list[Cell]",
    loaded: "Mapping[tuple[str, bool], LocalTask]",
    arguments: argparse.Namespace,
    *,
    waits: bool,
) -> None:
    """Give a cell its row, unless another process is at it. `waits`: for its end, and then looks again."""
    from nvembed_fast import files
    from nvembed_fast.evaluation import ablation

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.alone(arguments.work, f".{cell.made_of}.lock", waits=waits))
        except BlockingIOError:
            return
        rows = _rows([c.table for c in cells], arguments)  # with those of other processes
        if ablation.row_of(cell, rows):
            return
        process.say(f"{place}: {cell}")
        folder = arguments.work / cell.made_of
        same = [row for row in rows if row["made_of"] == cell.made_of]
        # of other files another table's cell may say the same
        row = next((row for row in same if row["data"] == ablation.data_of(cell)), None)
        if row is None:
            row = ablation.run_cell(cell, loaded, folder, device=arguments.device, say=process.say)
        ablation.write_row(_results(cell.table, arguments), cell, row)
        if folder.exists() and not arguments.keep:
            shutil.rmtree(folder)
        mean = sum(row["scores"].values()) / len(row["scores"])
        print(f"{cell}: mean of {len(row['scores'])} tasks {mean:.4f}", flush=True)
