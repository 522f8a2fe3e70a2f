"""Shared fixtures. ``reference`` and other helpers are imported from this folder by name."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

#: Interpreted kernels need a process of their own: tests/test_interpreted.py starts it.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


def pytest_configure(config: pytest.Config) -> None:
    """Processes that share the cores (pytest-xdist) share torch's threads too."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU; none here")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def contract_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw seeds of the contract, also where the C++ extension is not built."""
    from fastattn import dropout

    def draw_seed(device: torch.device) -> torch.Tensor:
        return torch.randint(2**63 - 1, (1,), device=device)

    monkeypatch.setattr(dropout, "draw_seed", draw_seed)
