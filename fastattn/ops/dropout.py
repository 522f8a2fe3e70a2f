"""The multiplier that dropout applies: 1 / keep where the contract keeps an element, else 0.

Plain PyTorch paths multiply by it; fused kernels compute the same decisions in registers instead.
Backends: ``cpu`` (the C++ extension) and ``pytorch`` (:mod:`fastattn.dropout`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import dispatch, dropout, extension, tracing
from fastattn.extension import ACTIVATION as ACTIVATION
from fastattn.extension import RESIDUAL as RESIDUAL
from fastattn.ops._library import TOKEN_DROPOUT, check_device, define, mismatch


class AttentionDropout(NamedTuple):
    """Dropout of attention probabilities (B, H, Sq, Sk)."""

    dropout_p: float = 0.0
    seed: Tensor | None = None  # (1,) int64
    site: int = 0
    head_offset: int = 0  # global number of the first head

    @property
    def drops(self) -> bool:
        return dropout.threshold(self.dropout_p) > 0

    def factor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Tensor of ``shape`` to multiply by, None where nothing drops."""
        if not self.drops:
            return None
        if tracing.traced():
            decide = dropout.attention_decisions
            decisions = decide(self.seed, self.site, self.dropout_p, shape, self.head_offset)
            return decisions.to(dtype) * dropout.keep_scale(self.dropout_p)
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
            decisions = self.decisions(grouping, rows, columns)
            return (decisions.to(dtype) * self.scale).view(like.shape)
        factor = torch.ops.fastattn.token_dropout_factor.default
        return factor(*self, grouping, rows, columns, dtype).view(like.shape)

    def decisions(self, grouping: int, rows: int, columns: int) -> Tensor:
        """(rows, columns) bool, True where the contract keeps an element."""
        decide = (dropout.activation_decisions, dropout.residual_decisions)[grouping]
        rows_map = dropout.TokenRows(self.row_index, self.row_period, self.batch_first)
        return decide(
            self.seed, self.site, self.dropout_p, (rows, columns), rows_map, self.column_offset
        )


def token_dropout(
    input: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    row_index: Tensor | None,
    row_period: int | None,
    batch_first: bool,
    column_offset: int = 0,
) -> TokenDropout:
    """Check a token-wise op's row map and fill in its default period, ``input.shape[-2]``.

    An input of two dimensions is one sequence, whichever dimension comes first in batches.
    """
    if row_index is not None:
        rows = (input.shape[:-1].numel(),)
        if row_index.dtype != torch.int32 or row_index.shape != rows:
            got = f"{tuple(row_index.shape)} {row_index.dtype}"
            raise mismatch("row_index", f"{rows} torch.int32", got)
        check_device("row_index", row_index, input)
        row_index = row_index.contiguous()
        if row_period is None:
            raise mismatch("row_period", "given with row_index", None)
    if row_period is not None and not 0 <= row_period < 2**32:
        raise mismatch("row_period", "from 0 to 2**32 - 1", row_period)
    if column_offset < 0:
        raise mismatch("column_offset", "at least 0", column_offset)
    if row_period is None:
        batched = input.dim() > 2
        row_period = input.shape[-2] if batched or (batch_first and input.dim() == 2) else 1
    return TokenDropout(dropout_p, seed, site, row_index, row_period, batch_first, column_offset)


# --------------------------------------------------------------------- why not, per backend


def why_not_cpu(device: torch.device) -> str | None:
    return extension.why_not()


dispatch.register("dropout_factor", "cpu", extension, why_not_cpu)
dispatch.register("dropout_factor", "pytorch", dropout)


# ------------------------------------------------------------- schema, fake, implementation


def _in_extension(seed: Tensor) -> bool:
    return dispatch.choose("dropout_factor", seed) == "cpu"


def _scaled(decisions: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    factor = decisions.view(torch.int8).to(dtype, memory_format=torch.contiguous_format)
    return factor.mul_(scale)


def _attention_factor(
    dropout_p: float,
    seed: Tensor,
    site: int,
    head_offset: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    scale = dropout.keep_scale(dropout_p)
    if dropout.replays_twister(seed):
        decisions = dropout.twister_decisions(int(seed), site, dropout_p, tuple(shape))
    elif _in_extension(seed):
        out = torch.empty(shape, dtype=dtype)
        threshold = dropout.threshold(dropout_p)
        extension.attention_factor(out, scale, int(seed), site, threshold, head_offset)
        return out
    else:
        decisions = dropout.attention_decisions(seed, site, dropout_p, tuple(shape), head_offset)
    return _scaled(decisions, scale, dtype)


def _token_factor(
    dropout_p: float,
    seed: Tensor,
    site: int,
    row_index: Tensor | None,
    row_period: int,
    batch_first: bool,
    column_offset: int,
    grouping: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    scale = dropout.keep_scale(dropout_p)
    if dropout.replays_twister(seed):
        decisions = dropout.twister_decisions(int(seed), site, dropout_p, (rows, columns))
    elif _in_extension(seed):
        out = torch.empty(rows, columns, dtype=dtype)
        extension.token_factor(
            out,
            scale,
            int(seed),
            site,
            dropout.threshold(dropout_p),
            grouping,
            row_index,
            row_period,
            batch_first,
            column_offset,
        )
        return out
    else:
        dropped = TokenDropout(
            dropout_p, seed, site, row_index, row_period, batch_first, column_offset
        )
        decisions = dropped.decisions(grouping, rows, columns)
    return _scaled(decisions, scale, dtype)


define(
    "attention_dropout_factor(float dropout_p, Tensor seed, int site, SymInt head_offset, "
    "SymInt[] shape, ScalarType dtype) -> Tensor",
    _attention_factor,
    lambda dropout_p, seed, site, head_offset, shape, dtype: seed.new_empty(shape, dtype=dtype),
)
define(
    f"token_dropout_factor({TOKEN_DROPOUT.replace('Tensor? seed', 'Tensor seed')}, "
    "int grouping, SymInt rows, SymInt columns, ScalarType dtype) -> Tensor",
    _token_factor,
    lambda *arguments: arguments[1].new_empty(arguments[-3:-1], dtype=arguments[-1]),
)
