"""The Triton kernels of ``bias_activation_dropout``: decisions bit for bit, values, gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import (
    FusedEncoderLayer,
    bias_activation_dropout,
    explain,
    use_backend,
)
from fastattn.arguments import TokenDropout
from fastattn.kernels import bias_activation_dropout as kernels
from tests import helpers, reference
from tests.kernels.interpreted.sanitizer import Sanitizer

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
triton_op = partial(bias_activation_dropout, backend="triton")


def seed_tensor(seed: int = SEED) -> Tensor:
    return torch.tensor([seed])


def dropout_of(**options) -> TokenDropout:
    return TokenDropout(**{"dropout_p": P, "seed": seed_tensor(), "site": SITE, **options})


def kept_by_forward(shape: tuple[int, ...], options: TokenDropout, dtype=torch.float32) -> Tensor:
    """What the forward kernel keeps; a kept element has the exact scale, a dropped one is 0."""
    ones = torch.ones(shape, dtype=dtype)
    out = kernels.bias_activation_dropout_forward(ones, None, "identity", options)
    scale = torch.tensor(options.scale, dtype=torch.float64).to(dtype)
    assert torch.equal(out, (out != 0) * scale)
    return out != 0


def kept_by_backward(shape: tuple[int, ...], options: TokenDropout, dtype=torch.float32) -> Tensor:
    ones = torch.ones(shape, dtype=dtype)
    backward = kernels.bias_activation_dropout_backward
    return backward(ones, ones, None, "relu", options, False)[0] != 0


def contract(
    options: TokenDropout, position: Tensor, sequence: Tensor, columns: int, seed: int = SEED
) -> Tensor:
    numbers = torch.arange(columns) + options.column_offset
    return reference.activation_keep(
        seed, options.site, options.dropout_p, position, sequence, numbers
    )


# ------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize("kept", [kept_by_forward, kept_by_backward])
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 63), (5, 64), (2, 100), (130, 66), (1, 1000), (7, 127), (2, 1088)]
)
def test_decisions_of_shapes(shape: tuple[int, int], kept: Callable) -> None:
    options = dropout_of(row_period=shape[0])
    expected = contract(options, *reference.coordinates(shape[:1]), shape[1])
    assert torch.equal(kept(shape, options), expected)


@pytest.mark.parametrize("offset", [1, 8, 60, 64, 100, 2**20 + 24])
@pytest.mark.parametrize("columns", [1, 63, 64, 136])
def test_decisions_of_a_shard(columns: int, offset: int) -> None:
    options = dropout_of(row_period=3, column_offset=offset)
    expected = contract(options, *reference.coordinates((3,)), columns)
    assert torch.equal(kept_by_forward((3, columns), options), expected)
    assert torch.equal(kept_by_backward((3, columns), options), expected)


@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 100, 66, 65])
def test_decisions_do_not_depend_on_the_width_of_an_access(columns: int, dtype) -> None:
    options = dropout_of(row_period=4)
    expected = contract(options, *reference.coordinates((4,)), columns)
    assert torch.equal(kept_by_forward((4, columns), options, dtype), expected)
    assert torch.equal(kept_by_backward((4, columns), options, dtype), expected)


@pytest.mark.parametrize("kept", [kept_by_forward, kept_by_backward])
@pytest.mark.parametrize("batch_first", [True, False])
def test_decisions_of_row_maps(batch_first: bool, kept: Callable) -> None:
    """Whole batches, and a part of their rows in any order: positions and sequences count."""
    shape = (3, 45)
    position, sequence = reference.coordinates(shape, batch_first)
    options = dropout_of(row_period=shape[1], batch_first=batch_first)
    whole = contract(options, position, sequence, 72)
    assert torch.equal(kept((*shape, 72), options).view(-1, 72), whole)
    index = torch.randperm(135)[:50]
    packed = options._replace(row_index=index.int())
    assert torch.equal(kept((50, 72), packed), whole[index])


def test_a_strided_row_index() -> None:
    index = torch.arange(40).flip(0).int()
    options = dropout_of(row_period=40, row_index=index.repeat_interleave(3)[::3])
    position, sequence = reference.coordinates((40,))
    expected = contract(options, position, sequence, 8)[index.long()]
    assert torch.equal(kept_by_forward((40, 8), options), expected)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**63 - 1])
@pytest.mark.parametrize("site", [0, 2**16 - 1])
def test_decisions_of_seeds_and_sites(seed: int, site: int) -> None:
    options = dropout_of(seed=seed_tensor(seed), site=site, row_period=2)
    expected = contract(options, *reference.coordinates((4, 2)), 64, seed)
    assert torch.equal(kept_by_forward((8, 64), options), expected)


@pytest.mark.parametrize("p", [1e-5, 1 / 16384, 0.1, 0.5, 1 - 1 / 16384, 1.0])
def test_decisions_of_probabilities(p: float) -> None:
    options = dropout_of(dropout_p=p, row_period=2)
    expected = contract(options, *reference.coordinates((4, 2)), 192)
    assert torch.equal(kept_by_forward((8, 192), options, torch.float64), expected)
    assert torch.equal(kept_by_backward((8, 192), options, torch.float64), expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_decisions_equal_those_of_pytorch(batch_first: bool) -> None:
    x = torch.randn(3, 7, 100)
    options = {"activation": "silu", "dropout_p": 0.4, "seed": seed_tensor(), "column_offset": 30}
    found = triton_op(x, **options, batch_first=batch_first)
    expected = bias_activation_dropout(x, **options, batch_first=batch_first, backend="pytorch")
    assert torch.equal(found == 0, expected == 0) and (found == 0).any()
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------------- values


def eager(
    input: Tensor, bias: Tensor | None, *, activation: str, keep: Tensor | None, dropout_p: float
) -> Tensor:
    hidden = EAGER[activation](input if bias is None else input + bias)
    return hidden if keep is None else hidden * keep.view(hidden.shape) * (1 / (1 - dropout_p))


def oracle(
    input: Tensor, bias: Tensor | None, *, activation: str, multiplier: Tensor | None
) -> Tensor:
    hidden = reference.ACTIVATIONS[activation](input if bias is None else input + bias)
    return hidden if multiplier is None else hidden * multiplier.view(hidden.shape)


def check(input: Tensor, bias: Tensor | None, dropout_p: float, activation: str = "gelu") -> None:
    keep = multiplier = None
    if dropout_p:
        where = reference.coordinates(input.shape[:-1] or (1,))
        columns = torch.arange(input.shape[-1])
        keep = reference.activation_keep(SEED, SITE, dropout_p, *where, columns)
        multiplier = reference.factor(keep, dropout_p)
    options = {"activation": activation, "dropout_p": dropout_p}
    helpers.assert_as_accurate_as_eager(
        partial(triton_op, seed=seed_tensor(), site=SITE, **options),
        partial(eager, keep=keep, **options),
        partial(oracle, activation=activation, multiplier=multiplier),
        {"input": input, "bias": bias},
    )


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_accuracy_of_dtypes(dtype: torch.dtype, activation: str, dropout_p: float) -> None:
    input, bias = 3 * torch.randn(3, 20, 72), torch.randn(72)
    check(input.to(dtype), bias.to(dtype), dropout_p, activation)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided rows": lambda x: F.pad(x, (0, 24))[..., :40],
    "unaligned": lambda x: F.pad(x, (1, 0))[..., 1:],
    "sliced columns": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_layouts(layout: str, dropout_p: float) -> None:
    check(LAYOUTS[layout](torch.randn(3, 5, 40)), torch.randn(80)[::2], dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("shape", [(7,), (1, 1), (1, 1000), (0, 8), (2, 0, 8)], ids=str)
def test_accuracy_of_shapes(shape: tuple[int, ...], dropout_p: float) -> None:
    check(torch.randn(shape), torch.randn(shape[-1]), dropout_p, "relu")


def test_no_columns() -> None:
    options = dropout_of()
    out = kernels.bias_activation_dropout_forward(torch.ones(3, 0), torch.ones(0), "relu", options)
    assert out.shape == (3, 0)
    backward = kernels.bias_activation_dropout_backward
    grad, d_bias = backward(out, out, torch.ones(0), "relu", options, True)
    assert grad.shape == (3, 0) and d_bias.shape == (0,)


@pytest.mark.parametrize("activation", EAGER)
def test_accuracy_in_the_tails(activation: str) -> None:
    """Values and slopes on a fine grid, not only where inputs are likely."""
    x = torch.linspace(-12, 12, 4096).view(64, 64)
    check(x, None, 0.0, activation)


def test_the_error_function_of_gelu_is_as_good_as_it_says() -> None:
    """At most 1.5e-7, half of which enters the distribution function, and fp32's own rounding."""
    x = torch.linspace(-6, 6, 2**14).view(64, 256)
    found = triton_op(x, activation="gelu").double() / x.double()
    exact = torch.special.ndtr(x.double())
    assert (found - exact).abs().max() <= 0.75e-7 + 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float64),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_promotion(dtypes: tuple[torch.dtype, torch.dtype], dropout_p: float) -> None:
    input, bias = torch.randn(3, 5, 40).to(dtypes[0]), torch.randn(40).to(dtypes[1])
    check(input, bias, dropout_p)


def test_gradients_of_a_sum() -> None:
    """The gradient flowing in is one number, expanded."""
    x = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(triton_op(x, dropout_p=P, seed=seed_tensor()).sum(), x)
    options = {"dropout_p": P, "seed": seed_tensor(), "backend": "pytorch"}
    expected = torch.autograd.grad(bias_activation_dropout(x, **options).sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation", EAGER)
def test_gradcheck(activation: str) -> None:
    x, bias = torch.randn(2, 2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    ours = partial(triton_op, activation=activation, dropout_p=0.3, seed=seed_tensor())
    assert torch.autograd.gradcheck(ours, (x.requires_grad_(), bias.requires_grad_()))


def test_gradients_of_every_order() -> None:
    x, bias = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    ours = partial(triton_op, activation="gelu", dropout_p=0.3, seed=seed_tensor())
    helpers.assert_gradients_of_every_order(ours, x, bias)


SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 60.0, -60.0]


@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@np.errstate(invalid="ignore", over="ignore")
def test_nan_and_infinity_pass_as_in_pytorch(activation: str, dtype: torch.dtype) -> None:
    x = torch.tensor(SPECIAL, dtype=dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    found, expected = triton_op(x, activation=activation), EAGER[activation](wide)
    torch.testing.assert_close(found, expected.to(dtype), equal_nan=True)
    (slope,) = torch.autograd.grad(found.sum(), x)
    (wide_slope,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(slope, wide_slope.to(dtype), equal_nan=True)


def test_what_drops_is_zero_whatever_it_was() -> None:
    x = torch.full((4, 64), torch.nan).requires_grad_()
    options = dropout_of(row_period=4)
    keep = contract(options, *reference.coordinates((4,)), 64)
    out = triton_op(x, activation="identity", dropout_p=P, seed=seed_tensor(), site=SITE)
    assert torch.equal(out.isnan(), keep) and (out[~keep] == 0).all()
    (gradient,) = torch.autograd.grad(out, x, torch.full_like(out, torch.inf))
    assert torch.equal(gradient.isinf(), keep) and (gradient[~keep] == 0).all()


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
    ops = torch.ops.fastattn
    torch.library.opcheck(ops.bias_activation_dropout_fwd.default, (x, bias, *options))
    for want_bias in (True, False):
        sample = (x, x, bias, want_bias, *options)
        torch.library.opcheck(ops.bias_activation_dropout_bwd.default, sample)


def test_fake_tensors_agree() -> None:
    def run(x: Tensor, bias: Tensor, seed: Tensor) -> Tensor:
        return triton_op(x, bias, dropout_p=P, seed=seed)

    helpers.assert_fakes_agree(run, torch.randn(5, 3, 8).transpose(0, 1), torch.randn(8))


@pytest.mark.parametrize("backend", ["triton", None])
def test_compiled_equals_eager(backend: str | None) -> None:
    def run(input: Tensor, bias: Tensor, seed: Tensor) -> Tensor:
        return bias_activation_dropout(
            input.sin(), bias, activation="gelu", dropout_p=P, seed=seed, backend=backend
        )

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
