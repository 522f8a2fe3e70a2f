"""A compiled or exported layer is the eager one, dropping the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize

from tests.layers.attachments import Lora, Scaled
from tests.layers.pairs import (
    BOTH,
    SEED,
    assert_as_exact,
    assert_equal_runs,
    gradients,
    padding_of,
    pair,
    tokens,
)


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
def test_inductor_drops_the_same_for_a_seed(norm_first):
    _, fused = pair(norm_first=norm_first, dropout=0.3, dtype=torch.float32)
    src, mask = tokens(2, 5, dtype=torch.float32), padding_of()
    run = compiled(fused, "inductor")
    expected = gradients(fused, src, None, mask, seed=SEED)
    assert_equal_runs(gradients(fused, src, None, mask, call=run, seed=SEED), expected, 1e-4)


def test_inductor_draws_seeds():
    """Eager's where inductor uses torch's generator, else its own, others at every call."""
    _, fused = pair(dropout=0.3, dtype=torch.float32)
    src = tokens(2, 5, dtype=torch.float32)
    run = compiled(fused, "inductor")
    with torch.no_grad():
        assert not torch.equal(run(src), run(src))
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
    exact = gradients(copy.deepcopy(fused).double(), src.double(), seed=SEED)
    with torch.autocast("cpu", torch.bfloat16):
        eager = gradients(fused, src, seed=SEED)
        found = gradients(fused, src, call=run, seed=SEED)
    assert found["output"].dtype == torch.float32
    assert_as_exact(found, eager, exact)


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
