"""Counts how often the host waits for a device, without one: "meta" plays it.

It sees each copy to the host (`cpu`, `tolist`, `numpy`), each value (`item`, `bool`, `equal`), and each copy
to the device that was not asked for without a wait. It refuses an operation whose result has a size that the
device alone knows, such as `nonzero` and an index by a mask.

It does not see a wait for an event or a stream, such as that of `Result.put` for the batch before the last.
It does not see whether memory is pinned, nor what CUDA's allocator and launches do. PyTorch's path is taken
on "meta", so it sees none of the launchers.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SIZED_BY_VALUES = ("argwhere", "bincount", "masked_select", "nonzero", "repeat_interleave", "unique")
VALUES = {"_local_scalar_dense": 1, "equal": True, "is_nonzero": True}


class Waits(TorchDispatchMode):
    """Inside, `waits` fills with what waits, and `copies` counts the copies to the device.

    Args:
        answers: what the device gives to the next copies to the host. Afterwards it gives ones.
    """

    def __init__(self, *answers: torch.Tensor):
        super().__init__()
        self.answers, self.waits, self.copies = list(answers), [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").split(".")[0]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(t.is_meta for t in tensors):
            is_mask = name.startswith("index") and any(t.dtype == torch.bool for t in tensors[1:])
            assert not name.startswith(SIZED_BY_VALUES) and not is_mask, f"{name} asks the device for a size"
            if name in VALUES:
                self.waits.append(name)
                return VALUES[name]
        if name == "_to_copy":
            return self._copy(func, args, kwargs, args[0], kwargs.get("device", args[0].device).type)
        if name == "copy_":
            return self._copy(func, args, kwargs, args[1], args[0].device.type)
        return func(*args, **kwargs)

    def _copy(self, func, args, kwargs, source: torch.Tensor, device: str):
        if source.is_meta and device != "meta":
            self.waits.append("to the host")
            answer = self.answers.pop(0) if self.answers else torch.ones(source.shape)
            assert answer.shape == source.shape, "the device has an answer of another shape"
            return func(args[0], answer) if len(args) > 1 else answer.to(kwargs.get("dtype") or source.dtype)
        if not source.is_meta and device == "meta":
            self.copies += 1
            if not (kwargs.get("non_blocking") or args[2:] == (True,)):
                self.waits.append("to the device")
        return func(*args, **kwargs)
