"""``feed_forward`` and ``bias_activation_dropout`` against float64, dropping the same elements."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import bias_activation_dropout, feed_forward
from fastattn.arguments import TokenDropout
from fastattn.ops import feed_forward as op
from tests import helpers, reference
from tests.ops.feed_forward_checks import (
    EAGER,
    LAYOUTS,
    SEED,
    SITE,
    P,
    check,
    drop,
    keep_of,
    make_inputs,
    seed_tensor,
)

SEEDS = {"contract": SEED, "twister": -7}


# ---------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("save", ["hidden", "input"])
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_accuracy_of_dtypes(
    dtype: torch.dtype, activation: str, dropout_p: float, save: str
) -> None:
    check(make_inputs(dtype=dtype), dropout_p, activation, save=save)


SHAPES = [(40,), (1, 40), (63, 40), (1, 1, 40), (2, 127, 8), (1, 1000, 8), (3, 7, 1)]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_of_shapes(shape: tuple[int, ...], dropout_p: float, activation: str) -> None:
    check(make_inputs(shape), dropout_p, activation)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("d_ff", [1, 8, 64, 1000])
def test_accuracy_of_widths(d_ff: int, dropout_p: float) -> None:
    check(make_inputs((2, 5, 16), d_ff, d_out=1), dropout_p, "gelu")


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
def test_without_biases(activation: str, dropout_p: float) -> None:
    check({**make_inputs(), "bias1": None, "bias2": None}, dropout_p, activation)


@pytest.mark.parametrize("save", ["hidden", "input"])
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_layouts(layout: str, dropout_p: float, save: str) -> None:
    inputs = make_inputs()
    inputs["input"] = LAYOUTS[layout](inputs["input"])
    inputs["weight1"] = inputs["weight1"].t().contiguous().t()
    inputs["weight2"] = inputs["weight2"].repeat_interleave(2, 1)[:, ::2]
    check(inputs, dropout_p, "gelu", save=save)
    check(inputs, dropout_p, "relu", batch_first=False, save=save)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("shape", [(0, 40), (0, 5, 40), (2, 0, 40)], ids=str)
def test_no_rows(shape: tuple[int, ...], dropout_p: float) -> None:
    ours = partial(feed_forward, dropout_p=dropout_p, seed=seed_tensor())
    results = helpers.results_of(ours, make_inputs(shape))
    assert results["output 0"].shape == (*shape[:-1], 24)
    assert all((x == 0).all() for x in results.values())


@pytest.mark.parametrize("activation", EAGER)
def test_save_levels_are_equal(activation: str) -> None:
    inputs = make_inputs()
    options = {"activation": activation, "dropout_p": P, "seed": seed_tensor()}
    hidden, input = (
        helpers.results_of(partial(feed_forward, save=save, **options), inputs)
        for save in ("hidden", "input")
    )
    helpers.assert_same(input, hidden)


@pytest.mark.parametrize("wanted", ["input", "weight1", "bias1", "weight2", "bias2"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_one_gradient_alone(activation: str, wanted: str) -> None:
    inputs = make_inputs()
    ours = partial(feed_forward, activation=activation, dropout_p=P, seed=seed_tensor())
    everything = helpers.results_of(ours, inputs)
    rest = {name: x for name, x in inputs.items() if name != wanted}
    alone = helpers.results_of(partial(ours, **rest), {wanted: inputs[wanted]})
    name = f"gradient of {wanted}"
    assert torch.equal(alone[name], everything[name])


# -------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("chunk_tokens", [1, 64, 100, 188])
@pytest.mark.parametrize("save", ["hidden", "input"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_accuracy_of_chunks(activation: str, save: str, chunk_tokens: int) -> None:
    check(make_inputs(), P, activation, False, save=save, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_accuracy_of_sums_over_many_chunks(dtype: torch.dtype) -> None:
    check(make_inputs((2, 500, 16), dtype=dtype), P, "gelu", chunk_tokens=10)


@pytest.mark.parametrize("chunk_tokens", [189, 10**6])
def test_one_chunk_is_the_whole(chunk_tokens: int) -> None:
    inputs = make_inputs()
    ours = partial(feed_forward, dropout_p=P, seed=seed_tensor())
    whole = helpers.results_of(ours, inputs)
    helpers.assert_same(helpers.results_of(partial(ours, chunk_tokens=chunk_tokens), inputs), whole)


def test_chunks_of_packed_rows() -> None:
    inputs = make_inputs((50, 40))
    rows = {"row_index": torch.randperm(200)[:50].int(), "row_period": 20}
    ours = partial(feed_forward, activation="silu", dropout_p=P, seed=seed_tensor(), **rows)
    whole, chunks = (
        helpers.results_of(partial(ours, chunk_tokens=size), inputs) for size in (None, 7)
    )
    helpers.assert_close(chunks, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", [-1, -7, -(2**63)])
def test_chunks_of_the_twister_differ_and_are_replayed(seed: int) -> None:
    """Its decisions know no rows: each chunk has its own, and backward the same again."""
    inputs = make_inputs((2, 6, 3), 5, 2, torch.float64)
    inputs["input"] = inputs["input"][:1, :1].expand(2, 6, 3)
    ours = partial(
        feed_forward, activation="gelu", dropout_p=0.5, seed=seed_tensor(seed), chunk_tokens=4
    )
    out = ours(**inputs).view(3, 4, 2)
    assert not torch.equal(out[0], out[1]) and not torch.equal(out[1], out[2])
    weights = [inputs[name].requires_grad_() for name in ("weight1", "bias1", "weight2")]
    assert torch.autograd.gradcheck(lambda *x: ours(inputs["input"], *x), weights)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_second_derivatives_of_chunks(seed: int, activation: str) -> None:
    """Made from chunks that drop what forward's dropped."""
    inputs = make_inputs((5, 3), 4, 2, torch.float64)
    ours = partial(
        feed_forward,
        activation=activation,
        dropout_p=0.5,
        seed=seed_tensor(seed),
        chunk_tokens=2,
    )
    helpers.assert_gradients_of_every_order(ours, *inputs.values())
    leaves = [x.requires_grad_() for x in inputs.values()]
    plain, differentiable = (
        torch.autograd.grad(ours(*leaves).sin().sum(), leaves, create_graph=create_graph)
        for create_graph in (False, True)
    )
    torch.testing.assert_close(differentiable, plain)


def test_a_strided_row_index() -> None:
    inputs = make_inputs((50, 40))
    index = torch.randperm(200)[:50].int()
    options = {"row_period": 20, "dropout_p": P, "seed": seed_tensor()}
    strided = index.repeat_interleave(2)[::2]
    found = feed_forward(**inputs, row_index=strided, **options)
    assert torch.equal(found, feed_forward(**inputs, row_index=index, **options))


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation inside returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        found = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        owned = [x for x in found if not x._is_view()]
        self.elements = max([self.elements, *(x.numel() for x in owned)])
        return result


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_chunks_cap_temporary_tensors(activation: str) -> None:
    """No tensor has more rows of hidden features than a chunk, where backward recomputes."""
    inputs = list(make_inputs((512, 8), 64, 8).values())
    options = (activation, *TokenDropout(P, seed_tensor(), row_period=512), "input")
    limit = 32 * 64
    for chunk_tokens, capped in ((0, False), (32, True)):
        with LargestTensor() as forward:
            op._forward(*inputs, *options, chunk_tokens, "pytorch")
        with LargestTensor() as backward:
            arguments = (torch.ones(512, 8), *inputs[:4], torch.empty(0), [True] * 5)
            op._backward(*arguments, *options, chunk_tokens, "pytorch")
        for largest in (forward.elements, backward.elements):
            assert (largest <= max(limit, 512 * 8)) is capped


# ------------------------------------------------------------------- dropout at its two ends


@pytest.mark.parametrize("activation", EAGER)
def test_everything_dropped_leaves_the_second_bias(activation: str) -> None:
    inputs = make_inputs()
    ours = partial(feed_forward, activation=activation, dropout_p=1.0, seed=seed_tensor())
    results = helpers.results_of(ours, inputs)
    assert torch.equal(results["output 0"], inputs["bias2"].expand(3, 63, 24))
    for name in ("input", "weight1", "bias1", "weight2"):
        assert (results[f"gradient of {name}"] == 0).all()


@pytest.mark.parametrize("activation", EAGER)
def test_a_probability_that_rounds_to_zero_drops_nothing(activation: str) -> None:
    inputs = make_inputs()
    ours = partial(feed_forward, activation=activation)
    tiny = helpers.results_of(partial(ours, dropout_p=3e-5, seed=seed_tensor()), inputs)
    helpers.assert_same(tiny, helpers.results_of(ours, inputs))


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("activation", EAGER)
def test_nan_stays_in_its_row(activation: str, dropout_p: float) -> None:
    inputs = make_inputs()
    inputs["input"][1, 4, 3] = float("nan")
    out = feed_forward(**inputs, activation=activation, dropout_p=dropout_p, seed=seed_tensor())
    assert out[1, 4].isnan().all()
    assert out.isnan().any(-1).sum() == 1


def test_the_scale_is_exact_in_half_precision() -> None:
    """1 / 0.9 is no bf16 number: the product is rounded, not the factor."""
    mantissas = 1 + torch.arange(128) / 128  # every bf16 number in [1, 2)
    rows = mantissas.bfloat16().expand(50, 128)
    out = bias_activation_dropout(rows, dropout_p=0.1, seed=seed_tensor())
    exact = (mantissas.double() * 16384 / (16384 - 1638)).bfloat16()
    kept = out != 0
    assert torch.equal(out[kept], exact.expand(50, 128)[kept])
    rounded = mantissas.bfloat16() * torch.tensor(16384 / (16384 - 1638)).bfloat16()
    assert not torch.equal(rounded, exact)


# --------------------------------------------------------------------- rows, packed and sharded


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_rows_drop_what_padded_rows_drop(batch_first: bool) -> None:
    lengths = torch.tensor([7, 0, 33, 1])
    real = torch.arange(33) < lengths[:, None]  # (B, S)
    tokens = torch.randn(4, 33, 16)
    if not batch_first:
        real, tokens = real.t(), tokens.transpose(0, 1).contiguous()
    inputs = make_inputs((41, 16), 200)
    inputs.pop("input")
    rows = real.flatten().nonzero().flatten().to(torch.int32)
    options = {"batch_first": batch_first, "dropout_p": P, "seed": seed_tensor()}

    def packed(input: Tensor, **weights: Tensor) -> Tensor:
        period = real.shape[1]
        return feed_forward(input, **weights, row_index=rows, row_period=period, **options)

    def padded(input: Tensor, **weights: Tensor) -> Tensor:
        return feed_forward(tokens.masked_scatter(real[..., None], input), **weights, **options)[
            real
        ]

    inputs = {"input": tokens[real], **inputs}
    actual, expected = helpers.results_of(packed, inputs), helpers.results_of(padded, inputs)
    expected["gradient of bias2"] = actual["gradient of bias2"]
    helpers.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_batch_first_or_not_drops_the_same() -> None:
    inputs = make_inputs((3, 63, 40))
    ours = partial(feed_forward, dropout_p=P, seed=seed_tensor())
    batch = ours(**inputs)
    inputs["input"] = inputs["input"].transpose(0, 1)
    torch.testing.assert_close(ours(**inputs, batch_first=False).transpose(0, 1), batch)


@pytest.mark.parametrize("split", [1, 63, 64, 100])
def test_a_sharded_hidden_dimension_drops_the_same(split: int) -> None:
    x = torch.randn(3, 5, 150)
    options = {"activation": "gelu", "dropout_p": P, "seed": seed_tensor()}
    whole = bias_activation_dropout(x, **options)
    left = bias_activation_dropout(x[..., :split], **options)
    right = bias_activation_dropout(x[..., split:], column_offset=split, **options)
    sharded = torch.cat((left, right), -1)
    assert torch.equal(sharded == 0, whole == 0)
    torch.testing.assert_close(sharded, whole)


# -------------------------------------------------------------------- bias_activation_dropout


def eager_middle(
    input: Tensor, bias: Tensor | None, *, activation: str, keep: Tensor | None, dropout_p: float
) -> Tensor:
    return drop(EAGER[activation](input if bias is None else input + bias), keep, dropout_p)


def oracle_middle(
    input: Tensor, bias: Tensor | None, *, activation: str, multiplier: Tensor | None
) -> Tensor:
    hidden = reference.ACTIVATIONS[activation](input if bias is None else input + bias)
    return hidden if multiplier is None else hidden * multiplier.view(hidden.shape)


def check_middle(
    input: Tensor, bias: Tensor | None, dropout_p: float, activation: str = "gelu"
) -> None:
    keep = keep_of(input.shape, input.shape[-1], dropout_p) if dropout_p else None
    multiplier = None if keep is None else reference.factor(keep, dropout_p)
    options = {"activation": activation, "dropout_p": dropout_p}
    helpers.assert_as_accurate_as_eager(
        partial(bias_activation_dropout, seed=seed_tensor(), site=SITE, **options),
        partial(eager_middle, keep=keep, **options),
        partial(oracle_middle, activation=activation, multiplier=multiplier),
        {"input": input, "bias": bias},
    )


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_middle_accuracy_of_dtypes(dtype: torch.dtype, activation: str, dropout_p: float) -> None:
    input, bias = torch.randn(3, 63, 127).to(dtype), torch.randn(127).to(dtype)
    check_middle(input, bias, dropout_p, activation)
    check_middle(input, None, dropout_p, activation)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_middle_accuracy_of_layouts(layout: str, dropout_p: float) -> None:
    input = LAYOUTS[layout](torch.randn(3, 63, 40))
    check_middle(input, torch.randn(80)[::2], dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("shape", [(7,), (1, 1), (1, 1000), (0, 8), (2, 0, 8)], ids=str)
def test_middle_accuracy_of_shapes(shape: tuple[int, ...], dropout_p: float) -> None:
    check_middle(torch.randn(shape), torch.randn(shape[-1]), dropout_p, "relu")


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_middle_promotes(dropout_p: float) -> None:
    inputs = {"input": torch.randn(3, 5, 8).bfloat16(), "bias": torch.randn(8)}
    ours = partial(bias_activation_dropout, dropout_p=dropout_p, seed=seed_tensor())
    assert helpers.results_of(ours, inputs)["output 0"].dtype == torch.float32


# --------------------------------------------------------- derivatives of every order and mode


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_gradients_of_every_order(seed: int, activation: str) -> None:
    inputs = make_inputs((2, 3, 3), 5, 2, torch.float64)
    ours = partial(feed_forward, activation=activation, dropout_p=0.3, seed=seed_tensor(seed))
    helpers.assert_gradients_of_every_order(ours, *inputs.values())
    middle = partial(
        bias_activation_dropout, activation=activation, dropout_p=0.3, seed=seed_tensor(seed)
    )
    x, bias = torch.randn(2, 3, 5, dtype=torch.float64), inputs["bias1"]
    helpers.assert_gradients_of_every_order(middle, x, bias)


def test_gradients_without_dropout() -> None:
    inputs = make_inputs((2, 3, 3), 5, 2, torch.float64)
    helpers.assert_gradients_of_every_order(
        partial(feed_forward, activation="gelu"), *inputs.values()
    )


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_tied_weights(seed: int) -> None:
    """Gradients that can be differentiated again count each path once."""

    def tied(x: Tensor, weight: Tensor) -> Tensor:
        options = {"activation": "gelu", "dropout_p": 0.3, "seed": seed_tensor(seed)}
        return feed_forward(x, weight, None, weight.t(), **options)

    x, weight = (torch.randn(s, dtype=torch.float64) for s in ((4, 3), (5, 3)))
    helpers.assert_gradients_of_every_order(tied, x, weight)


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_gradients_per_sample(seed: int) -> None:
    inputs = make_inputs((5, 8), 12, 4, torch.float64)
    samples = torch.randn(3, 5, 8, dtype=torch.float64)
    inputs.pop("input")
    ours = partial(feed_forward, **inputs, activation="silu", dropout_p=0.3, seed=seed_tensor(seed))
    helpers.assert_per_sample_gradients(ours, samples)


# -------------------------------------------------------------- registration, compile, memory


def op_samples() -> dict[str, list[tuple[Any, ...]]]:
    inputs = make_inputs((3, 5, 8), 12, 4)
    inputs["input"] = LAYOUTS["transposed"](inputs["input"])
    input, weight1, bias1, weight2, bias2 = inputs.values()
    dropout = TokenDropout(0.1, seed_tensor(), 1, None, 5)
    packed = TokenDropout(0.1, seed_tensor(), 1, torch.arange(15).int(), 5, False, 3)
    grad, hidden = torch.randn(3, 5, 4), torch.randn(3, 5, 12)
    x, bias = LAYOUTS["transposed"](hidden), bias1
    keep, again = ("hidden", 0, "pytorch"), ("input", 4, "pytorch")
    nothing = torch.empty(0)
    forward = (input, weight1, bias1, weight2)
    some = [True, False, True, True, False]
    return {
        "feed_forward_fwd": [
            (*forward, bias2, "relu", *dropout, *keep),
            (*forward, None, "gelu", *packed, *again),
        ],
        "feed_forward_bwd": [
            (grad, *forward, hidden.relu(), [True] * 5, "relu", *dropout, *keep),
            (grad, *forward, nothing, some, "gelu", *packed, *again),
        ],
        "bias_activation_dropout_fwd": [
            (x, bias, "relu", *dropout, "pytorch"),
            (x, None, "identity", *packed, "pytorch"),
            (x, None, "identity", *TokenDropout(), "pytorch"),
        ],
        "bias_activation_dropout_bwd": [
            (x, x, bias, True, "silu", *dropout, "pytorch"),
            (x, hidden, None, False, "identity", *TokenDropout(), "pytorch"),
        ],
    }


@pytest.mark.parametrize("name", op_samples())
def test_registration(name: str) -> None:
    for sample in op_samples()[name]:
        torch.library.opcheck(getattr(torch.ops.fastattn, name).default, sample)


def test_every_registered_op_has_samples() -> None:
    assert helpers.registered_ops("feed_forward", "bias_activation") == set(op_samples())


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_agree(layout: str, activation: str, dropout_p: float) -> None:
    options = {"activation": activation, "dropout_p": dropout_p}
    inputs = make_inputs((3, 5, 8), 12, 4)
    inputs["input"] = LAYOUTS[layout](inputs["input"])
    helpers.assert_fakes_agree(
        lambda *x: feed_forward(*x[:-1], seed=x[-1], **options), *inputs.values()
    )
    helpers.assert_fakes_agree(
        lambda x, bias, seed: bias_activation_dropout(x, bias, seed=seed, **options),
        inputs["input"],
        torch.randn(8),
    )


@pytest.mark.parametrize("activation, save", [("relu", "hidden"), ("gelu", "input")])
@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_compiled_equals_eager(dropout_p: float, activation: str, save: str) -> None:
    def run(input: Tensor, weight1: Tensor, seed: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor]:
        options = {"activation": activation, "dropout_p": dropout_p, "seed": seed}
        middle = bias_activation_dropout(input.transpose(0, 1), **options, batch_first=False)
        return feed_forward(input.sin(), weight1, **rest, **options, save=save), middle

    inputs = {**make_inputs((3, 5, 8), 12, 4), "seed": seed_tensor()}
    helpers.assert_compiled_equals_eager(run, inputs)


def test_compiled_for_any_length() -> None:
    def run(input: Tensor, seed: Tensor, **weights: Tensor) -> Tensor:
        return feed_forward(input, **weights, activation="gelu", dropout_p=P, seed=seed)

    weights = make_inputs((3, 5, 8), 12, 4)
    samples = [
        {**weights, "input": torch.randn(*size, 8), "seed": seed_tensor()}
        for size in ((3, 5), (4, 9), (7, 6))
    ]
    helpers.assert_compiled_equals_eager(run, *samples, dynamic=True)


@helpers.needs_compiler
def test_inductor_equals_eager() -> None:
    def run(input: Tensor, seed: Tensor, **weights: Tensor) -> Tensor:
        return feed_forward(input.sin(), **weights, dropout_p=P, seed=seed).cos()

    inputs = {**make_inputs((3, 5, 8), 12, 4), "seed": seed_tensor()}
    helpers.assert_compiled_equals_eager(run, inputs, backend="inductor")


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("activation", EAGER)
def test_bytes_kept_for_backward(activation: str, dropout_p: float) -> None:
    inputs = {name: x.requires_grad_() for name, x in make_inputs((4, 64, 32), 128, 32).items()}
    seed = seed_tensor()
    options = {"activation": activation, "dropout_p": dropout_p, "seed": seed}
    least = helpers.nbytes(*inputs.values(), seed)
    hidden = 4 * 64 * 128 * 4
    saved = helpers.saved_bytes(lambda: feed_forward(**inputs, **options))
    assert saved == least + hidden
    saved = helpers.saved_bytes(lambda: feed_forward(**inputs, **options, save="input"))
    assert saved == least
    h, bias = torch.randn(4, 64, 128, requires_grad=True), inputs["bias1"]
    saved = helpers.saved_bytes(lambda: bias_activation_dropout(h, bias, **options))
    assert saved <= helpers.nbytes(h, bias, seed)


# ------------------------------------------------------------------------ autocast, arguments


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_autocast(dropout_p: float) -> None:
    inputs = make_inputs()
    ours = partial(feed_forward, activation="gelu", dropout_p=dropout_p, seed=seed_tensor())
    low = {name: x.bfloat16() for name, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        cast = helpers.results_of(ours, inputs)
        inference = torch.no_grad()(ours)(**inputs)
        double = ours(**make_inputs(dtype=torch.float64))
    assert cast["output 0"].dtype == inference.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    for name, x in helpers.results_of(ours, low).items():
        assert torch.equal(cast[name].bfloat16(), x), name


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_inference_equals_training(dropout_p: float) -> None:
    inputs = make_inputs()
    ours = partial(feed_forward, dropout_p=dropout_p, seed=seed_tensor())
    with torch.no_grad():
        inference = ours(**inputs)
    assert torch.equal(inference, helpers.results_of(ours, inputs)["output 0"])


ROWS = torch.arange(6, dtype=torch.int32)
WRONG_ARGUMENTS = {
    "input, integers": (dict(input=torch.zeros(2, 3, 8).int()), ValueError, "input"),
    "input, no dimension": (dict(input=torch.tensor(1.0)), ValueError, "input"),
    "weight1, shape": (dict(weight1=torch.zeros(12, 7)), ValueError, "weight1"),
    "weight1, dtype": (dict(weight1=torch.zeros(12, 8).double()), ValueError, "weight1"),
    "bias1, shape": (dict(bias1=torch.zeros(4)), ValueError, "bias1"),
    "bias1, dtype": (dict(bias1=torch.zeros(12).half()), ValueError, "bias1"),
    "weight2, shape": (dict(weight2=torch.zeros(12, 4)), ValueError, "weight2"),
    "weight2, device": (dict(weight2=torch.zeros(4, 12, device="meta")), ValueError, "weight2"),
    "bias2, shape": (dict(bias2=torch.zeros(12)), ValueError, "bias2"),
    "activation": (dict(activation="tanh"), ValueError, "activation"),
    "save": (dict(save="output"), ValueError, "save"),
    "chunk_tokens": (dict(chunk_tokens=0), ValueError, "chunk_tokens"),
    "chunk_tokens, type": (dict(chunk_tokens=4.0), TypeError, "chunk_tokens"),
    "backend": (dict(backend="cuda"), ValueError, "backend"),
    "dropout_p": (dict(dropout_p=-0.1, seed=seed_tensor()), ValueError, "dropout_p"),
    "dropout_p, type": (dict(dropout_p=None), TypeError, "dropout_p"),
    "seed, missing": (dict(dropout_p=0.1), ValueError, "seed"),
    "seed, integer": (dict(dropout_p=0.1, seed=7), TypeError, "seed"),
    "seed, dtype": (dict(seed=seed_tensor().int()), ValueError, "seed"),
    "site": (dict(site=2**16), ValueError, "site"),
    "site, type": (dict(site="1"), TypeError, "site"),
    "row_index, dtype": (dict(row_index=ROWS.long(), row_period=3), ValueError, "row_index"),
    "row_index, shape": (dict(row_index=ROWS[:5], row_period=3), ValueError, "row_index"),
    "row_period, missing": (dict(row_index=ROWS), ValueError, "row_period"),
    "row_period": (dict(row_period=-1), ValueError, "row_period"),
    "column_offset": (dict(column_offset=-1), ValueError, "column_offset"),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(case: str) -> None:
    arguments, error, name = WRONG_ARGUMENTS[case]
    with pytest.raises(error, match=rf"\b{name}\b"):
        feed_forward(**{**make_inputs((2, 3, 8), 12, 4), **arguments})
    if name in ("activation", "dropout_p", "seed", "site", "row_index", "column_offset"):
        with pytest.raises(error, match=rf"\b{name}\b"):
            bias_activation_dropout(torch.zeros(2, 3, 8), **arguments)


def test_wrong_arguments_of_the_middle_are_named() -> None:
    x = torch.zeros(2, 3, 8)
    for bias in (torch.zeros(7), torch.zeros(8).int()):
        with pytest.raises(ValueError, match="bias"):
            bias_activation_dropout(x, bias)
    with pytest.raises(ValueError, match="input"):
        bias_activation_dropout(x.int())


def test_a_backend_that_cannot_run_says_why() -> None:
    inputs = make_inputs()
    with pytest.raises(RuntimeError, match="triton.*feed_forward.*(kernel|cuda)"):
        feed_forward(**inputs, backend="triton")
    with pytest.raises(RuntimeError, match="triton.*bias_activation_dropout.*(kernel|cuda)"):
        bias_activation_dropout(inputs["input"], backend="triton")
    assert torch.equal(feed_forward(**inputs, backend="pytorch"), feed_forward(**inputs))
