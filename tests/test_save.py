"""Saving: a round trip bit for bit, the whole old model or the whole new one, and one test per error."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_checkpoint import (
    QUERY,
    SAVED,
    TINY,
    copy_tiny,
    everything,
    intercept,
    make_pipeline,
    save_sharded,
)

from nvembed_fast import files
from nvembed_fast.checkpoint import load_model, pipeline_files, save, save_model, tokenizer_files
from nvembed_fast.config import DEFAULT_TASK, NVEmbedConfig, query_instruction
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
        assert {*files} == SAVED
        modes = {(tmp_path / "a" / "b" / file).stat().st_mode for file in files}
        assert len(modes) == 1, "a user who may read the config may not read the weights"
    else:
        assert {*files} - {*weights} == SAVED - {"model.safetensors"} | {"model.safetensors.index.json"}
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
    assert {p.name for p in sharded.iterdir()} == {*SAVED, "notes.txt"}
    load_model(sharded)


def test_sentence_transformers_is_told_whose_vectors_these_are(tmp_path):
    """Without modules.json that library pools by the mean."""
    save_model(load_model(TINY), tmp_path)
    (module,) = json.loads((tmp_path / "modules.json").read_text())
    assert module["type"].startswith("nvembed_fast.") and module["path"] == ""
    settings = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert settings["model_type"] == "SentenceTransformer"
    assert settings["prompts"] == {"query": query_instruction(DEFAULT_TASK), "document": ""}


def test_a_config_of_the_caller_is_written_in_the_place_of_ours(tmp_path):
    """sentence-transformers writes its own before the model, also into a new directory."""
    own = tmp_path / "config_sentence_transformers.json"
    own.write_text('{"prompts": {"query": "mine"}}')
    for _ in range(2):
        save_model(load_model(TINY), tmp_path, other_files=[own])
        assert json.loads(own.read_text())["prompts"] == {"query": "mine"}


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
    save_model(load_model(tiny), tmp_path / "out", other_files=found)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{ }"
    # in place: a file onto itself
    save_model(load_model(tiny), tiny, other_files=found)
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


def model_in(directory: Path) -> dict[str, bytes]:
    """The files that `load_model` reads from a directory."""
    place = files.current(directory)
    if not place.exists():
        return {}
    names = [p.name for p in place.iterdir() if p.is_file() and p.name not in ("notes.txt", ".plan")]
    return {name: (place / name).read_bytes() for name in names}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "old, new",
    [
        pytest.param(None, {}, id="nothing-to-1"),
        pytest.param(None, SHARDED, id="nothing-to-3"),
        pytest.param({}, SHARDED, id="1-to-3", marks=pytest.mark.long),
        pytest.param(SHARDED, {}, id="3-to-1"),
        pytest.param(SHARDED, SHARDED, id="3-to-3", marks=pytest.mark.long),
    ],
)
def test_an_interruption_leaves_the_old_or_the_new_model(tmp_path, monkeypatch, old, new, when):
    model, other = (load_model(TINY, dtype="float16") for _ in range(2))
    with torch.no_grad():
        for p in other.parameters():
            p.neg_()
    (tmp_path / "tokenizer.json").write_text("new")
    new = new | {"other_files": [tmp_path / "tokenizer.json"]}

    def prepared(name: str) -> tuple[Path, Path]:
        """The root of everything that a save may touch, and the directory in it to save to."""
        root = tmp_path / name
        if old is None:
            root.mkdir()
            return root, root / "a" / "b"
        shutil.copytree(tmp_path / "old", root)
        return root, root

    if old is not None:
        save_model(model, tmp_path / "old", **old)
        (tmp_path / "old" / "tokenizer.json").write_text("old")
        (tmp_path / "old" / "notes.txt").write_text("not ours")

    root, directory = prepared("wanted")
    old_model = everything(root)
    save_model(other, directory, **new)
    new_model = everything(root)
    wholes = [{n: b for n, b in m.items() if b is not None} for m in (old_model, new_model)]
    models = [{Path(n).name: b for n, b in m.items() if n != "notes.txt"} for m in wholes]

    outcomes = []
    for number in range(200):
        root, directory = prepared(str(number))
        calls = 0

        def interrupt():
            nonlocal calls
            # a process killed here leaves no model or a whole one
            now = {n: b for n, b in everything(root).items() if b is not None and "/." not in f"/{n}"}  # noqa: B023
            assert not any(n.endswith("config.json") for n in now) or now in wholes
            assert model_in(directory) in models  # noqa: B023
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


@pytest.mark.parametrize(
    ("name", "first"), [("unlink", 1), ("unlink", 5), ("replace", 2), ("fsync", 7), ("fsync", 8)]
)
def test_a_new_model_that_cannot_take_its_place_is_named_and_loads(sharded, monkeypatch, name, first):
    model = load_model(sharded, dtype="float16")
    with torch.no_grad():
        for p in model.parameters():
            p.neg_()
    real, calls = getattr(os, name), []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) >= first:
            raise OSError(f"{name} {len(calls)} failed")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(OSError, match=rf"whole in .*tiny/\.saved and loads from .*{name} {first} failed"):
            save_model(model, sharded)
    assert len(calls) == first + 1, "tried once more"
    loaded = load_model(sharded, dtype="float16")
    for got, wanted in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, wanted)
    save_model(loaded, sharded, max_shard_bytes=400_000)
    assert len(everything(sharded)) == 7, "the next save leaves one model and nothing else"
    load_model(sharded)


def test_a_save_without_hard_links(sharded, monkeypatch):
    def no_links(*_):
        raise PermissionError("Operation not permitted")

    model = load_model(sharded, dtype="float16")
    monkeypatch.setattr(os, "link", no_links)
    save_model(model, sharded)
    assert everything(sharded).keys() == SAVED
    assert load_file(sharded / "model.safetensors").keys() == load_file(TINY / "model.safetensors").keys()


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
    assert everything(sharded).keys() == SAVED
    assert everything(sharded.parent / "blobs") == blobs


def test_parents_made_for_a_save_that_fails_are_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no\.json"):
        save_model(load_model(TINY), tmp_path / "mine" / "a" / "b", other_files=[tmp_path / "no.json"])
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


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model.safetensors",
        "model.safetensors.index.json",
        "adapter.pt",
        "tokenizer.json",
    ],
)
def test_files_of_a_model_without_a_config_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(FileExistsError, match=f"holds {name} of another model, and no config.json"):
        save_model(load_model(TINY), tmp_path)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("content", ['{"model_type": "bert"}', "{}", "[]", "{", '{"model_type": null}'])
def test_a_model_of_another_type_is_not_replaced(tiny, content):
    model = load_model(tiny)
    (tiny / "config.json").write_text(content)
    before = everything(tiny)
    wanted = "'bert'" if "bert" in content else "None"
    with pytest.raises(FileExistsError, match=f"config.json has model_type {wanted}, so .* another model"):
        save_model(model, tiny)
    assert everything(tiny) == before


def test_a_tokenizer_beside_an_earlier_save_stays_a_part_of_it(tiny, monkeypatch):
    (tiny / "tokenizer.json").write_text("{}")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "_install", killed)
        with pytest.raises(OSError, match="is whole in"):
            save_model(load_model(tiny), tiny)
    assert files.current(tiny).name == ".saved"
    assert [p.read_text() for p in tokenizer_files(files.current(tiny))] == ["{}"]
    save_model(load_model(tiny), tiny)
    assert everything(tiny).keys() == {*SAVED, "tokenizer.json"}


def test_a_first_save_that_was_killed_is_named(tmp_path):
    (tmp_path / ".saving-abc").mkdir()
    with pytest.raises(FileNotFoundError, match=r"a save to it did not end and left \.saving-abc"):
        load_model(tmp_path)


@pytest.mark.parametrize("kills", [15, pytest.param(200, marks=pytest.mark.long)])
def test_a_killed_save_leaves_a_whole_model(tmp_path, kills):
    """Children save two models in turns and are killed at random. One of the two loads, bit for bit."""
    script = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from nvembed_fast.checkpoint import load_model, save_model

torch.set_num_threads(1)  # a fork has no other threads
directory, kills = Path(sys.argv[2]), int(sys.argv[3])
models = [load_model(sys.argv[1], dtype="float16") for _ in range(2)]
with torch.no_grad():
    for p in models[1].parameters():
        p.neg_()
options = [{"max_shard_bytes": 400_000}, {}]
began = time.perf_counter()
for model, how in zip(models, options):
    save_model(model, directory, **how)
cycle = time.perf_counter() - began
draw, seen, committed = random.Random(0), [0, 0], 0
for number in range(kills):
    if not (child := os.fork()):
        while True:
            for model, how in zip(models, options):
                save_model(model, directory, **how)
    time.sleep(draw.uniform(0, 2 * cycle))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the child failed by itself"
    committed += (directory / ".saved").exists()
    loaded = list(load_model(directory, dtype="float16").parameters())
    found = [all(map(torch.equal, loaded, model.parameters())) for model in models]
    assert any(found), f"kill {number}: a mix"
    seen[found.index(True)] += 1
for model, how in zip(models, options):
    save_model(model, directory, **how)
assert len(os.listdir(directory)) == 4 and "model.safetensors" in os.listdir(directory)
print(*seen, committed)
"""
    command = [sys.executable, "-c", script, TINY, tmp_path / "out", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    first, second, _ = map(int, done.stdout.split())
    assert first and second, "both models were left"


def test_the_settings_of_a_pipeline_stay_where_the_caller_asks(tiny):
    content = make_pipeline(tiny, "sentence_transformers.models.Dense")
    save_model(load_model(tiny), tiny, kept=content)
    assert {name: (tiny / name).read_text() for name in content} == content
    save_model(load_model(tiny), tiny)
    assert {path.name for path in tiny.iterdir()} == SAVED
    assert not any((tiny / name).read_text() == content[name] for name in SAVED & content.keys())


@pytest.mark.parametrize(
    "modules", [None, "{", "[]", '[{"type": "sentence_transformers.models.Transformer"}]']
)
def test_the_settings_of_other_code_do_not_stay(modules, tiny):
    """Those of the published directories would pool by the mean."""
    content = make_pipeline(tiny)
    (tiny / "modules.json").unlink() if modules is None else (tiny / "modules.json").write_text(modules)
    save_model(load_model(tiny), tiny, kept=content)
    assert {path.name for path in tiny.iterdir()} == SAVED
    assert "NVEmbedModule" in (tiny / "modules.json").read_text()
    assert "Instruct" in (tiny / "config_sentence_transformers.json").read_text()


def test_prompts_and_length_go_where_the_tokenizer_goes(tiny, tmp_path):
    assert pipeline_files(tiny) == []
    content = make_pipeline(tiny, "sentence_transformers.models.Normalize")
    save_model(load_model(tiny), tmp_path / "out", other_files=pipeline_files(tiny))
    for name in ("config_sentence_transformers.json", "sentence_bert_config.json"):
        assert (tmp_path / "out" / name).read_text() == content[name]
    # the folders of other modules are not copied
    assert len(json.loads((tmp_path / "out" / "modules.json").read_text())) == 1
