"""From a variant to figures: compile it, disassemble it, count."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from triton import knobs

from tests.kernels.compiled import gpu, layouts, sass
from tests.kernels.compiled.variants import ROOT, Kernel, Region, Source, Variant, listed

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
    overlong: tuple[str, ...] = ()  # operands of products, see layouts.py


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


@dataclass(frozen=True)
class Compiled:
    """A kernel of a variant, and where its machine code is."""

    label: str
    symbol: str
    cubin: bytes
    resources: sass.Resources
    expectation: Kernel
    signature: str
    constexprs: Mapping[str, Any]
    threads: int | None
    ttgir: str = ""


def measure(works: Sequence[tuple[str, str]], arch: int) -> list[Measured]:
    """Variants of ops, in a process that :func:`gpu.become_gpu` has made one of this architecture.

    They are disassembled together: nvdisasm takes half a second to start, and little more for all.
    """
    compiled: dict[tuple[str, str], list[Compiled]] = {}
    results = []
    for op, variant in works:
        try:
            work = listed(op)[variant]
            kernels_of = compile_source if isinstance(work, Source) else compile_variant
            compiled[op, variant] = list(kernels_of(work, arch))
        except Exception as error:
            results.append(failed(op, variant, arch, error))
    codes = disassemble({kernel.cubin for kernels in compiled.values() for kernel in kernels}, arch)
    for (op, variant), kernels in compiled.items():
        try:
            figures = {k.label: figures_of(k, codes[k.cubin][k.symbol]) for k in kernels}
            results.append(Measured(op, variant, arch, figures))
        except Exception as error:
            results.append(failed(op, variant, arch, error))
    return results


def failed(op: str, variant: str, arch: int, error: Exception) -> Measured:
    return Measured(op, variant, arch, {}, f"{type(error).__name__}: {error}")


def compile_variant(variant: Variant, arch: int) -> Iterator[Compiled]:
    launched = gpu.launched_by(variant.call)
    if not launched:
        raise LookupError("the call launches no kernel")
    launches: Counter[str] = Counter()
    for kernel in launched:
        name = kernel.metadata.name
        launches[name] += 1
        yield Compiled(
            f"{name}#{launches[name]}" if launches[name] > 1 else name,
            name,
            kernel.asm["cubin"],
            triton_resources(kernel, arch),
            expected(variant, name),
            name,
            gpu.constexprs_of(kernel),
            32 * kernel.metadata.num_warps,
            kernel.asm["ttgir"],
        )


def expected(work: Variant | Source, kernel: str) -> Kernel:
    if kernel not in work.kernels:
        raise LookupError(f"{kernel} is not among the kernels that the variant lists")
    return work.kernels[kernel]


def triton_resources(kernel: Any, arch: int) -> sass.Resources:
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    if columns > gpu.TENSOR_MEMORY_COLUMNS:
        raise MemoryError(
            f"{columns} columns of tensor memory; sm_{arch} has {gpu.TENSOR_MEMORY_COLUMNS}"
        )
    with file_of(kernel.asm["cubin"]) as path:
        text = _run(knobs.nvidia.cuobjdump.path, "-res-usage", path).stdout
    resources = sass.parse_resources(text)[kernel.metadata.name]
    reserved = RESERVED_SHARED if arch >= 90 else 0
    shared = kernel.metadata.shared + max(0, resources.shared - reserved)
    return replace(resources, shared=shared)


def figures_of(kernel: Compiled, code: sass.Code) -> Figures:
    regions = [
        Region(kernel.signature, kernel.constexprs, kernel.threads, instructions)
        for instructions in sass.counted_regions(code, kernel.expectation.loop)
    ]
    if not regions:
        raise LookupError(f"{kernel.signature} has no loop to count")
    return Figures(
        kernel.resources.registers,
        kernel.resources.stack,
        sass.spills(code),
        kernel.resources.shared,
        sass.tensor_cores(code),
        tuple(len(r.instructions) / kernel.expectation.elements(r) for r in regions),
        *sass.global_accesses(code),
        exchanges=sass.exchanges(code),
        overlong=tuple(layouts.overlong(kernel.ttgir)),
    )


def disassemble(cubins: Iterable[bytes], arch: int) -> dict[bytes, dict[str, sass.Code]]:
    """The machine code in every cubin, by function. Addresses count on from one to the next."""
    functions = [(cubin, *function) for cubin in cubins for function in sass.functions_in(cubin)]
    if not functions:
        return {}
    with file_of(b"".join(content for _, _, content in functions)) as path:
        code = sass.parse(_run(knobs.nvidia.nvdisasm.path, "--binary", f"SM{arch}", path).stdout)
    lengths = [len(content) // sass.INSTRUCTION_BYTES for _, _, content in functions]
    if sum(lengths) != len(code):
        raise ValueError(f"{len(code)} instructions disassembled, of {sum(lengths)}")
    remaining = iter(code)
    codes: dict[bytes, dict[str, sass.Code]] = {}
    for (cubin, name, _), length in zip(functions, lengths, strict=True):
        codes.setdefault(cubin, {})[name] = list(islice(remaining, length))
    return codes


@contextmanager
def file_of(content: bytes) -> Iterator[str]:
    """The path of a file with this content, for a program to read."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        yield file.name


def nvcc() -> str | None:
    return shutil.which("nvcc")


def compile_source(source: Source, arch: int) -> Iterator[Compiled]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "out.cubin")
        log = _run(
            nvcc() or "nvcc",
            *("-cubin", f"-arch=sm_{arch}", "-std=c++17", "-O3", "-Xptxas", "-v"),
            *("-I", str(ROOT / "csrc"), "-o", str(path), str(source.path)),
        ).stderr
        cubin = path.read_bytes()
    kernels = parse_ptxas(log)
    if not kernels:
        raise LookupError("no kernel in it")
    for symbol, resources in kernels.items():
        signature = _run("c++filt", symbol).stdout.strip().replace("(anonymous namespace)::", "")
        label = signature.removeprefix("void ").partition("(")[0]
        expectation = expected(source, kernel_name(signature))
        yield Compiled(label, symbol, cubin, resources, expectation, signature, {}, None)


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
