"""Masks that torch refuses or warns about: ours does so in the same words."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from tests.layers.attachments import hooked
from tests.layers.masks import BATCH, LENGTH, as_float, bool_padding, scattered
from tests.layers.pairs import BOTH, ORDERS, WIDTH, pair, tokens

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
@pytest.mark.parametrize("hook", [False, True], ids=["fused", "self_attn as module"])
def test_mismatched_mask_dtypes_warn_as_in_torch(bool_first, hook):
    stock, fused = pair()
    mask, padding = scattered(), bool_padding()
    masks = (mask, as_float(padding)) if bool_first else (as_float(mask), padding)
    src = tokens(BATCH, LENGTH)
    expected = warnings_of(stock, src, *masks)
    assert len(expected) == 1 and "mismatched src_key_padding_mask" in expected[0][1]
    fused = hooked(fused) if hook else fused
    assert warnings_of(fused, src, *masks) == expected
    assert warnings_of(fused, src, mask, padding) == []
