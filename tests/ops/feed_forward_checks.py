"""Inputs of the feed-forward block, and its comparison with float64, for every backend."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import feed_forward
from tests import helpers, reference

P = 0.125
SEED = 2**62 + 54321
SITE = 5
EAGER = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda x: x,
}


def seed_tensor(seed: int = SEED) -> Tensor:
    return torch.tensor([seed])


def make_inputs(
    shape: tuple[int, ...] = (3, 63, 40),
    d_ff: int = 127,
    d_out: int = 24,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    d = shape[-1]
    inputs = {
        "input": torch.randn(shape),
        "weight1": torch.randn(d_ff, d) / max(d, 1) ** 0.5,
        "bias1": torch.randn(d_ff),
        "weight2": torch.randn(d_out, d_ff) / d_ff**0.5,
        "bias2": torch.randn(d_out),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def keep_of(
    shape: tuple[int, ...], columns: int, p: float, batch_first: bool = True, offset: int = 0
) -> Tensor:
    """(rows, columns) bool: what the contract keeps of the hidden features of ``shape`` tokens."""
    where = reference.coordinates(shape[:-1] or (1,), batch_first)
    return reference.activation_keep(SEED, SITE, p, *where, torch.arange(columns) + offset)


def drop(hidden: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """Eager dropout with given decisions, scaled in full precision as fused kernels do."""
    return hidden if keep is None else hidden * keep.view(hidden.shape) * (1 / (1 - p))


def eager_feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str,
    keep: Tensor | None,
    dropout_p: float,
) -> Tensor:
    hidden = EAGER[activation](F.linear(input, weight1, bias1))
    return F.linear(drop(hidden, keep, dropout_p), weight2, bias2)


def check(
    inputs: dict[str, Tensor | None],
    dropout_p: float = 0.0,
    activation: str = "relu",
    batch_first: bool = True,
    **options: Any,
) -> None:
    columns = inputs["weight1"].shape[0]
    keep = multiplier = None
    if dropout_p:
        keep = keep_of(inputs["input"].shape, columns, dropout_p, batch_first)
        multiplier = reference.factor(keep, dropout_p)
    ours = partial(
        feed_forward,
        activation=activation,
        dropout_p=dropout_p,
        seed=seed_tensor(),
        site=SITE,
        batch_first=batch_first,
        **options,
    )
    eager = partial(eager_feed_forward, activation=activation, keep=keep, dropout_p=dropout_p)
    oracle = partial(reference.feed_forward, activation=activation, multiplier=multiplier)
    helpers.assert_as_accurate_as_eager(ours, eager, oracle, inputs)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one row for all": lambda x: x[:1, :1].expand_as(x),
}
