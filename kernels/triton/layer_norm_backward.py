"""Backward kernels of layer norm, and of the branch that dropped before it."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.layer_norm_tiles import (
    block_rows,
    chunk_columns,
    dropout_multiplier,
    load_vector,
    narrow,
    own_sum,
    own_zeros,
    row_dropout,
    row_pointers,
    row_sums,
    widen,
    zeros,
)

#: Integers of which no value deserves a kernel of its own.
RUNTIME = [
    "n_rows",
    "d_out_stride",
    "d_copy_stride",
    "d_total_stride",
    "saved_stride",
    "site",
    "threshold",
    "row_period",
]


@triton.jit
def load_rows(Rows, row, stride, column, mask, TILE: tl.constexpr):
    return tl.load(row_pointers(Rows, row, stride, TILE) + column, mask=mask, other=0.0)


@triton.jit
def load_gradient(
    dOut, dCopy, row, d_out_stride, d_copy_stride, column, mask, dtype: tl.constexpr, TILE
):
    """What flows into the result and its copy together; one of the two may be absent."""
    if dOut is None:
        return widen(load_rows(dCopy, row, d_copy_stride, column, mask, TILE), dtype)
    else:
        gradient = widen(load_rows(dOut, row, d_out_stride, column, mask, TILE), dtype)
        if dCopy is not None:
            gradient += widen(load_rows(dCopy, row, d_copy_stride, column, mask, TILE), dtype)
        return gradient


@triton.jit
def affine_tiles(
    Weight, Bias, column, columns, FROM_OUTPUT: tl.constexpr, dtype: tl.constexpr, TILE
):
    """weight, 1 / weight and bias of a chunk; only the way back from the result needs the others.

    What is absent is a constant, which costs nothing.
    """
    one = zeros(dtype, TILE) + 1.0
    weight, inverse, bias = one, one, zeros(dtype, TILE)
    if Weight is not None:
        weight = load_vector(Weight, column, columns, 1.0, dtype, TILE)
        if FROM_OUTPUT:
            inverse = 1.0 / weight
    if FROM_OUTPUT and Bias is not None:
        bias = load_vector(Bias, column, columns, 0.0, dtype, TILE)
    return weight, inverse, bias


@triton.jit
def normalised(saved, mean, rstd, affine, FROM_OUTPUT: tl.constexpr, dtype: tl.constexpr):
    """xhat, from the sum or from the result."""
    if FROM_OUTPUT:
        return (widen(saved, dtype) - affine[2]) * affine[1]
    else:
        return (widen(saved, dtype) - mean) * rstd


@triton.jit
def input_gradient(weighted, xhat, rstd, common, slope, TILE: tl.constexpr):
    """rstd * (g_w - mean(g_w) - xhat * mean(g_w * xhat)), with rstd in the two means already."""
    d_sum = rstd * weighted - (common + slope * xhat)
    if TILE.COLUMNS == 1:
        d_sum *= 0.0  # what is left of a cancellation that a fused multiply-add rounds once
    return d_sum


@triton.jit
def sum_rows(tile):
    """The sum of the rows of a tile, as one row [SLICES, WIDTH, 1, LANES]."""
    return tl.sum(tile, 2, keep_dims=True)


@triton.jit(do_not_specialize=RUNTIME)
def layer_norm_backward_kernel(
    dOut,  # [n_rows, COLUMNS], rows d_out_stride * WIDTH apart, or None
    dCopy,  # [n_rows, COLUMNS], rows d_copy_stride * WIDTH apart, or None; one of the two is there
    dTotal,  # [n_rows, COLUMNS], rows d_total_stride * WIDTH apart, or None
    Saved,  # [n_rows, COLUMNS], rows saved_stride * WIDTH apart: the sum or the result
    Mean,  # [n_rows]
    Rstd,  # [n_rows]
    Weight,  # [COLUMNS], or None
    Bias,  # [COLUMNS], or None; read with the result alone
    dSum,  # [n_rows, COLUMNS], or None: not wanted
    dBranch,  # [n_rows, COLUMNS], or None: not wanted
    dWeightParts,  # [programs, COLUMNS], or None: not wanted
    dBiasParts,  # [programs, COLUMNS], or None: not wanted
    dXBiasParts,  # [programs, COLUMNS], or None: not wanted
    Seed,  # [1] int64, or None: nothing drops
    RowIndex,  # [n_rows] int32, or None
    n_rows,
    d_out_stride,
    d_copy_stride,
    d_total_stride,
    saved_stride,
    site,
    threshold,
    scale: tl.float64,
    row_period,
    BATCH_FIRST: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    TILE: tl.constexpr,
):
    """With g = d_out + d_copy, xhat = (sum - mean) * rstd and g_w = weight * g:

    d_sum = rstd * (g_w - mean(g_w) - xhat * mean(g_w * xhat)) + d_total
    d_branch = dropout(d_sum), d_weight = sum(g * xhat), d_bias = sum(g), d_x_bias = sum(d_branch)

    A program owns every so many blocks of TILE.ROWS whole rows. It sums their columns in registers,
    and writes these sums as one row of the parts.
    """
    dtype: tl.constexpr = Rstd.dtype.element_ty
    CHUNKS: tl.constexpr = TILE.CHUNKS
    d_weights, d_biases, d_x_biases = (), (), ()
    # A thread has too few registers to keep parameters in, where lanes are many or types wide; with
    # two stages the next rows are under way, to shared memory that must have room for them.
    in_registers: tl.constexpr = TILE.LANES < 512 and dtype == tl.float32
    stages: tl.constexpr = 2 if in_registers else 1
    affines = ()
    for c in tl.static_range(CHUNKS):
        d_weights += (zeros(dtype, TILE),)
        d_biases += (zeros(dtype, TILE),)
        d_x_biases += (zeros(dtype, TILE),)
        if in_registers:
            column, columns = chunk_columns(c, c == CHUNKS - 1, TILE)
            affines += (affine_tiles(Weight, Bias, column, columns, FROM_OUTPUT, dtype, TILE),)

    seed = None
    if Seed is not None:
        seed = tl.load(Seed)
    blocks = tl.cdiv(n_rows, TILE.ROWS)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=stages):
        row, row_mask = block_rows(block, n_rows, TILE)
        gradients, saved_tiles, totals = (), (), ()
        for c in tl.static_range(CHUNKS):
            column, columns = chunk_columns(c, c == CHUNKS - 1, TILE)
            mask = row_mask & columns
            saved_tiles += (load_rows(Saved, row, saved_stride, column, mask, TILE),)
            gradient = load_gradient(
                dOut, dCopy, row, d_out_stride, d_copy_stride, column, mask, dtype, TILE
            )
            gradients += (gradient,)
            if dTotal is not None:
                totals += (load_rows(dTotal, row, d_total_stride, column, mask, TILE),)
        mean = 0.0
        if not FROM_OUTPUT:
            mean = tl.load(Mean + row, mask=row_mask, other=0.0)
        rstd = tl.load(Rstd + row, mask=row_mask, other=0.0)
        dropout = None
        if Seed is not None:
            dropout = row_dropout(
                seed,
                RowIndex,
                row,
                row_mask,
                site,
                threshold,
                scale,
                row_period,
                BATCH_FIRST,
                dtype,
            )

        xhats = ()
        weighted_sum, projected_sum = own_zeros(dtype, TILE), own_zeros(dtype, TILE)
        for c in tl.static_range(CHUNKS):
            column, columns = chunk_columns(c, c == CHUNKS - 1, TILE)
            if in_registers:
                affine = affines[c]
            else:
                affine = affine_tiles(Weight, Bias, column, columns, FROM_OUTPUT, dtype, TILE)
            xhats += (normalised(saved_tiles[c], mean, rstd, affine, FROM_OUTPUT, dtype),)
            weighted = gradients[c] * affine[0]
            weighted_sum += own_sum(weighted)
            projected_sum += own_sum(weighted * xhats[c])
        weighted_sum, projected_sum = row_sums(weighted_sum, projected_sum)
        common = rstd * (weighted_sum / TILE.COLUMNS)
        slope = rstd * (projected_sum / TILE.COLUMNS)

        new_d_weights, new_d_biases, new_d_x_biases = (), (), ()
        for c in tl.static_range(CHUNKS):
            column, columns = chunk_columns(c, c == CHUNKS - 1, TILE)
            if in_registers:
                affine = affines[c]
            else:
                affine = affine_tiles(Weight, Bias, column, columns, False, dtype, TILE)
            d_sum = input_gradient(gradients[c] * affine[0], xhats[c], rstd, common, slope, TILE)
            if dTotal is not None:
                d_sum += widen(totals[c], dtype)
            d_branch = d_sum
            if dropout is not None:
                d_branch *= dropout_multiplier(dropout, c, TILE)
            place = row * TILE.COLUMNS + column
            if dSum is not None:
                d_sum = narrow(d_sum, dSum.dtype.element_ty)
                tl.store(dSum + place, d_sum, mask=row_mask & columns)
            if dBranch is not None:
                narrowed = narrow(d_branch, dBranch.dtype.element_ty)
                tl.store(dBranch + place, narrowed, mask=row_mask & columns)
            new_d_weights += (d_weights[c] + gradients[c] * xhats[c],)
            new_d_biases += (d_biases[c] + gradients[c],)
            new_d_x_biases += (d_x_biases[c] + d_branch,)
        d_weights, d_biases, d_x_biases = new_d_weights, new_d_biases, new_d_x_biases

    for c in tl.static_range(CHUNKS):
        column, columns = chunk_columns(c, c == CHUNKS - 1, TILE)
        place = tl.program_id(0).to(tl.int64) * TILE.COLUMNS + column
        if dWeightParts is not None:
            tl.store(dWeightParts + place, sum_rows(d_weights[c]), mask=columns)
        if dBiasParts is not None:
            tl.store(dBiasParts + place, sum_rows(d_biases[c]), mask=columns)
        if dXBiasParts is not None:
            tl.store(dXBiasParts + place, sum_rows(d_x_biases[c]), mask=columns)


@triton.jit
def add_to_part(Parts, value, place, columns, is_first):
    """Add to a part in memory, which the first row of a program begins."""
    before = tl.load(Parts + place, mask=columns & ~is_first, other=0.0)
    tl.store(Parts + place, before + value, mask=columns)


@triton.jit(do_not_specialize=RUNTIME)
def layer_norm_wide_backward_kernel(
    dOut,
    dCopy,
    dTotal,
    Saved,
    Mean,
    Rstd,
    Weight,
    Bias,
    dSum,
    dBranch,
    dWeightParts,
    dBiasParts,
    dXBiasParts,
    Seed,
    RowIndex,
    n_rows,
    d_out_stride,
    d_copy_stride,
    d_total_stride,
    saved_stride,
    site,
    threshold,
    scale: tl.float64,
    row_period,
    BATCH_FIRST: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The gradients of rows that no register file holds: one row at a time, in chunks.

    Each row is read twice, and the sums of columns lie in the program's own row of the parts.
    """
    dtype: tl.constexpr = Rstd.dtype.element_ty
    seed = None
    if Seed is not None:
        seed = tl.load(Seed)
    for block in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row, row_mask = block_rows(block, n_rows, TILE)
        mean = 0.0
        if not FROM_OUTPUT:
            mean = tl.load(Mean + row)
        rstd = tl.load(Rstd + row)
        dropout = None
        if Seed is not None:
            dropout = row_dropout(
                seed,
                RowIndex,
                row,
                row_mask,
                site,
                threshold,
                scale,
                row_period,
                BATCH_FIRST,
                dtype,
            )
        weighted_sum, projected_sum = own_zeros(dtype, TILE), own_zeros(dtype, TILE)
        for c in range(TILE.CHUNKS):
            column, columns = chunk_columns(c, True, TILE)
            gradient = load_gradient(
                dOut, dCopy, row, d_out_stride, d_copy_stride, column, columns, dtype, TILE
            )
            saved = load_rows(Saved, row, saved_stride, column, columns, TILE)
            affine = affine_tiles(Weight, Bias, column, columns, FROM_OUTPUT, dtype, TILE)
            xhat = normalised(saved, mean, rstd, affine, FROM_OUTPUT, dtype)
            weighted = gradient * affine[0]
            weighted_sum += own_sum(weighted)
            projected_sum += own_sum(weighted * xhat)
        weighted_sum, projected_sum = row_sums(weighted_sum, projected_sum)
        common = rstd * (weighted_sum / TILE.COLUMNS)
        slope = rstd * (projected_sum / TILE.COLUMNS)

        for c in range(TILE.CHUNKS):
            column, columns = chunk_columns(c, True, TILE)
            gradient = load_gradient(
                dOut, dCopy, row, d_out_stride, d_copy_stride, column, columns, dtype, TILE
            )
            saved = load_rows(Saved, row, saved_stride, column, columns, TILE)
            affine = affine_tiles(Weight, Bias, column, columns, FROM_OUTPUT, dtype, TILE)
            xhat = normalised(saved, mean, rstd, affine, FROM_OUTPUT, dtype)
            weighted = gradient * affine[0]
            d_sum = input_gradient(weighted, xhat, rstd, common, slope, TILE)
            if dTotal is not None:
                d_sum += widen(load_rows(dTotal, row, d_total_stride, column, columns, TILE), dtype)
            d_branch = d_sum
            if dropout is not None:
                d_branch *= dropout_multiplier(dropout, c, TILE)
            place = row * TILE.COLUMNS + column
            if dSum is not None:
                tl.store(dSum + place, narrow(d_sum, dSum.dtype.element_ty), mask=columns)
            if dBranch is not None:
                tl.store(dBranch + place, narrow(d_branch, dBranch.dtype.element_ty), mask=columns)
            part = tl.program_id(0).to(tl.int64) * TILE.COLUMNS + column
            is_first = block == tl.program_id(0)
            if dWeightParts is not None:
                add_to_part(dWeightParts, gradient * xhat, part, columns, is_first)
            if dBiasParts is not None:
                add_to_part(dBiasParts, gradient, part, columns, is_first)
            if dXBiasParts is not None:
                add_to_part(dXBiasParts, d_branch, part, columns, is_first)
        tl.debug_barrier()  # what one thread wrote to the parts, another may read


@triton.jit(do_not_specialize=RUNTIME)
def dropout_add_backward_kernel(
    dTotal,  # [n_rows, COLUMNS], rows d_total_stride * WIDTH apart
    dSum,  # [n_rows, COLUMNS], or None: not wanted
    dBranch,  # [n_rows, COLUMNS], or None: not wanted
    dXBiasParts,  # [programs along dimension 0, COLUMNS], or None: not wanted
    Seed,  # [1] int64, or None: nothing drops
    RowIndex,  # [n_rows] int32, or None
    n_rows,
    d_total_stride,
    site,
    threshold,
    scale: tl.float64,
    row_period,
    BATCH_FIRST: tl.constexpr,
    TILE: tl.constexpr,
):
    """d_sum = d_total, d_branch = dropout(d_total), d_x_bias = sum(d_branch): there is no norm.

    A program owns one chunk of every so many blocks of TILE.ROWS rows.
    """
    total_type: tl.constexpr = dTotal.dtype.element_ty
    dtype: tl.constexpr = tl.float64 if total_type == tl.float64 else tl.float32
    chunk = tl.program_id(1)
    column, columns = chunk_columns(chunk, True, TILE)
    d_x_bias = zeros(dtype, TILE)
    seed = None
    if Seed is not None:
        seed = tl.load(Seed)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, TILE.ROWS), tl.num_programs(0)):
        row, row_mask = block_rows(block, n_rows, TILE)
        mask = row_mask & columns
        total = load_rows(dTotal, row, d_total_stride, column, mask, TILE)
        dropout = None
        if Seed is not None:
            dropout = row_dropout(
                seed,
                RowIndex,
                row,
                row_mask,
                site,
                threshold,
                scale,
                row_period,
                BATCH_FIRST,
                dtype,
            )
        d_sum = widen(total, dtype)
        d_branch = d_sum
        if dropout is not None:
            d_branch *= dropout_multiplier(dropout, chunk, TILE)
        place = row * TILE.COLUMNS + column
        if dSum is not None:
            tl.store(dSum + place, narrow(d_sum, dSum.dtype.element_ty), mask=mask)
        if dBranch is not None:
            tl.store(dBranch + place, narrow(d_branch, dBranch.dtype.element_ty), mask=mask)
        d_x_bias += d_branch
    if dXBiasParts is not None:
        place = tl.program_id(0).to(tl.int64) * TILE.COLUMNS + column
        tl.store(dXBiasParts + place, sum_rows(d_x_bias), mask=columns)
