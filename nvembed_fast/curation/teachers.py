"""What scores documents for a query: vectors of a model, or BM25.

An `Encoder` turns texts into vectors. It is a model of this package, of sentence-transformers or of
`baselines`. A `Teacher` finds the best documents of rows: `Dense` in vectors that lie in files, `Bm25` by an
index in memory.
"""

import hashlib
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch

from nvembed_fast.baselines import BM25, VectorModel, normalized
from nvembed_fast.encoder import NVEmbed, instruction_of
from nvembed_fast.topk import Best, mapped, topk

__all__ = ["BaselineEncoder", "Bm25", "Dense", "Encoder", "LibraryEncoder", "OwnEncoder", "Teacher"]

Rows = range | np.ndarray


class Encoder(Protocol):
    """Texts to vectors.

    Attributes:
        fingerprint: of the vector space and of all that changes a vector.
        width: of a vector.
    """

    fingerprint: str
    width: int

    def encode(self, texts: Sequence[str], prompts: Sequence[str | None] | None) -> np.ndarray:
        """[N, D] fp32 of unit norm.

        Args:
            texts: N queries or documents.
            prompts: of the queries, the task of each, or None for the one of all. None: these are documents.
        """
        ...


class Teacher(Protocol):
    """Scores documents for the queries of rows."""

    def best(self, rows: Rows, k: int, ceilings: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores [B, k] fp32 from high to low and candidates [B, k] int64, see `topk.topk`."""
        ...

    def scores(self, rows: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """[P] fp32, of document i for row i. Documents that are no candidates have scores, too."""
        ...


class OwnEncoder:
    """A model of this package.

    Args:
        model: loaded.
        task: of queries whose row names none. An instruction that begins with "Instruct: " is taken as it is.
        symmetric: documents carry the task, too.
        max_length: tokens a text.
    """

    def __init__(self, model: NVEmbed, task: str, *, symmetric: bool = False, max_length: int = 512):
        self._model, self._task, self._symmetric, self._max_length = model, task, symmetric, max_length
        self.fingerprint = f"{model.fingerprint} {model.dtype} {max_length} {task!r} {symmetric}"
        self.width = model.config.hidden_size

    def encode(self, texts: Sequence[str], prompts: Sequence[str | None] | None) -> np.ndarray:
        tasks = [self._task if task is None else task for task in prompts or ()]
        if prompts is None:
            tasks = [self._task if self._symmetric else ""] * len(texts)
        found = np.empty((len(texts), self.width), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: tasks[i])
        for task, group in groupby(order, key=lambda i: tasks[i]):
            members = [*group]
            found[members] = self._model.encode(
                [texts[i] for i in members],
                instruction_of(task),
                self._max_length,
                output="numpy",
                show_progress=False,
            )
        return normalized(found)


class LibraryEncoder:
    """A model of sentence-transformers, with the prompts that it has of its own.

    Args:
        model: a `SentenceTransformer`.
        dtype: torch.bfloat16 computes products in it, by autocast. None leaves the model as it is.
        max_length: tokens a text, if the model reads so many.
    """

    def __init__(self, model: Any, *, dtype: torch.dtype | None = None, max_length: int = 512):
        self._model, self._dtype = model, dtype
        model.max_seq_length = min(max_length, model.max_seq_length or max_length)
        self.width = model.get_embedding_dimension()
        digest = hashlib.blake2b(digest_size=16)
        # the repr says nothing of max_seq_length
        for part in (repr(model), repr(model.prompts), str(dtype), str(max_length), _vocabulary(model)):
            digest.update(part.encode())
        for name, weight in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.fingerprint = digest.hexdigest()

    def encode(self, texts: Sequence[str], prompts: Sequence[str | None] | None) -> np.ndarray:
        encode = self._model.encode_document if prompts is None else self._model.encode_query
        with torch.autocast(self._model.device.type, self._dtype, enabled=self._dtype is not None):
            found = encode([*texts], batch_size=64, show_progress_bar=False, convert_to_tensor=True)
        return normalized(found.float().cpu().numpy())


class BaselineEncoder:
    """A model of `baselines`. Arguments as in `LibraryEncoder`."""

    def __init__(self, model: VectorModel, *, dtype: torch.dtype | None = None, max_length: int = 512):
        self._model, self._dtype, self._max_length = model, dtype, max_length
        self.fingerprint = f"{model.name} {model.fingerprint} {dtype} {max_length}"
        self.width = self.encode(["a text"], None).shape[1]

    def encode(self, texts: Sequence[str], prompts: Sequence[str | None] | None) -> np.ndarray:
        with torch.autocast("cpu", self._dtype, enabled=self._dtype is not None):
            return self._model.encode([*texts], self._max_length)


class Dense:
    """The cosines of vectors.

    Args:
        queries: [R, D] fp32, one for each row. A memory map stays on the disk.
        documents: [N, D] fp32.
        num_candidates: the first documents, which may be found.
        device: computes.
    """

    def __init__(self, queries: np.ndarray, documents: np.ndarray, num_candidates: int, device: str = "cpu"):
        self.queries, self.documents, self._device = queries, documents, device
        self._candidates = mapped(documents[:num_candidates])

    def best(self, rows: Rows, k: int, ceilings: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.asarray(rows)
        queries = torch.from_numpy(self.queries[numbers]).to(self._device)
        limits = None if ceilings is None else torch.from_numpy(ceilings)
        scores, found = topk(queries, self._candidates, min(k, len(self._candidates)), limits)
        return scores.cpu().numpy(), found.cpu().numpy()

    def scores(self, rows: np.ndarray, documents: np.ndarray) -> np.ndarray:
        found = np.empty(len(rows), dtype=np.float32)
        for start in range(0, len(rows), 1024):
            part = slice(start, start + 1024)
            products = self.queries[rows[part]] * self.documents[documents[part]]
            found[part] = products.sum(axis=1, dtype=np.float32)
        return found


class Bm25:
    """The words in common. A document without one is never found.

    Args:
        index: of all documents.
        num_candidates: the first documents, which may be found.
        query: a row's text.
    """

    def __init__(self, index: BM25, num_candidates: int, query: Callable[[int], str]):
        self._index, self._num_candidates, self._query = index, num_candidates, query

    def best(self, rows: Rows, k: int, ceilings: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        found = Best(len(rows), min(k, self._num_candidates))
        for i, row in enumerate(rows):
            scores = self._index.scores(self._query(int(row)))[: self._num_candidates]
            ceiling = np.inf if ceilings is None else ceilings[i]
            scores = np.where((scores > 0) & (scores <= ceiling), scores, -np.inf)
            best = Best(1, found.scores.shape[1])
            best.add(torch.from_numpy(scores)[None], 0)
            found.scores[i], found.indices[i] = best.scores[0], best.indices[0]
        return found.scores.numpy(), found.indices.numpy()

    def scores(self, rows: np.ndarray, documents: np.ndarray) -> np.ndarray:
        found = np.empty(len(rows), dtype=np.float32)
        for row, group in groupby(range(len(rows)), key=lambda i: int(rows[i])):
            members = [*group]
            found[members] = self._index.scores(self._query(row))[documents[members]]
        return found


def _vocabulary(model: Any) -> str:
    """The tokenizer of a model as text, where it tells."""
    backend = getattr(getattr(model, "tokenizer", None), "backend_tokenizer", None)
    return backend.to_str() if backend is not None else ""
