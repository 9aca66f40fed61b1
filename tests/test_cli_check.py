"""nvembed-fast check and nvembed-fast warm-up."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch

from nvembed_fast import NVEmbed, cli, ops, verdicts
from nvembed_fast.cli import check
from nvembed_fast.verdicts import Finding


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(a) for a in arguments])
    return status, *capsys.readouterr()


@pytest.fixture
def findings(monkeypatch):
    """`findings[operation, path] = reason` makes a check red. It plays the process that checks."""
    reasons: dict[tuple[str, str], str] = {}

    def check_anew(device, items, tell, *, path, timed, note):
        found = []
        for item in items:
            reason = reasons.get((item[0], path), "")
            found.append(Finding(*item, path, not reason, 0.5, 1.0, reason))
        if timed:
            for finding in found:
                note(finding)
            found = [dataclasses.replace(finding, time_ms=2.0, library_ms=3.0) for finding in found]
        for finding in found:
            tell(finding)
        return [], ""

    monkeypatch.setattr(verdicts, "check_anew", check_anew)
    return reasons


def test_the_real_check_passes_on_a_cpu_and_says_that_no_kernel_was_checked(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = ("check", "--device", "cpu", "--dtypes", "float32", "--operations", "geglu", "--json")
    status, printed, _ = run(capsys, *arguments)
    report = json.loads(printed)
    assert status == 0 and report["ok"] and report["device"].startswith("cpu: ")
    assert {"nvembed-fast", "Python", "torch"} <= set(report["versions"])
    rows = report["operations"]
    assert [(row["path"], row["direction"]) for row in rows] == [
        *(("library", d) for d in verdicts.DIRECTIONS),
        *(("torch", d) for d in verdicts.DIRECTIONS),
    ]
    for row in rows:
        assert {"name", "dtype", "direction", "path", "ok", "error", "tolerance", "reason"} <= set(row)
        assert row["name"] == "geglu" and row["ok"] and row["error"] <= row["tolerance"]
    kernels = report["kernels"]["float32"]
    assert not kernels["checked"] and kernels["auto"] == "torch" and "not on a GPU" in kernels["reason"]


def test_the_last_lines_say_what_auto_takes_where_no_kernel_was_checked(findings, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = ("check", "--device", "cpu", "--dtypes", "float32", "--operations", "geglu")
    status, printed, _ = run(capsys, *arguments)
    assert status == 0 and printed.endswith(
        "docs/numerics.md)\n  no kernel was checked in float32: there auto takes the path torch\n"
    )


def test_a_result_of_nan_is_null_in_json():
    row = check._row(Finding("geglu", "float32", "forward", "triton", False, float("nan"), 1.0, "NaN"))
    assert json.loads(json.dumps(row, allow_nan=False)) == row and (row["error"], row["tolerance"]) == (
        None,
        1,
    )


def test_with_the_interpreter_kernels_are_checked(findings, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dtypes = ("float16", "float32", "float64")
    status, printed, _ = run(capsys, "check", "--device", "cpu", "--dtypes", *dtypes)
    assert status == 0 and "no kernel is checked in float64: " in printed
    # forward and backward of eleven operations: kernels in two dtypes, and what stands in in the third
    assert printed.count("\ntriton ") == 44 and printed.count("\nlibrary ") == printed.count("\ntorch ") == 22
    assert "88 of 88 are right" in printed
    assert "no kernel was checked in float64" in printed and "checked in float16" not in printed


def test_a_red_operation_is_told_with_exit_status_1(findings, capsys, monkeypatch):
    findings["rotary", "triton"] = "ragged: output 0, max error 3 > 1"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = ("check", "--device", "cpu", "--dtypes", "float16", "--operations", "rotary", "swiglu")
    status, printed, _ = run(capsys, *arguments)
    assert status == 1 and "2 of 4 are right" in printed
    assert "WRONG rotary (triton, float16, forward): ragged: output 0, max error 3 > 1" in printed
    status, printed, _ = run(capsys, *arguments, "--json")
    report = json.loads(printed)
    assert status == 1 and not report["ok"]
    assert [row["ok"] for row in report["operations"]] == [False, False, True, True]


def test_what_was_not_decided_is_not_called_wrong():
    finding = Finding("rotary", "float16", "forward", "triton", False, reason="no disk", is_decided=False)
    assert "WRONG" not in check._line(finding)
    verdict = check._verdict([finding], {"kernels": {}})
    assert "0 of 1 are right" in verdict and "? rotary (triton, float16, forward): no disk" in verdict


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("nvembed_fast.placement.check_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setitem(ops._capabilities, 0, (9, 0))
    monkeypatch.setattr(verdicts, "facts", lambda device: {"driver": "13000"})


def test_what_waits_for_its_times_has_a_line_on_standard_error(findings, gpu, capsys):
    status, printed, told = run(capsys, "check", "--dtypes", "float16", "--operations", "rotary")
    _, *lines = told.splitlines()
    table = [line for line in printed.splitlines() if line.startswith("triton ")]
    assert status == 0 and len(lines) == 2
    assert table == [f"{line}  2.000 ms, library 3.000 ms" for line in lines]


def test_the_state_counts_what_waits_for_its_times(findings, gpu, capsys, monkeypatch):
    states, seen, check_anew = [], [], verdicts.check_anew

    def telling(state):
        states.append(state)
        return contextlib.nullcontext()

    def look(device, items, tell, **options):
        options["note"] = lambda finding, note=options["note"]: (note(finding), seen.append(states[0]()))
        return check_anew(device, items, lambda finding: (tell(finding), seen.append(states[0]())), **options)

    monkeypatch.setattr(check.process, "telling", telling)
    monkeypatch.setattr(verdicts, "check_anew", look)
    run(capsys, "check", "--dtypes", "float16", "--operations", "rotary", "--json")
    assert seen == [f"checked {count} of 4" for count in (1, 2, 2, 2, 3, 4)]


def test_on_a_gpu_kernels_are_timed_beside_the_library_path(findings, gpu, capsys):
    status, printed, told = run(capsys, "check", "--dtypes", "float16", "--operations", "rotary", "--json")
    report = json.loads(printed)
    assert status == 0 and report["versions"]["driver"] == "13000"
    # before any line of them comes
    assert told == "checking 2 kernels, several at once, then timing each alone\n"
    assert [(row["path"], row["time_ms"], row["library_ms"]) for row in report["operations"]] == [
        *[("triton", 2.0, 3.0)] * 2,
        *[("library", None, None)] * 2,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operations", "flash"], "no operation 'flash': there are flash_attention, "),
        (["--dtypes", "int8"], "dtype must be one of"),
        (["--device", "cuda:77"], "device 'cuda:77' is not there"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_checked(arguments, message, findings, capsys):
    status, printed, error = run(capsys, "check", *arguments)
    assert status == 1 and printed == "" and message in error


class Card:
    """A model whose scores are the published ones, and a bit."""

    def __init__(self, more: float):
        self.scores = np.array(check.SCORES["NV-Embed-v2"]) / 100 + more

    def encode_query(self, queries, task, output):
        assert queries == check.QUERIES and task == check.TASK
        return self.scores

    def encode_document(self, passages, output):
        assert passages == check.PASSAGES
        return np.eye(2)


@pytest.mark.parametrize(
    ("name", "more", "ok"),
    [
        ("NV-Embed-v2", 4e-4, True),
        ("NV-Embed-v2", 6e-4, False),
        ("NV-Embed-v1", 0, False),
        ("other", 0, None),
    ],
)
def test_the_scores_of_the_model_card_are_compared(name, more, ok, findings, capsys, monkeypatch):
    monkeypatch.setattr(NVEmbed, "from_pretrained", lambda path, **options: Card(more))
    arguments = ("check", "--device", "cpu", "--operations", "swiglu", "--model", f"nvidia/{name}")
    status, printed, _ = run(capsys, *arguments, "--json")
    report = json.loads(printed)
    assert (status == 0) == report["ok"] == (ok is not False) and report["model"]["ok"] is ok
    assert report["model"]["scores"][0][0] == pytest.approx(87.4269 + 100 * more)
    printed = run(capsys, *arguments)[1]
    assert ("WRONG scores: beyond 0.05" in printed) == (ok is False)
    assert ("not compared, because there are no published scores of 'other'" in printed) == (ok is None)


def test_the_directory_at_work_has_the_name_of_the_model_card(findings, tmp_path, capsys, monkeypatch):
    (tmp_path / "NV-Embed-v2").mkdir()
    monkeypatch.chdir(tmp_path / "NV-Embed-v2")
    monkeypatch.setattr(NVEmbed, "from_pretrained", lambda path, **options: Card(0))
    words = ("check", "--device", "cpu", "--operations", "swiglu", "--model", ".", "--json")
    assert json.loads(run(capsys, *words)[1])["model"]["ok"] is True


def test_a_real_model_is_encoded(tiny_directory, findings, capsys):
    arguments = ("check", "--device", "cpu", "--operations", "swiglu", "--model", tiny_directory, "--json")
    status, printed, _ = run(capsys, *arguments)
    model = json.loads(printed)["model"]
    assert status == 0 and model["ok"] is model["published"] is None and len(model["scores"]) == 2


def test_warm_up_on_a_cpu_says_that_there_is_nothing_to_compile(tiny_directory, capsys):
    status, printed, _ = run(capsys, "warm-up", tiny_directory, "--device", "cpu")
    assert status == 0
    assert printed == "nothing to compile: the operations take torch, because tensors are on the CPU\n"
    printed = run(capsys, "warm-up", tiny_directory, "--device", "cpu", "--impl", "library")[1]
    assert printed == "nothing to compile: the operations take library, because it was asked for\n"


def test_warm_up_trains_all_weights(tiny_directory, capsys, monkeypatch):
    called = []

    def warm_up(self, training):
        called.append((training, all(p.requires_grad for p in self.parameters())))
        return True

    monkeypatch.setattr(NVEmbed, "warm_up", warm_up)
    for options, wanted in (((), (False, False)), (("--training",), (True, True))):
        status, printed, _ = run(capsys, "warm-up", tiny_directory, "--device", "cpu", *options)
        assert status == 0 and "compiled in 0 s" in printed and called[-1] == wanted


def test_training_needs_weights_to_train(tiny_directory):
    model = NVEmbed.from_pretrained(tiny_directory, device="cpu")
    with pytest.raises(ValueError, match=r"needs weights to train: call requires_grad_\(\) first"):
        model.warm_up(training=True)
    assert model.warm_up() is False
