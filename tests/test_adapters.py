"""Adapters as files: PEFT's format without PEFT. With PEFT itself: tests/integrations/test_peft.py."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import adapted_model, fill_adapters
from tiny_checkpoint import edit_json, everything
from whole_model import EVERY_HEAD, HEADS, make_batch, make_model

from nvembed_fast import NVEmbed, files, fingerprint, ops
from nvembed_fast.checkpoint import (
    add_lora,
    load_adapter,
    load_model,
    merge_adapter,
    save_adapter,
    save_model,
    stored_samples,
    tokenizer_files,
)
from nvembed_fast.checkpoint.adapters import CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE
from nvembed_fast.cli import main
from nvembed_fast.network.lora import AdaptedLinear

Q = "base_model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.fixture(autouse=True)
def _reference():
    with ops.use_impl("torch"):
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a model with a trained adapter and head, their directory). Copy before damaging."""
    model, directory = adapted_model(train="full"), tmp_path_factory.mktemp("adapter") / "new" / "one"
    with torch.no_grad():
        model.head.latents.mul_(1.5)
    save_adapter(model, directory, base="some/base")
    return model, directory


@pytest.fixture
def damaged(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "damaged")


def edit_tensors(file, **changes):
    kept = {name: value for name, value in (load_file(file) | changes).items() if value is not None}
    save_file(kept, file, metadata={"format": "pt"})


def test_the_files_are_those_of_peft(saved):
    _, directory = saved
    assert sorted(p.name for p in directory.iterdir()) == [CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE]
    config = json.loads((directory / CONFIG_FILE).read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "some/base"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (4, 8, 0.0, "none")
    assert config["target_modules"] == [f"{n}_proj" for n in ("down", "gate", "k", "o", "q", "up", "v")]
    stored = load_file(directory / WEIGHTS_FILE)
    shapes = {name.removeprefix("base_model.model.layers.1."): tuple(v.shape) for name, v in stored.items()}
    assert len(stored) == 2 * 7 * 2
    assert shapes["self_attn.q_proj.lora_A.weight"] == (4, 48)
    assert shapes["self_attn.q_proj.lora_B.weight"] == (64, 4)
    assert shapes["self_attn.v_proj.lora_B.weight"] == (32, 4)
    assert shapes["mlp.down_proj.lora_A.weight"] == (4, 64)
    head = load_file(directory / HEAD_FILE)
    assert "latent_attention_model.cross_attend_blocks.0.fn.to_kv.weight" in head and len(head) == 14


@EVERY_HEAD
@pytest.mark.parametrize("train", ["full", "lora", "frozen"])
@pytest.mark.parametrize("trainable", [True, False])
def test_loaded_equals_saved(head, train, trainable, tmp_path):
    model, batch = adapted_model(head, train), make_batch()
    if train == "full":
        for p in model.head.parameters():
            p.data += 0.1
    save_adapter(model, tmp_path)
    loaded = make_model(head)
    adapter = load_adapter(loaded, tmp_path, trainable=trainable)
    assert {n: v.tolist() for n, v in loaded.state_dict().items()} == {
        n: v.tolist() for n, v in model.state_dict().items()
    }
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == (trained if trainable else set())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(batch), model(batch))
    # a head without weights leaves nothing that could tell
    assert loaded.adapter is adapter
    assert (adapter.rank, adapter.alpha, adapter.dropout) == (4, 8.0, 0.0)
    if head[0] in ("latent", "self_attention"):
        assert adapter == model.adapter
    save_adapter(loaded, tmp_path / "again")
    for name in (WEIGHTS_FILE, HEAD_FILE):
        assert (tmp_path / name).exists() == (tmp_path / "again" / name).exists()
        assert (
            not (tmp_path / name).exists()
            or (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        )


def test_an_adapter_on_some_projections_leaves_the_others(damaged, saved):
    """As PEFT's default of query and value: the key's adapter in the packed product is one of zeros."""
    names = load_file(damaged / WEIGHTS_FILE).keys()
    gone = {n: None for n in names if not any(p in n for p in ("q_proj", "v_proj"))}
    edit_tensors(damaged / WEIGHTS_FILE, **gone)
    model = make_model()
    load_adapter(model, damaged, trainable=True)
    adapted = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    assert adapted == {"qkv_proj"}
    wanted, product = (m.embedding_model.layers[1].self_attn.qkv_proj for m in (saved[0], model))
    q, k, v = product.lora_B.split(product.rows)
    assert not k.any() and not product.lora_A[4:8].any()
    whole = wanted.lora_B.split(wanted.rows)
    assert torch.equal(q, whole[0]) and torch.equal(v, whole[2])


@pytest.mark.parametrize("prefix", ["model.", "embedding_model."])
def test_adapters_of_other_wrappings_of_the_decoder_load(damaged, saved, prefix):
    """Of a decoder with a language-model head, and of the original's model."""
    stored = load_file(damaged / WEIGHTS_FILE)
    renamed = {n.replace("base_model.model.", "base_model.model." + prefix): v for n, v in stored.items()}
    save_file(renamed, damaged / WEIGHTS_FILE)
    model = make_model()
    load_adapter(model, damaged)
    got, wanted = (m.embedding_model.layers[0].mlp.gate_up_proj.lora_B for m in (model, saved[0]))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_loaded_head_takes_the_dtype_of_the_model_unless_it_is_trained_on(saved, dtype):
    for trainable, wanted in ((False, dtype), (True, torch.float32)):
        model = make_model(dtype=dtype)
        load_adapter(model, saved[1], trainable=trainable)
        assert {p.dtype for p in model.head.parameters()} == {wanted}
        assert model.embedding_model.layers[0].mlp.down_proj.lora_A.dtype == torch.float32
        torch.testing.assert_close(model.head.latents.float(), saved[0].head.latents, rtol=1e-2, atol=0)


def test_a_directory_of_no_adapter(saved, damaged, tmp_path):
    model = make_model()
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        load_adapter(model, tmp_path / "nowhere")
    (damaged / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing: an adapter has"):
        load_adapter(model, damaged)
    (damaged / WEIGHTS_FILE).write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="cut short or no safetensors file"):
        load_adapter(model, damaged)
    assert model.adapter is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"use_dora": True}, "use_dora=True is not supported: it is no plain LoRA"),
        ({"use_rslora": True}, "use_rslora=True is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern=.* is not supported"),
        ({"modules_to_save": ["norm"]}, "modules_to_save=.* is not supported"),
        ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow=1 is not supported"),
        ({"bias": "all"}, "bias must be 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, got 'pissa'"),
        ({"r": 0}, "r must be an integer from 1"),
        ({"r": 8}, r"lora_A.weight must be \[8, 64\], got \[4, 64\]"),
        ({"lora_alpha": "big"}, "lora_alpha must be a positive number, got 'big'"),
        ({"lora_dropout": 1}, "lora_dropout must be a number from 0 up to 1, got 1"),
    ],
    ids=str,
)
def test_what_is_no_plain_lora_is_named(damaged, change, message):
    edit_json(damaged / CONFIG_FILE, lambda content: content.update(change))
    model = make_model()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, damaged)
    assert model.adapter is None and not any(isinstance(m, AdaptedLinear) for m in model.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q: None}, "q_proj.weight has only lora_B of its two matrices"),
        (
            {Q: None, Q.replace("lora_A", "lora_B"): None},
            "has self_attn.q_proj of 1 layers, but this model has 2",
        ),
        ({Q: torch.zeros(4, 47)}, r"must be \[4, 48\], got \[4, 47\]"),
        ({Q: torch.full((4, 48), float("nan"))}, "holds NaN, Inf"),
        ({Q: torch.zeros(4, 48, dtype=torch.int32)}, "no floating-point numbers"),
        ({Q.replace("1.", "2."): torch.zeros(4, 48)}, "belongs to no product of this model.*has 2 layers"),
        ({"lm_head.weight": torch.zeros(4)}, "'lm_head.weight' belongs to no product"),
    ],
    ids=range(7),
)
def test_matrices_that_do_not_fit_are_named(damaged, change, message):
    edit_tensors(damaged / WEIGHTS_FILE, **change)
    model = make_model()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, damaged)
    assert model.adapter is None and not any(isinstance(m, AdaptedLinear) for m in model.modules())


def test_a_head_that_does_not_fit_is_named(damaged):
    for head in (HEADS[2], HEADS[4]):
        with pytest.raises(ValueError, match="adapter_head.safetensors: 'latent_attention_model.* it is"):
            load_adapter(make_model(head), damaged)
    edit_tensors(damaged / HEAD_FILE, **{"latent_attention_model.latents": None})
    with pytest.raises(ValueError, match=r"latents' must be \[24, 48\], it is absent"):
        load_adapter(make_model(), damaged)


def test_an_error_while_saving_leaves_the_old_adapter(saved, damaged, monkeypatch):
    before = everything(damaged)
    broken = adapted_model()
    with torch.no_grad():
        broken.embedding_model.layers[0].mlp.down_proj.lora_A[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj.lora_A.weight holds NaN or Inf"):
        save_adapter(broken, damaged)
    assert everything(damaged) == before

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nvembed_fast.checkpoint.adapters.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            save_adapter(adapted_model(), damaged)
    assert everything(damaged) == before
    # one without a trained head takes the old head away
    save_adapter(adapted_model(train="frozen"), damaged)
    assert sorted(p.name for p in damaged.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert files.unfinished(damaged) == []
    with pytest.raises(ValueError, match="the model has no adapter: call add_lora"):
        save_adapter(make_model(), damaged)


@pytest.fixture(scope="module")
def tiny_adapter(tiny_directory, tmp_path_factory):
    """A trained adapter and head of the tiny published model."""
    model, directory = load_model(tiny_directory), tmp_path_factory.mktemp("tiny_adapter")
    add_lora(model, rank=4, alpha=8)
    fill_adapters(model)
    with torch.no_grad():
        model.head.latents.mul_(1.5)
    save_adapter(model, directory)
    return directory


def test_the_encoder_merges_an_adapter(tiny_directory, tiny_adapter, tmp_path):
    texts = ["one text", "another"]
    plain = NVEmbed.from_pretrained(tiny_directory, device="cpu")
    adapted = NVEmbed.from_pretrained(tiny_directory, device="cpu", adapter=tiny_adapter)
    before, vectors = plain.encode(texts), adapted.encode(texts)
    assert (before - vectors).abs().max() > 1e-2
    load_adapter(plain.model, tiny_adapter)
    torch.testing.assert_close(plain.encode(texts), vectors, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"lora_A'.*merge_adapter\(model\).*or save it alone"):
        plain.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    merge_adapter(plain.model)
    plain.save_pretrained(tmp_path / "saved")
    again = NVEmbed.from_pretrained(tmp_path / "saved", device="cpu")
    torch.testing.assert_close(again.encode(texts), vectors, rtol=1e-5, atol=1e-5)


def test_an_adapter_is_taken_on_the_weights_that_it_was_trained_on(tiny_directory, tmp_path):
    """Whatever their dtype, and with another head. Not on another decoder."""
    model = load_model(tiny_directory)
    name = fingerprint.of_decoder(stored_samples(tiny_directory, model.config))
    add_lora(model, rank=4, alpha=8)
    save_adapter(model, tmp_path / "adapter", base="the/base", base_weights=name)
    for dtype in ("float32", "bfloat16"):
        NVEmbed.from_pretrained(tiny_directory, device="cpu", dtype=dtype, adapter=tmp_path / "adapter")
    down = "embedding_model.layers.0.mlp.down_proj.weight"
    for folder, parameter in (("head", "head.latents"), ("other", down)):
        changed = load_model(tiny_directory)
        with torch.no_grad():
            changed.get_parameter(parameter).mul_(1.01)
        save_model(changed, tmp_path / folder, other_files=tokenizer_files(tiny_directory))
    NVEmbed.from_pretrained(tmp_path / "head", device="cpu", adapter=tmp_path / "adapter")
    with pytest.raises(
        ValueError, match="was trained on other weights than those of .*other. Load it on the/base"
    ):
        NVEmbed.from_pretrained(tmp_path / "other", device="cpu", adapter=tmp_path / "adapter")


def test_the_weights_are_not_read_for_an_adapter_that_names_none(tiny_directory, tiny_adapter, monkeypatch):
    monkeypatch.setattr(fingerprint, "of_decoder", lambda _: pytest.fail("the weights are read"))
    NVEmbed.from_pretrained(tiny_directory, device="cpu", adapter=tiny_adapter)


def test_a_fingerprint_sees_the_adapter_whatever_the_dtype(tiny_directory, tiny_adapter, tmp_path):
    def name(adapter, dtype="float32"):
        return NVEmbed.from_pretrained(tiny_directory, device="cpu", adapter=adapter, dtype=dtype).fingerprint

    wanted = name(tiny_adapter)
    assert wanted == name(tiny_adapter, "bfloat16") and wanted != name(None)
    for number, change in enumerate((lambda c: c.update(lora_alpha=9), None)):
        other = shutil.copytree(tiny_adapter, tmp_path / str(number))
        if change:
            edit_json(other / CONFIG_FILE, change)
        else:
            latents = load_file(other / HEAD_FILE)["latent_attention_model.latents"]
            edit_tensors(other / HEAD_FILE, **{"latent_attention_model.latents": latents * 2})
        assert name(other) != wanted
    model = NVEmbed.from_pretrained(tiny_directory, device="cpu")
    load_adapter(model.model, tiny_adapter)
    assert model.fingerprint not in (wanted, name(None))


def test_the_callers_default_device_changes_nothing(tiny_directory, tiny_adapter):
    """The device "meta" stands in for a GPU."""
    wanted = NVEmbed.from_pretrained(tiny_directory, device="cpu", adapter=tiny_adapter)
    try:
        torch.set_default_device("meta")
        loaded = NVEmbed.from_pretrained(tiny_directory, device="cpu", adapter=tiny_adapter)
        assert loaded.fingerprint == wanted.fingerprint
        assert torch.equal(loaded.encode(["a b"]), wanted.encode(["a b"]))
    finally:
        torch.set_default_device(None)


def test_an_untrained_model_with_an_adapter_is_trained(tiny_directory, tiny_adapter, tmp_path):
    fresh = shutil.copytree(tiny_directory, tmp_path / "fresh")
    edit_json(fresh / "config.json", lambda content: content.update(is_untrained=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not NVEmbed.from_pretrained(fresh, adapter=tiny_adapter).config.is_untrained
        NVEmbed.from_pretrained(fresh, adapter=tiny_adapter).encode(["a"])


def test_the_command_takes_an_adapter(tiny_directory, tiny_adapter, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("one text\nanother\n")
    arguments = ["encode", str(tmp_path / "texts.txt"), "--model", str(tiny_directory), "--device", "cpu"]
    assert main([*arguments, "--adapter", str(tiny_adapter), "-o", str(tmp_path / "vectors.npy")]) == 0
    wanted = NVEmbed.from_pretrained(tiny_directory, device="cpu", adapter=tiny_adapter)
    got = torch.from_numpy(np.load(tmp_path / "vectors.npy"))
    torch.testing.assert_close(got, wanted.encode(["one text", "another"]))
    assert main([*arguments, "--adapter", str(tmp_path), "-o", str(tmp_path / "other.npy")]) == 1
    assert "adapter_config.json is missing" in capsys.readouterr().err
