"""The model in sentence-transformers."""

import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from nvembed_fast import NVEmbed
from nvembed_fast.integrations.sentence_transformers import load
from nvembed_fast.stream import TextsCut

pytestmark = pytest.mark.filterwarnings("ignore::nvembed_fast.stream.TextsCut")
TEXTS = ["one", "two words", "a third text, which is longer than the others", "", "five"]
PROMPT = "Instruct: find the text\nQuery: "


@pytest.fixture(scope="module")
def encoder(tiny_directory) -> NVEmbed:
    return NVEmbed.from_pretrained(tiny_directory, device="cpu")


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    """As this package saves a model."""
    directory = tmp_path_factory.mktemp("saved")
    encoder.save_pretrained(directory)
    return directory


@pytest.fixture
def model(saved) -> SentenceTransformer:
    return load(saved, device="cpu")


def test_a_saved_model_gives_the_vectors_of_encode(saved, encoder):
    for model in (load(saved), SentenceTransformer(str(saved), trust_remote_code=True)):
        got = model.encode(TEXTS, prompt=PROMPT, batch_size=2)
        np.testing.assert_allclose(got, encoder.encode(TEXTS, PROMPT, output="numpy"), rtol=0, atol=1e-6)
        assert model.get_embedding_dimension() == 64 and model.similarity_fn_name == "cosine"


def test_a_published_folder_needs_no_modules_json(tiny_directory, encoder):
    assert not (tiny_directory / "modules.json").exists(), "so this test would prove nothing"
    got = load(tiny_directory).encode_query(TEXTS)
    task = "Given a question, retrieve passages that answer the question"
    wanted = encoder.encode_query(TEXTS, task, output="numpy")
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def test_queries_carry_the_saved_prompt_and_documents_none(model, encoder):
    task = "Given a question, retrieve passages that answer the question"
    queries, documents = model.encode_query(TEXTS), model.encode_document(TEXTS)
    np.testing.assert_allclose(queries, encoder.encode_query(TEXTS, task, output="numpy"), rtol=0, atol=1e-6)
    np.testing.assert_allclose(documents, encoder.encode(TEXTS, output="numpy"), rtol=0, atol=1e-6)


def test_saving_by_the_librarys_own_call_keeps_everything(model, tmp_path):
    model.max_seq_length = 9
    model.prompts = {"query": "find: ", "document": "", "other": "x: "}
    model.truncate_dim = 48
    model.save_pretrained(str(tmp_path / "out"))
    again = load(tmp_path / "out")
    assert again.max_seq_length == 9 and again.prompts == model.prompts
    for first, second in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert first[0] == second[0] and torch.equal(first[1], second[1])
    long = [text * 5 for text in TEXTS]
    with pytest.warns(TextsCut, match="texts are cut at max_seq_length=9 tokens"):
        wanted = model.encode_query(long)
    with pytest.warns(TextsCut):
        np.testing.assert_array_equal(again.encode_query(long), wanted)
    assert wanted.shape == (5, 48)
    # and once more over itself
    again.save_pretrained(str(tmp_path / "out"))
    assert load(tmp_path / "out").prompts == model.prompts
    assert NVEmbed.from_pretrained(tmp_path / "out").encode("one").shape == (64,)


def test_a_typeerror_in_preprocess_cannot_switch_the_mask_off(model, monkeypatch):
    real, calls = type(model[0].encoder.text_tokenizer).__call__, []

    def failing(self, texts, instruction, max_length):
        calls.append(instruction)
        if len(calls) == 1:
            raise TypeError("planted")
        return real(self, texts, instruction, max_length)

    monkeypatch.setattr(type(model[0].encoder.text_tokenizer), "__call__", failing)
    with pytest.raises(ValueError, match="cannot be tokenized: planted"):
        model.encode(TEXTS, prompt=PROMPT)
    assert calls == [PROMPT], "it was called again"


@pytest.mark.parametrize("kind", [TypeError, AttributeError])
def test_an_error_around_preprocess_is_not_swallowed(kind, model, monkeypatch):
    """The library's second call has no prompt, and preprocess cannot be called without one."""
    real, calls = type(model[0]).preprocess, []

    def failing(self, *arguments, **keywords):
        calls.append(keywords)
        if len(calls) == 1:
            raise kind("planted")
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(type(model[0]), "preprocess", failing)
    with pytest.raises(TypeError, match="prompt"):
        model.encode(TEXTS, prompt=PROMPT)


def test_an_old_folder_without_modules_json_is_told(saved, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(saved, old)
    (old / "modules.json").unlink()
    with pytest.raises(ValueError, match="nvembed"):
        SentenceTransformer(str(old), trust_remote_code=True)


def test_code_of_others_is_not_run(saved, tmp_path):
    strange = tmp_path / "strange"
    shutil.copytree(saved, strange)
    modules = json.loads((strange / "modules.json").read_text())
    modules.append({"idx": 1, "name": "1", "path": "1_X", "type": "somewhere.X"})
    (strange / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="names somewhere.X, which is of neither this package"):
        load(strange)
