"""From hidden states of packed tokens to one vector per text: the interface, and the simpler heads.

`LatentHead` has a file of its own. The EOS, mean and self-attention heads are
its baselines in arXiv 2405.17428, table 1. The paper gives no equations for the
self-attention head. Here it is the latent head with self-attention in place of
the latents, so that the two differ in that alone. Its shape is the backbone's:
a layer's own number of heads and head width, without rotation.

Shape suffixes: B texts, T packed tokens, D model width, N heads, H head width, F = 4 D.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.modules import module as torch_module

from nvembed_fast import ops
from nvembed_fast.config import BackboneConfig
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.kernels.modes import is_transformed

__all__ = ["AttentionHead", "EOSHead", "MeanHead", "PoolingHead", "SelfAttentionHead", "runs_as_written"]

_FEED_FORWARD_RATIO = 4


def runs_as_written(*modules: nn.Module) -> bool:
    """Whether a call of each module runs the forward of its class and nothing around it.

    Only then may a caller write into what the module gives or takes, or keep what it built from its weights.
    """
    everywhere = (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or is_transformed()
    )
    if everywhere:
        return False
    # a plain loop, because a query looks at hundreds
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return False
    return True


class PoolingHead(nn.Module):
    """The interface of every head: `pool`, then the normalisation."""

    def __init__(self, output_normalize: bool):
        super().__init__()
        self.output_normalize = output_normalize

    def forward(
        self, h_TD: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings of packed texts.

        Args:
            h_TD: [T, D] hidden states of the backbone.
            layout: where the texts lie.
            pool_mask: [T] bool. False skips a token. None pools all.

        Returns:
            [B, D] fp32 (float64 for float64), of unit norm when the config says so.
        """
        pooled_BD = self.pool(h_TD, layout, pool_mask)
        return F.normalize(pooled_BD, dim=-1) if self.output_normalize else pooled_BD

    def built_once(self) -> AbstractContextManager:
        """Around a training step. Only `LatentHead` has tensors to build once for the step."""
        return nullcontext()

    def cached(self) -> dict:
        """The tensors that the head has built from its weights, for a caller that must keep them alive."""
        return {}

    def stale(self) -> dict[str, torch.Tensor]:
        """For each set of tensors that the head has built: [] bool on the device, whether the weights that it
        was built from have other content. Nothing waits for the device."""
        return {}

    def forget(self, name: str) -> None:
        """Drop a set of built tensors."""

    def pool(self, h_TD: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None) -> torch.Tensor:
        """[B, D] fp32 (float64 for float64) vectors, not yet normalised."""
        raise NotImplementedError

    def token_states(self, h_TD: torch.Tensor, layout: SeqLayout) -> torch.Tensor:
        """[T, D] states of every token behind the head: no pooling, for callers that pool themselves."""
        return h_TD


class MeanHead(PoolingHead):
    """The mean of the tokens that the mask keeps."""

    def pool(self, h_TD: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None) -> torch.Tensor:
        return ops.mean_pool(h_TD, layout, pool_mask)


class EOSHead(PoolingHead):
    """The last token of every text, whatever the mask says. A text without tokens gives zeros."""

    def pool(self, h_TD: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None) -> torch.Tensor:
        starts, stops = layout.cu_seqlens[:-1], layout.cu_seqlens[1:]
        wide = torch.promote_types(h_TD.dtype, torch.float32)
        if layout.num_tokens == 0:
            return h_TD.new_zeros(len(layout), h_TD.shape[1], dtype=wide)
        last_BD = h_TD.index_select(0, (stops - 1).clamp_min(0)).to(wide)
        return torch.where((stops > starts)[:, None], last_BD, 0.0)


class AttentionHead(PoolingHead):
    """An attention, a GEGLU feed-forward and the mean.

    The mean is linear, so the feed-forward's second product acts on the pooled vector: once per text.
    """

    def __init__(self, width: int, output_normalize: bool):
        super().__init__(output_normalize)
        self.cross_norm = nn.LayerNorm(width)
        self.ff_norm = nn.LayerNorm(width)
        self.ff_up = ops.Linear(width, 2 * _FEED_FORWARD_RATIO * width)
        self.ff_down = ops.Linear(_FEED_FORWARD_RATIO * width, width)

    def attention(self, h_TD: torch.Tensor, layout: SeqLayout) -> torch.Tensor:
        """[T, D]: the residual stream behind the attention."""
        raise NotImplementedError

    def pool(self, h_TD: torch.Tensor, layout: SeqLayout, pool_mask: torch.Tensor | None) -> torch.Tensor:
        h1_TD = self.attention(self._in_own_dtype(h_TD), layout)
        pooled_BF = ops.mean_pool_geglu(self.ff_up(self.ff_norm(h1_TD)), layout, pool_mask)
        pooled_BD = self.ff_down(pooled_BF.to(h1_TD.dtype)).to(pooled_BF.dtype)
        return pooled_BD + ops.mean_pool(h1_TD, layout, pool_mask)

    def token_states(self, h_TD: torch.Tensor, layout: SeqLayout) -> torch.Tensor:
        h1_TD = self.attention(self._in_own_dtype(h_TD), layout)
        return self.ff_down(ops.geglu(self.ff_up(self.ff_norm(h1_TD)))) + h1_TD

    def _in_own_dtype(self, h_TD: torch.Tensor) -> torch.Tensor:
        """A head in training may be fp32 behind a backbone in 16 bits. Autocast chooses its dtypes itself."""
        if torch.is_autocast_enabled(h_TD.device.type):
            return h_TD
        return h_TD.to(self.cross_norm.weight.dtype)


class SelfAttentionHead(AttentionHead):
    """Every token attends to all tokens of its text."""

    def __init__(self, config: BackboneConfig, output_normalize: bool):
        width = config.hidden_size
        super().__init__(width, output_normalize)
        self.num_heads = config.num_attention_heads
        self.to_qkv = ops.Linear(width, 3 * self.num_heads * config.head_dim, bias=False)
        self.to_out = ops.Linear(self.num_heads * config.head_dim, width, bias=False)

    def attention(self, h_TD: torch.Tensor, layout: SeqLayout) -> torch.Tensor:
        qkv_T3NH = rearrange(
            self.to_qkv(self.cross_norm(h_TD)), "t (e n h) -> t e n h", e=3, n=self.num_heads
        )
        q_TNH, k_TNH, v_TNH = qkv_T3NH.unbind(1)
        out_TNH = ops.flash_attention(q_TNH, k_TNH, v_TNH, layout)
        return self.to_out(rearrange(out_TNH, "t n h -> t (n h)")) + h_TD
