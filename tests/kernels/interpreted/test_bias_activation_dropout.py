"""The insides of the Triton kernels of ``bias_activation_dropout``, and where they are taken.

tests/ops/bias_activation_dropout_checks.py says what they compute.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fastattn import (
    FusedEncoderLayer,
    bias_activation_dropout,
    explain,
    use_backend,
)
from fastattn.arguments import TokenDropout
from fastattn.kernels import bias_activation_dropout as kernels
from tests import helpers
from tests.kernels.interpreted.sanitizer import Sanitizer
from tests.ops.bias_activation_dropout_checks import EAGER, SITE, P, seed_tensor

triton_op = partial(bias_activation_dropout, backend="triton")


def dropout_of(**options) -> TokenDropout:
    return TokenDropout(**{"dropout_p": P, "seed": seed_tensor(), "site": SITE, **options})


def test_the_error_function_of_gelu_is_as_good_as_it_says() -> None:
    """At most 1.5e-7, half of which enters the distribution function, and fp32's own rounding."""
    x = torch.linspace(-6, 6, 2**14).view(64, 256)
    found = triton_op(x, activation="gelu").double() / x.double()
    exact = torch.special.ndtr(x.double())
    assert (found - exact).abs().max() <= 0.75e-7 + 2 * torch.finfo(torch.float32).eps


# ------------------------------------------------------------------- what the block asks for


@pytest.mark.parametrize("dropout_p", [0.0, P, 1.0])
@pytest.mark.parametrize("columns", [64, 100, 33])
def test_from_the_result_of_relu(columns: int, dropout_p: float) -> None:
    x, bias, grad = torch.randn(40, columns), torch.randn(columns), torch.randn(40, columns)
    options = dropout_of(row_period=40, dropout_p=dropout_p)
    y = kernels.bias_activation_dropout_forward(x, bias, "relu", options)
    backward = partial(
        kernels.bias_activation_dropout_backward,
        bias=bias,
        activation="relu",
        dropout=options,
        want_bias=True,
    )
    found, expected = backward(grad, y, from_output=True), backward(grad, x)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_activated_again(dtype: torch.dtype, activation: str, dropout_p: float) -> None:
    x, bias, grad = torch.randn(9, 100), torch.randn(100), torch.randn(9, 100)
    x, bias, grad = (v.to(dtype) for v in (x, bias, grad))
    options = dropout_of(row_period=9, dropout_p=dropout_p)
    y = kernels.bias_activation_dropout_forward(x, bias, activation, options)
    again = torch.empty_like(x)
    backward = partial(
        kernels.bias_activation_dropout_backward,
        bias=bias,
        activation=activation,
        dropout=options,
        want_bias=True,
    )
    expected = backward(grad, x)
    found = backward(grad, x, activated=again)
    assert torch.equal(again, y)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    in_place = backward(grad, x, out=grad, activated=x)
    assert in_place[0] is grad and torch.equal(grad, expected[0]) and torch.equal(x, y)
    assert torch.equal(in_place[1], expected[1])


def test_forward_in_place() -> None:
    x, bias, options = torch.randn(9, 100), torch.randn(100), dropout_of(row_period=9)
    expected = kernels.bias_activation_dropout_forward(x, bias, "gelu", options)
    found = kernels.bias_activation_dropout_forward(x, bias, "gelu", options, out=x)
    assert found is x and torch.equal(x, expected)


@pytest.mark.parametrize("rows", [1, 8, 127, 1000])
def test_column_sums_over_steps_of_a_program(rows: int) -> None:
    """A device that runs few programs at once goes through many rows in each."""
    x, grad = torch.ones(rows, 72), torch.randn(rows, 72)
    backward = kernels.bias_activation_dropout_backward
    dx, d_bias = backward(grad, x, None, "identity", TokenDropout(), True)
    assert torch.equal(dx, grad) and d_bias.dtype == torch.float32
    torch.testing.assert_close(d_bias, grad.double().sum(0).float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(d_bias, backward(grad, x, None, "identity", TokenDropout(), True)[1])


# ------------------------------------------------------------------------------ memory and grids


def test_every_element_is_written(sanitizer: Sanitizer) -> None:
    options = dropout_of(row_period=9, column_offset=40)
    x, bias = torch.randn(9, 200), torch.randn(200)
    out = kernels.bias_activation_dropout_forward(x, bias, "relu", options)
    sanitizer.assert_written(out)
    backward = kernels.bias_activation_dropout_backward
    activated = torch.empty_like(x)
    for y in (*backward(out, x, bias, "relu", options, True, activated=activated), activated):
        sanitizer.assert_written(y)


def test_rows_beyond_two_to_the_31st_element() -> None:
    """4 GiB of address space, of which only the pages of the three rows are ever touched."""
    x = torch.empty_strided((3, 16), (2**30, 1), dtype=torch.float16)
    x.copy_(torch.randn(3, 16))
    near, options = x.contiguous(), dropout_of(row_period=3)
    forward = partial(kernels.bias_activation_dropout_forward, bias=None, activation="relu")
    assert torch.equal(forward(input=x, dropout=options), forward(input=near, dropout=options))
    backward = partial(
        kernels.bias_activation_dropout_backward, bias=None, activation="relu", want_bias=True
    )
    found, d_bias = backward(grad_out=x, saved=x, dropout=options)
    expected, d_bias_expected = backward(grad_out=near, saved=near, dropout=options)
    assert torch.equal(found, expected) and torch.equal(d_bias, d_bias_expected)


def rows_on_meta(columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(8, columns, dtype=dtype, device="meta")


@pytest.mark.parametrize("offset", [0, 24, 63])
@pytest.mark.parametrize("columns", [1, 64, 1000, 3072, 5120, 64 * 65537, 2**25])
def test_programs_cover_all_columns_within_the_limits_of_a_grid(columns: int, offset: int) -> None:
    for dtype in helpers.DTYPES:
        for warps, width in ((8, 8), (4, 4)):
            rows, options = rows_on_meta(columns, dtype), dropout_of(column_offset=offset)
            launch = kernels._Launch((rows,), options, warps, width)
            grid, arguments = launch.grid, launch.arguments
            cells = arguments["BLOCK_M"] * arguments["BLOCK_G"] // arguments["WIDTH"]
            assert cells == 32 * warps and arguments["WIDTH"] <= width
            assert grid[0] * arguments["BLOCK_M"] >= 8
            assert grid[1] * arguments["BLOCK_G"] * 8 >= columns + offset
            assert grid[1] <= 65535


@pytest.mark.parametrize(
    ("columns", "offset", "dtype", "width"),
    [
        (3072, 0, torch.bfloat16, 8),
        (1000, 0, torch.bfloat16, 8),
        (1000, 8, torch.bfloat16, 8),
        (1000, 4, torch.bfloat16, 4),
        (1002, 0, torch.bfloat16, 2),
        (1001, 0, torch.bfloat16, 1),
        (3072, 0, torch.float32, 4),
        (3072, 0, torch.float64, 2),
    ],
)
def test_accesses_are_16_bytes_wide_where_rows_are_aligned(columns, offset, dtype, width) -> None:
    options = dropout_of(column_offset=offset)
    for most in (8, 4):
        launch = kernels._Launch((rows_on_meta(columns, dtype),), options, 4, most)
        assert launch.width == launch.arguments["WIDTH"] == min(width, most)


# -------------------------------------------------------------------------- dispatch and compile


class Middle(torch.nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return bias_activation_dropout(input)


def test_explain_names_it() -> None:
    (choice,) = explain(Middle(), torch.randn(2, 8))
    assert choice.taken == "triton" and choice.why_not == {}
    with use_backend("pytorch"):
        (choice,) = explain(Middle(), torch.randn(2, 8))
    assert choice.taken == "pytorch" and choice.why_not == {"triton": "pytorch was asked for"}


def test_a_dtype_without_kernel_is_named() -> None:
    x = torch.zeros(2, 8).to(torch.float8_e5m2)
    with pytest.raises(RuntimeError, match="fp16, bf16, fp32 and fp64, not torch.float8_e5m2"):
        triton_op(x)
    with pytest.raises(RuntimeError, match="not torch.float8_e5m2"):
        triton_op(x.float(), x[0])


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_registration(dropout_p: float) -> None:
    x, bias = torch.randn(3, 5, 40).transpose(0, 1), torch.randn(40)
    options = ("gelu", *dropout_of(dropout_p=dropout_p, row_period=3), "triton")
    helpers.assert_registered("bias_activation_dropout_fwd", (x, bias, *options))
    samples = [(x, x, bias, want_bias, *options) for want_bias in (True, False)]
    helpers.assert_registered("bias_activation_dropout_bwd", *samples)


def test_fake_tensors_agree() -> None:
    def run(x: Tensor, bias: Tensor, seed: Tensor) -> Tensor:
        return triton_op(x, bias, dropout_p=P, seed=seed)

    helpers.assert_fakes_agree(run, torch.randn(5, 3, 8).transpose(0, 1), torch.randn(8))


def test_what_is_chosen_is_compiled_too() -> None:
    def run(input: Tensor, bias: Tensor, seed: Tensor) -> Tensor:
        return bias_activation_dropout(input.sin(), bias, activation="gelu", dropout_p=P, seed=seed)

    inputs = {"input": torch.randn(3, 5, 40), "bias": torch.randn(40), "seed": seed_tensor()}
    helpers.assert_compiled_equals_eager(run, inputs)


def test_a_layer_with_a_wrapped_linear_uses_it() -> None:
    """The same seed drops the same elements as on the PyTorch path, forward and backward."""
    layer = FusedEncoderLayer(16, 2, 48, dropout=0.3, batch_first=True)
    layer.linear1.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 5, 16)
    taken = {choice.part: choice.taken for choice in explain(layer, x)}
    assert taken["bias_activation_dropout"] == "triton"
    results = []
    for name in ("triton", "pytorch"):
        with use_backend(bias_activation_dropout=name):
            out = layer(x, seed=seed_tensor())
        results.append((out, *torch.autograd.grad(out.sin().sum(), layer.parameters())))
    torch.testing.assert_close(*results)
