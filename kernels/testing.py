"""The one list of shapes, the one input factory per kernel and the one tolerance rule.

Imported by tests/, bench/ and the self-check, by nothing that computes. A case is
a frozen problem: `name` is the pytest id and the row label of the benchmark,
`bench` marks the sizes of the real model, too large for the interpreter.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nvembed_fast.kernels.layout import SeqLayout

Tensors = Sequence[torch.Tensor]

LOG2E = 1 / math.log(2)
# one token among longer ones, no two lengths equal, and a sequence without tokens
RAGGED = (5, 1, 17, 64, 33)
EMPTY_MIDDLE = (7, 0, 9)


# where `generator` draws
_place: ContextVar[str] = ContextVar("_place", default="cpu")


@contextmanager
def drawn_on(device: str | torch.device) -> Iterator[None]:
    """Inside, inputs and upstream gradients are drawn on this device.

    A GPU draws other values than a CPU, and is done in no time. So this is for what is timed there. The tests
    compare the same values everywhere.
    """
    before = _place.set(str(device))
    try:
        yield
    finally:
        _place.reset(before)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(_place.get()).manual_seed(seed)


def _on_its_device(draw: Callable) -> Callable[..., torch.Tensor]:
    """Draws where the generator does, whatever device and dtype the caller has made the default."""

    def drawn(*size, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return draw(*size, generator=generator, dtype=dtype, device=generator.device)

    return drawn


randn, _rand = _on_its_device(torch.randn), _on_its_device(torch.rand)


def skewed_lengths(count: int, median: int = 128, minimum: int = 16, maximum: int = 4096) -> tuple[int, ...]:
    """Tokens of texts as they come: lognormal with sigma 1, clipped, drawn with seed 0."""
    draws = np.random.default_rng(0).lognormal(math.log(median), 1.0, count)
    return tuple(int(n) for n in draws.round().clip(minimum, maximum))


@dataclass(frozen=True)
class AttentionCase:
    """A packed self-attention problem. q, k and v are views of one packed QKV tensor, as in the model."""

    name: str
    lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_width: int
    causal: bool = False
    peak: float = 1.0  # factor on q and k: 2 makes the softmax peaked
    bench: bool = False

    def inputs(self, device: str, dtype: torch.dtype, seed: int = 0):
        layout = SeqLayout(self.lengths, device)
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = randn(layout.num_tokens, heads, self.head_width, generator=generator(seed))
        qkv[:, : self.num_heads + self.num_kv_heads] *= self.peak
        q, k, v = qkv.to(device, dtype).split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return q, k, v, layout

    def flops(self, backward: bool = False) -> int:
        pairs = sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        products = 7 if backward else 2  # S and out, or S again, dP, dQ, dK and dV
        return 2 * products * pairs * self.num_heads * self.head_width


ATTENTION_CASES = (
    AttentionCase("one-token", (1,), 4, 1, 16),
    AttentionCase("ragged-gqa", RAGGED, 4, 2, 32),
    AttentionCase("ragged-mha", (3, 70, 2), 2, 2, 64),
    AttentionCase("three-per-group", (19, 40), 9, 3, 64),  # SmolLM2: the group is not a power of two
    AttentionCase("odd-width", (31, 6), 2, 1, 80),
    AttentionCase("wide", (20, 41), 2, 1, 256),
    AttentionCase("empty-middle", EMPTY_MIDDLE, 4, 1, 16),
    AttentionCase("peaked", (50, 77), 4, 1, 32, peak=2.0),
    AttentionCase("causal", RAGGED, 4, 2, 32, causal=True),
    AttentionCase("long", (600,), 2, 1, 16),
    AttentionCase("nvembed-32x512", (512,) * 32, 32, 8, 128, bench=True),
    AttentionCase("nvembed-4x4096", (4096,) * 4, 32, 8, 128, bench=True),
    AttentionCase("nvembed-2x8192", (8192,) * 2, 32, 8, 128, bench=True),
)
# several tiles of keys on either path, an empty sequence, a group padded from three heads to four
ATTENTION_PACK = AttentionCase("pack", (150, 7, 0, 1, 33), 6, 2, 32)
# for what does not depend on the number of tiles
ATTENTION_SHORT = AttentionCase("short", (20, 7, 0, 1), 6, 2, 32)


# for the benches alone: what a length costs at one number of tokens, and a batch as texts come
SWEEP_TOKENS = 32768
ATTENTION_SWEEP = (
    *(
        AttentionCase(f"sweep-{n}x{SWEEP_TOKENS // n}", (n,) * (SWEEP_TOKENS // n), 32, 8, 128, bench=True)
        for n in (128, 512, 2048, 8192, 32768)
    ),
    AttentionCase("skewed-64", skewed_lengths(64), 32, 8, 128, bench=True),
)
ATTENTION_CPU = (
    AttentionCase("smollm2-8x256", (256,) * 8, 9, 3, 64, bench=True),
    AttentionCase("smollm2-skewed-8", skewed_lengths(8), 9, 3, 64, bench=True),
)


def attention_gradients(
    inputs, upstream, layout: SeqLayout, causal: bool = False, scale: float | None = None
) -> list[torch.Tensor]:
    """dq, dk, dv as an honest kernel rounds: the cost of the dtype, the `low` of a gradient's parity.

    Eager attention on a CPU keeps probabilities in fp32. Tensor cores take operands in the dtype, so P and dS
    are rounded to it before their products, as is the output before rowsum(dout out). All else is fp32. So is
    the saved base-2 log of a softmax denominator, whose rounding is the same for a whole row of P.

    Args:
        inputs: q [T, N, H], k and v [T, G, H].
        upstream: the gradient of the output [T, N, H], and that of the lse [N, T].
    """
    (q, k, v), (dout, dlse) = inputs, upstream
    group = q.shape[1] // k.shape[1]
    grads = [torch.zeros(t.shape, device=t.device) for t in inputs]
    for start, stop in zip(layout.cu_seqlens.tolist(), layout.cu_seqlens[1:].tolist(), strict=False):
        for n in range(q.shape[1]):
            g = n // group
            q_h, k_h, v_h, dout_h = (t[start:stop, i] for t, i in ((q, n), (k, g), (v, g), (dout, n)))
            dlse_h = dlse[n, start:stop, None]
            dq, dk, dv = _head_gradients(q_h, k_h, v_h, dout_h, dlse_h, causal, scale)
            grads[0][start:stop, n] = dq
            grads[1][start:stop, g] += dk
            grads[2][start:stop, g] += dv
    return [grad.to(q.dtype) for grad in grads]


def latent_attention_gradients(inputs, upstream) -> list[torch.Tensor]:
    """As `attention_gradients`, for the direct form: q [T, N, H], k and v [L, N, H], dout [T, N, H]."""
    heads = zip(*(t.unbind(1) for t in (*inputs, *upstream)), strict=True)
    per_head = zip(*(_head_gradients(*head) for head in heads), strict=True)
    return [torch.stack(grads, dim=1).to(inputs[0].dtype) for grads in per_head]


def _head_gradients(q, k, v, dout, dlse=0.0, causal: bool = False, scale: float | None = None) -> Tensors:
    """dq, dk, dv of one head in fp32: q and dout [S, H], k and v [L, H], dlse [S, 1]."""
    q_SH, k_LH, v_LH, dout_SH = (t.float() for t in (q, k, v, dout))
    scale = q.shape[1] ** -0.5 if scale is None else scale
    scores = scale * q_SH @ k_LH.mT
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    lse_log2 = LOG2E * scores.logsumexp(-1, keepdim=True)
    p = (LOG2E * scores - lse_log2).exp2()
    p_rounded = p.to(q.dtype).float()
    out = (p_rounded @ v_LH).to(q.dtype).float()
    delta = (dout_SH * out).sum(-1, keepdim=True) - dlse
    ds = (p * (dout_SH @ v_LH.mT - delta)).to(q.dtype).float()
    return scale * ds @ k_LH, scale * ds.mT @ q_SH, p_rounded.mT @ dout_SH


@dataclass(frozen=True)
class LatentCase:
    """Tokens against L latents: q, k, v for the direct form, and x, a, b, residual for the absorbed form."""

    name: str
    num_tokens: int
    num_latents: int
    num_heads: int
    head_width: int
    width: int  # model width D
    peak: float = 1.0
    bench: bool = False

    def direct_inputs(self, device: str, dtype: torch.dtype, seed: int = 0):
        g = generator(seed)
        q = self.peak * randn(self.num_tokens, self.num_heads, self.head_width, generator=g)
        kv = randn(self.num_latents, 2, self.num_heads, self.head_width, generator=g)
        kv[:, 0] *= self.peak
        k, v = kv.to(device, dtype).unbind(1)
        return q.to(device, dtype), k, v

    def absorbed_inputs(self, device: str, dtype: torch.dtype, seed: int = 0):
        g = generator(seed)
        columns = self.num_heads * self.num_latents
        x = self.peak * randn(self.num_tokens, self.width, generator=g)
        a = self.peak * randn(columns, self.width, generator=g) / self.width**0.5
        b = randn(columns, self.width, generator=g)
        residual = randn(self.num_tokens, self.width, generator=g)
        return *(t.to(device, dtype) for t in (x, a, b, residual)), self.num_heads

    def direct_flops(self, backward: bool = False) -> int:
        products = 7 if backward else 2  # S and out, or S again, dP, dq, dk and dv
        return 2 * products * self.num_tokens * self.num_latents * self.num_heads * self.head_width

    def absorbed_flops(self, backward: bool = False) -> int:
        products = 6 if backward else 2  # S and out, or dP, dx, da and db
        return 2 * products * self.num_tokens * self.num_latents * self.num_heads * self.width


LATENT_CASES = (
    LatentCase("one-token", 1, 64, 4, 64, 32),
    LatentCase("tiny-golden", 50, 32, 8, 64, 64),
    LatentCase("no-tile-divides", 77, 24, 3, 48, 80),
    LatentCase("512-latents", 70, 512, 2, 64, 96),
    LatentCase("1024-latents", 33, 1024, 1, 16, 48),
    LatentCase("wide-head", 20, 40, 1, 256, 64),
    LatentCase("peaked", 40, 64, 2, 32, 64, peak=2.0),
    LatentCase("long", 700, 16, 1, 16, 16),
    LatentCase("smollm2-16k", 16384, 512, 8, 64, 576, bench=True),
    LatentCase("nvembed-16k", 16384, 512, 8, 4096, 4096, bench=True),
)
LATENT_CPU = (LatentCase("smollm2-2k", 2048, 512, 8, 64, 576, bench=True),)
LATENT_SWEEP = tuple(
    LatentCase(f"sweep-{n}-latents", 16384, n, 8, 128, 1024, bench=True) for n in (64, 128, 256, 1024)
)


@dataclass(frozen=True)
class PoolCase:
    """A mean-pool problem. `width` is D, or F for the GEGLU form, whose input has 2F columns."""

    name: str
    lengths: tuple[int, ...]
    width: int
    masked: bool = True
    bench: bool = False

    def inputs(self, device: str, dtype: torch.dtype, seed: int = 0, geglu: bool = False):
        g = generator(seed)
        layout = SeqLayout(self.lengths, device)
        x = randn(layout.num_tokens, self.width * (2 if geglu else 1), generator=g).to(device, dtype)
        mask = (_rand(layout.num_tokens, generator=g) > 0.3).to(device) if self.masked else None
        return x, layout, mask

    def bytes_moved(self, dtype: torch.dtype, geglu: bool = False, backward: bool = False) -> int:
        # forward reads the input, backward writes its gradient and reads a GEGLU's input again
        passes = (3 if geglu else 2) if backward else 1
        columns, pooled = self.width * (2 if geglu else 1), len(self.lengths) * self.width * 4
        return passes * sum(self.lengths) * columns * dtype.itemsize + (2 if backward else 1) * pooled


POOL_CASES = (
    PoolCase("one-token", (1,), 64),
    PoolCase("ragged", RAGGED, 80),
    PoolCase("empty-middle", EMPTY_MIDDLE, 64),
    PoolCase("no-mask", (16, 16), 128, masked=False),
    PoolCase("no-tile-divides", (77, 131), 77),
    PoolCase("long", (3000,), 128),
    PoolCase("nvembed-32x512", (512,) * 32, 4096, masked=False, bench=True),
    PoolCase("nvembed-512x32", (32,) * 512, 4096, masked=False, bench=True),
    PoolCase("nvembed-1x16384", (16384,), 4096, masked=False, bench=True),
    PoolCase("nvembed-32x512-mlp", (512,) * 32, 16384, masked=False, bench=True),
)
POOL_CPU = (PoolCase("smollm2-8x256", (256,) * 8, 576, masked=False, bench=True),)


@dataclass(frozen=True)
class RowCase:
    """T rows of one width, for norms (D) and gated activations (F, whose input has 2F columns)."""

    name: str
    num_tokens: int
    width: int
    bench: bool = False

    def norm_inputs(self, device: str, dtype: torch.dtype, seed: int = 0):
        g = generator(seed)
        x, residual = (randn(self.num_tokens, self.width, generator=g) for _ in range(2))
        weight = 1 + 0.1 * randn(self.width, generator=g)
        return tuple(t.to(device, dtype) for t in (x, residual, weight))

    def gated_input(self, device: str, dtype: torch.dtype, seed: int = 0):
        return (2 * randn(self.num_tokens, 2 * self.width, generator=generator(seed))).to(device, dtype)

    def norm_bytes(self, dtype: torch.dtype, residual: bool, backward: bool = False) -> int:
        # backward: h, dy, dh, and behind a residual add the gradient of h
        rows = (4 if residual else 2) + ((4 if residual else 3) if backward else 0)
        return rows * self.num_tokens * self.width * dtype.itemsize

    def gated_bytes(self, dtype: torch.dtype, backward: bool = False) -> int:
        return (8 if backward else 3) * self.num_tokens * self.width * dtype.itemsize


NORM_CASES = (
    RowCase("one-token", 1, 64),
    RowCase("no-tile-divides", 37, 77),
    RowCase("smollm2", 20, 576),
    RowCase("wide", 3, 4096),
    RowCase("long", 300, 128),
    RowCase("nvembed-16k", 16384, 4096, bench=True),
)
NORM_SWEEP = tuple(RowCase(f"sweep-{d}-wide", 2**26 // d, d, bench=True) for d in (1024, 2048, 8192))
NORM_CPU = (RowCase("smollm2-2k", 2048, 576, bench=True),)
GATED_CASES = (
    RowCase("one-token", 1, 64),
    RowCase("no-tile-divides", 37, 77),
    RowCase("smollm2", 20, 1536),
    RowCase("long", 300, 16),
    RowCase("nvembed-16k", 16384, 14336, bench=True),
)
GATED_SWEEP = tuple(RowCase(f"sweep-{f}-wide", 2**27 // f, f, bench=True) for f in (1536, 4096, 28672))
GATED_CPU = (RowCase("smollm2-2k", 2048, 1536, bench=True),)


@dataclass(frozen=True)
class RotaryCase:
    """A packed QKV product and the tables that turn it."""

    name: str
    lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_width: int
    bench: bool = False

    def inputs(self, device: str, dtype: torch.dtype, seed: int = 0):
        """(qkv, cos, sin, positions, num_rotated). The tables are fp32 as in the model."""
        layout = SeqLayout(self.lengths, device)
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = randn(layout.num_tokens, heads, self.head_width, generator=generator(seed))
        evens = torch.arange(0, self.head_width, 2, dtype=torch.float32, device=device)
        frequency = 10000.0 ** -(evens / self.head_width)
        angle = torch.arange(max(layout.max_length, 1), device=device)[:, None] * frequency
        rotated = self.num_heads + self.num_kv_heads
        return qkv.to(device, dtype), angle.cos(), angle.sin(), layout.positions, rotated

    def bytes_moved(self, dtype: torch.dtype, inplace: bool, backward: bool = False) -> int:
        heads = self.num_heads + (1 if inplace else 2) * self.num_kv_heads
        passes = 4 if backward else 2
        return passes * sum(self.lengths) * heads * self.head_width * dtype.itemsize


ROTARY_CASES = (
    RotaryCase("one-token", (1,), 2, 1, 16),
    RotaryCase("ragged", RAGGED, 4, 2, 32),
    RotaryCase("three-per-group", (19, 40), 9, 3, 64),
    RotaryCase("odd-width", (31, 6), 2, 1, 80),
    RotaryCase("empty-middle", EMPTY_MIDDLE, 4, 1, 16),
    RotaryCase("long", (700,), 1, 1, 16),
    RotaryCase("nvembed-32x512", (512,) * 32, 32, 8, 128, bench=True),
)
ROTARY_CPU = (RotaryCase("smollm2-8x256", (256,) * 8, 9, 3, 64, bench=True),)


@dataclass(frozen=True)
class ScoreCase:
    """Rows against columns, for `masked_lse`. Scores are of size `peak`.

    A third of the rows and columns are of each of two scopes, the others of both. Some rows have none. A row
    has three keys and one of 0, which some columns have, too. A limit lies in the widest gap among the
    highest fifth of a row's scores, so that no rounding moves a score across.
    """

    name: str
    num_rows: int
    num_columns: int
    width: int
    masked: bool = True
    limited: bool = False
    peak: float = 3.0
    bench: bool = False

    def inputs(self, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
        """(q, d, row_scopes, column_scopes, row_keys, column_keys, limits, scale)."""
        g = generator(seed)
        q = randn(self.num_rows, self.width, generator=g).to(dtype)
        d = randn(self.num_columns, self.width, generator=g).to(dtype)
        scale = self.peak / self.width**0.5
        numbers = torch.arange(self.num_columns, device="cpu")
        # the scope 1, and as a second one 2 or none
        row_scopes = 1 + torch.arange(self.num_rows, device="cpu")[:, None] % 3 % 2
        row_scopes[5::11] = -1
        column_scopes = torch.tensor([(1, -1), (2, -1), (1, 2)], device="cpu")[numbers % 3]
        column_keys = 1 + numbers[:, None] % max(1, 3 * self.num_columns // 4)
        row_keys = torch.randint(1, self.num_columns + 2, (self.num_rows, 4), generator=g, device=g.device)
        row_keys[:, 2] = 0
        column_keys[3::7] = 0
        if not self.masked:
            row_scopes, column_scopes = torch.zeros_like(row_scopes), torch.zeros_like(column_scopes[:, :1])
            row_keys = torch.zeros_like(row_keys[:, :1])
        limits = None
        if self.limited:
            scores = (scale * q.double() @ d.double().mT).sort(dim=1).values[:, -self.num_columns // 5 :]
            widest = scores.diff(dim=1).argmax(dim=1, keepdim=True)
            limits = ((scores.gather(1, widest) + scores.gather(1, widest + 1)) / 2).squeeze(1).float()
        tensors = q, d, row_scopes, column_scopes.contiguous(), row_keys, column_keys, limits
        return *(None if t is None else t.to(device) for t in tensors), scale

    def flops(self, backward: bool = False) -> int:
        products = 3 if backward else 1  # the scores, or these again, dq and dd
        return 2 * products * self.num_rows * self.num_columns * self.width


SCORE_CASES = (
    ScoreCase("one-column", 33, 1, 16, masked=False),
    ScoreCase("no-tile-divides", 37, 77, 80),
    ScoreCase("limited", 70, 150, 48, limited=True),
    ScoreCase("unmasked", 33, 140, 32, masked=False),
    ScoreCase("peaked", 40, 130, 64, peak=30.0),
    ScoreCase("wide", 20, 40, 700),
    ScoreCase("long", 7, 2300, 96),
    ScoreCase("nvembed-8k", 8192, 8192, 4096, limited=False, bench=True),
    ScoreCase("nvembed-128x1k", 128, 1024, 4096, bench=True),
)
SCORE_CPU = (ScoreCase("smollm2-256x2k", 256, 2048, 576, bench=True),)


def small(cases: tuple) -> list:
    """The cases for the tests."""
    return [c for c in cases if not c.bench]


def assert_parity(name: str, got: torch.Tensor, low: torch.Tensor | Tensors, high: torch.Tensor) -> None:
    """Pass if `got` is about as close to the float64 oracle as eager PyTorch in the same dtype.

    Args:
        got: result under test.
        low: the reference run in the dtype of `got`. Its error is the cost of the dtype. Of several honest
            results (see `honest`) the largest error is.
        high: the reference run in float64 on the same, already rounded, inputs.

    The bound of the largest error (2x eager, and 2 eps of the largest value) catches one wrong element. The
    bound of the RMS error (1x eager, 1.25x in fp32, and an eighth of eps) catches a wrong accumulator. With
    several `low` they are wider, by what a GPU's instructions cannot avoid: see `_slacks_and_floors`.
    """
    for norm, error, bound in errors(name, got, low, high):
        assert error <= bound, f"{name}: {norm} error {error:.2e} > {bound:.2e}"


def _slacks_and_floors(
    dtype: torch.dtype, of_products: bool
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(multiple of the cost, multiple of eps) of the largest and of the RMS error.

    Of products on a GPU, in fp32. All of ours with products have an exponential, too:

    1. exp2 is ex2.approx, whose relative error is up to 2^-22, in a weight as in the sum that divides it.
       SDPA in fp32 cuts each factor of a product in two numbers of TF32, 11 bits each. So there are two
       errors within 2 eps: up to 4 eps together, and 1.63 as their RMS. They come on top.
    2. The rounding of an lse is that of a whole row, so it is drawn as seldom as there are rows. The RMS of
       20 draws is above 2 times that of 20 others once in 600 times (F distribution).
    """
    if of_products:
        return (2.0, 2.0 + 4.0), (2.0, 0.125 + 1.63)
    return (2.0, 2.0), (1.25 if dtype == torch.float32 else 1.0, 0.125)


def errors(
    name: str, got: torch.Tensor, low: torch.Tensor | Tensors, high: torch.Tensor
) -> list[tuple[str, float, float]]:
    """(norm, error, bound) of the two norms that `assert_parity` compares.

    Raises:
        AssertionError: there is nothing to compare, or the result is not finite.
    """
    lows = (low,) if isinstance(low, torch.Tensor) else low
    assert {t.shape for t in (got, *lows)} == {high.shape} and got.dtype == lows[0].dtype, (
        f"{name}: shape or dtype"
    )
    assert got.numel() > 0, f"{name}: nothing to compare, so this test proves nothing"
    assert torch.isfinite(high).all(), f"{name}: the oracle is not finite, so this test proves nothing"
    assert torch.isfinite(got).all(), f"{name}: non-finite result"
    error, costs, eps = got.double() - high, [t.double() - high for t in lows], torch.finfo(got.dtype).eps
    found = []
    for norm, (slack, floor) in zip((_max, _rms), _slacks_and_floors(got.dtype, len(lows) > 1), strict=True):
        bound = slack * max(norm(cost).item() for cost in costs) + floor * eps * norm(high).item()
        found.append((norm.__name__, norm(error).item(), bound))
    return found


def _is_fp32_of_a_gpu(t: torch.Tensor | None) -> bool:
    return t is not None and t.is_cuda and t.dtype == torch.float32


def honest(function: Callable, inputs: Tensors) -> list[tuple[torch.Tensor, ...]]:
    """The honest results that `low` of a parity may be, for every output of a function.

    The first is that of `function` itself, which is eager PyTorch. Beside an fp32 result of a GPU stands that
    of float64 on `_moved` inputs: cuBLAS splits long sums and adds the parts, which is more exact than a
    kernel that adds term by term. It also never truncates them. Where eager multiplies no matrices, as in a
    norm, nothing stands beside it.
    """
    with _Products() as products:
        eager = as_tuple(function(*inputs))
    if not products.seen or not any(map(_is_fp32_of_a_gpu, eager)):
        return [(t,) for t in eager]
    moved = as_tuple(function(*_moved(inputs)))
    return [(t, m) if _is_fp32_of_a_gpu(t) else (t,) for t, m in zip(eager, moved, strict=True)]


def of_products(eager: Tensors) -> list[tuple[torch.Tensor, ...]]:
    """As `honest`, for results of a whole model: eager alone, with the slack of products of a GPU.

    Its inputs are weights. A moved weight is off in the same way for every token, and a rounded sum is not.
    """
    return [(t, t) if _is_fp32_of_a_gpu(t) else (t,) for t in eager]


class _Products(TorchDispatchMode):
    """Whether a product of matrices ran inside, or attention that PyTorch fuses, which are two."""

    seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen |= name in _PRODUCTS or name.startswith("_scaled_dot_product")
        return func(*args, **(kwargs or {}))


_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
TRUNCATED_TERMS = 8  # of an A100's tensor cores. Hopper's take 16 (arXiv 2512.07004), and are given 8, too


def _moved(inputs: Tensors) -> list[torch.Tensor]:
    """The inputs in float64, moved so that exact sums over their last dimension err as sums on a GPU.

    If partial sum k is rounded by a share of r_k, the result is the exact sum with terms 1 to k larger by
    that share. So term i is moved by r_i + ... + r_K. These r are independent, and each tensor has its own.

    1. fp32 products are added term by term and rounded to nearest, by up to eps / 2. Here r is within eps,
       in both factors, so the RMS of the two is 0.82 eps. Partial sums grow like the square root of k, so the
       sum errs by about eps / 2 times that of K, the probabilistic bound of Higham and Mary (2019). That
       leaves room for the roundings of a score behind its sum.
    2. Tensor cores add TRUNCATED_TERMS products of 16 bits at once to the sum, and cut off what does not fit
       into fp32: r is between -eps and 0, here half of it for each of two factors. All r have one sign, so
       the error grows by K.
    """
    g, eps, moved = generator(2), torch.finfo(torch.float32).eps, []
    for t in inputs:
        *others, width = t.shape
        is_rounded = t.dtype == torch.float32
        terms = 1 if is_rounded else TRUNCATED_TERMS
        r = _rand(*others, -(-width // terms), generator=g, dtype=torch.float64).to(t.device)
        r = eps * (2 * r - 1) if is_rounded else -eps / 2 * r
        shares = r.flip(-1).cumsum(-1).flip(-1).repeat_interleave(terms, dim=-1)[..., :width]
        moved.append(t.double() * (1 + shares))
    return moved


def _max(t: torch.Tensor) -> torch.Tensor:
    return t.abs().max()


def _rms(t: torch.Tensor) -> torch.Tensor:
    return t.square().mean().sqrt()


def upstream_of(outputs: Tensors, seed: int = 1, contiguous: bool = True) -> list[torch.Tensor]:
    """A random gradient for every output, rounded to its dtype, transposed in memory if not contiguous."""
    g = generator(seed)
    grads = [randn(o.shape, generator=g).to(o.device, o.dtype) for o in outputs]
    if not contiguous:
        grads = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in grads]
        assert not any(t.is_contiguous() for t in grads if min(t.shape) > 1), "this would prove nothing"
    return grads


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def gradients(
    fn: Callable,
    inputs: Tensors,
    upstream: Tensors | None = None,
    frozen: Sequence[int] = (),
) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None]]:
    """(outputs, gradient of every input): None for the inputs whose index is in `frozen`.

    Args:
        fn: of the inputs alone, with one output or a tuple. The caller binds a layout, eps and the like.
        upstream: one gradient per output. None draws them.
    """
    leaves = [t.detach().clone().requires_grad_(i not in frozen) for i, t in enumerate(inputs)]
    outputs = as_tuple(fn(*leaves))
    upstream = (
        upstream_of(outputs)
        if upstream is None
        else [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    )
    torch.autograd.backward(outputs, upstream)
    return tuple(o.detach() for o in outputs), [leaf.grad for leaf in leaves]


def assert_gradient_parity(
    name: str,
    kernel: Callable,
    reference: Callable,
    inputs: Tensors,
    low: Callable | None = None,
    frozen: Sequence[int] = (),
    contiguous: bool = True,
    upstream: Tensors | None = None,
) -> None:
    """Every gradient of `kernel` meets `assert_parity` against those of `reference` in float64.

    Args:
        low: the cost of the dtype, when the kernel has to round where `reference` in that dtype does not:
            (inputs, upstream) -> gradients, in the order of the inputs. None runs `reference`.
        frozen: inputs that need no gradient, by index. The kernel must not compute one.
    """
    compared = compared_gradients(kernel, reference, inputs, low, frozen, contiguous, upstream)
    for i, (g, lo, hi) in enumerate(compared):
        if i in frozen:
            assert g is None, f"{name}: gradient {i} is not needed but was given"
        else:
            assert g is not None and hi is not None, f"{name}: gradient {i} is missing"
            assert_parity(f"{name}: gradient {i}", g, lo, hi)


def compared_gradients(
    kernel: Callable,
    reference: Callable,
    inputs: Tensors,
    low: Callable | None = None,
    frozen: Sequence[int] = (),
    contiguous: bool = True,
    upstream: Tensors | None = None,
) -> list[tuple]:
    """(got, low, high) for the gradient of every input. See `assert_gradient_parity`."""
    with torch.no_grad():
        outputs = as_tuple(reference(*inputs))
    upstream = upstream_of(outputs, contiguous=contiguous) if upstream is None else upstream

    def exact(*tensors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return tuple(gradients(reference, tensors, upstream)[1])

    _, got = gradients(kernel, inputs, upstream, frozen)
    low_grads = low(inputs, upstream) if low else honest(exact, inputs)
    high = exact(*(t.double() for t in inputs))
    return list(zip(got, low_grads, high, strict=True))
