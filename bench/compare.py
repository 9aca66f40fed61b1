"""This project's times in two files of results: what became slower by more than its spread.

    python -m bench.compare A.csv B.csv
    python -m bench.compare A.csv@1f2e3d B.csv@4c5b6a   only the rows of these commits; one file or two

A case is worse where B's 20th percentile lies above A's 80th; exit code 1 if any is. A case without
percentiles is not judged.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.measure.limits import IMPL as LIMITS_IMPL
from bench.measure.results import OURS
from bench.report import Comparison, load, number

Cases = dict[tuple[str, str], Comparison]


def main(argv: Sequence[str] | None = None) -> int:
    a, b = _options(argv)
    for name in ("gpu", "driver", "torch", "triton", "transformers"):
        old, new = (_facts(side, name) for side in (a, b))
        if old != new:
            print(f"warning: {name} differs: {old} in A, {new} in B")
    old_cases, new_cases = (
        {(c.suite, c.case): c for found in side.values() for c in found} for side in (a, b)
    )
    for line in _limits(old_cases, new_cases):
        print(line)
    timed = [_timed(cases) for cases in (old_cases, new_cases)]
    shared = timed[0] & timed[1]
    compared = sorted((_compare(key, old_cases[key], new_cases[key]) for key in shared), reverse=True)
    print(f"{'B / A':>7} {'A ms':>9} {'B ms':>9}")
    for factor, name, old_ms, new_ms, worse in compared:
        line = f"{factor:7.3f} {number(old_ms):>9} {number(new_ms):>9}  {name}"
        print(line + ("  WORSE by more than its spread" if worse else ""))
    for side, cases, other in (("A", timed[0], new_cases), ("B", timed[1], old_cases)):
        for key in sorted(cases - shared):
            reason = other[key].left_out(OURS) if key in other else None
            print(
                f"only {side} has {' '.join(key)}" + (f"; the other left it out: {reason}" if reason else "")
            )
    num_worse = sum(worse for *_, worse in compared)
    print(f"{num_worse} of {len(compared)} cases are worse by more than their spread")
    return int(num_worse > 0)


def _options(argv: Sequence[str] | None) -> list[dict[str, list[Comparison]]]:
    description, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("A", "B"):
        parser.add_argument(name, metavar=f"{name}.csv[@COMMIT]")
    options = parser.parse_args(argv)
    try:
        return [_load(side) for side in (options.A, options.B)]
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _load(side: str) -> dict[str, list[Comparison]]:
    path, _, commit = side.partition(".csv@")
    machines = load([Path(f"{path}.csv" if commit else path)], commit)
    if not machines:
        raise ValueError(f"{side} holds no figures" + (f" of commit {commit}" if commit else ""))
    return machines


def _facts(machines: dict[str, list[Comparison]], name: str) -> str:
    values = machines if name == "gpu" else {c.run[name] for found in machines.values() for c in found}
    return ", ".join(sorted(values))


def _limits(old: Cases, new: Cases) -> list[str]:
    """What the two machines, or one on two days, could do; a warning where that alone is a difference."""
    lines = []
    for key in sorted(old.keys() & new.keys()):
        before, now = (cases[key].figure(LIMITS_IMPL, "rate") for cases in (old, new))
        if key[0] == "limits" and " tokens " not in key[1] and before and now:
            lines.append(f"limit: {key[1]}: {before} in A, {now} in B")
            if not 0.8 < now.value / before.value < 1.25:
                lines[-1] = f"warning: {lines[-1]}: the machine was another, or busy"
    return lines


def _timed(cases: Cases) -> set[tuple[str, str]]:
    return {key for key, c in cases.items() if c.figure(OURS, "time_p50")}


def _compare(key: tuple[str, str], old: Comparison, new: Comparison) -> tuple[float, str, float, float, bool]:
    """(factor, name, old ms, new ms, whether it is worse)."""
    old_ms, new_ms = (c.figure(OURS, "time_p50").value for c in (old, new))
    highest_old, lowest_new = old.figure(OURS, "time_p80"), new.figure(OURS, "time_p20")
    worse = bool(highest_old and lowest_new) and lowest_new.value > highest_old.value
    return new_ms / old_ms, " ".join(key), old_ms, new_ms, worse


if __name__ == "__main__":
    sys.exit(main())
