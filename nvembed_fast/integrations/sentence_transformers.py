"""NV-Embed in sentence-transformers: an input module on packed tokens, and `load`.

1. `preprocess` turns texts and a prompt into one row of tokens, one text behind the other without padding:
   input_ids [1, T], pool_mask [1, T] and cu_seq_lens_q [B + 1]. That is the library's flattened form. Its
   gradient cache cuts such a row at its texts.
2. `forward` gives sentence_embedding, [B, D] fp32. token_embeddings are made if they are asked for.
3. `save` writes the published layout into the folder of the library's own files.

The invariant: a prompt is never pooled, as in `NVEmbed.encode`. After a TypeError or an AttributeError of
`preprocess` the library calls again with the prompt as a part of the texts. So `preprocess` raises neither of
them, and cannot be called without a prompt.
"""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from nvembed_fast.checkpoint.hub import resolve
from nvembed_fast.checkpoint.pipeline import MODULES_FILE, OURS, SETTINGS_FILE, listed_modules, settings
from nvembed_fast.encoder import NVEmbed
from nvembed_fast.kernels.layout import SeqLayout, to_device
from nvembed_fast.packing import PackedBatch, token_budget_batches
from nvembed_fast.stream import BATCH_TOKENS, TextsCut, check_counts
from nvembed_fast.tokenization import TokenizedTexts, check_texts

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, InputModule, Module, Normalize
    from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm
except ImportError as error:
    raise ImportError(
        "nvembed_fast.integrations.sentence_transformers needs sentence-transformers 6: "
        "pip install 'nvembed-fast[sentence-transformers]'"
    ) from error

__all__ = ["NVEmbedModule", "load", "load_foreign"]

# modules of the library that may stand behind ours: none runs what its folder holds
_BEHIND = {kind.__name__: kind for kind in (Dense, Dropout, LayerNorm, Normalize)}
_MERGE = "model[0].network = model[0].network.merge_and_unload()"


class NVEmbedModule(InputModule):
    """An NV-Embed model as the first module of a `SentenceTransformer`.

    Attributes:
        network: the model on packed tokens, with all parameters. An adapter may take its place.
        encoder: the same model with its tokenizer. Its parameters are not counted twice.
    """

    save_in_root = True

    def __init__(self, encoder: NVEmbed):
        super().__init__()
        self.network = encoder.model
        # not as a submodule
        object.__setattr__(self, "encoder", encoder)
        self._takes_dtype_of_device = False

    @property
    def tokenizer(self):
        """See `NVEmbed.tokenizer`. `preprocess` reads tokenizer.json itself."""
        return self.encoder.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Tokens a text, prompt included. May be set."""
        return self.encoder.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.encoder.max_seq_length, _ = check_counts(value, None)

    def get_embedding_dimension(self) -> int:
        return self.encoder.config.hidden_size

    def get_config_dict(self) -> dict[str, Any]:
        return {"max_seq_length": self.max_seq_length}

    def preprocess(
        self, inputs: Sequence[str], prompt: str | None, task: str | None = None, **keywords: Any
    ) -> dict[str, torch.Tensor]:
        """Tokenize texts.

        Args:
            inputs: B texts.
            prompt: put in front of every text and not pooled. None for none.
            task: not looked at. The library chooses the prompt by it.

        Returns:
            input_ids [1, T] int64, pool_mask [1, T] bool, cu_seq_lens_q [B + 1] int32, on the CPU.

        Raises:
            ValueError: an input is no text, nothing of it is left to pool, or a keyword is unknown.
        """
        try:
            if given := sorted(name for name, value in keywords.items() if value is not None):
                raise ValueError(
                    f"NVEmbedModule takes no {', '.join(given)}: set model.max_seq_length to cut texts"
                )
            tokens = self._tokenized(inputs, prompt or "")
            keep = [np.arange(len(ids)) >= f for ids, f in zip(tokens.ids, tokens.first_pooled, strict=True)]
            borders = [0, *accumulate(tokens.lengths())]
            return {
                "input_ids": torch.from_numpy(np.concatenate(tokens.ids).astype(np.int64))[None],
                "pool_mask": torch.from_numpy(np.concatenate(keep))[None],
                "cu_seq_lens_q": torch.tensor(borders, dtype=torch.int32, device="cpu"),
            }
        except (TypeError, AttributeError) as error:
            raise ValueError(f"the texts cannot be tokenized: {error}") from error

    def forward(self, features: dict[str, Any], **keywords: Any) -> dict[str, Any]:
        """Embed tokens.

        In training all texts are one batch, in the caller's autocast. Else they are cut into batches by
        tokens and computed in the model's dtype, as `NVEmbed.encode` does it.

        Args:
            features: of `preprocess`, on the model's device.

        Returns:
            The features with sentence_embedding, [B, D] fp32. Asked for token_embeddings or attention_mask,
            they make both: [B, S, D] in the model's dtype with zeros at pads, and [B, S] int64.

        Raises:
            ValueError: features are not of that form, as after a cut by DataParallel, or a vector is not
                finite outside of training.
        """
        lengths = _lengths(features)
        ids, keep = features["input_ids"][0], features["pool_mask"][0]
        if self.training or torch.is_grad_enabled():
            with self.encoder.computing(autocast=True):
                vectors = self.network(PackedBatch(ids, SeqLayout(lengths, ids.device), keep))
            if self.training and vectors.requires_grad and self.network.config.is_untrained:
                self.network.config = dataclasses.replace(self.network.config, is_untrained=False)
        else:
            self.encoder.refresh()
            with self.encoder.computing(), _frozen(self.network.head):
                vectors = self._in_batches(ids, lengths, keep)
            if not vectors.sum(1).isfinite().all():
                raise ValueError(
                    f"a vector is NaN or Inf in {self.encoder.dtype}: a weight is not finite, or an "
                    "activation overflows. Load with model_kwargs={'dtype': 'bfloat16'}"
                )
        found = _Features(features)
        found["sentence_embedding"] = vectors
        found.make = partial(self._token_states, ids, lengths)
        return found

    def _tokenized(self, inputs: Sequence[str], prompt: str) -> TokenizedTexts:
        texts, max_length = check_texts(inputs), self.max_seq_length
        check_texts([prompt], "prompt")
        if not self.training:
            self.encoder.warn_about(texts)
        windows = [window for _, window in self.encoder.stream.tokenized(texts, prompt, max_length)]
        if any(window.num_cut for window in windows):
            # without their number: Python shows a message once
            warnings.warn(f"texts are cut at max_seq_length={max_length} tokens", TextsCut, stacklevel=4)
        return TokenizedTexts(
            [ids for window in windows for ids in window.ids],
            [first for window in windows for first in window.first_pooled],
        )

    def _in_batches(self, ids: torch.Tensor, lengths: list[int], keep: torch.Tensor) -> torch.Tensor:
        """[B, D] vectors, by batches that hold no more tokens than those of `NVEmbed.encode`."""
        device, starts = ids.device, [0, *accumulate(lengths)]
        vectors = torch.empty(
            len(lengths), self.get_embedding_dimension(), dtype=torch.float32, device=device
        )
        for rows in token_budget_batches(lengths, BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])):
            places = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in rows])
            at = to_device(torch.from_numpy(places), device)
            layout = SeqLayout([lengths[row] for row in rows], device)
            part = self.network(PackedBatch(ids[at], layout, keep[at]))
            vectors.index_copy_(0, to_device(torch.tensor(rows, device="cpu"), device), part.float())
        return vectors

    def _token_states(self, ids: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
        layout = SeqLayout(lengths, ids.device)
        with self.encoder.computing():
            states = self.network.token_states(PackedBatch(ids, layout))
        mask = [torch.ones(length, dtype=torch.int64, device=ids.device) for length in lengths]
        return {
            "token_embeddings": pad_sequence(list(states.split(lengths)), batch_first=True),
            "attention_mask": pad_sequence(mask, batch_first=True),
        }

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """See `NVEmbedModel.checkpoint_layers`.

        Args:
            gradient_checkpointing_kwargs: of `torch.utils.checkpoint.checkpoint`.
            every_n_layers: 1 for all layers.
            offload: must be False.

        Raises:
            ValueError: they ask for the reentrant form or for offload.
        """
        if offload:
            raise ValueError("offload=True is not supported: leave it out")
        options = gradient_checkpointing_kwargs or {}
        self.network.checkpoint_layers(every_n_layers=every_n_layers, **options)

    def gradient_checkpointing_disable(self) -> None:
        self.network.keep_layers()

    def save(self, output_path: str | PathLike, *arguments: Any, **keywords: Any) -> None:
        """Write the model in the published layout. The library's own files there stay.

        Raises:
            ValueError: the model holds an adapter. FileExistsError: another model lies there.
        """
        if self.network is not self.encoder.model:
            raise ValueError(
                "the network is wrapped, such as by an adapter, and only a plain one can be saved. Merge it "
                f"first ({_MERGE}), and train with save_strategy='no'"
            )
        written = Path(output_path) / SETTINGS_FILE
        self.encoder.save_pretrained(output_path, beside=[written] if written.is_file() else [])

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **keywords: Any,
    ) -> "NVEmbedModule":
        """Read what `save` has written, for inference and training.

        Args:
            model_kwargs: keywords of `NVEmbed.from_pretrained`, such as dtype, impl and latents.

        Raises:
            TypeError: a keyword in model_kwargs is unknown.
            ValueError: an argument asks for what is not here.
        """
        for name, value in (("processor_kwargs", processor_kwargs), ("config_kwargs", config_kwargs)):
            if value:
                raise ValueError(
                    f"NVEmbedModule takes no {name}, got {value}: set model.max_seq_length, or pass "
                    "model_kwargs"
                )
        if backend != "torch":
            raise ValueError(f"NVEmbedModule runs in torch, got backend={backend!r}: leave it out")
        hub: dict[str, Any] = {"token": token, "revision": revision, "local_files_only": local_files_only}
        model_kwargs = {} if model_kwargs is None else model_kwargs
        if model_kwargs.get("cuda_graphs"):
            raise ValueError("cuda_graphs=True changes nothing in a SentenceTransformer: use NVEmbed itself")
        source = model_name_or_path
        if subfolder:
            source = str(Path(model_name_or_path) / subfolder)
        module = cls(_FirstModule.from_pretrained(source, cache_dir=cache_folder, **hub, **model_kwargs))
        module.network.requires_grad_(True)
        asked = [model_kwargs.get("dtype"), model_kwargs.get("torch_dtype")]
        module._takes_dtype_of_device = all(dtype in (None, "auto") for dtype in asked)
        return module

    def on_model_ready(self, model: SentenceTransformer) -> None:
        """The library calls it when the model is built, and on its device."""
        if self._takes_dtype_of_device and self.encoder.device.type == "cpu":
            self.network.float()
        for behind in list(model)[1:]:  # the library gives them our dtype, and a vector is fp32
            behind.float()
        model.check_peft_compatible_model = _refuse_adapter

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise ValueError(
            "DataParallel cannot cut a packed batch: start one process per GPU (torchrun), or let one GPU be "
            "seen (CUDA_VISIBLE_DEVICES=0)"
        )


class _FirstModule(NVEmbed):
    """A model whose directory may name further modules, because the library runs them."""

    _others_run = True


class _Features(dict):
    """Features of a forward. States of tokens cost a second pass, so they wait until they are asked for."""

    make: Callable[[], dict[str, torch.Tensor]] | None = None

    def __missing__(self, name: str) -> torch.Tensor:
        if self.make is None or name not in ("token_embeddings", "attention_mask"):
            raise KeyError(name)
        self.update(self.make())
        return self[name]


def load(
    path_or_id: str | PathLike,
    *,
    device: str | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_folder: str | None = None,
    local_files_only: bool = False,
    prompts: dict[str, str] | None = None,
    default_prompt_name: str | None = None,
    similarity_fn_name: str | None = None,
    truncate_dim: int | None = None,
    model_card_data: Any = None,
    model_kwargs: dict[str, Any] | None = None,
    processor_kwargs: dict[str, Any] | None = None,
    config_kwargs: dict[str, Any] | None = None,
    backend: str = "torch",
    trust_remote_code: bool = False,
) -> SentenceTransformer:
    """A `SentenceTransformer` of an NV-Embed model. It runs no code of the model's directory.

    Args:
        path_or_id: a directory or a hub id, saved by this package, by sentence-transformers or as published,
            or "demo". Behind ours it may have a Dense, Dropout, LayerNorm or Normalize of that library.
        device: where the weights go, tensor by tensor. None: the GPU if there is one, else the CPU.
        revision, token, cache_folder, local_files_only, prompts, default_prompt_name, similarity_fn_name,
            truncate_dim, model_card_data: as in `SentenceTransformer`. None takes what was saved.
        model_kwargs: keywords of `NVEmbed.from_pretrained`, such as dtype, impl and latents.
        processor_kwargs, config_kwargs, backend: refused, if they ask for anything.
        trust_remote_code: accepted and not needed.

    Raises:
        FileNotFoundError, ValueError: something is missing or wrong. The message names it.
    """
    cache_folder = cache_folder or os.getenv("SENTENCE_TRANSFORMERS_HOME")
    hub: dict[str, Any] = {"token": token, "local_files_only": local_files_only}
    directory = resolve(path_or_id, revision=revision, cache_dir=cache_folder, config_only=True, **hub)
    behind, saved = _behind(directory), settings(directory)
    asked = {
        "default_prompt_name": default_prompt_name,
        "similarity_fn_name": similarity_fn_name,
        "truncate_dim": truncate_dim,
    }
    module = NVEmbedModule.load(
        os.fspath(path_or_id),
        revision=directory.name,  # a snapshot's folder is named by its commit, so all is of one
        cache_folder=cache_folder,
        model_kwargs=(model_kwargs or {}) | ({} if device is None else {"device": device}),
        processor_kwargs=processor_kwargs,
        config_kwargs=config_kwargs,
        backend=backend,
        **hub,
    )
    given = Path(os.path.expanduser(path_or_id))
    # a killed save leaves these folders where they are: see `files.current`
    root = given if directory.parent == given else directory
    model = SentenceTransformer(
        modules=[module, *(_built(kind, root, folder) for kind, folder in behind)],
        device=str(module.encoder.device),
        prompts={**saved.get("prompts", {}), **(prompts or {})},
        **{name: saved.get(name) if value is None else value for name, value in asked.items()},
        model_card_data=model_card_data,
    )
    if (root / "README.md").is_file():  # saving writes it again
        model._model_card_text = (root / "README.md").read_text("utf-8", "replace")
    return model


def load_foreign(path_or_id: str | PathLike, *, device: str | None = None) -> SentenceTransformer:
    """A model that is not of this package, such as a teacher. It runs no code of the model's directory.

    Raises:
        ValueError: the model cannot be loaded. The message names it.
    """
    try:
        return SentenceTransformer(os.path.expanduser(path_or_id), device=device)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path_or_id} is no model of sentence-transformers: {error}") from error


def _behind(directory: Path) -> list[tuple[type[Module], str]]:
    """Class and folder of each module behind ours.

    Raises:
        ValueError: modules.json names another one, or does not begin with ours.
    """
    file, listed = directory / MODULES_FILE, listed_modules(directory)
    types = [kind for kind, _ in listed]
    if OURS not in types:  # as published, for other code
        return []
    if OURS in types[1:]:
        raise ValueError(f"{file} must name {OURS} once and first, got {', '.join(types)}")
    for kind in types[1:]:
        if not kind.startswith("sentence_transformers.") or kind.rpartition(".")[2] not in _BEHIND:
            raise ValueError(
                f"{file} names {kind}, which is of neither this package nor {', '.join(_BEHIND)} of "
                "sentence-transformers. If you trust it: SentenceTransformer(path, trust_remote_code=True)"
            )
    return [(_BEHIND[kind.rpartition(".")[2]], folder) for kind, folder in listed[1:]]


def _built(kind: type[Module], root: Path, folder: str) -> Module:
    try:
        activation = str(kind.load_config(str(root), folder).get("activation_function", "torch.nn."))
        if not activation.startswith("torch.nn."):  # the library would take another one
            raise ValueError(f"its activation_function {activation} is not of torch.nn")
        return kind.load(str(root), folder)
    except (AttributeError, ImportError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{root / folder} holds no {kind.__name__} that can be loaded: {error}") from error


def _lengths(features: dict[str, Any]) -> list[int]:
    """Tokens of each text, on the host. Waits for the device."""
    missing = [name for name in ("input_ids", "pool_mask", "cu_seq_lens_q") if name not in features]
    if missing:
        raise ValueError(f"the features have no {missing[0]}: make them with model.preprocess(texts)")
    borders = features["cu_seq_lens_q"].tolist()
    shape = (1, borders[-1] if borders else 0)
    given = [tuple(features[name].shape) for name in ("input_ids", "pool_mask")]
    if borders[:1] != [0] or given != [shape, shape]:
        raise ValueError(
            f"input_ids and pool_mask must be [1, T] with cu_seq_lens_q from 0 to T, got {given[0]}, "
            f"{given[1]} and {borders[:1]} to {borders[-1:]}: a packed batch must not be cut or stacked, as "
            "DataParallel and dispatch_batches do"
        )
    return [stop - start for start, stop in zip(borders, borders[1:], strict=False)]


@contextmanager
def _frozen(head: nn.Module) -> Iterator[None]:
    """Inside, the head may keep what it builds from its weights: see `LatentHead.stale`."""
    trained = [weight for weight in head.parameters() if weight.requires_grad]
    try:
        for weight in trained:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def _refuse_adapter() -> NoReturn:
    raise ValueError(
        "this model takes adapters of peft around its network: model[0].network = "
        "peft.get_peft_model(model[0].network, peft.LoraConfig(target_modules=['qkv_proj', 'o_proj', "
        f"'gate_up_proj', 'down_proj'])). Before saving, merge: {_MERGE}"
    )
