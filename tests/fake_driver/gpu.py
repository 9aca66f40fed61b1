"""A machine with two GPUs that launch nothing. Imported in a process that has no other driver.

1. Triton's binder and launcher are the real ones, on the libcuda of libcuda.c. It counts launches. As on a
   GPU it refuses a kernel or a stream of another device than the current one.
2. A `DeviceTensor` is CPU memory that says it lies on cuda:0 or cuda:1. PyTorch's own operations compute on
   it as on the CPU. Triton's kernels do nothing, so what they should have written stays NaN.
3. The compiler makes no code, because nothing would run it: `compiler` says "none". With "triton" it is the
   real one, which takes a second for a kernel.

Where host time counts, plain CPU tensors stand in for those of a GPU: `on_cpu`.
"""

import contextlib
import ctypes
import os
import sys
import types
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

Result = TypeVar("Result")
NUM_DEVICES = 2
CAPABILITY = 90


class Launch(NamedTuple):
    kernel: str
    device: int
    num_programs: int
    num_threads: int
    shared: int


class Call(NamedTuple):
    """A launch as Triton's launcher gets it.

    Attributes:
        function: the handle of a loaded kernel.
        arguments: all of the kernel, in its order.
    """

    function: int
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple


class _Launch(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("kernel", "device", "grid", "threads", "shared")]


class _Libcuda:
    """The counts of libcuda.c, and its faults."""

    def __init__(self, path: str):
        # before Triton looks for it by name
        self._lib = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        self._lib.fake_num_launches.restype = ctypes.c_long
        self._lib.fake_launch.restype = ctypes.POINTER(_Launch)
        self._lib.fake_kernel_name.restype = ctypes.c_char_p

    def launches(self, since: int) -> list[Launch]:
        found = []
        for i in range(since, self.num_launches):
            launch = self._lib.fake_launch(ctypes.c_long(i)).contents
            name = self._lib.fake_kernel_name(launch.kernel).decode()
            found.append(Launch(name, launch.device, launch.grid, launch.threads, launch.shared))
        return found

    @property
    def num_launches(self) -> int:
        return self._lib.fake_num_launches()

    @property
    def device(self) -> int:
        return self._lib.fake_get_device()

    @device.setter
    def device(self, index: int) -> None:
        self._lib.fake_set_device(index)

    def fail(self, load: int, launch: int) -> None:
        self._lib.fake_fail(load, launch)


class DeviceTensor(torch.Tensor):
    """CPU memory that tells Python that it lies on a GPU. PyTorch's C++ sees a tensor on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    device = property(lambda self: self.place)

    @staticmethod
    def __new__(cls, memory: torch.Tensor, place: torch.device):
        t = torch.Tensor._make_wrapper_subclass(
            cls,
            memory.shape,
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device=memory.device,
        )
        t.memory, t.place = memory, place
        return t

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _machine.compute(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def get_device(self) -> int:
        return self.place.index

    def cpu(self) -> torch.Tensor:
        return self.to("cpu")

    def tolist(self) -> list:
        return self.memory.tolist()

    def __repr__(self) -> str:
        return f"DeviceTensor({self.memory}, {self.place})"


class _Generator(torch.Generator):
    """A generator of the CPU that tells Python that it draws on a GPU."""

    device = property(lambda self: self.place)

    @staticmethod
    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.place = torch.device(device)
        return generator


class _Copied(torch.autograd.Function):
    """From one device to another."""

    @staticmethod
    def forward(ctx, t, device):
        ctx.back = t.device
        return _on(_memory(t).clone(), device)

    @staticmethod
    def backward(ctx, grad):
        return _on(_memory(grad).clone(), ctx.back), None


def _to(t: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """`torch.Tensor.to`, also to a GPU and from it."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", _machine.libcuda.device)
    if device is None or device == t.device:
        return t if dtype is None else _cast(t, dtype)
    return _cast(_Copied.apply(t, device), dtype or t.dtype)


_cast = torch.Tensor.to


class _Machine(TorchDispatchMode):
    """Operations on tensors of a GPU, computed on the CPU.

    Attributes:
        first_launch: the number of launches before this call.
        operations: how often each of PyTorch's own operations came, on a GPU.
        allocated: [(device, bytes)] of every `empty` on a GPU.
        calls: the last 16 launches, with their arguments.
    """

    def __init__(self, libcuda: _Libcuda):
        super().__init__()
        self.libcuda = libcuda
        self.reset()

    def reset(self) -> None:
        self.first_launch = self.libcuda.num_launches
        self.operations: Counter[str] = Counter()
        self.allocated: list[tuple[int, int]] = []
        self.calls: deque[Call] = deque(maxlen=16)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.compute(func, args, kwargs or {})

    def compute(self, func, args, kwargs):
        devices = {t.place for t in tree_flatten((args, kwargs))[0] if isinstance(t, DeviceTensor)}
        device = next(iter(devices), None)
        wanted = kwargs.get("device")
        if wanted is not None:
            # a tensor's own new_empty asks for the device that C++ sees
            if wanted.type == "cuda":
                device = torch.device("cuda", self.libcuda.device if wanted.index is None else wanted.index)
            kwargs = dict(kwargs, device=torch.device("cpu"))
        if device is None:
            return func(*args, **kwargs)
        if len(devices) > 1:
            raise RuntimeError(f"{func} of tensors on {' and '.join(sorted(map(str, devices)))}")
        if func.namespace == "nvembed_fast":
            # our operations launch kernels, and have to see where the tensors are
            name = func.name().split(".")[0]
            with self:
                return torch._library.custom_ops.OPDEFS[name]._backend_fns[None](*args, **kwargs)
        memory = func(*tree_map(_memory, args), **tree_map(_memory, kwargs))
        name = func.overloadpacket.__name__
        self.operations[name] += 1
        if "empty" in name:
            self.allocated.append((device.index, memory.untyped_storage().nbytes()))
            if memory.is_floating_point():
                memory.fill_(float("nan"))
        return return_and_correct_aliasing(
            func, args, kwargs, tree_map(lambda value: _on(value, device), memory)
        )


def _memory(value):
    return value.memory if isinstance(value, DeviceTensor) else value


def _on(value, device: torch.device):
    """A tensor of the CPU as one of a device. Other values as they are."""
    if device.type == "cpu" or not isinstance(value, torch.Tensor) or isinstance(value, DeviceTensor):
        return value
    return DeviceTensor(value, device)


_machine: _Machine


def start(path: str, cache: str) -> None:
    """Make this process one on a machine with two GPUs.

    Args:
        path: of the compiled libcuda.so.1.
        cache: a folder for what Triton compiles.
    """
    global _machine
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ |= {"TRITON_LIBCUDA_PATH": os.path.dirname(path), "TRITON_CACHE_DIR": cache, "CC": "cc"}
    torch.set_num_threads(1)
    _machine = _Machine(_Libcuda(path))
    _machine.__enter__()
    _patch_torch()
    _set_driver()
    _set_compiler()


def call(function: Callable[..., Result], *args) -> Result:
    """A function on the machine as it was started: device 0, nothing compiled, launched or counted."""
    _machine.libcuda.device = 0
    _machine.reset()
    forget_kernels()
    return function(*args)


def forget_counts() -> None:
    """Count from here."""
    _machine.reset()


def launches() -> list[Launch]:
    """All launches of this call, in their order."""
    return _machine.libcuda.launches(_machine.first_launch)


def operations() -> Counter[str]:
    """How often each of PyTorch's own operations came in this call, on tensors of a GPU."""
    return _machine.operations


def allocated() -> list[tuple[int, int]]:
    """(device, bytes) of every `empty` of this call."""
    return _machine.allocated


def last_call() -> Call:
    return _machine.calls[-1]


@contextlib.contextmanager
def failing(*, load: int = 0, launch: int = 0) -> Iterator[None]:
    """Return these errors of CUDA where a kernel is loaded or launched. 2 is "out of memory"."""
    _machine.libcuda.fail(load, launch)
    try:
        yield
    finally:
        _machine.libcuda.fail(0, 0)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Let the kernels take plain CPU tensors inside a `with` block, for times of the host.

    What a `DeviceTensor` computes and counts in Python would be a part of them.
    """
    from nvembed_fast import ops
    from nvembed_fast.kernels import _common

    _machine.__exit__(None, None, None)
    try:
        with (
            ops.use_impl("triton"),
            mock.patch.object(ops, "_triton_obstacle", lambda device, dtype: None),
            mock.patch.object(_common, "INTERPRETED_CAPABILITY", CAPABILITY),
        ):
            yield
    finally:
        _machine.__enter__()


def _patch_torch() -> None:
    """What torch.cuda asks of a driver."""
    lib = _machine.libcuda

    def exchange(index: int) -> int:
        before = lib.device
        if index >= 0:
            lib.device = index
        return before

    major, minor = divmod(CAPABILITY, 10)
    properties = types.SimpleNamespace(
        name="fake GPU", major=major, minor=minor, total_memory=80 << 30, multi_processor_count=132
    )
    replaced = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: NUM_DEVICES,
        "is_initialized": lambda: True,
        "current_device": lambda: lib.device,
        "set_device": lambda device: setattr(lib, "device", torch.device(device).index),
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "synchronize": lambda device=None: None,
        # one stream, which has nothing to wait for
        "current_stream": lambda device=None: types.SimpleNamespace(record_event=lambda: "event"),
        "is_current_stream_capturing": lambda: False,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_getCurrentRawStream = lambda index: index + 1
    torch.Tensor.to = _to
    torch.Generator = _Generator
    # Module.to: not by exchanging the memory of a parameter
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.Tensor.cuda = lambda self, device=0: self.to(torch.device("cuda", torch.device(device).index or 0))
    torch.Tensor.pin_memory = lambda self, device=None: self
    torch.Tensor.is_pinned = lambda self, device=None: False


def _set_driver() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    lib = _machine.libcuda

    class Launcher(CudaLauncher):
        def __call__(self, *args):
            grid, stream, function, arguments = args[:3], args[3], args[4], args[9:]
            _machine.calls.append(Call(function, grid, stream, arguments))
            super().__call__(*args)

    class Driver(CudaDriver):
        def __init__(self):
            self.utils = CudaUtils()
            self.launcher_cls = Launcher
            self.get_device_capability = torch.cuda.get_device_capability
            self.get_current_device = torch.cuda.current_device
            self.set_current_device = torch.cuda.set_device
            # the current stream of a device
            self.get_current_stream = lambda device: device + 1

        def get_current_target(self):
            return GPUTarget("cuda", CAPABILITY, 32)

    lib.device = 0
    triton.runtime.driver.set_active(Driver())


_compiler = "none"


@contextlib.contextmanager
def compiler(name: str) -> Iterator[None]:
    """Compile by "triton", or by "none" (how the process starts), inside a `with` block."""
    global _compiler
    import triton

    before, _compiler = _compiler, name
    forget_kernels()
    # the key of a binary does not say who made it
    folder = triton.knobs.cache.dir
    triton.knobs.cache.dir = os.path.join(os.environ["TRITON_CACHE_DIR"], name)
    try:
        yield
    finally:
        _compiler = before
        triton.knobs.cache.dir = folder
        forget_kernels()


def _set_compiler() -> None:
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import ASTSource

    make_ir, add_stages = ASTSource.make_ir, CUDABackend.add_stages

    def no_ir(self, *args):
        return self if _compiler == "none" else make_ir(self, *args)

    def no_stages(self, stages, *args):
        if _compiler == "none":
            stages |= {"ttir": lambda source, metadata: source, "cubin": _no_code}
        else:
            add_stages(self, stages, *args)

    ASTSource.make_ir, CUDABackend.add_stages = no_ir, no_stages
    # of the keys of binaries, and printed into its folder
    ASTSource.__str__ = lambda self: self.name


def _no_code(source, metadata: dict) -> bytes:
    """In the place of a binary, and what the launcher asks for beside it."""
    flags = {source.fn.arg_names[place[0]]: value for place, value in source.constants.items()}
    metadata |= {"name": source.name, "shared": 0, "tmem_size": 0, "tensordesc_meta": None}
    metadata |= {"global_scratch_align": 128, "profile_scratch_size": 0, "profile_scratch_align": 1}
    # room for the descriptors of a program
    metadata["global_scratch_size"] = 512 if flags.get("USE_TMA") else 0
    return b"no code"


def kernels() -> dict[str, object]:
    """The `@triton.jit` kernels of nvembed_fast that have been imported, by their names."""
    from triton.runtime.jit import JITFunction

    modules = [
        module for name, module in list(sys.modules.items()) if name.startswith("nvembed_fast.kernels.")
    ]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    return {kernel.__name__: kernel for kernel in found if kernel.__name__.endswith("_kernel")}


def variants() -> dict[str, int]:
    """How many binaries each kernel has on all devices, where it has any."""
    counts = {
        name: sum(len(binaries) for binaries, *_ in kernel.device_caches.values())
        for name, kernel in kernels().items()
    }
    return {name: count for name, count in counts.items() if count}


def forget_kernels() -> None:
    """Let the next launch of every kernel compile again."""
    for kernel in kernels().values():
        kernel.device_caches.clear()
    if (tuned := sys.modules.get("nvembed_fast.kernels.tuned")) is not None:
        # what launchers keep
        with tuned.use({}):
            pass
