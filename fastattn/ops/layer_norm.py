"""Layer normalisation, alone and with the dropout and residual sum before it, and that sum alone.

Backends: ``cuda``, ``cpu`` (C++), ``triton``, ``pytorch``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import dispatch, fallback
from fastattn.ops._library import (
    TOKEN_DROPOUT,
    check_dropout,
    check_vector,
    define,
    differentiable_gradients,
    mismatch,
    needs_composite,
    wants_second_order,
)
from fastattn.ops.arguments import NormArguments
from fastattn.ops.dropout import TokenDropout, token_dropout

#: What dropout_add_layer_norm may keep for backward: the sum before normalisation.
SAVE_LEVELS = ("sum",)


def layer_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """(input - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    Ba, Kiros and Hinton, "Layer normalization", 2016. Statistics are in at least fp32.

    Args:
        input: (..., N), fp16, bf16, fp32 or fp64.
        weight, bias: (N,) or None, any floating dtype.
        eps: added to the variance.
        out_dtype: of the result; by default that of ``input``, under CUDA autocast fp32.
        backend: ``"cuda"``, ``"cpu"``, ``"triton"`` or ``"pytorch"``; None chooses.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run this call.
    """
    _check_norm(input, weight, bias)
    backend = dispatch.choose("layer_norm", input, backend)
    arguments = NormArguments(weight, bias, eps, out_dtype or _norm_dtype(input.dtype, input))
    if backend == "pytorch" or needs_composite(input, weight, bias):
        return fallback.layer_norm_composite(input, weight, bias, arguments)
    return _LayerNorm.apply(input, *arguments, backend)


def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 2,
    row_index: Tensor | None = None,
    row_period: int | None = None,
    batch_first: bool = True,
    out_dtype: torch.dtype | None = None,
    copy_dtype: torch.dtype | None = None,
    return_sum: bool = False,
    save: str = "sum",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """LN(residual + dropout(input + input_bias)) over the last dimension.

    Args:
        input: (..., N), fp16, bf16, fp32 or fp64.
        residual: shape of ``input``, or None for no residual.
        weight, bias: (N,) or None: the affine map of the norm.
        eps: added to the variance.
        input_bias: (N,) or None: added to ``input`` before dropout.
        dropout_p: probability of dropping an element, resolved to 1/16384.
        seed: (1,) int64 on the same device (:func:`fastattn.dropout.draw_seed`).
        site: number of the dropout site (:func:`fastattn.dropout.site_of`).
        row_index, row_period, batch_first: the position and sequence of every row
            (:class:`fastattn.dropout.TokenRows`); ``row_period`` is ``input.shape[-2]`` by default.
        out_dtype: of the result; by default ``input`` and ``residual`` promoted, under CUDA
            autocast fp32.
        copy_dtype: also return the result in this dtype, for the next matrix product.
        return_sum: also return the sum before normalisation (pre-norm layers).
        save: what backward keeps; ``"sum"``.
        backend: ``"cuda"``, ``"cpu"``, ``"triton"`` or ``"pytorch"``; None chooses.

    Returns:
        The result; with ``return_sum`` or ``copy_dtype`` a tuple (result, sum, copy) of those
        asked for.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run this call.
    """
    _check_norm(input, weight, bias)
    _check_branch(input, residual, input_bias)
    if save not in SAVE_LEVELS:
        raise mismatch("save", f"one of {SAVE_LEVELS}", repr(save))
    check_dropout(dropout_p, seed)
    dropout = token_dropout(input, dropout_p, seed, site, row_index, row_period, batch_first)
    backend = dispatch.choose("dropout_add_layer_norm", input, backend)
    sum_dtype = fallback.sum_dtype(input, residual)
    arguments = NormArguments(weight, bias, eps, out_dtype or _norm_dtype(sum_dtype, input))
    plain = backend == "pytorch" and not dropout.drops
    if plain or needs_composite(input, input_bias, residual, weight, bias):
        total = fallback.dropout_add_composite(input, input_bias, residual, dropout)
        out = fallback.layer_norm_composite(total, weight, bias, arguments)
        copy = None if copy_dtype is None else out.to(copy_dtype)
    else:
        out, total, copy = _DropoutAddLayerNorm.apply(
            input, input_bias, residual, *arguments, *dropout, copy_dtype, save, backend
        )
    results = (out, *((total,) if return_sum else ()), *(() if copy_dtype is None else (copy,)))
    return results if len(results) > 1 else out


def dropout_add(
    input: Tensor,
    residual: Tensor | None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 3,
    row_index: Tensor | None = None,
    row_period: int | None = None,
    batch_first: bool = True,
    backend: str | None = None,
) -> Tensor:
    """residual + dropout(input + input_bias): the tail of a pre-norm layer.

    Arguments and errors are those of :func:`dropout_add_layer_norm`.

    Returns:
        The shape of ``input``, in the promoted dtype of ``input`` and ``residual``.
    """
    _check_branch(input, residual, input_bias)
    check_dropout(dropout_p, seed)
    dropout = token_dropout(input, dropout_p, seed, site, row_index, row_period, batch_first)
    backend = dispatch.choose("dropout_add", input, backend)
    plain = backend == "pytorch" and not dropout.drops
    if plain or needs_composite(input, input_bias, residual):
        return fallback.dropout_add_composite(input, input_bias, residual, dropout)
    return _DropoutAdd.apply(input, input_bias, residual, *dropout, backend)


def _norm_dtype(dtype: torch.dtype, input: Tensor) -> torch.dtype:
    """As torch: autocast on a GPU normalises in fp32."""
    if input.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return fallback.accumulation_dtype(dtype)
    return dtype


def _check_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if input.dim() < 1 or not input.is_floating_point():
        raise mismatch("input", "at least 1-D floating point", f"{input.dim()}-D {input.dtype}")
    check_vector("weight", weight, input)
    check_vector("bias", bias, input)


def _check_branch(input: Tensor, residual: Tensor | None, input_bias: Tensor | None) -> None:
    if input.dim() < 1 or not input.is_floating_point():
        raise mismatch("input", "at least 1-D floating point", f"{input.dim()}-D {input.dtype}")
    check_vector("input_bias", input_bias, input)
    if residual is not None and residual.shape != input.shape:
        raise mismatch("residual", f"of input's shape {tuple(input.shape)}", residual.shape)


# --------------------------------------------------------------------- why not, per backend

for _op in ("layer_norm", "dropout_add_layer_norm", "dropout_add"):
    dispatch.register(_op, "pytorch", fallback)


# ------------------------------------------------------------- schema, fake, implementation


def _layer_norm_forward(input, weight, bias, eps, out_dtype, backend):
    functions = dispatch.functions("layer_norm", backend)
    return functions.layer_norm_forward(input, NormArguments(weight, bias, eps, out_dtype))


def _statistics_fake(input: Tensor) -> tuple[Tensor, Tensor]:
    dtype = fallback.accumulation_dtype(input.dtype)
    return tuple(input.new_empty(input.shape[:-1], dtype=dtype) for _ in range(2))


def _layer_norm_fake(input, weight, bias, eps, out_dtype, backend):
    return input.new_empty(input.shape, dtype=out_dtype), *_statistics_fake(input)


def _layer_norm_backward(grad_out, input, mean, rstd, weight, bias, eps, out_dtype, backend, want):
    functions = dispatch.functions("layer_norm", backend)
    arguments = NormArguments(weight, bias, eps, out_dtype)
    gradients = functions.layer_norm_backward(grad_out, input, mean, rstd, arguments, want)
    return tuple(input.new_empty(0) if g is None else g for g in gradients)


def _layer_norm_backward_fake(
    grad_out, input, mean, rstd, weight, bias, eps, out_dtype, backend, want
):
    return tuple(
        x.new_empty(x.shape) if wanted else input.new_empty(0)
        for x, wanted in zip((input, weight, bias), want, strict=True)
    )


def _fused_forward(input, input_bias, residual, weight, bias, eps, out_dtype, *options):
    *dropout, copy_dtype, save, backend = options
    functions = dispatch.functions("dropout_add_layer_norm", backend)
    total = functions.dropout_add_forward(input, input_bias, residual, TokenDropout(*dropout))
    arguments = NormArguments(weight, bias, eps, out_dtype)
    out, mean, rstd = functions.layer_norm_forward(total, arguments)
    copy = out.new_empty(0) if copy_dtype is None else out.to(copy_dtype, copy=True)
    return out, total, copy, mean, rstd


def _fused_fake(input, input_bias, residual, weight, bias, eps, out_dtype, *options):
    copy_dtype = options[-3]
    total = input.new_empty(input.shape, dtype=fallback.sum_dtype(input, residual))
    out = total.new_empty(input.shape, dtype=out_dtype)
    copy = out.new_empty(0) if copy_dtype is None else out.new_empty(out.shape, dtype=copy_dtype)
    return out, total, copy, *_statistics_fake(total)


def _dropout_add_forward(input, input_bias, residual, *options):
    *dropout, backend = options
    functions = dispatch.functions("dropout_add", backend)
    return functions.dropout_add_forward(input, input_bias, residual, TokenDropout(*dropout))


def _dropout_add_fake(input, input_bias, residual, *options):
    return input.new_empty(input.shape, dtype=fallback.sum_dtype(input, residual))


def _dropout_add_backward(grad, input_dtype, *options):
    *dropout, backend = options
    functions = dispatch.functions("dropout_add", backend)
    return functions.dropout_add_backward(grad, input_dtype, TokenDropout(*dropout))


_NORM = "Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype"
_layer_norm_forward_op = define(
    f"layer_norm_fwd(Tensor input, {_NORM}, str backend) -> (Tensor out, Tensor mean, Tensor rstd)",
    _layer_norm_forward,
    _layer_norm_fake,
)
_layer_norm_backward_op = define(
    f"layer_norm_bwd(Tensor grad_out, Tensor input, Tensor mean, Tensor rstd, {_NORM}, "
    "str backend, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _layer_norm_backward,
    _layer_norm_backward_fake,
)
_fused_forward_op = define(
    "dropout_add_layer_norm_fwd(Tensor input, Tensor? input_bias, Tensor? residual, "
    f"{_NORM}, {TOKEN_DROPOUT}, ScalarType? copy_dtype, str save, str backend) "
    "-> (Tensor out, Tensor sum, Tensor copy, Tensor mean, Tensor rstd)",
    _fused_forward,
    _fused_fake,
)


def _fused_backward(
    grad_out, grad_sum, saved, mean, rstd, weight, bias, eps, out_dtype, input_dtype, *options
):
    *dropout, save, backend, want = options
    functions = dispatch.functions("dropout_add_layer_norm", backend)
    norm = NormArguments(weight, bias, eps, out_dtype)
    gradients = functions.dropout_add_layer_norm_backward(
        grad_out, grad_sum, saved, mean, rstd, norm, input_dtype, TokenDropout(*dropout), want
    )
    return tuple(saved.new_empty(0) if g is None else g for g in gradients)


def _fused_backward_fake(
    grad_out, grad_sum, saved, mean, rstd, weight, bias, eps, out_dtype, input_dtype, *options
):
    *dropout, _, _, want = options
    want_branch, want_bias, want_weight, want_norm_bias = want
    apart = want_branch and (TokenDropout(*dropout).drops or input_dtype != saved.dtype)
    none = saved.new_empty(0)
    return (
        saved.new_empty(saved.shape),
        saved.new_empty(saved.shape, dtype=input_dtype) if apart else none,
        saved.new_empty(saved.shape[-1:], dtype=mean.dtype) if want_bias else saved.new_empty(0),
        weight.new_empty(weight.shape) if want_weight else saved.new_empty(0),
        bias.new_empty(bias.shape) if want_norm_bias else saved.new_empty(0),
    )


_fused_backward_op = define(
    "dropout_add_layer_norm_bwd(Tensor? grad_out, Tensor? grad_sum, Tensor saved, Tensor mean, "
    f"Tensor rstd, {_NORM}, ScalarType input_dtype, {TOKEN_DROPOUT}, str save, str backend, "
    "bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fused_backward,
    _fused_backward_fake,
)
_dropout_add_forward_op = define(
    f"dropout_add_fwd(Tensor input, Tensor? input_bias, Tensor? residual, {TOKEN_DROPOUT}, "
    "str backend) -> Tensor",
    _dropout_add_forward,
    _dropout_add_fake,
)
_dropout_add_backward_op = define(
    f"dropout_add_bwd(Tensor grad, ScalarType input_dtype, {TOKEN_DROPOUT}, str backend) -> Tensor",
    _dropout_add_backward,
    lambda grad, input_dtype, *options: grad.new_empty(grad.shape, dtype=input_dtype),
)


# ------------------------------------------------------------------------ autograd Function


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, eps, out_dtype, backend):
        out, mean, rstd = _layer_norm_forward_op(input, weight, bias, eps, out_dtype, backend)
        ctx.save_for_backward(input, mean, rstd, weight, bias)
        ctx.plain = (eps, out_dtype, backend)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        input, mean, rstd, weight, bias = ctx.saved_tensors
        eps, out_dtype, backend = ctx.plain
        if wants_second_order():
            return *_norm_gradients((input, weight, bias), eps, out_dtype, grad_out), *(None,) * 3
        want = list(ctx.needs_input_grad[:3])
        gradients = _layer_norm_backward_op(
            grad_out, input, mean, rstd, weight, bias, eps, out_dtype, backend, want
        )
        return *_wanted(gradients, want), None, None, None


class _DropoutAddLayerNorm(torch.autograd.Function):
    """The sum is an output, used or not: saved as one, it links second derivatives to the inputs."""

    @staticmethod
    def forward(ctx, input, input_bias, residual, weight, bias, eps, out_dtype, *options):
        out, total, copy, mean, rstd = _fused_forward_op(
            input, input_bias, residual, weight, bias, eps, out_dtype, *options
        )
        *dropout, copy_dtype, save, backend = options
        dropout = TokenDropout(*dropout)
        ctx.save_for_backward(total, mean, rstd, weight, bias, dropout.seed, dropout.row_index)
        ctx.dropout = tuple(dropout._replace(seed=None, row_index=None))
        ctx.plain = (eps, out_dtype, input.dtype, save, backend)
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (input_bias, residual))
        ctx.set_materialize_grads(False)
        if copy_dtype is None:
            ctx.mark_non_differentiable(copy)
        return out, total, copy

    @staticmethod
    def backward(ctx, grad_out, grad_sum, grad_copy):
        total, mean, rstd, weight, bias, seed, row_index = ctx.saved_tensors
        dropout = TokenDropout(*ctx.dropout)._replace(seed=seed, row_index=row_index)
        eps, out_dtype, input_dtype, save, backend = ctx.plain
        bias_dtype, residual_dtype = ctx.dtypes
        grad_out = _sum_of(grad_out, grad_copy, out_dtype)
        want = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4)]
        if wants_second_order():
            gradients = _fused_gradients(
                grad_out, grad_sum, total, weight, bias, eps, out_dtype, input_dtype, dropout
            )
        else:
            gradients = _fused_backward_op(
                grad_out,
                grad_sum,
                total,
                mean,
                rstd,
                weight,
                bias,
                eps,
                out_dtype,
                input_dtype,
                *dropout,
                save,
                backend,
                want,
            )
        d_sum, d_branch, d_input_bias, d_weight, d_bias = gradients
        if want[0] and not (dropout.drops or input_dtype != total.dtype):
            d_branch = d_sum
        return (
            d_branch if want[0] else None,
            d_input_bias.to(bias_dtype) if want[1] else None,
            d_sum.to(residual_dtype) if ctx.needs_input_grad[2] else None,
            d_weight if want[2] else None,
            d_bias if want[3] else None,
            *(None,) * (len(dropout) + 5),
        )


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, input_bias, residual, *options):
        dropout = TokenDropout(*options[:-1])
        ctx.save_for_backward(dropout.seed, dropout.row_index)
        ctx.dropout = tuple(dropout._replace(seed=None, row_index=None))
        ctx.plain = (input.dtype, options[-1])
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (input_bias, residual))
        return _dropout_add_forward_op(input, input_bias, residual, *options)

    @staticmethod
    def backward(ctx, grad: Tensor):
        seed, row_index = ctx.saved_tensors
        dropout = TokenDropout(*ctx.dropout)._replace(seed=seed, row_index=row_index)
        input_dtype, backend = ctx.plain
        bias_dtype, residual_dtype = ctx.dtypes
        d_input = d_bias = None
        if any(ctx.needs_input_grad[:2]):
            if wants_second_order():
                d_input = _drop_gradient(grad, input_dtype, dropout)
            else:
                d_input = _dropout_add_backward_op(grad, input_dtype, *dropout, backend)
        if ctx.needs_input_grad[1]:
            d_bias = d_input.reshape(-1, d_input.shape[-1]).sum(0).to(bias_dtype)
        d_residual = grad.to(residual_dtype) if ctx.needs_input_grad[2] else None
        return d_input, d_bias, d_residual, *(None,) * (len(dropout) + 1)


def _wanted(gradients, want):
    return tuple(g if w else None for g, w in zip(gradients, want, strict=True))


def _sum_of(grad_out: Tensor | None, grad_copy: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if grad_copy is None:
        return grad_out
    grad_copy = grad_copy.to(dtype)
    return grad_copy if grad_out is None else grad_out + grad_copy


def _norm_gradients(inputs, eps, out_dtype, grad_out):
    """Differentiable gradients of input, weight and bias of a layer norm."""
    arguments = NormArguments(*inputs[1:], eps, out_dtype)
    return differentiable_gradients(
        lambda *x: fallback.layer_norm_composite(*x, arguments), inputs, grad_out
    )


def _drop_gradient(grad: Tensor, dtype: torch.dtype, dropout: TokenDropout) -> Tensor:
    """The (linear) backward of dropout in differentiable operations."""
    return fallback.dropout_add_composite(grad, None, None, dropout).to(dtype)


def _fused_gradients(
    grad_out, grad_sum, total, weight, bias, eps, out_dtype, input_dtype, dropout
):
    d_weight = d_bias = None
    d_sum = grad_sum
    if grad_out is not None:
        d_sum, d_weight, d_bias = _norm_gradients((total, weight, bias), eps, out_dtype, grad_out)
        d_sum = d_sum if grad_sum is None else d_sum + grad_sum
    d_branch = _drop_gradient(d_sum, input_dtype, dropout)
    d_input_bias = d_branch.reshape(-1, d_branch.shape[-1]).sum(0)
    return d_sum, d_branch, d_input_bias, d_weight, d_bias
