"""What ``python -m tests.kernels.compiled`` does."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import triton

from tests.kernels.compiled import budgets, gpu, layouts
from tests.kernels.compiled.measure import Figures, Measured, kernel_name, measure, nvcc
from tests.kernels.compiled.variants import (
    ARCHITECTURES,
    Kernel,
    Source,
    Variant,
    listed,
    load,
    shipped_ops,
)

HEADINGS = (
    *("kernel", "sm", "registers", "stack", "spills", "shared bytes", "limit"),
    *("tensor cores", "instr/element", "target", "16-byte accesses"),
)

BATCH = 8  # variants that one process compiles before it disassembles them

Listed = Mapping[str, Mapping[str, Variant | Source]]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    began = time.perf_counter()
    os.environ.pop("TRITON_INTERPRET", None)
    works, failures = everything_listed(options.ops or shipped_ops())
    wanted = [
        (op, name)
        for op, variants in works.items()
        for name, work in variants.items()
        if options.only in name and can_compile(work)
    ]
    measured = measure_all(wanted, options.arch or ARCHITECTURES)
    committed = budgets.read(options.budgets) if options.budgets.exists() else {"budgets": {}}
    everything = works if options.ops else {**dict.fromkeys(committed["budgets"], {}), **works}
    if options.write:
        committed = budgets.renewed(committed, measured, everything, triton.__version__)
        budgets.write(options.budgets, committed)
    failures += budgets.stale(committed, everything)
    if not measured:
        failures.append("nothing was compiled")
    for result in measured:
        failures += budgets.verdicts(result, expectations(result, works), committed)

    extras = [(op, extra) for op in works for extra in getattr(load(op), "EXTRAS", ())]
    found, too_much = budgets.extras(measured, extras)
    failures += too_much
    if not options.only:
        looked_at, overlong = layouts.look_at_all(works, options.arch or ARCHITECTURES)
        found.append(looked_at)
        failures += overlong

    print_table(rows(measured, works))
    print("".join(f"\n{line}" for line in found))
    launches = sum(len(result.kernels) for result in measured)
    print(
        f"\n{launches} kernels of {len(measured)} variants, triton {triton.__version__}, "
        f"{time.perf_counter() - began:.0f} s"
    )
    if failures and committed.get("triton") != triton.__version__:
        failures.insert(0, f"the budgets were written with triton {committed.get('triton')}")
    for failure in failures:
        print(f"FAILED {failure}")
    return bool(failures)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernels.compiled",
        description="What the kernels that ship cost, counted in machine code.",
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="files of this folder; default: all")
    parser.add_argument("--only", default="", metavar="NAME", help="variants with NAME in theirs")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES)
    parser.add_argument("--write", action="store_true", help="renew the budgets")
    parser.add_argument("--budgets", type=Path, default=budgets.PATH, metavar="FILE")
    return parser.parse_args(arguments)


def everything_listed(ops: Iterable[str]) -> tuple[Listed, list[str]]:
    """What the ops list, and which have no file."""
    works, failures = {}, []
    for op in ops:
        try:
            works[op] = listed(op)
        except LookupError as error:
            failures.append(str(error))
    return works, failures


def can_compile(work: Variant | Source) -> bool:
    if isinstance(work, Source) and nvcc() is None:
        print(f"{work.name} is left out: no nvcc here")
        return False
    return True


def measure_all(wanted: Sequence[tuple[str, str]], archs: Sequence[int]) -> list[Measured]:
    """In processes of their own, some for every architecture, with an empty cache."""
    workers = -(-len(os.sched_getaffinity(0)) // len(archs))
    batches = [wanted[i : i + BATCH] for i in range(0, len(wanted), BATCH)]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        pools = {
            arch: ProcessPoolExecutor(workers, get_context("spawn"), gpu.become_gpu, (arch,))
            for arch in archs
        }
        futures = [
            (batch, arch, pools[arch].submit(measure, batch, arch))
            for batch in batches
            for arch in archs
        ]
        results = [result for future in futures for result in outcome(*future)]
        for pool in pools.values():
            pool.shutdown()
    place = {work: number for number, work in enumerate(wanted)}
    return sorted(results, key=lambda result: place[result.op, result.variant])


def outcome(
    batch: Sequence[tuple[str, str]], arch: int, future: Future[list[Measured]]
) -> list[Measured]:
    try:
        return future.result()
    except BrokenProcessPool:
        crash = "the compiler crashed, here or a little before"
        return [Measured(op, variant, arch, {}, crash) for op, variant in batch]


def expectations(result: Measured, works: Listed) -> dict[str, Kernel]:
    kernels = works[result.op][result.variant].kernels
    return {label: kernels[kernel_name(label)] for label in result.kernels}


def rows(measured: Iterable[Measured], works: Listed) -> list[tuple[str, ...]]:
    return [
        row(result, label, figures, expectations(result, works)[label])
        for result in measured
        for label, figures in result.kernels.items()
    ]


def row(result: Measured, label: str, figures: Figures, expectation: Kernel) -> tuple[str, ...]:
    target = expectation.at_most.get(result.arch)
    return (
        f"{result.variant}: {label}",
        str(result.arch),
        str(figures.registers),
        str(figures.stack),
        str(figures.spills),
        str(figures.shared),
        str(gpu.GPUS[result.arch].shared_memory),
        figures.tensor_cores or "-",
        " ".join(f"{count:.1f}" for count in figures.instructions),
        "-" if target is None else f"{target:.1f}",
        f"{figures.wide_accesses} of {figures.accesses}",
    )


def print_table(table: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(HEADINGS, *table, strict=True)]
    for cells in (HEADINGS, *table):
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]))
