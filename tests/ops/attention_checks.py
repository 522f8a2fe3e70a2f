"""What ``attention`` does without masks, checked on every backend that has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example
from hypothesis import strategies as st
from torch import Tensor

from fastattn import attention
from tests import helpers, reference
from tests.ops.any_call import LENGTH, PROBABILITIES, SEEDS, SITES, drawn
from tests.ops.attention_decisions import assert_decisions
from tests.ops.attention_inputs import (
    DROPOUT,
    HALF,
    KINDS,
    LAYOUTS,
    NAN,
    SITE,
    P,
    check,
    exact_results,
    heads_first,
    make_inputs,
    make_qkv,
    multiplier_of,
    seed_tensor,
    sequence_first,
    skip_unless_it_scales,
    skip_unless_it_takes,
    strided_features,
)
from tests.ops.backends import COMPOSED, LONE_KEYS, SCORES_TWICE, Backend

OPS = ("attention",)
pytestmark = pytest.mark.usefixtures("larger_tiles", "few_without_dropout")

#: Queries and keys: on both sides of the edges of tiles, and of more than one launch in backward.
LENGTHS = [(1, 2), (15, 17), (17, 16), (63, 65), (64, 127), (129, 63), (128, 192), (33, 300)]


def chances(backend: Backend) -> tuple[float, ...]:
    """Of dropout; with and without it a compiled kernel is not the same, and one is enough."""
    return (P,) if backend.compiles else (0.0, P)


# ------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_decisions_of_lengths(backend: Backend, lengths: tuple[int, int]) -> None:
    assert_decisions(backend, (1, 1, *lengths))


@pytest.mark.parametrize(("dtype", "head_dim"), KINDS, ids=str)
def test_decisions_of_kinds(backend: Backend, dtype: torch.dtype, head_dim: int) -> None:
    """In a backward pass of one launch, and of several: nothing of it decides what drops."""
    skip_unless_it_takes(backend, dtype=dtype)
    assert_decisions(backend, (2, 2, 37, 27), dtype=dtype, head_dim=head_dim)
    assert_decisions(backend, (1, 1, 20, 300), 0.1, dtype=dtype, head_dim=head_dim)
    for shape in ((1, 2, 200, 200), (1, 1, 330, 330)) if backend.device == "cuda" else ():
        assert_decisions(backend, shape, dtype=dtype, head_dim=head_dim)


@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_decisions_in_the_gradient_of_a_mask(backend: Backend, dtype: torch.dtype) -> None:
    skip_unless_it_takes(backend, dtype=dtype)
    assert_decisions(backend, (2, 2, 37, 27), dtype=dtype, with_mask=True)
    assert_decisions(backend, (1, 1, 65, 131), dtype=dtype, with_mask=True)


@example(seed=0, site=0, p=0.4, shape=(1, 1, 19, 21), head_offset=0)
@example(seed=2**32 - 1, site=2**16 - 1, p=0.4, shape=(1, 1, 19, 21), head_offset=5)
@example(seed=2**63 - 1, site=2**16 - 1, p=0.4, shape=(2, 3, 19, 21), head_offset=2**16 - 3)
@drawn(
    seed=SEEDS, site=SITES, p=PROBABILITIES, head_offset=st.integers(0, 2**16 - 3),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), LENGTH, st.integers(2, 24)),
)  # fmt: skip
def test_decisions_of_any_call(
    backend: Backend, seed: int, site: int, p: float, shape: tuple[int, int, int, int],
    head_offset: int,
) -> None:  # fmt: skip
    shape = (1, 1, 19, 21) if backend.compiles else shape  # which kernels are compiled for
    options = {"seed": seed, "site": site, "head_offset": head_offset}
    assert_decisions(backend, shape, p, **options, with_mask=True)


@pytest.mark.parametrize("dropout_p", [1 / 16384, 0.1, 0.5, 1.0])
def test_decisions_of_probabilities(backend: Backend, dropout_p: float) -> None:
    """With this seed there are lanes of 0 and of 1, on both sides of the smallest threshold."""
    shape, seed = (1, 2, 21, 27), 124
    smallest, next_smallest = (
        reference.attention_keep(seed, SITE, n / 16384, shape) for n in (1, 2)
    )
    assert not smallest.all() and not torch.equal(smallest, next_smallest)
    assert_decisions(backend, shape, dropout_p, seed=seed, with_mask=True)


def test_everything_dropped_gives_zeros(backend: Backend) -> None:
    op = backend.of(attention, **{**DROPOUT, "dropout_p": 1.0})
    results = helpers.results_of(op, make_inputs())
    assert all((x == 0).all() for x in results.values())


def test_a_probability_that_rounds_to_zero_drops_nothing(backend: Backend) -> None:
    tiny = backend.of(attention, **{**DROPOUT, "dropout_p": 3e-5})
    inputs = make_inputs()
    expected = helpers.results_of(backend.of(attention), inputs)
    helpers.assert_same(helpers.results_of(tiny, inputs), expected)


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_heads_may_be_sharded(backend: Backend, dropout_p: float) -> None:
    inputs = make_qkv(heads=4)
    ours = backend.of(attention, **{**DROPOUT, "dropout_p": dropout_p})
    last = ours(**{name: x[:, :, 2:] for name, x in inputs.items()}, head_offset=2)
    torch.testing.assert_close(last, ours(**inputs)[:, :, 2:])


# ---------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(("dtype", "head_dim"), KINDS, ids=str)
def test_accuracy_of_kinds(backend: Backend, dtype: torch.dtype, head_dim: int) -> None:
    skip_unless_it_takes(backend, dtype=dtype)
    for dropout_p in (0.0, P) if head_dim == 64 else chances(backend):
        check(backend, make_inputs(2, 127, 127, 2, head_dim, dtype), dropout_p)
    check(backend, make_inputs(1, 20, 300, 2, head_dim, dtype), P)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "lengths", [(1, 1), (1, 127), (127, 1), (33, 1000), (127, 128), *LENGTHS[1:-1]], ids=str
)
def test_accuracy_of_lengths(backend: Backend, lengths: tuple[int, int], is_causal: bool) -> None:
    for dropout_p in chances(backend):
        check(backend, make_inputs(1, *lengths), dropout_p, is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 63), (63, 33), (128, 128), (300, 15), (15, 300)], ids=str)
def test_accuracy_of_lengths_in_16_bits(
    backend: Backend, lengths: tuple[int, int], is_causal: bool
) -> None:
    dtype, head_dim = HALF
    inputs = make_inputs(1, *lengths, head_dim=head_dim, dtype=dtype)
    check(backend, inputs, P, is_causal=is_causal)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        *((torch.float32, head_dim) for head_dim in (1, 8, 80, 96, 256)),
        *((torch.bfloat16, head_dim) for head_dim in (8, 33, 80, 96, 256)),
    ],
    ids=str,
)
def test_accuracy_of_head_dims(backend: Backend, dtype: torch.dtype, head_dim: int) -> None:
    for dropout_p in chances(backend):
        check(backend, make_inputs(2, 63, 63, 1, head_dim, dtype), dropout_p)
    if dtype == torch.bfloat16:
        check(backend, make_inputs(1, 20, 300, 1, head_dim, dtype), P)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_accuracy_of_layouts(backend: Backend, layout: Callable[[Tensor], Tensor]) -> None:
    inputs = make_inputs()
    assert not layout(inputs["query"]).is_contiguous()
    for dropout_p in chances(backend):
        check(backend, inputs, dropout_p, layouts=dict.fromkeys(("query", "key", "value"), layout))


@pytest.mark.parametrize("head_dim", [64, 33])
def test_accuracy_of_three_layouts(backend: Backend, head_dim: int) -> None:
    """In 16 bits; where the head dimension is odd no wide access is aligned."""
    layouts = {"query": sequence_first, "key": heads_first, "value": strided_features}
    check(backend, make_inputs(2, 67, 67, 2, head_dim, torch.bfloat16), P, layouts=layouts)


@pytest.mark.parametrize("scale", [0.0, 0.05, 3.0, -0.7])
def test_accuracy_of_scales(backend: Backend, scale: float) -> None:
    skip_unless_it_scales(backend, scale)
    for dropout_p in chances(backend):
        check(backend, make_inputs(2, 33, 21), dropout_p, scale=scale)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("factor", [3, 10])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_are_not_in_16_bits(
    backend: Backend, dtype: torch.dtype, factor: float, dropout_p: float
) -> None:
    """Rounded so, a score of 30 is 0.1 off."""
    inputs = make_inputs(head_dim=64, dtype=dtype)
    inputs["query"] *= factor
    check(backend, inputs, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 127), (127, 1)], ids=str)
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_a_single_key(
    backend: Backend, dtype: torch.dtype, lengths: tuple[int, int], dropout_p: float
) -> None:
    """The softmax is one whatever the score: its gradient is zero but for rounding."""
    skip_unless_it_takes(backend, dtype=dtype)
    inputs = make_qkv(2, *lengths, dtype=dtype)
    options = {**DROPOUT, "dropout_p": dropout_p, "is_causal": True}
    results = helpers.results_of(backend.of(attention, **options), inputs)
    factor = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    if dropout_p:
        factor = multiplier_of(dropout_p, (2, 2, *lengths))[..., :1].transpose(1, 2)
    query, key, value = (x.double() for x in inputs.values())
    (grad_out,) = (x.double() for x in helpers.cotangents_of((results["output 0"],)))
    expected = (factor * value[:, :1]).expand(2, lengths[0], 2, 64).to(dtype)
    torch.testing.assert_close(results["output 0"], expected)
    if dtype.itemsize > 2 or COMPOSED not in backend.quirks:  # torch may sum in 16 bits
        expected = torch.zeros_like(value)
        expected[:, 0] = (factor * grad_out).sum(1)
        torch.testing.assert_close(results["gradient of value"], expected.to(dtype))
    # dO V^T less delta, sums of products that are equal but for rounding.
    left = (factor * grad_out * value[:, :1]).abs().sum(-1, keepdim=True)
    left = left * 8 * torch.finfo(dtype).eps * 64**-0.5
    d_query, d_key = (results[f"gradient of {name}"].abs() for name in ("query", "key"))
    assert (d_query <= left * key[:, :1].abs()).all()
    assert (d_key[:, :1] <= (left * query.abs()).sum(1, keepdim=True)).all()
    assert (d_key[:, 1:] == 0).all()
    if LONE_KEYS in backend.quirks and (lengths[1] == 1 or dtype == torch.float32):
        assert (d_query == 0).all() and (d_key == 0).all()


@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(300, 1), (1, 300)], ids=str)
def test_accuracy_of_a_single_key(
    backend: Backend, lengths: tuple[int, int], dtype: torch.dtype
) -> None:
    """Gradients of query and key are zero, and nothing near it; also in a backward pass of two."""
    skip_unless_it_takes(backend, dtype=dtype)
    inputs = make_inputs(2, *lengths, head_dim=64, dtype=dtype)
    check(backend, inputs, P, is_causal=lengths[0] == 1)


@pytest.mark.parametrize(
    ("head_dim", "dropout_p", "masked"),
    [(40, P, False), (64, P, False), (64, P, True), (64, 0.0, True), (64, 0.0, False)],
)
@pytest.mark.parametrize(
    ("dtype", "length", "magnitude"),
    [
        (torch.float16, 50, 1e4),  # scores of 1e5 are no numbers of fp16
        (torch.bfloat16, 50, 1e18),
        (torch.bfloat16, 300, 1e4),
        (torch.bfloat16, 300, 1e18),
        (torch.float32, 50, 1e4),
        (torch.float32, 50, 1e18),
    ],
    ids=str,
)
def test_large_scores(
    backend: Backend, dtype: torch.dtype, length: int, head_dim: int, magnitude: float,
    dropout_p: float, masked: bool,
) -> None:  # fmt: skip
    """The softmax is a maximum then: outputs and dV are as exact as ever, nothing is infinite.

    Each query is a key, whose score with itself is the maximum whatever rounds the scores.
    """
    inputs = make_qkv(1, 40, length, 2, head_dim, dtype)
    closed = (torch.rand(1, length) < 0.3) & masked
    counting = (~closed[0]).nonzero()[:, 0]
    inputs["query"] = magnitude * inputs["key"][:, counting[torch.randint(len(counting), (40,))]]
    inputs["key_padding_mask"] = closed if masked else None
    found = helpers.results_of(backend.of(attention, **{**DROPOUT, "dropout_p": dropout_p}), inputs)
    exact = exact_results(inputs, found["output 0"], dropout_p)
    names = ["output 0", "gradient of value"]
    if dropout_p or SCORES_TWICE not in backend.quirks:
        assert all(x.isfinite().all() for x in found.values())
    else:
        names.remove("gradient of value")
    for name in names:
        torch.testing.assert_close(found[name], exact[name].to(dtype))


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("lengths", [(0, 5, 5), (2, 0, 5), (2, 0, 0), (2, 5, 0)], ids=str)
def test_nothing_in_gives_nothing_or_zeros(
    backend: Backend, lengths: tuple[int, int, int], dropout_p: float
) -> None:
    inputs = make_inputs(*lengths)
    batch, _, seqlen_k = lengths
    masks = {
        "key_padding_mask": torch.zeros(batch, seqlen_k),
        "attn_mask": torch.zeros(1, seqlen_k),
    }
    op = backend.of(attention, **{**DROPOUT, "dropout_p": dropout_p})
    for case in (inputs, {**inputs, **masks}):
        results = helpers.results_of(op, case)
        assert results["output 0"].shape == inputs["query"].shape
        assert all((x == 0).all() for x in results.values())


def test_no_features_leave_masks_without_gradients(backend: Backend) -> None:
    inputs = make_inputs(2, 5, 7, head_dim=0)
    inputs.update(key_padding_mask=torch.randn(2, 7), attn_mask=torch.randn(5, 7))
    results = helpers.results_of(backend.of(attention, **DROPOUT), inputs)
    assert results["output 0"].shape == (2, 5, 2, 0)
    assert (results["gradient of attn_mask"] == 0).all()
    assert (results["gradient of key_padding_mask"] == 0).all()


@pytest.mark.parametrize("special", [NAN, float("inf")])
@pytest.mark.parametrize(
    ("length", "dtype", "masked"),
    [(63, torch.bfloat16, False), (300, torch.bfloat16, False), (63, torch.float32, True)],
    ids=str,
)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_and_infinity_are_not_hidden(
    backend: Backend, name: str, length: int, dtype: torch.dtype, masked: bool, special: float
) -> None:
    """Where one enters, the outputs of its sequence are NaN or infinite; no other sequence's."""
    inputs = make_qkv(2, 33, length, dtype=dtype)
    ours = backend.of(attention, **{**DROPOUT, "dropout_p": 0.0 if masked else 1 / 16384})
    if masked:
        inputs["key_padding_mask"] = torch.zeros(2, length, dtype=torch.bool)
    clean = helpers.results_of(ours, inputs)
    inputs[name][1, 4] = special
    found = helpers.results_of(ours, inputs)
    for result, x in clean.items():
        assert torch.equal(found[result][0], x[0]), result
    rows = found["output 0"][1, 4 if name == "query" else slice(None)]
    assert not rows.isfinite().all(-1).any()


@pytest.mark.parametrize("length", [63, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_equal_bit_for_bit(backend: Backend, dtype: torch.dtype, length: int) -> None:
    assert_same_twice(backend, make_inputs(2, 65, length, head_dim=64, dtype=dtype))


def assert_same_twice(backend: Backend, inputs: dict[str, Tensor | None]) -> None:
    """Without masks, and with float masks, which have gradients."""
    batch, seqlen_q, _, _ = inputs["query"].shape
    seqlen_k, dtype = inputs["key"].shape[1], inputs["key"].dtype
    masks = {
        "key_padding_mask": torch.randn(batch, seqlen_k).to(dtype),
        "attn_mask": torch.randn(batch, seqlen_q, seqlen_k).to(dtype),
    }
    op = backend.of(attention, **DROPOUT)
    for case in (inputs, {**inputs, **masks}):
        first, second = (helpers.results_of(op, case) for _ in range(2))
        helpers.assert_same(first, second)


def test_gradients_of_a_sum(backend: Backend) -> None:
    """The gradient flowing in is one number, expanded."""
    inputs = make_qkv(2, 33, 21)
    given = helpers.results_of(
        backend.of(attention, **DROPOUT), inputs, cotangents=[torch.ones(2, 33, 2, 64)]
    )
    summed = backend.of(lambda **arguments: attention(**arguments).sum(), **DROPOUT)
    found = helpers.results_of(summed, inputs, cotangents=[torch.ones(())])
    for name in ("query", "key", "value"):
        torch.testing.assert_close(found[f"gradient of {name}"], given[f"gradient of {name}"])


# -------------------------------------------------------------------- what torch does with the op


def in_order(op: Callable[..., Tensor], *names: str) -> Callable[..., Tensor]:
    """``op`` of positional arguments."""
    return lambda *tensors: op(**dict(zip(names, tensors, strict=True)))


def doubles(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_of_every_order(backend: Backend, dropout_p: float) -> None:
    """Of everything at once, and of one tensor that is all three."""
    skip_unless_it_takes(backend, dtype=torch.float64)
    options = {**DROPOUT, "dropout_p": dropout_p}
    names = ("query", "key", "value", "key_padding_mask", "attn_mask")
    ours = in_order(backend.of(attention, is_causal=True, **options), *names)
    inputs = doubles((1, 3, 1, 2), (1, 3, 1, 2), (1, 3, 1, 2), (1, 3), (3, 3))
    helpers.assert_gradients_of_every_order(ours, *inputs)
    op = backend.of(attention, **options)

    def same(x: Tensor) -> Tensor:
        key = x.sin()
        return op(query=x, key=key, value=key * x) + op(query=x, key=x, value=x)

    helpers.assert_gradients_of_every_order(same, *doubles((1, 3, 1, 2)))


@pytest.mark.parametrize(("dynamic", "dropout_p"), [(False, P), (False, 0.0), (True, P)])
def test_compiled_equals_eager(backend: Backend, dynamic: bool, dropout_p: float) -> None:
    def run(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        masks = {name: options.pop(name) for name in ("key_padding_mask", "attn_mask")}
        same = attention(key, key, key, **options)
        return attention(query.sin(), key, value, **masks, **options), same

    if dynamic and backend.interprets:
        pytest.skip("dynamic sizes end before the kernels: the pytorch backend shows them")
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, *lengths in ((2, 9, 13), (3, 17, 12), (5, 12, 24))[: 3 if dynamic else 1]:
        inputs = make_inputs(batch, *lengths)
        inputs["key_padding_mask"] = torch.rand(batch, lengths[1]) < 0.3
        inputs["attn_mask"] = torch.randn(lengths)
        actual, expected = (
            helpers.results_of(backend.of(function, **{**DROPOUT, "dropout_p": dropout_p}), inputs)
            for function in (compiled, run)
        )
        helpers.assert_close(actual, expected)
        for name, x in expected.items():
            assert torch.equal(actual[name] == 0, x == 0), name


@pytest.mark.on("cuda")
@pytest.mark.parametrize("length", [128, 600])
def test_a_captured_step_reads_the_seed_of_each_replay(backend: Backend, length: int) -> None:
    dtype, head_dim = HALF
    inputs = make_qkv(2, length, length, head_dim=head_dim, dtype=dtype)
    leaves = [x.to(backend.device).requires_grad_() for x in inputs.values()]
    grad = torch.randn_like(leaves[0])

    def step(seed: Tensor) -> list[Tensor]:
        out = attention(*leaves, dropout_p=0.1, seed=seed, backend=backend.name)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    seed, stream = seed_tensor().to(backend.device), torch.cuda.Stream()
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
        expected = step(torch.tensor([number], device=backend.device))
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.on("cuda")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_is_as_accurate_at_length_1000(backend: Backend, dtype: torch.dtype) -> None:
    for lengths in ((1000, 1000), (1000, 63), (63, 1000)):
        check(backend, make_inputs(2, *lengths, head_dim=64, dtype=dtype), P)
    check(backend, make_inputs(2, 1000, 1000, head_dim=64, dtype=dtype))


@pytest.mark.on("cuda")
def test_two_runs_that_fill_a_gpu_are_equal_bit_for_bit(backend: Backend) -> None:
    assert_same_twice(backend, make_inputs(4, 1000, 1000, 8, dtype=torch.bfloat16))
