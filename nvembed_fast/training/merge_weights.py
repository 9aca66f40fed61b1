"""Several trained models as one model, tensor by tensor: their average, or a point between two.

Models that were trained from one start, with other seeds or data, can be better together
than each alone (model soups, arXiv 2203.05482).

1. All configs, tokenizers and headers are compared before a weight is read.
2. Of each tensor the values of all models are summed in fp32 (float64 for float64), by their shares. Or, for
   two models, the tensor is taken on the arc between theirs (slerp), which keeps its length where the
   average shortens it.
3. The result is written like any save, whole or not at all. In memory are the tensors of one of its files,
   and one tensor of one model.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open

from nvembed_fast import files
from nvembed_fast.checkpoint.load import check_tensors, stored_tensors
from nvembed_fast.checkpoint.names import CONFIG_FILE, published_tensors, tokenizer_files
from nvembed_fast.checkpoint.pipeline import check_modules, pipeline_files
from nvembed_fast.checkpoint.save import save_tensors
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.files import brief
from nvembed_fast.tokenization import TextTokenizer

__all__ = ["Method", "merge_weights"]

Method = Literal["average", "slerp"]
_FLAT = 1e-6  # the sine of an angle at which arc and line are one


def merge_weights(
    models: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    weights: Sequence[float] | None = None,
    method: Method = "average",
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the average of models as a model directory.

    Args:
        models: two or more model directories of one shape, one config and one tokenizer. Prompts and
            max_seq_length of the first are taken.
        output: another directory. An earlier save in it is replaced.
        weights: the share of each model. They are divided by their sum. None: equal shares.
        method: "average", or "slerp" of two models, whose second share is the part of the arc.
        dtype: the stored dtype. None takes that of the first model.
        max_shard_bytes: the max size of one file's tensors, which are in memory at a time.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the models differ in more than their weights, or a weight is not finite. Nothing was
            written.
        FileExistsError: another model lies in the output directory.
    """
    directories = [files.current(files.expanded(model)) for model in models]
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    shares = _shares(weights, len(directories))
    if method == "slerp" and (len(shares) != 2 or min(shares) < 0):
        raise ValueError(
            f"slerp takes two models and shares from 0 on, got {len(shares)} with {shares}: average others"
        )
    if any(files.expanded(output).resolve() == files.expanded(model).resolve() for model in models):
        raise ValueError(f"{output} is one of the models: choose another directory for the average")
    configs = [NVEmbedConfig.from_file(directory / CONFIG_FILE) for directory in directories]
    first = configs[0]
    _check_same(directories, configs)
    table = published_tensors(first)
    places: list[dict[str, Path]] = []
    for directory in directories:
        headers = stored_tensors(directory)
        check_tensors(directory, headers, table)
        check_modules(directory)
        places.append({name: file for file, header in headers.items() for name in header})

    # a default device of the caller changes nothing
    with torch.device("cpu"), ExitStack() as stack:
        opened = [
            {file: stack.enter_context(safe_open(file, framework="pt")) for file in {*place.values()}}
            for place in places
        ]

        def value(name: str, model: int) -> torch.Tensor:
            stored = opened[model][places[model][name]].get_tensor(name)
            return stored.to(torch.promote_types(stored.dtype, torch.float32))

        def merged(name: str) -> torch.Tensor:
            if method == "slerp":
                return _on_the_arc(value(name, 0), value(name, 1), shares[1])
            total: Any = 0
            for model, share in enumerate(shares):
                total = total + share * value(name, model)
            return total

        save_tensors(
            merged,
            replace(first, is_untrained=all(config.is_untrained for config in configs)),
            output,
            dtype=first.torch_dtype if dtype is None else dtype,
            max_shard_bytes=max_shard_bytes,
            other_files=[*tokenizer_files(directories[0]), *pipeline_files(directories[0])],
        )


def _on_the_arc(one: torch.Tensor, other: torch.Tensor, part: float) -> torch.Tensor:
    """The tensor at this part of the arc from one to the other. The line where there is no arc."""
    lengths = one.norm(), other.norm()
    if not all(lengths):
        return torch.lerp(one, other, part)
    u, v = one / lengths[0], other / lengths[1]
    # exact also for angles at which the cosine rounds to 1
    angle = 2 * torch.atan2((u - v).norm(), (u + v).norm()).double()
    if angle.sin() < _FLAT:
        return torch.lerp(one, other, part)
    left, right = (((1 - part) * angle).sin() / angle.sin(), (part * angle).sin() / angle.sin())
    return left.item() * one + right.item() * other


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if count < 2:
        raise ValueError(f"an average needs two models or more, got {count}")
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count or not all(map(isfinite, given)) or sum(given) <= 0:
        raise ValueError(f"weights must be {count} finite numbers with a positive sum, got {brief(given)}")
    return [weight / sum(given) for weight in given]


def _check_same(directories: list[Path], configs: list[NVEmbedConfig]) -> None:
    """ValueError if a model differs from the first one in more than its weights."""
    first, *others = configs
    for directory, config in zip(directories[1:], others, strict=True):
        alike = replace(config, torch_dtype=first.torch_dtype, is_untrained=first.is_untrained)
        for field in fields(first):
            if getattr(alike, field.name) != getattr(first, field.name):
                raise ValueError(
                    f"{directories[0]} and {directory} differ in {field.name} of {CONFIG_FILE}: they have no "
                    "average"
                )
    wanted, *found = [TextTokenizer.from_directory(directory, first).definition for directory in directories]
    for directory, definition in zip(directories[1:], found, strict=True):
        if definition != wanted:
            raise ValueError(
                f"{directories[0]} and {directory} have other tokenizers, so they have no average"
            )
