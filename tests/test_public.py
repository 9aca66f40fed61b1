"""Public training sets: converters on planted rows of each form, and a build with a hub that is not there."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nvembed_fast.cli import main
from nvembed_fast.curation import decontamination, public
from nvembed_fast.curation.decontamination import EvaluationTexts
from nvembed_fast.curation.public import SETS, build, find, rows_of
from nvembed_fast.integrations.datasets import open_table
from nvembed_fast.training.recipe import Recipe
from nvembed_fast.training.rows import open_rows

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def converted(name: str, records: list[dict], tables: dict | None = None) -> tuple[list[dict], dict]:
    dropped = Counter()
    rows = list(rows_of(find(name), records, dropped, (tables or {}).get))
    return rows, dict(dropped)


def test_pairs_of_the_wanted_source():
    records = [{"source": s, "question": f"q{s}", "answer": "a"} for s in ("stackexchange", "other")]
    assert converted("stackexchange_mammoth2", records) == (
        [{"query": "qstackexchange", "pos": ["a"]}],
        {"another source": 1},
    )


def test_triplets_of_one_query_are_one_row():
    records = [("a", "p", "n"), ("b", "p", "n"), ("a", "p", "m")]
    records = [{"anchor": a, "positive": p, "negative": n} for a, p, n in records]
    rows = [{"query": "a", "pos": ["p"], "neg": ["n", "m"]}, {"query": "b", "pos": ["p"], "neg": ["n"]}]
    assert converted("quora", records) == (rows, {})


def test_judgements_take_their_texts_from_two_tables():
    records = [("1", "d1", 1), ("1", "d2", 1), ("1", "d3", 0), ("2", "d9", 1)]
    records = [{"query-id": q, "corpus-id": d, "score": s} for q, d, s in records]
    tables = {
        "queries": [{"_id": str(n), "text": f"q{n}"} for n in (1, 2, 3)],
        "corpus": [{"_id": f"d{n}", "title": "T" if n < 2 else "", "text": f"t{n}"} for n in (1, 2, 3)],
    }
    assert converted("hotpotqa", records, tables) == (
        [{"query": "q1", "pos": ["T t1", "t2"]}],
        {"no text": 1},
    )


def test_hypotheses_of_a_premise():
    records = [("a", "yes", 0), ("a", "perhaps", 1), ("a", "no", 2), ("b", "no", 2)]
    records = [{"premise": p, "hypothesis": h, "label": label} for p, h, label in records]
    assert converted("multinli", records) == (
        [{"query": "a", "pos": ["yes"], "neg": ["no"]}],
        {"neither follows nor contradicts": 1, "no positive": 1},
    )


def test_labels_and_scores():
    assert converted("amazon_reviews", [{"text": "good", "label": 4}])[0] == [{"text": "good", "label": "4"}]
    records = [{"sentence1": "a", "sentence2": "b", "score": score} for score in (4, 3.9)]
    assert converted("sts", records) == (
        [{"query": "a", "pos": ["b"]}, {"query": "b", "pos": ["a"]}],
        {"score below 4": 1},
    )


def test_a_table_with_other_columns_is_named():
    with pytest.raises(ValueError, match="paq: no column 'answer', the hub's table has query, text: it has"):
        converted("paq", [{"query": "a", "text": "b"}])


NOTHING = EvaluationTexts({})
HELD_OUT = "this text is held out for evaluation"


class Hub:
    """Planted tables by (hub id, config, split), and what was asked for."""

    def __init__(self, **tables):
        self.tables, self.asked = tables, []

    def __call__(self, hub_id, config, split, seed):
        self.asked.append((hub_id, config, split, seed))
        return "r1", self.tables[hub_id.split("/")[1].replace("-", "_")]


SQUAD = [{"question": f"q{n}", "context": f"c{n}"} for n in range(5)]


def test_a_build_writes_rows_that_the_trainer_reads_and_a_manifest(tmp_path):
    dirty = [("q0", "c0"), ("", "c"), ("q", " "), ("same", "same"), ("held", HELD_OUT)]
    hub = Hub(
        squad=[*SQUAD, *({"question": q, "context": c} for q, c in dirty)],
        emotion=[{"text": "t", "label_text": "joy"}],
    )
    said = []
    manifest = build(
        tmp_path,
        ["squad", "emotion"],
        open_table=hub,
        evaluation=EvaluationTexts({"exam": [HELD_OUT]}, {"gone": "no network"}),
        say=said.append,
    )
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    entry = manifest["sets"]["squad"]
    assert entry["dropped"] == {"empty": 1, "in exam": 1, "no positive": 2, "repeated": 1}
    assert (entry["rows"], entry["task"], entry["in_batch"]) == (5, "retrieval", True)
    source = {"package": "rajpurkar/squad@r1", "sha256": None, "licence": "cc-by-sa-4.0"}
    assert entry["sources"] == [source] and entry["not_compared_with"] == ["gone"]
    assert not manifest["sets"]["emotion"]["in_batch"]
    rows = open_rows(tmp_path / "squad.jsonl")
    assert {rows.row(n).query for n in range(5)} == {f"q{n}" for n in range(5)} and len(rows) == 5
    assert open_rows(tmp_path / "emotion.jsonl").labelled(0).label == "joy"
    assert "squad.jsonl: 5 rows, 1 dropped (empty), 1 dropped (in exam)" in said[1]


def test_a_negative_of_an_evaluation_set_is_found(tmp_path):
    """A row counts for each set in which one of its texts stands."""
    texts = [("a", "b", HELD_OUT), ("c", "d", "e")]
    hub = Hub(quora_duplicates=[dict(zip(("anchor", "positive", "negative"), t, strict=True)) for t in texts])
    known = EvaluationTexts({"exam": [HELD_OUT], "test": [HELD_OUT], "other": ["another text of theirs"]})
    entry = build(tmp_path, ["quora"], open_table=hub, evaluation=known)["sets"]["quora"]
    assert (entry["rows"], entry["dropped"]) == (1, {"in exam": 1, "in test": 1})


@pytest.mark.parametrize("change", ["evaluation", "set", "code"])
def test_a_set_that_was_made_of_something_else_is_made_again(tmp_path, monkeypatch, change):
    hub = Hub(squad=SQUAD)
    build(tmp_path, ["squad"], open_table=hub, evaluation=NOTHING)
    if change == "set":
        monkeypatch.setattr(public, "SETS", tuple(replace(data, instruction="find it") for data in SETS))
    if change == "code":
        monkeypatch.setattr(public, "_MODULES", (*public._MODULES, "json"))
    known = EvaluationTexts({"exam": [HELD_OUT]}) if change == "evaluation" else NOTHING
    build(tmp_path, ["squad"], open_table=hub, evaluation=known)
    assert len(hub.asked) == 2


def test_a_build_goes_on_behind_what_is_done(tmp_path):
    hub = Hub(squad=SQUAD)
    with pytest.raises(KeyError):
        build(tmp_path, ["squad", "nq"], open_table=hub, evaluation=NOTHING)
    before = (tmp_path / "squad.jsonl").read_bytes()
    hub.tables["natural_questions"] = [{"query": "a", "answer": "b"}]
    build(tmp_path, ["squad", "nq"], open_table=hub, evaluation=NOTHING)
    assert [ask[0] for ask in hub.asked].count("rajpurkar/squad") == 1
    (tmp_path / "squad.jsonl").write_text("cut")
    assert set(build(tmp_path, ["squad"], open_table=hub, evaluation=NOTHING)["sets"]) == {"squad", "nq"}
    assert (tmp_path / "squad.jsonl").read_bytes() == before, "the same rows give the same bytes"


def test_a_set_is_cut_at_the_published_rows(tmp_path, monkeypatch):
    hub = Hub(squad=SQUAD, paq=({"query": f"q{n}", "answer": "a"} for n in range(10**9)))
    sets = tuple(replace(s, num_published=3) if s.name in ("squad", "paq") else s for s in SETS)
    monkeypatch.setattr(public, "SETS", sets)
    manifest = build(tmp_path, ["squad", "paq"], open_table=hub, evaluation=NOTHING)
    assert [manifest["sets"][name]["rows"] for name in ("squad", "paq")] == [3, 3]
    assert [ask[3] for ask in hub.asked] == [None, 0], "a stream that is cut is shuffled"
    backwards = tmp_path / "again"
    build(backwards, ["squad"], open_table=Hub(squad=SQUAD[::-1]), evaluation=NOTHING)
    assert (backwards / "squad.jsonl").read_bytes() == (tmp_path / "squad.jsonl").read_bytes()


def test_what_cannot_be_fetched_is_named(tmp_path):
    for name, message in {
        "msmarko": "no public set 'msmarko': did you mean 'msmarco'?",
        "qqqqq": "no public set 'qqqqq': there are msmarco, paq",
        "hover": "hover cannot be fetched: the hub has claims with titles alone",
    }.items():
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            build(tmp_path / "none", ["squad", name], open_table=Hub(), evaluation=NOTHING)
    assert not (tmp_path / "none").exists()


def test_a_hub_that_is_out_of_reach_is_named_and_leaves_what_is_done(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("offline\nat")

    build(tmp_path, ["squad"], open_table=Hub(squad=SQUAD), evaluation=NOTHING)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"public sets need datasets: pip install 'nvembed-fast\[data\]'"):
        build(tmp_path, ["nq"], open_table=open_table, evaluation=NOTHING)
    info = SimpleNamespace(dataset_info=lambda _: SimpleNamespace(sha="r"))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: info)
    with pytest.raises(OSError, match=r"paq cannot be read from the hub \(ConnectionError: offline\): check"):
        build(tmp_path, ["squad", "paq"], open_table=open_table, evaluation=NOTHING)
    assert {p.name for p in tmp_path.iterdir() if p.name[0] != "."} == {"manifest.json", "squad.jsonl"}


def test_the_command_builds_what_the_hub_has_and_names_what_is_missing(tmp_path, monkeypatch, capsys):
    made, left_out = [], []

    def built(directory, names, *, evaluation, **_):
        made.append((directory, names, evaluation))
        return {"sets": {name: {"rows": 2} for name in names}}

    evaluation = EvaluationTexts({}, {"nave": "no package"})
    monkeypatch.setattr(public, "build", built)
    monkeypatch.setattr(
        decontamination.EvaluationTexts, "load", lambda without: left_out.append(without) or evaluation
    )
    assert main(["curate", "-o", str(tmp_path), "--public"]) == 0
    shown = capsys.readouterr()
    fetched = [data.name for data in SETS if data.form is not None]
    assert made == [(tmp_path, fetched, evaluation)] and len(fetched) == 19
    assert shown.out == f"{tmp_path}: 38 rows in 19 sets\n" and "not compared with nave" in shown.err
    assert "hover is missing: The hub has claims with titles alone" in shown.err
    chosen = ["curate", "-o", str(tmp_path), "--public", "--sources", "nq", "--without", "rte"]
    assert main(chosen) == 0 and made[1][1] == ["nq"] and left_out == [[], ["rte"]]
    assert main(["curate", "--public", "--list"]) == 0
    assert "nq: 100,231 rows, retrieval, stage 1 and 2\n" in capsys.readouterr().out
    for arguments, message in (
        ([], "-o DIR is missing"),
        (["-o", "x", "--debian"], "--debian and --public are different sets"),
        (["-o", "x", "--sources", "squat"], "no public set 'squat': did you mean 'squad'"),
        (["-o", "x", "--sources", "bioasq"], "bioasq cannot be fetched"),
    ):
        assert main(["curate", "--public", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("stage", [1, 2])
def test_the_sets_are_those_of_the_recipes(stage):
    recipe = Recipe.from_file(RECIPES / f"nv-embed-v2-stage{stage}.toml")
    text = (RECIPES / f"nv-embed-v2-stage{stage}.toml").read_text()
    parts = {Path(part.file).stem: part for part in recipe.data}
    sets = {data.name: data for data in SETS if stage in data.stages}
    assert parts.keys() == sets.keys()
    for name, data in sets.items():
        assert parts[name].instruction == data.instruction, name
        assert parts[name].symmetric == (data.task != "retrieval"), name
        assert (parts[name].labels == "examples") == (data.task == "classification"), name
        if data.num_published:
            assert f'{name}.jsonl"  # published: {data.num_published:,} rows' in text, name
