"""What the compiler makes of every kernel on sm_80 and sm_90, and of a few on sm_100. Needs no GPU.

    python -m tools.resources [--only STEM] [--update] [--json FILE]
    python -m tools.resources --capability 86 120 [--rows NAME ...]

1. The examples below call the kernels' own functions at the shapes of
   NV-Embed-v2, with tensors on the meta device. Every launch is recorded in
   place of being run, so the launches themselves are compiled.
2. Triton compiles each recorded launch as it would on that GPU, and the binary
   is read: registers, stack bytes, local loads and stores (spills), shared
   memory, wgmma, mma, tcgen05 and TMA instructions and the widest global load.
   `unbarred`, `touched`, `overlap` and `mixed` are facts of `tools/sass.py`
   about the order of the instructions.

A kernel beyond the shared memory of its GPU always fails, and so does one beyond MAX_REGISTERS or with
`mixed` operands. Where
`resource_snapshots/triton-<version>.json` exists for the running Triton, a row
that got worse fails too. With any other version, for other GPUs and for a choice
of rows the table is only printed.

To add a kernel file `kernels/<stem>.py`: write a generator of `Example`s below and
name it in EXAMPLES. Then run `--only <stem> --update` under each Triton that has
a snapshot.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from nvembed_fast import files
from nvembed_fast.kernels import (
    _common,
    absorbed_latent_attention,
    flash_attention,
    gated,
    latent_attention,
    masked_lse,
    mean_pool,
    rms_norm,
    rotary,
    tuned,
)
from nvembed_fast.kernels.layout import SeqLayout
from tools import sass

SNAPSHOTS = Path(__file__).parent / "resource_snapshots"
# bytes that one program may take
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# they wait for memory, and hide that behind 1024 threads on an SM. One register more leaves 512 of rms_norm's
MAX_REGISTERS = {"mean_pool": 64, "rms_norm": 64}
# both halves of a GEGLU and its slope at once: it was never below
WIDER = "mean_pool: mean_pool_geglu backward"
TARGETS = (80, 90)  # those of the snapshots, beside the rows ON_SM_100
# it takes the tiles of sm_90: one row of each kernel that loads by descriptors
ON_SM_100 = (
    *(f"flash_attention: {kernel} bf16" for kernel in ("forward", "forward causal", "dq", "dkv")),
    *(f"latent_attention: direct 64 {kernel}bf16" for kernel in ("", "dq ", "dkv ")),
    *(f"absorbed_latent_attention: weights 512 {kernel}bf16" for kernel in ("", "backward ")),
)
# of the tuner, which tries it there alone
ON_SM_90 = ("flash_attention: forward persistent bf16",)
COLUMNS = (
    *("registers", "stack", "spills", "shared", "wgmma", "mma", "tcgen05", "tma", "load_bytes"),
    *("unbarred", "touched", "overlap", "mixed"),
)
LOWER_IS_BETTER = ("registers", "stack", "spills", "shared", "unbarred", "touched", "mixed")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# NV-Embed-v2: model width, query heads, key/value heads, head width, latents, latent heads, MLP widths
WIDTH, HEADS, KV_HEADS, HEAD_WIDTH = 4096, 32, 8, 128
GROUP = HEADS // KV_HEADS
LATENTS, LATENT_HEADS, SWIGLU_WIDTH, GEGLU_WIDTH = 512, 8, 14336, 16384
TOKENS = 4096
ROWS = 512  # of the loss, against TOKENS columns

Figures = dict[str, int]  # column -> value
Row = dict[str, Any]  # name, kernel and capability beside the figures


class Example(NamedTuple):
    """A launch that becomes a row.

    Attributes:
        name: unique inside its stem: the variant and the dtype.
        kernel: "bwd_dq" for `_<stem>_bwd_dq_kernel`.
        call: launches the kernel once, and maybe others beside it.
    """

    name: str
    kernel: str
    call: Callable[[], object]


class Launch(NamedTuple):
    """A `@triton.jit` function and all that a launcher passes to it, by name."""

    kernel: Any
    arguments: dict[str, Any]


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _absorbed_latent_attention() -> Iterator[Example]:
    m = absorbed_latent_attention
    for num_latents in (LATENTS, m.MAX_LATENTS):
        for name, dtype in DTYPES.items():
            x, dout = (_empty(TOKENS, WIDTH, dtype=dtype) for _ in range(2))
            a, b = (_empty(LATENT_HEADS * num_latents, WIDTH, dtype=dtype) for _ in range(2))
            p = _empty(TOKENS, len(a), dtype=dtype)
            forward = partial(m._launch_fwd, x, a, LATENT_HEADS)
            backward = partial(m._launch_bwd, p, b, dout, LATENT_HEADS)
            yield Example(f"weights {num_latents} {name}", "fwd", forward)
            yield Example(f"weights {num_latents} backward {name}", "bwd", backward)


def _flash_attention() -> Iterator[Example]:
    m, both, bf16 = flash_attention, ("fwd", "bwd"), ("bf16",)
    # title, dtypes, head width, query heads per key/value head, tokens of the longest text, passes
    for title, dtypes, width, group, length, passes in (
        ("", DTYPES, HEAD_WIDTH, GROUP, TOKENS, both),
        (" causal", bf16, HEAD_WIDTH, GROUP, TOKENS, both),
        (" unaligned", bf16, HEAD_WIDTH, GROUP, TOKENS, both),
        (" 64 tokens", bf16, HEAD_WIDTH, GROUP, 64, both),
        (" 16 tokens", bf16, HEAD_WIDTH, GROUP, 16, ("fwd",)),
        (" width 16", bf16, 16, 1, TOKENS, both),
        (" width 32", bf16, 32, 1, TOKENS, both),
        (" smollm2", ("bf16", "fp32"), 64, 3, TOKENS, both),
        (" width 80", bf16, 80, 1, TOKENS, ("fwd",)),
        (" width 80 group 4", bf16, 80, GROUP, TOKENS, ("bwd",)),  # by the entries of tuned.toml
        (" width 256", ("bf16", "fp32"), 256, 1, TOKENS, both),
        (" largest group", ("bf16", "fp32"), 256, 16, TOKENS, ("bwd",)),
    ):
        heads, causal, layout = KV_HEADS * group, title == " causal", SeqLayout((length,), "meta")
        # a column and a head more: no stride is a multiple of 16
        padding = 1 if title == " unaligned" else 0
        for name in dtypes:
            dtype = DTYPES[name]
            qkv = _empty(length, heads + 2 * KV_HEADS + padding, width + padding, dtype=dtype)[..., :width]
            q, k, v = qkv[:, : heads + 2 * KV_HEADS].split((heads, KV_HEADS, KV_HEADS), 1)
            if "fwd" in passes:
                forward = partial(m.flash_attention, q, k, v, layout, causal=causal)
                yield Example(f"forward{title} {name}", "fwd", forward)
                if not title and name == "bf16":
                    yield Example("forward persistent bf16", "fwd", partial(_persistent, forward))
            if "bwd" in passes:
                out, lse2 = (
                    _empty(length, heads, width, dtype=dtype),
                    _empty(heads, length, dtype=torch.float32),
                )
                dout = _empty(length, heads + padding, width + padding, dtype=dtype)[:, :heads, :width]
                needs = (True, True, True)
                call = partial(m._launch_bwd, q, k, v, out, lse2, dout, None, layout, 1.0, causal, needs)
                yield Example(f"dq{title} {name}", "bwd_dq", call)
                yield Example(f"dkv{title} {name}", "bwd_dkv", call)
                if not title:
                    yield Example(f"delta {name}", "bwd_delta", call)


def _persistent(attention: Callable[[], object]) -> None:
    shape_class = f"width{HEAD_WIDTH}-group{GROUP}-bits16-longest128"
    with tuned.use({("flash_attention.fwd", 90, shape_class): {"AHEAD": True, "PERSISTENT": True}}):
        attention()


def _gated() -> Iterator[Example]:
    for op, width in ((gated.swiglu, SWIGLU_WIDTH), (gated.geglu, GEGLU_WIDTH)):
        for name, dtype in DTYPES.items():
            x, dout = _empty(TOKENS, 2 * width, dtype=dtype), _empty(TOKENS, width, dtype=dtype)
            backward = partial(gated._launch_bwd, x, dout, op is gated.swiglu)
            yield Example(f"{op.__name__} {name}", "fwd", partial(op, x))
            yield Example(f"{op.__name__} backward {name}", "bwd", backward)


def _latent_attention() -> Iterator[Example]:
    m = latent_attention
    for width in (64, 128, 256):
        for name, dtype in DTYPES.items():
            q, out, dout = (_empty(TOKENS, LATENT_HEADS, width, dtype=dtype) for _ in range(3))
            k, v = _empty(LATENTS, 2, LATENT_HEADS, width, dtype=dtype).unbind(1)
            lse, delta = (_empty(LATENT_HEADS, TOKENS, dtype=torch.float32) for _ in range(2))
            for title, kernel, call in (
                ("", "fwd", partial(m.latent_attention, q, k, v)),
                ("lse ", "fwd", partial(m._launch_fwd, q, k, v, 1.0, with_lse=True)),
                ("dq ", "bwd_dq", partial(m._launch_bwd_dq, q, k, v, out, lse, dout, 1.0, True)),
                ("delta ", "bwd_dq", partial(m._launch_bwd_dq, q, k, v, out, lse, dout, 1.0, False)),
                ("dkv ", "bwd_dkv", partial(m._launch_bwd_dkv, q, k, v, lse, delta, dout, 1.0, True, True)),
            ):
                yield Example(f"direct {width} {title}{name}", kernel, call)


def _masked_lse() -> Iterator[Example]:
    m = masked_lse
    ids = partial(_empty, dtype=torch.int64)
    masks = ids(ROWS, 1), ids(TOKENS, 2), ids(ROWS, 8), ids(TOKENS, 1)
    for title, limits in (("", None), (" limited", _empty(ROWS, dtype=torch.float32))):
        for name, dtype in DTYPES.items():
            q, d = _empty(ROWS, WIDTH, dtype=dtype), _empty(TOKENS, WIDTH, dtype=dtype)
            lse = _empty(ROWS, dtype=torch.float32)
            forward = partial(m.masked_lse, q, d, *masks, limits, 50.0)
            backward = partial(m._launch_bwd, q, d, *masks, limits, lse, lse, 50.0, True, True)
            yield Example(f"forward{title} {name}", "fwd", forward)
            yield Example(f"backward{title} {name}", "bwd", backward)
    yield Example("combine", "fwd_combine", forward)


def _mean_pool() -> Iterator[Example]:
    layout, mask = SeqLayout((TOKENS,), "meta"), _empty(TOKENS, dtype=torch.bool)
    for op, width in ((mean_pool.mean_pool, WIDTH), (mean_pool.mean_pool_geglu, GEGLU_WIDTH)):
        geglu = op is mean_pool.mean_pool_geglu
        for name, dtype in DTYPES.items():
            x = _empty(TOKENS, 2 * width if geglu else width, dtype=dtype)
            dout = _empty(1, width, dtype=torch.float32)
            backward = partial(mean_pool._launch_bwd, x if geglu else None, dout, layout, mask, dtype)
            yield Example(f"{op.__name__} {name}", "fwd", partial(op, x, layout, mask))
            yield Example(f"{op.__name__} backward {name}", "bwd", backward)
    # of partial sums in fp32, whatever the dtype
    x = _empty(TOKENS, WIDTH, dtype=torch.bfloat16)
    yield Example("combine", "fwd_combine", partial(mean_pool.mean_pool, x, layout, mask))


def _rms_norm() -> Iterator[Example]:
    m, eps = rms_norm, 1e-5
    for name, dtype in DTYPES.items():
        x, residual, dy, dh_out = (_empty(TOKENS, WIDTH, dtype=dtype) for _ in range(4))
        weight = _empty(WIDTH, dtype=dtype)
        backward = partial(m._launch_bwd, x, weight, dy, dh_out, eps, True)
        yield Example(f"rms_norm {name}", "fwd", partial(m.rms_norm, x, weight, eps))
        yield Example(f"add_rms_norm {name}", "fwd", partial(m.add_rms_norm, x, residual, weight, eps))
        yield Example(f"backward {name}", "bwd", partial(backward, True))
        yield Example(f"backward, weight frozen {name}", "bwd", partial(backward, False))
        if name == "bf16":
            yield Example(f"dweight {name}", "bwd_dweight", partial(backward, True))


def _rotary() -> Iterator[Example]:
    rotated = HEADS + KV_HEADS
    positions = SeqLayout((TOKENS,), "meta").positions
    for name, dtype in DTYPES.items():
        qkv = _empty(TOKENS, rotated + KV_HEADS, HEAD_WIDTH, dtype=dtype)
        cos, sin = (_empty(TOKENS, HEAD_WIDTH // 2, dtype=torch.float32) for _ in range(2))
        args = (qkv, cos, sin, positions, rotated)
        yield Example(f"in place {name}", "fwd", partial(rotary.rotary, *args, inplace=True))
        yield Example(f"copy {name}", "fwd", partial(rotary.rotary, *args))
        yield Example(f"backward {name}", "fwd", partial(rotary._launch_fwd, *args, inverse=True))


EXAMPLES = {
    "absorbed_latent_attention": _absorbed_latent_attention,
    "flash_attention": _flash_attention,
    "gated": _gated,
    "latent_attention": _latent_attention,
    "masked_lse": _masked_lse,
    "mean_pool": _mean_pool,
    "rms_norm": _rms_norm,
    "rotary": _rotary,
}


def examples(only: str | None = None) -> dict[str, Example]:
    """{"stem: name": example} of every kernel file, or of one."""
    if only is not None and only not in EXAMPLES:
        raise SystemExit(f"--only must be one of {', '.join(EXAMPLES)}, got {only}")
    found = [(stem, example) for stem in ([only] if only else EXAMPLES) for example in EXAMPLES[stem]()]
    named = {f"{stem}: {example.name}": example for stem, example in found}
    assert len(named) == len(found), "two examples have one name"
    return named


def record(call: Callable[[], object], capability: int) -> list[Launch]:
    """The launches of a call, none of which runs. Tensors on the meta device lie on a such a GPU."""
    from triton.runtime.jit import KernelInterface

    launches: list[Launch] = []

    def launcher(kernel, grid):
        return lambda **arguments: launches.append(Launch(kernel, arguments))

    with (
        mock.patch.object(KernelInterface, "__getitem__", launcher),
        mock.patch.object(_common, "cuda_capability", lambda index: capability),
    ):
        call()
    return launches


def launch_of(name: str, capability: int) -> Launch:
    """The launch of a row, by its "stem: name"."""
    stem = name.split(":")[0]
    example = examples(stem)[name]
    kernel = f"_{stem}_{example.kernel}_kernel"
    (launch,) = [x for x in record(example.call, capability) if x.kernel.__name__ == kernel]
    return launch


class _Driver(NamedTuple):
    """All that Triton asks of a driver before it compiles a launch."""

    capability: int

    def get_current_device(self) -> int:
        return self.capability  # a kernel keeps its binaries by device

    def get_current_stream(self, device: int) -> None:
        return None

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def compiled(launch: Launch, capability: int) -> Figures:
    """What Triton makes of a launch. In a process of its own: no kernel can run there afterwards."""
    import triton

    triton.runtime.driver.set_active(_Driver(capability))
    binary = launch.kernel.warmup(grid=None, **launch.arguments)
    return _read_cubin(binary.asm["cubin"]) | {"shared": binary.metadata.shared}


def _read_cubin(cubin: bytes) -> Figures:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    env = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}  # it calls nvdisasm

    def dump(flag: str, path: str) -> str:
        command = [str(tools / "cuobjdump"), flag, path]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        usage, listing = dump("-res-usage", path), dump("-sass", path)
    return {
        "registers": int(re.search(r"\bREG:(\d+)", usage)[1]),
        "stack": int(re.search(r"\bSTACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", listing)),
        "wgmma": len(re.findall(r"\bHGMMA\b", listing)),
        "mma": len(re.findall(r"\bHMMA\b", listing)),
        "tcgen05": len(re.findall(r"\bUTC\w*MMA\b", listing)),
        "tma": len(re.findall(r"\bUTMA(?:LDG|STG|REDG)\b", listing)),
        "load_bytes": max(map(_load_bytes, re.findall(r"\b(?:LDG|LDGSTS)(\.[\w.]+)", listing)), default=0),
        **sass.facts(listing)._asdict(),
    }


def _load_bytes(modifiers: str) -> int:
    parts = modifiers.split(".")
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[p] for p in parts if p in widths), 4)


def _row(capability: int, name: str) -> Row:
    launch = launch_of(name, capability)
    kernel = {"name": name, "kernel": launch.kernel.__name__, "capability": capability}
    return kernel | compiled(launch, capability)


def measure(
    only: str | None,
    capabilities: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    num_workers: int = 2,
) -> list[Row]:
    """The rows of every kernel, or of those `names` ("stem: name") alone.

    Args:
        capabilities: None means TARGETS, and without `names` also ON_SM_100.
    """
    known = list(examples(only))
    if unknown := set(names or ()) - set(known):
        raise SystemExit(f"no rows of these names: {', '.join(sorted(unknown))}")
    jobs = [(capability, name) for capability in capabilities or TARGETS for name in names or known]
    jobs = [(capability, name) for capability, name in jobs if capability == 90 or name not in ON_SM_90]
    if not jobs:
        raise SystemExit(f"sm_90 alone has {', '.join(ON_SM_90)}: --capability 90")
    if not capabilities and not names:
        jobs += [(100, name) for name in ON_SM_100 if name in known]
    spawn = multiprocessing.get_context("spawn")
    workers = min(num_workers, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        return list(pool.map(_row, *zip(*jobs, strict=True)))


def labelled(rows: Sequence[Row]) -> dict[str, Figures]:
    """{"stem: name sm_80": figures}, as in the snapshots."""
    return {f"{row['name']} sm_{row['capability']}": {c: row[c] for c in COLUMNS} for row in rows}


def beyond_limits(rows: dict[str, Figures]) -> list[str]:
    """One line per row that cannot run, may compute something else, or takes more than MAX_REGISTERS."""
    problems = []
    for name, row in rows.items():
        if row["shared"] > (limit := SHARED_LIMIT[int(name.rsplit("_", 1)[1])]):
            problems.append(f"{name}: {row['shared']} bytes of shared memory, the limit is {limit}")
        limit = MAX_REGISTERS.get(name.split(":")[0])
        if limit is not None and row["registers"] > limit and not name.startswith(WIDER):
            problems.append(f"{name}: {row['registers']} registers, the limit is {limit}")
        if row["mixed"]:
            problems.append(f"{name}: {row['mixed']} wgmma of mixed operands, so its results may be wrong")
    return problems


def worsened(rows: dict[str, Figures], snapshot: dict[str, Figures]) -> list[str]:
    """One line per figure that is worse than in the snapshot, and per row that only one of them has."""
    problems = [f"{name}: not in the snapshot" for name in rows if name not in snapshot]
    problems += [f"{name}: in the snapshot, but no kernel has it" for name in snapshot if name not in rows]
    for name in sorted(set(rows) & set(snapshot)):
        new, old = rows[name], snapshot[name]
        for column in COLUMNS:
            if column in LOWER_IS_BETTER:
                worse = new[column] > old[column]
            elif column == "load_bytes":
                worse = new[column] < old[column]
            else:  # how often an instruction stands in the code says little, whether it does says much
                worse = bool(old[column]) and not new[column]
            if worse:
                problems.append(f"{name}: {column} {old[column]} -> {new[column]}")
    return problems


def _of_stem(rows: dict[str, Figures], only: str | None) -> dict[str, Figures]:
    return {name: row for name, row in rows.items() if only is None or name.startswith(f"{only}: ")}


def _table(rows: dict[str, Figures]) -> str:
    width = max(map(len, rows))
    lines = [f"{'':{width}} " + " ".join(f"{c:>10}" for c in COLUMNS)]
    lines += [f"{name:{width}} " + " ".join(f"{row[c]:>10}" for c in COLUMNS) for name, row in rows.items()]
    return "\n".join(lines)


def _write(path: Path, rows: dict[str, Figures]) -> None:
    body = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
    with files.replacing(path) as scratch:
        scratch.write_text(f"{{\n{body}\n}}\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="STEM", help="one kernel file, such as flash_attention")
    parser.add_argument("--update", action="store_true", help="rewrite the snapshot of the running Triton")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write a list of the rows there")
    parser.add_argument("--capability", type=int, nargs="+", choices=SHARED_LIMIT, help="other GPUs")
    parser.add_argument("--rows", metavar="NAME", nargs="+", help='these alone, such as "rotary: copy bf16"')
    args = parser.parse_args(argv)
    partial = bool(args.capability or args.rows)
    if args.update and partial:
        parser.error("--update keeps all rows of the snapshots: no --capability, no --rows")
    if os.environ.get("TRITON_INTERPRET"):
        # read at the first `import triton`, where @triton.jit becomes the interpreter's or the compiler's
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "tools.resources", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=env).returncode
    import triton

    measured = measure(args.only, args.capability, args.rows)
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1) + "\n")
    rows = labelled(measured)
    sys.stdout.write(_table(rows) + "\n")
    problems = beyond_limits(rows)
    path = SNAPSHOTS / f"triton-{triton.__version__}.json"
    snapshot = json.loads(path.read_text()) if path.exists() else {}
    if args.update:
        others = {name: row for name, row in snapshot.items() if name not in _of_stem(snapshot, args.only)}
        _write(path, others | rows)
        verdict = f"wrote {path.name}"
    elif partial:
        verdict = "printed only"
    elif path.exists():
        problems += worsened(rows, _of_stem(snapshot, args.only))
        verdict = f"compared with {path.name}"
    else:
        verdict = f"no snapshot for Triton {triton.__version__}: printed only"
    sys.stdout.write("".join(f"WORSE {p}\n" for p in problems))
    sys.stdout.write(f"{len(rows)} rows, {verdict}, {len(problems)} problems\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
