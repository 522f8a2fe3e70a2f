"""Kernels that the gate must pass. They test the gate and do not ship."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.kernels.compiled.planted_kernels import matmul, row_sum
from tests.kernels.compiled.variants import Kernel, Region, Source, Variant

A = torch.empty(512, 512, dtype=torch.bfloat16, device="meta")


def matmul_elements(region: Region) -> float:
    return region.constexprs["BLOCK"] * region.constexprs["BLOCK_K"] / region.threads


def loaded_elements(region: Region) -> float:
    return 8 * region.count("LDG.E.128")


VARIANTS = [
    Variant(
        "product",
        lambda: matmul(A, A, precision="tf32"),
        {"matmul_kernel": Kernel(matmul_elements, loop=True, tensor_cores=True)},
    ),
    Variant(
        "row sum",
        lambda: row_sum(A),
        {"row_sum_kernel": Kernel(loaded_elements, loop=True, at_most={90: 20.0})},
    ),
]

SOURCES = [
    Source(
        Path(__file__).parent / "planted" / "sound.cu",
        {"adjacent_decisions": Kernel(lambda region: 8)},
    )
]
