"""nvembed-fast eval."""

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvembed_fast.cli import options, process

if TYPE_CHECKING:
    from nvembed_fast.encoder import NVEmbed

SUMMARY = "Score a model on tasks with human labels: our own without a hub, or any of mteb."
EXAMPLES = """\
examples:
  nvembed-fast eval --tasks local --model my-model -o scores
  nvembed-fast eval --tasks retrieval --model minilm -o scores
  nvembed-fast eval --tasks squad rte --quick --model my-model -o scores
  nvembed-fast eval --tasks SciFact "MTEB(eng, v2)" --model nvidia/NV-Embed-v2 -o scores
  nvembed-fast eval --report scores --page README.md --picture scores.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="our tasks, the groups local, retrieval and other, and tasks or benchmarks of mteb",
    )
    what.add_argument(
        "--report", type=options.path, metavar="FOLDER", help="of rows: print them as a table, score nothing"
    )
    parser.add_argument(
        "-o", "--output", type=options.path, default=Path("scores"), metavar="FOLDER", help="of rows"
    )
    parser.add_argument(
        "--name", help="of the model in rows and tables (default: the end of MODEL). Each model needs its own"
    )
    parser.add_argument(
        "--quick", action="store_true", help="samples of the large tasks, in rows of their own"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=512,
        help="tokens a text of mteb's tasks (default: 512). Our tasks state their own",
    )
    parser.add_argument("--max-batch-tokens", type=int, help="tokens a batch (default: by the device)")
    parser.add_argument("--page", type=options.path, help="of a report: rewrite the tables in this file")
    parser.add_argument("--picture", type=options.path, help="of a report: draw the scores as bars into it")
    options.add_model_options(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.report is not None:
        return _report(arguments)
    if arguments.page or arguments.picture:
        raise ValueError("--page and --picture are for a report: name the folder of rows by --report")
    from importlib.util import find_spec

    from nvembed_fast.evaluation import tasks

    if find_spec("mteb") is None:
        raise ImportError("evaluation needs the package mteb: pip install 'nvembed-fast[eval]'")
    local, others = tasks.chosen(arguments.tasks)
    process.raise_interrupts()
    with process.telling(lambda: "importing mteb"):
        from nvembed_fast.integrations import mteb

        theirs = mteb.named_tasks(others, ours=tasks.names())
    model = _Model(arguments)
    skipped: dict[str, str] = {}
    number = len(local) + len(theirs)
    try:
        for count, name in enumerate(local, start=1):
            process.say(f"{count} of {number}: {name}")
            try:
                task = tasks.load(name)
            except tasks.SkippedTask as error:
                skipped[name] = str(error)
                continue
            model.run_local(tasks.sampled(task) if arguments.quick else task, skipped)
        for count, task in enumerate(theirs, start=len(local) + 1):
            data = mteb.measured(task)
            process.say(f"{count} of {number}: {task.metadata.name}{_over(data)}")
            model.run_mteb(task, data, skipped)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"the rows of finished tasks are in {arguments.output}, and the same command goes on from there"
        ) from stop
    for name, reason in skipped.items():
        process.say(f"skipped {name}: {reason}")
    if skipped:
        process.say(f"{len(skipped)} of {number} tasks were skipped")
    return 1 if len(skipped) == number else 0


class _Model:
    """The model of the options, and its rows."""

    def __init__(self, arguments: argparse.Namespace):
        from nvembed_fast import baselines
        from nvembed_fast.evaluation import scores

        self.arguments = arguments
        name = options.model_name(arguments.model) if arguments.name is None else arguments.name
        scores.folder_of(arguments.output, name)  # before minutes of loading
        self.name, self.max_length = name, 0
        self.is_baseline = arguments.model in baselines.NAMES
        facts: dict[str, Any]
        from nvembed_fast.integrations import mteb

        if arguments.model == "bm25":
            self.mteb: Any = mteb.MTEBSearch("baseline/bm25", "1", baselines.BM25)
            facts = {"fingerprint": "bm25s"}
        elif self.is_baseline:
            vectors = getattr(baselines, arguments.model)()
            self.mteb = mteb.MTEBVectors(
                f"baseline/{name}", vectors.fingerprint, lambda texts: vectors.encode(texts, self.max_length)
            )
            facts = {"fingerprint": vectors.fingerprint, "dtype": "float32"}
        else:
            encoder: NVEmbed = options.load(arguments)
            self.mteb = mteb.MTEBEncoder(
                f"local/{name}", model=encoder, max_batch_tokens=arguments.max_batch_tokens
            )
            record = self.mteb.record()
            facts = {key: record[key] for key in ("fingerprint", "prompt_hash", "dtype", "device", "impl")}
        self.facts = facts
        scores.check_name(arguments.output, name, facts["fingerprint"])

    def run_local(self, task: Any, skipped: dict[str, str]) -> None:
        from nvembed_fast.integrations.mteb import planted_task

        data = {"kind": task.kind, "sample": task.sample, "revision": task.revision}
        prompt = "" if self.is_baseline else task.instruction
        self._run(planted_task(task), task.max_length, data, prompt, skipped, task)

    def run_mteb(self, task: Any, measured: dict, skipped: dict[str, str]) -> None:
        data = {"kind": task.metadata.type, "sample": "", **measured}
        self._run(task, self.arguments.max_length, data, "", skipped)

    def _run(
        self,
        task: Any,
        max_length: int,
        data: dict,
        prompt: str,
        skipped: dict[str, str],
        local: Any = None,
    ) -> None:
        import importlib.metadata

        from nvembed_fast.evaluation import scores
        from nvembed_fast.integrations.mteb import needs_vectors, score

        name = task.metadata.name
        if self.arguments.model == "bm25" and needs_vectors(task):
            skipped[name] = f"BM25 makes no vectors, and this task needs them ({data['kind']})"
            return
        versions = {"mteb": importlib.metadata.version("mteb")}
        if self.arguments.model == "bm25":
            versions["bm25s"] = importlib.metadata.version("bm25s")
        made_by = {**self.facts, "prompt": prompt, "max_length": max_length, "versions": versions, **data}
        is_quick = local is not None and self.arguments.quick
        if is_quick:
            made_by["quick"] = True
        path = scores.row_path(self.arguments.output, self.name, name, is_quick)
        if scores.finished(path, made_by):
            process.say(f"{name}: {path} is finished")
            return
        self.mteb.max_length = self.max_length = max_length
        start = time.monotonic()
        with process.telling(lambda: f"{name}: {time.monotonic() - start:.0f} s"), options.note_cut():
            found = score(task, self.mteb)
        if not math.isfinite(found.main_score):  # such as a correlation with equal labels
            skipped[name] = f"its {task.metadata.main_score} is {found.main_score}"
            return
        row = {
            "task": name,
            "model": self.name,
            "kind": data["kind"],
            "metric": task.metadata.main_score,
            "score": found.main_score,
            "seconds": round(time.monotonic() - start, 1),
            "hit_at_3": found.scores.get("hit_rate_at_3"),
            "made_by": made_by,
            "units": [] if local is None else scores.units_of(local, found.predictions),
        }
        scores.write(path, {key: value for key, value in row.items() if value is not None})
        print(f"{name}\t{task.metadata.main_score}\t{found.main_score:.4f}", flush=True)


def _over(data: dict) -> str:
    """Of what a score is the mean: ", the mean over 2 splits and 51 subsets". "" for one of each."""
    numbers = {key: len(data.get(key, ())) for key in ("parts", "splits", "subsets")}
    found = [f"{number} {key}" for key, number in numbers.items() if number > 1]
    return f", the mean over {' and '.join(found)}" if found else ""


def _report(arguments: argparse.Namespace) -> int:
    from nvembed_fast.evaluation import report, scores

    rows = scores.read_rows(arguments.report)
    print(report.table(rows))
    if arguments.page:
        report.put_into(arguments.page, rows)
    if arguments.picture:
        report.draw(rows, arguments.picture)
    return 0
