"""README, CONTRIBUTING and docs/ say what works: their code runs, their commands, links and paths exist."""

import functools
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from nvembed_fast import cli, ops
from nvembed_fast.kernels import reference

ROOT = Path(__file__).resolve().parents[1]
# their code needs other libraries: tests/integrations/test_pages.py runs it
DOORS = sorted(ROOT.glob("docs/integrations/*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *DOORS]
# every model that a page names; the tests put a tiny one in its place
MODELS = ("nvidia/NV-Embed-v2", "demo")
NOT_OURS = {"export", "git", "hf", "pre-commit", "torchrun"}
FOLDERS = (
    "ablations",
    "nvembed_fast",
    "kernels",
    "bench",
    "tools",
    "tests",
    "docs",
    "examples",
    "recipes",
    ".github",
    ".ci",
)
MADE = ("ablations/results/", "bench/results/")  # a clone need not have it
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def code_spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", without_blocks(page))


def python_blocks(page: Path, model: Path) -> list[str]:
    """The page's programs, with a tiny model in place of the one they name."""
    programs = blocks(page, "python")
    for name in MODELS:
        programs = [
            re.sub(rf'^([^#]*?)"{re.escape(name)}"', rf'\1"{model}"', p, flags=re.M) for p in programs
        ]
    return programs


@each_page
def test_every_block_has_a_language_that_is_tested(page):
    fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0 and set(fences[1::2]) <= {""}
    assert set(fences[::2]) <= {"python", "sh", "text"}, fences


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python") and p not in DOORS], ids=lambda p: p.name
)
def test_python_blocks_run(page, tiny_directory, tmp_path, monkeypatch):
    """In order and in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    programs, names = python_blocks(page, tiny_directory), {}
    assert any(str(tiny_directory) in p for p in programs), "no model was replaced: would it be downloaded?"
    for program in programs:
        exec(program, names)
    if page.name == "README.md":
        assert names["scores"].shape == (1, 2)


def test_the_training_example_lowers_the_loss(tiny_directory, tmp_path, monkeypatch, capsys):
    code, _, checkpointing = python_blocks(ROOT / "docs" / "gradients.md", tiny_directory)
    assert str(tiny_directory) in code
    monkeypatch.chdir(tmp_path)
    losses = []
    # the layers take part in training, so that checkpointing has something to do
    assert "network.head.requires" in code
    code = code.replace("network.head.requires", "network.requires")
    for program in (code, code.replace("def embed", f"{checkpointing}\ndef embed")):
        torch.manual_seed(0)
        exec(program, {})
        losses.append([float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()])
        assert len(losses[-1]) == 5 and losses[-1][-1] < 0.8 * losses[-1][0], losses
        assert (tmp_path / "trained" / "model.safetensors").exists()
    assert losses[0] == losses[1]


def recipes() -> dict[str, str]:
    """Target -> its commands, of the Makefile."""
    found = re.findall(r"^([\w-]+):.*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "test" in dict(found)
    return dict(found)


@functools.cache
def help_of(*command: str) -> str:
    run = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, f"{command}: {run.stderr[-2000:]}"
    return run.stdout


def check_options(command: tuple[str, ...], arguments: list[str]) -> None:
    """Every option is in the command's help, and so is every suite that is named behind --suites."""
    text = help_of(*command)
    suites = False
    for argument in arguments:
        if argument.startswith("-"):
            name = argument.split("=")[0]
            assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), f"{command} has no {name}"
            suites = name == "--suites"
        elif suites:
            assert re.search(rf"\b{re.escape(argument)}\b", text), f"{command} has no suite {argument}"


def check_make(words: list[str]) -> None:
    target = next(word for word in words if "=" not in word)
    assert target in recipes(), f"make {target}"
    for word in words:
        name, _, value = word.partition("=")
        if name == "ARGS":
            found = re.search(r"(-m [\w.]+|\S+\.py) .*\$\((or \$\()?ARGS\)", recipes()[target])
            assert found, f"make {target} takes no ARGS"
            check_options(tuple(found[1].split()), shlex.split(value))
        elif value:
            in_makefile = f"$({name})" in recipes()[target] or f"{name} ?=" in (ROOT / "Makefile").read_text()
            assert in_makefile, f"make {target} takes no {name}"


def run_ours(arguments: list[str], model: Path) -> None:
    """The command nvembed-fast: all of it where it embeds texts, else its options."""
    if arguments[0] in ("encode", "search"):
        if "--model" in arguments:
            place = arguments.index("--model") + 1
            assert arguments[place] in MODELS
            arguments[place] = str(model)
        else:
            arguments += ["--model", str(model)]
        assert cli.main(arguments) == 0
    else:
        check_options(("-m", "nvembed_fast", arguments[0]), arguments[1:])


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "sh")], ids=lambda p: p.name)
def test_shell_blocks_run(page, tiny_directory, tmp_path, monkeypatch):
    (tmp_path / "passages.txt").write_text("one text\nanother one\n")
    monkeypatch.chdir(tmp_path)
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        match words:
            case [] | ["cd", *_]:
                pass
            case ["make", *rest]:
                check_make(rest)
            case ["nvembed-fast", *rest]:
                run_ours(rest, tiny_directory)
            case ["python" | "python3", "-m", "pytest", *_]:
                pass
            case ["python" | "python3", "-m", module, *rest]:
                check_options(("-m", module), rest)
            case ["python" | "python3", script, *rest]:
                check_options((script,), rest)
            case ["pip", "install", *rest]:
                check_install(rest)
            case [other, *_]:
                assert other in NOT_OURS, f"{page.name}: nobody checks {line!r}"


def check_install(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()
    for names in re.findall(r"\.\[([\w,-]+)\]", " ".join(words)):
        assert set(names.split(",")) <= set(extras), names


@each_page
def test_spans_name_what_exists(page):
    """Paths, make targets, options of modules, contracts and operations that a sentence names."""
    for span in code_spans(page):
        words = span.split()
        if re.fullmatch(rf"({'|'.join(map(re.escape, FOLDERS))})/[\w./-]*", span):
            assert (ROOT / span).exists() or span.startswith(MADE), f"{page.name} names {span}"
        elif words[0] == "make" and len(words) > 1:
            check_make(shlex.split(span)[1:])
        elif words[0] in ("python", "python3") and words[1:2] == ["-m"] and words[2] != "pytest":
            check_options(("-m", words[2]), words[3:])
        elif words[0] == "nvembed-fast" and len(words) > 1:
            check_options(("-m", "nvembed_fast", words[1]), words[2:])
        elif match := re.fullmatch(r"(reference|ops)\.(\w+)", span):
            # a file is named like one of its functions
            if match[2] not in ("py", "pyi"):
                assert hasattr({"reference": reference, "ops": ops}[match[1]], match[2]), span
        elif re.fullmatch(r"test_\w+", span):
            found = any(f"def {span}(" in p.read_text() for p in ROOT.glob("tests/**/test_*.py"))
            assert found, f"{page.name} names {span}"


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists() and target.is_relative_to(ROOT), f"{page.name} links to {link}"
            assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"({page.relative_to(ROOT)})" in readme, page.name


def test_the_speed_table_is_that_of_the_results():
    command = [sys.executable, "-m", "bench.report", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_what_the_changelog_calls_moved_is_there():
    """The first name of the second column is imported, down to an attribute of a class."""
    table = (ROOT / "CHANGELOG.md").read_text().split("### Moved")[1].split("###")[0]
    targets = re.findall(r"^\| `.* \| `([\w.]+)`", table, re.MULTILINE)
    assert len(targets) > 10
    for target in targets:
        pkgutil.resolve_name(target)
