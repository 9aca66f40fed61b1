"""Training text: cleaned, without duplicates and evaluation texts, split by source, always the same bytes."""

import json
import random
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nvembed_fast import packages
from nvembed_fast.cli import main
from nvembed_fast.curation import cleaning, curate, decontamination
from nvembed_fast.curation.decontamination import EvaluationTexts
from nvembed_fast.curation.sources import TEXT_SETS, Part, TextSet
from nvembed_fast.curation.text import Labelled, Pair
from nvembed_fast.training.rows import open_rows

WORDS = [f"{a}{b}" for a in ("kel", "mor", "tan", "sil", "var", "dun", "pel", "ros") for b in "aeiouymnprst"]


def prose(seed: int, length: int = 30) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def clean(found, **limits) -> tuple[list, Counter]:
    dropped: Counter[str] = Counter()
    limits = {"min_query_words": 3, "min_document_words": 10} | limits
    return cleaning.cleaned(found, dropped, **limits), dropped


@pytest.mark.parametrize(
    "query, document, reason",
    [
        ("what is it", "", "empty document"),
        ("what is it", " \n ", "empty document"),
        ("what is it", "too short a text", "short document"),
        ("", prose(1), "empty query"),
        ("?!", prose(1), "empty query"),
        ("one two", prose(1), "short query"),
        ("what is it", "1 2 3 4 5 6 7 8 9 10 11 12", "no prose"),
        ("what is it", f"{prose(1)} \ud800", "no Unicode"),
        (prose(1, 12).upper() + "!", prose(1, 12), "query is the document"),
    ],
)
def test_a_bad_pair_is_counted_with_its_reason(query, document, reason):
    good = Pair("what is this", prose(0), "a")
    assert clean([Pair(query, document, "a"), good]) == ([good], Counter({reason: 1}))


def test_a_huge_text_is_cut():
    (pair,), _ = clean([Pair("word " * 10**5, f"{prose(1)} " + "word " * 10**6, "a")])
    assert len(pair.document.split()) == cleaning.MAX_DOCUMENT_WORDS
    assert len(pair.query.split()) == cleaning.MAX_QUERY_WORDS


def test_the_first_of_duplicates_stays():
    first, other = Pair("query number one", prose(1), "a"), Pair("query number two", prose(2), "a")
    again = Pair("query number three", prose(1).upper().replace(" ", ",  "), "b")
    assert clean([first, other, again]) == ([first, other], Counter({"duplicate document": 1}))


def test_near_duplicates_are_those_above_the_bound():
    """Of 100 words, one changed word leaves 95 of 101 runs of three, and ten leave 70 of 126."""
    words = prose(1, 100).split()
    near, far = words.copy(), words.copy()
    near[50] = "other"
    far[5::10] = ["other"] * 10
    pairs = [Pair(f"query number {n}", " ".join(text), "a") for n, text in enumerate((words, near, far))]
    assert clean(pairs) == ([pairs[0], pairs[2]], Counter({"near duplicate document": 1}))


def test_min_hash_finds_what_brute_force_finds():
    """400 texts in groups around 40 others, at similarities on both sides of the bound."""
    draw = random.Random(3)
    texts = []
    for group in range(40):
        words = prose(group, 60).split()
        for _ in range(10):
            changed = words.copy()
            for place in draw.sample(range(60), draw.choice([0, 1, 2, 4, 8, 20])):
                changed[place] = draw.choice(WORDS)
            texts.append(" ".join(changed))
    near = cleaning.NearDuplicates()
    found = [near.add(text) for text in texts]
    kept: list[set] = []
    wanted = []
    for text in texts:
        runs = set(cleaning.runs(text, cleaning.SHINGLE).tolist())
        wanted.append(any(len(runs & k) >= cleaning.NEAR * len(runs | k) for k in kept))
        if not wanted[-1]:
            kept.append(runs)
    assert 50 < sum(wanted) < 350
    assert found == wanted


def test_runs_are_those_of_words():
    assert len(cleaning.runs("a b c d", 3)) == 2 and len(cleaning.runs("a b", 3)) == 1
    assert len(cleaning.runs("", 3)) == 0
    whole = cleaning.runs("One two, three four five", 3)
    assert np.isin(cleaning.runs("TWO three; four", 3), whole).all()
    assert not np.isin(cleaning.runs("three two four", 3), whole).any()


def test_a_query_of_many_documents_goes():
    pairs = [Pair("see the notes", prose(n), "a") for n in range(3)]
    others = [Pair("read the manual", prose(n), "a") for n in range(3, 5)]
    assert clean([*pairs, *others]) == (others, Counter({"repeated query": 3}))


# evaluation texts


def test_a_run_of_ten_words_is_contamination():
    words = prose(1, 40).split()
    known = EvaluationTexts({"first": [" ".join(words)], "second": [prose(2)], "none": []})
    assert known.found(" ".join(["in", "front", *words[7:17], "behind"]).upper()) == {"first"}
    assert known.found(" ".join(["in", "front", *words[7:16], "behind"])) == set()
    assert known.found("no", f"{prose(2)} {prose(1, 10)}") == {"first", "second"}


def test_a_short_evaluation_text_counts_as_a_whole():
    known = EvaluationTexts({"first": ["Where is the nearest station?", "Thank you very!"]})
    assert known.found("where is the nearest station") == {"first"}
    assert known.found(f"{prose(3)} - where is the nearest station now? {prose(4)}") == {"first"}
    assert known.found("where is the station") == set()
    assert known.found("where is the nearest") == set()
    assert known.found("Thank you very much!") == set()


def test_evaluation_texts_have_a_fingerprint():
    first = EvaluationTexts({"a": [prose(1)]})
    assert first.fingerprint == EvaluationTexts({"a": [prose(1)]}).fingerprint
    others = [EvaluationTexts({"a": [prose(2)]}), EvaluationTexts({"a": [prose(1)]}, {"b": "gone"})]
    assert first.fingerprint not in {other.fingerprint for other in others}


def test_every_evaluation_task_is_read(monkeypatch):
    """A task that cannot be had here is missing, by name and reason. The demo's corpus is among them."""

    def texts(name, cache):
        if name == "gone":
            raise decontamination.tasks.SkippedTask("no apt-get here")
        return iter([prose(1)])

    monkeypatch.setattr(decontamination.tasks, "names", lambda: ["squad", "gone"])
    monkeypatch.setattr(decontamination.tasks, "texts", texts)
    monkeypatch.setattr(decontamination.docstrings, "raw", lambda: {"m:f": ("f", prose(2))})
    monkeypatch.setattr(decontamination.tasks, "DEBIAN", ("gone",))
    known = EvaluationTexts.load()
    assert known.missing == {"gone": "no apt-get here"}
    assert known.found(prose(1)) == {"squad"}
    assert known.found(prose(2)) == {decontamination.DOCSTRINGS}
    monkeypatch.setattr(decontamination.tasks, "DEBIAN", ())
    with pytest.raises(RuntimeError, match="(?s)no apt-get here.*or say --without gone"):
        EvaluationTexts.load()
    assert EvaluationTexts.load(without=["gone"]).missing == {"gone": "it was left out"}


def test_a_docstring_counts_without_its_name_and_by_its_first_sentence(monkeypatch):
    """The sentence ends with its paragraph, markup does not count, and three words are too few."""
    raw = {
        "m:f": ("f", f"Fold ``the`` blue paper twice\n\n{prose(1)}"),
        "m:g": ("g", "Sort these heavy stones slowly."),
        "m:h": ("h", f"Return the value. {prose(2)}"),
        "m:i": ("i", "Polish old silver. Then dry it well."),
    }
    monkeypatch.setattr(decontamination.tasks, "names", lambda: [])
    monkeypatch.setattr(decontamination.docstrings, "raw", lambda: raw)
    known = EvaluationTexts.load()
    for text in (
        "Fold the blue paper twice.",
        "sort these heavy stones slowly",
        "polish old silver then dry it well",
    ):
        assert known.found(text) == {decontamination.DOCSTRINGS}, text
    assert known.found("Return the value.", "Fold the blue paper", f"Return the value. {prose(3)}") == set()


# a folder of sets


def read_planted(archive: Path):
    for n in range(1200):
        yield Pair(f"query with number {n}", prose(n), f"document {n // 3}")
    yield Pair("query of the test", prose(5000), "document")


def read_labelled(archive: Path):
    for n in range(20):
        yield Labelled(prose(n), f"label {n % 2}", f"text {n}")


PLANTED = {
    "planted": TextSet((Part("planted==1.0", "0" * 64, "MIT", read_planted),), "find it"),
    "labels": TextSet((Part("planted==1.0", "0" * 64, "MIT", read_labelled),), "", "classification"),
}
EVALUATION = EvaluationTexts({"exam": [prose(5000)]}, {"gone": "no apt-get here"})


@pytest.fixture
def planted(monkeypatch, tmp_path) -> list[str]:
    """The sets of PLANTED in the place of ours. Returns the list of packages that are fetched."""
    fetched: list[str] = []
    monkeypatch.setattr(curate, "TEXT_SETS", dict(PLANTED))
    monkeypatch.setattr(packages, "fetch", lambda package, *_: fetched.append(package) or tmp_path)
    return fetched


def make(directory: Path, names=("planted", "labels")) -> tuple[dict, list[str]]:
    lines: list[str] = []
    return curate.curate(directory, list(names), evaluation=EVALUATION, say=lines.append), lines


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sets_with_their_manifest(planted, tmp_path):
    manifest, lines = make(tmp_path / "data")
    assert manifest == json.loads((tmp_path / "data/manifest.json").read_text())
    entry = manifest["sets"]["planted"]
    assert entry["sources"] == [{"package": "planted==1.0", "sha256": "0" * 64, "licence": "MIT"}]
    assert (entry["instruction"], entry["task"], entry["in_batch"]) == ("find it", "retrieval", True)
    assert entry["dropped"] == {"in exam": 1}
    assert entry["rows"] + entry["dev_rows"] == 1200 and entry["dev_rows"] > 0
    assert entry["not_compared_with"] == ["gone"]
    assert "warning: not compared with gone: no apt-get here" in lines
    assert len(open_rows(tmp_path / "data/planted.jsonl")) == entry["rows"]
    assert open_rows(tmp_path / "data/planted.jsonl").row(0).positives
    assert open_rows(tmp_path / "data/labels.jsonl").labelled(0).label == "label 0"


def test_a_document_is_in_training_or_in_dev(planted, tmp_path):
    make(tmp_path)
    rows, dev = rows_of(tmp_path / "planted.jsonl"), rows_of(tmp_path / "dev.jsonl")
    assert {row["prompt"] for row in dev} == {"find it"} and {row["set"] for row in dev} == {"planted"}
    assert not {row["source"] for row in rows} & {row["source"] for row in dev}
    # all rows of a document, which are three
    assert set(Counter(row["source"] for row in dev).values()) == {3}


def test_a_finished_set_is_not_made_again(planted, tmp_path):
    make(tmp_path, ["planted"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
    planted.clear()
    _, lines = make(tmp_path, ["planted"])
    assert planted == [] and "there already" in lines[-1]
    (tmp_path / "planted.jsonl").write_text("damaged")
    make(tmp_path, ["planted"])
    assert planted == ["planted==1.0"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json*")} == before


@pytest.mark.parametrize("change", ["instruction", "package", "evaluation", "parameter"])
def test_a_set_of_something_else_is_made_again(planted, tmp_path, change, monkeypatch):
    make(tmp_path, ["planted"])
    planted.clear()
    (part,) = PLANTED["planted"].parts
    other = {
        "instruction": replace(PLANTED["planted"], instruction="find them"),
        "package": replace(PLANTED["planted"], parts=(replace(part, sha256="1" * 64),)),
        "parameter": replace(PLANTED["planted"], min_query_words=2),
    }
    monkeypatch.setitem(curate.TEXT_SETS, "planted", other.get(change, PLANTED["planted"]))
    if change == "evaluation":
        monkeypatch.setitem(globals(), "EVALUATION", EvaluationTexts({"exam": [prose(1)]}))
    make(tmp_path, ["planted"])
    assert planted == ["planted==1.0"]


def test_an_interrupted_run_keeps_finished_sets(planted, tmp_path, monkeypatch):
    wanted, _ = make(tmp_path / "whole")

    def interrupted(archive):
        yield from list(read_labelled(archive))[:5]
        raise KeyboardInterrupt

    part = replace(PLANTED["labels"].parts[0], read=interrupted)
    monkeypatch.setitem(curate.TEXT_SETS, "labels", replace(PLANTED["labels"], parts=(part,)))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "data")
    assert list(json.loads((tmp_path / "data/manifest.json").read_text())["sets"]) == ["planted"]
    assert not (tmp_path / "data/labels.jsonl").exists()
    monkeypatch.setitem(curate.TEXT_SETS, "labels", PLANTED["labels"])
    planted.clear()
    assert make(tmp_path / "data")[0] == wanted
    assert planted == ["planted==1.0"]
    names = {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.json*")}
    for name in names:
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_sets_that_were_not_asked_for_stay(planted, tmp_path):
    make(tmp_path, ["planted"])
    assert list(make(tmp_path, ["labels"])[0]["sets"]) == ["labels", "planted"]
    assert rows_of(tmp_path / "dev.jsonl")


def test_each_set_says_what_it_was_not_compared_with(planted, tmp_path, monkeypatch):
    """Also after another run, which had all evaluation sets but made other sets."""
    make(tmp_path, ["planted"])
    monkeypatch.setitem(globals(), "EVALUATION", EvaluationTexts({"exam": [prose(5000)]}))
    sets = make(tmp_path, ["labels"])[0]["sets"]
    assert {name: sets[name]["not_compared_with"] for name in sets} == {"planted": ["gone"], "labels": []}


def test_a_known_overlap_is_not_dropped(planted, tmp_path, monkeypatch):
    monkeypatch.setitem(curate.TEXT_SETS, "planted", replace(PLANTED["planted"], shares=("exam",)))
    entry = make(tmp_path, ["planted"])[0]["sets"]["planted"]
    assert entry["dropped"] == {} and entry["shares_documents_with"] == ["exam"]


def test_a_debian_package_is_recorded_as_it_was(planted, tmp_path, monkeypatch):
    found = packages.DebianPackage(tmp_path, "1.0-2", "f" * 64)
    monkeypatch.setattr(packages, "debian", lambda package, cache: found)
    part = replace(PLANTED["planted"].parts[0], package="planted", sha256=None)
    monkeypatch.setitem(curate.TEXT_SETS, "planted", replace(PLANTED["planted"], parts=(part,)))
    (source,) = make(tmp_path, ["planted"])[0]["sets"]["planted"]["sources"]
    assert source == {"package": "planted=1.0-2", "sha256": "f" * 64, "licence": "MIT"}


def test_a_set_without_a_row_is_an_error(planted, tmp_path, monkeypatch):
    part = replace(PLANTED["planted"].parts[0], read=lambda _: iter([Pair("", prose(1), "a")]))
    monkeypatch.setitem(curate.TEXT_SETS, "planted", replace(PLANTED["planted"], parts=(part,)))
    with pytest.raises(ValueError, match=r"set planted has no row: \{'empty query': 1\} were dropped"):
        make(tmp_path, ["planted"])


def test_an_unknown_set_is_named(tmp_path):
    with pytest.raises(ValueError, match="no set 'plants': there are python-questions, "):
        curate.curate(tmp_path / "data", ["plants"], evaluation=EVALUATION)
    assert not (tmp_path / "data").exists()


# the command


def test_the_command_makes_the_sets_of_pypi(monkeypatch, tmp_path, capsys):
    made = {}
    left_out = []

    def curated(directory, names, without, say):
        made[directory] = names
        left_out.append(without)
        return {"sets": {name: {"rows": 5} for name in names}}

    monkeypatch.setattr(curate, "curate", curated)
    assert main(["curate", "-o", str(tmp_path)]) == 0
    assert main(["curate", "-o", str(tmp_path / "more"), "--debian"]) == 0
    assert (
        main(["curate", "-o", str(tmp_path / "one"), "--sources", "terms", "--without", "rte", "mrpc"]) == 0
    )
    assert left_out == [[], [], ["rte", "mrpc"]]
    debian = {name for name, text_set in TEXT_SETS.items() if text_set.is_debian}
    assert "terms" in debian and "python-questions" not in debian
    assert made[tmp_path] == [name for name in TEXT_SETS if name not in debian]
    assert made[tmp_path / "more"] == list(TEXT_SETS) and made[tmp_path / "one"] == ["terms"]
    assert capsys.readouterr().out.endswith("5 rows in 1 sets\n")


def test_the_command_lists_packages_and_licences(capsys):
    assert main(["curate", "--list"]) == 0
    shown = capsys.readouterr().out
    assert "terms (--debian): retrieval\n  dict-foldoc  GFDL-1.3\n" in shown
    assert "  botocore==1.40.40  Apache-2.0\n" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "-o DIR is missing"),
        (["-o", "x", "--sources", "plants"], "no set 'plants'"),
        (["-o", "x", "--without", "r"], "no task 'r': there are squad"),
    ],
)
def test_wrong_arguments_exit_with_status_2(arguments, message, capsys):
    assert main(["curate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_failed_download_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    def fails(*_, **__):
        raise RuntimeError("pip could not download planted==1.0:\nno network")

    monkeypatch.setattr(curate, "curate", fails)
    assert main(["curate", "-o", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert "could not download planted==1.0" in shown and "Run the same command again to go on" in shown


def test_ctrl_c_says_that_finished_sets_stay(monkeypatch, tmp_path, capsys, ctrl_c):
    monkeypatch.setattr(curate, "curate", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert main(["curate", "-o", str(tmp_path)]) == 130
    assert "interrupted; finished sets stay" in capsys.readouterr().err


def test_every_source_is_pinned_or_debian():
    for name, text_set in TEXT_SETS.items():
        assert text_set.parts and text_set.instruction, name
        for part in text_set.parts:
            assert part.licence, part
            if part.sha256 is None:
                assert "==" not in part.package, part
            else:
                assert len(part.sha256) == 64 and part.package.count("==") == 1, part
