"""A recipe: every key has a type and a range, and an unknown one names the nearest."""

import copy
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from nvembed_fast.training import recipe as module
from nvembed_fast.training.recipe import DataPart, ModelPart, Recipe, RecipeError, TrainPart, defaults

LEAST = """
output = "out"
seed = 7

[model]
start = "base"
layers = 4
pooling_head = "latent"

[train]
steps = 10
batch = 4
lr = 1e-4
warmup = 2
temperature = 0.05
max_length = 64
lora_rank = 8
checkpoint_every = 5

[[data]]
file = "pairs.jsonl"
instruction = "Given a question, retrieve passages"
in_batch = true
hard_negatives = 1
weight = 2.0
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(LEAST)
    return path


def test_the_least_recipe_and_the_defaults_of_the_rest(file, tmp_path):
    recipe = Recipe.from_file(file)
    assert recipe.output == str(tmp_path / "out") and recipe.seed == 7
    # no such directory beside the file: a hub id, or an error where it is resolved
    assert recipe.model == ModelPart("base", 4, "latent")
    assert recipe.train.lora_rank == 8 and recipe.train.weight_decay == TrainPart().weight_decay
    (data,) = recipe.data
    assert data == DataPart(str(tmp_path / "pairs.jsonl"), data.instruction, hard_negatives=1, weight=2.0)


def test_the_printed_defaults_are_a_whole_recipe():
    raw = tomllib.loads(defaults())
    recipe = Recipe.from_dict(raw)
    assert recipe.train == TrainPart() and recipe.log == module.LogPart()
    for part in (Recipe, TrainPart, ModelPart, module.LogPart, DataPart):
        for key in (f for f in fields(part) if f.metadata):
            assert f"{key.name} = " in defaults() and key.metadata["meaning"] in defaults(), key.name
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_paths_are_relative_to_the_file_and_on_the_command_line_to_the_directory(file, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = Recipe.from_file(file, ["data.0.file=b.jsonl"])
    assert recipe.model.start == str(tmp_path / "base")
    assert recipe.output == str(tmp_path / "out")
    assert recipe.data[0].file == str(tmp_path / "elsewhere" / "b.jsonl")
    hub = Recipe.from_file(file, ['model.start="owner/name"', "output=~/x"])
    assert hub.model.start == "owner/name" and hub.output == str(Path.home() / "x")


@pytest.mark.parametrize("start", ["demo", "owner/name"])
def test_a_name_in_the_file_means_the_same_from_every_directory(start, file, tmp_path, monkeypatch):
    file.write_text(LEAST.replace('"base"', f'"{start}"'))
    (tmp_path / "elsewhere" / start).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Recipe.from_file(file, ["seed=1"]).model.start == start
    beside = str(tmp_path / "elsewhere" / start)
    for override in (f"model.start={start}", f'model={{start="{start}"}}'):
        assert Recipe.from_file(file, [override]).model.start == beside


def test_overrides_take_values_and_bare_words(file):
    recipe = Recipe.from_file(file, ["train.lr=3e-5", "model.pooling_head=mean", "data.0.weight=5", "seed=3"])
    assert (recipe.train.lr, recipe.model.pooling_head, recipe.seed) == (3e-5, "mean", 3)
    assert recipe.data[0].weight == 5.0 and isinstance(recipe.data[0].weight, float)


def test_a_star_means_every_data_set(file):
    file.write_text(file.read_text() + '[[data]]\nfile = "other.jsonl"\n')
    recipe = Recipe.from_file(file, ["data.*.in_batch=false", "data.*.hard_negatives=3", "data.1.weight=9"])
    assert [(d.in_batch, d.hard_negatives, d.weight) for d in recipe.data] == [(False, 3, 2), (False, 3, 9)]
    with pytest.raises(RecipeError, match="no key 'data.0.wieght': did you mean 'data.0.weight'"):
        Recipe.from_file(file, ["data.*.wieght=1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"temprature": 1}}, r"no key 'train.temprature': did you mean 'train.temperature'\?"),
        ({"steps": 3}, r"no key 'steps': did you mean 'train.steps'\?"),
        ({"model": {"start": "x", "lora_rank": 3}}, r"'model.lora_rank': did you mean 'train.lora_rank'"),
        ({"data": [{"file": "x", "wieght": 2}]}, r"'data.0.wieght': did you mean 'data.0.weight'\?"),
        ({"train": {"learning_rate": 1}}, r"no key 'train.learning_rate': did you mean 'train.lr'\?"),
        ({"model": {"path": "x"}}, r"no key 'model.path': did you mean 'model.start'\?"),
        ({"train": {"batchsize": 1}}, r"'train.batchsize': did you mean 'train.batch'\?"),
        ({"train": {"num_epochs": 1}}, r"'train.num_epochs': did you mean 'train.steps'\?"),
        ({"batch_size": 1}, r"'batch_size': did you mean 'train.batch'\?"),
        ({"train": {"model_name_or_path": 1}}, r"did you mean 'model.start'\?"),
        ({"train": {"qqq": 1}}, "no key 'train.qqq': there are steps, batch"),
        ({"train": {"temperature": 0}}, "train.temperature must be a number above 0 and at most 100, got 0"),
        ({"train": {"temperature": float("nan")}}, "temperature must be a number above 0"),
        ({"train": {"steps": 0}}, "train.steps must be a number from 1 to 2147483647, got 0"),
        ({"train": {"steps": True}}, "train.steps must be an integer, got True"),
        ({"train": {"steps": 1.5}}, "train.steps must be an integer, got 1.5"),
        ({"train": {"lr": "big"}}, "train.lr must be a number, got 'big'"),
        ({"train": {"head": "half"}}, "train.head must be one of 'full', 'lora', 'frozen', got 'half'"),
        ({"train": 3}, r"train must be a table, \[train\], got 3"),
        ({"train": {"both_directions": 1}}, "both_directions must be true or false, got 1"),
        ({"data": []}, r"data must be at least one table \[\[data\]\]"),
        ({"data": {"file": "x"}}, r"data must be at least one table \[\[data\]\]"),
        ({"data": [{"weight": 1}]}, "data.0.file is missing"),
        ({"data": [{"file": "x", "weight": 0}]}, "data.0.weight must be a number above 0"),
        ({"model": {}}, "model.start is missing"),
        ({"output": " "}, "output is empty"),
        ({"seed": -1}, "seed must be a number from 0"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    raw = copy.deepcopy(tomllib.loads(LEAST)) | change
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(raw)


def test_an_error_names_the_file(file, tmp_path):
    with pytest.raises(RecipeError, match="recipe.toml: no key 'train.stepz': did you mean 'train.steps'"):
        Recipe.from_file(file, ["train.stepz=3"])
    for override, message in {
        "train.lr": "--set takes KEY=VALUE",
        "data.3.file=x": "--set data.3.file: data has 1 tables, counted from 0",
        "data.0=x": "--set data.0: name a key of one data set",
        "seed.x=2": "--set seed.x: seed is no table",
    }.items():
        with pytest.raises(RecipeError, match=message):
            Recipe.from_file(file, [override])
    file.write_text("output = ")
    with pytest.raises(RecipeError, match="recipe.toml is no TOML file"):
        Recipe.from_file(file)
    file.write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="recipe.toml is no TOML file"):
        Recipe.from_file(file)
    with pytest.raises(FileNotFoundError, match="none.toml is missing"):
        Recipe.from_file(tmp_path / "none.toml")
