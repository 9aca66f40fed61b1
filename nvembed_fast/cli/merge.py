"""nvembed-fast merge."""

import argparse

from nvembed_fast import files
from nvembed_fast.cli import options, process

SUMMARY = "Average the weights of models that were trained from one start."
EXAMPLES = """\
examples:
  nvembed-fast merge ./run-1 ./run-2 ./run-3 -o ./average
  nvembed-fast merge ./start ./trained -o ./between --weights 1 3
  nvembed-fast merge ./run-1 ./run-2 -o ./between --method slerp"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", type=options.path, metavar="MODEL", help="a model directory")
    parser.add_argument(
        "-o", "--output", required=True, type=options.path, metavar="DIRECTORY", help="of the average"
    )
    parser.add_argument("--weights", nargs="+", type=float, help="share of each model (default: equal)")
    parser.add_argument(
        "--method",
        choices=("average", "slerp"),
        default="average",
        help="slerp: on the arc between two models, at the share of the second (default: average)",
    )
    parser.add_argument("--dtype", help="of the stored weights (default: that of the first model)")


def run(arguments: argparse.Namespace) -> None:
    from nvembed_fast.training.merge_weights import merge_weights

    process.raise_interrupts()
    output = arguments.output
    with process.telling_what_was_written(output, lambda: files.current(output) / "config.json"):
        merge_weights(
            arguments.models,
            output,
            weights=arguments.weights,
            method=arguments.method,
            dtype=arguments.dtype,
        )
        print(f"{output}: the {arguments.method} of {len(arguments.models)} models")
