"""From texts to vectors: windows, budget, memory, order."""

import subprocess
import sys
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_encoder import TEXTS, relative

from nvembed_fast import NVEmbed, stream
from nvembed_fast.stream import TextStream, Window
from nvembed_fast.tokenization import TokenizedTexts


@pytest.fixture(scope="module")
def model(tiny_directory):
    return NVEmbed.from_pretrained(tiny_directory, device="cpu")


def test_one_text_one_vector_alone_in_any_batch_in_any_order(model, all_cores):
    together = model.encode(TEXTS)
    for budget in (1, 7, 64):
        assert relative(model.encode(TEXTS, max_batch_tokens=budget), together) < 1e-6
    assert relative(torch.stack([model.encode(t) for t in TEXTS]), together) < 1e-6
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert relative(model.encode([TEXTS[i] for i in order]), together[order]) < 1e-6


def test_windows_keep_the_callers_order(model, monkeypatch):
    together = model.encode(TEXTS)
    monkeypatch.setattr(stream, "WINDOW", Window(2, 3))
    assert relative(model.encode(TEXTS), together) < 1e-6


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_every_text_is_in_one_window(model, count):
    texts = replace(model.stream, window=Window(2, 3))
    windows = list(texts.tokenized([f"t{i}" for i in range(count)], "", 16))
    assert [first for first, _ in windows] == [f for f in (0, 2, 5) if f < count]
    assert sum(len(w.ids) for _, w in windows) == count


def test_windows_end_before_their_texts_fill_the_memory():
    window = Window(characters=100)
    texts = ["x" * n for n in (90, 20, 30, 200, 5, 60, 60)]
    windows = [(w.start, w.stop) for w in window.slices(texts, max_characters=80)]
    assert windows == [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7)]  # 80+20, 30, 80+5, 60, 60
    assert list(window.slices([], 80)) == []
    # 70+10, 70+10, as each text carries the instruction
    assert list(window.slices(["x" * 10] * 2, 80, "i" * 70)) == [slice(0, 1), slice(1, 2)]


def test_an_instruction_counts_in_the_windows_of_a_stream(model):
    texts = replace(model.stream, window=Window(characters=100))
    assert len(list(texts.tokenized(["a"] * 3, "i" * 60, 256))) == 3
    assert len(list(texts.tokenized(["a"] * 3, "", 256))) == 1


def test_rows_lie_on_another_device_than_the_vectors():
    """Rows on "meta" play the host of a device that is neither a CPU nor CUDA."""
    result = stream.Result(4, 3, torch.device("mps"), on_host=True, rows=torch.empty(4, 3, device="meta"))
    assert result.put([1, 0], torch.ones(2, 3)) == [1, 0]


def test_out_of_memory_halves_the_batch_and_loses_nothing(model, monkeypatch):
    wanted = model.encode(TEXTS)
    sizes, run = [], model.model.forward

    def small_device(batch):
        sizes.append(batch.layout.num_tokens)
        if batch.layout.num_tokens > 260:
            raise torch.OutOfMemoryError("small")
        return run(batch)

    monkeypatch.setattr(model.model, "forward", small_device)
    assert relative(model.encode(TEXTS), wanted) < 1e-6
    assert max(sizes) > 260 and sizes.count(max(sizes)) == 1


def test_a_budget_once_halved_stays_halved_in_later_windows(model, monkeypatch):
    failures, run = [], model.model.forward

    def small_device(batch):
        if batch.layout.num_tokens > 20:
            failures.append(batch.layout.num_tokens)
            raise torch.OutOfMemoryError("small")
        return run(batch)

    texts = ["some words here"] * 30
    wanted = model.encode(texts)
    monkeypatch.setattr(stream, "WINDOW", Window(10, 10))
    monkeypatch.setattr(model.model, "forward", small_device)
    assert relative(model.encode(texts, max_batch_tokens=40), wanted) < 1e-6
    assert len(failures) == 1


def test_out_of_memory_of_a_single_text_says_what_to_do(model, monkeypatch):
    def no_device(batch):
        raise torch.OutOfMemoryError("tiny")

    monkeypatch.setattr(model.model, "forward", no_device)
    with pytest.raises(torch.OutOfMemoryError, match="a single text of 3 tokens .* lower max_length"):
        model.encode(["a"])


def test_an_interrupt_leaves_the_model_usable(model, monkeypatch):
    wanted = model.encode(TEXTS)
    with monkeypatch.context() as patch:

        def interrupted(batch):
            raise KeyboardInterrupt

        patch.setattr(model.model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.encode(TEXTS)
    assert relative(model.encode(TEXTS), wanted) < 1e-6
    for thread in threading.enumerate():
        if thread.name.startswith("nvembed-tokenize"):
            thread.join(timeout=60)
            assert not thread.is_alive()


def test_an_interrupt_does_not_wait_for_the_next_window():
    release = threading.Event()

    class SlowTokenizer:
        def max_characters(self, max_length):
            return 100

        def __call__(self, texts, instruction, max_length):
            if texts != ["first"]:
                release.wait(5)
            return TokenizedTexts([np.array([1, 2])], [0])

    texts = TextStream(SlowTokenizer(), None, torch.device("cpu"), Window(1, 1))
    windows = texts.tokenized(["first", "second", "third"], "", 16)
    next(windows)
    windows.close()
    still_running = [t for t in threading.enumerate() if t.name.startswith("nvembed-tokenize")]
    release.set()
    assert still_running


def test_a_query_waits_for_no_thread(model, monkeypatch):
    def no_pool(*args, **kwargs):
        raise AssertionError("a thread for one window")

    monkeypatch.setattr(stream, "ThreadPoolExecutor", no_pool)
    assert model.encode("a query").shape == (model.config.hidden_size,)
    assert list(model.stream.tokenized([], "", 16)) == []


def test_a_thread_may_encode_behind_the_end_of_the_main_one(tiny_directory):
    """From then on concurrent.futures starts no work."""
    code = f"""
import atexit, threading
from nvembed_fast import NVEmbed, stream
model = NVEmbed.from_pretrained({str(tiny_directory)!r}, device="cpu")
stream.WINDOW = stream.Window(2, 3)

def late(name):
    if threading.current_thread() is not threading.main_thread():
        threading.main_thread().join()
    print(name, len(model.encode(list("abcdefgh"))), flush=True)

threading.Thread(target=late, args=["thread"]).start()
atexit.register(late, "atexit")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert sorted(run.stdout.splitlines()) == ["atexit 8", "thread 8"], run.stderr


def test_a_stream_gives_every_text_once_with_its_vector(model):
    wanted, got = model.encode(TEXTS), torch.full((len(TEXTS), 64), float("nan"))
    batches = list(replace(model.stream, window=Window(2, 3))(TEXTS, max_batch_tokens=40))
    assert len(batches) > 4
    for indices, vectors in batches:
        got[indices] = vectors
    assert sorted(index for indices, _ in batches for index in indices) == list(range(len(TEXTS)))
    assert relative(got, wanted) < 1e-6


@pytest.mark.parametrize("call", [{"texts": ["a", None]}, {"texts": ["a"], "max_length": 2}])
def test_a_stream_checks_its_arguments_before_it_is_read(model, call):
    with pytest.raises((TypeError, ValueError), match="must be"):
        model.stream(**call)


@pytest.mark.parametrize("kind", [np.int16, np.uint16, np.uint64])
def test_counts_of_numpy_do_not_wrap(model, kind):
    """1100 tokens may be 35200 characters, which no int16 counts, and 100 - 1100 is no uint."""
    texts, instruction = ["word and other things " * 300, "a b"], "Instruct: x\nQuery: "
    wanted = model.encode(texts, instruction, 1100, max_batch_tokens=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        got = model.encode(texts, instruction, kind(1100), max_batch_tokens=kind(100))
        tokens = model.text_tokenizer(texts, instruction, kind(1100))
    assert relative(got, wanted) < 1e-6
    assert tokens.first_pooled == model.text_tokenizer(texts, instruction, 1100).first_pooled


def overflow(model, factor=2e4):
    model.model.embedding_model.layers[1].mlp.down_proj.weight.mul_(factor)
    return model


def test_an_overflow_of_float16_names_the_first_text_and_the_way_out(tiny_directory):
    model = overflow(NVEmbed.from_pretrained(tiny_directory, device="cpu", dtype="float16"))
    message = r"prompts\[0\] and 2 more is NaN or Inf in float16: .* dtype='bfloat16'"
    for output in ("torch", "numpy"):
        with pytest.raises(ValueError, match=message):
            model.encode(["importance", "of", "order"], output=output)
    with pytest.raises(ValueError, match=r"prompts\[0\] is NaN"):
        list(model.stream(["importance"]))
    anew = overflow(NVEmbed.from_pretrained(tiny_directory, device="cpu", dtype="bfloat16"))
    assert anew.encode(["importance"]).isfinite().all()


def test_the_first_text_with_a_bad_vector_is_named_whatever_the_order_of_batches(model, monkeypatch):
    run = model.model.forward

    def spoiled(batch):
        vectors = run(batch)
        for row, length in enumerate(batch.layout.lengths):
            vectors[row, 5] = {4: float("nan"), 6: float("inf")}.get(length, vectors[row, 5])
        return vectors

    texts = ["a b c d e f g", "one two", "a b c d", "one", "one two three"]
    lengths = model.text_tokenizer(texts, "", 64).lengths()
    assert lengths == [9, 4, 6, 3, 5]
    monkeypatch.setattr(model.model, "forward", spoiled)
    with pytest.raises(ValueError, match=r"prompts\[1\] and 1 more is NaN or Inf in float32: a weight"):
        model.encode(texts, max_batch_tokens=6)
    with pytest.raises(ValueError, match=r"prompts\[0\] is NaN"):
        model.encode("one two")


def test_no_batch_waits_for_the_flag(model, monkeypatch):
    reads, embedded, check = [], [], TextStream._check_finite
    monkeypatch.setattr(TextStream, "_check_finite", lambda *a: reads.append(len(embedded)) or check(*a))
    for indices, _ in model.stream(["a", "b c", "d e f"], max_batch_tokens=4):
        embedded.append(indices)
    assert len(embedded) == 3 and reads == [3]


def test_texts_cut_at_max_length_are_counted_and_told_once(model, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", Window(2, 2))
    texts = ["one two three", "a", "x" * 10_000_000, "one two three four", "b"]
    with pytest.warns(stream.TextsCut, match="^3 of 5 texts were cut at max_length=4 tokens$") as told:
        model.encode(texts, max_length=4)
    assert len(told) == 1 and told[0].filename == __file__
    longest = len(model.text_tokenizer(texts[3:4], "", 64).ids[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(texts[3], max_length=longest)
    with pytest.warns(stream.TextsCut, match="^1 of 1 texts"):
        model.encode(texts[3], max_length=longest - 1)


def test_texts_longer_than_the_models_positions_are_told_once(model, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", Window(1, 1))
    texts = ["one two three", "a", "one two three four"]
    lengths = model.text_tokenizer(texts, "", 64).lengths()
    positions = lengths[1]
    assert max(lengths) > lengths[0] > positions
    few = replace(model.config.text_config, max_position_embeddings=positions)
    monkeypatch.setattr(model.model, "config", replace(model.config, text_config=few))
    wanted = (
        f"^2 of 3 texts have .* positions: up to {max(lengths)}, and max_position_embeddings is {positions}"
    )
    with pytest.warns(stream.TextsBeyondPositions, match=wanted) as told:
        model.encode(texts)
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(texts[1])
