import pytest

from bench.conftest import DIRECTIONS
from bench.measure.comparison import Problem, Work
from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import POOL_CASES, POOL_CPU


@pytest.mark.cases(gpu=[c for c in POOL_CASES if c.bench], cpu=POOL_CPU, smallest=[POOL_CASES[1]])
@pytest.mark.parametrize("name", ["mean_pool", "mean_pool_geglu"])
@DIRECTIONS
def bench_mean_pool(comparison, rivals, case, name, backward, device, dtype):
    geglu = name == "mean_pool_geglu"

    def problem():
        x, *rest = case.inputs(device, dtype, geglu=geglu)

        def wanted(x):
            return getattr(reference, name)(x, *rest)

        return Problem([x], lambda x: getattr(ops, name)(x, *rest), wanted, rivals.plain(wanted))

    work = Work(case.bytes_moved(dtype, geglu, backward), "GB/s")
    comparison("mean_pool", f"{name} {case.name}", problem, work, backward)
