"""Finding a model: a directory, or a hub id of which only safe files are fetched."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_checkpoint import copy_tiny

from nvembed_fast import NVEmbed
from nvembed_fast.checkpoint import demo, download_size, pipeline, resolve
from nvembed_fast.checkpoint.names import TOKENIZER_FILES


@pytest.fixture
def tiny(tmp_path) -> Path:
    return copy_tiny(tmp_path / "tiny")


def test_a_directory_is_itself(tiny):
    assert resolve(tiny) == tiny and resolve(str(tiny)) == tiny


def test_a_file_is_no_directory(tiny):
    with pytest.raises(ValueError, match=r"model\.safetensors is a file: pass the directory"):
        resolve(tiny / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    ["nowhere", "./no/where", "/no/where", "~/no", "a/b/c", "", "a b/c", "../x", "~nosuchuser/x", "a\0b"],
)
def test_neither_directory_nor_hub_id(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where nothing lies at ../x
    for load in (resolve, NVEmbed.from_pretrained):
        with pytest.raises(FileNotFoundError, match="no directory .*, and no hub id either"):
            load(name)


def test_only_weights_config_and_tokenizer_are_fetched(monkeypatch, tmp_path):
    import fnmatch

    import huggingface_hub

    (tmp_path / "model.safetensors").touch()
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
    wanted = ["config.json", "model.safetensors", *index, *TOKENIZER_FILES, *pipeline.DEFAULTS]
    wanted += ["sentence_bert_config.json", "1_Dense/config.json", "1_Dense/model.safetensors"]
    assert all(map(fetched, wanted))
    refused = ["modeling_nvembed.py", "pytorch_model.bin", "onnx/model.onnx", "x.pt", "adapter.safetensors"]
    refused += ["1_Dense/pytorch_model.bin", "1_Dense/evil.py"]
    assert not any(map(fetched, refused))


def test_a_cache_may_begin_with_the_home_directory(monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **k: asked.update(k) or tmp_path)
    monkeypatch.setattr(demo, "is_shipped", lambda: True)
    monkeypatch.setattr(demo, "_name", lambda: "x")
    monkeypatch.setattr(demo, "_is_whole", lambda target: True)
    monkeypatch.setenv("HOME", str(tmp_path))
    resolve("a/b", cache_dir="~/own")
    assert asked["cache_dir"] == tmp_path / "own"
    assert resolve("demo", cache_dir="~/own") == tmp_path / "own" / "demo-x"


def test_a_hub_out_of_reach(tmp_path):
    # HF_HUB_OFFLINE is set for all tests: nothing is asked
    for options in ({}, {"local_files_only": True}):
        with pytest.raises(
            FileNotFoundError, match=r"'nobody/nothing' is neither cached .*hf download nobody"
        ) as found:
            resolve("nobody/nothing", cache_dir=tmp_path, **options)
        message = str(found.value).removesuffix(demo.instead())
        assert "(downloads are switched off)" in message and len(message) < 250


def test_the_size_of_a_download_counts_what_is_not_cached(monkeypatch, tmp_path):
    import huggingface_hub

    files = [(5, True), (7_000, True), (None, True), (20, False)]  # (size, will be fetched)
    rows = [SimpleNamespace(file_size=size, will_download=fetched) for size, fetched in files]
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **k: asked.update(k) or rows)
    assert download_size("a/b", revision="r", cache_dir=tmp_path) == 7_005
    assert asked["dry_run"] and asked["revision"] == "r" and asked["cache_dir"] == tmp_path
    asked.clear()
    assert not any([download_size(tmp_path), download_size(""), download_size("a/b", local_files_only=True)])
    assert not asked


def test_a_download_that_is_impossible_has_no_size(tmp_path):
    assert download_size("nobody/nothing", cache_dir=tmp_path) == 0


def test_a_config_alone_is_no_model(monkeypatch, tmp_path):
    """A hub out of reach gives the snapshot as it is cached, whatever was fetched of it."""
    import huggingface_hub

    (tmp_path / "config.json").touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: tmp_path)
    assert resolve("a/b", config_only=True) == tmp_path
    with pytest.raises(FileNotFoundError, match=r"'a/b' has no safetensors .*out of reach.*hf download a/b"):
        resolve("a/b")


@pytest.mark.parametrize(
    "kind, message",
    [
        ("GatedRepoError", r"'a/b' at revision 'r' is gated: accept its terms"),
        ("RepositoryNotFoundError", r"no directory a/b, and the hub has no 'a/b'"),
        ("RepositoryNotFoundError", r"or not without a token \(token=..., or: hf auth login\)"),
        ("HfHubHTTPError", r"the hub refuses 'a/b' at revision 'r' \(status 401\): .*hf auth login"),
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
    error.response = SimpleNamespace(status_code=401)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=message):
        resolve("a/b", revision="r")


def test_errors_of_the_hub_are_short(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("a long story " * 40 + "\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="ConnectionError: a long story") as found:
        resolve("a/b")
    assert len(str(found.value).removesuffix(demo.instead())) < 250
