"""The golden numbers of tests/golden/, made again by the original's code. tests/golden/README.md says how.

    python -m tools.golden make DOWNLOAD OUT --weights tests/golden/tiny_a/model.safetensors
    python -m tools.golden make DOWNLOAD OUT --seed 7          new weights
    python -m tools.golden compare OUT                         against tests/golden/

DOWNLOAD is a folder with the original's code and tokenizer, without its weights.

1. A tiny model of the published layout is written to a scratch folder: the config of tests/golden/tiny_a, the
   given or drawn weights, and beside them the code and the tokenizer of DOWNLOAD.
2. The original's code loads it in fp32 on the CPU and encodes the texts of tests/golden/tiny_a/cases.json.
   Hooks take what its modules read and write.
3. It encodes the texts of tests/golden/tokenization.json one by one. Hooks take ids and masks.
4. OUT gets both sets in the layout of tests/golden/, and nothing of the original's code.
"""

import argparse
import contextlib
import inspect
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nvembed_fast.checkpoint.names import TOKENIZER_FILES, published_tensors
from nvembed_fast.config import NVEmbedConfig

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
VERSIONS = {"transformers": "4.42.4", "tokenizers": "0.19.1", "numpy": "1.26.4"}
RELATIVE = 5e-6  # of the norm: what tests/test_golden.py allows in fp32
MASKS = ("input_ids", "attention_mask", "pool_mask")
Load = Callable[[Path], torch.nn.Module]


def draw_weights(config: NVEmbedConfig, seed: int) -> dict[str, torch.Tensor]:
    """fp16 weights under the published names, of a size at which no layer is negligible."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, slot in published_tensors(config).items():
        drawn = torch.randn(slot.shape, generator=generator)
        if name.endswith(".bias"):
            drawn *= 0.2
        elif drawn.ndim == 1:  # of a norm
            drawn = 1 + 0.3 * drawn
        elif not name.endswith(("embed_tokens.weight", "latents")):
            drawn *= 1.5 / slot.shape[1] ** 0.5
        weights[name] = drawn.half()
    return weights


def write_model(download: Path, target: Path, weights: dict[str, torch.Tensor]) -> None:
    """A model directory that the original's code loads.

    Raises:
        FileNotFoundError: DOWNLOAD lacks the code or the tokenizer.
    """
    code, tokenizer = sorted(download.glob("*.py")), [download / name for name in TOKENIZER_FILES]
    for path in (download / "config.json", *tokenizer):
        if not path.is_file():
            raise FileNotFoundError(f"{download} has no {path.name}")
    if not code:
        raise FileNotFoundError(f"{download} has no *.py: the original's code is missing")
    target.mkdir(parents=True)
    for path in (*code, *tokenizer):
        shutil.copy(path, target)
    config = json.loads((GOLDEN / "tiny_a" / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = json.loads((download / "config.json").read_text(encoding="utf-8"))["auto_map"]
    # the original reads its tokenizer from here, whatever folder the model comes from
    config["_name_or_path"] = config["text_config"]["_name_or_path"] = str(target)
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def load_original(directory: Path) -> torch.nn.Module:
    """The model of the original's code, in fp32 on the CPU.

    Raises:
        RuntimeError: a package has another version than the golden numbers were made with.
    """
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if found != VERSIONS:
        wanted = ", ".join(f"{name}=={version}" for name, version in VERSIONS.items())
        raise RuntimeError(f"the original's code needs {wanted}; found {found or 'none of them'}")
    from transformers import AutoModel

    return AutoModel.from_pretrained(directory, trust_remote_code=True, torch_dtype=torch.float32)


@contextlib.contextmanager
def recorded(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """A dictionary that every call of the model fills with ids, masks and all states."""
    record: dict[str, torch.Tensor] = {}
    backbone, blocks = model.embedding_model, model.latent_attention_model.cross_attend_blocks
    signature = inspect.signature(model.forward)

    def read(module, args, kwargs) -> None:
        given = signature.bind(*args, **kwargs).arguments
        record.update({name: given[name] for name in MASKS})

    def reads(name: str) -> Callable:
        def hook(module, args, kwargs) -> None:
            record[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    def writes(name: str, residual: str | None = None) -> Callable:
        def hook(module, args, output) -> None:
            record[name] = output if residual is None else output + record[residual]

        return hook

    handles = [model.register_forward_pre_hook(read, with_kwargs=True)]
    for index, layer in enumerate(backbone.layers):
        handles.append(layer.register_forward_pre_hook(reads(f"hidden.{index}"), with_kwargs=True))
    handles += [
        backbone.norm.register_forward_hook(writes(f"hidden.{len(backbone.layers)}")),
        # the second block reads the residual stream behind the first, and its caller adds it to the output
        blocks[1].register_forward_pre_hook(reads("cross_attention"), with_kwargs=True),
        blocks[1].register_forward_hook(writes("latent_output", residual="cross_attention")),
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_cases(model: Any, cases: Sequence[dict]) -> dict[str, torch.Tensor]:
    """The content of expected.safetensors."""
    expected = {}
    with recorded(model) as record:
        for index, case in enumerate(cases):
            record.clear()
            vectors = model.encode(
                case["texts"], instruction=case["instruction"], max_length=case["max_length"]
            )
            record["embeddings"] = vectors
            for name, tensor in record.items():
                dtype = {"input_ids": torch.int32, "attention_mask": torch.uint8, "pool_mask": torch.uint8}
                stored = tensor.detach().to(dtype.get(name, torch.float32))
                expected[f"case{index}.{name}"] = stored.clone().contiguous()
    return expected


@torch.no_grad()
def run_tokenization(model: Any, rows: Sequence[dict]) -> list[dict]:
    """The rows with ids and the index of the first pooled token."""
    done = []
    with recorded(model) as record:
        for row in rows:
            model.encode([row["text"]], instruction=row["instruction"], max_length=row["max_length"])
            ids, pooled = record["input_ids"][0].tolist(), record["pool_mask"][0].tolist()
            first = pooled.index(1) if 1 in pooled else len(ids)
            done.append(
                {name: row[name] for name in ("instruction", "text", "max_length")}
                | {"input_ids": ids, "first_pooled": first}
            )
    return done


def make(download: Path, out: Path, weights: dict[str, torch.Tensor], load: Load = load_original) -> None:
    """Write OUT/tiny_a and OUT/tokenization.json."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        write_model(download, directory, weights)
        model = load(directory).eval()
        cases = _json(GOLDEN / "tiny_a" / "cases.json")
        expected = run_cases(model, cases)
        rows = run_tokenization(model, _json(GOLDEN / "tokenization.json"))
    for index, case in enumerate(cases):
        attended, pooled = (expected[f"case{index}.{name}"].int() for name in MASKS[1:])
        case["instruction_tokens"] = int((attended - pooled)[0].sum())
    tiny = out / "tiny_a"
    tiny.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / "tiny_a" / "config.json", tiny)
    (tiny / "cases.json").write_text(json.dumps(cases, indent=1, ensure_ascii=False), encoding="utf-8")
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    save_file(expected, tiny / "expected.safetensors")
    (out / "tokenization.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def compare(made: Path, golden: Path = GOLDEN) -> list[str]:
    """A line for every difference. Texts, ids and masks must be equal, states nearly so where tokens are."""
    problems = []
    for name in ("tiny_a/config.json", "tiny_a/cases.json", "tokenization.json"):
        if _json(made / name) != _json(golden / name):
            problems.append(f"{name} differs")
    got, wanted = (load_file(folder / "tiny_a" / "expected.safetensors") for folder in (made, golden))
    if set(got) != set(wanted):
        return [*problems, f"keys of one side alone: {', '.join(sorted(set(got) ^ set(wanted)))}"]
    for key, a in got.items():
        b, (case, _, name) = wanted[key], key.partition(".")
        if a.shape != b.shape or a.dtype != b.dtype:
            problems.append(f"{key}: {tuple(a.shape)} {a.dtype} against {tuple(b.shape)} {b.dtype}")
        elif name in MASKS:
            if not torch.equal(a, b):
                problems.append(f"{key} differs")
        else:
            if name != "embeddings":
                real = wanted[f"{case}.attention_mask"].bool()
                a, b = a[real], b[real]
            error = ((a - b).norm() / b.norm()).item()
            if not error < RELATIVE:
                problems.append(f"{key}: relative error {error:.2e}, allowed {RELATIVE:.0e}")
    return problems


def _json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.golden",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("make")
    one.add_argument("download", type=Path, metavar="DOWNLOAD")
    one.add_argument("out", type=Path, metavar="OUT")
    source = one.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", type=Path, metavar="FILE", help="safetensors under the published names")
    source.add_argument("--seed", type=int, metavar="N", help="of new weights")
    two = commands.add_parser("compare")
    two.add_argument("made", type=Path, metavar="OUT")
    two.add_argument("golden", type=Path, nargs="?", default=GOLDEN, help="[tests/golden]")
    args = parser.parse_args(argv)
    if args.command == "compare":
        problems = compare(args.made, args.golden)
        print("\n".join(problems) or "equal")
        return 1 if problems else 0
    config = NVEmbedConfig.from_file(GOLDEN / "tiny_a" / "config.json")
    weights = draw_weights(config, args.seed) if args.weights is None else load_file(args.weights)
    try:
        make(args.download, args.out, weights)
    except (OSError, RuntimeError) as error:
        parser.error(str(error))
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
