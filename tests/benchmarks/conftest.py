"""Results of a run of the suite on a tiny layer."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pytest

import benchmarks.__main__ as command
from benchmarks import measure, suite
from benchmarks.cases import Case, Provider
from tests.benchmarks.tiny_layer import EAGER, FUSED, LAYER, TINY, op_with


@contextlib.contextmanager
def hurry() -> Iterator[None]:
    """Short samples, and ceilings without their seconds of timing: no time is judged.

    What is in memory already is left out of the garbage collections, which else take longest.
    """
    with pytest.MonkeyPatch.context() as patch:
        known = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11, "matmul": "none"}
        patch.setattr(measure, "ceilings", lambda device, timer: known)
        patch.setattr(measure, "SAMPLE_SECONDS", 0.001)
        gc.freeze()
        yield
        gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def _hurry() -> Iterator[None]:
    with hurry():
        yield


@pytest.fixture(scope="session")
def results() -> dict:
    with hurry():
        return suite.run("cpu", [(LAYER, TINY)], rounds=3, providers=EAGER)


@pytest.fixture
def tiny_default(monkeypatch):
    """The command's own cases, cut down to one op with a tiny case and eager providers."""

    def only(*providers: Provider, cases: tuple[Case, ...] = (TINY,)) -> None:
        op = op_with(*(providers or (FUSED,)), cases={"cpu": cases, "cuda": ()})
        monkeypatch.setattr(command, "OPS", {op.name: op})

    only()
    return only
