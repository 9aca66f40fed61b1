"""What a language model is asked for, in our words: tasks of a shape, and then examples of a task.

The two steps are those of E5 (Wang et al. 2024, arXiv 2401.00368):

1. `brainstorm` shows a few tasks of a shape and asks for NUM_TASKS others.
2. `example` asks for a query, a document that fits and one that only seems to. The form, length, clarity and
   difficulty are drawn for each example, so that one task gives different ones.

What is drawn follows from a hash of the seed, the task and the example's number. So a request is the same in
every run, and its answer is found again. Both steps are answered in JSON, which `tasks_of` and `example_of`
read.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from nvembed_fast.curation.text import drawn

__all__ = [
    "LANGUAGES", "NUM_TASKS", "SHAPES", "Example", "Request", "Shape", "brainstorm", "example", "example_of",
    "tasks_of",
]  # fmt: skip

Shape = Literal["short-long", "long-short", "short-short"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
NUM_TASKS = 20
NUM_SHOWN = 3
TASK_CHARACTERS = (15, 300)
# as the language check and a prompt name them
LANGUAGES: Mapping[str, str] = MappingProxyType(
    {
        "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek",
        "en": "English", "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew",
        "hi": "Hindi", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese",
        "ko": "Korean", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
        "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tr": "Turkish",
        "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
    }
)  # fmt: skip


class Example(NamedTuple):
    """A query, a document that fits, and one that only seems to."""

    query: str
    positive: str
    negative: str


@dataclass(frozen=True)
class Request:
    """What an engine is asked.

    Attributes:
        step: "tasks" or "example".
        shape: of the task.
        number: of the request among those of its shape or task.
        prompt: for a language model.
        task: of the example.
        language: of its texts.
    """

    step: Literal["tasks", "example"]
    shape: Shape
    number: int
    prompt: str
    task: str = ""
    language: str = "en"

    def schema(self, max_characters: int | None = None) -> dict[str, Any]:
        """The JSON schema of its answer. With `max_characters` its texts and its list end."""
        text: dict[str, Any] = {"type": "string"}
        tasks: dict[str, Any] = {"type": "array", "items": text}
        if max_characters is not None:
            text |= {"minLength": 1, "maxLength": max_characters}
            tasks |= {"minItems": 1, "maxItems": NUM_TASKS}
        found = {"tasks": tasks} if self.step == "tasks" else dict.fromkeys(Example._fields, text)
        return {
            "type": "object",
            "properties": found,
            "required": list(found),
            "additionalProperties": False,
        }


class _Sides(NamedTuple):
    """A shape: what stands on its two sides, how long the documents are, and tasks of ours."""

    query: str
    document: str
    words: tuple[str, ...]
    forms: tuple[str, ...]
    tasks: tuple[str, ...]


_QUESTIONS = ("a question", "a few keywords", "a short statement", "a request in the imperative")
_SIDES: Mapping[Shape, _Sides] = MappingProxyType(
    {
        "short-long": _Sides(
            "a short query, as someone types it into a search box",
            "a passage",
            ("about 60", "about 120", "about 200", "about 350"),
            _QUESTIONS,
            (
                "Given a question about a recipe, retrieve a description of how the dish is made",
                "Given a symptom of a plant, retrieve an article about the disease that causes it",
                "Given the name of a historical treaty, retrieve a passage about its consequences",
                "Given a legal question of a tenant, retrieve the paragraph that decides it",
                "Given an error message, retrieve a forum post that explains its cause",
                "Given a claim about nutrition, retrieve a report of a study that tests it",
                "Given a place and a season, retrieve a traveller's account of a visit",
                "Given a job title, retrieve the description of a fitting vacancy",
            ),
        ),
        "long-short": _Sides(
            "a text, such as a review, a message, a report or an article",
            "a label, a title or a statement in a few words",
            ("1 to 3", "about 6", "about 12"),
            ("a personal message", "a report in a neutral tone", "an opinion", "a story"),
            (
                "Given a complaint of a customer, retrieve the department that handles it",
                "Given the abstract of a paper, retrieve its field of research",
                "Given a review of a film, retrieve the mood that its writer was left in",
                "Given a weather report, retrieve the warning that follows from it",
                "Given a news article, retrieve a headline for it",
                "Given the plot of a novel, retrieve its genre",
                "Given a description of a bug, retrieve the component that contains it",
                "Given a letter to a doctor, retrieve the main symptom",
            ),
        ),
        "short-short": _Sides(
            "a sentence or a phrase",
            "a sentence or a phrase of the same kind",
            ("about 4", "about 8", "about 15"),
            _QUESTIONS,
            (
                "Given a question, retrieve another question with the same answer",
                "Given a proverb, retrieve a plain sentence with the same meaning",
                "Given a company, retrieve one of its competitors",
                "Given an observation, retrieve an action that follows from it",
                "Given a tweet, retrieve a fitting reply",
                "Given a technical term, retrieve the everyday word for it",
                "Given a premise, retrieve a conclusion that holds",
                "Given the title of a book, retrieve the title of its sequel",
            ),
        ),
    }
)
_LENGTHS: Mapping[Shape, tuple[str, ...]] = MappingProxyType(
    {
        "short-long": ("at most 5 words", "5 to 12 words", "12 to 25 words"),
        "long-short": ("about 60 words", "about 120 words", "about 250 words"),
        "short-short": ("at most 5 words", "5 to 12 words", "12 to 25 words"),
    }
)
_CLARITIES = ("clear and complete", "understandable with some effort", "vague, as people write in a hurry")
_DIFFICULTIES = ("what pupils learn", "what students learn", "what only specialists know")


def brainstorm(shape: Shape, number: int, seed: int) -> Request:
    """Ask for tasks of a shape."""
    sides = _SIDES[shape]
    order = sorted(sides.tasks, key=lambda task: drawn(str(seed), shape, str(number), task))
    shown = "\n".join(f"- {task}" for task in order[:NUM_SHOWN])
    prompt = f"""Think of tasks for a system that compares texts by their meaning.
In each task the input is {sides.query}, and the system finds {sides.document}. For example:
{shown}

Name {NUM_TASKS} other tasks of this form. Each is one sentence that begins with "Given" and says what the \
input is and what is to be found. Cover fields of life, work and science that lie far apart. Name no data \
set, and repeat no example.
Answer with a JSON object that has one key, "tasks": a list of {NUM_TASKS} strings."""
    return Request("tasks", shape, number, prompt)


def example(task: str, shape: Shape, number: int, seed: int, languages: Sequence[str]) -> Request:
    """Ask for an example of a task, in one of the languages (keys of `LANGUAGES`)."""

    def one_of(what: str, choices: Sequence[str]) -> str:
        return choices[drawn(str(seed), shape, task, str(number), what) % len(choices)]

    sides = _SIDES[shape]
    language = one_of("language", languages)
    words = one_of("words", sides.words)
    prompt = f"""A system for comparing texts has this task: {task}.
Write one example of it. Answer with a JSON object that has three strings:
- "query": {sides.query}. Write {one_of("form", sides.forms)} of {one_of("length", _LENGTHS[shape])}. It is \
{one_of("clarity", _CLARITIES)}.
- "positive": {sides.document} of {words} words. It is exactly what the task asks for with this query.
- "negative": {sides.document} of {words} words. At first sight it seems right, because it has the subject \
or the words of the query. It is not what the task asks for.

All three are in {LANGUAGES[language]} and stand alone: none mentions the others, this task or an example. \
To tell right from wrong one needs {one_of("difficulty", _DIFFICULTIES)}. "positive" says things in other \
words than "query". Invent the content: quote no existing text."""
    return Request("example", shape, number, prompt, task, language)


def tasks_of(answer: str) -> list[str]:
    """The tasks in an answer to `brainstorm`. Raises ValueError if it is none."""
    match _object(answer):
        case {"tasks": list(tasks)} if tasks and all(isinstance(task, str) for task in tasks):
            found = [" ".join(task.split()).rstrip(".") for task in tasks]
            low, high = TASK_CHARACTERS
            return [task for task in found if low <= len(task) <= high]
    raise ValueError("no object with a list of tasks")


def example_of(answer: str) -> Example:
    """The texts in an answer to `example`. Raises ValueError if it is none."""
    match _object(answer):
        case {"query": str(query), "positive": str(positive), "negative": str(negative)}:
            found = Example(query.strip(), positive.strip(), negative.strip())
            if all(found):
                return found
    raise ValueError("no object with query, positive and negative")


def _object(answer: str) -> Any:
    """The JSON object of an answer. What stands around it, such as a fence of code, is passed over."""
    found = re.search(r"\{.*\}", answer, re.S)
    try:
        value = json.loads(found[0]) if found else None
        json.dumps(value, ensure_ascii=False).encode()  # an escape may give half a character
    except (ValueError, RecursionError) as error:
        raise ValueError("no JSON object") from error
    return value
