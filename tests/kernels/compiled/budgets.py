"""Committed ceilings, and what is said of the figures that pass them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.kernels.compiled.gpu import GPUS
from tests.kernels.compiled.measure import Figures, Measured
from tests.kernels.compiled.variants import Extra, Kernel

#: {"triton": version, "budgets": {op: {variant: {"sm_80": {kernel: {figure: ceiling}}}}}}
PATH = Path(__file__).with_name("budgets.json")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def write(path: Path, budgets: Mapping[str, Any]) -> None:
    """One line for the figures of a kernel."""
    text = json.dumps(budgets, indent=1)
    text = re.sub(r"\{[^{}]+\}", lambda found: json.dumps(json.loads(found[0])), text)
    path.write_text(text + "\n", "utf-8")


def round_up(figure: float, step: float) -> float:
    return math.ceil(figure / step) * step


def budget_of(figures: Figures) -> dict[str, Any]:
    """The figures with a little headroom."""
    return {
        "registers": round_up(figures.registers, 8),
        "shared": round_up(figures.shared, 1024),
        "instructions": [round_up(count, 0.5) for count in figures.instructions],
        "tensor_cores": figures.tensor_cores,
    }


def renewed(
    budgets: Mapping[str, Any],
    measured: Iterable[Measured],
    listed: Mapping[str, Iterable[str]],
    triton_version: str,
) -> dict[str, Any]:
    """``budgets`` with what was measured put in, and without variants that no op lists."""
    ops = {
        op: {name: dict(archs) for name, archs in named.items() if name in listed.get(op, named)}
        for op, named in budgets["budgets"].items()
        if listed.get(op, named)
    }
    for result in measured:
        if result.error is None:
            variant = ops.setdefault(result.op, {}).setdefault(result.variant, {})
            variant[f"sm_{result.arch}"] = {
                kernel: budget_of(figures) for kernel, figures in result.kernels.items()
            }
    return {"triton": triton_version, "budgets": ops}


def stale(budgets: Mapping[str, Any], listed: Mapping[str, Iterable[str]]) -> list[str]:
    """Budgets of variants that no op lists."""
    return [
        f"{op}, {name}: a budget without a variant"
        for op, names in listed.items()
        for name in budgets["budgets"].get(op, {})
        if name not in names
    ]


def verdicts(
    result: Measured, expectations: Mapping[str, Kernel], budgets: Mapping[str, Any]
) -> list[str]:
    """What is wrong with the kernels of one variant, a line each."""
    if result.error is not None:
        return [f"{result.label}: {result.error}"]
    variant = budgets["budgets"].get(result.op, {}).get(result.variant, {})
    ceilings = variant.get(f"sm_{result.arch}", {})
    failures = [
        f"{result.label}: a budget for {kernel}, which is not launched"
        for kernel in ceilings
        if kernel not in result.kernels
    ]
    for kernel, figures in result.kernels.items():
        label = f"{result.label}, {kernel}"
        found = fixed_verdicts(figures, expectations[kernel], result.arch)
        if kernel in ceilings:
            found += budget_verdicts(figures, ceilings[kernel])
        else:
            found.append("no budget; --write makes one")
        failures += [f"{label}: {failure}" for failure in found]
    return failures


def fixed_verdicts(figures: Figures, expectation: Kernel, arch: int) -> list[str]:
    """What no budget can allow."""
    found = [
        _over("bytes of stack", figures.stack, 0),
        _over("loads and stores of spilled registers", figures.spills, 0),
        _over("bytes of shared memory", figures.shared, GPUS[arch].shared_memory, "the limit is"),
        _over(
            "instructions an element",
            max(figures.instructions),
            expectation.at_most.get(arch, math.inf),
            "the target is",
        ),
    ]
    found += [f"an operand of {each} is longer than its product" for each in figures.overlong]
    if expectation.tensor_cores and figures.tensor_cores is None:
        found.append("no tensor-core instruction")
    return [failure for failure in found if failure]


def budget_verdicts(figures: Figures, ceilings: Mapping[str, Any]) -> list[str]:
    loops, budgeted = figures.instructions, ceilings["instructions"]
    found = [
        _over("registers", figures.registers, ceilings["registers"]),
        _over("bytes of shared memory", figures.shared, ceilings["shared"]),
    ]
    if len(loops) == len(budgeted):
        found += [
            _over("instructions an element", figure, ceiling)
            for figure, ceiling in zip(loops, budgeted, strict=True)
        ]
    else:
        found.append(f"{len(loops)} innermost loops, the budget has {len(budgeted)}")
    if figures.tensor_cores != ceilings["tensor_cores"]:
        found.append(
            f"tensor-core instructions: {figures.tensor_cores}, "
            f"the budget has {ceilings['tensor_cores']}"
        )
    return [failure for failure in found if failure]


def extras(
    measured: Iterable[Measured], listed: Iterable[tuple[str, Extra]]
) -> tuple[list[str], list[str]]:
    """What variants cost beyond others, a line each, and which of them is too much."""
    by_kernel = {
        (result.op, result.variant, result.arch, kernel): figures
        for result in measured
        for kernel, figures in result.kernels.items()
    }
    found, failures = [], []
    for op, extra in listed:
        for arch, ceiling in extra.at_most.items():
            more, less = (
                by_kernel.get((op, variant, arch, extra.kernel))
                for variant in (extra.variant, extra.beyond)
            )
            if more is None or less is None:
                continue
            pairs = zip(more.instructions, less.instructions, strict=True)
            added = max(a - b for a, b in pairs)
            line = f"{op}, {extra.variant}, sm_{arch}, {extra.kernel}, beyond {extra.beyond}"
            found.append(f"{line}: {added:.2f} instructions an element of {ceiling:.12g}")
            if failure := _over("instructions an element", added, ceiling, "the target is"):
                failures.append(f"{line}: {failure}")
            if not extra.may_exchange and more.exchanges > less.exchanges:
                counts = f"{more.exchanges} exchanges between threads, not {less.exchanges}"
                failures.append(f"{line}: {counts}")
    return found, failures


def _over(what: str, figure: float, ceiling: float, words: str = "the ceiling is") -> str | None:
    return f"{round(figure, 2):.12g} {what}, {words} {ceiling:.12g}" if figure > ceiling else None
