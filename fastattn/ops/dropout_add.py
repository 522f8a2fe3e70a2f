"""residual + dropout(x + bias), the tail of a pre-norm block.

Backends: ``cuda``, ``cpu`` (C++), ``triton``, ``pytorch``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.arguments import (
    TOKEN_DROPOUT,
    TokenDropout,
    accumulation_dtype,
    options_of,
    stream_dtype,
)
from fastattn.ops._autograd import (
    Function,
    apply,
    column_sum,
    needs_composite,
    recall,
    remember,
    wanted_only,
    wants_second_order,
)
from fastattn.ops._checks import (
    check_device,
    check_dropout,
    check_floating,
    check_rows,
    check_vector,
    mismatch,
    token_dropout,
)
from fastattn.ops._register import define, or_empty
from fastattn.ops.layer_norm import (
    dtypes_of,
    register_backends,
)
from fastattn.pytorch import layer_norm as in_pytorch


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

    Arguments and errors are those of :func:`fastattn.dropout_add_layer_norm`.

    Returns:
        The shape of ``input``, in the promoted dtype of ``input`` and ``residual``.
    """
    check_branch(input, residual, input_bias)
    check_dropout(dropout_p, seed, site, input)
    dropout = token_dropout(input, dropout_p, seed, site, row_index, row_period, batch_first)
    dtypes = dtypes_of(input, residual, input_bias)
    backend = dispatch.choose("dropout_add", input, backend, dtypes=dtypes)
    composite = needs_composite(input, input_bias, residual)
    if composite or (backend == "pytorch" and not dropout.drops):
        return plain_sum(composite, input, input_bias, residual, dropout)
    return apply(_DropoutAdd, input, input_bias, residual, *Options(*dropout, backend))


def plain_sum(composite: bool, *arguments: Any) -> Tensor:
    """The sum without an op around it: in place where no derivative can be asked for."""
    if composite or torch.is_grad_enabled():
        total = in_pytorch.dropout_add_composite(*arguments)
        return total.clone() if total is arguments[0] else total
    return in_pytorch.dropout_add_forward(*arguments)


def check_branch(input: Tensor, residual: Tensor | None, input_bias: Tensor | None) -> None:
    """Raise unless a branch, its bias and what it is added to fit together."""
    check_rows(input)
    check_vector("input_bias", input_bias, input)
    if residual is not None:
        if residual.shape != input.shape:
            raise mismatch("residual", f"of input's shape {tuple(input.shape)}", residual.shape)
        check_floating("residual", residual.dtype)
        check_device("residual", residual, input)


# --------------------------------------------------------------------- why not, per backend

register_backends("dropout_add")


# ------------------------------------------------------------- schema, fake, implementation


#: What the op takes besides tensors.
Options = options_of("Options", TokenDropout, "backend")


def _forward(input, input_bias, residual, *options):
    options = Options(*options)
    functions = dispatch.functions("dropout_add", options.backend)
    dropout = TokenDropout.of(options)
    return functions.dropout_add_forward(input, input_bias, residual, dropout)


def _forward_fake(input, input_bias, residual, *options):
    return input.new_empty(input.shape, dtype=stream_dtype(input, residual))


def _backward(grad, input_dtype, *options):
    *options, wanted = options
    options = Options(*options)
    functions = dispatch.functions("dropout_add", options.backend)
    dropout = TokenDropout.of(options)
    return or_empty(functions.dropout_add_backward(grad, input_dtype, dropout, wanted), grad)


def _backward_fake(grad, input_dtype, *options):
    *_, (want_branch, want_bias) = options
    wide = accumulation_dtype(grad.dtype)
    d_branch = grad.new_empty(grad.shape, dtype=input_dtype) if want_branch else None
    d_bias = grad.new_empty(grad.shape[-1:], dtype=wide) if want_bias else None
    return or_empty((d_branch, d_bias), grad)


_forward_op = define(
    f"dropout_add_fwd(Tensor input, Tensor? input_bias, Tensor? residual, {TOKEN_DROPOUT}, "
    "str backend) -> Tensor",
    _forward,
    _forward_fake,
)
_backward_op = define(
    f"dropout_add_bwd(Tensor grad, ScalarType input_dtype, {TOKEN_DROPOUT}, str backend, "
    "bool[2] wanted) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


# ------------------------------------------------------------------------ autograd Function


class _DropoutAdd(Function):
    @staticmethod
    def forward(ctx, input, input_bias, residual, *options):
        remember(ctx, (), options)
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (input, input_bias, residual))
        return _forward_op(input, input_bias, residual, *options)

    @staticmethod
    def backward(ctx, grad: Tensor):
        _, options = recall(ctx)
        input_dtype, bias_dtype, residual_dtype = ctx.dtypes
        wanted = ctx.needs_input_grad[:3]
        want_branch, want_bias, _ = wanted
        dropout = TokenDropout.of(Options(*options))
        d_input, d_bias = grad, None
        if wants_second_order():
            d_input = drop_gradient(grad, input_dtype, dropout)
            d_bias = column_sum(d_input, d_input.dtype)
        else:
            apart = branch_is_apart(dropout, input_dtype, grad.dtype)
            if want_bias or (want_branch and apart):
                want = [want_branch and apart, want_bias]
                results = _backward_op(grad, input_dtype, *options, want)
                d_input, d_bias = results[0] if apart else grad, results[1]
        d_bias = d_bias.to(bias_dtype) if want_bias else None
        d_residual = grad.to(residual_dtype) if wanted[2] else None
        return *wanted_only((d_input, d_bias, d_residual), wanted), *(None,) * len(options)


def branch_is_apart(
    dropout: TokenDropout, input_dtype: torch.dtype, sum_dtype: torch.dtype
) -> bool:
    """Whether the branch's gradient differs from the sum's; an op's outputs may not alias."""
    return dropout.drops or input_dtype != sum_dtype


def drop_gradient(grad: Tensor, dtype: torch.dtype, dropout: TokenDropout) -> Tensor:
    """The (linear) backward of dropout in differentiable operations."""
    return in_pytorch.dropout_add_composite(grad, None, None, dropout).to(dtype)
