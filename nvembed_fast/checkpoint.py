"""The published checkpoint directory <-> our modules.

The published layout names every projection on its own; ours packs query, key
and value into one weight and gate and up into another. `published_tensors` is
the whole translation. Reading and writing both go through it, tensor by tensor:

1. Everything that can be wrong without reading weights (files, names, shapes,
   dtypes) is checked from the headers before the first byte is copied.
2. The model is built on the meta device; each tensor is copied in pieces of at
   most 64 MiB straight into its rows on its device, in its dtype. A piece maps
   the file anew, because touched pages of a mapping count as memory in use.
3. What was copied is checked for NaN and Inf where it lies.

Only safetensors files are read: a pickle can run code.
"""

import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.model import NVEmbedModel

__all__ = [
    "Slot",
    "check_device",
    "check_dtype",
    "empty_parameters",
    "load_model",
    "load_weights",
    "ordinary_mode",
    "published_tensors",
    "resolve",
    "save_model",
    "stored_tensors",
    "tokenizer_files",
]

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

_WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# buffers that older versions of transformers stored along with the weights
HARMLESS = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_SHORT_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
_PIECE_BYTES = 64 * 2**20
_BAR_AFTER_S = 2.0


@dataclass(frozen=True)
class Slot:
    """Where a published tensor lives in our model.

    Attributes:
        parameter: our parameter's name.
        rows: the rows of it that this tensor fills.
        shape: the published tensor's shape.
    """

    parameter: str
    rows: slice
    shape: tuple[int, ...]


def published_tensors(config: NVEmbedConfig) -> dict[str, Slot]:
    """Every tensor name of the published layout, in the model's order, and its place in ours."""
    text, head = config.text_config, config.latent_attention_config
    d, f, c = text.hidden_size, text.intermediate_size, head.latent_dim
    q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    inner = head.num_cross_heads * head.cross_dim_head
    # published name, our name, published shape; lines of one parameter fill its rows from the top
    layer = (
        ("input_layernorm.weight", "input_layernorm.weight", (d,)),
        ("self_attn.q_proj.weight", "self_attn.qkv_proj.weight", (q, d)),
        ("self_attn.k_proj.weight", "self_attn.qkv_proj.weight", (kv, d)),
        ("self_attn.v_proj.weight", "self_attn.qkv_proj.weight", (kv, d)),
        ("self_attn.o_proj.weight", "self_attn.o_proj.weight", (d, q)),
        ("post_attention_layernorm.weight", "post_attention_layernorm.weight", (d,)),
        ("mlp.gate_proj.weight", "mlp.gate_up_proj.weight", (f, d)),
        ("mlp.up_proj.weight", "mlp.gate_up_proj.weight", (f, d)),
        ("mlp.down_proj.weight", "mlp.down_proj.weight", (d, f)),
    )
    feed_forward = (
        ("cross_attend_blocks.1.norm.weight", "ff_norm.weight", (d,)),
        ("cross_attend_blocks.1.norm.bias", "ff_norm.bias", (d,)),
        ("cross_attend_blocks.1.fn.net.0.weight", "ff_up.weight", (8 * d, d)),
        ("cross_attend_blocks.1.fn.net.0.bias", "ff_up.bias", (8 * d,)),
        ("cross_attend_blocks.1.fn.net.2.weight", "ff_down.weight", (d, 4 * d)),
        ("cross_attend_blocks.1.fn.net.2.bias", "ff_down.bias", (d,)),
    )
    latent = (
        ("latents", "latents", (head.num_latents_value, c)),
        ("cross_attend_blocks.0.norm.weight", "cross_norm.weight", (d,)),
        ("cross_attend_blocks.0.norm.bias", "cross_norm.bias", (d,)),
        ("cross_attend_blocks.0.norm_context.weight", "context_norm.weight", (c,)),
        ("cross_attend_blocks.0.norm_context.bias", "context_norm.bias", (c,)),
        ("cross_attend_blocks.0.fn.to_q.weight", "to_q.weight", (inner, d)),
        ("cross_attend_blocks.0.fn.to_kv.weight", "to_kv.weight", (2 * inner, c)),
        ("cross_attend_blocks.0.fn.to_out.weight", "to_out.weight", (d, inner)),
        *feed_forward,
    )
    # no published model has this head: named after the latent one
    self_attention = (
        ("cross_attend_blocks.0.norm.weight", "cross_norm.weight", (d,)),
        ("cross_attend_blocks.0.norm.bias", "cross_norm.bias", (d,)),
        ("cross_attend_blocks.0.fn.to_qkv.weight", "to_qkv.weight", (3 * q, d)),
        ("cross_attend_blocks.0.fn.to_out.weight", "to_out.weight", (d, q)),
        *feed_forward,
    )
    # prefix of the published names, prefix of ours, lines
    backbone, layers = (
        "embedding_model.",
        [f"embedding_model.layers.{i}." for i in range(text.num_hidden_layers)],
    )
    groups = [(backbone, backbone, (("embed_tokens.weight", "embed_tokens.weight", (text.vocab_size, d)),))]
    groups += [(prefix, prefix, layer) for prefix in layers]
    groups += [(backbone, backbone, (("norm.weight", "norm.weight", (d,)),))]
    if config.pooling_head == "latent":
        groups += [("latent_attention_model.", "head.", latent)]
    elif config.pooling_head == "self_attention":
        groups += [("self_attention_model.", "head.", self_attention)]

    table: dict[str, Slot] = {}
    filled: dict[str, int] = defaultdict(int)
    for published_prefix, prefix, lines in groups:
        for published, ours, shape in lines:
            first = filled[prefix + ours]
            filled[prefix + ours] += shape[0]
            table[published_prefix + published] = Slot(prefix + ours, slice(first, first + shape[0]), shape)
    return table


def check_device(device: str | torch.device) -> torch.device:
    """The device, or a ValueError when it is not there."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is not a device: use 'cpu', 'cuda' or 'cuda:0'") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        have = f"only {count} CUDA device(s), from cuda:0" if count else "no CUDA device"
        raise ValueError(
            f"device {str(device)!r} is not there: torch {torch.__version__} finds {have}. "
            "Use device='cpu', or a torch built for CUDA on a machine with a GPU"
        )
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(device)!r} is not there: {error}") from error
    if found.type == "meta":
        raise ValueError("device 'meta' holds no weights: use 'cpu' or 'cuda'")
    return found


def check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype that weights can have, from itself or its name, or a ValueError."""
    found = dtype
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        found = getattr(torch, _SHORT_NAMES.get(name, name), None)
    if found not in _DTYPES.values():
        names = ", ".join(_name(d) for d in _DTYPES.values())
        raise ValueError(f"dtype must be one of {names}, got {dtype!r}")
    return found


def resolve(
    path_or_id: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local directory of a model: the path itself, or a snapshot of a hub id.

    Only the config, safetensors and tokenizer files of a hub id are fetched, never code or pickles.

    Raises:
        FileNotFoundError: no such directory and no such hub id, or the hub is out of reach.
        ValueError: the path is a file.
    """
    name, path = str(path_or_id), Path(path_or_id).expanduser()
    if name and path.is_dir():  # no name is no directory: as a path it would be the working directory
        return path
    if path.is_file():
        raise ValueError(f"{path} is a file: pass the directory that holds {CONFIG_FILE} and the weights")
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"no directory {name!r}, and no hub id either (those read OWNER/NAME)")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        snapshot = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=[CONFIG_FILE, "model*.safetensors", INDEX_FILE, *TOKENIZER_FILES],
        )
    except HFValidationError as error:
        raise FileNotFoundError(f"no directory {name}, and no hub id either: {error}") from error
    except OSError as error:  # every error of the hub's client and of the network below it is one
        raise FileNotFoundError(_why_not_fetched(name, revision, error)) from error
    return Path(snapshot)


def _why_not_fetched(name: str, revision: str | None, error: OSError) -> str:
    from huggingface_hub import errors

    what = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
    if isinstance(error, errors.GatedRepoError):
        return (
            f"hub id {what} is gated: accept its terms on its page, then pass token=... (or: hf auth login)"
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        return f"no directory {name}, and the hub has no {what}, or not without a token (token=...)"
    return (
        f"no directory {name}, and hub id {what} is neither cached nor within reach "
        f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}). "
        f"Where there is a network, run: hf download {name} --local-dir DIRECTORY, and pass that directory "
        "(NVIDIA's need their terms accepted on the hub, and hf auth login)"
    )


def tokenizer_files(directory: str | os.PathLike) -> list[Path]:
    """The tokenizer files of a model directory that exist."""
    return [p for name in TOKENIZER_FILES if (p := Path(directory) / name).is_file()]


def load_model(
    directory: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    progress: bool | None = None,
) -> NVEmbedModel:
    """Read a published checkpoint directory.

    Host memory beyond the weights stays within two pieces of 64 MiB, on any device.

    Args:
        directory: config.json, and model.safetensors or shards with their index.
        device: where the weights go.
        dtype: of the weights. None takes float32 on a CPU and the checkpoint's own (torch_dtype) elsewhere.
        progress: show a bar. None shows one in a terminal, when loading takes more than two seconds.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file or a tensor is not what the config asks for, or holds NaN or Inf.
    """
    directory = Path(directory)
    config = NVEmbedConfig.from_file(directory / CONFIG_FILE)
    device = check_device(device)
    stored_dtype = check_dtype(config.torch_dtype)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else stored_dtype
    dtype = check_dtype(dtype)

    with torch.device("meta"):
        model = NVEmbedModel(config)
    values = load_weights(directory, published_tensors(config), device=device, dtype=dtype, progress=progress)
    # strict: a parameter of ours that the table does not name is an error here, never a tensor left on meta
    model.load_state_dict(values, assign=True)
    return model


def empty_parameters(
    table: dict[str, Slot], *, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Our parameters that the slots of `table` fill, uninitialised: memory is taken as they are filled."""
    shapes: dict[str, tuple[int, ...]] = {}
    for slot in table.values():
        height = max(slot.rows.stop, shapes.get(slot.parameter, (0,))[0])
        shapes[slot.parameter] = (height, *slot.shape[1:])
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}


def load_weights(
    directory: Path,
    table: dict[str, Slot],
    *,
    device: torch.device,
    dtype: torch.dtype,
    ignored: re.Pattern = HARMLESS,
    progress: bool | None = None,
) -> dict[str, torch.Tensor]:
    """Read the tensors that `table` names from a directory of safetensors: our parameters by name.

    `ignored` matches the names that may lie beside them. Otherwise as `load_model`.
    """
    files = stored_tensors(directory)
    _check_tensors(directory, files, table, ignored)
    values = empty_parameters(table, device=device, dtype=dtype)
    total = sum(torch.Size(slot.shape).numel() for slot in table.values()) * dtype.itemsize
    with _bar(total, progress) as bar:
        for file, header in files.items():
            extremes: dict[str, torch.Tensor] = {}
            for name in filter(table.__contains__, header):
                slot = table[name]
                target = values[slot.parameter][slot.rows]
                for rows, piece in _pieces(file, name, slot.shape):
                    target[rows].copy_(piece.to(device))
                    bar.update(target[rows].nbytes)
                extremes[name] = torch.stack(target.aminmax())
            # one wait for the device per file
            _check_finite(file, extremes, dtype)
    return values


def stored_tensors(directory: Path) -> dict[Path, dict[str, tuple[str, tuple[int, ...]]]]:
    """Per safetensors file of a directory: its tensors' (dtype, shape), from the headers alone.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or the index and the files disagree.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.exists() and index.exists():
        raise ValueError(
            f"{directory} holds {SINGLE_FILE} and {INDEX_FILE}: remove the one that is out of date"
        )
    if single.exists():
        return {single: _header(single)}
    if not index.exists():
        pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
        if pickles:
            raise ValueError(
                f"{directory} holds {', '.join(pickles)} and no safetensors: a pickle can run code, so only "
                "safetensors are read. Where you trust the file: "
                "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
            )
        raise FileNotFoundError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")

    promised: dict[str, set[str]] = defaultdict(set)
    for tensor, file in _read_index(index).items():
        promised[file].add(tensor)
    files: dict[Path, dict] = {}
    owner: dict[str, str] = {}
    for file, tensors in sorted(promised.items()):
        if not (directory / file).is_file():
            raise FileNotFoundError(
                f"{directory / file} is missing: {INDEX_FILE} places {len(tensors)} tensors in it, "
                f"{min(tensors)!r} among them. Download it again"
            )
        header = _header(directory / file)
        if absent := sorted(tensors - header.keys()):
            raise ValueError(f"{INDEX_FILE} places {_some(absent)} in {file}, which does not hold it")
        for tensor in header:
            if tensor in owner:
                raise ValueError(f"tensor {tensor!r} is in {owner[tensor]} and in {file}: remove one")
            owner[tensor] = file
        files[directory / file] = header
    return files


def _read_index(index: Path) -> dict[str, str]:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names: set[str] = set()
        for name, _ in pairs:
            if name in names:
                raise ValueError(f"{name!r} is listed twice")
            names.add(name)
        return dict(pairs)

    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=once)["weight_map"]
        if not isinstance(weight_map, dict):
            raise ValueError("weight_map is not an object")
        for tensor, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{tensor!r} is placed in {file!r}, which is no safetensors file beside it")
    except (ValueError, KeyError, TypeError) as error:
        what = f"no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{index}: {what}") from error
    return weight_map


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(file, framework="pt") as stored:
            # reads the header only, until a slice is indexed
            views = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
            return {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{file} is cut short or no safetensors file ({error}; {file.stat().st_size} bytes are there): "
            "download it again"
        ) from error


def _check_tensors(
    directory: Path, files: dict[Path, dict], table: dict[str, Slot], ignored: re.Pattern
) -> None:
    found = {name: (file, *facts) for file, header in files.items() for name, facts in header.items()}
    missing = [name for name in table if name not in found]
    extra = [name for name in found if name not in table and not ignored.fullmatch(name)]
    if missing:
        renamed = next((e for e in extra if e.endswith("." + missing[0])), None)
        hint = f". It holds {renamed!r}: rename its tensors" if renamed else ""
        raise ValueError(f"{directory}: the weights lack {_some(missing)}{hint}")
    if extra:
        raise ValueError(
            f"{directory}: the weights hold {_some(extra)}, which no model of this {CONFIG_FILE} has. "
            "The config and the weights are of different models"
        )
    for name, slot in table.items():
        file, dtype, shape = found[name]
        if shape != slot.shape:
            raise ValueError(
                f"{file}: tensor {name!r} must be {list(slot.shape)} by {CONFIG_FILE}, found {list(shape)}"
            )
        if dtype not in _DTYPES:
            raise ValueError(
                f"{file}: tensor {name!r} has dtype {dtype}, only {', '.join(_DTYPES)} can be read: "
                "quantised weights must be expanded first"
            )


def _pieces(file: Path, name: str, shape: tuple[int, ...]) -> Iterator[tuple[slice, torch.Tensor]]:
    row_bytes = 4 * max(1, torch.Size(shape[1:]).numel())
    step = max(1, _PIECE_BYTES // row_bytes)
    for first in range(0, shape[0], step):
        rows = slice(first, min(first + step, shape[0]))
        with safe_open(file, framework="pt") as stored:
            yield rows, stored.get_slice(name)[rows]


def _check_finite(file: Path, extremes: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """`extremes`: per tensor its smallest and largest value as copied; NaN in it makes both NaN."""
    if not extremes:
        return
    bad = ~torch.stack(list(extremes.values())).isfinite().all(1).cpu()
    for name, is_bad in zip(extremes, bad.tolist(), strict=True):
        if not is_bad:
            continue
        with safe_open(file, framework="pt") as stored:
            low, high = (v.item() for v in stored.get_tensor(name).double().aminmax())
        largest = max(abs(low), abs(high))
        if largest < float("inf"):
            raise ValueError(
                f"{file}: tensor {name!r} reaches {largest:.4g}, more than {_name(dtype)} holds: "
                "load with dtype='bfloat16' or 'float32'"
            )
        raise ValueError(
            f"{file}: tensor {name!r} holds NaN or Inf: the file is damaged, or training diverged"
        )


def _bar(total: int, progress: bool | None) -> tqdm:
    return tqdm(
        total=total,
        desc="loading",
        unit="B",
        unit_scale=True,
        delay=0 if progress else _BAR_AFTER_S,
        disable=None if progress is None else not progress,  # None: only in a terminal
    )


def save_model(
    model: NVEmbedModel,
    directory: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer_files: Iterable[str | os.PathLike] = (),
) -> None:
    """Write a model as a published checkpoint directory; `load_model` gives it back bit for bit.

    Everything is written aside and then renamed in place of an earlier save. An error or an interruption
    leaves the directory with the whole old model (nothing, where there was none) or, from the last rename on,
    the whole new one. A killed process may leave `.saving-*` (new) and `.old-*` (old) in it, never a mix that
    loads.

    Args:
        model: the model, on any device.
        directory: created if need be.
        dtype: of the stored weights; None keeps the model's.
        max_shard_bytes: the largest size of one file's tensors; a single tensor may exceed it.
        tokenizer_files: files to copy beside the weights, see `tokenizer_files`.

    Raises:
        ValueError: a weight does not fit the dtype, or is NaN or Inf.
        OSError: the files cannot be written; or an old model cannot be put back, and the two folders that
            hold the rest of the old and the new one are named.
    """
    directory = Path(directory)
    table = published_tensors(model.config)
    parameters = dict(model.named_parameters())
    dtype = check_dtype(dtype if dtype is not None else model.embedding_model.embed_tokens.weight.dtype)
    config = replace(model.config, torch_dtype=_name(dtype))
    copies = [Path(p) for p in tokenizer_files]

    with _created(directory):
        aside = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
        retired = aside.with_name(aside.name.replace(".saving-", ".old-"))
        try:
            shards = _shards(table, dtype, max_shard_bytes)
            for file, names in shards.items():
                tensors = {name: _published_value(name, table[name], parameters, dtype) for name in names}
                save_file(tensors, aside / file, metadata={"format": "pt"})
                # safetensors writes for the owner alone; the directory says who may read
                (aside / file).chmod(ordinary_mode())
            if len(shards) > 1:
                weight_map = {name: file for file, names in shards.items() for name in names}
                total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
                _write_json(aside / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
            for path in copies:
                shutil.copyfile(path, aside / path.name)
            _write_json(aside / CONFIG_FILE, config.to_dict())
            _exchange(directory, aside, retired)
        except BaseException as error:
            if not retired.exists():  # else both folders still hold files
                shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, SafetensorError):
                raise OSError(f"cannot write the weights to {directory}: {error}") from error
            raise


@contextmanager
def _created(directory: Path) -> Iterator[None]:
    """The directory, made with its parents; on an error those made here are removed again, if empty."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


def ordinary_mode() -> int:
    """The mode of an ordinary new file."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _shards(table: dict[str, Slot], dtype: torch.dtype, max_bytes: int) -> dict[str, list[str]]:
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, slot in table.items():
        size = torch.Size(slot.shape).numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}


def _published_value(
    name: str, slot: Slot, parameters: dict[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    rows = parameters[slot.parameter].detach()[slot.rows]
    value = rows.to(dtype)
    if not torch.stack(value.aminmax()).isfinite().all():
        why = f"does not fit {_name(dtype)}" if rows.isfinite().all() else "holds NaN or Inf"
        raise ValueError(f"tensor {name!r} {why}: nothing was saved")
    return value.cpu().contiguous()


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _exchange(directory: Path, aside: Path, retired: Path) -> None:
    """Move the old model's files to `retired`, those of `aside` into their place, and delete the old.

    On an error before the last rename the old files are put back. A directory without config.json is no
    model: it leaves first and comes last, both ways, so that no moment shows a mix that loads.
    """
    new = sorted(os.listdir(aside), key=lambda name: name == CONFIG_FILE)
    old = [name for name in os.listdir(directory) if name in new or _WEIGHT_FILES.fullmatch(name)]
    old.sort(key=lambda name: name != CONFIG_FILE)
    try:
        retired.mkdir()
        _move(old, directory, retired)
        _move(new, aside, directory)
        shutil.rmtree(retired)
        aside.rmdir()
    except BaseException:
        # what was moved is read from the disk: an interruption may come right after a rename
        if not (aside / CONFIG_FILE).exists():
            shutil.rmtree(retired, ignore_errors=True)
            raise
        try:
            _move([name for name in new if not (aside / name).exists()], directory, aside)
            # lexists: a hub snapshot's files are relative links, which point nowhere from `retired`
            _move([name for name in reversed(old) if os.path.lexists(retired / name)], retired, directory)
            with suppress(FileNotFoundError):
                retired.rmdir()
        except BaseException as error:
            raise OSError(
                f"saving to {directory} failed, and so did putting the old model back ({error!r}): files of "
                f"the old one are in {retired}, of the new one in {aside}, the rest of both in {directory}"
            ) from error
        raise


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        os.replace(source / name, target / name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {names[0]!r}{more}"
