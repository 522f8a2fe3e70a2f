"""dropout(act(x + bias)) and its backward, each in one pass over memory.

The dropout contract decides the columns n, n + 8, ..., n + 56 of a block of 64 by one call of
Philox. So a thread owns a *cell*: WIDTH adjacent columns in each of the eight *slices* of a row's
block, where slice w lies 8 w columns to the right of slice 0. It makes WIDTH calls for 8 WIDTH
elements, and every access is one vector of WIDTH elements, 16 bytes where strides allow.

Tiles are [WIDTH, CELLS], one cell a thread: that is both how the compiler lays a tile out by
default and how it wants to access memory, so nothing travels between threads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.dropout import threshold
from fastattn.kernels.activations import activate, activation_backward
from fastattn.kernels.dropout import activation_words, is_kept, token_coordinates

SLICES = 8  # of a block of 64 columns
ACCESS_BYTES = 16  # of the widest load and store
NUM_WARPS = 8
CELLS = 32 * NUM_WARPS  # of a program
GRID_LIMIT = 65535  # programs along dimension 1 of a CUDA grid

#: Integers of which no value deserves a kernel of its own.
_RUNTIME = [
    "n_rows",
    "columns",
    "x_stride",
    "dy_stride",
    "skip",
    "first_group",
    "site",
    "threshold",
    "row_period",
]


# ---------------------------------------------------------------------------------------- tiles


@triton.jit
def program_cells(skip, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, WIDTH: tl.constexpr):
    """Row [1, CELLS], groups and columns of slice 0 [WIDTH, CELLS] of a program's cells.

    Columns count from the first one in memory, which is ``skip`` * WIDTH into its block of 64.
    """
    ACROSS: tl.constexpr = BLOCK_G // WIDTH
    cell = tl.arange(0, BLOCK_M * ACROSS)[None, :]
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + cell // ACROSS
    first = (tl.program_id(1) * ACROSS + cell % ACROSS) * WIDTH
    group = first + tl.arange(0, WIDTH)[:, None]
    column = group // 8 * 64 + group % 8 - skip * WIDTH
    return row, group, column


@triton.jit
def slice_mask(row_mask, column, w: tl.constexpr, n_columns):
    """What of slice w exists. A column before the first one is beyond the last as unsigned."""
    return row_mask & ((column + 8 * w).to(tl.uint32) < n_columns.to(tl.uint32))


@triton.jit
def load_slices(Slice0, row_mask, column, n_columns):
    """The eight slices of every cell, all requested before the first is used."""
    slices = ()
    for w in tl.static_range(8):
        mask = slice_mask(row_mask, column, w, n_columns)
        slices += (tl.load(Slice0 + 8 * w, mask=mask, other=0.0),)
    return slices


# -------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=_RUNTIME)
def forward_kernel(
    X,  # [n_rows, columns * WIDTH], rows x_stride * WIDTH apart
    Bias,  # [columns * WIDTH], or None
    Y,  # like X, contiguous
    Seed,  # [1] int64, or None: nothing drops
    RowIndex,  # [n_rows] int32, or None
    n_rows,
    columns,
    x_stride,
    skip,
    first_group,  # number of the first group of the block of 64 in which memory begins
    site,
    threshold,
    scale: tl.float64,
    row_period,
    BATCH_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y = m * act(x + b), with m = scale where the contract keeps an element and 0 elsewhere.

    A program owns BLOCK_M rows of BLOCK_G groups, that is 8 * BLOCK_G columns, and a thread
    8 * WIDTH elements of one row. Random words stay in registers; nothing is kept for backward.
    Lengths, strides and offsets of columns count vectors of WIDTH, which shows their alignment.
    """
    dtype: tl.constexpr = tl.float64 if Y.dtype.element_ty == tl.float64 else tl.float32
    n_columns = columns * WIDTH
    row, group, column = program_cells(skip, BLOCK_M, BLOCK_G, WIDTH)
    row_mask = row < n_rows
    x_slices = load_slices(
        X + row * (x_stride.to(tl.int64) * WIDTH) + column, row_mask, column, n_columns
    )
    if Seed is not None:
        position, sequence = token_coordinates(row, row_mask, RowIndex, row_period, BATCH_FIRST)
        words = activation_words(tl.load(Seed), site, position, sequence, first_group + group)
        scale = tl.full([], scale, dtype)
    y_slice0 = Y + row * n_columns + column  # [WIDTH, CELLS]
    for w in tl.static_range(8):
        mask = slice_mask(row_mask, column, w, n_columns)
        x = x_slices[w].to(dtype)
        if Bias is not None:
            x += tl.load(Bias + column + 8 * w, mask=mask, other=0.0).to(dtype)
        y = activate(x, ACTIVATION)
        if Seed is not None:
            y = tl.where(is_kept(words, w, threshold), y, 0.0) * scale
        tl.store(y_slice0 + 8 * w, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_RUNTIME)
def backward_kernel(
    dY,  # [n_rows, columns * WIDTH], rows dy_stride * WIDTH apart
    X,  # [n_rows, columns * WIDTH], rows x_stride * WIDTH apart
    Bias,  # [columns * WIDTH], or None
    dX,  # like X, contiguous
    Seed,  # [1] int64, or None: nothing drops
    RowIndex,  # [n_rows] int32, or None
    n_rows,
    columns,
    dy_stride,
    x_stride,
    skip,
    first_group,
    site,
    threshold,
    scale: tl.float64,
    row_period,
    BATCH_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dx = m * dy * act'(x + b), with the m of forward made again from the seed.

    Tiles, units and what a program owns are those of ``forward_kernel``.
    """
    dtype: tl.constexpr = tl.float64 if dX.dtype.element_ty == tl.float64 else tl.float32
    n_columns = columns * WIDTH
    row, group, column = program_cells(skip, BLOCK_M, BLOCK_G, WIDTH)
    row_mask = row < n_rows
    dy_slices = load_slices(
        dY + row * (dy_stride.to(tl.int64) * WIDTH) + column, row_mask, column, n_columns
    )
    x_slices = load_slices(
        X + row * (x_stride.to(tl.int64) * WIDTH) + column, row_mask, column, n_columns
    )
    if Seed is not None:
        position, sequence = token_coordinates(row, row_mask, RowIndex, row_period, BATCH_FIRST)
        words = activation_words(tl.load(Seed), site, position, sequence, first_group + group)
        scale = tl.full([], scale, dtype)
    dx_slice0 = dX + row * n_columns + column  # [WIDTH, CELLS]
    for w in tl.static_range(8):
        mask = slice_mask(row_mask, column, w, n_columns)
        x = x_slices[w].to(dtype)
        if Bias is not None:
            x += tl.load(Bias + column + 8 * w, mask=mask, other=0.0).to(dtype)
        dx = activation_backward(dy_slices[w].to(dtype), x, ACTIVATION)
        if Seed is not None:
            dx = tl.where(is_kept(words, w, threshold), dx, 0.0) * scale
        tl.store(dx_slice0 + 8 * w, dx.to(dX.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------- launchers


def bias_activation_dropout_forward(
    input: Tensor, bias: Tensor | None, activation: str, dropout: Any
) -> Tensor:
    """dropout(act(input + bias)), contiguous, in the promoted dtype of ``input`` and ``bias``.

    Args:
        input: (..., d_ff). One whose rows are not evenly spaced, or whose columns are not adjacent,
            is copied first.
        bias: (d_ff,) or None.
        activation: a name of :func:`fastattn.kernels.activations.activate`.
        dropout: a :class:`fastattn.ops.dropout.TokenDropout`.
    """
    dtype = input.dtype if bias is None else torch.promote_types(input.dtype, bias.dtype)
    y = input.new_empty(input.shape, dtype=dtype)
    if y.numel() == 0:
        return y
    x, bias = _rows(input), None if bias is None else bias.contiguous()
    grid, arguments = _launch_of((x, bias, _rows(y)), dropout)
    with torch.cuda.device_of(input):
        forward_kernel[grid](
            x,
            bias,
            y,
            x_stride=x.stride(0) // arguments["WIDTH"],
            ACTIVATION=activation,
            **arguments,
        )
    return y


def bias_activation_dropout_backward(
    grad_out: Tensor, input: Tensor, bias: Tensor | None, activation: str, dropout: Any
) -> Tensor:
    """Gradient of ``input``, contiguous, in the dtype of ``grad_out``.

    That of the bias is its sum over rows. Arguments are those of forward.
    """
    dx = grad_out.new_empty(input.shape)
    if dx.numel() == 0:
        return dx
    dy, x, bias = _rows(grad_out), _rows(input), None if bias is None else bias.contiguous()
    grid, arguments = _launch_of((x, bias, dy, _rows(dx)), dropout)
    with torch.cuda.device_of(input):
        backward_kernel[grid](
            dy,
            x,
            bias,
            dx,
            dy_stride=dy.stride(0) // arguments["WIDTH"],
            x_stride=x.stride(0) // arguments["WIDTH"],
            ACTIVATION=activation,
            **arguments,
        )
    return dx


def _rows(x: Tensor) -> Tensor:
    """(rows, columns) with adjacent columns: a view where strides allow it, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch_of(
    tensors: tuple[Tensor | None, ...], dropout: Any
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, and the arguments that both kernels take, from rows, a bias and a result."""
    present = [x for x in tensors if x is not None]
    n_rows, n_columns = present[0].shape
    seed, row_index, offset = None, None, 0
    if dropout.drops:
        seed, offset = dropout.seed, dropout.column_offset
        row_index = None if dropout.row_index is None else dropout.row_index.contiguous()
    width = _width(n_columns, offset, present)
    block, skip = divmod(offset, 64)
    across = triton.cdiv(skip + n_columns, 64) * (SLICES // width)  # cells
    block_m, block_g = _tile(across, width)
    grid = (triton.cdiv(n_rows, block_m), triton.cdiv(across * width, block_g))
    return grid, {
        "Seed": seed,
        "RowIndex": row_index,
        "n_rows": n_rows,
        "columns": n_columns // width,
        "skip": skip // width,
        "first_group": block * SLICES,
        "site": dropout.site,
        "threshold": threshold(dropout.dropout_p),
        "scale": dropout.scale,
        "row_period": max(dropout.row_period, 1),
        "BATCH_FIRST": dropout.batch_first,
        "BLOCK_M": block_m,
        "BLOCK_G": block_g,
        "WIDTH": width,
        "num_warps": NUM_WARPS,
    }


def _width(n_columns: int, offset: int, tensors: list[Tensor]) -> int:
    """Columns of one access: as many as are sure to be aligned in every tensor and row."""
    if any(x.data_ptr() % ACCESS_BYTES for x in tensors):
        return 1
    widest = max(x.element_size() for x in tensors)
    strides = [x.stride(0) for x in tensors if x.dim() == 2]
    return math.gcd(ACCESS_BYTES // widest, n_columns, offset, *strides)


def _tile(across: int, width: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_G) of a program, for ``across`` cells of ``width`` groups in a row.

    Up to 16 cells lie side by side: 1024 columns in 16-bit types. Fewer where 16 do not divide the
    row, so that no thread is without columns.
    """
    side = math.gcd(across, 16) if across <= GRID_LIMIT else CELLS
    return CELLS // side, side * width
