"""nvembed-fast eval on planted tasks of all kinds, through mteb: scores, rows, going on, and what is told."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import mteb
import numpy as np
import pytest
from datasets import Dataset
from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from sklearn import metrics

from nvembed_fast import NVEmbed, cli
from nvembed_fast.evaluation import report, scores, tasks
from nvembed_fast.integrations import mteb as door
from nvembed_fast.integrations.mteb import MTEBEncoder, MTEBSearch, MTEBVectors, planted_task, score

TOPICS = ["bread and butter", "trains on rails", "rain in spring"]
TEXTS = [f"text number {n} is about {TOPICS[n % 3]}" for n in range(24)]
DOCUMENTS = {f"d{n}": text for n, text in enumerate(TEXTS)}
RETRIEVAL = tasks.LocalTask(
    "squad",
    "retrieval",
    "Given a topic, retrieve texts",
    48,
    queries={f"q{n}": topic for n, topic in enumerate(TOPICS)},
    documents=DOCUMENTS,
    relevant={f"q{n}": {f"d{m}" for m in range(n, 24, 3)} for n in range(3)},
)
LABELS = [n % 3 for n in range(24)]
CLASSIFICATION = tasks.LocalTask(
    "r52",
    "classification",
    "Classify",
    48,
    texts=TEXTS,
    labels=LABELS,
    train_texts=TEXTS,
    train_labels=LABELS,
)
CLUSTERING = tasks.LocalTask("newsgroups", "clustering", "Identify the topic", 48, texts=TEXTS, labels=LABELS)
PAIRS = tasks.LocalTask(
    "rte",
    "pairs",
    "Retrieve",
    48,
    texts=TEXTS[:-1],
    others=TEXTS[1:],
    labels=[int(n % 4 == 0) for n in range(23)],
)
PLANTED = {task.name: task for task in (RETRIEVAL, CLASSIFICATION, CLUSTERING, PAIRS)}


def of_letters(texts: list[str]) -> np.ndarray:
    """[N, 26] fp32 of unit norm: how often each letter stands in a text."""
    counts = np.array([[text.count(chr(97 + n)) for n in range(26)] for text in texts], np.float32)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


@pytest.fixture
def planted(monkeypatch):
    """The four planted tasks in the place of our own, loaded as often as the list says."""
    loaded = []

    def load(name, cache=None):
        loaded.append(name)
        if name not in PLANTED:
            raise tasks.SkippedTask(f"the data of {name} cannot be had here: planted")
        return PLANTED[name]

    monkeypatch.setattr(tasks, "load", load)
    return loaded


def evaluate(capsys, *words) -> tuple[int, str, str]:
    status = cli.main(["eval", *map(str, words)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.parametrize("task", PLANTED.values(), ids=lambda task: task.kind)
def test_the_score_of_mteb_is_the_score_of_the_units(task):
    model = MTEBVectors("tests/letters", "1", of_letters)
    found = score(planted_task(task), model)
    units = np.array(scores.units_of(task, found.predictions), np.float64)
    assert len(units) == len(task.queries or task.texts)
    assert scores.statistic(task.kind, units) == pytest.approx(found.main_score, abs=1e-5)
    assert 0.05 < found.main_score <= 1


def test_retrieval_ranks_by_cosine():
    found = score(planted_task(RETRIEVAL), MTEBVectors("tests/letters", "1", of_letters))
    cosines = of_letters(TOPICS) @ of_letters(TEXTS).T
    for n, units in enumerate(scores.units_of(RETRIEVAL, found.predictions)):
        best = dict(zip(DOCUMENTS, cosines[n].tolist(), strict=True))
        assert units == pytest.approx(scores.ndcg(best, RETRIEVAL.relevant[f"q{n}"]), abs=1e-5)


def test_clusters_and_pairs_are_scored_as_by_scikit_learn():
    model = MTEBVectors("tests/letters", "1", of_letters)
    clusters = score(planted_task(CLUSTERING), model)
    (found,) = clusters.predictions
    assert metrics.v_measure_score(LABELS, found) == pytest.approx(clusters.main_score)
    cosines = (of_letters(PAIRS.texts) * of_letters(PAIRS.others)).sum(1)
    wanted = metrics.average_precision_score(PAIRS.labels, cosines)
    assert score(planted_task(PAIRS), model).main_score == pytest.approx(wanted, abs=1e-4)


def test_the_model_gets_the_instruction_and_the_length_of_the_task(tiny_directory, monkeypatch):
    calls = []
    encode = NVEmbed.encode

    @functools.wraps(encode)
    def spy(self, texts, instruction="", max_length=..., **more):
        calls.append((len(texts), instruction, max_length))
        return encode(self, texts, instruction, max_length, **more)

    monkeypatch.setattr(NVEmbed, "encode", spy)
    model = MTEBEncoder("tests/tiny", model=NVEmbed.from_pretrained(tiny_directory), max_length=48)
    score(planted_task(RETRIEVAL), model)
    instruction = "Instruct: Given a topic, retrieve texts\nQuery: "
    assert sorted(calls) == [(3, instruction, 48), (24, "", 48)]
    calls.clear()
    score(planted_task(CLUSTERING), model)
    assert calls == [(24, "Instruct: Identify the topic\nQuery: ", 48)]


def test_rows_are_written_and_a_finished_one_is_not_computed_again(
    planted, tiny_directory, tmp_path, capsys, monkeypatch
):
    words = ("--tasks", *PLANTED, "--model", tiny_directory, "--name", "tiny", "-o", tmp_path)
    status, out, _ = evaluate(capsys, *words)
    assert status == 0 and [line.split("\t")[0] for line in out.splitlines()] == list(PLANTED)
    rows = {row["task"]: row for row in scores.read_rows(tmp_path)}
    assert set(rows) == set(PLANTED)
    made_by = rows["squad"]["made_by"]
    model = NVEmbed.from_pretrained(tiny_directory)
    assert made_by["fingerprint"] == model.fingerprint and made_by["dtype"] == "float32"
    assert (made_by["max_length"], made_by["prompt"]) == (48, RETRIEVAL.instruction)
    assert made_by["revision"] == RETRIEVAL.revision and set(made_by["versions"]) == {"mteb"}
    assert len(rows["squad"]["units"]) == 3 and rows["squad"]["hit_at_3"] <= 1

    monkeypatch.setattr(door, "score", lambda *_: pytest.fail("a finished row is computed again"))
    status, out, err = evaluate(capsys, *words)
    assert status == 0 and not out and err.count("is finished") == 4

    # other data: another revision
    monkeypatch.undo()
    monkeypatch.setattr(
        tasks,
        "load",
        lambda name, cache=None: replace(RETRIEVAL, queries={"q0": "bread"}, relevant={"q0": {"d0"}}),
    )
    assert "squad" in evaluate(capsys, *words[:2], *words[5:])[1]


@pytest.mark.parametrize(("model", "name"), [(".", "inner"), ("..", "outer"), ("../../outer/", "outer")])
def test_rows_of_the_directory_at_work_have_its_name(
    planted, tiny_directory, tmp_path, capsys, monkeypatch, model, name
):
    inner = tmp_path / "outer" / "inner"
    shutil.copytree(tiny_directory, inner)
    shutil.copytree(tiny_directory, tmp_path / "outer", dirs_exist_ok=True)
    monkeypatch.chdir(inner)
    assert evaluate(capsys, "--tasks", "squad", "--model", model, "-o", tmp_path / "rows")[0] == 0
    assert [row["model"] for row in scores.read_rows(tmp_path / "rows")] == [name]


@pytest.mark.parametrize("words", [("--name", ""), ("--name", "."), ("--name", ".."), ("--model", "/")])
def test_a_name_that_is_no_folder_is_told_before_the_model_is_loaded(planted, tmp_path, capsys, words):
    status, _, err = evaluate(
        capsys, "--tasks", "squad", "--model", "absent", "-o", tmp_path / "rows", *words
    )
    assert status == 1 and "cannot be the name of a model's rows: give it another one (--name)" in err
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_keeps_its_rows_and_goes_on(
    planted, tiny_directory, tmp_path, capsys, monkeypatch
):
    real, computed = door.score, []

    def interrupted(task, model):
        if task.metadata.name == "newsgroups" and not computed.count("stop"):
            computed.append("stop")
            raise KeyboardInterrupt
        computed.append(task.metadata.name)
        return real(task, model)

    monkeypatch.setattr(door, "score", interrupted)
    words = ("--tasks", *PLANTED, "--model", tiny_directory, "-o", tmp_path)
    status, _, err = evaluate(capsys, *words)
    assert status == 130 and "the same command goes on from there" in err
    assert evaluate(capsys, *words)[0] == 0
    assert computed == ["squad", "r52", "stop", "newsgroups", "rte"]


def test_a_task_without_data_is_a_counted_skip(planted, tiny_directory, tmp_path, capsys):
    words = ("--model", tiny_directory, "-o", tmp_path)
    status, _, err = evaluate(capsys, "--tasks", "libreoffice", "rte", *words)
    assert status == 0 and "skipped libreoffice: the data of libreoffice cannot be had here: planted" in err
    assert "1 of 2 tasks were skipped" in err and len(scores.read_rows(tmp_path)) == 1
    assert evaluate(capsys, "--tasks", "libreoffice", *words)[0] == 1


def test_a_score_that_is_no_number_leaves_no_row(planted, tmp_path, capsys, monkeypatch):
    """A row of NaN would be unreadable, and block the folder."""
    real = door.score
    monkeypatch.setattr(door, "score", lambda *a: real(*a)._replace(main_score=float("nan")))
    _, _, err = evaluate(capsys, "--tasks", "squad", "--model", "bm25", "-o", tmp_path)
    assert "skipped squad: its ndcg_at_10 is nan" in err and not [*tmp_path.rglob("*.json")]


def test_bm25_ranks_and_is_skipped_where_vectors_are_needed(planted, tmp_path, capsys):
    pytest.importorskip("bm25s", reason="needs bm25s")
    status, out, err = evaluate(capsys, "--tasks", "squad", "rte", "--model", "bm25", "-o", tmp_path)
    assert status == 0 and out == "squad\tndcg_at_10\t1.0000\n"
    assert "skipped rte: BM25 makes no vectors, and this task needs them (pairs)" in err
    (row,) = scores.read_rows(tmp_path)
    assert row["units"] == [1, 1, 1] and "bm25s" in row["made_by"]["versions"]


def test_a_fault_in_a_run_of_bm25_is_no_skip(planted, tmp_path, capsys, monkeypatch):
    def broken(task, model):
        raise TypeError("a fault")

    monkeypatch.setattr(door, "score", broken)
    status, _, err = evaluate(capsys, "--tasks", "squad", "--model", "bm25", "-o", tmp_path)
    assert status == 1 and "a fault" in err and "skipped" not in err


def test_quick_rows_of_all_kinds_say_so(planted, tiny_directory, tmp_path, capsys):
    words = ("--tasks", "squad", "r52", "--model", tiny_directory, "--name", "tiny", "-o", tmp_path)
    evaluate(capsys, *words, "--quick")
    lines = evaluate(capsys, "--report", tmp_path)[1].splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| squad (quick)", "| r52 (quick)"]


def test_a_search_gives_scores_by_id():
    class Fixed:
        def search(self, queries, k):
            return np.array([[2.0, 1.0]] * len(queries)), np.array([[1, 0]] * len(queries))

    model = MTEBSearch("tests/fixed", "1", lambda documents: Fixed())
    found = score(planted_task(RETRIEVAL), model)
    assert found.predictions["q0"] == {"d1": 2.0, "d0": 1.0}


WORDS = ["apple", "banana", "cherry", "damson"]


def as_of_mteb(**changes) -> mteb.AbsTask:
    """A retrieval task in which WORDS are the queries and, beside its texts, the titles of the documents.

    Args:
        changes: of its RetrievalSplitData.
    """
    texts = {f"d{n}": f"text {n}" for n in range(4)}
    data = replace(
        RETRIEVAL,
        name="words",
        queries={f"q{n}": word for n, word in enumerate(WORDS)},
        documents=texts,
        relevant={f"q{n}": {f"d{n}"} for n in range(4)},
    )
    task = planted_task(data)
    type(task).load_data(task)
    columns = {"id": list(texts), "title": WORDS, "text": list(texts.values())}
    task.dataset["default"]["test"] |= {"corpus": Dataset.from_dict(columns)} | changes
    return task


def bm25(monkeypatch) -> tuple[MTEBSearch, list[list[str]]]:
    """(BM25, the texts that it is given: documents, then queries)."""
    pytest.importorskip("bm25s", reason="needs bm25s")
    from nvembed_fast.baselines import BM25

    seen = []

    def index(documents):
        seen.append(documents)
        return BM25(documents)

    real = BM25.scores
    monkeypatch.setattr(BM25, "scores", lambda self, query: seen.append([query]) or real(self, query))
    return MTEBSearch("tests/bm25", "1", index), seen


def test_bm25_reads_the_texts_of_an_encoder(monkeypatch):
    """Titles, and instructions of the data, as AbsEncoder gets them."""
    asked = Dataset.from_dict(
        {"id": ["q0", "q1"], "text": WORDS[:2], "instruction": ["of a tree", "not of a tree"]}
    )
    model, seen = bm25(monkeypatch)
    assert score(as_of_mteb(queries=asked), model).main_score == 1
    given = []
    score(as_of_mteb(queries=asked), MTEBVectors("tests/v", "1", lambda t: given.append(t) or of_letters(t)))
    assert given[1][0] == "apple text 0" and given[0] == ["apple of a tree", "banana not of a tree"]
    assert [seen[0], sum(seen[1:], [])] == [given[1], given[0]]


def test_bm25_ranks_the_candidates_of_a_query_alone(monkeypatch):
    """Also those that the search over all documents would not list, and none for a query without any."""
    candidates = {"q0": ["d2", "d0"], "q1": ["d3", "d2"], "q2": []}
    task = as_of_mteb(top_ranked=candidates)
    task._top_k = 1
    model, _ = bm25(monkeypatch)
    found = score(task, model).predictions
    assert {query: list(documents) for query, documents in found.items()} == {
        "q0": ["d0"],
        "q1": ["d3"],
        "q2": [],
        "q3": [],
    }
    assert found["q0"]["d0"] > 0 == found["q1"]["d3"]


def aggregate(name: str, *parts: mteb.AbsTask) -> mteb.AbsTask:
    metadata = AggregateTaskMetadata(
        name=name,
        description="made in the test",
        type=parts[0].metadata.type,
        main_score=parts[0].metadata.main_score,
        eval_splits=["test"],
        tasks=list(parts),
    )
    return type(name, (AbsTaskAggregate,), {"metadata": metadata})()


def test_an_aggregate_of_retrieval_tasks_needs_no_vectors(monkeypatch):
    model, _ = bm25(monkeypatch)
    whole = aggregate("Whole", as_of_mteb(), planted_task(RETRIEVAL))
    assert not door.needs_vectors(whole) and score(whole, model).main_score == 1
    assert door.needs_vectors(aggregate("Mixed", as_of_mteb(), planted_task(PAIRS)))
    assert not door.needs_vectors(mteb.get_task("CQADupstackRetrieval"))


@pytest.mark.parametrize("other", [{"eval_splits": ["test"]}, {"languages": ["eng"]}])
def test_a_row_of_other_splits_or_subsets_is_no_finished_one(
    other, tiny_directory, tmp_path, capsys, monkeypatch
):
    name = "MassiveIntentClassification"
    computed = []

    def fake_score(task, model):
        computed.append((len(task.eval_splits), len(task.hf_subsets)))
        return door.Scored(0.5, {}, None)

    monkeypatch.setattr(door, "score", fake_score)
    words = ("--tasks", name, "--model", tiny_directory, "--name", "tiny", "-o", tmp_path)
    assert "Classification, the mean over 2 splits and 51 subsets\n" in evaluate(capsys, *words)[2]
    (row,) = scores.read_rows(tmp_path)
    assert row["made_by"]["splits"] == ["test", "validation"] and len(row["made_by"]["subsets"]) == 51
    assert "is finished" in evaluate(capsys, *words)[2]
    fewer = mteb.get_task(name, **other)
    monkeypatch.setattr(door, "named_tasks", lambda *_, **__: [fewer])
    evaluate(capsys, *words)
    assert computed == [(2, 51), (len(fewer.eval_splits), len(fewer.hf_subsets))]


def test_what_is_measured_of_an_aggregate_is_that_of_its_parts():
    parts = as_of_mteb(), planted_task(RETRIEVAL)
    whole = aggregate("Whole", *parts)
    before = door.measured(whole)
    assert list(before["parts"]) == ["words", "squad"] and before == json.loads(json.dumps(before))
    assert cli.evaluate._over(before) == ", the mean over 2 parts"
    parts[1].hf_subsets = ["other"]
    assert door.measured(whole) != before


def test_two_words_may_not_take_a_task_in_two_ways():
    words = ["SciFact", "MTEB(eng, v2)", "MassiveIntentClassification"]
    with pytest.raises(
        ValueError, match="'MassiveIntentClassification' takes other splits or subsets of Mass"
    ):
        door.named_tasks(words)
    assert len(door.named_tasks(["MTEB(eng, v1)", "MTEB(eng, v2)"])) > 56


@pytest.mark.parametrize(
    ("name", "hint"),
    [("squat", "no evaluation task 'squat': did you mean 'squad'?"), ("SciFactt", "did you mean 'SciFact'")],
)
def test_an_unknown_task_is_told_with_the_nearest(name, hint, tmp_path, capsys):
    status, _, err = evaluate(capsys, "--tasks", name, "--model", "bm25", "-o", tmp_path)
    assert status == 1 and hint in err


def test_a_lower_case_task_of_mteb_is_one(planted, tmp_path, capsys, monkeypatch):
    """indonli is mteb's. It looks like one of ours."""
    asked = []
    monkeypatch.setattr(
        cli.evaluate._Model, "run_mteb", lambda self, task, measured, skipped: asked.append(task)
    )
    status, _, err = evaluate(capsys, "--tasks", "indonli", "--model", "bm25", "-o", tmp_path)
    assert status == 0, err
    assert [task.metadata.name for task in asked] == ["indonli"] and planted == []


def test_benchmarks_and_tasks_of_mteb_are_found_by_name():
    names = [task.metadata.name for task in door.named_tasks(["SciFact", "MTEB(eng, v2)"])]
    assert names[0] == "SciFact" and len(names) == len(set(names)) == 42


@pytest.mark.filterwarnings("ignore:The task .* is currently in beta")
def test_every_task_of_every_benchmark_has_a_name():
    """Those that mteb has superseded, too: 20 of the 56 of the first English benchmark."""
    names = {task.metadata.name for benchmark in mteb.get_benchmarks() for task in benchmark.tasks}
    old = [task.metadata.name for task in mteb.get_benchmark("MTEB(eng, v1)").tasks]
    assert names > {"STS22", "TwentyNewsgroupsClustering"} and len(old) == 56
    assert [task.metadata.name for task in door.named_tasks(old)] == old
    assert {task.metadata.name for task in door.named_tasks(sorted(names))} == names


def test_a_report_prints_the_table_and_rewrites_the_page(planted, tiny_directory, tmp_path, capsys):
    evaluate(capsys, "--tasks", "squad", "--model", tiny_directory, "--name", "tiny", "-o", tmp_path / "rows")
    page = tmp_path / "page.md"
    page.write_text("<!-- scores:start -->\n<!-- scores:end -->\n")
    status, out, _ = evaluate(capsys, "--report", tmp_path / "rows", "--page", page)
    assert status == 0 and out.splitlines()[0] == "| task | measure | tiny |"
    assert out.strip() in page.read_text()
    assert json.loads((tmp_path / "rows" / "tiny" / "squad.json").read_text())["model"] == "tiny"


@pytest.mark.parametrize("name", ["README.md", "docs/evaluation.md"])
def test_the_pages_hold_the_tables_of_the_committed_rows(name, tmp_path):
    root = Path(__file__).resolve().parents[2]
    page = tmp_path / "page.md"
    page.write_text((root / name).read_text())
    report.put_into(page, scores.read_rows(root / "bench" / "scores"))
    command = "nvembed-fast eval --report bench/scores --page"
    assert page.read_text() == (root / name).read_text(), f"run {command} {name}"


def test_the_card_of_the_demo_model_holds_the_table_of_the_committed_rows():
    root = Path(__file__).resolve().parents[2]
    card = (root / "nvembed_fast" / "demo" / "README.md").read_text()
    assert report.table(scores.read_rows(root / "bench" / "scores")) in card, "see docs/demo.md"
