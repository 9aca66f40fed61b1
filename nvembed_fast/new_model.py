"""Start an NV-Embed model on a decoder: its weights, its tokenizer, and a fresh pooling head."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from nvembed_fast import files
from nvembed_fast.checkpoint.decoders import open_decoder
from nvembed_fast.checkpoint.save import model_files, save_model
from nvembed_fast.config import HeadStart, LatentConfig, NVEmbedConfig, PoolingHeadName
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.placement import check_dtype

__all__ = ["init_model"]

# without them a head adds nothing to the mean of the hidden states
_LAST_PRODUCTS = ("head.to_out.weight", "head.ff_down.weight", "head.ff_down.bias")
_SMALL_WIDTH, _SMALL_HEAD_WIDTH, _PUBLISHED_HEAD_WIDTH = 2048, 64, 4096


def init_model(
    source: str | PathLike,
    output_directory: str | PathLike,
    *,
    num_latents: int = 512,
    num_heads: int = 8,
    head_width: int | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    num_layers: int | None = None,
    pooling_head: PoolingHeadName = "latent",
    head_start: HeadStart = "mean",
    is_causal: bool = False,
    force: bool = False,
) -> Path | None:
    """Write an untrained NV-Embed model on a decoder, in the published layout.

    Its config.json says so (`NVEmbedConfig.is_untrained`), and `encode` warns, until training removes it.

    Args:
        source: a Hugging Face directory or hub id, or a GGUF file.
        output_directory: created. It must not hold a model yet, nor weights, an index or a tokenizer of one.
        num_latents: latents of the head.
        num_heads: heads of the latent attention.
        head_width: width of one of these heads. None takes 64 for decoders narrower than 2048, else the
            published 4096.
        dtype: the stored dtype. None takes the decoder's own, and float16 for quantised weights, because its
            rounding (2**-11) lies far below a quantisation step.
        seed: seed of the fresh head. The same seed gives the same head in every dtype.
        num_layers: the decoder's first layers alone. None takes all.
        pooling_head: "latent", or for comparison "mean", "eos" or "self_attention". Those ignore the three
            arguments about latents.
        head_start: "mean" for a latent or self-attention head that is mean pooling at first, because the last
            products of its attention and its feed-forward are zero. Both get gradients. "random" draws them,
            too, which is noise on top of what the decoder knows.
        is_causal: each token sees itself and earlier ones alone, as in the decoder. For comparison: the head,
            of whatever kind, sees all tokens.
        force: move such files to a new folder in the output directory, `replaced-*`.

    Returns:
        That folder, if there were any.

    Raises:
        FileExistsError: the output directory holds a model, or files of one.
        FileNotFoundError, ValueError, ImportError: the decoder cannot be used. The message says why.
    """
    output_directory = files.expanded(output_directory)
    if not force and (found := model_files(files.current(output_directory))):
        raise FileExistsError(
            f"{output_directory} already holds a model: remove it or choose another directory. Found "
            f"{', '.join(found)}. --force moves them aside"
        )
    for name, value in (("num_latents", num_latents), ("num_heads", num_heads), ("head_width", head_width)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if head_start not in get_args(HeadStart):
        raise ValueError(f"head_start must be 'mean' or 'random', got {head_start!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be from -2**63 to 2**64 - 1, got {seed}")
    decoder = open_decoder(source)
    stored = decoder.dtype if dtype is None else check_dtype(dtype)
    backbone = replace(decoder.config, is_causal=is_causal)
    if num_layers is not None:
        if not 1 <= num_layers <= backbone.num_hidden_layers:
            raise ValueError(
                f"num_layers must be from 1 to the decoder's {backbone.num_hidden_layers}, got {num_layers}"
            )
        backbone = replace(backbone, num_hidden_layers=num_layers)
    width = backbone.hidden_size
    if head_width is None:
        head_width = _SMALL_HEAD_WIDTH if width < _SMALL_WIDTH else _PUBLISHED_HEAD_WIDTH
    head = LatentConfig(num_latents, num_heads, head_width, hidden_dim=width, latent_dim=width)
    # the published rule drops as many tokens as the instruction has alone. A tokenizer that merges across the
    # border between instruction and text would lose the text's first word by it
    config = NVEmbedConfig(
        backbone, head, pooling_start="text_offset", pooling_head=pooling_head, is_untrained=True
    )
    with torch.device("meta"):
        model = NVEmbedModel(config)
    fresh = _fresh_head(model.head, torch.Generator().manual_seed(seed))
    there = model.state_dict()
    values = {name: value for name, value in decoder.load(stored).items() if name in there}
    values |= {f"head.{name}": value.to(stored) for name, value in fresh}
    if head_start == "mean":
        for name in filter(values.__contains__, _LAST_PRODUCTS):
            values[name].zero_()
    model.load_state_dict(values, assign=True)
    with tempfile.TemporaryDirectory() as aside:
        tokenizer_files = decoder.write_tokenizer(Path(aside))
        return save_model(model, output_directory, other_files=tokenizer_files, move_aside=force)


def _fresh_head(head: nn.Module, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """The initial values of PyTorch's own modules, drawn in fp32 from one generator."""
    for name, parameter in head.named_parameters(recurse=False):  # the latents
        yield name, torch.randn(parameter.shape, generator=generator, device="cpu")
    for name, module in head.named_children():
        for part, parameter in module.named_parameters():
            if isinstance(module, nn.LayerNorm):
                yield f"{name}.{part}", torch.full(parameter.shape, float(part == "weight"), device="cpu")
            else:
                assert isinstance(module, nn.Linear)
                bound = module.in_features**-0.5
                drawn = torch.rand(parameter.shape, generator=generator, device="cpu")
                yield f"{name}.{part}", drawn.mul_(2 * bound).sub_(bound)
