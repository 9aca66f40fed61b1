"""The speed tables between the markers of README.md or a page of docs/."""

import subprocess
from pathlib import Path

from bench.measure.results import GRAPHED, NOT_MEASURED, OURS, ROOT
from bench.report.comparisons import (
    ORIGINAL,
    SUITES,
    Comparison,
    is_cpu,
    machine_title,
    not_measured_gpus,
    percent,
    values_of,
)

PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
IN_README = ("encode", "latent_block", "flash_attention")
REAL_SIZES = ("nvembed", "skewed")


def speed_tables(machines: dict[str, list[Comparison]], of_gpus: bool | None = None) -> str:
    """The text between the markers: a table for every machine.

    Args:
        machines: of `load`.
        of_gpus: those of GPUs alone, or the others alone. Without a GPU the choice is not made.
    """
    shown = machines
    if of_gpus is not None and not all(map(is_cpu, machines)):
        shown = {name: comparisons for name, comparisons in machines.items() if is_cpu(name) != of_gpus}
    parts = [
        "Made from `bench/results/` by `python -m bench.report --readme`. Times as fast: above 1 this "
        "project is faster.\nThe limit is the rate of the machine's own products or copies in the same run."
    ]
    for gpu, comparisons in shown.items():
        cases = [
            c
            for suite in IN_README
            for c in comparisons
            if c.suite == suite
            and (suite == "encode" or any(word.startswith(REAL_SIZES) for word in c.case.split()))
        ]
        kind = (
            "Not the speed of a GPU kernel, and a model in the shape of SmolLM2-135M in fp32"
            if is_cpu(gpu)
            else "A model in the shape of NV-Embed in bf16"
        )
        lines = [f"**{machine_title(gpu)}.** {kind}: "]
        if cases:
            names = ("torch", "triton", "transformers")
            versions = [f"{name} {values_of(cases, name)}" for name in names]
            lines[0] += (
                f"{values_of(cases, 'date')}, commit {values_of(cases, 'commit')}, {', '.join(versions)}."
            )
            columns = ("case", "this project", "best baseline", "", "times as fast", "as the original")
            lines += ["", f"| {' | '.join(columns)} | share of the limit |"]
            lines += ["|---|--:|---|--:|--:|--:|--:|"]
            for c in cases:
                lines += [_row(c)] + ([_row(c, GRAPHED)] if c.figure(GRAPHED) else [])
        else:
            lines[0] += f"encoder, latent block and attention at NV-Embed's sizes: {NOT_MEASURED}."
        parts.append("\n".join(lines))
    parts.append(not_measured_gpus(machines))
    return "\n\n".join(filter(None, parts))


def _row(c: Comparison, impl: str = OURS) -> str:
    baseline = c.best_baseline()
    against = [baseline, ORIGINAL] if ORIGINAL in c.impls else [baseline]
    factors = [_times_as_fast(c, one, impl) for one in against] + [""] * (2 - len(against))
    cells = [
        f"{SUITES[c.suite]}: {c.case}{impl.removeprefix(OURS)}",
        str(c.figure(impl) or (f"skipped: {c.skipped(impl)}" if c.skipped(impl) else NOT_MEASURED)),
        baseline or NOT_MEASURED,
        str(c.figure(baseline)) if baseline else "",
        *factors,
        percent(c.share(impl)),
    ]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _times_as_fast(c: Comparison, baseline: str | None, impl: str) -> str:
    factor = c.factor(baseline, impl)
    return f"{factor:.2f}" if factor else NOT_MEASURED


def pages_with_markers() -> list[Path]:
    """Those of PAGES that have a marker."""
    texts = {path: path.read_text(encoding="utf-8") for path in PAGES if path.exists()}
    found = [path for path, text in texts.items() if START in text or END in text]
    if not found:
        names = " or ".join(path.name for path in PAGES)
        raise ValueError(f"{names} needs the line {START} and, below it, the line {END}, once each")
    return found


def with_tables(path: Path, tables: str) -> str:
    """The text of a page with these tables between its markers."""
    page = path.read_text(encoding="utf-8")
    if page.count(START) != 1 or page.count(END) != 1 or page.index(START) > page.index(END):
        raise ValueError(f"{path.name} needs the line {START} and, below it, the line {END}, once each")
    before, rest = page.split(START)
    return f"{before}{START}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


def known_to_git(folder: Path) -> list[Path]:
    """The results that are committed or added, or all of them where there is no git."""
    everything = sorted(folder.glob("*.csv"))
    try:
        git = subprocess.run(["git", "-C", str(folder), "ls-files"], capture_output=True, text=True)
    except OSError:
        return everything
    if git.returncode:
        return everything
    return [path for path in everything if path.name in git.stdout.split("\n")]
