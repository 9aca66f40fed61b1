import json

import pytest

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
