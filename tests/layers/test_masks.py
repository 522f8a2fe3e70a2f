"""Masks in every form torch's encoder layer takes.

The oracle is the stock layer in training mode at dropout 0, which never takes torch's inference
fast path, and with dropout on the stock layer with the contract's decisions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import FusedEncoderLayer
from tests.layers.attachments import CallsSuper, hooked
from tests.layers.masks import (
    BATCH,
    LENGTH,
    PADDING_MASKS,
    SRC_MASKS,
    as_float,
    bias,
    bool_padding,
    causal,
    scattered,
)
from tests.layers.pairs import (
    BOTH,
    HEADS,
    ORDERS,
    assert_equal_runs,
    cotangent,
    gradients,
    pair,
    tokens,
)
from tests.reference import ReplayEncoderLayer

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")


@BOTH
@ORDERS
@pytest.mark.parametrize("src_mask", SRC_MASKS)
@pytest.mark.parametrize("padding", PADDING_MASKS)
def test_every_form(norm_first, batch_first, src_mask, padding):
    """In training, in eval with gradients and without: the values of stock's training forward."""
    stock, fused = pair(norm_first=norm_first, batch_first=batch_first)
    masks = (SRC_MASKS[src_mask](), PADDING_MASKS[padding]())
    src = tokens(BATCH, LENGTH) if batch_first else tokens(LENGTH, BATCH)
    expected = gradients(stock, src, *masks)
    assert_equal_runs(gradients(fused, src, *masks), expected)
    fused.eval()
    assert_equal_runs(gradients(fused, src, *masks), expected)
    with torch.no_grad():
        torch.testing.assert_close(fused(src, *masks), expected["output"], rtol=1e-10, atol=1e-10)


@BOTH
@ORDERS
@pytest.mark.parametrize(
    ("src_mask", "padding"),
    [("bool", "0/-inf"), ("bias per head", "bool"), ("0/-inf", "bias"), ("bias", "none")],
)
def test_masks_with_dropout(norm_first, batch_first, src_mask, padding, contract_seeds):
    replay, fused = pair(
        dropout=0.3, norm_first=norm_first, batch_first=batch_first, stock=ReplayEncoderLayer
    )
    masks = (SRC_MASKS[src_mask](), PADDING_MASKS[padding]())
    masks = tuple(
        x.requires_grad_() if x is not None and x.is_floating_point() else x for x in masks
    )
    src = tokens(BATCH, LENGTH) if batch_first else tokens(LENGTH, BATCH)
    torch.manual_seed(2)
    expected = gradients(replay, src, *masks)
    torch.manual_seed(2)
    assert_equal_runs(gradients(fused, src, *masks), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("src_mask", "padding"),
    [("bias", "none"), ("bias per head", "bool"), ("bias", "bias"), ("none", "bias")],
)
def test_gradients_flow_to_float_masks(src_mask, padding, dropout, contract_seeds):
    kind = ReplayEncoderLayer if dropout else nn.TransformerEncoderLayer
    stock, fused = pair(dropout=dropout, stock=kind)
    masks = (SRC_MASKS[src_mask](), PADDING_MASKS[padding]())
    masks = tuple(
        x.requires_grad_() if x is not None and x.is_floating_point() else x for x in masks
    )
    src = tokens(BATCH, LENGTH)
    torch.manual_seed(4)
    expected = gradients(stock, src, *masks)
    torch.manual_seed(4)
    ours = gradients(fused, src, *masks)
    assert_equal_runs(ours, expected)
    assert sum(name.startswith("mask") for name in ours) == sum(
        x is not None and x.requires_grad for x in masks
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_gradient_for_the_mask_alone(dropout):
    """Nothing else requires grad: neither the input nor a weight (pytorch #188302)."""
    _, fused = pair(dropout=dropout)
    src, seed = tokens(2, 64), torch.tensor([1])
    mask = bias(64, 64).requires_grad_()
    fused(src, mask, seed=seed).backward(cotangent(src))
    expected, mask.grad = mask.grad, None
    fused.requires_grad_(False)
    fused(src, mask, seed=seed).backward(cotangent(src))
    torch.testing.assert_close(mask.grad, expected)
    assert expected.isfinite().all() and expected.any()


@pytest.mark.parametrize("length", [64, 192])
def test_gradients_with_a_mask_where_length_leaves_64_over_128(length):
    """pytorch #196678: NaN in the gradient of the query."""
    stock, fused = pair()
    mask, padding = as_float(causal(length)), as_float(bool_padding(2, length))
    src = tokens(2, length)
    ours = gradients(fused, src, mask, padding)
    assert all(x.isfinite().all() for x in ours.values())
    assert_equal_runs(ours, gradients(stock, src, mask, padding), 1e-9)


# ------------------------------------------------------------------------------ unbatched, empty


@BOTH
@ORDERS
@pytest.mark.parametrize(
    "src_mask",
    [None, scattered(), as_float(scattered()), scattered(HEADS), bias(HEADS, LENGTH, LENGTH)],
    ids=["none", "bool", "0/-inf", "bool per head", "bias per head"],
)
@pytest.mark.parametrize(
    "padding", [None, torch.arange(LENGTH) > 3, bias(LENGTH)], ids=["none", "bool", "float"]
)
def test_unbatched(norm_first, batch_first, src_mask, padding):
    stock, fused = pair(norm_first=norm_first, batch_first=batch_first)
    src = tokens(LENGTH)
    expected = gradients(stock, src, src_mask, padding)
    assert_equal_runs(gradients(fused, src, src_mask, padding), expected)
    with torch.no_grad():
        out = fused.eval()(src, src_mask, padding)
    torch.testing.assert_close(out, expected["output"], rtol=1e-10, atol=1e-10)


@ORDERS
@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0), (0, 0)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_empty_with_masks(batch_first, batch, length, dropout):
    """Stock raises where there are masks; without, it gives what ours gives with them."""
    stock, fused = pair(dropout=dropout, batch_first=batch_first)
    src = tokens(batch, length) if batch_first else tokens(length, batch)
    padding = torch.zeros(batch, length, dtype=torch.bool)
    expected = gradients(stock, src)
    for masks in (
        (None, padding),
        (causal(length), padding),
        (as_float(causal(length)), as_float(padding)),
        (torch.zeros(batch * HEADS, length, length), None),
        (causal(length), None, True),
    ):
        assert_equal_runs(gradients(fused, src, *masks), expected)
        with torch.no_grad():
            assert fused.eval()(src, *masks).shape == src.shape
        fused.train()


# -------------------------------------------------------------------------------------- is_causal


@ORDERS
@pytest.mark.parametrize("mask", [causal(), as_float(causal())], ids=["bool", "float"])
def test_a_causal_mask_with_the_hint(batch_first, mask):
    stock, fused = pair(batch_first=batch_first)
    src = tokens(BATCH, LENGTH) if batch_first else tokens(LENGTH, BATCH)
    expected = gradients(stock, src, mask)
    assert_equal_runs(gradients(fused, src, mask, None, True), expected)
    assert_equal_runs(gradients(fused, src, mask, is_causal=True), expected)
    assert_equal_runs(gradients(fused.eval(), src, mask, is_causal=True), expected)


def test_the_hint_replaces_any_mask():
    stock, fused = pair()
    src, mask = tokens(BATCH, LENGTH), scattered()
    expected = gradients(stock, src, causal())
    assert_equal_runs(gradients(stock, src, mask, is_causal=True), expected)
    assert_equal_runs(gradients(fused, src, mask, is_causal=True), expected)
    assert_equal_runs(gradients(fused.eval(), src, mask, is_causal=True), expected)


@pytest.mark.parametrize(
    "padding", [bool_padding(), as_float(bool_padding())], ids=["bool", "float"]
)
def test_with_padding_the_hint_is_dropped_and_the_mask_used(padding):
    stock, fused = pair()
    src, mask = tokens(BATCH, LENGTH), scattered()
    expected = gradients(stock, src, mask, padding, True)
    assert_equal_runs(expected, gradients(stock, src, mask, padding))
    assert_equal_runs(gradients(fused, src, mask, padding, True), expected)
    assert_equal_runs(gradients(fused.eval(), src, mask, padding, True), expected)


# ----------------------------------------------------------------------------- fully masked rows


def parametrized(layer: FusedEncoderLayer) -> FusedEncoderLayer:
    nn.utils.parametrize.register_parametrization(
        layer.self_attn, "in_proj_weight", nn.Identity(), unsafe=True
    )
    return layer


PATHS: dict[str, Callable[[FusedEncoderLayer], Callable]] = {
    "fused": lambda layer: layer,
    "self_attn as module": hooked,
    "self_attn parametrized": parametrized,
    "compiled": lambda layer: torch.compile(layer, backend="aot_eager", fullgraph=True),
    "compiled, self_attn as module": lambda layer: torch.compile(
        hooked(layer), backend="aot_eager"
    ),
    "_sa_block overridden": lambda layer: layer,
}
FULLY_MASKED = {
    "padding": (None, torch.tensor([[True] * LENGTH, [False] * LENGTH])),
    "float padding": (None, as_float(torch.tensor([[True] * LENGTH, [False] * LENGTH]))),
    "rows of the mask": ((torch.arange(LENGTH) < 2)[:, None].expand(LENGTH, LENGTH), None),
    "both together": (causal().T.contiguous(), torch.arange(LENGTH).expand(2, LENGTH) > 3),
    "everything": (torch.ones(LENGTH, LENGTH, dtype=torch.bool), None),
}


#: Compilers are slow: pre-norm with padding, post-norm with what masks make fully masked.
PATHS_AND_MASKS = [
    (path, masks, norm_first)
    for path, masks, norm_first in itertools.product(PATHS, FULLY_MASKED, (False, True))
    if "compiled" not in path or norm_first == (masks == "padding")
]


@pytest.mark.parametrize(("path", "masks", "norm_first"), PATHS_AND_MASKS)
def test_fully_masked_rows_attend_to_nothing(path, masks, norm_first):
    """Attention output 0 and finite gradients in training, eval and under no_grad.

    Stock gives that in training; its inference fast path gives NaN (pytorch #118628, #190486).
    """
    stock, fused = pair(
        norm_first=norm_first, fused=CallsSuper if "overridden" in path else FusedEncoderLayer
    )
    src, masks = tokens(2, LENGTH), FULLY_MASKED[masks]
    expected = gradients(stock, src, *masks)
    assert all(x.isfinite().all() for x in expected.values())
    torch.compiler.reset()
    parameters = dict(fused.named_parameters())
    run = PATHS[path](fused)
    modes = itertools.product((True, False), repeat=2)
    if "compiled" in path:  # each mode is a graph of its own
        modes = [(True, True), (False, False)]
    for training, grad in modes:
        fused.train(training)
        if not grad:
            with torch.no_grad():
                torch.testing.assert_close(run(src, *masks), expected["output"])
            continue
        leaf = src.clone().requires_grad_()
        out = run(leaf, *masks)
        fused.zero_grad()
        out.backward(cotangent(out))
        ours = {"output": out.detach(), "src": leaf.grad}
        ours |= {name: p.grad for name, p in parameters.items()}
        assert_equal_runs(ours, expected)


@pytest.mark.parametrize("masks", FULLY_MASKED.values(), ids=FULLY_MASKED)
@pytest.mark.parametrize("hook", [False, True], ids=["fused", "self_attn as module"])
def test_fully_masked_rows_with_dropout(masks, hook):
    _, fused = pair(dropout=0.3)
    fused = hooked(fused) if hook else fused
    found = gradients(fused, tokens(2, LENGTH), *masks)
    assert all(x.isfinite().all() for x in found.values())


def test_what_a_fully_masked_row_gives():
    """LN(x + bias of out_proj), spelled out once."""
    _, fused = pair()
    src = tokens(1, LENGTH)
    everything = torch.ones(1, LENGTH, dtype=torch.bool)
    for training in (True, False):
        fused.train(training)
        with torch.no_grad():
            x = fused.norm1(src + fused.self_attn.out_proj.bias)
            hidden = fused.linear1(x).relu()
            expected = fused.norm2(x + fused.linear2(hidden))
            torch.testing.assert_close(fused(src, None, everything), expected)


# ----------------------------------------------------------------------------------- no expansion


class Shapes(TorchDispatchMode):
    """The operations that return a tensor with as many elements as (N, H, L, L) scores."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= x.element_size() * (
                self.elements
            ):
                self.found.append(func.name())
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("float_masks", [False, True])
def test_both_masks_are_never_expanded_over_heads(dropout, float_masks):
    """Nothing as large as the scores leaves an op, and none of it is saved for backward."""
    length = 48  # scores are larger than every activation
    _, fused = pair(dropout=dropout, dtype=torch.float32)
    masks = (scattered(length=length), bool_padding(BATCH, length))
    if float_masks:
        masks = tuple(as_float(mask, torch.float32) for mask in masks)
    src = tokens(BATCH, length, dtype=torch.float32).requires_grad_()
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.untyped_storage().nbytes())
        return x

    scores = BATCH * HEADS * length * length
    with Shapes(scores) as mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fused(src, *masks).sum().backward()
    assert mode.found == []
    assert saved and max(saved) < 4 * scores


def test_stock_expands_both_masks():
    """What the test above looks for is there to be found."""
    stock, _ = pair(dtype=torch.float32)
    src = tokens(BATCH, 48, dtype=torch.float32).requires_grad_()
    with Shapes(BATCH * HEADS * 48 * 48) as mode:
        stock(src, scattered(length=48), bool_padding(BATCH, 48))
    assert mode.found
