"""The baselines of the kernels: PyTorch, its compiler, and the libraries with the same operations.

Preparation that a model does once (a mask, a padded layout, cosines in the layout of a library) is done
beforehand. No baseline is timed for work that its own model would not do.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from bench.measure.comparison import Implementation
from nvembed_fast.kernels import library
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.packing import pad_rows

NEEDS_GPU = "needs a GPU"
SCORE_ROWS = 32  # of a chunk: sentence-transformers' default
# [T, N, H] to [1, N, T, H] and back
ONE_BATCH: dict[str, Any] = {
    "arrange": lambda *tensors: tuple(t.transpose(0, 1)[None].contiguous() for t in tensors),
    "restore": lambda out: out[0].transpose(0, 1),
}


class Baselines:
    """The baselines of every kernel.

    Args:
        device: "cuda" or "cpu".
        compiles: whether torch.compile takes part. On a CPU it takes longer than all the rest.
    """

    def __init__(self, device: str, compiles: bool):
        self.device = device
        self._why_not = "" if compiles else "not asked for on a CPU: --compile"
        self._gpu = "" if device == "cuda" else NEEDS_GPU

    def plain(self, reference: Callable, by_library: Callable | None = None) -> list[Implementation]:
        """The reference in plain PyTorch, as it is and compiled. On a CPU ours is the reference.

        Args:
            by_library: the same by `kernels/library.py`, where that is another function.
        """
        as_it_is = [Implementation("torch", reference)] if self.device == "cuda" else []
        if by_library is not None:
            as_it_is.append(Implementation("library", by_library))
        return [*as_it_is, self.compiled("torch.compile", reference)]

    def compiled(self, name: str, fn: Callable) -> Implementation:
        return Implementation(name, torch.compile(fn, dynamic=False), obstacle=self._why_not)

    def _library(
        self, name: str, module: str, package: str, make: Callable[[], Callable], **layout
    ) -> Implementation:
        """A baseline from a package that may be missing here, or not work here. `make` imports it."""
        missing = "" if importlib.util.find_spec(module) else f"pip install {package}"
        # at the first call, where an error is a baseline's own
        made = functools.cache(make)
        return Implementation(
            name, lambda *tensors: made()(*tensors), obstacle=self._gpu or missing, **layout
        )

    def attention(
        self, reference: Callable, layout: SeqLayout, q_heads: int, kv_heads: int
    ) -> list[Implementation]:
        """Baselines of packed bidirectional attention on q [T, N, H], k and v [T, G, H]."""
        group = q_heads // kv_heads
        padded = PaddedLayout(layout)

        def flash_lengths() -> tuple:
            return layout.cu_seqlens, layout.cu_seqlens, layout.max_length, layout.max_length

        def varlen():
            from torch.nn.attention.varlen import varlen_attn

            # torch 2.11 has no such flag
            has_flag = "enable_gqa" in inspect.signature(varlen_attn).parameters
            flags = {"enable_gqa": group > 1} if has_flag else {}
            return lambda q, k, v: varlen_attn(q, k, v, *flash_lengths(), **flags)

        def flash_attn_2():
            from flash_attn import flash_attn_varlen_func

            return lambda q, k, v: flash_attn_varlen_func(q, k, v, *flash_lengths())

        def flash_attn_3():
            from flash_attn_interface import flash_attn_varlen_func

            def attend(q, k, v):
                out = flash_attn_varlen_func(q, k, v, *flash_lengths())
                return out[0] if isinstance(out, tuple) else out

            return attend

        # without a mask padding would be attended to, so only batches of equal lengths need none
        ragged = not padded.is_full
        no_mask = self._gpu or ("takes no padding mask" if ragged else "")
        places: dict[str, Any] = {"arrange": padded.arrange, "restore": padded.restore}
        baselines = self.plain(reference, functools.partial(library.flash_attention, layout=layout))
        for name, backend, masked, obstacle in (
            ("SDPA flash", SDPBackend.FLASH_ATTENTION, False, no_mask),
            ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION, ragged, self._gpu),
            ("SDPA efficient, 4-D mask", SDPBackend.EFFICIENT_ATTENTION, True, self._gpu),
        ):
            for grouped in (True, False) if group > 1 else (False,):
                shown = f"{name}, K and V repeated" if group > 1 and not grouped else name
                copies = 1 if grouped else group
                fn = _sdpa(backend, copies, grouped, padded.bias if masked else None)
                baselines.append(Implementation(shown, fn, obstacle=obstacle, **places))
        baselines.append(self._library("varlen_attn", "torch", "torch", varlen))
        baselines.append(self._flex(layout, group))
        baselines.append(self._library("flash-attn 2", "flash_attn", "flash-attn", flash_attn_2))
        baselines.append(self._library("flash-attn 3", "flash_attn_interface", "flash-attn-3", flash_attn_3))
        return baselines

    def _flex(self, layout: SeqLayout, group: int) -> Implementation:
        """FlexAttention on the pack: one batch, and a mask of documents."""
        if self._why_not:
            return Implementation("FlexAttention", None, obstacle=self._why_not)
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        document = _seq_of_token(layout)

        def same_document(b, h, i, j):
            return document[i] == document[j]

        tokens = layout.num_tokens
        flex = torch.compile(flex_attention, dynamic=False)

        @functools.cache
        def mask():
            make = torch.compile(create_block_mask)
            return make(same_document, None, None, tokens, tokens, device=self.device)

        return Implementation(
            "FlexAttention",
            lambda q, k, v: flex(q, k, v, block_mask=mask(), enable_gqa=group > 1),
            **ONE_BATCH,
        )

    def scores(self, reference: Callable, scale: float) -> list[Implementation]:
        """Baselines of the cross entropy of row i of q [B, D] with column i among d [M, D], [B]."""

        def targets(q: torch.Tensor) -> torch.Tensor:
            return torch.arange(len(q), device=q.device)

        def whole(q, d):
            return F.cross_entropy(scale * q @ d.mT, targets(q), reduction="none")

        def by_chunks(q, d):
            """Chunks of rows, whose scores the backward makes again."""

            def of_rows(q, d, rows):
                return F.cross_entropy(scale * q @ d.mT, rows, reduction="none")

            parts = zip(q.split(SCORE_ROWS), targets(q).split(SCORE_ROWS), strict=True)
            return torch.cat([checkpoint(of_rows, q, d, rows, use_reentrant=False) for q, rows in parts])

        def linear_cross_entropy(q, d):
            options = torch.nn.LinearCrossEntropyOptions()
            return F.linear_cross_entropy(scale * q, d, targets(q), reduction="none", options=options)

        missing = "" if hasattr(F, "linear_cross_entropy") else "needs torch 2.13"
        return [
            *self.plain(reference),
            Implementation("whole scores", whole),
            Implementation("chunks of rows", by_chunks),
            Implementation("F.linear_cross_entropy", linear_cross_entropy, obstacle=missing),
        ]

    def latent_attention(self, reference: Callable) -> list[Implementation]:
        """Baselines of the direct form on q [T, N, H], k and v [L, N, H]."""
        backends = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
        return self.plain(reference) + [
            Implementation(name, _sdpa(backend), obstacle=self._gpu, **ONE_BATCH)
            for name, backend in backends.items()
        ]

    def rms_norm(self, reference: Callable, eps: float, residual: bool) -> list[Implementation]:
        def functional(x, weight):
            return F.rms_norm(x, weight.shape, weight, eps)

        def add_functional(x, other, weight):
            h = x + other
            return functional(h, weight), h

        by_library = library.add_rms_norm if residual else library.rms_norm

        def liger():
            from liger_kernel.transformers import functional as liger

            if residual:
                return lambda x, other, weight: liger.liger_fused_add_rms_norm(
                    x, other, weight, eps, in_place=False
                )
            return lambda x, weight: liger.liger_rms_norm(x, weight, eps, in_place=False)

        return [
            *self.plain(reference, functools.partial(by_library, eps=eps)),
            Implementation("F.rms_norm", add_functional if residual else functional),
            self._library("liger-kernel", "liger_kernel", "liger-kernel", liger),
        ]

    def swiglu(self, reference: Callable) -> list[Implementation]:
        def liger():
            from liger_kernel.transformers.functional import liger_swiglu

            return liger_swiglu

        # its model has two products, so two tensors
        apart = {"arrange": lambda x: tuple(t.contiguous() for t in x.chunk(2, dim=-1))}
        return self.plain(reference) + [
            self._library("liger-kernel", "liger_kernel", "liger-kernel", liger, **apart)
        ]

    def rotary(
        self,
        reference: Callable,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        q_heads: int,
        kv_heads: int,
        inplace: bool = False,
    ) -> list[Implementation]:
        def by_library(x):
            return library.rotary(x, cos, sin, positions, q_heads + kv_heads, inplace)

        def liger():
            from liger_kernel.transformers.functional import liger_rope

            turns = [torch.cat([t[positions.long()]] * 2, dim=-1)[None] for t in (cos, sin)]

            def turn(q, k, v):
                return (*liger_rope(q, k, *turns), v)

            return turn

        places = {
            # it turns its inputs in place: a copy
            "arrange": lambda x: tuple(
                t.transpose(0, 1)[None].clone() for t in x.split((q_heads, kv_heads, kv_heads), dim=1)
            ),
            "restore": lambda out: torch.cat([t[0].transpose(0, 1) for t in out], dim=1),
        }
        return self.plain(reference, by_library) + [
            self._library("liger-kernel, in place", "liger_kernel", "liger-kernel", liger, **places)
        ]


def _sdpa(
    backend: SDPBackend, copies: int = 1, grouped: bool = False, bias: Callable | None = None
) -> Callable:
    """SDPA by one backend.

    Args:
        copies: of every key and value head, as models without grouped attention make them.
        grouped: let the backend share key and value heads.
        bias: from a dtype to the additive mask.
    """

    def attend(q, k, v):
        if copies > 1:
            k, v = (t.repeat_interleave(copies, dim=1) for t in (k, v))
        mask = bias(q.dtype) if bias else None
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)

    return attend


def _seq_of_token(layout: SeqLayout) -> torch.Tensor:
    """[T] int64."""
    return torch.arange(len(layout), device=layout.device).repeat_interleave(layout.cu_seqlens.diff())


class PaddedLayout:
    """From packed tokens to the padded batch that models without packing compute on, and back."""

    def __init__(self, layout: SeqLayout):
        self.is_full = layout.num_tokens == len(layout) * layout.max_length
        # a mask's rows have to be aligned for the fast kernels
        longest = layout.max_length if self.is_full else -(-layout.max_length // 16) * 16
        self.shape = len(layout), longest
        self.places = _seq_of_token(layout) * longest + layout.positions
        self._bias: dict[torch.dtype, torch.Tensor] = {}

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """[B, 1, S, S] additive mask, 0 where a token may be seen. Made once."""
        if dtype not in self._bias:
            batch, longest = self.shape
            bias = torch.full((batch * longest,), torch.finfo(dtype).min, dtype=dtype)
            bias = bias.to(self.places.device).index_fill(0, self.places, 0)
            rows = bias.view(batch, 1, 1, longest).expand(batch, 1, longest, longest)
            self._bias[dtype] = rows.contiguous()
        return self._bias[dtype]

    def arrange(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[T, N, H] each to [B, N, S, H] each."""
        return tuple(
            pad_rows(t.flatten(1), self.places, self.shape).unflatten(2, t.shape[1:]).transpose(1, 2)
            for t in tensors
        )

    def restore(self, out: torch.Tensor) -> torch.Tensor:
        """[B, N, S, H] to [T, N, H]."""
        return out.transpose(1, 2).flatten(0, 1)[self.places]
