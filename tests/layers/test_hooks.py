"""Hooks and patched forwards: they fire as often as torch's, and see and change the same.

The oracle is the stock layer under the same treatment, in training mode at dropout 0, where torch
takes no fast path.
"""

from __future__ import annotations

import types
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.layers.pairs import (
    BOTH,
    CHILDREN,
    assert_equal_runs,
    gradients,
    modules_of,
    padding_of,
    pair,
    tokens,
)


class Log:
    """Every event of every hooked module, with the tensors it was given."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.tensors: list[Tensor] = []

    def attach(self, name: str, module: nn.Module) -> None:
        record = partial(self.record, name)
        module.register_forward_pre_hook(lambda _, args: record("before", args))
        module.register_forward_hook(lambda _, args, out: record("after", (args, out)))
        module.register_full_backward_pre_hook(lambda _, grads: record("backward", grads))
        module.register_full_backward_hook(lambda _, grads, outs: record("done", (grads, outs)))

    def record(self, name: str, event: str, values: Any) -> None:
        self.events.append((name, event))
        leaves = torch.utils._pytree.tree_leaves(values)
        self.tensors += [x.detach() for x in leaves if isinstance(x, Tensor)]


@BOTH
@pytest.mark.parametrize(
    "names", [("",), *((name,) for name in CHILDREN), ("", *CHILDREN)], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_hooks_fire_as_often_and_see_the_same_as_in_torch(norm_first, names, training):
    stock, fused = pair(norm_first=norm_first)
    src, results, logs = tokens(2, 5), [], []
    for layer in (fused, stock):
        log = Log()
        for name in names:
            log.attach(name, layer.get_submodule(name))
        layer.train(training)
        results.append(gradients(layer, src, None, padding_of()))
        logs.append(log)
    assert_equal_runs(*results)
    ours, theirs = logs
    assert ours.events == theirs.events and len(ours.events) == 4 * len(names)
    for got, expected in zip(ours.tensors, theirs.tensors, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_hooks_on_the_output_projection_fire(training):
    """Stock reads its weight without calling it; ours calls it once, with the same result."""
    stock, fused = pair()
    log = Log()
    log.attach("out_proj", fused.self_attn.out_proj)
    src = tokens(2, 5)
    assert_equal_runs(gradients(fused.train(training), src), gradients(stock, src))
    assert [event for _, event in log.events] == ["before", "after", "backward", "done"]


@BOTH
@pytest.mark.parametrize("name", CHILDREN)
def test_hooks_that_change_what_passes(norm_first, name):
    stock, fused = pair(norm_first=norm_first)
    src, results = tokens(2, 5), []
    for layer in (fused, stock):
        module = layer.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args: (args[0] * 1.5, *args[1:]))
        module.register_forward_hook(
            lambda _, args, out: (out[0] + 1, *out[1:]) if isinstance(out, tuple) else out + 1
        )
        results.append(gradients(layer, src))
    assert_equal_runs(*results)
    assert modules_of(fused) == [name]


def test_hooks_with_keywords_see_torchs_arguments():
    stock, fused = pair()
    seen = []
    for layer in (fused, stock):
        calls: list[Any] = []
        for module in (layer, layer.self_attn):
            module.register_forward_pre_hook(
                lambda _, args, kwargs, calls=calls: calls.append((len(args), kwargs)),
                with_kwargs=True,
            )
        layer(tokens(2, 5), src_key_padding_mask=padding_of())
        seen.append(calls)
    for (ours_args, ours), (theirs_args, theirs) in zip(*seen, strict=True):
        assert ours_args == theirs_args and ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, Tensor):
                assert torch.equal(ours[key], value)
            else:
                assert ours[key] == value, key


def test_global_hooks_fire_as_often_as_in_torch():
    stock, fused = pair()
    src, results, events = tokens(2, 5), [], []
    register = nn.modules.module
    for layer in (fused, stock):
        names = {id(module): name for name, module in layer.named_modules()}
        log: list[tuple[str, str]] = []

        def note(module, *_, event, names=names, log=log):
            log.append((names[id(module)], event))

        handles = [
            register.register_module_forward_pre_hook(partial(note, event="before")),
            register.register_module_forward_hook(partial(note, event="after")),
            register.register_module_full_backward_hook(partial(note, event="done")),
        ]
        try:
            results.append(gradients(layer, src))
        finally:
            for handle in handles:
                handle.remove()
        events.append(log)
    assert_equal_runs(*results)
    assert events[0] == events[1] and len(events[0]) == 3 * (1 + len(CHILDREN))
    assert modules_of(fused) == []


def test_hooks_on_parameters_and_on_the_input():
    _, fused = pair()
    seen = {}
    for name, parameter in fused.named_parameters():
        parameter.register_hook(lambda grad, n=name: seen.__setitem__(n, grad.clone()))
    found = gradients(fused, tokens(2, 5))
    assert seen.keys() == dict(fused.named_parameters()).keys()
    for name, grad in seen.items():
        assert torch.equal(grad, found[name])
    assert modules_of(fused) == []


def test_removed_hooks_leave_the_layer_fused():
    _, fused = pair()
    handle = fused.linear1.register_forward_hook(lambda *_: None)
    assert modules_of(fused) == ["linear1"]
    handle.remove()
    assert modules_of(fused) == []


@BOTH
@pytest.mark.parametrize("name", CHILDREN)
def test_patched_forward_of_a_submodule(norm_first, name):
    stock, fused = pair(norm_first=norm_first)
    src, results = tokens(2, 5), []
    for layer in (fused, stock):
        module = layer.get_submodule(name)

        def forward(self, *args, original=module.forward, **kwargs):
            out = original(*args, **kwargs)
            return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

        module.forward = types.MethodType(forward, module)
        results.append(gradients(layer, src))
        layer.eval()
        results.append(gradients(layer, src))
    assert_equal_runs(results[0], results[2])
    assert_equal_runs(results[1], results[2])


def test_patched_forward_of_the_layer():
    stock, fused = pair()
    original = fused.forward
    fused.forward = lambda src, **kwargs: 3 * original(src, **kwargs)
    src = tokens(2, 5)
    torch.testing.assert_close(fused(src), 3 * stock(src))
    encoder = nn.TransformerEncoder(fused, 1)  # deep-copies the layer, patch and all
    torch.testing.assert_close(encoder(src), 3 * stock(src))


@BOTH
def test_the_recipe_that_reads_attention_weights(norm_first):
    """self_attn patched to return its weights, as visualisers do."""
    stock, fused = pair(norm_first=norm_first)
    src, results, weights = tokens(2, 5), [], []
    for layer in (fused, stock):

        def forward(*args, original=layer.self_attn.forward, **kwargs):
            out = original(*args, **{**kwargs, "need_weights": True})
            weights.append(out[1])
            return out

        layer.self_attn.forward = forward
        results.append(gradients(layer, src, None, padding_of()))
    assert_equal_runs(*results)
    assert weights[0].shape == (2, 5, 5)
    torch.testing.assert_close(*weights)
