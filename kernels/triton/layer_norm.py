"""Layer norm, alone and behind dropout and a residual sum: forward and backward, deterministic.

Rows stay in registers up to WHOLE_ROW columns; wider ones are read twice. Backward sums the columns
of its rows in as many programs as the device runs at once, and a last kernel sums these partial
rows in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.arguments import TokenDropout, accumulation_dtype, stream_dtype
from fastattn.kernels.column_sums import sum_parts
from fastattn.kernels.device import multiprocessors
from fastattn.kernels.launch import ACCESS_BYTES, contiguous, dropout_arguments, rows_of
from fastattn.kernels.layer_norm_backward import (
    dropout_add_backward_kernel,
    layer_norm_backward_kernel,
    layer_norm_wide_backward_kernel,
)
from fastattn.kernels.layer_norm_forward import (
    dropout_add_forward_kernel,
    layer_norm_forward_kernel,
    layer_norm_wide_forward_kernel,
)
from fastattn.kernels.layer_norm_tiles import Tile

GROUP = 8  # columns that share a call of Philox
WHOLE_ROW = 8192  # columns; wider rows are handled in chunks
WIDE_LANES = 512  # of a chunk of a wide row
REGISTERS, RESIDENT_WARPS = 65536, 64  # of a multiprocessor


def layer_norm_forward(input: Tensor, norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    """LN(input) of (..., N), and mean and 1 / deviation of each row.

    Args:
        input: one whose rows are not evenly spaced, or whose columns are not adjacent, is copied.
        norm: a :class:`fastattn.arguments.NormArguments`.
    """
    out, _, _, mean, rstd = dropout_add_layer_norm_forward(
        input, None, None, norm, TokenDropout(), None, False
    )
    return out, mean, rstd


def dropout_add_layer_norm_forward(
    input: Tensor,
    input_bias: Tensor | None,
    residual: Tensor | None,
    norm: Any,
    dropout: TokenDropout,
    copy_dtype: torch.dtype | None,
    keep_sum: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """LN(sum), the sum, LN(sum) in ``copy_dtype``, and mean and 1 / deviation of each row.

    The sum is residual + dropout(input + input_bias) in the promoted dtype of the two.
    """
    sum_dtype = stream_dtype(input, residual)
    out = input.new_empty(input.shape, dtype=norm.out_dtype)
    total = input.new_empty(input.shape, dtype=sum_dtype) if keep_sum else None
    copy = None if copy_dtype is None else input.new_empty(input.shape, dtype=copy_dtype)
    mean = input.new_empty(input.shape[:-1], dtype=accumulation_dtype(sum_dtype))
    rstd = torch.empty_like(mean)
    if input.numel() == 0:
        return out, total, copy, mean, rstd
    x, added = rows_of(input), rows_of(residual)
    tensors = (x, added, out, total, copy)
    if x.shape[1] > WHOLE_ROW:
        kernel = layer_norm_wide_forward_kernel
        tile, num_warps = _tile_of(x.shape, WIDE_LANES, 1, 1, tensors)
    else:
        kernel = layer_norm_forward_kernel
        tile, num_warps = _tile(x.shape, 5, 4, 4, tensors)
    with torch.cuda.device_of(input):
        kernel[(triton.cdiv(x.shape[0], tile.ROWS),)](
            x,
            added,
            contiguous(input_bias),
            contiguous(norm.weight),
            contiguous(norm.bias),
            total,
            out,
            copy,
            mean,
            rstd,
            **dropout_arguments(dropout),
            n_rows=x.shape[0],
            x_stride=_stride(x, tile),
            residual_stride=_stride(added, tile),
            eps=norm.eps,
            SUM_TYPE=_triton_dtype(sum_dtype),
            TILE=tile,
            num_warps=num_warps,
        )
    return out, total, copy, mean, rstd


def dropout_add_forward(
    input: Tensor, input_bias: Tensor | None, residual: Tensor | None, dropout: TokenDropout
) -> Tensor:
    """residual + dropout(input + input_bias) in the promoted dtype of the two."""
    total = input.new_empty(input.shape, dtype=stream_dtype(input, residual))
    if input.numel() == 0:
        return total
    x, added = rows_of(input), rows_of(residual)
    tile, num_warps = _chunk_tile(x.shape, 4, (x, added, total))
    with torch.cuda.device_of(input):
        dropout_add_forward_kernel[(triton.cdiv(x.shape[0], tile.ROWS), tile.CHUNKS)](
            x,
            added,
            contiguous(input_bias),
            total,
            **dropout_arguments(dropout),
            n_rows=x.shape[0],
            x_stride=_stride(x, tile),
            residual_stride=_stride(added, tile),
            TILE=tile,
            num_warps=num_warps,
        )
    return total


def layer_norm_backward(
    grad_out: Tensor,
    saved: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    norm: Any,
    input_dtype: torch.dtype,
    save: str,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, None where not ``wanted``.

    ``saved`` is the input, or the result where ``save`` is "output", which needs no ``mean``.
    """
    want_input, want_weight, want_bias = wanted
    d_input, _, _, d_weight, d_bias = dropout_add_layer_norm_backward(
        grad_out,
        None,
        None,
        saved,
        mean,
        rstd,
        norm,
        input_dtype,
        input_dtype,
        TokenDropout(),
        save,
        (want_input, False, False, want_weight, want_bias),
    )
    return d_input, d_weight, d_bias


def dropout_add_layer_norm_backward(
    grad_out: Tensor | None,
    grad_sum: Tensor | None,
    grad_copy: Tensor | None,
    saved: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    norm: Any,
    input_dtype: torch.dtype,
    sum_dtype: torch.dtype,
    dropout: TokenDropout,
    save: str,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the sum, the branch, its bias, weight and bias; None where not ``wanted``.

    Those of the result, the sum and the copy may each be None, but not all. ``saved`` is the sum,
    or the result where ``save`` is "output", which needs no ``mean``.
    """
    want_sum, want_branch, want_x_bias, want_weight, want_bias = wanted
    shape, columns = saved.shape, saved.shape[-1:]
    d_sum = saved.new_empty(shape, dtype=sum_dtype) if want_sum else None
    d_branch = saved.new_empty(shape, dtype=input_dtype) if want_branch else None
    d_x_bias = rstd.new_empty(columns) if want_x_bias else None
    d_weight = torch.empty_like(contiguous(norm.weight)) if want_weight else None
    d_bias = torch.empty_like(contiguous(norm.bias)) if want_bias else None
    no_norm = grad_out is None and grad_copy is None
    for sums in (d_weight, d_bias, d_x_bias):
        if sums is not None and (saved.numel() == 0 or (no_norm and sums is not d_x_bias)):
            sums.zero_()
    if saved.numel() == 0:
        pass
    elif no_norm:
        _branch_backward(grad_sum, d_sum, d_branch, d_x_bias, dropout)
    else:
        _norm_backward(
            (grad_out, grad_copy, grad_sum, saved),
            (d_sum, d_branch),
            (d_weight, d_bias, d_x_bias),
            (mean, rstd),
            norm,
            dropout,
            save == "output",
        )
    return d_sum, d_branch, d_x_bias, d_weight, d_bias


def dropout_add_backward(
    grad: Tensor, input_dtype: torch.dtype, dropout: TokenDropout, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the branch and of its bias, None where not ``wanted``."""
    want_input, want_x_bias = wanted
    d_input = grad.new_empty(grad.shape, dtype=input_dtype) if want_input else None
    d_x_bias = None
    if want_x_bias:
        d_x_bias = grad.new_empty(grad.shape[-1:], dtype=accumulation_dtype(grad.dtype))
    if grad.numel():
        _branch_backward(grad, None, d_input, d_x_bias, dropout)
    elif want_x_bias:
        d_x_bias.zero_()
    return d_input, d_x_bias


def _norm_backward(
    tensors: tuple[Tensor | None, ...],
    results: tuple[Tensor | None, ...],
    sums: tuple[Tensor | None, ...],
    statistics: tuple[Tensor | None, Tensor],
    norm: Any,
    dropout: TokenDropout,
    from_output: bool,
) -> None:
    """Launch the backward pass of a norm.

    Args:
        tensors: gradients of the result, its copy and the sum, each or None, and what was saved.
        results: gradients of the sum and the branch, to write; None where not wanted.
        sums: gradients of weight, bias and the branch's bias, to write; None where not wanted.
    """
    rows = [rows_of(x) for x in tensors]
    shape, device = rows[-1].shape, rows[-1].device
    if shape[1] > WHOLE_ROW:
        kernel = layer_norm_wide_backward_kernel
        launch = _tile_of(shape, WIDE_LANES, 1, 1, (*rows, *results))
    else:
        kernel = layer_norm_backward_kernel
        launch = _tile(shape, 3, 4, 2, (*rows, *results))
    tile, num_warps = launch
    registers = _backward_registers(launch, statistics[1].dtype, from_output)
    resident = REGISTERS // (32 * num_warps * registers) * multiprocessors(device)
    programs = min(triton.cdiv(shape[0], tile.ROWS), resident)
    parts = _parts(sums, programs, statistics[1])
    strides = [_stride(x, tile) for x in rows]
    with torch.cuda.device_of(rows[-1]):
        kernel[(programs,)](
            *rows,
            *(contiguous(x) for x in statistics),
            contiguous(norm.weight),
            contiguous(norm.bias) if from_output else None,
            *results,
            *parts,
            **dropout_arguments(dropout),
            n_rows=shape[0],
            d_out_stride=strides[0],
            d_copy_stride=strides[1],
            d_total_stride=strides[2],
            saved_stride=strides[3],
            FROM_OUTPUT=from_output,
            TILE=tile,
            num_warps=num_warps,
            maxnreg=registers,
        )
        sum_parts(parts, sums)


def _backward_registers(launch: tuple[Tile, int], dtype: torch.dtype, from_output: bool) -> int:
    """The most registers of a thread: three programs share a multiprocessor, or two larger ones."""
    tile, num_warps = launch
    is_small = num_warps == 4 and tile.CHUNKS <= 2 and dtype == torch.float32 and not from_output
    return min(168 if is_small else 255, REGISTERS // (32 * num_warps))


def _branch_backward(
    grad: Tensor,
    d_sum: Tensor | None,
    d_branch: Tensor | None,
    d_x_bias: Tensor | None,
    dropout: TokenDropout,
) -> None:
    """Launch the backward pass of a sum that is not normalised."""
    rows = rows_of(grad)
    tile, num_warps = _chunk_tile(rows.shape, 8, (rows, d_sum, d_branch))
    resident = triton.cdiv(RESIDENT_WARPS * multiprocessors(rows.device), num_warps * tile.CHUNKS)
    programs = min(triton.cdiv(rows.shape[0], tile.ROWS), resident)
    parts = _parts((d_x_bias,), programs, d_x_bias)
    with torch.cuda.device_of(rows):
        dropout_add_backward_kernel[(programs, tile.CHUNKS)](
            rows,
            d_sum,
            d_branch,
            *parts,
            **dropout_arguments(dropout),
            n_rows=rows.shape[0],
            d_total_stride=_stride(rows, tile),
            TILE=tile,
            num_warps=num_warps,
        )
        sum_parts(parts, (d_x_bias,))


def _parts(
    sums: Sequence[Tensor | None], programs: int, like: Tensor | None
) -> list[Tensor | None]:
    """One row of each sum for every program, in the dtype of ``like``."""
    return [None if x is None else like.new_empty(programs, x.shape[0]) for x in sums]


# ---------------------------------------------------------------------------- arguments of kernels


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _stride(rows: Tensor | None, tile: Tile) -> int:
    """From row to row, in accesses."""
    return 0 if rows is None else rows.stride(0) // tile.WIDTH


def _tile(
    shape: tuple[int, int],
    chunks: int,
    num_warps: int,
    elements: int,
    tensors: Sequence[Tensor | None],
) -> tuple[Tile, int]:
    """A tile for rows of at most WHOLE_ROW columns, of ``chunks`` chunks at most, and its warps."""
    groups = triton.cdiv(shape[1], GROUP)
    lanes = triton.next_power_of_2(triton.cdiv(groups, chunks))
    lanes = max(lanes, _narrow_lanes(groups))
    rows = max(1, elements // triton.cdiv(groups, lanes))
    return _tile_of(shape, lanes, num_warps, rows, tensors)


def _chunk_tile(
    shape: tuple[int, int], num_warps: int, tensors: Sequence[Tensor | None]
) -> tuple[Tile, int]:
    """A tile for programs that own one chunk of each row."""
    lanes = _narrow_lanes(triton.cdiv(shape[1], GROUP))
    return _tile_of(shape, lanes, num_warps, 1, tensors)


def _narrow_lanes(groups: int) -> int:
    """The lanes of a row in one warp, fewer where the row is narrower."""
    return min(32, triton.next_power_of_2(groups))


def _tile_of(
    shape: tuple[int, int],
    lanes: int,
    num_warps: int,
    rows: int,
    tensors: Sequence[Tensor | None],
) -> tuple[Tile, int]:
    """``num_warps`` warps, or as many as a row takes; a thread owns a part of ``rows`` rows."""
    n_rows, columns = shape
    num_warps = max(num_warps, lanes // 32)
    rows *= 32 * num_warps // lanes
    chunks = triton.cdiv(columns, lanes * GROUP)
    return Tile(columns, chunks, rows, lanes, _width(tensors), n_rows % rows == 0), num_warps


def _width(tensors: Sequence[Tensor | None]) -> int:
    """Columns of one access: as many as are sure to be aligned in every tensor and row."""
    rows = [x.view(-1, x.shape[-1]) if x.is_contiguous() else x for x in tensors if x is not None]
    if any(x.data_ptr() % ACCESS_BYTES for x in rows):
        return 1
    widest = max(x.element_size() for x in rows)
    return math.gcd(ACCESS_BYTES // widest, *(x.stride(0) for x in rows), rows[0].shape[1])
