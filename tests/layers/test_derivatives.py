"""Derivatives of every order, in forward mode, of each sample, and with other weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn import FusedEncoderLayer
from tests.layers.pairs import (
    BOTH,
    SEED,
    WIDTH,
    assert_equal_runs,
    cotangent,
    given,
    gradients,
    name_of,
    padding_of,
    pair,
    tokens,
)


@BOTH
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh], ids=name_of)
def test_gradcheck_with_dropout(norm_first, activation):
    layer = FusedEncoderLayer(
        4, 2, 6, 0.3, activation, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    names = list(dict(layer.named_parameters()))
    src = tokens(2, 3, width=4).requires_grad_()
    mask = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[0.0, 0.5, float("-inf")], [0.1, 0.0, 0.3]], dtype=torch.float64)

    def run(src: Tensor, mask: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, values, (src, mask, padding), {"seed": given(3)})

    assert torch.autograd.gradcheck(run, (src, mask, *layer.parameters()))


@BOTH
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradgradcheck(norm_first, dropout):
    layer = FusedEncoderLayer(
        4, 2, 6, dropout, "gelu", batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    names = list(dict(layer.named_parameters()))
    src = tokens(1, 3, width=4).requires_grad_()
    mask = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def run(src: Tensor, mask: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, values, (src, mask), {"seed": given(3)})

    inputs = (src, mask, *layer.parameters())
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@BOTH
def test_gradient_penalty_is_torchs(norm_first):
    """Second derivatives of the whole layer; of torch's attention kernels only MATH has them."""
    stock, fused = pair(norm_first=norm_first, activation="gelu")
    src = tokens(2, 4)
    results = []
    for layer in (fused, stock):
        leaf = src.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            (gradient,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
            gradient.square().sum().backward()
        results.append({name: p.grad for name, p in layer.named_parameters()})
    assert_equal_runs(*results, tolerance=1e-9)


# ----------------------------------------------------------------------------------- torch.func


@BOTH
def test_functional_call_with_other_weights(norm_first):
    stock, fused = pair(norm_first=norm_first)
    weights = {name: p.detach() * 1.1 for name, p in stock.named_parameters()}
    src = tokens(2, 5)
    expected = torch.func.functional_call(stock, weights, (src,))
    torch.testing.assert_close(torch.func.functional_call(fused, weights, (src,)), expected)
    assert not torch.equal(fused(src), expected)


@BOTH
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh], ids=name_of)
def test_gradients_of_each_sample_by_vmap(norm_first, dropout, activation):
    """As a loop over samples gives; under a given seed every sample is sequence 0 of its call."""
    _, fused = pair(norm_first=norm_first, dropout=dropout, activation=activation)
    weights = {name: p.detach() for name, p in fused.named_parameters()}
    seed = SEED if dropout else None

    def loss(weights: dict[str, Tensor], sample: Tensor, padding: Tensor) -> Tensor:
        arguments = (sample[None], None, padding[None])
        out = torch.func.functional_call(fused, weights, arguments, {"seed": seed})
        return (out * cotangent(out)).sum()

    src, padding = tokens(3, 5), torch.arange(5) >= torch.tensor([[5], [3], [2]])
    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, src, padding)
    for i, sample in enumerate(src):
        expected = gradients(fused, sample[None], None, padding[i][None], seed=seed)
        for name, grads in found.items():
            torch.testing.assert_close(grads[i], expected[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_drawn_seeds_under_vmap_follow_its_randomness(randomness):
    """As torch's dropout does: refused, one draw for all samples, or one for each."""
    _, fused = pair(dropout=0.3)
    src = tokens(1, 5).expand(3, 5, WIDTH)
    run = torch.func.vmap(lambda x: fused(x[None])[0], randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            run(src)
        return
    out = run(src)
    assert torch.equal(out[0], out[1]) == (randomness == "same")


@BOTH
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_mode(norm_first, dropout):
    _, fused = pair(norm_first=norm_first, dropout=dropout, activation="gelu")
    src, tangent = tokens(2, 4), tokens(2, 4)

    def run(src: Tensor) -> Tensor:
        return fused(src, None, padding_of(2, 4), seed=SEED)

    step = 1e-6
    numeric = (run(src + step * tangent) - run(src - step * tangent)) / (2 * step)
    with sdpa_kernel(SDPBackend.MATH):
        out, found = torch.func.jvp(run, (src,), (tangent,))
        with torch.autograd.forward_ad.dual_level():
            dual = run(torch.autograd.forward_ad.make_dual(src, tangent))
            dual = torch.autograd.forward_ad.unpack_dual(dual)
    torch.testing.assert_close(out, run(src))
    torch.testing.assert_close(found, numeric, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dual.tangent, found)


def test_tangents_of_weights():
    _, fused = pair(activation="gelu", dropout=0.2)
    weights = {name: p.detach() for name, p in fused.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in weights.items()}
    src, step = tokens(2, 4), 1e-6

    def run(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(fused, weights, (src,), {"seed": SEED})

    moved = [run({n: p + s * tangents[n] for n, p in weights.items()}) for s in (step, -step)]
    _, found = torch.func.jvp(run, (weights,), (tangents,))
    torch.testing.assert_close(found, (moved[0] - moved[1]) / (2 * step), rtol=1e-5, atol=1e-6)
