"""Host time of one query by CUDA graphs, without the replay. Needs no GPU.

    python -m tools.host_time

A model with NV-Embed's number of modules and weights, and tiny widths, answers a query of 50 tokens. The
replay returns a tensor that lies ready, so what is timed is all that the host does before and after it. A
figure of one machine says little about another. So the time stands beside that of a plain Python loop of the
same run.
"""

import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch

from nvembed_fast import graphs
from nvembed_fast.config import BackboneConfig, LatentConfig, NVEmbedConfig
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.network.model import NVEmbedModel

ROUNDS = 15
LOOP = 10_000  # steps of the plain loop


def tiny_model(num_layers: int = 32, vocab_size: int = 256) -> NVEmbedModel:
    """As many layers as NV-Embed has, unless said otherwise."""
    text = BackboneConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    latent = LatentConfig(
        num_latents_value=16, num_cross_heads=2, cross_dim_head=16, hidden_dim=32, latent_dim=32
    )
    return NVEmbedModel(NVEmbedConfig(text, latent)).requires_grad_(False).eval()


def graph_path(model: NVEmbedModel) -> Callable[[], object]:
    """One query through the graphs, with a played replay."""

    vectors = torch.zeros(2, model.config.hidden_size)

    single = graphs.SingleTextGraphs(model)
    ids = np.random.default_rng(0).integers(3, 256, 50).astype(np.int32)

    def query() -> object:
        return single(ids, 20)

    with (
        mock.patch.object(graphs, "captured", lambda run, pool: lambda: vectors),
        # those of the kernels on a GPU: attention, mean_pool
        mock.patch.object(SeqLayout, "tile_blocks", lambda layout: (32, 512)),
        mock.patch.object(torch.cuda, "graph_pool_handle", lambda: None),
        mock.patch.object(graphs, "_DEVICE_TYPES", ("cpu",)),
        mock.patch.object(SeqLayout, "has_runs", lambda layout: False),
    ):
        query()
    return query


def plain_loop() -> int:
    total = 0
    for step in range(LOOP):
        total += step
    return total


def microseconds(call: Callable[[], object], calls: int) -> float:
    """Of one call, the best of ROUNDS."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return 1e6 * best


def main() -> int:
    torch.set_num_threads(1)
    model = tiny_model()
    modules, weights = len(list(model.modules())), len(list(model.parameters()))
    query, loop = microseconds(graph_path(model), 50), microseconds(plain_loop, 5)
    print(f"{modules} modules, {weights} weights")
    print(f"one query, all but the replay: {query:.0f} us, {query / loop:.2f} of a loop of {LOOP} additions")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
