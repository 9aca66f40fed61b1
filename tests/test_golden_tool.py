"""tools/golden.py end to end, with a stand-in for the original's code in plain, padded PyTorch."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn

from nvembed_fast.config import NVEmbedConfig
from tools import golden

TINY = golden.GOLDEN / "tiny_a"
CONFIG = NVEmbedConfig.from_file(TINY / "config.json")


def bare(width: int, inner: int, **linear) -> nn.Linear:
    return nn.Linear(width, inner, **{"bias": False} | linear)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.config = config
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.input_layernorm = nn.RMSNorm(width, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(width, config.rms_norm_eps)
        attention = {"q_proj": (width, q), "k_proj": (width, kv), "v_proj": (width, kv), "o_proj": (q, width)}
        self.self_attn = nn.ModuleDict({name: bare(*shape) for name, shape in attention.items()})
        self.mlp = nn.ModuleDict(
            {"gate_proj": bare(width, inner), "up_proj": bare(width, inner), "down_proj": bare(inner, width)}
        )

    def forward(self, hidden_states, attention_mask):
        a, m, h = self.self_attn, self.mlp, hidden_states
        x = self.input_layernorm(h)
        q, k, v = (
            a[name](x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        groups = q.shape[1] // k.shape[1]
        k, v = self.turned(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        seen = attention_mask[:, None, None].bool()
        out = F.scaled_dot_product_attention(self.turned(q), k, v, attn_mask=seen)
        h = h + a["o_proj"](out.transpose(1, 2).flatten(2))
        x = self.post_attention_layernorm(h)
        return h + m["down_proj"](F.silu(m["gate_proj"](x)) * m["up_proj"](x))

    def turned(self, x):
        half = self.config.head_dim // 2
        frequency = self.config.rope_theta ** (-torch.arange(half) / half)
        angle = torch.arange(x.shape[2])[:, None] * frequency
        first, second = x.chunk(2, -1)
        return torch.cat(
            (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1
        )


class Cross(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_dim, config.num_cross_heads * config.cross_dim_head
        self.heads = config.num_cross_heads
        self.norm, self.norm_context = nn.LayerNorm(width), nn.LayerNorm(config.latent_dim)
        shapes = {"to_q": (width, inner), "to_kv": (config.latent_dim, 2 * inner), "to_out": (inner, width)}
        self.fn = nn.ModuleDict({name: bare(*shape) for name, shape in shapes.items()})

    def forward(self, h, context):
        k, v = self.fn["to_kv"](self.norm_context(context)).chunk(2, -1)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in (self.fn["to_q"](self.norm(h)), k, v)
        )
        out = F.scaled_dot_product_attention(q, k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1))
        return self.fn["to_out"](out.transpose(-3, -2).flatten(-2))


class GEGLU(nn.Module):
    def forward(self, x):
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        net = nn.Sequential(bare(width, 8 * width, bias=True), GEGLU(), bare(4 * width, width, bias=True))
        self.fn = nn.ModuleDict({"net": net})

    def forward(self, h):
        return self.fn["net"](self.norm(h))


class StandIn(nn.Module):
    """The interface that tools/golden.py asks of the original."""

    def __init__(self, directory: Path):
        super().__init__()
        text, head = CONFIG.text_config, CONFIG.latent_attention_config
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        backbone = self.embedding_model = nn.Module()
        backbone.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        backbone.layers = nn.ModuleList(Layer(text) for _ in range(text.num_hidden_layers))
        backbone.norm = nn.RMSNorm(text.hidden_size, text.rms_norm_eps)
        latent = self.latent_attention_model = nn.Module()
        latent.latents = nn.Parameter(torch.empty(head.num_latents_value, head.latent_dim))
        latent.cross_attend_blocks = nn.ModuleList([Cross(head), FeedForward(head.hidden_dim)])
        weights = {name: t.float() for name, t in load_file(directory / "model.safetensors").items()}
        self.load_state_dict(weights)

    def encode(self, prompts, instruction="", max_length=4096):
        rows = [self.tokenizer.encode(f"{instruction}{text}</s>").ids[:max_length] for text in prompts]
        longest = max(map(len, rows))
        input_ids = torch.tensor([row + [2] * (longest - len(row)) for row in rows])
        attention_mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        pool_mask = attention_mask.clone()
        if instruction:
            pool_mask[:, : len(self.tokenizer.encode(instruction, add_special_tokens=False).ids)] = 0
        return self(input_ids, attention_mask, pool_mask=pool_mask)

    def forward(self, input_ids, attention_mask, pool_mask=None):
        h = self.embedding_model.embed_tokens(input_ids)
        for layer in self.embedding_model.layers:
            h = layer(h, attention_mask)
        h = self.embedding_model.norm(h)
        cross, feed_forward = self.latent_attention_model.cross_attend_blocks
        h = cross(h, self.latent_attention_model.latents) + h
        h = feed_forward(h) + h
        kept = pool_mask[..., None]
        return F.normalize((h * kept).sum(1) / kept.sum(1), dim=-1)


@pytest.fixture(scope="module")
def download(tiny_directory, tmp_path_factory) -> Path:
    """Shaped like the user's download of the original: code, config, tokenizer."""
    folder = tmp_path_factory.mktemp("download")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_directory / name).read_bytes())
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "modeling_nvembed.py").write_text("raise AssertionError('no test runs this')\n")
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_nvembed.NVEmbedModel"}}')
    return folder


@pytest.fixture(scope="module")
def made(download, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made")
    golden.make(download, out, load_file(TINY / "model.safetensors"), StandIn)
    return out


def test_the_committed_weights_give_the_committed_numbers(made):
    assert golden.compare(made) == []
    assert golden.main(["compare", str(made)]) == 0


def test_the_layout_is_that_of_the_golden_folder(made):
    files = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    names = ("config.json", "cases.json", "model.safetensors", "expected.safetensors")
    assert files == {"tokenization.json", *(f"tiny_a/{name}" for name in names)}
    for name in ("model", "expected"):
        ours, theirs = (
            load_file(folder / "tiny_a" / f"{name}.safetensors") for folder in (made, golden.GOLDEN)
        )
        assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {
            k: (t.shape, t.dtype) for k, t in theirs.items()
        }


def change_state(expected, cases):
    expected["case1.hidden.2"] *= 1.0001
    return "case1.hidden.2: relative error 1.00e-04, allowed 5e-06"


def change_mask(expected, cases):
    expected["case0.pool_mask"][0, 20] ^= 1
    return "case0.pool_mask differs"


def change_keys(expected, cases):
    del expected["case4.embeddings"]
    return "keys of one side alone: case4.embeddings"


def change_shape(expected, cases):
    expected["case2.embeddings"] = expected["case2.embeddings"][:2]
    return "case2.embeddings: (2, 64) torch.float32 against (7, 64) torch.float32"


def change_text(expected, cases):
    cases[0]["texts"][0] += "!"
    return "tiny_a/cases.json differs"


@pytest.mark.parametrize("change", [change_state, change_mask, change_keys, change_shape, change_text])
def test_compare_names_what_differs(change, made, tmp_path):
    (tmp_path / "tiny_a").mkdir()
    (tmp_path / "tokenization.json").write_bytes((made / "tokenization.json").read_bytes())
    (tmp_path / "tiny_a" / "config.json").write_bytes((TINY / "config.json").read_bytes())
    expected, cases = load_file(TINY / "expected.safetensors"), json.loads((TINY / "cases.json").read_text())
    message = change(expected, cases)
    (tmp_path / "tiny_a" / "cases.json").write_text(json.dumps(cases))
    save_file({k: t.contiguous() for k, t in expected.items()}, tmp_path / "tiny_a" / "expected.safetensors")
    assert golden.compare(tmp_path) == [message]


def test_compare_does_not_look_at_states_of_pads(tmp_path, made):
    expected = load_file(made / "tiny_a" / "expected.safetensors")
    pads = expected["case1.attention_mask"] == 0
    assert pads.any(), "this would prove nothing"
    expected["case1.hidden.1"][pads] = float("nan")
    (tmp_path / "tiny_a").mkdir()
    for name in ("tiny_a/config.json", "tiny_a/cases.json", "tokenization.json"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    save_file(expected, tmp_path / "tiny_a" / "expected.safetensors")
    assert golden.compare(tmp_path) == []


def test_drawn_weights_have_the_names_shapes_and_sizes_of_the_committed_ones():
    drawn, committed = golden.draw_weights(CONFIG, 0), load_file(TINY / "model.safetensors")
    assert drawn.keys() == committed.keys()
    for name, tensor in drawn.items():
        assert tensor.shape == committed[name].shape and tensor.dtype == committed[name].dtype
        ratio = tensor.float().std() / committed[name].float().std()
        assert 0.7 < ratio < 1.4, f"{name}: {ratio}"
    again, other = golden.draw_weights(CONFIG, 0), golden.draw_weights(CONFIG, 1)
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert not any(torch.equal(drawn[name], other[name]) for name in drawn)


def test_the_original_gets_its_code_weights_and_tokenizer_from_one_folder(download, tmp_path):
    golden.write_model(download, tmp_path / "model", golden.draw_weights(CONFIG, 0))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["auto_map"] == {"AutoModel": "modeling_nvembed.NVEmbedModel"}
    assert config["text_config"]["_name_or_path"] == str(tmp_path / "model")
    assert (tmp_path / "model" / "modeling_nvembed.py").exists()
    assert NVEmbedConfig.from_dict(config) == CONFIG


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "modeling_nvembed.py"])
def test_a_file_missing_in_the_download_is_named(name, download, tmp_path):
    folder = tmp_path / "download"
    folder.mkdir()
    for path in download.iterdir():
        if path.name != name:
            (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"\*\.py" if name.endswith(".py") else name):
        golden.write_model(folder, tmp_path / "model", {})


def test_other_versions_are_refused():
    with pytest.raises(RuntimeError, match=r"needs transformers==4\.42\.4, tokenizers==0\.19\.1"):
        golden.load_original(TINY)
