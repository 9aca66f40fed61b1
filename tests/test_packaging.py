"""A wheel, an sdist, an editable install and the bare checkout all import `nvembed_fast.kernels`.

The folder is called kernels/, and so is a package on PyPI that transformers looks for: with an `__init__.py`
in the folder, `from transformers import MistralModel` would fail in the repository's root.
"""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "nvembed_fast", "kernels")
IMPORT = "from nvembed_fast import *; import nvembed_fast.cli; print(nvembed_fast.kernels.reference.__file__)"


def _run(*command: str | Path, cwd: Path, **env: str) -> str:
    run = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return run.stdout.strip()


def _pip(*arguments: str | Path, cwd: Path) -> None:
    _run(sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-build-isolation", "-q", cwd=cwd)


def _python(target: Path, cwd: Path, code: str, before: str = "") -> str:
    """What a program prints when only `target` could hold the project.

    `site` is off, or an editable install in the running environment would answer instead. `before` is a path
    that is searched before it.
    """
    names = ("torch", "numpy", "einops", "tqdm", "tokenizers", "safetensors", "huggingface_hub")
    elsewhere = dict.fromkeys(str(Path(importlib.util.find_spec(n).origin).parents[1]) for n in names)
    # the target first: an editable install elsewhere has a finder of the same name
    first = f"import sys, site; site.addsitedir({str(target)!r}); sys.path += {list(elsewhere)}; "
    return _run(sys.executable, "-S", "-P", "-c", first + code, cwd=cwd, PYTHONPATH=before)


def _imported_from(target: Path, cwd: Path, before: str = "") -> Path:
    """Where `nvembed_fast.kernels.reference` then comes from."""
    return Path(_python(target, cwd, IMPORT, before))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what is packaged: building leaves files behind, and not in the repository."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, copy / name)
    assert (copy / "nvembed_fast" / "kernels").is_symlink()
    (copy / "tests").mkdir()
    (copy / "tests" / "test_planted.py").touch()
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", ".", "-w", folder, cwd=checkout)
    (path,) = folder.glob("*.whl")
    return path


def _files() -> set[str]:
    """Every file of the project, by its path in a wheel. The link nvembed_fast/kernels is not followed."""
    files = {p.relative_to(ROOT) for p in ROOT.glob("nvembed_fast/**/*") if p.is_file()}
    files = {p for p in files if "kernels" not in p.parts}
    files |= {"nvembed_fast" / p.relative_to(ROOT) for p in ROOT.glob("kernels/**/*") if p.is_file()}
    return {str(p) for p in files if "__pycache__" not in p.parts}


def test_the_wheel_holds_every_file_and_nothing_else(wheel):
    files = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert {"nvembed_fast/encoder.py", "nvembed_fast/network/model.py", "nvembed_fast/py.typed"} < files
    assert {"nvembed_fast/kernels/reference.py", "nvembed_fast/kernels/tuned.toml"} < files
    assert files == _files()


def test_the_wheel_holds_the_licence(wheel):
    assert any(n.endswith("licenses/LICENSE") for n in zipfile.ZipFile(wheel).namelist())


def test_the_wheel_imports(wheel, tmp_path):
    target = tmp_path / "target"
    _pip("install", "--target", target, wheel, cwd=tmp_path)
    assert _imported_from(target, tmp_path) == target / "nvembed_fast" / "kernels" / "reference.py"
    command = target / "bin" / "nvembed-fast"
    assert command.exists()


@pytest.mark.slow
def test_the_wheel_holds_the_demo_model(wheel, smollm2_file, tmp_path):
    target = tmp_path / "target"
    _pip("install", "--target", target, wheel, cwd=tmp_path)
    code = (
        "from nvembed_fast import NVEmbed; from nvembed_fast.checkpoint import demo; print(demo.SHIPPED); "
        "print(*NVEmbed.from_pretrained('demo', device='cpu').encode(['a text']).shape)"
    )
    place = target / "nvembed_fast" / "demo"
    assert _python(target, tmp_path, code).splitlines() == [str(place), "1 576"]


def test_the_wheel_states_version_licence_and_requirements(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    init = (ROOT / "nvembed_fast" / "__init__.py").read_text()
    stated = next(line for line in metadata.splitlines() if line.startswith("Version: "))
    version = stated.removeprefix("Version: ")
    assert f'__version__ = "{version}"' in init
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[(\d[^]]*)]", changes, re.M)[1] == version, (
        "CHANGELOG's newest version is another"
    )
    for line in (
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.11",
        "Requires-Dist: torch>=2.11",
        "Requires-Dist: transformers>=5.13",
        'Requires-Dist: triton>=3.6; platform_system == "Linux"',
    ):
        assert line in metadata.splitlines()


def test_a_wheel_made_from_the_sdist_is_the_same(checkout, wheel, tmp_path):
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    _run(sys.executable, "-c", code, cwd=checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    # setuptools' own choice would be those called test_*.py, without what they need
    assert not (unpacked / "tests").exists()
    assert (unpacked / "kernels").is_dir() and not (unpacked / "nvembed_fast" / "kernels").exists()
    _pip("wheel", ".", "-w", tmp_path / "again", cwd=unpacked)
    (again,) = (tmp_path / "again").glob("*.whl")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_an_editable_install_imports(checkout, tmp_path):
    target = tmp_path / "target"
    _pip("install", "--target", target, "-e", checkout, cwd=tmp_path)
    got = _imported_from(target, tmp_path).resolve()
    assert got == checkout / "kernels" / "reference.py"
    # a script beside a clone of this name: the clone's own folder must not be taken for the package
    (tmp_path / "nvembed_fast").symlink_to(checkout)
    got = _imported_from(target, tmp_path, before=str(tmp_path)).resolve()
    assert got == checkout / "kernels" / "reference.py"


def test_the_bare_checkout_imports(checkout):
    got = Path(_run(sys.executable, "-c", IMPORT, cwd=checkout)).resolve()
    assert got == checkout / "kernels" / "reference.py"


def test_transformers_imports_from_the_root_beside_the_kernels_package():
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.fail("the PyPI package kernels is not installed, so this test would prove nothing: make venv")
    code = "import kernels; from transformers import MistralModel; print(kernels.__file__)"
    found = Path(_run(sys.executable, "-c", code, cwd=ROOT))
    assert ROOT / "kernels" not in found.parents, "the folder took the place of the package"


def _imported(path: Path) -> set[str]:
    """The first names of all modules that a file imports at once."""
    tree = ast.parse(path.read_text())
    names = [a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


def test_to_collect_the_tests_takes_the_requirements_and_pytest():
    """`pytest -m gpu` in a bare checkout collects all files: one import error, and no test runs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {re.match(r"\w+", name)[0] for name in project["dependencies"]}
    # two that huggingface_hub brings
    known |= {
        "pytest",
        "filelock",
        "yaml",
        "nvembed_fast",
        "bench",
        "tools",
        "examples",
    } | sys.stdlib_module_names
    todo, seen = [*ROOT.glob("tests/test_*.py"), ROOT / "tests" / "conftest.py"], set()
    while todo:
        path = todo.pop()
        seen.add(path)
        for name in _imported(path) - known:
            found = [ROOT / "tests" / f"{name}.py", *ROOT.glob(f"tests/{name}/*.py")]
            found = [helper for helper in found if helper.exists()]
            assert found, f"{path.name} imports {name}"
            todo += set(found) - seen - set(todo)
    assert len(seen) > 100


def test_the_folder_stays_a_namespace():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "nvembed_fast" / "kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"
