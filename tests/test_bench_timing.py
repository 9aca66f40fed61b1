"""Functions take turns, and on a GPU (a made-up one here) neither the host nor the cache is timed."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from bench.measure import timing
from nvembed_fast import graphs


class Device:
    """Works off what it is given, in order; the host takes time to give it. Milliseconds."""

    FLUSH = 0.1

    def __init__(self):
        self.host = self.device = 0.0
        self.recording = None
        self.refuses_capture = False
        self.replays = 0

    def launch(self, ms: float, host_ms: float) -> None:
        if self.recording is not None:
            if self.refuses_capture:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.recording.append(ms)
            return
        self.host += host_ms
        self.device = max(self.device, self.host) + ms

    def call(self, ms: float, host_ms: float, launches: int = 1):
        return lambda: [self.launch(ms / launches, host_ms / launches) for _ in range(launches)]

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(synchronize=self.synchronize)

        def record():
            event.at = max(self.device, self.host)

        event.record, event.elapsed_time = record, lambda end: end.at - event.at
        return event

    def graph(self) -> SimpleNamespace:
        graph = SimpleNamespace(kernels=[])

        def replay():
            self.replays += 1
            self.launch(sum(graph.kernels), 0.01)

        graph.replay = replay
        return graph

    @contextlib.contextmanager
    def capture(self, graph, pool=None, capture_error_mode="global"):
        self.recording = graph.kernels
        try:
            yield
        finally:
            self.recording = None


@pytest.fixture
def gpu(monkeypatch) -> Device:
    device = Device()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        is_available=lambda: True,
        synchronize=device.synchronize,
        Event=device.event,
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda side: contextlib.nullcontext(),
        set_sync_debug_mode=lambda mode: None,
        CUDAGraph=device.graph,
        graph=device.capture,
    )
    buffer = SimpleNamespace(zero_=device.call(Device.FLUSH, 0.005))
    fake = SimpleNamespace(cuda=cuda, empty=lambda *_, **__: buffer, int8=torch.int8, Tensor=torch.Tensor)
    for module in (timing, graphs):
        monkeypatch.setattr(module, "torch", fake)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: device.host / 1e3)
    for cached in (timing._flush_ms, timing._flush_buffer):
        cached.cache_clear()
    yield device
    for cached in (timing._flush_ms, timing._flush_buffer):
        cached.cache_clear()


def of_one(call) -> timing.Times:
    return timing.interleaved({"a": call}, seconds=0.01)["a"]


@pytest.mark.parametrize("launches", [1, 20])
@pytest.mark.parametrize("host_ms", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("ms", [0.08, 0.5, 5.0])
def test_the_time_is_the_devices_however_slow_the_host(gpu, ms, host_ms, launches):
    times = of_one(gpu.call(ms, host_ms, launches))
    assert times.ms == pytest.approx([ms] * len(times.ms))
    assert gpu.replays == 0


def test_a_short_call_is_timed_by_replays_of_a_graph(gpu):
    times = of_one(gpu.call(0.02, 0.1))
    assert gpu.replays == len(times.ms) >= 5
    assert times.ms == pytest.approx([0.02] * len(times.ms))


def test_a_call_that_cannot_be_captured_is_timed_by_itself(gpu):
    gpu.refuses_capture = True
    times = of_one(gpu.call(0.02, 0.1))
    assert gpu.replays == 0 and times.ms == pytest.approx([0.02] * len(times.ms))


def test_samples_are_spread_over_the_whole_time(gpu):
    order = []

    def call(name, ms):
        def run():
            order.append(name)
            gpu.launch(ms, 0.1)

        return run

    times = timing.interleaved({"fast": call("f", 1.0), "slow": call("s", 10.0)}, seconds=0.2)
    assert len(times["fast"].ms) == 200 and len(times["slow"].ms) == 20
    gaps = "".join(order[-220:]).split("s")
    assert max(map(len, gaps)) <= 11


def test_beside_a_short_call_all_are_captured(gpu):
    times = timing.interleaved({"short": gpu.call(0.02, 0.1), "long": gpu.call(1.0, 0.1)}, seconds=0.01)
    assert gpu.replays == sum(len(t.ms) for t in times.values())
    assert times["long"].ms == pytest.approx([1.0] * len(times["long"].ms))


def test_short_sustained_calls_are_captured(gpu):
    assert timing.sustained(gpu.call(0.01, 0.02), 0.1) == pytest.approx(0.01, rel=0.01)
    assert gpu.replays > 10


def test_sustained_calls_follow_each_other(gpu):
    assert timing.sustained(gpu.call(2.0, 0.1), 0.1) == pytest.approx(2.0)


def test_functions_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.interleaved(calls, seconds=0.0, min_rounds=4, max_rounds=4)
    assert [len(t.ms) for t in times.values()] == [4, 4, 4]
    # one call each for an estimate, then rounds that start with another one every time
    assert "".join(order[3:]) == "abc" + "bca" + "cab" + "abc"


def test_times_are_those_of_the_calls(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    [times] = timing.interleaved({"a": lambda: None}, seconds=0.0, min_rounds=3).values()
    # every look at this clock takes a second
    assert times.ms == (1000.0,) * 3
    assert timing.sustained(lambda: None, 0.0) == pytest.approx(2000.0)


def test_percentiles():
    times = timing.Times(tuple(float(i) for i in range(101)))
    assert [times.percentile(p) for p in (20, 50, 80)] == [20.0, 50.0, 80.0]
    assert times.median == 50.0 and timing.Times((3.0,)).percentile(80) == 3.0
