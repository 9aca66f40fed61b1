"""Published directories in and out: names, bytes, memory, and one test per error."""

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
from safetensors.torch import load_file, save_file

from nvembed_fast.checkpoint import (
    load,
    load_model,
    published_tensors,
    resolve,
    save,
    save_model,
    tokenizer_files,
)
from nvembed_fast.checkpoint.names import TOKENIZER_FILES
from nvembed_fast.config import BackboneConfig, LatentConfig, NVEmbedConfig
from nvembed_fast.network.model import NVEmbedModel

TINY = Path(__file__).parent / "golden" / "tiny_a"
EMBEDDING = "embedding_model.embed_tokens.weight"
QUERY = "embedding_model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A copy of the tiny model that a test may damage."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(TINY / name, directory / name)
    return directory


@pytest.fixture
def sharded(tiny) -> Path:
    """The tiny model in three shards."""
    model = load_model(tiny, dtype="float16")
    save_model(model, tiny, max_shard_bytes=400_000)
    assert len(list(tiny.glob("model-*.safetensors"))) == 3
    return tiny


def edit_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    """Write the weights anew with tensors replaced, added, or (None) left out."""
    weights = load_file(directory / "model.safetensors") | changes
    kept = {name: value for name, value in weights.items() if value is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# the real shape


def real_names_and_shapes() -> dict[str, list[int]]:
    """The published checkpoint's tensors, written out without the code under test."""
    names = {"embed_tokens": [32000, 4096], "norm": [4096]}
    for i in range(32):
        names |= {
            f"layers.{i}.input_layernorm": [4096],
            f"layers.{i}.self_attn.q_proj": [4096, 4096],
            f"layers.{i}.self_attn.k_proj": [1024, 4096],
            f"layers.{i}.self_attn.v_proj": [1024, 4096],
            f"layers.{i}.self_attn.o_proj": [4096, 4096],
            f"layers.{i}.post_attention_layernorm": [4096],
            f"layers.{i}.mlp.gate_proj": [14336, 4096],
            f"layers.{i}.mlp.up_proj": [14336, 4096],
            f"layers.{i}.mlp.down_proj": [4096, 14336],
        }
    tensors = {f"embedding_model.{name}.weight": shape for name, shape in names.items()}
    tensors |= {
        "latents": [512, 4096],
        "cross_attend_blocks.0.norm.weight": [4096],
        "cross_attend_blocks.0.norm.bias": [4096],
        "cross_attend_blocks.0.norm_context.weight": [4096],
        "cross_attend_blocks.0.norm_context.bias": [4096],
        "cross_attend_blocks.0.fn.to_q.weight": [32768, 4096],
        "cross_attend_blocks.0.fn.to_kv.weight": [65536, 4096],
        "cross_attend_blocks.0.fn.to_out.weight": [4096, 32768],
        "cross_attend_blocks.1.norm.weight": [4096],
        "cross_attend_blocks.1.norm.bias": [4096],
        "cross_attend_blocks.1.fn.net.0.weight": [32768, 4096],
        "cross_attend_blocks.1.fn.net.0.bias": [32768],
        "cross_attend_blocks.1.fn.net.2.weight": [4096, 16384],
        "cross_attend_blocks.1.fn.net.2.bias": [4096],
    }
    return {n if n.startswith("embedding") else f"latent_attention_model.{n}": s for n, s in tensors.items()}


def test_the_real_model_has_the_published_names_shapes_and_bytes():
    # all that the published config.json says of the head is its model_type
    config = NVEmbedConfig.from_dict(
        {"model_type": "nvembed", "latent_attention_config": {"model_type": "latent_attention"}}
    )
    table = published_tensors(config)
    wanted = real_names_and_shapes()
    assert len(wanted) == 304
    assert {name: list(slot.shape) for name, slot in table.items()} == wanted
    assert sum(math.prod(shape) for shape in wanted.values()) * 2 == 15_702_032_384

    with torch.device("meta"):
        model = NVEmbedModel(config).half()
    assert sum(p.nbytes for p in model.parameters()) == 15_702_032_384
    assert_slots_tile_every_parameter(table, model)


def assert_slots_tile_every_parameter(table, model) -> None:
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        rows = [slot.rows for slot in table.values() if slot.parameter == name]
        assert [r.start for r in rows] == [0, *(r.stop for r in rows[:-1])], name
        assert rows[-1].stop == parameter.shape[0], name
        assert all(s.shape[1:] == parameter.shape[1:] for s in table.values() if s.parameter == name)
    assert {slot.parameter for slot in table.values()} == parameters.keys()


# reading and writing


def test_every_tensor_lies_in_its_rows():
    model = load_model(TINY, dtype="float16")
    stored = load_file(TINY / "model.safetensors")
    table = published_tensors(model.config)
    assert table.keys() == stored.keys() and len(table) == 43
    assert_slots_tile_every_parameter(table, model)
    parameters = dict(model.named_parameters())
    for name, slot in table.items():
        assert torch.equal(parameters[slot.parameter][slot.rows], stored[name]), name
    # in the order the forward pass splits them
    qkv = parameters["embedding_model.layers.2.self_attn.qkv_proj.weight"]
    parts = [stored[f"embedding_model.layers.2.self_attn.{p}_proj.weight"] for p in "qkv"]
    assert torch.equal(qkv, torch.cat(parts))
    gate_up = parameters["embedding_model.layers.0.mlp.gate_up_proj.weight"]
    parts = [stored[f"embedding_model.layers.0.mlp.{p}_proj.weight"] for p in ("gate", "up")]
    assert torch.equal(gate_up, torch.cat(parts))


def test_dtypes():
    on_cpu = load_model(TINY)
    assert {p.dtype for p in on_cpu.parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(TINY, dtype="torch.bfloat16").parameters()} == {torch.bfloat16}
    assert all(p.requires_grad and not p.is_meta for p in on_cpu.parameters())


@pytest.mark.gpu
def test_on_a_gpu_the_checkpoints_dtype_is_kept():
    model = load_model(TINY, device="cuda")
    stored = load_file(TINY / "model.safetensors")
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float16, "cuda")}
    assert torch.equal(model.embedding_model.embed_tokens.weight.cpu(), stored[EMBEDDING])


def test_large_tensors_are_copied_in_pieces(monkeypatch):
    monkeypatch.setattr(load, "_PIECE_BYTES", 64 * 4 * 7)
    pieces = list(load._pieces(TINY / "model.safetensors", QUERY, (64, 64)))
    assert len(pieces) == 10 and pieces[-1][0] == slice(63, 64)
    assert torch.equal(
        load_model(TINY).embedding_model.layers[1].self_attn.qkv_proj.weight[:64],
        load_file(TINY / "model.safetensors")[QUERY].float(),
    )


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 400_000, 1])
def test_round_trip_is_bit_exact(tmp_path, max_shard_bytes):
    model = load_model(TINY, dtype="float16")
    save_model(model, tmp_path / "a" / "b", max_shard_bytes=max_shard_bytes)
    files = sorted(p.name for p in (tmp_path / "a" / "b").iterdir())
    weights = [f for f in files if f.endswith(".safetensors")]
    if max_shard_bytes == 5_000_000_000:
        assert files == ["config.json", "model.safetensors"]
        modes = {(tmp_path / "a" / "b" / file).stat().st_mode for file in files}
        assert len(modes) == 1, "whoever may read the config may read the weights"
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


def everything(directory: Path) -> dict[str, bytes | None]:
    """Files with their bytes, and folders."""
    paths = {str(p.relative_to(directory)): p for p in directory.rglob("*")}
    return {name: p.read_bytes() if p.is_file() else None for name, p in paths.items()}


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


SHARDED = {"max_shard_bytes": 400_000}


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
            # what a killed process would leave here: no model, or a whole one
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


# five files of the old model leave, two of the new one come; then one goes back and the five after it
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


# errors of reading


def test_no_config(tiny):
    (tiny / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tiny has no config\.json: it is no model directory"):
        load_model(tiny)


def test_another_model_type(tiny):
    edit_json(tiny / "config.json", lambda c: c.update(model_type="bert"))
    with pytest.raises(ValueError, match=r"config\.json.*'bert', expected 'nvembed'"):
        load_model(tiny)


def test_missing_tensor(tiny):
    edit_weights(tiny, **{QUERY: None})
    with pytest.raises(ValueError, match=rf"tiny: the weights lack tensor '{QUERY}'$"):
        load_model(tiny)
    edit_weights(tiny, **{EMBEDDING: None})
    with pytest.raises(ValueError, match=rf"the weights lack tensor '{EMBEDDING}' and 1 more"):
        load_model(tiny)


def test_unexpected_tensor(tiny):
    edit_weights(tiny, **{"embedding_model.lm_head.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"hold tensor 'embedding_model\.lm_head\.weight', which no model"):
        load_model(tiny)


def test_rotary_buffers_of_old_files_are_ignored(tiny):
    edit_weights(tiny, **{"embedding_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    load_model(tiny)


def test_names_with_a_prefix(tiny):
    weights = load_file(tiny / "model.safetensors")
    save_file({f"model.{name}": value for name, value in weights.items()}, tiny / "model.safetensors")
    with pytest.raises(ValueError, match=rf"and 42 more\. It holds 'model\.{EMBEDDING}': rename its tensors"):
        load_model(tiny)


def test_wrong_shape(tiny):
    edit_weights(tiny, **{QUERY: torch.zeros(64, 63)})
    with pytest.raises(ValueError, match=rf"'{QUERY}' must be \[64, 64\] by config.json, found \[64, 63\]"):
        load_model(tiny)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_quantised_dtypes(tiny, dtype):
    edit_weights(tiny, **{QUERY: torch.zeros(64, 64).to(dtype)})
    with pytest.raises(ValueError, match=rf"'{QUERY}' has dtype \w+, only F16, BF16, F32, F64 can be read"):
        load_model(tiny)


@pytest.mark.parametrize("size", [0, 5, 100, 5000, -1])
def test_truncated_file(tiny, size):
    file = tiny / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut short or no safetensors file .*again"):
        load_model(tiny)


def test_truncated_shard(sharded):
    file = sharded / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors is cut short"):
        load_model(sharded)


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    message = r"model-00002-of-00003\.safetensors is missing: model.safetensors.index.json places \d+ tensors"
    with pytest.raises(FileNotFoundError, match=message):
        load_model(sharded)


def test_no_weights(tiny):
    (tiny / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"tiny has neither model\.safetensors nor model\.safetensors"
    ):
        load_model(tiny)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_pickle_is_not_read(tiny, name):
    (tiny / "model.safetensors").unlink()
    (tiny / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match=rf"holds {name} and no safetensors: .*save_file\(torch\.load"):
        load_model(tiny)


def test_a_single_file_and_an_index(sharded):
    shutil.copyfile(TINY / "model.safetensors", sharded / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"holds model\.safetensors and model\.safetensors\.index\.json: rem"
    ):
        load_model(sharded)


def test_index_that_places_a_tensor_where_it_is_not(sharded):
    index = sharded / "model.safetensors.index.json"
    edit_json(index, lambda c: c["weight_map"].update({QUERY: "model-00001-of-00003.safetensors"}))
    with pytest.raises(
        ValueError, match=rf"places tensor '{QUERY}' in model-00001-of-00003\.safetensors, whi"
    ):
        load_model(sharded)


def test_index_that_names_a_tensor_twice(sharded):
    index = sharded / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace('"weight_map": {', f'"weight_map": {{"{QUERY}": "x.safetensors",'))
    with pytest.raises(ValueError, match=rf"index\.json: '{QUERY}' is listed twice"):
        load_model(sharded)


def test_tensor_in_two_shards(sharded):
    file = sharded / "model-00001-of-00003.safetensors"
    save_file(load_file(file) | {QUERY: torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=rf"tensor '{QUERY}' is in model-00001.* and in model-000"):
        load_model(sharded)


def test_index_that_lacks_a_tensor(sharded):
    index = sharded / "model.safetensors.index.json"
    owner = json.loads(index.read_text())["weight_map"][EMBEDDING]
    edit_json(index, lambda c: c["weight_map"].pop(EMBEDDING))
    (sharded / owner).unlink()
    with pytest.raises(ValueError, match=rf"the weights lack tensor '{EMBEDDING}'"):
        load_model(sharded)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{}", "no 'weight_map'"),
        ("[]", "index.json: "),
        ("{", "index.json: "),
        ('{"weight_map": [1]}', "weight_map is not an object"),
        (
            '{"weight_map": {"a": "../other/model.safetensors"}}',
            "'a' is placed in '../other/model.safetensors'",
        ),
        ('{"weight_map": {"a": "model.bin"}}', "'a' is placed in 'model.bin', which is no safetensors file"),
        ('{"weight_map": {"a": 3}}', "'a' is placed in 3"),
    ],
)
def test_malformed_index(sharded, text, message):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        load_model(sharded)
    assert message in str(caught.value) and "model.safetensors.index.json" in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [QUERY, "latent_attention_model.cross_attend_blocks.1.fn.net.2.bias"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_nan_and_inf_in_the_weights(tiny, name, value, dtype):
    tensor = load_file(tiny / "model.safetensors")[name]
    tensor.view(-1)[-1] = value
    edit_weights(tiny, **{name: tensor})
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor '{name}' holds NaN or Inf"):
        load_model(tiny, dtype=dtype)


def test_values_that_do_not_fit_the_wanted_dtype(tiny):
    tensor = load_file(tiny / "model.safetensors")[QUERY].float()
    tensor[5, 6] = -1e5
    edit_weights(tiny, **{QUERY: tensor})
    load_model(tiny, dtype="bfloat16")
    with pytest.raises(ValueError, match=rf"'{QUERY}' reaches 1e\+05, more than float16 holds: load with"):
        load_model(tiny, dtype="float16")


@pytest.mark.parametrize("device", ["cuda:7", "tpu7", "", "cpu:x", 3.5, "meta"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=rf"device {device!r} (is not|holds no weights)"):
        load_model(TINY, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu():
    with pytest.raises(ValueError, match=r"device 'cuda' is not there: torch \S+ finds no CUDA device"):
        load_model(TINY, device="cuda")


@pytest.mark.parametrize("dtype", ["int8", "float17", torch.int64, "nn", torch.float8_e5m2])
def test_a_dtype_that_cannot_hold_weights(dtype):
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32, fl"):
        load_model(TINY, dtype=dtype)


def test_config_with_an_impossible_dtype(tiny):
    edit_json(tiny / "config.json", lambda c: c.update(torch_dtype="int8"))
    with pytest.raises(
        ValueError, match="dtype must be one of float16, bfloat16, float32, float64, got 'int8'"
    ):
        load_model(tiny)


# finding a directory


def test_a_directory_is_itself(tiny):
    assert resolve(tiny) == tiny and resolve(str(tiny)) == tiny


def test_a_file_is_no_directory(tiny):
    with pytest.raises(ValueError, match=r"model\.safetensors is a file: pass the directory"):
        resolve(tiny / "model.safetensors")


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "~/no", "a/b/c", "", "a b/c", "../x"])
def test_neither_directory_nor_hub_id(name):
    with pytest.raises(FileNotFoundError, match="no directory .*, and no hub id either"):
        resolve(name)


def test_only_weights_config_and_tokenizer_are_fetched(monkeypatch, tmp_path):
    import fnmatch

    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **k: asked.update(k, name=name) or tmp_path
    )
    options = {"revision": "v1", "token": "t", "cache_dir": tmp_path / "cache", "local_files_only": True}
    assert resolve("nvidia/NV-Embed-v2", **options) == tmp_path
    patterns = asked.pop("allow_patterns")
    assert asked == options | {"name": "nvidia/NV-Embed-v2"}

    def fetched(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    index = json.loads('["model-00001-of-00004.safetensors", "model.safetensors.index.json"]')
    wanted = ["config.json", "model.safetensors", *index, *TOKENIZER_FILES]
    assert all(map(fetched, wanted))
    refused = ["modeling_nvembed.py", "pytorch_model.bin", "onnx/model.onnx", "x.pt", "adapter.safetensors"]
    assert not any(map(fetched, refused))


def test_a_hub_out_of_reach(tmp_path):
    # HF_HUB_OFFLINE is set for all tests: nothing is asked
    for options in ({}, {"local_files_only": True}):
        with pytest.raises(
            FileNotFoundError, match=r"'nobody/nothing' is neither cached .*hf download nobody"
        ):
            resolve("nobody/nothing", cache_dir=tmp_path, **options)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("GatedRepoError", r"'a/b' at revision 'r' is gated: accept its terms"),
        ("RepositoryNotFoundError", r"no directory a/b, and the hub has no 'a/b'"),
        ("RevisionNotFoundError", r"the hub has no 'a/b' at revision 'r'"),
        ("ConnectionError", r"neither cached nor within reach \(ConnectionError: cable\)"),
    ],
)
def test_errors_of_the_hub(monkeypatch, kind, message):
    import builtins

    import huggingface_hub
    from huggingface_hub import errors

    cls = getattr(errors, kind, None) or getattr(builtins, kind)
    error = cls.__new__(cls)  # the hub's errors want a response object
    error.args = ("cable",)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=message):
        resolve("a/b", revision="r")


# the progress bar


def test_bar_only_where_it_is_asked_for(capfd):
    load_model(TINY)
    assert capfd.readouterr().err == ""
    load_model(TINY, progress=True)
    assert "loading" in capfd.readouterr().err
    load_model(TINY, progress=False)
    assert capfd.readouterr().err == ""


# memory


LARGE = NVEmbedConfig(
    BackboneConfig(hidden_size=2048, intermediate_size=7168, num_hidden_layers=17, num_attention_heads=16),
    LatentConfig(cross_dim_head=512, hidden_dim=2048, latent_dim=2048),
)
MEASURE = """
import json, sys
from pathlib import Path
import torch
from safetensors import safe_open
from nvembed_fast.checkpoint import load_model, published_tensors

directory, dtype = Path(sys.argv[1]), sys.argv[2]

def kib(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])

load_model(sys.argv[3], dtype=dtype)  # imports and first calls, on the tiny model
Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
before = kib("VmRSS")
model = load_model(directory, dtype=dtype)
peak = (kib("VmHWM") - before) * 1024
weights = sum(p.nbytes for p in model.parameters())
parameters, wrong = dict(model.named_parameters()), []
index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
for name, slot in list(published_tensors(model.config).items())[::5]:
    got = parameters[slot.parameter][slot.rows]
    with safe_open(directory / index[name], framework="pt") as stored:
        if not torch.equal(got, stored.get_tensor(name).to(got.dtype)):
            wrong.append(name)
print(json.dumps({"peak": peak, "weights": weights, "wrong": wrong}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A sharded fp16 checkpoint of more than 2 GB, written shard by shard."""
    directory = tmp_path_factory.mktemp("large")
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
    table = published_tensors(LARGE)
    shards = save._shards(table, torch.float16, 400_000_000)
    for number, (file, names) in enumerate(shards.items()):
        tensors = {}
        for at, name in enumerate(names):
            count = math.prod(table[name].shape)
            # a prime period and another start for every tensor: no two are alike
            block = noise.roll(31 * at + 1009 * number).repeat(count // len(noise) + 1)[:count]
            tensors[name] = block.view(table[name].shape)
        save_file(tensors, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in shards.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(LARGE.to_dict()))
    assert sum(p.stat().st_size for p in directory.glob("*.safetensors")) > 2_000_000_000
    assert len(shards) > 3
    yield directory
    shutil.rmtree(directory)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_peak_memory_stays_below_1_15_times_the_weights(large, dtype):
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large), dtype, str(TINY)],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["weights"] > 2_000_000_000 * (2 if dtype == "float32" else 1)
    assert got["wrong"] == []
    # the lower bound: a measurement that missed the weights would prove nothing
    assert 0.99 < got["peak"] / got["weights"] < 1.15, got


def test_configs_differ_only_in_what_they_say(tmp_path):
    """`save_model` writes what `load_model` reads back, whatever the config says."""
    config = dataclasses.replace(
        NVEmbedConfig.from_file(TINY / "config.json"), pooling_start="text_offset", is_mask_instruction=False
    )
    model = NVEmbedModel(config).half()
    save_model(model, tmp_path)
    assert load_model(tmp_path).config == config


@pytest.mark.parametrize("text", ["[]", "{", "", '{"model_type": "nvembed", "text_config": 3}'])
def test_malformed_config(tiny, text):
    (tiny / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: "):
        load_model(tiny)
