"""The suites by name, and the setting of a run."""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from bench.baselines.kernels import Baselines
from bench.measure.comparison import Prepared
from bench.measure.limits import Limits
from bench.measure.results import Figure
from bench.workloads import IMPLS
from nvembed_fast import ops
from nvembed_fast.kernels.testing import drawn_on

# quick ones first
SUITES = (
    "rms_norm",
    "gated",
    "rotary",
    "mean_pool",
    "masked_lse",
    "latent_block",
    "latent_attention",
    "absorbed_latent_attention",
    "flash_attention",
    "train",
    "encode",
)
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """The device and the extent of a run.

    Attributes:
        device: "cuda" or "cpu".
        smallest: the smallest cases alone: does it run?
        compiles: torch.compile takes part on a CPU, too, where it takes longer than all the rest.
    """

    device: str
    smallest: bool = False
    compiles: bool = False

    @classmethod
    def here(cls, smallest: bool, compiles: bool) -> "Setting":
        """That of this machine. fp32 products stay fp32, whatever an environment variable allows."""
        torch.set_float32_matmul_precision("highest")
        return cls("cuda" if torch.cuda.is_available() else "cpu", smallest, compiles)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def baselines(self) -> Baselines:
        return Baselines(self.device, self.device == "cuda" or self.compiles)

    @property
    def limits(self) -> Limits:
        return Limits(self.device, 0.01 if self.smallest else 1.0 if self.device == "cuda" else 0.2)

    @property
    def limit_dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16, torch.float16) if self.device == "cuda" else (torch.float32, torch.bfloat16)

    def choose(self, *, gpu: T, cpu: T, smallest: T) -> T:
        return smallest if self.smallest else gpu if self.device == "cuda" else cpu

    @contextlib.contextmanager
    def implementation(self) -> Iterator[None]:
        """Inside, ours is the Triton path on a GPU, and the PyTorch path on a CPU.

        Inputs are drawn on the device: one core of a CPU would draw for longer than a GPU times them.
        """
        with ops.use_impl(IMPLS[self.device]), drawn_on(self.device):
            yield


class Bench(Protocol):
    """One case of a suite."""

    suite: str
    case: str

    def prepare(self, only_ours: bool = False) -> Prepared:
        """Parity first, then the calls that can be timed."""

    def measure(self, limits: Limits, seconds: float, rounds: int | None = None) -> list[Figure]:
        """The figures of a comparison."""


def benches(suite: str, setting: Setting) -> list[Bench]:
    return list(importlib.import_module(f"bench.bench_{suite}").benches(setting))


def add_options(add: Callable) -> None:
    """The options that make a `Setting`, for argparse's `add_argument` and for pytest's `addoption`."""
    add("--compile", action="store_true", help="torch.compile takes part on a CPU, too")
    add("--smallest", action="store_true", help="one sample of the smallest cases: does it run?")


def selected(found: Sequence[Bench], words: Sequence[str]) -> list[Bench]:
    """The benches whose case contains one of the words, or all without words."""
    return [bench for bench in found if not words or any(word in bench.case for word in words)]
