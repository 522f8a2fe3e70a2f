"""On a CUDA GPU the attention kernels are what the contract, float64 and eager say.

Every combination of dtype, head dimension and kinds of masks, and which strides 16 divides, makes a
kernel of its own, which takes a second or more to compile; tests share them where they can.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import FusedEncoderLayer, attention, attention_packed, explain, use_backend
from fastattn.dropout import RESOLUTION, threshold
from tests import helpers, reference
from tests.kernels.gpu.test_layer import SEED, outputs_and_gradients
from tests.ops.test_attention import (
    eager_attention,
    heads_first,
    make_inputs,
    sequence_first,
    strided_features,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SITE = 8
P = 0.125  # eager's 1 / (1 - p) is then exactly the contract's scale
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INF, NAN = float("inf"), float("nan")
KINDS = [*((BF16, n) for n in (64, 40, 128)), (FP16, 64), (FP32, 64), (FP32, 40)]
ours = partial(attention, site=SITE, backend="triton")


def seed_tensor() -> Tensor:
    return SEED.to(DEVICE)


def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def lengths_tensor(*lengths: int) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def exists(lengths: list[int]) -> Tensor:
    """(B, S) bool: the positions before the end of each sequence."""
    return torch.arange(max(lengths), device=DEVICE) < lengths_tensor(*lengths)[:, None]


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Output and gradients of ``function(*inputs)``, which flow from numbers between -1 and 1."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    grad = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@dataclass
class Recorded:
    """A kernel that writes its name down when it is launched."""

    kernel: Any
    name: str
    names: list[str]

    def __getitem__(self, grid: Any) -> Any:
        self.names.append(self.name)
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched, in order."""
    from fastattn.kernels import attention as kernels

    names: list[str] = []
    for name in ("forward", "query_gradient", "key_gradient", "mask_gradient"):
        kernel = getattr(kernels, f"attention_{name}_kernel")
        monkeypatch.setattr(kernels, f"attention_{name}_kernel", Recorded(kernel, name, names))
    return names


def never_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.kernels import attention as kernels

    monkeypatch.setattr(kernels, "choose_whole_pass", lambda *_: None)


# ------------------------------------------------------------------------------------- decisions


def one_hot(zeros: Tensor, start: int) -> Tensor:
    """(B, S, H, D): row ``start + j`` is unit vector j, the others are zero."""
    rows = torch.arange(start, min(start + zeros.shape[-1], zeros.shape[1]), device=zeros.device)
    x = zeros.clone()
    x[:, rows, :, rows - start] = 1
    return x


def first_feature(zeros: Tensor) -> Tensor:
    x = zeros.clone()
    x[..., 0] = 1
    return x


def in_chunks(zeros: Tensor, dim: int, read: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``read`` finds for as many positions as there are features, put together."""
    length, features = zeros.shape[1], zeros.shape[-1]
    chunks = [read(one_hot(zeros, start)) for start in range(0, length, features)]
    return torch.cat(chunks, dim).narrow(dim, 0, length)


def decisions_of_forward(attend: Callable[..., Tensor], zeros: Tensor) -> Tensor:
    """(B, H, Sq, Sk): scores are equal, and the output for a unit vector is its probability."""
    return in_chunks(zeros, 3, lambda hot: (attend(zeros, zeros, hot) != 0).permute(0, 2, 1, 3))


def decisions_of_gradients(attend: Callable[..., Tensor], zeros: Tensor) -> dict[str, Tensor]:
    """(B, H, Sq, Sk) from each gradient.

    dV is Z^T dO, with a unit vector a query. For the others dO V^T is one everywhere, so that dS is
    P (M - delta), with delta about one: it is positive exactly where an element is kept. A unit
    vector a key (a query) reads it out of dQ (dK).
    """
    first = first_feature(zeros)

    def gradient(at: int, grad_out: Tensor, *inputs: Tensor) -> Tensor:
        leaf = inputs[at].detach().requires_grad_()
        out = attend(*inputs[:at], leaf, *inputs[at + 1 :])
        return torch.autograd.grad(out, leaf, grad_out)[0]

    def from_query(hot: Tensor) -> Tensor:
        return (gradient(0, first, zeros, hot, first) > 0).permute(0, 2, 1, 3)

    def from_key(hot: Tensor) -> Tensor:
        return (gradient(1, first, hot, zeros, first) > 0).permute(0, 2, 3, 1)

    def from_value(hot: Tensor) -> Tensor:
        return (gradient(2, hot, zeros, zeros, zeros) != 0).permute(0, 2, 3, 1)

    return {
        "query": in_chunks(zeros, 3, from_query),
        "key": in_chunks(zeros, 2, from_key),
        "value": in_chunks(zeros, 2, from_value),
    }


@functools.cache
def keep_of(dropout_p: float, shape: tuple[int, ...], head_offset: int = 0) -> Tensor:
    """(B, H, Sq, Sk) bool: what the contract keeps."""
    if dropout_p == 0:
        return torch.ones(shape, dtype=torch.bool, device=DEVICE)
    keep = reference.attention_keep(SEED.item(), SITE, dropout_p, shape, head_offset)
    return keep.to(DEVICE)


@pytest.mark.parametrize("passes", ["chosen", "two"])
@pytest.mark.parametrize(
    ("length", "dropout_p", "head_offset"), [(128, 0.1, 0), (200, 0.5, 5), (600, 0.1, 65534)]
)
@pytest.mark.parametrize(("dtype", "head_dim"), KINDS, ids=str)
def test_the_kernels_make_the_decisions_of_the_contract(
    dtype: torch.dtype,
    head_dim: int,
    length: int,
    dropout_p: float,
    head_offset: int,
    passes: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if passes == "two":
        never_in_one_pass(monkeypatch)
    zeros = torch.zeros(2, length, 2, head_dim, dtype=dtype, device=DEVICE)
    dropout = {"dropout_p": dropout_p, "seed": seed_tensor(), "head_offset": head_offset}
    attend = partial(ours, **dropout, scale=1.0)
    expected = keep_of(dropout_p, (2, 2, length, length), head_offset)
    assert torch.equal(decisions_of_forward(attend, zeros), expected)
    for name, found in decisions_of_gradients(attend, zeros).items():
        assert torch.equal(found, expected), f"gradient of {name}"


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_gradient_of_a_mask_makes_the_same_decisions(
    dtype: torch.dtype, dropout_p: float
) -> None:
    query, key = (torch.zeros(2, n, 2, 64, dtype=dtype, device=DEVICE) for n in (330, 600))
    mask = torch.zeros(2, 2, 330, 600, dtype=dtype, device=DEVICE, requires_grad=True)
    options = {"attn_mask": mask, "dropout_p": dropout_p, "seed": seed_tensor()}
    out = ours(query, key, first_feature(key), **options)
    (gradient,) = torch.autograd.grad(out, mask, first_feature(query))
    assert torch.equal(gradient > 0, keep_of(dropout_p, (2, 2, 330, 600)))


@pytest.mark.parametrize("lengths", [[97, 0, 128, 110], [128, 600, 0, 97, 511]], ids=str)
def test_packed_sequences_make_the_same_decisions(lengths: list[int]) -> None:
    real, longest = exists(lengths), max(lengths)
    cu_seqlens = lengths_tensor(0, *lengths).cumsum(0).to(torch.int32)
    options = {f"cu_seqlens_{x}": cu_seqlens for x in "qk"}
    options |= {f"max_seqlen_{x}": longest for x in "qk"}
    options |= {"dropout_p": 0.1, "seed": seed_tensor(), "scale": 1.0}

    def attend(*padded: Tensor) -> Tensor:
        out = ours(*(x[real] for x in padded), **options)
        return torch.zeros_like(padded[0]).index_put((real,), out)

    zeros = torch.zeros(len(lengths), longest, 2, 64, dtype=BF16, device=DEVICE)
    pairs = real[:, None, :, None] & real[:, None, None, :]
    expected = keep_of(0.1, (len(lengths), 2, longest, longest)) & pairs
    assert torch.equal(decisions_of_forward(attend, zeros), expected)
    for name, found in decisions_of_gradients(attend, zeros).items():
        assert torch.equal(found, expected), f"gradient of {name}"


def test_shares_of_a_hundred_million_decisions() -> None:
    """Of every head and of all, five standard deviations; and outputs have the mean they should."""
    batch, heads, length, p = 8, 8, 1280, threshold(0.1) / RESOLUTION
    zeros = torch.zeros(batch, length, heads, 64, dtype=BF16, device=DEVICE)
    attend = partial(ours, dropout_p=0.1, seed=seed_tensor())
    kept = torch.zeros(batch, heads, dtype=torch.int64, device=DEVICE)
    for start in range(0, length, 64):
        kept += (attend(zeros, zeros, one_hot(zeros, start)) != 0).sum((1, 3))
    for counts, decisions in ((kept, length**2), (kept.sum(), batch * heads * length**2)):
        deviation = math.sqrt(p * (1 - p) * decisions)
        assert (counts - (1 - p) * decisions).abs().max() <= 5 * deviation
    zeros = zeros.float()
    mean = attend(zeros, zeros, zeros + 1).double().mean().item()
    assert abs(mean - 1) <= 5 * math.sqrt(p / (1 - p) / (batch * heads * length**2))


# -------------------------------------------------------------------------------------- accuracy


def on_the_gpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` of tensors on the CPU, its result there too."""

    def run(**inputs: Tensor | None) -> Tensor:
        with torch.device(DEVICE):
            out = function(**{n: None if x is None else x.to(DEVICE) for n, x in inputs.items()})
        return out.cpu()

    return run


def check(
    inputs: dict[str, Tensor | None],
    dropout_p: float = P,
    is_causal: bool = False,
    attend: Callable[..., Tensor] = ours,
    masks: dict[str, Tensor] | None = None,
) -> None:
    """Errors against float64 are at most 2x those of eager, of gradients 3x.

    Args:
        inputs: on the CPU; gradients of the floating ones are compared.
        masks: what ``attend`` is told in a way of its own.
    """
    inputs = {name: x for name, x in inputs.items() if x is not None}
    query, key = inputs["query"], inputs["key"]
    keep = keep_of(dropout_p, (query.shape[0], query.shape[2], query.shape[1], key.shape[1]))
    others = {"is_causal": is_causal, **(masks or {})}
    helpers.assert_as_accurate_as_eager(
        on_the_gpu(partial(attend, dropout_p=dropout_p, seed=seed_tensor(), is_causal=is_causal)),
        on_the_gpu(partial(eager_attention, dropout_p=dropout_p, keep=keep, **others)),
        on_the_gpu(
            partial(reference.attention, multiplier=reference.factor(keep, dropout_p), **others)
        ),
        inputs,
    )


@pytest.mark.parametrize("passes", ["chosen", "two"])
@pytest.mark.parametrize(("dtype", "head_dim"), KINDS, ids=str)
def test_accuracy_of_kinds(
    dtype: torch.dtype, head_dim: int, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if passes == "two":
        never_in_one_pass(monkeypatch)
    for length in (120, 1000):
        check(make_inputs(2, length, length, 2, head_dim, dtype))


@pytest.mark.parametrize(("head_dim", "length"), [(8, 120), (80, 1000), (96, 120)])
def test_accuracy_of_more_head_dims(head_dim: int, length: int) -> None:
    check(make_inputs(2, length, length, 2, head_dim, BF16))


def tiles_in(choices: Any) -> Iterator[Any]:
    """The tiles of a kernel, which the table nests in tuples."""
    if hasattr(choices, "BLOCK_M"):
        yield choices
    elif isinstance(choices, tuple):
        for choice in choices:
            yield from tiles_in(choice)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_accuracy_of_every_tile(
    dtype: torch.dtype, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel with every tile that the table has for it on this device."""
    from fastattn.kernels import attention as kernels
    from fastattn.kernels import attention_configs as table

    listed, taken = set(), set()

    def choose(kernel: str, launch: Any) -> Any:
        for name, choices in table._entry(launch).items():
            listed.update((name.removeprefix("short "), tile) for tile in tiles_in(choices))
        taken.add((kernel, table.choose(kernel, launch)))
        return table.choose(kernel, launch)

    def choose_whole_pass(launch: Any) -> Any:
        taken.add(("whole pass", table.choose_whole_pass(launch)))
        return table.choose_whole_pass(launch)

    def run(name: str, length: int, *shape: int) -> None:
        inputs = make_inputs(2, length, length, 2, head_dim, dtype)
        mask = {name: torch.randn(shape).to(dtype)}
        constant = {name: x.to(DEVICE) for name, x in mask.items()}
        check(inputs, attend=partial(ours, **constant), masks=constant)
        if length == 600:
            check({**inputs, **mask})  # and the gradient of the mask

    monkeypatch.setattr(kernels, "choose", choose)
    monkeypatch.setattr(kernels, "choose_whole_pass", choose_whole_pass)
    for length in (600, 248, 120, 56):
        run("key_padding_mask", length, 2, length)
    if listed - taken:  # those for a mask of pairs
        for length in (600, 248, 120, 56):
            run("attn_mask", length, length, length)
    assert listed <= taken


LENGTHS = [(1, 63), (1, 1000), (63, 63), (63, 127), (127, 63), (128, 128), (1000, 63), (63, 1000)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_accuracy_of_lengths(dtype: torch.dtype, lengths: tuple[int, int]) -> None:
    check(make_inputs(2, *lengths, 2, 64, dtype))


def test_accuracy_where_nothing_drops() -> None:
    for length in (127, 1000):
        check(make_inputs(2, length, length, 2, 64, BF16), dropout_p=0.0)


@pytest.mark.parametrize("length", [1, 1000])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_a_single_key(dtype: torch.dtype, length: int) -> None:
    """The softmax is one whatever the scores: their gradient is zero."""
    query, key, value = (random(2, n, 2, 64, dtype=dtype) for n in (length, 1, 1))
    attend = partial(ours, dropout_p=P, seed=seed_tensor())
    out, d_query, d_key, _ = with_gradients(attend, query, key, value)
    factor = reference.factor(keep_of(P, (2, 2, length, 1)), P).transpose(1, 2)
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), factor * value.double(), rtol=rtol, atol=0)
    assert (d_query == 0).all() and (d_key == 0).all()


@pytest.mark.parametrize("head_dim", [40, 64, 96])
def test_one_key_that_outweighs_all_others(head_dim: int) -> None:
    """In fp32 its P is 1 exactly, whatever the scale rounds, and no gradient flows to the query."""
    query, key, value = (random(2, 256, 2, head_dim, dtype=FP32) for _ in "qkv")
    query *= 64
    scores = torch.einsum("bmhd,bnhd->bmhn", query.double(), key.double()) * head_dim**-0.5
    of_others = 1 - scores.softmax(-1).amax(-1)
    alone, not_alone = of_others < 1e-9, of_others > 1e-6
    assert alone.double().mean() > 0.2 and not_alone.double().mean() > 0.2
    attend = partial(ours, dropout_p=P, seed=seed_tensor())
    d_query = with_gradients(attend, query, key, value)[1]
    assert (d_query[alone] == 0).all()
    assert (d_query[not_alone] != 0).any(-1).all()


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


SIZES = [(68, 104), (330, 600)]
PADDINGS = list(padding_masks(8))
PAIRS = [case for case in pair_masks(8, 8) if case != "float, for all sequences"]
SEVERAL = [
    ("float padding", "float, for all sequences", False),
    ("left padding", "bool", True),
    (None, None, True),
]


def check_masks(
    dtype: torch.dtype,
    sizes: tuple[int, int],
    padding: str | None,
    pairs: str | None,
    causal: bool,
    head_dim: int = 64,
) -> None:
    inputs = make_inputs(2, *sizes, 2, head_dim, dtype)
    masks = padding_masks(sizes[1]).get(padding), pair_masks(*sizes).get(pairs)
    for name, mask in zip(("key_padding_mask", "attn_mask"), masks, strict=True):
        inputs[name] = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    check(inputs, is_causal=causal)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("case", PADDINGS)
def test_accuracy_of_padding_masks(case: str, sizes: tuple[int, int]) -> None:
    check_masks(BF16, sizes, case, None, False)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("case", PAIRS)
def test_accuracy_of_masks_of_pairs(case: str, sizes: tuple[int, int]) -> None:
    check_masks(BF16, sizes, None, case, False)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("padding", "pairs", "causal"), SEVERAL)
def test_accuracy_of_several_masks(
    padding: str | None, pairs: str | None, causal: bool, sizes: tuple[int, int]
) -> None:
    check_masks(BF16, sizes, padding, pairs, causal)


@pytest.mark.parametrize(("padding", "pairs"), [("holes", None), (None, "bool"), ("holes", "bool")])
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [*KINDS, (BF16, 256), (FP32, 128), (FP32, 256)], ids=str
)
def test_accuracy_of_bytes_under_dropout(
    dtype: torch.dtype, head_dim: int, padding: str | None, pairs: str | None
) -> None:
    """Where a product is 16 deep, compilers have left out half of what such a mask decides."""
    check_masks(dtype, (200, 100), padding, pairs, False, head_dim)


def test_accuracy_of_other_masks() -> None:
    """Rows that begin anywhere; fp32."""
    check_masks(BF16, (63, 37), "float padding", "float", False)
    check_masks(FP32, (330, 600), None, "float", False)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_accuracy_of_lengths_of_sequences(sizes: tuple[int, int]) -> None:
    queries, keys = [sizes[0], 5, 0, sizes[0] - 1], [sizes[1], 0, 7, sizes[1] // 2]
    lengths = {"query_lengths": lengths_tensor(*queries), "key_lengths": lengths_tensor(*keys)}
    no_query = ~exists(queries)[:, None, :, None].expand(4, 1, *sizes)
    inputs = make_inputs(4, *sizes, 2, 64, BF16)
    masks = {"key_padding_mask": ~exists(keys), "attn_mask": no_query}
    check(inputs, attend=partial(ours, **lengths), masks=masks)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [[68, 0, 104, 33], [600, 1, 0, 330]], ids=str)
def test_accuracy_of_packed_sequences(lengths: list[int], is_causal: bool) -> None:
    real = exists(lengths)
    cu_seqlens = lengths_tensor(0, *lengths).cumsum(0).to(torch.int32)
    packed = {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths), "backend": "triton"}

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        qkv = torch.stack((query, key, value), 2)[real]
        out = attention_packed(qkv, **packed, **options, site=SITE)
        return torch.zeros_like(query).index_put((real,), out)

    pairs = real[:, None, :, None] & real[:, None, None, :]
    inputs = make_inputs(len(lengths), max(lengths), max(lengths), 2, 64, BF16)
    check(inputs, is_causal=is_causal, attend=attend, masks={"attn_mask": ~pairs})


@pytest.mark.parametrize("head_dim", [64, 33])
def test_accuracy_of_strided_inputs(head_dim: int) -> None:
    """Also where rows begin anywhere, so that no wide access is aligned."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return ours(sequence_first(query), heads_first(key), strided_features(value), **options)

    check(make_inputs(2, 127, 127, 2, head_dim, BF16), attend=attend)


# ----------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("length", [128, 1000])
def test_two_runs_are_equal_bit_for_bit(length: int, deterministic: bool) -> None:
    query, key, value = (random(4, length, 8, 64) for _ in range(3))
    mask, padding = random(8, length, length), random(4, length)

    def attend(*inputs: Tensor) -> Tensor:
        masks = dict(zip(("key_padding_mask", "attn_mask"), inputs[3:], strict=False))
        return ours(*inputs[:3], **masks, dropout_p=0.1, seed=seed_tensor())

    torch.use_deterministic_algorithms(deterministic)  # which fills new memory with NaN
    try:
        for inputs in ((query, key, value), (query, key, value, padding, mask)):
            first, second = (with_gradients(attend, *inputs) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            assert all(x.isfinite().all() for x in first)
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------- edges of the numbers


@pytest.mark.parametrize("length", [104, 600])
def test_rows_without_a_key_give_exact_zeros(length: int) -> None:
    query, key, value = (random(2, length, 2, 64) for _ in range(3))
    attend = partial(ours, dropout_p=P, seed=seed_tensor())
    dead = torch.zeros(2, length, dtype=torch.bool, device=DEVICE)
    dead[0] = True
    infinite = torch.zeros(2, length, dtype=BF16, device=DEVICE).masked_fill(dead, -INF)
    none, every = lengths_tensor(0, length), lengths_tensor(length, length)
    for options in (
        {"key_padding_mask": dead},
        {"key_padding_mask": infinite},
        {"key_lengths": none, "query_lengths": every},
        {"key_lengths": every, "query_lengths": none},
        {"attn_mask": dead[:, None, None]},
        {"attn_mask": infinite[:, None, None].expand(2, 1, length, length)},
    ):
        for x in with_gradients(partial(attend, **options), query, key, value):
            assert not x[0].any() and x[1].any() and x.isfinite().all(), options.keys()


@pytest.mark.parametrize("passes", ["chosen", "two"])
@pytest.mark.parametrize("magnitude", [1e9, 1e18])
@pytest.mark.parametrize("head_dim", [64, 40])
def test_huge_logits(
    head_dim: int, magnitude: float, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The softmax is a maximum then: dV is as exact as the output, and nothing is infinite."""
    if passes == "two":
        never_in_one_pass(monkeypatch)
    query, key, value = (random(2, 104, 2, head_dim, dtype=FP32) for _ in range(3))
    inputs = query * magnitude, key, value
    multiplier = reference.factor(keep_of(P, (2, 2, 104, 104)), P)
    found = with_gradients(partial(ours, dropout_p=P, seed=seed_tensor()), *inputs)
    expected = with_gradients(partial(reference.attention, multiplier=multiplier), *inputs)
    assert all(x.isfinite().all() for x in found)
    for i in (0, 3):
        torch.testing.assert_close(found[i].double(), expected[i].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("passes", ["chosen", "two"])
@pytest.mark.parametrize("length", [104, 600])
def test_nan_stays_in_its_sequence(
    length: int, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if passes == "two":
        never_in_one_pass(monkeypatch)
    clean = random(2, length, 3, 2, 64)
    lengths = {"cu_seqlens": lengths_tensor(0, length, 2 * length), "max_seqlen": length}
    options = {"dropout_p": P, "seed": seed_tensor(), "backend": "triton"}
    for part in range(3):
        qkv = clean.clone()
        qkv[1, 4, part] = NAN
        expected = with_gradients(partial(attention_packed, **options), clean)
        found = with_gradients(partial(attention_packed, **options), qkv)
        packed = with_gradients(partial(attention_packed, **options, **lengths), qkv.flatten(0, 1))
        for a, b, c in zip(expected, found, packed, strict=True):
            assert torch.equal(a[0], b[0]) and b[1].isnan().any()
            assert c[:length].isfinite().all() and c[length:].isnan().any()


@pytest.mark.parametrize("passes", ["chosen", "two"])
@pytest.mark.parametrize("longest", [104, 600])
def test_packed_rows_that_do_not_count(
    longest: int, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the last sequence, and in a sequence past max_seqlen: not read, and written as zeros."""
    if passes == "two":
        never_in_one_pass(monkeypatch)
    lengths = [longest, 3 * longest + 5, 0, 70]
    counts = torch.cat([torch.arange(n) < longest for n in lengths] + [torch.zeros(300) > 0])
    counts = counts.to(DEVICE)
    qkv = random(len(counts), 3, 2, 64)
    options = {"max_seqlen": longest, "dropout_p": P, "seed": seed_tensor(), "backend": "triton"}

    def attend(lengths: list[int]) -> Callable[[Tensor], Tensor]:
        cu_seqlens = lengths_tensor(0, *lengths).cumsum(0).to(torch.int32)
        return partial(attention_packed, cu_seqlens=cu_seqlens, **options)

    hidden = qkv.masked_fill(~counts[:, None, None, None], NAN)
    leaf = hidden.requires_grad_()
    out = attend(lengths)(leaf)
    grad = random(*out.shape)
    (found,) = torch.autograd.grad(out, leaf, grad)
    assert not out[~counts].any() and not found[~counts].any()
    leaf = qkv[counts].requires_grad_()
    short = attend([min(n, longest) for n in lengths])(leaf)
    assert torch.equal(out[counts], short)
    assert torch.equal(found[counts], *torch.autograd.grad(short, leaf, grad[counts]))


@pytest.mark.parametrize("passes", ["chosen", "two"])
@pytest.mark.parametrize("length", [104, 600])
def test_nan_past_the_lengths_is_not_read(
    length: int, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if passes == "two":
        never_in_one_pass(monkeypatch)
    real, lengths = exists([length, 70]), lengths_tensor(length, 70)
    qkv = random(2, length, 3, 2, 64)
    options = {"dropout_p": P, "seed": seed_tensor(), "backend": "triton"}
    options |= {"key_lengths": lengths, "query_lengths": lengths}
    attend = partial(attention_packed, **options)
    expected = with_gradients(attend, qkv.masked_fill(~real[..., None, None, None], 0))
    found = with_gradients(attend, qkv.masked_fill(~real[..., None, None, None], NAN))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and not a[~real].any()


def test_offsets_past_two_to_the_31() -> None:
    heads, head_dim, length = 16, 64, 512
    sequences = 2**31 // (3 * heads * head_dim * length) + 2
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    qkv = torch.randn(sequences, length, 3, heads, head_dim, dtype=BF16, device=DEVICE)
    assert qkv[:-1].numel() > 2**31
    last = qkv[-1:].clone()

    def run(x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = attention_packed(x, backend="triton", **options)
        return out.detach(), *torch.autograd.grad(out, x, out.detach())

    for all_of_it, alone in zip(run(qkv), run(last), strict=True):
        assert torch.equal(all_of_it[-1:], alone)
    # Alone, and yet of the same number, which decides what drops: the others are empty.
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=DEVICE) * length
    empty = (starts - starts[-2]).clamp(min=0)
    options = {"max_seqlen": length, "dropout_p": 0.1, "seed": seed_tensor()}
    together = run(qkv.flatten(0, 1), cu_seqlens=starts, **options)
    apart = run(last[0], cu_seqlens=empty, **options)
    for all_of_it, alone in zip(together, apart, strict=True):
        assert torch.equal(all_of_it[-length:], alone)


# --------------------------------------------------------------------- graphs, compilation, layers


@pytest.mark.parametrize("length", [128, 600])
def test_a_captured_step_reads_the_seed_of_each_replay(length: int) -> None:
    inputs = [random(2, length, 2, 64) for _ in range(3)]

    def step(seed: Tensor) -> list[Tensor]:
        return with_gradients(partial(ours, dropout_p=0.1, seed=seed), *inputs)

    seed, stream = seed_tensor(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(seed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(seed)
    for number in (3, 2**63 - 1):
        seed.fill_(number)
        graph.replay()
        expected = step(torch.tensor([number], device=DEVICE))
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_compiled_equals_eager() -> None:
    inputs = [random(2, 128, 2, 64, dtype=FP32) for _ in range(3)]
    padding = ~exists([128, 70])

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        options = {"key_padding_mask": padding, "dropout_p": 0.1, "seed": seed}
        return attention(query * 2, key, value, **options)

    seed = seed_tensor()
    torch._dynamo.reset()
    compiled = with_gradients(torch.compile(attend, fullgraph=True), *inputs)
    expected = with_gradients(attend, *inputs)
    assert torch.equal(compiled[0], expected[0])
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_backends_drop_the_same_elements(dtype: torch.dtype) -> None:
    """With a key or a few to each sequence, the output is zero where all of them drop."""
    qkv = random(8, 128, 3, 4, 64, dtype=dtype)
    options = {"key_padding_mask": ~exists([1, 2, 3, 4, 5, 6, 7, 128])}
    options |= {"dropout_p": 0.5, "seed": seed_tensor()}
    found, expected = (
        attention_packed(qkv, **options, backend=name) for name in ("triton", "pytorch")
    )
    assert (found == 0).any() and torch.equal(found == 0, expected == 0)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_layer_is_that_of_the_pytorch_backend(dtype: torch.dtype) -> None:
    """As close to float64, with the same seed, as it is on plain PyTorch."""
    layer = FusedEncoderLayer(256, 4, 512, dropout=0.1, batch_first=True).to(DEVICE, dtype)
    src, padding = random(3, 128, 256, dtype=dtype), ~exists([128, 70, 1])
    options = {"src_key_padding_mask": padding, "seed": seed_tensor()}
    assert "attention_packed: triton" in str(explain(layer, src, **options))
    found = outputs_and_gradients(layer, src, **options)
    with use_backend("pytorch"):
        baseline = outputs_and_gradients(layer, src, **options)
        exact = outputs_and_gradients(layer.double(), src.double(), **options)
    for i, (a, b, c) in enumerate(zip(found, baseline, exact, strict=True)):
        error, allowed = ((x.double() - c).abs().max() for x in (a, b))
        floor = 4 * torch.finfo(dtype).eps * c.abs().max()
        assert error <= (2 if i == 0 else 3) * allowed + floor


def test_launches(launches: list[str]) -> None:
    """One in forward; two in backward, or one for a short sequence; one more for every mask."""
    long, short = (random(2, n, 3, 2, 64).requires_grad_() for n in (600, 128))
    padding, mask = (random(*x).requires_grad_() for x in ((2, 600), (2, 600, 600)))
    two = ["query_gradient", "key_gradient"]
    for inputs, backward in (
        ([short], ["key_gradient"]),
        ([long], two),
        ([long, padding], [*two, "mask_gradient"]),
        ([long, padding, mask], [*two, "mask_gradient", "mask_gradient"]),
    ):
        masks = dict(zip(("key_padding_mask", "attn_mask"), inputs[1:], strict=False))
        launches.clear()
        out = attention_packed(inputs[0], **masks, dropout_p=0.1, seed=seed_tensor())
        assert launches == ["forward"]
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        assert launches[1:] == backward
