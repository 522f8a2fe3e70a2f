"""The public ops run the CUDA kernels that g++ compiled."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dropout_add, dropout_add_layer_norm, layer_norm
from fastattn.extension import loading
from tests import helpers
from tests.kernels.cuda_on_cpu.layer_norm_calls import SEED, SITE, P, make_inputs

f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("backend", ["cuda", "cpu"])
@pytest.mark.parametrize("save", ["sum", "output", "copy"])
@pytest.mark.parametrize("dtypes", [(f32, f32), (bf16, f32), (f32, f16), (f16, bf16)], ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 264), (3, 5, 63), (0, 8)], ids=str)
def test_the_ops_run_the_kernels(cuda_by_gxx: None, shape, dtypes, save, backend: str) -> None:
    """Every option of the ops, against the PyTorch backend; C++ kernels with the sanitizer too."""
    rows = make_inputs(math.prod(shape[:-1]), shape[-1], *dtypes)
    inputs = {name: x if x.dim() == 1 else x.view(shape) for name, x in rows.items()}
    inputs["weight"] = inputs["weight"].abs() + 1
    inputs["bias"] = inputs["bias"].clamp(-1, 1)
    names = {"x": "input", "x_bias": "input_bias"}
    inputs = {names.get(name, name): x for name, x in inputs.items()}
    dropping = {"dropout_p": P, "seed": torch.tensor([SEED]), "site": SITE, "batch_first": False}
    ends = {"sum": "input", "output": "output", "copy": "output"}

    def all_ops(backend: str, input: Tensor, **others: Tensor) -> tuple[Tensor, ...]:
        affine = {name: others[name] for name in ("weight", "bias")}
        options = {**dropping, "backend": backend}
        fused = dropout_add_layer_norm(
            input, **others, **options, save=save, return_sum=True, copy_dtype=f16
        )
        alone = layer_norm(input, **affine, out_dtype=bf16, save=ends[save], backend=backend)
        unaligned = F.pad(others["residual"], (1, 0))[..., 1:]
        return *fused, alone, dropout_add(input, unaligned, **options)

    found, expected = (
        helpers.results_of(partial(all_ops, taken), inputs) for taken in (backend, "pytorch")
    )
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape, name
        if x.numel():  # every gradient comes through results of 16 bits
            tolerance = 2**-6 if "gradient" in name else 8 * torch.finfo(x.dtype).eps
            assert (found[name] - x).abs().max() <= tolerance * x.abs().max(), name


def test_the_ops_refuse_float64(cuda_by_gxx: None) -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="cuda.*layer_norm.*no kernels for float64"):
        layer_norm(x, backend="cuda")
    torch.testing.assert_close(dropout_add(x, x), 2 * x)
    low = x.float()
    for arguments in ({"weight": x[0]}, {"out_dtype": f64}, {"copy_dtype": f64}):
        with pytest.raises(RuntimeError, match="no kernels for float64"):
            dropout_add_layer_norm(low, low, **arguments, backend="cuda")
        dropout_add_layer_norm(low, low, **arguments)  # takes another


@pytest.mark.parametrize(
    ("built", "runs", "does_not"),
    [
        ("90", (9, 0), (8, 0)),
        ("80 86", (8, 9), (9, 0)),
        ("80 86", (8, 0), (7, 5)),
        ("86", (8, 6), (8, 0)),
        ("90a", (9, 0), (9, 1)),
        ("80 90+PTX", (12, 0), (7, 5)),
        ("100 120+PTX", (12, 1), (9, 0)),
    ],
)
def test_a_gpu_that_was_not_built_for_is_named(
    cuda_by_gxx: None, monkeypatch: pytest.MonkeyPatch, built: str, runs, does_not
) -> None:
    monkeypatch.setattr(loading._extension, "CUDA_ARCHITECTURES", built)
    loading._why_not_on.cache_clear()
    assert loading._why_not_on(runs) is None
    reason = loading._why_not_on(does_not)
    version = "{}.{}".format(*does_not)
    assert f"not for compute capability {version}" in reason
    assert f"TORCH_CUDA_ARCH_LIST={version}" in reason
    monkeypatch.setattr(loading._extension, "cuda_versions", lambda: (12080, 13000))
    loading._why_not_on.cache_clear()
    assert "built with CUDA 13, but the driver is of CUDA 12" in loading._why_not_on(runs)
    loading._why_not_on.cache_clear()
