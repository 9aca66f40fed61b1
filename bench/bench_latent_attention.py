import pytest
import torch

from bench.conftest import DIRECTIONS
from bench.measure.comparison import Problem, Work
from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import LATENT_CASES, LATENT_CPU, LATENT_SWEEP

GPU = [c for c in LATENT_CASES if c.bench] + list(LATENT_SWEEP)


@pytest.mark.cases(gpu=GPU, cpu=LATENT_CPU, smallest=[LATENT_CASES[1]])
@pytest.mark.parametrize("form", ["direct", "absorbed"])
@DIRECTIONS
def bench_latent_attention(comparison, rivals, case, form, backward, device, dtype):
    name = "latent_attention" if form == "direct" else "absorbed_latent_attention"

    def problem():
        args = getattr(case, f"{form}_inputs")(device, dtype)
        tensors = [t for t in args if torch.is_tensor(t)]
        rest = args[len(tensors) :]

        def wanted(*tensors):
            return getattr(reference, name)(*tensors, *rest)

        return Problem(
            tensors,
            ours=lambda *tensors: getattr(ops, name)(*tensors, *rest),
            reference=wanted,
            rivals=rivals.latent_attention(wanted) if form == "direct" else rivals.plain(wanted),
        )

    work = Work(getattr(case, f"{form}_flops")(backward), "TFLOP/s")
    comparison("latent_attention", f"{form} {case.name}", problem, work, backward)
