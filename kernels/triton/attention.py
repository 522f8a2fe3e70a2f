"""Launchers of the attention kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from fastattn.dropout import keep_scale, threshold
from fastattn.kernels.attention_backward import (
    attention_key_gradient_kernel,
    attention_query_gradient_kernel,
)
from fastattn.kernels.attention_configs import Config, choose, choose_whole_pass
from fastattn.kernels.attention_forward import attention_forward_kernel
from fastattn.kernels.attention_mask_gradient import attention_mask_gradient_kernel
from fastattn.kernels.attention_tiles import Tile
from fastattn.kernels.device import capability, multiprocessors
from fastattn.kernels.launch import ACCESS_BYTES, contiguous

STRIDE_LIMIT = 1 << 23  # elements between rows, from which offsets inside a tile need 64 bits


# -------------------------------------------------------------------------------------- launches


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, arguments: Any, out: Tensor, statistics: Tensor
) -> None:
    """Write the output and what backward needs of each softmax.

    Args:
        query: (B, Sq, H, D), or (Tq, H, D) packed. Where features are not adjacent, the kernels
            read a copy.
        key, value: (B, Sk, H, D), or (Tk, H, D) packed.
        arguments: an :class:`fastattn.arguments.AttentionArguments`.
        out: where to write, like ``query``, with adjacent features.
        statistics: (1, B, H, Sq), or (1, H, Tq) packed, fp32 (fp64 for fp64), contiguous: where to
            write the logarithm to base 2 of the softmax's denominator. Or (2, B, H, Sq): the
            largest score, and 1 over the sum of e^(score - largest). Where a query has no key the
            first is infinite.
    """
    query, key, value = (_addressable(x) for x in (query, key, value))
    launch = Launch(arguments, statistics, q=query, k=key, v=value, out=out)
    config = choose("forward", launch)
    blocks = triton.cdiv(launch.seqlen_q, config.BLOCK_M)
    launch.run(
        attention_forward_kernel,
        config,
        blocks * launch.programs,
        (query, key, value, out),
        query_blocks=blocks,
        **launch.strides("q", "k", "v", "out"),
        **launch.packing,
    )


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    arguments: Any,
    grad_masks: tuple[bool, bool],
    gradients: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor | None, Tensor | None]:
    """Write the gradients of query, key and value; return those of the two masks.

    Args:
        grad_masks: whether the gradients of the key padding mask and of the mask are wanted.
        gradients: where to write, like query, key and value, with adjacent features.

    The others are those of forward, and what it wrote.
    """
    query, key, value, grad_out = (_addressable(x) for x in (query, key, value, grad_out))
    dq, dk, dv = gradients
    rows = {"do": grad_out, "q": query, "k": key, "v": value, "dq": dq}
    launch = Launch(arguments, statistics, **rows, out=out, dk=dk, dv=dv)
    whole = None if any(grad_masks) else choose_whole_pass(launch)
    delta = None if whole else torch.empty_like(statistics[0])
    inputs = grad_out, query, key, value
    if not whole:
        config = choose("query gradient", launch)
        blocks = triton.cdiv(launch.seqlen_q, config.BLOCK_M)
        launch.run(
            attention_query_gradient_kernel,
            config,
            blocks * launch.programs,
            inputs,
            Out=out,
            Delta=delta,
            dQ=dq,
            query_blocks=blocks,
            **launch.strides(*rows, "out"),
            **launch.packing,
        )
    config = whole or choose("key gradient", launch)
    blocks = 1 if whole else triton.cdiv(launch.seqlen_k, config.BLOCK_N)
    launch.run(
        attention_key_gradient_kernel,
        config,
        blocks * launch.programs,
        inputs,
        Delta=delta,
        dQ=dq if whole else None,
        dK=dk,
        dV=dv,
        key_blocks=blocks,
        **launch.strides(*rows, "dk", "dv"),
        **launch.packing,
    )
    d_padding = d_mask = None
    if grad_masks[0]:
        mask = arguments.key_padding_mask
        d_padding = _mask_gradient(launch, inputs, delta, mask[:, None, None]).view_as(mask)
    if grad_masks[1]:
        d_mask = _mask_gradient(launch, inputs, delta, arguments.attn_mask)
    return d_padding, d_mask


def _mask_gradient(
    launch: Launch, inputs: tuple[Tensor, ...], delta: Tensor, mask: Tensor
) -> Tensor:
    """The gradient of a float ``mask``, (B|1, H|1, Sq|1, Sk|1)."""
    if launch.programs == 0:
        return torch.zeros_like(mask, memory_format=torch.contiguous_format)
    config = choose("mask gradient", launch)
    query_blocks = triton.cdiv(launch.seqlen_q, config.BLOCK_M)
    key_blocks = triton.cdiv(launch.seqlen_k, config.BLOCK_N)
    blocks = launch.batch, launch.heads, query_blocks, key_blocks
    summed = [size == 1 for size in mask.shape]
    programs = math.prod(n for n, is_summed in zip(blocks, summed, strict=True) if not is_summed)
    tiles = math.prod(n for n, is_summed in zip(blocks, summed, strict=True) if is_summed)
    splits = max(1, min(tiles, 2 * multiprocessors(delta.device) // max(programs, 1)))
    dtype = mask.dtype if splits == 1 else delta.dtype
    partial = delta.new_empty(splits, *mask.shape, dtype=dtype)
    launch.run(
        attention_mask_gradient_kernel,
        config,
        programs * splits if partial.numel() else 0,
        inputs,
        Delta=delta,
        dMask=partial,
        dmask_strides=(partial.stride(0), *_broadcast_strides(partial[0])),
        splits=splits,
        SUM_BATCH=summed[0],
        SUM_HEADS=summed[1],
        SUM_M=summed[2],
        SUM_N=summed[3],
        **launch.strides("do", "q", "k", "v"),
    )
    return partial[0] if splits == 1 else partial.sum(0).to(mask.dtype)


class Launch:
    """What the kernels of one call have in common."""

    def __init__(self, arguments: Any, statistics: Tensor, **rows: Tensor) -> None:
        query, key = rows["q"], rows["k"]
        self.rows, self.device, self.dtype = rows, query.device, query.dtype
        self.heads, self.head_dim = query.shape[-2:]
        self.is_packed = arguments.cu_seqlens_q is not None
        if self.is_packed:
            self.batch = arguments.cu_seqlens_q.numel() - 1
            self.seqlen_q, self.seqlen_k = arguments.max_seqlen_q, arguments.max_seqlen_k
        else:
            self.batch, self.seqlen_q = query.shape[:2]
            self.seqlen_k = key.shape[1]
        #: One for each head of each sequence, and of the rows after the last packed one.
        self.programs = (self.batch + self.is_packed) * self.heads * min(self.head_dim, 1)
        self.has_pair_mask = arguments.attn_mask is not None or arguments.is_causal
        self.unit = math.gcd(
            ACCESS_BYTES // query.element_size(),
            *(stride for x in rows.values() for stride in x.stride()[:-1]),
        )
        self.packing = {
            "CuSeqlensQ": contiguous(arguments.cu_seqlens_q),
            "CuSeqlensK": contiguous(arguments.cu_seqlens_k),
            "tokens_q": query.shape[0],
            "tokens_k": key.shape[0],
        }
        pairs = _PairMask(arguments.attn_mask, self.seqlen_k)
        self.arguments = {
            **self._masks(arguments, pairs),
            **self._scores(arguments, statistics),
            "batch": self.batch,
            "heads": self.heads,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
        }
        self.tile = self._tile(arguments, statistics, pairs)

    def _tile(self, arguments: Any, statistics: Tensor, pairs: _PairMask) -> dict[str, Any]:
        """A :class:`Tile`, but for its blocks."""
        row_strides = [x.stride(-3) for x in self.rows.values()]
        return {
            "HEAD_DIM": self.head_dim,
            "IS_CAUSAL": arguments.is_causal,
            "BASE_2": statistics.shape[0] == 1,
            "PRECISION": _precision(self.dtype),
            "OWNS_ROW": capability(self.device)[0] == 10,
            "WIDE": max(*row_strides, pairs.strides[2]) >= STRIDE_LIMIT,
            "UNIT": self.unit,
            "PAIR_UNIT": pairs.unit,
            "PAIR_STRIDE": pairs.strides[3],
        }

    def _scores(self, arguments: Any, statistics: Tensor) -> dict[str, Any]:
        """What makes probabilities of scores, and drops them."""
        return {
            "RowShift": statistics[0],
            "RowScale": statistics[1] if statistics.shape[0] == 2 else None,
            "row_stride": statistics.shape[-1],
            "scale": arguments.scale,
            "Seed": arguments.seed if arguments.dropout.drops else None,
            "site": arguments.site,
            "head_offset": arguments.head_offset,
            "threshold": threshold(arguments.dropout_p),
            "keep_scale": keep_scale(arguments.dropout_p),
        }

    def _masks(self, arguments: Any, pairs: _PairMask) -> dict[str, Any]:
        """Which keys count."""
        padding = _as_bytes(arguments.key_padding_mask)
        if padding is not None and padding.stride(1) != 1:
            padding = padding.contiguous()
        return {
            "KeyMask": padding,
            "key_stride": 0 if padding is None else padding.stride(0),
            "PairMask": pairs.mask,
            "pair_strides": tuple(stride // pairs.unit for stride in pairs.strides[:3]),
            "pair_columns": self.seqlen_k // pairs.unit,
            "KeyLengths": contiguous(arguments.key_lengths),
            "QueryLengths": contiguous(arguments.query_lengths),
        }

    def strides(self, *names: str) -> dict[str, tuple[int, ...]]:
        """The strides of batch, row and head, in units; a packed tensor has none of the batch."""
        found = {}
        for name in names:
            strides = tuple(stride // self.unit for stride in self.rows[name].stride()[:-1])
            found[f"{name}_strides"] = (0, *strides) if self.is_packed else strides
        return found

    def run(
        self,
        kernel: Any,
        config: Config,
        programs: int,
        tensors: tuple[Tensor, ...],
        **arguments: Any,
    ) -> None:
        if programs == 0:
            return
        with torch.cuda.device_of(self.rows["q"]):
            kernel[(programs,)](
                *tensors,
                **self.arguments,
                **arguments,
                TILE=Tile(config.BLOCK_M, config.BLOCK_N, **self.tile),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )


class _PairMask:
    """A mask of pairs as kernels read it: its strides, and the unit that shows their alignment."""

    def __init__(self, mask: Tensor | None, seqlen_k: int) -> None:
        self.mask, self.unit, self.strides = _as_bytes(mask), 1, (0, 0, 0, 0)
        if mask is not None:
            if _broadcast_strides(mask)[3] > 1:
                self.mask = _with_adjacent_columns(self.mask)
            self.strides = _broadcast_strides(self.mask)
            aligned = ACCESS_BYTES // self.mask.element_size()
            self.unit = math.gcd(aligned, seqlen_k, *self.strides[:3])


def _addressable(x: Tensor) -> Tensor:
    """``x`` itself where its features are adjacent."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _with_adjacent_columns(mask: Tensor) -> Tensor:
    """A copy, of what is not expanded."""
    stored = tuple(slice(None) if stride else slice(1) for stride in mask.stride())
    return mask[stored].contiguous().expand(mask.shape)


def _as_bytes(mask: Tensor | None) -> Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def _broadcast_strides(x: Tensor) -> tuple[int, ...]:
    """Strides that are zero along dimensions of one element."""
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True))


def _precision(dtype: torch.dtype) -> str:
    """How fp32 is multiplied: by three TF32 products, or by one where torch is told so too."""
    if dtype == torch.float64:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
