"""On a CUDA GPU: the allocator of Triton's own products, and which kernels a layer takes."""

from __future__ import annotations

import contextvars
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from fastattn import FusedEncoderLayer, dispatch, explain, feed_forward, tuned, tuning
from tests import helpers
from tests.ops.feed_forward_checks import make_inputs, options_of

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
BACKENDS = ("triton", "triton_gemm")


@pytest.fixture(autouse=True)
def _can_run() -> None:
    for name in BACKENDS:
        reason = dispatch.why_not("feed_forward", name, DEVICE)
        if reason is not None:
            pytest.skip(f"{name}: {reason}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_allocator_of_the_caller_stays(backend: str) -> None:
    import triton
    from triton.runtime import _allocation

    def of_the_caller(size: int, alignment: int, stream: int | None) -> Tensor:
        raise AssertionError("a launch of the library asked the caller's allocator")

    inputs = {name: x.to(DEVICE) for name, x in make_inputs(dtype=torch.bfloat16).items()}
    options = options_of(activation="gelu", backend=backend)
    options["seed"] = options["seed"].to(DEVICE)
    ones = [torch.ones(3, 63, 24, device=DEVICE)]

    def run() -> None:
        triton.set_allocator(of_the_caller)
        helpers.results_of(partial(feed_forward, **options), inputs, None, ones)
        assert _allocation._allocator.get() is of_the_caller

    before = _allocation._allocator.get()
    contextvars.copy_context().run(run)
    assert _allocation._allocator.get() is before


# --------------------------------------------------------------------------------- which is chosen


def test_a_layer_takes_what_was_measured_as_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "_table", {})
    layer = FusedEncoderLayer(64, 4, 256, batch_first=True, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(2, 8, 64, device=DEVICE, dtype=torch.bfloat16)
    text = str(explain(layer, x))
    assert "feed_forward: triton\n" in text and "not triton_gemm: no measurement" in text
    (entry,) = tuning.tune(64, 256, (16,), device=DEVICE)
    assert entry.architecture == "sm_{}{}".format(*torch.cuda.get_device_capability(DEVICE))
    assert len(entry.rounds) == tuning.ROUNDS and min(entry.rounds) > 0
    for speedup, taken in ((2.0, "triton_gemm"), (0.5, "triton")):
        tuned.take([replace(entry, speedup=speedup)])
        assert f"feed_forward: {taken}" in str(explain(layer, x)).split("\n")


def test_a_wrapped_linear_takes_the_kernel_between_the_products() -> None:
    layer = FusedEncoderLayer(64, 4, 256, batch_first=True, device=DEVICE)
    layer.linear1.register_forward_hook(lambda *_: None)
    text = str(explain(layer, torch.randn(2, 8, 64, device=DEVICE)))
    assert "bias_activation_dropout: triton" in text
