"""The sanitizer finds accesses that are out of bounds, unwritten or misaligned, and no others."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.kernels.interpreted.planted_kernels import (
    call_device_function,
    copy,
    copy_described,
    copy_rows,
    gather,
    load_from_address,
    load_from_either,
    load_int32_from_bytes,
    raise_value_error,
    store_bytes_of_int32,
    total,
)
from tests.kernels.interpreted.sanitizer import Sanitizer, Violation

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
