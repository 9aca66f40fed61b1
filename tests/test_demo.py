"""The demo's decoder behind a fresh head on real text, its texts, and the files of the demo model."""

import sys

import numpy as np
import pytest

from examples import demo
from nvembed_fast import NVEmbed, query_instruction
from nvembed_fast.checkpoint import demo as shipped
from nvembed_fast.evaluation import docstrings
from nvembed_fast.new_model import init_model

TINY_TEXTS = ["a", "I", "of the", "one two three", "", "\n", "42"]


@pytest.fixture(scope="module")
def model(smollm2_file, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "smollm2"
    init_model(smollm2_file, directory)
    return NVEmbed.from_pretrained(directory, device="cpu", dtype="float32")


@pytest.mark.slow
def test_one_text_one_vector(model, all_cores):
    texts = TINY_TEXTS + [t[:400] for t in list(docstrings.standard_library().values())[:9]]
    lengths = model.text_tokenizer(texts, "", 4096).lengths()
    assert {1, 2, 3} <= set(lengths) and max(lengths) > 50
    together = model.encode(texts, output="numpy")
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = model.encode([texts[i] for i in order], output="numpy", max_batch_tokens=64)
    alone = np.stack([model.encode(t, output="numpy") for t in texts])
    for other in (alone, shuffled[np.argsort(order)]):
        assert np.linalg.norm(other - together, axis=1).max() < 5e-5  # unit vectors: relative
    # and the bound means something: different texts are further apart than that
    assert np.linalg.norm(together[0] - together[1]) > 1e-3


@pytest.mark.slow
def test_the_offset_rule_pools_the_text_and_nothing_before(model):
    """With this tokenizer the count of the published rule would also drop the text's first word."""
    instruction = query_instruction("find the word")
    window = model.text_tokenizer(["remove a directory"], instruction, 64)
    pooled = model.text_tokenizer.backend.decode(
        window.ids[0][window.first_pooled[0] :], skip_special_tokens=False
    )
    assert pooled == f" remove a directory{model.text_tokenizer.eos_token}"
    assert window.first_pooled[0] < model.text_tokenizer.instruction_length(instruction)


def test_fewer_texts_keep_all_answers(tiny_directory, tmp_path, monkeypatch, capsys):
    answers = {f"{a}: {n}" for n, q in enumerate(docstrings.questions("demo")) for a in q.answers}
    library = {f"m:f{n}": f"filler number {n}" for n in range(300)}
    library |= {text.rsplit(": ", 1)[0]: text for text in answers}
    encoded = []
    encode = NVEmbed.encode_document

    def spy(self, texts, **more):
        encoded.extend(texts)
        return encode(self, texts, **more)

    monkeypatch.setattr(NVEmbed, "encode_document", spy)
    monkeypatch.setattr(demo, "load_model", lambda cache: NVEmbed.from_pretrained(tiny_directory))
    monkeypatch.setattr(demo, "library", lambda cache: library)
    minimum = docstrings.min_number()
    words = ["demo.py", "--cache", str(tmp_path), "--texts"]
    monkeypatch.setattr(sys, "argv", [*words, str(minimum)])
    (tmp_path / "demo").mkdir()
    demo.main()
    assert len(encoded) == minimum < len(library) and answers <= set(encoded)
    demo.main()
    assert len(encoded) == minimum, "the vectors are kept"
    monkeypatch.setattr(sys, "argv", [*words, str(minimum - 1)])
    with pytest.raises(SystemExit) as stop:
        demo.main()
    assert (
        stop.value.code == 2 and f"must be at least {minimum}, got {minimum - 1}" in capsys.readouterr().err
    )


def test_the_shipped_files_are_small_and_have_a_card():
    names = {path.name for path in shipped.SHIPPED.iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md"}
    assert sum((shipped.SHIPPED / name).stat().st_size for name in names) < 45_000_000
    card = (shipped.SHIPPED / "README.md").read_text()
    for part in ("## Training text", "Licence", "Limits", "## Scores"):
        assert part in card


def test_a_stopped_run_keeps_the_vectors_it_has(tiny_directory, tmp_path, monkeypatch):
    library = {f"m:f{n}": f"filler number {n}" for n in range(300)}
    library |= {a.rsplit(": ", 1)[0]: a for q in docstrings.questions("demo") for a in q.answers}
    encoded, encode = [], NVEmbed.encode_document

    def stopped(self, texts, **more):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(texts)
        return encode(self, texts, **more)

    monkeypatch.setattr(demo, "load_model", lambda cache: NVEmbed.from_pretrained(tiny_directory))
    monkeypatch.setattr(demo, "library", lambda cache: library)
    minimum = docstrings.min_number()
    monkeypatch.setattr(demo, "PART", minimum // 2)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--cache", str(tmp_path), "--texts", str(minimum)])
    (tmp_path / "demo").mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(NVEmbed, "encode_document", stopped)
        demo.main()
    with monkeypatch.context() as patch:
        patch.setattr(NVEmbed, "encode_document", lambda *a, **k: encoded.append(a[1]) or encode(*a, **k))
        demo.main()
    assert [len(texts) for texts in encoded] == [minimum // 2, minimum // 2, minimum % 2]
    assert len({text for texts in encoded for text in texts}) == minimum
