"""Synthetic rows: a fake endpoint that answers well, badly, late or never. Filters, rules, the command."""

import hashlib
import http.server
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from nvembed_fast import packages
from nvembed_fast.cli import main
from nvembed_fast.cli import synthesize as command
from nvembed_fast.curation import cleaning, engines, prompts, synthesis, templates
from nvembed_fast.curation.decontamination import EvaluationTexts
from nvembed_fast.curation.dictionaries import Synset
from nvembed_fast.curation.engines import Endpoint, TemplateEngine
from nvembed_fast.curation.prompts import Example
from nvembed_fast.curation.sources import Part
from nvembed_fast.curation.text import Pair
from nvembed_fast.training.rows import open_rows

WORDS = [f"{a}{b}{c}" for a in "kmtsvdpr" for b in "eaiou" for c in ("l", "n", "sk", "rt", "m")]
EXAM = "the seven grey pilots of the harbour sleep under wide green awnings until noon"
EVALUATION = EvaluationTexts({"exam": [EXAM]}, {"gone": "no apt-get here"})


def prose(key: str, length: int) -> str:
    return " ".join(random.Random(key).choices(WORDS, k=length))


def well(prompt: str, seed: int) -> dict:
    """What a good model writes for a prompt: always the same."""
    key = hashlib.md5(f"{prompt} {seed}".encode()).hexdigest()
    if '"tasks"' in prompt:
        return {"tasks": [f"Given {prose(f'{key} {n}', 4)}, retrieve {prose(key, 3)}" for n in range(20)]}
    long_query, long_document = "a text, such as" in prompt, "a passage" in prompt
    return {
        "query": prose(f"{key} query", 40 if long_query else 6),
        "positive": prose(f"{key} positive", 60 if long_document else 5),
        "negative": prose(f"{key} negative", 60 if long_document else 5),
    }


class Fake(http.server.ThreadingHTTPServer):
    """An endpoint. `script` says how a request of examples ends: of its number, and of how often it came.

    Attributes:
        asked: how often each body came, whatever the attempt.
        seeds: of the attempts at each, in their order.
        headers: of the last request.
        most: requests that were under way at once.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: Callable[[int, int], str] = lambda number, attempt: "well"
        self.script_of_tasks: Callable[[int, int], str] = lambda number, attempt: "well"
        self.write = well
        self.asked: Counter[str] = Counter()
        self.seeds: dict[str, list[int]] = {}
        self.headers: dict[str, str] = {}
        self.retry_after = "0"
        self.most = self.under_way = 0
        self.over = threading.Event()
        self.lock = threading.Lock()
        self._numbers: dict[bool, dict[str, int]] = {True: {}, False: {}}

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def behaviour(self, body: str) -> str:
        is_example = '"tasks"' not in json.loads(body)["messages"][0]["content"]
        content = json.loads(body)
        seed = content.get("seed", 0)
        body = json.dumps(content | {"seed": seed % engines._SEED_STEP})
        with self.lock:
            self.asked[body] += 1
            self.seeds.setdefault(body, []).append(seed)
            numbers = self._numbers[is_example]
            number, attempt = numbers.setdefault(body, len(numbers)), self.asked[body] - 1
        return (self.script if is_example else self.script_of_tasks)(number, attempt)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        assert self.path == "/v1/chat/completions"
        self.server.headers = dict(self.headers)
        with self.server.lock:
            self.server.under_way += 1
            self.server.most = max(self.server.most, self.server.under_way)
        try:
            self._answer(self.server.behaviour(body), json.loads(body))
        except BrokenPipeError:
            pass
        finally:
            with self.server.lock:
                self.server.under_way -= 1

    def _answer(self, behaviour: str, body: dict) -> None:
        seed = body["seed"] % engines._SEED_STEP  # what it writes is that of the first attempt
        text = json.dumps(self.server.write(body["messages"][0]["content"], seed))
        match behaviour:
            case "drop":
                self.close_connection = True
                return
            case "late":
                self.server.over.wait(60)
            case "no JSON":
                text = "Surely! Here is an example."
            case "other keys":
                text = '{"query": "q", "positive": "p"}'
            case "no chat":
                self._send(200, "<html>")
                return
            case "429" | "500" | "503" | "401" | "404" | "302":
                self._send(int(behaviour), '{"error": "said the server"}')
                return
        choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        if behaviour == "truncated":
            choice = {"finish_reason": "length", "message": {"content": text[:-9]}}
        if behaviour == "refused":
            choice["message"] = {"content": None, "refusal": "I must not"}
        self._send(200, json.dumps({"choices": [choice]}))

    def _send(self, status: int, content: str) -> None:
        self.send_response(status)
        if status in (429, 503):
            self.send_header("Retry-After", self.server.retry_after)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())


@pytest.fixture
def fake(monkeypatch) -> Iterator[Fake]:
    monkeypatch.setattr(synthesis, "FIRST_WAIT_S", 0.01)
    server = Fake()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def endpoint(fake: Fake, **options) -> Endpoint:
    return Endpoint(fake.base_url, "model", **{"timeout": 60, "parallel": 4} | options)


def made(directory, engine, rows=24, **options) -> tuple[dict, list[str]]:
    lines: list[str] = []
    options = {"evaluation": EVALUATION, "say": lines.append} | options
    return synthesis.synthesize(directory, engine, rows=rows, **options), lines


def rows_of(directory, name="synthetic") -> list[dict]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


# the engine and the journal


def test_an_endpoint_that_answers_well(fake, tmp_path):
    entry, _ = made(tmp_path, endpoint(fake, key="secret"), licence="CC0")
    assert entry == json.loads((tmp_path / "manifest.json").read_text())["sets"]["synthetic"]
    assert entry["sources"] == [{"package": "model", "sha256": None, "licence": "CC0"}]
    assert (entry["rows"], entry["tasks"], entry["engine"]) == (24, 60, "Endpoint")
    assert entry["shapes"] == {"long-short": 8, "short-long": 8, "short-short": 8}
    assert entry["requests"] == {"answered": 27} and entry["dropped"] == {}
    assert (entry["in_batch"], entry["not_compared_with"]) == (False, ["gone"])
    assert entry["sha256"] == hashlib.sha256((tmp_path / "synthetic.jsonl").read_bytes()).hexdigest()
    assert fake.headers["Authorization"] == "Bearer secret"
    body = json.loads(next(iter(fake.asked)))
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["tasks"]
    rows = open_rows(tmp_path / "synthetic.jsonl")
    for row in map(rows.row, range(len(rows))):
        assert row.prompt and row.prompt.startswith("Given ") and len(row.negatives) == 1


OUTCOMES = {
    "no JSON": "malformed",
    "other keys": "malformed",
    "no chat": "malformed",
    "truncated": "truncated",
    "refused": "refused",
    "429": "rate limited",
    "503": "server error",
    "500": "server error",
    "late": "timeout",
    "drop": "unreachable",
}


def test_every_outcome_is_counted_and_asked_again(fake, tmp_path):
    """Each of the first requests ends badly once. Then the rows are those of a good run."""
    made(tmp_path / "whole", endpoint(fake))
    wanted = rows_of(tmp_path / "whole")
    fake.asked.clear()
    fake._numbers = {True: {}, False: {}}
    bad = list(OUTCOMES)
    fake.script = lambda number, attempt: bad[number] if attempt == 0 and number < len(bad) else "well"
    entry, _ = made(tmp_path / "data", endpoint(fake, timeout=4))
    assert entry["requests"] == Counter(OUTCOMES.values()) + Counter(answered=27)
    assert rows_of(tmp_path / "data") == wanted
    # a request is the same one in its second try
    assert Counter(fake.asked.values()) == {1: 27 - len(bad), 2: len(bad)}


def test_a_resumed_run_makes_no_second_request(fake, tmp_path, ctrl_c):
    """Ctrl-C in the middle. What was answered and what was under way stays."""
    made(tmp_path / "whole", endpoint(fake))
    wanted = (tmp_path / "whole/synthetic.jsonl").read_bytes()
    fake.asked.clear()
    fake._numbers = {True: {}, False: {}}
    is_told = threading.Event()

    def script(number: int, attempt: int) -> str:
        if number == 9 and attempt == 0:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if number > 9:
            is_told.wait(60)
        return "well"

    def say(line: str) -> None:
        if line == "waiting for the requests under way: Ctrl-C again drops them":
            is_told.set()

    fake.script = script
    with pytest.raises(
        KeyboardInterrupt, match=r"\d+ of 24 examples are in .*, and the same command goes on"
    ):
        made(tmp_path / "data", endpoint(fake), say=say)
    assert not (tmp_path / "data/synthetic.jsonl").exists()
    num_lines = len((tmp_path / "data/answers/synthetic.jsonl").read_text().splitlines())
    assert num_lines == sum(fake.asked.values()) <= 3 + 10 + 4
    entry, lines = made(tmp_path / "data", endpoint(fake))
    assert set(fake.asked.values()) == {1} and len(fake.asked) == 27
    assert (tmp_path / "data/synthetic.jsonl").read_bytes() == wanted
    assert f"examples: {num_lines - 3} of 24 are there, {27 - num_lines} are asked for" in lines
    fake.asked.clear()
    assert made(tmp_path / "data", endpoint(fake))[0] == entry and not fake.asked


def test_the_rows_do_not_depend_on_the_order_of_the_answers(fake, tmp_path):
    made(tmp_path / "whole", endpoint(fake, parallel=1))
    fake._numbers = {True: {}, False: {}}
    has_come = threading.Event()

    def script(number: int, attempt: int) -> str:
        if number == 5:
            has_come.set()
        if number == 0:
            has_come.wait(60)
        return "well"

    fake.script = script
    made(tmp_path / "data", endpoint(fake, parallel=2))
    journals = [(tmp_path / name / "answers/synthetic.jsonl").read_text() for name in ("whole", "data")]
    assert journals[0] != journals[1], "the answers came in one order, so this test would prove nothing"
    assert rows_of(tmp_path / "data") == rows_of(tmp_path / "whole")


def test_a_line_that_a_kill_cut_off_is_asked_again(fake, tmp_path):
    made(tmp_path, endpoint(fake))
    file = tmp_path / "answers/synthetic.jsonl"
    content, rows = file.read_bytes(), rows_of(tmp_path)
    file.write_bytes(content[:-7])
    fake.asked.clear()
    made(tmp_path, endpoint(fake))
    assert sum(fake.asked.values()) == 1 and rows_of(tmp_path) == rows
    assert sorted(file.read_bytes().splitlines()) == sorted(content.splitlines())


def test_a_full_disk_loses_no_answer_that_is_there(fake, tmp_path, limited_files):
    made(tmp_path / "whole", endpoint(fake))
    made(tmp_path / "cut", endpoint(fake), rows=3)
    file = tmp_path / "cut/answers/synthetic.jsonl"
    before = file.read_bytes()
    limit = len(before) + 100  # in the midst of a line, which has more
    with limited_files(limit), pytest.raises(OSError, match=r"synthetic\.jsonl \(File too large\).*goes on"):
        made(tmp_path / "cut", endpoint(fake))
    assert file.read_bytes() == before
    with synthesis.Journal(file) as journal:
        with limited_files(limit), pytest.raises(OSError, match="File too large"):
            journal.add("key", "answered", 200 * "x")
        assert "key" not in journal
        journal.add("key", "answered", "y")
        assert journal.answer("key") == "y"
    made(tmp_path / "cut", endpoint(fake))
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def test_a_journal_of_something_else_is_refused(fake, tmp_path):
    made(tmp_path, endpoint(fake))
    file = tmp_path / "answers/synthetic.jsonl"
    file.write_text(file.read_text() + '{"query": "mine"}\n')
    before = file.read_bytes()
    with pytest.raises(ValueError, match="line 28 is no answer of an engine"):
        made(tmp_path, endpoint(fake))
    assert file.read_bytes() == before


def test_bad_answers_count_over_all_runs(fake, tmp_path):
    """A request whose answers are of no use is made three times, and no more in a second run."""
    fake.script = lambda number, attempt: "truncated" if number == 0 else "well"
    first, lines = made(tmp_path, endpoint(fake))
    assert first["requests"] == {"answered": 26, "truncated": 3, "without an answer": 1}
    assert "examples: 1 requests were given up (23 answered, 3 truncated)" in lines
    assert max(fake.asked.values()) == 3
    assert made(tmp_path, endpoint(fake))[0] == first and max(fake.asked.values()) == 3
    fake.script = lambda number, attempt: "well"
    assert made(tmp_path, endpoint(fake), attempts=4)[0]["requests"] == {"answered": 27, "truncated": 3}
    # a seed of its own for each
    ((first_seed, *others),) = [seeds for seeds in fake.seeds.values() if len(seeds) > 1]
    assert others == [first_seed + attempt * engines._SEED_STEP for attempt in (1, 2, 3)]


def test_what_did_not_arrive_is_asked_again_in_the_next_run(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "TRIES", 4)  # more than attempts at a usable answer
    fake.script = lambda number, attempt: "500" if number == 0 else "well"
    assert made(tmp_path, endpoint(fake))[0]["requests"] == {
        "answered": 26, "server error": 4, "without an answer": 1,
    }  # fmt: skip
    fake.script = lambda number, attempt: "well"
    assert made(tmp_path, endpoint(fake))[0]["requests"] == {"answered": 27, "server error": 4}
    assert all(len(set(seeds)) == 1 for seeds in fake.seeds.values()), "no answer was bad"


def test_an_endpoint_that_is_gone_ends_the_run(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "TRIES", 1)
    monkeypatch.setattr(synthesis, "MAX_GIVEN_UP", 5)
    fake.script = lambda number, attempt: "well" if number < 4 else "drop"
    with pytest.raises(
        RuntimeError, match=r"model: 5 requests one after the other were given up \(4 ans.*, 5 unreach"
    ):
        made(tmp_path, endpoint(fake, parallel=1))
    assert sum(fake.asked.values()) == 3 + 4 + 5
    fake.script = lambda number, attempt: "well"
    assert made(tmp_path, endpoint(fake))[0]["requests"] == {"answered": 27, "unreachable": 5}


@pytest.mark.parametrize(
    "status, message",
    [
        ("401", "answers 401 Unauthorized: .*said the server.*Is the key right"),
        ("404", "answers 404 .*Is the base URL right"),
        ("302", "redirects to http://127.0.0.1:9/elsewhere, which is not followed"),
    ],
)
def test_what_no_other_request_can_mend_ends_the_run_at_once(fake, tmp_path, status, message):
    fake.script_of_tasks = lambda number, attempt: status
    with pytest.raises(RuntimeError, match=message):
        made(tmp_path, endpoint(fake, parallel=1))
    assert sum(fake.asked.values()) == 1


class Limited:
    """An engine that answers the first request by a limit, and others once that is known to all threads."""

    name = "limited"

    def __init__(self) -> None:
        self.asked: list[tuple[int, float]] = []
        self.asking: synthesis._Asking

    def ask(self, request: prompts.Request, attempt: int) -> engines.Reply:
        is_first = not self.asked
        self.asked.append((request.number, time.monotonic()))
        if is_first:
            return engines.Reply("rate limited", wait=2.0)
        deadline = time.monotonic() + 5
        while not self.asking._not_before and time.monotonic() < deadline:
            time.sleep(0.01)
        return engines.Reply("answered", json.dumps(well("an example", request.number)))


def test_all_threads_wait_as_long_as_the_server_asks(tmp_path):
    engine = Limited()
    requests = [prompts.Request("example", "short-short", number, "") for number in range(6)]
    with synthesis.Journal(tmp_path / "answers.jsonl") as journal:
        todo = iter([(str(request.number), request) for request in requests])
        engine.asking = synthesis._Asking(engine, journal, 3, todo)
        threads = [synthesis._Thread(engine.asking.work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(str(number) in journal for number in range(6))
    (_, limited), second, *later = engine.asked
    assert engine.asking._not_before >= limited + 2.0
    assert len(later) == 5 and all(at >= engine.asking._not_before for _, at in later)


def test_as_many_requests_as_asked_for_are_under_way_at_once(fake, tmp_path):
    together = threading.Barrier(4)

    def script(number: int, attempt: int) -> str:
        if number < 4:
            together.wait(20)
        return "well"

    fake.script = script
    made(tmp_path, endpoint(fake))
    assert fake.most == 4


def test_a_limit_has_its_wait(fake):
    fake.retry_after = "7"
    fake.script_of_tasks = lambda number, attempt: "429"
    reply = endpoint(fake).ask(prompts.brainstorm("short-long", 0, 0))
    assert reply == engines.Reply("rate limited", wait=7.0)


def test_retry_after_is_seconds_or_a_date():
    assert engines._seconds("7") == 7.0 and engines._seconds("") == 0.0 and engines._seconds("soon") == 0.0
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 50 < engines._seconds(date) <= 60
    assert engines._seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://host/v1\n"])
def test_a_base_url_is_one(url):
    with pytest.raises(ValueError, match="the base URL must be like http://HOST:PORT/v1, got "):
        Endpoint(url, "model")


def test_a_key_fits_a_header():
    with pytest.raises(ValueError, match="is a line feed at its end"):
        Endpoint("http://host/v1", "model", key="secret\n")


def test_extra_keys_reach_the_request_and_null_removes_one():
    request = prompts.brainstorm("short-long", 0, 0)
    plain = Endpoint("http://host/v1", "model").identity(request)
    extra = {"max_tokens": None, "max_completion_tokens": 5}
    changed = Endpoint("http://host/v1", "model", extra=extra).identity(request)
    assert changed == {k: v for k, v in plain.items() if k != "max_tokens"} | {"max_completion_tokens": 5}


def test_a_request_is_known_by_what_decides_its_answer():
    """Another server with the same model gives the answer, another model or prompt another one."""
    request = prompts.brainstorm("short-long", 0, 0)

    def key(engine=None, request=request) -> str:
        return synthesis.request_key(engine or Endpoint("http://host/v1", "model"), request)

    assert key() == key(Endpoint("http://other/v1", "model", key="k", timeout=1))
    others = [
        key(Endpoint("http://host/v1", "other")),
        key(Endpoint("http://host/v1", "model", temperature=0.5)),
        key(request=prompts.brainstorm("short-long", 1, 0)),
        key(request=prompts.example("Given a, find b", "short-long", 0, 0, ["en"])),
    ]
    assert len({key(), *others}) == 5


# prompts


def test_an_example_draws_its_attributes():
    task = "Given a question, retrieve an answer"
    made = [prompts.example(task, "short-long", n, 0, ["en", "de"]) for n in range(60)]
    assert made == [prompts.example(task, "short-long", n, 0, ["en", "de"]) for n in range(60)]
    assert {one.language for one in made} == {"en", "de"}
    assert all(task in one.prompt for one in made)
    assert all(("German" in one.prompt) == (one.language == "de") for one in made)
    assert len({one.prompt for one in made}) > 40
    assert made[0] != prompts.example(task, "short-long", 0, 1, ["en", "de"])
    shown = {prompts.brainstorm("short-long", n, 0).prompt for n in range(20)}
    assert len(shown) > 10


@pytest.mark.parametrize(
    "answer",
    ["", "no", "{", "[]", '"x"', '{"query": "q"}', '{"query": "q", "positive": 5, "negative": "n"}',
     "{" * 9999, '{"query": "q", "positive": " ", "negative": "n"}',
     '{"query": "\\ud800", "positive": "p", "negative": "n"}'],
)  # fmt: skip
def test_a_malformed_answer_is_told(answer):
    with pytest.raises(ValueError, match="no (JSON )?object"):
        prompts.example_of(answer)
    with pytest.raises(ValueError, match="no (JSON )?object"):
        prompts.tasks_of(answer)


def test_an_answer_in_a_fence_is_read():
    answer = '```json\n{"query": " q ", "positive": "p", "negative": "n"}\n```'
    assert prompts.example_of(answer) == Example("q", "p", "n")
    tasks = '{"tasks": ["Given a  word,\\nfind another.", "short"]}'
    assert prompts.tasks_of(tasks) == ["Given a word, find another"]


# filters


def reason(query, positive, negative, shape="short-short", language="en", language_of=None) -> str | None:
    request = prompts.Request("example", shape, 0, "", "task", language)
    return synthesis._reason(request, Example(query, positive, negative), language_of)


LONG_TEXT = prose("long", 40)


@pytest.mark.parametrize(
    "query, positive, negative, shape, wanted",
    [
        ("what is it", "an answer", "no answer", "short-short", None),
        ("what is it", LONG_TEXT, prose("other", 40), "short-long", None),
        (LONG_TEXT, "a label", "no label", "long-short", None),
        ("what is it", "an answer", prose("other", 40), "short-long", "length of the positive"),
        ("what is it", LONG_TEXT, "an answer", "short-long", "length of the negative"),
        ("what is it", "an answer", "no", "long-short", "length of the query"),
        (prose("q", 300), "an answer", "no", "short-short", "length of the query"),
        ("what is it", "1 2 3 4 5 " * 20, LONG_TEXT, "short-long", "no prose"),
        ("what", "?!", "no", "short-short", "no words"),
        ("what is it", "an answer", "An  answer!", "short-short", "negative is another text"),
        ("what is it", "an answer", "What is it?", "short-short", "negative is another text"),
        ("what is it", "What is it?", "no", "short-short", "copied query"),
        (LONG_TEXT[30:90], LONG_TEXT, prose("other", 40), "short-long", "copied query"),
        (LONG_TEXT, LONG_TEXT[30:90], "no", "long-short", "copied query"),
        (LONG_TEXT, LONG_TEXT.split()[3], "no", "long-short", None),
    ],
)
def test_a_bad_example_has_its_reason(query, positive, negative, shape, wanted):
    assert reason(query, positive, negative, shape) == wanted


SIGNS = {  # words with vowel signs, which are no letters to str.isalpha
    "hi": "\u092f\u0939\u093e\u0901 \u0905\u0928\u0947\u0915 \u092d\u093e\u0937\u093e\u090f\u0901",
    "bn": "\u098f\u0995\u099f\u09bf \u09b0\u09be\u09b7\u09cd\u099f\u09cd\u09b0",
    "ta": "\u0bae\u0bbe\u0ba8\u0bbf\u0bb2\u0bae\u0bcd",
    "te": "\u0c24\u0c46\u0c32\u0c41\u0c17\u0c41 \u0c2d\u0c3e\u0c37",
}


@pytest.mark.parametrize("language", SIGNS)
def test_vowel_signs_are_prose(language):
    one, other = (f"{start} {' '.join([SIGNS[language]] * 20)}" for start in ("one", "other"))
    assert sum(map(str.isalpha, one)) < cleaning.MIN_LETTERS * len("".join(one.split()))
    assert reason("what is it", one, other, "short-long", language) is None


def test_a_text_of_another_language_is_dropped_if_it_is_long_enough_to_tell():
    asked = []

    def language_of(text: str) -> str:
        asked.append(text)
        return "de"

    texts = ("what is it", LONG_TEXT, prose("other", 40), "short-long")
    assert reason(*texts, language_of=language_of) == "another language"
    assert reason(*texts, language="de", language_of=language_of) is None
    assert len(asked) == 2 and all(text in asked[0] for text in texts[:3])
    assert reason("what", "an answer", "no", language_of=language_of) is None and len(asked) == 2


def test_planted_evaluation_texts_are_rejected(fake, tmp_path):
    """In the query, in the positive or in the negative, among other words and in other letters."""
    planted = {2: "query", 5: "positive", 11: "negative"}
    numbers: dict[str, int] = {}

    def write(prompt: str, seed: int) -> dict:
        answer = well(prompt, seed)
        if "tasks" not in answer:
            side = planted.get(numbers.setdefault(f"{prompt} {seed}", len(numbers)))
            if side:
                answer[side] = (
                    f"{prose('front', 12)} {EXAM.upper().replace(' ', ', ')}! {prose('behind', 12)}"
                )
        return answer

    fake.write = write
    entry, _ = made(tmp_path, endpoint(fake, parallel=1), rows=12, shapes=["short-long"])
    assert entry["dropped"] == {"in exam": 3} and entry["rows"] == 9
    assert "grey" not in (tmp_path / "synthetic.jsonl").read_text().lower()


def test_duplicates_are_dropped(fake, tmp_path):
    """The same query with another positive, and nearly the same texts with another query."""
    answers: list[dict] = []

    def write(prompt: str, seed: int) -> dict:
        answer = well(prompt, seed)
        if "tasks" not in answer:
            answers.append(answer)
            if len(answers) == 2:
                answer["query"] = answers[0]["query"].upper()
            if len(answers) == 3:
                answer["positive"] = answers[0]["positive"] + " more"
        return answer

    fake.write = write
    entry, _ = made(tmp_path, endpoint(fake, parallel=1), rows=6, shapes=["short-long"])
    assert entry["dropped"] == {"duplicate query": 1, "near duplicate": 1} and entry["rows"] == 4


class Stub:
    """A teacher that finds the documents of even rows only behind all others."""

    def __init__(self, num: int, documents: int):
        self.num, self.documents = num, documents

    def best(self, rows, k):
        found = [[row] if row % 2 else [self.num + row] for row in rows]
        return np.ones((len(rows), 1), np.float32), np.array(found)


def test_a_positive_that_the_teacher_does_not_find_is_dropped(fake, tmp_path):
    given = []

    def teacher(queries, tasks, documents):
        given.append((queries, tasks, documents))
        return Stub(len(queries), len(documents))

    made(tmp_path / "all", endpoint(fake))
    everything = rows_of(tmp_path / "all")
    entry, _ = made(tmp_path / "some", endpoint(fake), teacher=teacher)
    assert entry["dropped"] == {"not found by the teacher": 12}
    assert rows_of(tmp_path / "some") == everything[1::2]
    ((queries, tasks, documents),) = given
    assert queries == [row["query"] for row in everything] and tasks == [row["prompt"] for row in everything]
    assert documents == [row[side][0] for side in ("pos", "neg") for row in everything]


def test_a_set_without_a_row_is_an_error(fake, tmp_path):
    fake.write = lambda prompt, seed: well(prompt, seed) | ({} if '"tasks"' in prompt else {"query": "?"})
    with pytest.raises(
        ValueError, match="no row is left: 27 answered. Dropped: 8 length of the query, 16 no words"
    ):
        made(tmp_path, endpoint(fake))
    assert not (tmp_path / "synthetic.jsonl").exists()


def test_an_engine_without_tasks_is_an_error(fake, tmp_path):
    fake.script_of_tasks = lambda number, attempt: "no JSON"
    with pytest.raises(
        ValueError, match="given no task of the shape short-long: 9 malformed, 3 without an answer"
    ):
        made(tmp_path, endpoint(fake))


def test_other_sets_of_the_folder_stay(fake, tmp_path):
    made(tmp_path, endpoint(fake), name="first")
    made(tmp_path, endpoint(fake), name="second", rows=3)
    manifest = json.loads((tmp_path / "manifest.json").read_text())["sets"]
    assert {name: manifest[name]["rows"] for name in manifest} == {"first": 24, "second": 3}
    assert len(rows_of(tmp_path, "first")) == 24


# rules


def synset(number: int, words, meaning: str, examples=(), relations=(), opposites=()) -> Synset:
    relations = tuple((symbol, f"n {other}") for symbol, other in relations)
    opposites = tuple((a, f"n {other}", b) for a, other, b in opposites)
    return Synset(f"n {number}", tuple(words), meaning, tuple(examples), relations, opposites)


SYNSETS = [
    synset(0, ["animal"], "a living being that moves", (), [("~", 1), ("~", 2), ("~", 4)]),
    synset(
        1, ["cat", "mouser"], "a small feline kept as a pet " * 6, ["the cat purred"], [("@", 0), ("%p", 3)]
    ),
    synset(2, ["dog"], "a canine kept as a pet " * 7, (), [("@", 0)]),
    synset(3, ["paw"], "the foot of a beast", (), []),
    synset(4, ["horse"], "a hoofed mammal that is ridden " * 6, (), [("@", 0)]),
    synset(5, ["hot", "heated"], "of a high temperature", ["a hot stove"], [], [(0, 6, 1)]),
    synset(6, ["icy", "cold"], "of a low temperature", (), [], [(1, 5, 0)]),
    synset(7, ["hot"], "in great demand", (), []),
]


def test_rules_of_wordnet():
    found = [
        (shape, task.rpartition("retrieve ")[2], one)
        for shape, task, _, one in templates.from_wordnet(SYNSETS)
    ]
    by_task: dict[str, list[Example]] = {}
    for _, task, one in found:
        by_task.setdefault(task, []).append(one)
    dog = f"dog: {SYNSETS[2].meaning}"
    (broader,) = [one for one in by_task["a broader term"] if one.query == dog]
    assert broader.positive == "animal" and broader.negative in ("cat", "horse")
    assert "a narrower term" not in by_task  # an animal has nothing above it to be the negative
    (part,) = by_task["a part of what it names"]
    assert part.positive == "paw" and part.negative in ("dog", "horse")
    (another,) = [one for one in by_task["another word for it"] if one.query.startswith("cat")]
    assert another.positive == "mouser"
    assert Example("hot: of a high temperature", "cold", "heated") in by_task["its opposite"]
    (sense,) = by_task["what it means there"]
    assert sense == Example("hot, as in: a hot stove", "of a high temperature", "in great demand")
    entries = {one.query: one for one in by_task["its headword"]}
    assert {one.positive for one in entries.values()} == {"cat", "dog", "horse"}
    for entry, one in entries.items():
        assert entry.endswith("It is a kind of animal." if one.positive != "cat" else "Its parts are paw.")
        assert one.negative in {"cat", "dog", "horse"} - {one.positive}
    for one in by_task["its entry in a dictionary"]:
        assert one.positive in entries and one.negative in entries and one.positive != one.negative


def test_rules_of_sections():
    page = [Pair(f"heading {n}", prose(f"section {n}", 40), "page") for n in range(4)]
    found = [*templates.from_sections([*page, Pair("alone", prose("alone", 40), "other page")])]
    sections = {one.positive: one for shape, *_, one in found if shape == "short-long"}
    assert [*sections] == [pair.document for pair in page[1:]]
    for pair in page[1:]:
        one = sections[pair.document]
        assert one.query == f"{pair.query}, on the page about heading 0"
        assert one.negative in {other.document for other in page} - {pair.document}
    headings = [one for shape, *_, one in found if shape == "long-short"]
    assert [(one.query, one.positive) for one in headings] == [(p.document, p.query) for p in page[1:]]


@pytest.fixture
def planted(monkeypatch, tmp_path) -> None:
    """Packages with the synsets above, and with pages of sections."""
    debian = packages.DebianPackage(tmp_path, "3.0-1", "f" * 64)
    monkeypatch.setattr(packages, "debian", lambda package, cache: debian)
    monkeypatch.setattr(packages, "fetch", lambda package, sha256, cache: tmp_path)
    monkeypatch.setattr(templates.dictionaries, "synsets", lambda directory: iter(SYNSETS))

    def read(archive):
        for page in range(40):
            for n in range(4):
                yield Pair(f"heading {page} {n}", prose(f"{page} {n}", 40), f"page {page}")

    documentation = templates.TEXT_SETS["documentation"]
    part = Part("planted==1.0", "0" * 64, "MIT", read)
    monkeypatch.setattr(
        templates,
        "TEXT_SETS",
        {
            "wordnet-words": templates.TEXT_SETS["wordnet-words"],
            "documentation": replace(documentation, parts=(part,)),
        },
    )


def test_templates_make_a_set(planted, tmp_path):
    """As many rows as there are examples, the same bytes again, with the packages in the manifest."""
    engine = TemplateEngine(*templates.examples())
    entry, lines = made(tmp_path / "first", engine, rows=10**4)
    assert entry["engine"] == "TemplateEngine" and entry["tasks"] == 9
    assert entry["sources"] == [
        {"package": "wordnet-base=3.0-1", "sha256": "f" * 64, "licence": "WordNet"},
        {"package": "planted==1.0", "sha256": "0" * 64, "licence": "MIT"},
    ]
    num_examples = sum(
        engine.num_examples(shape, task) for shape, by in engine._examples.items() for task in by
    )
    assert entry["requests"]["answered"] == num_examples + 3
    assert entry["rows"] + sum(entry["dropped"].values()) == num_examples
    made(tmp_path / "second", TemplateEngine(*templates.examples()), rows=10**4)
    contents = {(tmp_path / name / "synthetic.jsonl").read_bytes() for name in ("first", "second")}
    assert len(contents) == 1
    assert {row["prompt"].split()[0] for row in rows_of(tmp_path / "first")} == {"Given"}


def test_dev_pages_give_no_example(planted, monkeypatch):
    by_task, _ = templates.examples()
    monkeypatch.setattr(templates, "DEV_PER_MILLE", 500)
    fewer, _ = templates.examples()
    counts = [
        sum(len(found) for by in all_of.values() for found in by.values()) for all_of in (by_task, fewer)
    ]
    assert counts[1] < 0.8 * counts[0]


# the command


@pytest.fixture
def ready(monkeypatch, fake) -> Fake:
    monkeypatch.setattr(EvaluationTexts, "load", classmethod(lambda cls, without=(): EVALUATION))
    monkeypatch.setattr(command, "_language_of", lambda: lambda text: "en")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return fake


def asking(folder, rows: int) -> list[str]:
    """The command for an endpoint, whose address is still missing."""
    options = ["--engine", "endpoint", "--model", "model", "--rows", str(rows)]
    return ["synthesize", "-o", str(folder), *options]


def test_the_command_writes_a_set(ready, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from the environment")
    arguments = asking(tmp_path, 12)
    assert main([*arguments, "--base-url", f"{ready.base_url}/", "--licence", "CC0"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path}/synthetic.jsonl: 12 rows of 60 tasks\n"
    assert "warning: not compared with gone: no apt-get here" in shown.err
    assert "note: requests: 15 answered" in shown.err and "note: dropped: none" in shown.err
    assert ready.headers["Authorization"] == "Bearer from the environment"
    (entry,) = json.loads((tmp_path / "manifest.json").read_text())["sets"].values()
    assert entry["sources"][0]["licence"] == "CC0"


def test_the_command_takes_a_teacher(ready, tmp_path, monkeypatch):
    """The query's words decide which document is found."""
    from nvembed_fast.cli import mine

    class Bags:
        width, fingerprint = 64, "bags"

        def encode(self, texts, prompts):
            found = np.zeros((len(texts), 64), np.float32)
            for row, text in enumerate(texts):
                for word in text.split():
                    found[row, int(hashlib.md5(word.encode()).hexdigest(), 16) % 64] += 1
            return found

    def write(prompt: str, seed: int) -> dict:
        answer = well(prompt, seed)
        if "query" in answer and seed == 0:
            answer["positive"] = f"{' '.join(reversed(answer['query'].split()))} more"
        return answer

    ready.write = write
    monkeypatch.setattr(mine, "encoder_loader", lambda name, **_: lambda: Bags())
    arguments = asking(tmp_path, 30)
    arguments += ["--base-url", ready.base_url, "--teacher", "bags", "--top", "1", "--shapes", "short-short"]
    assert main(arguments) == 0
    (entry,) = json.loads((tmp_path / "manifest.json").read_text())["sets"].values()
    found = [row["pos"][0].endswith(" more") for row in rows_of(tmp_path)]
    assert sum(found) == 20 and entry["dropped"]["not found by the teacher"] >= 5


def test_a_failure_of_the_endpoint_is_one_line(ready, tmp_path, capsys):
    ready.script_of_tasks = lambda number, attempt: "401"
    arguments = asking(tmp_path, 12)
    assert main([*arguments, "--base-url", ready.base_url]) == 1
    assert "answers 401 Unauthorized" in capsys.readouterr().err.splitlines()[-1]


def test_the_command_makes_a_set_of_templates(ready, planted, tmp_path, capsys):
    assert (
        main(["synthesize", "-o", str(tmp_path), "--engine", "templates", "--rows", "30", "--name", "rules"])
        == 0
    )
    assert f"{tmp_path}/rules.jsonl: " in capsys.readouterr().out


COMPLAINTS = [
    ("--rows 0", "--rows must be above 0, got 0"),
    ("--rows 5 --parallel 0", "--parallel must be above 0"),
    ("--rows 5 --timeout nan", "--timeout must be above 0, got nan"),
    ("--rows 5 --temperature -1", "--temperature must be 0 or above"),
    ("--rows 5 --languages xx", "no language 'xx': there are ar, bn"),
    ("--rows 5 --shapes long", "no shape 'long': there are short-long, long-short, short-short"),
    ("--rows 5 --shapes short-long short-long", "a shape stands twice"),
    ("--rows 5 --without r", "no task 'r': there are squad"),
    ("--rows 5 --name a/b", "--name must be letters, digits and -"),
    ("--rows 5 --name terms", "and no set of curate, got 'terms'"),
    ("--rows 5 --model m", "--model is for the other engines"),
    ("--rows 5 --languages en de", "the engine templates writes English alone"),
    ("--rows 5 --engine local", "--model is missing: which one does the engine local ask"),
    ("--rows 5 --engine endpoint --model m", "--base-url is missing, and $OPENAI_BASE_URL is not set"),
]


@pytest.mark.parametrize("words, message", COMPLAINTS)
def test_wrong_arguments_exit_with_status_2(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    arguments = ["synthesize", "-o", str(tmp_path / "data"), "--engine", "templates", *words.split()]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "data").exists()


@pytest.mark.parametrize("extra, message", [("x", "is no JSON"), ("[]", "must be a JSON object")])
def test_extra_must_be_an_object(extra, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["synthesize", "-o", "x", "--engine", "endpoint", "--rows", "5", "--extra", extra])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(ImportError, match=r"pip install 'nvembed-fast\[synthesis\]'"):
        command._language_of()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install 'nvembed-fast\[synthesis\]'"):
        engines.LocalModel("model")
