"""The limits of this machine, measured in the same run as the figures that are compared with them.

The matrix rate is that of one large cuBLAS product in the dtype, and the copy rate that of one large copy.
Both are sustained, after a warm-up, because a GPU that is kept busy lowers its clock. The products of the
encoder itself follow, at the number of tokens of one batch. An encoder that leaves its products to cuBLAS
cannot be faster than their sum.

Without a GPU the same is measured on the CPU, at the sizes of a small decoder.
"""

import functools
import itertools
from dataclasses import dataclass

import torch

from bench.measure.results import SKIPPED, Figure
from bench.measure.timing import L2_BYTES, sustained
from nvembed_fast.stream import BATCH_TOKENS

SUITE, IMPL = "limits", "torch"
# (rows, columns) of the weights of one layer: of NV-Embed, and of the small decoder of a CPU
LAYER_PRODUCTS = {
    "cuda": {
        "qkv": (6144, 4096),
        "output": (4096, 4096),
        "gate and up": (28672, 4096),
        "down": (4096, 14336),
    },
    "cpu": {
        "qkv": (960, 576),
        "output": (576, 576),
        "gate and up": (3072, 576),
        "down": (576, 1536),
    },
}
FEW_TOKENS = 1024


@dataclass(frozen=True)
class Limits:
    """Rates of one machine, each measured when it is first asked for.

    Attributes:
        device: "cuda" or "cpu".
        seconds: for each, half of them to warm up.
    """

    device: str
    seconds: float = 1.0

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """TFLOP/s of a large product."""
        return _matrix_rate(self, dtype)

    def copy_rate(self) -> float:
        """GB/s of a large copy, bytes read and bytes written together."""
        return _copy_rate(self)

    def product_ms(self, tokens: int, weight: tuple[int, ...], dtype: torch.dtype) -> float:
        """Milliseconds of [tokens, columns] times the transpose of a [rows, columns] weight."""
        return _product_ms(self, tokens, weight, dtype)

    def figures(self, dtypes: tuple[torch.dtype, ...]) -> list[Figure]:
        """All of it as figures of the suite "limits"."""
        out = [Figure(SUITE, "copy", IMPL, "rate", self.copy_rate(), "GB/s")]
        tokens = BATCH_TOKENS[self.device]
        for dtype in dtypes:
            name, limit = _name(dtype), self.matrix_rate(dtype)
            out.append(Figure(SUITE, f"product {name}", IMPL, "rate", limit, "TFLOP/s"))
            for product, weight in LAYER_PRODUCTS[self.device].items():
                ms = self.product_ms(tokens, weight, dtype)
                rate = 2e-9 * tokens * weight[0] * weight[1] / ms
                case = f"{product} {tokens} tokens {name}"
                out.append(Figure(SUITE, case, IMPL, "time_p50", ms, "ms"))
                out.append(Figure(SUITE, case, IMPL, "rate", rate, "TFLOP/s", rate / limit))
        if self.device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
            out.append(self._fp8_figure())
        return out

    def _fp8_figure(self) -> Figure:
        case = "product float8_e4m3fn"
        try:
            return Figure(SUITE, case, IMPL, "rate", _fp8_rate(self), "TFLOP/s")
        except RuntimeError as error:
            return Figure(SUITE, case, IMPL, SKIPPED, None, f"cannot run: {str(error).splitlines()[0][:120]}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _random(*shape: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    # zeros would be multiplied faster: they draw less power
    return torch.randn(shape, device=device).to(dtype)


@functools.cache
def _matrix_rate(limits: Limits, dtype: torch.dtype) -> float:
    size = 1024 if limits.device == "cpu" else 8192
    return 2e-9 * size**3 / _product_ms(limits, size, (size, size), dtype)


@functools.cache
def _product_ms(limits: Limits, tokens: int, weight: tuple[int, ...], dtype: torch.dtype) -> float:
    x = _random(tokens, weight[1], device=limits.device, dtype=dtype)
    w = _random(*weight, device=limits.device, dtype=dtype)
    # of few tokens the weight is most of the traffic: as in a model, it is not in the cache
    few = limits.device == "cuda" and tokens < FEW_TOKENS
    weights = itertools.cycle([w, *(w.clone() for _ in range(4 * L2_BYTES // w.nbytes if few else 0))])
    out = x.new_empty(tokens, weight[0])
    return sustained(lambda: torch.mm(x, next(weights).mT, out=out), limits.seconds)


@functools.cache
def _copy_rate(limits: Limits) -> float:
    source = torch.empty((2**26 if limits.device == "cpu" else 2**31), dtype=torch.int8, device=limits.device)
    source.random_()
    target = torch.empty_like(source)
    return 2e-6 * source.nbytes / sustained(lambda: target.copy_(source), limits.seconds)


@functools.cache
def _fp8_rate(limits: Limits) -> float:
    size, fp8 = 8192, torch.float8_e4m3fn
    x, w = (_random(size, size, device=limits.device, dtype=fp8) for _ in range(2))
    one = torch.ones((), device=limits.device)
    product = functools.partial(
        torch._scaled_mm, x, w.mT, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return 2e-9 * size**3 / sustained(product, limits.seconds)
