import platform
import subprocess
import sys

import pytest

HELD = """
import ctypes
import torch
from nvembed_fast.training.ranks import joined

class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo

def step():
    torch.ones(30 * 2**18)  # 30 MB, whose end raises the size from which memory is given back
    before = mallinfo().hblkhd
    held = torch.ones(2**21)  # 8 MB
    return mallinfo().hblkhd - before

with joined("cpu"):
    step()
    print(step())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_of_tensors_goes_back_to_the_system():
    run = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 2**23
