"""``layer_norm``, ``dropout_add_layer_norm`` and ``dropout_add`` against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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

P = 0.125
SEED = 2**62 + 777
SITE = 6
SEEDS = {"contract": SEED, "twister": -7}
OPS = (dropout_add, dropout_add_layer_norm)
BACKENDS = available_backends("dropout_add_layer_norm", "cpu")
needs_extension = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the C++ extension")


def seed_tensor(seed: int = SEED) -> Tensor:
    return torch.tensor([seed])


def make_inputs(
    shape: tuple[int, ...] = (3, 63, 40), dtype: torch.dtype = torch.float32
) -> dict[str, Tensor | None]:
    columns = shape[-1:]
    inputs = {
        "input": torch.randn(shape),
        "residual": torch.randn(shape),
        "input_bias": torch.randn(columns),
        "weight": torch.randn(columns),
        "bias": torch.randn(columns),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def without_norm(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: inputs[name] for name in ("input", "residual", "input_bias")}


def keep_of(shape: tuple[int, ...], p: float, batch_first: bool = True) -> Tensor:
    where = reference.coordinates(shape[:-1] or (1,), batch_first)
    return reference.residual_keep(SEED, SITE, p, *where, torch.arange(shape[-1]))


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


def eager_fused(
    input: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    total = eager_dropout_add(input, residual, input_bias, **options)
    return F.layer_norm(total, total.shape[-1:], weight, bias), total


def oracle_fused(
    input: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    multiplier: Tensor | None,
) -> tuple[Tensor, Tensor]:
    total = reference.dropout_add(input, residual, input_bias, multiplier)
    return reference.layer_norm(total, weight, bias), total


def check(
    inputs: dict[str, Tensor | None], dropout_p: float = 0.0, batch_first: bool = True
) -> None:
    """``dropout_add`` and ``dropout_add_layer_norm``, the latter with its sum, on every backend."""
    keep = keep_of(inputs["input"].shape, dropout_p, batch_first) if dropout_p else None
    multiplier = None if keep is None else reference.factor(keep, dropout_p)
    options = {
        "dropout_p": dropout_p, "seed": seed_tensor(), "site": SITE, "batch_first": batch_first
    }  # fmt: skip
    eager = {"keep": keep, "dropout_p": dropout_p}
    for backend in BACKENDS:
        options["backend"] = backend
        helpers.assert_as_accurate_as_eager(
            partial(dropout_add, **options),
            partial(eager_dropout_add, **eager),
            partial(reference.dropout_add, multiplier=multiplier),
            without_norm(inputs),
        )
        helpers.assert_as_accurate_as_eager(
            partial(dropout_add_layer_norm, return_sum=True, **options),
            partial(eager_fused, **eager),
            partial(oracle_fused, multiplier=multiplier),
            inputs,
        )


def eager_layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.layer_norm(input, input.shape[-1:], weight, bias)


def check_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    inputs = {"input": input, "weight": weight, "bias": bias}
    for backend in BACKENDS:
        ours = partial(layer_norm, backend=backend)
        helpers.assert_as_accurate_as_eager(ours, eager_layer_norm, reference.layer_norm, inputs)


# ---------------------------------------------------------------------------------- accuracy

SHAPES = [(8,), (1,), (1, 127), (63, 40), (1, 1, 40), (2, 127, 63), (1, 3, 1000), (1000, 3)]
LAYOUTS = {
    "unaligned": lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape),
    "rows apart": lambda x: F.pad(x, (0, 3))[..., :-3],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one row for all": lambda x: x[:1, :1].expand_as(x),
}


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_accuracy_of_dtypes(dtype: torch.dtype, dropout_p: float) -> None:
    check(make_inputs((3, 63, 96), dtype), dropout_p)


@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_norm_accuracy_of_dtypes(dtype: torch.dtype) -> None:
    inputs = make_inputs((3, 63, 96), dtype)
    check_norm(inputs["input"] + 3, inputs["weight"], inputs["bias"])
    check_norm(inputs["input"], None, None)
    check_norm(inputs["input"], inputs["weight"], None)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_of_shapes(shape: tuple[int, ...], dropout_p: float) -> None:
    check(make_inputs(shape), dropout_p)
    inputs = make_inputs(shape)
    check_norm(inputs["input"], inputs["weight"], inputs["bias"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [7, 255, 256, 1025, 4096, 8193, 65535, 65536])
def test_accuracy_of_widths(columns: int, dtype: torch.dtype) -> None:
    inputs = make_inputs((3, columns), dtype)
    check(inputs, P)
    check_norm(inputs["input"] + 1, inputs["weight"], inputs["bias"])


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_accuracy_under_autocast_dtypes(low: torch.dtype, dropout_p: float) -> None:
    """A branch from a product in ``low`` beside an fp32 residual and fp32 parameters."""
    inputs = make_inputs((3, 63, 96))
    check({**inputs, "input": inputs["input"].to(low)}, dropout_p)
    affine = {name: inputs[name] for name in ("weight", "bias")}
    check({**make_inputs((3, 63, 96), low), **affine}, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_layouts(layout: str, dropout_p: float) -> None:
    inputs = make_inputs()
    inputs["input"] = LAYOUTS[layout](inputs["input"])
    inputs["weight"] = inputs["weight"].repeat_interleave(2)[::2]
    check(inputs, dropout_p)
    inputs["residual"] = LAYOUTS[layout](inputs["residual"])
    check(inputs, dropout_p, batch_first=False)
    check_norm(inputs["input"], inputs["weight"], inputs["bias"])


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize(
    "absent",
    [("residual",), ("input_bias",), ("weight",), ("bias",), ("weight", "bias"),
     ("residual", "input_bias", "weight", "bias")],
)  # fmt: skip
def test_parts_may_be_absent(absent: tuple[str, ...], dropout_p: float) -> None:
    check({**make_inputs(), **dict.fromkeys(absent)}, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("shape", [(0, 40), (0, 5, 40), (2, 0, 40)], ids=str)
def test_no_rows(shape: tuple[int, ...], dropout_p: float) -> None:
    inputs = make_inputs(shape)
    options = {"dropout_p": dropout_p, "seed": seed_tensor()}
    for results in (
        helpers.results_of(partial(dropout_add, **options), without_norm(inputs)),
        helpers.results_of(partial(dropout_add_layer_norm, **options), inputs),
        helpers.results_of(layer_norm, {"input": inputs["input"], "weight": inputs["weight"]}),
    ):
        assert results["output 0"].shape == shape
        assert all((x == 0).all() for x in results.values())


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_rows_far_from_zero(dropout_p: float) -> None:
    """The variance is that of the differences from the mean, not a difference of squares."""
    inputs = make_inputs()
    inputs["residual"] += 1e3
    check(inputs, dropout_p)
    check_norm(inputs["residual"], inputs["weight"], inputs["bias"])


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


def test_constant_rows() -> None:
    x = torch.full((3, 64), 7.0)
    results = helpers.results_of(layer_norm, {"input": x})
    assert all((r == 0).all() for r in (results["output 0"],))
    assert results["gradient of input"].isfinite().all()


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0])
def test_eps(eps: float) -> None:
    inputs = make_inputs()
    expected = reference.layer_norm(inputs["input"], eps=eps).float()
    torch.testing.assert_close(layer_norm(inputs["input"], eps=eps), expected)
    fused = dropout_add_layer_norm(
        torch.zeros_like(inputs["input"]), inputs["input"], eps=eps, dropout_p=P, seed=seed_tensor()
    )
    torch.testing.assert_close(fused, expected)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copy_dtype", [None, torch.float32, torch.bfloat16])
def test_dtypes_of_results(
    copy_dtype: torch.dtype | None, out_dtype: torch.dtype | None, dropout_p: float
) -> None:
    inputs = make_inputs()
    for name in ("input", "input_bias"):
        inputs[name] = inputs[name].bfloat16()
    options = {"dropout_p": dropout_p, "seed": seed_tensor(), "site": SITE, "return_sum": True}
    dtypes = {"out_dtype": out_dtype, "copy_dtype": copy_dtype}
    ours = partial(dropout_add_layer_norm, **options, **dtypes)
    results = helpers.results_of(ours, inputs)
    outputs = [x for name, x in results.items() if name.startswith("output")]
    wanted = [out_dtype or torch.float32, torch.float32, copy_dtype]
    assert [x.dtype for x in outputs] == [dtype for dtype in wanted if dtype is not None]
    if copy_dtype is not None:
        narrow = min(wanted[0], copy_dtype, key=lambda dtype: dtype.itemsize)
        assert torch.equal(outputs[2].to(narrow), outputs[0].to(narrow))

    def oracle(**inputs: Tensor) -> tuple[Tensor, ...]:
        keep = keep_of((3, 63, 40), dropout_p)
        out, total = oracle_fused(**inputs, multiplier=reference.factor(keep, dropout_p))
        return (out, total) if copy_dtype is None else (out, total, out)

    cotangents = helpers.cotangents_of(tuple(outputs))
    expected = helpers.results_of(oracle, inputs, torch.float64, cotangents)
    through = {"output 0": [out_dtype], "output 1": [], "output 2": [out_dtype]}
    for name, x in expected.items():  # gradients come through every result, the copy through one
        dtypes = (results[name].dtype, *through.get(name, wanted))
        ulp = max(torch.finfo(dtype).eps for dtype in dtypes if dtype)
        assert (results[name] - x).abs().max() <= 4 * ulp * x.abs().max(), name


def test_only_the_sum_or_only_the_copy_is_used() -> None:
    inputs = make_inputs()
    options = {"dropout_p": P, "seed": seed_tensor(), "return_sum": True}
    ours = partial(dropout_add_layer_norm, copy_dtype=torch.float64, **options)

    def pick(index: int) -> Callable[..., Tensor]:
        return lambda **inputs: ours(**inputs)[index]

    total = helpers.results_of(pick(1), inputs)
    plain = partial(dropout_add, dropout_p=P, seed=seed_tensor(), site=2)
    for name, x in helpers.results_of(plain, without_norm(inputs)).items():
        torch.testing.assert_close(total[name], x)
    assert (total["gradient of weight"] == 0).all()
    copied, out = helpers.results_of(pick(2), inputs), helpers.results_of(pick(0), inputs)
    for name, x in out.items():
        torch.testing.assert_close(copied[name], x, check_dtype=False)


# ------------------------------------------------------------------- dropout at its two ends


def test_everything_dropped_leaves_the_residual() -> None:
    inputs = make_inputs()
    options = {"dropout_p": 1.0, "seed": seed_tensor()}
    results = helpers.results_of(partial(dropout_add, **options), without_norm(inputs))
    assert torch.equal(results["output 0"], inputs["residual"])
    fused = helpers.results_of(partial(dropout_add_layer_norm, **options), inputs)
    norm = layer_norm(inputs["residual"], inputs["weight"], inputs["bias"], backend=BACKENDS[0])
    assert torch.equal(fused["output 0"], norm)
    for name in ("gradient of input", "gradient of input_bias"):
        assert (results[name] == 0).all() and (fused[name] == 0).all()


def test_a_probability_that_rounds_to_zero_drops_nothing() -> None:
    inputs = make_inputs()
    tiny = {"dropout_p": 3e-5, "seed": seed_tensor()}
    for op, some in ((dropout_add, without_norm(inputs)), (dropout_add_layer_norm, inputs)):
        actual = helpers.results_of(partial(op, **tiny), some)
        helpers.assert_same(actual, helpers.results_of(op, some))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_pass_as_in_torch(special: float, dropout_p: float, backend: str) -> None:
    """Dropout multiplies what it drops by zero, so NaN and infinity show there too."""
    inputs = make_inputs()
    inputs["residual"][1, 4, 3] = special
    inputs["input"][2, 5] = special
    keep = keep_of((3, 63, 40), dropout_p)
    some, options = without_norm(inputs), {"dropout_p": dropout_p, "seed": seed_tensor()}
    total = dropout_add(**some, **options, site=SITE, backend=backend)
    expected = eager_dropout_add(**some, keep=keep, dropout_p=dropout_p)
    torch.testing.assert_close(total, expected, equal_nan=True)
    out = dropout_add_layer_norm(**inputs, **options, site=SITE, backend=backend)
    broken = out.isnan().all(-1)
    assert broken[1, 4] and broken[2, 5] and broken.sum() == 2
    assert out[~broken].isfinite().all()
    alone = layer_norm(inputs["residual"], backend=backend)
    assert alone[1, 4].isnan().all() and alone.isnan().any(-1).sum() == 1


# ---------------------------------------------------------------------- what the backends share


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("columns", [1, 8, 513, 1000])
def test_backends_drop_the_same_both_ways(columns: int, packed: bool) -> None:
    """What drops is exactly zero, and as the contract says."""
    rows = {"row_index": torch.randperm(30).int()[:21], "row_period": 10} if packed else {}
    where = reference.coordinates((3, 7))
    if packed:
        where = tuple(x[rows["row_index"].long()] for x in reference.coordinates((3, 10)))
    keep = reference.residual_keep(SEED, SITE, P, *where, torch.arange(columns))
    ones = torch.ones(3, 7, columns)
    for backend in BACKENDS:
        options = {"dropout_p": P, "seed": seed_tensor(), "site": SITE, "backend": backend, **rows}
        x = ones.clone().requires_grad_()
        total = dropout_add(x, None, **options)
        assert torch.equal(total.detach().view(keep.shape) != 0, keep)
        assert torch.equal(torch.autograd.grad(total.sum(), x)[0].view(keep.shape) != 0, keep)
        fused = dropout_add_layer_norm(x, ones, **options, return_sum=True)
        assert torch.equal(fused[1].detach().view(keep.shape) != 1, keep)
        (gradient,) = torch.autograd.grad(fused, x, [ones.sin(), ones])
        assert not gradient.view(keep.shape)[~keep].any()


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    inputs = make_inputs((9, 100, 96), dtype)
    options = {"dropout_p": P, "seed": seed_tensor(), "backend": "cpu"}
    first, second = (
        helpers.results_of(partial(dropout_add_layer_norm, **options), inputs) for _ in range(2)
    )
    helpers.assert_same(second, first)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_accuracy_from_the_output(dtype: torch.dtype, dropout_p: float, backend: str) -> None:
    """At the limit of what ``why_not_from_output`` allows."""
    inputs = make_inputs((3, 63, 96), dtype)
    inputs["weight"] = (inputs["weight"].sign() * (0.5 + inputs["weight"].abs())).to(dtype)
    inputs["bias"] = (2 * inputs["weight"].abs() * inputs["bias"].sign()).to(dtype)
    assert why_not_from_output(inputs["weight"], inputs["bias"]) is None
    keep = keep_of((3, 63, 96), dropout_p)
    options = {"dropout_p": dropout_p, "seed": seed_tensor(), "site": SITE, "save": "output"}
    helpers.assert_as_accurate_as_eager(
        partial(dropout_add_layer_norm, **options, backend=backend),
        lambda **x: eager_fused(**x, keep=keep, dropout_p=dropout_p)[0],
        lambda **x: oracle_fused(**x, multiplier=reference.factor(keep, dropout_p))[0],
        inputs,
    )
    helpers.assert_as_accurate_as_eager(
        partial(layer_norm, save="output", backend=backend),
        eager_layer_norm,
        reference.layer_norm,
        {"input": inputs["input"], "weight": inputs["weight"], "bias": inputs["bias"]},
    )
    bare = partial(layer_norm, save="output", backend=backend, weight=None, bias=None)
    x = {"input": inputs["input"]}
    oracle = partial(reference.layer_norm, weight=None, bias=None)
    eager = partial(eager_layer_norm, weight=None, bias=None)
    helpers.assert_as_accurate_as_eager(bare, eager, oracle, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_accuracy_from_the_copy(low: torch.dtype, dropout_p: float, backend: str) -> None:
    """As exact as eager PyTorch in the copy's dtype."""
    inputs = make_inputs((3, 63, 96), torch.float32)
    inputs["weight"] = inputs["weight"].sign() * (0.5 + inputs["weight"].abs())
    keep = keep_of((3, 63, 96), dropout_p)
    options = {"dropout_p": dropout_p, "seed": seed_tensor(), "site": SITE, "backend": backend}

    def ours(**x: Tensor) -> Tensor:
        return dropout_add_layer_norm(**x, **options, save="copy", copy_dtype=low)[1]

    def eager(**x: Tensor) -> Tensor:
        x = {name: tensor.to(low) for name, tensor in x.items()}
        return eager_fused(**x, keep=keep, dropout_p=dropout_p)[0]

    def oracle(**x: Tensor) -> Tensor:
        return oracle_fused(**x, multiplier=reference.factor(keep, dropout_p))[0]

    helpers.assert_as_accurate_as_eager(ours, eager, oracle, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_copy_is_not_rounded_twice(recorded: bool, dropout_p: float, backend: str) -> None:
    """It may be wider than the result."""
    inputs = make_inputs((3, 5, 8), torch.float32)
    options = {"dropout_p": dropout_p, "seed": seed_tensor(), "backend": backend}
    exact = dropout_add_layer_norm(**inputs, **options)
    inputs["weight"].requires_grad_(recorded)
    low = torch.bfloat16
    out, copy = dropout_add_layer_norm(**inputs, **options, out_dtype=low, copy_dtype=exact.dtype)
    torch.testing.assert_close(copy, exact)
    assert torch.equal(out, exact.to(low)) and not torch.equal(out.float(), copy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_from_a_rounded_result_are_not_rounded(low: torch.dtype, backend: str) -> None:
    """What is kept has 16 bits; what is computed from it, and returned, 32."""
    x, weight = torch.randn(3, 63, 96, requires_grad=True), torch.rand(96) + 0.5
    options = {"weight": weight, "backend": backend}
    _, copy = dropout_add_layer_norm(x, None, **options, save="copy", copy_dtype=low)
    out = layer_norm(x, **options, save="output", out_dtype=low)
    assert torch.equal(out, copy)
    xhat = out.detach().double() / weight
    rstd = 1 / (x.detach().double().var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    grad = torch.randn(x.shape).to(low)
    flow = grad * weight.double()
    along = (flow * xhat).mean(-1, keepdim=True)
    exact = rstd * (flow - flow.mean(-1, keepdim=True) - xhat * along)
    for result in (out, copy):
        (found,) = torch.autograd.grad(result, x, grad)
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_from_the_output(backend: str) -> None:
    inputs = make_inputs((2, 2, 3), torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def fused(*tensors: Tensor) -> tuple[Tensor, ...]:
        return dropout_add_layer_norm(
            **dict(zip(inputs, tensors, strict=True)),
            dropout_p=0.3,
            seed=seed_tensor(),
            save="output",
            return_sum=True,
            copy_dtype=torch.float64,
            backend=backend,
        )

    assert torch.autograd.gradcheck(fused, leaves)
    for options in ({"save": "output"}, {"save": "copy", "copy_dtype": torch.float32}):
        out = dropout_add_layer_norm(**inputs, **options, return_sum=True, backend=backend)[0]
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(out.sin().sum(), leaves[0], create_graph=True)
    out = layer_norm(inputs["input"], save="output", backend=backend)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(out.sin().sum(), leaves[0], create_graph=True)


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


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_packed_rows_drop_what_padded_rows_drop(
    op: Callable[..., Tensor], batch_first: bool
) -> None:
    real = torch.arange(33) < torch.tensor([7, 0, 33, 1])[:, None]
    if not batch_first:
        real = real.t()
    x, residual = torch.randn(2, *real.shape, 40)
    rows = real.flatten().nonzero().flatten().to(torch.int32)
    options = {"dropout_p": P, "seed": seed_tensor(), "batch_first": batch_first}
    packed = op(x[real], residual[real], row_index=rows, row_period=real.shape[1], **options)
    torch.testing.assert_close(packed, op(x, residual, **options)[real])


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_batch_first_or_not_drops_the_same(op: Callable[..., Tensor]) -> None:
    x, residual = torch.randn(2, 3, 63, 40)
    options = {"dropout_p": P, "seed": seed_tensor()}
    batch = op(x, residual, **options)
    sequence = op(x.transpose(0, 1), residual.transpose(0, 1), **options, batch_first=False)
    torch.testing.assert_close(sequence.transpose(0, 1), batch)
    for first in (True, False):
        one = op(x[0], residual[0], **options, batch_first=first)
        torch.testing.assert_close(one, batch[0])


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
    for sample in op_samples()[name]:
        torch.library.opcheck(getattr(torch.ops.fastattn, name).default, sample)


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


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("return_sum", [False, True])
def test_compiled_equals_eager(return_sum: bool, dropout_p: float) -> None:
    def run(input: Tensor, residual: Tensor, seed: Tensor, **rest: Tensor) -> tuple[Tensor, ...]:
        options = {"dropout_p": dropout_p, "seed": seed}
        twice = dropout_add(input, input, **options)
        return twice, dropout_add_layer_norm(
            layer_norm(input), residual, **rest, **options, return_sum=return_sum
        )

    def flat(**inputs: Tensor) -> tuple[Tensor, ...]:
        twice, results = run(**inputs)
        return (twice, *results) if return_sum else (twice, results)

    inputs = {**make_inputs((3, 5, 8)), "seed": seed_tensor()}
    helpers.assert_compiled_equals_eager(flat, inputs)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_no_views(backend: str) -> None:
    x = torch.randn(2, 3, 8)
    before = x.clone()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            total = dropout_add(x, None, backend=backend)
            out, copy = dropout_add_layer_norm(x, None, copy_dtype=x.dtype, backend=backend)
        total.add_(1)
        copy.add_(1)
        assert torch.equal(x, before) and not torch.equal(out, copy)


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
