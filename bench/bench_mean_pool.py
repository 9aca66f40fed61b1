from collections.abc import Iterator
from functools import partial

from bench.measure.comparison import Experiment, KernelBench, Work
from bench.suites import Setting
from nvembed_fast import ops
from nvembed_fast.kernels import library, reference
from nvembed_fast.kernels.testing import POOL_CASES, POOL_CPU, PoolCase

GPU = [c for c in POOL_CASES if c.bench]


def benches(setting: Setting) -> Iterator[KernelBench]:
    for case in setting.choose(gpu=GPU, cpu=POOL_CPU, smallest=POOL_CASES[1:2]):
        for name in ("mean_pool", "mean_pool_geglu"):
            for backward in (False, True):
                work = Work(case.bytes_moved(setting.dtype, name == "mean_pool_geglu", backward), "GB/s")
                make = partial(_experiment, setting, case, name)
                yield KernelBench("mean_pool", f"{name} {case.name}", make, work, backward)


def _experiment(setting: Setting, case: PoolCase, name: str) -> Experiment:
    op, exact = getattr(ops, name), getattr(reference, name)
    x, *rest = case.inputs(setting.device, setting.dtype, geglu=name == "mean_pool_geglu")

    def wanted(x):
        return exact(x, *rest)

    def by_library(x):
        return getattr(library, name)(x, *rest)

    return Experiment([x], lambda x: op(x, *rest), wanted, setting.baselines.plain(wanted, by_library))


def bench_mean_pool(bench, timed):
    timed(bench)
