"""The Auto classes of transformers give our model, and its own encoders take our attention."""

import copy
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    pipeline,
)

import nvembed_fast
from nvembed_fast import NVEmbed, NVEmbedConfig, query_instruction
from nvembed_fast.integrations.transformers import NVEmbedForTransformers

TEXTS = ["one", "two words", "a third text, which is the longest of them", "", "  spaces  in front"]
TASK = "Given a question, retrieve passages that answer the question"
REMOTE = "raise SystemExit('code from a checkpoint ran')\n"


@pytest.fixture(autouse=True)
def registered():
    nvembed_fast.register()


@pytest.fixture(scope="module")
def encoder(tiny_directory) -> NVEmbed:
    return NVEmbed.from_pretrained(tiny_directory)


@pytest.fixture(scope="module")
def model(tiny_directory):
    nvembed_fast.register()
    return AutoModel.from_pretrained(tiny_directory)


@pytest.fixture
def with_auto_map(tiny_directory, tmp_path):
    """The tiny model as the hub has the published ones: code beside it, and the tokenizer's class named."""
    directory = tmp_path / "hub"
    shutil.copytree(tiny_directory, directory)
    for name in ("configuration_nvembed", "modeling_nvembed"):
        (directory / f"{name}.py").write_text(REMOTE)
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_nvembed.NVEmbedConfig",
        "AutoModel": "modeling_nvembed.NVEmbedModel",
    }
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(
        json.dumps({**tokenizer, "tokenizer_class": "LlamaTokenizer"})
    )
    return directory


def padded(encoder: NVEmbed, texts: list[str], instruction: str = "", side: str = "right"):
    """(input_ids, attention_mask, pool_mask) of texts as `encode` reads them."""
    tokens = encoder.text_tokenizer(texts, instruction, 512)
    longest = max(tokens.lengths())
    ids, real, pooled = (torch.zeros(len(texts), longest, dtype=torch.long) for _ in range(3))
    for row, (found, first) in enumerate(zip(tokens.ids, tokens.first_pooled, strict=True)):
        start = longest - len(found) if side == "left" else 0
        ids[row, start : start + len(found)] = torch.from_numpy(found)
        real[row, start : start + len(found)] = 1
        pooled[row, start + first : start + len(found)] = 1
    return ids, real, pooled


@pytest.mark.parametrize("trust", [None, True])
def test_an_auto_map_never_runs(trust, with_auto_map, encoder):
    found = AutoModel.from_pretrained(with_auto_map, trust_remote_code=trust, dtype=torch.float32)
    assert type(found) is NVEmbedForTransformers
    assert type(AutoConfig.from_pretrained(with_auto_map, trust_remote_code=trust)) is type(found.config)
    torch.testing.assert_close(found.encode(TEXTS), encoder.encode(TEXTS), rtol=0, atol=0)
    assert not any("transformers_modules" in name for name in sys.modules)


def test_without_register_the_code_would_run(with_auto_map):
    """Otherwise the test above would prove nothing."""
    load = f"AutoModel.from_pretrained({str(with_auto_map)!r}, trust_remote_code=True)"
    code = f"from transformers import AutoModel; {load}"

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "code from a checkpoint ran" in run.stderr


def test_automodel_encodes_as_ours(model, encoder):
    torch.testing.assert_close(model.encode(TEXTS), encoder.encode(TEXTS), rtol=0, atol=0)
    torch.testing.assert_close(
        model.encode_query(TEXTS, TASK), encoder.encode_query(TEXTS, TASK), rtol=0, atol=0
    )
    instruction = query_instruction(TASK)
    np.testing.assert_array_equal(
        model._do_encode(TEXTS, 2, instruction, 512, 32, True),
        encoder.encode(TEXTS, instruction, 512).numpy(),
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_takes_padding(side, model, encoder):
    ids, real, pooled = padded(encoder, TEXTS, query_instruction(TASK), side)
    with torch.no_grad():
        found = model(ids, real, pooled)
        states = model(input_ids=ids, attention_mask=real).last_hidden_state
    assert found.last_hidden_state is None
    wanted = encoder.encode_query(TEXTS, TASK)
    torch.testing.assert_close(found["sentence_embeddings"], wanted, rtol=0, atol=1e-6)
    means = (states * pooled[..., None]).sum(1) / pooled.sum(1, keepdim=True)
    torch.testing.assert_close(torch.nn.functional.normalize(means), wanted, rtol=0, atol=1e-6)


def test_autotokenizer_gives_the_ids_of_encode(with_auto_map, encoder):
    tokenizer = AutoTokenizer.from_pretrained(with_auto_map)
    for text in TEXTS:
        assert (
            tokenizer(text + "</s>")["input_ids"] == encoder.text_tokenizer([text], "", 512).ids[0].tolist()
        )


def test_the_pipeline_gives_token_states(tiny_directory, encoder):
    found = pipeline("feature-extraction", model=str(tiny_directory), device="cpu")("one</s>")
    ids, real, _ = padded(encoder, ["one"])
    with torch.no_grad():
        wanted = encoder(ids, real)["sentence_embeddings"]
    np.testing.assert_allclose(np.array(found), wanted.numpy(), rtol=0, atol=1e-6)


def test_saving_and_loading_by_its_own_calls(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    torch.testing.assert_close(again.encode(TEXTS), model.encode(TEXTS), rtol=0, atol=0)
    assert again.config.parsed() == NVEmbed.from_pretrained(tmp_path / "saved").config
    AutoConfig.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "config")
    assert NVEmbedConfig.from_file(tmp_path / "config" / "config.json") == again.config.parsed()


@pytest.mark.parametrize(
    ("loading", "error"),
    [
        (
            lambda d: AutoModel.from_pretrained(d, num_labels_of=3),
            "does not know the keyword 'num_labels_of'",
        ),
        (lambda d: AutoModel.from_pretrained(d, load_in_8bit=True), "quantised weights are not supported"),
        (
            lambda d: AutoModel.from_config(AutoConfig.from_pretrained(d)),
            "cannot be made from its config alone",
        ),
    ],
)
def test_what_is_not_here_is_refused(loading, error, tiny_directory):
    with pytest.raises(TypeError, match=error):
        loading(tiny_directory)


def test_a_config_of_another_model_is_refused(tiny_directory):
    config = AutoConfig.from_pretrained(tiny_directory)
    config.is_mask_instruction = False
    with pytest.raises(ValueError, match="config has another is_mask_instruction than config.json"):
        AutoModel.from_pretrained(tiny_directory, config=config)


def test_an_adapter_beside_the_model_is_not_dropped(tiny_directory, tmp_path):
    shutil.copytree(tiny_directory, tmp_path / "adapted")
    (tmp_path / "adapted" / "adapter_config.json").write_text('{"base_model_name_or_path": "nobody/nothing"}')
    with pytest.raises(ValueError, match="holds an adapter"):
        AutoModel.from_pretrained(tmp_path / "adapted")


def test_another_way_to_save_is_refused(model, tmp_path):
    for keywords in ({"push_to_hub": True}, {"state_dict": {}}, {"safe_serialization": False}):
        with pytest.raises(ValueError, match="pass no state_dict"):
            model.save_pretrained(tmp_path / "saved", **keywords)
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()


def test_attributes_reach_the_encoder(tiny_directory):
    model = AutoModel.from_pretrained(tiny_directory, attn_implementation="flash_attention_2")
    model.max_seq_length, model.padding_side = 7, "left"
    assert model.encoder.max_seq_length == 7 and model.tokenizer.padding_side == "left"
    with pytest.raises(AttributeError, match="setting 'prompts' would change nothing here"):
        model.prompts = {}
    assert model.half().encoder.dtype is torch.float16
    for name in ("triton", "nonsense"):
        with pytest.raises(ValueError, match=f"attn_implementation='{name}' is no attention of transformers"):
            AutoModel.from_pretrained(tiny_directory, attn_implementation=name)


def encoders(**changes) -> list[tuple]:
    """(stock model with sdpa, the same with our attention), of each family."""
    sizes = {
        "vocab_size": 90,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "use_cache": False,
        "is_causal": False,
        "initializer_range": 0.2,
        **changes,
    }
    pairs = []
    for config, cls in ((MistralConfig(**sizes), MistralModel), (LlamaConfig(**sizes), LlamaModel)):
        torch.manual_seed(0)
        # a config of its own each, or the second model would change the attention of the first
        stock = cls._from_config(copy.deepcopy(config), attn_implementation="sdpa").eval()
        ours = cls._from_config(copy.deepcopy(config), attn_implementation="nvembed_fast").eval()
        ours.load_state_dict(stock.state_dict())
        assert stock.config._attn_implementation == "sdpa", "both are ours, so a test would prove nothing"
        # in float64, where other batches are no other numbers. Angles stay float32
        pairs.append((stock.double(), ours.double()))
    return pairs


LENGTHS = [5, 9, 1]
IDS = torch.randint(0, 90, (3, 9), generator=torch.Generator().manual_seed(1))


def mask_of(side: str) -> torch.Tensor:
    places = torch.arange(9)
    real = [places < n if side == "right" else places >= 9 - n for n in LENGTHS]
    return torch.stack(real).long()


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("family", [0, 1], ids=["mistral", "llama"])
def test_stock_encoders_take_our_attention(family, side):
    stock, ours = encoders()[family]
    mask = None if side is None else mask_of(side)
    wanted = stock(IDS, attention_mask=mask).last_hidden_state
    got = ours(IDS, attention_mask=mask).last_hidden_state
    real = torch.ones(3, 9) if mask is None else mask
    torch.testing.assert_close(got * real[..., None], wanted * real[..., None], rtol=0, atol=1e-6)
    (wanted * real[..., None]).square().sum().backward()
    (got * real[..., None]).square().sum().backward()
    for (name, a), b in zip(stock.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", [0, 1], ids=["mistral", "llama"])
def test_a_packed_row_is_its_sequences(family):
    stock, ours = encoders()[family]
    rows = [IDS[i : i + 1, :n] for i, n in enumerate(LENGTHS)]
    borders = torch.tensor([0, 5, 14, 15], dtype=torch.int32)
    packed = torch.cat(rows, 1)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    wanted = torch.cat([stock(row).last_hidden_state for row in rows], 1)
    for more in ({"position_ids": positions}, {}, {"cu_seq_lens_k": borders, "max_length_q": 9}):
        got = ours(packed, cu_seq_lens_q=borders, **more).last_hidden_state
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    # without borders the row is one sequence
    assert not torch.allclose(ours(packed).last_hidden_state, wanted, atol=1e-3)


def test_layers_share_what_one_has_read(monkeypatch):
    from nvembed_fast.integrations import transformers as door

    read = []
    for name in ("_padded", "_packed_row"):
        real = getattr(door, name)
        monkeypatch.setattr(door, name, lambda *args, real=real: read.append(1) or real(*args))
    stock, ours = encoders(num_hidden_layers=3)[1]
    mask = mask_of("right").bool()
    ours(IDS, attention_mask=mask)
    assert len(read) == 1
    # the same tensor with other content is read again
    mask.copy_(mask_of("left"))
    with torch.inference_mode():
        got = ours(IDS, attention_mask=mask).last_hidden_state * mask[..., None]
        wanted = stock(IDS, attention_mask=mask).last_hidden_state * mask[..., None]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert len(read) == 2
    borders = torch.tensor([0, 4, 9])
    ours(IDS[:1], cu_seq_lens_q=borders)
    assert len(read) == 3
    # by another model, too
    borders[1] = 6
    other = encoders(num_hidden_layers=3)[1][1]
    got = other(IDS[:1], cu_seq_lens_q=borders).last_hidden_state
    wanted = other(IDS[:1], cu_seq_lens_q=borders.clone()).last_hidden_state
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_the_callers_default_device_changes_nothing():
    """The device "meta" stands in for a GPU."""
    from nvembed_fast.integrations.transformers import attention

    layer = encoders()[1][1].layers[0].self_attn
    q, k, v = torch.randn(3, 3, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    packed = {"cu_seq_lens_q": torch.tensor([0, 4, 9])}
    calls = [
        ((q, k, v, None), {}),
        ((q, k, v, mask_of("left").bool()), {}),
        ((q[:1], k[:1], v[:1], None), packed),
    ]

    def outputs() -> list[torch.Tensor]:
        return [attention(layer, *given, **more)[0] for given, more in calls]

    wanted = outputs()
    try:
        torch.set_default_device("meta")
        got = outputs()
    finally:
        torch.set_default_device(None)
    assert all(map(torch.equal, got, wanted))


def test_a_window_counts_only_if_it_is_shorter_than_a_sequence():
    for window in (9, None):
        stock, ours = encoders(sliding_window=window)[0]
        for mask in (None, mask_of("right")):
            real = torch.ones(3, 9) if mask is None else mask
            got, wanted = (m(IDS, attention_mask=mask).last_hidden_state for m in (ours, stock))
            torch.testing.assert_close(got * real[..., None], wanted * real[..., None], rtol=0, atol=1e-6)
    ours = encoders(sliding_window=8)[0][1]
    with pytest.raises(ValueError, match="has no window, and a sequence has 9 tokens .* is 8"):
        ours(IDS)
    # sequences are shorter than the row that they lie in
    ours(IDS[:1], cu_seq_lens_q=torch.tensor([0, 4, 9]))


@pytest.mark.parametrize(
    ("changes", "call", "error"),
    [
        ({"is_causal": True}, {}, "set config.is_causal = False"),
        ({}, {"attention_mask": torch.ones(3, 1, 9, 9)}, r"takes a mask \[3, 9\] .* got \[3, 1, 9, 9\]"),
        (
            {},
            {"attention_mask": torch.ones(3, 9), "cu_seq_lens_q": torch.tensor([0, 27])},
            "cu_seq_lens_q alone",
        ),
        ({}, {"cu_seq_lens_q": torch.tensor([0, 9])}, "for 3 rows of 9 tokens"),
        ({}, {"cu_seq_lens_k": torch.tensor([0, 9])}, "packs by cu_seq_lens_q alone"),
        ({}, {"output_attentions": True}, "output_attentions"),
    ],
)
def test_what_the_attention_does_not_compute_is_refused(changes, call, error):
    for _, ours in encoders(**changes):
        with pytest.raises(ValueError, match=error):
            ours(IDS, **call)


@pytest.mark.parametrize("borders", [[0, 4, 8], [1, 9], [0, 5, 4, 9], []])
def test_wrong_borders_are_refused(borders):
    with pytest.raises(ValueError, match="borders from 0 to its length"):
        encoders()[1][1](IDS[:1], cu_seq_lens_q=torch.tensor(borders, dtype=torch.int32))


def test_other_borders_of_the_keys_are_refused():
    borders = {"cu_seq_lens_q": torch.tensor([0, 4, 9]), "cu_seq_lens_k": torch.tensor([0, 5, 9])}
    with pytest.raises(ValueError, match="cu_seq_lens_k must equal cu_seq_lens_q"):
        encoders()[1][1](IDS[:1], **borders)


def test_a_mask_of_the_models_own_is_refused():
    from transformers.masking_utils import create_bidirectional_mask

    config = encoders()[1][1].config
    with pytest.raises(ValueError, match="knows no mask but that of the pads"):
        create_bidirectional_mask(
            config, torch.ones(3, 9, 32), None, and_mask_function=lambda *at: at[2] > at[3]
        )


def test_dropout_and_a_growing_cache_are_refused():
    ours = encoders(attention_dropout=0.1, use_cache=True)[1][1]
    with pytest.raises(ValueError, match="attention_dropout"):
        ours.train()(IDS)
    cache = ours.eval()(IDS).past_key_values
    with pytest.raises(ValueError, match="use_cache=False"):
        ours(IDS[:, :1], past_key_values=cache)
