"""What `make demo` prints, and what the demo model finds. One run embeds the docstrings for all tests.

The demo's own 1,200 docstrings take minutes of a slow core, so they belong to the long tests. Fewer are
easier to tell apart, and more has to be found among them.
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from downloads import or_skip

from examples import demo
from nvembed_fast import NVEmbed, baselines
from nvembed_fast.evaluation import docstrings

ROOT = Path(__file__).resolve().parents[1]
MAX_LENGTH = 128
HIT_RATES = {200: 0.7, 1200: 0.5}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session", params=[200, pytest.param(1200, marks=pytest.mark.long)])
def number(request) -> int:
    return request.param


@pytest.fixture(scope="session")
def cache(smollm2_file, tmp_path_factory) -> Path:
    """A cache that holds the decoder alone."""
    folder = tmp_path_factory.mktemp("cache")
    kept = folder / smollm2_file.parent.name / smollm2_file.name
    kept.parent.mkdir()
    kept.symlink_to(smollm2_file)
    return folder


def _run(cache: Path, number: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "examples/demo.py", "--cache", str(cache)]
    command += ["--texts", str(number)] if number != 1200 else []  # the default
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return run


@pytest.fixture(scope="session")
def first_run(cache, number) -> subprocess.CompletedProcess:
    return _run(cache, number)


def _rankings(run: subprocess.CompletedProcess) -> dict[str, str]:
    """The three lines below each question."""
    return dict(re.findall(r"^(\S.*)\n((?: [ *][123]\. .*\n){3})", run.stdout, re.M))


def test_the_demo_says_what_it_does(first_run, number):
    assert f"{demo.PART}/{demo.PART}" in first_run.stderr  # the progress bar
    for part in ("The model is 'demo'", "tokens/s", "peak memory", "matrix products of the backbone"):
        assert part in first_run.stdout


def test_each_question_of_the_demo_finds_an_answer(first_run):
    rankings = _rankings(first_run)
    assert [*rankings] == [question.text for question in docstrings.questions("demo")]
    for question, lines in rankings.items():
        assert "\n *" in f"\n{lines}", f"{question}\n{lines}"


def test_the_second_run_embeds_no_docstring(first_run, cache, number):
    again = _run(cache, number)
    assert "whose vectors were kept" in again.stdout and f"{demo.PART}/{demo.PART}" not in again.stderr
    assert _rankings(again) == _rankings(first_run)


def test_most_questions_find_their_docstring(first_run, cache, number, capsys):
    """hit@3 of the questions that share no words with their answers. Those of the baselines are printed."""
    corpus = docstrings.load(number)
    texts, asked = list(corpus.texts), [question.text for question in corpus.questions]

    def rate(queries: np.ndarray, documents: np.ndarray) -> float:
        return sum(corpus.hits(queries @ documents.T, k=3)) / len(asked)

    model = NVEmbed.from_pretrained("demo", dtype=demo._dtype(), cache_dir=cache, local_files_only=True)
    kept = torch.load(demo.vectors_file(cache, model, texts, MAX_LENGTH), weights_only=True)
    rates = {"demo": rate(model.encode_query(asked, docstrings.TASK).cpu().numpy(), kept.numpy())}
    assert rates["demo"] >= HIT_RATES[number], rates
    with or_skip("a baseline"):
        others = [baselines.wordllama(), baselines.minilm()]
    for other in others:
        rates[other.name] = rate(other.encode(asked, MAX_LENGTH), other.encode(texts, MAX_LENGTH))
    with capsys.disabled():
        print(f"\nhit@3 among {number}: " + ", ".join(f"{name} {value:.3f}" for name, value in rates.items()))  # noqa: T201
