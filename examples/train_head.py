"""Train the pooling head on pairs of a question and its answer, with the other answers as negatives.

    python examples/train_head.py --model demo -o trained

It shows the loop and is no recipe: five pairs teach a model nothing. docs/gradients.md explains each part.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from nvembed_fast import NVEmbed, query_instruction
from nvembed_fast.packing import PackedBatch

INSTRUCTION = query_instruction("Given a question, retrieve passages that answer the question")
PAIRS = {
    "capital of France?": "Paris is the capital of France.",
    "colour of the sky?": "By day and without clouds the sky is blue.",
    "who wrote Hamlet?": "Hamlet is a play by William Shakespeare.",
    "boiling point of water?": "At sea level water boils at 100 degrees Celsius.",
    "largest planet?": "Jupiter is the largest planet of the solar system.",
}
MAX_TOKENS = 512
SCALE = 20  # 1 / temperature


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory, hub id, or demo")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where the trained model goes")
    parser.add_argument("--steps", type=int, default=5, help="[%(default)s]")
    arguments = parser.parse_args(argv)
    model = NVEmbed.from_pretrained(arguments.model)
    network = model.model.train()
    head = network.head.requires_grad_(True)  # the backbone stays frozen
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)

    def embed(texts: list[str], instruction: str = "") -> torch.Tensor:
        tokens = model.text_tokenizer(texts, instruction, MAX_TOKENS)
        return network(PackedBatch.from_ids(tokens.ids, tokens.first_pooled, model.device))  # [B, D] fp32

    labels = torch.arange(len(PAIRS), device=model.device)
    for step in range(arguments.steps):
        with head.built_once():  # the latents' matrices once for both calls and for the backward
            scores = embed(list(PAIRS), INSTRUCTION) @ embed(list(PAIRS.values())).T
            loss = torch.nn.functional.cross_entropy(SCALE * scores, labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    network.config = dataclasses.replace(network.config, is_untrained=False)
    model.save_pretrained(arguments.output)
    print(f"saved in {arguments.output}")


if __name__ == "__main__":
    main()
