"""A table of tiny cells, killed at random moments: python killed_cells.py TABLE WORK KILLS SEED EVENTS.

A moment is a step of a training or the exchange of a file, so it does not depend on the machine's speed. Each
run is a fork of this process, which has imported everything and computed nothing. The last one is left alone.
Prints how many runs were killed while they were at work.
"""

import os
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

from nvembed_fast import cli
from nvembed_fast.evaluation import tasks
from nvembed_fast.integrations import mteb  # noqa: F401 - before the forks
from nvembed_fast.training import trainer

TEXTS = [f"w{n} w{n + 1} w{n % 3}" for n in range(24)]
LABELS = [n % 3 for n in range(24)]
PLANTED = {
    "squad": tasks.LocalTask(
        "squad",
        "retrieval",
        "w1",
        32,
        queries={f"q{n}": f"w{n}" for n in range(0, 24, 3)},
        documents={f"d{n}": text for n, text in enumerate(TEXTS)},
        relevant={f"q{n}": {f"d{n}"} for n in range(0, 24, 3)},
    ),
    "r52": tasks.LocalTask(
        "r52",
        "classification",
        "w2",
        32,
        texts=TEXTS,
        labels=LABELS,
        train_texts=TEXTS,
        train_labels=LABELS,
    ),
}


def load(name: str, cache=None) -> tasks.LocalTask:
    return PLANTED[name]


def die_at(event: int) -> None:
    """Kill this process in front of an event, counted from 1."""
    left = iter(range(event - 1))

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    trainer._Run.step = counted(trainer._Run.step)  # type: ignore[method-assign]
    os.replace, os.rename = counted(os.replace), counted(os.rename)


def main(table: str, work: str, kills: int, seed: int, events: int) -> None:
    tasks.load = load
    draw = random.Random(seed)
    killed = 0
    for attempt in range(kills + 1):
        event = draw.randint(1, events)
        child = os.fork()
        if child == 0:
            if attempt < kills:
                die_at(event)
            os._exit(cli.main(["ablate", table, "--work", work]))
        status = os.waitpid(child, 0)[1]
        killed += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
            sys.exit(1)
    sys.stdout.write(f"{killed}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
