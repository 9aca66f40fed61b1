"""Kept verdicts on kernels, and the processes that reach them. A script plays the process that checks."""

import dataclasses
import io
import json
import os
import threading
import time
import types
from unittest import mock

import filelock
import pytest
import torch

from nvembed_fast import files, self_check, verdicts
from nvembed_fast.verdicts import Finding

GPU = torch.device("cuda", 0)
ITEMS = [(name, "float16", "forward") for name in ("flash_attention", "rotary", "swiglu")]
# finds all items right, but runs `each` at every item, and then `rotary` at "rotary"
CHILD = """
import json, os, sys, time
from pathlib import Path
request = json.loads(sys.stdin.readline())
folder = Path({folder!r})
with open(folder / "pids", "a") as log:
    print(os.getpid(), file=log)
def tell(message):
    print(json.dumps(message), flush=True)
def pids():
    return [int(line) for line in (folder / "pids").read_text().split()]
def is_alone():
    return not any(os.path.exists(f"/proc/{{pid}}") for pid in pids() if pid != os.getpid())
def wait(condition):
    while not condition():
        time.sleep(0.01)
def begin(path="triton"):
    tell(dict(begun=[name, dtype, direction], path=path))
start, each, rotary = {start!r}, {each!r}, {rotary!r}
exec(start)
while tell(dict(ready=True)) or (line := sys.stdin.readline()):
    name, dtype, direction = json.loads(line)
    begin()
    found = dict(name=name, dtype=dtype, direction=direction, path="triton")
    found |= dict(ok=True, error=0.5, tolerance=1.0)
    exec(each)
    if name == "rotary":
        exec(rotary)
    tell(found)
"""


@pytest.fixture
def children(tmp_path, monkeypatch):
    """`children(start, each, rotary, count)` sets what a child runs first, at every item, and at "rotary".

    `count` are side by side. `.pids()` of all that were started, and the `.folder` in which they may write.
    """
    folder = tmp_path / "children"
    folder.mkdir()

    def play(start: str = "", each: str = "", rotary: str = "", count: int = 1) -> None:
        code = CHILD.format(folder=str(folder), start=start, each=each, rotary=rotary)
        monkeypatch.setattr(verdicts, "_CODE", code)
        monkeypatch.setattr(verdicts, "_num_children", lambda device: count)

    def pids() -> list[int]:
        log = folder / "pids"
        return [int(line) for line in log.read_text().split()] if log.exists() else []

    play.pids, play.folder = pids, folder
    monkeypatch.setenv("NVEMBED_FAST_CACHE", str(tmp_path / "cache"))
    properties = types.SimpleNamespace(name="a GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    play()
    return play


def _prove() -> dict[str, Finding]:
    found, why_here = verdicts.prove(GPU, ITEMS)
    assert why_here == ""
    return {name: finding for (name, *_), finding in found.items()}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_verdict_is_kept_and_read_again(children):
    children(rotary="found |= dict(ok=False, reason='wrong')")
    first = _prove()
    assert [finding.ok for finding in first.values()] == [True, False, True]
    assert first["rotary"].reason == "wrong"
    assert _prove() == first and len(children.pids()) == 1
    # what the file lacks is checked, and nothing else
    more = [*ITEMS, ("swiglu", "float16", "backward")]
    assert verdicts.prove(GPU, more)[0].keys() == set(more)
    assert len(children.pids()) == 2 and _prove() == first


CHANGES = {
    "gpu": lambda m: torch.cuda.get_device_properties(0).__dict__.update(name="another GPU"),
    "capability": lambda m: torch.cuda.get_device_properties(0).__dict__.update(minor=1),
    "driver": lambda m: m.setattr(verdicts, "_driver", lambda: "13000 580.1"),
    "torch": lambda m: m.setattr(torch, "__version__", "99.0"),
    "triton": lambda m: m.setattr(verdicts, "_version", lambda package: "99.0"),
    "compiler": lambda m: m.setenv("DISABLE_PTXAS_OPT", "1"),
    "sources": lambda m: m.setattr(verdicts, "_sources", lambda: "edited"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_verdict_is_not_reused_after_a_key_has_changed(key, children, monkeypatch):
    before = verdicts.facts(GPU)
    _prove()
    CHANGES[key](monkeypatch)
    after = verdicts.facts(GPU)
    assert [name for name in before if before[name] != after[name]] == [key]
    _prove()
    assert len(children.pids()) == 2
    assert set(CHANGES) == set(after), "a key without a test"


def test_the_interpreter_proves_no_kernel_of_a_gpu(monkeypatch):
    seen = set()
    for value in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        seen.add(verdicts._compiler(90))
    assert len(seen) == 2


def test_another_ptxas_and_its_options_are_another_compiler(monkeypatch, tmp_path):
    from triton.backends.nvidia.compiler import get_ptxas_version

    ptxas = tmp_path / "ptxas"
    ptxas.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.1, V13.1.80\n")
    ptxas.chmod(0o755)
    seen = [verdicts._compiler(90)]
    monkeypatch.setenv("PTXAS_OPTIONS", "--opt-level 1")
    seen.append(verdicts._compiler(90))
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(ptxas))
    get_ptxas_version.cache_clear()
    seen.append(verdicts._compiler(90))
    monkeypatch.undo()
    get_ptxas_version.cache_clear()
    assert len(set(seen)) == 3 and "13.1.80" in seen[2] and verdicts._compiler(90) == seen[0]
    assert "unknown" not in seen[0]


@pytest.mark.parametrize("file", ["kernels/gated.py", "kernels/tuned.toml", "self_check.py"])
def test_an_edited_kernel_or_case_is_another_source(file, tmp_path, monkeypatch):
    for name in ("kernels/gated.py", "kernels/tuned.toml", "self_check.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("as it was")
    monkeypatch.setattr(verdicts, "__file__", str(tmp_path / "verdicts.py"))
    before = verdicts._sources()
    assert before == verdicts._sources()
    (tmp_path / file).write_text("edited")
    assert before != verdicts._sources()


ENDS = [
    ("sys.exit(3)", "its process ended with status 3"),
    ("raise RuntimeError('no such instruction')", "status 1: RuntimeError: no such instruction"),
    ("os.kill(os.getpid(), 11)", "its process was ended by SIGSEGV"),
    ("time.sleep(60)", "it did not end within 1 s"),
    ("os.close(1); time.sleep(60)", "it closed its output and did not end within 1 s"),
    # an error of CUDA that stays: told, then the process ends
    ("tell(found | dict(ok=False, reason='illegal access')); sys.exit(1)", "illegal access"),
]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("end", "reason"), ENDS, ids=["exit", "raise", "kill", "hang", "closed", "context"])
def test_an_operation_that_ends_its_process_is_marked_and_the_others_are_checked(
    end, reason, count, children, monkeypatch
):
    monkeypatch.setattr(verdicts, "ITEM_SECONDS", 1.0)
    children(rotary=end, count=count)
    found = _prove()
    assert [finding.ok for finding in found.values()] == [True, False, True]
    assert reason in found["rotary"].reason
    if count == 1:
        assert len(children.pids()) == 2
    assert not any(map(_is_alive, children.pids()))
    started = children.pids()
    assert _prove() == found and children.pids() == started, "it is kept, too"


def test_items_are_checked_side_by_side(children, monkeypatch):
    """Each waits for all the others."""
    monkeypatch.setattr(verdicts, "ITEM_SECONDS", 10.0)
    children(each="(folder / name).touch(); wait(lambda: len(list(folder.iterdir())) == 4)", count=3)
    assert all(finding.ok for finding in _prove().values()) and len(children.pids()) == 3


def test_the_others_go_on_while_one_hangs(children, monkeypatch):
    monkeypatch.setattr(verdicts, "ITEM_SECONDS", 2.0)
    # the last problems of the neighbour come after the end of the one that hangs
    problems = "if name == 'geglu':\n  for _ in range(8): begin(); time.sleep(0.4)"
    children(each=problems, rotary="time.sleep(60)", count=2)
    items = [(name, "float16", "forward") for name in ("rotary", "swiglu", "rms_norm", "geglu")]
    found, why_here = verdicts.prove(GPU, items)
    assert why_here == "" and [item for item in items if not found[item].ok] == items[:1]
    assert "did not end within 2 s" in found[items[0]].reason
    assert len(children.pids()) == 2, "another process was needed for the rest"


def test_what_compiles_longest_comes_first_and_is_told_in_the_order_of_the_items(children):
    children(each="with open(folder / 'begun', 'a') as log: print(name, file=log)")
    names = ["swiglu", "masked_lse", "rotary", "latent_attention", "flash_attention"]
    items = [(name, "float16", "forward") for name in names]
    told = []
    findings, _ = verdicts.check_anew(GPU, items, told.append)
    assert [finding.item for finding in findings] == items and told == findings
    begun = (children.folder / "begun").read_text().split()
    assert begun == ["flash_attention", "latent_attention", "masked_lse", "swiglu", "rotary"]


def test_a_finding_is_told_as_soon_as_those_before_it_are(children, monkeypatch):
    """The last one waits until the first two were told."""
    monkeypatch.setattr(verdicts, "ITEM_SECONDS", 10.0)
    children(each="wait(lambda: name != 'swiglu' or (folder / 'told').exists())", count=3)
    told = []

    def tell(finding):
        told.append(finding.item)
        if len(told) == 2:
            (children.folder / "told").touch()

    findings, _ = verdicts.check_anew(GPU, ITEMS, tell)
    assert told == ITEMS and all(finding.ok for finding in findings)


def test_what_finds_no_memory_beside_others_is_checked_alone(children, monkeypatch):
    children(
        start="is_alone = len(pids()) > 3",
        each="wait(lambda: len(pids()) >= 3)",
        rotary="found |= dict(ok=is_alone, is_decided=is_alone, lacks_memory=not is_alone)",
        count=3,
    )
    monkeypatch.setattr(self_check, "run", None)
    assert all(finding.ok for finding in _prove().values()) and len(children.pids()) == 4


def test_one_process_alone_times_what_the_others_found_right(children):
    children(
        start="wait(lambda: len(pids()) >= 3)",
        each="if request['timed']:\n"
        "    time.sleep(0.5)\n"  # another one would have started
        "    assert is_alone() and name != 'rotary'\n"
        "    found |= dict(error=None, tolerance=None, time_ms=1.0, library_ms=2.0)",
        rotary="found |= dict(ok=False, reason='wrong')",
        count=3,
    )
    told = []
    findings, why_here = verdicts.check_anew(GPU, ITEMS, told.append, timed=True)
    assert told == findings and why_here == "" and len(children.pids()) == 4
    rows = [(f.name, f.ok, f.error, f.time_ms, f.library_ms) for f in findings]
    assert rows == [
        ("flash_attention", True, 0.5, 1.0, 2.0),
        ("rotary", False, 0.5, None, None),
        ("swiglu", True, 0.5, 1.0, 2.0),
    ]


def test_a_kernel_that_ends_the_process_that_times_it_is_marked(children):
    children(rotary="if request['timed']: sys.exit(3)", count=3)
    findings, _ = verdicts.check_anew(GPU, ITEMS, lambda finding: None, timed=True)
    assert [finding.ok for finding in findings] == [True, False, True]
    assert findings[1].reason == "its process ended with status 3"


@pytest.mark.parametrize(
    "end",
    ["sys.exit(3)", "raise RuntimeError('no such product')", "time.sleep(60)"],
    ids=["exit", "raise", "hang"],
)
def test_a_library_path_that_ends_the_process_that_times_it_leaves_the_kernel_right(
    end, children, monkeypatch
):
    monkeypatch.setattr(verdicts, "ITEM_SECONDS", 1.0)
    times = "if request['timed']: found |= dict(time_ms=1.0, library_ms=2.0)"
    children(each=times, rotary=f"if request['timed']: begin('library'); {end}")
    findings, _ = verdicts.check_anew(GPU, ITEMS, lambda finding: None, timed=True)
    assert [finding.ok for finding in findings] == [True, True, True] and findings[1].error == 0.5
    assert [finding.time_ms for finding in findings] == [1.0, None, 1.0]
    started = children.pids()
    assert _prove()["rotary"].ok and children.pids() == started, "it is kept"


def test_findings_are_noted_and_kept_before_the_first_is_timed(children):
    children(rotary="found |= dict(ok=False, reason='wrong')", count=3)
    noted, told = [], []

    def interrupt(finding):
        told.append(finding)
        assert len(noted) == 3
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verdicts.check_anew(GPU, ITEMS, interrupt, timed=True, note=noted.append)
    assert len(told) == 1
    assert {finding.item: finding.ok for finding in noted} == dict(
        zip(ITEMS, (True, False, True), strict=True)
    )
    started = children.pids()
    assert {finding.item: finding for finding in noted} == verdicts.prove(GPU, ITEMS)[0]
    assert children.pids() == started


def test_what_was_checked_in_this_process_is_kept_and_then_timed_there(children, monkeypatch):
    children(start="sys.exit('the GPU is taken')")
    monkeypatch.setattr(
        self_check, "run", lambda items, *_: (Finding(*item, "triton", True, 0.5, 1.0) for item in items)
    )

    def with_times(finding, device):
        (file,) = (files.cache_folder() / "self_check").glob("*.json")
        assert len(json.loads(file.read_text())["findings"]) == 3
        return dataclasses.replace(finding, time_ms=1.0, library_ms=2.0)

    monkeypatch.setattr(self_check, "with_times", with_times)
    told = []
    findings, why_here = verdicts.check_anew(GPU, ITEMS, told.append, timed=True)
    assert "the GPU is taken" in why_here and len(children.pids()) == 1
    assert told == findings and [finding.time_ms for finding in findings] == [1.0] * 3


def test_when_the_time_is_up_nothing_is_timed(children, monkeypatch):
    monkeypatch.setattr(verdicts, "ALL_SECONDS", 0.0)
    monkeypatch.setattr(verdicts, "ITEM_SECONDS", 1.0)
    children(rotary="time.sleep(60)")
    told = []
    findings, _ = verdicts.check_anew(GPU, ITEMS, told.append, timed=True)
    assert told == findings and [finding.ok for finding in findings] == [True, False, False]
    assert len(children.pids()) == 1


ENDS_AT_ONCE = {
    # as on a GPU in exclusive mode
    "as it starts": "sys.exit('the GPU is taken')",
    "with an item that it has not begun": "tell(dict(ready=True)); sys.stdin.readline(); sys.exit(3)",
}


@pytest.mark.parametrize("when", ENDS_AT_ONCE)
def test_processes_that_end_at_once_beside_one_that_checks_are_done_without(when, children, monkeypatch):
    start = "try: (folder / 'GPU').mkdir(); wait(lambda: len(pids()) == 3 and is_alone())\n"
    children(start=f"{start}except FileExistsError: {ENDS_AT_ONCE[when]}", count=3)
    monkeypatch.setattr(self_check, "run", None)
    assert all(finding.ok for finding in _prove().values()) and len(children.pids()) == 3


def test_where_all_die_beside_each_other_one_alone_checks(children, monkeypatch):
    """As on a GPU that has memory for one context more."""
    children(start="if len(pids()) <= 3: sys.exit('no memory for a context')", count=3)
    monkeypatch.setattr(self_check, "run", None)
    assert all(finding.ok for finding in _prove().values()) and len(children.pids()) == 4


@pytest.fixture
def started(monkeypatch):
    """The processes that were started."""
    processes, popen = [], verdicts.subprocess.Popen

    def start(command, **options):
        process = popen(command, **options)
        if "-c" in command:  # ptxas is no child
            processes.append((process, options["stderr"]))
        return process

    monkeypatch.setattr(verdicts.subprocess, "Popen", start)
    return processes


def test_a_thread_that_the_system_refuses_leaves_no_process_behind(children, started, monkeypatch):
    monkeypatch.setattr(
        threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread"))
    )
    monkeypatch.setattr(
        self_check, "run", lambda items, *_: (Finding(*item, "triton", True) for item in items)
    )
    found, why_here = verdicts.prove(GPU, ITEMS)
    assert all(finding.ok for finding in found.values())
    assert why_here == "no thread can be started: can't start new thread"
    assert [(process.returncode, errors.closed) for process, errors in started] == [(-9, True)]


@pytest.mark.parametrize("where", ["_Child._say", "threading.Thread.start"])
def test_ctrl_c_while_a_process_starts_leaves_none_behind(where, children, started, monkeypatch):
    owner, name = {"_Child._say": (verdicts._Child, "_say")}.get(where, (threading.Thread, "start"))
    monkeypatch.setattr(owner, name, mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        verdicts.prove(GPU, ITEMS)
    assert [(process.returncode, errors.closed) for process, errors in started] == [(-9, True)]


def test_a_file_that_the_system_refuses_is_no_error(children, monkeypatch):
    refuse = mock.Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(verdicts.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(
        self_check, "run", lambda items, *_: (Finding(*item, "triton", True) for item in items)
    )
    assert verdicts.prove(GPU, ITEMS)[1] == "no process can be started: No space left on device"


def test_where_one_process_alone_can_be_started_it_checks_all(children, monkeypatch):
    children(count=3)
    started, popen = [], verdicts.subprocess.Popen

    def start(*args, **options):
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(popen(*args, **options))
        return started[0]

    facts = verdicts.facts(GPU)  # asks ptxas
    monkeypatch.setattr(verdicts, "facts", lambda device: facts)
    monkeypatch.setattr(verdicts.subprocess, "Popen", start)
    monkeypatch.setattr(self_check, "run", None)
    assert all(finding.ok for finding in _prove().values()) and len(started) == 1


def test_as_many_processes_as_cpus_that_this_one_may_use(monkeypatch):
    for cpus, count in ((1, 1), (3, 3), (64, verdicts.MAX_CHILDREN)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: set(range(cpus)))
        assert verdicts._num_children(GPU) == count
    # the products of a CPU take all cores
    assert verdicts._num_children(torch.device("cpu")) == 1


def test_the_first_use_says_what_it_waits_for_and_the_next_is_silent(children, capsys):
    _prove()
    (line,) = capsys.readouterr().err.splitlines()
    folder = files.cache_folder() / "self_check"
    assert "checking 3 kernels on this GPU (a GPU)" in line and f"kept in {folder}" in line
    _prove()
    assert capsys.readouterr().err == ""


def test_the_limit_is_for_one_problem_and_not_for_all_of_an_operation(children, monkeypatch):
    """Each problem is told to begin, as `self_check.main` does."""
    monkeypatch.setattr(verdicts, "ITEM_SECONDS", 2.0)
    children(rotary="for _ in range(4): begin(); time.sleep(0.7)")
    assert all(finding.ok for finding in _prove().values()) and len(children.pids()) == 1


def test_nothing_waits_for_a_process_that_has_told_all(children):
    children(start="import atexit; atexit.register(time.sleep, 60)")
    started = time.monotonic()
    assert all(finding.ok for finding in _prove().values())
    assert time.monotonic() - started < 30 and not any(map(_is_alive, children.pids()))


def test_when_the_time_is_up_the_rest_counts_as_not_checked(children, monkeypatch):
    monkeypatch.setattr(verdicts, "ALL_SECONDS", 0.0)
    monkeypatch.setattr(verdicts, "ITEM_SECONDS", 1.0)
    children(rotary="time.sleep(60)")
    found = _prove()
    assert [finding.ok for finding in found.values()] == [True, False, False]
    assert "no time was left" in found["swiglu"].reason
    monkeypatch.setattr(verdicts, "ALL_SECONDS", 60.0)
    children()
    assert all(finding.ok for finding in _prove().values()), "nothing is kept of what was not checked"


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("start", ["sys.exit('CUDA is busy')", "time.sleep(60)", "no python at all ("])
def test_where_no_child_can_check_this_process_does_and_says_why(start, count, children, monkeypatch):
    monkeypatch.setattr(verdicts, "START_SECONDS", 1.0)
    children(start=start, count=count)
    checked = []

    def run(items, device, path):
        checked.extend(items)
        return (Finding(*item, path, True, 0.0, 1.0) for item in items)

    monkeypatch.setattr(self_check, "run", run)
    found, why_here = verdicts.prove(GPU, ITEMS)
    assert checked == ITEMS and all(finding.ok for finding in found.values())
    assert {"sys": "CUDA is busy", "tim": "did not end within 1 s", "no ": "SyntaxError"}[
        start[:3]
    ] in why_here
    # the last one had tried alone
    assert verdicts.prove(GPU, ITEMS) == (found, "") and len(children.pids()) == count + (count > 1)


def test_a_program_without_an_interpreter_checks_in_its_own_process(children, monkeypatch):
    monkeypatch.setattr("sys.executable", "")
    monkeypatch.setattr(
        self_check, "run", lambda items, *_: (Finding(*item, "triton", True) for item in items)
    )
    assert "no Python interpreter" in verdicts.prove(GPU, ITEMS)[1]


def test_what_lacks_memory_is_tried_here_and_not_kept(children, monkeypatch):
    children(rotary="found |= dict(ok=False, reason='no memory', is_decided=False, lacks_memory=True)")
    tried = []

    def run(items, device, path):
        tried.append(list(items))
        return (Finding(*item, path, False, reason="no memory", is_decided=False) for item in items)

    monkeypatch.setattr(self_check, "run", run)
    found, why_here = verdicts.prove(GPU, ITEMS)
    assert why_here == "no memory" and tried == [[ITEMS[1]]] and not found[ITEMS[1]].ok
    verdicts.prove(GPU, ITEMS)
    assert len(tried) == 2


UNDECIDED = {
    "told": ("found |= dict(ok=False, reason='no C compiler', is_decided=False)", "no C compiler"),
    "killed": ("os.kill(os.getpid(), 9)", "its process was ended by SIGKILL"),
    "ended": ("os.kill(os.getpid(), 15)", "its process was ended by SIGTERM"),
}


@pytest.mark.parametrize("how", UNDECIDED)
def test_what_the_machine_is_to_blame_for_is_not_kept_and_not_tried_here(how, children, monkeypatch):
    """What the system killed for its memory could take this process with it."""
    rotary, reason = UNDECIDED[how]
    children(rotary=rotary)
    monkeypatch.setattr(self_check, "run", None)
    found = _prove()
    assert [finding.ok for finding in found.values()] == [True, False, True]
    assert found["rotary"].reason == reason and not found["rotary"].is_decided
    started = len(children.pids())
    children()
    assert _prove()["rotary"].ok and len(children.pids()) == started + 1
    # nor does it replace what is known
    children(rotary=rotary)
    verdicts.check_anew(GPU, ITEMS, lambda finding: None)
    started = len(children.pids())
    assert _prove()["rotary"].ok and len(children.pids()) == started


def test_a_kernel_whose_timing_the_system_killed_stays_right(children):
    children(rotary="if request['timed']: os.kill(os.getpid(), 9)")
    findings, _ = verdicts.check_anew(GPU, ITEMS, lambda finding: None, timed=True)
    assert [finding.ok for finding in findings] == [True, True, True] and findings[1].time_ms is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"facts": {}}', "NAN", "KEYS"])
def test_a_damaged_file_is_checked_anew(content, children):
    first = _prove()
    (path,) = (files.cache_folder() / "self_check").glob("*.json")
    kept = path.read_text()
    path.write_text(
        {"NAN": kept.replace("0.5", "NaN"), "KEYS": kept.replace('"ok"', '"fine"')}.get(content, content)
    )
    assert _prove() == first and len(children.pids()) == 2
    assert path.read_text() == kept


@pytest.mark.parametrize("folder", ["file/below", "file"])
def test_a_folder_that_cannot_be_written_is_no_error(folder, children, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NVEMBED_FAST_CACHE", str(tmp_path / folder))
    assert _prove() == _prove() and len(children.pids()) == 2


def test_one_of_several_processes_checks_and_the_others_wait_for_it(children):
    _prove()
    (path,) = (files.cache_folder() / "self_check").glob("*.json")
    kept = path.read_text()
    path.unlink()
    held, found = filelock.FileLock(f"{path}.lock"), []
    with held:  # as another process that checks
        waiting = threading.Thread(target=lambda: found.append(_prove()))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        path.write_text(kept)
    waiting.join(20)
    assert len(found) == 1 and len(children.pids()) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_ctrl_c_leaves_no_process_behind(count, children, monkeypatch):
    children(rotary="time.sleep(60)", count=count)
    told = []

    def interrupt(finding):
        told.append(finding)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verdicts.check_anew(GPU, ITEMS, interrupt)
    assert len(told) == 1 and not any(map(_is_alive, children.pids()))
    assert len(_prove_again(children)) == 3, "nothing is locked"


def _prove_again(children):
    children()
    return _prove()


def test_check_anew_asks_no_file_and_replaces_it(children):
    children(rotary="found |= dict(ok=False, reason='wrong', time_ms=1.0)")
    _prove()
    children()
    told = []
    findings, _ = verdicts.check_anew(GPU, ITEMS, told.append)
    assert [finding.ok for finding in findings] == [True] * 3 and told == findings
    assert _prove()["rotary"].ok and len(children.pids()) == 2


def test_a_forked_process_is_not_locked_out(children):
    with verdicts._turn:  # as a thread that checks while another one forks
        pid = os.fork()
        if pid == 0:
            os._exit(0 if verdicts._turn.acquire(timeout=5) else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_path_among_the_strings_of_sys_path_is_skipped(children, monkeypatch, tmp_path):
    """A notebook appends `Path.cwd().parent`."""
    monkeypatch.setattr("sys.path", [*verdicts.sys.path, tmp_path, "the last"])
    children(each="found['reason'] = json.loads(sys.argv[1])[-1]")
    assert _prove()["rotary"].reason == "the last"


def test_a_process_that_the_system_does_not_end_is_left(children, started, monkeypatch):
    """As one in an uninterruptible state, which SIGKILL reaches later. Its pipes stay open."""
    monkeypatch.setattr(verdicts, "ITEM_SECONDS", 1.0)
    monkeypatch.setattr(verdicts, "END_SECONDS", 0.5)
    kill = os.killpg
    monkeypatch.setattr(os, "killpg", lambda *_: None)
    children(rotary="time.sleep(60)")
    begun = time.monotonic()
    found = _prove()
    seconds = time.monotonic() - begun
    for process, _ in started:
        kill(process.pid, 9)
        process.wait()
    assert [finding.ok for finding in found.values()] == [True, False, True]
    assert "did not end within 1 s" in found["rotary"].reason and seconds < 30


@pytest.mark.parametrize("timed", [False, True])
def test_the_real_child_answers(timed, monkeypatch, tmp_path):
    """From a checkout that is not installed, in any folder. Off a GPU it is the interpreter's kernel."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    item = ("swiglu", "float32", "forward")
    (finding,), why_here = verdicts.check_anew(torch.device("cpu"), [item], lambda _: None, timed=timed)
    assert why_here == "" and finding.item == item and finding.ok and finding.path == "triton"
    assert 0 < finding.error <= finding.tolerance


def test_a_child_that_sees_another_gpu_checks_nothing(monkeypatch, capsys):
    request = {"device": "cuda:0", "facts": {"gpu": "ours"}, "seconds": 60}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(request) + "\n"))
    monkeypatch.setattr(self_check, "facts", lambda device: {"gpu": "another"})
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(self_check.os, "dup2", lambda *_: None)
    monkeypatch.setattr(self_check.signal, "alarm", lambda seconds: None)
    monkeypatch.setattr(self_check, "_receive", lambda items: None)
    with pytest.raises(SystemExit, match="sees another GPU"):
        self_check.main()
