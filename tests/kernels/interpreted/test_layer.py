"""A layer on Triton kernels throughout: what it keeps for backward, and what its levels change."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import FusedEncoderLayer, use_backend
from tests import helpers
from tests.layers.pairs import assert_as_exact, gradients

D, HEADS, LENGTH = 32, 2, 8
STATISTICS = 4 * HEADS  # of attention, a token


def layers_of(count: int, activation: str, dtype: torch.dtype, **options: Any) -> list:
    sizes = {"d_model": D, "nhead": HEADS, "dim_feedforward": 4 * D, "dropout": 0.1}
    options = {"activation": activation, "batch_first": True, "dtype": dtype, **options}
    return [FusedEncoderLayer(**sizes, **options) for _ in range(count)]


def bytes_a_token(save: str, activation: str, dtype: torch.dtype, **options: Any) -> float:
    """What one more layer of a stack keeps for one more token."""
    layers = layers_of(2, activation, dtype, save=save, **options)

    def kept(count: int, batch: int) -> int:
        src = torch.randn(batch, LENGTH, D, dtype=dtype)

        def run() -> Tensor:
            x = src
            for layer in layers[:count]:
                x = layer(x)
            return x

        return helpers.saved_bytes(run)

    with use_backend("triton"):
        larger, smaller = (kept(2, batch) - kept(1, batch) for batch in (3, 1))
    return (larger - smaller) / (2 * LENGTH)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    ("save", "widths", "norms"), [("default", 24, 16), ("lean", 20, 8), ("recompute", 12, 8)]
)
def test_what_a_layer_keeps_in_16_bits(save, widths, norms, activation) -> None:
    """In multiples of d_model bytes; deviations and, by default, means of two norms."""
    found = bytes_a_token(save, activation, torch.float16)
    assert found == widths * D + STATISTICS + norms


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    ("save", "norm_first", "widths", "norms"),
    [
        ("default", False, 28, 16),
        ("lean", False, 22, 8),
        ("recompute", False, 14, 8),
        ("default", True, 28, 16),
        ("lean", True, 20, 8),
        ("recompute", True, 12, 8),
    ],
)
def test_what_a_layer_keeps_under_autocast(save, norm_first, widths, norms, activation) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = bytes_a_token(save, activation, torch.float32, norm_first=norm_first)
    assert found == widths * D + STATISTICS + norms


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("backend", ["triton", "triton_gemm"])
@pytest.mark.parametrize("low", [False, True])
def test_levels_change_no_result(backend: str, activation: str, low: bool) -> None:
    (layer,) = layers_of(1, activation, torch.float32)
    src, seed = torch.randn(2, LENGTH, D), torch.tensor([2**62 + 7])
    with use_backend("pytorch"):
        exact = gradients(copy.deepcopy(layer).double(), src.double(), seed=seed)
    context = torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext()
    results = {}
    with use_backend("triton"), use_backend(feed_forward=backend), context:
        for save, chunk_tokens in (("lean", None), ("recompute", None), ("recompute", 6)):
            layer.save, layer.chunk_tokens = save, chunk_tokens
            results[save, chunk_tokens] = gradients(layer, src, seed=seed)
    lean, recompute, chunked = results.values()
    helpers.assert_same(recompute, lean)
    assert_as_exact(chunked, recompute, exact)
