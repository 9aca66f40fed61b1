"""Saving: a round trip bit for bit, the whole old model or the whole new one, and one test per error."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_checkpoint import (
    QUERY,
    TINY,
    copy_tiny,
    everything,
    save_sharded,
)

from nvembed_fast.checkpoint import load_model, save, save_model, tokenizer_files
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.network.model import NVEmbedModel

SHARDED = {"max_shard_bytes": 400_000}


@pytest.fixture
def tiny(tmp_path) -> Path:
    return copy_tiny(tmp_path / "tiny")


@pytest.fixture
def sharded(tiny) -> Path:
    return save_sharded(tiny)


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 400_000, 1])
def test_round_trip_is_bit_exact(tmp_path, max_shard_bytes):
    model = load_model(TINY, dtype="float16")
    save_model(model, tmp_path / "a" / "b", max_shard_bytes=max_shard_bytes)
    files = sorted(p.name for p in (tmp_path / "a" / "b").iterdir())
    weights = [f for f in files if f.endswith(".safetensors")]
    if max_shard_bytes == 5_000_000_000:
        assert files == ["config.json", "model.safetensors"]
        modes = {(tmp_path / "a" / "b" / file).stat().st_mode for file in files}
        assert len(modes) == 1, "a user who may read the config may not read the weights"
    else:
        assert set(files) - set(weights) == {"config.json", "model.safetensors.index.json"}
        assert len(weights) == (43 if max_shard_bytes == 1 else 3)
        assert weights[0] == f"model-00001-of-{len(weights):05}.safetensors"
    saved = {}
    for file in weights:
        part = load_file(tmp_path / "a" / "b" / file)
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= max_shard_bytes
        saved |= part
    stored = load_file(TINY / "model.safetensors")
    assert saved.keys() == stored.keys()
    for name, tensor in stored.items():
        assert saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor), name
    again = load_model(tmp_path / "a" / "b", dtype="float16")
    assert again.config == model.config
    for got, wanted in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, wanted)


def test_index_has_the_published_form(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    sizes = 0
    for file in sharded.glob("model-*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            assert stored.metadata() == {"format": "pt"}
            assert set(stored.keys()) == {name for name, f in index["weight_map"].items() if f == file.name}
        sizes += sum(t.nbytes for t in load_file(file).values())
    assert index["metadata"]["total_size"] == sizes
    assert not (sharded / "model.safetensors").exists(), "the earlier save's file would shadow the shards"


def test_saving_again_replaces_the_earlier_layout(sharded):
    model = load_model(sharded, dtype="float16")
    (sharded / "notes.txt").write_text("not ours")
    save_model(model, sharded)
    assert sorted(p.name for p in sharded.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    load_model(sharded)


def test_saving_states_the_dtype_it_stored(tmp_path):
    model = load_model(TINY)
    save_model(model, tmp_path, dtype="bfloat16")
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"


def test_tokenizer_files_are_copied(tmp_path, tiny):
    (tiny / "tokenizer.json").write_text("{}")
    (tiny / "tokenizer_config.json").write_text("{ }")
    found = tokenizer_files(tiny)
    assert [p.name for p in found] == ["tokenizer.json", "tokenizer_config.json"]
    save_model(load_model(tiny), tmp_path / "out", tokenizer_files=found)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{ }"
    # in place: a file onto itself
    save_model(load_model(tiny), tiny, tokenizer_files=found)
    assert (tiny / "tokenizer_config.json").read_text() == "{ }"


@pytest.mark.parametrize("existed", [True, False])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, existed):
    model = load_model(TINY, dtype="float16")
    directory = tmp_path / "out"
    if existed:
        save_model(model, directory)
    before = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    real, calls = save.save_file, []

    def full(tensors, file, metadata):
        calls.append(file)
        if len(calls) == 3:
            Path(file).write_bytes(b"half")
            raise save.SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, file, metadata)

    monkeypatch.setattr(save, "save_file", full)
    with pytest.raises(OSError, match="cannot write the weights to .*out: .*No space left"):
        save_model(model, directory, max_shard_bytes=400_000)
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert directory.exists() == existed
    assert not list(tmp_path.rglob(".saving-*"))


def test_ctrl_c_while_saving_leaves_what_was_there(tmp_path, monkeypatch):
    model = load_model(TINY, dtype="float16")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "_write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def intercept(patch, before=lambda: None, after=lambda: None) -> None:
    """Call `before` and `after` around everything that renames or removes."""

    def wrap(real):
        def call(*args, **options):
            before()
            result = real(*args, **options)
            after()
            return result

        return call

    for module, name in (os, "replace"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree"):
        patch.setattr(module, name, wrap(getattr(module, name)))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "old, new",
    [
        pytest.param(None, {}, id="nothing-to-1"),
        pytest.param(None, SHARDED, id="nothing-to-3"),
        pytest.param({}, SHARDED, id="1-to-3"),
        pytest.param(SHARDED, {}, id="3-to-1"),
        pytest.param(SHARDED, SHARDED, id="3-to-3"),
    ],
)
def test_an_interruption_leaves_the_old_or_the_new_model(tmp_path, monkeypatch, old, new, when):
    model, other = (load_model(TINY, dtype="float16") for _ in range(2))
    with torch.no_grad():
        for p in other.parameters():
            p.neg_()
    (tmp_path / "tokenizer.json").write_text("new")
    new = new | {"tokenizer_files": [tmp_path / "tokenizer.json"]}

    def prepared(name: str) -> tuple[Path, Path]:
        """The root of everything that a save may touch, and the directory in it to save to."""
        root = tmp_path / name
        root.mkdir()
        if old is None:
            return root, root / "a" / "b"
        save_model(model, root, **old)
        (root / "tokenizer.json").write_text("old")
        (root / "notes.txt").write_text("not ours")
        return root, root

    root, directory = prepared("wanted")
    old_model = everything(root)
    save_model(other, directory, **new)
    new_model = everything(root)
    wholes = [{n: b for n, b in m.items() if b is not None} for m in (old_model, new_model)]

    outcomes = []
    for number in range(100):
        root, directory = prepared(str(number))
        calls = 0

        def interrupt():
            nonlocal calls
            # a process killed here leaves no model or a whole one
            now = {n: b for n, b in everything(root).items() if b is not None and "/." not in f"/{n}"}  # noqa: B023
            assert not any(n.endswith("config.json") for n in now) or now in wholes
            calls += 1
            if calls == number + 1:  # noqa: B023
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            intercept(patch, **{when: interrupt})
            try:
                save_model(other, directory, **new)
            except KeyboardInterrupt:
                pass
            else:
                break
        left = everything(root)
        assert left in (old_model, new_model), f"call {number}: {sorted(left)}"
        outcomes.append(left == new_model)
        shutil.rmtree(root)
    assert everything(root) == new_model
    # every rename of both models came under it, and both outcomes did
    assert len(outcomes) > len(new_model) and outcomes == sorted(outcomes) and len(set(outcomes)) == 2


# five files of the old model leave and two of the new one come. Then one goes back and the five after it
@pytest.mark.parametrize("fails", [(2, 3), (6, 7), (6, 11), (7, 8), (7, 9), (7, 11), (7, 13)])
def test_an_old_model_that_cannot_be_put_back_is_named(sharded, monkeypatch, fails):
    before = everything(sharded)
    assert len(before) == 5
    model = load_model(sharded, dtype="float16")
    real, calls = os.replace, []

    def fail(source, target):
        calls.append(source)
        if len(calls) in fails:
            raise OSError(f"rename {len(calls)} failed")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=rf"putting the old model back.*rename {fails[1]} failed") as caught:
        save_model(model, sharded)
    assert len(calls) == fails[1]
    (retired,), (aside,) = sharded.glob(".old-*"), sharded.glob(".saving-*")
    assert f"old one are in {retired}, of the new one in {aside}" in str(caught.value)
    assert not (sharded / "config.json").exists()
    left = everything(sharded) | everything(retired)
    assert {name: left.get(name) for name in before} == before


def test_links_of_a_hub_snapshot_are_put_back(sharded, monkeypatch):
    model = load_model(sharded, dtype="float16")
    (sharded.parent / "blobs").mkdir()
    for file in list(sharded.iterdir()):
        file.rename(sharded.parent / "blobs" / file.name)
        file.symlink_to(Path("..", "blobs", file.name))
    before, blobs = everything(sharded), everything(sharded.parent / "blobs")
    real = os.replace

    def fail(source, target):
        if ".saving-" in str(source):
            raise OSError("the disk is full")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="the disk is full"):
            save_model(model, sharded)
    assert everything(sharded) == before and all(p.is_symlink() for p in sharded.iterdir())
    save_model(model, sharded)
    assert everything(sharded).keys() == {"config.json", "model.safetensors"}
    assert everything(sharded.parent / "blobs") == blobs


def test_parents_made_for_a_save_that_fails_are_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no\.json"):
        save_model(load_model(TINY), tmp_path / "mine" / "a" / "b", tokenizer_files=[tmp_path / "no.json"])
    assert everything(tmp_path) == {"mine": None}


def test_values_that_do_not_fit_are_not_saved(tmp_path):
    model = load_model(TINY)
    with torch.no_grad():
        model.embedding_model.layers[1].self_attn.qkv_proj.weight[3, 4] = 1e5
    with pytest.raises(ValueError, match=rf"{QUERY}' does not fit float16: nothing was saved"):
        save_model(model, tmp_path / "out", dtype="float16")
    with torch.no_grad():
        model.embedding_model.layers[1].self_attn.qkv_proj.weight[3, 4] = math.nan
    with pytest.raises(ValueError, match=rf"{QUERY}' holds NaN or Inf: nothing was saved"):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_configs_differ_only_in_what_they_say(tmp_path):
    """`load_model` reads back every field of the config that `save_model` wrote."""
    config = dataclasses.replace(
        NVEmbedConfig.from_file(TINY / "config.json"), pooling_start="text_offset", is_mask_instruction=False
    )
    model = NVEmbedModel(config).half()
    save_model(model, tmp_path)
    assert load_model(tmp_path).config == config
