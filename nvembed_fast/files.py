"""Files that appear whole or not at all, even if the process is killed or the power fails.

`replacing` is for one file: written aside, synced, then renamed into place. `replacing_together` is for files
that only make sense together, such as a checkpoint's shards and their config. `new_folder` makes a folder.
One rename decides between the old ones and the new ones of `replacing_together`:

1. The new files are written and synced in a folder `.saving-*` inside the directory.
2. That folder is renamed to `.saved`. From here on it is the directory's content, which `current` tells.
3. Links to its files take the places of the old files. The key file leaves first and comes last, so that a
   reader who does not ask `current` finds no mix.
4. `.saved` is renamed back and removed. `current` is the directory again.

A process killed in step 1 or 4 leaves `.saving-*`, and the next save removes it. A process killed in step 3
leaves `.saved`, and the next save finishes its work. A process keeps a lock on the file `.plan` in its folder
as long as it lives, so a folder with a free lock is left over. New files get the mode of ordinary ones.
"""

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import reprlib
import secrets
import shutil
import stat
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

__all__ = [
    "alone",
    "brief",
    "cache_folder",
    "current",
    "expanded",
    "identity",
    "is_at",
    "is_file",
    "link_aside",
    "new_folder",
    "read",
    "read_json",
    "read_toml",
    "replacing",
    "replacing_together",
    "reserve",
    "sha256",
    "unfinished",
    "unmixed",
    "write_all",
]

MAX_JSON_BYTES = 16 * 2**20
_MAX_TOML_BYTES = 2**20
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
T = TypeVar("T")

_UNSUPPORTED = (errno.ENOTSUP, errno.ENOSYS)
_SAVED, _SAVING, _PLAN = ".saved", ".saving-", ".plan"
_TRIES = 3


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give an empty file beside `path` to write to. It takes the place of `path` when the block ends.

    An error or an interruption removes it and leaves `path` as it was. The next call for this path removes
    the file of a killed process. A link stays, and the file that it names is replaced.

    Raises:
        FileExistsError: `path` is a directory, a device or a pipe.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is no ordinary file, so nothing can take its place")
    for name in glob.glob(f".{glob.escape(path.name)}-*.part", root_dir=path.parent):
        with suppress(OSError), open(path.parent / name, "r+b") as left:
            if _lock(left, wait=False):
                (path.parent / name).unlink()
    lock, aside = _locked_file(path)
    with lock:
        try:
            yield aside
            _set_mode(aside, 0o666)
            _sync(aside)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _sync(path.parent)


@contextmanager
def replacing_together(directory: Path, *, key: str, outdated: re.Pattern[str]) -> Iterator[Path]:
    """Give a folder to write to. Its files take their places in `directory` when the block ends.

    An error, an interruption, a kill or a loss of power leaves the content of `directory`, as `current` tells
    it, with all the old files (absent, where it was absent) or with all the new ones.

    Args:
        directory: created, with its parents, if it is not there.
        key: the file without which the directory holds no model. It leaves first and comes last.
        outdated: matches the names of old files that go even if no new ones replace them.

    Raises:
        IsADirectoryError: a folder lies in the place of a new file.
        OSError: the new files are whole and cannot be put into their places. The message names their folder.
    """
    with _created(directory):
        _finish(directory)
        _remove_left(directory)
        lock, aside = _locked_folder(directory)
        with lock:
            try:
                yield aside
                _make_ready(directory, aside, {"key": key, "outdated": outdated.pattern})
                _commit(directory, aside)
                _install(directory, aside)
            except BaseException as error:
                # the disk tells whether they were committed: an interruption may come right after the rename
                if not _is_locked_by(directory / _SAVED, lock):
                    shutil.rmtree(aside, ignore_errors=True)
                    raise
                try:
                    _install(directory, aside)
                except BaseException as again:
                    raise OSError(
                        f"the new model is whole in {directory / _SAVED} and loads from {directory}, but its "
                        f"files cannot take their places ({error!r}, then {again!r}). The next save does so"
                    ) from again
                raise


@contextmanager
def alone(directory: Path, name: str, *, waits: bool = False) -> Iterator[None]:
    """Inside, no other process is in the same block for this directory. A kill ends it, too.

    Args:
        directory: must be there.
        name: of the file in it that is locked, and stays.
        waits: for the end of another process.

    Raises:
        BlockingIOError: another process is there, and `waits` is False.
    """
    with open(directory / name, "a+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is at work in {directory}: wait for its end") from None
        except OSError as error:  # not every file system has locks
            if error.errno not in _UNSUPPORTED:
                raise
        yield


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write to. When the block ends its files are synced, and it is renamed to `path`.

    An error, an interruption, a kill or a loss of power leaves no `path`. The next call in the same parent
    removes the folder of a killed process.

    Raises:
        OSError: `path` is there and not empty.
    """
    _remove_left(path.parent)
    lock, aside = _locked_folder(path.parent)
    with lock:
        try:
            yield aside
            _settle(aside)
            os.replace(aside, path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        (path / _PLAN).unlink(missing_ok=True)  # only now: without its lock the folder would look left over
        _sync(path.parent)


def brief(value: object) -> str:
    """`repr`, but short, also of something large or deep."""
    return _SHORT.repr(value)


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path as the shell would read it, with its ~.

    Raises:
        ValueError: it is empty, and would be the working directory.
    """
    if not os.fspath(path):
        raise ValueError("the path is empty: pass . for the working directory")
    return Path(os.path.expanduser(path))


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the caller, else $NVEMBED_FAST_CACHE, else nvembed_fast in the user's cache directory."""
    if given is None and not (given := os.environ.get("NVEMBED_FAST_CACHE")):
        return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "nvembed_fast"
    return expanded(given)


def is_file(path: Path) -> bool:
    """Whether a file is there. It can be read then, and opening it does not wait.

    Raises:
        FileNotFoundError: a link to nothing is there.
        OSError: it may not be read, or it is a folder, a FIFO or a device. The message names it.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which is not there") from None
        return False
    if kind != stat.S_IFREG:
        raise OSError(f"{path} is {_KINDS.get(kind, 'no ordinary file')}, and a file is wanted")
    with open(path, "rb"):  # PermissionError
        return True


def read(path: Path, max_bytes: int) -> bytes:
    """The content of a file.

    Raises:
        OSError: see `is_file`.
        ValueError: it is larger than `max_bytes`.
    """
    if not is_file(path):
        raise FileNotFoundError(f"{path} is missing")
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(
            f"{path} is larger than {max_bytes / 2**20:.0f} MiB: it cannot be what its name says"
        )
    return content


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file of at most 1 MiB.

    Raises:
        OSError: see `is_file`.
        ValueError: it is too large, or no TOML. The message names the file.
    """
    try:
        return tomllib.loads(read(path, _MAX_TOML_BYTES).decode("utf-8"))
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are some
        raise ValueError(f"{path} is no TOML file: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 16 MiB.

    Raises:
        OSError: see `is_file`.
        ValueError: it is too large or no JSON object, a key stands in an object twice, or a key's value is
            NaN or infinite. The message names the file, and the key where there is one.
    """
    content = read(path, MAX_JSON_BYTES)
    try:
        found = json.loads(content, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path}: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: it must hold an object, found {brief(found)}")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{brief(name)} is listed twice")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{brief(name)} must be a finite number, got {value}")
        found[name] = value
    return found


def current(directory: Path) -> Path:
    """The folder that holds the content of a directory: itself, or `.saved` in it after a killed save."""
    saved = directory / _SAVED
    return saved if saved.is_dir() else directory


def unmixed(directory: Path, key: str, read: Callable[[], T]) -> T:
    """What `read` makes of the files of a directory, all of them of one save.

    It is called again if a save was committed meanwhile, because its files may be those of two models.

    Args:
        directory: which `read` reads.
        key: as in `replacing_together`. Every save makes it anew.

    Raises:
        OSError: there was another save each time.
    """

    def state() -> tuple:
        place = current(directory)
        return place, identity(place / key)

    for _ in range(_TRIES):
        before = state()
        try:
            found = read()
        except (OSError, ValueError, RuntimeError):
            if state() == before:
                raise
            continue
        if state() == before:
            return found
    raise OSError(
        f"another process saved to {directory} each of the {_TRIES} times that it was read: load again later"
    )


def reserve(handle: int, size: int) -> None:
    """Take the disk space of an open file. A full disk would end a process that writes to a mapping of it.

    Raises:
        OSError: there is not so much.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)


def write_all(handle: int, content: bytes, place: int) -> None:
    """Write to a place of an open file without a buffer: all of it, also where a call takes a part.

    Raises:
        OSError: the disk is full, or another reason. The file ends at `place` then.
    """
    try:
        done = 0
        while done < len(content):
            done += os.pwrite(handle, content[done:], place + done)
    except BaseException:
        os.truncate(handle, place)
        raise


def is_at(file: IO, path: Path) -> bool:
    """Whether an open file is still the one at that path. Another process may have moved or removed it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def identity(file: Path) -> tuple[int, int, int] | None:
    """What tells a file from one that has taken its place. None: no file is there."""
    with suppress(OSError, ValueError):  # a NUL in the name is a ValueError
        status = file.stat()
        return status.st_dev, status.st_ino, status.st_mtime_ns
    return None


def unfinished(directory: Path) -> list[str]:
    """The names of folders in which a save to this directory was begun and did not end."""
    return sorted(path.name for path in directory.glob(f"{_SAVING}*"))


def link_aside(directory: Path, names: Iterable[str]) -> Path:
    """Give files a second name in a new folder, `replaced-*`, so that they stay when their first one goes."""
    number = 1
    while (folder := directory / f"replaced-{number}").exists():
        number += 1
    folder.mkdir()
    for name in names:
        if (directory / name).exists():
            _link_or_copy(directory / name, folder / name)
    _sync(folder)
    return folder


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        # the file itself: a relative link points nowhere from another folder
        os.link(os.path.realpath(source), target)
    except FileExistsError:
        raise
    except OSError:  # not every file system has hard links
        shutil.copyfile(source, target)
        _sync(target)


def _set_mode(path: Path, kind: int) -> None:
    """Give the mode of a file that open() creates: mkstemp and safetensors let only the owner read theirs.

    Not every file system has modes.
    """
    mask = os.umask(0)
    os.umask(mask)
    try:
        path.chmod(kind & ~mask)
    except OSError as error:
        if error.errno not in (errno.EPERM, *_UNSUPPORTED):
            raise


def _settle(folder: Path) -> None:
    """Give a folder and its files the modes of ordinary ones, and wait until they are on the disk."""
    for file in folder.iterdir():
        _set_mode(file, 0o666)
        _sync(file)
    _set_mode(folder, 0o777)
    _sync(folder)


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk. Not every file system can do that for a folder."""
    with suppress(PermissionError):  # a folder that may be written and not read
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, *_UNSUPPORTED):
                raise
        finally:
            os.close(handle)


def _lock(file: IO, *, wait: bool) -> bool:
    """Lock an open file until it is closed or the process dies. False: another process holds it.

    Without `wait` a file system that has no locks gives False too, so that no living process loses its files.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return wait
    return True


def _locked_file(path: Path) -> tuple[IO, Path]:
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".part")
        lock = os.fdopen(handle, "wb")
        _lock(lock, wait=True)
        if os.fstat(handle).st_nlink:
            return lock, Path(name)
        lock.close()  # taken for a left one before it was locked


def _locked_folder(directory: Path) -> tuple[IO, Path]:
    while True:
        aside = Path(tempfile.mkdtemp(prefix=_SAVING, dir=directory))
        with suppress(FileNotFoundError):  # taken for a left one before it was locked
            lock = open(aside / _PLAN, "wb")  # noqa: SIM115
            _lock(lock, wait=True)
            if _is_locked_by(aside, lock):
                return lock, aside
            lock.close()


def _is_locked_by(folder: Path, lock: IO) -> bool:
    return is_at(lock, folder / _PLAN)


@contextmanager
def _created(directory: Path) -> Iterator[None]:
    """Create the directory and its parents. On an error, remove those created here if they are empty."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in made:
            _sync(path.parent)
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


def _remove_left(directory: Path) -> None:
    """Remove the folders of processes that died before they committed, or after all was in place."""
    for name in unfinished(directory):
        folder = directory / name
        try:
            with open(folder / _PLAN, "r+b") as lock:
                if _lock(lock, wait=False) and _is_locked_by(folder, lock):
                    shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            # the lock is the first file to come: without it, an empty folder may be a new one, which its
            # process makes again, and a full one was half removed
            with suppress(OSError):
                if {*os.listdir(folder)} - {_PLAN} and not (folder / _PLAN).exists():
                    shutil.rmtree(folder, ignore_errors=True)
                else:
                    folder.rmdir()
        except OSError:
            continue  # another user's


def _make_ready(directory: Path, aside: Path, plan: dict[str, str]) -> None:
    for name in {*os.listdir(aside)} - {_PLAN}:
        if (directory / name).is_dir():
            raise IsADirectoryError(f"{directory / name} is a folder, and a file of this name is to be saved")
    (aside / _PLAN).write_text(json.dumps(plan))
    _settle(aside)


def _commit(directory: Path, aside: Path) -> None:
    """Rename `aside` to `.saved`. The rename fails while another process has its own files there."""
    while True:
        try:
            os.replace(aside, directory / _SAVED)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        _finish(directory)


def _finish(directory: Path) -> None:
    """Wait for the process whose files are in `.saved`. If it is dead, do the rest of its work."""
    saved = directory / _SAVED
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(saved.lstat().st_mode):
            raise FileExistsError(f"{saved} is no folder of a save: move it away, and save again")
    while saved.is_dir():
        try:
            with open(saved / _PLAN, "r+b") as lock:
                _lock(lock, wait=True)
                if _is_locked_by(saved, lock):
                    _check_whole(saved)
                    _install(directory, directory / f"{_SAVING}{secrets.token_hex(4)}")
        except FileNotFoundError:
            # that process has put its files in place meanwhile, or a hand was at work here
            _check_whole(saved)


def _check_whole(saved: Path) -> None:
    """FileExistsError if `.saved` lacks files or its plan: to finish it would remove old ones for nothing."""
    with suppress(FileNotFoundError):
        names = os.listdir(saved)
        if _PLAN not in names or _plan(saved).get("key") not in names:
            raise FileExistsError(
                f"{saved} is of an earlier save, and files in it are gone or changed: move what is left of "
                "them to where you want it, remove the folder, and save again"
            )


def _plan(saved: Path) -> dict[str, str]:
    """What is left to do for `.saved`. Empty, if that is damaged."""
    try:
        plan = json.loads((saved / _PLAN).read_bytes())
        re.compile(plan["outdated"])
    except (ValueError, LookupError, TypeError, RecursionError, re.error):
        return {}
    return plan


def _install(directory: Path, trash: Path) -> None:
    """Put the files of `.saved` into their places and remove the old ones, then `.saved` by way of `trash`.

    It can be done again from every point at which it was cut off.
    """
    saved = directory / _SAVED
    _sync(directory)  # the commit is on the disk before an old file goes
    plan = _plan(saved)
    new = sorted({*os.listdir(saved)} - {_PLAN}, key=lambda name: name == plan["key"])
    old = [name for name in os.listdir(directory) if name in new or re.fullmatch(plan["outdated"], name)]
    for name in sorted(old, key=lambda name: name != plan["key"]):
        if (directory / name).is_symlink() or not (directory / name).is_dir():
            os.unlink(directory / name)
    for name in new:
        _link_or_copy(saved / name, directory / name)
    _sync(directory)
    os.replace(saved, trash)
    _sync(directory)  # or a loss of power could bring `.saved` back with half its files
    shutil.rmtree(trash)
