"""`python -m bench --base COMMIT`: is the package of this tree slower than the package of that commit?

1. COMMIT is checked out into a temporary worktree, and the benches of this tree are copied into it. So one
   bench times two packages.
2. Two worker processes (`bench.measure.worker`) live through a suite, one in each tree. For each case both
   make the same inputs and check parity. Then they take turns, and the order changes from round to round: a
   clock that drifts drifts for both.
3. A case is slower if the 20th percentile of this tree's samples is above the 80th of COMMIT's.
4. A case that is wrong in this tree has failed. One that is wrong in COMMIT alone is named and not timed.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure.results import ROOT, number
from bench.measure.timing import GRAPH_BELOW_MS, Times

OLD, NEW = "base", "this tree"
MIN_ROUNDS, MAX_ROUNDS = 5, 100
# a turn holds so many samples that it takes about as long
TURN_MS = 20.0


@dataclass(frozen=True)
class Verdict:
    """One case, timed in both trees.

    Attributes:
        old, new: all samples.
        ratios: new / old, of the medians of every round.
    """

    case: str
    old: Times
    new: Times
    ratios: tuple[float, ...]

    @property
    def is_slower(self) -> bool:
        return self.new.percentile(20) > self.old.percentile(80)

    def __str__(self) -> str:
        ratios = Times(self.ratios)
        low, middle, high = (ratios.percentile(percent) for percent in (20, 50, 80))
        line = f"{middle:8.3f} {low:6.3f} to {high:6.3f} {number(self.old.median):>9} "
        line += f"{number(self.new.median):>9}  {self.case}"
        return line + ("  SLOWER by more than its spread" if self.is_slower else "")


class Worker:
    """A process that times the cases of one suite in one tree."""

    def __init__(self, name: str, tree: Path, suite: str, args: argparse.Namespace):
        self.name = name
        flags = [f"--{flag}" for flag in ("smallest", "compile") if getattr(args, flag)]
        command = [sys.executable, "-m", "bench.measure.worker", suite, *flags]
        self._process = subprocess.Popen(
            command, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **question) -> dict:
        """The answer to a question.

        Raises:
            ValueError: the worker has ended.
        """
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise ValueError(f"the benches do not run in {self.name}: see the error above")
        return json.loads(answer)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def compare(commit: str, args: argparse.Namespace, root: Path = ROOT) -> int:
    """Exit code: 1 if a case became slower or is wrong in this tree, or a suite did not run.

    Args:
        args: suites, cases, seconds, smallest and compile of `python -m bench`.

    Raises:
        ValueError: there is no such commit.
    """
    verdicts, failed = [], []
    with checked_out(commit, root) as tree:
        print(
            f"{'ratio':>8} {'20 % to 80 %':>16} {'base ms':>9} {'tree ms':>9}  (ratio: this tree / {commit})"
        )
        for suite in args.suites:
            try:
                found, wrong = compare_suite(suite, tree, root, args)
            except ValueError as error:
                print(f"{suite}: {error}", flush=True)
                failed.append(suite)
            else:
                verdicts += found
                failed += wrong
    slower = sum(verdict.is_slower for verdict in verdicts)
    print(f"{slower} of {len(verdicts)} cases are slower than {commit} by more than their spread")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(slower or failed))


@contextlib.contextmanager
def checked_out(commit: str, root: Path) -> Iterator[Path]:
    """A temporary worktree of the commit, with the benches of `root` in it."""
    with tempfile.TemporaryDirectory(prefix="bench-base-") as folder:
        tree = Path(folder) / "tree"
        _git(root, "worktree", "add", "--detach", "--quiet", str(tree), commit)
        try:
            shutil.rmtree(tree / "bench", ignore_errors=True)
            ignored = shutil.ignore_patterns("results", "__pycache__")
            shutil.copytree(root / "bench", tree / "bench", ignore=ignored)
            yield tree
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def _git(root: Path, *command: str) -> None:
    try:
        run = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"--base needs git: {error}") from None
    if run.returncode:
        raise ValueError(f"git {' '.join(command)}: {run.stderr.strip()}")


def compare_suite(
    suite: str, tree: Path, root: Path, args: argparse.Namespace
) -> tuple[list[Verdict], list[str]]:
    """(the verdict on every case that both trees can time, the cases that fail in this tree).

    Each is printed when it is known.

    Raises:
        ValueError: the benches do not run in one of the trees.
    """
    verdicts, failed = [], []
    with contextlib.ExitStack() as open_workers:
        workers = []
        for name, folder in ((OLD, tree), (NEW, root)):
            workers.append(Worker(name, folder, suite, args))
            open_workers.callback(workers[-1].close)
        cases = [worker.ask(do="list")["cases"] for worker in workers]
        for worker, found, others in zip(workers, cases, reversed(cases), strict=True):
            for case in found:
                if case not in others:
                    print(f"{suite}: only {worker.name} has {case}", flush=True)
        for case in cases[1]:
            if case in cases[0] and (not args.cases or any(word in case for word in args.cases)):
                title = f"{suite}: {case}"
                answers = [worker.ask(do="open", case=case) for worker in workers]
                obstacles = [answer.get("obstacle") for answer in answers]
                for worker, obstacle in zip(workers, obstacles, strict=True):
                    if obstacle is not None:
                        print(f"{title}: not timed, {worker.name}: {obstacle}", flush=True)
                if obstacles[1] is not None:
                    failed.append(title)
                elif obstacles[0] is None:
                    verdicts.append(take_turns(title, answers, workers, args))
                    print(verdicts[-1], flush=True)
    return verdicts, failed


def take_turns(
    title: str, answers: Sequence[dict], workers: Sequence[Worker], args: argparse.Namespace
) -> Verdict:
    """Time the case that all workers have opened with these answers."""
    if min(answer["estimate_ms"] for answer in answers) < GRAPH_BELOW_MS:
        # both, or one would be timed with a cold cache and the other with a warm one
        answers = [worker.ask(do="capture") for worker in workers]
    slowest = max(answer["sample_ms"] for answer in answers)
    count = max(int(TURN_MS / max(slowest, 1e-3)), 1)
    rounds = int(1e3 * args.seconds / (count * max(slowest, 1e-3)))
    rounds = 1 if args.smallest else min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)
    samples: dict[str, list] = {worker.name: [] for worker in workers}
    for i in range(rounds):
        for worker in workers[:: -1 if i % 2 else 1]:
            samples[worker.name].append(worker.ask(do="sample", count=count)["ms"])
    medians = {name: [statistics.median(turn) for turn in turns] for name, turns in samples.items()}
    ratios = tuple(new / old for old, new in zip(medians[OLD], medians[NEW], strict=True))
    old, new = (Times(tuple(ms for turn in samples[name] for ms in turn)) for name in (OLD, NEW))
    return Verdict(title, old, new, ratios)
