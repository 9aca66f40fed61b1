"""The public sets that NV-Embed was trained on, from the hub to rows for training.

`SETS` has one entry for each `[[data]]` of `recipes/nv-embed-v2-stage2.toml`. Its rows of the hub have one of
these forms:

| form | a record of the hub | rows |
|---|---|---|
| pairs | a query and a document | {query, pos} |
| triplets | a query, a document, a hard negative | {query, pos, neg} for each query |
| judgements | ids of a query and a document, with their texts in two tables | {query, pos} for each query |
| inference | a premise, a hypothesis and how they relate | {query, pos, neg} for each premise |
| labels | a text and its class | {text, label} |
| scores | two texts and their likeness from 0 to 5 | {query, pos} in both directions, from MIN_SCORE on |

Nothing of this was downloaded by us. Where an entry says `recalled`, its hub id comes from memory. Otherwise
the id was read in the code of projects that use the set. Columns, splits and licences are partly from memory.

`build` writes a file for each set and a manifest. A set that stands in the manifest, of the same code and
evaluation texts, is not fetched again, so a build that was stopped goes on. The hub's later revisions change
nothing of it.
"""

import difflib
import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from nvembed_fast import files
from nvembed_fast.curation import manifest
from nvembed_fast.curation.decontamination import EvaluationTexts

__all__ = ["MIN_SCORE", "SETS", "PublicSet", "build", "find", "rows_of"]

MIN_SCORE = 4.0
_MODULES = (__name__, *(f"{__package__}.{stem}" for stem in ("cleaning", "decontamination", "manifest")))
Form = Literal["pairs", "triplets", "judgements", "inference", "labels", "scores"]
Row = dict[str, Any]
# of (hub id, config, split, seed): the revision, and the records. A seed asks for a random order
Open = Callable[[str, str | None, str, int | None], tuple[str, Iterable[Mapping[str, Any]]]]
_ENTAILS, _CONTRADICTS = 0, 2


@dataclass(frozen=True)
class PublicSet:
    """A set, where it lies and how it is used.

    Attributes:
        name: of its file, NAME.jsonl.
        num_published: rows of the mix that started with NV-Embed's (llama-embed-nemotron-8b, Table 9). None:
            not published.
        form: of the hub's records. None: rows cannot be made of what is on the hub, and `note` says why.
        hub: (id, config) of each table of records, or of the judgements.
        columns: of the records, in the order of the form.
        licence: as the hub or mteb states it.
        instruction: of the queries. NVIDIA's instructions.json where it has the set, else ours.
        task: its kind.
        stages: of the paper in which it is used. Which set is in which is recalled.
        where: (column, values): other records are dropped.
        cut: how a larger set is brought to `num_published` rows. "sample" reads all and takes those with the
            lowest hashes. "first" takes the first ones of a stream that the seed has shuffled.
        recalled: its hub id comes from memory.
        note: what a user should know.
    """

    name: str
    num_published: int | None
    form: Form | None
    hub: tuple[tuple[str, str | None], ...]
    columns: tuple[str, ...]
    licence: str
    instruction: str
    task: Literal["retrieval", "symmetric", "classification"] = "retrieval"
    stages: tuple[int, ...] = (1, 2)
    where: tuple[str, tuple[str, ...]] | None = None
    cut: Literal["sample", "first"] = "sample"
    recalled: bool = True
    note: str = ""


_QUESTION = "Given a question, retrieve passages that answer the question"
_CLAIM = "Given a claim, retrieve documents that support or refute the claim"
_FORUM = "Given a question of a forum, retrieve its answer"
_ALIKE = "Retrieve semantically similar text"
_BEIR = ("query-id", "corpus-id", "score")
_TRIPLET = ("anchor", "positive", "negative")
_PER_QUERY = "The published rows are judgements. Here a row has all documents of its query."

SETS: tuple[PublicSet, ...] = (
    PublicSet(
        "msmarco", 500_000, "judgements", (("mteb/msmarco", None),), _BEIR, "msr-la-nc",
        "Given a web search query, retrieve relevant passages that answer the query",
        cut="first", recalled=False, note=_PER_QUERY,
    ),
    PublicSet(
        "paq", 500_000, "pairs", (("sentence-transformers/paq", None),), ("query", "answer"), "cc-by-sa-3.0",
        _QUESTION, cut="first",
    ),
    PublicSet(
        "stackexchange_mammoth2", 317_180, "pairs", (("TIGER-Lab/WebInstructSub", None),),
        ("question", "answer"), "apache-2.0", _FORUM,
        where=("source", ("stackexchange", "mathstackexchange")), cut="first",
    ),
    PublicSet(
        "hotpotqa", 170_000, "judgements", (("mteb/hotpotqa", None),), _BEIR, "cc-by-sa-4.0",
        "Given a multi-hop question, retrieve documents that can help answer the question",
        recalled=False, note=_PER_QUERY,
    ),
    PublicSet(
        "fever", 140_085, "judgements", (("mteb/fever", None),), _BEIR, "cc-by-nc-sa-3.0", _CLAIM,
        recalled=False, note=_PER_QUERY,
    ),
    PublicSet(
        "nq", 100_231, "pairs", (("sentence-transformers/natural-questions", None),), ("query", "answer"),
        "cc-by-sa-3.0", _QUESTION, recalled=False,
    ),
    PublicSet(
        "gooaq", 100_000, "pairs", (("sentence-transformers/gooaq", None),), ("question", "answer"),
        "apache-2.0", "Given a question, retrieve its answer", cut="first",
        note="Readers disagree about its licence: the files of allenai/gooaq contradict each other.",
    ),
    PublicSet(
        "reddit", 90_000, "pairs", (("sentence-transformers/reddit-title-body", None),), ("title", "body"),
        "not stated", "Given the title of a post, retrieve its text", cut="first",
    ),
    PublicSet(
        "squad", 87_599, "pairs", (("rajpurkar/squad", None),), ("question", "context"), "cc-by-sa-4.0",
        _QUESTION,
    ),
    PublicSet(
        "stackexchange", 80_001, None, (), (), "cc-by-sa", _FORUM,
        note="It is not published which set of Stack Exchange this was.",
    ),
    PublicSet(
        "miracl", 79_648, "triplets", (("sentence-transformers/miracl", "en-triplet-all"),), _TRIPLET,
        "cc-by-sa-4.0", "Given a question, retrieve Wikipedia passages that answer it", recalled=False,
        note="English alone, which has fewer queries than the published rows.",
    ),
    PublicSet(
        "triviaqa", 73_346, "pairs", (("sentence-transformers/trivia-qa", None),), ("query", "answer"),
        "not stated", _QUESTION, recalled=False,
    ),
    PublicSet(
        "hover", 29_721, None, (), (), "cc-by-sa-4.0", _CLAIM,
        note="The hub has claims with titles alone. Join them with the articles of mteb/hotpotqa.",
    ),
    PublicSet(
        "mrtydi", 12_610, "triplets", (("sentence-transformers/mr-tydi", "en-triplet-all"),), _TRIPLET,
        "cc-by-sa-3.0", "Given a question, retrieve Wikipedia passages that answer it", recalled=False,
        note="English alone.",
    ),
    PublicSet(
        "nfcorpus", 3_685, "judgements", (("mteb/nfcorpus", None),), _BEIR, "not specified",
        "Given a question, retrieve relevant documents that answer the question", recalled=False,
        note=_PER_QUERY,
    ),
    PublicSet(
        "bioasq", 2_495, None, (), (), "needs registration",
        "Given a biomedical question, retrieve documents that answer it",
        note="Its training set is given out by bioasq.org after registration.",
    ),
    PublicSet(
        "scifact", 919, "judgements", (("mteb/scifact", None),), _BEIR, "cc-by-nc-4.0",
        "Given a scientific claim, retrieve documents that support or refute the claim", recalled=False,
        note=_PER_QUERY,
    ),
    PublicSet(
        "quora", 101_762, "triplets", (("sentence-transformers/quora-duplicates", "triplet"),), _TRIPLET,
        "not specified",
        "Given a question, retrieve questions that are semantically equivalent to the given question",
        "symmetric", (2,), recalled=False,
    ),
    PublicSet(
        "multinli", 75_505, "inference", (("nyu-mll/multi_nli", None),), ("premise", "hypothesis", "label"),
        "several, by genre", "Given a premise, retrieve a hypothesis that follows from it", "symmetric", (2,),
    ),
    PublicSet(
        "amazon_reviews", 60_000, "labels", (("mteb/AmazonReviewsClassification", "en"),), ("text", "label"),
        "docs.opendata.aws/amazon-reviews-ml/license.txt", "Classify a review of a product by its rating",
        "classification", (2,),
    ),
    PublicSet(
        "emotion", 13_046, "labels", (("mteb/emotion", None),), ("text", "label_text"), "not specified",
        "Classify a short message by its emotion", "classification", (2,),
    ),
    PublicSet(
        "sts", None, "scores", (("mteb/stsbenchmark-sts", None), ("mteb/sts12-sts", None)),
        ("sentence1", "sentence2", "score"), "not specified", _ALIKE, "symmetric", (2,),
        note="The paper also takes STS22.",
    ),
    PublicSet(
        "synthetic", 120_000, None, (), (), "not published", "Given a text, retrieve texts that fit it",
        stages=(2,),
        note="Written by Mixtral-8x22B for NVIDIA, and not published. nvembed-fast synthesize makes others.",
    ),
)  # fmt: skip


def find(name: str) -> PublicSet:
    """The set of a name. Raises ValueError naming the nearest, or why no rows can be made of it."""
    known = {data.name: data for data in SETS}
    if name not in known:
        close = difflib.get_close_matches(name, known, 1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        raise ValueError(f"no public set {name!r}: {hint}")
    data = known[name]
    if data.form is None:
        raise ValueError(f"{name} cannot be fetched: {data.note[0].lower()}{data.note[1:]}")
    return data


def build(
    directory: Path,
    names: Sequence[str],
    *,
    open_table: Open,
    evaluation: EvaluationTexts,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Fetch sets and write their rows: DIRECTORY/NAME.jsonl for each, and DIRECTORY/manifest.json.

    Args:
        directory: created. A set in its manifest that was made of the same, with its file as it was written,
            is kept.
        names: of the sets.
        open_table: `integrations.datasets.open_table`, or what takes its place.
        evaluation: a row with a text that stands in an evaluation set is dropped, and counted for that set.
        say: takes a line for each set.

    Returns:
        The manifest (`curation.manifest`), in which the entries here also have "stages" and "published_rows".

    Raises:
        ValueError: a set is unknown or cannot be fetched, or the hub's table has other columns.
        OSError: the hub is out of reach, or a file cannot be written. Sets that were finished stay.
    """
    sets = [find(name) for name in dict.fromkeys(names)]
    directory.mkdir(parents=True, exist_ok=True)
    with files.alone(directory, ".lock"):
        done = manifest.read(directory)
        for data in sets:
            target = directory / f"{data.name}.jsonl"
            made_of = manifest.made_of(data, _MODULES, evaluation)
            if manifest.is_whole(directory, data.name, done.get(data.name), made_of):
                say(f"{target.name} is there")
                continue
            say(f"{data.name}: fetching {', '.join(hub_id for hub_id, _ in data.hub)}")
            done[data.name] = _write(data, target, open_table, evaluation, made_of)
            manifest.write(directory, done)
            counts = done[data.name]
            dropped = ", ".join(f"{count} dropped ({why})" for why, count in counts["dropped"].items())
            say(f"{target.name}: {counts['rows']} rows" + (f", {dropped}" if dropped else ""))
    return manifest.write(directory, done)


def _write(
    data: PublicSet, target: Path, open_table: Open, evaluation: EvaluationTexts, made_of: str
) -> dict[str, Any]:
    """Write the rows of a set. Returns its entry in the manifest."""
    dropped: Counter[str] = Counter()
    revisions: dict[str, str] = {}

    def tables() -> Iterator[Row]:
        for hub_id, config in data.hub:
            seed = 0 if data.cut == "first" and data.form != "judgements" else None

            def table(
                config: str | None, split: str, seed: int | None, hub_id: str = hub_id
            ) -> Iterable[Any]:
                revisions[hub_id], records = open_table(hub_id, config, split, seed)
                return records

            yield from rows_of(
                data, table(config, "train", seed), dropped, lambda name: table(name, name, None)
            )

    rows = _clean(tables(), dropped, evaluation)
    if data.num_published is not None:
        cut = islice(rows, data.num_published) if data.cut == "first" else None
        rows = iter(heapq.nsmallest(data.num_published, rows, key=_hash)) if cut is None else cut
    num_rows = 0
    with files.replacing(target) as part:
        with open(part, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                num_rows += 1
        if not num_rows:
            raise ValueError(f"{data.name} gives no row: the hub's table has changed")
    sources = [
        {"package": f"{hub_id}@{revisions[hub_id]}", "sha256": None, "licence": data.licence}
        for hub_id, _ in data.hub
    ]
    return manifest.entry(
        target.parent,
        data.name,
        evaluation,
        task=data.task,
        instruction=data.instruction,
        in_batch=1 in data.stages,
        rows=num_rows,
        sources=sources,
        dropped=dropped,
        made_of=made_of,
    ) | {"stages": list(data.stages), "published_rows": data.num_published}


def rows_of(
    data: PublicSet,
    records: Iterable[Mapping[str, Any]],
    dropped: Counter[str],
    table: Callable[[str], Iterable[Mapping[str, Any]]] | None = None,
) -> Iterator[Row]:
    """Rows for training of the hub's records.

    Args:
        data: whose form and columns they have.
        records: of the hub.
        dropped: counts those that give none, by reason.
        table: of judgements: the table "queries" or "corpus", with an _id, a text and perhaps a title.

    Raises:
        ValueError: a record has other columns.
    """
    values = _values(data, records, dropped)
    match data.form:
        case "pairs":
            for query, document in values:
                yield {"query": query, "pos": [document]}
        case "triplets":
            yield from _grouped(values, dropped)
        case "inference":
            sides = {_ENTAILS: 1, _CONTRADICTS: 2}
            triples = []
            for premise, hypothesis, label in values:
                if label in sides:
                    triples.append(
                        (premise, *(hypothesis if sides[label] == side else None for side in (1, 2)))
                    )
                else:
                    dropped["neither follows nor contradicts"] += 1
            yield from _grouped(triples, dropped)
        case "labels":
            for text, label in values:
                yield {"text": text, "label": str(label)}
        case "scores":
            for one, other, score in values:
                if float(score) < MIN_SCORE:
                    dropped[f"score below {MIN_SCORE:g}"] += 1
                    continue
                yield {"query": one, "pos": [other]}
                yield {"query": other, "pos": [one]}
        case "judgements":
            assert table is not None
            yield from _judged(values, table, dropped)


def _values(
    data: PublicSet, records: Iterable[Mapping[str, Any]], dropped: Counter[str]
) -> Iterator[tuple[Any, ...]]:
    """The columns of each record."""
    for record in records:
        if data.where is not None and record.get(data.where[0]) not in data.where[1]:
            dropped[f"another {data.where[0]}"] += 1
            continue
        if missing := [column for column in data.columns if column not in record]:
            raise ValueError(
                f"{data.name}: no column {missing[0]!r}, the hub's table has {', '.join(record)}: "
                "it has changed"
            )
        yield tuple(record[column] for column in data.columns)


def _grouped(triples: Iterable[tuple[Any, ...]], dropped: Counter[str]) -> Iterator[Row]:
    """One row for each query of (query, positive, negative), either of which may be None."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for query, *texts in triples:
        for side, text in zip(found.setdefault(query, ({}, {})), texts, strict=True):
            if text is not None:
                side[text] = None
    for query, (positives, negatives) in found.items():
        if positives:
            yield {"query": query, "pos": [*positives], "neg": [*negatives]}
        else:
            dropped["no positive"] += 1


def _judged(
    judgements: Iterable[tuple[Any, ...]],
    table: Callable[[str], Iterable[Mapping[str, Any]]],
    dropped: Counter[str],
) -> Iterator[Row]:
    """One row for each query. Of the two tables only the texts that are judged are kept in memory."""
    relevant: dict[str, list[str]] = {}
    for query, document, score in judgements:
        if score > 0:
            relevant.setdefault(str(query), []).append(str(document))
    wanted = {document for documents in relevant.values() for document in documents}
    queries, documents = (
        {
            str(record["_id"]): f"{record.get('title') or ''} {record['text']}".strip()
            for record in table(name)
            if str(record["_id"]) in ids
        }
        for name, ids in (("queries", relevant.keys()), ("corpus", wanted))
    )
    for query, ids in relevant.items():
        positives = [documents[document] for document in ids if document in documents]
        if query in queries and positives:
            yield {"query": queries[query], "pos": positives}
        else:
            dropped["no text"] += 1


def _clean(rows: Iterable[Row], dropped: Counter[str], evaluation: EvaluationTexts) -> Iterator[Row]:
    """Rows without empty texts, repeated rows and texts of evaluation sets."""
    seen: set[bytes] = set()
    for row in rows:
        query = row.get("query", row.get("text"))
        kept = row
        if "pos" in row:
            positives = [text for text in row["pos"] if text and text.strip() and text != query]
            negatives = [text for text in row.get("neg", ()) if text and text.strip()]
            negatives = [text for text in negatives if text != query and text not in positives]
            kept = {"query": query, "pos": positives} | ({"neg": negatives} if negatives else {})
        if not query or not query.strip():
            dropped["empty"] += 1
        elif "pos" in kept and not kept["pos"]:
            dropped["no positive"] += 1
        elif (key := _hash(kept)) in seen:
            dropped["repeated"] += 1
        elif found := evaluation.found(query, *kept.get("pos", ()), *kept.get("neg", ())):
            dropped.update(f"in {task}" for task in found)
        else:
            seen.add(key)
            yield kept


def _hash(row: Row) -> bytes:
    content = json.dumps(row, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=16).digest()
