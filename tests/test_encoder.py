import contextlib
import copy
import dataclasses
import json
import shutil
import sys
import threading
import time
from collections import UserDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import make_pipeline

from nvembed_fast import NVEmbed, files, query_instruction
from nvembed_fast.checkpoint import load
from nvembed_fast.config import instruction_of
from nvembed_fast.tokenization import TextTokenizer

TINY = Path(__file__).parent / "golden" / "tiny_a"
CASES = json.loads((TINY / "cases.json").read_text())
EXPECTED = load_file(TINY / "expected.safetensors")
TEXTS = ["a", "b c", "", "short", *CASES[1]["texts"], *CASES[2]["texts"], "word " * 200, "one two three"]


@pytest.fixture(scope="module")
def model(tiny_directory):
    return NVEmbed.from_pretrained(tiny_directory, device="cpu")


def relative(got, wanted) -> float:
    got, wanted = torch.as_tensor(got), torch.as_tensor(wanted)
    assert got.shape == wanted.shape
    return ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()


@pytest.mark.parametrize("case", range(len(CASES)), ids=[c["name"] for c in CASES])
def test_encode_equals_the_original(model, case):
    c = CASES[case]
    got = model.encode(c["texts"], instruction=c["instruction"], max_length=c["max_length"])
    assert got.dtype == torch.float32 and got.device == model.device
    assert relative(got, EXPECTED[f"case{case}.embeddings"]) < 5e-6


def test_forms_of_input_and_output(model):
    both = model.encode(["a b", "c"])
    assert both.shape == (2, 64)
    assert torch.allclose(both.norm(dim=1), torch.ones(2))
    assert relative(model.encode("a b"), both[0]) < 1e-6
    assert model.encode([]).shape == (0, 64)
    assert model.encode([], output="numpy").shape == (0, 64)
    assert relative(model.encode(t for t in ["a b", "c"]), both) < 1e-6
    assert relative(model.encode(np.array(["a b", "c"])), both) < 1e-6
    assert relative(model.encode(["a b", "c"], max_length=np.int64(9)), both) < 1e-6
    for array in (model.encode(["a b", "c"], output="numpy"), model.encode(["a b", "c"], return_numpy=True)):
        assert isinstance(array, np.ndarray) and array.dtype == np.float32
        assert relative(array, both) < 1e-6


def test_copies_are_their_own(model):
    wanted = model.encode(TEXTS)
    copied = copy.deepcopy(model)
    assert not copied.model.head._cache
    copied.model.head.to_out.weight.mul_(0.5)
    assert relative(model.encode(TEXTS), wanted) == 0
    assert relative(copied.encode(TEXTS), wanted) > 1e-3


def test_save_pretrained_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path / "copy")
    again = NVEmbed.from_pretrained(tmp_path / "copy", device="cpu")
    assert torch.equal(again.encode(TEXTS), model.encode(TEXTS))


def test_weights_ask_for_no_gradient_and_forward_can(model):
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.encode(["a"]).requires_grad


def test_the_callers_modes_change_nothing(tiny_directory):
    model = NVEmbed.from_pretrained(tiny_directory, device="cpu")
    wanted = NVEmbed.from_pretrained(tiny_directory, device="cpu").encode(TEXTS)
    with torch.inference_mode():
        assert torch.equal(model.encode(TEXTS), wanted)  # builds the caches
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode(TEXTS), wanted)
    # what was built under inference_mode serves a backward pass
    tables = model.model.embedding_model.rotary_tables(1)
    assert not tables.cos.is_inference() and not tables.sin.is_inference()
    model.model.embedding_model.requires_grad_(True)
    ids = torch.tensor([[1, 5, 6, 2]])
    model(ids, torch.ones_like(ids), torch.ones_like(ids))["sentence_embeddings"].sum().backward()
    assert model.model.embedding_model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "x" * 10_000_000, "a</s>b", "\ufeff", "\u202e"])
def test_odd_texts_have_vectors(model, text):
    vector = model.encode(text, max_length=64)
    assert torch.isfinite(vector).all() and abs(vector.norm() - 1) < 1e-5


class Table:
    """As a DataFrame it gives the names of its columns."""

    columns = ("text",)

    def __iter__(self):
        return iter(self.columns)


class Series:
    """As a column of a DataFrame it has keys and gives its values."""

    ndim = 1

    def keys(self):
        return (0, 1)

    def __iter__(self):
        return iter(["a b", "c"])


def test_a_table_is_refused(model):
    with pytest.raises(TypeError, match="prompts must be texts, got Table, which would give .* column names"):
        model.encode(Table())


def test_what_gives_texts_in_an_order_is_taken(model):
    wanted = model.encode(["a b", "c"])
    for texts in (Series(), {"a b": 1, "c": 2}.keys(), {1: "a b", 2: "c"}.values(), ("a b", "c")):
        assert relative(model.encode(texts), wanted) < 1e-6
    with pytest.raises(TypeError, match="must be a list of texts, got one string"):
        model.stream("a b")


def test_a_whole_instruction_in_the_place_of_a_task_is_wrapped_once(model):
    whole = query_instruction("find it")
    assert query_instruction(whole) == instruction_of(whole) == whole == instruction_of("find it")
    assert instruction_of("") == "" and instruction_of(" ") == " "
    assert torch.equal(model.encode_query(["q"], whole), model.encode_query(["q"], "find it"))


@pytest.mark.parametrize(
    ("task", "error"), [(None, TypeError), (3, TypeError), ("", ValueError), (" ", ValueError)]
)
def test_a_query_needs_a_task(model, task, error):
    for call in (query_instruction, lambda task: model.encode_query(["q"], task)):
        with pytest.raises(error, match="task "):
            call(task)
    for keywords in ({}, {"task": "find it", "instruction": "Query: "}):
        with pytest.raises(TypeError, match="takes a task and makes the instruction"):
            model.encode_query(["q"], **keywords)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"prompts": ["a", None]}, TypeError, r"prompts\[1\] must be a string, got NoneType"),
        ({"prompts": ["a", "b", 3]}, TypeError, r"prompts\[2\] must be a string, got int"),
        ({"prompts": ["a", "\udc80"]}, ValueError, r"prompts\[1\] has a lone surrogate"),
        ({"prompts": ["a"], "max_length": 2}, ValueError, "max_length must be at least 3, got 2"),
        ({"prompts": None}, TypeError, "prompts must be a string or texts, got NoneType"),
        ({"prompts": 5}, TypeError, "prompts must be a string or texts, got int"),
        ({"prompts": b"ab"}, TypeError, "prompts must be a string or texts, got bytes"),
        ({"prompts": {"q": "text"}}, TypeError, r"prompts must be texts, got dict, .* list\(x.values\(\)\)"),
        ({"prompts": UserDict(text=["a", "b"])}, TypeError, "prompts must be texts, got UserDict"),
        ({"prompts": {"a", "b"}}, TypeError, "prompts must be in an order, and a set has none"),
        ({"prompts": frozenset("ab")}, TypeError, "and a frozenset has none: pass a list"),
        (
            {"prompts": np.array("ab")},
            TypeError,
            "got a ndarray of no dimension: pass str",
        ),
        ({"prompts": memoryview(b"ab")}, TypeError, "prompts must be a string or texts, got memoryview"),
        ({"prompts": ["a"], "max_length": None}, TypeError, "max_length must be an int, got NoneType"),
        ({"prompts": ["a"], "max_length": "512"}, TypeError, "max_length must be an int, got str: '512'"),
        (
            {"prompts": ["a"], "max_batch_tokens": 5.5},
            TypeError,
            "max_batch_tokens must be an int, got float",
        ),
        ({"prompts": ["a"], "output": "list"}, ValueError, "output must be 'torch' or 'numpy', got 'list'"),
        ({"prompts": ["a"], "max_batch_tokens": 0}, ValueError, "max_batch_tokens must be at least 1"),
        ({"prompts": ["a"], "instruction": None}, TypeError, "instruction must be a string"),
        (
            {"prompts": ["a", "b"], "instruction": query_instruction("a long task"), "max_length": 6},
            ValueError,
            r"nothing of prompts\[0\] is left to pool: the instruction takes all 6 tokens",
        ),
    ],
)
def test_bad_calls_name_what_is_wrong(model, call, error, message):
    with pytest.raises(error, match=message):
        model.encode(**call)


def test_a_missing_tokenizer_is_named(tiny_directory, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_directory / name)
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing"):
        NVEmbed.from_pretrained(tmp_path)


def test_a_config_may_pool_the_instruction(model, tiny_directory, tmp_path):
    for path in tiny_directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((tiny_directory / "config.json").read_text()) | {"is_mask_instruction": False}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    pooled = NVEmbed.from_pretrained(tmp_path, device="cpu").encode(TEXTS, "Find it: ")
    assert relative(pooled, model.encode(["Find it: " + text for text in TEXTS])) < 1e-6
    assert relative(pooled, model.encode(TEXTS, "Find it: ")) > 1e-3


def test_a_model_whose_directory_is_gone_is_saved_whole(tiny_directory, tmp_path, monkeypatch):
    for name in ("a", "b"):
        shutil.copytree(tiny_directory, tmp_path / name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    gone, left = NVEmbed.from_pretrained("a"), NVEmbed.from_pretrained("b")
    shutil.rmtree("a")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for model in (gone, left):
        model.save_pretrained("saved")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert Path("saved", file).read_bytes() == (tiny_directory / file).read_bytes()
        again = NVEmbed.from_pretrained("saved", dtype=model.dtype)
        assert torch.equal(again.encode(["a text"]), model.encode(["a text"]))


def test_a_model_whose_tokenizer_came_from_no_file_is_saved_whole(tiny_directory, tmp_path):
    model = NVEmbed.from_pretrained(tiny_directory)
    tokenizer = TextTokenizer(model.text_tokenizer.backend, "</s>")
    NVEmbed(model.model, tokenizer).save_pretrained(tmp_path / "saved")
    assert torch.equal(
        NVEmbed.from_pretrained(tmp_path / "saved").encode(["a text"]), model.encode(["a text"])
    )


def test_a_tokenizer_that_cannot_be_written_stops_the_save(tiny_directory, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    model = NVEmbed.from_pretrained(tiny_directory)
    monkeypatch.setattr(TextTokenizer, "write", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_model_is_loaded_from_a_save_that_was_killed_after_its_commit(tiny_directory, tmp_path):
    model = NVEmbed.from_pretrained(tiny_directory)
    shutil.copytree(tiny_directory, tmp_path / ".saved")
    (tmp_path / "model.safetensors").write_text("half of a mix")
    assert torch.equal(NVEmbed.from_pretrained(tmp_path).encode(["a text"]), model.encode(["a text"]))


def test_a_model_saved_while_it_is_loaded_is_whole(tiny_directory, tmp_path, monkeypatch):
    """The save comes behind the config and before the weights, which are then those of the new model."""
    monkeypatch.setattr(files, "_sync", lambda path: None)
    old = NVEmbed.from_pretrained(tiny_directory, device="cpu")
    new = copy.deepcopy(old)
    new.model.config = dataclasses.replace(new.config, is_mask_instruction=False)
    new.model.head.latents.neg_()
    old.save_pretrained(tmp_path)
    load_weights, seen = load.load_weights, []

    def load_behind_a_save(*args, **options):
        seen.append(1)
        if len(seen) == 1:
            new.save_pretrained(tmp_path)
        return load_weights(*args, **options)

    monkeypatch.setattr(load, "load_weights", load_behind_a_save)
    got = NVEmbed.from_pretrained(tmp_path, device="cpu").encode("a", "Find it: ")
    assert len(seen) == 2
    new.text_tokenizer.is_mask_instruction = False
    assert torch.equal(got, new.encode("a", "Find it: "))
    assert (got - old.encode("a", "Find it: ")).abs().max() > 1e-3


def test_the_callers_default_device_changes_nothing(model, tiny_directory, tmp_path):
    """The device "meta" stands in for a GPU."""
    wanted, ids = model.encode(["a b", "c"]), torch.tensor([[1, 5, 6, 2]])
    try:
        torch.set_default_device("meta")
        loaded = NVEmbed.from_pretrained(tiny_directory, device="cpu")
        loaded.save_pretrained(tmp_path / "saved")
        again = NVEmbed.from_pretrained(tmp_path / "saved", device="cpu")
        got = [loaded.encode(["a b", "c"]), torch.from_numpy(again.encode(["a b", "c"], output="numpy"))]
        pooled = loaded(ids, ids != 0, ids != 0)["sentence_embeddings"]
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(g, wanted) for g in got)
    assert torch.equal(pooled, model(ids, ids != 0, ids != 0)["sentence_embeddings"])


def test_the_first_use_of_the_tokenizer_comes_from_many_threads(tiny_directory, monkeypatch):
    """The import of transformers fails where two threads begin it, so one of them does it for all."""
    inside, waiting = threading.Lock(), threading.Barrier(8)

    class Transformers:
        @property
        def PreTrainedTokenizerFast(self):
            with contextlib.ExitStack() as stack:
                assert inside.acquire(blocking=False), "two threads import transformers"
                stack.callback(inside.release)
                time.sleep(0.02)
                return SimpleNamespace

    monkeypatch.setitem(sys.modules, "transformers", Transformers())
    models = [NVEmbed.from_pretrained(tiny_directory, device="cpu") for _ in range(2)]

    def first_use(number: int):
        waiting.wait()
        return models[number % 2].tokenizer

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(first_use, range(8)))
    assert len({id(tokenizer) for tokenizer in found}) == 2


@pytest.mark.parametrize("added", ["adapter", "rows", "offloaded", "quantised"])
def test_a_model_with_other_weights_than_its_config_is_not_saved(tiny_directory, tmp_path, added):
    model = NVEmbed.from_pretrained(tiny_directory, device="cpu")
    layer = model.model.embedding_model.layers[1].mlp
    if added == "adapter":
        layer.down_proj = torch.nn.Sequential(layer.down_proj)
        message = r"'embedding_model.layers.1.mlp.down_proj.0.weight' .*merge_adapter.*merge_and_unload"
    elif added == "rows":
        rows = torch.ones(32001, 64)
        model.model.embedding_model.embed_tokens.weight = torch.nn.Parameter(rows, requires_grad=False)
        message = r"'embedding_model.embed_tokens.weight' .* \[32001, 64\] on cpu, .*\[32000, 64\]"
    elif added == "offloaded":
        layer.to("meta")
        message = r"'embedding_model.layers.1.mlp.gate_up_proj.weight' .* on meta"
    else:
        layer.down_proj.weight = torch.nn.Parameter(layer.down_proj.weight.to(torch.int8), False)
        message = r"'embedding_model.layers.1.mlp.down_proj.weight' of the model is torch.int8"
    with pytest.raises(ValueError, match=f"parameter {message}.* Nothing was saved"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


PUBLISHED = [f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Normalize")]


def _set(directory, *types, max_seq_length=64):
    (directory / "modules.json").write_text(json.dumps([{"type": kind} for kind in types]))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_seq_length}))


def test_the_length_of_a_saved_model_is_its_own(model, tiny_directory, tmp_path):
    copied = NVEmbed.from_pretrained(tiny_directory)
    assert copied.max_seq_length == 4096
    copied.max_seq_length = np.int16(16)
    copied.save_pretrained(tmp_path)
    again = NVEmbed.from_pretrained(tmp_path)
    assert again.max_seq_length == 16
    assert torch.equal(again.encode("word " * 200), model.encode("word " * 200, max_length=16))
    again.max_seq_length = 4096
    again.save_pretrained(tmp_path)
    assert NVEmbed.from_pretrained(tmp_path).max_seq_length == 4096


def test_the_published_directories_keep_the_documented_length(tiny_directory, tmp_path):
    """Theirs is that of other code: 32768."""
    shutil.copytree(tiny_directory, tmp_path, dirs_exist_ok=True)
    _set(tmp_path, *PUBLISHED, max_seq_length=32768)
    published = NVEmbed.from_pretrained(tmp_path)
    assert published.max_seq_length == 4096
    published.save_pretrained(tmp_path)
    assert NVEmbed.from_pretrained(tmp_path).max_seq_length == 4096


OURS = "nvembed_fast.integrations.sentence_transformers.NVEmbedModule"


@pytest.mark.parametrize("value", ["64", 0, True, 1.5])
def test_a_length_that_is_none_is_named(value, tiny_directory, tmp_path):
    shutil.copytree(tiny_directory, tmp_path, dirs_exist_ok=True)
    _set(tmp_path, OURS, max_seq_length=value)
    with pytest.raises(ValueError, match=r"sentence_bert_config\.json: max_seq_length must be an integer"):
        NVEmbed.from_pretrained(tmp_path)


def test_a_save_over_a_pipeline_is_read_back(model, tiny_directory, tmp_path):
    """The prompts stay. A module behind the model would make other vectors."""
    shutil.copytree(tiny_directory, tmp_path, dirs_exist_ok=True)
    content = make_pipeline(tmp_path, "sentence_transformers.models.Dense")
    model.save_pretrained(tmp_path)
    assert NVEmbed.from_pretrained(tmp_path).max_seq_length == 4096
    settings = "config_sentence_transformers.json"
    assert (tmp_path / settings).read_text() == content[settings]


def test_modules_that_would_not_run_are_refused_before_weights_are_fetched(
    monkeypatch, tiny_directory, tmp_path
):
    import huggingface_hub

    def fetch(name, *, allow_patterns, **_):
        assert "model*.safetensors" not in allow_patterns
        for path in tiny_directory.iterdir():
            if path.name in allow_patterns:
                shutil.copy(path, tmp_path)
        if "modules.json" in allow_patterns:
            _set(tmp_path, OURS, "sentence_transformers.models.Dense")
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(ValueError, match="Dense, which does not run here"):
        NVEmbed.from_pretrained("a/b")


def test_modules_that_would_not_run_are_refused(tiny_directory, tmp_path):
    shutil.copytree(tiny_directory, tmp_path, dirs_exist_ok=True)
    for types in ([OURS], [OURS, PUBLISHED[2]]):
        _set(tmp_path, *types)
        assert NVEmbed.from_pretrained(tmp_path).max_seq_length == 64
    for types in ([OURS, "sentence_transformers.models.Dense"], [*PUBLISHED, "mine.Whitening"]):
        _set(tmp_path, *types)
        with pytest.raises(ValueError, match=rf"modules\.json names {types[-1]}, which does not run here"):
            NVEmbed.from_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text("{}{")
    with pytest.raises(ValueError, match=r"modules\.json is no list of modules"):
        NVEmbed.from_pretrained(tmp_path)
