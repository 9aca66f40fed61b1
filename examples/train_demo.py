"""From text to scores in one command: fetch training text, mine hard negatives, train in two stages, score.

    python examples/train_demo.py                       # recipes/demo-short-*.toml, for two CPU cores
    python examples/train_demo.py demo                  # recipes/demo-*.toml, of the demo model
    python examples/train_demo.py demo-short --four-rows

| step | leaves in runs/demo-short/ |
|---|---|
| curate | `data/`: the sets that the recipes name, without any text of an evaluation set |
| train stage 1 with the negatives of the batch | `plain-stage1/`: the model that mines. Not with a teacher |
| mine | `mined/`: the same rows with hard negatives. `vectors/`: those of a teacher |
| train stages 1 and 2 with them | `stage1/`, and `stage2/`, the model |
| eval | `scores/` |
| pictures | `pictures/`: training curves, scores, a map of docstrings, cosines |

Where the recipe of stage 1 names a teacher, MiniLM is it, and mines in the place of a first model.

`--four-rows` trains stage 2 without mined negatives, too, and scores all models. Their settings are those
of the recipes, but for the negatives. Where a teacher mines and stage 1 takes no mined ones, stage 1 is
trained once, and there are three.

Each step is a command that goes on where it was stopped, and one that has ended is skipped. So the same
command goes on after Ctrl-C, a kill or a loss of power. After a change of a recipe, its step and all behind
it run again. `train`, `eval` and `mine --vectors` refuse results of another model: remove those first. The
table is always printed.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# runs from a checkout as from an installed package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nvembed_fast import files
from nvembed_fast.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = (sys.executable, "-m", "nvembed_fast")
SCORED = {"demo-short": ("docstrings", "squad", "--quick"), "demo": ("local",)}


@dataclass(frozen=True)
class Step:
    """A command. It has ended if the mark of what it was made of is there, unless it `runs_always`."""

    name: str
    command: tuple[str, ...]
    reads: Path | None = None
    runs_always: bool = False

    def made_of(self, before: str) -> str:
        """A digest of the command, of what it reads, and of `before`, that of the previous step."""
        digest = hashlib.sha256("\0".join((before, *self.command)).encode())
        if self.reads is not None:
            digest.update(self.reads.read_bytes())
        return digest.hexdigest()


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    folder = (arguments.output or ROOT / "runs" / arguments.recipe).resolve()
    stages = [ROOT / "recipes" / f"{arguments.recipe}-stage{number}.toml" for number in (1, 2)]
    for name in ("ended", "mined", "pictures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    made_of = ""
    for step in steps(stages, folder, SCORED[arguments.recipe], arguments.four_rows):
        mark, made_of = folder / "ended" / step.name, step.made_of(made_of)
        if not step.runs_always and mark.is_file() and mark.read_text() == made_of:
            print(f"{step.name}: has ended before", flush=True)
            continue
        print(f"{step.name}: {' '.join(step.command)}", flush=True)
        began = time.monotonic()
        status = subprocess.run(step.command, cwd=ROOT).returncode
        if status:
            print(
                f"{step.name} ended with status {status}: the same command goes on from there",
                file=sys.stderr,
            )
            return status
        with files.replacing(mark) as part:
            part.write_text(made_of)
        print(f"{step.name}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    for picture in sorted(folder.glob("*stage?/run.png")):
        shutil.copyfile(picture, folder / "pictures" / f"{picture.parent.name}.png")
    print(f"the model: {folder / 'stage2'}")
    return 0


def steps(stages: list[Path], folder: Path, tasks: tuple[str, ...], four_rows: bool) -> Iterator[Step]:
    """What is to be done, in order.

    Args:
        stages: the recipes of stage 1 and stage 2. A data set's file is called SET.jsonl, where SET is one of
            `nvembed-fast curate --list`. Its rows are mined if it takes hard negatives.
        folder: of all results.
        tasks: of `nvembed-fast eval`.
        four_rows: stage 2 without mined negatives, too.
    """
    recipes = [Recipe.from_file(stage) for stage in stages]
    sets = {Path(part.file).name: part for recipe in recipes for part in recipe.data}
    mined = {name for name, part in sets.items() if part.hard_negatives and part.labels == "none"}
    names = [Path(name).stem for name in sets]
    yield Step("curate", (*PROGRAM, "curate", "-o", str(folder / "data"), "--sources", *names))

    def train(number: int, name: str, *, start: Path | None = None, plain: bool = False) -> Step:
        changes: dict[str, object] = {"output": folder / name}
        if start is not None:
            changes["model.start"] = start
        for i, part in enumerate(recipes[number - 1].data):
            file = Path(part.file).name
            changes[f"data.{i}.file"] = folder / ("mined" if file in mined and not plain else "data") / file
            if file in mined and plain:
                changes |= {f"data.{i}.hard_negatives": 0, f"data.{i}.in_batch": "true"}
        if recipes[number - 1].train.teacher is not None:
            changes["train.teacher"] = folder / "vectors"
        settings = (word for key, value in changes.items() for word in ("--set", f"{key}={value}"))
        recipe = stages[number - 1]
        return Step(f"train-{name}", (*PROGRAM, "train", str(recipe), *settings), reads=recipe)

    takes_mined = any(Path(part.file).name in mined for part in recipes[0].data if part.hard_negatives)
    plain_first = "plain-stage1" if takes_mined else "stage1"
    by_minilm = recipes[0].train.teacher is not None
    # no more rows than both stages take
    taken = sum(recipe.train.steps * recipe.train.batch for recipe in recipes)
    teacher = ("--teacher", str(folder / "plain-stage1"), "--rows", str(taken))
    if by_minilm:
        teacher = ("--teacher", "minilm", "--dtype", "bfloat16", "--vectors", str(folder / "vectors"))
    else:
        yield train(1, "plain-stage1", plain=True)
    for name in sorted(mined):
        part = sets[name]
        asked = ("--task", part.instruction, "--max-length", str(recipes[0].train.max_length))
        number = max(p.hard_negatives for r in recipes for p in r.data if Path(p.file).name == name)
        yield Step(
            f"mine-{Path(name).stem}",
            (*PROGRAM, "mine", str(folder / "data" / name), "-o", str(folder / "mined" / name))
            + (*teacher, "--negatives", str(number), *asked),
        )
    if by_minilm and four_rows and takes_mined:
        yield train(1, "plain-stage1", plain=True)
    yield train(1, "stage1")
    yield train(2, "stage2", start=folder / "stage1")
    scored = ["stage2"]
    if four_rows:
        yield train(2, "plain-stage2", start=folder / plain_first, plain=True)
        scored = [*dict.fromkeys([plain_first, "plain-stage2", "stage1", "stage2"])]
    scores = str(folder / "scores")
    dtype = ("--dtype", "bfloat16") if recipes[1].train.autocast == "bfloat16" else ()
    for name in scored:
        model = ("--model", str(folder / name), "--name", name, *dtype)
        yield Step(f"eval-{name}", (*PROGRAM, "eval", "--tasks", *tasks, *model, "-o", scores))
    pictures = folder / "pictures"
    draw = (sys.executable, "examples/pictures.py", str(folder / "stage2"), "-o", str(pictures))
    yield Step("pictures", (*draw, "--pairs", str(folder / "data" / "dev.jsonl")))
    report = (*PROGRAM, "eval", "--report", scores, "--picture", str(pictures / "scores.png"))
    yield Step("report", report, runs_always=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="demo-short", choices=[*SCORED], help="[%(default)s]")
    parser.add_argument("-o", "--output", type=Path, help="folder of all results [runs/RECIPE]")
    parser.add_argument("--four-rows", action="store_true", help="without mined negatives, too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on")
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"train_demo: {error}")
