import pytest
import torch
from conftest import DIRECTIONS

from bench.comparison import Problem, Work
from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import ROTARY_CASES, ROTARY_CPU


@pytest.mark.cases(gpu=[c for c in ROTARY_CASES if c.bench], cpu=ROTARY_CPU, smallest=[ROTARY_CASES[0]])
@DIRECTIONS
def bench_rotary(comparison, rivals, case, backward, device, dtype):
    """The copy of training; inference turns in place (`bench_rotary_inplace`)."""
    qkv, cos, sin, positions, turned = case.inputs(device, dtype)
    wanted = _wanted(cos, sin, positions, turned)
    problem = Problem(
        [qkv],
        ours=lambda x: ops.rotary(x, cos, sin, positions, turned),
        reference=wanted,
        rivals=rivals.rotary(wanted, cos, sin, positions, case.num_heads, case.num_kv_heads),
    )
    comparison("rotary", case.name, problem, Work(case.bytes_moved(dtype, False, backward), "GB/s"), backward)


@pytest.mark.cases(gpu=[c for c in ROTARY_CASES if c.bench], cpu=ROTARY_CPU, smallest=[ROTARY_CASES[0]])
def bench_rotary_inplace(comparison, rivals, case, device, dtype):
    qkv, cos, sin, positions, turned = case.inputs(device, dtype)
    wanted = _wanted(cos, sin, positions, turned)
    problem = Problem(
        [qkv],
        # again and again the same heads, which keeps their length
        ours=lambda x: ops.rotary(x, cos, sin, positions, turned, inplace=True),
        reference=wanted,
        rivals=rivals.rotary(wanted, cos, sin, positions, case.num_heads, case.num_kv_heads),
    )
    work = Work(case.bytes_moved(dtype, True), "GB/s")
    comparison("rotary", f"in place {case.name}", problem, work, False)


def _wanted(cos, sin, positions, turned):
    def wanted(x):
        tables = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (cos, sin))
        return reference.rotary(x, *tables, positions, turned)

    return wanted
