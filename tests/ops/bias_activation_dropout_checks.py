"""What ``bias_activation_dropout`` does, checked on every backend that has it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from fastattn import bias_activation_dropout
from tests import helpers, reference
from tests.ops import cuda_graphs
from tests.ops.any_call import PROBABILITIES, SEEDS, SITES, TOKENS, drawn, with_edges
from tests.ops.backends import COMPOSED, FEW, Backend, few_activations, few_kernels

OPS = ("bias_activation_dropout",)

P = 0.125
SEED = 2**62 + 54321
SITE = 5
EAGER = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda input: input,
}


def seed_tensor(seed: int = SEED) -> Tensor:
    return torch.tensor([seed])


# ------------------------------------------------------------------------------------- decisions


def assert_kept(backend: Backend, keep: Tensor, dtype=torch.float32, **options: Any) -> None:
    """Forward and backward keep exactly these elements, and scale them exactly."""
    options = {"dropout_p": P, "seed": seed_tensor(), "site": SITE, **options}
    op = backend.of(bias_activation_dropout, activation="identity", **options)
    results = helpers.results_of(
        lambda input: op(input=input), {"input": torch.ones(keep.shape, dtype=dtype)}, None,
        [torch.ones(keep.shape, dtype=dtype)],
    )  # fmt: skip
    expected = reference.factor(keep, options["dropout_p"]).to(dtype)
    for found in results.values():
        assert torch.equal(found, expected)


def contract(
    position: Tensor, sequence: Tensor, columns: int, *, seed: int = SEED, site: int = SITE,
    p: float = P, offset: int = 0,
) -> Tensor:  # fmt: skip
    numbers = torch.arange(columns) + offset
    return reference.activation_keep(seed, site, p, position, sequence, numbers)


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (3, 63), (5, 64), (2, 100), (130, 66), (1, 1000), (7, 127), (2, 1088)],
    ids=str,
)
def test_decisions_of_shapes(backend: Backend, shape: tuple[int, int]) -> None:
    assert_kept(backend, contract(*reference.coordinates(shape[:1]), shape[1]))


@pytest.mark.parametrize("offset", [1, 8, 60, 64, 100, 2**20 + 24])
@pytest.mark.parametrize("columns", [1, 63, 64, 136])
def test_decisions_of_a_shard(backend: Backend, columns: int, offset: int) -> None:
    keep = contract(*reference.coordinates((3,)), columns, offset=offset)
    assert_kept(backend, keep, column_offset=offset)


@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 100, 66, 65])
def test_decisions_do_not_depend_on_the_dtype(backend: Backend, columns: int, dtype) -> None:
    """Nor on how many elements one access takes."""
    assert_kept(backend, contract(*reference.coordinates((4,)), columns), dtype)


@pytest.mark.parametrize("batch_first", [True, False])
def test_decisions_of_row_maps(backend: Backend, batch_first: bool) -> None:
    """Whole batches, and a part of their rows in any order: positions and sequences count."""
    position, sequence = reference.coordinates((3, 45), batch_first)
    whole = contract(position, sequence, 72)
    assert_kept(backend, whole.view(3, 45, 72), batch_first=batch_first)
    index = torch.randperm(135)[:50]
    packed = {"row_index": index.int(), "row_period": 45, "batch_first": batch_first}
    assert_kept(backend, whole[index], **packed)


def test_a_strided_row_index(backend: Backend) -> None:
    index = torch.arange(40).flip(0).int()
    keep = contract(*reference.coordinates((40,)), 8)[index.long()]
    assert_kept(backend, keep, row_index=index.repeat_interleave(3)[::3], row_period=40)


@with_edges(tokens=(4, 2), columns=192, offset=0)
@drawn(
    seed=SEEDS, site=SITES, p=PROBABILITIES, tokens=TOKENS,
    columns=st.integers(1, 200), offset=st.integers(0, 2**20),
)  # fmt: skip
def test_decisions_of_any_call(
    backend: Backend, seed: int, site: int, p: float, tokens: tuple[int, int], columns: int,
    offset: int,
) -> None:  # fmt: skip
    columns = 192 if backend.compiles else columns  # which kernels are compiled for
    keep = contract(
        *reference.coordinates(tokens), columns, seed=seed, site=site, p=p, offset=offset
    )
    options = {"seed": seed_tensor(seed), "site": site, "dropout_p": p, "column_offset": offset}
    assert_kept(backend, keep.view(*tokens, columns), torch.float64, **options)


def test_the_threshold_is_exact(backend: Backend) -> None:
    """With this seed there are lanes on both sides of the smallest step of a probability."""

    def keep(n: int) -> Tensor:
        rows = reference.coordinates((4, 2))
        return contract(*rows, 192, seed=206, site=8, p=n / 2**14).view(4, 2, 192)

    assert not any(torch.equal(keep(n), keep(2**13)) for n in (2**13 - 1, 2**13 + 1))
    assert_kept(backend, keep(2**13), torch.float64, seed=seed_tensor(206), site=8, dropout_p=0.5)


def test_a_probability_that_rounds_to_zero_drops_nothing(backend: Backend) -> None:
    inputs = {"input": torch.randn(3, 5, 40), "bias": torch.randn(40)}
    tiny = backend.of(bias_activation_dropout, dropout_p=1e-5, seed=seed_tensor())
    none = backend.of(bias_activation_dropout)
    helpers.assert_same(helpers.results_of(tiny, inputs), helpers.results_of(none, inputs))


# ---------------------------------------------------------------------------------------- values


def eager(
    input: Tensor, bias: Tensor | None, *, activation: str, keep: Tensor | None, dropout_p: float
) -> Tensor:
    hidden = EAGER[activation](input if bias is None else input + bias)
    return hidden if keep is None else hidden * keep.view(hidden.shape) * (1 / (1 - dropout_p))


def oracle(
    input: Tensor, bias: Tensor | None, *, activation: str, multiplier: Tensor | None
) -> Tensor:
    hidden = reference.ACTIVATIONS[activation](input if bias is None else input + bias)
    return hidden if multiplier is None else hidden * multiplier.view(hidden.shape)


def check(
    backend: Backend,
    input: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    activation: str = "gelu",
    layouts: dict[str, Any] | None = None,
) -> None:
    """As accurate as eager PyTorch on the same device."""
    shape = (input if layouts is None else layouts["input"](input)).shape
    keep = multiplier = None
    if dropout_p:
        keep = contract(*reference.coordinates(shape[:-1] or (1,)), shape[-1], p=dropout_p)
        multiplier = reference.factor(keep, dropout_p)
    options = {"activation": activation, "dropout_p": dropout_p}
    ours = backend.of(bias_activation_dropout, layouts, seed=seed_tensor(), site=SITE, **options)
    theirs = backend.there(eager, layouts, keep=keep, **options)
    on_cpu = Backend("none").there(oracle, layouts, activation=activation, multiplier=multiplier)
    helpers.assert_as_accurate_as_eager(ours, theirs, on_cpu, {"input": input, "bias": bias})


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
def test_accuracy_of_dtypes(backend: Backend, dtype, activation: str, dropout_p: float) -> None:
    few_activations(backend, activation, dtype)
    input, bias = 3 * torch.randn(3, 20, 72), torch.randn(72)
    check(backend, input.to(dtype), bias.to(dtype), dropout_p, activation)
    if not backend.compiles or (activation, dtype) == ("gelu", torch.float32):
        check(backend, input.to(dtype), None, dropout_p, activation)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "rows apart": lambda x: F.pad(x, (0, 24))[..., :40],
    "every other row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "unaligned": lambda x: F.pad(x, (1, 0))[..., 1:],
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_layouts(backend: Backend, layout: str, dropout_p: float) -> None:
    layouts = {"input": LAYOUTS[layout], "bias": lambda x: x.repeat_interleave(2)[::2]}
    check(backend, torch.randn(3, 5, 40), torch.randn(40), dropout_p, layouts=layouts)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize(
    "shape", [(7,), (1, 1), (3, 63, 127), (1, 1000), (0, 8), (2, 0, 8), (3, 0)], ids=str
)
def test_accuracy_of_shapes(backend: Backend, shape: tuple[int, ...], dropout_p: float) -> None:
    check(backend, torch.randn(shape), torch.randn(shape[-1]), dropout_p, "relu")


@pytest.mark.on("cuda")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("columns", [3072, 3001])
def test_accuracy_of_sizes_of_models(backend: Backend, columns: int, activation: str) -> None:
    """More rows than programs run at once."""
    input, bias = torch.randn(8, 1000, columns).bfloat16(), torch.randn(columns).bfloat16()
    check(backend, input, bias, P, activation)


@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_in_the_tails(backend: Backend, dtype: torch.dtype, activation: str) -> None:
    """Values and slopes on a fine grid, not only where inputs are likely."""
    input, bias = torch.linspace(-12, 12, 64 * 72).view(64, 72), torch.zeros(72)
    check(backend, input.to(dtype), bias.to(dtype), 0.0, activation)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float64),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_promotion(backend: Backend, dtypes: tuple[torch.dtype, ...], dropout_p: float) -> None:
    few_kernels(backend, dropout_p == P)
    input, bias = torch.randn(3, 5, 40).to(dtypes[0]), torch.randn(40).to(dtypes[1])
    check(backend, input, bias, dropout_p)


def test_the_scale_is_exact_in_half_precision(backend: Backend) -> None:
    """1 / 0.9 is no bf16 number: the product is rounded, not the factor."""
    mantissas = 1 + torch.arange(128) / 128  # every bf16 number in [1, 2)
    op = backend.of(bias_activation_dropout, dropout_p=0.1, seed=seed_tensor())
    out = op(input=mantissas.bfloat16().expand(50, 128))
    exact = (mantissas.double() * 16384 / (16384 - 1638)).bfloat16()
    kept = out != 0
    assert torch.equal(out[kept], exact.expand(50, 128)[kept])
    rounded = mantissas.bfloat16() * torch.tensor(16384 / (16384 - 1638)).bfloat16()
    assert not torch.equal(rounded, exact)


@pytest.mark.parametrize("split", [1, 63, 64, 100])
def test_a_sharded_hidden_dimension_drops_the_same(backend: Backend, split: int) -> None:
    x = torch.randn(3, 5, 150)
    op = partial(bias_activation_dropout, activation="gelu", dropout_p=P)
    whole = backend.of(op, seed=seed_tensor())(input=x)
    left = backend.of(op, seed=seed_tensor())(input=x[..., :split])
    right = backend.of(op, seed=seed_tensor(), column_offset=split)(input=x[..., split:])
    sharded = torch.cat((left, right), -1)
    assert torch.equal(sharded == 0, whole == 0)
    torch.testing.assert_close(sharded, whole)


def test_gradients_of_a_sum(backend: Backend) -> None:
    """The gradient flowing in is one number, expanded."""
    x = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    op = backend.of(
        lambda input, **options: bias_activation_dropout(input, **options).sum(),
        activation="identity", dropout_p=P, seed=seed_tensor(), site=SITE,
    )  # fmt: skip
    (found,) = torch.autograd.grad(op(input=x), x)
    assert torch.equal(found, reference.factor(contract(*reference.coordinates((5,)), 40), P))


@pytest.mark.parametrize("rows", [1, 8, 127, 1000])
def test_sums_over_rows_are_the_same_in_every_run(backend: Backend, rows: int) -> None:
    inputs = {"input": torch.randn(rows, 72), "bias": torch.randn(72)}
    op = backend.of(bias_activation_dropout, activation="gelu", dropout_p=P, seed=seed_tensor())
    first, second = (helpers.results_of(op, inputs) for _ in range(2))
    helpers.assert_same(first, second)


SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 60.0, -60.0]


@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@np.errstate(invalid="ignore", over="ignore")
def test_nan_and_infinity_pass_as_in_eager(backend: Backend, activation: str, dtype) -> None:
    """PyTorch's own activation in this dtype is ours; a kernel is what it is in float64.

    They differ: PyTorch's gelu of infinity is NaN on a CPU, in fp32 and narrower types.
    """
    few_kernels(backend, dtype == torch.float32)
    inputs, ones = {"input": torch.tensor(SPECIAL, dtype=dtype)}, [torch.ones(7)]
    op = backend.of(bias_activation_dropout, activation=activation)
    found = helpers.results_of(op, inputs, None, ones)
    if COMPOSED in backend.quirks:
        eager, exactly = backend.there(EAGER[activation]), {"rtol": 0, "atol": 0}
        expected = helpers.results_of(eager, inputs, None, ones)
    else:
        exactly = {}
        expected = helpers.results_of(EAGER[activation], inputs, torch.float64, ones)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x.to(dtype), equal_nan=True, **exactly)


def test_what_drops_is_zero_whatever_it_was(backend: Backend) -> None:
    """Kernels write the zero; PyTorch multiplies by it, as docs/dropout.md says."""
    x = torch.full((4, 64), torch.nan)
    options = {"activation": "identity", "dropout_p": P, "seed": seed_tensor(), "site": SITE}
    keep = contract(*reference.coordinates((4,)), 64)
    results = helpers.results_of(
        backend.of(bias_activation_dropout, **options), {"input": x}, None,
        [torch.full_like(x, torch.inf)],
    )  # fmt: skip
    dropped = torch.nan if COMPOSED in backend.quirks else 0.0
    for name, kept in (("output 0", torch.nan), ("gradient of input", torch.inf)):
        expected = torch.where(keep, kept, dropped)
        torch.testing.assert_close(results[name], expected, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------- what torch does with the op


@pytest.mark.parametrize("activation", EAGER)
def test_gradcheck(backend: Backend, activation: str) -> None:
    few_kernels(backend, activation in FEW)
    x, bias = torch.randn(2, 2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    op = backend.of(
        bias_activation_dropout, activation=activation, dropout_p=0.3, seed=seed_tensor()
    )

    def ours(input: Tensor, bias: Tensor) -> Tensor:
        return op(input=input, bias=bias)

    assert torch.autograd.gradcheck(ours, (x.requires_grad_(), bias.requires_grad_()))


def test_gradients_of_every_order(backend: Backend) -> None:
    x, bias = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    op = backend.of(bias_activation_dropout, activation="gelu", dropout_p=0.3, seed=seed_tensor())
    helpers.assert_gradients_of_every_order(lambda x, bias: op(input=x, bias=bias), x, bias)


def test_compiled_equals_eager(backend: Backend) -> None:
    inputs = {"input": torch.randn(3, 5, 40), "bias": torch.randn(40)}

    def run(input: Tensor, bias: Tensor, **options: Any) -> Tensor:
        return bias_activation_dropout(input.sin(), bias, **options)

    options = {"activation": "gelu", "dropout_p": P, "seed": seed_tensor()}
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend.compiler)
    actual, expected = (
        helpers.results_of(backend.of(function, **options), inputs) for function in (compiled, run)
    )
    helpers.assert_close(actual, expected)
    for name, x in expected.items():
        assert torch.equal(actual[name] == 0, x == 0), name


def step_of(backend: Backend) -> Callable[[Tensor], helpers.Results]:
    inputs = {"input": torch.randn(64, 512), "bias": torch.randn(512)}
    inputs = {name: x.to(backend.device) for name, x in inputs.items()}
    ones = [torch.ones(64, 512, device=backend.device)]
    options = {"activation": "gelu", "dropout_p": P, "backend": backend.name}

    def step(seed: Tensor) -> helpers.Results:
        op = partial(bias_activation_dropout, seed=seed, **options)
        return helpers.results_of(op, inputs, None, ones)

    return step


@pytest.mark.on("cuda")
def test_every_replay_of_a_graph_reads_its_seed(backend: Backend) -> None:
    cuda_graphs.assert_every_replay_reads_its_seed(step_of(backend))


@pytest.mark.on("cuda")
def test_a_step_does_not_wait_for_the_device(backend: Backend) -> None:
    cuda_graphs.assert_does_not_wait(step_of(backend))
