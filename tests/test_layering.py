"""The architecture, as a test: who may import what, and what every kernel comes with."""

import ast
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from nvembed_fast import ops
from nvembed_fast.kernels import library, reference

ROOT = Path(__file__).resolve().parents[1]
KERNEL_SUPPORT = {
    "_common",
    "errors",
    "layout",
    "library",
    "modes",
    "reference",
    "streams",
    "testing",
    "tuned",
}
KERNELS = sorted(p.stem for p in ROOT.glob("kernels/*.py") if p.stem not in KERNEL_SUPPORT)

# kernels/: what a file may import from the project, and what it does import from outside the standard library
KERNEL_FILES = {
    "errors": ({"layout"}, {"torch"}),
    "layout": ({"streams"}, {"numpy", "torch"}),
    "streams": (set(), {"torch"}),
    "modes": (set(), {"torch"}),
    "reference": ({"errors", "layout"}, {"einops", "torch"}),
    "library": ({"errors", "layout", "modes", "reference"}, {"torch"}),
    "_common": ({"tuned"}, {"torch", "triton"}),
    "tuned": (set(), set()),
    "testing": ({"layout", "reference"}, {"numpy", "torch"}),
} | {stem: ({"_common", "errors", "layout", "tuned"}, {"torch", "triton"}) for stem in KERNELS}

# nvembed_fast/: a room is a file, or a folder with all below it. Per room: what it may import of the package
# beside itself, and what it does import from elsewhere. A folder's files have a line each in FOLDER_FILES
GROUND = {"baselines", "config", "files", "fingerprint", "ops", "packages", "packing", "placement"}
GROUND |= {"precision", "self_check", "texts", "tokenization", "topk", "vectors", "verdicts"}
BELOW_ENCODER = GROUND | {"checkpoint", "network"}
INFERENCE = {"corpus", "encoder", "graphs", "legacy", "new_model", "stream", "warm_up"}
TRAINING = {"checkpoint", "files", "fingerprint", "network", "new_model", "ops", "packing", "placement"}
TRAINING |= {"config", "texts", "tokenization"}
CURATION = {"baselines", "encoder", "corpus", "topk", "texts", "files", "packages"}
INTEGRATIONS = {
    "config",
    "corpus",
    "checkpoint.hub",
    "checkpoint.pipeline",
    "encoder",
    "legacy",
    "network",
    "ops",
    "packing",
    "stream",
    "tokenization",
}
EVALUATION = {"baselines", "encoder", "files", "packages", "integrations.mteb"}
SERVING = {"encoder", "graphs", "stream", "fingerprint"}
EVERYTHING = BELOW_ENCODER | INFERENCE | {"curation", "evaluation", "integrations", "serving", "training"}
WALLS = {
    "baselines": (GROUND, {"bm25s", "numpy", "safetensors", "tokenizers", "torch", "transformers"}),
    "config": (GROUND, set()),
    "files": (GROUND, set()),
    "fingerprint": (GROUND, {"numpy"}),
    "ops": (GROUND, {"torch"}),
    "packages": (GROUND, set()),
    "packing": (GROUND, {"numpy", "torch"}),
    "placement": (GROUND, {"torch"}),
    "precision": (GROUND, {"numpy"}),
    "self_check": (GROUND, {"torch"}),
    "texts": (GROUND, set()),
    "tokenization": (GROUND, {"numpy", "tokenizers"}),
    "topk": (GROUND, {"numpy", "torch"}),
    "vectors": (GROUND, {"numpy"}),
    "verdicts": (GROUND, {"filelock", "torch", "triton"}),
    "network": ({"config", "ops", "packing"}, None),
    "checkpoint": ({"config", "files", "network", "packages", "placement", "tokenization"}, None),
    "corpus": (BELOW_ENCODER | INFERENCE, None),
    "encoder": (BELOW_ENCODER | INFERENCE, {"numpy", "torch", "tqdm", "transformers"}),
    "graphs": (BELOW_ENCODER | INFERENCE, {"numpy", "torch"}),
    "legacy": (BELOW_ENCODER | INFERENCE, {"torch"}),
    "new_model": (BELOW_ENCODER | INFERENCE, {"torch"}),
    "stream": (BELOW_ENCODER | INFERENCE, {"numpy", "torch", "tqdm"}),
    "warm_up": (BELOW_ENCODER | INFERENCE, {"numpy", "torch"}),
    "training": (TRAINING, None),
    "curation": (CURATION, None),
    "evaluation": (EVALUATION, None),
    "integrations": (INTEGRATIONS, None),
    "serving": (SERVING, None),
    "__init__": (BELOW_ENCODER | INFERENCE | {"integrations.transformers"}, set()),
    "cli": (EVERYTHING | {"__init__"}, None),
    "__main__": ({"cli"}, set()),
}
FOLDER_FILES: dict[str, set[str]] = {
    "checkpoint.__init__": set(),
    "checkpoint.adapters": {"safetensors", "torch"},
    "checkpoint.decoders": {"torch"},
    "checkpoint.demo": {"safetensors", "torch"},
    "checkpoint.gguf": {"gguf", "numpy", "tokenizers", "torch"},
    "checkpoint.gguf_reader": {"gguf", "numpy"},
    "checkpoint.hub": {"huggingface_hub"},
    "checkpoint.load": {"safetensors", "torch", "tqdm"},
    "checkpoint.names": set(),
    "checkpoint.pipeline": set(),
    "checkpoint.sampling": {"numpy", "safetensors", "torch"},
    "checkpoint.save": {"safetensors", "torch"},
    "cli.__init__": set(),
    "cli.ablate": set(),
    "cli.check": {"numpy", "torch"},
    "cli.convert": set(),
    "cli.curate": set(),
    "cli.embedding": {"numpy", "torch"},
    "cli.encode": set(),
    "cli.evaluate": set(),
    "cli.info": {"torch"},
    "cli.init": set(),
    "cli.merge": set(),
    "cli.mine": {"numpy", "torch"},
    "cli.mteb": set(),
    "cli.options": set(),
    "cli.partial": {"numpy"},
    "cli.process": {"torch"},
    "cli.search": {"numpy", "torch"},
    "cli.synthesize": {"py3langid", "torch"},
    "cli.train": set(),
    "cli.warm_up": set(),
    "evaluation.__init__": set(),
    "evaluation.ablation": {"torch"},
    "evaluation.ablation_report": set(),
    "evaluation.docstrings": {"numpy"},
    "evaluation.report": {"matplotlib"},
    "evaluation.scores": {"numpy", "sklearn"},
    "evaluation.tasks": {"pyarrow"},
    "curation.__init__": set(),
    "curation.cleaning": {"numpy"},
    "curation.curate": set(),
    "curation.decontamination": {"numpy"},
    "curation.dictionaries": set(),
    "curation.docstrings": set(),
    "curation.engines": {"llguidance", "numpy", "torch", "transformers"},
    "curation.labelled": set(),
    "curation.manifest": set(),
    "curation.passages": set(),
    "curation.questions": set(),
    "curation.scripture": set(),
    "curation.sections": set(),
    "curation.services": {"yaml"},
    "curation.sources": set(),
    "curation.synthesis": set(),
    "curation.templates": set(),
    "curation.text": set(),
    "curation.mining": {"numpy"},
    "curation.prompts": set(),
    "curation.public": set(),
    "curation.teachers": {"numpy", "torch"},
    "integrations.__init__": set(),
    "integrations.datasets": {"datasets", "huggingface_hub"},
    "integrations.sentence_transformers": {"numpy", "safetensors", "sentence_transformers", "torch"},
    "integrations.mteb": {"datasets", "mteb", "numpy", "sklearn", "torch"},
    "integrations.transformers": {"torch", "transformers"},
    "network.__init__": set(),
    "network.latent_head": {"einops", "torch"},
    "network.lora": {"torch"},
    "network.mistral": {"torch"},
    "network.model": {"torch"},
    "network.pooling_heads": {"einops", "torch"},
    "training.__init__": set(),
    "training.batch": {"numpy", "torch"},
    "training.converters": set(),
    "training.auxiliary_losses": {"torch"},
    "training.gather": {"torch"},
    "training.grad_cache": {"numpy", "torch"},
    "training.loss": {"torch"},
    "training.merge_weights": {"safetensors", "torch"},
    "training.mix": {"numpy"},
    "training.recipe": set(),
    "training.checkpoints": {"safetensors", "torch"},
    "training.ranks": {"torch"},
    "training.run_log": {"matplotlib", "numpy", "torch", "tqdm"},
    "training.start": {"torch"},
    "training.teacher_vectors": {"numpy", "torch"},
    "training.trainer": {"torch"},
    "training.rows": {"pyarrow"},
}
# a file that may import more than its room
BEYOND = {
    "curation.decontamination": {"evaluation.docstrings", "evaluation.tasks"},
    "curation.scripture": {"evaluation.tasks"},
    "evaluation.ablation": {"curation", "training"},
}
LATE_IMPORTS = {"gguf", "pyarrow", "transformers", "triton"}  # in nvembed_fast/, inside a function only


def _imports(path: Path, top_level: bool = False) -> set[str]:
    """Dotted names that a file imports. `from package import module` counts as package.module."""
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


def _package_files() -> dict[str, list[Path]]:
    """Room -> its files, subfolders included. The kernels have a test of their own."""
    rooms = defaultdict(list)
    for path in sorted(ROOT.glob("nvembed_fast/**/*.py")):
        first = path.relative_to(ROOT / "nvembed_fast").parts[0]
        if first != "kernels":
            rooms[first.removesuffix(".py")].append(path)
    return rooms


ROOMS = _package_files()


def _room(module: str) -> str:
    """nvembed_fast.network.model -> network.model. The package itself is __init__."""
    return module.removeprefix("nvembed_fast").removeprefix(".") or "__init__"


def test_every_package_file_is_in_a_room():
    assert set(ROOMS) <= set(WALLS), f"tests/test_layering.py has no wall for {set(ROOMS) - set(WALLS)}"


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_what_its_wall_allows(room):
    allowed, packages = WALLS[room]
    # ops is the only place that chooses an implementation; everyone else knows layout, modes and streams, and
    # the self-check what results are compared with
    chosen, compared = {"errors", "library", "reference", *KERNELS}, {"reference", "testing"}
    kernels = {"layout", "modes", "streams"} | {"ops": chosen, "self_check": compared}.get(room, set())
    # an integration may import no other, and kinds of rooms below another know no sibling
    theirs = set()
    for path in ROOMS[room]:
        ours, from_elsewhere = _split(_imports(path))
        theirs |= from_elsewhere
        for module in map(_room, ours):
            first, _, rest = module.partition(".")
            if first == "kernels":
                assert rest in kernels, f"{path.name} imports the kernel {rest}: only ops.py may"
            elif first == "integrations" == room:
                assert module == f"integrations.{path.stem}", f"{path.name} imports {module}"
            else:
                reach = allowed | BEYOND.get(f"{room}.{path.stem}", set())
                fits = first == room or first in reach or module in reach
                assert fits, (
                    f"{path.relative_to(ROOT)} imports nvembed_fast.{module}, which is beyond its wall"
                )
        ours, early = _split(_imports(path, top_level=True))
        # a door is imported where it is opened
        assert room == "integrations" or not early & LATE_IMPORTS, path
        assert not ours & {f"nvembed_fast.kernels.{stem}" for stem in KERNELS}, f"{path}: they import triton"
    assert packages is None or theirs == packages


@pytest.mark.parametrize("file", sorted(FOLDER_FILES))
def test_a_file_of_a_folder_imports_its_packages(file):
    path = ROOT.joinpath("nvembed_fast", *file.split(".")).with_suffix(".py")
    assert _split(_imports(path))[1] == FOLDER_FILES[file]


DOORS = {"datasets", "mteb", "peft", "sentence_transformers"}  # the core works without them
BROUGHT = {"mteb": {"datasets"}}  # a task of mteb holds its data as tables of datasets


def test_a_library_has_one_door():
    for path in (p for files in ROOMS.values() for p in files):
        is_door = path.parent.name == "integrations"
        own = {path.stem} | BROUGHT.get(path.stem, set()) if is_door else set()
        assert not _split(_imports(path))[1] & DOORS - own, path


def test_every_file_of_a_folder_states_its_packages():
    files = {f"{room}.{path.stem}" for room in ROOMS for path in ROOMS[room] if path.parent.name == room}
    assert files == set(FOLDER_FILES)


def test_the_page_states_the_walls():
    """docs/layout.md and WALLS agree, room by room."""
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", (ROOT / "docs" / "layout.md").read_text(), re.M)
    stated = {}
    for first, second in rows:
        rooms, allowed = (set(re.findall(r"`([\w.]+)`", cell)) for cell in (first, second))
        allowed |= (rooms if "each other" in second else set()) | (
            GROUND if "the ground," in second else set()
        )
        stated |= dict.fromkeys(rooms, allowed)
    assert stated == {room: WALLS[room][0] for room in WALLS if room not in ("__init__", "__main__", "cli")}


def test_no_package_file_imports_itself_through_others():
    """An order in which every file comes behind those it imports."""
    graph = {}
    for path in (p for files in ROOMS.values() for p in files):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = _split(_imports(path, top_level=True))[0] - {name}
    assert tuple(graphlib.TopologicalSorter(graph).static_order())


def _private_names(path: Path) -> tuple[set[str], set[str]]:
    """Names with one underscore in front: (those that a file binds, those that it takes from elsewhere)."""
    bound, taken = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                bound.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()):
                bound.add(name)
            case (
                ast.Attribute(attr=name)
                | ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=name), *_])
            ):
                taken.add(name)
            case ast.ImportFrom(module=module, names=aliases) if module != "nvembed_fast.kernels":
                taken |= {alias.name for alias in aliases}
    return tuple({n for n in names if re.match("_(?!_)", n)} for names in (bound, taken))


def test_no_file_takes_a_private_name_of_another():
    """Tests may. `tools/` may take the launchers of kernels, which it compiles."""
    folders = ("nvembed_fast", "kernels", "bench", "tools", "examples")
    paths = {p.relative_to(ROOT) for folder in folders for p in ROOT.glob(f"{folder}/**/*.py")}
    names = {path: _private_names(ROOT / path) for path in paths if path.parts[1] != "kernels"}
    ours = set().union(*(bound for bound, _ in names.values())) - set(dir(torch.Tensor))
    for path, (bound, taken) in names.items():
        found = {n for n in taken & ours - bound if path.parts[0] != "tools" or not n.startswith("_launch_")}
        assert not found, f"{path} takes {sorted(found)} from another file: make it public, or ask for less"


@pytest.mark.parametrize("folder", ["nvembed_fast", "kernels", "tests", "bench", "tools", "examples"])
def test_the_kernels_have_one_import_name(folder):
    """`kernels` is also a package on PyPI: see test_packaging.py."""
    for path in ROOT.glob(f"{folder}/**/*.py"):
        assert "kernels" not in {name.split(".")[0] for name in _imports(path)}, path


@pytest.mark.parametrize("stem", KERNELS)
def test_a_kernel_has_its_reference_test_and_bench(stem):
    module = importlib.import_module(f"nvembed_fast.kernels.{stem}")
    assert module.__all__ == sorted(module.__all__) and module.__all__
    for name in module.__all__:
        signature = inspect.signature(getattr(reference, name))
        for owner in (module, library):
            assert inspect.signature(getattr(owner, name)) == signature, name
        assert inspect.signature(getattr(ops, name)) == signature, name
    assert (ROOT / f"tests/test_{stem}.py").exists()
    assert (ROOT / f"bench/bench_{stem}.py").exists()


def test_every_operation_has_a_kernel():
    public = {n for s in KERNELS for n in importlib.import_module(f"nvembed_fast.kernels.{s}").__all__}
    assert set(ops.OPERATIONS) == public


@pytest.mark.parametrize("library", ["mteb", "sentence_transformers"])
def test_a_missing_library_is_named_with_its_extra(library, monkeypatch):
    class Missing:
        @staticmethod
        def find_spec(name: str, *_) -> None:
            if name == library:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    door = f"nvembed_fast.integrations.{library}"
    for name in [name for name in sys.modules if name.split(".")[0] == library or name == door]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    extra = library.replace("_", "-")
    with pytest.raises(ImportError, match=rf"pip install 'nvembed-fast\[{extra}\]'"):
        importlib.import_module(f"nvembed_fast.integrations.{library}")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extra in extras


@pytest.mark.parametrize("package", ["triton", "transformers"])
def test_importing_the_package_leaves_out(package):
    # the star resolves every public name: they are imported at their first use
    code = f"import sys; from nvembed_fast import *; NVEmbed; sys.exit({package!r} in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"import nvembed_fast imports {package} {run.stderr[-2000:]}"


def _map() -> dict[str, str]:
    """path -> description, from the fenced block below "## Map" of docs/layout.md."""
    page = (ROOT / "docs" / "layout.md").read_text()
    block = re.search(r"^## Map\n.*?^```\w*\n(.*?)^```", page, re.M | re.S)
    assert block, 'docs/layout.md has no fenced block below "## Map"'
    lines = [line.split(maxsplit=1) for line in block[1].splitlines() if line.strip()]
    assert all(len(line) == 2 for line in lines), "a line of the map is `path   description`"
    return dict(lines)


def test_the_map_equals_the_files():
    entries = _map()
    for path in entries:
        assert (ROOT / path).exists(), f"docs/layout.md names {path}, which is not there"
    files = {p for folder in ("kernels", "nvembed_fast") for p in ROOT.glob(f"{folder}/**/*.py")}
    missing = {str(p.relative_to(ROOT)) for p in files if p.stem != "__init__"} - set(entries)
    missing = {path for path in missing if not path.startswith("nvembed_fast/kernels/")}
    assert not missing, f"docs/layout.md lacks {sorted(missing)}"
    # elsewhere a folder stands for its files
    folders = ("bench", "examples", "tests", "tools")
    for path in (p for folder in folders for p in ROOT.glob(f"{folder}/**/*.py")):
        path = path.relative_to(ROOT)
        covering = {str(path), *(f"{parent}/" for parent in path.parents)}
        assert covering & set(entries), f"docs/layout.md lacks {path}"
