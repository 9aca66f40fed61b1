"""Texts and tokens per second of the whole encoder, beside its rivals: see `bench/encoders.py`.

    python -m pytest bench/bench_encode.py -q                 # a GPU: the real shape; a CPU: SmolLM2-135M
    python -m pytest bench/bench_encode.py -q -k skewed
    python -m pytest bench/bench_encode.py -q --smallest      # a tiny model, once

1. Every rival has to agree with our fp32 path on the first layers; else it gets no time.
2. On the first texts of a mix each finds its best batch size.
3. They take turns on the whole mix, from strings to vectors on the device, by the clock on the wall. One that
   has had its seconds sits out the later rounds.

The limit is the time that the backbone's products alone take for the tokens of the mix; those of the latent
head (2 % more) are not in it. The tokenizer is one of whole words: cheap, for all alike.
"""

import functools
import gc
import statistics
from dataclasses import dataclass

import pytest
import torch

from bench.baselines import encoders
from bench.baselines.encoders import (
    ENCODERS,
    GPU,
    GRAPHED,
    SMALL,
    SMALLEST,
    Entry,
    Mix,
    Parity,
    ParityCheck,
    Scale,
    wall_clock,
)
from bench.measure.limits import Limits
from bench.measure.results import LEFT_OUT, OURS, TIMES, Row
from bench.measure.timing import Times
from nvembed_fast import NVEmbed
from nvembed_fast.stream import BATCH_TOKENS

SUITE = "encode"
# ours cuts batches by tokens
NO_SIZE = 1


@dataclass(frozen=True)
class Field:
    """Everyone that is timed, and what was said about the others."""

    scale: Scale
    dtype: torch.dtype
    ours: NVEmbed
    encoders: dict[str, object]
    parity: dict[str, Parity]
    left_out: dict[str, str]


@pytest.fixture(scope="module")
def field(device, dtype, say, pytestconfig) -> Field:
    """Parity on a few layers first; then the whole model, once for all."""
    scale = encoders.scale_for(device, pytestconfig.getoption("--smallest"))
    left_out = dict(encoders.GPU_ONLY) if device == "cpu" else {}
    say(f"encode: parity of {len(ENCODERS) - len(left_out)} encoders on {encoders.PARITY_LAYERS} layers")
    check = ParityCheck(scale, device, dtype)
    parity = {name: check.of(make) for name, make in ENCODERS.items() if name not in left_out}
    for name, found in parity.items():
        say(
            f"encode:   {name}: {found.error:.2g} ({found.unit})"
            + (f", {found.obstacle}" if found.obstacle else "")
        )
    left_out |= {name: found.obstacle for name, found in parity.items() if found.obstacle}
    del check
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    say("encode: the whole model")
    ours = encoders.random_encoder(scale.config, device, dtype)
    made = {name: make(ours) for name, make in ENCODERS.items() if name not in left_out}
    return Field(scale, dtype, ours, made, parity, left_out)


@pytest.mark.benchmark(timer=wall_clock)
@pytest.mark.cases(gpu=GPU.mixes, cpu=SMALL.mixes, smallest=SMALLEST.mixes)
def bench_encode(start, say, benchmark, request, results, limits: Limits, case: Mix):
    start(SUITE, case.name)
    who: Field = request.getfixturevalue("field")
    texts, instruction = case.texts(who.scale.config.text_config.vocab_size)
    entries, left_out = {}, dict(who.left_out)
    taking_part = [name for name in ENCODERS if name != GRAPHED or len(texts) == 1]
    for name, encoder in who.encoders.items():
        if name not in taking_part:
            continue
        encode = functools.partial(_encode, encoder, instruction)
        encoders.warm_up(encode, texts)
        is_ours = name in (OURS, GRAPHED)
        runs = encoders.search_runs(case, texts, who.scale, getattr(encoder, "by_length", True))
        tried = [NO_SIZE] if is_ours else who.scale.batch_sizes
        sizes = encoders.fitting_batch_sizes(encode, runs, tried)
        say(f"encode: {case.name}: {name}" + ("" if is_ours else f", batch sizes from the best {sizes}"))
        entries[name] = Entry(functools.partial(encode, texts), sizes)
    # ours is the last
    *others, last = entries.values()

    def others_first() -> None:
        done = len(last.seconds)
        if case.rounds < 10 or done % 10 == 0:
            say(f"encode: {case.name}: round {done + 1} of {case.rounds}")
        for entry in others:
            entry.take_turn()

    benchmark.group = f"encode {case.name}"
    benchmark.pedantic(last.run, setup=others_first, rounds=case.rounds)
    limit_ms = _limit_ms(limits, who, case.num_tokens)
    rows = []
    for name in taking_part:
        entry = entries.get(name)
        if entry is not None and not entry.seconds:
            left_out[name] = f"no batch size of {who.scale.batch_sizes} fits in memory"
        if name in left_out:
            rows.append(Row(SUITE, case.name, name, LEFT_OUT, None, left_out[name]))
        else:
            rows += _rows(case, name, entry, who.parity[name], limit_ms)
            say(f"encode: {case.name}: {name}: {len(texts) / statistics.median(entry.seconds):.4g} texts/s")
    results.add(rows)
    assert OURS not in left_out, left_out[OURS]
    benchmark.extra_info["tokens/s"] = case.num_tokens / benchmark.stats.stats.median


def _encode(encoder, instruction: str, texts: list[str], batch_size: int) -> torch.Tensor:
    return encoder.encode(texts, instruction, batch_size)


def _limit_ms(limits: Limits, who: Field, num_tokens: int) -> float:
    """What the backbone's products alone take for so many tokens."""
    backbone = who.ours.model.embedding_model
    weights = [tuple(w.shape) for w in backbone.layers[0].parameters() if w.ndim == 2]
    tokens = min(num_tokens, BATCH_TOKENS[limits.device])
    layer_ms = sum(limits.product_ms(tokens, weight, who.dtype) for weight in weights)
    return len(backbone.layers) * layer_ms * num_tokens / tokens


def _rows(mix: Mix, name: str, entry: Entry, parity: Parity, limit_ms: float) -> list[Row]:
    times = Times(tuple(1e3 * seconds for seconds in entry.seconds))
    rates = {"texts_rate": len(mix.lengths), "tokens_rate": mix.num_tokens}
    row = functools.partial(Row, SUITE, mix.name, name)
    rows = [row(metric, times.percentile(int(metric[-2:])), "ms") for metric in TIMES]
    for metric, count in rates.items():
        share = limit_ms / times.median if metric == "tokens_rate" else None
        rows.append(row(metric, 1e3 * count / times.median, metric.replace("_rate", "/s"), share))
    if name not in (OURS, GRAPHED):
        rows.append(row("batch_size", entry.sizes[0], "texts"))
    if entry.peak is not None:
        rows.append(row("peak_memory", entry.peak, "MiB"))
    return [*rows, row("parity_error", parity.error, parity.unit)]
