"""Attention in plain PyTorch."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import tracing
from fastattn.arguments import AttentionArguments, accumulation_dtype, autocast_off
from fastattn.packing import pack, unpack


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arguments: AttentionArguments,
    out: Tensor,
    statistics: Tensor,
) -> None:
    """Write the output to ``out``, of ``query``'s shape; ``statistics`` stays empty."""
    padded, dense = _padded(query, key, value, arguments)
    q, k, v = (_heads_first(x) for x in padded)
    probabilities, dead = _probabilities(q, k, dense)
    factor = arguments.dropout.factor(probabilities.shape, probabilities.dtype)
    if factor is not None:
        probabilities.mul_(factor)
    result = probabilities.to(v.dtype) @ v
    if dead is not None:
        result.masked_fill_(dead, 0)
    out.copy_(_as_given(result.transpose(1, 2), arguments.cu_seqlens_q, query.shape[0]))


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    arguments: AttentionArguments,
    grad_masks: tuple[bool, bool],
    gradients: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor | None, Tensor | None]:
    """Write the gradients of query, key and value; return those of the two masks, where wanted.

    P is recomputed, and neither ``out`` nor ``statistics`` is used. With M the dropout multiplier:
    dV = (P M)^T dO, dP = M (dO V^T), dS = P (dP - rowsum(dP P)), dQ = scale dS K,
    dK = scale dS^T Q.
    """
    cu_q, cu_k = arguments.cu_seqlens_q, arguments.cu_seqlens_k
    lengths_q, lengths_k = arguments.query_lengths, arguments.key_lengths
    padded, dense = _padded(query, key, value, arguments)
    if cu_q is not None:
        d_out = unpack(grad_out, cu_q, arguments.max_seqlen_q)
    else:
        (d_out,) = _zero_past(lengths_q, grad_out)
    q, k, v, d_out = (_heads_first(x) for x in (*padded, d_out))
    probabilities, _ = _probabilities(q, k, dense)
    factor = arguments.dropout.factor(probabilities.shape, probabilities.dtype)
    d_scores = (d_out @ v.transpose(-1, -2)).to(probabilities.dtype)  # dP before dropout
    dropped = probabilities
    if factor is not None:
        d_scores.mul_(factor)
        dropped = factor.mul_(probabilities)
    d_value = dropped.to(v.dtype).transpose(-1, -2) @ d_out
    torch.ops.aten._softmax_backward_data.out(
        d_scores, probabilities, -1, d_scores.dtype, grad_input=d_scores
    )
    d_padding = d_mask = None
    if grad_masks[0]:
        d_padding = d_scores.sum((1, 2)).to(arguments.key_padding_mask.dtype)
    if grad_masks[1]:
        mask = arguments.attn_mask
        d_mask = d_scores.sum_to_size(mask.shape).to(mask.dtype)
    d_scores = d_scores.to(q.dtype)
    d_query = (d_scores @ k).mul_(arguments.scale)
    d_key = (d_scores.transpose(-1, -2) @ q).mul_(arguments.scale)
    d_query, d_key, d_value = (x.transpose(1, 2) for x in (d_query, d_key, d_value))
    if cu_q is not None:
        d_query = pack(d_query, cu_q, query.shape[0])
        d_key, d_value = (pack(x, cu_k, key.shape[0]) for x in (d_key, d_value))
    else:
        (d_query,) = _zero_past(lengths_q, d_query)
        d_key, d_value = _zero_past(lengths_k, d_key, d_value)
    for target, gradient in zip(gradients, (d_query, d_key, d_value), strict=True):
        target.copy_(gradient)
    return d_padding, d_mask


def attention_composite(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    arguments: AttentionArguments,
) -> Tensor:
    """Attention from explicit probabilities, differentiable in every mode and order."""
    arguments = arguments._replace(key_padding_mask=key_padding_mask, attn_mask=attn_mask)
    padded, dense = _padded(query, key, value, arguments)
    q, k, v = (x.transpose(1, 2) for x in padded)
    added, excluded = _mask_terms(dense, q.shape[2], k.shape[2], q.device)
    wide = _sum_dtype(arguments, accumulation_dtype(q.dtype))
    bias, dead = _bias(added, excluded, wide)
    with autocast_off(query):
        scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * arguments.scale
        if bias is not None:
            scores = scores + bias
        probabilities = torch.softmax(scores, -1)
        factor = arguments.dropout.factor(scores.shape, scores.dtype)
        if factor is not None:
            probabilities = probabilities * factor
        out = probabilities.to(v.dtype) @ v
    dead = _or_past(dead, dense.query_lengths, q.shape[2])
    if dead is not None:
        out = out.masked_fill(dead, 0)
    return _as_given(out.transpose(1, 2), arguments.cu_seqlens_q, query.shape[0])


def attention_without_dropout(
    query: Tensor, key: Tensor, value: Tensor, arguments: AttentionArguments
) -> Tensor:
    """torch's own scaled_dot_product_attention, with its own autograd; nothing may drop.

    It takes a mask in the dtype of query. Where that does not hold every number of a float mask,
    everything is in the dtype that does: a finite number too large for 16 bits is no infinity.
    """
    if arguments.is_unmasked:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        is_causal, scale = arguments.is_causal, arguments.scale
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
        return out.transpose(1, 2)
    dtype = _sum_dtype(arguments, query.dtype)
    if dtype != query.dtype:
        wide = (x.to(dtype) for x in (query, key, value))
        with autocast_off(query):
            return attention_without_dropout(*wide, arguments).to(query.dtype)
    padded, dense = _padded(query, key, value, arguments)
    q, k, v = (x.transpose(1, 2) for x in padded)
    bias, dead = _bias(*_mask_terms(dense, q.shape[2], k.shape[2], q.device), dtype)
    out = F.scaled_dot_product_attention(q, k, v, bias, scale=arguments.scale)
    dead = _or_past(dead, dense.query_lengths, q.shape[2])
    if dead is not None:
        out = out.masked_fill(dead, 0)
    return _as_given(out.transpose(1, 2), arguments.cu_seqlens_q, query.shape[0])


def _probabilities(
    q: Tensor, k: Tensor, arguments: AttentionArguments
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T scale + masks), a fresh (B, H, Sq, Sk), and its rows that are zero.

    Those have no key left, or lie past ``query_lengths``.
    """
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    added, excluded = _mask_terms(arguments, seqlen_q, seqlen_k, q.device)
    wide = _sum_dtype(arguments, accumulation_dtype(q.dtype))
    bias, dead = _bias(added, excluded, wide)
    if not added and len(excluded) == arguments.is_causal:
        dead = None  # a causal mask alone leaves a key to every row
    scores = (q.to(wide) * arguments.scale) @ k.to(wide).transpose(-1, -2)
    if bias is not None:
        scores.add_(bias)
    dead = _or_past(dead, arguments.query_lengths, seqlen_q)
    probabilities = torch.softmax(scores, -1)
    if dead is not None:
        probabilities.masked_fill_(dead, 0)
    return probabilities, dead


def _mask_terms(
    arguments: AttentionArguments, seqlen_q: int, seqlen_k: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Float masks, to add, and bool ones, True to exclude; they broadcast to (B, H, Sq, Sk)."""
    padding, mask = arguments.key_padding_mask, arguments.attn_mask
    masks = [None if padding is None else padding[:, None, None, :], mask]
    added = [x for x in masks if x is not None and x.dtype != torch.bool]
    excluded = [x for x in masks if x is not None and x.dtype == torch.bool]
    if arguments.key_lengths is not None:
        excluded.append(_past(arguments.key_lengths, seqlen_k)[:, None, None, :])
    if arguments.is_causal:
        excluded.append(torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device).triu_(1))
    return added, excluded


def _sum_dtype(arguments: AttentionArguments, dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores in ``dtype`` with float masks added; with two of them fp32 or wider.

    It holds every number of each: a finite mask must not become infinite.
    """
    count = 0
    for mask in arguments.masks:
        if mask is not None and mask.dtype != torch.bool:
            dtype, count = torch.promote_types(dtype, mask.dtype), count + 1
    return dtype if count < 2 else accumulation_dtype(dtype)


def _bias(
    added: list[Tensor], excluded: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """One additive bias, and the rows (…, Sq, 1) that have no key left, in which it is zero.

    So no row of a softmax is 0 / 0, whatever kernel computes it. The bias has a head dimension only
    where ``attn_mask`` has one.
    """
    if not added and not excluded:
        return None, None
    if len(added) == 1 and not excluded:
        bias = added[0].to(dtype)
        dead = (bias == float("-inf")).all(-1, keepdim=True)
        return bias.masked_fill(dead, 0), dead
    out = functools.reduce(torch.logical_or, excluded + [x == float("-inf") for x in added])
    dead = out.all(-1, keepdim=True)
    fill = torch.where(dead, 0.0, float("-inf")).to(dtype)
    if not added:
        return torch.where(out, fill, 0.0), dead
    bias = added[0].to(dtype) if len(added) == 1 else _sum_of(*added, dtype)
    return torch.where(out, fill, bias), dead


def _sum_of(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Two masks added, at least the least number of ``dtype``; gradients pass that bound.

    So two masks that both hold it exclude no key; elements where one is -inf do not matter.
    """
    total = first.to(dtype) + second.to(dtype)
    bounded = total.detach().clamp_(min=torch.finfo(dtype).min)
    if not (total.requires_grad or tracing.watched()):
        return bounded
    a, b = (x.masked_fill(x == float("-inf"), 0).to(dtype) * 0.5 for x in (first, second))
    half = a + b  # finite where the total is not
    return bounded + (half - half.detach()) * 2


def _or_past(dead: Tensor | None, query_lengths: Tensor | None, seqlen_q: int) -> Tensor | None:
    """The rows of ``dead``, (…, Sq, 1), and those past ``query_lengths``."""
    if query_lengths is None:
        return dead
    past = _past(query_lengths, seqlen_q)[:, None, :, None]
    return past if dead is None else dead | past


def _past(lengths: Tensor, length: int) -> Tensor:
    """(B, length) bool: True from each sequence's end on."""
    return torch.arange(length, device=lengths.device) >= lengths[:, None]


def _heads_first(x: Tensor) -> Tensor:
    """(B, S, H, D) as contiguous (B, H, S, D): batched products want it."""
    return x.transpose(1, 2).contiguous()


def _padded(
    query: Tensor, key: Tensor, value: Tensor, arguments: AttentionArguments
) -> tuple[tuple[Tensor, Tensor, Tensor], AttentionArguments]:
    """(B, S, H, D) each, packed or not, zero in rows that are ignored; and their arguments.

    Those rows may hold anything: their probability is zero, but 0 times NaN is NaN.
    """
    cu_q, cu_k = arguments.cu_seqlens_q, arguments.cu_seqlens_k
    if cu_q is None:
        (query,) = _zero_past(arguments.query_lengths, query)
        key, value = _zero_past(arguments.key_lengths, key, value)
        return (query, key, value), arguments
    padded = (
        unpack(query, cu_q, arguments.max_seqlen_q),
        unpack(key, cu_k, arguments.max_seqlen_k),
        unpack(value, cu_k, arguments.max_seqlen_k),
    )
    dense = arguments._replace(cu_seqlens_q=None, cu_seqlens_k=None, key_lengths=cu_k.diff())
    return padded, dense


def _zero_past(lengths: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, S, H, D) each, zero from each sequence's end on."""
    if lengths is None:
        return tensors
    past = _past(lengths, tensors[0].shape[1])[..., None, None]
    return tuple(torch.where(past, 0.0, x) for x in tensors)


def _as_given(padded: Tensor, cu_seqlens: Tensor | None, tokens: int) -> Tensor:
    """(B, S, H, D), packed again where it was."""
    return padded if cu_seqlens is None else pack(padded, cu_seqlens, tokens)
