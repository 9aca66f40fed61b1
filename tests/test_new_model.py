"""A new model: the fresh head, the stored dtype, and a directory that holds a model already."""

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import SAVED, everything
from tiny_decoders import WIDTH, transformers_model, write_mistral, write_tokenizer
from tokenizers import Tokenizer

from nvembed_fast import NVEmbed, ops
from nvembed_fast.checkpoint import load_model, save_model
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.encoder import UntrainedModel
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.new_model import init_model
from nvembed_fast.packing import PackedBatch


@pytest.fixture
def mistral(tmp_path) -> Path:
    return write_mistral(tmp_path / "mistral")


def test_the_dtype_is_the_decoders_own_unless_asked(tmp_path):
    transformers_model("Llama").bfloat16().save_pretrained(tmp_path / "d")
    write_tokenizer(tmp_path / "d")
    for name, dtype in (("a", None), ("b", "float32")):
        init_model(tmp_path / "d", tmp_path / name, dtype=dtype)
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("a", "b")]
    assert {t.dtype for t in stored[0].values()} == {torch.bfloat16}
    assert {t.dtype for t in stored[1].values()} == {torch.float32}
    # one seed, one head: only rounded
    for name in stored[0]:
        assert torch.equal(stored[0][name], stored[1][name].bfloat16()), name


def test_a_random_head(mistral, tmp_path):
    before = torch.get_rng_state()
    sizes = {"num_latents": 24, "num_heads": 2, "head_width": 32, "head_start": "random"}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        init_model(mistral, tmp_path / name, seed=seed, **sizes)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator was used"
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "abc"]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    head = {n.removeprefix("latent_attention_model."): v for n, v in weights[0].items() if "latent" in n}
    other = {n.removeprefix("latent_attention_model."): v for n, v in weights[2].items() if "latent" in n}
    block = "cross_attend_blocks."
    assert head["latents"].shape == (24, WIDTH)
    assert abs(head["latents"].std() - 1) < 0.1
    fan_in = {
        "0.fn.to_q.weight": (64, WIDTH),
        "0.fn.to_kv.weight": (128, WIDTH),
        "0.fn.to_out.weight": (WIDTH, 64),
        "1.fn.net.0.weight": (8 * WIDTH, WIDTH),
        "1.fn.net.2.weight": (WIDTH, 4 * WIDTH),
    }
    for name, shape in fan_in.items():
        value, bound = head[block + name], shape[1] ** -0.5
        assert value.shape == shape
        assert 0.98 * bound < value.abs().max() <= bound
        assert abs(value.std() / (bound / 3**0.5) - 1) < 0.05
        assert not torch.equal(value, other[block + name])
    assert head[block + "1.fn.net.2.bias"].abs().max() <= (4 * WIDTH) ** -0.5
    for norm in ("0.norm", "0.norm_context", "1.norm"):
        assert (head[f"{block}{norm}.weight"] == 1).all() and (head[f"{block}{norm}.bias"] == 0).all()


LAST = ("0.fn.to_out.weight", "1.fn.net.2.weight", "1.fn.net.2.bias")


@pytest.mark.parametrize("pooling_head", ["latent", "self_attention"])
def test_a_fresh_head_is_mean_pooling_and_learns(mistral, tmp_path, pooling_head):
    kinds = {"fresh": {}, "random": {"head_start": "random"}, "mean": {"pooling_head": "mean"}}
    for name, options in kinds.items():
        init_model(mistral, tmp_path / name, **({"pooling_head": pooling_head, "num_latents": 24} | options))
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in kinds}
    zeros = {name for name in weights["fresh"] if name.endswith(LAST)}
    assert len(zeros) == 3
    for name, value in weights["fresh"].items():
        if name in zeros:
            assert not value.any() and weights["random"][name].any()
        else:
            assert torch.equal(value, weights["random"][name])
    models = {name: NVEmbed.from_pretrained(tmp_path / name, device="cpu") for name in kinds}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedModel)
        vectors = {name: model.encode(["w1 w2", "w3"]) for name, model in models.items()}
    assert torch.equal(vectors["fresh"], vectors["mean"])
    assert (vectors["fresh"] - vectors["random"]).abs().max() > 1e-2
    head = models["fresh"].model.head.requires_grad_()
    h = torch.randn(5, WIDTH)
    with ops.use_impl("torch"):
        head(h, SeqLayout((3, 2)))[:, 0].sum().backward()
    assert head.to_out.weight.grad.any() and head.ff_down.weight.grad.any()


def test_a_start_that_is_not_there(mistral, tmp_path):
    with pytest.raises(ValueError, match="head_start must be 'mean' or 'random', got 'zero'"):
        init_model(mistral, tmp_path / "out", head_start="zero")


def test_the_callers_default_device_changes_nothing(mistral, tmp_path):
    for name, device in (("a", "cpu"), ("b", "meta")):
        with torch.device(device):
            init_model(mistral, tmp_path / name, num_latents=24, num_heads=2, head_width=32)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("pooling_head", ["latent", "mean"])
def test_an_untrained_model_says_so_once(mistral, tmp_path, pooling_head):
    init_model(mistral, tmp_path / "out", num_latents=2, pooling_head=pooling_head)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["is_untrained"] is True
    model = NVEmbed.from_pretrained(tmp_path / "out", device="cpu")
    with pytest.warns(UntrainedModel, match=r"is untrained \(is_untrained in config\.json\)") as told:
        model.encode("w1")
        model.encode_query(["w1"], "find")
    assert len(told) == 1
    model.save_pretrained(tmp_path / "again")
    assert NVEmbedConfig.from_file(tmp_path / "again" / "config.json").is_untrained
    # what a trainer does
    model.model.config = replace(model.config, is_untrained=False)
    model.save_pretrained(tmp_path / "again")
    assert "is_untrained" not in json.loads((tmp_path / "again" / "config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NVEmbed.from_pretrained(tmp_path / "again", device="cpu").encode("w1")


def test_a_mark_beyond_the_embedding_is_refused(mistral, tmp_path):
    """Not in the vocabulary, but in the template, so every text would hold it."""
    file = mistral / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    mark = {"[CLS]": {"id": "[CLS]", "ids": [120], "tokens": ["[CLS]"]}}
    post = {"type": "TemplateProcessing", "special_tokens": mark}
    single = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content = json.loads(tokenizer.to_str())
    content["post_processor"] = post | {
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
    }
    file.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match="mistral: token 'the mark 120' has id 120, but the embedding has 99 "
    ):
        init_model(mistral, tmp_path / "out")


def test_wide_decoders_get_the_published_head_width(tmp_path):
    changes = {"hidden_size": 2048, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 99}
    transformers_model("Llama", **changes).half().save_pretrained(tmp_path / "d")
    write_tokenizer(tmp_path / "d")
    init_model(tmp_path / "d", tmp_path / "out", num_heads=1, num_latents=2)
    assert (
        NVEmbedConfig.from_file(tmp_path / "out" / "config.json").latent_attention_config.cross_dim_head
        == 4096
    )


def test_an_existing_model_is_not_overwritten(mistral, tmp_path):
    init_model(mistral, tmp_path / "out", num_latents=2)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="out already holds a model: remove it or choose another"):
        init_model(mistral, tmp_path / "out", num_latents=3)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "tokenizer.json"])
def test_files_of_a_model_without_a_config_are_not_overwritten(mistral, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"out already holds a model: .*Found {name}. --force moves"):
        init_model(mistral, tmp_path / "out", num_latents=2)
    assert everything(tmp_path / "out") == {name: b"mine"}


def test_a_save_that_was_killed_after_its_commit_is_not_overwritten(mistral, tmp_path):
    init_model(mistral, tmp_path / "out" / ".saved", num_latents=2)
    with pytest.raises(FileExistsError, match="out already holds .*Found config.json, .*model.safet"):
        init_model(mistral, tmp_path / "out", num_latents=2)


def test_force_moves_the_files_of_a_model_aside(mistral, tmp_path):
    out = tmp_path / "out"
    old = {
        "config.json": b"1",
        "model-00001-of-00002.safetensors": b"2",
        "pytorch_model.bin": b"3",
        "tokenizer.json": b"4",
        "tokenizer.model": b"5",
        "modules.json": b"6",
        "sentence_bert_config.json": b"7",
    }
    out.mkdir()
    for name, content in old.items():
        (out / name).write_bytes(content)
    (out / "notes.txt").write_text("mine")
    (tmp_path / "blob").write_bytes(b"3")
    (out / "pytorch_model.bin").unlink()
    (out / "pytorch_model.bin").symlink_to("../blob")
    assert init_model(mistral, out, num_latents=2, force=True) == out / "replaced-1"
    assert everything(out / "replaced-1") == old
    files = {p.name for p in out.iterdir() if p.is_file()}
    assert files == {*SAVED, "tokenizer.json", "tokenizer_config.json", "notes.txt"}
    first = everything(out)
    assert init_model(mistral, out, num_latents=3, force=True) == out / "replaced-2"
    assert everything(out / "replaced-2") == {n: first[n] for n in files - {"notes.txt"}}
    assert init_model(mistral, tmp_path / "fresh", num_latents=2, force=True) is None
    assert not (tmp_path / "fresh" / "replaced-1").exists()


@pytest.mark.parametrize("name", ["num_latents", "num_heads", "head_width"])
def test_sizes_below_one(mistral, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        init_model(mistral, tmp_path / "out", **{name: 0})


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_seeds_that_torch_does_not_take(mistral, tmp_path, seed):
    with pytest.raises(ValueError, match="seed must be from"):
        init_model(mistral, tmp_path / "out", seed=seed)


def test_an_empty_path_is_refused_and_a_tilde_is_the_home(mistral, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the path is empty"):
        init_model(mistral, "")
    init_model(mistral, "~/a", num_latents=2)
    model = load_model(tmp_path / "a")
    with pytest.raises(ValueError, match="the path is empty"):
        save_model(model, "")
    save_model(model, "~/b")
    assert {"a", "b"} <= {*os.listdir(tmp_path)} and "~" not in os.listdir(tmp_path)


def test_the_first_layers_of_a_decoder(mistral, tmp_path):
    for name, layers in (("all", None), ("two", 2)):
        init_model(mistral, tmp_path / name, num_latents=2, num_layers=layers)
    whole, short = (load_file(tmp_path / name / "model.safetensors") for name in ("all", "two"))
    assert {n for n in whole if "layers.2." in n} == whole.keys() - short.keys() != set()
    assert all(torch.equal(whole[n], short[n]) for n in short)
    assert NVEmbedConfig.from_file(tmp_path / "two" / "config.json").text_config.num_hidden_layers == 2
    for layers in (0, 4):
        with pytest.raises(ValueError, match=f"num_layers must be from 1 to the decoder's 3, got {layers}"):
            init_model(mistral, tmp_path / "no", num_layers=layers)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_causal_model_hides_later_tokens_from_earlier_ones(mistral, tmp_path, is_causal):
    init_model(mistral, tmp_path / "out", pooling_head="mean", is_causal=is_causal)
    model = NVEmbed.from_pretrained(tmp_path / "out", device="cpu")
    first, second = (
        model.model.token_states(PackedBatch.from_ids([np.array([5, 6, last])], [0]))[1] for last in (7, 8)
    )
    assert torch.equal(first, second) == is_causal
