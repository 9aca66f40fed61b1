import copy
import json
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nvembed_fast import NVEmbed, encoder, query_instruction

TINY = Path(__file__).parent / "golden" / "tiny_a"
CASES = json.loads((TINY / "cases.json").read_text())
EXPECTED = load_file(TINY / "expected.safetensors")
TEXTS = ["a", "b c", "", "short", *CASES[1]["texts"], *CASES[2]["texts"], "word " * 200, "one two three"]


@pytest.fixture(scope="module")
def model(tiny_directory):
    return NVEmbed.from_pretrained(tiny_directory, device="cpu")


def relative(got, wanted) -> float:
    got, wanted = torch.as_tensor(got), torch.as_tensor(wanted)
    assert got.shape == wanted.shape
    return ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()


@pytest.mark.parametrize("case", range(len(CASES)), ids=[c["name"] for c in CASES])
def test_encode_equals_the_original(model, case):
    c = CASES[case]
    got = model.encode(c["texts"], instruction=c["instruction"], max_length=c["max_length"])
    assert got.dtype == torch.float32 and got.device == model.device
    assert relative(got, EXPECTED[f"case{case}.embeddings"]) < 5e-6


def test_one_text_one_vector_alone_in_any_batch_in_any_order(model, all_cores):
    together = model.encode(TEXTS)
    for budget in (1, 7, 64):
        assert relative(model.encode(TEXTS, max_batch_tokens=budget), together) < 1e-6
    assert relative(torch.stack([model.encode(t) for t in TEXTS]), together) < 1e-6
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert relative(model.encode([TEXTS[i] for i in order]), together[order]) < 1e-6


def test_windows_keep_the_callers_order(model, monkeypatch):
    together = model.encode(TEXTS)
    monkeypatch.setattr(encoder, "_FIRST_WINDOW", 2)
    monkeypatch.setattr(encoder, "_WINDOW", 3)
    assert relative(model.encode(TEXTS), together) < 1e-6


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_every_text_is_in_one_window(model, monkeypatch, count):
    monkeypatch.setattr(encoder, "_FIRST_WINDOW", 2)
    monkeypatch.setattr(encoder, "_WINDOW", 3)
    windows = list(model._tokenized_windows([f"t{i}" for i in range(count)], "", 16))
    assert [first for first, _ in windows] == [f for f in (0, 2, 5) if f < count]
    assert sum(len(w.ids) for _, w in windows) == count


def test_forms_of_input_and_output(model):
    both = model.encode(["a b", "c"])
    assert both.shape == (2, 64)
    assert torch.allclose(both.norm(dim=1), torch.ones(2))
    assert relative(model.encode("a b"), both[0]) < 1e-6
    assert model.encode([]).shape == (0, 64)
    assert model.encode([], output="numpy").shape == (0, 64)
    assert relative(model.encode(t for t in ["a b", "c"]), both) < 1e-6
    assert relative(model.encode(np.array(["a b", "c"])), both) < 1e-6
    assert relative(model.encode(["a b", "c"], max_length=np.int64(9)), both) < 1e-6
    for array in (model.encode(["a b", "c"], output="numpy"), model.encode(["a b", "c"], return_numpy=True)):
        assert isinstance(array, np.ndarray) and array.dtype == np.float32
        assert relative(array, both) < 1e-6


def test_calls_written_for_the_original_run_unchanged(model):
    instruction = query_instruction("find it")
    wanted = model.encode(["a b", "c"], instruction, 64)
    params = {"prompts": ["a b", "c"], "instruction": instruction, "max_length": 64, "num_workers": 32}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative(model.encode(**params), wanted) < 1e-6  # HippoRAG
        got = model._do_encode(
            ["a b", "c"], batch_size=2, instruction=instruction, max_length=64, num_workers=32
        )
        assert relative(got, wanted) < 1e-6
        assert isinstance(model._do_encode(["a b"], return_numpy=True), np.ndarray)
    assert relative(model.encode_query(["a b", "c"], task="find it", max_length=64), wanted) < 1e-6
    assert relative(model.encode_document(["a b"]), model.encode(["a b"])) < 1e-6


def test_loading_calls_written_for_the_original_run_unchanged(tiny_directory):
    model = NVEmbed.from_pretrained(
        str(tiny_directory), trust_remote_code=True, torch_dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    assert (model.dtype, model.device.type, model.training) == (torch.bfloat16, "cpu", False)
    assert model.float().dtype == torch.float32
    assert model.config.hidden_size == 64


def test_an_unknown_keyword_warns_once_and_names_what_is_known(model):
    with pytest.warns(
        UserWarning, match=r"encode\(\) ignores 'pooling'; it knows prompts, instruction, max_length"
    ):
        model.encode(["a"], pooling="cls")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(["a"], pooling="cls")


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_takes_padded_batches(model, side):
    texts = ["one two three four", "five"]
    tokenizer = model.tokenizer
    tokenizer.padding_side = side
    batch = tokenizer([t + tokenizer.eos_token for t in texts], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    got = model(ids, mask, pool_mask=mask)["sentence_embeddings"]
    assert relative(got, model.encode(texts)) < 1e-6
    (states,) = model(ids, mask, return_dict=False)
    assert states.shape == (*ids.shape, 64)
    assert (states[mask == 0] == 0).all() and (states[mask == 1] != 0).any()
    pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    assert relative(torch.nn.functional.normalize(pooled, dim=-1), got) < 1e-6


def test_forward_names_the_row_that_pools_nothing(model):
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3)
    pool = torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match="row 1 of the batch has no token"):
        model(ids, mask, pool_mask=pool)


def test_out_of_memory_halves_the_batch_and_loses_nothing(model, monkeypatch):
    wanted = model.encode(TEXTS)
    sizes, run = [], model.model.forward

    def small_device(batch):
        sizes.append(batch.layout.num_tokens)
        if batch.layout.num_tokens > 260:
            raise torch.OutOfMemoryError("small")
        return run(batch)

    monkeypatch.setattr(model.model, "forward", small_device)
    assert relative(model.encode(TEXTS), wanted) < 1e-6
    assert max(sizes) > 260 and sizes.count(max(sizes)) == 1


def test_a_budget_once_halved_stays_halved_in_later_windows(model, monkeypatch):
    failures, run = [], model.model.forward

    def small_device(batch):
        if batch.layout.num_tokens > 20:
            failures.append(batch.layout.num_tokens)
            raise torch.OutOfMemoryError("small")
        return run(batch)

    texts = ["some words here"] * 30
    wanted = model.encode(texts)
    monkeypatch.setattr(encoder, "_FIRST_WINDOW", 10)
    monkeypatch.setattr(encoder, "_WINDOW", 10)
    monkeypatch.setattr(model.model, "forward", small_device)
    assert relative(model.encode(texts, max_batch_tokens=40), wanted) < 1e-6
    assert len(failures) == 1


def test_windows_end_before_their_texts_fill_the_memory(monkeypatch):
    monkeypatch.setattr(encoder, "_WINDOW_CHARACTERS", 100)
    texts = ["x" * n for n in (90, 20, 30, 200, 5, 60, 60)]
    windows = [(w.start, w.stop) for w in encoder._windows(texts, most_characters=80)]
    assert windows == [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7)]  # 80+20, 30, 80+5, 60, 60
    assert list(encoder._windows([], 80)) == []


def test_forward_names_an_id_that_is_none(model):
    mask = torch.ones(1, 2)
    for ids, message in (
        (torch.tensor([[1, 32000]]), "0 to 31999, got 32000"),
        (torch.ones(1, 2), "integers"),
    ):
        with pytest.raises(ValueError, match=f"input_ids must .*{message}"):
            model(ids, mask, mask)


def test_copies_are_their_own(model):
    wanted = model.encode(TEXTS)
    copied = copy.deepcopy(model)
    assert not copied.model.head._cache
    copied.model.head.to_out.weight.mul_(0.5)
    assert relative(model.encode(TEXTS), wanted) == 0
    assert relative(copied.encode(TEXTS), wanted) > 1e-3


def test_out_of_memory_of_a_single_text_says_what_to_do(model, monkeypatch):
    def no_device(batch):
        raise torch.OutOfMemoryError("tiny")

    monkeypatch.setattr(model.model, "forward", no_device)
    with pytest.raises(torch.OutOfMemoryError, match="a single text of 3 tokens .* lower max_length"):
        model.encode(["a"])


def test_an_interrupt_leaves_the_model_usable(model, monkeypatch):
    wanted = model.encode(TEXTS)
    with monkeypatch.context() as patch:

        def interrupted(batch):
            raise KeyboardInterrupt

        patch.setattr(model.model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.encode(TEXTS)
    assert relative(model.encode(TEXTS), wanted) < 1e-6
    time.sleep(0.2)
    assert not [t for t in threading.enumerate() if t.name.startswith("nvembed-tokenize")]


def test_save_pretrained_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path / "copy")
    again = NVEmbed.from_pretrained(tmp_path / "copy", device="cpu")
    assert torch.equal(again.encode(TEXTS), model.encode(TEXTS))


def test_weights_ask_for_no_gradient_and_forward_can(model):
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.encode(["a"]).requires_grad


def test_the_callers_modes_change_nothing(tiny_directory):
    model = NVEmbed.from_pretrained(tiny_directory, device="cpu")
    wanted = NVEmbed.from_pretrained(tiny_directory, device="cpu").encode(TEXTS)
    with torch.inference_mode():
        assert torch.equal(model.encode(TEXTS), wanted)  # builds the caches
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode(TEXTS), wanted)
    # what was built under inference_mode serves a backward pass
    tables = model.model.embedding_model.rotary_tables(1)
    assert not tables.cos.is_inference() and not tables.sin.is_inference()
    model.model.embedding_model.requires_grad_(True)
    ids = torch.tensor([[1, 5, 6, 2]])
    model(ids, torch.ones_like(ids), torch.ones_like(ids))["sentence_embeddings"].sum().backward()
    assert model.model.embedding_model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "x" * 10_000_000, "a</s>b", "\ufeff", "\u202e"])
def test_odd_texts_have_vectors(model, text):
    vector = model.encode(text, max_length=64)
    assert torch.isfinite(vector).all() and abs(vector.norm() - 1) < 1e-5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"prompts": ["a", None]}, TypeError, r"prompts\[1\] must be a string, got NoneType"),
        ({"prompts": ["a", "b", 3]}, TypeError, r"prompts\[2\] must be a string, got int"),
        ({"prompts": ["a", "\udc80"]}, ValueError, r"prompts\[1\] has a lone surrogate"),
        ({"prompts": ["a"], "max_length": 2}, ValueError, "max_length must be at least 3, got 2"),
        ({"prompts": None}, TypeError, "prompts must be a string or texts, got NoneType"),
        ({"prompts": 5}, TypeError, "prompts must be a string or texts, got int"),
        ({"prompts": b"ab"}, TypeError, "prompts must be a string or texts, got bytes"),
        ({"prompts": ["a"], "max_length": None}, TypeError, "max_length must be an int, got NoneType"),
        ({"prompts": ["a"], "max_length": "512"}, TypeError, "max_length must be an int, got str: '512'"),
        (
            {"prompts": ["a"], "max_batch_tokens": 5.5},
            TypeError,
            "max_batch_tokens must be an int, got float",
        ),
        ({"prompts": ["a"], "output": "list"}, ValueError, "output must be 'torch' or 'numpy', got 'list'"),
        ({"prompts": ["a"], "max_batch_tokens": 0}, ValueError, "max_batch_tokens must be at least 1"),
        ({"prompts": ["a"], "instruction": None}, TypeError, "instruction must be a string"),
        (
            {"prompts": ["a", "b"], "instruction": query_instruction("a long task"), "max_length": 6},
            ValueError,
            r"nothing of prompts\[0\] is left to pool: the instruction takes all 6 tokens",
        ),
    ],
)
def test_bad_calls_name_what_is_wrong(model, call, error, message):
    with pytest.raises(error, match=message):
        model.encode(**call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"impl": "cuda"}, "impl must be one of 'auto', 'triton', 'torch', got 'cuda'"),
        ({"latents": "fast"}, "latents must be one of 'auto', 'direct', 'absorbed', got 'fast'"),
        ({"device": "cuda:77"}, "device 'cuda:77' is not there"),
        ({"device": "nowhere"}, "device 'nowhere' is not a device"),
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
    monkeypatch.setattr(encoder.checkpoint, "load_model", None)  # never called
    with pytest.raises(ValueError, match="impl='triton' cannot run here: tensors are on cpu, not on a GPU"):
        NVEmbed.from_pretrained(tiny_directory, device="cpu", impl="triton")


def test_a_missing_tokenizer_is_named(tiny_directory, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_directory / name)
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing"):
        NVEmbed.from_pretrained(tmp_path)
