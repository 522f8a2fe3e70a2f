"""What of the norms and residual sums is no backend's: arguments, transforms, memory, dispatch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import (
    available_backends,
    dispatch,
    dropout_add,
    dropout_add_layer_norm,
    explain,
    layer_norm,
)
from fastattn.arguments import TokenDropout
from fastattn.extension import loading
from fastattn.ops.layer_norm import MIN_WEIGHT, why_not_from_output
from tests import helpers, reference
from tests.ops.norms import LAYOUTS, SEED, P, make_inputs, seed_tensor, without_norm

SEEDS = {"contract": SEED, "twister": -7}
OPS = (dropout_add, dropout_add_layer_norm)
BACKENDS = available_backends("dropout_add_layer_norm", "cpu")
needs_extension = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the C++ extension")


# ------------------------------------------------------------------------------------ in 16 bits

ROW, EXACT = (100.0, 100.0, 101.0), (-(0.5**0.5), -(0.5**0.5), 2**0.5)
LOW = (torch.float16, torch.bfloat16)


@pytest.fixture(params=["as built", "without the extension"])
def extension_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without the extension":
        monkeypatch.setattr(loading, "_why_not", "not built")
        monkeypatch.setattr(dispatch, "_always", {})


@pytest.mark.usefixtures("extension_or_not")
@pytest.mark.parametrize("affine", [None, torch.float32], ids=["low affine", "fp32 affine"])
@pytest.mark.parametrize("how", ["eager", "output", "compiled", "autocast", "func", "twice"])
@pytest.mark.parametrize("low", LOW, ids=str)
def test_statistics_in_16_bits_are_fp32(
    low: torch.dtype, how: str, affine: torch.dtype | None
) -> None:
    """A mean of 100.33 is 100.5 in bf16; the gradient of the weight is the normalised row."""
    x = torch.tensor([ROW], dtype=low, requires_grad=True)
    weight = torch.ones(3, dtype=affine or low, requires_grad=True)
    bias = torch.zeros(3, dtype=affine or low, requires_grad=True)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(x, weight, bias, save="output" if how == "output" else "input")

    def total(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm(x, weight, bias).float().sum()

    leaves = (x, weight, bias)
    if how == "func":
        _, gradient, _ = torch.func.grad(total, (0, 1, 2))(*leaves)
    elif how == "compiled":
        torch._dynamo.reset()
        compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
        (gradient,) = torch.autograd.grad(compiled(*leaves), weight)
    else:
        with torch.autocast("cpu", low, enabled=how == "autocast"):
            out = total(*leaves)
        (gradient,) = torch.autograd.grad(out, weight, create_graph=how == "twice")
    out, eps = norm(*leaves), torch.finfo(low).eps
    assert out.dtype == low and gradient.dtype == weight.dtype
    expected = torch.tensor(EXACT)
    torch.testing.assert_close(out[0].float(), expected, rtol=eps, atol=0)
    tolerance = 4 * eps if how == "output" else eps
    torch.testing.assert_close(gradient.float(), expected, rtol=tolerance, atol=0)


@pytest.mark.usefixtures("extension_or_not")
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("low", LOW, ids=str)
def test_gradients_of_many_rows_in_16_bits_are_rounded_once(low: torch.dtype, mean: float) -> None:
    """Sums over rows are not in 16 bits either, by whatever backend is chosen."""
    inputs = {"input": torch.randn(3000, 24) + mean, "weight": torch.randn(24)}
    inputs = {name: x.to(low) for name, x in {**inputs, "bias": torch.randn(24)}.items()}
    found = helpers.results_of(layer_norm, inputs)
    cotangents = helpers.cotangents_of((found["output 0"],))
    exact = helpers.results_of(reference.layer_norm, inputs, torch.float64, cotangents)
    for name, x in exact.items():
        error = (found[name] - x).abs().max()
        assert error <= torch.finfo(low).eps * x.abs().max(), name


# ------------------------------------------------------------------- dropout at its two ends


# ---------------------------------------------------------------------- what the backends share


@needs_extension
def test_the_threads_of_torch_are_used_and_change_nothing_but_sums() -> None:
    inputs = make_inputs((9, 100, 96))
    ours = partial(dropout_add_layer_norm, dropout_p=P, seed=seed_tensor(), backend="cpu")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(helpers.results_of(ours, inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        helpers.assert_close(other, results[0], rtol=1e-5, atol=1e-4)
        for name in ("output 0", "gradient of input", "gradient of residual"):
            assert torch.equal(other[name], results[0][name]), name


@needs_extension
def test_calls_from_several_threads_agree() -> None:
    """The interpreter's lock is released, so calls overlap."""
    from concurrent.futures import ThreadPoolExecutor

    inputs = make_inputs((64, 96))
    del inputs["residual"]

    def run(seed: int) -> Tensor:
        options = {"dropout_p": P, "seed": seed_tensor(seed), "backend": "cpu"}
        return dropout_add_layer_norm(residual=None, **inputs, **options)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(16)))
    for seed, out in enumerate(together):
        assert torch.equal(out, run(seed))


def test_which_backend_is_taken() -> None:
    x = torch.randn(2, 3, 8)
    best = BACKENDS[0]
    norm = torch.nn.Identity()
    norm.forward = lambda x: (layer_norm(x), dropout_add(x, x), dropout_add_layer_norm(x, x))
    choices = {choice.part: choice for choice in explain(norm, x)}
    assert choices["layer_norm"].taken == "pytorch"
    assert "torch's own kernel" in choices["layer_norm"].why_not["cpu"] or best == "pytorch"
    for op in ("dropout_add", "dropout_add_layer_norm"):
        assert choices[op].taken == best
    for low in LOW:
        choices = {choice.part: choice for choice in explain(norm, x.to(low))}
        assert choices["layer_norm"].taken == best


# ---------------------------------------------------------------- backward from the result


def test_what_allows_backward_from_the_output() -> None:
    weight, bias = torch.tensor([1.0, -0.5]), torch.tensor([-2.0, 1.0])
    assert why_not_from_output(weight, bias) is None
    assert why_not_from_output(weight, None) is None
    assert why_not_from_output(None, None) is None
    for small in (0.0, MIN_WEIGHT / 2, float("nan")):
        reason = why_not_from_output(torch.tensor([1.0, small]), None)
        assert "weight is smaller" in reason
    for large in (2.1, -2.1, float("nan")):
        reason = why_not_from_output(weight, torch.tensor([large, 0.0]))
        assert "bias is more than twice" in reason


# ------------------------------------------------------------------------------ rows, packed


# --------------------------------------------------------- derivatives of every order and mode


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_gradients_of_every_order(seed: int, dropout_p: float) -> None:
    inputs = make_inputs((2, 2, 3), torch.float64)
    options = {"dropout_p": dropout_p, "seed": seed_tensor(seed)}
    input, residual, input_bias, weight, bias = inputs.values()

    def add(input: Tensor, residual: Tensor, input_bias: Tensor) -> Tensor:
        return dropout_add(input, residual, input_bias=input_bias, **options)

    def fused(*inputs: Tensor) -> Tensor:
        named = dict(
            zip(("input", "residual", "input_bias", "weight", "bias"), inputs, strict=True)
        )
        return dropout_add_layer_norm(**named, **options)

    def total(*inputs: Tensor) -> Tensor:
        named = dict(
            zip(("input", "residual", "input_bias", "weight", "bias"), inputs, strict=True)
        )
        results = dropout_add_layer_norm(
            **named, **options, return_sum=True, copy_dtype=torch.float64
        )
        return results[0] * results[1].sin() + results[2].cos()

    helpers.assert_gradients_of_every_order(add, input, residual, input_bias)
    helpers.assert_gradients_of_every_order(fused, *inputs.values())
    helpers.assert_gradients_of_every_order(total, *inputs.values())
    helpers.assert_gradients_of_every_order(layer_norm, input, weight, bias)


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_shared_norm_weights(seed: int) -> None:
    """Two norms with one weight: gradients to differentiate again count each path once."""

    def twice(x: Tensor, weight: Tensor) -> Tensor:
        options = {"dropout_p": 0.3, "seed": seed_tensor(seed)}
        y = dropout_add_layer_norm(x, weight * x, weight, **options)
        return dropout_add_layer_norm(y.sin(), x, weight, **options, site=3)

    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    helpers.assert_gradients_of_every_order(twice, x, weight)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_gradients_per_sample(seed: int, op: Callable[..., Tensor]) -> None:
    samples = torch.randn(3, 5, 8, dtype=torch.float64)

    def ours(sample: Tensor) -> Tensor:
        return op(sample, sample.cos(), dropout_p=0.3, seed=seed_tensor(seed))

    helpers.assert_per_sample_gradients(ours, samples)


# -------------------------------------------------------------- registration, compile, memory


def op_samples() -> dict[str, list[tuple[Any, ...]]]:
    input, residual, input_bias, weight, bias = make_inputs((3, 5, 8)).values()
    x = LAYOUTS["transposed"](input)
    statistics = torch.randn(3, 5), torch.rand(3, 5)
    norm, no_norm = (weight, bias, 1e-5, torch.float32), (None, None, 1e-5, torch.bfloat16)
    dropout = TokenDropout(0.1, seed_tensor(), 2, None, 5)
    packed = TokenDropout(0.1, seed_tensor(), 2, torch.arange(15).int(), 5, False)
    low, grad = x.bfloat16(), LAYOUTS["transposed"](torch.randn(3, 5, 8))
    half, single = torch.bfloat16, torch.float32
    input_end, end, from_output = ((save, "pytorch") for save in ("input", "sum", "output"))
    norms = {"dropout": dropout, "packed": packed, "none": TokenDropout()}
    everything, branch = [True] * 5, [False, True, False, True, False]
    return {
        "layer_norm_fwd": [(x, *norm, "pytorch"), (low, *no_norm, "pytorch")],
        "layer_norm_bwd": [
            (grad, x, *statistics, *norm, single, *input_end, [True, True, True]),
            (grad.to(half), low, *statistics, *no_norm, half, *input_end, [True, False, False]),
            (grad, low, None, statistics[1], *norm, single, *from_output, [True, True, True]),
        ],
        "dropout_add_layer_norm_fwd": [
            (x, input_bias, residual, *norm, *dropout, half, True, "pytorch"),
            (low, None, residual, *no_norm, *packed, None, False, "pytorch"),
            (low, None, None, *no_norm, *TokenDropout(), half, True, "pytorch"),
        ],
        "dropout_add_layer_norm_bwd": [
            (*gradients, *statistics, *norm, *dtypes, *norms[name], *level, wanted)
            for gradients, dtypes, name, level, wanted in (
                ((grad, grad, None, input), (single, single), "dropout", end, everything),
                ((grad, None, grad.to(half), input), (half, single), "packed", end, branch),
                ((None, grad, None, input), (half, single), "dropout", end, everything),
                ((None, grad, grad.to(half), x), (single, single), "none", end, everything),
                ((grad, None, None, input), (half, single), "packed", from_output, everything),
            )
        ],
        "dropout_add_fwd": [
            (x, input_bias, residual, *dropout, "pytorch"),
            (low, None, residual, *packed, "pytorch"),
            (x, None, None, *TokenDropout(), "pytorch"),
        ],
        "dropout_add_bwd": [
            (grad, half, *dropout, "pytorch", [True, True]),
            (grad, single, *TokenDropout(), "pytorch", [True, False]),
            (grad, single, *packed, "pytorch", [False, True]),
        ],
    }


@pytest.mark.parametrize("name", op_samples())
def test_registration(name: str) -> None:
    helpers.assert_registered(name, *op_samples()[name])


def test_every_registered_op_has_samples() -> None:
    assert helpers.registered_ops("layer_norm", "dropout_add") == set(op_samples())


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_agree(layout: str, dropout_p: float) -> None:
    x, residual = (LAYOUTS[layout](torch.randn(3, 5, 8)) for _ in range(2))
    weight = torch.randn(8)

    def add(x: Tensor, residual: Tensor, seed: Tensor) -> Tensor:
        return dropout_add(x, residual, dropout_p=dropout_p, seed=seed)

    def fused(x: Tensor, residual: Tensor, weight: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        options = {"return_sum": True, "copy_dtype": torch.bfloat16, "input_bias": weight}
        return dropout_add_layer_norm(
            x, residual, weight, dropout_p=dropout_p, seed=seed, **options
        )

    helpers.assert_fakes_agree(add, x, residual)
    helpers.assert_fakes_agree(fused, x, residual, weight)
    helpers.assert_fakes_agree(lambda x, weight, seed: layer_norm(x, weight), x, weight)


def test_compiled_for_any_length() -> None:
    def run(input: Tensor, residual: Tensor, seed: Tensor) -> Tensor:
        return dropout_add_layer_norm(input, residual, dropout_p=P, seed=seed)

    samples = [
        {"input": torch.randn(*size, 8), "residual": torch.randn(*size, 8), "seed": seed_tensor()}
        for size in ((3, 5), (4, 9), (7, 6))
    ]
    helpers.assert_compiled_equals_eager(run, *samples, dynamic=True)


@helpers.needs_compiler
def test_inductor_equals_eager() -> None:
    def run(input: Tensor, residual: Tensor, seed: Tensor, **rest: Tensor) -> Tensor:
        options = {"dropout_p": P, "seed": seed}
        return dropout_add_layer_norm(input.sin(), residual, **rest, **options).cos()

    inputs = {**make_inputs((3, 5, 8)), "seed": seed_tensor()}
    helpers.assert_compiled_equals_eager(run, inputs, backend="inductor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_kept_for_backward(dtype: torch.dtype) -> None:
    inputs = {name: x.requires_grad_() for name, x in make_inputs((4, 64, 32), dtype).items()}
    seed = seed_tensor()
    options = {"dropout_p": P, "seed": seed}
    some = without_norm(inputs)
    assert helpers.saved_bytes(lambda: dropout_add(**some, **options)) == seed.nbytes
    assert helpers.saved_bytes(lambda: dropout_add(**some)) == 0
    total = inputs["input"].nbytes
    norm = helpers.nbytes(inputs["weight"], inputs["bias"]) + 2 * 4 * 64 * 4
    saved = helpers.saved_bytes(lambda: dropout_add_layer_norm(**inputs, **options))
    assert saved == total + norm + seed.nbytes
    assert helpers.saved_bytes(lambda: dropout_add_layer_norm(**inputs)) <= total + norm
    affine = inputs["weight"], inputs["bias"]
    assert helpers.saved_bytes(lambda: layer_norm(inputs["input"], *affine)) <= total + norm
    kept = []  # the result counts once, as what the next layer keeps does

    def from_output() -> None:
        kept.append(dropout_add_layer_norm(**inputs, **options, save="output"))

    assert helpers.saved_bytes(from_output) == total + norm - 4 * 64 * 4 + seed.nbytes


@needs_extension
def test_the_sum_is_stored_for_backward_only() -> None:
    x = torch.randn(2, 3, 8)
    forward = torch.ops.fastattn.dropout_add_layer_norm_fwd
    arguments = (x, None, x, None, None, 1e-5, x.dtype, *TokenDropout(), None)
    assert forward(*arguments, False, "cpu")[1].numel() == 0
    assert torch.equal(forward(*arguments, True, "cpu")[1], 2 * x)


# ------------------------------------------------------------------------ autocast, arguments


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_autocast_changes_no_dtype(dropout_p: float) -> None:
    inputs = make_inputs()
    options = {"dropout_p": dropout_p, "seed": seed_tensor()}
    ours = partial(dropout_add_layer_norm, copy_dtype=torch.bfloat16, **options)
    expected = helpers.results_of(ours, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        helpers.assert_same(helpers.results_of(ours, inputs), expected)
        low = {**inputs, "input": inputs["input"].bfloat16()}
        assert dropout_add_layer_norm(**low, **options).dtype == torch.float32
        assert dropout_add(**without_norm(low), **options).dtype == torch.float32
        assert layer_norm(low["input"]).dtype == torch.bfloat16


ROWS = torch.arange(6, dtype=torch.int32)
INTEGERS = torch.zeros(2, 3, 8).int()
META = torch.zeros(2, 3, 8, device="meta")
WRONG_ARGUMENTS = {
    "input, integers": (dict(input=INTEGERS), ValueError, "input"),
    "input, no dimension": (dict(input=torch.tensor(1.0)), ValueError, "input"),
    "residual, shape": (dict(residual=torch.zeros(2, 1, 8)), ValueError, "residual"),
    "residual, integers": (dict(residual=INTEGERS), ValueError, "residual"),
    "input_bias, shape": (dict(input_bias=torch.zeros(7)), ValueError, "input_bias"),
    "input_bias, integers": (dict(input_bias=INTEGERS[0, 0]), ValueError, "input_bias"),
    "dropout_p": (dict(dropout_p=1.5, seed=seed_tensor()), ValueError, "dropout_p"),
    "dropout_p, type": (dict(dropout_p="half"), TypeError, "dropout_p"),
    "seed, missing": (dict(dropout_p=0.1), ValueError, "seed"),
    "seed, integer": (dict(dropout_p=0.1, seed=7), TypeError, "seed"),
    "seed, shape": (dict(seed=torch.tensor([1, 2])), ValueError, "seed"),
    "seed, device": (dict(seed=seed_tensor().to("meta")), ValueError, "seed"),
    "site": (dict(site=-1), ValueError, "site"),
    "site, type": (dict(site=2.0), TypeError, "site"),
    "row_index, dtype": (dict(row_index=ROWS.long(), row_period=3), ValueError, "row_index"),
    "row_index, shape": (dict(row_index=ROWS[:5], row_period=3), ValueError, "row_index"),
    "row_period, missing": (dict(row_index=ROWS), ValueError, "row_period"),
    "row_period": (dict(row_period=-3), ValueError, "row_period"),
    "backend": (dict(backend="C++"), ValueError, "backend"),
    "residual, device": (dict(residual=META), ValueError, "residual"),
    "input_bias, device": (dict(input_bias=META[0, 0]), ValueError, "input_bias"),
    "row_index, device": (dict(row_index=ROWS.to("meta"), row_period=3), ValueError, "row_index"),
}
WRONG_NORM_ARGUMENTS = {
    "weight, shape": (dict(weight=torch.zeros(7)), "weight"),
    "weight, integers": (dict(weight=INTEGERS[0, 0]), "weight"),
    "bias, shape": (dict(bias=torch.zeros(2, 8)), "bias"),
    "weight, device": (dict(weight=META[0, 0]), "weight"),
    "bias, device": (dict(bias=META[0, 0]), "bias"),
    "out_dtype": (dict(out_dtype=torch.int32), "out_dtype"),
    "backend": (dict(backend=""), "backend"),
}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(case: str, op: Callable[..., Tensor]) -> None:
    arguments, error, name = WRONG_ARGUMENTS[case]
    tensors = dict(input=torch.zeros(2, 3, 8), residual=torch.zeros(2, 3, 8))
    with pytest.raises(error, match=rf"\b{name}\b"):
        op(**{**tensors, **arguments})


@pytest.mark.parametrize("case", WRONG_NORM_ARGUMENTS)
def test_wrong_norm_arguments_are_named(case: str) -> None:
    arguments, name = WRONG_NORM_ARGUMENTS[case]
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        layer_norm(x, **arguments)
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        dropout_add_layer_norm(x, x, **arguments)


def test_wrong_arguments_of_the_fused_op_are_named() -> None:
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r"\bsave\b"):
        dropout_add_layer_norm(x, x, save="input")
    with pytest.raises(ValueError, match=r"\bsave\b"):
        layer_norm(x, save="sum")
    with pytest.raises(ValueError, match=r"\bcopy_dtype\b"):
        dropout_add_layer_norm(x, x, copy_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"\bsave\b.*\bcopy_dtype\b"):
        dropout_add_layer_norm(x, x, save="copy")


@needs_extension
def test_a_dtype_without_kernels_takes_another_backend() -> None:
    x, eight = torch.randn(2, 3, 8), torch.float8_e4m3fn
    with pytest.raises(RuntimeError, match="cpu.*no kernels for float8_e4m3fn"):
        dropout_add_layer_norm(x, x, copy_dtype=eight, backend="cpu")
    out, copy = dropout_add_layer_norm(x, x, copy_dtype=eight)
    assert torch.equal(copy.float(), out.to(eight).float())


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_cannot_run_says_why(backend: str) -> None:
    x = torch.randn(2, 3, 8)
    for op, call in (
        ("layer_norm", partial(layer_norm, x)),
        ("dropout_add_layer_norm", partial(dropout_add_layer_norm, x, x)),
        ("dropout_add", partial(dropout_add, x, x)),
    ):
        with pytest.raises(RuntimeError, match=f"{backend}.*{op}.*runs on cuda, not on cpu"):
            call(backend=backend)
        torch.testing.assert_close(call(backend="pytorch"), call())
