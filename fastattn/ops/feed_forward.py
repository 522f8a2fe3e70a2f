"""The feed-forward block, dropout(act(x W1^T + b1)) W2^T + b2, and its middle on its own.

Backends: ``triton``, ``pytorch``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dispatch, fallback
from fastattn.ops._library import (
    TOKEN_DROPOUT,
    apply,
    autocast_dtype,
    check_dropout,
    check_rows,
    check_vector,
    column_sum,
    define,
    differentiable_gradients,
    mismatch,
    needs_composite,
    recall,
    remember,
    wanted_only,
    wants_second_order,
)
from fastattn.ops.dropout import TokenDropout, token_dropout

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
        save: ``"hidden"`` keeps one (tokens, d_ff) tensor for backward, ``"input"`` keeps none and
            computes the first product again.
        backend: ``"triton"`` or ``"pytorch"``; None chooses.

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
    _check_feed_forward(*tensors, activation, save)
    check_dropout(dropout_p, seed, site, input)
    dropout = token_dropout(
        input, dropout_p, seed, site, row_index, row_period, batch_first, column_offset
    )
    backend = dispatch.choose("feed_forward", input, backend, activation=activation)
    if needs_composite(*tensors):
        return fallback.feed_forward_composite(*tensors, activation, dropout)
    if backend == "pytorch" and not dropout.drops and not torch.is_grad_enabled():
        return fallback.feed_forward_forward(*tensors, activation, dropout, "input")[0]
    return apply(_FeedForward, *tensors, activation, *dropout, save, backend)


def bias_activation_dropout(
    input: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "relu",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 1,
    row_index: Tensor | None = None,
    row_period: int | None = None,
    batch_first: bool = True,
    column_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """dropout(act(input + bias)): what is left of the block where a linear is wrapped or sharded.

    Args:
        input: (..., d_ff) floating point.
        bias: (d_ff,) or None.

    The other arguments and errors are those of :func:`feed_forward`.

    Returns:
        The shape of ``input``, in the promoted dtype of ``input`` and ``bias``.
    """
    _check_activation(activation)
    check_rows(input)
    check_vector("bias", bias, input)
    check_dropout(dropout_p, seed, site, input)
    dropout = token_dropout(
        input, dropout_p, seed, site, row_index, row_period, batch_first, column_offset
    )
    dtypes = (input.dtype,) if bias is None else (input.dtype, bias.dtype)
    backend = dispatch.choose("bias_activation_dropout", input, backend, dtypes=dtypes)
    if needs_composite(input, bias) or (backend == "pytorch" and not dropout.drops):
        return fallback.bias_activation_dropout_composite(input, bias, activation, dropout)
    return apply(_BiasActivationDropout, input, bias, activation, *dropout, backend)


def _check_activation(activation: str) -> None:
    if activation not in fallback.ACTIVATIONS:
        names = ", ".join(fallback.ACTIVATIONS)
        raise mismatch("activation", f"one of {names}", repr(activation))


def _check_feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    save: str,
) -> None:
    _check_activation(activation)
    if save not in SAVE_LEVELS:
        raise mismatch("save", f"one of {SAVE_LEVELS}", repr(save))
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
    return fallback.linear(input, weight, bias)


# --------------------------------------------------------------------- why not, per backend

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def why_not_triton(
    device: torch.device, dtypes: tuple[torch.dtype, ...] = (), **facts: object
) -> str | None:
    """Why the Triton kernels of ``bias_activation_dropout`` cannot run a call."""
    for dtype in dtypes:
        if dtype not in _TRITON_DTYPES:
            return f"its kernels take fp16, bf16, fp32 and fp64, not {dtype}"
    return dispatch.why_not_triton(device)


dispatch.register("feed_forward", "pytorch", fallback)
dispatch.register("bias_activation_dropout", "pytorch", fallback)
dispatch.register(
    "bias_activation_dropout",
    "triton",
    "fastattn.kernels.bias_activation_dropout",
    why_not_triton,
)


# ------------------------------------------------------------- schema, fake, implementation


def _empty_like_none(gradients: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


def _forward(input, weight1, bias1, weight2, bias2, activation, *options):
    *dropout, save, backend = options
    functions = dispatch.functions("feed_forward", backend)
    return functions.feed_forward_forward(
        input, weight1, bias1, weight2, bias2, activation, TokenDropout(*dropout), save
    )


def _forward_fake(input, weight1, bias1, weight2, bias2, activation, *options):
    out = input.new_empty(*input.shape[:-1], weight2.shape[0])
    hidden = (*input.shape[:-1], weight1.shape[0]) if options[-2] == "hidden" else (0,)
    return out, input.new_empty(hidden)


def _backward(grad_out, input, weight1, bias1, weight2, hidden, wanted, activation, *options):
    *dropout, save, backend = options
    functions = dispatch.functions("feed_forward", backend)
    gradients = functions.feed_forward_backward(
        grad_out,
        input,
        weight1,
        bias1,
        weight2,
        hidden,
        activation,
        TokenDropout(*dropout),
        save,
        wanted,
    )
    return _empty_like_none(gradients, input)


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


def _middle_forward(input, bias, activation, *options):
    *dropout, backend = options
    functions = dispatch.functions("bias_activation_dropout", backend)
    return functions.bias_activation_dropout_forward(
        input, bias, activation, TokenDropout(*dropout)
    ).contiguous()


def _promoted(input: Tensor, bias: Tensor | None) -> torch.dtype:
    return input.dtype if bias is None else torch.promote_types(input.dtype, bias.dtype)


def _middle_fake(input, bias, *options):
    return input.new_empty(input.shape, dtype=_promoted(input, bias))


def _middle_backward(grad_out, input, bias, activation, *options):
    *dropout, backend = options
    functions = dispatch.functions("bias_activation_dropout", backend)
    return functions.bias_activation_dropout_backward(
        grad_out, input, bias, activation, TokenDropout(*dropout)
    ).contiguous()


_OPTIONS = f"str activation, {TOKEN_DROPOUT}, str save, str backend"
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
_middle_forward_op = define(
    f"bias_activation_dropout_fwd(Tensor input, Tensor? bias, str activation, {TOKEN_DROPOUT}, "
    "str backend) -> Tensor",
    _middle_forward,
    _middle_fake,
)
_middle_backward_op = define(
    "bias_activation_dropout_bwd(Tensor grad_out, Tensor input, Tensor? bias, str activation, "
    f"{TOKEN_DROPOUT}, str backend) -> Tensor",
    _middle_backward,
    lambda grad_out, input, bias, *options: _middle_fake(input, bias),
)


# ------------------------------------------------------------------------ autograd Function


class _FeedForward(torch.autograd.Function):
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
            activation, *dropout, _, _ = options
            gradients = differentiable_gradients(
                lambda *x: fallback.feed_forward_composite(*x, activation, TokenDropout(*dropout)),
                inputs,
                grad_out,
            )
        else:
            gradients = _backward_op(grad_out, *inputs[:4], hidden, wanted, *options)
        return *wanted_only(gradients, wanted), *(None,) * len(options)


class _BiasActivationDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, bias, *options):
        remember(ctx, (input, bias), options)
        return _middle_forward_op(input, bias, *options)

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        (input, bias), options = recall(ctx)
        wanted = ctx.needs_input_grad[:2]
        if wants_second_order():
            activation, *dropout, _ = options
            gradients = differentiable_gradients(
                lambda *x: fallback.bias_activation_dropout_composite(
                    *x, activation, TokenDropout(*dropout)
                ),
                (input, bias),
                grad_out,
            )
        else:
            d_hidden = _middle_backward_op(grad_out, input, bias, *options)
            d_bias = column_sum(d_hidden, bias.dtype) if wanted[1] else None
            gradients = (d_hidden.to(input.dtype), d_bias)
        return *wanted_only(gradients, wanted), *(None,) * len(options)
