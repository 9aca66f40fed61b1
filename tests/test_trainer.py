"""The trainer: a run from rows to a model that encodes, its metrics, its end by a signal or by a NaN."""

import json
import math
import os
import shutil
import signal
import threading
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import make_pipeline
from training_runs import COMMAND, losses, recipe_of, weights, write_pairs, write_recipe, write_start
from two_ranks import run_on_two_ranks

from nvembed_fast import NVEmbed
from nvembed_fast.checkpoint import demo
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.training import ranks, trainer
from nvembed_fast.training.recipe import Recipe, RecipeError
from nvembed_fast.training.run_log import read_metrics
from nvembed_fast.training.start import load_network
from nvembed_fast.training.trainer import Diverged, Stopped, train


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture
def folder(tmp_path) -> Path:
    write_pairs(tmp_path / "pairs.jsonl")
    return tmp_path


def test_a_run_ends_with_a_model_that_encodes(folder, start):
    said = []
    recipe = recipe_of(folder, start, steps=12, lr=3e-3)
    assert train(recipe, say=said.append) == folder / "out"
    assert said[0] == f"40 rows; loading {start}"
    lines = read_metrics(folder / "out" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        assert all(math.isfinite(value) for value in line.values()), line
        assert {"loss", "lr", "tokens_per_s", "gradient_norm", "memory_gb", "accuracy"} <= line.keys()
        assert {"positive_cosine", "negative_cosine", "hard_negative_wins", "masked_by_key"} <= line.keys()
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert sorted(p.name for p in (folder / "out").glob("checkpoint-*")) == [
        "checkpoint-000010",
        "checkpoint-000012",
    ]
    model = NVEmbed.from_pretrained(folder / "out", device="cpu")
    assert not model.config.is_untrained
    assert torch.isfinite(model.encode(["w1 w2", "w3"])).all()
    before = weights(start)
    assert all(not torch.equal(before[n], v) for n, v in weights(folder / "out").items() if "latents" in n)
    assert said[-1].endswith("out: the trained model") and "step 12 of 12: loss" in said[-2]


def test_a_line_counts_the_tokens_of_its_step(folder, start, monkeypatch):
    real, counted = trainer._Run.gradient, []

    def gradient(self, step, batch):
        counted.append(sum(map(len, batch.texts.ids)))
        return real(self, step, batch)

    monkeypatch.setattr(trainer._Run, "gradient", gradient)
    train(recipe_of(folder, start, steps=3))
    assert [line["tokens"] for line in read_metrics(folder / "out" / "metrics.jsonl")] == counted
    assert len({*counted}) == 3, "all steps have as many tokens, so this test would prove little"


@pytest.mark.parametrize("head", ["full", "lora", "frozen"])
def test_lora_is_merged_and_its_adapter_kept(folder, start, head):
    recipe = recipe_of(folder, start, lora_rank=4, lora_dropout=0.1, head=head, checkpoint_layers=True)
    train(recipe)
    merged = NVEmbed.from_pretrained(folder / "out", device="cpu")
    adapted = NVEmbed.from_pretrained(start, adapter=folder / "out" / "adapter", device="cpu")
    with pytest.raises(
        ValueError, match="was trained on other weights .* Load it on .*base. If .* merged, load"
    ):
        NVEmbed.from_pretrained(folder / "out", adapter=folder / "out" / "adapter", device="cpu")
    texts = ["w1 w2", "w3 w4 w5 w6"]
    ours, theirs = merged.encode(texts), adapted.encode(texts)
    assert (ours - theirs).abs().max() < 1e-5
    before, after = weights(start), weights(folder / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {n for n in changed if "layers.0" in n} and not {n for n in changed if "embed_tokens" in n}
    assert bool({n for n in changed if n.startswith("latent")}) == (head != "frozen")
    checkpoint = load_file(folder / "out" / "checkpoint-000006" / "weights.safetensors")
    assert not {name for name in checkpoint if "embed_tokens" in name}, "frozen weights are stored"


@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_frozen_table_of_embeddings_keeps_its_bytes_and_is_in_no_checkpoint(folder, start, is_frozen):
    train(recipe_of(folder, start, freeze_embeddings=is_frozen))
    before, after = weights(start), weights(folder / "out")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == ({name for name in before if "embed_tokens" in name} if is_frozen else set())
    for file in ("weights", "optimizer"):
        stored = load_file(folder / "out" / "checkpoint-000006" / f"{file}.safetensors")
        assert any("embed_tokens" in name for name in stored) != is_frozen


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_trained_weights_are_float32_whatever_the_dtype(folder, start, dtype):
    """In 16 bits most of them would stay: a step of 1e-5 is below half a unit of their last place."""
    said = []
    recipe = recipe_of(folder, start, steps=1, warmup=0, lr=1e-5, dtype=dtype)
    train(recipe, say=said.append)
    stored = load_file(folder / "out" / "checkpoint-000001" / "weights.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert sum("with lora_rank = 0 all are float32" in line for line in said) == 1
    before, after = weights(start), weights(folder / "out")
    matrix = next(name for name in after if name.endswith("layers.0.mlp.up_proj.weight"))
    assert (after[matrix] != before[matrix]).float().mean() > 0.9
    network = load_network(start, recipe_of(folder, start, dtype=dtype, lora_rank=2), torch.device("cpu"))
    dtypes = {value.dtype for value in network.parameters() if value.requires_grad}
    assert dtypes == {torch.float32} != {value.dtype for value in network.parameters()}


def test_a_step_without_negatives_is_told_once(folder, start):
    (folder / "pairs.jsonl").write_text('{"query": "w1", "pos": "w2"}\n' * 40)
    said = []
    train(recipe_of(folder, start, steps=3), say=said.append)
    assert [line for line in said if "no negative" in line] == [
        "step 1 had no negative for any row, so its contrastive loss is 0"
    ]
    with pytest.raises(ValueError, match="no row has negatives, so with train.batch = 1 there is nothing"):
        train(recipe_of(folder, start, output="other", batch=1))
    # a teacher's scores say which of two positives is nearer
    scored = '{"query": "w1", "pos": ["w2", "w3"], "pos_scores": [1.0, 0.1]}\n'
    (folder / "pairs.jsonl").write_text(scored * 40)
    data = {"positives": 2}
    train(recipe_of(folder, start, output="other", batch=1, steps=1, distillation=1.0, data=data))
    assert read_metrics(folder / "other" / "metrics.jsonl")[0]["distillation"] > 0


def test_the_rate_rises_and_falls(folder, start):
    train(recipe_of(folder, start, steps=6, warmup=2, lr=0.5))
    rates = [line["lr"] for line in read_metrics(folder / "out" / "metrics.jsonl")]
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.375, 0.25, 0.125])


def test_the_next_call_goes_on_and_a_finished_run_is_left_as_it_is(folder, start, ctrl_c):
    whole = recipe_of(folder, start, output="whole")
    train(whole)
    recipe, said = recipe_of(folder, start), []
    real = trainer._Run.step

    def stop_at_3(self, step, batch):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, step, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Run, "step", stop_at_3)
        with pytest.raises(Stopped, match="step 3 of 6 is done and saved; the same command goes on"):
            train(recipe, say=said.append)
    assert any("stopping behind this step" in line for line in said)
    assert losses(folder / "out") == losses(folder / "whole")[:3]
    assert not (folder / "out" / "config.json").exists()
    with pytest.raises(RecipeError, match="out is a run that has not ended: go on with it before one"):
        train(recipe_of(folder, folder / "out", output="second"))
    for _ in range(2):
        train(recipe, say=said.append)
        assert losses(folder / "out") == losses(folder / "whole")
        ours, theirs = weights(folder / "out"), weights(folder / "whole")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "going on from checkpoint-000003" in said and "checkpoint-000006: 6 of 6 steps are done" in said


def test_a_second_signal_stops_at_once(folder, start, ctrl_c, monkeypatch):
    monkeypatch.setattr(trainer, "_AGAIN_AFTER_S", 0.05)

    pressed = []

    def slow(self, step, batch):
        for _ in range(2):  # both of one key press
            os.kill(os.getpid(), signal.SIGINT)
        pressed.append(step)
        time.sleep(0.06)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(trainer._Run, "step", slow)
    with pytest.raises(KeyboardInterrupt, match="goes on from the last checkpoint") as stop:
        train(recipe_of(folder, start))
    assert not isinstance(stop.value, Stopped) and pressed == [0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_are_left_alone_in_a_thread(folder, start):
    before = signal.getsignal(signal.SIGTERM)
    found = []
    thread = threading.Thread(target=lambda: found.append(train(recipe_of(folder, start, steps=1))))
    thread.start()
    thread.join()
    assert found == [folder / "out"] and signal.getsignal(signal.SIGTERM) == before


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(folder, start, monkeypatch):
    recipe = recipe_of(folder, start)
    real = trainer.gathered_loss

    def poisoned(queries, documents, candidates, **options):
        poisoned.calls += 1
        return real(queries * (math.nan if poisoned.calls == 4 else 1), documents, candidates, **options)

    poisoned.calls = 0
    monkeypatch.setattr(trainer, "gathered_loss", poisoned)
    with pytest.raises(Diverged, match="step 4 has loss nan and gradient norm nan") as error:
        train(recipe)
    assert "checkpoint-000002 stays" in str(error.value)
    assert str(error.value).count("pairs.jsonl, line ") == 4
    assert [step for step, _ in losses(folder / "out")] == [1, 2, 3]
    monkeypatch.undo()
    train(recipe)
    train(recipe_of(folder, start, output="whole"))
    assert losses(folder / "out") == losses(folder / "whole")


def test_evaluation_by_callback(folder, start):
    calls = []

    def evaluate(network, tokenizer, step):
        assert not network.training and not torch.is_grad_enabled() and len(tokenizer(["w1"], "", 9).ids) == 1
        torch.rand(3)  # a callback may draw
        calls.append(step)
        return {"ndcg": (float, np.float32, torch.tensor)[len(calls) - 1](step / 8), "nan": math.nan}

    settings = {"steps": 5, "lora_rank": 2, "lora_dropout": 0.5}
    train(recipe_of(folder, start, **settings), evaluate=evaluate, evaluate_every=2)
    assert calls == [2, 4, 5]
    lines = (folder / "out" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": s, "ndcg": s / 8, "nan": None} for s in calls]
    train(recipe_of(folder, start, output="plain", **settings))
    assert losses(folder / "out") == losses(folder / "plain")


@pytest.mark.parametrize("figure", [None, "high", torch.ones(2)], ids=str)
def test_a_figure_that_is_no_number_is_named(figure, folder, start):
    with pytest.raises(TypeError, match="evaluate must return numbers by name, but 'ndcg' is"):
        train(recipe_of(folder, start, steps=1), evaluate=lambda *_: {"ndcg": figure})


@pytest.mark.parametrize("fatal", [2, 5])
def test_an_evaluation_that_a_kill_has_taken_is_made_on_resume(folder, start, fatal):
    """Behind a checkpoint, and behind the last one."""
    calls = []

    def evaluate(network, tokenizer, step):
        calls.append(step)
        if calls.count(fatal) == 1 and step == fatal:
            raise ZeroDivisionError
        return {"ndcg": step / 10}

    recipe, every = recipe_of(folder, start, steps=5), {"evaluate": evaluate, "evaluate_every": 2}
    with pytest.raises(ZeroDivisionError):
        train(recipe, **every)
    for _ in range(2):
        train(recipe, **every)
        lines = [json.loads(line) for line in (folder / "out" / "evaluations.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 4, 5]
        assert sorted(calls) == sorted([2, 4, 5, fatal])


def test_another_number_of_steps_tells_the_rate_that_moves(folder, start):
    told = []
    for steps in (4, 4, 8, 6):
        train(recipe_of(folder, start, steps=steps, lr=0.6, warmup=2), say=told.append)
    assert [line for line in told if "learning rate" in line] == [
        "train.steps was 4 and is 8: the learning rate of step 5 is 0.4 in the place of 0"
    ]


@pytest.mark.parametrize(("warmup", "is_told"), [(2, False), (3, True)])
def test_a_rate_that_is_never_reached_is_told(folder, start, warmup, is_told):
    told = []
    train(recipe_of(folder, start, steps=2, warmup=warmup), say=told.append)
    assert any("lr is never reached" in line for line in told) == is_told


def test_rows_with_own_candidates_take_the_direct_step(folder, start, monkeypatch):
    calls = []
    real = trainer.direct_step
    monkeypatch.setattr(trainer, "direct_step", lambda *a, **k: calls.append(1) or real(*a, **k))
    train(recipe_of(folder, start, steps=2, data={"in_batch": False, "hard_negatives": 2}))
    assert len(calls) == 2


@pytest.mark.parametrize("in_batch", [False, True])
def test_a_teachers_scores_pull_whatever_the_chunks(folder, start, in_batch):
    settings = {"steps": 2, "data": {"in_batch": in_batch, "hard_negatives": 2}, "distillation": 0.5}
    settings["lr"] = 1e-3  # Adam makes a whole step of a gradient that is all rounding
    for output, change in (
        ("plain", {"distillation": 0.0}),
        ("small", {"max_tokens": 40}),
        ("large", {"max_tokens": 4000}),
    ):
        train(recipe_of(folder, start, output, **settings | change))
    plain, small, large = (
        read_metrics(folder / name / "metrics.jsonl") for name in ("plain", "small", "large")
    )
    assert "distillation" not in plain[0] and large[0]["distillation"] > 0.01
    assert large[0]["loss"] == pytest.approx(plain[0]["loss"] + large[0]["distillation"] / 2, abs=1e-5)
    for one, other in zip(small, large, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
        assert one["distillation"] == pytest.approx(other["distillation"], abs=1e-5)
    assert abs(plain[0]["gradient_norm"] - large[0]["gradient_norm"]) > 1e-3
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    del lines[4]["neg_scores"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 5: no pos_scores and neg_scores"):
        train(recipe_of(folder, start, "bad", **settings))


def test_a_decoder_gets_a_head_and_a_model_may_lose_layers(folder, start, monkeypatch):
    raw = recipe_of(folder, start, steps=1).to_dict()
    decoder = start.parent / "decoder"
    monkeypatch.setattr(demo, "decoder", lambda: decoder)
    raw["model"] = {"start": "smollm2", "layers": 2, "pooling_head": "mean", "causal": True}
    train(Recipe.from_dict(raw))
    config = NVEmbedConfig.from_file(folder / "out" / "config.json")
    assert config.pooling_head == "mean" and config.text_config.num_hidden_layers == 2
    assert config.text_config.is_causal
    assert (folder / "out" / "start" / "config.json").exists()
    assert NVEmbed.from_pretrained(folder / "out", device="cpu").encode("w1").shape == (48,)
    raw["output"] = str(folder / "short")
    raw["model"] = {"start": str(start), "layers": 1}
    train(Recipe.from_dict(raw))
    assert NVEmbedConfig.from_file(folder / "short" / "config.json").text_config.num_hidden_layers == 1
    for change, message in (
        (
            {"pooling_head": "mean"},
            "model.pooling_head is 'mean', but .* pools by 'latent': leave the key out",
        ),
        ({"causal": True}, "model.causal is True, and .* was made with False: leave the key out"),
        ({"layers": 4}, "model.layers is 4, but .* has 3 layers"),
        (
            {"head_start": "mean"},
            "model.head_start is 'mean', but .* has a head already, and keeps it: leave",
        ),
        ({"num_latents": 512}, "model.num_latents is 512, but .* has a head already"),
    ):
        raw |= {"output": str(folder / "no"), "model": {"start": str(start)} | change}
        with pytest.raises(RecipeError, match=message):
            train(Recipe.from_dict(raw))


def test_nothing_of_a_replaced_pipeline_stays(folder, start):
    train(recipe := recipe_of(folder, start, steps=1))
    make_pipeline(folder / "out", "sentence_transformers.models.Dense")
    train(recipe)
    assert "mine" not in (folder / "out" / "config_sentence_transformers.json").read_text()
    assert NVEmbed.from_pretrained(folder / "out").max_seq_length == 4096


@pytest.mark.parametrize("layers", [None, 1])
def test_prompts_and_length_are_those_of_the_start(layers, folder, start):
    own = shutil.copytree(start, folder / "own")
    content = make_pipeline(own)
    raw = recipe_of(folder, own, steps=1).to_dict()
    raw["model"] |= {} if layers is None else {"layers": layers}
    train(Recipe.from_dict(raw))
    settings = "config_sentence_transformers.json"
    assert (folder / "out" / settings).read_text() == content[settings]
    assert NVEmbed.from_pretrained(folder / "out").max_seq_length == 64
    make_pipeline(own, "sentence_transformers.models.Dense")
    with pytest.raises(ValueError, match="Dense, which does not run here"):
        train(Recipe.from_dict(raw | {"output": str(folder / "other")}))
    assert not list((folder / "other").glob("checkpoint-*")), "it was told behind the training"


@pytest.mark.parametrize("name", ["smollm2", "owner/name"])
def test_a_name_is_no_folder_of_the_working_directory(name, folder, start, monkeypatch):
    recipe = recipe_of(folder, Path(name))
    (folder / "elsewhere" / name).mkdir(parents=True)
    monkeypatch.chdir(folder / "elsewhere")
    with pytest.raises(RecipeError, match=f"model.start '{name}' is no path beside the recipe, and one in"):
        train(recipe)


def test_a_start_made_by_another_recipe_is_refused(folder, start, monkeypatch):
    monkeypatch.setattr(
        trainer._Run, "loop", lambda *_: (_ for _ in ()).throw(OSError("before a checkpoint"))
    )
    raw = recipe_of(folder, start, steps=1).to_dict() | {"model": {"start": str(start), "layers": 1}}
    for _ in range(2):
        with pytest.raises(OSError, match="before a checkpoint"):
            train(Recipe.from_dict(raw))
    raw["model"]["layers"] = 2
    with pytest.raises(
        RecipeError, match=r"out.start was made by another recipe: model.layers was 1 and is 2"
    ):
        train(Recipe.from_dict(raw))


def test_a_run_goes_on_with_its_own_start(folder, start):
    raw = recipe_of(folder, start, steps=1).to_dict() | {"model": {"start": str(start), "layers": 1}}
    train(Recipe.from_dict(raw))
    told = []
    train(Recipe.from_dict(raw), say=told.append)
    assert "checkpoint-000001: 1 of 1 steps are done" in told
    raw["model"]["start"] = str(folder / "another")
    with pytest.raises(RecipeError, match="model.start was 'base' and is 'another'"):
        train(Recipe.from_dict(raw))


def test_two_runs_do_not_share_a_directory(folder, start, monkeypatch):
    recipe = recipe_of(folder, start)
    real, found = trainer._Run.step, []

    def step(self, number, batch):
        if not found:
            with pytest.raises(
                BlockingIOError, match="another process is at work in .*out: wait for its end"
            ):
                train(recipe)
            found.append(losses(folder / "out"))
        return real(self, number, batch)

    monkeypatch.setattr(trainer._Run, "step", step)
    train(recipe)
    assert found == [[]] and len(losses(folder / "out")) == 6
    train(recipe)  # it is free again


def test_a_directory_with_another_model_is_refused(folder, start):
    (folder / "out").mkdir()
    (folder / "out" / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"holds a model \(config.json\) and no checkpoint: choose another"):
        train(recipe_of(folder, start))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "w1"', "pairs.jsonl, line 3: not JSON"),
        ('{"query": "w1", "pos": []}', "pairs.jsonl, line 3: 'pos' is empty"),
        ('{"query": "w1", "pos": ["w1"]}', "line 3: the only positive equals the query"),
        ('{"query": 3, "pos": ["w1"]}', "line 3: 'query' must be a string"),
    ],
)
def test_bad_rows_are_named_before_anything_is_written(folder, start, line, message):
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    (folder / "pairs.jsonl").write_text("\n".join([*lines[:2], line, *lines[3:]]))
    with pytest.raises(ValueError, match=message):
        train(recipe_of(folder, start))
    assert not (folder / "out").exists()


@pytest.mark.parametrize("is_labelled", [False, True])
def test_a_row_that_a_late_step_cannot_use_is_refused_before_the_first(folder, start, is_labelled):
    """Its prompt fills max_length, or its class has one text."""
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    lines[30]["prompt"] = "w1 " * 60
    if is_labelled:
        lines = [{"text": line["query"], "label": "a"} for line in lines]
        lines[30:32] = [{"text": "w1", "label": "b"}] * 2
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = "no other text has the label 'b'" if is_labelled else "the instruction uses up all 48 tokens"
    with pytest.raises(ValueError, match=f"pairs.jsonl, line 31: {message}"):
        train(recipe_of(folder, start, steps=1, data={"labels": "examples" if is_labelled else "none"}))
    assert not (folder / "out" / "metrics.jsonl").exists()


def test_a_data_set_smaller_than_a_batch_is_refused(folder, start):
    write_pairs(folder / "pairs.jsonl", 3)
    with pytest.raises(ValueError, match="pairs.jsonl has 3 rows, fewer than a batch of 4"):
        train(recipe_of(folder, start))


def test_ranks_wait_for_what_the_first_does_alone(monkeypatch):
    """It reads all rows, and writes models. The default of NCCL is ten minutes."""
    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ranks, "_meeting_place", lambda: (ranks.dist.HashStore(), 1, 2))
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda *_, **options: given.update(options))
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: None)
    with ranks.joined("cpu") as here:
        assert here.size == 2 and here.rank == 1
    assert given["timeout"] >= timedelta(hours=1)


def test_ranks_that_see_other_checkpoints_are_refused(folder, start, monkeypatch):
    """As on two machines, each with an output of its own."""
    others = [2.0]  # the steps that another one has done

    class OfTwo(ranks.Ranks):
        def total(self, values):
            return [value + others.pop() if others else value for value in values]

    monkeypatch.setattr(trainer, "joined", lambda _: nullcontext(OfTwo(0, 1, torch.device("cpu"))))
    with pytest.raises(ValueError, match=r"the ranks see different checkpoints in .*out: .* shared by all"):
        train(recipe_of(folder, start))


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Losses within 1e-5, of the same steps."""
    one, two = losses(ours), losses(theirs)
    assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, 7))
    assert max(abs(a - b) for (_, a), (_, b) in zip(one, two, strict=True)) < 1e-5
    ours, theirs = weights(ours), weights(theirs)
    assert all((ours[name] - theirs[name]).abs().max() < 1e-4 for name in ours)


def test_two_ranks_have_the_losses_of_one_process(folder, start):
    """With unequal numbers of rows and of chunks on the ranks, LoRA and a teacher's scores."""
    settings = {"lr": 1e-3, "batch": 5, "lora_rank": 4, "distillation": 0.5}
    train(recipe_of(folder, start, **settings))
    recipe = recipe_of(folder, start, output="two", **settings)
    run_on_two_ranks(*COMMAND[1:], write_recipe(folder / "two.toml", recipe), timeout=200)
    assert_same_run(folder / "two", folder / "out")


def test_a_run_goes_on_with_another_number_of_ranks(folder, start):
    """From one process to two ranks of FSDP2, and with rows that see their own documents alone."""
    settings = {"lr": 1e-3, "batch": 5, "distillation": 0.5}
    data = {"in_batch": False, "hard_negatives": 2}
    train(recipe_of(folder, start, data=data, **settings))
    train(recipe_of(folder, start, output="both", data=data, **settings))
    shutil.rmtree(folder / "both" / "checkpoint-000006")
    recipe = recipe_of(folder, start, output="both", sharding="fsdp", data=data, **settings)
    script = Path(__file__).with_name("train_and_leave.py")
    said = run_on_two_ranks(script, write_recipe(folder / "both.toml", recipe), timeout=200)
    assert said.count("holds []") == 2, said
    assert_same_run(folder / "both", folder / "out")
