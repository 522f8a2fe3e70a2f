"""What the tests of the ops share: accuracy against an oracle, and what backward keeps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: An error of so many units in the last place of the largest (the mean) value always passes:
#: one in the dtype of the result, and four in float64, the rounding of the oracle itself.
FLOOR_ULPS, ORACLE_ULPS = 1.0, 4.0
OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0

Inputs = Mapping[str, Tensor | None]
Results = dict[str, Tensor]


def environment(**variables: str) -> dict[str, str]:
    """For a pytest inside of a test: that of this process without what it tells pytest."""
    inherited = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    return {**inherited, **variables}


def results_of(
    function: Callable[..., Any],
    inputs: Inputs,
    dtype: torch.dtype | None = None,
    cotangents: list[Tensor] | None = None,
) -> Results:
    """Outputs of ``function(**inputs)`` and the gradients of its floating inputs, by name.

    With ``dtype`` floating inputs are converted first. Without ``cotangents`` the gradients flowing
    in are fixed random numbers in the dtype of each output.
    """
    leaves = {name: _leaf(x, dtype) for name, x in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if cotangents is None:
        cotangents = cotangents_of(outputs)
    wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    gradients = torch.autograd.grad(
        outputs,
        list(wanted.values()),
        [g.to(out.dtype) for g, out in zip(cotangents, outputs, strict=True)],
        materialize_grads=True,
    )
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    for (name, x), gradient in zip(wanted.items(), gradients, strict=True):
        assert gradient.dtype == x.dtype and gradient.shape == x.shape, name
        results[f"gradient of {name}"] = gradient
    return results


def cotangents_of(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]


def _leaf(x: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if x is None or not x.is_floating_point():
        return x
    x = x.detach()
    return (x if dtype is None else x.to(dtype)).requires_grad_()


def assert_as_accurate_as_eager(
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    oracle: Callable[..., Any],
    inputs: Inputs,
    floor_ulps: float = FLOOR_ULPS,
) -> None:
    """Errors against a float64 oracle are at most 2x (gradients 3x) those of eager PyTorch.

    Both the largest and the mean absolute error count; ``floor_ulps`` of the largest (the mean)
    value always pass. No input may be written to.
    """
    before = {name: None if x is None else x.clone() for name, x in inputs.items()}
    actual = results_of(ours, inputs)
    for name, x in inputs.items():
        assert x is None or torch.equal(x, before[name]), f"{name} was written to"
    outputs = tuple(x for name, x in actual.items() if name.startswith("output"))
    cotangents = cotangents_of(outputs)
    expected = results_of(oracle, inputs, torch.float64, cotangents)
    baseline = results_of(eager, inputs, None, cotangents)
    assert list(actual) == list(expected) == list(baseline)
    for name, exact in expected.items():
        assert actual[name].shape == exact.shape, name
        assert actual[name].dtype == baseline[name].dtype, name
        assert actual[name].isfinite().all(), name
        if exact.numel() == 0:
            continue
        factor = OUTPUT_FACTOR if name.startswith("output") else GRADIENT_FACTOR
        ulps = floor_ulps * torch.finfo(actual[name].dtype).eps
        ulps += ORACLE_ULPS * torch.finfo(torch.float64).eps
        for norm in (torch.amax, torch.mean):
            error, allowed = (norm((x[name] - exact).abs()).item() for x in (actual, baseline))
            floor = ulps * norm(exact.abs()).item()
            assert error <= factor * allowed + floor, (
                f"{name}: {norm.__name__} error {error:.3g}, eager {allowed:.3g}, floor {floor:.3g}"
            )


def assert_same(actual: Results, expected: Results) -> None:
    """Bit for bit the same outputs and gradients."""
    assert list(actual) == list(expected)
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype, name
        assert torch.equal(actual[name], x), name


def assert_close(actual: Results, expected: Results, **tolerance: float) -> None:
    """The same outputs and gradients but for rounding."""
    assert list(actual) == list(expected)
    for name, x in expected.items():
        torch.testing.assert_close(
            actual[name], x, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def saved_bytes(function: Callable[[], Any]) -> int:
    """Bytes that ``function()`` keeps for backward, each storage counted once."""
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages keeps addresses unique

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function()
    del result
    return sum(storage.nbytes() for storage in kept.values())


def nbytes(*tensors: Tensor | None) -> int:
    return sum(x.nbytes for x in tensors if x is not None)


def assert_tangents_match_gradients(function: Callable[..., Tensor], *primals: Tensor) -> None:
    """Forward mode (dual numbers and ``torch.func.jvp``) agrees with reverse mode, fp64.

    <u, J v> from tangents and <J^T u, v> from autograd are the same number.
    """
    directions = tuple(torch.randn_like(x) for x in primals)
    leaves = tuple(x.detach().requires_grad_() for x in primals)
    out = function(*leaves)
    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, cotangent)
    backward = sum((g * v).sum() for g, v in zip(gradients, directions, strict=True))
    with torch.autograd.forward_ad.dual_level():
        pairs = zip(primals, directions, strict=True)
        duals = (torch.autograd.forward_ad.make_dual(x, v) for x, v in pairs)
        tangent = torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent
    assert tangent is not None and tangent.abs().max() > 0
    torch.testing.assert_close((tangent * cotangent).sum(), backward)
    primal, pushed = torch.func.jvp(function, primals, directions)
    torch.testing.assert_close(primal, out)
    torch.testing.assert_close(pushed, tangent)


def assert_transforms_match_autograd(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """torch.func.grad, and autograd with ``create_graph``, give autograd's gradients, fp64."""

    def loss(*inputs: Tensor) -> Tensor:
        return function(*inputs).sin().sum()

    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    plain = torch.autograd.grad(loss(*leaves), leaves)
    linked = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    functional = torch.func.grad(loss, tuple(range(len(inputs))))(*inputs)
    for a, b, c in zip(plain, linked, functional, strict=True):
        assert b.requires_grad
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)


def registered_ops(*prefixes: str) -> set[str]:
    """Names of this library's registered ops that start with one of ``prefixes``."""
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return {op for library, _, op in names if library == "fastattn" and op.startswith(prefixes)}


def assert_registered(op: str, *samples: tuple[Any, ...]) -> None:
    """torch's own check of an op's schema, fake, autograd and strides, with these arguments."""
    for sample in samples:
        library.opcheck(getattr(torch.ops.fastattn, op).default, sample)


# ------------------------------------------------------------------------- fakes and compilation

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="the inductor backend needs a C++ compiler; none here",
)


def assert_fakes_agree(function: Callable[..., Any], *tensors: Tensor) -> None:
    """``function(*tensors, seed)`` has real shapes, dtypes and strides on fake tensors too.

    Backward included: with gradients wanted the ops' own kernels run, so their strides are seen.
    """
    tensors = tuple(x.detach().requires_grad_() for x in tensors)
    seed = torch.tensor([5])
    real = _layouts(function, tensors, seed)
    with FakeTensorMode() as mode:
        fakes = tuple(mode.from_tensor(x) for x in tensors)
        assert _layouts(function, fakes, mode.from_tensor(seed)) == real


def _layouts(function: Callable[..., Any], tensors: tuple[Tensor, ...], seed: Tensor) -> list[Any]:
    outputs = function(*tensors, seed)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs, tensors, [torch.ones_like(x) for x in outputs])
    return [(x.shape, x.dtype, x.stride()) for x in (*outputs, *gradients)]


def assert_compiled_equals_eager(
    function: Callable[..., Any], *samples: Inputs, backend: str = "aot_eager", **options: Any
) -> None:
    """``torch.compile(fullgraph=True)`` gives eager's outputs and gradients, and drops the same.

    What drops is zero, so the zeros are the same; the rest agrees but for rounding.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend, **options)
    for inputs in samples:
        actual, expected = results_of(compiled, inputs), results_of(function, inputs)
        assert_close(actual, expected)
        for name, x in expected.items():
            assert torch.equal(actual[name] == 0, x == 0), name


def assert_gradients_of_every_order(function: Callable[..., Any], *inputs: Tensor) -> None:
    """First and second derivatives against finite differences, forward mode, torch.func; fp64."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    assert_tangents_match_gradients(function, *inputs)
    assert_transforms_match_autograd(function, *inputs)


def assert_per_sample_gradients(function: Callable[[Tensor], Tensor], samples: Tensor) -> None:
    """``vmap(grad)`` over the first dimension gives autograd's gradient of every sample."""

    def loss(sample: Tensor) -> Tensor:
        return function(sample).sin().sum()

    together = torch.vmap(torch.func.grad(loss))(samples)
    for sample, gradient in zip(samples, together, strict=True):
        leaf = sample.detach().clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf), leaf)[0])
