"""On a CUDA GPU both Triton backends of ``feed_forward`` are what the contract and eager say.

Every activation, with and without dropout, and each dtype makes kernels of its own, which take
seconds to compile; tests share them where they can.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import FusedEncoderLayer, dispatch, explain, feed_forward, tuned, tuning
from tests import helpers, reference
from tests.kernels.gpu.test_layer_norm import there
from tests.ops import feed_forward_checks as checks
from tests.ops.feed_forward_checks import EAGER, SEED, SITE, P, eager_feed_forward, seed_tensor

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
BACKENDS = ("triton", "triton_gemm")
SAVE_LEVELS = ("hidden", "input")
KINDS = [("triton", bf16), ("triton", fp32), ("triton_gemm", bf16), ("triton_gemm", fp16)]
SIZES = [(64, 200), (768, 3072)]  # model and hidden width
TOKENS = (1, 127, 1000)
SMALL, LARGE = (3, 127), (8, 125)  # sequences and their length

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_kind = pytest.mark.parametrize(("backend", "dtype"), KINDS)
every_activation = pytest.mark.parametrize("activation", EAGER)
every_level = pytest.mark.parametrize("save", SAVE_LEVELS)
with_and_without = pytest.mark.parametrize("dropout_p", [0.0, P])


@pytest.fixture(autouse=True)
def _can_run(request: pytest.FixtureRequest) -> None:
    backend = request.node.callspec.params["backend"] if hasattr(request.node, "callspec") else None
    for name in BACKENDS if backend is None else (backend,):
        reason = dispatch.why_not("feed_forward", name, DEVICE)
        if reason is not None:
            pytest.skip(f"{name}: {reason}")


def make_inputs(
    tokens: tuple[int, ...] = SMALL, d: int = 64, d_ff: int = 200, dtype: torch.dtype = bf16
) -> dict[str, Tensor]:
    return checks.make_inputs((*tokens, d), d_ff, d, dtype)


def on_device(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def options_of(dropout_p: float = P, **options: Any) -> dict[str, Any]:
    return {"dropout_p": dropout_p, "seed": seed_tensor(), "site": SITE, **options}


def step(inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Output and gradients, all on the GPU."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = feed_forward(**leaves, **options)
    grad = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tuple(leaves.values()), grad)]


# -------------------------------------------------------------------------------------- accuracy


def keep_off_the_kink(inputs: dict[str, Tensor]) -> None:
    """Move biases until no hidden feature is so near zero that the order of a sum decides relu."""
    x, weight, bias = (inputs[name] for name in ("input", "weight1", "bias1"))
    product = F.linear(x.double(), weight.double()).flatten(0, -2)
    while (near := ((product + bias.double()).abs() < 1e-4).any(0)).any():
        bias[near] += 0.125


def check(
    inputs: dict[str, Tensor | None],
    dropout_p: float = 0.0,
    activation: str = "relu",
    laid_out: Callable[[Tensor], Tensor] = lambda x: x,
    name: str = "input",
    **options: Any,
) -> None:
    """As accurate as eager PyTorch on the same GPU; ``name`` may be laid out in another way."""
    if activation == "relu" and inputs["bias1"] is not None:
        keep_off_the_kink(inputs)
    keep = multiplier = None
    if dropout_p:
        keep = checks.keep_of(inputs["input"].shape, inputs["weight1"].shape[0], dropout_p)
        multiplier = reference.factor(keep, dropout_p)

    def ours(**given: Tensor | None) -> Tensor:
        given[name] = laid_out(given[name])
        return feed_forward(**given, activation=activation, **options)

    def eager(**given: Tensor | None) -> Tensor:
        decisions = None if keep is None else keep.to(DEVICE)
        return eager_feed_forward(
            **given, activation=activation, keep=decisions, dropout_p=dropout_p
        )

    helpers.assert_as_accurate_as_eager(
        there(partial(ours, **options_of(dropout_p))),
        there(eager),
        partial(reference.feed_forward, activation=activation, multiplier=multiplier),
        inputs,
    )


# fp16 takes the same kernels as bf16 but for their type: not every activation is tested.
@every_level
@with_and_without
@every_activation
@pytest.mark.parametrize(("backend", "dtype"), KINDS[:3])
def test_accuracy_of_activations(backend, dtype, activation, dropout_p, save) -> None:
    check(make_inputs(dtype=dtype), dropout_p, activation, save=save, backend=backend)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("widths", SIZES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@every_kind
def test_accuracy_of_sizes(backend, dtype, tokens, widths, activation) -> None:
    """One tile and several, whole ones and tails."""
    check(make_inputs((tokens,), *widths, dtype), P, activation, backend=backend)


@every_level
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@every_backend
def test_accuracy_of_chunks(backend, activation, save) -> None:
    options = {"save": save, "chunk_tokens": 300, "backend": backend}
    check(make_inputs(LARGE), P, activation, **options)


@with_and_without
@pytest.mark.parametrize("activation", ["gelu", "identity"])
@every_backend
def test_without_biases(backend, activation, dropout_p) -> None:
    inputs = {**make_inputs(), "bias1": None, "bias2": None}
    check(inputs, dropout_p, activation, backend=backend)


LAYOUTS = {
    "strided rows": lambda x: F.pad(x, (0, 24))[..., : x.shape[-1]],
    "transposed": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    "begins between two addresses of 16 bytes": lambda x: F.pad(x, (1, 7))[..., 1:-7],
    "rows begin anywhere": lambda x: F.pad(x, (1, 0))[..., 1:],
    "one row for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("name", ["input", "weight1", "weight2"])
@pytest.mark.parametrize("layout", LAYOUTS)
@every_backend
def test_accuracy_of_layouts(backend, layout, name, activation) -> None:
    check(make_inputs(), P, activation, LAYOUTS[layout], name, backend=backend)


def test_the_layouts_are_copied_and_taken_as_they_are() -> None:
    from fastattn.kernels import feed_forward_gemm as gemm

    x = torch.randn(127, 64, device=DEVICE, dtype=bf16)
    laid_out = [layout(x) for layout in LAYOUTS.values()]
    taken = [gemm._aligned(each) is each for each in laid_out]
    assert taken == [True, True, False, False, False]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@every_backend
def test_columns_of_the_input_may_lie_apart(backend: str, activation: str) -> None:
    check(make_inputs(), P, activation, checks.LAYOUTS["every other column"], backend=backend)


# ------------------------------------------------------------------------------------- decisions


def identity_block(width: int, dtype: torch.dtype, **options: Any) -> Callable[..., Any]:
    """A block that only drops: all of its products are with the identity, so exact.

    Gives its output and its second weight.
    """
    weight1, weight2 = (torch.eye(width, dtype=dtype, device=DEVICE) for _ in range(2))
    weights = (weight1, torch.zeros_like(weight1[0]), weight2.requires_grad_())
    seed = seed_tensor().to(DEVICE)
    block = partial(feed_forward, dropout_p=0.1, seed=seed, site=SITE, **options)
    return lambda x: (block(x, *weights), weight2)


@every_level
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize(("width", "tokens"), [(200, (4, 50)), (1000, (8, 125)), (1024, (8, 128))])
@every_kind
def test_exactly_what_the_contract_keeps_is_kept(
    backend, dtype, width, tokens, activation, save
) -> None:
    """Forward; what backward drops; and what it activates and drops again."""
    for batch_first in (True, False):
        keep = checks.keep_of((*tokens, width), width, 0.1, batch_first)
        expected = reference.factor(keep, 0.1).to(dtype)
        options = {"activation": activation, "save": save, "batch_first": batch_first}
        block = identity_block(width, dtype, backend=backend, **options)
        ones = torch.ones(*tokens, width, dtype=dtype, device=DEVICE, requires_grad=True)
        out, weight2 = block(ones)
        (through_input,) = torch.autograd.grad(out, ones, torch.ones_like(out), retain_graph=True)
        eye = torch.eye(width, dtype=dtype, device=DEVICE).view_as(out)  # as many tokens as columns
        (through_weight2,) = torch.autograd.grad(out, weight2, eye)
        for found in (out, through_input, through_weight2):
            assert torch.equal(found.detach().flatten(0, -2).cpu(), expected)


@every_kind
def test_shards_drop_what_the_whole_drops(backend: str, dtype: torch.dtype) -> None:
    keep = checks.keep_of((*SMALL, 264), 264, 0.1, offset=64)
    expected = reference.factor(keep, 0.1).to(dtype)
    block = identity_block(264, dtype, activation="relu", column_offset=64, backend=backend)
    out, _ = block(torch.ones(*SMALL, 264, dtype=dtype, device=DEVICE))
    assert torch.equal(out.detach().flatten(0, -2).cpu(), expected)


@every_kind
def test_packed_rows_keep_what_padded_rows_keep(backend: str, dtype: torch.dtype) -> None:
    index = torch.randperm(200)[:123]
    keep = checks.keep_of((4, 50, 136), 136, 0.1)[index]
    rows = {"row_index": index.int().to(DEVICE), "row_period": 50}
    block = identity_block(136, dtype, activation="relu", backend=backend, **rows)
    out, _ = block(torch.ones(123, 136, dtype=dtype, device=DEVICE))
    assert torch.equal(out.cpu() != 0, keep)


@every_activation
@every_kind
def test_the_same_elements_drop_as_on_the_cpu(backend, dtype, activation) -> None:
    """Of every activation, where none is zero."""
    inputs = make_inputs(d=200, dtype=dtype)
    inputs |= {"input": inputs["input"].abs(), "weight1": inputs["weight1"].abs()}
    inputs |= {"bias1": inputs["bias1"].abs() + 1, "bias2": torch.zeros(200, dtype=dtype)}
    inputs["weight2"] = torch.eye(200, dtype=dtype)
    options = options_of(0.1, activation=activation)
    found = there(partial(feed_forward, **options, backend=backend))(**inputs)
    expected = feed_forward(**inputs, **options, backend="pytorch")
    assert torch.equal(found == 0, expected == 0)
    rtol = 4 * torch.finfo(dtype).eps + 1e-5  # hidden features are rounded once more or less
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)


def test_gradients_are_those_of_the_cpu() -> None:
    inputs = make_inputs(dtype=fp32)
    for activation in EAGER:
        keep_off_the_kink(inputs)
        ours = partial(feed_forward, **options_of(activation=activation))
        found = helpers.results_of(there(partial(ours, backend="triton")), inputs)
        expected = helpers.results_of(partial(ours, backend="pytorch"), inputs)
        helpers.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------- bits and rows


@with_and_without
@every_activation
@pytest.mark.parametrize(("backend", "dtype"), KINDS[:3])
def test_save_levels_give_the_same_bits(backend, dtype, activation, dropout_p) -> None:
    inputs = make_inputs(dtype=dtype)
    options = options_of(dropout_p, backend=backend, activation=activation)
    hidden, input = (
        helpers.results_of(there(partial(feed_forward, **options, save=save)), inputs)
        for save in SAVE_LEVELS
    )
    assert list(input) == list(hidden)
    for name, x in hidden.items():
        assert torch.equal(input[name], x), name


@every_level
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@every_kind
def test_two_runs_are_equal_bit_for_bit(backend, dtype, activation, save) -> None:
    """Also with more tiles than the GPU runs at once."""
    inputs = make_inputs((8, 1000), *SIZES[-1], dtype)
    inputs, seed = on_device(inputs), seed_tensor().to(DEVICE)
    options = {"dropout_p": P, "activation": activation, "save": save, "backend": backend}
    first, second = (step(inputs, seed=seed, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_activation
@every_backend
def test_nan_stays_in_its_row(backend: str, activation: str) -> None:
    inputs = make_inputs()
    inputs["input"][1, 4, 3] = torch.nan
    options = options_of(backend=backend, activation=activation)
    results = helpers.results_of(there(partial(feed_forward, **options)), inputs)
    nan = results["output 0"].isnan()
    assert nan[1, 4].all() and nan.any(-1).sum() == 1
    others = torch.arange(SMALL[1]) != 4
    assert results["gradient of input"][:, others].isfinite().all()


# ---------------------------------------------------------------- compilation, graphs, allocators


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@every_backend
def test_compiled_equals_eager(backend: str, activation: str) -> None:
    def run(**inputs: Tensor) -> Tensor:
        return feed_forward(**inputs, dropout_p=P, activation=activation, backend=backend)

    inputs = make_inputs()
    torch._dynamo.reset()
    found, expected = (
        helpers.results_of(there(partial(function, seed=seed_tensor())), inputs)
        for function in (torch.compile(run, fullgraph=True), run)
    )
    assert torch.equal(found["output 0"], expected["output 0"])
    helpers.assert_close(found, expected)


@every_level
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@every_backend
def test_a_captured_step_reads_the_seed_of_each_replay(backend, activation, save) -> None:
    inputs, seed = on_device(make_inputs()), seed_tensor().to(DEVICE)
    options = {"dropout_p": P, "activation": activation, "save": save, "backend": backend}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(inputs, seed=seed, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, seed=seed, **options)
    for number in (3, SEED, 2**63 - 1):
        seed.fill_(number)
        graph.replay()
        expected = step(inputs, seed=torch.tensor([number]).to(DEVICE), **options)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@every_level
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@every_backend
def test_a_step_does_not_wait_for_the_device(backend, activation, save) -> None:
    inputs, seed = on_device(make_inputs()), seed_tensor().to(DEVICE)
    options = {"dropout_p": P, "activation": activation, "save": save, "backend": backend}
    options |= {"seed": seed, "chunk_tokens": 200}
    step(inputs, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(inputs, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_backend
def test_the_allocator_of_the_caller_stays(backend: str) -> None:
    import triton
    from triton.runtime import _allocation

    def of_the_caller(size: int, alignment: int, stream: int | None) -> Tensor:
        raise AssertionError("a launch of the library asked the caller's allocator")

    inputs, seed = on_device(make_inputs()), seed_tensor().to(DEVICE)

    def run() -> None:
        triton.set_allocator(of_the_caller)
        step(inputs, dropout_p=P, seed=seed, activation="gelu", backend=backend)
        assert _allocation._allocator.get() is of_the_caller

    before = _allocation._allocator.get()
    contextvars.copy_context().run(run)
    assert _allocation._allocator.get() is before


# --------------------------------------------------------------------------------- which is chosen


def test_a_layer_takes_what_was_measured_as_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "_table", {})
    layer = FusedEncoderLayer(64, 4, 256, batch_first=True, device=DEVICE, dtype=bf16)
    x = torch.randn(2, 8, 64, device=DEVICE, dtype=bf16)
    text = str(explain(layer, x))
    assert "feed_forward: triton\n" in text and "not triton_gemm: no measurement" in text
    (entry,) = tuning.tune(64, 256, (16,), device=DEVICE)
    assert entry.architecture == "sm_{}{}".format(*torch.cuda.get_device_capability(DEVICE))
    assert len(entry.rounds) == tuning.ROUNDS and min(entry.rounds) > 0
    for speedup, taken in ((2.0, "triton_gemm"), (0.5, "triton")):
        tuned.take([replace(entry, speedup=speedup)])
        assert f"feed_forward: {taken}" in str(explain(layer, x)).split("\n")
