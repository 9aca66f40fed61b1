"""The demo model's card, and the questions over docstrings by a search for words.

tests/test_demo_scores.py asks the models.
"""

from pathlib import Path

import numpy as np

from nvembed_fast import baselines
from nvembed_fast.checkpoint import demo
from nvembed_fast.evaluation import docstrings
from nvembed_fast.evaluation.report import table
from nvembed_fast.evaluation.scores import read_rows

SCORES = Path(__file__).resolve().parents[2] / "bench" / "scores"


def test_the_card_has_the_committed_scores():
    assert table(read_rows(SCORES)) in (demo.SHIPPED / "README.md").read_text()


def test_a_search_for_words_finds_few_answers(capsys):
    corpus = docstrings.load()
    words = baselines.BM25(list(corpus.texts))
    hits = corpus.hits(np.stack([words.scores(question.text) for question in corpus.questions]), k=3)
    with capsys.disabled():
        print(f"\nhit@3: bm25 {sum(hits) / len(hits):.3f}")  # noqa: T201
    assert sum(hits) / len(hits) <= 0.2, "the questions share words with their answers"
