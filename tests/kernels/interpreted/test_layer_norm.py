"""The Triton kernels of layer norm and of the residual sum: decisions, values, memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.arguments import NormArguments, TokenDropout
from fastattn.kernels import column_sums
from fastattn.kernels import layer_norm as kernels
from tests import helpers, reference
from tests.kernels.interpreted.sanitizer import Sanitizer

P = 0.125
SEED = 2**62 + 54321
SITE = 5
bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
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


def seed_tensor(seed: int = SEED) -> Tensor:
    return torch.tensor([seed])


def dropout_of(**options) -> TokenDropout:
    return TokenDropout(**{"dropout_p": P, "seed": seed_tensor(), "site": SITE, **options})


# ------------------------------------------------------------------------------------- decisions


def kept_by_sum(shape: tuple[int, ...], options: TokenDropout, dtype=fp32) -> Tensor:
    """What forward without a norm keeps; a kept element has the exact scale, a dropped one is 0."""
    out = kernels.dropout_add_forward(torch.ones(shape, dtype=dtype), None, None, options)
    scale = torch.tensor(options.scale, dtype=fp64).to(dtype)
    assert torch.equal(out, (out != 0) * scale)
    return out != 0


def kept_by_forward(shape: tuple[int, ...], options: TokenDropout, dtype=fp32) -> Tensor:
    ones = torch.ones(shape, dtype=dtype)
    norm = NO_NORM._replace(out_dtype=dtype)
    _, total, _, _, _ = kernels.dropout_add_layer_norm_forward(
        ones, None, None, norm, options, None, True
    )
    assert torch.equal(total, kernels.dropout_add_forward(ones, None, None, options))
    return total != 0


def kept_by_branch_backward(shape: tuple[int, ...], options: TokenDropout, dtype=fp32) -> Tensor:
    ones = torch.ones(shape, dtype=dtype)
    d_input, _ = kernels.dropout_add_backward(ones, dtype, options, (True, False))
    assert torch.equal(d_input, kernels.dropout_add_forward(ones, None, None, options))
    return d_input != 0


def kept_by_backward(shape: tuple[int, ...], options: TokenDropout, dtype=fp32) -> Tensor:
    """The norm's own gradient of a constant row is 0: what reaches the branch came to the sum."""
    ones, statistic = (
        torch.ones(shape, dtype=dtype),
        torch.ones(shape[:-1]).to(torch.promote_types(dtype, fp32)),
    )
    d_sum, d_branch, *_ = kernels.dropout_add_layer_norm_backward(
        ones * 0, ones, None, ones, statistic, statistic, NO_NORM, dtype, dtype, options, "sum",
        (True, True, False, False, False),
    )  # fmt: skip
    assert torch.equal(d_sum, ones)
    assert torch.equal(d_branch, kernels.dropout_add_forward(ones, None, None, options))
    return d_branch != 0


KEPT = [kept_by_sum, kept_by_forward, kept_by_branch_backward, kept_by_backward]


def contract(
    options: TokenDropout, position: Tensor, sequence: Tensor, columns: int, seed: int = SEED
) -> Tensor:
    where = (position, sequence, torch.arange(columns))
    return reference.residual_keep(seed, options.site, options.dropout_p, *where)


SHAPES = [
    (1, 1),
    (130, 8),
    (3, 63),
    (17, 256),
    (2, 1000),
    (7, 127),
    (3, 1024),
    (2, 4097),
    (2, 8200),
]


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decisions_of_shapes(shape: tuple[int, int], kept: Callable) -> None:
    options = dropout_of(row_period=shape[0])
    expected = contract(options, *reference.coordinates(shape[:1]), shape[1])
    assert torch.equal(kept(shape, options), expected)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 100, 66, 65])
def test_decisions_do_not_depend_on_the_width_of_an_access(columns, dtype, kept) -> None:
    options = dropout_of(row_period=4)
    expected = contract(options, *reference.coordinates((4,)), columns)
    assert torch.equal(kept((4, columns), options, dtype), expected)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("batch_first", [True, False])
def test_decisions_of_row_maps(batch_first: bool, kept: Callable) -> None:
    """Whole batches, and a part of their rows in any order: positions and sequences count."""
    shape = (3, 17)
    position, sequence = reference.coordinates(shape, batch_first)
    options = dropout_of(row_period=shape[1], batch_first=batch_first)
    whole = contract(options, position, sequence, 72)
    assert torch.equal(kept((*shape, 72), options).view(-1, 72), whole)
    index = torch.randperm(51)[:30]
    packed = options._replace(row_index=index.int())
    assert torch.equal(kept((30, 72), packed), whole[index])


def test_a_strided_row_index() -> None:
    index = torch.arange(40).flip(0).int()
    options = dropout_of(row_period=40, row_index=index.repeat_interleave(3)[::3])
    expected = contract(options, *reference.coordinates((40,)), 8)[index.long()]
    assert torch.equal(kept_by_sum((40, 8), options), expected)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**63 - 1])
@pytest.mark.parametrize("site", [0, 2**16 - 1])
def test_decisions_of_seeds_and_sites(seed: int, site: int) -> None:
    options = dropout_of(seed=seed_tensor(seed), site=site, row_period=2)
    expected = contract(options, *reference.coordinates((4, 2)), 64, seed)
    assert torch.equal(kept_by_sum((8, 64), options), expected)


@pytest.mark.parametrize("p", [1e-5, 1 / 16384, 0.1, 0.5, 1 - 1 / 16384, 1.0])
def test_decisions_of_probabilities(p: float) -> None:
    options = dropout_of(dropout_p=p, row_period=2)
    expected = contract(options, *reference.coordinates((4, 2)), 192)
    assert torch.equal(kept_by_sum((8, 192), options, fp64), expected)
    assert torch.equal(kept_by_backward((8, 192), options, fp64), expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("op", [fastattn.dropout_add, fastattn.dropout_add_layer_norm])
def test_results_equal_those_of_pytorch(op: Callable[..., Tensor], batch_first: bool) -> None:
    """Output, sum and every gradient: the same elements drop."""
    inputs = make_inputs((3, 7, 100))
    inputs = inputs if op is fastattn.dropout_add_layer_norm else without_norm(inputs)
    options = {"dropout_p": 0.4, "seed": seed_tensor(), "batch_first": batch_first}
    found, expected = (
        helpers.results_of(partial(op, **options, backend=backend), inputs)
        for backend in ("triton", "pytorch")
    )
    helpers.assert_close(found, expected)
    assert (found["gradient of input"] == 0).sum() > 500
    for name in ("gradient of input", "output 0"):
        assert torch.equal(found[name] == 0, expected[name] == 0)


# ---------------------------------------------------------------------------------------- values


def make_inputs(
    shape: tuple[int, ...] = (3, 21, 40),
    dtype: torch.dtype = fp32,
    stream_dtype: torch.dtype | None = None,
) -> dict[str, Tensor | None]:
    """Of the fused op; the residual stream and the norm may have a type of their own."""
    columns = shape[-1:]
    branch = {"input": torch.randn(shape), "input_bias": torch.randn(columns)}
    stream = {
        "residual": torch.randn(shape),
        "weight": torch.randn(columns),
        "bias": torch.randn(columns),
    }
    inputs = {name: x.to(dtype) for name, x in branch.items()}
    return inputs | {name: x.to(stream_dtype or dtype) for name, x in stream.items()}


def without_norm(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: inputs[name] for name in ("input", "input_bias", "residual")}


def eager_dropout_add(
    input: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    *,
    keep: Tensor | None,
    dropout_p: float,
) -> Tensor:
    branch = input if input_bias is None else input + input_bias
    if keep is not None:
        branch = branch * keep.view(branch.shape) * (1 / (1 - dropout_p))
    return branch if residual is None else residual + branch


def eager_fused(weight: Tensor | None, bias: Tensor | None, **inputs: Any) -> tuple[Tensor, Tensor]:
    total = eager_dropout_add(**inputs)
    return F.layer_norm(total, total.shape[-1:], weight, bias), total


def oracle_fused(
    weight: Tensor | None, bias: Tensor | None, **inputs: Any
) -> tuple[Tensor, Tensor]:
    total = reference.dropout_add(**inputs)
    return reference.layer_norm(total, weight, bias), total


def eager_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.layer_norm(input, input.shape[-1:], weight, bias)


def check(inputs: dict[str, Tensor | None], dropout_p: float = P, batch_first: bool = True) -> None:
    """The fused op with its sum, and the sum alone."""
    keep = multiplier = None
    if dropout_p:
        where = reference.coordinates(inputs["input"].shape[:-1] or (1,), batch_first)
        columns = torch.arange(inputs["input"].shape[-1])
        keep = reference.residual_keep(SEED, SITE, dropout_p, *where, columns)
        multiplier = reference.factor(keep, dropout_p)
    options = {
        "dropout_p": dropout_p, "seed": seed_tensor(), "site": SITE, "batch_first": batch_first
    }  # fmt: skip
    eager = {"keep": keep, "dropout_p": dropout_p}
    helpers.assert_as_accurate_as_eager(
        partial(dropout_add, **options),
        partial(eager_dropout_add, **eager),
        partial(reference.dropout_add, multiplier=multiplier),
        without_norm(inputs),
    )
    helpers.assert_as_accurate_as_eager(
        partial(fused, return_sum=True, **options),
        partial(eager_fused, **eager),
        partial(oracle_fused, multiplier=multiplier),
        inputs,
    )


def check_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    inputs = {"input": input, "weight": weight, "bias": bias}
    helpers.assert_as_accurate_as_eager(layer_norm, eager_norm, reference.layer_norm, inputs)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_accuracy_of_dtypes(dtype: torch.dtype, dropout_p: float) -> None:
    check(make_inputs((3, 21, 96), dtype), dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)
def test_accuracy_with_a_residual_stream_in_fp32(dtype: torch.dtype, dropout_p: float) -> None:
    check(make_inputs((3, 21, 96), dtype, fp32), dropout_p)


@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_norm_accuracy_of_dtypes(dtype: torch.dtype) -> None:
    inputs = make_inputs((3, 21, 96), dtype)
    check_norm(inputs["input"] + 3, inputs["weight"], inputs["bias"])
    check_norm(inputs["input"], None, None)
    check_norm(inputs["input"], inputs["weight"], None)


WIDTHS = [(40, 1), (33, 7), (33, 8), (9, 63), (5, 127), (20, 256), (5, 768), (5, 1000), (9, 1024)]
WIDE = [(2, 4097), (1, 8192), (2, 8200)]


@pytest.mark.parametrize("shape", [(8,), (1, 1, 40), *WIDTHS, *WIDE], ids=str)
def test_accuracy_of_shapes(shape: tuple[int, ...]) -> None:
    check(make_inputs(shape))


@pytest.mark.parametrize("shape", [*WIDTHS, *WIDE], ids=str)
def test_norm_accuracy_of_shapes(shape: tuple[int, ...]) -> None:
    inputs = make_inputs(shape, bf16)
    check_norm(inputs["input"] + 3, inputs["weight"], inputs["bias"])


@pytest.mark.parametrize("columns", [65535, 65536])
def test_norm_accuracy_of_the_widest_rows(columns: int) -> None:
    """Among columns far from the others, so that chunks differ in their means."""
    inputs = make_inputs((2, columns))
    inputs["input"][:, 5000:9000] += 50
    check_norm(inputs["input"], inputs["weight"], inputs["bias"])


def test_accuracy_of_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 1)
    for shape in ((101, 96), (7, 1024), (3, 8200)):
        check(make_inputs(shape))


def test_accuracy_of_more_programs_than_are_summed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 1)
    monkeypatch.setattr(column_sums, "TILE_BYTES", 2 * 32 * 4)  # of two rows; there are three
    check(make_inputs((101, 96)))


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided rows": lambda x: F.pad(x, (0, 24))[..., :40],
    "unaligned": lambda x: F.pad(x, (1, 0))[..., 1:],
    "unaligned start": lambda x: F.pad(x.flatten(), (3, 0))[3:].view_as(x),
    "sliced columns": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_layouts(layout: str) -> None:
    inputs = make_inputs()
    inputs["weight"] = inputs["weight"].repeat_interleave(2)[::2]
    inputs["input"] = LAYOUTS[layout](inputs["input"])
    check(inputs)
    inputs["residual"] = LAYOUTS[layout](inputs["residual"])
    check(inputs, 0.0, batch_first=False)
    check_norm(inputs["input"], inputs["weight"], inputs["bias"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("save", ["sum", "output"])
def test_gradients_may_have_any_layout(layout: str, save: str) -> None:
    x, norm, statistics = normalised((3, 5, 40), fp32)
    saved = x if save == "sum" else kernels.layer_norm_forward(x, norm)[0]
    flows = [torch.randn(3, 5, 40) for _ in range(3)]
    strange = [LAYOUTS[layout](g) for g in flows]
    saved = LAYOUTS[layout](saved) if layout != "expanded" else saved
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


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize(
    "absent",
    [("residual",), ("input_bias",), ("weight",), ("bias",), ("weight", "bias"),
     ("residual", "input_bias", "weight", "bias")],
)  # fmt: skip
def test_parts_may_be_absent(absent: tuple[str, ...], dropout_p: float) -> None:
    check({**make_inputs(), **dict.fromkeys(absent)}, dropout_p)


def test_rows_far_from_zero(columns: int) -> None:
    """The variance is that of the differences from the mean, not a difference of squares."""
    inputs = make_inputs((5, columns))
    inputs["residual"] += 1e3
    check(inputs)
    check_norm(inputs["residual"], inputs["weight"], inputs["bias"])


@pytest.mark.parametrize("save", ["output", "copy"])
@pytest.mark.parametrize("out_dtype", [fp16, fp32], ids=str)
def test_what_is_kept_may_be_narrower_than_the_sum(out_dtype: torch.dtype, save: str) -> None:
    inputs = make_inputs((3, 21, 40), fp32)
    inputs["weight"] = inputs["weight"].abs() + 0.5
    options = {"out_dtype": out_dtype, "copy_dtype": fp16, "save": save}
    options |= {"dropout_p": P, "seed": seed_tensor()}
    found, expected = (
        helpers.results_of(partial(fastattn.dropout_add_layer_norm, backend=b, **options), inputs)
        for b in ("triton", "pytorch")
    )
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        torch.testing.assert_close(found[name], x, rtol=1e-3, atol=1e-3)


def test_parameters_in_any_dtype() -> None:
    """Computed in fp32 whatever they are; their gradients have their dtypes."""
    inputs = make_inputs((3, 21, 40), fp16)
    dtypes = {"input_bias": bf16, "weight": fp32, "bias": bf16}
    inputs |= {name: inputs[name].to(dtype) for name, dtype in dtypes.items()}
    options = {"dropout_p": P, "seed": seed_tensor()}
    found, expected = (
        helpers.results_of(partial(fastattn.dropout_add_layer_norm, backend=b, **options), inputs)
        for b in ("triton", "pytorch")
    )
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=2e-2, atol=2e-2)


# ----------------------------------------------------------------------- what is kept, and wanted


def normalised(
    shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, NormArguments, tuple[Tensor, Tensor]]:
    """An input, its norm (of weights away from zero) and its statistics."""
    x = torch.randn(shape).to(dtype)
    weight, bias = (torch.rand(shape[-1]) + 0.5).to(dtype), torch.randn(shape[-1]).to(dtype)
    norm = NormArguments(weight, bias, 1e-5, dtype)
    _, mean, rstd = kernels.layer_norm_forward(x, norm)
    return x, norm, (mean, rstd)


@pytest.mark.parametrize("parts", ["both", "weight", "bias", "neither"])
def test_backward_from_the_result(parts: str, columns: int) -> None:
    check_backward_from_the_result((5, columns), parts)


@pytest.mark.parametrize("parts", ["both", "neither"])
def test_backward_from_the_result_with_parameters_read_again(parts: str) -> None:
    """So many columns that each thread has too few registers to keep weights in."""
    check_backward_from_the_result((2, 4100), parts)


def check_backward_from_the_result(shape: tuple[int, int], parts: str) -> None:
    x, norm, (mean, rstd) = normalised(shape, fp64)
    if parts in ("bias", "neither"):
        norm = norm._replace(weight=None)
    if parts in ("weight", "neither"):
        norm = norm._replace(bias=None)
    out, _, _ = kernels.layer_norm_forward(x, norm)
    grad = torch.randn_like(x)
    wanted = (True, norm.weight is not None, norm.bias is not None)
    expected = kernels.layer_norm_backward(grad, x, mean, rstd, norm, x.dtype, "input", wanted)
    found = kernels.layer_norm_backward(grad, out, None, rstd, norm, x.dtype, "output", wanted)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_statistics(columns: int) -> None:
    x = torch.randn(2, 3, columns, dtype=bf16) + 2
    out, mean, rstd = kernels.layer_norm_forward(x, NO_NORM)
    assert out.dtype == mean.dtype == rstd.dtype == fp32
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean(-1), rtol=1e-6, atol=1e-6)
    deviation = (exact.var(-1, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(rstd.double(), 1 / deviation, rtol=1e-6, atol=0)


@pytest.mark.parametrize("keep_sum", [False, True])
def test_the_sum_is_rounded_whether_it_is_stored_or_not(keep_sum: bool, columns: int) -> None:
    inputs = make_inputs((3, columns), bf16)
    norm = NormArguments(inputs["weight"], inputs["bias"], 1e-5, fp32)
    branch = (inputs["input"], inputs["input_bias"], inputs["residual"])
    out, total, copy, *statistics = kernels.dropout_add_layer_norm_forward(
        *branch, norm, dropout_of(row_period=3), fp16, keep_sum
    )
    rounded = kernels.dropout_add_forward(*branch, dropout_of(row_period=3))
    assert rounded.dtype == bf16
    assert torch.equal(total, rounded) if keep_sum else total is None
    expected, *expected_statistics = kernels.layer_norm_forward(rounded, norm)
    assert torch.equal(out, expected) and torch.equal(copy, expected.to(fp16))
    for a, b in zip(statistics, expected_statistics, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "present", [(1, 0, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1), (0, 1, 0)], ids=str
)
def test_gradients_that_flow_in_add_up(present: tuple[int, int, int], columns: int) -> None:
    """Into the result, the sum and the copy: absent ones count as zeros."""
    shape = (5, columns)
    x, norm, statistics = normalised(shape, fp64)
    flows = [torch.randn(shape, dtype=fp64) if flag else None for flag in present]
    dropout = dropout_of(row_period=5)
    found = kernels.dropout_add_layer_norm_backward(
        *flows, x, *statistics, norm, fp64, fp64, dropout, "sum", EVERYTHING
    )
    zeros = torch.zeros(shape, dtype=fp64)
    grad_out, grad_sum, grad_copy = (zeros if g is None else g for g in flows)
    leaves = [t.clone().requires_grad_() for t in (x, norm.weight, norm.bias)]
    out = reference.layer_norm(*leaves)
    d_sum, d_weight, d_bias = torch.autograd.grad(out, leaves, grad_out + grad_copy)
    d_sum = d_sum + grad_sum
    keep = contract(dropout, *reference.coordinates(shape[:1]), columns)
    d_branch = d_sum * reference.factor(keep, P)
    expected = (d_sum, d_branch, d_branch.sum(0), d_weight, d_bias)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm_part", [True, False])
def test_only_what_is_wanted_is_computed(norm_part: bool, columns: int) -> None:
    x, norm, statistics = normalised((5, columns), fp32)
    flows = (x if norm_part else None, x.flip(0), None)
    call = partial(
        kernels.dropout_add_layer_norm_backward, *flows, x, *statistics, norm, bf16, fp32,
        dropout_of(row_period=5), "sum",
    )  # fmt: skip
    everything = call(EVERYTHING)
    assert [x.dtype for x in everything] == [fp32, bf16, fp32, fp32, fp32]
    for alone in range(5):
        found = call(tuple(i == alone for i in range(5)))
        for i, (a, b) in enumerate(zip(found, everything, strict=True)):
            assert torch.equal(a, b) if i == alone else a is None
    assert call((False,) * 5) == (None,) * 5


def test_results_and_gradients_in_dtypes_of_their_own() -> None:
    inputs = make_inputs((3, 21, 96), bf16, fp32)
    options = {"dropout_p": P, "seed": seed_tensor(), "out_dtype": fp32, "copy_dtype": bf16}
    found, expected = (
        helpers.results_of(partial(fastattn.dropout_add_layer_norm, backend=b, **options), inputs)
        for b in ("triton", "pytorch")
    )
    assert torch.equal(found["output 1"], found["output 0"].to(bf16))
    for name, x in expected.items():
        tolerance = 1e-2 if x.dtype == bf16 else 1e-5
        torch.testing.assert_close(found[name], x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (0, 8200), (3, 0)], ids=str)
def test_without_elements(shape: tuple[int, ...]) -> None:
    x, vector = torch.ones(shape), torch.ones(shape[-1])
    norm, dropout = NormArguments(vector, vector, 1e-5, fp32), dropout_of(row_period=2)
    assert kernels.dropout_add_forward(x, vector, x, dropout).shape == shape
    out, total, copy, mean, rstd = kernels.dropout_add_layer_norm_forward(
        x, vector, x, norm, dropout, bf16, True
    )
    assert out.shape == total.shape == copy.shape == shape
    assert mean.shape == rstd.shape == shape[:-1]
    gradients = kernels.dropout_add_layer_norm_backward(
        x, x, x, x, mean, rstd, norm, fp32, fp32, dropout, "sum", EVERYTHING
    )
    assert [tuple(g.shape) for g in gradients] == [shape, shape, *[shape[-1:]] * 3]
    d_input, d_bias = kernels.dropout_add_backward(x, fp32, dropout, (True, True))
    assert d_input.shape == shape
    assert not any(g.any() for g in (*gradients[2:], d_bias))


def test_gradients_of_every_order() -> None:
    inputs = make_inputs((2, 3), fp64)
    names = ("input", "residual", "input_bias", "weight", "bias")

    def ours(*tensors: Tensor) -> Tensor:
        named = dict(zip(names, tensors, strict=True))
        return fused(**named, dropout_p=0.3, seed=seed_tensor())

    helpers.assert_gradients_of_every_order(ours, *(inputs[name] for name in names))


def test_gradcheck() -> None:
    """The sum alone; and with the result, the sum and a copy used, from the sum and the result."""
    inputs = make_inputs((2, 2, 10), fp64)
    inputs["weight"] = inputs["weight"].sign() * (inputs["weight"].abs() + 0.5)
    leaves = [inputs[name].requires_grad_() for name in ("input", "residual", "input_bias")]
    affine = [inputs[name].requires_grad_() for name in ("weight", "bias")]
    options = {"dropout_p": 0.3, "seed": seed_tensor()}

    def total(x: Tensor, residual: Tensor, x_bias: Tensor) -> Tensor:
        return dropout_add(x, residual, input_bias=x_bias, **options)

    def everything(x, residual, x_bias, weight, bias, save="sum") -> tuple[Tensor, ...]:
        return fused(
            x, residual, weight, bias, input_bias=x_bias, return_sum=True, copy_dtype=fp64,
            save=save, **options,
        )  # fmt: skip

    check = partial(torch.autograd.gradcheck, fast_mode=True)
    assert check(total, leaves)
    assert check(everything, (*leaves, *affine))
    assert check(partial(everything, save="output"), (*leaves, *affine))
    assert check(layer_norm, (leaves[0], *affine))
    assert check(partial(layer_norm, save="output"), (leaves[0], *affine))


@pytest.mark.parametrize("dropout_p", [0.0, P, 1.0])
@pytest.mark.parametrize("special", [torch.nan, -torch.inf], ids=str)
@np.errstate(invalid="ignore")
def test_nan_and_infinity_stay_in_their_row_as_in_torch(columns, special, dropout_p) -> None:
    """What drops is multiplied by zero, as in torch: it does not hide them."""
    x, residual = torch.randn(2, 2, columns)
    x[0, :9] = special
    where = reference.coordinates((2,))
    keep = reference.residual_keep(SEED, SITE, dropout_p, *where, torch.arange(columns))
    multiplier = reference.factor(keep, dropout_p).float()
    options = {"dropout_p": dropout_p, "seed": seed_tensor(), "site": SITE}

    def ours(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return fused(x, residual, return_sum=True, **options)

    def torchs(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x * multiplier
        return F.layer_norm(total, (columns,)), total

    inputs = {"x": x, "residual": residual}
    found, expected = (helpers.results_of(function, inputs) for function in (ours, torchs))
    for name, y in expected.items():
        torch.testing.assert_close(found[name], y, equal_nan=True, rtol=1e-4, atol=1e-5)
        assert y[1].isfinite().all()
    assert torch.equal(dropout_add(x, residual, **options).isnan(), expected["output 1"].isnan())


# ------------------------------------------------------------------------------ memory and grids


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


# -------------------------------------------------------------------------- dispatch and compile


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
    ops = torch.ops.fastattn
    torch.library.opcheck(getattr(ops, f"{op}_fwd").default, forwards[op])
    torch.library.opcheck(getattr(ops, f"{op}_bwd").default, backwards[op])


def test_fake_tensors_agree() -> None:
    def run(x: Tensor, residual: Tensor, weight: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        out = fused(x, residual, weight, dropout_p=P, seed=seed, return_sum=True, copy_dtype=fp16)
        return (*out, dropout_add(x, residual, dropout_p=P, seed=seed), layer_norm(x, weight))

    x = torch.randn(5, 3, 8).transpose(0, 1)
    helpers.assert_fakes_agree(run, x, torch.randn(3, 5, 8), torch.rand(8))


def test_compiled_equals_eager() -> None:
    def run(**inputs: Tensor) -> tuple[Tensor, ...]:
        seed = inputs.pop("seed")
        out, total = fused(**inputs, dropout_p=P, seed=seed, return_sum=True)
        return layer_norm(out.sin()), total

    helpers.assert_compiled_equals_eager(run, make_inputs() | {"seed": seed_tensor()})
