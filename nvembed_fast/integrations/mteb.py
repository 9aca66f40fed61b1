"""mteb 2: a model object for `mteb.evaluate`, and our loader under the names of the published models.

A task's instruction is found in this order (`MTEBEncoder.get_instruction`):

1. The published list, mteb_prompts.toml, by the task's name and then by its type.
2. The prompt that mteb states for the task. One of a side goes on that side. One for the whole task goes on
   both sides, as in mteb's own loader, but never on the documents of a retrieval task.
3. mteb's prompt for the kind of task, on all but documents.

What made the results stands in their model_meta.json, under loader_kwargs.record.

`planted_task` makes a task of data at hand, without a hub, and `score` runs one task.
"""

import difflib
import functools
import hashlib
import importlib.metadata
import json
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

try:
    import mteb
    import mteb.cli.build_cli
except ModuleNotFoundError as error:
    if error.name != "mteb":
        raise
    raise ImportError("this needs the package mteb: pip install 'nvembed-fast[mteb]'") from error
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClusteringLegacy,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
)
from mteb.abstasks.abstask import get_abstask_prompt
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from nvembed_fast.config import query_instruction
from nvembed_fast.encoder import NVEmbed

__all__ = [
    "PUBLISHED",
    "MTEBEncoder",
    "MTEBSearch",
    "MTEBVectors",
    "Prompts",
    "Scored",
    "measured",
    "named_tasks",
    "needs_vectors",
    "planted_task",
    "published_prompts",
    "register",
    "run_command",
    "score",
]

PUBLISHED = ("nvidia/NV-Embed-v1", "nvidia/NV-Embed-v2")
# as they are before `register`
_REVISIONS = {name: MODEL_REGISTRY[name].revision for name in PUBLISHED}
_PACKAGES = ("nvembed-fast", "torch", "triton", "transformers", "tokenizers", "mteb")


class Prompts(NamedTuple):
    """The task descriptions of the two sides of a task. "" for none."""

    query: str
    document: str


@functools.cache
def published_prompts() -> tuple[dict[str, Prompts], dict[str, Prompts]]:
    """The published list: ({name of a task: its prompts}, {type of tasks: their prompts})."""
    table = tomllib.loads(Path(__file__).with_name("mteb_prompts.toml").read_text(encoding="utf-8"))
    by_name = {name: Prompts(text, "") for name, text in table["query"].items()}
    by_name |= {name: Prompts(text, text) for name, text in table["both"].items()}
    by_name |= {other: by_name[name] for name, others in table["same"].items() for other in others}
    return by_name, {kind: Prompts(text, text) for kind, text in table["type"].items()}


class MTEBEncoder(AbsEncoder):
    """An `NVEmbed` as mteb expects a model to be.

    Attributes:
        model: the `NVEmbed`.
        max_length: tokens per text, instruction included.
        max_batch_tokens: tokens per batch. None: see `NVEmbed.encode`.
    """

    _given: ModelMeta
    _completed: ModelMeta | None

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        path: str | PathLike | None = None,
        model: NVEmbed | None = None,
        max_length: int | None = None,
        max_batch_tokens: int | None = None,
        **loading: Any,
    ):
        """
        Args:
            model_name: under which mteb keeps the results: OWNER/NAME. Without a path also the hub id.
            revision: under which mteb keeps the results. Of a hub id the one that is loaded. None takes the
                one that mteb knows of a published model. Of others, and with a path or a model, it is made
                from the fingerprint, so that results of other weights lie apart.
            path: the directory of the model.
            model: a loaded one, in the place of path.
            max_length: tokens per text. None: 32768 for the published models, as in mteb's loader for them,
                and the model's `max_seq_length` for others.
            max_batch_tokens: tokens per batch.
            loading: keywords of `NVEmbed.from_pretrained`.

        Raises:
            TypeError: path and model are both given, or a keyword is unknown.
        """
        if model is not None and (path is not None or loading):
            raise TypeError("MTEBEncoder takes a loaded model, or a path and how to load it, not both")
        known = MODEL_REGISTRY[model_name] if model_name in PUBLISHED else None
        self._is_local = path is not None or model is not None
        if revision is None and not self._is_local:
            revision = _REVISIONS.get(model_name)
        if model is None:
            if path is None:
                loading["revision"] = revision
            model = NVEmbed.from_pretrained(model_name if path is None else path, **loading)
        if max_length is None:
            max_length = model.max_seq_length if known is None else int(known.max_tokens)
        self.model, self.max_length, self.max_batch_tokens = model, max_length, max_batch_tokens
        meta = known or _nameless().model_copy(update={"name": model_name, "loader": MTEBEncoder})
        self.mteb_model_meta = meta.model_copy(update={"revision": revision})

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """The metadata under which mteb keeps the results, with the record of the model as it is now.

        Fields that are left open come from the model. All is kept from the first look on, so a model that has
        been trained further needs a new object.
        """
        if self._completed is None:
            record = self.record()
            facts = self._facts(record["fingerprint"])
            found = {name: value for name, value in facts.items() if getattr(self._given, name) is None}
            kwargs = {**self._given.loader_kwargs, "record": record}
            self._completed = self._given.model_copy(update={**found, "loader_kwargs": kwargs})
        return self._completed

    @mteb_model_meta.setter
    def mteb_model_meta(self, meta: ModelMeta) -> None:
        self._given = meta
        self._completed = None

    def _facts(self, fingerprint: str) -> dict[str, Any]:
        config, model = self.model.config, self.model.model
        count = sum(p.numel() for p in model.parameters())
        return {
            "revision": f"local-{fingerprint}" if self._is_local else fingerprint,
            "n_parameters": count,
            "n_embedding_parameters": model.embedding_model.embed_tokens.weight.numel(),
            "memory_usage_mb": round(sum(p.nbytes for p in model.parameters()) / 2**20),
            "max_tokens": config.text_config.max_position_embeddings,
            "embed_dim": config.hidden_size,
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": True,
        }

    def record(self) -> dict[str, Any]:
        """What makes the vectors: versions, weights, prompts and settings, as plain values."""
        placement = self.model.placement
        by_name, by_type = published_prompts()
        prompts = json.dumps([by_name, by_type, query_instruction("{task}")], sort_keys=True)
        return {
            "versions": {name: _version(name) for name in _PACKAGES},
            "fingerprint": self.model.fingerprint,
            "prompt_hash": hashlib.sha256(prompts.encode()).hexdigest()[:32],
            "max_length": self.max_length,
            "dtype": str(placement.dtype).removeprefix("torch."),
            "device": str(placement.device),
            "impl": placement.implementation()[0],
            "latents": placement.latents,
        }

    def get_instruction(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """The task description for one side of a task, "" for none. prompt_type None: a task of one side."""
        side = "document" if prompt_type is PromptType.document else "query"
        by_name, by_type = published_prompts()
        published = by_name.get(task_metadata.name) or by_type.get(task_metadata.type)
        if published is not None:
            return getattr(published, side)
        prompt = task_metadata.prompt
        if isinstance(prompt, dict):
            return prompt.get(side, "")
        if side == "document" and (prompt is None or task_metadata.type == "Retrieval"):
            return ""
        return prompt or get_abstask_prompt(task_metadata.name)

    def encode(
        self,
        inputs: Iterable[dict[str, list]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray | torch.Tensor:
        """`NVEmbed.encode` of all texts at once, so that batches are cut by tokens over the whole input.

        Args:
            inputs: batches of a DataLoader, with their texts under "text".
            task_metadata, prompt_type: choose the instruction.
            hf_split, hf_subset: not looked at.
            kwargs: keywords of `NVEmbed.encode`, also under their names in sentence-transformers.

        Returns:
            [N, D] fp32, of unit norm.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        task = self.get_instruction(task_metadata, prompt_type)
        return self.model.encode(
            texts,
            query_instruction(task) if task else "",
            self.max_length,
            max_batch_tokens=self.max_batch_tokens,
            **{"convert_to_numpy": True, **kwargs},
        )


class MTEBVectors(AbsEncoder):
    """A function of texts to vectors as an encoder for mteb. No text gets an instruction."""

    def __init__(self, model_name: str, revision: str, function: Callable[[list[str]], np.ndarray]):
        self.mteb_model_meta = _nameless().model_copy(update={"name": model_name, "revision": revision})
        self._function = function

    def encode(self, inputs: Iterable[dict[str, list]], **kwargs: Any) -> np.ndarray:
        """[N, D] fp32 of all texts at once."""
        return self._function([text for batch in inputs for text in batch["text"]])


class MTEBSearch:
    """A search that makes no vectors, such as BM25, as a model for mteb's retrieval and reranking tasks.

    It reads the texts that mteb gives to an encoder: a title before its text, an instruction of the data
    behind its query.
    """

    def __init__(self, model_name: str, revision: str, index: Callable[[list[str]], Any]):
        """
        Args:
            model_name: OWNER/NAME.
            revision: of the model.
            index: N documents -> an object whose `search(queries, k)` gives scores [Q, k] and places [Q, k],
                and whose `scores(query)` gives [N] of every document.
        """
        self.mteb_model_meta = _nameless().model_copy(update={"name": model_name, "revision": revision})
        self._index = index

    def index(self, corpus: Dataset, *, task_metadata: Any, **kwargs: Any) -> None:
        self._ids = list(corpus["id"])
        self._searched = self._index(_texts(corpus, task_metadata, PromptType.document))

    def search(
        self,
        queries: Dataset,
        *,
        task_metadata: Any,
        top_k: int,
        top_ranked: dict[str, list[str]] | None = None,
        **kwargs: Any,
    ) -> dict[str, dict[str, float]]:
        """{query: {document: score}} of the top_k, with top_ranked among a query's own candidates."""
        texts = _texts(queries, task_metadata, PromptType.query)
        if top_ranked is None:
            scores, places = self._searched.search(texts, top_k)
            return {
                query: {self._ids[place]: score for score, place in zip(*row, strict=True)}
                for query, *row in zip(queries["id"], scores.tolist(), places.tolist(), strict=True)
            }
        place_of = {document: place for place, document in enumerate(self._ids)}
        found = {}
        for query, text in zip(queries["id"], texts, strict=True):
            candidates = top_ranked.get(query, [])
            own = self._searched.scores(text)[[place_of[document] for document in candidates]]
            best = np.argsort(-own, kind="stable")[:top_k]
            found[query] = {candidates[n]: float(own[n]) for n in best}
        return found


def _texts(data: Dataset, task_metadata: Any, side: PromptType) -> list[str]:
    """The texts of one side of a retrieval task, as an encoder gets them."""
    from mteb._create_dataloaders import create_dataloader  # private, and nothing else here needs it

    loader = create_dataloader(data, task_metadata=task_metadata, prompt_type=side, batch_size=256)
    return [text for batch in loader for text in batch["text"]]


class Scored(NamedTuple):
    """What mteb found: its main score, all scores, and what the model predicted for each query or text."""

    main_score: float
    scores: dict[str, Any]
    predictions: Any


def score(task: AbsTask, model: Any) -> Scored:
    """Run one task on a model that mteb knows how to use. The mean over the task's splits and subsets."""
    show = sys.stderr.isatty()
    with tempfile.TemporaryDirectory() as folder:
        found = mteb.evaluate(
            model,
            task,
            cache=None,
            encode_kwargs={"batch_size": 256, "show_progress_bar": show},
            prediction_folder=folder,
            show_progress_bar=show,
        )
        files = list(Path(folder).rglob(task.prediction_file_name))
        predictions = json.loads(files[0].read_text(encoding="utf-8")) if files else {}
    (result,) = found.task_results
    (split, subsets), *_ = result.scores.items()
    return Scored(
        float(result.get_score()), subsets[0], predictions.get(subsets[0]["hf_subset"], {}).get(split)
    )


def needs_vectors(task: AbsTask) -> bool:
    """Whether a `MTEBSearch` cannot run this task."""
    parts = task.tasks if task.is_aggregate else [task]
    return not all(isinstance(part, AbsTaskRetrieval) for part in parts)


def measured(task: AbsTask) -> dict[str, Any]:
    """What a score of this task is of: the revision of its data, its splits and its subsets.

    A benchmark may take fewer splits and languages of a task than its name alone. A task that is made of
    others has "parts", with the same of each.
    """
    data: dict[str, Any] = {
        "revision": str(task.metadata.dataset.get("revision")),
        "splits": sorted(task.eval_splits),
        "subsets": sorted(task.hf_subsets),
    }
    if task.is_aggregate:
        data["parts"] = {part.metadata.name: measured(part) for part in task.tasks}
    return data


def named_tasks(words: Iterable[str], ours: Sequence[str] = ()) -> list[AbsTask]:
    """The tasks of mteb under these names. A word may also be a benchmark, such as "MTEB(eng, v2)".

    Args:
        words: names.
        ours: names of other tasks, which may be the nearest in an error.

    Raises:
        ValueError: there is none. The message has the nearest name. Or two words have one task with other
            splits or subsets.
    """
    known = [t.metadata.name for t in mteb.get_tasks(exclude_superseded=False, exclude_private=False)]
    benchmarks = {benchmark.name: benchmark for benchmark in mteb.get_benchmarks()}
    tasks: dict[str, AbsTask] = {}
    for word in words:
        if word not in benchmarks and word not in known:
            close = difflib.get_close_matches(word, [*ours, *known, *benchmarks], 1)
            hint = (
                f"did you mean {close[0]!r}?" if close else f"ours are {', '.join(ours)}, others are mteb's"
            )
            raise ValueError(f"no evaluation task {word!r}: {hint}")
        for task in benchmarks[word].tasks if word in benchmarks else [mteb.get_task(word)]:
            name = task.metadata.name
            if measured(tasks.setdefault(name, task)) != measured(task):
                raise ValueError(
                    f"{word!r} takes other splits or subsets of {name} than a word before it does: name the "
                    "two in runs of their own, with another folder of rows (-o)"
                )
    return list(tasks.values())


def planted_task(data: Any) -> AbsTask:
    """A task of mteb that holds its data. No hub is asked.

    Args:
        data: with the attributes of `nvembed_fast.evaluation.tasks.LocalTask`.

    Classification fits one logistic regression (C=10) on all training texts. Clustering is the best of ten
    k-means over all texts. Pairs are ranked by their cosine.
    """
    from sklearn.linear_model import LogisticRegression

    base, type_, main_score = _KINDS[data.kind]
    is_retrieval = data.kind == "retrieval"
    metadata = TaskMetadata(
        name=data.name,
        dataset={"path": f"local/{data.name}", "revision": data.revision},
        description="an evaluation set out of a package",
        type=type_,
        category="t2t" if is_retrieval else "t2c",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main_score,
        prompt={"query": data.instruction} if is_retrieval else data.instruction,
    )
    settings = {
        "retrieval": {"k_values": (1, 3, 10, 100)},
        "classification": {
            "n_experiments": 1,
            "samples_per_label": 2**31,
            "evaluator_model": LogisticRegression(C=10, max_iter=500),
        },
        "clustering": {"evaluator": _KMeans},
    }
    attributes = {"metadata": metadata, "load_data": _load_planted, "planted": data}
    return type(f"Planted{type_}", (base,), attributes | settings.get(data.kind, {}))()


# kind of a LocalTask -> the class, the type in the metadata, the main score
_KINDS = {
    "retrieval": (AbsTaskRetrieval, "Retrieval", "ndcg_at_10"),
    "classification": (AbsTaskClassification, "Classification", "accuracy"),
    "clustering": (AbsTaskClusteringLegacy, "Clustering", "v_measure"),
    "pairs": (AbsTaskPairClassification, "PairClassification", "cosine_ap"),
}


class _KMeans(AbsTaskClusteringLegacy.evaluator):
    """The best of ten starts. mteb's own has one start, whose luck is two points of V-measure."""

    def __call__(self, model: Any, **_: Any) -> list[int]:
        from sklearn.cluster import KMeans

        place = {"task_metadata": self.task_metadata, "hf_split": self.hf_split, "hf_subset": self.hf_subset}
        vectors = model.encode([{"text": list(self.dataset["sentences"])}], **place)
        labels = set(self.dataset["labels"])
        return KMeans(len(labels), n_init=10, random_state=0).fit_predict(vectors).tolist()


def _load_planted(self: Any, *_: Any, **__: Any) -> None:
    data = self.planted
    test: dict[str, Sequence]
    if data.kind == "retrieval":
        self.dataset = {
            "default": {
                "test": RetrievalSplitData(
                    corpus=Dataset.from_dict(
                        {"id": list(data.documents), "text": list(data.documents.values())}
                    ),
                    queries=Dataset.from_dict(
                        {"id": list(data.queries), "text": list(data.queries.values())}
                    ),
                    relevant_docs={query: dict.fromkeys(ids, 1) for query, ids in data.relevant.items()},
                    top_ranked=None,
                )
            }
        }
    elif data.kind == "classification":
        train = Dataset.from_dict({"text": data.train_texts, "label": data.train_labels})
        test = {"text": data.texts, "label": data.labels}
        self.dataset = DatasetDict({"train": train, "test": Dataset.from_dict(test)})
    else:
        if data.kind == "clustering":
            test = {"sentences": [data.texts], "labels": [data.labels]}
        else:
            test = {"sentence1": data.texts, "sentence2": data.others, "labels": data.labels}
        self.dataset = DatasetDict({"test": Dataset.from_dict(test)})
    self.data_loaded = True


def register(names: Iterable[str] = PUBLISHED, *, path: str | PathLike | None = None, **loading: Any) -> None:
    """Make `mteb.get_model` give our class for these names. mteb's metadata stays.

    Args:
        names: of published models. With a path also of models that mteb does not know.
        path: the directory that is loaded in the place of the hub id. The revision then says that it is
            local: see `MTEBEncoder`.
        loading: other keywords of `MTEBEncoder`. mteb keeps results made with them in a folder of their own.

    Raises:
        ValueError: a name is that of a model of another kind, or of none, or not OWNER/NAME.
    """
    for name in names:
        if name.count("/") != 1:
            raise ValueError(f"a model's name reads OWNER/NAME in mteb, got {name!r}")
        known = MODEL_REGISTRY.get(name)
        if name not in PUBLISHED and (path is None or (known and known.loader is not MTEBEncoder)):
            raise ValueError(
                f"{name!r} is no NV-Embed model that mteb knows: use {' or '.join(PUBLISHED)}, or pass the "
                "directory of your model as path, and a name of your own"
            )
        meta = known or _nameless().model_copy(update={"name": name})
        changes = {
            "revision": _REVISIONS.get(name) if path is None else None,
            "loader": MTEBEncoder,
            "loader_kwargs": {} if path is None else {"path": str(path)},
            "experiment_kwargs": loading or None,
            # those of the original's code
            "extra_requirements_groups": None,
        }
        MODEL_REGISTRY[name] = meta.model_copy(update=changes)


def run_command(arguments: list[str]) -> None:
    """mteb's own command line, after `register`.

    Raises:
        SystemExit: --help, or wrong arguments.
        ValueError: mteb does not know a task.
    """
    before, sys.argv = sys.argv, ["nvembed-fast mteb", *arguments]
    try:
        mteb.cli.build_cli.main()
    except KeyError as error:
        if "not found" not in str(error):
            raise
        raise ValueError(str(error.args[0]).removeprefix("KeyError: ")) from error
    finally:
        sys.argv = before


def _nameless() -> ModelMeta:
    return ModelMeta.create_empty(
        {"framework": ["PyTorch", "Transformers", "safetensors"], "modalities": ["text"]}
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
