from collections.abc import Iterator
from functools import partial

from bench.measure.comparison import Experiment, KernelBench, Work
from bench.suites import Setting
from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import LATENT_CASES, LATENT_CPU, LATENT_SWEEP, LatentCase

GPU = [*(c for c in LATENT_CASES if c.bench), *LATENT_SWEEP]


def benches(setting: Setting) -> Iterator[KernelBench]:
    for case in setting.choose(gpu=GPU, cpu=LATENT_CPU, smallest=LATENT_CASES[1:2]):
        for backward in (False, True):
            work = Work(case.direct_flops(backward), "TFLOP/s")
            make = partial(_experiment, setting, case)
            yield KernelBench("latent_attention", f"direct {case.name}", make, work, backward)


def _experiment(setting: Setting, case: LatentCase) -> Experiment:
    wanted = reference.latent_attention
    tensors = case.direct_inputs(setting.device, setting.dtype)
    return Experiment(tensors, ops.latent_attention, wanted, setting.baselines.latent_attention(wanted))


def bench_latent_attention(bench, timed):
    timed(bench)
