"""nvembed-fast info."""

import argparse
import contextlib
import json
import math
import sys
import textwrap
from typing import TYPE_CHECKING

from nvembed_fast import __version__
from nvembed_fast.cli import options
from nvembed_fast.config import NVEmbedConfig

if TYPE_CHECKING:
    import torch

SUMMARY = "Versions, devices, and which implementation each operation takes and why."
EXAMPLES = """\
examples:
  nvembed-fast info
  nvembed-fast info --model ./my-model
  nvembed-fast info --model nvidia/NV-Embed-v2 --revision main"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="also describe this directory or hub id, of which only the config is fetched"
    )
    options.add_hub_options(parser)


def run(arguments: argparse.Namespace) -> None:
    from nvembed_fast import checkpoint
    from nvembed_fast.placement import place

    # first, so that an error stands alone
    config = None
    if arguments.model is not None:
        directory = checkpoint.resolve(arguments.model, config_only=True, **options.hub_options(arguments))
        config = NVEmbedConfig.from_file(directory / "config.json")
        placed = place(config)
    ours, python, *packages = versions().items()
    print(f"{' '.join(ours)}, {' '.join(python)}")
    for package in packages:
        print(f"  {' '.join(package)}")
    for device, facts in devices():
        print(f"\n{device}: {facts}")
        _print_implementations(device)
    print("\nMatrix products are the library's. A shape beyond a kernel's limits takes library.")
    print("On a GPU `auto` takes a kernel once its self-check has passed: see `nvembed-fast check`.")
    if config:
        _print_model(arguments.model, config, *placed)


def versions(device: "torch.device | None" = None) -> dict[str, str]:
    """Name -> version, of this package, Python and others. For a GPU also of CUDA and the driver."""
    import importlib.metadata

    found = {"nvembed-fast": __version__, "Python": sys.version.split()[0]}
    for package in ("torch", "triton", "transformers", "tokenizers", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if device is not None and device.type == "cuda":
        import torch

        from nvembed_fast import verdicts

        found |= {"CUDA": str(torch.version.cuda), "driver": verdicts.facts(device)["driver"]}
    return found


def devices() -> list[tuple[str, str]]:
    """(name, facts) of the CPU and of every GPU."""
    import torch

    devices = [("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        name = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}"
        devices.append((f"cuda:{index}", name))
    return devices


def _print_implementations(device: str) -> None:
    import torch

    from nvembed_fast import ops
    from nvembed_fast.placement import dtype_name

    verdicts: dict[tuple[str, str], list[str]] = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        verdict = ops.choose(torch.device(device), dtype)
        verdicts.setdefault(verdict, []).append(dtype_name(dtype))
    for (impl, reason), dtypes in verdicts.items():
        print(f"  in {', '.join(dtypes)} these take {impl}, because {reason}:")
        print(textwrap.fill(", ".join(ops.OPERATIONS), 100, initial_indent="    ", subsequent_indent="    "))


def _print_model(name: str, config: NVEmbedConfig, device: "torch.device", dtype: "torch.dtype") -> None:
    from nvembed_fast.checkpoint import published_tensors
    from nvembed_fast.placement import dtype_name, latent_form

    shapes = [slot.shape for slot in published_tensors(config).values()]
    print(f"\n{name}: {sum(map(math.prod, shapes)):,} parameters in {len(shapes)} tensors")
    print(f"it runs on {device} in {dtype_name(dtype)}")
    if form := latent_form("auto", config):
        print(f"latents='auto' takes the {form} form: the cheaper one for these shapes")
    print(json.dumps(config.to_dict(), indent=2))
