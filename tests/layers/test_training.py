"""Training: frozen weights, accumulated gradients, optimisers, scalers, checkpointing, threads."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastattn import FusedEncoderLayer
from tests.layers.pairs import (
    BOTH,
    HEADS,
    HIDDEN,
    SEED,
    WIDTH,
    assert_equal_runs,
    cotangent,
    gradients,
    padding_of,
    pair,
    tokens,
)

# ------------------------------------------------------------------------------- partial training


@BOTH
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "trained",
    [(), ("bias",), ("norm",), ("linear1.weight",), ("self_attn",), ("linear2", "norm2.bias")],
    ids=str,
)
@pytest.mark.parametrize("needs_input", [True, False])
def test_frozen_weights_get_no_gradients_and_the_others_the_same(
    norm_first, dropout, trained, needs_input
):
    _, fused = pair(norm_first=norm_first, dropout=dropout)
    src = tokens(2, 5)
    expected = gradients(fused, src, seed=SEED)
    fused.zero_grad(set_to_none=True)
    for name, parameter in fused.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    leaf = src.clone().requires_grad_(needs_input)
    out = fused(leaf, seed=SEED)
    assert out.requires_grad == (needs_input or bool(trained))
    if not out.requires_grad:
        return
    out.backward(cotangent(out))
    for name, parameter in fused.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)
        else:
            assert parameter.grad is None
    if needs_input:
        torch.testing.assert_close(leaf.grad, expected["src"])


@BOTH
def test_gradients_accumulate_and_set_to_none(norm_first):
    _, fused = pair(norm_first=norm_first, dropout=0.2)
    batches = [tokens(2, 5), tokens(3, 4)]
    total: dict[str, Tensor] = {}
    for i, src in enumerate(batches):
        for name, grad in gradients(fused, src, seed=SEED + i).items():
            if name not in ("output", "src"):
                total[name] = total[name] + grad if name in total else grad.clone()
    fused.zero_grad(set_to_none=True)
    assert all(parameter.grad is None for parameter in fused.parameters())
    for i, src in enumerate(batches):
        out = fused(src, seed=SEED + i)
        out.backward(cotangent(out))
    for name, parameter in fused.named_parameters():
        torch.testing.assert_close(parameter.grad, total[name])
    fused.zero_grad(set_to_none=False)
    assert not any(parameter.grad.any() for parameter in fused.parameters())


def test_backward_twice_over_one_graph():
    _, fused = pair(dropout=0.2)
    src = tokens(2, 5).requires_grad_()
    out = fused(src)
    out.backward(cotangent(out), retain_graph=True)
    first = src.grad.clone()
    out.backward(cotangent(out))
    torch.testing.assert_close(src.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(cotangent(out))


@BOTH
def test_training_ends_where_torchs_does(norm_first):
    results = []
    src, target = tokens(4, 5), tokens(4, 5)
    for layer in pair(norm_first=norm_first, activation="gelu"):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        for _ in range(5):
            loss = F.mse_loss(layer(src, None, None), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append({name: p.detach() for name, p in layer.named_parameters()})
    assert_equal_runs(results[1], results[0], 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_mixed_precision_training_with_a_gradient_scaler(dtype, dropout):
    """The scaler's step equals the step without one, and an overflow skips the step."""
    layer = FusedEncoderLayer(WIDTH, HEADS, HIDDEN, dropout, batch_first=True)
    src = tokens(4, 5, dtype=torch.float32)
    after = []
    for enabled in (True, False):
        model = copy.deepcopy(layer)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=enabled)
        with torch.autocast("cpu", dtype):
            loss = model(src, seed=SEED).square().mean() + model(src * 2, seed=SEED).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        after.append({name: p.detach() for name, p in model.named_parameters()})
        before = dict(layer.named_parameters())
        assert any(not torch.equal(p, before[name]) for name, p in after[-1].items())
    assert_equal_runs(*after, tolerance=2e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(model(src * float("inf")).sum()).backward()
    scaler.step(optimizer)
    assert_equal_runs({n: p.detach() for n, p in model.named_parameters()}, after[-1], 0.0)


def test_threads_share_a_layer():
    _, fused = pair(dropout=0.3)
    src = tokens(2, 5)
    expected = fused(src, seed=SEED)
    found: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(fused(src, seed=SEED))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for out in found:  # a thread may have other numbers of threads to compute with
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------ checkpointing


@BOTH
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_checkpointing_repeats_the_same_decisions(norm_first, use_reentrant, backend):
    _, fused = pair(norm_first=norm_first, dropout=0.3)
    src, mask = tokens(2, 5), padding_of()
    torch.manual_seed(3)
    expected = gradients(fused, src, None, mask)

    def call(src: Tensor) -> Tensor:
        return checkpoint(fused, src, None, mask, use_reentrant=use_reentrant)

    if backend is not None:
        torch.compiler.reset()
        call = torch.compile(call, backend=backend, fullgraph=not use_reentrant)
    torch.manual_seed(3)
    assert_equal_runs(gradients(fused, src, call=call), expected)
    assert not torch.equal(gradients(fused, src, call=call)["output"], expected["output"])


def test_checkpointing_a_stack():
    _, fused = pair(dropout=0.3)
    stack = nn.ModuleList([fused, copy.deepcopy(fused), copy.deepcopy(fused)])
    results = []
    src = tokens(2, 5)
    for rerun in (False, True):
        torch.manual_seed(5)
        stack.zero_grad()
        x = leaf = src.clone().requires_grad_()
        for layer in stack:
            x = checkpoint(layer, x, use_reentrant=False) if rerun else layer(x)
        x.backward(cotangent(x))
        results.append({"output": x.detach(), "src": leaf.grad})
        results[-1] |= {name: p.grad for name, p in stack.named_parameters()}
    assert_equal_runs(*results)
