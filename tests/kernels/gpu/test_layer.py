"""What only a CUDA GPU can show: there the layer is the layer of a CPU, decision by decision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastattn import FusedEncoderLayer, explain

pytestmark = pytest.mark.gpu
SEED = torch.tensor([2**62 + 12345])


def layer_pair(**options) -> tuple[FusedEncoderLayer, FusedEncoderLayer]:
    cpu = FusedEncoderLayer(64, 4, 128, **{"dropout": 0.1, "batch_first": True, **options})
    return cpu, copy.deepcopy(cpu).cuda()


def outputs_and_gradients(layer: nn.Module, src: Tensor, **arguments) -> list[Tensor]:
    src = src.clone().requires_grad_()
    out = layer(src, **arguments)
    loss = (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum()
    return [out, *torch.autograd.grad(loss, [src, *layer.parameters()])]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_one_seed_drops_the_same_elements_on_cpu_and_gpu(norm_first: bool, activation: str) -> None:
    cpu, cuda = layer_pair(norm_first=norm_first, activation=activation)
    src = torch.randn(3, 37, 64)
    padding = torch.arange(37) >= torch.tensor([37, 20, 1])[:, None]
    expected = outputs_and_gradients(cpu, src, src_key_padding_mask=padding, seed=SEED)
    found = outputs_and_gradients(
        cuda, src.cuda(), src_key_padding_mask=padding.cuda(), seed=SEED.cuda()
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_fully_masked_rows_are_finite(training: bool) -> None:
    _, layer = layer_pair()
    src = torch.randn(2, 64, 64, device="cuda")
    padding = torch.zeros(2, 64, dtype=torch.bool, device="cuda")
    padding[1] = True
    found = outputs_and_gradients(layer.train(training), src, src_key_padding_mask=padding)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_accurate_as_the_stock_layer(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    stock = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    fused = FusedEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    fused.load_state_dict(stock.state_dict())
    src = torch.randn(4, 96, 64)
    exact = outputs_and_gradients(copy.deepcopy(stock).double(), src.double())
    theirs = outputs_and_gradients(stock.cuda().to(dtype), src.cuda().to(dtype))
    ours = outputs_and_gradients(fused.cuda().to(dtype), src.cuda().to(dtype))
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        error, allowed = ((x.cpu().double() - c).abs().max() for x in (a, b))
        floor = 4 * torch.finfo(dtype).eps * c.abs().max()
        assert error <= (2 if i == 0 else 3) * allowed + floor


def test_autocast_gives_fp32_as_the_stock_layer_does() -> None:
    _, layer = layer_pair()
    with torch.autocast("cuda", torch.bfloat16):
        assert layer(torch.randn(2, 8, 64, device="cuda")).dtype == torch.float32


def test_each_replay_of_a_cuda_graph_drops_other_elements() -> None:
    _, layer = layer_pair()
    src = torch.randn(2, 32, 64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        layer(src)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = layer(src)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(out, first)


def test_a_training_step_does_not_wait_for_the_device() -> None:
    _, layer = layer_pair()
    src = torch.randn(2, 32, 64, device="cuda")
    padding = torch.zeros(2, 32, dtype=torch.bool, device="cuda")
    layer(src, src_key_padding_mask=padding).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(src, src_key_padding_mask=padding).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_seed_on_another_device_is_refused() -> None:
    _, layer = layer_pair()
    with pytest.raises(ValueError, match="seed must be on cuda"):
        layer(torch.randn(2, 8, 64, device="cuda"), seed=SEED)


def test_explain_runs_there() -> None:
    _, layer = layer_pair()
    text = str(explain(layer, torch.randn(2, 8, 64, device="cuda")))
    assert "attention_packed: pytorch" in text
