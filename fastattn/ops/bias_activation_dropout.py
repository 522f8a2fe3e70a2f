"""dropout(act(x + bias)), the middle of the feed-forward block. Backends: ``triton``, ``pytorch``.

What is left of the block where a linear map is wrapped, quantised or sharded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.arguments import TOKEN_DROPOUT, TokenDropout, accumulation_dtype, options_of
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
from fastattn.ops._checks import check_dropout, check_rows, check_vector, mismatch, token_dropout
from fastattn.ops._register import define, or_empty
from fastattn.pytorch import bias_activation_dropout as in_pytorch
from fastattn.pytorch.activations import ACTIVATIONS


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
    """dropout(act(input + bias)), for a block whose linear maps are called as modules.

    Args:
        input: (..., d_ff) floating point.
        bias: (d_ff,) or None.

    The other arguments and errors are those of :func:`fastattn.feed_forward`.

    Returns:
        The shape of ``input``, in the promoted dtype of ``input`` and ``bias``.
    """
    check_activation(activation)
    check_rows(input)
    check_vector("bias", bias, input)
    check_dropout(dropout_p, seed, site, input)
    dropout = token_dropout(
        input, dropout_p, seed, site, row_index, row_period, batch_first, column_offset
    )
    dtypes = (input.dtype,) if bias is None else (input.dtype, bias.dtype)
    backend = dispatch.choose("bias_activation_dropout", input, backend, dtypes=dtypes)
    if needs_composite(input, bias) or (backend == "pytorch" and not dropout.drops):
        return in_pytorch.bias_activation_dropout_composite(input, bias, activation, dropout)
    return apply(_BiasActivationDropout, input, bias, *Options(activation, *dropout, backend))


def check_activation(activation: str) -> None:
    """Raise unless ``activation`` is the name of a fused one."""
    if activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise mismatch("activation", f"one of {names}", repr(activation))


# --------------------------------------------------------------------- why not, per backend

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def why_not_triton(
    device: torch.device, dtypes: tuple[torch.dtype, ...] = (), **facts: object
) -> str | None:
    """Why the Triton kernels cannot run a call with these dtypes."""
    for dtype in dtypes:
        if dtype not in _TRITON_DTYPES:
            return f"its kernels take fp16, bf16, fp32 and fp64, not {dtype}"
    return dispatch.why_not_triton(device)


dispatch.register(
    "bias_activation_dropout",
    "triton",
    "fastattn.kernels.bias_activation_dropout",
    why_not_triton,
)
dispatch.register("bias_activation_dropout", "pytorch", in_pytorch)


# ------------------------------------------------------------- schema, fake, implementation


#: What the op takes besides tensors.
Options = options_of("Options", "activation", TokenDropout, "backend")


def _forward(input, bias, *options):
    options = Options(*options)
    functions = dispatch.functions("bias_activation_dropout", options.backend)
    dropout = TokenDropout.of(options)
    out = functions.bias_activation_dropout_forward(input, bias, options.activation, dropout)
    return out.contiguous()


def _forward_fake(input, bias, *options):
    dtype = input.dtype if bias is None else torch.promote_types(input.dtype, bias.dtype)
    return input.new_empty(input.shape, dtype=dtype)


def _backward(grad_out, input, bias, want_bias, *options):
    options = Options(*options)
    functions = dispatch.functions("bias_activation_dropout", options.backend)
    d_input, d_bias = functions.bias_activation_dropout_backward(
        grad_out, input, bias, options.activation, TokenDropout.of(options), want_bias
    )
    return or_empty((d_input.contiguous(), d_bias), grad_out)


def _backward_fake(grad_out, input, bias, want_bias, *options):
    wide = accumulation_dtype(grad_out.dtype)
    d_bias = grad_out.new_empty(input.shape[-1:], dtype=wide) if want_bias else None
    return or_empty((_forward_fake(input, bias), d_bias), grad_out)


_forward_op = define(
    f"bias_activation_dropout_fwd(Tensor input, Tensor? bias, str activation, {TOKEN_DROPOUT}, "
    "str backend) -> Tensor",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "bias_activation_dropout_bwd(Tensor grad_out, Tensor input, Tensor? bias, bool want_bias, "
    f"str activation, {TOKEN_DROPOUT}, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


# ------------------------------------------------------------------------ autograd Function


class _BiasActivationDropout(Function):
    @staticmethod
    def forward(ctx, input, bias, *options):
        remember(ctx, (input, bias), options)
        return _forward_op(input, bias, *options)

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        (input, bias), options = recall(ctx)
        wanted = ctx.needs_input_grad[:2]
        if wants_second_order():
            named = Options(*options)
            same = named.activation, TokenDropout.of(named)
            gradients = differentiable_gradients(
                lambda *x: in_pytorch.bias_activation_dropout_composite(*x, *same),
                (input, bias),
                grad_out,
            )
        else:
            d_input, d_bias = _backward_op(grad_out, input, bias, wanted[1], *options)
            d_bias = d_bias.to(bias.dtype) if wanted[1] else None
            gradients = (d_input.to(input.dtype), d_bias)
        return *wanted_only(gradients, wanted), *(None,) * len(options)
