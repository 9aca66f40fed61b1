"""Every bench file runs once, with its smallest case on a CPU, so that none can rot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# one short round each: unlike --benchmark-disable this also runs the lines that report a rate
ONCE = ["--benchmark-min-rounds=1", "--benchmark-max-time=0.0001", "--benchmark-quiet", "--durations=5"]
FILES = sorted((ROOT / "bench").glob("bench_*.py"))


@pytest.mark.slow
def test_every_bench_file_runs():
    assert FILES, "no bench file: this test proves nothing"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *ONCE, *map(str, FILES)]
    # pytest-benchmark measures nothing where it finds itself in a worker of pytest-xdist
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    for path in FILES:
        assert f"{path.name}::" in run.stdout, f"{path.name} holds no benchmark"
    assert "skipped" not in run.stdout.splitlines()[-1], run.stdout[-2000:]
