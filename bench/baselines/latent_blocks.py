"""The latent block on the same weights, in the forms that are compared.

- `original`: the published order. Every text computes keys and values of the latents again.
- `Hoisted`: keys and values are computed once and kept, and there is no padding. A careful user writes this.
- `Absorbed`: `nvembed_fast`'s algebra (see `latent_head`) by library products and softmax alone.

Shape suffixes: B texts, S tokens of the longest one, T tokens without padding, D model width, N heads, H head
width, L latents.
"""

import functools

import torch
import torch.nn.functional as F
from einops import rearrange

from nvembed_fast.kernels import reference
from nvembed_fast.network.latent_head import LatentHead


def original(head: LatentHead, h_BSD: torch.Tensor) -> torch.Tensor:
    """[B, S, D] states behind the block, padding included."""
    heads = functools.partial(rearrange, pattern="b s (n h) -> b n s h", n=head.config.num_cross_heads)
    context_BLD = head.context_norm(head.latents.repeat(len(h_BSD), 1, 1))
    k, v = F.linear(context_BLD, head.to_kv.weight).chunk(2, dim=-1)
    q = F.linear(head.cross_norm(h_BSD), head.to_q.weight)
    out_BNSH = F.scaled_dot_product_attention(heads(q), heads(k), heads(v))
    h1_BSD = F.linear(rearrange(out_BNSH, "b n s h -> b s (n h)"), head.to_out.weight) + h_BSD
    return _feed_forward(head, h1_BSD) + h1_BSD


class Hoisted:
    """[T, D] states behind the block, from [T, D] without padding."""

    def __init__(self, head: LatentHead):
        self.head = head
        with torch.no_grad():
            kv = F.linear(head.context_norm(head.latents), head.to_kv.weight)
        split = "l (two n h) -> two n l h"
        self.k_NLH, self.v_NLH = rearrange(kv, split, two=2, n=head.config.num_cross_heads).contiguous()

    def __call__(self, h_TD: torch.Tensor) -> torch.Tensor:
        head, config = self.head, self.head.config
        q_TE = F.linear(head.cross_norm(h_TD), head.to_q.weight)
        q_NTH = rearrange(q_TE, "t (n h) -> n t h", n=config.num_cross_heads)
        # SDPA has no fast kernel for heads of 4096
        weights_NTL = (q_NTH @ self.k_NLH.mT * config.cross_dim_head**-0.5).softmax(-1)
        out_TE = rearrange(weights_NTL @ self.v_NLH, "n t h -> t (n h)")
        h1_TD = F.linear(out_TE, head.to_out.weight) + h_TD
        return _feed_forward(head, h1_TD) + h1_TD


class Absorbed:
    """As `Hoisted`, with query and output product multiplied out."""

    def __init__(self, head: LatentHead):
        self.head = head
        with torch.no_grad():
            self.a, self.b = head.absorbed()

    def __call__(self, h_TD: torch.Tensor) -> torch.Tensor:
        head = self.head
        x_TD = head.cross_norm(h_TD)
        h1_TD = reference.absorbed_latent_attention(x_TD, self.a, self.b, h_TD, head.config.num_cross_heads)
        return _feed_forward(head, h1_TD) + h1_TD


def _feed_forward(head: LatentHead, h1: torch.Tensor) -> torch.Tensor:
    """The GEGLU feed-forward, token by token."""
    value, gate = F.linear(head.ff_norm(h1), head.ff_up.weight, head.ff_up.bias).chunk(2, dim=-1)
    return F.linear(value * F.gelu(gate), head.ff_down.weight, head.ff_down.bias)
