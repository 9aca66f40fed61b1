"""The recipes of recipes/: their keys are known, and each value of the published model's has a mark."""

import re
from pathlib import Path

import pytest

from nvembed_fast.training.recipe import Recipe
from nvembed_fast.training.rows import open_rows

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
NAMES = ("nv-embed-v2", "smollm2", "demo-short", "demo", "ablation")


@pytest.mark.parametrize("name", NAMES)
def test_stage_2_goes_on_from_stage_1(name):
    first, second = (Recipe.from_file(FOLDER / f"{name}-stage{stage}.toml") for stage in (1, 2))
    assert second.model.start == first.output and second.output != first.output
    assert all(part.in_batch for part in first.data) and not any(part.in_batch for part in second.data)
    assert {part.file for part in first.data} <= {part.file for part in second.data}
    assert first.train.temperature == second.train.temperature


def test_every_file_is_a_stage():
    assert {p.stem for p in FOLDER.iterdir()} == {
        f"{name}-stage{stage}" for name in NAMES for stage in (1, 2)
    }


@pytest.mark.parametrize("stage", [1, 2])
def test_each_value_of_the_published_model_has_a_mark(stage):
    lines = (FOLDER / f"nv-embed-v2-stage{stage}.toml").read_text().splitlines()
    values = [line for line in lines if re.match(r"\w+ = ", line)]
    free = ("output", "instruction", "file")  # paths are the reader's, and instructions are in our words
    marked = [line for line in values if not line.startswith(free)]
    assert len(marked) > 30
    for line in marked:
        assert re.search(r"# (published|second-hand|inferred|recalled|ours)\b", line), line


def test_the_values_that_are_known():
    first, second = (Recipe.from_file(FOLDER / f"nv-embed-v2-stage{stage}.toml") for stage in (1, 2))
    assert (first.train.batch, first.train.steps, first.train.warmup) == (128, 20000, 50)
    assert (first.train.lora_rank, first.train.lora_alpha, first.train.lora_dropout) == (16, 32, 0.1)
    assert (first.train.temperature, first.train.max_length) == (0.02, 512)
    assert {part.hard_negatives for part in (*first.data, *second.data)} == {7}
    assert {Path(part.file).stem for part in second.data if part.labels == "examples"} == {
        "amazon_reviews",
        "emotion",
    }


def test_the_recipe_of_the_page_is_one(tmp_path):
    page = (FOLDER.parent / "docs" / "training.md").read_text()
    (text,) = re.findall(r"^```text\n(output = .*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "recipe.toml").write_text(text)
    recipe = Recipe.from_file(tmp_path / "recipe.toml")
    assert recipe.data[0].file == str(tmp_path / "pairs.jsonl") and recipe.train.batch == 32
    assert all("#" in line for line in text.splitlines() if line and line[0] not in "[i")


def test_the_rows_of_the_page_are_some(tmp_path):
    page = (FOLDER.parent / "docs" / "training.md").read_text()
    (text,) = re.findall(r"^```text\n(\{.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "rows.jsonl").write_text(text)
    rows = open_rows(tmp_path / "rows.jsonl")
    assert rows.row(0).negatives and rows.labelled(1).label == "refund" and len(rows) == 2
