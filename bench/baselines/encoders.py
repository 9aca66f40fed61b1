"""The whole encoder, and the other ways of running the same weights.

Each takes texts and gives vectors in the caller's order. Texts are tokenised alike: window by window, in a
thread, while the device computes. The weights of the baselines are views of ours.

- `Original`: the order of the published code. Texts are padded in the caller's order. SDPA takes an additive
  mask [B, 1, S, S]. Keys and values of the latents are computed for every text, and the feed-forward of the
  head runs on padding too. Its key/value cache and its fp32 weights under autocast are missing here, because
  they only slow it further.
- `Sorted`: transformers' MistralModel, as fast as it runs unchanged. Texts are sorted by length, a batch of
  equal lengths has no mask at all, keys and values of the latents are kept, and the head sees no padding.
- `Compiled`: the same under torch.compile, layer by layer. All layers share one compiled graph.
- `Ours`: `NVEmbed.encode`.
- `ByLibrary`: the same with impl="library", PyTorch's own operations in the place of the kernels.

Shape suffixes: B texts, S tokens of the longest one, T tokens without padding, D model width.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from bench.baselines import latent_blocks
from bench.measure.results import GRAPHED, OURS
from bench.workloads import EOS_ID, MAX_LENGTH
from nvembed_fast import NVEmbed
from nvembed_fast.checkpoint import published_tensors
from nvembed_fast.kernels.layout import to_device
from nvembed_fast.network.latent_head import LatentHead
from nvembed_fast.placement import Placement

if TYPE_CHECKING:
    from transformers import MistralModel


def mistral_model(ours: NVEmbed) -> "MistralModel":
    """transformers' MistralModel without a causal mask, on views of our weights."""
    from transformers import MistralConfig, MistralModel

    text = ours.config.text_config
    config = MistralConfig(
        **dataclasses.asdict(text)
        | {
            "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
            "attn_implementation": "sdpa",
        },
        sliding_window=None,
        use_cache=False,
    )
    with torch.device("meta"):
        model = MistralModel(config)
    weights = dict(ours.model.named_parameters())
    table = published_tensors(ours.config)
    backbone = "embedding_model."
    views = {
        name.removeprefix(backbone): weights[slot.parameter].detach()[slot.rows]
        for name, slot in table.items()
        if name.startswith(backbone)
    }
    model.load_state_dict(views, assign=True)
    # its frequencies are in no state dict, so they are still on meta
    model.rotary_emb = type(model.rotary_emb)(config).to(ours.device)
    return model.eval().requires_grad_(False)


def pad(
    ids: Sequence[np.ndarray], device: torch.device, multiple: int = 1
) -> tuple[torch.Tensor, np.ndarray]:
    """[B, S] ids on the device, and [B, S] bool on the host: True at tokens."""
    lengths = np.array([len(i) for i in ids])
    longest = -(-lengths.max() // multiple) * multiple
    real = np.arange(longest) < lengths[:, None]
    padded = np.full(real.shape, EOS_ID, dtype=np.int64)
    padded[real] = np.concatenate(ids)
    return to_device(torch.from_numpy(padded), device), real


class PaddedEncoder:
    """Batches of a number of texts, padded at the right to their longest.

    Args:
        ours: whose weights and tokenizer are used.
    """

    by_length = True

    def __init__(self, ours: NVEmbed):
        self.ours = ours
        self.device = ours.device
        self.mistral = mistral_model(ours)
        assert isinstance(ours.model.head, LatentHead)
        self.head = ours.model.head

    @torch.no_grad()
    def encode(self, texts: list[str], instruction: str, batch_size: int) -> torch.Tensor:
        """[N, D] fp32 on the device, of unit norm, in the order of the texts."""
        result = torch.empty(len(texts), self.ours.config.hidden_size, device=self.device)
        place = np.arange(len(texts))
        if self.by_length:
            # characters over all texts; tokens inside a window
            place = np.argsort([-len(text) for text in texts], kind="stable")
            texts = [texts[index] for index in place]
        for first, window in self.ours.stream.tokenized(texts, instruction, MAX_LENGTH):
            lengths = np.array(window.lengths())
            order = np.argsort(-lengths, kind="stable") if self.by_length else np.arange(len(lengths))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                vectors = self.embed(
                    [window.ids[row] for row in rows], [window.first_pooled[row] for row in rows]
                )
                result.index_copy_(0, to_device(torch.from_numpy(place[first + rows]), self.device), vectors)
        return result

    def embed(self, ids: list[np.ndarray], first_pooled: list[int]) -> torch.Tensor:
        """[B, D] vectors of one batch."""
        raise NotImplementedError

    def pad(self, ids: Sequence[np.ndarray], multiple: int = 1) -> tuple[torch.Tensor, np.ndarray]:
        return pad(ids, self.device, multiple)


class Original(PaddedEncoder):
    """The published order of computation."""

    by_length = False

    def embed(self, ids: list[np.ndarray], first_pooled: list[int]) -> torch.Tensor:
        input_ids_BS, real = self.pad(ids)
        real_BS = to_device(torch.from_numpy(real), self.device)
        dtype = self.ours.dtype
        bias_BS = torch.zeros_like(real_BS, dtype=dtype).masked_fill_(~real_BS, torch.finfo(dtype).min)
        longest = input_ids_BS.shape[1]
        mask_B1SS = bias_BS[:, None, None, :].expand(-1, 1, longest, -1).contiguous()
        h_BSD = self.mistral(input_ids_BS, attention_mask=mask_B1SS).last_hidden_state
        h2_BSD = latent_blocks.original(self.head, h_BSD)
        starts_B1 = to_device(torch.tensor(first_pooled)[:, None], self.device)
        pooled_BS = real_BS & (torch.arange(longest, device=self.device) >= starts_B1)
        mean_BD = (h2_BSD.float() * pooled_BS[..., None]).sum(1) / pooled_BS.sum(1, keepdim=True)
        return F.normalize(mean_BD, dim=-1)


class Sorted(PaddedEncoder):
    """Stock transformers on sorted texts, with a head that repeats nothing and sees no padding."""

    def __init__(self, ours: NVEmbed):
        super().__init__(ours)
        self.block = latent_blocks.Hoisted(self.head)
        self.pool: Callable = self.pool_packed

    def embed(self, ids: list[np.ndarray], first_pooled: list[int]) -> torch.Tensor:
        is_ragged = len({len(i) for i in ids}) > 1
        # a mask's rows have to be aligned for the fast kernels; without a mask a pad would cost one
        input_ids_BS, real = self.pad(ids, multiple=8 if is_ragged else 1)
        mask = to_device(torch.from_numpy(real), self.device)[:, None, None, :] if is_ragged else None
        h_TD = self.mistral(input_ids_BS, attention_mask=mask).last_hidden_state.flatten(0, 1)
        if is_ragged:
            h_TD = h_TD.index_select(0, to_device(torch.from_numpy(real.ravel().nonzero()[0]), self.device))
        text, token = real.nonzero()
        keep = token >= np.array(first_pooled)[text]
        counts = np.bincount(text, keep).astype(np.float32)
        text_T, keep_T, counts_B = (
            to_device(torch.from_numpy(array), self.device) for array in (text, keep, counts)
        )
        return self.pool(h_TD, text_T, keep_T, counts_B)

    def pool_packed(
        self, h_TD: torch.Tensor, text_T: torch.Tensor, keep_T: torch.Tensor, counts_B: torch.Tensor
    ) -> torch.Tensor:
        """[B, D] vectors of [T, D] states without padding."""
        h2_TD = self.block(h_TD)
        sum_BD = torch.zeros(len(counts_B), h_TD.shape[1], device=h_TD.device)
        sum_BD = sum_BD.index_add(0, text_T, h2_TD.float() * keep_T[:, None])
        return F.normalize(sum_BD / counts_B[:, None], dim=-1)


class Compiled(Sorted):
    """`Sorted` under torch.compile, with dynamic shapes."""

    backend: str | Callable = "inductor"

    def __init__(self, ours: NVEmbed):
        super().__init__(ours)
        # one graph each for one text, equal lengths and ragged ones, in two dtypes; beyond the limit
        # torch.compile would silently run the model uncompiled
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        for layer in self.mistral.layers:
            layer.compile(dynamic=True, backend=self.backend)
        self.mistral.norm.compile(dynamic=True, backend=self.backend)
        self.pool = torch.compile(self.pool_packed, dynamic=True, backend=self.backend)


class Ours:
    """`NVEmbed.encode`, which cuts batches by tokens itself."""

    def __init__(self, ours: NVEmbed):
        self.ours = ours

    def encode(self, texts: list[str], instruction: str, batch_size: int) -> torch.Tensor:
        """[N, D] fp32 on the device. `batch_size` is not used."""
        return torch.as_tensor(self.ours.encode(texts, instruction, MAX_LENGTH, show_progress=False))


class ByLibrary(Ours):
    """`NVEmbed.encode` with impl="library"."""

    def __init__(self, ours: NVEmbed):
        placement = dataclasses.replace(ours.placement, impl="library")
        super().__init__(NVEmbed(ours.model, ours.text_tokenizer, placement))


class Graphed:
    """`NVEmbed.encode` text by text, by CUDA graphs: for one query."""

    def __init__(self, ours: NVEmbed):
        placement = Placement.decide(
            ours.config, device=ours.device, dtype=ours.dtype, impl=ours.placement.impl, cuda_graphs=True
        )
        self.ours = NVEmbed(ours.model, ours.text_tokenizer, placement)

    def encode(self, texts: list[str], instruction: str, batch_size: int) -> torch.Tensor:
        """As `Ours.encode`.

        Raises:
            RuntimeError: no text was short enough, or no graph holds what the model runs.
        """
        vectors = [self.ours.encode([text], instruction, MAX_LENGTH, show_progress=False) for text in texts]
        if not self.ours.graphs.buckets:
            raise RuntimeError("no CUDA graph was captured")
        return torch.cat([torch.as_tensor(vector) for vector in vectors])


BY_LIBRARY = f"{OURS}, library"
# they cut batches by tokens themselves
WITHOUT_BATCH_SIZE = (OURS, GRAPHED, BY_LIBRARY)
# impl of a figure -> its encoder; ours is the last
ENCODERS: dict[str, type[PaddedEncoder] | type[Ours] | type[Graphed]] = {
    "original": Original,
    "MistralModel, sorted": Sorted,
    "MistralModel, sorted, compiled": Compiled,
    GRAPHED: Graphed,
    BY_LIBRARY: ByLibrary,
    OURS: Ours,
}
GPU_ONLY = {
    "MistralModel, sorted, compiled": "timed on a GPU alone",
    GRAPHED: "needs a GPU",
    BY_LIBRARY: "timed on a GPU alone",
}
