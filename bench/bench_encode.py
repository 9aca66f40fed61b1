"""Texts and tokens per second of the whole encoder, beside its baselines: see `bench/baselines/encoders.py`.

    python -m bench --suites encode                    # the real shape, on a CPU SmolLM2-135M
    python -m bench --suites encode --cases skewed
    python -m bench --suites encode --smallest         # a tiny model, once

1. Every encoder has to agree with our fp32 path on the first layers, or it is skipped. So is a baseline that
   raises, here or in a later step.
2. On a part of the workload each baseline finds its best batch size.
3. The encoders take turns on the whole workload, from strings to vectors on the device, by the wall clock. An
   encoder that has had its seconds sits out the later rounds.

The limit is the time that the backbone's products alone take for the tokens of the workload. Those of the
latent head (2 % more) are not in it.
"""

import functools
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch

from bench.baselines.encoders import ENCODERS, GPU_ONLY, WITHOUT_BATCH_SIZE
from bench.baselines.parity import PARITY_LAYERS, Parity, ParityCheck
from bench.measure.comparison import Prepared, skipped_if_it_fails
from bench.measure.limits import Limits
from bench.measure.passes import Entry, fitting_batch_sizes, search_runs, warm_up
from bench.measure.results import GRAPHED, OURS, SKIPPED, TIMES, Figure
from bench.measure.timing import Times, wall_clock
from bench.suites import Setting
from bench.workloads import GPU, SMALL, SMALLEST, Scale, Workload, random_encoder
from nvembed_fast import NVEmbed
from nvembed_fast.stream import BATCH_TOKENS

SUITE = "encode"
# ours cuts batches by tokens
NO_SIZE = 1


@dataclass(frozen=True)
class Participants:
    """The encoders that are timed, and why the others are not."""

    scale: Scale
    ours: NVEmbed
    encoders: Mapping[str, object]
    parity: dict[str, Parity]
    skipped: dict[str, str]


@functools.cache
def participants(setting: Setting, only_ours: bool = False) -> Participants:
    """Parity on a few layers first. Then the whole model, once for all workloads."""
    scale = _scale(setting)
    skipped = dict(GPU_ONLY) if setting.device == "cpu" else {}
    makers = {name: make for name, make in ENCODERS.items() if name not in skipped}
    if only_ours:
        makers = {OURS: ENCODERS[OURS]}
    say(f"parity of {len(makers)} encoders on {PARITY_LAYERS} layers")
    check = ParityCheck(scale, setting.device, setting.dtype)
    parity = {}
    # ours first: no baseline is compiled for nothing
    for name in sorted(makers, key=OURS.__ne__):
        with skipped_if_it_fails(name, skipped):
            parity[name] = check.of(makers[name])
            if parity[name].obstacle:
                skipped[name] = parity[name].obstacle
        found = f"{parity[name].error:.2g} ({parity[name].unit})" if name in parity else "none"
        say(f"  {name}: {found}" + (f", {skipped[name]}" if name in skipped else ""))
        assert OURS not in skipped, skipped[OURS]
    del check
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
    say("the whole model")
    ours = random_encoder(scale.config, setting.device, setting.dtype)
    encoders = {}
    for name, make in makers.items():
        if name not in skipped:
            with skipped_if_it_fails(name, skipped):
                encoders[name] = make(ours)
    return Participants(scale, ours, encoders, parity, skipped)


@dataclass(frozen=True)
class EncoderBench:
    """All encoders on one workload."""

    setting: Setting
    workload: Workload
    suite: str = SUITE

    @property
    def case(self) -> str:
        return self.workload.name

    def prepare(self, only_ours: bool = False) -> Prepared:
        """Parity, then a pass of every encoder at its best batch size.

        Raises:
            AssertionError: our vectors are wrong.
        """
        entries, skipped = self._entries(participants(self.setting, only_ours))
        calls = {name: functools.partial(entry.encode, entry.sizes[0]) for name, entry in entries.items()}
        # ours first
        return Prepared({OURS: calls.pop(OURS), **calls}, skipped)

    def _entries(self, who: Participants) -> tuple[dict[str, Entry], dict[str, str]]:
        """(name -> an encoder that is warm and knows its batch sizes, name -> why it is skipped)."""
        texts, instruction = self.workload.texts(who.scale.config.text_config.vocab_size)
        entries, skipped = {}, {name: why for name, why in who.skipped.items() if self._takes_part(name)}
        for name, encoder in who.encoders.items():
            if not self._takes_part(name):
                continue
            encode = functools.partial(_encode, encoder, instruction)
            is_ours = name in WITHOUT_BATCH_SIZE
            with skipped_if_it_fails(name, skipped):
                warm_up(encode, texts)
                runs = search_runs(self.workload, texts, who.scale, getattr(encoder, "by_length", True))
                sizes = fitting_batch_sizes(encode, runs, [NO_SIZE] if is_ours else who.scale.batch_sizes)
                say(f"{self.case}: {name}" + ("" if is_ours else f", batch sizes from the best {sizes}"))
                if sizes:
                    entries[name] = Entry(functools.partial(encode, texts), sizes)
                else:
                    skipped[name] = _too_large(who)
        return entries, skipped

    def _takes_part(self, name: str) -> bool:
        return name != GRAPHED or len(self.workload.lengths) == 1

    def measure(self, limits: Limits, seconds: float, rounds: int | None = None) -> list[Figure]:
        """The figures of the workload, which knows its own number of rounds: the arguments are not used.

        Raises:
            AssertionError: our vectors are wrong, or do not fit in memory.
        """
        who = participants(self.setting)
        entries, skipped = self._entries(who)
        for done in range(self.workload.rounds):
            if self.workload.rounds < 10 or done % 10 == 0:
                say(f"{self.case}: round {done + 1} of {self.workload.rounds}")
            # ours is the last
            for name, entry in entries.items():
                with skipped_if_it_fails(name, skipped):
                    if name == OURS:
                        entry.run()
                    elif name not in skipped:
                        entry.take_turn()
        limit_ms = _limit_ms(limits, who, self.setting.dtype, self.workload.num_tokens)
        figures = []
        for name in filter(self._takes_part, ENCODERS):
            if name not in skipped and not entries[name].seconds:
                skipped[name] = _too_large(who)
            if name in skipped:
                figures.append(Figure(SUITE, self.case, name, SKIPPED, None, skipped[name]))
            else:
                figures += self._figures(name, entries[name], who.parity[name], limit_ms)
        assert OURS not in skipped, skipped[OURS]
        return figures

    def _figures(self, name: str, entry: Entry, parity: Parity, limit_ms: float) -> list[Figure]:
        workload, figure = self.workload, functools.partial(Figure, SUITE, self.case, name)
        times = Times(tuple(1e3 * seconds for seconds in entry.seconds))
        rates = {"texts_rate": len(workload.lengths), "tokens_rate": workload.num_tokens}
        figures = [figure(metric, times.percentile(int(metric[-2:])), "ms") for metric in TIMES]
        for metric, count in rates.items():
            share = limit_ms / times.median if metric == "tokens_rate" else None
            figures.append(figure(metric, 1e3 * count / times.median, metric.replace("_rate", "/s"), share))
        if name not in WITHOUT_BATCH_SIZE:
            figures.append(figure("batch_size", entry.sizes[0], "texts"))
        if entry.peak is not None:
            figures.append(figure("peak_memory", entry.peak, "MiB"))
        return [*figures, figure("parity_error", parity.error, parity.unit)]


def benches(setting: Setting) -> Iterator[EncoderBench]:
    for workload in _scale(setting).workloads:
        yield EncoderBench(setting, workload)


def _scale(setting: Setting) -> Scale:
    return setting.choose(gpu=GPU, cpu=SMALL, smallest=SMALLEST)


def say(line: str) -> None:
    """A workload takes minutes: say how far it is."""
    print(f"encode: {line}", flush=True)


def _encode(encoder, instruction: str, texts: list[str], batch_size: int) -> torch.Tensor:
    return encoder.encode(texts, instruction, batch_size)


def _too_large(who: Participants) -> str:
    return f"no batch size of {who.scale.batch_sizes} fits in memory"


def _limit_ms(limits: Limits, who: Participants, dtype: torch.dtype, num_tokens: int) -> float:
    """The time of the backbone's products alone for so many tokens."""
    backbone = who.ours.model.embedding_model
    weights = [tuple(w.shape) for w in backbone.layers[0].parameters() if w.ndim == 2]
    tokens = min(num_tokens, BATCH_TOKENS[limits.device])
    layer_ms = sum(limits.product_ms(tokens, weight, dtype) for weight in weights)
    return len(backbone.layers) * layer_ms * num_tokens / tokens


# a pass over a workload may take half a minute
@pytest.mark.benchmark(timer=wall_clock, min_rounds=2)
def bench_encode(bench, timed):
    timed(bench)
