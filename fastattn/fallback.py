"""The ops in plain PyTorch: the ``pytorch`` backend, and the composites autograd can see through.

``*_forward`` and ``*_backward`` run inside the ops, out of autograd's sight, and work in place
where they can. ``*_composite`` computes the same function (with the same dropout decisions) from
differentiable operations, for ``torch.func``, forward-mode AD and second derivatives.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import tracing
from fastattn.arguments import (
    AttentionArguments,
    FeedForwardArguments,
    NormArguments,
    TokenDropout,
    accumulation_dtype,
    autocast_off,
    stream_dtype,
)
from fastattn.dropout import ADJACENT, STRIDED
from fastattn.packing import pack, unpack

# ------------------------------------------------------------------------------------- attention


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
    if all(x is None for x in arguments[:5]):  # no mask, no lengths, not packed
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
    for mask in (arguments.key_padding_mask, arguments.attn_mask):
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


# ---------------------------------------------------------------------------------- feed-forward

#: The activations that have a fused path.
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda x: x,
}
_ACTIVATE_IN_PLACE = {
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "silu": lambda x: F.silu(x, inplace=True),
    "identity": lambda x: x,
}
_relu_backward, _gelu_backward, _silu_backward = (
    getattr(torch.ops.aten, name).grad_input
    for name in ("threshold_backward", "gelu_backward", "silu_backward")
)
_ACTIVATION_BACKWARD_IN_PLACE = {
    "relu": lambda grad, x: _relu_backward(grad, x, 0, grad_input=grad),
    "gelu": lambda grad, x: _gelu_backward(grad, x, approximate="none", grad_input=grad),
    "gelu_tanh": lambda grad, x: _gelu_backward(grad, x, approximate="tanh", grad_input=grad),
    "silu": lambda grad, x: _silu_backward(grad, x, grad_input=grad),
    "identity": lambda grad, x: grad,
}


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` out of autograd's sight.

    On a CPU a bias added in place costs one pass over the result; ``addmm`` writes it there first
    and reads it back.
    """
    if bias is not None and _adds_bias_in_place(input):
        return F.linear(input, weight).add_(bias)
    return F.linear(input, weight, bias)


def _adds_bias_in_place(input: Tensor) -> bool:
    exact = input.dtype in (torch.float32, torch.float64)
    return exact and input.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def _activation_factor(dropout: TokenDropout, hidden: Tensor) -> Tensor | None:
    """The multiplier of ``hidden``, at least fp32: in bf16 1 / keep itself is 0.2 % off."""
    return dropout.factor(hidden, STRIDED, accumulation_dtype(hidden.dtype))


def _activate(hidden: Tensor, activation: str, factor: Tensor | None) -> Tensor:
    """A fresh dropout(act(hidden))."""
    if activation == "identity":
        return hidden.clone() if factor is None else (hidden * factor).to(hidden.dtype)
    activated = ACTIVATIONS[activation](hidden)
    return activated if factor is None else activated.mul_(factor)


def product(
    input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """``linear`` of (tokens, d), into ``out`` where given."""
    if (
        out is not None
        and torch.is_grad_enabled()
        and (input.requires_grad or weight.requires_grad)
    ):
        return out.copy_(product(input, weight, bias))  # an exported op, which autograd looks into
    if bias is not None and not _adds_bias_in_place(input):
        return torch.addmm(bias, input, weight.t(), out=out)
    result = torch.mm(input, weight.t(), out=out)
    return result if bias is None else result.add_(bias)


def feed_forward_forward(
    input: Tensor, arguments: FeedForwardArguments, out: Tensor, hidden: Tensor | None
) -> None:
    """Write the output of (tokens, d) to ``out``, and to ``hidden``, if given, what backward wants.

    That is relu's result after dropout, else h = input @ weight1.T + bias1.
    """
    weight1, bias1, weight2, bias2, activation, dropout = arguments
    h = product(input, weight1, bias1, hidden)
    factor = _activation_factor(dropout, h)
    if activation == "relu":
        activated = h.relu_() if factor is None else h.relu_().mul_(factor)
    else:
        activated = _activate(h, activation, factor)
    product(activated, weight2, bias2, out)


def feed_forward_backward(
    grad_out: Tensor,
    input: Tensor,
    arguments: FeedForwardArguments,
    hidden: Tensor | None,
    d_input: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Write the gradient of the input, (tokens, d), to ``d_input``, if given.

    Returns those of weight1, bias1, weight2, bias2; None where not ``wanted``. ``hidden`` is None
    where forward kept nothing.
    """
    weight1, bias1, weight2, _, activation, dropout = arguments
    if hidden is None:
        hidden = product(input, weight1, bias1)
        if activation == "relu":
            hidden = _activate(hidden, "relu", _activation_factor(dropout, hidden))
    want_weight1, want_bias1, want_weight2, want_bias2 = wanted
    d_bias2 = grad_out.sum(0) if want_bias2 else None
    factor = None
    if activation == "relu":  # hidden is positive exactly where it was kept and relu passed
        activated, scale = hidden, dropout.scale
    else:
        factor, scale = _activation_factor(dropout, hidden), 1.0
        activated = _activate(hidden, activation, factor) if want_weight2 else None
    d_weight2 = grad_out.t() @ activated if want_weight2 else None
    if d_input is None and not (want_weight1 or want_bias1):
        return None, None, d_weight2, d_bias2
    d_hidden = torch.addmm(grad_out.new_zeros(1), grad_out, weight2, beta=0, alpha=scale)
    if factor is not None:
        d_hidden.mul_(factor)
    _ACTIVATION_BACKWARD_IN_PLACE[activation](d_hidden, hidden)
    if d_input is not None:
        torch.mm(d_hidden, weight1, out=d_input)
    return (
        d_hidden.t() @ input if want_weight1 else None,
        d_hidden.sum(0) if want_bias1 else None,
        d_weight2,
        d_bias2,
    )


def feed_forward_composite(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    dropout: TokenDropout,
) -> Tensor:
    activated = bias_activation_dropout_composite(
        F.linear(input, weight1, bias1), None, activation, dropout
    )
    return F.linear(activated, weight2, bias2)


def bias_activation_dropout_forward(
    input: Tensor, bias: Tensor | None, activation: str, dropout: TokenDropout
) -> Tensor:
    hidden = input if bias is None else input + bias
    return _activate(hidden, activation, _activation_factor(dropout, hidden))


def bias_activation_dropout_backward(
    grad_out: Tensor,
    input: Tensor,
    bias: Tensor | None,
    activation: str,
    dropout: TokenDropout,
    want_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``input``, and of ``bias`` in at least fp32, None if not wanted."""
    hidden = input if bias is None else input + bias
    factor = _activation_factor(dropout, hidden)
    grad = grad_out.clone() if factor is None else (grad_out * factor).to(grad_out.dtype)
    _ACTIVATION_BACKWARD_IN_PLACE[activation](grad, hidden)
    if not want_bias:
        return grad, None
    rows = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1])
    return grad, rows.sum(0, dtype=accumulation_dtype(grad.dtype))


def bias_activation_dropout_composite(
    input: Tensor, bias: Tensor | None, activation: str, dropout: TokenDropout
) -> Tensor:
    hidden = input if bias is None else input + bias
    activated = ACTIVATIONS[activation](hidden)
    factor = _activation_factor(dropout, hidden)
    return activated if factor is None else (activated * factor).to(activated.dtype)


# ------------------------------------------------------------------- residual and normalisation


def dropout_add_forward(
    input: Tensor, input_bias: Tensor | None, residual: Tensor | None, dropout: TokenDropout
) -> Tensor:
    """residual + dropout(input + input_bias), summed in at least fp32, a fresh tensor."""
    dtype = stream_dtype(input, residual)
    wide = accumulation_dtype(dtype)
    branch = input.to(wide)
    factor = dropout.factor(input, ADJACENT, wide)
    if factor is None:
        total = branch.clone() if residual is None else branch + residual
        if input_bias is not None:
            total.add_(input_bias)
    else:
        total = factor.mul_(branch if input_bias is None else branch + input_bias)
        if residual is not None:
            total.add_(residual)
    return total.to(dtype).contiguous()


def dropout_add_backward(
    grad: Tensor, dtype: torch.dtype, dropout: TokenDropout, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the dropped branch, fresh, in ``dtype``, and of its bias in at least fp32.

    None where not ``wanted``. The gradient of the residual is ``grad``.
    """
    wide = accumulation_dtype(grad.dtype)
    factor = dropout.factor(grad, ADJACENT, wide)
    dropped = grad if factor is None else factor.mul_(grad)
    d_branch = d_bias = None
    if wanted[0]:
        d_branch = _fresh(grad, dtype) if factor is None else dropped.to(dtype)
    if wanted[1]:
        rows = dropped.reshape(dropped.shape[:-1].numel(), dropped.shape[-1])
        d_bias = rows.sum(0, dtype=wide)
    return d_branch, d_bias


def _fresh(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def dropout_add_composite(
    input: Tensor, input_bias: Tensor | None, residual: Tensor | None, dropout: TokenDropout
) -> Tensor:
    dtype = stream_dtype(input, residual)
    total = input.to(accumulation_dtype(dtype))
    if input_bias is not None:
        total = total + input_bias
    factor = dropout.factor(input, ADJACENT, total.dtype)
    if factor is not None:
        total = total * factor
    return (total if residual is None else total + residual).to(dtype)


def layer_norm_forward(input: Tensor, arguments: NormArguments) -> tuple[Tensor, Tensor, Tensor]:
    """LN(input) in ``out_dtype``, and mean and 1 / deviation of each row in at least fp32."""
    wide = accumulation_dtype(input.dtype)
    weight, bias = (None if x is None else x.to(wide) for x in arguments[:2])
    shape = input.shape[-1:]
    out, mean, rstd = torch.ops.aten.native_layer_norm(
        input.to(wide), shape, weight, bias, arguments.eps
    )
    return out.to(arguments.out_dtype), mean.squeeze(-1), rstd.squeeze(-1)


def layer_norm_backward(
    grad_out: Tensor,
    saved: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    arguments: NormArguments,
    input_dtype: torch.dtype,
    save: str,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias; None where not ``wanted``.

    ``saved`` is the input, or the result where ``save`` is ``"output"``.
    """
    wide = rstd.dtype
    weight, bias = (None if x is None else x.to(wide) for x in arguments[:2])
    input = saved.to(wide)
    if save == "output":  # the same deviations from a mean of zero
        input = _normalised(input, weight, bias) / rstd.unsqueeze(-1)
        mean = torch.zeros_like(rstd)
    grads = torch.ops.aten.native_layer_norm_backward(
        grad_out.to(wide).contiguous(),
        input,
        input.shape[-1:],
        mean.unsqueeze(-1),
        rstd.unsqueeze(-1),
        weight,
        bias,
        list(wanted),
    )
    dtypes = (input_dtype, *(None if x is None else x.dtype for x in arguments[:2]))
    return tuple(
        grad.to(dtype) if want else None
        for grad, dtype, want in zip(grads, dtypes, wanted, strict=True)
    )


def _normalised(out: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What a norm's affine map was applied to."""
    normalised = out if bias is None else out - bias
    return normalised if weight is None else normalised / weight


def dropout_add_layer_norm_forward(
    input: Tensor,
    input_bias: Tensor | None,
    residual: Tensor | None,
    arguments: NormArguments,
    dropout: TokenDropout,
    copy_dtype: torch.dtype | None,
    keep_sum: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """The result, the sum (None unless kept), the copy (None unless wanted), mean and rstd."""
    total = dropout_add_forward(input, input_bias, residual, dropout)
    dtype = arguments.out_dtype
    wide = dtype if copy_dtype is None else accumulation_dtype(total.dtype)
    exact, mean, rstd = layer_norm_forward(total, arguments._replace(out_dtype=wide))
    copy = None if copy_dtype is None else exact.to(copy_dtype, copy=wide == dtype)
    return exact.to(dtype), (total if keep_sum else None), copy, mean, rstd


def dropout_add_layer_norm_backward(
    grad_out: Tensor | None,
    grad_sum: Tensor | None,
    grad_copy: Tensor | None,
    saved: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    arguments: NormArguments,
    input_dtype: torch.dtype,
    sum_dtype: torch.dtype,
    dropout: TokenDropout,
    save: str,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the sum, the branch, its bias, weight and bias; None where not ``wanted``.

    At least one of the three gradients flowing in is there.
    """
    want_sum, want_branch, want_input_bias, want_weight, want_bias = wanted
    grads = [g.to(rstd.dtype) for g in (grad_out, grad_copy) if g is not None]
    d_weight = d_bias = None
    if not grads:
        d_sum = _fresh(grad_sum, sum_dtype)
        d_weight = torch.zeros_like(arguments.weight) if want_weight else None
        d_bias = torch.zeros_like(arguments.bias) if want_bias else None
    else:
        d_sum, d_weight, d_bias = layer_norm_backward(
            sum(grads[1:], grads[0]),
            saved,
            mean,
            rstd,
            arguments,
            rstd.dtype,
            save,
            [want_sum or want_branch or want_input_bias, want_weight, want_bias],
        )
        if d_sum is not None:
            d_sum = (d_sum if grad_sum is None else d_sum.add_(grad_sum)).to(sum_dtype)
    d_branch = d_input_bias = None
    if want_branch or want_input_bias:
        d_branch, d_input_bias = dropout_add_backward(
            d_sum, input_dtype, dropout, (want_branch, want_input_bias)
        )
    return (d_sum if want_sum else None), d_branch, d_input_bias, d_weight, d_bias


def layer_norm_composite(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, arguments: NormArguments
) -> Tensor:
    wide = accumulation_dtype(input.dtype)
    weight, bias = (None if x is None else x.to(wide) for x in (weight, bias))
    shape = input.shape[-1:] if weight is None else weight.shape[-1:]  # known to an ONNX export
    out = F.layer_norm(input.to(wide), shape, weight, bias, arguments.eps)
    return out.to(arguments.out_dtype)
