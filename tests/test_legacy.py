"""Calls written for the original or for other libraries."""

import warnings

import numpy as np
import pytest
import torch
from test_encoder import relative

from nvembed_fast import NVEmbed, legacy, query_instruction


@pytest.fixture(scope="module")
def model(tiny_directory):
    return NVEmbed.from_pretrained(tiny_directory, device="cpu")


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


@pytest.mark.parametrize(
    ("device", "dtype", "old", "wanted"),
    [
        (None, None, {}, (None, None)),
        ("cpu", "fp16", {"device_map": "cuda", "torch_dtype": "bfloat16"}, ("cpu", "fp16")),
        (None, None, {"device_map": 1, "torch_dtype": torch.float16}, (1, torch.float16)),
        ("auto", "auto", {}, (None, None)),
        (None, None, {"device_map": "balanced", "torch_dtype": "auto"}, (None, None)),
        ({"": "cuda:1"}, None, {}, ("cuda:1", None)),
    ],
)
def test_old_names_give_way_to_ours(device, dtype, old, wanted):
    assert legacy.loading_place(NVEmbed.from_pretrained, device, dtype, old) == wanted


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


def test_forward_names_an_id_that_is_none(model):
    mask = torch.ones(1, 2)
    for ids, message in (
        (torch.tensor([[1, 32000]]), "0 to 31999, got 32000"),
        (torch.ones(1, 2), "integers"),
    ):
        with pytest.raises(ValueError, match=f"input_ids must .*{message}"):
            model(ids, mask, mask)
