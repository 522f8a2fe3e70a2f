"""``FusedLayerNorm`` is torch's layer norm, and what it may keep for backward is checked."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastattn import FusedEncoderLayer, FusedLayerNorm, explain, use_backend
from tests import helpers

SHAPES = [(5, 40), (2, 3, 40), (0, 40), (40,)]


def pair(*arguments, **options) -> tuple[nn.LayerNorm, FusedLayerNorm]:
    stock, fused = nn.LayerNorm(*arguments, **options), FusedLayerNorm(*arguments, **options)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(torch.rand_like(parameter) * 0.5 + 0.75)
    fused.load_state_dict(stock.state_dict())
    return stock, fused


def run(norm: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = norm(x)
    return [out, *torch.autograd.grad(out.sin().sum(), [x, *norm.parameters()])]


def test_the_constructor_extends_torchs() -> None:
    theirs = inspect.signature(nn.LayerNorm).parameters
    ours = list(inspect.signature(FusedLayerNorm).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[:-1]] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]
    assert (ours[-1].name, ours[-1].kind) == ("save", inspect.Parameter.KEYWORD_ONLY)


@pytest.mark.parametrize("save", ["input", "output"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}], ids=str
)
def test_equals_torchs(options: dict, shape: tuple[int, ...], save: str) -> None:
    stock, fused = pair(40, dtype=torch.float64, **options)
    fused.save = save
    x = torch.randn(shape, dtype=torch.float64)
    for a, b in zip(run(fused, x), run(stock, x), strict=True):
        torch.testing.assert_close(a, b)


def test_several_dimensions_are_normalised_together() -> None:
    stock, fused = pair((5, 8), dtype=torch.float64)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64).transpose(0, 1)
    for a, b in zip(run(fused, x), run(stock, x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(2, 41), (8,), ()], ids=str)
def test_a_wrong_shape_raises_as_in_torch(shape: tuple[int, ...]) -> None:
    stock, fused = pair((5, 8))
    messages = []
    for norm in (stock, fused):
        with pytest.raises(RuntimeError) as raised:
            norm(torch.randn(shape))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("backend", ["cpu", "pytorch"])
def test_the_backend_asked_for_is_used(backend: str) -> None:
    from fastattn import available_backends

    if backend not in available_backends("layer_norm", "cpu"):
        pytest.skip("needs the C++ extension")
    stock, fused = pair(40)
    x = torch.randn(7, 40)
    with use_backend(layer_norm=backend):
        torch.testing.assert_close(fused(x), stock(x))


def test_state_dict_both_ways_copies_and_representation() -> None:
    stock, fused = pair(40)
    stock.load_state_dict(fused.state_dict())
    fused.save = "output"
    twin = copy.deepcopy(fused)
    assert twin.save == "output" and torch.equal(twin.weight, fused.weight)
    assert repr(FusedLayerNorm(40)) == repr(stock).replace("LayerNorm", "FusedLayerNorm")
    assert repr(twin).endswith("save='output')")


def test_the_result_is_kept_once() -> None:
    """A linear layer after the norm keeps the result anyway: so only 1 / deviation is added."""
    norm, linear = FusedLayerNorm(64, save="output"), nn.Linear(64, 64)
    x = torch.randn(100, 64, requires_grad=True)
    parameters = helpers.nbytes(norm.weight, norm.bias, linear.weight)
    assert helpers.saved_bytes(lambda: linear(norm(x))) == x.nbytes + parameters + 100 * 4


def test_weights_that_forbid_it_are_refused() -> None:
    norm = FusedLayerNorm(8)
    with torch.no_grad():
        norm.weight[3] = 0
    with pytest.raises(ValueError, match="save.*a weight is smaller"):
        norm.save = "output"
    assert norm.save == "input"
    with pytest.raises(ValueError, match="save must be one of"):
        norm.save = "everything"
    with pytest.raises(ValueError, match="save must be one of"):
        FusedLayerNorm(8, save="sum")


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_later_are_checked(assign: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), FusedLayerNorm(8, save="output"))
    state = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(state, assign=assign)
    assert model[1].save == "output"
    state["1.bias"][2] = 5
    with pytest.warns(UserWarning, match="keeps the input.*bias is more than twice"):
        model.load_state_dict(state, assign=assign)
    assert not model[1].keeps_output
    x = torch.randn(4, 8)
    stock = nn.LayerNorm(8)
    stock.load_state_dict(model[1].state_dict())
    for a, b in zip(run(model[1], x), run(stock, x), strict=True):
        torch.testing.assert_close(a, b)
    state["1.bias"][2] = 0
    model.load_state_dict(state, assign=assign)
    assert model[1].keeps_output


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_weights_without_data_are_not_checked(device: str) -> None:
    if device == "meta":
        assert FusedLayerNorm(8, save="output", device="meta").keeps_output
        return
    with FakeTensorMode():
        assert FusedLayerNorm(8, save="output").keeps_output


@pytest.mark.parametrize("save", ["input", "output"])
def test_an_encoder_layer_fuses_it(save: str) -> None:
    layer = FusedEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    stock = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    layer.norm1 = FusedLayerNorm(16, save=save)
    layer.load_state_dict(stock.state_dict())
    x = torch.randn(2, 5, 16)
    parts = {choice.part: choice.taken for choice in explain(layer, x)}
    assert "norm1" not in parts and "dropout_add_layer_norm" in parts
    for a, b in zip(run(layer, x), run(stock, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), stock.eval()(x), rtol=1e-4, atol=1e-5)
    kept = []  # the result is the feed-forward block's input too: nothing of its own is kept
    layer.train()
    saved = helpers.saved_bytes(lambda: kept.append(layer(x)))
    layer.norm1 = FusedLayerNorm(16)
    difference = helpers.saved_bytes(lambda: kept.append(layer(x))) - saved
    assert difference == (0 if save == "input" else x.nbytes + 10 * 4)


def test_compiled_equals_eager() -> None:
    norm = pair(40)[1]
    norm.save = "output"
    torch._dynamo.reset()
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 40)
    for a, b in zip(run(compiled, x), run(norm, x), strict=True):
        torch.testing.assert_close(a, b)
