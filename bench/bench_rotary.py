from collections.abc import Iterator
from functools import partial

import torch

from bench.measure.comparison import Experiment, KernelBench, Work
from bench.suites import Setting
from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import ROTARY_CASES, ROTARY_CPU, RotaryCase

GPU = [c for c in ROTARY_CASES if c.bench]


def benches(setting: Setting) -> Iterator[KernelBench]:
    """The copy of training, then the form of inference, which turns in place."""
    for case in setting.choose(gpu=GPU, cpu=ROTARY_CPU, smallest=ROTARY_CASES[:1]):
        for backward in (False, True):
            work = Work(case.bytes_moved(setting.dtype, False, backward), "GB/s")
            make = partial(_experiment, setting, case, inplace=False)
            yield KernelBench("rotary", case.name, make, work, backward)
        # the same heads again and again, which keeps their length
        work = Work(case.bytes_moved(setting.dtype, True), "GB/s")
        yield KernelBench("rotary", f"in place {case.name}", partial(_experiment, setting, case, True), work)


def _experiment(setting: Setting, case: RotaryCase, inplace: bool) -> Experiment:
    qkv, cos, sin, positions, turned = case.inputs(setting.device, setting.dtype)

    def wanted(x):
        tables = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (cos, sin))
        return reference.rotary(x, *tables, positions, turned)

    heads = case.num_heads, case.num_kv_heads
    return Experiment(
        [qkv],
        ours=lambda x: ops.rotary(x, cos, sin, positions, turned, inplace),
        reference=wanted,
        baselines=setting.baselines.rotary(wanted, cos, sin, positions, *heads, inplace),
    )


def bench_rotary(bench, timed):
    timed(bench)
