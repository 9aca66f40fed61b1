"""Kernels as a GPU rounds them, on a CPU: numbers of fp32 are kept in float64. For tests of the tolerance.

1. fp32 products are added term by term, each sum rounded to nearest: FFMA, as in Triton's `ieee` products.
2. Of 16 bits Hopper's tensor cores add 16 products at once. All are cut off at 2 bits below the last one of
   the largest of them and of the sum so far, and the new sum is cut off to fp32 (arXiv 2512.07004).
3. ex2.approx.ftz errs by up to 2^-22, here anywhere within.
"""

from collections.abc import Callable

import torch

from nvembed_fast.kernels import reference
from nvembed_fast.kernels.testing import LOG2E, generator

TILE = 64  # of keys or columns
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def fp32(t: torch.Tensor) -> torch.Tensor:
    return t.float().double()


def _cut(t: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return (t / unit).trunc() * unit


def _power_of_2(t: torch.Tensor) -> torch.Tensor:
    """The largest that is not above |t|."""
    _, exponent = t.abs().clamp_min(1e-30).frexp()
    return torch.ldexp(torch.ones_like(t), exponent - 1)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b^T of [R, K] and [C, K], by the cores that take their dtype."""
    is_wide = a.dtype in (torch.float32, torch.float64)
    step = 1 if is_wide else 16
    a, b, total = a.double(), b.double(), torch.zeros(len(a), len(b), dtype=torch.float64)
    for k in range(0, a.shape[1], step):
        terms = a[:, None, k : k + step] * b[:, k : k + step]
        if is_wide:
            total = fp32(total + terms[..., 0])
        else:
            unit = _power_of_2(torch.maximum(terms.abs().amax(-1), total.abs())) * 2.0**-25
            total = _cut(terms, unit[..., None]).sum(-1) + _cut(total, unit)
            total = _cut(total, _power_of_2(total) * 2.0**-23)
    return total


def _add_up(t: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, by halves."""
    while (width := t.shape[-1]) > 1:
        t = torch.nn.functional.pad(t, (0, width % 2))
        t = fp32(t[..., 0::2] + t[..., 1::2])
    return t[..., 0]


def masked_lse(q, d, *rest, seed: int = 0, product: Product = product) -> tuple[torch.Tensor, ...]:
    """(lse, highest, total) of the kernel."""
    *masks, scale = rest
    exp2 = _Exp2(seed)
    dropped = reference._scores(q.double(), d.double(), masks, scale, slice(None))[1]
    scores = fp32(product(q, d) * scale)
    highest = torch.full((len(q),), -torch.inf, dtype=torch.float64)
    total, denominator = (torch.zeros(len(q), dtype=torch.float64) for _ in range(2))
    for tile, drop in zip(scores.split(TILE, 1), dropped.split(TILE, 1), strict=True):
        total = fp32(total + _add_up(tile.masked_fill(drop, 0.0)))
        tile = tile.masked_fill(drop, -torch.inf)
        new = torch.maximum(highest, tile.amax(1))
        shift = new.masked_fill(new == -torch.inf, 0.0)
        weights = exp2(fp32(fp32(tile - shift[:, None]) * LOG2E))
        denominator = fp32(denominator * exp2(fp32(fp32(highest - shift) * LOG2E)) + _add_up(weights))
        highest = new
    lse = fp32(highest + fp32(denominator.clamp_min(1e-30).log()))
    return tuple(t.float() for t in (lse, highest, total))


def masked_lse_gradients(q, d, *rest, dlse, seed: int = 0, product: Product = product) -> list[torch.Tensor]:
    """(dq, dd) of fp32 inputs by the kernel and two products."""
    *masks, scale = rest
    lse = masked_lse(*(q, d, *rest), seed=seed, product=product)[0].double()
    dropped = reference._scores(q.double(), d.double(), masks, scale, slice(None))[1]
    weights = _Exp2(seed + 1)(fp32(fp32(fp32(product(q, d) * scale) - lse[:, None]) * LOG2E))
    ds = fp32(weights * fp32(dlse.double() * scale)[:, None]).masked_fill(dropped, 0.0)
    return [product(ds, d.mT).float(), product(ds.mT, q.mT).float()]


def attention(q, k, v, dout, seed: int = 0, product: Product = product) -> list[torch.Tensor]:
    """(out, lse, dq, dk, dv) of one sequence of one head, all [S, H] but the lse."""
    exp2, dtype = _Exp2(seed), q.dtype
    c = torch.tensor(LOG2E * q.shape[1] ** -0.5, dtype=torch.float32).double()
    scores = product(q, k)
    highest = torch.full((len(q),), -torch.inf, dtype=torch.float64)
    denominator, acc = torch.zeros(len(q), dtype=torch.float64), torch.zeros(v.shape, dtype=torch.float64)
    for tile, rows in zip(scores.split(TILE, 1), v.split(TILE), strict=True):
        new = torch.maximum(highest, fp32(tile.amax(1) * c))
        p, factor = exp2(fp32(tile * c - new[:, None])), exp2(fp32(highest - new))
        denominator = fp32(fp32(denominator * factor) + _add_up(p))
        acc = fp32(fp32(acc * factor[:, None]) + product(p.to(dtype), rows.mT))
        highest = new
    out = fp32(acc * fp32(1 / denominator)[:, None]).to(dtype)
    lse2 = fp32(highest + fp32(denominator.log2()))
    p = exp2(fp32(scores * c - lse2[:, None]))
    delta = _add_up(fp32(out.double() * dout.double()))
    ds = fp32(p * fp32(product(dout, v) - delta[:, None])).to(dtype)
    scale = q.shape[1] ** -0.5
    dq = fp32(scale * product(ds, k.mT))
    dk = fp32(scale * _by_tiles(product, ds.mT, q.mT))
    dv = _by_tiles(product, p.to(dtype).mT, dout.mT)
    return [out, fp32(lse2 / LOG2E).float(), *(t.to(dtype) for t in (dq, dk, dv))]


def _by_tiles(product: Product, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A sum over tokens, to which fp32 adds the product of each tile (`add_product`)."""
    if a.dtype in (torch.float16, torch.bfloat16):
        return product(a, b)
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for one, other in zip(a.split(16, dim=1), b.split(16, dim=1), strict=True):
        total = fp32(total + product(one, other))
    return total


class _Exp2:
    def __init__(self, seed: int):
        self.generator = generator(seed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        share = 2 * torch.rand(x.shape, generator=self.generator, dtype=torch.float64) - 1
        y = fp32(x.exp2() * (1 + 2.0**-22 * share))
        return y.masked_fill(y < 2.0**-126, 0.0)
