"""Break the code on purpose, one small change at a time, and see a named test go red.

    python -m tools.mutate                  all of tests/mutations/
    python -m tools.mutate gated rotary     these files
    python -m tools.mutate --number 3       three at random (--seed N repeats a draw)
    python -m tools.mutate --check          run nothing: does every mutation still fit the code?
    python -m tools.mutate --self-check     those of kernels, against the self-check's cases

A mutation is an entry of tests/mutations/<stem>.toml:

    file = "kernels/gated.py"               # the default of the entries below, as is `tests`
    tests = "tests/test_gated.py"

    [[mutation]]
    breaks = "halves swapped"
    inside = "_gated_fwd_kernel"            # optional: the function or class that holds the text
    search = "_silu(b_left) * b_right"
    replace = "_silu(b_right) * b_left"
    red = "test_matches_reference[one-token-swiglu]"
    needs = "mteb"                          # optional: a package without which the test cannot run

1. `search` must occur exactly once, and the file must still parse with `replace` in its place.
   An entry without `search` makes a new file.
2. The tests named by `red` run once on an unchanged copy of the tree, and must pass.
3. Each mutation is applied to a copy of its own, and its test must fail there. A kernel that reads a wild
   address kills the process in Triton's interpreter, which counts as red. A test that is not found, an import
   error, an unknown name or a run beyond the time limit proves nothing, so it counts as an error.
4. Mutations whose package is not installed are counted and left out: make mutate-integrations runs them.
"""

import argparse
import ast
import concurrent.futures
import importlib.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MUTATIONS = Path("tests", "mutations")
COPIED = ("ablations", "bench", "docs", "examples", "kernels", "nvembed_fast", "recipes", "tests", "tools")
COPIED_FILES = ("*.py", "*.in", "*.toml", "*.md", "*.txt", "*.cff", "LICENSE", "Makefile")
KEYS = {"breaks", "file", "tests", "inside", "search", "replace", "red", "needs"}
WILD_ADDRESS = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT}
# a mutation with a typing error fails every test
TYPING_ERROR = re.compile(r"^E +(?:[\w.]+: )?(NameError|UnboundLocalError|SyntaxError)\b", re.M)
LIMIT = 300.0  # seconds


class Stale(ValueError):
    """A mutation that does not fit the code any more."""


@dataclass(frozen=True)
class Mutation:
    """One change of one file.

    Attributes:
        stem: the file of tests/mutations/ that holds it.
        breaks: the fault it plants.
        file: relative to the root.
        inside: the function or class that holds `search`. Empty: the whole file.
        search: the text to replace. None: the file is new.
        red: pytest's id of the test that must fail, or of several.
        needs: a package that the test needs. Empty: those of the environment of the tests.
    """

    stem: str
    breaks: str
    file: str
    inside: str
    search: str | None
    replace: str
    red: str
    needs: str = ""

    def __str__(self) -> str:
        return f"{self.stem}: {self.breaks}"

    def apply(self, root: Path) -> str:
        """The text of `file` with the change in it.

        Raises:
            Stale: the text to replace is missing or not unique, or the result does not parse.
        """
        path = root / self.file
        if self.search is None:
            if path.exists():
                raise Stale(f"{self.file} exists already")
            return self.replace
        if not path.exists():
            raise Stale(f"there is no {self.file}")
        text = path.read_text(encoding="utf-8")
        start, stop = _span(text, self.inside) if self.inside else (0, len(text))
        if (count := text.count(self.search, start, stop)) != 1:
            place = f"{self.inside} of {self.file}" if self.inside else self.file
            raise Stale(f"the text to replace occurs {count} times in {place}: {self.search!r}")
        at = text.index(self.search, start, stop)
        mutated = text[:at] + self.replace + text[at + len(self.search) :]
        if mutated == text:
            raise Stale("it changes nothing")
        if path.suffix == ".py":
            try:
                ast.parse(mutated)
            except SyntaxError as error:
                raise Stale(f"{self.file} does not parse with it: {error}") from None
        return mutated


def _span(text: str, name: str) -> tuple[int, int]:
    """Where the function or class `name` begins and ends, with decorators. A method is `Class.method`."""
    body = ast.parse(text).body
    for part in name.split("."):
        kinds = ast.FunctionDef | ast.ClassDef
        found = [node for node in body if isinstance(node, kinds) and node.name == part]
        if len(found) != 1:
            raise Stale(f"{len(found)} functions or classes are called {part}")
        body = found[0].body
    lines = text.splitlines(keepends=True)
    first = min(node.lineno for node in (found[0], *found[0].decorator_list))
    return len("".join(lines[: first - 1])), len("".join(lines[: found[0].end_lineno]))


def read(root: Path, stems: Sequence[str] = ()) -> list[Mutation]:
    """The mutations of these stems, or all.

    Raises:
        ValueError: there is no such stem, or an entry lacks a key or has an unknown one.
    """
    paths = {path.stem: path for path in sorted((root / MUTATIONS).glob("*.toml"))}
    if unknown := sorted(set(stems) - set(paths)):
        raise ValueError(f"no mutations of {', '.join(unknown)}; there are {', '.join(paths)}")
    mutations = []
    for stem in stems or paths:
        with paths[stem].open("rb") as file:
            data = tomllib.load(file)
        entries = data.pop("mutation", [])
        for number, entry in enumerate(entries, 1):
            entry = data | entry
            name = f"{paths[stem].name}, mutation {number}"
            if unknown := sorted(set(entry) - KEYS):
                raise ValueError(f"{name}: unknown: {', '.join(unknown)}")
            if missing := sorted(KEYS - {"inside", "search", "tests", "needs"} - set(entry)):
                raise ValueError(f"{name}: missing: {', '.join(missing)}")
            tests = entry.pop("tests", None)
            if "::" not in entry["red"] and tests:
                entry["red"] = f"{tests}::{entry['red']}"
            mutations.append(Mutation(**{"stem": stem, "inside": "", "search": None} | entry))
    return mutations


def can_run(mutation: Mutation) -> bool:
    """Whether the package that the mutation's test needs is installed."""
    return not mutation.needs or importlib.util.find_spec(mutation.needs) is not None


def draw(mutations: Sequence[Mutation], number: int, seed: int) -> list[Mutation]:
    """So many of them at random, the same ones for the same seed."""
    return random.Random(seed).sample(mutations, min(number, len(mutations)))


def copy_tree(root: Path, target: Path) -> Path:
    """Copy the files that the tests need, without caches. Links stay links."""
    target.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", ".*", "profile", "report.html")
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, symlinks=True, ignore=ignore)
    for path in (path for pattern in COPIED_FILES for path in root.glob(pattern)):
        shutil.copy(path, target)
    return target


@dataclass(frozen=True)
class Run:
    """How a child ended: its exit status, or None beyond the time limit, and its output."""

    status: int | None
    output: str

    def last_lines(self, count: int = 15) -> str:
        return "\n".join(f"    {line}" for line in self.output.rstrip().splitlines()[-count:])


def run_pytest(root: Path, options: Sequence[str], limit: float) -> Run:
    return _run(root, ["-m", "pytest", "-q", "-p", "no:cacheprovider", *options], limit)


def _run(root: Path, arguments: Sequence[str], limit: float) -> Run:
    """Python in a child of its own session, so that nothing it started outlives the limit."""
    command = [sys.executable, *arguments]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen(
            command, cwd=root, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        out.seek(0)
        return Run(status, out.read().decode(errors="replace"))


def not_green(root: Path, tests: Iterable[str], limit: float) -> dict[str, str]:
    """Test that does not pass on an unchanged copy -> why. Each test file has a process of its own."""
    per_file = defaultdict(list)
    for test in dict.fromkeys(tests):
        per_file[test.partition("::")[0]].append(test)
    reasons = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_tree(root, Path(folder) / "tree")
        for names in per_file.values():
            run = run_pytest(copy, ["-rpfEsx", "--tb=no", *names], limit * len(names))
            for test in names:
                outcomes = {
                    line.split(maxsplit=1)[0]
                    for line in run.output.splitlines()
                    if re.match(rf"(PASSED|FAILED|ERROR|XFAIL) {re.escape(test)}($|\[| - )", line)
                }
                if outcomes != {"PASSED"}:
                    seen = ", ".join(sorted(outcomes)).lower() or "no result"
                    reasons[test] = f"{test} is not green without it: {seen}\n{run.last_lines()}"
    return reasons


def verdict(run: Run) -> tuple[str, str]:
    """("red", how), ("survived", "") or ("error", why)."""
    if run.status in WILD_ADDRESS:
        return "red", f"killed by {signal.Signals(-run.status).name}"
    if run.status == 0:
        return "survived", ""
    if run.status is None:
        return "error", "beyond the time limit"
    if run.status != 1:
        return "error", f"pytest ended with status {run.status}\n{run.last_lines()}"
    if found := TYPING_ERROR.search(run.output):
        return "error", f"{found[1]}: a typing error fails every test\n{run.last_lines()}"
    if not re.search(r"\b\d+ failed\b", run.output):
        return "error", f"no test failed\n{run.last_lines()}"
    return "red", ""


def try_out(root: Path, mutation: Mutation, limit: float) -> tuple[str, str]:
    """The verdict on one mutation, in a copy of its own."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_tree(root, Path(folder) / "tree")
        try:
            (copy / mutation.file).write_text(mutation.apply(copy), encoding="utf-8")
        except Stale as error:  # the tree has changed since the first look
            return "error", str(error)
        return verdict(run_pytest(copy, ["-x", "--tb=short", mutation.red], limit))


# what the self-check compares with, what refuses wrong inputs and what takes a kernel's place is no kernel
NO_KERNELS = ("__init__", "errors", "library", "modes", "reference", "testing", "tuned")
SHARED = ("_common", "layout", "streams")  # by all kernels
# in a copy: the operations of a file, in the part of a GPU without and with descriptors. The interpreter has
# bf16 by the tests' emulation
SELF_CHECK = """
import os, sys, torch
os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)
sys.path.append("tests")
import exact_bf16, exact_products, quick_interpreter
exact_products.install()
quick_interpreter.install()
dtypes = ["float16", "float32"]
if exact_bf16.IS_EXACT:
    exact_bf16.install()
    dtypes.insert(1, "bfloat16")
from nvembed_fast import ops, self_check
from nvembed_fast.kernels import _common
for dtype in dtypes:
    for _common.INTERPRETED_CAPABILITY in (90, 80):
        for operation in sys.argv[1:] or ops.OPERATIONS:
            for direction in ("forward", "backward"):
                finding = self_check.check((operation, dtype, direction), "cpu")
                if not finding.ok:
                    part = f"sm_{_common.INTERPRETED_CAPABILITY}"
                    sys.exit(f"{operation} {dtype} {direction} {part}: {finding.reason}")
"""


def of_kernels(mutations: Sequence[Mutation]) -> list[Mutation]:
    """Those that change what runs on a GPU, or how it is launched."""
    paths = ((mutation, Path(mutation.file)) for mutation in mutations)
    return [m for m, path in paths if path.parts[0] == "kernels" and path.stem not in NO_KERNELS]


def run_self_check(root: Path, mutation: Mutation | None, operations: Sequence[str], limit: float) -> Run:
    """The self-check's cases in a copy with the mutation in it. None: as it is."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_tree(root, Path(folder) / "tree")
        if mutation is not None:
            (copy / mutation.file).write_text(mutation.apply(copy), encoding="utf-8")
        return _run(copy, ["-c", SELF_CHECK, *operations], limit)


def self_check_all(root: Path, mutations: Sequence[Mutation], jobs: int, limit: float) -> int:
    """Print for each mutation whether the self-check catches it. Returns the number of missed ones."""
    operations = {m: _operations(root, m.file) for m in mutations}
    for names in sorted(set(operations.values())):
        run = run_self_check(root, None, names, 10 * limit)
        if run.status != 0:
            print(f"the self-check of {', '.join(names)} is not green without a mutation\n{run.last_lines()}")
            return 1
    missed = 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        # all operations take longer
        limits = {m: limit if operations[m] else 10 * limit for m in mutations}
        futures = {pool.submit(run_self_check, root, m, operations[m], limits[m]): m for m in mutations}
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            run = future.result()
            missed += (is_missed := run.status in (0, None))
            note = "(beyond the time limit)" if run.status is None else run.last_lines(1).strip()
            print(
                f"[{done}/{len(mutations)}] {'missed' if is_missed else 'caught'} {futures[future]}  {note}",
                flush=True,
            )
    print(f"{len(mutations) - missed} caught, {missed} missed")
    return missed


def _operations(root: Path, file: str) -> tuple[str, ...]:
    """The operations that a file of kernels/ offers. Those of a file that kernels share are all: ()."""
    for node in ast.parse((root / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = ast.literal_eval(node.value)
            return tuple(names) if Path(file).stem not in SHARED else ()
    return ()


def check(root: Path, mutations: Sequence[Mutation]) -> list[str]:
    """One line for every mutation that does not fit the code, and for every test that is not there."""
    problems = []
    for mutation in mutations:
        try:
            mutation.apply(root)
        except Stale as error:
            problems.append(f"{mutation}: {error}")
    tests = list(dict.fromkeys(m.red for m in mutations if can_run(m)))
    run = run_pytest(root, ["--collect-only", "-qq", *tests], LIMIT)
    if run.status != 0:
        missing = re.findall(r"^ERROR: not found: (.*)$", run.output, re.M)
        missing = [line.replace(f"{root.resolve()}/", "") for line in missing]
        problems += [f"no such test: {line}" for line in missing] or [run.output[-2000:]]
    return problems


def run_all(root: Path, mutations: Sequence[Mutation], jobs: int, limit: float) -> int:
    """Try every mutation and print a line for each. Returns the number of those that are not red."""
    started = time.monotonic()
    if problems := [problem for m in mutations if (problem := _staleness(root, m))]:
        print("\n".join(problems))
        return len(problems)
    faulty = not_green(root, (m.red for m in mutations), limit)
    if faulty:
        print("\n".join(faulty.values()), flush=True)
    counts = defaultdict(int)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(try_out, root, m, limit): m for m in mutations if m.red not in faulty}
        counts["error"] = len(mutations) - len(futures)
        try:
            for future in concurrent.futures.as_completed(futures):
                word, note = future.result()
                counts[word] += 1
                place = f"[{sum(counts.values())}/{len(mutations)}]"
                print(f"{place} {word:8} {futures[future]}{f' ({note})' if note else ''}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print(
        f"{counts['red']} red, {counts['survived']} survived, {counts['error']} errors "
        f"in {time.monotonic() - started:.0f} s"
    )
    return counts["survived"] + counts["error"]


def _staleness(root: Path, mutation: Mutation) -> str | None:
    try:
        mutation.apply(root)
    except Stale as error:
        return f"{mutation}: stale: {error}"
    return None


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stems", nargs="*", metavar="STEM", help="file of tests/mutations/ [all]")
    parser.add_argument("--number", type=int, metavar="N", help="so many of them, at random")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draw [the time]")
    parser.add_argument(
        "--check", action="store_true", help="run no test, only ask whether all mutations fit the code"
    )
    parser.add_argument(
        "--self-check", action="store_true", help="do the self-check's cases catch the mutations of kernels?"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="at a time [%(default)s]")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, metavar="S", help="seconds for one mutation [%(default)s]"
    )
    parser.add_argument("--only", metavar="TEXT", help="those whose description contains this text")
    args = parser.parse_args(argv)
    try:
        mutations = read(root, args.stems)
    except (ValueError, tomllib.TOMLDecodeError) as error:
        parser.error(str(error))
    if args.only:
        mutations = [m for m in mutations if args.only in m.breaks]
    if args.self_check:
        return 1 if self_check_all(root, of_kernels(mutations), args.jobs, args.limit) else 0
    if args.check:
        problems = check(root, mutations)
        print("\n".join([*problems, f"{len(mutations)} mutations, {len(problems)} problems"]))
        return 1 if problems else 0
    if waiting := [m for m in mutations if not can_run(m)]:
        absent = ", ".join(sorted({m.needs for m in waiting}))
        why = f"{len(waiting)} mutations need {absent}, which is not installed: make mutate-integrations"
        if args.stems:
            parser.error(why)
        print(why)
        mutations = [m for m in mutations if can_run(m)]
    if args.number is not None:
        seed = int(time.time()) if args.seed is None else args.seed
        print(f"--number {args.number} --seed {seed}")
        mutations = draw(mutations, args.number, seed)
    try:
        return 1 if run_all(root, mutations, args.jobs, args.limit) else 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
