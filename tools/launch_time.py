"""What the host does for a forward of NV-Embed-v2 on one text of 50 tokens. Needs no GPU.

    python -m tools.launch_time                  this tree
    python -m tools.launch_time --base DIR       this tree and that one, in turns

1. Kernels are launched by Triton's own launcher, on tensors of the CPU that stand for those of a GPU
   (tests/fake_driver). Matrix products are left out: their result is empty.
2. Every tree has a process of its own in each round. The smallest time of all rounds counts, in CPU seconds.
3. A plain Python loop of a million steps is timed in the same process. The ratio to it says more about the
   code than the milliseconds, which are this machine's.

Counts are held by tests/test_fake_driver.py. A time is printed and never a test.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
NUM_TOKENS = 50


def smallest(call: Callable[[], object], repeats: int = 30) -> float:
    """CPU seconds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def python_loop() -> None:
    for _ in range(1_000_000):
        pass


def measure(folder: str) -> dict[str, Any]:
    """Milliseconds of the package that this process imports."""
    fake_driver = importlib.import_module("fake_driver")
    fake_driver.gpu.start(str(fake_driver.build(Path(folder))), folder)
    with fake_driver.gpu.on_cpu():
        return _measure(fake_driver.gpu)


def _measure(gpu: Any) -> dict[str, Any]:
    import numpy as np
    import torch

    from nvembed_fast import packing
    from nvembed_fast.kernels import _common

    if hasattr(_common, "_scratch"):
        # trees before 2026-11-26 took the memory of descriptors from the current GPU
        _common._scratch = lambda size, alignment, stream: torch.empty(size, dtype=torch.int8)
    model: Any = _model()
    batch = packing.PackedBatch.from_ids([np.zeros(NUM_TOKENS, dtype=np.int64)], [18])

    def product(x, weight, bias=None):
        return x.new_empty(len(x), len(weight))

    def sum_of_product(x, left, right, **factors):
        return x.new_empty(x.shape)

    def forward():
        model(batch)

    with (
        torch.no_grad(),
        mock.patch.object(torch.nn.functional, "linear", product),
        mock.patch.object(torch, "addmm", sum_of_product),
        mock.patch.object(torch.Tensor, "addmm_", sum_of_product),
    ):
        # compiles
        forward()
        gpu.forget_counts()
        forward()
        num_launches = len(gpu.launches())
        return {
            "launches": num_launches,
            "forward": 1e3 * smallest(forward),
            "loop": 1e3 * smallest(python_loop),
        }


def _model() -> Any:
    """NV-Embed-v2 with one element in the place of every weight."""
    import torch

    from nvembed_fast.config import NVEmbedConfig
    from nvembed_fast.network.model import NVEmbedModel

    with torch.device("meta"):
        model: Any = NVEmbedModel(NVEmbedConfig()).requires_grad_(False)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            one = torch.ones(weight.shape if weight.ndim == 1 else 1, dtype=torch.bfloat16)
            setattr(module, name, torch.nn.Parameter(one.expand(weight.shape), requires_grad=False))
    # of 4096 latents, which nobody multiplies
    constant = torch.zeros(1, dtype=torch.bfloat16).expand(4096, 4096).contiguous()
    model.head._constant = lambda: (constant, constant)
    model.embedding_model.embed_tokens.forward = lambda ids: constant[: len(ids)]
    return model


def in_turns(trees: dict[str, Path], rounds: int) -> dict[str, dict[str, Any]]:
    """The smallest figures of each tree."""
    best: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name, tree in trees.items():
            with tempfile.TemporaryDirectory() as folder:
                env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), str(ROOT / "tests")])}
                command = [sys.executable, __file__, "--measure", folder]
                output = subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, text=True, env=env
                ).stdout
            figures = json.loads(output.splitlines()[-1])
            before = best.setdefault(name, figures)
            best[name] = {key: min(value, before[key]) for key, value in figures.items()}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="tools.launch_time"
    )
    parser.add_argument("--base", type=Path, help="the root of another tree, such as a git worktree")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    trees = {"base": args.base.resolve()} if args.base else {}
    for name, x in in_turns(trees | {"this tree": ROOT}, args.rounds).items():
        each = 1e3 * x["forward"] / x["launches"]
        print(
            f"{name}: {x['forward']:.2f} ms a forward, {x['launches']} launches, {each:.1f} us each, "
            f"{x['forward'] / x['loop']:.3f} of a Python loop of a million steps ({x['loop']:.1f} ms)"
        )


if __name__ == "__main__":
    main()
