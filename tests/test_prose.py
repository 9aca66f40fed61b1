"""Short sentences: few semicolons in docstrings and docs. README and CONTRIBUTING stay short, too."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("nvembed_fast", "kernels", "bench", "tools", "examples")
MAX_SEMICOLONS = 2  # per 1000 words
MAX_LINES = {"README.md": 120, "CONTRIBUTING.md": 150}


def docstrings(path: Path) -> str:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def prose(text: str) -> str:
    """Without code blocks, code spans and link targets."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]+`|\]\([^)]*\)", " ", text)


def sources() -> dict[str, str]:
    """File -> its prose."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    modules = (p for folder in FOLDERS for p in ROOT.glob(f"{folder}/**/*.py"))
    # nvembed_fast/kernels is a link to kernels/
    modules = {p.resolve(): None for p in modules}
    found = {p: docstrings(p) for p in modules} | {p: p.read_text() for p in pages}
    return {str(p.relative_to(ROOT)): prose(text) for p, text in found.items()}


@pytest.mark.parametrize("kind", [".py", ".md"])
def test_semicolons_are_rare(kind):
    counts = {n: (t.count(";"), len(t.split())) for n, t in sources().items() if n.endswith(kind)}
    semicolons, words = (sum(column) for column in zip(*counts.values(), strict=True))
    assert words > 2000, "too little was read, so this test would prove nothing"
    worst = sorted(counts.items(), key=lambda item: -item[1][0])
    lines = [f"{s:4} in {w:5} words  {name}" for name, (s, w) in worst if s]
    density = 1000 * semicolons / words
    assert density <= MAX_SEMICOLONS, f"{density:.1f} semicolons per 1000 words\n" + "\n".join(lines)


@pytest.mark.parametrize("name", MAX_LINES)
def test_the_first_pages_are_short(name):
    assert len((ROOT / name).read_text().splitlines()) <= MAX_LINES[name]
