"""Parametrisations, wrappers and other modules in place of a layer's own: they are what is run.

The oracle is the stock layer under the same treatment, in training mode at dropout 0, where torch
takes no fast path.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fastattn import FusedEncoderLayer
from tests.layers.attachments import Lora, Scaled
from tests.layers.pairs import (
    BOTH,
    HEADS,
    SEED,
    WIDTH,
    assert_equal_runs,
    gradients,
    modules_of,
    padding_of,
    pair,
    tokens,
)

# --------------------------------------------------------------------- parametrisations, wrappers


PARAMETRISATIONS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "weight_norm": ("weight", parametrizations.weight_norm),
    "spectral_norm": ("weight", parametrizations.spectral_norm),
    "old weight_norm": ("weight", nn.utils.weight_norm),
    "old spectral_norm": ("weight", nn.utils.spectral_norm),
}


@BOTH
@pytest.mark.parametrize("kind", PARAMETRISATIONS)
@pytest.mark.parametrize("name", ["linear1", "linear2", "norm1"])
def test_parametrised_weights(norm_first, kind, name):
    if name == "norm1" and "spectral" in kind:
        name = "linear1"  # a vector has no spectral norm to speak of
    stock, fused = pair(norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for layer in (stock, fused):
            PARAMETRISATIONS[kind][1](layer.get_submodule(name))
    fused.load_state_dict(stock.state_dict())
    src = tokens(2, 5)
    for _ in range(2):  # spectral norms take a step of power iteration each time
        assert_equal_runs(gradients(fused, src), gradients(stock, src))
    assert modules_of(fused) == [name]


@BOTH
def test_parametrised_attention(norm_first):
    stock, fused = pair(norm_first=norm_first)
    for layer in (stock, fused):
        parametrize.register_parametrization(layer.self_attn, "in_proj_weight", Scaled())
        parametrize.register_parametrization(layer.self_attn.out_proj, "weight", Scaled())
    src = tokens(2, 5)
    expected = gradients(stock, src, None, padding_of())
    assert_equal_runs(gradients(fused, src, None, padding_of()), expected)
    assert "self_attn.parametrizations.in_proj_weight.0.scale" in expected


def test_a_parametrised_output_projection_leaves_attention_fused():
    stock, fused = pair()
    for layer in (stock, fused):
        parametrize.register_parametrization(layer.self_attn.out_proj, "weight", Scaled())
    src = tokens(2, 5)
    assert_equal_runs(gradients(fused, src), gradients(stock, src))
    assert modules_of(fused) == ["self_attn.out_proj"]


@BOTH
@pytest.mark.parametrize("names", [("linear1",), ("linear2",), ("linear1", "linear2")], ids=str)
def test_lora_in_place_of_linears(norm_first, names):
    stock, fused = pair(norm_first=norm_first)
    for layer in (stock, fused):
        for name in names:
            setattr(layer, name, Lora(getattr(layer, name)))
    src = tokens(2, 5)
    expected = gradients(stock, src)
    assert_equal_runs(gradients(fused, src), expected)
    assert expected[f"{names[0]}.up"].any() and expected[f"{names[0]}.base.weight"] is None
    assert set(modules_of(fused)) == set(names)


@BOTH
def test_lora_in_place_of_the_output_projection(norm_first):
    """Stock cannot; the oracle is stock with the correction merged into the weight."""
    stock, fused = pair(norm_first=norm_first)
    lora = fused.self_attn.out_proj = Lora(fused.self_attn.out_proj)
    with torch.no_grad():
        stock.self_attn.out_proj.weight += lora.correction()
    src = tokens(2, 5)
    ours, theirs = gradients(fused, src), gradients(stock, src)
    torch.testing.assert_close(ours["output"], theirs["output"])
    torch.testing.assert_close(ours["src"], theirs["src"])
    torch.testing.assert_close(ours["linear1.weight"], theirs["linear1.weight"])
    merged = theirs["self_attn.out_proj.weight"]
    up = merged @ lora.down.detach().view(lora.rank, -1).T
    torch.testing.assert_close(ours["self_attn.out_proj.up"], up.flatten())


@BOTH
def test_pruned_weights(norm_first):
    stock, fused = pair(norm_first=norm_first)
    for layer in (stock, fused):
        prune.l1_unstructured(layer.linear1, "weight", amount=0.4)
        prune.l1_unstructured(layer.self_attn, "in_proj_weight", amount=0.3)
        prune.ln_structured(layer.linear2, "weight", amount=0.2, n=2, dim=0)
    src = tokens(2, 5)
    expected = gradients(stock, src)
    for _ in range(2):
        assert_equal_runs(gradients(fused, src), expected)
    assert not expected["linear1.weight_orig"][fused.linear1.weight_mask == 0].any()
    for layer in (stock, fused):
        prune.remove(layer.linear1, "weight")
        prune.remove(layer.linear2, "weight")
        prune.remove(layer.self_attn, "in_proj_weight")
    assert_equal_runs(gradients(fused, src), gradients(stock, src))
    assert modules_of(fused) == []


@pytest.mark.skipif(
    set(torch.backends.quantized.supported_engines) <= {"none"}, reason="no quantised kernels here"
)
def test_dynamically_quantised_linears():
    """What is quantised is exact here: else an error of rounding may decide what becomes of it."""
    stock, fused = pair(dtype=torch.float32, layer_norm_eps=0.0)
    with torch.no_grad():
        for layer in (stock, fused):
            layer.self_attn.out_proj.weight.zero_()
            layer.self_attn.out_proj.bias.zero_()
            layer.norm1.weight.fill_(1.0)
            layer.norm1.bias.fill_(0.25)
    signs = torch.tensor([-1.0, 1.0]).repeat(WIDTH // 2)  # of mean 0 and deviation 1
    src = torch.stack([signs[torch.randperm(WIDTH)] for _ in range(10)]).view(2, 5, WIDTH)
    plain = fused(src)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated, and still used
        stock, fused = (
            torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}) for layer in (stock, fused)
        )
    expected = stock.train()(src)  # in eval stock reads a weight that is no tensor, and raises
    torch.testing.assert_close(fused.eval()(src), expected)
    with torch.no_grad():
        torch.testing.assert_close(fused(src), expected)
    assert type(fused.linear1) is not nn.Linear
    assert (expected - plain).abs().max() > 1e-3


class Doubling:
    """Counts the calls of both blocks and changes what they give."""

    calls = 0

    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        self.calls += 1
        return 2 * super()._sa_block(x, attn_mask, key_padding_mask, is_causal=is_causal)

    def _ff_block(self, x):
        self.calls += 1
        return 3 * super()._ff_block(x)


class StockDoubling(Doubling, nn.TransformerEncoderLayer):
    pass


class FusedDoubling(Doubling, FusedEncoderLayer):
    pass


@BOTH
@pytest.mark.parametrize("masked", [False, True])
def test_overridden_blocks_are_called_in_training_and_evaluation(norm_first, masked):
    stock, fused = pair(norm_first=norm_first, stock=StockDoubling, fused=FusedDoubling)
    src = tokens(2, 5)
    masks = (torch.zeros(5, 5, dtype=torch.float64), padding_of()) if masked else ()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched")
        expected = gradients(stock, src, *masks)
        assert_equal_runs(gradients(fused, src, *masks), expected)
        fused.eval()
        assert_equal_runs(gradients(fused, src, *masks), expected)
        with torch.no_grad():
            torch.testing.assert_close(fused(src, *masks), expected["output"])
    assert fused.calls == 6
    encoder = nn.TransformerEncoder(fused, 1, enable_nested_tensor=not norm_first).eval()
    with torch.no_grad():
        out = encoder(src, src_key_padding_mask=padding_of())
    unpadded = ~padding_of()
    expected = stock(src, None, padding_of())[unpadded]
    torch.testing.assert_close(out[unpadded], expected)


@BOTH
@pytest.mark.parametrize("block", ["_sa_block", "_ff_block"])
def test_one_block_overridden_on_the_instance(norm_first, block):
    stock, fused = pair(norm_first=norm_first)
    for layer in (stock, fused):
        original = getattr(layer, block)
        setattr(layer, block, lambda *args, original=original, **kw: 2 * original(*args, **kw))
    src = tokens(2, 5)
    expected = gradients(stock, src)
    assert_equal_runs(gradients(fused, src), expected)
    assert_equal_runs(gradients(fused.eval(), src), expected)
    assert modules_of(fused) == [block]


@BOTH
def test_submodules_replaced_by_others(norm_first):
    """Another norm, no dropout, another attention module: whatever is there is called."""
    stock, fused = pair(norm_first=norm_first)
    for layer in (stock, fused):
        torch.manual_seed(1)
        layer.norm1 = nn.RMSNorm(WIDTH, dtype=torch.float64)
        layer.norm2 = nn.Identity()
        layer.dropout = layer.dropout1 = nn.Identity()
        layer.self_attn = nn.MultiheadAttention(
            WIDTH, HEADS, add_zero_attn=True, add_bias_kv=True, batch_first=True
        ).double()
    src = tokens(2, 5)
    assert_equal_runs(gradients(fused, src), gradients(stock, src))


def test_norms_without_affine_parameters():
    stock, fused = pair()
    for layer in (stock, fused):
        layer.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False, dtype=torch.float64)
    src = tokens(2, 5)
    assert_equal_runs(gradients(fused, src), gradients(stock, src))
    assert modules_of(fused) == []


def test_tensor_subclasses_pass_through():
    class Marked(Tensor):
        pass

    for dropout in (0.0, 0.3):
        _, fused = pair(dropout=dropout, activation=torch.tanh)
        src = tokens(2, 5)
        out = fused(src.as_subclass(Marked), seed=SEED)
        assert type(out) is Marked
        if not dropout:
            torch.testing.assert_close(out.as_subclass(Tensor), fused(src))
