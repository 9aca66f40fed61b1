"""The training loop: batches, steps, checkpoints, metrics, and the model at the end.

1. Join the ranks, find what the run starts from, and open the data.
2. Go on from the newest checkpoint in `output`, if there is one of the same run.
3. For each step: its batch, which a thread has made meanwhile; the gradient by `direct_step` where rows see
   their own documents alone, else by `cached_step`; clipping, AdamW, one line of metrics.
4. Every `checkpoint_every` steps, behind the last one and when the run is stopped: a checkpoint.
5. Write the trained model to `output`.

A step is a pure function of the weights, the optimizer's moments, the seed, its number and the rows taken so
far. So a run that was killed ends with the same weights and the same losses, bit for bit on one machine with
the same number of threads and ranks. On another number of ranks it sees the same batches.

A loss or a gradient that is not finite stops the run before it touches a weight.
"""

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nvembed_fast import files
from nvembed_fast.checkpoint.names import CONFIG_FILE
from nvembed_fast.checkpoint.save import model_files
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.tokenization import TextTokenizer
from nvembed_fast.training import checkpoints
from nvembed_fast.training.auxiliary_losses import candidate_distillation, score_distillation
from nvembed_fast.training.batch import Batches, DataSet, TrainingBatch, open_sets
from nvembed_fast.training.checkpoints import State
from nvembed_fast.training.gather import gathered_distillation, gathered_loss, rank_share
from nvembed_fast.training.grad_cache import cached_step, direct_step
from nvembed_fast.training.loss import Candidates, LossResult, contrastive_loss
from nvembed_fast.training.mix import seed_of
from nvembed_fast.training.ranks import Ranks, joined, spread
from nvembed_fast.training.recipe import Recipe, RecipeError, TrainPart
from nvembed_fast.training.run_log import RunLog, memory_gb
from nvembed_fast.training.start import export, load_network, start_directory, trained, weights_name
from nvembed_fast.training.teacher_vectors import TeacherVectors

__all__ = ["Diverged", "Evaluate", "Stopped", "train"]

# of (the model in eval mode, its tokenizer, steps done): figures by name. Every rank calls it
Evaluate = Callable[[NVEmbedModel, TextTokenizer, int], Mapping[str, SupportsFloat]]
_AGAIN_AFTER_S = 1.0
_SHOWN = 16
_LOCK = ".lock"
_CONTENT = "content of "


class Diverged(ValueError):
    """A loss or a gradient was not finite. No weight was touched by it."""


class Stopped(KeyboardInterrupt):
    """The run was stopped, and its checkpoint is written."""


def train(
    recipe: Recipe,
    *,
    device: str | torch.device | None = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 500,
    say: Callable[[str], None] = lambda message: None,
) -> Path:
    """Train by a recipe, or go on with its run. Under torchrun every rank calls it.

    Args:
        recipe: of the run.
        device: "cuda" is the GPU of this rank. None takes it if there is one, else the CPU.
        evaluate: gives figures about the model every `evaluate_every` steps and behind the last one.
        evaluate_every: steps.
        say: takes lines for the user, on the first rank.

    Returns:
        The directory with the trained model.

    Raises:
        Stopped: a signal (Ctrl-C, SIGTERM) came. The step was finished, and a checkpoint is there.
        Diverged: a loss or a gradient was not finite. The message names the batch and the last checkpoint.
        ValueError, OSError: the recipe, its data, its start or its last checkpoint cannot be used, or the
            disk is full. The last checkpoint stays.
    """
    with joined(device) as ranks:
        _train(recipe, ranks, evaluate, evaluate_every, say if ranks.is_first else _nothing)
    return Path(recipe.output)


def _train(
    recipe: Recipe,
    ranks: Ranks,
    evaluate: Evaluate | None,
    evaluate_every: int,
    say: Callable[[str], None],
) -> None:
    """`train` on this rank. What it holds of the ranks is gone when it returns."""
    part, output = recipe.train, Path(recipe.output)
    if part.batch < ranks.size:
        raise RecipeError(f"train.batch is {part.batch}, fewer rows than the {ranks.size} ranks")
    sets = open_sets(recipe.data)
    teacher = _teacher(part)
    instructions: dict[str, str] = {}
    if ranks.is_first and checkpoints.newest(output) is None:
        checkpoints.check_none(output)
        _check_new(output)
        # a teacher says something of a row alone
        is_alone = part.batch == 1 and teacher is None and not _needs_scores(part)
        for data in sets:
            instructions |= data.check(is_alone=is_alone, needs_scores=_needs_scores(part), teacher=teacher)
    with _alone(output, ranks):
        if not ranks.is_first:
            ranks.wait()
        start = start_directory(recipe)  # which the first rank makes
        if ranks.is_first:
            ranks.wait()
        path = checkpoints.newest(output)
        known = {} if path is None else checkpoints.identity_of(path)
        sets = _named(sets, known)
        say(f"{sum(len(data.rows) for data in sets):,} rows; loading {recipe.model.start}")
        run = _Run(recipe, ranks, sets, teacher, start, say, instructions)
        if part.warmup > part.steps:
            say(f"train.warmup {part.warmup} is above train.steps {part.steps}: lr is never reached")
        if not part.lora_rank and part.dtype not in ("auto", "float32"):
            say(
                f"train.dtype {part.dtype} is of weights beside adapters, and with lora_rank = 0 all are "
                "float32. train.autocast computes in bfloat16"
            )
        state = State(0, run.batches.start())
        if path is not None:
            state = checkpoints.load(path, run.parameters, run.optimizer, run.identity)
            _tell_new_rate(state.step, part, known["train.steps"], say)
            is_done = state.step >= part.steps
            said = f"{path.name}: {state.step} of {part.steps} steps are done"
            say(said if is_done else f"going on from {path.name}")
        if ranks.total([state.step])[0] != state.step * ranks.size:
            raise ValueError(
                f"the ranks see different checkpoints in {output}: it must lie on a disk that is shared "
                "by all machines"
            )
        run.loop(state, evaluate, evaluate_every)
        if ranks.is_first:
            last = checkpoints.newest(output)
            assert last is not None
            export(recipe, run.directory, last)
            say(f"{output}: the trained model")
        ranks.wait()


class _Run:
    """A run on this rank: its model and optimizer, and what its steps are computed with."""

    def __init__(
        self,
        recipe: Recipe,
        ranks: Ranks,
        sets: Sequence[DataSet],
        teacher: TeacherVectors | None,
        directory: Path,
        say: Callable[[str], None],
        instructions: Mapping[str, str],
    ):
        self.recipe, self.ranks, self.directory, self.say = recipe, ranks, directory, say
        place = files.current(directory)
        self.tokenizer = TextTokenizer.from_directory(place, NVEmbedConfig.from_file(place / CONFIG_FILE))
        self.batches = Batches(
            sets,
            self.tokenizer,
            batch=recipe.train.batch,
            seed=recipe.seed,
            max_length=recipe.train.max_length,
            is_one_set=recipe.train.batches == "one_set",
            rank=ranks.rank,
            num_ranks=ranks.size,
            needs_scores=_needs_scores(recipe.train),
            teacher=teacher,
        )
        if instructions:  # the rows were read, because the run begins
            self.batches.check(instructions)
        self.network = load_network(directory, recipe, ranks.device)
        self.model = spread(self.network, ranks, recipe.train.sharding)
        self.parameters = trained(self.network)  # behind `spread`, which may replace them
        self.optimizer = _adamw(self.parameters, recipe.train)
        contents = {_CONTENT + name: digest for name, digest in self.batches.fingerprints.items()}
        if teacher is not None:
            contents[checkpoints.TEACHER] = teacher.fingerprint
        self.identity = recipe.flat() | {"model.weights": weights_name(directory)} | contents

    def loop(
        self,
        state: State,
        evaluate: Evaluate | None,
        evaluate_every: int,
    ) -> None:
        part, ranks = self.recipe.train, self.ranks
        source = closing(self.batches.ahead(state.step, part.steps, state.counters))
        with _log(self, state) as log, _stop_signals(self.say) as stop, source as steps:

            def evaluate_at(done: int) -> None:
                if evaluate is not None and (done == part.steps or done % evaluate_every == 0):
                    with _inference(self.network):
                        figures = _figures(evaluate(self.network, self.tokenizer, done))
                    if log is not None:
                        log.note(done, figures)

            # a run may have ended between its last checkpoint and what was to follow
            is_missing = state.step > 0 and log is not None and not log.has_note(state.step)
            if ranks.total([float(is_missing)])[0]:
                evaluate_at(state.step)
            is_told = False
            for step, batch, counters in steps:
                metrics = self.step(step, batch)
                done = step + 1
                # a mean over the ranks is rounded
                if not is_told and metrics["rows_without_negatives"] > 1 - 1e-9:
                    is_told = True
                    self.say(f"step {done} had no negative for any row, so its contrastive loss is 0")
                is_last = done == part.steps
                if log is not None:
                    log.write(done, metrics)
                # all ranks stop in the same step
                is_stopped = ranks.total([float(stop.is_set())])[0] > 0
                if is_stopped or is_last or done % part.checkpoint_every == 0:
                    if log is not None:
                        log.sync()
                    self.save(State(done, counters))
                evaluate_at(done)
                if is_stopped and not is_last:
                    raise Stopped(f"step {done} of {part.steps} is done and saved; the same command goes on")

    def save(self, state: State) -> None:
        checkpoints.save(
            Path(self.recipe.output),
            state,
            self.parameters,
            self.optimizer,
            self.identity,
            keep=self.recipe.train.keep_checkpoints,
            is_writer=self.ranks.is_first,
        )

    def step(self, step: int, batch: TrainingBatch) -> dict[str, float]:
        """One optimizer step. Returns its metrics, the same on every rank."""
        part, ranks = self.recipe.train, self.ranks
        began = time.monotonic()
        lr = _rate(step, part)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        metrics = self.gradient(step, batch).metrics
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if part.clip:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), part.clip, norm)
        # means over the ranks by their rows, and the tokens of all
        values = torch.stack(list(metrics.values())).double() * (batch.num_queries / part.batch)
        *means, tokens = ranks.total([*values.tolist(), float(sum(batch.texts.lengths()))])
        found = dict(zip(metrics, means, strict=True)) | {"gradient_norm": norm.item()}
        if not all(map(math.isfinite, (found["loss"], found["gradient_norm"]))):
            raise Diverged(self.divergence(step, found, batch))
        self.optimizer.step()
        self.optimizer.zero_grad()
        speed = tokens / (time.monotonic() - began)
        return found | {
            "lr": lr,
            "tokens": tokens,
            "tokens_per_s": speed,
            "memory_gb": memory_gb(ranks.device),
        }

    def gradient(self, step: int, batch: TrainingBatch) -> LossResult:
        """The loss of a batch, and its gradient in `.grad`: the mean over the ranks is that of all rows."""
        part, ranks = self.recipe.train, self.ranks
        options: dict[str, Any] = {
            "temperature": part.temperature,
            "limit": part.limit,
            "both_directions": part.both_directions,
        }

        def seed(chunk: int) -> int:
            return seed_of(self.recipe.seed, "chunk", step, ranks.rank, chunk)

        # `gathered_loss` has it in its loss
        share = rank_share(batch.num_queries, part.batch, ranks.size)

        def loss_of(vectors: torch.Tensor) -> LossResult:
            queries, documents = vectors.tensor_split([batch.num_queries])
            result = gathered_loss(queries, documents, batch.candidates, **options)
            return _distilled(
                result, queries, documents, batch.candidates, part, share, gathered_distillation
            )

        def own_loss_of(vectors: torch.Tensor, some: TrainingBatch) -> LossResult:
            queries, documents = vectors.tensor_split([some.num_queries])
            result = contrastive_loss(queries, documents, some.candidates, **options)
            result = dataclasses.replace(result, loss=result.loss * share)
            return _distilled(
                result, queries, documents, some.candidates, part, share, candidate_distillation
            )

        chunks: dict[str, Any] = {"max_tokens": part.max_tokens, "seed": seed}
        with _autocast(ranks.device, part):
            if batch.has_own_candidates_only:
                return direct_step(self.model, batch, own_loss_of, **chunks)
            return cached_step(self.model, batch.texts, loss_of, **chunks)

    def divergence(self, step: int, found: Mapping[str, float], batch: TrainingBatch) -> str:
        last = checkpoints.newest(Path(self.recipe.output))
        files_of = {data.name: data.rows for data in self.batches.sets}
        places = [files_of[name].place(index) for name, index in batch.rows]
        more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
        stays = f"{last.name} stays" if last else "there is no checkpoint yet"
        return (
            f"step {step + 1} has loss {found['loss']:g} and gradient norm {found['gradient_norm']:g}, and "
            f"was not taken: {stays}. A lower lr or more warmup may help, with another output. Its rows: "
            f"{'; '.join(places[:_SHOWN])}{more}"
        )


def _named(sets: list[DataSet], identity: Mapping[str, Any]) -> list[DataSet]:
    """The data sets under the names that the run knows, where only their files' names are others."""
    was = {key.removeprefix(_CONTENT): value for key, value in identity.items() if key.startswith(_CONTENT)}
    contents = [data.rows.fingerprint for data in sets]
    if [*was.values()] != contents:
        if sorted(was.values()) == sorted(contents):
            raise RecipeError(
                f"the data sets stood in another order, {', '.join(was)}: put them back into it"
            )
        return sets  # the run is new, or `checkpoints.load` refuses them
    return [dataclasses.replace(data, name=name) for data, name in zip(sets, was, strict=True)]


def _teacher(part: TrainPart) -> TeacherVectors | None:
    if part.teacher is None:
        return None
    if not part.distillation:
        raise RecipeError("train.teacher is set, but train.distillation is 0: give it a weight, such as 1.0")
    return TeacherVectors(Path(part.teacher))


def _needs_scores(part: TrainPart) -> bool:
    return part.distillation > 0 and part.teacher is None


def _distilled(
    result: LossResult,
    queries: torch.Tensor,
    documents: torch.Tensor,
    candidates: Candidates,
    part: TrainPart,
    share: float,
    of_candidates: Callable[..., torch.Tensor],
) -> LossResult:
    """The loss with the teacher's term, where the recipe asks for it."""
    temperatures: dict[str, Any] = {
        "temperature": part.temperature,
        "teacher_temperature": part.teacher_temperature,
    }
    if candidates.teacher_queries is not None:
        term = of_candidates(queries, documents, candidates, **temperatures)
    elif candidates.scored is not None and candidates.teacher_scores is not None:
        scored = candidates.scored, candidates.teacher_scores
        term = score_distillation(queries, documents, *scored, **temperatures)
    else:
        return result
    found = term.detach()
    metrics = result.metrics | {
        "loss": result.metrics["loss"] + part.distillation * found,
        "distillation": found,
    }
    return LossResult(result.loss + part.distillation * share * term, metrics)


def _rate(step: int, part: TrainPart) -> float:
    """The learning rate of a step: linear from 0 to lr in `warmup` steps, then linear to 0 at the end."""
    if step < part.warmup:
        return part.lr * (step + 1) / part.warmup
    return part.lr * (part.steps - step) / max(1, part.steps - part.warmup)


def _tell_new_rate(step: int, part: TrainPart, steps_before: int, say: Callable[[str], None]) -> None:
    """A run that goes on with other `steps` has another rate at once."""
    if steps_before != part.steps > step:
        was, now = (_rate(step, dataclasses.replace(part, steps=n)) for n in (steps_before, part.steps))
        say(
            f"train.steps was {steps_before} and is {part.steps}: the learning rate of step {step + 1} is "
            f"{now:.3g} in the place of {was:.3g}"
        )


def _adamw(parameters: Mapping[str, nn.Parameter], part: TrainPart) -> torch.optim.AdamW:
    """Weight decay on matrices alone: not on norms and biases."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": part.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=part.lr, betas=(part.beta1, part.beta2), fused=True)


def _autocast(device: torch.device, part: TrainPart) -> torch.autocast:
    is_on = part.autocast == "bfloat16" or (part.autocast == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=is_on)


def _check_new(output: Path) -> None:
    """RecipeError if a run that begins would replace a model."""
    if found := model_files(files.current(output)):
        raise RecipeError(
            f"output {output} holds a model ({', '.join(found[:3])}) and no checkpoint: choose another "
            "directory"
        )


@contextmanager
def _alone(output: Path, ranks: Ranks) -> Iterator[None]:
    """The first rank keeps other runs out of the directory, which it makes."""
    if not ranks.is_first:
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    with files.alone(output, _LOCK):
        yield


@contextmanager
def _log(run: _Run, state: State) -> Iterator[RunLog | None]:
    """The log on the first rank."""
    if not run.ranks.is_first:
        yield None
        return
    recipe = run.recipe
    log = RunLog(
        Path(recipe.output),
        recipe.log,
        step=state.step,
        steps=recipe.train.steps,
        settings=run.identity,
        say=run.say,
    )
    with closing(log):
        yield log


@contextmanager
def _inference(network: NVEmbedModel) -> Iterator[None]:
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train()


@contextmanager
def _stop_signals(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """Inside, Ctrl-C and SIGTERM set the event. A second one raises KeyboardInterrupt.

    One that comes within a second counts as the same: a terminal and torchrun both send it to a rank.
    """
    event, first = threading.Event(), 0.0

    def stop(*_: object) -> None:
        nonlocal first
        if not event.is_set():
            first = time.monotonic()
            event.set()
            say("stopping behind this step, with a checkpoint; once more stops at once")
        elif time.monotonic() - first > _AGAIN_AFTER_S:
            raise KeyboardInterrupt("the same command goes on from the last checkpoint")

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # one that is ignored stays so, as behind nohup
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _figures(found: Mapping[str, SupportsFloat]) -> dict[str, float]:
    """What `evaluate` has returned. NumPy's numbers and tensors of one number become such of Python."""
    figures = {}
    for name, value in found.items():
        try:
            figures[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"evaluate must return numbers by name, but {name!r} is {value!r:.80}") from error
    return figures


def _nothing(message: str) -> None:
    pass
