"""Hard negatives: every rule beside a brute-force oracle. The command killed, resumed, wrong and large."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from nvembed_fast import NVEmbed, cli
from nvembed_fast.cli import mine
from nvembed_fast.curation import mining as module
from nvembed_fast.curation.mining import Entry, Mining, Rule, Texts, choose
from nvembed_fast.curation.teachers import Bm25, Dense
from nvembed_fast.texts import text_id
from nvembed_fast.training.rows import open_rows
from nvembed_fast.training.teacher_vectors import SIDES, TeacherVectors

ROOT = Path(__file__).resolve().parents[1]


class Planted:
    """Entries in memory."""

    def __init__(self, entries: list[Entry]):
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def entry(self, index: int) -> Entry:
        return self.entries[index]

    def place(self, index: int) -> str:
        return f"planted, line {index + 1}"


def eighths(num: int, seed: int) -> np.ndarray:
    """[num, 6] vectors whose products are exact in fp32, many of them equal and many negative."""
    return (np.random.default_rng(seed).integers(-4, 5, (num, 6)) / 8).astype(np.float32)


@pytest.fixture(params=["rows", "corpus"])
def planted(request) -> tuple[Texts, Dense]:
    """40 rows: queries that come twice, several positives, texts that come twice, a document like a query."""
    draw = np.random.default_rng(3)
    words = [f"document {i}" for i in range(60)] + ["query 5"]
    rows = [
        Entry(f"query {i % 30}", tuple(words[j] for j in draw.choice(61, draw.integers(1, 4), replace=False)))
        for i in range(40)
    ]
    corpus = (
        [Planted([Entry("", (word,)) for word in words[::2] + words[:3]])]
        if request.param == "corpus"
        else []
    )
    texts = Texts([Planted(rows[:25]), Planted(rows[25:])], corpus)
    documents = eighths(len(texts.document_ids), 1)
    return texts, Dense(eighths(40, 2), documents, texts.num_candidates)


def oracle(texts: Texts, teachers: list[Dense], mining: Mining, row: int) -> list[int]:
    """What is chosen, from the scores of all documents and the texts themselves."""
    found: list[int] = []
    query = texts.row(row)[2].query
    same = [texts.row(r)[2] for r in range(len(texts)) if texts.row(r)[2].query == query]
    never = {query, *itertools.chain(*(entry.documents for entry in same))}
    for number, teacher in enumerate(teachers):
        scores = teacher.documents @ teacher.queries[row]
        names = {texts.document(i): i for i in range(len(scores))}
        lowest = min(scores[names[text]] for text in texts.row(row)[2].documents)
        ceilings = [np.float32(np.inf)]
        rule = mining.rule
        ceilings += (
            [] if rule.percentage is None else [lowest - np.float32(1 - rule.percentage) * abs(lowest)]
        )
        ceilings += [] if rule.margin is None else [lowest - np.float32(rule.margin)]
        ceilings += [] if rule.absolute is None else [np.float32(rule.absolute)]
        ranked = sorted(range(texts.num_candidates), key=lambda i: (-scores[i], i))
        ranked = [i for i in ranked if texts.document(i) not in never and scores[i] <= min(ceilings)]
        share = len(range(number, mining.num_negatives, len(teachers)))
        window = [i for i in ranked[mining.first : mining.end] if i not in found]
        found += window[:share]
    return found


MININGS = {
    "naive": Mining(5, Rule()),
    "percentage": Mining(5, Rule(percentage=0.95)),
    "strict percentage": Mining(4, Rule(percentage=0.25)),
    "margin": Mining(5, Rule(margin=0.125)),
    "absolute": Mining(5, Rule(absolute=0.25)),
    "shifted": Mining(5, Rule(), first=10),
    "range": Mining(3, Rule(percentage=0.95), first=4, last=9),
    "all rules": Mining(5, Rule(0.9, 0.05, 0.5), first=1),
    "more than there are": Mining(70, Rule(absolute=0.0)),
}


@pytest.mark.parametrize("slack", [32, 0])
@pytest.mark.parametrize("name", MININGS)
def test_a_rule_equals_the_oracle(planted, name, slack, monkeypatch):
    monkeypatch.setattr(module, "_SLACK", slack)
    monkeypatch.setattr(module, "_MAX_TEXTS", slack)
    monkeypatch.setattr(module, "_MAX_FOUND", slack or 60)
    texts, teacher = planted
    choice = choose(texts, [teacher], MININGS[name], range(len(texts)))
    for row in range(len(texts)):
        wanted = oracle(texts, [teacher], MININGS[name], row)
        assert [i for i in choice.negatives[row] if i >= 0] == wanted
    assert (choice.negatives >= 0).any()


class Shrinking(Dense):
    """A second search whose scores are an ulp lower, as another shape of the product may give."""

    def best(self, rows, k, ceilings=None):
        if ceilings is None:
            return super().best(rows, k)
        scores, found = super().best(rows, len(self.documents))
        scores = np.nextafter(scores, np.float32(-np.inf))
        allowed = scores[0] <= ceilings[0]
        return scores[:, allowed][:, :k], found[:, allowed][:, :k]


def test_a_second_search_does_not_let_pass_what_the_first_put_above(monkeypatch):
    monkeypatch.setattr(module, "_SLACK", 0)
    texts = Texts([Planted([Entry("q", ("positive",)), Entry("o", ("above", "below"))])])
    documents = np.array([[1.0], [np.nextafter(np.float32(0.5), np.float32(1))], [0.4]], dtype=np.float32)
    teacher = Shrinking(np.array([[1.0], [0.0]], dtype=np.float32), documents, 3)
    choice = choose(texts, [teacher], Mining(1, Rule(absolute=0.5)), range(1))
    assert choice.negatives.tolist() == [[2]] and choice.by_rule.tolist() == [1]


class Counting(Dense):
    """Notes how many scores each search gives back."""

    def best(self, rows, k, ceilings=None):
        self.sizes = [*getattr(self, "sizes", ()), len(rows) * k]
        return super().best(rows, k, ceilings)


def test_a_frequent_query_does_not_widen_the_search_of_the_others(monkeypatch):
    """400 rows of one query with 2,000 positives in all, and 400 of others."""
    monkeypatch.setattr(module, "_MAX_FOUND", 2500)
    rows = [Entry("frequent", tuple(f"{i} {j}" for j in range(5))) for i in range(400)]
    texts = Texts([Planted(rows + [Entry(f"query {i}", (f"document {i}",)) for i in range(400)])])
    documents = eighths(len(texts.document_ids), 1)
    documents[:2000] = 0.5
    queries = np.full((800, 6), 0.125, dtype=np.float32)
    teacher = Counting(queries, documents, texts.num_candidates)
    num_read = 0
    positives_of = Texts.positives_of

    def counted(texts: Texts, row: int) -> np.ndarray:
        nonlocal num_read
        num_read += 1
        return positives_of(texts, row)

    monkeypatch.setattr(Texts, "positives_of", counted)
    choice = choose(texts, [teacher], Mining(3, Rule()), range(390, 410))
    assert (choice.negatives >= 0).all() and (choice.negatives[:10] >= 2000).all()
    assert max(teacher.sizes) <= 20 * (3 + module._MAX_TEXTS + module._SLACK)
    assert num_read == 400 + 10


def test_the_oracle_meets_negative_cosines_and_ties(planted):
    texts, teacher = planted
    lowest = module._lowest(texts, teacher, range(len(texts)))
    assert (lowest < 0).any() and (lowest > 0).any()
    scores = np.sort(teacher.queries @ teacher.documents.T, axis=1)
    assert (np.diff(scores[:, -8:], axis=1) == 0).any()


def test_two_teachers_share_the_negatives(planted):
    texts, first = planted
    second = Dense(eighths(40, 7), eighths(len(texts.document_ids), 8), texts.num_candidates)
    mining = Mining(5, Rule(percentage=0.95))
    choice = choose(texts, [first, second], mining, range(len(texts)))
    for row in range(len(texts)):
        found = [i for i in choice.negatives[row] if i >= 0]
        assert found == oracle(texts, [first, second], mining, row) and len(set(found)) == len(found)


def test_a_random_choice_follows_from_the_seed_and_stays_in_its_range(planted):
    texts, teacher = planted
    rows = range(len(texts))

    def chosen(**changes) -> list[list[int]]:
        lines = choose(
            texts, [teacher], Mining(**{"rule": Rule(), "first": 2, "last": 12} | changes), rows
        ).negatives
        return [[i for i in line if i >= 0] for line in lines]

    windows, drawn = chosen(num_negatives=10), chosen(num_negatives=3, seed=0)
    for window, found in zip(windows, drawn, strict=True):
        assert len(found) == 3 and [i for i in window if i in found] == found
    assert drawn == chosen(num_negatives=3, seed=0) != chosen(num_negatives=3, seed=1)
    # each place of a range comes up, and none much more often than others
    places = [
        windows[row].index(i)
        for row in rows
        for seed in range(9)
        for i in chosen(num_negatives=3, seed=seed)[row]
    ]
    counts = np.bincount(places, minlength=10)
    assert len(places) == 9 * 40 * 3 and counts.min() > 70 and counts.max() < 150


def test_a_planted_false_negative_goes_by_the_percentage_rule_alone():
    """The positive has 0.8 of the query, its twin 0.78, an honest negative 0.6."""
    rows = [Entry("query", ("positive",)), Entry("other", ("twin",)), Entry("third", ("negative",))]
    texts = Texts([Planted(rows)])
    documents = np.array([[0.8, 0], [0.78, 0], [0.6, 0]], dtype=np.float32)
    teacher = Dense(np.array([[1, 0], [0, 1], [0, 1]], dtype=np.float32), documents, 3)
    naive = choose(texts, [teacher], Mining(2, Rule()), range(1))
    kept = choose(texts, [teacher], Mining(2, Rule(percentage=0.95)), range(1))
    assert naive.negatives.tolist() == [[1, 2]] and kept.negatives.tolist() == [[2, -1]]
    assert kept.by_rule.tolist() == [1] and kept.by_text.tolist() == [1]


def test_candidates_above_the_lowest_positive_are_suspects():
    texts = Texts([Planted([Entry("q", ("low", "high")), Entry("o", ("above", "between", "below"))])])
    documents = np.array([[0.5], [0.9], [1.0], [0.7], [0.4]], dtype=np.float32)
    teacher = Dense(np.array([[1.0], [-1.0]], dtype=np.float32), documents, 5)
    choice = choose(texts, [teacher], Mining(2), range(2))
    assert choice.suspects[0, :3].tolist() == [2, 3, -1] and choice.negatives[0].tolist() == [4, -1]


class WordsInCommon:
    """A stand-in for `baselines.BM25`."""

    def __init__(self, documents: list[str]):
        self.documents = [set(text.split()) for text in documents]

    def scores(self, query: str) -> np.ndarray:
        return np.array([len(set(query.split()) & words) for words in self.documents], dtype=np.float32)


def test_bm25_finds_words_in_common_alone():
    entries = [
        Entry("a b c d", ("a b c x",)),
        Entry("e", ("a b y",)),
        Entry("f", ("a b c d z",)),
        Entry("g", ("h",)),
    ]
    texts = Texts([Planted(entries)])
    index = WordsInCommon([texts.document(number) for number in range(4)])
    teacher = Bm25(index, texts.num_candidates, lambda row: texts.row(row)[2].query)
    assert choose(texts, [teacher], Mining(3, Rule()), range(1)).negatives.tolist() == [[2, 1, -1]]
    assert choose(texts, [teacher], Mining(3), range(1)).negatives.tolist() == [[1, -1, -1]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["percent"], "no rule 'percent': there are percentage, margin and absolute"),
        (["none", "margin"], "no rule 'none'"),
        (["margin", "margin=0.1"], "no rule 'margin=0.1'"),
        (["percentage=95"], "percentage must be a number from 0 to 1, got '95'"),
        (["margin=x"], "margin must be a number from 0 to 2, got 'x'"),
        (["absolute=nan"], "absolute must be a number from -1 to 1"),
    ],
)
def test_a_wrong_rule_is_named(words, message):
    with pytest.raises(ValueError, match=message):
        Rule.parse(words)
    assert Rule.parse(["none"]) == Rule() and Rule.parse(["margin", "absolute=0.5"]) == Rule(None, 0.05, 0.5)


class FakeEncoder:
    """Words in common, as [N, 16] vectors. Counts what it was asked for, and may die at a call."""

    fingerprint, width = "fake", 16

    def __init__(self, die_at: int | None = None, by=KeyboardInterrupt):
        self.calls, self.die_at, self.by = 0, die_at, by

    def encode(self, texts, prompts):
        self.calls += 1
        if self.calls == self.die_at:
            if self.by is signal.SIGKILL:
                os.kill(os.getpid(), signal.SIGKILL)
            raise self.by
        found = np.full((len(texts), 16), 0.01, dtype=np.float32)
        for i, text in enumerate(texts):
            for word in text.split():
                found[i, text_id(word) % 16] += 1
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def write_rows(file: Path, count: int = 30) -> Path:
    draw = np.random.default_rng(count)

    def text() -> str:
        return " ".join(f"w{i}" for i in draw.integers(0, 60, 6))

    lines = ({"query": text(), "pos": [text()], "source": f"s{i}"} for i in range(count))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def encoder(monkeypatch) -> FakeEncoder:
    """The teacher of every command, in chunks of eight texts."""
    fake = FakeEncoder()
    monkeypatch.setattr(mine, "encoder_loader", lambda name, **_: lambda: fake)
    monkeypatch.setattr(mine, "_is_own", lambda name: False)
    monkeypatch.setattr(mine, "_CHUNK", 8)
    monkeypatch.setattr(mine, "_TEXTS", 8)
    return fake


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main(["mine", "--teacher", "fake", "--device", "cpu", *map(str, arguments)])
    return status, *capsys.readouterr()


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_rows_keep_what_they_have_and_get_negatives_with_scores(encoder, rows, tmp_path, capsys):
    status, printed, error = run(capsys, rows, "-o", tmp_path / "out.jsonl", "--negatives", "3")
    assert status == 0 and printed.startswith(f"{tmp_path / 'out.jsonl'}: 30 rows, "), error
    before, after = records(rows), records(tmp_path / "out.jsonl")
    vector = FakeEncoder().encode
    for old, new in zip(before, after, strict=True):
        assert {key: new[key] for key in old} == old
        assert not {*new["neg"]} & {*new["pos"], new["query"]} and len(new["neg"]) <= 3
        for texts, scores in (("pos", "pos_scores"), ("neg", "neg_scores")):
            if new[texts]:
                wanted = vector([new["query"]], None) @ vector(new[texts], None).T
                assert np.allclose(new[scores], wanted[0], atol=1e-6)
                assert new[scores] == [float(str(np.float32(score))) for score in new[scores]]
        assert all(score <= 0.95 * new["pos_scores"][0] + 1e-6 for score in new["neg_scores"])
    assert sum(len(row["neg"]) for row in after) > 60
    assert open_rows(tmp_path / "out.jsonl").row(0).negative_scores
    assert "candidates of" in error and "rows have fewer than 3 negatives, and" in error


def test_the_vectors_stay_for_a_recipe(encoder, rows, tmp_path, capsys):
    run(capsys, rows, "-o", tmp_path / "out.jsonl", "--vectors", tmp_path / "t")
    teacher = TeacherVectors(tmp_path / "t")
    found = records(tmp_path / "out.jsonl")
    for record in found[:5]:
        texts = [*record["pos"], *record["neg"]]
        query = teacher("queries", [text_id(record["query"])], [record["query"]])
        scores = teacher("documents", [text_id(text) for text in texts], texts) @ query[0]
        wanted = torch.tensor([*record["pos_scores"], *record["neg_scores"]])
        torch.testing.assert_close(scores, wanted, rtol=0, atol=2e-3)  # kept in fp16


def test_vectors_of_several_files_lie_in_one_folder(encoder, tmp_path, capsys):
    """Added one by one, in any order, they are those of one run over all files."""
    files = [write_rows(tmp_path / f"{count}.jsonl", count) for count in (9, 12)]
    for name, order in (("a", files), ("b", files[::-1])):
        for file in order:
            run(capsys, file, "-o", tmp_path / f"{name}-{file.name}", "--vectors", tmp_path / name)
    run(capsys, *files, "-o", tmp_path / "out.jsonl", "--vectors", tmp_path / "whole")
    whole = TeacherVectors(tmp_path / "whole")
    assert len(whole.stored("queries")[0]) > 12
    for name in "ab":
        found = TeacherVectors(tmp_path / name)
        for side in SIDES:
            for got, wanted in zip(found.stored(side), whole.stored(side), strict=True):
                assert np.array_equal(got, wanted)


def test_vectors_of_two_teachers_are_not_mixed(encoder, rows, tmp_path, capsys):
    words = [rows, "-o", tmp_path / "out.jsonl", "--vectors", tmp_path / "t"]
    run(capsys, *words)
    before = TeacherVectors(tmp_path / "t").fingerprint
    encoder.fingerprint, encoder.calls = "another", 0
    status, _, error = run(capsys, *words)
    assert status == 1 and "has vectors of another teacher" in error
    assert TeacherVectors(tmp_path / "t").fingerprint == before and encoder.calls == 0


def test_a_second_teacher_has_no_vectors_to_keep(encoder, rows, tmp_path, capsys, monkeypatch):
    second = FakeEncoder()
    second.fingerprint = "second"
    monkeypatch.setattr(
        mine, "encoder_loader", lambda name, **_: lambda: encoder if name == "fake" else second
    )
    words = [rows, "-o", tmp_path / "out.jsonl", "--vectors", tmp_path / "t", "--teacher", "second"]
    assert [run(capsys, *words)[0] for _ in range(2)] == [0, 0]


def test_a_teacher_leaves_the_memory_before_the_next_one_comes(rows, tmp_path, capsys, monkeypatch):
    loaded: list[weakref.ref] = []

    def load() -> FakeEncoder:
        assert all(encoder() is None for encoder in loaded)
        encoder = FakeEncoder()
        loaded.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(mine, "encoder_loader", lambda name, **_: load)
    monkeypatch.setattr(mine, "_is_own", lambda name: False)
    words = [rows, "-o", tmp_path / "out.jsonl", "--vectors", tmp_path / "t", "--teacher", "second"]
    assert [run(capsys, *words)[0] for _ in range(2)] == [0, 0] and len(loaded) == 4


def test_a_teacher_that_comes_meanwhile_is_not_mixed_in(encoder, rows, tmp_path, capsys):
    """The folder had nothing when the run began."""
    words = ["--vectors", tmp_path / "t"]
    encode, other = encoder.encode, FakeEncoder()

    def encoded(texts, prompts):
        encoder.encode, encoder.fingerprint = encode, "another"
        assert run(capsys, rows, "-o", tmp_path / "other.jsonl", *words)[0] == 0
        encoder.fingerprint = other.fingerprint
        return encode(texts, prompts)

    encoder.encode = encoded
    status, _, error = run(capsys, rows, "-o", tmp_path / "out.jsonl", *words)
    assert status == 1 and "has vectors of another teacher" in error, error
    assert TeacherVectors(tmp_path / "t").made_by == "another"


def test_a_query_with_another_prompt_does_not_replace_the_one_of_another_run(encoder, tmp_path, capsys):
    folder, words = tmp_path / "t", ["--rule", "none", "--vectors", tmp_path / "t"]

    def mined(*lines: dict) -> tuple[int, str]:
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps({"pos": ["d"]} | line) + "\n" for line in lines))
        encoder.calls = 0
        status, _, error = run(capsys, rows, "-o", tmp_path / "out.jsonl", *words)
        return status, error

    assert mined({"query": "q1", "prompt": "a"}, {"query": "q2"})[0] == 0
    assert mined({"query": "q3", "prompt": "b"}, {"query": "q1", "prompt": "a"})[0] == 0
    before = TeacherVectors(folder).fingerprint
    for line in ({"query": "q1", "prompt": "b"}, {"query": "q1"}, {"query": "q2", "prompt": "a"}):
        status, error = mined({"query": "q0"}, line, {"query": "q4"})
        assert status == 1 and encoder.calls == 0, line
        assert f"{folder} has the query {line['query']!r} with another prompt" in error, error
    assert TeacherVectors(folder).fingerprint == before
    # a folder from before prompts were kept still serves a training
    (folder / "queries.prompts.npy").unlink()
    status, error = mined({"query": "q5"})
    assert status == 1 and encoder.calls == 0
    assert f"{folder} has no queries.prompts.npy" in error and "remove it" in error, error
    assert TeacherVectors(folder).fingerprint == before


@pytest.mark.parametrize("step", ["_commit", "_install"])
def test_vectors_of_a_killed_run_are_the_old_or_the_new_ones(encoder, tmp_path, capsys, monkeypatch, step):
    """Killed in front of each step of the exchange, and in the midst of its links."""
    from nvembed_fast import files

    rows, folder = tmp_path / "rows.jsonl", tmp_path / "t"
    whole = {}
    for count in (9, 12):
        run(capsys, write_rows(rows, count), "-o", tmp_path / "out.jsonl", "--vectors", tmp_path / "whole")
        whole[count] = TeacherVectors(tmp_path / "whole").fingerprint
    run(capsys, write_rows(rows, 9), "-o", tmp_path / "out.jsonl", "--vectors", folder)
    write_rows(rows, 12)
    link = files._link_or_copy
    for num_links in range(5) if step == "_install" else [0]:
        child = os.fork()
        if child == 0:
            left = iter(range(num_links))

            def dying(*arguments, left=left) -> None:
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                link(*arguments)

            monkeypatch.setattr(files, "_link_or_copy" if step == "_install" else "_commit", dying)
            os._exit(run(capsys, rows, "-o", tmp_path / "out.jsonl", "--vectors", folder)[0])
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert TeacherVectors(folder).fingerprint == whole[9 if step == "_commit" else 12]
    assert run(capsys, rows, "-o", tmp_path / "out.jsonl", "--vectors", folder)[0] == 0
    assert TeacherVectors(folder).fingerprint == whole[12]
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_on_a_full_disk_the_vectors_stay_as_they_were(encoder, tmp_path, capsys, monkeypatch):
    """The space is taken first: a mapping that finds none would end the process."""
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "t"
    words = rows, "-o", tmp_path / "out.jsonl", "--vectors", folder
    run(capsys, write_rows(rows, 9), *words[1:])
    before = TeacherVectors(folder).fingerprint
    write_rows(rows, 12)

    def full(handle: int, place: int, size: int) -> None:
        there = {path.stat().st_ino: path for path in tmp_path.rglob("*")}
        if there[os.fstat(handle).st_ino].suffix == ".npy":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    status, _, error = run(capsys, *words)
    assert status == 1 and "No space left" in error
    assert TeacherVectors(folder).fingerprint == before


def test_bm25_alone_has_no_vectors_to_keep(rows, tmp_path, capsys):
    words = ["-o", str(tmp_path / "out.jsonl"), "--teacher", "bm25", "--vectors", str(tmp_path / "t")]
    assert cli.main(["mine", str(rows), *words]) == 1
    assert "bm25 has none" in capsys.readouterr().err and not (tmp_path / "t").exists()


def test_another_rule_takes_the_same_vectors(encoder, rows, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run(capsys, rows, "-o", out)[0] == 0
    calls, first = encoder.calls, out.read_bytes()
    assert run(capsys, rows, "-o", out, "--rule", "none")[0] == 0
    assert encoder.calls == calls == 8 and out.read_bytes() != first
    assert run(capsys, rows, "-o", out)[0] == 0
    assert encoder.calls == calls and out.read_bytes() == first


def test_kept_vectors_count_as_no_memory(tmp_path, recwarn):
    path, vectors = tmp_path / "vectors.npy", eighths(40, 1)
    kept = mine._kept("vectors", path, vectors.shape, "float32", 16, lambda numbers: vectors[numbers])
    assert (kept.mode, kept.tobytes()) == ("r", vectors.tobytes())
    scores, _ = Dense(kept, kept, len(kept)).best(range(40), 1)
    assert np.array_equal(scores[:, 0], (vectors @ vectors.T).max(1)) and not recwarn.list


class PromptedEncoder(FakeEncoder):
    """Reads the prompt in front of the query."""

    fingerprint = "prompted"

    def encode(self, texts, prompts):
        return super().encode([f"{p or ''} {t}" for p, t in zip(prompts or texts, texts, strict=True)], None)


def test_another_prompt_of_a_row_makes_vectors_anew(tmp_path, capsys, monkeypatch, encoder):
    rows, out = write_rows(tmp_path / "rows.jsonl", 8), tmp_path / "out.jsonl"
    lines = records(rows)

    def mined(prompt: str | None, out: Path) -> bytes:
        first = lines[0] | ({} if prompt is None else {"prompt": prompt})
        rows.write_text("".join(json.dumps(line) + "\n" for line in [first, *lines[1:]]))
        prompted = PromptedEncoder()
        monkeypatch.setattr(mine, "encoder_loader", lambda name, **_: lambda: prompted)
        assert run(capsys, rows, "-o", out, "--rule", "none", "--negatives", "2")[0] == 0
        return out.read_bytes()

    for number, prompt in enumerate(["w1 w2 w3", "w40 w41 w42", None]):
        assert mined(prompt, out) == mined(prompt, tmp_path / f"{number}.jsonl")


def test_vectors_of_a_query_with_two_prompts_are_refused_before_any_work(encoder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    lines = [{"query": f"q{i % 2}", "pos": [f"d{i}"]} for i in range(4)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[1] | {"prompt": "find"}]))
    words = [rows, "-o", tmp_path / "out.jsonl", "--rule", "none"]
    status, _, error = run(capsys, *words, "--vectors", tmp_path / "t")
    assert status == 1 and "the query 'q1' stands in rows with different prompts" in error, error
    assert encoder.calls == 0 and error.count("\n") == 1
    assert run(capsys, *words)[0] == 0


def test_an_interrupted_run_goes_on(encoder, rows, tmp_path, capsys, ctrl_c):
    assert run(capsys, rows, "-o", tmp_path / "whole.jsonl")[0] == 0
    out, calls = tmp_path / "out.jsonl", encoder.calls
    encoder.calls, encoder.die_at = 0, 3
    status, _, error = run(capsys, rows, "-o", out)
    assert status == 130 and "16 of 30 rows are in" in error and not out.exists(), error
    encoder.calls, encoder.die_at = 0, None
    assert run(capsys, rows, "-o", out)[0] == 0
    assert encoder.calls == calls - 2 and out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def kill_and_resume(rows: Path, out: Path, capsys, encoder: FakeEncoder, kills: list[int]) -> int:
    """Runs that are killed at these calls of the encoder, then one to its end. Returns how many were."""
    killed = 0
    for die_at in kills:
        child = os.fork()
        if child == 0:
            encoder.calls, encoder.die_at, encoder.by = 0, die_at, signal.SIGKILL
            os._exit(run(capsys, rows, "-o", out)[0])
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert run(capsys, rows, "-o", out)[0] == 0
    return killed


def test_a_killed_run_goes_on_to_the_same_file(encoder, rows, tmp_path, capsys):
    assert run(capsys, rows, "-o", tmp_path / "whole.jsonl")[0] == 0
    assert kill_and_resume(rows, tmp_path / "out.jsonl", capsys, encoder, [3, 6]) == 2
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.long
def test_many_kills_at_any_moment_lead_to_the_same_file(encoder, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", 4000)
    mine._CHUNK = mine._TEXTS = 64
    assert run(capsys, rows, "-o", tmp_path / "whole.jsonl")[0] == 0
    out, draw, killed = tmp_path / "out.jsonl", np.random.default_rng(0), 0
    for _ in range(25):
        child = os.fork()
        if child == 0:
            os._exit(run(capsys, rows, "-o", out)[0])
        import time

        time.sleep(draw.uniform(0.02, 1.0))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert run(capsys, rows, "-o", out)[0] == 0 and killed > 5
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_judge_makes_a_suspect_a_positive(encoder, tmp_path, capsys):
    lines = [
        {"query": "a b c d", "pos": ["a b x y"]},
        {"query": "e f", "pos": ["a b c z"]},
        {"query": "g", "pos": ["g h"]},
    ]
    rows, out, suspects = (tmp_path / f"{name}.jsonl" for name in ("rows", "out", "suspects"))
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(capsys, rows, "-o", out, "--suspects", suspects)[0] == 0
    found = {(line["query"], line["candidate"]): line for line in records(suspects)}
    line = found["a b c d", "a b c z"]
    assert (
        line["positive"] == "a b x y"
        and line["score"] > line["positive_score"]
        and line["is_positive"] is None
    )
    calls = encoder.calls
    judged = tmp_path / "judged.jsonl"
    judged.write_text(
        "".join(json.dumps(one | {"is_positive": one is line}) + "\n" for one in found.values())
    )
    assert run(capsys, rows, "-o", out, "--judged", judged, "--rule", "none")[0] == 0
    first = records(out)[0]
    assert first["pos"] == ["a b x y", "a b c z"] and "a b c z" not in first["neg"]
    assert len(first["pos_scores"]) == 2 and first["pos_scores"][1] == line["score"]
    assert records(out)[1]["pos"] == ["a b c z"] and encoder.calls == calls
    again = tmp_path / "again.jsonl"
    assert run(capsys, out, "-o", again, "--judged", judged, "--rule", "none")[0] == 0
    assert again.read_bytes() == out.read_bytes()


def test_a_row_gets_the_judged_positives_that_it_has_not():
    rows = [Entry("q", ("a", "a")), Entry("q", ("b",)), Entry("o", ("c",))]
    texts = Texts([Planted(rows)], judged={text_id("q"): ["a", "d"]})
    assert [texts.row(row)[2].documents for row in range(3)] == [("a", "a", "d"), ("b", "a", "d"), ("c",)]
    for row in range(3):
        assert tuple(map(texts.document, texts.positives_of(row))) == texts.row(row)[2].documents


def test_a_judged_candidate_that_no_file_holds_is_told_before_any_work(encoder, rows, tmp_path, capsys):
    judged = tmp_path / "judged.jsonl"
    judged.write_text('{"query": "q", "candidate": "cut \\ud83d", "is_positive": true}\n')
    status, _, error = run(capsys, rows, "-o", tmp_path / "out.jsonl", "--judged", judged)
    assert status == 1 and encoder.calls == 0
    assert f"{judged}, line 1: 'candidate' has a lone surrogate" in error, error


def test_verdicts_are_not_replaced(encoder, rows, tmp_path, capsys, monkeypatch):
    suspects, words = tmp_path / "s.jsonl", [rows, "-o", tmp_path / "out.jsonl"]
    assert run(capsys, *words, "--suspects", suspects)[0] == 0
    assert run(capsys, *words, "--suspects", suspects)[0] == 0  # nobody has judged it
    found = records(suspects)
    status, _, error = run(capsys, *words, "--suspects", suspects, "--judged", suspects)
    assert status == 1 and f"--suspects would replace {suspects}, which is read" in error
    found[2]["is_positive"] = False
    judged = "".join(json.dumps(line) + "\n" for line in found)
    for content in (judged, judged[:-5]):
        suspects.write_text(content)
        status, _, error = run(capsys, *words, "--suspects", suspects)
        assert status == 1 and f"--suspects would replace {suspects}" in error, error
        assert "line 3 has a verdict" in error and suspects.read_text() == content
    suspects.write_text("no line of suspects\n")
    status, _, error = run(capsys, *words, "--suspects", suspects)
    assert status == 1 and f"--suspects would replace {suspects}, whose line 1 is no suspect" in error
    suspects.write_text(judged.replace("false", "null"))
    # judged while the run was at work
    encode = encoder.encode
    encoder.encode = lambda texts, prompts: suspects.write_text(judged) and encode(texts, prompts)
    words[2] = tmp_path / "other.jsonl"
    status, _, error = run(capsys, *words, "--suspects", suspects)
    assert status == 1 and "line 3 has a verdict" in error and suspects.read_text() == judged
    # judged while the rows were written
    encoder.encode = encode
    suspects.write_text(judged.replace("false", "null"))
    write_suspects = mine._write_suspects
    monkeypatch.setattr(
        mine, "_write_suspects", lambda *words: suspects.write_text(judged) and write_suspects(*words)
    )
    status, _, error = run(capsys, *words, "--suspects", suspects)
    assert status == 1 and "line 3 has a verdict" in error and suspects.read_text() == judged
    assert not words[2].exists()


def test_a_corpus_gives_the_candidates(encoder, rows, tmp_path, capsys):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        '{"text": "w1 w2"}\n{"text": ""}\n"w3 w4"\n{"text": "w1 w2"}\n{"pos": ["w5", "w6 w7"]}\n{}\n'
        '{"text": "cut \\ud83d"}\n"cut \\ud83d"\n'
    )
    status, _, error = run(capsys, rows, "-o", tmp_path / "out.jsonl", "--corpus", corpus, "--rule", "none")
    assert status == 0
    assert {text for row in records(tmp_path / "out.jsonl") for text in row["neg"]} == {
        "w1 w2",
        "w3 w4",
        "w5",
        "w6 w7",
    }
    assert f"1 skipped, first {corpus}, line 2: the text is empty" in error
    assert f"1 skipped, first {corpus}, line 6: no 'text' and no 'pos' with texts" in error
    assert f"2 skipped, first {corpus}, line 7: a text has a lone surrogate, \\ud83d" in error


def test_a_corpus_without_a_document_is_told_before_any_work(encoder, rows, tmp_path, capsys):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": " "}\n{"title": "a"}\n')
    status, _, error = run(capsys, rows, "-o", tmp_path / "out.jsonl", "--corpus", corpus)
    assert status == 1 and encoder.calls == 0
    assert f"no document of the corpus can be used: {corpus}, line 1: the text is empty" in error, error


def test_a_part_of_the_rows_is_mined_as_a_file_of_them(encoder, rows, tmp_path, capsys):
    lines = rows.read_text().splitlines(keepends=True)
    part = tmp_path / "part.jsonl"
    part.write_text("".join(lines[i] for i in (0, 4, 8, 12, 17, 21, 25)))
    outputs = [tmp_path / "out.jsonl", tmp_path / "of-part.jsonl"]
    for file, output, words in ((rows, outputs[0], ("--rows", 7)), (part, outputs[1], ("--rows", 99))):
        status, printed, _ = run(capsys, file, "-o", output, *words)
        assert status == 0 and ": 7 rows," in printed
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    lines[4] = '{"query": "q", "pos": []}\n'
    rows.write_text("".join(lines))
    _, printed, error = run(capsys, rows, "-o", outputs[0], "--rows", 7)
    assert ": 6 rows," in printed and f"1 skipped, first {rows}, line 5: 'pos' is empty" in error


def test_a_key_that_is_not_mined_keeps_half_a_character(encoder, rows, tmp_path, capsys):
    with open(rows, "a") as file:
        file.write('{"query": "w1", "pos": ["\u00e9"], "title": "cut \\ud83d"}\n')
    assert run(capsys, rows, "-o", tmp_path / "out.jsonl")[0] == 0
    found = records(tmp_path / "out.jsonl")[-1]
    assert found["title"] == "cut \ud83d" and found["pos"] == ["\u00e9"] and found["neg"]
    assert open_rows(tmp_path / "out.jsonl").row(30).negatives == tuple(found["neg"])


def test_rows_that_cannot_be_mined_are_counted(encoder, rows, tmp_path, capsys):
    bad = [
        {"query": "q", "pos": []},
        {"query": "q"},
        {"query": " ", "pos": ["d"]},
        {"query": "q", "pos": ["q"]},
    ]
    bad += [{"text": "t", "label": "l"}, {"query": "q", "pos": []}]
    with open(rows, "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in bad))
    status, printed, error = run(capsys, rows, "-o", tmp_path / "out.jsonl")
    assert status == 0 and ": 30 rows," in printed
    assert f"2 skipped, first {rows}, line 31: 'pos' is empty" in error
    assert f"1 skipped, first {rows}, line 34: the only positive equals the query" in error
    assert f"1 skipped, first {rows}, line 35: no 'query', the row has a label" in error


@pytest.mark.parametrize("value", ["NaN", "[1, -Infinity]"])
def test_numbers_that_are_no_json_are_told_before_any_work(value, encoder, rows, tmp_path, capsys):
    with open(rows, "a") as file:
        file.write(f'{{"query": "q", "pos": ["d"], "quality": {value}}}\n')
    status, _, error = run(capsys, rows, "-o", tmp_path / "out.jsonl")
    assert encoder.calls == 0 and status == 1
    assert f"{rows}, line 31: 'quality' cannot be written as JSON lines (" in error
    assert not (tmp_path / "out.jsonl").exists()


def test_a_prompt_without_room_for_its_query_is_counted_before_any_work(
    rows, tiny_directory, tmp_path, capsys, monkeypatch
):
    long = " ".join(f"w{i}" for i in range(60))
    bad = [{"query": "q", "pos": ["d"], "prompt": prompt} for prompt in ("find", long, f"Instruct: {long}")]
    with open(rows, "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in bad))
    words = ["mine", str(rows), "-o", str(tmp_path / "out.jsonl"), "--teacher", str(tiny_directory)]
    words += ["--device", "cpu", "--max-length", "32"]
    assert cli.main(words) == 0
    shown = capsys.readouterr()
    assert ": 31 rows," in shown.out and len(records(tmp_path / "out.jsonl")) == 31
    reason = "'prompt' takes all 32 tokens of --max-length, so that nothing of the query is left"
    assert f"2 skipped, first {rows}, line 32: {reason}" in shown.err
    monkeypatch.setattr(NVEmbed, "encode", lambda *_, **__: pytest.fail("texts are encoded"))
    assert cli.main([*words, "--symmetric", "--task", long]) == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(": --task takes all 32 tokens of --max-length, so that nothing of the query is left")
    )
    rows.write_text(json.dumps(bad[1]) + "\n")
    assert cli.main(words) == 1
    assert f"no row can be mined: {rows}, line 1: {reason}" in capsys.readouterr().err


def test_a_model_of_this_package_without_instructions_is_told(rows, tiny_directory, tmp_path, capsys):
    lines = records(rows)
    lines[0]["prompt"] = "find"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["mine", str(rows), "-o", str(tmp_path / "out.jsonl"), "--teacher", str(tiny_directory)]
    note = f"note: {len(lines) - 1} of {len(lines)} queries have no instruction"
    for task, told in (("", True), ("find", False)):
        assert cli.main([*words, "--device", "cpu", "--task", task]) == 0
        assert (note in capsys.readouterr().err) is told, task


def test_huge_and_duplicate_texts_are_mined_once(encoder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    lines = [{"query": f"q{i}", "pos": ["w " * 2**20 if i == 0 else f"w{i % 3}"]} for i in range(9)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = []
    encode = encoder.encode
    encoder.encode = lambda texts, prompts: seen.extend(texts) or encode(texts, prompts)
    assert run(capsys, rows, "-o", tmp_path / "out.jsonl", "--rule", "none", "--max-length", "16")[0] == 0
    assert max(map(len, seen)) == 16 * 64 and len(seen) == 9 + 4
    assert all(len({*row["neg"]}) == len(row["neg"]) == 3 for row in records(tmp_path / "out.jsonl"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--corpus", "absent.jsonl"], "absent.jsonl is no file"),
        (["--rule", "best"], "no rule 'best'"),
        (["--range", "5:6"], "a range from 5 to 6 has no room for 7 negatives"),
        (["--random"], "a random choice needs the end of its range"),
        (["--random", "--range", "0:9", "--seed", str(2**63)], "a seed must be a number from 0 to 2**63 - 1"),
        (
            ["--random", "--range", "0:9", "--seed", "-1"],
            "a seed must be a number from 0 to 2**63 - 1, got -1",
        ),
        (["--judged", "rows"], 'must have "query" and "candidate"'),
        (["-o", "rows"], "--output would replace"),
        (["-o", "."], "--output is a folder, and a file is wanted: ."),
        (["--suspects", ".."], "--suspects is a folder"),
    ],
)
def test_bad_input_is_one_line(encoder, rows, tmp_path, capsys, change, message):
    change = [str(rows) if word == "rows" else word for word in change]
    before = rows.read_bytes()
    status, _, error = run(capsys, rows, "-o", tmp_path / "out.jsonl", *change)
    assert encoder.calls == 0 and status == 1 and message in error and error.count("\n") == 1, error
    assert rows.read_bytes() == before and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "arguments", [["--range", "10"], ["--range", "-1:4"], ["--negatives", "0"], ["--dtype", "x"]]
)
def test_wrong_arguments_have_the_status_2(rows, tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        run(capsys, rows, "-o", tmp_path / "out.jsonl", *arguments)
    assert stop.value.code == 2


def test_a_missing_teacher_is_told_before_any_work(rows, tmp_path, capsys):
    status = cli.main(["mine", str(rows), "-o", str(tmp_path / "out.jsonl"), "--teacher", "./absent"])
    error = capsys.readouterr().err
    assert status == 1 and "no directory './absent', and no hub id either" in error
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_memory_of_a_text_does_not_depend_on_its_length():
    class Long(Planted):
        def entry(self, index: int) -> Entry:
            return Entry(f"q{index}", (f"{index} " * 1000,))

    peaks = []
    for count in (1000, 5000):
        tracemalloc.start()
        texts = Texts([Long([Entry("", ())] * count)])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(texts.document_ids) == count
    assert (peaks[1] - peaks[0]) / 4000 < 400, peaks


_MEASURED = """
import sys
sys.path[:0] = ["tests"]
from pathlib import Path
import numpy as np
import test_mining
from nvembed_fast import cli
from nvembed_fast.cli import mine

peak = 0
def resident():
    global peak
    with open("/proc/self/status") as status:
        peak = max(peak, *(int(line.split()[1]) for line in status if line.startswith("RssAnon")))

class Wide(test_mining.FakeEncoder):
    width = 256
    def encode(self, texts, prompts):
        resident()
        seeds = np.array([test_mining.text_id(text) % 2**31 for text in texts])
        found = np.sin(seeds[:, None] * np.arange(1, 257)[None]).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

count, folder = int(sys.argv[1]), Path(sys.argv[2])
rows, corpus = folder / "rows.jsonl", folder / "corpus.jsonl"
with open(rows, "w") as file:
    for i in range(1000):
        file.write('{"query": "query %d", "pos": ["positive %d"]}\\n' % (i, i))
with open(corpus, "w") as file:
    for i in range(count):
        file.write('{"text": "document %d %s"}\\n' % (i, "and more " * 40))
mine.encoder_loader = lambda name, **_: lambda: Wide()
from nvembed_fast.curation import mining
inner = mining.choose
def watched(*arguments):
    found = inner(*arguments)
    resident()
    return found
mining.choose = watched
output = str(folder / "out.jsonl")
words = ["mine", str(rows), "-o", output, "--corpus", str(corpus), "--teacher", "fake", "--device", "cpu"]
assert cli.main(words) == 0
resident()
print(peak)
"""


@pytest.mark.long
def test_memory_is_flat_from_10_k_to_100_k_documents(tmp_path):
    peaks = []
    for count in (10_000, 100_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        command = [sys.executable, "-c", _MEASURED, str(count), str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    # the vectors of 90,000 more documents have 92 MB, and their texts 34
    assert peaks[1] - peaks[0] < 45, f"MB: {peaks}"
