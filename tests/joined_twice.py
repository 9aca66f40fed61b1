"""One rank of runs that follow each other in one process, by DDP and by FSDP2."""

import faulthandler

from two_ranks import say
from whole_model import loss_of, make_batch, make_model

from nvembed_fast import ops
from nvembed_fast.training.ranks import joined, spread


def run(sharding: str) -> None:
    """What it holds of the ranks is gone when it returns."""
    with joined("cpu") as ranks:
        one_step(ranks, sharding)
        say(f"{sharding}: {ranks.total([1.0 + ranks.rank])[0]:.0f} on rank {ranks.rank}")


def one_step(ranks, sharding: str) -> None:
    model = spread(make_model(), ranks, sharding)
    with ops.use_impl("torch"):
        loss_of(model, make_batch("cpu", (4 + ranks.rank, 9, 1), seed=ranks.rank)).backward()


faulthandler.dump_traceback_later(180, exit=True)  # no rank that hangs stays behind
for sharding in ("ddp", "fsdp", "ddp", "fsdp"):
    run(sharding)
