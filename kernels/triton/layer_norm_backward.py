"""Backward kernels of layer norm, and of the branch that dropped before it."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.layer_norm_tiles import (
    Rows,
    Tile,
    block_rows,
    chunk_columns,
    dropout_multiplier,
    dropout_of,
    load_rows,
    load_vector,
    own_sum,
    own_zeros,
    row_dropout,
    row_sums,
    store_tile,
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


class Inputs(NamedTuple):
    """What a norm's backward reads."""

    d_out: Rows  # gradients of the result and of its copy: one of the two is there
    d_copy: Rows
    d_total: Rows  # gradient of the sum
    saved: Rows  # the sum or the result


@triton.jit
def load_gradient(inputs, row, column, mask, dtype: tl.constexpr, TILE: tl.constexpr):
    """What flows into the result and its copy together."""
    if inputs.d_out.X is None:
        return widen(load_rows(inputs.d_copy, row, column, mask, TILE), dtype)
    else:
        gradient = widen(load_rows(inputs.d_out, row, column, mask, TILE), dtype)
        if inputs.d_copy.X is not None:
            gradient += widen(load_rows(inputs.d_copy, row, column, mask, TILE), dtype)
        return gradient


@triton.jit
def load_inputs(inputs, row, row_mask, dtype: tl.constexpr, TILE: tl.constexpr):
    """Whole rows of (saved, the gradient, that of the sum), a tile of each chunk.

    Chunk after chunk: loaded one after the other, the three take more registers.
    """
    CHUNKS: tl.constexpr = TILE.CHUNKS
    saved, gradients, totals = (), (), ()
    for c in tl.static_range(CHUNKS):
        column, columns = chunk_columns(c, c == CHUNKS - 1, TILE)
        mask = row_mask & columns
        saved += (load_rows(inputs.saved, row, column, mask, TILE),)
        gradients += (load_gradient(inputs, row, column, mask, dtype, TILE),)
        if inputs.d_total.X is not None:
            totals += (load_rows(inputs.d_total, row, column, mask, TILE),)
    return saved, gradients, totals


@triton.constexpr_function
def keeps_parameters(dtype: tl.dtype, TILE: Tile) -> bool:
    """A thread has too few registers to keep them in, where lanes are many or types wide."""
    return TILE.LANES < 512 and dtype == tl.float32


@triton.jit
def load_affine(
    Weight, Bias, column, columns, FROM_OUTPUT: tl.constexpr, dtype: tl.constexpr, TILE
):
    """A chunk of (weight, 1 / weight, bias); the last two where xhat is made from the result.

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
def load_affines(Weight, Bias, FROM_OUTPUT: tl.constexpr, dtype: tl.constexpr, TILE: tl.constexpr):
    """That of every chunk."""
    CHUNKS: tl.constexpr = TILE.CHUNKS
    affines = ()
    for c in tl.static_range(CHUNKS):
        column, columns = chunk_columns(c, c == CHUNKS - 1, TILE)
        affines += (load_affine(Weight, Bias, column, columns, FROM_OUTPUT, dtype, TILE),)
    return affines


@triton.jit
def affine_of(
    affines, c, Weight, Bias, column, columns, FROM_OUTPUT: tl.constexpr, dtype: tl.constexpr, TILE
):
    """That of chunk c, kept or read again."""
    if keeps_parameters(dtype, TILE):
        return affines[c]
    else:
        return load_affine(Weight, Bias, column, columns, FROM_OUTPUT, dtype, TILE)


@triton.jit
def chunk_zeros(dtype: tl.constexpr, TILE: tl.constexpr):
    """Tiles to sum the columns of every chunk in."""
    CHUNKS: tl.constexpr = TILE.CHUNKS
    tiles = ()
    for _ in tl.static_range(CHUNKS):
        tiles += (zeros(dtype, TILE),)
    return tiles


@triton.jit
def normalised(saved, mean, rstd, inverse, bias, FROM_OUTPUT: tl.constexpr, dtype: tl.constexpr):
    """xhat, from the sum or from the result."""
    if FROM_OUTPUT:
        return (widen(saved, dtype) - bias) * inverse
    else:
        return (widen(saved, dtype) - mean) * rstd


@triton.jit
def means(weighted_sum, projected_sum, rstd, TILE: tl.constexpr):
    """rstd times the means of g_w and of g_w * xhat, from what each thread has summed."""
    weighted_sum, projected_sum = row_sums(weighted_sum, projected_sum)
    return rstd * (weighted_sum / TILE.COLUMNS), rstd * (projected_sum / TILE.COLUMNS)


@triton.jit
def normalised_rows(
    saved,
    gradients,
    mean,
    rstd,
    affines,
    Weight,
    Bias,
    FROM_OUTPUT: tl.constexpr,
    dtype: tl.constexpr,
    TILE: tl.constexpr,
):
    """xhat, a tile of each chunk, and rstd times the means of g_w and of g_w * xhat."""
    CHUNKS: tl.constexpr = TILE.CHUNKS
    xhats = ()
    weighted_sum, projected_sum = own_zeros(dtype, TILE), own_zeros(dtype, TILE)
    for c in tl.static_range(CHUNKS):
        column, columns = chunk_columns(c, c == CHUNKS - 1, TILE)
        weight, inverse, bias = affine_of(
            affines, c, Weight, Bias, column, columns, FROM_OUTPUT, dtype, TILE
        )
        xhats += (normalised(saved[c], mean, rstd, inverse, bias, FROM_OUTPUT, dtype),)
        weighted = gradients[c] * weight
        weighted_sum += own_sum(weighted)
        projected_sum += own_sum(weighted * xhats[c])
    common, slope = means(weighted_sum, projected_sum, rstd, TILE)
    return xhats, common, slope


@triton.jit
def input_gradient(weighted, xhat, rstd, common, slope, total, TILE: tl.constexpr):
    """rstd * (g_w - mean(g_w) - xhat * mean(g_w * xhat)) + d_total, with rstd in the two means."""
    d_sum = rstd * weighted - (common + slope * xhat)
    if TILE.COLUMNS == 1:
        d_sum *= 0.0  # what is left of a cancellation that a fused multiply-add rounds once
    if total is not None:
        d_sum += widen(total, d_sum.dtype)
    return d_sum


@triton.jit
def store_gradients(dSum, dBranch, d_sum, dropout, chunk, row, column, mask, TILE: tl.constexpr):
    """Write d_sum and what of it reaches the branch, which is returned."""
    d_branch = d_sum
    if dropout is not None:
        d_branch *= dropout_multiplier(dropout, chunk, TILE)
    store_tile(dSum, d_sum, row, column, mask, TILE)
    store_tile(dBranch, d_branch, row, column, mask, TILE)
    return d_branch


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
    inputs = Inputs(
        Rows(dOut, d_out_stride),
        Rows(dCopy, d_copy_stride),
        Rows(dTotal, d_total_stride),
        Rows(Saved, saved_stride),
    )
    sites, affines = None, ()
    if keeps_parameters(dtype, TILE):
        affines = load_affines(Weight, Bias, FROM_OUTPUT, dtype, TILE)
    if Seed is not None:
        sites = dropout_of(Seed, site, threshold, scale, row_period, dtype)
    d_weights, d_biases = chunk_zeros(dtype, TILE), chunk_zeros(dtype, TILE)
    d_x_biases = chunk_zeros(dtype, TILE)
    blocks = tl.cdiv(n_rows, TILE.ROWS)
    # With two stages the next rows are under way, to shared memory that must have room for them.
    stages: tl.constexpr = 2 if keeps_parameters(dtype, TILE) else 1
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=stages):
        row, row_mask = block_rows(block, n_rows, TILE)
        saved, gradients, totals = load_inputs(inputs, row, row_mask, dtype, TILE)
        mean = 0.0
        if not FROM_OUTPUT:
            mean = tl.load(Mean + row, mask=row_mask, other=0.0)
        rstd = tl.load(Rstd + row, mask=row_mask, other=0.0)
        dropout = None
        if Seed is not None:
            dropout = row_dropout(sites, RowIndex, row, row_mask, BATCH_FIRST)

        xhats, common, slope = normalised_rows(
            saved, gradients, mean, rstd, affines, Weight, Bias, FROM_OUTPUT, dtype, TILE
        )
        new_d_weights, new_d_biases, new_d_x_biases = (), (), ()
        for c in tl.static_range(CHUNKS):
            column, columns = chunk_columns(c, c == CHUNKS - 1, TILE)
            weight, _, _ = affine_of(affines, c, Weight, Bias, column, columns, False, dtype, TILE)
            total = None if dTotal is None else totals[c]
            weighted = gradients[c] * weight
            d_sum = input_gradient(weighted, xhats[c], rstd, common, slope, total, TILE)
            mask = row_mask & columns
            d_branch = store_gradients(dSum, dBranch, d_sum, dropout, c, row, column, mask, TILE)
            new_d_weights += (d_weights[c] + gradients[c] * xhats[c],)
            new_d_biases += (d_biases[c] + gradients[c],)
            new_d_x_biases += (d_x_biases[c] + d_branch,)
        d_weights, d_biases, d_x_biases = new_d_weights, new_d_biases, new_d_x_biases

    store_parts(dWeightParts, d_weights, TILE)
    store_parts(dBiasParts, d_biases, TILE)
    store_parts(dXBiasParts, d_x_biases, TILE)


@triton.jit
def store_parts(Parts, tiles, TILE: tl.constexpr):
    """Write the sums of whole rows, a tile of each chunk."""
    CHUNKS: tl.constexpr = TILE.CHUNKS
    for c in tl.static_range(CHUNKS):
        column, columns = chunk_columns(c, c == CHUNKS - 1, TILE)
        store_part(Parts, tiles[c], column, columns, TILE)


@triton.jit
def store_part(Parts, tile, column, columns, TILE: tl.constexpr):
    """Write the sum of a tile's rows to the program's row of the parts, where it is wanted."""
    if Parts is not None:
        place = tl.program_id(0).to(tl.int64) * TILE.COLUMNS + column
        tl.store(Parts + place, tl.sum(tile, 2, keep_dims=True), mask=columns)


@triton.jit
def add_to_part(Parts, tile, column, columns, is_first, TILE: tl.constexpr):
    """Add a row to the program's row of the parts, which its first one begins."""
    if Parts is not None:
        place = tl.program_id(0).to(tl.int64) * TILE.COLUMNS + column
        before = tl.load(Parts + place, mask=columns & ~is_first, other=0.0)
        tl.store(Parts + place, before + tile, mask=columns)


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
    inputs = Inputs(
        Rows(dOut, d_out_stride),
        Rows(dCopy, d_copy_stride),
        Rows(dTotal, d_total_stride),
        Rows(Saved, saved_stride),
    )
    sites = None
    if Seed is not None:
        sites = dropout_of(Seed, site, threshold, scale, row_period, dtype)
    for block in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row, row_mask = block_rows(block, n_rows, TILE)
        mean = 0.0
        if not FROM_OUTPUT:
            mean = tl.load(Mean + row)
        rstd = tl.load(Rstd + row)
        dropout = None
        if Seed is not None:
            dropout = row_dropout(sites, RowIndex, row, row_mask, BATCH_FIRST)
        weighted_sum, projected_sum = own_zeros(dtype, TILE), own_zeros(dtype, TILE)
        for c in range(TILE.CHUNKS):
            column, columns = chunk_columns(c, True, TILE)
            gradient, weighted, xhat = load_chunk(
                inputs, row, column, columns, mean, rstd, Weight, Bias, FROM_OUTPUT, dtype, TILE
            )
            weighted_sum += own_sum(weighted)
            projected_sum += own_sum(weighted * xhat)
        common, slope = means(weighted_sum, projected_sum, rstd, TILE)

        for c in range(TILE.CHUNKS):
            column, columns = chunk_columns(c, True, TILE)
            gradient, weighted, xhat = load_chunk(
                inputs, row, column, columns, mean, rstd, Weight, Bias, FROM_OUTPUT, dtype, TILE
            )
            total = None
            if dTotal is not None:
                total = load_rows(inputs.d_total, row, column, columns, TILE)
            d_sum = input_gradient(weighted, xhat, rstd, common, slope, total, TILE)
            d_branch = store_gradients(dSum, dBranch, d_sum, dropout, c, row, column, columns, TILE)
            is_first = block == tl.program_id(0)
            add_to_part(dWeightParts, gradient * xhat, column, columns, is_first, TILE)
            add_to_part(dBiasParts, gradient, column, columns, is_first, TILE)
            add_to_part(dXBiasParts, d_branch, column, columns, is_first, TILE)
        tl.debug_barrier()  # what one thread wrote to the parts, another may read


@triton.jit
def load_chunk(
    inputs, row, column, columns, mean, rstd, Weight, Bias, FROM_OUTPUT: tl.constexpr,
    dtype: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A chunk of (g, g_w, xhat)."""
    gradient = load_gradient(inputs, row, column, columns, dtype, TILE)
    saved = load_rows(inputs.saved, row, column, columns, TILE)
    weight, inverse, bias = load_affine(Weight, Bias, column, columns, FROM_OUTPUT, dtype, TILE)
    return (
        gradient,
        gradient * weight,
        normalised(saved, mean, rstd, inverse, bias, FROM_OUTPUT, dtype),
    )


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
    sites = None
    if Seed is not None:
        sites = dropout_of(Seed, site, threshold, scale, row_period, dtype)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, TILE.ROWS), tl.num_programs(0)):
        row, row_mask = block_rows(block, n_rows, TILE)
        mask = row_mask & columns
        total = load_rows(Rows(dTotal, d_total_stride), row, column, mask, TILE)
        dropout = None
        if Seed is not None:
            dropout = row_dropout(sites, RowIndex, row, row_mask, BATCH_FIRST)
        d_sum = widen(total, dtype)
        d_branch = store_gradients(dSum, dBranch, d_sum, dropout, chunk, row, column, mask, TILE)
        d_x_bias += d_branch
    store_part(dXBiasParts, d_x_bias, column, columns, TILE)
