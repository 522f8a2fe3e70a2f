"""Padded batches and packed tokens, without a synchronisation with the device.

Packed tokens are the real tokens of a batch in one row after another, (T, ...), with the cumulative
lengths of its sequences beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(tokens: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """Packed tokens (T, ...) as (B, length, ...), zero past each sequence's end."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    rows = starts[:, None] + torch.arange(length, device=tokens.device)
    zero_row = tokens.new_zeros(1, *tokens.shape[1:])
    rows = torch.where(rows < ends[:, None], rows, tokens.shape[0])
    return torch.cat((tokens, zero_row))[rows]


def pack(padded: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """(B, length, ...) as packed tokens (total, ...), the inverse of :func:`unpack`.

    Tokens past the last sequence, or past ``length`` in theirs, are zero.
    """
    batch, length = padded.shape[:2]
    if batch == 0 or length == 0:
        return torch.cat((padded.flatten(0, 1), padded.new_zeros(total, *padded.shape[2:])))
    sequence, position = _coordinates(cu_seqlens, total)
    outside = (sequence >= batch) | (position >= length)
    tokens = padded[sequence.clamp(max=batch - 1), position.clamp(max=length - 1)]
    return tokens.masked_fill_(outside.view(-1, *[1] * (padded.dim() - 2)), 0)


def row_index(cu_seqlens: Tensor, total: int, period: int) -> Tensor:
    """(total,) int32: the row of each packed token in a batch padded to ``period`` tokens.

    It keeps dropout decisions those of the padded batch (:class:`fastattn.dropout.TokenRows`).
    """
    sequence, position = _coordinates(cu_seqlens, total)
    return (sequence * period + position).to(torch.int32)


def _coordinates(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(sequence, position) of each packed token."""
    token = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    return sequence, token - cu_seqlens[sequence]
