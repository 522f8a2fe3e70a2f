"""``FusedLayerNorm``: torch's layer norm, run through the library's op."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.ops._checks import check_save
from fastattn.ops.layer_norm import SAVE_LEVELS, layer_norm, why_not_from_output

__all__ = ["FusedLayerNorm"]


class FusedLayerNorm(nn.LayerNorm):
    """A drop-in ``torch.nn.LayerNorm``: the same constructor, ``state_dict`` and results.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in the parent class.
        save: what backward keeps: ``"input"``, or ``"output"``, which costs no memory where a
            linear layer that follows keeps it anyway. Backward from the result divides by the
            weight; whether weight and bias allow that is checked where it is selected and after
            ``load_state_dict``, not in every forward. Weights that come close to zero later give
            wrong gradients: assign ``save`` again to have them checked.

    Raises:
        ValueError: ``save`` is none of these.
        RuntimeError: the input does not end with ``normalized_shape``, in torch's words.
    """

    _save = "input"
    #: Whether backward starts from the result: as asked for, where the weights allowed it.
    keeps_output = False

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        save: str = "input",
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.save = save

    @property
    def save(self) -> str:
        """What backward keeps. Assigning ``"output"`` raises where the weights forbid it."""
        return self._save

    @save.setter
    def save(self, level: str) -> None:
        check_save(level, SAVE_LEVELS)
        reason = why_not_from_output(self.weight, self.bias) if level == "output" else None
        if reason is not None:
            raise ValueError(f'save must be "input", not "output": {reason}')
        self._save, self.keeps_output = level, level == "output"

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input``, (..., *normalized_shape)."""
        shape = self.normalized_shape
        if tuple(input.shape[input.dim() - len(shape) :]) != shape or input.dim() < len(shape):
            raise RuntimeError(
                f"Given normalized_shape={list(shape)}, expected input with shape "
                f"{['*', *shape]}, but got input of size{list(input.shape)}".replace("'", "")
            )
        rows = input if len(shape) == 1 else input.flatten(-len(shape))
        weight, bias = (
            x if x is None or len(shape) == 1 else x.flatten() for x in (self.weight, self.bias)
        )
        save = "output" if self.keeps_output else "input"
        return layer_norm(rows, weight, bias, self.eps, save=save).view(input.shape)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.save == "input" else f"{text}, save={self.save!r}"

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        if self.save == "output":
            reason = why_not_from_output(self.weight, self.bias)
            self.keeps_output = reason is None
            if reason is not None:
                warnings.warn(f"backward keeps the input of a norm: {reason}", stacklevel=2)
