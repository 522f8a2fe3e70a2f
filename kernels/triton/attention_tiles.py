"""Device functions of the attention kernels: where rows lie, which keys count, what drops.

Positions m of queries and n of keys count from the start of a sequence, whether the batch is padded
or packed. What several functions take travels in named tuples: a Tile of what is known when a
kernel is compiled, and those that a kernel makes in its first lines.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.dropout import HEADS, INTERPRETED, LANE, philox

LOG2E = tl.constexpr(1.4426950408889634)
FLAGS = tl.constexpr(32)  # blocks of keys that one word of flags describes
ALL = tl.constexpr(1 << 30)  # blocks of a run without flags


class Tile(NamedTuple):
    """The shape of a program's work."""

    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    HEAD_DIM: int
    IS_CAUSAL: bool
    BASE_2: bool  # scores are in units of log 2, and rows have no RowScale
    PRECISION: str  # of products in fp32
    OWNS_ROW: bool  # a thread holds a row of a tile of scores (tensor memory), not rows m and m + 8
    WIDE: bool  # offsets inside a tile need 64 bits
    UNIT: int  # strides of rows count so many elements, which shows their alignment
    PAIR_UNIT: int  # and those of the mask of pairs so many
    PAIR_STRIDE: int  # between the columns of that mask: 1, or 0 where it broadcasts


class Place(NamedTuple):
    """A sequence in its batch."""

    CuSeqlens: tl.tensor | None  # where it is packed
    sequence: tl.tensor
    batch: tl.tensor  # how many sequences there are
    tokens: tl.tensor  # packed: how many rows there are in all
    seqlen: tl.tensor  # how many of its own may count


class Rows(NamedTuple):
    """The rows of one sequence and head."""

    X: tl.tensor  # to position 0
    stride: tl.tensor  # from row to row, in UNITs of elements, which shows their alignment


class Masks(NamedTuple):
    """The masks of one sequence and head."""

    KeyMask: tl.tensor | None
    key_offset: tl.tensor
    PairMask: tl.tensor | None
    pair_offset: tl.tensor
    row_stride: tl.tensor  # in PAIR_UNITs
    columns: tl.tensor  # in PAIR_UNITs


class Ends(NamedTuple):
    """Where the rows of a sequence end."""

    m: tl.tensor  # of the queries that count
    n: tl.tensor  # of the keys that count
    rows: tl.tensor | None = None  # of all queries, where one kernel writes all their gradients


class Run(NamedTuple):
    """Blocks of keys, one after the other."""

    first_block: tl.tensor
    flags: tl.tensor  # of those of a key mask: which of FLAGS blocks
    count: tl.tensor


class Dropout(NamedTuple):
    """What decides the dropout of one sequence and head."""

    seed: tl.tensor
    sequence: tl.tensor  # counter word 2
    site_and_head: tl.tensor  # counter word 3
    threshold: tl.tensor


@triton.constexpr_function
def padded(head_dim: int) -> int:
    """The columns of a tile: tensor cores want a power of two, 16 or more."""
    return max(16, triton.next_power_of_2(head_dim))


@triton.constexpr_function
def sum_dtype(dtype: tl.dtype) -> tl.dtype:
    """The dtype of sums and statistics of tiles in ``dtype``."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def product(a, b, TILE: tl.constexpr, acc=None):
    """``a`` times ``b``, added to ``acc``, in fp32 or wider."""
    dtype: tl.constexpr = sum_dtype(a.dtype)
    return tl.dot(a, b, acc, input_precision=TILE.PRECISION, out_dtype=dtype)


@triton.jit
def rounded_product(a, b):
    """``a`` times ``b``, rounded. The compiler joins other products with the sum they enter.

    So the largest score less the maximum is exactly 0, and a row of one key sums to exactly 1.
    """
    if INTERPRETED:
        return a * b
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=a.dtype, is_pure=True, pack=1
        )


@triton.jit
def score_scale(scale, dtype: tl.constexpr, TILE: tl.constexpr):
    """``scale``, in the unit that makes scores of products."""
    return tl.full([], scale * LOG2E if TILE.BASE_2 else scale, dtype)


@triton.jit
def exponential(score, TILE: tl.constexpr):
    return tl.exp2(score if TILE.BASE_2 else score * LOG2E)


@triton.jit
def probability(score, TILE: tl.constexpr):
    """The exponential of what is at most 0 but for rounding, which has no bound, like scores."""
    return exponential(tl.minimum(score, 0.0, propagate_nan=tl.PropagateNan.ALL), TILE)


# ------------------------------------------------------------------------------- where rows lie


@triton.jit
def program_of(n_blocks, heads, REVERSED: tl.constexpr):
    """(block, head, sequence) of this program: blocks fastest, so that a head stays in L2.

    REVERSED: last block first, where it has the most work.
    """
    program = tl.program_id(0)
    block = program % n_blocks
    if REVERSED:
        block = n_blocks - 1 - block
    return block, program // n_blocks % heads, program // n_blocks // heads


@triton.jit
def sequence_of(place):
    """(first row, how many rows there are, how many of them count) of a sequence.

    In a packed batch the first ``seqlen`` count. The rows after its last sequence are one more, of
    which none counts.
    """
    if place.CuSeqlens is not None:
        is_there = place.sequence < place.batch
        start = place.CuSeqlens + place.sequence
        first = tl.load(start)
        last = tl.load(start + 1, mask=is_there, other=place.tokens)
        return first, last - first, tl.where(is_there, tl.minimum(last - first, place.seqlen), 0)
    else:
        return 0, place.seqlen, place.seqlen


@triton.jit
def length_of(Lengths, sequence, length):
    """How many of a sequence's rows count, of ``length``."""
    if Lengths is not None:
        return tl.minimum(tl.load(Lengths + sequence), length)
    else:
        return length


@triton.jit
def rows_of(X, strides, sequence, head, CuSeqlens, first_row, UNIT: tl.constexpr):
    """The rows of a sequence and head of (B, S, H, D), or of packed (T, H, D)."""
    batch_stride, row_stride, head_stride = strides
    if CuSeqlens is not None:
        offset = first_row.to(tl.int64) * row_stride
    else:
        offset = sequence.to(tl.int64) * batch_stride
    return Rows(X + (offset + head.to(tl.int64) * head_stride) * UNIT, row_stride)


@triton.jit
def load_tile(rows, start, end, BLOCK: tl.constexpr, TILE: tl.constexpr, BOUNDED: tl.constexpr):
    """BLOCK rows from ``start`` on, [BLOCK, padded HEAD_DIM].

    Zero past HEAD_DIM and, if BOUNDED, from row ``end`` on.
    """
    row, column, offset = tile_offsets(start, rows.stride, BLOCK, TILE)
    if BOUNDED:
        return tl.load(rows.X + offset, mask=(row < end) & (column < TILE.HEAD_DIM), other=0.0)
    elif padded(TILE.HEAD_DIM) != TILE.HEAD_DIM:
        return tl.load(rows.X + offset, mask=column < TILE.HEAD_DIM, other=0.0)
    else:
        return tl.load(rows.X + offset)


@triton.jit
def store_tile(rows, tile, start, end, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Write the rows of ``tile`` that come before row ``end``."""
    row, column, offset = tile_offsets(start, rows.stride, BLOCK, TILE)
    mask = (row < end) & (column < TILE.HEAD_DIM)
    tl.store(rows.X + offset, tile.to(rows.X.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(rows, tile, start, n_blocks, place, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Write the rows of ``tile`` that there are.

    Rows of a packed sequence past ``seqlen`` have no program of their own: this one zeroes every
    n_blocks-th tile after its own. How many there are is found again, not kept in a register.
    """
    _, count, _ = sequence_of(place)
    store_tile(rows, tile, start, count, BLOCK, TILE)
    if place.CuSeqlens is not None:
        zeros = tl.zeros([BLOCK, padded(TILE.HEAD_DIM)], rows.X.dtype.element_ty)
        for i in tl.range(1, tl.cdiv(count - start, n_blocks * BLOCK)):
            store_tile(rows, zeros, start + i * n_blocks * BLOCK, count, BLOCK, TILE)


@triton.jit
def tile_offsets(start, stride, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """(row [BLOCK, 1], column [1, padded HEAD_DIM], offset) of a tile."""
    row = tl.arange(0, BLOCK)[:, None]
    if TILE.WIDE:
        row = row.to(tl.int64)
    column = tl.arange(0, padded(TILE.HEAD_DIM))[None, :]
    offset = start.to(tl.int64) * stride * TILE.UNIT + (row * (stride * TILE.UNIT) + column)
    return start + row, column, offset


@triton.jit
def statistics_offset(stride, sequence, head, heads, CuSeqlens, first_row):
    """Where position 0 of a sequence and head lies in (B, H, S), or in packed (H, T)."""
    if CuSeqlens is not None:
        return head.to(tl.int64) * stride + first_row
    else:
        return (sequence.to(tl.int64) * heads + head) * stride


# ------------------------------------------------------------------------------ which keys count


@triton.jit
def runs_of(masks, first_block, n_blocks, start_m, end, TILE: tl.constexpr):
    """Two runs of blocks of keys, of those from ``first_block`` on.

    The blocks of the first run count whole, for every query from ``start_m`` on and with nothing
    added. Of those of the second some key may not. With a key mask a run is of FLAGS blocks, and a
    block without a key that counts is in neither; without one flags mean nothing.
    """
    whole = end // TILE.BLOCK_N - first_block
    if TILE.IS_CAUSAL:
        whole = tl.minimum(whole, (start_m + 1) // TILE.BLOCK_N - first_block)
    if masks.PairMask is not None:
        whole *= 0
    if masks.KeyMask is not None:
        some, every = block_flags(masks.KeyMask + masks.key_offset, first_block, end, TILE.BLOCK_N)
        whole = tl.minimum(tl.maximum(whole, 0), FLAGS).to(tl.uint64)
        every &= ((tl.full([], 1, tl.uint64) << whole) - 1).to(tl.uint32)
        rest = some ^ (some & every)
        of_whole = Run(first_block, every, bit_count(every))
        return of_whole, Run(first_block, rest, bit_count(rest))
    else:
        none = tl.full([], 0, tl.uint32)
        rest = Run(first_block + whole, none, n_blocks - whole)
        return Run(first_block, none, whole), rest


@triton.jit
def start_of(run, i, flags, masks, BLOCK_N: tl.constexpr):
    """The first key of block number i of a run, whose first i flags are gone."""
    if masks.KeyMask is not None:
        i = lowest(flags)
    return (run.first_block + i) * BLOCK_N


@triton.jit
def block_flags(KeyMask, first_block, end, BLOCK_N: tl.constexpr):
    """Two words, a bit for each of FLAGS blocks: some key counts; all do, with nothing added."""
    block = tl.arange(0, FLAGS)
    n = ((first_block + block) * BLOCK_N)[:, None] + tl.arange(0, BLOCK_N)[None, :]
    mask = load_mask(KeyMask + n, n < end, BLOCK_N)
    some = tl.max(((n < end) & is_open(mask)).to(tl.int32), 1)
    every = tl.min(((n < end) & (mask == 0)).to(tl.int32), 1)
    bit = tl.full([FLAGS], 1, tl.uint32) << block.to(tl.uint32)
    return tl.sum(tl.where(some != 0, bit, 0)), tl.sum(tl.where(every != 0, bit, 0))


@triton.jit
def bit_count(word):
    """How many bits of a uint32 are set."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def lowest(flags):
    """The number of the lowest bit set: the exponent of that bit as a float."""
    bit = flags ^ (flags & (flags - 1))
    return (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def load_mask(pointers, exists, DEPTH: tl.constexpr):
    """A tile of a mask: uint8, not 0 where a key may not be attended to, or fp32 (fp64) to add.

    DEPTH: how many elements are summed by the product that probabilities under this mask enter.
    Triton (up to 3.7.1) lays the operands of a product out by the narrowest load that they come
    from. A byte, with the tl.join of dropout, asks for 32 elements in a row; a tile with 16 then
    never uses half of the operand (mended in triton #10645 and #11691). The maximum over one
    element computes nothing, and there the search for loads ends.
    """
    mask = tl.load(pointers, mask=exists, other=0)
    if mask.dtype != tl.uint8:
        return mask.to(sum_dtype(mask.dtype))
    elif DEPTH < 32:
        return tl.max(tl.expand_dims(mask, -1), -1).to(tl.uint8)
    else:
        return mask


@triton.jit
def is_open(mask):
    """Whether a key may be attended to at all."""
    if mask.dtype == tl.uint8:
        return mask == 0
    else:
        return mask != float("-inf")


@triton.jit
def apply_mask(scores, mask):
    """Scores under a tile of a mask that broadcasts."""
    if mask.dtype == tl.uint8:
        return tl.where(mask == 0, scores, float("-inf"))
    else:
        return scores + mask.to(scores.dtype)


@triton.jit
def pair_offset_of(pair_strides, sequence, head, TILE: tl.constexpr):
    """Where the matrix of a sequence and head lies in a (B|1, H|1, Sq|1, Sk|1) mask."""
    batch_stride, head_stride, _ = pair_strides
    offset = sequence.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    return offset * TILE.PAIR_UNIT


@triton.jit
def masked(scores, masks, start_m, start_n, ends, TILE: tl.constexpr):
    """A tile of scores under every mask, -inf where a key does not count."""
    scores = masked_pairs(scores, masks, start_m, start_n, ends, TILE, False)
    n = start_n + tl.arange(0, TILE.BLOCK_N)[None, :]
    if masks.KeyMask is not None:
        pointers = masks.KeyMask + masks.key_offset + n
        key_mask = load_mask(pointers, n < ends.n, TILE.BLOCK_N)
        scores = apply_mask(scores, key_mask)
    return tl.where(n < ends.n, scores, float("-inf"))


@triton.jit
def masked_pairs(
    scores, masks, start_m, start_n, ends, TILE: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """A tile of scores, [BLOCK_M, BLOCK_N] or TRANSPOSED, under the masks of pairs alone."""
    m, n = tl.arange(0, TILE.BLOCK_M), tl.arange(0, TILE.BLOCK_N)
    if TRANSPOSED:
        m, n = m[None, :], n[:, None]
    else:
        m, n = m[:, None], n[None, :]
    if TILE.WIDE:
        m = m.to(tl.int64)
    if masks.PairMask is not None:
        UNIT: tl.constexpr = TILE.PAIR_UNIT
        offset = masks.pair_offset
        offset += start_m.to(tl.int64) * masks.row_stride * UNIT + start_n * TILE.PAIR_STRIDE
        exists = (start_m + m < ends.m) & (start_n + n < masks.columns * UNIT)
        inside = m * (masks.row_stride * UNIT) + n * TILE.PAIR_STRIDE
        pointers = masks.PairMask + offset + inside
        DEPTH: tl.constexpr = TILE.BLOCK_M if TRANSPOSED else TILE.BLOCK_N
        scores = apply_mask(scores, load_mask(pointers, exists, DEPTH))
    if TILE.IS_CAUSAL:
        scores = tl.where(start_n + n <= start_m + m, scores, float("-inf"))
    return scores


# ------------------------------------------------------------------------------------ what drops


@triton.jit
def dropout_of(Seed, site, head, sequence, threshold):
    site_and_head = site.to(tl.uint32) * HEADS + head.to(tl.uint32)
    return Dropout(tl.load(Seed), sequence.to(tl.uint32), site_and_head, threshold.to(tl.uint32))


@triton.jit
def drop_words(dropout, start_m, start_n, TILE: tl.constexpr):
    """The random word of every score of a tile, [BLOCK_M, BLOCK_N].

    A call decides rows m, m + 8 and columns n, n + 1, n + 8, n + 9. In an accumulator of tensor
    cores one thread holds all eight, so that no word travels. In tensor memory a thread owns a row
    (OWNS_ROW): there it makes the calls of its row alone, and uses half of their words.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    column = (start_n // 4 + tl.arange(0, BLOCK_N // 4))[None, :].to(tl.uint32)
    if TILE.OWNS_ROW:
        m = start_m + tl.arange(0, BLOCK_M)[:, None]
        row = (m // 16 * 8 + m % 8).to(tl.uint32)
        a, b, c, d = philox(dropout.seed, row, column, dropout.sequence, dropout.site_and_head)
        upper = m // 8 % 2 == 0
        return spread_columns(tl.where(upper, a, c), tl.where(upper, b, d), BLOCK_M, BLOCK_N)
    else:
        row = (start_m // 2 + tl.arange(0, BLOCK_M // 2))[:, None].to(tl.uint32)
        a, b, c, d = philox(dropout.seed, row, column, dropout.sequence, dropout.site_and_head)
        upper = spread_columns(a, b, BLOCK_M // 2, BLOCK_N)
        lower = spread_columns(c, d, BLOCK_M // 2, BLOCK_N)
        return interleave_rows(upper, lower, BLOCK_M, BLOCK_N)


@triton.jit
def spread_columns(left, right, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] from the words of columns n, n + 1 and of n + 8, n + 9."""
    words = tl.join(tl.join(left, right), tl.join(left, right))
    words = words.reshape(ROWS, COLUMNS // 16, 4, 2, 2).permute(0, 1, 3, 2, 4)
    return words.reshape(ROWS, COLUMNS)


@triton.jit
def interleave_rows(upper, lower, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] from the rows m and m + 8 of every sixteen."""
    words = tl.join(upper, lower).reshape(ROWS // 16, 8, COLUMNS, 2)
    return words.permute(0, 3, 1, 2).reshape(ROWS, COLUMNS)


@triton.jit
def kept(dropout, start_m, start_n, TILE: tl.constexpr):
    """Which scores of a tile are kept: column n is decided by half n % 2 of its word."""
    words = drop_words(dropout, start_m, start_n, TILE)
    return is_kept(words, tl.arange(0, TILE.BLOCK_N)[None, :], dropout.threshold)


@triton.jit
def is_kept(words, n, threshold):
    half = 16 * (n % 2).to(tl.uint32)
    return (words & (LANE << half)) >= (threshold << half)


@triton.jit
def drop(probs, dropout, start_m, start_n, dtype: tl.constexpr, TILE: tl.constexpr):
    """Probabilities in ``dtype``, zero where they are dropped.

    A lane of 14 bits is a positive half-precision number, and such are ordered as their bits are.
    So one instruction compares the two lanes of a word, and one clears a pair of results.
    """
    if INTERPRETED or dtype.primitive_bitwidth != 16:
        return tl.where(kept(dropout, start_m, start_n, TILE), probs, 0.0).to(dtype)
    else:
        words = drop_words(dropout, start_m, start_n, TILE)
        probs = probs.to(dtype)
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 lanes;
            and.b32 lanes, $2, 0x3fff3fff;
            set.ge.u32.f16x2 lanes, lanes, $4;
            and.b32 $0, $1, lanes;
            }""",
            "=r,r,r,r,r,r",
            [probs, words, dropout.threshold * 0x10001],
            dtype=probs.dtype,
            is_pure=True,
            pack=2,
        )


@triton.jit
def kept_transposed(dropout, start_m, start_n, TILE: tl.constexpr):
    """The decisions of a transposed tile, [BLOCK_N, BLOCK_M].

    A thread holds rows n, n + 8 and columns m, m + 8 of a call there: four of its eight lanes.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    n = tl.arange(0, BLOCK_N // 2)[:, None]
    n = n // 8 * 16 + n % 8  # those with n // 8 even
    column = (start_n // 4 + n // 16 * 4 + n % 8 // 2).to(tl.uint32)
    row = (start_m // 2 + tl.arange(0, BLOCK_M // 2))[None, :].to(tl.uint32)
    a, b, c, d = philox(dropout.seed, row, column, dropout.sequence, dropout.site_and_head)
    upper = tl.join(a, c).reshape(BLOCK_N // 2, BLOCK_M // 16, 8, 2).permute(0, 1, 3, 2)
    lower = tl.join(b, d).reshape(BLOCK_N // 2, BLOCK_M // 16, 8, 2).permute(0, 1, 3, 2)
    upper = upper.reshape(BLOCK_N // 2, BLOCK_M)
    lower = lower.reshape(BLOCK_N // 2, BLOCK_M)
    words = interleave_rows(upper, lower, BLOCK_N, BLOCK_M)
    return is_kept(words, tl.arange(0, BLOCK_N)[:, None], dropout.threshold)
