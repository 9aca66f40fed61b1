"""Calls written for the original or for other libraries, translated into ours.

No other file knows their keywords.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch

from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.packing import from_padded, pad_rows

__all__ = ["encoding_output", "loading_place", "padded_forward"]

# keywords that each function accepts beside ours. Those that no code below reads have no effect
OLD_KEYWORDS = {
    "from_pretrained": ("torch_dtype", "device_map", "trust_remote_code"),
    "encode": ("num_workers", "batch_size", "return_numpy"),
}
# values of device_map that name no device
_ANY_DEVICE = ("auto", "balanced", "balanced_low_0", "sequential")
_warned: set[tuple[str, str]] = set()


def loading_place(
    function: Callable, device: Any, dtype: torch.dtype | str | None, keywords: dict[str, Any]
) -> tuple[str | int | torch.device | None, torch.dtype | str | None]:
    """The (device, dtype) that a call of `from_pretrained` asks for. None leaves the choice to us.

    Args:
        function: `from_pretrained`, for the warning about unknown keywords.
        device, dtype: our arguments. Each takes the forms of its old name too.
        keywords: all others. `torch_dtype` and `device_map` are the old names of dtype and device.
    """
    _warn_of_unknown(function, keywords)
    device = keywords.get("device_map") if device is None else device
    dtype = keywords.get("torch_dtype") if dtype is None else dtype
    if isinstance(device, dict):
        if set(device) != {""}:
            raise ValueError(f"device_map must put the whole model on one device, got {device!r}")
        device = device[""]
    return None if device in _ANY_DEVICE else device, None if dtype == "auto" else dtype


def encoding_output(function: Callable, output: str, keywords: dict[str, Any]) -> str:
    """The output that a call of `encode` asks for: `return_numpy` is the old name of output="numpy"."""
    _warn_of_unknown(function, keywords)
    return "numpy" if keywords.get("return_numpy") else output


def padded_forward(
    model: NVEmbedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pool_mask: torch.Tensor | None,
) -> torch.Tensor:
    """The original's forward on a padded batch: see `NVEmbed.forward`."""
    _check_ids(input_ids, model.config.text_config.vocab_size)
    batch, places = from_padded(input_ids, attention_mask, pool_mask)
    if pool_mask is None:
        return pad_rows(model.token_states(batch), places, (input_ids.shape[0], input_ids.shape[1]))
    _check_pooled(pool_mask != 0 if attention_mask is None else (pool_mask * attention_mask) != 0)
    return model(batch)


def _check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Raise ValueError here, because on a GPU an id beyond the embedding would end the process."""
    if input_ids.is_floating_point():
        raise ValueError(f"input_ids must be integers, got {input_ids.dtype}")
    if input_ids.numel():
        low, high = (int(v) for v in input_ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids must lie in 0 to {vocab_size - 1}, got {low if low < 0 else high}")


def _check_pooled(pooled: torch.Tensor) -> None:
    """ValueError for a row of a [B, S] bool mask that keeps nothing. The original returns NaN there."""
    empty = (~pooled.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"row {empty[0]} of the batch has no token that attention_mask and pool_mask both keep"
        )


def _warn_of_unknown(function: Callable, keywords: dict[str, Any]) -> None:
    """Warn once per unknown keyword, and name the known ones."""
    name, old = function.__name__, OLD_KEYWORDS[function.__name__]
    for keyword in keywords:
        if keyword in old or (name, keyword) in _warned:
            continue
        parameters = inspect.signature(function).parameters.values()
        known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"]
        message = f"{name}() ignores {keyword!r}; it knows {', '.join([*known, *old])}"
        warnings.warn(message, stacklevel=4)
        _warned.add((name, keyword))
