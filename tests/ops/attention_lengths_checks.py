"""What ``attention`` does with the lengths of sequences, on every backend that has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import attention
from tests import helpers
from tests.ops.attention_inputs import (
    DROPOUT,
    HALF,
    INF,
    NAN,
    P,
    beyond,
    check,
    lengths_tensor,
    make_inputs,
    make_qkv,
)
from tests.ops.backends import (
    SPREADS,
    Backend,
    not_yet,
)

OPS = ("attention",)
pytestmark = pytest.mark.usefixtures("larger_tiles", "few_without_dropout")


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("sizes", [(33, 21), (65, 300)], ids=str)
@pytest.mark.parametrize("kind", [HALF, (torch.float32, 64)], ids=str)
def test_lengths_are_masks(
    backend: Backend, kind: tuple[torch.dtype, int], sizes: tuple[int, int], dropout_p: float
) -> None:
    dtype, head_dim = kind
    queries = lengths_tensor(sizes[0], 4, sizes[0], 0)
    keys = lengths_tensor(sizes[1], sizes[1] // 2, 0, 1)
    past_queries, past_keys = beyond(queries, sizes[0]), beyond(keys, sizes[1])
    inputs = make_qkv(4, *sizes, 1, head_dim, dtype)
    lengths = {"query_lengths": queries, "key_lengths": keys}
    pairs = past_queries[:, None, :, None].expand(4, 1, *sizes)
    masks = {"key_padding_mask": past_keys, "attn_mask": pairs}
    check(backend, inputs, dropout_p, ours=lengths, masks=masks)
    ours = backend.of(attention, **{**DROPOUT, "dropout_p": dropout_p}, **lengths)
    assert (ours(**inputs)[past_queries] == 0).all() and (ours(**inputs)[2] == 0).all()


def test_lengths_of_any_stride(backend: Backend) -> None:
    inputs = make_qkv(3, 40, 50)
    lengths = torch.tensor([[7, 33, 21], [50, 0, 13]], dtype=torch.int32)

    def strided(query_lengths: Tensor, key_lengths: Tensor, **arguments: Any) -> Tensor:
        apart = [x.repeat_interleave(2)[::2] for x in (query_lengths, key_lengths)]
        assert not apart[0].is_contiguous()
        return attention(query_lengths=apart[0], key_lengths=apart[1], **arguments)

    given = {"query_lengths": lengths[0], "key_lengths": lengths[1]}
    expected, found = (
        helpers.results_of(backend.of(op, **DROPOUT, **given), inputs)
        for op in (attention, strided)
    )
    helpers.assert_same(found, expected)
    same = lengths_tensor(9).expand(3)
    found, expected = (
        helpers.results_of(backend.of(attention, **DROPOUT, key_lengths=x), inputs)
        for x in (same, same.contiguous())
    )
    helpers.assert_same(found, expected)


@pytest.mark.parametrize("special", [NAN, INF])
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("case", ["no mask", "masks", "causal", "16 bits", "long"])
def test_ignored_rows_reach_nothing(
    backend: Backend, case: str, dropout_p: float, special: float
) -> None:
    """NaN in what lengths exclude, in the gradient flowing in and in masks there as well."""
    dtype, head_dim = HALF if case in ("16 bits", "long") else (torch.float32, 64)
    sizes = (64, 300) if case == "long" else (33, 21)
    inputs = make_inputs(3, *sizes, 2, head_dim, dtype)
    if case == "masks":
        inputs.update(key_padding_mask=torch.randn(3, 21), attn_mask=torch.randn(3, 2, 33, 21))
    lengths = {"query_lengths": lengths_tensor(18, 33, 0), "key_lengths": lengths_tensor(21, 9, 0)}
    past = {"query": beyond(lengths["query_lengths"], sizes[0])}
    past["key"] = past["value"] = beyond(lengths["key_lengths"], sizes[1])
    options = {**DROPOUT, "dropout_p": dropout_p, "is_causal": case == "causal"}
    ours = backend.of(attention, **options, **lengths)
    grad = torch.randn(3, sizes[0], 2, head_dim)

    def run(value: float) -> helpers.Results:
        filled = dict(inputs)
        for name, rows in past.items():
            filled[name] = inputs[name].masked_fill(rows[..., None, None], value)
        if case == "masks" and value != 0:
            padding = inputs["key_padding_mask"]
            filled["key_padding_mask"] = padding.masked_fill(past["key"], NAN)
        d_out = grad.masked_fill(past["query"][..., None, None], value)
        return helpers.results_of(ours, filled, cotangents=[d_out])

    found = run(special)
    helpers.assert_same(found, run(0.0))
    assert not found["output 0"][past["query"]].any()
    for name, rows in past.items():
        assert not found[f"gradient of {name}"][rows].any(), name
    assert found["gradient of value"].any()


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_nan_that_counts_stays_out_of_ignored_rows(
    backend: Backend, dropout_p: float, request: pytest.FixtureRequest
) -> None:
    not_yet(request, backend, SPREADS)
    inputs = make_qkv(2, 20, 18)
    inputs["value"][0, 1] = inputs["key"][1, 0] = inputs["query"][1, 2] = NAN
    queries, keys = lengths_tensor(17, 3), lengths_tensor(16, 2)
    options = {**DROPOUT, "dropout_p": dropout_p}
    ours = backend.of(attention, **options, query_lengths=queries, key_lengths=keys)
    results = helpers.results_of(ours, inputs)
    assert results["output 0"][0, :17].isnan().any()
    for name, lengths in (("query", queries), ("key", keys), ("value", keys)):
        rows = beyond(lengths, inputs[name].shape[1])
        assert not results[f"gradient of {name}"][rows].any(), name
    assert not results["output 0"][beyond(queries, 20)].any()
