"""Parity with NVIDIA's own code: tests/golden/tiny_a was written by it, on a CPU in fp32."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from whole_model import from_padded

from nvembed_fast import ops
from nvembed_fast.checkpoint import load_model

TINY = Path(__file__).parent / "golden" / "tiny_a"
CASES = json.loads((TINY / "cases.json").read_text())
EXPECTED = load_file(TINY / "expected.safetensors")
BOUND = {"torch": 5e-6, "triton": 2e-5}


@pytest.fixture
def tiny(device):
    return load_model(TINY, device=device, dtype=torch.float32).requires_grad_(False)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape and wanted.norm() > 0
    return ((got.cpu() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("latents", ["direct", "absorbed"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("case", range(len(CASES)), ids=[c["name"] for c in CASES])
def test_every_layer_equals_the_original(tiny, case, impl, latents):
    golden = {k.split(".", 1)[1]: v for k, v in EXPECTED.items() if k.startswith(f"case{case}.")}
    device = tiny.embedding_model.embed_tokens.weight.device
    masks = (golden[name].to(device) for name in ("input_ids", "attention_mask", "pool_mask"))
    batch, _ = from_padded(*masks)
    real = golden["attention_mask"].bool()
    head = tiny.head
    head.mode = latents
    got, hidden = {}, []
    with ops.use_impl(impl):
        h = tiny.embedding_model(batch, hidden)
        got |= {f"hidden.{i}": state for i, state in enumerate(hidden)}
        got["cross_attention"] = head.attention(h, batch.layout)
        got["latent_output"] = head.token_states(h, batch.layout)
        embeddings = head(h, batch.layout, batch.pool_mask)
    assert len(hidden) == tiny.config.text_config.num_hidden_layers + 1
    for name, state in got.items():
        assert relative(state, golden[name][real]) < BOUND[impl], name
    assert relative(embeddings, golden["embeddings"]) < BOUND[impl]


def test_the_bound_sees_a_dropped_token(tiny):
    """The bound would be worth nothing if an error of one token could hide below it."""
    golden = {k.split(".", 1)[1]: v for k, v in EXPECTED.items() if k.startswith("case1.")}
    device = tiny.embedding_model.embed_tokens.weight.device
    pool_mask = golden["pool_mask"].clone()
    pool_mask[:, 1] = 0
    batch, _ = from_padded(
        *(t.to(device) for t in (golden["input_ids"], golden["attention_mask"], pool_mask))
    )
    with ops.use_impl("torch"):
        assert relative(tiny(batch), golden["embeddings"]) > 100 * BOUND["triton"]
