"""Texts to token ids and the first token that is pooled.

The published checkpoints tokenize the one string instruction + text + "</s>".
The tokenizer's own template adds BOS. The ids are cut at the right, end mark
included. Only where the end mark is pooled (`pooling_head="eos"`), it takes the
place of the last id of a cut text. The instruction's tokens are not pooled. How
their end is found is a rule of the model (`NVEmbedConfig.pooling_start`).

The checkpoint's tokenizer.json is the truth and is read by `tokenizers`, because
the LlamaTokenizer of transformers 5 gives other ids for leading or repeated spaces.
"""

import functools
import json
from collections.abc import Iterable, Iterator, KeysView, Mapping, Set
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from nvembed_fast import files
from nvembed_fast.config import NVEmbedConfig, PoolingStart, check_integer
from nvembed_fast.files import brief

__all__ = ["TOKENIZER_FILES", "TextTokenizer", "TokenizedTexts", "check_texts", "text_list"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_MAX_BYTES = 128 * 2**20
_GROUP = 2_000_000  # characters that are encoded together


class TokenizedTexts(NamedTuple):
    """Per text: int32 token ids, and the number of leading tokens that are not pooled.

    `num_cut` counts the texts that max_length has cut.
    """

    ids: list[np.ndarray]
    first_pooled: list[int]
    num_cut: int = 0

    def lengths(self) -> list[int]:
        return [len(i) for i in self.ids]

    def unpooled(self) -> int | None:
        """The first text of which no token is pooled, because its instruction takes all. None: none."""
        pairs = zip(self.ids, self.first_pooled, strict=True)
        return next((i for i, (ids, first) in enumerate(pairs) if first >= len(ids)), None)


class TextTokenizer:
    """Tokenizes texts as the model was trained to read them.

    Args:
        tokenizer: the checkpoint's tokenizer. Its own truncation and padding are switched off.
        eos_token: appended to every text, as a string.
        pooling_start: see `NVEmbedConfig`.
        files: the tokenizer's files by name, as `write` writes them. None makes them from the tokenizer.
        is_mask_instruction: see `NVEmbedConfig`.
        keeps_eos: a cut text ends with the end mark.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token: str,
        pooling_start: PoolingStart = "token_count",
        files: Mapping[str, bytes] | None = None,
        is_mask_instruction: bool = True,
        keeps_eos: bool = False,
    ):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        eos_id = tokenizer.token_to_id(eos_token)
        if eos_id is None:
            raise ValueError(
                f"eos_token: the end mark {brief(eos_token)} is not in the tokenizer's vocabulary"
            )
        self.backend = tokenizer
        self.eos_token = eos_token
        self.pooling_start = pooling_start
        self._files = files
        self._checked: tuple[int, int] | None = None  # (tokens, rows of the embedding)
        self.is_mask_instruction = is_mask_instruction
        self._end_of_cut = eos_id if keeps_eos else None

    @classmethod
    def from_directory(cls, directory: Path, config: NVEmbedConfig | None = None) -> "TextTokenizer":
        """Read tokenizer.json, and the end mark from tokenizer_config.json.

        Args:
            directory: of a model.
            config: its parsed config.json. None for a decoder that is no NV-Embed model yet.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or gives an id that the embedding of config has not.
        """
        present = [name for name in TOKENIZER_FILES if files.is_file(directory / name)]
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if name not in present:
                raise FileNotFoundError(
                    f"{directory / name} is missing: a model directory needs its tokenizer"
                )
        # kept, because the directory may be gone when the model is saved
        content = {name: files.read(directory / name, _MAX_BYTES) for name in present}
        settings = directory / "tokenizer_config.json"
        raw = files.read_json(settings)
        try:
            tokenizer = Tokenizer.from_buffer(content["tokenizer.json"])
            # its template may name tokens that are not there, and its model an unknown token that is not
            tokenizer.encode_batch(["", "\U0010ffff"])
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(
                f"{directory / 'tokenizer.json'} is not a readable tokenizer: {error}"
            ) from error
        rules = config or NVEmbedConfig()
        try:
            eos_token = _eos_token(raw)
            found = cls(
                tokenizer,
                eos_token,
                rules.pooling_start,
                content,
                rules.is_mask_instruction,
                rules.pooling_head == "eos",
            )
        except ValueError as error:
            raise ValueError(f"{settings}: {error}") from error
        if config is not None:
            found.check_ids(config.text_config.vocab_size, directory / "tokenizer.json")
        return found

    def check_ids(self, vocab_size: int, source: str | PathLike = "the tokenizer") -> None:
        """Refuse a tokenizer with an id beyond the embedding. On a GPU such an id would end the process.

        Args:
            vocab_size: rows of the embedding.
            source: named in the error.

        Raises:
            ValueError: an id is too large. The message names its token.
        """
        sizes = self.backend.get_vocab_size(with_added_tokens=True), vocab_size
        if sizes == self._checked:
            return
        ids = {id: token for token, id in self.backend.get_vocab(with_added_tokens=True).items()}
        # a template may add marks of its own
        ids |= {id: f"the mark {id}" for id in self.backend.encode("").ids if id not in ids}
        beyond = [id for id in ids if id >= vocab_size]
        if beyond:
            first = min(beyond)
            more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
            raise ValueError(
                f"{source}: token {brief(ids[first])} has id {first}{more}, but the embedding has "
                f"{vocab_size} rows (vocab_size in config.json): remove the token, or enlarge the embedding"
            )
        self._checked = sizes

    @property
    def definition(self) -> str:
        """What decides the ids of a text, as JSON: tokenizer.json in one form, and the end mark."""
        # without a file the tokenizer may change
        rules = self._rules_of_file if self._files else _rules(self.backend.to_str())
        return f"[{rules}, {json.dumps(self.eos_token)}]"

    @functools.cached_property
    def _rules_of_file(self) -> str:
        assert self._files is not None
        return _rules(self._files["tokenizer.json"])

    def write(self, directory: Path) -> list[Path]:
        """Write the tokenizer's files to a directory, as they were read. Returns their paths."""
        content = self._files or {
            "tokenizer.json": self.backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps({"eos_token": self.eos_token}).encode(),
        }
        for name, data in content.items():
            (directory / name).write_bytes(data)
        return [directory / name for name in content]

    def __call__(self, texts: list[str], instruction: str, max_length: int) -> TokenizedTexts:
        """Tokenize checked texts (`check_texts`).

        Args:
            texts: any number of texts.
            instruction: put in front of every text. "" for none.
            max_length: tokens per text, instruction and marks included. A longer text is cut at the right.
        """
        limit = self.max_characters(max_length)
        skips = bool(instruction) and self.is_mask_instruction
        start = self.instruction_length(instruction[:limit]) if skips else 0
        if start // 2 >= max_length:
            # nothing is left of any text, and tokenizing the instruction with each would take minutes
            filled = self._cut(self.backend.encode(instruction[:limit]).ids, max_length)
            return TokenizedTexts([filled] * len(texts), [max_length] * len(texts), len(texts))
        full = [(instruction + text[:limit] + self.eos_token)[:limit] for text in texts]
        by_offset = skips and self.pooling_start == "text_offset"
        border = len(instruction.rstrip())
        # the fast form gives no offsets
        encode = self.backend.encode_batch if by_offset else self.backend.encode_batch_fast
        ids, starts, num_cut = [], [], 0
        for group in _groups(full):
            for encoding in encode(group):
                ids.append(self._cut(encoding.ids, max_length))
                starts.append(_first_from(encoding.offsets[:max_length], border) if by_offset else start)
                # a text clipped to `limit` characters has more tokens than max_length, too
                num_cut += len(encoding.ids) > max_length
        return TokenizedTexts(ids, starts, num_cut)

    def _cut(self, ids: list[int], max_length: int) -> np.ndarray:
        kept = np.asarray(ids[:max_length], dtype=np.int32)
        if len(ids) > max_length and self._end_of_cut is not None:
            kept[-1] = self._end_of_cut
        return kept

    def instruction_length(self, instruction: str) -> int:
        """Tokens of the instruction on its own, without marks: the number that "token_count" drops."""
        return len(self.backend.encode(instruction, add_special_tokens=False).ids)

    def max_characters(self, max_length: int) -> int:
        """The number of characters of a text that are tokenized. Those far behind the cut cannot matter.

        A token covers at most `longest` characters, so the kept tokens lie in the first half of this, and the
        cut is thousands of characters behind them.
        """
        return 2 * self._longest_token * max(int(max_length), 512)

    @functools.cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.backend.get_vocab()))


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """Neighbours of about _GROUP characters. An encoding takes far more memory than the ids that are kept."""
    group, characters = [], 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if characters >= _GROUP:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _rules(content: str | bytes) -> str:
    """A tokenizer.json in one form, without what is switched off here."""
    used = {k: v for k, v in json.loads(content).items() if k not in ("truncation", "padding")}
    return json.dumps(used, sort_keys=True)


def _eos_token(raw: dict[str, Any]) -> str:
    """The end mark that the content of a tokenizer_config.json states."""
    if raw.get("eos_token_id") is not None:
        check_integer("eos_token_id", raw["eos_token_id"], 0)
    token = raw.get("eos_token")
    if isinstance(token, dict):  # an AddedToken
        token = token.get("content", token)
    if token is None:
        return "</s>"
    if not isinstance(token, str) or not token or any("\ud800" <= c <= "\udfff" for c in token):
        raise ValueError(f"eos_token must be a token, got {brief(token)}")
    return token


def _first_from(offsets: list[tuple[int, int]], border: int) -> int:
    """Index of the first token that starts at or after the character `border`. Marks have empty offsets."""
    for index, (start, stop) in enumerate(offsets):
        if start >= border and stop > start:
            return index
    return len(offsets)


def text_list(texts: Iterable[str], name: str = "prompts") -> list[str]:
    """The texts as a list, not yet looked at.

    Raises:
        TypeError: they are one string, or nothing that gives texts in an order. The message says what to do.
    """
    kind = type(texts).__name__
    if isinstance(texts, str):
        raise TypeError(f"{name} must be a list of texts, got one string: put it in a list")
    if getattr(texts, "ndim", None) == 0:
        raise TypeError(f"{name} must be a string or texts, got a {kind} of no dimension: pass str(x)")
    if isinstance(texts, bytes | bytearray | memoryview) or not isinstance(texts, Iterable):
        raise TypeError(f"{name} must be a string or texts, got {kind}")
    if isinstance(texts, Set) and not isinstance(texts, KeysView):
        raise TypeError(
            f"{name} must be in an order, and a {kind} has none: pass a list, such as sorted(texts)"
        )
    # a pandas Series has keys, and gives its values
    keyed = hasattr(texts, "keys") and getattr(texts, "ndim", None) != 1
    if isinstance(texts, Mapping) or keyed or hasattr(texts, "columns"):
        raise TypeError(
            f"{name} must be texts, got {kind}, which would give its keys or column names: pass "
            'the texts in it, such as x["text"] or list(x.values())'
        )
    return list(texts)


def check_texts(texts: Iterable[str], name: str = "prompts") -> list[str]:
    """The texts as a list.

    Raises:
        TypeError: one is not a string, and the message names its index. Or see `text_list`.
        ValueError: one has a lone surrogate and cannot be written as UTF-8. The message names its index.
    """
    texts = text_list(texts, name)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{index}] must be a string, got {type(text).__name__}: {text!r:.80}")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{name}[{index}] has a lone surrogate at character {error.start}, which no tokenizer "
                    "can read. Clean it with text.encode('utf-8', 'replace').decode('utf-8')."
                ) from error
    return texts
