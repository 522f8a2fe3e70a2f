"""Attention with probability dropout, masks and packed sequences.

out = dropout(softmax(Q K^T scale + bias)) V, exact. A query with no key left gives zeros and zero
gradients, never NaN. Backends: ``triton``, ``pytorch``.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch, tracing
from fastattn.arguments import (
    ATTENTION_ARGUMENTS,
    AttentionArguments,
    accumulation_dtype,
    autocast_dtype,
    like_query,
)
from fastattn.dropout import HEADS
from fastattn.ops._autograd import (
    Function,
    apply,
    differentiable_gradients,
    needs_composite,
    recall,
    remember,
    twice_differentiable,
    wanted_only,
    wants_second_order,
)
from fastattn.ops._checks import check_dropout, check_floating, mismatch, values_of
from fastattn.ops._register import define, or_empty
from fastattn.pytorch import attention as in_pytorch


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    head_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Scaled dot-product attention with dropout and masks (Vaswani et al., 2017).

    Args:
        query: (B, Sq, H, D), or (Tq, H, D) packed with ``cu_seqlens_q``; fp16, bf16, fp32 or fp64.
        key, value: (B, Sk, H, D), or (Tk, H, D) packed; dtype of ``query``.
        key_padding_mask: (B, Sk), bool (True: ignore the key) or float (added to its scores).
        attn_mask: broadcastable to (B, H, Sq, Sk), bool (True: do not attend) or float (added).
            Both masks may be given, and gradients flow to float ones.
        key_lengths: (B,) int32; keys from this position on are ignored.
        query_lengths: (B,) int32; queries from this position on give zeros. Whatever stands in
            rows that are ignored, NaN included, their gradients are zero and no other result
            depends on it.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 cumulative lengths of packed sequences, from 0
            to at most Tq and Tk, never falling; both or neither, and no other mask with them but
            ``is_causal``. Rows past the last sequence are ignored: zero in the result and in
            gradients. On a CPU other values raise; on a GPU, and while a compiler or tracer runs,
            they are not read, which would wait for the device.
        max_seqlen_q, max_seqlen_k: the longest packed lengths, in tokens, or more. The
            ``"pytorch"`` backend on a CPU raises where a sequence is longer; elsewhere, where that
            is not read, the rows of a sequence past it are ignored.
        is_causal: query m attends to keys n <= m only, on top of the masks.
        scale: of the scores; 1 / sqrt(D) by default.
        dropout_p: probability of dropping an attention probability, resolved to 1/16384.
        seed: (1,) int64 on the same device (:func:`fastattn.dropout.draw_seed`).
        site: number of the dropout site (:func:`fastattn.dropout.site_of`).
        head_offset: global number of the first head, where heads are sharded.
        backend: ``"triton"`` or ``"pytorch"``; None chooses.

    Returns:
        The shape and dtype of ``query``. Under autocast inputs and result are in its dtype.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run this call.
    """
    query, key, value = _autocast(query, key, value)
    arguments = AttentionArguments(
        key_padding_mask,
        attn_mask,
        key_lengths,
        query_lengths,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        is_causal,
        _default_scale(query) if scale is None else scale,
        dropout_p,
        seed,
        site,
        head_offset,
    )
    arguments = _prepare("attention", query, key, value, arguments, backend)
    if needs_composite(query, key, value, key_padding_mask, attn_mask):
        return _composite(query, key, value, arguments)
    if _leaves_it_to_torch(arguments):
        return _by_torch(query, key, value, arguments)
    return apply(_Attention, query, key, value, *arguments)


def attention_packed(
    qkv: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    head_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Self-attention from one tensor, as one projection wrote it; its gradient is one tensor too.

    Args:
        qkv: (B, S, 3, H, D), or (T, 3, H, D) packed with ``cu_seqlens``, any strides: query, key
            and value along the third-last dimension.
        cu_seqlens: (B + 1,) int32 cumulative lengths of packed sequences, of query, key and value.
        max_seqlen: the longest of them, in tokens, or more.

    The other arguments and errors are those of :func:`attention`.

    Returns:
        (B, S, H, D) or (T, H, D), in the memory order (batch or sequence first) of ``qkv``.
    """
    check_floating("qkv", qkv.dtype)
    expected = "(B, S, 3, H, D)" if cu_seqlens is None else "(T, 3, H, D)"
    if qkv.dim() != (5 if cu_seqlens is None else 4) or qkv.shape[-3] != 3:
        raise mismatch("qkv", expected, qkv.shape)
    (qkv,) = _autocast(qkv)
    arguments = AttentionArguments(
        key_padding_mask,
        attn_mask,
        key_lengths,
        query_lengths,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        is_causal,
        _default_scale(qkv) if scale is None else scale,
        dropout_p,
        seed,
        site,
        head_offset,
    )
    query, key, value = qkv.unbind(-3)
    arguments = _prepare("attention_packed", query, key, value, arguments, backend)
    if needs_composite(qkv, key_padding_mask, attn_mask):
        return _composite(query, key, value, arguments)
    if _leaves_it_to_torch(arguments):
        return _by_torch(query, key, value, arguments)
    return apply(_AttentionPacked, qkv, *arguments)


def _default_scale(x: Tensor) -> float:
    return max(x.shape[-1], 1) ** -0.5


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in tensors)


def _prepare(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arguments: AttentionArguments,
    backend: str | None,
) -> AttentionArguments:
    """Check every argument, give the mask four dimensions and choose the backend."""
    packed = arguments.cu_seqlens_q is not None
    if op == "attention":
        check_floating("query", query.dtype)
        if query.dim() != (3 if packed else 4):
            raise mismatch("query", "(Tq, H, D)" if packed else "(B, Sq, H, D)", query.shape)
        _check_like(query, "key", key, packed)
        _check_like(query, "value", value, packed)
        if key.shape != value.shape:
            raise mismatch("value", f"of key's shape {tuple(key.shape)}", value.shape)
    check_dropout(arguments.dropout_p, arguments.seed, arguments.site, query)
    last_head = arguments.head_offset + query.shape[-2]
    if arguments.head_offset < 0 or last_head > HEADS:
        raise mismatch("head_offset", f"at least 0, and heads below {HEADS}", arguments.head_offset)
    if packed:
        lengths = _check_packed(op, arguments, query, key)
    else:
        arguments = _check_masks(arguments, query, key)
    facts = {"dtype": query.dtype, "head_dim": query.shape[-1], "arguments": arguments}
    backend = dispatch.choose(op, query, backend, **facts)
    if packed and backend == "pytorch":
        for name, longest, ends in lengths:
            _check_longest(name, longest, ends)
    return arguments._replace(backend=backend)


def _check_like(query: Tensor, name: str, x: Tensor, packed: bool) -> None:
    """Key and value agree with query in all but their length."""
    if x.dtype != query.dtype:
        raise mismatch(name, f"of query's dtype {query.dtype}", x.dtype)
    if x.device != query.device:
        raise mismatch(name, f"on query's device {query.device}", x.device)
    same_batch = packed or x.shape[:1] == query.shape[:1]
    if x.dim() != query.dim() or not same_batch or x.shape[-2:] != query.shape[-2:]:
        got = tuple(x.shape)
        raise mismatch(name, f"of query's shape {tuple(query.shape)} but for its length", got)


#: Of queries or keys: the name of max_seqlen, its value, and those of cu_seqlens, where known.
_Lengths = tuple[str, int, list[int] | None]


def _check_packed(
    op: str, arguments: AttentionArguments, query: Tensor, key: Tensor
) -> list[_Lengths]:
    for name in ("key_padding_mask", "attn_mask", "key_lengths", "query_lengths"):
        if getattr(arguments, name) is not None:
            raise mismatch(name, "None where sequences are packed", "a tensor")
    cu_q, cu_k = arguments.cu_seqlens_q, arguments.cu_seqlens_k
    if op == "attention_packed":
        cases = (("", cu_q, arguments.max_seqlen_q, query),)
    else:
        cases = (
            ("_q", cu_q, arguments.max_seqlen_q, query),
            ("_k", cu_k, arguments.max_seqlen_k, key),
        )
    lengths = [_check_sequences(*case) for case in cases]
    if cu_q.shape != cu_k.shape:
        raise mismatch("cu_seqlens_k", f"of cu_seqlens_q's shape {tuple(cu_q.shape)}", cu_k.shape)
    return lengths


def _check_sequences(
    suffix: str, cu_seqlens: Tensor | None, longest: int, rows: Tensor
) -> _Lengths:
    """Check the sequences that ``rows`` is packed of."""
    name, tokens = f"cu_seqlens{suffix}", rows.shape[0]
    if cu_seqlens is None:
        raise mismatch(name, "given where the other is", None)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        got = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise mismatch(name, "(B + 1,) torch.int32", got)
    if cu_seqlens.device != rows.device:
        raise mismatch(name, f"on {rows.device}, as the tokens are", cu_seqlens.device)
    if longest < min(tokens, 1):
        raise mismatch(f"max_seqlen{suffix}", f"at least 1 for {tokens} tokens", longest)
    ends = values_of(cu_seqlens)
    if ends is not None:
        if ends[0] != 0 or ends[-1] > tokens:
            got = f"{ends[0]} to {ends[-1]}"
            raise mismatch(name, f"from 0 to at most {tokens}, the number of rows", got)
        if any(end < start for start, end in itertools.pairwise(ends)):
            raise mismatch(name, "cumulative lengths, which never fall", ends)
    return f"max_seqlen{suffix}", longest, ends


def _check_longest(name: str, longest: int, ends: list[int] | None) -> None:
    if ends is not None:
        there = max((end - start for start, end in itertools.pairwise(ends)), default=0)
        if there > longest:
            raise mismatch(name, f"at least {there}, the length of the longest sequence", longest)


def _check_masks(arguments: AttentionArguments, query: Tensor, key: Tensor) -> AttentionArguments:
    batch, seqlen_q, heads, _ = query.shape
    seqlen_k = key.shape[1]
    if arguments.cu_seqlens_k is not None:
        raise mismatch("cu_seqlens_q", "given where cu_seqlens_k is", None)
    padding, mask = arguments.key_padding_mask, arguments.attn_mask
    for name, x in (("key_padding_mask", padding), ("attn_mask", mask)):
        if x is not None and x.dtype != torch.bool and not x.is_floating_point():
            raise mismatch(name, "bool or floating point", x.dtype)
    if padding is not None and padding.shape != (batch, seqlen_k):
        raise mismatch("key_padding_mask", f"of shape {(batch, seqlen_k)}", padding.shape)
    for name in ("key_lengths", "query_lengths"):
        lengths = getattr(arguments, name)
        if lengths is not None and (lengths.shape != (batch,) or lengths.dtype != torch.int32):
            got = f"{tuple(lengths.shape)} {lengths.dtype}"
            raise mismatch(name, f"({batch},) torch.int32", got)
    if mask is None:
        return arguments
    expected = (batch, heads, seqlen_q, seqlen_k)
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    fits = len(sizes) == 4 and all(a in (1, b) for a, b in zip(sizes, expected, strict=True))
    if not fits:
        raise mismatch("attn_mask", f"broadcastable to {expected}", mask.shape)
    return arguments._replace(attn_mask=mask.reshape(sizes))


def _by_torch(query: Tensor, key: Tensor, value: Tensor, arguments: AttentionArguments) -> Tensor:
    def fast(query: Tensor, key: Tensor, value: Tensor, *masks: Tensor | None) -> Tensor:
        padding, mask = masks
        given = arguments._replace(key_padding_mask=padding, attn_mask=mask)
        return in_pytorch.attention_without_dropout(query, key, value, given)

    def exact(*inputs: Tensor | None) -> Tensor:
        return in_pytorch.attention_composite(*inputs, arguments)

    return twice_differentiable(fast, exact, query, key, value, *arguments.masks)


def _composite(query: Tensor, key: Tensor, value: Tensor, arguments: AttentionArguments) -> Tensor:
    """In differentiable operations; a trace keeps torch's own SDPA where nothing drops."""
    if tracing.traced() and not arguments.dropout.drops:
        return in_pytorch.attention_without_dropout(query, key, value, arguments)
    return in_pytorch.attention_composite(query, key, value, *arguments.masks, arguments)


def _leaves_it_to_torch(arguments: AttentionArguments) -> bool:
    """torch's own SDPA, with its own autograd, is the ``pytorch`` backend where nothing drops."""
    return arguments.backend == "pytorch" and not arguments.dropout.drops


# --------------------------------------------------------------------- why not, per backend

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TRITON_HEAD_DIM = 256


def why_not_triton(
    device: torch.device,
    dtype: torch.dtype | None = None,
    head_dim: int = 1,
    arguments: AttentionArguments | None = None,
    **facts: object,
) -> str | None:
    """Why the Triton attention kernels cannot run a call."""
    if dtype is not None and dtype not in _TRITON_DTYPES:
        return f"its kernels take fp16, bf16 and fp32, not {dtype}"
    if dtype == torch.float64 and device.type == "cuda":
        return "its kernels take fp64 in Triton's interpreter only"
    if head_dim > _TRITON_HEAD_DIM:
        return f"its kernels take head dimensions up to {_TRITON_HEAD_DIM}, not {head_dim}"
    if arguments is not None and arguments.scale < 0:
        return f"its kernels take a scale of at least 0, not {arguments.scale}"
    return dispatch.why_not_triton(device)


for _op in ("attention", "attention_packed"):
    dispatch.register(_op, "triton", "fastattn.kernels.attention", why_not_triton)
    dispatch.register(_op, "pytorch", in_pytorch)


# ------------------------------------------------------------- schema, fake, implementation


def _results(query: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Empty output, and what kernels keep of each softmax, (1|2, B, H, Sq) or (1|2, H, Tq).

    That is one number; or two where scores are exact enough to need them, or may be huge: in fp32,
    and under a float mask.
    """
    arguments = AttentionArguments(*options)
    shape: tuple[int, ...] = (0,)
    if arguments.backend != "pytorch":
        *batch, length, heads, _ = query.shape
        masks = (mask for mask in arguments.masks if mask is not None)
        is_added = any(mask.is_floating_point() for mask in masks)
        numbers = 2 if is_added or query.element_size() > 2 else 1
        shape = (numbers, *batch, heads, length)
    statistics = query.new_empty(shape, dtype=accumulation_dtype(query.dtype))
    return like_query(query), statistics


def _forward(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    arguments = AttentionArguments(*options)
    results = _results(query, *options)
    functions = dispatch.functions("attention", arguments.backend)
    functions.attention_forward(query, key, value, arguments, *results)
    return results


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *options: Any):
    return _results(query, *options)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    grad_key_padding_mask: bool,
    grad_attn_mask: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    arguments = AttentionArguments(*options)
    gradients = tuple(like_query(x) for x in (query, key, value))
    of_masks = dispatch.functions("attention", arguments.backend).attention_backward(
        grad_out,
        query,
        key,
        value,
        out,
        statistics,
        arguments,
        (grad_key_padding_mask, grad_attn_mask),
        gradients,
    )
    return *gradients, *or_empty(of_masks, query)


def _mask_gradients_fake(
    like: Tensor, grad_padding: bool, grad_mask: bool, arguments: AttentionArguments
) -> tuple[Tensor, Tensor]:
    padding, mask = arguments.key_padding_mask, arguments.attn_mask
    return (
        padding.new_empty(padding.shape) if grad_padding else like.new_empty(0),
        mask.new_empty(mask.shape) if grad_mask else like.new_empty(0),
    )


def _backward_fake(grad_out, query, key, value, out, statistics, grad_padding, grad_mask, *options):
    masks = _mask_gradients_fake(query, grad_padding, grad_mask, AttentionArguments(*options))
    return *(like_query(x) for x in (query, key, value)), *masks


def _packed_forward(qkv: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _forward(*qkv.unbind(-3), *options)


def _packed_forward_fake(qkv: Tensor, *options: Any):
    return _results(qkv.select(-3, 0), *options)


def _packed_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    statistics: Tensor,
    grad_key_padding_mask: bool,
    grad_attn_mask: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = AttentionArguments(*options)
    d_qkv = like_query(qkv)
    of_masks = dispatch.functions("attention_packed", arguments.backend).attention_backward(
        grad_out,
        *qkv.unbind(-3),
        out,
        statistics,
        arguments,
        (grad_key_padding_mask, grad_attn_mask),
        d_qkv.unbind(-3),
    )
    return d_qkv, *or_empty(of_masks, qkv)


def _packed_backward_fake(grad_out, qkv, out, statistics, grad_padding, grad_mask, *options):
    masks = _mask_gradients_fake(qkv, grad_padding, grad_mask, AttentionArguments(*options))
    return like_query(qkv), *masks


_RESULT = "(Tensor out, Tensor statistics)"
_MASK_GRADIENTS = "bool grad_key_padding_mask, bool grad_attn_mask"
_forward_op = define(
    f"attention_fwd(Tensor query, Tensor key, Tensor value, {ATTENTION_ARGUMENTS}) -> {_RESULT}",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "attention_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor statistics, {_MASK_GRADIENTS}, {ATTENTION_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_packed_forward_op = define(
    f"attention_packed_fwd(Tensor qkv, {ATTENTION_ARGUMENTS}) -> {_RESULT}",
    _packed_forward,
    _packed_forward_fake,
)
_packed_backward_op = define(
    "attention_packed_bwd(Tensor grad_out, Tensor qkv, Tensor out, Tensor statistics, "
    f"{_MASK_GRADIENTS}, {ATTENTION_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _packed_backward,
    _packed_backward_fake,
)


# ------------------------------------------------------------------------ autograd Function


def _second_order(tensors: tuple[Tensor, ...], options: list, grad: Tensor):
    """Differentiable gradients of query, key and value, or of qkv, and of the two masks."""
    arguments = AttentionArguments(*options)

    def composite(*inputs: Tensor | None) -> Tensor:
        *tensors, padding, mask = inputs
        query, key, value = tensors if len(tensors) == 3 else tensors[0].unbind(-3)
        return in_pytorch.attention_composite(query, key, value, padding, mask, arguments)

    return differentiable_gradients(composite, (*tensors, *arguments.masks), grad)


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
        out, statistics = _forward_op(query, key, value, *options)
        remember(ctx, (query, key, value, out, statistics), options)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (*inputs, out, statistics), options = recall(ctx)
        wanted = ctx.needs_input_grad[:5]
        if wants_second_order():
            gradients = _second_order(inputs, options, grad_out)
        else:
            gradients = _backward_op(grad_out, *inputs, out, statistics, *wanted[3:], *options)
        return *wanted_only(gradients, wanted), *(None,) * (len(options) - 2)


class _AttentionPacked(Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, *options: Any) -> Tensor:
        out, statistics = _packed_forward_op(qkv, *options)
        remember(ctx, (qkv, out, statistics), options)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (qkv, out, statistics), options = recall(ctx)
        wanted = ctx.needs_input_grad[:3]
        if wants_second_order():
            gradients = _second_order((qkv,), options, grad_out)
        else:
            gradients = _packed_backward_op(grad_out, qkv, out, statistics, *wanted[1:], *options)
        return *wanted_only(gradients, wanted), *(None,) * (len(options) - 2)
