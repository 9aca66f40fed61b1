from collections.abc import Iterator
from functools import partial

from bench.measure.comparison import Experiment, KernelBench, Work
from bench.suites import Setting
from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import GATED_CASES, GATED_CPU, GATED_SWEEP, RowCase

GPU = [*(c for c in GATED_CASES if c.bench), *GATED_SWEEP]


def benches(setting: Setting) -> Iterator[KernelBench]:
    for case in setting.choose(gpu=GPU, cpu=GATED_CPU, smallest=GATED_CASES[:1]):
        for name in ("swiglu", "geglu"):
            for backward in (False, True):
                work = Work(case.gated_bytes(setting.dtype, backward), "GB/s")
                make = partial(_experiment, setting, case, name)
                yield KernelBench("gated", f"{name} {case.name}", make, work, backward)


def _experiment(setting: Setting, case: RowCase, name: str) -> Experiment:
    op, exact = getattr(ops, name), getattr(reference, name)
    baselines = setting.baselines.swiglu if name == "swiglu" else setting.baselines.plain
    return Experiment([case.gated_input(setting.device, setting.dtype)], op, exact, baselines(exact))


def bench_gated(bench, timed):
    timed(bench)
