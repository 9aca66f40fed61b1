from collections.abc import Iterator
from functools import partial

import torch

from bench.measure.comparison import Experiment, KernelBench, Work
from bench.suites import Setting
from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import LATENT_CASES, LATENT_CPU, LATENT_SWEEP, LatentCase

GPU = [*(c for c in LATENT_CASES if c.bench), *LATENT_SWEEP]


def benches(setting: Setting) -> Iterator[KernelBench]:
    for case in setting.choose(gpu=GPU, cpu=LATENT_CPU, smallest=LATENT_CASES[1:2]):
        for form in ("direct", "absorbed"):
            for backward in (False, True):
                work = Work(getattr(case, f"{form}_flops")(backward), "TFLOP/s")
                make = partial(_experiment, setting, case, form)
                yield KernelBench("latent_attention", f"{form} {case.name}", make, work, backward)


def _experiment(setting: Setting, case: LatentCase, form: str) -> Experiment:
    name = "latent_attention" if form == "direct" else "absorbed_latent_attention"
    op, exact = getattr(ops, name), getattr(reference, name)
    args = getattr(case, f"{form}_inputs")(setting.device, setting.dtype)
    tensors = [t for t in args if torch.is_tensor(t)]
    rest = args[len(tensors) :]

    def wanted(*tensors):
        return exact(*tensors, *rest)

    baselines = setting.baselines.latent_attention if form == "direct" else setting.baselines.plain
    return Experiment(tensors, lambda *tensors: op(*tensors, *rest), wanted, baselines(wanted))


def bench_latent_attention(bench, timed):
    timed(bench)
