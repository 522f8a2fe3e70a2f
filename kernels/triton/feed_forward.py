"""The feed-forward block: torch's matrix products, and one kernel between them each way.

In forward it activates and drops. In backward it makes the decisions again, applies the derivative,
makes the activation again where a weight's gradient wants it, and sums the columns for the bias's.
The first bias is added where the product is summed, before it is rounded: after, relu would pass
the wrong side of zero where product and bias nearly cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.arguments import FeedForwardArguments
from fastattn.kernels.bias_activation_dropout import (
    bias_activation_dropout_backward,
    bias_activation_dropout_forward,
)
from fastattn.pytorch.products import product


class FeedForward:
    """The block around three steps that a subclass may replace: where products meet the rest."""

    def feed_forward_forward(
        self,
        input: Tensor,
        arguments: FeedForwardArguments,
        out: Tensor,
        hidden: Tensor | None,
    ) -> None:
        """Write the output of (tokens, d) to ``out``, and to ``hidden`` what backward wants.

        That is relu's result after dropout, else input @ weight1.T + bias1. Without ``hidden``
        nothing is kept.
        """
        activated = self.activate(input, arguments, hidden)
        product(activated, arguments.weight2, arguments.bias2, out)

    def feed_forward_backward(
        self,
        grad_out: Tensor,
        input: Tensor,
        arguments: FeedForwardArguments,
        hidden: Tensor | None,
        d_input: Tensor | None,
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Write the gradient of the input, (tokens, d), to ``d_input``, if given.

        Returns those of weight1, bias1 (in at least fp32), weight2, bias2; None where not
        ``wanted``. ``hidden`` is None where forward kept nothing.
        """
        want_weight1, want_bias1, want_weight2, want_bias2 = wanted
        from_output = arguments.activation == "relu"
        activated = None
        if from_output:
            activated = self.activate(input, arguments, None) if hidden is None else hidden
        elif hidden is None:
            hidden = self.hidden(input, arguments)
            activated = hidden if want_weight2 else None  # whose memory it may have
        elif want_weight2:
            activated = torch.empty_like(hidden)
        d_hidden = d_weight1 = d_bias1 = d_weight2 = None
        if d_input is not None or want_weight1 or want_bias1:
            d_hidden, d_bias1 = self.hidden_gradient(
                grad_out, arguments, hidden, activated, want_bias1
            )
        elif want_weight2 and not from_output:
            activated = self._activate(hidden, arguments, activated)
        if want_weight2:
            d_weight2 = grad_out.t() @ activated
        del activated, hidden
        if d_input is not None:
            torch.mm(d_hidden, arguments.weight1, out=d_input)
        if want_weight1:
            d_weight1 = d_hidden.t() @ input
        return d_weight1, d_bias1, d_weight2, grad_out.sum(0) if want_bias2 else None

    def hidden(self, input: Tensor, arguments: FeedForwardArguments) -> Tensor:
        """input @ weight1.T + bias1 with the bits that ``activate`` would leave."""
        return product(input, arguments.weight1, arguments.bias1)

    def activate(
        self, input: Tensor, arguments: FeedForwardArguments, hidden: Tensor | None
    ) -> Tensor:
        """dropout(act(input @ weight1.T + bias1)), and to ``hidden`` what backward wants.

        In its memory where that is relu's result.
        """
        h = product(input, arguments.weight1, arguments.bias1, hidden)
        in_place = hidden is None or arguments.activation == "relu"
        return self._activate(h, arguments, h if in_place else None)

    def hidden_gradient(
        self,
        grad_out: Tensor,
        arguments: FeedForwardArguments,
        hidden: Tensor | None,
        activated: Tensor | None,
        want_bias1: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of input @ weight1.T + bias1, and of bias1 if wanted.

        From ``activated`` if the activation is relu. Else from ``hidden``, and to ``activated``, if
        given, the activation is written, dropped again; it may be ``hidden``.
        """
        d_activated = torch.mm(grad_out, arguments.weight2)
        from_output = arguments.activation == "relu"
        return bias_activation_dropout_backward(
            d_activated,
            activated if from_output else hidden,
            None,
            arguments.activation,
            arguments.dropout,
            want_bias1,
            from_output=from_output,
            out=d_activated,
            activated=None if from_output else activated,
        )

    def _activate(
        self, hidden: Tensor, arguments: FeedForwardArguments, out: Tensor | None
    ) -> Tensor:
        return bias_activation_dropout_forward(
            hidden, None, arguments.activation, arguments.dropout, out
        )


_block = FeedForward()
feed_forward_forward = _block.feed_forward_forward
feed_forward_backward = _block.feed_forward_backward
