"""Dropout factors by the C++ extension: ``kept`` where the contract keeps an element, else zero."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastattn.arguments import AttentionDropout, TokenDropout
from fastattn.dropout import ADJACENT, STRIDED, threshold
from fastattn.extension.loading import loaded
from fastattn.tracing import opaque

_BITS_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention_factor(dropout: AttentionDropout, shape: list[int], dtype: torch.dtype) -> Tensor:
    """What attention probabilities of ``shape`` are multiplied by, in ``dtype``."""
    out = torch.empty(shape, dtype=dtype)
    return write_attention_factor(
        out,
        dropout.scale,
        int(dropout.seed),
        dropout.site,
        threshold(dropout.dropout_p),
        dropout.head_offset,
    )


def token_factor(
    dropout: TokenDropout, grouping: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """What a token tensor (rows, columns) is multiplied by, in ``dtype``."""
    out = torch.empty(rows, columns, dtype=dtype)
    return write_token_factor(
        out,
        dropout.scale,
        int(dropout.seed),
        dropout.site,
        threshold(dropout.dropout_p),
        grouping,
        dropout.row_index,
        dropout.row_period,
        dropout.batch_first,
        dropout.column_offset,
    )


@opaque
def write_attention_factor(
    out: Tensor, kept: float, seed: int, site: int, threshold: int, head_offset: int = 0
) -> Tensor:
    """Fill ``out`` with the dropout factor of attention probabilities.

    Args:
        out: (batch, heads, query length, key length), contiguous, on the CPU; bool or floating.
        kept: what kept elements become (True where ``out`` is bool); dropped ones become zero.
        seed: the 64-bit key, in [0, 2**63).
        site: number of the dropout site.
        threshold: lanes below it drop, see :func:`fastattn.dropout.threshold`.
        head_offset: global number of the first head.

    Returns:
        ``out``.
    """
    extension = loaded()
    _check(out, 4)
    extension.attention_factor(
        out.data_ptr(),
        out.itemsize,
        _kept_bits(out.dtype, kept),
        seed,
        site,
        threshold,
        *out.shape,
        head_offset,
        torch.get_num_threads(),
    )
    return out


@opaque
def write_token_factor(
    out: Tensor,
    kept: float,
    seed: int,
    site: int,
    threshold: int,
    grouping: int,
    row_index: Tensor | None = None,
    period: int = 1,
    batch_first: bool = True,
    column_offset: int = 0,
) -> Tensor:
    """Fill ``out`` with the dropout factor of a token tensor.

    Args:
        out: (rows, columns), contiguous, on the CPU; bool or floating.
        kept: what kept elements become (True where ``out`` is bool); dropped ones become zero.
        seed: the 64-bit key, in [0, 2**63).
        site: number of the dropout site.
        threshold: lanes below it drop, see :func:`fastattn.dropout.threshold`.
        grouping: :data:`STRIDED` or :data:`ADJACENT`.
        row_index, period, batch_first: as in :class:`fastattn.dropout.TokenRows`.
        column_offset: global number of the first column.

    Returns:
        ``out``.
    """
    extension = loaded()
    _check(out, 2)
    if grouping not in (STRIDED, ADJACENT):
        raise ValueError(f"grouping must be STRIDED (0) or ADJACENT (1), but got {grouping}")
    if row_index is not None:
        _check_row_index(row_index, out.shape[0])
    extension.token_factor(
        out.data_ptr(),
        out.itemsize,
        _kept_bits(out.dtype, kept),
        seed,
        site,
        threshold,
        grouping,
        *out.shape,
        column_offset,
        0 if row_index is None else row_index.data_ptr(),
        max(period, 1),
        batch_first,
        torch.get_num_threads(),
    )
    return out


@lru_cache(maxsize=256)
def _kept_bits(dtype: torch.dtype, kept: float) -> int:
    """The bit pattern of ``kept`` in ``dtype``, as an unsigned integer."""
    value = torch.tensor([kept], dtype=dtype, device="cpu")
    bits = value.view(_BITS_DTYPES[dtype.itemsize]).item()
    return bits % (1 << 8 * dtype.itemsize)


def _check(out: Tensor, dimensions: int) -> None:
    if out.device.type != "cpu" or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous tensor on the CPU, but got strides {out.stride()} "
            f"of shape {tuple(out.shape)} on {out.device}"
        )
    if out.dim() != dimensions:
        raise ValueError(f"out must have {dimensions} dimensions, but got {tuple(out.shape)}")
    if out.dtype not in _DTYPES:
        raise TypeError(f"out must be bool, float16, bfloat16, float32 or float64, not {out.dtype}")


def _check_row_index(row_index: Tensor, rows: int) -> None:
    if row_index.dtype != torch.int32 or row_index.shape != (rows,):
        raise ValueError(
            f"row_index must be int32 of shape ({rows},), "
            f"but got {row_index.dtype} of shape {tuple(row_index.shape)}"
        )
    if row_index.device.type != "cpu" or not row_index.is_contiguous():
        raise ValueError(
            f"row_index must be contiguous on the CPU, but got strides {row_index.stride()} "
            f"on {row_index.device}"
        )
