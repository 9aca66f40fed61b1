"""The name of a vector space: what changes it, what does not, and that it stays what it was."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import QUERY, TINY, copy_tiny, edit_json, edit_weights, save_sharded
from tokenizers import Tokenizer, models

from nvembed_fast import NVEmbed, checkpoint, fingerprint, tokenization
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.tokenization import TextTokenizer

CONFIG = NVEmbedConfig.from_file(TINY / "config.json")
WEIGHTS = "e7245ce820a57a63f868f46a8fb72aff"


def stored(directory) -> str:
    return fingerprint.of_weights(checkpoint.stored_samples(directory, CONFIG))


def tokenizer(*words: str, eos: str = "</s>") -> TextTokenizer:
    vocabulary = {word: i for i, word in enumerate(("<unk>", "</s>", "<e>", *words))}
    return TextTokenizer(Tokenizer(models.WordLevel(vocabulary, "<unk>")), eos)


def test_names_stay_what_they_were():
    assert stored(TINY) == WEIGHTS
    assert fingerprint.of_texts(["a", "\u00e9", ""]) == "4024a6c71ef1a7c9a2d48245f8d62499"
    assert (
        fingerprint.of_model(WEIGHTS, CONFIG, SimpleNamespace(definition="{}"))
        == "3a9e7fa13f73a62e2c595d89c2d16910"
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_weights_saved_again_without_loss_keep_their_name(tmp_path, dtype):
    model = checkpoint.load_model(TINY, dtype=dtype)
    assert fingerprint.of_weights(checkpoint.model_samples(model)) == WEIGHTS
    checkpoint.save_model(model, tmp_path / "again")
    assert stored(tmp_path / "again") == WEIGHTS


def test_shards_have_the_name_of_one_file(tmp_path):
    assert stored(save_sharded(copy_tiny(tmp_path / "shards"))) == WEIGHTS


def test_other_weights_have_another_name(tmp_path):
    query = load_file(TINY / "model.safetensors")[QUERY]
    key = QUERY.replace("1.self", "2.self")
    changed, last = query * 1.001, query.clone()
    last[-1, -1] += 0.01
    cases = [{QUERY: changed}, {QUERY: last}, {QUERY: query.flip(1)}, {key: query}]
    names = {stored(TINY)}
    for number, changes in enumerate(cases, start=1):
        directory = copy_tiny(tmp_path / f"{number}")
        edit_weights(directory, **changes)
        names.add(stored(directory))
    assert len(names) == 1 + len(cases)


def test_the_rule_the_shapes_and_the_tokenizer_count_and_the_stored_dtype_does_not():
    def name(config=CONFIG, words=("a", "b"), eos="</s>") -> str:
        return fingerprint.of_model(WEIGHTS, config, tokenizer(*words, eos=eos))

    assert name(replace(CONFIG, torch_dtype="bfloat16")) == name()
    others = [
        fingerprint.of_model("other", CONFIG, tokenizer("a", "b")),
        name(replace(CONFIG, pooling_start="text_offset")),
        name(replace(CONFIG, is_mask_instruction=False)),
        name(replace(CONFIG, text_config=replace(CONFIG.text_config, rope_theta=1e6))),
        name(words=("b", "a")),
        name(eos="<e>"),
    ]
    assert len({name(), *others}) == 1 + len(others)


def test_a_tokenizer_counts_by_its_content(tmp_path, monkeypatch):
    found = tokenizer("a")
    found.write(tmp_path)
    file = tmp_path / "tokenizer.json"
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    edit_json(file, lambda raw: raw.update(truncation=cut))
    assert TextTokenizer.from_directory(tmp_path).definition == found.definition
    file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True, indent=1))
    again, found_definition = TextTokenizer.from_directory(tmp_path), found.definition
    assert again.definition == found_definition
    # a file is parsed once. The end mark, and a tokenizer without a file, may change
    monkeypatch.setattr(tokenization.json, "loads", None)
    assert again.definition == found_definition
    again.eos_token = "<e>"
    assert again.definition != found_definition
    monkeypatch.undo()
    found.backend.add_tokens(["b"])
    assert '"b"' in found.definition


def test_a_checkpoint_has_one_name_in_every_dtype_until_its_weights_change(tmp_path):
    directory = copy_tiny(tmp_path / "m")
    tokenizer("a").write(directory)
    names = {}
    for dtype in ("float32", "bfloat16"):
        encoder = NVEmbed.from_pretrained(directory, dtype=dtype)
        names[dtype] = encoder.fingerprint
        mlp = encoder.model.embedding_model.layers[0].mlp
        mlp.down_proj.weight.data.mul_(2)
        assert encoder.fingerprint != names[dtype]
        mlp.down_proj.weight.data.div_(2)
        assert encoder.fingerprint == names[dtype]
    assert names["float32"] == names["bfloat16"]
    # a module around a weight gives it another name, and may do anything
    mlp.down_proj = torch.nn.Sequential(mlp.down_proj)
    assert encoder.fingerprint != names["float32"]


def test_texts_are_named_with_their_borders_and_their_order():
    cases = [["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "c", ""], ["\ud800"], []]
    assert len({fingerprint.of_texts(texts) for texts in cases}) == len(cases)
