"""Make training pairs from the standard library's docstrings: the first sentence finds the rest.

    python examples/docstring_pairs.py -o pairs.jsonl --number 2000

A pair is a line {"query", "pos", "neg"}. Its negatives are the rests of other docstrings of the same file.
The same Python writes the same bytes. The recipes recipes/smollm2-*.toml train on them.
"""

import argparse
import ast
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "__pycache__",
}
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
MIN_QUERY_WORDS, MIN_WORDS, MAX_WORDS = 3, 8, 200


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="a file of JSON lines")
    parser.add_argument("--number", type=int, default=2000, help="of pairs [%(default)s]")
    parser.add_argument("--negatives", type=int, default=3, help="of a pair [%(default)s]")
    arguments = parser.parse_args(argv)
    found = sorted(records(arguments.negatives), key=lambda r: order(r["query"]))
    if len(found) < arguments.number:
        parser.error(f"the standard library gives {len(found)} pairs: ask for fewer than {arguments.number}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with open(arguments.output, "w", encoding="utf-8") as file:
        for record in found[: arguments.number]:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    print(f"{arguments.output}: {arguments.number} of {len(found)} pairs")


def records(num_negatives: int) -> Iterator[dict]:
    """Every pair, with the rests of other docstrings of its file as negatives."""
    queries, documents = set(), set()
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if SKIPPED & set(path.relative_to(library).parts):
            continue
        pairs = []
        for query, document in map(split, docstrings(path)):
            if is_useful(query, document) and query not in queries and document not in documents:
                pairs.append((query, document))
                queries.add(query)
                documents.add(document)
        for query, document in pairs:
            others = sorted((d for _, d in pairs if d != document), key=lambda d: order(query + d))
            if len(others) >= num_negatives:
                yield {"query": query, "pos": [document], "neg": others[:num_negatives]}


def docstrings(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes of old files
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    return [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]


def split(docstring: str) -> tuple[str, str]:
    """The first sentence and the rest, each in one line."""
    first, _, rest = docstring.partition("\n\n")
    words = " ".join(first.split())
    if sentence := re.match(r"(.+?[.!?])\s+(?=[A-Z])", words):
        rest, words = f"{words[sentence.end() :]} {rest}", sentence[1]
    return words, " ".join(rest.split()[:MAX_WORDS])


def is_useful(query: str, document: str) -> bool:
    return len(query.split()) >= MIN_QUERY_WORDS and len(document.split()) >= MIN_WORDS


def order(text: str) -> bytes:
    """Sorts texts at random, and always alike."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


if __name__ == "__main__":
    main()
