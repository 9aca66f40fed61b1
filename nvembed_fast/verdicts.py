"""Which kernels are proven on which GPU: the kept verdicts, and the child processes that reach them.

1. A verdict holds for what could change it: the GPU, its driver, torch, triton with its ptxas, and the
   sources of the kernels and of their cases. It is kept in a file of the cache folder under all of these.
   If one has changed, there is another file, which is not there yet.
2. What the file lacks is checked by child processes that run `self_check.main`, several side by side, because
   nearly all the time goes to compiling. A child asks for one item after another. An operation that hangs, or
   ends its process, is marked. Another child takes its place.
3. What finds no memory beside the others is checked by one child alone. So is what is timed, after the
   verdicts are kept. A finding that the machine is to blame for, such as a missing C compiler, a full disk or
   a process that the system has killed, is not kept: the next process checks again.
4. Of several processes that start at once one checks, and the others wait for its file.
5. If no child can check anything, for a reason that is not a kernel's (a GPU in exclusive mode, no memory),
   this process does it, without a time limit, and says so.

A file that cannot be read or written is no error: the check runs again next time.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nvembed_fast import files

__all__ = ["DIRECTIONS", "Finding", "Item", "check_anew", "facts", "prove"]

DIRECTIONS = ("forward", "backward")
START_SECONDS, ITEM_SECONDS, ALL_SECONDS, END_SECONDS = 180.0, 120.0, 900.0, 30.0
KILLED = tuple(-s for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
MAX_CHILDREN = 4  # side by side. Each has a CUDA context of some 500 MB
# compile longest, so they come first. A backward compiles its forward, too. If one child checks the forward
# and another the backward, both compile the binaries of the forward (13 of flash_attention)
LONGEST = ("flash_attention", "absorbed_latent_attention", "latent_attention", "masked_lse")
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from nvembed_fast import self_check; self_check.main()"
)

Item = tuple[str, str, str]  # operation, dtype by name, direction
Checked = Literal["triton", "library", "torch"]  # an implementation of `ops`
Tell = Callable[["Finding"], None]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        name: of the operation.
        dtype: by name.
        direction: "forward" or "backward".
        path: the implementation that was checked.
        ok: it is right.
        error: of the comparison nearest to its tolerance, or farthest beyond it. None: nothing was compared.
        tolerance: the bound of this error.
        reason: why it is not right. "" if it is.
        time_ms: of one call at NV-Embed's widths, if it was timed.
        library_ms: of the library path, likewise.
        is_decided: False if nothing was found out, for a reason that is not the kernel's. It is not kept.
        lacks_memory: it is not decided, and may be where no other process takes the memory.
    """

    name: str
    dtype: str
    direction: str
    path: str
    ok: bool
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""
    time_ms: float | None = None
    library_ms: float | None = None
    is_decided: bool = True
    lacks_memory: bool = False

    @property
    def item(self) -> Item:
        return self.name, self.dtype, self.direction


class _NoChild(Exception):
    """No child process can check anything. The message is the reason, which is not a kernel's."""


class _NoTime(Exception):
    """The time for all is over. The message is the reason of those that were not checked."""


def facts(device: torch.device) -> dict[str, str]:
    """What a verdict on a GPU holds for."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "compiler": _compiler(10 * properties.major + properties.minor),
        "sources": _sources(),
    }


def _driver() -> str:
    """The version of the kernel module where the system tells it, and that of the CUDA driver."""
    module = ""
    with suppress(OSError):
        module = Path("/proc/driver/nvidia/version").read_text(errors="replace").partition("\n")[0].strip()
    # a build of torch without CUDA has no such function
    version = getattr(torch._C, "_cuda_getDriverVersion", lambda: "")()
    return f"{version} {module}".strip()


def _compiler(part: int) -> str:
    """What of Triton's compiler is not Triton's: ptxas, its options, and the environment's switches.

    The interpreter is one of them: it proves no kernel of a GPU.
    """
    version = switches = "unknown"
    with suppress(ImportError, OSError, RuntimeError, subprocess.CalledProcessError):
        from triton import knobs
        from triton.backends.nvidia.compiler import get_ptxas_version

        version = f"{get_ptxas_version(part).splitlines()[-1]} {knobs.nvidia.ptxas_options}"
    with suppress(ImportError):
        from triton import knobs
        from triton._C.libtriton import get_cache_invalidating_env_vars

        switches = f"{sorted(get_cache_invalidating_env_vars().items())} {knobs.runtime.interpret}"
    return f"{version} {switches}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _sources() -> str:
    """A hash of the kernels, of their launch configurations and of the cases that check them."""
    package = Path(__file__).parent
    kernels = package / "kernels"
    digest = hashlib.sha256()
    for path in (*sorted(kernels.glob("*.py")), kernels / "tuned.toml", package / "self_check.py"):
        digest.update(path.name.encode() + b"\0")
        with suppress(FileNotFoundError):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _search_path() -> list[str]:
    """Notebooks append a Path, which Python itself skips."""
    return [entry for entry in sys.path if isinstance(entry, str)]


_turn = threading.Lock()


def _renew_turn() -> None:
    # a thread that held it does not live on in the child of a fork
    global _turn
    _turn = threading.Lock()


os.register_at_fork(after_in_child=_renew_turn)


def prove(device: torch.device, items: Iterable[Item]) -> tuple[dict[Item, Finding], str]:
    """The findings for these items on a GPU, from the cache folder where they are kept.

    Returns:
        (findings, why the check ran in this process). The second is "" if it did not.
    """
    wanted = list(items)
    with _turn:
        known = facts(device)
        path = _path(known)
        found = _read(path, known)
        if all(item in found for item in wanted):
            return {item: found[item] for item in wanted}, ""
        with _alone(path):
            found = _read(path, known)  # of another process, meanwhile
            missing = [item for item in wanted if item not in found]
            if missing:
                _announce(len(missing), known["gpu"], path.parent)
            new, why_here = _check(device, missing, known) if missing else ([], "")
            found |= {finding.item: finding for finding in new}
            if new:
                _write(path, known, found.values())
    return {item: found[item] for item in wanted}, why_here


def check_anew(
    device: torch.device,
    items: Sequence[Item],
    tell: Tell,
    *,
    path: Checked = "triton",
    timed: bool = False,
    note: Tell = lambda finding: None,
) -> tuple[list[Finding], str]:
    """As `prove`, without asking the cache folder. What is found on a GPU replaces what it holds.

    Each finding is told once it and all before it are known, in the order of the items. With `timed` a right
    one is known when it has its times. Then `note` gets each as soon as it is checked, without times, and all
    are kept before the first is timed.
    """

    def keep(findings: Iterable[Finding]) -> None:
        if known and path == "triton":
            file = _path(known)
            with _alone(file):
                new = {finding.item: finding for finding in findings if finding.is_decided}
                found = _read(file, known) | new
                _write(file, known, found.values())

    with _turn:
        known = facts(device) if device.type == "cuda" else {}
        new, why_here = _check(device, list(items), known, tell, path, timed, note, keep)
        keep(new)
    return new, why_here


def _announce(count: int, gpu: str, folder: Path) -> None:
    """Say why the first use takes longer than the next ones."""
    line = (
        f"nvembed_fast: checking {count} kernels on this GPU ({gpu}), once. The result is kept in {folder}\n"
    )
    # there may be none, or a closed one
    with suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(line)
        sys.stderr.flush()


def _path(known: dict[str, str]) -> Path:
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
    return files.cache_folder() / "self_check" / f"{name}.json"


def _read(path: Path, known: dict[str, str]) -> dict[Item, Finding]:
    """The kept findings. None, if the file is not there, damaged or about something else."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        content = files.read_json(path)
        if content["facts"] == known:
            findings = [Finding(**entry) for entry in content["findings"]]
            return {finding.item: finding for finding in findings if type(finding.ok) is bool}
    return {}


def _write(path: Path, known: dict[str, str], findings: Iterable[Finding]) -> None:
    kept = [
        # times are of one moment
        dataclasses.asdict(dataclasses.replace(finding, time_ms=None, library_ms=None))
        for finding in findings
        if finding.is_decided
    ]
    with suppress(OSError), files.replacing(path) as aside:
        aside.write_text(json.dumps({"facts": known, "findings": kept}, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside, no other process checks for this file. Where files cannot be locked, each does so."""
    import filelock

    with contextlib.ExitStack() as stack:
        with suppress(OSError, NotImplementedError, filelock.Timeout):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(filelock.FileLock(f"{path}.lock", timeout=2 * ALL_SECONDS))
        yield


def _check(
    device: torch.device,
    items: Sequence[Item],
    known: dict[str, str],
    tell: Tell = lambda finding: None,
    path: Checked = "triton",
    timed: bool = False,
    note: Tell = lambda finding: None,
    keep: Callable[[Iterable[Finding]], None] = lambda findings: None,
) -> tuple[list[Finding], str]:
    """Check by child processes, and in this process what they cannot. Then time what is right."""
    request = {"device": str(device), "facts": known, "path": path}
    deadline = time.monotonic() + ALL_SECONDS
    settled: dict[Item, Finding] = {}
    untimed: dict[Item, Finding] = {}
    why_here = why_late = ""
    untold = list(items)

    def settle(finding: Finding) -> None:
        settled[finding.item] = finding
        while untold and untold[0] in settled:
            tell(settled[untold.pop(0)])

    def find(finding: Finding) -> None:
        if timed:
            note(finding)
        if timed and finding.ok:
            untimed[finding.item] = finding
        else:
            settle(finding)

    def missing() -> list[Item]:
        return [item for item in dict.fromkeys(items) if item not in settled and item not in untimed]

    for count in sorted({_num_children(device), 1}, reverse=True):
        why_here = ""
        try:
            for finding in _from_children(missing(), request, deadline, count):
                if finding.lacks_memory:
                    why_here = finding.reason
                else:
                    find(finding)
        except _NoChild as obstacle:
            why_here = str(obstacle)
        except _NoTime as end:
            why_late, why_here = str(end), ""
            break
    left = missing()
    if why_late:
        for item in left:
            find(Finding(*item, path, False, reason=why_late, is_decided=False))
    elif left:
        from nvembed_fast import self_check

        for finding in self_check.run(left, device, path):
            find(finding)
    if untimed and not why_late:
        keep([*settled.values(), *untimed.values()])
        for item in left:
            if item in untimed:
                settle(self_check.with_times(untimed.pop(item), device))
        with suppress(_NoChild, _NoTime):
            for finding in _from_children(list(untimed), request | {"timed": True}, deadline, 1):
                right = untimed.pop(finding.item)
                one, other = finding.time_ms, finding.library_ms
                # what the library path or the system ended says nothing about the kernel
                is_right = finding.ok or finding.path != path or not finding.is_decided
                settle(dataclasses.replace(right, time_ms=one, library_ms=other) if is_right else finding)
    for finding in untimed.values():
        settle(finding)
    return [settled[item] for item in items], why_here


def _num_children(device: torch.device) -> int:
    """How many check side by side. On a CPU one does: its products take all cores."""
    if device.type != "cuda":
        return 1
    has_affinity = hasattr(os, "sched_getaffinity")
    return min(MAX_CHILDREN, len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


def _from_children(
    items: Sequence[Item], request: dict[str, Any], deadline: float, count: int
) -> Iterator[Finding]:
    """The findings of up to `count` children side by side, as they come."""
    waiting = sorted(items, key=lambda item: LONGEST.index(item[0]) if item[0] in LONGEST else len(LONGEST))
    inbox: _Inbox = queue.SimpleQueue()
    children: list[_Child] = []
    count = min(count, len(items))
    try:
        while unfinished := len(waiting) + sum(child.item is not None for child in children):
            while len(children) < min(count, unfinished):
                try:
                    _Child(request, inbox, deadline, children)
                except _NoChild:
                    count = len(children)
                    if count == 0:
                        raise
            child = min(children, key=lambda child: child.until)
            message: dict[str, Any] | None = None
            with suppress(queue.Empty):
                child, message = inbox.get(timeout=max(child.until - time.monotonic(), 0.0))
            if child not in children:
                continue  # its last words came after its end
            if message is None:
                is_decided = not child.is_killed
                how = child.end()
                children.remove(child)
                if time.monotonic() > deadline:
                    # not the fault of the one under way either
                    raise _NoTime("no time was left for it: nvembed-fast check tries again")
                if child.has_begun:
                    assert child.item is not None
                    yield Finding(*child.item, child.path, False, reason=how, is_decided=is_decided)
                    continue
                if child.item is not None:
                    waiting.insert(0, child.item)
                if not child.has_found:
                    # nor would another one start, beside those that did
                    count -= 1
                    if count == 0:
                        raise _NoChild(how)
            elif "ready" in message:
                if waiting:
                    child.check(waiting.pop(0))
                else:
                    child.end()
                    children.remove(child)
            elif "begun" in message:
                child.begin(message["path"])
            else:
                child.finish()
                yield Finding(**message)
    finally:
        for child in children:
            child.end()


class _Child:
    """A process that runs `self_check.main`.

    Attributes:
        item: that it was given, until it has found it right or wrong.
        has_begun: with this item.
        path: that is at work on it. The library's, while a kernel's time is compared with its time.
        has_found: anything.
        until: when it must have said its next word, on the clock of `time.monotonic`.
    """

    def __init__(self, request: dict[str, Any], inbox: "_Inbox", deadline: float, children: "list[_Child]"):
        """Start it, and add it to those that `_from_children` ends."""
        if getattr(sys, "frozen", False) or not sys.executable:
            raise _NoChild("this program has no Python interpreter to start")
        self.item: Item | None = None
        self.path: Checked = request["path"]
        self.has_begun = self.has_found = self._is_closed = False
        self._inbox, self._deadline = inbox, deadline
        self._wait(START_SECONDS)
        try:
            with contextlib.ExitStack() as stack:
                # `end` closes it
                self._errors = stack.enter_context(tempfile.TemporaryFile())
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _CODE, json.dumps(_search_path())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    env=os.environ | {"NVEMBED_FAST_SELF_CHECK": "0"},
                    start_new_session=True,
                    text=True,
                    encoding="utf-8",
                )
                stack.pop_all()
        except OSError as error:
            raise _NoChild(f"no process can be started: {error.strerror}") from error
        # at once, because what follows may raise
        children.append(self)
        # if this process is killed, it ends by itself
        seconds = int(deadline - time.monotonic() + ITEM_SECONDS) + 1
        self._say({"timed": False, "seconds": seconds} | request)
        try:
            threading.Thread(target=self._listen, daemon=True).start()
        except RuntimeError as error:
            self.end()
            children.remove(self)
            raise _NoChild(f"no thread can be started: {error}") from error

    def _say(self, message: Any) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _wait(self, seconds: float) -> None:
        now = time.monotonic()
        self._limit = min(seconds, max(self._deadline - now, 1.0))
        self.until = now + self._limit

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with suppress(ValueError):  # closed, or half a line
            for line in self._process.stdout:
                self._inbox.put((self, json.loads(line)))
        self._is_closed = True
        self._process.wait()
        self._inbox.put((self, None))

    def check(self, item: Item) -> None:
        self.item, self.has_begun = item, False
        self._say(item)
        self._wait(ITEM_SECONDS)

    def begin(self, path: Checked) -> None:
        """With a problem of its item, or with a path that is timed."""
        self.has_begun, self.path = True, path
        self._wait(ITEM_SECONDS)

    def finish(self) -> None:
        self.item, self.has_begun, self.has_found = None, False, True
        self._wait(ITEM_SECONDS)

    @property
    def is_killed(self) -> bool:
        """By the system or its user: before `end`, nothing here kills it."""
        return self._process.returncode in KILLED

    def end(self) -> str:
        """End it. Returns: how it had ended before."""
        try:
            return self._how()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            # an uninterruptible one ends later. Its thread reads until then, and closing would wait for that
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
                for stream in (self._process.stdin, self._process.stdout, self._errors):
                    with suppress(OSError, ValueError):
                        assert stream is not None
                        stream.close()

    def _how(self) -> str:
        status = self._process.returncode
        if status is None:
            closed = "it closed its output and" if self._is_closed else "it"
            return f"{closed} did not end within {self._limit:.0f} s"
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with status {status}" + (f": {lines[-1]}" if lines else "")


_Inbox = queue.SimpleQueue[tuple[_Child, dict[str, Any] | None]]
