"""Where the time of a step goes, by category, each beside its own limit.

    python -m bench.profiling --workload "all 512"

A step packs the token ids of a workload, runs the model on them and waits for the device.

1. Record: some steps under torch.profiler. The modules and operations write their names into the trace, by
   hooks and wrappers that are put on from outside and taken off again.
2. Attribute (`attribute`): the device is at work, in a kernel (on a CPU: in an operator), or idle. Work
   belongs to the category of the mark in which it was launched. Idle time is host work before the first
   kernel of the model, behind the last and while the host packs, and a launch gap everywhere else (on a CPU:
   Python, and the freeing of memory). So the categories cover every moment of a step exactly once, and sum to
   it. "other" is work outside of all parts that have a category.
3. Compare (`limits_ms`): the time of each category at the rates that `bench.measure.limits` measures in this
   run.

Marks and profiler cost host time, and a GPU with little to do waits for the host. So the time of a step
without them is printed below the table.
"""

import argparse
import contextlib
import dataclasses
import functools
import gzip
import importlib.util
import json
import sys
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function
from tqdm import tqdm

from bench.measure.limits import Limits
from bench.measure.results import FOLDER, OURS, Figure, ResultsFile, default_path, machine, warn_if_busy
from bench.measure.timing import Times
from bench.report.comparisons import Comparison
from bench.report.pictures import draw_waterfall
from bench.workloads import GPU, IMPLS, SCALES, random_encoder
from nvembed_fast import ops
from nvembed_fast.kernels.testing import AttentionCase, LatentCase, RotaryCase, RowCase
from nvembed_fast.network.latent_head import LatentHead
from nvembed_fast.network.mistral import DecoderLayer
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.packing import PackedBatch, token_budget_batches
from nvembed_fast.stream import BATCH_TOKENS

SUITE = "profile"
PRODUCTS, ATTENTION, ELEMENTWISE, HEAD = "products", "attention", "element-wise", "latent head"
GAPS, HOST, OTHER = "launch gaps", "host work", "other"
CATEGORIES = (PRODUCTS, ATTENTION, ELEMENTWISE, HEAD, GAPS, HOST, OTHER)

STEP, PACKING = "step", "packing"
CATEGORY_OF_MARK = {
    PACKING: HOST,
    "linear": PRODUCTS,
    "add_linear": PRODUCTS,
    "add_linear_": PRODUCTS,
    "flash_attention": ATTENTION,
    "embed_tokens": ELEMENTWISE,
    "rms_norm": ELEMENTWISE,
    "add_rms_norm": ELEMENTWISE,
    "rotary": ELEMENTWISE,
    "swiglu": ELEMENTWISE,
    "head": HEAD,
}
# all work inside these is theirs
WHOLE = (HEAD, HOST)

# by device
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
LAYERS = {"cuda": 32, "cpu": 4}  # where --layers is not given
WORKLOADS = {workload.name: workload for workload in GPU.workloads}
STEPS = 5
LIMIT_SECONDS = 1.0

Step = Callable[[], None]


def build_model(device: str, layers: int) -> NVEmbedModel:
    """The device's shape with so many layers, for inference, and with random weights."""
    shape = SCALES[device].config
    text = dataclasses.replace(shape.text_config, num_hidden_layers=layers)
    config = dataclasses.replace(shape, text_config=text)
    return random_encoder(config, device, DTYPES[device]).model


def make_step(model: NVEmbedModel, batches: Sequence[Sequence[int]], instruction: int) -> Step:
    """A call that packs and embeds batches of texts of these lengths, and waits for the device."""
    device = model.embedding_model.embed_tokens.weight.device
    draw, vocab_size = np.random.default_rng(0), model.config.text_config.vocab_size
    ids = [[draw.integers(vocab_size, size=length) for length in lengths] for lengths in batches]

    @torch.no_grad()
    @ops.use_impl(IMPLS[device.type])
    def step() -> None:
        for batch in ids:
            with record_function(PACKING):
                packed = PackedBatch.from_ids(batch, [instruction] * len(batch), device)
            model(packed)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


@contextlib.contextmanager
def marked(model: NVEmbedModel) -> Iterator[None]:
    """Inside, embedding, layers, head and operations write their names into a trace."""
    backbone = model.embedding_model
    modules = {"embed_tokens": backbone.embed_tokens, "head": model.head}
    layers = {id(layer): f"layers.{i}" for i, layer in enumerate(backbone.layers)}
    run_layer = DecoderLayer.forward
    under_way: list[record_function] = []

    def enter(name: str, *_) -> None:
        under_way.append(record_function(name))
        under_way[-1].__enter__()

    def leave(*_) -> None:
        under_way.pop().__exit__(None, None, None)

    def marked_layer(layer: DecoderLayer, *args, **kwargs):
        # no hook: with hooks a layer adds the result of its down product apart
        with record_function(layers.get(id(layer), "layer")):
            return run_layer(layer, *args, **kwargs)

    with contextlib.ExitStack() as undo:
        undo.callback(setattr, DecoderLayer, "forward", run_layer)
        setattr(DecoderLayer, "forward", marked_layer)  # noqa: B010 - mypy knows no assignment to a method
        for name, module in modules.items():
            undo.callback(module.register_forward_pre_hook(functools.partial(enter, name)).remove)
            undo.callback(module.register_forward_hook(leave, always_call=True).remove)
        for name in (*ops.OPERATIONS, "linear", "add_linear", "add_linear_"):
            operation = getattr(ops, name)
            undo.callback(setattr, ops, name, operation)
            setattr(ops, name, _marked(name, operation))
        yield


def _marked(name: str, operation: Callable) -> Callable:
    @functools.wraps(operation)
    def call(*args, **kwargs):
        with record_function(name):
            return operation(*args, **kwargs)

    return call


def record(model: NVEmbedModel, step: Step, path: Path) -> None:
    """Write the chrome trace of STEPS steps, after one that is not marked as a step."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with marked(model), torch.profiler.profile(activities=activities) as profiler:
        # the first launches under a profiler set it up
        step()
        for _ in range(STEPS):
            with record_function(STEP):
                step()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def attribute(events: Sequence[dict], device: str) -> list[dict[str, float]]:
    """Where the time of every step went.

    A kernel carries the correlation id of the call that launched it, whose start lies inside marks: those are
    on the host, and the kernel runs later. Copies and fills of the GPU count as kernels. Where two run at
    once, the time is that of the one which began first.

    Args:
        events: "traceEvents" of a chrome trace of torch.profiler.
        device: "cuda" or "cpu".

    Returns:
        Per step, in order, the milliseconds of each of CATEGORIES.

    Raises:
        ValueError: no step is marked, or no kernel was recorded on a GPU.
    """
    kinds = defaultdict(list)
    for event in events:
        if event.get("ph") == "X":
            kinds[event.get("cat")].append(event)
    marks = kinds["user_annotation"]
    steps = sorted(_span(mark) for mark in marks if mark["name"] == STEP)
    if not steps:
        raise ValueError(f"no step to attribute: the trace has no mark {STEP!r}")
    category_at = _categories(marks)
    work = sorted(
        ((*_span(event), category_at(launch)) for event, launch in _work(kinds, device)),
        key=lambda w: (w[0], -w[1]),
    )
    packing = [_span(mark) for mark in marks if mark["name"] == PACKING]
    return [_parts(step, [w for w in work if step[0] <= w[0] < step[1]], packing) for step in steps]


def _span(event: dict) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def _work(kinds: dict[str, list[dict]], device: str) -> list[tuple[dict, float | None]]:
    """(event, when the host launched it, None where that is not recorded) of all the device's work."""
    if device == "cpu":
        # an operator inside an operator starts later and ends earlier: it adds nothing
        thread = next(mark["tid"] for mark in kinds["user_annotation"] if mark["name"] == STEP)
        return [(event, event["ts"]) for event in kinds["cpu_op"] if event["tid"] == thread]
    if not kinds["kernel"]:
        raise ValueError(
            "the profiler recorded no kernel. It reads them through CUPTI, which another profiler, or a "
            "container without the right to read GPU counters, can keep it from"
        )
    launches = {
        event["args"]["correlation"]: event["ts"]
        # Triton launches through the driver, PyTorch and its libraries through either
        for event in kinds["cuda_driver"] + kinds["cuda_runtime"]
        if "correlation" in event.get("args", {})
    }
    ran = kinds["kernel"] + kinds["gpu_memcpy"] + kinds["gpu_memset"]
    return [(event, launches.get(event["args"].get("correlation"))) for event in ran]


def _categories(marks: Sequence[dict]) -> Callable[[float | None], str]:
    """The category of the innermost mark that has one, at a time. Marks nest."""
    times, categories = [-np.inf], [OTHER]
    inside = [(np.inf, OTHER)]

    def leave(until: float) -> None:
        while inside[-1][0] <= until and len(inside) > 1:
            end, _ = inside.pop()
            times.append(end)
            categories.append(inside[-1][1])

    for start, end, name in sorted(
        ((*_span(mark), mark["name"]) for mark in marks), key=lambda m: (m[0], -m[1])
    ):
        leave(until=start)
        outer = inside[-1][1]
        inside.append((end, outer if outer in WHOLE else CATEGORY_OF_MARK.get(name, outer)))
        times.append(start)
        categories.append(inside[-1][1])
    leave(until=np.inf)
    return lambda time: OTHER if time is None else categories[bisect_right(times, time) - 1]


def _parts(
    step: tuple[float, float],
    work: Sequence[tuple[float, float, str]],
    packing: Sequence[tuple[float, float]],
) -> dict[str, float]:
    """The milliseconds of one step by category, from (start, end, category) of its work in order of time."""
    parts = dict.fromkeys(CATEGORIES, 0.0)
    now, last = step
    model_has_begun = False
    for start, end, category in work:
        end = min(end, last)
        if start > now:
            idle = start - now
            host = sum(max(0.0, min(start, p[1]) - max(now, p[0])) for p in packing)
            parts[HOST] += host if model_has_begun else idle
            parts[GAPS] += idle - host if model_has_begun else 0.0
        parts[category] += max(0.0, end - max(start, now))
        now = max(now, end)
        model_has_begun |= category != HOST
    parts[HOST] += last - now
    return {category: 1e-3 * microseconds for category, microseconds in parts.items()}


def limits_ms(
    model: NVEmbedModel, batches: Sequence[Sequence[int]], limits: Limits
) -> dict[str, float | None]:
    """The minimum milliseconds of each category, or None for "other", which has no limit.

    With T tokens in a batch, b bytes an element, and the letters of `nvembed_fast.network.mistral`:

    - products: each product of each layer by itself at this T, as cuBLAS (on a CPU its library) takes it.
    - attention: 4 N H n^2 operations for a text of n tokens in each layer, at the rate of a large product.
    - element-wise: the bytes of fused kernels, at the rate of a large copy. Per token and layer
      2 * 2 D b (norms) + 2 (N + G) H b (rotary) + 3 F b (SwiGLU). The last norm and the embedding move 2 D b
      each. Two norms also add, which moves 2 D b more: the one behind the first attention, and the one behind
      the first layer. All other residual adds stand inside products.
    - latent head: the longer of its operations at the rate of a large product, and of one reading of its
      weights and input and one writing of the vectors at the rate of a large copy.
    - launch gaps and host work: nothing.
    """
    total = dict.fromkeys(CATEGORIES, 0.0)
    backbone, config = model.embedding_model, model.config.text_config
    dtype = backbone.embed_tokens.weight.dtype
    num_layers = len(backbone.layers)
    weights = [tuple(m.weight.shape) for m in backbone.layers.modules() if isinstance(m, nn.Linear)]
    n, g, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for lengths in batches:
        tokens = sum(lengths)
        total[PRODUCTS] += sum(limits.product_ms(tokens, weight, dtype) for weight in weights)
        attention = AttentionCase("", tuple(lengths), n, g, h, causal=config.is_causal)
        total[ATTENTION] += 1e-9 * num_layers * attention.flops() / limits.matrix_rate(dtype)
        row = RowCase("", tokens, config.hidden_size)
        moved = (2 * num_layers - 1) * row.norm_bytes(dtype, residual=False)
        moved += 2 * row.norm_bytes(dtype, residual=True)
        moved += num_layers * RotaryCase("", tuple(lengths), n, g, h).bytes_moved(dtype, inplace=True)
        moved += num_layers * RowCase("", tokens, config.intermediate_size).gated_bytes(dtype)
        moved += 2 * tokens * config.hidden_size * dtype.itemsize
        total[ELEMENTWISE] += 1e-6 * moved / limits.copy_rate()
        flops, moved = _head_work(model, tokens, len(lengths), dtype)
        total[HEAD] += max(1e-9 * flops / limits.matrix_rate(dtype), 1e-6 * moved / limits.copy_rate())
    return total | {OTHER: None}


def _head_work(model: NVEmbedModel, tokens: int, texts: int, dtype: torch.dtype) -> tuple[int, int]:
    """(operations, bytes that must be moved) of the latent head."""
    head, width = model.head, model.config.hidden_size
    assert isinstance(head, LatentHead)
    config = head.config
    latents, heads, head_width = config.num_latents_value, config.num_cross_heads, config.cross_dim_head
    case = LatentCase("", tokens, latents, heads, head_width, width)
    up, down = head.ff_up.weight.numel(), head.ff_down.weight.numel()
    if head.form() == "absorbed":
        flops, weights = case.absorbed_flops(), 2 * heads * latents * width
    else:
        projections = head.to_q.weight.numel() + head.to_out.weight.numel()
        flops = case.direct_flops() + 2 * tokens * projections
        weights = projections + 2 * heads * latents * head_width
    flops += 2 * tokens * up + 2 * texts * down
    return flops, dtype.itemsize * (weights + up + down + tokens * width) + 4 * texts * width


def share(limit: float | None, ms: float) -> float | None:
    """limit / ms, or None without a limit and for a category that took no time."""
    return None if limit is None or ms == 0 else limit / ms


def table(parts: dict[str, float], limits: dict[str, float | None]) -> str:
    """One line per category, and their sum."""
    step, bound = sum(parts.values()), sum(limit or 0.0 for limit in limits.values())
    lines = [f"{'':14}{'ms':>10}{'of step':>10}{'limit ms':>10}{'limit/ms':>10}"]
    for name, ms, limit in [*((c, parts[c], limits[c]) for c in CATEGORIES), (STEP, step, bound)]:
        part = share(limit, ms)
        lines.append(
            f"{name:14}{ms:10.3f}{ms / step:10.1%}"
            f"{'-' if limit is None else format(limit, '.3f'):>10}"
            f"{'-' if part is None else format(part, '.2f'):>10}"
        )
    return "\n".join(lines)


def _wall_times(step: Step) -> Times:
    """Of STEPS steps without profiler and marks. The step waits for the device."""
    taken = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        taken.append(1e3 * (time.perf_counter() - start))
    return Times(tuple(taken))


def _batches(lengths: np.ndarray, texts: int | None, budget: int) -> list[list[int]]:
    """Lengths of the texts of each batch of a step: the first `texts`, or as many as fill one batch."""
    if texts is None:
        texts = max(1, int(np.searchsorted(lengths.cumsum(), budget, side="right")))
    taken = lengths[:texts].tolist()
    return [[taken[index] for index in batch] for batch in token_budget_batches(taken, budget)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.profiling",
        description="Where the time of the encoder goes, each part beside its limit: a table, waterfall.png "
        "and trace.json.gz, which https://ui.perfetto.dev opens. The NV-Embed-v2 shape on a GPU, a small "
        "decoder without one.",
        epilog="examples:\n"
        "  python -m bench.profiling\n"
        "  python -m bench.profiling --workload skewed -o profile/skewed\n"
        "  python -m bench.profiling --workload 'one query'\n"
        "  python -m bench.profiling --layers 2 --texts 2       in seconds",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workload", choices=WORKLOADS, default="all 512", help="tokens per text (default: %(default)s)"
    )
    parser.add_argument(
        "--texts",
        type=int,
        help="texts in a step (default: as fill {cuda} tokens, {cpu} on a CPU)".format(**BATCH_TOKENS),
    )
    parser.add_argument(
        "--layers", type=int, help="layers of the model (default: 32 of 32, 4 of 30 on a CPU)"
    )
    parser.add_argument(
        "-o",
        dest="folder",
        type=Path,
        metavar="FOLDER",
        default=FOLDER / "profile",
        help="for picture and trace (default: bench/results/profile)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE.csv",
        help="rows go here (default: bench/results/<gpu>-<date>.csv)",
    )
    parser.add_argument("--commit", metavar="ID", help="the commit under test, where there is no git to ask")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    all_layers = SCALES[device].config.text_config.num_hidden_layers
    layers = LAYERS[device] if args.layers is None else args.layers
    workload = WORKLOADS[args.workload]
    lengths, instruction = np.array(workload.lengths), workload.instruction_length
    for name, value, bound in (("--layers", layers, all_layers), ("--texts", args.texts, len(lengths))):
        if value is not None and not 1 <= value <= bound:
            parser.error(f"{name} must be from 1 to {bound}, got {value}")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the picture needs the package matplotlib: pip install -e '.[bench]'")

    here = machine(args.commit)
    try:
        results = ResultsFile(args.results or default_path(here), here)
        args.folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    warn_if_busy()
    case = args.workload
    case += f", {args.texts} {'text' if args.texts == 1 else 'texts'}" if args.texts else ""
    case += f", {layers} of {all_layers} layers" if layers < all_layers else ""
    batches = _batches(lengths, args.texts, BATCH_TOKENS[device])

    with tqdm(total=4, bar_format="{n_fmt}/{total_fmt} {desc} [{elapsed}]") as progress:
        progress.set_description_str(f"build {layers} layers")
        model = build_model(device, layers)
        step = make_step(model, batches, instruction)
        progress.update()
        progress.set_description_str("warm up and time the step")
        step()
        times = _wall_times(step)
        progress.update()
        progress.set_description_str("record the trace")
        trace = args.folder / "trace.json.gz"
        record(model, step, trace)
        with gzip.open(trace) as file:
            steps = attribute(json.load(file)["traceEvents"], device)
        # the step of median length: medians of the parts would not sum to a step
        parts = sorted(steps, key=lambda step_parts: sum(step_parts.values()))[len(steps) // 2]
        progress.update()
        progress.set_description_str("measure the limits")
        limits = limits_ms(model, batches, Limits(device, LIMIT_SECONDS))
        progress.update()

    dtype = str(DTYPES[device]).removeprefix("torch.")
    on = f"{dtype}, {results.machine.gpu}"
    print(f"{case}: {sum(map(len, batches))} texts, {sum(map(sum, batches))} tokens, {on}")
    print(table(parts, limits))
    print(f"without the profiler a step takes {times.median:.3f} ms (median of {STEPS}, wall time)")
    print(f"products alone take {limits[PRODUCTS] / times.median:.2f} of that")
    if sum(parts.values()) > 1.5 * times.median or times.median > 1.5 * sum(parts.values()):
        print("with the profiler it took another time altogether: run again with nothing beside it")
    if any(limits[name] and limits[name] > 1.05 * parts[name] for name in CATEGORIES):
        print("a limit lies above its time, so it is none: run again with nothing beside it")
    figures = [
        Figure(SUITE, case, OURS, f"time:{name}", ms, "ms", share(limits[name], ms))
        for name, ms in parts.items()
    ]
    bound = sum(filter(None, limits.values()))
    figures.append(Figure(SUITE, case, OURS, "time_p50", times.median, "ms", bound / times.median))
    results.add(figures)
    print(f"added {len(figures)} rows to {results.path}")
    picture = args.folder / "waterfall.png"
    by_metric = {figure.metric: figure for figure in figures}
    draw_waterfall([Comparison(SUITE, case, {}, {OURS: by_metric})]).savefig(picture)
    print(f"wrote {picture} and {trace}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nStopped: nothing was added to the results.")
        sys.exit(130)
