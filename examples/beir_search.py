"""A model for BEIR, and a search over a corpus in BEIR's form.

    python examples/beir_search.py --model DIRECTORY

With BEIR installed, `DenseRetrievalExactSearch(Encoder(model, task), batch_size=1024)` takes the same object.
"""

import argparse

import numpy as np

from nvembed_fast import NVEmbed

TASK = "Given a scientific claim, retrieve documents that support or refute the claim"
CORPUS = {
    "d1": {"title": "Judo", "text": "Throws are allowed in freestyle wrestling."},
    "d2": {"title": "", "text": "A radiologist studies medicine."},
}
QUERIES = {"q1": "Wrestlers may use judo throws."}


class Encoder:
    """The two calls that BEIR makes. Batches are cut by tokens, so `batch_size` is not looked at."""

    def __init__(self, model: NVEmbed, task: str, max_length: int = 512):
        self.model, self.task, self.max_length = model, task, max_length

    def encode_queries(self, queries: list[str], batch_size: int = 1024, **keywords) -> np.ndarray:
        return self.model.encode_query(queries, self.task, max_length=self.max_length, output="numpy")

    def encode_corpus(
        self, corpus: list[dict[str, str]] | dict[str, list[str]], batch_size: int = 1024, **keywords
    ) -> np.ndarray:
        if isinstance(corpus, dict):
            corpus = [dict(zip(corpus, row, strict=True)) for row in zip(*corpus.values(), strict=True)]
        texts = [f"{row.get('title', '')} {row['text']}".strip() for row in corpus]
        return self.model.encode_document(texts, max_length=self.max_length, output="numpy")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nvidia/NV-Embed-v2", help="directory or hub id [%(default)s]")
    encoder = Encoder(NVEmbed.from_pretrained(parser.parse_args(argv).model), TASK)
    scores = encoder.encode_queries(list(QUERIES.values())) @ encoder.encode_corpus(list(CORPUS.values())).T
    for query, row in zip(QUERIES, scores, strict=True):
        best = sorted(zip(CORPUS, row.tolist(), strict=True), key=lambda pair: -pair[1])
        print(query, {name: round(score, 4) for name, score in best})


if __name__ == "__main__":
    main()
