"""The code on the pages of docs/integrations/ runs."""

import pytest
from test_docs import DOORS, blocks, python_blocks


@pytest.mark.parametrize("page", [p for p in DOORS if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page, tiny_directory, tmp_path, monkeypatch):
    """In order and in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    programs, names = python_blocks(page, tiny_directory), {}
    assert any(str(tiny_directory) in p for p in programs), "no model was replaced: would it be downloaded?"
    for program in programs:
        exec(program, names)
