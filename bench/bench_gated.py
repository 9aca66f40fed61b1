import pytest

from bench.conftest import DIRECTIONS
from bench.measure.comparison import Problem, Work
from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import GATED_CASES, GATED_CPU, GATED_SWEEP


@pytest.mark.cases(
    gpu=[*(c for c in GATED_CASES if c.bench), *GATED_SWEEP], cpu=GATED_CPU, smallest=[GATED_CASES[0]]
)
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
@DIRECTIONS
def bench_gated(comparison, rivals, case, name, backward, device, dtype):
    op, wanted = getattr(ops, name), getattr(reference, name)
    others = rivals.swiglu(wanted) if name == "swiglu" else rivals.plain(wanted)

    def problem():
        return Problem([case.gated_input(device, dtype)], op, wanted, others)

    comparison(
        "gated", f"{name} {case.name}", problem, Work(case.gated_bytes(dtype, backward), "GB/s"), backward
    )
