"""Local tasks run through mteb with our model, and our loader stands under the published names."""

import hashlib
import importlib
import json
import sys
import tomllib
from pathlib import Path

import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.model_implementations import MODEL_REGISTRY, nvidia_models
from mteb.models.models_protocols import EncoderProtocol
from mteb.types import PromptType
from torch.utils.data import DataLoader

from nvembed_fast import NVEmbed, cli, query_instruction
from nvembed_fast.integrations import mteb as mteb_door
from nvembed_fast.integrations.mteb import PUBLISHED, MTEBEncoder, published_prompts, register

# of instructions.json of NV-Embed-v2, as json.dumps(content, sort_keys=True)
PUBLISHED_LIST = "d735440808e0b4d88707cf56b0331c32d97c5429e5990370b5819cab7c51fb7c"
PROMPTS = Path(mteb_door.__file__).with_name("mteb_prompts.toml")
TEXTS = [f"text number {i} is about {topic}" for i, topic in enumerate(["bread", "trains", "rain"] * 4)]


def metadata(name: str, kind: str, **changes) -> TaskMetadata:
    return TaskMetadata(
        **{
            "name": name,
            "dataset": {"path": "local/data", "revision": "1"},
            "description": "made in the test",
            "type": kind,
            "category": "t2t",
            "modalities": ["text"],
            "eval_splits": ["test"],
            "eval_langs": ["eng-Latn"],
            "main_score": "accuracy",
            "reference": None,
            "date": ("2024-01-01", "2024-01-02"),
            "domains": ["Web"],
            "task_subtypes": [],
            "license": "mit",
            "annotations_creators": "derived",
            "dialect": [],
            "sample_creation": "found",
            "bibtex_citation": "",
            **changes,
        }
    )


class LocalDocs(AbsTaskRetrieval):
    metadata = metadata(
        "LocalDocs", "Retrieval", main_score="ndcg_at_10", prompt={"query": "Given a topic, retrieve texts"}
    )

    def load_data(self, *args, **kwargs):
        corpus = Dataset.from_list([{"id": str(i), "text": t, "title": ""} for i, t in enumerate(TEXTS)])
        queries = Dataset.from_list([{"id": f"q{i}", "text": t.split()[-1]} for i, t in enumerate(TEXTS[:3])])
        wanted = {f"q{i}": {str(i): 1} for i in range(3)}
        split = RetrievalSplitData(corpus=corpus, queries=queries, relevant_docs=wanted, top_ranked=None)
        self.dataset, self.data_loaded = {"default": {"test": split}}, True


class LocalTopics(AbsTaskClassification):
    metadata = metadata("LocalTopics", "Classification", prompt="Classify the topic of the text")
    n_experiments, samples_per_label = 2, 2

    def load_data(self, *args, **kwargs):
        rows = Dataset.from_list([{"text": t, "label": i % 3} for i, t in enumerate(TEXTS)])
        self.dataset, self.data_loaded = DatasetDict({"train": rows, "test": rows}), True


class LocalClusters(AbsTaskClustering):
    metadata = metadata("LocalClusters", "Clustering", main_score="v_measure", prompt="Identify the topic")
    max_document_to_embed, max_fraction_of_documents_to_embed = 12, None
    input_column_name, label_column_name = "sentences", "labels"

    def load_data(self, *args, **kwargs):
        rows = Dataset.from_dict({"sentences": TEXTS, "labels": [i % 3 for i in range(len(TEXTS))]})
        self.dataset, self.data_loaded = DatasetDict({"test": rows}), True


class LocalPairs(AbsTaskSTS):
    metadata = metadata("LocalPairs", "STS", main_score="cosine_spearman")
    min_score, max_score = 0, 5

    def load_data(self, *args, **kwargs):
        rows = [
            {"sentence1": a, "sentence2": b, "score": float(i % 6)}
            for i, (a, b) in enumerate(zip(TEXTS, TEXTS[1:], strict=False))
        ]
        self.dataset, self.data_loaded = DatasetDict({"test": Dataset.from_list(rows)}), True


TASKS = (LocalDocs, LocalTopics, LocalClusters, LocalPairs)
STS = "Retrieve semantically similar text"


@pytest.fixture(scope="module")
def model(tiny_directory):
    return NVEmbed.from_pretrained(tiny_directory)


@pytest.fixture
def encoder(model):
    return MTEBEncoder("me/tiny", model=model, max_length=64)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    before = dict(MODEL_REGISTRY)
    yield
    MODEL_REGISTRY.clear()
    MODEL_REGISTRY.update(before)


def test_the_prompts_are_the_published_list(encoder):
    """What the encoder gives, in the form of the published file."""
    original = tomllib.loads(PROMPTS.read_text())
    original = {*original["query"], *original["both"]}
    found = {}
    names, types = published_prompts()
    for name in names:
        task = mteb.get_task(name).metadata
        sides = [encoder.get_instruction(task, side) for side in (PromptType.query, PromptType.document)]
        assert encoder.get_instruction(task, None) == sides[0]
        if name in original:
            found[name] = dict(zip(("query", "corpus"), sides, strict=True))
    for kind, key in (("STS", "STS"), ("Summarization", "SUMM")):
        (text,) = {encoder.get_instruction(t.metadata, None) for t in mteb.get_tasks(task_types=[kind])}
        found[key] = {"text": text}
    assert set(types) == {"STS", "Summarization"} and len(found) == 16
    assert hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() == PUBLISHED_LIST


@pytest.mark.parametrize(
    ("name", "side", "wanted"),
    [
        ("FEVERHardNegatives", "query", "Given a claim, retrieve documents that support or refute the claim"),
        ("FEVERHardNegatives", "document", ""),
        ("Banking77Classification", None, "Given a online banking query, find the corresponding intents"),
        ("AskUbuntuDupQuestions", "query", "Retrieve duplicate questions from AskUbuntu forum"),
        ("AskUbuntuDupQuestions", "document", "Retrieve duplicate questions from AskUbuntu forum"),
        ("BIRCO-ArguAna", "document", ""),
        ("CQADupstackAndroidRetrieval", "query", "Retrieve text based on user query."),
        ("CQADupstackAndroidRetrieval", "document", ""),
        ("STS22.v2", None, STS),
    ],
)
def test_a_task_without_a_published_prompt_takes_mtebs(name, side, wanted, encoder):
    side = side and PromptType(side)
    assert encoder.get_instruction(mteb.get_task(name).metadata, side) == wanted


@pytest.mark.parametrize("side", [PromptType.query, PromptType.document, None])
def test_mteb_gets_the_vectors_of_encode(side, encoder, model):
    rows = [{"text": text} for text in TEXTS]
    where = {"task_metadata": LocalDocs.metadata, "hf_split": "test", "hf_subset": "default"}
    got = encoder.encode(DataLoader(rows, batch_size=5), prompt_type=side, **where, batch_size=5)
    assert isinstance(got, np.ndarray)
    instruction = "" if side is PromptType.document else query_instruction("Given a topic, retrieve texts")
    np.testing.assert_allclose(got, model.encode(TEXTS, instruction).numpy(), rtol=0, atol=1e-6)
    tensor = encoder.encode(DataLoader(rows), prompt_type=side, **where, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert isinstance(encoder, EncoderProtocol)


def test_local_tasks_run_and_say_what_made_them(encoder, model, tmp_path, monkeypatch):
    instructions = {}

    def encode(texts, instruction="", *args, **kwargs):
        instructions.setdefault(task.metadata.name, set()).add(instruction)
        return NVEmbed.encode(model, texts, instruction, *args, **kwargs)

    monkeypatch.setattr(model, "encode", encode)
    for kind in TASKS:
        task = kind()
        result = mteb.evaluate(
            encoder, task, cache=mteb.ResultCache(tmp_path), co2_tracker=False, show_progress_bar=False
        )
        assert 0 <= abs(result.task_results[0].get_score()) <= 1
    asked = {
        name: {i.removeprefix("Instruct: ").removesuffix("\nQuery: ") for i in found}
        for name, found in instructions.items()
    }
    assert asked == {
        "LocalDocs": {"Given a topic, retrieve texts", ""},
        "LocalTopics": {"Classify the topic of the text"},
        "LocalClusters": {"Identify the topic"},
        "LocalPairs": {STS},
    }
    (folder,) = {path.parent for path in tmp_path.glob("**/Local*.json")}
    assert len(list(folder.glob("Local*.json"))) == 4
    assert folder.name == f"local-{model.fingerprint}"
    meta = json.loads((folder / "model_meta.json").read_text())
    assert meta["n_parameters"] == sum(p.numel() for p in model.model.parameters())
    assert meta["name"] == "me/tiny" and meta["embed_dim"] == 64 and meta["max_tokens"] == 32768
    record = meta["loader_kwargs"]["record"]
    assert record["dtype"] == "float32" and record["max_length"] == 64
    assert record["versions"]["mteb"] == mteb.__version__ and record["versions"]["torch"] == torch.__version__
    assert record["fingerprint"] == model.fingerprint and len(record["prompt_hash"]) == 32


def test_get_model_gives_our_class_with_the_official_metadata(model, monkeypatch):
    asked = []
    monkeypatch.setattr(NVEmbed, "from_pretrained", lambda *a, **k: asked.append((a, k)) or model)
    local = f"local-{model.fingerprint}"
    register(path="somewhere")
    for name in PUBLISHED:
        official = nvidia_models.NV_embed_v1 if name == PUBLISHED[0] else nvidia_models.NV_embed_v2
        got = mteb.get_model(name, device="cpu")
        assert type(got) is MTEBEncoder and got.model is model and got.max_length == 32768
        assert asked.pop() == (("somewhere",), {"device": "cpu"})
        meta, official = got.mteb_model_meta.to_dict(), official.to_dict()
        # whichever weights lie there, results are not those of the published revision
        assert meta["revision"] == local and official["revision"] and meta["training_datasets"]
        changed = {key for key in meta if key != "training_datasets" and meta[key] != official[key]}
        assert changed == {"revision", "loader", "loader_kwargs", "extra_requirements_groups"}
        assert meta["loader_kwargs"]["path"] == "somewhere"
    short = mteb.get_model(PUBLISHED[1], max_length=32, device="cpu")
    assert short.max_length == 32 and short.mteb_model_meta.experiment_kwargs == {"max_length": 32}
    asked.clear()
    register()
    mteb.get_model(PUBLISHED[1], device="cpu")
    assert asked == [((PUBLISHED[1],), {"revision": official["revision"], "device": "cpu"})]
    assert mteb.get_model(PUBLISHED[1]).mteb_model_meta.revision == official["revision"]


def test_a_published_name_alone_means_the_published_revision(model, monkeypatch):
    asked, name = [], PUBLISHED[1]
    monkeypatch.setattr(NVEmbed, "from_pretrained", lambda *a, **k: asked.append((a, k)) or model)
    official, local = nvidia_models.NV_embed_v2.revision, f"local-{model.fingerprint}"
    assert MTEBEncoder(name).mteb_model_meta.revision == official
    assert MTEBEncoder(name, "r").mteb_model_meta.revision == "r"
    assert asked == [((name,), {"revision": official}), ((name,), {"revision": "r"})]
    assert MTEBEncoder(name, path="somewhere").mteb_model_meta.revision == local
    assert MTEBEncoder(name, model=model).mteb_model_meta.revision == local
    # a hub id that mteb does not know
    assert MTEBEncoder("me/mine").mteb_model_meta.revision == model.fingerprint


def test_names_of_other_models_are_refused(tiny_directory, model):
    for name, path in (("intfloat/e5-mistral-7b-instruct", tiny_directory), ("me/mine", None)):
        with pytest.raises(ValueError, match="is no NV-Embed model that mteb knows"):
            register([name], path=path)
    with pytest.raises(TypeError, match="a loaded model, or a path"):
        MTEBEncoder("me/mine", model=model, path=tiny_directory)


@pytest.mark.parametrize("name", [PUBLISHED[1], "me/mine"])
def test_the_command_runs_a_task(name, tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(mteb, "get_tasks", lambda **asked: [LocalPairs()])
    before = list(sys.argv)
    words = [
        "mteb",
        "run",
        "-m",
        name,
        "-t",
        "LocalPairs",
        "--path",
        str(tiny_directory),
        "--max-length",
        "48",
    ]
    assert cli.main([*words, "--output-folder", str(tmp_path), "--no-co2-tracker"]) == 0
    assert sys.argv == before
    (file,) = tmp_path.glob("**/LocalPairs.json")
    meta = json.loads((file.parent / "model_meta.json").read_text())
    assert meta["name"] == name and meta["loader"] == "MTEBEncoder"
    assert meta["loader_kwargs"]["record"]["max_length"] == 48
    # results of other settings lie apart
    assert meta["experiment_kwargs"] == {"max_length": 48} and file.parent.name == "max_length_48"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "name a command of mteb"),
        (["run", "--path", "nowhere", "-m", "a/b"], "--path nowhere is no directory"),
        (["run", "--path", "."], "-m OWNER/NAME"),
        (["run", "--path", ".", "-m", "mine"], "a model's name reads OWNER/NAME in mteb, got 'mine'"),
        (["run", "--path", ".", "-m", "intfloat/e5-large"], "is no NV-Embed model that mteb knows"),
    ],
)
def test_a_command_that_cannot_run_says_why(words, error, capsys):
    assert cli.main(["mteb", *words]) == 1
    assert error in capsys.readouterr().err


def test_an_unknown_task_is_one_line(tiny_directory, capsys):
    words = ["--path", str(tiny_directory), "run", "-m", "me/mine", "-t", "SciFacts"]
    assert cli.main(["mteb", *words]) == 1
    assert "nvembed-fast mteb: 'SciFacts' not found. Did you mean: 'SciFact'" in capsys.readouterr().err


def test_without_mteb_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    monkeypatch.delitem(sys.modules, "nvembed_fast.integrations.mteb")
    with pytest.raises(ImportError, match=r"pip install 'nvembed-fast\[mteb\]'"):
        importlib.import_module("nvembed_fast.integrations.mteb")


def test_its_help_is_mtebs(capsys):
    with pytest.raises(SystemExit):
        cli.main(["mteb", "run", "--help"])
    assert "--eval-splits" in capsys.readouterr().out
