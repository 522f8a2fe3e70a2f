"""How a number is taken: timers, intervals and memory. Nothing here knows what is measured."""

from __future__ import annotations

import gc
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The profiler announces every start and stop on stderr below this level.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

SAMPLE_SECONDS = 0.02
WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Call:
    """What is timed: `run`, given what an untimed `prepare` returned just before."""

    run: Callable[..., Any]
    prepare: Callable[[], Any] | None = None

    def __call__(self) -> None:
        self.run() if self.prepare is None else self.run(self.prepare())


class CpuTimer:
    """Wall time of `repetitions` calls, divided by their number."""

    description = "time.perf_counter over calls in a row that last about 20 ms or more, gc disabled"
    most_repetitions = 10_000

    def sample(self, call: Call, repetitions: int) -> float:
        if call.prepare is None:
            start = time.perf_counter()
            for _ in range(repetitions):
                call.run()
            return (time.perf_counter() - start) / repetitions
        seconds = 0.0
        for _ in range(repetitions):
            prepared = call.prepare()
            start = time.perf_counter()
            call.run(prepared)
            seconds += time.perf_counter() - start
            del prepared
        return seconds / repetitions


class CudaTimer:
    """Median device time of single calls, each after its inputs were driven out of the L2 cache."""

    description = (
        "median of CUDA event times of up to 100 single calls in a row that last about 20 ms, L2 "
        "flushed before each, gc disabled; while the device flushes (about 50 us on an H200) the "
        "host already launches, which hides as much of a short call's launches"
    )
    most_repetitions = 100  # the flush before each takes longer than many a kernel

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
        self._flush = torch.empty(4 * l2_bytes, dtype=torch.int8, device="cuda")

    def sample(self, call: Call, repetitions: int) -> float:
        events = []
        for _ in range(repetitions):
            prepared = () if call.prepare is None else (call.prepare(),)
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call.run(*prepared)
            end.record()
            events.append((start, end))
            del prepared
        torch.cuda.synchronize()
        return float(np.median([start.elapsed_time(end) for start, end in events])) / 1e3


Timer = CpuTimer | CudaTimer


def timer_for(device: str) -> Timer:
    return CudaTimer() if device == "cuda" else CpuTimer()


def repetitions_for(timer: Timer, call: Call) -> int:
    """How many calls one sample needs to last `SAMPLE_SECONDS`. The call must be warm."""
    wanted = math.ceil(SAMPLE_SECONDS / max(timer.sample(call, 2), 1e-7))
    return min(wanted, timer.most_repetitions)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Where the host waits for the device, an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def device_is_lost() -> bool:
    """Whether nothing runs on the GPU any more, so that every later figure would fail."""
    try:
        return torch.ones(1, device="cuda").add(1).item() != 2
    except (RuntimeError, AssertionError):  # torch without CUDA asserts
        return True


def captured(call: Call) -> Call:
    """The same call as replays of CUDA graphs; what `prepare` does is a graph of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    with no_synchronisation():
        call()  # what waits for the device would fail in the capture, and spoil it for what follows
    pool = torch.cuda.graph_pool_handle()
    run, prepare, prepared = torch.cuda.CUDAGraph(), None, ()
    if call.prepare is not None:
        prepare = torch.cuda.CUDAGraph()
        with torch.cuda.graph(prepare, pool=pool):
            prepared = (call.prepare(),)
    with torch.cuda.graph(run, pool=pool):
        call.run(*prepared)
    if prepare is None:
        return Call(run.replay)
    return Call(lambda _: run.replay(), prepare.replay)


def launches(call: Call, device: str) -> int | None:
    """Kernels, copies and fills that one call starts on the device; None on a CPU."""
    if device != "cuda":
        return None
    prepared = () if call.prepare is None else (call.prepare(),)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call.run(*prepared)
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def seconds_per_call(timer: Timer, function: Callable[[], Any]) -> float:
    """Median of seven samples of a function that is called three times first."""
    call = Call(function)
    for _ in range(WARM_UP_CALLS):
        call()
    repetitions = repetitions_for(timer, call)
    return float(np.median([timer.sample(call, repetitions) for _ in range(7)]))


CEILINGS = "a copy, bytes read and written, and a square matrix product, timed at the start"


def ceilings(device: str, timer: Timer) -> dict:
    """Bytes and FLOPs per second that this machine reaches: a copy, and a matrix product."""
    on_gpu = device == "cuda"
    dtype, size = (torch.bfloat16, 8192) if on_gpu else (torch.float32, 1536)
    return {
        "copy_bytes_per_s": _copy_rate(timer, device, 2**30 if on_gpu else 2**27),
        "matmul_flops_per_s": _product_rate(timer, device, dtype, size),
        "matmul": f"{size} x {size} x {size}, {str(dtype).removeprefix('torch.')}",
    }


def _copy_rate(timer: Timer, device: str, nbytes: int) -> float:
    source = torch.ones(nbytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / seconds_per_call(timer, lambda: target.copy_(source))


def _product_rate(timer: Timer, device: str, dtype: torch.dtype, size: int) -> float:
    generator = torch.Generator().manual_seed(0)  # zeros would be faster than real data
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    return 2 * size**3 / seconds_per_call(timer, lambda: left @ right)


def median_ratio(peer: Sequence[float], ours: Sequence[float], resamples: int = 4000) -> dict:
    """Median over the rounds of peer / ours, with its 95 % percentile-bootstrap interval."""
    ratios = np.asarray(peer) / np.asarray(ours)
    draws = np.random.default_rng(0).choice(ratios, size=(resamples, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


PEAK_MEMORY = {
    "cpu": "most bytes live at once of what one call allocates, from torch.profiler's allocations "
    "and frees; scratch memory that libraries take outside torch's allocator is not seen",
    "cuda": "torch.cuda.max_memory_allocated in one call, above memory_allocated at its start; in "
    "mode backward its forward is part of the call",
}


def peak_bytes(function: Callable[[], Any], device: str) -> int:
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
