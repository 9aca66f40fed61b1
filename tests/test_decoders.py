"""Decoders as a starting point: the real small one, and random tiny ones in both file forms."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from examples import fetch_decoder
from nvembed_fast.checkpoint import load_model
from nvembed_fast.checkpoint.decoders import Decoder, init_model, open_decoder
from nvembed_fast.checkpoint.names import TOKENIZER_FILES
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.network.mistral import MistralBackbone
from nvembed_fast.packing import PackedBatch
from nvembed_fast.tokenization import TextTokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenization.json").read_text())
HEADS, KV_HEADS, HEAD_DIM, WIDTH, LAYERS = 4, 2, 16, 48, 3
LENGTHS = (7, 1, 13)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


def backbone_of(decoder: Decoder, is_causal: bool) -> MistralBackbone:
    backbone = MistralBackbone(dataclasses.replace(decoder.config, is_causal=is_causal))
    weights = decoder.load(torch.float32).items()
    backbone.load_state_dict({n.removeprefix("embedding_model."): v for n, v in weights}, assign=True)
    return backbone.eval().requires_grad_(False)


def states(backbone: MistralBackbone, ids: list[list[int]]) -> tuple[torch.Tensor, ...]:
    batch = PackedBatch.from_ids([np.array(i) for i in ids], [0] * len(ids))
    return backbone(batch).split([len(i) for i in ids])


# the real decoder


@pytest.fixture(scope="module")
def real_file() -> Path:
    try:
        return fetch_decoder.fetch()
    except RuntimeError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the decoder cannot be downloaded: {error}")


@pytest.fixture(scope="module")
def real(real_file) -> Decoder:
    return open_decoder(real_file)


@pytest.fixture(scope="module")
def theirs(real_file):
    """transformers' own loading of the same file, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        real_file.parent, gguf_file=real_file.name, dtype=torch.float32, attn_implementation="eager"
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
def test_the_real_decoder_becomes_a_model(real_file, real, tmp_path):
    init_model(real_file, tmp_path / "model")
    files = sorted(p.name for p in (tmp_path / "model").iterdir())
    assert files == sorted(["config.json", "model.safetensors", *TOKENIZER_FILES])
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
    tokenizer = TextTokenizer.from_directory(tmp_path / "model", config.pooling_start)
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
    """The rule is GPT-2's words with every digit cut off before; the file names it `smollm`."""
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
def test_real_token_ids_equal_transformers_where_no_digit_follows_a_blank(real, real_file):
    """transformers forgets the digits rule when it reads this file; everything else must agree."""
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(real_file.parent, gguf_file=real_file.name)
    backend = real.tokenizer.backend
    assert backend.get_vocab() == other.get_vocab()
    for text in [*TRICKY, Path(__file__).read_text().translate(str.maketrans("0123456789", "zonwhrxsgu"))]:
        assert backend.encode(text).ids == other(text)["input_ids"], text


# tiny decoders in Hugging Face form


def transformers_model(kind: str, **changes):
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": 99,
            "hidden_size": WIDTH,
            "intermediate_size": 80,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
            "attn_implementation": "eager",
            **({"sliding_window": None} if kind == "Mistral" else {}),
        }
        | changes
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def write_tokenizer(directory: Path, size: int = 99) -> None:
    words = {f"w{i}": i for i in range(size - 2)} | {"<unk>": size - 2, "</s>": size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))


@pytest.fixture
def mistral(tmp_path) -> Path:
    """A tiny Mistral with its tokenizer, as save_pretrained writes it."""
    transformers_model("Mistral").save_pretrained(tmp_path / "mistral")
    write_tokenizer(tmp_path / "mistral")
    return tmp_path / "mistral"


def random_ids() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 99, (n,), generator=generator).tolist() for n in LENGTHS]


def reference_states(model, ids: list[list[int]]) -> list[torch.Tensor]:
    # a mask is given, or transformers may take the absence of one for a causal one
    masks = [torch.ones(1, len(i), dtype=torch.long) for i in ids]
    pairs = zip(ids, masks, strict=True)
    return [model(torch.tensor([i]), attention_mask=m).last_hidden_state[0] for i, m in pairs]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    "kind, part, tied, shard",
    [
        ("Mistral", "whole", False, "1GB"),
        ("Mistral", "whole", True, "20KB"),
        ("Mistral", "model", False, "1GB"),
        ("Llama", "whole", True, "1GB"),
        ("Llama", "whole", False, "20KB"),
    ],
)
def test_a_hugging_face_directory_becomes_a_model(tmp_path, kind, part, tied, shard, is_causal):
    source = transformers_model(kind, tie_word_embeddings=tied, is_causal=is_causal)
    (source if part == "whole" else source.model).save_pretrained(tmp_path / "d", max_shard_size=shard)
    assert len(list((tmp_path / "d").glob("*.safetensors"))) > (1 if shard == "20KB" else 0)
    write_tokenizer(tmp_path / "d")
    init_model(tmp_path / "d", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model = load_model(tmp_path / "out").requires_grad_(False)
    assert model.config.torch_dtype == "float32"
    assert not model.config.text_config.is_causal, "an encoder sees both ways, whatever the decoder did"
    backbone = model.embedding_model
    for layer in backbone.layers:
        layer.self_attn.is_causal = is_causal
    for got, wanted in zip(
        states(backbone, random_ids()), reference_states(source.model, random_ids()), strict=True
    ):
        assert relative(got, wanted) < 1e-5
    assert model(PackedBatch.from_ids([np.arange(5)], [0])).shape == (1, WIDTH)


def test_the_dtype_is_the_decoders_own_unless_asked(tmp_path):
    transformers_model("Llama").bfloat16().save_pretrained(tmp_path / "d")
    write_tokenizer(tmp_path / "d")
    for name, dtype in (("a", None), ("b", "float32")):
        init_model(tmp_path / "d", tmp_path / name, dtype=dtype)
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("a", "b")]
    assert {t.dtype for t in stored[0].values()} == {torch.bfloat16}
    assert {t.dtype for t in stored[1].values()} == {torch.float32}
    # one seed, one head: only rounded
    for name in stored[0]:
        assert torch.equal(stored[0][name], stored[1][name].bfloat16()), name


def test_the_fresh_head(mistral, tmp_path):
    before = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        init_model(mistral, tmp_path / name, num_latents=24, num_heads=2, head_width=32, seed=seed)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator was used"
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "abc"]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    head = {n.removeprefix("latent_attention_model."): v for n, v in weights[0].items() if "latent" in n}
    other = {n.removeprefix("latent_attention_model."): v for n, v in weights[2].items() if "latent" in n}
    block = "cross_attend_blocks."
    assert head["latents"].shape == (24, WIDTH)
    assert abs(head["latents"].std() - 1) < 0.1
    fan_in = {
        "0.fn.to_q.weight": (64, WIDTH),
        "0.fn.to_kv.weight": (128, WIDTH),
        "0.fn.to_out.weight": (WIDTH, 64),
        "1.fn.net.0.weight": (8 * WIDTH, WIDTH),
        "1.fn.net.2.weight": (WIDTH, 4 * WIDTH),
    }
    for name, shape in fan_in.items():
        value, bound = head[block + name], shape[1] ** -0.5
        assert value.shape == shape
        assert 0.98 * bound < value.abs().max() <= bound
        assert abs(value.std() / (bound / 3**0.5) - 1) < 0.05
        assert not torch.equal(value, other[block + name])
    assert head[block + "1.fn.net.2.bias"].abs().max() <= (4 * WIDTH) ** -0.5
    for norm in ("0.norm", "0.norm_context", "1.norm"):
        assert (head[f"{block}{norm}.weight"] == 1).all() and (head[f"{block}{norm}.bias"] == 0).all()


def test_wide_decoders_get_the_published_head_width(tmp_path):
    changes = {"hidden_size": 2048, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 99}
    transformers_model("Llama", **changes).half().save_pretrained(tmp_path / "d")
    write_tokenizer(tmp_path / "d")
    init_model(tmp_path / "d", tmp_path / "out", num_heads=1, num_latents=2)
    assert (
        NVEmbedConfig.from_file(tmp_path / "out" / "config.json").latent_attention_config.cross_dim_head
        == 4096
    )


def test_an_existing_model_is_not_overwritten(mistral, tmp_path):
    init_model(mistral, tmp_path / "out", num_latents=2)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="out already holds a model: remove it or choose another"):
        init_model(mistral, tmp_path / "out", num_latents=3)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["num_latents", "num_heads", "head_width"])
def test_sizes_below_one(mistral, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        init_model(mistral, tmp_path / "out", **{name: 0})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "qwen2"}, "model_type must be 'mistral' or 'llama', got 'qwen2'"),
        ({"model_type": None}, "model_type must be 'mistral' or 'llama', got None"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling=.* is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ({"dtype": "int8"}, "dtype must be one of float16, bfloat16, float32, float64, got 'int8'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
    ],
)
def test_configs_the_backbone_does_not_compute(mistral, tmp_path, changes, message):
    file = mistral / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        init_model(mistral, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_malformed_config(mistral, text):
    (mistral / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: "):
        open_decoder(mistral)


def test_biases_among_the_weights(tmp_path):
    source = transformers_model("Llama", attention_bias=True)
    source.config.attention_bias = False
    source.save_pretrained(tmp_path / "d")
    write_tokenizer(tmp_path / "d")
    with pytest.raises(
        ValueError, match=r"the weights hold tensor 'model\.layers\.0\.self_attn\..*bias' and"
    ):
        init_model(tmp_path / "d", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_no_tokenizer(mistral, tmp_path, name):
    (mistral / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing"):
        init_model(mistral, tmp_path / "out")


def test_more_tokens_than_embedding_rows(mistral, tmp_path):
    write_tokenizer(mistral, size=100)
    with pytest.raises(ValueError, match="the tokenizer has an id 99, the embedding 99 rows"):
        init_model(mistral, tmp_path / "out")


def test_a_directory_without_a_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: it is no Hugging Face model"):
        open_decoder(tmp_path)


@pytest.mark.parametrize("name", ["nowhere/x.gguf", "x.gguf"])
def test_a_gguf_file_that_is_not_there(name):
    with pytest.raises(FileNotFoundError, match=rf"no file {name}"):
        open_decoder(name)


# tiny decoders in GGUF form

BYTES = [chr(c) for c in range(33, 127)]


def write_gguf(file: Path, model=None, facts=None, tokenizer=None, tensors=None, leave_out=()) -> Path:
    """A llama file as llama.cpp's converter writes it: q and k rows in its own order."""
    import gguf

    model = model or transformers_model("Llama")
    c = model.config
    facts = {
        "llama.block_count": c.num_hidden_layers,
        "llama.context_length": 2048,
        "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads,
        "llama.attention.key_length": c.head_dim,
        "llama.attention.value_length": c.head_dim,
        "llama.rope.dimension_count": c.head_dim,
        "llama.rope.freq_base": 700.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-3,
    } | (facts or {})
    tokenizer = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": ["<unk>", "<s>", "</s>", "ab", *BYTES[:95]],
        "merges": ["a b"],
        "token_type": [2, 3, 3, *[1] * 96],
        "eos_token_id": 2,
        "bos_token_id": 1,
        "add_bos_token": False,
    } | (tokenizer or {})
    renamed = {
        "input_layernorm": "attn_norm",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj": "",
        "model.layers": "blk",
        "model.norm": "output_norm",
        "model.embed_tokens": "token_embd",
        "lm_head": "output",
    }
    stored = {}
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = array.shape[0] // c.head_dim
            array = array.reshape(heads, 2, c.head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        stored[name] = array
    stored |= tensors or {}

    writer = gguf.GGUFWriter(file, facts.pop("general.architecture", "llama"))
    for name, value in (facts | {f"tokenizer.ggml.{n}": v for n, v in tokenizer.items()}).items():
        if value is None:
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add.get(type(value), writer.add_array)(name, value)
    for name, array in stored.items():
        if name not in leave_out:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


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
        ({"facts": {"general.architecture": "qwen2"}}, "the architecture must be 'llama'.*, got 'qwen2'"),
        ({"facts": {"llama.block_count": None}}, "llama.block_count is missing"),
        ({"facts": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type='yarn' is not supported"),
        ({"facts": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count=8 is not supported"),
        ({"facts": {"llama.attention.value_length": 8}}, "llama.attention.value_length=8 is not supported"),
        ({"facts": {"llama.expert_count": 8}}, "llama.expert_count=8 is not supported"),
        (
            {"facts": {"llama.feed_forward_length": 81}},
            r"'blk.0.ffn_gate.weight' must be \[81, 48\], found \[",
        ),
        ({"leave_out": ["blk.1.attn_q.weight"]}, "tensor 'blk.1.attn_q.weight' is missing"),
        ({"leave_out": ["token_embd.weight"]}, "tensor 'token_embd.weight' is missing"),
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


@pytest.mark.parametrize("size", [0, 3, 100, 3000, -100])
def test_truncated_gguf(tmp_path, size):
    file = write_gguf(tmp_path / "d.gguf")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"d\.gguf is cut short or no GGUF file \(.*\): download it again"):
        open_decoder(file)


def test_not_a_gguf_file(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 1000)
    with pytest.raises(ValueError, match=r"x\.gguf is cut short or no GGUF file"):
        open_decoder(tmp_path / "x.gguf")


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
