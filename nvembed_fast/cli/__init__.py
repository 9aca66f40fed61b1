"""The command nvembed-fast: its parser, its commands, its exit status and how it tells an error.

A command is a module with SUMMARY, EXAMPLES, `add_arguments` and `run`, which may return an exit status. Its
functions import torch and the rest of the package where they use it, so that --help and --version answer at
once. This file imports little, because Ctrl-C before `main` is a traceback.
"""

import sys
from typing import TYPE_CHECKING, Any

from nvembed_fast.cli import process

if TYPE_CHECKING:
    import argparse

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status. An error that a user can mend is one line on stderr.

    Raises:
        SystemExit: --help, --version, wrong arguments, or a standard output that cannot be written.
    """
    with process.interrupts():
        process.open_closed_streams()
        try:
            return _run(argv)
        finally:
            if not process.write_out():
                raise SystemExit(1)


def _run(argv: list[str] | None) -> int:
    arguments = _arguments(sys.argv[1:] if argv is None else argv)
    try:
        return _commands()[arguments.command].run(arguments) or 0
    except KeyboardInterrupt as stop:
        process.say(f"interrupted; {stop}" if stop.args else "interrupted")
        return process.INTERRUPTED
    except BrokenPipeError:  # `| head`: see `process.write_out`
        return 0
    except _mendable_errors() as error:
        # an error of standard output is told there, once
        if process.write_out():
            process.say(f"nvembed-fast {arguments.command}: {_sentence(error)}")
        return 1
    except RuntimeError as error:  # torch has no type for a CPU without memory
        if "can't allocate memory" not in str(error):
            raise
        process.say(
            f"nvembed-fast {arguments.command}: not enough memory on the CPU: choose a smaller model or "
            "smaller sizes, such as --max-batch-tokens"
        )
        return 1


def _commands() -> dict[str, Any]:
    from nvembed_fast.cli import (
        ablate,
        check,
        convert,
        curate,
        encode,
        evaluate,
        info,
        init,
        merge,
        mine,
        mteb,
        search,
        synthesize,
        train,
        warm_up,
    )

    commands = {"encode": encode, "search": search, "init": init, "curate": curate, "convert": convert}
    commands |= {
        "synthesize": synthesize,
        "mine": mine,
        "train": train,
        "eval": evaluate,
        "merge": merge,
        "info": info,
        "check": check,
    }
    return commands | {"ablate": ablate, "warm-up": warm_up, "mteb": mteb}


def _mendable_errors() -> tuple[type[Exception], ...]:
    # a command that has not imported torch cannot have run out of its memory
    torch = sys.modules.get("torch")
    errors = (OSError, ValueError, TypeError, ImportError, MemoryError, RecursionError)
    return (*errors, torch.OutOfMemoryError) if torch else errors


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # not one of ours, which are sentences
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _arguments(given: list[str]) -> "argparse.Namespace":
    import difflib

    commands = _commands()
    parser, parsers = _parser()
    if given and not given[0].startswith("-") and given[0] not in commands:
        close = difflib.get_close_matches(given[0], commands, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(commands)}"
        parser.error(f"no command {given[0]!r}: {hint}")
    if given and given[0] in commands:
        _check_options(parsers[given[0]], given[1:])
    arguments, unknown = parser.parse_known_args(given)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        hint = "" if unknown[0].startswith("-") else ": --help names its files, and - is standard input"
        parser.error(f"unrecognized arguments {' '.join(unknown[:3])}{more}{hint}")
    return arguments


def _check_options(parser: "argparse.ArgumentParser", given: list[str]) -> None:
    """A command's error for an option that it has not. It goes before others, such as a missing --output."""
    import argparse
    import difflib
    import re

    if any(action.nargs == argparse.REMAINDER for action in parser._actions):
        return
    known = list(parser._option_string_actions)
    for word in given:
        if word == "--":
            return
        name = word.partition("=")[0]
        # an abbreviation is an option
        if re.fullmatch(r"--\w[\w-]*", name) and not any(option.startswith(name) for option in known):
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"see {parser.prog} --help"
            parser.error(f"no option {name}: {hint}")


def _parser() -> "tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]":
    """The parser of all, and those of the commands."""
    import argparse

    from nvembed_fast import __version__

    commands = _commands()
    parser = argparse.ArgumentParser(
        prog="nvembed-fast",
        description="NV-Embed text embeddings, fast.",
        epilog="examples:\n" + "\n".join(c.EXAMPLES.splitlines()[1] for c in commands.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nvembed-fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        sub = subparsers.add_parser(
            name,
            help=command.SUMMARY,
            description=command.SUMMARY,
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
    return parser, dict(subparsers.choices)
