"""Examples of tasks by rules, out of WordNet's relations and the sections of documentation.

They stand in the place of what a language model would write. Their variety is that of a few rules, and their
sentences are those of dictionaries and manuals. The hard negatives are what makes them more than pairs: a
negative is a neighbour of the positive in WordNet, or another section of its page.

| task finds | for | the negative |
|---|---|---|
| a broader term, a narrower one, a part | a word with its meaning | stands in another relation to it |
| another word, the opposite | a word with its meaning | is related in another way |
| the meaning of a word | a sentence with the word | another meaning of the word |
| an entry | a term | the entry of a term of the same kind |
| a term | its entry | a term of the same kind |
| a section | its heading and page | another section of the page |
| a heading | its section | another heading of the page |

An entry is a meaning and its relations as text. Places that `curate` keeps for dev pairs give
no example.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from nvembed_fast.curation import dictionaries
from nvembed_fast.curation.curate import DEV_PER_MILLE
from nvembed_fast.curation.dictionaries import Synset
from nvembed_fast.curation.prompts import Example, Shape
from nvembed_fast.curation.sources import TEXT_SETS
from nvembed_fast.curation.text import Pair, drawn

__all__ = ["examples", "from_sections", "from_wordnet"]

Found = Iterator[tuple[Shape, str, str, Example]]  # (shape, task, what it is a part of, example)
_GIVEN_WORD = "Given a word with its meaning, retrieve"
_MIN_ENTRY, _MIN_SECTION_WORDS = 150, 30
_NUM_NAMED = 5  # other terms in an entry
# symbol -> how an entry tells it, and what a task retrieves
_RELATIONS = {
    "@": ("It is a kind of", "a broader term"),
    "~": ("Kinds of it are", "a narrower term"),
    "%p": ("Its parts are", "a part of what it names"),
    "#m": ("It belongs to", ""),
    "*": ("It involves:", ""),
    ">": ("It causes:", ""),
}


def examples(cache: Path | None = None) -> tuple[dict[Shape, dict[str, list[Example]]], list[dict]]:
    """Shape -> task -> its examples in an order like chance, and the packages for the manifest.

    Errors are those of `packages.fetch` and `packages.debian`.
    """
    (wordnet,) = TEXT_SETS["wordnet-words"].parts
    place, source = wordnet.fetched(cache)
    sources = [source]
    found = [*from_wordnet(dictionaries.synsets(place))]
    for part in TEXT_SETS["documentation"].parts:
        place, source = part.fetched(cache)
        sources.append(source)
        found += from_sections(pair for pair in part.read(place) if isinstance(pair, Pair))
    found.sort(key=lambda one: drawn(one[1], *one[3]))
    by_task: dict[Shape, dict[str, list[Example]]] = {}
    for shape, task, place_of, one in found:
        if drawn(place_of) % 1000 >= DEV_PER_MILLE:
            by_task.setdefault(shape, {}).setdefault(task, []).append(one)
    return by_task, sources


def from_wordnet(synsets: Iterable[Synset]) -> Found:
    """The examples of WordNet's relations, in the order of the meanings."""
    wordnet = _WordNet(synsets)
    for synset in wordnet.by_place.values():
        for shape, task, query, positive, negative in wordnet.of(synset):
            if len({query, positive, negative}) == 3 and negative:
                yield shape, task, synset.place, Example(query, positive, negative)


class _WordNet:
    def __init__(self, synsets: Iterable[Synset]):
        self.by_place = {synset.place: synset for synset in synsets}
        self._of_word: dict[str, list[Synset]] = {}
        for synset in self.by_place.values():
            for word in synset.words:
                self._of_word.setdefault(word.lower(), []).append(synset)

    def of(self, synset: Synset) -> Iterator[tuple[Shape, str, str, str, str]]:
        """(shape, task, query, positive, negative) of a meaning. Without a negative it is empty."""
        word = synset.words[0]
        query = f"{word}: {synset.meaning}"
        broader, narrower = self._related(synset, "@"), self._related(synset, "~")
        sisters = self._sisters(synset)
        for symbol, others in (("@", sisters or narrower), ("~", broader), ("%p", sisters or broader)):
            task = f"{_GIVEN_WORD} {_RELATIONS[symbol][1]}"
            if related := self._related(synset, symbol):
                yield "short-short", task, query, _word(query, related), _word(query, others)
        if len(synset.words) > 1:
            task = f"{_GIVEN_WORD} another word for it"
            yield "short-short", task, query, synset.words[1], _word(query, sisters or broader)
        for number, place, there in synset.opposites:
            own = f"{synset.words[number]}: {synset.meaning}"
            near = next((w for w in synset.words if w != synset.words[number]), "")
            near = near or _word(own, self._related(synset, "&") or broader)
            opposite = self.by_place[place].words[there]
            yield "short-short", f"{_GIVEN_WORD} its opposite", own, opposite, near
        for sentence in synset.examples[:1]:
            used = next((w for w in synset.words if f" {w.lower()}" in f" {sentence.lower()}"), None)
            senses = [] if used is None else self._of_word[used.lower()]
            if others := [one for one in senses if one.meaning != synset.meaning]:
                task = "Given a word in a sentence, retrieve what it means there"
                asked = f"{used}, as in: {sentence}"
                other = others[drawn(asked) % len(others)]
                yield "short-short", task, asked, synset.meaning, other.meaning
        entry = self._entry(synset)
        if len(self._of_word[word.lower()]) == 1 and len(entry) >= _MIN_ENTRY and sisters:
            sister = sisters[drawn(entry) % len(sisters)]
            task = "Given a question about a term, retrieve its entry in a dictionary"
            yield "short-long", task, dictionaries.asked(word), entry, self._entry(sister)
            task = "Given an entry of a dictionary, retrieve its headword"
            yield "long-short", task, entry, word, sister.words[0]

    def _related(self, synset: Synset, symbol: str) -> list[Synset]:
        """The meanings in a relation, without those under the same word."""
        own = {word.lower() for word in synset.words}
        found = (self.by_place[place] for name, place in synset.relations if name == symbol)
        return [one for one in found if one.words[0].lower() not in own]

    def _sisters(self, synset: Synset) -> list[Synset]:
        """Other meanings below the same broader one."""
        taken = {word.lower() for one in (synset, *self._related(synset, "~")) for word in one.words}
        found = (one for above in self._related(synset, "@") for one in self._related(above, "~"))
        return [one for one in found if one.words[0].lower() not in taken]

    def _entry(self, synset: Synset) -> str:
        """A meaning and its relations as running text."""
        sentences = [f"{synset.meaning[:1].upper()}{synset.meaning[1:]}."]
        for symbol, (words, _) in _RELATIONS.items():
            if related := self._related(synset, symbol)[:_NUM_NAMED]:
                sentences.append(f"{words} {', '.join(one.words[0] for one in related)}.")
        return " ".join(sentences)


def from_sections(pairs: Iterable[Pair]) -> Found:
    """The examples of headings and sections, page by page."""
    for page, found in groupby(pairs, key=lambda pair: pair.source):
        sections = [pair for pair in found if len(pair.document.split()) >= _MIN_SECTION_WORDS]
        title = sections[0].query if sections else ""
        for section in sections[1:]:
            others = [one for one in sections if one.query != section.query]
            if not others:
                continue
            other = others[drawn(section.query, section.document) % len(others)]
            task = "Given a heading and its page, retrieve the section of the documentation below it"
            query = f"{section.query}, on the page about {title}"
            yield "short-long", task, page, Example(query, section.document, other.document)
            task = "Given a section of a documentation, retrieve its heading"
            yield "long-short", task, page, Example(section.document, section.query, other.query)


def _word(key: str, synsets: list[Synset]) -> str:
    """The first word of one of them, which a hash decides. Empty: there is none."""
    return synsets[drawn(key) % len(synsets)].words[0] if synsets else ""
