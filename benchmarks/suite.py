"""The run: every provider of a case is checked, warmed up, then timed in interleaved rounds."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch._dynamo.utils import counters

from . import accuracy, measure
from .cases import SEED, CannotRun, Case, Mode, Op, Provider, Workload
from .environment import environment

FORMAT, VERSION = "fastattn-benchmark", 2
ROUNDS = 11
OnStep = Callable[[str], None]
OnCase = Callable[[dict], None]
Plan = Sequence[tuple[Op, Case]]

#: For torch._dynamo.config. The check may have fewer sequences than the case, which must not make
#: the timed graph one for any shape; and the graphs of all providers and modes of a case are kept:
#: past the limit a compiled provider would run eagerly without a word.
DYNAMO = {
    "automatic_dynamic_shapes": False,
    "recompile_limit": 64,
    "fail_on_recompile_limit_hit": True,
}

#: How a call reaches the device: from Python each time, or as replays of a CUDA graph.
LAUNCHES = {"cpu": ("eager",), "cuda": ("eager", "graph")}


def call_of(workload: Workload, mode: Mode) -> measure.Call:
    """The mode as a call, for which the module is put in training or evaluation mode."""
    workload.module.train(mode.training)
    prepare = mode.prepare and functools.partial(mode.prepare, workload)
    return measure.Call(functools.partial(mode.run, workload), prepare)


def match_of(check: accuracy.AccuracyCheck, provider: Provider) -> dict:
    """The verdict of the check; an error where a compiled provider would run eagerly."""
    graphs = counters["stats"]["unique_graphs"]
    match = check.check(provider)
    if provider.compile_mode and counters["stats"]["unique_graphs"] == graphs:
        raise RuntimeError("torch.compile captured no graph: this would time the eager layer")
    return match


@dataclass
class Entry:
    """One provider in one mode of one case, on its way to being a row of the results."""

    op: Op
    case: Case
    provider: Provider
    mode: Mode
    launch: str
    facts: dict = field(default_factory=dict)  # what the provider has in all modes
    status: str = "ok"
    reason: str | None = None
    workload: Workload | None = None
    call: measure.Call | None = None
    repetitions: int | None = None
    figures: dict = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def withhold(self, status: str, reason: str) -> None:
        self.status, self.reason, self.seconds = status, reason, []

    def warm_up(self, timer: measure.Timer, device: str) -> None:
        workload, mode = self.workload, self.mode
        call = call_of(workload, mode)
        for _ in range(measure.WARM_UP_CALLS):
            call()
        if self.launch == "eager":
            if mode.training and self.provider.compile_mode is None:
                parameters = tuple(workload.module.parameters())
                saved = measure.saved_bytes(workload.forward, parameters)
                self.figures["saved_bytes"] = saved
            self.figures["peak_bytes"] = measure.peak_bytes(call, device)
            self.figures["launches"] = measure.launches(call, device)
        else:
            call = measure.captured(call)
        self.repetitions = measure.repetitions_for(timer, call)
        self.call = call

    def time_once(self, timer: measure.Timer) -> None:
        self.workload.module.train(self.mode.training)
        self.seconds.append(timer.sample(self.call, self.repetitions))

    def row(self, ours: Entry | None, ceilings: dict) -> dict:
        """The row, with the speedup of `ours`, the entry of ours that this peer is held against."""
        row = {
            "op": self.op.name,
            "case": self.case.name,
            "mode": self.mode.name,
            "launch": self.launch,
            "provider": self.provider.name,
            "status": self.status,
            "reason": self.reason,
            **self.facts,
            **self.figures,
        }
        if self.status == "ok":
            row |= self._times(ceilings)
            if ours is not None and ours.status == "ok":
                ratio = measure.median_ratio(self.seconds, ours.seconds)
                row["fastattn_speedup"] = {"provider": ours.provider.name, **ratio}
        return row

    def _times(self, ceilings: dict) -> dict:
        p20, median, p80 = np.percentile(self.seconds, [20, 50, 80])
        costs = [self.op.cost(self.case)[name] for name in self.mode.passes]
        flops = sum(cost.flops for cost in costs)
        floor = flops / ceilings["matmul_flops_per_s"]
        times = {
            "median_ms": median * 1e3,
            "p20_ms": p20 * 1e3,
            "p80_ms": p80 * 1e3,
            "tokens_per_s": self.case.tokens / median,
            "tflops": flops / median / 1e12,
            "repetitions": self.repetitions,
            "samples_ms": [round(second * 1e3, 5) for second in self.seconds],
        }
        if all(cost.bytes is not None for cost in costs):
            moved = sum(cost.bytes for cost in costs)
            copy = moved / ceilings["copy_bytes_per_s"]
            times |= {"gb_per_s": moved / median / 1e9, "copy_share": copy / median}
            floor = max(floor, copy)
        return times | {"floor_share": floor / median}


@contextmanager
def failure_withholds(entries: Sequence[Entry]) -> Iterator[None]:
    """A failure is that of these entries alone and the run goes on, unless the device is lost."""
    try:
        yield
    except CannotRun as error:
        for entry in entries:
            entry.withhold("skipped", str(error))
    except Exception as error:
        if isinstance(error, torch.AcceleratorError) and measure.device_is_lost():
            raise
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


class CaseRun:
    """All entries of one case, on their way through check, warm-up and timing."""

    def __init__(
        self,
        op: Op,
        case: Case,
        device: str,
        providers: Sequence[Provider],
        modes: Sequence[Mode],
        rounds: int,
        timer: measure.Timer,
        on_step: OnStep,
    ):
        self.op, self.case, self.device, self.rounds = op, case, device, rounds
        self.timer, self.on_step, self.label = timer, on_step, f"{op.name} {case.name}"
        self.groups: list[list[Entry]] = [
            [Entry(op, case, provider, mode, launch) for provider in providers]
            for mode in modes
            for launch in LAUNCHES[device]
        ]

    def run(self) -> None:
        torch._dynamo.reset()  # a new size is a new graph, not a recompilation of the last one
        check = None
        with failure_withholds([entry for group in self.groups for entry in group]):
            check = accuracy.AccuracyCheck(self.op, self.case, self.device)
        for entries in zip(*self.groups, strict=True):
            self.on_step(f"{self.label}: checking {entries[0].provider.name}")
            if check is not None:
                with failure_withholds(entries):
                    self._check(check, entries)
        for group in self.groups:
            self._time(group)

    def _check(self, check: accuracy.AccuracyCheck, entries: Sequence[Entry]) -> None:
        """Of one provider, in all modes."""
        provider = entries[0].provider
        reason = provider.why_not(self.case, self.device)
        if reason is not None:
            for entry in entries:
                entry.withhold("skipped", reason)
            return
        match = match_of(check, provider)
        facts = {"match": match}
        if self.op.dropout_of and self.case.dropout and provider.compile_mode is None:
            facts["dropout_measured"] = self.op.dropout_of(provider, self.case, self.device)
        workload = Workload(self.op, self.case, provider, self.device)
        for entry in entries:
            entry.facts, entry.workload = facts, workload
            uncaptured = entry.launch == "graph" and self.op.why_not_captured(self.case, entry.mode)
            if not match["ok"]:
                entry.withhold("mismatch", mismatch_reason(match))
            elif uncaptured:
                entry.withhold("skipped", uncaptured)

    def _time(self, group: Sequence[Entry]) -> None:
        """Times every provider in every round; each round starts with another provider."""
        where = f"{self.label}: {group[0].mode.name}, {group[0].launch} launches"
        for entry in group:
            self.on_step(f"{where}, warming up {entry.provider.name}")
            if entry.status == "ok":
                with failure_withholds([entry]):
                    entry.warm_up(self.timer, self.device)
        gc.collect()
        gc.disable()
        try:
            for number in range(self.rounds):
                ready = [entry for entry in group if entry.status == "ok"]
                first = number % max(len(ready), 1)
                for entry in ready[first:] + ready[:first]:
                    with failure_withholds([entry]):
                        entry.time_once(self.timer)
                self.on_step(f"{where}, round {number + 1}")
        finally:
            gc.enable()
        for entry in group:
            entry.call = None  # a captured graph keeps its memory

    def rows(self, ceilings: dict) -> list[dict]:
        rows = []
        for group in self.groups:
            by_provider = {entry.provider: entry for entry in group}
            for entry in group:
                ours = by_provider.get(self.op.ours_like(entry.provider))
                rows.append(entry.row(ours, ceilings))
        return rows


def chosen(op: Op, providers: Sequence[str] | None, quick: bool) -> list[Provider]:
    """An op's providers, cut down to names or to the quick ones.

    The baseline is always there, and also compiled where a provider is held against that.
    """
    wanted = [
        p for p in op.providers if (p.name in providers if providers else p.quick or not quick)
    ]
    compile_modes = {None, *(provider.compile_mode for provider in wanted)}
    return [
        p
        for p in op.providers
        if p in wanted or p.module is op.baseline.module and p.compile_mode in compile_modes
    ]


@torch._dynamo.config.patch(**DYNAMO)
def run(
    device: str,
    plan: Plan,
    rounds: int = ROUNDS,
    providers: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    quick: bool = False,
    seconds: float | None = None,
    on_step: OnStep = lambda text: None,
    on_case: OnCase = lambda results: None,
) -> dict:
    """Runs the cases of a plan and returns the results that `report` works on.

    Args:
        device: "cpu" or "cuda".
        plan: pairs of an op and a case.
        rounds: samples of every provider in every mode.
        providers, modes: names; None takes all, with `quick` all but the slow ones.
        seconds: no case but the first begins later than this; what is left out is in "not_run".
        on_step: told what is being done.
        on_case: given the results so far after each case.
    """
    started, timer = time.monotonic(), measure.timer_for(device)
    results = {
        "format": FORMAT,
        "version": VERSION,
        "environment": environment(device),
        "method": {
            "rounds": rounds,
            "order": "providers interleaved in every round, the first one rotated",
            "timer": timer.description,
            "graph": "the same call captured once, then replayed; what must run before it in a "
            "graph of its own",
            "speedup": "median over the rounds of the peer's time / fastattn's; 95 % percentile "
            "bootstrap interval of that median",
            "match": accuracy.RULE,
            "peak_bytes": measure.PEAK_MEMORY[device],
            "saved_bytes": "distinct storages seen by saved_tensors_hooks in one training forward, "
            "parameters left out, the inputs counted; eager providers only",
            "launches": "kernels, copies and fills of one call, from torch.profiler; CUDA only",
            "ceilings": measure.CEILINGS,
            "floor_share": "the longer of FLOPs / the product's rate and bytes / the copy's rate, "
            "over the median",
            "seed": SEED,
        },
        "ceilings": measure.ceilings(device, timer),
        "cases": [],
        "rows": [],
        "not_run": [],
    }
    for position, (op, case) in enumerate(plan):
        if position and seconds is not None and time.monotonic() - started > seconds:
            results["not_run"] = [f"{op.name} {case.name}" for op, case in plan[position:]]
            break
        case_run = CaseRun(
            op,
            case,
            device,
            chosen(op, providers, quick),
            [mode for mode in op.modes if modes is None or mode.name in modes],
            rounds,
            timer,
            on_step,
        )
        case_run.run()
        results["cases"].append(described(op, case))
        results["rows"] += case_run.rows(results["ceilings"])
        on_case(results)
    return results


def described(op: Op, case: Case) -> dict:
    costs = {name: asdict(cost) for name, cost in op.cost(case).items()}
    return {"op": op.name, "name": case.name, **asdict(case), "tokens": case.tokens, "cost": costs}


def count_steps(
    device: str,
    plan: Plan,
    rounds: int,
    providers: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    quick: bool = False,
) -> int:
    """How often `run` calls `on_step` with these arguments."""
    steps = 0
    for op, _ in plan:
        peers = len(chosen(op, providers, quick))
        groups = sum(modes is None or mode.name in modes for mode in op.modes)
        steps += peers + groups * len(LAUNCHES[device]) * (peers + rounds)
    return steps
