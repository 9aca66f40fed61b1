"""Figures: what one is, where it is kept, and on which machine it was measured.

All figures of one GPU and day are in one file, `results/<gpu>-<date>.csv`, one figure a row. A comparison is
written as a whole and flushed to disk, so an interrupted run loses the comparison it was in and nothing else.
The next run of the same commit, with the same versions, skips the comparisons in the file.
"""

import csv
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import io
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "bench" / "results"
# the impl of this project
OURS = "nvembed_fast"
GRAPHED = f"{OURS}, CUDA graphs"
# exit code of a run that leaves cases to the next one: sysexits' EX_TEMPFAIL
UNFINISHED = 75
# metrics, with their units
TIMES = ("time_p20", "time_p50", "time_p80")  # ms
# has no value, and the reason as its unit
SKIPPED = "skipped"
NOT_MEASURED = "not measured"


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
        suite: the bench file without its prefix, such as "flash_attention", or "limits".
        case: the shape, and "forward" or "forward+backward" behind it.
        impl: the implementation. "nvembed_fast" is this project.
        metric: "time_p50", "rate", "peak_memory", "parity_error" ... "skipped" has no value, and the reason
            as its unit.
        value: in `unit`, or None for "skipped".
        unit: such as "ms", "TFLOP/s", "GB/s", "texts/s", "MiB".
        share_of_limit: of the limit measured in the same run, or None without a limit. It may be above 1
            where the limit is a copy and the operation only reads.
    """

    suite: str
    case: str
    impl: str
    metric: str
    value: float | None
    unit: str
    share_of_limit: float | None = None

    def __str__(self) -> str:
        return f"{number(self.value)} {self.unit}"


def number(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclasses.dataclass(frozen=True)
class Machine:
    """The machine and the versions that a figure depends on beside the code under test."""

    gpu: str  # the CPU's name where there is no GPU
    driver: str
    torch: str
    triton: str
    transformers: str
    commit: str
    command: str


COLUMNS = (*(f.name for f in dataclasses.fields(Figure)), *(f.name for f in dataclasses.fields(Machine)))
_HEADER = ",".join(COLUMNS) + "\n"
_SAME_RUN = tuple(f.name for f in dataclasses.fields(Machine) if f.name != "command")


def machine(commit: str | None = None) -> Machine:
    """This machine. Give the commit where there is no git to ask."""
    # not at the top: tools.gpu_run reports on a torch that cannot be imported
    import torch

    return Machine(
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(torch.get_num_threads()),
        driver=_driver(),
        torch=torch.__version__,
        triton=_version("triton"),
        transformers=_version("transformers"),
        commit=commit or commit_of_tree(),
        command=shlex.join(["python", *sys.orig_argv[1:]]),
    )


def warn_if_busy() -> None:
    """Warn if the CPU is busy, because other processes would distort the timings."""
    import torch

    if not torch.cuda.is_available() and os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        print(
            f"this machine is busy (load {os.getloadavg()[0]:.1f}): timings will be too slow",
            file=sys.stderr,
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _cpu_name(threads: int) -> str:
    try:
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    return f"CPU {name} x{threads}"


@functools.cache
def _driver() -> str:
    return (
        _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or "none"
    )


@functools.cache
def commit_of_tree(*more: str) -> str:
    """The commit of this tree, with a hash of what has changed since. Without git a hash of the sources.

    Args:
        more: folders that count beside those of the package and the benches.
    """
    git = ("git", "-C", str(ROOT))
    commit = _output(*git, "rev-parse", "--short=12", "HEAD")
    if not commit:
        folders = ("kernels", "nvembed_fast", "bench", *more)
        files = [path for folder in folders for path in ROOT.glob(f"{folder}/**/*")]
        return f"sources-{_hash(_contents(path for path in files if path.suffix in ('.py', '.toml')))}"
    counted = ("--", "kernels", "nvembed_fast", "bench/*.py", *more)
    changes = _output(*git, "diff", "HEAD", *counted).encode()
    new = _output(*git, "ls-files", "-z", "--others", "--exclude-standard", *counted).split("\0")
    changes += _contents(path for path in map(ROOT.joinpath, new) if path.is_file())
    return f"{commit}+{_hash(changes)}" if changes else commit


def _contents(paths: Iterable[Path]) -> bytes:
    return b"".join(str(path.relative_to(ROOT)).encode() + path.read_bytes() for path in sorted(paths))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def default_path(machine: Machine) -> Path:
    """`results/<gpu>-<date>.csv`: of today, or the newest if that is of the same run."""
    gpu = re.sub(r"[^a-z0-9]+", "-", machine.gpu.lower()).strip("-")
    newest = max(FOLDER.glob(f"{gpu}-????-??-??.csv"), default=None)
    if newest is not None and any(_is_of_run(row, machine) for row in read(newest)):
        return newest
    return FOLDER / f"{gpu}-{datetime.date.today().isoformat()}.csv"


def _is_of_run(row: dict[str, str], machine: Machine) -> bool:
    return all(row[name] == str(getattr(machine, name)) for name in _SAME_RUN)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a results file, each a dictionary of COLUMNS. A last line that was cut off is skipped."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no results file: it is not text") from None
    # a header may be cut off, too
    if not _HEADER.startswith(text[: len(_HEADER)]):
        columns = text.split("\n", 1)[0][:100].replace(",", ", ")
        raise ValueError(f"{path} is no results file: its columns are {columns}, not {COLUMNS}")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


class ResultsFile:
    """A results file that grows by whole comparisons.

    Args:
        path: made if it is not there.
        machine: of the figures to come.
        again: measure the comparisons in the file again.

    Raises:
        OSError, ValueError: the file cannot be written, or is no results file.
    """

    def __init__(self, path: Path, machine: Machine, again: bool = False):
        self.path, self.machine = path, machine
        self._done = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        kept = read(path)
        if not again:
            self._done = {(r["suite"], r["case"]) for r in kept if _is_of_run(r, machine)}
        whole = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, whole)
        if not whole:
            self._append(_HEADER)

    def has(self, suite: str, case: str) -> bool:
        """Whether this run, or an earlier one of the same commit and versions, has measured it."""
        return (suite, case) in self._done

    def add(self, figures: Iterable[Figure]) -> None:
        """Write the figures of one comparison to disk."""
        figures = list(figures)
        facts = dataclasses.asdict(self.machine)
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
        writer.writerows({k: _text(v) for k, v in (dataclasses.asdict(f) | facts).items()} for f in figures)
        self._append(buffer.getvalue())
        self._done |= {(f.suite, f.case) for f in figures}

    def _append(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
