"""Attention, gradient of a float mask: dS, summed where the mask broadcasts, in a pass of its own.

It needs what the query gradient's kernel finds first, delta. docs/math.md derives both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.attention_backward import Queries, score_gradients
from fastattn.kernels.attention_forward import RUNTIME
from fastattn.kernels.attention_tiles import (
    Ends,
    Masks,
    dropout_of,
    length_of,
    load_tile,
    pair_offset_of,
    rows_of,
    score_scale,
    statistics_offset,
    sum_dtype,
)


@triton.jit(do_not_specialize=RUNTIME)
def attention_mask_gradient_kernel(
    dOut,  # [B, seqlen_q, heads, HEAD_DIM]
    Q,  # [B, seqlen_q, heads, HEAD_DIM]
    K,  # [B, seqlen_k, heads, HEAD_DIM]
    V,  # like K
    RowShift,  # [B, heads, seqlen_q]; fp32
    RowScale,  # like RowShift
    Delta,  # like RowShift
    dMask,  # [splits, B|1, heads|1, seqlen_q|1, seqlen_k|1]
    KeyMask,  # [B, seqlen_k] uint8 or float, or None
    PairMask,  # [B|1, heads|1, seqlen_q|1, seqlen_k|1] uint8 or float, or None
    KeyLengths,  # [B] int32, or None
    QueryLengths,  # [B] int32, or None
    Seed,  # [1] int64, or None
    do_strides,  # of batch, row and head, in UNITs; like those of Q, K and V
    q_strides,
    k_strides,
    v_strides,
    dmask_strides,  # all five, 0 where it broadcasts
    row_stride,  # of RowShift's second to last dimension
    key_stride,  # of KeyMask's batch
    pair_strides,
    pair_columns,
    batch,
    heads,
    seqlen_q,
    seqlen_k,
    splits,
    scale: tl.float64,
    site,
    head_offset,
    threshold,
    keep_scale: tl.float64,
    SUM_BATCH: tl.constexpr,
    SUM_HEADS: tl.constexpr,
    SUM_M: tl.constexpr,
    SUM_N: tl.constexpr,
    TILE: tl.constexpr,
):
    """dMask = dS, summed over the dimensions along which the mask broadcasts.

    A program owns a tile of the gradient and a share, one of ``splits``, of the tiles of dS that
    are summed into it. It makes them again one after another, in a fixed order.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    dtype: tl.constexpr = sum_dtype(Q.dtype.element_ty)
    query_blocks, key_blocks = tl.cdiv(seqlen_q, BLOCK_M), tl.cdiv(seqlen_k, BLOCK_N)
    rest = tl.program_id(0)
    own_n, rest, added_n = share(rest, key_blocks, SUM_N)
    own_m, rest, added_m = share(rest, query_blocks, SUM_M)
    own_head, rest, added_heads = share(rest, heads, SUM_HEADS)
    own_sequence, split, added_sequences = share(rest, batch, SUM_BATCH)
    scale = score_scale(scale, dtype, TILE)
    _, _, pair_stride = pair_strides

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype)
    tiles = added_n * added_m * added_heads * added_sequences
    each = tl.cdiv(tiles, splits)
    for i in tl.range(split * each, tl.minimum((split + 1) * each, tiles)):
        start_n = (own_n + i % added_n) * BLOCK_N
        start_m = (own_m + i // added_n % added_m) * BLOCK_M
        head = own_head + i // (added_n * added_m) % added_heads
        sequence = own_sequence + i // (added_n * added_m * added_heads)
        end_m = length_of(QueryLengths, sequence, seqlen_q)
        end_n = length_of(KeyLengths, sequence, seqlen_k)
        m = start_m + tl.arange(0, BLOCK_M)
        row = statistics_offset(row_stride, sequence, head, heads, None, 0) + m
        shift = tl.load(RowShift + row, mask=m < end_m, other=float("inf"))
        row_scale = tl.load(RowScale + row, mask=m < end_m, other=0.0)
        delta = tl.load(Delta + row, mask=m < end_m, other=0.0)
        do = rows_of(dOut, do_strides, sequence, head, None, 0, TILE.UNIT)
        do = load_tile(do, start_m, end_m, BLOCK_M, TILE, True)
        q = rows_of(Q, q_strides, sequence, head, None, 0, TILE.UNIT)
        q = load_tile(q, start_m, end_m, BLOCK_M, TILE, True)
        k = rows_of(K, k_strides, sequence, head, None, 0, TILE.UNIT)
        k = load_tile(k, start_n, end_n, BLOCK_N, TILE, True)
        v = rows_of(V, v_strides, sequence, head, None, 0, TILE.UNIT)
        v = load_tile(v, start_n, end_n, BLOCK_N, TILE, True)
        offset = pair_offset_of(pair_strides, sequence, head, TILE)
        key_offset = sequence.to(tl.int64) * key_stride
        masks = Masks(KeyMask, key_offset, PairMask, offset, pair_stride, pair_columns)
        dropout = None
        if Seed is not None:
            dropout = dropout_of(Seed, site, head + head_offset, sequence, threshold)
        queries = Queries(q, do, shift, delta)
        ends = Ends(end_m, end_n)
        ds = score_gradients(
            queries, k, v, masks, dropout, scale, start_m, start_n, ends, TILE, True
        )
        acc += ds * row_scale[:, None]

    acc *= tl.full([], keep_scale, dtype)
    m = own_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = own_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if SUM_M:
        acc, m = tl.sum(acc, 0, keep_dims=True), tl.zeros([1, 1], tl.int32)
    if SUM_N:
        acc, n = tl.sum(acc, 1, keep_dims=True), tl.zeros([1, 1], tl.int32)
    mask = (m < tl.maximum(seqlen_q, 1)) & (n < tl.maximum(seqlen_k, 1))
    of_split, of_batch, of_head, of_row, of_column = dmask_strides
    dMask += split.to(tl.int64) * of_split + own_sequence.to(tl.int64) * of_batch
    dMask += own_head.to(tl.int64) * of_head
    offset = m.to(tl.int64) * of_row + n.to(tl.int64) * of_column
    tl.store(dMask + offset, acc.to(dMask.dtype.element_ty), mask=mask)


@triton.jit
def share(number, size, SUMMED: tl.constexpr):
    """Split ``number`` along a dimension: (first index, the rest, how many indices are summed)."""
    if SUMMED:
        return number * 0, number, size
    else:
        return number % size, number // size, 1
