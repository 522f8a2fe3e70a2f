"""Layer normalisation. Backends: ``cuda``, ``cpu`` (C++), ``triton``, ``pytorch``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import dispatch, fallback
from fastattn.ops._library import (
    apply,
    check_floating,
    check_rows,
    check_vector,
    define,
    differentiable_gradients,
    needs_composite,
    recall,
    remember,
    wanted_only,
    wants_second_order,
)
from fastattn.ops.arguments import NORM_ARGUMENTS, NormArguments


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
    check_norm(input, weight, bias, out_dtype)
    backend = dispatch.choose("layer_norm", input, backend)
    arguments = NormArguments(weight, bias, eps, out_dtype or norm_dtype(input.dtype, input))
    if leaves_it_to_torch(backend, input.dtype) or needs_composite(input, weight, bias):
        return fallback.layer_norm_composite(input, weight, bias, arguments)
    return apply(_LayerNorm, input, *arguments, backend)


def leaves_it_to_torch(backend: str, dtype: torch.dtype) -> bool:
    """Whether torch's own autograd is the backend: in half precision it would keep fp32 copies."""
    return backend == "pytorch" and dtype == fallback.accumulation_dtype(dtype)


def norm_dtype(dtype: torch.dtype, input: Tensor) -> torch.dtype:
    """The dtype of a norm's result: as in torch, autocast on a GPU normalises in fp32."""
    if input.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return fallback.accumulation_dtype(dtype)
    return dtype


def check_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype | None
) -> None:
    """Raise unless a norm with this affine map and result can take ``input``."""
    check_rows(input)
    check_floating("out_dtype", out_dtype)
    check_vector("weight", weight, input)
    check_vector("bias", bias, input)


# --------------------------------------------------------------------- why not, per backend

dispatch.register("layer_norm", "pytorch", fallback)


# ------------------------------------------------------------- schema, fake, implementation


def _forward(input, weight, bias, eps, out_dtype, backend):
    functions = dispatch.functions("layer_norm", backend)
    return functions.layer_norm_forward(input, NormArguments(weight, bias, eps, out_dtype))


def statistics_fake(input: Tensor) -> tuple[Tensor, Tensor]:
    """Empty mean and rstd."""
    dtype = fallback.accumulation_dtype(input.dtype)
    return tuple(input.new_empty(input.shape[:-1], dtype=dtype) for _ in range(2))


def _forward_fake(input, weight, bias, eps, out_dtype, backend):
    return input.new_empty(input.shape, dtype=out_dtype), *statistics_fake(input)


def _backward(grad_out, input, mean, rstd, weight, bias, eps, out_dtype, backend, want):
    functions = dispatch.functions("layer_norm", backend)
    arguments = NormArguments(weight, bias, eps, out_dtype)
    gradients = functions.layer_norm_backward(grad_out, input, mean, rstd, arguments, want)
    return tuple(input.new_empty(0) if g is None else g for g in gradients)


def _backward_fake(grad_out, input, mean, rstd, weight, bias, eps, out_dtype, backend, want):
    return tuple(
        x.new_empty(x.shape) if wanted else input.new_empty(0)
        for x, wanted in zip((input, weight, bias), want, strict=True)
    )


_forward_op = define(
    f"layer_norm_fwd(Tensor input, {NORM_ARGUMENTS}, str backend) "
    "-> (Tensor out, Tensor mean, Tensor rstd)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    f"layer_norm_bwd(Tensor grad_out, Tensor input, Tensor mean, Tensor rstd, {NORM_ARGUMENTS}, "
    "str backend, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


# ------------------------------------------------------------------------ autograd Function


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, *options):
        out, mean, rstd = _forward_op(input, weight, bias, *options)
        remember(ctx, (input, weight, bias, mean, rstd), options)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        (*inputs, mean, rstd), options = recall(ctx)
        wanted = list(ctx.needs_input_grad[:3])
        if wants_second_order():
            gradients = norm_gradients(inputs, *options[:2], grad_out)
        else:
            input, weight, bias = inputs
            gradients = _backward_op(grad_out, input, mean, rstd, weight, bias, *options, wanted)
        return *wanted_only(gradients, wanted), *(None,) * len(options)


def norm_gradients(
    inputs: list[Tensor | None], eps: float, out_dtype: torch.dtype, grad_out: Tensor
) -> list[Tensor | None]:
    """Differentiable gradients of a layer norm's (input, weight, bias)."""
    arguments = NormArguments(*inputs[1:], eps, out_dtype)
    return differentiable_gradients(
        lambda *x: fallback.layer_norm_composite(*x, arguments), inputs, grad_out
    )
