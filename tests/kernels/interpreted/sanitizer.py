"""Runs Triton kernels on a CPU and reports what a GPU would not: a sanitizer for the interpreter.

While a :class:`Sanitizer` is installed, every launch under ``TRITON_INTERPRET=1`` is checked, and
the first fault raises :class:`Violation`, which names the kernel, the program, the argument and the
element. What is a fault:

- **Out of bounds.** The pointer of each argument carries the number of that argument in its 15
  highest bits, which no address uses and no arithmetic disturbs. So every access is held against
  the argument its pointer came from, and must fall on an element of that *view*: the gaps between
  the elements of a strided view, the rest of its storage and the other arguments are out of bounds,
  even where the memory exists. A pointer that comes from no argument is a fault.
- **Races** between the programs of one launch: plain accesses to one element of which one is a
  store, a plain and an atomic access, and one store that names an element twice. Overlapping
  arguments are seen as the one memory they are. The interpreter runs one program after another, so
  that none of this shows in its results. Locks are not understood: what they guard is a race.
- **Unwritten memory.** ``torch.empty`` and its kin return poison (NaN, or a large integer), and an
  element that nobody wrote since must not be loaded. ``assert_written`` demands every element.
  Writes on the host count, by whatever means: they end the poison. Tensors above 64 MiB are left
  alone. Loads of 8-bit integers are not checked: a byte of poison looks like data.
- **Misaligned** accesses, and what descriptors demand: a base, strides and offsets of 16 bytes.
- **Overflow** of signed int32 in ``+``, ``-`` and ``*``, on masked lanes too; unsigned integers may
  wrap, and so may ``tl.add(..., sanitize_overflow=False)``. An offset that is too large in any
  other way is out of bounds. Huge tensors cost only the pages that kernels touch.
- A failed ``tl.device_assert`` or ``tl.assume``. (A Python ``assert`` on several elements passes.)

float16, float32 and float64 are numpy's. **bfloat16** needs a substitute, because the interpreter
computes with its bits as if they were integers: conversions from and to the other types round to
nearest even as torch's do, ``tl.dot`` multiplies exactly widened operands, and any other
arithmetic on bfloat16 is a Violation: convert to float32 first, as kernels should. This shows that
addresses, masks, formulas and the places of rounding are right in bfloat16.

``tl.dot`` and ``tl.sum`` add up in float64 and round once to the type of the result, so that no
order of sums, which every BLAS has of its own, enters it. So neither the order and the internal
precision of sums on a GPU is shown, nor its approximations (``exp2``, division) or fused
multiply-adds.

Not seen: that a program reads what its own other threads stored without ``tl.debug_barrier``; that
atomic additions round in any order; ``input_precision``. Not interpretable at all: several autotune
configs, inline assembly, libdevice.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, ClassVar, NoReturn
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.kernels.interpreted.mended_arithmetic import arithmetic_patches
from tests.kernels.interpreted.quick_types import type_patches
from tests.kernels.interpreted.watched_launch import Launch, Violation
from tests.kernels.interpreted.watched_memory import POISON, POISON_LIMIT, Allocation

EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


class Sanitizer:
    """Checks every interpreted launch inside ``with Sanitizer() as sanitizer:``."""

    _installed: ClassVar[bool] = False

    def __init__(self) -> None:
        self._allocations: dict[int, Allocation] = {}  # by address
        self._launch: Launch | None = None
        self._patches = ExitStack()

    def __enter__(self) -> Sanitizer:
        if Sanitizer._installed:
            raise RuntimeError("a Sanitizer is installed already; they do not nest")
        Sanitizer._installed = True
        for owner, name, replacement in itertools.chain(
            self._launch_patches(),
            self._memory_patches(),
            self._assertion_patches(),
            arithmetic_patches(self._fail),
            self._allocation_patches(),
            type_patches(),
        ):
            patch = mock.patch.object(owner, name, replacement, create=name == "get_bf16")
            self._patches.enter_context(patch)
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()
        self._allocations.clear()
        Sanitizer._installed = False

    def assert_written(self, *tensors: Tensor) -> None:
        """Raise Violation unless every element was stored by a kernel or written by the host.

        The tensors are results of ``torch.empty`` and its kin, or views of such results.
        """
        for position, tensor in enumerate(tensors):
            if tensor.numel() == 0:
                continue
            allocation = self._allocations.get(tensor.untyped_storage().data_ptr())
            if allocation is None:
                raise ValueError(
                    f"tensors[{position}] was not allocated by torch.empty while the sanitizer was "
                    f"installed, or has more than {POISON_LIMIT} bytes"
                )
            unwritten_bytes = np.repeat(allocation.unwritten(), allocation.itemsize)
            unwritten = unwritten_bytes.reshape(-1, tensor.itemsize).any(1)
            missing = torch.from_numpy(unwritten).as_strided(
                tensor.shape, tensor.stride(), tensor.storage_offset()
            )
            if missing.any():
                first = tuple(missing.nonzero()[0].tolist())
                raise Violation(
                    f"tensors[{position}]: {int(missing.sum())} of {tensor.numel()} elements were "
                    f"never written, the first at {first}"
                )

    @property
    def _current(self) -> Launch:
        assert self._launch is not None, "an interpreted operation outside of a launch"
        return self._launch

    def _fail(self, fault: str) -> NoReturn:
        self._current.fail(fault)

    def _launch_patches(self) -> Iterator[tuple[Any, str, Any]]:
        call = interpreter.GridExecutor.__call__
        initialize = interpreter.GridExecutor._init_args_hst
        convert = interpreter._implicit_cvt
        set_grid_idx = InterpreterBuilder.set_grid_idx
        patch_language = interpreter._patch_lang
        find_dtype = interpreter._get_np_dtype
        dtypes: dict[str, np.dtype] = {}

        def checked_call(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self._launch = Launch(executor.fn.__name__, self._allocations)
            try:
                return call(executor, *args, **kwargs)
            except InterpreterError as error:
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, Violation):
                    cause = cause.__cause__
                if cause is None:
                    raise
                raise cause from None
            finally:
                self._launch = None

        def checked_arguments(executor: Any, args: Any, kwargs: Any) -> Any:
            args, kwargs = initialize(executor, args, kwargs)
            names = executor.arg_names[: len(args)]
            self._current.add_arguments(dict(zip(names, args, strict=True)) | kwargs)
            return args, kwargs

        def tagged(argument: Any) -> Any:
            converted = convert(argument)
            tag = self._current.tag(argument)
            if tag is not None:
                converted.handle.data = converted.handle.data + tag
            return converted

        def start_program(builder: Any, x: int, y: int, z: int) -> None:
            self._current.start_program(builder.grid_dim, x, y, z)
            set_grid_idx(builder, x, y, z)

        # Triton does it in every call of a device function: a quarter of the time of these tests.
        def patch_language_once(function: Any) -> Any:
            patched = self._current.patched_modules
            if function.__module__ in patched:
                return None
            patched.add(function.__module__)
            return patch_language(function)

        # Triton makes a table of all dtypes in every operation: a tenth of their time.
        def numpy_dtype(dtype: tl.dtype) -> np.dtype:
            scalar = dtype.scalar.name  # pointers have no hash
            if scalar not in dtypes:
                dtypes[scalar] = find_dtype(dtype)
            return dtypes[scalar]

        yield interpreter.GridExecutor, "__call__", checked_call
        yield interpreter.GridExecutor, "_init_args_hst", checked_arguments
        yield interpreter, "_implicit_cvt", tagged
        yield InterpreterBuilder, "set_grid_idx", start_program
        yield interpreter, "_patch_lang", patch_language_once
        yield interpreter, "_get_np_dtype", numpy_dtype

    def _memory_patches(self) -> Iterator[tuple[Any, str, Any]]:
        load = InterpreterBuilder.create_masked_load
        store = InterpreterBuilder.create_masked_store
        update = InterpreterBuilder.create_atomic_rmw
        compare_and_swap = InterpreterBuilder.create_atomic_cas

        def checked_load(builder: Any, pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
            addresses = self._current.access("load", pointers, mask)
            return load(builder, addresses, mask, *args, **kwargs)

        def checked_store(builder: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
            addresses = self._current.access("store", pointers, mask)
            return store(builder, addresses, value, mask, *args)

        def checked_update(
            builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, *args: Any
        ) -> Any:
            addresses = self._current.access("atomic", pointers, mask)
            return update(builder, operation, addresses, value, mask, *args)

        def checked_compare_and_swap(builder: Any, pointers: Any, *args: Any) -> Any:
            addresses = self._current.access("atomic", pointers)
            return compare_and_swap(builder, addresses, *args)

        yield InterpreterBuilder, "create_masked_load", checked_load
        yield InterpreterBuilder, "create_masked_store", checked_store
        yield InterpreterBuilder, "create_atomic_rmw", checked_update
        yield InterpreterBuilder, "create_atomic_cas", checked_compare_and_swap

    def _assertion_patches(self) -> Iterator[tuple[Any, str, Any]]:
        def checked_assert(builder: Any, condition: TensorHandle, message: str) -> None:
            if not condition.data.all():
                self._current.fail(f"device_assert failed: {message}")

        def checked_assume(builder: Any, condition: TensorHandle) -> None:
            if not condition.data.all():
                self._current.fail("what tl.assume was told is false")

        def check_overflow(semantic: Any, left: Any, right: Any, operation: Callable) -> None:
            if left.type.scalar != tl.int32:
                return
            wide = [operand.handle.data.astype(np.int64) for operand in (left, right)]
            exact = EXACT[operation.__name__](*wide)
            if exact.size and (exact.max() >= 2**31 or exact.min() < -(2**31)):
                self._current.fail(f"int32 overflow in {operation.__name__}; compute it in int64")

        def checked_descriptor(method: Callable) -> Callable:
            def checked(descriptor: Any, *args: Any) -> Any:
                try:
                    return method(descriptor, *args)
                except AssertionError as error:
                    self._current.fail(f"descriptor: {error}")

            return checked

        # Without debug the front end drops device_assert before it reaches the interpreter.
        options = dataclasses.replace(interpreter.interpreter_builder.options, debug=True)
        yield interpreter.interpreter_builder, "options", options
        yield InterpreterBuilder, "create_assert", checked_assert
        yield InterpreterBuilder, "create_assume", checked_assume
        yield TritonSemantic, "binary_op_sanitize_overflow_impl", check_overflow
        for name in ("validate", "materialize_pointers"):
            method = getattr(interpreter.TensorDescHandle, name)
            yield interpreter.TensorDescHandle, name, checked_descriptor(method)

    def _allocation_patches(self) -> Iterator[tuple[Any, str, Any]]:
        def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
                tensor = allocate(*args, **kwargs)
                is_plain = type(tensor) is Tensor and tensor.layout is torch.strided
                if is_plain and tensor.device.type == "cpu" and tensor.itemsize in POISON:
                    if 0 < tensor.untyped_storage().nbytes() <= POISON_LIMIT:
                        allocation = Allocation(tensor)
                        self._allocations[allocation.address] = allocation
                return tensor

            return allocate_poisoned

        for name in ("empty", "empty_like", "empty_permuted", "empty_strided"):
            yield torch, name, poisoned(getattr(torch, name))
        for name in ("new_empty", "new_empty_strided"):
            yield Tensor, name, poisoned(getattr(Tensor, name))
