"""Everything that a GPU has to decide, as one command that goes on where it stopped.

    python3 -m tools.gpu_run OUT                  again and again, until it says that nothing is left
    python3 -m tools.gpu_run OUT --only bench-encode --again
    python3 -m tools.gpu_run --dry-run            the slices and their expected minutes

It needs a CUDA GPU and a Python with torch, triton, pytest, pytest-xdist and the packages of `bench`. Run it
in the root of a checkout. The project need not be installed.

1. The work is cut into slices. Each is a process of its own that ends within TIMEOUT, whatever it does.
2. A slice that passed, failed or timed out has an entry in OUT/state.json before the next one starts. Another
   call skips it. A slice that was interrupted has no entry and runs again. A bench that added rows and left
   cases has none either, and goes on.
3. A call starts no slice that is expected to end after `--minutes`. The first slice of a call always starts.

OUT holds a few files: state.json, log.txt with the output of all slices, results-<date>.csv with the rows of
the benches, tuned.toml with the launch configurations that won, artifacts.zip with pictures and traces.
`python3 -m bench.report OUT/results-*.csv -o OUT/report` draws the page.
"""

import argparse
import contextlib
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure.results import UNFINISHED, commit_of_tree, read
from tools.cpus import tests_of

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 530.0  # seconds: a machine that ends every command after ten minutes shall not end ours
WORKERS = "8"  # of the tests, on one GPU: most of their time is compilation
GRACE = 10.0  # seconds between Ctrl-C and the end of a slice that does not stop
KERNELS = (
    "flash_attention",
    "absorbed_latent_attention",
    "latent_attention",
    "mean_pool",
    "rms_norm",
    "rotary",
    "gated",
    "masked_lse",
)
# flash_attention has slices of its own
TUNED = ("absorbed_latent_attention", "latent_attention", "masked_lse", "mean_pool", "rms_norm")
SUITES = (
    "encode",
    "train",
    "flash_attention",
    "latent_block",
    "latent_attention",
    "absorbed_latent_attention",
    "mean_pool",
    "rms_norm",
    "gated",
    "rotary",
    "masked_lse",
)


@dataclass(frozen=True)
class Slice:
    """One step of the list.

    Attributes:
        name: its key in state.json, and what `--only` takes.
        command: {python}, {out}, {results}, {scratch} and {commit} are filled in. The files in {scratch} are
            kept.
        minutes: expected, not measured.
        needs: a program without which the slice is skipped.
        goes_on: the same command does the rest of what it began, and all again with `--again`.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    needs: str | None = None
    goes_on: bool = False


def slices() -> list[Slice]:
    """The list, most valuable first: is it right, is it always right, then times."""
    python, pytest = ("{python}",), ("{python}", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    check, tuning = (
        (*python, "-m", "tools.gpu_checks"),
        (*python, "-m", "tools.tuning", "--commit", "{commit}"),
    )
    bench = (
        *python,
        "-m",
        "bench",
        "--commit",
        "{commit}",
        "--results",
        "{results}",
        "--minutes",
        "7.5",
        "--no-report",
    )
    profile = (*python, "-m", "bench.profiling", "--commit", "{commit}", "--results", "{results}")

    def tuned(kernel: str) -> tuple[str, ...]:
        return (*tuning, "--only", kernel, "--write", "{out}/tuned.toml")

    return [
        Slice("environment", (*check, "environment"), 0.5),
        Slice("check", (*python, "-m", "nvembed_fast", "check", "--json"), 5),
        Slice("parity", (*pytest, "-m", "gpu", "-n", WORKERS, "tests"), 4),
        *(Slice(f"repeats-{stem}", (*check, "repeats", stem), 2) for stem in KERNELS),
        *(Slice(f"variants-{k}", tuned(f"flash_attention.{k}"), 4) for k in ("fwd", "dq", "dkv")),
        Slice("one-query", (*profile, "--workload", "one query", "-o", "{scratch}"), 3),
        Slice("bench-one-query", (*bench, "--suites", "encode", "--cases", "one query"), 8, goes_on=True),
        Slice("graphs", (*pytest, "-m", "gpu", "tests/test_gpu.py", "-k", "graph"), 1),
        Slice("replays", (*check, "replays"), 1),
        Slice("threads", (*check, "threads"), 1),
        Slice("streams", (*check, "threads", "--streams"), 1),
        Slice("streams-kept", (*check, "kept"), 1),
        *(Slice(f"bench-{suite}", (*bench, "--suites", suite), 8, goes_on=True) for suite in SUITES),
        *(
            Slice(f"profile-{name.replace(' ', '-')}", (*profile, "--workload", name, "-o", "{scratch}"), 4)
            for name in ("all 512", "skewed", "all 4096")
        ),
        *(Slice(f"tune-{stem}", tuned(stem), 5) for stem in TUNED),
        *(
            Slice(
                f"memcheck-{stem}",
                (
                    # PyTorch's cache of memory hides what lies beyond a tensor
                    *("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"),
                    *("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
                    *pytest,
                    *tests_of(stem),
                    "-k",
                    "not full_size",
                ),
                8,
                needs="compute-sanitizer",
            )
            for stem in KERNELS
        ),
    ]


def table(todo: Sequence[Slice], state: dict) -> str:
    """A line for each slice, and the sum of the expected minutes."""
    lines, width = [], max((len(one.name) for one in todo), default=0) + 2
    shown = {name: name.upper() for name in ("out", "results", "scratch", "commit")} | {"python": "python"}
    for one in todo:
        status = state.get(one.name, {}).get("status", "")
        command = shlex.join(_fill(part, shown) for part in one.command)
        lines.append(f"{one.minutes:5.1f} min  {one.name:{width}}{status:11}{command}")
    total = sum(one.minutes for one in todo)
    return "\n".join([*lines, f"{total:5.1f} min  expected for {len(todo)} slices; these are estimates"])


def read_state(out: Path, commit: str) -> dict:
    """Slice -> how it ended.

    Raises:
        ValueError: the folder holds the results of another commit.
    """
    path = out / "state.json"
    if not path.exists():
        return {}
    state = json.loads(path.read_text(encoding="utf-8"))
    if state["commit"] != commit:
        raise ValueError(
            f"{out} holds results of commit {state['commit']}, and this is {commit}: take another folder"
        )
    return state["slices"]


def write_state(out: Path, commit: str, state: dict) -> None:
    """Whole or not at all."""
    scratch = out / "state.tmp"
    scratch.write_text(json.dumps({"commit": commit, "slices": state}, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, out / "state.json")


def run_slice(one: Slice, out: Path, commit: str, timeout: float, again: bool = False) -> dict:
    """Run one slice to its end or to its time limit.

    Returns:
        Its entry of state.json. One that is "unfinished" has done a part, and does the rest in another call.
    """
    started = time.monotonic()
    if one.needs is not None and shutil.which(one.needs) is None:
        return {"status": "skipped", "why": f"there is no {one.needs}"}
    with tempfile.TemporaryDirectory() as scratch, (out / "log.txt").open("ab") as log:
        values = {"python": sys.executable, "out": str(out), "scratch": scratch, "commit": commit}
        results = _results(out)
        values["results"], before = str(results), _num_rows(results)
        command = [_fill(part, values) for part in one.command] + ["--again"] * (again and one.goes_on)
        _tee(log, f"\n=== {one.name}: {shlex.join(command)}\n".encode())
        # a session of its own: nothing that a slice started outlives it
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        reader = threading.Thread(target=_copy, args=(child.stdout, log), daemon=True)
        reader.start()
        try:
            code = child.wait(timeout)
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, status = None, "timed out"
        finally:
            _end(child)
            reader.join(GRACE)
            _keep(Path(scratch), one.name, out / "artifacts.zip")
        # what was measured again is not told from what is left: such a bench has to end in one call
        if one.goes_on and not again and code in (None, UNFINISHED) and _num_rows(results) > before:
            status = "unfinished"
        seconds = round(time.monotonic() - started, 1)
        _tee(log, f"=== {one.name}: {status} after {seconds} s\n".encode())
    return {"status": status, "exit": code, "seconds": seconds}


def _results(out: Path) -> Path:
    """One file for all calls, with the date of the first: `bench.report` takes the newest comparison."""
    today = out / f"results-{datetime.date.today().isoformat()}.csv"
    return max(out.glob("results-????-??-??.csv"), default=today)


def _num_rows(path: Path) -> int:
    return len(read(path)) if path.exists() else 0


def _fill(part: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        part = part.replace(f"{{{name}}}", value)
    return part


def _copy(source, log) -> None:
    with contextlib.suppress(ValueError):  # a process that left the session may still hold the pipe
        while data := source.read1(1 << 16):
            _tee(log, data)


def _tee(log, data: bytes) -> None:
    """To the log and, as it is, to the screen. A full disk or a closed screen does not stop a slice."""
    for file in (log, sys.stdout.buffer):
        with contextlib.suppress(OSError):
            file.write(data)
            file.flush()


def _end(child: subprocess.Popen) -> None:
    """Ctrl-C, which lets a bench keep its rows, then the end of all its processes."""
    for kind in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)


def _keep(scratch: Path, name: str, archive: Path) -> None:
    files = [path for path in sorted(scratch.rglob("*")) if path.is_file()]
    if files:
        with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file:
            for path in files:
                file.write(path, f"{name}/{path.relative_to(scratch)}")


def run_all(todo: Sequence[Slice], out: Path, commit: str, minutes: float, again: bool) -> int:
    """Run each slice without a line in state.json, in order. Returns the number that failed in this call."""
    out.mkdir(parents=True, exist_ok=True)
    tuned = out / "tuned.toml"
    if not tuned.exists():
        shutil.copyfile(ROOT / "kernels" / "tuned.toml", tuned)
    state, started = read_state(out, commit), time.monotonic()
    waiting = [one for one in todo if again or one.name not in state]
    failed, left = 0, list(waiting)
    for one in waiting:
        rest = 60 * minutes - (time.monotonic() - started)
        is_first = one is waiting[0]
        if not is_first and 60 * one.minutes > rest:
            break
        ended = run_slice(one, out, commit, TIMEOUT if is_first else min(TIMEOUT, rest), again)
        # it had less time than a call of its own would give it
        was_short = ended["status"] == "timed out" and not is_first and rest < TIMEOUT
        if was_short or ended["status"] == "unfinished":
            state.pop(one.name, None)
        else:
            left.remove(one)
            failed += ended["status"] in ("failed", "timed out")
            state[one.name] = ended
        write_state(out, commit, state)
    print(_summary(todo, state, left))
    return failed


def _summary(todo: Sequence[Slice], state: dict, left: Sequence[Slice]) -> str:
    ends: dict[str, list[str]] = {}
    for one in todo:
        if one.name in state and one not in left:
            ends.setdefault(state[one.name]["status"], []).append(one.name)
    lines = [f"{status}: {', '.join(names)}" for status, names in ends.items()]
    if left:
        lines.append(
            f"left: {len(left)} slices, about {sum(one.minutes for one in left):.0f} minutes; run again"
        )
    else:
        lines.append("nothing is left")
    return "\n".join(lines)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """What ends this process raises KeyboardInterrupt, once: the slice that runs has to end first."""
    kinds = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    # nohup and a shell's background job ignore some
    before = {kind: signal.getsignal(kind) for kind in kinds if signal.getsignal(kind) != signal.SIG_IGN}

    def interrupt(*_):
        for kind in before:
            signal.signal(kind, signal.SIG_IGN)
        raise KeyboardInterrupt

    try:
        for kind in before:
            signal.signal(kind, interrupt)
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Two runs into one folder would write over each other's lines."""
    import fcntl

    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.txt").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run is writing to {out}") from None
        yield


def main(argv: Sequence[str] | None = None, todo: Sequence[Slice] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m tools.gpu_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="folder of the results")
    parser.add_argument("--commit", metavar="ID", help="of the code [git's, with a hash of what has changed]")
    parser.add_argument("--minutes", type=float, default=9.0, help="for this call [%(default)s]")
    parser.add_argument("--only", nargs="+", metavar="SLICE", help="these slices, or all that begin so")
    parser.add_argument(
        "--again",
        action="store_true",
        help="run what has a result already, too. A bench has to end in its call",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the slices and stop there")
    args = parser.parse_args(argv)
    todo = slices() if todo is None else todo
    if args.only:
        if unknown := [name for name in args.only if not any(one.name.startswith(name) for one in todo)]:
            parser.error(
                f"no slice begins with {', '.join(unknown)}; there are {', '.join(s.name for s in todo)}"
            )
        todo = [one for one in todo if one.name.startswith(tuple(args.only))]
    commit = args.commit or commit_of_tree("tests", "tools")
    if args.out is None and not args.dry_run:
        parser.error("OUT, the folder of the results, is missing")
    try:
        if args.dry_run:
            print(table(todo, read_state(args.out, commit) if args.out else {}))
            return 0
        out = args.out.resolve()
        with _locked(out), _interruptible():
            return 1 if run_all(todo, out, commit, args.minutes, args.again) else 0
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; the same command goes on from there. State: {args.out / 'state.json'}",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
