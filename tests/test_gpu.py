"""What only a GPU can show: 16-bit kernels at the real sizes, and a model on it end to end."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_encoder import TEXTS
from tokenizers import Tokenizer, models

from nvembed_fast import NVEmbed, ops
from nvembed_fast.config import BackboneConfig, LatentConfig, NVEmbedConfig
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import (
    ATTENTION_CASES,
    GATED_CASES,
    LATENT_CASES,
    NORM_CASES,
    POOL_CASES,
    ROTARY_CASES,
    assert_parity,
)
from nvembed_fast.model import NVEmbedModel
from nvembed_fast.packing import PackedBatch

pytestmark = pytest.mark.gpu

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def at_size(cases):
    """The cases of the real model, with their names."""
    return pytest.mark.parametrize("case", [c for c in cases if c.bench], ids=lambda c: c.name)


def parity(name: str, fn: str, args: tuple, doubled: tuple, **kwargs) -> None:
    with ops.use_impl("triton"):
        got = getattr(ops, fn)(*args, **kwargs)
    low, high = getattr(reference, fn)(*args, **kwargs), getattr(reference, fn)(*doubled, **kwargs)
    tuples = [t if isinstance(t, tuple) else (t,) for t in (got, low, high)]
    for parts in zip(*tuples, strict=True):
        assert_parity(name, *parts)


def double(args: tuple) -> tuple:
    return tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


@HALF
@at_size(ATTENTION_CASES)
def test_attention_at_the_real_size(case, dtype):
    # float64 attention of 32 heads does not fit; two heads of one group and two sequences show the same sums
    heads = dataclasses.replace(case, num_heads=8, num_kv_heads=2, lengths=case.lengths[:2])
    args = heads.inputs("cuda", dtype)
    parity(case.name, "flash_attention", args, double(args))


@HALF
@at_size(LATENT_CASES)
def test_latent_attention_at_the_real_size(case, dtype):
    case = dataclasses.replace(case, num_tokens=2048)
    args = case.absorbed_inputs("cuda", dtype)
    parity(case.name, "absorbed_latent_attention", args, double(args))
    args = case.direct_inputs("cuda", dtype)
    parity(case.name, "latent_attention", args, double(args))


@HALF
@at_size(POOL_CASES)
def test_pooling_at_the_real_size(case, dtype):
    args = case.inputs("cuda", dtype)
    parity(case.name, "mean_pool", args, double(args))
    args = case.inputs("cuda", dtype, geglu=True)
    parity(case.name, "mean_pool_geglu", args, double(args))


@HALF
@at_size(NORM_CASES)
def test_norms_at_the_real_size(case, dtype):
    x, residual, weight = case.norm_inputs("cuda", dtype)
    parity(case.name, "rms_norm", (x, weight, 1e-5), double((x, weight, 1e-5)))
    # the sum is rounded before the norm: the oracle starts from the rounded one
    h = x + residual
    with ops.use_impl("triton"):
        y, got_h = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(got_h, h)
    high = reference.rms_norm(h.double(), weight.double(), 1e-5)
    assert_parity(case.name, y, reference.rms_norm(h, weight, 1e-5), high)


@HALF
@at_size(GATED_CASES)
def test_activations_at_the_real_size(case, dtype):
    for fn in ("swiglu", "geglu"):
        x = case.gated_input("cuda", dtype)
        parity(case.name, fn, (x,), (x.double(),))


@HALF
@at_size(ROTARY_CASES)
def test_rotary_at_the_real_size(case, dtype):
    args = case.inputs("cuda", dtype)
    parity(case.name, "rotary", args, double(args))


def small_model(dtype: torch.dtype) -> NVEmbedModel:
    """The real widths per head on few layers, weights drawn like a fresh model's."""
    text = BackboneConfig(
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    latent = LatentConfig(cross_dim_head=1024, hidden_dim=1024, latent_dim=1024)
    torch.manual_seed(0)
    model = NVEmbedModel(NVEmbedConfig(text, latent)).requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.normal_(0, 0.02)
    return model.to("cuda", dtype)


@HALF
def test_a_model_in_16_bits_agrees_with_fp32(dtype):
    lengths = (1, 2, 3, 40, 128, 129, 700)
    ids = [np.random.default_rng(n).integers(3, 32000, n) for n in lengths]
    batch = PackedBatch.from_ids(ids, [0] * len(ids), "cuda")
    model = small_model(dtype)
    with ops.use_impl("triton"):
        got = model(batch)
    with ops.use_impl("torch"):
        wanted = model.float()(batch)
    cosine = torch.nn.functional.cosine_similarity(got, wanted)
    assert cosine.min() > (0.9999 if dtype == torch.float16 else 0.999), cosine


@HALF
def test_one_text_one_vector(dtype):
    model = small_model(dtype)
    ids = [np.random.default_rng(n).integers(3, 32000, n) for n in (1, 2, 3, 40, 128, 129, 700)]
    together = model(PackedBatch.from_ids(ids, [0] * len(ids), "cuda"))
    alone = torch.cat([model(PackedBatch.from_ids([i], [0], "cuda")) for i in ids])
    cosine = torch.nn.functional.cosine_similarity(together, alone)
    assert cosine.min() > 0.99999, cosine


@pytest.fixture
def byte_directory(tmp_path) -> Path:
    """The golden model with a tokenizer of bytes, so that nothing has to be downloaded."""
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(Path(__file__).parent / "golden" / "tiny_a" / name, tmp_path / name)
    vocab = {"</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return tmp_path


def test_encode_on_a_gpu_equals_the_cpu(byte_directory):
    cpu = NVEmbed.from_pretrained(byte_directory, device="cpu")
    gpu = NVEmbed.from_pretrained(byte_directory, device="cuda", dtype="float32")
    wanted = cpu.encode(TEXTS)
    got = gpu.encode(TEXTS)
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-5)
    on_host = gpu.encode(TEXTS, output="numpy", max_batch_tokens=64)
    np.testing.assert_allclose(on_host, wanted.numpy(), rtol=1e-4, atol=1e-5)
    assert NVEmbed.from_pretrained(byte_directory, device="cuda").dtype == torch.float16
