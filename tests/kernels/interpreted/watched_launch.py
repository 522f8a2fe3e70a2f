"""One launch under the sanitizer: every access is held against the arguments and the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.kernels.interpreted.watched_memory import (
    CONFLICTS,
    SEVERAL,
    Allocation,
    Shadow,
    View,
    spread,
)

#: A pointer of argument number n is n * ARGUMENT + GUARD + address: offsets in either direction
#: leave the number alone.
ARGUMENT = np.uint64(1 << 49)
GUARD = np.uint64(1 << 48)


class Violation(RuntimeError):
    """A fault of an interpreted kernel."""


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
        starts = spread(addresses, width // itemsize, itemsize)
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
        starts = spread(addresses, width // shadow.unit, shadow.unit)
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


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Any, Tensor]]:
    """(name, argument, tensor) of every tensor in a kernel's argument."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)
    elif isinstance(value, TensorDescriptor):
        yield from _tensors(name, value.base)
    elif hasattr(value, "data_ptr"):
        yield name, value, interpreter._unwrap_tensor(value)
