"""The average of models as a model."""

import json
import shutil
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoint import TINY, edit_json, edit_weights, everything, make_pipeline

from nvembed_fast import NVEmbed
from nvembed_fast.cli import main
from nvembed_fast.training import merge_weights as module
from nvembed_fast.training.merge_weights import merge_weights

LATENTS = "latent_attention_model.latents"


@pytest.fixture(scope="module")
def kept_models(tiny_directory, tmp_path_factory):
    """Three models of one start, the last in shards and in another dtype."""
    folder = tmp_path_factory.mktemp("models")
    made = [shutil.copytree(tiny_directory, folder / f"model-{i}") for i in range(3)]
    for i, directory in enumerate(made):
        stored = load_file(directory / "model.safetensors")
        draw = torch.Generator().manual_seed(i)
        noise = {n: v + 0.01 * torch.randn(v.shape, generator=draw) for n, v in stored.items()}
        save_file(noise, directory / "model.safetensors", metadata={"format": "pt"})
    model = NVEmbed.from_pretrained(made[2], device="cpu")
    shutil.rmtree(made[2])
    module.save_tensors(
        lambda name: model.model.get_parameter(TABLE[name].parameter)[TABLE[name].rows],
        model.config,
        made[2],
        dtype="float64",
        max_shard_bytes=1_500_000,
        other_files=[tiny_directory / "tokenizer.json", tiny_directory / "tokenizer_config.json"],
    )
    assert len(list(made[2].glob("model-*.safetensors"))) > 2
    return made


@pytest.fixture
def models(kept_models, tmp_path):
    """Copies, to be damaged."""
    return [shutil.copytree(directory, tmp_path / directory.name) for directory in kept_models]


TABLE = module.published_tensors(module.NVEmbedConfig.from_file(TINY / "config.json"))


def tensors_of(directory) -> dict[str, torch.Tensor]:
    return {n: v for file in directory.glob("*.safetensors") for n, v in load_file(file).items()}


@pytest.mark.parametrize("weights", [None, [1, 2, 5], [1, 1, -0.5]], ids=str)
def test_every_tensor_is_the_average(models, weights, tmp_path):
    merge_weights(models, tmp_path / "out", weights=weights, dtype="float32")
    shares = torch.tensor(weights or [1, 1, 1], dtype=torch.float64)
    stored = [tensors_of(directory) for directory in models]
    got = tensors_of(tmp_path / "out")
    assert got.keys() == TABLE.keys()
    for name, value in got.items():
        wanted = sum(w * s[name].double() for w, s in zip(shares / shares.sum(), stored, strict=True))
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7)
    one, average = (NVEmbed.from_pretrained(d, device="cpu") for d in (models[0], tmp_path / "out"))
    assert (one.encode(["a text"]) - average.encode(["a text"])).abs().max() > 1e-4


def test_slerp_goes_along_the_arc(models, tmp_path):
    stored = [tensors_of(directory) for directory in models[:2]]
    bent = stored[0]["embedding_model.norm.weight"].flip(0)
    flat = torch.zeros_like(stored[0][LATENTS])
    edit_weights(models[1], **{"embedding_model.norm.weight": bent, LATENTS: flat})
    stored[1] = tensors_of(models[1])
    merge_weights(models[:2], tmp_path / "out", weights=[1, 3], method="slerp", dtype="float32")
    for name, value in tensors_of(tmp_path / "out").items():
        a, b = (tensors[name].double().flatten() for tensors in stored)
        if name == LATENTS:  # no arc from zero
            wanted = 0.25 * a
        else:
            angle = torch.arccos(a @ b / (a.norm() * b.norm()))
            wanted = ((0.25 * angle).sin() * a + (0.75 * angle).sin() * b) / angle.sin()
        torch.testing.assert_close(value.double().flatten(), wanted, rtol=1e-5, atol=1e-6, msg=name)
    got = tensors_of(tmp_path / "out")["embedding_model.norm.weight"]
    assert abs(got.norm() / bent.norm() - 1) < 1e-5, "its length is that of both"
    command = [
        "merge",
        *map(str, models[:2]),
        "-o",
        str(tmp_path / "again"),
        "--method",
        "slerp",
        "--weights",
    ]
    assert main([*command, "1", "3", "--dtype", "float32"]) == 0
    assert torch.equal(tensors_of(tmp_path / "again")["embedding_model.norm.weight"], got)
    same = {name: value for name, value in stored[0].items()}
    edit_weights(models[1], **same)
    merge_weights(models[:2], tmp_path / "same", method="slerp", dtype="float32")
    assert all(torch.equal(value, same[name]) for name, value in tensors_of(tmp_path / "same").items())
    for count, weights in ((3, None), (2, [3, -1])):
        with pytest.raises(ValueError, match="slerp takes two models and shares from 0 on, got"):
            merge_weights(models[:count], tmp_path / "no", method="slerp", weights=weights)
    with pytest.raises(ValueError, match="method must be one of average, slerp, got 'ties'"):
        merge_weights(models, tmp_path / "no", method="ties")


def test_a_model_with_itself_is_itself_and_keeps_its_dtype(tiny_directory, tmp_path):
    merge_weights([tiny_directory, tiny_directory], tmp_path / "out")
    got, wanted = tensors_of(tmp_path / "out"), tensors_of(tiny_directory)
    config = json.loads((tiny_directory / "config.json").read_text())
    assert str(got[LATENTS].dtype) == f"torch.{config['torch_dtype']}"
    for name, value in got.items():
        assert torch.equal(value, wanted[name].to(value.dtype))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        tiny_directory / "tokenizer.json"
    ).read_bytes()


def test_one_tensor_of_one_model_is_in_memory_at_a_time(models, tmp_path, monkeypatch):
    alive, most = [0], [0]

    class Counted:
        def __init__(self, file, framework):
            self.inner = safe_open(file, framework=framework)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def get_tensor(self, name):
            value = self.inner.get_tensor(name)
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            weakref.finalize(value, lambda: alive.__setitem__(0, alive[0] - 1))
            return value

    monkeypatch.setattr(module, "safe_open", Counted)
    merge_weights(models, tmp_path / "out", max_shard_bytes=500_000)
    # the one before it is dropped as the next is read
    assert 0 < most[0] <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling_start": "text_offset"}, "differ in pooling_start of config.json"),
        ({"text_config": {}}, "differ in text_config of config.json"),
    ],
    ids=str,
)
def test_models_of_other_configs_have_no_average(models, tmp_path, change, message):
    def update(content):
        for key, value in change.items():
            content[key] = {**content[key], "rope_theta": 77.0} if key == "text_config" else value

    edit_json(models[1] / "config.json", update)
    with pytest.raises(ValueError, match=message):
        merge_weights(models[:2], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_of_other_tokenizers_have_no_average(models, tmp_path):
    edit_json(models[1] / "tokenizer_config.json", lambda content: content.update(eos_token="<s>"))
    with pytest.raises(ValueError, match="have other tokenizers"):
        merge_weights(models[:2], tmp_path / "out")


def test_what_cannot_be_averaged_leaves_nothing(models, tmp_path):
    with pytest.raises(ValueError, match="two models or more, got 1"):
        merge_weights(models[:1], tmp_path / "out")
    for weights in ([1], [1, float("nan")], [1, -1]):
        with pytest.raises(ValueError, match="weights must be 2 finite numbers with a positive sum"):
            merge_weights(models[:2], tmp_path / "out", weights=weights)
    before = everything(models[1])
    with pytest.raises(ValueError, match="is one of the models"):
        merge_weights(models[:2], models[1])
    assert everything(models[1]) == before
    edit_weights(models[1], **{LATENTS: torch.full(TABLE[LATENTS].shape, float("inf"))})
    with pytest.raises(ValueError, match=f"tensor '{LATENTS}' holds NaN or Inf: nothing was saved"):
        merge_weights(models[:2], tmp_path / "out")
    edit_weights(models[1], **{LATENTS: None})
    with pytest.raises(ValueError, match=LATENTS):
        merge_weights(models[:2], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_average_of_trained_models_is_trained(models, tmp_path):
    for directory in models[:2]:
        edit_json(directory / "config.json", lambda content: content.update(is_untrained=True))
    merge_weights(models[:2], tmp_path / "untrained")
    merge_weights(models, tmp_path / "trained")
    for name in ("untrained", "trained"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config.get("is_untrained", False) == (name == "untrained")


def test_prompts_and_length_are_those_of_the_first(models, tmp_path):
    content = make_pipeline(models[0])
    merge_weights(models[:2], tmp_path / "out")
    settings = "config_sentence_transformers.json"
    assert (tmp_path / "out" / settings).read_text() == content[settings]
    assert NVEmbed.from_pretrained(tmp_path / "out").max_seq_length == 64
    make_pipeline(models[1], "sentence_transformers.models.Dense")
    with pytest.raises(ValueError, match=r"model-1/modules\.json names .*Dense, which does not run here"):
        merge_weights(models[:2], tmp_path / "other")


def test_nothing_of_a_replaced_pipeline_stays(models, tmp_path):
    for name in ("new", "old"):
        merge_weights(models[:2], tmp_path / name)
    make_pipeline(tmp_path / "old", "sentence_transformers.models.Dense")
    merge_weights(models[:2], tmp_path / "old")
    assert everything(tmp_path / "old") == everything(tmp_path / "new")


def test_the_command(models, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["merge", *map(str, models), "-o", str(out), "--weights", "1", "1", "2"]) == 0
    assert f"{out}: the average of 3 models" in capsys.readouterr().out
    assert main(["merge", str(models[0]), "-o", str(tmp_path / "no")]) == 1
    assert "two models or more" in capsys.readouterr().err
