"""Texts to vectors for a command, never in silence, and into the rows of a file if it asks so."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from nvembed_fast.cli import options, process
from nvembed_fast.stream import Progress, Result

if TYPE_CHECKING:
    import argparse

    from nvembed_fast.cli.partial import Partial
    from nvembed_fast.encoder import NVEmbed

__all__ = ["embed"]


def embed(
    model: "NVEmbed",
    texts: list[str],
    instruction: str,
    arguments: "argparse.Namespace",
    partial: "Partial | None" = None,
    width: int | None = None,
    numbers: list[int] | None = None,
) -> np.ndarray:
    """Embed texts as `NVEmbed.encode` does, with a line every ten seconds where no bar is seen.

    Args:
        arguments: the text options.
        partial: where the rows go. Those that are there already are not made again.
        width: dimensions to keep. None keeps all.
        numbers: of the texts in their file, for errors. None: they are all of it.

    Returns:
        [N, D] fp32 on the host, or the rows of `partial`.
    """
    missing = list(range(len(texts))) if partial is None else partial.missing()
    left = [texts[row] for row in missing]
    names = [numbers[row] for row in missing] if numbers else missing
    rows = None if partial is None else torch.from_numpy(partial.rows)
    result = Result(len(texts), width or model.config.hidden_size, model.device, on_host=True, rows=rows)
    progress = Progress(left, arguments.max_length, show=None)
    start = time.monotonic()

    def state() -> str:
        seconds = time.monotonic() - start
        rate = f"{progress.done / seconds:.3g} texts/s" if progress.done else "the first ones"
        return f"{progress.done} of {len(left)} texts in {seconds:.0f} s, {rate} on {model.device}"

    with progress, process.telling(state), options.note_cut(), _named_as_in_the_file(names):
        model.warn_about(left)
        for indices, vectors in model.stream(left, instruction, **options.encode_options(arguments)):
            landed = result.put([missing[index] for index in indices], vectors[:, :width])
            progress.advance(indices)
            if partial is not None:
                partial.arrived(landed)
    if partial is not None:
        partial.arrived(result.land())
        return partial.rows
    return np.asarray(result.finish())


@contextmanager
def _named_as_in_the_file(numbers: list[int]) -> Iterator[None]:
    """Inside, an error names a text by its number in the file, and the option of the command."""
    try:
        yield
    except ValueError as error:
        message = re.sub(
            r"prompts\[(\d+)\]",
            lambda found: f"text {numbers[int(found[1])]} (counted from 0)",
            str(error),
            count=1,
        )
        raise ValueError(re.sub(r"dtype='(\w+)'", r"--dtype \1", message)) from error
