"""Residual sums and layer norms in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.arguments import (
    NormArguments,
    TokenDropout,
    accumulation_dtype,
    stream_dtype,
)
from fastattn.dropout import ADJACENT


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
    weight, bias = (None if x is None else x.to(wide) for x in (arguments.weight, arguments.bias))
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
    weight, bias = (None if x is None else x.to(wide) for x in (arguments.weight, arguments.bias))
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
    dtypes = (
        input_dtype,
        *(None if x is None else x.dtype for x in (arguments.weight, arguments.bias)),
    )
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
