"""Fine-tune a model on the rows of a file, and encode with what comes out.

    python examples/finetune.py examples/rows.jsonl -o finetuned --model my-model

It is the command `nvembed-fast train` from Python. docs/training.md explains the settings and the rows. Ten
rows show the way and teach a model nothing.
"""

import argparse
import json
from pathlib import Path

from nvembed_fast import NVEmbed
from nvembed_fast.training.recipe import Recipe
from nvembed_fast.training.trainer import train

TASK = "Given a question, retrieve passages that answer the question"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", help='a file of JSON lines {"query": .., "pos": [..], "neg": [..]}')
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("-o", "--output", required=True, help="directory of the run and of its model")
    parser.add_argument("--steps", type=int, default=10, help="[%(default)s]")
    parser.add_argument("--lr", type=float, default=3e-4, help="[%(default)s]")
    arguments = parser.parse_args(argv)
    recipe = Recipe.from_dict(
        {
            "output": arguments.output,
            "model": {"start": arguments.model},
            "train": {
                "steps": arguments.steps,
                "batch": 5,
                "lr": arguments.lr,
                "warmup": 2,
                "temperature": 0.05,
                "max_length": 64,
                "lora_rank": 0,  # 16 trains adapters, which a model of billions of weights needs
            },
            "data": [{"file": arguments.rows, "instruction": TASK, "hard_negatives": 1}],
        }
    )
    try:
        output = train(recipe, say=print)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    losses = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    print(f"loss {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last")

    model = NVEmbed.from_pretrained(output)
    rows = [json.loads(line) for line in Path(arguments.rows).read_text().splitlines()]
    queries = model.encode_query([row["query"] for row in rows], TASK)  # [number of rows, width]
    passages = model.encode_document([row["pos"][0] for row in rows])
    found = (queries @ passages.T).argmax(1).tolist()
    right = sum(place == row for row, place in enumerate(found))
    print(f"{right} of {len(rows)} queries find their own passage first")


if __name__ == "__main__":
    main()
