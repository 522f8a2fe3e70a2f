"""On a CUDA GPU the kernel of ``bias_activation_dropout`` is what the contract and eager say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import bias_activation_dropout, explain
from tests import reference
from tests.kernels.gpu.test_layer import SEED, layer_pair

pytestmark = pytest.mark.gpu

EAGER = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda x: x,
}


def middle(*inputs: Tensor, **options) -> list[Tensor]:
    """Output and gradients of ``bias_activation_dropout``, of inputs on one device."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    seed = SEED.to(inputs[0].device)
    out = bias_activation_dropout(*inputs, dropout_p=0.1, seed=seed, **options)
    grad = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize(("columns", "offset"), [(1024, 0), (1000, 8), (100, 0), (63, 5), (1, 0)])
def test_the_kernel_makes_the_decisions_of_the_cpu(
    activation: str, columns: int, offset: int
) -> None:
    inputs = torch.rand(3, 37, columns) + 0.5, torch.rand(columns)  # where no activation is zero
    for batch_first in (True, False):
        options = {"activation": activation, "batch_first": batch_first, "column_offset": offset}
        expected = middle(*inputs, **options, backend="pytorch")
        found = middle(*(x.cuda() for x in inputs), **options, backend="triton")
        for a, b in zip(found[:2], expected[:2], strict=True):
            assert torch.equal(a.cpu() == 0, b == 0)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_kernel_keeps_exactly_what_the_contract_keeps(dtype: torch.dtype) -> None:
    for columns in (2048, 1001):
        x = torch.ones(5, 70, columns, dtype=dtype, device="cuda")
        found = middle(x, activation="identity", site=3, backend="triton")
        where = reference.coordinates((5, 70))
        keep = reference.activation_keep(SEED.item(), 3, 0.1, *where, torch.arange(columns))
        scaled = (reference.factor(keep, 0.1)).view(x.shape)
        assert torch.equal(found[0].cpu(), scaled.to(dtype))
        assert not found[1].cpu()[~keep.view(x.shape)].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", EAGER)
def test_the_kernel_is_as_accurate_as_eager(activation: str, dtype: torch.dtype) -> None:
    """Tails included: nothing drops, so every element is compared."""
    x = torch.linspace(-12, 12, 2**16).view(64, 1024).to(dtype)
    bias = torch.randn(1024).to(dtype)
    grad = torch.randn(64, 1024).to(dtype)

    def run(function, *inputs: Tensor) -> list[Tensor]:
        inputs = tuple(v.detach().requires_grad_() for v in inputs)
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, grad.to(out))]

    def ours(x: Tensor, bias: Tensor) -> Tensor:
        return bias_activation_dropout(x, bias, activation=activation, backend="triton")

    def eager(x: Tensor, bias: Tensor) -> Tensor:
        return EAGER[activation](x + bias)

    exact = run(eager, x.double(), bias.double())
    found, baseline = run(ours, x.cuda(), bias.cuda()), run(eager, x.cuda(), bias.cuda())
    for i, (a, b, c) in enumerate(zip(found, baseline, exact, strict=True)):
        for norm in (torch.amax, torch.mean):
            error, allowed = (norm((v.cpu().double() - c).abs()) for v in (a, b))
            floor = torch.finfo(dtype).eps * norm(c.abs())
            assert error <= (2 if i == 0 else 3) * allowed + floor


@pytest.mark.parametrize("activation", EAGER)
def test_the_kernel_passes_nan_and_infinity(activation: str) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 60.0, -60.0], requires_grad=True)
    wide = x.detach().double().requires_grad_()
    found = bias_activation_dropout(x.cuda(), activation=activation, backend="triton")
    expected = EAGER[activation](wide)
    torch.testing.assert_close(found.cpu(), expected.float(), equal_nan=True)
    (slope,), (wide_slope,) = (
        torch.autograd.grad(y.sum(), v) for y, v in ((found, x), (expected, wide))
    )
    torch.testing.assert_close(slope, wide_slope.float(), equal_nan=True)


def test_the_kernel_compiled_equals_eager() -> None:
    inputs = torch.randn(3, 37, 256, device="cuda"), torch.randn(256, device="cuda")
    torch._dynamo.reset()
    compiled = torch.compile(bias_activation_dropout, fullgraph=True)
    options = {"activation": "gelu", "dropout_p": 0.1, "seed": SEED.cuda()}
    leaves = tuple(x.requires_grad_() for x in inputs)
    results = []
    for function in (compiled, bias_activation_dropout):
        out = function(*leaves, **options)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(*results)


def test_the_kernel_in_a_cuda_graph_reads_the_seed_of_each_replay() -> None:
    x, seed = torch.randn(64, 512, device="cuda"), SEED.cuda()
    options = {"activation": "identity", "dropout_p": 0.1, "backend": "triton"}
    bias_activation_dropout(x, seed=seed, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bias_activation_dropout(x, seed=seed, **options)
    for number in (3, 2**63 - 1):
        seed.fill_(number)
        graph.replay()
        expected = bias_activation_dropout(x, seed=torch.tensor([number]).cuda(), **options)
        assert torch.equal(out, expected)


def test_explain_names_the_kernel() -> None:
    _, layer = layer_pair()
    layer.linear1.register_forward_hook(lambda *_: None)
    text = str(explain(layer, torch.randn(2, 8, 64, device="cuda")))
    assert "bias_activation_dropout: triton" in text
