"""What launchers have in common: tensors, and the dropout of tokens, as kernels take them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.arguments import TokenDropout
from fastattn.dropout import threshold

ACCESS_BYTES = 16  # of the widest load and store


def rows_of(x: Tensor | None) -> Tensor | None:
    """(rows, columns) with adjacent columns: a view where strides allow it, else a copy."""
    if x is None:
        return None
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def decides(dropout: TokenDropout) -> bool:
    """Whether a seed decides what drops; what is made from a result drops without one."""
    return dropout.drops and dropout.seed is not None


def dropout_arguments(dropout: TokenDropout) -> dict[str, Any]:
    """What every kernel that drops takes of a dropout, by the names that all of them use."""
    return {
        "Seed": dropout.seed if decides(dropout) else None,
        "RowIndex": contiguous(dropout.row_index) if decides(dropout) else None,
        "site": dropout.site,
        "threshold": threshold(dropout.dropout_p),
        "scale": dropout.scale,
        "row_period": max(dropout.row_period, 1),
        "BATCH_FIRST": dropout.batch_first,
    }
