"""The insides of the Triton kernels of ``feed_forward``: their tiles, marks, factors and choice.

tests/ops/feed_forward_checks.py says what they compute.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from fastattn import FusedEncoderLayer, explain, feed_forward, tuned, use_backend
from fastattn.arguments import TokenDropout
from fastattn.kernels import feed_forward_gemm as gemm
from tests import helpers
from tests.kernels.interpreted.sanitizer import Sanitizer
from tests.ops.backends import Backend
from tests.ops.feed_forward_checks import P, check, make_inputs, options_of, seed_tensor

BACKENDS = ("triton", "triton_gemm")

every_backend = pytest.mark.parametrize("backend", BACKENDS)
with_and_without = pytest.mark.parametrize("dropout_p", [0.0, P])


# --------------------------------------------------------------------- products of other machines


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)], ids=str)
def test_the_tiles_of_every_architecture(capability, activation, monkeypatch) -> None:
    """Several tiles down and across; forward keeps what backward starts from."""
    monkeypatch.setattr(gemm, "capability", lambda device: capability)
    inputs = make_inputs((300, 40), 328)
    check(Backend("triton_gemm"), inputs, P, activation)


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
    check(Backend("triton_gemm"), make_inputs((300, 40), 328))


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
@every_backend
def test_registration(backend: str, dropout_p: float) -> None:
    inputs = make_inputs((3, 5, 8), 12, 4)
    input, weight1, bias1, weight2, bias2 = inputs.values()
    dropout = TokenDropout(dropout_p, seed_tensor(), 1, None, 5)
    for save, chunk_tokens in (("hidden", 0), ("input", 4)):
        options = ("gelu", *dropout, save, chunk_tokens, backend)
        forward = (input, weight1, bias1, weight2)
        helpers.assert_registered("feed_forward_fwd", (*forward, bias2, *options))
        hidden = torch.randn(3, 5, 12) if save == "hidden" else torch.empty(0)
        sample = (torch.randn(3, 5, 4), *forward, hidden, [True] * 5, *options)
        helpers.assert_registered("feed_forward_bwd", sample)


@pytest.mark.parametrize("save", ["hidden", "input"])
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
