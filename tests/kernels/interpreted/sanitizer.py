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
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NoReturn
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

#: A pointer of argument number n is n * ARGUMENT + GUARD + address: offsets in either direction
#: leave the number alone.
ARGUMENT = np.uint64(1 << 49)
GUARD = np.uint64(1 << 48)

#: By element size. The two largest are a NaN in every floating type of their size, and so is the
#: one of 16 bits, in float16 and in bfloat16.
POISON = {1: 0xA5, 2: 0x7FE5, 4: 0x7FE5A5A5, 8: 0x7FFDA5A5A5A5A5A5}
POISON_LIMIT = 1 << 26  # bytes

#: What an access must not meet from another program, and the word for it.
CONFLICTS = {
    "load": {"store": "stored", "atomic": "updated atomically"},
    "store": {"store": "stored", "load": "loaded", "atomic": "updated atomically"},
    "atomic": {"store": "stored", "load": "loaded"},
}
SEVERAL = -1

EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


class Violation(AssertionError):
    """A fault of an interpreted kernel."""


class Allocation:
    """The memory of one ``torch.empty``: poison, until something is written."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        memory = torch.tensor([], dtype=torch.uint8).set_(storage)  # keeps the storage alive
        self.address = storage.data_ptr()
        self.itemsize = tensor.itemsize
        self.words = memory.numpy().view(f"u{self.itemsize}")
        self.words.fill(POISON[self.itemsize])
        self.stored = np.zeros(self.words.size, bool)
        self.is_distinct = tensor.itemsize > 1 or tensor.dtype == torch.bool

    def elements(self, addresses: np.ndarray, width: int) -> np.ndarray:
        first = (addresses - self.address) // self.itemsize
        return _spread(first, max(1, width // self.itemsize))

    def unwritten(self, elements: np.ndarray | slice = slice(None)) -> np.ndarray:
        return ~self.stored[elements] & (self.words[elements] == POISON[self.itemsize])


class Shadow:
    """Which program touched each unit of a storage in this launch, in pages made when first used.

    Programs count from 1; 0 stands for none and SEVERAL for more than one.
    """

    PAGE = 1 << 12  # units

    def __init__(self, address: int, nbytes: int, unit: int) -> None:
        self.address = address
        self.unit = unit
        self.page_rows = np.full(-(-nbytes // (unit * self.PAGE)), -1, np.int32)
        self.used_rows = 0
        self.programs = {kind: np.zeros(0, np.int32) for kind in CONFLICTS}

    def cells(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Where the units of every access lie in the arrays of ``programs``."""
        units = _spread((addresses - self.address) // self.unit, width // self.unit)
        pages, offsets = units // self.PAGE, units % self.PAGE
        rows = self.page_rows[pages]
        if (rows < 0).any():
            self._add_pages(np.unique(pages[rows < 0]))
            rows = self.page_rows[pages]
        return rows * self.PAGE + offsets

    def _add_pages(self, pages: np.ndarray) -> None:
        end = self.used_rows + pages.size
        self.page_rows[pages] = np.arange(self.used_rows, end)
        self.used_rows = end
        for kind, programs in self.programs.items():
            if programs.size < end * self.PAGE:
                grown = np.zeros(max(end * self.PAGE, 2 * programs.size), np.int32)
                grown[: programs.size] = programs
                self.programs[kind] = grown


@dataclass(frozen=True)
class View:
    """A tensor argument: which addresses are elements of it."""

    name: str
    tensor: Tensor
    shadow: Shadow
    allocation: Allocation | None

    @cached_property
    def address(self) -> int:
        return self.tensor.data_ptr()

    @cached_property
    def extent(self) -> int:
        """Elements from the first to the last, gaps included."""
        if self.tensor.numel() == 0:
            return 0
        shape, stride = self.tensor.shape, self.tensor.stride()
        return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))

    @cached_property
    def dimensions(self) -> list[tuple[int, int]] | None:
        """(stride, size), widest first, neighbours merged; None where elements may overlap."""
        shape, stride = self.tensor.shape, self.tensor.stride()
        merged: list[tuple[int, int]] = []
        extent = 1
        for step, size in sorted(zip(stride, shape, strict=True)):
            if size == 1 or step == 0:
                continue
            if step < extent:
                return None
            if merged and step == merged[-1][0] * merged[-1][1]:
                merged[-1] = (merged[-1][0], merged[-1][1] * size)
            else:
                merged.append((step, size))
            extent += step * (size - 1)
        return merged[::-1]

    @cached_property
    def members(self) -> np.ndarray:
        """Whether each element of the extent belongs to the view, for views that overlap."""
        members = torch.zeros(self.extent, dtype=torch.bool)
        members.as_strided(self.tensor.shape, self.tensor.stride()).fill_(True)
        return members.numpy()

    def contains(self, elements: np.ndarray) -> np.ndarray:
        """Whether elements, counted from the first one of the view, belong to it."""
        inside = (elements >= 0) & (elements < self.extent)
        if self.dimensions is None:
            inside[inside] = self.members[elements[inside]]
            return inside
        for step, size in self.dimensions:
            if step > 1:
                index, elements = elements // step, elements % step
                inside &= index < size
            else:
                inside &= elements < size
                elements = np.zeros_like(elements)
        return inside & (elements == 0)

    def index(self, element: int) -> tuple[int, ...]:
        """The index of an element of a view whose elements do not overlap."""
        index = [0] * self.tensor.dim()
        for dim in sorted(range(self.tensor.dim()), key=self.tensor.stride, reverse=True):
            if self.tensor.shape[dim] > 1 and self.tensor.stride(dim) > 0:
                index[dim], element = divmod(element, self.tensor.stride(dim))
        return tuple(index)

    def describe(self, address: int) -> str:
        """The view, and where in it an address lies."""
        offset = address - self.address
        element = offset // self.tensor.itemsize
        if self.dimensions is not None and self.contains(np.array([element])).all():
            place = f"element {self.index(element)}, byte {offset}"
        else:
            place = f"element offset {element}, byte {offset}"
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        shape, stride = tuple(self.tensor.shape), self.tensor.stride()
        return f"argument {self.name!r} ({dtype}, shape {shape}, stride {stride}) at {place}"


class Launch:
    """One launch of a kernel: its arguments, and what its programs have touched so far."""

    def __init__(self, kernel: str, allocations: dict[int, Allocation]) -> None:
        self.kernel = kernel
        self.allocations = allocations
        self.views: dict[int, View] = {}  # by the number that pointers carry
        self.numbers: dict[int, int] = {}  # by the id of the argument
        self.patched_modules: set[str] = set()
        self.grid: tuple[int, int, int] | None = None
        self.program = 0

    def fail(self, fault: str) -> NoReturn:
        where = "before the first program"
        if self.program:
            where = f"program {self._coordinates(self.program)}"
        raise Violation(f"{self.kernel}, {where}: {fault}")

    def start_program(self, grid: tuple[int, int, int], x: int, y: int, z: int) -> None:
        self.grid = grid
        self.program = 1 + (x * grid[1] + y) * grid[2] + z

    def _coordinates(self, program: int) -> tuple[int, ...]:
        assert self.grid is not None
        return tuple(int(i) for i in np.unravel_index(program - 1, self.grid))

    def add_arguments(self, arguments: dict[str, Any]) -> None:
        tensors = [leaf for name, value in arguments.items() for leaf in _tensors(name, value)]
        units: dict[int, int] = {}
        for _, _, tensor in tensors:
            address = tensor.untyped_storage().data_ptr()
            units[address] = min(tensor.itemsize, units.get(address, tensor.itemsize))
        shadows: dict[int, Shadow] = {}
        for number, (name, argument, tensor) in enumerate(tensors, start=1):
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in shadows:
                shadows[address] = Shadow(address, storage.nbytes(), units[address])
            allocation = self.allocations.get(address)
            self.views[number] = View(name, tensor, shadows[address], allocation)
            self.numbers[id(argument)] = number

    def tag(self, argument: Any) -> np.uint64 | None:
        """What to add to the address of an argument, if it is a tensor."""
        number = self.numbers.get(id(argument))
        return None if number is None else np.uint64(number) * ARGUMENT + GUARD

    def access(self, kind: str, pointers: TensorHandle, mask: Any = None) -> TensorHandle:
        """Check an access of every active lane; returns the pointers as addresses."""
        tagged = np.asarray(pointers.data)
        active = tagged.ravel()
        if mask is not None:
            # A handle or, from a descriptor, an array: both have ``data``.
            active = tagged[np.broadcast_to(np.asarray(mask.data, bool), tagged.shape)]
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        numbers = active // ARGUMENT
        for number in np.unique(numbers):
            addresses = (active[numbers == number] % ARGUMENT - GUARD).view(np.int64)
            if int(number) not in self.views:
                self.fail(f"{kind} through a pointer that comes from no argument")
            self._check(kind, self.views[int(number)], addresses, width)
        return TensorHandle(tagged % ARGUMENT - GUARD, pointers.dtype)

    def _check(self, kind: str, view: View, addresses: np.ndarray, width: int) -> None:
        misaligned = addresses % width != 0
        if misaligned.any():
            self._fail_at(kind, view, addresses, misaligned, f"misaligned for {width} bytes")
        itemsize = view.tensor.itemsize
        if width < itemsize:
            everywhere = np.ones(addresses.size, bool)
            fault = f"{width} bytes are less than an element; pass a view of the narrower dtype"
            self._fail_at(kind, view, addresses, everywhere, fault)
        starts = _spread(addresses, width // itemsize, itemsize)
        outside = ~view.contains((starts - view.address) // itemsize)
        if outside.any():
            fault = self._explain_outside(view, int(starts[outside][0]))
            self._fail_at(kind, view, starts, outside, f"out of bounds: {fault}")
        if view.allocation is not None:
            self._check_written(kind, view, view.allocation, addresses, width)
        self._check_races(kind, view, addresses, width)

    def _explain_outside(self, view: View, address: int) -> str:
        element = (address - view.address) // view.tensor.itemsize
        if element < 0:
            where = f"{-element} elements before the view"
        elif element < view.extent:
            where = "in a gap of the view"
        else:
            where = f"{element - view.extent + 1} elements past the end of the view"
        for other in self.views.values():
            offset = np.array([(address - other.address) // other.tensor.itemsize])
            if other is not view and other.contains(offset).all():
                return f"{where}, in argument {other.name!r}"
        return where

    def _check_written(
        self, kind: str, view: View, allocation: Allocation, addresses: np.ndarray, width: int
    ) -> None:
        elements = allocation.elements(addresses, width)
        if kind != "store" and allocation.is_distinct:
            unwritten = allocation.unwritten(elements)
            if unwritten.any():
                starts = allocation.address + elements * allocation.itemsize
                self._fail_at(kind, view, starts, unwritten, "reads uninitialised memory")
        if kind != "load":
            allocation.stored[elements] = True

    def _check_races(self, kind: str, view: View, addresses: np.ndarray, width: int) -> None:
        shadow = view.shadow
        cells = shadow.cells(addresses, width)
        starts = _spread(addresses, width // shadow.unit, shadow.unit)
        for earlier, verb in CONFLICTS[kind].items():
            programs = shadow.programs[earlier][cells]
            raced = (programs != 0) & (programs != self.program)
            if raced.any():
                other = int(programs[raced][0])
                who = "others" if other == SEVERAL else f"program {self._coordinates(other)}"
                self._fail_at(kind, view, starts, raced, f"race with what {who} {verb}")
        touched = shadow.programs[kind]
        if kind == "store":
            lanes = np.arange(1, cells.size + 1, dtype=np.int32)
            touched[cells] = lanes
            repeated = touched[cells] != lanes
            if repeated.any():
                self._fail_at(kind, view, starts, repeated, "one store names the element twice")
            touched[cells] = self.program
        else:
            before = touched[cells]
            alone = (before == 0) | (before == self.program)
            touched[cells] = np.where(alone, self.program, SEVERAL)

    def _fail_at(
        self, kind: str, view: View, addresses: np.ndarray, faulty: np.ndarray, fault: str
    ) -> NoReturn:
        more = int(faulty.sum()) - 1
        place = view.describe(int(addresses[faulty][0]))
        self.fail(f"{kind} of {place}{f' and {more} more' if more else ''}: {fault}")


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
            self._bfloat16_patches(),
            self._allocation_patches(),
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
            self._refuse_bfloat16(value)
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

    def _refuse_bfloat16(self, *operands: Any) -> None:
        for operand in operands:
            if isinstance(operand, TensorHandle) and operand.dtype.scalar == tl.bfloat16:
                self._current.fail("bf16 arithmetic cannot be interpreted; convert to fp32 first")

    def _bfloat16_patches(self) -> Iterator[tuple[Any, str, Any]]:
        cast = InterpreterBuilder.cast_impl
        cast_with_rounding = InterpreterBuilder.create_fp_to_fp
        dot = InterpreterBuilder.create_dot
        check_tensor = interpreter.ReduceScanOpInterface.check_tensor

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
                self._refuse_bfloat16(*operands)
                return method(builder, *operands)

            return guard

        def guarded_reduction(reduction: Any, tensors: Any) -> None:
            self._refuse_bfloat16(*(tensor.handle for tensor in tensors))
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
        for name in ("binary_op", "create_fma"):
            yield InterpreterBuilder, name, guarded(getattr(InterpreterBuilder, name))
        yield interpreter.ReduceScanOpInterface, "check_tensor", guarded_reduction

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


def _spread(starts: np.ndarray, count: int, step: int = 1) -> np.ndarray:
    """Every start, followed by the ``count`` - 1 places that come after it."""
    if count == 1:
        return starts
    return (starts[:, None] + step * np.arange(count)).ravel()


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Any, Tensor]]:
    """(name, argument, tensor) of every tensor in a kernel's argument."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)
    elif isinstance(value, TensorDescriptor):
        yield from _tensors(name, value.base)
    elif hasattr(value, "data_ptr"):
        yield name, value, interpreter._unwrap_tensor(value)
