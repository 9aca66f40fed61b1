"""What a run tells: a line of metrics.jsonl for each step, other loggers, a picture, and its progress.

A line is appended and stays. When a run goes on from the checkpoint of step s, the lines behind s go, so that
no step is in the file twice, and none is missing. `sync` puts the lines on the disk before a checkpoint is
there. The other loggers are told to continue at s and keep what they have.
"""

import json
import math
import os
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nvembed_fast import files
from nvembed_fast.texts import parse_json
from nvembed_fast.training.recipe import LogPart

__all__ = ["METRICS_FILE", "RunLog", "draw", "memory_gb", "read_metrics"]

METRICS_FILE, _EVALUATIONS_FILE, _PICTURE_FILE = "metrics.jsonl", "evaluations.jsonl", "run.png"
_RUN_ID_FILE = "run_id"
_TELL_EVERY_S = 10.0


class RunLog:
    """The log of one run, written by its first rank.

    Args:
        output: directory of the run.
        part: which loggers there are.
        step: steps done. Lines behind it are removed.
        steps: of the whole run.
        settings: of the run, for loggers that show them.
        say: takes a line of progress where standard error is no terminal.

    Raises:
        ImportError: a logger is not installed. The message names what to install.
    """

    def __init__(
        self,
        output: Path,
        part: LogPart,
        *,
        step: int,
        steps: int,
        settings: Mapping[str, Any],
        say: Callable[[str], None],
    ):
        self.output, self.steps, self._say, self._picture = output, steps, say, part.picture
        self._loggers = _loggers(output, part, step, settings)
        _cut(output / METRICS_FILE, step)
        if (output / _EVALUATIONS_FILE).exists():
            _cut(output / _EVALUATIONS_FILE, step)
        self._file = open(output / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        # None: on a terminal alone
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=None, dynamic_ncols=True)
        self._began, self._first, self._told = time.monotonic(), step, -math.inf

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the line of a step."""
        with _named(self.output / METRICS_FILE):
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        for log, _ in self._loggers:
            log(step, metrics)
        shown = f"loss {metrics['loss']:.4f}, {metrics['tokens_per_s']:,.0f} tokens/s"
        shown += f", {metrics['memory_gb']:.2f} GB"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(step - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and (now - self._told >= _TELL_EVERY_S or step == self.steps):
            left = (now - self._began) / (step - self._first) * (self.steps - step)
            self._say(f"step {step} of {self.steps}: {shown}, {_duration(left)} left")
            self._told = now

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Give an evaluation to the loggers, and append it to evaluations.jsonl (NaN and infinity: null)."""
        path = self.output / _EVALUATIONS_FILE
        with _named(path), open(path, "a", encoding="utf-8") as file:
            written = {name: value if math.isfinite(value) else None for name, value in values.items()}
            file.write(json.dumps({"step": step, **written}) + "\n")
        for log, _ in self._loggers:
            log(step, {f"evaluation/{name}": value for name, value in values.items()})
        self._say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def has_note(self, step: int) -> bool:
        """Whether there is an evaluation of a step."""
        return any(line["step"] == step for line in read_metrics(self.output / _EVALUATIONS_FILE))

    def sync(self) -> None:
        """Put the lines on the disk."""
        with _named(self.output / METRICS_FILE):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Draw the picture and end. An error of the run is not hidden by one of the log."""
        self._bar.close()
        with suppress(OSError):  # `write` has raised it
            self._file.close()
        for _, end in self._loggers:
            end()
        if self._picture and read_metrics(self.output / METRICS_FILE):
            try:
                draw(self.output / METRICS_FILE, self.output / _PICTURE_FILE)
            except ImportError:
                self._say(f"{_PICTURE_FILE} needs matplotlib: pip install 'nvembed-fast[train]'")
            except OSError as error:
                self._say(f"{_PICTURE_FILE} was not drawn: {error}")


@contextmanager
def _named(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"cannot write {file} ({reason}): the same command goes on from the last checkpoint"
        ) from error


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, without a last one that was cut off. ValueError if it is of no run."""
    if not file.exists():
        return []
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")[:-1], 1):
        values = parse_json(line, f"{file}, line {number}")
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            raise ValueError(
                f"{file}, line {number} is no line of a run, with a step: move the file away, or choose "
                "another output"
            )
        found.append(values)
    return found


def draw(metrics: Path, picture: Path) -> None:
    """Draw a run: loss, accuracy, cosines, gradient norm, learning rate and speed over the steps.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    panels = [["loss"], ["accuracy"], ["positive_cosine", "negative_cosine"], ["gradient_norm"], ["lr"]]
    panels = [[name for name in panel if name in lines[0]] for panel in [*panels, ["tokens_per_s"]]]
    panels = [panel for panel in panels if panel]
    figure = Figure(figsize=(12, 3 * math.ceil(len(panels) / 2)), layout="constrained")
    steps = [line["step"] for line in lines]
    window = max(1, len(lines) // 50)
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(math.ceil(len(panels) / 2), 2, place)
        for name in panel:
            values = np.array([line.get(name, math.nan) for line in lines])
            (curve,) = axes.plot(steps, values, alpha=0.3, linewidth=0.8)
            axes.plot(steps, _means(values, window), color=curve.get_color(), label=name.replace("_", " "))
        axes.set_xlabel("step")
        axes.legend(loc="best", frameon=False)
        axes.grid(alpha=0.3)
    with files.replacing(picture) as aside, open(aside, "wb") as file:
        FigureCanvasAgg(figure).print_png(file)


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of tensors on a GPU since the last call, and of the process on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _means(values: np.ndarray, window: int) -> np.ndarray:
    """Of each value and those before it in the window, without what is not finite. NaN where nothing is."""
    is_finite = np.isfinite(values)
    sums, counts = np.cumsum(np.where(is_finite, values, 0.0)), np.cumsum(is_finite)
    sums[window:], counts[window:] = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
    return np.divide(sums, counts, out=np.full(len(values), math.nan), where=counts > 0)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {seconds:02} s"


def _cut(file: Path, step: int) -> None:
    """Remove the lines behind a step, and a last line that was cut off."""
    kept = [json.dumps(line) + "\n" for line in read_metrics(file) if line["step"] <= step]
    with files.replacing(file) as aside:
        aside.write_text("".join(kept), encoding="utf-8")


def _loggers(
    output: Path, part: LogPart, step: int, settings: Mapping[str, Any]
) -> list[tuple[Callable[[int, Mapping[str, float]], None], Callable[[], Any]]]:
    """Functions of (step, metrics), each with the one that ends it.

    A run of wandb or trackio is known there by a random name, which stays in the directory and moves with it.
    """
    found: list[tuple[Callable[[int, Mapping[str, float]], None], Callable[[], Any]]] = []
    if part.tensorboard:
        _need("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

        def log(step: int, metrics: Mapping[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)

        found.append((log, writer.close))
    if part.wandb:
        wandb = _need("wandb")
        options = {"name": output.name, "dir": str(output), "config": dict(settings), "resume": "allow"}
        wandb.init(project="nvembed-fast", id=_run_id(output), **options)
        found.append((lambda step, metrics: wandb.log(dict(metrics), step=step), wandb.finish))
    if part.trackio:
        trackio = _need("trackio")
        name = f"{output.name}-{_run_id(output)}"
        trackio.init(project="nvembed-fast", name=name, config=dict(settings), resume="allow")
        found.append((lambda step, metrics: trackio.log(dict(metrics), step=step), trackio.finish))
    return found


def _run_id(output: Path) -> str:
    file = output / _RUN_ID_FILE
    if not file.exists():
        with files.replacing(file) as aside:
            aside.write_text(secrets.token_hex(8), encoding="utf-8")
    return file.read_text(encoding="utf-8")


def _need(library: str) -> Any:
    import importlib

    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ImportError(
            f"log.{library} needs {library}: pip install {library}, or leave the key out"
        ) from error
