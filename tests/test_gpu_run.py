"""tools/gpu_run.py with slices that are no GPU's, and the checks of tools/gpu_checks.py on small cases."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_layering import KERNELS

from bench.measure import results
from nvembed_fast import graphs, ops
from nvembed_fast.kernels import tuned
from nvembed_fast.network.model import NVEmbedModel
from tools import gpu_checks, gpu_run, host_time
from tools.gpu_run import Slice

ROOT = Path(__file__).resolve().parents[1]


def python(name, code, minutes=0.01, **more):
    return Slice(name, ("{python}", "-c", code), minutes, **more)


def run(out, todo, *options):
    return gpu_run.main([str(out), "--commit", "abc", *options], todo)


def statuses(out):
    state = json.loads((out / "state.json").read_text())
    return {name: end["status"] for name, end in state["slices"].items()}


def test_every_slice_has_its_line_and_the_next_one_runs_after_a_failure(tmp_path, capsys):
    todo = [
        python("good", "print('all is well')"),
        python("bad", "raise SystemExit('no kernel')"),
        python("last", "print('still here')"),
        python("tool", "print('never')", needs="no-such-program"),
    ]
    assert run(tmp_path, todo) == 1
    assert statuses(tmp_path) == {"good": "passed", "bad": "failed", "last": "passed", "tool": "skipped"}
    out, log = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    for text in ("all is well", "no kernel", "still here"):
        assert text in out and text in log
    assert "never" not in log.replace("print('never')", "")
    assert "failed: bad" in out and "nothing is left" in out


def test_a_second_call_goes_on_where_the_first_one_stopped(tmp_path, capsys):
    todo = [python(name, f"open({str(tmp_path / 'count')!r}, 'a').write({name!r})") for name in "abc"]
    assert run(tmp_path, todo, "--only", "b") == 0
    assert run(tmp_path, todo) == 0 == run(tmp_path, todo)
    assert (tmp_path / "count").read_text() == "bac"
    assert run(tmp_path, todo, "--only", "c", "--again") == 0
    assert (tmp_path / "count").read_text() == "bacc"


def test_a_call_starts_no_slice_that_would_end_too_late(tmp_path, capsys):
    todo = [python("a", "pass", minutes=5), python("b", "pass", minutes=5), python("c", "pass", minutes=1)]
    assert run(tmp_path, todo, "--minutes", "4") == 0
    assert statuses(tmp_path) == {"a": "passed"}, "the first slice of a call always starts"
    assert "left: 2 slices, about 6 minutes" in capsys.readouterr().out


def until(is_there):
    end = time.monotonic() + 60
    while not is_there():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def limit(monkeypatch):
    """The time limit of a slice that has a condition passes when the condition holds, on any machine."""
    conditions = {}

    class Child(subprocess.Popen):
        def wait(self, timeout=None):
            condition = conditions.pop(self.args[2], None)
            if condition is None:
                return super().wait(timeout)
            until(condition)
            raise subprocess.TimeoutExpired(self.args, timeout)

    def limit(one, condition):
        conditions[one.command[2]] = condition
        return one

    monkeypatch.setattr(gpu_run.subprocess, "Popen", Child)
    monkeypatch.setattr(gpu_run, "GRACE", 0.5)
    return limit


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_slice_ends_at_its_time_limit_with_all_that_it_started(tmp_path, limit):
    pid_file = tmp_path / "pid"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"print('begun', flush=True); open({str(pid_file)!r}, 'w').write(f'{{p.pid}}.'); time.sleep(600)"
    )
    endless = limit(python("endless", code), lambda: pid_file.exists() and "." in pid_file.read_text())
    assert run(tmp_path / "out", [endless, python("next", "pass")]) == 1
    assert statuses(tmp_path / "out") == {"endless": "timed out", "next": "passed"}
    assert "begun" in (tmp_path / "out" / "log.txt").read_text()
    until(lambda: not is_running(pid_file.read_text().rstrip(".")))


HEADER = ",".join(results.COLUMNS)
# a bench that measures a case a call, and none without a number of cases
MEASURES = """
import pathlib, sys, time
path, count, ending = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
again = sys.argv[4:]
text = path.read_text() if path.exists() else HEADER
done = text.count("case") - 1
path.write_text(text + ("case,," + str(again) + NEWLINE if done < count else ""))
print("done", flush=True)
if ending == "late" and done + 1 < count or not count:
    sys.exit(75)
if ending == "endless":
    time.sleep(600)
"""


def bench(name, count, ending="late"):
    code = MEASURES.replace("HEADER", repr(HEADER + "\n")).replace("NEWLINE", repr("\n"))
    command = ("{python}", "-c", code, "{results}", str(count), ending)
    return Slice(name, command, 0.01, goes_on=True)


def rows(out):
    [path] = out.glob("results-????-??-??.csv")
    return results.read(path)


def test_a_bench_that_left_cases_goes_on_until_a_call_adds_no_row(tmp_path, capsys):
    todo = [python("a", "pass"), bench("b", 2), bench("stuck", 0), python("c", "pass")]
    assert run(tmp_path, todo[:2]) == 0
    assert statuses(tmp_path) == {"a": "passed"}
    assert "left: 1 slices" in capsys.readouterr().out
    assert run(tmp_path, todo) == 1
    assert statuses(tmp_path) == {"a": "passed", "b": "passed", "stuck": "failed", "c": "passed"}
    assert len(rows(tmp_path)) == 2 and "nothing is left" in capsys.readouterr().out


def test_a_bench_goes_on_after_its_time_limit_if_it_has_added_rows(tmp_path, limit, capsys):
    todo = [bench("b", 1, "endless")]
    log = tmp_path / "log.txt"
    limit(todo[0], lambda: log.read_text().count("\ndone\n") == 1)
    assert run(tmp_path, todo) == 0 and statuses(tmp_path) == {} and len(rows(tmp_path)) == 1
    assert "left: 1 slices" in capsys.readouterr().out
    limit(todo[0], lambda: log.read_text().count("\ndone\n") == 2)
    assert run(tmp_path, todo) == 1 and statuses(tmp_path) == {"b": "timed out"} and len(rows(tmp_path)) == 1


def test_again_measures_a_bench_anew_and_one_that_does_not_end_has_failed(tmp_path):
    """The next call would not tell old rows from new ones."""
    todo = [bench("b", 1), python("a", "import sys; assert not sys.argv[1:]")]
    assert run(tmp_path, todo) == 0 and statuses(tmp_path) == {"b": "passed", "a": "passed"}
    todo[0] = bench("b", 3)
    assert run(tmp_path, todo, "--again") == 1 and statuses(tmp_path) == {"b": "failed", "a": "passed"}
    assert [row["impl"] for row in rows(tmp_path)] == ["[]", "['--again']"]


def test_the_benches_go_on_and_draw_no_report():
    for one in gpu_run.slices():
        is_bench = one.command[1:3] == ("-m", "bench")
        assert one.goes_on == is_bench == ("--no-report" in one.command), one.name


def test_rows_of_another_day_go_into_the_file_of_the_first(tmp_path):
    today = gpu_run._results(tmp_path)
    assert re.fullmatch(r"results-\d{4}-\d\d-\d\d.csv", today.name)
    (tmp_path / "results-2020-01-02.csv").touch()
    assert gpu_run._results(tmp_path).name == "results-2020-01-02.csv"


def test_a_changed_tree_is_not_its_commit(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_run, "commit_of_tree", lambda *more: asked.append(more) or "abc+1")
    assert gpu_run.main([str(tmp_path)], [python("a", "pass")]) == 0
    assert json.loads((tmp_path / "state.json").read_text())["commit"] == "abc+1"
    assert asked == [("tests", "tools")]


def test_a_torch_that_cannot_be_imported_is_for_a_slice_to_report():
    code = "import sys; sys.modules['torch'] = None; from tools import gpu_run; gpu_run.main(['--dry-run'])"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


def test_a_slice_cut_off_by_the_end_of_a_call_runs_again(tmp_path, capsys):
    todo = [python("a", "pass"), python("slow", "import time; time.sleep(60)")]
    assert run(tmp_path, todo, "--minutes", "0.03") == 0
    assert statuses(tmp_path) == {"a": "passed"}
    assert "left: 1 slices" in capsys.readouterr().out
    # what it was before does not count
    gpu_run.write_state(tmp_path, "abc", {one.name: {"status": "passed"} for one in todo})
    assert run(tmp_path, todo, "--again", "--minutes", "0.03") == 0 and statuses(tmp_path) == {"a": "passed"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_or_a_signal_loses_the_slice_that_runs_and_no_other(number, tmp_path):
    code = (
        "from tools import gpu_run as g; import signal, sys; "
        # a shell's background job is started with SIGINT ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "mk = lambda n, c: g.Slice(n, ('{python}', '-c', c), 0.01); "
        "sleeps = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'; "
        "todo = [mk('a', 'pass'), mk('b', sleeps)]; "
        f"sys.exit(g.main([{str(tmp_path)!r}, '--commit', 'abc'], todo))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = next(line for line in child.stdout if line.strip().isdigit()).strip()
    os.kill(child.pid, number)
    assert child.wait(30) == 130
    assert statuses(tmp_path) == {"a": "passed"}
    until(lambda: not is_running(pid))


def test_a_second_signal_does_not_cut_off_the_end_of_a_slice():
    before, has_ended = signal.getsignal(signal.SIGTERM), False
    with pytest.raises(KeyboardInterrupt), gpu_run._interruptible():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            has_ended = True
    assert has_ended and signal.getsignal(signal.SIGTERM) == before


def test_what_nohup_ignores_stays_ignored():
    before, goes_on = signal.signal(signal.SIGHUP, signal.SIG_IGN), False
    try:
        with contextlib.suppress(KeyboardInterrupt), gpu_run._interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            goes_on = True
        assert goes_on and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("screen", ["latin-1", "closed"])
def test_a_slice_may_print_what_the_screen_cannot_show(screen, tmp_path):
    """Nobody would empty its pipe, which holds 64 KiB."""
    prints = (
        r"import sys; sys.stdout.buffer.write(b'bar \xe2\x96\x88\xff\n'); sys.stdout.flush(); "
        "print(('x' * 99 + chr(10)) * 3000); print('the end')"
    )
    code = (
        "from tools import gpu_run as g; g.TIMEOUT = 30.0; g.GRACE = 1.0; "
        f"todo = [g.Slice('a', ('{{python}}', '-c', {prints!r}), 0.1)]; "
        f"g.main([{str(tmp_path)!r}, '--commit', 'abc'], todo)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = os.environ | {"PYTHONIOENCODING": "latin-1"}
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, **pipes)
    if screen == "closed":
        child.stdout.close()
    else:
        assert b"bar \xe2\x96\x88\xff\n" in child.stdout.read()
    child.stderr.read()
    child.wait()
    assert statuses(tmp_path) == {"a": "passed"}
    assert b"the end" in (tmp_path / "log.txt").read_bytes()


def test_files_of_the_slices_go_into_one_archive(tmp_path):
    code = "import pathlib, sys; pathlib.Path(sys.argv[1], 'trace.json').write_text('{}')"
    todo = [Slice(name, ("{python}", "-c", code, "{scratch}"), 0.01) for name in ("a", "b")]
    assert run(tmp_path, todo) == 0
    with zipfile.ZipFile(tmp_path / "artifacts.zip") as archive:
        assert archive.namelist() == ["a/trace.json", "b/trace.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("artifacts.zip", "log.txt", "state.json", "tuned.toml")
    ]


def test_results_of_another_commit_are_not_mixed(tmp_path, capsys):
    assert run(tmp_path, [python("a", "pass")]) == 0
    with pytest.raises(SystemExit):
        gpu_run.main([str(tmp_path), "--commit", "other"], [python("a", "pass")])
    assert "holds results of commit abc, and this is other" in capsys.readouterr().err


def test_an_unknown_slice_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, [python("a", "pass")], "--only", "z")
    assert "no slice begins with z; there are a" in capsys.readouterr().err


def test_the_dry_run_lists_every_slice_with_its_minutes(capsys):
    assert gpu_run.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    todo = gpu_run.slices()
    assert len(lines) == len(todo) + 1 and "these are estimates" in lines[-1]
    assert "{" not in "".join(lines)
    for line, one in zip(lines, todo, strict=False):
        assert re.match(rf" *{one.minutes:.1f} min +{one.name} ", line)
    assert len({one.name for one in todo}) == len(todo)


def test_make_lists_the_slices_in_a_dry_run():
    command = ["make", "gpu-run", "--dry-run", f"PYTHON={sys.executable}"]
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert run.returncode == 0 and "these are estimates" in run.stdout, run.stdout + run.stderr
    assert run.stdout.count(" min  ") == len(gpu_run.slices()) + 1


def test_every_slice_fits_below_its_time_limit():
    assert gpu_run.TIMEOUT < 9 * 60
    for one in gpu_run.slices():
        assert 60 * one.minutes < gpu_run.TIMEOUT, one.name


def commands():
    """(module, options) of the slices that run a module of this project."""
    for one in gpu_run.slices():
        words = one.command[one.command.index("{python}") + 1 :]
        if words[1] != "pytest":
            yield words[1], tuple(word for word in words if re.match("--?[a-z]", word))


@pytest.mark.parametrize("module", sorted({module for module, _ in commands()}))
def test_the_modules_know_the_options_that_slices_give_them(module):
    shown = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr[-2000:]
    for option in set(itertools.chain(*(options for name, options in commands() if name == module))) - {"-m"}:
        if option not in ("--streams", "--json"):  # options of a subcommand
            assert re.search(rf"{option}\b", shown.stdout), f"{module} has no {option}"


def test_slices_name_suites_workloads_and_test_files_that_exist():
    from bench import profiling
    from bench.suites import SUITES

    assert set(gpu_run.SUITES) == set(SUITES)
    assert set(gpu_run.KERNELS) == set(gpu_checks.STEMS) == set(KERNELS)
    assert {*gpu_run.TUNED, "flash_attention"} == {kernel.partition(".")[0] for kernel in tuned.KERNELS}
    for one in gpu_run.slices():
        for option, value in itertools.pairwise(one.command):
            if option == "--workload":
                assert value in profiling.WORKLOADS, one.name
            if (path := value.removeprefix("--ignore=")).startswith("tests/"):
                assert (ROOT / path).exists(), path


@pytest.mark.parametrize("stem", gpu_checks.STEMS)
def test_repeats_of_a_kernel_are_equal_bit_for_bit(stem, device, capsys):
    assert gpu_checks.repeats(stem, 3, device, torch.float32, smallest=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2 and all("0 of 3 runs differ" in line for line in lines)


def test_a_run_that_differs_is_counted():
    calls = itertools.count()
    x = torch.ones(3)

    def wavering(x):
        return x * (2.0 if next(calls) == 3 else 1.0)

    assert gpu_checks.unequal_runs(wavering, [x], 5) == 1


def test_a_replay_that_differs_is_counted(capsys):
    calls = itertools.count()

    def wavering(ids):
        return torch.as_tensor(ids).float() * (2.0 if next(calls) == 4 else 1.0)

    assert gpu_checks.unequal_replays(wavering, (3, 5), 4) == 1
    assert "3 tokens: 1 of 4 replays differ" in capsys.readouterr().out
    kept, texts = torch.zeros(5), set()

    def through_one_buffer(ids):
        texts.add(tuple(ids))
        return kept.copy_(torch.as_tensor(ids))

    assert gpu_checks.unequal_replays(through_one_buffer, (5,), 2) == 0 and len(texts) == 2


@pytest.fixture
def tiny_model() -> NVEmbedModel:
    return host_time.tiny_model(num_layers=1, vocab_size=32000)


@pytest.fixture
def impls(monkeypatch) -> set[str]:
    """Those of the forwards of a model."""
    seen, forward = set(), NVEmbedModel.forward
    monkeypatch.setattr(NVEmbedModel, "forward", lambda *args: seen.add(ops._state.impl) or forward(*args))
    monkeypatch.setattr(gpu_checks, "LENGTHS", (9, 30))
    return seen


def test_graphs_that_are_not_captured_are_counted(tiny_model, impls, monkeypatch, capsys):
    # Triton's interpreter knows one thread
    monkeypatch.setattr(gpu_checks, "IMPL", "torch")
    assert gpu_checks.replays(tiny_model, 1) == 2 and gpu_checks.threads(tiny_model, False, 1) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "captured" in line] == [
        "no graph of 16, 32 tokens was captured",
        "no graph of 64 tokens was captured",
    ]
    assert impls == {"torch"}


def test_graphs_are_checked_by_the_kernels(tiny_model, impls, monkeypatch):
    """A graph is played on a CPU."""
    monkeypatch.setattr(graphs, "_DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(graphs, "captured", lambda run, pool: run)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    assert gpu_checks.replays(tiny_model, 1) == 0 and impls == {"triton"}


def test_repeats_draw_on_their_device(monkeypatch):
    places = []

    @contextlib.contextmanager
    def drawn_on(device):
        places.append(device)
        yield
        places.pop()

    def problems(*_):
        assert places == ["cpu"]
        yield "sum", torch.sum, [torch.ones(3)]

    monkeypatch.setattr(gpu_checks.testing, "drawn_on", drawn_on)
    monkeypatch.setattr(gpu_checks, "problems", problems)
    assert gpu_checks.repeats("sum", 2, "cpu", torch.float32) == 0


# kernels before their times, and both before the whole
ORDER = (
    "check",
    "parity",
    "repeats-",
    "variants-",
    "bench-one-query",
    "graphs",
    "replays",
    "threads",
    "streams",
)


def test_slices_come_in_the_order_of_the_first_minutes_on_a_gpu():
    names = [one.name for one in gpu_run.slices()]
    assert names[:2] == ["environment", "check"]
    found = [[i for i, name in enumerate(names) if name.startswith(prefix)] for prefix in ORDER]
    for before, after in itertools.pairwise(found):
        assert max(before) < min(after), names
    assert max(found[-1]) < names.index("bench-encode") < min(i for i, n in enumerate(names) if "tune-" in n)


def test_vectors_of_two_threads_are_counted_when_they_are_mixed_up():
    texts = [np.full(4, 1), np.full(4, 2)]
    shared = torch.zeros(4)

    def through_a_shared_buffer(ids):
        shared.copy_(torch.as_tensor(ids))
        time.sleep(0.001)
        return shared.clone()

    assert gpu_checks.wrong_vectors(through_a_shared_buffer, texts, 20) > 0
    assert gpu_checks.wrong_vectors(lambda ids: torch.as_tensor(ids).float(), texts, 20) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_vectors_of_a_thread_that_died_are_counted_as_wrong():
    def encode(ids):
        if ids[0] == 2:
            raise RuntimeError("CUDA error")
        return torch.as_tensor(ids).float()

    texts = [np.full(4, 1), np.full(4, 2)]
    wanted = [torch.as_tensor(ids).float() for ids in texts]
    assert gpu_checks.wrong_vectors(encode, texts, 20, wanted=wanted) == 20


def test_what_a_new_model_has_made_is_read_by_two_threads(monkeypatch):
    """Here on the CPU. On a GPU each thread has a stream."""
    model = host_time.tiny_model()
    assert gpu_checks.kept(model, 2, length=40) == 0
    monkeypatch.setattr(gpu_checks.torch, "allclose", lambda *args, **kwargs: False)
    assert gpu_checks.kept(model, 2, length=40) == 8
