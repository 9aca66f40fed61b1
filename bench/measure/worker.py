"""Times the cases of one suite for `bench.measure.base`, which asks and has the answers as lines of JSON.

    {"do": "list"}                    {"cases": [...]}
    {"do": "open", "case": CASE}      {"estimate_ms": MS, "sample_ms": MS} once parity holds,
                                      or {"obstacle": REASON}
    {"do": "capture"}                 the same, when a sample of the open case is the replay of a CUDA graph
    {"do": "sample", "count": N}      {"ms": [N samples of the open case]}

It runs in the root of the tree whose package it times, and ends with its input.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import nvembed_fast
from bench.measure.results import OURS, ROOT
from bench.measure.timing import make_sampler
from bench.suites import SUITES, Setting, add_options, benches


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.measure.worker")
    parser.add_argument("suite", choices=SUITES)
    add_options(parser.add_argument)
    args = parser.parse_args()
    # Ctrl-C ends the caller, and so the input
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # only answers go to the caller: prints of the benches go to the screen
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    package = Path(nvembed_fast.__file__).resolve().parents[1]
    assert package == ROOT, f"the package of {package} would be timed, not the one of {ROOT}"
    setting = Setting.here(args.smallest, args.compile)
    found = {bench.case: bench for bench in benches(args.suite, setting)}
    sampler = None
    answer: dict[str, object]
    with setting.implementation():
        for line in sys.stdin:
            question = json.loads(line)
            if question["do"] == "list":
                answer = {"cases": list(found)}
            elif question["do"] == "open":
                sampler = None
                try:
                    sampler = make_sampler(found[question["case"]].prepare(only_ours=True).calls[OURS])
                except Exception as error:
                    answer = {"obstacle": f"{type(error).__name__}: {error}".splitlines()[0]}
                else:
                    answer = _times(sampler)
            elif question["do"] == "capture":
                sampler.capture()
                answer = _times(sampler)
            else:
                taken = [sampler.sample() for _ in range(question["count"])]
                answer = {"ms": [sampler.read(sample) for sample in taken]}
            print(json.dumps(answer), file=answers, flush=True)


def _times(sampler) -> dict[str, object]:
    return {"estimate_ms": sampler.estimate_ms, "sample_ms": sampler.sample_ms}


if __name__ == "__main__":
    main()
