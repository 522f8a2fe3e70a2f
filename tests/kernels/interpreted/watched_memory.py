"""What the sanitizer knows of memory: what was written, who touched it, which views see it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

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
        return spread(first, max(1, width // self.itemsize))

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
        units = spread((addresses - self.address) // self.unit, width // self.unit)
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


def spread(starts: np.ndarray, count: int, step: int = 1) -> np.ndarray:
    """Every start, followed by the ``count`` - 1 places that come after it."""
    if count == 1:
        return starts
    return (starts[:, None] + step * np.arange(count)).ravel()
