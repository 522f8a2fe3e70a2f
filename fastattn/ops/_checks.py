"""What an op's arguments must be; errors name the argument, what came and what was expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import tracing
from fastattn.arguments import TokenDropout
from fastattn.dropout import check_seed, check_site


def token_dropout(
    input: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    row_index: Tensor | None,
    row_period: int | None,
    batch_first: bool,
    column_offset: int = 0,
) -> TokenDropout:
    """Check a token-wise op's row map and fill in its default period, ``input.shape[-2]``.

    An input of two dimensions is one sequence, whichever dimension comes first in batches.
    """
    if row_index is not None:
        rows = (input.shape[:-1].numel(),)
        if row_index.dtype != torch.int32 or row_index.shape != rows:
            got = f"{tuple(row_index.shape)} {row_index.dtype}"
            raise mismatch("row_index", f"{rows} torch.int32", got)
        check_device("row_index", row_index, input)
        row_index = row_index.contiguous()
        if row_period is None:
            raise mismatch("row_period", "given with row_index", None)
    if row_period is not None and not 0 <= row_period < 2**32:
        raise mismatch("row_period", "from 0 to 2**32 - 1", row_period)
    if column_offset < 0:
        raise mismatch("column_offset", "at least 0", column_offset)
    if row_period is None:
        batched = input.dim() > 2
        row_period = input.shape[-2] if batched or (batch_first and input.dim() == 2) else 1
    return TokenDropout(dropout_p, seed, site, row_index, row_period, batch_first, column_offset)


def mismatch(argument: str, expected: str, got: Any) -> ValueError:
    """The error for an argument that does not fit, to raise."""
    if isinstance(got, torch.Size):
        got = tuple(got)
    return ValueError(f"{argument} must be {expected}, but got {got}")


def check_rows(input: Tensor) -> None:
    """Raise unless ``input`` is floating point with a last dimension, its columns."""
    if input.dim() < 1 or not input.is_floating_point():
        raise mismatch("input", "at least 1-D floating point", f"{input.dim()}-D {input.dtype}")


def check_vector(name: str, vector: Tensor | None, input: Tensor) -> None:
    """Raise unless ``vector`` is None or has one number for each column of ``input``."""
    if vector is None:
        return
    if vector.dim() != 1 or vector.shape[0] != input.shape[-1]:
        raise mismatch(name, f"of shape {tuple(input.shape[-1:])}", vector.shape)
    check_floating(name, vector.dtype)
    check_device(name, vector, input)


def check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    """Raise unless ``tensor`` is on the device of ``input``: kernels get addresses."""
    if tensor.device != input.device:
        raise mismatch(name, f"on {input.device}, as input is", tensor.device)


def values_of(tensor: Tensor) -> list[Any] | None:
    """The numbers of a small tensor; None where they are not known or reading them would cost.

    That is on a GPU, where it waits for the device, and while anything follows the calls.
    """
    if torch.compiler.is_compiling() or tracing.watched():
        return None
    if type(tensor) is not Tensor or not tensor.is_cpu:
        return None
    return tensor.tolist()


def check_floating(name: str, dtype: torch.dtype | None) -> None:
    """Raise unless ``dtype``, of or for what ``name`` names, is None or floating point."""
    if dtype is not None and not dtype.is_floating_point:
        raise mismatch(name, "floating point", dtype)


def check_save(save: str, levels: tuple[str, ...]) -> None:
    """Raise unless ``save`` is one of ``levels``."""
    if save not in levels:
        raise mismatch("save", f"one of {levels}", repr(save))


def check_dropout(dropout_p: float, seed: Tensor | None, site: int, input: Tensor) -> None:
    """Raise unless ``dropout_p`` is a probability and its decisions are well defined."""
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a number, not {type(dropout_p).__name__}")
    check_site(site)
    if not 0.0 <= dropout_p <= 1.0:
        raise mismatch("dropout_p", "between 0 and 1", dropout_p)
    if seed is not None:
        check_seed(seed)
        check_device("seed", seed, input)
    elif dropout_p > 0.0:
        raise ValueError("seed must be given where dropout_p > 0; see fastattn.dropout.draw_seed")
