"""One HTML page: a section for every machine, its pictures inside it."""

import base64
import datetime
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from bench.measure import results
from bench.measure.results import NOT_MEASURED, OURS, Figure
from bench.report.comparisons import (
    LIMITS,
    ORIGINAL,
    PROFILE,
    SUITES,
    Comparison,
    by_suite,
    is_cpu,
    load,
    machine_title,
    not_measured_gpus,
    percent,
    values_of,
)
from bench.report.pictures import draw_baselines, draw_roofline, draw_shares, draw_sweeps, draw_waterfall

FOLDER = results.FOLDER / "report"
METRICS = {
    "time_p20": "time, 20th percentile",
    "time_p50": "time, median",
    "time_p80": "time, 80th percentile",
    "texts_rate": "texts",
    "tokens_rate": "tokens",
    "peak_memory": "peak memory",
    "parity_error": "parity error",
    results.SKIPPED: "skipped",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 50rem; margin: 0 auto;
  padding: 0 1rem 4rem }
h2 { border-bottom: 2px solid #0072B2; margin-top: 3rem }
img { width: 100%; max-width: 40rem; display: block }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .8rem; white-space: nowrap }
td, th { border: 1px solid #ddd; padding: .2rem .5rem; text-align: right } th { background: #f4f4f4 }
td:first-child, td:nth-child(2), .facts td { text-align: left } .facts td { white-space: normal }
tr.ours { background: #e6f1f8; font-weight: 600 } .cpu { background: #fff3d6; padding: .5rem 1rem }
summary { cursor: pointer; margin: .5rem 0 }
"""


def page(machines: dict[str, list[Comparison]]) -> str:
    """One HTML file: a section for every machine."""
    sections = "".join(_section(gpu, comparisons) for gpu, comparisons in machines.items())
    today = datetime.date.today().isoformat()
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>nvembed_fast: how fast</title><style>{STYLE}</style></head><body>
<h1>nvembed_fast: how fast</h1>
<p>Implementations took turns on the same inputs in the same run. One that computes something else has
no time.
The limit is the rate of the machine's own products or copies in that run. Page of {today}.
{escape(not_measured_gpus(machines))}</p>
{sections}</body></html>
"""


def _section(gpu: str, comparisons: Sequence[Comparison]) -> str:
    suites = by_suite(comparisons)
    headlines = "".join(f"<li><b>{escape(k)}</b>: {escape(v)}.</li>" for k, v in _headlines(comparisons))
    parts = [f"<h2>{escape(machine_title(gpu))}</h2>"]
    if is_cpu(gpu):
        parts.append(
            '<p class="cpu">No GPU: the package takes its PyTorch path here, '
            "and nothing below is the speed of a GPU kernel.</p>"
        )
    parts += [_facts(gpu, comparisons), f"<h3>In one minute</h3><ul>{headlines}</ul>"]
    parts += ["<h3>What is left to the limit</h3>", _picture(draw_shares, comparisons, f"{gpu}: shares")]
    parts.append(_picture(draw_roofline, comparisons, f"{gpu}: roofline"))
    parts += ["<h3>Where the time goes</h3>", _picture(draw_waterfall, comparisons, f"{gpu}: waterfall")]
    for suite, found in suites.items():
        title = SUITES.get(suite, suite)
        parts.append(f"<h3>{escape(title)}</h3>{_picture(draw_baselines, found, f'{gpu}: {title}')}")
        if any(c.is_sweep for c in found):
            parts.append(_picture(draw_sweeps, found, f"{gpu}: {title} against length"))
        parts += [_skipped(found), _table(found)]
    for suite, title in ((PROFILE, "Figures of the profile"), (LIMITS, "Limits of this machine")):
        parts.append(f"<h3>{title}</h3>{_table([c for c in comparisons if c.suite == suite])}")
    return "\n".join(parts)


def _facts(gpu: str, comparisons: Sequence[Comparison]) -> str:
    rows = [("machine", gpu)]
    rows += [(n, values_of(comparisons, n)) for n in ("date", "driver", "torch", "triton", "transformers")]
    by_commit: dict[str, list[str]] = {}
    for c in comparisons:
        by_commit.setdefault(c.run["commit"], []).append(c.suite)
    several = len(by_commit) > 1
    commits = [k + (f" ({', '.join(dict.fromkeys(v))})" if several else "") for k, v in by_commit.items()]
    rows.append(("commit", "; ".join(commits)))
    cells = "".join(f"<tr><th>{k}</th><td>{escape(v)}</td></tr>" for k, v in rows)
    return f'<table class="facts">{cells}</table>'


def _picture(draw: Callable, comparisons: Sequence[Comparison], title: str) -> str:
    figure = draw(comparisons)
    if figure is None:
        return f"<p>{NOT_MEASURED}</p>"
    print(f"drawn: {title}", flush=True)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    data = base64.b64encode(png.getvalue()).decode()
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'


def _skipped(comparisons: Sequence[Comparison]) -> str:
    """The implementations that are missing from the pictures, by reason."""
    by_reason: dict[str, dict[str, None]] = {}
    for c in comparisons:
        for impl in c.impls:
            if reason := c.skipped(impl):
                by_reason.setdefault(reason, {})[impl] = None
    items = "".join(f"<li>{escape(', '.join(who))}: {escape(why)}</li>" for why, who in by_reason.items())
    return f"<p>Skipped, in some cases or in all:</p><ul>{items}</ul>" if items else ""


def _table(comparisons: Sequence[Comparison]) -> str:
    """Every figure, a row for every case and implementation."""
    figures = [f for c in comparisons for f in c.impls.values()]
    if not figures:
        return f"<p>{NOT_MEASURED}</p>"
    present = dict.fromkeys(metric for f in figures for metric in f)
    metrics = sorted(present, key=lambda m: m == results.SKIPPED)
    head = "".join(
        f"<th>{escape(METRICS.get(m, m))}</th>" for m in ("case", "implementation", *metrics, "commit")
    )
    rows = []
    for c in comparisons:
        for impl, found in c.impls.items():
            cells = [c.case, impl, *(_cell(m, found.get(m)) for m in metrics), c.run["commit"]]
            kind = ' class="ours"' if impl.startswith(OURS) else ""
            rows.append(f"<tr{kind}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return (
        f"<details><summary>All figures ({len(rows)} rows)</summary>"
        f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div></details>'
    )


def _cell(metric: str, figure: Figure | None) -> str:
    if metric == results.SKIPPED:
        return figure.unit if figure else ""
    if figure is None:
        return NOT_MEASURED
    return str(figure) + (
        f" ({percent(figure.share_of_limit)} of the limit)" if figure.share_of_limit is not None else ""
    )


def _headlines(comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    """(title, how fast) for every workload of the encoder, and every kernel and direction."""
    lines = []
    for suite, found in by_suite(comparisons).items():
        groups: dict[str, list[Comparison]] = {}
        for c in found:
            if not c.is_sweep:
                groups.setdefault(c.case if suite == "encode" else c.case.split()[-1], []).append(c)
        title = SUITES.get(suite, suite)
        lines += [(f"{title}, {name}", _headline(group)) for name, group in groups.items()]
        if not groups:
            lines.append((title, NOT_MEASURED))
    return lines


def _headline(group: Sequence[Comparison]) -> str:
    measured = [c for c in group if c.figure(OURS)]
    reasons = dict.fromkeys(c.skipped(OURS) or NOT_MEASURED for c in group if c not in measured)
    without = f"without {len(group) - len(measured)} of {len(group)} cases ({'; '.join(reasons)})"
    if not measured:
        return "; ".join(reasons)
    parts = []
    compared = [c for c in measured if c.best_baseline()]
    if compared:
        baselines = ", ".join(dict.fromkeys(c.best_baseline() for c in compared))
        factors = [c.factor(c.best_baseline()) for c in compared]
        parts.append(f"{_range(factors)} times as fast as the best baseline ({baselines})")
        slower = sum(factor < 1 for factor in factors)
        if slower:
            parts[-1] += ", slower" + (f" in {slower} of {len(factors)} cases" if len(factors) > 1 else "")
    else:
        parts.append("no baseline was measured")
    factors = [f for c in measured if (f := c.factor(ORIGINAL))]
    if factors:
        parts.append(f"{_range(factors)} times as fast as the original")
    shares = [100 * s for c in measured if (s := c.share(OURS)) is not None]
    parts.append(
        f"{_range(shares, '.0f')} % of the limit" if shares else f"share of the limit {NOT_MEASURED}"
    )
    return "; ".join([*parts, without] if reasons else parts)


def _range(values: Sequence[float], form: str = ".2f") -> str:
    return " to ".join(dict.fromkeys(f"{v:{form}}" for v in (min(values), max(values))))


def write_report(files: Sequence[Path], folder: Path = FOLDER) -> Path:
    """Write the page of these results into a folder.

    Raises:
        ValueError: they hold no figures.
        ModuleNotFoundError: there is no matplotlib.
    """
    machines = load(files)
    if not machines:
        raise ValueError(
            f"no figures in {', '.join(map(str, files)) or results.FOLDER}: run `make bench` first"
        )
    html = page(machines)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "index.html"
    target.write_text(html, encoding="utf-8")
    return target
