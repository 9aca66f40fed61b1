"""Where a model runs and in which dtype: devices and dtypes, checked."""

import torch

__all__ = ["DTYPES", "check_device", "check_dtype", "dtype_name"]

# by their names in safetensors files
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_SHORT_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}


def check_device(device: str | torch.device) -> torch.device:
    """The device, or a ValueError when it is not there."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is not a device: use 'cpu', 'cuda' or 'cuda:0'") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        have = f"only {count} CUDA device(s), from cuda:0" if count else "no CUDA device"
        raise ValueError(
            f"device {str(device)!r} is not there: torch {torch.__version__} finds {have}. "
            "Use device='cpu', or a torch built for CUDA on a machine with a GPU"
        )
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(device)!r} is not there: {error}") from error
    if found.type == "meta":
        raise ValueError("device 'meta' holds no weights: use 'cpu' or 'cuda'")
    return found


def check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype that weights can have, from itself or its name, or a ValueError."""
    found = dtype
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        found = getattr(torch, _SHORT_NAMES.get(name, name), None)
    if found not in DTYPES.values():
        names = ", ".join(dtype_name(d) for d in DTYPES.values())
        raise ValueError(f"dtype must be one of {names}, got {dtype!r}")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
