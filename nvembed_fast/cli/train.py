"""nvembed-fast train."""

import argparse

from nvembed_fast.cli import options, process

SUMMARY = "Train a model by a recipe, or go on with its run."
EXAMPLES = """\
examples:
  nvembed-fast train recipe.toml
  nvembed-fast train recipe.toml --set train.lr=1e-5 --set output=./other
  nvembed-fast train --print-defaults > recipe.toml
  torchrun --nproc-per-node 8 -m nvembed_fast train recipe.toml"""

WRONG_RECIPE = 2  # the status of wrong arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", nargs="?", type=options.path, help="a TOML file. Its paths are relative to the file"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the recipe, may come several times. A path is relative to the working "
        "directory",
    )
    parser.add_argument(
        "--print-defaults", action="store_true", help="print a recipe with every key, its default and meaning"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the rank's GPU if there is one)")


def run(arguments: argparse.Namespace) -> int:
    from nvembed_fast.training.recipe import Recipe, RecipeError, defaults

    if arguments.print_defaults:
        print(defaults(), end="")
        return 0
    try:
        if arguments.recipe is None:
            raise RecipeError("name the file of a recipe; --print-defaults prints one")
        recipe = Recipe.from_file(arguments.recipe, arguments.set)
        # importing torch takes seconds: first what fails at once
        process.raise_interrupts()
        from nvembed_fast.training.trainer import train

        options.note_download(recipe.model.start)
        train(recipe, device=arguments.device, say=process.say)
    except RecipeError as error:
        process.say(f"nvembed-fast train: {error}")
        return WRONG_RECIPE
    return 0
