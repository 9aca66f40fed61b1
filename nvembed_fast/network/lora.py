"""LoRA on our packed products: y = W x + s B (A x), with W frozen (arXiv 2106.09685).

A product that packs several published ones has an adapter for each of them, as a model
that does not pack has. They are computed as two products:

1. A is stacked: the rows of A_q, then those of A_k, then those of A_v.
2. B is packed like W. Block by block it takes its own part of A x, so a matrix of blocks with zeros between
   them is multiplied. That is more operations than needed, and few beside those of W x.

Dropout acts on the input, once for all adapters of a packed product. PEFT draws for each of them. So the two
are equal in evaluation, and in training without dropout.

Matrices of adapters are kept in fp32 beside a W in 16 bits, and multiplied in the dtype of
the input. Gradients and optimizer see fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from nvembed_fast import ops
from nvembed_fast.network.pooling_heads import runs_as_written

__all__ = ["AdaptedLinear", "Adapter", "HeadTraining", "takes_adapter", "whole_weight"]

HeadTraining = Literal["full", "lora", "frozen"]


@dataclass(frozen=True)
class Adapter:
    """What was added to a model.

    Attributes:
        rank: of A and B.
        alpha: B A counts alpha / rank times.
        dropout: share of the inputs that A does not see in training. The head's adapters have none, because
            its weights may be multiplied out.
        head: "full": all weights of the pooling head are trained. "lora": its products have adapters.
            "frozen": neither.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.1
    head: HeadTraining = "full"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class AdaptedLinear(nn.Linear):
    """A product with adapters on it. `weight` and `bias` keep their names.

    Attributes:
        lora_A: [P R, D] of P adapters of rank R, stacked.
        lora_B: [E, R], the rows of each adapter where those of W are.
    """

    def __init__(self, base: nn.Linear, rows: Sequence[int], rank: int, scale: float, dropout: float):
        """
        Args:
            base: the product, whose weight is taken over.
            rows: per adapter, the rows of W that it stands on. They sum up to E.
            rank: R.
            scale: s.
            dropout: from 0 up to, but not, 1.
        """
        nn.Module.__init__(self)
        assert sum(rows) == base.out_features
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rows, self.rank, self.scale, self.dropout = tuple(rows), rank, scale, dropout
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(base.weight.new_zeros(len(rows) * rank, self.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(base.weight.new_zeros(self.out_features, rank, dtype=dtype))
        self.train(base.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, E] of x [T, D], in the dtype of x."""
        product = ops.linear(x, self.weight, self.bias)
        seen = F.dropout(x, self.dropout) if self.training and self.dropout else x
        low_rank = ops.linear(seen, self.lora_A.to(x.dtype))
        return ops.add_linear(product, low_rank, self._blocks().to(x.dtype))

    def whole_weight(self) -> torch.Tensor:
        """[E, D]: W + s B A, in the dtype of the adapters."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.addmm(self.weight.to(self.lora_A.dtype), self._blocks(), self.lora_A)

    def merged(self) -> ops.Linear:
        """A plain product of `whole_weight`, rounded once. It takes over `weight`, which is overwritten."""
        with torch.no_grad():
            self.weight.copy_(self.whole_weight())
        plain = ops.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        return plain.train(self.training)

    def _blocks(self) -> torch.Tensor:
        """[E, P R]: s B, with zeros where a row of W does not belong to an adapter of A."""
        b = self.lora_B * self.scale
        return b if len(self.rows) == 1 else torch.block_diag(*b.split(self.rows))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}, rows={self.rows}"


def takes_adapter(module: nn.Module) -> bool:
    """Whether a module is one of our products, with no hook that would be lost."""
    return type(module) is ops.Linear and runs_as_written(module)


def whole_weight(linear: nn.Linear) -> torch.Tensor:
    """[E, D]: what a product multiplies by."""
    return linear.whole_weight() if isinstance(linear, AdaptedLinear) else linear.weight
