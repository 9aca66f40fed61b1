"""The cases that decide whether `auto` takes a kernel. See `tools.mutate --self-check`, too."""

import ast
import functools
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
from fake_driver import gpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from nvembed_fast import ops, self_check
from nvembed_fast.kernels import _common, flash_attention, gated, reference, testing
from nvembed_fast.verdicts import DIRECTIONS, Finding


@pytest.mark.parametrize("operation", ["absorbed_latent_attention", "mean_pool", "rotary", "geglu"])
def test_a_right_kernel_passes(operation, device):
    for direction in DIRECTIONS:
        finding = self_check.check((operation, "float16", direction), device)
        assert finding.ok and finding.reason == "" and finding.path == "triton", finding
        assert 0 < finding.error <= finding.tolerance


@pytest.mark.parametrize("path", ["library", "torch"])
@pytest.mark.parametrize("operation", ["mean_pool_geglu", "rotary"])
def test_what_takes_a_kernels_place_passes(operation, path, device):
    for direction in DIRECTIONS:
        assert self_check.check((operation, "float32", direction), device, path).ok


def test_every_operation_has_problems_in_both_directions_with_names_of_their_own():
    for operation in ops.OPERATIONS:
        found = list(self_check.problems(operation, "cpu", torch.float16))
        assert {d for problem in found for d in problem.directions} == set(DIRECTIONS)
        names = [problem.name for problem in found]
        assert len(names) == len(set(names)) > 3


def test_attention_reaches_every_loop_and_both_ways_to_load(path, monkeypatch):
    from gradients import spy_on_launches

    from nvembed_fast.kernels import flash_attention

    launches = spy_on_launches(monkeypatch, flash_attention, "_flash_attention_fwd_kernel")
    self_check.check(("flash_attention", "float16", "forward"), "cpu")
    seen = {(a["USE_TMA"], a["AHEAD"], a["CAUSAL"]) for _, a in launches}
    pointers = {(False, False, False), (False, False, True)}
    descriptors = {(True, True, False), (True, False, False), (True, False, True)}
    assert seen == (pointers | descriptors if path == 90 else pointers)


def _unwritten(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, (x.shape[1], 1), dtype=x.dtype, device=x.device)


def test_unwritten_memory_is_nan(device):
    x = torch.zeros(4000, 4000, device=device)  # so much comes from the system, which gives zeros
    with self_check._unwritten_memory_is_nan():
        assert _unwritten(x).isnan().all()


FAULTS = {
    "wrong": (lambda x: 1.01 * reference.swiglu(x), "large gates: output 0, rms error"),
    "unwritten": (
        lambda x: x.new_empty(x.shape[0], x.shape[1] // 2),
        "no tile divides: output 0: non-finite result",
    ),
    "reads beyond a row": (lambda x: reference.swiglu(x.as_strided(x.shape, x.stride(), 0)), "non-finite"),
    "another shape": (lambda x: reference.swiglu(x)[:-1], "shape or dtype"),
    "gives its first result again": (
        lambda x, kept={}: kept.setdefault(x.shape, reference.swiglu(x)),
        ": second call: output 0, rms error",  # on a GPU each problem has one, and the worst is named
    ),
    "raises": (lambda x: (_ for _ in ()).throw(RuntimeError("no such instruction")), "RuntimeError: no such"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(fault, device, monkeypatch):
    function, reason = FAULTS[fault]
    ops._kernel("swiglu")
    monkeypatch.setitem(ops._kernels, "swiglu", function)
    finding = self_check.check(("swiglu", "float16", "forward"), device)
    assert not finding.ok and reason in finding.reason


def test_a_wrong_gradient_is_found_and_the_forward_stays_right(device, monkeypatch):
    launch = gated._launch_bwd
    monkeypatch.setattr(gated, "_launch_bwd", lambda *args: 1.01 * launch(*args))
    backward, forward = (self_check.check(("swiglu", "float16", d), device) for d in ("backward", "forward"))
    assert forward.ok and not backward.ok and "gradient 0" in backward.reason


def test_a_scale_that_the_gradients_ignore_is_found(device, monkeypatch):
    recorded = flash_attention._flash_attention_op
    monkeypatch.setattr(
        flash_attention,
        "_flash_attention_op",
        lambda q, k, v, lengths, scale, causal: recorded(q, k, v, lengths, q.shape[-1] ** -0.5, causal),
    )
    finding = self_check.check(("flash_attention", "float16", "backward"), device)
    assert not finding.ok and finding.reason.startswith("scaled"), finding


def test_a_gradient_that_the_second_call_gets_from_the_first_is_found(device, monkeypatch):
    launch, kept = gated._launch_bwd, {}
    monkeypatch.setattr(gated, "_launch_bwd", lambda x, *args: kept.setdefault(x.shape, launch(x, *args)))
    finding = self_check.check(("swiglu", "float16", "backward"), device)
    assert not finding.ok and "second call: gradient 0" in finding.reason


REPEATED = (
    "flash_attention",
    "latent_attention",
    "absorbed_latent_attention",
    "rms_norm",
    "rotary",
    "swiglu",
)


def repeated_launches() -> dict[str, int]:
    """How many the first problem has, on a GPU that launches nothing, so that the check ends there."""
    counts, launch = {}, _common._Plan.launch
    for operation in REPEATED:
        with mock.patch.object(_common._Plan, "launch", autospec=True, side_effect=launch) as repeat:
            finding = self_check.check((operation, "float16", "forward"), "cuda:0")
        assert "non-finite result" in finding.reason
        counts[operation] = repeat.call_count
    return counts


@pytest.mark.skipif(
    triton.__version__ not in _common.KNOWN_VERSIONS,
    reason=f"a repeated launch needs triton {' or '.join(_common.KNOWN_VERSIONS)}",
)
def test_the_second_call_is_a_repeated_launch(fake_gpu):
    assert fake_gpu(repeated_launches) == dict.fromkeys(REPEATED, 1)


def drawn_for_a_timed_call(direction: str) -> int:
    """How many tensors PyTorch draws on the GPU, which launches nothing and has no clock."""
    clock = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 1.0)
    small = (testing.RowCase("nvembed-16k", 8, 64),)
    with (
        mock.patch.object(torch.cuda, "Event", lambda **_: clock),
        mock.patch.object(testing, "GATED_CASES", small),
    ):
        gpu.forget_counts()
        assert self_check._milliseconds(("swiglu", "float16", direction), torch.device("cuda:0"), "triton")
    return gpu.operations()["randn"]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_is_timed_is_drawn_on_the_gpu(direction, fake_gpu):
    """The input, and the gradient of the output."""
    assert fake_gpu(drawn_for_a_timed_call, direction) == 2


class _Bytes(TorchDispatchMode):
    """The bytes that PyTorch's operations read and write inside."""

    moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.moved += sum(t.nbytes for t in (*args, *testing.as_tuple(out)) if isinstance(t, torch.Tensor))
        return out


@pytest.mark.parametrize("operation", ops.OPERATIONS)
def test_a_timed_call_is_the_operation_and_little_else(operation, monkeypatch):
    monkeypatch.setattr(self_check, "_named", lambda cases, name: testing.small(cases)[1])
    (problem,) = self_check._PROBLEMS[operation](operation, torch.device("cpu"), torch.float16, True)
    outputs = []

    def recorded(*args, **kwargs):
        outputs.append(getattr(reference, operation)(*args, **kwargs))
        return outputs[-1]

    problem.call(recorded, *problem.tensors)
    with _Bytes() as beside:
        problem.call(lambda *args, **kwargs: outputs[-1], *problem.tensors)
    own = sum(t.nbytes for t in (*problem.tensors, *testing.as_tuple(outputs[-1])) if t is not None)
    assert beside.moved < 0.1 * own


# failure -> (it says something about the kernel, another process may have the memory)
FAILURES = {
    "full GPU": (RuntimeError("Triton Error [CUDA]: out of memory"), False, True),
    "cuBLAS without memory": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        False,
        True,
    ),
    "cuBLAS on a full GPU": (
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(..)`"),
        False,
        True,
    ),
    "no compiler": (
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        False,
        False,
    ),
    "no ptxas": (RuntimeError("Cannot find ptxas"), False, False),
    "no cache folder": (RuntimeError("Could not create or locate cache dir"), False, False),
    "no driver": (RuntimeError("0 active drivers ([]). There should only be one."), False, False),
    "no libcuda": (AssertionError("libcuda.so cannot found!"), False, False),
    "ECC": (RuntimeError("CUDA error: uncorrectable ECC error encountered"), False, False),
    "busy GPU": (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), False, False),
    "no Python.h": (subprocess.CalledProcessError(1, ["gcc"]), False, False),
    "folder of another": (PermissionError(13, "Permission denied", "/root/.triton"), False, False),
    "full disk": (OSError(28, "No space left on device"), False, False),
    "noexec": (ImportError("failed to map segment from shared object"), False, False),
    "full memory": (MemoryError(), False, False),
    "killed ptxas": (PTXASError("`ptxas` failed with error code -9"), False, False),
    "ptxas": (PTXASError("Internal Triton PTX codegen error"), True, False),
    "crashed ptxas": (PTXASError("`ptxas` raised SIGSEGV"), True, False),
    "shared memory": (OutOfResources(300000, 232448, "shared memory"), True, False),
    "compilation": (CompilationError("x = y", ast.parse("x = y").body[0], "y is not defined"), True, False),
    "pass": (RuntimeError("PassManager::run failed"), True, False),
    "illegal access": (RuntimeError("CUDA error: an illegal memory access was encountered"), True, False),
    "cuBLAS": (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), True, False),
    "bug": (TypeError("unsupported operand"), True, False),
}


def _raising(failure: Exception, monkeypatch) -> None:
    def fail(x):
        raise failure

    ops._kernel("swiglu")
    monkeypatch.setitem(ops._kernels, "swiglu", fail)


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_of_the_machine_says_nothing_about_a_kernel(name, device, monkeypatch):
    failure, is_decided, lacks_memory = FAILURES[name]
    _raising(failure, monkeypatch)
    finding = self_check.check(("swiglu", "float16", "forward"), device)
    assert not finding.ok and (finding.is_decided, finding.lacks_memory) == (is_decided, lacks_memory)
    assert lacks_memory or type(failure).__name__ in finding.reason or isinstance(failure, AssertionError)


def test_a_kernel_that_broke_the_context_is_to_blame_for_what_cublas_says(monkeypatch):
    """The first product behind an illegal access cannot initialize cuBLAS."""
    _raising(RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED"), monkeypatch)
    gpu, problem = torch.device("cuda", 0), self_check.Problem("one", [torch.zeros(1, 4)], lambda f, x: f(x))
    monkeypatch.setattr(self_check, "problems", lambda *_: [problem])
    synchronize = mock.Mock(side_effect=RuntimeError("CUDA error: an illegal memory access"))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    finding = self_check.check(("swiglu", "float16", "forward"), gpu)
    assert finding.is_decided and "illegal memory access" in finding.reason
    synchronize.side_effect = None
    assert self_check.check(("swiglu", "float16", "forward"), gpu).lacks_memory


def test_it_runs_inside_inference_mode_and_autocast_and_leaves_settings_alone(device):
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    item = ("swiglu", "float16", "backward")
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
        (finding,) = self_check.run([item], torch.device(device), "triton")
    assert finding.ok
    settings = torch.utils.deterministic
    assert before == (torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory)


@pytest.mark.parametrize("keeps", [[], [torch.ops.aten.mul.Tensor, torch.ops.aten.sigmoid.default]])
def test_it_runs_inside_a_checkpointed_layer(keeps, device):
    """Of which the first run alone meets it."""
    found, x = [], torch.randn(5, 8, device=device, requires_grad=True)

    def layer(x):
        if not found:
            found.extend(self_check.run([("swiglu", "float32", "backward")], torch.device(device), "torch"))
        return (x * x.sigmoid()).exp()

    contexts = functools.partial(create_selective_checkpoint_contexts, keeps)
    options = {"context_fn": contexts} if keeps else {}
    checkpoint(layer, x, use_reentrant=False, **options).sum().backward()
    assert found[0].ok, found[0].reason
    wanted = x.detach().requires_grad_()
    layer(wanted).sum().backward()
    assert torch.equal(x.grad, wanted.grad)


@pytest.mark.parametrize("operation", ops.OPERATIONS)
def test_the_callers_default_device_and_dtype_change_nothing(operation, device):
    """The device "meta" stands in for a GPU."""

    def tensors():
        return [t for p in self_check.problems(operation, "cpu", torch.float16) for t in p.tensors]

    wanted = tensors()
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        got = tensors()
        findings = [self_check.check((operation, "float32", d), device, "library") for d in DIRECTIONS]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, got, wanted)) and len(got) == len(wanted)
    assert all(finding.ok for finding in findings), findings


def test_the_child_forbids_tf32():
    """NVIDIA's containers allow it by a variable. Eager would err by 2^-11, and with it the bound."""
    code = """
import sys, torch
from nvembed_fast import self_check
self_check.run = lambda *_: sys.exit(torch.get_float32_matmul_precision())
self_check.main()
"""
    _, errors = child(code, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1")
    assert errors.splitlines()[-1] == "highest"


def child(code: str, timed: bool = False, **environment: str) -> tuple[str, str]:
    """What a child that checks or times one operation writes."""
    request = {"device": "cpu", "seconds": 100, "path": "torch", "timed": timed}
    item = ["swiglu", "float32", "forward"]
    pipe, env = subprocess.PIPE, os.environ | environment
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        process.stdin.write(f"{json.dumps(request)}\n{json.dumps(item)}\n")
        process.stdin.flush()
        lines = list(itertools.islice(process.stdout, 1))
        lines += itertools.takewhile(lambda line: "ready" not in line, process.stdout)
        # it ends itself when nobody can write to it
        process.stdin.close()
        return "".join(lines), process.stderr.read()


def test_the_child_ends_with_its_parent():
    code, request = (
        "from nvembed_fast import self_check; self_check.main()",
        {"device": "cpu", "seconds": 100},
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as process:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"ready": True}
        # a killed process closes its pipes
        process.stdin.close()
        try:
            assert process.wait(20) == 1
        finally:
            process.kill()


def test_the_child_tells_of_each_problem():
    output, _ = child("from nvembed_fast import self_check; self_check.main()")
    ready, *begun, finding = map(json.loads, output.splitlines())
    count = len(list(self_check.problems("swiglu", torch.device("cpu"), torch.float32)))
    begins = {"begun": ["swiglu", "float32", "forward"], "path": "torch"}
    assert count > 1 and begun == (1 + count) * [begins]
    assert ready == {"ready": True} and finding["ok"] and finding["path"] == "torch"


def test_the_child_tells_of_each_path_that_it_times():
    code = """
from nvembed_fast import self_check
def with_times(finding, device, begin):
    begin("library")
    return finding
self_check.with_times = with_times
self_check.main()
"""
    _, *begun, _ = map(json.loads, child(code, timed=True)[0].splitlines())
    assert [message["path"] for message in begun] == ["torch", "library"]


def test_a_path_is_begun_before_it_is_timed(monkeypatch):
    done = []
    monkeypatch.setattr(self_check, "_milliseconds", lambda item, device, path: done.append(path) or 2.0)
    finding = Finding("swiglu", "float16", "forward", "triton", True)
    timed = self_check.with_times(finding, torch.device("cuda", 0), lambda path: done.append(f"begin {path}"))
    assert done == ["begin triton", "triton", "begin library", "library"]
    assert timed.time_ms == timed.library_ms == 2.0
