"""The layer where nothing drops and no derivative can be asked for: one function, same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastattn import FusedEncoderLayer, explain, use_backend

MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": torch.arange(9) >= torch.tensor([9, 4, 0])[:, None]},
    "float": {"src_mask": torch.randn(9, 9, generator=torch.Generator().manual_seed(1))},
    "causal": {"src_mask": torch.ones(9, 9).triu(1).bool(), "is_causal": True},
}


def layer_of(**options) -> FusedEncoderLayer:
    return FusedEncoderLayer(16, 2, 24, **{"batch_first": True, **options}).eval()


def parts_of(layer: nn.Module, src: torch.Tensor, **masks) -> list[str]:
    return [choice.part for choice in explain(layer, src, **masks)]


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.SiLU(), nn.Identity()], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_layer_op_by_op(masks, activation, norm_first, batch_first, bias) -> None:
    layer = layer_of(
        activation=activation, norm_first=norm_first, batch_first=batch_first, bias=bias
    )
    src = torch.randn(3, 9, 16) if batch_first else torch.randn(9, 3, 16)
    before = src.clone()
    with torch.no_grad():
        assert parts_of(layer, src, **MASKS[masks]) == ["encoder_layer"]
        found = layer(src, **MASKS[masks])
        with use_backend("pytorch"):
            expected = layer(src, **MASKS[masks])
            assert "attention_packed" in parts_of(layer, src, **MASKS[masks])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(src, before)


def test_unbatched_and_empty_input() -> None:
    layer = layer_of()
    with torch.no_grad():
        row = torch.randn(9, 16)
        torch.testing.assert_close(layer(row), layer(row[None])[0])
        for shape in ((0, 9, 16), (3, 0, 16)):
            assert layer(torch.randn(shape)).shape == shape


def hooked(layer: FusedEncoderLayer) -> None:
    layer.norm2.register_forward_hook(lambda module, inputs, output: None)


def training(layer: FusedEncoderLayer) -> None:
    layer.train()


def dropping(layer: FusedEncoderLayer) -> None:
    layer.dropout1.train()


def unfused_activation(layer: FusedEncoderLayer) -> None:
    layer.activation = torch.tanh


@pytest.mark.parametrize("change", [hooked, training, dropping, unfused_activation])
def test_anything_less_plain_runs_op_by_op(change) -> None:
    layer = layer_of()
    change(layer)
    with torch.no_grad():
        assert "attention_packed" in parts_of(layer, torch.randn(3, 9, 16))


def test_so_does_a_layer_that_may_be_differentiated() -> None:
    layer = layer_of()
    src = torch.randn(3, 9, 16)
    assert "attention_packed" in parts_of(layer, src)
    with torch.no_grad():
        tangent = torch.func.jvp(layer, (src,), (torch.ones_like(src),))[1]
    assert tangent.abs().max() > 0


def test_a_norm_over_more_than_the_features_is_called_as_a_module() -> None:
    layer = FusedEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    stock = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    stock.load_state_dict(layer.state_dict())
    for each in (layer, stock):
        each.norm1 = each.norm2 = nn.LayerNorm((9, 16))
    src = torch.randn(3, 9, 16)
    torch.testing.assert_close(layer(src), stock(src))
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(src), stock.train()(src))


def test_parameters_of_several_dtypes_run_op_by_op() -> None:
    layer = layer_of()
    layer.norm1.double()
    with torch.no_grad():
        assert "attention_packed" in parts_of(layer, torch.randn(3, 9, 16))


def test_meta_tensors() -> None:
    layer, src = layer_of().to("meta"), torch.randn(3, 9, 16, device="meta")
    with torch.no_grad():
        assert layer(src).shape == src.shape
    assert layer(src).shape == src.shape


def test_wrong_arguments_are_named_as_with_gradients() -> None:
    layer, src = layer_of(), torch.randn(3, 9, 16)
    wrong = [
        (dict(src=[1.0]), TypeError, "src must be a Tensor"),
        (dict(src=src.long()), RuntimeError, "src must be floating point"),
        (dict(src=src, src_mask=[True]), TypeError, "src_mask must be a Tensor"),
        (dict(src=src, src_key_padding_mask="x"), TypeError, "src_key_padding_mask must be"),
        (dict(src=src, seed=torch.zeros(1, dtype=torch.long, device="meta")), ValueError, "seed"),
    ]
    for arguments, error, message in wrong:
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
                layer(**arguments)
    layer.self_attn.num_heads = 3
    with pytest.raises(AssertionError, match="embed_dim 16 not divisible by num_heads 3"):
        layer(src)
