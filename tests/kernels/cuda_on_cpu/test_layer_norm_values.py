"""What the norm kernels compute: values of every type and width, with and without dropout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.cuda_on_cpu.layer_norm_calls import (
    DROPS,
    Call,
    Dropout,
    backward,
    check,
    dropout_tuple,
    eager,
    forward,
    make_inputs,
)
from tests.kernels.cuda_on_cpu.machine import Machine
from tests.kernels.cuda_on_cpu.poisoned_memory import Memory, address, rows_of, vector_of

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("x", "residual"), [(f32, f32), (f16, f16), (bf16, bf16), (f16, f32), (bf16, f32), (f32, bf16)]
)
@pytest.mark.parametrize("vectors", [f32, f16, bf16], ids=lambda dtype: f"vectors {dtype}")
@pytest.mark.parametrize("columns", [264, 63])
def test_types(
    machine: Machine, x: torch.dtype, residual: torch.dtype, vectors: torch.dtype, columns: int
) -> None:
    check(machine, Call(dropout=DROPS), make_inputs(9, columns, x, residual, vectors))


@pytest.mark.parametrize(
    ("x", "residual", "out", "copy"),
    [
        (bf16, bf16, f32, bf16),
        (f16, f16, f32, f16),
        (f32, f32, bf16, None),
        (f32, f32, f16, None),
        (f32, f32, f32, bf16),
        (f32, f32, f32, f16),
        (bf16, f32, f32, bf16),
        (bf16, f32, bf16, None),
        (f16, f32, f16, None),
        (bf16, bf16, bf16, f32),
        (bf16, bf16, f16, None),
    ],
)
def test_types_of_results(
    machine: Machine,
    x: torch.dtype,
    residual: torch.dtype,
    out: torch.dtype,
    copy: torch.dtype | None,
) -> None:
    call = Call(dropout=DROPS, out_dtype=out, copy_dtype=copy)
    check(machine, call, make_inputs(9, 264, x, residual, f32))


WIDTHS = (1, 7, 8, 63, 256, 264, 768, 1000, 1024, 1032, 2048, 3072, 4096, 8192, 8200)


@pytest.mark.parametrize(
    ("columns", "dtype"),
    [
        *((columns, dtype) for columns in WIDTHS for dtype in (f32, bf16)),
        *((16384, bf16), (65535, bf16), (65536, f32)),
    ],
)
def test_widths(machine: Machine, columns: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(11 if columns < 2048 else 2, columns, dtype)
    if columns == 1:
        inputs["weight"] = None  # its gradient would be rounding and nothing else
    check(machine, Call(dropout=DROPS), inputs)


@pytest.mark.parametrize("columns", [264, 265])
@pytest.mark.parametrize(
    "absent",
    [
        ("x_bias",),
        ("weight",),
        ("bias",),
        ("weight", "bias"),
        ("residual",),
        ("residual", "x_bias"),
        ("residual", "x_bias", "weight", "bias"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("dropout", [None, DROPS], ids=["kept", "dropped"])
def test_absent_tensors(
    machine: Machine, absent: tuple[str, ...], dropout: Dropout | None, columns: int
) -> None:
    inputs = make_inputs(9, columns)
    inputs.update(dict.fromkeys(absent))
    check(machine, Call(dropout=dropout, returns_sum="residual" not in absent), inputs)


@pytest.mark.parametrize("columns", [264, 265, 8200])
@pytest.mark.parametrize(("x", "residual"), [(f32, f32), (bf16, bf16), (bf16, f32), (f16, f16)])
def test_sum_without_norm(
    machine: Machine, x: torch.dtype, residual: torch.dtype, columns: int
) -> None:
    inputs = make_inputs(9, columns, x, residual)
    inputs.update(weight=None, bias=None)
    check(machine, Call(norm=False, dropout=DROPS), inputs)


def test_sum_that_is_not_stored_is_rounded(machine: Machine) -> None:
    """Its type counts though there is none to write."""
    for columns in (264, 265):
        inputs = {name: Memory.holding(x) for name, x in make_inputs(9, columns).items()}
        expected = forward(machine, Call(), **inputs)
        out = Memory((9, columns), bf16)
        mean, rstd = Memory((9,), f32), Memory((9,), f32)
        x, residual, x_bias, weight, bias = inputs.values()
        machine.module.norm_forward_cuda(
            *(rows_of(x), rows_of(residual), rows_of(None, bf16), rows_of(out.tensor)),
            *(rows_of(None), vector_of(x_bias), vector_of(weight), vector_of(bias)),
            *(address(mean.tensor), address(rstd.tensor), 1e-5, dropout_tuple(Call())),
            *(9, columns, (0, 0, 2)),
        )
        assert torch.equal(out.written(), expected.out)
        assert torch.equal(mean.written(), expected.mean)
        assert torch.equal(rstd.written(), expected.rstd)


# --------------------------------------------------------------------------------------- dropout

PACKED = torch.tensor([0, 1, 2, 5, 6, 10, 13, 14, 15], dtype=torch.int32)
TOKENS = {
    "batch first": Dropout(period=5),
    "sequence first": Dropout(period=3, batch_first=False),
    "packed": Dropout(period=5, row_index=PACKED),
    "packed, sequence first": Dropout(period=3, row_index=PACKED, batch_first=False),
    "far rows": Dropout(period=2**31 - 1, row_index=PACKED + (2**31 - 20)),
    "p = 0": Dropout(p=0.0, period=5),
    "p = 1": Dropout(p=1.0, period=5),
    "p = 1/16384": Dropout(p=1 / 16384, period=5),
}


@pytest.mark.parametrize("columns", [1, 264, 265, 768, 1024, 2048, 8200])
@pytest.mark.parametrize("dropout", TOKENS.values(), ids=TOKENS)
def test_decisions_are_those_of_the_contract(
    machine: Machine, dropout: Dropout, columns: int
) -> None:
    """Bit for bit, with a norm and without, forward and backward."""
    rows = 9
    ones, zeros = torch.ones(rows, columns), torch.zeros(rows, columns)
    expected = dropout.factor(rows, columns).float()
    call = Call(dropout=dropout, wanted=frozenset({"branch"}))
    for norm in (True, False):
        result = forward(machine, replace(call, norm=norm), ones)
        assert torch.equal(result.sum, expected)
        kept = (result.mean, result.rstd) if norm else (None, None)
        gradients = backward(
            *(machine, call, result.sum if norm else None, zeros if norm else None, None, ones),
            *(*kept, None, None, {"branch": f32}),
        )
        assert torch.equal(gradients["branch"], expected)


@pytest.mark.parametrize("columns", [264, 265, 2048, 8200])
def test_nonfinite_rows_stay_alone(machine: Machine, columns: int) -> None:
    """As in torch: dropping a NaN leaves a NaN, and an infinity spoils its row, no other."""
    inputs = make_inputs(9, columns, f32)
    call = Call(dropout=DROPS)
    dropped = int((~DROPS.keep(9, columns)[2]).nonzero()[0])
    inputs["x"][2, dropped] = torch.nan
    inputs["x"][4, columns - 1] = torch.inf
    inputs["residual"][7, 0] = -torch.inf
    actual = forward(machine, call, **inputs)
    out, total = eager(call, **inputs)
    torch.testing.assert_close(actual.sum, total, equal_nan=True)
    torch.testing.assert_close(actual.out, out, rtol=1e-5, atol=1e-5, equal_nan=True)
    spoilt = actual.out.isnan().all(1)
    assert spoilt.tolist() == [row in (2, 4, 7) for row in range(9)]
    dtypes = dict.fromkeys(("sum", "branch", "weight", "bias", "x_bias"), f32)
    gradients = backward(
        *(machine, replace(call, wanted=frozenset({"sum", "branch"})), actual.sum),
        *(torch.randn(9, columns), None, None, actual.mean, actual.rstd),
        *(inputs["weight"], inputs["bias"], dtypes),
    )
    for gradient in gradients.values():
        assert torch.equal(gradient.isfinite().all(1), ~spoilt)
        assert torch.equal(gradient.isnan().any(1), spoilt)


def test_large_mean_and_tiny_variance(machine: Machine) -> None:
    """The variance is that of distances from the mean, not a difference of squares.

    Rounding a mean of 1000 deviations to fp32 is 500 units in the last place of a deviation.
    """
    for columns in (264, 265):
        inputs = make_inputs(9, columns, f32)
        inputs["x"] += 1000.0
        inputs["residual"] *= 0.0
        inputs["x_bias"] = None
        check(machine, Call(), inputs, floor_ulps=500)
        inputs["x"].fill_(3.0)
        result = forward(machine, Call(), **inputs)
        assert torch.equal(result.out, inputs["bias"].expand(9, columns))
