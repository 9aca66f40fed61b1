"""What sentence-transformers writes beside a model: the pipeline's modules, prompts and max_seq_length.

A directory is such a pipeline if modules.json names ours as the first module. The published directories have
files of these names for other code, so theirs are neither read nor carried along.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nvembed_fast import files
from nvembed_fast.config import DEFAULT_LENGTH, DEFAULT_TASK, check_integer, query_instruction

__all__ = [
    "DEFAULTS",
    "LENGTH_FILE",
    "MODULES_FILE",
    "OURS",
    "SETTINGS_FILE",
    "check_modules",
    "listed_modules",
    "max_seq_length",
    "module_types",
    "pipeline_files",
    "settings",
]

MODULES_FILE = "modules.json"
SETTINGS_FILE = "config_sentence_transformers.json"
LENGTH_FILE = "sentence_bert_config.json"
OURS = "nvembed_fast.integrations.sentence_transformers.NVEmbedModule"
# without modules.json that library pools by the plain mean, in silence
DEFAULTS: dict[str, Any] = {
    MODULES_FILE: [{"idx": 0, "name": "0", "path": "", "type": OURS}],
    SETTINGS_FILE: {
        "model_type": "SentenceTransformer",
        "prompts": {"query": query_instruction(DEFAULT_TASK), "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
}
# of the published directories, whose own code pools otherwise, and what changes no vector of unit norm
_HARMLESS = ("Transformer", "Pooling", "Normalize")


def check_modules(directory: Path, *, others_run: bool = False) -> None:
    """Refuse a directory whose modules.json names a module that would be left out.

    Args:
        directory: of a model.
        others_run: the caller runs the modules behind ours.

    Raises:
        ValueError: there is one, or modules.json is damaged.
    """
    types = module_types(directory)
    others = [kind for kind in types if kind != OURS and kind.rpartition(".")[2] not in _HARMLESS]
    if others and not (others_run and types[0] == OURS):
        raise ValueError(
            f"{directory / MODULES_FILE} names {others[0]}, which does not run here, so the vectors would be "
            "others: use nvembed_fast.integrations.sentence_transformers.load, or remove it from the file"
        )


def max_seq_length(directory: Path) -> int:
    """The tokens per text that a pipeline was saved with, or the default.

    Raises:
        ValueError: a file is damaged. The message names it.
    """
    file = directory / LENGTH_FILE
    if module_types(directory)[:1] != [OURS] or not files.is_file(file):
        return DEFAULT_LENGTH
    given = files.read_json(file).get("max_seq_length")
    try:
        return DEFAULT_LENGTH if given is None else check_integer("max_seq_length", given)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def settings(directory: Path) -> dict[str, Any]:
    """The prompts and other settings that a pipeline was saved with, or the defaults.

    Raises:
        ValueError: a file is damaged. The message names it.
    """
    file = directory / SETTINGS_FILE
    if OURS not in module_types(directory)[:1] or not files.is_file(file):
        return DEFAULTS[SETTINGS_FILE]
    found = files.read_json(file)
    if not isinstance(found.get("prompts", {}), dict):
        raise ValueError(f"{file}: prompts must be an object, got {files.brief(found['prompts'])}")
    return found


def pipeline_files(directory: Path, names: Iterable[str] = (SETTINGS_FILE, LENGTH_FILE)) -> list[Path]:
    """The files of these names that go with a pipeline's model when it is saved. None of other code."""
    try:
        is_pipeline = module_types(directory)[:1] == [OURS]
    except ValueError:
        is_pipeline = False
    return [path for name in names if is_pipeline and files.is_file(path := directory / name)]


def module_types(directory: Path) -> list[str]:
    """The classes that modules.json names, none without that file."""
    return [kind for kind, _ in listed_modules(directory)]


def listed_modules(directory: Path) -> list[tuple[str, str]]:
    """The classes that modules.json names, each with its folder. None without that file."""
    file = directory / MODULES_FILE
    if not files.is_file(file):
        return []
    try:
        modules = json.loads(files.read(file, files.MAX_JSON_BYTES))
        return [(str(module["type"]), str(module.get("path", ""))) for module in modules]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"{file} is no list of modules: {error}") from error
