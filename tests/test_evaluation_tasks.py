"""Evaluation sets out of planted packages: which samples are drawn, what is relevant, and what is skipped."""

import gzip
import io
import json
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
from downloads import or_skip

from nvembed_fast import packages
from nvembed_fast.evaluation import tasks
from nvembed_fast.packages import DebianPackage


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Call it with {path: content}. The packages are then a folder with these files."""

    def plant(files: dict[str, bytes]) -> Path:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

        def unpacked(requirement, sha256, pattern, cache):
            folder = tmp_path / f"files-{len(list(tmp_path.iterdir()))}"
            for path in [
                p for p in tmp_path.rglob("*") if p.is_file() and p.match(pattern.removeprefix("*/"))
            ]:
                folder.mkdir(exist_ok=True)
                (folder / path.name).write_bytes(path.read_bytes())
            return folder

        monkeypatch.setattr(packages, "unpacked", unpacked)
        monkeypatch.setattr(packages, "debian", lambda name, cache: DebianPackage(tmp_path, "1", "0" * 64))
        return tmp_path

    return plant


def squad(num_questions: int) -> bytes:
    asked = [{"question": f" question  {n} "} for n in range(num_questions)]
    paragraphs = [
        {"context": "A  first\nparagraph.", "qas": asked},
        {"context": "Nobody asks about this one.", "qas": []},
        {"context": "A first paragraph.", "qas": [{"question": "the same paragraph again"}]},
    ]
    return json.dumps({"data": [{"paragraphs": paragraphs}]}).encode()


def test_squad_draws_questions_and_keeps_all_paragraphs(planted):
    planted({"squad_shifts/squaddev_v1.1.json": squad(2000)})
    task = tasks.load("squad")
    assert len(task.queries) == 1500 and task.sample == "1500 of 2001 questions"
    assert task.documents == {"p0": "A first paragraph.", "p1": "Nobody asks about this one."}
    assert task.relevant == {query: {"p0"} for query in task.queries}
    assert len(set(task.queries.values())) == 1500
    assert tasks.load("squad") == task, "the sample is not drawn by a seed"
    assert set(tasks.texts("squad")) == {*task.queries.values(), *task.documents.values()}


def test_another_text_is_another_revision(planted):
    planted({"squad_shifts/squaddev_v1.1.json": squad(3)})
    first = tasks.load("squad").revision
    assert tasks.load("squad").revision == first
    planted({"squad_shifts/squaddev_v1.1.json": squad(4)})
    assert tasks.load("squad").revision != first


def sword(entries: dict[str, str]) -> dict[str, bytes]:
    """The four files of a dictionary of one block."""
    bodies = [entry.encode() + b"\0" for entry in entries.values()]
    start = 4 + 8 * len(bodies)
    table, content = struct.pack("<I", len(bodies)), b""
    for body in bodies:
        table += struct.pack("<II", start + len(content), len(body))
        content += body
    block = zlib.compress(table + content)
    index = data = b""
    for number, headword in enumerate(entries):
        record = headword.encode() + b"\n" + struct.pack("<II", 0, number)
        index += struct.pack("<II", len(data), len(record))
        data += record
    stem = "usr/share/sword/modules/lexdict/zld/nave/nave"
    parts = {".idx": index, ".dat": data, ".zdx": struct.pack("<II", 0, len(block)), ".zdt": block}
    return {stem + suffix: content for suffix, content in parts.items()}


def verses(number: int) -> bytes:
    lines = [f'{n},1,1,{n},"Verse {{note}}  {n}"' for n in range(1, number + 1)]
    return gzip.compress("\n".join(["id,b,c,v,t", *lines]).encode())


def words(is_test: bool) -> list[str]:
    return [word for word in (f"WORD{n}" for n in range(100)) if tasks.is_test_headword(word) == is_test]


def test_a_fifth_of_the_headwords_is_for_evaluation_whatever_their_case():
    assert 0.15 < sum(tasks.is_test_headword(f"HEAD{n}") for n in range(2000)) / 2000 < 0.25
    assert {tasks.is_test_headword(word) for word in ("Aaron", "AARON ", " aaron")} in ({True}, {False})


def test_naves_topics_are_those_of_test_headwords_with_enough_verses(planted):
    reference = '<ref osisRef="{}">x</ref>'.format
    good, train = words(True)[0], words(False)[0]
    long, gone = words(True)[1], words(True)[2]
    entries = {
        good: f"<lb/>&amp; a <b>part</b>; {reference('Gen.1.2-Gen.1.4')}<lb/>of one {reference('Gen.1.9')}",
        train: f"never {reference('Gen.1.1-Gen.1.5')}",
        long: f"a long range gives its first verse {reference('Gen.1.1-Gen.1.60')}",
        gone: f"none {reference('Gen.1.99')} {reference('Tobit.1.1')}",
    }
    planted({"t_web.csv.gz": verses(60), **sword(entries)})
    found = tasks.naves()
    assert len(found.verses) == 60 and found.verses["1.1.7"] == "Verse 7"
    assert found.topics == {
        f"{good.title()}: & a part": (good, ["1.1.2", "1.1.3", "1.1.4"]),
        f"{good.title()}: of one": (good, ["1.1.9"]),
        f"{train.title()}: never": (train, [f"1.1.{n}" for n in range(1, 6)]),
        f"{long.title()}: a long range gives its first verse": (long, ["1.1.1"]),
    }
    task = tasks.load("nave")
    assert list(task.queries.values()) == [f"{good.title()}: & a part"]
    assert task.relevant == {"t0": {"1.1.2", "1.1.3", "1.1.4"}} and len(task.documents) == 60


def help_page(body: str, *keywords: str) -> bytes:
    tags = "".join(f'<meta itemprop="keywords" content="{keyword}">' for keyword in keywords)
    return (
        f'<p>The frame.</p><meta itemprop="keywords" content="frame">'
        f'<div id="DisplayArea">{tags}<h1>Title</h1>'
        f"<p>{body}<span> in a span</span></p><script>no()</script><ul><li>An <b>item</b></li></ul></div>"
        '<div id="SearchFrame"></div><p>A footer.</p>'
    ).encode()


def test_a_keyword_of_the_help_may_point_to_several_pages(planted):
    long = "What a page says. " * 5
    root = "help/en-US/text/"
    planted(
        {
            root + "a.html": help_page(long + "A", "bold;fonts", "shared"),
            root + "b.html": help_page(long + "B", "shared"),
            root + "short.html": help_page("Short", "short"),
        }
    )
    task = tasks.load("libreoffice")
    assert task.documents["text/a.html"] == f"{long}A in a span An item"
    wanted = {"bold;fonts": {"text/a.html"}, "shared": {"text/a.html", "text/b.html"}}
    assert {task.queries[query]: pages for query, pages in task.relevant.items()} == wanted


def test_tags_that_speak_of_tags_are_no_queries(planted, monkeypatch):
    """Every facet has a tag TODO with the same description, so each of its queries had another's text."""
    described = {
        "web::wiki": "Wiki Software\n Servers and plug-ins.",
        "web::TODO": "Need an extra tag\n The right tag is missing.",
        "game::TODO": "Need an extra tag\n The right tag is missing.",
        "special::auto": "Automatic\n Put there by a robot.",
        "culture::french": "French",
    }
    vocabulary = "\n".join(f"Tag: {tag}\nDescription: {text}\n" for tag, text in described.items())
    tags = ", ".join(described)
    stanzas = [f"Package: p{n}\nDescription-md5: {n}\nTag: {tags}\n" for n in range(4)]
    long = [
        f"Description-md5: {n}\nDescription-en: program {n}\n {'It edits pages. ' * 6}\n" for n in range(4)
    ]
    root = planted(
        {
            "usr/share/debtags/vocabulary": vocabulary.encode(),
            "main_Packages": "\n".join(stanzas).encode(),
            "main_Translation-en": "\n".join(long).encode(),
        }
    )
    lists = [root / "main_Packages", root / "main_Translation-en"]
    monkeypatch.setattr(packages, "debian_lists", lambda cache: lists)
    task = tasks.load("debtags")
    assert task.queries == {"web::wiki": "Wiki Software. Servers and plug-ins."}
    assert task.relevant == {"web::wiki": {"p0", "p1", "p2", "p3"}} and len(task.documents) == 4
    assert task.sample == "1 of 1 tags, 4 of 4 packages"


@pytest.mark.parametrize("name", tasks.GROUPS["retrieval"])
@pytest.mark.long
def test_queries_of_one_text_have_the_same_answers(name):
    with or_skip(name):
        task = tasks.load(name)
    answers: dict[str, set[str]] = {}
    for query, text in task.queries.items():
        assert answers.setdefault(text, task.relevant[query]) == task.relevant[query], text
    assert answers


def table(rows: list[tuple[str, str]]) -> bytes:
    header = [("Category", "Text"), ("d", "string"), ("class", "")]
    return "\n".join("\t".join(row) for row in header + rows).encode()


def test_labels_are_numbers_of_sorted_categories(planted):
    rows = [(f"topic{n % 3}", f"text {n}") for n in range(2100)]
    planted(
        {
            "datasets/reuters-r52-train.tab": table(rows),
            "datasets/reuters-r52-test.tab": table([("topic0", "one"), ("other", "two")]),
            "datasets/20newsgroups-test.tab": table(rows),
        }
    )
    task = tasks.load("r52")
    assert len(task.train_texts) == 2000 and dict(zip(task.texts, task.labels, strict=True)) == {
        "one": 1,
        "two": 0,
    }
    topics = {f"text {n}": n % 3 + 1 for n in range(2100)}
    assert all(topics[text] == label for text, label in zip(task.train_texts, task.train_labels, strict=True))
    clusters = tasks.load("newsgroups")
    assert len(clusters.texts) == len(set(clusters.texts)) == 2000 and set(clusters.labels) == {0, 1, 2}
    assert set(tasks.texts("r52")) == {*task.texts, *task.train_texts}


def test_tweets_without_a_clear_sentiment_drop_out(planted):
    rows = [f"{n}\t{(-1) ** n * 0.6}\tI &amp; {n}" for n in range(1200)] + ["x\t0.5\tmeh", "y\t-0.2\tso so"]
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        content = "\n".join(rows).encode()
        entry = tarfile.TarInfo("hutto_ICWSM_2014/tweets_GroundTruth.txt")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    planted({"hutto_ICWSM_2014.tar.gz": inner.getvalue()})
    task = tasks.load("tweets")
    assert (len(task.train_texts), len(task.texts)) == (200, 1000)
    for text, label in zip(task.texts + task.train_texts, task.labels + task.train_labels, strict=True):
        assert text.startswith("I & ") and label == 1 - int(text.split()[-1]) % 2


def test_a_missing_package_skips_the_task_with_its_reason(monkeypatch):
    def debian(name, cache):
        raise OSError("this machine has no apt-get: get a Debian")

    monkeypatch.setattr(packages, "debian", debian)
    with pytest.raises(tasks.SkippedTask, match="the data of libreoffice cannot be had here.*no apt-get"):
        tasks.load("libreoffice")


def test_pyarrow_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(tasks.SkippedTask, match=r"rte needs pyarrow: pip install 'nvembed_fast\[data\]'"):
        tasks.load("rte")


def test_an_unknown_task_is_told_with_the_nearest():
    with pytest.raises(ValueError, match="no evaluation task 'squat': did you mean 'squad'?"):
        tasks.load("squat")
    with pytest.raises(ValueError, match=r"no evaluation task 'STS12': there are squad, nave"):
        tasks.load("STS12")


def test_groups_and_tasks_may_be_named_together():
    assert tasks.chosen(["rte", "retrieval", "SciFact", "squad"])[0][:2] == ["rte", "squad"]
    assert tasks.chosen(["SciFact", "local"]) == (tasks.names(), ["SciFact"])


def test_a_quick_sample_keeps_what_is_relevant():
    documents = {f"d{n}": f"text {n}" for n in range(6000)}
    relevant = {f"q{n}": {f"d{n}", f"d{n + 1000}"} for n in range(400)}
    queries = {query: f"question {query}" for query in relevant}
    task = tasks.LocalTask(
        "squad", "retrieval", "", 10, queries=queries, documents=documents, relevant=relevant
    )
    small = tasks.sampled(task)
    assert len(small.queries) == len(small.relevant) == 300 and len(small.documents) == 4000
    assert all(small.relevant[query] == relevant[query] <= set(small.documents) for query in small.queries)
    assert small.sample == "300 of 400 queries, 4000 of 6000 documents" and small.revision != task.revision
    assert tasks.sampled(task) == small and tasks.sampled(small) is small
