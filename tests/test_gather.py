import os
import subprocess
import sys
from pathlib import Path

import torch
from test_loss import problem

from nvembed_fast.training.gather import gathered_loss
from nvembed_fast.training.loss import contrastive_loss

ROOT = Path(__file__).resolve().parents[1]


def test_without_ranks_it_is_the_loss():
    q, d, c = problem(5, 2, 16)
    options = {"temperature": 0.05, "both_directions": True}
    assert torch.equal(gathered_loss(q, d, c, **options).loss, contrastive_loss(q, d, c, **options).loss)


def test_two_ranks_get_the_loss_of_one():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tests" / "gathered_loss.py")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=120)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.count("equal on rank") == 2
