"""The project's shell: workflows, forms and hooks parse, and every command in them exists."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
FILES = [*WORKFLOWS, *ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"), ROOT / ".pre-commit-config.yaml"]
FILES += [ROOT / "CITATION.cff"]


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_of_the_shell_parses(path):
    assert isinstance(load(path), dict)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_a_workflow_calls_targets_that_exist(path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    steps = [step for job in load(path)["jobs"].values() for step in job["steps"]]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    commands = [shlex.split(line) for step in steps for line in step.get("run", "").splitlines()]
    called = [word for words in commands if words[0] == "make" for word in words[1:] if "=" not in word]
    assert called and set(called) <= set(targets)


def test_the_tests_run_on_every_python_that_is_supported():
    versions = load(ROOT / ".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python-version"]
    stated = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert versions == stated and PROJECT["requires-python"] == f">={versions[0]}"


def test_a_release_is_tested_before_it_is_built_and_only_a_tag_publishes():
    workflow = load(ROOT / ".github/workflows/release.yml")
    # YAML 1.1 reads the key `on` as true
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    steps = [step.get("run", "") for step in workflow["jobs"]["build"]["steps"]]
    assert steps.index("make test") < steps.index("python -m build")
    assert workflow["jobs"]["publish"]["needs"] == "build"
    assert workflow["jobs"]["publish"]["permissions"] == {"id-token": "write"}


def test_issue_forms_have_the_fields_that_github_asks_for():
    for path in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"):
        if path.name != "config.yml":
            form = load(path)
            assert {"name", "description", "body"} <= set(form), path.name
            for field in form["body"]:
                assert field["type"] == "textarea" and field["attributes"]["label"], path.name


def test_hooks_run_the_ruff_of_make_check():
    (repository,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-format", "ruff-check"]
    assert all(hook["entry"].startswith(".venv/bin/ruff ") for hook in repository["hooks"])


def test_the_citation_names_software_and_paper():
    citation = load(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == PROJECT["license"]
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2405.17428"
