"""An encoder layer so small that the suite measures it in no time, and layers that are wrong."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import nn

from benchmarks.cases import Case, Op, Provider
from benchmarks.ops import OPS, encoder_layer

TINY = Case(2, 8, 16, 2, quick=True)
EAGER = ("stock", "fastattn")


def provider_of(name: str, layer_class: type[nn.TransformerEncoderLayer]) -> Provider:
    return Provider(name, functools.partial(encoder_layer.build, layer_class))


# In place of fastattn what stock computes, bit for bit: at sizes this small the largest rounding
# error of one sound layer is now and then twice another's, on one kind of CPU and not on the next.
FUSED = provider_of("fastattn", nn.TransformerEncoderLayer)
LAYER = replace(
    OPS["encoder_layer"],
    providers=tuple(FUSED if p.name == FUSED.name else p for p in OPS["encoder_layer"].providers),
)
STOCK = LAYER.baseline


def op_with(*providers: Provider, **options) -> Op:
    return replace(LAYER, providers=(STOCK, *providers), **options)


class WrongGradient(nn.TransformerEncoderLayer):
    """Right outputs, but the gradient of the input is 1 % too large."""

    def forward(self, src, *args, **kwargs):
        doubled = src * 1.01
        return super().forward(doubled + (src - doubled).detach(), *args, **kwargs)


class WrongOutput(nn.TransformerEncoderLayer):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) + 1e-4


class NotANumber(nn.TransformerEncoderLayer):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * torch.nan


class OutOfOrder(nn.TransformerEncoderLayer):
    def forward(self, *args, **kwargs):
        raise RuntimeError("no kernel for this device\nand a long tail")


class Lost(nn.TransformerEncoderLayer):
    def forward(self, *args, **kwargs):
        raise torch.AcceleratorError("the device fell off the bus")
