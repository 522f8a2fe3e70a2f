"""Dropout is the contract's: its decisions, its seeds, and which parts of a layer drop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import FusedEncoderLayer
from tests.layers.pairs import (
    BOTH,
    HEADS,
    HIDDEN,
    ORDERS,
    WIDTH,
    assert_equal_runs,
    given,
    gradients,
    name_of,
    pair,
    tokens,
)
from tests.reference import ReplayEncoderLayer


@BOTH
@ORDERS
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.Identity(), torch.tanh], ids=name_of)
def test_dropout_is_the_contracts(norm_first, batch_first, activation, contract_seeds):
    replay, fused = pair(
        dropout=0.3,
        norm_first=norm_first,
        batch_first=batch_first,
        activation=activation,
        stock=ReplayEncoderLayer,
    )
    replay.layer_index = fused.layer_index = 2
    src = tokens(3, 17)
    torch.manual_seed(9)
    expected = gradients(replay, src)
    torch.manual_seed(9)
    assert_equal_runs(gradients(fused, src), expected)
    replay.forced_seed = 11
    assert_equal_runs(gradients(fused, src, seed=given(11)), gradients(replay, src))


def test_decisions_do_not_depend_on_the_order_of_batch_and_sequence():
    first, second = (pair(dropout=0.3, batch_first=batch_first)[1] for batch_first in (True, False))
    second.load_state_dict(first.state_dict())
    src = tokens(3, 17)
    out = second(src.transpose(0, 1), seed=given(4)).transpose(0, 1)
    torch.testing.assert_close(out, first(src, seed=given(4)))


SITES = {"attention": 0.5, "activation": 0.5, "first residual": 0.5, "second residual": 0.5}


def set_probabilities(layer: nn.TransformerEncoderLayer, probabilities: dict[str, float]) -> None:
    layer.self_attn.dropout = probabilities["attention"]
    layer.dropout.p = probabilities["activation"]
    layer.dropout1.p = probabilities["first residual"]
    layer.dropout2.p = probabilities["second residual"]


@BOTH
def test_each_site_reads_its_own_probability_at_every_call(norm_first):
    replay, fused = pair(dropout=0.1, norm_first=norm_first, stock=ReplayEncoderLayer)
    replay.forced_seed = 5
    src = tokens(2, 9)
    seen = []
    for site in SITES:
        probabilities = dict.fromkeys(SITES, 0.0) | {site: SITES[site]}
        for layer in (replay, fused):
            set_probabilities(layer, probabilities)
        ours = gradients(fused, src, seed=given(5))
        assert_equal_runs(ours, gradients(replay, src))
        seen.append(ours["output"])
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@BOTH
@pytest.mark.parametrize("name", ["self_attn", "dropout", "dropout1", "dropout2"])
def test_one_submodule_in_eval_does_not_drop(norm_first, name):
    replay, fused = pair(dropout=0.4, norm_first=norm_first, stock=ReplayEncoderLayer)
    replay.forced_seed = 5
    if name == "self_attn":
        replay.self_attn.dropout = 0.0
    else:
        getattr(replay, name).p = 0.0
    getattr(fused, name).eval()
    src = tokens(2, 9)
    assert_equal_runs(gradients(fused, src, seed=given(5)), gradients(replay, src))


@BOTH
@pytest.mark.parametrize("name", ["self_attn", "dropout", "dropout1", "dropout2"])
def test_one_submodule_in_training_drops(norm_first, name):
    """As in stock (Monte Carlo dropout): the submodule's own mode counts, not the layer's."""
    replay, fused = pair(dropout=0.4, norm_first=norm_first, stock=ReplayEncoderLayer)
    replay.forced_seed = 5
    kept = {"self_attn": "attention", "dropout": "activation", "dropout1": "first residual"}
    site = kept.get(name, "second residual")
    set_probabilities(replay, dict.fromkeys(SITES, 0.0) | {site: 0.4})
    fused.eval()
    getattr(fused, name).train()
    src = tokens(2, 9)
    assert_equal_runs(gradients(fused, src, seed=given(5)), gradients(replay, src))


@BOTH
def test_everything_may_drop(norm_first):
    _, fused = pair(dropout=1.0, norm_first=norm_first)
    src = tokens(2, 9)
    found = gradients(fused, src)
    norms = (lambda x: x) if norm_first else (lambda x: fused.norm2(fused.norm1(x)))
    torch.testing.assert_close(found["output"], norms(src))
    for name in ("linear1.weight", "linear2.bias", "self_attn.in_proj_weight"):
        assert not found[name].any()


class SeedReads(TorchDispatchMode):
    """Counts draws from generators and refuses to read a tensor's value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not any(
            word in name for word in ("_local_scalar_dense", "nonzero", "aten::equal", "is_nonzero")
        ), f"{name} waits for the device"
        self.draws += "rand" in name or "bernoulli" in name
        return func(*args, **(kwargs or {}))


@BOTH
@pytest.mark.parametrize("masked", [False, True])
def test_one_draw_for_each_training_call_and_no_wait_for_the_device(norm_first, masked):
    layer = FusedEncoderLayer(WIDTH, HEADS, HIDDEN, norm_first=norm_first, batch_first=True)
    src = torch.randn(2, 5, WIDTH, requires_grad=True)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    padding = torch.zeros(2, 5)
    for arguments in ((None, None), (causal, padding), (causal, None, True)) if masked else ((),):
        with SeedReads() as mode:
            layer(src, *arguments).sum().backward()
        assert mode.draws == 1
        with SeedReads() as mode, torch.no_grad():
            layer.eval()(src, *arguments)
        assert mode.draws == 0
        layer.train()
        with SeedReads() as mode:
            layer(src, *arguments, seed=given(1))
        assert mode.draws == 0


def test_seeds_follow_torchs_generator():
    layer = FusedEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)
    src = torch.randn(2, 5, WIDTH)
    first, second = layer(src), layer(src)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    third = layer(src)
    torch.manual_seed(1)
    assert torch.equal(layer(src), third)
    assert torch.equal(layer(src, seed=given(7)), layer(src, seed=given(7)))
    assert not torch.equal(layer(src, seed=given(7)), layer(src, seed=given(8)))
    other = copy.deepcopy(layer)
    other.layer_index = 1
    assert not torch.equal(layer(src, seed=given(7)), other(src, seed=given(7)))


def test_evaluation_leaves_the_generator_alone():
    for layer in (
        FusedEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.5).eval(),
        FusedEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0),
    ):
        state = torch.get_rng_state()
        layer(torch.randn(5, 2, WIDTH))
        torch.set_rng_state(state)
        torch.randn(5, 2, WIDTH)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        src = torch.randn(5, 2, WIDTH)
        layer(src)
        assert torch.equal(torch.get_rng_state(), after)
