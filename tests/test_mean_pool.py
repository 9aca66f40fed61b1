import inspect

import pytest
import torch
import torch.nn.functional as F
from gradients import assert_compiles, assert_gradcheck

from nvembed_fast.kernels import library, reference
from nvembed_fast.kernels import mean_pool as module
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.kernels.mean_pool import mean_pool, mean_pool_geglu
from nvembed_fast.kernels.testing import (
    POOL_CASES,
    PoolCase,
    assert_gradient_parity,
    assert_parity,
    generator,
    gradients,
    small,
)

TOKENS = module._launch_config(16, False, capability=80, dtype=torch.float32)["TOKENS"]
# one tile, exactly one, one token more, three, and none; the longest neither first nor last
TILES = PoolCase("tiles", (9, TOKENS, TOKENS + 1, 0, 2 * TOKENS + 70, 1), 16)


@pytest.fixture(params=[False, True], ids=["mean_pool", "mean_pool_geglu"])
def geglu(request) -> bool:
    return request.param


def _op(geglu: bool, owner=module):
    return owner.mean_pool_geglu if geglu else owner.mean_pool


def _assert_matches_reference(case, device, dtype, geglu):
    x, layout, mask = case.inputs(device, dtype, geglu=geglu)
    oracle = _op(geglu, reference)
    got = _op(geglu)(x, layout, mask)
    assert got.dtype == torch.float32
    assert_parity(case.name, got, oracle(x, layout, mask), oracle(x.double(), layout, mask))


@pytest.mark.parametrize("case", [*small(POOL_CASES), TILES], ids=lambda c: c.name)
def test_matches_reference(case, dtype, geglu, device):
    _assert_matches_reference(case, device, dtype, geglu)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in POOL_CASES if c.bench], ids=lambda c: c.name)
def test_matches_reference_at_full_size(case, dtype, geglu, device):
    _assert_matches_reference(case, device, dtype, geglu)


def test_more_partial_sums_than_the_second_kernel_adds_at_once(geglu, device):
    block = module._fwd_combine_launch_config(16)["BLOCK_T"]
    # wide, so that the RMS is over many columns
    case = PoolCase("many tiles", (block * TOKENS + 1,), 256)
    _assert_matches_reference(case, device, torch.float32, geglu)


def test_gelu_is_the_exact_one(device):
    # one sequence per gate, the value is one: the GELU itself
    gate = torch.linspace(-9, 9, 4001, device=device)
    layout = SeqLayout([1], device)
    value_gate = torch.cat([torch.ones_like(gate), gate])[None]
    got = mean_pool_geglu(value_gate, layout)[0].double()
    exact = F.gelu(gate.double())
    error, eager = (got - exact).abs(), (F.gelu(gate).double() - exact).abs()
    assert error.max() < 4e-7 and error.square().mean() <= eager.square().mean()
    tanh = F.gelu(gate.double(), approximate="tanh")
    assert (tanh - exact).abs().max() > 1e-4, "both formulas agree here, so this test would prove nothing"
    # relative, where x is small, and where the plain formula cancels
    near = (gate > -3) & (gate < 9) & (gate != 0)
    assert (error / exact.abs())[near].max() < 4e-6


def test_gelu_far_from_zero(device):
    gate = torch.tensor([-60000.0, -300.0, -20.0, 0.0, 20.0, 300.0, 60000.0], device=device)
    value_gate = torch.cat([torch.ones_like(gate), gate])[None]
    got = mean_pool_geglu(value_gate, SeqLayout([1], device))[0]
    assert torch.equal(got, gate.clamp_min(0))


def test_a_sequence_that_keeps_nothing_gives_zeros(geglu, device):
    x, layout, mask = TILES.inputs(device, torch.float32, geglu=geglu)
    for seq in (0, 2):
        mask[layout.cu_seqlens[seq] : layout.cu_seqlens[seq + 1]] = False
    got = _op(geglu)(x, layout, mask)
    assert (got[[0, 2, 3]] == 0).all()
    assert (got[[1, 4, 5]] != 0).any(1).all()


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=str)
def test_a_batch_without_tokens(lengths, geglu, device):
    got = _op(geglu)(torch.empty(0, 32, device=device), SeqLayout(lengths, device))
    assert got.shape == (len(lengths), 16 if geglu else 32) and (got == 0).all()


def test_nan_in_a_dropped_token_cannot_matter(geglu, device):
    x, layout, mask = TILES.inputs(device, torch.float32, geglu=geglu)
    clean = _op(geglu)(x, layout, mask)
    x[~mask] = float("nan")
    assert torch.equal(_op(geglu)(x, layout, mask), clean)


def test_nan_around_the_rows_cannot_matter(geglu, device):
    x, layout, mask = TILES.inputs(device, torch.float32, geglu=geglu)
    wide = x.new_full((len(x) + 40, x.shape[1] + 16), float("nan"))
    wide[20:-20, : x.shape[1]] = x
    view = wide[20:-20, : x.shape[1]]
    assert torch.equal(_op(geglu)(view, layout, mask), _op(geglu)(x, layout, mask))


def test_without_a_mask_everything_is_kept(geglu, device):
    x, layout, mask = TILES.inputs(device, torch.float32, geglu=geglu)
    assert torch.equal(_op(geglu)(x, layout), _op(geglu)(x, layout, torch.ones_like(mask)))
    assert not torch.equal(_op(geglu)(x, layout), _op(geglu)(x, layout, mask))


def test_a_sequence_alone_has_the_same_bits(geglu, device):
    x, layout, mask = TILES.inputs(device, torch.float16, geglu=geglu)
    packed = _op(geglu)(x, layout, mask)
    for seq, length in enumerate(layout.lengths):
        rows = slice(layout.cu_seqlens[seq], layout.cu_seqlens[seq + 1])
        alone = _op(geglu)(x[rows], SeqLayout([length], device), mask[rows])
        assert torch.equal(alone[0], packed[seq])


def test_a_pack_without_long_sequences_has_the_same_bits(geglu, device):
    x, layout, mask = TILES.inputs(device, torch.float16, geglu=geglu)
    rows = slice(0, 9 + TOKENS)
    short = _op(geglu)(x[rows], SeqLayout(layout.lengths[:2], device), mask[rows])
    assert torch.equal(short, _op(geglu)(x, layout, mask)[:2])


def test_doubling_the_batch_changes_no_row(geglu, device):
    x, layout, mask = TILES.inputs(device, torch.float16, geglu=geglu)
    once = _op(geglu)(x, layout, mask)
    twice = _op(geglu)(torch.cat([x, x]), SeqLayout(layout.lengths * 2, device), torch.cat([mask, mask]))
    assert torch.equal(twice, torch.cat([once, once]))


def test_one_kernel_is_enough_when_every_sequence_fits_a_tile(geglu, device, monkeypatch):
    monkeypatch.setattr(module, "_mean_pool_fwd_combine_kernel", None)
    _assert_matches_reference(PoolCase("one tile each", (TOKENS, 3), 16), device, torch.float32, geglu)
    x, layout, mask = PoolCase("two tiles", (TOKENS + 1, 3), 16).inputs(device, torch.float32, geglu=geglu)
    with pytest.raises(TypeError):  # the second kernel is called, and it is None
        _op(geglu)(x, layout, mask)


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_split_seqs_finds_the_first_tile_of_each_long_sequence(block):
    lengths = torch.randint(0, 14, (40,), generator=generator()).tolist()
    layout = SeqLayout(lengths)
    tiles, split = layout.tiles(block).tolist(), layout.split_seqs(block).tolist()
    assert sorted(seq for seq, _ in split) == [seq for seq, n in enumerate(lengths) if n > block]
    for seq, first in split:
        starts = range(0, lengths[seq], block)
        assert tiles[first : first + len(starts)] == [[seq, start] for start in starts]
    assert sum(len(range(0, lengths[seq], block)) for seq, _ in split) <= len(split) + sum(lengths) // block


@pytest.mark.parametrize("name", ["mean_pool", "mean_pool_geglu"])
def test_signature_is_the_reference_signature(name):
    assert inspect.signature(getattr(module, name)) == inspect.signature(getattr(reference, name))


def test_rejects_a_transposed_input(geglu, device):
    x, layout, mask = TILES.inputs(device, torch.float32, geglu=geglu)
    with pytest.raises(ValueError, match="contiguous rows, got"):
        _op(geglu)(x.t().contiguous().t(), layout, mask)


@pytest.mark.parametrize("shape", [(3, 32), (10, 32, 1), (10,), (10, 0)], ids=str)
def test_rejects_an_input_that_is_not_the_layouts(shape, device):
    layout = SeqLayout([4, 6], device)
    with pytest.raises(ValueError, match=r"^x must be \[10, D\]"):
        mean_pool(torch.zeros(shape, device=device), layout)
    with pytest.raises(ValueError, match=r"^value_gate must be \[10, 2F\]"):
        mean_pool_geglu(torch.zeros(shape, device=device), layout)


def test_rejects_an_odd_number_of_columns(device):
    with pytest.raises(ValueError, match=r"^value_gate must be \[T, 2F\] with an even number"):
        mean_pool_geglu(torch.zeros(10, 33, device=device), SeqLayout([10], device))


@pytest.mark.parametrize(
    "mask",
    # cut on the device: a copy to another device leaves no gaps
    [lambda m: m[:9], lambda m: m[:10].float(), lambda m: m[::2]],
    ids=["short", "float32", "strided"],
)
def test_rejects_a_mask_that_is_not_one_bool_per_token(mask, geglu, device):
    ones = torch.ones(20, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match=r"^pool_mask must be \[10\] torch.bool"):
        _op(geglu)(torch.zeros(10, 32, device=device), SeqLayout([4, 6], device), mask(ones))


def _pool(function, layout, mask):
    return lambda x: function(x, layout, mask)


def _check_gradient(case, device, dtype, geglu, **kwargs):
    x, layout, mask = case.inputs(device, dtype, geglu=geglu)
    kernel, wanted = _pool(_op(geglu), layout, mask), _pool(_op(geglu, reference), layout, mask)
    assert_gradient_parity(case.name, kernel, wanted, [x], **kwargs)


@pytest.mark.parametrize("case", [*small(POOL_CASES), TILES], ids=lambda c: c.name)
def test_gradient_matches_reference(case, dtype, geglu, device):
    _check_gradient(case, device, dtype, geglu)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in POOL_CASES if c.bench], ids=lambda c: c.name)
def test_gradient_matches_reference_at_full_size(case, dtype, geglu, device):
    part = PoolCase(case.name, case.lengths, 1024, case.masked)
    _check_gradient(part, device, dtype, geglu)


def test_gradient_of_a_strided_upstream(geglu, device):
    _check_gradient(PoolCase("strided", (5, 9), 40), device, torch.float16, geglu, contiguous=False)


@pytest.mark.parametrize("source", [module, reference, library], ids=lambda s: s.__name__.split(".")[-1])
def test_nan_in_a_dropped_token_reaches_no_gradient(source, geglu, device):
    x, layout, mask = PoolCase("nan", (5, 9), 40).inputs(device, torch.float32, geglu=geglu)
    clean = gradients(_pool(_op(geglu, source), layout, mask), [x])[1][0]
    x[~mask] = torch.nan
    grad = gradients(_pool(_op(geglu, source), layout, mask), [x])[1][0]
    assert not mask.all() and torch.equal(grad, clean) and grad[~mask].eq(0).all()


def test_gradient_of_a_sequence_that_keeps_nothing_is_zero(geglu, device):
    x, layout, mask = PoolCase("dropped", (5, 9), 40).inputs(device, torch.float32, geglu=geglu)
    mask[:5] = False
    grad = gradients(_pool(_op(geglu), layout, mask), [x])[1][0]
    assert grad[:5].eq(0).all() and grad[5:].abs().sum() > 0


def test_the_plain_mean_saves_nothing_as_large_as_its_input(device):
    x, layout, mask = PoolCase("saved", (50, 9), 40).inputs(device, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        mean_pool(x.requires_grad_(), layout, mask)
    assert saved and max(saved) <= len(x)


def test_gradcheck(geglu, device):
    x, layout, mask = PoolCase("smallest", (2, 3), 4).inputs(device, torch.float32, geglu=geglu)
    assert_gradcheck(_pool(_op(geglu), layout, mask), [x])


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_as_one_graph(geglu, masked, device):
    x, layout, mask = PoolCase("graph", (5, 9), 40, masked).inputs(device, torch.float32, geglu=geglu)
    assert_compiles(_pool(_op(geglu), layout, mask), [x])


def test_opcheck(geglu, device):
    x, layout, mask = PoolCase("opcheck", (5, 9), 40).inputs(device, torch.float32, geglu=geglu)
    ops, lengths = torch.ops.nvembed_fast, layout.host_lengths
    torch.library.opcheck(ops.mean_pool, (x.clone().requires_grad_(), lengths, mask, geglu))
    dout = torch.randn(2, 40, device=device)
    args = (x if geglu else None, dout, lengths, mask, len(x), torch.float32)
    torch.library.opcheck(ops.mean_pool_bwd, args)


def test_gradient_of_no_tokens(geglu, device):
    x, layout, mask = PoolCase("none", (0, 0), 8).inputs(device, torch.float16, geglu=geglu)
    (grad,) = gradients(_pool(_op(geglu), layout, mask), [x])[1]
    assert grad.shape == x.shape
