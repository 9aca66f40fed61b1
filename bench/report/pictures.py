"""The pictures of the page. Each function draws one, and returns None where there is nothing to draw."""

from collections.abc import Sequence

from bench.measure import results
from bench.measure.limits import IMPL as LIMITS_IMPL
from bench.measure.results import OURS, Figure, number
from bench.report.comparisons import LIMITS, PROFILE, SUITES, SWEEP, Comparison, by_suite, percent

# Okabe and Ito: told apart by colour-blind readers
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#BBBBBB"
BASELINE_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#E69F00", "#777777")
MARKERS = "sv^Dx+*P"
# the rates of products in one dtype, measured again and again, differ by less
NEAR_ROOF = 0.75


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


def draw_baselines(comparisons: Sequence[Comparison]):
    """Bars, a panel for every case. The line through a bar reaches from the 20th to the 80th percentile."""
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
        ax.set_xlabel("ms, lower is better" if is_time else "texts/s, higher is better", fontsize=8)
    return figure


def _ends(c: Comparison, impl: str) -> tuple[float, float]:
    """The smallest and the largest value by the percentiles of the time, or twice the value without them."""
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
    """Rate, or time where there is no rate, against the swept size. A panel for each and every direction."""
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
        baselines = [i for i in impls if not i.startswith(OURS)]
        for impl in impls:
            points = [(n, f) for n in sorted(by_size) if (f := by_size[n].figure(impl, metric))]
            sizes, values = [n for n, _ in points], [f.value for _, f in points]
            if impl in baselines:
                k = baselines.index(impl)
                style = {
                    "color": BASELINE_COLOURS[k % len(BASELINE_COLOURS)],
                    "marker": MARKERS[k % len(MARKERS)],
                }
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
        ax.set_ylabel(unit + (", higher is better" if metric == "rate" else ", lower is better"), fontsize=8)
        ax.set_xlabel(swept, fontsize=8)
        ax.set_title(title, fontsize=9, loc="left")
        ax.legend(fontsize=7, frameon=False)
    return figure


def draw_shares(comparisons: Sequence[Comparison]):
    """The share of its limit that each of our kernels reaches, and the best baseline beside it."""
    kernels = [c for found in by_suite(comparisons).values() for c in found if not c.is_sweep]
    cases = [c for c in kernels if c.figure(OURS) and c.share(OURS) is not None]
    if not cases:
        return None
    figure, (ax,) = _figure([1.1 + 0.34 * len(cases)])
    for y, c in enumerate(cases):
        share, rate = c.share(OURS), c.figure(OURS, "rate") or c.figure(OURS, "tokens_rate")
        ax.barh(y, share, 0.6, color=BLUE, label=OURS if y == 0 else None)
        _beside(ax, y, percent(share) + (f", {rate}" if rate else ""))
    points = [(c.share(c.best_baseline()), y) for y, c in enumerate(cases) if c.best_baseline()]
    points = [point for point in points if point[0] is not None]
    if points:
        shares, places = zip(*points, strict=True)
        ax.plot(shares, places, "D", color=ORANGE, mec="black", ms=6, label="best baseline", zorder=3)
    ax.axvline(1, color="black", lw=1.5, ls="--", label="limit, measured in the same run")
    ax.set_yticks(range(len(cases)), [f"{SUITES.get(c.suite, c.suite)}\n{c.case}" for c in cases], fontsize=7)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.05 * max([1.0, *(c.share(OURS) for c in cases), *(share for share, _ in points)]))
    ax.set_xlabel("share of the limit", fontsize=8)
    figure.legend(fontsize=7, frameon=False, loc="outside upper center", ncols=3)
    return figure


def draw_roofline(comparisons: Sequence[Comparison]):
    """Rates against operations per byte, below the roof of a large copy and of a large product.

    Cases whose limit is far below the roof are left out: they compute in a wider dtype.
    """
    copies = [c.figure(LIMITS_IMPL, "rate") for c in comparisons if (c.suite, c.case) == (LIMITS, "copy")]
    cases = [c for c in comparisons if c.figure(OURS, "intensity") and c.figure(OURS, "limit")]
    if not cases or not copies or copies[0] is None:
        return None
    slope, peak = copies[0].value / 1000, max(c.figure(OURS, "limit").value for c in cases)
    cases = [c for c in cases if c.figure(OURS, "limit").value > NEAR_ROOF * peak]
    figure, (ax,) = _figure([3.6])
    points = [(c, c.figure(OURS, "intensity").value) for c in cases]
    ridge = peak / slope
    places = [x for _, x in points]
    ends = min(0.5 * ridge, *places), max(4 * ridge, *places)
    ax.plot((ends[0], ridge, ends[1]), (slope * ends[0], peak, peak), color="black", lw=1.5, label="the roof")
    for impl_of, colour, mark, label in (
        (lambda c: c.best_baseline(), ORANGE, "D", "best baseline"),
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
            ax.barh(y, part.value, 0.7, left=start, color=BLUE if part.share_of_limit is not None else GREY)
            label = f"{number(part.value)} ms, {100 * part.value / whole:.0f} %"
            if part.share_of_limit is not None:
                ax.barh(y, part.value * part.share_of_limit, 0.3, left=start, color=ORANGE)
                label += f"; limit {number(part.value * part.share_of_limit)} ms"
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
