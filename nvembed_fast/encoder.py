"""NVEmbed: texts in, vectors out. The drop-in replacement for the original's model class.

The way of a call of `encode`:

1. Texts are taken in windows; while one window is on the device, a thread tokenises the next.
2. A window is sorted by length and cut into batches by a budget of tokens, longest first.
3. A batch is packed, without padding, and runs through the model. If a GPU's memory runs out, the budget is
   halved from there on.
4. Its vectors go to their places in the result: the caller's order is kept.

A text's vector does not depend on what it is batched with.
"""

import contextlib
import inspect
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from nvembed_fast import checkpoint, ops
from nvembed_fast.config import NVEmbedConfig
from nvembed_fast.graphs import MOST_TOKENS, SingleTextGraphs
from nvembed_fast.kernels.layout import to_device
from nvembed_fast.network.latent_head import LatentHead, Latents, check_latents
from nvembed_fast.network.model import NVEmbedModel
from nvembed_fast.packing import PackedBatch, from_padded, pad_rows, token_budget_batches
from nvembed_fast.placement import check_device, check_dtype
from nvembed_fast.tokenization import TextTokenizer, TokenizedTexts, check_texts

__all__ = ["NVEmbed", "query_instruction"]

MIN_MAX_LENGTH = 3  # a mark at each end and one token between them
# texts tokenised at a time: the first window is small, so that the device starts at once; and characters, so
# that the ids of very long texts do not fill the memory
_FIRST_WINDOW, _WINDOW, _WINDOW_CHARACTERS = 1024, 8192, 8_000_000
BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}
_warned: dict[str, set[str]] = {}


def query_instruction(task: str) -> str:
    """The published query template: "Instruct: {task}", a new line, "Query: "."""
    return f"Instruct: {task}\nQuery: "


class NVEmbed(nn.Module):
    """An NV-Embed model with its tokenizer.

    Attributes:
        model: the model on packed tokens.
        text_tokenizer: texts to ids.
        config: the checkpoint's config.
        impl: "auto", "triton" or "torch"; see `nvembed_fast.ops`.
        graphs: how short texts run that come alone; None: as all others.
    """

    def __init__(
        self,
        model: NVEmbedModel,
        text_tokenizer: TextTokenizer,
        impl: ops.Impl = "auto",
        latents: Latents = "auto",
        cuda_graphs: bool = False,
    ):
        super().__init__()
        self.model = model
        self.text_tokenizer = text_tokenizer
        self.impl = ops.check_impl(impl)
        _check_latents(latents, model.config)
        if isinstance(model.head, LatentHead):
            model.head.mode = latents
        if cuda_graphs:
            _check_graphs(self.device, self.dtype, self.impl)
        self.graphs = SingleTextGraphs(model) if cuda_graphs else None
        self._transformers_tokenizer = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | PathLike,
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
        show_progress: bool | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        trust_remote_code: bool | None = None,
        **unknown: Any,
    ) -> "NVEmbed":
        """Load a checkpoint in the published layout, for inference.

        Args:
            path_or_id: a directory, or a model's id on the hub such as "nvidia/NV-Embed-v2".
            device: where the weights go, tensor by tensor. None: the GPU if there is one, else the CPU.
            dtype: of the weights and the computation, as torch.dtype or by name. None: the checkpoint's on a
                GPU, float32 on a CPU. Pooling and the result are float32 always.
            impl: "triton" kernels, plain "torch", or "auto": Triton on a GPU.
            latents: "absorbed", "direct" (the strict order of the original), or "auto": the cheaper one.
            cuda_graphs: a text of at most 256 tokens that comes alone replays a CUDA graph, captured once for
                each power of two of tokens: less latency, some more memory. For Triton kernels on a GPU.
            revision, token, cache_dir, local_files_only: as in huggingface_hub.
            show_progress: a progress bar; None shows it in a terminal only.
            torch_dtype, device_map: the old names of dtype and device.
            trust_remote_code: accepted and not needed; code from a checkpoint never runs.

        Raises:
            FileNotFoundError, ValueError: what is missing or wrong, by name, and the way out.
        """
        _warn_unknown("from_pretrained", unknown)
        # wrong arguments are told before gigabytes are read
        check_latents(latents)
        target = _device(device if device is not None else device_map)
        wanted = _dtype(dtype if dtype is not None else torch_dtype)
        with ops.use_impl(impl):
            ops.choose(target, wanted or torch.float32)
        if cuda_graphs:
            _check_graphs(target, wanted or torch.float32, impl)
        directory = checkpoint.resolve(
            path_or_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        config = NVEmbedConfig.from_file(directory / "config.json")
        _check_latents(latents, config)
        tokenizer = TextTokenizer.from_directory(directory, config.pooling_start)
        model = checkpoint.load_model(directory, device=target, dtype=wanted, progress=show_progress)
        return cls(model, tokenizer, impl, latents, cuda_graphs).eval().requires_grad_(False)

    def save_pretrained(self, directory: str | PathLike, *, dtype: torch.dtype | None = None) -> None:
        """Write weights, config and tokenizer in the published layout; `from_pretrained` reads it back."""
        files = checkpoint.tokenizer_files(self.text_tokenizer.directory)
        checkpoint.save_model(self.model, directory, dtype=dtype, tokenizer_files=files)

    @property
    def config(self) -> NVEmbedConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.embedding_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embedding_model.embed_tokens.weight.dtype

    @property
    def tokenizer(self):
        """A `transformers.PreTrainedTokenizerFast` made from the checkpoint's tokenizer.json."""
        if self._transformers_tokenizer is None:
            from transformers import PreTrainedTokenizerFast

            self._transformers_tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=self.text_tokenizer.backend,
                eos_token=self.text_tokenizer.eos_token,
                pad_token=self.text_tokenizer.eos_token,
                padding_side="right",
            )
        return self._transformers_tokenizer

    def encode(
        self,
        prompts: str | Iterable[str],
        instruction: str = "",
        max_length: int = 4096,
        *,
        max_batch_tokens: int | None = None,
        show_progress: bool | None = None,
        output: Literal["torch", "numpy"] = "torch",
        num_workers: int | None = None,
        batch_size: int | None = None,
        return_numpy: bool | None = None,
        **unknown: Any,
    ) -> torch.Tensor | np.ndarray:
        """Embed texts.

        Args:
            prompts: texts in any number, or one text.
            instruction: put in front of every text and left out of the pooling; "" for passages. For queries
                see `query_instruction` and `encode_query`.
            max_length: tokens per text, instruction included; what is over is cut at the right.
            max_batch_tokens: tokens per batch. None: 16384 on a GPU, 2048 on a CPU.
            show_progress: a progress bar; None shows it in a terminal only.
            output: "torch" for a tensor on the model's device, "numpy" for an array on the host.
            num_workers, batch_size: accepted from old calls and not needed: one thread tokenises ahead, and
                batches are cut by tokens.
            return_numpy: the old name of output="numpy".

        Returns:
            [N, D] fp32 in the order of prompts, of unit norm; [D] for a single string; [0, D] for none.

        Raises:
            TypeError: a prompt is not a string; names its index.
            ValueError: a prompt that cannot be tokenised, or whose instruction leaves nothing to pool within
                max_length; names its index.
        """
        _warn_unknown("encode", unknown)
        if output not in ("torch", "numpy"):
            raise ValueError(f"output must be 'torch' or 'numpy', got {output!r}")
        _check_count("max_length", max_length, MIN_MAX_LENGTH)
        if max_batch_tokens is None:
            max_batch_tokens = BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])
        _check_count("max_batch_tokens", max_batch_tokens, 1)
        if isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Iterable):
            raise TypeError(f"prompts must be a string or texts, got {type(prompts).__name__}")
        single = isinstance(prompts, str)
        texts = check_texts([prompts] if single else prompts)
        if not isinstance(instruction, str):
            raise TypeError(f'instruction must be a string ("" for none), got {type(instruction).__name__}')
        check_texts([instruction], "instruction")
        on_host = output == "numpy" or bool(return_numpy)
        result = _Result(len(texts), self.config.hidden_size, self.device, on_host)
        with _Progress(texts, max_length, show_progress) as progress:
            windows = self._tokenized_windows(texts, instruction, max_length)
            for indices, vectors in self._run(windows, max_batch_tokens):
                result.put(indices, vectors)
                progress.advance(indices)
        vectors = result.finish()
        return vectors[0] if single else vectors

    def encode_query(
        self, queries: str | Iterable[str], task: str, **kwargs: Any
    ) -> torch.Tensor | np.ndarray:
        """`encode` behind the published query template with this task description."""
        return self.encode(queries, instruction=query_instruction(task), **kwargs)

    def encode_document(self, documents: str | Iterable[str], **kwargs: Any) -> torch.Tensor | np.ndarray:
        """`encode` without an instruction, as the model was trained to read documents."""
        return self.encode(documents, **kwargs)

    def _do_encode(
        self,
        prompts: Iterable[str],
        batch_size: int = 1,
        instruction: str = "",
        max_length: int = 4096,
        num_workers: int = 32,
        return_numpy: bool = False,
    ) -> torch.Tensor | np.ndarray:
        """The original's batched call: `encode` under its old signature."""
        return self.encode(
            prompts,
            instruction,
            max_length,
            batch_size=batch_size,
            num_workers=num_workers,
            return_numpy=return_numpy,
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pool_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> dict[str, torch.Tensor] | tuple[torch.Tensor]:
        """The original's call on a padded batch; the padding is taken out before anything is computed.

        Args:
            input_ids: [B, S] int.
            attention_mask: [B, S], nonzero at real tokens, padded at the left or the right.
            pool_mask: [B, S], nonzero at tokens to pool. None: no pooling, every token's state is returned.
            return_dict: False returns a tuple of one.

        Returns:
            {"sentence_embeddings": [B, D] fp32, of unit norm}, or without a pool_mask [B, S, D] token states
            in the model's dtype, zeros at pads.
        """
        with self._computing():
            _check_ids(input_ids, self.config.text_config.vocab_size)
            batch, places = from_padded(input_ids, attention_mask, pool_mask)
            if pool_mask is None:
                result = pad_rows(self.model.token_states(batch), places, tuple(input_ids.shape))
            else:
                _check_pooled_mask(
                    pool_mask != 0 if attention_mask is None else (pool_mask * attention_mask) != 0
                )
                result = self.model(batch)
        return {"sentence_embeddings": result} if return_dict else (result,)

    def _tokenized_windows(
        self, texts: list[str], instruction: str, max_length: int
    ) -> Iterator[tuple[int, TokenizedTexts]]:
        """(index of the first text, tokenised texts), one window ahead of the consumer."""

        def tokenize(first: int, stop: int) -> tuple[int, TokenizedTexts]:
            window = self.text_tokenizer(texts[first:stop], instruction, max_length)
            if not self.config.is_mask_instruction:
                window = window._replace(first_pooled=[0] * len(window.ids))
            _check_pooled(window, first, max_length)
            return first, window

        pool = ThreadPoolExecutor(1, thread_name_prefix="nvembed-tokenize")
        try:
            ahead = None
            for window in _windows(texts, self.text_tokenizer.most_characters(max_length)):
                ready, ahead = ahead, pool.submit(tokenize, window.start, window.stop)
                if ready is not None:
                    yield ready.result()
            if ahead is not None:
                yield ahead.result()
        finally:
            # an interrupted caller does not wait for a window it will not use
            pool.shutdown(wait=False, cancel_futures=True)

    @torch.no_grad()
    def _run(
        self, windows: Iterable[tuple[int, TokenizedTexts]], budget: int
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(indices, vectors) of every batch. One that does not fit in memory halves the budget."""
        for first, window in windows:
            lengths = window.lengths()
            pending = deque(token_budget_batches(lengths, budget))
            while pending:
                rows = pending.popleft()
                vectors = self._embed(
                    [window.ids[row] for row in rows], [window.first_pooled[row] for row in rows]
                )
                if vectors is not None:
                    yield [first + row for row in rows], vectors
                    continue
                if len(rows) == 1:
                    raise torch.OutOfMemoryError(
                        f"a single text of {lengths[rows[0]]} tokens does not fit in the memory of "
                        f"{self.device}: lower max_length, or free memory there"
                    )
                torch.cuda.empty_cache()
                left = rows + [row for batch in pending for row in batch]
                budget = sum(lengths[row] for row in rows) // 2
                again = token_budget_batches([lengths[row] for row in left], budget)
                pending = deque([left[index] for index in batch] for batch in again)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """The model's own implementation and dtype, whatever autocast the caller is in."""
        with ops.use_impl(self.impl), torch.autocast(self.device.type, enabled=False):
            yield

    def _embed(self, ids: list[np.ndarray], first_pooled: list[int]) -> torch.Tensor | None:
        """[B, D] fp32 vectors of one packed batch, or None when the device's memory does not hold it."""
        try:
            with self._computing():
                if self.graphs is not None and len(ids) == 1 and len(ids[0]) <= MOST_TOKENS:
                    return self.graphs(ids[0], first_pooled[0])
                return self.model(PackedBatch.from_ids(ids, first_pooled, self.device))
        except torch.OutOfMemoryError:
            return None


class _Result:
    """The rows of the result, filled in any order: on the device, or on the host while the device runs on."""

    def __init__(self, num_rows: int, width: int, device: torch.device, on_host: bool):
        self.device, self.on_host = device, on_host
        self.rows = torch.zeros(num_rows, width, dtype=torch.float32, device="cpu" if on_host else device)
        self._under_way: deque[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]] = deque()

    def put(self, indices: list[int], vectors: torch.Tensor) -> None:
        index, vectors = torch.tensor(indices), vectors.float()
        if not self.on_host or self.device.type != "cuda":
            self.rows.index_copy_(0, to_device(index, self.rows.device), vectors)
            return
        staging = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True)
        staging.copy_(vectors, non_blocking=True)
        arrived = torch.cuda.Event()
        # the stream of the vectors' device, which need not be the current one
        arrived.record(torch.cuda.current_stream(self.device))
        self._under_way.append((index, staging, arrived))
        self._land(most_left=1)

    def finish(self) -> torch.Tensor | np.ndarray:
        self._land(most_left=0)
        return self.rows.numpy() if self.on_host else self.rows

    def _land(self, most_left: int) -> None:
        while len(self._under_way) > most_left:
            index, staging, arrived = self._under_way.popleft()
            arrived.synchronize()
            self.rows.index_copy_(0, index, staging)


class _Progress:
    """A bar over the characters of the texts: their number says more of the work than the number of texts."""

    def __init__(self, texts: list[str], max_length: int, show: bool | None):
        # what is cut off costs nothing; a token is about four characters
        self.work = [1 + min(len(text), 4 * max_length) for text in texts]
        self.done = 0
        self.bar = tqdm(
            total=sum(self.work),
            desc="encode",
            unit="char",
            unit_scale=True,
            # None shows the bar only where standard error is a terminal
            disable=None if show is None else not show,
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def advance(self, indices: list[int]) -> None:
        self.done += len(indices)
        self.bar.set_postfix_str(f"{self.done}/{len(self.work)} texts", refresh=False)
        self.bar.update(sum(self.work[index] for index in indices))


def _windows(texts: list[str], most_characters: int) -> Iterator[slice]:
    """Neighbouring texts to tokenise together, of each of which `most_characters` are read."""
    first, most_texts, characters = 0, _FIRST_WINDOW, 0
    for index, text in enumerate(texts):
        size = min(len(text), most_characters)
        if index > first and (index - first == most_texts or characters + size > _WINDOW_CHARACTERS):
            yield slice(first, index)
            first, most_texts, characters = index, _WINDOW, 0
        characters += size
    if texts:
        yield slice(first, len(texts))


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}: {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Told here: on a GPU an id beyond the embedding would end the process."""
    if input_ids.is_floating_point():
        raise ValueError(f"input_ids must be integers, got {input_ids.dtype}")
    if input_ids.numel():
        low, high = (int(v) for v in input_ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids must lie in 0 to {vocab_size - 1}, got {low if low < 0 else high}")


def _check_pooled(window: TokenizedTexts, first: int, max_length: int) -> None:
    for index, (ids, start) in enumerate(zip(window.ids, window.first_pooled, strict=True)):
        if start >= len(ids):
            raise ValueError(
                f"nothing of prompts[{first + index}] is left to pool: the instruction takes all {len(ids)} "
                f"tokens (max_length is {max_length}). Raise max_length or shorten the instruction."
            )


def _check_pooled_mask(pooled: torch.Tensor) -> None:
    """ValueError for a row of a [B, S] bool mask that keeps nothing; the original returns NaN there."""
    empty = (~pooled.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"row {empty[0]} of the batch has no token that attention_mask and pool_mask both keep"
        )


def _warn_unknown(function: str, unknown: dict[str, Any]) -> None:
    """Once per keyword, a warning that names what is known."""
    for name in unknown.keys() - _warned.get(function, set()):
        parameters = inspect.signature(getattr(NVEmbed, function)).parameters
        known = [p.name for p in parameters.values() if p.kind is not p.VAR_KEYWORD and p.name != "self"]
        warnings.warn(f"{function}() ignores {name!r}; it knows {', '.join(known)}", stacklevel=3)
        _warned.setdefault(function, set()).add(name)


def _check_latents(latents: str, config: NVEmbedConfig) -> None:
    if check_latents(latents) != "auto" and config.pooling_head != "latent":
        raise ValueError(
            f"latents={latents!r} is about the latent head, but this model pools by {config.pooling_head!r}"
        )


def _device(device: Any) -> torch.device:
    """A device from what `device` and `device_map` have been called with."""
    if isinstance(device, dict):
        if set(device) != {""}:
            raise ValueError(f"device_map must put the whole model on one device, got {device!r}")
        device = device[""]
    if device is None or device in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return check_device(f"cuda:{device}" if isinstance(device, int) else device)


def _check_graphs(device: torch.device, dtype: torch.dtype, impl: ops.Impl) -> None:
    with ops.use_impl(impl):
        chosen, reason = ops.choose(device, dtype)
    if device.type != "cuda" or chosen != "triton":
        obstacle = reason if chosen != "triton" else "tensors are on the CPU"
        raise ValueError(f"cuda_graphs=True needs Triton kernels on a GPU: {obstacle}")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    return None if dtype is None or dtype == "auto" else check_dtype(dtype)
