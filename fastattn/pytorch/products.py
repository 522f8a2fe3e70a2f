"""Linear maps, out of autograd's sight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` out of autograd's sight.

    On a CPU a bias added in place costs one pass over the result; ``addmm`` writes it there first
    and reads it back.
    """
    if bias is not None and _adds_bias_in_place(input):
        return F.linear(input, weight).add_(bias)
    return F.linear(input, weight, bias)


def _adds_bias_in_place(input: Tensor) -> bool:
    exact = input.dtype in (torch.float32, torch.float64)
    return exact and input.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def product(
    input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """``linear`` of (tokens, d), into ``out`` where given."""
    if (
        out is not None
        and torch.is_grad_enabled()
        and (input.requires_grad or weight.requires_grad)
    ):
        return out.copy_(product(input, weight, bias))  # an exported op, which autograd looks into
    if bias is not None and not _adds_bias_in_place(input):
        return torch.addmm(bias, input, weight.t(), out=out)
    result = torch.mm(input, weight.t(), out=out)
    return result if bias is None else result.add_(bias)
