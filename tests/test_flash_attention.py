import dataclasses
import functools
import inspect
import itertools

import numpy as np
import pytest
import torch
from gradients import amid, assert_same_constants, spy_on_launches

from nvembed_fast import ops
from nvembed_fast.kernels import _common, reference
from nvembed_fast.kernels import flash_attention as module
from nvembed_fast.kernels.flash_attention import flash_attention
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.kernels.testing import (
    ATTENTION_CASES,
    ATTENTION_PACK,
    AttentionCase,
    assert_parity,
    honest,
    small,
)

HAS_GPU = torch.cuda.is_available()

CASES = small(ATTENTION_CASES)


def _with_oracle(case, dtype, device, causal=None, **kwargs):
    q, k, v, layout = case.inputs(device, dtype)
    kwargs |= {"causal": case.causal if causal is None else causal, "return_lse": True}
    got = flash_attention(q, k, v, layout, **kwargs)
    low = honest(lambda *qkv: reference.flash_attention(*qkv, layout, **kwargs), (q, k, v))
    high = reference.flash_attention(q.double(), k.double(), v.double(), layout, **kwargs)
    return zip(("out", "lse"), got, low, high, strict=True)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_the_reference(case, dtype, path, device):
    for name, got, low, high in _with_oracle(case, dtype, device):
        assert_parity(name, got, low, high)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in ATTENTION_CASES if c.bench], ids=lambda c: c.name)
def test_matches_the_reference_at_full_length(case, dtype, device):
    # two groups and two sequences show the same sums; float64 scores of all would not fit
    part = dataclasses.replace(case, num_heads=8, num_kv_heads=2, lengths=case.lengths[:2])
    for name, got, low, high in _with_oracle(part, dtype, device):
        assert_parity(name, got, low, high)


@pytest.mark.parametrize("causal", [False, True])
def test_matches_the_reference_over_several_tiles(causal, path, device):
    for name, got, low, high in _with_oracle(ATTENTION_PACK, torch.float16, device, causal=causal):
        assert_parity(name, got, low, high)


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129])
def test_matches_the_reference_around_the_tile_size(length, path, device):
    case = AttentionCase("edge", (length,), 2, 2, 16)
    for causal in (False, True):
        for name, got, low, high in _with_oracle(case, torch.float16, device, causal=causal):
            assert_parity(name, got, low, high)


@pytest.mark.parametrize("length", [65, 127, 128, 129, 193])
def test_matches_the_reference_with_heads_of_nvembeds_width(length, path, device):
    """Around the ends of blocks of keys, which are narrower than those of the cases."""
    case = AttentionCase("ahead", (length,), 2, 1, 128)
    for causal in (False, True):
        for name, got, low, high in _with_oracle(case, torch.float16, device, causal=causal):
            assert_parity(name, got, low, high)


@pytest.mark.skipif(HAS_GPU, reason="plays sm_90 in the interpreter")
@pytest.mark.parametrize("lengths", [(150, 7, 0, 65), (256, 128), (600,)], ids=str)
def test_scores_ahead_change_no_bit(lengths, monkeypatch):
    monkeypatch.setattr(module, "capability", lambda device: 90)
    launches = spy_on_launches(monkeypatch, module, "_flash_attention_fwd_kernel")
    *qkv, layout = AttentionCase("ahead", lengths, 4, 2, 32).inputs("cpu", torch.float16)
    ahead = flash_attention(*qkv, layout, return_lse=True)
    rule = module._launch_config
    monkeypatch.setattr(module, "_launch_config", lambda *args, **kw: rule(*args, **kw) | {"AHEAD": False})
    one_by_one = flash_attention(*qkv, layout, return_lse=True)
    assert [arguments["AHEAD"] for _, arguments in launches] == [True, False]
    assert all(map(torch.equal, ahead, one_by_one))


@pytest.mark.skipif(HAS_GPU, reason="plays the number of multiprocessors in the interpreter")
def test_programs_that_walk_several_tiles_change_no_bit(dtype, path, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, "_flash_attention_fwd_kernel")
    *qkv, layout = AttentionCase("persistent", (150, 7, 0, 65), 4, 2, 32).inputs("cpu", dtype)
    plain = flash_attention(*qkv, layout, return_lse=True)
    rule = module._launch_config
    monkeypatch.setattr(
        module, "_launch_config", lambda *args, **kw: rule(*args, **kw) | {"PERSISTENT": True}
    )
    num_tiles = launches[0][1]["num_tiles"]
    assert num_tiles > 6
    grids = []
    launch = module.launch
    monkeypatch.setattr(module, "launch", lambda kernel, n, **kw: grids.append(n) or launch(kernel, n, **kw))
    for num_programs in (1, 3, num_tiles + 5):
        monkeypatch.setattr(_common, "INTERPRETED_MULTIPROCESSORS", num_programs)
        assert all(map(torch.equal, plain, flash_attention(*qkv, layout, return_lse=True)))
    assert grids == [1, 3, num_tiles]
    assert [arguments["PERSISTENT"] for _, arguments in launches] == [False, True, True, True]


@pytest.mark.parametrize("group", [1, 5, 64])
def test_any_group_size(group, path, device):
    case = AttentionCase("group", (9, 4), 2 * group, 2, 16)
    for name, got, low, high in _with_oracle(case, torch.float16, device):
        assert_parity(name, got, low, high)


def test_scale_is_used(path, device):
    for name, got, low, high in _with_oracle(ATTENTION_PACK, torch.float16, device, scale=0.5):
        assert_parity(name, got, low, high)


def test_without_lse_it_is_the_output_alone(path, device):
    q, k, v, layout = ATTENTION_PACK.inputs(device, torch.float16)
    out = flash_attention(q, k, v, layout)
    assert out.shape == q.shape and out.is_contiguous()
    assert torch.equal(out, flash_attention(q, k, v, layout, return_lse=True)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_nan_in_a_neighbour_does_not_matter(causal, path, device):
    q, k, v, layout = ATTENTION_PACK.inputs(device, torch.float16)
    clean = flash_attention(q, k, v, layout, causal=causal, return_lse=True)
    first, last = 150, 157  # the second sequence: neighbours on both sides
    for t in (q, k, v):
        t[first:last] = float("nan")
    out, lse = flash_attention(q, k, v, layout, causal=causal, return_lse=True)
    others = torch.ones(len(q), dtype=torch.bool)
    others[first:last] = False
    assert torch.equal(out[others], clean[0][others])
    assert torch.equal(lse[:, others], clean[1][:, others])
    assert out[first:last].isnan().all(), "the poison did not arrive, so this test would prove nothing"


# causal on sm_90: the loop without scores ahead
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [24, 32])
def test_nan_around_the_pack_does_not_matter(width, causal, path, device):
    *qkv, layout = dataclasses.replace(ATTENTION_PACK, head_width=width).inputs(device, torch.float16)
    clean = flash_attention(*qkv, layout, causal=causal)
    views = [amid(t) for t in qkv]
    assert torch.equal(flash_attention(*views, layout, causal=causal), clean)


def test_nan_in_a_later_token_does_not_matter_when_causal(path, device):
    q, k, v, layout = ATTENTION_PACK.inputs(device, torch.float16)
    clean = flash_attention(q, k, v, layout, causal=True)
    # the rest of the row's key block holds NaN in k alone: a NaN in v times p = 0 is NaN by IEEE rules
    k[100:150] = float("nan")
    assert torch.equal(flash_attention(q, k, v, layout, causal=True)[:100], clean[:100])


@pytest.mark.parametrize("causal", [False, True])
def test_alone_equals_in_a_pack(causal, path, device):
    q, k, v, layout = ATTENTION_PACK.inputs(device, torch.float16)
    how = {"causal": causal, "return_lse": True}
    packed, packed_lse = flash_attention(q, k, v, layout, **how)
    start = 0
    for length in layout.lengths:
        rows = slice(start, start + length)
        alone = flash_attention(q[rows], k[rows], v[rows], SeqLayout([length], device), **how)
        if length > 128:  # the same tiles, so the same bits
            assert torch.equal(alone[0], packed[rows]) and torch.equal(alone[1], packed_lse[:, rows])
        # shorter ones take smaller tiles alone, which may round p's sum otherwise
        torch.testing.assert_close(alone[0], packed[rows], rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(alone[1], packed_lse[:, rows], rtol=1e-6, atol=1e-6)
        start += length


@pytest.mark.parametrize("causal", [False, True])
def test_doubling_the_batch_changes_no_row(causal, path, device, monkeypatch):
    launches = spy_on_launches(monkeypatch, module, "_flash_attention_fwd_kernel")
    q, k, v, layout = ATTENTION_PACK.inputs(device, torch.float16)
    once = flash_attention(q, k, v, layout, causal=causal)
    twice = SeqLayout(layout.lengths * 2, device)
    both = flash_attention(*(torch.cat([t, t]) for t in (q, k, v)), twice, causal=causal)
    assert torch.equal(both, torch.cat([once, once]))
    assert_same_constants(launches)


def test_permuting_keys_changes_nothing(path, device):
    q, k, v, layout = AttentionCase("keys", (150,), 2, 1, 32).inputs(device, torch.float32)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0)).to(device)
    out, lse = flash_attention(q, k, v, layout, return_lse=True)
    other, other_lse = flash_attention(q, k[order], v[order], layout, return_lse=True)
    torch.testing.assert_close(other, out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other_lse, lse, rtol=1e-6, atol=1e-6)


def test_huge_scores_stay_finite(path, device):
    q, k, v, layout = ATTENTION_PACK.inputs(device, torch.float32)
    out, lse = flash_attention(100 * q, 100 * k, v, layout, return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_no_tokens(lengths, path, device):
    q, k, v, layout = AttentionCase("empty", lengths, 4, 2, 16).inputs(device, torch.float16)
    out, lse = flash_attention(q, k, v, layout, return_lse=True)
    assert out.shape == (0, 4, 16) and lse.shape == (4, 0) and lse.dtype == torch.float32


def test_descriptors_only_where_they_can_be_made(path, device, monkeypatch):
    configs = []

    def spy(*args, **kwargs):
        configs.append(real(*args, **kwargs))
        return configs[-1]

    real = module._launch_config
    monkeypatch.setattr(module, "_launch_config", spy)
    q, k, v, layout = ATTENTION_PACK.inputs(device, torch.float16)
    odd = torch.zeros(len(k), k.shape[1], k.shape[2] + 1, dtype=k.dtype, device=device)[..., :-1].copy_(k)
    shifted = torch.zeros(v.numel() + 1, dtype=v.dtype, device=device)[1:].view(v.shape).copy_(v)
    base = flash_attention(q, k, v, layout)
    for operands in ((q, odd, v), (q, k, shifted)):
        torch.testing.assert_close(flash_attention(*operands, layout), base, rtol=2e-3, atol=1e-4)
    if not HAS_GPU:
        assert [c["USE_TMA"] for c in configs] == [path == 90, False, False]


def test_launch_config_covers_every_width_and_group():
    for capability in (80, 86, 90, 100, 120):
        for dtype in (torch.float16, torch.float32):
            for width in (16, 80, 128, 256):
                for group in (1, 3, 4, 64):
                    for max_length in (1, 16, 64, 4096):
                        c = module._launch_config(
                            width, group, max_length, capability=capability, dtype=dtype
                        )
                        assert c["BLOCK_GROUP"] >= group and c["BLOCK_H"] >= width
                        assert c["BLOCK_T"] * c["BLOCK_GROUP"] >= 16 and c["BLOCK_N"] >= 16
                        assert not c["USE_TMA"] or 90 <= capability < 120
                        assert not c["AHEAD"] or c["USE_TMA"]


def test_no_loop_has_as_many_keys_as_columns_beside_queries_in_registers():
    """ptxas 12.8 gives P the registers of the queries there: bench/NOTES.md."""
    for width in (16, 24, 32, 64, 80, 128, 256):
        for group in (1, 3, 4, 16):
            for length in (1, 32, 64, 128, 512, 32768):
                target = {"capability": 90, "dtype": torch.bfloat16}
                configs = [
                    module._launch_config(width, group, length, causal=c, **target) for c in (False, True)
                ]
                configs.append(module._bwd_launch_config("dq", width, group, length, **target))
                for c in configs:
                    has_next = c["BLOCK_N"] < length
                    assert c["BLOCK_N"] != c["BLOCK_H"] or c.get("AHEAD") or not has_next, (
                        width,
                        group,
                        length,
                    )


def test_scores_are_ahead_where_there_is_a_next_block():
    """One class of lengths takes one loop: the bits of a text do not depend on the longest beside it."""

    def is_ahead(length: int, width: int = 128, **kwargs) -> bool:
        target = {"capability": 90, "dtype": torch.bfloat16} | kwargs
        return bool(module._launch_config(width, 4, length, **target)["AHEAD"])

    assert [is_ahead(length) for length in (1, 64, 128, 512, 32768)] == [False, False, True, True, True]
    assert is_ahead(512, width=16) and not is_ahead(512, width=256)
    for old in ({"causal": True}, {"aligned": False}, {"capability": 80}, {"dtype": torch.float32}):
        assert not is_ahead(512, **old)


def test_no_batch_cuts_a_text_into_other_blocks():
    """A program walks blocks as long in all batches, or longer than the text. So its bits are the same."""
    long = 32768
    for capability, dtype, aligned in itertools.product(
        (80, 90), (torch.bfloat16, torch.float32), (False, True)
    ):
        target = {"capability": capability, "dtype": dtype, "aligned": aligned}
        for width, group, length in itertools.product(
            (16, 64, 80, 128, 256), (1, 4, 16), (1, 20, 50, 64, 100)
        ):
            for kernel, walked in (
                ("fwd", "BLOCK_N"),
                ("causal", "BLOCK_N"),
                ("dq", "BLOCK_N"),
                ("dkv", "BLOCK_T"),
            ):
                if kernel in ("dq", "dkv"):
                    config = functools.partial(module._bwd_launch_config, kernel, width, group, **target)
                else:
                    causal = kernel == "causal"
                    config = functools.partial(module._launch_config, width, group, causal=causal, **target)
                mine, theirs = (config(n)[walked] for n in (length, long))
                assert mine == theirs or mine >= length <= theirs, (kernel, target, width, group, length)


def test_signature_is_the_reference_signature():
    assert inspect.signature(flash_attention) == inspect.signature(reference.flash_attention)


def test_scores_far_below_zero(path, device):
    # exp2 of each alone is zero: only the running maximum keeps them apart
    q, k, v, layout = ATTENTION_PACK.inputs(device, torch.float32)
    args = (q.abs(), k - 60, v)
    (low,) = honest(lambda *qkv: reference.flash_attention(*qkv, layout), args)
    high = reference.flash_attention(*(t.double() for t in args), layout)
    assert_parity("out", flash_attention(*args, layout), low, high)


def test_rows_lie_beyond_2_to_the_31_elements(path, device):
    """Row addresses are 64 bits wide. The 4 GiB are never touched, so they cost no memory."""
    memory = torch.from_numpy(np.zeros(2**31 + 64, dtype=np.float16)).to(device)
    t = memory.as_strided((3, 1, 16), (2**30, 16, 1))
    t.copy_(torch.arange(48).view(3, 1, 16) / 48)
    layout = SeqLayout([1, 1, 1], device)
    near = t.contiguous()
    assert torch.equal(flash_attention(t, t, t, layout), flash_attention(near, near, near, layout))


def test_ops_takes_the_kernel(device):
    q, k, v, layout = CASES[0].inputs(device, torch.float16)
    with ops.use_impl("triton"):
        assert torch.equal(ops.flash_attention(q, k, v, layout), flash_attention(q, k, v, layout))


def _valid(device="cpu"):
    return list(AttentionCase("valid", (3, 2), 4, 2, 32).inputs(device, torch.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(0, a[0][0]), r"q must be \[5, N, H\], got \(4, 32\)"),
        (lambda a: a.__setitem__(0, a[0][:4]), r"q must be \[5, N, H\], got \(4, 4, 32\)"),
        (
            lambda a: a.__setitem__(0, a[0][:, :3]),
            r"q must be .* N a multiple of the 2 heads of k, got \(5, 3",
        ),
        (
            lambda a: a.__setitem__(0, a[0].repeat(1, 33, 1)),
            "q must have at most 64 heads of width 32 per head of k for this kernel, got 66",
        ),
        (
            lambda a: a.__setitem__(
                slice(0, 3), [t.repeat(1, r, 8) for t, r in zip(a[:3], (17, 2, 2), strict=True)]
            ),
            "q must have at most 16 heads of width 256 per head of k for this kernel, got 17",
        ),
        (
            lambda a: a.__setitem__(slice(0, 3), [t[..., :8] for t in a[:3]]),
            "q must have heads from 16 to 256 wide for this kernel, got 8",
        ),
        (
            lambda a: a.__setitem__(slice(0, 3), [t.repeat(1, 1, 9) for t in a[:3]]),
            "q must have heads from 16 to 256 wide for this kernel, got 288",
        ),
        (lambda a: a.__setitem__(1, a[1][:4]), r"k must be \[5, G, 32\], got \(4, 2, 32\)"),
        (lambda a: a.__setitem__(1, a[1][..., :16]), r"k must be \[5, G, 32\], got \(5, 2, 16\)"),
        (lambda a: a.__setitem__(1, a[1][:, :0]), "v must be .* like k"),
        (lambda a: a.__setitem__(2, a[2][:, :1]), r"v must be \[5, 2, 32\] like k, got \(5, 1, 32\)"),
        (lambda a: a.__setitem__(1, a[1].half()), "k must be torch.float32 like q, got .* torch.float16"),
        (
            lambda a: a.__setitem__(slice(0, 3), [t.double() for t in a[:3]]),
            "q must be fp16, bf16 or fp32, got .* torch.float64",
        ),
        (lambda a: a.__setitem__(2, a[2].mT.contiguous().mT), "v must be strided with contiguous heads"),
        (lambda a: a.__setitem__(1, a[1].to("meta")), "k must be on .* like the layout, got .* on meta"),
        (lambda a: a.append(-1.0), "scale must be positive and finite, got -1.0"),
        (lambda a: a.append(float("nan")), "scale must be positive and finite, got nan"),
    ],
)
def test_rejects(change, message, device):
    args = _valid(device)
    change(args)
    with pytest.raises(ValueError, match=message):
        flash_attention(*args)
