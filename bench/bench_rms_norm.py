import pytest

from bench.conftest import DIRECTIONS
from bench.measure.comparison import Problem, Work
from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import NORM_CASES, NORM_CPU, NORM_SWEEP

EPS = 1e-5


@pytest.mark.cases(
    gpu=[*(c for c in NORM_CASES if c.bench), *NORM_SWEEP], cpu=NORM_CPU, smallest=[NORM_CASES[0]]
)
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
@DIRECTIONS
def bench_rms_norm(comparison, rivals, case, name, backward, device, dtype):
    residual = name == "add_rms_norm"

    def wanted(*tensors):
        return getattr(reference, name)(*tensors, EPS)

    def problem():
        x, other, weight = case.norm_inputs(device, dtype)
        return Problem(
            [x, other, weight] if residual else [x, weight],
            ours=lambda *tensors: getattr(ops, name)(*tensors, EPS),
            reference=wanted,
            rivals=rivals.rms_norm(wanted, EPS, residual),
        )

    work = Work(case.norm_bytes(dtype, residual, backward), "GB/s")
    comparison("rms_norm", f"{name} {case.name}", problem, work, backward)
