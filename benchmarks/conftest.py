"""Options of `pytest benchmarks/`, and the machine in what pytest-benchmark saves."""

from __future__ import annotations

import pytest
import torch

from .environment import environment
from .suite import LAUNCHES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastattn")
    group.addoption("--device", choices=LAUNCHES, help="default: cuda if there is one")
    group.addoption(
        "--all-cases", action="store_true", help="all sizes and providers, not the quick ones alone"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device here")
    config.option.device = config.option.device or ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["fastattn"] = environment(config.option.device)
