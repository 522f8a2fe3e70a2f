"""column_sums: the parts that the programs of an H200 leave, one sum and three."""

from __future__ import annotations

import torch

from fastattn.kernels.column_sums import sum_parts
from tests.kernels.compiled.variants import Kernel, Region, Variant

PROGRAMS = 264


def elements(region: Region) -> float:
    """A program handles at least BLOCK_M parts of BLOCK_N columns."""
    return region.constexprs["BLOCK_M"] * region.constexprs["BLOCK_N"] / region.threads


def variant(columns: int, dtype: torch.dtype, count: int) -> Variant:
    """``count`` sums in ``dtype``, the parts of fp16 and bf16 sums in fp32."""
    wide = torch.promote_types(dtype, torch.float32)

    def call() -> None:
        parts = [torch.empty(PROGRAMS, columns, dtype=wide, device="meta") for _ in range(count)]
        sum_parts(parts, [torch.empty(columns, dtype=dtype, device="meta") for _ in range(count)])

    name = f"{count} of {columns} {str(dtype).removeprefix('torch.')}"
    return Variant(name, call, {"column_sum_kernel": Kernel(elements)})


VARIANTS = [
    variant(3072, torch.float32, 1),
    variant(1024, torch.bfloat16, 3),
    variant(1000, torch.float64, 2),
    variant(1, torch.float32, 1),
]
