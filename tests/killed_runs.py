"""Runs of the trainer that are killed at random moments: python killed_runs.py RECIPE KILLS SEED SECONDS.

Each run is a fork of this process, which has imported everything and computed nothing. The last one is left
alone. Prints how many runs were killed while they were at work.
"""

import os
import random
import signal
import sys
import time
import traceback

from nvembed_fast.training import trainer
from nvembed_fast.training.recipe import Recipe


def main(file: str, kills: int, seed: int, seconds: float) -> None:
    draw = random.Random(seed)
    killed = 0
    for attempt in range(kills + 1):
        child = os.fork()
        if child == 0:
            _run(file)
        if attempt < kills:
            time.sleep(draw.uniform(0.01, seconds))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        killed += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
            sys.exit(1)
    sys.stdout.write(f"{killed}\n")


def _run(file: str) -> None:
    try:
        trainer.train(Recipe.from_file(file))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
