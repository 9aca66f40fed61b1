"""Run the benches, the quick ones first, and make the report of the results.

    python -m bench                                   # all that is not in the results yet
    python -m bench --suites rms_norm flash_attention
    python -m bench --suites encode --cases skewed
    python -m bench --again --compile                 # anew, and torch.compile also on a CPU
    python -m bench --commit 1a2b3c4 --results bench/results/my-gpu-2026-01-31.csv
    python -m bench --base main~1 --suites rms_norm   # is this tree slower than that commit?

Every suite runs in a process of its own for at most --minutes. The same command goes on with the rest. The
figures of a comparison are on disk when it ends, so Ctrl-C loses the one that is running. The exit code is 75
while cases are left. After that it is 1 if a case failed, else 0.

With --base the packages of COMMIT and of this tree take turns, case by case. Nothing is added to the
results. The exit code is 1 if a case became slower by more than its spread, or is wrong in this tree.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.suites import SUITES, Setting, add_options


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)

    from bench.measure.results import (
        FOLDER,
        ROOT,
        UNFINISHED,
        ResultsFile,
        default_path,
        machine,
        read,
        warn_if_busy,
    )
    from bench.measure.run import run_suite

    if args.base:
        from bench.measure.base import compare

        warn_if_busy()
        try:
            return compare(args.base, args)
        except ValueError as error:
            parser.error(str(error))
        except KeyboardInterrupt:
            print("\nStopped.")
            return 130

    here = machine(args.commit)
    results = args.results
    if results is None and args.smallest:
        results = Path(tempfile.mkdtemp()) / "smallest.csv"
    results = (results or default_path(here)).resolve()
    try:
        file = ResultsFile(results, here, args.again)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.no_report:
        if len(args.suites) != 1:
            parser.error("--no-report runs one suite: name it with --suites")
        try:
            return run_suite(args.suites[0], Setting.here(args.smallest, args.compile), file, args)
        except KeyboardInterrupt:
            return 130

    warn_if_busy()
    # relative where it can be: the command is in every row
    shown = results.relative_to(ROOT) if results.is_relative_to(ROOT) else results
    options = [f"--{name}={getattr(args, name)}" for name in ("minutes", "seconds")]
    options += [f"--commit={args.commit}"] if args.commit else []
    options += [f"--{name}" for name in ("again", "compile", "smallest") if getattr(args, name)]
    options += ["--cases", *args.cases] if args.cases else []
    codes = {}
    try:
        for suite in args.suites:
            command = [sys.executable, "-m", "bench", f"--results={shown}", *options, "--no-report"]
            codes[suite] = subprocess.run([*command, "--suites", suite], cwd=ROOT).returncode
    except KeyboardInterrupt:
        measured = len({(row["suite"], row["case"]) for row in read(results)})
        print(f"\nStopped. {results} has {measured} cases; the same command goes on from there.")
        return 130
    print(f"figures: {results}")
    if not read(results):
        print("report:  none, nothing was measured")
    else:
        from bench.report.page import write_report

        is_shared = results.parent == FOLDER.resolve()
        files, folder = (sorted(FOLDER.glob("*.csv")), FOLDER) if is_shared else ([results], results.parent)
        try:
            print(f"report:  {write_report(files, folder / 'report')}")
        except ModuleNotFoundError as error:
            print(f"report:  {error}; python -m bench.report makes it later")
    failed = [suite for suite, code in codes.items() if code not in (0, UNFINISHED)]
    if failed:
        print(f"failed:  {', '.join(failed)}")
    return UNFINISHED if UNFINISHED in codes.values() else int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--suites", nargs="+", choices=SUITES, default=SUITES, metavar="SUITE", help=", ".join(SUITES)
    )
    parser.add_argument(
        "--cases", nargs="+", default=(), metavar="WORD", help="only cases that contain one of these"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for each suite [%(default)s]")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="of device time per implementation and case [%(default)s]"
    )
    parser.add_argument("--results", type=Path, metavar="CSV", help="default: bench/results/<gpu>-<date>.csv")
    parser.add_argument("--commit", metavar="ID", help="where there is no git to ask")
    parser.add_argument("--again", action="store_true", help="measure the cases in the results again")
    parser.add_argument(
        "--no-report", action="store_true", help="one suite, in this process, without the page"
    )
    parser.add_argument("--base", metavar="COMMIT", help="take turns with the package of this commit")
    add_options(parser.add_argument)
    return parser


if __name__ == "__main__":
    sys.exit(main())
