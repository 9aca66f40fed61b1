"""What a command needs of its process: standard streams that are there, and a Ctrl-C that tells the truth.

1. A closed standard stream is opened on the null device. Otherwise the next file would take its number, and
   the messages of a library would be written into that file.
2. Until `raise_interrupts`, Ctrl-C ends the process at once. An exception inside the import of torch's
   extensions would end it by abort().
3. From there on it raises KeyboardInterrupt, so that a command removes or keeps what it has begun.
"""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "INTERRUPTED",
    "OBEYED",
    "interrupts",
    "open_closed_streams",
    "raise_interrupts",
    "say",
    "telling",
    "telling_what_was_written",
    "write_out",
]

INTERRUPTED = 130  # the status by which shells know Ctrl-C
TELL_EVERY_S = 10.0
# what a terminal obeys, control characters and marks of direction -> how it is shown
OBEYED = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
OBEYED |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


@contextmanager
def interrupts() -> Iterator[None]:
    """Inside, Ctrl-C ends the process with one line. Where it is ignored or handled already, that stays."""
    import threading

    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    else:
        yield


def raise_interrupts() -> None:
    """From here on, Ctrl-C raises KeyboardInterrupt. To be called before a command writes anything."""
    import torch  # noqa: F401 - 2. above

    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def telling_what_was_written(name: "Path", file: "Callable[[], Path]") -> Iterator[None]:
    """Inside, a KeyboardInterrupt gets its message: whether `file()` is still the one that it was before."""
    from nvembed_fast import files

    before = files.identity(file())
    try:
        yield
    except KeyboardInterrupt as stop:
        if stop.args:  # it has its message
            raise
        # the disk tells, because an interruption may come right after a rename
        is_new = files.identity(file()) != before
        raise KeyboardInterrupt(f"{name} was written" if is_new else "nothing was written") from stop


def _leave(*_) -> None:
    # not by print: it may be at work
    with suppress(OSError):
        os.write(2, b"interrupted; nothing was written\n")
    os._exit(INTERRUPTED)


def open_closed_streams() -> None:
    """Open the standard streams that are closed on the null device, and let standard output take any text.

    Writing to standard output is an error, as it was. What is written to standard error is lost.
    """
    for number, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDWR)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    # a file of texts may hold what the terminal's encoding lacks, and a file's name bytes that are no text
    if isinstance(sys.stdout, io.TextIOWrapper):
        # written through at once, an error would come where nobody looks for it (PYTHONUNBUFFERED=1)
        sys.stdout.reconfigure(errors="backslashreplace", write_through=False)
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def say(message: str) -> None:
    """Print a line on standard error, without what a terminal obeys. If nobody can read it, it is lost."""
    try:
        print(message.translate(OBEYED), file=sys.stderr, flush=True)
    except OSError:
        _discard(2)


@contextmanager
def telling(state: Callable[[], str]) -> Iterator[None]:
    """Inside, `state()` is a line on standard error every ten seconds. A terminal has a bar instead."""
    if sys.stderr.isatty():
        yield
        return
    import threading

    end = threading.Event()

    def tell() -> None:
        while not end.wait(TELL_EVERY_S):
            say(state())

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def write_out() -> bool:
    """Write out what was printed. False, and one line on standard error, if that is impossible.

    A reader that has gone (`| head`) has what it wanted, so it is no error.
    """
    try:
        sys.stdout.flush()
        return True
    except BrokenPipeError:
        _discard(1)
        return True
    except OSError as error:
        _discard(1)
        say(f"nvembed-fast: cannot write to standard output: {error.strerror}")
        return False


def _discard(number: int) -> None:
    """Keep Python from complaining when it closes the stream."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
