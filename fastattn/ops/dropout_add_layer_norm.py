"""LN(residual + dropout(x + bias)), the tail of a post-norm block.

Backends: ``cuda``, ``cpu`` (C++), ``triton``, ``pytorch``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.arguments import (
    NORM_ARGUMENTS,
    TOKEN_DROPOUT,
    NormArguments,
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
from fastattn.ops._checks import check_dropout, check_floating, check_save, token_dropout
from fastattn.ops._register import define, or_empty
from fastattn.ops.dropout_add import (
    branch_is_apart,
    check_branch,
    drop_gradient,
    plain_sum,
)
from fastattn.ops.layer_norm import (
    check_norm,
    check_second_order,
    dtypes_of,
    leaves_it_to_torch,
    norm_dtype,
    norm_gradients,
    register_backends,
    statistics_fake,
)
from fastattn.pytorch import layer_norm as in_pytorch

#: What dropout_add_layer_norm may keep for backward: the sum before normalisation, the result, or
#: the result's copy.
SAVE_LEVELS = ("sum", "output", "copy")


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
        save: what backward keeps: ``"sum"``, or ``"output"``, which costs nothing where a linear
            layer keeps it anyway, or ``"copy"``, as exact as ``copy_dtype``. Backward then divides
            by ``weight``, so that must not be close to zero
            (:func:`fastattn.ops.layer_norm.why_not_from_output`), and there are no second
            derivatives.
        backend: ``"cuda"``, ``"cpu"``, ``"triton"`` or ``"pytorch"``; None chooses.

    Returns:
        The result; with ``return_sum`` or ``copy_dtype`` a tuple (result, sum, copy) of those
        asked for.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run this call.
    """
    check_norm(input, weight, bias, out_dtype)
    check_branch(input, residual, input_bias)
    check_floating("copy_dtype", copy_dtype)
    check_save(save, SAVE_LEVELS)
    if save == "copy" and copy_dtype is None:
        raise ValueError('save="copy" needs a copy_dtype')
    check_dropout(dropout_p, seed, site, input)
    dropout = token_dropout(input, dropout_p, seed, site, row_index, row_period, batch_first)
    sum_dtype = stream_dtype(input, residual)
    tensors = (input, input_bias, residual, weight, bias)
    dtypes = (*dtypes_of(*tensors), out_dtype, copy_dtype)
    backend = dispatch.choose("dropout_add_layer_norm", input, backend, dtypes=dtypes)
    arguments = NormArguments(weight, bias, eps, out_dtype or norm_dtype(sum_dtype, input))
    composite = needs_composite(*tensors)
    if composite or (leaves_it_to_torch(backend, sum_dtype, save) and not dropout.drops):
        total = plain_sum(composite, input, input_bias, residual, dropout)
        dtype = arguments.out_dtype
        wide = dtype if copy_dtype is None else accumulation_dtype(total.dtype)
        exact = in_pytorch.layer_norm_composite(
            total, weight, bias, arguments._replace(out_dtype=wide)
        )
        copy = None if copy_dtype is None else exact.to(copy_dtype, copy=wide == dtype)
        out = exact.to(dtype)
    else:
        recorded = torch.is_grad_enabled() and _require_grad(*tensors)
        keep_sum = return_sum or (recorded and save == "sum")
        options = Options(*arguments, *dropout, copy_dtype, keep_sum, backend)
        call = (input, input_bias, residual, *options)
        if recorded:
            out, total, copy = apply(_DropoutAddLayerNorm, return_sum, save, *call)
        else:
            out, total, copy, _, _ = _forward_op(*call)
    results = (out, *((total,) if return_sum else ()), *(() if copy_dtype is None else (copy,)))
    return results if len(results) > 1 else out


def _require_grad(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)


# --------------------------------------------------------------------- why not, per backend

register_backends("dropout_add_layer_norm")


# ------------------------------------------------------------- schema, fake, implementation


#: What the op takes besides the tensors of its sum, and its backward besides those of its own.
Options = options_of("Options", NormArguments, TokenDropout, "copy_dtype", "keep_sum", "backend")
BackwardOptions = options_of(
    "BackwardOptions", NormArguments, "input_dtype", "sum_dtype", TokenDropout, "save", "backend"
)


def _forward(input, input_bias, residual, *options):
    options = Options(*options)
    functions = dispatch.functions("dropout_add_layer_norm", options.backend)
    norm, dropout = NormArguments.of(options), TokenDropout.of(options)
    results = functions.dropout_add_layer_norm_forward(
        input, input_bias, residual, norm, dropout, options.copy_dtype, options.keep_sum
    )
    return or_empty(results, input)


def _forward_fake(input, input_bias, residual, *options):
    options = Options(*options)
    total = input.new_empty(input.shape, dtype=stream_dtype(input, residual))
    out = total.new_empty(input.shape, dtype=options.out_dtype)
    copied = options.copy_dtype is not None
    copy = out.new_empty(out.shape, dtype=options.copy_dtype) if copied else None
    results = (out, total if options.keep_sum else None, copy, *statistics_fake(total))
    return or_empty(results, input)


def _backward(grad_out, grad_sum, grad_copy, saved, mean, rstd, *options):
    *options, wanted = options
    options = BackwardOptions(*options)
    functions = dispatch.functions("dropout_add_layer_norm", options.backend)
    gradients = functions.dropout_add_layer_norm_backward(
        grad_out,
        grad_sum,
        grad_copy,
        saved,
        mean,
        rstd,
        NormArguments.of(options),
        options.input_dtype,
        options.sum_dtype,
        TokenDropout.of(options),
        options.save,
        wanted,
    )
    return or_empty(gradients, saved)


def _backward_fake(grad_out, grad_sum, grad_copy, saved, mean, rstd, *options):
    *options, (want_sum, want_branch, want_input_bias, want_weight, want_bias) = options
    options = BackwardOptions(*options)
    weight, bias, columns = options.weight, options.bias, saved.shape[-1:]
    return or_empty(
        (
            saved.new_empty(saved.shape, dtype=options.sum_dtype) if want_sum else None,
            saved.new_empty(saved.shape, dtype=options.input_dtype) if want_branch else None,
            saved.new_empty(columns, dtype=rstd.dtype) if want_input_bias else None,
            weight.new_empty(weight.shape) if want_weight else None,
            bias.new_empty(bias.shape) if want_bias else None,
        ),
        saved,
    )


_forward_op = define(
    "dropout_add_layer_norm_fwd(Tensor input, Tensor? input_bias, Tensor? residual, "
    f"{NORM_ARGUMENTS}, {TOKEN_DROPOUT}, ScalarType? copy_dtype, bool keep_sum, str backend) "
    "-> (Tensor out, Tensor sum, Tensor copy, Tensor mean, Tensor rstd)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "dropout_add_layer_norm_bwd(Tensor? grad_out, Tensor? grad_sum, Tensor? grad_copy, "
    f"Tensor saved, Tensor? mean, Tensor rstd, {NORM_ARGUMENTS}, ScalarType input_dtype, "
    f"ScalarType sum_dtype, {TOKEN_DROPOUT}, str save, str backend, bool[5] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


# ------------------------------------------------------------------------ autograd Function


class _DropoutAddLayerNorm(Function):
    """The sum is an output even if unused: so it links second derivatives to the inputs."""

    @staticmethod
    def forward(ctx, return_sum, save, input, input_bias, residual, *options):
        named = Options(*options)
        out, total, copy, mean, rstd = _forward_op(input, input_bias, residual, *options)
        saved = {"sum": (total, mean), "output": (out, None), "copy": (copy, None)}[save]
        remember(ctx, (*saved, rstd), options)
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (input, input_bias, residual))
        ctx.sum_dtype = stream_dtype(input, residual)
        ctx.return_sum, ctx.save = return_sum, save
        ctx.set_materialize_grads(False)
        there = ((total, named.keep_sum), (copy, named.copy_dtype is not None))
        ctx.mark_non_differentiable(*[x for x, is_there in there if not is_there])
        return out, total, copy

    @staticmethod
    def backward(ctx, grad_out, grad_sum, grad_copy):
        (saved, mean, rstd), options = recall(ctx)
        named = Options(*options)
        norm, dropout = NormArguments.of(named), TokenDropout.of(named)
        input_dtype, bias_dtype, residual_dtype = ctx.dtypes
        if torch.compiler.is_compiling() and not ctx.return_sum:
            grad_sum = None  # a compiler fills in zeros for outputs that nobody used
        if named.copy_dtype is None:
            grad_copy = None
        if grad_out is None and grad_sum is None and grad_copy is None:
            return None, None, *(None,) * (3 + len(options))
        wanted = ctx.needs_input_grad[2:7]
        want_branch, want_input_bias, want_residual, *want_affine = wanted
        apart = branch_is_apart(dropout, input_dtype, ctx.sum_dtype)
        if wants_second_order():
            check_second_order(ctx.save)
            grad = _sum_of(grad_out, grad_copy, norm.out_dtype)
            found = _second_order(grad, grad_sum, saved, norm, input_dtype, dropout)
            d_sum, d_branch, d_input_bias, *d_affine = found
        else:
            level = "sum" if ctx.save == "sum" else "output"
            d_sum, d_branch, d_input_bias, *d_affine = _backward_op(
                grad_out,
                grad_sum,
                grad_copy,
                saved,
                mean,
                rstd,
                *BackwardOptions(*norm, input_dtype, ctx.sum_dtype, *dropout, level, named.backend),
                [
                    want_residual or (want_branch and not apart),
                    want_branch and apart,
                    want_input_bias,
                    *want_affine,
                ],
            )
            if not apart:
                d_branch = d_sum
        gradients = (
            d_branch,
            d_input_bias.to(bias_dtype) if want_input_bias else None,
            d_sum.to(residual_dtype) if want_residual else None,
            *d_affine,
        )
        return None, None, *wanted_only(gradients, wanted), *(None,) * (len(options) - 2)


def _sum_of(grad_out: Tensor | None, grad_copy: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if grad_copy is None:
        return grad_out
    grad_copy = grad_copy.to(dtype)
    return grad_copy if grad_out is None else grad_out + grad_copy


def _second_order(grad_out, grad_sum, total, norm, input_dtype, dropout):
    """Differentiable gradients of the sum, the branch, its bias, and the norm's affine map."""
    d_weight = d_bias = None
    d_sum = grad_sum
    if grad_out is not None:
        d_sum, d_weight, d_bias = norm_gradients(total, norm, grad_out)
        d_sum = d_sum if grad_sum is None else d_sum + grad_sum
    d_branch = drop_gradient(d_sum, input_dtype, dropout)
    return d_sum, d_branch, column_sum(d_branch, d_branch.dtype), d_weight, d_bias
