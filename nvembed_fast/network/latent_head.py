"""The latent attention head of the published models. Interface: `pooling_heads.PoolingHead`.

The original computes, per token h with c = LN(latents):

    h1 = h + softmax(LN(h) Wq^T (c Wk^T)^T / sqrt(H)) (c Wv^T) Wout^T      8 heads
    h2 = h1 + (u * gelu(g)) W2^T + b2,  (u, g) = LN(h1) W0^T + b0
    e  = normalize(mean(h2))

It recomputes c Wk^T and c Wv^T for every text. Three identities save that work:

1. Hoist: keys and values of the latents depend on weights only, so they are built once and kept.
2. Absorb: A = (c Wk^T) Wq / sqrt(H) and B = (c Wv^T) Wout^T per head are constants too, so the query and the
   output product vanish: h1 = h + softmax(LN(h) A^T) B. Cheaper when L * D < H * (D + L).
3. Commute: the mean is linear, so W2 acts on the pooled vector, once per text instead of once per token.

`latents="direct"` skips 2 and keeps the strict order of the original up to there.
3 belongs to the feed-forward, so it stands in `pooling_heads.AttentionHead`.

The matrices of 1 and 2 are cached for frozen weights (`requires_grad_(False)`).
The cache never enters a state dict. It is dropped when a weight moves or its
version changes. A write through `.data` or `.numpy()`, such as the merge of an
adapter, leaves the version alone: `stale` finds it. Weights in training have
no cache: each forward builds its own matrices, with their graph, or all forwards
of a step share one set inside `built_once`. There is no cache under
torch.compile either, which cannot see whether a weight has changed.

Our own adapters (`network/lora.py`) are weights like others: they are multiplied
out, kept and looked after like the rest. Any other adapter, a hook or a parametrization in the place of a
projection has no weight that could be multiplied out. With one of them the head
takes the direct form, and what it stands in for is called in every forward.

Shape suffixes: B texts, T packed tokens, D model width, L latents, N heads, H head width, F = 4 D.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from nvembed_fast import ops
from nvembed_fast.config import LatentConfig, LatentForm, Latents, check_latents
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.kernels.streams import Kept
from nvembed_fast.network.lora import AdaptedLinear, whole_weight
from nvembed_fast.network.pooling_heads import AttentionHead, runs_as_written

__all__ = ["LatentHead"]

_WHOLE = 4096  # elements of a weight that is sampled as a whole
_CHUNKS, _CHUNK = 127, 32  # of a larger one. A prime number, and a cache line of 16-bit elements
# modules whose weights say all that they do
_PLAIN = (nn.LayerNorm, nn.Linear, ops.Linear, AdaptedLinear)


class _Built(NamedTuple):
    """What was built from weights: their state then, they themselves, their sample, and the tensors."""

    state: tuple
    weights: list[torch.Tensor]
    sample: torch.Tensor
    kept: Kept


class LatentHead(AttentionHead):
    """Latent cross-attention, feed-forward, masked mean and normalisation."""

    def __init__(self, config: LatentConfig):
        super().__init__(config.hidden_dim, config.output_normalize)
        self.config = config
        width, inner = config.hidden_dim, config.num_cross_heads * config.cross_dim_head
        self.latents = nn.Parameter(torch.randn(config.num_latents_value, config.latent_dim))
        self.context_norm = nn.LayerNorm(config.latent_dim)
        self.to_q = ops.Linear(width, inner, bias=False)
        self.to_kv = ops.Linear(config.latent_dim, 2 * inner, bias=False)
        self.to_out = ops.Linear(inner, width, bias=False)
        self.mode: Latents = "auto"
        self._cache: dict[str, _Built] = {}  # by the form
        self._shared: list[tuple[torch.Tensor, torch.dtype]] | None = None  # in fp32, and the dtype of use

    @contextmanager
    def built_once(self) -> Iterator[None]:
        """Around one training step: build the tensors that depend on weights only once for all its passes.

        Each backward inside leaves its share with the built tensors, in fp32. The end of the block carries
        the sum on to the weights, so a step may be cut into as many backwards as memory asks for. Clipping
        and the optimizer need all gradients, so they come after the block. Under DDP all backwards but the
        last run inside `no_sync()`.

        Raises:
            ValueError: the weights are sharded (FSDP2), at the start or the end, so that only a forward has
                them whole, or blocks are nested.
        """
        if self._shared is not None:
            raise ValueError("built_once inside built_once: one block goes around the whole step")
        self._check_whole()
        with torch.enable_grad():
            built = self._build()
        # in 16 bits a sum of many shares would lose the small ones
        leaves = [t.detach().to(_wide(t)).requires_grad_(t.requires_grad) for t in built]
        self._shared = [(leaf, t.dtype) for leaf, t in zip(leaves, built, strict=True)]
        try:
            yield
        finally:
            self._shared = None
        reached = [
            (t, leaf.grad.to(t.dtype)) for t, leaf in zip(built, leaves, strict=True) if leaf.grad is not None
        ]
        if reached:
            self._check_whole()  # a forward before the block may have left them whole until a backward
            tensors, grads = zip(*reached, strict=True)
            with torch.autocast(self.latents.device.type, enabled=False):
                torch.autograd.backward(tensors, grads)

    def _check_whole(self) -> None:
        if any(hasattr(weight, "device_mesh") for weight in self.parameters()):
            raise ValueError(
                "built_once needs whole weights, and those of this head are sharded. Without it "
                "every forward builds its own, or keep the head's weights out of fully_shard (ignored_params)"
            )

    def attention(self, h_TD: torch.Tensor, layout: SeqLayout) -> torch.Tensor:
        x_TD = self.cross_norm(h_TD)
        heads = self.config.num_cross_heads
        if self.form() == "absorbed":
            a, b = self._constant()
            return ops.absorbed_latent_attention(x_TD, a, b, h_TD, heads)
        k_LNH, v_LNH = self._constant()
        q_TNH = rearrange(self.to_q(x_TD), "t (n h) -> t n h", n=heads)
        out_TNH = ops.latent_attention(q_TNH, k_LNH, v_LNH)
        return self.to_out(rearrange(out_TNH, "t n h -> t (n h)")) + h_TD

    def form(self) -> LatentForm:
        """The form the shapes make cheaper, or the one that `mode` forces. An adapter forces "direct"."""
        mode = check_latents(self.mode)
        form = self.config.cheaper_form if mode == "auto" else mode
        return form if form == "direct" or self._multipliable() else "direct"

    def cached(self) -> dict:
        return self._cache.copy()

    def stale(self) -> dict[str, torch.Tensor]:
        """Of each form, whether the content of a weight has changed without its version.

        It compares all of a small weight and about 127 chunks of 32 elements of a large one. For the
        published head in fp16 that took 0.03 ms on one core of a CPU, and 0.4 ms with cold caches
        (2026-11-26). A write to 1 % of the rows or of the columns is seen. One to a single row of a large
        weight may be missed. An in-place operation on the parameter itself is always seen.
        """
        return {form: _changed(built.weights, built.sample) for form, built in self.cached().items()}

    def forget(self, name: str) -> None:
        self._cache.pop(name, None)

    def _multipliable(self) -> bool:
        """Whether weights are all that the norm of the latents and the projections are."""
        projections = (self.to_q, self.to_kv, self.to_out)
        return (
            all(_is_plain(module) for module in (self.context_norm, *projections))
            and all(projection.bias is None for projection in projections)
            and self.context_norm.bias is not None
        )

    def _build(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.absorbed() if self.form() == "absorbed" else self._keys_and_values()

    def _constant(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensors that depend on weights only, from the cache if the weights are frozen."""
        if self._shared is not None:
            one, other = (leaf.to(dtype) for leaf, dtype in self._shared)
            return one, other
        form = self.form()
        modules = [self.context_norm, self.to_kv]
        if form == "absorbed":
            modules += [self.to_q, self.to_out]
        weights = [self.latents, *(weight for module in modules for weight in module.parameters())]
        # never of weights in training: not every optimizer that changes them moves their version counter
        if torch.compiler.is_compiling() or any(w.requires_grad for w in weights):
            return self._build()
        if not all(map(_is_plain, modules)):
            return self._build()
        # a weight's version counter moves with every in-place change, and inference tensors cannot change
        state = (
            getattr(self.context_norm, "eps", None),
            *((w.data_ptr(), w.dtype, w.device, 0 if w.is_inference() else w._version) for w in weights),
        )
        cached = self._cache.get(form)
        if cached is None or cached.state != state:
            # tensors built under inference_mode could not be used outside it
            with torch.inference_mode(False), torch.no_grad():
                built = self._build()
                sample = _sample(weights)
            if not torch.stack([t.isfinite().all() for t in built]).all():
                raise ValueError(
                    f"the {form} form of these latents overflows {self.latents.dtype}: load with "
                    "dtype='bfloat16', or take the other form (latents='direct' or 'absorbed')"
                )
            # the weights are held, so that no later one can come to lie at the same address unseen
            held = [w.detach() for w in weights]
            cached = self._cache[form] = _Built(state, held, sample, Kept(*built))
        cached.kept.here()
        one, other = cached.kept.tensors
        return one, other

    def _keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v of the latents, [L, N, H] each: the context product of the original."""
        kv = self.to_kv(self.context_norm(self.latents))
        k_LNH, v_LNH = rearrange(kv, "l (two n h) -> two l n h", two=2, n=self.config.num_cross_heads)
        return k_LNH, v_LNH

    def absorbed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, [N * L, D] each: multiplied out in fp32, head by head, and rounded once."""
        with torch.autocast(self.latents.device.type, enabled=False):
            return self._multiplied_out()

    def _multiplied_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        dtype, heads, wide = self.latents.dtype, self.config.num_cross_heads, _wide(self.latents)
        norm = self.context_norm
        context_LC = F.layer_norm(
            self.latents.to(wide), norm.normalized_shape, norm.weight.to(wide), norm.bias.to(wide), norm.eps
        )
        wq_NHD = rearrange(whole_weight(self.to_q), "(n h) d -> n h d", n=heads)
        wk_NHC, wv_NHC = rearrange(whole_weight(self.to_kv), "(two n h) c -> two n h c", two=2, n=heads)
        wout_NHD = rearrange(whole_weight(self.to_out), "d (n h) -> n h d", n=heads)
        scale = self.config.cross_dim_head**-0.5
        a = [context_LC @ wk.to(wide).mT @ wq.to(wide) * scale for wk, wq in zip(wk_NHC, wq_NHD, strict=True)]
        b = [context_LC @ wv.to(wide).mT @ wo.to(wide) for wv, wo in zip(wv_NHC, wout_NHD, strict=True)]
        return torch.cat(a).to(dtype), torch.cat(b).to(dtype)

    def __getstate__(self) -> dict:
        # copies and pickles build their own
        return {**self.__dict__, "_cache": {}, "_shared": None}

    def _apply(self, fn, recurse=True):
        # do not keep the old weights alive beside the moved or cast ones
        self._cache.clear()
        return super()._apply(fn, recurse)


def _wide(t: torch.Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _is_plain(module: nn.Module) -> bool:
    return type(module) in _PLAIN and runs_as_written(module)


def _sample(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """All of each small weight, and of each matrix chunks that lie in all parts of its rows and columns."""
    return torch.cat([_sampled(weight.detach()).reshape(-1) for weight in weights])


def _sampled(weight: torch.Tensor) -> torch.Tensor:
    if weight.ndim == 1 or weight.numel() <= _WHOLE:
        return weight
    # whole rows, and 0.39 of one: from chunk to chunk the columns go through all of them in turn
    width = weight.shape[-1]
    step = weight.numel() // _CHUNKS // width * width + 49 * max(1, width // _CHUNKS)
    return weight.reshape(-1).unfold(0, _CHUNK, step)


def _changed(weights: list[torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
    """[] bool on the device."""
    # FSDP frees the memory of gathered weights, and the next forward has them at another place
    if any(weight.untyped_storage().nbytes() == 0 for weight in weights):
        return sample.new_ones((), dtype=torch.bool)
    with torch.no_grad():
        return (_sample(weights) != sample).any()
