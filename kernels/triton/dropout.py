"""Device functions of the dropout contract (``docs/dropout.md``): random words, lanes, rows.

They compute bit for bit what :mod:`fastattn.dropout` defines. Which eight elements share a call is
a grouping's choice; a kernel gives its tiles the shape in which one thread owns all eight.
"""

from __future__ import annotations

import triton
import triton.language as tl

HEADS = tl.constexpr(1 << 16)  # sites and heads share counter word 3
LANE = tl.constexpr((1 << 14) - 1)
PHILOX_ROUNDS = tl.constexpr(7)

#: The interpreter runs no inline assembly; what is spelled in it has a plain form beside it.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Philox4x32-7 (Salmon et al., SC 2011) of uint32 counters: four uint32 words.

    The counter words broadcast, and each round computes in the shape it has by then: what is the
    same for a whole row is computed once a row.
    """
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUNDS):
        product0 = wide_product(c0, 0xD2511F53)
        product2 = wide_product(c2, 0xCD9E8D57)
        c0 = (product2 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product2.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def wide_product(word, multiplier: tl.constexpr):
    """The 64-bit product of two 32-bit words.

    One instruction, spelled out: LLVM vectorises such products of neighbouring elements, and then
    splits each into a high and a low one.
    """
    if INTERPRETED:
        return word.to(tl.uint64) * multiplier
    else:
        return tl.inline_asm_elementwise(
            f"mul.wide.u32 $0, $1, {multiplier};", "=l,r", [word], tl.uint64, is_pure=True, pack=1
        )


@triton.jit
def is_kept(words, lane: tl.constexpr, threshold):
    """Whether ``lane`` (0 to 7) of every call is at least ``threshold``.

    Both are compared where the lane lies: in the low or the high half of its word.
    """
    half: tl.constexpr = 16 * (lane % 2)
    return (words[lane // 2] & (LANE << half)) >= (threshold << half).to(tl.uint32)


@triton.jit
def token_coordinates(row, row_mask, RowIndex, row_period, BATCH_FIRST: tl.constexpr):
    """(position, sequence) of memory rows, both uint32: :class:`fastattn.dropout.TokenRows`.

    row: numbers below 2**32. RowIndex: pointer to int32 logical rows, None where they are ``row``.
    """
    if RowIndex is not None:
        row = tl.load(RowIndex + row, mask=row_mask, other=0)
    row = row.to(tl.uint32)
    period = row_period.to(tl.uint32)
    outer = row // period
    inner = row - outer * period
    if BATCH_FIRST:
        return inner, outer
    else:
        return outer, inner


@triton.jit
def activation_words(seed, site, position, sequence, group):
    """The words that decide hidden features: columns eight apart share a call.

    Group 8 b + j, with j < 8, decides the columns 64 b + j + 8 lane of its row.
    """
    return philox(seed, position, group.to(tl.uint32), sequence, site.to(tl.uint32) * HEADS)


@triton.jit
def residual_words(seed, site, position, sequence, group):
    """The words that decide a residual branch: group g decides the columns 8 g + lane."""
    return philox(seed, position, group.to(tl.uint32), sequence, site.to(tl.uint32) * HEADS)


@triton.jit
def lanes_kept(words, lane, threshold):
    """Whether each of a tensor of lanes (0 to 7) is kept, as :func:`is_kept`; all three broadcast.

    Where a thread knows its lanes when it is compiled, choosing their words costs nothing.
    """
    low = lane % 2 == 0
    early = tl.where(lane < 2, words[0], words[1])
    word = tl.where(lane < 4, early, tl.where(lane < 6, words[2], words[3]))
    half = tl.where(low, LANE, LANE << 16).to(tl.uint32)
    return (word & half) >= tl.where(low, threshold, threshold << 16).to(tl.uint32)
