"""From a variant to figures: compile it, disassemble it, count."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs

from compiled import gpu, sass
from compiled.variants import ROOT, Kernel, Region, Source, Variant, listed

#: What sm_90 and later keep of a block's shared memory, and count as used.
RESERVED_SHARED = 1024

ENTRY = re.compile(r"Compiling entry function '(\S+)'")
STACK = re.compile(r"Function properties for (\S+)\n\s*(\d+) bytes stack frame")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass(frozen=True)
class Figures:
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_cores: str | None
    instructions: tuple[float, ...]  # an element, in each counted region
    accesses: int
    wide_accesses: int
    exchanges: int = 0  # shuffles, and loads and stores of shared memory


@dataclass(frozen=True)
class Measured:
    """The kernels of one variant for one architecture, or why there are none."""

    op: str
    variant: str
    arch: int
    kernels: Mapping[str, Figures]
    error: str | None = None

    @property
    def label(self) -> str:
        return f"{self.op}, {self.variant}, sm_{self.arch}"


def measure(op: str, variant: str, arch: int) -> Measured:
    """In a process that :func:`gpu.become_gpu` has made one of this architecture."""
    try:
        work = listed(op)[variant]
        found = measure_source if isinstance(work, Source) else measure_variant
        return Measured(op, variant, arch, found(work, arch))
    except Exception as error:
        return Measured(op, variant, arch, {}, f"{type(error).__name__}: {error}")


def measure_variant(variant: Variant, arch: int) -> dict[str, Figures]:
    figures: dict[str, Figures] = {}
    launched = gpu.launched_by(variant.call)
    if not launched:
        raise LookupError("the call launches no kernel")
    for kernel in launched:
        name = kernel.metadata.name
        launches = sum(name == kernel_name(label) for label in figures)
        label = f"{name}#{launches + 1}" if launches else name
        figures[label] = triton_figures(kernel, expected(variant, name), arch)
    return figures


def expected(work: Variant | Source, kernel: str) -> Kernel:
    if kernel not in work.kernels:
        raise LookupError(f"{kernel} is not among the kernels that the variant lists")
    return work.kernels[kernel]


def triton_figures(kernel: Any, expectation: Kernel, arch: int) -> Figures:
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    if columns > gpu.TENSOR_MEMORY_COLUMNS:
        raise MemoryError(
            f"{columns} columns of tensor memory; sm_{arch} has {gpu.TENSOR_MEMORY_COLUMNS}"
        )
    name = kernel.metadata.name
    text = disassemble(kernel.asm["cubin"])
    resources = sass.parse_resources(text)[name]
    reserved = RESERVED_SHARED if arch >= 90 else 0
    return figures_of(
        sass.parse(text)[name],
        sass.Resources(
            resources.registers,
            resources.stack,
            kernel.metadata.shared + max(0, resources.shared - reserved),
        ),
        expectation,
        name,
        gpu.constexprs_of(kernel),
        32 * kernel.metadata.num_warps,
    )


def figures_of(
    code: sass.Code,
    resources: sass.Resources,
    expectation: Kernel,
    name: str,
    constexprs: Mapping[str, Any],
    threads: int | None,
) -> Figures:
    regions = [
        Region(name, constexprs, threads, instructions)
        for instructions in sass.counted_regions(code, expectation.loop)
    ]
    if not regions:
        raise LookupError(f"{name} has no loop to count")
    return Figures(
        resources.registers,
        resources.stack,
        sass.spills(code),
        resources.shared,
        sass.tensor_cores(code),
        tuple(len(region.instructions) / expectation.elements(region) for region in regions),
        *sass.global_accesses(code),
        exchanges=sass.exchanges(code),
    )


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run(knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name).stdout


def nvcc() -> str | None:
    return shutil.which("nvcc")


def measure_source(source: Source, arch: int) -> dict[str, Figures]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "out.cubin")
        log = _run(
            nvcc() or "nvcc",
            *("-cubin", f"-arch=sm_{arch}", "-std=c++17", "-O3", "-Xptxas", "-v"),
            *("-I", str(ROOT / "csrc"), "-o", str(cubin), str(source.path)),
        ).stderr
        functions = sass.parse(disassemble(cubin.read_bytes()))
    figures = {}
    for symbol, resources in parse_ptxas(log).items():
        signature = _run("c++filt", symbol).stdout.strip().replace("(anonymous namespace)::", "")
        expectation = expected(source, kernel_name(signature))
        label = signature.removeprefix("void ").partition("(")[0]
        figures[label] = figures_of(functions[symbol], resources, expectation, signature, {}, None)
    if not figures:
        raise LookupError("no kernel in it")
    return figures


def kernel_name(signature: str) -> str:
    """``void fastattn::rows<float, 4>(float*)`` -> ``rows``; ``rows#2`` (a second launch) too."""
    qualified = re.split(r"[<(#]", signature)[0]
    return qualified.split()[-1].rpartition("::")[2]


def parse_ptxas(log: str) -> dict[str, sass.Resources]:
    """What ``-Xptxas -v`` says of every kernel, by mangled name."""
    _, *rest = ENTRY.split(log)
    resources = {}
    for symbol, text in zip(rest[::2], rest[1::2], strict=True):
        stack = dict(STACK.findall(text))[symbol]
        used = USED.search(text)
        resources[symbol] = sass.Resources(int(used[1]), int(stack), int(used[2] or 0))
    return resources


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done
