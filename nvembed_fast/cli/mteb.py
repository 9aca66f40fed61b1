"""nvembed-fast mteb."""

import argparse

from nvembed_fast.cli import options, process

SUMMARY = "mteb's own command, with this package as the loader of NV-Embed. It needs nvembed-fast[mteb]."
EXAMPLES = """\
examples:
  nvembed-fast mteb run -m nvidia/NV-Embed-v2 -t STS12 ArguAna
  nvembed-fast mteb run -m nvidia/NV-Embed-v2 --path ./NV-Embed-v2 -b "MTEB(eng, v2)" --dtype bfloat16
  nvembed-fast mteb run -m me/my-model --path ./my-model -t SciFact
  nvembed-fast mteb run --help"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="a command line of mteb")
    _add_own(parser)


def _add_own(parser: argparse.ArgumentParser) -> None:
    """Options that may stand among those of mteb."""
    parser.add_argument("--path", type=options.path, help="directory of the model that -m names")
    parser.add_argument("--max-length", type=int, help="tokens a text (default: 32768 for NV-Embed)")
    parser.add_argument("--max-batch-tokens", type=int, help="tokens a batch (default: by the device)")
    parser.add_argument(
        "--dtype", help="float16, bfloat16, float32 (default: the checkpoint's; float32 on a CPU)"
    )
    parser.add_argument("--impl", help="auto, triton, library or torch (default: auto)")
    parser.add_argument("--latents", help="auto, direct or absorbed (default: auto)")


def run(arguments: argparse.Namespace) -> None:
    anywhere = argparse.ArgumentParser(prog="nvembed-fast mteb", add_help=False, allow_abbrev=False)
    _add_own(anywhere)
    _, words = anywhere.parse_known_args(arguments.words, arguments)
    if not words:
        raise ValueError("name a command of mteb, such as: nvembed-fast mteb run --help")
    if arguments.path is not None and not arguments.path.is_dir():
        raise FileNotFoundError(f"--path {arguments.path} is no directory")

    from nvembed_fast.integrations import mteb

    process.raise_interrupts()
    names = ("max_length", "max_batch_tokens", "dtype", "impl", "latents")
    loading = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.path is None:
        mteb.register(**loading)
    else:
        mteb.register([_model_name(words)], path=arguments.path, **loading)
    mteb.run_command(words)


def _model_name(words: list[str]) -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", "--model")
    name = parser.parse_known_args(words)[0].model
    if name is None:
        raise ValueError("--path needs the name of the model beside it: -m OWNER/NAME")
    return name
