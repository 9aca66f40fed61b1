import json
import re

import numpy as np
import pytest
import torch
from training_runs import losses, recipe_of, write_pairs, write_start

from nvembed_fast.texts import text_id
from nvembed_fast.training.recipe import RecipeError
from nvembed_fast.training.rows import open_rows
from nvembed_fast.training.run_log import read_metrics
from nvembed_fast.training.teacher_vectors import MADE_BY, SIDES, TeacherVectors, names
from nvembed_fast.training.trainer import train


def write_folder(folder, texts: dict[str, list[str]], width=5, seed=0, dtype=np.float16):
    """A folder of random vectors. Returns them by side and text."""
    folder.mkdir(exist_ok=True)
    (folder / MADE_BY).write_text("a teacher")
    found = {}
    for number, side in enumerate(SIDES):
        ids = np.array(sorted(text_id(text) for text in set(texts[side])), dtype=np.int64)
        vectors = np.random.default_rng(seed + number).normal(size=(len(ids), width)).astype(dtype)
        for name, array in zip(names(side), (ids, vectors), strict=True):
            np.save(folder / name, array)
        rows = dict(zip(ids.tolist(), vectors, strict=True))
        found |= {(side, text): torch.from_numpy(rows[text_id(text)]).float() for text in texts[side]}
    return found


def texts_of(file) -> dict[str, list[str]]:
    rows = open_rows(file)
    found = [rows.row(index) for index in range(len(rows))]
    documents = [text for row in found for text in (*row.positives, *row.negatives)]
    return {"queries": [row.query for row in found], "documents": documents}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_vector_is_found_by_its_text_and_side(tmp_path, dtype):
    texts = {"queries": ["a", "b", "c"], "documents": ["c", "d"]}
    written = write_folder(tmp_path / "t", texts, dtype=dtype)
    teacher = TeacherVectors(tmp_path / "t")
    assert teacher.width == 5
    for side, asked in (("queries", ["c", "a", "c"]), ("documents", ["c"])):
        got = teacher(side, [text_id(text) for text in asked], asked)
        assert got.dtype == torch.float32
        assert torch.equal(got, torch.stack([written[side, text] for text in asked]))
    before = teacher.fingerprint
    write_folder(tmp_path / "t", texts, dtype=dtype, seed=9)
    assert TeacherVectors(tmp_path / "t").fingerprint != before


def test_what_is_missing_or_does_not_fit_is_named(tmp_path):
    folder = tmp_path / "t"
    write_folder(folder, {"queries": ["a"], "documents": ["b"]})
    with pytest.raises(ValueError, match=r"lacks the vector of 'zz' among its documents: .*mine --vectors"):
        TeacherVectors(folder)("documents", [text_id("b"), text_id("zz")], ["b", "zz"])
    write_folder(folder, {"queries": ["a"], "documents": []})
    with pytest.raises(ValueError, match="lacks the vector of 'b'"):
        TeacherVectors(folder)("documents", [text_id("b")], ["b"])
    np.save(folder / "documents.vectors.npy", np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"documents need keys \[N\] int64 and vectors \[N, D\], got \[0\]"):
        TeacherVectors(folder)
    np.save(folder / "documents.vectors.npy", np.ones((0, 4)))
    with pytest.raises(ValueError, match="different widths"):
        TeacherVectors(folder)
    for name in ("documents.keys.npy", MADE_BY):
        (folder / name).unlink()
        with pytest.raises(ValueError, match=rf"has no {re.escape(name)}: .*nvembed-fast mine --vectors"):
            TeacherVectors(folder)


@pytest.mark.parametrize("in_batch", [True, False])
def test_a_run_follows_a_teacher_and_knows_it_again(tmp_path, in_batch):
    start = write_start(tmp_path)
    texts = texts_of(write_pairs(tmp_path / "pairs.jsonl"))
    write_folder(tmp_path / "t", texts)
    options = {"teacher": str(tmp_path / "t"), "distillation": 2.0, "data": {"in_batch": in_batch}}
    plain = recipe_of(tmp_path, start, "plain", data={"in_batch": in_batch})
    recipe = recipe_of(tmp_path, start, "taught", **options)
    for each in (plain, recipe):
        train(each, device="cpu")
    [*_, last] = read_metrics(tmp_path / "taught" / "metrics.jsonl")
    assert last["distillation"] > 0
    assert losses(tmp_path / "taught") != losses(tmp_path / "plain")
    # chunks change nothing
    small = recipe_of(tmp_path, start, "small", **options, max_tokens=30)
    train(small, device="cpu")
    for ours, other in zip(losses(tmp_path / "small"), losses(tmp_path / "taught"), strict=True):
        assert ours[1] == pytest.approx(other[1], rel=1e-4)
    longer = recipe_of(tmp_path, start, "taught", **options, steps=8)
    (tmp_path / "t").rename(tmp_path / "moved")
    train(
        recipe_of(tmp_path, start, "taught", **options | {"teacher": str(tmp_path / "moved")}), device="cpu"
    )
    write_folder(tmp_path / "t", texts, seed=5)
    with pytest.raises(ValueError, match=r"the teacher's vectors was .* If nvembed-fast mine --vectors has"):
        train(longer, device="cpu")


@pytest.mark.parametrize("labels", ["examples", "texts"])
def test_the_documents_of_labelled_rows_are_texts_or_labels(tmp_path, labels):
    """What `DataSet.check` asks for is what the batches ask for."""
    file = tmp_path / "labelled.jsonl"
    rows = [(f"w1 w{number}", f"w{90 + number % 2}") for number in range(8)]
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    start, queries = write_start(tmp_path), [text for text, _ in rows]
    documents = queries if labels == "examples" else ["w90", "w91"]
    write_folder(tmp_path / "t", {"queries": queries, "documents": documents})
    data = {"file": str(file), "labels": labels}
    options = {"teacher": str(tmp_path / "t"), "distillation": 1.0, "steps": 1, "data": data}
    train(recipe_of(tmp_path, start, **options), device="cpu")
    write_folder(tmp_path / "t", {"queries": queries, "documents": documents[1:]})
    with pytest.raises(ValueError, match=f"lacks the vector of '{documents[0]}' among its documents"):
        train(recipe_of(tmp_path, start, "other", **options), device="cpu")


def test_a_teacher_that_lacks_a_text_or_has_no_weight_is_refused_before_the_first_step(tmp_path):
    start = write_start(tmp_path)
    texts = texts_of(write_pairs(tmp_path / "pairs.jsonl"))
    lost = texts["documents"].pop()
    texts["documents"] = [text for text in texts["documents"] if text != lost]
    write_folder(tmp_path / "t", texts)
    teacher = str(tmp_path / "t")
    with pytest.raises(ValueError, match=re.escape(f"lacks the vector of {lost!r}")):
        train(recipe_of(tmp_path, start, teacher=teacher, distillation=1.0), device="cpu")
    with pytest.raises(RecipeError, match=r"train.teacher is set, but train.distillation is 0"):
        train(recipe_of(tmp_path, start, teacher=teacher), device="cpu")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
