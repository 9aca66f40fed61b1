"""Triton's launcher without a GPU: the fixture `fake_gpu`. What runs there: `fake_driver.gpu`."""

import concurrent.futures
import importlib.util
import multiprocessing
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fake_driver import gpu


def build(folder: Path) -> Path:
    """Compile libcuda.c to libcuda.so.1, the name by which Triton looks for it."""
    library = folder / "libcuda.so.1"
    # CUDA's signatures are wider than what is used of them
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*command, str(Path(__file__).with_name("libcuda.c"))], check=True)
    return library


@pytest.fixture(scope="session")
def fake_gpu(tmp_path_factory) -> Iterator[Callable]:
    """`fake_gpu(function, *args)`: the result of a function of a module on a machine with two fake GPUs.

    That is another process. The one of the tests has Triton's interpreter.
    """
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: cc")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton")
    folder = tmp_path_factory.mktemp("fake_driver")
    spawn = multiprocessing.get_context("spawn")
    start = (str(build(folder)), str(folder / "triton"))
    with concurrent.futures.ProcessPoolExecutor(1, spawn, gpu.start, start) as process:
        yield lambda function, *args: process.submit(gpu.call, function, *args).result()
