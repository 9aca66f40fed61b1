import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first `import triton`: kernels then run on the CPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub

# the Triton interpreter is silently wrong in bf16, so bf16 parity is checked on a GPU alone
KERNEL_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if HAS_GPU else [])


def pytest_collection_modifyitems(items):
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: make test-gpu"))


@pytest.fixture
def device() -> str:
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(params=KERNEL_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """Scratch memory starts as NaN, so a kernel that leaves an element unwritten fails."""

    def poisoned(real):
        def empty(*args, **kwargs):
            t = real(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() and not t.is_meta else t

        return empty

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
