import pytest
import torch

from bench.conftest import DIRECTIONS
from bench.measure.comparison import Problem, Work
from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import ROTARY_CASES, ROTARY_CPU

CASES = pytest.mark.cases(
    gpu=[c for c in ROTARY_CASES if c.bench], cpu=ROTARY_CPU, smallest=[ROTARY_CASES[0]]
)


@CASES
@DIRECTIONS
def bench_rotary(comparison, rivals, case, backward, device, dtype):
    """The copy of training; inference turns in place."""
    work = Work(case.bytes_moved(dtype, False, backward), "GB/s")
    comparison("rotary", case.name, lambda: _problem(rivals, case, device, dtype, False), work, backward)


@CASES
def bench_rotary_inplace(comparison, rivals, case, device, dtype):
    # again and again the same heads, which keeps their length
    name, work = f"in place {case.name}", Work(case.bytes_moved(dtype, True), "GB/s")
    comparison("rotary", name, lambda: _problem(rivals, case, device, dtype, True), work, False)


def _problem(rivals, case, device, dtype, inplace):
    qkv, cos, sin, positions, turned = case.inputs(device, dtype)

    def wanted(x):
        tables = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (cos, sin))
        return reference.rotary(x, *tables, positions, turned)

    return Problem(
        [qkv],
        ours=lambda x: ops.rotary(x, cos, sin, positions, turned, inplace),
        reference=wanted,
        rivals=rivals.rotary(wanted, cos, sin, positions, case.num_heads, case.num_kv_heads),
    )
