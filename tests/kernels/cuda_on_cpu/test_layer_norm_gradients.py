"""Any gradients in, any out, of any type, from the sum or from the result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.cuda_on_cpu.layer_norm_calls import (
    DROPS,
    Call,
    Result,
    backward,
    forward,
    make_inputs,
)
from tests.kernels.cuda_on_cpu.machine import Machine

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16


SOME_WANTED = [
    {"sum"},
    {"branch"},
    {"x_bias"},
    {"weight", "bias"},
    {"sum", "weight", "bias"},
    {"branch", "x_bias"},
]
GIVEN = [("out",), ("sum",), ("copy",), ("out", "sum"), ("out", "copy"), ("copy", "sum")]


@pytest.mark.parametrize("given", GIVEN, ids="+".join)
@pytest.mark.parametrize("columns", [264, 265])
def test_some_gradients_in_and_some_out(
    machine: Machine, given: tuple[str, ...], columns: int
) -> None:
    """Whatever is asked for, it is what the call that asks for everything gives.

    But for the last bit of bf16: it is another kernel, whose sums a compiler may order its own way.
    """
    rows = 9
    call = Call(dropout=DROPS)
    inputs = make_inputs(rows, columns)
    result = forward(machine, call, **inputs)
    gradients = [
        torch.randn(rows, columns).to(bf16) if name in given else None
        for name in ("out", "copy", "sum")
    ]
    dtypes = dict.fromkeys(("sum", "branch", "weight", "bias", "x_bias"), bf16)
    kept = result.mean, result.rstd, inputs["weight"], inputs["bias"], dtypes
    everything = backward(machine, call, result.sum, *gradients, *kept)
    expected = float64_backward(call, result, inputs["weight"], *gradients)
    for name, exact in expected.items():
        error = (everything[name] - exact).abs().amax()
        assert error <= 2**-8 * exact.abs().amax(), name
    for wanted in SOME_WANTED:
        some = backward(
            machine, replace(call, wanted=frozenset(wanted)), result.sum, *gradients, *kept
        )
        assert set(some) == wanted
        for name, gradient in some.items():
            torch.testing.assert_close(gradient, everything[name], rtol=2**-7, atol=1e-5)


def float64_backward(
    call: Call,
    result: Result,
    weight: Tensor,
    grad_out: Tensor | None,
    grad_copy: Tensor | None,
    grad_sum: Tensor | None,
    normalized: Tensor | None = None,
) -> dict[str, Tensor]:
    """The formulas of csrc/layer_norm.h."""
    shape = result.sum.shape
    grad = sum(g.double() for g in (grad_out, grad_copy) if g is not None)
    grad = torch.zeros(shape, dtype=torch.float64) if isinstance(grad, int) else grad
    rstd = result.rstd.double()[:, None]
    if normalized is None:
        normalized = (result.sum.double() - result.mean.double()[:, None]) * rstd
    weighted = weight.double() * grad
    projection = (weighted * normalized).mean(1, keepdim=True)
    d_sum = rstd * (weighted - weighted.mean(1, keepdim=True) - normalized * projection)
    d_sum = d_sum if grad_sum is None else d_sum + grad_sum.double()
    factor = 1.0 if call.dropout is None else call.dropout.factor(*shape)
    return {
        "sum": d_sum,
        "branch": factor * d_sum,
        "weight": (grad * normalized).sum(0),
        "bias": grad.sum(0),
        "x_bias": (factor * d_sum).sum(0),
    }


@pytest.mark.parametrize("columns", [264, 265])
@pytest.mark.parametrize(
    ("grad_out", "grad_copy", "grad_sum", "saved", "d_sum", "d_branch"),
    [
        (bf16, None, f32, bf16, f32, bf16),
        (f32, bf16, f32, bf16, f32, bf16),
        (f32, f32, f16, bf16, f32, f16),
        (bf16, f16, bf16, bf16, bf16, f16),
        (f16, None, None, bf16, f16, f32),
        (f32, f16, f32, f32, f32, f16),
        (bf16, None, bf16, bf16, f32, bf16),
        (bf16, None, f32, bf16, bf16, bf16),
        (None, bf16, f32, f32, f32, bf16),
        (None, f16, None, bf16, bf16, bf16),
        (None, None, f32, None, bf16, f16),
        (None, None, bf16, None, f32, f16),
        (None, None, f16, None, f16, f32),
    ],
)
def test_types_of_gradients(
    machine: Machine,
    columns: int,
    grad_out: torch.dtype | None,
    grad_copy: torch.dtype | None,
    grad_sum: torch.dtype | None,
    saved: torch.dtype | None,
    d_sum: torch.dtype,
    d_branch: torch.dtype,
) -> None:
    """Any type can meet any other, whether or not a kernel is made for the two."""
    rows, call = 9, Call(dropout=DROPS)
    total, weight = torch.randn(rows, columns).to(saved or f32), torch.randn(columns)
    mean = total.float().mean(1)
    rstd = (total.float().var(1, correction=0) + 1e-5).rsqrt()
    gradients = [
        None if dtype is None else torch.randn(rows, columns).to(dtype)
        for dtype in (grad_out, grad_copy, grad_sum)
    ]
    dtypes = {"sum": d_sum, "branch": d_branch, "weight": f32, "bias": bf16, "x_bias": f16}
    found = backward(
        *(machine, call, None if saved is None else total, *gradients),
        *(mean, rstd, weight, None, dtypes),
    )
    result = Result(None, total, None, mean, rstd)
    for name, exact in float64_backward(call, result, weight, *gradients).items():
        assert found[name].dtype == dtypes[name]
        error = (found[name] - exact).abs().amax()
        assert error <= max(torch.finfo(dtypes[name]).eps, 1e-5) * exact.abs().amax(), name


@pytest.mark.parametrize("columns", [264, 265, 1536])
@pytest.mark.parametrize(
    ("dtype", "kept", "grad"),
    [
        *((dtype, dtype, dtype) for dtype in (f32, f16, bf16)),
        *((f32, kept, grad) for kept in (f16, bf16) for grad in (f32, kept)),
    ],
    ids=str,
)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_backward_from_the_result(
    machine: Machine, dtype: torch.dtype, kept: torch.dtype, grad: torch.dtype, columns: int,
    affine: bool,
) -> None:  # fmt: skip
    """The normalised sum is (out - bias) / weight; the mean is not read."""
    rows = 9
    call = Call(dropout=DROPS, from_output=True)
    inputs = make_inputs(rows, columns, dtype)
    inputs["weight"] = (0.5 + torch.rand(columns)).to(dtype) if affine else None
    inputs["bias"] = inputs["bias"] if affine else None
    result = forward(machine, call, **inputs)
    out = result.out.to(kept)
    grad_out, grad_sum = (torch.randn(rows, columns).to(t) for t in (grad, dtype))
    dtypes = {"sum": dtype, "branch": kept}
    weight, bias = inputs["weight"], inputs["bias"]
    without_sums = replace(call, wanted=frozenset(dtypes))
    backward(
        *(machine, without_sums, out, grad_out, None, grad_sum),
        *(None, result.rstd, weight, bias, dtypes),
    )
    assert (machine.block() != (512, 1)) == (columns != 265)  # a thread had rows in registers
    dtypes |= dict.fromkeys(("weight", "bias", "x_bias"), f32)
    found = backward(
        *(machine, call, out, grad_out, None, grad_sum),
        *(None, result.rstd, weight, bias, dtypes),
    )
    normalized, gain = out.double(), torch.ones(columns)
    if affine:
        normalized, gain = (normalized - bias.double()) / weight.double(), weight
    expected = float64_backward(call, result, gain, grad_out, None, grad_sum, normalized)
    for name, exact in expected.items():
        error = (found[name] - exact).abs().amax()
        assert error <= 2 * torch.finfo(dtypes[name]).eps * exact.abs().amax(), name
