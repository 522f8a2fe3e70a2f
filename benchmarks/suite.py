"""The run: every provider of a case is checked, warmed up, then timed in interleaved rounds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch._dynamo.utils import counters

from . import accuracy, measure
from .cases import CASES, MODES, PROVIDERS, SEED, Case, Mode, Provider, Workload
from .environment import environment

FORMAT, VERSION = "fastattn-benchmark", 1
WARM_UP_CALLS = 3
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

    def attempt(self, action: Callable[[], None]) -> None:
        """Runs the action; its failure is this entry's alone, unless the device itself is lost."""
        try:
            action()
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self.withhold("failed", describe(error))

    def call(self) -> None:
        self.mode.run(self.workload)

    def warm_up(self, timer, device: str) -> None:
        layer = self.workload.layer.train(self.mode.training)
        for _ in range(WARM_UP_CALLS):
            self.call()
        if self.mode.training and not self.provider.compiled:
            self.saved_bytes = measure.saved_bytes(
                lambda: layer(self.workload.src), layer.parameters()
            )
        self.peak_bytes = measure.peak_bytes(self.call, device)
        self.repetitions = measure.repetitions_for(timer, self.call)

    def time_once(self, timer) -> None:
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


def describe(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def mismatch_reason(match: dict) -> str:
    wrong = [match[kind] for kind in ("output", "gradient")]
    return "; ".join(
        f"{v['tensor']}: error {v['error']:.2e}, limit {v['limit']:.2e}"
        for v in wrong
        if not v["error"] <= v["limit"]
    )


def check_and_build(provider: Provider, case: Case, check, device: str) -> tuple[dict, Workload]:
    """The provider's match and its workload; a compiled provider that compiled nothing is refused."""
    graphs = counters["stats"]["unique_graphs"]
    match = check.check(provider)
    if provider.compiled and counters["stats"]["unique_graphs"] == graphs:
        raise RuntimeError("torch.compile captured no graph: this would time the eager layer")
    return match, Workload(case, provider, device)


def prepare(
    provider: Provider,
    case: Case,
    modes: Sequence[Mode],
    check,
    timer,
    device: str,
    on_step: OnStep,
) -> list[Entry]:
    """The provider's entries, checked for accuracy and, where right, warm and ready to be timed."""
    entries = [Entry(case, provider, mode) for mode in modes]
    on_step(f"{case.name}: checking {provider.name}")
    try:
        match, workload = check_and_build(provider, case, check, device)
    except torch.AcceleratorError:
        raise
    except Exception as error:
        match, workload = None, None
        for entry in entries:
            entry.withhold("failed", describe(error))
    for entry in entries:
        entry.match, entry.workload = match, workload
        if match and not match["ok"]:
            entry.withhold("mismatch", mismatch_reason(match))
        on_step(f"{case.name}: warming up {provider.name}, {entry.mode.name}")
        if entry.status == "ok":
            entry.attempt(lambda entry=entry: entry.warm_up(timer, device))
    return entries


def time_rounds(
    entries: Sequence[Entry], modes: Sequence[Mode], rounds: int, timer, on_step
) -> None:
    """Each round times every provider once per mode, each time starting with another provider."""
    for number in range(rounds):
        gc.collect()
        gc.disable()
        try:
            for mode in modes:
                ready = [e for e in entries if e.mode is mode and e.status == "ok"]
                first = number % max(len(ready), 1)
                for entry in ready[first:] + ready[:first]:
                    entry.attempt(lambda entry=entry: entry.time_once(timer))
        finally:
            gc.enable()
        on_step(f"{entries[0].case.name}: round {number + 1} of {rounds}")


def count_steps(cases: Sequence[Case], rounds: int) -> int:
    """How often `run` calls `on_step` with the default providers and modes."""
    return len(cases) * (len(PROVIDERS) * (1 + len(MODES)) + rounds)


def run(
    device: str,
    cases: Sequence[Case] | None = None,
    rounds: int = 15,
    providers: Sequence[Provider] = PROVIDERS,
    modes: Sequence[Mode] = MODES,
    on_step: OnStep = lambda text: None,
) -> dict:
    """Runs the cases (by default the device's) and returns the results that `report` works on."""
    cases = CASES[device] if cases is None else cases
    timer = measure.CudaTimer() if device == "cuda" else measure.CpuTimer()
    rows = []
    for case in cases:
        torch._dynamo.reset()  # a new size is a new graph, not a recompilation of the last one
        check = accuracy.AccuracyCheck(case, device)
        entries = []
        for provider in providers:
            entries += prepare(provider, case, modes, check, timer, device, on_step)
        time_rounds(entries, modes, rounds, timer, on_step)
        rows += [entry.row(entries) for mode in modes for entry in entries if entry.mode is mode]
    return {
        "format": FORMAT,
        "version": VERSION,
        "environment": environment(device),
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
