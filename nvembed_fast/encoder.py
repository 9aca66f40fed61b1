"""NVEmbed: texts in, vectors out. The drop-in replacement for the original's model class.

A model is loaded in three steps. Its config is parsed, `placement` decides where and how it computes, and its
weights are read. Texts are embedded by `stream`. Keywords of the original are translated by `legacy`.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from os import PathLike
from pathlib import Path
from types import EllipsisType
from typing import Any, Literal, NoReturn, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from nvembed_fast import checkpoint, files, fingerprint, legacy, ops
from nvembed_fast.checkpoint.pipeline import LENGTH_FILE, MODULES_FILE, SETTINGS_FILE
from nvembed_fast.config import (
    DEFAULT_LENGTH,
    Latents,
    NVEmbedConfig,
    Precision,
    instruction_of,
    query_instruction,
)
from nvembed_fast.graphs import MAX_TOKENS, MIN_BUCKET, SingleTextGraphs
from nvembed_fast.network.latent_head import LatentHead
from nvembed_fast.network.mistral import MistralBackbone
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.network.pooling_heads import PoolingHead
from nvembed_fast.packing import PackedBatch
from nvembed_fast.placement import Placement
from nvembed_fast.precision import check_precision, check_ranges, quantized
from nvembed_fast.stream import Progress, Result, TextStream, check_counts
from nvembed_fast.tokenization import TextTokenizer, text_list
from nvembed_fast.warm_up import batches

__all__ = ["NVEmbed", "UntrainedModel", "instruction_of", "query_instruction"]

# names of the original for modules of `NVEmbedModel`
_VIEWS = {"embedding_model": "embedding_model", "latent_attention_model": "head"}
_UNTRAINED = (
    "this model is untrained (is_untrained in config.json), so its vectors rank poorly: train it first"
)
# transformers cannot be imported by two threads at once
_TRANSFORMERS = threading.Lock()


class UntrainedModel(UserWarning):
    """A model that `init_model` made embeds texts before its training. Told once per loaded model."""


class NVEmbed(nn.Module):
    """An NV-Embed model with its tokenizer.

    Attributes:
        model: the model on packed tokens.
        text_tokenizer: texts to ids.
        graphs: runs a short text that comes alone. None runs it like all others.
        max_seq_length: tokens per text where a call names no max_length. May be set, and is saved.
    """

    _others_run = False  # behind the model, such as the modules of sentence-transformers

    def __init__(
        self, model: NVEmbedModel, text_tokenizer: TextTokenizer, placement: Placement | None = None
    ):
        """
        Args:
            model: with its weights.
            text_tokenizer: the tokenizer of these weights.
            placement: how the model computes. None decides by the model as it is.

        Raises:
            ValueError: the tokenizer gives an id that the embedding has not.
        """
        super().__init__()
        self.model = model
        text_tokenizer.check_ids(model.config.text_config.vocab_size)
        self.text_tokenizer = text_tokenizer
        if placement is None:
            placement = Placement.decide(model.config, device=self.device, dtype=self.dtype)
        self._placement = placement
        if placement.latents is not None and isinstance(model.head, LatentHead):
            model.head.mode = placement.latents
        self.graphs = SingleTextGraphs(model) if placement.cuda_graphs else None
        self.max_seq_length = DEFAULT_LENGTH
        self._transformers_tokenizer = None
        self._tells_untrained = True
        # names of the weights, if loading rounded or merged them: as they were loaded, and of their files
        self._weights_loaded: tuple[str, str] | None = None

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if isinstance(found, nn.DataParallel):
            found = legacy.on_one_device(found)
            super().__setattr__(name, found)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        legacy.check_attribute(name)
        if name in _VIEWS:
            setattr(self.model, _VIEWS[name], legacy.on_one_device(value))
        elif name == "padding_side":
            self.tokenizer.padding_side = value
        else:
            super().__setattr__(name, value)

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise ValueError("DataParallel cannot cut a packed batch: start one process per GPU")

    @property
    def embedding_model(self) -> MistralBackbone:
        """The backbone, under the original's name."""
        return self.model.embedding_model

    @property
    def latent_attention_model(self) -> PoolingHead:
        """The pooling head, under the original's name."""
        return self.model.head

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | PathLike | None = None,
        *,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        impl: ops.Impl = "auto",
        latents: Latents = "auto",
        cuda_graphs: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike | None = None,
        local_files_only: bool = False,
        adapter: str | PathLike | None = None,
        show_progress: bool | None = None,
        **old_keywords: Any,
    ) -> "NVEmbed":
        """Load a checkpoint in the published layout, for inference.

        Args:
            path_or_id: a directory, or a model's id on the hub such as "nvidia/NV-Embed-v2". "demo" is the
                small model of the package, where it is shipped (`checkpoint.demo`).
            device: where the weights go, tensor by tensor. None: the GPU if there is one, else the CPU.
            dtype: of the weights and the computation, as torch.dtype or by name. None: the checkpoint's on a
                GPU, float32 on a CPU. Pooling and the result are float32 always.
            impl: "triton" kernels, PyTorch's "library" operations, plain "torch", or "auto": see `ops`.
            latents: "absorbed", "direct" (the strict order of the original), or "auto": the cheaper one.
            cuda_graphs: a text of at most 256 tokens that comes alone replays a CUDA graph, captured once for
                each power of two of tokens: less latency, some more memory. For Triton kernels on a GPU.
            revision, token, cache_dir, local_files_only: as in huggingface_hub.
            adapter: a directory of `checkpoint.save_adapter` or of PEFT. It is merged into the weights in
                fp32, and rounded once. To train it on: `checkpoint.load_adapter` on the `.model` alone.
            show_progress: a progress bar. None shows it in a terminal only.
            old_keywords: pretrained_model_name_or_path, torch_dtype and device_map are the old names of
                path_or_id, dtype and device. trust_remote_code is accepted and not needed: code from a
                checkpoint never runs. The same holds for low_cpu_mem_usage, use_safetensors and an
                attn_implementation that transformers has.

        Raises:
            TypeError: a keyword is unknown, or asks for quantised or offloaded weights.
            FileNotFoundError, ValueError: something is missing or wrong. The message names it.
            ValueError: sentence-transformers has saved a module behind the model, which does not run here.
        """
        device, dtype = legacy.loading_place(cls.from_pretrained, device, dtype, old_keywords)
        path_or_id = legacy.loading_source(path_or_id, old_keywords)
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        compute = {"device": device, "dtype": dtype, "impl": impl, "latents": latents}
        compute["cuda_graphs"] = cuda_graphs
        read = functools.partial(cls._read, path_or_id, revision, hub, compute, adapter, show_progress)
        return files.unmixed(Path(os.path.expanduser(path_or_id)), "config.json", read)

    @classmethod
    def _read(
        cls,
        path_or_id: str | PathLike,
        revision: str | None,
        hub: dict[str, Any],
        compute: dict[str, Any],
        adapter: str | PathLike | None,
        show_progress: bool | None,
    ) -> "NVEmbed":
        directory = checkpoint.resolve(path_or_id, revision=revision, config_only=True, **hub)
        config = NVEmbedConfig.from_file(directory / "config.json")
        checkpoint.check_modules(directory, others_run=cls._others_run)
        max_seq_length = checkpoint.max_seq_length(directory)
        # validate arguments before fetching and reading gigabytes of weights
        placement = Placement.decide(config, **compute)
        # a snapshot's folder is named by its commit, so the weights are of the same commit as the config
        directory = checkpoint.resolve(path_or_id, revision=directory.name, **hub)
        tokenizer = TextTokenizer.from_directory(directory, config)
        model = checkpoint.load_model(
            directory, config, device=placement.device, dtype=placement.dtype, progress=show_progress
        )
        stored: list[Iterator] = []
        if adapter is not None:
            checkpoint.load_adapter(model, adapter)
            base, weights = checkpoint.trained_on(adapter)
            samples = checkpoint.stored_samples(directory, config)
            if weights is not None and weights != fingerprint.of_decoder(samples):
                raise ValueError(
                    f"{adapter} was trained on other weights than those of {path_or_id}. Load it on "
                    f"{base or 'the model that it was trained on'}. If {path_or_id} is the model with the "
                    "adapter merged, load that without an adapter"
                )
            checkpoint.merge_adapter(model)
            model.config = dataclasses.replace(config, is_untrained=False)
            stored.append(checkpoint.adapter_samples(adapter))
        encoder = cls(model, tokenizer, placement).eval().requires_grad_(False)
        encoder.max_seq_length = max_seq_length
        if stored or checkpoint.loses_digits(directory, config, placement.dtype):
            stored.append(checkpoint.stored_samples(directory, config))
            loaded = fingerprint.of_weights(checkpoint.model_samples(model))
            encoder._weights_loaded = loaded, fingerprint.of_weights(itertools.chain(*stored))
        return encoder

    def save_pretrained(
        self,
        directory: str | PathLike,
        *,
        dtype: torch.dtype | None = None,
        beside: Iterable[str | PathLike] = (),
    ) -> None:
        """Write weights, config, tokenizer and max_seq_length in the published layout, for `from_pretrained`.

        The tokenizer is written as it was loaded, even if its files are gone. Prompts of a pipeline that lies
        there stay, and modules.json then names this model alone. See `save_model`.

        Args:
            directory: created if it is not there.
            dtype: the stored dtype. None keeps the model's.
            beside: other files to write beside them, such as the config of sentence-transformers.

        Raises:
            FileExistsError: another model lies in the directory. Nothing was written.
        """
        with tempfile.TemporaryDirectory() as aside:
            written = self.text_tokenizer.write(Path(aside))
            length, _ = check_counts(self.max_seq_length, None)
            if length != DEFAULT_LENGTH:
                written.append(Path(aside) / LENGTH_FILE)
                written[-1].write_text(json.dumps({"max_seq_length": length}), encoding="utf-8")
            kept = [SETTINGS_FILE, *([MODULES_FILE] if self._others_run else [])]
            copies = [*written, *beside]
            checkpoint.save_model(self.model, directory, dtype=dtype, other_files=copies, kept=kept)

    @property
    def config(self) -> NVEmbedConfig:
        return self.model.config

    @property
    def placement(self) -> Placement:
        """How the model computes, as decided at loading. Device and dtype follow the weights."""
        return dataclasses.replace(self._placement, device=self.device, dtype=self.dtype)

    @property
    def device(self) -> torch.device:
        return self.model.embedding_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embedding_model.embed_tokens.weight.dtype

    @property
    def fingerprint(self) -> str:
        """The name of the vector space, 32 hexadecimal digits: see `fingerprint.of_model`.

        A checkpoint has one, whatever device and dtype it is loaded in, and with an adapter another one.
        Weights that were changed since count as they are, in their dtype. It reads a few rows of each weight
        and waits for the device.
        """
        weights = fingerprint.of_weights(checkpoint.model_samples(self.model))
        if self._weights_loaded is not None and weights == self._weights_loaded[0]:
            weights = self._weights_loaded[1]
        return fingerprint.of_model(weights, self.config, self.text_tokenizer)

    @property
    def tokenizer(self):
        """A `transformers.PreTrainedTokenizerFast` made from the checkpoint's tokenizer.json."""
        with _TRANSFORMERS:
            if self._transformers_tokenizer is None:
                from transformers import PreTrainedTokenizerFast

                self._transformers_tokenizer = PreTrainedTokenizerFast(
                    tokenizer_object=self.text_tokenizer.backend,
                    eos_token=self.text_tokenizer.eos_token,
                    pad_token=self.text_tokenizer.eos_token,
                    padding_side="right",
                    model_input_names=["input_ids", "attention_mask"],  # those of `forward`
                )
            return self._transformers_tokenizer

    def encode(
        self,
        prompts: str | Iterable[str],
        instruction: str = "",
        max_length: int | EllipsisType = ...,
        *,
        max_batch_tokens: int | None = None,
        show_progress: bool | None = None,
        output: Literal["torch", "numpy"] = "torch",
        precision: Precision | None = "float32",
        truncate_dim: int | None = None,
        ranges: np.ndarray | None = None,
        **old_keywords: Any,
    ) -> torch.Tensor | np.ndarray:
        """Embed texts.

        Args:
            prompts: texts in any number, or one text.
            instruction: put in front of every text and not pooled. "" for passages. For queries see
                `query_instruction` and `encode_query`.
            max_length: tokens per text, instruction included. Left out, it is `max_seq_length`. A longer
                text is cut at the right. One warning (`stream.TextsCut`) says how many were.
                Another one (`stream.TextsBeyondPositions`) says how many have more tokens than the model has
                positions.
            max_batch_tokens: tokens per batch. None: 16384 on a GPU, 2048 on a CPU.
            show_progress: a progress bar. None shows it in a terminal only.
            output: "torch" for a tensor on the model's device, "numpy" for an array on the host.
            precision: "float16", "int8", "uint8", "binary" or "ubinary" for vectors in fewer bits: see
                `nvembed_fast.precision`.
            truncate_dim: the number of leading dimensions to keep. The rest has no unit norm, unless
                normalize_embeddings=True asks for it.
            ranges: [2, D] of `precision.value_ranges`, for int8 and uint8. None takes those of these texts.
            old_keywords: those of the original and of sentence-transformers that have a meaning here, such as
                return_numpy, prompt, convert_to_tensor and show_progress_bar. num_workers and batch_size
                are not needed: one thread tokenizes ahead, and batches are cut by tokens.

        Returns:
            [N, D] fp32 in the order of prompts, of unit norm. [D] for a single string, [0, D] for no text.
            Other precisions have their own dtype, and binary ones have ceil(D / 8) columns.

        Raises:
            TypeError: a prompt is not a string, and the message names its index. Prompts have no order, or
                give keys in the place of texts. A keyword is unknown or asks for another result.
            ValueError: a vector is not finite, as after an overflow in float16. The message names its index.
            ValueError: a prompt cannot be tokenized, or its instruction leaves nothing to pool within
                max_length. The message names its index.
        """
        call = legacy.Encoding(instruction, output, show_progress, truncate_dim is not None)
        normalized = self.model.head.output_normalize
        call = legacy.encoding_call(
            self.encode, call, old_keywords, device=self.device, normalized=normalized
        )
        if call.output not in ("torch", "numpy"):
            raise ValueError(f"output must be 'torch' or 'numpy', got {call.output!r}")
        single = isinstance(prompts, str)
        texts = [prompts] if isinstance(prompts, str) else text_list(prompts)
        width, precision = self._width(truncate_dim), check_precision(precision)
        check_ranges(ranges, precision, len(texts), width)
        self.warn_about(texts)
        max_length = self.max_seq_length if isinstance(max_length, EllipsisType) else max_length
        batches = self.stream(texts, call.instruction, max_length, max_batch_tokens)
        on_host = call.output == "numpy" or precision != "float32"
        result = Result(len(texts), width, self.device, on_host)
        with Progress(texts, max_length, call.show_progress) as progress:
            for indices, vectors in batches:
                if truncate_dim is not None:
                    vectors = vectors[:, :width]
                    vectors = F.normalize(vectors, dim=1) if call.normalize else vectors
                result.put(indices, vectors)
                progress.advance(indices)
        found = result.finish()
        if precision != "float32":
            found = quantized(cast(np.ndarray, found), precision, ranges)
            found = found if call.output == "numpy" else torch.from_numpy(found).to(self.device)
        return found[0] if single else found

    def _width(self, truncate_dim: int | None) -> int:
        width = self.config.hidden_size
        if truncate_dim is None:
            return width
        if not isinstance(truncate_dim, Integral) or isinstance(truncate_dim, bool):
            raise TypeError(f"truncate_dim must be an int, got {type(truncate_dim).__name__}")
        if not 1 <= truncate_dim <= width:
            raise ValueError(f"truncate_dim must be from 1 to {width}, got {truncate_dim}")
        return int(truncate_dim)

    def warn_about(self, texts: list[str]) -> None:
        """Warn as `encode` does: of an untrained model, once, and of texts that end with the end mark."""
        if self._tells_untrained and self.config.is_untrained:
            self._tells_untrained = False
            warnings.warn(_UNTRAINED, UntrainedModel, stacklevel=3)
        legacy.warn_of_end_marks(texts, self.text_tokenizer.eos_token)

    def warm_up(self, *, training: bool = False, show_progress: bool | None = None) -> bool:
        """Compile every kernel that this model can need, so that no later call waits for the compiler.

        Triton keeps what it has compiled on disk, so that the next process finds it there. A second call has
        nothing to do. With `cuda_graphs` it also captures the graph of every bucket.

        Args:
            training: also compile what a training step needs. Gradients of the weights that require them are
                computed and thrown away.
            show_progress: a progress bar. None shows it in a terminal only.

        Returns:
            Whether there are kernels to compile. There are none on a CPU, or under impl="torch" or "library".

        Raises:
            ValueError: training, and no weight requires a gradient.
        """
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        if training and not weights:
            raise ValueError("warm_up(training=True) needs weights to train: call requires_grad_() first")
        if self.placement.implementation()[0] != "triton":
            return False
        self.refresh()
        sizes = [1 << i for i in range(MIN_BUCKET.bit_length() - 1, MAX_TOKENS.bit_length())]
        buckets = [] if self.graphs is None else sizes
        max_positions = self.config.text_config.max_position_embeddings
        steps = [*batches(self.device, max_positions)]
        with tqdm(
            total=len(steps) + len(buckets),
            desc="warm up",
            disable=None if show_progress is None else not show_progress,
        ) as bar:
            for batch in steps:
                with self.computing():
                    with torch.no_grad():
                        self.model(batch)
                    if training:
                        with torch.enable_grad():
                            vectors = self.model(batch)
                        torch.autograd.grad(vectors.sum(), weights, allow_unused=True)
                bar.update()
            for bucket in buckets:
                self.embed([np.zeros(bucket, dtype=np.int64)], [0])
                bar.update()
        return True

    @property
    def stream(self) -> TextStream:
        """`encode` batch by batch, for a caller that takes the vectors as they come."""
        return TextStream(
            self.text_tokenizer,
            self.embed,
            self.device,
            start=self.refresh,
            dtype=self.dtype,
            max_positions=self.config.text_config.max_position_embeddings,
        )

    def refresh(self) -> None:
        """Drop what was built from weights whose content has changed. `encode` and `forward` begin with it.

        It sees writes through `.data` and `.numpy()`: see `LatentHead.stale`. A call of `embed` or of `model`
        itself does not look for them. It waits for the device.
        """
        if stale := self._stale():
            self._forget(stale, torch.stack([is_stale for _, _, is_stale in stale]).tolist())

    def _stale(self) -> list[tuple[PoolingHead, str, torch.Tensor]]:
        """(head, set of built tensors, whether its weights have changed), not waited for."""
        self._refuse_offloaded()
        heads = [m for m in self.model.head.modules() if isinstance(m, PoolingHead)]
        return [(head, *built) for head in heads for built in head.stale().items()]

    def _refuse_offloaded(self) -> None:
        if self.device.type == "meta":
            raise ValueError(
                "the weights are offloaded (device 'meta'), which is not supported: load them to one device"
            )

    def _forget(self, stale: list[tuple[PoolingHead, str, torch.Tensor]], is_stale: Sequence[int]) -> None:
        for (head, name, _), is_one in zip(stale, is_stale, strict=True):
            if is_one:
                head.forget(name)
        if any(is_stale) and self.graphs is not None:
            self.graphs.forget()

    @torch.no_grad()
    def embed(self, ids: list[np.ndarray], first_pooled: list[int]) -> torch.Tensor:
        """[B, D] fp32 vectors of tokenized texts, as one packed batch.

        Args:
            ids: token ids, one int array per text.
            first_pooled: per text, the number of leading tokens that are not pooled.
        """
        with self.computing():
            if self.graphs is not None and len(ids) == 1 and len(ids[0]) <= MAX_TOKENS:
                return self.graphs(ids[0], first_pooled[0])
            return self.model(PackedBatch.from_ids(ids, first_pooled, self.device))

    def encode_query(
        self, queries: str | Iterable[str], task: str | None = None, **kwargs: Any
    ) -> torch.Tensor | np.ndarray:
        """`encode` behind `query_instruction` of this task.

        Raises:
            TypeError: there is no task, or an instruction beside it.
        """
        if task is None or "instruction" in kwargs:
            raise TypeError(
                'encode_query() takes a task and makes the instruction: encode_query(queries, task="..."). '
                "encode(queries, instruction) takes an instruction"
            )
        return self.encode(queries, instruction=query_instruction(task), **kwargs)

    def encode_document(self, documents: str | Iterable[str], **kwargs: Any) -> torch.Tensor | np.ndarray:
        """`encode` without an instruction, as the model was trained to read documents."""
        return self.encode(documents, **kwargs)

    def _do_encode(
        self,
        prompts: Iterable[str],
        batch_size: int = 1,
        instruction: str = "",
        max_length: int | EllipsisType = ...,
        num_workers: int = 32,
        return_numpy: bool = False,
    ) -> torch.Tensor | np.ndarray:
        """The original's batched call: `encode` under its old signature."""
        return self.encode(prompts, instruction, max_length, output="numpy" if return_numpy else "torch")

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pool_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> dict[str, torch.Tensor] | tuple[torch.Tensor]:
        """The original's call on a padded batch. The padding is taken out before anything is computed.

        Args:
            input_ids: [B, S] int8 to int64, on the model's device. Ids of pads are not looked at.
            attention_mask: [B, S], 1 at real tokens, 0 at pads, at the left or the right. None: no pads.
            pool_mask: [B, S], 1 at tokens to pool, else 0. None: no pooling, every token's state is returned.
            return_dict: False returns a tuple of one.

        Returns:
            {"sentence_embeddings": [B, D] fp32, of unit norm}, or without a pool_mask [B, S, D] token states
            in the model's dtype, zeros at pads.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: an argument has a wrong shape, dtype, device or value, or a row pools nothing.
        """
        stale = self._stale()
        padded = legacy.padded_batch(self.model, input_ids, attention_mask, pool_mask)
        # the one wait for the device
        facts = torch.cat([padded.facts, *(is_stale.view(1) for _, _, is_stale in stale)]).tolist()
        num_facts = len(padded.facts)
        self._forget(stale, facts[num_facts:])
        with self.computing():
            result = legacy.padded_forward(self.model, padded, facts[:num_facts])
        return {"sentence_embeddings": result} if return_dict else (result,)

    @contextlib.contextmanager
    def computing(self, *, autocast: bool = False) -> Iterator[None]:
        """Around a call of `model`: its own implementation, and its own dtype even in the caller's autocast.

        Args:
            autocast: leave the caller's autocast on, as in training.
        """
        own = contextlib.nullcontext() if autocast else torch.autocast(self.device.type, enabled=False)
        with ops.use_impl(self._placement.impl), own:
            yield
