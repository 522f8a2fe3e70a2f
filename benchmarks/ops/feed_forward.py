"""The feed-forward block, dropout(act(x W1 + b1)) W2 + b2: eager, compiled and fused."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn import dispatch, tuned
from fastattn.dropout import draw_seed

from ..cases import Case, Cost, Op, Provider, with_compiled
from ..naive_dropout import naive_dropout, why_not_naive_dropout

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


class Eager(nn.Module):
    """As the stock layer has it."""

    def __init__(self, case: Case):
        super().__init__()
        self.linear1 = nn.Linear(case.d_model, case.dim_feedforward)
        self.linear2 = nn.Linear(case.dim_feedforward, case.d_model)
        self.activation, self.dropout_p = case.activation, case.dropout

    @property
    def p(self) -> float:
        return self.dropout_p if self.training else 0.0

    def forward(self, input: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.activation](self.linear1(input))
        return self.linear2(F.dropout(hidden, self.p, self.training))


class NaiveDropout(Eager):
    def forward(self, input: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.activation](self.linear1(input))
        return self.linear2(naive_dropout(hidden, self.p))


class Fastattn(Eager):
    save = "hidden"
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return fastattn.feed_forward(
            input,
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
            activation=self.activation,
            dropout_p=self.p,
            seed=draw_seed(input.device) if self.p else None,
            save=self.save,
            backend=self.backend,
        )


class FastattnRecompute(Fastattn):
    save = "input"


class FastattnGemm(Fastattn):
    backend = "triton_gemm"


def why_not_gemm(case: Case, device: str) -> str | None:
    """Why Triton's own products cannot run, or are what dispatch chooses anyway."""
    facts = {
        "dtypes": (torch.bfloat16 if case.precision == "autocast" else case.dtype,),
        "widths": (case.d_model, case.dim_feedforward, case.d_model),
        "tokens": case.rows,
        "activation": case.activation,
    }
    reason = dispatch.why_not("feed_forward", "triton_gemm", torch.device(device), **facts)
    if reason is None and tuned.why_not_chosen(torch.device(device), **facts) is None:
        return "it is what fastattn chooses here"
    return reason


def why_not_recompute(case: Case, device: str) -> str | None:
    return "levels of what is kept are compared on GPUs only" if device == "cpu" else None


def cost(case: Case) -> dict[str, Cost]:
    """Two products of 2 · rows · d · d_ff FLOPs, and twice as many in backward.

    Forward reads x and the weights and writes y and the one hidden tensor that backward needs;
    backward reads dy, x, the hidden tensor and the weights and writes dx and their gradients.
    """
    d, hidden, size = case.d_model, case.dim_feedforward, case.dtype.itemsize
    flops = 4 * case.rows * d * hidden
    weights, rows = 2 * d * hidden, case.rows
    return {
        "forward": Cost(flops, size * (weights + rows * (2 * d + hidden))),
        "backward": Cost(2 * flops, size * (2 * weights + rows * (3 * d + hidden))),
    }


WIDTHS = (512, 768, 1024, 2048, 4096)

OP = Op(
    name="feed_forward",
    cases={
        "cpu": (
            Case(8, 128, 384, quick=True),
            Case(8, 128, 384, activation="gelu"),
        ),
        "cuda": (
            *(Case(32, 512, d, precision="bf16", quick=d == 768) for d in WIDTHS),
            Case(32, 512, 768, precision="bf16", activation="gelu"),
            Case(32, 512, 1024, precision="bf16", activation="gelu", quick=True),
            Case(32, 512, 768, precision="autocast"),
            Case(8, 128, 768, precision="bf16"),
        ),
    },
    providers=(
        *with_compiled(Provider("eager", Eager)),
        Provider("naive dropout kernel", NaiveDropout, why_not=why_not_naive_dropout),
        *with_compiled(Provider("fastattn", Fastattn)),
        Provider("fastattn triton_gemm", FastattnGemm, why_not=why_not_gemm),
        Provider("fastattn recompute", FastattnRecompute, why_not=why_not_recompute, quick=False),
    ),
    inputs=lambda case: {"input": (case.batch, case.sequence, case.d_model)},
    cost=cost,
)
