"""Layer normalisation: `F.layer_norm`, compiled, Liger's Triton kernel and fastattn."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

import fastattn
from fastattn import dispatch

from ..cases import Case, Cost, Op, Provider, with_compiled


class LayerNorm(nn.LayerNorm):
    """torch's own."""

    def __init__(self, case: Case):
        super().__init__(case.d_model)


class FastattnLayerNorm(LayerNorm):
    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        return fastattn.layer_norm(input, self.weight, self.bias, self.eps, backend=self.backend)


class FastattnTriton(FastattnLayerNorm):
    backend = "triton"


class LigerLayerNorm(LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return LigerLayerNormFunction.apply(input, self.weight, self.bias, self.eps)


def why_not_liger(case: Case, device: str) -> str | None:
    if device != "cuda":
        return "Liger's kernels run on CUDA only"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None


def why_not_triton(case: Case, device: str) -> str | None:
    """Why our Triton kernels are no second to what dispatch chooses here, the CUDA kernels."""
    return dispatch.why_not("layer_norm", "triton", torch.device(device))


def cost(case: Case) -> dict[str, Cost]:
    """Forward reads x and writes y; backward reads dy and x and writes dx.

    The statistics (8 bytes a row) and the parameters are left out. FLOPs an element: mean,
    variance, normalisation, affine 8; twice that in backward.
    """
    elements = case.rows * case.d_model
    size = case.dtype.itemsize
    return {
        "forward": Cost(8 * elements, 2 * size * elements),
        "backward": Cost(16 * elements, 3 * size * elements),
    }


CASES = {
    "cpu": (
        Case(8, 128, 384, quick=True),
        Case(8, 128, 768),
    ),
    "cuda": (
        Case(32, 512, 768, precision="bf16"),
        Case(32, 512, 1024, precision="bf16", quick=True),
        Case(32, 512, 2048, precision="bf16"),
        Case(32, 512, 4096, precision="bf16"),
        Case(32, 512, 1024, precision="autocast"),
    ),
}

OP = Op(
    name="layer_norm",
    cases=CASES,
    providers=(
        *with_compiled(Provider("eager", LayerNorm)),
        Provider("liger", LigerLayerNorm, why_not=why_not_liger),
        *with_compiled(Provider("fastattn", FastattnLayerNorm)),
        Provider("fastattn triton", FastattnTriton, why_not=why_not_triton),
    ),
    inputs=lambda case: {"input": (case.batch, case.sequence, case.d_model)},
    cost=cost,
)
