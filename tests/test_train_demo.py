"""From text to scores: the steps, how they go on, and the pictures."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from examples import pictures, train_demo
from nvembed_fast import NVEmbed, cli
from nvembed_fast.curation.sources import TEXT_SETS
from nvembed_fast.training.recipe import Recipe

RECIPES = train_demo.ROOT / "recipes"


def _steps(name: str, folder: Path, four_rows: bool = False) -> dict[str, train_demo.Step]:
    stages = [RECIPES / f"{name}-stage{number}.toml" for number in (1, 2)]
    found = list(train_demo.steps(stages, folder, train_demo.SCORED[name], four_rows))
    assert len({step.name for step in found}) == len(found)
    return {step.name: step for step in found}


def _options(step: train_demo.Step) -> dict[str, str]:
    return dict(zip(step.command[5::2], step.command[6::2], strict=False))


def _recipe(step: train_demo.Step) -> Recipe:
    """The recipe of a train step, with what it sets."""
    words = step.command[step.command.index("train") + 1 :]
    assert set(words[1::2]) == {"--set"}
    return Recipe.from_file(words[0], words[2::2])


def test_the_first_model_mines_the_negatives_of_the_others(tmp_path):
    steps = _steps("demo-short", tmp_path)
    order = [step for step in steps if not step.startswith("mine-")]
    assert order == [
        "curate", "train-plain-stage1", "train-stage1", "train-stage2", "eval-stage2", "pictures", "report"
    ]  # fmt: skip
    first, second, third = (_recipe(steps[f"train-{n}"]) for n in ("plain-stage1", "stage1", "stage2"))
    mining = [step for step in steps.values() if step.name.startswith("mine-")]
    assert len(mining) == len(first.data) == len(second.data) >= 2
    for plain, mined in zip(first.data, second.data, strict=True):
        assert Path(plain.file).parent == tmp_path / "data" and plain.hard_negatives == 0 and plain.in_batch
        assert Path(mined.file).parent == tmp_path / "mined" and mined.hard_negatives > 0
        (step,) = (s for s in mining if plain.file in s.command)
        options = _options(step)
        assert options["-o"] == mined.file and options["--teacher"] == first.output
        assert options["--task"] == mined.instruction
        assert int(options["--rows"]) == 100 * 32 + 60 * 16, "as many as both stages take"
        assert int(options["--negatives"]) >= max(
            part.hard_negatives for part in (*second.data, *third.data) if part.file == mined.file
        )
    assert first.model.start == second.model.start == "smollm2"
    assert third.model.start == second.output and third.output == str(tmp_path / "stage2")
    assert first.train == second.train and first.train.freeze_embeddings and third.train.freeze_embeddings


def test_a_teacher_mines_in_the_place_of_a_first_model(tmp_path):
    steps = _steps("demo", tmp_path)
    order = [step for step in steps if not step.startswith("mine-")]
    assert order == ["curate", "train-stage1", "train-stage2", "eval-stage2", "pictures", "report"]
    first, second = (_recipe(steps[f"train-{name}"]) for name in ("stage1", "stage2"))
    mining = {step.name for step in steps.values() if step.name.startswith("mine-")}
    assert first.train.distillation and first.train.teacher == str(tmp_path / "vectors")
    assert second.model.start == first.output
    assert list(steps).index("train-stage1") == 1 + len(mining) == 1 + len(second.data)
    for part in second.data:
        options = _options(steps[f"mine-{Path(part.file).stem}"])
        assert options["-o"] == part.file and options["--teacher"] == "minilm"
        assert options["--vectors"] == first.train.teacher
        assert int(options["--negatives"]) >= part.hard_negatives > 0
    assert {Path(part.file) for part in first.data} <= {Path(part.file) for part in second.data}
    assert second.train.autocast == "bfloat16" and "bfloat16" in steps["eval-stage2"].command
    steps = _steps("demo", tmp_path, four_rows=True)
    trained = [step for step in steps if step.startswith("train-")]
    assert trained == ["train-stage1", "train-stage2", "train-plain-stage2"], (
        "one stage 1: it has no mined negatives"
    )
    assert _recipe(steps["train-plain-stage2"]).model.start == first.output
    assert [step for step in steps if step.startswith("eval-")] == [
        "eval-stage1", "eval-plain-stage2", "eval-stage2"
    ]  # fmt: skip


def test_four_rows_differ_in_their_negatives_and_stages_alone(tmp_path):
    steps = _steps("demo-short", tmp_path, four_rows=True)
    models = ["plain-stage1", "plain-stage2", "stage1", "stage2"]
    assert [name for name in steps if name.startswith("eval-")] == [f"eval-{model}" for model in models]
    plain, mined = (_recipe(steps[f"train-{name}"]) for name in ("plain-stage2", "stage2"))
    assert plain.train == mined.train and plain.seed == mined.seed
    assert plain.model.start == str(tmp_path / "plain-stage1")
    assert all(part.in_batch and not part.hard_negatives for part in plain.data)
    assert not any(part.in_batch for part in mined.data)


def test_it_goes_on_behind_what_has_ended(tmp_path, monkeypatch, capsys):
    ran, failing = [], {"mine"}

    def run(command, cwd):
        assert cwd == train_demo.ROOT
        ran.append(command)
        return subprocess.CompletedProcess(command, 5 if failing & {*command} else 0)

    monkeypatch.setattr(train_demo.subprocess, "run", run)
    arguments = ["demo-short", "-o", str(tmp_path)]
    assert train_demo.main(arguments) == 5
    assert "ended with status 5: the same command goes on from there" in capsys.readouterr().err
    before = len(ran)
    failing.clear()
    assert train_demo.main(arguments) == 0
    assert [c for c in ran[before:] if "curate" in c] == [] and "mine" in ran[before]
    assert len(ran) == len(_steps("demo-short", tmp_path)) + 1
    again = len(ran)
    assert train_demo.main(arguments) == 0
    assert ran[again:] == [_steps("demo-short", tmp_path)["report"].command], "the report alone, always"


def test_a_changed_recipe_runs_its_step_and_all_behind_it_again(tmp_path, monkeypatch):
    ran, first = [], train_demo.Step("first", ("first",))
    for name in ("one", "two"):
        (tmp_path / f"{name}.toml").write_text("a")
    made = [train_demo.Step(name, (name,), reads=tmp_path / f"{name}.toml") for name in ("one", "two")]
    monkeypatch.setattr(train_demo, "steps", lambda *_: [first, *made, train_demo.Step("last", ("last",))])
    monkeypatch.setattr(
        train_demo.subprocess, "run", lambda c, cwd: ran.extend(c) or subprocess.CompletedProcess(c, 0)
    )

    def run() -> list[str]:
        ran.clear()
        assert train_demo.main(["demo-short", "-o", str(tmp_path / "out")]) == 0
        return [*ran]

    assert run() == ["first", "one", "two", "last"] and run() == []
    (tmp_path / "two.toml").write_text("b")
    assert run() == ["two", "last"]
    (tmp_path / "one.toml").write_text("b")
    assert run() == ["one", "two", "last"] and run() == []


def test_pictures_are_drawn_and_always_the_same(tmp_path):
    vectors = torch.nn.functional.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)))
    names = tuple(f"package{i % 15}.part:name{i}" for i in range(60))
    for number in "12":
        pictures.draw_map(vectors, names, tmp_path / f"map{number}.png", tsne=False)
        pictures.draw_cosines(vectors @ vectors.T, tmp_path / f"cosines{number}.png")
    for name in ("map", "cosines"):
        first, second = ((tmp_path / f"{name}{number}.png").read_bytes() for number in "12")
        assert first == second and 5_000 < len(first) < 100_000


def test_each_query_has_the_task_of_its_row(tiny_directory, tmp_path):
    rows = [
        {"query": "a date", "pos": ["the first of May"], "prompt": "Find a date"},
        {"query": "a sum", "pos": ["two and two"]},
        {"query": "bread", "pos": ["how to bake"], "prompt": "Find a date"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = NVEmbed.from_pretrained(tiny_directory)
    found = pictures.cosines(model, pictures.read_pairs(file))
    documents = model.encode_document([row["pos"][0] for row in rows])
    for number, row in enumerate(rows):
        task = row.get("prompt")
        query = model.encode_query(row["query"], task) if task else model.encode(row["query"])
        assert torch.allclose(found[number], documents @ query, atol=1e-5)


def test_of_a_long_file_some_hundreds_of_pairs_are_drawn(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = ({"query": str(number), "pos": ["a"]} for number in range(1000))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = [int(query) for query, *_ in pictures.read_pairs(file)]
    assert pictures.PAIRS <= len(numbers) < 2 * pictures.PAIRS and numbers[-1] > 990


@pytest.mark.parametrize("name", train_demo.SCORED)
def test_the_sets_are_those_of_curate_with_their_instructions(name, tmp_path):
    for number in (1, 2):
        for part in Recipe.from_file(RECIPES / f"{name}-stage{number}.toml").data:
            assert TEXT_SETS[Path(part.file).stem].instruction == part.instruction


def test_the_commands_take_these_options(tmp_path):
    """Of each step, by the command's own parser, which ends the process for a wrong one."""
    steps = _steps("demo-short", tmp_path, four_rows=True).values()
    ours = [step.command[3:] for step in steps if step.command[:3] == train_demo.PROGRAM]
    assert {command[0] for command in ours} == {"curate", "train", "mine", "eval"}
    for command in ours:
        cli._arguments([*command])
