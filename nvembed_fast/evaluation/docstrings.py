"""Questions about Python's standard library over its docstrings: does a model find what no word leads to?

1. `standard_library` reads the docstring of every function and class out of the running Python's sources.
2. `load` keeps 1,200 of them: every right answer, and others by the sha256 of their text.
3. The committed file has the demo's three questions and 40 more. No model is trained on them.

Another Python has other docstrings, so scores compare within one version.
"""

import ast
import functools
import hashlib
import sysconfig
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

TASK = "Given a question about programming, retrieve the documentation that answers it"
MIN_WORDS = 5
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
FILE = Path(__file__).with_name("docstring_questions.toml")


@dataclass(frozen=True)
class Question:
    """A question, and the docstrings that answer it, as module:qualified.name, such as shutil:rmtree."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Docstrings:
    """The corpus and its questions. `names[i]` is the module:qualified.name of `texts[i]`."""

    names: tuple[str, ...]
    texts: tuple[str, ...]
    questions: tuple[Question, ...]
    right: tuple[frozenset[int], ...]  # of each question, the places of its answers in `texts`

    def hits(self, scores: np.ndarray, k: int = 3) -> list[bool]:
        """Which questions have a right docstring among the k best.

        Args:
            scores: [questions, texts], the larger the nearer. Of equal scores the lower place is the better.

        Raises:
            ValueError: `scores` has another shape, or is not finite.
        """
        wanted = (len(self.questions), len(self.texts))
        if scores.shape != wanted:
            raise ValueError(f"scores must have the shape {wanted} (questions, texts), got {scores.shape}")
        if not np.isfinite(scores).all():
            raise ValueError("scores must be finite")
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k].tolist()
        return [not right.isdisjoint(row) for right, row in zip(self.right, best, strict=True)]


def questions(part: str = "more") -> tuple[Question, ...]:
    """The 40 questions, or the three of the demo (`part="demo"`)."""
    table = tomllib.loads(FILE.read_text("utf-8"))[part]
    return tuple(Question(text, tuple(answers)) for text, answers in table.items())


def min_number() -> int:
    """A number of docstrings that holds all answers, whatever Python runs."""
    return len({a for q in (*questions("demo"), *questions()) for a in q.answers})


def load(
    number: int = 1200,
    asked: tuple[Question, ...] | None = None,
    library: Mapping[str, str] | None = None,
) -> Docstrings:
    """`number` docstrings and the questions over them.

    Args:
        number: of docstrings. All answers are among them, also those of the demo's questions.
        asked: questions of your own. None: the 40.
        library: what `standard_library` has given before, which takes seconds. None: it is called.

    Raises:
        ValueError: a question has no answer in this Python's standard library, or the answers are more than
            `number`.
    """
    asked = questions() if asked is None else asked
    library = standard_library() if library is None else library
    for question in asked:
        if library.keys().isdisjoint(question.answers):
            raise ValueError(f"no answer of {question.text!r} is in this Python's standard library")
    answers = {
        library[a] for q in (*questions("demo"), *questions(), *asked) for a in q.answers if a in library
    }
    if number < len(answers):
        raise ValueError(
            f"number must be {len(answers)} or more, which is how many answers there are, got {number}"
        )
    named = {text: name for name, text in reversed([*library.items()])}
    others = sorted(named.keys() - answers, key=lambda text: hashlib.sha256(text.encode()).digest())
    kept = answers | set(others[: number - len(answers)])
    texts = [text for text in dict.fromkeys(library.values()) if text in kept]
    place = {text: i for i, text in enumerate(texts)}
    return Docstrings(
        names=tuple(named[text] for text in texts),
        texts=tuple(texts),
        questions=asked,
        right=tuple(frozenset(place[library[a]] for a in q.answers if a in library) for q in asked),
    )


def standard_library() -> Mapping[str, str]:
    """The docstring of each function and class as "name: docstring", by its module:qualified.name.

    The order is fixed. Whitespace is folded. Docstrings below five words are skipped. Names may share a text.
    """
    folded = {place: f"{name}: {' '.join(text.split())}" for place, (name, text) in raw().items()}
    return MappingProxyType(folded)


@functools.cache
def raw() -> Mapping[str, tuple[str, str]]:
    """(name, docstring as `ast.get_docstring` gives it) of the same, by the same keys."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.isdisjoint(relative.parts):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            for name, docstring in _documented(tree, ""):
                found.setdefault(f"{module}:{name}", (name.rpartition(".")[2], docstring))
    return MappingProxyType(found)


def _documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            docstring = ast.get_docstring(child) or ""
            if len(docstring.split()) >= MIN_WORDS:
                yield prefix + child.name, docstring
            yield from _documented(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _documented(child, prefix)
