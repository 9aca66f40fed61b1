"""Checkpoints: whole or absent through kills, errors and a full disk, and of the same run."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import intercept
from torch import nn
from training_runs import ROOT, losses, recipe_of, weights, write_pairs, write_recipe, write_start

from nvembed_fast.training import checkpoints
from nvembed_fast.training.checkpoints import State
from nvembed_fast.training.recipe import Recipe
from nvembed_fast.training.trainer import train

IDENTITY = {"output": "out", "seed": 3, "train.lr": 0.1, "train.steps": 5}


class Small:
    """Two parameters and their optimizer, some steps in."""

    def __init__(self, steps: int = 0):
        torch.manual_seed(1)
        network = nn.Linear(5, 3)
        self.parameters = dict(network.named_parameters())
        self.optimizer = torch.optim.AdamW([*self.parameters.values()], lr=0.1, fused=True)
        for _ in range(steps):
            network(torch.ones(2, 5)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, output: Path, step: int, keep: int = 2, identity=IDENTITY) -> None:
        state = State(step, {"a": 4 * step})
        checkpoints.save(output, state, self.parameters, self.optimizer, identity, keep=keep)

    def load(self, path: Path, identity=IDENTITY) -> State:
        return checkpoints.load(path, self.parameters, self.optimizer, identity)

    def content(self) -> list[torch.Tensor]:
        state = self.optimizer.state_dict()["state"]
        moments = [value for index in sorted(state) for _, value in sorted(state[index].items())]
        return [*(p.detach() for p in self.parameters.values()), *moments]


def test_what_is_saved_is_loaded(tmp_path):
    saved, loaded = Small(3), Small()
    saved.save(tmp_path, 7)
    assert loaded.load(checkpoints.newest(tmp_path)) == State(7, {"a": 28})
    ours, theirs = saved.content(), loaded.content()
    assert len(ours) == 8 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for small in (saved, loaded):  # and the next step is the same
        sum(p.sum() for p in small.parameters.values()).backward()
        small.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(saved.content(), loaded.content(), strict=True))
    names = {p.name for p in (tmp_path / "checkpoint-000007").iterdir()}
    assert names == {"state.json", "weights.safetensors", "optimizer.safetensors"}


def test_a_rank_that_does_not_write_copies_nothing(tmp_path):
    """A tensor on "meta" cannot be copied."""
    parameter = nn.Parameter(torch.ones(3, device="meta"))
    optimizer = torch.optim.SGD([parameter], momentum=0.9)
    optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    arguments = (tmp_path, State(5, {}), {"weight": parameter}, optimizer, IDENTITY)
    checkpoints.save(*arguments, keep=2, is_writer=False)
    with pytest.raises(NotImplementedError, match="meta"):
        checkpoints.save(*arguments, keep=2)
    assert not any(tmp_path.iterdir())


def test_old_ones_go_when_the_new_one_is_there(tmp_path):
    small = Small(1)
    for step in (5, 10, 15, 1_000_000):
        small.save(tmp_path, step, keep=2)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-000015", "checkpoint-1000000"}
    assert checkpoints.newest(tmp_path).name == "checkpoint-1000000"
    small.save(tmp_path, 1_000_005, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1000005"]


@pytest.mark.parametrize("damage", ["short", "no_state", "half_state", "no_weights", "empty"])
def test_a_damaged_one_is_not_taken_and_is_replaced(tmp_path, damage):
    small = Small(1)
    small.save(tmp_path, 5)
    small.save(tmp_path, 10)
    path = tmp_path / "checkpoint-000010"
    match damage:
        case "short":
            os.truncate(path / "optimizer.safetensors", 99)
        case "no_state":
            (path / "state.json").unlink()
        case "half_state":
            os.truncate(path / "state.json", 20)
        case "no_weights":
            (path / "weights.safetensors").unlink()
        case "empty":
            shutil.rmtree(path)
            path.mkdir()
    assert checkpoints.newest(tmp_path).name == "checkpoint-000005"
    small.save(tmp_path, 10)
    assert checkpoints.newest(tmp_path) == path and small.load(path).step == 10


def test_an_interruption_at_any_moment_leaves_a_whole_one(tmp_path, monkeypatch):
    """Behind the n-th call that renames, links, removes or syncs, for every n."""
    small = Small(1)
    for number in range(40):
        output = tmp_path / str(number)
        output.mkdir()
        small.save(output, 5, keep=1)
        calls = []

        def stop(calls=calls, number=number):
            calls.append(1)
            if len(calls) == number:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            intercept(patch, before=stop)
            try:
                small.save(output, 10, keep=1)
            except KeyboardInterrupt:
                pass
            else:
                assert len(calls) < number or number == 0
                if number:
                    break
        found = checkpoints.newest(output)
        assert found.name in ("checkpoint-000005", "checkpoint-000010")
        assert small.load(found).step == int(found.name[-2:])
        small.save(output, 15, keep=1)
        assert [p.name for p in output.iterdir() if not p.name.startswith(".saving-")] == [
            "checkpoint-000015"
        ]
    assert number > 8, "too few moments were tried, so this test would prove nothing"


@pytest.mark.parametrize("where", ["weights", "moments", "state", "sync"])
def test_a_full_disk_leaves_the_last_one(tmp_path, monkeypatch, where):
    small = Small(1)
    small.save(tmp_path, 5)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real, calls = checkpoints.save_file, []

    def fail(*arguments, **options):
        calls.append(1)
        if where == "weights" or len(calls) > 1:
            raise full
        return real(*arguments, **options)

    def fail_at_once(*arguments, **options):
        raise full

    if where in ("weights", "moments"):
        monkeypatch.setattr(checkpoints, "save_file", fail)
    elif where == "state":
        monkeypatch.setattr(Path, "write_text", fail_at_once)
    else:
        monkeypatch.setattr(os, "fsync", fail_at_once)
    with pytest.raises(
        OSError, match="No space left on device.*: checkpoint-000005 stays, and the same command"
    ):
        small.save(tmp_path, 10)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000005"]
    assert small.load(checkpoints.newest(tmp_path)).step == 5


def test_a_limit_on_files_leaves_the_last_one(tmp_path, limited_files):
    """As with a quota: safetensors meets it in its own code."""
    small = Small(1)
    small.save(tmp_path, 5)
    stays = pytest.raises(OSError, match="File too large.*: checkpoint-000005 stays")
    with limited_files(100), stays:
        small.save(tmp_path, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000005"]


def test_the_first_one_on_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(
        checkpoints, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    with pytest.raises(OSError, match=r"cannot write .*checkpoint-000005 \(full\): there is no other"):
        Small(1).save(tmp_path, 5)


def test_another_run_is_refused_with_what_differs(tmp_path):
    small = Small(1)
    small.save(tmp_path, 5)
    path = checkpoints.newest(tmp_path)
    harmless = {"output": "moved", "train.steps": 9, "train.max_tokens": 4, "log.wandb": True}
    small.load(path, IDENTITY | harmless)
    before = [t.clone() for t in small.content()]
    with pytest.raises(
        ValueError, match=r"is of another run: seed was 3 and is 4, train.lr was 0.1 and is 0.2\. "
    ):
        small.load(path, IDENTITY | {"seed": 4, "train.lr": 0.2})
    with pytest.raises(ValueError, match="train.new was None and is 1"):
        small.load(path, IDENTITY | {"train.new": 1})
    assert all(torch.equal(a, b) for a, b in zip(before, small.content(), strict=True))
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2, and 1 is read here"):
        small.load(path)


def test_a_key_that_is_younger_than_the_checkpoint_counts_as_its_default(tmp_path):
    small = Small(1)
    small.save(tmp_path, 5)
    path = checkpoints.newest(tmp_path)
    young = {"train.clip": 1.0, "data.0.separate": False, "model.layers": None}
    assert small.load(path, IDENTITY | young).step == 5
    for key, value in {"train.clip": 2.0, "data.0.separate": True, "model.layers": 3}.items():
        with pytest.raises(ValueError, match=f"is of another run: {key} was .* and is {value}"):
            small.load(path, IDENTITY | young | {key: value})


def test_tensors_of_another_model_are_refused(tmp_path):
    small = Small(1)
    small.save(tmp_path, 5)
    path = checkpoints.newest(tmp_path)
    with pytest.raises(ValueError, match="lacks 'more', so it is of another model"):
        checkpoints.load_weights(path, small.parameters | {"more": nn.Parameter(torch.ones(1))})
    with pytest.raises(ValueError, match="holds 'bias', so it is of another model"):
        checkpoints.load_weights(path, {"weight": small.parameters["weight"]})
    with pytest.raises(ValueError, match=r"'bias' is \[3\] and not \[4\]"):
        checkpoints.load_weights(path, small.parameters | {"bias": nn.Parameter(torch.ones(4))})


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.long)])
def test_killed_runs_end_like_an_undisturbed_one(tmp_path, start, kills):
    write_pairs(tmp_path / "pairs.jsonl")
    settings = {"steps": 16, "checkpoint_every": 2, "lora_rank": 2, "lora_dropout": 0.1}
    whole = recipe_of(tmp_path, start, output="whole", **settings)
    began = time.monotonic()
    train(whole)
    seconds = 1.2 * (time.monotonic() - began)
    file = write_recipe(tmp_path / "killed.toml", recipe_of(tmp_path, start, output="killed", **settings))
    script = [sys.executable, str(ROOT / "tests" / "killed_runs.py"), file, kills, 1, seconds / 2]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [str(a) for a in script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > kills / 4, "too few runs were killed at work, so this test would prove nothing"
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    left = {p.name for p in (tmp_path / "killed").iterdir()} - {
        p.name for p in (tmp_path / "whole").iterdir()
    }
    assert not left


def test_a_run_of_another_recipe_or_other_data_does_not_go_on(tmp_path, start):
    write_pairs(tmp_path / "pairs.jsonl")
    recipe = recipe_of(tmp_path, start, steps=2)
    train(recipe)
    saved = weights(tmp_path / "out")
    other = replace(recipe, train=replace(recipe.train, temperature=0.5))
    with pytest.raises(ValueError, match="train.temperature was 0.1 and is 0.5"):
        train(other)
    write_pairs(tmp_path / "pairs.jsonl", seed=1)
    with pytest.raises(ValueError, match="content of pairs.jsonl was '.*' and is '.*'"):
        train(recipe)
    assert all(torch.equal(saved[n], v) for n, v in weights(tmp_path / "out").items())
    assert len(losses(tmp_path / "out")) == 2


def test_a_run_whose_only_checkpoint_is_damaged_does_not_begin_anew(tmp_path, start):
    write_pairs(tmp_path / "pairs.jsonl")
    recipe = recipe_of(tmp_path, start, keep_checkpoints=1)
    with pytest.raises(ZeroDivisionError):
        train(recipe, evaluate=lambda *_: {"none": 1 / 0}, evaluate_every=2)
    path = tmp_path / "out" / "checkpoint-000002"
    os.truncate(path / "weights.safetensors", 99)
    with pytest.raises(
        ValueError, match="checkpoint-000002 is damaged, and there is no other checkpoint: bring"
    ):
        train(recipe)
    assert [step for step, _ in losses(tmp_path / "out")] == [1, 2]
    shutil.rmtree(path)
    train(recipe)
    assert len(losses(tmp_path / "out")) == 6


def test_a_checkpoint_in_16_bits_goes_on_in_fp32(tmp_path):
    """As versions before 0.2 left one where all weights were trained with dtype = "bfloat16"."""
    old, new = Small(1), Small()
    old.parameters = {name: nn.Parameter(p.detach().bfloat16()) for name, p in old.parameters.items()}
    old.optimizer = torch.optim.AdamW([*old.parameters.values()], lr=0.1, fused=True)
    for parameter in old.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    old.optimizer.step()
    old.save(tmp_path, 5)
    assert new.load(checkpoints.newest(tmp_path)).step == 5
    for ours, theirs in zip(new.content(), old.content(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())


def test_a_moved_run_goes_on(tmp_path, start):
    (tmp_path / "a").mkdir()
    write_pairs(tmp_path / "a" / "pairs.jsonl")
    train(recipe_of(tmp_path / "a", start, steps=2))
    shutil.move(tmp_path / "a", tmp_path / "b")
    said = []
    train(recipe_of(tmp_path / "b", start, steps=4), say=said.append)
    assert "going on from checkpoint-000002" in said
    assert [step for step, _ in losses(tmp_path / "b" / "out")] == [1, 2, 3, 4]


def test_a_run_goes_on_with_renamed_files_of_data(tmp_path, start):
    """Their names are in the order of their rows, and stay those of the first step."""

    def recipe(output: str, *names: str) -> Recipe:
        raw = recipe_of(tmp_path, start, output=output).to_dict()
        raw["data"] = [raw["data"][0] | {"file": str(tmp_path / name)} for name in names]
        return Recipe.from_dict(raw)

    write_pairs(tmp_path / "a.jsonl", seed=1)
    write_pairs(tmp_path / "b.jsonl", seed=2)
    train(recipe("whole", "a.jsonl", "b.jsonl"))
    with pytest.raises(ZeroDivisionError):  # behind the checkpoint of step 2
        train(recipe("out", "a.jsonl", "b.jsonl"), evaluate=lambda *_: {"none": 1 / 0}, evaluate_every=2)
    with pytest.raises(ValueError, match="the data sets stood in another order, a.jsonl, b.jsonl: put them"):
        train(recipe("out", "b.jsonl", "a.jsonl"))
    (tmp_path / "a.jsonl").rename(tmp_path / "c.jsonl")
    (tmp_path / "b.jsonl").rename(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="the data sets stood in another order, a.jsonl, b.jsonl: put them"):
        train(recipe("out", "a.jsonl", "c.jsonl"))
    train(recipe("out", "c.jsonl", "a.jsonl"))
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
