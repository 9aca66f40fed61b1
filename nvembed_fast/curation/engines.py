"""What answers the requests of `prompts`: an endpoint, a model on this machine, or rules.

| engine | answers by |
|---|---|
| `Endpoint` | any server with the chat completions of OpenAI's API, such as vLLM, SGLang, llama.cpp and NIM |
| `LocalModel` | a decoder by transformers, whose tokens llguidance holds to the schema of the answer |
| `TemplateEngine` | the rules of `templates`. No language model writes anything |
"""

import email.utils
import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from nvembed_fast.curation.prompts import Example, Request, Shape

__all__ = ["BAD", "LOST", "Endpoint", "Engine", "LocalModel", "Outcome", "Reply", "Sources", "TemplateEngine"]

Outcome = Literal[
    "answered", "malformed", "truncated", "refused", "rate limited", "timeout", "server error", "unreachable"
]
BAD: tuple[Outcome, ...] = ("malformed", "truncated", "refused")  # answers that are of no use
LOST: tuple[Outcome, ...] = ("rate limited", "timeout", "server error", "unreachable")  # no answer came
Sources = list[dict[str, str | None]]
_MAX_BYTES = 2**24
_LAST_WORDS = 300
_SEED_STEP = 1_000_003  # above the number of any request


@dataclass(frozen=True)
class Reply:
    """What came of a request.

    Attributes:
        outcome: "answered" if there is an answer, which its reader may still find malformed.
        text: of the answer.
        wait: seconds that the server asks to wait.
    """

    outcome: Outcome
    text: str = ""
    wait: float = 0.0


class Engine(Protocol):
    """Answers requests.

    Attributes:
        name: for people and the manifest.
        parallel: requests that may be under way at once.
    """

    name: str
    parallel: int

    def sources(self, licence: str) -> Sources:
        """For the manifest: package, sha256 and licence of what the texts come from."""
        ...

    def identity(self, request: Request) -> dict[str, Any]:
        """All that decides the answer to the first attempt, as JSON."""
        ...

    def ask(self, request: Request, attempt: int = 0) -> Reply:
        """Answer a request, possibly in several threads.

        Args:
            request: to answer.
            attempt: how many answers were of no use. Each draws by a seed of its own.

        Raises:
            RuntimeError: no other request will be answered either.
        """
        ...

    def num_examples(self, shape: Shape, task: str) -> int | None:
        """How many examples of a task there are. None: no limit is known."""
        ...


def _seed(request: Request, attempt: int) -> int:
    """Of sampling. With that of a bad answer the model would give it again."""
    return request.number + attempt * _SEED_STEP


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """A server with the chat completions of OpenAI's API.

    Args:
        base_url: in front of /chat/completions.
        model: as the server calls it.
        key: sent as a bearer token. None: none is sent.
        parallel: requests at once.
        max_tokens: of an answer.
        temperature: of sampling.
        timeout: seconds without a byte of an answer.
        extra: further keys of each request. Null removes a key that is sent by default.

    Raises:
        ValueError: the URL or the key cannot be sent.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key: str | None = None,
        parallel: int = 8,
        max_tokens: int = 2048,
        temperature: float = 1.0,
        timeout: float = 120.0,
        extra: Mapping[str, Any] | None = None,
    ):
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not base_url.isprintable():
            raise ValueError(f"the base URL must be like http://HOST:PORT/v1, got {base_url!r:.80}")
        if key is not None and (not key.isascii() or not key.isprintable()):
            raise ValueError("the key has characters that no header may have: is a line feed at its end?")
        self.name, self.parallel = model, parallel
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._timeout, self._max_tokens, self._temperature = timeout, max_tokens, temperature
        self._extra = dict(extra or {})
        self._headers = {"Content-Type": "application/json", "User-Agent": "nvembed-fast"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._opener = urllib.request.build_opener(_NoRedirect)

    def sources(self, licence: str) -> Sources:
        return [{"package": self.name, "sha256": None, "licence": licence}]

    def identity(self, request: Request) -> dict[str, Any]:
        return self._body(request, 0)

    def _body(self, request: Request, attempt: int) -> dict[str, Any]:
        schema = {"name": request.step, "strict": True, "schema": request.schema()}
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": request.prompt}],
            "response_format": {"type": "json_schema", "json_schema": schema},
            "max_tokens": self._max_tokens,
            "temperature": self._temperature,
            "seed": _seed(request, attempt),
        }
        return {key: value for key, value in (body | self._extra).items() if value is not None}

    def num_examples(self, shape: Shape, task: str) -> None:
        return None

    def ask(self, request: Request, attempt: int = 0) -> Reply:
        body = json.dumps(self._body(request, attempt)).encode()
        try:
            call = urllib.request.Request(self._url, body, self._headers, method="POST")
            with self._opener.open(call, timeout=self._timeout) as answer:
                return _read(answer.read(_MAX_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                return self._failed(error)
        except urllib.error.URLError as error:
            return Reply("timeout" if isinstance(error.reason, TimeoutError) else "unreachable")
        except TimeoutError:
            return Reply("timeout")
        except (ConnectionError, http.client.HTTPException):
            return Reply("unreachable")

    def _failed(self, error: urllib.error.HTTPError) -> Reply:
        wait = _seconds(error.headers.get("Retry-After", ""))
        if error.code == 429:
            return Reply("rate limited", wait=wait)
        if error.code >= 500 or error.code in (408, 425):
            return Reply("server error", wait=wait)
        hints = {401: ". Is the key right?", 403: ". Is the key right?", 404: ". Is the base URL right?"}
        if error.code < 400:
            said = f"redirects to {error.headers.get('Location')}, which is not followed"
        else:
            said = error.read(_LAST_WORDS).decode("utf-8", "replace").strip()
        raise RuntimeError(
            f"{self._url} answers {error.code} {error.reason}: {said}{hints.get(error.code, '')}"
        )


def _read(body: bytes) -> Reply:
    """The answer in a body of chat completions."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return Reply("malformed", body[:_LAST_WORDS].decode("utf-8", "replace"))
    match found:
        case {"choices": [{"message": {"refusal": str(text)}}, *_]} if text:
            return Reply("refused", text)
        case {"choices": [{"finish_reason": "content_filter"}, *_]}:
            return Reply("refused")
        case {"choices": [{"finish_reason": "length", "message": {"content": str() | None as text}}, *_]}:
            return Reply("truncated", text or "")
        case {"choices": [{"message": {"content": str(text)}}, *_]}:
            return Reply("answered", text)
    return Reply("malformed", json.dumps(found)[:_LAST_WORDS])


def _seconds(retry_after: str) -> float:
    """A Retry-After, which has seconds or a date. 0 for anything else."""
    if re.fullmatch(r"\d{1,6}(\.\d+)?", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


class LocalModel:
    """A decoder on this machine, by transformers.

    At each step llguidance says which tokens can still lead to an answer of the schema, and the others cannot
    be drawn. So an answer is never malformed, but it may be truncated.

    Args:
        model: a directory or a hub id.
        device: None: a GPU if there is one.
        max_tokens: of an answer.
        max_characters: of each text in it. A small model would not end by itself.
        temperature: of sampling.

    Raises:
        ImportError: llguidance is not installed.
    """

    parallel = 1

    def __init__(
        self,
        model: str,
        *,
        device: str | None = None,
        max_tokens: int = 2048,
        max_characters: int = 4000,
        temperature: float = 1.0,
    ):
        try:
            import llguidance
        except ModuleNotFoundError as error:
            raise ImportError(
                "a local model needs llguidance: pip install 'nvembed-fast[synthesis]'"
            ) from error
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name = model
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._max_tokens, self._max_characters = max_tokens, max_characters
        self._temperature = temperature
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        decoder: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        self._model = decoder.to(self._device).eval()
        self._end = self._tokenizer.eos_token_id
        self._tokens = llguidance.LLTokenizer(self._tokenizer.backend_tokenizer.to_str(), eos_token=self._end)

    def sources(self, licence: str) -> Sources:
        return [{"package": self.name, "sha256": None, "licence": licence}]

    def identity(self, request: Request) -> dict[str, Any]:
        return {
            "model": self.name,
            "prompt": request.prompt,
            "schema": request.schema(self._max_characters),
            "max_tokens": self._max_tokens,
            "temperature": self._temperature,
            "seed": _seed(request, 0),
        }

    def num_examples(self, shape: Shape, task: str) -> None:
        return None

    def ask(self, request: Request, attempt: int = 0) -> Reply:
        import torch
        from llguidance import LLMatcher

        schema = json.dumps(request.schema(self._max_characters))
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        matcher = LLMatcher(self._tokens, grammar)
        ids = torch.tensor([self._prompt_ids(request.prompt)], device=self._device)
        num_prompt, end = ids.shape[1], self._end

        def allowed(found: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
            if found.shape[1] > num_prompt:
                matcher.consume_token(int(found[0, -1]))
            return scores.masked_fill(~_mask(matcher, end, scores.shape[1]).to(scores.device), -torch.inf)

        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(_seed(request, attempt))
            found = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=self._temperature,
                top_k=0,
                max_new_tokens=self._max_tokens,
                logits_processor=[allowed],
                eos_token_id=end,
                pad_token_id=end,
            )[0, num_prompt:].tolist()
        text = self._tokenizer.decode(found, skip_special_tokens=True)
        return Reply("answered" if found and found[-1] == end else "truncated", text)

    def _prompt_ids(self, prompt: str) -> list[int]:
        if self._tokenizer.chat_template is None:
            return self._tokenizer(prompt)["input_ids"]
        messages = [{"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def _mask(matcher: Any, end: int, width: int) -> Any:
    """[width] bool: the tokens that may follow. The end alone, once the answer is whole."""
    import numpy as np
    import torch

    found = torch.zeros(width, dtype=torch.bool)
    if matcher.is_stopped():
        found[end] = True
    else:
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:width]
        found[: len(bits)] = torch.from_numpy(bits.astype(bool))
    return found


class TemplateEngine:
    """Rules in the place of a language model: see `templates`. The same packages give the same answers.

    Args:
        examples: shape -> task -> its examples, as `templates.examples` makes them.
        sources: packages that they come from.
    """

    name = "templates"
    parallel = 1

    def __init__(self, examples: Mapping[Shape, Mapping[str, list[Example]]], sources: Sources):
        self._examples, self._sources = examples, sources

    def sources(self, licence: str) -> Sources:
        return self._sources

    def identity(self, request: Request) -> dict[str, Any]:
        return {"engine": self.name, "task": request.task, "answer": self.ask(request).text}

    def num_examples(self, shape: Shape, task: str) -> int:
        return len(self._examples[shape][task])

    def ask(self, request: Request, attempt: int = 0) -> Reply:
        tasks = self._examples.get(request.shape, {})
        if request.step == "tasks":
            answer: dict[str, Any] = {"tasks": list(tasks)}
        else:
            answer = tasks[request.task][request.number]._asdict()
        return Reply("answered", json.dumps(answer, ensure_ascii=False))
