"""The Triton backends of ``feed_forward``: accuracy, decisions, gradients, what is kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn import FusedEncoderLayer, explain, feed_forward, tuned, use_backend
from fastattn.arguments import TokenDropout
from fastattn.kernels import feed_forward_gemm as gemm
from tests import helpers
from tests.kernels.interpreted.sanitizer import Sanitizer
from tests.ops import feed_forward_checks as checks
from tests.ops.feed_forward_checks import EAGER, LAYOUTS, P, check, seed_tensor

BACKENDS = ("triton", "triton_gemm")
SAVE_LEVELS = ("hidden", "input")

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_activation = pytest.mark.parametrize("activation", EAGER)
every_level = pytest.mark.parametrize("save", SAVE_LEVELS)
with_and_without = pytest.mark.parametrize("dropout_p", [0.0, P])


def make_inputs(
    shape: tuple[int, ...] = (3, 63, 40),
    d_ff: int = 136,
    d_out: int = 24,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Widths that both backends take, and no tile divides."""
    return checks.make_inputs(shape, d_ff, d_out, dtype)


def options_of(dropout_p: float = P, **options: Any) -> dict[str, Any]:
    return {"dropout_p": dropout_p, "seed": seed_tensor(), "site": checks.SITE, **options}


# -------------------------------------------------------------------------------------- accuracy


@every_level
@with_and_without
@every_activation
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=str)
@every_backend
def test_accuracy_of_dtypes(backend, dtype, activation, dropout_p, save) -> None:
    inputs = make_inputs((3, 7, 40), dtype=dtype)
    check(inputs, dropout_p, activation, save=save, backend=backend)


SHAPES = [(40,), (1, 40), (63, 40), (1, 1, 40), (2, 127, 8), (1, 200, 8)]


@with_and_without
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_backend
def test_accuracy_of_shapes(backend, shape, activation, dropout_p) -> None:
    check(make_inputs(shape), dropout_p, activation, backend=backend)


@pytest.mark.parametrize("d_ff", [8, 64, 200, 520])
@every_backend
def test_accuracy_of_widths(backend: str, d_ff: int) -> None:
    check(make_inputs((2, 5, 16), d_ff, d_out=4), P, "gelu", backend=backend)


@with_and_without
@pytest.mark.parametrize("widths", [(7, 63, 1), (1, 1, 1), (16, 127, 3)], ids=str)
def test_accuracy_of_odd_widths(widths: tuple[int, int, int], dropout_p: float) -> None:
    d, d_ff, d_out = widths
    check(make_inputs((2, 5, d), d_ff, d_out), dropout_p, "gelu", backend="triton")


@with_and_without
@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
@every_backend
def test_without_biases(backend, activation, dropout_p) -> None:
    inputs = {**make_inputs(), "bias1": None, "bias2": None}
    check(inputs, dropout_p, activation, backend=backend)


@every_level
@pytest.mark.parametrize("layout", LAYOUTS)
@every_backend
def test_accuracy_of_layouts(backend: str, layout: str, save: str) -> None:
    inputs = make_inputs((3, 21, 40))
    inputs["input"] = LAYOUTS[layout](inputs["input"])
    inputs["weight1"] = inputs["weight1"].repeat_interleave(2, 0)[::2]
    inputs["weight2"] = torch.nn.functional.pad(inputs["weight2"], (1, 6))[:, 1:-6]
    inputs["bias1"] = inputs["bias1"].repeat_interleave(2)[::2]
    if backend == "triton":
        inputs["weight1"] = inputs["weight1"].t().contiguous().t()
    check(inputs, P, "gelu", save=save, backend=backend)
    check(inputs, P, "relu", batch_first=False, save=save, backend=backend)


@pytest.mark.parametrize("chunk_tokens", [1, 8])
@every_level
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@every_backend
def test_accuracy_of_chunks(backend, activation, save, chunk_tokens) -> None:
    inputs = make_inputs((3, 7, 16), 72)
    options = {"save": save, "chunk_tokens": chunk_tokens, "backend": backend}
    check(inputs, P, activation, batch_first=False, **options)


@with_and_without
@pytest.mark.parametrize("shape", [(0, 40), (0, 5, 40), (2, 0, 40)], ids=str)
@every_backend
def test_no_tokens(backend: str, shape: tuple[int, ...], dropout_p: float) -> None:
    ours = partial(feed_forward, backend=backend, **options_of(dropout_p))
    results = helpers.results_of(ours, make_inputs(shape))
    assert results["output 0"].shape == (*shape[:-1], 24)
    assert all((x == 0).all() for x in results.values())


# ------------------------------------------------------------------------------------- gradients


@every_activation
@every_backend
def test_gradcheck(backend: str, activation: str) -> None:
    inputs = make_inputs((2, 2), 4, 2, torch.float64)
    ours = partial(feed_forward, backend=backend, activation=activation, **options_of(0.3))
    weights = tuple(x.requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(ours, weights)


@every_backend
def test_gradients_of_every_order(backend: str) -> None:
    inputs = make_inputs((2, 3, 2), 4, 2, torch.float64)
    ours = partial(feed_forward, backend=backend, activation="gelu", **options_of())
    helpers.assert_gradients_of_every_order(ours, *inputs.values())


@with_and_without
@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_backend
def test_levels_give_the_same_bits(backend, dtype, activation, dropout_p) -> None:
    inputs = make_inputs((3, 7, 40), dtype=dtype)
    ours = partial(feed_forward, backend=backend, activation=activation, **options_of(dropout_p))
    hidden, input = (helpers.results_of(partial(ours, save=save), inputs) for save in SAVE_LEVELS)
    assert all(torch.equal(input[name], hidden[name]) for name in hidden)


@pytest.mark.parametrize("wanted", ["input", "weight1", "bias1", "weight2", "bias2"])
@every_level
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@every_backend
def test_one_gradient_alone(backend, activation, save, wanted) -> None:
    inputs = make_inputs((2, 7, 8), 72, 4)
    ours = partial(feed_forward, backend=backend, activation=activation, save=save, **options_of())
    everything = helpers.results_of(ours, inputs)
    rest = {name: x for name, x in inputs.items() if name != wanted}
    alone = helpers.results_of(partial(ours, **rest), {wanted: inputs[wanted]})
    name = f"gradient of {wanted}"
    assert torch.equal(alone[name], everything[name])


@every_level
@every_activation
@every_backend
def test_backward_twice(backend: str, activation: str, save: str) -> None:
    """What is kept is not overwritten."""
    inputs = [x.requires_grad_() for x in make_inputs((3, 21, 40)).values()]
    out = feed_forward(*inputs, backend=backend, activation=activation, save=save, **options_of())
    first, second = (
        torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize(
    "rows",
    [
        {},
        {"batch_first": False},
        {"row_index": torch.randperm(500)[:189].int(), "row_period": 50},
        {"column_offset": 64},
        {"column_offset": 100},
    ],
    ids=lambda rows: ", ".join(rows) or "default",
)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_same_elements_drop_as_on_pytorch(rows: dict, activation: str) -> None:
    inputs = make_inputs()
    options = options_of(0.4, activation=activation, **rows)
    if rows.get("column_offset", 0) == 0:
        backends = ("pytorch", *BACKENDS)
    else:
        backends = ("pytorch", "triton")
    expected, *found = (
        helpers.results_of(partial(feed_forward, **options, backend=name), inputs)
        for name in backends
    )
    for results in found:
        helpers.assert_close(results, expected, atol=1e-4, rtol=1e-4)


@every_activation
@every_backend
def test_everything_dropped_leaves_the_second_bias(backend: str, activation: str) -> None:
    inputs = make_inputs()
    ours = partial(feed_forward, backend=backend, activation=activation, **options_of(1.0))
    results = helpers.results_of(ours, inputs)
    assert torch.equal(results["output 0"], inputs["bias2"].expand(3, 63, 24))
    for name in ("input", "weight1", "bias1", "weight2"):
        assert (results[f"gradient of {name}"] == 0).all()


@every_activation
@every_backend
def test_nan_stays_in_its_row(backend: str, activation: str) -> None:
    inputs = make_inputs()
    inputs["input"][1, 4, 3] = float("nan")
    out = feed_forward(**inputs, backend=backend, activation=activation, **options_of())
    assert out[1, 4].isnan().all()
    assert out.isnan().any(-1).sum() == 1


# --------------------------------------------------------------------- products of other machines


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)], ids=str)
def test_the_tiles_of_every_architecture(capability, activation, monkeypatch) -> None:
    """Several tiles down and across; forward keeps what backward starts from."""
    monkeypatch.setattr(gemm, "capability", lambda device: capability)
    inputs = make_inputs((300, 40), 328)
    check(inputs, P, activation, backend="triton_gemm")


@triton.jit
def mark_kernel(Sums, Kept, Marked, Found, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    sums = gemm.marked(tl.load(Sums + place), tl.load(Kept + place) != 0)
    tl.store(Marked + place, sums)
    tl.store(Found + place, gemm.is_kept(sums).to(tl.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_kept_zero_of_either_sign_is_not_taken_for_a_dropped_one(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    values = [0.0, -0.0, 1.5, -1.5, tiny, -tiny, tiny / 4, float("inf"), -float("inf")]
    values += [float("nan"), -float("nan"), torch.finfo(dtype).max, torch.finfo(dtype).min]
    sums = torch.tensor([*values, -2.0, 3.0, 0.5], dtype=dtype).repeat(2)
    kept = (torch.arange(32) < 16).to(torch.int8)
    marked, found = torch.empty_like(sums), torch.empty_like(kept)
    mark_kernel[(1,)](sums, kept, marked, found, BLOCK=32)
    assert torch.equal(found, kept)
    torch.testing.assert_close(marked[:16], sums[:16], rtol=0, atol=0, equal_nan=True)
    assert (marked[16:] == 0).all()


def test_programs_go_from_tile_to_tile(monkeypatch) -> None:
    monkeypatch.setattr(gemm, "multiprocessors", lambda device: 1)
    check(make_inputs((300, 40), 328), P, "gelu", backend="triton_gemm")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight1": torch.randn(36, 40), "weight2": torch.randn(24, 36)}, None),
        (
            {"weight1": torch.randn(33, 40), "weight2": torch.randn(24, 33)},
            "d_ff.*multiples of 16 bytes",
        ),
        ({"weight1": torch.randn(40, 136).t()}, "adjacent columns"),
        ({"column_offset": 32}, "column_offset must be a multiple of 64"),
    ],
    ids=["none", "d_ff", "columns", "column_offset"],
)
def test_why_it_cannot(changes: dict[str, Any], reason: str | None) -> None:
    arguments = {**make_inputs(), **changes}
    if reason is None:
        feed_forward(**{**arguments, "bias1": None}, backend="triton_gemm")
        return
    arguments["bias1"] = None
    with pytest.raises(RuntimeError, match=f"triton_gemm.*{reason}"):
        feed_forward(**arguments, backend="triton_gemm")


def test_without_a_measurement_torchs_products_are_taken() -> None:
    layer = FusedEncoderLayer(16, 2, 48, batch_first=True)
    choice = next(c for c in explain(layer, torch.randn(2, 5, 16)) if c.part == "feed_forward")
    assert choice.taken == "triton"
    assert "no measurement" in choice.why_not["triton_gemm"]


@pytest.mark.parametrize("speedup", [1.5, 0.9])
def test_a_measurement_chooses(speedup: float, monkeypatch) -> None:
    facts = ("cpu", "float32", "gelu", 40, 136, 1024)
    entry = tuned.Entry(*facts, speedup, (speedup,), {"gpu": "this one"})
    monkeypatch.setattr(tuned, "_table", {})
    tuned.take([entry])
    inputs = {**make_inputs(d_out=40), "activation": "gelu"}
    with torch.no_grad():
        expected = feed_forward(**inputs, backend="triton_gemm" if speedup > 1 else "triton")
        assert torch.equal(feed_forward(**inputs), expected)
        layer = FusedEncoderLayer(40, 2, 136, activation="gelu", batch_first=True)
        choice = next(c for c in explain(layer, torch.randn(2, 5, 40)) if c.part == "feed_forward")
        words = f"measured at {speedup} times the speed of triton on this one"
        assert words == (choice.evidence or choice.why_not["triton_gemm"]) and words in str(choice)
        for other in ({"activation": "relu"}, {"input": torch.randn(2000, 40)}):
            arguments = {**inputs, **other}
            found, plain = feed_forward(**arguments), feed_forward(**arguments, backend="triton")
            assert torch.equal(found, plain)
    compiled = torch.compile(feed_forward, fullgraph=True)
    assert torch.equal(compiled(**inputs), expected)


# ----------------------------------------------------------------------------- memory, registration


@with_and_without
@every_activation
@every_backend
def test_what_is_kept(backend: str, activation: str, dropout_p: float) -> None:
    """Besides the arguments one tensor of the hidden width, or none, in the input's dtype."""
    inputs = {name: x.half() for name, x in make_inputs((4, 16, 32), 128, 32).items()}
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    options = options_of(dropout_p, backend=backend, activation=activation)
    arguments = helpers.nbytes(*inputs.values(), options["seed"])
    hidden = 4 * 16 * 128 * 2
    assert helpers.saved_bytes(lambda: feed_forward(**inputs, **options)) == arguments + hidden
    options["save"] = "input"
    assert helpers.saved_bytes(lambda: feed_forward(**inputs, **options)) == arguments


@with_and_without
@every_backend
def test_registration(backend: str, dropout_p: float) -> None:
    inputs = make_inputs((3, 5, 8), 12, 4)
    input, weight1, bias1, weight2, bias2 = inputs.values()
    dropout = TokenDropout(dropout_p, seed_tensor(), 1, None, 5)
    ops = torch.ops.fastattn
    for save, chunk_tokens in (("hidden", 0), ("input", 4)):
        options = ("gelu", *dropout, save, chunk_tokens, backend)
        forward = (input, weight1, bias1, weight2)
        torch.library.opcheck(ops.feed_forward_fwd.default, (*forward, bias2, *options))
        hidden = torch.randn(3, 5, 12) if save == "hidden" else torch.empty(0)
        sample = (torch.randn(3, 5, 4), *forward, hidden, [True] * 5, *options)
        torch.library.opcheck(ops.feed_forward_bwd.default, sample)


@every_backend
def test_compiled_equals_eager(backend: str) -> None:
    def run(input: Tensor, seed: Tensor, **weights: Tensor) -> Tensor:
        options = {"activation": "gelu", "dropout_p": P, "seed": seed, "backend": backend}
        return feed_forward(input.sin(), **weights, **options)

    helpers.assert_compiled_equals_eager(
        run, {**make_inputs((3, 5, 8), 12, 4), "seed": seed_tensor()}
    )


@every_level
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@every_backend
def test_every_element_is_written(sanitizer: Sanitizer, backend, activation, save) -> None:
    inputs = [x.requires_grad_() for x in make_inputs((3, 21, 40), 72).values()]
    out = feed_forward(*inputs, backend=backend, activation=activation, save=save, **options_of())
    sanitizer.assert_written(out)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), inputs))


@with_and_without
@every_backend
def test_a_layer_uses_it(backend: str, dropout_p: float) -> None:
    """The same seed drops the same elements as on the PyTorch path, forward and backward."""
    layer = FusedEncoderLayer(16, 2, 48, dropout=dropout_p, batch_first=True)
    x = torch.randn(2, 5, 16)
    results = []
    for name in (backend, "pytorch"):
        with use_backend(feed_forward=name):
            taken = {choice.part: choice.taken for choice in explain(layer, x)}
            assert taken["feed_forward"] == name
            out = layer(x, seed=seed_tensor())
        results.append((out, *torch.autograd.grad(out.sin().sum(), layer.parameters())))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("layout", "is_taken"),
    [
        (lambda x: x, True),
        (lambda x: torch.nn.functional.pad(x, (0, 8))[:, :40], True),
        (lambda x: torch.nn.functional.pad(x, (1, 3))[:, 1:-3], False),
        (lambda x: torch.nn.functional.pad(x, (0, 1))[:, :40], False),
        (lambda x: x[:1].expand_as(x), False),
        (lambda x: x.t().contiguous().t(), False),
        (lambda x: torch.ones(()).expand_as(x), False),
    ],
)
def test_factors_that_no_descriptor_takes_are_copied(layout, is_taken) -> None:
    x = layout(torch.randn(9, 40))
    found = gemm._aligned(x)
    assert (found is x) is is_taken and torch.equal(found, x)
    assert found.stride(1) == 1 and found.stride(0) % 4 == 0 == found.data_ptr() % 16
