"""Vectors of a teacher, found by the text that they are of.

A folder holds, for queries and for documents, `<side>.keys.npy` and `<side>.vectors.npy`. Row i of the
vectors is of the text whose id (`texts.text_id`) is key i, and the keys ascend. So one folder serves every
data set, and a lookup reads single rows of a memory map. `teacher.txt` names what made the vectors.
`queries.prompts.npy` has the prompt of each query, by `texts.text_id`, or 0, so that no run replaces its
vector by that of another prompt. A training does not use it.
`nvembed-fast mine --vectors` adds those of its rows by `files.replacing_together`, so one run has written
all files of a folder.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from nvembed_fast import files

__all__ = ["KEY_FILE", "MADE_BY", "PROMPTS", "SIDES", "Side", "TeacherVectors", "names"]

Side = Literal["queries", "documents"]
SIDES: tuple[Side, ...] = ("queries", "documents")


def names(side: Side) -> tuple[str, str]:
    """The files of a side: its keys and its vectors."""
    return f"{side}.keys.npy", f"{side}.vectors.npy"


KEY_FILE = names("queries")[0]  # of `files.replacing_together`
MADE_BY = "teacher.txt"
PROMPTS = "queries.prompts.npy"


class TeacherVectors:
    """The vectors of a folder.

    Args:
        directory: see above.

    Attributes:
        width: of a vector.
        made_by: the fingerprint of the teacher.
        prompts: [N] int64 of the queries, in the order of their keys. None: an earlier version made
            the folder.
        fingerprint: 32 hexadecimal digits of keys and vectors.

    Raises:
        ValueError: a file is missing, or the files do not belong together.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._keys: dict[Side, np.ndarray] = {}
        self._vectors: dict[Side, np.ndarray] = {}
        self.fingerprint = files.unmixed(directory, KEY_FILE, self._read)
        self.width = self._vectors["queries"].shape[1]
        if self._vectors["documents"].shape[1] != self.width:
            raise ValueError(f"{directory}: vectors of queries and of documents have different widths")

    def _read(self) -> str:
        """Open all files. Returns the fingerprint."""
        directory, digest = self._directory, hashlib.blake2b(digest_size=16)
        try:
            self.made_by = (files.current(directory) / MADE_BY).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise _lacks(directory, MADE_BY) from None
        for side in SIDES:
            arrays = []
            for name in names(side):
                path = files.current(directory) / name
                try:
                    with open(path, "rb") as file:
                        digest.update(hashlib.file_digest(file, "blake2b").digest())
                    arrays.append(np.load(path, mmap_mode="r"))
                except FileNotFoundError:
                    raise _lacks(directory, name) from None
            keys, vectors = self._keys[side], self._vectors[side] = arrays[0], arrays[1]
            if keys.dtype != np.int64 or keys.ndim != 1 or vectors.ndim != 2 or len(keys) != len(vectors):
                got = f"{list(keys.shape)} {keys.dtype} and {list(vectors.shape)}"
                raise ValueError(f"{directory}: {side} need keys [N] int64 and vectors [N, D], got {got}")
        path = files.current(directory) / PROMPTS
        self.prompts = np.load(path, mmap_mode="r") if path.is_file() else None
        if self.prompts is not None and self.prompts.shape != self._keys["queries"].shape:
            raise ValueError(f"{directory}: {PROMPTS} is not of the queries that are there")
        return digest.hexdigest()

    def stored(self, side: Side) -> tuple[np.ndarray, np.ndarray]:
        """All keys [N] int64 of a side, and their vectors [N, width] fp16, as memory maps."""
        return self._keys[side], self._vectors[side]

    def __call__(self, side: Side, ids: Sequence[int], texts: Sequence[str]) -> torch.Tensor:
        """[N, width] fp32.

        Args:
            side: as what the teacher has read the texts.
            ids: of N texts, by `texts.text_id`.
            texts: for the message.

        Raises:
            ValueError: the folder lacks one. The message shows it.
        """
        wanted, keys = np.asarray(ids, dtype=np.int64), self._keys[side]
        places = np.searchsorted(keys, wanted)
        found = keys[np.minimum(places, len(keys) - 1)] == wanted if len(keys) else np.zeros(len(ids), bool)
        if not found.all():
            text = texts[int(found.argmin())]
            raise ValueError(
                f"{self._directory} lacks the vector of {text!r:.80} among its {side}: run nvembed-fast "
                "mine --vectors on all files of the recipe"
            )
        return torch.from_numpy(self._vectors[side][places].astype(np.float32))


def _lacks(directory: Path, name: str) -> ValueError:
    return ValueError(f"{directory} has no {name}: make the folder with nvembed-fast mine --vectors")
