"""Layers in ``nn.TransformerEncoder``, where torch may hand over nested tensors."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from fastattn import FusedEncoderLayer, explain
from tests.layers.attachments import CallsSuper, hooked
from tests.layers.masks import BATCH, LENGTH, PADDING_MASKS, bias, bool_padding, causal
from tests.layers.pairs import (
    BOTH,
    HEADS,
    HIDDEN,
    ORDERS,
    WIDTH,
    assert_equal_runs,
    cotangent,
    gradients,
    name_of,
    pair,
    tokens,
)
from tests.reference import ReplayEncoderLayer

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")


def stacks(
    layers: int = 2, *, nested: bool = True, final_norm: bool = False, **options
) -> tuple[nn.TransformerEncoder, nn.TransformerEncoder]:
    """(stock, ours) with equal weights, different in every layer."""
    both = []
    for layer in pair(**options):
        norm = nn.LayerNorm(WIDTH, dtype=torch.float64) if final_norm else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            both.append(nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=nested))
    with torch.no_grad():
        for parameter in both[0].parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    both[1].load_state_dict(both[0].state_dict(), strict=True)
    return both[0], both[1]


@BOTH
@ORDERS
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "padded"])
@pytest.mark.parametrize("mask", ["none", "causal", "bias"])
@pytest.mark.parametrize("padding", ["none", "bool", "0/-inf", "bool, leading"])
def test_encoder_stack(norm_first, batch_first, nested, mask, padding):
    """Training, eval with gradients, eval without: equal to stock's training forward."""
    stock, fused = stacks(
        nested=nested, final_norm=True, norm_first=norm_first, batch_first=batch_first
    )
    masks = ({"none": None, "causal": causal(), "bias": bias(LENGTH, LENGTH)}[mask],)
    masks += (PADDING_MASKS[padding](),)
    src = tokens(BATCH, LENGTH) if batch_first else tokens(LENGTH, BATCH)
    expected = gradients(stock, src, *masks)
    assert_equal_runs(gradients(fused, src, *masks), expected, 1e-9)
    fused.eval()
    assert_equal_runs(gradients(fused, src, *masks), expected, 1e-9)
    with torch.no_grad():
        out = fused(src, *masks)
    # pytorch #97111: stock truncates to the longest sequence where all are padded
    assert out.shape == src.shape
    kept = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    if padding == "bool" or padding == "0/-inf":
        kept = ~bool_padding()
    kept = kept if batch_first else kept.T
    torch.testing.assert_close(out[kept], expected["output"][kept], rtol=1e-9, atol=1e-9)


def test_evaluation_without_gradients_hands_over_nested_tensors():
    """The encoder stack really takes that path, and padded positions come back as zeros."""
    stock, fused = stacks()
    seen = []
    for layer in fused.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_nested))
    src = tokens(BATCH, LENGTH)
    with torch.no_grad():
        out = fused.eval()(src, src_key_padding_mask=bool_padding())
        expected = stock.eval()(src, src_key_padding_mask=bool_padding())
    assert seen == [True, True]
    assert not out[bool_padding()].any()
    torch.testing.assert_close(out, expected)


def test_trailing_padding_in_every_sequence_keeps_the_length():
    """pytorch #97111: the padded length is kept although no sequence has it."""
    stock, fused = stacks()
    padding = torch.arange(LENGTH).expand(BATCH, LENGTH) >= torch.tensor([[4], [2], [3]])
    src = tokens(BATCH, LENGTH)
    expected = stock(src, src_key_padding_mask=padding)
    with torch.no_grad():
        out = fused.eval()(src, src_key_padding_mask=padding)
    assert out.shape == src.shape
    torch.testing.assert_close(out[~padding], expected[~padding])


def test_an_empty_sequence_in_the_batch():
    """A row of padding only, through the nested path and the padded one."""
    stock, fused = stacks()
    padding = bool_padding()
    padding[1] = True
    src = tokens(BATCH, LENGTH)
    expected = gradients(stock, src, None, padding)
    assert_equal_runs(gradients(fused, src, None, padding), expected, 1e-9)
    fused.eval()
    for nested in (True, False):
        fused.use_nested_tensor = nested
        with torch.no_grad():
            out = fused(src, src_key_padding_mask=padding)
        assert out.isfinite().all() and out.shape == src.shape
        torch.testing.assert_close(out[~padding], expected["output"][~padding])


@BOTH
@ORDERS
def test_encoder_stack_with_dropout(norm_first, batch_first, contract_seeds):
    stock, fused = stacks(
        dropout=0.2, norm_first=norm_first, batch_first=batch_first, stock=ReplayEncoderLayer
    )
    src = tokens(BATCH, LENGTH) if batch_first else tokens(LENGTH, BATCH)
    torch.manual_seed(6)
    expected = gradients(stock, src, causal(), bool_padding())
    torch.manual_seed(6)
    assert_equal_runs(gradients(fused, src, causal(), bool_padding()), expected, 1e-9)


def test_swapping_the_layers_of_an_existing_encoder():
    stock, fused = stacks()
    swapped, _ = stacks()
    swapped.load_state_dict(stock.state_dict())
    swapped.layers = nn.ModuleList(fused.layers)
    swapped.use_nested_tensor = False
    src, padding = tokens(BATCH, LENGTH), bool_padding()
    expected = gradients(stock, src, None, padding)
    assert_equal_runs(gradients(swapped, src, None, padding), expected, 1e-9)
    swapped.eval()
    for nested in (False, True):
        swapped.use_nested_tensor = nested
        with torch.no_grad():
            out = swapped(src, src_key_padding_mask=padding)
        torch.testing.assert_close(out[~padding], expected["output"][~padding])


def test_layers_of_both_kinds_in_one_stack():
    stock, fused = stacks(layers=2)
    mixed, _ = stacks(layers=2)
    src, padding = tokens(BATCH, LENGTH), bool_padding()
    expected = gradients(stock, src, None, padding)["output"][~padding]
    for layers in ((stock.layers[0], fused.layers[1]), (fused.layers[0], stock.layers[1])):
        mixed.layers = nn.ModuleList(layers)
        torch.testing.assert_close(mixed.train()(src, None, padding)[~padding], expected)
        with torch.no_grad():
            out = mixed.eval()(src, None, padding)
        torch.testing.assert_close(out[~padding], expected)


def test_torchs_whole_transformer_takes_it_as_its_encoder():
    model = nn.Transformer(WIDTH, HEADS, 2, 1, HIDDEN, 0.0, batch_first=True, dtype=torch.float64)
    _, fused = stacks()
    fused.load_state_dict({k: v for k, v in model.encoder.state_dict().items() if "norm." not in k})
    fused.norm = model.encoder.norm
    src, tgt, padding = tokens(BATCH, LENGTH), tokens(BATCH, 4), bool_padding()
    masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    expected = model(src, tgt, **masks)
    model.encoder = fused
    torch.testing.assert_close(model(src, tgt, **masks), expected)


# ---------------------------------------------------------------------------------- nested tensors


def nested_of(src: Tensor, padding: Tensor, layout: torch.layout) -> Tensor:
    sequences = [x[~skip] for x, skip in zip(src, padding, strict=True)]
    return torch.nested.as_nested_tensor(sequences, layout=layout)


@BOTH
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize(
    "path", ["fused", "self_attn as module", "_sa_block overridden", "everything as module"]
)
@pytest.mark.parametrize("mode", ["training", "eval", "no_grad"])
def test_nested_input(norm_first, layout, path, mode):
    stock, fused = pair(
        norm_first=norm_first, fused=CallsSuper if "overridden" in path else FusedEncoderLayer
    )
    if path == "self_attn as module":
        hooked(fused)
    elif path == "everything as module":
        for child in fused.children():
            child.register_forward_hook(lambda *_: None)
    src, padding = tokens(BATCH, LENGTH), bool_padding()
    fused.train(mode == "training")
    with torch.set_grad_enabled(mode != "no_grad"):
        leaf = src.clone().requires_grad_(mode != "no_grad")
        out = fused(nested_of(leaf, padding, layout))
        assert out.is_nested and out.layout == layout
        ours = torch.cat(out.unbind())
    reference = src.clone().requires_grad_()
    expected = stock(reference, None, padding)[~padding]
    torch.testing.assert_close(ours, expected.detach() if mode == "no_grad" else expected)
    if mode != "no_grad":
        ours.backward(cotangent(ours))
        expected.backward(cotangent(ours))
        torch.testing.assert_close(leaf.grad, reference.grad)
        for (name, p), q in zip(fused.named_parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=lambda text, n=name: f"{n}: {text}")


@BOTH
@pytest.mark.parametrize("activation", ["gelu", torch.tanh], ids=name_of)
def test_nested_input_drops_what_padded_input_drops(norm_first, activation):
    _, fused = pair(dropout=0.3, norm_first=norm_first, activation=activation)
    src, padding, seed = tokens(BATCH, LENGTH), bool_padding(), torch.tensor([5])
    padded = fused(src, None, padding, seed=seed)[~padding]
    nested = fused(nested_of(src, padding, torch.strided), seed=seed)
    torch.testing.assert_close(torch.cat(nested.unbind()), padded)


def test_nested_input_takes_no_masks():
    _, fused = pair()
    nested = nested_of(tokens(BATCH, LENGTH), bool_padding(), torch.strided)
    for masks in ((causal(),), (None, bool_padding()), (None, None, True)):
        with pytest.raises(RuntimeError, match="nested"):
            fused(nested, *masks)


def test_padded_and_nested_attention_are_both_fused():
    _, fused = pair()
    src, padding = tokens(BATCH, LENGTH), bool_padding()
    parts = [choice.part for choice in explain(fused, src, None, padding)]
    nested = nested_of(src, padding, torch.strided)
    assert [choice.part for choice in explain(fused, nested)] == parts
    assert "attention_packed" in parts
