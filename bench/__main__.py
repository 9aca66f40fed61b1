"""Run the benches, the quick ones first, and make the report of what they found.

    python -m bench                                   # everything that is not in the results yet
    python -m bench --suites rms_norm flash_attention
    python -m bench --again --compile                 # anew; on a CPU with torch.compile among the rivals
    python -m bench --commit 1a2b3c4 --results bench/results/my-gpu.csv

Every suite runs in a process of its own for at most --minutes; what did not fit is measured by the next call.
The figures of a comparison are on disk when it ends, so Ctrl-C loses the one that is running.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# quick ones first
SUITES = (
    "rms_norm",
    "gated",
    "rotary",
    "mean_pool",
    "latent_block",
    "latent_attention",
    "flash_attention",
    "encode",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--suites", nargs="+", choices=SUITES, default=SUITES, metavar="SUITE", help=", ".join(SUITES)
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for each suite [%(default)s]")
    parser.add_argument("--seconds", type=float, help="of device time for each rival and case")
    parser.add_argument("--results", type=Path, metavar="CSV", help="default: bench/results/<gpu>-<date>.csv")
    parser.add_argument("--commit", metavar="ID", help="where there is no git to ask")
    parser.add_argument("--again", action="store_true", help="measure what the results have already, too")
    parser.add_argument("--compile", action="store_true", help="torch.compile takes part on a CPU, too")
    parser.add_argument(
        "--smallest", action="store_true", help="one sample of the smallest cases: does it run?"
    )
    args = parser.parse_args(argv)

    from bench.measure.results import FOLDER, Results, default_path, machine, read, warn_if_busy
    from bench.report import write_report

    here = machine(args.commit)
    results = args.results
    if results is None and args.smallest:
        results = Path(tempfile.mkdtemp()) / "smallest.csv"
    results = (results or default_path(here)).resolve()
    try:
        Results(results, here)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    warn_if_busy()
    # relative where it can be: the command stands in every row
    shown = results.relative_to(ROOT) if results.is_relative_to(ROOT) else results
    options = ["-q", "--benchmark-quiet", "--disable-warnings", "-p", "no:cacheprovider"]
    options += [f"--minutes={args.minutes}", f"--results={shown}"]
    values = {name: getattr(args, name) for name in ("seconds", "commit")}
    options += [f"--{name}={value}" for name, value in values.items() if value is not None]
    options += [f"--{name}" for name in ("again", "compile", "smallest") if getattr(args, name)]
    failed = []
    try:
        for suite in args.suites:
            command = [sys.executable, "-m", "pytest", f"bench/bench_{suite}.py", *options]
            if subprocess.run(command, cwd=ROOT).returncode:
                failed.append(suite)
    except KeyboardInterrupt:
        measured = len({(row["suite"], row["case"]) for row in read(results)})
        print(f"\nStopped. {results} has {measured} cases; the same command goes on from there.")
        return 130
    print(f"figures: {results}")
    if not read(results):
        print("report:  none, nothing was measured")
    else:
        is_shared = results.parent == FOLDER.resolve()
        files, folder = (sorted(FOLDER.glob("*.csv")), FOLDER) if is_shared else ([results], results.parent)
        try:
            print(f"report:  {write_report(files, folder / 'report')}")
        except ModuleNotFoundError as error:
            print(f"report:  {error}; python -m bench.report makes it where there is")
    if failed:
        print(f"failed:  {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
