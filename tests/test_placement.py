"""Where a model runs and how it computes: decided once, before its weights are read."""

import dataclasses

import pytest
import torch

from nvembed_fast import NVEmbed, checkpoint, ops
from nvembed_fast.config import LatentConfig, NVEmbedConfig
from nvembed_fast.placement import Placement, check_device


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"impl": "cuda"}, "impl must be one of 'auto', 'triton', 'library', 'torch', got 'cuda'"),
        ({"latents": "fast"}, "latents must be one of 'auto', 'direct', 'absorbed', got 'fast'"),
        ({"device": "cuda:77"}, "device 'cuda:77' is not there"),
        ({"device": "nowhere"}, "device 'nowhere' is not a device"),
        ({"device": "fpga"}, "device 'fpga' is not there \\(.{,120}\\): use 'cpu' or 'cuda'$"),
        ({"device": "hpu"}, "device 'hpu' is not there \\(.{,120}\\): use 'cpu' or 'cuda'$"),
        ({"device": 77}, "device 'cuda:77' is not there: .*Use device='cpu'"),
        ({"device_map": {"a": 0, "b": 1}}, "device_map must put the whole model on one device"),
        ({"dtype": "int8"}, "dtype must be one of float16, bfloat16, float32, float64, got 'int8'"),
    ],
)
def test_bad_loading_names_what_is_wrong(tiny_directory, call, message):
    with pytest.raises(ValueError, match=message):
        NVEmbed.from_pretrained(tiny_directory, **call)


def test_kernels_that_cannot_run_are_told_before_the_weights_are_read(tiny_directory, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(checkpoint, "load_model", None)  # never called
    with pytest.raises(ValueError, match="impl='triton' cannot run here: tensors are on cpu, not on a GPU"):
        NVEmbed.from_pretrained(tiny_directory, device="cpu", impl="triton")


def test_a_wrong_argument_fetches_no_weights_and_a_right_one_those_of_its_config(tiny_directory, monkeypatch):
    import huggingface_hub

    fetched = []

    def snapshot(name, revision, allow_patterns, **_):
        fetched.append((revision, "model*.safetensors" not in allow_patterns))
        return tiny_directory

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ValueError, match="latents must be one of"):
        NVEmbed.from_pretrained("owner/name", device="cpu", revision="main", latents="fast")
    assert fetched == [("main", True)]
    NVEmbed.from_pretrained("owner/name", device="cpu", revision="main")
    # the snapshot's folder has the name of its commit
    assert fetched[1:] == [("main", True), (tiny_directory.name, False)]


def test_the_config_is_parsed_once(tiny_directory, monkeypatch):
    parsed, read = [], NVEmbedConfig.from_dict

    def from_dict(raw):
        parsed.append(raw)
        return read(raw)

    monkeypatch.setattr(NVEmbedConfig, "from_dict", from_dict)
    NVEmbed.from_pretrained(tiny_directory, device="cpu")
    assert len(parsed) == 1


@pytest.fixture
def gpu(monkeypatch) -> torch.device:
    """A GPU that is there to be asked for, but not to be used."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr("nvembed_fast.placement.check_device", lambda _: device)
    monkeypatch.setitem(ops._capabilities, 0, (9, 0))
    return device


def test_what_is_not_asked_for_is_decided_by_device_and_config(gpu, monkeypatch):
    config = NVEmbedConfig(torch_dtype="bfloat16")
    decided = Placement.decide(config)
    assert decided == Placement(gpu, torch.bfloat16, "auto", "absorbed", False)
    assert decided.implementation()[0] == "triton"
    assert Placement.decide(config, dtype="fp16", latents="direct").latents == "direct"
    narrow = LatentConfig(cross_dim_head=64, hidden_dim=4096)
    assert Placement.decide(dataclasses.replace(config, latent_attention_config=narrow)).latents == "direct"
    assert Placement.decide(dataclasses.replace(config, pooling_head="mean")).latents is None
    monkeypatch.undo()
    assert Placement.decide(config, device="cpu").dtype == torch.float32
    with pytest.raises(dataclasses.FrozenInstanceError):
        decided.dtype = torch.float16


def test_graphs_need_triton_on_a_gpu(gpu, monkeypatch):
    config = NVEmbedConfig()
    assert Placement.decide(config, cuda_graphs=True).cuda_graphs
    for options, obstacle in (
        ({"impl": "torch"}, "it was asked for"),
        ({"impl": "library"}, "it was asked for"),
        ({"dtype": "float64"}, "float64"),
    ):
        with pytest.raises(ValueError, match=f"cuda_graphs=True needs Triton kernels on a GPU: .*{obstacle}"):
            Placement.decide(config, cuda_graphs=True, **options)
    monkeypatch.setattr("nvembed_fast.placement.check_device", check_device)
    with pytest.raises(ValueError, match="needs Triton kernels on a GPU: tensors are on the CPU"):
        Placement.decide(config, device="cpu", impl="triton", cuda_graphs=True)


def test_a_model_holds_its_placement_which_follows_its_weights(tiny_directory):
    model = NVEmbed.from_pretrained(tiny_directory, device="cpu", impl="torch", latents="direct")
    assert model.placement == Placement(torch.device("cpu"), torch.float32, "torch", "direct", False)
    assert model.model.head.form() == "direct"
    assert model.double().placement.dtype == torch.float64
    assert NVEmbed(model.model, model.text_tokenizer).placement.impl == "auto"
