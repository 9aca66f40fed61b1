"""The command nvembed-fast: encode, search, init, info.

A command is a module with SUMMARY, EXAMPLES, `add_arguments` and `run`. Its functions import torch and the
rest of the package where they use it, so that --help and --version answer at once.
"""

import argparse
import os
import sys

from nvembed_fast import __version__
from nvembed_fast.cli import encode, info, init, search

__all__ = ["main"]

COMMANDS = {"encode": encode, "search": search, "init": init, "info": info}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status. An error that a user can mend is one line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        COMMANDS[arguments.command].run(arguments)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader has gone (`| head`): keep Python from complaining again while it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _mendable_errors() as error:
        print(f"nvembed-fast {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _mendable_errors() -> tuple[type[Exception], ...]:
    # a command that has not imported torch cannot have run out of its memory
    torch = sys.modules.get("torch")
    return (OSError, ValueError, TypeError, ImportError, *((torch.OutOfMemoryError,) if torch else ()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nvembed-fast",
        description="NV-Embed text embeddings, fast.",
        epilog="examples:\n" + "\n".join(c.EXAMPLES.splitlines()[1] for c in COMMANDS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nvembed-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.SUMMARY,
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
    return parser
