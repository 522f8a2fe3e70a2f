"""The activations that have a fused path, with and without dropout, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.arguments import TokenDropout, accumulation_dtype
from fastattn.dropout import STRIDED

#: The activations that have a fused path.
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda x: x,
}
ACTIVATE_IN_PLACE = {
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "silu": lambda x: F.silu(x, inplace=True),
    "identity": lambda x: x,
}
_relu_backward, _gelu_backward, _silu_backward = (
    getattr(torch.ops.aten, name).grad_input
    for name in ("threshold_backward", "gelu_backward", "silu_backward")
)
BACKWARD_IN_PLACE = {
    "relu": lambda grad, x: _relu_backward(grad, x, 0, grad_input=grad),
    "gelu": lambda grad, x: _gelu_backward(grad, x, approximate="none", grad_input=grad),
    "gelu_tanh": lambda grad, x: _gelu_backward(grad, x, approximate="tanh", grad_input=grad),
    "silu": lambda grad, x: _silu_backward(grad, x, grad_input=grad),
    "identity": lambda grad, x: grad,
}


def activation_factor(dropout: TokenDropout, hidden: Tensor) -> Tensor | None:
    """The multiplier of ``hidden``, at least fp32: in bf16 1 / keep itself is 0.2 % off."""
    return dropout.factor(hidden, STRIDED, accumulation_dtype(hidden.dtype))


def activate(hidden: Tensor, activation: str, factor: Tensor | None) -> Tensor:
    """A fresh dropout(act(hidden))."""
    if activation == "identity":
        return hidden.clone() if factor is None else (hidden * factor).to(hidden.dtype)
    activated = ACTIVATIONS[activation](hidden)
    return activated if factor is None else activated.mul_(factor)
