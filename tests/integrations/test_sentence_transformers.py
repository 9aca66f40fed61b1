"""The model in sentence-transformers."""

import fnmatch
import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import LayerNorm

from nvembed_fast import NVEmbed
from nvembed_fast.checkpoint import demo
from nvembed_fast.checkpoint.pipeline import OURS
from nvembed_fast.integrations.sentence_transformers import load
from nvembed_fast.precision import quantized, value_ranges
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


@pytest.fixture(scope="module")
def model(saved) -> SentenceTransformer:
    """One for all tests that leave it as it is."""
    return load(saved, device="cpu")


@pytest.fixture
def own_model(saved) -> SentenceTransformer:
    return load(saved, device="cpu")


def test_a_saved_model_gives_the_vectors_of_encode(saved, encoder):
    for model in (load(saved), SentenceTransformer(str(saved), trust_remote_code=True)):
        got = model.encode(TEXTS, prompt=PROMPT, batch_size=2)
        np.testing.assert_allclose(got, encoder.encode(TEXTS, PROMPT, output="numpy"), rtol=0, atol=1e-6)
        assert model.get_embedding_dimension() == 64 and model.similarity_fn_name == "cosine"


def test_a_home_directory_is_found(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(saved)
    assert load("~/model").prompts["query"].startswith("Instruct: ")


@pytest.mark.parametrize("kind", ["saved", "published"])
def test_keywords_are_those_of_any_folder(kind, saved, tiny_directory):
    folder = saved if kind == "saved" else tiny_directory
    model = load(
        folder,
        prompts={"other": "x: "},
        default_prompt_name="other",
        similarity_fn_name="dot",
        truncate_dim=7,
        trust_remote_code=True,
    )
    assert set(model.prompts) == {"query", "document", "other"} and model.default_prompt_name == "other"
    assert model.similarity_fn_name == "dot" and model.encode(TEXTS).shape == (5, 7)
    for keywords in (
        {"processor_kwargs": {"padding_side": "left"}},
        {"config_kwargs": {"is_causal": True}},
        {"backend": "onnx"},
    ):
        with pytest.raises(
            ValueError, match=f"NVEmbedModule.*{'torch' if 'backend' in keywords else [*keywords][0]}"
        ):
            load(folder, **keywords)
    for name in ("use_auth_token", "tokenizer_kwargs", "model_name_or_path", "modules", "unknown"):
        with pytest.raises(TypeError, match=name):
            load(folder, **{name: "x"})


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


def test_saving_by_the_librarys_own_call_keeps_everything(own_model, tmp_path):
    own_model.max_seq_length = 9
    own_model.prompts = {"query": "find: ", "document": "", "other": "x: "}
    own_model.truncate_dim = 48
    own_model.save_pretrained(str(tmp_path / "out"))
    again = load(tmp_path / "out")
    assert again.max_seq_length == 9 and again.prompts == own_model.prompts
    for first, second in zip(own_model.state_dict().items(), again.state_dict().items(), strict=True):
        assert first[0] == second[0] and torch.equal(first[1], second[1])
    long = [text * 5 for text in TEXTS]
    with pytest.warns(TextsCut, match="texts are cut at max_seq_length=9 tokens"):
        wanted = own_model.encode_query(long)
    with pytest.warns(TextsCut):
        np.testing.assert_array_equal(again.encode_query(long), wanted)
    assert wanted.shape == (5, 48)
    # and once more over itself
    again.save_pretrained(str(tmp_path / "out"))
    (tmp_path / "out" / "README.md").write_text("a card")
    again = load(tmp_path / "out")
    assert again.prompts == own_model.prompts
    again.save_pretrained(str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "README.md").read_text() == "a card"
    # and by the encoder, which has the same length
    encoder = NVEmbed.from_pretrained(tmp_path / "out")
    got = encoder.encode(long, own_model.prompts["query"], output="numpy")
    np.testing.assert_allclose(got[:, :48], wanted, rtol=0, atol=1e-6)
    encoder.max_seq_length = 4096
    encoder.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.max_seq_length == 4096 and again.prompts == own_model.prompts


@pytest.mark.parametrize("kind, value", [("ours", 64), ("ours", None), ("other", 32768)])
def test_the_length_is_that_of_the_encoder(kind, value, saved, tmp_path):
    """The published directories have the length of other code."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    if kind == "other":
        modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": value}))
    wanted = 64 if value == 64 else 4096
    assert load(tmp_path).max_seq_length == NVEmbed.from_pretrained(tmp_path).max_seq_length == wanted


def test_modules_behind_the_model_run_and_stay(own_model, tmp_path):
    own_model.append(Dense(64, 32))
    for _ in range(2):
        own_model.save_pretrained(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="Dense, which does not run here"):
        NVEmbed.from_pretrained(tmp_path / "out")
    own_model[0].encoder.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out", device="cpu")
    np.testing.assert_array_equal(again.encode(TEXTS), own_model.encode(TEXTS))
    assert again.get_embedding_dimension() == 32
    # after a killed save, too: see `files.current`
    (tmp_path / "out" / ".saved").mkdir()
    for file in [path for path in (tmp_path / "out").iterdir() if path.is_file()]:
        file.rename(tmp_path / "out" / ".saved" / file.name)
    np.testing.assert_array_equal(load(tmp_path / "out").encode(TEXTS), own_model.encode(TEXTS))


def test_modules_behind_a_model_in_half_precision(own_model, tmp_path):
    own_model.append(Dense(64, 32))
    own_model.append(LayerNorm(32))
    own_model.append(Normalize())
    own_model.save_pretrained(str(tmp_path))
    wanted, half = own_model.encode(TEXTS), {"dtype": "bfloat16"}
    for again in (
        load(tmp_path, device="cpu", model_kwargs=half),
        SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True, model_kwargs=half),
    ):
        assert again[0].encoder.dtype == torch.bfloat16
        np.testing.assert_allclose(again.encode(TEXTS), wanted, rtol=0, atol=0.05)


def test_a_damaged_module_is_named(own_model, tmp_path):
    own_model.append(Dense(64, 32))
    own_model.save_pretrained(str(tmp_path))
    for name, content in (("model.safetensors", b"x"), ("config.json", b"[1]"), ("config.json", b"{}")):
        (tmp_path / "1_Dense" / name).write_bytes(content)
        with pytest.raises(ValueError, match="1_Dense holds no Dense that can be loaded: "):
            load(tmp_path)
    (tmp_path / "config_sentence_transformers.json").write_text('{"prompts": [1]}')
    with pytest.raises(ValueError, match="config_sentence_transformers.json: prompts must be an object"):
        load(tmp_path)


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


STRANGE = [
    ([OURS, "somewhere.X"], "", "names somewhere.X, which is of neither this package"),
    ([OURS, "evil.X"], "", "names evil.X, which"),
    (
        [OURS, "sentence_transformers.base.modules.router.Router"],
        "router_config.json",
        "router.Router, which",
    ),
    ([OURS, "sentence_transformers.base.modules.Transformer"], "config.json", "modules.Transformer, which"),
    (["sentence_transformers.base.modules.Transformer", OURS], "config.json", "must name .* first"),
    ([OURS, OURS], "", "must name .* first"),
    ([OURS, "sentence_transformers.base.modules.dense.Dense"], "config.json", "holds no Dense .*evil.X"),
]


@pytest.mark.parametrize(("types", "file", "message"), STRANGE)
def test_code_of_others_is_not_run(types, file, message, saved, tmp_path, monkeypatch):
    """By modules.json, by what a Router or a Transformer names, or as an activation function."""
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "evil.py").write_text("raise SystemExit('code of others ran')\n")
    modules = [
        {"idx": place, "name": str(place), "path": "" if kind == OURS else f"{place}_X", "type": kind}
        for place, kind in enumerate(types)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    named = {
        "types": {"query_0_X": "evil.X"}, "structure": {"query": ["query_0_X"]}, "parameters": {},
        "model_type": "evil", "auto_map": {"AutoConfig": "evil.X", "AutoModel": "evil.X"},
    }  # fmt: skip
    if "Dense" in types[-1]:
        named = {"in_features": 64, "out_features": 32, "activation_function": "evil.X"}
    for place in range(2):
        (tmp_path / f"{place}_X").mkdir()
        (tmp_path / f"{place}_X" / (file or "config.json")).write_text(json.dumps(named))
        (tmp_path / f"{place}_X" / "evil.py").write_text("raise SystemExit('code of others ran')\n")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, device="cpu")


def test_one_commit_of_the_hub_is_checked_and_loaded(own_model, tmp_path, monkeypatch):
    """Between its two answers the simulated hub gets another commit, which names code."""
    own_model.append(Dense(64, 32))
    commits = {}
    for name in ("good", "evil"):
        commits[name] = tmp_path / name
        own_model.save_pretrained(str(commits[name]))
    (commits["evil"] / "modules.json").write_text(json.dumps([{"type": OURS}, {"type": "evil.X"}]))
    asked = []

    def snapshot(name, *, revision, allow_patterns, **keywords):
        asked.append(revision)
        given = commits["good" if len(asked) == 1 else revision or "evil"]
        kept = tmp_path / "cache" / given.name
        for file in (path for path in given.rglob("*") if path.is_file()):
            inside = str(file.relative_to(given))
            if any(fnmatch.fnmatch(inside, pattern) for pattern in allow_patterns):
                (kept / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, kept / inside)
        return str(kept)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    got = load("someone/model", device="cpu")
    assert asked[0] is None and set(asked[1:]) == {"good"}
    np.testing.assert_array_equal(got.encode(TEXTS), own_model.encode(TEXTS))


def test_the_demo_and_errors_of_the_hub(saved, monkeypatch):
    """Where the hub answers."""

    def answer(name, *_, **__):
        kind = errors.GatedRepoError if name == "a/gated" else errors.RepositoryNotFoundError
        error = kind.__new__(kind)  # they want a response object
        error.args, error.response = ("404 Client Error.",), SimpleNamespace(status_code=404)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    monkeypatch.setattr("sentence_transformers.util.file_io.hf_hub_download", answer)
    monkeypatch.setattr(demo, "expanded", lambda *_, **__: saved)
    assert load("demo", device="cpu").encode(TEXTS).shape == (5, 64)
    with pytest.raises(FileNotFoundError, match="no directory a/typo, and the hub has no 'a/typo'"):
        load("a/typo")
    with pytest.raises(FileNotFoundError, match="'a/gated' is gated: accept its terms"):
        load("a/gated")


def test_token_embeddings_are_the_states_behind_the_head(model, encoder):
    got = model.encode(TEXTS, output_value="token_embeddings", batch_size=3)
    tokens = encoder.text_tokenizer(TEXTS, "", 4096)
    for ids, states in zip(tokens.ids, got, strict=True):
        row = torch.from_numpy(ids.astype(np.int64))[None]
        torch.testing.assert_close(states, encoder(row, return_dict=False)[0][0], rtol=0, atol=1e-5)


def test_all_outputs_of_a_text(model):
    rows = model.encode(TEXTS, output_value=None)
    wanted = model.encode(TEXTS)
    np.testing.assert_array_equal(np.stack([row["sentence_embedding"].numpy() for row in rows]), wanted)


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.long)])
def test_processes_with_a_model_each(number, model, encoder):
    got = model.encode(TEXTS, prompt=PROMPT, device=["cpu"] * number, chunk_size=3)
    np.testing.assert_allclose(got, encoder.encode(TEXTS, PROMPT, output="numpy"), rtol=0, atol=1e-6)


def test_data_parallel_is_refused(model):
    with pytest.raises(ValueError, match="DataParallel cannot cut a packed batch"):
        model[0]._replicate_for_data_parallel()
    features = model.preprocess(TEXTS)
    for cut in (
        {**features, "input_ids": features["input_ids"][:, :-1]},
        {**features, "cu_seq_lens_q": features["cu_seq_lens_q"][1:]},
    ):
        with pytest.raises(ValueError, match="a packed batch must not be cut or stacked"):
            model(cut)
    with pytest.raises(ValueError, match="no pool_mask: make them with model.preprocess"):
        model({"input_ids": features["input_ids"]})


def test_nothing_is_ignored_in_silence(saved):
    for keywords in (
        {"processor_kwargs": {"padding_side": "left"}},
        {"config_kwargs": {"is_causal": True}},
        {"model_kwargs": {"cuda_graphs": True}},
        {"backend": "onnx"},
    ):
        with pytest.raises(ValueError, match="NVEmbedModule|cuda_graphs"):
            load(saved, **keywords)
    with pytest.raises(TypeError, match="quantization_config"):
        load(saved, model_kwargs={"quantization_config": object()})
    model = load(saved, model_kwargs={"dtype": "bfloat16", "impl": "torch", "latents": "direct"})
    placement = model[0].encoder.placement
    assert (placement.dtype, placement.impl, placement.latents) == (torch.bfloat16, "torch", "direct")
    with pytest.raises(ValueError, match="NVEmbedModule takes no processing_kwargs"):
        model.encode(TEXTS, processing_kwargs={"text": {"max_length": 3}})
    with pytest.raises(ValueError, match=r"prompts\[0\] must be a string"):
        model.preprocess([3], prompt=None)


def test_a_vector_that_is_not_finite_is_an_error(own_model):
    with torch.no_grad():
        own_model[0].network.embedding_model.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="a vector is NaN or Inf in torch.float32"):
        own_model.encode(TEXTS)


def test_changed_weights_change_the_vectors_and_unchanged_ones_are_built_once(own_model, monkeypatch):
    head = own_model[0].network.head
    built, real = [], type(head)._build
    monkeypatch.setattr(type(head), "_build", lambda self: built.append(1) or real(self))
    before = own_model.encode(TEXTS, batch_size=1)
    assert len(built) == 1 and all(weight.requires_grad for weight in own_model.parameters())
    head.to_out.weight.data.mul_(3)
    assert np.abs(own_model.encode(TEXTS) - before).max() > 1e-3


def test_information_retrieval(model):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    corpus = {str(index): text for index, text in enumerate(TEXTS)}
    evaluate = InformationRetrievalEvaluator({"q": "one"}, corpus, {"q": {"0"}}, write_csv=False)
    scores = model.evaluate(evaluate)
    assert scores["cosine_ndcg@10"] > 0


def test_similarity_evaluator_equals_our_cosines(model, encoder):
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    first, second = encoder.encode(TEXTS, output="numpy"), encoder.encode(TEXTS[::-1], output="numpy")
    scores = (first * second).sum(1).tolist()
    evaluate = EmbeddingSimilarityEvaluator(
        TEXTS, TEXTS[::-1], scores, main_similarity="cosine", write_csv=False
    )
    assert model.evaluate(evaluate)["spearman_cosine"] == pytest.approx(1.0)


def test_hard_negatives(model):
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    pairs = Dataset.from_dict({"query": ["one", "two"], "answer": ["first text", "second text"]})
    mined = mine_hard_negatives(
        pairs, model, corpus=["a", "b", "c"], num_negatives=1, query_prompt=PROMPT, verbose=False
    )
    assert len(mined) == 2 and set(mined["negative"]) <= {"a", "b", "c", "first text", "second text"}


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("width", [64, 13])
def test_precisions_are_the_librarys_own_to_the_byte(precision, width, encoder):
    from sentence_transformers.util import quantize_embeddings

    vectors = np.random.default_rng(0).normal(size=(300, width)).astype(np.float32)
    np.testing.assert_array_equal(quantized(vectors, precision), quantize_embeddings(vectors, precision))
    ranges = value_ranges(vectors[:50])
    if precision in ("int8", "uint8"):
        wanted = quantize_embeddings(vectors, precision, calibration_embeddings=vectors[:50])
        np.testing.assert_array_equal(quantized(vectors, precision, ranges), wanted)


@pytest.mark.filterwarnings("ignore:the ranges of int8")
def test_precision_and_cut_in_both_calls(model, encoder):
    for keywords in ({"precision": "int8"}, {"precision": "ubinary", "truncate_dim": 20}, {"truncate_dim": 7},
                     {"truncate_dim": 7, "normalize_embeddings": True}):  # fmt: skip
        got, wanted = model.encode(TEXTS, **keywords), encoder.encode(TEXTS, output="numpy", **keywords)
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        far = np.abs(got.astype(np.float64) - wanted).max()
        assert far <= (1 if keywords.get("precision") == "int8" else 1e-6)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, "meta"], ids=str)
def test_the_callers_default_dtype_and_device_change_nothing(default, model, saved, encoder):
    """The device "meta" stands in for a GPU."""
    wanted = encoder.encode(TEXTS, PROMPT, output="numpy")
    before = torch.get_default_dtype()
    try:
        torch.set_default_device(default if default == "meta" else None)
        torch.set_default_dtype(before if default == "meta" else default)
        got = [each.encode(TEXTS, prompt=PROMPT) for each in (model, load(saved, device="cpu"))]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    for vectors in got:
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, wanted, rtol=0, atol=1e-6)
