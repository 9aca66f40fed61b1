"""Steps in chunks of a token budget have the gradient of the whole batch."""

import dataclasses
import itertools

import pytest
import torch
from cached_steps import (
    dropped_model,
    gradients,
    in_batch_loss,
    make_texts,
    own_batch,
    own_loss,
    plain_vectors,
    seed_of,
    worst_difference,
)
from two_ranks import ROOT, run_on_two_ranks
from whole_model import HEADS, head_name

from nvembed_fast import ops
from nvembed_fast.packing import token_budget_batches
from nvembed_fast.tokenization import TokenizedTexts
from nvembed_fast.training.auxiliary_losses import candidate_distillation
from nvembed_fast.training.grad_cache import cached_step, direct_step
from nvembed_fast.training.loss import LossResult


@pytest.fixture(autouse=True)
def _reference():
    with ops.use_impl("torch"):
        yield


def plain_gradients(model, texts, max_tokens, loss=in_batch_loss):
    result = loss(plain_vectors(model, texts, max_tokens))
    result.loss.backward()
    found = gradients(model)
    model.zero_grad()
    return result.loss.detach(), found


@pytest.mark.parametrize("head", [HEADS[0], HEADS[1], HEADS[2]], ids=head_name)
@pytest.mark.parametrize("max_tokens", [64, 10_000])
def test_cached_chunks_have_the_plain_gradient_with_dropout_on(head, max_tokens):
    model, texts = dropped_model(head=head), make_texts()
    assert (len(token_budget_batches(texts.lengths(), max_tokens)) > 3) == (max_tokens == 64)
    with torch.no_grad():
        one, other = (plain_vectors(model.train(mode), texts, max_tokens) for mode in (False, True))
    assert (one - other).abs().max() > 1e-3, "no active dropout, so this test would prove nothing"
    loss, wanted = plain_gradients(model, texts, max_tokens)
    result = cached_step(model, texts, in_batch_loss, max_tokens=max_tokens, seed=seed_of)
    assert worst_difference(gradients(model), wanted) < 1e-6
    torch.testing.assert_close(result.loss, loss, rtol=1e-6, atol=0)
    assert not result.loss.requires_grad and result.metrics.keys() == {"n"}


def test_without_the_same_dropout_again_the_gradient_is_another():
    """What the seeds are for."""
    model, texts = dropped_model(), make_texts()
    _, wanted = plain_gradients(model, texts, 64)
    forwards, num_chunks = itertools.count(), len(token_budget_batches(texts.lengths(), 64))

    def seed(chunk: int) -> int:
        return seed_of(chunk) + 500 * (next(forwards) >= num_chunks)

    cached_step(model, texts, in_batch_loss, max_tokens=64, seed=seed)
    assert worst_difference(gradients(model), wanted) > 0.1


def test_gradients_add_up_and_the_random_numbers_of_the_caller_go_on():
    model, texts = dropped_model(), make_texts()
    _, wanted = plain_gradients(model, texts, 64)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    for _ in range(2):
        cached_step(model, texts, in_batch_loss, max_tokens=64, seed=seed_of)
    assert torch.equal(torch.rand(3), expected)
    assert worst_difference(gradients(model), {name: 2 * g for name, g in wanted.items()}) < 1e-6


def test_the_matrices_of_the_latents_are_built_once_a_step(monkeypatch):
    model, texts = dropped_model(), make_texts()
    built, real = [], model.head._build
    monkeypatch.setattr(model.head, "_build", lambda: built.append(1) or real())
    cached_step(model, texts, in_batch_loss, max_tokens=64, seed=seed_of)
    assert len(built) == 1
    direct_step(model, own_batch(), own_loss, max_tokens=64, seed=seed_of)
    assert len(built) == 2


def test_one_graph_at_a_time(monkeypatch):
    """What a chunk saves for its backward is gone before the next chunk's forward."""
    model, texts = dropped_model(), make_texts()
    alive, most = set(), [0]

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(id(self))
            most[0] = max(most[0], len(alive))

        def __del__(self):
            alive.discard(id(self))

    def counted(max_tokens):
        alive.clear()
        most[0] = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            cached_step(model, texts, in_batch_loss, max_tokens=max_tokens, seed=seed_of)
        return most[0]

    whole, chunked = counted(10_000), counted(64)
    assert chunked < 1.5 * whole, "chunks keep one another's graphs"


def test_direct_chunks_of_whole_rows_have_the_plain_gradient():
    batch = own_batch()
    for max_tokens in (60, 10_000):
        model = dropped_model(dropout=0.0).double()
        vectors = plain_vectors(model, batch.texts, 10_000)
        wanted_result = own_loss(vectors, batch)
        wanted_result.loss.backward()
        wanted = gradients(model)
        model.zero_grad()
        parts = []

        def loss(found, part, parts=parts):
            parts.append(part)
            return own_loss(found, part)

        result = direct_step(model, batch, loss, max_tokens=max_tokens, seed=seed_of)
        assert (len(parts) > 2) == (max_tokens == 60)
        assert sorted(row for part in parts for row in part.rows) == sorted(batch.rows)
        assert worst_difference(gradients(model), wanted) < 1e-6
        torch.testing.assert_close(result.loss, wanted_result.loss.detach(), rtol=1e-6, atol=0)
        # columns of other parts are nobody's candidates, and are not seen
        del wanted_result.metrics["masked_by_scope"]
        for name, value in wanted_result.metrics.items():
            torch.testing.assert_close(result.metrics[name], value.detach(), rtol=1e-5, atol=1e-6, msg=name)


def test_a_direct_step_that_is_repeated_is_the_same():
    model, batch, found = dropped_model(), own_batch(), []
    for _ in range(2):
        torch.rand(3)
        direct_step(model, batch, own_loss, max_tokens=60, seed=seed_of)
        found.append(gradients(model))
        model.zero_grad()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_rows_that_share_a_document_need_the_cache():
    batch = own_batch()
    shared = batch.candidates.column_scopes.clone()
    shared[7, 0] = batch.candidates.row_scopes[1]
    candidates = dataclasses.replace(batch.candidates, column_scopes=shared)
    with pytest.raises(ValueError, match="rows 1 and 3 share document 7: use cached_step"):
        shared_batch = dataclasses.replace(batch, candidates=candidates)
        direct_step(dropped_model(), shared_batch, own_loss, max_tokens=64, seed=seed_of)


def test_a_loss_that_no_vector_reaches_and_a_batch_without_texts_give_zeros():
    model = dropped_model()
    empty = TokenizedTexts([], [])
    seen = []

    def loss(vectors):
        seen.append(vectors.shape)
        return LossResult(vectors.sum(), {})

    result = cached_step(model, empty, loss, max_tokens=64, seed=seed_of)
    assert seen == [(0, 48)] and result.loss == 0
    assert all(not g.any() for g in gradients(model).values())


def test_another_module_is_refused():
    with pytest.raises(ValueError, match="cached_step trains an NVEmbedModel.*got Linear"):
        cached_step(torch.nn.Linear(1, 1), make_texts(), in_batch_loss, max_tokens=64, seed=seed_of)
    with pytest.raises(ValueError, match="max_batch_tokens must be at least 1"):
        cached_step(dropped_model(), make_texts(), in_batch_loss, max_tokens=0, seed=seed_of)


@pytest.mark.parametrize("step", ["one chunk", "chunks", "rows"])
def test_backwards_of_a_step_are_outside_of_autocast(step):
    """Else the products of an fp32 loss, and those of the latents' matrices, have bf16 gradients."""
    model, seen, found = dropped_model(), [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
    batch, teacher = own_batch(), torch.randn(18, 7, generator=torch.Generator().manual_seed(3))
    candidates = dataclasses.replace(
        batch.candidates, teacher_queries=teacher[:6], teacher_documents=teacher[6:]
    )

    def distillation(vectors):
        return candidate_distillation(
            vectors[:6], vectors[6:], candidates, temperature=0.05, teacher_temperature=0.05
        )

    def loss(vectors, part=None):
        vectors.retain_grad()
        found.append(vectors)
        return LossResult(distillation(vectors), {})

    with torch.autocast("cpu", torch.bfloat16):
        if step == "rows":
            direct_step(model, batch, loss, max_tokens=10_000, seed=seed_of)
        else:
            max_tokens = 64 if step == "chunks" else 10_000
            cached_step(model, batch.texts, loss, max_tokens=max_tokens, seed=seed_of)
    assert seen and not any(seen)
    wide = found[0].detach().double().requires_grad_()
    distillation(wide).backward()
    assert float((found[0].grad - wide.grad).norm() / wide.grad.norm()) < 1e-5


@pytest.mark.slow
def test_two_ranks_get_the_gradient_of_one_process(tmp_path):
    """DDP and FSDP2, with other numbers of chunks, and refused where the ranks differ."""
    said = run_on_two_ranks(ROOT / "tests" / "cached_steps.py", tmp_path / "adapter", timeout=100)
    for how in ("ddp", "fsdp2"):
        for what in ("equal on rank", "refused on rank", "equal again on rank"):
            assert said.count(f"{how} {what}") == 2, said
    assert said.count("bf16 equal on rank") == 2
