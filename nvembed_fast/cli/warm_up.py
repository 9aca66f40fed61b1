"""nvembed-fast warm-up."""

import argparse

from nvembed_fast.cli import options

SUMMARY = "Compile the kernels that a model needs, so that its first calls do not wait for them."
EXAMPLES = """\
examples:
  nvembed-fast warm-up nvidia/NV-Embed-v2
  nvembed-fast warm-up ./my-model --dtype bfloat16 --training"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--training", action="store_true", help="also what a step needs that trains all weights"
    )
    options.add_model_options(parser, is_positional=True)


def run(arguments: argparse.Namespace) -> None:
    import time

    model = options.load(arguments)
    if arguments.training:
        model.requires_grad_(True)
    started = time.monotonic()
    if model.warm_up(training=arguments.training):
        print(f"compiled in {time.monotonic() - started:.0f} s, or found in Triton's cache on disk")
    else:
        implementation, reason = model.placement.implementation()
        print(f"nothing to compile: the operations take {implementation}, because {reason}")
