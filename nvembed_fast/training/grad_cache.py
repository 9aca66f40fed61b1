"""One training step in chunks of a token budget, with the gradient of the whole batch.

A contrastive loss compares all vectors of a batch. Their graphs together need more memory than there is.
`cached_step` gets the same gradient from one chunk's graph at a time (GradCache, arXiv 2101.06983):

1. The vectors of every chunk, without a graph.
2. The loss of all vectors, and its gradient on each of them.
3. Every chunk again, with its graph. Its vectors get their gradients from 2, in fp32.

A row whose candidates are its own needs no other row's vectors. `direct_step` takes
chunks of whole rows forward and backward at once. That is exact, and a third cheaper.

Invariants:

- Both forwards of a chunk draw the same dropout: `seed(chunk)` seeds the generators before each. So no state
  of a generator is kept, and a step that is repeated is the same. The caller's generators are as before.
- What the head builds from its weights is built once for the step (`PoolingHead.built_once`), unless FSDP2
  has sharded the head's weights.
- Gradients are reduced across ranks in the last chunk's backward alone. All ranks of FSDP2 run the same
  number of forwards: one with fewer chunks adds chunks of one token, whose gradient is zero. Before anything
  runs the ranks compare their plans, so that unequal ones are an error and no wait for ever.
- Gradients are added to `.grad`, as by `backward`. Backwards run outside of the caller's autocast. So a
  product has its gradient in the dtype of its forward, and the loss in fp32.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nvembed_fast.kernels.layout import copies_late
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.packing import PackedBatch, token_budget_batches
from nvembed_fast.tokenization import TokenizedTexts
from nvembed_fast.training.batch import TrainingBatch
from nvembed_fast.training.loss import Candidates, LossResult

__all__ = ["cached_step", "direct_step"]

Seed = Callable[[int], int]
_CALLS = ("cached_step", "direct_step")


def cached_step(
    model: nn.Module,
    texts: TokenizedTexts,
    loss_of: Callable[[torch.Tensor], LossResult],
    *,
    max_tokens: int,
    seed: Seed,
) -> LossResult:
    """Add the gradient of a loss of all texts to `.grad`, with one chunk's graph in memory at a time.

    With one chunk there is one forward.

    Args:
        model: `NVEmbedModel`, or DDP or FSDP2 of it.
        texts: N texts of this rank.
        loss_of: [N, D] vectors (fp32) in the order of the texts -> the loss. It is called once, and may
            communicate between ranks.
        max_tokens: tokens of a chunk. A longer text is a chunk of its own.
        seed: the number of a chunk -> the seed of its random numbers, from -2**63 to 2**64 - 1.

    Returns:
        The result of loss_of, without graph.

    Raises:
        ValueError: max_tokens is below 1, or the ranks are not in the same step.
    """
    run = _Run(model, "cached_step", seed)
    chunks = run.plan(token_budget_batches(texts.lengths(), max_tokens))
    order = torch.tensor([row for rows in chunks for row in rows], dtype=torch.int64, device="cpu")
    places = torch.argsort(order).to(run.device, non_blocking=copies_late(run.device))
    with run.step():
        if run.is_at_once:
            with run.chunk(is_last=True):
                result = loss_of(run.forward(0, _taken(texts, chunks[0])).index_select(0, places))
                run.backward(result.loss)
            return _without_graph(result)
        with torch.no_grad():
            found = [run.forward(i, _taken(texts, rows), local=True) for i, rows in enumerate(chunks)]
        # one leaf in the order of the chunks, so that the gradients of a chunk lie together
        leaf = torch.cat(found).requires_grad_()
        result = loss_of(leaf.index_select(0, places))
        run.backward(result.loss)
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for i, part in enumerate(gradient.split([len(rows) for rows in chunks])):
            with run.chunk(is_last=i == len(chunks) - 1):
                run.backward(run.forward(i, _taken(texts, chunks[i])), part)
    return _without_graph(result)


def direct_step(
    model: nn.Module,
    batch: TrainingBatch,
    loss_of: Callable[[torch.Tensor, TrainingBatch], LossResult],
    *,
    max_tokens: int,
    seed: Seed,
) -> LossResult:
    """Add the gradient of the mean loss of rows with own candidates only to `.grad`: one forward per chunk.

    Args:
        model: as for `cached_step`.
        batch: B rows of this rank, at least one.
        loss_of: ([n, D] vectors (fp32) of a part of the batch, queries first, that part) -> the mean loss of
            the part's rows. It is called once per chunk, in any order of rows, and does not communicate.
        max_tokens: tokens of a chunk of whole rows. A longer row is a chunk of its own.
        seed: as for `cached_step`.

    Returns:
        The mean loss of the rows, without graph. Metrics are means over the parts by their rows.

    Raises:
        ValueError: two rows share a document, max_tokens is below 1, or the ranks are not in the same step.
    """
    run = _Run(model, "direct_step", seed)
    lengths, num_rows = batch.texts.lengths(), batch.num_queries
    columns = _own_columns(batch.candidates, num_rows)
    totals = [lengths[i] + sum(lengths[num_rows + j] for j in own) for i, own in enumerate(columns)]
    chunks = run.plan(token_budget_batches(totals, max_tokens))
    results: list[tuple[float, LossResult]] = []
    with run.step():
        for i, rows in enumerate(chunks):
            with run.chunk(is_last=i == len(chunks) - 1):
                part = batch.part(rows, [column for row in rows for column in columns[row]])
                vectors = run.forward(i, part.texts)
                if not rows:
                    run.backward(vectors, torch.zeros_like(vectors))
                    continue
                share = len(rows) / num_rows
                result = loss_of(vectors, part)
                run.backward(result.loss * share)
                results.append((share, _without_graph(result)))
    metrics = {
        name: torch.stack([share * result.metrics[name] for share, result in results]).sum(0)
        for name in results[0][1].metrics
    }
    loss = torch.stack([share * result.loss for share, result in results]).sum()
    return dataclasses.replace(results[0][1], loss=loss, metrics=metrics)


class _Run:
    """How a model runs chunk by chunk: alone, by DDP or by FSDP2."""

    def __init__(self, model: nn.Module, call: str, seed: Seed):
        # imported here, because it takes most of a second
        from torch.distributed.fsdp import FSDPModule

        self.ddp = model if isinstance(model, DistributedDataParallel) else None
        self.whole = model
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        network = getattr(inner, "_orig_mod", inner)  # of torch.compile
        if not isinstance(network, NVEmbedModel):
            raise ValueError(
                f"{call} trains an NVEmbedModel, or DDP or FSDP2 of one, got {type(network).__name__}: "
                "pass NVEmbed's .model"
            )
        self.fsdp = network if isinstance(network, FSDPModule) else None
        self.sharded = [module for module in network.modules() if isinstance(module, FSDPModule)]
        self.inner, self.network, self.call, self.seed = inner, network, call, seed
        self.device = network.embedding_model.embed_tokens.weight.device

    def plan(self, chunks: list[list[int]]) -> list[list[int]]:
        """The chunks, with empty ones where this rank would run fewer forwards than another one."""
        chunks = chunks or [[]]
        self.is_at_once = len(chunks) == 1
        if self.ddp is None and self.fsdp is None:
            return chunks
        group = None if self.ddp is None else self.ddp.process_group
        if self.fsdp is not None:
            chunks = chunks + [[]] * (self._most_chunks(len(chunks)) - len(chunks))
        ours = torch.tensor([_CALLS.index(self.call), len(chunks)], device=self.device)
        every = [torch.empty_like(ours) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, ours, group=group)
        plans = [tuple(plan) for plan in torch.stack(every).tolist()]
        # a forward of DDP communicates, too, and so may the loss: all ranks run them in one order
        self.is_at_once = all(count == 1 for _, count in plans)
        # DDP takes any number of chunks
        if len({plan if self.fsdp is not None else plan[0] for plan in plans}) > 1:
            said = ", ".join(
                f"rank {rank} {_CALLS[call]} of {count} chunks" for rank, (call, count) in enumerate(plans)
            )
            raise ValueError(
                f"the ranks are not in the same step ({said}): call the same function on every rank"
            )
        return chunks

    def _most_chunks(self, count: int) -> int:
        most = torch.tensor(count, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around all chunks of a step."""
        head, device = self.network.head, self.device
        # a root keeps its weights whole behind a forward, such as that of an evaluation
        for module in self.sharded:
            module.reshard()
        is_sharded = any(hasattr(weight, "device_mesh") for weight in head.parameters())
        devices = [] if device.type == "cpu" else [torch.get_device_module(device).current_device()]
        with (
            torch.random.fork_rng(devices, device_type=device.type),
            contextlib.nullcontext() if is_sharded else head.built_once(),
        ):
            yield

    @contextlib.contextmanager
    def chunk(self, *, is_last: bool) -> Iterator[None]:
        """Around the forward and backward of a chunk: gradients are reduced across ranks in the last one."""
        if self.fsdp is not None:
            self.fsdp.set_requires_gradient_sync(is_last)
            self.fsdp.set_is_last_backward(is_last)
        try:
            with contextlib.nullcontext() if is_last or self.ddp is None else self.ddp.no_sync():
                yield
        finally:
            if self.fsdp is not None:
                self.fsdp.set_requires_gradient_sync(True)
                self.fsdp.set_is_last_backward(True)

    def backward(self, result: torch.Tensor, gradient: torch.Tensor | None = None) -> None:
        with torch.autocast(self.device.type, enabled=False):
            result.backward(gradient)

    def forward(self, index: int, texts: TokenizedTexts, *, local: bool = False) -> torch.Tensor:
        """[n, D] vectors of the chunk of this number, and of a token without a text where there is no text.

        Args:
            index: the number of the chunk.
            texts: n texts.
            local: without DDP, whose forward prepares a reduction.
        """
        ids, first_pooled = texts.ids or [np.zeros(1, dtype=np.int64)], texts.first_pooled or [0]
        batch = PackedBatch.from_ids(ids, first_pooled, self.device)
        seed = self.seed(index)
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)
        return (self.inner if local else self.whole)(batch)[: len(texts.ids)]


def _taken(texts: TokenizedTexts, rows: Sequence[int]) -> TokenizedTexts:
    return TokenizedTexts([texts.ids[row] for row in rows], [texts.first_pooled[row] for row in rows])


def _without_graph(result: LossResult) -> LossResult:
    return dataclasses.replace(result, loss=result.loss.detach())


def _own_columns(candidates: Candidates, num_rows: int) -> list[list[int]]:
    """Of each row the columns that are its candidates or positives."""
    own: list[list[int]] = [[] for _ in range(num_rows)]
    rows_of: dict[int, list[int]] = {}
    for row, scope in enumerate(candidates.row_scopes.tolist()):
        rows_of.setdefault(scope, []).append(row)
    positives: dict[int, list[int]] = {}
    for row, column in candidates.positives.tolist():
        positives.setdefault(column, []).append(row)
    for column, scopes in enumerate(candidates.column_scopes.tolist()):
        rows = {row for scope in scopes for row in rows_of.get(scope, ())} | {*positives.get(column, ())}
        if len(rows) > 1:
            one, other, *_ = sorted(rows)
            raise ValueError(
                f"direct_step takes rows with own candidates only, and rows {one} and {other} share document "
                f"{column}: use cached_step"
            )
        for row in rows:
            own[row].append(column)
    return own
