"""Which launch configuration is the fastest here, kernel by kernel.

    python -m tools.tuning [--only KERNEL] [--seconds S] [--write [FILE]] [--commit ID]
    python -m tools.tuning --list

1. Every candidate below is compiled for the architecture, which needs no GPU. One
   that does not fit shared memory is dropped. So is one that loads by descriptors
   and whose order of instructions may give wrong results (`tools/sass.py`). One
   that spills comes last and is marked, because time decides.
2. On a GPU each of them has to pass parity first. Then they and the rule of the
   kernel's `_launch_config` take turns on the bench cases.
3. A candidate wins that beats the rule by more than the spread (its 80th
   percentile against the rule's 20th) in every case, the fastest of them. With
   --write it becomes the entry of its class in kernels/tuned.toml. Where none wins,
   an entry of that class is removed. A kernel is written as soon as it is measured.
4. One whose program walks other blocks than the rule's is timed, and never wins: a
   text's bits would depend on the longest text beside it.

Ctrl-C keeps the entries written so far. Nothing else searches: launches read the file.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.measure import results
from bench.measure.timing import Times, interleaved
from nvembed_fast import files
from nvembed_fast.kernels import reference, tuned
from nvembed_fast.kernels.testing import (
    ATTENTION_CASES,
    LATENT_CASES,
    NORM_CASES,
    POOL_CASES,
    SCORE_CASES,
    AttentionCase,
    LatentCase,
    PoolCase,
    RowCase,
    ScoreCase,
    as_tuple,
    assert_parity,
    attention_gradients,
    drawn_on,
    gradients,
    honest,
    upstream_of,
)
from nvembed_fast.kernels.tuned import Config, Key
from tools import resources

RULE = "rule"
EPS = 1e-5
WIDTH = 80  # of a label in the tables
Case = AttentionCase | LatentCase | PoolCase | RowCase | ScoreCase
Results = Sequence[torch.Tensor]


class Launch(NamedTuple):
    """A kernel on inputs of its own.

    Attributes:
        run: launches the kernel and gives a tensor or several.
        wanted: (the result of an honest kernel in this dtype, that of float64), for `assert_parity`.
    """

    run: Callable[[], torch.Tensor | Results]
    wanted: Callable[[], tuple[Sequence[torch.Tensor | Results], Results]]


@dataclass(frozen=True)
class Problem:
    """One class of shapes of one kernel, and the configurations to try on it.

    Attributes:
        kernel: of `tuned.KERNELS`.
        row: of tools.resources, with its stem: the launch that becomes a candidate's by other constants.
        prepare: (case, device, dtype) -> Launch.
        cases: the timed ones.
        part: of the same class, small enough for float64.
        candidates: capability -> values of the kernel's constants, in their order.
        dtype: of the inputs. It is that of the row.
    """

    kernel: str
    row: str
    prepare: Callable[[Any, str, torch.dtype], Launch]
    cases: tuple[Case, ...]
    part: Case
    candidates: Mapping[int, tuple[tuple, ...]]
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.kernel} ({self.row.partition(': ')[2]})"

    def configs(self, capability: int) -> list[Config]:
        constants = tuned.KERNELS[self.kernel].constants
        return [dict(zip(constants, c, strict=True)) for c in self.candidates.get(capability, ())]


# the arguments of each kernel


def _beside_reference(kernel: Callable, exact: Callable, tensors: Results, *rest) -> Launch:
    """A kernel and its reference, with the same arguments."""
    return Launch(
        lambda: kernel(*tensors, *rest),
        lambda: (
            honest(lambda *ts: exact(*ts, *rest), tensors),
            as_tuple(exact(*(t.double() for t in tensors), *rest)),
        ),
    )


def _attention_forward(case: AttentionCase, device: str, dtype: torch.dtype) -> Launch:
    from nvembed_fast.kernels.flash_attention import flash_attention

    *qkv, layout = case.inputs(device, dtype)
    return _beside_reference(flash_attention, reference.flash_attention, qkv, layout)


def _attention_backward(
    case: AttentionCase, device: str, dtype: torch.dtype, needs: tuple[bool, bool, bool]
) -> Launch:
    from nvembed_fast.kernels.flash_attention import _launch_bwd, _launch_fwd

    *qkv, layout = case.inputs(device, dtype)
    scale = case.head_width**-0.5
    q, k, v = qkv
    out, lse2 = _launch_fwd(q, k, v, layout, scale, case.causal)
    (dout,) = upstream_of([out])

    def needed(grads: Sequence[torch.Tensor]) -> Results:
        return tuple(grad for grad, is_needed in zip(grads, needs, strict=True) if is_needed)

    def wanted():
        no_dlse = torch.zeros(case.num_heads, layout.num_tokens, device=device)
        low = attention_gradients(qkv, [dout, no_dlse], layout, case.causal)
        exact = functools.partial(reference.flash_attention, layout=layout, causal=case.causal)
        _, high = gradients(exact, [t.double() for t in qkv], [dout])
        return needed(low), needed(high)

    args = (*qkv, out, lse2, dout, None, layout, scale, case.causal, needs)
    return Launch(lambda: needed(_launch_bwd(*args)), wanted)


def _direct(case: LatentCase, device: str, dtype: torch.dtype) -> Launch:
    from nvembed_fast.kernels.latent_attention import latent_attention

    return _beside_reference(latent_attention, reference.latent_attention, case.direct_inputs(device, dtype))


def _weights(case: LatentCase, device: str, dtype: torch.dtype) -> Launch:
    from nvembed_fast.kernels.absorbed_latent_attention import _launch_fwd

    x, a, *_, num_heads = case.absorbed_inputs(device, dtype)
    return _beside_reference(_launch_fwd, reference.latent_weights, (x, a), num_heads)


def _pool_forward(case: PoolCase, device: str, dtype: torch.dtype, geglu: bool) -> Launch:
    from nvembed_fast.kernels import mean_pool

    name = "mean_pool_geglu" if geglu else "mean_pool"
    x, *rest = case.inputs(device, dtype, geglu=geglu)
    return _beside_reference(getattr(mean_pool, name), getattr(reference, name), (x,), *rest)


def _pool_backward(case: PoolCase, device: str, dtype: torch.dtype, geglu: bool) -> Launch:
    from nvembed_fast.kernels.mean_pool import _launch_bwd

    x, layout, mask = case.inputs(device, dtype, geglu=geglu)
    exact = reference.mean_pool_geglu if geglu else reference.mean_pool
    exact = functools.partial(exact, layout=layout, pool_mask=mask)
    (dout,) = upstream_of([torch.empty(len(layout), case.width, device=device)])
    return Launch(
        lambda: _launch_bwd(x if geglu else None, dout, layout, mask, dtype),
        lambda: (gradients(exact, [x], [dout])[1], gradients(exact, [x.double()], [dout])[1]),
    )


def _norm_forward(case: RowCase, device: str, dtype: torch.dtype) -> Launch:
    from nvembed_fast.kernels.rms_norm import add_rms_norm

    return _beside_reference(add_rms_norm, reference.add_rms_norm, case.norm_inputs(device, dtype), EPS)


def _norm_backward(case: RowCase, device: str, dtype: torch.dtype) -> Launch:
    from nvembed_fast.kernels.rms_norm import _launch_bwd

    h, dh_out, weight = case.norm_inputs(device, dtype)
    (dy,) = upstream_of([h])

    def exact(h: torch.Tensor, weight: torch.Tensor) -> Results:
        _, (dh, dweight) = gradients(functools.partial(reference.rms_norm, eps=EPS), [h, weight], [dy])
        return dh + dh_out, dweight

    return Launch(
        lambda: _launch_bwd(h, weight, dy, dh_out, EPS, True, True),
        lambda: (exact(h, weight), exact(h.double(), weight.double())),
    )


def _scores(case: ScoreCase, device: str, dtype: torch.dtype) -> Launch:
    from nvembed_fast.kernels.masked_lse import masked_lse

    q, d, *rest = case.inputs(device, dtype)

    def lse_and_total(function: Callable, *tensors: torch.Tensor) -> Results:
        lse, _, total, _ = function(*tensors, *rest)
        # a row that keeps nothing
        return lse.masked_fill(lse == -torch.inf, 0.0), total

    return _beside_reference(
        functools.partial(lse_and_total, masked_lse),
        functools.partial(lse_and_total, reference.masked_lse),
        (q, d),
    )


def _scores_backward(case: ScoreCase, device: str, dtype: torch.dtype) -> Launch:
    from nvembed_fast.kernels.masked_lse import _launch_bwd, masked_lse

    q, d, *rest = case.inputs(device, dtype)
    masks: Any = rest[:-1]
    lse = masked_lse(q, d, *rest)[0]
    (dlse,) = upstream_of([lse])

    def exact(q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return reference.masked_lse(q, d, *rest)[0]

    return Launch(
        lambda: _launch_bwd(q, d, *masks, lse, dlse, rest[-1], True, True),  # type: ignore[call-arg]
        lambda: (
            honest(lambda *ts: tuple(gradients(exact, ts, [dlse])[1]), [q, d]),
            gradients(exact, [q.double(), d.double()], [dlse])[1],
        ),
    )


# the candidates: bench/NOTES.md, "To measure", says why


def _case(cases: tuple[Case, ...], which: str, /, **changes) -> Case:
    return dataclasses.replace(next(c for c in cases if c.name == which), **changes)


def _attention_problems() -> list[Problem]:
    # BLOCK_T, BLOCK_N, USE_TMA, AHEAD, num_warps, num_stages: a group of four heads makes 4 BLOCK_T rows
    tiles = {
        80: (*((32, 64, False, False, 8, stages) for stages in (2, 3, 4)), (16, 32, False, False, 4, 3)),
        90: (
            *((32, 64, True, False, 8, stages) for stages in (2, 3)),
            *((16, keys, True, False, 4, 2) for keys in (64, 32)),
        ),
    }
    long = tiles | {
        90: (
            *((32, 64, True, True, 8, 3), (32, 64, True, True, 8, 2), (32, 128, True, True, 8, 2)),
            *((16, 64, True, True, 4, 2), (16, 32, True, True, 4, 3), (16, 64, True, False, 4, 3)),
            *tiles[90],
        ),
    }
    # and PERSISTENT: where the compiler keeps the exponentials beside the products
    short, forward = ({sm: tuple((*t, False) for t in of[sm]) for sm in of} for of in (tiles, long))
    forward[90] += ((16, 32, True, True, 4, 3, True),)
    # without AHEAD and PERSISTENT
    dq = {
        80: ((16, 64, False, 8, 2), (16, 128, False, 8, 2)),
        90: (
            *((32, 64, True, 8, stages) for stages in (2, 3, 4)),
            *((16, 64, True, 4, 2), (16, 64, True, 4, 3), (16, 32, True, 4, 3)),
        ),
    }
    dkv = {
        80: ((16, 64, False, 8, 2), (8, 128, False, 8, 2)),
        90: (
            *((16, 128, True, 8, stages) for stages in (1, 2, 3)),
            *((8, 128, True, 8, 2), (16, 64, True, 4, 2)),
        ),
    }
    case = functools.partial(_case, ATTENTION_CASES, "nvembed-32x512")
    middle = case(name="nvembed-16x1024", lengths=(1024,) * 16)
    cases = (case(), middle, _case(ATTENTION_CASES, "nvembed-4x4096"))
    part = case(lengths=(512, 300), num_heads=4, num_kv_heads=1)
    problems = [
        Problem(f"flash_attention.{which}", f"flash_attention: {row} bf16", prepare, cases, part, tries)
        for which, row, prepare, tries in (
            ("fwd", "forward", _attention_forward, forward),
            ("dq", "dq", functools.partial(_attention_backward, needs=(True, False, False)), dq),
            ("dkv", "dkv", functools.partial(_attention_backward, needs=(False, True, True)), dkv),
        )
    ]
    for length, count in ((64, 256), (16, 1024)):
        batch = case(name=f"nvembed-{count}x{length}", lengths=(length,) * count)
        part = case(lengths=(length, length - 3, length), num_heads=4, num_kv_heads=1)
        row = f"flash_attention: forward {length} tokens bf16"
        problems.append(Problem("flash_attention.fwd", row, _attention_forward, (batch,), part, short))
    return problems


def _latent_problems() -> list[Problem]:
    # BLOCK_T, BLOCK_L, USE_TMA, num_warps, num_stages
    direct = {
        80: tuple((tokens, 64, False, tokens // 16, stages) for tokens in (128, 64) for stages in (2, 3)),
        90: (
            *((128, 128, True, 8, 3), (128, 128, True, 8, 2)),
            *((64, 128, True, 4, 3), (64, 64, True, 4, 3)),
        ),
    }
    # BLOCK_T, BLOCK_L, BLOCK_K, USE_TMA, num_warps, num_stages
    weights = {
        80: ((128, 256, 64, False, 8, 3), (64, 256, 64, False, 8, 3), (64, 512, 64, False, 8, 2)),
        90: ((128, 256, 64, True, 8, 4), (128, 256, 64, True, 8, 3), (64, 512, 64, True, 8, 3)),
    }
    return [
        Problem(
            f"{stem}.fwd",
            f"{stem}: {row} bf16",
            prepare,
            (_case(LATENT_CASES, case),),
            _case(LATENT_CASES, case, num_tokens=300),
            tries,
        )
        for stem, row, prepare, case, tries in (
            ("latent_attention", "direct 64", _direct, "smollm2-16k", direct),
            ("absorbed_latent_attention", "weights 512", _weights, "nvembed-16k", weights),
        )
    ]


def _pool_problems(geglu: bool) -> list[Problem]:
    # TOKENS, BLOCK_T, BLOCK_D, num_warps
    t = 16 if geglu else 32
    forward = (
        *((512, t, 128, 4), (256, t, 128, 4), (512, 2 * t, 128, 4)),
        *((512, 2 * t, 128, 8), (512, t, 256, 8)),
    )
    backward = tuple((tokens, t, 128, 4) for tokens in (32, 64, 256))
    case = functools.partial(_case, POOL_CASES, "nvembed-32x512-mlp" if geglu else "nvembed-32x512")
    cases = (case(), case(name="one text of 16384", lengths=(16384,)))
    part = case(lengths=(700, 512, 3))
    prefix, row = ("geglu_", "mean_pool_geglu") if geglu else ("", "mean_pool")
    return [
        Problem(
            f"mean_pool.{prefix}{which}",
            f"mean_pool: {row}{title} bf16",
            functools.partial(prepare, geglu=geglu),
            cases,
            part,
            {80: tries, 90: tries},
        )
        for which, title, prepare, tries in (
            ("fwd", "", _pool_forward, forward),
            ("bwd", " backward", _pool_backward, backward),
        )
    ]


def _score_problems() -> list[Problem]:
    # BLOCK_B, BLOCK_M, BLOCK_D, num_warps, num_stages
    tries = (
        *((64, 64, 16, 4, 3), (64, 64, 32, 4, 2), (128, 64, 16, 8, 3), (128, 128, 16, 8, 2)),
        *((32, 64, 32, 4, 3), (128, 64, 32, 8, 2)),
    )
    case = functools.partial(_case, SCORE_CASES, "nvembed-8k")
    cases = (case(), _case(SCORE_CASES, "nvembed-128x1k"))
    return [
        Problem(
            f"masked_lse.{which}",
            f"masked_lse: {title} fp32",
            prepare,
            cases,
            case(num_rows=70, num_columns=300),
            {80: tries, 90: tries},
            torch.float32,
        )
        for which, title, prepare in (
            ("fwd", "forward", _scores),
            ("bwd", "backward", _scores_backward),
        )
    ]


def _norm_problems() -> list[Problem]:
    # BLOCK_T, num_warps. Backward has ROWS before them
    forward = ((1, 4), (1, 8), (1, 16))
    backward = (*((rows, 1, 16) for rows in (16, 32, 64, 128)), (32, 1, 8))
    case = functools.partial(_case, NORM_CASES, "nvembed-16k")
    return [
        Problem(
            f"rms_norm.{which}",
            f"rms_norm: {row} bf16",
            prepare,
            (case(),),
            case(num_tokens=300),
            {80: tries, 90: tries},
        )
        for which, row, prepare, tries in (
            ("fwd", "add_rms_norm", _norm_forward, forward),
            ("bwd", "backward", _norm_backward, backward),
        )
    ]


def problems() -> list[Problem]:
    """All that is searched, kernel by kernel."""
    return [
        *_attention_problems(),
        *_latent_problems(),
        *_pool_problems(geglu=False),
        *_pool_problems(geglu=True),
        *_norm_problems(),
        *_score_problems(),
    ]


# 1. compile


def label(config: Config) -> str:
    """`BLOCK_T=32 BLOCK_N=64 USE_TMA num_warps=8`: a row of the tables."""
    words = (n if v is True else "" if v is False else f"{n}={v}" for n, v in config.items())
    return " ".join(filter(None, words))


def rule_of(problem: Problem, capability: int) -> Config:
    """The constants that the kernel's rule gives to the problem."""
    arguments = launch_by_rule(problem.row, capability).arguments
    return {name: arguments[name] for name in tuned.KERNELS[problem.kernel].constants}


def launch_by_rule(row: str, capability: int) -> resources.Launch:
    with tuned.use({}):
        return resources.launch_of(row, capability)


def compiled(row: str, capability: int, config: Config) -> resources.Figures:
    """What the compiler makes of a row's launch in another configuration, outside the interpreter."""
    launch = launch_by_rule(row, capability)
    return resources.compiled(launch._replace(arguments=launch.arguments | config), capability)


def candidates(problem: Problem, capability: int) -> list[Config]:
    """The rule's configuration and all others of the problem, each once."""
    rule = rule_of(problem, capability)
    return [rule] + [c for c in problem.configs(capability) if c != rule]


def refusal(row: resources.Figures, capability: int) -> str | None:
    """Why a candidate is not launched, or None."""
    if row["shared"] > (limit := resources.SHARED_LIMIT[capability]):
        return f"dropped: {row['shared']} bytes of shared memory, the limit is {limit}"
    if row["mixed"] or row["tma"] and (row["unbarred"] or row["touched"]):
        return f"dropped: {row['unbarred']} unbarred, {row['touched']} touched, {row['mixed']} mixed"
    return None


def survivors(rows: dict[str, resources.Figures], capability: int) -> list[str]:
    """Labels of the candidates that can be launched. Those that spill come last."""
    fit = [name for name, row in rows.items() if refusal(row, capability) is None]
    return sorted(fit, key=lambda name: bool(rows[name]["spills"]))


def _compile_all(
    problem: Problem, capability: int, pool: concurrent.futures.Executor
) -> dict[str, resources.Figures]:
    configs = candidates(problem, capability)
    rows = pool.map(functools.partial(compiled, problem.row, capability), configs)
    return dict(zip(map(label, configs), rows, strict=True))


def _compile_table(rows: dict[str, resources.Figures], capability: int) -> str:
    kept = survivors(rows, capability)
    columns = ("registers", "spills", "stack", "shared")
    lines = [f"  {'':{WIDTH}}" + " ".join(f"{column:>9}" for column in columns)]
    for name in kept + [n for n in rows if n not in kept]:
        row = rows[name]
        note = refusal(row, capability) or ("spills" if row["spills"] else "")
        rule = " (rule)" if name == next(iter(rows)) else ""
        figures = " ".join(f"{row[column]:>9}" for column in columns)
        lines.append(f"  {name + rule:{WIDTH}}{figures}  {note}".rstrip())
    return "\n".join(lines)


# 2. measure


class _Asked(dict):
    """Entries that note which ones a launch asks for, and have none."""

    def __init__(self):
        super().__init__()
        self.keys_asked: list[Key] = []

    def get(self, key: Key, default=None) -> None:
        self.keys_asked.append(key)


def key_of(kernel: str, runs: Sequence[Callable]) -> Key:
    """The entry that all these launches of a kernel ask for."""
    keys = set()
    for run in runs:
        asked = _Asked()
        with tuned.use(asked):
            run()
        keys |= {key for key in asked.keys_asked if key[0] == kernel}
    assert len(keys) == 1, f"the cases of {kernel} are of several classes, or of none: {sorted(keys)}"
    return keys.pop()


def _launching(run: Callable, entries: Mapping[Key, Config]) -> Callable:
    def call():
        with tuned.use(entries):
            return run()

    return call


def measure(
    problem: Problem, configs: Mapping[str, Config], device: str, dtype: torch.dtype, seconds: float
) -> tuple[Key, dict[str, list[Times]], list[str]]:
    """Parity of every candidate, then the times of all that pass beside those of the rule.

    Args:
        configs: label -> constants.
        seconds: of device time for the slowest candidate of each case.

    Returns:
        The key of the entry; label -> one `Times` a case, RULE among the labels. A line for each candidate
        whose parity is red.
    """
    with drawn_on(device):
        part = problem.prepare(problem.part, device, dtype)
        low, high = part.wanted()
        launches = [problem.prepare(case, device, dtype) for case in problem.cases]
    key = key_of(problem.kernel, [part.run, *(launch.run for launch in launches)])
    entries: dict[str, dict] = {RULE: {}} | {name: {key: config} for name, config in configs.items()}
    red = []
    for name, entry in list(entries.items()):
        try:
            got = as_tuple(_launching(part.run, entry)())
            for one, lo, hi in zip(got, low, high, strict=True):
                assert_parity(problem.kernel, one, lo, hi)
        except Exception as error:  # also an error of the compiler or of the launch
            red.append(f"{name}: {error}")
            del entries[name]
    assert RULE in entries, f"the rule itself is red, so nothing is to be measured: {red[0]}"
    times: dict[str, list[Times]] = {name: [] for name in entries}
    for launch in launches:
        functions = {name: _launching(launch.run, entry) for name, entry in entries.items()}
        for function in functions.values():
            function()
        for name, taken in interleaved(functions, seconds).items():
            times[name].append(taken)
    return key, times, red


def fastest(times: Mapping[str, Sequence[Times]]) -> str | None:
    """The label that beats the rule by more than the spread in every case, and the most over all, or None."""
    rule = times[RULE]

    def beats(taken: Sequence[Times]) -> bool:
        return all(t.percentile(80) < r.percentile(20) for t, r in zip(taken, rule, strict=True))

    def ratio(name: str) -> float:
        return sum(t.median / r.median for t, r in zip(times[name], rule, strict=True))

    return min((name for name, taken in times.items() if beats(taken)), key=ratio, default=None)


def _total_ms(taken: Sequence[Times]) -> float:
    return sum(t.median for t in taken)


def _time_table(problem: Problem, times: Mapping[str, Sequence[Times]]) -> str:
    lines = [f"  {'ms: p20 p50 p80':{WIDTH}}" + "  ".join(f"{case.name:>26}" for case in problem.cases)]
    for name, taken in times.items():
        figures = (" ".join(f"{t.percentile(p):8.4f}" for p in (20, 50, 80)) for t in taken)
        lines.append(f"  {name:{WIDTH}}" + "  ".join(figures))
    return "\n".join(lines)


# 3. write


def record(path: Path, key: Key, entry: Mapping[str, object] | None) -> None:
    """Put an entry (constants and provenance) in its place in a file, or remove the one that is there.

    All other entries stay as they are, and so does the text before the first of them.
    """
    text = path.read_text(encoding="utf-8")
    tables: dict[str, Mapping[str, object]]
    tables = {".".join(name): table for name, table in tuned.tables(tomllib.loads(text))}
    kernel, capability, shape_class = key
    name = f"{kernel}.sm_{capability}.{shape_class}"
    tables.pop(name, None)
    if entry is not None:
        tables[name] = entry
    header = text.partition("\n[")[0].rstrip()
    blocks = [
        "\n".join([f"[{name}]", *(f"{k} = {_toml(v)}" for k, v in tables[name].items())])
        for name in sorted(tables)
    ]
    with files.replacing(path) as scratch:
        scratch.write_text("\n\n".join([header, *blocks]) + "\n", encoding="utf-8")
        tuned.read(scratch)


def _toml(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime.date) else json.dumps(value)


def search(
    selected: Sequence[Problem],
    compile_all: Callable[[Problem, int], dict[str, resources.Figures]],
    device: str,
    dtype: torch.dtype | None,
    seconds: float,
    machine: results.Machine | None,
    path: Path | None = None,
) -> None:
    """Compile, check, time and print problem by problem. With a `machine` each is written as it is done.

    Args:
        dtype: None is that of each problem.
        path: the file to write. None is the one that launches read.
    """
    path = path or tuned.FILE
    from nvembed_fast.kernels._common import capability

    sm = capability(torch.device(device))
    if f"sm_{sm}" not in tuned.ARCHITECTURES:
        known = ", ".join(tuned.ARCHITECTURES)
        raise SystemExit(f"{tuned.FILE.name} has entries for {known} alone, and this GPU is sm_{sm}")
    for i, problem in enumerate(selected, 1):
        print(f"{i}/{len(selected)} {problem.name} sm_{sm}: compiling", flush=True)
        configs = {label(c): c for c in candidates(problem, sm)}
        rows = compile_all(problem, sm)
        print(_compile_table(rows, sm), flush=True)
        rule = next(iter(configs))
        tried = {name: configs[name] for name in survivors(rows, sm) if name != rule}
        key, times, red = measure(problem, tried, device, dtype or problem.dtype, seconds)
        print("".join(f"  parity is red, dropped: {line}\n" for line in red) + _time_table(problem, times))
        winner = fastest(
            {
                n: taken
                for n, taken in times.items()
                if n == RULE or tuned.walks_as(problem.kernel, tried[n], configs[rule])
            }
        )
        verdict = f"{winner} beats the rule" if winner else f"none beats the rule, {rule}"
        if machine is not None:
            entry = None
            if winner is not None:
                entry = tried[winner] | {
                    "gpu": machine.gpu,
                    "date": datetime.date.today(),
                    "commit": machine.commit,
                    "time_ms": round(_total_ms(times[winner]), 6),
                    "rule_ms": round(_total_ms(times[RULE]), 6),
                }
            record(path, key, entry)
            verdict += f"; {path.name} is up to date"
        print(f"  {verdict}\n", flush=True)


def _list(selected: Sequence[Problem], pool) -> None:
    for i, problem in enumerate(selected, 1):
        for capability in tuned.ARCHITECTURES.values():
            print(f"{i}/{len(selected)} {problem.name} sm_{capability}", flush=True)
            print(_compile_table(_compile_all(problem, capability, pool), capability) + "\n", flush=True)


def _selected(only: str | None) -> list[Problem]:
    chosen = [p for p in problems() if only in (None, p.kernel, p.kernel.partition(".")[0])]
    if not chosen:
        known = ", ".join(dict.fromkeys(p.kernel for p in problems()))
        raise SystemExit(f"--only must be one of {known}, or the part before the dot, got {only}")
    return chosen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python -m tools.tuning --list --only mean_pool    the candidates that compile, without a GPU\n"
        "  python -m tools.tuning --only flash_attention.fwd  times, nothing written\n"
        "  python -m tools.tuning --write --commit 45e2969   all kernels, into kernels/tuned.toml",
    )
    parser.add_argument("--only", metavar="KERNEL", help="such as flash_attention or flash_attention.dq")
    parser.add_argument("--list", action="store_true", help="compile for sm_80 and sm_90 and stop there")
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=0.5, help="per candidate and case (0.5)"
    )
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=tuned.FILE,
        metavar="FILE",
        help="put the winners into FILE [kernels/tuned.toml]",
    )
    parser.add_argument("--commit", metavar="ID", help="of the code, where there is no git to ask")
    args = parser.parse_args(argv)
    # an environment variable may allow TF32, whose rounding would be the cost of fp32
    torch.set_float32_matmul_precision("highest")
    if args.list and args.write:
        parser.error("--list measures nothing, so there is nothing to --write")
    if os.environ.get("TRITON_INTERPRET"):
        # read at the first `import triton`: the interpreter has no compiler
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "tools.tuning", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=env).returncode
    selected = _selected(args.only)
    if not args.list and not torch.cuda.is_available():
        print("timing needs a CUDA GPU; --list compiles the candidates without one", file=sys.stderr)
        return 2
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=spawn) as pool:
        try:
            if args.list:
                _list(selected, pool)
            else:
                compile_all = functools.partial(_compile_all, pool=pool)
                machine = results.machine(args.commit) if args.write else None
                search(selected, compile_all, "cuda", None, args.seconds, machine, args.write)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            print("\ninterrupted, the entries written so far stay", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
