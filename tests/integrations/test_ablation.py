"""nvembed-fast ablate on tiny cells, through mteb: rows, going on, and what is computed once."""

import contextlib
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import killed_cells
import pytest
import torch
from training_runs import recipe_of, write_pairs, write_recipe, write_start

from nvembed_fast import cli, files
from nvembed_fast.cli import process
from nvembed_fast.evaluation import ablation, tasks
from nvembed_fast.integrations import mteb
from nvembed_fast.stream import TextsCut
from nvembed_fast.training import trainer
from nvembed_fast.training.run_log import read_metrics

TABLE = """
base = ["first.toml", "second.toml"]
seeds = [0, 1]
tasks = ["squad", "r52"]

[[run]]
name = "two"

[[run]]
name = "one"
stages = [1]
set = { train.lr = 2e-2 }
against = "two"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cells")
    start = write_start(folder / "start")
    write_pairs(folder / "pairs.jsonl")
    write_recipe(folder / "first.toml", recipe_of(folder, start))
    write_recipe(folder / "second.toml", recipe_of(folder, start, steps=4, data={"in_batch": False}))
    (folder / "table.toml").write_text(TABLE)
    return folder


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setattr(tasks, "load", killed_cells.load)


def ablate(capsys, *words) -> tuple[int, str, str]:
    status = cli.main(["ablate", *map(str, words)])
    return status, *capsys.readouterr()


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "table.jsonl").read_text().splitlines()]


def test_cells_are_trained_scored_and_left(folder, planted, tmp_path, capsys, monkeypatch):
    words = (folder / "table.toml", "-o", tmp_path / "rows", "--work", tmp_path / "work")
    status, printed, error = ablate(capsys, *words, "--run", "two", "--seed", 0, "--keep")
    assert status == 0 and printed.startswith("table: two, seed 0: mean of 2 tasks"), error
    (cell,) = (path for path in (tmp_path / "work").iterdir() if path.is_dir())
    lines = [line for stage in ("stage1", "stage2") for line in read_metrics(cell / stage / "metrics.jsonl")]
    (row,) = rows(tmp_path / "rows")
    assert (
        (row["steps"], row["tokens"])
        == (10, sum(line["tokens"] for line in lines))
        == (len(lines), row["tokens"])
    )
    assert set(row["scores"]) == {"squad", "r52"} and all(0 < s <= 1 for s in row["scores"].values())
    assert row["revisions"] == {name: task.revision for name, task in killed_cells.PLANTED.items()}
    assert set(row["data"]) == {"pairs"} and set(row["versions"]) == {"torch", "mteb"}
    assert (row["device"], row["made_of"]) == ("cpu", cell.name)

    status, printed, error = ablate(capsys, *words)
    assert status == 0 and "1 of 4 cells are done" in error, error
    assert [line.split(": mean")[0] for line in printed.splitlines()] == [
        "table: one, seed 0", "table: two, seed 1", "table: one, seed 1"
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "work").iterdir() if path.is_dir()] == [cell.name], "cells left"
    found = rows(tmp_path / "rows")
    assert [(r["run"], r["seed"]) for r in found] == [("two", 0), ("two", 1), ("one", 0), ("one", 1)]
    assert found[0] == row and found[2]["steps"] == 6
    assert len({str(r["scores"]) for r in found}) == 4, "seeds and runs do not differ, so this proves little"

    monkeypatch.setattr(trainer, "train", lambda *_, **__: pytest.fail("a finished cell is trained again"))
    status, printed, error = ablate(capsys, *words)
    assert (status, printed) == (0, "") and "4 of 4 cells are done" in error
    # the same cells under other names are not computed again
    other = tmp_path / "other.toml"
    for name in ("first.toml", "second.toml"):
        (tmp_path / name).write_text((folder / name).read_text())
    other.write_text(TABLE.replace('"two"', '"zwei"'))
    status, printed, error = ablate(capsys, other, *words[1:])
    assert status == 0 and len(printed.splitlines()) == 4, error
    assert "zwei" in (tmp_path / "rows" / "other.jsonl").read_text()


def test_a_row_of_other_data_is_not_taken_over(folder, planted, tmp_path, capsys, monkeypatch):
    for name in ("first.toml", "second.toml", "table.toml"):
        (tmp_path / name).write_text((folder / name).read_text())
    words = ("-o", tmp_path / "rows", "--work", tmp_path / "work", "--seed", 0, "--run")
    assert ablate(capsys, tmp_path / "table.toml", *words, "two")[0] == 0
    (row,) = rows(tmp_path / "rows")
    (tmp_path / "other.toml").write_text(TABLE)
    results = tmp_path / "rows" / "table.jsonl"
    results.write_text(json.dumps(row | {"data": {"pairs": "0" * 12}, "scores": {"squad": 9, "r52": 9}}))
    assert ablate(capsys, tmp_path / "other.toml", *words, "two")[0] == 0
    (made,) = (json.loads(line) for line in (tmp_path / "rows" / "other.jsonl").read_text().splitlines())
    assert made["scores"] == row["scores"] and made["data"] == row["data"]


def test_a_file_that_changes_under_a_training_gives_no_row(folder, planted, tmp_path, capsys, monkeypatch):
    pairs, real = tmp_path / "pairs.jsonl", trainer.train
    for name in ("first.toml", "second.toml", "table.toml", "pairs.jsonl"):
        (tmp_path / name).write_text(
            (folder / name).read_text().replace(f"{folder}/pairs", f"{tmp_path}/pairs")
        )

    def train(recipe, **options):
        real(recipe, **options)
        pairs.write_text(pairs.read_text().replace("w1", "w2"))

    monkeypatch.setattr(trainer, "train", train)
    words = (tmp_path / "table.toml", "-o", tmp_path / "rows", "--work", tmp_path / "work")
    status, _, error = ablate(capsys, *words, "--seed", 0, "--run", "one")
    assert status == 1 and "pairs changed while table: one, seed 0 was trained" in error, error
    assert not (tmp_path / "rows").exists()


def test_an_interrupted_table_goes_on(folder, planted, tmp_path, capsys, monkeypatch):
    real = trainer._Run.step

    def step(self, number, batch):
        if number == 2 and self.recipe.seed == 1:
            raise KeyboardInterrupt
        return real(self, number, batch)

    monkeypatch.setattr(trainer._Run, "step", step)
    words = (folder / "table.toml", "-o", tmp_path / "rows", "--work", tmp_path / "work", "--seed", 0)
    status, _, error = ablate(capsys, *words, "--run", "one", "--run", "two")
    assert status == 130 and "0 of 2 cells have their rows, and the same command goes on" in error
    monkeypatch.undo()
    monkeypatch.setattr(tasks, "load", killed_cells.load)
    assert ablate(capsys, *words)[0] == 0 and len(rows(tmp_path / "rows")) == 2


def test_texts_are_cut_and_scored_in_the_arithmetic_of_training(
    folder, planted, tmp_path, capsys, monkeypatch
):
    found, real = [], mteb.score

    def score(task, door):
        found.append((door.max_length, door.model.dtype))
        warnings.warn("2 of 3 texts were cut", TextsCut, stacklevel=2)
        return real(task, door)

    monkeypatch.setattr(mteb, "score", score)
    monkeypatch.setattr(tasks, "load", lambda name: replace(killed_cells.PLANTED[name], max_length=60))
    table = folder / "cut.toml"
    table.write_text(TABLE.replace("seeds", "max_length = 48\nseeds"))
    words = ("-o", tmp_path / "rows", "--work", tmp_path / "work", "--run", "one", "--seed", 0)
    status, _, error = ablate(capsys, table, *words)
    assert status == 0
    assert [line for line in error.splitlines() if "texts were cut" in line] == [
        "note: 2 of 3 texts were cut"
    ] * 2
    assert ablate(capsys, folder / "table.toml", *words, "--set", "train.autocast=bfloat16")[0] == 0
    assert found == [(48, torch.float32)] * 2 + [(60, torch.bfloat16)] * 2


@pytest.mark.parametrize("ends_with_its_row", [True, False])
def test_two_processes_share_a_table(folder, planted, tmp_path, capsys, monkeypatch, ends_with_its_row):
    table = ablation.read_table(folder / "table.toml")
    results, work = tmp_path / "rows", tmp_path / "work"
    words = (folder / "table.toml", "-o", results, "--work", work, "--seed", 0)
    work.mkdir()
    trained, real = [], ablation.run_cell

    def run_cell(cell, *arguments, **options):
        trained.append(cell.run.name)
        return real(cell, *arguments, **options)

    monkeypatch.setattr(ablation, "run_cell", run_cell)
    first = table.cells()[0]
    with contextlib.ExitStack() as other:
        other.enter_context(files.alone(work, f".{first.made_of}.lock"))

        def say(message):
            if message == "waiting for other processes, which are at table: two, seed 0":
                assert [row["run"] for row in rows(results)] == ["one"]
                if ends_with_its_row:
                    ablation.write_row(results, first, rows(results)[0] | {"made_of": first.made_of})
                other.close()

        monkeypatch.setattr(process, "say", say)
        status, printed, error = ablate(capsys, *words)
    assert (status, [row["run"] for row in rows(results)]) == (0, ["two", "one"]), error
    assert trained == (["one"] if ends_with_its_row else ["one", "two"])
    assert len(printed.splitlines()) == len(trained)


def test_a_cell_that_finds_its_stage_at_work_is_an_error(folder, planted, tmp_path, capsys, monkeypatch):
    def run_cell(*_, **__):
        raise BlockingIOError("another process is at work in stage1: wait for its end")

    monkeypatch.setattr(ablation, "run_cell", run_cell)
    status, _, error = ablate(capsys, folder / "table.toml", "-o", tmp_path, "--work", tmp_path / "work")
    assert status == 1 and "another process is at work in stage1" in error


def test_a_task_without_data_ends_it_before_any_run(folder, tmp_path, capsys, monkeypatch):
    def load(name, cache=None):
        raise tasks.SkippedTask("the data of squad cannot be had here: planted")

    monkeypatch.setattr(tasks, "load", load)
    monkeypatch.setattr(trainer, "train", lambda *_, **__: pytest.fail("a cell was trained"))
    status, _, error = ablate(capsys, folder / "table.toml", "-o", tmp_path, "--work", tmp_path / "work")
    assert status == 1 and "no cell was run: the data of squad cannot be had here: planted" in error


def test_a_killed_table_ends_with_the_same_rows(folder, tmp_path):
    found, killed = [], []
    for name, kills in (("whole", 0), ("killed", 5)):
        place = tmp_path / name
        place.mkdir()
        for file in ("first.toml", "second.toml", "table.toml"):
            (place / file).write_text((folder / file).read_text())
        words = [sys.executable, killed_cells.__file__, "table.toml", "work", str(kills), "1", "12"]
        run = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=900)
        assert run.returncode == 0, run.stderr[-3000:]
        killed.append(int(run.stdout.splitlines()[-1]))
        found.append((place / "results" / "table.jsonl").read_bytes())
    assert killed == [0, 5], "a run was not killed at work, so this proves less"
    assert found[0] == found[1]
