"""Tensors that one stream of a GPU makes, and others may read later.

PyTorch orders the work of one stream. What is kept between calls, such as a table, may be read by a stream
that did not make it: before it is filled, or after its memory went to somebody else. So another stream waits,
on the device, for the event behind the making, and the allocator is told that it reads. Each once per stream.
"""

import torch

__all__ = ["Kept"]


class Kept:
    """Tensors of one device, just made on its current stream and kept for later calls.

    Attributes:
        tensors: to be read behind `here`.
    """

    def __init__(self, *tensors: torch.Tensor):
        self.tensors = tensors
        self._made: torch.cuda.Event | None = None
        self._streams: set[int] = set()
        device = tensors[0].device
        if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return
        self._device = device
        self._made = torch.cuda.current_stream(device).record_event()
        self._streams.add(_current(device))

    def here(self) -> None:
        """Order what the current stream will do behind the making. Free on the stream that made them.

        Inside the capture of a CUDA graph, and under torch.compile, nothing is ordered. A capture begins when
        the device has finished all work, and a compiled model belongs to one stream.
        """
        if torch.compiler.is_compiling() or self._made is None or _current(self._device) in self._streams:
            return
        if torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._made)
        for tensor in self.tensors:
            tensor.record_stream(stream)
        self._streams.add(stream.cuda_stream)

    def __reduce__(self):
        # an event belongs to one process, and a copy has been made on the stream that copies
        return Kept, self.tensors


def _current(device: torch.device) -> int:
    # a tenth of the time of torch.cuda.current_stream
    return torch._C._cuda_getCurrentRawStream(device.index)
