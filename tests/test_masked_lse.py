import inspect
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gradients import (
    NoGradient,
    amid,
    assert_compiles,
    assert_gradcheck,
    assert_same_constants,
    far_rows,
    saved_shapes,
    spy_on_launches,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvembed_fast import ops
from nvembed_fast.kernels import masked_lse as module
from nvembed_fast.kernels import reference
from nvembed_fast.kernels.masked_lse import masked_lse
from nvembed_fast.kernels.testing import (
    SCORE_CASES,
    ScoreCase,
    assert_gradient_parity,
    assert_parity,
    gradients,
    honest,
    small,
    upstream_of,
)

ROOT = Path(__file__).resolve().parents[1]
CASES = small(SCORE_CASES)
CASE = ScoreCase("property", 37, 150, 40, limited=True)
SMALLEST = ScoreCase("smallest", 3, 5, 8, masked=False, peak=1.0)
NAMES = ("lse", "highest", "total", "counts")


def _in(dtype, args):
    """The arguments of `masked_lse` for an oracle of another dtype."""
    return tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


def _assert_matches(case, device, dtype):
    args = case.inputs(device, dtype)
    got, low, high = masked_lse(*args), _honest(*args), reference.masked_lse(*_in(torch.float64, args))
    assert torch.equal(got[3], high[3]) and torch.equal(low[3][0], high[3])
    assert got[0].dtype == torch.float32 and high[3].any()
    # a row that keeps nothing is compared by its counts
    kept = high[0].isfinite()
    assert kept.any() and torch.equal(got[0][~kept], low[0][0][~kept])
    for name, g, lows, h in zip(NAMES[:3], got, low, high, strict=False):
        assert_parity(f"{case.name}: {name}", g[kept], [t[kept] for t in lows], h[kept])


def _honest(q, d, *rest):
    return honest(lambda q, d: reference.masked_lse(q, d, *rest), (q, d))


def _parts(case, device, dtype):
    """(q and d, kernel, reference): lse as a function of q and d alone."""
    q, d, *rest = case.inputs(device, dtype)

    def lse(owner, q, d):
        return owner.masked_lse(q, d, *rest)[0]

    return (q, d), partial(lse, module), partial(lse, reference)


def _assert_gradients_match(case, device, dtype, **kwargs):
    inputs, kernel, wanted = _parts(case, device, dtype)
    assert_gradient_parity(case.name, kernel, wanted, inputs, **kwargs)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_reference(case, dtype, device):
    _assert_matches(case, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in SCORE_CASES if c.bench], ids=lambda c: c.name)
def test_matches_reference_at_full_size(case, dtype, device):
    _assert_matches(case, device, dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gradient_matches_reference(case, dtype, device):
    _assert_gradients_match(case, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in SCORE_CASES if c.bench], ids=lambda c: c.name)
def test_gradient_matches_reference_at_full_size(case, dtype, device):
    _assert_gradients_match(case, device, dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_reference_is_autograd_over_whole_scores(case):
    """The oracle of all other tests has a backward of its own, so it is compared with PyTorch's."""
    q, d, row_scopes, column_scopes, row_keys, column_keys, limits, scale = case.inputs("cpu", torch.float64)
    q, d = q.requires_grad_(), d.requires_grad_()

    def same(rows, columns):
        return (rows[:, None, :, None] == columns[None, :, None]).flatten(2)

    scores = q @ d.mT * scale
    candidates = (same(row_scopes, column_scopes) & (row_scopes >= 0)[:, None]).any(2)
    by_key = candidates & (
        same(row_keys, column_keys) & (row_keys != 0).repeat_interleave(column_keys.shape[1], 1)[:, None]
    ).any(2)
    above = torch.zeros_like(by_key) if limits is None else candidates & ~by_key & (scores > limits[:, None])
    kept = candidates & ~by_key & ~above
    lse = scores.masked_fill(~kept, -torch.inf).logsumexp(1)
    got = reference.masked_lse(q, d, row_scopes, column_scopes, row_keys, column_keys, limits, scale)
    torch.testing.assert_close(got[0], lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[2], torch.where(kept, scores, 0.0).sum(1), rtol=1e-9, atol=1e-9)
    assert torch.equal(got[1], scores.masked_fill(~kept, -torch.inf).amax(1))
    assert torch.equal(got[3], torch.stack([m.sum(1) for m in (candidates, by_key, above)], 1).int())
    some = kept.any(1)
    wanted = torch.autograd.grad(lse[some].sum(), (q, d))
    for ours, theirs in zip(torch.autograd.grad(got[0][some].sum(), (q, d)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_cases_meet_every_rule():
    """Otherwise parity would prove nothing of it."""
    found = {case.name: masked_lse(*case.inputs("cpu", torch.float32))[3].sum(0).tolist() for case in CASES}
    candidates, by_key, above = found["limited"]
    assert 0 < above < candidates < 70 * 150 and 0 < by_key < candidates
    assert found["unmasked"] == [33 * 140, 0, 0]


def test_each_rule_by_hand(device):
    """Six columns with scores 1 to 6 against rows that drop them for one reason each."""
    q = torch.ones(5, 16, device=device)
    d = torch.arange(1.0, 7.0, device=device)[:, None].expand(6, 16).contiguous() / 16
    row_scopes = torch.tensor([[7], [7], [7], [-1], [9]], device=device)
    column_scopes = torch.tensor([(7, 9), (0, 7), (7, -1), (7, 7), (-1, 7), (8, -2)], device=device)
    row_keys = torch.tensor([(0, 0), (3, 0), (0, 0), (0, 0), (11, 0)], device=device)
    column_keys = torch.tensor([[11], [12], [3], [13], [0], [3]], device=device)
    limits = torch.tensor([9.0, 9.0, 3.0, 9.0, 9.0], device=device)
    lse, highest, total, counts = masked_lse(
        q, d, row_scopes, column_scopes, row_keys, column_keys, limits, 1.0
    )
    assert counts.tolist() == [[5, 0, 0], [5, 1, 0], [5, 0, 2], [0, 0, 0], [1, 1, 0]]
    assert highest.tolist() == [5, 5, 3, -np.inf, -np.inf] and total.tolist() == [15, 12, 6, 0, 0]
    wanted = [np.log(sum(np.exp(s) for s in kept)) for kept in ((1, 2, 3, 4, 5), (1, 2, 4, 5), (1, 2, 3))]
    assert lse.tolist() == pytest.approx([*wanted, -np.inf, -np.inf], abs=1e-5)


@pytest.mark.parametrize("kept", [0, 70, 2299])
def test_a_tile_that_keeps_nothing_adds_nothing(kept, device):
    """One column of 2300 is kept: tiles before, behind and beside its own are empty, and so are splits."""
    q, d, row_scopes, column_scopes, *rest = ScoreCase("one", 3, 2300, 16, masked=False).inputs(
        device, torch.float32
    )
    column_scopes.fill_(-1)[kept] = 0
    lse, highest, total, counts = masked_lse(q, d, row_scopes, column_scopes, *rest)
    assert counts.tolist() == [[1, 0, 0]] * 3
    assert torch.equal(lse, highest) and torch.equal(total, highest) and lse.isfinite().all()


def test_rows_that_keep_nothing_get_no_gradient(device):
    q, d, *rest = CASE.inputs(device, torch.float32)
    rest[0] = torch.full_like(rest[0], -1)
    grads = gradients(lambda q, d: masked_lse(q, d, *rest)[0], (q, d))[1]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 128, 129, 1023])
def test_around_the_tile_size(columns, device):
    _assert_matches(ScoreCase("columns", 5, columns, 16, masked=False), device, torch.float16)


@pytest.mark.parametrize("rows", [2, 63, 64, 65, 129])
def test_any_number_of_rows(rows, device):
    case = ScoreCase("rows", rows, 30, 24)
    _assert_matches(case, device, torch.float16)
    _assert_gradients_match(case, device, torch.float16)


@pytest.mark.parametrize("width", [1, 8, 77, 129])
def test_any_width(width, device):
    case = ScoreCase("width", 20, 50, width)
    _assert_matches(case, device, torch.float16)
    _assert_gradients_match(case, device, torch.float16)


KERNELS = ("_masked_lse_fwd_kernel", "_masked_lse_bwd_kernel")


def test_a_row_depends_on_no_other_row(dtype, device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, *KERNELS)
    q, d, row_scopes, column_scopes, row_keys, column_keys, limits, scale = CASE.inputs(device, dtype)

    def run(*rows):
        part = torch.tensor(rows, device=device)
        return masked_lse(
            q[part], d, row_scopes[part], column_scopes, row_keys[part], column_keys, limits[part], scale
        )

    together = run(*range(37))
    doubled = run(*range(37), *range(37))
    alone = [run(3), run(36)]
    for one, other, third, fourth in zip(together, doubled, *alone, strict=True):
        assert torch.equal(torch.cat([one, one]), other)
        assert torch.equal(third[0], one[3]) and torch.equal(fourth[0], one[36])
    assert_same_constants(launches)
    # a row's sum is split by its columns alone
    assert len({arguments["split_columns"] for _, arguments in launches}) == 1


def test_permuting_columns_changes_nothing(device):
    q, d, row_scopes, column_scopes, row_keys, column_keys, *rest = CASE.inputs(device, torch.float32)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0)).to(device)
    one = masked_lse(q, d, row_scopes, column_scopes, row_keys, column_keys, *rest)
    other = masked_lse(q, d[order], row_scopes, column_scopes[order], row_keys, column_keys[order], *rest)
    torch.testing.assert_close(other[0], one[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(other[3], one[3])


def test_rows_and_columns_change_places(device):
    """The scores of both directions are the same, with all masks."""
    q, d, row_scopes, column_scopes, row_keys, column_keys, _, scale = CASE.inputs(device, torch.float32)
    masks = row_scopes, column_scopes.clamp_min(0), row_keys, column_keys
    there = masked_lse(q, d, *masks, None, scale)
    back = masked_lse(d, q, masks[1], masks[0], masks[3], masks[2], None, scale)
    assert torch.equal(there[3].sum(0), back[3].sum(0)) and back[3][:, 1].any()
    torch.testing.assert_close(there[0].logsumexp(0), back[0].logsumexp(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(there[1].amax(), back[1].amax(), rtol=1e-6, atol=0)


def test_a_score_that_all_others_dwarf_is_not_lost(device):
    """Rising and falling scores 200 apart: each tile weighs the ones before it."""
    q, d, *rest = ScoreCase("steps", 2, 400, 16, masked=False).inputs(device, torch.float32)
    q.zero_()[:, 0] = torch.tensor([1.0, -1.0])
    d[:, 0] = torch.linspace(-100, 100, 400, device=device)
    args = q, d, *rest[:-1], 1.0
    high = reference.masked_lse(*_in(torch.float64, args))
    for name, *outputs in zip(NAMES[:2], masked_lse(*args), _honest(*args), high, strict=False):
        assert_parity(name, *outputs)


def test_nan_around_the_tensors_cannot_matter(dtype, device):
    q, d, *rest = CASE.inputs(device, dtype)
    around = amid(q), amid(d)
    for one, other in zip(masked_lse(q, d, *rest), masked_lse(*around, *rest), strict=True):
        assert torch.equal(one, other)
    run = lambda q, d: masked_lse(q, d, *rest)[0]  # noqa: E731
    for one, other in zip(gradients(run, (q, d))[1], _gradients_around(run, around), strict=True):
        assert torch.equal(one, other)


def _gradients_around(run, views):
    """Gradients of views that stay views."""
    leaves = [t.requires_grad_() for t in views]
    out = run(*leaves)
    return torch.autograd.grad(out, leaves, upstream_of((out,)))


def test_a_nan_row_stays_there(device):
    q, d, *rest = CASE.inputs(device, torch.float16)
    clean = masked_lse(q, d, *rest)
    q[3] = torch.nan
    others = torch.arange(37, device=device) != 3
    for one, other in zip(clean, masked_lse(q, d, *rest), strict=True):
        assert torch.equal(one[others], other[others])


def test_no_row_beyond_the_last_is_read(device):
    """Row addresses are 64 bits wide: 3 rows lie 4 GiB apart."""
    q, d = far_rows(3, 2**24, device), far_rows(3, 2**31, device)
    rest = ScoreCase("far", 3, 3, 16, masked=False).inputs(device, torch.float16)[2:]
    for one, other in zip(
        masked_lse(q, d, *rest), masked_lse(q.contiguous(), d.contiguous(), *rest), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows, columns", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_compare(rows, columns, device):
    q, d = torch.ones(rows, 8, device=device), torch.ones(columns, 8, device=device)
    ones = partial(torch.ones, dtype=torch.int64, device=device)
    rest = ones(rows, 1), ones(columns, 1), ones(rows, 1), ones(columns, 1)
    for owner in (module, reference):
        lse, highest, total, counts = owner.masked_lse(q, d, *rest)
        assert lse.tolist() == highest.tolist() == [-np.inf] * rows
        assert not total.any() and not counts.any() and counts.shape == (rows, 3)
        grads = gradients(lambda q, d, owner=owner: owner.masked_lse(q, d, *rest)[0], (q, d))[1]
        assert [g.shape for g in grads] == [q.shape, d.shape] and not any(g.any() for g in grads)


def test_chunks_of_rows_add_up(device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, KERNELS[1])
    inputs, kernel, _ = _parts(CASE, device, torch.float32)
    whole = gradients(kernel, inputs)[1]
    monkeypatch.setattr(module, "MAX_SCORES", 10 * 150)
    for one, other in zip(whole, gradients(kernel, inputs)[1], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    assert [arguments["first_row"] for _, arguments in launches] == [0, 0, 10, 20, 30]
    monkeypatch.setattr(module, "MAX_SCORES", 1)
    assert gradients(kernel, inputs)[1][0].isfinite().all() and len(launches) == 5 + 37


def test_the_same_bits_twice(dtype, device):
    inputs, kernel, _ = _parts(CASE, device, dtype)
    assert all(map(torch.equal, gradients(kernel, inputs)[1], gradients(kernel, inputs)[1]))


def test_gradient_of_a_strided_upstream(device):
    inputs, kernel, _ = _parts(CASE, device, torch.float32)
    upstream = torch.randn(37, 2, generator=torch.Generator().manual_seed(0)).to(device)[:, 0]
    one, other = (gradients(kernel, inputs, [u])[1] for u in (upstream, upstream.contiguous()))
    assert not upstream.is_contiguous() and all(map(torch.equal, one, other))


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)], ids=str)
def test_frozen_inputs(frozen, device):
    inputs, kernel, _ = _parts(CASE, device, torch.float16)
    if len(frozen) == 2:
        assert not kernel(*inputs).requires_grad and saved_shapes(kernel, inputs, frozen) == []
        return
    every, grads = gradients(kernel, inputs)[1], gradients(kernel, inputs, frozen=frozen)[1]
    for i, (got, wanted) in enumerate(zip(grads, every, strict=True)):
        assert got is None if i in frozen else torch.equal(got, wanted)


def test_the_statistics_have_no_gradient(device):
    q, d, *rest = CASE.inputs(device, torch.float32)
    for owner in (module, reference):
        lse, *statistics = owner.masked_lse(q.requires_grad_(), d, *rest)
        assert lse.requires_grad and not any(t.requires_grad for t in statistics)


def test_no_upstream_gives_no_gradient(device):
    inputs, kernel, _ = _parts(SMALLEST, device, torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    NoGradient.apply(kernel(*leaves)).sum().backward()
    assert all(leaf.grad is None for leaf in leaves)


def test_gradcheck(device):
    inputs, kernel, _ = _parts(SMALLEST, device, torch.float32)
    assert_gradcheck(kernel, inputs)


def test_compiles_as_one_graph(device):
    inputs, kernel, _ = _parts(SMALLEST, device, torch.float32)
    assert_compiles(kernel, inputs)


def test_opcheck(device):
    registered = torch.ops.nvembed_fast
    q, d, *rest = SMALLEST.inputs(device, torch.float32)
    torch.library.opcheck(
        registered.masked_lse, (q.clone().requires_grad_(), d.clone().requires_grad_(), *rest)
    )
    lse = masked_lse(q, d, *rest)[0]
    for needs in ((True, True), (False, True)):
        args = (q, d, *rest[:-1], lse, lse, rest[-1], *needs)
        torch.library.opcheck(registered.masked_lse_bwd, args)


@pytest.mark.parametrize("impl", ["torch", "library", "triton"])
def test_autocast_changes_no_bit(impl, device):
    """Scores rounded to 16 bits would put the gradient off by 5 %. See tests/test_loss.py."""
    q, d, *rest = CASE.inputs(device, torch.float32)
    low = torch.bfloat16 if device == "cuda" or impl != "triton" else torch.float16

    def run(q, d):
        with ops.use_impl(impl):
            return ops.masked_lse(q, d, *rest)[0]

    outputs, grads = gradients(run, (q, d))
    with torch.autocast(device, low):
        low_outputs, low_grads = gradients(run, (q, d))
    assert low_outputs[0].dtype == torch.float32
    assert all(map(torch.equal, (*outputs, *grads), (*low_outputs, *low_grads)))


def test_signature_is_the_reference_signature():
    assert inspect.signature(masked_lse) == inspect.signature(reference.masked_lse)


class Allocations(TorchDispatchMode):
    """The bytes of all tensors that are made: none is counted as freed."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        is_new = function in (torch.ops.aten.new_empty.default, torch.ops.aten.new_zeros.default)
        if is_new:
            self.total += out.untyped_storage().nbytes()
        else:
            # a view, or written into a tensor that is there
            storages = [t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
            made = [t for t in tree_leaves(out) if torch.is_tensor(t)]
            assert all(t.untyped_storage()._cdata in storages for t in made), f"{function} makes a tensor"
        return out


def test_the_scratch_is_below_a_hundredth_of_the_scores(monkeypatch):
    """At 64k x 64k x 4096 in fp32, beside inputs and results."""
    monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    monkeypatch.setattr(module, "capability", lambda _: 90)
    size = 2**16
    q, d = torch.empty(size, 4096, device="meta"), torch.empty(size, 4096, device="meta")
    ids = partial(torch.empty, dtype=torch.int64, device="meta")
    masks = ids(size, 1), ids(size, 2), ids(size, 8), ids(size, 1), torch.empty(size, device="meta")
    with Allocations() as forward:
        results = module._launch_fwd(q, d, *masks, 50.0)
    with Allocations() as backward:
        gradients = module._launch_bwd(q, d, *masks, results[0], results[1], 50.0, True, True)
    plain = 4 * size * size
    for made, outputs in ((forward, results), (backward, gradients)):
        scratch = made.total - sum(t.numel() * t.itemsize for t in outputs)
        assert 0 < scratch < 0.01 * plain, f"{scratch / plain:.4f}"


@pytest.mark.long
def test_measured_memory_of_8k_by_8k_is_below_the_scores():
    """Forward and backward in a process of its own: the peak of its memory, against one fp32 [B, M]."""
    code = """
import re, torch
from pathlib import Path
from nvembed_fast import ops
torch.set_num_threads(1)
size = 2**13
q, d = (torch.randn(size, 64).requires_grad_() for _ in range(2))
ids = torch.zeros(size, 1, dtype=torch.int64)
keys = 1 + torch.arange(size)[:, None]
memory = lambda name: 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
small = [t[:64] for t in (q, d, ids, ids, keys, keys)]
ops.masked_lse(*small, None, 1.0)[0].sum().backward()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
before = memory("VmRSS")
ops.masked_lse(q, d, ids, ids, keys, keys, None, 1.0)[0].sum().backward()
print((memory("VmHWM") - before) / (4 * size * size))
"""
    # what is freed goes back to the system
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)
    assert run.returncode == 0, run.stderr[-2000:]
    # a quarter is the chunk of scores, and a sixteenth each of three masks
    assert 0.05 < float(run.stdout) < 0.6
