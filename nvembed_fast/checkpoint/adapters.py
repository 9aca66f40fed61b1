"""LoRA adapters of a model: put on, saved and loaded in PEFT's file format, and merged. PEFT is not needed.

A directory of an adapter holds:

1. adapter_config.json: PEFT's `LoraConfig`.
2. adapter_model.safetensors: A and B of the decoder's seven projections, in fp32, under PEFT's names. So a
   stock `PeftModel` on a stock MistralModel or LlamaModel loads it. A packed product (`network/lora.py`) is
   unpacked here.
3. adapter_head.safetensors: the pooling head, where it was trained. Either all of its weights under their
   published names, or A and B of its products under PEFT's names. PEFT does not read this file.

The metadata of the second file may name the decoder's weights that the adapter was trained on. PEFT does not
read them. `NVEmbed.from_pretrained` then refuses others, such as those that the adapter is merged into.

Adapters that PEFT has written load, too, on any of the seven projections. Projections without an adapter in a
packed product then get one of zeros.
"""

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from nvembed_fast import files
from nvembed_fast.checkpoint.names import Slot, published_tensors
from nvembed_fast.config import check_integer
from nvembed_fast.files import brief
from nvembed_fast.network.lora import AdaptedLinear, Adapter, HeadTraining, takes_adapter
from nvembed_fast.network.model import NVEmbedModel

__all__ = ["add_lora", "load_adapter", "merge_adapter", "read_config", "save_adapter", "trained_on"]

CONFIG_FILE, WEIGHTS_FILE, HEAD_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_head.safetensors",
)
_BASE_WEIGHTS = "base_weights"
_PREFIX, _BACKBONE = "base_model.model.", "embedding_model."
_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_IN_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.weight")
# fields of a LoraConfig that do not change what an adapter computes, or are read below
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights"}
_HARMLESS = {"auto_mapping", "base_model_name_or_path", "ensure_weight_tying"}
_HARMLESS |= {"inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "megatron_core"}
_HARMLESS |= {"peft_version", "qalora_group_size", "revision", "target_modules", "task_type"}
# others, such as PiSSA, have changed the base model, too
_INITS = (True, False, "gaussian", "orthogonal", "eva")


def add_lora(
    model: NVEmbedModel,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.1,
    head: HeadTraining = "full",
    *,
    seed: int = 0,
) -> Adapter:
    """Freeze a model and put LoRA on the seven projections of every layer, in fp32 (float64 for float64).

    The vectors stay as they are until the first step of an optimizer, because B starts at zero. A head that
    is trained in full is cast to fp32, too: in 16 bits an optimizer's small steps would be rounded away.
    Without autocast it then computes in fp32.

    Args:
        model: changed in place. Its weights are whole: shard them behind this.
        rank: of A and B.
        alpha: B A counts alpha / rank times.
        dropout: of the inputs of the layers' adapters in training, from 0 up to 1. The head's have none.
        head: "full" trains all weights of the pooling head, "lora" adapters on its products, and "frozen"
            nothing of it. A mean or EOS head has no weights.
        seed: of A. The same seed gives the same A in every dtype and on every device.

    Returns:
        The arguments, which are `model.adapter` now.

    Raises:
        ValueError: an argument is out of range, or the model has an adapter, or sharded weights.
    """
    check_integer("rank", rank, 1)
    _check_numbers(alpha, dropout, "alpha", "dropout")
    if head not in get_args(HeadTraining):
        raise ValueError(f"head must be one of {', '.join(map(repr, get_args(HeadTraining)))}, got {head!r}")
    adapter = Adapter(rank, alpha, dropout, head)
    products = _products(model)
    if head != "lora":
        products = {name: slots for name, slots in products.items() if not name.startswith("head.")}
    _put_on(model, adapter, products)
    generator = torch.Generator().manual_seed(seed)
    for _, module in _adapted(model):
        # as PEFT does. On "meta" there is nothing to draw
        bound = module.in_features**-0.5
        drawn = torch.rand(module.lora_A.shape, generator=generator, device="cpu")
        with torch.no_grad():
            module.lora_A.copy_(drawn.mul_(2 * bound).sub_(bound))
    _require_gradients(model, adapter)
    return adapter


def save_adapter(
    model: NVEmbedModel,
    directory: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    base_weights: str | None = None,
) -> None:
    """Write the adapter of a model to a directory, in the place of an earlier one: all new files or none.

    With sharded weights (FSDP2) call it on every rank. The first one writes.

    Args:
        model: with an adapter.
        directory: created if it is not there.
        base: path or hub id of the model without the adapter, for `base_model_name_or_path`.
        base_weights: the name of its weights by `fingerprint.of_decoder`. With it `NVEmbed.from_pretrained`
            takes the adapter on these weights alone.

    Raises:
        ValueError: the model has no adapter, or a weight is NaN or Inf. Nothing was written.
        OSError: the files cannot be written.
    """
    adapter = model.adapter
    if adapter is None:
        raise ValueError("the model has no adapter: call add_lora or load_adapter first")
    directory = files.expanded(directory)
    backbone, head = _stored_values(model, adapter)
    for name, value in (backbone | head).items():
        if not value.isfinite().all():
            raise ValueError(f"{name} holds NaN or Inf: nothing was saved")
    if any(map(_is_sharded, model.parameters())) and torch.distributed.get_rank() > 0:
        return
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": None if base is None else str(base),
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": sorted({name.split(".")[-3] for name in backbone}),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    ours = re.compile("|".join(map(re.escape, (CONFIG_FILE, WEIGHTS_FILE, HEAD_FILE))))
    try:
        with files.replacing_together(directory, key=CONFIG_FILE, outdated=ours) as aside:
            known = {} if base_weights is None else {_BASE_WEIGHTS: base_weights}
            save_file(backbone, aside / WEIGHTS_FILE, metadata={"format": "pt"} | known)
            if head:
                save_file(head, aside / HEAD_FILE, metadata={"format": "pt"})
            (aside / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except SafetensorError as error:
        raise OSError(f"cannot write the adapter to {directory}: {error}") from error


def trained_on(directory: str | os.PathLike) -> tuple[str | None, str | None]:
    """(base, base_weights) of `save_adapter`, as an adapter that loads has them. None: it does not say."""
    directory = files.current(files.expanded(directory))
    with safe_open(directory / WEIGHTS_FILE, framework="pt") as stored:
        weights = (stored.metadata() or {}).get(_BASE_WEIGHTS)
    return files.read_json(directory / CONFIG_FILE).get("base_model_name_or_path"), weights


def load_adapter(model: NVEmbedModel, directory: str | os.PathLike, *, trainable: bool = False) -> Adapter:
    """Put a saved adapter on a model.

    Args:
        model: changed in place, once the files have been read and checked. It is frozen.
        directory: written by `save_adapter` or by PEFT.
        trainable: train it on. The adapter and a head that was trained with it require gradients. The head
            is then cast to fp32, as by `add_lora`. Otherwise it takes the model's dtype.

    Returns:
        The adapter, which is `model.adapter` now.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files do not fit the model, hold NaN or Inf, or ask for what is not plain LoRA. Or the
            model has an adapter already.
    """
    directory = files.expanded(directory)
    return files.unmixed(directory, CONFIG_FILE, lambda: _load(model, files.current(directory), trainable))


def _load(model: NVEmbedModel, directory: Path, trainable: bool) -> Adapter:
    rank, alpha, dropout = read_config(directory / CONFIG_FILE)
    stored = _read_tensors(directory / WEIGHTS_FILE)
    of_head = _read_tensors(directory / HEAD_FILE) if files.is_file(directory / HEAD_FILE) else {}
    whole = {name: value for name, value in of_head.items() if not name.startswith(_PREFIX)}
    matrices = stored | {name: value for name, value in of_head.items() if name not in whole}
    found = _placed(model, matrices, rank, directory)
    products = {product: slots for product, slots in _products(model).items() if slots.keys() & found.keys()}
    head_values = _head_values(model, whole, directory) if whole else {}
    head: HeadTraining = "full" if whole else "frozen"
    if any(product.startswith("head.") for product in products):
        head = "lora"
    adapter = Adapter(rank, alpha, dropout, head)
    _put_on(model, adapter, products)
    with torch.no_grad():
        for product, module in _adapted(model):
            for index, (name, slot) in enumerate(products[product].items()):
                if name in found:
                    module.lora_A[index * rank : (index + 1) * rank] = found[name]["A"]
                    module.lora_B[slot.rows] = found[name]["B"]
    if trainable:
        _require_gradients(model, adapter)
    else:
        model.requires_grad_(False)
    with torch.no_grad():
        for name, value in head_values.items():
            model.get_parameter(name).copy_(value)
    return adapter


def _placed(
    model: NVEmbedModel, matrices: Mapping[str, torch.Tensor], rank: int, directory: Path
) -> dict[str, dict[str, torch.Tensor]]:
    """Matrices of a file by published name and "A" or "B", all of the right shape and in pairs."""
    slots = {name: slot for parts in _products(model).values() for name, slot in parts.items()}
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for stored, value in matrices.items():
        match = _MATRIX.fullmatch(stored)
        # of the model that stood inside PEFT: a decoder, one with a language-model head, or the original
        inside = match[1] if match else ""
        names = (f"{prefix}{inside.removeprefix('model.')}.weight" for prefix in ("", _BACKBONE))
        name = next(filter(slots.__contains__, names), None)
        if match is None or name is None:
            raise ValueError(
                f"{directory}: {brief(stored)} belongs to no product of this model, whose decoder has "
                f"{len(model.embedding_model.layers)} layers: "
                "load the adapter on the model that it was trained on"
            )
        shape = slots[name].shape
        wanted = [rank, shape[1]] if match[2] == "A" else [shape[0], rank]
        if list(value.shape) != wanted:
            raise ValueError(f"{directory}: {stored} must be {wanted}, got {list(value.shape)}")
        found[name][match[2]] = value
    if not found:
        raise ValueError(f"{directory}: {WEIGHTS_FILE} holds no adapter")
    layers: dict[str, set[str]] = defaultdict(set)
    for name, pair in found.items():
        if len(pair) < 2:
            raise ValueError(f"{directory}: {name} has only lora_{min(pair)} of its two matrices")
        if match := _IN_LAYER.search(name):
            layers[match[2]].add(match[1])
    num_layers = len(model.embedding_model.layers)
    for projection, numbers in layers.items():
        if len(numbers) != num_layers:
            raise ValueError(
                f"{directory} has {projection} of {len(numbers)} layers, but this model has {num_layers}: "
                "load the adapter on the model that it was trained on"
            )
    return found


def _head_values(
    model: NVEmbedModel, stored: Mapping[str, torch.Tensor], directory: Path
) -> dict[str, torch.Tensor]:
    """Our parameters of the head by name."""
    table = {name: slot for name, slot in published_tensors(model.config).items() if _is_of_head(slot)}
    for name in sorted(table.keys() | stored.keys()):
        wanted = list(table[name].shape) if name in table else "absent"
        got = list(stored[name].shape) if name in stored else "absent"
        if wanted != got:
            raise ValueError(f"{directory / HEAD_FILE}: {brief(name)} must be {wanted}, it is {got}")
    # each fills its parameter: the head packs nothing
    return {slot.parameter: stored[name] for name, slot in table.items()}


def read_config(file: Path) -> tuple[int, float, float]:
    """(rank, alpha, dropout) of a LoraConfig that is plain LoRA."""
    raw = files.read_json(file)
    try:
        for name, plain in (("peft_type", ("LORA",)), ("bias", ("none",)), ("init_lora_weights", _INITS)):
            if raw.get(name, plain[0]) not in plain:
                raise ValueError(f"{name} must be {plain[0]!r}, got {brief(raw[name])}: it is no plain LoRA")
        for name, value in raw.items():
            if name not in _READ | _HARMLESS and value:
                raise ValueError(f"{name}={brief(value)} is not supported: it is no plain LoRA")
        rank = check_integer("r", raw.get("r", 8), 1)
        alpha, dropout = raw.get("lora_alpha", 8), raw.get("lora_dropout", 0.0)
        _check_numbers(alpha, dropout, "lora_alpha", "lora_dropout")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return rank, float(alpha), float(dropout)


def _check_numbers(alpha: object, dropout: object, alpha_name: str, dropout_name: str) -> None:
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise ValueError(f"{alpha_name} must be a positive number, got {brief(alpha)}")
    if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise ValueError(f"{dropout_name} must be a number from 0 up to 1, got {brief(dropout)}")


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    if not files.is_file(file):
        raise FileNotFoundError(f"{file} is missing: an adapter has {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is cut short or no safetensors file ({error}): save it again") from error
    for name, value in tensors.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"{file}: tensor {brief(name)} holds NaN, Inf or no floating-point numbers")
    return tensors


def merge_adapter(model: NVEmbedModel) -> None:
    """Add an adapter to the weights: W + s B A, in fp32 and rounded once to the dtype of W.

    The model is a plain one again and can be saved. A head that was trained in full stays as it is. Graphs
    that were captured (`cuda_graphs=True`) are not used any more. `NVEmbed.from_pretrained` with an adapter
    merges before it captures.

    Raises:
        ValueError: the model has no adapter, its weights are sharded, or a merged weight is beyond its dtype.
    """
    if model.adapter is None:
        raise ValueError("the model has no adapter to merge")
    if any(map(_is_sharded, model.parameters())):
        raise ValueError("the weights are sharded: save the adapter, and merge it in a model that is not")
    finite = []
    for name, module in _adapted(model):
        plain = module.merged()
        _put(model, name, plain)
        finite.append(plain.weight.isfinite().all())
    model.adapter = None
    if finite and not torch.stack(finite).all():
        raise ValueError(
            f"a merged weight is beyond {model.embedding_model.embed_tokens.weight.dtype}: load the model "
            "anew with dtype='bfloat16'"
        )


def _products(model: NVEmbedModel) -> dict[str, dict[str, Slot]]:
    """Product of our model -> published names of the matrices packed in it, from the top."""
    products: dict[str, dict[str, Slot]] = defaultdict(dict)
    for name, slot in published_tensors(model.config).items():
        product = slot.parameter.removesuffix(".weight")
        if len(slot.shape) == 2 and product != slot.parameter and not product.endswith("embed_tokens"):
            products[product][name] = slot
    return products


def _put_on(model: NVEmbedModel, adapter: Adapter, products: Mapping[str, Mapping[str, Slot]]) -> None:
    """Adapters of zeros on these products, once all are found to take one."""
    if model.adapter is not None:
        raise ValueError("the model has an adapter already: merge it (merge_adapter), or load the model anew")
    if any(map(_is_sharded, model.parameters())):
        raise ValueError("the weights are sharded: put the adapter on before fully_shard")
    for product in products:
        module = model.get_submodule(product)
        if not takes_adapter(module):
            raise ValueError(
                f"{product} takes no adapter, it is {type(module).__name__} or has hooks: remove hooks, "
                "wrappers and other adapters"
            )
    for product, slots in products.items():
        dropout = 0.0 if product.startswith("head.") else adapter.dropout
        rows = [slot.shape[0] for slot in slots.values()]
        base = cast(nn.Linear, model.get_submodule(product))
        _put(model, product, AdaptedLinear(base, rows, adapter.rank, adapter.scale, dropout))
    model.adapter = adapter


def _put(model: NVEmbedModel, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _adapted(model: NVEmbedModel) -> list[tuple[str, AdaptedLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]


def _require_gradients(model: NVEmbedModel, adapter: Adapter) -> None:
    model.requires_grad_(False)
    for _, module in _adapted(model):
        module.lora_A.requires_grad_()
        module.lora_B.requires_grad_()
    if adapter.head == "full":
        for parameter in model.head.parameters():
            parameter.requires_grad_()
        model.head.to(torch.promote_types(model.embedding_model.embed_tokens.weight.dtype, torch.float32))


def _stored_values(
    model: NVEmbedModel, adapter: Adapter
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(tensors of the decoder's file, those of the head's), on the CPU."""
    backbone: dict[str, torch.Tensor] = {}
    head: dict[str, torch.Tensor] = {}
    products = _products(model)
    for product, module in _adapted(model):
        a, b = _whole(module.lora_A), _whole(module.lora_B)
        for index, (name, slot) in enumerate(products[product].items()):
            inside = _PREFIX + name.removeprefix(_BACKBONE).removesuffix(".weight")
            into = head if _is_of_head(slot) else backbone
            # copies, because safetensors refuses tensors that share memory
            into[f"{inside}.lora_A.weight"] = a[index * module.rank : (index + 1) * module.rank].clone()
            into[f"{inside}.lora_B.weight"] = b[slot.rows].clone()
    if adapter.head == "full":
        for name, slot in published_tensors(model.config).items():
            if _is_of_head(slot):
                head[name] = _whole(model.get_parameter(slot.parameter))
    return backbone, head


def _is_of_head(slot: Slot) -> bool:
    return slot.parameter.startswith("head.")


def _is_sharded(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "device_mesh")


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter on the CPU. With FSDP2 all ranks call this."""
    value = parameter.detach()
    value = value.full_tensor() if _is_sharded(value) else value  # type: ignore[attr-defined]
    return value.cpu().contiguous()
