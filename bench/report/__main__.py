"""An HTML page and the speed tables from the files of results.

    python -m bench.report                               bench/results/*.csv, to report/index.html beside them
    python -m bench.report H200.csv A100.csv -o FOLDER   FOLDER/index.html: one page, its pictures inside it
    python -m bench.report --readme [FILE.csv ...]       the tables of README.md and docs/benchmarks.md,
                                                         between their markers
    python -m bench.report --check [FILE.csv ...]        exit code 1 where the tables are not those

The tables come from the files that git knows, unless files are named.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.measure import results
from bench.report.comparisons import load
from bench.report.page import FOLDER, write_report
from bench.report.tables import known_to_git, pages_with_markers, speed_tables, with_tables


def main(argv: Sequence[str] | None = None) -> None:
    options = _options(argv)
    try:
        if options.readme or options.check:
            _readme(options)
        else:
            files = options.files or sorted(results.FOLDER.glob("*.csv"))
            print(f"wrote {write_report(files, options.output)}")
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(f"bench.report: {error}")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    description, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE.csv", help="default: bench/results/*.csv"
    )
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables, make no page")
    parser.add_argument("--check", action="store_true", help="exit code 1 if --readme would change them")
    return parser.parse_args(argv)


def _readme(options: argparse.Namespace) -> None:
    files = options.files or known_to_git(results.FOLDER)
    machines = load(files)
    for page in pages_with_markers():
        wanted = with_tables(page, speed_tables(machines, of_gpus=page.name == "README.md"))
        if wanted == page.read_text(encoding="utf-8"):
            print(f"{page.name} holds the tables of {len(files)} files")
        elif options.check:
            sys.exit(f"{page.name} has other tables than the results: run `python -m bench.report --readme`")
        else:
            page.write_text(wanted, encoding="utf-8")
            print(f"{page.name}: tables rewritten from {len(files)} files")


if __name__ == "__main__":
    main()
