"""Files written aside: whole or absent, in the mode of ordinary files, and nothing left behind."""

import errno
import json
import os
import re
import threading
from pathlib import Path

import pytest
from tiny_checkpoint import intercept

from nvembed_fast import files


def content(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


def save(directory: Path, **contents: str) -> None:
    """Files of a model, of which `key` is the config and those with an `old` in their name are outdated."""
    with files.replacing_together(directory, key="key", outdated=re.compile(".*old.*")) as aside:
        for name, text in contents.items():
            (aside / name).write_text(text)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_a_new_file_has_the_mode_of_an_ordinary_one(tmp_path, mask):
    before = os.umask(mask)
    try:
        (tmp_path / "ordinary").write_text("")
        with files.replacing(tmp_path / "alone") as aside:
            aside.write_text("")
        with files.replacing_together(tmp_path, key="together", outdated=re.compile("")) as folder:
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


def test_the_file_of_a_killed_process_is_removed_and_that_of_a_living_one_stays(tmp_path):
    with files.replacing(tmp_path / "a.txt") as living:
        dead = living.with_name(".a.txt-12345678.part")
        dead.touch()
        with files.replacing(tmp_path / "a.txt") as aside:
            assert living.exists() and not dead.exists()
            aside.write_text("first")
        living.write_text("second")
    assert content(tmp_path) == {"a.txt": "second"}


def crash(when: str, number: int, directory: Path, **contents: str) -> bool:
    """Save in a process that dies around its system call of this number. Returns whether it had so many."""
    calls = 0

    def die():
        nonlocal calls
        calls += 1
        if calls == number:
            os._exit(9)

    if not (child := os.fork()):
        try:
            intercept(pytest.MonkeyPatch(), **{when: die})
            save(directory, **contents)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def visible(directory: Path) -> dict[str, str]:
    return {name: text for name, text in content(directory).items() if not name.startswith(".")}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_process_leaves_the_old_or_the_new_content(tmp_path, when):
    old = {"key": "1", "old_a": "1", "old_b": "1"}
    new = {"key": "2", "old_b": "2", "old_c": "2"}
    newer = {"key": "3", "old_a": "3"}
    outcomes, number = [], 0
    while True:
        number += 1
        directory = tmp_path / str(number)
        save(directory, **old)
        if not crash(when, number, directory, **new):
            break
        found = visible(files.current(directory))
        assert found in (old, new), f"call {number}: {found}"
        assert "key" not in visible(directory) or visible(directory) in (old, new), "a mix that loads"
        outcomes.append(found == new)
        # killed again, at a point that depends on the first: while it finishes the first save, or in its own
        crash(when, 1 + 7 * number % 37, directory, **newer)
        again = visible(files.current(directory))
        assert again in (found, newer), f"call {number}, then {1 + 7 * number % 37}: {again}"
        save(directory, **old)
        assert content(directory) == old, f"call {number}: something was left"
    assert visible(directory) == new and outcomes == sorted(outcomes)
    assert len(outcomes) > 20 and len(set(outcomes)) == 2


def test_the_folder_of_a_living_process_stays(tmp_path):
    with files.replacing_together(tmp_path, key="key", outdated=re.compile("old.*")) as living:
        dead, empty, half_removed = (tmp_path / f".saving-{name}" for name in ("dead", "empty", "half"))
        for folder in (dead, empty, half_removed):
            folder.mkdir()
        (dead / ".plan").touch()
        (dead / "part").touch()
        (half_removed / "part").touch()
        assert files.unfinished(tmp_path) == sorted(p.name for p in (living, dead, empty, half_removed))
        save(tmp_path, key="1", old_part="1")
        assert files.unfinished(tmp_path) == [living.name]
        (living / "key").write_text("2")
    assert content(tmp_path) == {"key": "2"} and not files.unfinished(tmp_path)


def test_a_second_process_waits_until_the_first_has_put_its_files_in_place(tmp_path, monkeypatch):
    link, linking, go_on = os.link, threading.Event(), threading.Event()

    def slow_link(*arguments):
        if threading.current_thread() is first:
            linking.set()
            assert go_on.wait(20)
        link(*arguments)

    first = threading.Thread(target=save, args=(tmp_path,), kwargs={"key": "1", "old_part": "1"})
    second = threading.Thread(target=save, args=(tmp_path,), kwargs={"key": "2", "part": "2"})
    monkeypatch.setattr(os, "link", slow_link)
    first.start()
    assert linking.wait(20)
    second.start()
    second.join(0.2)
    assert second.is_alive() and visible(files.current(tmp_path)) == {"key": "1", "old_part": "1"}
    go_on.set()
    first.join(20)
    second.join(20)
    assert content(tmp_path) == {"key": "2", "part": "2"}


@pytest.mark.parametrize("left", [[], [".plan"], ["key", "old_part"]])
def test_a_saved_folder_from_which_files_were_taken_removes_nothing(tmp_path, left):
    """Who moves the files of `.saved` to their places after a killed save often misses `.plan`."""
    save(tmp_path, key="1", old_part="1")
    (tmp_path / ".saved").mkdir()
    for name in left:
        plan = json.dumps({"key": "key", "outdated": ".*old.*"})
        (tmp_path / ".saved" / name).write_text(plan if name == ".plan" else "2")
    with pytest.raises(FileExistsError, match=r"\.saved is of an earlier save.*save again"):
        save(tmp_path, key="3")
    assert visible(tmp_path) == {"key": "1", "old_part": "1"}
    assert sorted(os.listdir(tmp_path / ".saved")) == sorted(left)


@pytest.mark.parametrize(
    "plan", ["", "[1]", '{"key": "key"}', '{"key": "key", "outdated": "("}', "[" * 99999]
)
def test_a_saved_folder_with_a_damaged_plan_removes_nothing(tmp_path, plan):
    save(tmp_path, key="1", old_part="1")
    (tmp_path / ".saved").mkdir()
    (tmp_path / ".saved" / "key").write_text("2")
    (tmp_path / ".saved" / ".plan").write_text(plan)
    with pytest.raises(FileExistsError, match=r"\.saved is of an earlier save.*save again"):
        save(tmp_path, key="3")
    assert visible(tmp_path) == {"key": "1", "old_part": "1"}


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_what_lies_in_the_place_of_the_saved_folder_is_told(tmp_path, make):
    save(tmp_path, key="1")
    make(tmp_path / ".saved")
    with pytest.raises(FileExistsError, match=r"\.saved is no folder of a save: move it away"):
        save(tmp_path, key="2")
    assert sorted(os.listdir(tmp_path)) == [".saved", "key"] and visible(tmp_path) == {"key": "1"}


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_modes_takes_files(tmp_path, monkeypatch, code):
    def refused(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "chmod", refused)
    save(tmp_path, key="1")
    with files.replacing(tmp_path / "alone") as aside:
        aside.write_text("2")
    assert content(tmp_path) == {"key": "1", "alone": "2"}


def test_a_folder_in_the_place_of_a_file_is_told_before_anything_changes(tmp_path):
    save(tmp_path, key="1", part="1")
    (tmp_path / "other").mkdir()
    with pytest.raises(IsADirectoryError, match="other is a folder"):
        save(tmp_path, key="2", other="2")
    assert content(tmp_path) == {"key": "1", "part": "1"} and files.current(tmp_path) == tmp_path


def test_everything_is_on_the_disk_before_the_rename_that_decides(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(source, target):
        events.append(f"to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    save(tmp_path, key="1", part="1")
    commit = events.index("to .saved")
    assert {"key", "part", ".plan"} < set(events[:commit]) and events[commit - 1].startswith(".saving-")
    assert events[commit + 1 : commit + 3] == [tmp_path.name] * 2, "the commit, and the files in their places"
    assert events[commit + 3].startswith("to .saving-") and events[commit + 4 :] == [tmp_path.name]
    events.clear()
    with files.replacing(tmp_path / "a.txt") as aside:
        aside.write_text("new")
    assert events == [aside.name, "to a.txt", tmp_path.name]


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/file")
    with files.replacing(tmp_path / "link") as aside:
        aside.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file").read_text() == "new"


def test_a_reader_between_two_saves_reads_again(tmp_path):
    def save(content: str) -> None:
        with files.replacing_together(tmp_path, key="key", outdated=re.compile("")) as aside:
            for name in ("key", "value"):
                (aside / name).write_text(content)

    def read(saves: list[str], error: bool = False) -> str:
        key = (tmp_path / "key").read_text()
        if saves:
            save(saves.pop())
            if error:
                raise ValueError("key and value do not fit")
        return key + (tmp_path / "value").read_text()

    save("a")
    assert files.unmixed(tmp_path, "key", lambda: read([])) == "aa"
    for error in (False, True):
        saves = ["c", "b"]
        assert files.unmixed(tmp_path, "key", lambda saves=saves, error=error: read(saves, error)) == "cc"
    with pytest.raises(OSError, match="saved to .* each of the 3 times that it was read: load again later"):
        files.unmixed(tmp_path, "key", lambda saves=list("abc"): read(saves))
    with pytest.raises(FileNotFoundError, match="nothing"):
        files.unmixed(tmp_path, "key", (tmp_path / "nothing").read_text)


def test_a_pipe_behind_a_link_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with pytest.raises(FileExistsError, match="pipe is no ordinary file"), files.replacing(tmp_path / "link"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"] and (tmp_path / "pipe").is_fifo()


def test_a_new_folder_is_whole_or_absent(tmp_path):
    with files.new_folder(tmp_path / "new") as aside:
        (aside / "a").write_text("x")
        assert aside.parent == tmp_path and not (tmp_path / "new").exists()
    assert content(tmp_path) == {"new/a": "x"}
    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error), files.new_folder(tmp_path / "other") as aside:
            (aside / "a").write_text("y")
            raise error
    with pytest.raises(OSError), files.new_folder(tmp_path / "new") as aside:
        (aside / "b").write_text("z")
    # what a killed process leaves: its lock is free
    left = tmp_path / ".saving-killed"
    left.mkdir()
    (left / ".plan").touch()
    (left / "weights").write_text("half")
    with files.new_folder(tmp_path / "second") as aside:
        assert not left.exists() and aside.exists()
    assert content(tmp_path) == {"new/a": "x"} and (tmp_path / "second").is_dir()


def test_one_process_is_alone(tmp_path):
    again = files.alone(tmp_path, ".lock")
    with (
        files.alone(tmp_path, ".lock"),
        pytest.raises(BlockingIOError, match="another process is at work in"),
    ):
        again.__enter__()
    with files.alone(tmp_path, ".lock"):
        pass


def test_the_cache_folder_is_where_the_user_says(monkeypatch):
    """Whatever names it may begin with ~, which only a shell expands."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("NVEMBED_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert files.cache_folder() == Path("/home/me/.cache/nvembed_fast")
    for given, wanted in (("/cache", "/cache/nvembed_fast"), ("~/c", "/home/me/c/nvembed_fast")):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert files.cache_folder() == Path(wanted)
    for given, wanted in (("/own", "/own"), ("~/own", "/home/me/own")):
        monkeypatch.setenv("NVEMBED_FAST_CACHE", given)
        assert files.cache_folder() == Path(wanted)
        assert files.cache_folder("~/mine") == files.cache_folder(Path("~/mine")) == Path("/home/me/mine")
