"""The newest comparison of every case, from files of results.

1. Of every case on every GPU the newest comparison counts, as a whole. The figures of two runs were not taken
   in turns, so they are never compared with each other. What a run skipped does not come back from an older
   one. A comparison begins anew where a figure comes again, and where an implementation has both a time and a
   reason to have none.
2. An implementation that was skipped has no time, and is never the best baseline.
3. A figure without a row is "not measured".
"""

import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import results
from bench.measure.results import NOT_MEASURED, OURS, Figure

ORIGINAL = "original"
COMPILED_FOR = ("A100", "H100", "H200")
SUITES = {
    "encode": "Whole encoder",
    "train": "Training step",
    "latent_block": "Latent block",
    "flash_attention": "Attention",
    "latent_attention": "Latent attention, direct",
    "absorbed_latent_attention": "Latent attention, absorbed",
    "mean_pool": "Mean pool",
    "rms_norm": "RMSNorm",
    "rotary": "Rotary embeddings",
    "gated": "Gated activations",
    "masked_lse": "Scores of the loss",
}
PROFILE, LIMITS = "profile", "limits"
# "sweep-128x256 forward": 256 texts of 128 tokens; "direct sweep-64-latents forward"
SWEEP = re.compile(r"(.+ )?sweep-(\d+)(?:x\d+|-(\w+)) (.+)")


@dataclass(frozen=True)
class Comparison:
    """One case of one suite, as one run measured it.

    Attributes:
        run: the machine's columns without the command, and the date.
        impls: impl -> metric -> figure.
    """

    suite: str
    case: str
    run: dict[str, str]
    impls: dict[str, dict[str, Figure]]

    @property
    def metric(self) -> str:
        """The metric that decides which implementation is faster."""
        has_rate = any("texts_rate" in figures for figures in self.impls.values())
        return "texts_rate" if has_rate else "time_p50"

    @property
    def is_sweep(self) -> bool:
        return bool(SWEEP.fullmatch(self.case))

    def skipped(self, impl: str) -> str | None:
        """Why, or None."""
        figure = self.impls.get(impl, {}).get(results.SKIPPED)
        return figure.unit if figure else None

    def figure(self, impl: str, metric: str | None = None) -> Figure | None:
        """None where it was not measured, or is not to be shown. The default is the metric that decides."""
        figure = self.impls.get(impl, {}).get(metric or self.metric)
        if figure is None or figure.value is None:
            return None
        return figure if math.isfinite(figure.value) and figure.value > 0 else None

    def share(self, impl: str) -> float | None:
        """Of the limit, by the first figure that has one."""
        shares = (figure.share_of_limit for figure in self.impls.get(impl, {}).values())
        return next((share for share in shares if share is not None), None)

    def best_baseline(self) -> str | None:
        baselines = [i for i in self.impls if not i.startswith(OURS) and self.figure(i)]
        fastest = min if self.metric == "time_p50" else max
        return fastest(baselines, key=lambda i: self.figure(i).value, default=None)

    def factor(self, baseline: str | None, impl: str = OURS) -> float | None:
        """How many times as fast as `baseline` this project is, or another of its implementations."""
        ours, theirs = self.figure(impl), self.figure(baseline) if baseline else None
        if ours is None or theirs is None:
            return None
        return theirs.value / ours.value if self.metric == "time_p50" else ours.value / theirs.value


def load(paths: Iterable[Path]) -> dict[str, list[Comparison]]:
    """GPU -> the newest comparison of every case, GPUs before CPUs. The date of a file is in its name."""
    newest: dict[tuple, Comparison] = {}
    paths = sorted(paths, key=_date)
    for path in paths:
        if not _date(path) and any(map(_date, paths)):
            print(f"{path}: older than every file whose name ends in YYYY-MM-DD.csv", file=sys.stderr)
        for row in results.read(path):
            key = row["gpu"], row["suite"], row["case"]
            run = {name: row[name] for name in ("driver", "torch", "triton", "transformers", "commit")}
            run["date"] = _date(path) or "unknown"
            known = newest.get(key)
            found = known.impls.get(row["impl"], {}) if known else {}
            is_again = row["metric"] in found or (found and results.SKIPPED in (*found, row["metric"]))
            if known is None or known.run != run or is_again:
                newest[key] = Comparison(row["suite"], row["case"], run, {})
            value, share = _float(row["value"]), _share(row["share_of_limit"])
            names = row["suite"], row["case"], row["impl"], row["metric"]
            figure = Figure(*names, value, row["unit"], share)
            newest[key].impls.setdefault(figure.impl, {})[figure.metric] = figure
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


def percent(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{100 * share:.0f} %"


def values_of(comparisons: Iterable[Comparison], name: str) -> str:
    return ", ".join(sorted({c.run[name] for c in comparisons}))


def by_suite(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """Suite -> its comparisons, the known suites first, whether measured or not."""
    suites: dict[str, list[Comparison]] = {name: [] for name in SUITES}
    for comparison in comparisons:
        suites.setdefault(comparison.suite, []).append(comparison)
    return {name: found for name, found in suites.items() if name not in (PROFILE, LIMITS)}


def not_measured_gpus(gpus: Iterable[str]) -> str:
    """A sentence on the GPUs that the kernels are compiled for and that have no file, or empty."""
    gpus = list(gpus)
    names = [n for n in COMPILED_FOR if not any(re.search(rf"\b{n}\b", gpu) for gpu in gpus)]
    return f"{_and(names)}: compiled for, not measured." if names else ""


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
