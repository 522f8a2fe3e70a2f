"""The Triton kernels of layer norm and of the residual sum: programs, tiles, accesses, memory.

What they compute is checked in tests/ops, as that of every backend.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.arguments import NormArguments, TokenDropout
from fastattn.kernels import column_sums
from fastattn.kernels import layer_norm as kernels
from tests import helpers
from tests.kernels.interpreted.sanitizer import Sanitizer
from tests.ops.backends import Backend
from tests.ops.norms import (
    LAYOUTS,
    P,
    bf16,
    check_fused,
    check_sum,
    dropping,
    fp16,
    fp32,
    fp64,
    make_inputs,
)

TRITON = Backend("triton", "interpreted")
NO_NORM = NormArguments(None, None, 1e-5, fp32)
EVERYTHING = (True,) * 5

dropout_add = partial(fastattn.dropout_add, backend="triton")
layer_norm = partial(fastattn.layer_norm, backend="triton")
fused = partial(fastattn.dropout_add_layer_norm, backend="triton")


@pytest.fixture(params=["in registers", "in chunks"])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of rows that stay in registers, and of rows that go through the kernels for wide ones."""
    if request.param == "in registers":
        return 40
    monkeypatch.setattr(kernels, "WHOLE_ROW", 0)
    monkeypatch.setattr(kernels, "WIDE_LANES", 32)
    return 600  # in three chunks, the last not full


def dropout_of(**options) -> TokenDropout:
    return TokenDropout(**dropping(), **options)


# ------------------------------------------------------------------------------ programs and rows


def test_accuracy_of_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 1)
    for shape in ((101, 96), (7, 1024), (3, 8200)):
        check_fused(TRITON, make_inputs(shape))
        check_sum(TRITON, make_inputs(shape))


def test_accuracy_of_more_programs_than_are_summed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 1)
    monkeypatch.setattr(column_sums, "TILE_BYTES", 2 * 32 * 4)  # of two rows; there are three
    check_fused(TRITON, make_inputs((101, 96)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("save", ["sum", "output"])
def test_gradients_may_have_any_layout(layout: str, save: str) -> None:
    x, norm, statistics = normalised((3, 5, 40), fp32)
    saved = x if save == "sum" else kernels.layer_norm_forward(x, norm)[0]
    flows = [torch.randn(3, 5, 40) for _ in range(3)]
    strange = [LAYOUTS[layout](g) for g in flows]
    saved = LAYOUTS[layout](saved) if layout != "one row for all" else saved
    expected, found = (
        kernels.dropout_add_layer_norm_backward(
            *(g.contiguous() for g in strange) if i else strange,
            saved.contiguous() if i else saved,
            *statistics, norm, fp32, fp32, dropout_of(row_period=5), save, EVERYTHING,
        )
        for i in range(2)
    )  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def normalised(
    shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, NormArguments, tuple[Tensor, Tensor]]:
    """An input, its norm (of weights away from zero) and its statistics."""
    x = torch.randn(shape).to(dtype)
    weight, bias = (torch.rand(shape[-1]) + 0.5).to(dtype), torch.randn(shape[-1]).to(dtype)
    norm = NormArguments(weight, bias, 1e-5, dtype)
    _, mean, rstd = kernels.layer_norm_forward(x, norm)
    return x, norm, (mean, rstd)


def test_statistics(columns: int) -> None:
    x = torch.randn(2, 3, columns, dtype=bf16) + 2
    out, mean, rstd = kernels.layer_norm_forward(x, NO_NORM)
    assert out.dtype == mean.dtype == rstd.dtype == fp32
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean(-1), rtol=1e-6, atol=1e-6)
    deviation = (exact.var(-1, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(rstd.double(), 1 / deviation, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------ memory and tiles


def test_every_element_is_written(columns: int, sanitizer: Sanitizer) -> None:
    inputs = make_inputs((9, columns))
    dropout = dropout_of(row_period=9)
    norm = NormArguments(inputs["weight"], inputs["bias"], 1e-5, fp32)
    branch = (inputs["input"], inputs["input_bias"], inputs["residual"])
    results = kernels.dropout_add_layer_norm_forward(*branch, norm, dropout, fp16, True)
    sanitizer.assert_written(*results, kernels.dropout_add_forward(*branch, dropout))
    x = inputs["residual"]
    for grad_out in (x, None):
        sanitizer.assert_written(
            *kernels.dropout_add_layer_norm_backward(
                grad_out, x, None, x, *results[3:], norm, fp32, fp32, dropout, "sum", EVERYTHING
            )[: 5 if grad_out is x else 3]
        )
    sanitizer.assert_written(*kernels.dropout_add_backward(x, fp32, dropout, (True, True)))


def test_sums_over_rows_are_equal_bit_for_bit(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one order, and no atomics."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 1)
    x, norm, statistics = normalised((101 if columns == 40 else 11, columns), fp32)
    call = partial(
        kernels.dropout_add_layer_norm_backward, x.flip(1), None, None, x, *statistics, norm, fp32,
        fp32, dropout_of(row_period=4), "sum", EVERYTHING,
    )  # fmt: skip
    for a, b in zip(call(), call(), strict=True):
        assert torch.equal(a, b)


def test_rows_beyond_two_to_the_31st_element() -> None:
    """4 GiB of address space, of which only the pages of the three rows are ever touched."""
    far = torch.empty_strided((3, 16), (2**30, 1), dtype=fp16)
    far.copy_(torch.randn(3, 16))
    near, dropout = far.contiguous(), dropout_of(row_period=3)
    norm = NO_NORM._replace(out_dtype=fp16)
    for x, y in ((far, near), (near, far)):
        found = kernels.dropout_add_layer_norm_forward(x, None, y, norm, dropout, None, True)
        expected = kernels.dropout_add_layer_norm_forward(
            near, None, near, norm, dropout, None, True
        )
        gradients = kernels.dropout_add_layer_norm_backward(
            x, y, None, y, *found[3:], norm, fp16, fp16, dropout, "sum", (*[True] * 3, False, False)
        )
        expected_gradients = kernels.dropout_add_layer_norm_backward(
            near, near, None, near, *found[3:], norm, fp16, fp16, dropout, "sum",
            (*[True] * 3, False, False),
        )  # fmt: skip
        for a, b in zip((*found, *gradients), (*expected, *expected_gradients), strict=True):
            assert a is b is None or torch.equal(a, b)
    assert torch.equal(
        kernels.dropout_add_forward(far, None, far, dropout),
        kernels.dropout_add_forward(near, None, near, dropout),
    )


def rows_on_meta(columns: int, dtype: torch.dtype, rows: int = 8) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


TILES = {
    "forward": lambda x: kernels._tile(x.shape, 5, 4, 4, (x,)),
    "backward": lambda x: kernels._tile(x.shape, 3, 4, 2, (x,)),
    "wide": lambda x: kernels._tile_of(x.shape, kernels.WIDE_LANES, 1, 1, (x,)),
    "chunk": lambda x: kernels._chunk_tile(x.shape, 8, (x,)),
}


@pytest.mark.parametrize("kind", TILES)
@pytest.mark.parametrize("columns", [1, 8, 40, 64, 100, 768, 1000, 1024, 3072, 5120, 8192, 2**18])
def test_tiles_cover_a_row_and_fit_a_block(kind: str, columns: int) -> None:
    if kind in ("forward", "backward") and columns > kernels.WHOLE_ROW:
        return
    for dtype in helpers.DTYPES:
        tile, num_warps = TILES[kind](rows_on_meta(columns, dtype))
        assert 8 * tile.LANES * (tile.CHUNKS - 1) < columns <= 8 * tile.LANES * tile.CHUNKS
        assert tile.LANES * tile.ROWS % (32 * num_warps) == 0 and num_warps <= 16
        assert tile.EVEN_ROWS == (8 % tile.ROWS == 0)
        assert tile.CHUNKS <= 65535
        registers = kernels._backward_registers((tile, num_warps), dtype, from_output=False)
        assert 32 * num_warps * registers <= 65536 and registers >= 128


@pytest.mark.parametrize(
    ("columns", "dtype", "width"),
    [
        (1024, bf16, 8), (1000, bf16, 8), (1004, bf16, 4), (1002, bf16, 2), (1001, bf16, 1),
        (1024, fp32, 4), (1001, fp32, 1), (1024, fp64, 2),
    ],
)  # fmt: skip
def test_accesses_are_16_bytes_wide_where_rows_are_aligned(columns, dtype, width) -> None:
    assert kernels._width((rows_on_meta(columns, dtype), None)) == width
    assert kernels._width((rows_on_meta(columns, bf16), rows_on_meta(columns, dtype))) == width
    wider = rows_on_meta(columns + 8, dtype)[:, :columns]
    assert kernels._width((wider, rows_on_meta(columns, dtype))) == width


def test_rows_that_are_not_aligned_are_read_element_by_element() -> None:
    x = torch.zeros(129)
    assert kernels._width((x[1:].view(2, 64),)) == 1
    assert kernels._width((x[:128].view(2, 64), x[1:].view(2, 64))) == 1


# ---------------------------------------------------------------------------------- registration


@pytest.mark.parametrize("op", ["layer_norm", "dropout_add_layer_norm", "dropout_add"])
def test_registration(op: str) -> None:
    x, residual = torch.randn(3, 5, 40).transpose(0, 1), torch.randn(5, 3, 40)
    vector, statistic = torch.rand(40) + 0.5, torch.rand(5, 3)
    affine, dropout = (vector, vector, 1e-5, fp32), dropout_of(row_period=3)
    forwards = {
        "layer_norm": (x, *affine, "triton"),
        "dropout_add_layer_norm": (x, vector, residual, *affine, *dropout, bf16, True, "triton"),
        "dropout_add": (x, vector, residual, *dropout, "triton"),
    }
    statistics = (statistic, statistic, *affine)
    backwards = {
        "layer_norm": (x, x, *statistics, x.dtype, "input", "triton", [True] * 3),
        "dropout_add_layer_norm": (
            x, x, residual, x, *statistics, fp16, fp32, *dropout, "output", "triton", [True] * 5
        ),
        "dropout_add": (x, fp16, *dropout, "triton", [True] * 2),
    }  # fmt: skip
    helpers.assert_registered(f"{op}_fwd", forwards[op])
    helpers.assert_registered(f"{op}_bwd", backwards[op])


def test_fake_tensors_agree() -> None:
    def run(x: Tensor, residual: Tensor, weight: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        out = fused(x, residual, weight, dropout_p=P, seed=seed, return_sum=True, copy_dtype=fp16)
        return (*out, dropout_add(x, residual, dropout_p=P, seed=seed), layer_norm(x, weight))

    x = torch.randn(5, 3, 8).transpose(0, 1)
    helpers.assert_fakes_agree(run, x, torch.randn(3, 5, 8), torch.rand(8))
