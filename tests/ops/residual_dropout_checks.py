"""Which elements ``dropout_add`` and ``dropout_add_layer_norm`` drop, on every backend of theirs.

Bit for bit those of the contract, forward and backward.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastattn import dropout_add, dropout_add_layer_norm, layer_norm
from tests import helpers, reference
from tests.ops.any_call import PROBABILITIES, SEEDS, SITES, TOKENS, drawn, with_edges
from tests.ops.backends import Backend, few_kernels
from tests.ops.norms import (
    COMPILED_COLUMNS,
    SEED,
    SITE,
    WIDTHS,
    P,
    bf16,
    dropping,
    fp16,
    fp32,
    fp64,
    keep_of,
    make_inputs,
    needs_float64,
    of_norm,
    seed_tensor,
    without_norm,
)

OPS = ("dropout_add_layer_norm", "dropout_add", "layer_norm")


def assert_kept(backend: Backend, keep: Tensor, dtype=fp32, **options: Any) -> None:
    """Both ops, forward and backward, keep exactly these elements, and scale them exactly.

    Beside zeros, so that the sum and its gradient are the factors themselves. Nothing flows in
    through the norm.
    """
    options = dropping(**options)
    ones, zeros = torch.ones(keep.shape, dtype=dtype), torch.zeros(keep.shape, dtype=dtype)
    vector = zeros.new_zeros(keep.shape[-1])
    inputs = {"input": ones, "residual": zeros, "input_bias": vector}
    alone = helpers.results_of(backend.of(dropout_add, **options), inputs, None, [ones])
    fused = backend.of(dropout_add_layer_norm, return_sum=True, **options)
    affine = {"weight": vector + 1, "bias": vector}
    normed = helpers.results_of(fused, {**inputs, **affine}, None, [zeros, ones])
    expected = reference.factor(keep, options["dropout_p"]).to(dtype)
    for found in (
        alone["output 0"], alone["gradient of input"],
        normed["output 1"], normed["gradient of input"],
    ):  # fmt: skip
        assert torch.equal(found, expected)
    assert torch.equal(normed["gradient of residual"], ones)


def contract(
    position: Tensor, sequence: Tensor, columns: int, *, seed: int = SEED, site: int = SITE,
    p: float = P,
) -> Tensor:  # fmt: skip
    return reference.residual_keep(seed, site, p, position, sequence, torch.arange(columns))


@pytest.mark.parametrize(("shape", "dtype"), [*WIDTHS, ((130, 8), fp16), ((1, 1), fp32)], ids=str)
def test_decisions_of_widths(backend: Backend, shape: tuple[int, int], dtype) -> None:
    few_kernels(backend, shape[1] in COMPILED_COLUMNS and shape[0] > 1)
    assert_kept(backend, keep_of(shape), dtype)


@pytest.mark.parametrize(
    ("columns", "dtype"),
    [(64, fp64), (100, bf16), (66, fp16), (65, bf16), (100, fp32), (66, fp32)],
    ids=str,
)
def test_decisions_do_not_depend_on_the_dtype(backend: Backend, columns: int, dtype) -> None:
    """Nor on how many elements one access takes."""
    if dtype == fp64:
        needs_float64(backend)
    few_kernels(backend, columns == 66)
    assert_kept(backend, keep_of((4, columns)), dtype)


@pytest.mark.parametrize("batch_first", [True, False])
def test_decisions_of_row_maps(backend: Backend, batch_first: bool) -> None:
    """Whole batches, one sequence, and a part of the rows in any order."""
    for shape in ((3, 17, 40), (7, 40)):
        keep = keep_of(shape, batch_first=batch_first).view(shape)
        assert_kept(backend, keep, batch_first=batch_first)
    keep = keep_of((3, 17, 40), batch_first=batch_first)
    index = torch.randperm(51)[:30]
    packed = {"row_index": index.int(), "row_period": 17, "batch_first": batch_first}
    assert_kept(backend, keep[index], **packed)
    assert_kept(backend, keep[index].view(5, 6, 40), **packed)


def test_a_strided_row_index(backend: Backend) -> None:
    index = torch.arange(40).flip(0).int()
    strided = index.repeat_interleave(3)[::3]
    assert_kept(backend, keep_of((40, 40))[index.long()], row_index=strided, row_period=40)


def test_rows_far_into_a_batch(backend: Backend) -> None:
    index, period = torch.arange(7) + (2**31 - 20), 2**31 - 9
    keep = contract(index % period, index // period, 40)
    assert_kept(backend, keep, row_index=index.int(), row_period=period)


@with_edges(tokens=(4, 5), columns=40, batch_first=True)
@drawn(
    seed=SEEDS, site=SITES, p=PROBABILITIES, tokens=TOKENS,
    columns=st.integers(1, 200), batch_first=st.booleans(),
)  # fmt: skip
def test_decisions_of_any_call(
    backend: Backend, seed: int, site: int, p: float, tokens: tuple[int, int], columns: int,
    batch_first: bool,
) -> None:  # fmt: skip
    columns = 40 if backend.compiles else columns  # which kernels are compiled for
    keep = contract(*reference.coordinates(tokens, batch_first), columns, seed=seed, site=site, p=p)
    options = {"seed": seed_tensor(seed), "site": site, "dropout_p": p, "batch_first": batch_first}
    assert_kept(backend, keep.view(*tokens, columns), **options)


def test_the_threshold_is_exact(backend: Backend) -> None:
    """With this seed there are lanes on both sides of the smallest step of a probability."""

    def keep(n: int) -> Tensor:
        rows = reference.coordinates((4, 5))
        return contract(*rows, 40, seed=78, site=8, p=n / 2**14).view(4, 5, 40)

    assert not any(torch.equal(keep(n), keep(2**13)) for n in (2**13 - 1, 2**13 + 1))
    assert_kept(backend, keep(2**13), seed=seed_tensor(78), site=8, dropout_p=0.5)


def test_a_probability_that_rounds_to_zero_drops_nothing(backend: Backend) -> None:
    inputs = make_inputs()
    for op, tensors in ((dropout_add, without_norm(inputs)), (dropout_add_layer_norm, inputs)):
        tiny, none = (backend.of(op, **dropping(p)) for p in (3e-5, 0.0))
        helpers.assert_same(helpers.results_of(tiny, tensors), helpers.results_of(none, tensors))


def test_everything_dropped_leaves_the_residual(backend: Backend) -> None:
    inputs = make_inputs()
    alone = helpers.results_of(backend.of(dropout_add, **dropping(1.0)), without_norm(inputs))
    fused = helpers.results_of(backend.of(dropout_add_layer_norm, **dropping(1.0)), inputs)
    norm = backend.of(layer_norm)(**of_norm({**inputs, "input": inputs["residual"]}))
    assert torch.equal(alone["output 0"], inputs["residual"])
    assert torch.equal(fused["output 0"], norm)
    for name in ("gradient of input", "gradient of input_bias"):
        assert (alone[name] == 0).all() and (fused[name] == 0).all()
