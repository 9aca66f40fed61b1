import platform
import subprocess
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
from two_ranks import ROOT, run_on_two_ranks

from nvembed_fast.training import ranks
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
    monkeypatch.setattr(ranks, "_meeting_place", lambda: (dist.HashStore(), 0, 2))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: alive.extend(model() for model in models))
    with pytest.raises(OSError, match="the disk is full"), joined("cpu"):
        fail()
    assert alive == [None, None]


@pytest.mark.parametrize("device", [None, "cuda", torch.device("cuda")])
def test_cuda_is_the_gpu_of_this_rank(device, monkeypatch):
    current = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(ranks, "check_device", torch.device)
    with joined(device) as here:
        assert here.device == torch.device("cuda", 1)
    assert current == [here.device]


def test_runs_follow_each_other_in_one_process():
    """With groups of one name they hung: those of the second found the addresses of the first."""
    said = run_on_two_ranks(ROOT / "tests" / "joined_twice.py", timeout=200).split("\n")
    wanted = [f"{sharding}: 3 on rank {rank}" for sharding in ("ddp", "fsdp") for rank in (0, 1)]
    assert sorted(line for line in said if line) == sorted(2 * wanted)
