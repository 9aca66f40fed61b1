"""An HTML page and README's tables from the files of figures.

    python -m bench.report                               bench/results/*.csv; report/index.html beside them
    python -m bench.report H200.csv A100.csv -o FOLDER   FOLDER/index.html: one page, its pictures inside it
    python -m bench.report --readme [FILE.csv ...]       README's tables, between their markers
    python -m bench.report --check [FILE.csv ...]        exit code 1 where README's tables are not those

README's tables come from the files that git knows, unless files are named.

1. Of every case on every GPU the newest comparison counts, as a whole: figures of two runs were not taken in
   turns and are never set against each other. What a run left out does not come back from an older one.
2. An implementation that was left out has no time, and is nobody's best rival.
3. What has no row is "not measured".
"""

import argparse
import base64
import datetime
import io
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bench.measure import results
from bench.measure.limits import IMPL as LIMITS_IMPL
from bench.measure.results import OURS

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
FOLDER = results.FOLDER / "report"
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
ORIGINAL = "original"
NOT_MEASURED = "not measured"
COMPILED_FOR = ("A100", "H100", "H200")
SUITES = {
    "encode": "Whole encoder",
    "latent_block": "Latent block",
    "flash_attention": "Attention",
    "latent_attention": "Latent attention",
    "mean_pool": "Mean pool",
    "rms_norm": "RMSNorm",
    "rotary": "Rotary embeddings",
    "gated": "Gated activations",
}
IN_README = ("encode", "latent_block", "flash_attention")
PROFILE, LIMITS = "profile", "limits"
METRICS = {
    "time_p20": "time, 20th percentile",
    "time_p50": "time, median",
    "time_p80": "time, 80th percentile",
    "texts_rate": "texts",
    "tokens_rate": "tokens",
    "peak_memory": "peak memory",
    "parity_error": "parity error",
    results.LEFT_OUT: "left out",
}
# "sweep-128x256 forward": 256 texts of 128 tokens; "direct sweep-64-latents forward"
SWEEP = re.compile(r"(.+ )?sweep-(\d+)(?:x\d+|-(\w+)) (.+)")
REAL_SIZES = ("nvembed", "skewed")
# Okabe and Ito: told apart by colour-blind readers
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#BBBBBB"
RIVAL_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#E69F00", "#777777")
MARKERS = "sv^Dx+*P"


@dataclass(frozen=True)
class Figure:
    """A value in its unit, and its share of the limit; of "left_out" the unit is the reason."""

    value: float | None
    unit: str
    share: float | None

    def __str__(self) -> str:
        return f"{number(self.value)} {self.unit}"


@dataclass(frozen=True)
class Comparison:
    """One case of one suite, as one run measured it.

    Attributes:
        run: the machine's columns without the command, and the date.
        impls: who -> metric -> figure.
    """

    suite: str
    case: str
    run: dict[str, str]
    impls: dict[str, dict[str, Figure]]

    @property
    def metric(self) -> str:
        """What decides who is faster."""
        has_rate = any("texts_rate" in figures for figures in self.impls.values())
        return "texts_rate" if has_rate else "time_p50"

    @property
    def is_sweep(self) -> bool:
        return bool(SWEEP.fullmatch(self.case))

    def left_out(self, impl: str) -> str | None:
        """Why, or None."""
        figure = self.impls.get(impl, {}).get(results.LEFT_OUT)
        return figure.unit if figure else None

    def figure(self, impl: str, metric: str | None = None) -> Figure | None:
        """None where it was not measured, or not to be shown; without `metric` what decides who is faster."""
        figure = self.impls.get(impl, {}).get(metric or self.metric)
        if figure is None or self.left_out(impl) or figure.value is None:
            return None
        return figure if math.isfinite(figure.value) and figure.value > 0 else None

    def share(self, impl: str) -> float | None:
        """Of the limit, by the first figure that has one."""
        if self.left_out(impl):
            return None
        shares = (figure.share for figure in self.impls.get(impl, {}).values())
        return next((share for share in shares if share is not None), None)

    def best_rival(self) -> str | None:
        rivals = [i for i in self.impls if not i.startswith(OURS) and self.figure(i)]
        fastest = min if self.metric == "time_p50" else max
        return fastest(rivals, key=lambda i: self.figure(i).value, default=None)

    def factor(self, rival: str | None) -> float | None:
        """How many times as fast as `rival` this project is."""
        ours, theirs = self.figure(OURS), self.figure(rival) if rival else None
        if ours is None or theirs is None:
            return None
        return theirs.value / ours.value if self.metric == "time_p50" else ours.value / theirs.value


def load(paths: Iterable[Path], commit: str = "") -> dict[str, list[Comparison]]:
    """GPU -> the newest comparison of every case, GPUs before CPUs; a file's date stands in its name.

    Args:
        commit: leave out the rows of commits that do not start with it.
    """
    newest: dict[tuple, Comparison] = {}
    for path in sorted(paths, key=_date):
        for row in results.read(path):
            if not row["commit"].startswith(commit):
                continue
            key = row["gpu"], row["suite"], row["case"]
            run = {name: row[name] for name in ("driver", "torch", "triton", "transformers", "commit")}
            run["date"] = _date(path) or "unknown"
            known = newest.get(key)
            # the same figure again: measured anew
            if known is None or known.run != run or row["metric"] in known.impls.get(row["impl"], {}):
                newest[key] = Comparison(row["suite"], row["case"], run, {})
            figure = Figure(_float(row["value"]), row["unit"], _share(row["share_of_limit"]))
            newest[key].impls.setdefault(row["impl"], {})[row["metric"]] = figure
    machines: dict[str, list[Comparison]] = {}
    for (gpu, *_), comparison in newest.items():
        machines.setdefault(gpu, []).append(comparison)
    return dict(sorted(machines.items(), key=lambda item: (is_cpu(item[0]), item[0])))


def _date(path: Path) -> str:
    found = re.search(r"(\d{4}-\d\d-\d\d)\.csv$", path.name)
    return found[1] if found else ""


def _float(text: str) -> float | None:
    return float(text) if text else None


def _share(text: str) -> float | None:
    share = _float(text)
    return share if share is not None and math.isfinite(share) else None


def is_cpu(gpu: str) -> bool:
    return gpu.startswith("CPU ")


def machine_title(gpu: str) -> str:
    return f"CPU (PyTorch path): {gpu.removeprefix('CPU ')}" if is_cpu(gpu) else gpu


def number(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{100 * share:.0f} %"


def _values_of(comparisons: Iterable[Comparison], name: str) -> str:
    return ", ".join(sorted({c.run[name] for c in comparisons}))


def _suites(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """Suite -> its comparisons, the known suites first, whether measured or not."""
    suites: dict[str, list[Comparison]] = {name: [] for name in SUITES}
    for comparison in comparisons:
        suites.setdefault(comparison.suite, []).append(comparison)
    return {name: found for name, found in suites.items() if name not in (PROFILE, LIMITS)}


def _not_measured_gpus(gpus: Iterable[str]) -> str:
    """Which GPUs the kernels are compiled for and no file is of, as a sentence; empty if there is none."""
    gpus = list(gpus)
    names = [n for n in COMPILED_FOR if not any(re.search(rf"\b{n}\b", gpu) for gpu in gpus)]
    return f"{_and(names)}: compiled for, not measured." if names else ""


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


# the headline


def _headlines(comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    """(what, how fast) for every mix of the encoder, and every kernel and direction."""
    lines = []
    for suite, found in _suites(comparisons).items():
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
    reasons = dict.fromkeys(c.left_out(OURS) or NOT_MEASURED for c in group if c not in measured)
    without = f"without {len(group) - len(measured)} of {len(group)} cases ({'; '.join(reasons)})"
    if not measured:
        return "; ".join(reasons)
    parts = []
    compared = [c for c in measured if c.best_rival()]
    if compared:
        rivals = ", ".join(dict.fromkeys(c.best_rival() for c in compared))
        factors = [c.factor(c.best_rival()) for c in compared]
        parts.append(f"{_range(factors)} times as fast as the best rival ({rivals})")
        slower = sum(factor < 1 for factor in factors)
        if slower:
            parts[-1] += ", slower" + (f" in {slower} of {len(factors)} cases" if len(factors) > 1 else "")
    else:
        parts.append("no rival was measured")
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


# pictures: each function draws one and returns None where there is nothing to draw


def _figure(heights: Sequence[float]):
    """A picture as wide as a phone is, and its axes one below the other, `heights` in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the pictures need matplotlib: pip install -e '.[bench]'") from error
    figure = Canvas(figsize=(5.2, sum(heights)), dpi=180, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes


def _beside(ax, y: int, text: str) -> None:
    ax.text(1.01, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=7)


def draw_rivals(comparisons: Sequence[Comparison]):
    """Bars, a panel for every case; the ends of the line through a bar are the 20th and 80th percentile."""
    cases = [c for c in comparisons if not c.is_sweep and any(c.figure(i) for i in c.impls)]
    if not cases:
        return None
    measured = [[i for i in c.impls if c.figure(i)] for c in cases]
    figure, axes = _figure([0.75 + 0.24 * len(impls) for impls in measured])
    for ax, c, impls in zip(axes, cases, measured, strict=True):
        is_time = c.metric == "time_p50"
        fastest_first = sorted(impls, key=lambda i: c.figure(i).value, reverse=not is_time)
        longest = max(_ends(c, i)[1] for i in impls)
        for y, impl in enumerate(fastest_first):
            main = c.figure(impl)
            low, high = _ends(c, impl)
            spread = [[max(main.value - low, 0)], [max(high - main.value, 0)]]
            colour = BLUE if impl.startswith(OURS) else GREY
            ax.barh(y, main.value, 0.7, color=colour, xerr=spread, error_kw={"lw": 1, "capsize": 2})
            ax.text(max(high, main.value), y, f"  {number(main.value)}", va="center", fontsize=7.5)
        ax.set_yticks(range(len(fastest_first)), fastest_first)
        ax.set_ylim(len(fastest_first) - 0.4, -0.6)
        ax.set_xlim(0, 1.15 * longest)
        ax.set_title(c.case, fontsize=9, loc="left")
        ax.set_xlabel("ms, less is better" if is_time else "texts/s, more is better", fontsize=8)
    return figure


def _ends(c: Comparison, impl: str) -> tuple[float, float]:
    """The least and the greatest value by the percentiles of the time; without them the value itself."""
    main = c.figure(impl).value
    times = [c.figure(impl, metric) for metric in results.TIMES]
    if None in times:
        return main, main
    p20, p50, p80 = (t.value for t in times)
    return (
        (main * p20 / p50, main * p80 / p50)
        if c.metric == "time_p50"
        else (main * p50 / p80, main * p50 / p20)
    )


def draw_sweeps(comparisons: Sequence[Comparison]):
    """Rate, or time where there is no rate, against what is swept; a panel for each and every direction."""
    panels: dict[tuple[str, str], dict[int, Comparison]] = {}
    for c in comparisons:
        found = SWEEP.fullmatch(c.case)
        if found and any(c.figure(i) for i in c.impls):
            swept, title = found[3] or "tokens in a text", (found[1] or "") + found[4]
            panels.setdefault((swept, title), {})[int(found[2])] = c
    if not panels:
        return None
    figure, axes = _figure([3.4] * len(panels))
    for ax, ((swept, title), by_size) in zip(axes, panels.items(), strict=True):
        cases = [by_size[n] for n in sorted(by_size)]
        impls = list(dict.fromkeys(i for c in cases for i in c.impls if c.figure(i)))
        impls.sort(key=lambda i: not i.startswith(OURS))
        has_rate = all(c.figure(i, "rate") for c in cases for i in c.impls if c.figure(i))
        metric = "rate" if has_rate else "time_p50"
        rivals = [i for i in impls if not i.startswith(OURS)]
        for impl in impls:
            points = [(n, f) for n in sorted(by_size) if (f := by_size[n].figure(impl, metric))]
            sizes, values = [n for n, _ in points], [f.value for _, f in points]
            if impl in rivals:
                k = rivals.index(impl)
                style = {"color": RIVAL_COLOURS[k % len(RIVAL_COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
                ax.plot(sizes, values, lw=1, ms=4, label=impl, **style)
            else:
                ax.plot(sizes, values, lw=2.5, marker="o", color=BLUE, label=impl, zorder=3)
        ax.set_xscale("log", base=2)
        ax.set_xticks(
            sorted(by_size), [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in sorted(by_size)]
        )
        ax.minorticks_off()
        if metric == "rate":
            ax.set_ylim(0)
        else:
            ax.set_yscale("log")
        ax.grid(alpha=0.3)
        unit = next(c.figure(i, metric).unit for c in cases for i in impls if c.figure(i, metric))
        ax.set_ylabel(unit + (", more is better" if metric == "rate" else ", less is better"), fontsize=8)
        ax.set_xlabel(swept, fontsize=8)
        ax.set_title(title, fontsize=9, loc="left")
        ax.legend(fontsize=7, frameon=False)
    return figure


def draw_shares(comparisons: Sequence[Comparison]):
    """What each of our kernels reaches of its limit, and the best rival beside it."""
    kernels = [c for found in _suites(comparisons).values() for c in found if not c.is_sweep]
    cases = [c for c in kernels if c.figure(OURS) and c.share(OURS) is not None]
    if not cases:
        return None
    figure, (ax,) = _figure([1.1 + 0.34 * len(cases)])
    for y, c in enumerate(cases):
        share, rate = c.share(OURS), c.figure(OURS, "rate") or c.figure(OURS, "tokens_rate")
        ax.barh(y, share, 0.6, color=BLUE, label=OURS if y == 0 else None)
        _beside(ax, y, _percent(share) + (f", {rate}" if rate else ""))
    points = [(c.share(c.best_rival()), y) for y, c in enumerate(cases) if c.best_rival()]
    points = [point for point in points if point[0] is not None]
    if points:
        x, y = zip(*points, strict=True)
        ax.plot(x, y, "D", color=ORANGE, mec="black", ms=6, label="best rival", zorder=3)
    ax.axvline(1, color="black", lw=1.5, ls="--", label="limit, measured in the same run")
    ax.set_yticks(range(len(cases)), [f"{SUITES.get(c.suite, c.suite)}\n{c.case}" for c in cases], fontsize=7)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.05 * max([1.0, *(c.share(OURS) for c in cases), *(share for share, _ in points)]))
    ax.set_xlabel("share of the limit", fontsize=8)
    figure.legend(fontsize=7, frameon=False, loc="outside upper center", ncols=3)
    return figure


def draw_roofline(comparisons: Sequence[Comparison]):
    """Rates against operations per byte, below the roof of a large copy and of a large product."""
    copies = [c.figure(LIMITS_IMPL, "rate") for c in comparisons if (c.suite, c.case) == (LIMITS, "copy")]
    cases = [c for c in comparisons if c.figure(OURS, "intensity") and c.figure(OURS, "limit")]
    if not cases or not copies or copies[0] is None:
        return None
    slope, peak = copies[0].value / 1000, max(c.figure(OURS, "limit").value for c in cases)
    figure, (ax,) = _figure([3.6])
    points = [(c, c.figure(OURS, "intensity").value) for c in cases]
    ridge = peak / slope
    places = [x for _, x in points]
    ends = min(0.5 * ridge, *places), max(4 * ridge, *places)
    ax.plot((ends[0], ridge, ends[1]), (slope * ends[0], peak, peak), color="black", lw=1.5, label="the roof")
    for impl_of, colour, mark, label in (
        (lambda c: c.best_rival(), ORANGE, "D", "best rival"),
        (lambda c: OURS, BLUE, "o", OURS),
    ):
        found = [(x, f.value) for c, x in points if (i := impl_of(c)) and (f := c.figure(i, "rate"))]
        if found:
            ax.plot(*zip(*found, strict=True), mark, color=colour, mec="black", ms=6, label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("operations per byte of inputs and outputs", fontsize=8)
    ax.set_ylabel("TFLOP/s", fontsize=8)
    ax.legend(fontsize=7, frameon=False)
    return figure


def draw_waterfall(comparisons: Sequence[Comparison]):
    """The parts of a batch one behind the other, each with its own limit inside it."""
    cases = [c for c in comparisons if c.suite == PROFILE and _parts(c)]
    if not cases:
        return None
    figure, axes = _figure([1.0 + 0.34 * (len(_parts(c)) + 1) for c in cases])
    for ax, c in zip(axes, cases, strict=True):
        parts, start = _parts(c), 0.0
        whole = sum(part.value for part in parts.values())
        for y, part in enumerate(parts.values()):
            ax.barh(y, part.value, 0.7, left=start, color=BLUE if part.share is not None else GREY)
            label = f"{number(part.value)} ms, {100 * part.value / whole:.0f} %"
            if part.share is not None:
                ax.barh(y, part.value * part.share, 0.3, left=start, color=ORANGE)
                label += f"; limit {number(part.value * part.share)} ms"
            _beside(ax, y, label)
            start += part.value
        ax.barh(len(parts), whole, 0.7, color="#444444")
        _beside(ax, len(parts), f"{number(whole)} ms")
        ax.set_yticks(range(len(parts) + 1), [*parts, "sum"])
        ax.invert_yaxis()
        ax.set_xlim(0, 1.02 * whole)
        alone = c.figure(OURS, "time_p50")
        title = f"{c.case} ({alone} without the profiler)" if alone else c.case
        ax.set_title(title, fontsize=9, loc="left")
        ax.set_xlabel("ms per batch; orange: the limit of this part; grey: no limit measured", fontsize=7)
    return figure


def _parts(c: Comparison) -> dict[str, Figure]:
    names = [m.removeprefix("time:") for m in c.impls.get(OURS, {}) if m.startswith("time:")]
    parts = {name: c.figure(OURS, f"time:{name}") for name in names}
    return {name: part for name, part in parts.items() if part}


# the page

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
<p>Rivals took turns on the same inputs in the same run; whoever computes something else has no time.
The limit is what the machine's own products or copies reached in that run. Page of {today}.
{escape(_not_measured_gpus(machines))}</p>
{sections}</body></html>
"""


def _section(gpu: str, comparisons: Sequence[Comparison]) -> str:
    suites = _suites(comparisons)
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
        parts.append(f"<h3>{escape(title)}</h3>{_picture(draw_rivals, found, f'{gpu}: {title}')}")
        if any(c.is_sweep for c in found):
            parts.append(_picture(draw_sweeps, found, f"{gpu}: {title} against length"))
        parts += [_left_out(found), _table(found)]
    for suite, title in ((PROFILE, "Figures of the profile"), (LIMITS, "Limits of this machine")):
        parts.append(f"<h3>{title}</h3>{_table([c for c in comparisons if c.suite == suite])}")
    return "\n".join(parts)


def _facts(gpu: str, comparisons: Sequence[Comparison]) -> str:
    rows = [("machine", gpu)]
    rows += [(n, _values_of(comparisons, n)) for n in ("date", "driver", "torch", "triton", "transformers")]
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


def _left_out(comparisons: Sequence[Comparison]) -> str:
    """Who is missing from the pictures, by reason."""
    by_reason: dict[str, dict[str, None]] = {}
    for c in comparisons:
        for impl in c.impls:
            if reason := c.left_out(impl):
                by_reason.setdefault(reason, {})[impl] = None
    items = "".join(f"<li>{escape(', '.join(who))}: {escape(why)}</li>" for why, who in by_reason.items())
    return f"<p>Left out, in some cases or in all:</p><ul>{items}</ul>" if items else ""


def _table(comparisons: Sequence[Comparison]) -> str:
    """Every figure, a row for every case and implementation."""
    figures = [f for c in comparisons for f in c.impls.values()]
    if not figures:
        return f"<p>{NOT_MEASURED}</p>"
    present = dict.fromkeys(metric for f in figures for metric in f)
    metrics = sorted(present, key=lambda m: m == results.LEFT_OUT)
    head = "".join(f"<th>{escape(METRICS.get(m, m))}</th>" for m in ("case", "who", *metrics, "commit"))
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
    if metric == results.LEFT_OUT:
        return figure.unit if figure else ""
    if figure is None:
        return NOT_MEASURED
    return str(figure) + (f" ({_percent(figure.share)} of the limit)" if figure.share is not None else "")


# README


def readme_tables(machines: dict[str, list[Comparison]]) -> str:
    """What stands between README's markers."""
    parts = [
        "Made from `bench/results/` by `python -m bench.report --readme`. Times as fast: above 1 this "
        "project is faster.\nThe limit is what the machine's own products or copies reached in the same run."
    ]
    for gpu, comparisons in machines.items():
        cases = [
            c
            for suite in IN_README
            for c in comparisons
            if c.suite == suite
            and (suite == "encode" or any(word.startswith(REAL_SIZES) for word in c.case.split()))
        ]
        kind = "Not the speed of a GPU kernel" if is_cpu(gpu) else "Measured"
        lines = [f"**{machine_title(gpu)}.** {kind}: "]
        if cases:
            names = ("torch", "triton", "transformers")
            versions = [f"{name} {_values_of(cases, name)}" for name in names]
            lines[0] += (
                f"{_values_of(cases, 'date')}, commit {_values_of(cases, 'commit')}, {', '.join(versions)}."
            )
            lines += ["", "| case | this project | best rival | | times as fast | share of the limit |"]
            lines += ["|---|--:|---|--:|--:|--:|", *map(_readme_row, cases)]
        else:
            lines[0] += f"encoder, latent block and attention at NV-Embed's sizes: {NOT_MEASURED}."
        parts.append("\n".join(lines))
    parts.append(_not_measured_gpus(machines))
    return "\n\n".join(filter(None, parts))


def _readme_row(c: Comparison) -> str:
    rival = c.best_rival()
    factor = c.factor(rival)
    cells = [
        f"{SUITES[c.suite]}: {c.case}",
        str(c.figure(OURS) or (f"left out: {c.left_out(OURS)}" if c.left_out(OURS) else NOT_MEASURED)),
        rival or NOT_MEASURED,
        str(c.figure(rival)) if rival else "",
        f"{factor:.2f}" if factor else NOT_MEASURED,
        _percent(c.share(OURS)),
    ]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def with_tables(readme: str, tables: str) -> str:
    """README with these tables between its markers."""
    if readme.count(START) != 1 or readme.count(END) != 1 or readme.index(START) > readme.index(END):
        raise ValueError(f"README.md needs the line {START} and, below it, the line {END}, once each")
    before, rest = readme.split(START)
    return f"{before}{START}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


def known_to_git(folder: Path) -> list[Path]:
    """The results that are committed or added; all of them where there is no git."""
    everything = sorted(folder.glob("*.csv"))
    try:
        git = subprocess.run(["git", "-C", str(folder), "ls-files"], capture_output=True, text=True)
    except OSError:
        return everything
    if git.returncode:
        return everything
    return [path for path in everything if path.name in git.stdout.split("\n")]


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


def main(argv: Sequence[str] | None = None) -> None:
    options = _options(argv)
    try:
        if options.readme or options.check:
            _readme(options)
        else:
            files = options.files or sorted(results.FOLDER.glob("*.csv"))
            print(f"wrote {write_report(files, options.output)}")
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(f"bench.report: {error}")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    description, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE.csv", help="default: bench/results/*.csv"
    )
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("--readme", action="store_true", help="rewrite README's tables; no page")
    parser.add_argument("--check", action="store_true", help="exit code 1 if --readme would change README.md")
    return parser.parse_args(argv)


def _readme(options: argparse.Namespace) -> None:
    files = options.files or known_to_git(results.FOLDER)
    readme = README.read_text(encoding="utf-8")
    wanted = with_tables(readme, readme_tables(load(files)))
    if wanted == readme:
        print(f"README.md holds the tables of {len(files)} files")
    elif options.check:
        sys.exit("README.md's tables are not those of the results: run `python -m bench.report --readme`")
    else:
        README.write_text(wanted, encoding="utf-8")
        print(f"README.md: tables rewritten from {len(files)} files")
