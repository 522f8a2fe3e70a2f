"""The Triton attention kernels beyond the checks of the op: tiles, and what is not read."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fastattn import attention
from fastattn.kernels import attention as kernels
from fastattn.kernels import attention_configs
from tests import helpers, reference
from tests.kernels.interpreted.attention_tiles_and_launches import BACKEND, Launched, names
from tests.ops.attention_decisions import assert_decisions
from tests.ops.attention_inputs import (
    INF,
    P,
    assert_exact,
    check,
    make_inputs,
    make_qkv,
    seed_tensor,
)

pytestmark = pytest.mark.usefixtures("by_the_attention_kernels")


def double_inputs(*sizes: int) -> dict[str, Tensor | None]:
    """Of float64: there rounding hides nothing."""
    return make_inputs(*sizes, dtype=torch.float64)


# ------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize(
    ("blocks", "in_tensor_memory"),
    [
        *(((m, n), False) for m, n in ((16, 16), (16, 64), (64, 32), (32, 128), (128, 16))),
        *(((m, n), True) for m, n in ((16, 16), (16, 64), (64, 16), (128, 128))),
    ],
    ids=str,
)
def test_decisions_of_tiles(
    blocks: tuple[int, int],
    in_tensor_memory: bool,
    tiles: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever thread holds them."""
    tiles(*blocks)
    if in_tensor_memory:
        monkeypatch.setattr(kernels, "capability", lambda _: (10, 0))
    lengths = tuple(max(block + 13, 45) for block in blocks)
    assert_decisions(BACKEND, (1, 1, *lengths), head_dim=max(lengths), with_mask=True)


@pytest.mark.parametrize("blocks", [(16, 64), (32, 128), (64, 256), (128, 32)], ids=str)
def test_decisions_of_a_backward_pass_in_one_kernel(
    blocks: tuple[int, int], tiles: Callable[..., None], launches: list[Launched]
) -> None:
    tiles(*blocks, whole=True)
    lengths = max(blocks[0] + 13, 45), blocks[1] - 7
    assert_decisions(BACKEND, (1, 2, *lengths), head_dim=max(lengths))
    assert set(names(launches)) == {"forward", "key_gradient"}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_decisions_of_dtypes(dtype: torch.dtype, whole: bool, tiles: Callable[..., None]) -> None:
    tiles(32, 32, whole)
    assert_decisions(BACKEND, (2, 2, 37, 27), dtype=dtype, with_mask=not whole)


# ------------------------------------------------------------------------- values and derivatives


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(70, 40), (40, 61), (17, 64)], ids=str)
@pytest.mark.parametrize("blocks", [(16, 64), (64, 64)], ids=str)
def test_every_query_meets_every_key_once(
    blocks: tuple[int, int],
    lengths: tuple[int, int],
    is_causal: bool,
    whole: bool,
    tiles: Callable[..., None],
) -> None:
    tiles(blocks[0], 64 if whole else blocks[1] // 4, whole)
    assert_exact(BACKEND, double_inputs(1, *lengths, 2), is_causal=is_causal)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("head_dim", [40, 64, 128])
def test_accuracy_of_the_tiles_of_fp32(
    head_dim: int, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "choose", attention_configs.choose)
    inputs = make_inputs(1, 130, 70, 1, head_dim)
    check(BACKEND, inputs, dropout_p)
    check(BACKEND, {**inputs, "attn_mask": torch.randn(130, 70)}, dropout_p, is_causal=True)


@pytest.mark.parametrize("whole", [False, True])
def test_first_derivatives(whole: bool, tiles: Callable[..., None]) -> None:
    """Of everything at once, against finite differences."""
    tiles(16, 16, whole)
    query, key, value, padding, mask = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 3, 1, 2), (1, 4, 1, 2), (1, 4, 1, 2), (1, 4), (3, 4))
    )

    def run(query: Tensor, key: Tensor, value: Tensor, padding: Tensor, mask: Tensor) -> Tensor:
        masks = {"key_padding_mask": padding, "attn_mask": mask, "is_causal": True}
        return attention(query, key, value, **masks, dropout_p=0.3, seed=seed_tensor())

    if whole:  # which is taken where no gradient of a mask is wanted
        run = partial(run, padding=padding.detach(), mask=mask.detach())
        assert torch.autograd.gradcheck(run, (query, key, value))
    else:
        assert torch.autograd.gradcheck(run, (query, key, value, padding, mask))


# ------------------------------------------------------------------ blocks of keys that are closed


BLOCK = 16  # keys
CLOSED = {
    "the first blocks": lambda block, n: block < 3,
    "blocks in the middle": lambda block, n: (block > 4) & (block < 35),
    "the last blocks": lambda block, n: block > 30,
    "the first word of blocks": lambda block, n: block < 32,
    "every other block": lambda block, n: block % 2 == 0,
    "all keys but one": lambda block, n: n != 32 * BLOCK + 5,
    "all keys but the last": lambda block, n: n != n.max(),
    "holes": lambda block, n: (n % 7 == 3) | (block == 2) | (block == 33),
    "nothing": lambda block, n: n < 0,
}


def closed_keys(case: str, length: int) -> Tensor:
    """(2, length) bool; the second sequence has the mask from back to front."""
    n = torch.arange(length)
    closed = CLOSED[case](n // BLOCK, n)
    return torch.stack((closed, closed.flip(0)))


@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("case", CLOSED)
def test_closed_blocks_of_keys(case: str, is_float: bool, tiles: Callable[..., None]) -> None:
    """Beyond one word of flags; open keys of a float mask add nothing, or something."""
    tiles(32, BLOCK, key_gradient=(32, 128), mask_gradient=(32, 128))
    mask = closed_keys(case, 37 * BLOCK + 5)
    if is_float:
        added = torch.randn(mask.shape, dtype=torch.float64) * (torch.arange(mask.shape[1]) > 100)
        mask = added.masked_fill(mask, -INF)
    assert_exact(BACKEND, {**double_inputs(2, 20, mask.shape[1], 1), "key_padding_mask": mask})


@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("case", ["holes", "blocks in the middle"])
def test_closed_blocks_of_keys_under_a_causal_mask(
    case: str, is_float: bool, tiles: Callable[..., None]
) -> None:
    tiles(128, BLOCK, key_gradient=(128, 128), mask_gradient=(128, 128))
    mask = closed_keys(case, 34 * BLOCK + 9)[:1]
    if is_float:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -INF)
    inputs = double_inputs(1, mask.shape[1], mask.shape[1], 1)
    assert_exact(BACKEND, {**inputs, "key_padding_mask": mask}, is_causal=True)


def test_three_words_of_blocks_and_a_mask_of_pairs(tiles: Callable[..., None]) -> None:
    tiles(32, BLOCK, key_gradient=(32, 128), mask_gradient=(32, 128))
    mask = closed_keys("blocks in the middle", 70 * BLOCK + 5)
    inputs = {**double_inputs(2, 20, mask.shape[1], 1), "key_padding_mask": mask}
    assert_exact(BACKEND, inputs)
    inputs["attn_mask"] = torch.randn(20, mask.shape[1], dtype=torch.float64)
    assert_exact(BACKEND, inputs)


@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("closed", [(0, 3), (3, 6), (5, 8)], ids=str)
def test_closed_blocks_of_keys_are_not_read(
    closed: tuple[int, int], is_float: bool, tiles: Callable[..., None]
) -> None:
    """NaN in their keys and values does not spread, as it does in torch."""
    tiles(32, BLOCK)
    block = torch.arange(8 * BLOCK) // BLOCK
    mask = ((block >= closed[0]) & (block < closed[1])).expand(2, -1)
    inputs = make_qkv(2, 20, mask.shape[1], 1)
    padding = torch.zeros(mask.shape).masked_fill(mask, -INF) if is_float else mask
    ours = partial(attention, key_padding_mask=padding, dropout_p=P, seed=seed_tensor())
    expected = helpers.results_of(ours, inputs)
    for name in ("key", "value"):
        inputs[name] = inputs[name].masked_fill(mask[:, :, None, None], math.nan)
    results = helpers.results_of(ours, inputs)
    helpers.assert_same(results, expected)
    assert (results["gradient of key"][mask] == 0).all()
    assert (results["gradient of value"][mask] == 0).all()


# ---------------------------------------------------------------------------- masks that broadcast


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 21), (2, 1, 33, 21), (1, 2, 1, 21)], ids=str)
def test_masks_are_read_where_they_are(
    shape: tuple[int, ...], dtype: torch.dtype, launches: list[Launched]
) -> None:
    inputs = make_qkv(2, 33, 21)
    mask = torch.rand(shape) < 0.3 if dtype == torch.bool else torch.randn(shape)
    padding = torch.rand(1, 21) < 0.3 if dtype == torch.bool else torch.randn(1, 21)
    masks = {"attn_mask": mask.expand(2, 2, 33, 21), "key_padding_mask": padding.expand(2, 21)}
    ours = partial(attention, dropout_p=P, seed=seed_tensor())
    copied = {name: x.contiguous() for name, x in masks.items()}
    expected = helpers.results_of(partial(ours, **copied), inputs)
    launches.clear()
    helpers.assert_same(helpers.results_of(partial(ours, **masks), inputs), expected)
    for _, arguments in launches:
        assert arguments["PairMask"].data_ptr() == mask.data_ptr()
        assert arguments["KeyMask"].data_ptr() == padding.data_ptr()
    assert names(launches) == ["forward", "query_gradient", "key_gradient"]


def test_a_mask_of_strided_columns_is_copied_as_small_as_it_is(launches: list[Launched]) -> None:
    inputs, mask = make_qkv(2, 33, 21), torch.randn(21, 33)
    ours = partial(attention, dropout_p=P, seed=seed_tensor())
    expected = helpers.results_of(partial(ours, attn_mask=mask.t().contiguous()), inputs)
    launches.clear()
    expanded = mask.t().expand(2, 2, 33, 21)
    helpers.assert_same(helpers.results_of(partial(ours, attn_mask=expanded), inputs), expected)
    for _, arguments in launches:
        assert arguments["PairMask"].untyped_storage().nbytes() == mask.nbytes


BROADCAST = [(b, h, m, n) for b in (1, 2) for h in (1, 2) for m in (1, 18) for n in (1, 20)]


@pytest.mark.parametrize("processors", [1, 1000])
@pytest.mark.parametrize("shape", BROADCAST, ids=str)
def test_gradients_of_masks_that_broadcast(
    shape: tuple[int, ...],
    processors: int,
    tiles: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    launches: list[Launched],
) -> None:
    """Summed by one program, or by as many as there are processors; twice the same bits."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: processors)
    tiles(32, 32, mask_gradient=(16, 16))
    inputs = {**double_inputs(2, 18, 20, 2), "attn_mask": torch.randn(shape, dtype=torch.float64)}
    found = assert_exact(BACKEND, inputs)
    owned = math.prod(2 for size in shape if size > 1)  # of 2 sequences, 2 heads, 2 x 2 tiles
    (splits,) = (x.arguments["splits"] for x in launches if x.name == "mask_gradient")
    assert splits == (16 // owned if processors == 1000 else max(1, 2 // owned))
    if splits > 1:
        helpers.assert_same(assert_exact(BACKEND, inputs), found)


@pytest.mark.parametrize("processors", [1, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_of_masks_of_another_dtype(
    dtype: torch.dtype, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are in fp64 here, and round once."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: processors)
    inputs = double_inputs(2, 33, 21)
    masks = {"key_padding_mask": torch.randn(2, 21), "attn_mask": torch.randn(2, 1, 1, 21)}
    masks = {name: mask.to(dtype) for name, mask in masks.items()}
    ours = partial(attention, dropout_p=P, seed=seed_tensor())
    found = helpers.results_of(ours, {**inputs, **masks})
    wide = {name: mask.double() for name, mask in masks.items()}
    exact = helpers.results_of(ours, {**inputs, **wide})
    for name in masks:
        gradient = f"gradient of {name}"
        torch.testing.assert_close(found[gradient], exact[gradient].to(dtype))


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 127), (127, 1)], ids=str)
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_a_mask_of_a_single_key_has_no_gradient(dtype, lengths, dropout_p: float) -> None:
    """None at all in fp32; elsewhere what rounding leaves of dO V^T less delta."""
    inputs = make_inputs(2, *lengths, 2, 16, dtype)
    inputs["attn_mask"] = torch.randn(lengths[0], 1).to(dtype)
    options = {"dropout_p": dropout_p, "seed": seed_tensor(), "is_causal": True}
    results = helpers.results_of(partial(attention, **options), inputs)
    keep = reference.attention_keep(seed_tensor().item(), 0, dropout_p, (2, 2, *lengths))
    factor = reference.factor(keep, dropout_p)[..., :1].transpose(1, 2)  # (B, Sq, H, 1)
    (grad_out,) = (x.double() for x in helpers.cotangents_of((results["output 0"],)))
    left = (factor * grad_out * inputs["value"].double()[:, :1]).abs().sum(-1, keepdim=True)
    left *= 8 * torch.finfo(dtype).eps
    d_mask = results["gradient of attn_mask"].abs()
    assert (d_mask <= left.sum((0, 2))).all()
    if dtype == torch.float32:
        assert (d_mask == 0).all() and (results["gradient of key"] == 0).all()
