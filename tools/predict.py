"""What an analytic model says about every goal of bench/NOTES.md, beside what a GPU has measured.

    python -m tools.predict                        the table of the goals
    python -m tools.predict --write                put it into bench/NOTES.md
    python -m tools.predict --results OUT/results-*.csv  with the measured cells of this file
    python -m tools.predict --kernels              operations, bytes, rounds and time, kernel by kernel

No prediction stands in README. The model is arithmetic:

1. A product takes its operations at the rate that a large product reaches.
2. A kernel that moves memory takes its bytes at the rate of a large copy, and RAMP to start and to drain.
3. A kernel with a fixed number of programs runs in whole rounds of them, one program on an SM.
4. A block of keys in attention takes its products, the arithmetic of its softmax, and STALL. Exponentials are
   free where the loop has the scores of the next block ahead (forward) or dP before them (backward).
5. A step takes the longer of its kernels' time and the host's.

STALL is the one constant that is fitted. It makes the loop without scores ahead reach 0.70 of cuDNN's rate on
an H100, which an audit of its instructions gave. The audit said 0.90 for the loop with scores ahead, 0.73 and
0.88 for the old and the new backward, each +-12 %.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from bench import workloads
from bench.baselines.encoders import GRAPHED
from bench.measure.limits import LAYER_PRODUCTS
from bench.measure.results import FOLDER, OURS
from bench.report import comparisons
from bench.report.comparisons import Comparison
from bench.report.tables import known_to_git
from nvembed_fast.kernels import testing
from nvembed_fast.stream import BATCH_TOKENS

NOTES = Path(__file__).resolve().parents[1] / "bench" / "NOTES.md"
START, END = "<!-- predict:start -->", "<!-- predict:end -->"


@dataclass(frozen=True)
class Gpu:
    """Published facts.

    Attributes:
        sms: number of multiprocessors.
        peak, product: TFLOP/s in bf16, by the data sheet and as the best large product reaches it.
        memory: TB/s by the data sheet.
        operations: bf16 operations of an SM and clock.
        fp32: fp32 instructions of an SM and clock.
        forward, backward: TFLOP/s of SDPA's cuDNN by length, head width 128, not causal.
    """

    name: str
    sms: int
    peak: float
    product: float
    memory: float
    operations: int
    fp32: int
    forward: dict[int, float]
    backward: dict[int, float]

    @property
    def clock(self) -> float:
        """GHz at which the peak is stated."""
        return 1e3 * self.peak / self.sms / self.operations

    @property
    def copy(self) -> float:
        """Bytes a second of a large copy."""
        return COPY_SHARE * self.memory * 1e12


# sms, peak, memory, operations, fp32: NVIDIA's data sheets and architecture papers. product: the "maximum
# achievable matmul FLOPS" of stas00/ml-engineering. cuDNN: the FlashAttention-3 paper (H100) and cuDNN 9.19
# with groups of eight heads (H200). For an A100, and backward on an H100, no figure was found
A100 = Gpu("A100", 108, 312, 271, 2.04, 2048, 64, {}, {})
H100 = Gpu("H100", 132, 989, 794, 3.35, 4096, 128, {512: 497, 1024: 574, 2048: 617, 4096: 609, 8192: 600}, {})
H200 = Gpu(
    "H200",
    132,
    989,
    794,
    4.8,
    4096,
    128,
    {2048: 633, 4096: 671, 8192: 691},
    {2048: 504, 4096: 560, 8192: 594},
)
GPUS = (A100, H100, H200)
# judgement: what a large copy reaches of the data sheet, and the seconds to fill and drain a GPU
COPY_SHARE, RAMP = 0.9, 4e-6
# fitted: seconds of waiting for one block of 128 rows and 128 keys, see above
STALL = 0.285e-6
BLOCK = 128
HEADS, KV_HEADS, HEAD_WIDTH = 32, 8, 128
# exponentials of an SM and clock (CUDA programming guide), and fp32 instructions for one score, counted in
# the kernels' source: scale and subtract, maximum, sum, conversion; backward (dP - delta) P and a conversion
EXPONENTIALS, FORWARD_INSTRUCTIONS, BACKWARD_INSTRUCTIONS = 16, 4, 5
FORWARD_PRODUCTS, DQ_PRODUCTS, DKV_PRODUCTS, BACKWARD_PRODUCTS = 2, 3, 4, 5

WIDTH, MLP_WIDTH, LAYERS = 4096, 14336, 32
LAYER_WEIGHTS = sum(rows * columns for rows, columns in LAYER_PRODUCTS["cuda"].values())
PRODUCTS = 2 * LAYERS * LAYER_WEIGHTS  # operations of one token
# bytes of one token between the products. Eager is counted pass by pass, compiled is judgement. Ours, of a
# layer in 16 bits: each of two norms reads and writes, the product before it reads the stream, rotary turns
# in place, SwiGLU reads two and writes one
EAGER, COMPILED = 17.8e6, 7e6
FUSED = 2 * LAYERS * (2 * 3 * WIDTH + 2 * (HEADS + KV_HEADS) * HEAD_WIDTH + 3 * MLP_WIDTH)
# operations of the latent block in units of WIDTH ** 2: of a token, and for keys and values of a text
ABSORBED, DIRECT, KEYS_AND_VALUES = 20, 60, 16384
# bytes of one token in the latent block, counted pass by pass
ABSORBED_BYTES, HOISTED_BYTES, ORIGINAL_BYTES = 0.2e6, 0.45e6, 0.6e6
# attention with a 4-D mask: judgement, on sm_90 below SDPA flash (309 to 370 TFLOP/s, FlashAttention-3 paper)
MASKED_RATE = {A100.name: 120e12, H100.name: 250e12, H200.name: 250e12}
# seconds on the host: 38 launches in a layer of transformers' MistralModel (counted by a dispatch mode), 7
# microseconds each by judgement. Ours: 5 to 7 ms, with a driver that launches nothing, times what is left
# since launches are repeated, in loops of `tools.launch_time` (bench/NOTES.md, "Host time")
STOCK_HOST, OURS_HOST = 38 * LAYERS * 7e-6, 6e-3 * 0.544 / 1.091
# kernels of our forward on one text, ours and PyTorch's: 9 a layer, and 16. tests/test_fake_driver.py counts
# them. By judgement: the seconds between two of them in a graph
OUR_KERNELS, GRAPH_GAP = 9 * LAYERS + 16, 1e-6


def rounds(gpu: Gpu, programs: int) -> float:
    """How much longer whole rounds take than programs that fill the SMs exactly."""
    return math.ceil(programs / gpu.sms) / (programs / gpu.sms)


def moved_seconds(gpu: Gpu, moved: float) -> float:
    return moved / gpu.copy + RAMP


def product_seconds(gpu: Gpu, flop: float, tokens: int = BLOCK, weights: float = 0.0) -> float:
    """Of products over `tokens` rows in tiles of BLOCK, and not before the weights are read."""
    return max(flop * (-(-tokens // BLOCK) * BLOCK / tokens) / (gpu.product * 1e12), weights / gpu.copy)


def block_seconds(gpu: Gpu, products: int, instructions: int, overlaps: bool) -> float:
    """Of one block of BLOCK rows and keys on one SM."""
    scores = BLOCK * BLOCK
    product = products * 2 * scores * HEAD_WIDTH / (gpu.product * 1e12 / gpu.sms)
    exponentials = 0.0 if overlaps else scores / EXPONENTIALS / (gpu.clock * 1e9)
    return product + exponentials + instructions * scores / gpu.fp32 / (gpu.clock * 1e9) + STALL


def attention_seconds(gpu: Gpu, lengths: Sequence[int], backward: bool = False, ahead: bool = True) -> float:
    """Ours on a pack, forward or backward."""
    group = HEADS // KV_HEADS
    blocks = sum(math.ceil(n * group / BLOCK) * math.ceil(n / BLOCK) for n in lengths) * KV_HEADS
    by_rows = sum(math.ceil(n * group / BLOCK) for n in lengths) * KV_HEADS
    by_keys = sum(math.ceil(n / BLOCK) for n in lengths) * KV_HEADS
    overlaps = ahead and gpu.operations > A100.operations
    parts = [(FORWARD_PRODUCTS, FORWARD_INSTRUCTIONS, by_rows)]
    if backward:
        parts = [
            (DQ_PRODUCTS, BACKWARD_INSTRUCTIONS, by_rows),
            (DKV_PRODUCTS, BACKWARD_INSTRUCTIONS, by_keys),
        ]
    return sum(
        blocks / gpu.sms * block_seconds(gpu, products, instructions, overlaps) * rounds(gpu, programs)
        for products, instructions, programs in parts
    )


def cudnn_seconds(gpu: Gpu, lengths: Sequence[int], backward: bool = False) -> float | None:
    """SDPA's cuDNN on a padded batch, or None where no rate is published."""
    if not gpu.forward:
        return None
    longest = max(lengths)
    rate = _nearest(gpu.forward, longest)
    if backward:
        # of an H100: the H200's share of the forward
        rate *= _nearest(H200.backward, longest) / _nearest(H200.forward, longest)
    products = BACKWARD_PRODUCTS if backward else FORWARD_PRODUCTS
    flop = products * 2 * HEADS * HEAD_WIDTH * len(lengths) * longest**2
    return flop / (rate * 1e12)


def _nearest(rates: dict[int, float], length: int) -> float:
    return rates[min(rates, key=lambda known: abs(math.log(known / length)))]


def attention_shares(gpu: Gpu, backward: bool = False, ahead: bool = True) -> tuple[float, ...]:
    """Our rate as a share of cuDNN's, on both long cases."""
    shares = []
    for lengths in ((4096,) * 4, (8192,) * 2):
        theirs = cudnn_seconds(gpu, lengths, backward)
        if theirs is not None:
            shares.append(theirs / attention_seconds(gpu, lengths, backward, ahead))
    return tuple(shares)


def skewed_attention(gpu: Gpu) -> tuple[float, ...]:
    lengths = testing.skewed_lengths(64)
    theirs = cudnn_seconds(gpu, lengths)
    return () if theirs is None else (theirs / attention_seconds(gpu, lengths),)


def latent_block(gpu: Gpu) -> tuple[float, float]:
    """As fast as (original, hoisted), 512-token texts."""

    def per_token(units: float, moved: float) -> float:
        return units * WIDTH**2 / (gpu.product * 1e12) + moved / gpu.copy

    ours = per_token(ABSORBED, ABSORBED_BYTES)
    return (
        per_token(DIRECT + KEYS_AND_VALUES / 512, ORIGINAL_BYTES) / ours,
        per_token(DIRECT, HOISTED_BYTES) / ours,
    )


@cache
def memory_kernels() -> dict[str, float]:
    """Bytes of the bench cases that are bound by memory, in bf16."""

    def case(cases: Iterable, name: str):
        return next(c for c in cases if c.name == name)

    bf16 = torch.bfloat16
    return {
        "mean pool behind GEGLU": case(testing.POOL_CASES, "nvembed-32x512-mlp").bytes_moved(
            bf16, geglu=True
        ),
        "`add_rms_norm`": case(testing.NORM_CASES, "nvembed-16k").norm_bytes(bf16, residual=True),
        "SwiGLU": case(testing.GATED_CASES, "nvembed-16k").gated_bytes(bf16),
        "rotary": case(testing.ROTARY_CASES, "nvembed-32x512").bytes_moved(bf16, inplace=True),
    }


def copy_shares(gpu: Gpu) -> tuple[float, ...]:
    return tuple(moved / gpu.copy / moved_seconds(gpu, moved) for moved in memory_kernels().values())


def norm_backward(gpu: Gpu) -> tuple[float, ...]:
    """At the rate of cuDNN's: 3801 GB/s on an H200, where PyTorch's has 1807 (published)."""
    case = next(c for c in testing.NORM_CASES if c.name == "nvembed-16k")
    both, forward = (case.norm_bytes(torch.bfloat16, False, backward) for backward in (True, False))
    theirs = (both - forward) / (1807e9 * gpu.memory / H200.memory)
    return (theirs / ((both - forward) / (3801e9 * gpu.memory / H200.memory) + RAMP),)


def head_seconds(gpu: Gpu, tokens: float, texts: float, units: float, per_text: float = 0.0) -> float:
    return (units * tokens + per_text * texts) * WIDTH**2 / (gpu.product * 1e12)


def ours_seconds(gpu: Gpu, lengths: Sequence[int]) -> float:
    """`NVEmbed.encode` on batches of BATCH_TOKENS."""
    tokens = sum(lengths)
    batch = min(tokens, BATCH_TOKENS["cuda"])
    products = product_seconds(gpu, PRODUCTS * tokens, batch)
    moved = (FUSED + ABSORBED_BYTES) * tokens / gpu.copy
    attention = LAYERS * attention_seconds(gpu, lengths)
    return products + moved + attention + head_seconds(gpu, tokens, 0, ABSORBED)


def stock_seconds(
    gpu: Gpu, lengths: Sequence[int], batch_size: int, *, moved: float, original: bool = False
) -> float:
    """A model that pads, batch by batch. The original takes a mask, and texts in the caller's order."""
    total = 0.0
    ordered = lengths if original else sorted(lengths, reverse=True)
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        longest, texts = max(batch), len(batch)
        tokens = longest * texts
        masked = original or len(set(batch)) > 1
        rate = MASKED_RATE[gpu.name] if masked or not gpu.forward else _nearest(gpu.forward, longest) * 1e12
        seconds = product_seconds(gpu, PRODUCTS * tokens, tokens, 2.0 * LAYERS * LAYER_WEIGHTS)
        seconds += moved * tokens / gpu.copy + 4 * LAYERS * WIDTH * tokens * longest / rate
        # the sorted one's head sees no padding
        seconds += head_seconds(
            gpu, tokens if original else sum(batch), texts, DIRECT, KEYS_AND_VALUES if original else 0
        )
        total += max(seconds, STOCK_HOST)
    return total


def _workload(name: str) -> tuple[int, ...]:
    return next(w.lengths for w in workloads.GPU.workloads if w.name == name)


def _best(gpu: Gpu, lengths: Sequence[int], **how) -> float:
    return min(stock_seconds(gpu, lengths, size, **how) for size in workloads.GPU.batch_sizes)


def products_share(gpu: Gpu) -> tuple[float, ...]:
    lengths = _workload("all 512")
    return (product_seconds(gpu, PRODUCTS * sum(lengths), BATCH_TOKENS["cuda"]) / ours_seconds(gpu, lengths),)


def encoder_skewed(gpu: Gpu) -> tuple[float, ...]:
    lengths = _workload("skewed")
    ours = ours_seconds(gpu, lengths)
    original = _best(gpu, lengths, moved=EAGER, original=True)
    return tuple(t / ours for t in (original, *(_best(gpu, lengths, moved=m) for m in (EAGER, COMPILED))))


def encoder_queries(gpu: Gpu) -> tuple[float, ...]:
    lengths = _workload("queries")
    return (_best(gpu, lengths, moved=EAGER, original=True) / ours_seconds(gpu, lengths),)


def one_query(gpu: Gpu) -> tuple[float, float]:
    """As fast as stock, (plain, by a CUDA graph)."""
    lengths = _workload("one query")
    stock = stock_seconds(gpu, lengths, 1, moved=EAGER)
    graph = 2.0 * LAYERS * LAYER_WEIGHTS / gpu.copy + OUR_KERNELS * GRAPH_GAP
    return stock / max(graph, OURS_HOST), stock / graph


@dataclass(frozen=True)
class Part:
    """Where a measured value stands: how many times as fast as `theirs` this project is.

    Attributes:
        theirs: names of other implementations, of which the fastest counts. None: the share of the limit.
        metric: of the two times.
        ours: the implementation of this project.
    """

    suite: str
    case: str
    theirs: tuple[str, ...] = ()
    metric: str = "time_p50"
    ours: str = OURS

    def value(self, found: Sequence[Comparison]) -> float | None:
        for c in found:
            if (c.suite, c.case) == (self.suite, self.case):
                if not self.theirs:
                    return c.share(self.ours)
                ours, *theirs = (c.figure(name, self.metric) for name in (self.ours, *self.theirs))
                known = [t.value for t in theirs if t is not None and t.value is not None]
                return min(known) / ours.value if ours and ours.value and known else None
        return None


@dataclass(frozen=True)
class Goal:
    """A row of the table.

    Attributes:
        low, aim: the goal. `low` is the minimum.
        predict: the values on a GPU, in the order of the parts. Empty without a published rate.
        parts: of the measured cell.
    """

    what: str
    low: str
    aim: str
    predict: Callable[[Gpu], tuple[float, ...]]
    parts: Sequence[Part]


CUDNN, STOCK = ("SDPA cuDNN", "SDPA cuDNN, K and V repeated"), "MistralModel, sorted"
LONG, BACKWARD = ("nvembed-4x4096", "nvembed-2x8192"), "forward+backward"
MEMORY_CASES = (
    ("mean_pool", "mean_pool_geglu nvembed-32x512-mlp forward"),
    ("rms_norm", "add_rms_norm nvembed-16k forward"),
    ("gated", "swiglu nvembed-16k forward"),
    ("rotary", "in place nvembed-32x512 forward"),
)
# fmt: off
GOALS = (
    Goal("attention forward, 4x4096 / 2x8192, rate against SDPA cuDNN", "0.70", "0.90", attention_shares,
         [Part("flash_attention", f"{case} forward", CUDNN) for case in LONG]),
    Goal("attention backward, the same, by the rows `backward`", "0.55", "0.75",
         lambda gpu: attention_shares(gpu, backward=True),
         [Part("flash_attention", f"{case} {BACKWARD}", CUDNN, "backward") for case in LONG]),
    Goal("attention on `skewed-64`, times as fast as padded SDPA cuDNN", "1.5", "3", skewed_attention,
         [Part("flash_attention", "skewed-64 forward", CUDNN)]),
    Goal("latent block, 512-token texts, times as fast as original / hoisted", "4 / 2.3", "8 / 2.9",
         latent_block,
         [Part("latent_block", "nvembed-32x512 forward", (theirs,)) for theirs in ("original", "hoisted")]),
    Goal(f"{' / '.join(memory_kernels())}: share of the copy rate", "0.75", "0.90", copy_shares,
         [Part(*case) for case in MEMORY_CASES]),
    Goal("RMSNorm backward, times as fast as PyTorch, by the rows `backward`", "1.8", "2.2", norm_backward,
         [Part("rms_norm", f"rms_norm nvembed-16k {BACKWARD}", ("torch",), "backward")]),
    Goal("encoder, all 512: time of its products / whole time", "0.75", "0.88", products_share,
         [Part("encode", "all 512")]),
    Goal("encoder, skewed, times as fast as original / sorted / sorted and compiled", "2.5 / 1.2 / 1.05",
         "4 / 1.4 / 1.2", encoder_skewed,
         [Part("encode", "skewed", (theirs,)) for theirs in ("original", STOCK, f"{STOCK}, compiled")]),
    Goal("encoder, queries, times as fast as the original", "2", "4", encoder_queries,
         [Part("encode", "queries", ("original",))]),
    Goal("one query, latency, times as fast as the stock model, plain / by a graph", "1.3", "2", one_query,
         [Part("encode", "one query", (STOCK,), ours=ours) for ours in (OURS, GRAPHED)]),
)
# fmt: on


def _cell(values: Iterable[float | None]) -> str:
    return " / ".join("?" if value is None else f"{value:.2f}" for value in values)


def goals_table(machines: dict[str, list[Comparison]]) -> str:
    """Markdown: every goal, what the model predicts, and what the files of results hold.

    Args:
        machines: GPU -> its comparisons, as `comparisons.load` gives them. CPUs have no cell.
    """
    lines = [
        "| what | min | aim | predicted (not measured) | measured | suite |",
        "|---|---|---|---|---|---|",
    ]
    for goal in GOALS:
        predicted = [f"{gpu.name} {_cell(values)}" for gpu in GPUS if (values := goal.predict(gpu))]
        measured = []
        for machine, found in machines.items():
            shown = [part.value(found) for part in goal.parts]
            if not comparisons.is_cpu(machine) and any(value is not None for value in shown):
                measured.append(f"{machine}: {_cell(shown)}")
        cells = goal.what, goal.low, goal.aim, "<br>".join(predicted), "<br>".join(measured)
        suites = dict.fromkeys(f"`{part.suite}`" for part in goal.parts)
        lines.append(f"| {' | '.join(cells)} | {', '.join(suites)} |")
    return "\n".join(lines)


def kernels_table() -> str:
    """Markdown: the kernels whose times the goals are made of, forward."""
    lines = ["| kernel | GFLOP | MB | rounds | predicted ms |", "|---|--:|--:|---|---|"]
    for lengths in ((512,) * 32, (4096,) * 4):
        for backward in (False, True):
            flop = 2 * HEADS * HEAD_WIDTH * sum(n * n for n in lengths)
            flop *= DQ_PRODUCTS + DKV_PRODUCTS if backward else FORWARD_PRODUCTS
            programs = sum(math.ceil(n * HEADS / BLOCK) for n in lengths)
            name = f"attention {len(lengths)}x{lengths[0]} {'backward' if backward else 'forward'}"
            each = [(programs / gpu.sms, attention_seconds(gpu, lengths, backward)) for gpu in GPUS]
            lines.append(_kernel_row(name, flop, None, each))
    for name, moved in memory_kernels().items():
        lines.append(_kernel_row(name, None, moved, [(None, moved_seconds(gpu, moved)) for gpu in GPUS]))
    return "\n".join(lines)


def _kernel_row(
    name: str, flop: float | None, moved: float | None, each: Sequence[tuple[float | None, float]]
) -> str:
    amounts = [
        "" if amount is None else f"{amount:.0f}" for amount in (flop and flop / 1e9, moved and moved / 1e6)
    ]
    times = ", ".join(f"{gpu.name} {1e3 * seconds:.3f}" for gpu, (_, seconds) in zip(GPUS, each, strict=True))
    whole = ", ".join(f"{gpu.name} {r:.2f}" for gpu, (r, _) in zip(GPUS, each, strict=True) if r is not None)
    return f"| {' | '.join([name, *amounts, whole, times])} |"


def with_table(page: str, table: str) -> str:
    """The page with this table between its markers."""
    if page.count(START) != 1 or page.count(END) != 1 or page.index(START) > page.index(END):
        raise ValueError(f"{NOTES.name} needs the line {START} and, below it, the line {END}, once each")
    before, rest = page.split(START)
    indented = "\n".join(f"   {line}" for line in table.splitlines())
    return f"{before}{START}\n\n{indented}\n\n   {END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", nargs="+", type=Path, help="CSV files (default: those that git knows)")
    parser.add_argument("--write", action="store_true", help=f"put the table into bench/{NOTES.name}")
    parser.add_argument("--kernels", action="store_true", help="print the kernels, not the goals")
    given = parser.parse_args(arguments)
    if given.kernels:
        print(kernels_table())
        return
    table = goals_table(comparisons.load(given.results or known_to_git(FOLDER)))
    if given.write:
        NOTES.write_text(with_table(NOTES.read_text(encoding="utf-8"), table), encoding="utf-8")
    else:
        print(table)


if __name__ == "__main__":
    main()
