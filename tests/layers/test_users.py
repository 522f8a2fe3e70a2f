"""What users do to an encoder layer: hooks, wrappers, compilers, transforms, parallelism.

The oracle is the stock layer under the same treatment (in training mode at dropout 0, where torch
takes no fast path), and our own plain layer for a given seed where dropout is on.
"""

from __future__ import annotations

import copy
import sys
import threading
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from fastattn import FusedEncoderLayer, explain
from tests import ROOT
from tests.layers.pairs import (
    HEADS,
    HIDDEN,
    WIDTH,
    assert_equal_runs,
    cotangent,
    gradients,
    name_of,
    pair,
    tokens,
)

BOTH = pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
SEED = torch.tensor([17])
CHILDREN = ("self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2")


def modules_of(layer: nn.Module) -> list[str]:
    return [choice.part for choice in explain(layer, tokens(1, 2)) if choice.taken == "module"]


def padding_of(batch: int = 2, length: int = 5) -> Tensor:
    return torch.arange(length) >= torch.tensor([[length], [3]]).expand(2, 1)[:batch]


# ------------------------------------------------------------------------------------------ hooks


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


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale * weight


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


class Lora(nn.Module):
    """A frozen linear and a trained low-rank correction; it has the weight of neither."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.linspace(-1, 1, rank * base.in_features).double())
        self.up = nn.Parameter(torch.linspace(-1, 1, rank * base.out_features).double())
        self.rank = rank

    def correction(self) -> Tensor:
        return self.up.view(-1, self.rank) @ self.down.view(self.rank, -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(x, self.correction())


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
    stock, fused = pair(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated, and still used
        stock, fused = (
            torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}) for layer in (stock, fused)
        )
    src = tokens(2, 5, dtype=torch.float32)
    expected = stock.train()(src)  # in eval stock reads a weight that is no tensor, and raises
    torch.testing.assert_close(fused.eval()(src), expected)
    with torch.no_grad():
        torch.testing.assert_close(fused(src), expected)
    plain, _ = pair(dtype=torch.float32)
    assert type(fused.linear1) is not nn.Linear and not torch.equal(fused(src), plain(src))


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
    assert len(found) == 4 and all(torch.equal(out, expected) for out in found)


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


# ------------------------------------------------------------------------------ compiled, exported


def compiled(layer: nn.Module, backend: str = "aot_eager") -> nn.Module:
    torch.compiler.reset()
    return torch.compile(layer, fullgraph=True, backend=backend)


MASKS = {
    "no mask": (),
    "padding": (None, padding_of()),
    "both": (torch.ones(5, 5).triu(1).bool(), padding_of()),
    "causal": (torch.ones(5, 5).triu(1).bool(), None, True),
    "bias": (torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5).requires_grad_(), None),
    "per head": (torch.linspace(-1, 1, 200, dtype=torch.float64).view(8, 5, 5), None),
}


@pytest.mark.parametrize(
    ("norm_first", "masks"), [(False, masks) for masks in MASKS] + [(True, "both")]
)
def test_compiled_is_eager_and_drops_the_same(norm_first, masks):
    _, fused = pair(norm_first=norm_first, dropout=0.3, activation="gelu")
    src, masks, run = tokens(2, 5), MASKS[masks], compiled(fused)
    expected = gradients(fused, src, *masks, seed=SEED)
    assert_equal_runs(gradients(fused, src, *masks, call=run, seed=SEED), expected, 1e-9)
    fused.eval()
    expected = gradients(fused, src, *masks)
    assert_equal_runs(gradients(fused, src, *masks, call=run), expected, 1e-9)
    with torch.no_grad():
        torch.testing.assert_close(run(src, *masks), expected["output"])


def test_compiled_draws_eagers_seeds():
    """Under one state of torch's generator; two calls on one input differ."""
    _, fused = pair(dropout=0.3)
    src, run = tokens(2, 5), compiled(fused)
    found = []
    for call in (fused, run):
        torch.manual_seed(8)
        found.append([gradients(fused, src, call=call) for _ in range(2)])
    for ours, theirs in zip(*found, strict=True):
        assert_equal_runs(ours, theirs, 1e-9)
    assert not torch.equal(found[1][0]["output"], found[1][1]["output"])


@BOTH
def test_inductor(norm_first):
    """Given seeds drop the same; drawn ones too where inductor uses torch's generator."""
    _, fused = pair(norm_first=norm_first, dropout=0.3, dtype=torch.float32)
    src, mask = tokens(2, 5, dtype=torch.float32), padding_of()
    run = compiled(fused, "inductor")
    expected = gradients(fused, src, None, mask, seed=SEED)
    assert_equal_runs(gradients(fused, src, None, mask, call=run, seed=SEED), expected, 1e-4)
    first, second = run(src), run(src)
    assert not torch.equal(first, second)
    with torch._inductor.config.patch(fallback_random=True):
        run = compiled(fused, "inductor")
        torch.manual_seed(2)
        expected = gradients(fused, src)
        torch.manual_seed(2)
        assert_equal_runs(gradients(fused, src, call=run), expected, 1e-4)


def test_compiled_with_changing_lengths():
    """Dynamic shapes: no recompilation for each length, and still the same decisions."""
    _, fused = pair(dropout=0.3)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(fused, backend=counter, dynamic=True, fullgraph=True)
    compilations = []
    for batch, length in ((2, 5), (3, 7), (4, 12), (2, 33)):
        src = tokens(batch, length)
        torch.testing.assert_close(run(src, seed=SEED), fused(src, seed=SEED))
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 4


def test_compiled_with_what_users_attach():
    stock, fused = pair()
    for layer in (stock, fused):
        layer.linear1 = Lora(layer.linear1)
        layer.norm1.register_forward_hook(lambda _, args, out: 2 * out)
        parametrize.register_parametrization(layer.self_attn, "in_proj_weight", Scaled())
    src = tokens(2, 5)
    expected = gradients(stock, src, None, padding_of())
    run = compiled(fused)
    assert_equal_runs(gradients(fused, src, None, padding_of(), call=run), expected, 1e-9)


def test_a_compiled_encoder_stack():
    stock, fused = (nn.TransformerEncoder(layer, 2, enable_nested_tensor=False) for layer in pair())
    src = tokens(2, 5)
    expected = gradients(stock, src, None, padding_of())
    run = compiled(fused)
    assert_equal_runs(gradients(fused, src, None, padding_of(), call=run), expected, 1e-9)


def test_compiled_autocast():
    _, fused = pair(dropout=0.3, dtype=torch.float32)
    src, run = tokens(2, 5, dtype=torch.float32), compiled(fused)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(fused, src, seed=SEED)
        found = gradients(fused, src, call=run, seed=SEED)
    assert found["output"].dtype == torch.float32
    assert_equal_runs(found, expected, 1e-5)


@BOTH
@pytest.mark.parametrize("strict", [False, True])
def test_export_in_evaluation(norm_first, strict):
    stock, fused = pair(norm_first=norm_first)
    src, mask = tokens(2, 5), padding_of()
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2)
    shapes = ({0: batch, 1: length}, None, {0: batch, 1: length})
    program = torch.export.export(
        fused.eval(), (src, None, mask), dynamic_shapes=shapes, strict=strict
    )
    run = program.module()
    torch.testing.assert_close(run(src, None, mask), stock(src, None, mask))
    longer, mask = tokens(4, 9), padding_of(1, 9).expand(4, 9)
    torch.testing.assert_close(run(longer, None, mask), stock(longer, None, mask))


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


# ----------------------------------------------------------------------------- several processes

WORLD = 2


def parallel_layer(kind: type = FusedEncoderLayer, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return kind(WIDTH, HEADS, HIDDEN, dropout, batch_first=True, dtype=torch.float64)


def parallel_src() -> Tensor:
    return torch.sin(torch.arange(2 * WORLD * 5 * WIDTH).double()).view(2 * WORLD, 5, WIDTH)


def shard(rank: int) -> Tensor:
    return parallel_src()[2 * rank : 2 * rank + 2]


def full(x: Tensor) -> Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach()


def backward(model: nn.Module, src: Tensor) -> dict[str, Tensor]:
    out = model(src)
    out = out.full_tensor() if hasattr(out, "full_tensor") else out
    out.square().sum().backward()
    grads = {n.removeprefix("module."): full(p.grad) for n, p in model.named_parameters()}
    return {"output": out.detach(), **grads}


def run_ddp(rank: int, mesh: Any) -> dict[str, Tensor]:
    return backward(nn.parallel.DistributedDataParallel(parallel_layer()), shard(rank))


def run_ddp_dropout(rank: int, mesh: Any) -> dict[str, Tensor]:
    model = nn.parallel.DistributedDataParallel(parallel_layer(dropout=0.3))
    torch.manual_seed(rank)
    return backward(model, shard(0))


def run_fsdp(rank: int, mesh: Any) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(parallel_layer(), parallel_layer())
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return backward(fully_shard(model, mesh=mesh), shard(rank))


def run_fsdp_bf16(rank: int, mesh: Any) -> dict[str, Tensor]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_shard(parallel_layer(dropout=0.1).float(), mesh=mesh, mp_policy=policy)
    found = backward(model, shard(rank).float())
    torch.optim.AdamW(model.parameters()).step()
    return found


def run_tensor_parallel(
    rank: int, mesh: Any, dropout: float = 0.0, local: bool = True
) -> dict[str, Tensor]:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    layer = parallel_layer(dropout=dropout)
    calls: list[int] = []
    layer.linear1.register_forward_hook(lambda *_: calls.append(1))
    plan = {"linear1": ColwiseParallel(use_local_output=local), "linear2": RowwiseParallel()}
    parallelize_module(layer, mesh, plan)
    torch.manual_seed(7)
    found = backward(layer, parallel_src())
    assert len(calls) == 1
    return found


def run_replicated(rank: int, mesh: Any) -> dict[str, Tensor]:
    """Every weight and the input a DTensor; of torch's attention kernels MATH takes those."""
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    layer = distribute_module(parallel_layer(), mesh)
    with sdpa_kernel(SDPBackend.MATH):
        return backward(layer, distribute_tensor(parallel_src(), mesh, [Replicate()]))


SCENARIOS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "ddp": run_ddp,
    "ddp, dropout": run_ddp_dropout,
    "fsdp2": run_fsdp,
    "fsdp2, bf16": run_fsdp_bf16,
    "tensor parallel": run_tensor_parallel,
    "tensor parallel, sharded hidden": partial(run_tensor_parallel, local=False),
    "tensor parallel, dropout": partial(run_tensor_parallel, dropout=0.3),
    "replicated": run_replicated,
}


def run_scenarios(rank: int, folder: str) -> None:
    """One process: every scenario, its result or its error in a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=store)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    for i, run in enumerate(SCENARIOS.values()):
        try:
            result: Any = run(rank, mesh)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        torch.save(result, f"{folder}/{i}.{rank}.pt")
        dist.barrier()
    sys.path.insert(0, str(ROOT / "examples"))
    from training import leave  # else a thread of gloo's may abort this process at its end

    leave(mesh)


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory) -> Callable[[str], list[dict[str, Tensor]]]:
    """The results of a scenario on both ranks; all run once, in one pair of processes."""
    folder: Path = tmp_path_factory.mktemp("processes")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    mp.spawn(run_scenarios, (str(folder),), nprocs=WORLD)

    def results(name: str) -> list[dict[str, Tensor]]:
        index = list(SCENARIOS).index(name)
        found = [torch.load(folder / f"{index}.{rank}.pt") for rank in range(WORLD)]
        for result in found:
            assert not isinstance(result, str), result
        return found

    return results


def averaged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What data parallelism leaves on every rank: outputs of its own, mean gradients."""
    grads = {name: sum(part[name] for part in parts) / WORLD for name in parts[0]}
    return {**grads, "output": torch.cat([part["output"] for part in parts])}


def test_data_parallel(scenarios):
    found = scenarios("ddp")
    stock = parallel_layer(nn.TransformerEncoderLayer)
    parts = []
    for rank in range(WORLD):
        stock.zero_grad()
        parts.append(backward(stock, shard(rank)))
    expected = averaged(parts)
    for rank, result in enumerate(found):
        torch.testing.assert_close(result.pop("output"), parts[rank]["output"])
        for name, grad in result.items():
            torch.testing.assert_close(grad, expected[name], msg=name)


def test_data_parallel_ranks_drop_by_their_own_generators(scenarios):
    first, second = scenarios("ddp, dropout")
    assert not torch.equal(first.pop("output"), second.pop("output"))
    for name, grad in first.items():
        assert torch.equal(grad, second[name])  # averaged
    _, alone = parallel_layer(), []
    for rank in range(WORLD):
        layer = parallel_layer(dropout=0.3)
        torch.manual_seed(rank)
        alone.append(backward(layer, shard(0)))
    for name, grad in first.items():
        torch.testing.assert_close(grad, averaged(alone)[name])


def test_fully_sharded(scenarios):
    found = scenarios("fsdp2")
    stock = nn.Sequential(*(parallel_layer(nn.TransformerEncoderLayer) for _ in range(2)))
    parts = []
    for rank in range(WORLD):
        stock.zero_grad()
        parts.append(backward(stock, shard(rank)))
    expected = averaged(parts)
    for rank, result in enumerate(found):
        torch.testing.assert_close(result.pop("output"), parts[rank]["output"])
        for name, grad in result.items():
            torch.testing.assert_close(grad, expected[name], msg=name)


def test_fully_sharded_in_bf16(scenarios):
    for result in scenarios("fsdp2, bf16"):
        assert result["output"].dtype == torch.bfloat16
        assert all(x.isfinite().all() for x in result.values())
        assert all(x.dtype == torch.float32 for name, x in result.items() if name != "output")


@pytest.mark.parametrize(
    "name", ["tensor parallel", "tensor parallel, sharded hidden", "replicated"]
)
def test_tensor_parallel(scenarios, name):
    expected = backward(parallel_layer(nn.TransformerEncoderLayer), parallel_src())
    for result in scenarios(name):
        assert_equal_runs(result, expected, 1e-9)


def test_tensor_parallel_with_dropout(scenarios):
    """Ranks with equal generators agree on the residual stream."""
    first, second = scenarios("tensor parallel, dropout")
    assert_equal_runs(first, second)
    plain = backward(parallel_layer(), parallel_src())
    assert not torch.allclose(first["output"], plain["output"])
    assert all(x.isfinite().all() for x in first.values())
