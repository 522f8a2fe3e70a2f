"""The end of a post-norm block, LN(residual + dropout(x + bias)): eager, compiled and fused."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.dropout import draw_seed

from ..cases import Case, Cost, Op, Provider, with_compiled
from ..naive_dropout import naive_dropout, why_not_naive_dropout
from .layer_norm import CASES, why_not_liger, why_not_triton


class Eager(nn.Module):
    """What the stock layer does, with the bias that its linear layer adds."""

    def __init__(self, case: Case):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(case.d_model))
        self.norm = nn.LayerNorm(case.d_model)
        self.dropout_p = case.dropout

    @property
    def p(self) -> float:
        return self.dropout_p if self.training else 0.0

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return self.norm(residual + F.dropout(input + self.bias, self.p, self.training))


class NaiveDropout(Eager):
    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return self.norm(residual + naive_dropout(input + self.bias, self.p))


class Liger(Eager):
    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        total = residual + F.dropout(input + self.bias, self.p, self.training)
        norm = self.norm
        return LigerLayerNormFunction.apply(total, norm.weight, norm.bias, norm.eps)


class Fastattn(Eager):
    backend: str | None = None

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return fastattn.dropout_add_layer_norm(
            input,
            residual,
            self.norm.weight,
            self.norm.bias,
            input_bias=self.bias,
            dropout_p=self.p,
            seed=draw_seed(input.device) if self.p else None,
            backend=self.backend,
        )


class FastattnTriton(Fastattn):
    backend = "triton"


def cost(case: Case) -> dict[str, Cost]:
    """Forward reads x and the residual and writes y and their sum; backward reads dy and the sum
    and writes dx and dresidual.

    Random numbers are not counted as FLOPs: bias, scale, sum and norm 11 an element, and in
    backward 18.
    """
    elements = case.rows * case.d_model
    size = case.dtype.itemsize
    return {
        "forward": Cost(11 * elements, 4 * size * elements),
        "backward": Cost(18 * elements, 4 * size * elements),
    }


def inputs(case: Case) -> dict[str, tuple[int, ...]]:
    shape = (case.batch, case.sequence, case.d_model)
    return {"input": shape, "residual": shape}


OP = Op(
    name="dropout_add_layer_norm",
    cases=CASES,
    providers=(
        *with_compiled(Provider("eager", Eager)),
        Provider("naive dropout kernel", NaiveDropout, why_not=why_not_naive_dropout),
        Provider("liger", Liger, why_not=why_not_liger),
        *with_compiled(Provider("fastattn", Fastattn)),
        Provider("fastattn triton", FastattnTriton, why_not=why_not_triton),
    ),
    inputs=inputs,
    cost=cost,
)
