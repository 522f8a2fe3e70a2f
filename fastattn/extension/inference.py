"""What lies between an encoder layer's matrix products, in one pass of the C++ extension."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.extension.loading import available, loaded
from fastattn.tracing import opaque


def runs_inference(*tensors: Tensor | None) -> bool:
    """Whether the extension is there and all these are contiguous fp32 tensors on the CPU."""
    return available() and all(
        x is None or (x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous())
        for x in tensors
    )


@opaque
def add_bias_relu_(x: Tensor, bias: Tensor | None) -> Tensor:
    """max(x + bias, 0) in place, in one pass.

    Args:
        x: (..., N), of which :func:`runs_inference` is true.
        bias: (N,), likewise, or None.
    """
    extension = loaded()
    _check_inference(x, bias)
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    extension.add_bias_relu(x.data_ptr(), _address(bias), rows, columns, torch.get_num_threads())
    return x


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check_inference(x: Tensor, bias: Tensor | None) -> None:
    columns = x.shape[-1:]
    if bias is not None and bias.shape != columns:
        raise ValueError(f"bias must be of shape {tuple(columns)}, but got {tuple(bias.shape)}")
    if not runs_inference(x, bias):
        raise ValueError("x and bias must be contiguous fp32 tensors on the CPU")
