"""What a layer keeps for backward, by level, and that the levels give the same."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from fastattn import FusedEncoderLayer, FusedLayerNorm, dropout_add_layer_norm
from fastattn.layers import encoder_layer
from fastattn.pytorch import feed_forward as in_pytorch
from tests import helpers
from tests.layers.pairs import BOTH, WIDTH, assert_equal_runs, gradients, pair, tokens


@BOTH
def test_lean_layers_keep_results_of_norms_and_give_the_same(norm_first):
    stock, layer = pair(norm_first=norm_first)
    with torch.no_grad():
        for each in (stock, layer):
            for norm in (each.norm1, each.norm2):
                norm.weight.fill_(1.5)
                norm.bias.fill_(-0.5)
    src = tokens(3, 9)
    default = helpers.saved_bytes(lambda: layer(src))
    expected = gradients(layer, src)
    layer.save = "lean"
    assert layer._from_output == {"norm1", "norm2"}
    assert_equal_runs(gradients(layer, src), expected)
    assert_equal_runs(gradients(layer, src), gradients(stock, src))
    kept = []  # the result itself counts: the next layer keeps it

    def run():
        kept.append(layer(src))

    rows = 3 * 9 * src.itemsize
    saved = helpers.saved_bytes(run)
    if norm_first:  # x and the sum of x and the first branch, no more; two means
        assert saved == default - 2 * rows * WIDTH - 2 * rows
    else:  # two sums, of which the result takes the place of one
        assert saved == default - rows * WIDTH - 2 * rows


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@BOTH
def test_recomputing_layers_keep_no_hidden_features_and_give_the_same(norm_first, activation):
    _, layer = pair(norm_first=norm_first, activation=activation)
    src = tokens(3, 9)
    layer.save = "lean"
    lean, expected = helpers.saved_bytes(lambda: layer(src)), gradients(layer, src)
    layer.save = "recompute"
    hidden = 3 * 9 * layer.linear1.out_features * src.itemsize
    assert helpers.saved_bytes(lambda: layer(src)) == lean - hidden
    assert_equal_runs(gradients(layer, src), expected)
    for tokens_at_a_time in (4, 27, None):
        layer.chunk_tokens = tokens_at_a_time
        assert_equal_runs(gradients(layer, src), expected)
    twin = pickle.loads(pickle.dumps(layer))
    assert (twin.save, twin.chunk_tokens) == ("recompute", None)


def test_inference_in_chunks_has_no_more_rows_at_once(monkeypatch):
    _, layer = pair()
    layer.eval()
    src, rows = tokens(3, 9), []
    with torch.no_grad():
        expected = layer(src)
        layer.chunk_tokens = 4
        forward = in_pytorch.feed_forward_forward

        def counting(x: Tensor, *rest: object) -> None:
            rows.append(x.shape[0])
            forward(x, *rest)

        monkeypatch.setattr(in_pytorch, "feed_forward_forward", counting)
        torch.testing.assert_close(layer(src), expected)
    assert rows == [4, 4, 4, 4, 4, 4, 3]


def test_wrong_chunks_are_named():
    for wrong, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="chunk_tokens"):
            FusedEncoderLayer(16, 2, chunk_tokens=wrong)
    layer = FusedEncoderLayer(16, 2, chunk_tokens=3)
    with pytest.raises(ValueError, match="chunk_tokens"):
        layer.chunk_tokens = 0
    assert layer.chunk_tokens == 3


def test_what_norms_keep_under_autocast(monkeypatch):
    """A copy if the layer is asked to be lean; a norm that is asked to keeps its whole result."""
    kept = []

    def spy(*args, save, **kwargs):
        kept.append(save)
        return dropout_add_layer_norm(*args, save=save, **kwargs)

    monkeypatch.setattr(encoder_layer, "dropout_add_layer_norm", spy)
    layer = FusedEncoderLayer(16, 2, 24, batch_first=True)
    with torch.autocast("cpu", torch.bfloat16):
        for save in ("default", "lean"):
            layer.save = save
            layer(torch.randn(2, 5, 16))
        layer.save = "default"
        layer.norm1 = layer.norm2 = FusedLayerNorm(16, save="output")
        layer(torch.randn(2, 5, 16))
    assert kept == ["sum", "sum", "copy", "copy", "output", "output"]


def test_norms_whose_weights_forbid_it_keep_their_sum():
    layer = FusedEncoderLayer(16, 2, 24, batch_first=True, save="lean")
    state = {name: x.clone() for name, x in layer.state_dict().items()}
    state["norm1.weight"][3] = 0
    with pytest.warns(UserWarning, match="norm1 keeps its sum.*weight is smaller"):
        layer.load_state_dict(state)
    assert layer._from_output == {"norm2"}
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    layer(torch.randn(2, 5, 16)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (twin.save, twin._from_output) == ("lean", {"norm2"})
        twin.load_state_dict(FusedEncoderLayer(16, 2, 24).state_dict())
        assert twin._from_output == {"norm1", "norm2"}
    layer.save = "default"
    assert not layer._from_output
    with pytest.raises(ValueError, match="save must be one of"):
        layer.save = "output"
    with pytest.raises(ValueError, match="save must be one of"):
        FusedEncoderLayer(16, 2, save="sum")


@BOTH
@pytest.mark.parametrize("save", ["default", "lean"])
def test_autocast_casts_no_result_of_a_norm_again(norm_first, save):
    """Products get their input from the norm itself, rounded as autocast would round it."""
    stock, layer = pair(norm_first=norm_first, dtype=torch.float32, activation="gelu")
    layer.save = save
    src = tokens(3, 9, dtype=torch.float32)

    def casts(run):
        with torch.profiler.profile() as profile, torch.autocast("cpu", torch.bfloat16):
            run(src)
        counts = {event.key: event.count for event in profile.key_averages()}
        return counts.get("aten::_to_copy", 0)

    exact = gradients(copy.deepcopy(stock).double(), src.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = gradients(layer, src), gradients(stock, src)
    for name, x in ours.items():
        assert x.dtype == theirs[name].dtype, name
        error, allowed = ((y[name] - exact[name]).abs().max() for y in (ours, theirs))
        assert error <= 3 * allowed + 1e-2 * exact[name].abs().max(), name
    layer.linear1.register_forward_hook(lambda *_: None)  # then a module makes the cast
    called = casts(layer)
    layer.linear1._forward_hooks.clear()
    assert casts(layer) < called


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_mask_that_16_bits_do_not_hold_means_the_same_in_training(
    low: torch.dtype, autocast: bool
) -> None:
    """Of 16384 decisions one drops, so that training computes the probabilities by themselves."""
    torch.manual_seed(0)
    options = {"dim_feedforward": 32, "batch_first": True}
    layer = FusedEncoderLayer(16, 2, dropout=1 / 16384, **options)
    stock = nn.TransformerEncoderLayer(16, 2, dropout=0.0, **options)
    stock.load_state_dict(layer.state_dict())
    x, mask = torch.randn(2, 5, 16), torch.full((5, 5), torch.finfo(torch.float32).min)
    expected = stock(x, mask)
    if not autocast:
        layer, x = layer.to(low), x.to(low)
    results = []
    for training in (True, False):
        with torch.autocast("cpu", low, enabled=autocast), torch.set_grad_enabled(training):
            results.append(layer.train(training)(x, mask, seed=torch.tensor([5])))
    for found in results:
        torch.testing.assert_close(found.float(), expected, atol=16 * torch.finfo(low).eps, rtol=0)
