"""One text at a time through CUDA graphs, for the latency of a query: the host launches once, not 300 times.

1. A text is put into a bucket of tokens, the next power of two. The rest of the bucket is a second text. Its
   vector is ignored. It cannot disturb the first one, because packed texts do not see each other.
2. Everything that depends on the text lies in one int32 buffer on the device: its ids, its end, its pool mask
   and the kernels' tile lists. The model is captured once per bucket, and reads from that buffer.
3. A text is one copy into that buffer and one replay.
4. While the device computes, the host looks whether the model is still the one that was captured. If not, the
   vector is dropped, and the text runs again by a new capture.
5. Graphs share scratch memory, also those of two models, and a bucket has one buffer. So a lock of the device
   lets one thread at a time copy, replay and take its result. The device does them in this order, whatever
   streams the threads are on.

The invariant: a captured launch depends on the bucket alone. So a tile list has the same length for all texts
of a bucket. If a text needs fewer tiles, one tile is computed twice, to the same values.

A graph holds the addresses it was captured with. It is captured anew when a weight has changed or moved. A
replay needs all weights at their addresses, even one whose result is dropped, so these are looked at before.
Code that was added to the model, such as an adapter or a hook, decides anew in every call. A model that holds
any runs without graphs. So does one whose operations do not all take kernels of a GPU: PyTorch's paths go by
the host's lists, which a graph does not read.
"""

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import numpy as np
import torch

from nvembed_fast.kernels.layout import SeqLayout, pinned
from nvembed_fast.kernels.streams import Kept
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.network.pooling_heads import runs_as_written
from nvembed_fast.packing import PackedBatch

__all__ = ["MAX_TOKENS", "MIN_BUCKET", "BucketLayout", "SingleTextGraphs", "bucket_of", "captured"]

T = TypeVar("T")

# a text fits one tile of mean_pool, whose second kernel would go by the host's lists
MAX_TOKENS = 256
MIN_BUCKET = 16
# int32 elements: kernels compile once more for an address that is no multiple of 16 bytes
_ALIGNMENT = 4
# whose work a graph holds. Tests play a graph on a CPU
_DEVICE_TYPES = ("cuda",)


def bucket_of(length: int) -> int:
    """The tokens of the bucket of a text."""
    return max(MIN_BUCKET, 1 << (length - 1).bit_length())


class BucketLayout(SeqLayout):
    """A text and the rest of its bucket, on device tensors that keep their addresses.

    The host's lists are those of a text that fills the bucket. Launches must not depend on them.

    Attributes:
        input_ids: [bucket] int32 on the device.
        keep: [bucket] int32 on the device, 1 at the tokens to pool.
    """

    def __init__(self, bucket: int, device: torch.device, blocks: tuple[int, ...] = ()):
        """
        Args:
            bucket: T.
            device: of the buffer.
            blocks: of the tile lists that the kernels will ask for.
        """
        super().__init__((bucket, 0), device)
        self.blocks = blocks
        self._shapes = [(bucket,), (bucket,), (3,), (bucket,), *((self._num_tiles(b), 2) for b in blocks)]
        self._size = sum(map(_aligned_size, self._shapes))
        # written to by every later text, also outside of the inference mode of the first one
        with torch.inference_mode(False):
            self._buffer = torch.zeros(self._size, dtype=torch.int32, device=device)
        views = (
            part.view(shape) for part, shape in zip(self._parts(self._buffer), self._shapes, strict=True)
        )
        self.input_ids, self.keep, self.cu_seqlens, self.positions, *tiles = views
        kept = Kept(self._buffer)
        self._cache = {("tiles", block): (kept, tile) for block, tile in zip(blocks, tiles, strict=True)}
        # of a text that fills the bucket. A shorter one takes the first of them
        self._counts = np.arange(bucket, dtype=np.int32)
        self._firsts = [self._counts[: self._num_tiles(block) - 1] * block for block in blocks]

    def put(self, ids: np.ndarray, first_pooled: int) -> None:
        """Write a text of at most T tokens into the buffer, without waiting for the device."""
        length, rest = len(ids), self.num_tokens - len(ids)
        host = np.empty(self._size, dtype=np.int32)
        into_ids, keep, cu_seqlens, positions, *tiles = self._parts(host)
        into_ids[:length], into_ids[length:] = ids, 0
        keep[:] = 0
        keep[first_pooled:length] = 1
        cu_seqlens[:] = 0, length, self.num_tokens
        positions[:length], positions[length:] = self._counts[:length], self._counts[:rest]
        for block, firsts, tile in zip(self.blocks, self._firsts, tiles, strict=True):
            of_text, of_both = -(-length // block), -(-length // block) - (-rest // block)
            # [tiles, 2]: sequence, its first token. The list is filled up with one of them
            tile = tile.reshape(-1, 2)
            tile[:] = 0 if length else 1, 0
            tile[:of_text, 1] = firsts[:of_text]
            tile[of_text:of_both, 0] = 1
            tile[of_text:of_both, 1] = firsts[: of_both - of_text]
        self._buffer.copy_(pinned(torch.from_numpy(host), self.device), non_blocking=True)

    def split_seqs(self, block: int) -> torch.Tensor:
        raise AssertionError(f"a bucket of {self.num_tokens} tokens is cut into {block}: lower MAX_TOKENS")

    def runs(self) -> NoReturn:
        raise AssertionError("an operation that goes by the host's lists is captured, and they are no text's")

    def _parts(self, buffer):
        """The parts of a buffer, of a tensor or an array, each flat and from a multiple of 16 bytes."""
        start = 0
        for shape in self._shapes:
            yield buffer[start : start + math.prod(shape)]
            start += _aligned_size(shape)

    def _num_tiles(self, block: int) -> int:
        """The max number of tiles of a text and the rest of its bucket together."""
        return -(-self.num_tokens // block) + 1


def _aligned_size(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT


@dataclasses.dataclass(frozen=True)
class _Graph:
    layout: BucketLayout
    replay: Callable[[], torch.Tensor]
    addresses: list[int]
    state: tuple
    held: list[object]  # tensors that a replay reads and that nothing else need keep alive

    def __call__(self, ids: np.ndarray, first_pooled: int) -> torch.Tensor:
        self.layout.put(ids, first_pooled)
        # the next replay overwrites its result
        return self.replay()[:1].clone()


@dataclasses.dataclass
class _Turns:
    """Of the graphs of a device. Those of one thread share cuBLAS's memory, whatever their model."""

    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    last: torch.cuda.Event | None = None  # behind the last result that was taken


_turns: dict[torch.device, _Turns] = {}


@contextmanager
def _turn(device: torch.device) -> Iterator[None]:
    """One thread at a time, and on the device behind the last turn, even that of another stream."""
    turns = _turns.setdefault(device, _Turns())
    if device.type != "cuda":
        with turns.lock:
            yield
        return
    with turns.lock, torch.cuda.device(device):
        if turns.last is not None:
            torch.cuda.current_stream().wait_event(turns.last)
        try:
            yield
        finally:
            turns.last = torch.cuda.current_stream().record_event()


class SingleTextGraphs:
    """The vectors of single texts, by one graph per bucket, captured when its first text comes."""

    def __init__(self, model: NVEmbedModel):
        self.model = model
        self._modules = tuple(model.modules())
        self._children = _children(self._modules)
        self._start()

    def _start(self) -> None:
        self._drop()
        self._without: set[tuple[torch.device, torch.dtype]] = set()  # whose work no graph holds

    @property
    def buckets(self) -> list[int]:
        """Those that have a graph. Texts of all others have run without one."""
        return sorted(self._graphs)

    @torch.no_grad()
    def __call__(self, ids: np.ndarray, first_pooled: int) -> torch.Tensor:
        """[1, D] fp32 vector of a text.

        Args:
            ids: [S] int, S at most MAX_TOKENS.
            first_pooled: the number of leading tokens that are not pooled.
        """
        device, dtype = self._place()
        bucket = bucket_of(len(ids))
        if (device, dtype) not in self._without:
            with _turn(device):
                graph, weights = self._graphs.get(bucket), self._weights()
                if graph is not None and graph.addresses == _addresses(weights):
                    vector = graph(ids, first_pooled)
                    # while the device computes it
                    if self._is_as_built() and self._state(weights) == graph.state:
                        return vector
                if self._is_as_built() and (graph := self._capture(bucket)) is not None:
                    self._graphs[bucket] = graph
                    return graph(ids, first_pooled)
                # until the added code has gone, no text is computed in vain
                self._drop()
        return self.model(PackedBatch.from_ids([ids], [first_pooled], device))

    def forget(self) -> None:
        """Drop all graphs, which read tensors that are out of date, and ask anew who goes without."""
        with _turn(self._place()[0]):
            self._start()

    def _drop(self) -> None:
        self._graphs: dict[int, _Graph] = {}
        # PyTorch refuses to capture into a pool that has lost all its graphs
        self._pool: tuple | None = None

    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of the first weight, which is the backbone's."""
        return next(
            ((w.device, w.dtype) for w in self.model.parameters()), (torch.device("cpu"), torch.float32)
        )

    def _is_as_built(self) -> bool:
        # modules compare by identity
        return _children(self._modules) == self._children and runs_as_written(*self._modules)

    def _weights(self) -> list[torch.Tensor]:
        """Those of the model as it was built, in flat loops: `model.parameters` takes ten times as long."""
        return [w for module in self._modules for w in module._parameters.values() if w is not None]

    def _state(self, weights: list[torch.Tensor]) -> tuple:
        # inference tensors cannot change
        versions = [0 if weight.is_inference() else weight._version for weight in weights]
        head = self.model.head
        return versions, getattr(head, "mode", None), getattr(head, "output_normalize", None)

    def _capture(self, bucket: int) -> _Graph | None:
        """The graph of a bucket. None: no graph holds what weights of this device and dtype run."""
        (device, dtype), weights = self._place(), self._weights()
        addresses, state = _addresses(weights), self._state(weights)
        ids = np.zeros(bucket, dtype=np.int32)
        # an ordinary run shows which lists the operations ask for
        plain = PackedBatch.from_ids([ids, ids[:0]], [0, 0], device)
        self.model(plain)
        if device.type not in _DEVICE_TYPES or plain.layout.has_runs():
            self._without.add((device, dtype))
            return None
        layout = BucketLayout(bucket, device, plain.layout.tile_blocks())
        layout.put(ids, 0)

        def run() -> torch.Tensor:
            return self.model(PackedBatch(layout.input_ids, layout, layout.keep != 0))

        pool = self._pool or torch.cuda.graph_pool_handle()
        while True:
            held = self._shared(bucket)
            replay = captured(run, pool)
            # another thread's text may have replaced one meanwhile, such as the tables by longer ones
            if list(map(id, held)) == list(map(id, self._shared(bucket))):
                self._pool = pool  # not before: a capture that raises leaves a pool without a graph
                return _Graph(layout, replay, addresses, state, held)

    def _shared(self, bucket: int) -> list[object]:
        """What a forward reads beside weights and batch."""
        return [self.model.embedding_model.rotary_tables(bucket), *self.model.head.cached().values()]

    def __getstate__(self) -> dict:
        # copies and pickles capture their own
        return {"model": self.model, "_modules": self._modules, "_children": self._children}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start()


def _children(modules: tuple[torch.nn.Module, ...]) -> list[torch.nn.Module | None]:
    """The children of all modules. Equal lists mean equal trees."""
    return [child for module in modules for child in module._modules.values()]


def _addresses(weights: list[torch.Tensor]) -> list[int]:
    return [weight.data_ptr() for weight in weights]


def captured(run: Callable[[], T], pool=None) -> Callable[[], T]:
    """A replay of `run` by a CUDA graph. It returns the result, which always has the same address."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # the first run compiles and builds, which cannot be captured
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # other threads may allocate and copy meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = run()

    def replay() -> T:
        graph.replay()
        return result

    return replay
