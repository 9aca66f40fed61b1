import json
import math

import pytest

from nvembed_fast import files
from nvembed_fast.config import BackboneConfig, LatentConfig, NVEmbedConfig


def test_published_config_needs_nothing_but_its_model_type():
    config = NVEmbedConfig.from_dict(
        {
            "model_type": "nvembed",
            "latent_attention_config": {"model_type": "latent_attention"},
            "text_config": {"model_type": "bidir_mistral", "sliding_window": 4096, "mask_type": "b"},
            "torch_dtype": "float16",
        }
    )
    assert config == NVEmbedConfig()
    assert config.text_config.head_dim == 128 and config.pooling_start == "token_count"


def test_round_trip(tmp_path):
    text = BackboneConfig(hidden_size=96, num_attention_heads=3, num_key_value_heads=1, rope_theta=5e5)
    config = NVEmbedConfig(text, LatentConfig(hidden_dim=96, latent_dim=32), pooling_start="text_offset")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert NVEmbedConfig.from_file(path) == config


def test_reads_the_rope_parameters_of_transformers_5():
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    assert BackboneConfig.from_dict({"rope_parameters": rope}).rope_theta == 1e6


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling="),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type 'llama3'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4, "head_dim": 8}, "must be a multiple"),
        ({"hidden_size": 100}, "not a multiple of num_attention_heads"),
        ({"head_dim": 15}, "head_dim must be even"),
    ],
)
def test_refuses_a_backbone_it_does_not_compute(raw, message):
    with pytest.raises(ValueError, match=message):
        BackboneConfig.from_dict(raw)


@pytest.mark.parametrize("value", ["4096", 4096.0, 0, -1, 2.5, 10**30, True, [4096], {}])
@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ],
)
def test_a_size_is_an_integer(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be an integer from 1 to 2147483647, got "):
        BackboneConfig.from_dict({name: value})


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "rope_theta",
            [math.nan, 0, -1, math.inf, 1e30, "10000", True],
            "must be a number from 1 to 1e\\+12",
        ),
        ("rms_norm_eps", [math.nan, 0, -1, math.inf, 1e30, "1e-5"], "must be a number from 1e-12 to 0.1"),
        ("num_hidden_layers", [10**6, -1, 1.5, "2"], "must be an integer from 0 to 1024"),
        ("is_causal", ["false", 0, 1], "must be true or false"),
        ("eos_token_id", [-1, "2", 2.0, [2, -1]], "must be an integer from 0 to"),
        ("rope_parameters", ["default", [1], 3], "must be an object"),
    ],
)
def test_a_number_or_a_flag_is_refused_by_its_key(name, values, message):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} {message}"):
            BackboneConfig.from_dict({name: value})
    rope = {"rope_parameters": {"rope_theta": math.nan}}
    with pytest.raises(ValueError, match="rope_theta must be a number"):
        BackboneConfig.from_dict(rope)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_mask_instruction": "false"}, "is_mask_instruction must be true or false, got 'false'"),
        ({"is_untrained": 1}, "is_untrained must be true or false, got 1"),
        ({"text_config": [1]}, r"text_config must be an object, got \[1\]"),
        ({"latent_attention_config": "x"}, "latent_attention_config must be an object, got 'x'"),
        (
            {"latent_attention_config": {"output_normalize": "false"}},
            "output_normalize must be true or false",
        ),
        ({"latent_attention_config": {"num_cross_heads": 0}}, "num_cross_heads must be an integer from 1"),
        ({"torch_dtype": 16}, "torch_dtype must be one of float16, .* got 16"),
        ({"torch_dtype": "int8"}, "torch_dtype must be one of float16, .* got .int8"),
        ({"dtype": "int8"}, "dtype must be one of float16, .* got 'int8'"),
        ({"pooling_head": ["mean"]}, r"pooling_head must be one of 'latent', .* got \['mean'\]"),
    ],
)
def test_a_value_of_the_whole_model_is_refused_by_its_key(changes, message):
    with pytest.raises(ValueError, match=message):
        NVEmbedConfig.from_dict({"model_type": "nvembed"} | changes)


def test_what_published_configs_hold_is_read():
    text = {"eos_token_id": [128001, 128009], "pad_token_id": -1, "rope_theta": 500000, "rope_scaling": None}
    assert BackboneConfig.from_dict(text | {"attention_bias": False}).rope_theta == 500000
    raw = {"model_type": "nvembed", "torch_dtype": None, "dtype": "torch.bfloat16", "text_config": None}
    assert NVEmbedConfig.from_dict(raw).torch_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"it must hold an object, found \[\]"),
        ('{"model_type": "nvembed", "model_type": "bert"}', "'model_type' is listed twice"),
        ('{"text_config": {"rope_theta": NaN}}', "'rope_theta' must be a finite number, got nan"),
        ('{"text_config": {"rope_theta": -Infinity}}', "'rope_theta' must be a finite number, got -inf"),
        ('{"text_config": {"rope_theta": 1e999}}', "'rope_theta' must be a finite number, got inf"),
        ('{"x":' * 10_000, "it is nested too deeply"),
        ('{"x": ' + "[" * 10_000 + "]" * 10_000 + "}", "it is nested too deeply"),
        (" " * (files.MAX_JSON_BYTES + 1), "is larger than 16 MiB"),
    ],
    ids=range(8),
)
def test_json_that_is_no_config(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json:? {message}"):
        NVEmbedConfig.from_file(tmp_path / "config.json")


def test_a_config_marked_as_untrained_comes_back(tmp_path):
    config = NVEmbedConfig(is_untrained=True)
    assert NVEmbedConfig.from_dict(config.to_dict()) == config
    assert "is_untrained" not in NVEmbedConfig().to_dict(), "published configs do not have it"


def test_names_another_model_type_and_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "mistral"}')
    with pytest.raises(ValueError, match=r"config.json: .*'mistral', expected 'nvembed'.*nvembed-fast init"):
        NVEmbedConfig.from_file(path)


def test_names_a_file_that_is_no_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json"):
        NVEmbedConfig.from_file(tmp_path / "config.json")


def test_refuses_an_unknown_pooling_rule_and_a_head_of_another_width():
    with pytest.raises(ValueError, match="pooling_start must be one of"):
        NVEmbedConfig(pooling_start="first")
    with pytest.raises(ValueError, match="hidden_dim 64 must equal hidden_size 4096"):
        NVEmbedConfig(latent_attention_config=LatentConfig(hidden_dim=64))
