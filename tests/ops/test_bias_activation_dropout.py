"""``bias_activation_dropout``, what does not depend on the backend.

bias_activation_dropout_checks.py has the rest.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import bias_activation_dropout
from fastattn.arguments import TokenDropout
from tests import helpers
from tests.ops.bias_activation_dropout_checks import EAGER, LAYOUTS, SEED, P, seed_tensor

SEEDS = {"contract": SEED, "twister": -7}


# --------------------------------------------------------- derivatives of every order and mode


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_gradients_of_every_order(seed: int, activation: str) -> None:
    x, bias = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    ours = partial(
        bias_activation_dropout, activation=activation, dropout_p=0.3, seed=seed_tensor(seed)
    )
    helpers.assert_gradients_of_every_order(ours, x, bias)


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_gradients_per_sample(seed: int) -> None:
    bias, samples = (torch.randn(*s, dtype=torch.float64) for s in ((8,), (3, 5, 8)))
    options = {"activation": "silu", "dropout_p": 0.3, "seed": seed_tensor(seed)}
    ours = partial(bias_activation_dropout, bias=bias, **options)
    helpers.assert_per_sample_gradients(ours, samples)


# -------------------------------------------------------------- registration, compile, memory


def op_samples() -> dict[str, list[tuple[Any, ...]]]:
    hidden, bias = torch.randn(3, 5, 12), torch.randn(12)
    x = LAYOUTS["transposed"](hidden)
    dropout = TokenDropout(0.1, seed_tensor(), 1, None, 5)
    packed = TokenDropout(0.1, seed_tensor(), 1, torch.arange(15).int(), 5, False, 3)
    return {
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
    helpers.assert_registered(name, *op_samples()[name])


def test_every_registered_op_has_samples() -> None:
    assert helpers.registered_ops("bias_activation") == set(op_samples())


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_agree(layout: str, activation: str, dropout_p: float) -> None:
    def run(x: Tensor, bias: Tensor, seed: Tensor) -> Tensor:
        options = {"activation": activation, "dropout_p": dropout_p, "seed": seed}
        return bias_activation_dropout(x, bias, **options)

    helpers.assert_fakes_agree(run, LAYOUTS[layout](torch.randn(3, 5, 40)), torch.randn(40))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_compiled_of_sequences_side_by_side(dropout_p: float, activation: str) -> None:
    def run(input: Tensor, seed: Tensor) -> Tensor:
        options = {"activation": activation, "dropout_p": dropout_p, "seed": seed}
        return bias_activation_dropout(input.transpose(0, 1), **options, batch_first=False)

    inputs = {"input": torch.randn(3, 5, 8), "seed": seed_tensor()}
    helpers.assert_compiled_equals_eager(run, inputs)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("activation", EAGER)
def test_bytes_kept_for_backward(activation: str, dropout_p: float) -> None:
    x, bias = (torch.randn(s, requires_grad=True) for s in ((4, 64, 128), (128,)))
    seed = seed_tensor()
    options = {"activation": activation, "dropout_p": dropout_p, "seed": seed}
    saved = helpers.saved_bytes(lambda: bias_activation_dropout(x, bias, **options))
    assert saved <= helpers.nbytes(x, bias, seed)


# ------------------------------------------------------------------------------------- arguments

ROWS = torch.arange(6, dtype=torch.int32)
WRONG_ARGUMENTS = {
    "input, integers": (dict(input=torch.zeros(2, 3, 8).int()), ValueError, "input"),
    "bias, shape": (dict(bias=torch.zeros(7)), ValueError, "bias"),
    "bias, integers": (dict(bias=torch.zeros(8).int()), ValueError, "bias"),
    "activation": (dict(activation="tanh"), ValueError, "activation"),
    "dropout_p": (dict(dropout_p=-0.1, seed=seed_tensor()), ValueError, "dropout_p"),
    "dropout_p, type": (dict(dropout_p=None), TypeError, "dropout_p"),
    "seed, missing": (dict(dropout_p=0.1), ValueError, "seed"),
    "seed, integer": (dict(dropout_p=0.1, seed=7), TypeError, "seed"),
    "seed, dtype": (dict(seed=seed_tensor().int()), ValueError, "seed"),
    "site": (dict(site=2**16), ValueError, "site"),
    "site, type": (dict(site="1"), TypeError, "site"),
    "row_index, dtype": (dict(row_index=ROWS.long(), row_period=3), ValueError, "row_index"),
    "row_index, shape": (dict(row_index=ROWS[:5], row_period=3), ValueError, "row_index"),
    "column_offset": (dict(column_offset=-1), ValueError, "column_offset"),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(case: str) -> None:
    arguments, error, name = WRONG_ARGUMENTS[case]
    with pytest.raises(error, match=rf"\b{name}\b"):
        bias_activation_dropout(**{"input": torch.zeros(2, 3, 8), **arguments})


def test_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match="triton.*bias_activation_dropout.*(kernel|cuda)"):
        bias_activation_dropout(torch.zeros(2, 8), backend="triton")
