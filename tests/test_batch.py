"""A batch: what a row gives, who is a candidate of whom, ranks, and the thread that makes the next one."""

import collections
import json
import threading
import time
from contextlib import closing, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_checkpoint import TINY
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode

from nvembed_fast.checkpoint import load_model
from nvembed_fast.packing import PackedBatch
from nvembed_fast.texts import text_id
from nvembed_fast.tokenization import TextTokenizer
from nvembed_fast.training import batch as module
from nvembed_fast.training.batch import BatchBuilder, Batches, DataSet, open_sets
from nvembed_fast.training.recipe import DataPart
from nvembed_fast.training.rows import open_rows

WORDS = [
    "<unk>",
    "</s>",
    "Instruct",
    ":",
    "Query",
    "find",
    "it",
    *(f"{c}{i}" for c in "qpnt" for i in range(99)),
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    return TextTokenizer(backend, "</s>", pooling_start="text_offset")


def data_set(path, records, name="a", **settings) -> DataSet:
    file = path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataSet(name, open_rows(file), DataPart(str(file), **settings))


def pairs(number=20, start=0, num_negatives=3) -> list[dict]:
    return [
        {"query": f"q{i}", "pos": [f"p{i}"], "neg": [f"n{(i + j) % 99}" for j in range(num_negatives)]}
        for i in range(start, start + number)
    ]


def words_of(batch) -> list[str]:
    """The texts of a batch, without the end mark."""
    return [" ".join(WORDS[i] for i in ids[:-1]) for ids in batch.texts.ids]


def parts_of(batch) -> list[tuple[str, list[str], list[str]]]:
    """(query, positives, own negatives) of each row."""
    words, candidates = words_of(batch), batch.candidates
    documents = words[batch.num_queries :]
    privates = candidates.column_scopes[:, 1]
    own = {}
    for row, column in candidates.positives.tolist():
        private = privates[column]
        mine = (privates == private).nonzero()[:, 0].tolist()
        own.setdefault(row, ([], mine))[0].append(column)
    return [
        (words[row], [documents[c] for c in columns], [documents[c] for c in mine if c not in columns])
        for row, (columns, mine) in own.items()
    ]


def are_keys(candidates, row) -> torch.Tensor:
    """[M] whether a column shares a key with a row."""
    keys = candidates.row_keys[row]
    return torch.isin(candidates.column_keys, keys[keys != 0]).any(1)


def asked(data: DataSet, query: str, prompt: str | None = None) -> int:
    """The key of a query with its instruction."""
    return text_id("\0".join((data.instruction(prompt), query)))


def negatives_of(batch) -> list[set[str]]:
    """The documents that the loss takes as negatives of each row."""
    c, documents = batch.candidates, words_of(batch)[batch.num_queries :]
    kept = [(c.column_scopes == scope).any(1) & ~are_keys(c, row) for row, scope in enumerate(c.row_scopes)]
    return [{text for text, is_kept in zip(documents, row, strict=True) if is_kept} for row in kept]


def losses(batch) -> list[float]:
    """The loss of each row in float64, by the definition, on vectors that follow from the tokens."""
    vectors = []
    for ids in batch.texts.ids:
        vector = np.random.default_rng(ids.astype(np.uint64)).normal(size=8)
        vectors.append(vector / np.linalg.norm(vector))
    scores = np.stack(vectors[: batch.num_queries]) @ np.stack(vectors[batch.num_queries :]).T / 0.1
    candidates, found = batch.candidates, []
    for row, scope in enumerate(candidates.row_scopes):
        is_candidate = (candidates.column_scopes == scope).any(1)
        is_key = are_keys(candidates, row)
        z = np.log(np.exp(scores[row][(is_candidate & ~is_key).numpy()]).sum())
        columns = [column for r, column in candidates.positives.tolist() if r == row]
        found.append(np.mean([np.logaddexp(0, z - scores[row, column]) for column in columns]))
    return found


def test_a_row_gives_its_query_a_positive_and_some_negatives(tmp_path, tokenizer):
    records = [
        {"query": f"q{i}", "pos": [f"p{i}", f"p{i + 30}"], "neg": [f"n{i}", f"n{i + 30}", f"n{i + 60}"]}
        for i in range(8)
    ]
    data = data_set(tmp_path, records, instruction="find it", hard_negatives=2)
    builder = BatchBuilder([data], tokenizer, max_length=16, seed=3)
    seen = set()
    for step in range(8):
        batch = builder.build(step, [("a", i) for i in (3, 0, 7)])
        assert batch.num_queries == 3 and batch.rows == [("a", 3), ("a", 0), ("a", 7)]
        assert not batch.has_own_candidates_only
        for (query, positives, negatives), i in zip(parts_of(batch), (3, 0, 7), strict=True):
            assert query == f"Instruct : find it Query : q{i}"
            assert len(positives) == 1 and positives[0] in records[i]["pos"]
            assert len(set(negatives)) == 2 and set(negatives) <= set(records[i]["neg"])
            seen |= {(i, *positives, *negatives)}
        keys = batch.candidates.row_keys
        # also those that were not drawn
        assert [set(row.tolist()) for row in keys] == [
            {*map(text_id, (f"q{i}", f"p{i}", f"p{i + 30}")), asked(data, f"q{i}")} for i in (3, 0, 7)
        ]
        firsts = batch.texts.first_pooled
        assert firsts[:3] == [6] * 3 and set(firsts[3:]) == {0}
        batch.candidates.check(3, 9)
        again = BatchBuilder([data], tokenizer, max_length=16, seed=3).build(step, batch.rows)
        assert words_of(again) == words_of(batch)
    assert len(seen) > 15  # of 36: the steps draw anew


def test_several_positives_and_fewer_negatives_than_asked_for(tmp_path, tokenizer):
    records = [
        {"query": "q1", "pos": ["p1", "p2", "p3"], "neg": ["n1"]},
        {"query": "q2", "pos": "p4"},
    ]
    data = data_set(tmp_path, records, positives=2, hard_negatives=4)
    batch = BatchBuilder([data], tokenizer, max_length=9, seed=0).build(0, [("a", 0), ("a", 1)])
    (_, positives, negatives), (query, lonely, nothing) = parts_of(batch)
    assert len(positives) == 2 and set(positives) < {"p1", "p2", "p3"} and negatives == ["n1"]
    assert (query, lonely, nothing) == ("q2", ["p4"], [])
    assert batch.candidates.positives.tolist() == [[0, 0], [0, 1], [1, 3]]
    keys = [text_id("q2"), text_id("p4"), asked(data, "q2")]
    assert batch.candidates.row_keys[1].tolist() == [*keys, 0, 0]
    batch.candidates.check(2, 4)


def test_symmetric_texts_carry_the_instruction_on_both_sides(tmp_path, tokenizer):
    data = data_set(tmp_path, pairs(), instruction="Instruct: it :", symmetric=True, hard_negatives=1)
    batch = BatchBuilder([data], tokenizer, max_length=9, seed=0).build(0, [("a", 0)])
    assert words_of(batch)[:2] == ["Instruct : it : q0", "Instruct : it : p0"]
    assert batch.texts.first_pooled == [4, 4, 4]
    # the text alone makes the key
    assert batch.candidates.column_keys[0, 0] == text_id("p0")


def test_a_row_may_have_a_task_of_its_own(tmp_path, tokenizer):
    records = pairs(3)
    records[1]["prompt"], records[2]["prompt"] = "find", ""
    data = data_set(tmp_path, records, instruction="it", symmetric=True, hard_negatives=0)
    batch = BatchBuilder([data], tokenizer, max_length=9, seed=0).build(0, [("a", i) for i in range(3)])
    fronts = ["Instruct : it Query : ", "Instruct : find Query : ", ""]
    words = [f"{front}{c}{i}" for c in "qp" for i, front in enumerate(fronts)]
    assert words_of(batch) == words and batch.texts.first_pooled == [5, 5, 0] * 2


def test_scopes_follow_the_switches(tmp_path, tokenizer):
    sets = [
        data_set(tmp_path, pairs(), "all"),
        data_set(tmp_path, pairs(), "apart", separate=True),
        data_set(tmp_path, pairs(), "own", in_batch=False),
    ]
    builder = BatchBuilder(sets, tokenizer, max_length=9, seed=0)
    batch = builder.build(0, [("all", 0), ("apart", 1), ("own", 2), ("all", 3)])
    private = 2**32
    assert batch.candidates.row_scopes.tolist() == [0, 2, private + 2, 0]
    rows = batch.candidates.column_scopes.view(4, 4, 2)
    assert (rows == rows[:, :1]).all()
    assert rows[:, 0].tolist() == [[0, private], [2, private + 1], [-2, private + 2], [0, private + 3]]
    assert not batch.has_own_candidates_only
    assert builder.build(0, [("own", 0), ("own", 1)]).has_own_candidates_only
    # what decides is the whole step, or ranks would take different ways
    part = builder.build(0, [("own", 0), ("all", 1)], rank=0, num_ranks=2)
    assert part.rows == [("own", 0)] and not part.has_own_candidates_only


def test_a_mixed_batch_equals_its_parts(tmp_path, tokenizer):
    sets = [
        data_set(tmp_path, pairs(), "all", instruction="find it"),
        data_set(tmp_path, pairs(start=20), "also"),
        data_set(tmp_path, pairs(start=40), "apart", separate=True, symmetric=True, instruction="it"),
        data_set(tmp_path, pairs(start=60), "own", in_batch=False),
    ]
    builder = BatchBuilder(sets, tokenizer, max_length=12, seed=0)
    rows = [(("all", "own", "apart", "also")[i % 4], i) for i in range(12)]
    mixed = dict(zip(rows, losses(builder.build(0, rows)), strict=True))
    assert len(set(mixed.values())) == 12 and min(mixed.values()) > 0
    alone = {}
    for members in (("all", "also"), ("apart",), *((row,) for row in rows if row[0] == "own")):
        part = [row for row in rows if row[0] in members or row in members]
        alone |= dict(zip(part, losses(builder.build(0, part)), strict=True))
    for row in rows:
        assert abs(mixed[row] - alone[row]) < 1e-12, row
    # the parts differ from a batch in which everybody sees everybody
    everybody = [replace(s, settings=replace(s.settings, separate=False, in_batch=True)) for s in sets]
    other = losses(BatchBuilder(everybody, tokenizer, max_length=12, seed=0).build(0, rows))
    assert all(abs(a - b) > 1e-3 for a, b in zip(other, mixed.values(), strict=True))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_split_the_same_batch(num_ranks, tmp_path, tokenizer):
    parts = [
        data_set(tmp_path, pairs(30, num_negatives=9), "a", hard_negatives=2).settings,
        data_set(tmp_path, pairs(30), "b", in_batch=False).settings,
    ]

    def run(**ranks):
        made = Batches(open_sets(parts), tokenizer, batch=8, seed=0, max_length=9, **ranks)
        return list(made.ahead(0, 5, made.start()))

    ranks = [run(rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for (step, batch, after), *found in zip(run(), *ranks, strict=True):
        assert all((s, a) == (step, after) for s, _, a in found)
        assert sum((parts_of(part) for _, part, _ in found), []) == parts_of(batch)
        assert sum((part.rows for _, part, _ in found), []) == batch.rows
        for name in ("row_scopes", "column_scopes", "column_keys"):
            joined = torch.cat([getattr(part.candidates, name) for _, part, _ in found])
            assert torch.equal(joined, getattr(batch.candidates, name))


CLASSES = [{"text": f"t{i}", "label": ("n1", "n2", 3)[i % 3]} for i in range(12)]


def test_examples_stand_for_a_class(tmp_path, tokenizer):
    data = data_set(tmp_path, CLASSES, labels="examples", hard_negatives=3, positives=2)
    builder = BatchBuilder([data], tokenizer, max_length=9, seed=0)
    seen = set()
    for step in range(20):
        batch = builder.build(step, [("a", i) for i in range(12)])
        batch.candidates.check(12, 60)
        for i, (query, positives, negatives) in enumerate(parts_of(batch)):
            numbers = [int(text[1:]) for text in positives], [int(text[1:]) for text in negatives]
            assert query == f"t{i}" and all(n % 3 == i % 3 and n != i for n in numbers[0])
            assert all(n % 3 != i % 3 for n in numbers[1])
            assert (len(set(positives)), len(set(negatives))) == (2, 3)
            seen |= {(i, n) for n in numbers[0] + numbers[1]}
        # in the batch no text of the own class is a negative
        candidates = batch.candidates
        for i in range(12):
            documents = words_of(batch)[12:]
            assert are_keys(candidates, i).tolist() == [int(text[1:]) % 3 == i % 3 for text in documents]
    assert len(seen) == 12 * 11


@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize("in_batch", [False, True])
def test_texts_of_several_labels_are_no_negatives_of_themselves(in_batch, is_symmetric, tmp_path, tokenizer):
    records = [{"text": f"t{i % 20}", "label": "ab"[i // 20]} for i in range(40)]
    settings = {"in_batch": in_batch, "symmetric": is_symmetric, "hard_negatives": 3, "positives": 2}
    data = data_set(tmp_path, records, labels="examples", **settings)
    builder, num_met = BatchBuilder([data], tokenizer, max_length=9, seed=0), 0
    for step in range(9):
        batch = builder.build(step, [("a", i) for i in range(40)])
        batch.candidates.check(40, 200)
        for (query, positives, own), negatives in zip(parts_of(batch), negatives_of(batch), strict=True):
            assert len(own) == 3 and not {query, *positives} & {*own}
            assert {*own} <= negatives and not {query, *positives} & negatives
            num_met += len(negatives) > 3
    assert (num_met > 0) == in_batch


def test_labelled_texts_and_pairs_know_each_others_texts(tmp_path, tokenizer):
    labelled = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(4)]
    sets = [
        data_set(tmp_path, labelled, labels="examples", hard_negatives=1),
        data_set(tmp_path, [{"query": "t0", "pos": "p1"}, {"query": "q1", "pos": "t2"}], "b"),
    ]
    rows = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    batch = BatchBuilder(sets, tokenizer, max_length=9, seed=0).build(0, rows)
    assert [row[:2] for row in parts_of(batch)] == [
        ("t0", ["t2"]),
        ("t1", ["t3"]),
        ("t0", ["p1"]),
        ("q1", ["t2"]),
    ]
    own = [negatives for _, _, (*negatives,) in parts_of(batch)[:2]]
    others = {*own[0], *own[1]} - {"t0", "t2"}
    # t0 and t2 are of one class, and the two rows of t0 share their positives
    assert negatives_of(batch)[0] == {"t3", *others}
    assert negatives_of(batch)[2:] == [
        {"t3", *own[0], *own[1]} - {"t0"},
        {"t3", "p1", *own[0], *own[1]} - {"t2"},
    ]


def test_positives_of_a_query_are_no_negatives_of_its_other_rows(tmp_path, tokenizer):
    records = [{"query": "q1", "pos": f"p{i}", "neg": f"n{i}"} for i in range(4)]
    records += [{"query": "q2", "pos": "p9"}]
    for num_ranks in (1, 2):
        batches = [
            BatchBuilder([data_set(tmp_path, records)], tokenizer, max_length=9, seed=0).build(
                0, [("a", i) for i in range(5)], rank, num_ranks
            )
            for rank in range(num_ranks)
        ]
        queries = [row for batch in batches for row in batch.candidates.row_keys.tolist()]
        columns = [keys for batch in batches for keys in batch.candidates.column_keys.tolist()]
        masked = [[bool({*keys} & {*row} - {0}) for keys in columns] for row in queries]
        # p0 n0 p1 n1 p2 n2 p3 n3 p9: a negative of one row stays one for the others
        assert masked == [[True, False] * 4 + [False]] * 4 + [[False] * 8 + [True]]
        for batch in batches:
            batch.candidates.check(batch.num_queries, len(batch.texts.ids) - batch.num_queries)


def test_another_task_makes_another_query(tmp_path, tokenizer):
    """Which document answers depends on the task, so the other one's is a negative."""
    records = [{"query": "q1", "pos": f"p{i}", "prompt": f"t{i}"} for i in range(2)]
    batch = BatchBuilder([data_set(tmp_path, records)], tokenizer, max_length=32, seed=0).build(
        0, [("a", 0), ("a", 1)]
    )
    assert negatives_of(batch) == [{"p1"}, {"p0"}]


def test_label_texts_are_documents(tmp_path, tokenizer):
    data = data_set(tmp_path, CLASSES, labels="texts", hard_negatives=1)
    builder = BatchBuilder([data], tokenizer, max_length=9, seed=0)
    seen = set()
    for step in range(9):
        batch = builder.build(step, [("a", 0), ("a", 3), ("a", 1)])
        rows = parts_of(batch)
        assert [row[:2] for row in rows] == [("t0", ["n1"]), ("t3", ["n1"]), ("t1", ["n2"])]
        seen |= {negative for _, _, negatives in rows[:1] for negative in negatives}
        assert batch.candidates.column_keys[0, 0] == text_id("n1")
    assert seen == {"n2", "<unk>"}


def test_classes_that_teach_nothing(tmp_path, tokenizer):
    def build(records, labels="examples"):
        data = data_set(tmp_path, records, labels=labels)
        return BatchBuilder([data], tokenizer, max_length=9, seed=0)

    with pytest.raises(ValueError, match=r"a\.jsonl: all rows have one label"):
        build([{"text": "t1", "label": "x"}] * 3)
    lonely = [*CLASSES, {"text": "t50", "label": "new"}]
    same = [{"text": "t1", "label": "x"}] * 3 + [{"text": f"t{i}", "label": "y"} for i in (2, 3)]
    for records, line, label in ((lonely, 13, "new"), (same, 1, "x")):
        with pytest.raises(ValueError, match=f"line {line}: no other text has the label '{label}'"):
            build(records).check({})
        build(records, "texts").check({})
    build(CLASSES).check({})
    # a run that was begun goes on up to such a row
    assert build(same).build(0, [("a", 3)])
    with pytest.raises(ValueError, match="line 2: no other text has the label 'x'"):
        build(same).build(0, [("a", 1)])
    with pytest.raises(ValueError, match="line 1: no 'text'"):
        build(pairs())


@pytest.mark.parametrize("place", [0, 250, 499])
def test_an_example_is_found_among_many_of_the_same_text(place, tmp_path, tokenizer):
    records = [{"text": "t1", "label": "x"} for _ in range(500)] + [{"text": "t3", "label": "y"}] * 2
    records[place] = {"text": "t2", "label": "x"}
    data = data_set(tmp_path, records, labels="examples", hard_negatives=1)
    builder = BatchBuilder([data], tokenizer, max_length=9, seed=0)
    for index in range(7, 500, 40):
        ((query, positives, _),) = parts_of(builder.build(0, [("a", index)]))
        assert (query, positives) == ("t1", ["t2"]), "no positive that differs was drawn"
    assert parts_of(builder.build(0, [("a", place)]))[0][:2] == ("t2", ["t1"])


def test_each_instruction_is_tokenized_once_before_the_first_step(tmp_path, tokenizer):
    records = pairs()
    for index, prompt in ((3, "find"), (5, "find it it it"), (6, "find"), (7, "find it it it")):
        records[index]["prompt"] = prompt
    instructions = data_set(tmp_path, records, instruction="it").check()
    file = tmp_path / "a.jsonl"
    wanted = [f"Instruct: {task}\nQuery: " for task in ("it", "find", "find it it it")]
    assert instructions == {w: f"{file}, line {n}" for w, n in zip(wanted, (1, 4, 6), strict=True)}
    labelled = data_set(tmp_path, CLASSES, "b", labels="texts", instruction="it").check()
    assert labelled == {wanted[0]: f"{tmp_path / 'b.jsonl'}, line 1"}
    for max_length, is_right in ((9, True), (8, False)):  # "Instruct : find it it it Query :" and a text
        builder = BatchBuilder([], tokenizer, max_length=max_length, seed=0)
        with (
            nullcontext()
            if is_right
            else pytest.raises(ValueError, match="line 6: the instruction uses up all 8")
        ):
            builder.check(instructions)


def test_what_a_builder_refuses(tmp_path, tokenizer):
    data = data_set(tmp_path, pairs(), instruction="find it")
    with pytest.raises(ValueError, match="two data sets have one name: a, a"):
        BatchBuilder([data, data], tokenizer, max_length=9, seed=0)
    builder = BatchBuilder([data], tokenizer, max_length=6, seed=0)
    with pytest.raises(ValueError, match=r"line 3: the instruction uses up all 6 tokens of max_length"):
        builder.build(0, [("a", 2)])
    with pytest.raises(ValueError, match=r"b: without negatives .* nothing to learn from"):
        data_set(tmp_path, pairs(), "b", in_batch=False, hard_negatives=0)


def test_data_sets_of_a_recipe(tmp_path):
    (tmp_path / "other").mkdir()
    files = [data_set(folder, pairs(), "x").settings for folder in (tmp_path, tmp_path / "other")]
    sets = open_sets(files)
    assert [s.name for s in sets] == ["x.jsonl", "x.jsonl (2)"] and sets[1].settings is files[1]
    sets[0].check()
    bad = data_set(tmp_path, [*pairs(), {"query": "q"}], "bad")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 21: no 'pos'"):
        bad.check()
    with pytest.raises(ValueError, match="line 1: no 'text'"):
        replace(bad, settings=replace(bad.settings, labels="texts")).check()
    alone = [{"query": "q", "pos": "p"}]
    data_set(tmp_path, alone, "c").check()
    data_set(tmp_path, [*alone, {"query": "q", "pos": "p", "neg": "n"}], "d", in_batch=False).check()
    with pytest.raises(
        ValueError, match="e: no row has negatives, so with in_batch = false there is nothing"
    ):
        data_set(tmp_path, alone, "e", in_batch=False).check()


def test_rows_alone_in_their_steps_need_negatives_of_their_own(tmp_path):
    with_own = [{"query": "q", "pos": "p", "neg": "n"}]
    for records, settings, way in (
        ([{"query": "q", "pos": "p"}], {}, 'add "neg" to its rows'),
        (with_own, {"hard_negatives": 0}, "raise hard_negatives"),
        (CLASSES, {"hard_negatives": 0, "labels": "examples"}, "raise hard_negatives"),
    ):
        data = data_set(tmp_path, records, **settings)
        data.check()
        with pytest.raises(
            ValueError, match=f"with train.batch = 1 .* to learn: {way}, or raise train.batch"
        ):
            data.check(is_alone=True)
    data_set(tmp_path, with_own).check(is_alone=True)
    data_set(tmp_path, CLASSES, labels="texts").check(is_alone=True)


def test_the_next_batch_is_made_while_a_step_runs(tmp_path, tokenizer):
    sets = open_sets([data_set(tmp_path, pairs()).settings])
    made = Batches(sets, tokenizer, batch=4, seed=0, max_length=9)
    begun, build = [], made._builder.build
    made._builder.build = lambda step, *rest: (
        begun.append((step, threading.current_thread())) or build(step, *rest)
    )
    with closing(made.ahead(2, 6, made.start())) as ahead:
        step, batch, after = next(ahead)
        deadline = time.monotonic() + 10
        while len(begun) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert step == 2 and [s for s, _ in begun] == [2, 3] and after == {"a.jsonl": 4}
        assert threading.current_thread() not in {thread for _, thread in begun}
        assert [s for s, _, _ in ahead] == [3, 4, 5]
    assert not any(thread.is_alive() for _, thread in begun) and [s for s, _ in begun] == [2, 3, 4, 5]
    # left in the middle
    ahead = made.ahead(3, 9, after)
    assert words_of(next(ahead)[1]) == words_of(made(3, after)[0])
    ahead.close()
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())
    assert list(made.ahead(3, 3, after)) == []


def test_an_error_comes_in_its_step(tmp_path, tokenizer):
    def run(records):
        part = data_set(tmp_path, records).settings
        return Batches(open_sets([part]), tokenizer, batch=4, seed=0, max_length=9)

    records = pairs()
    (_, bad), *_ = run(records)(2, {"a.jsonl": 8})[0].rows
    records[bad]["pos"] = []
    made = run(records)
    found = made.ahead(0, 5, made.start())
    assert [next(found)[0], next(found)[0]] == [0, 1]
    with pytest.raises(ValueError, match=rf"a\.jsonl, line {bad + 1}: 'pos' is empty"):
        next(found)
    assert not any(t.name.startswith("batches") for t in threading.enumerate())
    with pytest.raises(ValueError, match=rf"a\.jsonl, line {bad + 1}: 'pos' is empty"):
        made.sets[0].check()


def test_an_epoch_has_every_row_once_across_resumes(tmp_path, tokenizer):
    parts = [data_set(tmp_path, pairs()).settings, data_set(tmp_path, pairs(30), "b", weight=2).settings]
    counters, taken = None, collections.defaultdict(list)
    for step in range(30):  # each step in a new process
        made = Batches(open_sets(parts), tokenizer, batch=7, seed=1, max_length=9)
        batch, counters = made(step, counters or made.start())
        for (name, row), (query, _, _) in zip(batch.rows, parts_of(batch), strict=True):
            assert query == f"q{row}"
            taken[name].append(row)
    for name, number in (("a.jsonl", 20), ("b.jsonl", 30)):
        assert counters[name] == len(taken[name]) > 2 * number
        for epoch in range(2):
            assert sorted(taken[name][epoch * number : (epoch + 1) * number]) == list(range(number))
    assert set(made.fingerprints) == set(counters) and len(set(made.fingerprints.values())) == 2
    with pytest.raises(ValueError, match=r"a\.jsonl has 20 rows, fewer than a batch of 21"):
        Batches(open_sets(parts), tokenizer, batch=21, seed=1, max_length=9)


def test_a_part_of_a_batch(tmp_path, tokenizer):
    builder = BatchBuilder([data_set(tmp_path, pairs(), in_batch=False)], tokenizer, max_length=9, seed=0)
    batch = builder.build(0, [("a", i) for i in range(4)])
    part = batch.part([2, 3], range(8, 16))
    assert parts_of(part) == parts_of(batch)[2:] and part.rows == batch.rows[2:]
    assert losses(part) == losses(batch)[2:] and part.has_own_candidates_only


def test_a_part_makes_no_tensor_of_rows_times_columns(tmp_path, tokenizer):
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                self.seen = max(self.seen, found.numel())
            return found

    builder = BatchBuilder([data_set(tmp_path, pairs(64))], tokenizer, max_length=9, seed=0)
    candidates = builder.build(0, [("a", i) for i in range(64)]).candidates
    with Largest() as largest:
        part = candidates.part([9, 2, *range(30, 60)], [37, 36, 8, *range(120, 240)])
    assert part.positives[:3].tolist() == [[0, 1], [1, 2], [2, 3]] and len(part.positives) == 32
    assert largest.seen <= 2 * 256


def test_a_teachers_scores_stay_with_their_texts(tmp_path, tokenizer):
    records = [
        record | {"pos_scores": [i + 0.5], "neg_scores": [i - 1.0, i - 2.0, i - 3.0]}
        for i, record in enumerate(pairs(8))
    ]
    data = data_set(tmp_path, records, in_batch=False, hard_negatives=2)
    plain = BatchBuilder([data], tokenizer, max_length=9, seed=0).build(0, [("a", 1)]).candidates
    assert plain.scored is plain.teacher_scores is None
    builder = BatchBuilder([data], tokenizer, max_length=9, seed=0, needs_scores=True)
    batch = builder.build(0, [("a", i) for i in range(4)])
    for found, rows in ((batch, range(4)), (batch.part([2, 0], [*range(6, 9), *range(3)]), (2, 0))):
        documents = words_of(found)[len(rows) :]
        assert len(found.candidates.scored) == 3 * len(rows)
        for (row, column), score in zip(
            found.candidates.scored.tolist(), found.candidates.teacher_scores.tolist(), strict=True
        ):
            record = records[rows[row]]
            scores = dict(zip(record["neg"], record["neg_scores"], strict=True))
            scores |= dict(zip(record["pos"], record["pos_scores"], strict=True))
            assert scores[documents[column]] == score
    for change in ({"pos_scores": None}, {"neg_scores": None}):
        bad = data_set(tmp_path, [*records[:1], records[1] | change, *records[2:]])
        with pytest.raises(ValueError, match=r"a.jsonl, line 2: no pos_scores and neg_scores .*distillation"):
            bad.check(needs_scores=True)
        bad.check()
        builder = BatchBuilder([bad], tokenizer, max_length=9, seed=0, needs_scores=True)
        with pytest.raises(ValueError, match=r"line 2: no pos_scores"):
            builder.build(0, [("a", 1)])
    labelled = data_set(tmp_path, [{"text": f"q{i}", "label": f"t{i % 2}"} for i in range(4)], labels="texts")
    with pytest.raises(ValueError, match=r"line 1: no pos_scores"):
        BatchBuilder([labelled], tokenizer, max_length=9, seed=0, needs_scores=True)


def test_the_state_of_a_masked_instruction_token_changes_nothing(tmp_path, tiny_directory):
    """Neither a vector nor a gradient, for all that a batch of training does."""
    config_tokenizer = TextTokenizer.from_directory(tiny_directory)
    data = data_set(tmp_path, pairs(4), instruction="find it", hard_negatives=1)
    texts = BatchBuilder([data], config_tokenizer, max_length=32, seed=0).build(0, [("a", 0), ("a", 1)]).texts
    model = load_model(TINY, dtype="float32")
    packed = PackedBatch.from_ids(texts.ids, texts.first_pooled)
    assert packed.pool_mask is not None and 10 < (~packed.pool_mask).sum() < len(packed.pool_mask) - 10
    vectors, gradients = [], []
    for change in (0.0, 1e3):
        states = model.embedding_model(packed).detach()
        states[~packed.pool_mask] += change
        states.requires_grad_()
        found = model.head(states, packed.layout, packed.pool_mask)
        (gradient,) = torch.autograd.grad((found * torch.arange(found.shape[1])).sum(), states)
        assert gradient[~packed.pool_mask].abs().max() == 0 and gradient[packed.pool_mask].abs().min() > 0
        vectors.append(found)
        gradients.append(gradient)
    assert torch.equal(*vectors) and torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_keys_are_those_of_a_checkpoint():
    assert text_id("caf\u00e9") == text_id("caf\u00e9") != text_id("cafe") and text_id("") != 0
    assert -(2**63) <= min(map(text_id, WORDS)) < 0 < max(map(text_id, WORDS)) < 2**63
    assert module.PRIVATE == 2**32
