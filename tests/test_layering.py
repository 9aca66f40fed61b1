"""The architecture, as a test: who may import what, and what every kernel comes with."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nvembed_fast import ops
from nvembed_fast.kernels import reference

ROOT = Path(__file__).resolve().parents[1]
KERNEL_SUPPORT = {"_common", "errors", "layout", "reference", "testing", "tuned"}
KERNELS = sorted(p.stem for p in ROOT.glob("kernels/*.py") if p.stem not in KERNEL_SUPPORT)

# kernels/: what a file may import from the project, and what it does import from outside the standard library
KERNEL_FILES = {
    "errors": (set(), {"torch"}),
    "layout": (set(), {"numpy", "torch"}),
    "reference": ({"layout"}, {"einops", "torch"}),
    "_common": (set(), {"torch", "triton"}),
    "tuned": (set(), set()),
    "testing": ({"layout", "reference"}, {"numpy", "torch"}),
} | {stem: ({"_common", "errors", "layout", "tuned"}, {"torch", "triton"}) for stem in KERNELS}

# nvembed_fast/, from the ground up: (storey, file, packages from elsewhere). A file imports earlier ones only
PACKAGE_FILES = [
    (1, "ops", {"torch"}),
    (1, "packing", {"numpy", "torch"}),
    (2, "config", set()),
    (2, "mistral", {"einops", "torch"}),
    (2, "pooling_heads", {"einops", "torch"}),
    (2, "latent_head", {"einops", "torch"}),
    (3, "model", {"torch"}),
    (3, "graphs", {"numpy", "torch"}),
    (3, "checkpoint", {"huggingface_hub", "safetensors", "torch", "tqdm"}),
    (3, "tokenization", {"numpy", "tokenizers"}),
    (3, "decoders", {"gguf", "numpy", "tokenizers", "torch"}),
    (4, "encoder", {"numpy", "torch", "tqdm", "transformers"}),
    (5, "__init__", set()),
    (6, "cli", {"numpy", "torch"}),
    (6, "__main__", set()),
]
LATE_IMPORTS = {"gguf", "transformers", "triton"}  # in nvembed_fast/, inside a function only


def _imports(path: Path, top_level: bool = False) -> set[str]:
    """Dotted names that a file imports; `from package import module` counts as package.module."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno} imports relatively"
            found |= {_module(node.module, alias.name) for alias in node.names}
    return {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}


def _module(package: str, name: str) -> str:
    path = ROOT.joinpath(*package.split("."), name)
    return f"{package}.{name}" if path.is_dir() or path.with_suffix(".py").exists() else package


def _split(imports: set[str]) -> tuple[set[str], set[str]]:
    """(project modules, third-party packages)."""
    ours = {name for name in imports if name.split(".")[0] == "nvembed_fast"}
    return ours, {name.split(".")[0] for name in imports - ours}


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/*.py")), ids=lambda p: p.stem)
def test_a_kernel_file_knows_tensors_only(path):
    siblings, packages = KERNEL_FILES[path.stem]
    ours, theirs = _split(_imports(path))
    assert ours <= {f"nvembed_fast.kernels.{s}" for s in siblings}
    assert theirs == packages


def test_every_package_file_has_a_storey():
    present = {p.stem for p in ROOT.glob("nvembed_fast/*.py")}
    assert present == {name for _, name, _ in PACKAGE_FILES}
    storeys = [storey for storey, _, _ in PACKAGE_FILES]
    assert storeys == sorted(storeys)


@pytest.mark.parametrize("place", range(len(PACKAGE_FILES)), ids=lambda i: PACKAGE_FILES[i][1])
def test_a_package_file_imports_only_from_below(place):
    _, name, packages = PACKAGE_FILES[place]
    path = ROOT / "nvembed_fast" / f"{name}.py"
    ours, theirs = _split(_imports(path))
    below = {"nvembed_fast" if n == "__init__" else f"nvembed_fast.{n}" for _, n, _ in PACKAGE_FILES[:place]}
    # ops is the only place that chooses an implementation; everyone else knows the layout alone
    known = ("errors", "reference", *KERNELS) if name == "ops" else ("layout",)
    assert ours <= below | {f"nvembed_fast.kernels.{stem}" for stem in known}
    assert theirs == packages
    kernels, early = _split(_imports(path, top_level=True))
    assert not early & LATE_IMPORTS
    assert not kernels & {f"nvembed_fast.kernels.{stem}" for stem in KERNELS}, "they import triton"


@pytest.mark.parametrize("folder", ["nvembed_fast", "kernels", "tests", "bench", "examples"])
def test_the_kernels_have_one_import_name(folder):
    """`kernels` is also a package on PyPI: see test_packaging.py."""
    for path in ROOT.glob(f"{folder}/*.py"):
        assert "kernels" not in {name.split(".")[0] for name in _imports(path)}, path


@pytest.mark.parametrize("stem", KERNELS)
def test_a_kernel_has_its_reference_test_and_bench(stem):
    module = importlib.import_module(f"nvembed_fast.kernels.{stem}")
    assert module.__all__ == sorted(module.__all__) and module.__all__
    for name in module.__all__:
        assert inspect.signature(getattr(module, name)) == inspect.signature(getattr(reference, name)), name
    assert (ROOT / f"tests/test_{stem}.py").exists()
    assert (ROOT / f"bench/bench_{stem}.py").exists()


def test_every_operation_has_a_kernel():
    public = {n for s in KERNELS for n in importlib.import_module(f"nvembed_fast.kernels.{s}").__all__}
    assert ops.OPERATIONS and set(ops.OPERATIONS) <= public


@pytest.mark.parametrize("package", ["triton", "transformers"])
def test_importing_the_package_leaves_out(package):
    code = f"import sys, nvembed_fast; sys.exit({package!r} in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"import nvembed_fast imports {package} {run.stderr[-2000:]}"


def _readme_map() -> dict[str, str]:
    """path -> description, from the fenced block below "## Map"."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"^## Map\n.*?^```\w*\n(.*?)^```", readme, re.M | re.S)
    assert block, 'README.md has no fenced block below "## Map"'
    lines = [line.split(maxsplit=1) for line in block[1].splitlines() if line.strip()]
    assert all(len(line) == 2 for line in lines), "a line of the map is `path   description`"
    return dict(lines)


def test_the_readme_map_equals_the_files():
    entries = _readme_map()
    for path in entries:
        assert (ROOT / path).exists(), f"README.md's map names {path}, which is not there"
    by_name = {p for folder in ("kernels", "nvembed_fast") for p in ROOT.glob(f"{folder}/*.py")}
    missing = {str(p.relative_to(ROOT)) for p in by_name if p.stem != "__init__"} - set(entries)
    assert not missing, f"README.md's map lacks {sorted(missing)}"
    # elsewhere a folder stands for its files
    for path in (p for folder in ("bench", "examples", "tests") for p in ROOT.glob(f"{folder}/*.py")):
        covering = {str(path.relative_to(ROOT)), f"{path.parent.name}/"}
        assert covering & set(entries), f"README.md's map lacks {path.relative_to(ROOT)}"
