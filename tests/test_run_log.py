"""The log of a run: one line a step also after a resume, a picture, other loggers and progress."""

import errno
import json
import sys
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest

from nvembed_fast.training import run_log
from nvembed_fast.training.recipe import LogPart
from nvembed_fast.training.run_log import RunLog, draw, read_metrics

QUIET = LogPart(picture=False)


def metrics(step: int) -> dict[str, float]:
    return {"loss": 1 / step, "lr": 0.1, "tokens_per_s": 1234.5, "memory_gb": 2.0, "accuracy": 0.5}


def log_of(output, step=0, part=QUIET, said=None, steps=10) -> RunLog:
    say = (lambda line: None) if said is None else said.append
    return RunLog(output, part, step=step, steps=steps, settings={"seed": 3}, say=say)


def steps(output) -> list[int]:
    return [line["step"] for line in read_metrics(output / "metrics.jsonl")]


@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', '{"step": 6}'])
def test_no_step_is_doubled_or_lost_after_a_resume(tmp_path, tail):
    log = log_of(tmp_path)
    for step in range(1, 6):
        log.write(step, metrics(step))
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)  # the process was killed while it wrote
    log = log_of(tmp_path, step=3)
    assert steps(tmp_path) == [1, 2, 3]
    log.write(4, metrics(4))
    assert steps(tmp_path) == [1, 2, 3, 4], "a line is there at once"
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[3] == {"step": 4, **metrics(4)}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_evaluation_is_doubled_after_a_resume(tmp_path):
    log = log_of(tmp_path)
    for step in (2, 4):
        log.note(step, {"ndcg": step})
    log.close()
    log = log_of(tmp_path, step=3)
    log.note(4, {"ndcg": 5.0})
    log.close()
    found = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert found == [{"step": 2, "ndcg": 2}, {"step": 4, "ndcg": 5.0}]


@pytest.mark.parametrize("line", ['{"loss": 1}', "[1]", '{"step": "one"}', "loss 1"])
def test_a_file_of_metrics_that_is_of_no_run_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n' + line + "\n")
    with pytest.raises(
        ValueError, match=r"metrics.jsonl, line 2(: not JSON| is no line of a run, with a step)"
    ):
        log_of(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text().endswith(line + "\n"), "it is the user's"


def test_a_full_disk_is_named_and_hides_no_other_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    said = []
    log = log_of(tmp_path, part=LogPart(picture=True), said=said)
    log.write(1, metrics(1))
    monkeypatch.setattr(run_log, "draw", full)
    with pytest.raises(ValueError, match="of the run"), closing(log):
        log._file.close()
        log._file = SimpleNamespace(write=len, flush=full, close=full)
        with pytest.raises(OSError, match=r"cannot write .*metrics.jsonl \(No space left .* goes on from"):
            log.write(2, metrics(2))
        raise ValueError("of the run")
    assert said[-1].startswith("run.png was not drawn: ")


def test_progress_is_lines_where_there_is_no_terminal(tmp_path, monkeypatch):
    said, now = [], [0.0]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: now[0])
    log = log_of(tmp_path, said=said, steps=3000)
    for step in (1, 2, 3, 4):
        now[0] += 4
        log.write(step, metrics(step))
    log.close()
    assert said[0] == "step 1 of 3000: loss 1.0000, 1,234 tokens/s, 2.00 GB, 3 h 19 min left"
    assert len(said) == 2 and said[1].startswith("step 4 of 3000: loss 0.2500")
    log, said = log_of(tmp_path, step=2999, said=said, steps=3000), said
    log.write(3000, metrics(3000))
    log.close()
    assert said[-1].endswith("0 min 00 s left")


def test_a_picture_of_the_run(tmp_path):
    log = log_of(tmp_path, part=LogPart())
    for step in range(1, 9):
        log.write(step, metrics(step))
    log.close()
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "run.png").stat().st_size
    draw(tmp_path / "metrics.jsonl", tmp_path / "again.png")
    assert abs((tmp_path / "again.png").stat().st_size - before) < 2000 and before > 5000


def test_a_curve_is_the_mean_of_the_last_values():
    values = np.array([1.0, np.nan, 3.0, np.inf, np.nan, 8.0, 2.0])
    np.testing.assert_allclose(run_log._means(values, 2), [1, 1, 3, 3, np.nan, 8, 5])
    np.testing.assert_allclose(run_log._means(values, 50), [1, 1, 2, 2, 2, 4, 3.5])


def test_without_matplotlib_there_is_no_picture_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    log = log_of(tmp_path, part=LogPart())
    log.write(1, metrics(1))
    log.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_loggers_get_every_step_and_evaluation(tmp_path, monkeypatch):
    calls, names = [], []

    def fake(library: str) -> SimpleNamespace:
        return SimpleNamespace(
            init=lambda **options: (
                calls.append((library, "init", options["config"])) or names.append(options)
            ),
            log=lambda values, step: calls.append((library, step, values)),
            finish=lambda: calls.append((library, "finish")),
        )

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, fake(name))
    log = log_of(tmp_path, part=LogPart(picture=False, wandb=True, trackio=True), step=6)
    log.write(7, metrics(7))
    log.note(7, {"ndcg": 0.5})
    log.close()
    for name in ("wandb", "trackio"):
        own = [call[1:] for call in calls if call[0] == name]
        assert own == [("init", {"seed": 3}), (7, metrics(7)), (7, {"evaluation/ndcg": 0.5}), ("finish",)]
    assert json.loads((tmp_path / "evaluations.jsonl").read_text()) == {"step": 7, "ndcg": 0.5}
    # the same run where the directory was moved, and another one in a directory of the same name
    moved, other = tmp_path / "moved", tmp_path / "other" / tmp_path.name
    for directory in (moved, other):
        directory.mkdir(parents=True)
    (tmp_path / "run_id").rename(moved / "run_id")
    for directory in (moved, other):
        log_of(directory, part=LogPart(picture=False, wandb=True, trackio=True)).close()
    ids = [options["id"] for options in names[::2]]
    assert ids[0] == ids[1] != ids[2] and [options["name"] for options in names[1::2]] == [
        f"{tmp_path.name}-{ids[0]}",
        f"moved-{ids[0]}",
        f"{tmp_path.name}-{ids[2]}",
    ]


@pytest.mark.parametrize("library", ["tensorboard", "wandb", "trackio"])
def test_a_missing_logger_is_named_before_anything_is_written(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    part = LogPart(picture=False, **{library: True})
    with pytest.raises(ImportError, match=f"log.{library} needs {library}: pip install {library}, or leave"):
        log_of(tmp_path, part=part)
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_scalars_behind_the_checkpoint(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, *scalar):
            calls.append(scalar)

        def close(self):
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    log = log_of(tmp_path, part=LogPart(picture=False, tensorboard=True), step=6)
    log.write(7, metrics(7))
    log.close()
    scalars = [(name, value, 7) for name, value in metrics(7).items()]
    assert calls == [(str(tmp_path / "tensorboard"), 7), *scalars, "closed"]
