"""Run the kernel tests with the CPU libraries of other CPUs.

    python -m tools.cpus                    the tests of every kernel, under every setting
    python -m tools.cpus Haswell Nehalem    these settings
    python -m tools.cpus --jobs 4 --tests tests/test_golden.py tests/test_backward.py

numpy, OpenBLAS, PyTorch, oneDNN and MKL choose their code by the CPU. Each takes an environment variable that
makes it choose as on an older one. Every setting runs in a process of its own:

1. A setting whose instructions this CPU lacks is skipped, and its line says so.
2. A probe asks the library what it took. A setting that the library ignored is an error, not a pass.
3. The tests run, and the line says how many passed. A failure prints the end of their output.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# what each library took, printed by a child
OPENBLAS = """
import ctypes, pathlib, numpy
for path in (pathlib.Path(numpy.__file__).parents[1] / "numpy.libs").glob("*openblas*"):
    name = ctypes.CDLL(str(path)).scipy_openblas_get_corename64_
    name.restype = ctypes.c_char_p
    print(name().decode())
"""
ATEN = "import torch; print(torch.backends.cpu.get_cpu_capability())"
ONEDNN = "import torch; torch.relu(torch.ones(8, 8).to_mkldnn())"
MKL = "import torch; torch.ones(64, 64) @ torch.ones(64, 64)"
NUMPY = """
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
print("numpy up to", max(name for name in __cpu_dispatch__ if __cpu_features__[name]))
"""
VERBOSE = {"ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}  # both print their instructions on the first call


@dataclass(frozen=True)
class Setting:
    """One way to run the tests.

    Args:
        needs: the flag in /proc/cpuinfo without which the code would meet an illegal instruction.
        found: what the probe must print.
    """

    name: str
    env: dict[str, str]
    needs: str
    probe: str
    found: tuple[str, ...]


AVX2 = {
    "OPENBLAS_CORETYPE": "Haswell",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NPY_ENABLE_CPU_FEATURES": "X86_V3",
}
SETTINGS = (
    *(
        Setting(core, {"OPENBLAS_CORETYPE": core}, needs, OPENBLAS, (core,))
        for core, needs in {
            "Haswell": "avx2",
            "SandyBridge": "avx",
            "Nehalem": "sse4_2",
            "SkylakeX": "avx512f",
        }.items()
    ),
    Setting("aten-avx2", {"ATEN_CPU_CAPABILITY": "avx2"}, "avx2", ATEN, ("AVX2",)),
    Setting("aten-default", {"ATEN_CPU_CAPABILITY": "default"}, "", ATEN, ("DEFAULT",)),
    Setting("onednn-avx2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "avx2", ONEDNN, ("isa:Intel AVX2",)),
    Setting("mkl-avx2", {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}, "avx2", MKL, ("(Intel(R) AVX2)",)),
    Setting("numpy-avx2", {"NPY_ENABLE_CPU_FEATURES": "X86_V3"}, "avx2", NUMPY, ("numpy up to X86_V3",)),
    # as on an AMD Zen 3, all at once
    Setting("all-avx2", AVX2, "avx2", OPENBLAS + ATEN, ("AVX2",)),
)


def cpu_flags() -> set[str]:
    """The instructions of this CPU, in the words of Linux. Elsewhere none are known."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split(":")[1].split()}


def tests_of(stem: str) -> list[str]:
    """The test files of a kernel: the first, and those of its backward where they stand apart."""
    names = [f"tests/test_{stem}{part}.py" for part in ("", "_gradients", "_backward")]
    return [name for name in names if (ROOT / name).exists()]


def kernel_tests() -> list[str]:
    """The test files of every kernel."""
    stems = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    return [name for stem in stems for name in tests_of(stem)]


def _child(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


def run(setting: Setting, tests: list[str], jobs: int, flags: set[str]) -> tuple[bool, str]:
    """(passed or skipped, the line to print)."""
    if setting.needs and setting.needs not in flags:
        return True, f"skipped: this CPU has no {setting.needs}"
    probe = _child(["-c", setting.probe], setting.env | VERBOSE)
    for wanted in setting.found:
        if wanted.lower() not in probe.stdout.lower():
            got = (probe.stdout or probe.stderr).strip()[-300:]
            return False, f"ignored: the library should take {wanted!r}, but it says {got!r}"
    start = time.monotonic()
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(jobs), "--dist", "loadfile", *tests]
    tested = _child(command, setting.env)
    if tested.returncode != 0:
        return (
            False,
            f"red after {time.monotonic() - start:.0f} s\n{tested.stdout[-4000:]}{tested.stderr[-500:]}",
        )
    return True, tested.stdout.strip().splitlines()[-1]


def main(argv: list[str] | None = None) -> int:
    names = [setting.name for setting in SETTINGS]
    parser = argparse.ArgumentParser(prog="python -m tools.cpus", description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"of {', '.join(names)}")
    parser.add_argument("--jobs", type=int, default=2, help="test processes at once [%(default)s]")
    parser.add_argument("--tests", nargs="+", help="instead of the test file of every kernel")
    args = parser.parse_args(argv)
    if unknown := set(args.settings) - set(names):
        parser.error(f"no such setting: {', '.join(sorted(unknown))}")
    flags, tests, every = cpu_flags(), args.tests or kernel_tests(), True
    for setting in SETTINGS:
        if not args.settings or setting.name in args.settings:
            passed, line = run(setting, tests, args.jobs, flags)
            every = every and passed
            variables = " ".join(f"{name}={value}" for name, value in setting.env.items())
            print(f"{setting.name:14} {variables}\n{'':14} {line}", flush=True)
    return 0 if every else 1


if __name__ == "__main__":
    sys.exit(main())
