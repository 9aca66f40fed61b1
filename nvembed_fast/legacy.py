"""Calls written for the original or for other libraries, translated into ours.

No other file knows their keywords.
"""

import difflib
import inspect
import os
import re
import warnings
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, NamedTuple, get_args

import torch
from torch import nn

from nvembed_fast import ops
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.packing import Padded, pad_rows

__all__ = [
    "Encoding",
    "check_attention",
    "check_attribute",
    "encoding_call",
    "loading_place",
    "loading_source",
    "on_one_device",
    "padded_batch",
    "padded_forward",
    "warn_of_end_marks",
]

# keywords that each function accepts beside ours
OLD_KEYWORDS = {
    "from_pretrained": (
        "pretrained_model_name_or_path",
        "torch_dtype",
        "device_map",
        # these cannot change a vector
        "trust_remote_code",
        "low_cpu_mem_usage",
        "use_safetensors",
        "attn_implementation",
    ),
    "encode": (
        "return_numpy",
        "prompt",
        "prompt_name",
        "task_name",
        "prompt_type",
        "convert_to_numpy",
        "convert_to_tensor",
        "normalize_embeddings",
        "norm",
        "show_progress_bar",
        "device",
        "output_value",
        "pool",
        # these cannot change a vector
        "num_workers",
        "batch_size",
        "chunk_size",
    ),
}
# other libraries' words for arguments of ours
_RIGHT_KEYWORDS = {
    "max_seq_length": "max_length",
    "sentences": "prompts",
    "texts": "prompts",
    "task": "instruction=query_instruction(task)",
    "use_auth_token": "token",
    "implementation": "impl",
    "model_name_or_path": "path_or_id",
}
_ONE_DEVICE = "all weights lie on one device: pass device, and dtype='float16' for 2 bytes a weight"
_NO_QUANTISATION = "quantised weights are not supported: dtype='float16' takes 2 bytes a weight"
# keywords that ask for what is not here, and the way out. False and None ask for nothing
_NOT_HERE = {
    "quantization_config": _NO_QUANTISATION,
    "load_in_8bit": _NO_QUANTISATION,
    "load_in_4bit": _NO_QUANTISATION,
    "max_memory": _ONE_DEVICE,
    "offload_folder": _ONE_DEVICE,
    "offload_state_dict": _ONE_DEVICE,
    "offload_buffers": _ONE_DEVICE,
    "tp_plan": _ONE_DEVICE,
    "tp_size": _ONE_DEVICE,
    "device_mesh": _ONE_DEVICE,
}
# attributes that change vectors in the original or in other libraries, and what changes them here
_NOT_SET = {
    "prompts": "pass instruction to encode",
    "default_prompt_name": "pass instruction to encode",
    "truncate_dim": "pass truncate_dim to encode",
    "is_mask_instruction": "change is_mask_instruction in config.json",
    "max_length": "set max_seq_length",
    "tokenizer": "load a model with that tokenizer in its directory",
}
# values of device_map that name no device
_ANY_DEVICE = ("auto", "balanced", "balanced_low_0", "sequential")
# what transformers takes as attn_implementation, ids of kernels on the hub and ours included
_ATTENTION = re.compile(
    r"(paged\|)?(eager|sdpa|flex_attention|flash_attention_\d|nvembed_fast)|[\w.|-]+/[\w.:@-]+"
)
# names of prompts under which other libraries embed documents, which carry no instruction
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


class Encoding(NamedTuple):
    """Our arguments of `encode`.

    `normalize` asks that vectors have unit norm behind a cut, too.
    """

    instruction: str
    output: str
    show_progress: bool | None
    is_truncated: bool = False
    normalize: bool = False


def loading_source(path_or_id: str | PathLike | None, keywords: dict[str, Any]) -> str | PathLike:
    """The path or id that a call of `from_pretrained` names, once and by whichever keyword."""
    named = [name for name in (path_or_id, keywords.get("pretrained_model_name_or_path")) if name is not None]
    if len(named) != 1:
        raise TypeError(
            "from_pretrained() needs path_or_id once: a directory, or a model's id on the hub, got "
            f"{' and '.join(map(repr, named)) or 'none'}"
        )
    if not isinstance(named[0], str | PathLike) or not isinstance(os.fspath(named[0]), str):
        raise TypeError(f"path_or_id must be a str or a PathLike of one, got {type(named[0]).__name__}")
    return named[0]


def loading_place(
    function: Callable, device: Any, dtype: torch.dtype | str | None, keywords: dict[str, Any]
) -> tuple[str | int | torch.device | None, torch.dtype | str | None]:
    """The (device, dtype) that a call of `from_pretrained` asks for. None leaves the choice to us.

    Args:
        function: `from_pretrained`, for the error about unknown keywords.
        device, dtype: our arguments. Each takes the forms of its old name too.
        keywords: all others. `torch_dtype` and `device_map` are the old names of dtype and device.

    Raises:
        TypeError: a keyword is unknown.
        ValueError: see `check_attention`.
    """
    _refuse_unknown(function, keywords)
    check_attention(keywords.get("attn_implementation"))
    device = keywords.get("device_map") if device is None else device
    dtype = keywords.get("torch_dtype") if dtype is None else dtype
    if isinstance(device, dict):
        if set(device) != {""}:
            raise ValueError(f"device_map must put the whole model on one device, got {device!r}")
        device = device[""]
    return None if device in _ANY_DEVICE else device, None if dtype == "auto" else dtype


def encoding_call(
    function: Callable, call: Encoding, keywords: dict[str, Any], *, device: torch.device, normalized: bool
) -> Encoding:
    """The arguments that a call of `encode` asks for.

    Args:
        function: `encode`, for the error about unknown keywords.
        call: our arguments.
        keywords: all others. None stands for a keyword that is not given.
        device: of the model.
        normalized: whether the model's vectors have unit norm.

    Raises:
        TypeError: a keyword is unknown, asks for another result than the model gives, or contradicts ours.
    """
    _refuse_unknown(function, keywords)
    given = {name: value for name, value in keywords.items() if value is not None}
    # behind a cut, normalising anew is a choice
    wishes = [bool(given[name]) for name in ("normalize_embeddings", "norm") if name in given]
    _refuse_other_results(given, device, any(wishes) if call.is_truncated else normalized)
    instruction, show_progress = call.instruction, call.show_progress
    if prompt := given.get("prompt"):
        if instruction not in ("", prompt):
            raise TypeError("encode() got both instruction and prompt, which are one thing: pass instruction")
        instruction = prompt
    if show_progress is None and "show_progress_bar" in given:
        show_progress = bool(given["show_progress_bar"])
    output = _output(call.output, given)
    return call._replace(
        instruction=instruction, output=output, show_progress=show_progress, normalize=any(wishes)
    )


def _output(output: str, given: dict[str, Any]) -> str:
    if given.get("convert_to_tensor"):
        if output == "numpy" or given.get("return_numpy"):
            raise TypeError("encode() got convert_to_tensor=True and asks for numpy: pass output alone")
        return "torch"
    if given.get("return_numpy") or given.get("convert_to_numpy"):
        return "numpy"
    # in that library arrays are the default
    if "convert_to_tensor" in given and "convert_to_numpy" not in given:
        return "numpy"
    return output


def _refuse_other_results(given: dict[str, Any], device: torch.device, normalized: bool) -> None:
    """TypeError for a keyword of another library that asks for what is not here. It says what to do."""
    for name in ("prompt_name", "task_name", "prompt_type"):
        # an enumeration's member counts by its value
        value = getattr(given.get(name), "value", given.get(name))
        if value is not None and value not in _DOCUMENT_PROMPTS:
            raise TypeError(
                f"encode() has no named prompts, got {name}={value!r}: pass "
                "instruction=query_instruction(task), or nothing for documents"
            )
    for name in ("normalize_embeddings", "norm"):
        if bool(given.get(name, normalized)) != normalized:
            have = "have unit norm" if normalized else "are not normalised"
            raise TypeError(
                f"encode() got {name}={given[name]!r}, but the vectors of this model {have}: "
                "drop the keyword, or change output_normalize in config.json"
            )
    if given.get("output_value", "sentence_embedding") != "sentence_embedding":
        raise TypeError(
            f"encode() returns one vector a text, got output_value={given['output_value']!r}: "
            "model(input_ids, attention_mask) gives the states of all tokens"
        )
    if "pool" in given:
        raise TypeError("encode() has no pool of processes: start one process for each GPU")
    if "device" in given:
        try:
            asked = torch.device(given["device"])
            is_ours = asked.type == device.type and asked.index in (None, device.index or 0)
        except (RuntimeError, TypeError):
            is_ours = False
        if not is_ours:
            raise TypeError(
                f"encode() runs on the model's device {device}, got device={given['device']!r}: "
                "pass device to from_pretrained, or call model.to(device)"
            )


def warn_of_end_marks(texts: list[str], end_mark: str) -> None:
    """Warn of callers that add the end mark themselves, as that of sentence-transformers needs."""
    for index, text in enumerate(texts):
        if isinstance(text, str) and text.endswith(end_mark):
            warnings.warn(
                f"prompts[{index}] ends with {end_mark!r}, and encode adds it to every text: leave it out, "
                "or the vector is that of a text with two",
                stacklevel=4,
            )
            return


def check_attention(attn_implementation: Any) -> None:
    """ValueError for an attn_implementation that transformers does not have. Its own change no vector."""
    names = attn_implementation if isinstance(attn_implementation, dict) else {"": attn_implementation}
    for name in names.values():
        if name is None or (isinstance(name, str) and _ATTENTION.fullmatch(name)):
            continue
        *others, last = map(repr, get_args(ops.Impl))
        way = f"leave it out, or pass impl={', '.join(others)} or {last}"
        if name in get_args(ops.Impl):
            way = f"pass impl={name!r}"
        raise ValueError(f"attn_implementation={name!r} is no attention of transformers: {way}")


def check_attribute(name: str) -> None:
    """AttributeError for an attribute that would be set in vain. It says what changes the vectors instead."""
    if name in _NOT_SET:
        raise AttributeError(f"setting {name!r} would change nothing here: {_NOT_SET[name]}")


def on_one_device(module: nn.Module) -> nn.Module:
    """The module in a DataParallel, which the model card wraps around all of a model's. Others as they are.

    Packed batches cannot be cut by rows, so it would be wrong on several devices, and one needs none.
    """
    if not isinstance(module, nn.DataParallel):
        return module
    if len(module.device_ids) > 1:
        warnings.warn(
            "DataParallel is taken off, and the model runs on one device: for several GPUs start one process "
            "per GPU",
            stacklevel=4,
        )
    return module.module


def padded_batch(
    model: NVEmbedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pool_mask: torch.Tensor | None,
) -> Padded:
    """The arguments of `NVEmbed.forward`, not waited for."""
    device = model.embedding_model.embed_tokens.weight.device
    if isinstance(input_ids, torch.Tensor) and input_ids.device != device:
        raise ValueError(f"input_ids must be on {device} like the model, got {input_ids.device}")
    return Padded(input_ids, attention_mask, pool_mask)


def padded_forward(model: NVEmbedModel, padded: Padded, facts: Sequence[int]) -> torch.Tensor:
    """The original's forward on a padded batch, when its facts have been read: see `NVEmbed.forward`."""
    batch, places = padded.pack(facts, model.config.text_config.vocab_size)
    if padded.keep_BS is None:
        return pad_rows(model.token_states(batch), places, padded.shape)
    return model(batch)


def _refuse_unknown(function: Callable, keywords: dict[str, Any]) -> None:
    """TypeError for a keyword that nobody reads. It names the right one."""
    name, old = function.__name__, OLD_KEYWORDS[function.__name__]
    for keyword, value in keywords.items():
        if keyword in old or (keyword in _NOT_HERE and not value):
            continue
        parameters = inspect.signature(function).parameters.values()
        known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"]
        near = difflib.get_close_matches(keyword, [*known, *old], n=1, cutoff=0.8)
        right = _RIGHT_KEYWORDS.get(keyword) or (near[0] if near else None)
        hint = f"use {right}" if right else f"it knows {', '.join([*known, *old])}"
        raise TypeError(f"{name}() does not know the keyword {keyword!r}: {_NOT_HERE.get(keyword, hint)}")
