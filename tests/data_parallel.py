"""One rank of `test_two_processes_get_the_mean_gradient`: torchrun data_parallel.py DEVICE."""

import contextlib
import copy
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_ranks import leave, say
from whole_model import gradients_of, loss_of, make_batch, make_model

from nvembed_fast import ops

HOWS = ("ddp", "ddp_built_once", "fsdp2", "fsdp2_mixed_precision")


def shard(model, policy: MixedPrecisionPolicy):
    backbone = model.embedding_model
    for module in (backbone.embed_tokens, *backbone.layers, model.head, model):
        fully_shard(module, mp_policy=policy)
    return model


def check(how: str, device: str) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = make_model(device=device)
    # the interpreter is wrong in bf16
    low = torch.float16 if device == "cpu" else torch.bfloat16
    mixed = how == "fsdp2_mixed_precision"
    alone = copy.deepcopy(model).to(low if mixed else torch.float32)
    batches = [make_batch(device, (4 + r, 9, 1), seed=r) for r in range(ranks)]
    wanted = [{n: g.float() for n, g in gradients_of(alone, b, "triton").items()} for b in batches]
    wanted = {n: sum(w[n] for w in wanted) / ranks for n in wanted[0]}
    if how.startswith("ddp"):
        run = DistributedDataParallel(model)
    else:
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        run = shard(model, policy if mixed else MixedPrecisionPolicy())
        with pytest.raises(ValueError, match="built_once needs whole weights"), model.head.built_once():
            pass
    once = model.head.built_once() if how == "ddp_built_once" else contextlib.nullcontext()
    with ops.use_impl("triton"), once:
        loss_of(run, batches[rank]).backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
    say(f"{how}: equal on rank {rank}")


def main(device: str) -> None:
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank())
    for how in HOWS:
        check(how, device)
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
