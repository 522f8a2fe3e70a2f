"""Gives backends to the checks of ops: to those of a file the ones that have all of its ``OPS``.

A check that calls fewer of them says which: ``@pytest.mark.calls("attention")``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastattn import dispatch
from tests.kernels.cuda_on_cpu.machine import cuda_by_gxx, machine
from tests.ops.attention_inputs import few_without_dropout, larger_tiles
from tests.ops.backends import Backend, parameters

__all__ = ["cuda_by_gxx", "few_without_dropout", "larger_tiles", "machine"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.endswith("_checks") and "backend" in metafunc.fixturenames:
        found = parameters(*ops_of(metafunc.definition))
        if (mark := metafunc.definition.get_closest_marker("on")) is not None:
            found = [x for x in found if x.values[0].device == mark.args[0]]
        metafunc.parametrize("backend", found, indirect=True)


def ops_of(check: pytest.Item) -> tuple[str, ...]:
    mark, ops = check.get_closest_marker("calls"), check.module.OPS
    assert mark is None or set(mark.args) <= set(ops), f"{check.name} calls {mark.args}"
    return ops if mark is None else mark.args


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """One that runs here. Memory that nothing was written to is NaN, or the largest integer."""
    chosen: Backend = request.param
    if chosen.fixture is not None:
        request.getfixturevalue(chosen.fixture)
    for op in ops_of(request.node):
        reason = dispatch.why_not(op, chosen.name, torch.device(chosen.device))
        if reason is not None:
            pytest.skip(f"{chosen}: {reason}")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield chosen
    finally:
        torch.use_deterministic_algorithms(False)
