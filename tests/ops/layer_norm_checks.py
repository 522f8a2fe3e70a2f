"""What ``layer_norm`` does, checked on every backend that has it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastattn import layer_norm
from tests import helpers
from tests.ops.backends import FP32_MEANS, Backend, few_kernels
from tests.ops.norms import (
    COMPILED_COLUMNS,
    LAYOUTS,
    WIDTHS,
    away_from_zero,
    bf16,
    check_norm,
    eager_norm,
    few_programs,
    fp16,
    fp32,
    fp64,
    gradient_from_output,
    make_inputs,
    needs_float64,
    of_norm,
)

OPS = ("layer_norm",)


@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_accuracy_of_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    if dtype == fp64:
        needs_float64(backend)
    inputs = make_inputs((3, 21, 96), dtype)
    check_norm(backend, {**inputs, "input": inputs["input"] + 3})
    if not backend.compiles:
        check_norm(backend, {**inputs, "weight": None, "bias": None})


@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
def test_parts_may_be_absent(backend: Backend, absent: tuple[str, ...]) -> None:
    check_norm(backend, {**make_inputs(), **dict.fromkeys(absent)})


@pytest.mark.parametrize(
    ("input", "affine", "out"),
    [
        (bf16, fp32, None),
        (fp16, fp32, fp32),
        (fp32, bf16, fp16),
        (fp16, bf16, bf16),
        (bf16, fp16, fp64),
        (fp64, fp32, fp16),
    ],
    ids=str,
)
def test_accuracy_of_mixed_dtypes(
    backend: Backend, input: torch.dtype, affine: torch.dtype, out: torch.dtype | None
) -> None:
    """Computed in at least fp32 whatever they are; gradients have the dtypes of the inputs."""
    if fp64 in (input, out):
        needs_float64(backend)
    few_kernels(backend, input == fp16)
    check_norm(backend, make_inputs((3, 21, 96), input, weight=affine, bias=affine), out_dtype=out)


@pytest.mark.parametrize(("shape", "dtype"), WIDTHS, ids=str)
def test_accuracy_of_widths(backend: Backend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    few_kernels(backend, shape[1] in COMPILED_COLUMNS)
    inputs = make_inputs(shape, dtype)
    check_norm(backend, {**inputs, "input": inputs["input"] + 3})


def test_accuracy_of_the_widest_rows(backend: Backend) -> None:
    """Among columns far from the others, so that parts of a row differ in their means."""
    inputs = make_inputs((2, 65536))
    inputs["input"][:, 5000:9000] += 50
    check_norm(backend, inputs)


@pytest.mark.on("cuda")
@pytest.mark.parametrize("dtype", [bf16, fp32], ids=str)
@pytest.mark.parametrize("columns", [1024, 8200])
def test_accuracy_of_many_rows(backend: Backend, columns: int, dtype: torch.dtype) -> None:
    """More than a GPU's programs hold at once."""
    inputs = make_inputs((20480 if columns == 1024 else 2400, columns), dtype)
    check_norm(backend, {**inputs, "input": inputs["input"] + 3})


@pytest.mark.parametrize(
    "shape",
    [(8,), (1, 1, 40), (2, 2, 3, 40), (1000, 16), (2, 127, 63), (0, 40), (2, 0, 40), (0, 8200),
     (3, 0)],
    ids=str,
)  # fmt: skip
def test_accuracy_of_shapes(backend: Backend, shape: tuple[int, ...]) -> None:
    few_programs(backend, shape)
    check_norm(backend, make_inputs(shape))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_layouts(backend: Backend, layout: str) -> None:
    layouts = {"input": LAYOUTS[layout], "weight": lambda x: x.repeat_interleave(2)[::2]}
    check_norm(backend, make_inputs(), layouts)


@pytest.mark.parametrize("shape", [(5, 40), (63, 40), (5, 63), (9, 264), (5, 8200)], ids=str)
def test_rows_far_from_zero(backend: Backend, shape: tuple[int, int]) -> None:
    """The variance is that of the differences from the mean, not a difference of squares.

    Rounding a mean of 1000 deviations to fp32 is 500 units in the last place of a deviation; a
    difference of squares would be off by hundreds of thousands.
    """
    floor_ulps = 500 if FP32_MEANS in backend.quirks else helpers.FLOOR_ULPS
    inputs = make_inputs(shape)
    check_norm(backend, {**inputs, "input": inputs["input"] + 1e3}, floor_ulps=floor_ulps)


def test_values_whose_squares_overflow(backend: Backend) -> None:
    inputs = make_inputs((3, 21, 96), fp16)
    check_norm(backend, {**inputs, "input": 1e4 * inputs["input"]})


@pytest.mark.parametrize("columns", [1, 40, 63, 8200])
def test_constant_rows(backend: Backend, columns: int) -> None:
    """Their result is the bias, exactly."""
    inputs = {**of_norm(make_inputs((3, columns))), "input": torch.full((3, columns), 7.0)}
    results = helpers.results_of(backend.of(layer_norm), inputs)
    assert torch.equal(results["output 0"], inputs["bias"].expand(3, columns))
    assert (results["gradient of weight"] == 0).all()
    assert results["gradient of input"].isfinite().all()


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0])
def test_eps(backend: Backend, eps: float) -> None:
    """Of rows whose variance is as small as the usual one."""
    inputs = make_inputs()
    check_norm(backend, {**inputs, "input": 3e-3 * inputs["input"]}, eps=eps)


@pytest.mark.parametrize("columns", [40, 63, 8200])
@np.errstate(invalid="ignore")
def test_nan_and_infinity_stay_in_their_rows(backend: Backend, columns: int) -> None:
    inputs = of_norm(make_inputs((5, columns)))
    inputs["input"][1:4, columns - 2] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    found, expected = (
        helpers.results_of(function, inputs)
        for function in (backend.of(layer_norm), backend.there(eager_norm))
    )
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5, equal_nan=True)
    for name in ("output 0", "gradient of input"):
        assert found[name][1:4].isnan().all() and found[name][[0, 4]].isfinite().all()


@pytest.mark.parametrize(("shape", "dtype"), [((1000, 40), bf16), ((9, 8200), fp32)], ids=str)
def test_runs_are_equal_bit_for_bit(backend: Backend, shape, dtype: torch.dtype) -> None:
    """The sums over rows too."""
    inputs = of_norm(make_inputs(shape, dtype))
    first, second = (helpers.results_of(backend.of(layer_norm), inputs) for _ in range(2))
    helpers.assert_same(second, first)


# ---------------------------------------------------------------------- backward from the result


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*(((3, 21, 96), dtype) for dtype in helpers.DTYPES), ((9, 63), bf16), ((2, 8192), fp32),
     ((2, 8200), fp32)],
    ids=str,
)  # fmt: skip
def test_accuracy_from_the_output(backend: Backend, shape, dtype: torch.dtype) -> None:
    """At the limit of what ``why_not_from_output`` allows."""
    if dtype == fp64:
        needs_float64(backend)
    few_kernels(backend, dtype == bf16 or shape[-1] > 8000)
    inputs = make_inputs(shape, dtype)
    inputs["weight"] = away_from_zero(inputs["weight"])
    inputs["bias"] = (2 * inputs["weight"].abs() * inputs["bias"].sign()).to(dtype)
    check_norm(backend, inputs, save="output")


@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("shape", [(3, 21, 40), (2, 8192), (2, 8200)], ids=str)
def test_accuracy_from_an_output_of_fewer_parts(backend: Backend, shape, absent) -> None:
    few_kernels(backend, len(shape) == 3 or len(absent) == 2)
    inputs = make_inputs(shape)
    inputs["weight"] = away_from_zero(inputs["weight"])
    check_norm(backend, {**inputs, **dict.fromkeys(absent)}, save="output")


@pytest.mark.parametrize("low", [fp16, bf16], ids=str)
def test_gradients_from_a_rounded_output_are_not_rounded(backend: Backend, low) -> None:
    """What is kept has 16 bits; what is computed from it, and returned, 32."""
    inputs = of_norm(make_inputs((3, 21, 96)))
    inputs["weight"] = away_from_zero(inputs["weight"])
    found = helpers.results_of(backend.of(layer_norm, save="output", out_dtype=low), inputs)
    assert found["output 0"].dtype == low
    (grad,) = helpers.cotangents_of((found["output 0"],))
    exact = gradient_from_output(found["output 0"], grad, **inputs)
    torch.testing.assert_close(found["gradient of input"].double(), exact, rtol=1e-4, atol=1e-5)


def test_no_second_derivatives_from_the_output(backend: Backend) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    out = backend.of(layer_norm, save="output")(input=x)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(out.sin().sum(), x, create_graph=True)


# ------------------------------------------------------------------------ what torch does with it


def test_gradients_of_every_order(backend: Backend) -> None:
    needs_float64(backend)
    inputs = of_norm(make_inputs((2, 3), fp64))

    def ours(*tensors: Tensor, **options: Any) -> Tensor:
        run = backend.of(layer_norm, **options)
        return run(**dict(zip(inputs, tensors, strict=True)))

    helpers.assert_gradients_of_every_order(ours, *inputs.values())
    leaves = tuple(x.requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(partial(ours, save="output"), leaves)


def test_compiled_equals_eager(backend: Backend) -> None:
    def run(input: Tensor, **others: Any) -> Tensor:
        return layer_norm(input.sin(), **others).cos()

    inputs = of_norm(make_inputs())
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    actual, expected = (
        helpers.results_of(backend.of(function), inputs) for function in (compiled, run)
    )
    helpers.assert_close(actual, expected)
