"""What ``dropout_add_layer_norm`` and ``dropout_add`` do, checked on every backend of theirs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastattn import dropout_add, dropout_add_layer_norm, layer_norm
from tests import helpers, reference
from tests.ops.backends import Backend, few_kernels
from tests.ops.norms import (
    COMPILED_COLUMNS,
    LAYOUTS,
    WIDTHS,
    P,
    away_from_zero,
    bf16,
    check_fused,
    check_sum,
    decisions,
    dropping,
    eager_fused,
    eager_sum,
    few_programs,
    fp16,
    fp32,
    fp64,
    gradient_from_output,
    make_inputs,
    needs_float64,
    of_norm,
    oracle_fused,
    seed_tensor,
    some,
    without_norm,
)

OPS = ("dropout_add_layer_norm", "dropout_add", "layer_norm")


def check(backend: Backend, inputs: dict[str, Tensor | None], *arguments: Any, **options: Any):
    """Both ops are as accurate as eager PyTorch on the same device."""
    check_sum(backend, inputs, *arguments, **options)
    check_fused(backend, inputs, *arguments, **options)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_accuracy_of_dtypes(backend: Backend, dtype: torch.dtype, dropout_p: float) -> None:
    if dtype == fp64:
        needs_float64(backend)
    few_kernels(backend, dropout_p > 0)
    check(backend, make_inputs((3, 21, 96), dtype), dropout_p)


MIXED = [
    (bf16, {"residual": fp32, "weight": fp32, "bias": fp32}),  # as under autocast
    (bf16, {"residual": fp32, "input_bias": fp32, "weight": fp32, "bias": fp32}),
    (fp16, {"residual": fp32, "weight": fp32, "bias": fp32}),
    (bf16, {"weight": fp32, "bias": fp32}),
    (fp16, {"input_bias": bf16, "weight": fp32, "bias": bf16}),
    (fp32, {"residual": bf16, "input_bias": fp16, "bias": fp16}),
    (fp16, {"residual": bf16}),
    (fp16, {"residual": fp64, "weight": bf16}),
]


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("case", range(len(MIXED)))
def test_accuracy_of_mixed_dtypes(backend: Backend, case: int, dropout_p: float) -> None:
    dtype, dtypes = MIXED[case]
    if fp64 in dtypes.values():
        needs_float64(backend)
    few_kernels(backend, dropout_p > 0 and case in (0, 4))
    check(backend, make_inputs((3, 21, 96), dtype, **dtypes), dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize(
    ("input", "stream", "out", "copy"),
    [
        (bf16, bf16, fp32, bf16),
        (fp16, fp16, fp32, fp16),
        (fp32, fp32, bf16, None),
        (fp32, fp32, None, fp16),
        (bf16, fp32, None, bf16),
        (bf16, fp32, bf16, fp32),
        (fp16, fp32, fp16, None),
        (bf16, bf16, fp16, fp16),
        (fp32, fp32, bf16, fp64),
    ],
    ids=str,
)
def test_accuracy_of_results_in_dtypes_of_their_own(
    backend: Backend, input: torch.dtype, stream: torch.dtype, out: torch.dtype | None,
    copy: torch.dtype | None, dropout_p: float,
) -> None:  # fmt: skip
    if copy == fp64:
        needs_float64(backend)
    few_kernels(backend, dropout_p > 0 and (stream, copy) in ((bf16, bf16), (fp32, fp32)))
    used = (0, 1) if copy is None else (0, 1, 2)
    inputs = make_inputs((3, 21, 96), stream, input=input, input_bias=input)
    check_fused(backend, inputs, dropout_p, used=used, out_dtype=out, copy_dtype=copy)


@pytest.mark.parametrize(("shape", "dtype"), WIDTHS, ids=str)
def test_accuracy_of_widths(backend: Backend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    few_kernels(backend, shape[1] in COMPILED_COLUMNS)
    check(backend, make_inputs(shape, dtype))


def test_accuracy_of_the_widest_rows(backend: Backend) -> None:
    check_fused(backend, make_inputs((2, 65535), bf16))


@pytest.mark.on("cuda")
@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        ((40, 512, 1024), (bf16, bf16)),
        ((40, 512, 1024), (bf16, fp32)),
        ((7, 300, 8200), (fp32, fp32)),
    ],
    ids=str,
)
def test_accuracy_of_many_rows(backend: Backend, shape, dtypes) -> None:
    """More than a GPU's programs hold at once."""
    branch, stream = dtypes
    check(backend, make_inputs(shape, stream, input=branch, input_bias=branch))


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize(
    "shape",
    [
        (8,),
        (1, 1, 40),
        (2, 3, 40),
        (1000, 16),
        (2, 127, 63),
        (0, 40),
        (2, 0, 40),
        (0, 8200),
        (3, 0),
    ],
    ids=str,
)
def test_accuracy_of_shapes(backend: Backend, shape: tuple[int, ...], dropout_p: float) -> None:
    few_programs(backend, shape)
    few_kernels(backend, dropout_p > 0)
    check(backend, make_inputs(shape), dropout_p)


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_layouts(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    inputs, layouts = make_inputs(dtype=dtype), {"input": LAYOUTS[layout]}
    for name in ("input_bias", "weight", "bias"):
        layouts[name] = lambda x: x.repeat_interleave(2)[::2]
    check(backend, inputs, P, layouts)
    check(backend, inputs, P, {"residual": LAYOUTS[layout]}, batch_first=False)
    check(backend, inputs, 0.0, dict.fromkeys(("input", "residual"), LAYOUTS[layout]))


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize(
    "absent",
    [("residual",), ("input_bias",), ("weight",), ("bias",), ("weight", "bias"),
     ("residual", "input_bias", "weight", "bias")],
    ids="+".join,
)  # fmt: skip
def test_parts_may_be_absent(backend: Backend, absent: tuple[str, ...], dropout_p: float) -> None:
    few_kernels(backend, dropout_p > 0 or len(absent) == 4)
    check_fused(backend, {**make_inputs(), **dict.fromkeys(absent)}, dropout_p)
    if absent[0] in ("residual", "input_bias"):
        check_sum(backend, {**make_inputs(), **dict.fromkeys(absent)}, dropout_p)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("columns", [40, 8200])
def test_gradients_that_flow_in_add_up(backend: Backend, columns: int, used) -> None:
    """Into the result, the sum and the copy: absent ones count as zeros."""
    few_kernels(backend, columns == 40)
    check_fused(backend, make_inputs((5, columns)), used=used, copy_dtype=bf16)


@pytest.mark.parametrize("save", ["output", "copy"])
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)
def test_gradients_that_flow_in_add_up_in_16_bits(backend: Backend, dtype, save: str) -> None:
    """What is kept beside a sum that someone uses is narrower than it."""
    few_kernels(backend, dtype == bf16)
    inputs = make_inputs((5, 40), fp32, input=dtype, input_bias=dtype)
    inputs["weight"] = away_from_zero(inputs["weight"])
    check_fused(backend, inputs, used=(0, 1, 2), save=save, out_dtype=dtype, copy_dtype=fp32)


def test_gradients_may_have_any_layout(backend: Backend) -> None:
    """Flowing in as a transposed view, as one number for a row, and in rows that lie apart."""
    inputs = make_inputs()
    keep, multiplier = decisions(inputs, P, None, True)

    def used(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def run(**inputs: Any) -> tuple[Tensor, ...]:
            out, total, copy = function(**inputs, **options)
            return out.transpose(0, 1).contiguous(), total.sum(-1), torch.cat((copy, copy), -1)

        return run

    ours = used(dropout_add_layer_norm, return_sum=True, copy_dtype=fp32)
    eager = used(eager_fused, dropout_p=P, copy_dtype=fp32)
    exact = used(oracle_fused, multiplier=multiplier, eps=1e-5, copied=True)
    helpers.assert_as_accurate_as_eager(
        backend.of(ours, **dropping()), backend.there(eager, keep=keep), exact, inputs
    )


NAMES = ("input", "residual", "input_bias", "weight", "bias")


@pytest.mark.parametrize("used", [(0, 1), (1,)], ids=str)
@pytest.mark.parametrize("columns", [40, 8200])
def test_only_what_is_wanted_is_computed(backend: Backend, columns: int, used) -> None:
    """Each gradient alone is the one that all of them together give."""
    few_kernels(backend, columns == 40)
    inputs = make_inputs((5 if columns == 40 else 2, columns))
    op = some(backend.of(dropout_add_layer_norm, return_sum=True, **dropping()), used)
    everything = helpers.results_of(op, inputs)
    for alone in NAMES if 0 in used else NAMES[:3]:
        leaf = inputs[alone].clone().requires_grad_()
        outputs = op(**{**inputs, alone: leaf})
        (found,) = torch.autograd.grad(outputs, leaf, helpers.cotangents_of(outputs))
        assert torch.equal(found, everything[f"gradient of {alone}"]), alone


@pytest.mark.parametrize("shape", [(63, 40), (63, 265), (5, 8200)], ids=str)
def test_rows_far_from_zero(backend: Backend, shape: tuple[int, int]) -> None:
    """The variance is that of the differences from the mean, not a difference of squares."""
    inputs = make_inputs(shape)
    check_fused(backend, {**inputs, "residual": inputs["residual"] + 1e3})


@pytest.mark.parametrize("eps", [1e-12, 1.0])
def test_eps(backend: Backend, eps: float) -> None:
    """Of rows whose variance is as small as the usual one."""
    inputs = make_inputs()
    small = {name: 3e-3 * inputs[name] for name in ("input", "residual", "input_bias")}
    check_fused(backend, {**inputs, **small}, eps=eps)


@pytest.mark.parametrize("dtypes", [(bf16, bf16), (fp16, fp32)], ids=str)
@pytest.mark.parametrize("columns", [96, 8200])
@torch.no_grad()
def test_the_sum_is_rounded_whether_it_is_stored_or_not(backend, columns: int, dtypes) -> None:
    few_kernels(backend, columns == 96)
    branch, stream = dtypes
    inputs = make_inputs((3, columns), stream, input=branch, input_bias=branch)
    op = partial(backend.of, dropout_add_layer_norm, out_dtype=fp32, **dropping())
    total = backend.of(dropout_add, **dropping())(**without_norm(inputs))
    expected = backend.of(layer_norm, out_dtype=fp32)(**of_norm({**inputs, "input": total}))
    (out, stored), alone = (run(**inputs) for run in (op(return_sum=True), op()))
    assert stored.dtype == stream and torch.equal(stored, total)
    assert torch.equal(out, expected) and torch.equal(alone, expected)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_copy_is_not_rounded_twice(backend: Backend, recorded: bool, dropout_p: float) -> None:
    """It may be wider than the result."""
    inputs = make_inputs()
    exact = backend.of(dropout_add_layer_norm, **dropping(dropout_p))(**inputs)
    inputs["weight"].requires_grad_(recorded)
    op = backend.of(dropout_add_layer_norm, out_dtype=bf16, copy_dtype=fp32, **dropping(dropout_p))
    out, copy = op(**inputs)
    torch.testing.assert_close(copy, exact)
    assert torch.equal(out, exact.to(bf16)) and not torch.equal(out.float(), copy)


@pytest.mark.parametrize("low", [bf16, fp16], ids=str)
def test_a_narrower_copy_is_the_result_rounded(backend: Backend, low: torch.dtype) -> None:
    """Also the one that backward begins from, which a norm alone has as its result."""
    inputs = make_inputs()
    op = partial(backend.of, dropout_add_layer_norm, copy_dtype=low)
    out, copy = op(**dropping())(**inputs)
    assert out.dtype == fp32 and torch.equal(copy, out.to(low))
    _, copy = op(save="copy")(**{**inputs, "residual": None, "input_bias": None})
    alone = backend.of(layer_norm, out_dtype=low, save="output")(**of_norm(inputs))
    assert torch.equal(copy, alone)


@pytest.mark.parametrize(
    ("columns", "dropout_p"),
    [*((columns, p) for columns in (40, 63, 8200) for p in (0.0, P)), (40, 1.0)],
)
@np.errstate(invalid="ignore")
def test_nan_and_infinity_pass_as_in_torch(backend, columns: int, dropout_p: float) -> None:
    """Dropout multiplies what it drops by zero, so they show there too, and in their row alone."""
    few_kernels(backend, columns != 63)
    inputs = make_inputs((8, columns))
    special = torch.tensor([torch.nan, torch.inf, -torch.inf])
    inputs["input"][1:4, :9] = special[:, None]
    inputs["residual"][4:7, columns - 1] = special
    keep, _ = decisions(inputs, dropout_p, None, True)
    eager = {"keep": keep, "dropout_p": dropout_p}
    for op, theirs, given in (
        (dropout_add, eager_sum, without_norm(inputs)),
        (partial(dropout_add_layer_norm, return_sum=True), eager_fused, inputs),
    ):
        found = helpers.results_of(backend.of(op, **dropping(dropout_p)), given)
        expected = helpers.results_of(backend.there(theirs, **eager), given)
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5, equal_nan=True)
    for name in ("output 0", "gradient of residual"):
        assert found[name][1:7].isnan().all() and found[name][[0, 7]].isfinite().all()


@pytest.mark.parametrize(("shape", "dtype"), [((500, 40), bf16), ((5, 8200), fp32)], ids=str)
def test_runs_are_equal_bit_for_bit(backend: Backend, shape, dtype: torch.dtype) -> None:
    """The sums over rows too."""
    assert_same_twice(backend, make_inputs(shape, dtype))


@pytest.mark.on("cuda")
def test_runs_of_many_rows_are_equal_bit_for_bit(backend: Backend) -> None:
    """More than a GPU's programs hold at once."""
    assert_same_twice(backend, make_inputs((40, 512, 1024), bf16))


def assert_same_twice(backend: Backend, inputs: dict[str, Tensor]) -> None:
    op = backend.of(dropout_add_layer_norm, return_sum=True, **dropping())
    alone = backend.of(dropout_add, **dropping())
    for function, given in ((op, inputs), (alone, without_norm(inputs))):
        first, second = (helpers.results_of(function, given) for _ in range(2))
        helpers.assert_same(second, first)


@pytest.mark.parametrize("recorded", [False, True])
def test_results_are_no_views(backend: Backend, recorded: bool) -> None:
    def written(input: Tensor, **options: Any) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(recorded):
            total = dropout_add(input, None, **options)
            out, copy = dropout_add_layer_norm(input, None, copy_dtype=fp32, **options)
        total.add_(1)
        copy.add_(1)
        return input.clone(), out

    x = torch.randn(2, 3, 8)
    after, out = backend.of(written)(input=x.clone())
    assert torch.equal(after, x)
    torch.testing.assert_close(out, reference.layer_norm(x).float())


# ---------------------------------------------------------------------- backward from the result


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_accuracy_from_the_output(backend: Backend, dtype: torch.dtype, dropout_p: float) -> None:
    """At the limit of what ``why_not_from_output`` allows."""
    if dtype == fp64:
        needs_float64(backend)
    few_kernels(backend, dropout_p > 0 and dtype in (bf16, fp32))
    inputs = make_inputs((3, 21, 96), dtype)
    inputs["weight"] = away_from_zero(inputs["weight"])
    inputs["bias"] = (2 * inputs["weight"].abs() * inputs["bias"].sign()).to(dtype)
    check_fused(backend, inputs, dropout_p, used=(0,), save="output")


@pytest.mark.parametrize("columns", [1024, 8200])
def test_accuracy_from_the_output_of_a_wider_stream(backend: Backend, columns: int) -> None:
    inputs = make_inputs((3, columns), fp32, input=bf16, input_bias=bf16)
    inputs["weight"] = away_from_zero(inputs["weight"])
    check_fused(backend, inputs, used=(0,), save="output")


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("low", [fp16, bf16], ids=str)
@pytest.mark.parametrize("columns", [63, 96, 8200])
def test_accuracy_from_a_rounded_result(
    backend: Backend, columns: int, low, dropout_p: float
) -> None:
    """As exact as eager PyTorch in the dtype of what is kept, the result or its copy."""
    few_kernels(backend, dropout_p > 0 and columns != 63 and low == bf16)
    inputs = make_inputs((5, columns))
    inputs["weight"] = away_from_zero(inputs["weight"])
    keep, multiplier = decisions(inputs, dropout_p, None, True)

    def eager(*, keep: Tensor | None, **x: Tensor) -> Tensor:
        x = {name: tensor.to(low) for name, tensor in x.items()}
        return eager_fused(**x, keep=keep, dropout_p=dropout_p)[0]

    def oracle(**x: Tensor) -> Tensor:
        total = reference.dropout_add(**without_norm(x), multiplier=multiplier)
        return reference.layer_norm(total, x["weight"], x["bias"])

    for options, which in (
        ({"save": "output", "out_dtype": low}, 0), ({"save": "copy", "copy_dtype": low}, 1)
    ):  # fmt: skip
        op = backend.of(dropout_add_layer_norm, **options, **dropping(dropout_p))
        ours = op if which == 0 else some(op, (1,))
        helpers.assert_as_accurate_as_eager(ours, backend.there(eager, keep=keep), oracle, inputs)


@pytest.mark.parametrize("low", [fp16, bf16], ids=str)
def test_gradients_from_a_rounded_copy_are_not_rounded(backend: Backend, low) -> None:
    """What is kept has 16 bits; what is computed from it, and returned, 32."""
    inputs = {**make_inputs((3, 21, 96)), "residual": None, "input_bias": None}
    inputs["weight"] = away_from_zero(inputs["weight"])
    op = backend.of(dropout_add_layer_norm, save="copy", copy_dtype=low)
    found = helpers.results_of(some(op, (1,)), inputs)
    (grad,) = helpers.cotangents_of((found["output 0"],))
    exact = gradient_from_output(found["output 0"], grad, **of_norm(inputs))
    torch.testing.assert_close(found["gradient of input"].double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"save": "output"}, {"save": "copy", "copy_dtype": fp32}], ids=str
)
def test_no_second_derivatives_from_the_output(backend: Backend, options) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    out, *_ = backend.of(dropout_add_layer_norm, return_sum=True, **options)(input=x, residual=x)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(out.sin().sum(), x, create_graph=True)


# ------------------------------------------------------------------------ what torch does with it


def by_position(function: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    return lambda *tensors: function(**dict(zip(names, tensors, strict=True)))


def test_gradients_of_every_order(backend: Backend) -> None:
    needs_float64(backend)
    inputs = make_inputs((2, 3), fp64)
    options = dropping(0.3)
    alone = by_position(backend.of(dropout_add, **options), NAMES[:3])
    fused = by_position(backend.of(dropout_add_layer_norm, **options), NAMES)
    helpers.assert_gradients_of_every_order(alone, *(inputs[name] for name in NAMES[:3]))
    helpers.assert_gradients_of_every_order(fused, *(inputs[name] for name in NAMES))


@pytest.mark.parametrize("save", ["sum", "output"])
def test_gradcheck_of_all_results(backend: Backend, save: str) -> None:
    needs_float64(backend)
    inputs = make_inputs((2, 2, 10), fp64)
    inputs["weight"] = away_from_zero(inputs["weight"])
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    op = backend.of(
        dropout_add_layer_norm, return_sum=True, copy_dtype=fp64, save=save, **dropping(0.3)
    )
    assert torch.autograd.gradcheck(by_position(op, NAMES), leaves, fast_mode=True)


def compile_and_compare(backend: Backend, compiler: str, dropout_p: float = P) -> None:
    def run(input: Tensor, residual: Tensor, **others: Any) -> tuple[Tensor, ...]:
        affine = {name: others.pop(name) for name in ("weight", "bias")}
        total = dropout_add(input.sin(), residual, **others)
        results = dropout_add_layer_norm(input, total, return_sum=True, **affine, **others)
        return total, *results, dropout_add_layer_norm(total, input, **affine, **others)

    inputs = make_inputs()
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    actual, expected = (
        helpers.results_of(backend.of(function, **dropping(dropout_p)), inputs)
        for function in (compiled, run)
    )
    helpers.assert_close(actual, expected)


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_compiled_equals_eager(backend: Backend, dropout_p: float) -> None:
    compile_and_compare(backend, "aot_eager", dropout_p)


@pytest.mark.on("cuda")
def test_compiled_by_inductor_equals_eager(backend: Backend) -> None:
    compile_and_compare(backend, "inductor")


@pytest.mark.on("cuda")
def test_cuda_graphs_read_the_seed_of_each_replay(backend: Backend) -> None:
    x, seed = torch.randn(64, 512, device="cuda"), seed_tensor().to("cuda")
    call = partial(dropout_add_layer_norm, x, x, dropout_p=P, return_sum=True, backend=backend.name)
    call(seed=seed)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, total = call(seed=seed)
    for number in (3, 2**63 - 1):
        seed.fill_(number)
        graph.replay()
        expected = call(seed=torch.tensor([number]).to("cuda"))
        assert torch.equal(out, expected[0]) and torch.equal(total, expected[1])
