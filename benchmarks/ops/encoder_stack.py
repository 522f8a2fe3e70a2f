"""Twelve layers: `nn.TransformerEncoder` of stock or fastattn, or a loop over hand-written ones."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from ..cases import Case, Mode, Op
from . import encoder_layer


class HandWrittenStack(nn.Module):
    """A loop over copies of a layer, which is what `nn.TransformerEncoder` begins with too."""

    def __init__(self, layer: nn.Module, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(layers))

    def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            src = layer(src, src_key_padding_mask)
        return src


def build(layer_class: type[nn.TransformerEncoderLayer], case: Case) -> nn.Module:
    hand_written = layer_class is encoder_layer.HandWrittenLayer
    stack = HandWrittenStack if hand_written else nn.TransformerEncoder
    return stack(encoder_layer.build(layer_class, case), case.layers)


def why_not_captured(case: Case, mode: Mode) -> str | None:
    if case.padding and not mode.training:
        return "nn.TransformerEncoder packs padded batches on the host in inference"
    return None


OP = Op(
    name="encoder_stack",
    cases={
        "cpu": (Case(4, 128, 128, 4, layers=12),),
        "cuda": (
            Case(32, 512, 768, 12, "bf16", layers=12),  # BERT-base
            Case(32, 512, 768, 12, "bf16", padding=0.5, layers=12, quick=True),
            Case(16, 512, 1024, 16, "bf16", layers=12),
            Case(32, 512, 768, 12, "autocast", layers=12),
            Case(8, 128, 768, 12, "bf16", layers=12),
        ),
    },
    providers=encoder_layer.providers(build),
    inputs=encoder_layer.inputs,
    cost=encoder_layer.cost,
    masks=encoder_layer.masks,
    trains=True,
    why_not_captured=why_not_captured,
)
