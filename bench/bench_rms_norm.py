from collections.abc import Iterator
from functools import partial

from bench.measure.comparison import Experiment, KernelBench, Work
from bench.suites import Setting
from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import NORM_CASES, NORM_CPU, NORM_SWEEP, RowCase

EPS = 1e-5
GPU = [*(c for c in NORM_CASES if c.bench), *NORM_SWEEP]


def benches(setting: Setting) -> Iterator[KernelBench]:
    for case in setting.choose(gpu=GPU, cpu=NORM_CPU, smallest=NORM_CASES[:1]):
        for name in ("rms_norm", "add_rms_norm"):
            for backward in (False, True):
                work = Work(case.norm_bytes(setting.dtype, name == "add_rms_norm", backward), "GB/s")
                make = partial(_experiment, setting, case, name)
                yield KernelBench("rms_norm", f"{name} {case.name}", make, work, backward)


def _experiment(setting: Setting, case: RowCase, name: str) -> Experiment:
    op, exact, residual = getattr(ops, name), getattr(reference, name), name == "add_rms_norm"

    def wanted(*tensors):
        return exact(*tensors, EPS)

    x, other, weight = case.norm_inputs(setting.device, setting.dtype)
    return Experiment(
        [x, other, weight] if residual else [x, weight],
        ours=lambda *tensors: op(*tensors, EPS),
        reference=wanted,
        baselines=setting.baselines.rms_norm(wanted, EPS, residual),
    )


def bench_rms_norm(bench, timed):
    timed(bench)
