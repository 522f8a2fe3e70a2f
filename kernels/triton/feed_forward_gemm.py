"""The feed-forward block with its middle in the epilogues of two matrix products.

The hidden features meet bias, activation and dropout while they are still fp32 sums in registers.
So forward neither writes nor reads them between two kernels, and backward not their gradient.

The dropout contract decides the columns n, n + 8, ..., n + 56 of a block of 64 by one call of
Philox. Tiles are a multiple of 64 columns wide and all warps lie along the rows, so that the thread
that holds one of these accumulators of a row holds all eight: no decision travels by itself.
(Triton lays the warps of a lone ``mma.sync`` in both directions, those of products in a chain along
the rows.)
"""

from __future__ import annotations

import contextvars
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.arguments import FeedForwardArguments, TokenDropout
from fastattn.kernels.activations import activate, activation_backward
from fastattn.kernels.column_sums import sum_parts
from fastattn.kernels.device import capability, multiprocessors
from fastattn.kernels.dropout import INTERPRETED, LANE, activation_words, token_coordinates
from fastattn.kernels.feed_forward import FeedForward
from fastattn.kernels.launch import dropout_arguments

ALIGNMENT = 16  # bytes, of the rows of a factor
GROUP_M = tl.constexpr(8)  # tiles below each other that are made together, for the L2 cache

#: Integers of which no value deserves a kernel of its own.
_RUNTIME = ["n_rows", "first_group", "site", "threshold", "row_period"]


class Config(NamedTuple):
    """A tile of a product, the warps and pipeline stages that make it, and its epilogue's steps."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    CHAIN: int  # products a step of the loop makes, one after the other, each of depth BLOCK_K
    num_warps: int
    num_stages: int
    PARTS: int  # 1, 2 or 4, whose epilogues follow each other: registers do not hold all at once
    BY_ROWS: bool  # how a tile is cut into them: without moving a value between threads


# ---------------------------------------------------------------------------------------- tiles


@triton.jit
def tile_origin(tile, n_rows, n_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of a tile; GROUP_M tiles above each other come one after the other."""
    down, across = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_columns, BLOCK_N)
    first = tile // (across * GROUP_M) * GROUP_M
    height = min(down - first, GROUP_M)
    inside = tile % (across * GROUP_M)
    return (first + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def matrix(Data, rows, columns, stride, TMA: tl.constexpr, ROWS: tl.constexpr, COLUMNS):
    """A matrix of tiles [ROWS, COLUMNS]: a tensor descriptor, or a pointer with what it needs."""
    if TMA:
        return tl.make_tensor_descriptor(Data, [rows, columns], [stride, 1], [ROWS, COLUMNS])
    else:
        return Data, rows, columns, stride


@triton.jit
def load(m, row, column, TMA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of a matrix, zero outside."""
    if TMA:
        return m.load([row, column])
    else:
        Data, n_rows, n_columns, stride = m
        r, c = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
        place = r.to(tl.int64) * stride + c
        return tl.load(Data + place, mask=(r < n_rows) & (c < n_columns), other=0.0)


@triton.jit
def store(m, row, column, tile, TMA: tl.constexpr):
    if TMA:
        m.store([row, column], tile)
    else:
        Data, n_rows, n_columns, stride = m
        r = row + tl.arange(0, tile.shape[0])[:, None]
        c = column + tl.arange(0, tile.shape[1])[None, :]
        place = r.to(tl.int64) * stride + c
        tl.store(Data + place, tile, mask=(r < n_rows) & (c < n_columns))


@triton.jit
def halves(tile, BY_ROWS: tl.constexpr):
    """The upper and the lower half of a tile, or the left and the right one."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    if BY_ROWS:
        return tl.split(tl.permute(tl.reshape(tile, (2, rows // 2, columns)), (1, 2, 0)))
    else:
        return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit
def parts_of(tile, PARTS: tl.constexpr, BY_ROWS: tl.constexpr):
    """The tile itself, or its two or four equal parts in order."""
    if PARTS == 1:
        return (tile,)
    elif PARTS == 2:
        return halves(tile, BY_ROWS)
    else:
        tl.static_assert(PARTS == 4)
        one, two = halves(tile, BY_ROWS)
        first, second = halves(one, BY_ROWS)
        third, fourth = halves(two, BY_ROWS)
        return first, second, third, fourth


@triton.jit
def in_threads_of(sums, tile):
    """``tile``, each element in the thread that has that of ``sums``: no instruction.

    Both are fp32. Otherwise what is made of a loaded tile alone stays where the load put it, and
    decisions have to travel.
    """
    if INTERPRETED or sums.dtype == tl.float64:
        return tile
    else:
        _, tile = tl.inline_asm_elementwise(
            "mov.b32 $0, $2; mov.b32 $1, $3;",
            "=r,=r,r,r",
            [sums, tile],
            (tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
        return tile


class Dropout(NamedTuple):
    """What decides the dropout of a call."""

    seed: tl.tensor
    site: tl.tensor
    threshold: tl.tensor
    n_rows: tl.tensor
    first_group: tl.tensor  # of eight columns each
    RowIndex: tl.tensor | None
    row_period: tl.tensor


@triton.jit
def tile_kept(
    dropout, row, column, BATCH_FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """[ROWS, COLUMNS]: what the contract keeps. Words become columns by renaming alone."""
    rows = row + tl.arange(0, ROWS)[:, None]
    position, sequence = token_coordinates(
        rows, rows < dropout.n_rows, dropout.RowIndex, dropout.row_period, BATCH_FIRST
    )
    groups = dropout.first_group + column // 8 + tl.arange(0, COLUMNS // 8)[None, :]
    w0, w1, w2, w3 = activation_words(dropout.seed, dropout.site, position, sequence, groups)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # [..., i, k] is word 2 k + i
    lanes = tl.join(words << 16, words) & (LANE << 16)  # [..., i, k, h] is lane 4 k + 2 i + h
    lanes = tl.reshape(lanes, (ROWS, COLUMNS // 64, 8, 2, 2, 2))
    lanes = tl.permute(lanes, (0, 1, 4, 3, 5, 2))
    return tl.reshape(lanes, (ROWS, COLUMNS)) >= (dropout.threshold << 16).to(tl.uint32)


@triton.jit
def marked(sums, kept):
    """``sums`` with -0 for what is not kept, which x + 0 never is: decisions travel with them."""
    bits: tl.constexpr = tl.int64 if sums.dtype == tl.float64 else tl.int32
    kept_bits = (sums + 0.0).to(bits, bitcast=True)
    return tl.where(kept, kept_bits, negative_zero(bits)).to(sums.dtype, bitcast=True)


@triton.jit
def is_kept(sums):
    """The decisions of ``marked``, wherever its sums have gone."""
    bits: tl.constexpr = tl.int64 if sums.dtype == tl.float64 else tl.int32
    return sums.to(bits, bitcast=True) != negative_zero(bits)


@triton.jit
def negative_zero(bits: tl.constexpr):
    """Its bits; a literal -0.0 would become 0."""
    return tl.full([], 1, bits) << (bits.primitive_bitwidth - 1)


# -------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=_RUNTIME)
def feed_forward_activate_kernel(
    X,  # [n_rows, depth]
    W,  # [n_columns, depth]
    Bias,  # [n_columns]
    H,  # [n_rows, n_columns], contiguous, or None
    A,  # [n_rows, n_columns], contiguous
    Seed,  # [1] int64, or None: nothing drops
    RowIndex,  # [n_rows] int32, or None
    n_rows,
    n_columns,
    depth,
    left_stride,
    right_stride,
    first_group,
    site,
    threshold,
    scale: tl.float64,
    row_period,
    BATCH_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHAIN: tl.constexpr,
    PARTS: tl.constexpr,
    BY_ROWS: tl.constexpr,
):
    """h = x w^T + b and a = m * act(h), with m = scale where the contract keeps an element, else 0.

    A program makes one tile of a after another; sums stay in registers until a is rounded.
    """
    dtype: tl.constexpr = tl.float64 if A.dtype.element_ty == tl.float64 else tl.float32
    PART_M: tl.constexpr = BLOCK_M // PARTS if BY_ROWS else BLOCK_M
    PART_N: tl.constexpr = BLOCK_N if BY_ROWS else BLOCK_N // PARTS
    x = matrix(X, n_rows, depth, left_stride, TMA, BLOCK_M, BLOCK_K)
    w = matrix(W, n_columns, depth, right_stride, TMA, BLOCK_N, BLOCK_K)
    a = matrix(A, n_rows, n_columns, n_columns, TMA, PART_M, PART_N)
    if H is not None:
        h = matrix(H, n_rows, n_columns, n_columns, TMA, PART_M, PART_N)
    if Seed is not None:
        seed = tl.load(Seed)
        dropout = Dropout(seed, site, threshold, n_rows, first_group, RowIndex, row_period)
        scale = tl.full([], scale, dtype)
    tiles = tl.cdiv(n_rows, BLOCK_M) * tl.cdiv(n_columns, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_row, first_column = tile_origin(tile, n_rows, n_columns, BLOCK_M, BLOCK_N)
        sums = tl.zeros([BLOCK_M, BLOCK_N], dtype)
        for first_k in range(0, depth, CHAIN * BLOCK_K):
            for k in tl.static_range(0, CHAIN * BLOCK_K, BLOCK_K):
                left = load(x, first_row, first_k + k, TMA, BLOCK_M, BLOCK_K)
                right = load(w, first_column, first_k + k, TMA, BLOCK_N, BLOCK_K)
                sums = tl.dot(left, right.T, sums, input_precision=PRECISION, out_dtype=dtype)
        parts = parts_of(sums, PARTS, BY_ROWS)
        for i in tl.static_range(PARTS):
            row = first_row + (i * PART_M if BY_ROWS else 0)
            column = first_column + (0 if BY_ROWS else i * PART_N)
            columns = column + tl.arange(0, PART_N)
            bias = tl.load(Bias + columns, mask=columns < n_columns, other=0.0)
            part = parts[i] + bias.to(dtype)[None, :]
            if H is not None:
                store(h, row, column, part.to(H.dtype.element_ty), TMA)
            part = activate(part, ACTIVATION)
            if Seed is not None:
                kept = tile_kept(dropout, row, column, BATCH_FIRST, PART_M, PART_N)
                part = tl.where(kept, part, 0.0) * scale
            store(a, row, column, part.to(A.dtype.element_ty), TMA)


@triton.jit(do_not_specialize=_RUNTIME)
def feed_forward_hidden_gradient_kernel(
    dY,  # [n_rows, depth]
    W,  # [depth, n_columns]
    Saved,  # [n_rows, n_columns], contiguous: a if FROM_OUTPUT, else h
    dH,  # like Saved
    A,  # like Saved, or None: m * act(h) again; may be Saved
    dBiasParts,  # [parts along the rows, n_columns]
    Seed,  # [1] int64, or None: nothing drops
    RowIndex,  # [n_rows] int32, or None
    n_rows,
    n_columns,
    depth,
    left_stride,
    right_stride,
    first_group,
    site,
    threshold,
    scale: tl.float64,
    row_period,
    BATCH_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHAIN: tl.constexpr,
    PARTS: tl.constexpr,
    BY_ROWS: tl.constexpr,
):
    """dh = m * (dy w) * act'(h), with the m of forward made again, and the column sums of tiles.

    From the output of relu it is scale * (dy w) where a is not zero. A program works as in
    ``feed_forward_activate_kernel``.
    """
    tl.static_assert(not FROM_OUTPUT or (ACTIVATION == "relu" and Seed is None and A is None))
    dtype: tl.constexpr = tl.float64 if dH.dtype.element_ty == tl.float64 else tl.float32
    PART_M: tl.constexpr = BLOCK_M // PARTS if BY_ROWS else BLOCK_M
    PART_N: tl.constexpr = BLOCK_N if BY_ROWS else BLOCK_N // PARTS
    dy = matrix(dY, n_rows, depth, left_stride, TMA, BLOCK_M, BLOCK_K)
    w = matrix(W, depth, n_columns, right_stride, TMA, BLOCK_K, BLOCK_N)
    s = matrix(Saved, n_rows, n_columns, n_columns, TMA, PART_M, PART_N)
    dh = matrix(dH, n_rows, n_columns, n_columns, TMA, PART_M, PART_N)
    if A is not None:
        a = matrix(A, n_rows, n_columns, n_columns, TMA, PART_M, PART_N)
    if Seed is not None:
        seed = tl.load(Seed)
        dropout = Dropout(seed, site, threshold, n_rows, first_group, RowIndex, row_period)
    scale = tl.full([], scale, dtype)
    tiles = tl.cdiv(n_rows, BLOCK_M) * tl.cdiv(n_columns, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_row, first_column = tile_origin(tile, n_rows, n_columns, BLOCK_M, BLOCK_N)
        sums = tl.zeros([BLOCK_M, BLOCK_N], dtype)
        for first_k in range(0, depth, CHAIN * BLOCK_K):
            for k in tl.static_range(0, CHAIN * BLOCK_K, BLOCK_K):
                left = load(dy, first_row, first_k + k, TMA, BLOCK_M, BLOCK_K)
                right = load(w, first_k + k, first_column, TMA, BLOCK_K, BLOCK_N)
                sums = tl.dot(left, right, sums, input_precision=PRECISION, out_dtype=dtype)
        parts = parts_of(sums, PARTS, BY_ROWS)
        for i in tl.static_range(PARTS):
            row = first_row + (i * PART_M if BY_ROWS else 0)
            column = first_column + (0 if BY_ROWS else i * PART_N)
            part = parts[i]
            saved = load(s, row, column, TMA, PART_M, PART_N).to(dtype)
            if FROM_OUTPUT:
                gradient = tl.where(saved == 0.0, 0.0, part) * scale
            else:
                if Seed is not None and not TMA:  # sums go to the threads that read what was saved
                    kept = tile_kept(dropout, row, column, BATCH_FIRST, PART_M, PART_N)
                    part = marked(part, kept)
                saved = in_threads_of(part, saved)
                gradient = activation_backward(part, saved, ACTIVATION)
                if A is not None:
                    again = activate(saved, ACTIVATION)
                if Seed is not None:
                    if TMA:
                        kept = tile_kept(dropout, row, column, BATCH_FIRST, PART_M, PART_N)
                    else:
                        kept = is_kept(part)
                    gradient = tl.where(kept, gradient, 0.0) * scale
                    if A is not None:
                        again = tl.where(kept, again, 0.0) * scale
                if A is not None:
                    store(a, row, column, again.to(A.dtype.element_ty), TMA)
            store(dh, row, column, gradient.to(dH.dtype.element_ty), TMA)
            columns = column + tl.arange(0, PART_N)
            place = (row // PART_M).to(tl.int64) * n_columns + columns
            tl.store(dBiasParts + place, tl.sum(gradient, 0), mask=columns < n_columns)


# ------------------------------------------------------------------------------------- launchers


class FusedProducts(FeedForward):
    """The block whose steps around the activation are products with an epilogue."""

    def hidden(self, input: Tensor, arguments: FeedForwardArguments) -> Tensor:
        plain = arguments._replace(activation="identity", dropout=TokenDropout())
        return self.activate(input, plain, None)

    def activate(
        self, input: Tensor, arguments: FeedForwardArguments, hidden: Tensor | None
    ) -> Tensor:
        weight1, bias1, _, _, activation, dropout = arguments
        a = input.new_empty(input.shape[0], weight1.shape[0]) if hidden is None else hidden
        h = None
        if hidden is not None and activation != "relu":
            a, h = torch.empty_like(hidden), hidden
        if a.numel() == 0:
            return a
        bias1 = a.new_zeros(a.shape[1]) if bias1 is None else bias1.contiguous()
        config = _config(a, activation == "relu")
        _launch(
            feed_forward_activate_kernel,
            (_aligned(input), _aligned(weight1)),
            a,
            config,
            (bias1, h, a),
            dropout,
            ACTIVATION=activation,
        )
        return a

    def hidden_gradient(
        self,
        grad_out: Tensor,
        arguments: FeedForwardArguments,
        hidden: Tensor | None,
        activated: Tensor | None,
        want_bias1: bool,
    ) -> tuple[Tensor, Tensor | None]:
        _, _, weight2, _, activation, dropout = arguments
        from_output = activation == "relu"
        saved, again = (activated, None) if from_output else (hidden, activated)
        dropout = TokenDropout(dropout.dropout_p) if from_output else dropout
        d_hidden = torch.empty_like(saved)
        wide = torch.promote_types(saved.dtype, torch.float32)
        config = _config(saved, False)
        n_parts = triton.cdiv(saved.shape[0], config.BLOCK_M) * (
            config.PARTS if config.BY_ROWS else 1
        )
        parts = saved.new_empty(n_parts, saved.shape[1], dtype=wide)
        d_bias1 = saved.new_empty(saved.shape[1], dtype=wide) if want_bias1 else None
        if saved.numel() == 0:
            return d_hidden, None if d_bias1 is None else d_bias1.zero_()
        _launch(
            feed_forward_hidden_gradient_kernel,
            (_aligned(grad_out), _aligned(weight2)),
            saved,
            config,
            (saved, d_hidden, again, parts),
            dropout,
            ACTIVATION=activation,
            FROM_OUTPUT=from_output,
        )
        if want_bias1:
            with torch.cuda.device_of(saved):
                sum_parts((parts,), (d_bias1,))
        return d_hidden, d_bias1


_block = FusedProducts()
feed_forward_forward = _block.feed_forward_forward
feed_forward_backward = _block.feed_forward_backward


def _config(hidden: Tensor, has_light_epilogue: bool) -> Config:
    """The tile for an architecture: the widest that does not spill, nor exchange for dropout."""
    major = capability(hidden.device)[0]
    if major == 9:
        return Config(128, 256, 64, 1, 8, 3, 4, BY_ROWS=False)
    if major == 10:
        return Config(128, 256 if has_light_epilogue else 128, 64, 1, 8, 3, 1, BY_ROWS=False)
    return Config(256, 64, 32, 2, 8, 3, 2, BY_ROWS=True)


def _launch(
    kernel: Any,
    factors: tuple[Tensor, Tensor],
    hidden: Tensor,
    config: Config,
    tensors: tuple[Tensor | None, ...],
    dropout: TokenDropout,
    **constants: Any,
) -> None:
    """Run a kernel on the tiles of (tokens, d_ff) tensors.

    Args:
        factors: of the product, the kernel's first two arguments.
        hidden: a tensor of the hidden width.
        tensors: the kernel's other tensors.
    """
    n_rows, n_columns = hidden.shape
    tiles = triton.cdiv(n_rows, config.BLOCK_M) * triton.cdiv(n_columns, config.BLOCK_N)
    device = hidden.device
    arguments = {
        **dropout_arguments(dropout),
        "n_rows": n_rows,
        "n_columns": n_columns,
        "depth": factors[0].shape[1],
        "left_stride": factors[0].stride(0),
        "right_stride": factors[1].stride(0),
        "first_group": dropout.column_offset // 8,
        "PRECISION": "ieee",
        "TMA": capability(device)[0] in (9, 10),
        **config._asdict(),
        **constants,
    }

    def run() -> None:
        triton.set_allocator(lambda size, *_: hidden.new_empty(size, dtype=torch.int8))
        kernel[(min(tiles, multiprocessors(device)),)](*factors, *tensors, **arguments)

    with torch.cuda.device_of(hidden):
        contextvars.copy_context().run(run)  # so that the allocator is nobody else's


def _aligned(x: Tensor) -> Tensor:
    """(rows, columns) as descriptors and wide loads take it: a copy where it lies otherwise."""
    adjacent = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    aligned = x.data_ptr() % ALIGNMENT == 0 == x.stride(0) * x.element_size() % ALIGNMENT
    return x if adjacent and aligned else x.clone(memory_format=torch.contiguous_format)
