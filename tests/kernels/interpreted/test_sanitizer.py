"""The sanitizer finds planted faults of every kind, and nothing in their correct twins."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.kernels.interpreted.sanitizer import POISON_LIMIT, Sanitizer, Violation, bfloat16_bits

VERBS = {"load": "loaded", "store": "stored", "atomic": "updated atomically"}

# Kernels that are right or wrong by what they are given.


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


# Out of bounds.


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_a_correct_copy_passes(sanitizer: Sanitizer, dtype: torch.dtype) -> None:
    x = torch.randn(50).to(dtype)
    out = torch.empty_like(x)
    copy[(4,)](x, out, 50, BLOCK=16)
    assert torch.equal(out, x)
    sanitizer.assert_written(out)


def test_load_past_the_end() -> None:
    x, out = torch.randn(50), torch.empty(64)
    message = (
        r"^copy, program \(3, 0, 0\): load of argument 'X' \(float32, shape \(50,\), stride "
        r"\(1,\)\) at element offset 50, byte 200 and 13 more: out of bounds: 1 elements past"
    )
    with pytest.raises(Violation, match=message):
        copy[(4,)](x, out, 64, BLOCK=16)


def test_store_past_the_end() -> None:
    with pytest.raises(Violation, match=r"store of argument 'Out' .* out of bounds: 1 elements"):
        copy[(4,)](torch.randn(64), torch.empty(50), 64, BLOCK=16)


def test_load_before_the_start() -> None:
    storage = torch.randn(32)
    with pytest.raises(Violation, match="'X' .* 4 elements before the view"):
        copy_rows[(2,)](storage[16:], torch.empty(2, 4), -4, 4, 4, BLOCK=4)
    copy_rows[(2,)](storage[16:], torch.empty(2, 4), 4, 4, 4, BLOCK=4)


def test_gaps_of_a_strided_view_are_out_of_bounds() -> None:
    storage, out = torch.randn(4, 10), torch.empty(4, 8)
    x = storage[:, :6]
    copy_rows[(4,)](x, out, 10, 8, 6, BLOCK=8)
    assert torch.equal(out[:, :6], x)
    with pytest.raises(Violation, match=r"'X' .* offset 6, .*in a gap of the view"):
        copy_rows[(4,)](x, out, 10, 8, 7, BLOCK=8)


def test_the_rest_of_the_storage_is_out_of_bounds() -> None:
    storage, out = torch.randn(40), torch.empty(20)
    with pytest.raises(Violation, match="'X' .* past the end of the view"):
        copy[(2,)](storage[:10], out, 20, BLOCK=10 + 6)
    copy[(2,)](storage[:20], out, 20, BLOCK=16)


def test_one_slice_of_a_packed_tensor_is_not_another() -> None:
    packed = torch.randn(5, 3, 8)
    query, key = packed[:, 0], packed[:, 1]
    out = torch.empty(5, 8)
    copy_rows[(5,)](query, out, 24, 8, 8, BLOCK=8)
    assert torch.equal(out, query)
    with pytest.raises(Violation, match=r"'X' .* in a gap of the view, in argument 'Out'"):
        copy_rows[(5,)](query, key, 24, 24, 16, BLOCK=16)


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((3, 4), (4, 1)),
        ((3, 4), (1, 3)),
        ((3, 4), (6, 1)),
        ((3, 2), (8, 3)),
        ((2, 3, 2), (17, 4, 2)),
        ((2, 3, 2), (2, 12, 1)),
        ((3, 4), (0, 2)),
        ((3, 1, 2), (5, 99, 5)),
        ((2, 2, 2), (4, 1, 1)),
        ((), ()),
        ((2, 0), (4, 1)),
    ],
)
def test_elements_of_a_view_and_nothing_else(shape: tuple, stride: tuple) -> None:
    storage = torch.arange(64.0)
    x = storage.as_strided(shape, stride, storage_offset=8)
    elements = {int(value) - 8 for value in x.flatten().tolist()}
    for offset in range(-4, max(elements, default=0) + 4):
        out = torch.empty(1)
        if offset in elements:
            gather[(1,)](x, torch.tensor([offset]), out, BLOCK=1)
            assert out == offset + 8
        else:
            message = rf"'X' .* element offset {offset}, .* out of bounds"
            with pytest.raises(Violation, match=message):
                gather[(1,)](x, torch.tensor([offset]), out, BLOCK=1)


def test_empty_tensors_and_masks_that_are_all_false() -> None:
    copy[(3,)](torch.empty(0), torch.empty(0), 0, BLOCK=16)
    copy[(3,)](torch.randn(4)[4:], torch.empty(4), 0, BLOCK=16)
    copy[(0,)](torch.randn(4), torch.empty(4), 4, BLOCK=16)
    with pytest.raises(Violation, match="load of argument 'X'"):
        copy[(1,)](torch.empty(0), torch.empty(4), 4, BLOCK=16)


def test_descriptors() -> None:
    x, out = torch.randn(4, 16), torch.empty(4, 8)
    described = TensorDescriptor.from_tensor(x, [4, 8])
    copy_described[(1,)](described, TensorDescriptor.from_tensor(out, [4, 8]), 8)
    assert torch.equal(out, x[:, 8:])
    too_wide = TensorDescriptor(x[:, :8], [4, 16], [16, 1], [4, 8])
    with pytest.raises(Violation, match="load of argument 'X' .* in a gap"):
        copy_described[(1,)](too_wide, TensorDescriptor.from_tensor(out, [4, 8]), 8)


def test_pointers_of_two_arguments_in_one_load() -> None:
    x, y, out = torch.zeros(8), torch.ones(8), torch.empty(8)
    load_from_either[(1,)](x, y, out, BLOCK=8)
    assert out.tolist() == [0, 1] * 4
    with pytest.raises(Violation, match="load of argument 'Y'"):
        load_from_either[(1,)](x, y[:7], out, BLOCK=8)


def test_pointers_that_come_from_no_argument() -> None:
    target = torch.randn(1)
    with pytest.raises(Violation, match="load through a pointer that comes from no argument"):
        load_from_address[(1,)](torch.tensor([target.data_ptr()]), torch.empty(1))


def test_reinterpreted_arguments() -> None:
    x, out = torch.randn(8), torch.empty(8)
    arguments = [triton.reinterpret(tensor, tl.int32) for tensor in (x, out)]
    copy[(1,)](*arguments, 8, BLOCK=8)
    assert torch.equal(out, x)
    with pytest.raises(Violation, match="'X' .* out of bounds"):
        copy[(1,)](*arguments, 9, BLOCK=16)


def test_faults_in_device_functions_reach_the_test() -> None:
    call_device_function[(1,)](torch.randn(9), torch.empty(8), BLOCK=8)
    with pytest.raises(Violation, match="^call_device_function, .*'X'"):
        call_device_function[(1,)](torch.randn(8), torch.empty(8), BLOCK=8)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(interpreter.InterpreterError, match="ValueError.*power of 2"):
        raise_value_error[(1,)](torch.empty(1))


# Races.


def test_programs_that_store_the_same_element() -> None:
    x, out = torch.randn(50), torch.zeros(1)
    total[(1,)](x, out, 50, BLOCK=64, ATOMIC=False)
    message = r"program \(1, 0, 0\): store of argument 'Out' .* what program \(0, 0, 0\) stored"
    with pytest.raises(Violation, match=message):
        total[(4,)](x, out, 50, BLOCK=16, ATOMIC=False)


def test_a_program_that_loads_what_another_stores_later() -> None:
    # Shifted in place, program 1 stores the first element of its block, which program 0 has loaded.
    x = torch.randn(50)
    message = r"program \(1, 0, 0\): store of argument 'Out' .* program \(0, 0, 0\) loaded"
    with pytest.raises(Violation, match=message):
        shift_left[(4,)](x, x, 50, BLOCK=16)
    shift_left[(4,)](x, torch.empty(50), 50, BLOCK=16)


def test_a_program_that_loads_what_another_stored_before() -> None:
    x = torch.randn(50)
    message = r"program \(1, 0, 0\): load of argument 'X' .* program \(0, 0, 0\) stored"
    with pytest.raises(Violation, match=message):
        copy[(2,)](x[:40], x[8:48], 40, BLOCK=32)


def test_races_between_views_of_one_storage() -> None:
    storage = torch.randn(4, 10)
    copy_rows[(4,)](storage[:, :5], storage[:, 5:], 10, 10, 5, BLOCK=8)
    assert torch.equal(storage[:, :5], storage[:, 5:])
    with pytest.raises(Violation, match="race"):
        copy_rows[(3,)](storage[:3], storage[1:], 10, 10, 10, BLOCK=16)


def test_views_of_other_dtypes_race_too() -> None:
    words = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(Violation, match="race with what program"):
        copy[(2,)](words.view(torch.int8)[:8], words, 8, BLOCK=4)


def test_in_place_and_one_launch_after_another_are_no_races() -> None:
    x, out = torch.randn(50), torch.empty(50)
    before = x.clone()
    copy[(4,)](x, x, 50, BLOCK=16)
    shift_left[(4,)](x, out, 50, BLOCK=16)
    shift_left[(4,)](out, x, 50, BLOCK=16)
    assert torch.equal(x[:48], before[2:])


def test_three_dimensional_grids() -> None:
    x = torch.randn(2 * 3 * 4 * 8)
    out = torch.empty_like(x)
    copy_cube[(2, 3, 4)](x, out, BLOCK=8)
    assert torch.equal(out, x)
    with pytest.raises(Violation, match=r"program \(1, 2, 3\): load .* element offset 184"):
        copy_cube[(2, 3, 4)](x[:184], torch.empty_like(x), BLOCK=8)


@pytest.mark.parametrize("first", VERBS)
@pytest.mark.parametrize("then", VERBS)
def test_two_programs_and_one_element(first: str, then: str) -> None:
    x = torch.zeros(1, dtype=torch.int32)
    if first == then and first != "store":
        touch_in_turn[(3,)](x, first, then, "nothing")
        return
    message = rf"^touch_in_turn, program \(1, 0, 0\): {then} of argument 'X' .* race with what "
    with pytest.raises(Violation, match=message + rf"program \(0, 0, 0\) {VERBS[first]}$"):
        touch_in_turn[(2,)](x, first, then, "nothing")
    for action in (first, then):
        touch_in_turn[(1,)](x, action, "nothing", "nothing")


@pytest.mark.parametrize("both", ["load", "atomic"])
def test_a_program_that_stores_what_it_and_another_touched(both: str) -> None:
    x = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(Violation, match=f"store of .* race with what others {VERBS[both]}"):
        touch_in_turn[(2,)](x, both, both, "store")


def test_one_program_may_touch_an_element_in_every_way() -> None:
    x, out = torch.randn(50), torch.zeros(1)
    total[(4,)](x, out, 50, BLOCK=16, ATOMIC=True)
    torch.testing.assert_close(out[0], x.sum())
    counter = torch.zeros(1, dtype=torch.int32)
    for first in VERBS:
        for last in VERBS:
            touch_in_turn[(2,)](counter, "nothing", first, last)


def test_races_far_apart_in_large_tensors() -> None:
    out = torch.zeros(1 << 22, dtype=torch.int32)
    order = torch.randperm(1 << 12) << 10
    scatter[(64,)](order, out, BLOCK=64)
    assert torch.equal(out[order], torch.arange(1 << 12, dtype=torch.int32))
    order[-1] = order[0]
    message = r"program \(63, 0, 0\): store of .* race with what program \(0, 0, 0\) stored"
    with pytest.raises(Violation, match=message):
        scatter[(64,)](order, out, BLOCK=64)


def test_compare_and_swap() -> None:
    counter = torch.zeros(1, dtype=torch.int32)
    increment_with_swap[(4,)](counter)
    assert counter == 4
    with pytest.raises(Violation, match="atomic of argument 'Counter' .* out of bounds"):
        increment_with_swap[(4,)](counter[:0])


def test_one_store_that_names_an_element_twice() -> None:
    out = torch.empty(8, dtype=torch.int32)
    scatter[(1,)](torch.tensor([3, 1, 2, 0]), out, BLOCK=4)
    with pytest.raises(Violation, match=r"'Out' .* element \(1,\), .* names the element twice"):
        scatter[(1,)](torch.tensor([3, 1, 1, 0]), out, BLOCK=4)


# Unwritten memory.


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.bool]
)
@pytest.mark.parametrize(
    "how",
    ["empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"],
)
def test_loads_of_unwritten_memory(dtype: torch.dtype, how: str) -> None:
    x = {
        "empty": lambda: torch.empty(20, dtype=dtype),
        "empty_like": lambda: torch.empty_like(torch.zeros(20, dtype=dtype)),
        "empty_permuted": lambda: torch.empty_permuted((20,), (0,), dtype=dtype),
        "empty_strided": lambda: torch.empty_strided((20,), (1,), dtype=dtype),
        "new_empty": lambda: torch.zeros(3, dtype=dtype).new_empty(20),
        "new_empty_strided": lambda: torch.zeros(3, dtype=dtype).new_empty_strided((20,), (1,)),
    }[how]()
    copy[(1,)](torch.ones(20, dtype=dtype), x, 19, BLOCK=32)
    copy[(1,)](x, torch.empty_like(x), 19, BLOCK=32)
    with pytest.raises(Violation, match=r"'X' .* element \(19,\), .* uninitialised"):
        copy[(1,)](x, torch.empty_like(x), 20, BLOCK=32)
    x[19:] = 1  # by the host
    copy[(1,)](x, torch.empty_like(x), 20, BLOCK=32)


def test_atomics_read_what_they_update() -> None:
    x, out = torch.randn(4), torch.empty(1)
    with pytest.raises(Violation, match="atomic of argument 'Out' .* uninitialised"):
        total[(1,)](x, out, 4, BLOCK=4, ATOMIC=True)
    total[(1,)](x, out.zero_(), 4, BLOCK=4, ATOMIC=True)


def test_writes_behind_the_back_of_torch_count() -> None:
    x = torch.empty(20)
    x.numpy()[:] = 1
    copy[(1,)](x, torch.empty(20), 20, BLOCK=32)


def test_random_bytes_are_not_taken_for_poison(sanitizer: Sanitizer) -> None:
    x = torch.empty(4096, dtype=torch.uint8).random_()
    out = torch.empty_like(x)
    copy[(1,)](x, out, 4096, BLOCK=4096)
    assert torch.equal(out, x)
    sanitizer.assert_written(out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64, torch.uint8])
def test_assert_written(sanitizer: Sanitizer, dtype: torch.dtype) -> None:
    x, out = torch.ones(4, 6, dtype=dtype), torch.empty(4, 6, dtype=dtype)
    copy_rows[(4,)](x, out, 6, 6, 5, BLOCK=8)
    sanitizer.assert_written(out[:, :5], out[1:2, 2:4], out[:, 5:][:0])
    with pytest.raises(Violation, match=r"tensors\[1\]: 4 of 24 .* the first at \(0, 5\)"):
        sanitizer.assert_written(x.new_empty(0), out)
    copy_rows[(4,)](x, out, 6, 6, 6, BLOCK=8)
    sanitizer.assert_written(out, out.t(), out.view(torch.uint8))


def test_assert_written_in_another_dtype(sanitizer: Sanitizer) -> None:
    x, out = torch.ones(4, 6), torch.empty(4, 6)
    copy_rows[(4,)](x, out, 6, 6, 5, BLOCK=8)
    for dtype, count in ((torch.float64, "4 of 12"), (torch.int16, "8 of 48")):
        with pytest.raises(Violation, match=count):
            sanitizer.assert_written(out.view(dtype))


def test_assert_written_knows_only_what_it_saw_allocated(sanitizer: Sanitizer) -> None:
    with pytest.raises(ValueError, match=r"tensors\[0\] was not allocated by torch.empty"):
        sanitizer.assert_written(torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unwritten_floats_are_nan(dtype: torch.dtype) -> None:
    assert torch.empty(3, 5, dtype=dtype).isnan().all()
    assert torch.empty(3, 5, dtype=dtype, requires_grad=True).isnan().all()


# Alignment.


def test_misaligned_loads() -> None:
    x, out = torch.arange(16, dtype=torch.int8), torch.empty(1, dtype=torch.int32)
    load_int32_from_bytes[(1,)](x, out, 4)
    assert out == 0x07060504
    with pytest.raises(Violation, match=r"'Bytes' .* byte 3: misaligned for 4 bytes"):
        load_int32_from_bytes[(1,)](x, out, 3)
    with pytest.raises(Violation, match=r"'Bytes' .* out of bounds: 1 elements past"):
        load_int32_from_bytes[(1,)](x[:15], out, 12)


def test_parts_of_elements() -> None:
    store_bytes_of_int32[(1,)](torch.zeros(4, dtype=torch.int8))
    with pytest.raises(Violation, match="less than an element"):
        store_bytes_of_int32[(1,)](torch.zeros(1, dtype=torch.int32))


def test_misaligned_descriptors() -> None:
    out = TensorDescriptor.from_tensor(torch.empty(4, 8), [4, 8])
    x = TensorDescriptor.from_tensor(torch.randn(4, 16), [4, 8])
    copy_described[(1,)](x, out, 4)
    with pytest.raises(Violation, match="descriptor: block offset start must be 16-byte aligned"):
        copy_described[(1,)](x, out, 1)


# Offsets beyond int32, and other arithmetic.


@pytest.fixture
def huge() -> Tensor:
    """3 GiB of address space; only the pages of the first columns are ever touched."""
    x = torch.empty(3, 2**30, dtype=torch.int8)
    x[:, :16] = torch.arange(48, dtype=torch.int8).view(3, 16)
    return x


def test_huge_tensors_are_lazy(huge: Tensor) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = torch.empty(3, 16, dtype=torch.int8)
    load_column[(3,)](huge, out, 2**30, BLOCK=16, WIDE=True, WRAPS=False)
    assert torch.equal(out, huge[:, :16])
    load_column[(3,)](out, huge, 16, BLOCK=16, WIDE=True, WRAPS=False)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024  # KiB


def test_offsets_that_wrap_around_are_out_of_bounds(huge: Tensor) -> None:
    out = torch.empty(3, 16, dtype=torch.int8)
    message = r"program \(2, 0, 0\): load of argument 'X' .* 2147483648 elements before the view"
    with pytest.raises(Violation, match=message):
        load_column[(3,)](huge, out, 2**30, BLOCK=16, WIDE=False, WRAPS=True)


def test_int32_overflow(huge: Tensor) -> None:
    out = torch.empty(3, 16, dtype=torch.int8)
    load_column[(2,)](huge, out, 2**30, BLOCK=16, WIDE=False, WRAPS=False)
    with pytest.raises(Violation, match=r"program \(2, 0, 0\): int32 overflow in mul"):
        load_column[(3,)](huge, out, 2**30, BLOCK=16, WIDE=False, WRAPS=False)


def test_unsigned_integers_may_wrap() -> None:
    out = torch.empty(1, dtype=torch.int64)
    multiply_hashes[(1,)](torch.tensor([0xDEADBEEF]), out)
    assert out == 0xDEADBEEF * 0x9E3779B9 % 2**32


def test_device_assert() -> None:
    x = torch.arange(8)
    check_small[(1,)](x, 8, BLOCK=8)
    with pytest.raises(Violation, match="^check_small, .* device_assert failed: x is too large"):
        check_small[(1,)](x, 7, BLOCK=8)


def test_assume() -> None:
    assume_positive[(1,)](torch.ones(1))
    with pytest.raises(Violation, match="assume"):
        assume_positive[(1,)](torch.zeros(1))


# Types.


def every_kind_of_float32() -> Tensor:
    """Random bits, and every bfloat16 with the neighbours of each point where rounding turns."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator, dtype=torch.int64)
    grid = torch.arange(-(2**15), 2**15, dtype=torch.int64) << 16
    turns = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = torch.cat([bits, (grid[:, None] + turns).flatten()])
    return bits.to(torch.int32).view(torch.float32)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    valid = ~expected.isnan()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.itemsize]
    assert torch.equal(actual[valid].view(integers), expected[valid].view(integers))


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.int32, torch.float16])
def test_rounding_to_bfloat16_is_torchs(source: torch.dtype) -> None:
    x = every_kind_of_float32()
    x = x.view(torch.int32) if source is torch.int32 else x.to(source)
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    cast[(1,)](x, out, x.numel(), BLOCK=1 << 19)
    assert_same_bits(out, x.to(torch.bfloat16))


@pytest.mark.filterwarnings("ignore:.* encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("target", [torch.float32, torch.float64, torch.float16])
def test_bfloat16_widens_as_torchs(target: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    out = torch.empty(x.shape, dtype=target)
    cast[(1,)](x, out, x.numel(), BLOCK=1 << 16)
    assert_same_bits(out, x.to(target))


def test_bfloat16_towards_zero() -> None:
    x = torch.tensor([1 + 2**-8, -1 - 2**-8 - 2**-9, 3.3895314e38, torch.inf])
    out = torch.empty(4, dtype=torch.bfloat16)
    cast_towards_zero[(1,)](x, out, BLOCK=4)
    assert out.tolist() == [1, -1, torch.finfo(torch.bfloat16).max, torch.inf]
    assert (bfloat16_bits(np.array([np.nan]), truncate=True) == 0x7FFF).all()


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dot(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """The exact sum, rounded once: not in the order of any BLAS."""
    a, b = torch.randn(2, 32, 32, dtype=torch.float64).to(dtype)
    before = torch.randn(32, 32).to(out_dtype)
    out = before.clone()
    matmul[(1,)](a, b, out, BLOCK=32)
    exact = before.double() + a.double() @ b.double()
    if out_dtype == torch.float64:
        bound = 32 * torch.finfo(out_dtype).eps * (before.abs() + a.abs() @ b.abs())
        assert ((out - exact).abs() <= bound).all()
    else:
        assert torch.equal(out, exact.to(out_dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_sum(dtype: torch.dtype) -> None:
    """As a product's: exact, rounded once."""
    x, out = torch.randn(8, 512).to(dtype), torch.empty(8, dtype=dtype)
    sum_rows[(1,)](x, out, BLOCK=8, WIDTH=512)
    assert torch.equal(out, x.double().sum(1).to(dtype))


def test_sum_of_integers_and_of_bits() -> None:
    x, out = torch.randint(-9, 9, (8, 512)), torch.empty(8, dtype=torch.int64)
    for given in (x, x.int(), x > 0):
        sum_rows[(1,)](given, out, BLOCK=8, WIDTH=512)
        assert torch.equal(out, given.sum(1))


def test_bfloat16_arithmetic_in_float32() -> None:
    x, out = torch.randn(16).bfloat16(), torch.empty(16, dtype=torch.bfloat16)
    scale[(1,)](x, out, 0.3, BLOCK=16, OPERATION="scale")
    assert torch.equal(out, (x.float() * 0.3).bfloat16())
    scale[(1,)](x, out, 0.3, BLOCK=16, OPERATION="abs")
    assert torch.equal(out, x.abs())
    scale[(1,)](x, out, 0.3, BLOCK=16, OPERATION="select")
    assert torch.equal(out, torch.where(torch.arange(16) % 2 == 0, x, 1.5))


@pytest.mark.parametrize("operation", ["add", "less", "sum", "fma", "atomic"])
def test_bfloat16_arithmetic_is_refused(operation: str) -> None:
    x, out = torch.rand(16), torch.zeros(16)
    if operation != "atomic":
        scale[(1,)](x, out, 0.3, BLOCK=16, OPERATION=operation)
    with pytest.raises(Violation, match="bf16 arithmetic cannot be interpreted; convert to fp32"):
        scale[(1,)](x.bfloat16(), out.bfloat16(), 0.3, BLOCK=16, OPERATION=operation)


@pytest.mark.filterwarnings("ignore:.* encountered in cast:RuntimeWarning")
def test_float16_rounds_as_torchs() -> None:
    x = every_kind_of_float32()
    out = torch.empty(x.shape, dtype=torch.float16)
    cast[(1,)](x, out, x.numel(), BLOCK=1 << 19)
    assert_same_bits(out, x.half())


# The sanitizer itself.


class TestInstallation:
    @pytest.fixture(autouse=True)
    def sanitizer(self) -> Iterator[None]:
        """None is installed in these tests."""
        yield

    @staticmethod
    def attributes() -> dict[object, dict[str, object]]:
        owners = [
            interpreter,
            interpreter.interpreter_builder,
            interpreter.GridExecutor,
            interpreter.InterpreterBuilder,
            interpreter.ReduceScanOpInterface,
            interpreter.TensorDescHandle,
            interpreter.TritonSemantic,
            torch,
            Tensor,
        ]
        return {owner: dict(vars(owner)) for owner in owners}

    def test_everything_is_put_back(self) -> None:
        before = self.attributes()
        with Sanitizer():
            assert self.attributes() != before
            with pytest.raises(Violation):
                copy[(1,)](torch.ones(3), torch.empty(8), 8, BLOCK=8)
        after = self.attributes()
        for owner, attributes in before.items():
            assert after[owner].keys() == attributes.keys()
            for name, value in attributes.items():
                if name not in {"grid_dim", "grid_idx"}:
                    assert after[owner][name] is value, (owner, name)

    def test_an_error_inside_puts_everything_back(self) -> None:
        before = torch.empty
        with pytest.raises(ZeroDivisionError), Sanitizer():
            raise ZeroDivisionError
        assert torch.empty is before

    def test_they_do_not_nest_and_can_follow_one_another(self) -> None:
        for _ in range(2):
            with Sanitizer() as first:
                with pytest.raises(RuntimeError, match="do not nest"), Sanitizer():
                    pass
                out = torch.empty(3)
                with pytest.raises(Violation):
                    first.assert_written(out)
            with pytest.raises(ValueError, match="not allocated"):
                first.assert_written(out)

    def test_without_it_the_fault_is_silent(self) -> None:
        x = torch.randn(64)
        copy[(4,)](x[:50], torch.empty(64), 64, BLOCK=16)


def test_huge_allocations_are_not_poisoned() -> None:
    at_limit = torch.empty(POISON_LIMIT // 4)
    assert at_limit.isnan().all()
    x = torch.empty(POISON_LIMIT // 4 + 1)
    copy[(1,)](x, torch.empty(8), 8, BLOCK=8)
