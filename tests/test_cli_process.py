"""The command and its process: closed and full standard streams, readers that leave, Ctrl-C at any moment."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nvembed_fast import cli
from nvembed_fast.cli import process

ROOT = Path(__file__).resolve().parents[1]
COMMAND = f"{sys.executable} -m nvembed_fast"
# a buffered standard output fails when it is written out, at the end
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def shell(line: str, **options) -> subprocess.CompletedProcess[str]:
    line = line.replace("nvembed-fast", COMMAND)
    options = {"cwd": ROOT, "env": BUFFERED} | options
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    "line, status, error",
    [
        ("nvembed-fast --help | true; exit ${PIPESTATUS[0]}", 0, ""),
        ("nvembed-fast --help > /dev/full", 1, "cannot write to standard output: No space left on device"),
        ("PYTHONUNBUFFERED=1 nvembed-fast --help > /dev/full", 1, "cannot write to standard output: No"),
        ("nvembed-fast --help >&-", 1, "cannot write to standard output: Bad file descriptor"),
        ("nvembed-fast --help <&-", 0, ""),
        ("nvembed-fast --help 2>&-", 0, ""),
        ("nvembed-fast encode - -o x.npy <&-", 1, "standard input is closed: pass a file"),
        ("nvembed-fast encode absent.txt -o x.npy 2>&-", 1, ""),
        ("nvembed-fast encode absent.txt -o x.npy 2>/dev/full", 1, ""),
    ],
)
def test_standard_streams_that_are_closed_or_full_give_no_traceback(line, status, error):
    done = shell(line)
    assert done.returncode == status, done
    assert error in done.stderr and len(done.stderr.splitlines()) == bool(error), done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1:strict", "utf-8"])
def test_standard_output_takes_what_its_encoding_lacks(encoding):
    code = "from nvembed_fast.cli import process; process.open_closed_streams(); print('\\u65e5 \\udcff')"
    done = shell(f'{sys.executable} -c "{code}"', env=BUFFERED | {"PYTHONIOENCODING": encoding})
    day = "\u65e5" if encoding == "utf-8" else r"\u65e5"
    assert (done.stdout, done.stderr) == (day + r" \udcff" + "\n", "")


def test_no_file_takes_the_number_of_a_closed_stream():
    code = "import os; from nvembed_fast.cli import process; process.open_closed_streams(); print(os.dup(1))"
    done = shell(f"exec {sys.executable} -c '{code}' 2>&- <&-")
    assert int(done.stdout) > 2


@pytest.mark.parametrize(
    "given, hint", [("encod", "did you mean 'encode'?"), ("x", "there are encode, search")]
)
def test_an_unknown_command_gets_a_suggestion(capsys, given, hint):
    with pytest.raises(SystemExit) as stop:
        cli.main([given, "passages.txt"])
    assert stop.value.code == 2 and f"no command {given!r}: {hint}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, hint",
    [
        (["encode", "x", "--ouput", "o.npy"], "no option --ouput: did you mean --output?"),
        (
            ["encode", "x", "--trunkate-dim=9", "-o", "o.npy"],
            "no option --trunkate-dim: did you mean --trunc",
        ),
        (["info", "--modle", "x"], "no option --modle: did you mean --model?"),
        (["search", "x", "q", "--zzz"], "no option --zzz: see nvembed-fast search --help"),
    ],
)
def test_an_unknown_option_gets_a_suggestion(capsys, given, hint):
    with pytest.raises(SystemExit) as stop:
        cli.main(given)
    assert stop.value.code == 2 and hint in capsys.readouterr().err


def test_what_only_looks_like_an_option_is_none(capsys):
    # an abbreviation, a value behind the equals sign, and texts
    for given in (
        ["encode", "no.txt", "--out", "o.npy"],
        ["encode", "no.txt", "-o", "o.npy", "--instruction=--find"],
        ["encode", "--text", "--- a title", "-o", "no/o.npy"],
        ["search", "no.txt", "--", "--question"],
    ):
        assert cli.main(given) == 1
        assert "no option" not in capsys.readouterr().err


def test_the_systems_errors_are_sentences():
    assert cli._sentence(IsADirectoryError(21, "Is a directory", "/x")) == "/x: Is a directory"
    assert cli._sentence(OSError(28, "No space left on device")) == "No space left on device"
    assert cli._sentence(MemoryError()) == "MemoryError"


@pytest.mark.parametrize(
    "module, command",
    [
        ("nvembed_fast.cli.encode", ["info"]),
        ("torch", ["info"]),
        ("torch", ["train", "recipes/smollm2-stage1.toml", "--set", "output=/proc/none"]),
    ],
    ids=["command", "info", "train"],
)
def test_ctrl_c_during_imports_raises_nothing_inside_them(module, command):
    """An exception inside the import of torch's extensions would end the process by abort()."""
    code = f"""
import os, signal, sys
# a shell's background job is started with SIGINT ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupting:
    @staticmethod
    def find_spec(name, *_):
        if name == {module!r}:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                print("raised inside the import", file=sys.stderr)
                raise
sys.meta_path.insert(0, Interrupting)
from nvembed_fast.cli import main
sys.exit(main({command!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "interrupted; nothing was written\n")


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
@pytest.mark.parametrize("raises", [True, False])
def test_ctrl_c_is_the_callers_again_after_a_command(handler, raises):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with process.interrupts():
            if raises:
                process.raise_interrupts()
                assert signal.getsignal(signal.SIGINT) is handler
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
