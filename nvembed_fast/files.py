"""Files that appear whole or not at all: written aside, then renamed into place.

`replacing` is for one file. `replacing_together` is for files that only make sense together, such as a
checkpoint's shards and their config. In both, a new file gets the mode that the process gives ordinary files.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["replacing", "replacing_together"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give an empty file beside `path` to write to. It takes the place of `path` when the block ends.

    An error or an interruption removes it and leaves `path` as it was.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        aside.chmod(_ordinary_mode())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_together(directory: Path, *, key: str, is_outdated: Callable[[str], object]) -> Iterator[Path]:
    """Give an empty folder to write to. Its files take their places in `directory` when the block ends.

    An error or an interruption leaves `directory` with all the old files (absent, where it was absent) or,
    from the last rename on, with all the new ones. A killed process may leave `.saving-*` (new) and `.old-*`
    (old) in it, and never a mix of both beside the key file.

    Args:
        directory: created, with its parents, if it is not there.
        key: the file without which the directory holds no model. It leaves first and comes last.
        is_outdated: whether an old file of this name goes even if no new one replaces it.

    Raises:
        OSError: the old files cannot be put back. The message names the two folders that hold the rest of the
            old and the new ones.
    """
    with _created(directory):
        aside = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
        retired = aside.with_name(aside.name.replace(".saving-", ".old-"))
        try:
            yield aside
            for file in aside.iterdir():
                file.chmod(_ordinary_mode())
            _exchange(directory, aside, retired, key, is_outdated)
        except BaseException:
            if not retired.exists():  # else both folders still hold files
                shutil.rmtree(aside, ignore_errors=True)
            raise


def _ordinary_mode() -> int:
    """The mode of a file that open() creates: mkstemp and safetensors let only the owner read theirs."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


@contextmanager
def _created(directory: Path) -> Iterator[None]:
    """Create the directory and its parents. On an error, remove those created here if they are empty."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


def _exchange(
    directory: Path, aside: Path, retired: Path, key: str, is_outdated: Callable[[str], object]
) -> None:
    """Move the old files to `retired`, those of `aside` into their place, and delete the old ones.

    On an error before the last rename the old files are put back. The key file leaves first and comes last,
    both ways, so that no moment shows a mix that loads.
    """
    new = sorted(os.listdir(aside), key=lambda name: name == key)
    old = [name for name in os.listdir(directory) if name in new or is_outdated(name)]
    old.sort(key=lambda name: name != key)
    try:
        retired.mkdir()
        _move(old, directory, retired)
        _move(new, aside, directory)
        shutil.rmtree(retired)
        aside.rmdir()
    except BaseException:
        # the disk tells which files were moved: an interruption may come right after a rename
        if not (aside / key).exists():
            shutil.rmtree(retired, ignore_errors=True)
            raise
        try:
            _move([name for name in new if not (aside / name).exists()], directory, aside)
            # lexists: a hub snapshot's files are relative links, which point nowhere from `retired`
            _move([name for name in reversed(old) if os.path.lexists(retired / name)], retired, directory)
            with suppress(FileNotFoundError):
                retired.rmdir()
        except BaseException as error:
            raise OSError(
                f"saving to {directory} failed, and so did putting the old model back ({error!r}): files of "
                f"the old one are in {retired}, of the new one in {aside}, the rest of both in {directory}"
            ) from error
        raise


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        os.replace(source / name, target / name)
