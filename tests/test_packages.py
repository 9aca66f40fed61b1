"""Archives out of planted packages: pip and apt-get run on folders of the test, so no network is needed."""

import hashlib
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from nvembed_fast import packages


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_wheel(folder: Path, texts: dict[str, str]) -> Path:
    path = folder / "planted-1.0-py3-none-any.whl"
    info = "planted-1.0.dist-info"
    texts = texts | {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("planted/folder/", "")
        for name, text in texts.items():
            archive.writestr(name, text)
    return path


def write_sdist(folder: Path, texts: dict[str, str]) -> Path:
    path = folder / "planted-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in texts.items():
            entry = tarfile.TarInfo(f"planted-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """The only place where pip looks for packages."""
    folder = tmp_path / "an index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    # pip cuts it at spaces
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


@pytest.fixture
def no_downloads(monkeypatch):
    """Call it, and from then on nothing can be downloaded."""

    def refuse(*_, **__):
        raise AssertionError("a download")

    return lambda: monkeypatch.setattr(packages.subprocess, "run", refuse)


def test_a_wheel_is_kept(index, tmp_path, no_downloads):
    wanted = write_wheel(index, {"planted/a.txt": "alpha"})
    archive = packages.fetch("planted==1.0", sha256(wanted), tmp_path / "cache")
    assert archive.name == wanted.name and archive.read_bytes() == wanted.read_bytes()
    no_downloads()
    assert packages.fetch("planted==1.0", sha256(wanted), tmp_path / "cache") == archive


def test_an_sdist_is_not_run(index, tmp_path):
    """Its setup.py would leave a file, and what it builds with is not to be had here."""
    left = tmp_path / "left"
    wanted = write_sdist(
        index,
        {
            "setup.py": f"open({str(left)!r}, 'w')",
            "pyproject.toml": '[build-system]\nrequires = ["absent"]\n',
            "docs/b.txt": "beta",
        },
    )
    archive = packages.fetch("planted==1.0", sha256(wanted), tmp_path / "cache")
    assert archive.read_bytes() == wanted.read_bytes()
    assert not left.exists()
    assert list(packages.members(archive, "*/docs/*")) == [("planted-1.0/docs/b.txt", b"beta")]


def test_a_damaged_archive_is_fetched_again(index, tmp_path):
    wanted = write_wheel(index, {"planted/a.txt": "alpha"})
    archive = packages.fetch("planted==1.0", sha256(wanted), tmp_path / "cache")
    archive.write_bytes(b"damaged")
    assert packages.fetch("planted==1.0", sha256(wanted), tmp_path / "cache") == archive
    assert archive.read_bytes() == wanted.read_bytes()


def test_a_notebook_fetches_too(index, tmp_path, capsys):
    """There sys.stderr is no file, as it is none under capsys."""
    wanted = write_wheel(index, {})
    assert packages.fetch("planted==1.0", sha256(wanted), tmp_path / "cache").is_file()


def test_another_hash_is_an_error(index, tmp_path):
    found = sha256(write_wheel(index, {}))
    with pytest.raises(ValueError, match=f"no archive of sha256 {'0' * 64}, found {found}"):
        packages.fetch("planted==1.0", "0" * 64, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_a_missing_package_is_an_error_with_the_last_words_of_pip(index, tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)could not download planted==1.0:.*No matching"):
        packages.fetch("planted==1.0", "0" * 64, tmp_path / "cache")


def test_a_python_without_pip(index, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip is missing, which fetches planted==1.0: run .* -m ensurepip"):
        packages.fetch("planted==1.0", "0" * 64, tmp_path / "cache")


@pytest.mark.parametrize("requirement", ["planted", "planted>=1", "planted==1.0 --pre", "../x==1/2", "-r==1"])
def test_a_package_is_pinned(requirement, tmp_path):
    with pytest.raises(ValueError, match="NAME==VERSION"):
        packages.fetch(requirement, "0" * 64, tmp_path)


@pytest.mark.parametrize("digest", ["", "0" * 63, "F" * 64])
def test_a_hash_is_64_digits(digest, tmp_path):
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        packages.fetch("planted==1.0", digest, tmp_path)


@pytest.mark.parametrize("write", [write_wheel, write_sdist])
def test_members_come_in_the_order_of_their_names(write, tmp_path):
    archive = write(tmp_path, {"planted/b.txt": "beta", "planted/a.txt": "alpha", "planted/c.py": "pass"})
    found = [(name.rpartition("/")[2], text) for name, text in packages.members(archive, "*.txt")]
    assert found == [("a.txt", b"alpha"), ("b.txt", b"beta")]


@pytest.mark.parametrize("content", [b"no archive", b"\x1f\x8b\x08\0\0\0\0\0\0\0garbage"])
def test_a_file_that_is_no_archive(content, tmp_path):
    path = tmp_path / "planted-1.0.tar.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a wheel or sdist"):
        list(packages.members(path))


def test_an_unpacked_folder_is_kept(index, tmp_path, no_downloads):
    digest = sha256(write_wheel(index, {"planted/sub/a.txt": "alpha", "planted/b.py": "pass"}))
    folder = packages.unpacked("planted==1.0", digest, "*.txt", tmp_path / "cache")
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["a.txt"]
    assert (folder / "planted/sub/a.txt").read_text() == "alpha"
    no_downloads()
    assert packages.unpacked("planted==1.0", digest, "*.txt", tmp_path / "cache") == folder


def test_a_member_outside_the_archive_is_refused(index, tmp_path):
    digest = sha256(write_wheel(index, {"../../out.txt": "out"}))
    with pytest.raises(ValueError, match="outside itself"):
        packages.unpacked("planted==1.0", digest, cache=tmp_path / "cache")
    assert not list(tmp_path.rglob("out.txt"))


def test_a_file_of_a_wheel_has_its_own_hash(index, tmp_path, no_downloads):
    wheel = write_wheel(index, {"planted/a.txt": "alpha"})
    digest = hashlib.sha256(b"alpha").hexdigest()
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=f"has sha256 {digest}, expected {'0' * 64}"):
        packages.wheel_file("planted==1.0", "planted/a.txt", "0" * 64, cache)
    path = packages.wheel_file("planted==1.0", "planted/a.txt", digest, cache)
    assert path == cache / "planted-1.0" / "a.txt" and path.read_text() == "alpha"
    assert not list(cache.rglob(wheel.name))
    no_downloads()
    assert packages.wheel_file("planted==1.0", "planted/a.txt", digest, cache) == path


APT_GET = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
*indextargets*Packages*) echo "{lists}/Packages"; echo "{lists}/absent" ;;
*indextargets*) echo "{lists}/Translation-en" ;;
*update*) ;;
*planted) echo deb > planted_1.0_all.deb ;;
*) echo "E: Unable to locate package" >&2; exit 100 ;;
esac
"""
DPKG_DEB = """#!/bin/sh
case "$1" in
-x) mkdir "$3" && mkdir -p "$3/usr/share" && cp "$2" "$3/usr/share/a.txt" ;;
-f) echo 1:1.0-2 ;;
esac
"""


@pytest.fixture
def apt(tmp_path, monkeypatch) -> Path:
    """A planted apt-get and dpkg-deb. Returns the log of the calls of apt-get."""
    folder = tmp_path / "an apt"
    programs, log = folder / "bin", folder / "log"
    programs.mkdir(parents=True)
    for name in ("Packages", "Translation-en"):
        (folder / name).touch()
    for name, text in {"apt-get": APT_GET, "dpkg-deb": DPKG_DEB}.items():
        (programs / name).write_text(text.replace("{log}", str(log)).replace("{lists}", str(folder)))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return log


def test_a_debian_package_is_kept_with_its_version(apt, tmp_path, no_downloads):
    package = packages.debian("planted", tmp_path / "cache")
    assert (package.directory / "usr/share/a.txt").read_text() == "deb\n"
    assert (package.version, package.sha256) == ("1:1.0-2", hashlib.sha256(b"deb\n").hexdigest())
    no_downloads()
    assert packages.debian("planted", tmp_path / "cache") == package


def test_apt_keeps_its_state_in_the_cache(apt, tmp_path):
    packages.debian("planted", tmp_path / "cache")
    # they lie in a folder with a space
    assert [p.name for p in packages.debian_lists(tmp_path / "cache")] == ["Packages", "Translation-en"]
    calls = apt.read_text().splitlines()
    assert [" update" in call for call in calls] == [True, False, False, False]
    assert all(f"Dir::State::Lists={tmp_path}/cache/debian/.apt/lists" in call for call in calls)


def test_stale_lists_are_fetched_again(apt, tmp_path, monkeypatch):
    """The mirror has another version than the lists say, until they are fetched again."""
    packages.debian_lists(tmp_path / "cache")
    text = APT_GET.replace("{log}", str(apt)).replace("*update*) ;;", f'*update*) touch "{apt}.new" ;;')
    text = text.replace("*planted)", f'*planted) [ -e "{apt}.new" ] || exit 100;')
    (apt.parent / "bin/apt-get").write_text(text)
    assert packages.debian("planted", tmp_path / "cache").version == "1:1.0-2"
    calls = [call.split()[-2:] for call in apt.read_text().splitlines()[-3:]]
    assert [call[-1] for call in calls] == ["planted", "update", "planted"]


def test_an_unknown_debian_package(apt, tmp_path):
    with pytest.raises(RuntimeError, match=r"could not download absent:\nE: Unable to locate"):
        packages.debian("absent", tmp_path / "cache")
    with pytest.raises(ValueError, match="Debian package's name"):
        packages.debian("../absent", tmp_path / "cache")


def test_a_machine_without_apt(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="no apt-get: use a machine with Debian"):
        packages.debian("planted", tmp_path / "cache")
