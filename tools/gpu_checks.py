"""Checks that only a GPU can make and that are no tests: they repeat for minutes, or show a known fault.

    python3 -m tools.gpu_checks environment          versions and devices
    python3 -m tools.gpu_checks repeats STEM         200 runs of each operation and its backward, bit for bit
    python3 -m tools.gpu_checks replays              200 replays of each CUDA graph, bit for bit
    python3 -m tools.gpu_checks threads [--streams]  CUDA graphs called by two threads at once
    python3 -m tools.gpu_checks kept                 two streams at once read what a new model has just made

A kernel that reads shared memory before it is written gives other bits now and then. One green parity run
does not show that. Many equal runs do.
"""

import argparse
import contextlib
import copy
import functools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from bench.workloads import IMPLS
from nvembed_fast import ops
from nvembed_fast.config import BackboneConfig, LatentConfig, NVEmbedConfig
from nvembed_fast.graphs import SingleTextGraphs, bucket_of
from nvembed_fast.kernels import testing
from nvembed_fast.kernels.testing import as_tuple, gradients, upstream_of
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.packing import PackedBatch

EPS = 1e-5
IMPL = IMPLS["cuda"]  # "auto" would check the library in the place of an unproven kernel
LENGTHS = (9, 30, 50, 100, 200)  # a bucket each
STEMS = (
    "absorbed_latent_attention",
    "flash_attention",
    "gated",
    "latent_attention",
    "masked_lse",
    "mean_pool",
    "rms_norm",
    "rotary",
)
Problem = tuple[str, Callable, Sequence[torch.Tensor]]  # label, operation, its tensors


def problems(stem: str, device: str, dtype: torch.dtype, smallest: bool = False) -> Iterator[Problem]:
    """The operations of a kernel file at the sizes of the real model, or small ones."""

    def cases(all_cases: tuple, *names: str) -> list:
        small = testing.small(all_cases)
        return small[1:3] if smallest else [case for case in all_cases if case.name in names]

    match stem:
        case "flash_attention":
            for case in cases(testing.ATTENTION_CASES, "nvembed-32x512", "nvembed-4x4096"):
                *qkv, layout = case.inputs(device, dtype)
                yield f"{stem} {case.name}", functools.partial(ops.flash_attention, layout=layout), qkv
        case "latent_attention":
            # wide heads are the library's products
            for case in cases(testing.LATENT_CASES, "smollm2-16k"):
                yield f"{stem} {case.name}", ops.latent_attention, case.direct_inputs(device, dtype)
        case "absorbed_latent_attention":
            for case in cases(testing.LATENT_CASES, "nvembed-16k"):
                *tensors, heads = case.absorbed_inputs(device, dtype)
                absorbed = functools.partial(ops.absorbed_latent_attention, num_heads=heads)
                yield f"{stem} {case.name}", absorbed, tensors
        case "masked_lse":
            for case in cases(testing.SCORE_CASES, "nvembed-8k"):
                q, d, *masks = case.inputs(device, dtype)
                lse = lambda q, d, masks=masks: ops.masked_lse(q, d, *masks)[0]  # noqa: E731
                yield f"{stem} {case.name}", lse, (q, d)
        case "mean_pool":
            for case in cases(testing.POOL_CASES, "nvembed-32x512", "nvembed-1x16384", "nvembed-32x512-mlp"):
                geglu = case.name.endswith("mlp")
                x, layout, mask = case.inputs(device, dtype, geglu=geglu)
                pool = ops.mean_pool_geglu if geglu else ops.mean_pool
                yield f"{stem} {case.name}", functools.partial(pool, layout=layout, pool_mask=mask), [x]
        case "rms_norm":
            for case in cases(testing.NORM_CASES, "nvembed-16k"):
                x, residual, weight = case.norm_inputs(device, dtype)
                add = functools.partial(ops.add_rms_norm, eps=EPS)
                yield f"add_rms_norm {case.name}", add, (x, residual, weight)
                yield f"rms_norm {case.name}", functools.partial(ops.rms_norm, eps=EPS), (x, weight)
        case "rotary":
            for case in cases(testing.ROTARY_CASES, "nvembed-32x512"):
                qkv, cos, sin, positions, rotated = case.inputs(device, dtype)
                turn = functools.partial(
                    ops.rotary, cos=cos, sin=sin, positions=positions, num_rotated=rotated
                )
                yield f"{stem} {case.name}", turn, [qkv]
        case "gated":
            for case in cases(testing.GATED_CASES, "nvembed-16k"):
                x = case.gated_input(device, dtype)
                yield f"swiglu {case.name}", ops.swiglu, [x]
                yield f"geglu {case.name}", ops.geglu, [x]


def unequal_runs(operation: Callable, tensors: Sequence[torch.Tensor], repeats: int) -> int:
    """How many of the runs gave other bits than the first, in an output or in a gradient."""
    with torch.no_grad():
        upstream = upstream_of(as_tuple(operation(*tensors)))

    def run() -> list[torch.Tensor]:
        outputs, grads = gradients(operation, tensors, upstream)
        return [*outputs, *grads]

    first, unequal = run(), 0
    for _ in range(repeats - 1):
        # on the device: one bit comes back
        same = torch.stack([(a == b).all() for a, b in zip(run(), first, strict=True)]).all()
        unequal += not same
    return unequal


def repeats(stem: str, count: int, device: str, dtype: torch.dtype, smallest: bool = False) -> int:
    """Print a line for each operation. Returns the number of those whose bits changed."""
    red = 0
    with ops.use_impl(IMPL), testing.drawn_on(device):
        for label, operation, tensors in problems(stem, device, dtype, smallest):
            unequal = unequal_runs(operation, tensors, count)
            red += unequal > 0
            print(f"{label}: {unequal} of {count} runs differ from the first", flush=True)
    return red


def wrong_vectors(
    encode: Callable[[np.ndarray], torch.Tensor],
    texts: Sequence[np.ndarray],
    count: int,
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    wanted: Sequence[torch.Tensor] | None = None,
) -> int:
    """How many of `count` vectors per text are not the ones that the text gets alone, or never came.

    One thread a text. With `wanted` nothing is encoded before the threads start.
    """
    if wanted is None:
        wanted = [encode(ids).clone() for ids in texts]
    wrong = [count] * len(texts)  # a thread that ends early leaves them so
    barrier = threading.Barrier(len(texts))

    def work(index: int) -> None:
        barrier.wait()
        with context():
            for _ in range(count):
                got = encode(texts[index])
                wrong[index] -= torch.allclose(got, wanted[index], rtol=0, atol=1e-3)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(wrong)


def unequal_replays(encode: Callable[[np.ndarray], torch.Tensor], lengths: Sequence[int], count: int) -> int:
    """How many vectors of a text are not its first one. Between two of them comes another text as long."""
    wrong = 0
    for length in lengths:
        ids, others = (np.random.default_rng(seed).integers(3, 32000, length) for seed in range(2))
        first, unequal = encode(ids).clone(), 0
        for _ in range(count):
            encode(others)
            unequal += not torch.equal(encode(ids), first)
        print(f"{length} tokens: {unequal} of {count} replays differ from the first", flush=True)
        wrong += unequal
    return wrong


def _by_kernels(graphs: SingleTextGraphs) -> Callable[[np.ndarray], torch.Tensor]:
    def encode(ids: np.ndarray) -> torch.Tensor:
        # threads do not share it
        with ops.use_impl(IMPL):
            return graphs(ids, 0)

    return encode


def _uncaptured(graphs: SingleTextGraphs, lengths: Sequence[int]) -> int:
    """How many graphs of texts so long are missing. Without one, equal bits show nothing of graphs."""
    missing = sorted({bucket_of(length) for length in lengths} - set(graphs.buckets))
    if missing:
        print(f"no graph of {', '.join(map(str, missing))} tokens was captured")
    return len(missing)


def replays(model: NVEmbedModel, count: int) -> int:
    """Returns the number of wrong vectors, and of graphs that are missing."""
    graphs = SingleTextGraphs(model)
    return unequal_replays(_by_kernels(graphs), LENGTHS, count) + _uncaptured(graphs, LENGTHS)


def small_model(dtype: torch.dtype) -> NVEmbedModel:
    """On the GPU: the real widths per head on few layers, weights drawn like a fresh model's."""
    text = BackboneConfig(
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    latent = LatentConfig(cross_dim_head=1024, hidden_dim=1024, latent_dim=1024)
    torch.manual_seed(0)
    model = NVEmbedModel(NVEmbedConfig(text, latent)).requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.normal_(0, 0.02)
    return model.to("cuda", dtype)


def threads(model: NVEmbedModel, streams: bool, count: int) -> int:
    """Two threads ask for the vectors of two texts of one bucket.

    Returns:
        The number of wrong ones, and 1 more if there is no graph.
    """
    graphs = SingleTextGraphs(model)
    texts = [np.random.default_rng(seed).integers(3, 32000, 50) for seed in range(2)]

    def context():
        return torch.cuda.stream(torch.cuda.Stream()) if streams else contextlib.nullcontext()

    wrong = wrong_vectors(_by_kernels(graphs), texts, count, context)
    where = "a stream each" if streams else "the same stream"
    print(f"two threads on {where}: {wrong} of {2 * count} vectors are wrong")
    return wrong + _uncaptured(graphs, [len(ids) for ids in texts])


def kept(model: NVEmbedModel, count: int, length: int = 2000) -> int:
    """Rotary tables, matrices of the latents and layouts: made by one thread, read by both at once.

    Returns:
        The number of wrong vectors.
    """
    device = next(model.parameters()).device
    vocabulary = model.config.text_config.vocab_size
    texts = [np.random.default_rng(seed).integers(3, vocabulary, length) for seed in range(2)]

    def encode(model: NVEmbedModel, ids: np.ndarray) -> torch.Tensor:
        # the operations, and with them the layouts that all calls share, are those of training
        with torch.enable_grad(), ops.use_impl(IMPLS[device.type]):
            return model(PackedBatch.from_ids([ids], [0], device)).detach()

    def context():
        on_gpu = device.type == "cuda"
        return torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext()

    model.embedding_model.norm.weight.requires_grad_(True)
    wanted, wrong = [encode(model, ids) for ids in texts], 0
    for _ in range(count):
        new = copy.deepcopy(model)  # it makes its own tables and matrices
        if device.type == "cuda":
            torch.cuda.synchronize()
        wrong += wrong_vectors(functools.partial(encode, new), texts, 2, context, wanted)
    print(f"two threads, a stream each, {count} new models: {wrong} of {4 * count} vectors are wrong")
    return wrong


def environment() -> int:
    import triton

    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        print(f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    with contextlib.suppress(OSError):
        subprocess.run(["nvidia-smi"], check=False)
    return 0 if torch.cuda.is_available() else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m tools.gpu_checks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checks = parser.add_subparsers(dest="check", required=True)
    checks.add_parser("environment")
    one = checks.add_parser("repeats")
    one.add_argument("stem", choices=STEMS)
    one.add_argument("--count", type=int, default=200, metavar="N", help="[%(default)s]")
    four = checks.add_parser("replays")
    four.add_argument("--count", type=int, default=200, metavar="N", help="[%(default)s]")
    two = checks.add_parser("threads")
    two.add_argument("--streams", action="store_true", help="a stream for each thread")
    two.add_argument("--count", type=int, default=3000, metavar="N", help="[%(default)s]")
    three = checks.add_parser("kept")
    three.add_argument("--count", type=int, default=100, metavar="N", help="[%(default)s]")
    args = parser.parse_args(argv)
    if args.check == "environment":
        return environment()
    if not torch.cuda.is_available():
        print("this check needs a CUDA GPU", file=sys.stderr)
        return 2
    if args.check == "repeats":
        return 1 if repeats(args.stem, args.count, "cuda", torch.bfloat16) else 0
    if args.check == "replays":
        return 1 if replays(small_model(torch.bfloat16), args.count) else 0
    if args.check == "kept":
        return 1 if kept(small_model(torch.float16), args.count) else 0
    return 1 if threads(small_model(torch.float16), args.streams, args.count) else 0


if __name__ == "__main__":
    sys.exit(main())
