"""How a number is taken: timers, intervals and memory. Nothing here knows what is measured."""

from __future__ import annotations

import gc
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# The profiler announces every start and stop on stderr below this level.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

SAMPLE_SECONDS = 0.02


class CpuTimer:
    """Wall time of `repetitions` calls in a row, divided by their number."""

    description = "time.perf_counter over calls in a row that last about 20 ms or more, gc disabled"

    def sample(self, function: Callable[[], None], repetitions: int) -> float:
        start = time.perf_counter()
        for _ in range(repetitions):
            function()
        return (time.perf_counter() - start) / repetitions


class CudaTimer:
    """Median device time of single calls, each after its inputs were driven out of the L2 cache."""

    description = "median of CUDA event times of single calls, L2 flushed before each, gc disabled"

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
        self._flush = torch.empty(4 * l2_bytes, dtype=torch.int8, device="cuda")

    def sample(self, function: Callable[[], None], repetitions: int) -> float:
        events = []
        for _ in range(repetitions):
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return float(np.median([start.elapsed_time(end) for start, end in events])) / 1e3


Timer = CpuTimer | CudaTimer


def repetitions_for(timer: Timer, function: Callable[[], None]) -> int:
    """How many calls one sample needs to last `SAMPLE_SECONDS`. The function must be warm."""
    return math.ceil(SAMPLE_SECONDS / timer.sample(function, 2))


def median_ratio(peer: Sequence[float], ours: Sequence[float], resamples: int = 4000) -> dict:
    """Median over the rounds of peer / ours, with its 95 % percentile-bootstrap interval."""
    ratios = np.asarray(peer) / np.asarray(ours)
    draws = np.random.default_rng(0).choice(ratios, size=(resamples, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


PEAK_MEMORY = {
    "cpu": "most bytes live at once of what one call allocates, from torch.profiler's allocations "
    "and frees; scratch memory that libraries take outside torch's allocator is not seen",
    "cuda": "torch.cuda.max_memory_allocated in one call, above memory_allocated at its start",
}


def peak_bytes(function: Callable[[], None], device: str) -> int:
    """The most memory that was live at once of what the call allocates."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    live = np.cumsum([event["args"]["Bytes"] for event in changes], dtype=np.int64)
    return int(max(live, default=0))


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves in one forward, parameters' left out."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The output keeps the graph and so every saved tensor alive: no address is used twice.
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storages.values())
