"""Whether an encoder computes the same vectors as ours, before it is timed."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.baselines.encoders import Graphed, Ours, PaddedEncoder
from bench.workloads import Scale, Workload, random_encoder
from nvembed_fast import NVEmbed

PARITY_LAYERS, PARITY_BATCH = 2, 4
# of one text against the fp32 path, in 16 and in 32 bits
MIN_COSINE, MAX_DIFFERENCE = 0.999, 1e-4


@dataclass(frozen=True)
class Parity:
    """How far the vectors of an encoder are from those of our fp32 path in plain PyTorch.

    Attributes:
        error: the largest of any text, in the dtype that is timed.
        unit: "1 - cosine" in 16 bits, "relative" in fp32.
        obstacle: why it must not be timed, or None.
    """

    error: float
    unit: str
    obstacle: str | None


class ParityCheck:
    """Our vectors on the first layers of a scale's model, for encoders to be compared with.

    Texts are run with and without an instruction, PARITY_BATCH to a batch.
    """

    def __init__(self, scale: Scale, device: str, dtype: torch.dtype):
        text = dataclasses.replace(scale.config.text_config, num_hidden_layers=PARITY_LAYERS)
        self._timed = random_encoder(dataclasses.replace(scale.config, text_config=text), device, dtype)
        self._wide = copy.deepcopy(self._timed).float()
        prefix = min(scale.parity_lengths) // 2
        workloads = [Workload("", scale.parity_lengths), Workload("", scale.parity_lengths, prefix)]
        self._cases = [workload.texts(text.vocab_size) for workload in workloads]
        oracle = dataclasses.replace(self._wide.placement, impl="torch")
        self._wanted = self._vectors(Ours(NVEmbed(self._wide.model, self._wide.text_tokenizer, oracle)))

    def _vectors(self, encoder: PaddedEncoder | Ours | Graphed) -> torch.Tensor:
        return torch.cat([encoder.encode(*texts, PARITY_BATCH) for texts in self._cases])

    def of(self, make: Callable[[NVEmbed], PaddedEncoder | Ours | Graphed]) -> Parity:
        """The parity of an encoder: in fp32, then in the dtype that is timed. `make` builds it."""
        got = self._vectors(make(self._wide))
        wanted = self._wanted
        error = ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()
        # not (a < b): NaN is red too
        if not error < MAX_DIFFERENCE:
            return Parity(error, "relative", f"parity is red: fp32 differs by {error:.2g}")
        if self._timed.dtype == torch.float32:
            return Parity(error, "relative", None)
        got = self._vectors(make(self._timed))
        error = 1.0 - F.cosine_similarity(got.double(), wanted.double()).min().item()
        obstacle = None if error < 1 - MIN_COSINE else f"parity is red: a cosine of {1 - error:.6f}"
        return Parity(error, "1 - cosine", obstacle)
