"""A training step with LoRA: gradients of one batch, ours beside Hugging Face's decoder with PEFT.

    python -m bench --suites train

Both take the same tokens, the same frozen weights, rank 16 on the seven projections without dropout, mean
pooling, `contrastive_loss`, and chunks of the same budget. The baseline pads each chunk to its longest text,
and computes attention by SDPA. On a GPU both keep of a layer its input alone. The optimizer's step is the
same for both, and is not timed.

1. "in batch": every document is a candidate. Both cache gradients. The baseline sorts its texts by length.
2. "own": rows with their own documents alone (stage 2). Both go forward and backward at once, the baseline
   with queries and documents apart. "cached" is `cached_step` on the same batch.

Parity: adapters start at zero, so the first losses are those of one model, and may differ by rounding alone.
Ours have to give the loss of `impl="library"`. A baseline that gives another one, or raises, is skipped.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.baselines.encoders import mistral_model, pad
from bench.measure.comparison import Prepared, skipped_if_it_fails
from bench.measure.limits import Limits
from bench.measure.results import OURS, SKIPPED, TIMES, Figure
from bench.measure.timing import interleaved, peak_memory
from bench.suites import Setting
from bench.workloads import GPU, SMALL, SMALLEST, random_encoder
from nvembed_fast import NVEmbed, ops
from nvembed_fast.checkpoint import add_lora
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.kernels.layout import to_device
from nvembed_fast.kernels.testing import skewed_lengths
from nvembed_fast.packing import token_budget_batches
from nvembed_fast.tokenization import TokenizedTexts
from nvembed_fast.training.batch import TrainingBatch
from nvembed_fast.training.grad_cache import cached_step, direct_step
from nvembed_fast.training.loss import Candidates, LossResult, contrastive_loss

RANK, ALPHA, TEMPERATURE = 16, 32, 0.05
PARITY = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the loss, relative
HUGGING_FACE = "Hugging Face + PEFT"


@dataclass(frozen=True)
class TrainCase:
    """Rows of a query, a positive and hard negatives, with skewed lengths."""

    name: str
    rows: int
    negatives: int
    longest: int
    max_tokens: int
    is_own: bool

    def lengths(self) -> tuple[list[int], list[int]]:
        """Tokens of the queries and of the documents."""
        count = self.rows * (1 + self.negatives)
        documents = skewed_lengths(count, self.longest // 3, 8, self.longest)
        return [8 + 5 * i % 17 for i in range(self.rows)], list(documents[:count])

    def batch(self, vocab_size: int) -> TrainingBatch:
        draw = np.random.default_rng(0)
        queries, documents = self.lengths()
        ids = [draw.integers(3, vocab_size, n).astype(np.int32) for n in (*queries, *documents)]
        rows = torch.arange(self.rows)
        own = rows.repeat_interleave(1 + self.negatives)
        keys = torch.arange(1, len(documents) + 1)
        positives = torch.stack([rows, rows * (1 + self.negatives)], 1)
        shared = torch.full_like(own, -2 if self.is_own else 0)
        candidates = Candidates(
            positives=positives,
            row_scopes=2**32 + rows if self.is_own else torch.zeros_like(rows),
            column_scopes=torch.stack([shared, 2**32 + own], 1),
            row_keys=keys[positives[:, 1:]],
            column_keys=keys[:, None],
        )
        texts = TokenizedTexts(ids, [0] * len(ids))
        return TrainingBatch(
            texts, self.rows, candidates, [("bench", i) for i in range(self.rows)], self.is_own
        )


CASES = {
    "gpu": [TrainCase("in batch", 64, 1, 512, 16384, False), TrainCase("own", 16, 7, 512, 16384, True)],
    "cpu": [TrainCase("in batch", 8, 1, 96, 512, False), TrainCase("own", 4, 3, 96, 512, True)],
    "smallest": [TrainCase("own", 2, 1, 16, 24, True)],
}


@functools.cache
def encoder(setting: Setting) -> NVEmbed:
    """In training, with an adapter on its layers."""
    scale = setting.choose(gpu=GPU, cpu=SMALL, smallest=SMALLEST)
    config: NVEmbedConfig = dataclasses.replace(scale.config, pooling_head="mean")
    model = random_encoder(config, setting.device, setting.dtype)
    add_lora(model.model, RANK, ALPHA, 0.0, "frozen")
    if setting.device == "cuda":
        model.model.checkpoint_layers()
    model.model.train()
    return model


@dataclass(frozen=True)
class TrainBench:
    """All implementations on one batch."""

    setting: Setting
    of: TrainCase
    suite: str = "train"

    @property
    def case(self) -> str:
        return self.of.name

    def prepare(self, only_ours: bool = False) -> Prepared:
        """Parity of the first loss, then the calls.

        Raises:
            AssertionError: a loss of ours is wrong. Or the library path, which tells the right one, raises.
        """
        model = encoder(self.setting)
        skipped: dict[str, str] = {}
        batch = self.of.batch(model.config.text_config.vocab_size)
        options: dict[str, Any] = {"max_tokens": self.of.max_tokens, "seed": lambda chunk: chunk}
        cached = functools.partial(cached_step, model.model, batch.texts, _loss_of(batch), **options)
        steps: dict[str, Callable[[], LossResult]] = {OURS: cached}
        if self.of.is_own:
            direct = functools.partial(direct_step, model.model, batch, _own_loss, **options)
            steps = {OURS: direct, "cached": cached}
        with ops.use_impl("library"):
            wanted = cached().loss.item()
        for name, step in steps.items():
            obstacle = self._obstacle(step, wanted)
            assert obstacle is None, f"{name}: {obstacle}"
        # the tests run without PEFT
        if not only_ours and not (self.setting.smallest and find_spec("peft") is None):
            with skipped_if_it_fails(HUGGING_FACE, skipped):
                step = _hugging_face(model, batch, self.of.max_tokens, self.setting)
                if obstacle := self._obstacle(step, wanted):
                    skipped[HUGGING_FACE] = obstacle
                else:
                    steps[HUGGING_FACE] = step
        return Prepared(dict(steps), skipped)

    def _obstacle(self, step: Callable[[], LossResult], wanted: float) -> str | None:
        loss = step().loss.item()
        # not (a > b): NaN is red too
        if abs(loss - wanted) < PARITY[self.setting.dtype] * abs(wanted):
            return None
        return f"parity is red: the loss is {loss:.6g}, not {wanted:.6g}"

    def measure(self, limits: Limits, seconds: float, rounds: int | None = None) -> list[Figure]:
        """Times, tokens per second and peak memory of a step."""
        ready = self.prepare()
        times = interleaved(ready.calls, seconds, min_rounds=rounds or 3, max_rounds=rounds or 1000)
        num_tokens = sum(map(sum, self.of.lengths()))
        figures = []
        for name, taken in times.items():
            figure = functools.partial(Figure, self.suite, self.case, name)
            figures += [figure(metric, taken.percentile(int(metric[-2:])), "ms") for metric in TIMES]
            figures.append(figure("tokens_rate", 1e3 * num_tokens / taken.median, "tokens/s"))
            if (peak := peak_memory(ready.calls[name])) is not None:
                figures.append(figure("peak_memory", peak, "MiB"))
        skipped = [Figure(self.suite, self.case, n, SKIPPED, None, why) for n, why in ready.skipped.items()]
        return figures + skipped


def benches(setting: Setting) -> Iterator[TrainBench]:
    for case in setting.choose(**CASES):
        yield TrainBench(setting, case)


def _loss_of(batch: TrainingBatch) -> Callable[[torch.Tensor], LossResult]:
    return lambda vectors: _own_loss(vectors, batch)


def _own_loss(vectors: torch.Tensor, part: TrainingBatch) -> LossResult:
    queries, documents = vectors.tensor_split([part.num_queries])
    return contrastive_loss(queries, documents, part.candidates, temperature=TEMPERATURE)


def _hugging_face(
    model: NVEmbed, batch: TrainingBatch, max_tokens: int, setting: Setting
) -> Callable[[], LossResult]:
    """The baseline's step. Raises ImportError without PEFT."""
    from peft import LoraConfig, get_peft_model

    mistral = mistral_model(model)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(names))
    wrapped = get_peft_model(mistral, config).train()  # type: ignore[arg-type]
    if setting.device == "cuda":
        mistral.gradient_checkpointing_enable({"use_reentrant": False})
        mistral.enable_input_require_grads()

    def embed(rows: list[int]) -> torch.Tensor:
        texts = [batch.texts.ids[row] for row in rows]
        # a mask's rows have to be aligned for the fast kernels
        ids, on_host = pad(texts, model.device, multiple=8 if len({len(t) for t in texts}) > 1 else 1)
        real = to_device(torch.from_numpy(on_host), model.device)
        mask = None if on_host.all() else real[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
        states = wrapped(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return F.normalize((states * real[..., None]).sum(1) / real.sum(1, keepdim=True), dim=-1)

    step = _own_step if batch.has_own_candidates_only else _cached_step
    return functools.partial(step, embed, batch, max_tokens)


def _cached_step(embed: Callable, batch: TrainingBatch, max_tokens: int) -> LossResult:
    """Chunks of sorted texts, whose pads count."""
    lengths = batch.texts.lengths()
    chunks: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not chunks or lengths[chunks[-1][0]] * (len(chunks[-1]) + 1) > max_tokens:
            chunks.append([])
        chunks[-1].append(row)
    places = torch.argsort(torch.tensor([row for chunk in chunks for row in chunk]))
    with torch.no_grad():
        leaf = torch.cat([embed(chunk) for chunk in chunks])
    result = _loss_of(batch)(leaf.requires_grad_()[places.to(leaf.device)])
    result.loss.backward()
    for chunk, gradient in zip(chunks, leaf.grad.split([len(c) for c in chunks]), strict=True):
        embed(chunk).backward(gradient)
    return dataclasses.replace(result, loss=result.loss.detach())


def _own_step(embed: Callable, batch: TrainingBatch, max_tokens: int) -> LossResult:
    """Chunks of whole rows, forward and backward at once, queries and documents padded apart."""
    lengths, num_rows = batch.texts.lengths(), batch.num_queries
    each = (len(lengths) - num_rows) // num_rows
    own = [list(range(row * each, (row + 1) * each)) for row in range(num_rows)]
    longest = [max(lengths[num_rows + column] for column in columns) for columns in own]
    totals = [each * most + lengths[row] for row, most in enumerate(longest)]
    losses = []
    for rows in token_budget_batches(totals, max_tokens):
        columns = [column for row in rows for column in own[row]]
        vectors = torch.cat([embed(rows), embed([num_rows + column for column in columns])])
        result = _own_loss(vectors, batch.part(rows, columns))
        share = len(rows) / num_rows
        (result.loss * share).backward()
        losses.append(result.loss.detach() * share)
    return dataclasses.replace(result, loss=torch.stack(losses).sum())


def bench_train(bench, timed):
    timed(bench)
