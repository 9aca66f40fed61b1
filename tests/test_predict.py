"""Predictions: the model's anchors, and the table of bench/NOTES.md that `tools/predict.py` makes."""

import re
from pathlib import Path

import pytest

from bench.baselines.encoders import ENCODERS
from bench.measure.results import FOLDER, OURS, Figure, Machine, ResultsFile
from bench.report import comparisons
from bench.report.tables import known_to_git
from bench.suites import Setting, benches
from tools import predict
from tools.predict import A100, H100, H200

ROOT = Path(__file__).resolve().parents[1]


def test_the_notes_hold_what_the_command_prints():
    table = predict.goals_table(comparisons.load(known_to_git(FOLDER)))
    page = predict.NOTES.read_text()
    assert page == predict.with_table(page, table), "run python -m tools.predict --write"


def test_predictions_are_marked_and_never_stand_in_the_readme():
    assert "| predicted (not measured) |" in predict.goals_table({})
    assert not re.search("predict", (ROOT / "README.md").read_text(), re.I)


# what the audit of the instructions gave, +-12 %
@pytest.mark.parametrize(
    ("gpu", "backward", "ahead", "audit"),
    [
        (H100, False, False, 0.70),
        (H100, False, True, 0.90),
        (H100, True, False, 0.73),
        (H100, True, True, 0.88),
        (H200, False, False, 0.66),
        (H200, False, True, 0.84),
        (H200, True, False, 0.67),
        (H200, True, True, 0.83),
    ],
)
def test_attention_is_predicted_as_the_audit_did(gpu, backward, ahead, audit):
    share, _ = predict.attention_shares(gpu, backward, ahead)
    assert share == pytest.approx(audit, rel=0.12)
    if (gpu, backward, ahead) == (H100, False, False):
        assert share == pytest.approx(audit, rel=0.005), "STALL is fitted to this one"


def test_programs_run_in_whole_rounds():
    # 16384 tokens make 31.03 rounds of attention programs on an H100, and 16896 make 32.0
    assert predict.rounds(H100, 4096) == pytest.approx(32 / 31.03, rel=1e-3)
    assert predict.rounds(H100, 4224) == 1.0
    per_token = [predict.attention_seconds(H100, (512,) * n) / n for n in (32, 33)]
    assert per_token[0] / per_token[1] == pytest.approx(32 / 31.03, rel=1e-3)


def test_published_facts_follow_from_one_another():
    for gpu in predict.GPUS:
        assert gpu.product < gpu.peak and gpu.copy < 1e12 * gpu.memory
    assert A100.clock == pytest.approx(1.41, abs=0.005) and H100.clock == H200.clock == pytest.approx(
        1.83, abs=0.005
    )
    # 7 billion weights in the backbone's products
    assert pytest.approx(13.96e9, rel=1e-3) == 2 * predict.LAYERS * predict.LAYER_WEIGHTS
    # no GPU reads 14 GB faster than its memory gives them
    assert predict.stock_seconds(H200, (50,), 1, moved=predict.EAGER) >= 13.96e9 / 4.8e12


def test_every_measured_cell_has_a_bench():
    suites = {part.suite for goal in predict.GOALS for part in goal.parts}
    cases = {suite: {bench.case for bench in benches(suite, Setting("cuda"))} for suite in suites}
    for part in (part for goal in predict.GOALS for part in goal.parts):
        assert part.case in cases[part.suite], part
        assert part.suite != "encode" or {part.ours, *part.theirs} <= set(ENCODERS), part


def _results(path: Path, gpu: str) -> Path:
    case, encode = "nvembed-4x4096 forward", ("encode", "all 512")
    figures = [
        *(
            Figure("flash_attention", case, impl, "time_p50", ms, "ms")
            for impl, ms in (
                (OURS, 2.0),
                ("SDPA cuDNN", 1.9),
                ("SDPA cuDNN, K and V repeated", 1.8),
                ("SDPA flash", 1.0),
            )
        ),
        Figure(*encode, OURS, "tokens_rate", 43000.0, "tokens/s", 0.86),
        *(
            Figure("rms_norm", "rms_norm nvembed-16k forward+backward", impl, metric, ms, "ms")
            for impl, times in ((OURS, (5.0, 1.0)), ("torch", (5.0, 2.5)))
            for metric, ms in zip(("time_p50", "backward"), times, strict=True)
        ),
        Figure("gated", "swiglu nvembed-16k forward", OURS, "skipped", None, "out of memory"),
    ]
    machine = Machine(gpu, "driver", "torch", "triton", "transformers", "commit", "command")
    ResultsFile(path, machine).add(figures)
    return path


def test_a_results_file_fills_its_cells_and_no_other(tmp_path, capsys):
    files = [_results(tmp_path / "a.csv", "NVIDIA H100"), _results(tmp_path / "b.csv", "CPU Some x2")]
    predict.main(["--results", *map(str, files)])
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]
    ]
    measured = {row[0]: row[4] for row in rows if row[4]}
    assert measured == {
        "attention forward, 4x4096 / 2x8192, rate against SDPA cuDNN": "NVIDIA H100: 0.90 / ?",
        "RMSNorm backward, times as fast as PyTorch, by the rows `backward`": "NVIDIA H100: 2.50",
        "encoder, all 512: time of its products / whole time": "NVIDIA H100: 0.86",
    }
    assert all("NVIDIA" not in row[3] for row in rows) and len(rows) == len(predict.GOALS)


def test_kernels_are_printed_with_their_time_on_every_gpu(capsys):
    predict.main(["--kernels"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].startswith(
        "| attention 4x4096 forward | 1100 |  | A100 37.93, H100 31.03, H200 31.03 | A100 "
    )
    assert sum("H200" in line for line in lines) == len(lines) - 2 == 8


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="NOTES.md needs the line <!-- predict:start -->"):
        predict.with_table("no markers", "table")
