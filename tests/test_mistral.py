"""The backbone against transformers' own Mistral, and the properties of packing.

The reference runs with attn_implementation="eager": its mask is then the whole truth about what is seen.
"""

import dataclasses

import pytest
import torch
from whole_model import from_padded

from nvembed_fast import ops
from nvembed_fast.checkpoint import published_tensors
from nvembed_fast.config import BackboneConfig, LatentConfig, NVEmbedConfig
from nvembed_fast.network.mistral import MistralBackbone
from nvembed_fast.packing import PackedBatch, pad_rows

# nothing at its default; heads * head_dim differs from the width; lengths that no tile divides
CONFIG = BackboneConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=500.0,
    rms_norm_eps=1e-3,
)
LENGTHS = (11, 1, 19, 5)
TOLERANCE = {"torch": 1e-5, "triton": 2e-5}


def transformers_model(is_causal: bool) -> torch.nn.Module:
    from transformers import MistralConfig, MistralModel

    config = MistralConfig(
        **dataclasses.asdict(dataclasses.replace(CONFIG, is_causal=is_causal))
        | {"rope_parameters": {"rope_type": "default", "rope_theta": CONFIG.rope_theta}},
        sliding_window=None,
        attn_implementation="eager",
    )
    torch.manual_seed(1)
    model = MistralModel(config).eval().requires_grad_(False)
    # fresh norms are ones and fresh matrices tiny: a forgotten norm weight or residual would hardly show
    for parameter in model.parameters():
        parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def ours(reference: torch.nn.Module, is_causal: bool = False, device: str = "cpu") -> MistralBackbone:
    config = dataclasses.replace(CONFIG, is_causal=is_causal)
    backbone = MistralBackbone(config).eval().requires_grad_(False)
    parameters = dict(backbone.named_parameters())
    weights = {f"embedding_model.{name}": value for name, value in reference.state_dict().items()}
    table = published_tensors(NVEmbedConfig(config, LatentConfig(hidden_dim=CONFIG.hidden_size)))
    for name in weights.keys() & table.keys():
        slot = table[name]
        parameters[slot.parameter.removeprefix("embedding_model.")][slot.rows] = weights.pop(name)
    assert not weights
    return backbone.to(device)


def padded_batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, CONFIG.vocab_size, (len(LENGTHS), max(LENGTHS)), generator=_generator())
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(None, length) if side == "right" else slice(ids.shape[1] - length, None)] = 1
    return ids, mask


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.cpu() - wanted.cpu()).norm() / wanted.cpu().norm()).item()


@pytest.fixture(scope="module")
def bidirectional() -> torch.nn.Module:
    return transformers_model(is_causal=False)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_hidden_state_equals_transformers(bidirectional, side, impl, device):
    ids, mask = padded_batch(side)
    wanted = bidirectional(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    batch, places = from_padded(ids.to(device), mask.to(device))
    got: list[torch.Tensor] = []
    with ops.use_impl(impl):
        last = ours(bidirectional, device=device)(batch, got)
    assert len(got) == len(wanted) == CONFIG.num_hidden_layers + 1
    assert last is got[-1]
    for ours_TD, theirs_BSD in zip(got, wanted, strict=True):
        padded = pad_rows(ours_TD, places, tuple(ids.shape))
        assert relative(padded[mask == 1], theirs_BSD[mask == 1]) < TOLERANCE[impl]
        assert (padded[mask == 0] == 0).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_late_token_reaches_an_early_one_unless_causal(bidirectional, impl, device):
    ids, mask = padded_batch("right")
    row = LENGTHS.index(19)
    changed = ids.clone()
    changed[row, LENGTHS[row] - 1] = (ids[row, LENGTHS[row] - 1] + 1) % CONFIG.vocab_size

    def first_token(model, is_ours: bool, some_ids: torch.Tensor) -> torch.Tensor:
        if not is_ours:
            return model(some_ids, attention_mask=mask).last_hidden_state[row, 0]
        batch, places = from_padded(some_ids.to(device), mask.to(device))
        return pad_rows(model(batch), places, tuple(ids.shape))[row, 0]

    causal = transformers_model(is_causal=True)
    with ops.use_impl(impl):
        for model, is_ours in ((bidirectional, False), (ours(bidirectional, device=device), True)):
            assert relative(first_token(model, is_ours, changed), first_token(model, is_ours, ids)) > 1e-3
        model = ours(causal, is_causal=True, device=device)
        assert torch.equal(first_token(model, True, changed), first_token(model, True, ids))
        assert relative(first_token(model, True, ids), first_token(causal, False, ids)) < TOLERANCE[impl]


def test_causal_states_equal_transformers():
    reference = transformers_model(is_causal=True)
    ids, mask = padded_batch("right")
    batch, _ = from_padded(ids, mask)
    wanted = reference(ids, attention_mask=mask).last_hidden_state[mask == 1]
    with ops.use_impl("torch"):
        assert relative(ours(reference, is_causal=True)(batch), wanted) < TOLERANCE["torch"]


def test_a_sequence_alone_equals_itself_in_a_pack(bidirectional, all_cores):
    backbone = ours(bidirectional)
    ids, mask = padded_batch("right")
    together = backbone(from_padded(ids, mask)[0]).split(LENGTHS)
    for row, (length, packed) in enumerate(zip(LENGTHS, together, strict=True)):
        alone = backbone(PackedBatch.from_ids([ids[row, :length].numpy()], [0]))
        assert relative(alone, packed) < 1e-6


def test_rotary_tables_grow_with_the_longest_sequence(bidirectional):
    backbone = ours(bidirectional)
    short, long = (torch.randint(0, CONFIG.vocab_size, (1, n), generator=_generator()) for n in (4, 530))
    backbone(from_padded(short)[0])
    assert len(backbone.rotary_tables(4).cos) < long.shape[1], (
        "the table is long enough at once: proves nothing"
    )
    mask = torch.ones_like(long)
    wanted = bidirectional(long, attention_mask=mask).last_hidden_state[0]
    assert relative(backbone(from_padded(long)[0]), wanted) < TOLERANCE["torch"]
    assert backbone.rotary_tables(4) is backbone.rotary_tables(530)


def test_no_layers_is_the_embedding_and_the_norm():
    backbone = MistralBackbone(dataclasses.replace(CONFIG, num_hidden_layers=0)).requires_grad_(False)
    batch = PackedBatch.from_ids([torch.arange(5).numpy()], [0])
    got: list[torch.Tensor] = []
    last = backbone(batch, got)
    embedded = backbone.embed_tokens.weight[:5]
    wanted = embedded * (embedded.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).rsqrt()
    assert relative(last, wanted) < 1e-6
    assert len(got) == 1


def test_no_tokens_give_no_rows(bidirectional):
    backbone = ours(bidirectional)
    assert backbone(PackedBatch.from_ids([], [])).shape == (0, CONFIG.hidden_size)


def test_a_result_that_other_code_may_hold_is_left_as_it_is(bidirectional):
    """Rotary works in place, on what nobody else has seen."""
    backbone, seen = ours(bidirectional), []

    def hold(module, inputs, out):
        seen.append((out, out.clone()))

    hooked, replaced = (backbone.layers[index].self_attn for index in (0, 1))
    hooked.qkv_proj.register_forward_hook(hold)
    replaced.qkv_proj = torch.nn.Sequential(replaced.qkv_proj, torch.nn.Identity())
    replaced.qkv_proj[1].register_forward_hook(hold)
    backbone(PackedBatch.from_ids([torch.arange(9).numpy()], [0]))
    assert len(seen) == 2 and all(torch.equal(out, then) for out, then in seen)


@pytest.fixture
def sums(monkeypatch) -> list[torch.Tensor]:
    """The streams that a product was added to in place."""
    found, add = [], ops.add_linear_
    monkeypatch.setattr(ops, "add_linear_", lambda h, x, w: found.append(h) or add(h, x, w))
    return found


def _text(device: str = "cpu") -> PackedBatch:
    return PackedBatch.from_ids([torch.arange(9).numpy(), torch.arange(3).numpy()], [0, 0], device)


TEXT = _text()
IN_PLACE = 2 * (CONFIG.num_hidden_layers - 1)  # the first layer gets the result of the embedding


def test_products_are_added_to_the_stream_in_place(bidirectional, sums):
    backbone, states = ours(bidirectional), []
    out = backbone(TEXT)
    assert len(sums) == IN_PLACE and len({h.data_ptr() for h in sums}) < IN_PLACE
    assert torch.equal(backbone(TEXT, states), out), "who looks at the states changes nothing"
    assert len({h.data_ptr() for h in states}) == len(states) == CONFIG.num_hidden_layers + 1
    # as every hidden state is without, but for rounding
    backbone.layers[0].register_forward_hook(lambda *_: None)
    for layer in backbone.layers[1:]:
        layer.mlp.register_forward_hook(lambda *_: None)
        layer.self_attn.register_forward_hook(lambda *_: None)
    sums.clear()
    plain: list[torch.Tensor] = []
    backbone(TEXT, plain)
    assert not sums
    for got, wanted in zip(states, plain, strict=True):
        assert relative(got, wanted) < 1e-6


def test_a_product_and_its_sum_are_rounded_once():
    h, x = torch.randn(2, 70, 48, generator=_generator()).bfloat16()
    weight = torch.randn(48, 48, generator=_generator()).bfloat16()
    exact = h.double() + x.double() @ weight.double().mT
    for rows in (70, 3):  # few rows are padded on a CPU
        once = ops.add_linear_(h[:rows].clone(), x[:rows], weight)
        twice = h[:rows] + ops.linear(x[:rows], weight)
        error = [(t - exact[:rows]).square().mean().sqrt() for t in (once, twice, exact[:rows].bfloat16())]
        assert error[0] < 0.9 * error[1] and error[0] < 1.01 * error[2]


MODULES = [name for name, _ in MistralBackbone(CONFIG).named_modules() if "layers.0" not in name]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "layers"])
def test_nothing_that_a_hook_holds_is_overwritten(bidirectional, name):
    backbone, held = ours(bidirectional), []
    wanted = backbone(TEXT)

    def hold(module, *seen):
        flat = [t for part in seen for t in (part if isinstance(part, tuple) else (part,))]
        held.extend((t, t.clone()) for t in flat if isinstance(t, torch.Tensor))

    module = backbone.get_submodule(name)
    module.register_forward_pre_hook(hold)
    module.register_forward_hook(hold)
    got = backbone(TEXT)
    assert held and all(torch.equal(t, then) for t, then in held)
    assert relative(got, wanted) < 1e-6


def test_a_layer_called_by_others_writes_to_no_tensor_of_theirs(bidirectional):
    backbone = ours(bidirectional)
    x, residual = torch.randn(2, TEXT.layout.num_tokens, CONFIG.hidden_size, generator=_generator())
    tables = backbone.rotary_tables(9)
    before = x.clone(), residual.clone()
    for given in (None, residual):
        product, stream = backbone.layers[1](x, given, TEXT.layout, tables)
        assert stream is not None and product.data_ptr() != stream.data_ptr()
        assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.requires_grad_(True),
        lambda b: b.layers[2].input_layernorm.requires_grad_(True),
        lambda b: [
            setattr(layer.mlp, "down_proj", torch.nn.Sequential(layer.mlp.down_proj)) for layer in b.layers
        ],
        lambda b: [setattr(layer, "mlp", torch.nn.Sequential(layer.mlp)) for layer in b.layers],
    ],
    ids=["trained", "norm-trained", "adapted", "wrapped"],
)
def test_no_sum_in_place_where_another_owns_it(bidirectional, change, sums, device):
    backbone, text = ours(bidirectional, device=device), _text(device)
    wanted = backbone(text)
    sums.clear()
    change(backbone)
    with ops.use_impl("triton"):  # its norm keeps the stream for the backward
        got = backbone(text)
    assert len(sums) < IN_PLACE
    assert relative(got.detach(), wanted) < TOLERANCE["triton"]
    if got.requires_grad:
        got.sum().backward()  # raises where a sum in place went over what the norm has kept
        assert backbone.layers[2].input_layernorm.weight.grad.abs().sum() > 0


def test_autocast_sums_as_ever(bidirectional, sums):
    backbone = ours(bidirectional)
    with torch.autocast("cpu", torch.bfloat16):
        backbone(TEXT)
    assert not sums
