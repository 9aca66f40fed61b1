"""The processes of a run: one alone, or those that torchrun has started. And the model spread over them."""

import ctypes
import functools
import gc
import itertools
import os
import platform
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.placement import check_device

__all__ = ["Ranks", "joined", "spread"]

# the others wait while the first rank reads all rows or writes a model. torchrun ends them if it dies
_PATIENCE = timedelta(hours=3)
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_numbers = itertools.count()  # of the groups of this process


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        device: of its model.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def total(self, values: list[float]) -> list[float]:
        """The sums over all ranks. It waits for them and for the device."""
        if self.size == 1:
            return values
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(device: str | torch.device | None = None) -> Iterator[Ranks]:
    """The ranks that the environment of torchrun states, and one without it. They talk by NCCL or Gloo.

    Models that are spread over them must be given up inside. One that is left holds the group and its
    threads, and those of Gloo may abort the process when the interpreter ends (torch 2.13). What an error
    holds is given up here.

    Args:
        device: "cuda" is the GPU of this rank. None takes it if there is one, else the CPU.
    """
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = check_device(f"cuda:{local}" if str(device) == "cuda" else device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    else:
        _give_memory_back()
    # another one may have joined them, such as a test
    starts = size > 1 and not dist.is_initialized()
    if starts:
        store, rank, size = _meeting_place()
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"group {next(_numbers)}", store),
            rank=rank,
            world_size=size,
            timeout=_PATIENCE,
        )
    try:
        yield Ranks(dist.get_rank() if size > 1 else 0, size, place)
    except BaseException as error:
        cause: BaseException | None = error
        while starts and cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__context__
        raise
    finally:
        if starts:
            gc.collect()  # modules lie in cycles
            dist.destroy_process_group()


@functools.cache
def _meeting_place() -> tuple[dist.Store, int, int]:
    """The store of torchrun, the number of this rank, and how many there are.

    A group leaves its addresses in it. One of the same name would read those of the last, and wait for it.
    """
    return next(dist.rendezvous("env://", timeout=_PATIENCE))


def _give_memory_back() -> None:
    """Let glibc give the memory of every large tensor back to the system.

    Of itself it keeps more and more of them, up to 32 MB each, and batches of ever new sizes leave holes. A
    run of 6 layers on 2 cores with AMX held 15.5 GB after 154 steps. With this the peak of its next 112 steps
    was 4.8 GB (2026-11-26, glibc 2.36).
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def spread(network: NVEmbedModel, ranks: Ranks, sharding: str) -> nn.Module:
    """The model as every rank runs it: itself on one rank, else by DDP, or cut up in place by FSDP2."""
    if ranks.size == 1:
        return network
    if sharding == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in network.embedding_model.layers:
            fully_shard(layer)
        fully_shard(network)  # in place
        return network
    from torch.nn.parallel import DistributedDataParallel

    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(network, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
