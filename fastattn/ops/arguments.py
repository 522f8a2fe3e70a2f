"""The arguments that ops and backends pass along together, in the order of the schemas."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops.dropout import AttentionDropout, TokenDropout


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


#: The same, as an op schema declares them.
NORM_ARGUMENTS = "Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype"
