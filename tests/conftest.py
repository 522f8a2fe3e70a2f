"""Which tests this process can run, and what every test finds when it begins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch


def why_not_interpreted() -> str | None:
    """Why this process interprets no Triton kernel: that is decided when a kernel is defined."""
    if find_spec("triton") is None:
        return "triton is not installed"
    triton, numpy = (
        tuple(int(number) for number in version(package).split(".")[:2])
        for package in ("triton", "numpy")
    )
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of Triton 3.6 needs NumPy older than 2.4"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "needs TRITON_INTERPRET=1, which `python -m tests` sets for it"
    return None


def pytest_configure(config: pytest.Config) -> None:
    """Processes that share the cores (pytest-xdist) share torch's threads too."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA GPU; none here",
        "interpreted": why_not_interpreted(),
    }
    for item in items:
        for mark, reason in reasons.items():
            if reason is not None and mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def sanitizer(request: pytest.FixtureRequest) -> Iterator[object]:
    """Every kernel that is interpreted is watched: tests/kernels/interpreted/sanitizer.py."""
    if "interpreted" not in request.keywords:
        yield None
        return
    from tests.kernels.interpreted.sanitizer import Sanitizer

    with Sanitizer() as installed:
        yield installed


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
