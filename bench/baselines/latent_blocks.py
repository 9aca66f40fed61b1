"""The latent block on the same weights, in the forms that are compared.

- `original`: the published order. Every text computes keys and values of the latents again.
- `Hoisted`: keys and values are computed once and kept, and there is no padding. A careful user writes this.
- `Absorbed`: identities 1 and 2 of `latent_head` by library products and softmax alone.
- `Commuted`: 3 as well, so all of `nvembed_fast`'s algebra on PyTorch alone. It pools, so it gives vectors.

Shape suffixes: B texts, S tokens of the longest one, T tokens without padding, D model width, N heads, H head
width, L latents, F = 4 D.
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
        # FlashAttention has no kernel for heads of 4096
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
        h1_TD = self.attention(h_TD)
        return _feed_forward(self.head, h1_TD) + h1_TD

    def attention(self, h_TD: torch.Tensor) -> torch.Tensor:
        x_TD, heads = self.head.cross_norm(h_TD), self.head.config.num_cross_heads
        return reference.absorbed_latent_attention(x_TD, self.a, self.b, h_TD, heads)


class Commuted(Absorbed):
    """[B, D] fp32 means of texts of one length, with the down product behind the mean: once per text."""

    def __init__(self, head: LatentHead, num_texts: int):
        super().__init__(head)
        self.num_texts = num_texts

    def __call__(self, h_TD: torch.Tensor) -> torch.Tensor:
        head, h1_TD = self.head, self.attention(h_TD)
        pooled_BF = mean(_gated(head, h1_TD), self.num_texts).to(h1_TD.dtype)
        return F.linear(pooled_BF, head.ff_down.weight, head.ff_down.bias) + mean(h1_TD, self.num_texts)


def mean(states: torch.Tensor, num_texts: int) -> torch.Tensor:
    """[B, .] fp32 of [T, .]: the texts have one length."""
    return states.unflatten(0, (num_texts, -1)).mean(1, dtype=torch.float32)


def _feed_forward(head: LatentHead, h1: torch.Tensor) -> torch.Tensor:
    """The GEGLU feed-forward, token by token."""
    return F.linear(_gated(head, h1), head.ff_down.weight, head.ff_down.bias)


def _gated(head: LatentHead, h1: torch.Tensor) -> torch.Tensor:
    """Its first product and the GEGLU."""
    value, gate = F.linear(head.ff_norm(h1), head.ff_up.weight, head.ff_up.bias).chunk(2, dim=-1)
    return value * F.gelu(gate)
