"""The tiny model of tests/golden as a directory that a test may damage."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nvembed_fast.checkpoint import load_model, save_model

TINY = Path(__file__).parent / "golden" / "tiny_a"
# what a save of one file writes
SAVED = {"config.json", "config_sentence_transformers.json", "model.safetensors", "modules.json"}
EMBEDDING = "embedding_model.embed_tokens.weight"
QUERY = "embedding_model.layers.1.self_attn.q_proj.weight"


def copy_tiny(directory: Path) -> Path:
    """Its config and weights, in a new directory."""
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(TINY / name, directory / name)
    return directory


def save_sharded(directory: Path) -> Path:
    """Write the tiny model in three shards in the place of its one file."""
    save_model(load_model(directory, dtype="float16"), directory, max_shard_bytes=400_000)
    assert len(list(directory.glob("model-*.safetensors"))) == 3
    return directory


def edit_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    """Write the weights anew with tensors replaced, added, or (None) removed."""
    weights = load_file(directory / "model.safetensors") | changes
    kept = {name: value for name, value in weights.items() if value is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def everything(directory: Path) -> dict[str, bytes | None]:
    """Files with their bytes, and folders."""
    paths = {str(p.relative_to(directory)): p for p in directory.rglob("*")}
    return {name: p.read_bytes() if p.is_file() else None for name, p in paths.items()}


def intercept(patch, before=lambda: None, after=lambda: None) -> None:
    """Call `before` and `after` around everything that renames, links, removes or syncs."""

    def wrap(real):
        def call(*args, **options):
            before()
            result = real(*args, **options)
            after()
            return result

        return call

    changing = [(os, name) for name in ("replace", "link", "unlink", "rmdir", "fsync")] + [(shutil, "rmtree")]
    for module, name in changing:
        patch.setattr(module, name, wrap(getattr(module, name)))


def make_pipeline(directory: Path, *more: str) -> dict[str, str]:
    """Settings as sentence-transformers writes them beside a model, in front of modules of other classes."""
    ours = "nvembed_fast.integrations.sentence_transformers.NVEmbedModule"
    content = {
        "modules.json": json.dumps([{"idx": i, "type": kind} for i, kind in enumerate((ours, *more))]),
        "config_sentence_transformers.json": '{"prompts": {"query": "mine"}}',
        "sentence_bert_config.json": '{"max_seq_length": 64}',
    }
    for name, text in content.items():
        (directory / name).write_text(text)
    return content
