"""The Mistral / Llama decoder as a bidirectional encoder on packed tokens.

Query, key and value weights are one matrix, gate and up weights another. The
checkpoint's names are restored when saving.

A residual add stands inside the product before it, in place, or inside the norm
behind it:

1. In place is one pass over the stream less, and one rounding less. It is for
   inference alone, and for a stream that nobody else holds: neither the caller,
   nor a hook, nor the embedding's module (`_adds_in_place`).
2. Everywhere else the norm adds, and makes a new stream. A layer then hands on
   two tensors: the result of its last product, and the stream before it.

Shape suffixes: T packed tokens, D model width, N query heads, G key/value
heads, H head width, F feed-forward width, E = N + 2G.
"""

from typing import Any

import torch
from torch import nn

from nvembed_fast import ops
from nvembed_fast.config import BackboneConfig
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.kernels.streams import Kept
from nvembed_fast.network.pooling_heads import runs_as_written
from nvembed_fast.packing import PackedBatch

__all__ = ["MistralBackbone"]


class RMSNorm(nn.Module):
    """The weight of a norm. `ops` computes the norm, alone or with the residual add."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the norm of h, h) of h = x + residual, or of x alone."""
        if residual_TD is None:
            return ops.rms_norm(x_TD, self.weight, self.eps), x_TD
        return ops.add_rms_norm(x_TD, residual_TD, self.weight, self.eps)


def _adds_in_place(
    block: nn.Module, last: str, norm: nn.Module, x_TD: torch.Tensor, stream_TD: torch.Tensor
) -> bool:
    """Whether the last product of `block` may add its result to the stream. `norm` has made x of the stream.

    A hook may hold what it saw, an adapter or a weight of another kind has a sum of its own, and autograd
    and autocast take no product in place. torch.compile chooses its products itself.
    """
    linear = getattr(block, last, None)
    return (
        not torch.compiler.is_compiling()
        and type(linear) is ops.Linear
        and type(linear.weight) is nn.Parameter
        and linear.bias is None
        and (linear.weight.dtype, linear.weight.device) == (stream_TD.dtype, stream_TD.device)
        and type(block) in (SelfAttention, FeedForward)
        and type(norm) is RMSNorm
        and runs_as_written(linear, block, norm)
        and not torch.is_autocast_enabled(stream_TD.device.type)
        and not (
            torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, stream_TD, *block.parameters()))
        )
    )


class RotaryTables:
    """Cosines and sines of `ops.rotary`, [P, H/2] fp32 each.

    A plain class: FSDP2's mixed precision casts a layer's arguments, and looks into tuples and dataclasses.
    """

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor):
        self.cos, self.sin = cos, sin
        self.kept = Kept(cos, sin)


class SelfAttention(nn.Module):
    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.is_causal = config.is_causal
        width, head_width = config.hidden_size, config.head_dim
        self.head_width = head_width
        self.qkv_proj = ops.Linear(width, (self.num_heads + 2 * self.num_kv_heads) * head_width, bias=False)
        self.o_proj = ops.Linear(self.num_heads * head_width, width, bias=False)

    def forward(
        self,
        x_TD: torch.Tensor,
        layout: SeqLayout,
        tables: RotaryTables,
        stream_TD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The result, or the stream with the result added in place."""
        n, g = self.num_heads, self.num_kv_heads
        # by PyTorch's own methods: einops takes as long as a launch
        qkv_TEH = self.qkv_proj(x_TD).view(-1, n + 2 * g, self.head_width)
        # a hook or a module of another kind may hold its result
        is_ours = type(self.qkv_proj) is ops.Linear and runs_as_written(self.qkv_proj)
        inplace = is_ours and not qkv_TEH.requires_grad
        qkv_TEH = ops.rotary(qkv_TEH, tables.cos, tables.sin, layout.positions, n + g, inplace)
        q_TNH, k_TGH, v_TGH = qkv_TEH.split((n, g, g), dim=1)
        out_TNH: Any = ops.flash_attention(q_TNH, k_TGH, v_TGH, layout, causal=self.is_causal)
        out_TD = out_TNH.flatten(1)
        return self.o_proj(out_TD) if stream_TD is None else self.o_proj(out_TD, stream_TD)


class FeedForward(nn.Module):
    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.gate_up_proj = ops.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = ops.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: torch.Tensor, stream_TD: torch.Tensor | None = None) -> torch.Tensor:
        """The result, or the stream with the result added in place."""
        x_TF = ops.swiglu(self.gate_up_proj(x_TD))
        return self.down_proj(x_TF) if stream_TD is None else self.down_proj(x_TF, stream_TD)


class DecoderLayer(nn.Module):
    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self,
        x_TD: torch.Tensor,
        residual_TD: torch.Tensor | None,
        layout: SeqLayout,
        tables: RotaryTables,
        hands_on_sums: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(result of the last product, the residual stream before it), from the same two of the layer before.

        Everything goes through here, so that checkpointing and sharding can take a layer as their unit.

        Args:
            hands_on_sums: the caller owns an x that comes without a residual, and takes (the stream, None).
                Otherwise no tensor of the caller is written to, and both are returned.
        """
        owns_stream = hands_on_sums or residual_TD is not None
        attn, mlp = self.self_attn, self.mlp
        x_TD, stream_TD = self.input_layernorm(x_TD, residual_TD)
        if owns_stream and _adds_in_place(attn, "o_proj", self.input_layernorm, x_TD, stream_TD):
            x_TD, stream_TD = self.post_attention_layernorm(attn(x_TD, layout, tables, stream_TD))
        else:
            x_TD, stream_TD = self.post_attention_layernorm(attn(x_TD, layout, tables), stream_TD)
        norm = self.post_attention_layernorm
        if hands_on_sums and _adds_in_place(mlp, "down_proj", norm, x_TD, stream_TD):
            return mlp(x_TD, stream_TD), None
        return mlp(x_TD), stream_TD


class Embedding(nn.Embedding):
    """`torch.nn.Embedding` that draws no values on "meta": that would import torch._dynamo, for seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class MistralBackbone(nn.Module):
    """Packed token ids to final hidden states."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._rotary_tables: RotaryTables | None = None

    def forward(self, batch: PackedBatch, hidden_states: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Run the backbone.

        Args:
            batch: the packed batch.
            hidden_states: a list to fill with the [T, D] input of every layer and the result.

        Returns:
            [T, D] hidden states behind the final norm, in the dtype of the weights.
        """
        layout = batch.layout
        tables = self.rotary_tables(layout.max_length)
        x_TD, residual_TD = self.embed_tokens(batch.input_ids), None
        for index, layer in enumerate(self.layers):
            if hidden_states is not None:
                # cloned, because the stream is summed in place
                hidden_states.append(x_TD.clone() if residual_TD is None else x_TD + residual_TD)
            # the first one gets the result of the embedding, and a hook may hold what a layer gives or takes
            if index > 0 and type(layer) is DecoderLayer and runs_as_written(layer):
                x_TD, residual_TD = layer(x_TD, residual_TD, layout, tables, hands_on_sums=True)
            else:
                x_TD, residual_TD = layer(x_TD, residual_TD, layout, tables)
        x_TD, _ = self.norm(x_TD, residual_TD)
        if hidden_states is not None:
            hidden_states.append(x_TD)
        return x_TD

    def rotary_tables(self, num_positions: int) -> RotaryTables:
        """Tables of P >= num_positions positions, on the device of the weights."""
        device = self.embed_tokens.weight.device
        tables = self._rotary_tables
        if tables is None or len(tables.cos) < num_positions or tables.cos.device != device:
            # doubled, so that slowly growing batches do not rebuild them each time
            count = max(512, 2 * num_positions)
            # tensors built under inference_mode could not be used outside it
            with torch.inference_mode(False):
                exponent = torch.arange(0, self.config.head_dim, 2, device=device).float()
                frequency = 1.0 / self.config.rope_theta ** (exponent / self.config.head_dim)
                angle = torch.arange(count, device=device).float()[:, None] * frequency
                tables = self._rotary_tables = RotaryTables(angle.cos(), angle.sin())
        tables.kept.here()
        return tables
