import dataclasses
from collections.abc import Iterator
from functools import partial

import torch

from bench.measure.comparison import Experiment, KernelBench, Work
from bench.suites import Setting
from nvembed_fast import ops
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import (
    ATTENTION_CASES,
    ATTENTION_CPU,
    ATTENTION_SWEEP,
    AttentionCase,
    attention_gradients,
)

GPU = [*(c for c in ATTENTION_CASES if c.bench), *ATTENTION_SWEEP]
# float64 scores of more would not fit in memory
PARITY_LENGTH = 8192


def benches(setting: Setting) -> Iterator[KernelBench]:
    for case in setting.choose(gpu=GPU, cpu=ATTENTION_CPU, smallest=ATTENTION_CASES[1:2]):
        for backward in (False, True):
            make, make_part = (partial(_experiment, setting, c) for c in (case, _part(case)))
            work = Work(case.flops(backward), "TFLOP/s")
            yield KernelBench("flash_attention", case.name, make, work, backward, make_part)


def _experiment(setting: Setting, case: AttentionCase) -> Experiment:
    *tensors, layout = case.inputs(setting.device, setting.dtype)

    def low(inputs, upstream):
        no_dlse = torch.zeros(case.num_heads, layout.num_tokens, device=setting.device)
        return attention_gradients(inputs, (*upstream, no_dlse), layout)

    def wanted(*tensors):
        return reference.flash_attention(*tensors, layout)

    return Experiment(
        tensors,
        ours=lambda q, k, v: ops.flash_attention(q, k, v, layout),
        reference=wanted,
        baselines=setting.baselines.attention(wanted, layout, case.num_heads, case.num_kv_heads),
        low=low if setting.dtype != torch.float32 else None,
    )


def _part(case: AttentionCase) -> AttentionCase:
    """The two longest sequences and one key/value head."""
    lengths = tuple(min(n, PARITY_LENGTH) for n in sorted(case.lengths)[-2:])
    group = case.num_heads // case.num_kv_heads
    return dataclasses.replace(case, lengths=lengths, num_heads=group, num_kv_heads=1)


def bench_flash_attention(bench, timed):
    timed(bench)
