"""One suite, bench by bench: the figures of each are on disk and on the screen when it ends."""

import argparse
import time
import traceback

from bench.measure.limits import SUITE as LIMITS
from bench.measure.results import OURS, SKIPPED, UNFINISHED, Figure, ResultsFile
from bench.suites import Setting, benches, selected

OF_LIMIT = {"TFLOP/s": "of a large product", "GB/s": "of a large copy"}


def run_suite(suite: str, setting: Setting, results: ResultsFile, args: argparse.Namespace) -> int:
    """Exit code: UNFINISHED if a bench is left to the next run, else 1 if one failed.

    Args:
        args: cases, minutes, seconds and smallest of `python -m bench`.
    """
    started, longest = time.monotonic(), 0.0
    done, late, failed = [], [], []
    limits, rounds = setting.limits, 1 if setting.smallest else None
    with setting.implementation():
        for bench in selected(benches(suite, setting), args.cases):
            now = time.monotonic()
            if results.has(bench.suite, bench.case):
                done.append(bench.case)
                continue
            # this one may take as long as the longest so far
            if now - started + longest > 60 * args.minutes:
                late.append(bench.case)
                continue
            try:
                if not results.has(LIMITS, "copy"):
                    results.add(limits.figures(setting.limit_dtypes))
                figures = bench.measure(limits, args.seconds, rounds)
            except Exception:
                traceback.print_exc()
                failed.append(bench.case)
            else:
                results.add(figures)
                print("\n".join(table(figures)), flush=True)
            longest = max(longest, time.monotonic() - now)
    if done:
        print(f"{suite}: {len(done)} skipped: already in {results.path}; --again measures them again")
    if late:
        print(f"{suite}: {len(late)} skipped: {args.minutes:g} minutes are over; the same command goes on")
    if failed:
        print(f"{suite}: {len(failed)} failed: {', '.join(failed)}")
    return UNFINISHED if late else int(bool(failed))


def table(figures: list[Figure]) -> list[str]:
    """One line per implementation of a comparison."""
    lines = [f"\n{figures[0].suite}: {figures[0].case}"]
    for impl in dict.fromkeys(figure.impl for figure in figures):
        found = {figure.metric: figure for figure in figures if figure.impl == impl}
        if SKIPPED in found:
            lines.append(f"  {impl:32} {found[SKIPPED].unit}")
            continue
        parts = [f"  {'* ' if impl == OURS else ''}{impl}".ljust(34), f"{found['time_p50'].value:10.4g} ms"]
        for metric in ("rate", "texts_rate", "tokens_rate"):
            if metric in found:
                figure = found[metric]
                parts.append(f"{figure.value:10.4g} {figure.unit:8}")
                if figure.share_of_limit is not None:
                    limit = OF_LIMIT.get(figure.unit, "of the products alone")
                    parts.append(f"{figure.share_of_limit:6.1%} {limit}")
        lines.append(" ".join(parts))
    return lines
