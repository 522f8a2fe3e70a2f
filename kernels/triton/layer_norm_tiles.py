"""Tiles of layer norm: who owns what, and how it is read, summed and dropped.

Eight adjacent columns are a *group*: one call of Philox decides them, and one thread owns them. It
accesses a group as *slices* of WIDTH columns, 16 bytes where strides allow. A *chunk* of a row is
LANES groups, one a thread, and a row is CHUNKS chunks, so that a thread owns the groups l,
l + LANES, ... Widths that are no power of two then waste little, and up to 32 lanes are summed
without shared memory.

Tiles are [SLICES, WIDTH, ROWS, LANES], the first two in the registers of a thread. That is both how
the compiler lays a tile out by default and how it wants to access memory, so nothing but sums
travels between threads.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.dropout import INTERPRETED, lanes_kept, residual_words, token_coordinates


class Tile(NamedTuple):
    """What a program handles at once; known when it is compiled."""

    COLUMNS: int  # of a row
    CHUNKS: int  # of a row
    ROWS: int
    LANES: int
    WIDTH: int  # columns of one access
    EVEN_ROWS: bool  # ROWS divides the number of rows


# ----------------------------------------------------------------------------- rows and columns


@triton.jit
def block_rows(block, n_rows, TILE: tl.constexpr):
    """Rows of a block and whether they exist, both [1, 1, ROWS, 1]."""
    first = (tl.full([], 0, tl.int64) + block) * TILE.ROWS
    row = first + tl.arange(0, TILE.ROWS)[None, None, :, None]
    if TILE.EVEN_ROWS:
        return row, tl.full(row.shape, True, tl.int1)
    else:
        return row, row < n_rows


@triton.jit
def slice_lanes(TILE: tl.constexpr):
    """The number of each column in its group [SLICES, WIDTH, 1, 1]."""
    slices = tl.arange(0, 8 // TILE.WIDTH)[:, None, None, None]
    return slices * TILE.WIDTH + tl.arange(0, TILE.WIDTH)[None, :, None, None]


@triton.jit
def chunk_groups(chunk, TILE: tl.constexpr):
    """Groups of a chunk [1, 1, 1, LANES]."""
    return chunk * TILE.LANES + tl.arange(0, TILE.LANES)[None, None, None, :]


@triton.jit
def chunk_columns(chunk, MAYBE_LAST: tl.constexpr, TILE: tl.constexpr):
    """Columns of a chunk and whether they exist, both [SLICES, WIDTH, 1, LANES]."""
    column = chunk_groups(chunk, TILE) * 8 + slice_lanes(TILE)
    if MAYBE_LAST and TILE.COLUMNS % (TILE.LANES * 8) != 0:
        return column, column < TILE.COLUMNS
    else:
        return column, tl.full(column.shape, True, tl.int1)


class Rows(NamedTuple):
    """A (rows, columns) tensor."""

    X: tl.tensor | None  # None: there is none
    stride: tl.tensor  # from row to row, in WIDTHs, which shows their alignment


@triton.jit
def load_rows(rows, row, column, mask, TILE: tl.constexpr):
    """A tile, [SLICES, WIDTH, ROWS, LANES], zero outside of ``mask``."""
    pointers = rows.X + row * (rows.stride.to(tl.int64) * TILE.WIDTH) + column
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tile(X, tile, row, column, mask, TILE: tl.constexpr):
    """Write a tile, rounded, to a contiguous tensor; nothing where there is none."""
    if X is not None:
        place = row * TILE.COLUMNS + column
        tl.store(X + place, narrow(tile, X.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------- values and sums


@triton.jit
def widen(tile, dtype: tl.constexpr):
    """A tile in a type at least as wide; two of bfloat16 take two instructions, spelled out."""
    if INTERPRETED or tile.dtype != tl.bfloat16:
        return tile.to(dtype)
    else:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [tile],
            tl.float32,
            is_pure=True,
            pack=2,
        )
        return wide.to(dtype)


@triton.jit
def narrow(tile, dtype: tl.constexpr):
    """A tile rounded to a type; two of bfloat16 take one instruction, spelled out."""
    if INTERPRETED or tile.dtype != tl.float32 or dtype != tl.bfloat16:
        return tile.to(dtype)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [tile], tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def load_vector(Vector, column, columns, other: tl.constexpr, dtype: tl.constexpr, TILE):
    """A vector's part in a tile. Each thread reads what it owns, whichever row that is in."""
    shape: tl.constexpr = [column.shape[0], column.shape[1], TILE.ROWS, column.shape[3]]
    pointers = tl.broadcast_to(Vector + column, shape)
    return widen(tl.load(pointers, mask=tl.broadcast_to(columns, shape), other=other), dtype)


@triton.jit
def zeros(dtype: tl.constexpr, TILE: tl.constexpr):
    """A tile to sum columns in."""
    return tl.full([8 // TILE.WIDTH, TILE.WIDTH, TILE.ROWS, TILE.LANES], 0, dtype)


@triton.jit
def own_zeros(dtype: tl.constexpr, TILE: tl.constexpr):
    """For each thread to sum in what it owns of a row [1, 1, ROWS, LANES]."""
    return tl.full([1, 1, TILE.ROWS, TILE.LANES], 0, dtype)


@triton.jit
def own_sum(tile):
    """The sum of what each thread owns in a chunk [1, 1, ROWS, LANES]."""
    return tl.sum(tl.sum(tile, 0, keep_dims=True), 1, keep_dims=True)


@triton.jit
def row_sum(own):
    """The sum of a row [1, 1, ROWS, 1] from what its threads have summed."""
    return tl.sum(own, 3, keep_dims=True)


@triton.jit
def row_sums(a, b):
    """Two sums of a row, which travel between threads together."""
    return tl.split(tl.sum(tl.join(a, b), 3, keep_dims=True))


# -------------------------------------------------------------------------------------- dropout


class Dropout(NamedTuple):
    """What decides the dropout of all rows."""

    seed: tl.tensor
    site: tl.tensor
    threshold: tl.tensor
    scale: tl.tensor  # of what is kept
    row_period: tl.tensor


class RowDropout(NamedTuple):
    """What decides the dropout of some rows."""

    seed: tl.tensor
    site: tl.tensor
    threshold: tl.tensor
    scale: tl.tensor
    position: tl.tensor
    sequence: tl.tensor


@triton.jit
def dropout_of(Seed, site, threshold, scale, row_period, dtype: tl.constexpr):
    return Dropout(tl.load(Seed), site, threshold, tl.full([], scale, dtype), row_period)


@triton.jit
def row_dropout(dropout, RowIndex, row, row_mask, BATCH_FIRST: tl.constexpr):
    position, sequence = token_coordinates(row, row_mask, RowIndex, dropout.row_period, BATCH_FIRST)
    return RowDropout(
        dropout.seed, dropout.site, dropout.threshold, dropout.scale, position, sequence
    )


@triton.jit
def dropout_multiplier(dropout, chunk, TILE: tl.constexpr):
    """The scale where the contract keeps an element, else 0 [SLICES, WIDTH, ROWS, LANES]."""
    words = residual_words(
        dropout.seed, dropout.site, dropout.position, dropout.sequence, chunk_groups(chunk, TILE)
    )
    kept = lanes_kept(words, slice_lanes(TILE), dropout.threshold)
    return tl.where(kept, dropout.scale, 0.0)
