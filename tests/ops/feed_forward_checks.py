"""What ``feed_forward`` does, checked on every backend that has it.

Each dtype and activation, with and without dropout, makes kernels of its own on a GPU, which take
seconds to compile; checks share them where they can.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dispatch, feed_forward
from tests import helpers, reference
from tests.ops import cuda_graphs
from tests.ops.backends import FEW, Backend, few_activations, few_kernels
from tests.ops.bias_activation_dropout_checks import EAGER, SEED, SITE, P, seed_tensor

OPS = ("feed_forward",)

SAVE_LEVELS = ("hidden", "input")

every_activation = pytest.mark.parametrize("activation", EAGER)
relu_and_another = pytest.mark.parametrize("activation", ["relu", "gelu"])
every_level = pytest.mark.parametrize("save", SAVE_LEVELS)
with_and_without = pytest.mark.parametrize("dropout_p", [0.0, P])


def options_of(dropout_p: float = P, **options: Any) -> dict[str, Any]:
    return {"dropout_p": dropout_p, "seed": seed_tensor(), "site": SITE, **options}


def make_inputs(
    shape: tuple[int, ...] = (3, 63, 40),
    d_ff: int = 136,
    d_out: int = 24,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Widths that every backend takes, and no tile divides."""
    d = shape[-1]
    inputs = {
        "input": torch.randn(shape),
        "weight1": torch.randn(d_ff, d) / d**0.5,
        "bias1": torch.randn(d_ff),
        "weight2": torch.randn(d_out, d_ff) / d_ff**0.5,
        "bias2": torch.randn(d_out),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def why_not(backend: Backend, **facts: Any) -> str | None:
    return dispatch.why_not("feed_forward", backend.name, torch.device(backend.device), **facts)


def skip_what_it_cannot(backend: Backend, **facts: Any) -> None:
    """Skip a call that a backend of the library says it cannot run."""
    if (reason := why_not(backend, **facts)) is not None:
        pytest.skip(f"{backend}: {reason}")


def dtype_of(backend: Backend) -> torch.dtype:
    """fp32, or bf16 where a backend takes no fp32."""
    return torch.bfloat16 if why_not(backend, dtypes=(torch.float32,)) else torch.float32


# -------------------------------------------------------------------------------------- accuracy


def coordinates(
    shape: tuple[int, ...],
    batch_first: bool = True,
    row_index: Tensor | None = None,
    row_period: int = 1,
) -> tuple[Tensor, Tensor]:
    """Position and sequence of every row of tokens of ``shape``."""
    if row_index is None:
        return reference.coordinates(shape or (1,), batch_first)
    outer, inner = row_index.long() // row_period, row_index.long() % row_period
    return (inner, outer) if batch_first else (outer, inner)


def eager(
    input: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
    *, activation: str, keep: Tensor | None, dropout_p: float,
) -> Tensor:  # fmt: skip
    hidden = EAGER[activation](F.linear(input, weight1, bias1))
    if keep is not None:
        hidden = hidden * keep.view(hidden.shape) * (1 / (1 - dropout_p))
    return F.linear(hidden, weight2, bias2)


def keep_off_the_kink(inputs: dict[str, Tensor | None]) -> None:
    """Until no hidden feature is so near zero that the order of a sum decides relu."""
    x, weight, bias = (inputs[name] for name in ("input", "weight1", "bias1"))

    def near() -> Tensor:
        hidden = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        return (hidden.abs() < 1e-4).view(-1, weight.shape[0]).any(0)

    while (features := near()).any():
        if bias is None:
            weight[features, 0] += 0.125
        else:
            bias[features] += 0.125


def check(
    backend: Backend,
    inputs: dict[str, Tensor | None],
    dropout_p: float = P,
    activation: str = "gelu",
    layouts: dict[str, Callable[[Tensor], Tensor]] | None = None,
    **options: Any,
) -> None:
    """As accurate as eager PyTorch on the same device."""
    if activation == "relu":
        keep_off_the_kink(inputs)
    keep = multiplier = None
    if dropout_p:
        names = ("batch_first", "row_index", "row_period")
        rows = {name: options[name] for name in names if name in options}
        where = coordinates(inputs["input"].shape[:-1], **rows)
        columns = torch.arange(inputs["weight1"].shape[0])
        keep = reference.activation_keep(SEED, SITE, dropout_p, *where, columns)
        multiplier = reference.factor(keep, dropout_p)
    options = options_of(dropout_p, activation=activation, **options)
    given = {"activation": activation, "keep": keep, "dropout_p": dropout_p}
    helpers.assert_as_accurate_as_eager(
        backend.of(feed_forward, layouts, **options),
        backend.there(eager, layouts, **given),
        Backend("none").there(
            reference.feed_forward, layouts, activation=activation, multiplier=multiplier
        ),
        inputs,
    )


@every_level
@with_and_without
@every_activation
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_accuracy_of_dtypes(backend: Backend, dtype, activation, dropout_p, save) -> None:
    skip_what_it_cannot(backend, dtypes=(dtype,))
    few_activations(backend, activation, dtype)
    check(backend, make_inputs((3, 7, 40), 72, dtype=dtype), dropout_p, activation, save=save)


@with_and_without
@relu_and_another
@pytest.mark.parametrize(
    "shape", [(40,), (1, 40), (63, 40), (1, 1, 40), (2, 127, 8), (1, 200, 8)], ids=str
)
def test_accuracy_of_shapes(backend: Backend, shape, activation, dropout_p) -> None:
    check(backend, make_inputs(shape, dtype=dtype_of(backend)), dropout_p, activation)


@pytest.mark.parametrize(
    "widths", [(16, 8, 8), (16, 64, 8), (16, 200, 8), (16, 520, 8), (8, 136, 256)]
    + [(1, 1, 1), (7, 63, 1), (16, 127, 3), (16, 1, 1)],
    ids=str,
)  # fmt: skip
def test_accuracy_of_widths(backend: Backend, widths: tuple[int, int, int]) -> None:
    dtype = dtype_of(backend)
    skip_what_it_cannot(backend, dtypes=(dtype,), widths=widths)
    d, d_ff, d_out = widths
    check(backend, make_inputs((2, 5, d), d_ff, d_out, dtype))
    check(backend, make_inputs((2, 5, d), d_ff, d_out, dtype), 0.0, "relu")


@pytest.mark.on("cuda")
@every_level
@relu_and_another
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens, chunk", [(1, None), (127, None), (1000, None), (1000, 300)])
def test_accuracy_of_sizes_of_models(backend, tokens, chunk, dtype, activation, save) -> None:
    """Many tiles, whole ones and tails."""
    skip_what_it_cannot(backend, dtypes=(dtype,))
    inputs = make_inputs((tokens, 768), 3072, 768, dtype)
    check(backend, inputs, P, activation, save=save, chunk_tokens=chunk)


@with_and_without
@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
@pytest.mark.parametrize("absent", [("bias1", "bias2"), ("bias1",), ("bias2",)], ids=str)
def test_without_biases(backend: Backend, absent, activation, dropout_p) -> None:
    inputs = make_inputs((3, 21, 40), dtype=dtype_of(backend)) | dict.fromkeys(absent)
    check(backend, inputs, dropout_p, activation)


LAYOUTS = {
    "rows apart": lambda x: F.pad(x, (0, 24))[..., : x.shape[-1]],
    "transposed": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "begins between two addresses of 16 bytes": lambda x: F.pad(x, (1, 7))[..., 1:-7],
    "rows begin anywhere": lambda x: F.pad(x, (1, 0))[..., 1:],
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "columns first": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "one for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("name", ["input", "weight1", "weight2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_layouts(backend: Backend, layout: str, name: str) -> None:
    inputs = make_inputs((3, 7, 40), 72, dtype=dtype_of(backend))
    if layout == "one for all":
        inputs[name] = inputs[name][:1].expand_as(inputs[name]).clone()
    laid_out = LAYOUTS[layout]
    adjacent = name == "input" or laid_out(inputs[name]).stride(1) == 1
    skip_what_it_cannot(backend, has_adjacent_columns=adjacent)
    layouts = {name: laid_out, "bias1": lambda x: x.repeat_interleave(2)[::2]}
    check(backend, inputs, P, "gelu", layouts, save="input")
    check(backend, inputs, P, "relu", layouts, save="hidden", batch_first=False)
    if not backend.compiles:
        check(backend, inputs, 0.0, "relu", layouts, save="input")


@pytest.mark.parametrize("chunk_tokens", [1, 8, 20])
@every_level
@relu_and_another
def test_accuracy_of_chunks(backend: Backend, activation, save, chunk_tokens) -> None:
    shape = (1, 5, 16) if chunk_tokens == 1 else (3, 7, 16)
    inputs = make_inputs(shape, 72, dtype=dtype_of(backend))
    options = {"save": save, "chunk_tokens": chunk_tokens, "batch_first": False}
    check(backend, inputs, P, activation, **options)


@pytest.mark.parametrize("chunk_tokens", [None, 20])
@pytest.mark.parametrize("batch_first", [True, False])
@relu_and_another
def test_accuracy_of_packed_rows(backend: Backend, activation, batch_first, chunk_tokens) -> None:
    """Rows of padded batches, in any order: they drop what they drop there."""
    inputs = make_inputs((41, 16), 200, dtype=dtype_of(backend))
    rows = {"row_index": torch.randperm(132)[:41].int(), "row_period": 33}
    rows |= {"batch_first": batch_first, "chunk_tokens": chunk_tokens}
    check(backend, inputs, P, activation, **rows)


@with_and_without
@pytest.mark.parametrize("shape", [(0, 40), (0, 5, 40), (2, 0, 40)], ids=str)
def test_no_tokens(backend: Backend, shape: tuple[int, ...], dropout_p: float) -> None:
    op = backend.of(feed_forward, **options_of(dropout_p))
    results = helpers.results_of(op, make_inputs(shape, dtype=dtype_of(backend)))
    assert results["output 0"].shape == (*shape[:-1], 24)
    assert all((x == 0).all() for x in results.values())


# ------------------------------------------------------------------------------------- decisions


def assert_kept(
    backend: Backend, where: tuple[Tensor, Tensor], shape: tuple[int, ...], dtype: torch.dtype,
    activation: str, *, column_offset: int = 0, **options: Any,
) -> None:  # fmt: skip
    """Forward keeps exactly the contract's hidden features; backward drops, and makes, the same.

    As many tokens as features; all products are with the identity, so exact.
    """
    width = shape[-1]
    columns = torch.arange(width) + column_offset
    keep = reference.activation_keep(SEED, SITE, P, *where, columns)
    ones, eye = torch.ones(shape, dtype=dtype), torch.eye(width, dtype=dtype)
    zeros = torch.zeros(width, dtype=dtype)
    inputs = {"input": ones, "weight1": eye, "bias1": zeros, "weight2": eye}
    options = options_of(activation=activation, column_offset=column_offset, **options)
    op = backend.of(feed_forward, **options)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out = op(**leaves)
    # With the identity flowing in, the gradient of weight2 is the hidden features.
    grad_input, hidden = (
        torch.autograd.grad(out, leaves[name], grad.view(shape), retain_graph=True)[0]
        for name, grad in (("input", ones), ("weight2", eye))
    )
    expected = reference.factor(keep, P).to(dtype)
    for found in (out.detach(), grad_input, hidden):
        found = found.view(keep.shape)
        assert torch.equal(found != 0, keep)
        if activation in ("relu", "identity"):  # of one: one
            assert torch.equal(found, expected)


@every_level
@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decisions_of_activations(backend: Backend, dtype, activation: str, save: str) -> None:
    skip_what_it_cannot(backend, dtypes=(dtype,))
    few_activations(backend, activation, dtype)
    batch_first = save == "hidden"
    where, rows = reference.coordinates((4, 18), batch_first), {"batch_first": batch_first}
    assert_kept(backend, where, (4, 18, 72), dtype, activation, save=save, **rows)


@every_level
@relu_and_another
def test_decisions_of_widths(backend: Backend, activation: str, save: str) -> None:
    large = [(4, 50), (2, 164), (8, 125), (8, 128)] if backend.device == "cuda" else []
    for tokens in [(4, 34), *large]:
        shape, where = (*tokens, tokens[0] * tokens[1]), reference.coordinates(tokens)
        assert_kept(backend, where, shape, dtype_of(backend), activation, save=save)


@relu_and_another
@pytest.mark.parametrize("column_offset", [64, 100, 2**20])
def test_decisions_of_a_shard(backend: Backend, column_offset: int, activation: str) -> None:
    skip_what_it_cannot(backend, column_offset=column_offset)
    where, options = reference.coordinates((4, 18)), {"column_offset": column_offset}
    assert_kept(backend, where, (4, 18, 72), dtype_of(backend), activation, **options)


@every_level
@pytest.mark.parametrize("batch_first", [True, False])
def test_decisions_of_packed_rows(backend: Backend, batch_first: bool, save: str) -> None:
    index = torch.randperm(200)[:72].int().repeat_interleave(2)[::2]  # strided
    rows = {"row_index": index, "row_period": 50, "batch_first": batch_first}
    where = coordinates((72,), **rows)
    assert_kept(backend, where, (72, 72), dtype_of(backend), "gelu", save=save, **rows)


@every_activation
def test_everything_dropped_leaves_the_second_bias(backend: Backend, activation: str) -> None:
    inputs = make_inputs((3, 21, 40), dtype=dtype_of(backend))
    op = backend.of(feed_forward, **options_of(1.0, activation=activation))
    results = helpers.results_of(op, inputs)
    assert torch.equal(results["output 0"], inputs["bias2"].expand(3, 21, 24))
    for name in ("input", "weight1", "bias1", "weight2"):
        assert (results[f"gradient of {name}"] == 0).all()


@every_activation
def test_a_probability_that_rounds_to_zero_drops_nothing(backend: Backend, activation) -> None:
    inputs = make_inputs((3, 21, 40), dtype=dtype_of(backend))
    tiny, none = (
        backend.of(feed_forward, **options_of(p, activation=activation)) for p in (3e-5, 0.0)
    )
    helpers.assert_same(helpers.results_of(tiny, inputs), helpers.results_of(none, inputs))


@every_activation
@with_and_without
def test_nan_stays_in_its_row(backend: Backend, dropout_p: float, activation: str) -> None:
    inputs = make_inputs((3, 21, 40), dtype=dtype_of(backend))
    inputs["input"][1, 4, 3] = torch.nan
    op = backend.of(feed_forward, **options_of(dropout_p, activation=activation))
    results = helpers.results_of(op, inputs)
    nan = results["output 0"].isnan()
    assert nan[1, 4].all() and nan.any(-1).sum() == 1
    others = torch.ones(3, 21, dtype=torch.bool)
    others[1, 4] = False
    assert results["gradient of input"][others].isfinite().all()


# ------------------------------------------------------------------------------------------ bits


@with_and_without
@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_save_levels_give_the_same_bits(backend: Backend, dtype, activation, dropout_p) -> None:
    skip_what_it_cannot(backend, dtypes=(dtype,))
    few_activations(backend, activation, dtype)
    inputs = make_inputs((3, 7, 40), 72, dtype=dtype)
    options = options_of(dropout_p, activation=activation)
    hidden, input = (
        helpers.results_of(backend.of(feed_forward, **options, save=save), inputs)
        for save in SAVE_LEVELS
    )
    helpers.assert_same(input, hidden)


@pytest.mark.parametrize("wanted", ["input", "weight1", "bias1", "weight2", "bias2"])
@every_level
@relu_and_another
def test_one_gradient_alone(backend: Backend, activation: str, save: str, wanted: str) -> None:
    inputs = make_inputs((2, 7, 8), 72, 8, dtype_of(backend))
    op = backend.of(feed_forward, **options_of(activation=activation, save=save))
    everything = helpers.results_of(op, inputs)
    rest = {name: x for name, x in inputs.items() if name != wanted}
    alone = helpers.results_of(partial(op, **rest), {wanted: inputs[wanted]})
    name = f"gradient of {wanted}"
    assert torch.equal(alone[name], everything[name])


@every_level
@every_activation
def test_backward_twice(backend: Backend, activation: str, save: str) -> None:
    """What is kept is not overwritten."""
    inputs = make_inputs((3, 21, 40), dtype=dtype_of(backend))
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    out = backend.of(feed_forward, **options_of(activation=activation, save=save))(**inputs)
    leaves = tuple(inputs.values())
    first, second = (
        torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_level
@relu_and_another
def test_two_runs_are_equal_bit_for_bit(backend: Backend, activation: str, save: str) -> None:
    """On a GPU of more tiles than it makes at once."""
    sizes = ((8, 1000, 768), 3072, 768) if backend.device == "cuda" else ((3, 63, 40), 136, 24)
    inputs = make_inputs(*sizes, dtype_of(backend))
    op = backend.of(feed_forward, **options_of(activation=activation, save=save))
    first, second = (helpers.results_of(op, inputs) for _ in range(2))
    helpers.assert_same(first, second)


@with_and_without
@every_activation
def test_what_is_kept(backend: Backend, activation: str, dropout_p: float) -> None:
    """Besides the arguments one tensor of the hidden width, or none, in the input's dtype."""
    few_kernels(backend, activation in FEW)
    inputs = make_inputs((4, 16, 32), 72, 32, torch.float16)
    inputs = {name: x.to(backend.device).requires_grad_() for name, x in inputs.items()}
    options = options_of(dropout_p, activation=activation)
    least = helpers.nbytes(*inputs.values(), options["seed"])
    for save, more in (("hidden", 4 * 16 * 72 * 2), ("input", 0)):
        op = backend.of(feed_forward, **options, save=save)
        assert helpers.saved_bytes(lambda op=op: op(**inputs)) == least + more


# ------------------------------------------------------------- what torch does with the op


@relu_and_another
def test_gradcheck(backend: Backend, activation: str) -> None:
    skip_what_it_cannot(backend, dtypes=(torch.float64,))
    inputs = make_inputs((2, 2), 4, 2, torch.float64)
    op = backend.of(feed_forward, **options_of(0.3, activation=activation))
    names, leaves = list(inputs), [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: op(**dict(zip(names, x, strict=True))), leaves)


def test_gradients_of_every_order(backend: Backend) -> None:
    skip_what_it_cannot(backend, dtypes=(torch.float64,))
    inputs = make_inputs((2, 3, 2), 4, 2, torch.float64)
    op = backend.of(feed_forward, **options_of(activation="gelu"))
    helpers.assert_gradients_of_every_order(
        lambda *x: op(**dict(zip(inputs, x, strict=True))), *inputs.values()
    )


@every_level
@relu_and_another
def test_compiled_equals_eager(backend: Backend, activation: str, save: str) -> None:
    """Nothing in front of it, which a compiler would round its own way at the kink of relu."""
    inputs = make_inputs((3, 5, 8), 16, 8, dtype_of(backend))

    def run(**arguments: Any) -> Tensor:
        return feed_forward(**arguments)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend.compiler)
    options = options_of(activation=activation, save=save)
    actual, expected = (
        helpers.results_of(backend.of(function, **options), inputs) for function in (compiled, run)
    )
    helpers.assert_close(actual, expected)


def step_of(backend: Backend, **options: Any) -> Callable[[Tensor], helpers.Results]:
    inputs = make_inputs((3, 127, 64), 200, 64, dtype_of(backend))
    inputs = {name: x.to(backend.device) for name, x in inputs.items()}
    ones = [torch.ones(3, 127, 64, device=backend.device)]
    options = {"dropout_p": P, "backend": backend.name, **options}

    def step(seed: Tensor) -> helpers.Results:
        return helpers.results_of(partial(feed_forward, seed=seed, **options), inputs, None, ones)

    return step


@pytest.mark.on("cuda")
@every_level
@relu_and_another
def test_every_replay_of_a_graph_reads_its_seed(backend: Backend, activation, save) -> None:
    step = step_of(backend, activation=activation, save=save)
    cuda_graphs.assert_every_replay_reads_its_seed(step)


@pytest.mark.on("cuda")
@every_level
@relu_and_another
def test_a_step_does_not_wait_for_the_device(backend: Backend, activation, save) -> None:
    step = step_of(backend, activation=activation, save=save, chunk_tokens=200)
    cuda_graphs.assert_does_not_wait(step)
