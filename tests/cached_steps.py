"""A model with dropout, texts, and the plain gradient of a step. Imported by the tests of the steps.

Run by torchrun it is one rank of `test_two_ranks_get_the_gradient_of_one_process`.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_lora import adapted_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel
from two_ranks import leave, say
from whole_model import HEADS, VOCAB, make_model

from nvembed_fast import ops
from nvembed_fast.checkpoint import load_adapter, merge_adapter, save_adapter
from nvembed_fast.packing import PackedBatch, token_budget_batches
from nvembed_fast.tokenization import TokenizedTexts
from nvembed_fast.training import grad_cache
from nvembed_fast.training.batch import TrainingBatch
from nvembed_fast.training.grad_cache import cached_step, direct_step
from nvembed_fast.training.loss import Candidates, LossResult, contrastive_loss


def dropped_model(dropout: float = 0.1, head=HEADS[1], dtype=torch.float32):
    """With LoRA on its layers as if trained, and its head in training."""
    return adapted_model(head, "full", dtype, dropout).train()


def make_texts(num_queries: int = 6, seed: int = 0) -> TokenizedTexts:
    """Queries, then two documents for each."""
    draw = np.random.default_rng(seed)
    lengths = [*draw.integers(3, 9, num_queries), *draw.integers(5, 30, 2 * num_queries)]
    return TokenizedTexts([draw.integers(0, VOCAB, n) for n in lengths], [1] * len(lengths))


def seed_of(chunk: int, rank: int = 0) -> int:
    return 1000 * (rank + 1) + chunk


def in_batch_loss(vectors: torch.Tensor) -> LossResult:
    """Every query against all documents: the first of its two is right."""
    n = len(vectors) // 3
    scores = vectors[:n] @ vectors[n:].mT / 0.05
    return LossResult(F.cross_entropy(scores, 2 * torch.arange(n, device=scores.device)), {"n": scores.max()})


def plain_vectors(model, texts: TokenizedTexts, max_tokens: int, rank: int = 0) -> torch.Tensor:
    """[N, D] with the graph of all chunks at once, and the random numbers of a step."""
    chunks = token_budget_batches(texts.lengths(), max_tokens)
    device = next(model.parameters()).device
    found = []
    for i, rows in enumerate(chunks):
        torch.manual_seed(seed_of(i, rank))
        ids, first = [texts.ids[row] for row in rows], [texts.first_pooled[row] for row in rows]
        found.append(model(PackedBatch.from_ids(ids, first, device)))
    return torch.cat(found)[torch.argsort(torch.tensor([row for rows in chunks for row in rows]))]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for n, g in found.items()}


def worst_difference(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest norm of a difference over the norm of all gradients."""
    assert got.keys() == wanted.keys() and got
    return max(float((got[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    budgets = [64, 40]  # other numbers of chunks
    texts = [make_texts(seed=r) for r in range(ranks)]
    counts = [len(token_budget_batches(t.lengths(), b)) for t, b in zip(texts, budgets, strict=True)]
    assert len(set(counts)) == ranks, f"equal numbers of chunks {counts} would prove nothing"
    alone = dropped_model()
    every = [plain_vectors(alone, t, b, r) for r, (t, b) in enumerate(zip(texts, budgets, strict=True))]
    n = len(every[0]) // 3
    queries, documents = (torch.cat([v[part] for v in every]) for part in (slice(n), slice(n, None)))
    loss = in_batch_loss(torch.cat([queries, documents])).loss
    loss.backward()
    wanted = gradients(alone)

    def loss_of(vectors: torch.Tensor) -> LossResult:
        scores = vectors[:n] @ torch.cat(all_gather(vectors[n:])).mT / 0.05
        return LossResult(F.cross_entropy(scores, 2 * torch.arange(n) + 2 * n * rank), {})

    def step(run) -> LossResult:
        return cached_step(
            run, texts[rank], loss_of, max_tokens=budgets[rank], seed=lambda chunk: seed_of(chunk, rank)
        )

    for how in ("ddp", "fsdp2"):
        model = dropped_model()
        if how == "ddp":
            run = DistributedDataParallel(model)
        else:
            run = model
            for module in (*model.embedding_model.layers, model):  # as `ranks.spread` does
                fully_shard(module)
        result = step(run)
        mean = result.loss.clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / ranks, loss.detach(), rtol=1e-6, atol=0)
        error = worst_difference(gradients(model), wanted)
        assert error < 1e-6, f"{how}: {error}"
        say(f"{how} equal on rank {rank}")
        # a plan that equalises nothing
        if how == "fsdp2":
            grad_cache._Run._most_chunks, kept = lambda _run, count: count, grad_cache._Run._most_chunks
            with pytest.raises(ValueError, match="not in the same step .rank 0 cached_step of"):
                step(run)
            grad_cache._Run._most_chunks = kept
        with pytest.raises(ValueError, match="not in the same step .rank 0 cached_.*, rank 1 direct_step"):
            if rank == 0:
                step(run)
            else:
                direct_step(run, own_batch(), own_loss, max_tokens=64, seed=seed_of)
        say(f"{how} refused on rank {rank}")
        # and the next step is right again, also behind a forward that leaves the root's weights whole
        batch = PackedBatch.from_ids(texts[0].ids, texts[0].first_pooled, "cpu")
        with torch.no_grad():
            run(batch)
        if how == "fsdp2":
            assert not any(hasattr(weight, "device_mesh") for weight in model.head.parameters())
            with pytest.raises(ValueError, match="built_once needs whole weights"), model.head.built_once():
                run(batch).sum().backward()
        model.zero_grad()  # of sharded weights: whole ones have gradients of their own
        with torch.no_grad():
            run(batch)
        step(run)
        assert worst_difference(gradients(model), wanted) < 1e-6
        say(f"{how} equal again on rank {rank}")
    # a sharded adapter is saved whole, by the first rank
    directory = Path(sys.argv[1])
    save_adapter(model, directory)
    dist.barrier()
    loaded = make_model()
    load_adapter(loaded, directory, trainable=True)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).full_tensor()), name
    with pytest.raises(ValueError, match="the weights are sharded: save the adapter"):
        merge_adapter(model)
    # fp32 adapters and head beside a decoder in 16 bits
    alone, model = dropped_model(dtype=torch.bfloat16), dropped_model(dtype=torch.bfloat16)
    for module in (*model.embedding_model.layers, model.head, model):
        fully_shard(module)
    cached_step(alone, texts[0], in_batch_loss, max_tokens=64, seed=seed_of)
    cached_step(model, texts[0], in_batch_loss, max_tokens=64, seed=seed_of)  # the same on both ranks
    assert {g.dtype for g in gradients(model).values()} == {torch.float32}
    assert worst_difference(gradients(model), gradients(alone)) < 1e-5
    say(f"bf16 equal on rank {rank}")
    leave()


def own_batch() -> TrainingBatch:
    """Six rows, each with one positive and one negative of its own."""
    rows = torch.arange(6)
    candidates = Candidates(
        positives=torch.stack([rows, 2 * rows], 1),
        row_scopes=2**32 + rows,
        column_scopes=torch.stack([torch.full((12,), -2), 2**32 + torch.arange(12) // 2], 1),
        row_keys=torch.stack([100 + rows, 200 + 2 * rows], 1),
        column_keys=200 + torch.arange(12)[:, None],
    )
    return TrainingBatch(make_texts(), 6, candidates, [("set", row) for row in range(6)])


def own_loss(vectors: torch.Tensor, part: TrainingBatch) -> LossResult:
    """The mean over rows of the loss of a row's positive against its negative."""
    n = part.num_queries
    return contrastive_loss(vectors[:n], vectors[n:], part.candidates, temperature=0.05)


if __name__ == "__main__":
    with ops.use_impl("torch"):
        main()
