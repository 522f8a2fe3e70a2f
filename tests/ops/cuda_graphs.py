"""A step of training in a CUDA graph, for the checks of ops that drop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.helpers import Results, assert_same

SEEDS = (3, 2**62 + 54321, 2**63 - 1)


def assert_every_replay_reads_its_seed(step: Callable[[Tensor], Results]) -> None:
    """A captured ``step(seed)``, all on the GPU, is replayed with seeds that come later."""
    seed = torch.tensor([5], device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(seed)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(seed)
    outputs = []
    for number in SEEDS:
        seed.fill_(number)
        graph.replay()
        assert_same(captured, step(torch.tensor([number], device="cuda")))
        outputs.append(captured["output 0"].clone())
    assert not torch.equal(outputs[0], outputs[1])


def assert_does_not_wait(step: Callable[[Tensor], Results]) -> None:
    """``step(seed)`` never makes the CPU wait for the GPU."""
    seed = torch.tensor([5], device="cuda")
    step(seed)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
