"""Other forms of training data become rows that training reads."""

import csv
import gzip
import io
import json

import pytest

from nvembed_fast import cli
from nvembed_fast.cli.convert import _FORMS
from nvembed_fast.training.converters import FIELDS, convert
from nvembed_fast.training.rows import open_rows


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def table(path, records):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, records[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(records)
    return path


def converted(source, form, **options):
    output = source.parent / "rows.jsonl"
    counts = convert(source, output, form, **options)
    return counts, [json.loads(line) for line in output.read_text().splitlines()]


def test_triplets(tmp_path):
    records = [
        {"anchor": "a1", "positive": "p1", "negative": "n1", "id": 1},
        {"anchor": "a2", "positive": ["p2", "p3"], "negative_1": "n2", "negative_2": "n3", "negative": None},
        {"anchor": "a3", "positive": "p4"},
    ]
    counts, rows = converted(lines(tmp_path / "x.jsonl", records), "triplets")
    assert counts == (3, 0) and rows == [
        {"query": "a1", "pos": ["p1"], "neg": ["n1"]},
        {"query": "a2", "pos": ["p2", "p3"], "neg": ["n2", "n3"]},
        {"query": "a3", "pos": ["p4"]},
    ]
    assert open_rows(tmp_path / "rows.jsonl").row(1).negatives == ("n2", "n3")


@pytest.mark.parametrize("form", ["triplets", "tevatron"])
def test_a_name_of_negatives_that_no_record_has_is_told(form, tmp_path):
    """Rows without their hard negatives would look like any other."""
    *_, field = FIELDS[form]
    source = lines(tmp_path / "x.jsonl", [GOOD[form], GOOD[form] | {"neg": ["n"]}, GOOD[form]])
    (tmp_path / "rows.jsonl").write_text("before")
    with pytest.raises(ValueError, match=r"x\.jsonl: no record has 'negs', the last has '\w+', 'pos"):
        converted(source, form, fields={field: "negs"})
    assert (tmp_path / "rows.jsonl").read_text() == "before"
    _, rows = converted(source, form, fields={field: "neg"})
    assert [row.get("neg") for row in rows] == [None, ["n"], None]


def test_negatives_may_be_numbered_alone(tmp_path):
    source = lines(tmp_path / "x.jsonl", [GOOD["triplets"] | {"neg_2": "n2", "neg_x": "n"}])
    _, rows = converted(source, "triplets", fields={"negative": "neg"})
    assert rows[0]["neg"] == ["n2"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_columns_of_a_table(suffix, tmp_path):
    records = [{"q": 'two\nlines, "quoted"', "positive": "p1", "negative": ""}, {"q": "a", "positive": "p2"}]
    source = table(tmp_path / f"x{suffix}", records)
    counts, rows = converted(source, "triplets", fields={"anchor": "q"})
    assert counts == (2, 0) and rows[0] == {"query": 'two\nlines, "quoted"', "pos": ["p1"]}


def test_a_table_is_read_as_texts_are(tmp_path):
    """Gzipped, with long fields, and with the semicolons of some spreadsheets."""
    text = "a" * 200_000
    with gzip.open(tmp_path / "x.csv.gz", "wt") as file:
        file.write(f"text;label\n{text};b\n\n")
    counts, rows = converted(tmp_path / "x.csv.gz", "labels")
    assert counts == (1, 0) and rows == [{"text": text, "label": "b"}]


def test_json_lines_are_read_as_texts_are(tmp_path, monkeypatch):
    """Gzipped, with blank lines, and from standard input."""
    content = b'\xef\xbb\xbf{"text": "a", "label": "b"}\n\n{"text": "c", "label": "d"}\n'
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(content))
    wanted = (2, 0), [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}]
    assert converted(tmp_path / "x.jsonl.gz", "labels") == wanted
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert convert("-", tmp_path / "rows.jsonl", "labels") == wanted[0]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz: its gzip stream is cut short"):
        converted(tmp_path / "x.jsonl.gz", "labels")
    (tmp_path / "x.jsonl").write_text("anchor,positive\n")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1: not JSON \(.*\)$"):
        converted(tmp_path / "x.jsonl", "labels")


def test_tevatron(tmp_path):
    record = {
        "query_id": "1",
        "query": "q",
        "positive_passages": [{"docid": "7", "title": "Title", "text": "text"}],
        "negative_passages": [{"docid": "8", "title": "", "text": "other"}, {"docid": "9", "text": "third"}],
    }
    counts, rows = converted(lines(tmp_path / "x.jsonl", [record]), "tevatron")
    assert counts == (1, 0) and rows == [{"query": "q", "pos": ["Title text"], "neg": ["other", "third"]}]


def test_labels(tmp_path):
    source = table(tmp_path / "x.csv", [{"review": "good", "stars": 5}, {"review": "bad", "stars": 1}])
    counts, rows = converted(source, "labels", fields={"text": "review", "label": "stars"})
    assert counts == (2, 0) and rows == [{"text": "good", "label": "5"}, {"text": "bad", "label": "1"}]
    assert open_rows(tmp_path / "rows.jsonl").labelled(1).label == "1"


def test_scores_count_in_both_directions_from_a_score_on(tmp_path):
    records = [(4, "a", "b"), (3.9, "c", "d"), ("4.5", "e", "f"), (5, "g", "g")]
    records = [{"sentence1": a, "sentence2": b, "score": score} for score, a, b in records]
    counts, rows = converted(lines(tmp_path / "x.jsonl", records), "scores", min_score=4)
    assert counts == (4, 2)
    assert [(row["query"], row["pos"]) for row in rows] == [
        ("a", ["b"]),
        ("b", ["a"]),
        ("e", ["f"]),
        ("f", ["e"]),
    ]


BAD = [
    ("triplets", {"anchor": "a"}, "line 2: no 'positive', the record has 'anchor'"),
    ("triplets", {"anchor": "a", "positive": None}, "line 2: 'pos' is empty"),
    ("triplets", {"anchor": "a", "positive": "a"}, "line 2: the only positive equals the query"),
    ("triplets", ["a"], "line 2: must be an object, got list"),
    (
        "tevatron",
        {"query": "a", "positive_passages": [7]},
        "line 2: a passage must be an object with 'text', got 7",
    ),
    ("labels", {"text": "a"}, "line 2: no 'label'"),
    ("labels", {"text": "a", "label": 1.5}, "line 2: 'label' must be a string, got float"),
    (
        "scores",
        {"sentence1": "a", "sentence2": "b", "score": "good"},
        "line 2: 'score' must be a finite number",
    ),
    (
        "scores",
        {"sentence1": "a", "sentence2": "b", "score": True},
        "line 2: 'score' must be a finite number",
    ),
    ("scores", {"sentence1": "a", "sentence2": "b", "score": 1}, r"x\.jsonl gives no row"),
]
GOOD = {
    "triplets": {"anchor": "a", "positive": "p"},
    "tevatron": {"query": "q", "positive_passages": ["p"]},
    "labels": {"text": "t", "label": "l"},
    "scores": {"sentence1": "a", "sentence2": "b", "score": 0},
}


@pytest.mark.parametrize(("form", "record", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_record_is_named_and_leaves_the_output(form, record, message, tmp_path):
    source = lines(tmp_path / "x.jsonl", [GOOD[form], record])
    (tmp_path / "rows.jsonl").write_text("before")
    options = {"min_score": 2} if form == "scores" else {}
    with pytest.raises(ValueError, match=message):
        converted(source, form, **options)
    assert {p.name: p.read_text() for p in tmp_path.iterdir() if p != source} == {"rows.jsonl": "before"}


def test_a_bad_table_is_named(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\na,b\nc\n")
    with pytest.raises(ValueError, match=r"x\.csv, line 3: must have 2 fields like the header"):
        converted(tmp_path / "x.csv", "labels")
    (tmp_path / "x.csv").write_text('text,label\na,"b\n')
    with pytest.raises(ValueError, match=r"x\.csv, the row from line 2: not CSV"):
        converted(tmp_path / "x.csv", "labels")


def test_options_that_do_not_fit(tmp_path):
    source = lines(tmp_path / "x.jsonl", [GOOD["scores"]])
    with pytest.raises(ValueError, match="scores need min_score"):
        converted(source, "scores")
    with pytest.raises(ValueError, match="labels have no scores"):
        converted(source, "labels", min_score=1)
    with pytest.raises(ValueError, match="labels have no field 'anchor': there are text, label"):
        converted(source, "labels", fields={"anchor": "a"})
    with pytest.raises(ValueError, match="form must be one of triplets"):
        converted(source, "pairs")


def test_the_command(tmp_path, capsys):
    source = table(tmp_path / "x.csv", [{"q": "a", "positive": "b"}])
    output = tmp_path / "rows.jsonl"
    command = ["convert", str(source), "-o", str(output), "--form", "triplets", "--field"]
    assert cli.main([*command, "anchor=q"]) == 0
    assert capsys.readouterr().out == f"{output}: 1 rows\n"
    assert open_rows(output).row(0).query == "a"
    assert cli.main([*command, "anchor"]) == 1
    assert "--field takes NAME=KEY, such as anchor=question, got 'anchor'" in capsys.readouterr().err


def test_the_command_offers_every_form():
    """It has a copy of them, because it imports training only to run."""
    assert tuple(FIELDS) == _FORMS
