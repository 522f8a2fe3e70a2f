"""dropout(act(x + bias)) in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from fastattn.arguments import TokenDropout, accumulation_dtype
from fastattn.pytorch.activations import ACTIVATIONS, BACKWARD_IN_PLACE, activate, activation_factor


def bias_activation_dropout_forward(
    input: Tensor, bias: Tensor | None, activation: str, dropout: TokenDropout
) -> Tensor:
    hidden = input if bias is None else input + bias
    return activate(hidden, activation, activation_factor(dropout, hidden))


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
    factor = activation_factor(dropout, hidden)
    grad = grad_out.clone() if factor is None else (grad_out * factor).to(grad_out.dtype)
    BACKWARD_IN_PLACE[activation](grad, hidden)
    if not want_bias:
        return grad, None
    rows = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1])
    return grad, rows.sum(0, dtype=accumulation_dtype(grad.dtype))


def bias_activation_dropout_composite(
    input: Tensor, bias: Tensor | None, activation: str, dropout: TokenDropout
) -> Tensor:
    hidden = input if bias is None else input + bias
    activated = ACTIVATIONS[activation](hidden)
    factor = activation_factor(dropout, hidden)
    return activated if factor is None else (activated * factor).to(activated.dtype)
