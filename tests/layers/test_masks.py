"""Masks in every form torch's encoder layer takes, alone and inside ``nn.TransformerEncoder``.

The oracle is the stock layer in training mode at dropout 0, which never takes torch's inference
fast path, and with dropout on the stock layer with the contract's decisions.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import FusedEncoderLayer, explain
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
from tests.reference import ReplayEncoderLayer

BATCH, LENGTH = 3, 6
INFINITY = float("inf")

BOTH = pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
ORDERS = pytest.mark.parametrize("batch_first", [True, False], ids=["batch", "sequence"])


def bool_padding(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """Sequences of different lengths, none of them empty."""
    lengths = length - torch.arange(batch) * (length - 1) // max(batch, 1)
    return torch.arange(length) >= lengths[:, None]


def as_float(mask: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(mask, -INFINITY)


def causal(length: int = LENGTH) -> Tensor:
    return torch.ones(length, length).triu(1).bool()


def scattered(*leading: int, length: int = LENGTH) -> Tensor:
    """A random bool mask in which every query keeps a key, itself."""
    mask = torch.rand(*leading, length, length) < 0.4
    return mask & ~torch.eye(length, dtype=torch.bool)


def bias(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


SRC_MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "bool": scattered,
    "0/-inf": lambda: as_float(scattered()),
    "bias": lambda: bias(LENGTH, LENGTH),
    "bool per head": lambda: scattered(BATCH * HEADS),
    "0/-inf per head": lambda: as_float(scattered(BATCH * HEADS)),
    "bias per head": lambda: bias(BATCH * HEADS, LENGTH, LENGTH),
    "bias per head, expanded": lambda: bias(1, LENGTH, LENGTH).expand(BATCH * HEADS, -1, -1),
}
PADDING_MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "bool": bool_padding,
    "0/-inf": lambda: as_float(bool_padding()),
    "bias": lambda: bias(BATCH, LENGTH),
    "bool, leading": lambda: bool_padding().flip(1),
    "bool, scattered": lambda: torch.rand(BATCH, LENGTH) < (torch.arange(LENGTH) > 0) * 0.6,
}


@pytest.fixture(autouse=True)
def _mismatched_masks_may_warn():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched")
        yield


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


def hooked(layer: FusedEncoderLayer) -> FusedEncoderLayer:
    layer.self_attn.register_forward_hook(lambda *_: None)
    return layer


class CallsSuper(FusedEncoderLayer):
    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        return super()._sa_block(x, attn_mask, key_padding_mask, is_causal)


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
    for training in (True, False):
        fused.train(training)
        leaf = src.clone().requires_grad_()
        out = run(leaf, *masks)
        fused.zero_grad()
        out.backward(cotangent(out))
        ours = {"output": out.detach(), "src": leaf.grad}
        ours |= {name: p.grad for name, p in parameters.items()}
        assert_equal_runs(ours, expected)
        with torch.no_grad():
            torch.testing.assert_close(run(src, *masks), expected["output"])


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


# ------------------------------------------------------------------------------ errors, warnings


BAD = {
    "int mask": ((2, 6), torch.zeros(6, 6, dtype=torch.int64), None, False),
    "uint8 mask": ((2, 6), torch.zeros(6, 6, dtype=torch.uint8), None, False),
    "int padding": ((2, 6), None, torch.zeros(2, 6, dtype=torch.int64), False),
    "uint8 padding": ((2, 6), None, torch.zeros(2, 6, dtype=torch.uint8), False),
    "complex padding": ((2, 6), None, torch.zeros(2, 6, dtype=torch.complex64), False),
    "both int": ((2, 6), torch.zeros(6, 6).int(), torch.zeros(2, 6).int(), False),
    "1-D mask": ((2, 6), torch.zeros(6), None, False),
    "4-D mask": ((2, 6), torch.zeros(2, 4, 6, 6), None, False),
    "mask of another length": ((2, 6), torch.zeros(5, 5), None, False),
    "mask not square": ((2, 6), torch.zeros(6, 5), None, False),
    "3-D mask of one head": ((2, 6), torch.zeros(2, 6, 6), None, False),
    "3-D mask of another length": ((2, 6), torch.zeros(8, 6, 5), None, False),
    "3-D mask, other batch": ((2, 6), torch.zeros(12, 6, 6), None, False),
    "1-D padding": ((2, 6), None, torch.zeros(6, dtype=torch.bool), False),
    "3-D padding": ((2, 6), None, torch.zeros(2, 6, 6, dtype=torch.bool), False),
    "padding of another batch": ((2, 6), None, torch.zeros(3, 6, dtype=torch.bool), False),
    "padding of another length": ((2, 6), None, torch.zeros(2, 5, dtype=torch.bool), False),
    "padding transposed": ((2, 6), None, torch.zeros(6, 2, dtype=torch.bool), False),
    "padding and a bad mask": ((2, 6), torch.zeros(5, 5), torch.zeros(2, 5), False),
    "unbatched, 2-D padding": ((6,), None, torch.zeros(1, 6, dtype=torch.bool), False),
    "unbatched, other length": ((6,), None, torch.zeros(5, dtype=torch.bool), False),
    "unbatched, 3-D mask": ((6,), torch.zeros(3, 6, 6), None, False),
    "unbatched, 4-D mask": ((6,), torch.zeros(1, 4, 6, 6), None, False),
    "unbatched, 2-D mask": ((6,), torch.zeros(5, 6), None, False),
    "hint without a mask": ((2, 6), None, None, True),
    "hint with padding only": ((2, 6), None, torch.zeros(2, 6, dtype=torch.bool), True),
    "hint and 4-D mask": ((2, 6), torch.zeros(2, 4, 6, 6), None, True),
    "4-D src": ((1, 2, 6), None, None, False),
    "1-D src": ((), None, None, False),
    "4-D src with a mask": ((1, 2, 6), torch.zeros(6, 6), None, False),
}


def error_of(layer: nn.Module, *arguments: object) -> tuple[type, str]:
    with pytest.raises(Exception) as error:
        layer(*arguments)
    return error.type, str(error.value)


@BOTH
@ORDERS
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_errors_have_torchs_type_and_words(norm_first, batch_first, bad):
    stock, fused = pair(norm_first=norm_first, batch_first=batch_first, dtype=torch.float32)
    shape, mask, padding, is_causal = bad
    if len(shape) == 2 and not batch_first:
        shape = shape[::-1]
    arguments = (tokens(*shape, dtype=torch.float32), mask, padding, is_causal)
    expected = error_of(stock, *arguments)
    assert error_of(fused, *arguments) == expected
    assert error_of(fused.eval(), *arguments) == expected
    with torch.no_grad():
        assert error_of(fused, *arguments) == expected
    assert error_of(hooked(fused), *arguments) == expected


@BOTH
@ORDERS
@pytest.mark.parametrize("shape", [(2, 6), (6,)], ids=["batched", "unbatched"])
def test_a_wrong_width_has_torchs_type_and_words(norm_first, batch_first, shape):
    stock, fused = pair(norm_first=norm_first, batch_first=batch_first, dtype=torch.float32)
    src = torch.randn(*shape, WIDTH + 1)
    assert error_of(fused, src) == error_of(stock, src)
    assert error_of(fused.eval(), src) == error_of(stock, src)


def warnings_of(layer: nn.Module, *arguments: object) -> list[tuple[type, str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(*arguments)
    return [(w.category, str(w.message)) for w in caught]


@pytest.mark.parametrize("bool_first", [True, False])
@pytest.mark.parametrize("path", ["fused", "self_attn as module"])
def test_mismatched_mask_dtypes_warn_as_in_torch(bool_first, path):
    stock, fused = pair()
    mask, padding = scattered(), bool_padding()
    masks = (mask, as_float(padding)) if bool_first else (as_float(mask), padding)
    src = tokens(BATCH, LENGTH)
    expected = warnings_of(stock, src, *masks)
    assert len(expected) == 1 and "mismatched src_key_padding_mask" in expected[0][1]
    assert warnings_of(PATHS[path](fused), src, *masks) == expected
    assert warnings_of(PATHS[path](fused), src, mask, padding) == []


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


# ---------------------------------------------------------------------------- nn.TransformerEncoder


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
