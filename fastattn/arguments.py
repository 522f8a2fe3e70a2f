"""The arguments that ops and backends pass along together, in the order of the schemas.

And the dtypes and shapes of results that follow from them.
"""

from __future__ import annotations

import itertools
import math
from collections import namedtuple
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import dropout, tracing


class AttentionDropout(NamedTuple):
    """Dropout of attention probabilities (B, H, Sq, Sk)."""

    dropout_p: float = 0.0
    seed: Tensor | None = None  # (1,) int64
    site: int = 0
    head_offset: int = 0  # global number of the first head

    @property
    def drops(self) -> bool:
        return dropout.threshold(self.dropout_p) > 0

    @property
    def scale(self) -> float:
        """What a kept probability is multiplied by."""
        return dropout.keep_scale(self.dropout_p)

    def decisions(self, shape: Sequence[int]) -> Tensor:
        """(B, H, Sq, Sk) bool, True where the contract keeps a probability."""
        decide = dropout.attention_decisions
        return decide(self.seed, self.site, self.dropout_p, tuple(shape), self.head_offset)

    def factor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Tensor of ``shape`` to multiply by, None where nothing drops."""
        if not self.drops:
            return None
        if tracing.traced():
            return self.decisions(shape).to(dtype) * self.scale
        return torch.ops.fastattn.attention_dropout_factor.default(*self, list(shape), dtype)


class TokenDropout(NamedTuple):
    """Dropout of a token tensor (..., columns), whose leading dimensions are its rows."""

    dropout_p: float = 0.0
    seed: Tensor | None = None  # (1,) int64
    site: int = 0
    row_index: Tensor | None = None  # (rows,) int32: see dropout.TokenRows
    row_period: int = 1
    batch_first: bool = True
    column_offset: int = 0  # global number of the first column

    @classmethod
    def of(cls, options: Any) -> TokenDropout:
        """The one among an op's options (:func:`options_of`)."""
        return cls(*[getattr(options, name) for name in cls._fields])

    @property
    def drops(self) -> bool:
        return dropout.threshold(self.dropout_p) > 0

    @property
    def scale(self) -> float:
        """What a kept element is multiplied by."""
        return dropout.keep_scale(self.dropout_p)

    @property
    def replays_twister(self) -> bool:
        """Whether torch's generator decides; then no kernel of ours can."""
        return dropout.replays_twister(self.seed)

    def of_rows(self, first: int, last: int) -> TokenDropout:
        """The dropout of the rows from ``first`` to before ``last`` on their own."""
        if not self.drops:
            return self
        if self.replays_twister:  # which knows no rows: another seed, negative too
            return self._replace(seed=torch.div(self.seed, 2, rounding_mode="floor") - first)
        if self.row_index is not None:
            return self._replace(row_index=self.row_index[first:last])
        index = torch.arange(first, last, dtype=torch.int32, device=self.seed.device)
        return self._replace(row_index=index)

    def factor(self, like: Tensor, grouping: int, dtype: torch.dtype) -> Tensor | None:
        """Tensor of ``like``'s shape to multiply by, None where nothing drops."""
        if not self.drops:
            return None
        rows, columns = math.prod(like.shape[:-1]), like.shape[-1]
        if tracing.traced():
            factor = self.decisions(grouping, rows, columns).to(dtype) * self.scale
            return factor.view(like.shape)
        factor = torch.ops.fastattn.token_dropout_factor.default
        return factor(*self, grouping, rows, columns, dtype).view(like.shape)

    def decisions(self, grouping: int, rows: int, columns: int) -> Tensor:
        """(rows, columns) bool, True where the contract keeps an element."""
        decide = (dropout.activation_decisions, dropout.residual_decisions)[grouping]
        rows_map = dropout.TokenRows(self.row_index, self.row_period, self.batch_first)
        return decide(
            self.seed, self.site, self.dropout_p, (rows, columns), rows_map, self.column_offset
        )


#: The same, as an op schema declares them.
TOKEN_DROPOUT = (
    "float dropout_p, Tensor? seed, int site, "
    "Tensor? row_index, SymInt row_period, bool batch_first, SymInt column_offset"
)


class AttentionArguments(NamedTuple):
    """Everything an attention op takes besides query, key and value."""

    key_padding_mask: Tensor | None = None  # (B, Sk) bool (True: ignore) or float (added)
    attn_mask: Tensor | None = None  # (B|1, H|1, Sq|1, Sk|1) bool (True: ignore) or float (added)
    key_lengths: Tensor | None = None  # (B,) int32: keys from here on are ignored
    query_lengths: Tensor | None = None  # (B,) int32: queries from here on give zeros
    cu_seqlens_q: Tensor | None = None  # (B + 1,) int32: packed sequences
    cu_seqlens_k: Tensor | None = None  # (B + 1,) int32
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    is_causal: bool = False
    scale: float = 1.0
    dropout_p: float = 0.0
    seed: Tensor | None = None  # (1,) int64
    site: int = 0
    head_offset: int = 0
    backend: str = "pytorch"

    @property
    def masks(self) -> tuple[Tensor | None, Tensor | None]:
        """Those that may be float and have a gradient."""
        return self.key_padding_mask, self.attn_mask

    @property
    def is_unmasked(self) -> bool:
        """Whether every query may attend to every key, but for ``is_causal``."""
        return (
            self.key_padding_mask is None
            and self.attn_mask is None
            and self.key_lengths is None
            and self.query_lengths is None
            and self.cu_seqlens_q is None
        )

    @property
    def dropout(self) -> AttentionDropout:
        return AttentionDropout(self.dropout_p, self.seed, self.site, self.head_offset)


#: The same, as an op schema declares them.
ATTENTION_ARGUMENTS = (
    "Tensor? key_padding_mask, Tensor? attn_mask, Tensor? key_lengths, Tensor? query_lengths, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "bool is_causal, float scale, float dropout_p, Tensor? seed, int site, SymInt head_offset, "
    "str backend"
)


class FeedForwardArguments(NamedTuple):
    """Everything the feed-forward block takes besides its input."""

    weight1: Tensor  # (d_ff, d)
    bias1: Tensor | None  # (d_ff,)
    weight2: Tensor  # (d_out, d_ff)
    bias2: Tensor | None  # (d_out,)
    activation: str
    dropout: TokenDropout


class NormArguments(NamedTuple):
    """The affine map, epsilon and result of a layer norm."""

    weight: Tensor | None  # (N,)
    bias: Tensor | None  # (N,)
    eps: float
    out_dtype: torch.dtype

    @classmethod
    def of(cls, options: Any) -> NormArguments:
        """The one among an op's options (:func:`options_of`)."""
        return cls(*[getattr(options, name) for name in cls._fields])


#: The same, as an op schema declares them.
NORM_ARGUMENTS = "Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype"


def options_of(name: str, *fields: str | type) -> type:
    """A named tuple of what an op takes besides its tensors, by the names of its schema.

    Args:
        name: of the tuple.
        fields: names; in place of a named tuple stand its own.
    """
    names = [[field] if isinstance(field, str) else field._fields for field in fields]
    return namedtuple(name, itertools.chain(*names))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def like_query(query: Tensor) -> Tensor:
    """An empty contiguous tensor of ``query``'s shape, sequence-first in memory where it is."""
    if query.dim() >= 4 and query.stride(0) < query.stride(1):
        batch, length = query.shape[:2]
        return query.new_empty(length, batch, *query.shape[2:]).transpose(0, 1)
    return query.new_empty(query.shape)


def stream_dtype(input: Tensor, residual: Tensor | None) -> torch.dtype:
    """The dtype of the residual stream: ``input`` and ``residual`` promoted."""
    return input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype autocast wants matrix products of ``tensor`` in, None where it is off."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def autocast_off(tensor: Tensor) -> AbstractContextManager:
    """Where no product of ``tensor`` is cast; for what runs outside of an op."""
    if autocast_dtype(tensor) is None:
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
