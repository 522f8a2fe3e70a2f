"""The feed-forward block, dropout(act(x W1^T + b1)) W2^T + b2.

Backends: ``triton_gemm`` (the middle in the epilogues of its own products), ``triton`` (torch's
products and a kernel between them), ``pytorch``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dispatch, tracing, tuned
from fastattn.arguments import (
    TOKEN_DROPOUT,
    FeedForwardArguments,
    TokenDropout,
    accumulation_dtype,
    autocast_dtype,
    options_of,
)
from fastattn.ops._autograd import (
    Function,
    apply,
    differentiable_gradients,
    needs_composite,
    recall,
    remember,
    wanted_only,
    wants_second_order,
)
from fastattn.ops._checks import (
    check_dropout,
    check_rows,
    check_save,
    check_vector,
    mismatch,
    token_dropout,
)
from fastattn.ops._register import define, or_empty
from fastattn.ops.bias_activation_dropout import check_activation, why_not_triton
from fastattn.pytorch import feed_forward as in_pytorch
from fastattn.pytorch import products

#: What feed_forward may keep for backward: one (tokens, d_ff) tensor, or only its input.
SAVE_LEVELS = ("hidden", "input")


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None = None,
    *,
    activation: str = "relu",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 1,
    row_index: Tensor | None = None,
    row_period: int | None = None,
    batch_first: bool = True,
    column_offset: int = 0,
    save: str = "hidden",
    chunk_tokens: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """dropout(act(input @ weight1.T + bias1)) @ weight2.T + bias2.

    Args:
        input: (..., d), fp16, bf16, fp32 or fp64.
        weight1, bias1: (d_ff, d) and (d_ff,) or None.
        weight2, bias2: (d_out, d_ff) and (d_out,) or None.
        activation: ``"relu"``, ``"gelu"`` (exact), ``"gelu_tanh"``, ``"silu"`` or ``"identity"``.
        dropout_p: probability of dropping a hidden feature, resolved to 1/16384.
        seed: (1,) int64 on the same device (:func:`fastattn.dropout.draw_seed`).
        site: number of the dropout site (:func:`fastattn.dropout.site_of`).
        row_index, row_period, batch_first: the position and sequence of every row
            (:class:`fastattn.dropout.TokenRows`); ``row_period`` is ``input.shape[-2]`` by default.
        column_offset: global number of the first hidden feature, where d_ff is sharded.
        save: ``"hidden"`` keeps, besides the input, one (tokens, d_ff) tensor for backward;
            ``"input"`` keeps none and computes the first product again, a sixth more FLOPs in all.
        chunk_tokens: handle so many tokens at a time, so that no temporary tensor has more rows
            than that. Each chunk adds its part to the gradients of the weights, in at least fp32.
        backend: ``"triton_gemm"``, ``"triton"`` or ``"pytorch"``; None chooses. The first is chosen
            where a measurement says that it is the faster one (:mod:`fastattn.tuned`).

    Returns:
        (..., d_out) in the dtype of ``input``; under autocast everything is in its dtype.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run this call.
    """
    dtype = autocast_dtype(input)
    tensors = (input, weight1, bias1, weight2, bias2)
    if dtype is not None:
        tensors = tuple(None if x is None else x.to(dtype) for x in tensors)
    input, weight1, bias1, weight2, bias2 = tensors
    _check(*tensors, activation)
    check_save(save, SAVE_LEVELS)
    check_chunk_tokens(chunk_tokens)
    check_dropout(dropout_p, seed, site, input)
    dropout = token_dropout(
        input, dropout_p, seed, site, row_index, row_period, batch_first, column_offset
    )
    tokens = math.prod(input.shape[:-1])
    backend = dispatch.choose(
        "feed_forward",
        input,
        backend,
        dtypes=(input.dtype,),
        column_offset=column_offset,
        tokens=tokens if chunk_tokens is None else min(tokens, chunk_tokens),
        widths=(input.shape[-1], weight1.shape[0], weight2.shape[0]),
        has_adjacent_columns=weight1.stride(1) == weight2.stride(1) == 1,
        activation=activation,
    )
    is_plain = backend == "pytorch" and not dropout.drops and not torch.is_grad_enabled()
    if needs_composite(*tensors) or (is_plain and _followed()):
        return _composite(*tensors, activation, dropout, chunk_tokens or 0)
    options = Options(activation, *dropout, save, chunk_tokens or 0, backend)
    if is_plain:
        return _forward(*tensors, *options._replace(save="input"))[0]
    return apply(_FeedForward, *tensors, *options)


def _followed() -> bool:
    """Whether somebody would see the work in place of a call without an op."""
    return torch.compiler.is_compiling() or tracing.watched()


def check_chunk_tokens(chunk_tokens: int | None) -> None:
    """Raise unless it is None or at least 1."""
    if chunk_tokens is None:
        return
    if not isinstance(chunk_tokens, int) or isinstance(chunk_tokens, bool):
        raise TypeError(f"chunk_tokens must be an int or None, not {type(chunk_tokens).__name__}")
    if chunk_tokens < 1:
        raise mismatch("chunk_tokens", "at least 1", chunk_tokens)


def _check(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
) -> None:
    check_activation(activation)
    check_rows(input)
    dtype, device = input.dtype, input.device
    for name, x in (("weight1", weight1), ("bias1", bias1), ("weight2", weight2), ("bias2", bias2)):
        if x is not None and (x.dtype != dtype or x.device != device):
            raise mismatch(name, f"like input {dtype} on {device}", f"{x.dtype} on {x.device}")
    if weight1.dim() != 2 or weight1.shape[1:] != input.shape[-1:]:
        raise mismatch("weight1", f"of shape (d_ff, {input.shape[-1]})", weight1.shape)
    if weight2.dim() != 2 or weight2.shape[1:] != weight1.shape[:1]:
        raise mismatch("weight2", f"of shape (d_out, {weight1.shape[0]})", weight2.shape)
    check_vector("bias1", bias1, weight2)
    if bias2 is not None and bias2.shape != weight2.shape[:1]:
        raise mismatch("bias2", f"of shape {tuple(weight2.shape[:1])}", bias2.shape)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, a little faster on a CPU where autograd does not look."""
    if torch.is_grad_enabled() or needs_composite(input, weight, bias):
        return F.linear(input, weight, bias)
    return products.linear(input, weight, bias)


# --------------------------------------------------------------------- why not, per backend


def why_not_triton_gemm(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = (),
    column_offset: int = 0,
    widths: tuple[int, ...] = (),
    has_adjacent_columns: bool = True,
    **facts: object,
) -> str | None:
    """Why Triton's own products cannot run a call; its interpreter takes every dtype."""
    for dtype in dtypes:
        if dtype not in (torch.float16, torch.bfloat16) and device.type != "cpu":
            return f"its products take fp16 and bf16, not {str(dtype).removeprefix('torch.')}"
        if any(width * dtype.itemsize % 16 for width in widths):
            return "d, d_ff and d_out must be multiples of 16 bytes"
    if not has_adjacent_columns:
        return "weight1 and weight2 must have adjacent columns"
    if column_offset % 64:
        return "column_offset must be a multiple of 64"
    return dispatch.why_not_triton(device)


dispatch.register(
    "feed_forward",
    "triton_gemm",
    "fastattn.kernels.feed_forward_gemm",
    why_not_triton_gemm,
    only_by_name=tuned.why_not_chosen,
    evidence=tuned.why_chosen,
)
dispatch.register("feed_forward", "triton", "fastattn.kernels.feed_forward", why_not_triton)
dispatch.register("feed_forward", "pytorch", in_pytorch)


# ------------------------------------------------------------- schema, fake, implementation


#: What the op takes besides tensors.
Options = options_of("Options", "activation", TokenDropout, "save", "chunk_tokens", "backend")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _chunks(
    dropout: TokenDropout, tokens: int, chunk_tokens: int
) -> Iterator[tuple[slice, TokenDropout]]:
    """The rows of every chunk and their dropout; one chunk where 0 tokens are asked for."""
    if tracing.traced() or not 0 < chunk_tokens < tokens:  # a trace must fit other numbers of them
        yield slice(None), dropout
        return
    for first in range(0, tokens, chunk_tokens):
        last = min(first + chunk_tokens, tokens)
        yield slice(first, last), dropout.of_rows(first, last)


def _composite(input, weight1, bias1, weight2, bias2, activation, dropout, chunk_tokens):
    """The block from differentiable operations, its chunks dropping what the op's drop."""
    x = _rows(input)
    parts = [
        in_pytorch.feed_forward_composite(x[rows], weight1, bias1, weight2, bias2, activation, part)
        for rows, part in _chunks(dropout, x.shape[0], chunk_tokens)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(*input.shape[:-1], weight2.shape[0])


def _forward(input, weight1, bias1, weight2, bias2, *options):
    options = Options(*options)
    functions = dispatch.functions("feed_forward", options.backend)
    x = _rows(input)
    out = x.new_empty(x.shape[0], weight2.shape[0])
    hidden = x.new_empty(x.shape[0], weight1.shape[0]) if options.save == "hidden" else None
    for rows, part in _chunks(TokenDropout.of(options), x.shape[0], options.chunk_tokens):
        arguments = FeedForwardArguments(weight1, bias1, weight2, bias2, options.activation, part)
        kept = None if hidden is None else hidden[rows]
        functions.feed_forward_forward(x[rows], arguments, out[rows], kept)
    shape = input.shape[:-1]
    hidden = x.new_empty(0) if hidden is None else hidden.view(*shape, weight1.shape[0])
    return out.view(*shape, weight2.shape[0]), hidden


def _forward_fake(input, weight1, bias1, weight2, bias2, *options):
    out = input.new_empty(*input.shape[:-1], weight2.shape[0])
    keeps = Options(*options).save == "hidden"
    hidden = (*input.shape[:-1], weight1.shape[0]) if keeps else (0,)
    return out, input.new_empty(hidden)


def _backward(grad_out, input, weight1, bias1, weight2, hidden, wanted, *options):
    options = Options(*options)
    functions = dispatch.functions("feed_forward", options.backend)
    grad, x = _rows(grad_out), _rows(input)
    kept = _rows(hidden) if options.save == "hidden" else None
    d_input = x.new_empty(x.shape) if wanted[0] else None
    sums: tuple[Tensor | None, ...] = ()
    for rows, part in _chunks(TokenDropout.of(options), x.shape[0], options.chunk_tokens):
        arguments = FeedForwardArguments(weight1, bias1, weight2, None, options.activation, part)
        found = functions.feed_forward_backward(
            grad[rows],
            x[rows],
            arguments,
            None if kept is None else kept[rows],
            None if d_input is None else d_input[rows],
            wanted[1:],
        )
        sums = _added(sums, found)
    gradients = [None if d_input is None else d_input.view(input.shape)]
    gradients += [None if total is None else total.to(x.dtype) for total in sums]
    return or_empty(gradients, x)


def _added(
    sums: tuple[Tensor | None, ...], more: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Elementwise sums in at least fp32; ``more`` itself where it is the first."""
    if not sums:
        return more
    return tuple(
        None if b is None else a.to(accumulation_dtype(a.dtype)).add_(b)
        for a, b in zip(sums, more, strict=True)
    )


def _backward_fake(grad_out, input, weight1, bias1, weight2, hidden, wanted, *options):
    shapes = (
        input.shape,
        weight1.shape,
        weight1.shape[:1],
        weight2.shape,
        weight2.shape[:1],
    )
    return tuple(
        input.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)
    )


_OPTIONS = f"str activation, {TOKEN_DROPOUT}, str save, SymInt chunk_tokens, str backend"
_forward_op = define(
    "feed_forward_fwd(Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, "
    f"Tensor? bias2, {_OPTIONS}) -> (Tensor out, Tensor hidden)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "feed_forward_bwd(Tensor grad_out, Tensor input, Tensor weight1, Tensor? bias1, "
    f"Tensor weight2, Tensor hidden, bool[5] wanted, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


# ------------------------------------------------------------------------ autograd Function


class _FeedForward(Function):
    @staticmethod
    def forward(ctx, input, weight1, bias1, weight2, bias2, *options):
        tensors = (input, weight1, bias1, weight2, bias2)
        out, hidden = _forward_op(*tensors, *options)
        remember(ctx, (*tensors, hidden), options)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        (*inputs, hidden), options = recall(ctx)
        wanted = list(ctx.needs_input_grad[:5])
        if wants_second_order():
            named = Options(*options)
            same = named.activation, TokenDropout.of(named), named.chunk_tokens
            gradients = differentiable_gradients(lambda *x: _composite(*x, *same), inputs, grad_out)
        else:
            gradients = _backward_op(grad_out, *inputs[:4], hidden, wanted, *options)
        return *wanted_only(gradients, wanted), *(None,) * len(options)
