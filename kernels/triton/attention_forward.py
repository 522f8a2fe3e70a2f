"""Attention, forward: softmax over blocks of keys, with masks and dropout in registers.

The algorithm is that of Dao et al., "FlashAttention", 2022 (arXiv:2205.14135); docs/math.md derives
it with masks and dropout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.attention_tiles import (
    ALL,
    FLAGS,
    Ends,
    Masks,
    Place,
    drop,
    dropout_of,
    exponential,
    length_of,
    load_tile,
    masked,
    padded,
    pair_offset_of,
    probability,
    product,
    program_of,
    rounded_product,
    rows_of,
    runs_of,
    score_scale,
    sequence_of,
    start_of,
    statistics_offset,
    store_rows,
    sum_dtype,
)

#: Integers of which no value deserves a kernel of its own; Triton specialises tuples all the same.
RUNTIME = [
    *("do_strides", "q_strides", "k_strides", "v_strides", "out_strides"),
    *("dq_strides", "dk_strides", "dv_strides", "dmask_strides"),
    *("row_stride", "key_stride", "pair_strides"),
    *("batch", "heads", "query_blocks", "key_blocks", "seqlen_q", "seqlen_k", "splits"),
    *("tokens_q", "tokens_k"),
    *("pair_columns", "site", "head_offset", "threshold"),
]


@triton.jit(do_not_specialize=RUNTIME)
def attention_forward_kernel(
    Q,  # [B, seqlen_q, heads, HEAD_DIM], or [tokens, heads, HEAD_DIM] with CuSeqlensQ
    K,  # [B, seqlen_k, heads, HEAD_DIM], or packed
    V,  # like K
    Out,  # like Q
    RowShift,  # [B, heads, seqlen_q], or [heads, tokens]; fp32
    RowScale,  # like RowShift; or None
    KeyMask,  # [B, seqlen_k]: uint8, not 0 where a key is ignored, or float to add; or None
    PairMask,  # [B|1, heads|1, seqlen_q|1, seqlen_k|1]: the same for pairs; or None
    KeyLengths,  # [B] int32, or None
    QueryLengths,  # [B] int32, or None
    CuSeqlensQ,  # [B + 1] int32, or None
    CuSeqlensK,  # [B + 1] int32, or None
    Seed,  # [1] int64, or None: nothing drops
    q_strides,  # of batch, row and head, in UNITs; like those of K, V and Out
    k_strides,
    v_strides,
    out_strides,
    row_stride,  # of RowShift's second to last dimension
    key_stride,  # of KeyMask's batch
    pair_strides,  # of batch, head and row, in PAIR_UNITs, 0 where it broadcasts
    pair_columns,  # in PAIR_UNITs
    batch,
    heads,
    query_blocks,
    seqlen_q,  # packed: the longest that counts
    seqlen_k,
    tokens_q,  # packed: rows of Q, of which some may belong to no sequence
    tokens_k,
    scale: tl.float64,
    site,
    head_offset,
    threshold,
    keep_scale: tl.float64,
    TILE: tl.constexpr,
):
    """out = Z v, with Z = dropout(softmax(q k^T scale + masks)).

    A program owns BLOCK_M queries of one head and walks over the keys that count for them. Scores,
    probabilities and decisions stay in registers.

    For backward it writes what makes probabilities of a row's scores. Without RowScale that is the
    logarithm of their denominator, so that P = 2^(score - shift). In fp32 its rounding would count,
    and beside what a float mask adds all its digits may be lost. There it is the maximum and 1 over
    the sum, and P = RowScale e^(score - shift). Where a query has no key, shift is infinite.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    dtype: tl.constexpr = sum_dtype(Q.dtype.element_ty)
    block, head, sequence = program_of(query_blocks, heads, TILE.IS_CAUSAL)
    place_q = Place(CuSeqlensQ, sequence, batch, tokens_q, seqlen_q)
    place_k = Place(CuSeqlensK, sequence, batch, tokens_k, seqlen_k)
    first_q, rows_q, end_m = sequence_of(place_q)
    first_k, _, end_n = sequence_of(place_k)
    start_m = block * BLOCK_M
    if start_m >= rows_q:
        return
    end_m = length_of(QueryLengths, sequence, end_m)
    end_n = length_of(KeyLengths, sequence, end_n)
    if TILE.IS_CAUSAL:
        end_n = tl.minimum(end_n, start_m + BLOCK_M)
    end_n = tl.where(start_m < end_m, end_n, 0)

    Q = rows_of(Q, q_strides, sequence, head, CuSeqlensQ, first_q, TILE.UNIT)
    K = rows_of(K, k_strides, sequence, head, CuSeqlensK, first_k, TILE.UNIT)
    V = rows_of(V, v_strides, sequence, head, CuSeqlensK, first_k, TILE.UNIT)
    Out = rows_of(Out, out_strides, sequence, head, CuSeqlensQ, first_q, TILE.UNIT)
    row = statistics_offset(row_stride, sequence, head, heads, CuSeqlensQ, first_q)
    offset = pair_offset_of(pair_strides, sequence, head, TILE)
    key_offset = sequence.to(tl.int64) * key_stride
    _, _, pair_stride = pair_strides
    masks = Masks(KeyMask, key_offset, PairMask, offset, pair_stride, pair_columns)
    dropout = None
    if Seed is not None:
        dropout = dropout_of(Seed, site, head + head_offset, sequence, threshold)
    scale = score_scale(scale, dtype, TILE)

    q = load_tile(Q, start_m, end_m, BLOCK_M, TILE, True)
    acc = tl.zeros([BLOCK_M, padded(TILE.HEAD_DIM)], dtype)
    row_sum = tl.zeros([BLOCK_M], dtype)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype)
    ends = Ends(end_m, end_n)
    n_blocks = tl.cdiv(end_n, BLOCK_N)
    for first_block in tl.range(0, n_blocks, ALL if KeyMask is None else FLAGS):
        whole, rest = runs_of(masks, first_block, n_blocks, start_m, end_n, TILE)
        if PairMask is None:
            acc, row_sum, row_max = attend(
                acc, row_sum, row_max, q, K, V, whole, masks, dropout, scale, start_m, ends,
                TILE, False,
            )  # fmt: skip
        acc, row_sum, row_max = attend(
            acc, row_sum, row_max, q, K, V, rest, masks, dropout, scale, start_m, ends,
            TILE, True,
        )  # fmt: skip

    m = start_m + tl.arange(0, BLOCK_M)
    alive = (row_sum != 0) & (m < end_m)
    row_sum = tl.where(alive, row_sum, 1.0)
    out = tl.where(alive[:, None], acc * (tl.full([], keep_scale, dtype) / row_sum)[:, None], 0.0)
    store_rows(Out, out, start_m, query_blocks, place_q, BLOCK_M, TILE)
    shift = row_max
    if TILE.BASE_2:
        shift += tl.log2(row_sum)
    else:
        tl.store(RowScale + row + m, 1.0 / row_sum, mask=m < rows_q)
    tl.store(RowShift + row + m, tl.where(alive, shift, float("inf")), mask=m < rows_q)


@triton.jit
def attend(
    acc,  # [BLOCK_M, padded HEAD_DIM]: sum of kept exponentials of score - row_max times values
    row_sum,  # [BLOCK_M]: sum of these exponentials, before dropout
    row_max,  # [BLOCK_M]
    q,  # [BLOCK_M, padded HEAD_DIM]
    K,
    V,
    run,
    masks,
    dropout,
    scale,
    start_m,
    ends,  # of the queries and of the keys that count
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take a run of blocks of keys into the softmax and the output."""
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    flags = run.flags
    for i in tl.range(run.count):
        start_n = start_of(run, i, flags, masks, BLOCK_N)
        flags &= flags - 1
        k = load_tile(K, start_n, ends.n, BLOCK_N, TILE, MASKED)
        scores = product(q, tl.trans(k), TILE)
        if MASKED:
            scores = masked(scores * scale, masks, start_m, start_n, ends, TILE)
            new_max = tl.maximum(row_max, tl.max(scores, 1))
        elif TILE.BASE_2:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
            scores = scores * scale
        else:
            scores = rounded_product(scores, scale)
            new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        if TILE.BASE_2 and not MASKED:  # where the maximum is rounded and its score is not
            probs = probability(scores - shift[:, None], TILE)
        else:
            probs = exponential(scores - shift[:, None], TILE)
        rescale = exponential(row_max - shift, TILE)
        row_sum = row_sum * rescale + tl.sum(probs, 1)
        row_max = new_max
        acc *= rescale[:, None]
        v = load_tile(V, start_n, ends.n, BLOCK_N, TILE, MASKED)
        if dropout is not None:
            probs = drop(probs, dropout, start_m, start_n, v.dtype, TILE)
        acc = product(probs.to(v.dtype), v, TILE, acc)
    return acc, row_sum, row_max
