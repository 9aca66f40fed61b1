"""LoRA on packed products and on the latent head: what it computes, what it trains, and how it merges."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from whole_model import (
    EVERY_HEAD,
    HEADS,
    gradients_of,
    head_name,
    loss_of,
    make_batch,
    make_model,
    oracle_of,
    slope_of,
)

from nvembed_fast import ops
from nvembed_fast.checkpoint import add_lora, merge_adapter
from nvembed_fast.checkpoint.names import published_tensors
from nvembed_fast.network.lora import AdaptedLinear
from nvembed_fast.network.model import NVEmbedModel

LAYER_PRODUCTS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
WITH_WEIGHTS = [head for head in HEADS if head[0] in ("latent", "self_attention")]


def adapted_model(head=HEADS[1], train="lora", dtype=torch.float32, dropout=0.0, layers=2) -> NVEmbedModel:
    """A small model in evaluation, with adapters as if trained."""
    model = make_model(head, dtype=dtype, layers=layers)
    add_lora(model, rank=4, alpha=8, dropout=dropout, head=train)
    fill_adapters(model)
    return model.eval()


def fill_adapters(model, seed: int = 3) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AdaptedLinear):
                module.lora_B.copy_(0.2 * torch.randn(module.lora_B.shape, generator=draw))


def with_whole_weights(model, head) -> NVEmbedModel:
    """The same model without adapters, each published matrix W + s B A by itself."""
    plain = make_model(head, dtype=next(model.parameters()).dtype)
    plain.load_state_dict({n: v for n, v in model.state_dict().items() if ".lora_" not in n})
    seen: dict[str, int] = {}
    for slot in published_tensors(model.config).values():
        module = model.get_submodule(slot.parameter.rpartition(".")[0])
        if isinstance(module, AdaptedLinear) and len(slot.shape) == 2:
            first = seen[slot.parameter] = seen.get(slot.parameter, -4) + 4
            a, b = module.lora_A[first : first + 4], module.lora_B[slot.rows]
            plain.get_parameter(slot.parameter).data[slot.rows] += (8 / 4) * (b @ a).detach()
    return plain.eval()


@pytest.fixture(autouse=True)
def _reference():
    with ops.use_impl("torch"):
        yield


@EVERY_HEAD
@pytest.mark.parametrize("train", ["full", "lora", "frozen"])
def test_a_fresh_adapter_changes_nothing_and_alone_is_trained(head, train):
    model, batch = make_model(head), make_batch()
    with torch.no_grad():
        wanted = model(batch)
    adapter = add_lora(model, rank=4, dropout=0.1, head=train)
    assert model.adapter is adapter and adapter.head == train
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(batch), wanted, rtol=1e-6, atol=1e-6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = {f"embedding_model.layers.{i}.{p}" for i in range(2) for p in LAYER_PRODUCTS}
    wanted = {f"{layer}.lora_{which}" for layer in layers for which in "AB"}
    of_head = {n for n, _ in model.named_parameters() if n.startswith("head.")}
    if train == "full":
        wanted |= of_head
    elif train == "lora":
        wanted |= {n for n in of_head if ".lora_" in n}
        assert bool(wanted & of_head) == (head in WITH_WEIGHTS)
    assert trained == wanted
    fill_adapters(model)
    grads = gradients_of(model.train(), batch, "torch")
    assert grads.keys() == trained and all(g is not None and g.any() for g in grads.values())


@EVERY_HEAD
def test_each_packed_matrix_has_an_adapter_of_its_own(head):
    """W + s B A per published matrix, in float64. Both forms of the latents."""
    model = adapted_model(head, dtype=torch.float64)
    plain = with_whole_weights(model, head)
    batch = make_batch()
    with torch.no_grad():
        wanted, before = plain(batch), make_model(head, dtype=torch.float64)(batch)
        assert (wanted - before).abs().max() > 1e-2, "adapters that do nothing prove nothing"
        torch.testing.assert_close(model(batch), wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model.token_states(batch), plain.token_states(batch), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head", WITH_WEIGHTS, ids=head_name)
def test_every_gradient_of_an_adapter_is_the_slope_of_the_loss(head):
    model, batch = oracle_of(adapted_model(head)), make_batch()
    grads = gradients_of(model, batch, "torch")
    for name, gradient in grads.items():
        weight = model.get_parameter(name)
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        slope = slope_of(model, batch, weight, direction)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-7, msg=name)
    assert any(".to_kv.lora_A" in name for name in grads) == (head[0] == "latent")


@EVERY_HEAD
@pytest.mark.parametrize("train", ["full", "lora"])
def test_merged_equals_unmerged(head, train):
    model, batch = adapted_model(head, train), make_batch()
    with torch.no_grad():
        wanted = model(batch)
        merge_adapter(model)
        assert not any(isinstance(m, AdaptedLinear) for m in model.modules()) and model.adapter is None
        assert all(type(m) is ops.Linear for n, m in model.named_modules() if n.endswith("_proj"))
        torch.testing.assert_close(model(batch), wanted, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == make_model(head).state_dict().keys()
    with pytest.raises(ValueError, match="the model has no adapter to merge"):
        merge_adapter(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_beside_16_bits_are_fp32_and_compute_in_the_dtype_of_the_input(dtype):
    model, batch = adapted_model(train="full", dtype=dtype), make_batch()
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else dtype), name
    exact = adapted_model(train="full", dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    assert model.embedding_model(batch).dtype == dtype
    with torch.no_grad():
        vectors, wanted = model(batch), exact(batch)
    assert vectors.dtype == torch.float32
    error = (vectors - wanted).norm() / wanted.norm()
    plain, rounded = (with_whole_weights(m, HEADS[1]) for m in (exact, exact))
    with torch.no_grad():
        eager = (rounded.to(dtype)(batch) - plain(batch)).norm() / wanted.norm()
    assert error < 2 * eager + 1e-3
    grads = gradients_of(model.train(), batch, "torch")
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())


def test_autocast_takes_fp32_adapters(monkeypatch):
    model, batch = adapted_model(train="full", dtype=torch.bfloat16), make_batch()
    seen, real = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *a: seen.append(real(x, *a).dtype) or real(x, *a))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, batch)
    loss.backward()
    assert set(seen) == {torch.bfloat16}
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_dropout_acts_on_the_input_of_the_layers_in_training_alone():
    model, batch = adapted_model(train="lora", dropout=0.5), make_batch()
    with torch.no_grad():
        assert torch.equal(model(batch), model(batch))
        model.train()
        assert (model(batch) - model(batch)).abs().max() > 1e-3
    drops = {name: m.dropout for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    assert {d for name, d in drops.items() if name.startswith("head.")} == {0.0}
    assert {d for name, d in drops.items() if not name.startswith("head.")} == {0.5}
    product = model.embedding_model.layers[0].self_attn.qkv_proj
    x = torch.randn(5, 48)
    torch.manual_seed(1)
    got = product(x)
    torch.manual_seed(1)
    side = F.dropout(x, 0.5) @ product.lora_A.T
    q, k, v = (side[:, 4 * i : 4 * i + 4] @ b.T for i, b in enumerate(product.lora_B.split(product.rows)))
    torch.testing.assert_close(got, x @ product.weight.T + 2 * torch.cat([q, k, v], 1))


@pytest.mark.parametrize("head", HEADS[:2], ids=head_name)
def test_the_cache_of_the_latents_follows_the_adapters(head):
    """Frozen adapters are multiplied out once. Trained ones are built anew, with their graph."""
    model, batch = adapted_model(head), make_batch()
    assert model.head.form() == head[1]
    model.requires_grad_(False)
    with torch.no_grad():
        first = model(batch)
        cached = model.head._constant()
        assert model.head._constant()[0] is cached[0]
        for write in (
            lambda p: p.mul_(1.5),
            lambda p: setattr(p, "data", p.data * 1.5),
            lambda p: p.data.mul_(-2),  # without a version
        ):
            write(model.head.to_kv.lora_B)
            for form, is_stale in model.head.stale().items():  # as NVEmbed.refresh does
                if is_stale:
                    model.head.forget(form)
            wanted = with_whole_weights(model, head)(batch)
            torch.testing.assert_close(model(batch), wanted, rtol=1e-4, atol=1e-5)
        assert (model(batch) - first).abs().max() > 1e-3
        model.head.to_kv.lora_B.requires_grad_()
        assert model.head._constant()[0] is not model.head._constant()[0]
    assert model.head._constant()[1].requires_grad
    with model.head.built_once():
        loss_of(model, batch).backward()
        assert model.head.to_kv.lora_B.grad is None
    assert model.head.to_kv.lora_B.grad.any()


def test_checkpointed_layers_draw_the_same_dropout_again():
    batch, found = make_batch(), []
    for checkpointed in (False, True):
        model = adapted_model(dropout=0.3).train()
        if checkpointed:
            model.checkpoint_layers()
        torch.manual_seed(5)
        found.append({n: g.clone() for n, g in gradients_of(model, batch, "torch").items()})
    assert all(torch.equal(found[0][name], g) for name, g in found[1].items())


def test_the_same_seed_gives_the_same_start_in_every_dtype():
    starts = []
    for dtype, seed in ((torch.float32, 0), (torch.bfloat16, 0), (torch.float32, 1)):
        model = make_model(dtype=dtype)
        state = torch.get_rng_state()
        add_lora(model, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        starts.append(model.embedding_model.layers[1].mlp.down_proj.lora_A)
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    assert starts[0].abs().max() <= 64**-0.5 < 1.1 * starts[0].abs().max()


@pytest.mark.parametrize("train", [{"head": "half"}, {"rank": 0}, {"alpha": 0}, {"dropout": 1.0}], ids=str)
def test_arguments_out_of_range(train):
    (name,) = train
    model = make_model()
    with pytest.raises(ValueError, match=f"{name} must be"):
        add_lora(model, **train)
    assert model.adapter is None and all(p.requires_grad for p in model.parameters())


def test_a_product_that_takes_no_adapter_is_named_and_nothing_is_changed():
    model = adapted_model()
    with pytest.raises(ValueError, match="has an adapter already: merge it"):
        add_lora(model)
    model = make_model()
    model.embedding_model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"embedding_model.layers.1.mlp.down_proj takes no adapter"):
        add_lora(model)
    assert not any(isinstance(m, AdaptedLinear) for m in model.modules())


def test_a_merged_weight_beyond_its_dtype():
    model = adapted_model(dtype=torch.float16)
    with torch.no_grad():
        model.embedding_model.layers[0].mlp.down_proj.lora_B.fill_(1e6)
    with pytest.raises(ValueError, match="a merged weight is beyond torch.float16.*bfloat16"):
        merge_adapter(model)


def test_copies_keep_their_adapters():
    model, batch = adapted_model(), make_batch()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(copied(batch), model(batch))
    assert copied.adapter == model.adapter == dataclasses.replace(model.adapter)


def test_a_row_does_not_depend_on_the_number_of_rows():
    product = adapted_model().embedding_model.layers[0].mlp.gate_up_proj
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        whole = product(x)
        torch.testing.assert_close(whole, x @ product.whole_weight().mT, rtol=1e-5, atol=1e-5)
        for rows in (1, 3, 70):
            assert torch.equal(product(x[:rows]), whole[:rows])
