"""Which training texts stand in an evaluation set, so that none of them is trained on.

1. Every text of every evaluation set is cut into runs of RUN words, and each run is hashed to 64 bits.
2. A training text is dropped if one of its runs stands in an evaluation set.
3. A text of fewer words is one run, so it is dropped if it equals a whole short text there. Texts below
   MIN_WORDS words say nothing.

Letters' case, punctuation and spaces do not count.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from nvembed_fast.curation.cleaning import normalised, runs
from nvembed_fast.evaluation import docstrings, tasks

__all__ = ["EvaluationTexts"]

RUN, MIN_WORDS = 10, 4
DOCSTRINGS = "standard-library-docstrings"


class EvaluationTexts:
    """The runs of the evaluation sets.

    Attributes:
        missing: a set that cannot be had here -> why.
        fingerprint: 16 hexadecimal digits of all runs.
    """

    def __init__(self, texts: Mapping[str, Iterable[str]], missing: Mapping[str, str] | None = None):
        self.missing = dict(missing or {})
        self._runs = {name: _all_runs(found) for name, found in texts.items()}
        digest = hashlib.sha256(repr([RUN, MIN_WORDS, sorted(self.missing)]).encode())
        for name in sorted(self._runs):
            digest.update(name.encode() + self._runs[name].tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    @classmethod
    def load(cls, cache: Path | None = None) -> "EvaluationTexts":
        """Those of all tasks of `evaluation.tasks`, and the docstrings of this Python's standard library.

        A task whose packages cannot be had here stands in `missing`.

        Raises:
            ValueError: a package has another sha256.
        """
        texts: dict[str, Iterable[str]] = {}
        missing = {}
        for name in tasks.names():
            try:
                texts[name] = list(tasks.texts(name, cache))
            except tasks.SkippedTask as error:
                missing[name] = str(error)
        texts[DOCSTRINGS] = docstrings.standard_library().values()
        return cls(texts, missing)

    def found(self, *texts: str) -> set[str]:
        """The evaluation sets in which one of these texts or a part of it stands."""
        numbers = np.concatenate([_runs(text) for text in texts])
        found = set()
        for name, known in self._runs.items():
            places = np.minimum(np.searchsorted(known, numbers), len(known) - 1)
            if len(known) and (known[places] == numbers).any():
                found.add(name)
        return found


def _runs(text: str) -> np.ndarray:
    return runs(text, RUN) if normalised(text).count(" ") + 1 >= MIN_WORDS else np.zeros(0, np.uint64)


def _all_runs(texts: Iterable[str]) -> np.ndarray:
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *map(_runs, texts)]))
