"""benchmarks.measure: what is counted, what is timed and how sure that is."""

from __future__ import annotations

import contextlib
from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks import measure


def test_saved_bytes_of_a_hand_counted_case():
    weight = torch.randn(5, 7, requires_grad=True)
    src = torch.randn(3, 5, requires_grad=True)

    def forward():
        hidden = src @ weight  # saves src (60 bytes) and the weight, a parameter
        return hidden.exp().view(21) * hidden.sigmoid().view(21)  # two results of 84, each twice

    assert measure.saved_bytes(forward, [weight]) == 60 + 2 * 84
    assert measure.saved_bytes(forward, []) == 60 + 2 * 84 + 140


def test_peak_bytes_of_known_allocations():
    def call():
        first = torch.empty(1_000_000)
        second = torch.empty(500_000)
        del first
        third = torch.empty(250_000)
        return second, third

    assert measure.peak_bytes(call, "cpu") == 6_000_000
    assert measure.peak_bytes(lambda: None, "cpu") == 0


def test_peak_bytes_does_not_count_what_was_there_before():
    held = torch.empty(1_000_000)
    assert measure.peak_bytes(lambda: torch.empty_like(held).copy_(held), "cpu") == 4_000_000


def test_peak_bytes_of_a_backward_counts_what_autograd_keeps():
    src = torch.randn(250_000, requires_grad=True)

    def call():
        src.exp().exp().sum().backward()  # two results and then two gradients, 1 MB each
        src.grad = None

    assert 3_000_000 < measure.peak_bytes(call, "cpu") <= 4_000_100


def test_preparation_is_not_timed():
    seconds = []

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()

    def work(duration):
        def run(*prepared):
            clock.now += duration
            seconds.append(duration)
            return prepared

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "time", clock)
        timer = measure.CpuTimer()
        assert timer.sample(measure.Call(work(2.0), prepare=work(100.0)), 3) == 2.0
        assert timer.sample(measure.Call(work(2.0)), 3) == 2.0
    assert seconds == [100.0, 2.0] * 3 + [2.0] * 3


class FakeGraph:
    """A CUDA graph that keeps what was called under its capture, and calls it again."""

    capturing: FakeGraph | None = None

    def __init__(self):
        self.calls = []

    def replay(self):
        for call in self.calls:
            call()


@contextlib.contextmanager
def fake_capture(graph, pool):
    assert FakeGraph.capturing is None and pool == "one pool"
    FakeGraph.capturing = graph
    yield
    FakeGraph.capturing = None


@pytest.mark.parametrize("prepared", [False, True])
def test_captured_calls_replay_preparation_and_run_apart(monkeypatch, prepared):
    monkeypatch.setattr(torch.cuda, "Stream", mock.MagicMock)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "one pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", fake_capture)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: "before")
    debug_modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", debug_modes.append)
    log = []

    def work(name, result=None):
        def function(*arguments):
            log.append((name, *arguments))
            if FakeGraph.capturing is not None:
                FakeGraph.capturing.calls.append(lambda: log.append(f"replayed {name}"))
            return result

        return function

    call = measure.Call(work("run"), work("prepare", "output") if prepared else None)
    graphs = measure.captured(call)
    once = [("prepare",), ("run", "output")] if prepared else [("run",)]
    # on the side stream, once where waiting for the device is an error, and captured
    assert log == once * (measure.WARM_UP_CALLS + 2)
    assert debug_modes == ["error", "before"]
    log.clear()
    measure.CpuTimer().sample(graphs, 2)
    assert log == (["replayed prepare", "replayed run"] if prepared else ["replayed run"]) * 2


def test_cuda_samples_are_medians_of_calls_with_a_cold_cache(monkeypatch):
    log, clock = [], iter(range(100))

    class FakeEvent:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = next(clock)
            log.append("event")

        def elapsed_time(self, end):
            return 1000.0 * (end.time - self.time)

    class Flush:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    timer = object.__new__(measure.CudaTimer)
    timer._flush = Flush()
    call = measure.Call(lambda prepared: log.append(prepared), lambda: "prepared")
    assert timer.sample(call, 2) == 1.0
    assert log == ["flush", "event", "prepared", "event"] * 2 + ["synchronize"]


def test_ceilings_are_bytes_and_flops_by_the_time_they_take():
    class Timer:
        most_repetitions = 100

        def sample(self, call, repetitions):
            call()
            return 0.25

    copy = measure._copy_rate(Timer(), "cpu", 2**20)
    product = measure._product_rate(Timer(), "cpu", torch.float32, 64)
    assert copy == 2 * 2**20 / 0.25 and product == 2 * 64**3 / 0.25


def test_interval_of_equal_ratios_is_a_point():
    ratio = measure.median_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert ratio == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_interval_covers_the_true_median_about_95_times_in_100():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        ours = np.ones(41)
        interval = measure.median_ratio(generator.normal(1.3, 0.1, 41), ours, resamples=500)
        covered += interval["low"] <= 1.3 <= interval["high"]
    assert 0.90 <= covered / 300 <= 0.99


def test_interval_is_repeatable():
    peer, ours = np.random.default_rng(2).random((2, 20)) + 1
    assert measure.median_ratio(peer, ours) == measure.median_ratio(peer, ours)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_lost():
    assert measure.device_is_lost()
