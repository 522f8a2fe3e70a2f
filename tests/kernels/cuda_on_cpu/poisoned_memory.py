"""Tensors amid poisoned memory, and how kernels are told of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
TYPES = {f32: 0, f16: 1, bf16: 2, torch.float64: 3}


@dataclass(frozen=True)
class Place:
    """How rows lie in memory, which is full of NaN around them."""

    gap: int = 0  # elements between a row and the next
    offset: int = 0  # elements before the first, beyond a multiple of 64 bytes


CONTIGUOUS = Place()
STRIDED = Place(gap=24)  # still on multiples of 16 bytes
MISALIGNED = Place(offset=1)
ODD = Place(gap=3)
POISON = 255  # of every byte: NaN in each type, and no NaN that arithmetic gives
GUARD = 256  # bytes before and after


class Memory:
    """A tensor amid poisoned bytes, itself poisoned until something is written."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, place: Place = CONTIGUOUS):
        rows, columns = (1, *shape)[-2:]
        stride = columns + place.gap
        size = max(rows * stride, 1) + place.offset
        self.bytes = torch.full(
            (2 * GUARD + size * dtype.itemsize + 64,), POISON, dtype=torch.uint8
        )
        start = GUARD + -(self.bytes.data_ptr() + GUARD) % 64 + place.offset * dtype.itemsize
        elements = self.bytes[start:][: size * dtype.itemsize].view(dtype)
        strides = (stride, 1)[-len(shape) :]
        self.tensor = torch.as_strided(elements, shape, strides, elements.storage_offset())

    @classmethod
    def holding(cls, values: Tensor | None, place: Place = CONTIGUOUS) -> Tensor | None:
        if values is None:
            return None
        memory = cls(tuple(values.shape), values.dtype, place)
        memory.tensor.copy_(values)
        return memory.tensor

    def written(self) -> Tensor:
        """What was written, which must be the tensor and nothing else."""
        result = self.tensor.clone().contiguous()
        words = {2: torch.int16, 4: torch.int32}[result.itemsize]
        assert not (result.view(words) == -1).any(), "not written entirely"
        self.tensor.view(words).fill_(-1)
        assert (self.bytes == POISON).all(), "written around the tensor"
        return result


def rows_of(x: Tensor | None, dtype: torch.dtype = f32) -> tuple[int, int, int]:
    return (0, TYPES[dtype], 0) if x is None else (x.data_ptr(), TYPES[x.dtype], x.stride(0))


def vector_of(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), TYPES[x.dtype])


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
