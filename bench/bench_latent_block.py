"""The latent block from the backbone's last states to vectors: where the algebra of `latent_head` pays."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange

from bench.baselines import latent_blocks
from bench.baselines.encoders import BY_LIBRARY
from bench.measure.comparison import Experiment, Implementation, KernelBench, Work
from bench.suites import Setting
from bench.workloads import draw_weights
from nvembed_fast import ops
from nvembed_fast.config import LatentConfig
from nvembed_fast.kernels.layout import SeqLayout
from nvembed_fast.kernels.testing import generator, randn
from nvembed_fast.network.latent_head import LatentHead


@dataclass(frozen=True)
class LatentBlockCase:
    """Texts of one length."""

    name: str
    num_texts: int
    length: int
    config: LatentConfig

    def flops(self, backward: bool) -> int:
        """Of the products that cannot be saved: A and B, the up product of every token, the down product of
        every text.

        The backward to the tokens, through frozen weights, takes as many again.
        """
        tokens, width = self.num_texts * self.length, self.config.hidden_dim
        latents = self.config.num_cross_heads * self.config.num_latents_value
        once = 4 * tokens * latents * width + 16 * tokens * width**2 + 8 * self.num_texts * width**2
        return 2 * once if backward else once


# its keys and values of every text take 64 MiB in 16 bits
ORIGINAL_BATCH = 128
NVEMBED = LatentConfig()
SMALL = LatentConfig(cross_dim_head=64, hidden_dim=576, latent_dim=576)
TINY = LatentConfig(num_latents_value=12, num_cross_heads=2, cross_dim_head=24, hidden_dim=64, latent_dim=64)
GPU = [LatentBlockCase(f"nvembed-{16384 // n}x{n}", 16384 // n, n, NVEMBED) for n in (32, 128, 512, 4096)]
CPU = [LatentBlockCase("smollm2-16x128", 16, 128, SMALL)]
SMALLEST = [LatentBlockCase("tiny-2x5", 2, 5, TINY)]


def benches(setting: Setting) -> Iterator[KernelBench]:
    for case in setting.choose(gpu=GPU, cpu=CPU, smallest=SMALLEST):
        for backward in (False, True):
            work = Work(case.flops(backward), "TFLOP/s")
            yield KernelBench("latent_block", case.name, partial(_experiment, setting, case), work, backward)


def _experiment(setting: Setting, case: LatentBlockCase) -> Experiment:
    device, dtype, compiled = setting.device, setting.dtype, setting.baselines.compiled
    # on the device from the first: a CPU takes seconds to draw its weights
    with torch.device(device):
        head = LatentHead(case.config).to(dtype).requires_grad_(False)
    draw_weights(head, case.config.hidden_dim)
    # the forms are one in float64; in the dtype parity is that of the form with the same rounded A and B
    oracle, eager = copy.deepcopy(head).double(), latent_blocks.Absorbed(head)
    oracle.mode = "direct"
    commuted = latent_blocks.Commuted(head, case.num_texts)
    hoisted, layout = latent_blocks.Hoisted(head), SeqLayout((case.length,) * case.num_texts, device)
    h = randn(layout.num_tokens, case.config.hidden_dim, generator=generator()).to(device, dtype)

    def pooled(block: Callable) -> Callable:
        return lambda h: F.normalize(latent_blocks.mean(block(h), case.num_texts), dim=-1)

    def with_all_algebra(h):
        return F.normalize(commuted(h), dim=-1)

    def original(h):
        batches = rearrange(h, "(b s) d -> b s d", b=case.num_texts).split(ORIGINAL_BATCH)
        return torch.cat([latent_blocks.original(head, batch).flatten(0, 1) for batch in batches])

    def by_library(h):
        with ops.use_impl("library"):
            return head(h, layout)

    def wanted(h):
        if h.dtype != torch.float64:
            return pooled(eager)(h)
        with ops.use_impl("torch"):
            return oracle(h, layout)

    return Experiment(
        [h],
        ours=lambda h: head(h, layout),
        reference=wanted,
        baselines=[
            Implementation("original", pooled(original)),
            Implementation("hoisted", pooled(hoisted)),
            compiled("hoisted, compiled", pooled(hoisted)),
            Implementation("absorbed, library", pooled(eager)),
            compiled("absorbed, library, compiled", pooled(eager)),
            Implementation("absorbed and commuted, library", with_all_algebra),
            compiled("absorbed and commuted, library, compiled", with_all_algebra),
            Implementation(BY_LIBRARY, by_library),
        ],
    )


def bench_latent_block(bench, timed):
    timed(bench)
