"""The suite's cases under pytest-benchmark, one by one and with eager launches alone.

    pytest benchmarks/ -k "[layer_norm and fastattn-forward]"

Each is checked as in a run of the suite. What is not done here is what makes its figures comparable
to a few per cent: providers interleaved in rounds, and intervals of their ratios.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from . import measure, suite
from .accuracy import AccuracyCheck
from .cases import Case, Mode, Op, Provider, Workload
from .ops import OPS


def synchronised() -> float:
    """Seconds, once the device has done everything it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS = {"cpu": time.perf_counter, "cuda": synchronised}


def identifier(*words: str) -> str:
    """The words joined by dashes, of characters that `-k` takes."""
    return "-".join(re.sub(r"[^\w.+-]+", "_", word).strip("_") for word in words)


def parameters(device: str, all_cases: bool) -> Iterator:
    """The test's parameters, those that share a check or a workload in a row."""
    for op in OPS.values():
        for case in op.cases[device]:
            if not (all_cases or case.quick):
                continue
            for provider in suite.chosen(op, None, quick=not all_cases):
                reason = provider.why_not(case, device)
                for mode in op.modes:
                    group = f"{op.name} {case.name} {mode.name}"
                    marks = [pytest.mark.benchmark(group=group, timer=CLOCKS[device])]
                    if reason is not None:
                        marks.append(pytest.mark.skip(reason=reason))
                    yield pytest.param(
                        (op, case),
                        provider,
                        mode,
                        marks=marks,
                        id=identifier(op.name, case.name, provider.name, mode.name),
                    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    metafunc.parametrize(
        ("check", "candidate", "mode"),
        list(parameters(option.device, option.all_cases)),
        indirect=["check", "candidate"],
    )


class Check:
    """The accuracy check of one case, which judges every provider once."""

    def __init__(self, op: Op, case: Case, device: str):
        torch._dynamo.reset()  # a new size is a new graph, not a recompilation of the last one
        self.op, self.case, self.device = op, case, device
        self.accuracy = AccuracyCheck(op, case, device)
        self.matches: dict[str, dict] = {}

    def match(self, provider: Provider) -> dict:
        """The verdict; the baseline run the same way, which sets the measure, is judged first."""
        if provider.name not in self.matches:
            baseline = self._baseline_like(provider)
            if baseline not in (None, provider):
                self.match(baseline)
            self.matches[provider.name] = suite.match_of(self.accuracy, provider)
        return self.matches[provider.name]

    def _baseline_like(self, provider: Provider) -> Provider | None:
        alike = (p for p in self.op.providers if p.compile_mode == provider.compile_mode)
        return next((p for p in alike if p.module is self.op.baseline.module), None)


class Candidate(NamedTuple):
    """A provider's verdict and, where that is good, what all modes run."""

    match: dict
    workload: Workload | None


@pytest.fixture(scope="module", autouse=True)
def compiled_as_in_the_suite() -> Iterator[None]:
    with torch._dynamo.config.patch(**suite.DYNAMO):
        yield


@pytest.fixture(scope="module")
def check(request: pytest.FixtureRequest) -> Check:
    op, case = request.param
    return Check(op, case, request.config.option.device)


@pytest.fixture(scope="module")
def candidate(request: pytest.FixtureRequest, check: Check) -> Candidate:
    match = check.match(request.param)
    if not match["ok"]:
        return Candidate(match, None)
    return Candidate(match, Workload(check.op, check.case, request.param, check.device))


def test_case(benchmark, check: Check, candidate: Candidate, mode: Mode) -> None:
    assert candidate.match["ok"], suite.mismatch_reason(candidate.match)
    call = suite.call_of(candidate.workload, mode)
    for _ in range(measure.WARM_UP_CALLS):
        call()
    if call.prepare is None:
        benchmark(call.run)
        return
    repetitions = measure.repetitions_for(measure.timer_for(check.device), call)
    benchmark.pedantic(
        call.run, setup=lambda: ((call.prepare(),), {}), rounds=suite.ROUNDS * repetitions
    )
