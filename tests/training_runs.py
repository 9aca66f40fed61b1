"""Small runs of the trainer: a tiny decoder, rows of words, and a recipe."""

import json
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_decoders import write_mistral

from nvembed_fast.new_model import init_model
from nvembed_fast.training.recipe import Recipe
from nvembed_fast.training.run_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "nvembed_fast", "train"]


def write_pairs(file: Path, count: int = 40, seed: int = 0) -> Path:
    """Rows whose query shares a word with its positive, with a teacher's scores."""
    draw = random.Random(seed)

    def words(first: int, number: int) -> str:
        return " ".join([f"w{first}", *(f"w{draw.randrange(97)}" for _ in range(number - 1))])

    rows = []
    for index in range(count):
        key = index % 97
        rows.append(
            {
                "query": words(key, draw.randint(2, 4)),
                "pos": [words(key, draw.randint(3, 9))],
                "neg": [words(draw.randrange(97), draw.randint(3, 9)) for _ in range(2)],
                "pos_scores": [1 + index % 3],
                "neg_scores": [0.5, -index % 2],
            }
        )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_start(folder: Path, pooling_head: str = "latent") -> Path:
    """A tiny model to train."""
    decoder = write_mistral(folder / "decoder")
    sizes = {"num_latents": 8, "num_heads": 2, "head_width": 16}
    init_model(decoder, folder / "base", pooling_head=pooling_head, **sizes)
    return folder / "base"


def recipe_of(folder: Path, start: Path, output: str = "out", **changes) -> Recipe:
    """A recipe of 6 steps. Changes are keys of [train], or "data" and "log" tables."""
    data = {"file": str(folder / "pairs.jsonl"), "instruction": "w1 w2", "hard_negatives": 1}
    train = {"steps": 6, "batch": 4, "lr": 1e-2, "warmup": 2, "temperature": 0.1, "max_length": 48}
    train |= {"lora_rank": 0, "checkpoint_every": 2, "max_tokens": 60}
    raw = {
        "output": str(folder / output),
        "seed": 3,
        "model": {"start": str(start)},
        "data": [data | changes.pop("data", {})],
        "log": {"picture": False} | changes.pop("log", {}),
        "train": train | changes,
    }
    return Recipe.from_dict(raw)


def write_recipe(file: Path, recipe: Recipe) -> Path:
    """The recipe as a TOML file."""
    raw = recipe.to_dict()
    data, tables = raw.pop("data"), {n: raw.pop(n) for n in ("model", "train", "log")}
    lines = [_line(*item) for item in raw.items()]
    for name, table in tables.items():
        lines += [f"[{name}]", *(_line(*item) for item in table.items())]
    for table in data:
        lines += ["[[data]]", *(_line(*item) for item in table.items())]
    file.write_text("\n".join(lines) + "\n")
    return file


def _line(name: str, value) -> str:
    return f"{name} = {json.dumps(value)}"


def losses(output: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(output / "metrics.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
