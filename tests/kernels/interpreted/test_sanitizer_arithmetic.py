"""Overflow and failed assertions are found; what is mended in the interpreter is exact."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted.mended_arithmetic import bfloat16_bits
from tests.kernels.interpreted.planted_kernels import (
    assume_positive,
    cast,
    cast_towards_zero,
    check_small,
    load_column,
    matmul,
    multiply_hashes,
    scale,
    sum_rows,
)
from tests.kernels.interpreted.sanitizer import Violation

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
