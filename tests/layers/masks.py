"""Masks in every form torch's encoder layer takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.layers.pairs import HEADS

BATCH, LENGTH = 3, 6
INFINITY = float("inf")


def bool_padding(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """Sequences of different lengths, none of them empty."""
    lengths = length - torch.arange(batch) * (length - 1) // max(batch, 1)
    return torch.arange(length) >= lengths[:, None]


def as_float(mask: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(mask, -INFINITY)


def causal(length: int = LENGTH) -> Tensor:
    return torch.ones(length, length).triu(1).bool()


def scattered(*leading: int, length: int = LENGTH) -> Tensor:
    """A random bool mask in which every query keeps a key, itself."""
    mask = torch.rand(*leading, length, length) < 0.4
    return mask & ~torch.eye(length, dtype=torch.bool)


def bias(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


SRC_MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "bool": scattered,
    "0/-inf": lambda: as_float(scattered()),
    "bias": lambda: bias(LENGTH, LENGTH),
    "bool per head": lambda: scattered(BATCH * HEADS),
    "0/-inf per head": lambda: as_float(scattered(BATCH * HEADS)),
    "bias per head": lambda: bias(BATCH * HEADS, LENGTH, LENGTH),
    "bias per head, expanded": lambda: bias(1, LENGTH, LENGTH).expand(BATCH * HEADS, -1, -1),
}
PADDING_MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "bool": bool_padding,
    "0/-inf": lambda: as_float(bool_padding()),
    "bias": lambda: bias(BATCH, LENGTH),
    "bool, leading": lambda: bool_padding().flip(1),
    "bool, scattered": lambda: torch.rand(BATCH, LENGTH) < (torch.arange(LENGTH) > 0) * 0.6,
}
