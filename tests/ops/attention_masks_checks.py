"""What ``attention`` does with masks, checked on every backend that has it."""

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
    KINDS,
    P,
    assert_exact,
    beyond,
    check,
    exact_results,
    lengths_tensor,
    make_inputs,
    make_qkv,
    multiplier_of,
    skip_unless_it_takes,
    unaligned,
)
from tests.ops.backends import (
    OVERFLOWS,
    ROUNDED,
    SHARP,
    Backend,
    few_kernels,
    not_yet,
)

OPS = ("attention",)
pytestmark = pytest.mark.usefixtures("larger_tiles", "few_without_dropout")


# --------------------------------------------------------------------------------- kinds of masks

MASK_SHAPES = [
    (21,), (1, 21), (33, 1), (33, 21), (2, 1, 21), (1, 33, 21), (2, 33, 21), (1, 1, 1, 21),
    (2, 1, 1, 1), (2, 1, 33, 21), (1, 2, 33, 1), (2, 2, 1, 21), (2, 2, 33, 21), (1,), (),
]  # fmt: skip


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_broadcast_masks(backend: Backend, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(seqlen_q=33, seqlen_k=21, head_dim=32)
    some, floats = torch.rand(shape) < 0.3, torch.randn(shape)
    for dropout_p in (P,) if backend.compiles else (0.0, P):
        if not backend.compiles or shape[-1:] != (21,):
            check(backend, {**inputs, "attn_mask": some}, dropout_p)
        if shape[-1:] == (21,):
            check(backend, {**inputs, "attn_mask": floats}, dropout_p)
            continue
        # The same for all keys: the softmax does not depend on it.
        qkv, masks = make_qkv(seqlen_q=33, seqlen_k=21, head_dim=32), {"attn_mask": floats}
        check(backend, qkv, dropout_p, masks=masks, ours=masks)
        ours = backend.of(attention, **{**DROPOUT, "dropout_p": dropout_p})
        gradient = helpers.results_of(ours, {**inputs, "attn_mask": floats})
        zeros = torch.zeros(shape)
        torch.testing.assert_close(gradient["gradient of attn_mask"], zeros, atol=1e-5, rtol=0)


def mask_cases() -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """(key padding mask, mask) of 2 sequences, 2 heads, 33 queries, 21 keys."""
    generator = torch.Generator().manual_seed(3)
    padding = torch.arange(21) >= torch.tensor([[21], [9]])
    pairs = torch.rand(2, 2, 33, 21, generator=generator) < 0.3
    floats = torch.randn(2, 2, 33, 21, generator=generator)
    infinite = torch.zeros(2, 21).masked_fill(padding, -INF)
    return {
        "bool padding": (padding, None),
        "float padding": (floats[:, 0, 0], None),
        "infinite padding": (infinite, None),
        "bool both": (padding, pairs),
        "float both": (floats[:, 0, 0], floats),
        "bool padding, float mask": (padding, floats[:1, :1]),
        "infinite padding, bool mask": (infinite, pairs[0]),
        "infinite both": (infinite, floats.masked_fill(pairs, -INF)),
        "every key of a sequence": (torch.tensor([[True], [False]]).expand(2, 21), None),
        "every key of some rows": (padding, torch.arange(33)[:, None] % 3 == torch.zeros(21)),
        "every key of every row": (torch.ones(2, 21, dtype=torch.bool), floats),
        "large finite numbers": (torch.zeros(2, 21).masked_fill(padding, -1e30), floats * 1e4),
        "the least finite number": (None, torch.full((33, 21), torch.finfo(torch.float32).min)),
    }


@pytest.mark.parametrize("how", [(0.0, False), (0.0, True), (P, False), (P, True)], ids=str)
@pytest.mark.parametrize("case", mask_cases())
def test_masks(
    backend: Backend, case: str, how: tuple[float, bool], request: pytest.FixtureRequest
) -> None:
    """With and without dropout, and a causal mask beside them."""
    dropout_p, is_causal = how
    few_kernels(backend, how == (P, False) or case.endswith("both"))
    if case == "large finite numbers" and not is_causal:
        not_yet(request, backend, SHARP)
    padding, mask = mask_cases()[case]
    inputs = make_inputs(seqlen_q=33, seqlen_k=21)
    masks = {"key_padding_mask": padding, "attn_mask": mask}
    check(backend, {**inputs, **masks}, dropout_p, is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_large_finite_masks(backend: Backend, dtype: torch.dtype, is_causal: bool) -> None:
    """They leave few keys or one; what cancels in gradients leaves no more than rounding."""
    skip_unless_it_takes(backend, dtype=dtype)
    inputs = make_inputs(seqlen_q=33, seqlen_k=21, dtype=dtype)
    masks = mask_cases()["large finite numbers"]
    inputs["key_padding_mask"], inputs["attn_mask"] = (mask.to(dtype) for mask in masks)
    assert_exact(backend, inputs, is_causal=is_causal)


def padding_masks(length: int) -> dict[str, Tensor]:
    """(2, length) each; bool or float."""
    position = torch.arange(length)
    short = torch.tensor([[length], [length // 3]])
    some = torch.rand(2, length) < 0.5
    some[1, length // 4 : length // 2] = True
    floats = torch.randn(2, length)
    return {
        "right padding": position >= short,
        "left padding": position < length - short,
        "holes": some,
        "a sequence without keys": torch.tensor([[True], [False]]).expand(2, length),
        "float padding": floats,
        "infinite padding": floats.masked_fill(some, -INF),
    }


def pair_masks(seqlen_q: int, seqlen_k: int) -> dict[str, Tensor]:
    """Broadcast to (2, 2, seqlen_q, seqlen_k); bool or float."""
    some = torch.rand(2, 2, seqlen_q, seqlen_k) < 0.3
    some[:, 1, 5] = True  # a query without a key
    floats = torch.randn(some.shape)
    return {
        "bool": some,
        "bool, of queries": some[:, 1:, :, :1],
        "float": floats,
        "float, for all": floats[0, 0],
        "float, of keys": floats[:, :1, :1],
        "float, for all sequences": floats[:1].masked_fill(some[:1], -INF),
    }


def check_masks(
    backend: Backend,
    kind: tuple[torch.dtype, int],
    sizes: tuple[int, int],
    padding: str | None,
    pairs: str | None,
    is_causal: bool = False,
) -> None:
    dtype, head_dim = kind
    inputs = make_inputs(2, *sizes, 2, head_dim, dtype)
    masks = padding_masks(sizes[1]).get(padding), pair_masks(*sizes).get(pairs)
    for name, mask in zip(("key_padding_mask", "attn_mask"), masks, strict=True):
        inputs[name] = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    check(backend, inputs, P, is_causal=is_causal)


#: Queries and keys: backward in one launch and in two, with blocks of keys of every sort.
SIZES = [(36, 72), (20, 328), (264, 40)]
SEVERAL = [
    *((padding, None, False) for padding in padding_masks(8)),
    *((None, pairs, False) for pairs in pair_masks(8, 8) if pairs != "float, for all sequences"),
    ("float padding", "float, for all sequences", False),
    ("left padding", "bool", True),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("padding", "pairs", "is_causal"), SEVERAL)
def test_masks_in_16_bits(
    backend: Backend, padding: str | None, pairs: str | None, is_causal: bool, sizes: Any
) -> None:
    check_masks(backend, HALF, sizes, padding, pairs, is_causal)


@pytest.mark.parametrize(("padding", "pairs"), [("holes", None), (None, "bool"), ("holes", "bool")])
@pytest.mark.parametrize(
    "kind", [*KINDS, (torch.bfloat16, 256), (torch.float32, 128), (torch.float32, 256)], ids=str
)
def test_bool_masks_of_kinds(
    backend: Backend, kind: tuple[torch.dtype, int], padding: str | None, pairs: str | None
) -> None:
    """Where a product is 16 deep, compilers have left out half of what such a mask decides."""
    skip_unless_it_takes(backend, dtype=kind[0])
    if backend.device != "cuda" and (kind == HALF or kind[1] > 64):
        pytest.skip("what compilers leave out shows on a GPU; other checks have these kinds")
    check_masks(backend, kind, (200, 100), padding, pairs)


@pytest.mark.on("cuda")
@pytest.mark.parametrize("pairs", ["bool", "float"])
def test_masks_of_many_tiles_in_16_bits(backend: Backend, pairs: str) -> None:
    check_masks(backend, HALF, (330, 600), "holes", pairs)


@pytest.mark.parametrize("kind", [HALF, (torch.float32, 64)], ids=str)
def test_float_masks_of_which_rows_begin_anywhere(
    backend: Backend, kind: tuple[torch.dtype, int]
) -> None:
    check_masks(backend, kind, (63, 37), "float padding", "float")


@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_float_masks_of_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    skip_unless_it_takes(backend, dtype=dtype)
    inputs = make_inputs(seqlen_q=127, seqlen_k=127, head_dim=40, dtype=dtype)
    inputs["attn_mask"] = torch.randn(1, 2, 127, 127).to(dtype)
    inputs["key_padding_mask"] = torch.randn(2, 127).to(dtype)
    for dropout_p in (P,) if backend.compiles else (0.0, P):
        check(backend, inputs, dropout_p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_of_masks_of_another_dtype(backend: Backend, dtype: torch.dtype) -> None:
    """Sums are in fp64 here, and round once."""
    skip_unless_it_takes(backend, dtype=torch.float64)
    inputs = make_inputs(2, 33, 21, dtype=torch.float64)
    masks = {"key_padding_mask": torch.randn(2, 21), "attn_mask": torch.randn(2, 1, 1, 21)}
    masks = {name: mask.to(dtype) for name, mask in masks.items()}
    assert_exact(backend, {**inputs, **masks})


def test_a_mask_of_strided_columns(backend: Backend) -> None:
    inputs = {**make_inputs(2, 33, 21), "attn_mask": torch.randn(21, 33).t()}
    inputs["key_padding_mask"] = torch.randn(21, 2).t()
    layouts = {"attn_mask": lambda x: x.t().contiguous().t().expand(2, 2, 33, 21),
               "key_padding_mask": unaligned}  # fmt: skip
    check(backend, inputs, P, layouts=layouts)


# ------------------------------------------------------------------------- what of a row is left


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_long_runs_of_masked_keys(backend: Backend, dropout_p: float) -> None:
    inputs = make_inputs(1, 65, 1000)
    check(backend, {**inputs, "attn_mask": torch.arange(1000) < 990}, dropout_p)


@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("length", [70, 260])
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_one_key_left_of_a_sequence(
    backend: Backend,
    dtype: torch.dtype,
    length: int,
    is_float: bool,
    request: pytest.FixtureRequest,
) -> None:
    """Its gradients of query and key are zero, and nothing near it."""
    skip_unless_it_takes(backend, dtype=dtype)
    if dtype.itemsize == 2 and length > 256 and not is_float:
        not_yet(request, backend, ROUNDED)
    padding = beyond([1, length], length)
    inputs = make_inputs(2, 70, length, head_dim=64, dtype=dtype)
    infinite = torch.zeros(padding.shape, dtype=dtype).masked_fill(padding, -INF)
    inputs["key_padding_mask"] = infinite if is_float else padding
    check(backend, inputs, P)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize(
    ("dtype", "length"),
    [*((dtype, 63) for dtype in helpers.DTYPES), (torch.float32, 264), (torch.bfloat16, 264)],
    ids=str,
)
def test_a_row_without_keys_gives_exact_zeros(
    backend: Backend, dtype: torch.dtype, length: int, dropout_p: float
) -> None:
    skip_unless_it_takes(backend, dtype=dtype)
    inputs = make_inputs(2, 20, length, head_dim=64, dtype=dtype)
    dead = torch.zeros(2, 1, 20, length, dtype=torch.bool)
    dead[0, :, 5] = True
    infinite = torch.randn(20, length).to(dtype)
    infinite[7] = -INF
    ours = backend.of(attention, **{**DROPOUT, "dropout_p": dropout_p})
    for mask, row in ((dead, 5), (infinite, 7)):
        results = helpers.results_of(ours, {**inputs, "attn_mask": mask})
        assert all(x.isfinite().all() for x in results.values())
        assert (results["output 0"][0, row] == 0).all()
        assert (results["gradient of query"][0, row] == 0).all()
        assert (results["output 0"][0, 6] != 0).any()
        if mask is infinite:
            assert (results["gradient of attn_mask"][row] == 0).all()
    closed = torch.tensor([[True], [False]]).expand(2, length)
    none, every = lengths_tensor(0, length), lengths_tensor(20, 20)
    for masks in (
        {"key_padding_mask": closed},
        {"key_padding_mask": torch.zeros(2, length, dtype=dtype).masked_fill(closed, -INF)},
        {"attn_mask": closed[:, None, None]},
        {"key_lengths": none, "query_lengths": every},
        {"query_lengths": lengths_tensor(0, 20)},
    ):
        results = helpers.results_of(ours, {**inputs, **masks})
        for name in ("output 0", *(f"gradient of {x}" for x in ("query", "key", "value"))):
            x = results[name]
            assert (x[0] == 0).all() and (x[1] != 0).any() and x.isfinite().all(), name


def finite_mask_cases() -> dict[str, tuple[torch.dtype, Tensor | None, Tensor | None, dict]]:
    """(dtype of query, key padding mask, mask, constants): numbers, or sums, beyond that dtype."""
    half, low, single, double = torch.float16, torch.bfloat16, torch.float32, torch.float64
    least = torch.finfo(single).min
    some = beyond([5, 3], 5)
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


#: What the Triton kernels have no number for.
TOO_LOW = ("bf16, a sum", "fp32, a sum", "fp32, a sum, causal", "fp32, fp64 mask", "fp64, a sum")


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("case", finite_mask_cases())
def test_a_finite_mask_is_never_infinite(
    backend: Backend, case: str, dropout_p: float, request: pytest.FixtureRequest
) -> None:
    """Rows whose keys are all far down attend to them by what float64 has of their differences."""
    dtype, padding, mask, constants = finite_mask_cases()[case]
    skip_unless_it_takes(backend, dtype=dtype)
    if case in TOO_LOW:
        not_yet(request, backend, OVERFLOWS)
    inputs = make_inputs(2, 5, 5, dtype=dtype)
    inputs.update(key_padding_mask=padding, attn_mask=mask)
    options = {**DROPOUT, "dropout_p": dropout_p, **constants}
    found = helpers.results_of(backend.of(attention, **options), inputs)
    if case == "fp64, a sum":  # which the oracle has no number for either
        inputs["attn_mask"] = torch.zeros_like(mask)
    exact = exact_results(inputs, found["output 0"], dropout_p, **constants)
    assert dropout_p or (found["output 0"] != 0).any(-1).all()
    for name, x in exact.items():
        eps = max(torch.finfo(t).eps for t in (dtype, found[name].dtype))
        error = (found[name] - x).abs().max()
        assert error <= 8 * eps * x.abs().max().clamp(min=1), name


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_infinity_excludes_in_sums_too(
    backend: Backend, dtype: torch.dtype, dropout_p: float, request: pytest.FixtureRequest
) -> None:
    """Row 0 has no key left for either mask, row 1 none for both together, row 2 one."""
    skip_unless_it_takes(backend, dtype=dtype)
    if dtype != torch.float16:
        not_yet(request, backend, OVERFLOWS)
    least = torch.finfo(dtype).min
    mask = torch.full((3, 4), least, dtype=dtype)
    mask[0] = -INF
    mask[1, 0] = mask[1, 1] = -INF
    padding = torch.tensor([[least, -INF, -INF, -INF]], dtype=dtype)
    inputs = {**make_inputs(1, 3, 4, dtype=dtype), "key_padding_mask": padding, "attn_mask": mask}
    ours = backend.of(attention, **{**DROPOUT, "dropout_p": dropout_p})
    results = helpers.results_of(ours, inputs)
    expected = inputs["value"][:, :1].transpose(1, 2).double()
    if dropout_p:
        expected = expected * multiplier_of(dropout_p, (1, 2, 3, 4))[:, :, 2:, :1]
    torch.testing.assert_close(
        results["output 0"][:, 2], expected[:, :, 0].to(dtype), rtol=1e-3, atol=1e-3
    )
    assert (results["output 0"][:, :2] == 0).all()
    assert (results["gradient of query"][:, :2] == 0).all()
    assert all(x.isfinite().all() for x in results.values())
