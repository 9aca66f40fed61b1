"""What a run starts from, the network that it trains, and the model that it ends with.

`model.start` names a model directory or a hub id, or a decoder. A decoder, or a model that loses layers, is
first written to `output/start` as a model of its own. So every run has a directory with its frozen weights.
Beside them stands what they were made of: a recipe that was changed before the first checkpoint is refused.

The finished model is made from that directory and a checkpoint. It does not depend on how the ranks have cut
the model up, and a killed run can do it again.
"""

import dataclasses
import json
import os
from pathlib import Path

import torch

from nvembed_fast import checkpoint, files, fingerprint, ops
from nvembed_fast.checkpoint import decoders, demo
from nvembed_fast.checkpoint.names import CONFIG_FILE
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.new_model import init_model
from nvembed_fast.training import checkpoints
from nvembed_fast.training.recipe import Recipe, RecipeError, differing

__all__ = ["export", "load_network", "start_directory", "trained", "weights_name"]

_START, _ADAPTER, _MADE_OF = "start", "adapter", "made_of.json"
_PATH = "model.start"


def start_directory(recipe: Recipe) -> Path:
    """The model directory that a recipe starts from, written if it is not there yet. For the first rank.

    Raises:
        RecipeError: the recipe asks for another pooling head or attention than the model's, or for more
            layers, or starts from a run that has not ended, or `output/start` was made by another one.
        OSError, ValueError, ImportError: see `new_model.init_model` and `checkpoint.resolve`.
    """
    made = Path(recipe.output) / _START
    if (files.current(made) / CONFIG_FILE).is_file():
        _check_made(made, recipe)
        return made
    part = recipe.model
    if part.start != demo.NAME and not os.path.isabs(part.start) and os.path.exists(part.start):
        raise RecipeError(
            f"{_PATH} {part.start!r} is no path beside the recipe, and one in the working directory: write "
            "the whole path, or go to another directory"
        )
    start = str(decoders.named(part.start))
    source = None if Path(start).is_file() else checkpoint.resolve(start)
    if source and not (files.current(source) / CONFIG_FILE).is_file() and checkpoints.newest(source):
        raise RecipeError(
            f"{start} is a run that has not ended: go on with it before one that starts from it"
        )
    if source is None or files.read_json(source / CONFIG_FILE).get("model_type") != "nvembed":
        _note_made(made, recipe)
        init_model(
            start,
            made,
            num_latents=part.num_latents or 512,
            num_layers=part.layers,
            pooling_head=part.pooling_head or "latent",
            head_start=part.head_start or "mean",
            is_causal=part.causal or False,
            seed=recipe.seed % 2**63,
        )
        return made
    config = NVEmbedConfig.from_file(source / CONFIG_FILE)
    checkpoint.check_modules(source)
    if part.pooling_head not in (None, config.pooling_head):
        raise RecipeError(
            f"model.pooling_head is {part.pooling_head!r}, but {start} pools by {config.pooling_head!r}: "
            "leave the key out, or start from a decoder"
        )
    if part.causal not in (None, config.text_config.is_causal):
        raise RecipeError(
            f"model.causal is {part.causal}, and {start} was made with {config.text_config.is_causal}: leave "
            "the key out, or start from a decoder"
        )
    for key in ("num_latents", "head_start"):
        if (value := getattr(part, key)) is not None:
            raise RecipeError(
                f"model.{key} is {value!r}, but {start} has a head already, and keeps it: leave the key out, "
                "or start from a decoder"
            )
    if part.layers is None:
        return source
    there = config.text_config.num_hidden_layers
    if part.layers > there:
        raise RecipeError(f"model.layers is {part.layers}, but {start} has {there} layers")
    network = checkpoint.load_model(source, config, dtype=config.torch_dtype)
    network.embedding_model.layers = network.embedding_model.layers[: part.layers]
    text = dataclasses.replace(config.text_config, num_hidden_layers=part.layers)
    network.config = dataclasses.replace(config, text_config=text, is_untrained=True)
    _note_made(made, recipe)
    checkpoint.save_model(network, made, other_files=_beside(source))
    return made


def _made_of(recipe: Recipe) -> dict[str, object]:
    return {key: value for key, value in recipe.flat().items() if key == "seed" or key.startswith("model.")}


def _note_made(made: Path, recipe: Recipe) -> None:
    made.mkdir(parents=True, exist_ok=True)
    (made / _MADE_OF).write_text(json.dumps(_made_of(recipe)) + "\n", encoding="utf-8")


def _check_made(made: Path, recipe: Recipe) -> None:
    """RecipeError if it was made by another recipe.

    A run with a checkpoint may move: of the path that it starts from, the name counts. The checkpoint says
    the rest.
    """
    file = made / _MADE_OF
    if not file.is_file():
        return
    was: dict[str, object] = files.read_json(file)
    now = _made_of(recipe)
    if checkpoints.newest(made.parent) is not None:
        was = {_PATH: Path(str(was[_PATH])).name}
        now = {_PATH: Path(recipe.model.start).name}
    for key, (before, after) in differing(was, now).items():
        raise RecipeError(
            f"{made} was made by another recipe: {key} was {files.brief(before)} and is "
            f"{files.brief(after)}. Remove it, or choose another output"
        )


def weights_name(directory: Path) -> str:
    """The name of the weights that a run starts from, for its checkpoints."""
    directory = files.current(directory)
    config = NVEmbedConfig.from_file(directory / CONFIG_FILE)
    return fingerprint.of_weights(checkpoint.stored_samples(directory, config))


def load_network(directory: Path, recipe: Recipe, device: torch.device) -> NVEmbedModel:
    """The model of a directory, its trained weights with gradients and in fp32, ready to be trained."""
    part = recipe.train
    is_frozen = part.lora_rank > 0
    if not is_frozen:
        dtype = "float32"  # in 16 bits an optimizer's small steps would be rounded away
    elif part.dtype != "auto":
        dtype = part.dtype
    else:
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    network = checkpoint.load_model(directory, device=device, dtype=dtype)
    ops.prove(device, getattr(torch, dtype), training=True)
    _choose_trained(network, recipe)
    if part.checkpoint_layers:
        network.checkpoint_layers()
    return network.train()


def export(recipe: Recipe, directory: Path, path: Path) -> None:
    """Write the trained model to `output` in the published layout, and its adapter to `output/adapter`.

    Args:
        recipe: of the run.
        directory: that the run started from, with its tokenizer.
        path: the last checkpoint.
    """
    output, directory = Path(recipe.output), files.current(directory)
    config = NVEmbedConfig.from_file(directory / CONFIG_FILE)
    # merged in fp32, and rounded once
    network = checkpoint.load_model(directory, config, device="cpu", dtype="float32")
    _choose_trained(network, recipe)
    checkpoints.load_weights(path, trained(network))
    network.config = dataclasses.replace(config, is_untrained=False)
    if recipe.train.lora_rank:
        decoder = fingerprint.of_decoder(checkpoint.stored_samples(directory, config))
        checkpoint.save_adapter(network, output / _ADAPTER, base=recipe.model.start, base_weights=decoder)
        checkpoint.merge_adapter(network)
    checkpoint.save_model(network, output, dtype=config.torch_dtype, other_files=_beside(directory))


def _beside(directory: Path) -> list[Path]:
    """The files of a model that its training leaves as they are."""
    return checkpoint.tokenizer_files(directory) + checkpoint.pipeline_files(directory)


def trained(network: NVEmbedModel) -> dict[str, torch.nn.Parameter]:
    """The parameters that get gradients, by name."""
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def _choose_trained(network: NVEmbedModel, recipe: Recipe) -> None:
    part = recipe.train
    if not part.lora_rank:
        network.requires_grad_(True)
        network.embedding_model.embed_tokens.requires_grad_(not part.freeze_embeddings)
        return
    network.requires_grad_(False)
    checkpoint.add_lora(
        network,
        rank=part.lora_rank,
        alpha=part.lora_alpha,
        dropout=part.lora_dropout,
        head=part.head,
        seed=recipe.seed,
    )
