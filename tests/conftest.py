import importlib.util
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import tiers
import torch
from downloads import or_skip
from fake_driver import fake_gpu  # noqa: F401 - a fixture
from tiers import pytest_addoption, pytest_configure  # noqa: F401 - hooks

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first `import triton`: kernels then run on the CPU
# a test of a kernel shall fail with it, and not pass by another path
os.environ["NVEMBED_FAST_SELF_CHECK"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
# an environment variable may allow TF32, and a bound would be that of TF32
torch.set_float32_matmul_precision("highest")

# torch.device("meta") as a context knows the functions it redirects from a list made on first use: made
# while `poison_empty` is at work, it would miss torch.empty, and "meta" models would take real memory
with torch.device("meta"):
    assert torch.empty(1).is_meta

# the interpreter alone is silently wrong in bf16
BF16 = pytest.param(torch.bfloat16)
if not HAS_GPU and importlib.util.find_spec("triton"):
    import exact_bf16
    import exact_products
    import quick_interpreter

    exact_products.install()
    quick_interpreter.install()
    if exact_bf16.IS_EXACT:
        exact_bf16.install()
    else:
        BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.skip(reason=exact_bf16.WHY_NOT))
KERNEL_DTYPES = [torch.float32, torch.float16, BF16]


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    tiers.deselect(config, items)
    for item in items:
        if HAS_GPU and "device" in item.fixturenames:
            item.add_marker("gpu")  # the kernel tests: in the interpreter without a GPU, on it with one
        elif not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: make test-gpu"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """Give memory back: several workers share a GPU."""
    if HAS_GPU and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture
def device() -> str:
    return "cuda" if HAS_GPU else "cpu"


def _paths() -> list[int]:
    if not HAS_GPU:
        return [80, 90]
    major, minor = torch.cuda.get_device_capability()
    return [10 * major + minor]


@pytest.fixture(params=_paths(), ids=lambda c: f"sm_{c}")
def path(request, monkeypatch) -> int:
    """Off a GPU both ways to load run in the interpreter. On a GPU the machine's own runs."""
    if not HAS_GPU:
        monkeypatch.setattr("nvembed_fast.kernels._common.INTERPRETED_CAPABILITY", request.param)
    return request.param


@pytest.fixture(params=KERNEL_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=KERNEL_DTYPES[1:], ids=lambda d: str(d).removeprefix("torch."))
def dtype16(request) -> torch.dtype:
    return request.param


@pytest.fixture
def all_cores():
    """CPU libraries sum in another order with several threads. `make test` gives a worker one."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """Scratch memory starts as NaN, so a kernel that leaves an element unwritten fails."""

    def poisoned(real):
        def empty(*args, **kwargs):
            t = real(*args, **kwargs)
            if t.is_floating_point() and not t.is_meta:
                t.detach().fill_(float("nan"))  # a leaf may be filled past autograd alone
            return t

        return empty

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT as in a terminal, here and in children: a shell's background job is started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def limited_files() -> Callable[[int], AbstractContextManager[None]]:
    """Inside limited_files(N) no file grows beyond N bytes: as on a full disk, a part of a write succeeds."""

    @contextmanager
    def limited(num_bytes: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """SmolLM2-135M, the decoder of the demo model."""
    from nvembed_fast.checkpoint import demo

    with or_skip("SmolLM2-135M"):
        return demo.decoder()


@pytest.fixture(scope="session")
def mistral_pieces_file() -> Path:
    """Mistral's SentencePiece model, which the wheel mistral-common carries."""
    from nvembed_fast import packages

    return packages.wheel_file(
        "mistral-common==1.13.1",
        "mistral_common/data/tokenizer.model.v1",
        sha256="dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    )


@pytest.fixture(scope="session")
def mistral_tokenizer(mistral_pieces_file):
    """NV-Embed's tokenizer, from that model."""
    import mistral_tokenizer

    return mistral_tokenizer.build(mistral_pieces_file)


@pytest.fixture(scope="session")
def tiny_directory(mistral_tokenizer, tmp_path_factory) -> Path:
    """tests/golden/tiny_a with its tokenizer beside it: a whole model directory."""
    directory = tmp_path_factory.mktemp("tiny")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(Path(__file__).parent / "golden" / "tiny_a" / name, directory / name)
    mistral_tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    return directory
