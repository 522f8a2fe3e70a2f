"""The middle of the feed-forward block, dropout(act(h + b)): eager, compiled and fused."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.dropout import draw_seed

from ..cases import Case, Cost, Op, Provider, with_compiled
from ..naive_dropout import naive_dropout, why_not_naive_dropout
from .feed_forward import ACTIVATIONS


class Eager(nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(case.dim_feedforward))
        self.activation, self.dropout_p = case.activation, case.dropout

    @property
    def p(self) -> float:
        return self.dropout_p if self.training else 0.0

    def forward(self, input: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.activation](input + self.bias)
        return F.dropout(hidden, self.p, self.training)


class NaiveDropout(Eager):
    def forward(self, input: Tensor) -> Tensor:
        return naive_dropout(ACTIVATIONS[self.activation](input + self.bias), self.p)


class Fastattn(Eager):
    def forward(self, input: Tensor) -> Tensor:
        return fastattn.bias_activation_dropout(
            input,
            self.bias,
            activation=self.activation,
            dropout_p=self.p,
            seed=draw_seed(input.device) if self.p else None,
        )


def cost(case: Case) -> dict[str, Cost]:
    """Forward reads h and writes y; backward reads dy and h and writes dh.

    FLOPs an element, without the random numbers and with relu: bias, activation, scale 3; in
    backward, with the bias gradient, 4.
    """
    elements = case.rows * case.dim_feedforward
    size = case.dtype.itemsize
    return {
        "forward": Cost(3 * elements, 2 * size * elements),
        "backward": Cost(4 * elements, 3 * size * elements),
    }


OP = Op(
    name="bias_activation_dropout",
    cases={
        "cpu": (Case(8, 128, 384, quick=True),),
        "cuda": (
            Case(32, 512, 768, precision="bf16", quick=True),
            Case(32, 512, 768, precision="bf16", activation="gelu", quick=True),
            Case(32, 512, 1024, precision="bf16"),
            Case(32, 512, 4096, precision="bf16"),
        ),
    },
    providers=(
        *with_compiled(Provider("eager", Eager)),
        Provider("naive dropout kernel", NaiveDropout, why_not=why_not_naive_dropout),
        *with_compiled(Provider("fastattn", Fastattn)),
    ),
    inputs=lambda case: {"input": (case.batch, case.sequence, case.dim_feedforward)},
    cost=cost,
)
