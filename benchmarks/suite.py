"""The run: every provider of a case is checked, warmed up, then timed in interleaved rounds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch._dynamo.utils import counters

from . import accuracy, measure
from .cases import CASES, MODES, PROVIDERS, SEED, Case, Mode, Provider, Workload
from .environment import environment

FORMAT, VERSION = "fastattn-benchmark", 1
WARM_UP_CALLS = 3
ROUNDS = 11
OnStep = Callable[[str], None]


@dataclass
class Entry:
    """One provider in one mode of one case, on its way to being a row of the results."""

    case: Case
    provider: Provider
    mode: Mode
    match: dict | None = None
    status: str = "ok"
    reason: str | None = None
    workload: Workload | None = None
    repetitions: int | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)

    def withhold(self, status: str, reason: str) -> None:
        self.status, self.reason, self.seconds = status, reason, []

    def call(self) -> None:
        self.mode.run(self.workload)

    def warm_up(self, timer: measure.Timer, device: str) -> None:
        layer = self.workload.layer.train(self.mode.training)
        for _ in range(WARM_UP_CALLS):
            self.call()
        if self.mode.training and not self.provider.compiled:
            self.saved_bytes = measure.saved_bytes(
                lambda: layer(self.workload.src), layer.parameters()
            )
        self.peak_bytes = measure.peak_bytes(self.call, device)
        self.repetitions = measure.repetitions_for(timer, self.call)

    def time_once(self, timer: measure.Timer) -> None:
        self.workload.layer.train(self.mode.training)
        self.seconds.append(timer.sample(self.call, self.repetitions))

    def row(self, rivals: Sequence[Entry]) -> dict:
        row = {
            "case": self.case.name,
            "mode": self.mode.name,
            "provider": self.provider.name,
            "status": self.status,
            "reason": self.reason,
            "match": self.match,
            "peak_bytes": self.peak_bytes,
            "saved_bytes": self.saved_bytes,
        }
        if self.status == "ok":
            p20, median, p80 = np.percentile(self.seconds, [20, 50, 80]) * 1e3
            row |= {
                "median_ms": median,
                "p20_ms": p20,
                "p80_ms": p80,
                "tokens_per_s": self.case.tokens / median * 1e3,
                "speedup_over": {
                    rival.provider.name: measure.median_ratio(rival.seconds, self.seconds)
                    for rival in rivals
                    if rival is not self and rival.mode is self.mode and rival.status == "ok"
                },
                "repetitions": self.repetitions,
                "samples_ms": [round(second * 1e3, 4) for second in self.seconds],
            }
        return row


@contextmanager
def failure_withholds(entries: Sequence[Entry]) -> Iterator[None]:
    """A failure is that of these entries alone and the run goes on, unless the device is lost."""
    try:
        yield
    except torch.AcceleratorError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        for entry in entries:
            entry.withhold("failed", f"{type(error).__name__}: {lines[0][:200]}")


def mismatch_reason(match: dict) -> str:
    wrong = [match[kind] for kind in ("output", "gradient")]
    return "; ".join(
        f"{v['tensor']}: error {v['error']:.2e}, limit {v['limit']:.2e}"
        for v in wrong
        if not v["error"] <= v["limit"]
    )


@dataclass
class CaseRun:
    """All entries of one case, on their way through check, warm-up and timing."""

    case: Case
    device: str
    timer: measure.Timer
    modes: Sequence[Mode]
    on_step: OnStep
    entries: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch._dynamo.reset()  # a new size is a new graph, not a recompilation of the last one
        self.check = accuracy.AccuracyCheck(self.case, self.device)

    def add(self, provider: Provider) -> None:
        """The provider's entries, checked for accuracy and, where right, warm and ready."""
        entries = [Entry(self.case, provider, mode) for mode in self.modes]
        self.entries += entries
        self.on_step(f"{self.case.name}: checking {provider.name}")
        with failure_withholds(entries):
            self._check(provider, entries)
        for entry in entries:
            self.on_step(f"{self.case.name}: warming up {provider.name}, {entry.mode.name}")
            if entry.status == "ok":
                with failure_withholds([entry]):
                    entry.warm_up(self.timer, self.device)

    def _check(self, provider: Provider, entries: Sequence[Entry]) -> None:
        graphs = counters["stats"]["unique_graphs"]
        match = self.check.check(provider)
        if provider.compiled and counters["stats"]["unique_graphs"] == graphs:
            raise RuntimeError("torch.compile captured no graph: this would time the eager layer")
        workload = Workload(self.case, provider, self.device)
        for entry in entries:
            entry.match, entry.workload = match, workload
            if not match["ok"]:
                entry.withhold("mismatch", mismatch_reason(match))

    def time_round(self, number: int) -> None:
        """Times every provider once per mode; each round starts with another provider."""
        gc.collect()
        gc.disable()
        try:
            for mode in self.modes:
                ready = [e for e in self.entries if e.mode is mode and e.status == "ok"]
                first = number % max(len(ready), 1)
                for entry in ready[first:] + ready[:first]:
                    with failure_withholds([entry]):
                        entry.time_once(self.timer)
        finally:
            gc.enable()
        self.on_step(f"{self.case.name}: timing, round {number + 1}")

    def rows(self) -> list[dict]:
        ordered = [e for mode in self.modes for e in self.entries if e.mode is mode]
        return [entry.row(self.entries) for entry in ordered]


def count_steps(cases: Sequence[Case], rounds: int, providers: Sequence[Provider]) -> int:
    """How often `run` calls `on_step` with these arguments and all modes."""
    return len(cases) * (len(providers) * (1 + len(MODES)) + rounds)


def run(
    device: str,
    cases: Sequence[Case] | None = None,
    rounds: int = ROUNDS,
    providers: Sequence[Provider] = PROVIDERS,
    modes: Sequence[Mode] = MODES,
    on_step: OnStep = lambda text: None,
) -> dict:
    """Runs the cases (by default the device's) and returns the results that `report` works on."""
    cases = CASES[device] if cases is None else cases
    timer = measure.CudaTimer() if device == "cuda" else measure.CpuTimer()
    started_in = environment(device)
    rows = []
    for case in cases:
        case_run = CaseRun(case, device, timer, modes, on_step)
        for provider in providers:
            case_run.add(provider)
        for number in range(rounds):
            case_run.time_round(number)
        rows += case_run.rows()
    return {
        "format": FORMAT,
        "version": VERSION,
        "environment": started_in,
        "method": {
            "rounds": rounds,
            "order": "providers interleaved in every round, the first one rotated",
            "timer": timer.description,
            "speedup": "median over the rounds of the other provider's time / this one's; 95 % "
            "percentile bootstrap interval of that median",
            "match": accuracy.RULE,
            "peak_bytes": measure.PEAK_MEMORY[device],
            "saved_bytes": "distinct storages seen by saved_tensors_hooks in one training forward, "
            "parameters left out, the input counted; eager providers only",
            "seed": SEED,
        },
        "cases": [asdict(c) | {"name": c.name, "dtype": str(c.dtype)} for c in cases],
        "rows": rows,
    }
