"""The questions over Python's docstrings: they ask in other words, and the score counts what it says."""

import hashlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from nvembed_fast.evaluation import docstrings

# function words. Everything else is a content word
STOP = set(
    re.findall(
        r"\w+",
        """a about after all am an and are as at be been before being but by can could did do does else for
        from had has have he her his how i if in into is it its me my no not of off on or our she so
        some than that the their them then there they this those to too up us was we were what when
        where whether which while who whom whose why will with within would you your""",
    )
)


def _stem(word: str) -> str:
    for ending in ("ings", "ing", "ies", "ied", "ed", "es", "ers", "er", "s", "ly"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            break
    return word.rstrip("ey") if len(word) > 3 else word


def _content(text: str) -> set[str]:
    parts = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", text).lower()
    return {_stem(w) for w in re.findall(r"[a-z0-9]+", parts) if w not in STOP}


@pytest.fixture(scope="module")
def library():
    return docstrings.standard_library()


@pytest.fixture(scope="module")
def loaded():
    return docstrings.load()


def test_there_are_the_demos_three_questions_and_40_more():
    assert [q.text for q in docstrings.questions("demo")] == [
        "How do I remove a directory together with everything in it?",
        "Which function splits a path into its extension and the rest?",
        "How can I wait until several threads have reached the same point?",
    ]
    assert len(docstrings.questions()) == 40
    modules = {q.answers[0].split(":")[0] for q in docstrings.questions()}
    assert len(modules) >= 36, "the questions ask about few modules"


def test_words_are_folded():
    """Without this the next test would find fewer shared words than there are."""
    assert _content("How do I split the splitting paths?") == {"split", "splitt", "path"}
    assert _content("get_close_matches: ChainMap") == {"get", "clos", "match", "chain", "map"}


def test_no_question_shares_two_content_words_with_an_answer(library):
    shared = {
        (q.text, a): words
        for q in docstrings.questions()
        for a in q.answers
        if a in library and len(words := _content(q.text) & _content(library[a])) > 1
    }
    assert not shared
    # the rule can fail: the demo's questions break it
    demo = docstrings.questions("demo")
    assert any(len(_content(q.text) & _content(library[q.answers[0]])) > 1 for q in demo)


def test_the_first_answer_of_each_question_exists(library):
    asked = docstrings.questions("demo") + docstrings.questions()
    assert [q.answers[0] for q in asked if q.answers[0] not in library] == []
    assert library["shutil:rmtree"].startswith("rmtree: Recursively delete a directory tree.")
    assert library["threading:Barrier.wait"].startswith("wait: Wait for the barrier.")


def test_the_corpus_holds_all_answers_and_is_the_same_in_another_process(loaded):
    assert len(loaded.texts) == len(set(loaded.texts)) == len(loaded.names) == 1200
    assert all(loaded.right)
    demo = docstrings.load(asked=docstrings.questions("demo"))
    assert demo.texts == loaded.texts and demo.names == loaded.names
    code = (
        "import hashlib; from nvembed_fast.evaluation import docstrings; "
        "print(hashlib.sha256(repr(docstrings.load()).encode()).hexdigest())"
    )
    env = os.environ | {"PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert run.stdout.strip() == hashlib.sha256(repr(loaded).encode()).hexdigest()


def test_a_smaller_corpus_is_a_part_of_a_larger_one(loaded):
    assert set(docstrings.load(300).texts) < set(loaded.texts)


def test_hits_counts_any_right_answer_among_the_k_best(loaded):
    scores = np.zeros((40, 1200), np.float32)
    scores[:, [i for i in range(1200) if not any(i in r for r in loaded.right)][:2]] = 1
    assert not any(loaded.hits(scores, 2))
    for row, right in enumerate(loaded.right):
        scores[row, max(right)] = 0.5
    assert all(loaded.hits(scores, 3)) and not any(loaded.hits(scores, 2))


def test_wrong_scores_are_refused(loaded):
    with pytest.raises(ValueError, match=r"shape \(40, 1200\)"):
        loaded.hits(np.zeros((1200, 40)))
    with pytest.raises(ValueError, match="must be finite"):
        loaded.hits(np.full((40, 1200), np.nan))


def test_a_question_without_an_answer_and_a_corpus_too_small_are_refused():
    with pytest.raises(ValueError, match="no answer of 'Why\\?'"):
        docstrings.load(asked=(docstrings.Question("Why?", ("nothing:at_all",)),))
    with pytest.raises(ValueError, match="number must be .* or more"):
        docstrings.load(10)
