"""Launch configurations that a GPU has chosen, from `tuned.toml`, in place of those of a rule.

1. Every `_launch_config` works out its rule and hands it to `override`, which
   puts the constants of an entry in their place, where there is one for this
   kernel, this architecture and this class of shapes.
2. The file is read once, at the first launch, and checked whole. Nothing is
   searched here: `python -m tools.tuning --write` measures and writes.

The invariant: an entry decides how fast a kernel is and never its result, nor a
text's bits by the rest of its batch: what a program of attention walks is cut into
the blocks of its rule. A shipped entry with other blocks is left (`walks_as`): a class
holds widths whose rules differ, such as 80 and 128.
A number that follows from the shape alone, such as a padded width, is no constant
of an entry. A rule sets USE_TMA and AHEAD wherever they can be set: an entry with one
that the rule does not set is left, as where no descriptor can be made. PERSISTENT is
set by entries alone. It needs AHEAD, so the entry is left where AHEAD is not set.

A class names the numbers that its rule distinguishes, each rounded up to a power
of two: `width128-group4-bits16-longest128`. `longest`, the longest sequence of a
batch, counts from 16 to 128: longer ones share their tiles, so that their bits
do not depend on the rest of the batch.
"""

import contextlib
import datetime
import functools
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("tuned.toml")
ARCHITECTURES = {"sm_80": 80, "sm_90": 90}
# of an entry, beside its constants. Times are the sums over the cases it was measured on
PROVENANCE = {"gpu": str, "date": datetime.date, "commit": str, "time_ms": float, "rule_ms": float}

# flags, each with the one that it needs. Those of CHOSEN are set by no rule
FLAGS = {"USE_TMA": None, "AHEAD": "USE_TMA", "PERSISTENT": "AHEAD"}
CHOSEN = ("PERSISTENT",)

Config = dict[str, int | bool]
Key = tuple[str, int, str]  # kernel, compute capability (80 for 8.0), class of shapes


@dataclass(frozen=True)
class Kernel:
    """What an entry of a kernel is made of: the numbers of its class, and all the constants that it sets.

    `walked` is the constant of the blocks that a program walks. Every kernel whose classes are of batches has
    one.
    """

    shape: tuple[str, ...]
    constants: tuple[str, ...]
    walked: str | None = None


_ATTENTION = ("width", "group", "bits", "longest")
_FLASH = ("BLOCK_T", "BLOCK_N", "USE_TMA", "num_warps", "num_stages")
_FLASH_FWD = ("BLOCK_T", "BLOCK_N", "USE_TMA", "AHEAD", "num_warps", "num_stages", "PERSISTENT")
_POOL = Kernel(("width", "bits"), ("TOKENS", "BLOCK_T", "BLOCK_D", "num_warps"))
_SCORES = Kernel(("width", "bits"), ("BLOCK_B", "BLOCK_M", "BLOCK_D", "num_warps", "num_stages"))
KERNELS = {
    "absorbed_latent_attention.fwd": Kernel(
        ("latents", "bits"), ("BLOCK_T", "BLOCK_L", "BLOCK_K", "USE_TMA", "num_warps", "num_stages")
    ),
    "flash_attention.fwd": Kernel(_ATTENTION, _FLASH_FWD, walked="BLOCK_N"),
    "flash_attention.dq": Kernel(_ATTENTION, _FLASH, walked="BLOCK_N"),
    "flash_attention.dkv": Kernel(_ATTENTION, _FLASH, walked="BLOCK_T"),
    "latent_attention.fwd": Kernel(
        ("width", "latents", "bits"), ("BLOCK_T", "BLOCK_L", "USE_TMA", "num_warps", "num_stages")
    ),
    "masked_lse.fwd": _SCORES,
    "masked_lse.bwd": _SCORES,
    "mean_pool.fwd": _POOL,
    "mean_pool.bwd": _POOL,
    "mean_pool.geglu_fwd": _POOL,
    "mean_pool.geglu_bwd": _POOL,
    "rms_norm.fwd": Kernel(("width", "bits"), ("BLOCK_T", "num_warps")),
    "rms_norm.bwd": Kernel(("width", "bits"), ("ROWS", "BLOCK_T", "num_warps")),
}

_used: Mapping[Key, Config] | None = None  # None: the file's
_clears: list[Callable[[], None]] = []


def cache(launch_config: Callable) -> Callable:
    """`functools.cache` for a `_launch_config`. `use` empties it."""
    cached = functools.cache(launch_config)
    on_change(cached.cache_clear)
    return cached


def on_change(clear: Callable[[], None]) -> None:
    """Let `use` call it, to drop what follows from a launch configuration."""
    _clears.append(clear)


def override(kernel: str, capability: int, rule: Config, **shape: int) -> Config:
    """`rule`, with the constants of the entry of this class where there is one and it can hold.

    Args:
        kernel: one of KERNELS.
        capability: 80 for 8.0.
        rule: a whole launch configuration. A rule sets a flag wherever it can be set, but those of CHOSEN.
        shape: the numbers of the class, powers of two.
    """
    numbers = KERNELS[kernel].shape
    assert set(shape) == set(numbers), f"the class of {kernel} is made of {numbers}, got {tuple(shape)}"
    shape_class = "-".join(f"{name}{shape[name]}" for name in numbers)
    entries = _shipped() if _used is None else _used
    entry = entries.get((kernel, capability, shape_class))
    if entry is None or any(v is True and not rule[n] and n not in CHOSEN for n, v in entry.items()):
        return rule
    if _used is None and not walks_as(kernel, entry, rule):
        return rule
    return rule | entry


def walks_as(kernel: str, config: Config, rule: Config) -> bool:
    """Whether a program walks the blocks of the rule, so that a text's bits are the same in every batch."""
    walked = KERNELS[kernel].walked
    return walked is None or config[walked] == rule[walked]


@contextlib.contextmanager
def use(entries: Mapping[Key, Config]) -> Iterator[None]:
    """Launch by these entries and no others inside a `with` block, in every thread (tuning, tests).

    Args:
        entries: not validated, and may walk other blocks than the rule. An empty mapping disables all
            overrides.
    """
    before = _used
    _set_used(entries)
    try:
        yield
    finally:
        _set_used(before)


def _set_used(entries: Mapping[Key, Config] | None) -> None:
    global _used
    _used = entries
    for clear in _clears:
        clear()


@functools.cache
def _shipped() -> dict[Key, Config]:
    return read(FILE)


def read(path: Path) -> dict[Key, Config]:
    """The constants of every entry of a file.

    Raises:
        ValueError: a kernel, architecture, class, constant or value that cannot be, by the entry's name.
    """
    entries = {}
    with path.open("rb") as file:
        data = tomllib.load(file)
    for name, table in tables(data):
        stem, which, architecture, shape_class = name
        try:
            constants = _checked(f"{stem}.{which}", architecture, shape_class, table)
        except ValueError as error:
            raise ValueError(f"{path.name}, [{'.'.join(name)}]: {error}") from None
        entries[f"{stem}.{which}", ARCHITECTURES[architecture], shape_class] = constants
    return entries


def tables(data: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    for name, value in data.items():
        place = (*above, name)
        if not isinstance(value, dict):
            raise ValueError(
                f"{FILE.name}: {'.'.join(place)} is outside [kernel.pass.architecture.class], "
                "as in [flash_attention.fwd.sm_90.width128-group4-bits16-longest128]"
            )
        if len(place) == 4:
            yield place, value
        else:
            yield from tables(value, place)


def _checked(kernel: str, architecture: str, shape_class: str, table: dict[str, Any]) -> Config:
    if kernel not in KERNELS:
        raise ValueError(f"no kernel {kernel}, only {', '.join(KERNELS)}")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"no architecture {architecture}, only {', '.join(ARCHITECTURES)}")
    shape, constants = KERNELS[kernel].shape, KERNELS[kernel].constants
    numbers = re.fullmatch("-".join(rf"{name}(\d+)" for name in shape), shape_class)
    if not numbers or not all(_is_power_of_two(int(n)) for n in numbers.groups()):
        wanted = "-".join(f"{name}N" for name in shape)
        raise ValueError(f"the class must be {wanted} with powers of two, got {shape_class}")
    names = {*constants, *PROVENANCE}
    if unknown := sorted(set(table) - names):
        raise ValueError(f"unknown: {', '.join(unknown)}; the constants are {', '.join(constants)}")
    if missing := sorted(names - set(table)):
        raise ValueError(f"missing: {', '.join(missing)}")
    for name, kind in PROVENANCE.items():
        if type(table[name]) is not kind:
            raise ValueError(f"{name} must be a {kind.__name__}, got {table[name]!r}")
    for name in constants:
        value = table[name]
        if name in FLAGS:
            fits, wanted = isinstance(value, bool), "true or false"
        elif name == "num_stages":
            fits, wanted = type(value) is int and value > 0, "a positive integer"
        else:
            fits, wanted = type(value) is int and _is_power_of_two(value), "a power of two"
        if not fits:
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
    for name, needed in FLAGS.items():
        if needed and table.get(name) and not table[needed]:
            raise ValueError(f"{name} needs {needed}")
    return {name: table[name] for name in constants}


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0
