"""FusedEncoderLayer is made, saved, copied and refused as torch's encoder layer is."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastattn import FusedEncoderLayer
from tests.layers.pairs import HEADS, HIDDEN, WIDTH, pair


@pytest.mark.parametrize(
    ("method", "added"), [("__init__", ["save", "chunk_tokens"]), ("forward", ["seed"])]
)
def test_signatures_extend_torchs(method, added):
    theirs = inspect.signature(getattr(nn.TransformerEncoderLayer, method)).parameters
    ours = list(inspect.signature(getattr(FusedEncoderLayer, method)).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: -len(added)]] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]
    assert [p.name for p in ours[-len(added) :]] == added
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[-len(added) :])


def test_every_constructor_argument_by_position_and_by_keyword():
    values = (16, 2, 24, 0.3, "gelu", 1e-4, True, True, False, "cpu", torch.float64)
    names = list(inspect.signature(nn.TransformerEncoderLayer).parameters)
    assert len(names) == len(values)
    positional = FusedEncoderLayer(*values)
    keyword = FusedEncoderLayer(**dict(zip(names, values, strict=True)))
    assert repr(positional) == repr(keyword)
    for layer in (positional, keyword):
        assert layer.linear1.weight.shape == (24, 16)
        assert layer.linear1.weight.dtype == torch.float64
        assert layer.self_attn.num_heads == 2 and layer.self_attn.batch_first
        assert layer.activation is F.gelu and layer.norm_first
        assert layer.norm1.eps == layer.norm2.eps == 1e-4
        assert layer.self_attn.dropout == layer.dropout.p == layer.dropout1.p == 0.3
        assert layer.linear1.bias is None and layer.norm1.bias is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", nn.PReLU(3)], ids=["function", "parameters"])
def test_state_dict_keys_their_order_and_equal_initial_weights(bias, activation):
    states = []
    for kind in (nn.TransformerEncoderLayer, FusedEncoderLayer):
        torch.manual_seed(3)
        states.append(kind(16, 2, 24, activation=activation, bias=bias).state_dict())
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
    assert ("activation.weight" in states[1]) == isinstance(activation, nn.Module)
    assert ("norm1.bias" in states[1]) == bias


def test_state_dict_loads_both_ways():
    stock, fused = nn.TransformerEncoderLayer(16, 2, 24), FusedEncoderLayer(16, 2, 24)
    src = torch.randn(5, 2, 16)
    fused.load_state_dict(stock.state_dict(), strict=True)
    torch.testing.assert_close(fused.eval()(src), stock.eval()(src))
    fresh = nn.TransformerEncoderLayer(16, 2, 24).eval()
    fresh.load_state_dict(FusedEncoderLayer(16, 2, 24).state_dict(), strict=True)
    fresh.load_state_dict(fused.state_dict(), strict=True)
    torch.testing.assert_close(fresh(src), stock(src))


def test_torch_saves_and_loads_the_state(tmp_path):
    layer = FusedEncoderLayer(16, 2, 24)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = FusedEncoderLayer(16, 2, 24)
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    src = torch.randn(5, 2, 16)
    assert torch.equal(other.eval()(src), layer.eval()(src))


def test_repr_is_torchs_but_for_the_name():
    options = {"activation": nn.GELU(), "bias": False, "norm_first": True}
    ours = repr(FusedEncoderLayer(16, 2, 24, 0.2, **options))
    theirs = repr(nn.TransformerEncoderLayer(16, 2, 24, 0.2, **options))
    assert ours == theirs.replace("TransformerEncoderLayer", "FusedEncoderLayer")


def test_attributes_that_other_code_reads():
    stock, fused = pair(activation="gelu", layer_norm_eps=1e-6)
    for name in ("batch_first", "num_heads", "embed_dim", "head_dim", "_qkv_same_embed_dim"):
        assert getattr(fused.self_attn, name) == getattr(stock.self_attn, name), name
    assert torch.equal(fused.self_attn.in_proj_weight, stock.self_attn.in_proj_weight)
    assert fused.activation is stock.activation
    assert fused.activation_relu_or_gelu == stock.activation_relu_or_gelu == 2
    assert fused.norm1.eps == fused.norm2.eps == 1e-6
    assert fused.norm_first is False
    children = [(name, type(child)) for name, child in stock.named_modules() if name]
    assert [(name, type(child)) for name, child in fused.named_modules() if name] == children
    assert isinstance(fused, nn.TransformerEncoderLayer)


def test_deepcopy_is_independent():
    layer = FusedEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True).eval()
    src = torch.randn(2, 5, WIDTH)
    before = layer(src)
    clone = copy.deepcopy(layer)
    assert torch.equal(clone(src), before)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.add_(1.0)
    clone.train()
    assert torch.equal(layer(src), before)
    assert not layer.training and not layer.dropout1.training


def test_pickle_keeps_the_layer():
    layer = FusedEncoderLayer(WIDTH, HEADS, HIDDEN, activation=nn.SiLU(), batch_first=True).eval()
    layer.layer_index = 3
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    src = torch.randn(2, 5, WIDTH)
    for other in (pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(src), layer(src))
        assert other.layer_index == 3


# ---------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"activation": "swish"},
        {"nhead": 5},
        {"dropout": 1.5},
        {"dropout": -0.1},
        {"d_model": 0},
        {"nhead": 0},
        {"nosuch": 1},
    ],
    ids=str,
)
def test_constructor_errors_are_torchs(arguments):
    arguments = {"d_model": 16, "nhead": 2, "dim_feedforward": 8, **arguments}
    with pytest.raises(Exception) as theirs:
        nn.TransformerEncoderLayer(**arguments)
    with pytest.raises(theirs.type) as ours:
        FusedEncoderLayer(**arguments)
    expected = str(theirs.value).replace("TransformerEncoderLayer", "FusedEncoderLayer")
    assert str(ours.value).replace("TransformerEncoderLayer", "FusedEncoderLayer") == expected


def test_unknown_activation_is_named():
    with pytest.raises(RuntimeError, match="activation should be relu/gelu, not swish"):
        FusedEncoderLayer(16, 2, activation="swish")


@pytest.mark.parametrize(
    ("seed", "error"),
    [
        (5, TypeError),
        (torch.tensor([1.0]), ValueError),
        (torch.tensor([1, 2]), ValueError),
        (torch.tensor([1], dtype=torch.int32), ValueError),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_a_bad_seed_is_named(seed, error, training):
    layer = FusedEncoderLayer(16, 2, 24).train(training)
    with pytest.raises(error, match="seed"):
        layer(torch.randn(5, 2, 16), seed=seed)


def test_a_bad_dropout_probability_set_later_raises():
    layer = FusedEncoderLayer(16, 2, 24)
    layer.dropout2.p = 1.5
    with pytest.raises(ValueError, match="between 0 and 1"):
        layer(torch.randn(5, 2, 16))
