"""`make test` fails if a file takes too much CPU time; `--long` chooses the tier."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BURNS = """
import time

def test_burns():
    start = time.process_time()
    while time.process_time() < start + 0.5:
        pass
"""
SLEEPS = "import time\n\ndef test_sleeps(): time.sleep(0.5)\n"
CHILD = """
import subprocess, sys

def test_child():
    code = "import time\\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
"""
TWO_TIERS = "import pytest\n\ndef test_short(): pass\n\n@pytest.mark.long\ndef test_long(): pass\n"


@pytest.fixture
def run(tmp_path):
    """pytest on these files, with the hooks of this folder's conftest and no more of it."""
    shutil.copy(HERE / "tiers.py", tmp_path)
    (tmp_path / "conftest.py").write_text(
        "import tiers\nfrom tiers import pytest_addoption, pytest_configure\n\n"
        "def pytest_collection_modifyitems(config, items):\n    tiers.deselect(config, items)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    long: long\npythonpath = .\n")

    def ran(files: dict[str, str], *options: str) -> subprocess.CompletedProcess:
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return ran


@pytest.mark.parametrize("workers", [[], ["-n", "2", "--dist", "loadfile"]], ids=["alone", "xdist"])
@pytest.mark.parametrize("text", [BURNS, CHILD], ids=["test", "child"])
def test_a_file_that_takes_too_much_cpu_time_fails(text, workers, run):
    done = run({"test_a.py": text, "test_b.py": SLEEPS}, "--file-seconds", "0.4", *workers)
    assert done.returncode == 1 and "2 passed" in done.stdout
    assert "TOO LONG: test_a.py took" in done.stdout and done.stdout.count("TOO LONG") == 1


def test_all_files_together(run):
    done = run({"test_a.py": BURNS, "test_b.py": BURNS}, "--file-seconds", "0.9", "--all-seconds", "0.9")
    assert done.returncode == 1
    assert "TOO LONG: all files took 1 s" in done.stdout and done.stdout.count("TOO LONG") == 1


def test_within_the_limits(run):
    done = run({"test_a.py": BURNS, "test_b.py": SLEEPS}, "--file-seconds", "60", "--all-seconds", "60")
    assert done.returncode == 0 and "all 2 files" in done.stdout, done.stdout


@pytest.mark.parametrize("options, ran", [([], "short"), (["--long"], "long")])
def test_each_tier_alone(options, ran, run):
    done = run({"test_a.py": TWO_TIERS}, "-rA", *options)
    assert f"PASSED test_a.py::test_{ran}\n" in done.stdout and "1 passed, 1 deselected" in done.stdout
