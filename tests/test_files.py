"""Files written aside: whole or absent, in the mode of ordinary files, and nothing left behind."""

import os
from pathlib import Path

import pytest

from nvembed_fast import files


def content(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


def save(directory: Path, **contents: str) -> None:
    """Files of a model, of which `key` is the config and those with an `old` in their name are outdated."""
    with files.replacing_together(directory, key="key", is_outdated=lambda name: "old" in name) as aside:
        for name, text in contents.items():
            (aside / name).write_text(text)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_a_new_file_has_the_mode_of_an_ordinary_one(tmp_path, mask):
    before = os.umask(mask)
    try:
        (tmp_path / "ordinary").write_text("")
        with files.replacing(tmp_path / "alone") as aside:
            aside.write_text("")
        with files.replacing_together(tmp_path, key="together", is_outdated=lambda _: False) as folder:
            (folder / "together").touch(0o600)
        assert os.umask(mask) == mask, "the process's mask was changed"
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("ordinary", "alone", "together"), 0o666 & ~mask)


@pytest.mark.parametrize("existed", [True, False])
def test_a_file_is_replaced_when_the_block_ends(tmp_path, existed):
    target = tmp_path / "a.txt"
    if existed:
        target.write_text("old")
    with files.replacing(target) as aside:
        aside.write_text("new")
        assert aside.parent == tmp_path, "on another disk it could not be renamed"
        assert target.exists() == existed and (not existed or target.read_text() == "old")
    assert content(tmp_path) == {"a.txt": "new"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["block", "chmod", "replace"])
def test_an_error_leaves_the_old_file_alone(tmp_path, monkeypatch, where, error):
    def fail(*_):
        raise error

    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(Path, "chmod", fail if where == "chmod" else Path.chmod)
    monkeypatch.setattr(os, "replace", fail if where == "replace" else os.replace)
    with pytest.raises(error), files.replacing(tmp_path / "a.txt") as aside:
        aside.write_text("half")
        if where == "block":
            fail()
    assert content(tmp_path) == {"a.txt": "old"}


def test_files_that_belong_together_replace_the_outdated_ones(tmp_path):
    save(tmp_path / "a" / "b", key="1", old_part="1")
    (tmp_path / "a" / "b" / "notes").write_text("not ours")
    save(tmp_path / "a" / "b", key="2", part="2")
    assert content(tmp_path / "a" / "b") == {"key": "2", "part": "2", "notes": "not ours"}
    assert len(list(tmp_path.rglob("*"))) == 5, "a folder was left"


@pytest.mark.parametrize("existed", [True, False])
def test_an_error_in_the_block_leaves_all_old_files(tmp_path, existed):
    directory = tmp_path / "a" / "b"
    if existed:
        save(directory, key="1", old_part="1")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TypeError, match="must be str"):
        save(directory, key="2", part=3)  # the first file is written by then
    assert sorted(tmp_path.rglob("*")) == before
    assert content(tmp_path) == ({"a/b/key": "1", "a/b/old_part": "1"} if existed else {})
