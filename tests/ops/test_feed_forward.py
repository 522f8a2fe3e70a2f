"""``feed_forward``, what does not depend on the backend; feed_forward_checks.py has the rest."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import feed_forward
from fastattn.arguments import TokenDropout
from fastattn.ops import feed_forward as op
from tests import helpers
from tests.ops.backends import Backend
from tests.ops.feed_forward_checks import (
    EAGER,
    LAYOUTS,
    SEED,
    P,
    check,
    make_inputs,
    seed_tensor,
)

SEEDS = {"contract": SEED, "twister": -7}


# -------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_accuracy_of_sums_over_many_chunks(dtype: torch.dtype) -> None:
    check(Backend("pytorch"), make_inputs((2, 500, 16), dtype=dtype), chunk_tokens=10)


@pytest.mark.parametrize("chunk_tokens", [189, 10**6])
def test_one_chunk_is_the_whole(chunk_tokens: int) -> None:
    inputs = make_inputs()
    ours = partial(feed_forward, dropout_p=P, seed=seed_tensor())
    whole = helpers.results_of(ours, inputs)
    helpers.assert_same(helpers.results_of(partial(ours, chunk_tokens=chunk_tokens), inputs), whole)


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


# --------------------------------------------------------- derivatives of every order and mode


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_gradients_of_every_order(seed: int, activation: str) -> None:
    inputs = make_inputs((2, 3, 3), 5, 2, torch.float64)
    ours = partial(feed_forward, activation=activation, dropout_p=0.3, seed=seed_tensor(seed))
    helpers.assert_gradients_of_every_order(ours, *inputs.values())


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
    }


@pytest.mark.parametrize("name", op_samples())
def test_registration(name: str) -> None:
    helpers.assert_registered(name, *op_samples()[name])


def test_every_registered_op_has_samples() -> None:
    assert helpers.registered_ops("feed_forward") == set(op_samples())


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


@pytest.mark.parametrize("activation, save", [("relu", "hidden"), ("gelu", "input")])
@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_compiled_equals_eager(dropout_p: float, activation: str, save: str) -> None:
    def run(input: Tensor, seed: Tensor, **weights: Tensor) -> Tensor:
        options = {"activation": activation, "dropout_p": dropout_p, "seed": seed, "save": save}
        return feed_forward(input.sin(), **weights, **options)

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


def test_a_backend_that_cannot_run_says_why() -> None:
    inputs = make_inputs()
    with pytest.raises(RuntimeError, match="triton.*feed_forward.*(kernel|cuda)"):
        feed_forward(**inputs, backend="triton")
    assert torch.equal(feed_forward(**inputs, backend="pytorch"), feed_forward(**inputs))
