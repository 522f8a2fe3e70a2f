"""Sums over rows, the last step: backward kernels leave partial sums, one row a program."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

TILE_BYTES = 16384  # of a program at once


@triton.jit
def sum_columns(Parts, Sums, n_parts, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sum the parts of a program's columns, in one order whatever runs when."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], Parts.dtype.element_ty)
    for first in range(0, n_parts, BLOCK_M):
        part = first + tl.arange(0, BLOCK_M)[:, None]
        mask = (part < n_parts) & (column < columns)
        total += tl.load(Parts + part.to(tl.int64) * columns + column, mask=mask, other=0.0)
    tl.store(Sums + column, tl.sum(total, 0).to(Sums.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["n_parts"])
def column_sum_kernel(
    Parts0,  # [n_parts, columns]
    Parts1,  # [n_parts, columns], or None
    Parts2,  # [n_parts, columns], or None
    Sums0,  # [columns]
    Sums1,  # [columns], or None
    Sums2,  # [columns], or None
    n_parts,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum of the parts of up to three sums. A program owns BLOCK_N columns of one of them."""
    if tl.program_id(1) == 0:
        sum_columns(Parts0, Sums0, n_parts, columns, BLOCK_M, BLOCK_N)
    if Parts1 is not None:
        if tl.program_id(1) == 1:
            sum_columns(Parts1, Sums1, n_parts, columns, BLOCK_M, BLOCK_N)
    if Parts2 is not None:
        if tl.program_id(1) == 2:
            sum_columns(Parts2, Sums2, n_parts, columns, BLOCK_M, BLOCK_N)


def sum_parts(parts: Sequence[Tensor | None], sums: Sequence[Tensor | None]) -> None:
    """Write the sum over the programs of each part that there is."""
    parts, sums = ([x for x in given if x is not None] for given in (parts, sums))
    if not parts:
        return
    n_parts, columns = parts[0].shape
    block_n = min(512, max(32, triton.next_power_of_2(columns // 32)))
    grid = (triton.cdiv(columns, block_n), len(parts))
    absent = [None] * (3 - len(parts))
    column_sum_kernel[grid](
        *(*parts, *absent),
        *(*sums, *absent),
        n_parts,
        columns,
        BLOCK_M=TILE_BYTES // (block_n * parts[0].element_size()),
        BLOCK_N=block_n,
    )
