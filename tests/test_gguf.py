"""GGUF files: the real small decoder and random tiny ones equal transformers, and one test per error."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoint import SAVED
from tiny_decoders import (
    HEADS,
    WIDTH,
    backbone_of,
    random_ids,
    reference_states,
    relative,
    states,
    transformers_model,
    write_gguf,
)

from nvembed_fast.checkpoint import load_model
from nvembed_fast.checkpoint.decoders import Decoder, open_decoder
from nvembed_fast.checkpoint.names import TOKENIZER_FILES
from nvembed_fast.new_model import init_model
from nvembed_fast.tokenization import TextTokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenization.json").read_text())

# the real decoder


@pytest.fixture(scope="module")
def real(smollm2_file) -> Decoder:
    return open_decoder(smollm2_file)


@pytest.fixture(scope="module")
def theirs(smollm2_file):
    """transformers' own loading of the same file, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        smollm2_file.parent, gguf_file=smollm2_file.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval().requires_grad_(False)


@pytest.mark.slow
def test_every_real_weight_equals_transformers(real, theirs):
    ours = real.load(torch.float32)
    weights = theirs.model.state_dict()
    for i, layer in enumerate(theirs.model.layers):
        attention, mlp, name = layer.self_attn, layer.mlp, f"layers.{i}."
        qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        assert torch.equal(ours.pop(f"embedding_model.{name}self_attn.qkv_proj.weight"), torch.cat(qkv))
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        assert torch.equal(ours.pop(f"embedding_model.{name}mlp.gate_up_proj.weight"), gate_up)
    assert len(ours) == 2 + 4 * 30
    for name, value in ours.items():
        assert torch.equal(value, weights[name.removeprefix("embedding_model.")]), name


@pytest.mark.slow
def test_real_hidden_states_equal_transformers(real, theirs):
    texts = [
        "The capital of France is",
        "Hi",
        "Sort a list in place:\n\n    values.sort(key=lambda v: (v.year, -v.score))  # 12 of 345\n" * 3,
        "\u65e5\u672c\u8a9e \U0001f600",
    ]
    ids = [real.tokenizer.backend.encode(text).ids for text in texts]
    assert len({len(i) for i in ids}) == 4 and max(map(len, ids)) > 64
    backbone = backbone_of(real, is_causal=True)
    got = states(backbone, ids)
    # padded on the left: the real tokens then do not start at position 0
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(i)) + i for i in ids])
    mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
    wanted = theirs.model(padded, attention_mask=mask).last_hidden_state
    for row, ours in enumerate(got):
        assert relative(ours, wanted[row, mask[row] == 1]) < 1e-5
    next_id = (got[0][-1] @ backbone.embed_tokens.weight.T).argmax()
    assert real.tokenizer.backend.id_to_token(int(next_id)) == "\u0120Paris"


@pytest.mark.slow
def test_the_real_decoder_becomes_a_model(smollm2_file, real, tmp_path):
    init_model(smollm2_file, tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {*SAVED, *TOKENIZER_FILES}
    model = load_model(tmp_path / "model")
    config = model.config
    assert (config.pooling_start, config.torch_dtype) == ("text_offset", "float16")
    text = config.text_config
    assert (text.num_hidden_layers, text.hidden_size, text.vocab_size) == (30, 576, 49152)
    assert (text.rope_theta, text.rms_norm_eps, text.is_causal) == (1e5, 1e-5, False)
    head = config.latent_attention_config
    assert (head.num_latents_value, head.num_cross_heads, head.cross_dim_head) == (512, 8, 64)
    # fp16 storage costs less than its rounding
    full = real.load(torch.float32)
    for name, parameter in model.embedding_model.named_parameters():
        assert relative(parameter, full[f"embedding_model.{name}"]) < 2**-11, name
    tokenizer = TextTokenizer.from_directory(tmp_path / "model", config)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer(["a  5"], "", 10).ids[0].tolist() == [81, 256, 37, 2]


TRICKY = [
    "",
    " ",
    "  lead and trail  ",
    "a\n\nb\t\tc\r\n",
    "don't I'll we've x=1",
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f600\U0001f469\u200d\U0001f680",
    "\x00\x01 nul",
    "def f(self, *args):\n        return [x for x in args if x]",
    "<|im_end|> and <|endoftext|> inside </s>",
    "x" * 300,
]


def test_real_token_ids(real):
    """The file names the rule `smollm`: GPT-2's words, with every digit cut off before."""
    backend = real.tokenizer.backend
    for text in [*TRICKY, "v1.2.3  45", "a  5", "x\n\n5", "\u00bd \u2460 \u0663"]:
        ids = backend.encode(text).ids
        assert backend.decode(ids, skip_special_tokens=False) == text
    # no digit shares a token with another character, so the blanks before it stay together
    assert backend.encode("a  5").ids == [81, 256, 37]
    assert backend.encode("x\n\n5").ids == [104, 1116, 37]
    assert backend.encode("Hello world 12345 3.14").tokens[2:8] == ["\u0120", "1", "2", "3", "4", "5"]
    assert backend.encode("The capital of France is").ids == [504, 3575, 282, 4649, 314]
    # marks: none is added, and one written out is one id
    assert backend.encode("x<|im_end|>").ids == [104, 2]
    assert real.tokenizer.eos_token == "<|im_end|>"


@pytest.mark.slow
def test_real_token_ids_equal_transformers_where_no_digit_follows_a_blank(real, smollm2_file):
    """transformers forgets the digits rule when it reads this file. Everything else must agree."""
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name)
    backend = real.tokenizer.backend
    assert backend.get_vocab() == other.get_vocab()
    for text in [*TRICKY, Path(__file__).read_text().translate(str.maketrans("0123456789", "zonwhrxsgu"))]:
        assert backend.encode(text).ids == other(text)["input_ids"], text


# tiny decoders


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_gguf_file_becomes_a_model(tmp_path, is_causal):
    source = transformers_model("Llama", is_causal=is_causal)
    decoder = open_decoder(write_gguf(tmp_path / "d.gguf", source))
    assert decoder.config.rms_norm_eps == 1e-3, "rounded to fp32 in the file"
    assert decoder.dtype == torch.float32
    got = states(backbone_of(decoder, is_causal), random_ids())
    for ours, wanted in zip(got, reference_states(source.model, random_ids()), strict=True):
        assert relative(ours, wanted) < 1e-5
    init_model(tmp_path / "d.gguf", tmp_path / "out", num_latents=4)
    assert load_model(tmp_path / "out").config.text_config == decoder.config


def test_absent_facts_take_their_defaults(tmp_path):
    changes = {"head_dim": WIDTH // HEADS, "num_key_value_heads": HEADS}
    absent = dict.fromkeys(
        ["attention.key_length", "attention.value_length", "attention.head_count_kv", "rope.freq_base"]
    )
    file = write_gguf(
        tmp_path / "d.gguf",
        transformers_model("Llama", **changes),
        {f"llama.{n}": v for n, v in absent.items()},
    )
    config = open_decoder(file).config
    assert (config.head_dim, config.num_key_value_heads, config.rope_theta) == (12, HEADS, 10000.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"facts": {"general.architecture": "qwen2"}}, "general.architecture must be 'llama'.*, got 'qwen2'"),
        ({"facts": {"llama.block_count": None}}, "llama.block_count is missing"),
        ({"facts": {"llama.block_count": 10**6}}, "llama.block_count must be an integer from 0 to 1024, got"),
        ({"facts": {"llama.rope.freq_base": math.nan}}, "llama.rope.freq_base must be a number from 1 to"),
        ({"facts": {"llama.rope.freq_base": 0.0}}, "llama.rope.freq_base must be a number from 1 to"),
        (
            {"facts": {"llama.attention.layer_norm_rms_epsilon": -1.0}},
            "llama.attention.layer_norm_rms_epsilon must be a number from 1e-12 to 0.1, got -1.0",
        ),
        (
            {"facts": {"llama.attention.head_count": 0}},
            "llama.attention.head_count must be an integer from 1",
        ),
        (
            {"facts": {"llama.attention.head_count_kv": 3}},
            "llama.attention.head_count 4 must be a multiple of llama.attention.head_count_kv 3",
        ),
        (
            {"facts": {"llama.embedding_length": "48"}},
            "llama.embedding_length must be an integer .* got '48'",
        ),
        ({"facts": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type='yarn' is not supported"),
        ({"facts": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count=8 is not supported"),
        ({"facts": {"llama.attention.value_length": 8}}, "llama.attention.value_length=8 is not supported"),
        ({"facts": {"llama.expert_count": 8}}, "llama.expert_count=8 is not supported"),
        (
            {"facts": {"llama.feed_forward_length": 81}},
            r"'blk.0.ffn_gate.weight' must be \[81, 48\], found \[",
        ),
        ({"skip": ["blk.1.attn_q.weight"]}, "tensor 'blk.1.attn_q.weight' is missing"),
        ({"skip": ["token_embd.weight"]}, "tensor 'token_embd.weight' is missing"),
        ({"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}}, "it holds 'rope_freqs.weight'"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "it holds 'blk.0.attn_q.bias'"),
        (
            {"tokenizer": {"model": "t5"}},
            "tokenizer.ggml.model must be 'gpt2' or 'llama', got 't5'. Start from",
        ),
        ({"tokenizer": {"pre": "tekken"}}, "tokenizer.ggml.pre must be one of gpt-2, smollm.*got 'tekken'"),
        ({"tokenizer": {"pre": None}}, "tokenizer.ggml.pre must be one of .*got 'default'"),
        ({"tokenizer": {"eos_token_id": None}}, "tokenizer.ggml.eos_token_id is missing"),
        ({"tokenizer": {"tokens": None}}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer": {"tokens": 3}}, "tokenizer.ggml.tokens must be a list of str, got 3"),
        ({"tokenizer": {"eos_token_id": 98}}, "tokenizer.ggml.eos_token_id must be an integer from 0 to 97"),
        ({"tokenizer": {"add_bos_token": "false"}}, "tokenizer.ggml.add_bos_token must be true or false"),
        (
            {"tokenizer": {"add_bos_token": True, "bos_token_id": None}},
            "tokenizer.ggml.bos_token_id is missing, and tokenizer.ggml.add_bos_token is true",
        ),
        ({"tokenizer": {"merges": ["a b", "a  b"]}}, "tokenizer.ggml.merges has 'a  b', which joins no two"),
        ({"tokenizer": {"token_type": [1]}}, "tokenizer.ggml.token_type must have 98 elements"),
        ({"tokenizer": {"pre": [1]}}, r"tokenizer.ggml.pre must be one of gpt-2.* got \[1\]"),
    ],
)
def test_gguf_files_that_cannot_be_used(tmp_path, changes, message):
    file = write_gguf(tmp_path / "d.gguf", **changes)
    with pytest.raises(ValueError, match=rf"d\.gguf: .*{message}"):
        init_model(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_a_dtype_cannot_hold(tmp_path):
    norm = np.ones(WIDTH, np.float32)
    norm[3] = 1e5
    file = write_gguf(tmp_path / "d.gguf", tensors={"output_norm.weight": norm})
    with pytest.raises(ValueError, match="'output_norm.weight' holds NaN, Inf or more than float16 holds"):
        init_model(file, tmp_path / "out", dtype="float16")
    init_model(file, tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize(
    "size, reason",
    [
        (0, "empty"),
        (3, "GGUF"),
        (100, r"field llama\.\S+: \d+ bytes at \d+ are behind the file's end"),
        (3000, "bytes at .* are behind the file's end"),
        (-100, r"tensor 'output\.weight': it ends behind the file"),
    ],
)
def test_truncated_gguf(tmp_path, size, reason):
    file = write_gguf(tmp_path / "d.gguf")
    file.write_bytes(file.read_bytes()[:size])
    message = rf"d\.gguf is cut short or no GGUF file \(.*{reason}.*\): download it again"
    with pytest.raises(ValueError, match=message):
        open_decoder(file)


def test_not_a_gguf_file(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 1000)
    with pytest.raises(ValueError, match=r"x\.gguf is cut short or no GGUF file"):
        open_decoder(tmp_path / "x.gguf")


@pytest.mark.parametrize("name", ["nowhere/x.gguf", "x.gguf"])
def test_a_gguf_file_that_is_not_there(name):
    with pytest.raises(FileNotFoundError, match=rf"no file {name}"):
        open_decoder(name)


def test_without_the_package_gguf(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "d.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ImportError, match="reading GGUF files needs the package gguf: pip install 'nvembed-fast"
    ):
        open_decoder(file)


def test_a_sentencepiece_tokenizer_inside_a_gguf_file(tmp_path, mistral_pieces_file):
    """Mistral's own: the ids equal the published checkpoint's on every golden row."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(mistral_pieces_file))
    count = pieces.vocab_size()
    is_kind = {2: pieces.is_unknown, 3: pieces.is_control, 6: pieces.is_byte}
    kinds = [next((kind for kind, is_it in is_kind.items() if is_it(i)), 1) for i in range(count)]
    assert [kinds.count(k) for k in (2, 3, 6)] == [1, 2, 256]
    model = transformers_model("Llama", vocab_size=count, num_hidden_layers=0)
    file = write_gguf(
        tmp_path / "d.gguf",
        model,
        tokenizer={
            "model": "llama",
            "pre": None,
            "merges": None,
            "tokens": [pieces.id_to_piece(i) for i in range(count)],
            "scores": [pieces.get_score(i) for i in range(count)],
            "token_type": kinds,
            "add_bos_token": True,
        },
    )
    init_model(file, tmp_path / "out", num_latents=2)
    tokenizer = TextTokenizer.from_directory(tmp_path / "out")
    for row in GOLDEN:
        got = tokenizer([row["text"]], row["instruction"], row["max_length"]).ids[0].tolist()
        assert got == row["input_ids"], row
    for text in ("a  b", " x", "na\u00efve \U0001f600"):
        assert tokenizer.backend.decode(tokenizer.backend.encode(text).ids) == text
