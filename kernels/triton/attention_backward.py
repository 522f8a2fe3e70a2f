"""Attention, backward: deterministic, without atomics, without a matrix of scores in memory.

With Z = dropout(P), P = softmax(S) and S = scale q k^T + masks, all made again from what forward
kept of each row and the seed:

    dV = Z^T dO    dP = dropout(dO V^T)    delta = rowsum(dO * out)    dS = P * (dP - delta)
    dQ = scale dS K    dK = scale dS^T Q    d mask = dS, summed where the mask broadcasts

``keep_scale`` stays out of the inner loops: with D the decisions, 0 or 1, they compute

    dS / keep_scale = D * P * (dO V^T) - P * (delta / keep_scale)

and what they add up is multiplied at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.attention_forward import RUNTIME
from fastattn.kernels.attention_tiles import (
    ALL,
    FLAGS,
    Ends,
    Masks,
    Place,
    dropout_of,
    is_open,
    kept,
    kept_transposed,
    length_of,
    load_mask,
    load_tile,
    masked,
    masked_pairs,
    padded,
    pair_offset_of,
    probability,
    product,
    program_of,
    rows_of,
    runs_of,
    score_scale,
    sequence_of,
    start_of,
    statistics_offset,
    store_rows,
    store_tile,
    sum_dtype,
)

# ---------------------------------------------------------------------------------------- dQ


class Queries(NamedTuple):
    """A tile of queries, and what makes dS of their scores."""

    q: tl.tensor  # [BLOCK_M, padded HEAD_DIM]
    do: tl.tensor  # like q
    shift: tl.tensor  # [BLOCK_M]
    delta: tl.tensor  # [BLOCK_M]


@triton.jit(do_not_specialize=RUNTIME)
def attention_query_gradient_kernel(
    dOut,  # like Q
    Q,  # [B, seqlen_q, heads, HEAD_DIM], or [tokens, heads, HEAD_DIM] with CuSeqlensQ
    K,  # [B, seqlen_k, heads, HEAD_DIM], or packed
    V,  # like K
    Out,  # like Q
    RowShift,  # [B, heads, seqlen_q], or [heads, tokens]; fp32
    RowScale,  # like RowShift; or None
    Delta,  # like RowShift
    dQ,  # like Q
    KeyMask,  # [B, seqlen_k] uint8 or float, or None
    PairMask,  # [B|1, heads|1, seqlen_q|1, seqlen_k|1] uint8 or float, or None
    KeyLengths,  # [B] int32, or None
    QueryLengths,  # [B] int32, or None
    CuSeqlensQ,  # [B + 1] int32, or None
    CuSeqlensK,  # [B + 1] int32, or None
    Seed,  # [1] int64, or None
    do_strides,  # of batch, row and head, in UNITs; like those of Q, K, V, Out and dQ
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    dq_strides,
    row_stride,  # of RowShift's second to last dimension
    key_stride,  # of KeyMask's batch
    pair_strides,
    pair_columns,
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
    """dQ, and delta / keep_scale for the kernels after it.

    A program owns BLOCK_M queries of one head and walks over the keys that count for them.
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

    dOut = rows_of(dOut, do_strides, sequence, head, CuSeqlensQ, first_q, TILE.UNIT)
    Q = rows_of(Q, q_strides, sequence, head, CuSeqlensQ, first_q, TILE.UNIT)
    K = rows_of(K, k_strides, sequence, head, CuSeqlensK, first_k, TILE.UNIT)
    V = rows_of(V, v_strides, sequence, head, CuSeqlensK, first_k, TILE.UNIT)
    Out = rows_of(Out, out_strides, sequence, head, CuSeqlensQ, first_q, TILE.UNIT)
    dQ = rows_of(dQ, dq_strides, sequence, head, CuSeqlensQ, first_q, TILE.UNIT)
    row = statistics_offset(row_stride, sequence, head, heads, CuSeqlensQ, first_q)
    offset = pair_offset_of(pair_strides, sequence, head, TILE)
    key_offset = sequence.to(tl.int64) * key_stride
    _, _, pair_stride = pair_strides
    masks = Masks(KeyMask, key_offset, PairMask, offset, pair_stride, pair_columns)
    dropout = None
    if Seed is not None:
        dropout = dropout_of(Seed, site, head + head_offset, sequence, threshold)
    to_scores = score_scale(scale, dtype, TILE)
    out_scale = tl.full([], scale * keep_scale, dtype) * has_choice(end_m, end_n, TILE)
    keep_scale = tl.full([], keep_scale, dtype)

    q = load_tile(Q, start_m, end_m, BLOCK_M, TILE, True)
    do = load_tile(dOut, start_m, end_m, BLOCK_M, TILE, True)
    out = load_tile(Out, start_m, end_m, BLOCK_M, TILE, True)
    m = start_m + tl.arange(0, BLOCK_M)
    shift = tl.load(RowShift + row + m, mask=m < rows_q, other=float("inf"))
    delta = tl.sum(do.to(dtype) * out.to(dtype), 1)
    delta /= tl.where(keep_scale > 0, keep_scale, 1.0)  # where it is 0 everything drops
    queries = Queries(q, do, shift, delta)
    if RowScale is None:
        tl.store(Delta + row + m, delta, mask=m < rows_q)

    dq = tl.zeros([BLOCK_M, padded(TILE.HEAD_DIM)], dtype)
    excess = tl.zeros([BLOCK_M, excess_columns(q.dtype, BLOCK_N)], dtype)
    ends = Ends(end_m, end_n)
    n_blocks = tl.cdiv(end_n, BLOCK_N)
    for first_block in tl.range(0, n_blocks, ALL if KeyMask is None else FLAGS):
        whole, rest = runs_of(masks, first_block, n_blocks, start_m, end_n, TILE)
        if PairMask is None:
            dq, excess = gather_from_keys(
                dq, excess, queries, K, V, whole, masks, dropout, to_scores, start_m, ends,
                TILE, False,
            )  # fmt: skip
        dq, excess = gather_from_keys(
            dq, excess, queries, K, V, rest, masks, dropout, to_scores, start_m, ends,
            TILE, True,
        )  # fmt: skip
    dq *= out_scale
    if RowScale is not None:
        row_scale = tl.load(RowScale + row + m, mask=m < rows_q, other=0.0)
        # A row of dS adds up to 0, or else to what delta lacks.
        delta += tl.sum(excess, 1) * row_scale
        tl.store(Delta + row + m, delta, mask=m < rows_q)
        # Where row_scale is 1, P is 1 for one key and 0 for the others, and that sum is all of dS.
        dq *= tl.where(row_scale == 1, 0.0, row_scale)[:, None]
    store_rows(dQ, dq, start_m, query_blocks, place_q, BLOCK_M, TILE)


@triton.jit
def has_choice(end_m, end_n, TILE: tl.constexpr):
    """0 where no query has more keys than one: its P is 1 whatever the score, and dS is 0."""
    if TILE.IS_CAUSAL:
        end_n = tl.minimum(end_n, end_m)
    return (end_n > 1).to(tl.int32)


@triton.constexpr_function
def excess_columns(dtype: tl.dtype, BLOCK_N: int) -> int:
    """How many parts the sum of a row of dS is kept in: tiles of fp32 are small enough for all."""
    return 1 if dtype.primitive_bitwidth == 16 else BLOCK_N


@triton.jit
def gather_from_keys(
    dq,  # [BLOCK_M, padded HEAD_DIM]
    excess,  # [BLOCK_M, 1|BLOCK_N]: sum of dS, where rows have a RowScale
    queries,
    K,
    V,
    run,
    masks,
    dropout,
    scale,
    start_m,
    ends,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add dS K over a run of blocks of keys."""
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    flags = run.flags
    for i in tl.range(run.count):
        start_n = start_of(run, i, flags, masks, BLOCK_N)
        flags &= flags - 1
        k = load_tile(K, start_n, ends.n, BLOCK_N, TILE, MASKED)
        v = load_tile(V, start_n, ends.n, BLOCK_N, TILE, MASKED)
        ds = score_gradients(
            queries, k, v, masks, dropout, scale, start_m, start_n, ends, TILE, MASKED
        )
        if not TILE.BASE_2:
            excess += ds if excess.shape[1] == BLOCK_N else tl.sum(ds, 1, keep_dims=True)
        dq = product(ds.to(k.dtype), k, TILE, dq)
    return dq, excess


@triton.jit
def score_gradients(
    queries,
    k,  # [BLOCK_N, padded HEAD_DIM]
    v,  # like k
    masks,
    dropout,
    scale,
    start_m,
    start_n,
    ends,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dS / keep_scale of a tile, [BLOCK_M, BLOCK_N]; rows are yet to be multiplied by RowScale."""
    scores = product(queries.q, tl.trans(k), TILE) * scale
    if MASKED:
        scores = masked(scores, masks, start_m, start_n, ends, TILE)
    probs = probability(scores - queries.shift[:, None], TILE)
    dp = product(queries.do, tl.trans(v), TILE)
    if dropout is not None:
        keep = kept(dropout, start_m, start_n, TILE)
        return tl.where(keep, probs, 0.0) * dp - probs * queries.delta[:, None]
    else:
        return probs * (dp - queries.delta[:, None])


# ------------------------------------------------------------------------- dK, dV, and dQ with them


class Keys(NamedTuple):
    """A tile of keys, and what their products are multiplied by."""

    k: tl.tensor  # [BLOCK_N, padded HEAD_DIM]
    v: tl.tensor  # like k
    start: tl.tensor  # the first key
    to_scores: tl.tensor
    out_scale: tl.tensor  # of dQ and dK


class Statistics(NamedTuple):
    """What forward, and dQ's kernel, kept of each query of one sequence and head."""

    RowShift: tl.tensor
    RowScale: tl.tensor | None
    Delta: tl.tensor | None


@triton.jit(do_not_specialize=RUNTIME)
def attention_key_gradient_kernel(
    dOut,  # like Q
    Q,  # [B, seqlen_q, heads, HEAD_DIM], or [tokens, heads, HEAD_DIM] with CuSeqlensQ
    K,  # [B, seqlen_k, heads, HEAD_DIM], or packed
    V,  # like K
    RowShift,  # [B, heads, seqlen_q], or [heads, tokens]; fp32
    RowScale,  # like RowShift; or None
    Delta,  # like RowShift, from attention_query_gradient_kernel; None where dQ is given
    dQ,  # like Q; None unless one tile holds all keys
    dK,  # like K
    dV,  # like K
    KeyMask,  # [B, seqlen_k] uint8 or float, or None
    PairMask,  # [B|1, heads|1, seqlen_q|1, seqlen_k|1] uint8 or float, or None
    KeyLengths,  # [B] int32, or None
    QueryLengths,  # [B] int32, or None
    CuSeqlensQ,  # [B + 1] int32, or None
    CuSeqlensK,  # [B + 1] int32, or None
    Seed,  # [1] int64, or None
    do_strides,  # of batch, row and head, in UNITs; like those of Q to dV
    q_strides,
    k_strides,
    v_strides,
    dq_strides,
    dk_strides,
    dv_strides,
    row_stride,  # of RowShift's second to last dimension
    key_stride,  # of KeyMask's batch
    pair_strides,
    pair_columns,
    batch,
    heads,
    key_blocks,
    seqlen_q,
    seqlen_k,
    tokens_q,
    tokens_k,
    scale: tl.float64,
    site,
    head_offset,
    threshold,
    keep_scale: tl.float64,
    TILE: tl.constexpr,
):
    """dK and dV; with dQ, which needs one tile to hold all keys, the whole backward pass.

    A program owns BLOCK_N keys of one head and walks over the queries. Its tiles of scores are
    transposed, [BLOCK_N, BLOCK_M], so that they are the left operands of both products as they are.
    A row of such a tile concerns no key but its own, so that the gradients of keys that do not
    count need only be set to zero at the end.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    dtype: tl.constexpr = sum_dtype(Q.dtype.element_ty)
    block, head, sequence = program_of(key_blocks, heads, False)
    place_q = Place(CuSeqlensQ, sequence, batch, tokens_q, seqlen_q)
    place_k = Place(CuSeqlensK, sequence, batch, tokens_k, seqlen_k)
    first_q, rows_q, end_m = sequence_of(place_q)
    first_k, rows_k, end_n = sequence_of(place_k)
    start_n = block * BLOCK_N
    if dQ is None:
        if start_n >= rows_k:
            return
    end_m = length_of(QueryLengths, sequence, end_m)
    end_n = length_of(KeyLengths, sequence, end_n)

    dOut = rows_of(dOut, do_strides, sequence, head, CuSeqlensQ, first_q, TILE.UNIT)
    Q = rows_of(Q, q_strides, sequence, head, CuSeqlensQ, first_q, TILE.UNIT)
    K = rows_of(K, k_strides, sequence, head, CuSeqlensK, first_k, TILE.UNIT)
    V = rows_of(V, v_strides, sequence, head, CuSeqlensK, first_k, TILE.UNIT)
    dK = rows_of(dK, dk_strides, sequence, head, CuSeqlensK, first_k, TILE.UNIT)
    dV = rows_of(dV, dv_strides, sequence, head, CuSeqlensK, first_k, TILE.UNIT)
    row = statistics_offset(row_stride, sequence, head, heads, CuSeqlensQ, first_q)
    if dQ is not None:
        dQ = rows_of(dQ, dq_strides, sequence, head, CuSeqlensQ, first_q, TILE.UNIT)
    else:
        Delta += row
    if RowScale is not None:
        RowScale += row
    statistics = Statistics(RowShift + row, RowScale, Delta)
    offset = pair_offset_of(pair_strides, sequence, head, TILE)
    key_offset = sequence.to(tl.int64) * key_stride
    _, _, pair_stride = pair_strides
    masks = Masks(KeyMask, key_offset, PairMask, offset, pair_stride, pair_columns)
    dropout = None
    if Seed is not None:
        dropout = dropout_of(Seed, site, head + head_offset, sequence, threshold)
    out_scale = tl.full([], scale * keep_scale, dtype) * has_choice(end_m, end_n, TILE)
    to_scores = score_scale(scale, dtype, TILE)

    n = start_n + tl.arange(0, BLOCK_N)
    counts = n < end_n
    added = None
    if KeyMask is not None:
        key_mask = load_mask(KeyMask + key_offset + n, counts, BLOCK_M)
        counts &= is_open(key_mask)
        if key_mask.dtype != tl.uint8:
            added = key_mask.to(dtype)
    if dQ is not None:  # no other key may reach dQ
        added = tl.where(counts, 0.0 if added is None else added, float("-inf")).to(dtype)
    k = load_tile(K, start_n, end_n, BLOCK_N, TILE, True)
    v = load_tile(V, start_n, end_n, BLOCK_N, TILE, True)
    dk = tl.zeros([BLOCK_N, padded(TILE.HEAD_DIM)], dtype)
    dv = tl.zeros([BLOCK_N, padded(TILE.HEAD_DIM)], dtype)

    query_blocks = tl.cdiv(end_m, BLOCK_M)
    if dQ is not None:  # whose every row is written
        query_blocks = tl.cdiv(rows_q, BLOCK_M)
    else:
        query_blocks = tl.where(tl.max(counts.to(tl.int32), 0) != 0, query_blocks, 0)
    first, whole = 0, 0  # the first block, and the first for which every key counts
    if TILE.IS_CAUSAL:
        first = tl.minimum(start_n // BLOCK_M, query_blocks)
        whole = tl.minimum(tl.cdiv(start_n + BLOCK_N - 1, BLOCK_M), query_blocks)
    if PairMask is not None or (TILE.IS_CAUSAL and dQ is not None):
        whole = query_blocks
    keys = Keys(k, v, start_n, to_scores, out_scale)
    ends = Ends(end_m, end_n, rows_q)
    if TILE.IS_CAUSAL or PairMask is not None:
        dk, dv = gather_from_queries(
            dk, dv, keys, added, Q, dOut, dQ, statistics, first, whole, masks, dropout, ends,
            TILE, True,
        )  # fmt: skip
    if PairMask is None and (dQ is None or not TILE.IS_CAUSAL):
        dk, dv = gather_from_queries(
            dk, dv, keys, added, Q, dOut, dQ, statistics, whole, query_blocks, masks, dropout, ends,
            TILE, False,
        )  # fmt: skip
    dk *= out_scale
    dv *= tl.full([], keep_scale, dtype)
    if dQ is None:
        dk = tl.where(counts[:, None], dk, 0.0)
        dv = tl.where(counts[:, None], dv, 0.0)
    store_rows(dK, dk, start_n, key_blocks, place_k, BLOCK_N, TILE)
    store_rows(dV, dv, start_n, key_blocks, place_k, BLOCK_N, TILE)


@triton.jit
def gather_from_queries(
    dk,  # [BLOCK_N, padded HEAD_DIM]
    dv,  # [BLOCK_N, padded HEAD_DIM]
    keys,
    added,  # [BLOCK_N] to the scores of each key, or None
    Q,
    dOut,
    dQ,  # or None
    statistics,
    first_block,
    end_block,
    masks,
    dropout,
    ends,  # of the queries and of the keys that count, and of all queries
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add dS^T Q and Z^T dO over blocks of queries; with dQ write dS K."""
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    for block in tl.range(first_block, end_block):
        start_m = block * BLOCK_M
        m = start_m + tl.arange(0, BLOCK_M)
        q = load_tile(Q, start_m, ends.m, BLOCK_M, TILE, True)
        do = load_tile(dOut, start_m, ends.m, BLOCK_M, TILE, True)
        shift = load_shared(statistics.RowShift + m, m < ends.m, float("inf"), BLOCK_M)
        if dQ is None:
            delta = load_shared(statistics.Delta + m, m < ends.m, 0.0, BLOCK_M)
        scores = product(keys.k, tl.trans(q), TILE)
        scores *= keys.to_scores  # [BLOCK_N, BLOCK_M]
        if MASKED:
            scores = masked_pairs(scores, masks, start_m, keys.start, ends, TILE, True)
        if added is not None:
            scores += added[:, None]
        probs = probability(scores - shift[None, :], TILE)
        if statistics.RowScale is not None:
            probs *= load_shared(statistics.RowScale + m, m < ends.m, 0.0, BLOCK_M)[None, :]
        dropped = probs
        if dropout is not None:
            keep = kept_transposed(dropout, start_m, keys.start, TILE)
            dropped = tl.where(keep, probs, 0.0)
        dv = product(dropped.to(do.dtype), do, TILE, dv)
        dp = product(keys.v, tl.trans(do), TILE)
        if dQ is not None:
            delta = tl.sum(dropped * dp, 0)
        if dropout is not None:
            ds = dropped * dp - probs * delta[None, :]
        else:
            ds = probs * (dp - delta[None, :])
        ds = ds.to(q.dtype)
        dk = product(ds, q, TILE, dk)
        if dQ is not None:
            dq = product(tl.trans(keys.k), ds, TILE)
            dq = tl.trans(dq * keys.out_scale)
            store_tile(dQ, dq, start_m, ends.rows, BLOCK_M, TILE)
    return dk, dv


@triton.jit
def load_shared(pointers, exists, other, BLOCK: tl.constexpr):
    """A vector that every thread needs whole, loaded once by all threads together.

    The gather changes no value. It keeps the compiler from letting each thread load all elements
    for itself, as Triton 3.6 does (7 instructions a score).
    """
    return tl.gather(tl.load(pointers, mask=exists, other=other), tl.arange(0, BLOCK), 0)
