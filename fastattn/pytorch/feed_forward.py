"""The feed-forward block in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.arguments import FeedForwardArguments, TokenDropout
from fastattn.pytorch.activations import BACKWARD_IN_PLACE, activate, activation_factor
from fastattn.pytorch.bias_activation_dropout import bias_activation_dropout_composite
from fastattn.pytorch.products import product


def feed_forward_forward(
    input: Tensor, arguments: FeedForwardArguments, out: Tensor, hidden: Tensor | None
) -> None:
    """Write the output of (tokens, d) to ``out``, and to ``hidden``, if given, what backward wants.

    That is relu's result after dropout, else h = input @ weight1.T + bias1.
    """
    weight1, bias1, weight2, bias2, activation, dropout = arguments
    h = product(input, weight1, bias1, hidden)
    factor = activation_factor(dropout, h)
    if activation == "relu":
        activated = h.relu_() if factor is None else h.relu_().mul_(factor)
    else:
        activated = activate(h, activation, factor)
    product(activated, weight2, bias2, out)


def feed_forward_backward(
    grad_out: Tensor,
    input: Tensor,
    arguments: FeedForwardArguments,
    hidden: Tensor | None,
    d_input: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Write the gradient of the input, (tokens, d), to ``d_input``, if given.

    Returns those of weight1, bias1, weight2, bias2; None where not ``wanted``. ``hidden`` is None
    where forward kept nothing.
    """
    weight1, bias1, weight2, _, activation, dropout = arguments
    if hidden is None:
        hidden = product(input, weight1, bias1)
        if activation == "relu":
            hidden = activate(hidden, "relu", activation_factor(dropout, hidden))
    want_weight1, want_bias1, want_weight2, want_bias2 = wanted
    d_bias2 = grad_out.sum(0) if want_bias2 else None
    factor = None
    if activation == "relu":  # hidden is positive exactly where it was kept and relu passed
        activated, scale = hidden, dropout.scale
    else:
        factor, scale = activation_factor(dropout, hidden), 1.0
        activated = activate(hidden, activation, factor) if want_weight2 else None
    d_weight2 = grad_out.t() @ activated if want_weight2 else None
    if d_input is None and not (want_weight1 or want_bias1):
        return None, None, d_weight2, d_bias2
    d_hidden = torch.addmm(grad_out.new_zeros(1), grad_out, weight2, beta=0, alpha=scale)
    if factor is not None:
        d_hidden.mul_(factor)
    BACKWARD_IN_PLACE[activation](d_hidden, hidden)
    if d_input is not None:
        torch.mm(d_hidden, weight1, out=d_input)
    return (
        d_hidden.t() @ input if want_weight1 else None,
        d_hidden.sum(0) if want_bias1 else None,
        d_weight2,
        d_bias2,
    )


def feed_forward_composite(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    dropout: TokenDropout,
) -> Tensor:
    activated = bias_activation_dropout_composite(
        F.linear(input, weight1, bias1), None, activation, dropout
    )
    return F.linear(activated, weight2, bias2)
