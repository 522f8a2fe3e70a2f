"""Kernels that are right or wrong by what they are given."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy(X, Out, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    tl.store(Out + offsets, tl.load(X + offsets, mask=mask, other=0.0), mask=mask)


@triton.jit
def copy_rows(X, Out, x_stride, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(X + row * x_stride + columns, mask=mask, other=0.0)
    tl.store(Out + row * out_stride + columns, x, mask=mask)


@triton.jit
def copy_cube(X, Out, BLOCK: tl.constexpr):
    row = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    plane = tl.num_programs(0) * tl.num_programs(1)
    offsets = (tl.program_id(2) * plane + row) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Out + offsets, tl.load(X + offsets))


@triton.jit
def copy_described(X, Out, column):
    Out.store([0, 0], X.load([0, column]))


@triton.jit
def shift_left(X, Out, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + offsets + 1, mask=offsets + 1 < numel, other=0.0)
    tl.store(Out + offsets, x, mask=offsets < numel)


@triton.jit
def total(X, Out, numel, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.sum(tl.load(X + offsets, mask=offsets < numel, other=0.0))
    if ATOMIC:
        tl.atomic_add(Out, x)
    else:
        tl.store(Out, x)


@triton.jit
def touch(X, ACTION: tl.constexpr):
    if ACTION == "load":
        tl.device_assert(tl.load(X) >= 0)
    elif ACTION == "store":
        tl.store(X, 1)
    elif ACTION == "atomic":
        tl.atomic_add(X, 1)


@triton.jit
def touch_in_turn(X, FIRST: tl.constexpr, THEN: tl.constexpr, LAST: tl.constexpr):
    if tl.program_id(0) == 0:
        touch(X, FIRST)
    else:
        touch(X, THEN)
        touch(X, LAST)


@triton.jit
def increment_with_swap(Counter):
    tl.atomic_cas(Counter, tl.program_id(0), tl.program_id(0) + 1)


@triton.jit
def gather(X, Index, Out, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Out + lanes, tl.load(X + tl.load(Index + lanes)))


@triton.jit
def scatter(Index, Out, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Out + tl.load(Index + lanes), lanes)


@triton.jit
def load_int32_from_bytes(Bytes, Out, shift):
    words = (Bytes + shift).to(tl.pointer_type(tl.int32))
    tl.store(Out, tl.load(words))


@triton.jit
def store_bytes_of_int32(Out):
    tl.store(Out.to(tl.pointer_type(tl.int8)) + tl.arange(0, 4), tl.arange(0, 4).to(tl.int8))


@triton.jit
def load_from_address(Address, Out):
    tl.store(Out, tl.load(tl.load(Address).to(tl.pointer_type(tl.float32))))


@triton.jit
def load_from_either(X, Y, Out, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = X + tl.zeros((BLOCK,), tl.int32)
    y = Y + tl.zeros((BLOCK,), tl.int32)
    tl.store(Out + lanes, tl.load(tl.where(lanes % 2 == 0, x, y) + lanes))


@triton.jit
def load_column(X, Out, stride, BLOCK: tl.constexpr, WIDE: tl.constexpr, WRAPS: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    if WRAPS:
        start = tl.mul(row, stride, sanitize_overflow=False)
    else:
        start = row * stride
    columns = tl.arange(0, BLOCK)
    tl.store(Out + tl.program_id(0) * BLOCK + columns, tl.load(X + start + columns))


@triton.jit
def multiply_hashes(X, Out):
    tl.store(Out, tl.load(X).to(tl.uint32) * 0x9E3779B9)


@triton.jit
def check_small(X, limit, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.device_assert(tl.load(X + lanes) < limit, "x is too large")


@triton.jit
def assume_positive(X):
    tl.assume(tl.load(X) > 0)


@triton.jit
def load_beyond(X, lanes):
    return tl.load(X + lanes + 1)


@triton.jit
def call_device_function(X, Out, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(Out + lanes, load_beyond(X, lanes))


@triton.jit
def raise_value_error(X):
    tl.reshape(tl.arange(0, 4), (3,))


@triton.jit
def cast(X, Out, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    tl.store(Out + offsets, tl.load(X + offsets, mask=mask).to(Out.dtype.element_ty), mask=mask)


@triton.jit
def cast_towards_zero(X, Out, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(Out + lanes, tl.load(X + lanes).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def matmul(A, B, Out, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    a = tl.load(A + rows * BLOCK + columns)
    b = tl.load(B + rows * BLOCK + columns)
    before = tl.load(Out + rows * BLOCK + columns)
    product = tl.dot(a, b, before, input_precision="ieee", out_dtype=Out.dtype.element_ty)
    tl.store(Out + rows * BLOCK + columns, product)


@triton.jit
def sum_rows(X, Out, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    x = tl.load(X + rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
    tl.store(Out + rows, tl.sum(x, 1))


@triton.jit
def scale(X, Out, factor, BLOCK: tl.constexpr, OPERATION: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(X + lanes)
    if OPERATION == "add":
        y = x + x
    elif OPERATION == "less":
        y = tl.where(x < x, x, x)
    elif OPERATION == "sum":
        y = tl.sum(x, 0) + tl.zeros((BLOCK,), tl.float32)
    elif OPERATION == "fma":
        y = tl.fma(x, x, x)
    elif OPERATION == "atomic":
        tl.atomic_add(Out + lanes, x)
        y = tl.load(Out + lanes)
    elif OPERATION == "select":
        y = tl.where(lanes % 2 == 0, x, tl.full((BLOCK,), 1.5, x.dtype))
    elif OPERATION == "abs":
        y = tl.abs(x)
    else:
        y = x.to(tl.float32) * factor
    tl.store(Out + lanes, y.to(Out.dtype.element_ty))
