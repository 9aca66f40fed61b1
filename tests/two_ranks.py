"""Two processes of torchrun on this machine. Imported by the tests that start them, and by their scripts."""

import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]


def run_on_two_ranks(*arguments: str | Path, timeout: float) -> str:
    """What `torchrun --nproc-per-node=2 ARGUMENTS` prints. It must succeed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def say(text: str) -> None:
    """One write for a line: those of two ranks do not mix."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def leave() -> None:
    """The end of a rank."""
    dist.barrier()
    # no teardown: gloo's thread and the interpreter may wait for each other there (torch 2.13)
    os._exit(0)
