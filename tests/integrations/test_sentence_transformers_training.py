"""Training a model with sentence-transformers."""

import copy
import json
import shutil

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments

from nvembed_fast import NVEmbed, ops
from nvembed_fast.encoder import UntrainedModel
from nvembed_fast.integrations.sentence_transformers import load

QUERIES = ["what is one?", "and two words?", "which text is the longest of all?", "four"]
ANSWERS = ["one", "two words here", "this text is longer than the others are", "4"]
PROMPT = "Instruct: find the text\nQuery: "


@pytest.fixture
def model(tiny_directory) -> SentenceTransformer:
    return load(tiny_directory, device="cpu").train()


def features(model: SentenceTransformer) -> list[dict]:
    return [model.preprocess(QUERIES, prompt=PROMPT), model.preprocess(ANSWERS)]


def gradients(model: SentenceTransformer, loss: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(features(model), None).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("options", [{"mini_batch_size": 2}, {"mini_batch_num_tokens": 24}])
def test_cached_gradients_equal_direct_ones(options, model):
    direct = gradients(model, losses.MultipleNegativesRankingLoss(model))
    cached = gradients(model, losses.CachedMultipleNegativesRankingLoss(model, **options))
    for name, wanted in direct.items():
        assert (cached[name] - wanted).norm() <= 2e-5 * wanted.norm(), name


def test_a_trained_model_is_no_longer_called_untrained(tiny_directory, tmp_path):
    fresh = shutil.copytree(tiny_directory, tmp_path / "fresh")
    config = json.loads((fresh / "config.json").read_text())
    (fresh / "config.json").write_text(json.dumps(config | {"is_untrained": True}))
    model = load(fresh, device="cpu")
    with pytest.warns(UntrainedModel):
        model.encode("a text")
    model.train()
    gradients(model, losses.MultipleNegativesRankingLoss(model))
    model.save_pretrained(str(tmp_path / "trained"))
    assert not NVEmbed.from_pretrained(tmp_path / "trained", device="cpu").config.is_untrained
    assert NVEmbed.from_pretrained(fresh, device="cpu").config.is_untrained


def test_the_instruction_is_not_pooled_in_training(model):
    pooled = model.preprocess(QUERIES, prompt=PROMPT)["pool_mask"]
    assert not pooled.all() and model.preprocess(QUERIES)["pool_mask"].all()


def test_checkpointed_layers_give_the_same_gradients_from_less(model):
    loss = losses.MultipleNegativesRankingLoss(model)
    kept: list[int] = []

    def count() -> dict[str, torch.Tensor]:
        kept.append(0)

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return gradients(model, loss)

    wanted = count()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = count()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert kept[1] < 0.6 * kept[0], "layers keep what is in them"
    name, twin = "0.network.embedding_model.norm.weight", copy.deepcopy(model)
    assert torch.equal(gradients(twin, losses.MultipleNegativesRankingLoss(twin))[name], wanted[name])
    model[0].gradient_checkpointing_disable()
    count()
    assert kept[2] == kept[0]
    model.gradient_checkpointing_enable(every_n_layers=2)
    count()
    assert kept[1] < kept[3] < kept[0]
    with pytest.raises(ValueError, match="use_reentrant=True is not supported"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="offload=True is not supported"):
        model.gradient_checkpointing_enable(offload=True)


def test_checkpointed_layers_run_again_in_the_implementation_that_was_asked_for(tiny_directory, monkeypatch):
    model = load(tiny_directory, device="cpu", model_kwargs={"impl": "torch"}).train()
    seen, real = [], ops.flash_attention
    monkeypatch.setattr(ops, "flash_attention", lambda *a, **k: seen.append(ops._state.impl) or real(*a, **k))
    model.gradient_checkpointing_enable()
    gradients(model, losses.MultipleNegativesRankingLoss(model))
    assert len(seen) == 2 * 2 * len(model[0].network.embedding_model.layers) and set(seen) == {"torch"}


def test_autocast_takes_effect_in_training_alone(model):
    plain = model(model.preprocess(ANSWERS))["sentence_embedding"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(model.preprocess(ANSWERS))["sentence_embedding"]
        vectors = copy.deepcopy(model).encode(ANSWERS)
    assert 1e-5 < (rough - plain).abs().max() < 0.05
    np.testing.assert_allclose(vectors, plain.detach().numpy(), rtol=0, atol=1e-6)


def arguments(directory, **options) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-3,
        prompts={"query": PROMPT},
        use_cpu=True,
        report_to=[],
        save_steps=2,
        logging_steps=1,
        disable_tqdm=True,
        **options,
    )


def trainer(model: SentenceTransformer, args: SentenceTransformerTrainingArguments):
    rows = Dataset.from_dict({"query": QUERIES * 4, "answer": ANSWERS * 4})
    loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=32)
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=rows, loss=loss)


def test_trainer_saves_and_goes_on(model, tmp_path):
    start = model.encode(ANSWERS)
    straight = trainer(model, arguments(tmp_path / "a", bf16=True, gradient_checkpointing=True))
    straight.train()
    history = [row["loss"] for row in straight.state.log_history if "loss" in row]
    assert history[-1] < history[0]
    trained = model.encode(ANSWERS)
    assert np.abs(trained - start).max() > 1e-3
    saved = load(tmp_path / "a" / "checkpoint-4", device="cpu")
    np.testing.assert_allclose(saved.encode(ANSWERS), trained, rtol=0, atol=1e-6)

    again = load(tmp_path / "a" / "checkpoint-2", device="cpu")
    resumed = trainer(again, arguments(tmp_path / "a", bf16=True, gradient_checkpointing=True))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    np.testing.assert_allclose(again.encode(ANSWERS), trained, rtol=0, atol=1e-5)


def test_adapters(model, tmp_path):
    with pytest.raises(ValueError, match="peft.get_peft_model"):
        model.add_adapter(peft.LoraConfig(target_modules=["qkv_proj"]))
    before = model.encode(ANSWERS)
    # as the message says
    config = peft.LoraConfig(target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
    model[0].network = peft.get_peft_model(model[0].network, config)
    np.testing.assert_allclose(model.encode(ANSWERS), before, rtol=0, atol=1e-6)
    trainer(model, arguments(tmp_path / "a", save_strategy="no", gradient_checkpointing=True)).train()
    trained = model.encode(ANSWERS)
    assert np.abs(trained - before).max() > 1e-4
    with pytest.raises(ValueError, match="Merge it first"):
        model.save_pretrained(str(tmp_path / "out"))
    model[0].network = model[0].network.merge_and_unload()
    model.save_pretrained(str(tmp_path / "out"))
    np.testing.assert_allclose(load(tmp_path / "out").encode(ANSWERS), trained, rtol=0, atol=1e-5)
