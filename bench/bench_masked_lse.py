"""The loss of rows against all columns, in fp32 as in training. Without masks: the baselines know none."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.measure.comparison import Experiment, KernelBench, Work
from bench.suites import Setting
from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import SCORE_CASES, SCORE_CPU, ScoreCase

GPU = [c for c in SCORE_CASES if c.bench]


def benches(setting: Setting) -> Iterator[KernelBench]:
    for case in setting.choose(gpu=GPU, cpu=SCORE_CPU, smallest=SCORE_CASES[1:2]):
        for backward in (False, True):
            work = Work(case.flops(backward), "TFLOP/s")
            make = partial(_experiment, setting, case)
            yield KernelBench("masked_lse", case.name, make, work, backward)


def _experiment(setting: Setting, case: ScoreCase) -> Experiment:
    q, d, *_, scale = case.inputs(setting.device, torch.float32)
    ids = partial(torch.ones, dtype=torch.int64, device=setting.device)
    masks = ids(len(q), 1), ids(len(d), 1), 2 * ids(len(q), 1), ids(len(d), 1)

    def loss(masked_lse, q, d):
        """[B] cross entropy of row i with column i."""
        own = (q * d[: len(q)]).sum(1) * scale
        return masked_lse(q, d, *masks, None, scale)[0] - own

    wanted = partial(loss, reference.masked_lse)
    return Experiment([q, d], partial(loss, ops.masked_lse), wanted, setting.baselines.scores(wanted, scale))


def bench_masked_lse(bench, timed):
    timed(bench)
