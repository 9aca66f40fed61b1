"""Tables of runs that differ in one thing each: a base recipe, overrides, seeds, and rows of scores.

    title = "Pooling heads"
    base = ["../recipes/ablation-stage1.toml", "../recipes/ablation-stage2.toml"]
    seeds = [0, 1, 2]
    tasks = ["squad", "r52"]       # tasks or groups of `nvembed-fast eval`
    quick = true                   # samples of the large tasks
    max_length = 64                # tokens of a text with its instruction, where a task has more
    without = ["synthetic"]        # data sets of the base that no run takes

    [[run]]
    name = "mean"
    set = { model.pooling_head = "mean" }
    paper = [71.71]                # the paper's mean over its tasks, and that of retrieval where it is known
    against = "latent"             # the run that it is compared with

1. A run trains the stages of the base, or those that `stages` counts from 1, in that order. The first one
   starts as the first recipe of the base says, and each other one from the model of the one before.
2. `set` replaces values in all stages. "data.NAME.weight" means the data set whose file has that name, and
   "data.*.weight" every one. A run's own `without` takes the place of the table's.
3. A cell is a run under a seed. Its stages have the seeds 10 * seed, 10 * seed + 1 and so on, so runs under
   one seed see the same rows in the same order, as far as their recipes agree.
4. A cell is done if RESULTS/TABLE.jsonl has its row. `made_of` in a row is a hash of all that the cell's
   recipes and tasks say, with the last names of paths. So a changed recipe makes another cell, and cells of
   two tables that say the same are computed once. Two cells whose starts or teachers differ in their folders
   alone are refused. The rows of one table are all made with the same data files.
"""

import difflib
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from nvembed_fast import files
from nvembed_fast.evaluation import tasks
from nvembed_fast.files import brief
from nvembed_fast.training.recipe import ModelPart, Recipe, differing
from nvembed_fast.training.rows import open_rows

__all__ = [
    "Cell",
    "Run",
    "Table",
    "changed_sets",
    "check_places",
    "check_sets",
    "data_of",
    "load_tasks",
    "read_rows",
    "read_table",
    "row_of",
    "run_cell",
    "write_row",
]

_NUMBER = int | float
# of the file and of a [[run]]: key -> type. A type in a list: a list of such values
_TABLE: dict[str, Any] = {"title": str, "base": [str], "seeds": [int], "tasks": [str], "run": [dict]}
_TABLE |= {"quick": bool, "max_length": int, "without": [str]}
_RUN: dict[str, Any] = {"name": str, "set": dict, "without": [str], "stages": [int], "against": str}
_RUN |= {"paper": [_NUMBER]}
_SAID: dict[Any, str] = {
    str: "a string",
    int: "an integer",
    _NUMBER: "a number",
    bool: "true or false",
    dict: "a table",
}
_LEAST_TOKENS = 48  # the instructions of the tasks take some
_MADE_HERE = ("output", "seed")
# of a recipe: without a part in the result, and paths, of which the name counts
_HARMLESS = re.compile(r"output|log\..*|train\.(checkpoint_every|keep_checkpoints)")
_PATH = re.compile(r"data\.\d+\.file|model\.start|train\.teacher")
# of a row: those that are read again
_KEYS = {"table", "run", "seed", "steps", "tokens", "scores", "made_of", "data", "revisions"}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A line of a table.

    Attributes:
        name: unique in the table.
        stages: recipes, trained one after the other. Output, seed and the start of later ones are a cell's.
        paper: the paper's mean over its tasks, and that of retrieval. Empty: it has none.
        against: the run that it is compared with, if any.
    """

    name: str
    stages: tuple[Recipe, ...]
    paper: tuple[float, ...] = ()
    against: str | None = None


@dataclass(frozen=True)
class Table:
    """A file of runs. Its name is that of the file."""

    file: Path
    title: str
    tasks: tuple[str, ...]
    quick: bool
    max_length: int | None
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        return self.file.stem

    def cells(self) -> "list[Cell]":
        """All runs under the first seed, then all under the next one."""
        return [Cell(self, run, seed) for seed in self.seeds for run in self.runs]


@dataclass(frozen=True)
class Cell:
    """A run of a table under a seed."""

    table: Table
    run: Run
    seed: int

    def __str__(self) -> str:
        return f"{self.table.name}: {self.run.name}, seed {self.seed}"

    def recipes(self, folder: Path) -> list[Recipe]:
        """The recipes of its stages, whose outputs lie in an absolute folder."""
        found = []
        for place, stage in enumerate(self.run.stages):
            model = ModelPart(start=str(folder / f"stage{place}")) if place else stage.model
            output, seed = str(folder / f"stage{place + 1}"), 10 * self.seed + place
            found.append(replace(stage, output=output, seed=seed, model=model))
        return found

    @property
    def files(self) -> list[str]:
        """The data files of its stages, each once."""
        return list(dict.fromkeys(part.file for stage in self.run.stages for part in stage.data))

    @property
    def places(self) -> list[str | None]:
        """Of its start, and of the teacher of each stage. None: a stage has no teacher."""
        return [self.run.stages[0].model.start, *(stage.train.teacher for stage in self.run.stages)]

    @property
    def made_of(self) -> str:
        """The first 12 hexadecimal digits of a sha256 of its recipes and tasks, in JSON.

        Keys with their defaults do not count, so a key that a later version adds makes no other cell.
        """
        stages = []
        for recipe in self.recipes(Path("/")):
            said = {key: now for key, (_, now) in differing({}, recipe.flat()).items()}
            said |= {key: Path(said[key]).name for key in said if _PATH.fullmatch(key)}
            stages.append({key: said[key] for key in said if not _HARMLESS.fullmatch(key)})
        scored = [self.table.tasks, self.table.quick, *filter(None, [self.table.max_length])]
        content = json.dumps([stages, *scored], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def read_table(file: str | PathLike, changes: Sequence[str] = (), scale: float = 1) -> Table:
    """Read a table and all recipes of its runs.

    Args:
        file: a TOML file, as above. Paths are relative to it.
        changes: "key=value" for all stages of all runs, which goes before what they say.
        scale: steps and warm-up are multiplied by it.

    Raises:
        ValueError: the table or a recipe of it is wrong. The message names file, run and key.
        OSError: a file cannot be read.
    """
    path = files.expanded(file)
    raw = files.read_toml(path)
    try:
        _check(raw, _TABLE, ("base", "seeds", "tasks", "run"), "")
        return _table(path, raw, changes, scale)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _table(path: Path, raw: dict[str, Any], changes: Sequence[str], scale: float) -> Table:
    names, unknown = tasks.chosen(raw["tasks"])
    if unknown:
        raise ValueError(f"no evaluation task {unknown[0]!r}: there are {', '.join(tasks.names())}")
    if len({*raw["seeds"]}) < len(raw["seeds"]) or min(raw["seeds"]) < 0:
        raise ValueError(f"seeds must be different numbers from 0, got {raw['seeds']}")
    if raw.get("max_length", _LEAST_TOKENS) < _LEAST_TOKENS:
        raise ValueError(f"max_length must be {_LEAST_TOKENS} or more, got {raw['max_length']}")
    bases = [path.parent / base for base in raw["base"]]
    runs: dict[str, Run] = {}
    for number, entry in enumerate(raw["run"]):
        _check(entry, _RUN, ("name",), f"run {number + 1}: ")
        name = entry["name"]
        if name in runs:
            raise ValueError(f"two runs have the name {name!r}")
        without = entry.get("without", raw.get("without", []))
        overrides = [*_overrides(entry.get("set", {})), *changes]
        try:
            stages = _stages(bases, entry.get("stages"), overrides, without, scale)
        except ValueError as error:
            raise ValueError(f"run {name!r}: {error}") from error
        runs[name] = Run(name, stages, tuple(entry.get("paper", ())), entry.get("against"))
    for run in runs.values():
        if run.against is not None and (run.against not in runs or run.against == run.name):
            raise ValueError(f"run {run.name!r}: against must be another run, got {run.against!r}")
    return Table(
        path,
        raw.get("title", path.stem),
        tuple(names),
        raw.get("quick", False),
        raw.get("max_length"),
        tuple(raw["seeds"]),
        tuple(runs.values()),
    )


def _check(raw: Mapping[str, Any], kinds: Mapping[str, Any], needed: Iterable[str], place: str) -> None:
    """ValueError for a key that is unknown, missing, empty or of another type."""
    for key, value in raw.items():
        if key not in kinds:
            close = difflib.get_close_matches(key, kinds, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(kinds)}"
            raise ValueError(f"{place}no key {key!r}: {hint}")
        kind = kinds[key]
        if isinstance(kind, list):
            fits = isinstance(value, list) and all(_fits(item, kind[0]) for item in value)
            said = f"a list, each {_SAID[kind[0]]}"
        else:
            fits, said = _fits(value, kind), _SAID[kind]
        if not fits:
            raise ValueError(f"{place}{key} must be {said}, got {brief(value)}")
    for key in needed:
        if not raw.get(key):
            raise ValueError(f"{place}{key} is missing")


def _fits(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def _overrides(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """ "key=value" of each value of nested tables, with dotted keys."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _overrides(value, f"{prefix}{key}.")
        else:
            # in TOML half a pair of escapes is no character, and DEL needs one
            text = json.dumps(value, default=str, ensure_ascii=False).replace("\x7f", "\\u007f")
            yield f"{prefix}{key}={text}"


def _stages(
    bases: Sequence[Path],
    order: Sequence[int] | None,
    overrides: Sequence[str],
    without: Sequence[str],
    scale: float,
) -> tuple[Recipe, ...]:
    names = [[_name(part.file) for part in Recipe.from_file(base).data] for base in bases]
    known = dict.fromkeys(name for stage in names for name in stage)
    asked = [*without, *(name for override in overrides if (name := _set_of(override)))]
    for name in asked:
        if name not in known:
            raise ValueError(f"no data set {name!r}: the base has {', '.join(known)}")
    for override in overrides:
        if override.partition("=")[0].strip() in _MADE_HERE:
            raise ValueError(
                f"{override} cannot be set: a cell has its own folder, and its seeds are `seeds`"
            )
    recipes = []
    for base, sets in zip(bases, names, strict=True):
        own = [_numbered(o, sets) for o in overrides if _set_of(o) in (None, *sets)]
        recipe = Recipe.from_file(base, own)
        data = tuple(part for part in recipe.data if _name(part.file) not in without)
        if not data:
            raise ValueError(f"without takes every data set of {base.name}")
        steps, warmup = (round(number * scale) for number in (recipe.train.steps, recipe.train.warmup))
        train = replace(recipe.train, steps=max(1, steps), warmup=warmup)
        recipes.append(replace(recipe, data=data, train=train))
    numbers = range(1, len(bases) + 1) if order is None else order
    if not numbers or not all(1 <= number <= len(bases) for number in numbers):
        raise ValueError(f"stages must be numbers from 1 to {len(bases)}, got {order}")
    first, *others = (recipes[number - 1] for number in numbers)
    return replace(first, model=recipes[0].model), *others


def _name(file: str) -> str:
    return Path(file).stem


def _set_of(override: str) -> str | None:
    """The name of the data set that an override names."""
    match override.partition("=")[0].split("."):
        case ["data", name, _] if name != "*" and not name.isdecimal():
            return name
    return None


def _numbered(override: str, sets: Sequence[str]) -> str:
    """The override with the number of a data set in the place of its name, as a recipe takes it."""
    name = _set_of(override)
    return override if name is None else f"data.{sets.index(name)}.{override.split('.', 2)[2]}"


def check_places(cells: Iterable[Cell]) -> None:
    """
    Raises:
        ValueError: two cells differ in the folder of their start or of a teacher alone.
    """
    first: dict[str, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.made_of, cell)
        for one, two in zip(other.places, cell.places, strict=True):
            if one != two:
                raise ValueError(
                    f"{other} and {cell} would share one row, because made_of has only the name of {one} and "
                    f"of {two}: rename one"
                )


def check_sets(cells: Iterable[Cell]) -> None:
    """
    Raises:
        ValueError: a data set of a cell is not there.
    """
    found = {file for cell in cells for file in cell.files}
    missing = sorted(file for file in found if not Path(file).is_file())
    if missing:
        raise ValueError(
            f"{len(missing)} data sets are missing: {', '.join(missing)}. `make ablation-data` makes all but "
            "the synthetic one: see docs/ablations.md"
        )


def changed_sets(table: Table, rows: Iterable[Row]) -> list[str]:
    """The names of the sets of which the table's rows were made with another file than the one here."""
    cells = table.cells()
    done = [row["data"] for cell in cells if (row := row_of(cell, rows))]
    found = []
    for file in {file for cell in cells for file in cell.files}:
        known = {data[_name(file)] for data in done if _name(file) in data}
        if known and Path(file).is_file() and known != {_version(file)}:
            found.append(_name(file))
    return sorted(found)


def data_of(cell: Cell) -> dict[str, str]:
    """The start of the fingerprint of each data file, by the name of the set."""
    return {_name(file): _version(file) for file in cell.files}


def _version(file: str) -> str:
    return open_rows(file).fingerprint[:12]


def load_tasks(cells: Iterable[Cell]) -> dict[tuple[str, bool], tasks.LocalTask]:
    """The tasks of cells by name, and by whether they are quick samples.

    Raises:
        ValueError: the data of a task cannot be had here.
    """
    found = {}
    for name, quick in dict.fromkeys((name, c.table.quick) for c in cells for name in c.table.tasks):
        try:
            task = tasks.load(name)
        except tasks.SkippedTask as error:
            raise ValueError(f"no cell was run: {error}") from error
        found[name, quick] = tasks.sampled(task) if quick else task
    return found


def run_cell(
    cell: Cell,
    loaded: Mapping[tuple[str, bool], tasks.LocalTask],
    folder: Path,
    *,
    device: str | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Train the stages of a cell, or go on with them, and score the last one.

    It is loaded in bfloat16 where the last recipe's `train.autocast` is bfloat16.

    Args:
        cell: of a table.
        loaded: by `load_tasks`.
        folder: of its stages. Each has the files of a run of the trainer.
        device: as in `trainer.train`.
        say: takes lines for the user.

    Returns:
        Its row: table, run, seed, steps and tokens of all stages, scores by task, `made_of`, and what it was
        made with: the start of each file's fingerprint, revisions of the tasks, versions, device, threads.

    Raises:
        ValueError: as `trainer.train`, or a data file changed meanwhile.
        OSError, KeyboardInterrupt: as `trainer.train`.
    """
    # these import torch and mteb, for up to half a minute
    import torch

    from nvembed_fast.encoder import NVEmbed
    from nvembed_fast.integrations.mteb import MTEBEncoder, planted_task, score
    from nvembed_fast.training.run_log import METRICS_FILE, read_metrics
    from nvembed_fast.training.trainer import train

    recipes, data = cell.recipes(folder.resolve()), data_of(cell)
    for recipe in recipes:
        train(recipe, device=device, say=say)
    if changed := [name for name, version in data_of(cell).items() if version != data[name]]:
        raise ValueError(
            f"{', '.join(changed)} changed while {cell} was trained: remove {folder}, and run it again"
        )
    lines = [line for recipe in recipes for line in read_metrics(Path(recipe.output) / METRICS_FILE)]
    dtype = torch.bfloat16 if recipes[-1].train.autocast == "bfloat16" else None
    model = NVEmbed.from_pretrained(recipes[-1].output, device=device, dtype=dtype)
    door = MTEBEncoder("local/ablation", model=model)
    scores, revisions = {}, {}
    for name in cell.table.tasks:
        task = loaded[name, cell.table.quick]
        say(f"{cell}: {name}")
        door.max_length = min(task.max_length, cell.table.max_length or task.max_length)
        scores[name] = round(score(planted_task(task), door).main_score, 5)
        revisions[name] = task.revision
    return {
        "table": cell.table.name,
        "run": cell.run.name,
        "seed": cell.seed,
        "steps": sum(recipe.train.steps for recipe in recipes),
        "tokens": round(sum(line["tokens"] for line in lines)),
        "scores": scores,
        "made_of": cell.made_of,
        "data": data,
        "revisions": revisions,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "mteb")},
        "device": str(model.device),
        "threads": torch.get_num_threads(),
    }


def read_rows(results: Path) -> list[dict[str, Any]]:
    """The rows of all tables of a folder, none if it is not there.

    Raises:
        ValueError: a line is no row. The message names file and line.
    """
    found = []
    for file in sorted(results.glob("*.jsonl")):
        rows = open_rows(file)
        for index, row in enumerate(rows.records()):
            if missing := _KEYS - set(row if isinstance(row, dict) else ()):
                raise ValueError(f"{rows.place(index)} is no row of a table: it has no {min(missing)!r}")
            found.append(row)
    return found


def row_of(cell: Cell, rows: Iterable[Row]) -> Row | None:
    """The row of a cell, or None if it is not done. A row of another recipe is none."""
    wanted = (cell.table.name, cell.run.name, cell.seed, cell.made_of)
    return next((r for r in rows if (r["table"], r["run"], r["seed"], r["made_of"]) == wanted), None)


def write_row(results: Path, cell: Cell, row: Row) -> None:
    """Put the row of a cell into its file, in the order of the table, whole or not at all.

    The row may be that of another cell which is made of the same. A row of this cell by another recipe goes.
    """
    results.mkdir(parents=True, exist_ok=True)
    own = {"table": cell.table.name, "run": cell.run.name}
    order = {run.name: place for place, run in enumerate(cell.table.runs)}
    with files.alone(results, ".lock", waits=True):
        rows = [r for r in read_rows(results) if r["table"] == cell.table.name]
        rows = [r for r in rows if (r["run"], r["seed"]) != (cell.run.name, cell.seed)] + [{**row, **own}]
        rows.sort(key=lambda r: (order.get(r["run"], len(order)), r["seed"]))
        lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in rows]
        with files.replacing(results / f"{cell.table.name}.jsonl") as part:
            part.write_text("".join(lines), encoding="utf-8")
