"""Calls written for the original or for other libraries."""

import copy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_encoder import relative

from nvembed_fast import NVEmbed, legacy, query_instruction
from nvembed_fast.stream import TextsCut


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


def test_an_attention_that_transformers_has_changes_nothing():
    for name in (
        None,
        "eager",
        "sdpa",
        "flash_attention_2",
        "paged|eager",
        "nvembed_fast",
        "kernels-community/flash-attn2",
        {"": "sdpa", "text_config": "eager"},
    ):
        keywords = {"attn_implementation": name}
        assert legacy.loading_place(NVEmbed.from_pretrained, None, None, keywords) == (None, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("triton", "attn_implementation='triton' is no attention of transformers: pass impl='triton'$"),
        ({"text_config": "torch"}, "attn_implementation='torch' .*: pass impl='torch'$"),
        ("spda", "attn_implementation='spda' .*: leave it out, or pass impl='auto', 'triton', 'library' or"),
        (2, "attn_implementation=2 is no attention of transformers: leave it out"),
    ],
)
def test_another_attention_is_not_ignored(name, message, tiny_directory):
    with pytest.raises(ValueError, match=message):
        NVEmbed.from_pretrained(tiny_directory, attn_implementation=name)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"pooling": "cls"},
            r"encode\(\) does not know the keyword 'pooling': it knows prompts, instruction",
        ),
        ({"pooling": None}, "does not know the keyword 'pooling'"),
        ({"instrction": "x"}, "'instrction': use instruction"),
        ({"max_seq_length": 9}, "'max_seq_length': use max_length"),
        ({"prompt_name": "query"}, r"no named prompts, got prompt_name='query': .*query_instruction\(task\)"),
        ({"task_name": "NFCorpus"}, "no named prompts, got task_name='NFCorpus'"),
        ({"prompt_type": SimpleNamespace(value="query")}, "no named prompts, got prompt_type='query'"),
        ({"prompt": "a", "instruction": "b"}, "both instruction and prompt"),
        ({"normalize_embeddings": False}, "normalize_embeddings=False, but the vectors .* have unit norm"),
        ({"output_value": "token_embeddings"}, "one vector a text, got output_value='token_embeddings'"),
        ({"pool": object()}, "one process for each GPU"),
        ({"device": "cuda"}, "runs on the model's device cpu, got device='cuda'"),
        ({"device": "nope"}, "runs on the model's device cpu, got device='nope'"),
        ({"device": 3}, "runs on the model's device cpu, got device=3"),
        ({"output": "numpy", "convert_to_tensor": True}, "pass output alone"),
    ],
)
def test_a_keyword_that_asks_for_another_result_is_refused(model, keywords, message):
    with pytest.raises(TypeError, match=message):
        model.encode(["a"], **keywords)


@pytest.mark.parametrize("path", [b"tiny", 3, ["tiny"]])
def test_what_is_no_path_is_named(path):
    with pytest.raises(TypeError, match=f"path_or_id must be a str .*, got {type(path).__name__}"):
        NVEmbed.from_pretrained(path)


def test_the_old_name_of_the_path(tiny_directory):
    """HippoRAG's call."""
    params = {"pretrained_model_name_or_path": str(tiny_directory), "trust_remote_code": True}
    assert NVEmbed.from_pretrained(**params, device_map="cpu").config.hidden_size == 64
    for positional, keywords, message in (
        ((), {}, "needs path_or_id once: .*, got none"),
        (("a",), {"pretrained_model_name_or_path": "b"}, "needs path_or_id once: .*, got 'a' and 'b'"),
        ((), {"model_name_or_path": "a"}, "'model_name_or_path': use path_or_id"),
    ):
        with pytest.raises(TypeError, match=message):
            NVEmbed.from_pretrained(*positional, **keywords)


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("load_in_8bit", "quantised weights are not supported: dtype='float16'"),
        ("load_in_4bit", "quantised weights"),
        ("quantization_config", "quantised weights"),
        ("max_memory", "all weights lie on one device: pass device"),
        ("offload_folder", "one device"),
    ],
)
def test_quantised_and_offloaded_weights_are_refused_with_the_way_out(keyword, message):
    with pytest.raises(TypeError, match=rf"does not know the keyword '{keyword}': .*{message}"):
        NVEmbed.from_pretrained("nowhere", **{keyword: {"": 1}})
    for nothing in (False, None):
        with pytest.raises(FileNotFoundError, match="no directory 'nowhere'"):
            NVEmbed.from_pretrained("nowhere", **{keyword: nothing})


def test_offloaded_weights_are_told(tiny_directory):
    model = NVEmbed.from_pretrained(tiny_directory, device="cpu")
    # torch multiplies by such a weight without an error, and reads memory that nobody wrote
    model.model.embedding_model.layers[1].mlp.down_proj.to("meta")
    for call in (lambda: model.encode(["a"]), lambda: model(torch.ones(1, 2, dtype=torch.long))):
        with pytest.raises(ValueError, match=r"a weight is offloaded \(device 'meta'\).*: load them"):
            call()
    model.model.to("meta")  # as accelerate's cpu_offload does
    for call in (lambda: model.encode(["a"]), lambda: model(torch.ones(1, 2, dtype=torch.long).to("meta"))):
        with pytest.raises(ValueError, match="weights are offloaded .*: load them to one device"):
            call()


@pytest.mark.parametrize("device_ids", [[], [0], [0, 1]])
def test_data_parallel_of_the_model_card_runs_on_one_device(tiny_directory, device_ids):
    """Without a GPU DataParallel has no device ids, so they are set by hand."""
    model = NVEmbed.from_pretrained(tiny_directory, device="cpu")
    wanted = model.encode(["a b", "c"])
    for key, module in model._modules.items():
        model._modules[key] = torch.nn.DataParallel(module)
        model._modules[key].device_ids = device_ids
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        got = model._do_encode(["a b", "c"], batch_size=1)
    assert torch.equal(got, wanted)
    messages = [str(warning.message) for warning in told]
    assert len(messages) == (len(device_ids) > 1)
    assert all("one process per GPU" in message for message in messages)
    assert not any("module." in name for name in model.state_dict())
    # a call of DataParallel(model) on several GPUs begins with it
    with pytest.raises(ValueError, match="start one process per GPU"):
        model._replicate_for_data_parallel()


def test_the_originals_modules_are_views(tiny_directory):
    model = NVEmbed.from_pretrained(tiny_directory, device="cpu")
    before = model.encode(["a b"])
    assert model.embedding_model is model.model.embedding_model
    assert model.latent_attention_model is model.model.head
    other = torch.nn.DataParallel(copy.deepcopy(model.embedding_model))
    other.module.norm.weight[0] = 9
    model.embedding_model = other
    model.latent_attention_model = copy.deepcopy(model.latent_attention_model)
    assert list(model._modules) == ["model"] and model.model.embedding_model is other.module
    assert (model.encode(["a b"]) - before).abs().max() > 1e-3


def test_attributes_that_other_libraries_know_count_or_are_refused(model):
    text = "one two three four five six"
    try:
        model.max_seq_length = 4
        with pytest.warns(TextsCut, match="cut at max_length=4"):
            cut = [model.encode(text), model._do_encode([text])[0], model.encode_document(text)]
    finally:
        model.max_seq_length = 4096
    with pytest.warns(TextsCut):
        wanted = model.encode(text, max_length=4)
    assert all(torch.equal(vector, wanted) for vector in cut)
    for side in ("left", "right"):
        model.padding_side = side
        assert model.tokenizer.padding_side == side
    for name in ("prompts", "default_prompt_name", "truncate_dim", "is_mask_instruction", "tokenizer"):
        with pytest.raises(AttributeError, match=f"setting '{name}' would change nothing here: "):
            setattr(model, name, None)


def test_a_head_told_not_to_normalise_does_not(tiny_directory):
    model = NVEmbed.from_pretrained(tiny_directory, device="cpu")
    model.latent_attention_model.output_normalize = False
    assert abs(model.encode("a b").norm() - 1) > 1e-3
    with pytest.raises(TypeError, match="norm=True, but the vectors of this model are not normalised"):
        model.encode("a b", norm=True)


def test_a_caller_that_adds_the_end_mark_is_told(model):
    """sentence-transformers adds none, so the model card's code for it does."""
    with pytest.warns(UserWarning, match=r"prompts\[1\] ends with '</s>', and encode adds it"):
        model.encode(["a b", "c</s>"])


@pytest.mark.parametrize("keyword", ["load_in_8bit", "quantization_config", "subfolder"])
def test_loading_refuses_a_keyword_that_it_does_not_know(tiny_directory, keyword):
    with pytest.raises(TypeError, match=rf"from_pretrained\(\) does not know the keyword '{keyword}'"):
        NVEmbed.from_pretrained(tiny_directory, **{keyword: True})


def test_a_prompt_is_an_instruction(model):
    instruction = query_instruction("find it")
    wanted = model.encode(["a b"], instruction)
    assert (wanted - model.encode(["a b"])).abs().max() > 1e-3, "this test would prove nothing"
    for keywords in ({}, {"instruction": instruction}, {"prompt_name": None}):
        assert torch.equal(model.encode(["a b"], prompt=instruction, **keywords), wanted)
    for name in ("document", "passage", "corpus"):
        assert torch.equal(model.encode(["a b"], prompt_name=name), model.encode(["a b"]))


@pytest.mark.parametrize(
    ("keywords", "kind"),
    [
        ({"convert_to_numpy": True}, np.ndarray),
        ({"convert_to_tensor": True}, torch.Tensor),
        ({"convert_to_tensor": True, "convert_to_numpy": True}, torch.Tensor),
        ({"convert_to_tensor": False}, np.ndarray),
        ({"convert_to_tensor": False, "convert_to_numpy": False}, torch.Tensor),
        (
            {"normalize_embeddings": True, "batch_size": 2, "device": "cpu", "precision": "float32"},
            torch.Tensor,
        ),
    ],
)
def test_keywords_of_sentence_transformers_keep_their_meaning(model, keywords, kind):
    got = model.encode(["a b"], **keywords)
    assert isinstance(got, kind)
    assert torch.equal(torch.as_tensor(got), model.encode(["a b"]))


def test_a_progress_bar_by_its_other_name(model, capsys):
    model.encode(["a"], show_progress_bar=True)
    assert "1/1 texts" in capsys.readouterr().err
    model.encode(["a"], show_progress_bar=False)
    assert capsys.readouterr().err == ""


def test_a_model_without_normalisation_is_not_taken_for_one(model):
    call = legacy.Encoding("", "torch", None)
    place = {"device": model.device, "normalized": False}
    assert legacy.encoding_call(model.encode, call, {"normalize_embeddings": False}, **place) == call
    with pytest.raises(TypeError, match="are not normalised"):
        legacy.encoding_call(model.encode, call, {"normalize_embeddings": True}, **place)


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


IDS, MASK = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 2]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("ids", "mask", "pool", "error", "message"),
    [
        (IDS.tolist(), MASK, MASK, TypeError, "input_ids must be a torch.Tensor .*, got list"),
        (IDS.numpy(), MASK, MASK, TypeError, "input_ids must be a torch.Tensor .*, got ndarray"),
        (None, MASK, MASK, TypeError, "input_ids must be a torch.Tensor .*, got NoneType"),
        ({"input_ids": IDS}, None, None, TypeError, r"input_ids .*, got dict: unpack it, model\(\*\*batch\)"),
        (IDS, MASK.numpy(), MASK, TypeError, "attention_mask must be a torch.Tensor .*, got ndarray"),
        (IDS, MASK, MASK.tolist(), TypeError, "pool_mask must be a torch.Tensor .*, got list"),
        (IDS.float(), MASK, MASK, ValueError, "input_ids must be signed integers, got torch.float32"),
        (IDS.to(torch.uint16), MASK, MASK, ValueError, r"got torch.uint16: pass input_ids.long\(\)"),
        (IDS.to(torch.uint64), MASK, MASK, ValueError, "input_ids must be signed integers, got torch.uint64"),
        (IDS.to_sparse(), MASK, MASK, ValueError, "input_ids must be a dense tensor, got torch.sparse_coo"),
        (IDS[0], None, None, ValueError, r"input_ids must be \[B, S\], got \(4,\)"),
        (IDS.where(IDS != 5, 32000), MASK, MASK, ValueError, "input_ids must .* 0 to 31999, got 32000"),
        (IDS.where(IDS != 5, -1), MASK, MASK, ValueError, "input_ids must .* 0 to 31999, got -1"),
        (IDS.to("meta"), None, None, ValueError, "input_ids must be on cpu like the model, got meta"),
        (IDS, MASK.to("meta"), MASK, ValueError, "attention_mask must be on cpu like input_ids, got meta"),
        (IDS, MASK[:1], MASK, ValueError, r"attention_mask must be \(2, 4\) like input_ids, got \(1, 4\)"),
        (IDS, MASK[:, None], MASK, ValueError, r"attention_mask must be \(2, 4\) .*, got \(2, 1, 4\)"),
        (IDS, (MASK - 1) * 1e9, MASK, ValueError, r"attention_mask must hold 0 and 1 .*additive .*mask == 0"),
        (IDS, MASK / 0, MASK, ValueError, "attention_mask must hold 0 and 1 alone, got inf"),
        (IDS, MASK, MASK * float("nan"), ValueError, "pool_mask must hold 0 and 1 alone, got nan"),
        (IDS, MASK, MASK / 2, ValueError, "pool_mask must hold 0 and 1 alone, got 0.5.* no weights"),
        # their product is 256, which wraps to zero
        (IDS, *2 * [16 * MASK.to(torch.uint8)], ValueError, "attention_mask must hold 0 and 1 alone, got 16"),
    ],
)
def test_forward_names_an_argument_that_it_cannot_take(model, ids, mask, pool, error, message):
    with pytest.raises(error, match=message):
        model(ids, mask, pool)


def test_forward_takes_zeros_and_ones_of_every_dtype_and_ids_of_most(model):
    wanted = model(IDS, MASK, MASK)["sentence_embeddings"]
    for dtype in (torch.bool, torch.uint8, torch.uint16, torch.int32, torch.float16, torch.float64):
        assert torch.equal(model(IDS, MASK.to(dtype), MASK.to(dtype))["sentence_embeddings"], wanted)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(model(IDS.to(dtype), MASK, MASK)["sentence_embeddings"], wanted)
    # no pad's id is looked at
    assert torch.equal(model(IDS.where(MASK == 1, -100), MASK, MASK)["sentence_embeddings"], wanted)


def test_forward_takes_what_the_tokenizer_gives(model):
    batch = model.tokenizer(["a b", "c"], padding=True, return_tensors="pt")
    assert model(**batch)["sentence_embeddings"].shape == (*batch["input_ids"].shape, 64)
