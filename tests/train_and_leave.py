"""One rank of `nvembed-fast train RECIPE`, which may hold no spread model where the group ends."""

import gc
import sys

import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from two_ranks import say

from nvembed_fast import cli

SPREAD = DistributedDataParallel | FSDPModule
real = dist.destroy_process_group


def destroy() -> None:
    left = [type(thing).__name__ for thing in gc.get_objects() if issubclass(type(thing), SPREAD)]
    say(f"rank {dist.get_rank()} holds {left}")
    real()


dist.destroy_process_group = destroy
sys.exit(cli.main(["train", sys.argv[1]]))
