"""nvembed-fast init."""

import argparse
from typing import get_args

from nvembed_fast import files
from nvembed_fast.cli import options, process
from nvembed_fast.config import HeadStart, PoolingHeadName

SUMMARY = "Start a model from a Mistral or Llama decoder, with a fresh pooling head."
EXAMPLES = """\
examples:
  nvembed-fast init ./Mistral-7B-v0.1 -o ./my-model
  nvembed-fast init smollm2 -o ./small-model --num-latents 256"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("decoder", help="a Hugging Face directory, a hub id, or a .gguf file")
    parser.add_argument(
        "-o", "--output", required=True, type=options.path, metavar="DIRECTORY", help="of the new model"
    )
    parser.add_argument("--num-latents", type=int, default=512, help="latents of the head (default: 512)")
    parser.add_argument("--num-heads", type=int, default=8, help="heads of the latent attention (default: 8)")
    parser.add_argument(
        "--head-width", type=int, help="their width (default: 64 under 2048 hidden, else 4096)"
    )
    parser.add_argument(
        "--pooling-head",
        default="latent",
        choices=get_args(PoolingHeadName),
        help="the published models' latent head, or one to compare it with (default: %(default)s)",
    )
    parser.add_argument(
        "--head-start",
        default="mean",
        choices=get_args(HeadStart),
        help="the head is mean pooling at first, or all random (default: %(default)s)",
    )
    parser.add_argument(
        "--force", action="store_true", help="move a model in DIRECTORY to DIRECTORY/replaced-1, or -2 ..."
    )
    parser.add_argument("--seed", type=int, default=0, help="of the fresh head (default: 0)")


def run(arguments: argparse.Namespace) -> None:
    from nvembed_fast.new_model import init_model

    process.raise_interrupts()
    options.note_download(arguments.decoder)
    output, head = arguments.output, arguments.pooling_head
    with process.telling_what_was_written(output, lambda: files.current(output) / "config.json"):
        moved = init_model(
            arguments.decoder,
            output,
            num_latents=arguments.num_latents,
            num_heads=arguments.num_heads,
            head_width=arguments.head_width,
            seed=arguments.seed,
            pooling_head=head,
            head_start=arguments.head_start,
            force=arguments.force,
        )
        if moved:
            print(f"{moved}: the files that were in {output}")
        print(f"{output}: {arguments.decoder} with a fresh {head} head; train the model before use")
