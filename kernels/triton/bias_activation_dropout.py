"""dropout(act(x + bias)) and its backward, each in one pass over memory.

Backward makes the dropout decisions again, and on request the activation too, which the gradient of
a weight needs; or it starts from the result of relu, which is zero where a decision or relu itself
stopped an element, and needs no decisions. It sums the columns of dx on the way, for the bias.

The dropout contract decides the columns n, n + 8, ..., n + 56 of a block of 64 by one call of
Philox. So a thread owns a *cell*: WIDTH adjacent columns in each of the eight *slices* of a row's
block, where slice w lies 8 w columns to the right of slice 0. It makes WIDTH calls for 8 WIDTH
elements, and every access is one vector of WIDTH elements, 16 bytes where strides allow.

Tiles are [WIDTH, CELLS], one cell a thread: that is both how the compiler lays a tile out by
default and how it wants to access memory, so nothing travels between threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.arguments import TokenDropout
from fastattn.kernels.activations import activate, activation_backward
from fastattn.kernels.column_sums import sum_parts
from fastattn.kernels.device import capability, multiprocessors
from fastattn.kernels.dropout import activation_words, is_kept, token_coordinates
from fastattn.kernels.launch import ACCESS_BYTES, contiguous, decides, dropout_arguments, rows_of

SLICES = 8  # of a block of 64 columns
FORWARD_WARPS, BACKWARD_WARPS = 8, 4  # of a program
FORWARD_WIDTH, BACKWARD_WIDTH = 8, 4  # columns of an access, at most
REGISTERS = 65536  # of a multiprocessor
GRID_LIMIT = 65535  # programs along dimension 1 of a CUDA grid

#: Integers of which no value deserves a kernel of its own.
_RUNTIME = [
    "n_rows",
    "columns",
    "x_stride",
    "dy_stride",
    "saved_stride",
    "skip",
    "first_group",
    "site",
    "threshold",
    "row_period",
]


# ---------------------------------------------------------------------------------------- tiles


@triton.jit
def block_cells(block, skip, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, WIDTH: tl.constexpr):
    """Row [1, CELLS], groups and columns of slice 0 [WIDTH, CELLS] of a block of rows' cells.

    Columns count from the first one in memory, which is ``skip`` * WIDTH into its block of 64.
    """
    ACROSS: tl.constexpr = BLOCK_G // WIDTH
    cell = tl.arange(0, BLOCK_M * ACROSS)[None, :]
    row = tl.cast(block, tl.int64) * BLOCK_M + cell // ACROSS
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
def bias_activation_dropout_forward_kernel(
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
    row, group, column = block_cells(tl.program_id(0), skip, BLOCK_M, BLOCK_G, WIDTH)
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
def bias_activation_dropout_backward_kernel(
    dY,  # [n_rows, columns * WIDTH], rows dy_stride * WIDTH apart
    Saved,  # the same, rows saved_stride * WIDTH apart: x, or y if FROM_OUTPUT
    Bias,  # [columns * WIDTH], or None
    dX,  # like Saved, contiguous; may be dY
    Y,  # like Saved, contiguous: act(x + b) dropped again, or None; may be Saved
    dBiasParts,  # [programs, columns * WIDTH]
    Seed,  # [1] int64, or None: nothing drops
    RowIndex,  # [n_rows] int32, or None
    n_rows,
    columns,
    dy_stride,
    saved_stride,
    skip,
    first_group,
    site,
    threshold,
    scale: tl.float64,
    row_period,
    BATCH_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dx = m * dy * act'(x + b), with the m of forward made again, and a part of its column sums.

    From the output of relu it is scale * dy where y is not zero. Tiles and units are those of
    ``bias_activation_dropout_forward_kernel``, but a program goes through the rows in steps, for
    few parts of a sum.
    """
    tl.static_assert(not FROM_OUTPUT or (ACTIVATION == "relu" and Seed is None and Y is None))
    dtype: tl.constexpr = tl.float64 if dX.dtype.element_ty == tl.float64 else tl.float32
    ACROSS: tl.constexpr = BLOCK_G // WIDTH
    n_columns = columns * WIDTH
    scale = tl.full([], scale, dtype)
    d_bias = ()
    for _ in tl.static_range(8):
        d_bias += (tl.zeros([WIDTH, BLOCK_M * ACROSS], dtype),)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        row, group, column = block_cells(block, skip, BLOCK_M, BLOCK_G, WIDTH)
        row_mask = row < n_rows
        dy_slice0 = dY + row * (dy_stride.to(tl.int64) * WIDTH) + column
        dy_slices = load_slices(dy_slice0, row_mask, column, n_columns)
        saved_slice0 = Saved + row * (saved_stride.to(tl.int64) * WIDTH) + column
        saved_slices = load_slices(saved_slice0, row_mask, column, n_columns)
        if Seed is not None:
            position, sequence = token_coordinates(row, row_mask, RowIndex, row_period, BATCH_FIRST)
            words = activation_words(tl.load(Seed), site, position, sequence, first_group + group)
        place = row * n_columns + column  # [WIDTH, CELLS]
        sums = ()
        for w in tl.static_range(8):
            mask = slice_mask(row_mask, column, w, n_columns)
            saved = saved_slices[w].to(dtype)
            dx = dy_slices[w].to(dtype)
            if FROM_OUTPUT:
                dx = tl.where(saved == 0.0, 0.0, dx) * scale
            else:
                x = saved
                if Bias is not None:
                    x += tl.load(Bias + column + 8 * w, mask=mask, other=0.0).to(dtype)
                dx = activation_backward(dx, x, ACTIVATION)
                if Seed is not None:
                    dx = tl.where(is_kept(words, w, threshold), dx, 0.0) * scale
                if Y is not None:
                    y = activate(x, ACTIVATION)
                    if Seed is not None:
                        y = tl.where(is_kept(words, w, threshold), y, 0.0) * scale
                    tl.store(Y + place + 8 * w, y.to(Y.dtype.element_ty), mask=mask)
            tl.store(dX + place + 8 * w, dx.to(dX.dtype.element_ty), mask=mask)
            sums += (d_bias[w] + dx,)
        d_bias = sums
    program = tl.program_id(0)
    _, _, column = block_cells(program, skip, 1, BLOCK_G, WIDTH)  # [WIDTH, ACROSS]
    for w in tl.static_range(8):
        part = tl.sum(tl.reshape(d_bias[w], [WIDTH, BLOCK_M, ACROSS]), 1)
        place = program.to(tl.int64) * n_columns + column + 8 * w
        tl.store(dBiasParts + place, part, mask=slice_mask(True, column, w, n_columns))


# ------------------------------------------------------------------------------------- launchers


def bias_activation_dropout_forward(
    input: Tensor,
    bias: Tensor | None,
    activation: str,
    dropout: TokenDropout,
    out: Tensor | None = None,
) -> Tensor:
    """dropout(act(input + bias)), contiguous, in the promoted dtype of ``input`` and ``bias``.

    Args:
        input: (..., d_ff). One whose rows are not evenly spaced, or whose columns are not adjacent,
            is copied first.
        bias: (d_ff,) or None.
        activation: a name of :func:`fastattn.kernels.activations.activate`.
        out: contiguous, to write to; it may be ``input``.
    """
    if out is None:
        dtype = input.dtype if bias is None else torch.promote_types(input.dtype, bias.dtype)
        out = input.new_empty(input.shape, dtype=dtype)
    if out.numel() == 0:
        return out
    x, bias = rows_of(input), contiguous(bias)
    launch = _Launch((x, bias, rows_of(out)), dropout, FORWARD_WARPS, FORWARD_WIDTH)
    with torch.cuda.device_of(input):
        bias_activation_dropout_forward_kernel[launch.grid](
            x,
            bias,
            out,
            x_stride=x.stride(0) // launch.width,
            ACTIVATION=activation,
            **launch.arguments,
        )
    return out


def bias_activation_dropout_backward(
    grad_out: Tensor,
    saved: Tensor,
    bias: Tensor | None,
    activation: str,
    dropout: TokenDropout,
    want_bias: bool,
    *,
    from_output: bool = False,
    out: Tensor | None = None,
    activated: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``input``, contiguous, in the dtype of ``grad_out``, of ``bias`` in >= fp32.

    Args:
        grad_out: like the result of forward.
        saved: the input of forward, or its result if ``from_output``, which is for relu.
        want_bias: whether to sum the columns; None is returned if not.
        out: contiguous, to write the first gradient to; it may be ``grad_out``.
        activated: contiguous, to write the result of forward to; it may be ``saved``.
    """
    dx = grad_out.new_empty(saved.shape) if out is None else out
    wide = torch.promote_types(grad_out.dtype, torch.float32)
    d_bias = dx.new_empty(dx.shape[-1:], dtype=wide) if want_bias else None
    if dx.numel() == 0:
        return dx, None if d_bias is None else d_bias.zero_()
    dy, rows, bias = rows_of(grad_out), rows_of(saved), contiguous(bias)
    results = [rows_of(x) for x in (dx, activated)]
    used = TokenDropout(dropout.dropout_p) if from_output else dropout
    launch = _Launch((dy, rows, bias, *results), used, BACKWARD_WARPS, BACKWARD_WIDTH)
    registers = _backward_registers(wide, dx.device)
    programs = launch.resident_programs(registers)
    parts = dx.new_empty(programs, dx.shape[-1], dtype=wide)
    with torch.cuda.device_of(saved):
        bias_activation_dropout_backward_kernel[(programs, launch.grid[1])](
            dy,
            rows,
            bias,
            dx,
            activated,
            parts,
            dy_stride=dy.stride(0) // launch.width,
            saved_stride=rows.stride(0) // launch.width,
            ACTIVATION=activation,
            FROM_OUTPUT=from_output,
            maxnreg=registers,
            **launch.arguments,
        )
        if want_bias:
            sum_parts((parts,), (d_bias,))
    return dx, d_bias


def _backward_registers(dtype: torch.dtype, device: torch.device) -> int:
    """The most registers of a thread: three programs share a multiprocessor.

    Two where doubles, or the packed arithmetic of compute capability 10, take more.
    """
    return 255 if dtype == torch.float64 or capability(device)[0] >= 10 else 168


class _Launch:
    """The grid, and the arguments that both kernels take, from rows, a bias and results."""

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        dropout: TokenDropout,
        num_warps: int,
        most_columns: int,
    ) -> None:
        present = [x for x in tensors if x is not None]
        n_rows, n_columns = present[0].shape
        offset = dropout.column_offset if decides(dropout) else 0
        width = math.gcd(most_columns, _width(n_columns, offset, present))
        block, skip = divmod(offset, 64)
        across = triton.cdiv(skip + n_columns, 64) * (SLICES // width)  # cells
        block_m, block_g = _tile(across, width, 32 * num_warps)
        self.grid = (triton.cdiv(n_rows, block_m), triton.cdiv(across * width, block_g))
        self.width, self.device = width, present[0].device
        self.arguments = {
            **dropout_arguments(dropout),
            "n_rows": n_rows,
            "columns": n_columns // width,
            "skip": skip // width,
            "first_group": block * SLICES,
            "BLOCK_M": block_m,
            "BLOCK_G": block_g,
            "WIDTH": width,
            "num_warps": num_warps,
        }

    def resident_programs(self, registers: int) -> int:
        """Programs along the rows, where all of a grid are to run at the same time."""
        threads = 32 * self.arguments["num_warps"]
        resident = REGISTERS // (threads * registers) * multiprocessors(self.device)
        return min(self.grid[0], triton.cdiv(resident, self.grid[1]))


def _width(n_columns: int, offset: int, tensors: list[Tensor]) -> int:
    """Columns of one access: as many as are sure to be aligned in every tensor and row."""
    if any(x.data_ptr() % ACCESS_BYTES for x in tensors):
        return 1
    widest = max(x.element_size() for x in tensors)
    strides = [x.stride(0) for x in tensors if x.dim() == 2]
    return math.gcd(ACCESS_BYTES // widest, n_columns, offset, *strides)


def _tile(across: int, width: int, cells: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_G) of ``cells`` cells, for ``across`` cells of ``width`` groups in a row.

    Up to 16 cells lie side by side: 1024 columns in 16-bit types. Fewer where 16 do not divide the
    row, so that no thread is without columns.
    """
    side = math.gcd(across, 16) if across <= GRID_LIMIT else cells
    return cells // side, side * width
