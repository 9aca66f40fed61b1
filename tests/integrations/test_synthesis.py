"""Synthesis with its libraries: a decoder under llguidance, and the check of languages."""

import json

import py3langid
import pytest
from tiny_decoders import transformers_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nvembed_fast.cli.synthesize import _language_of
from nvembed_fast.curation.engines import LocalModel
from nvembed_fast.curation.prompts import LANGUAGES, brainstorm, example, example_of, tasks_of

REQUESTS = [example("Given a word, find another", "short-short", n, 0, ["en"]) for n in range(3)]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """Random weights over single bytes, with more rows than the tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("decoder")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "</s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    transformers_model("Llama", vocab_size=300, eos_token_id=256).save_pretrained(folder)
    return str(folder)


def test_a_random_model_writes_what_the_schema_asks_for(decoder):
    engine = LocalModel(decoder, device="cpu", max_tokens=400, max_characters=12)
    replies = [engine.ask(request) for request in REQUESTS]
    for reply in replies:
        assert reply.outcome == "answered"
        assert all(1 <= len(text) <= 12 for text in json.loads(reply.text).values())
        assert example_of(reply.text)
    assert len({reply.text for reply in replies}) == 3
    assert engine.ask(REQUESTS[0]) == replies[0] != engine.ask(REQUESTS[0], 1)
    tasks = LocalModel(decoder, device="cpu", max_tokens=900, max_characters=20)
    reply = tasks.ask(brainstorm("short-long", 0, 0))
    assert reply.outcome == "answered" and len(json.loads(reply.text)["tasks"]) <= 20
    assert all(len(task) <= 20 for task in tasks_of(reply.text))


def test_an_answer_that_does_not_end_is_truncated(decoder):
    engine = LocalModel(decoder, device="cpu", max_tokens=20, max_characters=12)
    assert engine.ask(REQUESTS[0]).outcome == "truncated"


def test_languages_are_told_apart():
    language_of = _language_of()
    english = "The train left the station late in the evening, and nobody was there to wave. " * 2
    german = "Der Zug verliess den Bahnhof am spaeten Abend, und niemand war da, um zu winken. " * 2
    assert (language_of(english), language_of(german)) == ("en", "de")
    assert set(LANGUAGES) <= {code for code, _ in py3langid.rank(english)}
