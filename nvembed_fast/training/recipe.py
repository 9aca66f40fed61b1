"""A training recipe: a TOML file as frozen dataclasses, every key with its range, default and meaning.

Three tables and a list: the top level, `[model]`, `[train]`, `[log]`, and one `[[data]]` for each data set. A
path in the file is relative to the file, so that a recipe means the same from every working directory. A path
given on the command line (`overrides`) is relative to the working directory.
"""

import copy
import difflib
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from nvembed_fast import files
from nvembed_fast.config import HeadStart, PoolingHeadName
from nvembed_fast.files import brief

__all__ = ["DataPart", "LogPart", "ModelPart", "Recipe", "RecipeError", "TrainPart", "defaults", "differing"]

_BIG = 2**31 - 1
Autocast = Literal["auto", "none", "bfloat16"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
HeadTraining = Literal["full", "lora", "frozen"]
Batches = Literal["mixed", "one_set"]
Labels = Literal["none", "examples", "texts"]
Sharding = Literal["ddp", "fsdp"]


# other libraries' words -> keys here
_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "base_model": "start",
        "batch_size": "batch",
        "per_device_train_batch_size": "batch",
        "train_batch_size": "batch",
        "epochs": "steps",
        "max_steps": "steps",
        "num_epochs": "steps",
        "num_train_epochs": "steps",
        "gradient_accumulation_steps": "max_tokens",
        "gradient_checkpointing": "checkpoint_layers",
        "learning_rate": "lr",
        "lora_r": "lora_rank",
        "max_grad_norm": "clip",
        "max_seq_length": "max_length",
        "model.name": "start",
        "model.path": "start",
        "model_name_or_path": "start",
        "output_dir": "output",
        "path": "file",
        "prompt": "instruction",
        "save_steps": "checkpoint_every",
        "train_data": "file",
        "train_group_size": "hard_negatives",
        "warmup_steps": "warmup",
    }
)


class RecipeError(ValueError):
    """A recipe that cannot be run as it stands. The message names the key."""


def _key(
    default: Any, meaning: str, low: float = -math.inf, high: float = math.inf, *, above: float | None = None
) -> Any:
    """A key of a recipe. `above` excludes the bound itself. None as a default: the key may be left out."""
    return field(default=default, metadata={"meaning": meaning, "low": low, "high": high, "above": above})


def _required(example: Any, meaning: str) -> Any:
    return field(metadata={"meaning": meaning, "example": example})


@dataclass(frozen=True)
class ModelPart:
    """`[model]`: what the training starts from."""

    start: str = _required("path/to/model", "a model directory, a hub id, or a decoder, such as smollm2")
    layers: int | None = _key(None, "its first layers alone (default: all)", 1, 1024)
    pooling_head: PoolingHeadName | None = _key(
        None, "latent, mean, eos or self_attention (default: a model's own, and latent on a decoder)"
    )
    causal: bool | None = _key(
        None, "a token sees earlier ones alone (default: a model's own, false on a decoder); not in the head"
    )
    num_latents: int | None = _key(None, "of a decoder with a latent head (default: 512)", 1, _BIG)
    head_start: HeadStart | None = _key(
        None, "of a decoder: its head begins as mean pooling, or random (default: mean)"
    )


@dataclass(frozen=True)
class TrainPart:
    """`[train]`: the steps and how they are computed."""

    steps: int = _key(1000, "optimizer steps of the whole run", 1, _BIG)
    batch: int = _key(128, "rows a step, over all ranks", 1, 2**20)
    lr: float = _key(2e-5, "the highest learning rate", 0, 10)
    warmup: int = _key(50, "steps until it is reached; it falls linearly to 0 behind them", 0, _BIG)
    temperature: float = _key(0.02, "cosines are divided by it", above=0, high=100)
    max_length: int = _key(512, "tokens a text", 3, 2**20)
    lora_rank: int = _key(16, "rank of the adapters; 0 trains all weights", 0, 4096)
    freeze_embeddings: bool = _key(False, "with lora_rank 0 the table of token embeddings stays as it is")
    checkpoint_every: int = _key(500, "steps between checkpoints; the last step has one, too", 1, _BIG)
    keep_checkpoints: int = _key(2, "the newest ones that stay", 1, _BIG)
    max_tokens: int = _key(16384, "tokens of a chunk that is computed at once, on each rank", 1, _BIG)
    weight_decay: float = _key(0.03, "of AdamW, on matrices alone", 0, 1)
    beta1: float = _key(0.9, "of AdamW", 0, 0.9999999)
    beta2: float = _key(0.999, "of AdamW", 0, 0.9999999)
    clip: float = _key(1.0, "the largest norm of the gradient; 0 clips nothing", 0, 1e9)
    lora_alpha: float = _key(32.0, "adapters are scaled by lora_alpha / lora_rank", above=0, high=1e6)
    lora_dropout: float = _key(0.0, "in front of the adapters; its masks depend on ranks and chunks", 0, 0.99)
    head: HeadTraining = _key("full", "the pooling head beside adapters: full, lora or frozen")
    dtype: Dtype = _key(
        "auto", "of weights beside adapters; auto: bfloat16 on a GPU. Trained ones are float32"
    )
    autocast: Autocast = _key("auto", "auto: bfloat16 on a GPU, none on a CPU. The loss is in float32")
    checkpoint_layers: bool = _key(False, "keep of a layer its input alone: less memory, slower")
    sharding: Sharding = _key("ddp", "on several ranks: ddp copies the model, fsdp cuts it up")
    batches: Batches = _key("mixed", "mixed draws every row of a step anew, one_set one data set a step")
    limit: float | None = _key(
        None, "drop negatives above this share of the lowest positive, such as 0.95 (default: none)", 0, 1
    )
    both_directions: bool = _key(False, "also find the query of each document")
    distillation: float = _key(0.0, "weight of a teacher's scores of the candidates beside the loss", 0, 1e6)
    teacher: str | None = _key(
        None,
        "a folder of nvembed-fast mine --vectors, for scores of all candidates (default: the rows')",
    )
    teacher_temperature: float = _key(1.0, "the teacher's scores are divided by it", above=0, high=1e6)


@dataclass(frozen=True)
class DataPart:
    """One `[[data]]`: a file of rows, and how they are used."""

    file: str = _required("pairs.jsonl", "rows {query, pos: [..], neg: [..]}, JSONL or Arrow")
    instruction: str = _key("", "the task of its queries; empty for none")
    symmetric: bool = _key(False, "the instruction stands in front of the documents, too")
    in_batch: bool = _key(True, "the documents of other rows are negatives, too")
    separate: bool = _key(False, "of those the rows of this data set alone count")
    hard_negatives: int = _key(7, "negatives of its own that a row takes, fewer where it has fewer", 0, 1024)
    positives: int = _key(1, "positives that a row takes, drawn anew each time", 1, 1024)
    labels: Labels = _key("none", "of rows {text, label}: examples or texts stand for a class")
    weight: float = _key(1.0, "its share of the rows, relative to the other data sets", above=0, high=1e9)


@dataclass(frozen=True)
class LogPart:
    """`[log]`: where metrics go, beside metrics.jsonl."""

    picture: bool = _key(True, "draw run.png where matplotlib is installed")
    tensorboard: bool = _key(False, "event files in output/tensorboard")
    wandb: bool = _key(False, "a run of Weights & Biases")
    trackio: bool = _key(False, "a run of trackio")


_PATHS: tuple[tuple[list[str], str], ...] = (
    ([], "output"),
    (["model"], "start"),
    (["train"], "teacher"),
    (["data"], "file"),
)
_TABLES: Mapping[str, Any] = MappingProxyType({"model": ModelPart, "train": TrainPart, "log": LogPart})


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. Its paths are absolute, but for a hub id in `model.start`."""

    model: ModelPart
    data: tuple[DataPart, ...]
    output: str = _required("my-model", "the directory of checkpoints, metrics and the trained model")
    train: TrainPart = TrainPart()
    log: LogPart = LogPart()
    seed: int = _key(0, "of data order, dropout and fresh weights", 0, 2**63 - 1)

    @classmethod
    def from_file(cls, file: str | os.PathLike, overrides: Iterable[str] = ()) -> "Recipe":
        """Read a recipe.

        Args:
            file: a TOML file.
            overrides: "key=value" with a dotted key, such as "train.lr=1e-4", "data.0.weight=2" or, for
                every data set, "data.*.in_batch=true". The value is written as in TOML, and a word that is no
                TOML is a string.

        Raises:
            RecipeError: the file is no TOML, or a key or value is wrong. The message names file and key.
            OSError: it cannot be read.
        """
        path = files.expanded(file)
        try:
            raw = files.read_toml(path)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        try:
            _resolve(raw, path.resolve().parent)
            for override in overrides:
                _override(raw, override)
            return cls._of(raw)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Recipe":
        """The content of a recipe. Relative paths are relative to the working directory.

        Raises:
            RecipeError: a key is unknown or missing, or a value is of the wrong type or out of range.
        """
        content = copy.deepcopy(dict(raw))
        _resolve(content, Path.cwd())
        return cls._of(content)

    @classmethod
    def _of(cls, content: dict[str, Any]) -> "Recipe":
        """`from_dict` of resolved paths. It takes the tables out of the content."""
        parts: dict[str, Any] = {}
        for name, part in _TABLES.items():
            table = content.pop(name, {})
            if not isinstance(table, dict):
                raise RecipeError(f"{name} must be a table, [{name}], got {brief(table)}")
            parts[name] = part(**_values(part, table, f"{name}."))
        data = content.pop("data", [])
        if not isinstance(data, list) or not data or not all(isinstance(d, dict) for d in data):
            raise RecipeError("data must be at least one table [[data]] with the file of a data set")
        parts["data"] = tuple(DataPart(**_values(DataPart, d, f"data.{i}.")) for i, d in enumerate(data))
        return cls(**_values(cls, content, ""), **parts)

    def to_dict(self) -> dict[str, Any]:
        """The content that `from_dict` reads."""
        raw = asdict(self)
        raw["data"] = [_without_none(d) for d in raw["data"]]
        return raw | {name: _without_none(raw[name]) for name in _TABLES}

    def flat(self) -> dict[str, Any]:
        """Dotted key -> value, as JSON has it."""
        raw = self.to_dict()
        raw["model"] = {"num_latents": 512, "head_start": "mean"} | raw["model"]
        tables = {name: raw.pop(name) for name in _TABLES}
        tables |= {f"data.{index}": table for index, table in enumerate(raw.pop("data"))}
        return raw | {f"{name}.{key}": value for name, part in tables.items() for key, value in part.items()}


def defaults() -> str:
    """A whole recipe as TOML, with every key, its default and its meaning."""
    lines = ["# every key of a recipe with its default. Paths are relative to this file"]
    lines += _lines(Recipe)
    for name, part in _TABLES.items():
        lines += ["", f"[{name}]", *_lines(part)]
    return "\n".join([*lines, "", "[[data]]  # one for each data set", *_lines(DataPart)]) + "\n"


def differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (was, is), of two recipes by `Recipe.flat`. An absent key has its default: it may be younger."""
    pairs = {key: (was.get(key, _default(key)), now.get(key, _default(key))) for key in {**was, **now}}
    return {key: (one, other) for key, (one, other) in pairs.items() if one != other}


def _default(key: str) -> Any:
    table, _, name = key.rpartition(".")
    parts = {"": Recipe, **_TABLES}
    part = DataPart if re.fullmatch(r"data\.\d+", table) else parts.get(table)
    found = _keys(part).get(name) if part else None
    return None if found is None or found.default is MISSING else found.default


def _keys(part: Any) -> dict[str, Field]:
    return {f.name: f for f in fields(part) if f.metadata}


def _lines(part: Any) -> list[str]:
    return [_line(name, key) for name, key in _keys(part).items()]


def _line(name: str, key: Field) -> str:
    value = key.metadata["example"] if key.default is MISSING else key.default
    if value is None:
        return f"# {name} =  # {key.metadata['meaning']}"
    written = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
    note = " (required)" if key.default is MISSING else ""
    return f"{name} = {written}  # {key.metadata['meaning']}{note}"


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if value is not None}


def _values(part: Any, table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The checked values of a table, by the names of the dataclass's fields."""
    known = _keys(part)
    for name in table:
        if name not in known:
            raise RecipeError(_unknown(prefix, name, known))
    for name, key in known.items():
        if key.default is MISSING and name not in table:
            raise RecipeError(f"{prefix}{name} is missing: {key.metadata['meaning']}")
    return {name: _checked(prefix + name, known[name], value) for name, value in table.items()}


def _unknown(prefix: str, name: str, known: Iterable[str]) -> str:
    everywhere = {key: f"{table}.{key}" for table, part in _TABLES.items() for key in _keys(part)}
    everywhere |= {key: f"data.0.{key}" for key in _keys(DataPart)} | {key: key for key in _keys(Recipe)}
    everywhere |= {key: prefix + key for key in known}
    near = [_ELSEWHERE[prefix + name]] if prefix + name in _ELSEWHERE else []
    near += [_ELSEWHERE[word] for word in difflib.get_close_matches(name, _ELSEWHERE, 1, cutoff=0.85)]
    near += difflib.get_close_matches(name, known, 1, cutoff=0.5)
    near += difflib.get_close_matches(name, everywhere, 1, cutoff=0.5)  # it may stand in the wrong table
    close = [everywhere[key] for key in near]
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}."
    return f"no key {prefix + name!r}: {hint} `nvembed-fast train --print-defaults` shows them all"


def _checked(name: str, key: Field, value: Any) -> Any:
    wanted: Any = key.type
    if type(None) in get_args(wanted):  # which a TOML file cannot say
        wanted = get_args(wanted)[0]
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            choices = ", ".join(map(repr, get_args(wanted)))
            raise RecipeError(f"{name} must be one of {choices}, got {brief(value)}")
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = is_number if wanted is float else isinstance(value, wanted)
    if not fits or (wanted is int and not is_number):
        said = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[wanted]
        raise RecipeError(f"{name} must be {said}, got {brief(value)}")
    if not is_number:
        if key.default is MISSING and not value.strip():
            raise RecipeError(f"{name} is empty: {key.metadata['meaning']}")
        return value
    low, high, above = (key.metadata[bound] for bound in ("low", "high", "above"))
    is_too_low = value <= above if above is not None else value < low
    if not math.isfinite(value) or is_too_low or value > high:
        bounds = f"above {above:g}" if above is not None else f"from {low:g}"
        bounds += " to " if above is None else " and at most "
        raise RecipeError(f"{name} must be a number {bounds}{high:.10g}, got {brief(value)}")
    return wanted(value)


def _override(raw: dict[str, Any], override: str) -> None:
    """Put "key=value" into the content of a recipe, with paths made absolute. "data.*" is every data set."""
    if override.startswith("data.*."):
        sets = raw.get("data")
        for index in range(len(sets) if isinstance(sets, list) else 0):
            _override(raw, f"data.{index}.{override.removeprefix('data.*.')}")
        return
    name, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"--set takes KEY=VALUE, such as train.lr=1e-4, got {override!r}")
    *tables, last = name.strip().split(".")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    place: Any = raw
    for table in tables:
        if isinstance(place, list):
            if not table.isdecimal() or int(table) >= len(place):
                raise RecipeError(f"--set {name}: data has {len(place)} tables, counted from 0")
            place = place[int(table)]
        else:
            place = place.setdefault(table, {})
        if not isinstance(place, dict | list):
            raise RecipeError(f"--set {name}: {table} is no table")
    if isinstance(place, list):
        raise RecipeError(f"--set {name}: name a key of one data set, such as data.0.file")
    own = {last: value}
    _resolve({tables[0]: own} if tables else own, Path.cwd())
    place[last] = own[last]


def _resolve(raw: dict[str, Any], folder: Path) -> None:
    """Make the paths in the content of a recipe absolute."""
    for tables, name in _PATHS:
        inside = raw.get(tables[0], []) if tables else raw
        for table in inside if isinstance(inside, list) else [inside]:
            if isinstance(table, dict) and name in table:
                table[name] = _path(name, table[name], folder)


def _path(name: str, value: Any, folder: Path) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    path = folder / os.path.expanduser(value)
    # OWNER/NAME that is no directory is a hub id
    may_be_id = name == "start" and not value.startswith((".", "/", "~")) and not value.endswith(".gguf")
    return value if may_be_id and not path.exists() else os.path.normpath(path)
