"""manifest.json of a folder of training text: for each set where it came from, and what was kept out of it.

Sets of packages and sets of the hub have entries of the same keys:

| key | |
|---|---|
| task, instruction, in_batch | how its rows are trained on |
| rows, sha256 | of SET.jsonl |
| dev_rows, dev_sha256 | of dev/SET.jsonl. 0 and null: it has none |
| sources | package, sha256 and licence of each. The hub's are ID@REVISION without a sha256 |
| shares_documents_with | evaluation sets whose texts stay in it |
| not_compared_with | evaluation sets that could not be had when it was made |
| dropped | reason -> number |
| made_of | a hash of all that decides its rows: an entry of another one is not whole |
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nvembed_fast import files
from nvembed_fast.curation.decontamination import EvaluationTexts

__all__ = ["MANIFEST", "entry", "is_whole", "made_of", "read", "write"]

MANIFEST = "manifest.json"


def read(directory: Path) -> dict[str, Any]:
    """The sets by their names, none if the folder has no manifest."""
    path = directory / MANIFEST
    return files.read_json(path)["sets"] if path.is_file() else {}


def write(directory: Path, sets: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of these sets and return it."""
    manifest = {"sets": dict(sorted(sets.items()))}
    with files.replacing(directory / MANIFEST) as part:
        part.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def entry(
    directory: Path,
    name: str,
    evaluation: EvaluationTexts,
    *,
    task: str,
    instruction: str,
    in_batch: bool,
    rows: int,
    dev_rows: int = 0,
    sources: Sequence[Mapping[str, str | None]],
    shares: Iterable[str] = (),
    dropped: Mapping[str, int],
    made_of: str,
) -> dict[str, Any]:
    """The entry of a set whose files are written."""
    file, dev_file = _files(directory, name)
    return {
        "task": task,
        "instruction": instruction,
        "in_batch": in_batch,
        "rows": rows,
        "dev_rows": dev_rows,
        "sha256": files.sha256(file),
        "dev_sha256": files.sha256(dev_file) if dev_file.is_file() else None,
        "sources": list(sources),
        "shares_documents_with": list(shares),
        "not_compared_with": sorted(evaluation.missing),
        "dropped": dict(sorted(dropped.items())),
        "made_of": made_of,
    }


def made_of(what: object, modules: Iterable[str], evaluation: EvaluationTexts) -> str:
    """16 hexadecimal digits of what the caller names, of the code of modules, and of the evaluation texts."""
    code = [Path(str(sys.modules[module].__file__)).read_bytes() for module in sorted(modules)]
    digest = hashlib.sha256(repr([what, evaluation.fingerprint]).encode())
    return hashlib.sha256(digest.digest() + b"".join(code)).hexdigest()[:16]


def is_whole(directory: Path, name: str, found: Mapping[str, Any] | None, made_of: str) -> bool:
    """Whether the entry of a set was made of the same, and its files are as they were written."""
    if found is None or found.get("made_of") != made_of:
        return False
    wanted = zip(_files(directory, name), (found["sha256"], found["dev_sha256"]), strict=True)
    return all(digest is None or (path.is_file() and files.sha256(path) == digest) for path, digest in wanted)


def _files(directory: Path, name: str) -> tuple[Path, Path]:
    return directory / f"{name}.jsonl", directory / "dev" / f"{name}.jsonl"
