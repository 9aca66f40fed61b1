"""The whole way on real input: a small model reads Python's own documentation and answers questions with it.

1. Take the demo model. Its decoder, SmolLM2-135M, is fetched once (93 MB, Apache-2.0).
2. Embed 1,200 docstrings of the Python standard library. Texts and vectors are kept for the next run,
   also those that are done when it is stopped.
3. Answer three questions with the docstrings nearest to them.
4. Say where the time went.
"""

import argparse
import hashlib
import json
import resource
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

# runs from a checkout as from an installed package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nvembed_fast import files

if TYPE_CHECKING:
    from torch import dtype, nn

    from nvembed_fast import NVEmbed

PART = 200  # texts, whose vectors are kept before the next ones are made


def main() -> None:
    arguments = _arguments()
    print("Questions about Python, answered with the docstrings of its standard library.", flush=True)
    began = time.perf_counter()
    # only now, because importing torch takes seconds
    import torch

    from nvembed_fast.evaluation import docstrings
    from nvembed_fast.stream import TextsCut

    # a line behind the ranking says so
    warnings.simplefilter("ignore", TextsCut)
    model = load_model(arguments.cache)
    if model.dtype == torch.bfloat16:
        print("bf16, because this CPU multiplies it in hardware. The package's own default on a CPU is fp32.")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    ready = time.perf_counter() - began
    print(f"{millions:.0f} M parameters, {model.dtype} on {model.device}, ready after {ready:.1f} s")

    asked = docstrings.questions("demo")
    corpus = docstrings.load(arguments.texts, asked=asked, library=library(arguments.cache))
    texts = list(corpus.texts)
    clock = ModuleClock(model)
    began = time.perf_counter()
    kept = vectors_file(arguments.cache, model, texts, arguments.max_length)
    parts = [torch.load(kept, weights_only=True)] if kept.is_file() else []
    num_kept = sum(map(len, parts))
    for start in range(num_kept, len(texts), PART):
        print(f"docstrings from number {start + 1} of {len(texts)}", flush=True)
        part = texts[start : start + PART]
        vectors = model.encode_document(part, max_length=arguments.max_length, show_progress=True)
        parts.append(vectors.cpu())
        with files.replacing(kept) as aside:
            torch.save(torch.cat(parts), aside)
    documents = torch.cat(parts)
    total = time.perf_counter() - began
    spent = clock.report(total)
    queries = model.encode_query([question.text for question in corpus.questions], docstrings.TASK)

    scores = queries @ documents.to(queries.device).T
    for question, right, row in zip(corpus.questions, corpus.right, scores, strict=True):
        print(f"\n{question.text}")
        for rank, index in enumerate(row.topk(3).indices.tolist(), start=1):
            mark = "*" if index in right else " "
            print(f" {mark}{rank}. {row[index]:.4f}  {texts[index][:100]}")
    print("\n* a docstring that answers the question")

    new = texts[num_kept:]
    tokens = sum(model.text_tokenizer(new or texts, "", arguments.max_length).lengths())
    print(f"\n{len(texts)} texts of at most {arguments.max_length} tokens, the rest is cut")
    if new:
        print(f"{tokens} tokens in {total:.1f} s: {tokens / total:.0f} tokens/s")
    else:
        print(f"{tokens} tokens, whose vectors were kept in {kept}")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if model.device.type == "cuda":
        print(f"peak memory on the GPU: {torch.cuda.max_memory_allocated(model.device) / 2**30:.2f} GiB")
    if new:
        print("where the time went:")
        for part, seconds in spent:
            print(f"  {seconds / total:5.1%}  {seconds:6.1f} s  {part}")
    command = f"{Path(sys.executable).parent / 'nvembed-fast'} search FILE 'a question' --model demo"
    print(f"\nTry it on a file of your own, one text a line:\n  {command}")


def load_model(cache: Path) -> "NVEmbed":
    """The demo model, with a line about it."""
    from nvembed_fast import NVEmbed
    from nvembed_fast.checkpoint import demo

    card = demo.SHIPPED / demo.CARD_FILE
    print(f"The model is {demo.NAME!r} of this package: SmolLM2-135M, trained for search. Its card: {card}")
    return NVEmbed.from_pretrained(demo.NAME, dtype=_dtype(), cache_dir=cache)


class ModuleClock:
    """Wall-clock time inside the parts of a model, by forward hooks that wait for a GPU."""

    def __init__(self, model: "NVEmbed"):
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

    def _watch(self, module: "nn.Module", name: str) -> None:
        def enter(*_):
            self.running.append(self._now())

        def leave(*_):
            self.spent[name] += self._now() - self.running.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _now(self) -> float:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def library(cache: Path) -> dict[str, str]:
    """The docstrings of the standard library, read out of its sources once for each Python."""
    from nvembed_fast.evaluation.docstrings import standard_library

    made_of = hashlib.sha256(f"{sys.version} {sys.prefix}".encode()).hexdigest()
    path = cache / "demo" / f"docstrings-{made_of[:12]}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as part:
            part.write_text(json.dumps(dict(standard_library())), "utf-8")
    return files.read_json(path)


def vectors_file(cache: Path, model: "NVEmbed", texts: list[str], max_length: int) -> Path:
    """Where the vectors of these texts by this model are kept."""
    from nvembed_fast import fingerprint

    made_of = f"{model.fingerprint} {fingerprint.of_texts(texts)} {max_length} {model.dtype}"
    return cache / "demo" / f"vectors-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}.pt"


def _dtype() -> "dtype | None":
    """bf16 on a CPU that multiplies it in hardware, and the default elsewhere."""
    import torch

    on_cpu = not torch.cuda.is_available()
    return torch.bfloat16 if on_cpu and torch.cpu._is_avx512_bf16_supported() else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python examples/demo.py --texts 500"
    )
    parser.add_argument(
        "--texts", type=_number, default=1200, help="docstrings to embed (default: %(default)s)"
    )
    parser.add_argument("--max-length", type=int, default=128, help="tokens a text (default: %(default)s)")
    parser.add_argument(
        "--cache", type=files.expanded, default=files.cache_folder(), help="default: %(default)s"
    )
    return parser.parse_args()


def _number(text: str) -> int:
    from nvembed_fast.evaluation import docstrings

    if int(text) < docstrings.min_number():
        raise argparse.ArgumentTypeError(f"must be at least {docstrings.min_number()}, got {text}")
    return int(text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: finished parts are kept, and the same command goes on")
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"demo: {error}")
