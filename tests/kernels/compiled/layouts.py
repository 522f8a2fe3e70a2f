"""Products whose operands Triton lays out longer than they are, which it then compiles wrongly.

In an operand of ``mma.sync`` four threads share a row, and each holds kWidth elements of it side
by side. Where 4 kWidth is more than the product sums over, a part of the operand is never used,
without an error (triton #10645, #11691). It shows in TTGIR, before any machine code is made: so
every entry of a table of tiles can be looked at, under every mask.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from triton.backends.nvidia.compiler import CUDABackend

from tests.kernels.compiled import gpu
from tests.kernels.compiled.variants import load

MMA_SYNC = re.compile(r"^(#\w+) = #ttg\.nvidia_mma<\{versionMajor = 2\b", re.MULTILINE)
PRODUCT = re.compile(r"\btt\.dot .*$", re.MULTILINE)
OPERAND = re.compile(
    r"tensor<(\d+)x(\d+)x\w+, #ttg\.dot_op<\{opIdx = (\d), parent = (#\w+)(?:, kWidth = (\d+))?"
)


def overlong(ttgir: str) -> list[str]:
    """The operands of products by ``mma.sync`` that are laid out longer than they are."""
    layouts = set(MMA_SYNC.findall(ttgir))
    found = []
    for line in PRODUCT.findall(ttgir):
        operands = OPERAND.findall(line)
        if len(operands) != 2:
            raise ValueError(f"a product is written in another way: {line}")
        for rows, columns, index, parent, width in operands:
            depth = int(columns if index == "0" else rows)
            if parent in layouts and 4 * int(width) > depth:
                found.append(f"{rows} x {columns} with kWidth {width}")
    return list(dict.fromkeys(found))


def stop_at_ttgir(arch: int) -> None:
    """Make this process one that has such a GPU, and compiles no further, and for good."""
    gpu.become_gpu(arch)
    initialize, add_stages = CUDABackend.__init__, CUDABackend.add_stages

    def initialize_without_binary(self: CUDABackend, *args: Any) -> None:
        initialize(self, *args)
        self.binary_ext = "ttgir"

    def add_first_stages(self: CUDABackend, stages: dict[str, Any], *args: Any) -> None:
        add_stages(self, stages, *args)
        make_ttir, make_ttgir = stages["ttir"], stages["ttgir"]
        stages.clear()

        def make_named_ttgir(source: Any, metadata: dict[str, Any]) -> Any:
            metadata["name"] = ""  # later stages would find it
            return make_ttgir(source, metadata)

        stages.update(ttir=make_ttir, ttgir=make_named_ttgir)

    CUDABackend.__init__, CUDABackend.add_stages = initialize_without_binary, add_first_stages
    CUDABackend.pack_metadata = lambda self, metadata: ()  # what a launch would need


def look(op: str) -> Mapping[str, list[str]]:
    """What is overlong in each kernel of the calls that ``op`` lists under LAYOUTS."""
    found = {}
    for variant in load(op).LAYOUTS:
        for kernel in gpu.launched_by(variant.call):
            ttgir = kernel.asm["ttgir"].decode()  # it stands for the binary
            name = re.search(r"tt\.func public @(\w+)", ttgir)[1]
            found[f"{op}, {variant.name}, {name}"] = overlong(ttgir)
    return found


def look_at_all(ops: Iterable[str], archs: Iterable[int]) -> tuple[str, list[str]]:
    """How many kernels were looked at, in words, and what is overlong, each in words."""
    ops = [op for op in ops if hasattr(load(op), "LAYOUTS")]
    pools = {
        arch: ProcessPoolExecutor(1, get_context("spawn"), stop_at_ttgir, (arch,)) for arch in archs
    }
    futures = [(arch, pools[arch].submit(look, op)) for arch in pools for op in ops]
    count, failures = 0, []
    for arch, future in futures:
        for label, found in future.result().items():
            count += 1
            failures += [f"{label}, sm_{arch}: an operand of {each}" for each in found]
    for pool in pools.values():
        pool.shutdown()
    return f"{count} kernels looked at for operands longer than their products", failures
