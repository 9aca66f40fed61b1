"""The embedding model that HippoRAG makes of NV-Embed, with its own calls.

    python examples/hipporag_search.py --model DIRECTORY

In a program that uses HippoRAG itself, call `nvembed_fast.register()` before it loads its embedding model.
"""

import argparse

import numpy as np
import torch
from transformers import AutoModel

import nvembed_fast

TASK = "Given a question, retrieve relevant documents that best answer the question."
PASSAGES = [
    "Judo throws are allowed in freestyle wrestling.",
    "A radiologist studies medicine.",
    "Rome is in Italy.",
]


class EmbeddingModel:
    """`batch_encode` as HippoRAG calls it: its own keywords, its own batches, and arrays on the host."""

    def __init__(self, name: str):
        self.model = AutoModel.from_pretrained(
            pretrained_model_name_or_path=name, trust_remote_code=True, device_map="auto"
        )
        self.embedding_dim = self.model.config.hidden_size

    def batch_encode(self, texts: list[str], batch_size: int = 16, instruction: str = "") -> np.ndarray:
        if instruction:
            instruction = f"Instruct: {instruction}\nQuery: "
        params = {"max_length": 32768, "instruction": instruction, "num_workers": 32}
        starts = range(0, len(texts), batch_size)
        results = [self.model.encode(prompts=texts[i : i + batch_size], **params) for i in starts]
        return torch.cat(results).cpu().numpy()


def main(argv: list[str] | None = None) -> None:
    nvembed_fast.register()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nvidia/NV-Embed-v2", help="directory or hub id [%(default)s]")
    model = EmbeddingModel(parser.parse_args(argv).model)
    (query,) = model.batch_encode(["are judo throws allowed?"], instruction=TASK)
    scores = model.batch_encode(PASSAGES, batch_size=2) @ query
    for index in np.argsort(-scores):
        print(f"{scores[index]:.4f}  {PASSAGES[index]}")


if __name__ == "__main__":
    main()
