"""Units, scores and their bootstrap intervals against values by hand, and rows in files."""

import json
import sys

import numpy as np
import pytest

from nvembed_fast.evaluation import report, scores
from nvembed_fast.evaluation.tasks import LocalTask


def row(task="squad", model="a", units=(0.0, 1.0), kind="retrieval", **changes) -> dict:
    made_by = {"revision": "r"} | changes
    mean = float(np.mean(units))
    return {
        "task": task,
        "model": model,
        "kind": kind,
        "score": mean,
        "units": list(units),
        "made_by": made_by,
    }


def test_ndcg_of_several_relevant_documents_by_hand():
    found = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 2.0}
    gain = 1 / np.log2(2) + 1 / np.log2(4)
    ideal = 1 / np.log2(2) + 1 / np.log2(3) + 1 / np.log2(4)
    assert scores.ndcg(found, {"a", "c", "missing"}) == pytest.approx(gain / ideal)
    assert scores.ndcg(found, {"d"}, k=3) == 0 and scores.ndcg({}, {"d"}) == 0
    # as many as k relevant documents at the top are all that there is to find
    assert scores.ndcg(found, {"a", "b", "c"}, k=2) == pytest.approx(1)


def test_equal_scores_rank_as_in_trec_eval():
    assert scores.ndcg({"a": 1.0, "b": 1.0}, {"b"}) == 1 and scores.ndcg({"a": 1.0, "b": 1.0}, {"a"}) < 1


def test_units_come_from_what_was_predicted():
    task = LocalTask(
        "squad",
        "retrieval",
        "",
        8,
        queries={"q0": "x", "q1": "y"},
        documents={"d0": "x", "d1": "y"},
        relevant={"q0": {"d0"}, "q1": {"d0"}},
    )
    found = {"q1": {"d1": 2.0, "d0": 1.0}, "q0": {"d0": 2.0, "d1": 1.0}}
    assert scores.units_of(task, found) == [1, pytest.approx(1 / np.log2(3), abs=1e-6)]
    labelled = LocalTask("r52", "classification", "", 8, texts=["a", "b", "c"], labels=[0, 1, 2])
    assert scores.units_of(labelled, [[0, 2, 2]]) == [1, 0, 1]
    clusters = LocalTask("newsgroups", "clustering", "", 8, texts=["a", "b"], labels=[0, 1])
    assert scores.units_of(clusters, [[7, 8]]) == [[0, 7], [1, 8]]
    pairs = LocalTask("rte", "pairs", "", 8, texts=["a", "b"], others=["c", "d"], labels=[1, 0])
    assert scores.units_of(pairs, {"cosine_scores": [0.5, 0.25]}) == [[1, 0.5], [0, 0.25]]


def test_the_interval_of_a_share_is_the_binomial_one():
    """300 of 400 right: the standard error is sqrt(p (1 - p) / n)."""
    low, high = scores.interval([row(units=[1] * 300 + [0] * 100, kind="classification")])
    error = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - error, abs=0.006) and high == pytest.approx(0.75 + error, abs=0.006)
    assert scores.interval([row(units=[1] * 300 + [0] * 100)]) == (low, high), "the draws are not seeded"
    assert scores.interval([row(units=[0.25] * 9)]) == (0.25, 0.25)


def test_the_interval_of_a_mean_of_tasks_is_narrower_by_its_root():
    units = [1] * 50 + [0] * 50
    rows = [row(task, units=units) for task in ("squad", "nave", "libreoffice", "debtags")]
    one, four = (np.diff(scores.interval(found))[0] for found in (rows[:1], rows))
    assert four == pytest.approx(one / 2, rel=0.15)


@pytest.mark.parametrize("kind", ["clustering", "pairs"])
def test_a_missing_package_is_named(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"needs scikit-learn: pip install 'nvembed-fast\[eval\]'"):
        scores.interval([row(units=[[0, 0.5], [1, 0.5]], kind=kind)])


def test_a_row_of_another_model_or_data_is_not_finished(tmp_path):
    path = scores.row_path(tmp_path, "org/model v2", "MTEB task", is_quick=True)
    assert path == tmp_path / "org_model_v2" / "MTEB_task.quick.json"
    made_by = {"fingerprint": "f", "revision": "r"}
    assert not scores.finished(path, made_by)
    scores.write(path, {"made_by": made_by})
    assert scores.finished(path, made_by) and not scores.finished(path, made_by | {"revision": "s"})
    path.write_text("[1]")
    with pytest.raises(ValueError, match="MTEB_task.quick.json: it must hold an object"):
        scores.finished(path, made_by)


def test_rows_are_read_by_model_and_task_and_others_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no rows: nvembed-fast eval -o"):
        scores.read_rows(tmp_path)
    for model in ("b", "a"):
        scores.write(scores.row_path(tmp_path, model, "squad", False), row(model=model))
    assert [found["model"] for found in scores.read_rows(tmp_path)] == ["a", "b"]
    (tmp_path / "a" / "squad.json").write_text(json.dumps({"task": "squad"}))
    with pytest.raises(ValueError, match="squad.json is no row of scores: it has no 'kind'"):
        scores.read_rows(tmp_path)
    found = row(model="a")
    del found["made_by"]
    for more, missing in (({}, "made_by"), ({"made_by": {}}, "made_by.revision")):
        (tmp_path / "a" / "squad.json").write_text(json.dumps(found | more))
        with pytest.raises(ValueError, match=f"squad.json is no row of scores: it has no '{missing}'"):
            scores.read_rows(tmp_path)


@pytest.mark.parametrize("model", ["", ".", ".."])
def test_rows_do_not_lie_outside_a_folder_of_their_own(model, tmp_path):
    with pytest.raises(ValueError, match="cannot be the name of a model's rows: give it another one"):
        scores.row_path(tmp_path, model, "squad", False)
    with pytest.raises(ValueError, match="cannot be the name of a model's rows: give it another one"):
        scores.check_name(tmp_path, model, "f")


def test_another_model_of_the_same_name_is_refused(tmp_path):
    scores.check_name(tmp_path, "stage2", "f")
    for task in ("squad", "nave"):
        scores.write(scores.row_path(tmp_path, "stage2", task, False), {"made_by": {"fingerprint": "f"}})
    scores.check_name(tmp_path, "stage2", "f")
    scores.check_name(tmp_path, "other", "g")
    with pytest.raises(
        ValueError, match=r"stage2 holds rows of another model \(f\) than this one \(g\): .*--name"
    ):
        scores.check_name(tmp_path, "stage2", "g")


def test_the_table_has_a_mean_only_for_models_with_all_tasks():
    quick = row("nave", "x", units=[0.5], quick=True)
    rows = [
        row("squad", "x", units=[0.5]),
        row("nave", "x", units=[0.25]),
        row("squad", "bm25", units=[0.75], sample="30 of 50 queries, 40 of 50 documents"),
        row("docstrings", "x", units=[1.0]),  # our own: in no mean
        quick,
    ]
    assert report.table(rows).splitlines() == [
        "| task | measure | bm25 | x |",
        "|---|---|--:|--:|",
        "| squad | nDCG@10 | .750 (.750-.750) | .500 (.500-.500) |",
        "| nave | nDCG@10 |  | .250 (.250-.250) |",
        "| nave (quick) | nDCG@10 |  | .500 (.500-.500) |",
        "| docstrings | nDCG@10 |  | 1.000 (1.000-1.000) |",
        "| **retrieval, mean** | |  | **.375 (.375-.375)** |",
    ]


def test_rows_of_other_data_do_not_stand_beside_each_other():
    rows = [row(model="a"), row(model="b", revision="other")]
    with pytest.raises(
        ValueError, match="rows of squad were made on different data .other, r. and do not compare"
    ):
        report.table(rows)


def test_the_summary_has_a_line_for_each_model():
    rows = [
        row("squad", "x", units=[0.5]),
        row("nave", "x", units=[0.25]),
        row("squad", "bm25", units=[0.75]),
    ]
    rows.append(row("r52", "x", units=[1, 1], kind="classification"))
    rows.append(row("docstrings", "x", units=[1.0]))
    assert report.summary(rows).splitlines() == [
        "| model | **retrieval, mean** | **others, mean** | squad | nave | docstrings | r52 |",
        "|---|--:|--:|--:|--:|--:|--:|",
        "| bm25 |  |  | .750 |  |  |  |",
        "| x | **.375 (.375-.375)** | **1.000 (1.000-1.000)** | .500 | .250 | 1.000 | 1.000 |",
    ]


def test_a_page_gets_its_tables_between_their_marks(tmp_path):
    page, rows = tmp_path / "README.md", [row(units=[0.5])]
    marks = "<!-- {0}:start -->\n\nold\n\n<!-- {0}:end -->\n".format
    page.write_text(f"before\n\n{marks('scores')}between\n{marks('summary')}after\n")
    report.put_into(page, rows)
    wanted = [
        "before\n",
        f"<!-- scores:start -->\n{report.table(rows)}\n<!-- scores:end -->\nbetween",
        f"<!-- summary:start -->\n{report.summary(rows)}\n<!-- summary:end -->\nafter\n",
    ]
    assert page.read_text() == "\n".join(wanted)
    for text, message in (
        ("no marks", "must have <!-- scores:start --> and <!-- scores:end -->"),
        ("<!-- scores:end -->\n<!-- scores:start -->", "once, and <!-- scores:end --> once behind it"),
    ):
        page.write_text(text)
        with pytest.raises(ValueError, match=message):
            report.put_into(page, rows)


def test_the_picture_has_a_bar_for_each_score(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    report.draw([row("squad", "a"), row("nave", "a"), row("squad", "bm25")], tmp_path / "bars.svg")
    assert (tmp_path / "bars.svg").read_text().lstrip().startswith("<?xml")
