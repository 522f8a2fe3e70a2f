"""Forward kernels: LN(sum) with sum = residual + dropout(x + x_bias), and the sum alone.

The sum is rounded to its type before it is normalised, whether it is stored or not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.layer_norm_tiles import (
    Rows,
    block_rows,
    chunk_columns,
    dropout_multiplier,
    dropout_of,
    load_rows,
    load_vector,
    narrow,
    own_sum,
    own_zeros,
    row_dropout,
    row_sum,
    store_tile,
    widen,
)

#: Integers of which no value deserves a kernel of its own.
RUNTIME = ["n_rows", "x_stride", "residual_stride", "site", "threshold", "row_period"]


@triton.jit
def rounded_sum(
    x,
    residual,
    XBias,
    dropout,
    chunk,
    column,
    columns,
    SUM_TYPE: tl.constexpr,
    dtype: tl.constexpr,
    TILE: tl.constexpr,
):
    """residual + dropout(x + x_bias) in its type. What drops is multiplied by zero, as in torch."""
    total = widen(x, dtype)
    if XBias is not None:
        total += load_vector(XBias, column, columns, 0.0, dtype, TILE)
    if dropout is not None:
        total *= dropout_multiplier(dropout, chunk, TILE)
    if residual is not None:
        total += widen(residual, dtype)
    return narrow(total, SUM_TYPE)


@triton.jit
def affine(xhat, Weight, Bias, column, columns, dtype: tl.constexpr, TILE: tl.constexpr):
    """weight * xhat + bias"""
    if Weight is not None:
        xhat *= load_vector(Weight, column, columns, 0.0, dtype, TILE)
    if Bias is not None:
        xhat += load_vector(Bias, column, columns, 0.0, dtype, TILE)
    return xhat


@triton.jit(do_not_specialize=RUNTIME)
def layer_norm_forward_kernel(
    X,  # [n_rows, COLUMNS], rows x_stride * WIDTH apart
    Residual,  # [n_rows, COLUMNS], rows residual_stride * WIDTH apart, or None
    XBias,  # [COLUMNS], or None
    Weight,  # [COLUMNS], or None
    Bias,  # [COLUMNS], or None
    Sum,  # [n_rows, COLUMNS], or None: not stored
    Out,  # [n_rows, COLUMNS]
    Copy,  # [n_rows, COLUMNS], the result in another type, or None
    Mean,  # [n_rows]
    Rstd,  # [n_rows]
    Seed,  # [1] int64, or None: nothing drops
    RowIndex,  # [n_rows] int32, or None
    n_rows,
    x_stride,
    residual_stride,
    eps: tl.float64,
    site,
    threshold,
    scale: tl.float64,
    row_period,
    BATCH_FIRST: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """y = (sum - mean) * rstd * weight + bias, with rstd = 1 / sqrt(mean((sum - mean)^2) + eps).

    A program owns TILE.ROWS whole rows, which stay in registers from the first load on.
    """
    dtype: tl.constexpr = Mean.dtype.element_ty
    CHUNKS: tl.constexpr = TILE.CHUNKS
    row, row_mask = block_rows(tl.program_id(0), n_rows, TILE)
    x_rows, residual_rows = Rows(X, x_stride), Rows(Residual, residual_stride)
    x_tiles, residual_tiles = (), ()
    for c in tl.static_range(CHUNKS):
        column, columns = chunk_columns(c, c == CHUNKS - 1, TILE)
        x_tiles += (load_rows(x_rows, row, column, row_mask & columns, TILE),)
        if Residual is not None:
            residual_tiles += (load_rows(residual_rows, row, column, row_mask & columns, TILE),)
    dropout = None
    if Seed is not None:
        dropout = dropout_of(Seed, site, threshold, scale, row_period, dtype)
        dropout = row_dropout(dropout, RowIndex, row, row_mask, BATCH_FIRST)

    sums = ()
    total = own_zeros(dtype, TILE)
    for c in tl.static_range(CHUNKS):
        column, columns = chunk_columns(c, c == CHUNKS - 1, TILE)
        residual = None if Residual is None else residual_tiles[c]
        rounded = rounded_sum(
            x_tiles[c], residual, XBias, dropout, c, column, columns, SUM_TYPE, dtype, TILE
        )
        if Sum is not None:
            tl.store(Sum + row * TILE.COLUMNS + column, rounded, mask=row_mask & columns)
        sums += (widen(rounded, dtype),)
        total += own_sum(sums[c])
    mean = row_sum(total) / TILE.COLUMNS

    squares = own_zeros(dtype, TILE)
    for c in tl.static_range(CHUNKS):
        _, columns = chunk_columns(c, c == CHUNKS - 1, TILE)
        centred = tl.where(columns, sums[c] - mean, 0.0)
        squares += own_sum(centred * centred)
    rstd = tl.rsqrt(row_sum(squares) / TILE.COLUMNS + tl.full([], eps, dtype))
    tl.store(Mean + row, mean, mask=row_mask)
    tl.store(Rstd + row, rstd, mask=row_mask)

    for c in tl.static_range(CHUNKS):
        column, columns = chunk_columns(c, c == CHUNKS - 1, TILE)
        y = affine((sums[c] - mean) * rstd, Weight, Bias, column, columns, dtype, TILE)
        store_tile(Out, y, row, column, row_mask & columns, TILE)
        store_tile(Copy, y, row, column, row_mask & columns, TILE)


@triton.jit(do_not_specialize=RUNTIME)
def layer_norm_wide_forward_kernel(
    X,
    Residual,
    XBias,
    Weight,
    Bias,
    Sum,
    Out,
    Copy,
    Mean,
    Rstd,
    Seed,
    RowIndex,
    n_rows,
    x_stride,
    residual_stride,
    eps: tl.float64,
    site,
    threshold,
    scale: tl.float64,
    row_period,
    BATCH_FIRST: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """LN of rows that no register file holds: one row a program, chunk by chunk.

    The first pass combines the mean and the squares of chunks as Chan, Golub and LeVeque do
    (COMPSTAT 1982); the second makes the sum again.
    """
    dtype: tl.constexpr = Mean.dtype.element_ty
    row, row_mask = block_rows(tl.program_id(0), n_rows, TILE)
    x_rows, residual_rows = Rows(X, x_stride), Rows(Residual, residual_stride)
    dropout = None
    if Seed is not None:
        dropout = dropout_of(Seed, site, threshold, scale, row_period, dtype)
        dropout = row_dropout(dropout, RowIndex, row, row_mask, BATCH_FIRST)
    mean = tl.zeros([1, 1, 1, 1], dtype)
    squares = tl.zeros([1, 1, 1, 1], dtype)
    for c in range(TILE.CHUNKS):
        column, columns = chunk_columns(c, True, TILE)
        residual = None
        if Residual is not None:
            residual = load_rows(residual_rows, row, column, columns, TILE)
        x = load_rows(x_rows, row, column, columns, TILE)
        rounded = rounded_sum(
            x, residual, XBias, dropout, c, column, columns, SUM_TYPE, dtype, TILE
        )
        if Sum is not None:
            tl.store(Sum + row * TILE.COLUMNS + column, rounded, mask=columns)
        total = widen(rounded, dtype)
        seen = c * TILE.LANES * 8
        count = tl.minimum(TILE.COLUMNS - seen, TILE.LANES * 8).to(dtype)
        chunk_mean = row_sum(own_sum(total)) / count
        centred = tl.where(columns, total - chunk_mean, 0.0)
        apart = chunk_mean - mean
        share = count / (seen + count)
        squares += row_sum(own_sum(centred * centred)) + apart * apart * (seen * share)
        mean += apart * share
    rstd = tl.rsqrt(squares / TILE.COLUMNS + tl.full([], eps, dtype))
    tl.store(Mean + row, mean)
    tl.store(Rstd + row, rstd)

    for c in range(TILE.CHUNKS):
        column, columns = chunk_columns(c, True, TILE)
        residual = None
        if Residual is not None:
            residual = load_rows(residual_rows, row, column, columns, TILE)
        x = load_rows(x_rows, row, column, columns, TILE)
        rounded = rounded_sum(
            x, residual, XBias, dropout, c, column, columns, SUM_TYPE, dtype, TILE
        )
        xhat = (widen(rounded, dtype) - mean) * rstd
        y = affine(xhat, Weight, Bias, column, columns, dtype, TILE)
        store_tile(Out, y, row, column, columns, TILE)
        store_tile(Copy, y, row, column, columns, TILE)


@triton.jit(do_not_specialize=RUNTIME)
def dropout_add_forward_kernel(
    X,  # [n_rows, COLUMNS], rows x_stride * WIDTH apart
    Residual,  # [n_rows, COLUMNS], rows residual_stride * WIDTH apart, or None
    XBias,  # [COLUMNS], or None
    Sum,  # [n_rows, COLUMNS]
    Seed,  # [1] int64, or None: nothing drops
    RowIndex,  # [n_rows] int32, or None
    n_rows,
    x_stride,
    residual_stride,
    site,
    threshold,
    scale: tl.float64,
    row_period,
    BATCH_FIRST: tl.constexpr,
    TILE: tl.constexpr,
):
    """sum = residual + dropout(x + x_bias). A program owns one chunk of TILE.ROWS rows."""
    sum_type: tl.constexpr = Sum.dtype.element_ty
    dtype: tl.constexpr = tl.float64 if sum_type == tl.float64 else tl.float32
    chunk = tl.program_id(1)
    row, row_mask = block_rows(tl.program_id(0), n_rows, TILE)
    column, columns = chunk_columns(chunk, True, TILE)
    mask = row_mask & columns
    x = load_rows(Rows(X, x_stride), row, column, mask, TILE)
    residual = None
    if Residual is not None:
        residual = load_rows(Rows(Residual, residual_stride), row, column, mask, TILE)
    dropout = None
    if Seed is not None:
        dropout = dropout_of(Seed, site, threshold, scale, row_period, dtype)
        dropout = row_dropout(dropout, RowIndex, row, row_mask, BATCH_FIRST)
    rounded = rounded_sum(
        x, residual, XBias, dropout, chunk, column, columns, sum_type, dtype, TILE
    )
    tl.store(Sum + row * TILE.COLUMNS + column, rounded, mask=mask)
