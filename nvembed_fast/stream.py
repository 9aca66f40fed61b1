"""Texts in, vectors out, for `NVEmbed.encode` and every other caller with many texts.

1. Texts are taken in windows. While one window is on the device, a thread tokenizes the next.
2. A window is sorted by length and cut into batches by a budget of tokens, longest first.
3. Each batch is embedded. If a GPU's memory runs out, the budget is halved from there on.
4. Whether its vectors are finite stays on the device until the last batch, so that no batch waits for it.
5. A batch's vectors come out with the indices of its texts. `Result` puts them into the caller's order.

The invariant: every text has exactly one vector, and it does not depend on the other texts of its batch.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from numbers import Integral

import numpy as np
import torch
from tqdm.auto import tqdm

from nvembed_fast.kernels.layout import to_device
from nvembed_fast.packing import token_budget_batches
from nvembed_fast.placement import dtype_name
from nvembed_fast.tokenization import TextTokenizer, TokenizedTexts, check_texts

__all__ = [
    "BATCH_TOKENS",
    "MIN_MAX_LENGTH",
    "WINDOW",
    "Progress",
    "Result",
    "TextStream",
    "TextsBeyondPositions",
    "TextsCut",
    "Window",
    "check_counts",
]

BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}
MIN_MAX_LENGTH = 3  # a mark at each end and one token between them


@dataclass(frozen=True)
class Window:
    """How many neighbouring texts are tokenized together.

    Attributes:
        first_texts: the max number of texts in the first window. It is small, so that the device starts soon.
        texts: the max number of texts in a later window.
        characters: the max number of characters in a window, so that the ids of very long texts do not fill
            the memory. A longer text is a window of its own.
    """

    first_texts: int = 1024
    texts: int = 8192
    characters: int = 8_000_000

    def slices(self, texts: list[str], max_characters: int, instruction: str = "") -> Iterator[slice]:
        """The windows of `texts`, when `max_characters` of each text behind its instruction are read."""
        first, max_texts, characters = 0, self.first_texts, 0
        for index, text in enumerate(texts):
            size = min(len(instruction) + len(text), max_characters)
            if index > first and (index - first == max_texts or characters + size > self.characters):
                yield slice(first, index)
                first, max_texts, characters = index, self.texts, 0
            characters += size
        if texts:
            yield slice(first, len(texts))


WINDOW = Window()


class TextsCut(UserWarning):
    """Texts were longer than max_length."""


class TextsBeyondPositions(UserWarning):
    """Texts have more tokens than the model has seen positions. Their vectors may be poor."""


@dataclass(frozen=True)
class TextStream:
    """Texts in, (indices, vectors) out.

    Attributes:
        tokenizer: texts to ids.
        embed: token ids and first pooled tokens of one batch to its [B, D] vectors.
        device: where `embed` computes.
        dtype: in which `embed` computes.
        window: how many texts are tokenized at a time.
        start: called once, before the first batch.
        max_positions: of the model's config. None warns of no text.
    """

    tokenizer: TextTokenizer
    embed: Callable[[list[np.ndarray], list[int]], torch.Tensor]
    device: torch.device
    window: Window = field(default_factory=lambda: WINDOW)
    start: Callable[[], None] | None = None
    dtype: torch.dtype = torch.float32
    max_positions: int | None = None

    def __call__(
        self,
        texts: list[str],
        instruction: str = "",
        max_length: int = 4096,
        max_batch_tokens: int | None = None,
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Embed texts, batch by batch.

        Args:
            texts: any number of texts.
            instruction: put in front of every text and not pooled.
            max_length: tokens per text, instruction included.
            max_batch_tokens: tokens per batch. None: 16384 on a GPU, 2048 on a CPU.

        Returns:
            An iterator over (indices into texts, their vectors), in which every text comes once. It ends with
            a warning (`TextsCut`) if texts were longer than max_length, and with one
            (`TextsBeyondPositions`) if any were longer than max_positions.

        Raises:
            TypeError, ValueError: an argument is wrong. The call raises it.
            ValueError: the instruction leaves nothing of a text to pool, or a vector is not finite. The
                iterator raises it, the latter behind the last batch.
        """
        max_length, max_batch_tokens = check_counts(max_length, max_batch_tokens)
        if max_batch_tokens is None:
            max_batch_tokens = BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])
        texts = check_texts(texts)
        if not isinstance(instruction, str):
            raise TypeError(f'instruction must be a string ("" for none), got {type(instruction).__name__}')
        check_texts([instruction], "instruction")
        windows = self.tokenized(texts, instruction, max_length)
        return self._embedded(windows, max_batch_tokens, max_length)

    def tokenized(
        self, texts: list[str], instruction: str, max_length: int
    ) -> Iterator[tuple[int, TokenizedTexts]]:
        """(index of the first text, tokenized texts) of every window, one window ahead of the consumer."""

        def tokenize(window: slice) -> tuple[int, TokenizedTexts]:
            found = self.tokenizer(texts[window], instruction, max_length)
            _check_pooled(found, window.start, max_length)
            return window.start, found

        windows = self.window.slices(texts, self.tokenizer.max_characters(max_length), instruction)
        begun = [*islice(windows, 2)]
        if len(begun) < 2:  # a query does not wait for a thread
            yield from map(tokenize, begun)
            return
        pool = ThreadPoolExecutor(1, thread_name_prefix="nvembed-tokenize")

        def soon(window: slice) -> Callable[[], tuple[int, TokenizedTexts]]:
            try:
                return pool.submit(tokenize, window).result
            except RuntimeError:  # the main thread has ended, and Python starts no more work
                return partial(tokenize, window)

        try:
            ahead = None
            for window in chain(begun, windows):
                ready, ahead = ahead, soon(window)
                if ready is not None:
                    yield ready()
            if ahead is not None:
                yield ahead()
        finally:
            # an interrupted caller does not wait for a window it will not use
            pool.shutdown(wait=False, cancel_futures=True)

    def _embedded(
        self, windows: Iterable[tuple[int, TokenizedTexts]], budget: int, max_length: int
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(indices, vectors) of every batch. One that does not fit in memory halves the budget."""
        order, finite, num_cut, beyond = [], [], 0, []
        for number, (first, window) in enumerate(windows):
            if number == 0 and self.start is not None:
                self.start()
            num_cut += window.num_cut
            lengths = window.lengths()
            if self.max_positions is not None:
                beyond += [length for length in lengths if length > self.max_positions]
            pending = deque(token_budget_batches(lengths, budget))
            while pending:
                rows = pending.popleft()
                vectors = self._embed_if_it_fits(window, rows)
                if vectors is not None:
                    indices = [first + row for row in rows]
                    order += indices
                    # the sum of a row is finite if and only if all of it is, and needs no mask of its size
                    finite.append(vectors.sum(1).isfinite())
                    yield indices, vectors
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

        self._check_finite(order, finite)
        if num_cut:
            message = f"{num_cut} of {len(order)} texts were cut at max_length={max_length} tokens"
            # at the line that calls encode
            warnings.warn(message, TextsCut, stacklevel=3)
        if beyond:
            message = (
                f"{len(beyond)} of {len(order)} texts have more tokens than the model has positions: up to "
                f"{max(beyond)}, and max_position_embeddings is {self.max_positions}. Lower max_length"
            )
            warnings.warn(message, TextsBeyondPositions, stacklevel=3)

    def _check_finite(self, order: list[int], finite: list[torch.Tensor]) -> None:
        """ValueError for a vector that is not finite. Waits for the device."""
        if not finite:
            return
        good = torch.cat(finite).cpu().tolist()
        bad = [index for index, is_good in zip(order, good, strict=True) if not is_good]
        if not bad:
            return
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        name = dtype_name(self.dtype)
        if self.dtype == torch.float16:
            reason = (
                "an activation is larger than float16 holds (65504). Load the model with dtype='bfloat16'"
            )
        else:
            reason = (
                "a weight is not finite, or an activation overflows. Check the weights, or load in float32"
            )
        raise ValueError(f"the vector of prompts[{min(bad)}]{more} is NaN or Inf in {name}: {reason}")

    def _embed_if_it_fits(self, window: TokenizedTexts, rows: list[int]) -> torch.Tensor | None:
        """The vectors of these texts, or None if the device's memory does not hold the batch."""
        try:
            return self.embed([window.ids[row] for row in rows], [window.first_pooled[row] for row in rows])
        except torch.OutOfMemoryError:
            return None


class Result:
    """The rows of the result, filled in any order: on the device, or on the host while the device runs on.

    Args:
        num_rows, width: of the result.
        device: of the vectors.
        on_host: whether the rows are on the host.
        rows: on the host, where to put them, in any float dtype. None: new ones in float32.
    """

    def __init__(
        self,
        num_rows: int,
        width: int,
        device: torch.device,
        on_host: bool,
        rows: torch.Tensor | None = None,
    ):
        self.device, self.on_host = device, on_host
        if rows is None:
            rows = torch.zeros(num_rows, width, dtype=torch.float32, device="cpu" if on_host else device)
        self.rows = rows
        self._under_way: deque[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]] = deque()

    def put(self, indices: list[int], vectors: torch.Tensor) -> list[int]:
        """Take the vectors of these rows. Returns the rows that have come to their places meanwhile."""
        index, vectors = torch.tensor(indices, device="cpu"), vectors.float()
        if not self.on_host or self.device.type != "cuda":
            # of a device without streams such as Apple's, the rows may be on the host
            self.rows.index_copy_(0, to_device(index, self.rows.device), vectors.to(self.rows))
            return indices
        staging = torch.empty(vectors.shape, dtype=torch.float32, device="cpu", pin_memory=True)
        staging.copy_(vectors, non_blocking=True)
        arrived = torch.cuda.Event()
        # the stream of the vectors' device, which need not be the current one
        arrived.record(torch.cuda.current_stream(self.device))
        self._under_way.append((index, staging, arrived))
        return self.land(max_left=1)

    def finish(self) -> torch.Tensor | np.ndarray:
        self.land()
        return self.rows.numpy() if self.on_host else self.rows

    def land(self, max_left: int = 0) -> list[int]:
        """Wait until no more batches are on their way to the host. Returns the rows that have come."""
        landed: list[int] = []
        while len(self._under_way) > max_left:
            index, staging, arrived = self._under_way.popleft()
            arrived.synchronize()
            self.rows.index_copy_(0, index, staging.to(self.rows.dtype))
            landed += index.tolist()
        return landed


class Progress:
    """A bar over the characters of the texts, which measure the work better than the number of texts does."""

    def __init__(self, texts: list[str], max_length: int, show: bool | None):
        # the part beyond max_length costs nothing, and a token is about four characters
        self.work = [1 + min(len(text), 4 * int(max_length)) for text in texts]
        self.done = 0
        self.bar = tqdm(
            total=sum(self.work),
            desc="encode",
            unit="char",
            unit_scale=True,
            # None shows the bar only where standard error is a terminal
            disable=None if show is None else not show,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def advance(self, indices: list[int]) -> None:
        self.done += len(indices)
        self.bar.set_postfix_str(f"{self.done}/{len(self.work)} texts", refresh=False)
        self.bar.update(sum(self.work[index] for index in indices))


def check_counts(max_length: int, max_batch_tokens: int | None) -> tuple[int, int | None]:
    """Both, or TypeError or ValueError for what a stream does not take. max_batch_tokens may be None."""
    return (
        _check_count("max_length", max_length, MIN_MAX_LENGTH),
        None if max_batch_tokens is None else _check_count("max_batch_tokens", max_batch_tokens, 1),
    )


def _check_count(name: str, value: int, minimum: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}: {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    # numbers of numpy wrap
    return int(value)


def _check_pooled(window: TokenizedTexts, first: int, max_length: int) -> None:
    if (index := window.unpooled()) is not None:
        raise ValueError(
            f"nothing of prompts[{first + index}] is left to pool: the instruction takes all "
            f"{len(window.ids[index])} tokens (max_length is {max_length}). Raise max_length or shorten the "
            "instruction."
        )
