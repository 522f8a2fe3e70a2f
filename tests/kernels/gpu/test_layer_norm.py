"""On a CUDA GPU the kernels of norms and residual sums are what the contract and eager say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dispatch, dropout_add, dropout_add_layer_norm, layer_norm
from tests import helpers, reference
from tests.kernels.gpu.test_layer import SEED

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
P, SITE = 0.1, 6
bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = dispatch.why_not("dropout_add_layer_norm", request.param, DEVICE, dtype=fp32)
    if reason is not None:
        pytest.skip(f"{request.param} {reason}")
    return request.param


def fused(backend: str, **options: Any) -> Callable[..., Any]:
    defaults = {"dropout_p": P, "seed": SEED, "site": SITE}
    return partial(dropout_add_layer_norm, backend=backend, **{**defaults, **options})


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype = fp32, stream_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The residual stream and the norm may have a type of their own."""
    inputs = {
        "input": torch.randn(shape).to(dtype),
        "input_bias": torch.randn(shape[-1]).to(dtype),
    }
    for name in ("residual", "weight", "bias"):
        x = torch.randn(shape if name == "residual" else shape[-1:])
        inputs[name] = x.to(stream_dtype or dtype)
    return inputs


def there(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, run on the GPU: its results and the gradients of its inputs come back."""

    def run(**inputs: Tensor | None) -> Any:
        inputs = {name: None if x is None else x.to(DEVICE) for name, x in inputs.items()}
        if "seed" in getattr(function, "keywords", {}):
            inputs["seed"] = function.keywords["seed"].to(DEVICE)
        outputs = function(**inputs)
        return tuple(x.cpu() for x in outputs) if isinstance(outputs, tuple) else outputs.cpu()

    return run


def keep_of(shape: tuple[int, ...], p: float = P, batch_first: bool = True) -> Tensor:
    where = reference.coordinates(shape[:-1], batch_first)
    return reference.residual_keep(SEED.item(), SITE, p, *where, torch.arange(shape[-1]))


# ------------------------------------------------------------------------------------- decisions


# Triton compiles kernels for every width, which takes seconds: not every pair is tested.
@pytest.mark.parametrize(
    ("columns", "dtype"),
    [(n, bf16) for n in (1, 63, 100, 768, 1000, 1001, 1024, 4096, 8192, 8200)]
    + [(1000, fp16), (1000, fp32)],
)
def test_the_kernels_keep_exactly_what_the_contract_keeps(backend, columns, dtype) -> None:
    shape = (3, 37, columns)
    for batch_first in (True, False):
        keep = keep_of(shape, batch_first=batch_first).view(shape)
        expected = reference.factor(keep, P).to(dtype)
        ones = torch.ones(shape, dtype=dtype, device=DEVICE, requires_grad=True)
        options = {
            "dropout_p": P, "seed": SEED.to(DEVICE), "site": SITE, "batch_first": batch_first,
            "backend": backend,
        }  # fmt: skip
        out = dropout_add(ones, None, **options)
        (gradient,) = torch.autograd.grad(out, ones, torch.ones_like(out))
        normalised, total = dropout_add_layer_norm(ones, None, return_sum=True, **options)
        (through_norm,) = torch.autograd.grad(
            (normalised, total), ones, (torch.zeros_like(out), torch.ones_like(out))
        )
        for found in (out, gradient, total, through_norm):
            assert torch.equal(found.cpu(), expected)


def test_packed_rows_keep_what_padded_rows_keep(backend) -> None:
    shape = (4, 50, 136)
    index = torch.randperm(200)[:123]
    ones = torch.ones(123, 136, device=DEVICE)
    found = dropout_add(
        ones, None, dropout_p=P, seed=SEED.to(DEVICE), site=SITE, row_period=50,
        row_index=index.int().to(DEVICE), backend=backend,
    )  # fmt: skip
    assert torch.equal(found.cpu() != 0, keep_of(shape)[index])


# ---------------------------------------------------------------------------------------- values


def eager(
    input: Tensor,
    residual: Tensor,
    input_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    keep: Tensor,
) -> tuple[Tensor, Tensor]:
    total = residual + (input + input_bias) * keep.view(input.shape) * (1 / (1 - P))
    return F.layer_norm(total, total.shape[-1:], weight, bias), total


def oracle(
    input: Tensor,
    residual: Tensor,
    input_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    keep: Tensor,
) -> tuple[Tensor, Tensor]:
    total = reference.dropout_add(input, residual, input_bias, reference.factor(keep, P))
    return reference.layer_norm(total, weight, bias), total


def check(
    backend: str,
    inputs: dict[str, Tensor],
    save: str = "sum",
    of_residual: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """As accurate as eager PyTorch on the same device."""
    keep = keep_of(inputs["input"].shape)
    ours = fused(backend, save=save, return_sum=True)

    def laid_out(residual: Tensor, **others: Tensor) -> tuple[Tensor, Tensor]:
        return ours(residual=of_residual(residual), **others)

    def on_device(**given: Tensor) -> tuple[Tensor, Tensor]:
        return eager(**given, keep=keep.to(DEVICE))

    helpers.assert_as_accurate_as_eager(
        there(partial(laid_out, seed=SEED)), there(on_device), partial(oracle, keep=keep), inputs
    )


@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        (shape, (bf16, bf16))
        for shape in ((3, 37, 1), (3, 37, 63), (5, 200, 256), (4, 300, 768), (40, 512, 1024))
        + ((5, 70, 1000), (3, 20, 4097), (7, 100, 8192), (3, 8200), (2, 65536), (2, 65535))
    ]
    + [
        (shape, dtypes)
        for shape in ((3, 37, 1), (40, 512, 1024), (7, 100, 8192), (2, 65535))
        for dtypes in ((fp32, fp32), (fp16, fp16), (bf16, fp32))
    ],
)
def test_the_kernels_are_as_accurate_as_eager(backend, shape, dtypes) -> None:
    """Shapes with more rows than programs among them."""
    check(backend, make_inputs(shape, *dtypes))


@pytest.mark.parametrize("dtypes", [(fp32, fp32), (bf16, bf16), (bf16, fp32)])
@pytest.mark.parametrize("columns", [1024, 8200])
@pytest.mark.parametrize("save", ["output", "copy"])
def test_backward_from_the_result(backend, save, columns, dtypes) -> None:
    """It starts from a rounded result, so it is held against backward from the sum."""
    inputs = make_inputs((3, 100, columns), *dtypes)
    inputs["weight"] = (inputs["weight"].abs() + 0.5).to(dtypes[1])
    inputs["bias"] *= 0.1
    copy_dtype = bf16 if save == "copy" else None
    found, expected = (
        helpers.results_of(there(fused(backend, save=kept, copy_dtype=copy_dtype)), inputs)
        for kept in (save, "sum")
    )
    for name, x in expected.items():
        allowed = 16 * torch.finfo(copy_dtype or x.dtype).eps * x.abs().max()
        assert (found[name].float() - x.float()).abs().max() <= allowed, name


LAYOUTS = {
    "strided rows": lambda x: F.pad(x, (0, 24))[..., : x.shape[-1]],
    "unaligned": lambda x: F.pad(x, (1, 0))[..., 1:],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [bf16, fp32])
def test_layouts(backend, layout: str, dtype: torch.dtype) -> None:
    check(backend, make_inputs((4, 30, 264), dtype), of_residual=LAYOUTS[layout])


@pytest.mark.parametrize("absent", ["input_bias", "residual", "weight", "bias"])
def test_absent_parts_and_a_copy(backend, absent: str) -> None:
    """Against the PyTorch backend on the CPU."""
    inputs = {**make_inputs((3, 37, 1000)), absent: None}
    options = {"return_sum": True, "copy_dtype": fp64 if backend == "triton" else fp32}
    found = helpers.results_of(there(fused(backend, **options)), inputs)
    expected = helpers.results_of(fused("pytorch", **options), inputs)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [bf16, fp16, fp32])
@pytest.mark.parametrize("columns", [64, 1024, 3072, 8200])
def test_a_norm_alone_is_as_accurate_as_eager(backend, columns: int, dtype: torch.dtype) -> None:
    inputs = make_inputs((8, 300, columns), dtype)
    inputs = {"input": inputs["input"] + 3, "weight": inputs["weight"], "bias": inputs["bias"]}

    def stock(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(input, (columns,), weight, bias)

    ours = partial(layer_norm, backend=backend)
    helpers.assert_as_accurate_as_eager(there(ours), there(stock), reference.layer_norm, inputs)


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
@pytest.mark.parametrize("columns", [1024, 8200])
def test_nan_and_infinity_stay_in_their_row(backend, columns: int, special: float) -> None:
    inputs = make_inputs((2, 20, columns))
    inputs["input"][0, 3, :9] = special
    found, expected = (
        helpers.results_of(function, inputs)
        for function in (there(fused(backend)), fused("pytorch"))
    )
    assert found["output 0"][0, 3].isnan().all()
    assert found["output 0"].isfinite().sum() == 39 * columns
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_two_runs_are_equal_bit_for_bit(backend) -> None:
    """The sums over rows too: more rows than all programs hold at once."""
    inputs = make_inputs((64, 512, 1024), bf16)
    first, second = (helpers.results_of(there(fused(backend)), inputs) for _ in range(2))
    helpers.assert_same(first, second)


def test_the_kernels_compiled_equal_eager(backend) -> None:
    def run(seed: Tensor, **inputs: Tensor) -> tuple[Tensor, ...]:
        out, total = dropout_add_layer_norm(
            **inputs, dropout_p=P, seed=seed, return_sum=True, backend=backend
        )
        return layer_norm(out.sin(), backend=backend), total

    inputs = {name: x.to(DEVICE) for name, x in make_inputs((3, 37, 256)).items()}
    results = []
    torch._dynamo.reset()
    for function in (torch.compile(run, fullgraph=True), run):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        outputs = function(SEED.to(DEVICE), **leaves)
        loss = sum(x.square().sum() for x in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, tuple(leaves.values()))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert torch.equal(results[0][2] == 0, results[1][2] == 0)


def test_the_kernels_in_a_cuda_graph_read_the_seed_of_each_replay(backend) -> None:
    x, seed = torch.randn(64, 512, device=DEVICE), SEED.to(DEVICE)
    call = partial(dropout_add_layer_norm, x, x, dropout_p=P, return_sum=True, backend=backend)
    call(seed=seed)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, total = call(seed=seed)
    for number in (3, 2**63 - 1):
        seed.fill_(number)
        graph.replay()
        expected = call(seed=torch.tensor([number]).to(DEVICE))
        assert torch.equal(out, expected[0]) and torch.equal(total, expected[1])


@pytest.mark.parametrize("dtypes", [(fp32, fp32), (bf16, bf16), (fp16, fp32)])
@pytest.mark.parametrize("shape", [(3, 37, 8), (2, 9, 768), (1, 5, 4096), (2, 3, 1001), (2, 8200)])
def test_small_calls_for_the_sanitizer(shape: tuple[int, ...], dtypes) -> None:
    """Every CUDA kernel once, for compute-sanitizer to watch."""
    inputs = make_inputs(shape, *dtypes)
    inputs["weight"] = inputs["weight"].abs() + 1
    every = {"return_sum": True, "copy_dtype": fp16}
    for options in (every, {"save": "output"}, {**every, "save": "copy"}):
        results = helpers.results_of(there(fused("cuda", **options)), inputs)
        assert all(x.isfinite().all() for x in results.values())
    some = {name: inputs[name] for name in ("input", "residual", "input_bias")}
    add = partial(dropout_add, dropout_p=P, seed=SEED, site=SITE, backend="cuda")
    assert all(x.isfinite().all() for x in helpers.results_of(there(add), some).values())
