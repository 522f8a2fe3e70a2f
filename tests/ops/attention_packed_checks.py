"""What ``attention_packed``, and ``attention`` of packed sequences, do on every backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import attention, attention_packed
from tests import helpers, reference
from tests.ops.attention_decisions import Reader, packed_tokens
from tests.ops.attention_inputs import (
    DROPOUT,
    HALF,
    NAN,
    QKV_LAYOUTS,
    SEED,
    SITE,
    P,
    beyond,
    check,
    cumulative,
    lengths_tensor,
    make_qkv,
    skip_unless_it_takes,
)
from tests.ops.backends import READS_LENGTHS, Backend

OPS = ("attention", "attention_packed")
pytestmark = pytest.mark.usefixtures("larger_tiles", "few_without_dropout")

LENGTHS = [7, 0, 33, 1, 0, 12, 0]
FP32 = (torch.float32, 64)


def each_packed(cu_seqlens: Tensor, longest: int) -> dict[str, Any]:
    """Arguments of ``attention``, with as many keys as queries."""
    return {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }


# ------------------------------------------------------------------------------------- decisions


@pytest.mark.calls("attention")
@pytest.mark.parametrize(
    "lengths",
    [([5, 0, 33, 2, 21], [18, 3, 27, 2, 0]), ([20, 2], [4, 290])],
    ids=["short", "long"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decisions_of_packed_sequences(
    backend: Backend, dtype: torch.dtype, lengths: tuple[list[int], list[int]]
) -> None:
    """They are those of the padded batch, sequence by sequence."""
    queries, keys = map(packed_tokens, lengths)
    cu_q, cu_k = map(cumulative, lengths)
    sizes = queries.longest + 3, keys.longest
    options = {**DROPOUT, "dropout_p": 0.4, "scale": 1 / 16}
    options |= {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    attend = backend.of(attention, **options, max_seqlen_q=sizes[0], max_seqlen_k=sizes[1])
    shape = (len(lengths[0]), 2, queries.longest, keys.longest)
    keep = reference.attention_keep(SEED, SITE, 0.4, shape)
    exists_q, exists_k = (~beyond(x, n) for x, n in zip(lengths, shape[2:], strict=True))
    exists = exists_q[:, None, :, None] & exists_k[:, None, None, :]
    Reader(queries, keys, 2, 64, attend, dtype).assert_decisions(keep & exists)


# ---------------------------------------------------------------------------------------- values


def as_one(
    query: Tensor, key: Tensor, value: Tensor, *, real: Tensor, longest: int, **options: Any
) -> Tensor:
    """``attention_packed`` of the tokens of a padded batch that are ``real``."""
    qkv = torch.stack((query, key, value), 2)[real]
    out = attention_packed(qkv, max_seqlen=longest, **options)
    return torch.zeros_like(query).index_put((real,), out)


def as_three(
    query: Tensor, key: Tensor, value: Tensor, *, real: Tensor, longest: int, cu_seqlens: Tensor,
    **options: Any,
) -> Tensor:  # fmt: skip
    tokens = (x[real] for x in (query, key, value))
    out = attention(*tokens, **each_packed(cu_seqlens, longest), **options)
    return torch.zeros_like(query).index_put((real,), out)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize(
    ("kind", "lengths", "longest"),
    [
        (FP32, LENGTHS, 33),
        (FP32, LENGTHS, 40),
        (HALF, [68, 0, 104, 33], 104),
        (HALF, [260, 1, 0, 64], 260),
    ],
    ids=["fp32", "fp32, longer than any", "16 bits", "16 bits, long"],
)
def test_accuracy_of_packed_sequences(
    backend: Backend,
    kind: tuple[torch.dtype, int],
    lengths: list[int],
    longest: int,
    dropout_p: float,
    is_causal: bool,
) -> None:
    """Both ops, against the padded batch with the keys past a sequence's end masked."""
    dtype, head_dim = kind
    past = beyond(lengths, max(lengths))
    masks = {"attn_mask": past[:, None, :, None] | past[:, None, None, :]}
    inputs = make_qkv(len(lengths), max(lengths), max(lengths), 1, head_dim, dtype)
    ours = {"real": ~past, "cu_seqlens": cumulative(lengths), "longest": longest}
    for attend in (as_one, as_three)[: 1 if dtype != torch.float32 else 2]:
        check(
            backend, inputs, dropout_p, attend=attend, ours=ours, masks=masks, is_causal=is_causal
        )


@pytest.mark.calls("attention")
@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_accuracy_of_packed_cross_attention(backend: Backend, dropout_p: float) -> None:
    lengths_q, lengths_k = [3, 0, 9, 4], [5, 2, 0, 8]
    past_q, past_k = beyond(lengths_q, 9), beyond(lengths_k, 8)
    masks = {"attn_mask": past_q[:, None, :, None] | past_k[:, None, None, :]}
    ours = {"real_q": ~past_q, "real_k": ~past_k}
    ours |= {"cu_seqlens_q": cumulative(lengths_q), "cu_seqlens_k": cumulative(lengths_k)}

    def attend(
        query: Tensor, key: Tensor, value: Tensor, *, real_q: Tensor, real_k: Tensor, **options: Any
    ) -> Tensor:
        tokens = query[real_q], key[real_k], value[real_k]
        out = attention(*tokens, max_seqlen_q=9, max_seqlen_k=8, **options)
        return torch.zeros_like(query).index_put((real_q,), out)

    check(backend, make_qkv(4, 9, 8), dropout_p, attend=attend, ours=ours, masks=masks)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("layout", QKV_LAYOUTS)
def test_one_tensor_equals_three(backend: Backend, layout: str, dropout_p: float) -> None:
    inputs = {
        "qkv": torch.randn(2, 33, 3, 2, 64),
        "key_padding_mask": torch.randn(2, 33),
        "attn_mask": torch.randn(2, 33, 33),
    }
    options = {**DROPOUT, "dropout_p": dropout_p, "is_causal": True, "scale": 0.3}

    def three(qkv: Tensor, **options: Any) -> Tensor:
        return attention(*qkv.unbind(2), **options)

    found, expected = (
        helpers.results_of(backend.of(op, {"qkv": QKV_LAYOUTS[layout]}, **options), inputs)
        for op in (attention_packed, three)
    )
    helpers.assert_same(found, expected)


def test_one_tensor_in_16_bits_equals_three(backend: Backend) -> None:
    def three(qkv: Tensor, **options: Any) -> Tensor:
        return attention(*qkv.unbind(2), **options)

    inputs = {"qkv": torch.randn(2, 72, 3, 2, 64).bfloat16()}
    for layout in QKV_LAYOUTS.values():
        found, expected = (
            helpers.results_of(backend.of(op, {"qkv": layout}, **DROPOUT), inputs)
            for op in (attention_packed, three)
        )
        helpers.assert_same(found, expected)


@pytest.mark.calls("attention_packed")
@pytest.mark.parametrize("lengths", [[], [0, 0]])
@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_no_packed_tokens(backend: Backend, lengths: list[int], dropout_p: float) -> None:
    ours = backend.of(
        attention_packed, **{**DROPOUT, "dropout_p": dropout_p}, cu_seqlens=cumulative(lengths)
    )
    results = helpers.results_of(ours, {"qkv": torch.randn(0, 3, 2, 64)})
    assert results["output 0"].shape == (0, 2, 64)
    assert results["gradient of qkv"].shape == (0, 3, 2, 64)


@pytest.mark.calls("attention_packed")
def test_cumulative_lengths_of_any_stride(backend: Backend) -> None:
    def strided(qkv: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
        apart = cu_seqlens.repeat_interleave(2)[::2]
        assert not apart.is_contiguous()
        return attention_packed(qkv, cu_seqlens=apart, **options)

    options = {**DROPOUT, "cu_seqlens": lengths_tensor(0, 5, 5, 21), "max_seqlen": 16}
    inputs = {"qkv": torch.randn(21, 3, 2, 64)}
    found, expected = (
        helpers.results_of(backend.of(op, **options), inputs) for op in (strided, attention_packed)
    )
    helpers.assert_same(found, expected)


# --------------------------------------------------------------------- rows that belong to nothing


def run_with_holes(
    backend: Backend,
    counts: Tensor,
    lengths: list[int],
    longest: int,
    values: tuple[Tensor, Tensor],
    **options: Any,
) -> None:
    """NaN in rows that do not count is not read there, and zeros are written in its place."""
    qkv, grad = values
    op = partial(backend.of(attention_packed, **DROPOUT, **options), max_seqlen=longest)
    holes = ~counts[:, None, None]
    nans = qkv.masked_fill(holes[..., None], NAN), grad.masked_fill(holes, NAN)

    def run(lengths: list[int], qkv: Tensor, grad: Tensor) -> helpers.Results:
        ours = partial(op, cu_seqlens=cumulative(lengths).to(backend.device))
        return helpers.results_of(ours, {"qkv": qkv}, cotangents=[grad])

    found = run(lengths, *nans)
    expected = run([min(n, longest) for n in lengths], qkv[counts], grad[counts])
    for name, x in found.items():
        assert torch.equal(x[counts], expected[name]), name
        assert (x[~counts] == 0).all(), name


@pytest.mark.calls("attention")
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("lengths", [[2, 2], [3, 0], [0], [], [1, 3, 0]], ids=str)
def test_rows_past_the_last_sequence_are_zero_and_reach_nothing(
    backend: Backend, lengths: list[int], dropout_p: float
) -> None:
    """As padding at the end of packed tokens: garbage in, zeros out, and zero gradients."""
    tokens, rows = sum(lengths), 6
    tensors = {name: torch.randn(rows, 2, 64) for name in ("query", "key", "value")}
    grad = torch.randn(rows, 2, 64)
    options = {**DROPOUT, "dropout_p": dropout_p}
    ours = backend.of(attention, **options, **each_packed(cumulative(lengths), 4))

    def run(rows: int, value: float) -> helpers.Results:
        filled = {name: x[:rows].clone() for name, x in tensors.items()}
        for x in filled.values():
            x[tokens:] = value
        d_out = grad[:rows].clone()
        d_out[tokens:] = value
        return helpers.results_of(ours, filled, cotangents=[d_out])

    found = run(rows, NAN)
    assert all(not x[tokens:].any() for x in found.values())
    expected = run(tokens, 0.0)
    helpers.assert_same({name: x[:tokens] for name, x in found.items()}, expected)


@pytest.mark.calls("attention_packed")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", [FP32, HALF], ids=str)
def test_many_rows_past_the_last_sequence(
    backend: Backend, kind: tuple[torch.dtype, int], is_causal: bool
) -> None:
    """More tiles of them than the longest sequence has."""
    dtype, head_dim = kind
    lengths = [9, 21, 0, 16]
    counts = torch.arange(sum(lengths) + 300) < sum(lengths)
    values = torch.randn(len(counts), 3, 1, head_dim), torch.randn(len(counts), 1, head_dim)
    values = tuple(x.to(dtype) for x in values)
    run_with_holes(backend, counts, lengths, 21, values, is_causal=is_causal)


@pytest.mark.calls("attention_packed")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("longest", [21, 264])
@pytest.mark.parametrize("kind", [FP32, HALF], ids=str)
def test_rows_of_a_sequence_past_max_seqlen(
    backend: Backend, kind: tuple[torch.dtype, int], longest: int, is_causal: bool
) -> None:
    """Not read, and written as zeros; a backend that reads the lengths refuses."""
    dtype, head_dim = kind
    lengths = [longest, 3 * longest + 5, 0, 40]
    counts = torch.cat([torch.arange(n) < longest for n in lengths] + [torch.zeros(70) > 0])
    values = torch.randn(len(counts), 3, 1, head_dim), torch.randn(len(counts), 1, head_dim)
    values = tuple(x.to(dtype) for x in values)
    run = partial(run_with_holes, backend, counts, lengths, longest, values, is_causal=is_causal)
    if READS_LENGTHS in backend.quirks:
        with pytest.raises(ValueError, match="max_seqlen must be at least"):
            run()
    else:
        run()


@pytest.mark.calls("attention_packed")
@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_garbage_after_packed_tokens_does_not_reach_the_projection(
    backend: Backend, dropout_p: float
) -> None:
    inputs = {"x": torch.randn(6, 8), "weight": torch.randn(192, 8)}

    def project(x: Tensor, weight: Tensor, counts: Tensor, **options: Any) -> Tensor:
        poisoned = torch.where(counts, F.linear(x, weight), NAN)
        return attention_packed(poisoned.unflatten(-1, (3, 1, 64)), **options)

    options = {**DROPOUT, "dropout_p": dropout_p, "counts": torch.arange(6)[:, None] < 4}
    options |= {"cu_seqlens": lengths_tensor(0, 2, 4), "max_seqlen": 2}
    found = helpers.results_of(backend.of(project, **options), inputs)
    assert found["gradient of weight"].isfinite().all() and found["gradient of weight"].any()
    for name in ("output 0", "gradient of x"):
        assert found[name][:4].any() and not found[name][4:].any(), name


@pytest.mark.calls("attention_packed")
@pytest.mark.parametrize("length", [72, 300])
@pytest.mark.parametrize("part", range(3), ids=("query", "key", "value"))
def test_nan_stays_in_its_sequence(backend: Backend, part: int, length: int) -> None:
    clean = torch.randn(2 * length, 3, 1, 64).bfloat16()
    cu_seqlens = lengths_tensor(0, length, 2 * length)
    ours = backend.of(attention_packed, **DROPOUT, cu_seqlens=cu_seqlens, max_seqlen=length)
    qkv = clean.clone()
    qkv[length + 4, part] = NAN
    expected, found = (helpers.results_of(ours, {"qkv": x}) for x in (clean, qkv))
    for name, x in expected.items():
        assert torch.equal(found[name][:length], x[:length]), name
        assert found[name][length:].isnan().any(), name


# -------------------------------------------------------------------- what torch does with the op


@pytest.mark.calls("attention_packed")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_of_every_order_of_packed_sequences(backend: Backend, dropout_p: float) -> None:
    skip_unless_it_takes(backend, dtype=torch.float64)
    options = {**DROPOUT, "dropout_p": dropout_p, "cu_seqlens": lengths_tensor(0, 2, 2, 5)}
    op = backend.of(attention_packed, **options, max_seqlen=3)
    qkv = torch.randn(5, 3, 1, 2, dtype=torch.float64)
    helpers.assert_gradients_of_every_order(lambda qkv: op(qkv=qkv), qkv)


@pytest.mark.calls("attention_packed")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_of_every_order_of_one_tensor(backend: Backend, dropout_p: float) -> None:
    skip_unless_it_takes(backend, dtype=torch.float64)
    op = backend.of(attention_packed, **{**DROPOUT, "dropout_p": dropout_p})
    qkv = torch.randn(1, 3, 3, 1, 2, dtype=torch.float64)
    helpers.assert_gradients_of_every_order(lambda qkv: op(qkv=qkv), qkv)


@pytest.mark.calls("attention_packed")
def test_compiled_packed_sequences_equal_eager(backend: Backend) -> None:
    def run(qkv: Tensor, **options: Any) -> Tensor:
        return attention_packed(qkv.sin(), max_seqlen=33, **options)

    options = {**DROPOUT, "cu_seqlens": cumulative(LENGTHS)}
    assert_compiled_equals(backend, run, [torch.randn(sum(LENGTHS), 3, 2, 64)], options)


@pytest.mark.calls("attention_packed")
@pytest.mark.parametrize("dynamic", [False, True])
def test_one_tensor_compiled_equals_eager(backend: Backend, dynamic: bool) -> None:
    def run(qkv: Tensor, **options: Any) -> Tensor:
        return attention_packed(qkv.sin(), **options)

    if dynamic and backend.interprets:
        pytest.skip("dynamic sizes end before the kernels: the pytorch backend shows them")
    sizes = ((2, 9), (3, 17), (5, 12))[: 3 if dynamic else 1]
    samples = [torch.randn(*size, 3, 2, 64) for size in sizes]
    assert_compiled_equals(backend, run, samples, DROPOUT, dynamic=dynamic)


def assert_compiled_equals(
    backend: Backend, run: Callable[..., Tensor], samples: list[Tensor], options: dict[str, Any],
    dynamic: bool = False,
) -> None:  # fmt: skip
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for qkv in samples:
        actual, expected = (
            helpers.results_of(backend.of(function, **options), {"qkv": qkv})
            for function in (compiled, run)
        )
        helpers.assert_close(actual, expected)
        for name, x in expected.items():
            assert torch.equal(actual[name] == 0, x == 0), name


@pytest.mark.calls("attention_packed")
@pytest.mark.parametrize("longest", [64, 300])
def test_two_runs_of_packed_sequences_are_equal_bit_for_bit(backend: Backend, longest: int) -> None:
    lengths = [longest, 0, 33]
    dtype, head_dim = HALF
    ours = backend.of(attention_packed, **DROPOUT, cu_seqlens=cumulative(lengths))
    inputs = {"qkv": torch.randn(sum(lengths) + 5, 3, 1, head_dim).to(dtype)}
    op = partial(ours, max_seqlen=longest)
    helpers.assert_same(helpers.results_of(op, inputs), helpers.results_of(op, inputs))
