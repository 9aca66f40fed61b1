"""nvembed-fast check."""

import argparse
import contextlib
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nvembed_fast.cli import info, options, process

if TYPE_CHECKING:
    import torch

    from nvembed_fast.verdicts import Finding

SUMMARY = "Is every operation right on this device? What to put into a report of a fault."
EXAMPLES = """\
examples:
  nvembed-fast check
  nvembed-fast check --model nvidia/NV-Embed-v2
  nvembed-fast check --device cuda:1 --dtypes bfloat16 --operations flash_attention rotary --json"""

# the four texts of the model cards, and the scores that are published there
TASK = "Given a question, retrieve passages that answer the question"
QUERIES = ["are judo throws allowed in wrestling?", "how to become a radiology technician in michigan?"]
PASSAGES = [
    "Since you're reading this, you are probably someone from a judo background or someone who is just "
    "wondering how judo techniques can be applied under wrestling rules. So without further ado, let's "
    "get to the question. Are Judo throws allowed in wrestling? Yes, judo throws are allowed in "
    "freestyle and folkstyle wrestling. You only need to be careful to follow the slam rules when "
    "executing judo throws. In wrestling, a slam is lifting and returning an opponent to the mat with "
    "unnecessary force.",
    "Below are the basic steps to becoming a radiologic technologist in Michigan:Earn a high school "
    "diploma. As with most careers in health care, a high school education is the first step to finding"
    " entry-level employment. Taking classes in math and science, such as anatomy, biology, chemistry, "
    "physiology, and physics, can help prepare students for their college studies and future "
    "careers.Earn an associate degree. Entry-level radiologic positions typically require at least an "
    "Associate of Applied Science. Before enrolling in one of these degree programs, students should "
    "make sure it has been properly accredited by the Joint Review Committee on Education in Radiologic"
    " Technology (JRCERT).Get licensed or certified in the state of Michigan.",
]
SCORES = {
    "NV-Embed-v1": [[77.9402, 0.4249], [3.7577, 79.6011]],
    "NV-Embed-v2": [[87.4269, 0.4628], [0.9653, 86.0372]],
}
MAX_DIFFERENCE = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="default: float16, bfloat16, float32")
    parser.add_argument("--operations", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument(
        "--model", help="also encode the four texts of the model card with this directory or hub id"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options.add_hub_options(parser)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from nvembed_fast import ops
    from nvembed_fast.placement import check_device, check_dtype, dtype_name

    # first, so that an error stands alone
    device = check_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    dtypes = [check_dtype(name) for name in arguments.dtypes or map(dtype_name, ops.TRITON_DTYPES)]
    if unknown := [name for name in arguments.operations or () if name not in ops.OPERATIONS]:
        raise ValueError(f"no operation {unknown[0]!r}: there are {', '.join(ops.OPERATIONS)}")
    operations = arguments.operations or ops.OPERATIONS
    process.raise_interrupts()
    facts = dict(info.devices()).get(str(device), "")
    report: dict[str, Any] = {"ok": True, "device": f"{device}: {facts}", "versions": info.versions(device)}
    _say(arguments, f"{report['device']}\n{_joined(report['versions'])}")
    report["kernels"] = {dtype_name(dtype): _kernels(device, dtype) for dtype in dtypes}
    for (reason, _), names in _unchecked(report).items():
        _say(arguments, f"no kernel is checked in {', '.join(names)}: {reason}")
    found = _findings(arguments, device, report["kernels"], operations)
    report["operations"] = [_row(finding) for finding in found]
    report["ok"] = all(finding.ok for finding in found)
    if arguments.model:
        report["model"] = _model(arguments, device)
        report["ok"] &= report["model"]["ok"] is not False
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        print(_verdict(found, report))
    return 0 if report["ok"] else 1


def _findings(
    arguments: argparse.Namespace,
    device: "torch.device",
    kernels: dict[str, dict[str, Any]],
    operations: Sequence[str],
) -> list["Finding"]:
    """Of the kernels where they run, and of the library path on a GPU. Else of what takes their place."""
    from nvembed_fast import verdicts

    on_gpu = device.type == "cuda"
    without = [name for name, one in kernels.items() if not one["checked"]]
    paths: dict[verdicts.Checked, list[str]] = {
        "triton": [name for name in kernels if name not in without],
        "library": list(kernels) if on_gpu else without,
        "torch": [] if on_gpu else without,
    }
    found: list[verdicts.Finding] = []
    checked: set[tuple[str, verdicts.Item]] = set()

    def tell(finding: verdicts.Finding) -> None:
        found.append(finding)
        checked.add((finding.path, finding.item))
        _say(arguments, _line(finding))

    def note(finding: verdicts.Finding) -> None:
        # its line waits for its times
        checked.add((finding.path, finding.item))
        if not arguments.json:
            process.say(_line(finding))

    items = {
        path: [(name, dtype, d) for dtype in names for name in operations for d in verdicts.DIRECTIONS]
        for path, names in paths.items()
    }
    total = sum(map(len, items.values()))
    _say(arguments, f"{total} checks")
    progress = process.telling(lambda: f"checked {len(checked)} of {total}")
    # without --json the lines tell it
    with progress if arguments.json else contextlib.nullcontext():
        for path, wanted in items.items():
            if wanted:
                is_timed = device.type == "cuda" and path == "triton"
                if is_timed:
                    process.say(f"checking {len(wanted)} kernels, several at once, then timing each alone")
                _, why_here = verdicts.check_anew(device, wanted, tell, path=path, timed=is_timed, note=note)
                if why_here:
                    process.say(f"note: checked in this process, without a time limit: {why_here}")
    return found


def _kernels(device: "torch.device", dtype: "torch.dtype") -> dict[str, Any]:
    """Whether kernels are checked there, why not, and which path `auto` takes where none is wrong."""
    from nvembed_fast import ops

    reason = None
    try:
        with ops.use_impl("triton"):
            ops.choose(device, dtype)
    except ValueError as error:
        reason = str(error)
    return {"checked": reason is None, "reason": reason, "auto": ops.choose(device, dtype)[0]}


def _unchecked(report: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """The dtypes in which no kernel is checked, for each reason and path of `auto`."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, kernels in report["kernels"].items():
        if not kernels["checked"]:
            names.setdefault((kernels["reason"], kernels["auto"]), []).append(name)
    return names


def _say(arguments: argparse.Namespace, text: str) -> None:
    if not arguments.json:
        print(text, flush=True)


def _row(finding: "Finding") -> dict[str, Any]:
    names = ("name", "dtype", "direction", "path", "ok", "error", "tolerance", "reason")
    found = {name: getattr(finding, name) for name in (*names, "time_ms", "library_ms")}
    # JSON has neither NaN nor infinity
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}


def _line(finding: "Finding") -> str:
    parts = [f"{finding.path:8}{finding.dtype:9} {finding.direction:9} {finding.name:26}"]
    parts.append(f"{_word(finding):5}")
    if finding.error is not None:
        parts.append(f"error {finding.error:.1e} of {finding.tolerance:.1e}")
    if finding.time_ms is not None and finding.library_ms is not None:
        parts.append(f"{finding.time_ms:.3f} ms, library {finding.library_ms:.3f} ms")
    return "  ".join([*parts, finding.reason]).rstrip()


def _word(finding: "Finding") -> str:
    return "ok" if finding.ok else "WRONG" if finding.is_decided else "?"


def _model(arguments: argparse.Namespace, device: "torch.device") -> dict[str, Any]:
    """The scores of the model card's texts, and whether they are the published ones. None: not compared."""
    import numpy as np

    from nvembed_fast.encoder import NVEmbed

    options.note_download(arguments.model, **options.hub_options(arguments))
    with process.telling(lambda: f"loading {arguments.model}"):
        model = NVEmbed.from_pretrained(arguments.model, device=device, **options.hub_options(arguments))
    queries = model.encode_query(QUERIES, TASK, output="numpy")
    scores = 100 * np.asarray(queries) @ np.asarray(model.encode_document(PASSAGES, output="numpy")).T
    name = options.model_name(arguments.model)
    published, is_same = SCORES.get(name), None
    comparison = f"not compared, because there are no published scores of {name!r}"
    if published is not None:
        is_same = bool((np.abs(scores - np.array(published)) <= MAX_DIFFERENCE).all())
        comparison = f"published are {published}"
    rounded = np.round(scores.astype(float), 4).tolist()
    _say(arguments, f"\n{arguments.model} scores {rounded}, {comparison}")
    return {"name": str(arguments.model), "ok": is_same, "scores": rounded, "published": published}


def _verdict(found: list["Finding"], report: dict[str, Any]) -> str:
    wrong = [finding for finding in found if not finding.ok]
    lines = [f"\n{len(found) - len(wrong)} of {len(found)} are right (tolerances: docs/numerics.md)"]
    for (_, auto), names in _unchecked(report).items():
        lines.append(f"  no kernel was checked in {', '.join(names)}: there auto takes the path {auto}")
    for finding in wrong:
        instead = {"triton": "auto takes the library path", "library": "pass impl='torch'"}.get(
            finding.path, ""
        )
        what = f"{finding.name} ({finding.path}, {finding.dtype}, {finding.direction})"
        lines.append(f"  {_word(finding)} {what}: {finding.reason}{f'; {instead}' if instead else ''}")
    if report.get("model", {}).get("ok") is False:
        lines.append(f"  WRONG scores: beyond {MAX_DIFFERENCE} of the published ones")
    return "\n".join(lines)


def _joined(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
