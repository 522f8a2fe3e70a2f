"""``attention`` and ``attention_packed`` where the backend does not matter, and the pytorch one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import attention, attention_packed
from fastattn.arguments import AttentionArguments
from tests import helpers
from tests.ops import (
    attention_lengths_checks,
    attention_masks_checks,
    attention_packed_checks,
)
from tests.ops.attention_inputs import (
    INF,
    QKV_LAYOUTS,
    SITE,
    P,
    every_other_row,
    heads_first,
    make_inputs,
    seed_tensor,
    sequence_first,
    strided_features,
)
from tests.ops.backends import Backend

# ------------------------------------------------------------------- while a transform is active


def in_composite(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same while some transform of torch.func is active: then it is a composite."""

    def run(*tensors: Tensor, **inputs: Tensor | None) -> Tensor:
        return torch.vmap(lambda _: function(*tensors, **inputs))(torch.zeros(1))[0]

    return run


@dataclass(frozen=True)
class Transformed(Backend):
    def of(self, *args: Any, **options: Any) -> Callable[..., Any]:
        return in_composite(super().of(*args, **options))


COMPOSITE = Transformed("pytorch")


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("case", attention_masks_checks.finite_mask_cases())
def test_a_finite_mask_of_a_composite_is_never_infinite(
    case: str, dropout_p: float, request: pytest.FixtureRequest
) -> None:
    check = attention_masks_checks.test_a_finite_mask_is_never_infinite
    check(COMPOSITE, case, dropout_p, request)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_infinity_excludes_in_sums_of_a_composite_too(
    dtype: torch.dtype, dropout_p: float, request: pytest.FixtureRequest
) -> None:
    check = attention_masks_checks.test_infinity_excludes_in_sums_too
    check(COMPOSITE, dtype, dropout_p, request)


@pytest.mark.parametrize("special", [float("nan"), INF])
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("case", ["no mask", "masks", "causal"])
def test_ignored_rows_reach_nothing_in_a_composite(
    case: str, dropout_p: float, special: float
) -> None:
    attention_lengths_checks.test_ignored_rows_reach_nothing(COMPOSITE, case, dropout_p, special)


def test_nan_that_counts_stays_out_of_ignored_rows_in_a_composite(
    request: pytest.FixtureRequest,
) -> None:
    check = attention_lengths_checks.test_nan_that_counts_stays_out_of_ignored_rows
    check(COMPOSITE, 0.0, request)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("lengths", [[2, 2], [3, 0], [0], [], [1, 3, 0]], ids=str)
def test_rows_past_the_last_sequence_in_a_composite(lengths: list[int], dropout_p: float) -> None:
    check = attention_packed_checks.test_rows_past_the_last_sequence_are_zero_and_reach_nothing
    check(COMPOSITE, lengths, dropout_p)


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


# ------------------------------------------------------------ derivatives of every order and mode

TWISTER = -7  # a negative seed: torch's own generator decides, and the pytorch backend replays it


def doubles(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def test_gradients_of_every_order_of_torch_decisions() -> None:
    options = {"dropout_p": 0.3, "seed": seed_tensor(TWISTER)}

    def masked(query: Tensor, key: Tensor, value: Tensor, padding: Tensor, mask: Tensor) -> Tensor:
        masks = {"key_padding_mask": padding, "attn_mask": mask}
        return attention(query, key, value, **masks, **options)

    def same(x: Tensor) -> Tensor:
        key = x.sin()
        return attention(x, key, key * x, **options) + attention(x, x, x, **options)

    shapes = ((2, 3, 2, 2), (2, 4, 2, 2), (2, 4, 2, 2), (2, 4), (2, 3, 4))
    helpers.assert_gradients_of_every_order(masked, *doubles(*shapes))
    helpers.assert_gradients_of_every_order(same, *doubles((2, 3, 2, 2)))
    packed = partial(attention_packed, **options)
    causal = partial(packed, is_causal=True)
    helpers.assert_gradients_of_every_order(causal, *doubles((2, 3, 3, 2, 2)))
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    sequences = partial(packed, cu_seqlens=cu_seqlens, max_seqlen=3)
    helpers.assert_gradients_of_every_order(sequences, *doubles((5, 3, 2, 2)))


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
    helpers.assert_registered(name, *op_samples()[name])


def test_every_registered_op_has_samples() -> None:
    registered = helpers.registered_ops("attention_") - {"attention_dropout_factor"}
    assert registered == set(op_samples())


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_fake_tensors_agree(dropout_p: float) -> None:
    inputs = make_inputs(2, 5, 7)
    names, layouts = ("query", "key", "value"), (heads_first, every_other_row, strided_features)
    tensors = [layout(inputs[n]) for layout, n in zip(layouts, names, strict=True)]
    ours = partial(attention, dropout_p=dropout_p)
    helpers.assert_fakes_agree(lambda q, k, v, seed: ours(q, k, v, seed=seed), *tensors)
    for layout in QKV_LAYOUTS.values():
        qkv = layout(torch.randn(2, 5, 3, 2, 8))
        ours_packed = partial(attention_packed, dropout_p=dropout_p)
        helpers.assert_fakes_agree(lambda x, seed, f=ours_packed: f(x, seed=seed), qkv)


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


def test_backward_twice_through_torch_sdpa_gives_the_same_and_keeps_no_graph() -> None:
    qkv = torch.randn(2, 5, 3, 2, 4, requires_grad=True)
    out = attention_packed(qkv)
    (first,) = torch.autograd.grad(out.sum(), qkv, retain_graph=True)
    (second,) = torch.autograd.grad(out.sum(), qkv)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), qkv)
