"""What the compiler makes of every kernel on sm_80 and sm_90; needs no GPU.

    python -m tools.resources [--only STEM] [--update] [--json FILE]
    python -m tools.resources --capability 86 120 [--rows NAME ...]

Every kernel is compiled in its shipped configurations at the shapes of
NV-Embed-v2. A row shows registers, stack bytes, local loads and stores
(spills), shared memory against the limit, wgmma, mma and TMA instructions and
the widest global load. A kernel beyond the shared memory of its GPU always
fails. Where `resource_snapshots/triton-<version>.json` exists for the running
Triton, a row that got worse fails too; with any other version the table is only
printed. So it is for other GPUs and for a choice of rows.

To add a kernel file `kernels/<stem>.py`: write a generator
`_<stem>_specs(capability)` below that yields one `CompileSpec` per shipped
configuration, with the constants read from the module's own `_launch_config`,
so that what is compiled is what is shipped. It is found by its name. Then run
`--only <stem> --update` under each Triton that has a snapshot.
"""

import argparse
import concurrent.futures
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed_fast import files

SNAPSHOTS = Path(__file__).parent / "resource_snapshots"
# bytes that one program may take
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
TARGETS = (80, 90)  # those of the snapshots
COLUMNS = ("registers", "stack", "spills", "shared", "wgmma", "mma", "tma", "load_bytes")
LOWER_IS_BETTER = ("registers", "stack", "spills", "shared")
OPTIONS = ("num_warps", "num_stages", "maxnreg")
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes
# NV-Embed-v2: model width, query heads, key/value heads, head width, latents, latent heads, MLP widths
WIDTH, HEADS, KV_HEADS, HEAD_WIDTH = 4096, 32, 8, 128
LATENTS, LATENT_HEADS, SWIGLU_WIDTH, GEGLU_WIDTH = 512, 8, 14336, 16384

Row = dict[str, int]


@dataclass(frozen=True)
class CompileSpec:
    """One kernel in one shipped configuration.

    Attributes:
        name: the row label, unique inside its stem: what differs, and the dtype.
        kernel: the `@triton.jit` function.
        arguments: run-time argument -> type: "*bf16", "fp32", "i32", or "i32:16" for an integer that is
            divisible by 16 (most strides). Pointers count as aligned to 16 bytes, as the launcher sees them.
        constexprs: compile-time argument -> value. A pointer that is None at launch belongs here, as None.
        options: num_warps, num_stages and what else the launch passes to the compiler.
    """

    name: str
    kernel: Any
    arguments: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]


def _kernels(stem: str):
    return importlib.import_module(f"nvembed_fast.kernels.{stem}")


def _split(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """(constexprs, options) of a `_launch_config`."""
    options = {k: v for k, v in config.items() if k in OPTIONS}
    return {k: v for k, v in config.items() if k not in OPTIONS}, options


def _collect(capability: int, only: str | None) -> dict[str, CompileSpec]:
    """{"stem: name": spec} of every `_<stem>_specs` in this file."""
    makers = {m[1]: fn for name, fn in globals().items() if (m := re.fullmatch(r"_(\w+)_specs", name))}
    if only is not None and only not in makers:
        raise SystemExit(f"--only must be one of {', '.join(sorted(makers))}, got {only}")
    specs = {}
    for stem in [only] if only else sorted(makers):
        for spec in makers[stem](capability):
            assert f"{stem}: {spec.name}" not in specs, f"two specs are called {stem}: {spec.name}"
            specs[f"{stem}: {spec.name}"] = spec
    return specs


def _compile(spec: CompileSpec, capability: int) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec.kernel.arg_names
    missing = set(names) - set(spec.arguments) - set(spec.constexprs)
    unknown = (set(spec.arguments) | set(spec.constexprs)) - set(names)
    assert not missing and not unknown, f"{spec.name}: missing {sorted(missing)}, unknown {sorted(unknown)}"
    signature = {n: spec.arguments[n].split(":")[0] if n in spec.arguments else "constexpr" for n in names}
    # the launcher tells the compiler the same: without it there is no TMA and no wide load
    aligned = [n for n, t in spec.arguments.items() if t.startswith("*") or t.endswith(":16")]
    compiled = triton.compile(
        ASTSource(
            fn=spec.kernel,
            signature=signature,
            constexprs={(names.index(n),): value for n, value in spec.constexprs.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={**spec.options, **_kernels("_common").COMPILE_OPTIONS},
    )
    return _read_cubin(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}


def _read_cubin(cubin: bytes) -> Row:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    env = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}  # it calls nvdisasm

    def dump(flag: str, path: str) -> str:
        command = [str(tools / "cuobjdump"), flag, path]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        usage, sass = dump("-res-usage", path), dump("-sass", path)
    return {
        "registers": int(re.search(r"\bREG:(\d+)", usage)[1]),
        "stack": int(re.search(r"\bSTACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "mma": len(re.findall(r"\bHMMA\b", sass)),
        "tma": len(re.findall(r"\bUTMA(?:LDG|STG|REDG)\b", sass)),
        "load_bytes": max(map(_load_bytes, re.findall(r"\b(?:LDG|LDGSTS)(\.[\w.]+)", sass)), default=0),
    }


def _load_bytes(modifiers: str) -> int:
    parts = modifiers.split(".")
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[p] for p in parts if p in widths), 4)


def _compile_named(capability: int, name: str) -> Row:
    return _compile(_collect(capability, name.split(":")[0])[name], capability)


def measure(
    only: str | None,
    capabilities: Sequence[int] = TARGETS,
    names: Sequence[str] | None = None,
    num_workers: int = 2,
) -> dict[str, Row]:
    """{"stem: name sm_80": row} of every kernel, or of those `names` ("stem: name") alone."""
    jobs = []
    for capability in capabilities:
        specs = _collect(capability, only)
        if unknown := set(names or ()) - set(specs):
            raise SystemExit(f"no rows of these names: {', '.join(sorted(unknown))}")
        jobs += [(capability, name) for name in (names or specs)]
    spawn = multiprocessing.get_context("spawn")
    workers = min(num_workers, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        rows = list(pool.map(_compile_named, *zip(*jobs, strict=True)))
    return {f"{name} sm_{capability}": row for (capability, name), row in zip(jobs, rows, strict=True)}


def beyond_limits(rows: dict[str, Row]) -> list[str]:
    """One line per row that does not fit the shared memory of its GPU."""
    return [
        f"{name}: {row['shared']} bytes of shared memory, the limit is {limit}"
        for name, row in rows.items()
        if row["shared"] > (limit := SHARED_LIMIT[int(name.rsplit("_", 1)[1])])
    ]


def worsened(rows: dict[str, Row], snapshot: dict[str, Row]) -> list[str]:
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


def _of_stem(rows: dict[str, Row], only: str | None) -> dict[str, Row]:
    return {name: row for name, row in rows.items() if only is None or name.startswith(f"{only}: ")}


def _table(rows: dict[str, Row]) -> str:
    width = max(map(len, rows))
    lines = [f"{'':{width}} " + " ".join(f"{c:>10}" for c in COLUMNS)]
    lines += [f"{name:{width}} " + " ".join(f"{row[c]:>10}" for c in COLUMNS) for name, row in rows.items()]
    return "\n".join(lines)


def _write(path: Path, rows: dict[str, Row]) -> None:
    ordered = {name: {c: rows[name][c] for c in COLUMNS} for name in sorted(rows)}
    body = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in ordered.items())
    with files.replacing(path) as scratch:
        scratch.write_text(f"{{\n{body}\n}}\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="STEM", help="one kernel file, such as flash_attention")
    parser.add_argument("--update", action="store_true", help="rewrite the snapshot of the running Triton")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows there")
    parser.add_argument("--capability", type=int, nargs="+", choices=SHARED_LIMIT, help="other GPUs")
    parser.add_argument("--rows", metavar="NAME", nargs="+", help='these alone, such as "rotary: copy bf16"')
    args = parser.parse_args(argv)
    partial = bool(args.capability or args.rows)
    if args.update and partial:
        parser.error("--update keeps all rows of both targets: no --capability, no --rows")
    if os.environ.get("TRITON_INTERPRET"):
        # read at the first `import triton`, which also decides what @triton.jit returns
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "tools.resources", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=env).returncode
    import triton

    rows = measure(args.only, args.capability or TARGETS, args.rows)
    sys.stdout.write(_table(rows) + "\n")
    if args.json:
        _write(args.json, rows)
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


# one generator per kernel file, in alphabetical order


def _flash_attention_specs(capability: int) -> Iterator[CompileSpec]:
    m, torch = _kernels("flash_attention"), importlib.import_module("torch")
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    group = HEADS // KV_HEADS
    for name, dtype, width, heads_per_key, max_length, causal, aligned in (
        ("forward", "bf16", HEAD_WIDTH, group, 4096, False, True),
        ("forward", "fp16", HEAD_WIDTH, group, 4096, False, True),
        ("forward", "fp32", HEAD_WIDTH, group, 4096, False, True),
        ("forward causal", "bf16", HEAD_WIDTH, group, 4096, True, True),
        ("forward unaligned", "bf16", HEAD_WIDTH, group, 4096, False, False),
        ("forward 64 tokens", "bf16", HEAD_WIDTH, group, 64, False, True),
        ("forward 16 tokens", "bf16", HEAD_WIDTH, group, 16, False, True),
        ("forward smollm2", "bf16", 64, 3, 4096, False, True),
        ("forward smollm2", "fp32", 64, 3, 4096, False, True),
        ("forward width 80", "bf16", 80, 1, 4096, False, True),
        ("forward width 256", "bf16", 256, 1, 4096, False, True),
        ("forward width 256", "fp32", 256, 1, 4096, False, True),
    ):
        config = m._launch_config(capability, width, heads_per_key, dtypes[dtype], max_length, aligned)
        constexprs, options = _split(config)
        constexprs |= {"GROUP": heads_per_key, "H": width, "CAUSAL": causal}
        constexprs["PRECISION"] = _kernels("_common").input_precision(dtypes[dtype])
        arguments = {f"{t}_ptr": f"*{dtype}" for t in ("q", "k", "v", "out")} | {"lse2_ptr": "*fp32"}
        arguments |= {f"{name}_ptr": "*i32" for name in ("tiles", "cu_seqlens")}
        stride = "i32:16" if aligned else "i32"
        arguments |= {f"stride_{s}": stride for s in ("qt", "qn", "kt", "kg", "vt", "vg", "ot", "on")}
        arguments |= {"stride_ln": "i32", "scale_log2": "fp32", "num_kv_heads": "i32"}
        yield CompileSpec(f"{name} {dtype}", m._flash_attention_fwd_kernel, arguments, constexprs, options)
    for name, dtype, width, heads_per_key, max_length, causal, aligned in (
        ("", "bf16", HEAD_WIDTH, group, 4096, False, True),
        ("", "fp16", HEAD_WIDTH, group, 4096, False, True),
        ("", "fp32", HEAD_WIDTH, group, 4096, False, True),
        (" causal", "bf16", HEAD_WIDTH, group, 4096, True, True),
        (" unaligned", "bf16", HEAD_WIDTH, group, 4096, False, False),
        (" 64 tokens", "bf16", HEAD_WIDTH, group, 64, False, True),
        (" smollm2", "bf16", 64, 3, 4096, False, True),
        (" smollm2", "fp32", 64, 3, 4096, False, True),
        (" width 256", "bf16", 256, 1, 4096, False, True),
        (" width 256", "fp32", 256, 1, 4096, False, True),
        (" largest group", "bf16", 256, 16, 4096, False, True),
        (" largest group", "fp32", 256, 16, 4096, False, True),
    ):
        for which, kernel, results in (
            ("dq", m._flash_attention_dq_kernel, ("dq",)),
            ("dkv", m._flash_attention_dkv_kernel, ("dk", "dv")),
        ):
            shape = (capability, width, heads_per_key, dtypes[dtype], max_length, aligned)
            constexprs, options = _split(m._bwd_launch_config(which, *shape))
            constexprs |= {"GROUP": heads_per_key, "H": width, "CAUSAL": causal}
            constexprs["PRECISION"] = _kernels("_common").input_precision(dtypes[dtype])
            constexprs |= {"NEEDS_DK": True, "NEEDS_DV": True} if which == "dkv" else {}
            arguments = {f"{t}_ptr": f"*{dtype}" for t in ("q", "k", "v", "dout", *results)}
            arguments |= {f"{t}_ptr": "*fp32" for t in ("lse2", "delta")}
            arguments |= {f"{t}_ptr": "*i32" for t in ("tiles", "cu_seqlens")}
            stride = "i32:16" if aligned else "i32"
            strides = ("qt", "qn", "kt", "kg", "vt", "vg", "dot", "don")
            arguments |= {f"stride_{s}": stride for s in strides}
            arguments |= {
                f"stride_{s}": "i32:16" for s in (("dqt", "dqn") if which == "dq" else ("dt", "dg"))
            }
            arguments |= {"stride_ln": "i32", "scale": "fp32", "scale_log2": "fp32", "num_kv_heads": "i32"}
            yield CompileSpec(f"{which}{name} {dtype}", kernel, arguments, constexprs, options)
    constexprs, options = _split(m._delta_launch_config(HEADS, HEAD_WIDTH))
    constexprs |= {"NUM_HEADS": HEADS, "H": HEAD_WIDTH, "HAS_DLSE2": False, "dlse2_ptr": None}
    for dtype in DTYPES:
        arguments = {"out_ptr": f"*{dtype}", "dout_ptr": f"*{dtype}", "delta_ptr": "*fp32"}
        arguments |= {f"stride_{s}": "i32:16" for s in ("ot", "on", "dot", "don")}
        arguments |= {"stride_en": "i32"}
        kernel = m._flash_attention_delta_kernel
        yield CompileSpec(f"delta {dtype}", kernel, arguments, constexprs, options)


def _gated_specs(capability: int) -> Iterator[CompileSpec]:
    m = _kernels("gated")
    for op, width in (("swiglu", SWIGLU_WIDTH), ("geglu", GEGLU_WIDTH)):
        constexprs, options = _split(m._launch_config(width))
        for dtype in DTYPES:
            shared = {"x_ptr": f"*{dtype}", "stride_xt": "i32:16", "num_tokens": "i32"}
            flags = constexprs | {"F": width, "GATE_FIRST": op == "swiglu"}
            arguments = shared | {"out_ptr": f"*{dtype}", "stride_ot": "i32:16"}
            yield CompileSpec(f"{op} {dtype}", m._gated_fwd_kernel, arguments, flags, options)
            arguments = shared | {f"{name}_ptr": f"*{dtype}" for name in ("dout", "dx")}
            arguments |= {f"stride_{name}": "i32:16" for name in ("dot", "dxt")}
            yield CompileSpec(f"{op} backward {dtype}", m._gated_bwd_kernel, arguments, flags, options)


def _latent_attention_specs(capability: int) -> Iterator[CompileSpec]:
    m = _kernels("latent_attention")
    torch, common = importlib.import_module("torch"), _kernels("_common")
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    precision = {name: common.input_precision(dtype) for name, dtype in dtypes.items()}
    for head_width in (64, 256):
        for dtype in DTYPES:
            itemsize = 4 if dtype == "fp32" else 2
            shape = {"N": LATENT_HEADS, "L": LATENTS, "H": head_width, "PRECISION": precision[dtype]}
            inputs = {f"{name}_ptr": f"*{dtype}" for name in ("q", "k", "v")}
            inputs |= {f"stride_{name}": "i32:16" for name in ("qt", "qn", "kl", "kn", "vl", "vn")}
            inputs |= {"lse_ptr": "*fp32", "num_tokens": "i32", "scale_log2": "fp32"}
            out = {"out_ptr": f"*{dtype}", "stride_ot": "i32:16", "stride_on": "i32:16"}
            dout = {"dout_ptr": f"*{dtype}", "stride_dot": "i32:16", "stride_don": "i32:16"}
            dout |= {"delta_ptr": "*fp32", "scale": "fp32"}
            constexprs, options = _split(m._launch_config(LATENTS, head_width, itemsize, capability))
            for with_lse in (False, True):
                name = f"direct {head_width} {'lse ' * with_lse}{dtype}"
                flags = constexprs | shape | {"WITH_LSE": with_lse}
                yield CompileSpec(name, m._latent_attention_fwd_kernel, inputs | out, flags, options)
            configs = m._bwd_launch_config(LATENTS, head_width, itemsize, capability)
            constexprs, options = _split(configs["dq"])
            arguments = inputs | out | dout | {"dq_ptr": f"*{dtype}"}
            for needs_dq in (True, False):
                name = f"direct {head_width} {'dq' if needs_dq else 'delta'} {dtype}"
                flags = constexprs | shape | {"NEEDS_DQ": needs_dq}
                yield CompileSpec(name, m._latent_attention_bwd_dq_kernel, arguments, flags, options)
            constexprs, options = _split(configs["dkv"])
            arguments = inputs | dout | {"dk_ptr": "*fp32", "dv_ptr": "*fp32"}
            flags = constexprs | shape | {"CHUNK": m.CHUNK, "NEEDS_DK": True, "NEEDS_DV": True}
            name = f"direct {head_width} dkv {dtype}"
            yield CompileSpec(name, m._latent_attention_bwd_dkv_kernel, arguments, flags, options)
    for num_latents in (LATENTS, m.MAX_LATENTS):
        for dtype in DTYPES:
            shape = {"D": WIDTH, "N": LATENT_HEADS, "L": num_latents, "PRECISION": precision[dtype]}
            problem = (num_latents, 4 if dtype == "fp32" else 2, capability)
            constexprs, options = _split(m._weights_launch_config(*problem))
            arguments = {f"{name}_ptr": f"*{dtype}" for name in ("x", "a", "p")}
            arguments |= {f"stride_{name}": "i32:16" for name in ("xt", "al")} | {"num_tokens": "i32"}
            name, kernel = f"weights {num_latents} {dtype}", m._latent_weights_fwd_kernel
            yield CompileSpec(name, kernel, arguments, constexprs | shape, options)
            constexprs, options = _split(m._weights_bwd_launch_config(*problem))
            arguments = {f"{name}_ptr": f"*{dtype}" for name in ("dout", "b", "p", "ds")}
            arguments |= {f"stride_{name}": "i32:16" for name in ("dot", "bl")} | {"num_tokens": "i32"}
            name, kernel = f"weights {num_latents} backward {dtype}", m._latent_weights_bwd_kernel
            yield CompileSpec(name, kernel, arguments, constexprs | shape, options)


def _mean_pool_specs(capability: int) -> Iterator[CompileSpec]:
    m = _kernels("mean_pool")
    lists = {f"{name}_ptr": "*i32" for name in ("tiles", "cu_seqlens")}
    results = {f"{name}_ptr": "*fp32" for name in ("partial", "partial_count", "out")}
    for op, width in (("mean_pool", WIDTH), ("mean_pool_geglu", GEGLU_WIDTH)):
        geglu = op == "mean_pool_geglu"
        flags = {"D": width, "GEGLU": geglu, "HAS_MASK": True}
        for dtype, itemsize in DTYPES.items():
            constexprs, options = _split(m._launch_config(width, geglu, capability, itemsize))
            arguments = {"x_ptr": f"*{dtype}", "mask_ptr": "*i1"} | lists | results
            arguments |= {f"stride_{name}": "i32:16" for name in ("xt", "ob", "pt")}
            kernel, constants = m._mean_pool_fwd_kernel, constexprs | flags
            yield CompileSpec(f"{op} {dtype}", kernel, arguments, constants, options)
            backward, backward_options = _split(m._bwd_launch_config(width, geglu, capability, itemsize))
            arguments = {f"{name}_ptr": f"*{dtype}" for name in ("x", "dx")} | lists
            arguments |= {"mask_ptr": "*i1", "count_ptr": "*i32", "dout_ptr": "*fp32"}
            arguments |= {f"stride_{name}": "i32:16" for name in ("xt", "db", "dxt")}
            constants = backward | flags | ({} if geglu else {"x_ptr": None})
            arguments = {name: kind for name, kind in arguments.items() if name not in constants}
            name, kernel = f"{op} backward {dtype}", m._mean_pool_bwd_kernel
            yield CompileSpec(name, kernel, arguments, constants, backward_options)
    flags = {"D": WIDTH, "TOKENS": constexprs["TOKENS"]}
    constexprs, options = _split(m._combine_launch_config(WIDTH))
    arguments = {"split_seqs_ptr": "*i32", "cu_seqlens_ptr": "*i32"} | results
    arguments |= {f"stride_{name}": "i32:16" for name in ("ob", "pt")}
    yield CompileSpec("combine", m._mean_pool_combine_kernel, arguments, constexprs | flags, options)


def _rms_norm_specs(capability: int) -> Iterator[CompileSpec]:
    m = _kernels("rms_norm")
    for op in ("rms_norm", "add_rms_norm"):
        for dtype, itemsize in DTYPES.items():
            constexprs, options = _split(m._launch_config(WIDTH, capability, itemsize))
            arguments = {f"{name}_ptr": f"*{dtype}" for name in ("x", "residual", "weight", "y", "h")}
            arguments |= {f"stride_{name}t": "i32:16" for name in "xryh"}
            arguments |= {"num_tokens": "i32", "eps": "fp32"}
            flags = {"D": WIDTH, "HAS_RESIDUAL": op == "add_rms_norm"}
            if op == "rms_norm":
                flags |= {name: None for name in ("residual_ptr", "h_ptr")}
            arguments = {name: kind for name, kind in arguments.items() if name not in flags}
            yield CompileSpec(f"{op} {dtype}", m._rms_norm_fwd_kernel, arguments, constexprs | flags, options)
    for name, needs_dweight in (("backward", True), ("backward, weight frozen", False)):
        for dtype, itemsize in DTYPES.items():
            constexprs, options = _split(m._bwd_launch_config(WIDTH, capability, itemsize))
            arguments = {f"{t}_ptr": f"*{dtype}" for t in ("h", "weight", "dy", "dh_out", "dh")}
            arguments |= {f"stride_{s}": "i32:16" for s in ("ht", "dyt", "dot", "dht")}
            arguments |= {"num_tokens": "i32", "eps": "fp32"}
            arguments |= {"partial_ptr": "*fp32"} if needs_dweight else {}
            flags = {"D": WIDTH, "HAS_DH_OUT": True, "NEEDS_DH": True, "NEEDS_DWEIGHT": needs_dweight}
            flags |= {} if needs_dweight else {"partial_ptr": None}
            kernel = m._rms_norm_bwd_kernel
            yield CompileSpec(f"{name} {dtype}", kernel, arguments, constexprs | flags, options)
    constexprs, options = _split(m._dweight_launch_config(WIDTH))
    arguments = {"partial_ptr": "*fp32", "dweight_ptr": "*bf16", "num_partials": "i32"}
    yield CompileSpec(
        "dweight bf16", m._rms_norm_dweight_kernel, arguments, constexprs | {"D": WIDTH}, options
    )


def _rotary_specs(capability: int) -> Iterator[CompileSpec]:
    m = _kernels("rotary")
    rotated = HEADS + KV_HEADS
    for op, num_heads in (
        ("in place", rotated),
        ("copy", rotated + KV_HEADS),
        ("backward", rotated + KV_HEADS),
    ):
        constexprs, options = _split(m._launch_config(num_heads, HEAD_WIDTH))
        flags = {"HALF": HEAD_WIDTH // 2, "NUM_HEADS": num_heads, "NUM_ROTATED": rotated}
        flags["INVERSE"] = op == "backward"
        for dtype in DTYPES:
            arguments = {
                "qkv_ptr": f"*{dtype}",
                "out_ptr": f"*{dtype}",
                "cos_ptr": "*fp32",
                "sin_ptr": "*fp32",
                "positions_ptr": "*i32",
            }
            arguments |= {f"stride_{name}": "i32:16" for name in ("qt", "qn", "ot", "on", "cp", "sp")}
            yield CompileSpec(f"{op} {dtype}", m._rotary_kernel, arguments, constexprs | flags, options)


if __name__ == "__main__":
    sys.exit(main())
