import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import TINY
from tiny_decoders import write_tokenizer
from tokenizers import Tokenizer

from nvembed_fast import NVEmbed, NVEmbedConfig, tokenization
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.tokenization import TextTokenizer, check_texts

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenization.json").read_text())


@pytest.fixture
def published(mistral_tokenizer) -> TextTokenizer:
    return TextTokenizer(mistral_tokenizer, "</s>")


def test_golden_rows_are_exact(published):
    assert len(GOLDEN) == 216
    for row in GOLDEN:
        got = published([row["text"]], row["instruction"], row["max_length"])
        assert got.ids[0].tolist() == row["input_ids"], row
        # the original clips the index to the length, here a text that pools nothing is the encoder's error
        assert min(got.first_pooled[0], len(got.ids[0])) == row["first_pooled"], row


def test_texts_together_equal_texts_alone(published):
    rows = [r for r in GOLDEN if not r["instruction"] and r["max_length"] == 4096]
    got = published([r["text"] for r in rows], "", 4096)
    assert [i.tolist() for i in got.ids] == [r["input_ids"] for r in rows]


class Watched:
    """A tokenizer that notes how many characters it is given at once."""

    def __init__(self, backend: Tokenizer):
        self.backend, self.characters = backend, []

    def __getattr__(self, name):
        found = getattr(self.backend, name)
        if not name.startswith("encode_batch"):
            return found
        return lambda texts: self.characters.append(sum(map(len, texts))) or found(texts)


@pytest.mark.parametrize("pooling_start", ["token_count", "text_offset"])
def test_encodings_of_long_texts_are_not_all_in_memory_at_once(mistral_tokenizer, pooling_start, monkeypatch):
    texts = [row["text"] for row in GOLDEN if len(row["text"]) < 500] + ["", "word " * 300]
    tokenizer = TextTokenizer(mistral_tokenizer, "</s>", pooling_start)
    wanted = tokenizer(texts, "find: ", 16)
    tokenizer.backend = Watched(mistral_tokenizer)
    monkeypatch.setattr(tokenization, "_GROUP", 1000)
    got = tokenizer(texts, "find: ", 16)
    assert [ids.tolist() for ids in got.ids] == [ids.tolist() for ids in wanted.ids]
    assert got[1:] == wanted[1:] and wanted.num_cut
    characters = tokenizer.backend.characters
    assert len(characters) > 5 and all(1000 <= size < 2600 for size in characters[:-1])
    assert sum(characters) > 300 * 5 and tokenizer([], "find: ", 16).ids == []


@pytest.mark.parametrize("unit", ["x", "ab", " ", "\n", "\U0001f600"])
def test_megabytes_without_a_space_are_clipped_without_a_trace(published, unit):
    """The kept ids equal those of a text four times as long as what the clip leaves."""
    max_length = 16
    bound = published.max_characters(max_length)
    whole = published.backend.encode(unit * (4 * bound // len(unit))).ids[:max_length]
    start = time.process_time()  # of this process: the machine may be busy
    got = published([unit * (10_000_000 // len(unit))], "", max_length)
    assert time.process_time() - start < 5
    assert got.ids[0].tolist() == whole


@pytest.mark.parametrize("pooling_start", ["token_count", "text_offset"])
def test_megabytes_of_instruction_are_read_once_and_to_the_clip(mistral_tokenizer, pooling_start):
    tokenizer = TextTokenizer(mistral_tokenizer, "</s>", pooling_start)
    instruction, max_length = "find " * 1_000_000, 2048
    start = time.process_time()
    got = tokenizer(["word"] * 100, instruction, max_length)
    assert time.process_time() - start < 2
    assert got.first_pooled == [max_length] * 100 == got.lengths() and got.num_cut == 100
    shorter = tokenizer(["word"], "find " * 3000, max_length)  # on the way of every text
    assert got.ids[0].tolist() == shorter.ids[0].tolist()


def test_text_offset_pools_the_first_word_that_a_count_would_drop(mistral_tokenizer):
    """ "Query:" without the space behind it: the offset rule starts at the text, whatever merges."""
    instruction = "Instruct: find it\nQuery: "
    by_offset = TextTokenizer(mistral_tokenizer, "</s>", "text_offset")(["word more"], instruction, 64)
    tokens = [mistral_tokenizer.id_to_token(i) for i in by_offset.ids[0][by_offset.first_pooled[0] :]]
    assert tokens == ["\u2581word", "\u2581more", "</s>"]


def test_text_offset_of_a_text_cut_inside_its_instruction_is_its_length(mistral_tokenizer):
    tokenizer = TextTokenizer(mistral_tokenizer, "</s>", "text_offset")
    got = tokenizer(["word"], "Instruct: a long instruction that is cut\nQuery: ", 6)
    assert got.first_pooled == [6] == got.lengths()


@pytest.mark.parametrize("rule", ["token_count", "text_offset"])
def test_a_model_may_pool_its_instruction(mistral_tokenizer, rule):
    instruction = "Instruct: find it\nQuery: "
    for masks, first in ((True, 9), (False, 0)):
        tokenizer = TextTokenizer(mistral_tokenizer, "</s>", rule, is_mask_instruction=masks)
        assert tokenizer(["word"], instruction, 64).first_pooled == [first]


def test_a_model_that_pools_the_end_mark_keeps_it(tiny_directory):
    config = NVEmbedConfig.from_file(tiny_directory / "config.json")
    published, tokenizer = (
        TextTokenizer.from_directory(tiny_directory, replace(config, pooling_head=head))
        for head in ("latent", "eos")
    )
    mark = published.backend.token_to_id("</s>")
    texts, instruction = ["two words", "a text of more words than that"], "Query: "
    for max_length, cut in ((7, 1), (64, 0)):
        wanted, got = (t(texts, instruction, max_length) for t in (published, tokenizer))
        assert (wanted.num_cut, got.num_cut, got.first_pooled) == (cut, cut, wanted.first_pooled)
        assert [ids[-1] for ids in got.ids] == [mark, mark]
        assert [ids[:-1].tolist() for ids in got.ids] == [ids[:-1].tolist() for ids in wanted.ids]
    assert published(texts, instruction, 7).ids[1][-1] != mark
    (filled,) = tokenizer(["word"], "find " * 64, 8).ids
    assert filled[-1] == mark and len(filled) == 8


def test_a_token_beyond_the_embedding_is_refused_at_load(tiny_directory, tmp_path):
    for path in tiny_directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    tokenizer = Tokenizer.from_file(str(tiny_directory / "tokenizer.json"))
    tokenizer.add_special_tokens(["[PAD]", "[SEP]"])
    (tmp_path / "tokenizer.json").unlink()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = NVEmbedConfig.from_file(tiny_directory / "config.json")
    larger = replace(config, text_config=replace(config.text_config, vocab_size=32002))
    assert TextTokenizer.from_directory(tmp_path, larger).backend.token_to_id("[SEP]") == 32001
    (tmp_path / "model.safetensors").unlink()  # told before weights are looked for
    message = r"tokenizer.json: token '\[PAD\]' has id 32000 and 1 more, .* has 32000 rows"
    with pytest.raises(ValueError, match=message):
        NVEmbed.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token": ["</s>"]}, r"eos_token must be a token, got \['</s>'\]"),
        ({"eos_token": ""}, "eos_token must be a token, got ''"),
        ({"eos_token": {"lstrip": False}}, r"eos_token must be a token, got \{'lstrip': False\}"),
        ({"eos_token": "<nope>"}, "eos_token: the end mark '<nope>' is not in"),
        ({"eos_token_id": -1}, "eos_token_id must be an integer from 0 to"),
    ],
)
def test_an_end_mark_that_is_none_is_refused_by_its_key(tmp_path, settings, message):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {message}"):
        TextTokenizer.from_directory(tmp_path)


def test_a_tokenizer_without_its_unknown_token_is_refused_at_load(tmp_path):
    """It would fail at the first text with an unknown word."""
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"unk_token": "<unk>"', '"unk_token": "<nope>"'))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer: .*UNK"):
        TextTokenizer.from_directory(tmp_path)


class CountedVocabulary:
    """A tokenizer that counts how often all of its tokens are read, which takes a while."""

    def __init__(self, backend: Tokenizer):
        self.backend, self.count = backend, 0

    def get_vocab(self, **options) -> dict[str, int]:
        self.count += 1
        return self.backend.get_vocab(**options)

    def __getattr__(self, name: str):
        return getattr(self.backend, name)


def test_tokens_are_compared_with_an_embedding_once(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = TextTokenizer.from_directory(tmp_path)
    tokenizer.backend = counted = CountedVocabulary(tokenizer.backend)
    tokenizer.check_ids(1000)
    tokenizer.check_ids(1000)
    assert counted.count == 1
    with pytest.raises(ValueError, match="but the embedding has 1 rows"):
        tokenizer.check_ids(1)
    tokenizer.check_ids(1000)
    tokenizer.backend.add_tokens(["new"])
    with pytest.raises(ValueError, match="token 'new' has id"):
        tokenizer.check_ids(tokenizer.backend.token_to_id("new"))
    before = counted.count
    tokenizer.check_ids(1000)
    assert counted.count == before + 1


def test_a_model_built_by_hand_is_checked(mistral_tokenizer):
    config = NVEmbedConfig.from_file(TINY / "config.json")
    smaller = replace(config, text_config=replace(config.text_config, vocab_size=31999))
    with torch.device("meta"):
        model = NVEmbedModel(smaller)
    with pytest.raises(
        ValueError, match=r"the tokenizer: token '.*' has id 31999, but the embedding has 31999"
    ):
        NVEmbed(model, TextTokenizer(mistral_tokenizer, "</s>"))


def test_rejects_an_unknown_end_mark(mistral_tokenizer):
    with pytest.raises(ValueError, match="end mark '<nope>'"):
        TextTokenizer(mistral_tokenizer, "<nope>")


@pytest.mark.parametrize("wrong", [None, 3, b"bytes", ["nested"]])
def test_check_texts_names_the_index_of_what_is_no_string(wrong):
    with pytest.raises(TypeError, match=r"prompts\[1\] must be a string, got " + type(wrong).__name__):
        check_texts(["fine", wrong])


def test_check_texts_names_the_index_of_a_lone_surrogate():
    with pytest.raises(ValueError, match=r"prompts\[2\] has a lone surrogate at character 1"):
        check_texts(["fine", "caf\u00e9", "x\ud800"])
