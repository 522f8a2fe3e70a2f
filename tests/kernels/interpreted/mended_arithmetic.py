"""Arithmetic of Triton's interpreter, mended: bfloat16 and sums as the sanitizer promises them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def arithmetic_patches(fail: Callable[[str], NoReturn]) -> Iterator[tuple[Any, str, Any]]:
    """``fail`` is told of arithmetic that cannot be interpreted."""
    cast = InterpreterBuilder.cast_impl
    cast_with_rounding = InterpreterBuilder.create_fp_to_fp
    dot = InterpreterBuilder.create_dot
    check_tensor = interpreter.ReduceScanOpInterface.check_tensor

    def refuse_bfloat16(*operands: Any) -> None:
        for operand in operands:
            if isinstance(operand, TensorHandle) and operand.dtype.scalar == tl.bfloat16:
                fail("bf16 arithmetic cannot be interpreted; convert to fp32 first")

    def exact_cast(builder: Any, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        if source.dtype.scalar == tl.bfloat16:
            source = _widened(source)
        if target.scalar == tl.bfloat16:
            return TensorHandle(bfloat16_bits(source.data.astype(np.float32)), tl.bfloat16)
        return cast(builder, source, target)

    def exact_cast_with_rounding(
        builder: Any, source: TensorHandle, target: tl.dtype, rounding: Any
    ) -> TensorHandle:
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            truncate = rounding == ir.ROUNDING_MODE.RTZ
            return TensorHandle(bfloat16_bits(source.data, truncate), tl.bfloat16)
        return cast_with_rounding(builder, source, target, rounding)

    def exact_dot(
        builder: Any, a: TensorHandle, b: TensorHandle, sums: TensorHandle, *args: Any
    ) -> TensorHandle:
        factors, dtype = [_widened(x).data for x in (a, b)], sums.data.dtype
        if any(kind != "f" for kind in (dtype.kind, *(x.dtype.kind for x in factors))):
            return dot(builder, a, b, sums, *args)
        total = np.matmul(*(x.astype(np.float64, copy=False) for x in factors))
        total += sums.data
        return TensorHandle(total.astype(dtype, copy=False), sums.dtype.scalar)

    def exact_sum(reduction: Any, x: tl.tensor) -> tl.tensor:
        data = x.handle.data
        wide = np.float64 if data.dtype.kind == "f" else None
        total = np.sum(data, reduction.axis, wide, keepdims=reduction.keep_dims)
        return reduction.to_tensor(np.asarray(total, data.dtype), x.dtype)

    def guarded(method: Callable) -> Callable:
        def guard(builder: Any, *operands: Any) -> TensorHandle:
            refuse_bfloat16(*operands)
            return method(builder, *operands)

        return guard

    def guarded_reduction(reduction: Any, tensors: Any) -> None:
        refuse_bfloat16(*(tensor.handle for tensor in tensors))
        check_tensor(reduction, tensors)

    yield InterpreterBuilder, "cast_impl", exact_cast
    yield InterpreterBuilder, "create_fp_to_fp", exact_cast_with_rounding
    yield InterpreterBuilder, "create_dot", exact_dot
    yield interpreter.ReduceOps, "sum", exact_sum
    yield (
        InterpreterBuilder,
        "get_bf16",
        lambda builder, value: TensorHandle(
            bfloat16_bits(np.array([value], np.float32)), tl.bfloat16
        ),
    )
    # The front end refuses bfloat16 in all other functions, or converts it to float32.
    for name in ("binary_op", "create_fma", "create_atomic_rmw"):
        yield InterpreterBuilder, name, guarded(getattr(InterpreterBuilder, name))
    yield interpreter.ReduceScanOpInterface, "check_tensor", guarded_reduction


def bfloat16_bits(values: np.ndarray, truncate: bool = False) -> np.ndarray:
    """The bits of float32 values as bfloat16, rounded to nearest even, or towards zero."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    if not truncate:
        bits = bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))
    return np.where(np.isnan(values), 0x7FFF, bits >> 16).astype(np.uint16)


def _widened(handle: TensorHandle) -> TensorHandle:
    """A bfloat16 handle in float32, which is exact; any other handle as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
