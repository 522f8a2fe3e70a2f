"""``attention`` and ``attention_packed`` against float64, with the same dropout decisions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import attention, attention_packed
from fastattn.arguments import AttentionArguments
from tests import helpers, reference

INF = float("inf")
P = 0.125  # 2048 / 16384: eager's 1 / (1 - p) is then exactly the contract's scale
SEED = 2**62 + 12345
SITE = 8


def seed_tensor(seed: int = SEED) -> Tensor:
    return torch.tensor([seed])


def make_inputs(
    batch: int = 2,
    seqlen_q: int = 63,
    seqlen_k: int = 63,
    heads: int = 3,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    def tokens(length: int) -> Tensor:
        return torch.randn(batch, length, heads, head_dim).to(dtype)

    inputs = {"query": tokens(seqlen_q), "key": tokens(seqlen_k), "value": tokens(seqlen_k)}
    return {**inputs, "key_padding_mask": None, "attn_mask": None}


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """torch's own attention; with ``keep`` the unfused one, which takes the elements to drop."""
    bias = None
    if is_causal:
        later = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).triu(1)
        bias = reference.additive(later).to(query.dtype)
    for mask in (None if key_padding_mask is None else key_padding_mask[:, None, None], attn_mask):
        if mask is not None:
            term = reference.additive(mask).to(query.dtype) if mask.dtype == torch.bool else mask
            bias = term if bias is None else bias + term
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[2])
    if keep is None:
        out = F.scaled_dot_product_attention(q, k, v, bias)
    else:
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(
            q, k, v, bias, dropout_p, False, dropout_mask=keep
        )
    return out.transpose(1, 2)


def check(
    inputs: dict[str, Tensor | None],
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **constants: Tensor,
) -> None:
    """Accuracy of the output and of the gradients of ``inputs``, given ``constants``."""
    query, key = inputs["query"], inputs["key"]
    shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    keep = reference.attention_keep(SEED, SITE, dropout_p, shape) if dropout_p else None
    multiplier = None if keep is None else reference.factor(keep, dropout_p)
    constants["is_causal"] = is_causal
    ours = partial(attention, dropout_p=dropout_p, seed=seed_tensor(), site=SITE, **constants)
    eager = partial(eager_attention, dropout_p=dropout_p, keep=keep, **constants)
    oracle = partial(reference.attention, multiplier=multiplier, **constants)
    helpers.assert_as_accurate_as_eager(ours, eager, oracle, inputs)


def some_keys_masked(batch: int, length: int) -> Tensor:
    """(batch, length) bool, True to ignore; every sequence keeps a key."""
    lengths = torch.randint(1, length + 1, (batch, 1))
    return torch.arange(length) >= lengths


# ---------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_accuracy_of_dtypes(dtype: torch.dtype, dropout_p: float) -> None:
    inputs = make_inputs(seqlen_q=127, seqlen_k=127, head_dim=40, dtype=dtype)
    check(inputs, dropout_p)
    inputs["attn_mask"] = torch.randn(3, 127, 127).to(dtype)
    inputs["key_padding_mask"] = torch.randn(2, 127).to(dtype)
    check({**inputs, "attn_mask": inputs["attn_mask"][None]}, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 127), (127, 1), (63, 127), (127, 63), (33, 1000)])
def test_accuracy_of_lengths(lengths: tuple[int, int], dropout_p: float) -> None:
    check(make_inputs(1, *lengths), dropout_p)
    check(make_inputs(1, *lengths), dropout_p, is_causal=True)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("head_dim", [1, 8, 40, 80, 96])
def test_accuracy_of_head_dims(head_dim: int, dropout_p: float) -> None:
    check(make_inputs(head_dim=head_dim), dropout_p)


def sequence_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_other_row(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 1)[:, ::2]


def strided_features(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


LAYOUTS = (sequence_first, heads_first, every_other_row, strided_features)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_accuracy_of_layouts(layout: Callable[[Tensor], Tensor], dropout_p: float) -> None:
    inputs = make_inputs()
    inputs.update({name: layout(inputs[name]) for name in ("query", "key", "value")})
    assert not inputs["query"].is_contiguous()
    check(inputs, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("batch, seqlen_q, seqlen_k", [(0, 5, 5), (2, 0, 5), (2, 0, 0), (2, 5, 0)])
def test_nothing_in_gives_nothing_or_zeros(
    batch: int, seqlen_q: int, seqlen_k: int, dropout_p: float
) -> None:
    inputs = make_inputs(batch, seqlen_q, seqlen_k)
    ours = partial(attention, dropout_p=dropout_p, seed=seed_tensor())
    masks = {
        "key_padding_mask": torch.zeros(batch, seqlen_k),
        "attn_mask": torch.zeros(1, seqlen_k),
    }
    for case in (inputs, {**inputs, **masks}):
        results = helpers.results_of(ours, case)
        assert results["output 0"].shape == inputs["query"].shape
        assert all((x == 0).all() for x in results.values())


# ------------------------------------------------------------------------------------- masks

MASK_SHAPES = [
    (21,), (1, 21), (33, 1), (33, 21), (3, 1, 21), (1, 33, 21), (3, 33, 21), (1, 1, 1, 21),
    (2, 1, 1, 1), (2, 1, 33, 21), (1, 3, 33, 1), (2, 3, 1, 21), (2, 3, 33, 21), (1,), (),
]  # fmt: skip


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_broadcast_masks(shape: tuple[int, ...], dropout_p: float) -> None:
    inputs = make_inputs(seqlen_q=33, seqlen_k=21)
    check({**inputs, "attn_mask": torch.rand(shape) < 0.3}, dropout_p)
    if shape[-1:] == (21,):
        check({**inputs, "attn_mask": torch.randn(shape)}, dropout_p)
        return
    mask = torch.randn(shape)  # the same for all keys: the softmax does not depend on it
    inputs.pop("attn_mask")
    check(inputs, dropout_p, attn_mask=mask)
    ours = partial(attention, **inputs, dropout_p=dropout_p, seed=seed_tensor())
    gradient = helpers.results_of(ours, {"attn_mask": mask})["gradient of attn_mask"]
    torch.testing.assert_close(gradient, torch.zeros(shape), atol=1e-5, rtol=0)


def mask_cases() -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """(key padding mask, mask) of 2 sequences, 3 heads, 33 queries, 21 keys."""
    generator = torch.Generator().manual_seed(3)
    padding = torch.arange(21) >= torch.tensor([[21], [9]])
    pairs = torch.rand(2, 3, 33, 21, generator=generator) < 0.3
    floats = torch.randn(2, 3, 33, 21, generator=generator)
    return {
        "bool padding": (padding, None),
        "float padding": (floats[:, 0, 0], None),
        "infinite padding": (torch.zeros(2, 21).masked_fill(padding, -INF), None),
        "bool both": (padding, pairs),
        "float both": (floats[:, 0, 0], floats),
        "bool padding, float mask": (padding, floats[:1, :1]),
        "infinite padding, bool mask": (torch.zeros(2, 21).masked_fill(padding, -INF), pairs[0]),
        "infinite both": (
            torch.zeros(2, 21).masked_fill(padding, -INF),
            floats.masked_fill(pairs, -INF),
        ),
        "every key of a sequence": (torch.tensor([[True], [False]]).expand(2, 21), None),
        "every key of some rows": (padding, torch.arange(33)[:, None] % 3 == torch.zeros(21)),
        "every key of every row": (torch.ones(2, 21, dtype=torch.bool), floats),
        "large finite numbers": (torch.zeros(2, 21).masked_fill(padding, -1e30), floats * 1e4),
        "the least finite number": (None, torch.full((33, 21), torch.finfo(torch.float32).min)),
    }


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("case", mask_cases())
def test_masks(case: str, dropout_p: float, is_causal: bool) -> None:
    padding, mask = mask_cases()[case]
    inputs = make_inputs(seqlen_q=33, seqlen_k=21)
    check({**inputs, "key_padding_mask": padding, "attn_mask": mask}, dropout_p, is_causal)


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_long_runs_of_masked_keys(dropout_p: float) -> None:
    inputs = make_inputs(1, 65, 1000)
    check({**inputs, "attn_mask": torch.arange(1000) < 990}, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_row_without_keys_gives_exact_zeros(dtype: torch.dtype, dropout_p: float) -> None:
    inputs = make_inputs(dtype=dtype)
    dead = torch.zeros(2, 1, 63, 63, dtype=torch.bool)
    dead[0, :, 5] = True
    infinite = torch.randn(63, 63).to(dtype)
    infinite[7] = -INF
    ours = partial(attention, dropout_p=dropout_p, seed=seed_tensor())
    for mask, row in ((dead, 5), (infinite, 7)):
        results = helpers.results_of(ours, {**inputs, "attn_mask": mask})
        assert all(x.isfinite().all() for x in results.values())
        assert (results["output 0"][0, row] == 0).all()
        assert (results["gradient of query"][0, row] == 0).all()
        if mask is infinite:
            assert (results["gradient of attn_mask"][row] == 0).all()
    padding = torch.tensor([[True], [False]]).expand(2, 63)
    results = helpers.results_of(ours, {**inputs, "key_padding_mask": padding})
    assert all((x[0] == 0).all() and (x[1] != 0).any() for x in results.values())


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_huge_logits(dropout_p: float) -> None:
    inputs = make_inputs()
    inputs["query"] *= 1e18
    results = helpers.results_of(
        partial(attention, dropout_p=dropout_p, seed=seed_tensor()), inputs
    )
    keep = reference.attention_keep(SEED, 0, dropout_p, (2, 3, 63, 63))
    expected = reference.attention(
        *(inputs[n] for n in ("query", "key", "value")),
        multiplier=reference.factor(keep, dropout_p),
    )
    torch.testing.assert_close(results["output 0"], expected.float())
    assert all(x.isfinite().all() for x in results.values())


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("factor", [3, 10, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_are_not_in_16_bits(dtype: torch.dtype, factor: float, dropout_p: float) -> None:
    """Rounded so, a score of 30 is 0.1 off; and one of 1e5 is no number of fp16."""
    inputs = make_inputs(head_dim=64, dtype=dtype)
    inputs["query"] *= factor
    path = "explicit" if dropout_p else "sdpa"
    multiplier = factor_of(path, (2, 3, 63, 63))
    keep = None if multiplier is None else multiplier != 0
    eager = partial(eager_attention, dropout_p=dropout_p, keep=keep)
    oracle = partial(reference.attention, multiplier=multiplier)
    helpers.assert_as_accurate_as_eager(by_path(path), eager, oracle, inputs)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_is_not_hidden(name: str, dropout_p: float) -> None:
    inputs = make_inputs()
    inputs[name][1, 4] = float("nan")
    for masks in ({}, {"key_padding_mask": torch.zeros(2, 63, dtype=torch.bool)}):
        out = attention(**{**inputs, **masks}, dropout_p=dropout_p, seed=seed_tensor())
        assert out[0].isfinite().all()
        assert out[1].isnan().any(-1).all(-1)[4 if name == "query" else slice(None)].all()


# ------------------------------------------------------- what a mask may hold, in whatever dtype

#: The three ways in which the pytorch backend computes: torch's SDPA, explicit probabilities, and
#: the differentiable composite.
PATHS = ("sdpa", "explicit", "composite", "composite, drops")


def by_path(path: str, **constants: Any) -> Callable[..., Tensor]:
    """``attention`` with ``constants``, computed in one of the PATHS."""
    dropout_p = P if path in ("explicit", "composite, drops") else 0.0
    ours = partial(
        attention,
        dropout_p=dropout_p,
        seed=seed_tensor(),
        site=SITE,
        backend="pytorch",
        **constants,
    )
    return in_composite(ours) if path.startswith("composite") else ours


def in_composite(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same while some transform of torch.func is active."""

    def run(**inputs: Tensor | None) -> Tensor:
        return torch.vmap(lambda _: function(**inputs))(torch.zeros(1))[0]

    return run


def factor_of(path: str, shape: tuple[int, ...]) -> Tensor | None:
    if path in ("sdpa", "composite"):
        return None
    return reference.factor(reference.attention_keep(SEED, SITE, P, shape), P)


def finite_mask_cases() -> dict[str, tuple[torch.dtype, Tensor | None, Tensor | None, dict]]:
    """(dtype of query, key padding mask, mask, constants): numbers, or sums, beyond that dtype."""
    half, low, single, double = torch.float16, torch.bfloat16, torch.float32, torch.float64
    least = torch.finfo(single).min
    some = torch.arange(5) >= torch.tensor([[5], [3]])
    triangle = torch.ones(5, 5, dtype=torch.bool).triu(1)

    def padding(value: float, dtype: torch.dtype, where: Tensor | bool = True) -> Tensor:
        return torch.zeros(2, 5, dtype=dtype).masked_fill(torch.as_tensor(where), value)

    def pairs(value: float, dtype: torch.dtype, where: Tensor | bool = True) -> Tensor:
        return torch.zeros(5, 5, dtype=dtype).masked_fill(torch.as_tensor(where), value)

    generator = torch.Generator().manual_seed(5)
    digits, digits_of_pairs = (torch.randn(n, 5, generator=generator) for n in (2, 5))
    one_key = pairs(-INF, single, torch.arange(5) != 2)
    return {
        "fp16, all keys at -7e4": (half, None, pairs(-7e4, single), {}),
        "fp16, padding at -7e4": (half, padding(-7e4, single), None, {}),
        "fp16, some keys at -7e4": (half, padding(-7e4, single, some), None, {}),
        "fp16, -7e4 or -inf": (half, None, pairs(-7e4, single).masked_fill(triangle, -INF), {}),
        "fp16, one key at 1e5": (half, None, pairs(1e5, single, torch.arange(5) == 2), {}),
        "fp16, bf16 mask at -1e30": (half, padding(-1e30, low), None, {}),
        "bf16, the least fp32": (low, padding(least, single), None, {}),
        "bf16, the least fp32, causal": (low, padding(least, single), None, {"is_causal": True}),
        "bf16, digits of fp32": (low, None, 100 + digits_of_pairs, {}),
        "bf16, digits of fp16": (low, (100 + digits).half(), None, {}),
        "fp16, a sum": (half, padding(-6e4, half), pairs(-6e4, half), {}),
        "fp16, a sum for some": (half, padding(-6e4, half, some), pairs(-6e4, half, triangle), {}),
        "bf16, a sum": (low, *(m(torch.finfo(low).min, low) for m in (padding, pairs)), {}),
        "bf16, digits of a sum": (low, digits.to(low), pairs(100, low), {}),
        "fp32, a sum": (single, padding(least, single), pairs(least, single), {}),
        "fp32, a sum, causal": (
            single, padding(least, single), pairs(least, single), {"is_causal": True},
        ),
        "fp32, a sum where keys are left": (
            single, padding(least, single, torch.arange(5) != 2),
            one_key.masked_fill(one_key == 0, least), {},
        ),
        "fp32, a sum and fp16": (single, padding(-6e4, half), pairs(least, single), {}),
        "fp32, fp64 mask": (single, None, pairs(-1e300, double), {}),
        "fp64, a sum": (double, padding(-1.7e308, double), pairs(-1.7e308, double), {}),
    }  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", finite_mask_cases())
def test_a_finite_mask_is_never_infinite(case: str, path: str) -> None:
    """Rows whose keys are all far down attend to them by what float64 has of their differences."""
    dtype, padding, mask, constants = finite_mask_cases()[case]
    inputs = make_inputs(2, 5, 5, 2, 8, dtype)
    inputs.update(key_padding_mask=padding, attn_mask=mask)
    found = helpers.results_of(by_path(path, **constants), inputs)
    cotangents = helpers.cotangents_of((found["output 0"],))
    factor = factor_of(path, (2, 2, 5, 5))
    if case == "fp64, a sum":  # which the oracle has no number for either
        inputs["attn_mask"] = torch.zeros_like(mask)
    oracle = partial(reference.attention, multiplier=factor, **constants)
    exact = helpers.results_of(oracle, inputs, torch.float64, cotangents)
    assert factor is not None or (found["output 0"] != 0).any(-1).all()
    for name, x in exact.items():
        eps = max(torch.finfo(t).eps for t in (dtype, found[name].dtype))
        error = (found[name] - x).abs().max()
        assert error <= 8 * eps * x.abs().max().clamp(min=1), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_infinity_excludes_in_sums_too(dtype: torch.dtype, path: str) -> None:
    """Row 0 has no key left for either mask, row 1 none for both together, row 2 one."""
    least = torch.finfo(dtype).min
    mask = torch.full((3, 4), least, dtype=dtype)
    mask[0] = -INF
    mask[1, :2] = -INF
    padding = torch.tensor([[least, -INF, -INF, -INF]], dtype=dtype)
    inputs = {**make_inputs(1, 3, 4, 2, 8, dtype), "key_padding_mask": padding, "attn_mask": mask}
    inputs["attn_mask"][1, 0] = -INF
    results = helpers.results_of(by_path(path), inputs)
    kept = torch.ones(1, 2, 3, 4, dtype=torch.float64) if path in ("sdpa", "composite") else None
    kept = factor_of(path, (1, 2, 3, 4)) if kept is None else kept
    expected = inputs["value"][:, :1].transpose(1, 2) * kept[:, :, 2:, :1]
    torch.testing.assert_close(
        results["output 0"][:, 2], expected[:, :, 0].to(dtype), rtol=1e-3, atol=1e-3
    )
    assert (results["output 0"][:, :2] == 0).all()
    assert (results["gradient of query"][:, :2] == 0).all()
    assert all(x.isfinite().all() for x in results.values())


@pytest.mark.parametrize("path", PATHS)
def test_a_mask_wider_than_autocast(path: str) -> None:
    """fp32 masks beside a query that autocast makes bf16: nothing inside is cast again."""
    inputs = make_inputs(2, 5, 5, 2, 8, torch.bfloat16)
    inputs["key_padding_mask"] = torch.full((2, 5), torch.finfo(torch.float32).min)
    inputs["attn_mask"] = 100 * torch.randn(5, 5)
    ours = by_path(path)

    def under_autocast(**inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ours(**inputs)

    cast = helpers.results_of(under_autocast, inputs)
    helpers.assert_same(cast, helpers.results_of(ours, inputs))
    assert cast["output 0"].any()


# ------------------------------------------------------------------- dropout at its two ends


def test_everything_dropped_gives_zeros() -> None:
    results = helpers.results_of(
        partial(attention, dropout_p=1.0, seed=seed_tensor()), make_inputs()
    )
    assert all((x == 0).all() for x in results.values())


def test_a_probability_that_rounds_to_zero_drops_nothing() -> None:
    inputs = make_inputs()
    tiny = helpers.results_of(partial(attention, dropout_p=3e-5, seed=seed_tensor()), inputs)
    helpers.assert_same(tiny, helpers.results_of(attention, inputs))


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_heads_may_be_sharded(dropout_p: float) -> None:
    inputs = make_inputs(heads=4)
    ours = partial(attention, dropout_p=dropout_p, seed=seed_tensor())
    tensors = [inputs[n] for n in ("query", "key", "value")]
    last = ours(*(x[:, :, 2:] for x in tensors), head_offset=2)
    torch.testing.assert_close(last, ours(*tensors)[:, :, 2:])


# ------------------------------------------------------------------ lengths, packed sequences


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_lengths_are_masks(dropout_p: float) -> None:
    inputs = make_inputs(4, 33, 21)
    keys = torch.tensor([21, 5, 0, 1], dtype=torch.int32)
    queries = torch.tensor([33, 4, 33, 0], dtype=torch.int32)
    ours = partial(attention, dropout_p=dropout_p, seed=seed_tensor())
    lengths = helpers.results_of(partial(ours, key_lengths=keys, query_lengths=queries), inputs)
    padding = torch.arange(21) >= keys[:, None]
    beyond = torch.arange(33) >= queries[:, None]

    def masked(query: Tensor, key: Tensor, value: Tensor, **masks: None) -> Tensor:
        mask = beyond[:, None, :, None].expand(4, 1, 33, 21)
        return ours(query, key, value, key_padding_mask=padding, attn_mask=mask)

    helpers.assert_close(lengths, helpers.results_of(masked, inputs))
    assert (lengths["output 0"][beyond] == 0).all()
    assert (lengths["output 0"][2] == 0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("special", [float("nan"), INF])
def test_ignored_rows_reach_nothing(
    special: float, masked: bool, is_causal: bool, path: str
) -> None:
    """NaN in what lengths exclude, in the gradient flowing in and in masks there as well."""
    inputs = make_inputs(3, 6, 5, 2, 8)
    if masked:
        inputs.update(key_padding_mask=torch.randn(3, 5), attn_mask=torch.randn(3, 2, 6, 5))
    keys = torch.tensor([5, 2, 0], dtype=torch.int32)
    queries = torch.tensor([3, 6, 0], dtype=torch.int32)
    beyond = {"query": torch.arange(6) >= queries[:, None]}
    beyond["key"] = beyond["value"] = torch.arange(5) >= keys[:, None]
    ours = by_path(path, key_lengths=keys, query_lengths=queries, is_causal=is_causal)
    grad = torch.randn(3, 6, 2, 8)

    def run(value: float) -> helpers.Results:
        filled = dict(inputs)
        for name, rows in beyond.items():
            filled[name] = inputs[name].masked_fill(rows[..., None, None], value)
        if masked and value != 0:
            filled["key_padding_mask"] = inputs["key_padding_mask"].masked_fill(
                beyond["key"], float("nan")
            )
        d_out = grad.masked_fill(beyond["query"][..., None, None], value)
        return helpers.results_of(ours, filled, cotangents=[d_out])

    found = run(special)
    helpers.assert_same(found, run(0.0))
    assert not found["output 0"][beyond["query"]].any()
    for name, rows in beyond.items():
        assert not found[f"gradient of {name}"][rows].any(), name
    assert found["gradient of value"].any()


@pytest.mark.parametrize("path", ["sdpa", "explicit", "composite"])
def test_nan_that_counts_stays_out_of_ignored_rows(path: str) -> None:
    inputs = make_inputs(2, 6, 5, 2, 8)
    inputs["value"][0, 1] = inputs["key"][1, 0] = inputs["query"][1, 2] = float("nan")
    keys, queries = (torch.tensor(x, dtype=torch.int32) for x in ([3, 2], [4, 3]))
    results = helpers.results_of(by_path(path, key_lengths=keys, query_lengths=queries), inputs)
    assert results["output 0"][0, :4].isnan().any()
    for name, lengths in (("query", queries), ("key", keys), ("value", keys)):
        rows = torch.arange(inputs[name].shape[1]) >= lengths[:, None]
        assert not results[f"gradient of {name}"][rows].any(), name
    assert not results["output 0"][torch.arange(6) >= queries[:, None]].any()


LENGTHS = [7, 0, 33, 1, 0, 12, 0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lengths", [[2, 2], [3, 0], [0], [], [1, 3, 0]], ids=str)
def test_rows_past_the_last_sequence_are_zero_and_reach_nothing(
    lengths: list[int], path: str
) -> None:
    """As padding at the end of packed tokens: garbage in, zeros out, and zero gradients."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens, rows = sum(lengths), 6
    tensors = {name: torch.randn(rows, 2, 8) for name in ("query", "key", "value")}
    grad = torch.randn(rows, 2, 8)
    constants = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    ours = by_path(path, **constants, max_seqlen_q=4, max_seqlen_k=4)

    def run(rows: int, value: float) -> helpers.Results:
        filled = {name: x[:rows].clone() for name, x in tensors.items()}
        for x in filled.values():
            x[tokens:] = value
        d_out = grad[:rows].clone()
        d_out[tokens:] = value
        return helpers.results_of(ours, filled, cotangents=[d_out])

    found = run(rows, float("nan"))
    assert all(not x[tokens:].any() for x in found.values())
    expected = run(tokens, 0.0)
    helpers.assert_same({name: x[:tokens] for name, x in found.items()}, expected)


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_garbage_after_packed_tokens_does_not_reach_the_projection(dropout_p: float) -> None:
    x, weight = torch.randn(6, 8), torch.randn(24, 8, requires_grad=True)
    options = {"cu_seqlens": torch.tensor([0, 2, 4]).int(), "max_seqlen": 2}
    qkv = F.linear(x, weight)
    qkv.register_hook(lambda grad: gradients.append(grad))
    gradients: list[Tensor] = []
    poisoned = torch.where(torch.arange(6)[:, None] < 4, qkv, float("nan"))
    out = attention_packed(
        poisoned.unflatten(-1, (3, 2, 4)), dropout_p=dropout_p, seed=seed_tensor(), **options
    )
    assert not out[4:].any()
    out.sum().backward()
    assert weight.grad.isfinite().all() and weight.grad.any()
    assert not gradients[0][4:].any()


@pytest.mark.parametrize("how", ["compiled", "transformed"])
@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_rows_past_max_seqlen_are_zero_where_lengths_are_not_read(
    dropout_p: float, how: str
) -> None:
    cu_seqlens = torch.tensor([0, 5, 7, 7], dtype=torch.int32)
    options = {"cu_seqlens": cu_seqlens, "dropout_p": dropout_p, "seed": seed_tensor()}
    options["backend"] = "pytorch"
    inside = torch.tensor([1, 1, 1, 0, 0, 1, 1, 0, 0], dtype=torch.bool)

    def ours(qkv: Tensor) -> Tensor:
        return attention_packed(qkv, max_seqlen=3, **options)

    torch._dynamo.reset()
    run = in_composite(ours)
    if how == "compiled":
        run = torch.compile(ours, fullgraph=True, backend="aot_eager")
    qkv = torch.randn(9, 3, 2, 8)
    garbage = qkv.masked_fill(~inside[:, None, None, None], float("nan"))
    grad = torch.randn(9, 2, 8).masked_fill(~inside[:, None, None], float("nan"))
    found = helpers.results_of(run, {"qkv": garbage}, cotangents=[grad])
    short = {**options, "cu_seqlens": torch.tensor([0, 3, 5, 5], dtype=torch.int32)}
    expected = helpers.results_of(
        partial(attention_packed, max_seqlen=3, **short),
        {"qkv": qkv[inside]},
        cotangents=[grad[inside]],
    )
    for name, x in found.items():
        assert not x[~inside].any(), name
        torch.testing.assert_close(x[inside], expected[name])


def test_lengths_are_not_read_by_tracers() -> None:
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    qkv = torch.randn(5, 3, 2, 8)

    def ours(qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
        return attention_packed(qkv, cu_seqlens=cu_seqlens, max_seqlen=3, backend="pytorch")

    expected = ours(qkv, cu_seqlens)
    for mode in ("real", "fake", "symbolic"):
        graph = torch.fx.experimental.proxy_tensor.make_fx(ours, tracing_mode=mode)(qkv, cu_seqlens)
        torch.testing.assert_close(graph(qkv, cu_seqlens), expected)
        other = torch.tensor([0, 3, 4], dtype=torch.int32)
        torch.testing.assert_close(graph(qkv, other), ours(qkv, other))

    class Module(torch.nn.Module):
        def forward(self, qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
            return ours(qkv, cu_seqlens)

    exported = torch.export.export(Module(), (qkv, cu_seqlens)).module()
    torch.testing.assert_close(exported(qkv, cu_seqlens), expected)


def packed_and_padded(lengths: list[int], heads: int = 2, dim: int = 8) -> tuple[Tensor, ...]:
    """qkv (T, 3, H, D), cu_seqlens, padded qkv (B, S, 3, H, D), (B, S) bool of real tokens."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = torch.randn(sum(lengths), 3, heads, dim)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded = torch.randn(len(lengths), max(lengths), 3, heads, dim)
    padded[real] = packed
    return packed, cu_seqlens, padded, real


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("longest", [33, 40])
def test_packed_equals_padded(longest: int, dropout_p: float, is_causal: bool) -> None:
    packed, cu_seqlens, padded, real = packed_and_padded(LENGTHS)
    options = {"dropout_p": dropout_p, "seed": seed_tensor(), "is_causal": is_causal}

    def run_padded(qkv: Tensor) -> Tensor:
        everything = padded.masked_scatter(real[..., None, None, None], qkv)
        out = attention(*everything.unbind(2), key_padding_mask=~real, **options)
        return out[real]

    def run_packed(qkv: Tensor) -> Tensor:
        return attention_packed(qkv, cu_seqlens=cu_seqlens, max_seqlen=longest, **options)

    def run_apart(qkv: Tensor) -> Tensor:
        cu = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        return attention(*qkv.unbind(1), **cu, max_seqlen_q=33, max_seqlen_k=longest, **options)

    expected = helpers.results_of(run_padded, {"qkv": packed})
    for run in (run_packed, run_apart):
        helpers.assert_close(helpers.results_of(run, {"qkv": packed}), expected)


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_packed_cross_attention(dropout_p: float) -> None:
    lengths_q, lengths_k = [3, 0, 9, 4], [5, 2, 0, 8]
    queries = torch.randn(16, 2, 8)
    keys, values = torch.randn(2, 15, 2, 8)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    out = attention(
        queries,
        keys,
        values,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=9,
        max_seqlen_k=8,
        dropout_p=dropout_p,
        seed=seed_tensor(),
    )
    keep = reference.attention_keep(SEED, 0, dropout_p, (4, 2, 9, 8))
    multiplier = reference.factor(keep, dropout_p)
    for b, (m, n) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        q, k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        expected = reference.attention(
            queries[None, q], keys[None, k], values[None, k], multiplier=multiplier[b, :, :m, :n]
        )
        torch.testing.assert_close(out[q], expected[0].float())


@pytest.mark.parametrize("lengths", [[], [0, 0]])
@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_no_packed_tokens(lengths: list[int], dropout_p: float) -> None:
    qkv = torch.randn(0, 3, 2, 8)
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    ours = partial(attention_packed, cu_seqlens=cu_seqlens, dropout_p=dropout_p, seed=seed_tensor())
    assert helpers.results_of(ours, {"qkv": qkv})["output 0"].shape == (0, 2, 8)


QKV_LAYOUTS = {
    "batch first": lambda x: x,
    "sequence first": lambda x: sequence_first(x),
    "planes": lambda x: x.movedim(2, 0).contiguous().movedim(0, 2),
    "heads first": lambda x: x.movedim(3, 1).contiguous().movedim(1, 3),
}


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("layout", QKV_LAYOUTS)
def test_one_tensor_equals_three(layout: str, dropout_p: float) -> None:
    inputs = {
        "qkv": QKV_LAYOUTS[layout](torch.randn(2, 33, 3, 2, 8)),
        "key_padding_mask": torch.randn(2, 33),
        "attn_mask": torch.randn(2, 33, 33),
    }
    options = {"dropout_p": dropout_p, "seed": seed_tensor(), "is_causal": True, "scale": 0.3}

    def three(qkv: Tensor, **masks: Tensor) -> Tensor:
        return attention(*qkv.unbind(2), **masks, **options)

    one = helpers.results_of(partial(attention_packed, **options), inputs)
    helpers.assert_same(one, helpers.results_of(three, inputs))


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_scale(dropout_p: float) -> None:
    inputs = {n: x for n, x in make_inputs().items() if x is not None}
    keep = reference.attention_keep(SEED, 0, dropout_p, (2, 3, 63, 63))
    multiplier = reference.factor(keep, dropout_p)
    ours = attention(**inputs, scale=-0.7, dropout_p=dropout_p, seed=seed_tensor())
    expected = reference.attention(**inputs, scale=-0.7, multiplier=multiplier)
    torch.testing.assert_close(ours, expected.float())


# --------------------------------------------------------- derivatives of every order and mode

SEEDS = {"contract": SEED, "twister": -7}


def small(requires_grad: bool = True) -> tuple[Tensor, ...]:
    """query, key, value, key padding mask and mask in fp64."""
    shapes = ((2, 3, 2, 2), (2, 4, 2, 2), (2, 4, 2, 2), (2, 4), (2, 3, 4))
    return tuple(torch.randn(s, dtype=torch.float64, requires_grad=requires_grad) for s in shapes)


def small_attention(seed: int, dropout_p: float = 0.3) -> Callable[..., Tensor]:
    seed_ = seed_tensor(seed)

    def run(query: Tensor, key: Tensor, value: Tensor, padding: Tensor, mask: Tensor) -> Tensor:
        masks = {"key_padding_mask": padding, "attn_mask": mask}
        return attention(query, key, value, **masks, dropout_p=dropout_p, seed=seed_)

    return run


def small_packed(seed: int) -> Callable[..., Tensor]:
    return partial(attention_packed, dropout_p=0.3, seed=seed_tensor(seed), is_causal=True)


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_gradients_of_first_and_second_order(seed: int) -> None:
    assert torch.autograd.gradcheck(small_attention(seed), small())
    assert torch.autograd.gradgradcheck(small_attention(seed), small())
    qkv = torch.randn(2, 3, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(small_packed(seed), (qkv,))
    assert torch.autograd.gradgradcheck(small_packed(seed), (qkv,))


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_gradients_of_packed_sequences(seed: int) -> None:
    qkv = torch.randn(5, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    ours = partial(
        attention_packed,
        cu_seqlens=cu_seqlens,
        max_seqlen=3,
        dropout_p=0.3,
        seed=seed_tensor(seed),
    )
    assert torch.autograd.gradcheck(ours, (qkv,))
    assert torch.autograd.gradgradcheck(ours, (qkv,))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_forward_mode(seed: int, dropout_p: float) -> None:
    ours = small_attention(seed, dropout_p)
    helpers.assert_tangents_match_gradients(ours, *small(requires_grad=False))
    qkv = torch.randn(2, 3, 3, 2, 2, dtype=torch.float64)
    helpers.assert_tangents_match_gradients(small_packed(seed), qkv)


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_torch_func(seed: int) -> None:
    helpers.assert_transforms_match_autograd(small_attention(seed), *small(requires_grad=False))
    qkv = torch.randn(2, 3, 3, 2, 2, dtype=torch.float64)
    helpers.assert_transforms_match_autograd(small_packed(seed), qkv)


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
def test_one_tensor_as_query_key_and_value(seed: int) -> None:
    """Gradients that can be differentiated again count each path once."""

    def same(x: Tensor) -> Tensor:
        return attention(x, x, x, dropout_p=0.3, seed=seed_tensor(seed))

    def derived(x: Tensor) -> Tensor:
        key = x.sin()
        return attention(x, key, key * x, dropout_p=0.3, seed=seed_tensor(seed))

    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    for function in (same, derived):
        helpers.assert_transforms_match_autograd(function, x)
        assert torch.autograd.gradgradcheck(function, (x.requires_grad_(),))
        x = x.detach()


def test_gradients_per_sample() -> None:
    x = torch.randn(4, 5, 3, 2, 4, dtype=torch.float64)

    def loss(sample: Tensor) -> Tensor:
        return attention_packed(sample[None], dropout_p=0.3, seed=seed_tensor()).sin().sum()

    together = torch.vmap(torch.func.grad(loss))(x)
    for sample, gradient in zip(x, together, strict=True):
        leaf = sample.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf), leaf)[0])


def test_hessian() -> None:
    qkv = torch.randn(1, 2, 3, 1, 2, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return attention_packed(x, dropout_p=0.3, seed=seed_tensor()).sin().sum()

    expected = torch.autograd.functional.hessian(loss, qkv)
    torch.testing.assert_close(torch.func.hessian(loss)(qkv), expected)


# -------------------------------------------------------------- registration, compile, memory


def op_samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every registered op: masks, packed sequences, unusual strides."""
    query = sequence_first(torch.randn(2, 5, 2, 8))
    key, value = heads_first(torch.randn(2, 7, 2, 8)), torch.randn(2, 7, 2, 8)
    qkv = sequence_first(torch.randn(2, 5, 3, 2, 8))
    grad, out, statistics = torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8), torch.empty(0)
    causal = AttentionArguments(is_causal=True, scale=0.5, dropout_p=0.1, seed=seed_tensor())
    masks = causal._replace(
        key_padding_mask=torch.randn(2, 7), attn_mask=torch.randn(1, 2, 5, 7), is_causal=False
    )
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    packed = causal._replace(
        cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=4, max_seqlen_k=4
    )
    return {
        "attention_fwd": [(query, key, value, *masks), (*qkv[0].unbind(1), *packed)],
        "attention_bwd": [
            (grad, query, key, value, out, statistics, True, True, *masks),
            (grad[0], *qkv[0].unbind(1), out[0], statistics, False, False, *packed),
        ],
        "attention_packed_fwd": [(qkv, *causal), (qkv[0], *packed)],
        "attention_packed_bwd": [
            (grad, qkv, out, statistics, False, False, *causal),
            (grad[0], qkv[0], out[0], statistics, False, False, *packed),
        ],
    }


@pytest.mark.parametrize("name", op_samples())
def test_registration(name: str) -> None:
    for sample in op_samples()[name]:
        torch.library.opcheck(getattr(torch.ops.fastattn, name).default, sample)


def test_every_registered_op_has_samples() -> None:
    registered = helpers.registered_ops("attention_") - {"attention_dropout_factor"}
    assert registered == set(op_samples())


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_fake_tensors_agree(dropout_p: float) -> None:
    inputs = make_inputs(2, 5, 7)
    names = ("query", "key", "value")
    tensors = [layout(inputs[n]) for layout, n in zip(LAYOUTS[1:], names, strict=True)]
    ours = partial(attention, dropout_p=dropout_p)
    helpers.assert_fakes_agree(lambda q, k, v, seed: ours(q, k, v, seed=seed), *tensors)
    for layout in QKV_LAYOUTS.values():
        qkv = layout(torch.randn(2, 5, 3, 2, 8))
        ours_packed = partial(attention_packed, dropout_p=dropout_p)
        helpers.assert_fakes_agree(lambda x, seed, f=ours_packed: f(x, seed=seed), qkv)


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_compiled_equals_eager(dropout_p: float) -> None:
    def run(query: Tensor, key: Tensor, value: Tensor, seed: Tensor, **masks: Tensor) -> Tensor:
        options = {"dropout_p": dropout_p, "seed": seed}
        packed = attention_packed(torch.stack((key, value, key * value), 2), **options)
        return attention(query.sin(), key, value, **masks, **options), packed

    inputs = {**make_inputs(2, 9, 13), "seed": seed_tensor()}
    inputs["key_padding_mask"] = some_keys_masked(2, 13)
    inputs["attn_mask"] = torch.randn(9, 13)
    helpers.assert_compiled_equals_eager(run, inputs)


def test_compiled_packed_sequences() -> None:
    packed, cu_seqlens, _, _ = packed_and_padded(LENGTHS)

    def run(qkv: Tensor, cu_seqlens: Tensor, seed: Tensor) -> Tensor:
        lengths = {"cu_seqlens": cu_seqlens, "max_seqlen": 33}
        return attention_packed(qkv, **lengths, dropout_p=P, seed=seed)

    inputs = {"qkv": packed, "cu_seqlens": cu_seqlens, "seed": seed_tensor()}
    helpers.assert_compiled_equals_eager(run, inputs)


def test_compiled_with_one_tensor_in_several_places() -> None:
    def run(x: Tensor, seed: Tensor) -> Tensor:
        return attention(x, x, x, dropout_p=P, seed=seed)

    inputs = {"x": torch.randn(2, 9, 2, 8), "seed": seed_tensor()}
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = helpers.results_of(run, inputs)
    helpers.assert_close(helpers.results_of(compiled, inputs), expected)


def test_compiled_per_sample_gradients() -> None:
    """torch.func inside torch.compile; a negative seed replays as it does outside."""
    x, seed = torch.randn(4, 5, 3, 2, 4), seed_tensor(-7)

    def gradients(x: Tensor, seed: Tensor) -> Tensor:
        def loss(sample: Tensor) -> Tensor:
            return attention_packed(sample[None], dropout_p=0.3, seed=seed).sin().sum()

        return torch.vmap(torch.func.grad(loss))(x)

    torch._dynamo.reset()
    compiled = torch.compile(gradients, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, seed), gradients(x, seed))


def test_compiled_for_any_length() -> None:
    def run(qkv: Tensor, seed: Tensor) -> Tensor:
        return attention_packed(qkv, dropout_p=P, seed=seed)

    samples = [{"qkv": torch.randn(b, s, 3, 2, 8), "seed": seed_tensor()} for b, s in SIZES]
    helpers.assert_compiled_equals_eager(run, *samples, dynamic=True)


SIZES = [(2, 9), (3, 17), (5, 12)]


@helpers.needs_compiler
def test_inductor_equals_eager() -> None:
    def run(qkv: Tensor, mask: Tensor, seed: Tensor) -> Tensor:
        return attention_packed(qkv.sin(), attn_mask=mask, dropout_p=P, seed=seed).cos()

    mask = torch.randn(1, 17)
    inputs = {"qkv": torch.randn(2, 17, 3, 2, 8), "mask": mask, "seed": seed_tensor()}
    helpers.assert_compiled_equals_eager(run, inputs, backend="inductor")


def test_bytes_kept_for_backward() -> None:
    shape = (2, 256, 4, 8)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    qkv = torch.randn(2, 256, 3, 4, 8, requires_grad=True)
    mask = torch.rand(2, 256) < 0.3
    out, seed = query.nbytes, seed_tensor()
    options = {"dropout_p": 0.1, "seed": seed}
    saved = helpers.saved_bytes(lambda: attention(query, key, value, **options))
    assert saved == helpers.nbytes(query, key, value, seed) + out
    saved = helpers.saved_bytes(lambda: attention_packed(qkv, key_padding_mask=mask, **options))
    assert saved == helpers.nbytes(qkv, seed, mask) + out
    log_sums = out // 8
    saved = helpers.saved_bytes(lambda: attention_packed(qkv))
    assert saved <= qkv.nbytes + out + log_sums


# ------------------------------------------------------------------------ autocast, arguments


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_autocast(dropout_p: float) -> None:
    options = {"dropout_p": dropout_p, "seed": seed_tensor()}
    inputs = make_inputs()
    low = {name: None if x is None else x.bfloat16() for name, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        cast = helpers.results_of(partial(attention, **options), inputs)
        double = attention(*(x.double() for x in inputs.values() if x is not None), **options)
        packed = attention_packed(torch.randn(2, 3, 3, 2, 8), **options)
    expected = helpers.results_of(partial(attention, **options), low)
    assert cast["output 0"].dtype == packed.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    for name, x in expected.items():
        assert torch.equal(cast[name].bfloat16(), x), name


TOKENS = torch.zeros(2, 5, 3, 8)
CU_SEQLENS = torch.tensor([0, 2], dtype=torch.int32)
WRONG_ARGUMENTS = {
    "query, integers": (dict(query=TOKENS.int()), ValueError, "query"),
    "query, dimensions": (dict(query=TOKENS[0]), ValueError, "query"),
    "key, dtype": (dict(key=TOKENS.double()), ValueError, "key"),
    "key, heads": (dict(key=TOKENS[:, :, :2]), ValueError, "key"),
    "key, batch": (dict(key=TOKENS[:1]), ValueError, "key"),
    "key, device": (dict(key=TOKENS.to("meta")), ValueError, "key"),
    "value, length": (dict(value=TOKENS[:, :4]), ValueError, "value"),
    "value, head dim": (dict(value=TOKENS[..., :4]), ValueError, "value"),
    "key_padding_mask, shape": (
        dict(key_padding_mask=torch.zeros(5, 2)), ValueError, "key_padding_mask",
    ),
    "key_padding_mask, dtype": (
        dict(key_padding_mask=torch.zeros(2, 5, dtype=torch.uint8)), ValueError, "key_padding_mask",
    ),
    "attn_mask, shape": (dict(attn_mask=torch.zeros(2, 5, 5)), ValueError, "attn_mask"),
    "attn_mask, dimensions": (
        dict(attn_mask=torch.zeros(1, 1, 1, 5, 5)), ValueError, "attn_mask",
    ),
    "attn_mask, dtype": (dict(attn_mask=torch.zeros(5, 5).int()), ValueError, "attn_mask"),
    "key_lengths, dtype": (dict(key_lengths=torch.tensor([1, 2])), ValueError, "key_lengths"),
    "query_lengths, shape": (
        dict(query_lengths=torch.zeros(3).int()), ValueError, "query_lengths",
    ),
    "cu_seqlens_k alone": (dict(cu_seqlens_k=CU_SEQLENS), ValueError, "cu_seqlens_q"),
    "dropout_p": (dict(dropout_p=1.1, seed=seed_tensor()), ValueError, "dropout_p"),
    "dropout_p, nan": (dict(dropout_p=float("nan"), seed=seed_tensor()), ValueError, "dropout_p"),
    "dropout_p, type": (dict(dropout_p="0.1", seed=seed_tensor()), TypeError, "dropout_p"),
    "seed, missing": (dict(dropout_p=0.1), ValueError, "seed"),
    "seed, integer": (dict(dropout_p=0.1, seed=3), TypeError, "seed"),
    "seed, dtype": (dict(dropout_p=0.1, seed=torch.tensor([3.0])), ValueError, "seed"),
    "seed, shape": (dict(dropout_p=0.1, seed=torch.tensor([3, 4])), ValueError, "seed"),
    "seed, device": (dict(dropout_p=0.1, seed=seed_tensor().to("meta")), ValueError, "seed"),
    "site, negative": (dict(site=-1), ValueError, "site"),
    "site, too large": (dict(site=2**16), ValueError, "site"),
    "site, type": (dict(site=1.5), TypeError, "site"),
    "head_offset": (dict(head_offset=-1), ValueError, "head_offset"),
    "head_offset, too large": (dict(head_offset=2**16 - 2), ValueError, "head_offset"),
    "backend": (dict(backend="cuda"), ValueError, "backend"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(case: str) -> None:
    arguments, error, name = WRONG_ARGUMENTS[case]
    tensors = dict(query=TOKENS, key=TOKENS, value=TOKENS)
    with pytest.raises(error, match=rf"\b{name}\b"):
        attention(**{**tensors, **arguments})


def sequences(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


ONE = sequences(0, 5)
WRONG_SEQUENCES = {
    "cu_seqlens_q alone": (dict(cu_seqlens_k=None), "cu_seqlens_k"),
    "cu_seqlens_k, other count": (dict(cu_seqlens_k=sequences(0, 3, 5)), "cu_seqlens_k"),
    "cu_seqlens_k, device": (dict(cu_seqlens_k=ONE.to("meta")), "cu_seqlens_k"),
    "cu_seqlens_q, start": (dict(cu_seqlens_q=sequences(1, 5)), "cu_seqlens_q"),
    "cu_seqlens_q, negative": (dict(cu_seqlens_q=sequences(-1, 5)), "cu_seqlens_q"),
    "cu_seqlens_k, start": (dict(cu_seqlens_k=sequences(1, 5)), "cu_seqlens_k"),
    "cu_seqlens_q, end": (dict(cu_seqlens_q=sequences(0, 6), max_seqlen_q=6), "cu_seqlens_q"),
    "cu_seqlens_k, end": (dict(cu_seqlens_k=sequences(0, 7), max_seqlen_k=7), "cu_seqlens_k"),
    "cu_seqlens_q, falls": (
        dict(cu_seqlens_q=sequences(0, 4, 2, 5), cu_seqlens_k=sequences(0, 1, 2, 5)),
        "cu_seqlens_q",
    ),
    "cu_seqlens_k, falls": (
        dict(cu_seqlens_q=sequences(0, 1, 2, 5), cu_seqlens_k=sequences(0, 4, 2, 5)),
        "cu_seqlens_k",
    ),
    "max_seqlen_q": (dict(max_seqlen_q=4), "max_seqlen_q"),
    "max_seqlen_k": (dict(max_seqlen_k=4), "max_seqlen_k"),
    "max_seqlen_k, 0": (dict(max_seqlen_k=0), "max_seqlen_k"),
}  # fmt: skip


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("case", WRONG_SEQUENCES)
def test_wrong_sequences_are_named(case: str, dropout_p: float) -> None:
    arguments, name = WRONG_SEQUENCES[case]
    right = dict(cu_seqlens_q=ONE, cu_seqlens_k=ONE, max_seqlen_q=5, max_seqlen_k=5)
    tokens = torch.zeros(5, 2, 8)
    options = {"dropout_p": dropout_p, "seed": seed_tensor(), "backend": "pytorch"}
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        attention(tokens, tokens, tokens, **{**right, **arguments}, **options)


PACKED = dict(qkv=torch.zeros(5, 3, 2, 8), cu_seqlens=torch.tensor([0, 5]).int(), max_seqlen=5)
WRONG_PACKED_ARGUMENTS = {
    "qkv, integers": (dict(qkv=PACKED["qkv"].int()), "qkv"),
    "qkv, shape": (dict(qkv=torch.zeros(5, 2, 2, 8)), "qkv"),
    "qkv, padded": (dict(qkv=torch.zeros(1, 5, 3, 2, 8)), "qkv"),
    "qkv, not padded": (dict(cu_seqlens=None), "qkv"),
    "cu_seqlens, dtype": (dict(cu_seqlens=torch.tensor([0, 5])), "cu_seqlens"),
    "cu_seqlens, shape": (dict(cu_seqlens=torch.tensor([[0, 5]]).int()), "cu_seqlens"),
    "cu_seqlens, start": (dict(cu_seqlens=sequences(1, 5)), "cu_seqlens must"),
    "cu_seqlens, end": (dict(cu_seqlens=sequences(0, 6)), "cu_seqlens must"),
    "cu_seqlens, falls": (dict(cu_seqlens=sequences(0, 3, 1, 5)), "cu_seqlens must"),
    "max_seqlen": (dict(max_seqlen=0), "max_seqlen must"),
    "max_seqlen, too small": (dict(max_seqlen=4, backend="pytorch"), "max_seqlen must"),
    "mask": (dict(attn_mask=torch.zeros(5, 5)), "attn_mask"),
    "lengths": (dict(key_lengths=torch.tensor([5]).int()), "key_lengths"),
}


@pytest.mark.parametrize("case", WRONG_PACKED_ARGUMENTS)
def test_wrong_packed_arguments_are_named(case: str) -> None:
    arguments, name = WRONG_PACKED_ARGUMENTS[case]
    with pytest.raises(ValueError, match=rf"\b{name}"):
        attention_packed(**{**PACKED, **arguments})


def test_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match="triton.*attention.*(kernel|cuda)"):
        attention(TOKENS, TOKENS, TOKENS, backend="triton")
    assert torch.equal(attention(TOKENS, TOKENS, TOKENS, backend="pytorch"), TOKENS)


@pytest.mark.parametrize("masked", [False, True])
def test_second_derivatives_without_dropout(masked: bool) -> None:
    qkv = torch.randn(2, 5, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, 5, dtype=torch.float64, requires_grad=True) if masked else None
    inputs = (qkv, bias) if masked else (qkv,)
    assert torch.autograd.gradgradcheck(lambda x, m=None: attention_packed(x, attn_mask=m), inputs)


def test_backward_twice_through_torch_sdpa_gives_the_same_and_keeps_no_graph() -> None:
    qkv = torch.randn(2, 5, 3, 2, 4, requires_grad=True)
    out = attention_packed(qkv)
    (first,) = torch.autograd.grad(out.sum(), qkv, retain_graph=True)
    (second,) = torch.autograd.grad(out.sum(), qkv)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), qkv)
