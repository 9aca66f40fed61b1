"""Whatever stands in a model's files: it loads and its vectors are finite, or an error names file and key.

Within 5 seconds and 1 GiB. Other errors, a hang and a larger allocation fail.
"""

import contextlib
import json
import mmap
import os
import resource
import shutil
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoint import everything
from tiny_decoders import write_tokenizer

from nvembed_fast import NVEmbed
from nvembed_fast.checkpoint import load_model, save_model
from nvembed_fast.checkpoint.decoders import open_decoder
from nvembed_fast.config import BackboneConfig, LatentConfig, NVEmbedConfig
from nvembed_fast.network.model import NVEmbedModel

# a bare checkout of a machine with a GPU may lack it
hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

SECONDS, BYTES = 5, 2**30
VOCAB, WIDTH = 99, 16
NUMBERS = [0, -1, 1, 2, 3, 16, 98, 99, 10**6, 2**31, 2**63, 10**30, 0.5, 16.0, -0.0, 1e30, 1e-30]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(NUMBERS)
    | st.floats()
    | st.sampled_from(
        ["false", "true", "16", "", "</s>", "w1", "float16", "torch.bfloat16", "\ud800", "a" * 99]
    )
    | st.text(max_size=6)
)
VALUES = LEAVES | st.lists(LEAVES, max_size=3) | st.fixed_dictionaries({"inner": LEAVES})
# what no object's value can be
DAMAGES = [
    lambda text: text[: len(text) // 2],
    lambda text: "",
    lambda text: "[" * 100_000,
    lambda text: '{"a":' * 100_000,
    lambda text: f"[{text}]",
    lambda text: text + "}",
    lambda text: text.replace(":", ":" + "[" * 900 + "]" * 900 + ', "x":', 1),
    lambda text: text.replace("{", '{"a": 1, "a": 2, ', 1),
    lambda text: text.replace("{", '{"a": ' + "9" * 5000 + ", ", 1),
    lambda text: text.replace("{", '{"a": [NaN], "b": -Infinity, ', 1),
    lambda text: text.replace('"', "'"),
    lambda text: "\ufeff" + text,
    lambda text: text + " " * 2**24,
]


def long_too(few: int, many: int):
    """`count` examples: few of them in every run, many with --long."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.long)])


def check_all(count: int, body, *strategies) -> None:
    """Run `body` on examples. The few are the same in every run."""
    rules = hypothesis.settings(
        max_examples=count,
        derandomize=count <= 200,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    rules(hypothesis.given(*strategies)(body))()


@contextlib.contextmanager
def limits(seconds: float = SECONDS, num_bytes: int = BYTES):
    """Inside, more seconds of CPU time fail, a wait of a minute, and an allocation that needs more memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + num_bytes, before[1]))
    # a machine with other work is slow, but counts no CPU time. A FIFO that nobody writes to counts none too
    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, seconds),
        (signal.SIGALRM, signal.ITIMER_REAL, 12 * seconds),
    )
    old = {
        number: signal.signal(number, lambda *_: pytest.fail(f"took more than {seconds} s"))
        for number, *_ in timers
    }
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, timer, _ in timers:
            signal.setitimer(timer, 0)
            signal.signal(number, old[number])
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(load, *names: list[str]) -> object:
    """What `load` returns, or None if it raises as it may: with one of each list of names in the message."""
    with limits():
        try:
            return load()
        except (ValueError, OSError) as error:
            message = str(error)
    assert len(message) < 2000, message
    for choices in names:
        assert any(choice in message for choice in [*choices, "'inner'"]), (message, choices)
    return None


def test_the_limits_are_limits():
    """Otherwise the tests below would prove nothing."""
    with pytest.raises(pytest.fail.Exception, match=r"took more than 0\.05 s"), limits(0.05):
        while True:
            pass
    with limits(), pytest.raises((MemoryError, RuntimeError)):
        torch.zeros(BYTES + BYTES // 4, dtype=torch.uint8)
    with limits(), pytest.raises(MemoryError):
        bytearray(BYTES + BYTES // 4)
    with pytest.raises(pytest.fail.Exception, match=r"took more than 0\.01 s"), limits(0.01):
        os.read(os.pipe()[0], 1)
    with limits():
        mmap.mmap(-1, BYTES // 2).close()


# config.json, the tokenizer's files and the weights


@pytest.fixture(scope="module")
def model_files(tmp_path_factory) -> dict[str, bytes]:
    text = BackboneConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    config = NVEmbedConfig(text, LatentConfig(4, 1, 8, hidden_dim=WIDTH, latent_dim=WIDTH))
    model = NVEmbedModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    directory = tmp_path_factory.mktemp("whole")
    save_model(model, directory, dtype="float32")
    write_tokenizer(directory, VOCAB)
    save_model(model, directory / "sharded", dtype="float32", max_shard_bytes=8000)
    assert len(list(directory.glob("sharded/model-*"))) > 1
    return {name: data for name, data in everything(directory).items() if data is not None}


def write(directory: Path, files: dict[str, bytes]) -> Path:
    """The files, alone in a directory."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, data in files.items():
        if "/" not in name:
            (directory / name).write_bytes(data)
    return directory


def load_and_encode(directory: Path, *names: list[str]) -> None:
    """What loads gives vectors. Another tokenizer may leave nothing of a text to pool."""
    model = attempt(lambda: NVEmbed.from_pretrained(directory, device="cpu"), *names)
    if model is not None:
        may_fail = [["prompts["]] if names[0][0] == "tokenizer.json" else [["nothing"]]
        vectors = attempt(lambda: model.encode(["w1 w2", "w3"], output="numpy"), *may_fail)
        assert vectors is None or np.isfinite(vectors).all()


def as_json(content: object) -> bytes:
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "model.safetensors",
    ],
)
@pytest.mark.parametrize("kind", ["FIFO", "device", "folder"])
def test_what_is_no_file_is_named_and_not_waited_for(model_files, tmp_path, name, kind):
    directory = write(tmp_path / "m", {n: data for n, data in model_files.items() if n != name})
    match kind:
        case "FIFO":
            os.mkfifo(directory / name)
        case "device":
            (directory / name).symlink_to("/dev/zero")
        case "folder":
            (directory / name).mkdir()
    assert attempt(lambda: NVEmbed.from_pretrained(directory, device="cpu"), [f"{name} is a {kind}"]) is None
    if name == "config.json":
        # a save reads it to see whose it is
        model = NVEmbedModel(NVEmbedConfig.from_dict(json.loads(model_files[name])))
        assert attempt(lambda: save_model(model, directory), [str(directory)]) is None


@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_a_gguf_file_that_is_no_file(tmp_path, kind):
    if kind == "FIFO":
        os.mkfifo(tmp_path / "d.gguf")
    else:
        (tmp_path / "d.gguf").symlink_to("/dev/zero")
    assert attempt(lambda: open_decoder(tmp_path / "d.gguf"), [f"d.gguf is a {kind}"]) is None


CONFIG_KEYS = [
    ("model_type",),
    ("text_config",),
    ("latent_attention_config",),
    ("is_mask_instruction",),
    ("is_untrained",),
    ("pooling_start",),
    ("pooling_head",),
    ("torch_dtype",),
    ("hidden_size",),
    ("unknown",),
    *(("latent_attention_config", name) for name in LatentConfig.__dataclass_fields__),
    *(("text_config", name) for name in BackboneConfig.__dataclass_fields__),
    *(
        ("text_config", name)
        for name in ("rope_parameters", "rope_scaling", "attention_bias", "hidden_act", "eos_token_id")
    ),
]


@long_too(100, 2000)
def test_config_json(model_files, tmp_path, count):
    config = json.loads(model_files["config.json"])

    def body(changes):
        content = json.loads(model_files["config.json"])
        for path, value in changes:
            place = content
            for key in path[:-1]:
                place = place[key] if isinstance(place.get(key), dict) else {}
            place[path[-1]] = value
        keys = [path[-1] for path, _ in changes]
        write(tmp_path / "m", model_files | {"config.json": as_json(content)})
        # a config that is right in itself may be of other weights, which a tensor tells
        places = ["config.json", "tokenizer.json", f"{tmp_path / 'm'}: the weights"]
        load_and_encode(tmp_path / "m", places, [*keys, "tensor '"])

    assert all(key[0] in config or key[0] in ("unknown", "is_untrained") for key in CONFIG_KEYS)
    changes = st.lists(st.tuples(st.sampled_from(CONFIG_KEYS), VALUES), min_size=1, max_size=2)
    check_all(count, body, changes)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_damaged_json(model_files, tmp_path, name):
    for damage in DAMAGES:
        damaged = damage(model_files[name].decode()).encode()
        write(tmp_path / "m", model_files | {name: damaged})
        load_and_encode(tmp_path / "m", [name])


@long_too(100, 2000)
def test_tokenizer_config_json(model_files, tmp_path, count):
    def body(changes):
        content = json.loads(model_files["tokenizer_config.json"]) | changes
        write(tmp_path / "m", model_files | {"tokenizer_config.json": as_json(content)})
        load_and_encode(tmp_path / "m", ["tokenizer_config.json"], [*changes, "'content'", "'lstrip'"])

    keys = st.sampled_from(["eos_token", "eos_token_id", "bos_token", "model_max_length", "add_bos_token"])
    wrapped = st.fixed_dictionaries({"content": VALUES, "lstrip": VALUES})
    check_all(count, body, st.dictionaries(keys, VALUES | wrapped, min_size=1, max_size=2))


@long_too(100, 2000)
def test_tokenizer_json(model_files, tmp_path, count):
    def body(data):
        content = json.loads(model_files["tokenizer.json"])
        edit(data, content)
        write(tmp_path / "m", model_files | {"tokenizer.json": as_json(content)})
        load_and_encode(tmp_path / "m", ["tokenizer.json", "tokenizer_config.json"])

    check_all(count, body, st.data())


def edit(data, content) -> None:
    """Replace or remove one value anywhere in a JSON tree."""
    while True:
        keys = sorted(content) if isinstance(content, dict) else list(range(len(content)))
        key = data.draw(st.sampled_from(keys[:12]))
        if isinstance(content[key], dict | list) and content[key] and data.draw(st.booleans()):
            content = content[key]
        elif data.draw(st.integers(0, 4)):
            content[key] = data.draw(VALUES)
            return
        else:
            del content[key]
            return


FILE_NAMES = [
    "../model.safetensors",
    "a/b.safetensors",
    "/etc/passwd",
    "x" * 300 + ".safetensors",
    "\0.safetensors",
    "\ud800.safetensors",
    ".safetensors",
    "..",
    "",
    "model.safetensors",
    "config.json",
    "model-00001-of-00099.safetensors",
]


@long_too(100, 2000)
def test_index_files(model_files, tmp_path, count):
    index = "model.safetensors.index.json"
    sharded = {
        name.removeprefix("sharded/"): data for name, data in model_files.items() if "sharded/" in name
    }
    names = sorted(json.loads(sharded[index])["weight_map"])
    shards = sorted(name for name in sharded if name.startswith("model-"))
    places = st.sampled_from(FILE_NAMES + shards) | VALUES

    def body(changes, removed, whole, damage):
        content = json.loads(sharded[index])
        for name in removed:
            del content["weight_map"][name]
        content["weight_map"] |= changes
        text = json.dumps(content if whole is None else whole)
        write(tmp_path / "m", sharded | {index: (damage(text) if damage else text).encode()})
        wanted = ["tensor '", "weight_map", "must hold an object", *(repr(name) for name in changes)]
        names = [[index, "model-0", str(tmp_path)]] + ([] if damage else [wanted])
        attempt(lambda: load_model(tmp_path / "m"), *names)

    check_all(
        count,
        body,
        st.dictionaries(st.sampled_from(names) | st.text(max_size=4), places, max_size=2),
        st.sets(st.sampled_from(names), max_size=1),
        st.none() | st.none() | st.fixed_dictionaries({"weight_map": VALUES}) | VALUES,
        st.none() | st.none() | st.sampled_from(DAMAGES),
    )


@long_too(100, 2000)
def test_weights_with_a_broken_header(model_files, tmp_path, count):
    whole = model_files["model.safetensors"]
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def body(draw):
        if draw.draw(st.booleans()):
            content = json.loads(json.dumps(header))
            edit(draw, content)
            text = as_json(content)
            damaged = struct.pack("<Q", len(text)) + text + data
        else:
            damaged = flip(draw, whole, length)
        write(tmp_path / "m", model_files | {"model.safetensors": damaged})
        attempt(lambda: load_model(tmp_path / "m"), ["model.safetensors", f"{tmp_path / 'm'}: the weights"])

    check_all(count, body, st.data())


def flip(draw, whole: bytes, within: int) -> bytes:
    """The content of a file, cut short or with some bytes of its first part written anew."""
    if draw.draw(st.integers(0, 3)) == 0:
        return whole[: draw.draw(st.integers(0, len(whole) - 1))]
    damaged = bytearray(whole)
    for at in draw.draw(st.lists(st.integers(0, within), min_size=1, max_size=3)):
        damaged[at] = draw.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    return bytes(damaged)


# GGUF files

FIELDS = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": WIDTH,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.key_length": 8,
    "llama.attention.value_length": 8,
    "llama.rope.dimension_count": 8,
    "llama.rope.freq_base": 1e4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "ab", "a", "b"],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_space_prefix": True,
}
TENSORS = {
    "token_embd.weight": (6, WIDTH),
    "blk.0.attn_norm.weight": (WIDTH,),
    "blk.0.attn_q.weight": (WIDTH, WIDTH),
    "blk.0.attn_k.weight": (8, WIDTH),
    "blk.0.attn_v.weight": (8, WIDTH),
    "blk.0.attn_output.weight": (WIDTH, WIDTH),
    "blk.0.ffn_norm.weight": (WIDTH,),
    "blk.0.ffn_gate.weight": (WIDTH, WIDTH),
    "blk.0.ffn_up.weight": (WIDTH, WIDTH),
    "blk.0.ffn_down.weight": (WIDTH, WIDTH),
    "output_norm.weight": (WIDTH,),
}
# a field of another type than its value's own
RAW = [
    struct.pack("<II", 8, 0),  # a string that ends the file
    struct.pack("<IIQ", 9, 0, 2**40),  # bytes beyond the file
    struct.pack("<IIQ", 9, 8, 2**62),
    struct.pack("<IIQ", 9, 9, 2**40),
    struct.pack("<IB", 7, 2),
    struct.pack("<I", 99),
    struct.pack("<IIQ", 9, 99, 1),
    struct.pack("<IQ", 8, 2) + b"\xff\xfe",
]


def packed(value: object) -> bytes:
    """A value as GGUF stores it, its type in front."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, list):
        if value and type(value[0]) is int:
            return struct.pack(f"<IIQ{len(value)}q", 9, 11, len(value), *value)
        elements = [packed(v) for v in value] or [struct.pack("<I", 4)]
        return (
            struct.pack("<I", 9)
            + elements[0][:4]
            + struct.pack("<Q", len(value))
            + b"".join(e[4:] for e in elements)
        )
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + string(value)
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    return (
        struct.pack("<Ii", 5, value) if -(2**31) <= value < 2**31 else struct.pack("<IQ", 10, value % 2**64)
    )


def string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def gguf_bytes(fields: dict, tensors: dict = TENSORS) -> tuple[bytes, int]:
    """The content of a GGUF file, and where its header ends."""
    places, at = b"", 0
    for name, shape in tensors.items():
        places += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], 0, at)
        at += -(-4 * int(np.prod(shape)) // 32) * 32
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    header += b"".join(string(name) + packed(value) for name, value in fields.items() if value is not None)
    header += places
    header += bytes(-len(header) % 32)
    return header + np.linspace(-1, 1, at // 4, dtype="<f4").tobytes(), len(header)


def open_and_read(file: Path, *names: list[str]) -> object:
    decoder = attempt(lambda: open_decoder(file), [file.name], *names)
    if decoder is not None:
        attempt(lambda: decoder.load(torch.float32), [file.name], ["tensor '"])
        attempt(lambda: decoder.tokenizer(["ab a"], "", 9), ["nothing: it has a right tokenizer"])
    return decoder


@long_too(150, 5000)
def test_gguf_fields(tmp_path, count):
    def body(changes, kind):
        fields = FIELDS | {"tokenizer.ggml.model": kind} | changes
        fields = {name: value for name, value in fields.items() if value is not None}
        (tmp_path / "d.gguf").write_bytes(gguf_bytes(fields)[0])
        # a size that is right in itself may be of other tensors, and a list of tokens of another vocabulary
        related = ["tokenizer.ggml."] if "tokenizer.ggml.tokens" in changes else ["tokenizer.ggml.model"]
        open_and_read(tmp_path / "d.gguf", [*changes, *related, "tensor '", "it holds '"])

    kinds = st.sampled_from(["gpt2", "llama"])
    elements = (
        st.sampled_from([0, 1, 2, 3, 6, -1, 2**40]),
        st.sampled_from([0.0, -1.0, float("nan"), float("inf")]),
        st.sampled_from(["", " ", "a", "b", "ab", "a b", "a  b", "</s>", "$A", "a:0", "\u2581", "a" * 2000]),
        st.booleans(),
    )
    arrays = st.one_of(*(st.lists(element, max_size=7) for element in elements))
    plain = LEAVES.filter(lambda v: not isinstance(v, int) or -(2**63) <= v < 2**64)
    value = plain | arrays | st.sampled_from(RAW)
    assert open_and_read_whole(tmp_path), "an unchanged file must load, or nothing is tested"
    check_all(count, body, st.dictionaries(st.sampled_from([*FIELDS]), value, min_size=1, max_size=2), kinds)


def open_and_read_whole(tmp_path: Path) -> bool:
    for kind in ("gpt2", "llama"):
        (tmp_path / "d.gguf").write_bytes(gguf_bytes(FIELDS | {"tokenizer.ggml.model": kind})[0])
        if open_and_read(tmp_path / "d.gguf") is None:
            return False
    return True


@long_too(100, 5000)
def test_gguf_files_with_broken_bytes(tmp_path, count):
    whole, length = gguf_bytes(FIELDS)

    def body(draw):
        (tmp_path / "d.gguf").write_bytes(flip(draw, whole, length))
        open_and_read(tmp_path / "d.gguf")

    check_all(count, body, st.data())
