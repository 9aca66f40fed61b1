"""Checkpoints of a run: a folder for each, `checkpoint-000500`, that is there whole or not at all.

A checkpoint holds the trained weights, the optimizer's two moments, the step, the rows taken of each data
set, and what the run is. It holds no state of a random generator: every draw is seeded by (seed, step, ..),
so a resumed run makes the same draws. Tensors are stored whole, by the model's names, so a run goes on with
any number of ranks.

1. The files are written aside, synced, and renamed (`files.new_folder`). A full disk leaves the last one.
2. `state.json` names the size of every file, so a checkpoint that a hand or a disk has damaged is not taken.
   Without another one the run is refused.
3. Older ones are removed when the new one is in its place.

A checkpoint of another recipe, of other data or of another start is refused. HARMLESS keys may differ, and a
key that the checkpoint does not know counts as its default.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nvembed_fast import files
from nvembed_fast.files import brief
from nvembed_fast.training.recipe import differing

__all__ = [
    "HARMLESS",
    "TEACHER",
    "State",
    "check_none",
    "identity_of",
    "load",
    "load_weights",
    "newest",
    "save",
]

# a run may go on with other values of them. `train.steps` moves the end of the learning rate's decay, and
# `train.max_tokens` draws other dropout masks
HARMLESS = re.compile(
    r"output|log\..*|train\.(steps|checkpoint_every|keep_checkpoints|max_tokens|checkpoint_layers|sharding)"
    r"|model\.start|train\.teacher|data\.\d+\.file"  # weights and contents decide, not their names
)
TEACHER = "the teacher's vectors"  # as a key of `identity`
_NAME = re.compile(r"checkpoint-(\d{6,})")
_STATE, _WEIGHTS, _MOMENTS = "state.json", "weights.safetensors", "optimizer.safetensors"
_FORMAT = 1


@dataclass(frozen=True)
class State:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        counters: rows taken of each data set, as `mix.draw` gives them back.
    """

    step: int
    counters: dict[str, int]


def save(
    output: Path,
    state: State,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
    *,
    keep: int,
    is_writer: bool = True,
) -> None:
    """Write a checkpoint, and remove older ones. To be called by every rank.

    Args:
        output: of the run.
        state: is stored.
        parameters: the trained ones by name. Those that FSDP has cut up are put together.
        optimizer: of these parameters.
        identity: what the run is, as JSON has it. `load` compares it.
        keep: how many of the newest ones stay.
        is_writer: this rank writes.

    Raises:
        OSError: it could not be written. The last checkpoint is as it was, and the message names it.
    """
    weights = {name: _whole(value, is_writer) for name, value in parameters.items()}
    moments = {
        f"{kind}/{name}": _whole(value, is_writer)
        for name, parameter in parameters.items()
        for kind, value in optimizer.state[parameter].items()
    }
    if not is_writer:
        return
    path = output / f"checkpoint-{state.step:06}"
    before = newest(output)
    try:
        if path.exists():  # a damaged one: `newest` did not take it
            shutil.rmtree(path)
        with files.new_folder(path) as aside:
            save_file(weights, aside / _WEIGHTS)
            save_file(moments, aside / _MOMENTS)
            content = {"format": _FORMAT, "step": state.step, "counters": state.counters}
            content |= {"files": _sizes(aside), "identity": dict(identity)}
            (aside / _STATE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        stays = (
            f"{before.name} stays, and the same command goes on from it" if before else "there is no other"
        )
        raise OSError(f"cannot write {path} ({reason}): {stays}") from error
    for old in [found for found in _all(output) if found != path][keep - 1 :]:
        shutil.rmtree(old)


def newest(output: Path) -> Path | None:
    """The whole checkpoint of the highest step in a directory, if there is one."""
    return next((path for path in _all(output) if _is_whole(path)), None)


def check_none(output: Path) -> None:
    """ValueError if there are checkpoints, all damaged: a run would begin anew and cut the metrics."""
    if found := _all(output):
        raise ValueError(
            f"{found[0]} is damaged, and there is no other checkpoint: bring its files back, or remove it to "
            "begin anew"
        )


def identity_of(path: Path) -> dict[str, Any]:
    """What the run of a whole checkpoint is."""
    return files.read_json(path / _STATE).get("identity", {})


def load(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> State:
    """Put the content of a checkpoint into parameters and optimizer.

    Raises:
        ValueError: it is of another run, of another format, or its tensors are not these parameters.
    """
    content = files.read_json(path / _STATE)
    _check_same_run(path, content, identity)
    load_weights(path, parameters)
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in _tensors(path / _MOMENTS):
        kind, _, name = key.partition("/")
        kinds.setdefault(name, {})[kind] = value if value.ndim == 0 else _like(name, value, parameters[name])
    names = {id(parameter): name for name, parameter in parameters.items()}
    stored = optimizer.state_dict()
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    stored["state"] = {index: kinds[name] for index, name in enumerate(ordered)}
    optimizer.load_state_dict(stored)
    return State(content["step"], content["counters"])


@torch.no_grad()
def load_weights(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Put the trained weights of a checkpoint into parameters. Raises ValueError if they are others."""
    found = dict(_tensors(path / _WEIGHTS))
    _check_names(path / _WEIGHTS, found, parameters)
    for name, parameter in parameters.items():
        parameter.copy_(_like(name, found.pop(name), parameter))


def _check_same_run(path: Path, content: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """ValueError if a checkpoint is of another run. The message says what differs."""
    if content.get("format") != _FORMAT:
        raise ValueError(f"{path} has format {brief(content.get('format'))}, and {_FORMAT} is read here")
    found = {
        key: pair
        for key, pair in differing(content["identity"], identity).items()
        if not HARMLESS.fullmatch(key)
    }
    if found:
        said = ", ".join(f"{k} was {brief(a)} and is {brief(b)}" for k, (a, b) in [*found.items()][:5])
        way = f"Choose another output, or remove {path.parent} to begin anew"
        if all(found.get(TEACHER, ("", ""))):
            way = f"If nvembed-fast mine --vectors has added to the folder, take a copy of before. {way}"
        raise ValueError(f"{path} is of another run: {said}. {way}")


def _all(output: Path) -> list[Path]:
    """Folders named like a checkpoint, the newest first."""
    found = [path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def _is_whole(path: Path) -> bool:
    try:
        content = files.read_json(path / _STATE)
        return content["files"] == _sizes(path, content["files"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _sizes(folder: Path, names: Any = (_WEIGHTS, _MOMENTS)) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in names}


def _whole(value: torch.Tensor, is_writer: bool) -> torch.Tensor:
    """The tensor on the CPU. A rank that does not write helps to put it together, and copies nothing."""
    value = value.detach()
    value = value.full_tensor() if isinstance(value, DTensor) else value
    # a copy: the next step changes the tensor
    return value.to("cpu", copy=True).contiguous() if is_writer else value.new_empty(0)


def _like(name: str, value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor on the parameter's device, cut up as it is."""
    if value.shape != parameter.shape:
        raise ValueError(f"the checkpoint's {name!r} is {list(value.shape)} and not {list(parameter.shape)}")
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                yield name, stored.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(
            f"{file} cannot be read ({error}): remove its folder, and an older one is taken"
        ) from error


def _check_names(file: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if found.keys() != wanted.keys():
        name = min(found.keys() ^ wanted.keys())
        lacks = "lacks" if name in wanted else "holds"
        raise ValueError(f"{file} {lacks} {name!r}, so it is of another model")
