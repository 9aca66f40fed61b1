"""One rank of `nvembed-fast train RECIPE` with an evaluation behind each step.

It may hold no spread model where the group ends.
"""

import functools
import gc
import sys

import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from two_ranks import say

from nvembed_fast import cli
from nvembed_fast.packing import PackedBatch
from nvembed_fast.training import trainer

SPREAD = DistributedDataParallel | FSDPModule
real = dist.destroy_process_group


def destroy() -> None:
    left = [type(thing).__name__ for thing in gc.get_objects() if issubclass(type(thing), SPREAD)]
    say(f"rank {dist.get_rank()} holds {left}")
    real()


def evaluate(network, tokenizer, step: int) -> dict[str, float]:
    tokens = tokenizer(["w1 w2 w3"], "", 48)
    return {"first": network(PackedBatch.from_ids(tokens.ids, tokens.first_pooled, "cpu"))[0, 0].item()}


dist.destroy_process_group = destroy
trainer.train = functools.partial(trainer.train, evaluate=evaluate, evaluate_every=1)
sys.exit(cli.main(["train", sys.argv[1]]))
