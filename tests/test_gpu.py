"""What only a GPU can show of a whole model. Each kernel at its real sizes is in its own test file."""

import copy
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from test_encoder import TEXTS
from tokenizers import Tokenizer, models

from nvembed_fast import NVEmbed, ops
from nvembed_fast.graphs import SingleTextGraphs
from nvembed_fast.packing import PackedBatch
from tools.gpu_checks import small_model

pytestmark = pytest.mark.gpu

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


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
    """To rounding: cuBLAS sums a product in an order that depends on the number of rows.

    So in bf16 the two vectors are two roundings of one, and each may be as far from fp32 as PyTorch's own.
    """
    model = small_model(dtype)
    ids = [np.random.default_rng(n).integers(3, 32000, n) for n in (1, 2, 3, 40, 128, 129, 700)]
    batch = PackedBatch.from_ids(ids, [0] * len(ids), "cuda")
    together, alone = model(batch), torch.cat([model(PackedBatch.from_ids([i], [0], "cuda")) for i in ids])
    if dtype == torch.float16:
        cosine = torch.nn.functional.cosine_similarity(together, alone)
        assert cosine.min() > 0.99999, cosine
        return
    with ops.use_impl("torch"):
        low, high = model(batch), copy.deepcopy(model).float()(batch)
    together, alone, low, high = (
        torch.nn.functional.normalize(vectors.double()) for vectors in (together, alone, low, high)
    )
    distance, error = (together - alone).norm(dim=1), (low - high).norm(dim=1)
    assert (error > 0).all(), "the dtype rounds nothing, so this test would prove nothing"
    assert (distance <= 2 * error).all(), (distance, error)


@HALF
def test_cuda_graphs_give_the_vectors_of_the_model(dtype):
    model = small_model(dtype)
    graphs = SingleTextGraphs(model)
    for length in (1, 16, 17, 50, 64, 100, 200, 256, 50):
        ids = np.random.default_rng(length).integers(3, 32000, length)
        wanted = model(PackedBatch.from_ids([ids], [length // 3], "cuda"))
        cosine = torch.nn.functional.cosine_similarity(graphs(ids, length // 3), wanted)
        assert cosine.min() > 0.99999, (length, cosine)
    assert graphs.buckets == [16, 32, 64, 128, 256]


def test_cuda_graphs_of_two_threads_with_streams_of_their_own():
    model = small_model(torch.float16)
    graphs = SingleTextGraphs(model)
    texts = [np.random.default_rng(n).integers(3, 32000, n) for n in (9, 40, 10, 41)]
    wanted = [model(PackedBatch.from_ids([ids], [0], "cuda")) for ids in texts]
    torch.cuda.synchronize()

    def lowest_cosine(first: int) -> float:
        with torch.cuda.stream(torch.cuda.Stream()):
            cosines = [
                torch.nn.functional.cosine_similarity(graphs(texts[i], 0), wanted[i])
                for i in [first, first + 1] * 500
            ]
            return torch.cat(cosines).min().item()

    with ThreadPoolExecutor(2) as pool:
        assert min(pool.map(lowest_cosine, (0, 2))) > 0.99999


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_cuda_graphs_are_captured_anew(mode):
    """Behind `forget` no graph is left, and PyTorch captures into no pool that has lost all of its own."""
    model = small_model(torch.float16)
    graphs = SingleTextGraphs(model)
    for length in (9, 10, 40):
        ids = np.random.default_rng(length).integers(3, 32000, length)
        wanted = model(PackedBatch.from_ids([ids], [0], "cuda"))
        with mode():
            got = graphs(ids, 0)
        assert torch.nn.functional.cosine_similarity(got, wanted).min() > 0.99999
        assert torch.nn.functional.cosine_similarity(graphs(ids, 0), wanted).min() > 0.99999
        graphs.forget()


@torch.no_grad()
def test_a_cuda_graph_of_torch_compile_reads_the_lengths_of_each_batch():
    model = small_model(torch.float16)
    compiled = torch.compile(model, mode="reduce-overhead", dynamic=True)
    ids = [np.random.default_rng(n).integers(3, 32000, n) for n in (150, 20)]
    # the first calls of a shape warm up and record
    for number in range(6):
        batch = PackedBatch.from_ids(ids[:: -1 if number % 2 else 1], [0, 0], "cuda")
        cosine = torch.nn.functional.cosine_similarity(compiled(batch), model(batch))
        assert cosine.min() > 0.9999, (number, cosine)


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
