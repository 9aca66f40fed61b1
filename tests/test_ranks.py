import platform
import subprocess
import sys
import weakref

import pytest
import torch.distributed as dist

from nvembed_fast.training.ranks import joined

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


def test_what_an_error_holds_is_given_up_before_the_group_ends(monkeypatch):
    class Model:
        pass

    models, alive = [], []

    def stop():
        model = Model()
        model.itself = model
        models.append(weakref.ref(model))
        raise KeyboardInterrupt

    def fail():
        model = Model()
        models.append(weakref.ref(model))
        try:
            stop()
        except KeyboardInterrupt:
            raise OSError("the disk is full") from None

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: alive.extend(model() for model in models))
    with pytest.raises(OSError, match="the disk is full"), joined("cpu"):
        fail()
    assert alive == [None, None]
